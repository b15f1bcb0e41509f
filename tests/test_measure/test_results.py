import json

import pytest

from e3va_mm.errors import ConfigError
from e3va_mm.measure.results import Results, groups

HEADER = dict(
    environment=dict(torch='2.13.0', device='CPU'),
    arguments=dict(size=[64, 64], batch=1),
)


def rows(*names, content='abc'):
    """Rows by 'config/variant'."""
    made = {}
    for name in names:
        config, variant = name.split('/')
        made[name] = dict(config=config, variant=variant, content=content)
    return made


@pytest.fixture
def path(tmp_path):
    """A file in a new folder, with one of two rows."""
    path = tmp_path / 'new' / 'measured.json'
    results = Results(rows('a/as-is', 'a/full'), HEADER, path)
    assert not path.exists()
    results.update('a/as-is', seconds=[1.0])
    return path


def held(path):
    return json.loads(path.read_text())


def test_the_file_is_whole_at_every_change(path):
    found = held(path)
    assert {k: found[k] for k in HEADER} == HEADER
    assert list(found['variants']) == ['a/as-is', 'a/full']
    assert found['variants']['a/as-is']['seconds'] == [1.0]
    assert 'seconds' not in found['variants']['a/full']
    assert [p.name for p in path.parent.iterdir()] == ['measured.json']
    results = Results(rows('a/as-is'), HEADER, path)
    with pytest.raises(TypeError):
        results.update('a/as-is', memory_bytes=object())
    assert held(path) == found


def test_what_the_file_holds_is_not_measured_again(path):
    resumed = Results(rows('a/as-is', 'a/lora'), HEADER, path, resume=True)
    assert list(resumed.rows) == ['a/as-is', 'a/lora']
    assert resumed.rows['a/as-is']['seconds'] == [1.0]
    resumed.update('a/lora', seconds=[3.0])
    assert list(held(path)['variants']) == ['a/as-is', 'a/full', 'a/lora']
    changed = Results(rows('a/as-is', content='d'), HEADER, path, resume=True)
    assert 'seconds' not in changed.rows['a/as-is'], 'another config by now'
    anew = Results(rows('a/as-is'), HEADER, path)
    assert 'seconds' not in anew.rows['a/as-is']
    # A first run may be told to resume too.
    Results(rows('a/full'), HEADER, path.with_name('none.json'), resume=True)


@pytest.mark.parametrize(
    'part, key, value, message',
    [
        ('arguments', 'batch', 2, 'batch was 1, is 2'),
        ('environment', 'torch', '2.1.0', 'torch was 2.13.0, is 2.1.0'),
    ],
)
def test_figures_of_other_measurements_are_not_mixed(
    path, part, key, value, message
):
    header = dict(HEADER, **{part: dict(HEADER[part], **{key: value})})
    with pytest.raises(ConfigError, match=message):
        Results(rows('a/as-is'), header, path, resume=True)


@pytest.mark.parametrize('text', ['{"variants": {"a', '{}', '[]', '3'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / 'other.json'
    path.write_text(text)
    with pytest.raises(ConfigError, match='does not hold figures'):
        Results(rows('a/as-is'), HEADER, path, resume=True)


@pytest.mark.parametrize(
    'names, expected',
    [
        # Within a config, with `full` where it is there.
        (
            ['a/as-is', 'a/full', 'b/as-is', 'b/lora'],
            [('a/full', 2), ('b/as-is', 2)],
        ),
        # Configs that stand alone with each other.
        (['a/as-is', 'b/as-is', 'c/as-is'], [('a/as-is', 3)]),
    ],
)
def test_rows_are_compared_with_full_or_the_first(names, expected):
    found = [(base, len(group)) for base, group in groups(rows(*names))]
    assert found == expected
