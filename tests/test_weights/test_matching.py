import re

import pytest
import torch

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import LoadReport, match_state

EXPECTED = {f'layer{i}.weight': torch.Size((3, 4)) for i in range(7)}


def _found():
    return {key: torch.zeros(shape) for key, shape in EXPECTED.items()}


def _match(found, **kwargs):
    return match_state(EXPECTED, found, what='trunk', source='a.pth', **kwargs)


def test_a_complete_match_reports_counts_values_and_leftovers():
    found = {**_found(), 'head.weight': torch.zeros(2), 'norm.bias': 0}
    report = _match(
        found,
        expected_leftovers=[r'head\..*', re.compile(r'norm\.(weight|bias)')],
        notes=['official Swin'],
    )
    assert report == LoadReport(
        what='trunk',
        source='a.pth',
        tensors=7,
        values=84,
        leftovers=('head.weight', 'norm.bias'),
        notes=('official Swin',),
    )


def test_report_reads_as_log_lines():
    report = LoadReport('trunk', 'a.pth', 173, 27_500_000)
    text = 'trunk: all 173 tensors (27.5 M values) from a.pth'
    assert str(report) == text
    left = tuple(f'head.{i}' for i in range(7))
    report = LoadReport('trunk', 'a.pth', 173, 27_500_000, left, ('B.',))
    assert str(report) == (
        f'{text}; not used: head.0, head.1, head.2, head.3, head.4 '
        'and 2 more\nB.'
    )


def test_expected_may_be_given_as_tensors():
    assert match_state(
        _found(), _found(), what='trunk', source='a.pth'
    ).values == sum(v.numel() for v in _found().values())


def test_one_error_lists_missing_misshaped_and_unexpected_keys():
    found = _found()
    del found['layer0.weight']
    found['layer1.weight'] = torch.zeros(3, 5)
    found['layer2.weight'] = 'text'
    found.update({f'extra{i}': torch.zeros(1) for i in range(8)})
    with pytest.raises(CheckpointError) as error:
        _match(found, hint='The file holds depths=(2, 2, 18, 2).')
    assert str(error.value) == (
        'a.pth does not fit the trunk: 4 of 7 tensors match.\n'
        '  1 missing in the file:\n'
        '    layer0.weight\n'
        '  2 of another shape:\n'
        '    layer1.weight: (3, 5) in the file, (3, 4) expected\n'
        '    layer2.weight: str in the file, (3, 4) expected\n'
        '  8 not expected:\n'
        '    extra0\n    extra1\n    extra2\n    extra3\n    extra4\n'
        '    ... and 3 more\n'
        'The file holds depths=(2, 2, 18, 2).'
    )


@pytest.mark.parametrize(
    'spoil, text',
    [
        (lambda f: f.pop('layer3.weight'), '1 missing in the file'),
        (
            lambda f: f.update({'layer3.weight': torch.zeros(4, 3)}),
            '1 of another shape',
        ),
        (lambda f: f.update(extra=torch.zeros(1)), '1 not expected'),
    ],
)
def test_each_kind_of_mismatch_alone_is_an_error(spoil, text):
    found = _found()
    spoil(found)
    with pytest.raises(CheckpointError, match=text):
        _match(found)


def test_a_leftover_must_match_its_pattern_as_a_whole():
    found = {**_found(), 'head.weight.extra': torch.zeros(1)}
    with pytest.raises(CheckpointError, match='head.weight.extra'):
        _match(found, expected_leftovers=[r'head\.weight'])


def test_an_expected_key_is_no_leftover_even_if_a_pattern_matches():
    with pytest.raises(CheckpointError, match='7 missing'):
        _match({}, expected_leftovers=['.*'])
    assert _match(_found(), expected_leftovers=['.*']).leftovers == ()


def test_the_hint_is_sought_only_where_there_is_a_mismatch():
    def hint():
        raise ZeroDivisionError

    _match(_found(), hint=hint)
    with pytest.raises(ZeroDivisionError):
        _match({}, hint=hint)
    with pytest.raises(CheckpointError, match='found out late'):
        _match({}, hint=lambda: 'found out late')
