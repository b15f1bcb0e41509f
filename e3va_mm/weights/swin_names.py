"""Bring the weights of a Swin Transformer to the names of mmdet and mmseg."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from e3va_mm.errors import CheckpointError
from e3va_mm.weights.state_dicts import tensors_of, to_stock_state

_STOCK = re.compile(r'stages\.\d+\.blocks\.\d+\.attn\.w_msa\.')
_OFFICIAL = re.compile(
    r'layers\.\d+\.blocks\.\d+\.attn\.(qkv|relative_position)'
)
_RENAMES = (
    (r'^layers\.', 'stages.'),
    (r'\.attn\.', '.attn.w_msa.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
)


def unfold_order(value: Tensor) -> Tensor:
    """Reorder the merged channels of a patch merging, the last dimension.

    The official code concatenates four images of C channels, taken at the
    offsets (0, 0), (1, 0), (0, 1), (1, 1). ``nn.Unfold`` gives C groups of
    four offsets, row by row.
    """
    groups = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return groups.transpose(-1, -2).flatten(-2)


def to_stock_keys(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Tensor], str]:
    """Rename the weights of a Swin file to the stock names without prefix.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one under
            ``state_dict`` or ``model``. Of a whole classifier, detector or
            segmentor only the ``backbone.`` part is taken. It is not changed.

    Returns:
        The tensors by stock name (``stages.0.blocks.0.attn.w_msa.qkv.weight``)
        and the format of the file in words. Keys that are no part of the
        stock backbone, such as the ``head.`` of an official file, keep their
        names.

    Raises:
        CheckpointError: If the file has none of the accepted formats.
    """
    state, form = to_stock_state(checkpoint)
    if any(_STOCK.match(key) for key in state):
        return state, form
    if not any(_OFFICIAL.match(key) for key in state):
        first = list(tensors_of(checkpoint) or checkpoint)[:5]
        raise CheckpointError(
            'These are no weights of a Swin Transformer: the first keys are '
            f'{", ".join(first) or "none"}. Accepted are official Swin files '
            "('layers.0.blocks.0.attn.qkv.weight'), MM backbones "
            "('stages.0.blocks.0.attn.w_msa.qkv.weight'), MM models with "
            "such a backbone ('backbone.stages...') and the Swin of "
            "transformers, each also under 'model' or 'state_dict', or with "
            "a leading 'module.'."
        )
    renamed = {}
    for key, value in state.items():
        if '.downsample.' in key:
            value = unfold_order(value)
        for old, new in _RENAMES:
            key = re.sub(old, new, key)
        renamed[key] = value
    return renamed, form if 'transformers' in form else 'official Swin'


def describe_swin(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the size of a Swin Transformer from its stock keys and shapes.

    Args:
        state: Tensors by stock name, as :func:`to_stock_keys` gives. It may
            be incomplete.

    Returns:
        Those of ``embed_dims``, ``depths``, ``num_heads`` and ``window_size``
        that the file tells, by their names in the config. The length of
        ``depths`` is the number of stages in the file.
    """
    found: dict[str, Any] = {}
    embedding = state.get('patch_embed.projection.weight')
    if embedding is not None:
        found['embed_dims'] = embedding.shape[0]
    depths: dict[int, int] = {}
    heads: dict[int, int] = {}
    for key, value in state.items():
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.(.*)', key)
        if not match:
            continue
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
        if match[3] == 'attn.w_msa.relative_position_bias_table':
            # (2 w - 1)^2 offsets within a window of w by w, for each head
            heads[stage] = value.shape[1]
            found['window_size'] = (round(value.shape[0] ** 0.5) + 1) // 2
        elif match[3] == 'attn.w_msa.logit_scale':  # of version 2
            heads[stage] = value.shape[0]
    for name, by_stage in (('depths', depths), ('num_heads', heads)):
        if by_stage:
            found[name] = tuple(by_stage[s] for s in sorted(by_stage))
    return found
