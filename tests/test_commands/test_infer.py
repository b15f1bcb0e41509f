import json

import numpy as np
import pytest
from PIL import Image

from e3va_mm.commands import infer
from tests.test_apis.tuned import tuned_apart

pytest.importorskip('mmpretrain')


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp('infer')
    return folder, tuned_apart(folder)


def test_three_tasks_on_a_folder(tuned, capsys):
    folder, tasks = tuned
    out = folder / 'out'
    arguments = [f'{folder}/images', '--out', str(out)]
    for name, task in tasks.items():
        arguments += ['--task', f'{name}={task.config}:{task.adapter}']
    assert infer.main(arguments) == 0
    text = capsys.readouterr().out
    assert '4 images, 3 tasks, 4 passes of a trunk' in text
    assert 'trunks: boxes + kinds + parts' in text
    for name in ('000', '003'):
        boxes = json.loads((out / f'boxes/preds/{name}.json').read_text())
        assert len(boxes['bboxes']) == len(boxes['scores']) == 5
        kinds = json.loads((out / f'kinds/preds/{name}.json').read_text())
        assert kinds['pred_class'] in ('cat', 'dog', 'bird')
        classes = np.asarray(Image.open(out / f'parts/preds/{name}.png'))
        assert classes.shape == (48, 64) and classes.max() <= 2
        for task in tasks:
            assert (out / f'{task}/vis/{name}.jpg').is_file()


def test_an_adapter_file_of_the_package(tuned, tmp_path):
    name = 'retinanet_e3va_swin_nano_digits'
    arguments = [f'{tuned[0]}/images/000.jpg', '--out', f'{tmp_path}/found']
    file = f'e3va_mm://{name}.safetensors'
    assert infer.main([*arguments, '--adapter', file]) == 0
    assert (tmp_path / 'found' / name / 'vis' / '000.jpg').is_file()


@pytest.mark.parametrize(
    'tasks, message',
    [
        (['boxes.py:a.pth'], '--task should be NAME=CONFIG.py:FILE'),
        (['a=b.py:c', 'a=d.py:e'], 'with a new NAME each'),
        (['a=none.py:a.pth'], "Task 'a': none.py: no such config file"),
        (['a={}:none.pth'], 'none.pth: no such checkpoint file'),
    ],
)
def test_what_is_refused(tuned, tasks, message, error, tmp_path):
    folder, by_name = tuned
    arguments = [f'{folder}/images', '--out', tmp_path / 'x']
    for task in tasks:
        arguments += ['--task', task.format(by_name['boxes'].config)]
    assert message in error(infer, *arguments)
    assert not (tmp_path / 'x').exists()
