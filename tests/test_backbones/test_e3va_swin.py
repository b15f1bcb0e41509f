"""Promises of the backbone, each after ``init_weights()``."""

import copy
import gc

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from e3va_mm.errors import ConfigError
from e3va_mm.measure import LiveBytes
from e3va_mm.utils import count_parameters, mark_trainable
from tests.helpers import (
    SWIN,
    TINY,
    build_e3va,
    build_stock,
    e3va_and_stock,
    randomised,
)
from tests.reference import e3va as reference

# Odd sizes: padding in windows and in patch merging.
IMAGE = (2, 3, 101, 75)


def declared(backbone):
    return {
        f'{name}.{key}'
        for name, child in backbone.trainable_children()
        for key, _ in child.named_parameters()
    }


@pytest.mark.parametrize(
    'size, trainable',
    [('t', 440_064), ('s', 896_256), ('b', 1_195_008), ('l', 1_792_512)],
)
def test_trainable_counts_are_the_published_ones(size, trainable):
    backbone = build_e3va(**SWIN[size])
    assert count_parameters(backbone)[1] == trainable
    backbone.init_weights()
    assert count_parameters(backbone)[1] == trainable


def test_retinanet_outputs_count_without_the_first_norm():
    backbone = build_e3va(**SWIN['l'], out_indices=(1, 2, 3))
    assert count_parameters(backbone)[1] == 1_792_128


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('downsampling', ['difference', 'linear'])
def test_equals_the_stock_frozen_backbone_before_the_first_step(
    scope, downsampling
):
    ours, stock = e3va_and_stock(
        scope, side_path=dict(downsampling=downsampling)
    )
    image = torch.randn(IMAGE)
    ours.train()
    with torch.no_grad():
        expected = stock(image)
    outputs = ours(image)
    assert len(outputs) == 4
    for output, target in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, target, rtol=0, atol=1e-5)


def test_state_dict_has_the_stock_names_and_the_side_path():
    ours, stock = e3va_and_stock()
    names = {k for k in ours.state_dict() if not k.startswith('side_path.')}
    assert names == set(stock.state_dict())


def test_trunk_stays_in_eval_mode():
    ours = build_e3va()
    model = torch.nn.Sequential(ours)
    for mode in (True, False, True):
        model.train(mode)
        assert ours.side_path.training is mode
        for _, child in ours.trunk_children():
            assert not any(m.training for m in child.modules())
    assert ours.train() is ours


def test_trunk_drop_path_is_on_only_when_asked_for_and_training():
    ours, _ = e3va_and_stock(side_path=dict(trunk_drop_path=0.5))
    image = torch.randn(IMAGE)
    ours.train()
    assert not torch.equal(ours(image)[3], ours(image)[3])
    ours.eval()
    assert torch.equal(ours(image)[3], ours(image)[3])


def test_trunk_keeps_nothing_for_backward():
    ours, _ = e3va_and_stock()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    mark_trainable(ours, [])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # A picture that asks for a gradient would show any graph there is.
        ours(torch.randn(IMAGE).requires_grad_())
    assert not kept


def test_bytes_kept_for_backward_by_arithmetic():
    """Taps, output maps and statistics of their norms; no more.

    The inherited downsampling adds nothing to them.
    """
    ours, _ = e3va_and_stock()
    ours.train()
    image = torch.randn(1, 3, 112, 112)
    tokens, channels = [784, 196, 49, 16], [32, 64, 128, 256]
    taps = sum(
        4 * n * c * 2 * depth
        for n, c, depth in zip(tokens, channels, TINY['depths'], strict=True)
    )
    # The mean is for the downsampling alone, and none follows the last stage.
    norms = sum(4 * n * (c + 2) for n, c in zip(tokens, channels, strict=True))
    norms -= 4 * tokens[-1]
    with LiveBytes([image, *ours.parameters(), *ours.buffers()]) as count:
        before = count.live
        # A loss that keeps nothing, and the outputs gone.
        loss = sum(output.sum() for output in ours(image))
        gc.collect()
        assert count.live - before == taps + norms + loss.nbytes


def test_graph_reaches_the_declared_parameters_and_no_others():
    ours, _ = e3va_and_stock()
    outputs = ours(torch.randn(IMAGE))
    leaves, seen = set(), set()
    todo = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            leaves.add(id(node.variable))
        todo.extend(following for following, _ in node.next_functions)
    assert leaves == {
        id(p) for k, p in ours.named_parameters() if k in declared(ours)
    }


