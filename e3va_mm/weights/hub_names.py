"""Names of Hugging Face's transformers -> those of the official files.

Families whose official files no stock class of ours takes go to the names of
mmdet and mmseg at once. Both spellings are read: that of the published files,
which ``save_pretrained`` writes, and that of transformers 5 in memory.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Renames = tuple[tuple[str, str], ...]


class _Family(NamedTuple):
    """A family: a key by which it is known, and what becomes of all keys."""

    name: str
    known: str
    renames: Renames
    joined: str = 'attn.qkv.'  # what queries, keys and values become


_BLOCK: Renames = (
    (r'\.(attention|self_attn)\.(attention\.|self\.)?', '.attn.'),
    (r'\.attn\.(q|k|v)(uery|ey|alue|_proj)\.', r'.attn.\1.'),
    (r'\.attn\.(output\.dense|o_proj|out_proj)\.', '.attn.proj.'),
    (r'\.(intermediate\.dense|mlp\.(dense|lin)1)\.', '.mlp.fc1.'),
    (r'\.(output\.dense|mlp\.(dense|lin)2)\.', '.mlp.fc2.'),
    (r'\.(layernorm_before|layer_?norm_?1)\.', '.norm1.'),
    (r'\.(layernorm_after|layer_?norm_?2)\.', '.norm2.'),
    (r'(\.attn)?\.relative_position_bias\.', '.attn.'),
)
_VIT: Renames = (
    (r'^(encoder\.relative|shared)_position_bias\.', 'rel_pos_bias.'),
    (r'^(encoder\.|model\.)?layers?\.', 'blocks.'),
    *_BLOCK,
    (r'\.layer_scale([12])\.lambda1$', r'.ls\1.gamma'),
    (r'\.lambda_([12])$', r'.gamma_\1'),
    (r'\.mlp\.weights_in\.', '.mlp.w12.'),
    (r'\.mlp\.weights_out\.', '.mlp.w3.'),
    (r'^embeddings\.position_embedding(s|\.weight)$', 'pos_embed'),
    (r'^embeddings\.class_embedding$', 'cls_token'),
    (
        r'^(embeddings\.)?patch_embed(dings?)?(\.projection)?\.',
        'patch_embed.proj.',
    ),
    (r'^embeddings\.', ''),
    (r'^pre_layrnorm\.', 'norm_pre.'),
    (r'^(post_)?layernorm\.', 'norm.'),
    (r'^pooler\.layernorm\.', 'fc_norm.'),
)
_DINOV3: Renames = (*_VIT, (r'^register_tokens$', 'storage_tokens'))
_AIMV2: Renames = (
    (r'^embeddings\.rms_norm\.', 'patch_embed.norm.'),
    (r'^embeddings\.patch_embed\.', 'patch_embed.proj.'),
    (r'\.ffn\.gate_proj\.', '.mlp.fc1_g.'),
    (r'\.ffn\.up_proj\.', '.mlp.fc1_x.'),
    (r'\.ffn\.down_proj\.', '.mlp.fc2.'),
    (r'(^|\.)rms_norm([12]?)\.', r'\1norm\2.'),
    *((old, new) for old, new in _VIT if 'patch_embed' not in new),
)
_SAM: Renames = (
    *_VIT,
    (r'^neck\.conv1\.', 'neck.0.'),
    (r'^neck\.norm1\.', 'neck.1.'),
    (r'^neck\.conv2\.', 'neck.2.'),
    (r'^neck\.norm2\.', 'neck.3.'),
)
_SAM2: Renames = (
    *_BLOCK,
    (r'\.mlp\.proj_in\.', '.mlp.fc1.'),
    (r'\.mlp\.proj_out\.', '.mlp.fc2.'),
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
)
_HIERA: Renames = (
    (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'^embeddings\.position_embeddings$', 'pos_embed'),
    (r'^encoder\.stages\.(\d+)\.layers\.', r'blocks.\1.'),
    *_BLOCK,
    (r'^(pooler\.)?layernorm\.', 'head.norm.'),
)
_SWIN: Renames = (
    (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'^embeddings\.norm\.', 'patch_embed.norm.'),
    (r'^encoder\.', ''),
    *_BLOCK,
    (r'\.continuous_position_bias_mlp\.', '.cpb_mlp.'),
    (r'^layernorm\.', 'norm.'),
)
_CONVNEXT: Renames = (
    (r'^embeddings\.patch_embeddings\.', 'downsample_layers.0.0.'),
    (r'^embeddings\.layernorm\.', 'downsample_layers.0.1.'),
    (r'^(encoder|model)\.', ''),
    (
        r'^stages\.(\d+)\.downsampl(ing_layer|e_layers)\.',
        r'downsample_layers.\1.',
    ),
    (r'^stages\.(\d+)\.layers\.', r'stages.\1.'),
    (r'\.depthwise_conv\.', '.dwconv.'),
    (r'\.pointwise_conv([12])\.', r'.pwconv\1.'),
    (r'(^|\.)layer_?norm\.', r'\1norm.'),
    (r'\.layer_scale_parameter$', '.gamma'),
    (r'\.grn\.weight$', '.grn.gamma'),
    (r'\.grn\.bias$', '.grn.beta'),
)
_PYRAMID: Renames = (
    # SegFormer's files count stages behind the kind of module.
    (
        r'^encoder\.(patch_embeddings|block|layer_norm)\.(\d+)\.',
        r'layers.\2.\1.',
    ),
    (r'^(encoder\.layers|stages)\.', 'layers.'),
    (r'^(layers\.\d+)\.patch_embedding(s?)\.proj\.', r'\1.0.projection.'),
    (r'^(layers\.\d+)\.patch_embedding(s?)\.layer_norm\.', r'\1.0.norm.'),
    (r'^(layers\.\d+)\.blocks?\.', r'\1.1.'),
    (r'^(layers\.\d+)\.layer_norm\.', r'\1.2.'),
    *_BLOCK,
    (
        r'\.attn\.(spatial|sequence_reduction\.sequence)_reduction\.',
        '.attn.sr.',
    ),
    (r'\.attn\.(sequence_reduction\.)?layer_norm\.', '.attn.norm.'),
    (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.'),
    (r'\.mlp\.dwconv\.dwconv\.', '.ffn.layers.1.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.4.'),
)
_IN_PROJ = 'attn.attn.in_proj_'
# The first that fits counts.
_FAMILIES = (
    _Family('Dinov2', r'encoder\.layer\.\d+\.layer_scale1\.lambda1', _VIT),
    _Family(
        'DINOv3ViT',  # of the larger models, whose MLP has a gate
        r'(model\.)?layer\.\d+\.mlp\.gate_proj\.weight',
        (
            *_DINOV3,
            (r'\.mlp\.gate_proj\.', '.mlp.w1.'),
            (r'\.mlp\.up_proj\.', '.mlp.w2.'),
            (r'\.mlp\.down_proj\.', '.mlp.w3.'),
        ),
    ),
    _Family(
        'DINOv3ViT',
        r'(model\.)?layer\.\d+\.mlp\.up_proj\.weight',
        (
            *_DINOV3,
            (r'\.mlp\.up_proj\.', '.mlp.fc1.'),
            (r'\.mlp\.down_proj\.', '.mlp.fc2.'),
        ),
    ),
    _Family('BEiT', r'(encoder\.layer|layers)\.\d+\.lambda_1', _VIT),
    _Family(
        'ViT',
        r'(encoder\.layer|layers)\.\d+\.layernorm_before\.weight',
        _VIT,
    ),
    _Family('CLIP or SigLIP', r'embeddings\.patch_embedding\.weight', _VIT),
    _Family('Aimv2', r'encoder\.layers\.\d+\.rms_norm1\.weight', _AIMV2),
    _Family('SAM', r'layers\.\d+\.mlp\.lin1\.weight', _SAM),
    _Family('Sam2', r'blocks\.\d+\.mlp\.proj_in\.weight', _SAM2),
    _Family(
        'Hiera',
        r'encoder\.stages\.\d+\.layers\.\d+\.attn\.qkv\.weight',
        _HIERA,
    ),
    _Family(
        'Swin',
        r'encoder\.layers\.\d+\.blocks\.\d+\.layernorm_before\.weight',
        _SWIN,
    ),
    _Family(
        'ConvNext',
        r'encoder\.stages\.\d+\.layers\.\d+\.dwconv\.weight',
        _CONVNEXT,
    ),
    _Family(
        'DINOv3ConvNext',
        r'(model\.)?stages\.\d+\.layers\.\d+\.depthwise_conv\.weight',
        _CONVNEXT,
    ),
    _Family(
        'PVTv2',
        r'encoder\.layers\.\d+\.blocks\.\d+\.layer_norm_1\.weight',
        _PYRAMID,
        _IN_PROJ,
    ),
    _Family(
        'SegFormer',
        r'(encoder\.block|stages)\.\d+\.(blocks\.)?\d+\.attention\.'
        r'(self\.query|q_proj)\.weight',
        _PYRAMID,
        _IN_PROJ,
    ),
)
# What no frozen backbone reads, and what follows from sizes.
_LEFT_OUT = (
    r'pooler\.dense\..*|hidden_states_norms\..*|'
    r'.*(position_ids|relative_position_index|relative_coords_table)'
)


def from_transformers(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], str | None]:
    """Bring what transformers names to the names of the official files.

    Args:
        tensors: Tensors by name. They are not changed.

    Returns:
        The backbone's tensors by their official name, and the family by the
        name that transformers has for it; of another file all tensors, and
        None.
    """
    for family in _FAMILIES:
        pattern = re.compile(rf'((?:[a-z]\w*\.)*?){family.known}')
        match = next(filter(None, map(pattern.fullmatch, tensors)), None)
        if match is not None:
            return _renamed(tensors, match[1], family), family.name
    return dict(tensors), None


def _renamed(
    tensors: Mapping[str, Tensor], prefix: str, family: _Family
) -> dict[str, Tensor]:
    result = {}
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or re.fullmatch(_LEFT_OUT, name):
            continue
        for old, new in family.renames:
            name = re.sub(old, new, name)
        result[name] = _shaped(name, value)
    _numbered(result)
    for name in [key for key in result if key.endswith('.attn.q.weight')]:
        _join(result, name.removesuffix('attn.q.weight'), family.joined)
    return result


def _numbered(state: dict[str, Tensor]) -> None:
    """Count through blocks that are counted in each stage, in place."""
    found = {
        name: (int(match[1]), int(match[2]))
        for name in state
        if (match := re.match(r'blocks\.(\d+)\.(\d+)\.', name))
    }
    places = sorted(set(found.values()))
    for name, at in found.items():
        rest = name.split('.', 3)[3]
        state[f'blocks.{places.index(at)}.{rest}'] = state.pop(name)


def _shaped(name: str, value: Tensor) -> Tensor:
    """A tensor as the official file has it."""
    if name == 'cls_token':
        return value.reshape(1, 1, -1)
    if name == 'pos_embed' and value.ndim == 2:
        return value[None]
    if name == 'patch_embed.proj.weight' and value.ndim == 2:
        # The linear layer of SigLIP2 over (row, column, colour).
        side = math.isqrt(value.shape[1] // 3)
        return value.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    if re.search(r'\.ffn\.layers\.[04]\.weight$', name) and value.ndim == 2:
        return value[:, :, None, None]  # convolutions in mmdet and mmseg
    return value


def _join(state: dict[str, Tensor], block: str, joined: str) -> None:
    """Join queries, keys and values of a block, in place.

    Where keys have no bias those of the others stay apart, by the names that
    the official files have for them then.
    """
    weights = [state.pop(f'{block}attn.{n}.weight') for n in 'qkv']
    state[f'{block}{joined}weight'] = torch.cat(weights)
    names = [n for n in 'qkv' if f'{block}attn.{n}.bias' in state]
    biases = {n: state.pop(f'{block}attn.{n}.bias') for n in names}
    if len(biases) == len(weights):
        state[f'{block}{joined}bias'] = torch.cat([*biases.values()])
    else:
        state |= {f'{block}attn.{n}_bias': v for n, v in biases.items()}
