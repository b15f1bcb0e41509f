from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from mmengine.model import BaseModel, ModuleDict
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.errors import ConfigError
from e3va_mm.multi_task.data_preprocessor import MultiTaskDataPreprocessor
from e3va_mm.multi_task.task_configs import task_configs
from e3va_mm.registry import MODELS
from e3va_mm.utils import is_number
from e3va_mm.utils.tuned import side_path_backbones


@MODELS.register_module()
class MultiTaskModel(BaseModel):
    """Several models on one frozen trunk that train together.

    Each is the model of a config of its own, with its side path, neck and
    heads; the trunk is there once. The images of all tasks that are of one
    size go through it in one pass, equal images once. What trains depends
    on no other task: the gradients are those of training apart.

    ``tools/adapter.py task`` takes the adapter file of one task out of one of
    all, for that task's own config.

    Args:
        tasks (Mapping[str, str | Mapping]): Configs of detectors, segmentors
            or classifiers, or their paths, by the name of the task.
        weights (Mapping[str, float], optional): What the losses of a task are
            multiplied by. Defaults to 1 for each.

    Raises:
        ConfigError: If a task or a weight is none, or the trunks differ.

    Examples:
        >>> tasks = dict(boxes='cascade.py', parts='upernet.py')
        >>> model = dict(type='e3va_mm.MultiTaskModel', tasks=tasks)
        >>> train_dataloader = dict(
        ...     batch_size=2,
        ...     num_workers=2,
        ...     sampler=dict(type='DefaultSampler', shuffle=True),
        ...     dataset=dict(type='e3va_mm.MultiTaskDataset', tasks=tasks))
    """

    def __init__(
        self,
        tasks: Mapping[str, str | Mapping],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        configs = task_configs(tasks)
        weights = dict(weights or {})
        for name, weight in weights.items():
            if name not in configs or not is_number(weight) or weight <= 0:
                raise ConfigError(
                    f'`weights` should have a number above 0 for some of '
                    f'{tuple(configs)}, but got {name}={weight!r}.'
                )
        models, self._scopes = {}, {}
        for name, config in configs.items():
            self._scopes[name] = config.default_scope
            if config.get('data_preprocessor') is not None:
                config.model.setdefault(
                    'data_preprocessor', config.data_preprocessor
                )
            with DefaultScope.overwrite_default_scope(config.default_scope):
                models[name] = MODELS.build(config.model)
        preprocessors = {n: m.data_preprocessor for n, m in models.items()}
        super().__init__(MultiTaskDataPreprocessor(preprocessors))
        self.tasks = ModuleDict(models)
        self._weights = {name: weights.get(name, 1.0) for name in models}
        self._backbones = _share_trunk(models)

    def forward(
        self, batches: Mapping[str, dict], mode: str = 'tensor'
    ) -> dict:
        """Run all tasks on their batches.

        Args:
            batches (Mapping[str, dict]): Of each task ``inputs``
                (B, 3, H, W) and ``data_samples``.
            mode (str): That of the models.

        Returns:
            dict: For ``'loss'`` all losses as ``TASK.NAME``, else what each
            model gives by the name of the task.
        """
        outputs = self._outputs(
            {name: batch['inputs'] for name, batch in batches.items()}
        )
        found = {}
        for name, batch in batches.items():
            with (
                DefaultScope.overwrite_default_scope(self._scopes[name]),
                self._backbones[name].given(batch['inputs'], outputs[name]),
            ):
                found[name] = self.tasks[name](**batch, mode=mode)
        if mode != 'loss':
            return found
        return {
            f'{name}.{key}': _scaled(key, value, self._weights[name])
            for name, losses in found.items()
            for key, value in losses.items()
        }

    def _outputs(
        self, images: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, ...]]:
        """What the backbones give, in as few passes as there are sizes."""
        sizes = defaultdict(dict)
        for name, image in images.items():
            sizes[image.shape[1:]][name] = image
        found = {}
        for group in sizes.values():
            image, rows = _batch([*group.values()])
            backbones = [self._backbones[name] for name in group]
            outputs = run_trunk(backbones, image, rows)
            found |= zip(group, outputs, strict=True)
        return found


def _batch(images: Sequence[Tensor]) -> tuple[Tensor, list[slice] | None]:
    """One batch of several, equal ones once, and where each is in it."""
    different: list[Tensor] = []
    places = []
    for image in images:
        equal = [torch.equal(image, other) for other in different]
        if not any(equal):
            different.append(image)
        places.append(equal.index(True) if any(equal) else len(equal))
    if len(different) == 1:
        return different[0], None
    ends = accumulate(map(len, different), initial=0)
    rows = [slice(*pair) for pair in pairwise(ends)]
    return torch.cat(different), [rows[place] for place in places]


def _share_trunk(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Backbones by task, all on the trunk of the first."""
    found = {}
    for name, model in models.items():
        own = [backbone for _, backbone in side_path_backbones(model)]
        if len(own) != 1:
            raise ConfigError(
                f'`tasks.{name}` should have one backbone with a side path, '
                f'but has {len(own)}. Set `model.backbone.type='
                "'e3va_mm.E3VASwinTransformer'` in it."
            )
        found[name] = own[0]
    (first, trunk), *others = found.items()
    for name, backbone in others:
        sources = trunk.init_cfg, backbone.init_cfg
        if sources[0] != sources[1]:
            raise ConfigError(
                'Tasks that train together should take the same weights of '
                f'the trunk, but `init_cfg` of `tasks.{first}` is '
                f'{sources[0]} and that of `tasks.{name}` {sources[1]}.'
            )
        rates = [b.trunk.options.drop_path for b in (trunk, backbone)]
        if rates[0] != rates[1]:
            raise ConfigError(
                'Tasks that train together should have the same '
                f'`tuner.trunk_drop_path`, but that of `tasks.{first}` is '
                f'{rates[0]} and that of `tasks.{name}` {rates[1]}.'
            )
    for name, backbone in others:
        try:
            backbone.share_trunk(trunk)
        except ConfigError as error:
            raise ConfigError(
                f'`tasks.{first}` and `tasks.{name}`: {error}'
            ) from error
    return found


def _scaled(
    key: str, value: Tensor | list[Tensor], weight: float
) -> Tensor | list[Tensor]:
    """A loss times its weight; other log values as they are."""
    if weight == 1 or 'loss' not in key:  # as mmengine tells losses
        return value
    if isinstance(value, list):
        return [each * weight for each in value]
    return value * weight
