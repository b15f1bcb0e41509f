import importlib.util
from itertools import chain
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.measure import CATEGORIES, VARIANTS, TrainingStep, fold_paths
from tests.test_configs import CONFIGS

DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'
MAPS = CONFIGS / 'upernet_e3va_swin_nano_digits.py'
SMALL = dict(size=(64, 96), batch=2)
ONE = dict(size=(64, 96), batch=1)


def stock_config(framework, path):
    root = Path(importlib.util.find_spec(framework).origin).parent
    return Config.fromfile(root / '.mim' / 'configs' / path)


def tensor_bytes(tensors):
    storages = {t.untyped_storage()._cdata: t for t in tensors}
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.fixture(scope='module')
def measured():
    figures = {}
    for variant in VARIANTS:
        step = TrainingStep(Config.fromfile(DIGITS), variant, **ONE)
        figures[variant] = dict(
            step.parameters(),
            **step.memory(),
            held=tensor_bytes(
                chain(step.model.parameters(), step.model.buffers())
            ),
            groups=step.optim_wrapper.param_groups,
        )
    return figures


def test_side_path_trains_what_it_declares(measured):
    # 49.5 values for a channel of each of two taps in each block, and norms.
    blocks = 2 * 32 + 2 * 64 + 4 * 128 + 2 * 256
    norms = 2 * (32 + 64 + 128 + 256)
    trains = {v: m['trainable_backbone'] for v, m in measured.items()}
    whole = measured['full']['backbone']
    rivals = {
        # A weight of (64, C) down and one up, with biases, twice a block.
        **dict.fromkeys(('adapter', 'adaptformer'), 2 * (129 * blocks + 640)),
        # Two of (64, C) for each of q and v.
        'lora': 4 * 64 * blocks,
    }
    others = ('bitfit', 'norm', 'partial1', 'lorand', 'mona')
    assert all(0 < trains.pop(name) < whole for name in others)
    assert trains == {
        **rivals,
        **dict.fromkeys(('as-is', 'exact', 'lean'), 99 * blocks + norms),
        **dict.fromkeys(('frozen', 'frozen-same', 'frozen-lean'), 0),
        'full': whole,
    }
    heads = {
        v: m['trainable'] - m['trainable_backbone']
        for v, m in measured.items()
    }
    assert len(set(heads.values())) == 1, 'neck and heads train alike'


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


def test_peaks_stand_in_their_order(measured):
    peaks = {v: m['peak'] for v, m in measured.items()}
    order = ['frozen-lean', 'lean', 'exact', 'lora', 'full']
    assert sorted(order, key=peaks.get) == order
    assert peaks['exact'] == peaks['as-is']
    # An eager trunk without a graph; the peak is in the heads.
    assert peaks['frozen-same'] <= peaks['frozen'] < peaks['exact']


