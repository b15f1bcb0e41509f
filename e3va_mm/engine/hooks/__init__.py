from .activation_checkpoint_hook import ActivationCheckpointHook
from .adapter_checkpoint_hook import AdapterCheckpointHook
from .atomic_checkpoint_hook import AtomicCheckpointHook
from .dataset_check_hook import DatasetCheckHook
from .exact_resume_hook import ExactResumeHook
from .freeze_hook import FreezeHook
from .measure_hook import MeasureHook
from .progress_bar_hook import ProgressBarHook
from .resume_check_hook import ResumeCheckHook
from .trainable_ema_hook import TrainableEMAHook
from .trainable_table_hook import TrainableTableHook
from .training_guard_hook import TrainingGuardHook

__all__ = [
    'ActivationCheckpointHook',
    'AdapterCheckpointHook',
    'AtomicCheckpointHook',
    'DatasetCheckHook',
    'ExactResumeHook',
    'FreezeHook',
    'MeasureHook',
    'ProgressBarHook',
    'ResumeCheckHook',
    'TrainableEMAHook',
    'TrainableTableHook',
    'TrainingGuardHook',
]
