"""Every tuning method on every family of trunks."""

import copy
import functools

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.trunk_cases import (
    CASES,
    build_stock,
    drawn,
    flat,
    image_for,
    need,
    stock_outputs,
)

METHODS = {
    'full': dict(type='e3va_mm.Full'),
    'fixed': dict(type='e3va_mm.Fixed'),
    'bitfit': dict(type='e3va_mm.BitFit'),
    'norm': dict(type='e3va_mm.NormTuning'),
    'partial': dict(type='e3va_mm.Partial', blocks=1),
    'adapter': dict(type='e3va_mm.Adapter', bottleneck=4),
    'lora': dict(type='e3va_mm.LoRA', rank=4),
    'adaptformer': dict(type='e3va_mm.AdaptFormer', bottleneck=4),
    'lorand': dict(type='e3va_mm.LoRand', rank=2),
    'mona': dict(type='e3va_mm.Mona', bottleneck=4),
    'e3va': None,
}
TRUNKS = [
    'vit',
    'dinov2',
    'beit',
    'eva02',
    'sam',
    'mmseg vit',
    'swin of mmdet',
    'swin of mmseg',
    'swin',
    'swin v2',
    'convnext',
    'pvtv2',
    'mit',
    'svt',
    'mscan',
    'timm vit',
    'timm swin',
    'timm convnext',
]
NO_QKV = 'Expected linear layers named qkv'
OWN_BIAS = 'reads the weight itself'
WINDOWS = 'works on windows'
# What cannot be, and why.
EXCEPTIONS = {
    **{
        ('lora', trunk): NO_QKV
        for trunk in (
            'mmseg vit',
            'convnext',
            'pvtv2',
            'mit',
            'svt',
            'mscan',
            'timm convnext',
        )
    },
    ('lora', 'beit'): OWN_BIAS,
    ('lora', 'swin v2'): OWN_BIAS,
    **{
        (method, 'sam'): WINDOWS
        for method in ('adapter', 'adaptformer', 'lorand', 'mona')
    },
}
PAIRS = [(m, t) for m in METHODS for t in TRUNKS]
FINE = [pair for pair in PAIRS if pair not in EXCEPTIONS]
ADDING = ('adapter', 'lora', 'adaptformer', 'lorand', 'mona', 'e3va')
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def build(method, trunk, **kwargs):
    config = CASES[trunk]
    need(config)
    kind, tuning = 'PETLBackbone', dict(method=METHODS[method])
    if method == 'e3va':
        kind, tuning = 'E3VABackbone', dict(side_path=dict(rank=4))
    ours = MODELS.build(
        dict(
            type=f'e3va_mm.{kind}',
            trunk=dict(copy.deepcopy(config), **kwargs),
            allow_random_trunk=True,
            **copy.deepcopy(tuning),
        )
    )
    ours.init_weights()
    return ours


def build_loaded(method, trunk, stock=None):
    """One with the weights of a stock backbone."""
    ours = build(method, trunk)
    state = copy.deepcopy((stock or build_stock(trunk)).state_dict())
    ours.load_state_dict(state, strict=False)
    return ours


def added(ours):
    return ours.get_submodule(ours.ADDED)


