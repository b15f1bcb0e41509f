"""Bring the weights of a ViT to the names of a stock class of MM.

    python tools/model_converters/vit2mm.py SRC DST --to CLASS

Taken are files of timm and official ones of DINOv2, MAE, SAM, BEiT and
EVA-02. The side path backbones read these as they are, so this is for stock
configs. Nothing that a file may contain is run.
"""

import argparse
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save
from torch import Tensor

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.utils.files import write_whole
from e3va_mm.weights import VIT_TARGETS, read_checkpoint, to_vit_keys
from e3va_mm.weights.state_dicts import converting

SUFFIXES = ('.pth', '.safetensors')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', help='the file, or its URL')
    parser.add_argument(
        'dst', type=Path, help='what to write: .pth or .safetensors'
    )
    parser.add_argument(
        '--to',
        required=True,
        choices=VIT_TARGETS,
        metavar='CLASS',
        help=f'the stock class: {", ".join(VIT_TARGETS)}',
    )
    return parser.parse_args(argv)


def check(src: str, dst: Path) -> None:
    """Refuse, before anything is read, what cannot be written."""
    if dst.suffix not in SUFFIXES:
        raise ConfigError(
            f'DST should end with {" or ".join(SUFFIXES)}, but got {dst}.'
        )
    if Path(src).expanduser().resolve() == dst.resolve():
        raise ConfigError(
            f'DST should be another file than SRC, but both are {dst}. SRC is '
            'not overwritten; give another name.'
        )


def write(tensors: dict[str, Tensor], dst: Path) -> None:
    """Write the file whole, or not at all."""
    # safetensors refuses memory that two tensors share; torch would save all
    # of what a slice was taken from.
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    if dst.suffix == '.safetensors':
        content = save(tensors, metadata={'format': 'pt'})
    else:
        buffer = BytesIO()
        torch.save({'state_dict': tensors}, buffer)
        content = buffer.getvalue()
    write_whole(dst, content)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file."""
    args = parse_args(argv)
    check(args.src, args.dst)
    with converting(args.src):
        tensors, found = to_vit_keys(read_checkpoint(args.src), args.to)
    write(tensors, args.dst)
    print(
        f'{args.dst}: {len(tensors)} tensors for {args.to} (format of the '
        f'file: {found})'
    )


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
