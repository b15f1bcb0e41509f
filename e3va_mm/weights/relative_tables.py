"""Tables of relative positions for another grid than a file's."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

TABLE = 'relative_position_bias_table'
EXTRA = 3  # class token to token, token to class token, class to itself


def resize_relative_tables(
    expected: Mapping[str, Tensor], found: dict[str, Tensor]
) -> list[str]:
    """Fit BEiT's tables of ``found`` to the shapes of ``expected``, in place.

    Near distances keep their places and far ones are spread, as in `BEiT
    <https://github.com/microsoft/unilm/tree/master/beit>`_. The stock classes
    do the same with a function that SciPy has dropped.

    Returns:
        list[str]: A line on what was done, if anything was.
    """
    wanted = {k: v.shape for k, v in expected.items() if k.endswith(TABLE)}
    # A table that all blocks share may become theirs afterwards.
    shape = next(iter(wanted.values()), None)
    resized = 0
    for key, table in found.items():
        rows, heads = wanted.get(key, shape) or (0, 0)
        fits = table.ndim == 2 and table.shape[1] == heads
        if key.endswith(TABLE) and fits and len(table) != rows:
            spread = _spread(
                table[:-EXTRA].float().numpy(), round((rows - EXTRA) ** 0.5)
            )
            found[key] = torch.cat(
                [torch.from_numpy(spread).to(table), table[-EXTRA:]]
            )
            resized += 1
    return (
        [f'{resized} tables of relative positions resized'] if resized else []
    )


def _spread(table: np.ndarray, side: int) -> np.ndarray:
    """(S * S, heads) -> (side * side, heads), bicubic."""
    from scipy.interpolate import RectBivariateSpline

    old = round(len(table) ** 0.5)
    places = _distances(old // 2, side // 2)
    new = np.arange(-(side // 2), side // 2 + 1)
    heads = [
        RectBivariateSpline(places, places, head)(new, new)
        for head in table.T.reshape(-1, old, old)
    ]
    return np.stack(heads, -1).reshape(side * side, -1).astype(np.float32)


def _distances(count: int, farthest: int) -> np.ndarray:
    """Where 2 * count + 1 old distances lie among the new ones.

    They grow by a constant ratio, so that the last is the farthest.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > farthest:
            high = ratio
        else:
            low = ratio
    one_side = np.cumsum(ratio ** np.arange(count))
    return np.concatenate([-one_side[::-1], [0], one_side])
