"""Write the network of a trained model as a file for torch.export or ONNX.

    e3va export CONFIG CHECKPOINT --out model.pt2   # or model.onnx

Exported is what lies between data preprocessor and post-processing: of a
segmentor the logits, of a detector the maps of the neck and the outputs of
its dense head (the RPN, where there are two stages). Batch and size of the
images are fixed. The file is read again and compared with the model on other
images than it was made with; beyond the tolerance the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import load_checkpoint

from e3va_mm.commands import launching
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.export import (
    Network,
    check_out,
    differences,
    export_network,
    preprocessed,
)
from e3va_mm.frameworks.loaders import whole_checkpoint
from e3va_mm.measure.inputs import image_size, set_image_size
from e3va_mm.utils.tuned import side_path_backbones


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va export``; 1 if the file gives something else."""
    parser = argparse.ArgumentParser(
        'e3va export',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', type=Path)
    add('checkpoint', type=Path)
    add('--out', type=Path, required=True, help='a .pt2 or .onnx file')
    size = 'of the images, in pixels; default: that of training'
    add('--size', type=int, nargs=2, metavar=('H', 'W'), help=size)
    add('--batch', type=int, default=1, help='images (default: 1)')
    help_ = 'largest difference over the largest value of an output (0.001)'
    add('--tolerance', type=float, default=1e-3, help=help_)
    add('--cfg-options', nargs='+', action=launching.Options)
    return launching.exit_code(_export, parser.parse_args(argv))


def _export(args: argparse.Namespace) -> int:
    config = launching.read_config(args.config, args.cfg_options)
    launching.check_checkpoint(args.checkpoint)
    check_out(args.out)
    if min(args.size or [1]) < 1 or args.batch < 1:
        raise ConfigError(
            f'--size and --batch should be at least 1, but got {args.size} '
            f'and {args.batch}.'
        )
    size = tuple(args.size) if args.size else image_size(config)
    set_image_size(config, size)
    model = revert_sync_batchnorm(launching.build_model(config))
    with whole_checkpoint(str(args.checkpoint)):
        load_checkpoint(model, str(args.checkpoint), 'cpu')
    backbones = dict(side_path_backbones(model))
    if any(each.trunk_source is None for each in backbones.values()):
        raise CheckpointError(
            f'{args.checkpoint} brings no weights for the trunk, which is '
            'random. Take a checkpoint of the whole model.'
        )
    network = Network(model)
    torch.manual_seed(0)
    inputs, others = (preprocessed(model, args.batch, size) for _ in range(2))
    run = export_network(network, inputs, args.out)
    found = differences(run, network, others)
    print(f'inputs: {tuple(inputs.shape)}, preprocessed')
    for name, (shape, absolute, relative) in found.items():
        print(f'{name}: {shape}, differs by {absolute:.1e} ({relative:.1e})')
    print(
        f'{args.out}: largest difference '
        f'{max(each.absolute for each in found.values()):.1e}, relative '
        f'{max(each.relative for each in found.values()):.1e}, allowed '
        f'{args.tolerance:.1e}'
    )
    # Also for values that are no numbers.
    if not all(e.relative <= args.tolerance for e in found.values()):
        print(
            f'error: {args.out} does not give what the model gives.',
            file=sys.stderr,
        )
        return 1
    return 0
