"""`e3va sweep` in a clone; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.cli import main

if __name__ == '__main__':
    sys.exit(main(['sweep', *sys.argv[1:]]))
