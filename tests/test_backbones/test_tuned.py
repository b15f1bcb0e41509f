"""What a tuned backbone promises, from its constructor to its last step."""

import copy
import pickle

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils import count_parameters
from tests.helpers import (
    SWIN,
    build_e3va,
    build_stock,
    e3va_and_stock,
    randomised,
)
from tests.trunk_cases import (
    awake,
    build_ours,
    flat,
    image_for,
    ours_and_stock,
)

TUNERS = dict(
    E3VA=dict(rank=4),
    E3VAMix=dict(rank=4, width=8),
    NoSidePath={},
    Frozen={},
    Full={},
    BitFit={},
    NormTuning={},
    Partial=dict(blocks=1),
    Adapter=dict(bottleneck=4),
    LoRA=dict(rank=4),
    AdaptFormer=dict(bottleneck=4),
    LoRand=dict(rank=4),
    Mona=dict(bottleneck=4),
)
ALL = [
    *(('swin', kind) for kind in TUNERS),
    ('vit', 'Mona'),
    ('dinov2', 'LoRA'),
    ('swin v2', 'E3VA'),
    ('convnext', 'Adapter'),
    ('pvtv2', 'E3VAMix'),
    ('mscan', 'E3VA'),  # has batch norms
    ('mscan', 'LoRand'),
]
every_tuner = pytest.mark.parametrize('trunk, kind', ALL)
IMAGE = (1, 3, 64, 64)


def build(trunk, kind, **kwargs):
    """A tuned backbone and the stock one with the same weights."""
    tuner = dict(type=kind, **TUNERS[kind])
    if trunk != 'swin':
        return ours_and_stock(trunk, tuner=tuner, **kwargs)
    return e3va_and_stock(tuner=tuner, drop_path_rate=0.0, **kwargs)


def image_of(trunk):
    # Odd sizes: padding in windows and in patch merging.
    return torch.randn(2, 3, 75, 50) if trunk == 'swin' else image_for(trunk)


def trained(backbone):
    return {n for n, p in backbone.named_parameters() if p.requires_grad}


def names_of_modules(backbone):
    return [n for n, _ in backbone.named_modules(remove_duplicate=False)]


@every_tuner
def test_it_begins_as_the_stock_backbone(trunk, kind):
    ours, stock = build(trunk, kind)
    ours.train(not ours.has_graph)
    image = image_of(trunk)
    with torch.no_grad():
        found, expected = flat(ours(image)), flat(stock(image))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    # Names stay the stock ones; the tuner is one child more.
    for names in (
        lambda backbone: backbone.state_dict(),
        lambda backbone: dict(backbone.named_parameters()),
        names_of_modules,
    ):
        own = {n for n in names(ours) if n.split('.')[0] != ours.child}
        assert own == set(names(stock))
    assert isinstance(ours, type(stock))


@every_tuner
def test_what_is_frozen_never_changes(trunk, kind):
    """By no bit, buffers included, while what is declared trains."""
    ours, _ = build(trunk, kind)
    declared = trained(ours.train())
    before = copy.deepcopy(ours.state_dict())
    image = image_of(trunk)
    targets = [torch.randn_like(o) for o in flat(ours(image))]
    for _ in range(3 if declared else 0):
        ours.zero_grad()
        outputs = flat(ours(image))
        torch.stack(
            [
                (o - t).square().mean()
                for o, t in zip(outputs, targets, strict=True)
            ]
        ).sum().backward()
        parameters = [p for p in ours.parameters() if p.requires_grad]
        torch.optim.AdamW(parameters, 1e-2, weight_decay=0.5).step()
    changed = {
        name
        for name, value in ours.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == declared == trained(ours)
    # Up projections start at zero, so that others learn from the second on.
    assert all(p.grad.any() for p in ours.declared())
    assert all(
        p.grad is None for p in ours.parameters() if not p.requires_grad
    )


def test_what_trains_is_decided_by_the_constructor():
    names = {n for n, _ in build_stock().named_parameters()}
    norms = {f'norm{i}.{p}' for i in range(4) for p in ('weight', 'bias')}
    for kind, expected in dict(
        E3VA=norms,
        NoSidePath=norms,
        Frozen=set(),
        Full=names,
        BitFit={n for n in names if n.endswith('.bias')},
        LoRA=set(),
    ).items():
        ours = build_e3va(tuner=dict(type=kind))
        own = {n for n in trained(ours) if n.startswith(f'{ours.child}.')}
        assert trained(ours) - own == expected, kind
        assert bool(own) == (kind in ('E3VA', 'LoRA'))
    ours = build_e3va(tuner=dict(train_output_norms=False))
    assert not trained(ours) & norms


@pytest.mark.parametrize(
    'size, kwargs, count',
    [
        ('t', {}, 440_064),
        ('b', {}, 1_195_008),
        ('l', {}, 1_792_512),
        ('l', dict(out_indices=(1, 2, 3)), 1_792_128),  # RetinaNet's
    ],
)
def test_trainable_counts_are_the_published_ones(
    size, kwargs, count, monkeypatch
):
    for draw in ('kaiming_uniform_', 'uniform_'):
        monkeypatch.setattr(nn.init, draw, lambda tensor, *_, **__: tensor)
    ours = build_e3va(**SWIN[size], **kwargs)
    assert count_parameters(ours)[1] == count


# -- modes -------------------------------------------------------------------


@pytest.mark.parametrize(
    'kind, follows',
    [
        ('E3VA', False),
        ('NoSidePath', False),
        ('Frozen', False),
        ('LoRA', True),
        ('Full', True),
    ],
)
def test_a_frozen_trunk_stays_in_eval_mode(kind, follows):
    ours = build_e3va(tuner=dict(type=kind))
    for mode in (True, False, True):
        nn.Sequential(ours).train(mode)
        assert ours.tuner.training is mode
        for _, child in ours.trunk_children():
            modes = {module.training for module in child.modules()}
            assert modes == {mode and follows}
    assert ours.train() is ours


@pytest.mark.parametrize('kind, whole', [('LoRand', False), ('Full', True)])
def test_statistics_change_where_all_trains(kind, whole):
    ours = build_ours('mscan', tuner=dict(type=kind)).train()
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.training for norm in norms} == {whole}
    # So they go into adapter files, or stay with the trunk.
    kept = [key for key in ours.trunk_state() if 'running_mean' in key]
    assert bool(kept) != whole


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(tuner=dict(trunk_drop_path=0.5)),
        dict(tuner=dict(type='LoRA'), drop_path_rate=0.5),
    ],
)
def test_drop_path_is_on_while_training_where_it_is_asked_for(kwargs):
    ours = build_e3va(**kwargs)
    image = torch.randn(2, 3, 64, 64)
    ours.train()
    assert not torch.equal(ours(image)[3], ours(image)[3])
    ours.eval()
    assert torch.equal(ours(image)[3], ours(image)[3])


