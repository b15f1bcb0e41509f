import pytest
import torch
from mmengine.config import Config
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.measure.inputs import (
    batch_size,
    generate_batch,
    image_size,
    largest_size,
    set_image_size,
)

RESIZE = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
CROP = dict(type='RandomCrop', crop_size=(512, 1024))
SHORT = dict(
    type='RandomChoiceResize',
    scales=[(480, 1333), (800, 1333), (640, 1333)],
    keep_ratio=True,
)


def config(*pipeline, model=None, **dataset):
    dataset = dict(dataset, pipeline=[dict(type='Load'), *pipeline])
    return Config(
        dict(
            train_dataloader=dict(batch_size=3, dataset=dataset),
            model=model or {},
        )
    )


@pytest.mark.parametrize(
    'pipeline, size',
    [
        ([RESIZE], (800, 1333)),
        ([dict(type='Resize', scale=(640, 480))], (480, 640)),
        ([dict(type='Resize', scale=96)], (96, 96)),
        ([dict(type='Resize', scale_factor=0.5), RESIZE], (800, 1333)),
        ([RESIZE, CROP], (512, 1024)),
        ([CROP, RESIZE], (800, 1333)),
        ([dict(type='RandomCrop', crop_size=256)], (256, 256)),
        ([SHORT], (800, 1333)),
        (
            [dict(type='RandomResize', scale=[(1333, 640), (1333, 800)])],
            (800, 1333),
        ),
        (
            [
                dict(
                    type='RandomResize',
                    scale=(2048, 512),
                    ratio_range=(0.5, 2.0),
                    keep_ratio=True,
                )
            ],
            (512, 2048),
        ),
        # The two branches of DETR: the second crops on the way.
        (
            [
                dict(
                    type='RandomChoice',
                    transforms=[
                        [SHORT],
                        [
                            dict(type='RandomChoiceResize', scales=[400]),
                            dict(
                                type='RandomCrop',
                                crop_type='absolute_range',
                                crop_size=(384, 600),
                            ),
                            dict(SHORT, scales=[(512, 1333)]),
                        ],
                    ],
                )
            ],
            (800, 1333),
        ),
        ([dict(type='RandomApply', transforms=[RESIZE])], (800, 1333)),
        (
            [
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                )
            ],
            (600, 600),
        ),
        # A part of the picture: less than the size before.
        (
            [
                RESIZE,
                dict(
                    type='RandomCrop',
                    crop_type='relative_range',
                    crop_size=(0.3, 0.3),
                ),
            ],
            (800, 1333),
        ),
        ([RESIZE, dict(type='Pad', size=(1344, 896))], (896, 1344)),
        ([RESIZE, dict(type='Pad', size_divisor=32)], (800, 1333)),
        ([RESIZE, dict(type='Other', size=(5, 5))], (800, 1333)),
    ],
)
def test_the_size_is_what_the_pipeline_ends_with(pipeline, size):
    assert image_size(config(*pipeline)) == size


@pytest.mark.parametrize(
    'batch, sampler, size',
    [
        (1, None, (1600, 2666)),
        (2, None, (2666, 2666)),
        (2, 'mmdet.AspectRatioBatchSampler', (1600, 2666)),
    ],
)
def test_the_largest_batch_of_a_pipeline(batch, sampler, size):
    """Landscape and portrait in one batch are padded to a square."""
    resize = dict(type='RandomResize', scale=(1333, 800), keep_ratio=True)
    given = config(dict(resize, ratio_range=(0.5, 2.0)))
    given.train_dataloader.batch_sampler = sampler and dict(type=sampler)
    assert largest_size(given, batch) == size
    given.train_dataloader.dataset.pipeline.append(CROP)
    assert largest_size(given, batch) == (512, 1024)


def test_wrapped_data_sets():
    inner = config(RESIZE).train_dataloader.dataset
    wrapped = dict(
        type='RepeatDataset',
        dataset=dict(type='ConcatDataset', datasets=[inner, dict()]),
    )
    given = config()
    given.train_dataloader.dataset = wrapped
    assert image_size(given) == (800, 1333)
    # A pipeline of its own comes after that of the data set inside.
    mixed = dict(type='MultiImageMixDataset', dataset=wrapped)
    given.train_dataloader.dataset = dict(mixed, pipeline=[dict(type='Flip')])
    assert image_size(given) == (800, 1333)
    given.train_dataloader.dataset = dict(mixed, pipeline=[CROP])
    assert image_size(given) == (512, 1024)


def test_the_preprocessor_where_the_pipeline_fixes_no_size():
    padding = dict(type='BatchFixedSizePad', size=(96, 128))
    for preprocessor in (
        dict(size=(96, 128)),
        dict(batch_augments=[dict(type='Other'), padding]),
    ):
        model = dict(data_preprocessor=preprocessor)
        assert image_size(config(model=model)) == (96, 128)
        assert image_size(config(RESIZE, model=model)) == (800, 1333)
    with pytest.raises(ConfigError, match='but found none. Pass it with --s'):
        image_size(config(dict(type='Resize', scale=(0.5, 0.5))))


