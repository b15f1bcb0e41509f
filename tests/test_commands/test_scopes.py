"""Configs of any package that has registries train and are tested."""

import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from e3va_mm.commands import test, train
from tests.helpers import TINY
from tests.test_engine.test_hooks.tiny import side_path_config

RETINANET = 'rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota.py'
REGISTRY = """
from mmengine import registry
MODELS = registry.Registry(
    'model', parent=registry.MODELS, scope={name!r}, locations=['{name}.all'])
DATASETS = registry.Registry(
    'dataset', parent=registry.DATASETS, scope={name!r},
    locations=['{name}.all'])
METRICS = registry.Registry(
    'metric', parent=registry.METRICS, scope={name!r},
    locations=['{name}.all'])
"""
ALL = """
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch.utils.data import Dataset
from {name}.registry import DATASETS, METRICS, MODELS

@MODELS.register_module()
class Depths(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = torch.nn.Conv2d(256, 1, 1)

    def forward(self, inputs, mode='tensor', **kwargs):
        depths = self.head(self.backbone(torch.stack(inputs))[-1])
        if mode == 'loss':
            return dict(loss=depths.square().mean())
        return [*depths]

@DATASETS.register_module()
class Noise(Dataset):
    metainfo = dict()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        return dict(inputs=torch.randn(3, 64, 64))

@METRICS.register_module()
class Mean(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(each.mean()) for each in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))
"""
CONFIG = """
default_scope = {name!r}
model = dict(
    type='Depths',
    backbone=dict(
        type='e3va_mm.E3VASwinTransformer', allow_random_trunk=True, **{tiny}))
train_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='Noise'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='pseudo_collate'))
val_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(type='Noise'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='pseudo_collate'))
val_evaluator = dict(type='Mean')
test_dataloader, test_evaluator = val_dataloader, val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg, test_cfg = dict(), dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
work_dir = {work!r}
"""


def test_a_package_of_ones_own(tmp_path, monkeypatch, capsys):
    name = 'depths_of_a_test'
    package = tmp_path / name
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / 'registry.py').write_text(REGISTRY.format(name=name))
    (package / 'all.py').write_text(ALL.format(name=name))
    config, work = tmp_path / 'config.py', tmp_path / 'work'
    config.write_text(CONFIG.format(name=name, tiny=TINY, work=str(work)))
    assert train.main([str(config)]) == 1
    printed = capsys.readouterr().err
    assert f'is a config of {name}, which is not installed' in printed

    monkeypatch.syspath_prepend(tmp_path)
    assert train.main([str(config)]) == 0
    assert test.main([str(config), str(work / 'epoch_1.pth')]) == 0
    assert 'mean: ' in capsys.readouterr().out
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


def _make_dota(folder, name, count=4):
    """Images with an oblong each, turned, and its corners in a text file."""
    random = np.random.default_rng(0)
    images, labels = folder / name / 'images', folder / name / 'annfiles'
    images.mkdir(parents=True)
    labels.mkdir()
    for index in range(count):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f'{index}.png')
        line = '20 12 52 28 44 44 12 28 plane 0'
        (labels / f'{index}.txt').write_text(line)


def test_a_rotated_detector(tmp_path):
    mmrotate = pytest.importorskip('mmrotate')
    _make_dota(tmp_path, 'train')
    _make_dota(tmp_path, 'val', 2)
    config = Config.fromfile(
        Path(mmrotate.__file__).parent / '.mim' / 'configs' / RETINANET
    )
    for name in ('train', 'val', 'test'):
        loader = config[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root=str(tmp_path / name.replace('test', 'val')),
            ann_file='annfiles/',
            data_prefix=dict(img_path='images/'),
            test_mode=name != 'train',
        )
        for step in loader.dataset.pipeline:
            if 'scale' in step:
                step.scale = (64, 64)
    config.test_dataloader = config.val_dataloader
    config.test_evaluator = config.val_evaluator
    config.train_cfg.max_epochs = 1
    config.work_dir = str(tmp_path / 'work')
    config.custom_hooks = [
        dict(type=f'e3va_mm.{name}Hook')
        for name in ('DatasetCheck', 'TrainingGuard', 'AdapterCheckpoint')
    ]
    base = tmp_path / 'base.py'
    config.dump(base)
    config, _, _ = side_path_config(
        tmp_path,
        base,
        'neck=dict(in_channels=[32, 64, 128, 256], out_channels=32), '
        'bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1), '
        'test_cfg=dict(score_thr=0., max_per_img=20)',
    )
    assert train.main([str(config)]) == 0
    adapter = tmp_path / 'work' / 'adapter_epoch_1.safetensors'
    assert test.main([str(config), str(adapter)]) == 0
