from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from e3va_mm.utils.unwrapping import unwrapped


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_all_wrappers_are_taken_off(monkeypatch):
    monkeypatch.setitem(MODEL_WRAPPERS._module_dict, 'Wrapper', Wrapper)
    model = nn.Linear(1, 1)
    assert unwrapped(model) is model
    assert unwrapped(Wrapper(Wrapper(model))) is model
