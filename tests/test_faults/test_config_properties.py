"""Any value in a config trains a step, or is refused by the option's name.

More draws: E3VA_MM_EXAMPLES=1000 pytest tests/test_faults.
"""

import copy
import os
import tempfile
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.families import FAMILIES
from tests.helpers import TINY, build_e3va
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


FLAG = of(True, False)
RATE = of(0.0, 0.3)
NONE = of(None)
TYPES = (None, 'fp32', 'bf16')
SIDE_PATH = {
    'type': of('E3VA', 'NoSidePath'),
    'preset': of('exact', 'lean'),
    'rank': of(1, 4, 16),
    'bottleneck_ratio': of(0.25, 0.5, 1, 2.0),
    'taps': of(['attn'], ('ffn', 'attn'), None),
    'downsampling': of('difference', 'linear'),
    'save_taps': of('exact', 'bf16', 'int8', 'int4', ['recompute', 'int8']),
    'compute': of(*TYPES),
    'train_output_norms': FLAG,
    'trunk_compute': of(*TYPES),
    'trunk_weights': of(*TYPES),
    'trunk_chunk': of(None, 1, 50, 8192),
    'trunk_compile': of(False),
    'trunk_drop_path': of(0, 0.2),
    'trunk_nonsense': absurd,
    'nonsense': absurd,
}
INSIDE = {
    'LoRA': {
        'rank': of(1, 4),
        'alpha': of(None, 0.5, 8),
        'layers': of(['qkv'], ('qkv', 'proj')),
        'parts': of(('q',), ['k', 'v']),
    },
    'AdaptFormer': {
        'bottleneck': of(1, 8),
        'scale': of(0.1, 1),
        'branches': of(None, ['ffn'], ('attn', 'ffn')),
    },
    'Mona': {'bottleneck': of(1, 8), 'dropout': RATE, 'nonsense': absurd},
    'Partial': {'blocks': of(1, 3), 'nonsense': absurd},
    'BitFit': {'position_tables': FLAG, 'nonsense': absurd},
}
CONVNEXT = CASES['convnext']
SWIN = {
    **{key: st.just(value) for key, value in TINY.items()},
    'out_indices': of((0, 1, 2, 3), (1, 2), [2], (2, 0)),
    'pretrain_img_size': of(32, 224, (32, 64), [64, 64]),
    'in_channels': of(3),
    'patch_size': of(4, 8),
    'strides': of((4, 2, 2, 2), [4, 2, 2, 2]),
    'mlp_ratio': of(1, 2, 4),
    'qkv_bias': FLAG,
    'qk_scale': of(None, 0.5),
    'patch_norm': FLAG,
    'drop_rate': RATE,
    'attn_drop_rate': RATE,
    'drop_path_rate': RATE,
    'use_abs_pos_embed': of(False),
    'act_cfg': of(dict(type='GELU'), dict(type='ReLU')),
    'norm_cfg': of(dict(type='LN')),
    'with_cp': FLAG,
    'frozen_stages': of(-1, 2),
    'pretrained': NONE,
    'convert_weights': FLAG,
    'init_cfg': NONE,
    'allow_random_trunk': of(True),
    'tuner': of({}, dict(type='LoRA')),
    'method': NONE,
}
VIT = {
    'trunk_type': of('mmpretrain.VisionTransformer'),
    'out_indices': of(3, [1, 3], (0, 2), -1),
    'img_size': of(64, (64, 96)),
    'patch_size': of(16, 8),
    'in_channels': of(3),
    'out_type': of('featmap', 'raw', 'cls_token', 'avg_featmap'),
    'drop_rate': RATE,
    'drop_path_rate': RATE,
    'qkv_bias': FLAG,
    'final_norm': FLAG,
    'with_cls_token': of(True),
    'frozen_stages': of(-1, 2),
    'interpolate_mode': of('bicubic', 'bilinear'),
    'layer_scale_init_value': of(0.0, 0.1),
    'pre_norm': FLAG,
    'pretrained': NONE,
    'init_cfg': NONE,
    'allow_random_trunk': of(True),
}
ANY = {
    'trunk': of(CONVNEXT),
    'layout': NONE,
    'allow_random_trunk': of(True),
    'init_cfg': NONE,
    'side_path': NONE,
}
TRUNK = {
    'type': of('mmpretrain.ConvNeXt'),
    'arch': of(CONVNEXT['arch']),
    'out_indices': of([0, 1, 2, 3], [3], (1, 2), -1),
    'drop_path_rate': RATE,
    'frozen_stages': of(0, 2),
    'use_grn': FLAG,
    'init_cfg': NONE,
    'pretrained': NONE,
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
    'first': of('depthwise_conv', None),
    'channels_last': of(False),
    'output_norm': of('norm{stage}', 'nothing?', None),
    'norm_goes_on': of(False),
    'downsampling': of(['downsample_layers.{next}']),
    'embedding': of(['downsample_layers.0'], ()),
    'extra_tokens': NONE,
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
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert name in names or torch.equal(value, before[name]), name


def vit(**options):
    base = dict(CASES['vit'], type='e3va_mm.E3VAVisionTransformer')
    base |= dict(allow_random_trunk=True, tuner=dict(rank=4))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build({**base, **options})


def any_backbone(**options):
    base = dict(type='e3va_mm.E3VABackbone', trunk=CONVNEXT)
    base |= dict(allow_random_trunk=True, tuner=dict(rank=4))
    return MODELS.build({**base, **options})


def layout(options):
    own = asdict(FAMILIES['mmpretrain.ConvNeXt'])
    return any_backbone(layout={**own, **options})


def neck(options):
    own = dict(type='e3va_mm.SimpleFeaturePyramid', in_channels=8)
    return MODELS.build({**own, **options})


# Options, what they build, and the size that it takes.
SUBJECTS = {
    'tuner of swin': (SIDE_PATH, lambda o: build_e3va(tuner=o), 32),
    'tuner of vit': (SIDE_PATH, lambda o: vit(tuner=o), 64),
    'tuner': ({'tuner': of({})}, lambda o: build_e3va(**o), 32),
    'swin': (SWIN, lambda o: build_e3va(**o), 32),
    'vit': (VIT, lambda o: vit(**o), 64),
    'any': (ANY, lambda o: any_backbone(**o), 64),
    'trunk': (TRUNK, lambda o: any_backbone(trunk={**CONVNEXT, **o}), 64),
    'layout': (LAYOUT, layout, 64),
    'neck': (NECK, neck, None),
    **{
        kind: (
            table,
            lambda o, kind=kind: build_e3va(tuner=dict(o, type=kind)),
            32,
        )
        for kind, table in INSIDE.items()
    },
}


@pytest.mark.parametrize('subject', SUBJECTS)
def test_options_train_or_are_refused(subject):
    if subject not in ('swin', 'tuner of swin', 'tuner', 'neck', *INSIDE):
        pytest.importorskip('mmpretrain')
    table, build, side = SUBJECTS[subject]
    inputs = [torch.randn(2, 8, 4, 4)]
    if side is not None:
        inputs = torch.randn(2, 3, side, side)

    @draws
    @given(chosen(table))
    def run_with(options):
        check(options, build, inputs)

    run_with()


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
