import os.path as osp
from collections import deque
from collections.abc import Mapping
from pathlib import Path

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
        local = isinstance(
            get_file_backend(
                self.out_dir or runner.work_dir, backend_args=self.backend_args
            ),
            LocalBackend,
        )
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
            kept = [each for each in self.keep_ckpt_ids if each != step]
            kept.append(step)
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
        if not is_main_process():
            return
        newest = Path(runner.work_dir, 'last_checkpoint')
        write_whole(newest, self.last_ckpt.encode())
        for each in outdated:
            self._remove(
                self.file_backend.join_path(
                    self.out_dir, self.filename_tmpl.format(each)
                )
            )

    def _save_best_checkpoint(
        self, runner: Runner, metrics: Mapping[str, float]
    ) -> None:
        if not self.save_best:
            return
        info = runner.message_hub.runtime_info
        info_before, before = dict(info), self._best()
        # What it does not know, super() cannot remove before it has written.
        self._set_best(dict.fromkeys(before))
        try:
            super()._save_best_checkpoint(runner, metrics)
        except BaseException:
            self._set_best(before)
            info.clear()
            info.update(info_before)
            raise
        written = self._best()
        self._set_best({key: written[key] or before[key] for key in before})
        if not is_main_process():
            return
        for key, new in written.items():
            old = before[key]
            if new is None or old is None:
                continue
            # A run resumed from before its best writes the same file again.
            same = osp.realpath(old) == osp.realpath(new)
            # The old path comes from a checkpoint, which may name any folder.
            ours = osp.dirname(osp.realpath(old)) == osp.realpath(self.out_dir)
            if ours and not same:
                self._remove(old)

    def _best(self) -> dict[str, str | None]:
        """Paths of the best checkpoints, by what they are best in."""
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # as deepspeed writes them
            self.file_backend.rmtree(path)
