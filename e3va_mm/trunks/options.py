"""How a frozen trunk computes: what its user may choose."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from e3va_mm.numerics.autocast import DTYPES, autocast_dtype
from e3va_mm.utils.options import (
    Options,
    flag,
    number,
    one_of,
    option,
    optional,
    whole,
)


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
            process at once; None for all. Only memory and time depend on it.
            Defaults to 8192.
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
    chunk: int | None = option(8192, optional(whole(1)))
    compile: bool = option(False, flag)
    drop_path: float = option(0.0, number(least=0, below=1))

    def dtype(self, like: Tensor) -> torch.dtype:
        """The type to compute in, on the device of the weight ``like``."""
        if self.compute is not None:
            return DTYPES[self.compute]
        return autocast_dtype(like) or like.dtype
