from tests.test_tuners.one_block import bottleneck, build, check


def test_outputs_and_gradients_are_those_of_the_formula():
    ours = build('Adapter')
    parts = ours.tuner.blocks[0]

    def attn(x, value):
        x = x + value
        return x + bottleneck(parts['attn'], x)

    check(ours, attn, lambda x, m: x + m + bottleneck(parts['ffn'], m))
