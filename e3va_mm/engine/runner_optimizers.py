"""The optimizers of a run."""

from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch.optim import Optimizer


def optimizers_of(runner: Runner) -> list[Optimizer]:
    """All optimizers that step."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return [each.optimizer for each in wrapper.optim_wrappers.values()]
    return [wrapper.optimizer]


def iterations_per_update(runner: Runner) -> int:
    """Iterations whose gradients are accumulated for one update."""
    return getattr(runner.optim_wrapper, '_accumulative_counts', 1)
