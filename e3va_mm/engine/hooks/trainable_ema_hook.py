import logging
from collections.abc import Iterator

from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from e3va_mm.registry import HOOKS
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.utils.wrappers import unwrapped


@HOOKS.register_module()
class TrainableEMAHook(EMAHook):
    """mmengine's EMAHook for the part that trains.

    mmengine's own copies the whole model, swaps all of it for every
    validation, and writes the frozen trunk twice into each checkpoint. Here
    the parameters that train are averaged, with ``update_buffers=True`` the
    buffers outside of frozen trunks as well. Nothing touches a trunk, however
    it is stored.

    It takes the arguments of ``EMAHook``. Checkpoints of either resume with
    this one; those of this one need it.

    Examples:
        >>> custom_hooks = [
        ...     dict(type='e3va_mm.TrainableEMAHook', momentum=0.001)
        ... ]
    """

    _copied_early = False

    def before_run(self, runner: Runner) -> None:
        """Copy the part that is averaged."""
        if self._copied_early:
            self._copied_early = False
            return
        model = unwrapped(runner.model)
        part = _part(model, self.ema_cfg.get('update_buffers', False))
        self.ema_model = MODELS.build(
            self.ema_cfg, default_args=dict(model=part)
        )
        # mmengine goes through both in step.
        self.src_model = _Source(model, part)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume the average; any other checkpoint is averaged already."""
        if not hasattr(self, 'ema_model'):
            # A FlexibleRunner loads before it runs.
            self.before_run(runner)
            self._copied_early = True
        if runner._resume and 'ema_state_dict' in checkpoint:
            super().after_load_checkpoint(runner, checkpoint)
        elif runner._resume:
            print_log(
                'TrainableEMAHook: the checkpoint holds no average; it starts '
                'from the weights.',
                'current',
                logging.WARNING,
            )

    def _swap_ema_parameters(self) -> None:
        # Before the first step the copy is of what the model was built with.
        if self.ema_model.steps > 0:
            super()._swap_ema_parameters()


class _Source:
    """The part of a model that is averaged, as the model has it now.

    Looked up by name each time: a module may replace its tensors.
    """

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self._model = model
        self._state = list(part.state_dict())
        self._parameters = [name for name, _ in part.named_parameters()]
        self._buffers = [name for name, _ in part.named_buffers()]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._parameters:
            yield name, self._model.get_parameter(name)

    def parameters(self) -> Iterator[Tensor]:
        return (parameter for _, parameter in self.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        return map(self._model.get_buffer, self._buffers)

    def state_dict(self) -> dict[str, Tensor]:
        found = {}
        for name in self._state:
            path, _, key = name.rpartition('.')
            found[name] = getattr(self._model.get_submodule(path), key).data
        return found


def _part(model: nn.Module, with_buffers: bool) -> nn.Module:
    """Modules that hold what is averaged, under the names of the model."""
    root = nn.Module()
    # By all names: what shares memory goes on to share it in the copy.
    for name, value in model.named_parameters(remove_duplicate=False):
        if value.requires_grad:
            holder, key = _holder(root, name)
            holder.register_parameter(key, value)
    if with_buffers:
        trunks = {
            prefix + key
            for prefix, backbone in tuned_backbones(model)
            for key in backbone.trunk_state()
        }
        kept = model.state_dict().keys() - trunks
        for name, value in model.named_buffers(remove_duplicate=False):
            if name in kept:
                holder, key = _holder(root, name)
                holder.register_buffer(key, value)
    return root


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module in which a tensor lies, made where needed, and its key."""
    *path, key = name.split('.')
    for step in path:
        if step not in dict(root.named_children()):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    return root, key
