"""What keeping taps coarsely costs the gradients.

    python benchmarks/lossy_gradients.py

The nano trunk with the weights that come with the package runs over images
of digits: real features. Every value of `save_taps` gives the gradients of
all that trains in the backbone, in fp32, and they are compared with those of
`exact` in fp64. All factors of the adapters are drawn at the scale they start
with (the last one starts at zero otherwise, and the others would have no
gradient). The loss weighs the output maps with white noise, under which the
errors of tokens do not average out.

The same again on a trunk with outlier channels: in every block the rows of the
last linear layers of attention and MLP that belong to the channels 5 and 17
are 100 times as large, and so are these channels of all taps, and of the
residual stream.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import e3va_mm.checkpoint  # noqa: F401 changes the frameworks
from e3va_mm.datasets.digits import make_scene
from e3va_mm.registry import MODELS
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS

# As configs/_base_/swin_nano.py.
NANO = dict(embed_dims=32, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8))
WEIGHTS = 'e3va_mm://swin_nano_digits.safetensors'
OUTLIERS = (5, 17)
FACTOR = 100.0
# Mean and standard deviation of the stock data preprocessor, RGB.
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)

Gradients = dict[str, Tensor]


def scene_images(count: int, size: int) -> Tensor:
    """(count, 3, size, size), normalised, from the split for training."""
    scenes = [make_scene('train', i, size).image for i in range(count)]
    images = torch.stack(
        [torch.from_numpy(s).permute(2, 0, 1) for s in scenes]
    )
    return (images - MEAN) / STD


def backbone(
    save_taps: str,
    outliers: bool = False,
    seed: int = 0,
    compute: str | None = None,
) -> nn.Module:
    """The nano backbone with drawn adapters, in fp32.

    Args:
        save_taps (str): How taps are kept.
        outliers (bool): Enlarge the channels ``OUTLIERS`` of all taps.
            Defaults to False.
        seed (int): Of the adapters. Defaults to 0.
        compute (str, optional): Type of their products. Defaults to theirs.
    """
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(
            dict(
                type='e3va_mm.E3VASwinTransformer',
                pretrain_img_size=112,
                **NANO,
                tuner=dict(save_taps=save_taps, compute=compute),
                init_cfg=dict(type='Pretrained', checkpoint=WEIGHTS),
            )
        )
    model.init_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in model.side_path.named_parameters():
            if not name.endswith('bias'):
                # (K, in, out) of a bank
                factor.normal_(
                    std=1 / math.sqrt(factor.shape[-2]), generator=generator
                )
        if outliers:
            for last in branch_ends(model):
                last.weight[list(OUTLIERS)] *= FACTOR
                last.bias[list(OUTLIERS)] *= FACTOR
    return model.train()


def branch_ends(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose outputs are the taps."""
    return [
        layer
        for stage in model.stages
        for block in stage.blocks
        for layer in (block.attn.w_msa.proj, block.ffn.layers[1])
    ]


def gradients(model: nn.Module, images: Tensor, seed: int = 0) -> Gradients:
    """Gradients by name under a loss of white noise, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.side_path.parameters()).dtype
    outputs = model(images.to(dtype))
    loss = 0.0
    for output in outputs:
        noise = torch.randn(output.shape, generator=generator)
        loss = loss + (output * noise.to(dtype)).sum() / noise[0].numel()
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def cosine(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of all values as one vector."""
    return torch.cosine_similarity(_joined(got), _joined(wanted), 0).item()


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference by norm of what is wanted, as one vector."""
    wanted = _joined(wanted)
    return ((_joined(got) - wanted).norm() / wanted.norm()).item()


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def channel_errors(got: Gradients, wanted: Gradients) -> dict[str, Tensor]:
    """Relative errors of the first factors, channel by channel.

    A row of a first factor (K, C, rank) belongs to a channel of its tap.

    Returns:
        dict[str, Tensor]: For ``outliers``, the channels ``OUTLIERS`` of all
        adapters, and for the ``rest`` the errors in no order.
    """
    errors = {'rest': [], 'outliers': []}
    for name, target in wanted.items():
        if name.endswith('down.p'):
            rows = (got[name] - target).norm(dim=-1) / target.norm(dim=-1)
            for adapter in rows:
                for channel, error in enumerate(adapter):
                    part = 'outliers' if channel in OUTLIERS else 'rest'
                    errors[part].append(error)
    return {part: torch.stack(found) for part, found in errors.items()}


def compare(got: Gradients, wanted: Gradients) -> dict:
    """Figures of one way to keep taps.

    Args:
        got (dict[str, Tensor]): Gradients by name.
        wanted (dict[str, Tensor]): Those of ``exact`` in fp64.

    Returns:
        dict: ``cosine`` and ``error`` of all gradients as one vector; for
        ``rest`` and ``outliers`` the relative errors of single channels of
        the first factors: ``median``, ``worst_decile``, where it begins, and
        ``worst``.
    """
    return dict(
        cosine=cosine(got.values(), wanted.values()),
        error=relative_error(got.values(), wanted.values()),
        **{
            part: dict(
                median=errors.median().item(),
                worst_decile=errors.quantile(0.9).item(),
                worst=errors.max().item(),
            )
            for part, errors in channel_errors(got, wanted).items()
        },
    )


def measure(
    images: Tensor,
    outliers: bool,
    modes: Sequence[str] = tuple(TAP_CODECS),
    compute: str | None = None,
) -> dict[str, dict]:
    """Figures of each way to keep taps; see :func:`compare`."""
    wanted = gradients(backbone('exact', outliers).double(), images)
    return {
        mode: compare(
            gradients(backbone(mode, outliers, compute=compute), images),
            wanted,
        )
        for mode in modes
    }


def table(title: str, figures: Mapping[str, dict]) -> Table:
    """A row for each way to keep taps."""
    made = Table(title=title)
    made.add_column('save_taps')
    for heading in ('1 - cosine', 'error', 'rest', 'outliers'):
        made.add_column(heading, justify='right')
    for mode, row in figures.items():
        parts = [
            ' / '.join(f'{value:.0e}' for value in row[part].values())
            for part in ('rest', 'outliers')
        ]
        made.add_row(
            mode, f'{1 - row["cosine"]:.1e}', f'{row["error"]:.1e}', *parts
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--images', '--pictures', type=int, default=4)
    parser.add_argument('--size', type=int, default=224, help='in pixels')
    parser.add_argument(
        '--compute', help="the side path's option of that name"
    )
    parser.add_argument('--json', type=Path, metavar='FILE')
    args = parser.parse_args(argv)

    MMLogger.get_instance('benchmark', log_level='WARNING')
    images = scene_images(args.images, args.size)
    console = Console(width=max(Console().width, 96))
    results = {}
    for name, outliers in (('real features', False), ('outliers', True)):
        results[name] = measure(images, outliers, compute=args.compute)
        console.print(table(f'Gradients, {name}', results[name]))
    console.print(
        'Against exact in fp64. 1 - cosine and error: all gradients of side '
        'path and output norms, as one vector. Rest and outliers: relative '
        'error of single channels of the first factors, median / where the '
        f'worst decile begins / worst; outliers are the channels {OUTLIERS}, '
        f'{FACTOR:.0f} times as large in the second table.',
        soft_wrap=True,
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main()
