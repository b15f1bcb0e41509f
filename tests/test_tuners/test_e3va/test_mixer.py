"""The mixer of E3VA-Mix, beside plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from e3va_mm.measure import kept_for_backward
from e3va_mm.numerics import products
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.tuners.e3va.mixer import StageMixer, mix

SIZE = (4, 6)
LENGTH = SIZE[0] * SIZE[1]


def drawn(channels=8, width=4, dtype=torch.float64):
    torch.manual_seed(0)
    mixer = StageMixer(channels, width).to(dtype)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def state_of(extra=0, channels=8, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(
        2, extra + LENGTH, channels, dtype=dtype, requires_grad=True
    )


def plainly(mixer, state, extra=0):
    """The formula, written out."""
    p = dict(mixer.named_parameters())
    s = (state - state.mean(-1, keepdim=True)) / (
        state.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    z = s @ p['down.weight'].T + p['down.bias']
    maps = z[:, extra:].reshape(len(z), *SIZE, -1).permute(0, 3, 1, 2)
    filtered = sum(
        F.conv2d(
            F.pad(maps, [k // 2] * 4),
            p[f'filters.filters.{i}.weight'],
            p[f'filters.filters.{i}.bias'],
            groups=maps.shape[1],
        )
        for i, k in enumerate((3, 5, 7))
    )
    maps = maps + filtered / 3
    mixed = torch.einsum(
        'bchw,dc->bdhw', maps, p['filters.mix.weight'][..., 0, 0]
    )
    maps = maps + mixed + p['filters.mix.bias'][:, None, None]
    z = torch.cat([z[:, :extra], maps.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    return F.gelu(z) @ p['up.weight'].T + p['up.bias']


@pytest.mark.parametrize('extra', [0, 3])
def test_value_and_gradients_are_those_of_the_formula(extra):
    mixer, state = drawn(), state_of(extra)
    given = [state, *mixer.parameters()]
    weight = torch.randn_like(state)
    found = mix(mixer, state, SIZE)
    expected = plainly(mixer, state, extra)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), given),
        torch.autograd.grad((expected * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_zero_before_the_first_step():
    mixer = StageMixer(8, 4)
    assert not mix(mixer, torch.randn(1, LENGTH, 8), SIZE).any()


@pytest.mark.parametrize('mode', ['bf16', 'int8', 'int4'])
def test_a_lossy_state_changes_gradients_alone_and_little(mode):
    mixer = drawn(32, 8, torch.float32)
    state = state_of(0, 32, torch.float32)
    given = [state, *mixer.parameters()]
    exact, lossy = (
        mix(mixer, state, SIZE, codec) for codec in (None, TAP_CODECS[mode])
    )
    assert torch.equal(exact, lossy)
    weight = torch.randn_like(state)
    one, other = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad((out * weight).sum(), given)
            ]
        )
        for out in (exact, lossy)
    )
    assert F.cosine_similarity(one, other, 0) > 0.98
    assert not torch.equal(one, other)


class Alone(torch.nn.Module):
    def __init__(self, mixer, codec):
        super().__init__()
        self.mixer, self.codec = mixer, codec

    def forward(self, state):
        return mix(self.mixer, state * 1, SIZE, self.codec)


def test_the_state_alone_is_kept():
    mixer = drawn(256, 64, torch.float32)
    state = state_of(0, 256, torch.float32)
    bytes_exact = kept_for_backward(Alone(mixer, None), state)
    assert bytes_exact == state.numel() * 4
    int8 = kept_for_backward(Alone(mixer, TAP_CODECS['int8']), state)
    tokens, channels = 2 * LENGTH, 256
    assert int8 == tokens * channels + tokens * 4 + 2 * channels * 4


def test_products_in_16_bits_stay_near(monkeypatch):
    monkeypatch.setattr(products, 'EMULATED', set())
    mixer = drawn(32, 8, torch.float32)
    state = state_of(0, 32, torch.float32)
    exact = mix(mixer, state, SIZE)
    coarse = mix(mixer, state, SIZE, compute=torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert 0 < (exact - coarse).norm() / exact.norm() < 0.02
    coarse.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mixer.parameters())


def test_emulated_16_bits_are_computed_in_fp32(monkeypatch):
    """A CPU's filters in 16 bits take ten times as long."""
    monkeypatch.setattr(products, 'EMULATED', {torch.bfloat16})
    types, convolve = set(), F.conv2d

    def noted(x, *args, **kwargs):
        types.add(x.dtype)
        return convolve(x, *args, **kwargs)

    monkeypatch.setattr(F, 'conv2d', noted)
    mixer = drawn(32, 8, torch.float32)
    state = state_of(0, 32, torch.float32)
    done = mix(mixer, state, SIZE, compute=torch.bfloat16)
    done.sum().backward()
    assert types == {torch.float32}
    torch.testing.assert_close(done, mix(mixer, state, SIZE))
