"""ViT files against timm, which reads the official ones by itself.

Random weights in an official format are read by timm with its own filter and
by a stock class after our conversion; both must compute the same tokens.
"""

import importlib
import re
from functools import partial

import pytest
import torch

# Before timm and mmpretrain, which import torchvision.
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.weights import VIT_TARGETS, describe_vit, to_vit_keys

DIMS, DEPTH, HEADS, HIDDEN, PATCH, SIDE = 32, 3, 4, 64, 4, 4
SIZE = PATCH * SIDE
ARCH = dict(
    embed_dims=DIMS,
    num_layers=DEPTH,
    num_heads=HEADS,
    feedforward_channels=HIDDEN,
)
EPS = dict(type='LN', eps=1e-6)
TIMM_ARGS = dict(
    img_size=SIZE,
    patch_size=PATCH,
    embed_dim=DIMS,
    depth=DEPTH,
    num_heads=HEADS,
    mlp_ratio=HIDDEN / DIMS,
    num_classes=0,
)
MMPRETRAIN, MMSEG = 'mmpretrain.VisionTransformer', 'mmseg.VisionTransformer'
TABLE = ((2 * SIDE - 1) ** 2 + 3, HEADS)
INDEX = 'attn.relative_position_index'


def random_weights(shapes):
    """Weights of about one in effect, norms and scales included."""
    torch.manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape)
        if re.search(r'(norm\w*|ln)\.weight$|gamma', key):
            value = 1 + value / 4
        elif len(shape) == 2 and key.endswith('weight'):
            value = value / shape[1] ** 0.5
        state[key] = value / 2
    return state


def linear(name, out, width, bias=True):
    shapes = {f'{name}.weight': (out, width)}
    return {**shapes, f'{name}.bias': (out,)} if bias else shapes


def norm(name, width=DIMS):
    return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def plain_mlp(block):
    return {
        **linear(f'{block}.mlp.fc1', HIDDEN, DIMS),
        **linear(f'{block}.mlp.fc2', DIMS, HIDDEN),
    }


def gated_mlp(block):
    return {
        **linear(f'{block}.mlp.w12', 2 * HIDDEN, DIMS),
        **linear(f'{block}.mlp.w3', DIMS, HIDDEN),
    }


def official(extra=None, mlp=plain_mlp, block_extra=None, positions=None):
    """Random weights of a ViT with the names that Meta's files share.

    Args:
        extra: More shapes by key, and None for a key that is not there.
        mlp: Name of a block -> shapes of its MLP.
        block_extra: More shapes of each block, and None likewise.
        positions: Shape of pos_embed.
    """
    shapes = {
        'cls_token': (1, 1, DIMS),
        'pos_embed': positions or (1, SIDE**2 + 1, DIMS),
        'patch_embed.proj.weight': (DIMS, 3, PATCH, PATCH),
        'patch_embed.proj.bias': (DIMS,),
    }
    for i in range(DEPTH):
        block = f'blocks.{i}'
        shapes |= {
            **norm(f'{block}.norm1'),
            **linear(f'{block}.attn.qkv', 3 * DIMS, DIMS),
            **linear(f'{block}.attn.proj', DIMS, DIMS),
            **norm(f'{block}.norm2'),
            **mlp(block),
        }
        for name, shape in (block_extra or {}).items():
            shapes[f'{block}.{name}'] = shape
    shapes |= {**norm('norm'), **(extra or {})}
    return random_weights({k: s for k, s in shapes.items() if s is not None})


SCALES = {'ls1.gamma': (DIMS,), 'ls2.gamma': (DIMS,)}
MASK = {'mask_token': (1, DIMS)}
QV_BIAS = {
    'attn.qkv.bias': None,
    'attn.q_bias': (DIMS,),
    'attn.v_bias': (DIMS,),
}


def dinov2(**kwargs):
    return official(extra=MASK, block_extra=SCALES, **kwargs)


def mae():
    return official(
        extra={
            'mask_token': (1, 1, 8),
            'decoder_pos_embed': (1, SIDE**2 + 1, 8),
            **linear('decoder_embed', 8, DIMS),
            **norm('decoder_blocks.0.norm1', 8),
            **linear('decoder_blocks.0.mlp.fc1', 16, 8),
            **norm('decoder_norm', 8),
        }
    )


