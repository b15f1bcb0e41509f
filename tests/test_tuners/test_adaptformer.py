import pytest
import torch

from tests.test_tuners.one_block import IMAGE, bottleneck, build, check


@pytest.mark.parametrize('branches', [None, ('ffn',)])
def test_outputs_and_gradients_are_those_of_the_formula(branches):
    ours = build('AdaptFormer', branches=branches, scale=0.3)
    parts = ours.tuner.blocks[0]

    def add(name):
        def step(x, value):
            added = 0
            if name in (branches or parts):
                added = 0.3 * bottleneck(parts[name], x)
            return x + value + added

        return step

    check(ours, add('attn'), add('ffn'))


def test_no_second_copy_of_a_stream_is_kept():
    """The second adapter reads the tensor that the second norm reads."""
    ours = build('AdaptFormer')
    block, read = ours.stages[0].blocks[0], []
    for module in (block.norm2, ours.tuner.blocks[0]['ffn'].down):
        module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ours(torch.randn(IMAGE, dtype=torch.float64))
    norm, adapter = read
    assert norm.data_ptr() == adapter.data_ptr()
