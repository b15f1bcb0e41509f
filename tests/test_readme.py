"""What the README says is there, and its experiment works."""

import inspect
import re
from pathlib import Path

from mmengine.config import Config

from e3va_mm.measure import TrainingStep
from e3va_mm.models import E3VASidePath
from e3va_mm.models.trunks import SwinTrunk
from tests.helpers import build_e3va
from tests.test_configs import CONFIGS

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def test_the_new_experiment_is_short_and_trains(tmp_path):
    (block,) = blocks('python')
    assert len(block.strip().splitlines()) <= 5
    path = tmp_path / 'my_experiment.py'
    path.write_text(block.replace("'./", f"'{CONFIGS}/"))
    step = TrainingStep(Config.fromfile(path), 'e3va', size=(64, 64), batch=1)
    adapter = step.model.backbone.side_path.stages[0][0]['attn']
    assert adapter.down.p.shape == (32, 8)
    assert step.model.backbone.side_path.codec.lossy
    assert step.optim_wrapper.get_lr()['base_lr'] == [5e-4]
    step.run()


def test_commands_and_files_exist():
    named = set(
        re.findall(r'(?<![\w/])(?:tools|configs)/\w+\.(?:py|sh)', README)
    )
    assert len(named) >= 6
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == {'configs/my_experiment.py'}  # the user's own


def test_options_and_defaults_are_those_of_the_code():
    rows = dict(
        re.findall(r'^\| `(\w+)` \| `?([^`|]+?)`? \|', README, re.M)
    )
    side_path = inspect.signature(E3VASidePath).parameters
    defaults = {
        name: parameter.default
        for name, parameter in side_path.items()
        if name != 'stages'
    }
    defaults['taps'] = SwinTrunk.TAPS  # None stands for all
    backbone = build_e3va()
    defaults['train_output_norms'] = backbone.norm0.weight.requires_grad
    defaults['trunk_drop_path'] = int(backbone._trunk_drop_path)
    assert rows == {k: repr(v) for k, v in defaults.items()}


def test_no_figure_is_left_open():
    assert not re.search(r'\b(QUICKTIME|NUMBERS|TODO)\b', README)