def test_all_variants_have_the_same_work_in_the_heads(measured):
    """The heads draw samples: numbers of them must not differ by chance."""
    eval_mode = ('as-is', 'exact', 'frozen', 'frozen-same')
    heads = [
        {
            path: size
            for path, size in measured[variant]['kept_modules'].items()
            if path and not path.startswith('backbone')
        }
        for variant in eval_mode
    ]
    assert all(found == heads[0] for found in heads)
    assert heads[0]['roi_head.mask_head'] > 500_000
    kept = {
        v: fold_paths(measured[v]['kept_modules'], 1).get('backbone')
        for v in VARIANTS
    }
    # The neck keeps what the frozen trunk gives: 4 bytes, C channels on
    # (H / s) (W / s) tokens.
    stages = zip((32, 64, 128, 256), (4, 8, 16, 32), strict=True)
    given = sum(4 * c * (64 // s) * (96 // s) for c, s in stages)
    assert kept['frozen'] == kept['frozen-same'] == given
    assert given < kept['lean'] < kept['exact'] < kept['lora'] < kept['full']


def test_figures_repeat():
    step = TrainingStep(Config.fromfile(MAPS), **SMALL)
    first = step.memory()
    assert step.memory() == first
    again = TrainingStep(Config.fromfile(MAPS), **SMALL)
    again.run()
    assert again.memory() == first, 'whatever ran before'


def test_every_step_draws_the_same():
    step = TrainingStep(Config.fromfile(MAPS), **SMALL)
    draws = []
    step.model.register_forward_pre_hook(
        lambda *_: draws.append(torch.rand(1).item())
    )
    step.run()
    torch.rand(5)
    step.run()
    assert draws[0] == draws[1]


def test_measuring_memory_changes_no_weight():
    step = TrainingStep(Config.fromfile(MAPS), **SMALL)
    rates = [group['lr'] for group in step.optim_wrapper.param_groups]
    before = {k: v.clone() for k, v in step.model.named_parameters()}
    step.memory()
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert rates == [g['lr'] for g in step.optim_wrapper.param_groups]
    assert min(rates) > 0


@pytest.mark.parametrize('learn', [True, False])
def test_a_step_trains_unless_it_shall_not(learn):
    step = TrainingStep(Config.fromfile(MAPS), learn=learn, **SMALL)
    side = step.model.backbone.side_path.stages[0][0]['attn'].up
    assert not side.q.any()
    assert step.run() > 0
    assert side.q.any() == learn
    assert len(step.optim_wrapper.optimizer.state) > 100, 'updated anyway'


def test_pictures_have_the_size_of_the_pipeline():
    step = TrainingStep(Config.fromfile(DIGITS), 'frozen')
    assert len(step.data['inputs']) == 4
    assert step.data['inputs'][0].shape == (3, 224, 224)
    config = Config.fromfile(DIGITS)
    for transform in config.train_dataloader.dataset.pipeline:
        transform.pop('scale', None)
    with pytest.raises(ConfigError, match='Give it with --size'):
        TrainingStep(config, 'frozen')


def test_a_size_that_is_asked_for_reaches_the_model():
    step = TrainingStep(Config.fromfile(MAPS), **SMALL)
    sizes = []
    step.model.backbone.register_forward_hook(
        lambda module, args, output: sizes.append(args[0].shape)
    )
    step.run()
    assert sizes == [(2, 3, 64, 96)], 'the config pads to 224 x 224'


def test_variants_get_the_same_pictures_and_weights():
    ours, full = (
        TrainingStep(Config.fromfile(DIGITS), v, **ONE)
        for v in ('exact', 'full')
    )
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
    assert not torch.equal(
        theirs['neck.fpn_convs.0.conv.weight'][0],
        theirs['neck.fpn_convs.0.conv.weight'][1],
    )


def test_each_step_updates():
    config = Config.fromfile(MAPS)
    config.optim_wrapper.accumulative_counts = 4
    step = TrainingStep(config, **SMALL)
    before = step.model.decode_head.conv_seg.weight.detach().clone()
    step.run()
    assert not torch.equal(step.model.decode_head.conv_seg.weight, before)


def test_mixed_precision_halves_what_the_heads_keep():
    single, half = (
        TrainingStep(
            Config.fromfile(DIGITS), 'frozen', amp=amp, **ONE
        ).memory()
        for amp in (False, True)
    )
    path = 'roi_head.mask_head'
    ratio = half['kept_modules'][path] / single['kept_modules'][path]
    assert 0.45 < ratio < 0.65
    assert half['weights'] == single['weights']
    # A config that asks for it has it without the argument.
    config = Config.fromfile(DIGITS)
    config.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    assert TrainingStep(config, 'frozen', **ONE).memory() == half


def test_activation_checkpoints_of_the_config_are_heeded():
    config = Config.fromfile(DIGITS)
    plain = TrainingStep(config, **ONE).memory()['kept_modules']
    config.custom_hooks.append(
        dict(
            type='e3va_mm.ActivationCheckpointHook',
            modules=['roi_head.mask_head.*'],
        )
    )
    found = TrainingStep(config, **ONE).memory()['kept_modules']
    path = 'roi_head.mask_head'
    assert found.get(path, 0) < 0.3 * plain[path]
    others = plain.keys() - {path, ''}
    assert all(found[key] == plain[key] for key in others if 'roi' not in key)


def test_a_batch_that_is_too_small_is_an_error_that_says_so():
    step = TrainingStep(Config.fromfile(MAPS), size=(64, 64), batch=1)
    with pytest.raises(ConfigError, match='the batch is 1.*--batch 2'):
        step.run()


def test_configs_that_cannot_train_are_refused():
    config = Config.fromfile(MAPS)
    config.pop('optim_wrapper')
    with pytest.raises(ConfigError, match='training config with `optim_wra'):
        TrainingStep(config, **SMALL)


def test_a_model_may_have_its_backbone_deeper_or_nowhere():
    step = TrainingStep(Config.fromfile(MAPS), 'frozen', **SMALL)
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
    ('mmdet', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
    ('mmdet', 'yolox/yolox_tiny_8xb8-300e_coco.py'),
    ('mmdet', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'),
    ('mmdet', 'mask_rcnn/mask-rcnn_r50_fpn_amp-1x_coco.py'),
    ('mmseg', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'),
    ('mmseg', 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'),
]


@pytest.mark.parametrize(
    'framework, path', STOCK, ids=lambda v: v.split('/')[0]
)
def test_stock_configs_train(framework, path):
    config = stock_config(framework, path)
    step = TrainingStep(config, **SMALL)
    name, first = next(
        (n, p) for n, p in step.model.named_parameters() if p.requires_grad
    )
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
    step = TrainingStep(Config.fromfile(path), variant)
    assert step.data['inputs'][0].shape == (3, 64, 96)
    assert step.run() > 0
    backbone = type(step.model.backbone).__name__
    assert backbone.startswith('E3VA') == (variant != 'full')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_cuda_the_allocator_is_heard_too():
    step = TrainingStep(
        Config.fromfile(DIGITS), 'frozen', device='cuda', amp=True, **SMALL
    )
    figures = step.memory()
    assert sum(figures[key] for key in CATEGORIES) == figures['peak']
    assert figures['peak'] < 1.1 * figures['allocated']
    assert figures['allocated'] <= figures['reserved']
