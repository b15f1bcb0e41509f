"""Bring the weights of a Vision Transformer to the names of a stock class.

Official files share the names of timm ('blocks.0.attn.qkv.weight'), with a few
of their own. What a stock class can express is brought to its form, so that it
computes the same; what it cannot is refused, because a frozen trunk would
silently compute something else.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.utils.listing import listed
from e3va_mm.weights.state_dicts import part_of, tensors_of, to_stock_state

_BLOCK = re.compile(r'blocks\.(?:\d+\.)?(\d+)\.(.+)')
_OFFICIAL = re.compile(r'blocks\.(?:\d+\.)?\d+\.attn\.(qkv|q_proj)\.weight')
# Tokens beside the patches' and the class token's, as timm or Meta name them.
_EXTRA_TOKENS = {
    'register_tokens': 'registers',
    'reg_token': 'registers',
    'storage_tokens': 'registers',
    'dist_token': 'a second class token',
}
_TIMM = 'e3va_mm.E3VABackbone over mmpretrain.TIMMBackbone'
# -- to the form of a stock class: each changes the tensors of a block --------

Parts = dict[str, Tensor]


def _unpack_swiglu(parts: Parts) -> None:
    """Give a gated MLP, which timm packs into its fc1, DINOv2's names."""
    first, second = (parts.get(f'mlp.fc{i}.weight') for i in (1, 2))
    if first is None or second is None:
        return
    if first.shape[0] == 2 * second.shape[1]:
        for old, new in (('mlp.fc1.', 'mlp.w12.'), ('mlp.fc2.', 'mlp.w3.')):
            for kind in ('weight', 'bias'):
                if old + kind in parts:
                    parts[new + kind] = parts.pop(old + kind)


def _join_bias(parts: Parts) -> None:
    """Join the biases of queries and values; keys of BEiT have none."""
    if 'attn.q_bias' in parts and 'attn.v_bias' in parts:
        query, value = (parts.pop(f'attn.{n}_bias') for n in 'qv')
        key = parts.pop('attn.k_bias', torch.zeros_like(query))
        parts['attn.qkv.bias'] = torch.cat([query, key, value])


def _join_bias_unless_gated(parts: Parts) -> None:
    """Leave it apart in EVA-02, which looks like a ViT without its RoPE."""
    if 'mlp.w12.weight' not in parts:
        _join_bias(parts)


def _join_layers(parts: Parts) -> None:
    """Join what EVA-02's larger models hold apart."""
    for new, names in (
        ('attn.qkv.weight', [f'attn.{n}_proj.weight' for n in 'qkv']),
        ('mlp.w12.weight', ['mlp.w1.weight', 'mlp.w2.weight']),
        ('mlp.w12.bias', ['mlp.w1.bias', 'mlp.w2.bias']),
    ):
        if all(name in parts for name in names):
            parts[new] = torch.cat([parts.pop(name) for name in names])


def _fold_scales(parts: Parts) -> None:
    """Multiply layer scales into the layers before them.

    mmseg's ViT has none, and scale * (W x + b) = (scale W) x + scale b.
    """
    for i, layer in ((1, 'attn.proj'), (2, 'mlp.fc2')):
        weight, bias = f'{layer}.weight', f'{layer}.bias'
        for scale in (f'ls{i}.gamma', f'gamma_{i}'):
            if scale in parts and weight in parts:
                gamma = parts.pop(scale)
                parts[weight] = gamma[:, None] * parts[weight]
                if bias in parts:
                    parts[bias] = gamma * parts[bias]


def _add_class_position(rest: Parts, blocks: dict[int, Parts]) -> None:
    """Add a row of zeros where the class token has no position.

    As in DeiT III and timm's ``no_embed_class``; the stock classes add a
    position to every token.
    """
    positions = rest.get('pos_embed')
    if positions is None or positions.ndim != 3 or 'cls_token' not in rest:
        return
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        none = torch.zeros_like(positions[:, :1])
        rest['pos_embed'] = torch.cat([none, positions], dim=1)


