import torch.nn.functional as F

from tests.test_tuners.one_block import SIZE, build, check


def test_outputs_and_gradients_are_those_of_the_formula():
    ours = build('Mona')

    def add(part):
        def step(x, value):
            x = x + value
            z = part.norm(x) * part.gamma + x * part.gamma_x
            z = part.down(z).transpose(1, 2).unflatten(2, SIZE)
            filters = part.filters
            z = z + sum(each(z) for each in filters.filters) / 3
            z = z + filters.mix(z)
            return x + part.up(F.gelu(z).flatten(2).transpose(1, 2))

        return step

    parts = ours.tuner.blocks[0]
    check(ours, add(parts['attn']), add(parts['ffn']))
