import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.test_tuners.one_block import (
    IMAGE,
    TRUNK,
    attention,
    build,
    check,
)
from tests.trunk_cases import build_ours

OWN_WEIGHT = 'reads the weight itself'


@pytest.mark.parametrize('alpha', [None, 16])
def test_outputs_and_gradients_are_those_of_the_formula(alpha):
    ours = build('LoRA', rank=4, alpha=alpha)
    scale = 1 if alpha is None else alpha / 4
    (update,) = ours.tuner.updates
    q, v = (up @ down for up, down in zip(update.up, update.down, strict=True))
    w_msa = ours.stages[0].blocks[0].attn.w_msa
    qkv = w_msa.qkv

    def attend(block, size, x):
        del w_msa.qkv
        w_msa.qkv = lambda y: nn.functional.linear(
            y,
            qkv.weight + scale * torch.cat([q, torch.zeros_like(q), v]),
            qkv.bias,
        )
        return attention(block, size, x)

    check(ours, torch.add, torch.add, attend)


@pytest.mark.parametrize('alpha', [None, 16])
def test_it_merges_exactly_and_leaves_a_stock_backbone(alpha):
    ours = build('LoRA', rank=4, alpha=alpha).float()
    image = torch.randn(IMAGE)
    with torch.no_grad():
        before = ours(image)[0]
        ours.merge()
        after = ours(image)[0]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not list(ours.tuner.parameters())
    assert ours.trunk_source.endswith(', merged')
    assert ours.trunk_address is None
    stock = MODELS.build(dict(TRUNK, type='mmdet.SwinTransformer'))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    stock.load_state_dict(ours.state_dict())
    stock.eval()  # of mmdet, which returns nothing
    torch.testing.assert_close(stock(image)[0], after)


def test_other_layers_are_updated_whole_and_parts_can_be_chosen():
    ours = build('LoRA', rank=2, layers=('proj', 'qkv'), parts=('k',))
    sizes = [tuple(p.shape) for p in ours.tuner.parameters()]
    assert sizes == [(2, 16), (16, 2)] * 2


@pytest.mark.parametrize(
    'trunk, options, message',
    [
        *(
            (trunk, dict(), 'Expected linear layers named qkv')
            for trunk in ('mmseg vit', 'convnext', 'pvtv2', 'mit', 'mscan')
        ),
        ('beit', dict(), OWN_WEIGHT),
        ('swin v2', dict(), OWN_WEIGHT),
        ('mmseg vit', dict(layers=['out_proj']), OWN_WEIGHT),
    ],
)
def test_trunks_that_it_cannot_tune(trunk, options, message):
    with pytest.raises(ConfigError, match=message):
        build_ours(trunk, tuner=dict(options, type='e3va_mm.LoRA', rank=4))
