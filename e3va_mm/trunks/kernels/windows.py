"""Which tokens and masks the windows of a map have, by its size alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3va_mm.numerics.products import is_traced
from e3va_mm.numerics.temporaries import runs_as_on_gpu


class Windows(NamedTuple):
    """Some of the ``n`` windows of a map, of ``N`` tokens each."""

    tokens: Tensor  # (n * N,), which token is there
    padding: Tensor | None  # where none is
    inside: int  # the first windows, which have no mask
    masks: Tensor | None  # (n - inside, 1, N, N') of the others

    def of(self, tokens: Tensor) -> Tensor:
        """(B * L, C) -> (n * N, C), padded with zeros."""
        windows = tokens.index_select(0, self.tokens)
        if self.padding is not None:
            windows.index_fill_(0, self.padding, 0)
        return windows


class WindowOrder(NamedTuple):
    """All windows of a batch of maps."""

    parts: list[Windows]
    length: int  # their tokens, with padding
    back: Tensor  # (B * L,), where among those each token is
    bias: Tensor  # (N * N',), that of `relative_positions`


def window_order(*key) -> WindowOrder:
    """The windows of a batch of maps, those with masks last.

    Args:
        *key: Batch size, (H, W), side and shift of a window in tokens, tokens
            at a time, type of the masks, device.
    """
    # What a trace makes is nothing for a later pass.
    return (_window_order if is_traced() else _kept_order)(*key)


@torch.compiler.disable  # which would take numpy for torch
def _window_order(
    batch: int,
    size: tuple[int, int],
    window: int,
    shift: int,
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
) -> WindowOrder:
    height, width = size
    rows, columns = -(-height // window), -(-width // window)
    # Tokens by window, -1 where none is.
    grid = np.full((batch, rows * window, columns * window), -1, np.int32)
    grid[:, :height, :width].flat = np.arange(batch * height * width)
    grid = np.roll(grid, (-shift, -shift), (1, 2))
    grid = grid.reshape(batch, rows, window, columns, window).swapaxes(2, 3)
    kinds = np.zeros((batch, rows, columns), int)
    if shift:
        kinds[:, -1] += 1
        kinds[:, :, -1] += 2
    order = kinds.argsort(axis=None, kind='stable')
    grid, kinds = grid.reshape(-1, window**2)[order], kinds.ravel()[order]
    masks = torch.from_numpy(shift_masks(window, shift)).to(dtype)
    parts = []
    for first in range(0, len(grid), max(1, chunk // window**2)):
        some = slice(first, first + max(1, chunk // window**2))
        tokens, edge = grid[some].ravel(), kinds[some][kinds[some] > 0]
        padding = np.flatnonzero(tokens < 0)
        parts.append(
            Windows(
                torch.from_numpy(tokens.clip(0)).to(device),
                torch.from_numpy(padding).to(device) if len(padding) else None,
                len(kinds[some]) - len(edge),
                masks[edge].to(device) if len(edge) else None,
            )
        )
    places = np.flatnonzero(grid >= 0)
    back = np.empty(len(places), np.int32)
    back[grid.flat[places]] = places
    return WindowOrder(
        parts,
        grid.size,
        torch.from_numpy(back).to(device),
        torch.from_numpy(relative_positions(window).ravel()).to(device),
    )


# Four stages, with and without a shift, of eight sizes.
_kept_order = lru_cache(maxsize=64)(_window_order)


@contextmanager
def windows_of_a_pass(device: torch.device) -> Iterator[None]:
    """Inside, windows are ordered once; a GPU keeps the order for later."""
    try:
        yield
    finally:
        if not runs_as_on_gpu(device):
            _kept_order.cache_clear()


@cache
def shift_masks(window: int, shift: int) -> np.ndarray:
    """What a shift adds before the softmax, by kind of window.

    Args:
        window (int): Side of a window in tokens; ``N = window ** 2``.
        shift (int): Shift in tokens.

    Returns:
        np.ndarray: (4, 1, N, N'), float32: inside, lower edge, right edge,
        corner. ``N'`` is ``N`` and what fused kernels on a GPU would pad.
    """
    # At an edge, tokens that came from the opposite one are another region.
    came = np.arange(window) >= window - shift
    below, beyond = np.repeat(came, window), np.tile(came, window)
    regions = np.stack([0 * below, below, beyond, below + 2 * beyond])
    apart = regions[:, None, :, None] != regions[:, None, None, :]
    # -100 rather than minus infinity, as the stock code has it.
    return _aligned(np.where(apart, np.float32(-100), np.float32(0)))


@cache
def relative_positions(window: int) -> np.ndarray:
    """(N, N'), the row of the table of position biases for two tokens."""
    down, across = np.divmod(np.arange(window**2, dtype=np.int32), window)
    down, across = (x[:, None] - x + window - 1 for x in (down, across))
    return _aligned(down * (2 * window - 1) + across)


def _aligned(rows: np.ndarray) -> np.ndarray:
    """(..., N) -> (..., N'), a multiple of 8."""
    pad = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 8)]
    return np.pad(rows, pad)