def wake(ours):
    """Let what was added, which starts at zero, do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in added(ours).parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return ours


def loss_of(outputs, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (
            output.float() * torch.randn(output.shape, generator=generator)
        ).mean()
        for output in flat(outputs)
    )


def picture(trunk):
    torch.manual_seed(7)
    return image_for(trunk)


def train(model, image, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0) if trained else None
    for _ in range(steps):
        loss = loss_of(model(image))
        if optimizer is None:
            assert not loss.requires_grad
            return
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()


@functools.cache
def receiving(trunk):
    """Names of stock parameters that a loss on the outputs reaches."""
    stock = build_stock(trunk)
    for parameter in stock.parameters():
        parameter.requires_grad_(True)
    loss_of(stock(picture(trunk))).backward()
    return {
        name
        for name, p in stock.named_parameters()
        if p.grad is not None and p.grad.norm() > 0
    }


@functools.cache
def rewritten(trunk):
    """Names of buffers that the stock forward itself rewrites."""
    stock = build_stock(trunk)
    before = {k: v.clone() for k, v in stock.state_dict().items()}
    stock(picture(trunk))
    return {
        name
        for name, value in stock.state_dict().items()
        if value.shape != before[name].shape
        or not torch.equal(value, before[name])
    }


def declared(method, ours):
    """Names that should train, by a rule of this test's own."""
    stock = {
        name
        for name, _ in ours.named_parameters()
        if not name.startswith(f'{ours.ADDED}.')
    }
    plain = {
        'full': lambda name: True,
        'bitfit': lambda name: name.endswith(('.bias', '_bias')),
    }
    if method in plain:
        return {name for name in stock if plain[method](name)}
    if method == 'norm':
        return {
            f'{path}.{name}'
            for path, module in ours.named_modules()
            if isinstance(module, NORMS)
            for name, _ in module.named_parameters()
        }
    if method == 'partial':
        layout = ours.trunk.layout
        last = [path for path, _ in ours.trunk.body(ours)][-1]
        assert '{block}' in layout.blocks
        return {name for name in stock if name.startswith(f'{last}.')}
    own = {
        name
        for name, _ in ours.named_parameters()
        if name.startswith(f'{ours.ADDED}.')
    }
    if method == 'e3va':
        norms = [path for path, _ in ours.output_norms()]
        own |= {
            name
            for name in stock
            if any(name.startswith(f'{path}.') for path in norms)
        }
    return own


