from .activation_checkpoint_hook import ActivationCheckpointHook
from .dataset_check_hook import DatasetCheckHook
from .measure_hook import MeasureHook
from .progress_bar_hook import ProgressBarHook
from .trainable_table_hook import TrainableTableHook

__all__ = [
    'ActivationCheckpointHook',
    'DatasetCheckHook',
    'MeasureHook',
    'ProgressBarHook',
    'TrainableTableHook',
]
