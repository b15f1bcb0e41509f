import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from e3va_mm.errors import ConfigError
from e3va_mm.frameworks.atomic_backend import remove_parts
from e3va_mm.registry import HOOKS
from e3va_mm.utils.files import write_whole
from e3va_mm.utils.options import (
    Check,
    Options,
    flag,
    one_of,
    option,
    optional,
    whole,
)
from e3va_mm.utils.sizes import MIB
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.utils.unwrapping import unwrapped
from e3va_mm.weights.adapter_extraction import (
    CHECKPOINT,
    adapter_of,
    trunk_records,
)

# Where the message hub, and with it a checkpoint to resume from, keeps them.
KEPT, SOURCES = 'e3va_mm_adapter_kept', 'e3va_mm_adapter_sources'
# In the work folder: the best, which may be newer than any checkpoint.
BEST = 'best_score.json'


@dataclass(frozen=True, kw_only=True)
class AdapterCheckpointOptions(Options):
    """Options of the hook."""

    PREFIX = 'AdapterCheckpointHook'
    interval: int = option(1, whole())
    by_epoch: bool = option(True, flag)
    max_keep: int = option(3, whole())
    save_best: str | None = option(
        None, optional(Check(lambda v: isinstance(v, str), 'one metric'))
    )
    rule: str = option('greater', one_of('greater', 'less'))


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

    def __init__(self, **options: Any) -> None:
        self.options = AdapterCheckpointOptions.of(options)
        self._trunks: dict[str, Any] | None = None  # not while it trains
        self._best: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Find out what the trunks are, before the first step."""
        by_epoch = self.options.by_epoch
        if by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ConfigError(
                'AdapterCheckpointHook: the config trains by iterations, so '
                'no epoch ever ends. Set `by_epoch=False`, and `interval` to '
                'the iterations between two files.'
            )
        if not is_main_process():
            return
        model, folder = unwrapped(runner.model), Path(runner.work_dir)
        remove_parts(folder, ['adapter_*.safetensors'])  # of a killed run
        sources = runner.message_hub.runtime_info.get(SOURCES, {})
        if runner._load_from and not runner._resume:
            # A whole detector or segmentor has brought the trunk.
            sources = {
                prefix: runner._load_from
                for prefix, backbone in tuned_backbones(model)
                if backbone.trunk_source == CHECKPOINT
            }
        self._trunks = trunk_records(model, sources)
        sources = {p: each.source for p, each in self._trunks.items()}
        runner.message_hub.update_info(SOURCES, sources)
        self._best = None
        note = folder / BEST
        if not runner._resume:
            note.unlink(missing_ok=True)  # that of another run
        elif note.is_file():
            best = json.loads(note.read_text())
            self._best = best if best['iter'] <= runner.iter else None

    def after_train_epoch(self, runner: Runner) -> None:
        """Write a file where one is due."""
        if self.options.by_epoch and (
            self.every_n_epochs(runner, self.options.interval)
            or self.is_last_train_epoch(runner)
        ):
            self._save_newest(runner, f'epoch_{runner.epoch + 1}')

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Write a file where one is due."""
        if not self.options.by_epoch and (
            self.every_n_train_iters(runner, self.options.interval)
            or self.is_last_train_iter(runner)
        ):
            self._save_newest(runner, f'iter_{runner.iter + 1}')

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Write a file if a model has never been better."""
        name = self.options.save_best
        if name is None or not metrics or self._trunks is None:
            return
        if name == 'auto':
            name = next(iter(metrics))
        if name not in metrics:
            raise ConfigError(
                f'AdapterCheckpointHook: `save_best` is {name!r}, but '
                f'evaluation gives {", ".join(metrics)}.'
            )
        score, best = float(metrics[name]), self._best
        sign = 1 if self.options.rule == 'greater' else -1
        if not math.isfinite(score) or (
            best and sign * score <= sign * best['score']
        ):
            return
        when = f'iter_{runner.iter}'
        if self.options.by_epoch:
            when = f'epoch_{runner.epoch}'
        path = self._save(runner, f'best_{name.replace("/", "_")}_{when}')
        self._best = dict(score=score, path=str(path), iter=runner.iter)
        note = Path(runner.work_dir, BEST)
        write_whole(note, json.dumps(self._best).encode())
        # By its name: the note may be that of a run in another folder.
        if best and (old := Path(best['path']).name) != path.name:
            path.with_name(old).unlink(missing_ok=True)

    def _save_newest(self, runner: Runner, when: str) -> None:
        if not is_main_process():
            return
        path = self._save(runner, when)
        # Names: a checkpoint may be that of a run in another folder.
        known = runner.message_hub.runtime_info.get(KEPT, [])
        kept = [Path(each).name for each in known]
        kept = [*(each for each in kept if each != path.name), path.name]
        runner.message_hub.update_info(KEPT, kept[-self.options.max_keep :])
        for old in kept[: -self.options.max_keep]:
            path.with_name(old).unlink(missing_ok=True)

    def _save(self, runner: Runner, name: str) -> Path:
        model = unwrapped(runner.model)
        # As Runner.save_checkpoint: EMAHook puts in its average here.
        checkpoint = dict(meta={}, state_dict=model.state_dict())
        runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        path = Path(runner.work_dir, f'adapter_{name}.safetensors')
        size = adapter_of(
            model,
            self._trunks,
            checkpoint['state_dict'],
            runner.cfg.pretty_text,
            getattr(runner.train_dataloader.dataset, 'metainfo', None),
        ).write(path)
        runner.logger.info(f'Adapter file: {path} ({size / MIB:,.1f} MiB)')
        return path
