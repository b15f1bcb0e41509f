"""The documentation builds, and what it shows works.

Every config of a page is built and trained for a step, and every command and
script runs as it stands, in a folder with the repository's tools and configs
and a few small images in place of the data. A command runs once, on whichever
page it stands first; the scripts of tools/ run in this process.
"""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from safetensors.torch import save_file

from e3va_mm.backbones import TunedBackbone
from e3va_mm.datasets.digits import build_dataset
from e3va_mm.measure import TrainingStep
from e3va_mm.weights import read_checkpoint
from tests.test_configs import shrunk
from tests.test_engine.test_hooks.tiny import make_coco
from tests.tiny_bert import tiny_bert

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [
    *sorted(DOCS.glob('*.md')),
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
]
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.M | re.S)
# The configs that a page says to save its blocks as.
SAVED = re.compile(r'```python\n([^`]+)```\s+Save it as `(configs/\w+\.py)`')
MY_CONFIGS = [
    f'configs/my_{name}.py' for name in ('data', 'cells', 'maps', 'camvid')
]
# What several pages work with.
TRAINED = 'python tools/train.py configs/cascade_e3va_swin_nano_digits.py'
# Pages whose commands install or run for minutes; other tests run them.
NOT_RUN = ('README', 'CONTRIBUTING')
# What a page's commands print, as regular expressions.
SHOWN = dict(
    get_started=[
        'Trainable parameters',
        r'Epoch\(test\)',
        r'│ lora',
        r'mIoU: ',
        r'torch\.Size\(\[\d+, 4\]\)',
    ],
    # The trunk sees noise, in which there is nothing to find.
    own_data=[
        'fine: 0 errors and 0 warnings',
        r'Epoch\(test\)',
        r'work_dirs/found: \d+ images, 1 tasks',
    ],
    memory=['6 GB'],
    distributed=[r'Epoch\(test\)'],
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
        if kind in ('bash', 'python')
        and not is_config(kind, text)
        and not (kind == 'bash' and page.stem in NOT_RUN)
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
    make_voc(folder / 'path' / 'to' / 'BCCD', ('RBC', 'WBC', 'Platelets'))
    make_camvid(folder / 'path' / 'to' / 'camvid')
    saved = SAVED.findall((DOCS / 'own_data.md').read_text())
    assert [name for _, name in saved] == MY_CONFIGS
    for text, name in saved:
        assert len(text.strip().splitlines()) <= 10
        (folder / name).write_text(text)
    image = next((folder / 'data' / 'digits').rglob('*.jpg'))
    cv2.imwrite(str(folder / 'demo.jpg'), cv2.imread(str(image)))
    return folder


def make_voc(folder, classes):
    """Images of 64x48 with a box of each class, in VOC's layout."""
    make_coco(folder, 'JPEGImages', len(classes))
    objects = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>8</xmin><ymin>8</ymin>'
        '<xmax>32</xmax><ymax>28</ymax></bndbox></object>'
        for name in classes
    )
    size = '<size><width>64</width><height>48</height></size>'
    (folder / 'Annotations').mkdir()
    (folder / 'ImageSets' / 'Main').mkdir(parents=True)
    names = [path.stem for path in (folder / 'JPEGImages').iterdir()]
    for name in names:
        text = f'<annotation>{size}{objects}</annotation>'
        (folder / 'Annotations' / f'{name}.xml').write_text(text)
    for split in ('train', 'val'):
        text = '\n'.join(names)
        (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text(text)


def make_camvid(folder):
    """Images of 96x72 and maps of the classes 0 to 11."""
    for split in ('train', 'val'):
        make_coco(folder, split, 2)
        (folder / f'{split}annot').mkdir()
        for path in (folder / split).iterdir():
            cv2.imwrite(
                str(folder / f'{split}annot' / f'{path.stem}.png'),
                np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 12,
            )


@pytest.fixture(scope='module')
def run(folder):
    """Run a command line in the folder, once; its output if it succeeds."""
    outputs = {}

    def run(line):
        if line not in outputs:
            outputs[line] = _run(shlex.split(line), folder)
        return outputs[line]

    return run


def _run(command, folder):
    if command[0] == 'python' and command[1].startswith('tools/'):
        return _run_here(command[1:], folder)
    done = subprocess.run(
        [sys.executable if command[0] == 'python' else command[0]]
        + command[1:],
        cwd=folder,
        env=dict(os.environ, PYTHON=sys.executable),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def _run_here(command, folder):
    """Run a script of the tools in this process, as if it were the first."""
    out = io.StringIO()
    # Frameworks take the newest of these, whoever made it.
    DefaultScope._instance_dict.clear()
    Visualizer._instance_dict.clear()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        patch.chdir(folder)
        patch.setattr(sys, 'argv', command)
        patch.setattr(sys, 'path', list(sys.path))
        code = 0
        try:
            runpy.run_path(command[0], run_name='__main__')
        except SystemExit as end:
            code = end.code
    assert not code, out.getvalue()[-3000:]
    return out.getvalue()


@pytest.mark.skipif(
    not importlib.util.find_spec('sphinx')
    or not importlib.util.find_spec('myst_parser'),
    reason='needs sphinx and myst-parser',
)
def test_pages_build_without_a_warning(tmp_path):
    html = tmp_path / 'html'
    _run(['python', '-m', 'sphinx', '-W', '-q', str(DOCS), str(html)], ROOT)
    for page in DOCS.glob('*.md'):
        assert (html / f'{page.stem}.html').is_file()
    # Of each floor, a name that users meet.
    for page, name in dict(
        backbones='E3VASwinTransformer',
        tuners='LoRA',
        trunks='Layout',
        hooks='FreezeHook',
        weights='read_checkpoint',
        measure='TrainingStep',
        apis='MultiTaskInferencer',
    ).items():
        text = (html / 'api' / f'{page}.html').read_text()
        assert re.search(rf'id="e3va_mm\.[\w.]*\b{name}"', text), name


@pytest.mark.parametrize('text', CONFIGS)
def test_a_config_trains_a_step(text, folder, monkeypatch):
    path = folder / 'configs' / 'shown.py'
    path.write_text(text)
    monkeypatch.chdir(folder)
    config = Config.fromfile(path)
    if 'nano' not in text:
        config = shrunk(config)
    if 'language_model' in config.model:
        config.model.language_model.name = tiny_bert(folder)
    step = TrainingStep(config, 'as-is', size=(64, 64), batch=2, objects=3)
    assert isinstance(step.model.backbone, TunedBackbone)
    step.run()


@pytest.mark.parametrize('page', [page for page, runs in RUNS.items() if runs])
def test_what_a_page_runs(page, run, folder, monkeypatch):
    run(TRAINED)
    out = ''
    for kind, text in RUNS[page]:
        if kind == 'python':
            with (
                monkeypatch.context() as patch,
                contextlib.redirect_stdout(io.StringIO()) as printed,
            ):
                patch.chdir(folder)
                exec(compile(text, page, 'exec'), {'__name__': page})
            out += printed.getvalue()
        else:
            for line in text.strip().splitlines():
                out += run(line)
    for expected in SHOWN.get(page, ()):
        assert re.search(expected, out), expected


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    text = page.read_text()
    for name in re.findall(
        r'(?<![\w/])(?:tools|configs|benchmarks|docs|tests)/[\w/]+\.\w+', text
    ):
        assert (ROOT / name).exists() or name in MY_CONFIGS, name
