"""Weights on disk, bit for bit."""

import copy
import gc
import os
import pickle
import tempfile

import pytest
import torch

from e3va_mm.errors import CheckpointError
from e3va_mm.measure import LiveBytes
from e3va_mm.weights import SourceWeights


def tensors():
    return {
        'a': torch.randn(5, 3),
        'transposed': torch.randn(4, 6).t(),
        'part': torch.randn(10, 10)[2:5, ::2],
        'bf16': torch.randn(7).bfloat16(),
        'fp16': torch.randn(3, 1, 2).half(),
        'double': torch.randn(2, dtype=torch.float64),
        'int': torch.arange(5),
        'bool': torch.tensor([True, False, True]),
        'scalar': torch.tensor(3.25),
        'empty': torch.empty(0, 4),
        'special': torch.tensor([float('nan'), float('inf'), -0.0, 1e-45]),
        'parameter': torch.nn.Parameter(torch.randn(2, 2)),
    }


def assert_holds(source, expected):
    assert list(source) == list(expected)
    assert len(source) == len(expected)
    for name, value in expected.items():
        got = source[name]
        assert got.dtype is value.dtype and got.shape == value.shape
        assert not got.requires_grad
        same = value.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(got.flatten().view(torch.uint8), same)


def test_every_bit_comes_back_in_any_order():
    expected = tensors()
    source = SourceWeights(expected)
    assert_holds(source, expected)
    for name in reversed(list(expected)):
        assert source[name].shape == expected[name].shape
    assert_holds(source, expected)


def test_what_is_kept_does_not_follow_what_it_came_from():
    weight = torch.zeros(4)
    source = SourceWeights(dict(weight=weight))
    weight.fill_(1)
    source['weight'].fill_(2)
    assert torch.equal(source['weight'], torch.zeros(4))


def test_no_memory_is_held():
    source = SourceWeights(tensors())
    with LiveBytes() as count:
        for name in source:
            source[name].clone()
    assert count.peak > 0
    assert count.live == 0
    held = gc.get_referents(vars(source))
    assert not any(isinstance(value, torch.Tensor) for value in held)


def test_nothing_is_left_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    expected = tensors()
    source = SourceWeights(expected)
    if os.name == 'posix':
        assert not list(tmp_path.iterdir())
    assert_holds(source, expected)
    del source
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_copies_share_and_pickles_do_not():
    expected = tensors()
    source = SourceWeights(expected)
    twin = copy.deepcopy(source)
    other = pickle.loads(pickle.dumps(source))
    del source
    gc.collect()
    assert_holds(twin, expected)
    assert_holds(other, expected)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
@pytest.mark.parametrize('values', [10, 10**6])
def test_a_full_folder_is_an_error_that_says_what_to_do(values, monkeypatch):
    """Few values fail when they are flushed, many when they are written."""
    monkeypatch.setattr(
        tempfile, 'TemporaryFile', lambda: open('/dev/full', 'wb')
    )
    monkeypatch.setattr(tempfile, 'tempdir', '/folder')
    with pytest.raises(CheckpointError) as error:
        SourceWeights(dict(weight=torch.zeros(values)))
    text = str(error.value)
    size = f'{4 * values / 2**20:,.0f}'
    assert text.startswith(f'Expected {size} MiB of room in /folder for the ')
    assert 'No space left on device' in text
    assert 'Set the environment variable TMPDIR' in text
    assert 'leave out `trunk_weights`' in text
