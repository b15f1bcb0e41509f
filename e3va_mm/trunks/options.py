"""How a frozen trunk computes: what its user may choose."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from e3va_mm.numerics.autocast import DTYPES, autocast_dtype
from e3va_mm.numerics.temporaries import runs_as_on_gpu, temporary_bytes
from e3va_mm.utils.options import (
    Options,
    flag,
    number,
    one_of,
    option,
    optional,
    whole,
)

# Enough to read weights seldom, few enough for a cache.
CPU_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class TrunkOptions(Options):
    """The options ``trunk_*`` of a tuner beside a frozen trunk.

    Attributes:
        compute (str, optional): Type of the matrix products: ``'fp32'``,
            ``'bf16'`` or ``'fp16'``. The residual stream stays in single
            precision. Defaults to that of autocast where it is on, else to
            that of the weights.
        weights (str, optional): Type in which the weights of the linear
            layers are stored: also ``'int8'``, one scale an output channel,
            which needs torchao. Checkpoints keep the weights as they came.
            Defaults to the type they have.
        chunk (int, optional): Tokens that token-wise parts and windows
            process at once. Only memory and time depend on it. Defaults to
            8192 on a CPU, on a GPU to as many as need 256 MiB of temporaries.
        compile (bool): Compile attention and MLP with ``torch.compile``.
            Defaults to False.
        drop_path (float): Stochastic depth in the trunk while training, in
            [0, 1). Defaults to 0.

    Raises:
        ConfigError: If an option is out of range.
    """

    PREFIX: ClassVar[str] = 'tuner.trunk_'

    compute: str | None = option(None, one_of(None, *DTYPES))
    weights: str | None = option(None, one_of(None, *DTYPES, 'int8'))
    chunk: int | None = option(None, optional(whole(1)))
    compile: bool = option(False, flag)
    drop_path: float = option(0.0, number(least=0, below=1))

    def dtype(self, like: Tensor) -> torch.dtype:
        """The type to compute in, on the device of the weight ``like``."""
        if self.compute is not None:
            return DTYPES[self.compute]
        return autocast_dtype(like) or like.dtype

    def at_once(self, token: int, device: torch.device) -> int:
        """Tokens to process at once, with ``token`` bytes each beside them."""
        if self.chunk is not None:
            return self.chunk
        if runs_as_on_gpu(device):
            return max(1, temporary_bytes(device) // token)
        return CPU_TOKENS