def beit(shared=False, **more):
    """BEiT, its table in every block or, as in pre-training, one for all."""
    table = 'relative_position_bias_table'
    ours = {} if shared else {f'attn.{table}': TABLE}
    common = {f'rel_pos_bias.{table}': TABLE} if shared else {}
    return official(
        extra={'pos_embed': None, 'mask_token': (1, 1, DIMS)} | common | more,
        block_extra={**QV_BIAS, 'gamma_1': (DIMS,), 'gamma_2': (DIMS,)} | ours,
    )


def sam():
    """Segment Anything, its decoders and a neck of 8 channels."""
    widths = [*([2 * 3 - 1] * (DEPTH - 1)), 2 * SIDE - 1]
    head = DIMS // HEADS
    more = {}
    for i, width in enumerate(widths):
        for name in ('rel_pos_h', 'rel_pos_w'):
            more[f'blocks.{i}.attn.{name}'] = (width, head)
    state = official(
        extra={
            'cls_token': None,
            'norm.weight': None,
            'norm.bias': None,
            'neck.0.weight': (8, DIMS, 1, 1),
            **norm('neck.1', 8),
            'neck.2.weight': (8, 8, 3, 3),
            **norm('neck.3', 8),
            **more,
        },
        positions=(1, SIDE, SIDE, DIMS),
    )
    state = {
        'image_encoder.' + key.replace('mlp.fc', 'mlp.lin'): value
        for key, value in state.items()
    }
    return {
        **state,
        'prompt_encoder.no_mask_embed.weight': torch.zeros(1, 8),
        'mask_decoder.iou_token.weight': torch.zeros(1, 8),
    }


def eva02(large):
    """Two forms of one model: the larger ones hold their layers apart."""
    state = official(
        block_extra={
            **QV_BIAS,
            **(norm('mlp.ffn_ln', HIDDEN) if large else {}),
        },
        mlp=gated_mlp,
        extra={**MASK, **linear('lm_head', 7, DIMS)},
    )
    if large:
        for i in range(DEPTH):
            name = f'blocks.{i}.attn'
            weight = state.pop(f'{name}.qkv.weight')
            for n, part in zip('qkv', weight.chunk(3), strict=True):
                state[f'{name}.{n}_proj.weight'] = part
            for kind in ('weight', 'bias'):
                packed = state.pop(f'blocks.{i}.mlp.w12.{kind}')
                for n, part in enumerate(packed.chunk(2), 1):
                    state[f'blocks.{i}.mlp.w{n}.{kind}'] = part
    return state


def chunked(state, size=2):
    """As DINOv2 saves its larger models: chunk, then block of all."""
    return {
        re.sub(
            r'^blocks\.(\d+)',
            lambda m: f'blocks.{int(m[1]) // size}.{m[1]}',
            key,
        ): value
        for key, value in state.items()
    }


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one
    )


def timm_model(kind, state, **kwargs):
    """A model of timm with the weights that its own filter reads."""
    module = importlib.import_module(f'timm.models.{kind}')
    name = dict(
        vision_transformer='VisionTransformer',
        vision_transformer_sam='VisionTransformerSAM',
        beit='Beit',
        eva='Eva',
    )[kind]
    kwargs = {**TIMM_ARGS, **kwargs}
    if kind in ('beit', 'eva', 'vision_transformer_sam'):
        # layers.LayerNorm of timm has this eps, nn.LayerNorm has not
        kwargs['norm_layer'] = partial(torch.nn.LayerNorm, eps=1e-6)
    model = getattr(module, name)(**kwargs).eval()
    state = module.checkpoint_filter_fn(dict(state), model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == []
    assert not any(key.startswith('blocks.') for key in unexpected)
    return model


def stock_model(target, state, missing=(), unexpected=(), **kwargs):
    """A stock class with the weights that we convert, and these alone."""
    ours, _ = to_vit_keys(state, target)
    scope, name = target.split('.')
    pytest.importorskip(scope)
    cls = getattr(importlib.import_module(f'{scope}.models.backbones'), name)
    kwargs = dict(img_size=SIZE, patch_size=PATCH, norm_cfg=EPS) | kwargs
    if scope == 'mmpretrain':
        kwargs = dict(arch=ARCH, out_type='raw') | kwargs
    else:
        kwargs |= dict(
            embed_dims=DIMS,
            num_layers=DEPTH,
            num_heads=HEADS,
            mlp_ratio=HIDDEN // DIMS,
        )
    if target == MMSEG:
        kwargs = dict(patch_bias=True) | kwargs
    if name not in ('ViTSAM',):
        kwargs = dict(final_norm=True) | kwargs
    model = cls(**kwargs)
    model.eval()
    found = model.load_state_dict(dict(ours), strict=False)
    for keys, patterns in (
        (found.missing_keys, missing),
        (found.unexpected_keys, unexpected),
    ):
        for key in keys:
            assert any(re.fullmatch(p, key) for p in patterns), key
        for pattern in patterns:
            assert any(re.fullmatch(pattern, key) for key in keys), pattern
    return model


def tokens(model, pictures):
    """All tokens behind the final norm, class token first."""
    kept = []
    hook = model.ln1.register_forward_hook(lambda *args: kept.append(args[2]))
    with torch.no_grad():
        model(pictures)
    hook.remove()
    return kept[0]


def check_tokens(reference, model, size=SIZE):
    pictures = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = reference.forward_features(pictures)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        tokens(model, pictures), expected, atol=1e-5, rtol=1e-5
    )


