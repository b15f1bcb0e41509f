"""E3VA-Rerun: attention that runs a second time, on trunk and highway."""

import copy

import pytest
import torch

from e3va_mm.errors import ConfigError
from tests.test_tuners.cases import loss_of, wake
from tests.trunk_cases import CASES, build_ours, image_for, ours_and_stock


def rerun(count=1, **options):
    return dict(type='e3va_mm.E3VARerun', rerun=count, rank=4, **options)


def stream(stock, image, upto):
    """The stock stream before each block, and behind the last."""
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in stock.layers[: upto + 1]
    ]
    handles.append(
        stock.layers[upto].register_forward_hook(
            lambda _, args, output: seen.append(output)
        )
    )
    stock(image)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture
def one_output(monkeypatch):
    """Name of a trunk whose last block alone has an output."""
    case = dict(CASES['dinov2'], out_indices=(3,))
    monkeypatch.setitem(CASES, 'one output', case)
    return 'one output'


@pytest.mark.parametrize(
    'trunk, count, ends', [('dinov2', 1, (1, 3)), ('one output', 3, (3,))]
)
def test_it_is_the_stock_attention_with_lora_on_trunk_and_highway(
    trunk, count, ends, one_output
):
    ours, stock = ours_and_stock(trunk, tuner=rerun(count))
    wake(ours).eval()
    image = image_for('dinov2')
    # LoRA in the weights themselves.
    tuned = copy.deepcopy(stock.layers)
    updates = iter(ours.tuner.updates.updates)
    highway, expected = 0, []
    with torch.no_grad():
        x = stream(stock, image, ends[-1])
        for end in ends:
            for i in range(end + 1 - count, end + 1):
                own, block = stock.layers[i], tuned[i]
                next(updates).merge(block.attn.qkv)
                again = block.attn(block.ln1(x[i] + highway))
                highway = highway + again - own.attn(own.ln1(x[i]))
            expected.append(x[end + 1] + highway)
        expected[-1] = stock.ln1(expected[-1])
        found = ours(image)
    for a, b in zip(found, expected, strict=True):
        tokens = b[:, stock.num_extra_tokens :]
        b = tokens.transpose(1, 2).reshape(a.shape)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_plain_autograd(monkeypatch):
    ours = wake(build_ours('dinov2', tuner=rerun())).train()
    image = image_for('dinov2')

    def gradients():
        ours.zero_grad()
        loss_of(ours(image)).backward()
        return [p.grad.clone() for p in ours.parameters() if p.requires_grad]

    expected = gradients()
    monkeypatch.setattr(
        'e3va_mm.tuners.beside.e3va_rerun.checkpoint',
        lambda run, x, **_: run(x),
    )
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_weigh_nothing_and_follow_the_weights_that_are_loaded():
    ours, stock = ours_and_stock('dinov2', tuner=rerun())
    blocks = [block for _, block in ours.tuner._blocks]
    assert all(p.is_meta for block in blocks for p in block.parameters())
    other = copy.deepcopy(ours)
    wake(other)
    image = image_for('dinov2')
    with torch.no_grad():
        for layer in (ours.layers[1], stock.layers[1]):
            layer.ln1.weight.mul_(2.0)
        for a, b in zip(ours.eval()(image), stock(image), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        first = ours(image)[0]
        assert not torch.allclose(other.eval()(image)[0], first, atol=1e-3)


def test_weights_in_16_bits_run_again_in_single_precision():
    options = dict(trunk_compute='bf16', trunk_weights='bf16')
    ours = build_ours('dinov2', tuner=rerun(**options))
    loss = loss_of(ours.train()(image_for('dinov2')))
    loss.backward()
    gradients = [p.grad for p in ours.tuner.parameters()]
    assert any(g.any() for g in gradients)


@pytest.mark.parametrize(
    'trunk, count, message',
    [
        ('dinov2', 2, 'at most 1, the number'),
        ('one output', 4, 'at most 3, the number'),
        ('swin of mmdet', 1, 'a trunk with one resolution'),
        ('beit', 1, 'of BEiTViT take x, rel_pos_bias'),
        ('sam', 1, 'of ViTSAM take maps'),
    ],
)
def test_what_does_not_fit_is_refused(trunk, count, message, one_output):
    with pytest.raises(ConfigError, match=message):
        build_ours(trunk, tuner=rerun(count))
