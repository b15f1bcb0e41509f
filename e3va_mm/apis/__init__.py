from .multi_task_inferencer import MultiTaskInferencer
from .task import Task

__all__ = ['MultiTaskInferencer', 'Task']
