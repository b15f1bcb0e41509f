"""Test a detector or segmentor; see --help."""

import sys
from pathlib import Path

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.commands.launch import test
from e3va_mm.frameworks.memory import keep_freed_memory

if __name__ == '__main__':
    keep_freed_memory()
    sys.exit(test())
