from torch import nn

from e3va_mm.utils.freezing import mark_trainable


def test_exactly_what_is_named_trains():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad = False
    mark_trainable(model, [model[1], model[2].bias])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == ['1.weight', '1.bias', '2.bias']
    mark_trainable(model, [])
    assert not any(p.requires_grad for p in model.parameters())
