"""Packaging: what is shipped, what it is good for, what is refused."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.fileio import load

import e3va_mm
from e3va_mm.datasets.digits import build_dataset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Build a wheel from a copy, so that the clone stays as it is."""
    source = tmp_path_factory.mktemp('source')
    ignore = shutil.ignore_patterns('__pycache__', '.mim')
    for name in ('configs', 'tools', 'e3va_mm', 'requirements'):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / 'model-index.yml', source)
    out = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-index']
    options = ['--no-deps', '--no-build-isolation', '-w', str(out)]
    process = subprocess.run(
        [*pip, *options, '.'], cwd=source, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    # Links are for editable installs: nothing is left in the sources.
    assert not (source / 'e3va_mm' / '.mim').exists()
    (path,) = out.glob('*.whl')
    return zipfile.ZipFile(path)


def sources(folder):
    """List the files below a folder of the repository."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob('*')
        if path.is_file()
        and '__pycache__' not in path.parts
        and '.mim' not in path.parts
    }


def test_the_wheel_holds_the_package_its_configs_and_tools(wheel):
    shipped = {n for n in wheel.namelist() if '.dist-info/' not in n}
    expected = sources('e3va_mm')
    for folder in ('configs', 'tools'):
        assert sources(folder)
        expected |= {f'e3va_mm/.mim/{name}' for name in sources(folder)}
    assert shipped == {*expected, 'e3va_mm/.mim/model-index.yml'}


def test_the_wheel_requires_no_framework_and_no_torch(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith('/METADATA')]
    text = wheel.read(name).decode()
    assert f'Version: {e3va_mm.__version__}\n' in text
    required = re.findall('^Requires-Dist: (.+)$', text, re.M)
    hard = [line for line in required if 'extra ==' not in line]
    assert sorted(hard) == ['numpy', 'rich', 'safetensors']
    assert 'torch>=2.6; extra == "onedl"' in required
    for extra, distribution in (
        ('onedl', 'onedl-mmdetection'),
        ('export', 'onnxruntime'),
        ('mmpretrain', 'timm'),
        ('tests', 'scikit-learn'),
    ):
        pattern = rf'{distribution}\b.*; extra == "{extra}"'
        assert any(re.match(pattern, line) for line in required)


def test_mim_finds_every_config():
    (name,) = load(ROOT / 'model-index.yml')['Import']
    listed = load(ROOT / name)
    collections = {c['Name'] for c in listed['Collections']}
    assert {m['In Collection'] for m in listed['Models']} == collections
    configs = [m['Config'] for m in listed['Models']]
    assert sorted(configs) == sorted(
        f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')
    )
    # mim finds a config by the name of its file.
    assert [Path(c).stem for c in configs] == [
        m['Name'] for m in listed['Models']
    ]


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    """Install the wheel into a folder outside the repository."""
    folder = tmp_path_factory.mktemp('site')
    process = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '-q', '--no-index']
        + ['--no-deps', '--target', str(folder), wheel.filename],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return folder


def call(site, cwd, *command, hidden=()):
    """Run a command where the wheel is installed, and some packages not."""
    # Read by Python before anything else.
    (cwd / 'sitecustomize.py').write_text(
        f'import sys; sys.modules.update(dict.fromkeys({hidden!r}))'
    )
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': f'{cwd}{os.pathsep}{site}'},
        capture_output=True,
        text=True,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    return output


# What a user writes to build upon a config of an installed e3va_mm; it holds
# with every tool, the frameworks' own too.
BASE = "__import__('e3va_mm').__path__[0] + '/.mim/configs/{}.py'"


@pytest.mark.parametrize(
    'config, hidden, steps',
    [
        (
            'retinanet_e3va_swin_nano_digits',
            'mmseg',
            'train_cfg = dict(max_epochs=1)',
        ),
        (
            'upernet_e3va_swin_nano_digits',
            'mmdet',
            'train_cfg = dict(max_iters=2)\n'
            'default_hooks = dict(logger=dict(interval=1))',
        ),
    ],
)
def test_a_wheel_trains_from_its_configs_without_the_other_framework(
    site, tmp_path, config, hidden, steps
):
    build_dataset(tmp_path / 'data' / 'digits', 2, 1, 1, size=96)
    loader = 'dict(num_workers=0, persistent_workers=False, batch_size=2)'
    (tmp_path / 'mine.py').write_text(
        f'_base_ = {BASE.format(config)}\n{steps}\n'
        f'train_dataloader = {loader}\n'
        'val_cfg = val_dataloader = val_evaluator = None\n'
        "work_dir = 'work'\n"
    )
    command = (site / 'bin' / 'e3va', 'train', 'mine.py')
    output = call(site, tmp_path, *command, hidden=(hidden,))
    assert re.search(r'loss: \d+\.\d+', output)
    assert (tmp_path / 'work' / 'last_checkpoint').exists()


def test_mmengine_does_not_take_our_configs_by_scope():
    # It knows its own packages alone: hence BASE. When this fails, the
    # docs can offer `e3va_mm::` as well.
    with pytest.raises(AssertionError, match='support to load e3va_mm config'):
        Config._get_cfg_path('e3va_mm::_base_/swin_nano.py', 'mine.py')


def test_no_file_of_tools_shadows_a_standard_module():
    # A tools/profile.py would break torch, which imports cProfile.
    names = {path.stem for path in (ROOT / 'tools').glob('*.py')}
    assert names
    assert names & set(sys.stdlib_module_names) <= {'test'}
