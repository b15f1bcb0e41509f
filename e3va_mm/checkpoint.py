"""Named by configs, so that checkpoints are read safely from the start."""

from e3va_mm import weights  # noqa: F401
