"""Write the network of a trained model as a file for torch.export or ONNX.

    python tools/export.py CONFIG CHECKPOINT --out model.pt2   # or model.onnx

Exported is what lies between data preprocessor and post-processing: of a
segmentor the logits, of a detector the maps of the neck and the outputs of
its dense head (the RPN, where there are two stages). Batch and size of the
pictures are fixed. The file is read again and compared with the model on
other pictures than it was made with; beyond the tolerance the exit code is 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config, DictAction
from torch import nn

import e3va_mm.checkpoint  # noqa: F401  checkpoints run no code
from e3va_mm.errors import CheckpointError, ConfigError, E3VAError
from e3va_mm.export import (
    Network,
    check_out,
    differences,
    export_network,
    preprocessed,
)
from e3va_mm.measure.inputs import image_size, set_image_size
from e3va_mm.models import SidePathBackbone
from e3va_mm.weights import match_state, read_checkpoint


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument(
        '--out', type=Path, required=True, help='a .pt2 or .onnx file'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the pictures, in pixels; default: that of training',
    )
    parser.add_argument(
        '--batch', type=int, default=1, help='pictures (default: %(default)s)'
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-3,
        help='the largest difference that is allowed, relative to the largest '
        'value of an output (default: %(default)s)',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse, before anything is built, what cannot be had."""
    if not args.config.is_file():
        raise ConfigError(f'{args.config}: no such config file.')
    if not args.checkpoint.is_file():
        raise CheckpointError(f'{args.checkpoint}: no such checkpoint file.')
    check_out(args.out)
    if args.size and min(args.size) < 1:
        raise ConfigError(
            f'--size should be at least 1 1, but got {args.size[0]} '
            f'{args.size[1]}.'
        )
    if args.batch < 1:
        raise ConfigError(
            f'--batch should be at least 1, but got {args.batch}.'
        )


def initialiser(config: Config) -> Callable[..., nn.Module]:
    """What builds, loads and returns a model in eval mode."""
    scope = config.get('default_scope')
    if scope == 'mmdet':
        from mmdet.apis import init_detector as init
    elif scope == 'mmseg':
        from mmseg.apis import init_model as init
    else:
        raise ConfigError(
            "`default_scope` of the config should be 'mmdet' or 'mmseg', but "
            f'got {scope!r}.'
        )
    return init


def check_arrived(model: nn.Module, checkpoint: Path) -> None:
    """Refuse a file that has left a part random: mmengine only warns."""
    expected = model.state_dict()
    found = read_checkpoint(checkpoint)
    found = found.get('state_dict', found)
    if isinstance(model.backbone, SidePathBackbone):
        if model.backbone.trunk_source is None:
            raise CheckpointError(
                f'{checkpoint} brings no weights for the trunk, which is '
                'random. Take a checkpoint of the whole model.'
            )
        # Whatever else it holds, the backbone has checked by itself.
        expected, found = (
            {k: v for k, v in state.items() if not k.startswith('backbone.')}
            for state in (expected, found)
        )
    match_state(
        expected,
        found,
        expected_leftovers=['.*'],
        what='model of the config',
        source=str(checkpoint),
        hint='Take the config that the checkpoint was trained with.',
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Export and compare; 1 if the file gives something else."""
    args = parse_args(argv)
    check(args)
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    init = initialiser(config)
    size = tuple(args.size) if args.size else image_size(config)
    set_image_size(config, size)
    model = init(config, str(args.checkpoint), device='cpu')
    check_arrived(model, args.checkpoint)
    network = Network(model)
    torch.manual_seed(0)
    inputs, others = (preprocessed(model, args.batch, size) for _ in range(2))
    run = export_network(network, inputs, args.out)
    found = differences(run, network, others)
    print(f'inputs: {tuple(inputs.shape)}, preprocessed')
    for name, (shape, absolute, relative) in found.items():
        print(f'{name}: {shape}, differs by {absolute:.1e} ({relative:.1e})')
    absolute = max(each.absolute for each in found.values())
    relative = max(each.relative for each in found.values())
    print(
        f'{args.out}: largest difference {absolute:.1e}, relative '
        f'{relative:.1e}, allowed {args.tolerance:.1e}'
    )
    # Also for values that are no numbers.
    if not all(e.relative <= args.tolerance for e in found.values()):
        print(
            f'error: {args.out} does not give what the model gives.',
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except E3VAError as error:
        sys.exit(f'error: {error}')
