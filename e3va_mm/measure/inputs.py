"""Generated input for a training step, of the size that a config has."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from e3va_mm.errors import ConfigError

Size = tuple[int, int]  # height, width


def image_size(config: Config) -> Size:
    """Height and width of the pictures that the training pipeline ends with.

    Of a choice the largest. Pictures that keep their ratio are taken to lie
    across and to fill the scale.

    Args:
        config (Config): A detection or segmentation config.

    Returns:
        tuple[int, int]: Height and width in pixels.

    Raises:
        ConfigError: If neither the pipeline nor the data preprocessor fixes
            a size.
    """
    dataset = (config.get('train_dataloader') or {}).get('dataset')
    size = _pipeline_size(_pipeline(dataset))
    if size is None:
        size = _preprocessor_size(config.model.get('data_preprocessor') or {})
    if size is None:
        raise ConfigError(
            'Expected one picture size in the training pipeline (`scale`, '
            '`scales` or `crop_size`) or in the data preprocessor (`size`), '
            'but found none. Give it with --size.'
        )
    return size


def set_image_size(config: Config, size: Size) -> None:
    """Let the data preprocessor pad to another size than the config's.

    Args:
        config (Config): Changed in place.
        size (tuple[int, int]): Height and width in pixels.
    """
    preprocessor = config.model.get('data_preprocessor') or {}
    for part in (preprocessor, *(preprocessor.get('batch_augments') or ())):
        if part.get('size') is not None:
            part['size'] = size


def batch_size(config: Config) -> int:
    """Pictures of one training step on one device.

    Raises:
        ConfigError: If the config does not say.
    """
    batch = (config.get('train_dataloader') or {}).get('batch_size')
    if not batch:
        raise ConfigError(
            'Expected `train_dataloader.batch_size` in the config, but it is '
            'missing. Give it with --batch.'
        )
    return batch


def generate_batch(
    config: Config, model: nn.Module, batch: int, size: Size, objects: int
) -> dict:
    """A batch as the data loader of the config would give it.

    Noise for pictures; boxes, labels, and those of masks, semantic maps and
    edge maps that the pipeline loads, at random. Classes are those
    that all heads know. A tracker gets as many frames as its head takes.

    Args:
        config (Config): Says which annotations its pipeline loads.
        model (nn.Module): The detector or segmentor, built.
        batch (int): Pictures.
        size (tuple[int, int]): Their height and width in pixels.
        objects (int): Objects in a picture, for detection.

    Returns:
        dict: ``inputs`` and ``data_samples`` for ``model.train_step``.

    Raises:
        ConfigError: If the model is of neither framework.
    """
    origins = {cls.__module__.split('.')[0] for cls in type(model).__mro__}
    classes = _num_classes(model)
    annotations = _annotations(config)
    shape = (3, *size)
    frames = getattr(getattr(model, 'track_head', None), 'num_frames', 0)
    if frames:
        shape = (frames, *shape)
        samples = [
            _video_sample(frames, size, objects, classes, annotations)
            for _ in range(batch)
        ]
    elif 'mmdet' in origins:
        samples = [
            _detection_sample(size, objects, classes, annotations)
            for _ in range(batch)
        ]
    elif 'mmseg' in origins:
        samples = [
            _segmentation_sample(size, classes, annotations)
            for _ in range(batch)
        ]
    elif 'mmpretrain' in origins:
        samples = [_classification_sample(size, classes) for _ in range(batch)]
    else:
        raise ConfigError(
            'Expected the model of the config to be a detector of '
            'MMDetection, a segmentor of MMSegmentation or a classifier of '
            'mmpretrain, but got '
            f'{type(model).__module__}.{type(model).__name__}.'
        )
    pictures = [
        torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(batch)
    ]
    return dict(inputs=pictures, data_samples=samples)


def _pipeline(dataset: Mapping | None) -> list[Mapping]:
    """Transforms of a data set and of those it wraps, innermost first."""
    if not dataset:
        return []
    inner = dataset.get('dataset') or next(
        iter(dataset.get('datasets', ())), None
    )
    return [*_pipeline(inner), *(dataset.get('pipeline') or ())]


def _pipeline_size(transforms: Sequence[Mapping]) -> Size | None:
    """What the last transform that fixes a size gives."""
    size = None
    for transform in transforms:
        size = max(_sizes(transform), key=_area, default=size)
    return size


def _sizes(transform: Mapping) -> Iterator[Size]:
    """Sizes (height, width) that a transform may give."""
    if 'transforms' in transform:
        branches = transform['transforms']
        if branches and isinstance(branches[0], Mapping):
            branches = [branches]
        found = [_pipeline_size(branch) for branch in branches]
    elif 'scales' in transform:
        found = [_reversed(scale) for scale in transform['scales']]
    elif 'scale' in transform:
        scale = transform['scale']
        several = not isinstance(scale, int) and not _is_size(scale)
        found = map(_reversed, scale if several else [scale])
    elif transform.get('crop_type') == 'absolute_range':
        found = [to_2tuple(max(transform['crop_size']))]
    elif 'crop_size' in transform:
        found = [to_2tuple(transform['crop_size'])]
    elif _name(transform) == 'Pad':
        found = [_reversed(transform.get('size'))]
    else:
        found = []
    for size in found:
        if _is_size(size):
            across = transform.get('keep_ratio', False)
            yield tuple(sorted(size) if across else size)


def _reversed(scale) -> Sequence:
    # mmcv states scales and pads as (width, height), crops as (height, width).
    return to_2tuple(scale)[::-1]


def _is_size(value) -> bool:
    """Whether a value is two numbers of pixels."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(side, int) and side > 0 for side in value)
    )


