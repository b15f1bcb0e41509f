import torch.nn.functional as F

from tests.test_tuners.one_block import build, check


def linear(layer, x):
    weight = sum(
        a @ g @ b for a, g, b in zip(layer.a, layer.g, layer.b, strict=True)
    )
    return x @ weight + layer.bias


def test_outputs_and_gradients_are_those_of_the_formula():
    ours = build('LoRand', rank=3, branches=4)

    def add(part):
        def step(x, value):
            added = linear(part.up, F.gelu(linear(part.down, value)))
            return x + value + added

        return step

    parts = ours.tuner.blocks[0]
    check(ours, add(parts['attn']), add(parts['ffn']))
