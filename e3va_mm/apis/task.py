"""A model with a side path, as one of several tasks on a trunk."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from e3va_mm.apis.stock_values import stock_values
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.frameworks.loaders import whole_checkpoint
from e3va_mm.registry import install
from e3va_mm.utils.configs import class_name
from e3va_mm.utils.swapping import swapped
from e3va_mm.utils.tuned import side_path_backbones

INFERENCERS = dict(
    mmdet='DetInferencer',
    mmseg='MMSegInferencer',
    mmpretrain='ImageClassificationInferencer',
)
VISUALIZERS = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer')


class Task:
    """A stock model with a side path, and the framework's way to use it.

    The framework's own inferencer brings the model, its test pipeline and
    its visualizer.

    Args:
        name: Name of the task.
        config: That of the model, or its path.
        checkpoint: Path or URL of an adapter file or a checkpoint.
        device: Where the model computes.

    Attributes:
        model (nn.Module): The model.
        backbone (TunedBackbone): Its backbone.
        reads (bool): Whether it finds what a text says (Grounding DINO).
        steps (list[Callable]): Its test pipeline, from a path or a BGR
            image (H, W, 3) to a packed sample.
    """

    def __init__(
        self, name: str, config: str | Config, checkpoint: str, device: str
    ) -> None:
        self.name = name
        config = self._read(config)
        checkpoint = os.fspath(checkpoint)
        local = '://' not in checkpoint
        if local and not Path(checkpoint).expanduser().exists():
            raise CheckpointError(
                f'Task {name!r}: {checkpoint}: no such checkpoint file.'
            )
        install()  # before a checkpoint is read
        apis = import_module(f'{self.scope}.apis')
        with self.in_scope(), whole_checkpoint(checkpoint):
            self._inferencer = getattr(apis, INFERENCERS[self.scope])(
                config, checkpoint, device=device
            )
        self.model: nn.Module = self._inferencer.model
        backbones = [each for _, each in side_path_backbones(self.model)]
        if len(backbones) != 1:
            raise ConfigError(
                f'Task {name!r}: expected a model with one backbone that has '
                f'a side path, but {config.filename} has {len(backbones)}. '
                "Set `model.backbone.type='e3va_mm.E3VASwinTransformer'`, or "
                "use the framework's own inferencer."
            )
        self.backbone = backbones[0]
        self.reads = hasattr(self.model, 'language_model')
        self._load_from = config.get('load_from')
        self._stock: dict[str, Tensor] | None = None
        steps = self._inferencer.pipeline.transforms
        if self.scope == 'mmpretrain':
            # Its inferencer reads images itself, in this way.
            self.steps = [_Load(LoadImageFromFile()), *steps]
        else:
            self.steps = [_Load(steps[0].from_file), *steps[1:]]

    def _read(self, config: str | Config) -> Config:
        """A config that the stock inferencer can use."""
        if not isinstance(config, Config):
            if not Path(config).is_file():
                raise ConfigError(
                    f'Task {self.name!r}: {config}: no such config file.'
                )
            config = Config.fromfile(config)
        self.scope = config.get('default_scope')
        if self.scope not in INFERENCERS:
            raise ConfigError(
                f'Task {self.name!r}: `default_scope` in the config should be '
                f'one of {tuple(INFERENCERS)}, but got {self.scope!r}.'
            )
        loader = config.get('test_dataloader') or {}
        pipeline = (loader.get('dataset') or {}).get('pipeline') or [{}]
        kind = class_name(pipeline[0]) or 'nothing'
        if kind != 'LoadImageFromFile':
            raise ConfigError(
                f'Task {self.name!r}: `test_dataloader.dataset.pipeline` '
                f'should begin with LoadImageFromFile, but begins with {kind}.'
            )
        if config.get('visualizer') is None and self.scope in VISUALIZERS:
            config = config.copy()
            config.visualizer = dict(type=VISUALIZERS[self.scope])
        return config

    @property
    def slides(self) -> bool:
        """Whether the model cuts the image up before its backbone."""
        test_cfg = getattr(self.model, 'test_cfg', None) or {}
        return test_cfg.get('mode') == 'slide'

    def in_scope(self) -> Any:
        """Context in which names are those of the task's framework."""
        return DefaultScope.overwrite_default_scope(self.scope)

    def to_batch(
        self, samples: Sequence[dict], text: str | Sequence[str] | None = None
    ) -> dict:
        """Packed samples -> what the model predicts from, on its device.

        Args:
            samples: What :attr:`steps` gave for images.
            text: What a model that reads finds: names, in a list or separated
                by full stops. Defaults to the classes of its data set.
        """
        if self.reads:
            names = text or self.model.dataset_meta['classes']
            if isinstance(names, str):
                names = [name.strip() for name in names.split('.')]
                names = list(filter(None, names))
            for sample in samples:
                sample['data_samples'].set_metainfo(
                    dict(text=names, custom_entities=True)
                )
        stacks = self.scope == 'mmpretrain'
        batch = (default_collate if stacks else pseudo_collate)(samples)
        with self.in_scope():
            return self.model.data_preprocessor(batch, False)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """The model gives what it gave before it was tuned, bit for bit.

        Raises:
            ConfigError: If the config has no ``load_from``, or that is not
                what the model began with.
        """
        if self._stock is None:
            self._stock = stock_values(
                self.model, self.backbone, self._load_from
            )
        tuner = self.backbone.tuner
        try:
            tuner.enabled = False
            with swapped(self.model, self._stock):
                yield
        finally:
            tuner.enabled = True

    def predict(
        self,
        batch: dict,
        outputs: tuple[Tensor, ...] | None = None,
        tuned: bool = True,
    ) -> list[BaseDataElement]:
        """What the model gives for a batch of :meth:`to_batch`.

        Args:
            batch: The batch.
            outputs: What the backbone gives for it, if that is known.
            tuned: False for what it gave before it was tuned.
        """
        as_it_is = nullcontext() if tuned else self.untuned()
        given = nullcontext()
        if outputs is not None:
            given = self.backbone.given(batch['inputs'], outputs)
        with torch.no_grad(), self.in_scope(), given, as_it_is:
            return self.model(**batch, mode='predict')

    def prediction(self, result: BaseDataElement) -> dict | np.ndarray:
        """A result as the stock inferencer gives it, without tensors.

        Lists and numbers by name; of a segmentor the map of classes (H, W).
        """
        try:
            # A copy, for mmdet writes into a panoptic map.
            found = self._inferencer.postprocess([result.cpu().clone()], None)
        except RuntimeError as error:
            if 'panoptic' in str(error):
                raise ConfigError(f'Task {self.name!r}: {error}') from error
            raise
        if isinstance(found, dict):
            found = found['predictions']
        if isinstance(found, np.ndarray):
            return found
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in found[0].items()
        }

    def write(self, prediction: dict | np.ndarray, path: Path) -> None:
        """Write a :meth:`prediction` to ``path`` and a suffix.

        As JSON; maps of classes as PNG, maps of depths as an array of numpy.
        """
        if isinstance(prediction, dict):
            Path(f'{path}.json').write_text(json.dumps(prediction))
        elif np.issubdtype(prediction.dtype, np.floating):
            np.save(f'{path}.npy', prediction)
        else:
            kind = np.uint8 if prediction.max() < 256 else np.uint16
            PIL.Image.fromarray(prediction.astype(kind)).save(f'{path}.png')

    def draw(
        self, image: np.ndarray, result: BaseDataElement, score_thr: float
    ) -> np.ndarray:
        """Draw a result, without boxes of low scores, on (H, W, 3), RGB."""
        inferencer, result = self._inferencer, result.cpu()
        if self.scope == 'mmpretrain':
            from mmpretrain.visualization import UniversalVisualizer

            return UniversalVisualizer().visualize_cls(
                image, result, classes=inferencer.classes, draw_gt=False
            )
        options = dict(return_vis=True)
        if self.scope == 'mmdet':
            options['pred_score_thr'] = score_thr
        with self.in_scope():
            return inferencer.visualize([image], [result], **options)[0]


class _Load:
    """Reads an image as a task's loader does, or takes one as it is."""

    def __init__(self, loader: LoadImageFromFile) -> None:
        self.loader = loader

    def __call__(self, image: str | np.ndarray) -> dict:
        if isinstance(image, str):
            return self.loader(dict(img_path=image))
        shape = image.shape[:2]
        if self.loader.to_float32:
            image = image.astype(np.float32)
        return dict(img=image, img_path=None, img_shape=shape, ori_shape=shape)
