from e3va_mm.apis.multi_task_inferencer import MultiTaskInferencer
from e3va_mm.apis.task import Task

__all__ = ['MultiTaskInferencer', 'Task']
