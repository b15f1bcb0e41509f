"""What is installed, what cannot work together, and what mends it.

`python -m e3va_mm.doctor` prints a table of versions and every problem found.
Nothing but the standard library, and rich where it is there, is imported.
"""

from e3va_mm.doctor.checks import CHECKS, Problem, diagnose
from e3va_mm.doctor.snapshot import DISTRIBUTIONS, Snapshot, look

__all__ = [
    'CHECKS',
    'DISTRIBUTIONS',
    'Problem',
    'Snapshot',
    'diagnose',
    'look',
]
