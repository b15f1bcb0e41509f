import pytest


@pytest.fixture(autouse=True)
def plain_configs(monkeypatch):
    """Configs are written as they are: yapf takes most of the time else."""
    monkeypatch.setattr(
        'yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)
    )
