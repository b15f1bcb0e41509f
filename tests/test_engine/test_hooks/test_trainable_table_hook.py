import types

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from e3va_mm.engine.hooks import TrainableTableHook
from tests.helpers import SWIN, build_e3va, build_stock
from tests.test_engine.test_hooks.tiny import detection_config, make_coco


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(10, 10)
        self.neck.bias.requires_grad_(False)
        self.head = nn.Linear(10, 5)
        self.head.shared = self.neck.weight


class Logger:
    def info(self, text):
        self.text = text


def run(model):
    hook = TrainableTableHook()
    runner = types.SimpleNamespace(model=model, logger=Logger())
    hook.before_train(runner)
    return hook, runner.logger.text


@pytest.mark.parametrize(
    'size, trainable, total, share',
    [
        ('b', 1_195_008, 86_745_016, '1.38'),
        ('l', 1_792_512, 194_998_164, '0.92'),
    ],
)
def test_share_is_of_the_stock_backbone(size, trainable, total, share):
    hook, text = run(Detector(build_e3va(**SWIN[size])))
    assert hook.backbone[1:] == (total, trainable)
    assert (
        f'Trainable in the backbone: {trainable:,} of {total:,} stock '
        f'parameters ({share} %)'
    ) in text


def test_a_row_for_each_part_counts_each_parameter_once():
    model = Detector(build_e3va())
    hook, text = run(model)
    stock = sum(p.numel() for p in build_stock().parameters())
    side = sum(p.numel() for p in model.backbone.side_path.parameters())
    norms = 2 * 32 * (1 + 2 + 4 + 8)
    assert hook.parts == [
        ('backbone (trunk)', stock - norms, 0),
        ('backbone (side path)', side, side),
        ('backbone (output norms)', norms, norms),
        ('neck', 110, 100),
        ('head', 55, 55),
    ]
    assert hook.model[1:] == (stock + side + 165, side + norms + 155)
    assert hook.model.total == sum(p.numel() for p in model.parameters())
    row = [
        cell.strip()
        for line in text.splitlines()
        if 'neck' in line
        for cell in line.strip('|').split('|')
    ]
    assert row == ['neck', '110', '100', '90.91 %']


def test_stock_backbones_and_other_models():
    hook, text = run(Detector(build_stock()))
    assert [part.name for part in hook.parts] == ['backbone', 'neck', 'head']
    assert '(100.00 %)' in text

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.scale = nn.Parameter(torch.ones(3))
    hook, text = run(model)
    assert hook.parts == [('0', 6, 6), ('(own)', 3, 3)]
    assert 'backbone' not in text


def test_stock_runner_logs_plain_text(tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '20')
    monkeypatch.setenv('FORCE_COLOR', '1')
    make_coco(tmp_path, 'train')
    config = Config.fromfile(
        detection_config(
            tmp_path,
            val_dataloader=None,
            val_cfg=None,
            val_evaluator=None,
            custom_hooks=[dict(type='e3va_mm.TrainableTableHook')],
        )
    )
    Runner.from_cfg(config).train()
    (log,) = tmp_path.glob('work/*/*.log')
    log = log.read_text()
    assert '\x1b' not in log
    table = log[log.index('Trainable parameters\n') :].splitlines()[1:]
    end = next(i for i, line in enumerate(table) if 'in the model' in line)
    assert [len(line) for line in table[: end - 1]] == [79] * (end - 1)
    for part in ('backbone', 'neck', 'rpn_head', 'roi_head'):
        assert sum(line.startswith(f'| {part} ') for line in table) == 1