def train(backbone, steps, weight_decay=0.0):
    """Real steps on a loss that no output norm can flatten."""
    wrapper = build_optim_wrapper(
        backbone,
        dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=weight_decay)),
    )
    image = torch.randn(IMAGE)
    targets = [torch.randn_like(output) for output in backbone(image)]
    norms = []
    for _ in range(steps):
        loss = sum(
            (output - target).square().mean()
            for output, target in zip(backbone(image), targets, strict=True)
        )
        wrapper.zero_grad()
        loss.backward()
        norms.append(
            {
                name: parameter.grad.norm().item()
                for name, parameter in backbone.named_parameters()
                if parameter.grad is not None
            }
        )
        wrapper.step()
    return norms


@pytest.mark.parametrize('weight_decay', [0.0, 0.5])
def test_trunk_does_not_change_by_one_bit(weight_decay):
    ours, stock = e3va_and_stock()
    ours.train()
    before = copy.deepcopy(ours.state_dict())
    train(ours, 3, weight_decay)
    trunk = [name for name, _ in ours.trunk_children()]
    compared = 0
    for name, value in ours.state_dict().items():
        if name.split('.')[0] in trunk:
            assert torch.equal(value, before[name]), name
            compared += 1
    assert compared == len(stock.state_dict()) - 4 * len(['weight', 'bias'])


def test_declared_parameters_and_no_others_learn():
    ours, _ = e3va_and_stock()
    ours.train()
    before = copy.deepcopy(ours.state_dict())
    norms = train(ours, 3)
    assert set(norms[2]) == declared(ours)
    assert all(norm > 0 for norm in norms[2].values())
    # The first step of a zero-initialised up projection reaches only it.
    assert not any(
        norm > 0 for name, norm in norms[0].items() if '.down.' in name
    )
    moved = {
        name
        for name, parameter in ours.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert moved == declared(ours)


@pytest.mark.parametrize('save_taps', ['bf16', 'int8'])
def test_lossy_taps_learn_in_nearly_the_same_direction(save_taps):
    image = torch.randn(IMAGE)
    gradients = []
    for mode in ('exact', save_taps):
        ours, _ = e3va_and_stock(side_path=dict(save_taps=mode))
        randomised(ours.side_path, 1)
        sum(o.square().mean() for o in ours(image)).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in ours.side_path.parameters()])
        )
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_highway_of_small_values_is_inherited_well_under_autocast(dtype):
    """The difference is taken before rounding: no cancellation."""
    ours, _ = e3va_and_stock()
    for name, parameter in ours.side_path.named_parameters():
        if name.endswith('up.q'):
            torch.nn.init.normal_(parameter, std=1e-3)
    image = torch.randn(IMAGE)
    inherited = {}

    def watched(label):
        def inherit(*args):
            value = type(ours.side_path).inherit(ours.side_path, *args)
            inherited.setdefault(label, []).append(value.float())
            return value

        return inherit

    with torch.no_grad():
        ours.side_path.inherit = watched('fp32')
        ours(image)
        with torch.autocast('cpu', dtype=dtype):
            ours.side_path.inherit = watched('low')
            ours(image)
    assert len(inherited['low']) == 3
    for low, full in zip(inherited['low'], inherited['fp32'], strict=True):
        assert full.abs().max() > 0
        assert (low - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmengine'])
@pytest.mark.parametrize('installed', ['mmdet', 'mmseg'])
def test_one_framework_is_enough(scope, installed, monkeypatch):
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name: name == installed or None
    )
    ours = build_e3va(scope=scope)
    assert type(ours.patch_embed).__module__.startswith(installed)


def test_without_a_framework_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install onedl-mmdetection'):
        build_e3va()


def test_freezing_holds_from_the_constructor_on():
    ours = build_e3va()
    assert {
        k for k, p in ours.named_parameters() if p.requires_grad
    } == declared(ours)


def test_output_norms_can_be_frozen():
    ours = build_e3va(side_path=dict(train_output_norms=False))
    assert {name for name, _ in ours.trainable_children()} == {'side_path'}
    assert not ours.norm0.weight.requires_grad


@pytest.mark.parametrize('downsampling', ['difference', 'linear'])
@pytest.mark.parametrize('taps', [('attn', 'ffn'), ('ffn',)])
def test_gradients_equal_a_plain_reference(downsampling, taps):
    ours, stock = e3va_and_stock(
        side_path=dict(downsampling=downsampling, taps=taps)
    )
    randomised(ours.side_path, 1)
    ours.double().train()
    stock.double()
    image = torch.randn(IMAGE, dtype=torch.float64)
    weights = [torch.randn_like(output) for output in ours(image)]

    def gradients(outputs, parameters):
        loss = sum(
            (o * w).sum() for o, w in zip(outputs, weights, strict=True)
        )
        return torch.autograd.grad(loss, parameters)

    state = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    outputs = ours(image)
    expected = reference.backbone(stock, state, image, taps, downsampling)
    for output, target in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, target, rtol=1e-10, atol=1e-10)
    got = gradients(outputs, [p for p in ours.parameters() if p.requires_grad])
    wanted = gradients(expected, list(state.values()))
    for name, gradient, target in zip(state, got, wanted, strict=True):
        error = (gradient - target).norm() / target.norm()
        assert error < 1e-10, (name, error)


