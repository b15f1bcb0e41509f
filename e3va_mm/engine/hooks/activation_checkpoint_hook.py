from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner

from e3va_mm.engine.activation_checkpointing import checkpoint_modules
from e3va_mm.registry import HOOKS
from e3va_mm.utils.unwrapping import unwrapped


@HOOKS.register_module()
class ActivationCheckpointHook(Hook):
    """Trades time for memory in neck and heads.

    The chosen modules keep their inputs alone and compute the rest once more
    in the backward pass. A backbone with a side path keeps little and is
    better left out: its frozen trunk would run twice. mmengine's own
    ``activation_checkpointing`` loses the gradients of a neck, whose input is
    a tuple.

    Args:
        modules (Sequence[str]): Paths of the modules in the model, ``*``
            standing for any one part: ``['neck', 'roi_head.mask_head.*']``.

    Raises:
        ConfigError: If a path matches nothing, or a choice cannot work.

    Examples:
        >>> custom_hooks = _base_.custom_hooks + [
        ...     dict(
        ...         type='e3va_mm.ActivationCheckpointHook',
        ...         modules=['neck', 'bbox_head'])
        ... ]
    """

    # Before hooks that count or copy what they find in the model.
    priority = 'HIGH'

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules

    def before_train(self, runner: Runner) -> None:
        """Wrap the modules; nothing is compiled before the first step."""
        model = unwrapped(runner.model)
        self._names = checkpoint_modules(model, self.modules)
        runner.logger.info(f'Activation checkpointing: {self._names}')

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Name the modules, after the first step, that were not called."""
        model = unwrapped(runner.model)
        unused = [
            name
            for name in self._names
            if not model.get_submodule(name).checkpoint_has_run
        ]
        self._names = []
        if unused:
            runner.logger.warning(
                f'Activation checkpointing has no effect on '
                f'{", ".join(unused)}: the first step has not called the '
                f"forward. Choose parts inside, such as '{unused[0]}.*'."
            )
