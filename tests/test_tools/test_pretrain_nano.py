import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from e3va_mm.datasets.digits import digit_partition
from e3va_mm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    kind: ROOT / f'e3va_mm/assets/{kind}_nano_digits.safetensors'
    for kind in ('swin', 'vit')
}
TINY = dict.fromkeys(SHIPPED, ((0.5, 2, 56, (24, 50)), (1, 3, 64, (24, 60))))


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'pretrain_nano', ROOT / 'tools/pretrain_nano.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(SHIPPED))
def kind(request):
    if request.param == 'vit':
        pytest.importorskip('mmpretrain')
    return request.param


def new_model(tool, kind='swin'):
    torch.manual_seed(0)
    return tool.DenseClassifier(kind)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


def test_samples_come_from_pretrain_and_some_are_held_out(tool):
    used, held_out = tool.split_samples()
    assert not set(used) & set(held_out)
    assert set(used) | set(held_out) == set(digit_partition()['pretrain'])
    assert 5 < len(used) / len(held_out) < 5.2


def test_batch_covers_the_digit_with_its_class(tool):
    from sklearn.datasets import load_digits

    sample = int(tool.split_samples()[0][0])
    images, cover, digits = tool.make_batch(
        range(4), [sample], 56, (24, 50), seed=0
    )
    assert images.shape == (4, 3, 56, 56) and cover.shape == (4, 11, 56, 56)
    assert -3 < images.min() < images.max() < 3
    assert torch.equal(cover.sum(1), torch.ones(4, 56, 56))
    assert digits.tolist() == [load_digits().target[sample]] * 4
    share = cover[:, digits[0]].mean((1, 2))
    assert torch.equal(
        cover[:, :-1].sum((1, 2, 3)), cover[:, digits[0]].sum((1, 2))
    )
    assert (share > 0.03).all() and (share < 0.9).all()


def test_loss_wants_the_covered_share_of_each_cell(tool):
    cover = torch.zeros(1, 11, 8, 8)
    cover[:, 4, :, :2] = 1
    cover[:, 10, :, 2:] = 1
    targets = torch.full((1, 11, 2, 2), -20.0)
    targets[:, 10] = 0
    # The left cells are half a 4 and half background, of weight 0.5.
    losses = {}
    for logit in (-1.0, 0.0, 1.0):
        targets[:, 4, :, 0] = logit
        losses[logit] = tool.dense_loss([targets], cover).item()
    log2 = np.log(2)
    assert losses[0.0] == pytest.approx(
        (0.5 * log2 + 0.25 * log2) / 2, abs=1e-6
    )
    assert losses[-1.0] > losses[0.0] > losses[1.0] - 0.05


def test_learning_rate_is_one_cycle(tool):
    rates = [tool.learning_rate(i, 100, 1e-3) for i in range(100)]
    assert np.argmax(rates) in (14, 15)
    assert max(rates) == pytest.approx(1e-3, rel=2e-3)
    assert np.all(np.diff(rates[:15]) > 0) and np.all(np.diff(rates[16:]) < 0)
    assert rates[-1] < 5e-6


