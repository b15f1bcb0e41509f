"""Classifiers of mmpretrain through the commands."""

import pickle
import textwrap

import cv2
import numpy as np
import pytest

from e3va_mm.commands import test, train

pytest.importorskip('mmpretrain')

CONFIG = """
_base_ = []
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type={kind!r},
        side_path=dict(rank=4),
        allow_random_trunk=True,
        {arguments}),
    {neck}
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32))
data_preprocessor = dict(num_classes=2, mean=[128.] * 3, std=[60.] * 3)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32),
    dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root='data', data_prefix='',
        with_label=True, pipeline=pipeline))
val_dataloader = dict(
    train_dataloader, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=4)
val_cfg = test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=1.))
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=4),
    visualization=dict(type='VisualizationHook'))
visualizer = dict(type='UniversalVisualizer')
randomness = dict(seed=0)
"""
VIT = """arch=dict(embed_dims=32, num_layers=2, num_heads=2,
        feedforward_channels=64), img_size=32, patch_size=8"""
TRUNK = """trunk=dict(type='mmpretrain.ConvNeXt', out_indices=(2, ),
        arch=dict(depths=[1, 1, 1], channels=[16, 16, 32]))"""


@pytest.mark.parametrize(
    'kind, arguments',
    [
        ('e3va_mm.E3VAVisionTransformer', VIT),
        ('e3va_mm.E3VABackbone', TRUNK),
    ],
    ids=['vit', 'convnext'],
)
def test_train_and_test_a_classifier(
    tmp_path, monkeypatch, capfd, kind, arguments
):
    generator = np.random.default_rng(0)
    for value, name in ((60, 'dark'), (190, 'light')):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(6):
            image = generator.normal(value, 20, (32, 32, 3)).clip(0, 255)
            cv2.imwrite(
                str(tmp_path / 'data' / name / f'{i}.png'),
                image.astype(np.uint8),
            )
    config = tmp_path / 'classifier.py'
    config.write_text(
        textwrap.dedent(CONFIG).format(kind=kind, arguments=arguments, neck='')
    )
    monkeypatch.chdir(tmp_path)
    config = str(config)
    assert train.main([config]) == 0
    assert 'accuracy/top1: 100.0' in capfd.readouterr().out
    tested = [config, 'work_dirs/classifier/epoch_4.pth']
    out = ['--out', 'predictions.pkl', '--show-dir', 'drawn']
    assert test.main([*tested, *out]) == 0
    assert 'accuracy/top1: 100.0' in capfd.readouterr().out
    with open('predictions.pkl', 'rb') as file:
        assert len(pickle.load(file)) == 12
    assert list((tmp_path / 'drawn').rglob('*.png'))
    assert test.main([*tested, '--tta']) == 0
