import functools

import pytest
import torch


@pytest.fixture
def without_values(monkeypatch):
    """Modules are built without memory for their values."""
    # Stochastic depth reads the numbers of this one.
    linspace = functools.partial(torch.linspace, device='cpu')
    monkeypatch.setattr(torch, 'linspace', linspace)
    with torch.device('meta'):
        yield
