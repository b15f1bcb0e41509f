import json

import pytest

from e3va_mm.errors import ConfigError
from e3va_mm.measure.results import Results, check_room, groups, references

GIB = 2**30
HEADER = dict(
    environment=dict(torch='2.13.0', device='CPU'),
    arguments=dict(size=[64, 64], batch=1),
)


def rows(*names):
    """Rows by 'config/variant'."""
    made = {}
    for name in names:
        config, variant = name.split('/')
        made[name] = dict(config=config, variant=variant, content='abc')
    return made


def test_the_file_is_written_at_every_change(tmp_path):
    path = tmp_path / 'new' / 'measured.json'
    results = Results(rows('a/as-is', 'a/full'), HEADER, path)
    assert not path.exists()
    results.update('a/as-is', seconds=[1.0])
    held = json.loads(path.read_text())
    assert held['environment'] == HEADER['environment']
    assert held['arguments'] == HEADER['arguments']
    assert list(held['variants']) == ['a/as-is', 'a/full']
    assert held['variants']['a/as-is']['seconds'] == [1.0]
    assert 'seconds' not in held['variants']['a/full']
    assert [p.name for p in path.parent.iterdir()] == ['measured.json']


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / 'measured.json'
    results = Results(rows('a/as-is'), HEADER, path)
    results.update('a/as-is', seconds=[1.0])
    before = path.read_text()
    with pytest.raises(TypeError):
        results.update('a/as-is', memory_bytes=object())
    assert path.read_text() == before


def test_what_the_file_holds_is_not_missing(tmp_path):
    path = tmp_path / 'measured.json'
    first = Results(rows('a/as-is', 'a/full'), HEADER, path)
    first.update('a/as-is', seconds=[1.0])
    first.update('a/full', seconds=[2.0])

    resumed = Results(rows('a/full', 'a/frozen'), HEADER, path, resume=True)
    assert list(resumed.rows) == ['a/full', 'a/frozen']
    assert resumed.rows['a/full']['seconds'] == [2.0]
    assert 'seconds' not in resumed.rows['a/frozen']
    resumed.update('a/frozen', seconds=[3.0])
    held = json.loads(path.read_text())['variants']
    assert {k: row['seconds'] for k, row in held.items()} == {
        'a/as-is': [1.0],
        'a/full': [2.0],
        'a/frozen': [3.0],
    }

    anew = Results(rows('a/full'), HEADER, path)
    assert 'seconds' not in anew.rows['a/full']
    # A first run may be told to resume too.
    Results(rows('a/full'), HEADER, tmp_path / 'none.json', resume=True)


def test_a_config_that_has_changed_is_measured_again(tmp_path):
    path = tmp_path / 'measured.json'
    Results(rows('a/as-is'), HEADER, path).update('a/as-is', seconds=[1.0])
    changed = rows('a/as-is')
    changed['a/as-is']['content'] = 'def'
    resumed = Results(changed, HEADER, path, resume=True)
    assert 'seconds' not in resumed.rows['a/as-is']
    resumed.update('a/as-is', peak=1)
    row = json.loads(path.read_text())['variants']['a/as-is']
    assert row['content'] == 'def' and 'seconds' not in row


@pytest.mark.parametrize(
    'part, key, value, message',
    [
        ('arguments', 'batch', 2, 'batch was 1, is 2'),
        ('environment', 'torch', '2.1.0', 'torch was 2.13.0, is 2.1.0'),
    ],
)
def test_figures_of_other_measurements_are_not_mixed(
    tmp_path, part, key, value, message
):
    path = tmp_path / 'measured.json'
    Results(rows('a/as-is'), HEADER, path).update('a/as-is', seconds=[1.0])
    header = dict(HEADER, **{part: dict(HEADER[part], **{key: value})})
    with pytest.raises(ConfigError, match=message):
        Results(rows('a/as-is'), header, path, resume=True)


@pytest.mark.parametrize('text', ['{"variants": {"a', '{}', '[]', '3'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / 'other.json'
    path.write_text(text)
    with pytest.raises(ConfigError, match='does not hold figures'):
        Results(rows('a/as-is'), HEADER, path, resume=True)


def test_rows_are_compared_with_full_or_the_first():
    compared = rows('a/as-is', 'a/full', 'a/lora', 'b/as-is', 'b/full')
    assert references(compared) == {
        'a/as-is': 'a/full',
        'a/full': 'a/full',
        'a/lora': 'a/full',
        'b/as-is': 'b/full',
        'b/full': 'b/full',
    }
    assert [list(group) for group in groups(compared)] == [
        ['a/as-is', 'a/full', 'a/lora'],
        ['b/as-is', 'b/full'],
    ]
    without = rows('a/as-is', 'a/lora', 'b/as-is', 'b/lora')
    assert references(without)['a/lora'] == 'a/as-is'
    assert references(without)['b/lora'] == 'b/as-is'
    # Configs that stand alone are compared with each other.
    alone = rows('a/as-is', 'b/as-is', 'c/as-is')
    assert set(references(alone).values()) == {'a/as-is'}
    assert [list(group) for group in groups(alone)] == [list(alone)]


def sized(**sizes):
    """Rows of GiB: weights, optimizer, peak."""
    return {
        name: dict(
            memory_bytes=dict(
                weights=weights * GIB, optimizer=state * GIB, peak=peak * GIB
            )
        )
        for name, (weights, state, peak) in sizes.items()
    }


def test_timing_needs_room_for_all_states_and_one_peak():
    # 1 + 0 and 1 + 4 and 1 + 2 are held; 7 more by the second's step.
    found = sized(ours=(1, 0, 3), full=(1, 4, 12), lora=(1, 2, 5))
    check_room(found, 16 * GIB)
    with pytest.raises(ConfigError) as error:
        check_room(found, 16 * GIB - 1)
    for text in (
        'Timing ours, full, lora in turns needs about 16.0 GiB',
        'but 16.0 GiB are free',
        'such as ours, full; or leave time out with --memory-only',
    ):
        assert text in str(error.value)
    with pytest.raises(ConfigError, match='such as ours, lora; or'):
        check_room(found, 8 * GIB)
    with pytest.raises(ConfigError, match='are free. Leave time out'):
        check_room(found, 2 * GIB)


def test_room_is_not_judged_without_figures():
    found = sized(ours=(1, 0, 3))
    check_room(found, None)
    check_room(found | rows('a/as-is'), 1)
