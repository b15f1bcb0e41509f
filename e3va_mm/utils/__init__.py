from .params import count_parameters, mark_trainable

__all__ = ['count_parameters', 'mark_trainable']
