"""Generated input for a training step, of the size that a config has."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from string import ascii_lowercase

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.configs import class_name

Size = tuple[int, int]  # height, width
# Classes for a model that reads their names.
NAMES = tuple(ascii_lowercase)


def image_size(config: Config) -> Size:
    """Height and width in pixels of the images of the training pipeline.

    The largest scale, where it chooses one. Images that keep their ratio are
    assumed to be landscape and to fill the scale.

    Raises:
        ConfigError: If neither the pipeline nor the data preprocessor fixes
            a size.
    """
    return _image_size(config)


def largest_size(config: Config, batch: int) -> Size:
    """Height and width of the largest batch that the pipeline can produce.

    As :func:`image_size`, but a ``ratio_range`` enlarges, and landscape and
    portrait images that keep their ratio are padded to a common square unless
    an ``AspectRatioBatchSampler`` keeps them apart.

    Args:
        config (Config): The config.
        batch (int): Images.
    """
    sampler = config.train_dataloader.get('batch_sampler') or {}
    apart = class_name(sampler).endswith('AspectRatioBatchSampler')
    return _image_size(config, True, batch > 1 and not apart)


def _image_size(
    config: Config, enlarged: bool = False, mixed: bool = False
) -> Size:
    sizes = [_size_after(_pipeline(config), enlarged, mixed)]
    sizes += [part.get('size') for part in _preprocessors(config)]
    for size in filter(_is_size, sizes):
        return tuple(size)
    raise ConfigError(
        'Expected one image size in the training pipeline (`scale`, '
        '`scales` or `crop_size`) or in the data preprocessor (`size`), '
        'but found none. Pass it with --size.'
    )


def set_image_size(config: Config, size: Size) -> None:
    """Let the data preprocessor of a config pad to another size."""
    for part in _preprocessors(config):
        if part.get('size') is not None:
            part['size'] = size


def batch_size(config: Config) -> int:
    """Images of one training step on one device.

    Raises:
        ConfigError: If the config does not set it.
    """
    batch = (config.get('train_dataloader') or {}).get('batch_size')
    if not batch:
        raise ConfigError(
            'Expected `train_dataloader.batch_size` in the config, but it is '
            'missing. Pass it with --batch.'
        )
    return batch


def generate_batch(
    config: Config, model: nn.Module, batch: int, size: Size, objects: int
) -> dict:
    """A batch as the data loader of the config would return it.

    Images are noise. Boxes and labels are random, and so are masks, semantic
    maps and edge maps, where the pipeline loads them. Classes are those that
    all heads know; a model that reads their names gets letters. A tracker gets
    as many frames as its head takes.

    Args:
        config (Config): Its pipeline names the annotations.
        model (nn.Module): The detector, segmentor or classifier, built.
        batch (int): Images.
        size (tuple[int, int]): Their height and width in pixels.
        objects (int): Objects in an image, for detection.

    Returns:
        dict: ``inputs`` and ``data_samples`` for ``model.train_step``.

    Raises:
        ConfigError: If the model is of no known framework.
    """
    origins = {cls.__module__.split('.')[0] for cls in type(model).__mro__}
    frames = getattr(getattr(model, 'track_head', None), 'num_frames', 0)
    shape = (3, *size)
    reads, classes = hasattr(model, 'language_model'), _num_classes(model)
    if reads:
        classes = min(classes, len(NAMES))
    common = (size, classes, _annotations(config))
    if frames:
        shape = (frames, *shape)
        sample = partial(_video_sample, *common, objects, frames)
    elif 'mmdet' in origins:
        sample = partial(_detection_sample, *common, objects)
    elif 'mmseg' in origins:
        sample = partial(_segmentation_sample, *common)
    elif 'mmpretrain' in origins:
        sample = partial(_classification_sample, *common)
    else:
        raise ConfigError(
            'Expected the model of the config to be a detector of '
            'MMDetection, a segmentor of MMSegmentation or a classifier of '
            'mmpretrain, but got '
            f'{type(model).__module__}.{type(model).__name__}.'
        )
    samples = [sample() for _ in range(batch)]
    if reads:
        for each in samples:
            each.set_metainfo(dict(text=NAMES[:classes], custom_entities=True))
    images = [
        torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(batch)
    ]
    return dict(inputs=images, data_samples=samples)


def _pipeline(config: Config) -> list[Mapping]:
    """Transforms of the training set and of those it wraps, inside out."""

    def transforms(dataset: Mapping | None) -> list[Mapping]:
        if not dataset:
            return []
        inner = [dataset.get('dataset'), *dataset.get('datasets', ())]
        inner = next(filter(None, inner), None)
        return [*transforms(inner), *(dataset.get('pipeline') or ())]

    return transforms((config.get('train_dataloader') or {}).get('dataset'))


def _preprocessors(config: Config) -> list[Mapping]:
    """The data preprocessor and its batch augmentations."""
    preprocessor = config.model.get('data_preprocessor') or {}
    return [preprocessor, *(preprocessor.get('batch_augments') or ())]


def _size_after(
    transforms: Sequence[Mapping], enlarged: bool, mixed: bool
) -> Size | None:
    """The size after the last transform that fixes one."""
    size = None
    for transform in transforms:
        found = _sizes(transform, enlarged, mixed)
        size = max(found, key=lambda hw: hw[0] * hw[1], default=size)
    return size


def _sizes(transform: Mapping, enlarged: bool, mixed: bool) -> Iterator[Size]:
    """Sizes (height, width) that a transform may return.

    Args:
        transform (Mapping): Its config.
        enlarged (bool): Whether to enlarge by its ``ratio_range``.
        mixed (bool): Whether batches have images of both orientations.
    """
    found = []
    scales = transform.get('scales')
    if scales is None and transform.get('scale') is not None:
        scale = transform['scale']
        single = isinstance(scale, int) or _is_size(scale)
        scales = [scale] if single else scale
    if 'transforms' in transform:
        branches = transform['transforms']
        if branches and isinstance(branches[0], Mapping):
            branches = [branches]
        found = [_size_after(b, enlarged, mixed) for b in branches]
    elif scales is not None:
        # mmcv has scales and pads as (width, height), crops as (height, width)
        ratio = max(transform.get('ratio_range') or [1]) if enlarged else 1
        found = [
            tuple(int(side * ratio) for side in to_2tuple(scale)[::-1])
            for scale in scales
        ]
    elif transform.get('crop_type') == 'absolute_range':
        found = [to_2tuple(max(transform['crop_size']))]
    elif 'crop_size' in transform:
        found = [to_2tuple(transform['crop_size'])]
    elif class_name(transform) == 'Pad':
        found = [to_2tuple(transform.get('size'))[::-1]]
    for size in filter(_is_size, found):
        if transform.get('keep_ratio', False):
            size = 2 * [max(size)] if mixed else sorted(size)
        yield tuple(size)


def _is_size(value) -> bool:
    """Whether a value is two numbers of pixels."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(side, int) and side > 0 for side in value)
    )


