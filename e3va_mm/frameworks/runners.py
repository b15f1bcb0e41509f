"""Several of mmengine's runners in one process, that train side by side."""

from contextlib import redirect_stdout
from io import TextIOBase
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop


class FollowingLoop(BaseLoop):
    """The training loop of one runner, whose data and counts are another's.

    All that hooks ask a loop for is that of ``common``, but for
    ``stop_training``.

    Args:
        runner (Runner): The runner.
        common (BaseLoop): The loop that counts.
    """

    def __init__(self, runner: Runner, common: BaseLoop) -> None:
        super().__init__(runner, common.dataloader)
        self.common = common
        self.stop_training = False

    # A runner that resumes sets these.
    _epoch = property(
        lambda self: self.common._epoch,
        lambda self, value: setattr(self.common, '_epoch', value),
    )
    _iter = property(
        lambda self: self.common._iter,
        lambda self, value: setattr(self.common, '_iter', value),
    )

    def __getattr__(self, name: str) -> Any:
        if name == 'common':  # while a copy is made
            raise AttributeError(name)
        return getattr(self.common, name)


class _Nowhere(TextIOBase):
    write = len


def quiet_runner(config: Config) -> Runner:
    """Build a runner whose log goes to its file alone."""
    # Its logger takes the standard output of this moment.
    with redirect_stdout(_Nowhere()):
        return Runner.from_cfg(config)


def set_train_loop(runner: Runner, loop: BaseLoop) -> None:
    """Give a runner a loop instead of the one that its config describes."""
    runner._train_loop = loop


def make_current(runner: Runner) -> None:
    """Let "the current" logger, message hub... be those of a runner.

    mmengine takes the newest for the current one.
    """
    for instance in (
        *(runner.default_scope, runner.logger),
        *(runner.message_hub, runner.visualizer),
    ):
        for cls in type(instance).__mro__:
            known = vars(cls).get('_instance_dict', {})
            if instance and instance.instance_name in known:
                known.move_to_end(instance.instance_name)