@pytest.fixture(autouse=True)
def frameworks():
    pytest.importorskip('timm')
    pytest.importorskip('mmpretrain')


HEAD = {**linear('head', 7, DIMS)}


@pytest.mark.parametrize('target', [MMPRETRAIN, MMSEG])
def test_plain_vit(target):
    state = official(extra=HEAD)
    reference = timm_model('vision_transformer', state, num_classes=7)
    model = stock_model(target, state, unexpected=[r'head\..*'])
    check_tokens(reference, model)


@pytest.mark.parametrize('target', [MMPRETRAIN, MMSEG])
@pytest.mark.parametrize('wrap', ['plain', 'chunked', 'teacher'])
def test_dinov2_with_layer_scale(target, wrap):
    """mmseg's class has no layer scales: they are multiplied in."""
    state = dinov2()
    reference = timm_model('vision_transformer', state, init_values=1e-5)
    if wrap != 'plain':
        state = chunked(state)
    if wrap == 'teacher':
        head = {'dino_head.mlp.0.weight': torch.zeros(1)}
        state = {'teacher': {**prefixed('backbone.', state), **head}}
    scales = dict(layer_scale_init_value=1e-5) if target == MMPRETRAIN else {}
    model = stock_model(target, state, unexpected=['mask_token'], **scales)
    check_tokens(reference, model)


