"""DDP of two ranks, without ``find_unused_parameters``."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from tests.helpers import build_e3va, randomised
from tests.ranks import WORLD, run_ranks
from tests.trunk_cases import build_ours, flat

INSIDE = (
    'Full',
    'BitFit',
    'NormTuning',
    'Partial',
    'Adapter',
    'LoRA',
    'AdaptFormer',
    'LoRand',
)
SWINS = {
    **{f'keeps {m}': dict(tuner=dict(save_taps=m)) for m in TAP_CODECS},
    **{kind: dict(tuner=dict(type=kind)) for kind in INSIDE},
    'Mona': dict(tuner=dict(type='Mona', dropout=0.0)),
    'E3VAMix': dict(tuner=dict(type='E3VAMix')),
    'two outputs': dict(out_indices=(1, 2)),
}
NAMES = [*SWINS, 'dinov2', 'mit']


def build(name):
    if name in SWINS:
        ours = build_e3va(drop_path_rate=0.0, **SWINS[name])
    else:
        ours = build_ours(name)
    return randomised(ours, 1).train()


def loss_of(model, rank):
    """Weighs every value of every map of an image of the rank's own."""
    generator = torch.Generator().manual_seed(rank)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    return sum(
        (o * torch.randn(o.shape, generator=generator)).mean()
        for o in flat(model(image))
    )


def gradients(backbone):
    return torch.cat(
        [p.grad.flatten() for p in backbone.parameters() if p.requires_grad]
    )


def work(rank, folder):
    """The error of the gradients against the mean of both ranks'."""
    found = {}
    for name in NAMES:
        backbone = build(name)
        for each in range(WORLD):
            (loss_of(backbone, each) / WORLD).backward()
        expected = gradients(backbone)
        assert expected.any()
        model = DistributedDataParallel(backbone)
        for _ in range(3):  # one that is unused is found at the second
            model.zero_grad()
            loss_of(model, rank).backward()
        error = gradients(backbone) - expected
        found[name] = (error.norm() / expected.norm()).item()
    torch.save(found, f'{folder}/{rank}.pt')


@pytest.fixture(scope='module')
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    run_ranks(work, folder, folder)
    return [torch.load(folder / f'{rank}.pt') for rank in range(WORLD)]


@pytest.mark.parametrize('name', NAMES)
def test_gradients_are_the_mean_of_the_ranks(name, errors):
    assert all(each[name] < 1e-5 for each in errors)
