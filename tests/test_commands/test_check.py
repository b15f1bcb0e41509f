"""`e3va check`: what is wrong as a table or as JSON."""

import json

import pytest
from mmengine.visualization import Visualizer

from e3va_mm.commands import check
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
)


@pytest.fixture
def detection(tmp_path):
    for name in ('train', 'val'):
        make_coco(tmp_path, name)
    return detection_config(tmp_path)


@pytest.fixture
def found(capsys):
    """Exit code and what is printed."""

    def found(*argv):
        # Frameworks take the newest, whose folder is gone.
        Visualizer._instance_dict.clear()
        code = check.main([str(arg) for arg in argv])
        return code, capsys.readouterr().out

    return found


def test_a_config_that_trains(detection, found):
    code, out = found(detection)
    assert code == 0
    assert out == 'fine: 0 errors and 0 warnings in 12 samples\n'


def test_all_problems_at_once(detection, found, tmp_path):
    (tmp_path / 'train' / '002.jpg').unlink()
    options = [
        '--cfg-options',
        'train_dataloader.sampler.type=InfiniteSampler',
        'val_evaluator.ann_file=nothing.json',
    ]
    code, out = found(detection, *options, '--json')
    assert code == 1
    problems = {each['check']: each for each in json.loads(out)['problems']}
    assert set(problems) == {'build', 'files', 'loop'}
    assert problems['build']['where'] == 'val_dataloader'
    assert (
        'val_evaluator.ann_file: no such file: nothing.json'
        in (problems['build']['found'])
    )
    code, out = found(detection, *options[:2], '--skip-check', 'files')
    assert code == 1
    assert 'error: 1 errors and 0 warnings in 12 samples' in out
    assert 'InfiniteSampler, whose epoch' in ' '.join(out.split())


def test_a_model_that_cannot_be_built(detection, found):
    code, out = found(
        detection, '--json', '--cfg-options', 'model.neck.type=FPNN'
    )
    assert code == 1
    (problem,) = json.loads(out)['problems']
    assert 'FPNN is not in the mmdet::model registry' in problem['found']


def test_names_of_checks(tmp_path, error):
    assert 'should be a list of checks (heads, ' in error(
        check, detection_config(tmp_path), '--skip-check', 'nothing'
    )
