import re

import pytest
import torch

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import match_state

EXPECTED = {f'layer{i}.weight': torch.Size((3, 4)) for i in range(7)}


def _found(**more):
    found = {key: torch.zeros(shape) for key, shape in EXPECTED.items()}
    return {**found, **more}


def _match(found, **kwargs):
    return match_state(EXPECTED, found, what='trunk', source='a.pth', **kwargs)


def test_a_complete_match_is_a_line_for_the_log():
    text = 'trunk: all 7 tensors (0.0 M values) from a.pth'
    assert _match(_found()) == text
    assert match_state(_found(), _found(), what='trunk', source='a.pth') == (
        text
    )
    head = {f'head.{i}': torch.zeros(2) for i in range(6)}
    report = _match(
        {**_found(), **head, 'norm.bias': 0},
        expected_leftovers=[r'head\..*', re.compile(r'norm\.(weight|bias)')],
        notes=['official Swin'],
    )
    assert report == (
        f'{text}; not used: head.0, head.1, head.2, head.3, head.4 and 2 more'
        '\nofficial Swin'
    )


def test_one_error_lists_missing_misshaped_and_unexpected_keys():
    found = _found()
    del found['layer0.weight']
    found['layer1.weight'] = torch.zeros(3, 5)
    found['layer2.weight'] = 'text'
    found['layer3.weight'] = torch.full((3, 4), float('nan'))
    found.update({f'extra{i}': torch.zeros(1) for i in range(8)})
    with pytest.raises(CheckpointError) as error:
        _match(found, hint='The file holds depths=(2, 2, 18, 2).')
    assert str(error.value) == (
        'a.pth does not fit the trunk: 3 of 7 tensors match.\n'
        '  1 missing in the file:\n'
        '    layer0.weight\n'
        '  2 of another shape:\n'
        '    layer1.weight: (3, 5) in the file, (3, 4) expected\n'
        '    layer2.weight: str in the file, (3, 4) expected\n'
        '  1 with numbers that cannot be:\n'
        '    layer3.weight: NaN or infinity\n'
        '  8 not expected:\n'
        '    extra0\n    extra1\n    extra2\n    extra3\n    extra4\n'
        '    ... and 3 more\n'
        'The file holds depths=(2, 2, 18, 2).'
    )


def test_a_leftover_must_match_its_pattern_as_a_whole():
    with pytest.raises(CheckpointError, match='head.weight.extra'):
        _match(
            {**_found(), 'head.weight.extra': torch.zeros(1)},
            expected_leftovers=[r'head\.weight'],
        )


def test_an_expected_key_is_no_leftover_even_if_a_pattern_matches():
    with pytest.raises(CheckpointError, match='7 missing'):
        _match({}, expected_leftovers=['.*'])
    assert 'not used' not in _match(_found(), expected_leftovers=['.*'])


def test_the_hint_is_sought_only_where_there_is_a_mismatch():
    def hint():
        raise ZeroDivisionError

    _match(_found(), hint=hint)
    with pytest.raises(ZeroDivisionError):
        _match({}, hint=hint)
