"""Any value in a config trains a step, or is refused by the option's name.

More draws: E3VA_MM_EXAMPLES=1000 pytest tests/test_faults.
"""

import copy
import os
import tempfile
import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.families import FAMILIES
from tests.helpers import TINY
from tests.trunk_cases import CASES, flat

EXAMPLES = int(os.environ.get('E3VA_MM_EXAMPLES', 30))
draws = settings(
    max_examples=EXAMPLES,
    # The same draws every time, unless more are asked for.
    derandomize=EXAMPLES <= 30,
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


@draws
@given(chosen(SIDE_PATH))
def test_side_path_of_swin(options):
    check(options, lambda o: swin(side_path=o), torch.randn(2, 3, 32, 32))


@draws
@given(chosen(SIDE_PATH))
def test_side_path_of_vit(options):
    pytest.importorskip('mmpretrain')
    check(options, lambda o: vit(side_path=o), torch.randn(2, 3, 64, 64))


@draws
@given(absurd)
def test_side_path_as_a_whole(value):
    check(
        dict(side_path=value), lambda o: swin(**o), torch.randn(2, 3, 32, 32)
    )


@draws
@given(chosen(SWIN))
def test_swin(options):
    check(options, lambda o: swin(**o), torch.randn(2, 3, 32, 32))


@draws
@given(chosen(VIT))
def test_vit(options):
    pytest.importorskip('mmpretrain')
    check(options, lambda o: vit(**o), torch.randn(2, 3, 64, 64))


@draws
@given(chosen(ANY))
def test_any_backbone(options):
    pytest.importorskip('mmpretrain')
    check(options, lambda o: any_backbone(**o), torch.randn(2, 3, 64, 64))


@draws
@given(chosen(TRUNK))
def test_trunk_of_any_backbone(options):
    pytest.importorskip('mmpretrain')
    check(
        options,
        lambda o: any_backbone(trunk={**CONVNEXT, **o}),
        torch.randn(2, 3, 64, 64),
    )


@draws
@given(chosen(LAYOUT))
def test_layout_of_any_backbone(options):
    pytest.importorskip('mmpretrain')
    layout = FAMILIES['mmpretrain.ConvNeXt']._asdict()
    check(
        options,
        lambda o: any_backbone(layout={**layout, **o}),
        torch.randn(2, 3, 64, 64),
    )


@draws
@given(chosen(NECK))
def test_neck(options):
    base = dict(type='e3va_mm.SimpleFeaturePyramid', in_channels=8)
    check(
        options,
        lambda o: MODELS.build({**base, **o}),
        [torch.randn(2, 8, 4, 4)],
    )


HOOKS = {
    'ActivationCheckpointHook': {
        'modules': of(['head'], ['backbone.stages.*'], ['*'], []),
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
}


class Small(BaseModel):
    """A backbone of ours and a head of one number."""

    def __init__(self, weights):
        super().__init__()
        init_cfg = dict(type='Pretrained', checkpoint=str(weights))
        self.backbone = swin(out_indices=[0], init_cfg=init_cfg)
        self.head = nn.Linear(32, 1)

    def forward(self, image, mode='loss'):
        pooled = self.backbone(image)[0].mean((2, 3))
        return dict(loss=self.head(pooled).square().mean())


@pytest.fixture(scope='module')
def trunk(tmp_path_factory):
    path = tmp_path_factory.mktemp('trunk') / 'trunk.safetensors'
    save_file(swin(out_indices=[0]).trunk_state(), path)
    return path


@pytest.mark.parametrize('hook', HOOKS)
def test_hook(hook, trunk):
    fixed = dict(by_epoch=False) if 'by_epoch' in HOOKS[hook] else {}

    @draws
    @given(chosen(HOOKS[hook]))
    def run(options):
        with tempfile.TemporaryDirectory() as folder:
            try:
                runner = Runner(
                    model=Small(trunk),
                    work_dir=folder,
                    experiment_name=f'run{time.monotonic_ns()}',
                    log_level='ERROR',
                    train_dataloader=DataLoader(
                        TensorDataset(torch.randn(2, 3, 32, 32))
                    ),
                    train_cfg=dict(by_epoch=False, max_iters=2),
                    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
                    default_hooks=dict(checkpoint=None),
                    custom_hooks=[
                        dict(type=f'e3va_mm.{hook}', **{**fixed, **options})
                    ],
                )
                runner.train()
            except ConfigError as error:
                text = str(error)
                assert names_one_of(options, text), text
            else:
                assert runner.iter == 2

    run()
