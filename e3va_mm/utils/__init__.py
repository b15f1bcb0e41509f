from e3va_mm.utils.freezing import mark_trainable
from e3va_mm.utils.params import count_parameters
from e3va_mm.utils.process_group import end_process_group
from e3va_mm.utils.values import is_number, is_whole

__all__ = [
    'count_parameters',
    'end_process_group',
    'is_number',
    'is_whole',
    'mark_trainable',
]