@pytest.mark.parametrize('kind', ['E3VA', 'LoRA'])
def test_a_random_trunk_does_not_train(kind):
    ours = build_e3va(tuner=dict(type=kind), allow_random_trunk=False)
    ours.init_weights()
    image = torch.randn(IMAGE)
    with pytest.raises(ConfigError, match='it is random: neither `init_cfg`'):
        ours.train()(image)
    ours.eval()(image)
    ours.load_state_dict(build_stock().state_dict(), strict=False)
    ours.train()(image)


# -- outputs -----------------------------------------------------------------


@pytest.mark.parametrize('kind', ['E3VA', 'Adapter'])
@pytest.mark.parametrize('out_indices', [(0,), (1, 2), (0, 3), [2, 0]])
def test_any_subset_of_outputs(kind, out_indices):
    ours, stock = build('swin', kind, out_indices=out_indices)
    image = torch.randn(1, 3, 75, 50)
    with torch.no_grad():
        expected = [stock(image)[i] for i in sorted(out_indices)]
    outputs = ours.train()(image)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    # Nothing is left behind the last.
    assert len(ours.stages) == max(out_indices) + 1
    assert not hasattr(ours, f'norm{max(out_indices) + 1}')
    assert ours.stages[-1].downsample is None
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for name, parameter in ours.named_parameters():
        # DDP would wait for ever.
        assert (parameter.grad is None) != parameter.requires_grad, name


@pytest.mark.parametrize('out_indices', [(), (4,), (-1,)])
def test_impossible_outputs_are_refused(out_indices):
    with pytest.raises(ConfigError, match='out_indices.* should name some of'):
        build_e3va(out_indices=out_indices)


@pytest.mark.parametrize('size', [(80, 48), (70, 100), (16, 16)])
@pytest.mark.parametrize(
    'name', ['vit', 'dinov2-g', 'eva02', 'sam', 'mmseg vit']
)
def test_a_vit_takes_any_size_that_the_stock_class_takes(name, size):
    ours, stock = ours_and_stock(name)
    shapes = {key: value.shape for key, value in ours.named_buffers()}
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        for one, other in zip(
            flat(ours(image)), flat(stock(image)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Rotary embeddings are buffers; the stock class changes them.
    assert {k: value.shape for k, value in ours.named_buffers()} == shapes


# -- copies ------------------------------------------------------------------


def pickled(backbone):
    return pickle.loads(pickle.dumps(backbone))


@pytest.mark.parametrize('copied', [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    'trunk, kind',
    [
        ('swin', 'E3VA'),
        ('swin', 'LoRA'),
        ('swin', 'Mona'),
        ('swin', 'Partial'),
        ('dinov2', 'E3VA'),
        ('sam', 'E3VAMix'),
        ('mscan', 'Adapter'),
        ('pvtv2', 'E3VA'),
    ],
)
def test_a_copy_is_a_backbone_of_its_own(copied, trunk, kind):
    ours, _ = build(trunk, kind)
    awake(ours).eval()
    twin = copied(ours)
    image = image_of(trunk)
    with torch.no_grad():
        before = flat(ours(image))
        for one, other in zip(flat(twin(image)), before, strict=True):
            assert torch.equal(one, other)
    assert type(twin) is type(ours)
    assert trained(twin) == trained(ours)
    # One owner: each module has one name, and the trunk reads this backbone.
    assert twin.trunk.stock is twin
    assert names_of_modules(twin) == names_of_modules(ours)
    shared = {id(p) for p in ours.parameters()}
    assert not shared & {id(p) for p in twin.parameters()}
    # And it computes with its own weights, trains them alone.
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
        changed = flat(twin(image))
        assert not torch.allclose(changed[-1], before[-1])
        for one, other in zip(flat(ours(image)), before, strict=True):
            assert torch.equal(one, other)
    flat(twin.train()(image))[-1].square().sum().backward()
    assert all(p.grad is None for p in ours.parameters())
    assert any(p.grad is not None for p in twin.parameters())


def test_a_copy_loads_for_itself():
    ours, _ = e3va_and_stock()
    before = copy.deepcopy(ours.state_dict())
    twin = copy.deepcopy(ours)
    new = randomised(build_e3va(), seed=5).state_dict()
    twin.load_state_dict(new)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert torch.equal(twin.state_dict()[key], new[key]), key
