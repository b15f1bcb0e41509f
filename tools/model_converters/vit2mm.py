"""Bring the weights of a ViT to the names of a stock class of MM.

    python tools/model_converters/vit2mm.py SRC DST --to CLASS

It reads files of timm and official ones of DINOv2, MAE, SAM, BEiT and EVA-02.
Our backbones read these as they are, so this is for stock configs. No code in
a file is run.
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

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.utils.files import write_whole
from e3va_mm.weights import VIT_TARGETS, read_checkpoint, to_vit_keys
from e3va_mm.weights.state_dicts import converting


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('src', help='the file, or its URL')
    add('dst', type=Path, help='what to write: .pth or .safetensors')
    classes = ', '.join(VIT_TARGETS)
    help = f'the stock class: {classes}'
    add('--to', required=True, choices=VIT_TARGETS, metavar='CLASS', help=help)
    args = parser.parse_args(argv)
    # Refused before anything is read.
    if args.dst.suffix not in ('.pth', '.safetensors'):
        raise ConfigError(
            f'DST should end with .pth or .safetensors, but got {args.dst}.'
        )
    if Path(args.src).expanduser().resolve() == args.dst.resolve():
        raise ConfigError(
            f'DST should be another file than SRC, but both are {args.dst}. '
            'SRC is not overwritten; give another name.'
        )
    with converting(args.src):
        tensors, found = to_vit_keys(read_checkpoint(args.src), args.to)
    # safetensors refuses memory that two tensors share; torch would save all
    # of what a slice was taken from.
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    if args.dst.suffix == '.safetensors':
        content = save(tensors, metadata={'format': 'pt'})
    else:
        buffer = BytesIO()
        torch.save({'state_dict': tensors}, buffer)
        content = buffer.getvalue()
    write_whole(args.dst, content)
    print(
        f'{args.dst}: {len(tensors)} tensors for {args.to} (format of the '
        f'file: {found})'
    )


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
