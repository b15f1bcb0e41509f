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
from e3va_mm.weights.unwrapping import part_of, tensors_of

_BLOCK = re.compile(r'blocks\.(?:\d+\.)?(\d+)\.(.+)')
_CHUNKED = re.compile(r'blocks\.\d+\.\d+\.')
_OFFICIAL = re.compile(r'blocks\.(?:\d+\.)?\d+\.attn\.(qkv|q_proj)\.weight')
_SAM = 'image_encoder.'
_TABLE = 'attn.relative_position_bias_table'

# Tokens beside the patches' and the class token's, as timm or Meta name them.
_REGISTERS = ('register_tokens', 'reg_token', 'storage_tokens')
_EXTRA_TOKENS = (*_REGISTERS, 'dist_token')
_TIMM = 'e3va_mm.E3VABackbone over mmpretrain.TIMMBackbone'

Parts = dict[str, Tensor]


def _swiglu(parts: Parts) -> None:
    """Give a gated MLP, which timm packs into its fc1, DINOv2's names."""
    first, second = (parts.get(f'mlp.fc{i}.weight') for i in (1, 2))
    if first is None or second is None:
        return
    if first.shape[0] == 2 * second.shape[1]:
        for old, new in (('fc1', 'w12'), ('fc2', 'w3')):
            for kind in ('weight', 'bias'):
                value = parts.pop(f'mlp.{old}.{kind}', None)
                if value is not None:
                    parts[f'mlp.{new}.{kind}'] = value


def _whole_bias(parts: Parts) -> None:
    """Join the biases of queries and values; keys of BEiT have none."""
    if 'attn.q_bias' in parts and 'attn.v_bias' in parts:
        query, value = (parts.pop(f'attn.{n}_bias') for n in 'qv')
        key = parts.pop('attn.k_bias', torch.zeros_like(query))
        parts['attn.qkv.bias'] = torch.cat([query, key, value])


def _whole_bias_unless_gated(parts: Parts) -> None:
    """Leave it apart in EVA-02, which looks like a ViT without its RoPE."""
    if 'mlp.w12.weight' not in parts:
        _whole_bias(parts)


def _joined(parts: Parts) -> None:
    """Join what EVA-02's larger models hold apart."""
    for new, names in (
        ('attn.qkv.weight', [f'attn.{n}_proj.weight' for n in 'qkv']),
        ('mlp.w12.weight', ['mlp.w1.weight', 'mlp.w2.weight']),
        ('mlp.w12.bias', ['mlp.w1.bias', 'mlp.w2.bias']),
    ):
        if all(name in parts for name in names):
            parts[new] = torch.cat([parts.pop(name) for name in names])


def _folded_scales(parts: Parts) -> None:
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


def _class_position(rest: Parts, blocks: dict[int, Parts]) -> None:
    """Add a row of zeros where the class token has no position.

    As in DeiT III and timm's ``no_embed_class``; the stock classes add a
    position to every token.
    """
    positions = rest.get('pos_embed')
    if positions is None or positions.ndim != 3 or 'cls_token' not in rest:
        return
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        rest['pos_embed'] = torch.cat(
            [torch.zeros_like(positions[:, :1]), positions], dim=1
        )


def _own_tables(rest: Parts, blocks: dict[int, Parts]) -> None:
    """Give every block a copy of the table that BEiT's pre-training shares."""
    for name in ('relative_position_bias_table', 'relative_position_index'):
        shared = rest.pop(f'rel_pos_bias.{name}', None)
        if shared is not None:
            for parts in blocks.values():
                parts[f'attn.{name}'] = shared.clone()


_LN = (r'^norm([12])\.', r'ln\1.')
_FFN = (
    (r'^mlp\.fc1\.', 'ffn.layers.0.0.'),
    (r'^mlp\.fc2\.', 'ffn.layers.1.'),
)
_SCALES = (
    (r'^(ls1\.gamma|gamma_1)$', 'attn.gamma1.weight'),
    (r'^(ls2\.gamma|gamma_2)$', 'ffn.gamma2.weight'),
)
_PATCHES = (r'^patch_embed\.proj\.', 'patch_embed.projection.')
_FINAL = (r'^norm\.', 'ln1.')
_MEAN = (r'^fc_norm\.', 'ln2.')

