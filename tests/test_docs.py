"""The documentation builds, and what it shows works.

Every config of a page is built and trained for a step, every command runs as
it stands, in a folder with the repository's tools and configs and a few small
pictures in place of the data.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config
from safetensors.torch import save_file

from e3va_mm.datasets.digits import build_dataset
from e3va_mm.measure import TrainingStep
from e3va_mm.weights import read_checkpoint
from tests.test_configs import shrunk
from tests.test_engine.test_hooks.tiny import make_coco

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.M | re.S)
# The config that a page says to save its first block as.
MY_DATA = 'my_data'
# What a page's commands print, as regular expressions.
SHOWN = dict(
    get_started=[
        'Trainable parameters',
        r'Epoch\(test\)',
        r'│ frozen',
        r'mIoU: ',
        r'torch\.Size\(\[\d+, 4\]\)',
    ],
    # The trunk sees noise, in which there is nothing to find.
    own_data=[r'Epoch\(test\)'],
    memory=['6 GB'],
    distributed=[r'Epoch\(test\)'],
    migration=['lora'],
)


def blocks(page):
    """Language and text of the blocks of a page, in their order."""
    return BLOCK.findall(page.read_text())


def is_config(kind, text):
    return kind == 'python' and '_base_' in text


CONFIGS = [
    pytest.param(text, id=f'{page.stem}-{i}')
    for page in PAGES
    for i, (kind, text) in enumerate(blocks(page))
    if is_config(kind, text)
]
# What is run, in its order: one command needs what another has left.
RUNS = {
    page.stem: [
        (kind, text)
        for kind, text in blocks(page)
        if kind in ('bash', 'python') and not is_config(kind, text)
    ]
    for page in PAGES
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What a user of a page has before them."""
    folder = tmp_path_factory.mktemp('clone')
    for name in ('tools', 'e3va_mm'):
        (folder / name).symlink_to(ROOT / name)
    configs = folder / 'configs'
    configs.mkdir()
    for path in (ROOT / 'configs').iterdir():
        (configs / path.name).symlink_to(path)
    build_dataset(folder / 'data' / 'digits', train=4, val=1, test=1, size=96)
    for split in ('train', 'val'):
        make_coco(
            folder / 'path' / 'to' / 'my_data',
            split,
            classes=('cat', 'dog'),
            masks=True,
        )
    weights = read_checkpoint('e3va_mm://swin_nano_digits.safetensors')
    save_file(
        weights.get('state_dict', weights),
        folder / 'path' / 'to' / 'swin_nano.safetensors',
    )
    page = DOCS / 'own_data.md'
    assert f'configs/{MY_DATA}.py' in page.read_text()
    text = next(t for kind, t in blocks(page) if is_config(kind, t))
    assert len(text.strip().splitlines()) <= 10
    (configs / f'{MY_DATA}.py').write_text(text)
    picture = next((folder / 'data' / 'digits').rglob('*.jpg'))
    cv2.imwrite(str(folder / 'demo.jpg'), cv2.imread(str(picture)))
    return folder


def run(command, folder):
    """A command of a page; its output if it succeeds."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            'CUDA_VISIBLE_DEVICES': '',
            'PYTHON': sys.executable,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_there_is_something_to_try():
    assert len(CONFIGS) >= 10
    assert sum(map(bool, RUNS.values())) >= 6


@pytest.mark.skipif(
    not importlib.util.find_spec('sphinx')
    or not importlib.util.find_spec('myst_parser'),
    reason='needs sphinx and myst-parser',
)
def test_pages_build_without_a_warning(tmp_path):
    run(
        [sys.executable, '-m', 'sphinx', '-W', '-q', DOCS, tmp_path / 'html'],
        ROOT,
    )
    for page in PAGES:
        text = (tmp_path / 'html' / f'{page.stem}.html').read_text()
        assert 'side path' in text or page.stem == 'distributed'


@pytest.mark.parametrize('text', CONFIGS)
def test_a_config_trains_a_step(text, folder, monkeypatch):
    path = folder / 'configs' / 'shown.py'
    path.write_text(text)
    monkeypatch.chdir(folder)
    config = Config.fromfile(path)
    if 'nano' not in text:
        config = shrunk(config)
    step = TrainingStep(config, 'as-is', size=(64, 64), batch=2, objects=3)
    assert type(step.model.backbone).__name__.startswith(('E3VA', 'PETL'))
    step.run()


@pytest.mark.parametrize('page', [page for page, runs in RUNS.items() if runs])
def test_what_a_page_runs(page, folder):
    out = ''
    for kind, text in RUNS[page]:
        if kind == 'python':
            out += run([sys.executable, '-c', text], folder)
            continue
        for line in text.strip().splitlines():
            command = shlex.split(line)
            if command[0] == 'python':
                command[0] = sys.executable
            out += run(command, folder)
    for expected in SHOWN.get(page, ()):
        assert re.search(expected, out), expected


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    text = page.read_text()
    for name in re.findall(
        r'(?<![\w/])(?:tools|configs|benchmarks)/\w+\.\w+', text
    ):
        assert (ROOT / name).exists() or name == f'configs/{MY_DATA}.py', name
