"""Build the "digits in the wild" data set; see e3va_mm/datasets/digits.py.

Run: python tools/make_digits.py --out data/digits
"""

import argparse
import sys
from pathlib import Path

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.datasets.digits import build_dataset
from e3va_mm.errors import E3VAError


def main(argv=None):
    """Build the set, or say that it is complete."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--out', type=Path, default='data/digits', help='folder to make')
    add('--train', type=int, default=400, help='number of images')
    add('--val', type=int, default=200, help='number of images')
    add('--test', type=int, default=200, help='number of images')
    add('--size', type=int, default=224, help='height and width in pixels')
    add('--seed', type=int, default=0, help='of the images')
    args = parser.parse_args(argv)
    try:
        built = build_dataset(**vars(args))
    except E3VAError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    if built:
        print(
            f'{args.out}: {args.train} train, {args.val} val and {args.test} '
            f'test images of {args.size} x {args.size} pixels'
        )
    else:
        print(f'{args.out}: complete with these settings, left as it is')
    return 0


if __name__ == '__main__':
    sys.exit(main())
