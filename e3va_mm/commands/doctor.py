"""Say what is installed, what cannot work together, and what mends it."""

import argparse
from collections.abc import Sequence

from e3va_mm.doctor.report import report


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of `e3va doctor`.

    Args:
        argv (Sequence[str], optional): Takes no arguments.

    Returns:
        int: 1 if anything cannot work, else 0.
    """
    argparse.ArgumentParser('e3va doctor', description=__doc__).parse_args(
        argv
    )
    return report()
