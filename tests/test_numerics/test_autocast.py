import pytest
import torch

from e3va_mm.numerics.autocast import (
    autocast_dtype,
    autocast_off,
    autocast_to,
)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_seen_set_and_switched_off(dtype):
    x = torch.randn(2, 2)
    assert autocast_dtype(x) is None
    with autocast_to(x, dtype):
        assert autocast_dtype(x) is dtype
        with autocast_off(x):
            assert autocast_dtype(x) is None
            assert (x @ x).dtype is torch.float32
        with autocast_to(x, None):
            assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is dtype


def test_a_device_without_autocast_has_it_off():
    x = torch.randn(2, 2, device='meta')
    assert autocast_dtype(x) is None
    with autocast_to(x, torch.bfloat16), autocast_off(x):
        assert (x @ x).dtype is torch.float32
