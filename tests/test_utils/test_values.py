import math

import pytest

from e3va_mm.utils import is_number, is_whole


@pytest.mark.parametrize('value', [True, '1', None, [1], math.nan, math.inf])
def test_what_is_no_number(value):
    assert not is_number(value)
    assert not is_whole(value)


def test_numbers():
    assert is_number(1) and is_number(-0.5) and is_number(10**15)
    assert is_whole(1) and is_whole(0, 0) and is_whole(5, 1, 5)
    assert not is_whole(1.0)
    assert not is_whole(0) and not is_whole(6, 1, 5)