def test_loss_falls_and_every_parameter_moves(
    tool, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(tool, 'PHASES', {kind: ((1, 8, 56, (24, 50)),)})
    numbers = range(tool.HELD_OUT, tool.HELD_OUT + 24)
    samples = tool.split_samples()[1]
    images, cover, _ = tool.make_batch(numbers, samples, 56, (24, 50), seed=0)
    model, start = new_model(tool, kind), new_model(tool, kind)
    tool.train(model, 14, 0, 1e-3, tmp_path / 's.pt')
    with torch.no_grad():
        before = tool.dense_loss(start(images), cover)
        after = tool.dense_loss(model(images), cover)
    assert after < 0.8 * before
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_resume_is_exact(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'PHASES', TINY)
    monkeypatch.setattr(tool, 'SAVE_EVERY', 2)
    options = dict(steps=6, seed=3, peak=1e-3)
    whole = new_model(tool)
    tool.train(whole, state_path=tmp_path / 'a.pt', **options)

    make_batch, calls = tool.make_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make_batch(*args)

    monkeypatch.setattr(tool, 'make_batch', interrupted)
    state = tmp_path / 'b.pt'
    with pytest.raises(KeyboardInterrupt):
        tool.train(new_model(tool), state_path=state, **options)
    assert sorted(os.listdir(tmp_path)) == ['a.pt', 'b.pt']
    torch.manual_seed(99)
    resumed = tool.DenseClassifier()
    assert len(tool.train(resumed, state_path=state, **options)) == 4
    assert 'resuming after step 2' in capsys.readouterr().out
    assert equal(whole, resumed)
    losses = tool.train(new_model(tool), 2, 1, 1e-3, state)
    assert len(losses) == 2
    assert 'starting anew' in capsys.readouterr().out


def test_accuracy_counts_named_digits(tool, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(tool, 'PHASES', TINY)
    samples = tool.split_samples()[1][:30]

    class Always(torch.nn.Module):
        kind = 'swin'

        def forward(self, images):
            logits = torch.zeros(len(images), 11, 2, 2)
            logits[:, 3] = 1
            logits[:, 10] = 9  # the background is no digit
            return [-logits, logits]

    share = np.mean(load_digits().target[samples] == 3)
    assert 0 < share < 1
    assert tool.accuracy(Always(), samples, 0) == pytest.approx(share)


def check_file(path, tool, kind='swin'):
    assert path.stat().st_size <= dict(swin=6_000_000, vit=3_000_000)[kind]
    weights = load_file(path)
    trunk = tool.build_trunk(kind)
    assert set(weights) == {f'backbone.{k}' for k in trunk.state_dict()}
    norms = dict(swin=[f'norm{i}' for i in range(4)], vit=['ln1'])[kind]
    assert {f'backbone.{norm}.weight' for norm in norms} < set(weights)
    for key, x in weights.items():
        if x.is_floating_point():
            assert x.dtype == torch.float16 and x.isfinite().all(), key
    trunk.load_state_dict(
        {k.removeprefix('backbone.'): x for k, x in weights.items()},
        strict=True,
    )
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
    assert set(metadata) == {'task', 'seed', 'torch', 'accuracy', 'command'}
    return trunk, metadata


def test_main_writes_a_loadable_file(
    tool, kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tool, 'PHASES', TINY)
    monkeypatch.setattr(
        tool,
        'split_samples',
        lambda f=tool.split_samples: (f()[0], f()[1][:10]),
    )
    out = tmp_path / 'new' / 'w.safetensors'
    # The Swin is what is trained where nothing is said.
    choice = dict(swin=[], vit=['--trunk', 'vit'])[kind]
    tool.main([*choice, '--out', str(out), '--steps', '2', '--seed', '5'])
    assert os.listdir(out.parent) == ['w.safetensors']
    _, metadata = check_file(out, tool, kind)
    assert metadata['command'] == ' '.join(
        [
            'python tools/pretrain_nano.py',
            *choice,
            '--steps 2 --seed 5 --lr 0.001',
        ]
    )
    assert '10 held-out digit samples' in metadata['accuracy']
    assert 'named correctly (chance: 10 %)' in capsys.readouterr().out


def test_options(tool):
    with pytest.raises(ConfigError, match='--out ending in .safetensors'):
        tool.main(['--out', 'w.pth'])
    with pytest.raises(ConfigError, match='Expected --steps of at least 1'):
        tool.main(['--steps=0'])
    assert tool.parse_args([]).out == SHIPPED['swin']
    assert tool.parse_args(['--trunk', 'vit']).out == SHIPPED['vit']


def probe(tool, trunk):
    """Name held-out digits by the nearest mean feature of the last map."""
    trunk.eval()
    used, held_out = tool.split_samples()

    def features(numbers, samples):
        images, cover, digits = tool.make_batch(
            numbers, samples, 112, (36, 72), seed=0
        )
        with torch.no_grad():
            x = trunk(images)[-1]
        box = torch.nn.functional.adaptive_avg_pool2d(
            1 - cover[:, -1:], x.shape[-2:]
        )
        x = (x * box).sum((2, 3)) / box.sum((2, 3))
        return torch.nn.functional.normalize(x, dim=1), digits

    x, digits = features(range(100), used)
    means = torch.stack([x[digits == d].mean(0) for d in range(10)])
    x, digits = features(range(tool.HELD_OUT, tool.HELD_OUT + 60), held_out)
    return ((x @ means.T).argmax(1) == digits).float().mean().item()


def test_shipped_weights_know_digits(tool, kind):
    trunk, metadata = check_file(SHIPPED[kind], tool, kind)
    stated = float(metadata['accuracy'].split()[0])
    assert stated > dict(swin=0.5, vit=0.4)[kind]
    torch.manual_seed(0)
    untrained = tool.build_trunk(kind)
    untrained.init_weights()
    assert probe(tool, untrained) < 0.3
    assert probe(tool, trunk) > stated - 0.2
