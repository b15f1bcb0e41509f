"""The version of e3va_mm; nothing else, so that setup.py can read it."""

__version__ = '0.1.0'
