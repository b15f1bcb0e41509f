import pytest
import torch

from e3va_mm.errors import ConfigError
from tests.helpers import build_e3va, e3va_and_stock
from tests.reference.e3va import merge


@pytest.mark.parametrize('size', [(7, 5), (8, 6)])
@pytest.mark.parametrize('linear', [False, True])
def test_downsampling_equals_merging_by_slices(size, linear):
    ours, stock = e3va_and_stock()
    tokens = torch.randn(2, size[0] * size[1], 32)
    gather, weight, _ = ours.trunk.downsampling(0, size)
    got = gather(tokens, norm=not linear) @ weight().T
    expected, _ = merge(
        tokens, size, stock.stages[0].downsample, norm=not linear
    )
    torch.testing.assert_close(got, expected)


def test_absolute_positions_fail_clearly_at_another_size():
    ours = build_e3va(use_abs_pos_embed=True, pretrain_img_size=64)
    ours(torch.randn(1, 3, 64, 64))
    with pytest.raises(ConfigError, match='`pretrain_img_size`, 256, but an'):
        ours(torch.randn(1, 3, 64, 96))
