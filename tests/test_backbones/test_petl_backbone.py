"""Loading, modes and files of a backbone with a method inside."""

import copy

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.weights import adapter_of, read_adapter, trunk_records
from tests.helpers import TINY, build_stock, randomised
from tests.ranks import WORLD, run_ranks
from tests.trunk_cases import CASES

METHODS = (
    'Full',
    'BitFit',
    'NormTuning',
    'Partial',
    'Adapter',
    'LoRA',
    'AdaptFormer',
    'LoRand',
    'Mona',
)
IMAGE = (1, 3, 64, 64)


def build(kind='LoRA', **kwargs):
    return MODELS.build(
        {
            'type': 'e3va_mm.PETLSwinTransformer',
            'method': dict(type=f'e3va_mm.{kind}'),
            'allow_random_trunk': True,
            **TINY,
            **kwargs,
        }
    )


@pytest.fixture
def stock_file(tmp_path):
    stock = randomised(build_stock())
    state = {f'backbone.{k}': v for k, v in stock.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'stock.pth')
    return stock.state_dict(), tmp_path / 'stock.pth'


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


@pytest.mark.parametrize('kind', ['Full', 'BitFit', 'LoRA'])
def test_weights_arrive_whole_from_a_stock_file(kind, stock_file):
    state, path = stock_file
    ours = build(kind, init_cfg=pretrained(path), allow_random_trunk=False)
    ours.init_weights()
    found = ours.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    ours.train()(torch.randn(IMAGE))
    assert ours.trunk_address == str(path)


@pytest.mark.parametrize('kind', ['Full', 'BitFit', 'LoRA'])
@pytest.mark.parametrize('part', ['weight', 'bias'])
def test_a_part_that_is_missing_is_an_error(kind, part, stock_file, tmp_path):
    state, _ = stock_file
    state = dict(state)
    del state[f'stages.1.blocks.0.attn.w_msa.qkv.{part}']
    torch.save(state, tmp_path / 'part.pth')
    ours = build(kind, init_cfg=pretrained(tmp_path / 'part.pth'))
    with pytest.raises(CheckpointError, match='1 missing in the file'):
        ours.init_weights()


def test_a_random_trunk_does_not_train():
    ours = build(allow_random_trunk=False)
    ours.init_weights()
    with pytest.raises(ConfigError, match='Expected pre-trained weights'):
        ours.train()(torch.randn(IMAGE))
    ours.eval()(torch.randn(IMAGE))


def test_frozen_stages_do_nothing_and_say_so(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'e3va_mm.backbones.stock_arguments.print_log',
        lambda message, **_: lines.append(message),
    )
    ours = build('Full', frozen_stages=3, drop_path_rate=0.2)
    assert all(p.requires_grad for p in ours.train().parameters())
    assert lines == [
        'frozen_stages: without effect on the frozen trunk of '
        'PETLSwinTransformer.'
    ]


def test_drop_path_is_that_of_the_stock_class():
    ours = build('LoRA', drop_path_rate=0.5)
    image = torch.randn(IMAGE)
    ours.train()
    assert not torch.equal(ours(image)[3], ours(image)[3])
    ours.eval()
    assert torch.equal(ours(image)[3], ours(image)[3])


def test_a_fixed_backbone_stays_in_eval_mode_and_has_no_graph():
    ours = build('Fixed', drop_path_rate=0.5).train()
    assert not any(
        m.training for _, c in ours.trunk_children() for m in c.modules()
    )
    assert not any(output.requires_grad for output in ours(torch.randn(IMAGE)))


@pytest.mark.parametrize('kind, train', [('LoRand', False), ('Full', True)])
def test_statistics_change_where_all_trains(kind, train):
    ours = MODELS.build(
        dict(
            type='e3va_mm.PETLBackbone',
            trunk=copy.deepcopy(CASES['mscan']),
            method=dict(type=f'e3va_mm.{kind}'),
            allow_random_trunk=True,
        )
    )
    ours.train()
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training == train for norm in norms)
    # So they go into adapter files, or stay with the trunk.
    kept = {key for key in ours.trunk_state() if 'running_mean' in key}
    assert bool(kept) != train


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_the_stock_class_is_that_of_the_scope(scope):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        ours = build()
    assert type(ours.stages[0].blocks[0]).__module__.startswith(scope)


def test_a_trunk_without_a_type_is_refused():
    with pytest.raises(ConfigError, match='`backbone.trunk` should be the'):
        MODELS.build(
            dict(type='e3va_mm.PETLBackbone', trunk={}, method=dict(type='x'))
        )


def test_nothing_is_built_past_the_last_output():
    ours = build('Adapter', out_indices=(0, 1))
    assert len(ours.stages) == 2
    assert len(ours(torch.randn(IMAGE))) == 2
    assert not hasattr(ours, 'norm2')
    assert ours.stages[1].downsample is None


class Model(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize('kind', METHODS)
def test_an_adapter_file_holds_what_trains_and_brings_it_back(
    kind, stock_file, tmp_path
):
    _, path = stock_file
    model = Model(build(kind, init_cfg=pretrained(path)))
    model.backbone.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path / 'adapter.safetensors'
    adapter_of(model, trunk_records(model)).write(file)
    held = {
        name
        for name in read_adapter(file).tensors
        if name.startswith('backbone.')
    }
    trained = {
        f'backbone.{name}'
        for name, p in model.backbone.named_parameters()
        if p.requires_grad
    }
    norms = {
        f'backbone.norm{i}.{p}' for i in range(4) for p in ('weight', 'bias')
    }
    if kind == 'Full':
        held -= {
            f'backbone.{name}' for name, _ in model.backbone.named_buffers()
        }
    assert held == trained | norms
    other = Model(build(kind))
    load_checkpoint(other, str(file))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def work(rank, folder):
    found = {}
    for kind in METHODS:
        torch.manual_seed(0)
        backbone = randomised(build(kind, drop_path_rate=0.0)).train()
        with torch.no_grad():
            for parameter in backbone.petl.parameters():
                parameter.mul_(5)
        model = DistributedDataParallel(backbone)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):  # one that is unused is found at the second
            image = torch.randn(IMAGE, generator=generator)
            backbone.zero_grad()
            loss = 0.0
            for output in model(image):
                noise = torch.randn(output.shape, generator=generator)
                loss = loss + (output * noise).sum()
            loss.backward()
        found[kind] = {
            name: p.grad
            for name, p in backbone.named_parameters()
            if p.requires_grad
        }
    torch.save(found, f'{folder}/{rank}.pt')


def test_processes_train_together(tmp_path):
    run_ranks(work, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f'{r}.pt') for r in range(WORLD))
    assert set(first) == set(METHODS)
    for kind, gradients in first.items():
        assert gradients
        for name, grad in gradients.items():
            assert grad.norm() > 0, (kind, name)
            assert torch.equal(grad, second[kind][name]), (kind, name)