def _copy_shared_table(rest: Parts, blocks: dict[int, Parts]) -> None:
    """Give every block a copy of the table that BEiT's pre-training shares."""
    for name in ('relative_position_bias_table', 'relative_position_index'):
        shared = rest.pop(f'rel_pos_bias.{name}', None)
        if shared is not None:
            for parts in blocks.values():
                parts[f'attn.{name}'] = shared.clone()


# -- the stock classes --------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """A stock class.

    Attributes:
        computes: Matches what its blocks have, by stock name.
        block: Renames within a block.
        rest: Renames outside of the blocks, beside those of all.
        prepare: Bring a block to what the class computes, before.
        prepare_rest: The same for everything else.
        refuses: Matches keys outside of the blocks that it cannot use.
        needs: A tensor that at least one block must have, if given.
        first: A tensor of a block by which its own files are known.
    """

    computes: str
    block: tuple[tuple[str, str], ...]
    rest: tuple[tuple[str, str], ...] = ()
    prepare: tuple[Callable, ...] = ()
    prepare_rest: tuple[Callable, ...] = ()
    refuses: str = r'rel_pos_bias\..*'
    needs: str | None = None
    first: str = 'attn.qkv.weight'


_REST = (
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^norm\.', 'ln1.'),
)
_MEAN = (r'^fc_norm\.', 'ln2.')
_COMMON = (
    (r'^norm([12])\.', r'ln\1.'),
    (r'^mlp\.fc1\.', 'ffn.layers.0.0.'),
    (r'^mlp\.fc2\.', 'ffn.layers.1.'),
)
_FFN = r'ffn\.layers\.(0\.0|1)\.(weight|bias)|ln[12]\.(weight|bias)'
_VIT = rf'{_FFN}|attn\.(qkv|proj)\.(weight|bias)'
_BEIT = dict(
    computes=rf'{_VIT}|gamma_[12]|attn\.[qkv]_bias|'
    r'attn\.relative_position_(bias_table|index)',
    block=(*_COMMON, (r'^ls([12])\.gamma$', r'gamma_\1')),
)
_TARGETS = {
    'mmpretrain.VisionTransformer': _Target(
        computes=rf'{_VIT}|attn\.gamma1\.weight|ffn\.gamma2\.weight|'
        r'ffn\.(w12|w3)\.(weight|bias)',
        block=(
            *_COMMON,
            (r'^(ls1\.gamma|gamma_1)$', 'attn.gamma1.weight'),
            (r'^(ls2\.gamma|gamma_2)$', 'ffn.gamma2.weight'),
            (r'^mlp\.(w12|w3)\.', r'ffn.\1.'),
        ),
        rest=(_MEAN, (r'^norm_pre\.', 'pre_norm.')),
        prepare=(_unpack_swiglu, _join_bias_unless_gated),
        prepare_rest=(_add_class_position,),
    ),
    'mmpretrain.ViTSAM': _Target(
        computes=rf'{_VIT}|attn\.rel_pos_[hw]',
        block=_COMMON,
        rest=((r'^neck\.', 'channel_reduction.'),),
        needs='attn.rel_pos_h',
    ),
    'mmpretrain.BEiTViT': _Target(
        **_BEIT,
        rest=(_MEAN,),
        prepare=(_unpack_swiglu,),
        prepare_rest=(_add_class_position,),
        refuses=r'(?!)',
    ),
    'mmpretrain.ViTEVA02': _Target(
        computes=r'(norm[12]|attn\.(qkv|proj)|mlp\.(w12|norm|w3))\.'
        r'(weight|bias)|attn\.rope\.freqs_(cos|sin)',
        block=((r'^mlp\.ffn_ln\.', 'mlp.norm.'),),
        rest=(_MEAN,),
        prepare=(_unpack_swiglu, _join_layers, _join_bias),
        needs='attn.rope.freqs_cos',
        first='mlp.w12.weight',
    ),
    'mmseg.VisionTransformer': _Target(
        computes=rf'{_FFN}|attn\.attn\.out_proj\.(weight|bias)|'
        r'attn\.attn\.in_proj_(weight|bias)',
        block=(
            *_COMMON,
            (r'^attn\.qkv\.', 'attn.attn.in_proj_'),
            (r'^attn\.proj\.', 'attn.attn.out_proj.'),
        ),
        rest=((r'^norm_pre\.', 'ln_pre.'),),
        prepare=(_unpack_swiglu, _join_bias_unless_gated, _fold_scales),
        prepare_rest=(_add_class_position,),
        first='attn.attn.in_proj_weight',
    ),
    'mmseg.BEiT': _Target(
        **_BEIT,
        prepare=(_unpack_swiglu,),
        prepare_rest=(_copy_shared_table,),
        refuses='pos_embed',
    ),
    'mmseg.MAE': _Target(
        **_BEIT,
        prepare=(_unpack_swiglu, _join_bias_unless_gated),
        prepare_rest=(_copy_shared_table, _add_class_position),
        refuses=r'(?!)',
    ),
}
VIT_TARGETS = tuple(_TARGETS)
# What to use where a target has no place for a tensor, by its official name.
_INSTEAD = (
    (r'attn\.rel_pos_[hw]', 'mmpretrain.ViTSAM'),
    (
        r'attn\.relative_position_.*|rel_pos_bias\..*',
        'mmpretrain.BEiTViT or mmseg.BEiT',
    ),
    (r'pos_embed', 'mmpretrain.BEiTViT(use_abs_pos_emb=True) or mmseg.MAE'),
    (
        r'attn\.rope\.freqs_.*|mlp\.w[12]\..*|mlp\.ffn_ln\..*',
        'mmpretrain.ViTEVA02',
    ),
    (r'attn\.[qkv]_bias|mlp\.fc1_[gx]\..*', _TIMM),
    (
        r'mlp\.(w12|w3)\..*',
        'mmpretrain.VisionTransformer(layer_cfgs=dict(ffn_type='
        "'swiglu_fused'))",
    ),
    (r'ls[12]\.gamma|gamma_[12]', 'mmpretrain.VisionTransformer'),
    (r'.*', _TIMM),
)


def to_vit_keys(
    checkpoint: Mapping[str, Any], target: str
) -> tuple[dict[str, Tensor], str]:
    """Bring the weights of a ViT to the names of a stock class.

    What the class can express in another form is brought to it: for
    ``mmseg.VisionTransformer`` layer scales are multiplied into the layers
    before them, a relative position table that blocks share is copied into
    each of ``mmseg.BEiT`` and ``mmseg.MAE``, and a class token without a
    position gets zeros.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one under
            ``state_dict``, ``model``, ``teacher`` or ``module``. Of a whole
            model only the ``backbone.`` part is taken, of Segment Anything
            the ``image_encoder.``. It is not changed.
        target: One of :data:`VIT_TARGETS`, such as
            ``'mmpretrain.VisionTransformer'``.

    Returns:
        The tensors by stock name (``layers.0.attn.qkv.weight``) and the format
        of the file in words. Nothing is added that the file does not tell, and
        what is no part of the backbone (``head.weight``, ``mask_token``,
        ``decoder_embed.weight``) keeps its name. Files with stock names are
        not changed at all.

    Raises:
        ConfigError: If the target is unknown.
        CheckpointError: If the file has none of the accepted formats, or
            holds what the class cannot compute with.
    """
    if target not in _TARGETS:
        raise ConfigError(
            f'The weights of a ViT can be brought to {", ".join(_TARGETS)}, '
            f'but not to {target!r}. Take one of these.'
        )
    spec = _TARGETS[target]
    state, form = to_stock_state(checkpoint)
    state = part_of(state, 'image_encoder.') or state
    if any(_in_block(spec.first, key) for key in state):
        return state, form
    if any(_OFFICIAL.fullmatch(key) for key in state):
        known = form if 'transformers' in form else 'official or timm ViT'
        return _convert(state, target), known
    first = list(tensors_of(checkpoint) or checkpoint)
    raise CheckpointError(
        f'These are no weights that {target} takes: the first keys are '
        f"{listed(first, 5)}. Accepted are timm's and official files "
        f"('blocks.0.attn.qkv.weight'), MM backbones ('layers.0.{spec.first}')"
        f", whole MM models ('backbone.layers.0.{spec.first}') and those of "
        "transformers, each also under 'state_dict', 'model' or 'teacher', or "
        "with a leading 'module.'."
    )


def _in_block(name: str, key: str) -> bool:
    """Whether a stock key is that of a tensor in any block."""
    return bool(re.fullmatch(rf'layers\.\d+\.{re.escape(name)}', key))


def _renamed(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in renames:
        key = re.sub(old, new, key)
    return key


def _convert(state: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    spec = _TARGETS[target]
    for key, kind in _EXTRA_TOKENS.items():
        if key in state:
            raise CheckpointError(
                f'The file has {kind} ({key}), for which {target} has no '
                f'place. Take {_TIMM} for a model of this kind, or a file '
                'without them.'
            )
    rest: Parts = {}
    blocks: dict[int, Parts] = {}
    for key, value in state.items():
        match = _BLOCK.fullmatch(key)
        if match is None:
            rest[key] = value
        else:  # mlp.lin is Segment Anything's
            part = match[2].replace('mlp.lin', 'mlp.fc')
            blocks.setdefault(int(match[1]), {})[part] = value

    # Key as in the file -> what to look for instead of it.
    refused = {key: key for key in rest if re.fullmatch(spec.refuses, key)}
    for prepare in spec.prepare_rest:
        prepare(rest, blocks)
    result = {_renamed(key, _REST + spec.rest): rest[key] for key in rest}
    for block, parts in blocks.items():
        for prepare in spec.prepare:
            prepare(parts)
        for part, value in parts.items():
            name = _renamed(part, spec.block)
            if not re.fullmatch(spec.computes, name):
                refused[f'blocks.{block}.{part}'] = part
            result[f'layers.{block}.{name}'] = value
    if refused:
        instead = next(
            name
            for pattern, name in _INSTEAD
            if any(re.fullmatch(pattern, part) for part in refused.values())
            and target not in name
        )
        raise CheckpointError(
            f'{target} cannot compute with {listed([*refused], 5)}. Take '
            f'{instead} for this file.'
        )
    if spec.needs and not any(_in_block(spec.needs, key) for key in result):
        raise CheckpointError(
            f'The file is no {target}: it lacks '
            f"'blocks.0.{spec.needs}', without which that computes something "
            f'else. Take the official file, or mmpretrain.VisionTransformer, '
            f'or {_TIMM} for this one.'
        )
    return result


def describe_vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the size of a ViT from its stock keys and shapes.

    Args:
        state: Tensors by stock name, as :func:`to_vit_keys` gives. It may be
            incomplete.

    Returns:
        Those of ``embed_dims``, ``patch_size``, ``num_layers``, ``num_heads``
        (from relative positions alone), ``feedforward_channels`` and
        ``positions`` (tokens of ``pos_embed``) that the file tells.
    """
    found: dict[str, Any] = {}
    embedding = state.get('patch_embed.projection.weight')
    if embedding is not None:
        found['embed_dims'] = embedding.shape[0]
        height, width = embedding.shape[-2:]
        found['patch_size'] = height if height == width else (height, width)
    for key, value in state.items():
        match = re.match(r'layers\.(\d+)\.(.*)', key)
        if not match:
            continue
        block, part = int(match[1]), match[2]
        found['num_layers'] = max(found.get('num_layers', 0), block + 1)
        if part == 'ffn.layers.0.0.weight':
            found['feedforward_channels'] = value.shape[0]
        elif part == 'mlp.w3.weight':
            found['feedforward_channels'] = value.shape[1]
        elif part == 'ffn.w3.weight':
            # SwiGLUFFNFused takes two thirds of what its config says
            found['feedforward_channels'] = value.shape[1] * 3 // 2
        elif part == 'attn.relative_position_bias_table':
            found['num_heads'] = value.shape[1]
        elif part == 'attn.rel_pos_h' and embedding is not None:
            found['num_heads'] = embedding.shape[0] // value.shape[1]
    positions = state.get('pos_embed')
    if positions is not None:
        # (1, tokens, C), but (1, H, W, C) in Segment Anything
        found['positions'] = math.prod(positions.shape[1:-1])
    return found
