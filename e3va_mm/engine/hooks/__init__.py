from .dataset_check_hook import DatasetCheckHook
from .progress_bar_hook import ProgressBarHook
from .trainable_table_hook import TrainableTableHook

__all__ = ['DatasetCheckHook', 'ProgressBarHook', 'TrainableTableHook']
