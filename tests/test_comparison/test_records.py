import math

import pytest

from e3va_mm.comparison import Records, Run
from e3va_mm.errors import ConfigError

SETTINGS = dict(content='a', metric='mIoU')
LRS = (1e-3, 2e-3)


def records(folder, methods=('full', 'lora'), seeds=2, settings=SETTINGS):
    each = dict.fromkeys(methods, seeds)
    return Records(folder, settings, methods, LRS, each)


def train(found, run, value):
    found.update(run, validation={'mIoU': value})


def train_all(found, best=2e-3):
    while runs := found.to_train():
        for run in runs:
            train(found, run, 50 + (run.lr == best))


def test_the_best_rate_on_validation_gets_the_other_seeds(tmp_path):
    found = records(tmp_path, ('lora',), 3)
    assert found.to_train() == [Run('lora', lr, 0) for lr in LRS]
    train(found, Run('lora', 1e-3, 0), 60.0)
    assert found.chosen('lora') == []
    train(found, Run('lora', 2e-3, 0), 59.0)
    # Whatever a test says, it has no say in the choice.
    found.update(Run('lora', 2e-3, 0), test={'mIoU': 99.0})
    assert [run.lr for run in found.chosen('lora')] == [1e-3] * 3
    assert found.to_train() == [
        Run('lora', 1e-3, 1),
        Run('lora', 1e-3, 2),
    ]


def test_all_that_is_left_is_counted(tmp_path):
    found = records(tmp_path)
    for count in range(6, 0, -1):
        assert found.left() == count
        train(found, found.to_train()[0], 1.0)
    assert found.left() == 0
    assert found.to_test() == [
        Run(method, LRS[0], seed)
        for method in ('full', 'lora')
        for seed in (0, 1)
    ]


def test_what_is_tested_is_not_tested_again(tmp_path):
    found = records(tmp_path)
    train_all(found)
    first, *others = found.to_test()
    found.update(first, test={'mIoU': 40.0})
    again = records(tmp_path)
    assert again.to_test() == others
    assert again.values(first.method, 'test', 'mIoU') == [40.0]


def test_methods_and_seeds_can_be_added(tmp_path):
    found = records(tmp_path)
    train_all(found)
    more = records(tmp_path, ('full', 'lora', 'mona'), 3)
    assert {run.name for run in more.to_train()} == {
        'full/lr0.002-seed2',
        'lora/lr0.002-seed2',
        'mona/lr0.001-seed0',
        'mona/lr0.002-seed0',
    }
    assert more.left() == 6


def test_a_method_named_twice_is_one(tmp_path):
    found = records(tmp_path, ('lora', 'full', 'lora'))
    assert found.methods == ['lora', 'full']
    assert len(found.to_train()) == 4


def test_other_settings_are_refused(tmp_path):
    train_all(records(tmp_path))
    with pytest.raises(
        ConfigError,
        match='of another run: content was a, is b. .*--work-dir',
    ):
        records(tmp_path, settings=dict(SETTINGS, content='b'))


@pytest.mark.parametrize('text', ['{', '[]', '{"settings": {}}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / 'comparison.json').write_text(text)
    with pytest.raises(ConfigError, match='does not hold figures of this'):
        records(tmp_path)


def test_the_lowest_of_equal_rates_is_chosen(tmp_path):
    for lrs in (LRS, LRS[::-1]):
        found = Records(tmp_path, SETTINGS, ['lora'], lrs, dict(lora=1))
        for lr in lrs:
            train(found, Run('lora', lr, 0), 50.0)
        assert found.chosen('lora') == [Run('lora', 1e-3, 0)]


def test_rates_that_diverge_are_not_chosen(tmp_path):
    found = records(tmp_path)
    first, second, other, _ = (
        Run(method, lr, 0) for method in ('full', 'lora') for lr in LRS
    )
    found.update(first, diverged=True)
    assert found.chosen('full') == []
    train(found, second, 1.0)
    assert [run.lr for run in found.chosen('full')] == [2e-3] * 2
    # All rates of one: it has no runs, and the others go on.
    found.update(other, diverged=True)
    found.update(other._replace(lr=2e-3), diverged=True)
    assert found.chosen('lora') == []
    assert found.to_train() == [second._replace(seed=1)]
    assert found.left() == 1
    found.update(second._replace(seed=1), diverged=True)
    assert (found.left(), found.to_test()) == (0, [second])
    assert math.isnan(found.values('full', 'test', 'mIoU')[0])


def test_costs_are_kept(tmp_path):
    found = records(tmp_path)
    found.measured['lora'] = dict(file_bytes=3)
    found.cpu_seconds = 30.0
    found.write()
    again = records(tmp_path)
    assert again.measured == {'lora': dict(file_bytes=3)}
    assert again.cpu_seconds == 30.0
    assert not list(tmp_path.glob('.*')), 'no temporary file is left'
