"""Official names -> those of stock classes, where a table says it all."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from e3va_mm.weights.swin_names import describe_swin, unfold_order

Renames = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

_SWIN: Renames = (
    (r'^layers\.', 'stages.'),
    (r'\.attn\.(?!w_msa\.)', '.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^norm\.', 'norm3.'),
)
# By the name of the stock class; Meta's names and timm's.
_RENAMES: dict[str, Renames] = {
    'ConvNeXt': (
        (r'^stem\.', 'downsample_layers.0.'),
        (r'^stages\.(\d+)\.downsample\.', r'downsample_layers.\1.'),
        (r'^stages\.(\d+)\.blocks\.', r'stages.\1.'),
        (r'\.(dwconv|conv_dw)\.', '.depthwise_conv.'),
        (r'\.(pwconv|mlp\.fc)([12])\.', r'.pointwise_conv\2.'),
        (r'\.mlp\.grn\.weight$', '.grn.gamma'),
        (r'\.mlp\.grn\.bias$', '.grn.beta'),
        (r'^(head\.)?norm\.', 'norm3.'),
    ),
    'SwinTransformer': _SWIN,  # mmpretrain's
    'SwinTransformerV2': (
        (
            r'^layers\.(\d+)\.downsample\.',
            lambda match: f'stages.{int(match[1]) + 1}.downsample.',
        ),
        *_SWIN,
    ),
}


def to_class_names(
    state: Mapping[str, Tensor], stock_class: str
) -> dict[str, Tensor]:
    """Bring tensors to the names of a stock class.

    Args:
        state: Tensors by official or stock name.
        stock_class: Name of the class.

    Returns:
        The same by stock name; all as it was, if the class is not in the
        table.
    """
    renames = _RENAMES.get(stock_class, ())
    renamed = {}
    for key, value in state.items():
        name = key
        for old, new in renames:
            name = re.sub(old, new, name)
        if name.endswith('.grn.gamma') or name.endswith('.grn.beta'):
            value = value.flatten()
        elif name != key and '.downsample.' in name:
            # The norm of V2 comes behind the reduction.
            if stock_class == 'SwinTransformer' or 'reduction' in name:
                value = unfold_order(value)
        renamed[name] = value
    return renamed


def describe_class(
    state: Mapping[str, Tensor], stock_class: str
) -> dict[str, Any]:
    """Infer the size of a backbone from its stock keys and shapes.

    Args:
        state: Tensors by stock name. It may be incomplete.
        stock_class: Name of the class.

    Returns:
        What the file tells, by the names of the config; nothing of a class
        that is not known.
    """
    if stock_class.startswith('SwinTransformer'):
        return describe_swin(state)
    if stock_class != 'ConvNeXt':
        return {}
    blocks = re.compile(r'stages\.(\d+)\.(\d+)\.depthwise_conv\.weight')
    depths: dict[int, int] = {}
    channels: dict[int, int] = {}
    for key, value in state.items():
        if match := blocks.fullmatch(key):
            stage = int(match[1])
            depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
            channels[stage] = value.shape[0]
    sizes = dict(depths=depths, channels=channels)
    return {
        name: tuple(values[stage] for stage in sorted(values))
        for name, values in sizes.items()
        if values
    }
