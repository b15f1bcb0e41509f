"""What is inserted into blocks, however they run."""

import pytest
import torch

from e3va_mm.errors import ConfigError
from tests.test_tuners.cases import INSIDE, TUNERS, loss_of, wake
from tests.trunk_cases import CASES, build_ours, drawn, flat

PAIRS = [('swin of mmdet', name) for name in TUNERS if name != 'frozen']
PAIRS += [('mmseg vit', 'adaptformer'), ('convnext', 'mona')]
PAIRS += [('swin v2', 'adapter')]


@pytest.mark.parametrize('trunk, tuner', PAIRS)
def test_activation_checkpoints_change_nothing(trunk, tuner, monkeypatch):
    """Two sizes before one backward: each block runs on its own grid again."""
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        config = dict(CASES[trunk], with_cp=with_cp)
        monkeypatch.setitem(CASES, trunk, config)
        ours = wake(drawn(build_ours(trunk, tuner=TUNERS[tuner]))).eval()
        generator = torch.Generator().manual_seed(1)
        outputs = []
        for size in ((64, 128), (96, 96)):
            image = torch.randn(1, 3, *size, generator=generator)
            outputs += flat(ours(image))
        loss_of(outputs).backward()
        grads = {n: p.grad for n, p in ours.named_parameters()}
        found.append((outputs, grads))
    (outputs, grads), (checkpointed, others) = found
    torch.testing.assert_close(checkpointed, outputs)
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, others[name], msg=name)


def test_blocks_that_change_their_width_are_refused():
    with pytest.raises(ConfigError, match='keep the width of their stream'):
        build_ours('hiera of sam 2', tuner=TUNERS['mona'])


@pytest.mark.parametrize('window', [2, 3])  # without padding, with
@pytest.mark.parametrize('tuner', [name for name in INSIDE if name != 'lora'])
def test_branches_that_work_on_windows_are_refused(tuner, window, monkeypatch):
    monkeypatch.setitem(CASES, 'sam', dict(CASES['sam'], window_size=window))
    ours = build_ours('sam', tuner=TUNERS[tuner])
    with pytest.raises(ConfigError, match='works on windows'):
        ours(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('tuner', ['adapter', 'adaptformer', 'lorand'])
def test_only_who_filters_needs_a_grid(tuner):
    """64x49 pixels are 8x7 patches of 8, which pixels alone do not tell."""
    image = torch.randn(1, 3, 64, 49)
    found = build_ours('dinov2', tuner=TUNERS[tuner])(image)
    assert found[0].shape[-2:] == (8, 7)


def test_two_grids_of_as_many_tokens_are_not_mixed_up(monkeypatch):
    """A checkpoint that runs again cannot tell whose tokens it has."""
    config = dict(CASES['swin of mmdet'], with_cp=True)
    monkeypatch.setitem(CASES, 'swin of mmdet', config)
    ours = wake(build_ours('swin of mmdet', tuner=TUNERS['mona'])).train()
    high, wide = torch.randn(1, 3, 64, 96), torch.randn(1, 3, 96, 64)
    for image in (high, wide):  # one after the other is fine
        loss_of(ours(image)).backward()
    both = loss_of(ours(high)) + loss_of(ours(wide))
    with pytest.raises(ConfigError, match='two of 6 tokens.*with_cp=False'):
        both.backward()
