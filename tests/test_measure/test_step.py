import importlib.util
from itertools import chain
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.measure import CATEGORIES, TrainingStep, fold_paths
from e3va_mm.utils import mark_trainable
from tests.test_configs import CONFIGS

DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'
MAPS = CONFIGS / 'upernet_e3va_swin_nano_digits.py'
SMALL = dict(size=(64, 96), batch=2)
ONE = dict(size=(64, 96), batch=1)
AMP = dict(type='AmpOptimWrapper', loss_scale='dynamic')
VARIANTS = (
    *('full', 'frozen', 'frozen-same', 'frozen-lean', 'exact', 'lean'),
    *('adapter', 'lora'),
)


def step_of(path=MAPS, variant='as-is', size=SMALL, **changes):
    config = Config.fromfile(path)
    config.merge_from_dict(changes)
    return TrainingStep(config, variant, **size)


def tensor_bytes(tensors):
    storages = {t.untyped_storage()._cdata: t for t in tensors}
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.fixture(scope='module')
def measured():
    figures = {}
    for variant in VARIANTS:
        step = step_of(DIGITS, variant, ONE)
        figures[variant] = dict(
            step.parameters(),
            **step.memory(),
            held=tensor_bytes(
                chain(step.model.parameters(), step.model.buffers())
            ),
            groups=step.optim_wrapper.param_groups,
        )
    return figures


def test_variants_train_what_they_declare(measured):
    # 49.5 values for a channel of each of two taps in each block, and norms.
    blocks = 2 * 32 + 2 * 64 + 4 * 128 + 2 * 256
    norms = 2 * (32 + 64 + 128 + 256)
    trains = {v: m['trainable_backbone'] for v, m in measured.items()}
    assert trains == {
        'full': measured['full']['backbone'],
        **dict.fromkeys(('frozen', 'frozen-same', 'frozen-lean'), 0),
        **dict.fromkeys(('exact', 'lean'), 99 * blocks + norms),
        # A weight of (64, C) down and one up, with biases, twice a block.
        'adapter': 2 * (129 * blocks + 640),
        # Two of (64, C) for each of q and v.
        'lora': 4 * 64 * blocks,
    }
    heads = {m['trainable'] - trains[v] for v, m in measured.items()}
    assert len(heads) == 1, 'neck and heads train alike'


def test_the_peak_is_the_sum_of_its_categories(measured):
    for variant, figures in measured.items():
        parts = {key: figures[key] for key in CATEGORIES}
        assert sum(parts.values()) == figures['peak'], variant
        assert figures['weights'] == figures['held'], variant
        # AdamW: two moments and a step count for each tensor; the wrapper
        # holds one number more.
        tensors = sum(
            p.requires_grad for g in figures['groups'] for p in g['params']
        )
        state = 8 * figures['trainable'] + 4 * tensors
        assert 0 <= figures['optimizer'] - state <= 4, variant
        assert figures['gradients'] <= 4 * figures['trainable'], variant
        assert 'allocated' not in figures


