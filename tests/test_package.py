"""Packaging: what is shipped, and which environments are refused."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import e3va_mm

ROOT = Path(__file__).resolve().parents[1]

IMPORT = """
import sys
try:
    import e3va_mm
except Exception as error:
    print([c.__name__ for c in type(error).__mro__])
    print(error)
else:
    print('imported', e3va_mm.__version__)
    print(sorted({'torch', 'mmengine', 'numpy'} & set(sys.modules)))
"""


def import_beside(tmp_path, *distributions, mmengine=True):
    """Import e3va_mm where exactly these distributions are installed."""
    if mmengine:
        (tmp_path / 'mmengine').mkdir()
        (tmp_path / 'mmengine' / '__init__.py').touch()
    for name in distributions:
        info = tmp_path / f'{name.replace("-", "_")}-1.2.3.dist-info'
        info.mkdir()
        text = f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n'
        (info / 'METADATA').write_text(text)
    # -S: without the site-packages of the running interpreter.
    code = f'import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}'
    process = subprocess.run(
        [sys.executable, '-S', '-E', '-c', code + IMPORT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    'distributions',
    [
        ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'),
        ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation'),
        # An original beside a maintained one: odd, but nothing is mixed.
        ('onedl-mmengine', 'mmdet'),
    ],
)
def test_one_distribution_each_is_accepted_cheaply(tmp_path, distributions):
    output = import_beside(tmp_path, *distributions)
    assert output == f'imported {e3va_mm.__version__}\n[]\n'


@pytest.mark.parametrize(
    'first, second',
    [
        ('onedl-mmengine', 'mmengine'),
        ('onedl-mmcv', 'mmcv'),
        ('onedl-mmcv', 'mmcv-lite'),
        ('onedl-mmdetection', 'mmdet'),
        ('onedl-mmsegmentation', 'mmsegmentation'),
    ],
)
def test_two_distributions_of_one_package_are_refused(tmp_path, first, second):
    output = import_beside(tmp_path, first, second, 'rich')
    assert 'E3VAError' in output
    assert f': {first} 1.2.3 and {second} 1.2.3\n' in output
    assert f'  pip uninstall -y {first} {second}\n' in output
    assert f'  pip install --no-build-isolation {first}\n' in output


def test_all_doubled_distributions_are_named_at_once(tmp_path):
    output = import_beside(
        tmp_path, 'onedl-mmcv', 'mmcv', 'onedl-mmdetection', 'mmdet'
    )
    assert 'uninstall -y onedl-mmcv mmcv onedl-mmdetection mmdet\n' in output
    assert '--no-build-isolation onedl-mmcv onedl-mmdetection\n' in output


def test_without_mmengine_the_error_says_what_to_install(tmp_path):
    output = import_beside(tmp_path, mmengine=False)
    assert 'E3VAError' in output
    assert 'needs mmengine, which is not installed' in output
    assert "'e3va_mm[onedl]'" in output
    assert 'bash tools/quickstart.sh' in output


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
    assert shipped == expected


def metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith('/METADATA')]
    return wheel.read(name).decode()


def test_the_wheel_requires_no_framework_and_no_torch(wheel):
    text = metadata(wheel)
    assert f'Version: {e3va_mm.__version__}\n' in text
    hard = [
        line
        for line in re.findall(r'^Requires-Dist: (.+)$', text, re.M)
        if 'extra ==' not in line
    ]
    assert sorted(hard) == ['numpy', 'rich', 'safetensors']


@pytest.mark.parametrize(
    'extra, distributions',
    [
        (
            'onedl',
            [
                'onedl-mmengine',
                'onedl-mmcv',
                'onedl-mmdetection',
                'onedl-mmsegmentation',
                'opencv-python-headless',
            ],
        ),
        ('openmmlab', ['mmengine', 'mmcv', 'mmdet', 'mmsegmentation']),
        ('tests', ['pytest', 'pytest-xdist', 'hypothesis', 'scikit-learn']),
    ],
)
def test_extras_name_their_distributions(wheel, extra, distributions):
    pattern = rf'^Requires-Dist: ([\w-]+).*extra == .{extra}.$'
    lines = re.findall(pattern, metadata(wheel), re.M)
    assert set(distributions) <= set(lines)


def test_no_file_of_tools_shadows_a_standard_module():
    # A tools/profile.py would break torch, which imports cProfile.
    names = {path.stem for path in (ROOT / 'tools').glob('*.py')}
    assert names
    assert names & set(sys.stdlib_module_names) <= {'test'}


@pytest.mark.parametrize('name', ['quickstart.sh', 'run_tests.sh'])
def test_the_commands_are_sound_shell(name):
    script = ROOT / 'tools' / name
    process = subprocess.run(
        ['bash', '-n', str(script)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert 'set -euo pipefail' in script.read_text()