def _area(size: Size) -> int:
    return size[0] * size[1]


def _preprocessor_size(preprocessor: Mapping) -> Size | None:
    """The size that pictures are padded to as a batch."""
    parts = (preprocessor, *(preprocessor.get('batch_augments') or ()))
    for part in parts:
        if _is_size(part.get('size')):
            return tuple(part['size'])
    return None


def _name(transform: Mapping) -> str:
    kind = transform.get('type', '')
    return kind.__name__ if isinstance(kind, type) else kind.split('.')[-1]


def _annotations(config: Config) -> set[str]:
    """What the training pipeline loads: some of masks, maps and edges."""
    dataset = (config.get('train_dataloader') or {}).get('dataset')
    found = set()
    for transform in _flat(_pipeline(dataset)):
        panoptic = _name(transform) == 'LoadPanopticAnnotations'
        if transform.get('with_mask', panoptic):
            found.add('masks')
        if transform.get('with_seg', panoptic):
            found.add('maps')
        if _name(transform) == 'GenerateEdge':
            found.add('edges')
    return found


def _flat(transforms: Sequence[Mapping]) -> Iterator[Mapping]:
    """Transforms, and those that they apply to all frames of a video."""
    for transform in transforms:
        yield transform
        if _name(transform) == 'TransformBroadcaster':
            yield from _flat(transform['transforms'])


def _num_classes(model: nn.Module) -> int:
    """Classes that all heads know; class-agnostic ones count one."""
    found = {
        getattr(module, name, 1)
        for module in model.modules()
        for name in ('num_classes', 'num_things_classes')
    }
    return min((n for n in found if isinstance(n, int) and n > 1), default=1)


def _meta(size: Size) -> dict:
    return dict(
        img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
    )


def _detection_sample(
    size: Size, objects: int, num_classes: int, annotations: set[str]
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


def _video_sample(frames: int, size: Size, objects: int, *args):
    from mmdet.structures import TrackDataSample

    sample = TrackDataSample()
    sample.video_data_samples = [
        _detection_sample(size, objects, *args) for _ in range(frames)
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


def _classification_sample(size: Size, num_classes: int):
    from mmpretrain.structures import DataSample

    sample = DataSample(metainfo=_meta(size))
    return sample.set_gt_label(int(torch.randint(num_classes, ())))


def _semantic_map(size: Size, num_classes: int) -> Tensor:
    return torch.randint(num_classes, (1, *size))
