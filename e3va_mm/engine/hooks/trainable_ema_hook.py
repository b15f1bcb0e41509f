import logging

from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from e3va_mm.registry import HOOKS
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.utils.unwrapping import unwrapped


@HOOKS.register_module()
class TrainableEMAHook(EMAHook):
    """mmengine's EMAHook for the part that trains.

    mmengine's own copies the whole model, swaps all of it for every
    validation, and writes the frozen trunk twice into each checkpoint. Here
    the parameters that train are averaged, with ``update_buffers=True`` the
    buffers outside of frozen trunks as well.

    It takes the arguments of ``EMAHook``. Checkpoints of either resume with
    this one; those of this one need it.

    Examples:
        >>> custom_hooks = [
        ...     dict(type='e3va_mm.TrainableEMAHook', momentum=0.001)
        ... ]
    """

    def before_run(self, runner: Runner) -> None:
        """Copy the part that is averaged."""
        # Holds the tensors of the model itself, under the same names.
        self.src_model = _part(
            unwrapped(runner.model), self.ema_cfg.get('update_buffers', False)
        )
        self.ema_model = MODELS.build(
            self.ema_cfg, default_args=dict(model=self.src_model)
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume the average; any other checkpoint is averaged already."""
        if runner._resume and 'ema_state_dict' in checkpoint:
            super().after_load_checkpoint(runner, checkpoint)
        elif runner._resume:
            print_log(
                'TrainableEMAHook: the checkpoint holds no average; it starts '
                'from the weights.',
                'current',
                level=logging.WARNING,
            )

    def _swap_ema_parameters(self) -> None:
        # Before the first step the copy is of what the model was built with.
        if self.ema_model.steps > 0:
            super()._swap_ema_parameters()


def _part(model: nn.Module, with_buffers: bool) -> nn.Module:
    """Modules that hold what is averaged, under the names of the model."""
    root = nn.Module()

    def holder(name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition('.')
        module = root
        for step in path.split('.') if path else ():
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]
        return module, key

    # By all names: what shares memory goes on to share it in the copy.
    for name, value in model.named_parameters(remove_duplicate=False):
        if value.requires_grad:
            module, key = holder(name)
            module.register_parameter(key, value)
    if with_buffers:
        trunks = {
            prefix + key
            for prefix, backbone in tuned_backbones(model)
            for key in backbone.trunk_state()
        }
        kept = model.state_dict().keys() - trunks
        for name, value in model.named_buffers(remove_duplicate=False):
            if name in kept:
                module, key = holder(name)
                module.register_buffer(key, value)
    return root
