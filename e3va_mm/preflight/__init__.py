from e3va_mm.preflight.hook import DatasetCheckHook

__all__ = ['DatasetCheckHook']
