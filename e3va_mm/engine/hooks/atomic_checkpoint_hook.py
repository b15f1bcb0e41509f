from collections import deque
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ...checkpoint.adapter_file import write_whole
from ...checkpoint.atomic_local_backend import ATOMIC, remove_parts
from ...registry import HOOKS


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe from a kill at any moment.

    mmengine's own removes an old checkpoint before it writes the new one, and
    writes in place: a kill meanwhile leaves a part of a file, with
    ``max_keep_ckpts=1`` no checkpoint at all, and now and then an empty
    ``last_checkpoint``. Here every file is whole or not there, old ones go
    once the new one is whole and ``last_checkpoint`` names it.

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

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # as deepspeed writes them
            self.file_backend.rmtree(path)
