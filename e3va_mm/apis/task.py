"""A model with a side path, as one of several tasks on a trunk."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.infer import BaseInferencer
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from PIL import Image
from torch import Tensor, nn

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.utils.tuned import side_path_backbones


class Task(ABC):
    """A stock model with a side path, and the framework's way to use it.

    The framework's own inferencer brings the model, its test pipeline and
    its visualizer. Made by :meth:`build`.

    Args:
        name (str): Name of the task.
        config (Config): That of the model.
        checkpoint (str): Path or URL of an adapter file or a checkpoint.
        device (str): Where the model computes.

    Attributes:
        model (nn.Module): The model.
        backbone (SidePathBackbone): Its backbone.
        steps (list[Callable]): Its test pipeline, from a path or a BGR
            picture (H, W, 3) to a packed sample.

    Raises:
        ConfigError: If the model has no side path, or the config no loader
            of pictures.
        CheckpointError: If the file does not fit.
    """

    scope: str
    visualizer: str | None = None  # that the stock inferencer needs
    collate: Callable = staticmethod(pseudo_collate)

    def __init__(
        self, name: str, config: Config, checkpoint: str, device: str
    ) -> None:
        self.name = name
        self._check(config)
        with self.in_scope():
            self._inferencer = self._load(config, checkpoint, device)
        self.model: nn.Module = self._inferencer.model
        found = [backbone for _, backbone in side_path_backbones(self.model)]
        if len(found) != 1:
            raise ConfigError(
                f'Task {name!r}: expected a model with one backbone that has '
                f'a side path, but {config.filename} has {len(found)}. Set '
                "`model.backbone.type='e3va_mm.E3VASwinTransformer'`, or use "
                "the framework's own inferencer."
            )
        self.backbone = found[0]
        self.steps = self._steps()

    @staticmethod
    def build(
        name: str, config: str | Config, checkpoint: str, device: str
    ) -> 'Task':
        """The task of the framework that a config is written for.

        Args:
            name (str): Name of the task.
            config (str | Config): The config, or its path.
            checkpoint (str): Path or URL of an adapter file or a checkpoint.
            device (str): Where the model computes.

        Raises:
            ConfigError: If there is no such config, or it is of no framework.
            CheckpointError: If there is no such file, or it does not fit.
        """
        if not isinstance(config, Config):
            if not Path(config).is_file():
                raise ConfigError(
                    f'Task {name!r}: {config}: no such config file.'
                )
            config = Config.fromfile(config)
        if '://' not in checkpoint and not Path(checkpoint).is_file():
            raise CheckpointError(
                f'Task {name!r}: {checkpoint}: no such checkpoint file.'
            )
        scope = config.get('default_scope')
        kinds = {kind.scope: kind for kind in Task.__subclasses__()}
        if scope not in kinds:
            raise ConfigError(
                f'Task {name!r}: `default_scope` in the config should be one '
                f'of {tuple(kinds)}, but got {scope!r}.'
            )
        return kinds[scope](name, config, checkpoint, device)

    @abstractmethod
    def _load(
        self, config: Config, checkpoint: str, device: str
    ) -> BaseInferencer:
        """The stock inferencer with its model."""

    def _check(self, config: Config) -> None:
        """Refuse a config that the stock inferencer cannot use."""
        loader = config.get('test_dataloader') or {}
        pipeline = (loader.get('dataset') or {}).get('pipeline') or [{}]
        kind = pipeline[0].get('type', 'nothing')
        kind = kind if isinstance(kind, str) else kind.__name__
        if kind.split('.')[-1] != 'LoadImageFromFile':
            raise ConfigError(
                f'Task {self.name!r}: `test_dataloader.dataset.pipeline` '
                f'should begin with LoadImageFromFile, but begins with {kind}.'
            )
        if self.visualizer and config.get('visualizer') is None:
            raise ConfigError(
                f'Task {self.name!r}: the config should have a `visualizer`: '
                f"visualizer=dict(type='{self.visualizer}', "
                "name='visualizer')."
            )

    def _steps(self) -> list[Callable]:
        first, *rest = self._inferencer.pipeline.transforms
        return [_Load(first.from_file), *rest]

    @property
    def slides(self) -> bool:
        """Whether the model cuts the picture up before its backbone."""
        test_cfg = getattr(self.model, 'test_cfg', None) or {}
        return test_cfg.get('mode') == 'slide'

    def in_scope(self) -> Any:
        """Context in which names are those of the task's framework."""
        return DefaultScope.overwrite_default_scope(self.scope)

    def to_batch(self, samples: Sequence[dict]) -> dict:
        """Packed samples -> what the model predicts from, on its device."""
        batch = type(self).collate(samples)
        with self.in_scope():
            return self.model.data_preprocessor(batch, False)

    def predict(
        self, batch: dict, outputs: tuple[Tensor, ...] | None = None
    ) -> list[BaseDataElement]:
        """What the model gives for a batch.

        Args:
            batch (dict): That of :meth:`to_batch`.
            outputs (tuple[Tensor, ...], optional): What the backbone gives for
                ``batch['inputs']``, if that is known already.
        """
        with torch.no_grad(), self.in_scope():
            if outputs is None:
                return self.model(**batch, mode='predict')
            with self.backbone.given(batch['inputs'], outputs):
                return self.model(**batch, mode='predict')

    @abstractmethod
    def plain(self, result: BaseDataElement) -> Any:
        """A result without tensors, as the stock inferencer gives it."""

    @abstractmethod
    def write(self, plain: Any, path: Path) -> None:
        """Write what :meth:`plain` gave to ``path`` and a suffix."""

    @abstractmethod
    def draw(
        self, image: np.ndarray, result: BaseDataElement, score_thr: float
    ) -> np.ndarray:
        """Draw a result.

        Args:
            image (np.ndarray): (H, W, 3), RGB.
            result (BaseDataElement): That of :meth:`predict`.
            score_thr (float): Boxes below are not drawn.

        Returns:
            np.ndarray: (H, W, 3), RGB.
        """


