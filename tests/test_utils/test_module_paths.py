"""Patterns are exact paths, and fit something or are refused."""

import pytest
import torch
from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.module_paths import (
    check_patterns,
    matching,
    parameters_of,
    select,
)

PATHS = ['neck', 'neck.norm', 'heads', 'heads.0', 'heads.1', 'heads.0.norm']


@pytest.mark.parametrize(
    'pattern, found',
    [
        ('neck', ['neck']),
        ('heads.*', ['heads.0', 'heads.1']),
        ('*', ['neck', 'heads']),
        ('*.norm', ['neck.norm']),
        ('*.*.norm', ['heads.0.norm']),
        ('heads.*.norm', ['heads.0.norm']),
    ],
)
def test_a_star_is_any_one_part(pattern, found):
    assert matching(pattern, PATHS, 'module') == found


@pytest.mark.parametrize(
    'pattern, text',
    [
        ('nekc', "^No module of M fits the path 'nekc'. Nearest are: neck"),
        ('norm', r'Nearest are: .*neck\.norm'),
        ('nec', 'Nearest are: neck'),
        ('ne*', 'Nearest are: neck'),
        ('heads.?', r'Nearest are: .*heads\.[01]'),
        ('heads.2', r'Nearest are: .*heads\.[01]'),
        ('.*', 'Nearest are: '),
        ('xyz', 'Nearest are: neck, heads.$'),
        ('', 'Nearest are: neck, heads.$'),
    ],
)
def test_nothing_is_chosen_by_a_piece_of_its_name(pattern, text):
    with pytest.raises(ConfigError, match=text):
        matching(pattern, PATHS, 'module of M')


def test_nothing_to_choose_from():
    with pytest.raises(ConfigError, match='Nearest are: none at all'):
        matching('*', [], 'module')


def test_what_is_no_list_of_strings():
    check_patterns(['neck'], 'X')
    check_patterns((), 'X')
    for wrong in (None, ['neck', 3], 'neck'):
        with pytest.raises(ConfigError, match='^X should be a list of paths'):
            check_patterns(wrong, 'X')
    with pytest.raises(ConfigError, match=r"got 'neck'. Write \['neck'\].$"):
        check_patterns('neck', 'X')


def test_modules_and_parameters_are_selected_by_all_their_paths():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    model.scale = nn.Parameter(torch.ones(1))
    found = select(model, ['*', '*.weight', '1.1'])
    assert list(found) == ['0', '1', 'scale', '0.weight', '1.1']
    assert found['0'] is shared and select(model, ['1.0'])['1.0'] is shared
    assert parameters_of(*found.values()) == {*model.parameters()}
    assert parameters_of(found['1.1']) == set()
    with pytest.raises(ConfigError, match='module or parameter of Sequential'):
        select(model, ['1.2'])
