"""The config for data in VOC format trains and is tested as it is shown."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from e3va_mm.commands import test, train
from tests.test_engine.test_hooks.tiny import CLASSES

ROOT = Path(__file__).parents[2]
XML = """<annotation><size><width>64</width><height>48</height></size>
<object><name>{}</name><difficult>0</difficult><bndbox><xmin>8</xmin>
<ymin>8</ymin><xmax>40</xmax><ymax>36</ymax></bndbox></object></annotation>"""
FAST = """
train_cfg = dict(max_epochs=1, val_interval=1)
for _loader in (train_dataloader, val_dataloader, test_dataloader):
    _loader.update(num_workers=0, persistent_workers=False)
"""


def test_it_runs(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'data' / 'voc'
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(6):
        pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'JPEGImages/{index}.jpg')
        text = XML.format(CLASSES[index % 3])
        (folder / f'Annotations/{index}.xml').write_text(text)
    (folder / 'ImageSets/Main/train.txt').write_text('0\n1\n2\n3\n')
    (folder / 'ImageSets/Main/val.txt').write_text('4\n5\n')
    page = (ROOT / 'docs' / 'comparison.md').read_text()
    (shown,) = re.findall(r'```python\n([^`]*XMLDataset[^`]*)```', page)
    shown = shown.replace("'./retina", f"'{ROOT}/configs/retina")
    config = tmp_path / 'voc.py'
    config.write_text(shown + FAST)
    monkeypatch.chdir(tmp_path)
    assert train.main([str(config), '--work-dir', 'work']) == 0
    weights = Path('work/last_checkpoint').read_text()
    assert test.main([str(config), weights, '--work-dir', 'work']) == 0
    assert 'pascal_voc/mAP: ' in capsys.readouterr().out
