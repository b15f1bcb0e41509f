"""`e3va check`: options that cannot work."""

from e3va_mm.commands import check
from tests.test_engine.test_hooks.tiny import detection_config


def test_names_of_checks(tmp_path, error):
    assert 'should be a list of checks (heads, ' in error(
        check, detection_config(tmp_path), '--skip-check', 'nothing'
    )
