"""Evaluators, loops and batch norms that do not fit the rest."""

import shutil

import pytest
import torch
from mmengine.config import Config
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.preflight.evaluation import check_metric_names
from e3va_mm.preflight.loops import (
    check_batch_norm,
    check_loop,
    explain_batch_norm,
)
from e3va_mm.preflight.reading import ReadDataset
from tests.test_preflight.test_checks import Files
from tests.test_preflight.test_labels import (  # noqa: F401
    detection,
    only,
    problems_of,
    rewrite,
    segmentation,
)


def found(check, config, *args):
    return [*check(Config(config), *args)]


# ---- what evaluators read


def test_an_evaluator_of_other_images(detection, tmp_path):  # noqa: F811
    file = tmp_path / 'other.json'
    shutil.copy(tmp_path / 'val.json', file)
    detection.val_evaluator.ann_file = str(file)
    assert problems_of(detection, 'val') == []  # a copy

    def change(content):
        content['annotations'][0]['bbox'] = [1, 1, 9, 9]

    rewrite(file, change)
    problem = only(detection, 'evaluator_files', 'val')
    assert problem.severity == 'warning'
    assert 'other annotations' in problem.found
    for change, text in (
        (lambda c: c['images'][0].update(file_name='a.jpg'), 'other names'),
        (lambda c: c['images'].append(dict(id=9)), '1 images that'),
        (lambda c: c['images'].pop(0), "no image with the id '0'"),
    ):
        rewrite(file, change)
        problem = only(detection, 'evaluator_files', 'val')
        assert problem.severity == 'error'
        assert problem.where == 'val_evaluator.ann_file'
        assert text in problem.found
    file.unlink()
    assert only(detection, 'evaluator_files', 'val').found.startswith('no su')
    assert problems_of(detection, 'train') == []


def test_a_part_of_the_validation_images(detection):  # noqa: F811
    detection.val_dataloader.dataset.indices = 3
    problem = only(detection, 'evaluator_files', 'val')
    assert problem.severity == 'warning'


def test_masks_to_evaluate(detection, tmp_path):  # noqa: F811
    rewrite(
        tmp_path / 'val.json',
        lambda content: content['annotations'][2].pop('segmentation'),
    )
    assert problems_of(detection, 'val') == []
    detection.val_evaluator.metric = ['bbox', 'segm']
    problem = only(detection, 'evaluator_files', 'val')
    assert 'annotation 2 (image 2) is missing' in problem.found


def test_images_of_several_sizes_in_a_batch(
    segmentation,  # noqa: F811
    tmp_path,
):
    from PIL import Image

    for folder, name in (('images', '000.jpg'), ('maps', '000.png')):
        path = tmp_path / folder / name
        Image.open(path).resize((48, 48), 0).save(path)
    assert problems_of(segmentation, 'val') == []
    segmentation.val_dataloader.batch_size = 2
    problem = only(segmentation, 'batch_sizes', 'val')
    assert '(48, 48)' in problem.found and '(64, 48)' in problem.found
    resize = dict(type='Resize', scale=(64, 64))
    pipeline = segmentation.val_dataloader.dataset.pipeline
    pipeline.insert(1, dict(resize, keep_ratio=True))
    assert only(segmentation, 'batch_sizes', 'val')
    pipeline[1]['keep_ratio'] = False
    assert problems_of(segmentation, 'val') == []


# ---- what evaluators are asked for

COCO = dict(type='CocoMetric', metric=['bbox', 'segm'])
NAMES = [
    (COCO, 'coco/bbox_mAP', True),
    (COCO, 'coco/segm_mAP_50', True),
    (COCO, 'bbox_mAP', False),
    (dict(COCO, metric='bbox'), 'coco/segm_mAP', False),
    (dict(COCO, prefix='mine'), 'mine/bbox_mAP', True),
    (dict(COCO, classwise=True), 'coco/cat_precision', True),
    (dict(type='mmdet.VOCMetric'), 'pascal_voc/mAP', True),
    (dict(type='VOCMetric'), 'mAP', False),
    (dict(type='IoUMetric'), 'mIoU', True),
    (dict(type='IoUMetric'), 'mDice', False),
    ([dict(type='IoUMetric'), dict(type='Mine')], 'mine', True),
    (COCO, 'auto', True),
]


@pytest.mark.parametrize('evaluator, name, is_given', NAMES)
def test_names_of_metrics(evaluator, name, is_given):
    config = dict(
        val_evaluator=evaluator,
        default_hooks=dict(checkpoint=dict(save_best=name)),
        custom_hooks=[dict(type='EarlyStoppingHook', monitor=name)],
    )
    problems = found(check_metric_names, config, {})
    options = ['default_hooks.checkpoint.save_best', 'custom_hooks.0.monitor']
    assert [each.where for each in problems] == options * (not is_given)