def _annotations(config: Config) -> set[str]:
    """What the training pipeline loads: some of masks, maps and edges."""
    found = set()
    transforms = _pipeline(config)
    for transform in transforms:
        name = class_name(transform)
        if name == 'TransformBroadcaster':  # to all frames of a video
            transforms.extend(transform['transforms'])
        panoptic = name == 'LoadPanopticAnnotations'
        if transform.get('with_mask', panoptic):
            found.add('masks')
        if transform.get('with_seg', panoptic):
            found.add('maps')
        if name == 'GenerateEdge':
            found.add('edges')
    return found


def _num_classes(model: nn.Module) -> int:
    """Classes that all heads know; class-agnostic ones count one."""
    found = {
        getattr(module, name, 1)
        for module in model.modules()
        for name in ('num_classes', 'num_things_classes')
    }
    return min((n for n in found if isinstance(n, int) and n > 1), default=1)


def _meta(size: Size) -> dict:
    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), size)
    return dict(shapes, scale_factor=(1.0, 1.0))


def _detection_sample(
    size: Size, num_classes: int, annotations: set[str], objects: int
):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    low = torch.rand(objects, 2) * 0.6
    high = low + 0.1 + torch.rand(objects, 2) * 0.3
    scale = torch.tensor([width, height, width, height])
    boxes = torch.cat([low, high], 1) * scale
    sample = DetDataSample(metainfo=_meta(size))
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(boxes),
        labels=torch.randint(num_classes, (objects,)),
    )
    if 'masks' in annotations:
        masks = torch.zeros(objects, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(
            masks, boxes.int().tolist(), strict=True
        ):
            mask[y1:y2, x1:x2] = 1
        sample.gt_instances.masks = BitmapMasks(masks.numpy(), height, width)
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()
    )
    if 'maps' in annotations:
        sample.gt_sem_seg = PixelData(sem_seg=_semantic_map(size, num_classes))
    return sample


def _video_sample(*args):
    from mmdet.structures import TrackDataSample

    *args, objects, frames = args
    sample = TrackDataSample()
    sample.video_data_samples = [
        _detection_sample(*args, objects) for _ in range(frames)
    ]
    for frame in sample:
        # The same objects, elsewhere.
        frame.gt_instances.instances_ids = torch.arange(objects)
        frame.gt_instances.labels = sample[0].gt_instances.labels
    return sample


def _segmentation_sample(size: Size, num_classes: int, annotations: set[str]):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_meta(size))
    sample.gt_sem_seg = PixelData(data=_semantic_map(size, num_classes))
    if 'edges' in annotations:
        sample.gt_edge_map = PixelData(data=_semantic_map(size, 2))
    return sample


def _classification_sample(size: Size, num_classes: int, _: set[str]):
    from mmpretrain.structures import DataSample

    sample = DataSample(metainfo=_meta(size))
    return sample.set_gt_label(int(torch.randint(num_classes, ())))


def _semantic_map(size: Size, num_classes: int) -> Tensor:
    return torch.randint(num_classes, (1, *size))
