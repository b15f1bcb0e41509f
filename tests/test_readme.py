"""What the README says is there, and its experiment works."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config

from e3va_mm.backbones.presets import resolve_side_path
from e3va_mm.engine.checkpointing import checkpoint_modules
from e3va_mm.measure import TrainingStep
from e3va_mm.models import E3VASidePath
from e3va_mm.registry import HOOKS
from e3va_mm.trunks import SwinTrunk, TrunkOptions
from tests.helpers import build_e3va
from tests.test_configs import CONFIGS
from tests.test_engine.test_hooks.tiny import make_coco

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def test_the_new_experiment_is_short_and_trains(tmp_path):
    block, *_ = blocks('python')
    assert len(block.strip().splitlines()) <= 5
    path = tmp_path / 'my_experiment.py'
    path.write_text(block.replace("'./", f"'{CONFIGS}/"))
    step = TrainingStep(Config.fromfile(path), 'as-is', size=(64, 64), batch=1)
    adapter = step.model.backbone.side_path.stages[0][0]['attn']
    assert adapter.down.p.shape == (32, 8)
    assert all(codec.lossy for codec in step.model.backbone.side_path.codecs)
    assert step.optim_wrapper.get_lr()['base_lr'] == [5e-4]
    step.run()


def test_own_data_train_by_the_config_that_is_shown(tmp_path):
    for split in ('train', 'val'):
        make_coco(tmp_path, split, classes=('cat', 'dog'), masks=True)
    _, block, _ = blocks('python')
    config = tmp_path / 'mine.py'
    config.write_text(
        block.replace("'./", f"'{CONFIGS}/").replace(
            'path/to/my_data/', f'{tmp_path}/'
        )
    )
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'train.py', config]
        + ['--work-dir', tmp_path / 'work', '--cfg-options']
        + ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'coco/segm_mAP' in done.stdout + done.stderr


def test_the_lines_for_less_memory_fit_the_detector(tmp_path):
    *_, block = blocks('python')
    path = tmp_path / 'less.py'
    path.write_text(block.replace("'./", f"'{CONFIGS}/"))
    config = Config.fromfile(path)
    before = Config.fromfile(CONFIGS / 'cascade_e3va_swin_l_coco.py')
    assert config.custom_hooks[: len(before.custom_hooks)] == (
        before.custom_hooks
    )
    added = config.custom_hooks[len(before.custom_hooks) :]
    hooks = [HOOKS.build(hook) for hook in added]
    assert [type(hook).__name__ for hook in hooks] == [
        'ActivationCheckpointHook',
        'MeasureHook',
    ]
    # The same parts as the slim detector of the digits has.
    digits = Config.fromfile(CONFIGS / 'cascade_e3va_swin_nano_digits.py')
    step = TrainingStep(digits, 'lean', size=(64, 64), batch=1)
    assert len(checkpoint_modules(step.model, added[0].modules)) == 7
    step.run()


def test_commands_and_files_exist():
    named = set(
        re.findall(r'(?<![\w/])(?:tools|configs)/\w+\.(?:py|sh)', README)
    )
    assert len(named) >= 6
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == {'configs/my_experiment.py'}  # the user's own


def test_options_and_defaults_are_those_of_the_code():
    rows = dict(re.findall(r'^\| `(\w+)` \| `?([^`|]+?)`? \|', README, re.M))
    side_path = inspect.signature(E3VASidePath).parameters
    defaults = {
        name: parameter.default
        for name, parameter in side_path.items()
        if name != 'stages'
    }
    defaults['taps'] = SwinTrunk.TAPS  # None stands for all
    backbone = build_e3va()
    defaults['train_output_norms'] = backbone.norm0.weight.requires_grad
    defaults['preset'] = 'exact'
    assert resolve_side_path(dict(preset='exact')) == resolve_side_path({})
    for name, default in TrunkOptions._field_defaults.items():
        defaults[f'trunk_{name}'] = default
    assert rows == {k: repr(v) for k, v in defaults.items()}


def test_no_figure_is_left_open():
    assert not re.search(r'\b(QUICKTIME|NUMBERS|TODO)\b', README)
