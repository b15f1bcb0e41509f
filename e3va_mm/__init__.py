"""E3VA adapter tuning for MMDetection and MMSegmentation."""

from e3va_mm.version import __version__

__all__ = ['__version__']
