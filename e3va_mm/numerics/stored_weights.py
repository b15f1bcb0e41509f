"""The type in which the linear layers of a frozen trunk are stored."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import DTYPES


def store(module: nn.Module, kind: str | None) -> None:
    """Store the linear layers below ``module`` as ``kind``.

    Args:
        module (nn.Module): A part of a trunk, with its weights.
        kind (str, optional): ``'fp32'``, ``'bf16'``, ``'fp16'``, or
            ``'int8'`` by torchao with one scale an output channel; None to
            leave them alone.

    Raises:
        ConfigError: If torchao is needed and not installed.
    """
    if kind in DTYPES:
        for _, layer in linear_layers(module):
            layer.to(DTYPES[kind])
    elif kind == 'int8':
        quantize, config = torchao()
        quantize(module, config)
        for _, layer in linear_layers(module):
            # torchao's own, which cannot be pickled.
            vars(layer).pop('extra_repr', None)
            weight = layer.weight.detach()
            # A buffer: what frameworks do with parameters it cannot do.
            del layer.weight
            layer.register_buffer('weight', weight, persistent=False)


def make_room(module: nn.Module) -> None:
    """Take single precision in place of 8 bits, for weights to be loaded."""
    for _, layer in linear_layers(module):
        weight = layer.weight
        room = torch.empty(weight.shape, device=weight.device)
        del layer.weight
        layer.weight = nn.Parameter(room, requires_grad=False)


def coarse_keys(module: nn.Module, kind: str | None) -> Iterator[str]:
    """Names of the parameters below ``module`` that ``kind`` rounds."""
    if kind in ('bf16', 'fp16', 'int8'):
        for name, layer in linear_layers(module):
            yield f'{name}.weight'
            if layer.bias is not None and kind != 'int8':
                yield f'{name}.bias'


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers below ``module``."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child


def plain(weight: Tensor) -> Tensor:
    """A weight that can be viewed in any way, also one stored in 8 bits."""
    return (
        weight.dequantize()
        if is_traceable_wrapper_subclass(weight)
        else weight
    )


def torchao() -> tuple:
    """What quantises, and how.

    Raises:
        ConfigError: If torchao cannot be imported.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            "`tuner.trunk_weights='int8'` needs torchao, which cannot be "
            f'imported ({error}). Install it (`pip install torchao`), or '
            "store the trunk in 16 bits: `trunk_weights='bf16'`."
        ) from error
    return quantize_, Int8WeightOnlyConfig()
