"""Sizes of sharded parameters, and the state dict of a wrapped model.

tests/test_engine/test_strategies has models that are sharded.
"""

import torch
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from e3va_mm.utils import sharding
from e3va_mm.utils.sharding import (
    is_sharded,
    note_size,
    size_of,
    whole_state,
)


@MODEL_WRAPPERS.register_module()
class ThinWrapper(nn.Module):
    """A wrapper as runners have one."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_parameter_remembers_its_size():
    parameter = nn.Parameter(torch.zeros(4, 6))
    assert size_of(parameter) == 24 and not is_sharded(parameter)
    note_size(parameter)
    # As FSDP leaves a shard in its place.
    parameter.data = torch.zeros(12)
    assert size_of(parameter) == 24 and is_sharded(parameter)


def test_the_state_is_that_of_the_model_inside(monkeypatch):
    model = nn.Linear(2, 3)
    for each in (model, ThinWrapper(model), ThinWrapper(ThinWrapper(model))):
        state = whole_state(each)
        assert state.keys() == {'weight', 'bias'}
        assert torch.equal(state['weight'], model.weight)
    monkeypatch.setattr(sharding, 'is_main_process', lambda: False)
    assert whole_state(ThinWrapper(model)) == {}


def test_a_sharded_model_is_asked_through_its_wrapper(monkeypatch):
    """By every process: each has a part. The main one has the result."""
    asked = []

    @MODEL_WRAPPERS.register_module()
    class Gathering(ThinWrapper):
        def state_dict(self):
            asked.append(self)
            return dict(weight='whole')

    model = Gathering(nn.Linear(2, 3))
    note_size(model.module.weight)
    assert whole_state(model) == dict(weight='whole')
    monkeypatch.setattr(sharding, 'is_main_process', lambda: False)
    assert whole_state(model) == {}
    assert asked == [model, model]
