from .activation_checkpoint_hook import ActivationCheckpointHook
from .adapter_checkpoint_hook import AdapterCheckpointHook
from .dataset_check_hook import DatasetCheckHook
from .measure_hook import MeasureHook
from .progress_bar_hook import ProgressBarHook
from .trainable_table_hook import TrainableTableHook

__all__ = [
    'ActivationCheckpointHook',
    'AdapterCheckpointHook',
    'DatasetCheckHook',
    'MeasureHook',
    'ProgressBarHook',
    'TrainableTableHook',
]
