"""What each candidate for a better E3VA brings, on validation.

    python benchmarks/ablation.py --jobs 2

Trains E3VA and all of benchmarks/candidates.py by the comparison's protocol,
with the first seed and one learning rate; `--methods e3va,state` takes some,
`--seeds 2` has more seeds, `--no-measure` leaves costs out. The other options
are those of tools/compare.py. If interrupted, rerun the command to resume.
The data must be there: python tools/make_digits.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.candidates import CANDIDATES
from e3va_mm.commands import compare
from e3va_mm.comparison import SIDE_PATHS

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'benchmarks/ablation_config.py'
PROTOCOL = [
    '--val-only',
    *('--lrs', '2e-3', '--seeds', '1'),
    *('--work-dir', str(ROOT / 'work_dirs/ablation')),
]


def main() -> None:
    """Train what is missing, then print the table."""
    if {'-h', '--help'} & {*sys.argv}:
        print(__doc__)
        return
    SIDE_PATHS.update(CANDIDATES)
    every = ','.join(['e3va', *CANDIDATES])
    options = ['--methods', every, *PROTOCOL, *sys.argv[1:]]
    sys.exit(compare.main([str(CONFIG), *options]))


if __name__ == '__main__':
    main()
