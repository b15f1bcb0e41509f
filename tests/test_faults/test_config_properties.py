"""Any value in a config trains a step, or is refused by the option's name.

More draws: E3VA_MM_EXAMPLES=1000 pytest tests/test_faults.
"""

import copy
import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.families import FAMILIES
from tests.helpers import TINY
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.toy import toy_config
from tests.trunk_cases import CASES, flat

EXAMPLES = int(os.environ.get('E3VA_MM_EXAMPLES', 20))
draws = settings(
    max_examples=EXAMPLES,
    # The same draws every time, unless more are asked for.
    derandomize=EXAMPLES <= 20,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

HUGE = 10**15
numbers = st.sampled_from(
    [
        *(-HUGE, -7, -1, 0, 1, 2, 3, 7, HUGE),
        *(-1.0, 0.0, 1e-30, 0.5, 1.0, 2.5, float(HUGE)),
        *(float('nan'), float('inf'), float('-inf')),
    ]
)
words = st.sampled_from(['', '2', 'exact', 'mean', '../x', 'nul\0', 'ü'])
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
absurd = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(words, inner, max_size=2),
    ),
    max_leaves=4,
)


def of(*values):
    return st.sampled_from(values)


SIDE_PATH = {
    'type': of('e3va_mm.E3VASidePath', 'e3va_mm.NoSidePath'),
    'preset': of('exact', 'lean'),
    'rank': of(1, 4, 16),
    'bottleneck_ratio': of(0.25, 0.5, 1, 2.0),
    'taps': of(['attn'], ('ffn', 'attn'), None),
    'downsampling': of('difference', 'linear'),
    'save_taps': of(
        'exact', 'bf16', 'int8', 'int4', 'recompute', ['recompute', 'int8']
    ),
    'compute': of(None, 'fp32', 'bf16'),
    'train_output_norms': st.booleans(),
    'trunk_compute': of(None, 'fp32', 'bf16'),
    'trunk_weights': of(None, 'fp32', 'bf16'),
    'trunk_chunk': of(None, 1, 50, 8192),
    'trunk_compile': of(False),
    'trunk_drop_path': of(0, 0.2),
    'trunk_nonsense': absurd,
    'nonsense': absurd,
}

SWIN = {
    **{key: st.just(value) for key, value in TINY.items()},
    'out_indices': of((0, 1, 2, 3), (1, 2), [2], (2, 0)),
    'pretrain_img_size': of(32, 224, (32, 64), [64, 64]),
    'in_channels': of(3),
    'patch_size': of(4, 8),
    'strides': of((4, 2, 2, 2), [4, 2, 2, 2]),
    'mlp_ratio': of(1, 2, 4),
    'qkv_bias': st.booleans(),
    'qk_scale': of(None, 0.5),
    'patch_norm': st.booleans(),
    'drop_rate': of(0.0, 0.3),
    'attn_drop_rate': of(0.0, 0.3),
    'drop_path_rate': of(0.0, 0.3),
    'use_abs_pos_embed': of(False),
    'act_cfg': of(dict(type='GELU'), dict(type='ReLU')),
    'norm_cfg': of(dict(type='LN')),
    'with_cp': st.booleans(),
    'frozen_stages': of(-1, 2),
    'pretrained': of(None),
    'convert_weights': st.booleans(),
    'init_cfg': of(None),
    'allow_random_trunk': of(True),
}
VIT = {
    'trunk_type': of('mmpretrain.VisionTransformer'),
    'out_indices': of(3, [1, 3], (0, 2), -1),
    'img_size': of(64, (64, 96)),
    'patch_size': of(16, 8),
    'in_channels': of(3),
    'out_type': of('featmap', 'raw', 'cls_token', 'avg_featmap'),
    'drop_rate': of(0.0, 0.3),
    'drop_path_rate': of(0.0, 0.3),
    'qkv_bias': st.booleans(),
    'final_norm': st.booleans(),
    'with_cls_token': of(True),
    'frozen_stages': of(-1, 2),
    'interpolate_mode': of('bicubic', 'bilinear'),
    'layer_scale_init_value': of(0.0, 0.1),
    'pre_norm': st.booleans(),
    'pretrained': of(None),
    'init_cfg': of(None),
    'allow_random_trunk': of(True),
}
CONVNEXT = CASES['convnext']
ANY = {
    'trunk': of(CONVNEXT),
    'layout': of(None),
    'allow_random_trunk': of(True),
    'init_cfg': of(None),
}
TRUNK = {
    'type': of('mmpretrain.ConvNeXt'),
    'arch': of(CONVNEXT['arch']),
    'out_indices': of([0, 1, 2, 3], [3], (1, 2), -1),
    'drop_path_rate': of(0.0, 0.2),
    'frozen_stages': of(0, 2),
    'use_grn': st.booleans(),
    'init_cfg': of(None),
    'pretrained': of(None),
}
NECK = {
    'in_channels': of(8),
    'out_channels': of(4, 16),
    'scales': of((4, 2, 1, 0.5), (1,), [2, 0.5]),
    'num_outs': of(None, 4, 5, 6),
    'init_cfg': of(None, dict(type='Xavier', layer='Conv2d')),
}


LAYOUT = {
    'blocks': of('stages.{stage}.{block}', 'stages.0.{block}'),
    'taps': of(dict(branch='drop_path')),
    'channels': of('norm'),
    'channels_last': of(False),
    'output_norm': of('norm{stage}', 'nothing?', None),
    'norm_goes_on': of(False),
    'downsampling': of(['downsample_layers.{next}']),
    'embedding': of(['downsample_layers.0'], ()),
    'extra_tokens': of(None),
    'cut': of('stages', None),
    'first_stage': of(0),
    'pools': of('gap_before_final_norm', None),
}