def test_another_size_is_not_padded_to_that_of_the_config():
    preprocessor = dict(
        size=(512, 512), batch_augments=[dict(type='Pad', size=(96, 128))]
    )
    given = config(model=dict(data_preprocessor=preprocessor))
    set_image_size(given, (32, 64))
    assert given.model.data_preprocessor.to_dict() == dict(
        size=(32, 64), batch_augments=[dict(type='Pad', size=(32, 64))]
    )
    given = config(model=dict(data_preprocessor=dict(size=None)))
    set_image_size(given, (32, 64))
    assert given.model.data_preprocessor.size is None
    set_image_size(config(), (32, 64))


def test_the_batch_is_the_configs():
    assert batch_size(config()) == 3
    with pytest.raises(ConfigError, match='Pass it with --batch'):
        batch_size(Config(dict(model={})))


class Heads(nn.Module):
    """Heads with numbers of classes, some of one alone."""

    def __init__(self, *numbers):
        super().__init__()
        self.heads = nn.ModuleList(nn.Identity() for _ in numbers)
        for head, number in zip(self.heads, numbers, strict=True):
            head.num_classes = number


class Detector(Heads):
    __module__ = 'mmdet.models'


class Segmentor(Heads):
    __module__ = 'mmseg.models'


def generated(*pipeline, model=None, objects=50):
    model = model or Detector(1, 80)
    return generate_batch(config(*pipeline), model, 2, (64, 96), objects)


def test_labels_are_classes_that_all_heads_know():
    def labels(model):
        samples = generated(model=model, objects=500)['data_samples']
        return torch.cat([s.gt_instances.labels for s in samples])

    # Of semantic maps; class-agnostic; a panoptic head counts what it has.
    assert set(labels(Detector(1, 7, 9)).tolist()) == set(range(7))
    assert labels(Detector(1, 1)).eq(0).all()
    panoptic = Detector(9)
    panoptic.heads[0].num_things_classes = 3
    assert set(labels(panoptic).tolist()) == set(range(3))


def test_boxes_lie_inside_the_images():
    batch = generated()
    assert [p.shape for p in batch['inputs']] == [(3, 64, 96)] * 2
    assert batch['inputs'][0].dtype == torch.uint8
    first, second = (s.gt_instances for s in batch['data_samples'])
    boxes = first.bboxes.tensor
    assert boxes.shape == (50, 4)
    assert (boxes[:, :2] < boxes[:, 2:]).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([96, 64, 96, 64])).all()
    assert not torch.equal(boxes, second.bboxes.tensor)


def test_annotations_are_those_that_the_pipeline_loads():
    sample = generated()['data_samples'][0]
    assert 'masks' not in sample.gt_instances and 'gt_sem_seg' not in sample
    load = dict(type='LoadAnnotations', with_mask=True)
    sample = generated(load)['data_samples'][0]
    masks = sample.gt_instances.masks
    assert (masks.height, masks.width, len(masks)) == (64, 96, 50)
    x1, y1, x2, y2 = sample.gt_instances.bboxes.tensor[0].int().tolist()
    assert masks.masks[0].sum() == (x2 - x1) * (y2 - y1)
    assert 'gt_sem_seg' not in sample
    panoptic = dict(type='mmdet.LoadPanopticAnnotations')
    sample = generated(panoptic)['data_samples'][0]
    assert 'masks' in sample.gt_instances
    assert sample.gt_sem_seg.sem_seg.shape == (1, 64, 96)


def test_maps_for_segmentation():
    sample = generated(model=Segmentor(5, 5))['data_samples'][0]
    assert set(sample.gt_sem_seg.data.unique().tolist()) == set(range(5))
    assert 'gt_edge_map' not in sample
    edges = dict(type='GenerateEdge', edge_width=4)
    sample = generated(edges, model=Segmentor(5))['data_samples'][0]
    assert set(sample.gt_edge_map.data.unique().tolist()) == {0, 1}


def test_a_tracker_gets_the_same_objects_in_all_frames_of_a_video():
    tracker = Detector(7)
    tracker.track_head = nn.Identity()
    tracker.track_head.num_frames = 2
    load = dict(type='LoadTrackAnnotations', with_mask=True)
    broadcast = dict(type='TransformBroadcaster', transforms=[load])
    batch = generated(broadcast, model=tracker)
    assert [p.shape for p in batch['inputs']] == [(2, 3, 64, 96)] * 2
    for video in batch['data_samples']:
        first, second = (frame.gt_instances for frame in video)
        assert first.instances_ids.tolist() == list(range(50))
        assert torch.equal(first.instances_ids, second.instances_ids)
        assert torch.equal(first.labels, second.labels)
        assert len(first.masks) == len(second.masks) == 50
        assert not torch.equal(first.bboxes.tensor, second.bboxes.tensor)


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match='segmentor .* got torch.*Identity'):
        generated(model=nn.Identity())
