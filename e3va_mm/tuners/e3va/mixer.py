"""What E3VA-Mix adds at a stage's end: it reads trunk and highway together.

The adapters of a stage see one token of the frozen trunk each. The mixer sees
their sum, and the tokens around: the two things that a tuned backbone has and
parallel adapters have not.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from e3va_mm.numerics.autocast import autocast_dtype, autocast_off
from e3va_mm.numerics.products import fast_dtype
from e3va_mm.trunks import Size
from e3va_mm.tuners.e3va.kept_taps import ExactTaps, TapCodec
from e3va_mm.tuners.token_grid import GridFilters, on_grid


class StageMixer(nn.Module):
    """``M(s) = up(GELU(filters(down(LN(s)))))``, zero before the first step.

    ``LN`` has no parameters; the filters are depth-wise, over the grid.

    Args:
        channels (int): Channels ``C`` of the stage.
        width (int): Channels between ``down`` and ``up``.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.filters = GridFilters(width)
        self.up = nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, state: Tensor, size: Size) -> Tensor:
        """(B, extra + H * W, C) and (H, W) -> (B, extra + H * W, C)."""
        normed = F.layer_norm(state, state.shape[-1:])
        inner = self.down(normed.to(self.down.weight.dtype))
        return self.up(F.gelu(on_grid(inner, size, self.filters)))


def mix(
    mixer: StageMixer,
    state: Tensor,
    size: Size,
    codec: TapCodec | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """What a mixer adds to a state; it keeps the state alone.

    Args:
        mixer (StageMixer): The mixer.
        state (Tensor): (B, extra + H * W, C), trunk and highway.
        size (tuple[int, int]): (H, W).
        codec (TapCodec, optional): How the state is kept for backward.
            Defaults to as it is.
        compute (torch.dtype, optional): Type of the products. Defaults to
            that of autocast where it is on, else to that of the parameters.

    Returns:
        Tensor: As ``state``.
    """
    if torch.jit.is_tracing():
        with autocast_off(state):
            return mixer(state, size).to(state.dtype)
    compute = (
        compute or autocast_dtype(state) or next(mixer.parameters()).dtype
    )
    compute = fast_dtype(compute, state.device)

    def run(state: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        cast = {name: p.to(compute) for name, p in parameters.items()}
        with autocast_off(state):
            return functional_call(mixer, cast, (state, size))

    parameters = dict(mixer.named_parameters())
    if not torch.is_grad_enabled():
        return run(state, parameters).to(state.dtype)
    return _Mix.apply(
        run, codec or ExactTaps(), [*parameters], state, *parameters.values()
    )


class _Mix(torch.autograd.Function):
    """Runs the mixer again in backward, from the state that was kept."""

    @staticmethod
    def forward(ctx, run, codec, names, state, *parameters):
        kept = codec.encode(state.detach().flatten(0, -2))
        ctx.run, ctx.codec, ctx.names = run, codec, names
        ctx.shape, ctx.dtype = state.shape, state.dtype
        ctx.save_for_backward(*kept, *parameters)
        given = dict(zip(names, parameters, strict=True))
        return run(state, given).to(state.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        split = len(tensors) - len(ctx.names)
        state = ctx.codec.decode(tensors[:split], ctx.dtype).view(ctx.shape)
        state = state.detach().requires_grad_()
        given = {
            name: parameter.detach().requires_grad_()
            for name, parameter in zip(ctx.names, tensors[split:], strict=True)
        }
        with torch.enable_grad():
            output = ctx.run(state, given)
        gradients = torch.autograd.grad(
            output, [state, *given.values()], grad.to(output.dtype)
        )
        return None, None, None, *gradients
