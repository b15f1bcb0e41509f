import pytest

from e3va_mm.utils.listing import listed


@pytest.mark.parametrize(
    'names, text',
    [
        ([], 'none'),
        (['a', 'b'], 'a, b'),
        (['a', 'b', 'c', 'd'], 'a, b and 2 more'),
    ],
)
def test_the_first_are_named_and_the_rest_counted(names, text):
    assert listed(names, 2) == text
