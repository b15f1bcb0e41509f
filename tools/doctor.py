"""Say what is installed, what cannot work together, and what mends it.

The same as `python -m e3va_mm.doctor`, from a plain clone too.
"""

import os
import subprocess
import sys
from pathlib import Path

# In a wheel this file lies in e3va_mm/.mim/tools.
ROOT = Path(__file__).resolve().parents[1]
ROOT = ROOT.parents[1] if ROOT.name == '.mim' else ROOT

if __name__ == '__main__':
    # In a process of its own, because the package refuses to be imported in
    # the very environments that are to be explained, unless started so.
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    sys.exit(
        subprocess.call(
            [sys.executable, '-m', 'e3va_mm.doctor'],
            env={
                **os.environ,
                'PYTHONPATH': os.pathsep.join(filter(None, paths)),
            },
        )
    )
