"""DDP without ``find_unused_parameters``, and FSDP.

Freezing is complete and early.
"""

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from tests.helpers import build_e3va, randomised
from tests.ranks import WORLD, run_ranks
from tests.trunk_cases import CASES, build_ours, need

MODES = list(TAP_CODECS)


def work(rank, which, folder):
    torch.manual_seed(0)
    if isinstance(which, str):
        backbone = build_ours(which)
    else:
        backbone = build_e3va(out_indices=which)
    backbone.init_weights()
    model = DistributedDataParallel(backbone)
    model.train()
    optimizer = torch.optim.SGD(
        [p for p in backbone.parameters() if p.requires_grad], lr=0.1
    )
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        image = torch.randn(1, 3, 64, 64, generator=generator)
        loss = sum(
            output.square().mean() * (1 + i)
            for i, output in enumerate(model(image))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(backbone.side_path.state_dict(), f'{folder}/{rank}.pt')


@pytest.mark.parametrize(
    'which', [(0, 1, 2, 3), (1, 2), 'dinov2', 'mit'], ids=str
)
def test_ranks_train_together(which, tmp_path):
    """Swin by its outputs, others by their names."""
    if isinstance(which, str):
        need(CASES[which])
    run_ranks(work, tmp_path, which, tmp_path)
    first, second = (torch.load(tmp_path / f'{r}.pt') for r in range(WORLD))
    assert first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first['stages.1.0.attn.up.q'].any()


def drawn_backbone(mode):
    backbone = build_e3va(side_path=dict(save_taps=mode), depths=(1, 1, 2, 1))
    backbone.init_weights()
    randomised(backbone.side_path, 1)
    return backbone.train()


def image_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1, 3, 51, 75, generator=generator)


def loss_of(outputs):
    """Weighs every value of every map."""
    loss = 0.0
    for output in outputs:
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(output.shape, generator=generator)
        loss = loss + (output * noise).mean()
    return loss


def taken(model):
    return {
        name.replace('_fsdp_wrapped_module.', ''): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def through_ddp(backbone, rank):
    model = DistributedDataParallel(backbone)
    for _ in range(2):  # buckets are arranged anew after the first
        model.zero_grad()
        loss_of(model(image_of(rank))).backward()
    return taken(backbone)


def through_fsdp(backbone, rank):
    """Blocks are units of their own; all that trains is in the root."""
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    block = type(backbone.stages[0].blocks[0])
    model = FullyShardedDataParallel(
        backbone,
        auto_wrap_policy=ModuleWrapPolicy({block}),
        use_orig_params=True,
        device_id=torch.device('cpu'),
    )
    assert len(FullyShardedDataParallel.fsdp_modules(model)) == 1 + 5
    for _ in range(2):
        model.zero_grad()
        loss_of(model(image_of(rank))).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        gradients = taken(model)
    # The root is one tensor, so what is frozen in it has a gradient: zero.
    assert not any(gradients[n].any() for n in set(gradients) - set(trained))
    return {name: gradients[name] for name in trained}


WRAPPERS = dict(ddp=through_ddp, fsdp=through_fsdp)


def compare(rank, wrapper, folder):
    torch.manual_seed(0)
    found = {}
    for mode in MODES:
        backbone = drawn_backbone(mode)
        loss = sum(loss_of(backbone(image_of(r))) for r in range(WORLD))
        (loss / WORLD).backward()
        expected = taken(backbone)
        backbone.zero_grad()
        found[mode] = WRAPPERS[wrapper](backbone, rank), expected
    if rank == WORLD - 1:
        torch.save(found, f'{folder}/gradients.pt')


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_gradients_are_the_mean_of_the_ranks(wrapper, tmp_path):
    """Whatever is kept for backward; each rank has a picture of its own."""
    if wrapper == 'fsdp' and TorchVersion(torch.__version__) < (2, 6):
        pytest.skip('gloo scatters no sums in this version of torch')
    run_ranks(compare, tmp_path, wrapper, tmp_path)
    found = torch.load(tmp_path / 'gradients.pt')
    assert list(found) == MODES
    for mode, (got, expected) in found.items():
        assert got.keys() == expected.keys()
        for name, target in expected.items():
            error = (got[name] - target).norm() / target.norm()
            assert error < 1e-6, (mode, name, error)
