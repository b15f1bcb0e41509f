import os.path as osp
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from e3va_mm.frameworks.atomic_backend import ATOMIC, remove_parts
from e3va_mm.registry import HOOKS
from e3va_mm.utils.files import write_whole


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe from a kill at any moment.

    mmengine's own removes an old checkpoint before it writes the new one, and
    writes in place: a kill meanwhile leaves a part of a file, with
    ``max_keep_ckpts=1`` no checkpoint at all, no best one, and now and then
    an empty ``last_checkpoint``. Here every file is whole or not there, old
    ones go once the new one is whole and ``last_checkpoint`` names it. The
    best one of another folder, that of a run resumed elsewhere, stays.

    It takes the arguments of ``CheckpointHook``. With another file backend
    than local disks the order holds; how files appear is the backend's part.

    Raises:
        CheckpointError: If a file cannot be written.

    Examples:
        >>> default_hooks = dict(
        ...     checkpoint=dict(
        ...         type='e3va_mm.AtomicCheckpointHook', max_keep_ckpts=1))
    """

    def before_train(self, runner: Runner) -> None:
        """Choose the backend, and clear what a killed run has left."""
        folder = self.out_dir or runner.work_dir
        backend = get_file_backend(folder, backend_args=self.backend_args)
        local = isinstance(backend, LocalBackend)
        if local and not self.backend_args and not self.file_client_args:
            self.backend_args = dict(backend=ATOMIC)
        super().before_train(runner)
        if is_main_process():
            remove_parts(Path(runner.work_dir), ['last_checkpoint'])
            if local:
                remove_parts(Path(self.out_dir), ['*.pth'])

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [*(k for k in self.keep_ckpt_ids if k != step), step]
            outdated = kept[: -self.max_keep_ckpts]
            # With the outdated: killed before they are removed, a resumed run
            # still knows of them.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            newest = Path(runner.work_dir, 'last_checkpoint')
            write_whole(newest, self.last_ckpt.encode())
            for each in outdated:
                name = self.filename_tmpl.format(each)
                path = self.file_backend.join_path(self.out_dir, name)
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)

    def _save_best_checkpoint(
        self, runner: Runner, metrics: Mapping[str, float]
    ) -> None:
        backend = self.file_backend
        later = self.file_backend = _LaterRemoval(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        # A run resumed from before its best writes the same file again.
        info = runner.message_hub.runtime_info
        best = [v for k, v in info.items() if k.startswith('best_ckpt') and v]
        written = {*map(osp.realpath, best)}
        for path in later.paths:
            real = osp.realpath(path)
            # The old path comes from a checkpoint, which may name any folder.
            ours = osp.dirname(real) == osp.realpath(self.out_dir)
            if ours and real not in written:
                backend.remove(path)


class _LaterRemoval:
    """A file backend that only notes what it is to remove."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.paths: list[str] = []

    def remove(self, path: str) -> None:
        self.paths.append(path)

    def rmtree(self, path: str) -> None:
        """Nothing: checkpoints are files."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)
