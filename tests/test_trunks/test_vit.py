import pytest
import torch

from e3va_mm.errors import ConfigError
from e3va_mm.trunks import TrunkOptions, build_trunk
from e3va_mm.trunks.vit import join_windows
from tests.trunk_cases import build_stock


def test_the_embedding_is_no_output():
    stock = build_stock('mmseg vit')
    stock.out_origin = True
    with pytest.raises(ConfigError, match='`out_origin=True` asks for the'):
        build_trunk(stock, TrunkOptions())


@pytest.mark.parametrize('size', [(6, 4), (5, 3), (1, 1)])
def test_windows_are_joined_without_their_padding(size):
    mmpretrain = pytest.importorskip('mmpretrain.models.backbones.vit_sam')
    maps = torch.randn(2, *size, 8)
    windows, _ = mmpretrain.window_partition(maps, 2)
    assert torch.equal(join_windows(windows, 2, size), maps)
