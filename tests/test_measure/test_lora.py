import copy

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.measure import kept_for_backward
from e3va_mm.measure.lora import LoRAQKV, add_lora
from e3va_mm.utils import count_parameters
from tests.helpers import TINY, build_stock, randomised

N, C, RANK = 10, 24, 4


def test_only_q_and_v_are_updated_as_by_merged_weights():
    layer = randomised(LoRAQKV(nn.Linear(C, 3 * C), RANK))
    merged = layer.qkv.weight.detach().clone()
    with torch.no_grad():
        merged[:C] += layer.up_q.weight @ layer.down_q.weight
        merged[2 * C :] += layer.up_v.weight @ layer.down_v.weight
    x = torch.randn(2, N, C)
    expected = nn.functional.linear(x, merged, layer.qkv.bias)
    torch.testing.assert_close(layer(x), expected)
    stock = layer.qkv(x)
    assert torch.equal(layer(x)[..., C : 2 * C], stock[..., C : 2 * C])
    assert not torch.allclose(layer(x), stock)


def test_a_backbone_begins_as_the_stock_one():
    stock = randomised(build_stock())
    stock.eval()  # returns nothing
    tuned = copy.deepcopy(stock)
    add_lora(tuned, RANK)
    image = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(tuned(image), stock(image), strict=True):
        assert torch.equal(ours, theirs)


def test_lora_trains_and_nothing_else():
    backbone = build_stock()
    add_lora(backbone)
    # Two matrices of (64, C) for each of q and v in each block.
    widths = [TINY['embed_dims'] * 2**stage for stage in range(4)]
    blocks = zip(TINY['depths'], widths, strict=True)
    expected = sum(depth * 4 * 64 * width for depth, width in blocks)
    assert count_parameters(backbone)[1] == expected
    outputs = backbone(torch.randn(1, 3, 64, 64))
    sum(
        (output * torch.randn_like(output)).sum() for output in outputs
    ).backward()
    for name, parameter in backbone.named_parameters():
        own = '.up_' in name or '.down_' in name
        assert parameter.requires_grad == own, name
        assert (parameter.grad is not None) == own, name
        if '.up_' in name:  # `down` only follows after the first update
            assert parameter.grad.norm() > 0, name


def test_the_frozen_product_is_not_kept():
    layer = LoRAQKV(nn.Linear(C, 3 * C), RANK)
    layer.qkv.requires_grad_(False)
    # Two projections to the rank; not the 3 C channels of the output.
    assert kept_for_backward(layer, torch.zeros(N, C)) == 2 * N * RANK * 4


def test_what_has_no_attention_is_refused():
    with pytest.raises(ConfigError, match='`qkv`, but Linear has none'):
        add_lora(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match='but got 10 channels'):
        LoRAQKV(nn.Linear(4, 10))


def test_attention_that_reads_the_weight_itself_is_refused():
    from mmseg.models.backbones.beit import BEiTAttention

    module = torch.nn.ModuleList([BEiTAttention(8, 2, (2, 2))])
    with pytest.raises(ConfigError, match='BEiTAttention reads the weight'):
        add_lora(module)