@pytest.mark.parametrize('out_indices', [(0,), (1, 2), (0, 3), (2, 0)])
def test_any_subset_of_outputs(out_indices):
    ours, stock = e3va_and_stock(out_indices=out_indices, stock_kwargs=dict())
    image = torch.randn(IMAGE)
    expected = stock(image)
    outputs = ours(image)
    wanted = [expected[i] for i in sorted(out_indices)]
    for output, target in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, target, rtol=0, atol=1e-5)
    assert len(outputs) == len(wanted)
    assert len(ours.stages) == max(out_indices) + 1
    assert len(ours.side_path.stages) == max(out_indices) + 1
    sum(output.sum() for output in outputs).backward()
    assert all(
        p.grad is not None for p in ours.parameters() if p.requires_grad
    ), 'DDP would wait for ever'


@pytest.mark.parametrize('out_indices', [(), (4,), (-1,)])
def test_impossible_outputs_are_refused(out_indices):
    with pytest.raises(
        ConfigError,
        match='out_indices. should name at least '
        r'one of the stages \(0, 1, 2, 3\), but got',
    ):
        build_e3va(out_indices=out_indices)


def test_arguments_without_effect_are_said_in_one_line(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'e3va_mm.backbones.stock_arguments.print_log',
        lambda message, **_: lines.append(message),
    )
    ours = build_e3va(
        drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.3,
        frozen_stages=2,
        with_cp=True,
        convert_weights=True,
    )
    assert lines == [
        'drop_rate, attn_drop_rate, drop_path_rate, with_cp, frozen_stages: '
        'without effect on the frozen trunk of E3VASwinTransformer.'
    ]
    ours.train()
    assert ours.norm0.weight.requires_grad, 'stock freezing must not reach it'


def test_absolute_positions_fail_clearly_at_another_size():
    ours = build_e3va(use_abs_pos_embed=True, pretrain_img_size=64)
    ours.init_weights()
    assert len(ours(torch.randn(1, 3, 64, 64))) == 4
    with pytest.raises(
        ConfigError,
        match='pretrain_img_size`, 256, but a '
        r'picture of \(96, 64\) pixels gives 384',
    ):
        ours(torch.randn(1, 3, 96, 64))


def test_training_with_a_random_trunk_is_refused():
    ours = build_e3va(allow_random_trunk=False)
    ours.init_weights()
    image = torch.randn(1, 3, 64, 64)
    ours.train()
    with pytest.raises(ConfigError, match='it is random: neither `init_cfg`'):
        ours(image)
    ours.eval()
    ours(image)
    ours.train()
    ours.load_state_dict(build_stock().state_dict(), strict=False)
    ours(image)


def test_deepcopy_is_independent():
    ours, _ = e3va_and_stock()
    twin = copy.deepcopy(ours)
    image = torch.randn(1, 3, 64, 64)
    randomised(twin.side_path, 3)
    assert not torch.equal(ours(image)[0], twin(image)[0])
    loss = twin(image)[0].square().sum()
    loss.backward()
    assert all(p.grad is None for p in ours.parameters())


def test_bf16_autocast_trains():
    ours, _ = e3va_and_stock()
    ours.train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = ours(torch.randn(IMAGE))
        sum(output.float().square().mean() for output in outputs).backward()
    assert all(
        p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    'side_path, message',
    [
        (dict(rank=0), r'`side_path.rank` should be in \[1, 16\]'),
        (dict(rank=17), r'`side_path.rank` should be in \[1, 16\]'),
        (dict(bottleneck_ratio=0.01), 'leave at least one channel'),
        (dict(taps=('mlp',)), r"at least one of \('attn', 'ffn'\), but got"),
        (dict(taps=()), 'at least one of'),
        (dict(downsampling='mean'), "'difference', 'linear'.*got 'mean'"),
        (dict(save_taps='fp4'), "'exact', 'bf16', 'int8'.*got 'fp4'"),
        (dict(ranks=8), "`side_path` of.*unexpected keyword argument 'ranks'"),
        (dict(trunk_drop_path=1.0), r'should be in \[0, 1\), but got 1.0'),
    ],
)
def test_impossible_side_paths_are_refused(side_path, message):
    with pytest.raises(ConfigError, match=message):
        build_e3va(side_path=side_path)


def test_pretrained_and_init_cfg_contradict():
    with pytest.raises(ConfigError, match='both set'):
        build_e3va(
            pretrained='a.pth',
            init_cfg=dict(type='Pretrained', checkpoint='b.pth'),
        )
    with pytest.raises(ConfigError, match="type='Pretrained', checkpoint="):
        build_e3va(init_cfg=dict(type='Kaiming'))
