"""tools/infer.py as its user calls it."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.test_apis.tuned import tuned_apart
from tests.test_tools.test_train_test import run

pytest.importorskip('mmpretrain')


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp('infer')
    return folder, tuned_apart(folder)


def test_three_tasks_on_a_folder(tuned):
    folder, tasks = tuned
    arguments = []
    for name, task in tasks.items():
        arguments += ['--task', f'{name}={task.config}:{task.adapter}']
    done = run('infer.py', 'images', '--out', 'out', *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert '4 pictures, 3 tasks, 4 passes of a trunk' in done.stdout
    assert 'trunks: boxes + kinds + parts' in done.stdout
    out = folder / 'out'
    for name in ('000', '003'):
        boxes = json.loads((out / f'boxes/preds/{name}.json').read_text())
        assert len(boxes['bboxes']) == len(boxes['scores']) == 5
        kinds = json.loads((out / f'kinds/preds/{name}.json').read_text())
        assert kinds['pred_class'] in ('cat', 'dog', 'bird')
        classes = np.asarray(Image.open(out / f'parts/preds/{name}.png'))
        assert classes.shape == (48, 64) and classes.max() <= 2
        for task in tasks:
            assert (out / f'{task}/vis/{name}.jpg').is_file()


@pytest.mark.parametrize(
    'task, message',
    [
        ('boxes.py:a.pth', 'error: --task should be NAME=CONFIG.py:FILE'),
        ('a=none.py:a.pth', "Task 'a': none.py: no such config file"),
        ('a=boxes.py:none.pth', 'none.pth: no such checkpoint file'),
    ],
)
def test_what_is_refused(tuned, task, message):
    done = run(
        'infer.py', 'images', '--out', 'x', '--task', task, cwd=tuned[0]
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tuned[0] / 'x').exists()
