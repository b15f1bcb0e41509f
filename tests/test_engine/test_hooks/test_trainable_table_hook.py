import torch
from torch import nn

from e3va_mm.engine.hooks.trainable_table_hook import trainable_table
from tests.helpers import SWIN, build_e3va, build_stock
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.toy import toy_config


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(10, 10)
        self.neck.bias.requires_grad_(False)
        self.head = nn.Linear(10, 5)
        self.head.shared = self.neck.weight


def rows(text):
    """Of the table: names with the numbers."""
    return {
        cells[0]: tuple(int(n.replace(',', '')) for n in cells[1:3])
        for line in text.splitlines()[3:]
        if line.startswith('| ')
        for cells in [[c.strip() for c in line.strip('|').split('|')]]
    }


def test_share_is_of_the_stock_backbone():
    text = trainable_table(Detector(build_e3va(**SWIN['b'])))
    assert (
        'Trainable in the backbone: 1,195,008 of 86,745,016 stock parameters '
        '(1.38 %)'
    ) in text


def test_a_row_for_each_part_counts_each_parameter_once():
    model = Detector(build_e3va())
    text = trainable_table(model)
    stock = sum(p.numel() for p in build_stock().parameters())
    side = sum(p.numel() for p in model.backbone.side_path.parameters())
    norms = 2 * 32 * (1 + 2 + 4 + 8)
    assert rows(text) == {
        'backbone (trunk)': (stock - norms, 0),
        'backbone (side path)': (side, side),
        'backbone (output norms)': (norms, norms),
        'neck': (110, 100),
        'head': (55, 55),
    }
    total, trained = stock + side + 165, side + norms + 155
    assert f'in the model: {trained:,} of {total:,} (' in text
    assert '90.91 %' in text


def test_stock_backbones_and_other_models():
    text = trainable_table(Detector(build_stock()))
    assert [*rows(text)] == ['backbone', 'neck', 'head']
    assert '(100.00 %)' in text

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.scale = nn.Parameter(torch.ones(3))
    text = trainable_table(model)
    assert rows(text) == {'0': (6, 6), '(own)': (3, 3)}
    assert 'backbone' not in text


def test_the_log_has_plain_text(tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '20')
    monkeypatch.setenv('FORCE_COLOR', '1')
    hook = dict(type='e3va_mm.TrainableTableHook')
    run(toy_config(custom_hooks=[hook]), tmp_path)
    (log,) = tmp_path.glob('*/*.log')
    log = log.read_text()
    assert '\x1b' not in log
    table = log[log.index('Trainable parameters\n') :].splitlines()[1:]
    end = next(i for i, line in enumerate(table) if 'in the model' in line)
    assert [len(line) for line in table[:end]] == [79] * end
