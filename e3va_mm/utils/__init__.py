from .memory import keep_freed_memory
from .params import count_parameters, mark_trainable

__all__ = ['count_parameters', 'keep_freed_memory', 'mark_trainable']
