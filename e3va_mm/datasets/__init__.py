"""Data sets, and checks of those of the frameworks."""

from .multi_task_dataset import MultiTaskDataset

__all__ = ['MultiTaskDataset']
