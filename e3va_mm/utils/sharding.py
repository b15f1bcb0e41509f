"""Models whose weights are spread over processes."""

from mmengine.dist import is_main_process
from torch import Tensor, nn

from .wrappers import unwrapped

# Set on a parameter that is about to be sharded.
_SIZE = 'e3va_mm_size'


def note_size(parameter: nn.Parameter) -> None:
    """Let a parameter know how large it is, before it is sharded."""
    setattr(parameter, _SIZE, parameter.numel())


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this process holds but a part of a parameter."""
    return hasattr(parameter, _SIZE)


def size_of(parameter: nn.Parameter) -> int:
    """Number of values of a parameter, over all processes."""
    return getattr(parameter, _SIZE, parameter.numel())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model inside a wrapper, on the main process.

    Every process has to call it: of a sharded model each brings its part.

    Args:
        model (nn.Module): The model as runners hold it.

    Returns:
        dict[str, Tensor]: Empty on all processes but the main one.
    """
    inner = unwrapped(model)
    sharded = any(is_sharded(value) for value in inner.parameters())
    if sharded:
        # Their wrapper knows how, and gives the names of the inner model.
        inner = model
    elif not is_main_process():
        return {}
    state = inner.state_dict()
    return state if is_main_process() else {}
