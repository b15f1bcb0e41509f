import pytest
import torch

from tests.test_sweep import runs as tiny

LR = 'optim_wrapper.optimizer.lr'
SEED = 'randomness.seed'
RANK = 'model.backbone.tuner'


@pytest.mark.parametrize('kind', ['detection', 'segmentation'])
def test_each_run_gives_what_it_gives_alone(kind, tmp_path, monkeypatch):
    path = getattr(tiny, kind)(tmp_path, steps=20, n=10, val=20)
    options = dict(
        a={LR: 1e-3, SEED: 0},
        b={LR: 1e-2, SEED: 1},
        c={LR: 1e-2, SEED: 0, RANK: dict(type='E3VAMix', rank=4)},
    )
    configs = tiny.runs(path, tmp_path / 'together', **options)
    losses, batches, ended = tiny.trained(configs, monkeypatch)
    assert ended == {}
    assert losses['a'] != losses['b']
    apart = tiny.runs(path, tmp_path / 'apart', **options)
    for name, config in apart.items():
        config.custom_hooks = config.custom_hooks[:-1]
        expected = tiny.alone(config, batches)
        assert len(expected) == 20
        assert losses[name] == pytest.approx(expected, rel=1e-5)
