"""Configs of tasks, given in several ways."""

import pytest
from mmengine.config import Config

from e3va_mm.errors import ConfigError
from e3va_mm.multi_task.task_configs import task_configs

WHOLE = dict(default_scope='mmdet', model=dict(), train_dataloader=dict())


def test_paths_and_dicts(tmp_path):
    path = tmp_path / 'task.py'
    Config(WHOLE).dump(path)
    found = task_configs(dict(a=str(path), b=path, c=WHOLE, d=Config(WHOLE)))
    assert list(found) == ['a', 'b', 'c', 'd']
    assert all(each.default_scope == 'mmdet' for each in found.values())


@pytest.mark.parametrize(
    'tasks, message',
    [
        (None, '`tasks` should be a dict of configs'),
        ({}, '`tasks` should be a dict of configs'),
        (['a.py'], '`tasks` should be a dict of configs'),
        (dict(a='none.py'), '`tasks.a`: none.py: no such config file'),
        ({'a.b': WHOLE}, 'a word without "loss" that is no method .* .a.b.'),
        ({'my_loss': WHOLE}, 'but got .my_loss.'),
        ({'items': WHOLE}, 'no method of a module dict, but got .items.'),
        (dict(a=dict(model=dict())), 'with default_scope, but it has none'),
    ],
)
def test_what_is_refused(tasks, message):
    with pytest.raises(ConfigError, match=message):
        task_configs(tasks)
