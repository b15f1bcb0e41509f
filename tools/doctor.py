"""`e3va doctor` in a clone; see --help."""

import sys
from pathlib import Path

# Runs from a plain clone too; in a wheel it lies in e3va_mm/.mim/tools.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['doctor', *sys.argv[1:]]))
