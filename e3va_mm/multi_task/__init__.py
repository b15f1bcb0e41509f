from e3va_mm.multi_task.data_preprocessor import MultiTaskDataPreprocessor
from e3va_mm.multi_task.dataset import MultiTaskDataset
from e3va_mm.multi_task.model import MultiTaskModel

__all__ = ['MultiTaskDataPreprocessor', 'MultiTaskDataset', 'MultiTaskModel']
