"""Frameworks that are a mixture, or missing, are refused."""

from importlib.metadata import PackageNotFoundError

import pytest

from e3va_mm.errors import E3VAError
from e3va_mm.frameworks import distributions


@pytest.fixture
def check(monkeypatch):
    """The check where exactly these distributions are installed."""

    def check(*names):
        def version(name):
            if name not in names:
                raise PackageNotFoundError(name)
            return '1.2.3'

        monkeypatch.setattr(distributions, 'version', version)
        distributions.check_distributions()

    return check


@pytest.mark.parametrize(
    'names',
    [
        ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'),
        # An original beside a maintained one: odd, but nothing is mixed.
        ('onedl-mmengine', 'mmdet'),
    ],
)
def test_one_distribution_of_each_is_accepted(check, names):
    check(*names)


def test_two_distributions_of_a_package_are_refused(check):
    with pytest.raises(E3VAError) as info:
        check('onedl-mmcv', 'mmcv', 'onedl-mmdetection', 'mmdet', 'rich')
    text = str(info.value)
    assert 'mmcv from onedl-mmcv 1.2.3 and mmcv 1.2.3; mmdet from ' in text
    assert (
        '  pip uninstall -y onedl-mmcv mmcv onedl-mmdetection mmdet && '
        'pip install --no-build-isolation onedl-mmcv onedl-mmdetection\n'
    ) in text
    assert '  python -m e3va_mm.doctor' in text


def test_without_mmengine_the_error_says_what_to_install(check, monkeypatch):
    monkeypatch.setattr(distributions, 'find_spec', lambda name: None)
    with pytest.raises(E3VAError, match='mmengine, which is not installed'):
        check()
