"""Build the "digits in the wild" data set; see e3va_mm/datasets/digits.py.

Run: python tools/make_digits.py --out data/digits
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.datasets.digits import build_dataset
from e3va_mm.errors import E3VAError


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('data/digits'),
        help='folder to make (default: %(default)s)',
    )
    for split, count in (('train', 400), ('val', 200), ('test', 200)):
        parser.add_argument(
            f'--{split}',
            type=int,
            default=count,
            help='number of pictures (default: %(default)s)',
        )
    parser.add_argument(
        '--size',
        type=int,
        default=224,
        help='height and width in pixels (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='(default: %(default)s)'
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Build the set, or say that it is complete."""
    args = parse_args(argv)
    start = time.time()
    try:
        built = build_dataset(
            args.out, args.train, args.val, args.test, args.size, args.seed
        )
    except E3VAError as error:
        sys.exit(f'error: {error}')
    if built:
        print(
            f'{args.out}: {args.train} train, {args.val} val and '
            f'{args.test} test pictures of {args.size} x {args.size} '
            f'pixels, made in {time.time() - start:.0f} s'
        )
    else:
        print(f'{args.out}: complete with these settings, left as it is')


if __name__ == '__main__':
    main()