_VIT = r'(ln[12]|attn\.(qkv|proj)|ffn\.layers\.(0\.0|1))\.(weight|bias)'
_BEIT = (
    rf'{_VIT}|gamma_[12]|attn\.[qkv]_bias|'
    r'attn\.relative_position_(bias_table|index)'
)
_BEIT_SCALES = ((r'^ls([12])\.gamma$', r'gamma_\1'),)
_PLAIN_FILES = (
    "timm's and official files of ViT, DeiT, DINOv2 or MAE "
    "('blocks.0.attn.qkv.weight')"
)
_BEIT_FILES = (
    "timm's and official files of BEiT ('blocks.0.attn.qkv.weight' with "
    "'blocks.0.attn.q_bias')"
)


@dataclass(frozen=True)
class _Target:
    """A stock class.

    Attributes:
        stock: Matches a key that every file with its names has.
        example: Such a key.
        official: Which other files are taken, in words.
        computes: Matches what its blocks have, by stock name.
        block: Renames within a block.
        rest: Renames of everything else.
        prepare: Bring a block to what the class computes, before.
        prepare_rest: The same for everything else.
        refuses: Matches keys outside of the blocks that it cannot use.
        needs: Must match the name of a tensor in a block, if given.
    """

    stock: str
    example: str
    official: str
    computes: str
    block: tuple[tuple[str, str], ...]
    rest: tuple[tuple[str, str], ...]
    prepare: tuple[Callable, ...] = ()
    prepare_rest: tuple[Callable, ...] = ()
    refuses: str = r'rel_pos_bias\..*'
    needs: str | None = None


_QKV = dict(
    stock=r'layers\.\d+\.attn\.qkv\.weight', example='layers.0.attn.qkv.weight'
)
_TARGETS = {
    'mmpretrain.VisionTransformer': _Target(
        **_QKV,
        official=_PLAIN_FILES,
        computes=rf'{_VIT}|attn\.gamma1\.weight|ffn\.gamma2\.weight|'
        r'ffn\.(w12|w3)\.(weight|bias)',
        block=(_LN, *_FFN, *_SCALES, (r'^mlp\.(w12|w3)\.', r'ffn.\1.')),
        rest=(_PATCHES, _FINAL, _MEAN, (r'^norm_pre\.', 'pre_norm.')),
        prepare=(_swiglu, _whole_bias_unless_gated),
        prepare_rest=(_class_position,),
    ),
    'mmpretrain.ViTSAM': _Target(
        **_QKV,
        official="timm's and official files of Segment Anything "
        "('image_encoder.blocks.0.attn.qkv.weight')",
        computes=rf'{_VIT}|attn\.rel_pos_[hw]',
        block=(_LN, *_FFN),
        rest=(_PATCHES, (r'^neck\.', 'channel_reduction.')),
        needs=r'attn\.rel_pos_h',
    ),
    'mmpretrain.BEiTViT': _Target(
        **_QKV,
        official=_BEIT_FILES,
        computes=_BEIT,
        block=(_LN, *_FFN, *_BEIT_SCALES),
        rest=(_PATCHES, _FINAL, _MEAN),
        prepare=(_swiglu,),
        prepare_rest=(_class_position,),
        refuses=r'(?!)',
    ),
    'mmpretrain.ViTEVA02': _Target(
        stock=r'layers\.\d+\.mlp\.w12\.weight',
        example='layers.0.mlp.w12.weight',
        official="official files of EVA-02 ('blocks.0.attn.rope.freqs_cos')",
        computes=r'(norm[12]|attn\.(qkv|proj)|mlp\.(w12|norm|w3))\.'
        r'(weight|bias)|attn\.rope\.freqs_(cos|sin)',
        block=((r'^mlp\.ffn_ln\.', 'mlp.norm.'),),
        rest=(_PATCHES, _FINAL, _MEAN),
        prepare=(_swiglu, _joined, _whole_bias),
        needs=r'attn\.rope\.freqs_cos',
    ),
    'mmseg.VisionTransformer': _Target(
        stock=r'layers\.\d+\.attn\.attn\.in_proj_weight',
        example='layers.0.attn.attn.in_proj_weight',
        official=_PLAIN_FILES,
        computes=r'(ln[12]|ffn\.layers\.(0\.0|1)|attn\.attn\.out_proj)\.'
        r'(weight|bias)|attn\.attn\.in_proj_(weight|bias)',
        block=(
            _LN,
            *_FFN,
            (r'^attn\.qkv\.', 'attn.attn.in_proj_'),
            (r'^attn\.proj\.', 'attn.attn.out_proj.'),
        ),
        rest=(_PATCHES, _FINAL, (r'^norm_pre\.', 'ln_pre.')),
        prepare=(_swiglu, _whole_bias_unless_gated, _folded_scales),
        prepare_rest=(_class_position,),
    ),
    'mmseg.BEiT': _Target(
        **_QKV,
        official=_BEIT_FILES,
        computes=_BEIT,
        block=(_LN, *_FFN, *_BEIT_SCALES),
        rest=(_PATCHES, _FINAL),
        prepare=(_swiglu,),
        prepare_rest=(_own_tables,),
        refuses='pos_embed',
    ),
    'mmseg.MAE': _Target(
        **_QKV,
        official=f'{_PLAIN_FILES}, {_BEIT_FILES}',
        computes=_BEIT,
        block=(_LN, *_FFN, *_BEIT_SCALES),
        rest=(_PATCHES, _FINAL),
        prepare=(_swiglu, _whole_bias_unless_gated),
        prepare_rest=(_own_tables, _class_position),
        refuses=r'(?!)',
    ),
}