@pytest.mark.parametrize('names', ['official', 'timm'])
def test_dinov2_giant_with_gated_mlp(names):
    from timm.layers import SwiGLUPacked

    state = dinov2(mlp=gated_mlp)
    reference = timm_model(
        'vision_transformer',
        state,
        init_values=1e-5,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        mlp_ratio=2 * HIDDEN / DIMS,
    )
    unexpected = ['mask_token']
    if names == 'timm':
        state, unexpected = reference.state_dict(), []
        assert 'blocks.0.mlp.fc1.weight' in state
    model = stock_model(
        MMPRETRAIN,
        state,
        unexpected=unexpected,
        arch={**ARCH, 'feedforward_channels': HIDDEN * 3 // 2},
        layer_scale_init_value=1e-5,
        layer_cfgs=dict(ffn_type='swiglu_fused'),
    )
    check_tokens(reference, model)


@pytest.mark.parametrize('target', [MMPRETRAIN, MMSEG, 'mmseg.MAE'])
def test_mae_pretraining(target):
    state = mae()
    reference = timm_model(
        'vision_transformer',
        {k: v for k, v in state.items() if not re.match('decoder|mask', k)},
    )
    missing, kwargs = [], {}
    if target == 'mmseg.MAE':
        # What no file of MAE has: as constructed they must change nothing.
        missing = [
            r'layers\.\d\.gamma_[12]',
            r'layers\.\d\.attn\.relative_position_.*',
        ]
        kwargs['init_values'] = 1.0
    unexpected = [r'mask_token', r'decoder_.*', r'decoder_blocks\.0\.norm1.*']
    model = stock_model(
        target, {'model': state}, missing, unexpected, **kwargs
    )
    check_tokens(reference, model)
    ours, _ = to_vit_keys({'model': state}, target)
    assert 'decoder_blocks.0.mlp.fc1.weight' in ours


@pytest.mark.parametrize('target', [MMPRETRAIN, MMSEG])
def test_deit3_gives_the_class_token_no_position(target):
    state = official(
        block_extra={'gamma_1': (DIMS,), 'gamma_2': (DIMS,)},
        positions=(1, SIDE**2, DIMS),
    )
    renamed = {
        re.sub(r'gamma_([12])', r'ls\1.gamma', key): value
        for key, value in state.items()
    }
    reference = timm_model(
        'vision_transformer', renamed, init_values=1e-5, no_embed_class=True
    )
    scales = dict(layer_scale_init_value=1e-5) if target == MMPRETRAIN else {}
    for names in (state, renamed):
        check_tokens(reference, stock_model(target, names, **scales))


@pytest.mark.parametrize('target', [MMPRETRAIN, MMSEG])
def test_clip_has_a_norm_before_the_blocks(target):
    state = official(extra={'patch_embed.proj.bias': None, **norm('norm_pre')})
    reference = timm_model('vision_transformer', state, pre_norm=True)
    kwargs = dict(patch_bias=False) if target == MMSEG else {}
    check_tokens(
        reference, stock_model(target, state, pre_norm=True, **kwargs)
    )


def test_a_vit_without_class_token():
    state = official(extra={'cls_token': None}, positions=(1, SIDE**2, DIMS))
    reference = timm_model(
        'vision_transformer',
        state,
        class_token=False,
        global_pool='avg',
        fc_norm=False,
    )
    check_tokens(
        reference, stock_model(MMPRETRAIN, state, with_cls_token=False)
    )


def sam_models(state):
    reference = timm_model(
        'vision_transformer_sam',
        state,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(DEPTH - 1,),
        neck_chans=8,
        global_pool='',
    )
    model = stock_model(
        'mmpretrain.ViTSAM',
        state,
        arch={**ARCH, 'global_attn_indexes': [DEPTH - 1]},
        window_size=3,
        out_channels=8,
    )
    return reference, model


@pytest.mark.parametrize('size', [SIZE, 7 * PATCH])
def test_sam(size):
    state = sam()
    if size != SIZE:
        # timm resizes positions with antialiasing, mmpretrain without: the
        # same for all they are the same; relative ones both resize alike.
        key = 'image_encoder.pos_embed'
        state[key] = state[key][:, :1, :1].expand(1, SIDE, SIDE, DIMS)
    reference, model = sam_models(state)
    pictures = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected = reference.forward_features(pictures)
        torch.testing.assert_close(
            model(pictures)[0], expected, atol=1e-5, rtol=1e-5
        )
    assert expected.std() > 0.1


SHARED = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
BEIT = dict(use_abs_pos_emb=False, init_values=0.1, use_fc_norm=False)


@pytest.mark.parametrize('target', ['mmpretrain.BEiTViT', 'mmseg.BEiT'])
def test_beit(target):
    state = beit(**HEAD)
    reference = timm_model(
        'beit', state, use_rel_pos_bias=True, num_classes=7, **BEIT
    )
    # An index that follows from the size; Microsoft's files hold it.
    model = stock_model(
        target,
        {'model': state},
        missing=[rf'layers\.\d\.{INDEX}'],
        unexpected=['mask_token', r'head\..*'],
    )
    check_tokens(reference, model)
    index = {
        f'blocks.{i}.{INDEX}': getattr(model.layers[i].attn, INDEX[5:])
        for i in range(DEPTH)
    }
    stock_model(
        target,
        {'module': {**state, **index}},
        unexpected=['mask_token', r'head\..*'],
    )


@pytest.mark.parametrize(
    'target, kwargs',
    [
        ('mmpretrain.BEiTViT', SHARED),
        ('mmpretrain.BEiTViT', {}),
        ('mmseg.BEiT', {}),
    ],
)
def test_beit_whose_blocks_share_a_table(target, kwargs):
    state = beit(shared=True)
    reference = timm_model('beit', state, use_shared_rel_pos_bias=True, **BEIT)
    # Microsoft's file holds the index.
    state['rel_pos_bias.relative_position_index'] = timm_index()
    # The hook of mmpretrain copies the table alone to the blocks.
    own = target == 'mmpretrain.BEiTViT' and not kwargs
    missing = [rf'layers\.\d\.{INDEX}'] if own else []
    model = stock_model(
        target, state, missing, unexpected=['mask_token'], **kwargs
    )
    check_tokens(reference, model)


def timm_index():
    from timm.models.beit import gen_relative_position_index

    return gen_relative_position_index((SIDE, SIDE))


def eva02_with_angles(large):
    """The model of timm, and the official file with its rotary angles."""
    state = eva02(large)
    # timm leaves out the final norm of a file with a mask token
    reference = timm_model(
        'eva',
        {k: v for k, v in state.items() if not re.match('mask|lm_head', k)},
        swiglu_mlp=True,
        scale_mlp=large,
        qkv_fused=not large,
        use_rot_pos_emb=True,
        # EVA-02 is pre-trained on 16 by 16 patches
        ref_feat_shape=(16, 16),
        use_fc_norm=False,
    )
    sine, cosine = reference.rope.get_embed(shape=(SIDE, SIDE)).chunk(2, -1)
    for name in ('rope', *(f'blocks.{i}.attn.rope' for i in range(DEPTH))):
        state[f'{name}.freqs_cos'] = cosine.clone()
        state[f'{name}.freqs_sin'] = sine.clone()
    return reference, state


EVA02 = 'mmpretrain.ViTEVA02'


@pytest.mark.parametrize('large', [False, True])
def test_eva02(large):
    reference, state = eva02_with_angles(large)
    model = stock_model(
        EVA02,
        {'module': state},
        unexpected=['mask_token', r'lm_head\..*'],
        sub_ln=large,
    )
    check_tokens(reference, model)
    # Why a file without the angles is refused: the class makes others.
    fresh = type(model.rope)(DIMS // HEADS, SIDE)
    assert not torch.allclose(fresh.freqs_cos, model.rope.freqs_cos, atol=0.1)


FILES = {
    MMPRETRAIN: official,
    MMSEG: official,
    'mmpretrain.ViTSAM': sam,
    'mmpretrain.BEiTViT': beit,
    'mmseg.BEiT': beit,
    'mmseg.MAE': mae,
    EVA02: lambda: eva02_with_angles(True)[1],
}


@pytest.mark.parametrize('target', FILES)
def test_wrappers_and_stock_names(target):
    state = FILES[target]()
    before = {key: value.clone() for key, value in state.items()}
    ours, name = to_vit_keys(state, target)
    assert same(state, before)
    assert name == 'official or timm ViT'
    other = {'neck.conv.weight': torch.zeros(1)}
    for content, expected in (
        ({'model': state, 'epoch': 3}, name),
        (prefixed('module.', state), name),
        ({'state_dict': prefixed('module.', state)}, name),
        ({'teacher': state, 'student': {}}, name),
        (ours, 'MM backbone'),
        ({'state_dict': ours, 'meta': {}}, 'MM backbone'),
        (
            {'state_dict': {**prefixed('module.backbone.', ours), **other}},
            'MM model',
        ),
    ):
        found, format_ = to_vit_keys(content, target)
        assert format_ == expected
        assert same(found, ours)


@pytest.mark.parametrize('target', VIT_TARGETS)
def test_registers_are_refused(target, key='reg_token'):
    state = {**official(), key: torch.zeros(1, 4, DIMS)}
    with pytest.raises(CheckpointError) as error:
        to_vit_keys({'model': state}, target)
    assert str(error.value) == (
        f'The file has registers ({key}), for which {target} has no place. '
        'Take e3va_mm.E3VABackbone over mmpretrain.TIMMBackbone for a model '
        'of this kind, or a file without them.'
    )


def test_a_distillation_token_is_refused():
    state = {**official(), 'dist_token': torch.zeros(1, 1, DIMS)}
    with pytest.raises(CheckpointError, match='has a second class token'):
        to_vit_keys(state, MMPRETRAIN)


@pytest.mark.parametrize(
    'make, target, key, instead',
    [
        (
            sam,
            MMPRETRAIN,
            'blocks.0.attn.rel_pos_h',
            'mmpretrain.ViTSAM',
        ),
        (
            beit,
            MMSEG,
            'blocks.0.attn.relative_position_bias_table',
            'mmpretrain.BEiTViT or mmseg.BEiT',
        ),
        (
            lambda: beit(shared=True),
            MMPRETRAIN,
            'rel_pos_bias.relative_position_bias_table',
            'mmpretrain.BEiTViT or mmseg.BEiT',
        ),
        (
            official,
            'mmseg.BEiT',
            'pos_embed',
            'mmpretrain.BEiTViT(use_abs_pos_emb=True) or mmseg.MAE',
        ),
        (
            lambda: dinov2(mlp=gated_mlp),
            MMSEG,
            'blocks.0.mlp.w12.weight',
            "mmpretrain.VisionTransformer(layer_cfgs=dict(ffn_type='"
            "swiglu_fused'))",
        ),
        (
            dinov2,
            'mmpretrain.ViTSAM',
            'blocks.0.ls1.gamma',
            'mmpretrain.VisionTransformer',
        ),
        (
            FILES[EVA02],
            MMPRETRAIN,
            'blocks.0.mlp.ffn_ln.weight',
            'mmpretrain.ViTEVA02',
        ),
        (
            lambda: eva02(False),  # without its angles almost DINOv2's
            MMPRETRAIN,
            'blocks.0.attn.q_bias',
            'e3va_mm.E3VABackbone over mmpretrain.TIMMBackbone',
        ),
        (
            lambda: official(block_extra=norm('attn.q_norm', 8)),
            MMPRETRAIN,
            'blocks.0.attn.q_norm.weight',
            'e3va_mm.E3VABackbone over mmpretrain.TIMMBackbone',
        ),
    ],
)
def test_what_a_class_cannot_compute_is_refused(make, target, key, instead):
    with pytest.raises(CheckpointError) as error:
        to_vit_keys(make(), target)
    text = str(error.value)
    assert text.startswith(f'{target} cannot compute with ')
    assert key in text
    assert text.endswith(f'. Take {instead} for this file.')


@pytest.mark.parametrize(
    'make, target, needed',
    [
        (official, 'mmpretrain.ViTSAM', 'attn.rel_pos_h'),
        (lambda: eva02(False), EVA02, 'attn.rope.freqs_cos'),
    ],
)
def test_what_a_class_needs(make, target, needed):
    with pytest.raises(CheckpointError) as error:
        to_vit_keys(make(), target)
    assert str(error.value).startswith(
        f"The file is no {target}: it lacks 'blocks.0.{needed}', without"
    )


@pytest.mark.parametrize(
    'content, first',
    [
        ({'conv1.weight': torch.zeros(1)}, 'conv1.weight'),
        ({'meta': 3}, 'meta'),
        ({}, 'none'),
    ],
)
def test_an_unknown_format_names_its_first_keys_and_what_is_accepted(
    content, first
):
    for target in VIT_TARGETS:
        with pytest.raises(CheckpointError) as error:
            to_vit_keys(content, target)
        text = str(error.value)
        assert text.startswith(f'These are no weights that {target} takes: ')
        assert f'the first keys are {first}. Accepted' in text
        assert "'backbone.layers.0." in text


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(ConfigError) as error:
        to_vit_keys(official(), 'mmdet.ViT')
    text = str(error.value)
    assert "not to 'mmdet.ViT'" in text
    assert all(target in text for target in VIT_TARGETS)


SIZES = dict(
    embed_dims=DIMS,
    patch_size=PATCH,
    feedforward_channels=HIDDEN,
    num_layers=DEPTH,
)


@pytest.mark.parametrize(
    'target, more',
    [
        (MMPRETRAIN, dict(positions=SIDE**2 + 1)),
        (MMSEG, dict(positions=SIDE**2 + 1)),
        ('mmpretrain.ViTSAM', dict(positions=SIDE**2, num_heads=HEADS)),
        ('mmpretrain.BEiTViT', dict(num_heads=HEADS)),
        ('mmseg.BEiT', dict(num_heads=HEADS)),
        ('mmseg.MAE', dict(positions=SIDE**2 + 1)),
        (EVA02, dict(positions=SIDE**2 + 1)),
    ],
)
def test_describe_vit(target, more):
    ours, _ = to_vit_keys(FILES[target](), target)
    assert describe_vit(ours) == {**SIZES, **more}


def test_describe_vit_says_what_the_config_of_a_gated_mlp_says():
    ours, _ = to_vit_keys(dinov2(mlp=gated_mlp), MMPRETRAIN)
    assert describe_vit(ours)['feedforward_channels'] == HIDDEN * 3 // 2
