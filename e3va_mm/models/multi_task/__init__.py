from .multi_task_data_preprocessor import MultiTaskDataPreprocessor
from .multi_task_model import MultiTaskModel

__all__ = ['MultiTaskDataPreprocessor', 'MultiTaskModel']