VIT_TARGETS = tuple(_TARGETS)

# What to use where a target has no place for a tensor, by its official name.
_INSTEAD = (
    (r'attn\.rel_pos_[hw]', 'mmpretrain.ViTSAM'),
    (r'attn\.relative_position_.*', 'mmpretrain.BEiTViT or mmseg.BEiT'),
    (r'rel_pos_bias\..*', 'mmpretrain.BEiTViT or mmseg.BEiT'),
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
)


def _shown(keys: list[str]) -> str:
    return ', '.join(keys[:5]) or 'none'


def _renamed(
    key: str, renames: tuple[tuple[str, str], ...], prefix: str = ''
) -> str:
    for old, new in renames:
        key = re.sub(old, new, key)
    return prefix + key


def _format_of(state: Mapping[str, Tensor], sam: bool) -> str:
    """Name the format of a file with names like timm's."""
    names = {_BLOCK.sub(r'\2', key) for key in state if _BLOCK.match(key)}

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    if has(r'attn\.rel_pos_h'):
        lin = has(r'mlp\.lin1\.weight')
        return 'official SAM' if sam or lin else 'timm SAM'
    if has(r'attn\.rope\..*'):
        return 'official EVA-02'
    if has(r'mlp\.fc1_g\.weight'):
        return 'timm EVA-02'
    if has(_TABLE.replace('.', r'\.')) or any(
        key.startswith('rel_pos_bias.') for key in state
    ):
        return 'official BEiT'
    if has(r'attn\.q_bias'):
        return 'official EVA'
    if any(key.startswith('decoder_') for key in state):
        return 'official MAE'
    if (
        'mask_token' in state
        or any(_CHUNKED.match(key) for key in state)
        or has(r'mlp\.w12\.weight')
    ):
        return 'official DINOv2'
    return 'official DeiT III' if has('gamma_1') else 'timm ViT'


def _refuse(target: str, keys: Mapping[str, str]) -> None:
    """Say that a target has no place for tensors, and what has.

    Args:
        target: The stock class.
        keys: What is searched for in the table, by key of the file.
    """
    instead = next(
        (
            name
            for pattern, name in _INSTEAD
            if any(re.fullmatch(pattern, part) for part in keys.values())
            and target not in name
        ),
        _TIMM,
    )
    raise CheckpointError(
        f'{target} cannot compute with {_shown(list(keys))} '
        f'({len(keys)} in all). Take {instead} for this file.'
    )


