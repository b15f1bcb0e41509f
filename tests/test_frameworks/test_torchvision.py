"""torchvision can be imported whether its operators load or not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
# A torchvision as far as it matters: its library, then its descriptions.
TORCHVISION = """
import torch, torchvision.extension
for name in ('nms', 'qnms'):
    getattr(torch.ops.torchvision, name)
"""
EXTENSION = """
import torch
from pathlib import Path
try:
    torch.ops.load_library(next(Path(__file__).parent.glob('_C.*')))
except (OSError, StopIteration):
    loaded = False
else:
    loaded = True
"""
# Defines what torchvision's library would, counting how often.
LIBRARY = """
import torch
from pathlib import Path
load = torch.ops.load_library
kept = []

def load_library(path):
    if Path(path).read_text() != 'good':
        return load(path)
    if not kept:
        kept.append(torch.library.Library('torchvision', 'FRAGMENT'))
        for name in ('nms', 'qnms'):
            kept[0].define(
                name + '(Tensor dets, Tensor scores, float iou_threshold)'
                ' -> Tensor')
            kept[0].impl(name, lambda d, s, t: s.argsort(), 'CPU')

torch.ops.load_library = load_library
"""
DECLARE = """
from e3va_mm.frameworks.torchvision import declare_missing_ops
print([declare_missing_ops() for _ in range(2)])
"""
CALL = """
import torchvision
print(torchvision.extension.loaded)
try:
    torch.ops.torchvision.nms(torch.ones(2, 4), torch.ones(2), 0.5)
except NotImplementedError:
    print('no kernel')
print(declare_missing_ops())
"""


def run(code, folder, *arguments):
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, *map(str, arguments)],
        cwd=folder,
        env={'PYTHONPATH': f'{folder}:{ROOT}', 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    return process.returncode, process.stdout + process.stderr


def pretend(folder, library):
    """A torchvision in ``folder``; ``library`` is the text of its _C."""
    (folder / 'torchvision').mkdir()
    (folder / 'torchvision' / '__init__.py').write_text(TORCHVISION)
    (folder / 'torchvision' / 'extension.py').write_text(EXTENSION)
    if library is not None:
        (folder / 'torchvision' / '_C.so').write_text(library)


def test_missing_operators_are_declared_once(tmp_path):
    pretend(tmp_path, 'for another torch')
    status, output = run('import torchvision', tmp_path)
    assert status == 1 and "no attribute 'nms'" in output
    status, output = run(LIBRARY + DECLARE + CALL, tmp_path)
    assert status == 0, output
    assert output == '[True, False]\nFalse\nno kernel\nFalse\n'


def test_a_library_that_loads_is_left_alone(tmp_path):
    pretend(tmp_path, 'good')
    status, output = run(LIBRARY + DECLARE + CALL, tmp_path)
    assert (status, output) == (0, '[False, False]\nTrue\nFalse\n')


def test_nothing_happens_without_torchvision(tmp_path):
    (tmp_path / 'torchvision').mkdir()  # left behind
    code = """
import sys, e3va_mm.frameworks.torchvision
sys.path = [path for path in sys.path if 'site-packages' not in path]
"""
    assert run(code + DECLARE, tmp_path) == (0, '[False, False]\n')


def test_install_declares_them_and_imports_nothing(tmp_path):
    pretend(tmp_path, None)
    code = """
import sys, e3va_mm.checkpoint
print(sorted({'torchvision', 'mmpretrain', 'timm'} & set(sys.modules)))
import torchvision
"""
    assert run(code, tmp_path) == (0, '[]\n')


needs_mmpretrain = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('mmpretrain', 'timm'))),
    reason='needs requirements/mmpretrain.txt',
)


@needs_mmpretrain
def test_configs_are_read_that_import_mmpretrain(tmp_path, base='upernet'):
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(CONFIGS / f"{base}_e3va_swin_nano_digits.py")!r}\n'
        "custom_imports = dict(imports=['mmpretrain.models'], "
        'allow_failed_imports=False)\n'
    )
    code = """
import sys, e3va_mm.checkpoint
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
config = Config.fromfile(sys.argv[1])
init_default_scope(config.default_scope)
print('E3VA', type(MODELS.build(config.model).backbone.tuner).__name__)
print(type(MODELS.build(dict(type='mmpretrain.ResNet', depth=18))).__name__)
import timm, torchvision
"""
    status, output = run(code, tmp_path, config)
    assert status == 0, output
    assert 'E3VA' in output and output.endswith('\nResNet\n')
