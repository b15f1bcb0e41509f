"""E3VA adapter tuning for MMDetection and MMSegmentation."""

import sys

from e3va_mm.errors import E3VAError
from e3va_mm.version import __version__

__all__ = ['__version__']


def _check_frameworks():
    """Refuse an environment in which the frameworks cannot work.

    Raises:
        E3VAError: If a framework is installed from two distributions, whose
            files then are a mixture of both, or if mmengine is missing.
    """
    from e3va_mm.doctor.checks import doubled, without_mmengine
    from e3va_mm.doctor.snapshot import (
        DISTRIBUTIONS,
        Snapshot,
        findable,
        installed,
    )

    names = [name for row in DISTRIBUTIONS.values() for name in row]
    seen = Snapshot(
        distributions=installed(names), modules=findable(['mmengine'])
    )
    for check in (doubled, without_mmengine):
        for problem in check(seen):
            raise E3VAError(
                f'{problem.what}\nTo mend it:\n  {problem.mend}\n'
                'To see all that is wrong:\n  python -m e3va_mm.doctor'
            )


# The doctor explains what would be refused here, and more.
if 'e3va_mm.doctor' not in sys.orig_argv:
    _check_frameworks()
