"""`e3va check`: what is wrong as a table or as JSON."""

import json

import pytest

from e3va_mm.commands import check
from tests.test_engine.test_hooks.tiny import detection_config, truncate


@pytest.fixture
def found(capsys):
    """Exit code and what is printed."""

    def found(*argv):
        code = check.main([str(arg) for arg in argv])
        return code, capsys.readouterr().out

    return found


def test_a_config_that_trains(detection, found):
    code, out = found(detection)
    assert code == 0
    assert out == 'fine: 0 errors and 0 warnings in 8 samples\n'


def test_all_problems_at_once(detection, found, tmp_path):
    truncate(tmp_path / 'train' / '002.jpg')
    options = [
        '--cfg-options',
        'train_dataloader.sampler.type=InfiniteSampler',
        'val_evaluator.ann_file=nothing.json',
        'test_dataloader.dataset.metainfo.classes=fox,owl',
    ]
    code, out = found(detection, *options, '--json')
    assert code == 1
    problems = {
        (each['check'], each['where']): each
        for each in json.loads(out)['problems']
    }
    assert {check for check, _ in problems} == {
        'build',
        'files',
        'loop',
    }
    lost = problems['build', 'val_dataloader']
    assert (
        'val_evaluator.ann_file: no such file: nothing.json' in (lost['found'])
    )
    assert "'fox', 'owl'" in problems['build', 'test_dataloader']['found']
    code, out = found(detection, *options[:2], '--skip-check', 'files')
    assert code == 1
    assert 'error: 1 errors and 0 warnings in 8 samples' in out
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
