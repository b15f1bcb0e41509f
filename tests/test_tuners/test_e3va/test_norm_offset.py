import torch
from torch import nn

from e3va_mm.tuners.e3va.norm_offset import NormOffset


def test_it_starts_as_the_norm_of_the_trunk():
    norm = nn.LayerNorm(8, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(NormOffset(8)(norm)(x), norm(x))


def test_its_gradients_are_those_of_a_norm_of_its_own():
    norm = nn.LayerNorm(8)
    norm.requires_grad_(False)
    offset = NormOffset(8)
    with torch.no_grad():
        offset.weight.normal_()
        offset.bias.normal_()
    own = nn.LayerNorm(8)
    own.load_state_dict(
        dict(weight=1 + offset.weight.detach(), bias=offset.bias.detach())
    )
    x = torch.randn(2, 5, 8)
    for one in (offset(norm), own):
        one(x).square().sum().backward()
    torch.testing.assert_close(offset.weight.grad, own.weight.grad)
    torch.testing.assert_close(offset.bias.grad, own.bias.grad)
    assert norm.weight.grad is None
