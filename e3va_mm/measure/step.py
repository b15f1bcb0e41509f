"""One real training step of a config on generated input."""

import time
from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import to_2tuple

from ..errors import ConfigError
from ..utils import count_parameters, mark_trainable
from .live_bytes import LiveBytes
from .variants import variant_config


class TrainingStep:
    """Builds a variant of a config and runs its training step.

    Args:
        config (Config): A detection or segmentation config.
        variant (str): See ``VARIANTS``.
        size (tuple[int, int], optional): Height and width of the pictures in
            pixels. Defaults to that of the training pipeline.
        batch (int, optional): Pictures a step. Defaults to the config's.
        objects (int): Objects in a picture, for detection. Defaults to 5.
        seed (int): Seed of weights and input. Defaults to 0.

    Raises:
        ConfigError: If the variant is unknown or the pipeline has no size.
    """

    def __init__(
        self,
        config: Config,
        variant: str,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        objects: int = 5,
        seed: int = 0,
    ) -> None:
        config = variant_config(config, variant)
        init_default_scope(config.default_scope)
        torch.manual_seed(seed)
        self.model = MODELS.build(config.model)
        self.model.init_weights()
        # Again: backbones draw unequal numbers, pictures must be the same.
        torch.manual_seed(seed)
        self.model.train()
        if variant == 'frozen':
            mark_trainable(self.model.backbone, [])
            self.model.backbone.eval()
        self.optim_wrapper = build_optim_wrapper(
            self.model, config.optim_wrapper.to_dict()
        )
        batch = batch or config.train_dataloader.batch_size
        size = size or _image_size(config)
        make = (
            _detection_data
            if config.default_scope == 'mmdet'
            else _segmentation_data
        )
        self.data = make(batch, size, objects, _num_classes(self.model))

    def run(self) -> float:
        """Run the step once.

        Returns:
            float: Seconds of forward, backward and update together.
        """
        start = time.perf_counter()
        self.model.train_step(self.data, self.optim_wrapper)
        return time.perf_counter() - start

    def memory(self) -> dict[str, int]:
        """Account the memory of a step after the first.

        The first step makes the optimizer state. Gradients are dropped before
        the accounted step, as ``zero_grad`` does at its end.

        Returns:
            dict[str, int]: Bytes: ``weights`` (parameters and buffers),
            ``optimizer`` state, ``gradients``, and the accounted ``peak``,
            the most that was alive at any moment, these included.
        """
        self.run()
        self.optim_wrapper.zero_grad()
        weights = [*self.model.parameters(), *self.model.buffers()]
        state = [
            value
            for entry in self.optim_wrapper.optimizer.state.values()
            for value in entry.values()
            if torch.is_tensor(value)
        ]
        with LiveBytes([*weights, *state]) as count:
            self.run()
        return dict(
            weights=_bytes(weights),
            optimizer=_bytes(state),
            gradients=_bytes(
                p for p in self.model.parameters() if p.requires_grad
            ),
            peak=count.peak,
        )

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters: all and trainable, model and backbone."""
        total, trainable = count_parameters(self.model)
        in_backbone, trainable_in_backbone = count_parameters(
            self.model.backbone
        )
        return dict(
            total=total,
            trainable=trainable,
            backbone=in_backbone,
            trainable_backbone=trainable_in_backbone,
        )


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _image_size(config: Config) -> tuple[int, int]:
    """(height, width) that the training pipeline ends with."""
    dataset = config.train_dataloader.dataset
    while 'pipeline' not in dataset:
        inner = dataset.get('datasets') or [dataset.dataset]
        dataset = inner[0]
    size = None
    for transform in dataset.pipeline:
        if isinstance(transform, Mapping):
            # mmcv states scales as (width, height), crops as (height, width).
            if 'scale' in transform:
                size = to_2tuple(transform['scale'])[::-1]
            elif 'crop_size' in transform:
                size = to_2tuple(transform['crop_size'])
    if size is None or not all(isinstance(side, int) for side in size):
        raise ConfigError(
            'Expected one picture size in the training pipeline (`scale` or '
            f'`crop_size`), but found {size}. Give it with --size.'
        )
    return size


def _num_classes(model: torch.nn.Module) -> int:
    """Classes of the heads; class-agnostic heads count one."""
    return max(getattr(module, 'num_classes', 1) for module in model.modules())


def _images(batch: int, size: tuple[int, int]) -> list[torch.Tensor]:
    return [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        for _ in range(batch)
    ]


def _meta(size: tuple[int, int]) -> dict:
    return dict(
        img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
    )


def _detection_data(
    batch: int, size: tuple[int, int], objects: int, num_classes: int
) -> dict:
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    samples = []
    for _ in range(batch):
        low = torch.rand(objects, 2) * 0.6
        high = low + 0.1 + torch.rand(objects, 2) * 0.3
        scale = torch.tensor([width, height, width, height])
        boxes = torch.cat([low, high], 1) * scale
        masks = torch.zeros(objects, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(
            masks, boxes.int().tolist(), strict=True
        ):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(metainfo=_meta(size))
        sample.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(boxes),
            labels=torch.randint(num_classes, (objects,)),
            masks=BitmapMasks(masks.numpy(), height, width),
        )
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()
        )
        samples.append(sample)
    return dict(inputs=_images(batch, size), data_samples=samples)


def _segmentation_data(
    batch: int, size: tuple[int, int], objects: int, num_classes: int
) -> dict:
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(batch):
        sample = SegDataSample(metainfo=_meta(size))
        sample.gt_sem_seg = PixelData(
            data=torch.randint(num_classes, (1, *size))
        )
        samples.append(sample)
    return dict(inputs=_images(batch, size), data_samples=samples)
