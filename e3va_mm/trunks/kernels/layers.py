"""The arithmetic of frozen blocks, over the stock modules' weights.

A frozen block needs no graph. So attention runs through
``scaled_dot_product_attention``, tokens are processed in chunks, and matrix
products in the type that is asked for. What surrounds them (norms, residuals,
drop path) stays the stock code.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e3va_mm.numerics.autocast import autocast_off
from e3va_mm.numerics.products import linear
from e3va_mm.trunks.options import TrunkOptions


def install(module: nn.Module, kind: type, options: TrunkOptions) -> None:
    """Let ``module`` compute by ``kind``; its weights and names stay."""
    # On the instance: a deep copy of the module gets a copy bound to itself.
    module.forward = kind(module, options)


class Product:
    """A linear layer in the compute type."""

    def __init__(self, layer: nn.Linear, options: TrunkOptions) -> None:
        self.layer = layer
        self.options = options

    def __call__(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C') in the compute type."""
        dtype = self.options.dtype(self.layer.weight)
        with autocast_off(input):
            return linear(input.to(dtype), *cast(self.layer, dtype))


class FullPrecision:
    """A module that computes in the type it is given, whatever autocast says.

    The residual stream starts, and stays, in single precision.
    """

    def __init__(self, module: nn.Module, options: TrunkOptions) -> None:
        self.stock = module.forward

    def __call__(self, x: Tensor, *args, **kwargs):
        """As the module."""
        with autocast_off(x):
            return self.stock(x, *args, **kwargs)


class FeedForward:
    """The layers of an MLP, some tokens at a time.

    The hidden layer, four times as wide as the tokens, is never there as a
    whole.
    """

    def __init__(self, layers: nn.Sequential, options: TrunkOptions) -> None:
        self.layers = layers
        self.options = options

    def __call__(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C) in the compute type."""
        steps: list[Callable | tuple[Tensor, Tensor | None]] = []
        dtype = None
        for module in leaves(self.layers):
            if isinstance(module, nn.Linear):
                dtype = dtype or self.options.dtype(module.weight)
                steps.append(cast(module, dtype))
            elif not isinstance(module, (nn.Dropout, nn.Identity)):
                steps.append(module)
        run = compiled(feed_forward, self.options, x.shape[-1])
        widest = max(len(step[0]) for step in steps if not callable(step))
        with autocast_off(x):
            out = in_parts(
                lambda part: run(part.to(dtype), steps),
                x.flatten(0, -2),
                self.options.at_once(2 * widest * dtype.itemsize, x.device),
            )
        return out.unflatten(0, x.shape[:-1])


class GatedFeedForward:
    """``SwiGLUFFN`` of mmpretrain, some tokens at a time."""

    def __init__(self, module: nn.Module, options: TrunkOptions) -> None:
        self.module = module
        self.options = options

    def __call__(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        module = self.module
        dtype = self.options.dtype(module.w12.weight)
        before, after = cast(module.w12, dtype), cast(module.w3, dtype)

        def run(part: Tensor) -> Tensor:
            gate, value = linear(part.to(dtype), *before).chunk(2, -1)
            hidden = module.norm(F.silu(gate) * value)
            return linear(hidden.to(dtype), *after)

        with autocast_off(x):
            size = 2 * len(before[0]) * dtype.itemsize
            out = in_parts(
                run, x.flatten(0, -2), self.options.at_once(size, x.device)
            )
        out = module.dropout_layer(
            module.gamma2(out.unflatten(0, x.shape[:-1]))
        )
        if module.out_dims != module.embed_dims or not module.add_identity:
            return out
        return (x if identity is None else identity) + out


def feed_forward(x: Tensor, steps: list) -> Tensor:
    """(n, C) -> (n, C): ``steps`` are (weight, bias) or functions."""
    for step in steps:
        x = step(x) if callable(step) else linear(x, *step)
    return x


def in_parts(
    function: Callable[[Tensor], Tensor], tokens: Tensor, size: int
) -> Tensor:
    """``function`` of tokens (N, C), ``size`` at a time -> (N, C')."""
    return joined(map(function, tokens.split(size)), len(tokens))


def joined(parts: Iterable[Tensor], rows: int) -> Tensor:
    """Parts (n, C), each made when the one before is in its place."""
    whole, first = None, 0
    for part in parts:
        if len(part) == rows:
            return part
        if whole is None:
            whole = part.new_empty(rows, part.shape[1])
        whole[first : first + len(part)] = part
        first += len(part)
        del part
    return whole


def cast(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer in ``dtype``."""
    weight, bias = layer.weight, layer.bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below that have no children, in order."""
    for child in module.children():
        if next(child.children(), None) is None:
            yield child
        else:
            yield from leaves(child)


def compiled(
    function: Callable, options: TrunkOptions, channels: int
) -> Callable:
    """``function``, compiled for a width if the options ask for it."""
    return _compiled(function, channels) if options.compile else function


@cache
def _compiled(function: Callable, channels: int) -> Callable:
    # A code object of its own: torch compiles one only for so many shapes,
    # and a trunk has a width for each stage.
    code = function.__code__.replace(co_name=f'{function.__name__}_{channels}')
    own = FunctionType(code, function.__globals__, code.co_name)
    # Image sizes vary from step to step.
    return torch.compile(own, dynamic=True)