def test_variants_differ_in_the_backbone_alone(measured):
    peaks = {v: m['peak'] for v, m in measured.items()}
    order = ['frozen-lean', 'lean', 'exact', 'lora', 'full']
    assert sorted(order, key=peaks.get) == order
    # An eager trunk without a graph; the peak is in the heads.
    assert peaks['frozen-same'] <= peaks['frozen'] < peaks['exact']
    # The heads sample: numbers of samples must not differ by chance.
    heads = [
        {
            path: size
            for path, size in measured[variant]['kept_modules'].items()
            if path and not path.startswith('backbone')
        }
        for variant in ('exact', 'frozen', 'frozen-same')
    ]
    assert heads[0] == heads[1] == heads[2]
    assert heads[0]['roi_head.mask_head'] > 500_000
    kept = {
        v: fold_paths(m['kept_modules'], 1).get('backbone')
        for v, m in measured.items()
    }
    # The neck keeps the outputs of the frozen trunk: 4 bytes, C channels on
    # (H / s) (W / s) tokens.
    stages = zip((32, 64, 128, 256), (4, 8, 16, 32), strict=True)
    outputs = sum(4 * c * (64 // s) * (96 // s) for c, s in stages)
    assert kept['frozen'] == kept['frozen-same'] == outputs
    assert outputs < kept['lean'] < kept['exact'] < kept['lora'] < kept['full']


@pytest.mark.parametrize('variant', ['full', 'frozen'])
def test_figures_of_tuners_are_those_of_the_stock_class(measured, variant):
    config = Config.fromfile(DIGITS)
    backbone = config.model.backbone
    for key in ('side_path', 'tuner'):
        backbone.pop(key, None)
    backbone.type = 'mmdet.SwinTransformer'
    step = TrainingStep(config, **ONE)
    if variant == 'frozen':
        mark_trainable(step.model.backbone, [])
        step.model.backbone.eval()
    found = step.memory()
    for key in ('peak', *CATEGORIES, 'kept_modules'):
        assert found[key] == measured[variant][key], key


def test_figures_and_draws_repeat_and_no_weight_changes():
    step = step_of()
    draws = []
    step.model.register_forward_pre_hook(
        lambda *_: draws.append(torch.rand(1).item())
    )
    rates = [group['lr'] for group in step.optim_wrapper.param_groups]
    before = {k: v.clone() for k, v in step.model.named_parameters()}
    first = step.memory()
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert rates == [g['lr'] for g in step.optim_wrapper.param_groups]
    assert min(rates) > 0
    torch.rand(5)
    step.run()
    assert len(set(draws)) == 1
    assert step.memory() == first, 'whatever ran before'


@pytest.mark.parametrize('learn', [True, False])
def test_each_step_updates_and_learns_unless_told_not_to(learn):
    config = Config.fromfile(MAPS)
    config.optim_wrapper.accumulative_counts = 4
    step = TrainingStep(config, learn=learn, **SMALL)
    sizes = []
    step.model.backbone.register_forward_hook(
        lambda module, args, output: sizes.append(args[0].shape)
    )
    side = step.model.backbone.side_path.stages[0].up
    assert not side.q.any()
    assert step.run() > 0
    assert side.q.any() == learn
    assert len(step.optim_wrapper.optimizer.state) > 50, 'updated anyway'
    assert sizes == [(2, 3, 64, 96)], 'the config pads to 224 x 224'


def test_images_have_the_size_of_the_pipeline():
    step = step_of(DIGITS, 'frozen', {})
    assert len(step.data['inputs']) == 4
    assert step.data['inputs'][0].shape == (3, 224, 224)


def test_variants_get_the_same_images_and_weights():
    ours, full = (step_of(DIGITS, v, ONE) for v in ('exact', 'full'))
    for a, b in zip(ours.data['inputs'], full.data['inputs'], strict=True):
        assert torch.equal(a, b)
    boxes = [
        step.data['data_samples'][0].gt_instances.bboxes.tensor
        for step in (ours, full)
    ]
    assert torch.equal(*boxes)
    theirs = full.model.state_dict()
    for name, value in ours.model.state_dict().items():
        if '.side_path.' not in name:
            assert torch.equal(value, theirs[name]), name
    weight = theirs['neck.fpn_convs.0.conv.weight']
    assert not torch.equal(weight[0], weight[1])


def test_mixed_precision_halves_what_the_heads_keep(measured):
    changes = {f'optim_wrapper.{key}': value for key, value in AMP.items()}
    half = step_of(DIGITS, 'frozen', ONE, **changes).memory()
    single, path = measured['frozen'], 'roi_head.mask_head'
    ratio = half['kept_modules'][path] / single['kept_modules'][path]
    assert 0.45 < ratio < 0.65
    assert half['weights'] == single['weights']


def test_activation_checkpoints_of_the_config_apply(measured):
    hook = dict(
        type='e3va_mm.ActivationCheckpointHook',
        modules=['roi_head.mask_head.*'],
    )
    found = step_of(DIGITS, 'exact', ONE, custom_hooks=[hook]).memory()
    found, before = found['kept_modules'], measured['exact']['kept_modules']
    path = 'roi_head.mask_head'
    assert found.get(path, 0) < 0.3 * before[path]
    others = before.keys() - {path, ''}
    assert all(found[k] == before[k] for k in others if 'roi' not in k)


def test_what_the_config_freezes_does_not_train():
    hook = dict(
        type='e3va_mm.FreezeHook',
        freeze=['roi_head'],
        train=['roi_head.mask_head'],
    )
    step = step_of(DIGITS, 'exact', ONE, custom_hooks=[hook])
    trains = {n for n, p in step.model.named_parameters() if p.requires_grad}
    assert any(name.startswith('roi_head.mask_head.') for name in trains)
    assert not any(name.startswith('roi_head.bbox_head.') for name in trains)


def test_what_cannot_train_is_refused():
    step = step_of(size=dict(size=(64, 64), batch=1))
    with pytest.raises(ConfigError, match='the batch is 1.*--batch 2'):
        step.run()
    config = Config.fromfile(MAPS)
    config.pop('optim_wrapper')
    with pytest.raises(ConfigError, match='training config with `optim_wra'):
        TrainingStep(config, **SMALL)


def test_a_model_may_have_its_backbone_deeper_or_nowhere():
    step = step_of(variant='frozen')
    expected = step.parameters()
    assert expected['backbone'] > 1_000_000
    wrapped = nn.Module()
    wrapped.student = step.model
    step.model = wrapped
    assert step.parameters() == expected
    step.model = nn.Linear(3, 3)
    assert step.parameters() == dict(
        total=12, trainable=12, backbone=0, trainable_backbone=0
    )


# One of each kind of data and head; the smallest of the frameworks' configs.
STOCK = [
    ('mmdet', 'detr/detr_r50_8xb2-150e_coco.py'),
    ('mmdet', 'yolox/yolox_tiny_8xb8-300e_coco.py'),
    ('mmdet', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'),
    ('mmseg', 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'),
]


@pytest.mark.parametrize(
    'framework, path', STOCK, ids=lambda v: v.split('/')[0]
)
def test_stock_configs_train(framework, path):
    root = Path(importlib.util.find_spec(framework).origin).parent
    step = step_of(root / '.mim' / 'configs' / path)
    first = next(p for p in step.model.parameters() if p.requires_grad)
    assert step.run() > 0
    assert first.grad is None, 'the step ends without gradients'
    trained = [p for p in step.model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in trained)
    state = step.optim_wrapper.optimizer.state
    assert sum(p in state for p in trained) > 0.9 * len(trained)


NEW_STYLE = """
from mmcv.transforms import LoadImageFromFile, Resize
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmdet.models import (
    DetDataPreprocessor, FPN, RetinaHead, RetinaNet)
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.task_modules import (
    AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler)
from mmengine.optim import OptimWrapper
from torch.optim import SGD

from e3va_mm.models import E3VASwinTransformer

default_scope = None
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(
        type=E3VASwinTransformer, embed_dims=32, depths=(1, 1, 1, 1),
        num_heads=(1, 2, 4, 8), out_indices=(1, 2, 3)),
    neck=dict(
        type=FPN, in_channels=[64, 128, 256], out_channels=16, num_outs=3),
    bbox_head=dict(
        type=RetinaHead, num_classes=3, in_channels=16, feat_channels=16,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=1,
            ratios=[1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss)),
    train_cfg=dict(
        assigner=dict(
            type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4,
            min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1,
        debug=False))
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type=CocoDataset,
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(96, 64), keep_ratio=True),
            dict(type=PackDetInputs),
        ]))
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01))
"""


@pytest.mark.parametrize('variant', ['as-is', 'full', 'lean'])
def test_new_style_configs_train(tmp_path, variant):
    path = tmp_path / 'new.py'
    path.write_text(NEW_STYLE)
    step = step_of(path, variant, {})
    assert step.data['inputs'][0].shape == (3, 64, 96)
    assert step.run() > 0
    counts = step.parameters()
    whole = counts['trainable_backbone'] == counts['backbone']
    assert whole == (variant == 'full')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_cuda_the_allocator_is_measured_too():
    config = Config.fromfile(DIGITS)
    config.optim_wrapper.update(AMP)
    figures = TrainingStep(config, 'frozen', device='cuda', **SMALL).memory()
    assert sum(figures[key] for key in CATEGORIES) == figures['peak']
    assert figures['peak'] < 1.1 * figures['allocated']
    assert figures['allocated'] <= figures['reserved']
