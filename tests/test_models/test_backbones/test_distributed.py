"""DDP without ``find_unused_parameters``: freezing is complete and early."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import build_e3va

WORLD = 2


def work(rank, port, out_indices, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=WORLD
    )
    torch.manual_seed(0)
    backbone = build_e3va(out_indices=out_indices)
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
    dist.destroy_process_group()


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2)])
def test_ranks_train_together(out_indices, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, out_indices, str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f'{r}.pt') for r in range(WORLD))
    assert first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first['stages.1.0.attn.up.q'].any()