def _from_official(
    state: Mapping[str, Tensor], target: str
) -> dict[str, Tensor]:
    spec = _TARGETS[target]
    for key in _EXTRA_TOKENS:
        if key in state:
            kind = 'registers' if key in _REGISTERS else 'a second class token'
            raise CheckpointError(
                f'The file has {kind} ({key}), for which {target} has no '
                f'place. Take {_TIMM} for a model of this kind, or a file '
                'without them.'
            )

    rest: Parts = {}
    blocks: dict[int, Parts] = {}
    origin: dict[tuple[int, str], str] = {}
    for key, value in state.items():
        match = _BLOCK.fullmatch(key)
        if match is None:
            rest[key] = value
            continue
        block, part = int(match[1]), match[2]
        part = part.replace('mlp.lin', 'mlp.fc')  # Segment Anything
        blocks.setdefault(block, {})[part] = value
        origin[block, part] = key

    refused = {key: key for key in rest if re.fullmatch(spec.refuses, key)}
    for prepare in spec.prepare_rest:
        prepare(rest, blocks)
    result = {_renamed(key, spec.rest): rest[key] for key in rest}
    for block, parts in blocks.items():
        for prepare in spec.prepare:
            prepare(parts)
        for part, value in parts.items():
            name = _renamed(part, spec.block)
            if not re.fullmatch(spec.computes, name):
                key = origin.get((block, part), f'blocks.{block}.{part}')
                refused[key] = part
            result[f'layers.{block}.{name}'] = value
    if refused:
        _refuse(target, refused)
    if spec.needs is not None:
        _check_needed(target, result)
    return result


def _check_needed(target: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a ViT without what makes it another kind of ViT."""
    needed = _TARGETS[target].needs
    if any(re.fullmatch(rf'layers\.\d+\.{needed}', key) for key in state):
        return
    if target == 'mmpretrain.ViTEVA02':
        raise CheckpointError(
            'The file brings no rotary embeddings '
            "('blocks.0.attn.rope.freqs_cos'), and those that "
            'mmpretrain.ViTEVA02 makes by itself are not those of EVA-02. '
            f'Take the official file, or {_TIMM}.'
        )
    raise CheckpointError(
        f'The file is a plain ViT, without the relative positions of '
        f"{target} ('blocks.0.attn.rel_pos_h'). Take "
        'mmpretrain.VisionTransformer for this file.'
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
    tensors = tensors_of(checkpoint)
    backbone = part_of(tensors, 'backbone.')
    encoder = part_of(tensors, _SAM)
    state = backbone or encoder or tensors
    if any(re.fullmatch(spec.stock, key) for key in state):
        return state, 'MM model' if backbone else 'MM backbone'
    if any(_OFFICIAL.fullmatch(key) for key in state):
        found = _format_of(state, sam=bool(encoder))
        return _from_official(state, target), found
    first = list(tensors or checkpoint)
    raise CheckpointError(
        f'These are no weights that {target} takes: the first of '
        f'{len(tensors)} tensors are {_shown(first)}. Accepted are '
        f"{spec.official}, MM backbones ('{spec.example}') and whole MM "
        f"models ('backbone.{spec.example}'), each also under 'state_dict', "
        "'model' or 'teacher', or with a leading 'module.'."
    )


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

    blocks = set()
    for key, value in state.items():
        match = re.match(r'layers\.(\d+)\.(.*)', key)
        if not match:
            continue
        blocks.add(int(match[1]))
        if match[2] in ('ffn.layers.0.0.weight', 'mlp.w3.weight'):
            dim = 0 if match[2].startswith('ffn') else 1
            found['feedforward_channels'] = value.shape[dim]
        elif match[2] == 'ffn.w3.weight':
            # SwiGLUFFNFused takes two thirds of what its config says
            found['feedforward_channels'] = value.shape[1] * 3 // 2
        elif match[2] == _TABLE:
            found['num_heads'] = value.shape[1]
        elif match[2] == 'attn.rel_pos_h' and embedding is not None:
            found['num_heads'] = embedding.shape[0] // value.shape[1]
    if blocks:
        found['num_layers'] = max(blocks) + 1
    positions = state.get('pos_embed')
    if positions is not None:
        # (1, tokens, C), but (1, H, W, C) in Segment Anything
        found['positions'] = math.prod(positions.shape[1:-1])
    return found
