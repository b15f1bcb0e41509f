"""How a frozen trunk computes: what its user may choose."""

from typing import NamedTuple

import torch
from torch import Tensor

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import DTYPES, autocast_dtype
from e3va_mm.utils import is_number, is_whole

PREFIX = 'trunk_'


class TrunkOptions(NamedTuple):
    """The options ``side_path.trunk_*`` of a backbone.

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
        drop_path (float): Stochastic depth in the trunk while training.
            Defaults to 0.
    """

    compute: str | None = None
    weights: str | None = None
    chunk: int | None = 8192
    compile: bool = False
    drop_path: float = 0.0

    @classmethod
    def take_from(cls, side_path: dict) -> 'TrunkOptions':
        """Remove the options from a side path's config and check them.

        Raises:
            ConfigError: If an option is unknown or out of range.
        """
        given = {
            key: side_path.pop(key)
            for key in list(side_path)
            if key.startswith(PREFIX)
        }
        known = [PREFIX + field for field in cls._fields]
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ConfigError(
                f'`side_path.{unknown[0]}` is no option of the trunk. Options '
                f'are {", ".join(known)}.'
            )
        options = cls(**{k[len(PREFIX) :]: v for k, v in given.items()})
        options._check()
        return options

    def _check(self) -> None:
        for name, allowed in (
            ('compute', (None, *DTYPES)),
            ('weights', (None, *DTYPES, 'int8')),
            ('compile', (False, True)),
        ):
            value = getattr(self, name)
            # 1 equals True.
            kinds = {type(each) for each in allowed}
            if type(value) not in kinds or value not in allowed:
                raise ConfigError(
                    f'`side_path.{PREFIX}{name}` should be one of {allowed}, '
                    f'but got {value!r}.'
                )
        if self.chunk is not None and not is_whole(self.chunk):
            raise ConfigError(
                '`side_path.trunk_chunk` should be a number of tokens above '
                f'zero, or None, but got {self.chunk!r}.'
            )
        if not (is_number(self.drop_path) and 0 <= self.drop_path < 1):
            raise ConfigError(
                '`side_path.trunk_drop_path` should be in [0, 1), but got '
                f'{self.drop_path!r}.'
            )

    def dtype(self, like: Tensor) -> torch.dtype:
        """The type to compute in, on the device of the weight ``like``."""
        if self.compute is not None:
            return DTYPES[self.compute]
        return autocast_dtype(like) or like.dtype