# Compiling takes minutes; of a map that lies about its order nothing can be
# seen but other numbers.
UNTRIED = ('trunk_compile', 'channels_last')


@st.composite
def chosen(draw, table):
    """One to three options, each with a value that is sane or absurd."""
    names = draw(st.lists(of(*table), min_size=1, max_size=3, unique=True))
    options = {name: draw(st.one_of(table[name], absurd)) for name in names}
    assume(not any(options.get(name) is True for name in UNTRIED))
    return options


def names_one_of(options, text):
    """Whether a message has an option's name, or of a list a value."""
    return any(
        name in text.lower()
        or isinstance(value, (list, tuple))
        and any(repr(each) in text for each in value)
        for name, value in options.items()
    )


def check(options, build, inputs):
    """Train a step with what is built, or read the refusal."""
    try:
        model = build(copy.deepcopy(options))
        model.init_weights()
        before = copy.deepcopy(model.state_dict())
        outputs = model.train()(inputs)
    except CheckpointError as error:
        path = options.get('pretrained')
        assert path and str(error).startswith(path)
        return
    except ConfigError as error:
        text = str(error)
        assert names_one_of(options, text), text
        return
    outputs = [each for each in flat(outputs) if each.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert bool(outputs) == bool(trained)
    if outputs:
        torch.stack(
            [each.square().mean() for each in outputs]
        ).sum().backward()
        torch.optim.SGD(trained, lr=1e-3).step()
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for name in frozen:
        assert torch.equal(model.state_dict()[name], before[name]), name


def swin(**options):
    base = dict(type='e3va_mm.E3VASwinTransformer', allow_random_trunk=True)
    return MODELS.build({**base, **TINY, **options})


def vit(**options):
    base = dict(CASES['vit'], type='e3va_mm.E3VAVisionTransformer')
    base |= dict(allow_random_trunk=True, side_path=dict(rank=4))
    # The class of the trunk goes by the scope, which other tests leave.
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build({**base, **options})


def any_backbone(**options):
    base = dict(type='e3va_mm.E3VABackbone', trunk=CONVNEXT)
    base |= dict(allow_random_trunk=True, side_path=dict(rank=4))
    return MODELS.build({**base, **options})


def side_path_of(build):
    return lambda options: build(side_path=options)


def neck(**options):
    base = dict(type='e3va_mm.SimpleFeaturePyramid', in_channels=8)
    return MODELS.build({**base, **options})


IMAGES = {size: torch.randn(2, 3, size, size) for size in (32, 64)}
# What is drawn from, what is built with it, and what goes in.
PARTS = {
    'side path of swin': (SIDE_PATH, side_path_of(swin), IMAGES[32]),
    'side path of vit': (SIDE_PATH, side_path_of(vit), IMAGES[64]),
    'swin': (SWIN, lambda o: swin(**o), IMAGES[32]),
    'vit': (VIT, lambda o: vit(**o), IMAGES[64]),
    'any backbone': (ANY, lambda o: any_backbone(**o), IMAGES[64]),
    'trunk of any backbone': (
        TRUNK,
        lambda o: any_backbone(trunk={**CONVNEXT, **o}),
        IMAGES[64],
    ),
    'layout of any backbone': (
        LAYOUT,
        lambda o: any_backbone(
            layout={**vars(FAMILIES['mmpretrain.ConvNeXt']), **o}
        ),
        IMAGES[64],
    ),
    'neck': (NECK, lambda o: neck(**o), [torch.randn(2, 8, 4, 4)]),
}


@pytest.mark.parametrize('part', PARTS)
def test_options(part):
    table, build, inputs = PARTS[part]
    if table not in (SWIN, NECK):
        pytest.importorskip('mmpretrain')

    @draws
    @given(chosen(table))
    def run(options):
        check(options, build, inputs)

    run()


@draws
@given(absurd)
def test_tuner_as_a_whole(value):
    check(dict(tuner=value), lambda o: swin(**o), IMAGES[32])


HOOKS = {
    'ActivationCheckpointHook': {
        'modules': of(['head'], ['trunk', 'norm'], ['*'], []),
    },
    'AdapterCheckpointHook': {
        'interval': of(1, 2),
        'by_epoch': of(False),
        'max_keep': of(1, 3),
        'save_best': of(None, 'acc', 'auto'),
        'rule': of('less', 'greater'),
    },
    'DatasetCheckHook': {'check_content': st.booleans()},
    'MeasureHook': {'at': of(0, 1), 'timed': of(1, 2)},
    'ProgressBarHook': {'interval': of(0, 0.5)},
    'FreezeHook': {'freeze': of(['norm'], ['*']), 'train': of([], ['head'])},
    'TrainingGuardHook': {'without_gradient': of(['head'], ['*'])},
}


@pytest.mark.parametrize('hook', HOOKS)
def test_hook(hook):
    fixed = dict(by_epoch=False) if 'by_epoch' in HOOKS[hook] else {}
    fixed |= dict(freeze=['norm']) if 'freeze' in HOOKS[hook] else {}

    @draws
    @given(chosen(HOOKS[hook]))
    def run_with(options):
        own = dict(type=f'e3va_mm.{hook}', **{**fixed, **options})
        config = toy_config(
            custom_hooks=[own],
            default_hooks=dict(checkpoint=None),
            **{'train_cfg.max_iters': 2},
        )
        with tempfile.TemporaryDirectory() as folder:
            try:
                runner = run(config, folder)
            except ConfigError as error:
                text = str(error)
                assert names_one_of(options, text), text
            else:
                assert runner.iter == 2

    run_with()