def test_metrics_that_do_not_exist():
    evaluator = dict(type='IoUMetric', iou_metrics=['mIOU'])
    (problem,) = found(check_metric_names, dict(val_evaluator=evaluator), {})
    assert problem.found == "'mIOU'" and "'mIoU'" in problem.expected


# ---- loops

EPOCHS = dict(type='EpochBasedTrainLoop', max_epochs=1)
ITERATIONS = dict(type='IterBasedTrainLoop', max_iters=1)
SAVING = dict(checkpoint=dict(by_epoch=False))
LOOPS = [
    (EPOCHS, 'InfiniteSampler', [], 'train_dataloader.sampler'),
    (dict(by_epoch=True), 'InfiniteSampler', [], 'train_dataloader.sampler'),
    (EPOCHS, 'mmdet.GroupMultiSourceSampler', [], 'train_dataloader.sampler'),
    (EPOCHS, 'DefaultSampler', [dict(type='PolyLR', by_epoch=False)], None),
    (ITERATIONS, 'InfiniteSampler', [], None),
    (ITERATIONS, 'DefaultSampler', [], None),
    (
        ITERATIONS,
        'InfiniteSampler',
        [dict(type='LinearLR', by_epoch=False), dict(type='MultiStepLR')],
        'param_scheduler.1.by_epoch',
    ),
    (
        ITERATIONS,
        'InfiniteSampler',
        dict(type='PolyLR', by_epoch=True),
        'param_scheduler.by_epoch',
    ),
    (
        ITERATIONS,
        'InfiniteSampler',
        [dict(type='PolyLR', by_epoch=True, convert_to_iter_based=True)],
        None,
    ),
    # It steps after each validation.
    (ITERATIONS, 'InfiniteSampler', [dict(type='ReduceOnPlateauLR')], None),
    (dict(type='MyLoop'), 'InfiniteSampler', [dict(type='PolyLR')], None),
]


@pytest.mark.parametrize('loop, sampler, schedulers, option', LOOPS)
def test_loops(loop, sampler, schedulers, option):
    config = dict(
        train_cfg=loop,
        train_dataloader=dict(sampler=dict(type=sampler)),
        param_scheduler=schedulers,
        default_hooks=SAVING,
    )
    problems = found(check_loop, config, {})
    assert [each.where for each in problems] == ([option] if option else [])


def test_a_checkpoint_by_epochs_that_do_not_come():
    config = dict(train_cfg=ITERATIONS, train_dataloader=dict(batch_size=1))
    (problem,) = found(check_loop, config, {})
    assert problem.severity == 'warning'
    assert problem.where == 'default_hooks.checkpoint.by_epoch'


# ---- batch norm


def pooled(norm=nn.BatchNorm2d, size=1):
    pool = nn.AdaptiveAvgPool2d(size)
    return nn.Sequential(pool, nn.Sequential(nn.Conv2d(3, 3, 1), norm(3)))


class Frozen(nn.Sequential):
    """As a backbone with `norm_eval`."""

    def train(self, mode=True):
        return super().train(False)


BATCHES = [
    (pooled(), 4, dict(batch_size=1), 'train_dataloader.batch_size'),
    (pooled(), 5, dict(batch_size=2), 'train_dataloader.drop_last'),
    (pooled(), 5, dict(batch_size=2, drop_last=True), None),
    (pooled(), 4, dict(batch_size=2), None),
    (
        pooled(),
        5,
        dict(batch_size=2, sampler=dict(type='InfiniteSampler')),
        None,
    ),
    (pooled(size=2), 4, dict(batch_size=1), None),
    (pooled(nn.InstanceNorm2d), 4, dict(batch_size=1), None),
    (Frozen(pooled()), 4, dict(batch_size=1), None),
    (nn.BatchNorm2d(3), 4, dict(batch_size=1), None),
]


@pytest.mark.parametrize('model, samples, loader, option', BATCHES)
def test_batch_norms_of_one_value(model, samples, loader, option):
    name = 'train_dataloader.dataset'
    read = {name: ReadDataset(name, Files(), samples=samples)}
    config = dict(train_dataloader=loader)
    was = model.train().training
    problems = found(check_batch_norm, config, read, model)
    assert [each.where for each in problems] == ([option] if option else [])
    assert model.training == was


def test_what_torch_says_of_a_batch_norm():
    with pytest.raises(ValueError) as error:
        nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ConfigError, match='train_dataloader.batch_size: a ba'):
        explain_batch_norm(error.value)
    explain_batch_norm(ValueError('another'))
