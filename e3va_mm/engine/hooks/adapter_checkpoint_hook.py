import json
from pathlib import Path
from typing import Any

from mmengine.dist import (
    broadcast_object_list,
    is_main_process,
    master_only,
)
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.atomic_backend import remove_parts
from e3va_mm.registry import HOOKS
from e3va_mm.utils.files import MIB, write_whole
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.utils.wrappers import unwrapped
from e3va_mm.weights.adapters import CHECKPOINT, adapter_of, trunk_records

# Where the message hub, and with it a checkpoint to resume from, keeps them.
_KEPT, _BEST, _SOURCES = (
    f'e3va_mm_adapter_{name}' for name in ('kept', 'best', 'sources')
)
# In the work folder: the best, which may be newer than any checkpoint.
BEST = 'best_score.json'


@HOOKS.register_module()
class AdapterCheckpointHook(Hook):
    """Writes adapter files: all of the model but its frozen trunks.

    They lie in the work folder as ``adapter_epoch_N.safetensors`` or
    ``adapter_iter_N.safetensors``, the best as
    ``adapter_best_METRIC_epoch_N.safetensors``, and are taken wherever a
    checkpoint is, but to resume: the optimizer's state is left to the
    framework's CheckpointHook, which goes on beside.

    A file is there whole or not at all. Older ones, of this run alone, are
    removed once the new one is whole.

    Args:
        interval (int): Epochs or iterations between two files. The last one
            always has its own. Defaults to 1.
        by_epoch (bool): Whether these are epochs. Defaults to True.
        max_keep (int): How many files stay, beside the best. Defaults to 3.
        save_best (str, optional): The metric whose best file stays, or
            ``'auto'`` for the first that evaluation gives. Defaults to none.
        rule (str): ``'greater'`` or ``'less'``: which values of it are
            better. Defaults to ``'greater'``.

    Raises:
        ConfigError: If an option cannot work, or the trunk's weights come
            from nowhere that they can be read from again.
        CheckpointError: If a file cannot be written.

    Examples:
        >>> custom_hooks = [
        ...     dict(
        ...         type='e3va_mm.AdapterCheckpointHook',
        ...         save_best='coco/bbox_mAP')
        ... ]
    """

    # Before the CheckpointHook, which saves what the message hub keeps.
    priority = 'LOW'

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        max_keep: int = 3,
        save_best: str | None = None,
        rule: str = 'greater',
    ) -> None:
        for name, value in dict(interval=interval, max_keep=max_keep).items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f'AdapterCheckpointHook: `{name}` should be a whole '
                    f'number from 1 on, but got {value!r}.'
                )
        if rule not in ('greater', 'less'):
            raise ConfigError(
                "AdapterCheckpointHook: `rule` should be 'greater' or "
                f"'less', but got {rule!r}."
            )
        if save_best is not None and not isinstance(save_best, str):
            raise ConfigError(
                'AdapterCheckpointHook: `save_best` should be the name of '
                f"one metric, or 'auto', but got {save_best!r}."
            )
        self.interval = interval
        self.by_epoch = by_epoch
        self.max_keep = max_keep
        self.save_best = save_best
        self.rule = rule

    def before_train(self, runner: Runner) -> None:
        """Find out what the trunks are, before the first step."""
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ConfigError(
                'AdapterCheckpointHook: the config trains by iterations, so '
                'no epoch ever ends. Set `by_epoch=False`, and `interval` to '
                'the iterations between two files.'
            )
        model = unwrapped(runner.model)
        sources = _recall(runner, _SOURCES, {})
        if runner._load_from and not runner._resume:
            # A whole detector or segmentor has brought the trunk.
            sources = {
                prefix: runner._load_from
                for prefix, backbone in tuned_backbones(model)
                if backbone.trunk_source == CHECKPOINT
            }
        if is_main_process():
            # Of a run that was killed while it wrote.
            remove_parts(Path(runner.work_dir), ['adapter_*.safetensors'])
            self._trunks = trunk_records(model, sources)
            sources = {p: each.source for p, each in self._trunks.items()}
            runner.message_hub.update_info(_SOURCES, sources)
        if self.save_best:
            _read_best(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """Write a file where one is due."""
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval)
            or self.is_last_train_epoch(runner)
        ):
            self._save_newest(runner, f'epoch_{runner.epoch + 1}')

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs) -> None:
        """Write a file where one is due."""
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval)
            or self.is_last_train_iter(runner)
        ):
            self._save_newest(runner, f'iter_{runner.iter + 1}')

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Write a file if a model has never been better."""
        if not self.save_best or not metrics:
            return
        name = self.save_best
        if name == 'auto':
            name = next(iter(metrics))
        if name not in metrics:
            raise ConfigError(
                f'AdapterCheckpointHook: `save_best` is {name!r}, but '
                f'evaluation gives {", ".join(metrics)}.'
            )
        score = float(metrics[name])
        best = _recall(runner, _BEST, None)
        if best and not (
            score < best['score']
            if self.rule == 'less'
            else score > best['score']
        ):
            return
        when = (
            f'epoch_{runner.epoch}' if self.by_epoch else f'iter_{runner.iter}'
        )
        path = self._save(runner, f'best_{name.replace("/", "_")}_{when}')
        new = dict(score=score, path=path, iter=runner.iter)
        runner.message_hub.update_info(_BEST, new)
        _write_best(runner, new)
        if best and best['path'] != path:
            _remove(best['path'])

    def _save_newest(self, runner: Runner, when: str) -> None:
        path = self._save(runner, when)
        kept = [each for each in _recall(runner, _KEPT, []) if each != path]
        kept.append(path)
        for old in kept[: -self.max_keep]:
            _remove(old)
        runner.message_hub.update_info(_KEPT, kept[-self.max_keep :])

    def _save(self, runner: Runner, name: str) -> str:
        model = unwrapped(runner.model)
        # As Runner.save_checkpoint: EMAHook puts in its average here.
        checkpoint = dict(
            meta={}, state_dict=unwrapped(runner.model).state_dict()
        )
        path = Path(runner.work_dir, f'adapter_{name}.safetensors')
        if not is_main_process():
            return str(path)
        runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        adapter = adapter_of(
            model,
            self._trunks,
            checkpoint['state_dict'],
            runner.cfg.pretty_text,
            getattr(runner.train_dataloader.dataset, 'metainfo', None),
        )
        size = adapter.write(path)
        runner.logger.info(f'Adapter file: {path} ({size / MIB:,.1f} MiB)')
        return str(path)


@master_only
def _write_best(runner: Runner, best: dict[str, Any]) -> None:
    write_whole(Path(runner.work_dir, BEST), json.dumps(best).encode())


def _read_best(runner: Runner) -> None:
    """Recall a best that was found after the last checkpoint."""
    path = Path(runner.work_dir, BEST)
    found = [None]
    if is_main_process():
        if not runner._resume:
            path.unlink(missing_ok=True)  # that of another run
        elif path.is_file():
            found = [json.loads(path.read_text())]
    broadcast_object_list(found)
    if found[0] and found[0]['iter'] <= runner.iter:
        runner.message_hub.update_info(_BEST, found[0])


@master_only
def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _recall(runner: Runner, key: str, default: Any) -> Any:
    found = runner.message_hub.runtime_info
    return found.get(key, default)
