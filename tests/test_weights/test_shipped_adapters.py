"""The adapter files that come with the package, each of a config."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from safetensors import safe_open

from e3va_mm.weights.reading import ASSETS

CONFIGS = Path(__file__).parents[2] / 'configs'
FILES = sorted(ASSETS.glob('*_e3va_*.safetensors'))


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_it_is_all_that_its_config_trains(path):
    config = Config.fromfile(CONFIGS / f'{path.stem}.py')
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    with safe_open(path, 'pt') as file:
        held = {key: file.get_tensor(key) for key in file.keys()}
        text = ' '.join(file.metadata().values())
    if 'dinov2' in path.stem:  # its trunk would be downloaded
        model.load_state_dict(model.state_dict() | held)
    else:
        load_checkpoint(model, f'e3va_mm://{path.name}')
    state = model.state_dict()
    assert all(torch.equal(state[key], held[key]) for key in held)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained <= held.keys()
    # It was trained: adapters begin at zero.
    assert all(held[key].any() for key in trained if '.up.' in key)
    # Nothing in it names the machine.
    assert str(Path.home()) not in text and '/tmp' not in text