@pytest.mark.parametrize('method, trunk', FINE)
def test_begins_as_the_stock_backbone(method, trunk):
    stock = build_stock(trunk)
    ours = build_loaded(method, trunk, stock).eval()
    image = picture(trunk)
    with torch.no_grad():
        found = flat(ours(image))
    expected = stock_outputs(trunk, stock, image)
    if trunk == 'timm swin' and method != 'e3va':
        expected = [e.permute(0, 2, 3, 1) for e in expected]  # as timm's
    assert [f.shape for f in found] == [e.shape for e in expected]
    for ours_, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(ours_).all()
        torch.testing.assert_close(ours_, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('method, trunk', FINE)
def test_declared_parameters_train_and_no_others(method, trunk):
    ours = wake(build_loaded(method, trunk))
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert names == declared(method, ours)
    assert (method == 'fixed') == (not names)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.train()
    train(ours, picture(trunk))
    after = ours.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    moved -= rewritten(trunk)
    reached = receiving(trunk)
    # How far a step goes is a matter of scale; that it goes is not.
    still = {
        name
        for name, parameter in ours.named_parameters()
        if name in names
        and (name in reached or name.startswith(f'{ours.ADDED}.'))
        and not (parameter.grad is not None and parameter.grad.norm() > 0)
    }
    assert not still
    assert bool(moved & names) == bool(names)
    if method == 'full':  # which has batch norms in training mode, too
        buffers = {name for name, _ in ours.named_buffers()}
        moved -= {name for name in buffers if 'running' in name}
        moved -= {name for name in buffers if 'num_batches' in name}
    assert moved <= names
    for value in after.values():
        assert torch.isfinite(value.float()).all()


@pytest.mark.parametrize('method, trunk', FINE)
def test_state_dict_round_trip(method, trunk):
    first = wake(build_loaded(method, trunk)).eval()
    second = build(method, trunk).eval()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    image = picture(trunk)
    with torch.no_grad():
        for a, b in zip(flat(first(image)), flat(second(image)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('method, trunk', FINE)
def test_a_deep_copy_is_independent(method, trunk):
    first = wake(build_loaded(method, trunk)).eval()
    image = picture(trunk)
    with torch.no_grad():
        before = flat(first(image))
        second = copy.deepcopy(first)
        for a, b in zip(before, flat(second(image)), strict=True):
            assert torch.equal(a, b)
        if method in ADDING:
            for parameter in added(second).parameters():
                parameter.add_(0.5)
        else:
            for parameter in second.parameters():
                parameter.add_(0.5)
        changed = flat(second(image))
        assert any(
            not torch.equal(a, b) for a, b in zip(before, changed, strict=True)
        )
        for a, b in zip(before, flat(first(image)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize('method, trunk', FINE)
def test_autocast_to_bf16_is_finite(method, trunk):
    ours = wake(build_loaded(method, trunk)).train()
    with torch.autocast('cpu', torch.bfloat16):
        outputs = ours(picture(trunk))
        loss = loss_of(outputs)
    assert torch.isfinite(loss)
    if method == 'fixed':
        return
    loss.backward()
    gradients = [p.grad for p in ours.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize('method, trunk', list(EXCEPTIONS))
def test_what_cannot_be_says_why(method, trunk):
    with pytest.raises(ConfigError, match=EXCEPTIONS[method, trunk]):
        build_loaded(method, trunk)(picture(trunk))


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'e3va'])
@pytest.mark.parametrize(
    'trunk', ['swin of mmdet', 'mmseg vit', 'convnext', 'swin v2']
)
def test_activation_checkpoints_change_nothing(method, trunk):
    if (method, trunk) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[method, trunk])
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        ours = build(method, trunk, with_cp=with_cp)
        wake(drawn(ours)).eval()
        outputs = ours(picture(trunk))
        gradients = {}
        if method != 'fixed':
            loss_of(outputs).backward()
            gradients = {n: p.grad for n, p in ours.named_parameters()}
        found.append((flat(outputs), gradients))
    (plain, grads), (checkpointed, others) = found
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, others[name], msg=name)


# Several outputs, of which all but the last are left out. MSCAN and timm's
# run to their end; DeiT3 has norms that no branch uses.
SEVERAL = [
    name
    for name, config in CASES.items()
    if isinstance(config.get('out_indices', (0, 1, 2, 3)), list | tuple)
    and len(config.get('out_indices', (0, 1, 2, 3))) > 1
    and not name.startswith(('timm', 'mscan', 'deit3'))
]


@pytest.mark.parametrize('trunk', SEVERAL)
def test_nothing_past_the_last_output_is_left(trunk):
    """The outputs stay, and all that trains has a gradient."""
    stock = build_stock(trunk)
    *first, _ = stock.out_indices
    kept = type(CASES[trunk].get('out_indices', ()))(first)
    ours = build('full', trunk, out_indices=kept).eval()
    state = stock.state_dict()
    ours.load_state_dict(
        {key: state[key].clone() for key in ours.state_dict()}
    )
    image = picture(trunk)
    found = ours(image)
    expected = stock_outputs(trunk, stock, image)
    count = len(flat(found))
    assert 0 < count < len(expected)
    for a, b in zip(flat(found), expected[:count], strict=True):
        torch.testing.assert_close(a, b)
    loss_of(found).backward()
    assert not [n for n, p in ours.named_parameters() if p.grad is None]


def test_lora_refuses_a_layer_that_is_not_called():
    with pytest.raises(ConfigError, match=OWN_BIAS):
        MODELS.build(
            dict(
                type='e3va_mm.PETLBackbone',
                trunk=copy.deepcopy(CASES['mmseg vit']),
                method=dict(METHODS['lora'], layers=['out_proj']),
            )
        )


def test_windows_that_need_no_padding_are_told_from_tokens():
    trunk = dict(copy.deepcopy(CASES['sam']), window_size=2)
    ours = MODELS.build(
        dict(
            type='e3va_mm.PETLBackbone',
            trunk=trunk,
            method=METHODS['adapter'],
            allow_random_trunk=True,
        )
    )
    with pytest.raises(ConfigError, match=WINDOWS):
        ours(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('method', ['adapter', 'mona', 'lora'])
def test_two_sizes_of_pictures_before_one_backward(method):
    """A checkpoint runs each block again on its own grid."""
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        ours = build(method, 'swin of mmdet', with_cp=with_cp)
        wake(drawn(ours)).eval()
        generator = torch.Generator().manual_seed(1)
        losses = [
            loss_of(ours(torch.randn(1, 3, *size, generator=generator)))
            for size in [(64, 128), (96, 96)]
        ]
        sum(losses).backward()
        found.append({n: p.grad for n, p in added(ours).named_parameters()})
    plain, checkpointed = found
    for name, grad in plain.items():
        torch.testing.assert_close(grad, checkpointed[name], msg=name)