class DetectionTask(Task):
    """A detector of mmdet."""

    scope = 'mmdet'
    visualizer = 'DetLocalVisualizer'

    def _load(
        self, config: Config, checkpoint: str, device: str
    ) -> BaseInferencer:
        from mmdet.apis import DetInferencer

        return DetInferencer(config, checkpoint, device, show_progress=False)

    def plain(self, result: BaseDataElement) -> dict:
        """Lists: ``bboxes``, ``labels``, ``scores``, perhaps ``masks``.

        Of panoptic models also ``panoptic_seg``.

        Raises:
            ConfigError: If panopticapi is needed and not installed.
        """
        try:
            # It writes into a panoptic map.
            found = self._inferencer.postprocess([result.clone()], None)
        except RuntimeError as error:
            if 'panoptic_seg' in str(error) or 'panopticapi' in str(error):
                raise ConfigError(f'Task {self.name!r}: {error}') from error
            raise
        plain = found['predictions'][0]
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in plain.items()
        }

    def write(self, plain: dict, path: Path) -> None:
        """As JSON."""
        _write_json(plain, path)

    def draw(
        self, image: np.ndarray, result: BaseDataElement, score_thr: float
    ) -> np.ndarray:
        """See :class:`Task`."""
        with self.in_scope():
            return self._inferencer.visualize(
                [image],
                [result.cpu()],
                return_vis=True,
                pred_score_thr=score_thr,
            )[0]


class SegmentationTask(Task):
    """A segmentor of mmsegmentation."""

    scope = 'mmseg'
    visualizer = 'SegLocalVisualizer'

    def _load(
        self, config: Config, checkpoint: str, device: str
    ) -> BaseInferencer:
        from mmseg.apis import MMSegInferencer

        return MMSegInferencer(
            config, checkpoint, device=device, show_progress=False
        )

    def plain(self, result: BaseDataElement) -> np.ndarray:
        """The map of classes (H, W)."""
        return self._inferencer.postprocess([result.cpu()], None)[
            'predictions'
        ]

    def write(self, plain: np.ndarray, path: Path) -> None:
        """As a PNG whose values are the classes; depths as an array."""
        if np.issubdtype(plain.dtype, np.floating):
            np.save(f'{path}.npy', plain)
        else:
            kind = np.uint8 if plain.max() < 256 else np.uint16
            Image.fromarray(plain.astype(kind)).save(f'{path}.png')

    def draw(
        self, image: np.ndarray, result: BaseDataElement, score_thr: float
    ) -> np.ndarray:
        """See :class:`Task`."""
        with self.in_scope():
            return self._inferencer.visualize(
                [image], [result.cpu()], return_vis=True
            )[0]


class ClassificationTask(Task):
    """A classifier of mmpretrain."""

    scope = 'mmpretrain'
    collate = staticmethod(default_collate)

    def _load(
        self, config: Config, checkpoint: str, device: str
    ) -> BaseInferencer:
        from mmpretrain.apis import ImageClassificationInferencer

        return ImageClassificationInferencer(
            config, pretrained=checkpoint, device=device
        )

    def _steps(self) -> list[Callable]:
        # The stock inferencer reads pictures itself, in this way.
        loader = _Load(LoadImageFromFile())
        return [loader, *self._inferencer.pipeline.transforms]

    def plain(self, result: BaseDataElement) -> dict:
        """``pred_scores``, ``pred_label``, ``pred_score``, ``pred_class``."""
        (plain,) = self._inferencer.postprocess([result], None)
        return {**plain, 'pred_scores': plain['pred_scores'].tolist()}

    def write(self, plain: dict, path: Path) -> None:
        """As JSON."""
        _write_json(plain, path)

    def draw(
        self, image: np.ndarray, result: BaseDataElement, score_thr: float
    ) -> np.ndarray:
        """See :class:`Task`."""
        from mmpretrain.visualization import UniversalVisualizer

        return UniversalVisualizer().visualize_cls(
            image,
            result.cpu(),
            classes=self._inferencer.classes,
            draw_gt=False,
        )


class _Load:
    """Reads a picture as a task's loader does, or takes one as it is."""

    def __init__(self, loader: LoadImageFromFile) -> None:
        self.loader = loader

    def __call__(self, picture: str | np.ndarray) -> dict:
        if isinstance(picture, str):
            return self.loader(dict(img_path=picture))
        shape = picture.shape[:2]
        if self.loader.to_float32:
            picture = picture.astype(np.float32)
        return dict(
            img=picture, img_path=None, img_shape=shape, ori_shape=shape
        )


def _write_json(plain: Mapping, path: Path) -> None:
    Path(f'{path}.json').write_text(json.dumps(plain))
