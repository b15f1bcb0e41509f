"""The frameworks' own tools, as installed, with a config of ours."""

import importlib.util
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest


@pytest.fixture
def run(monkeypatch):
    """Run ``.mim/tools/analysis_tools/TOOL.py``, in this process."""

    def run(framework, tool, *arguments):
        package = Path(importlib.util.find_spec(framework).origin).parent
        path = package / '.mim' / 'tools' / 'analysis_tools' / f'{tool}.py'
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        matplotlib.use('Agg')
        runpy.run_path(str(path), run_name='__main__')

    return run


@pytest.fixture(params=['mmdet', 'mmseg'])
def trained(request):
    name = dict(mmdet='detector', mmseg='segmentor')[request.param]
    return request.param, request.getfixturevalue(name)


def log_of(trained):
    # The newest are those of test.py.
    return sorted(trained.folder.glob('work/*/vis_data/2*.json'))[0]


def test_browsing(trained, run, tmp_path):
    # The other one of mmseg, in misc/, knows only classes that the dataset's
    # class names, none of the config; so does the confusion matrix.
    framework, trained = trained
    arguments = ('--output-dir', tmp_path, '--not-show')
    run(framework, 'browse_dataset', trained.config, *arguments)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f'{i:03}.jpg' for i in range(4)]


def test_operations(trained, run, capsys):
    framework, trained = trained
    some = dict(mmdet=('--num-images', 1), mmseg=('--shape', 64))[framework]
    run(framework, 'get_flops', trained.config, *some)
    assert 'Flops: ' in capsys.readouterr().out


def test_logs(trained, run, capsys, tmp_path):
    framework, trained = trained
    log, out = log_of(trained), tmp_path / 'curve.png'
    curve = ('--keys', 'loss', '--out', out)
    if framework == 'mmseg':
        pytest.importorskip('seaborn')
        run(framework, 'analyze_logs', log, *curve)
    else:
        run(framework, 'analyze_logs', 'cal_train_time', log)
        assert 'average iter time' in capsys.readouterr().out
        # The default style is one that seaborn brings.
        curve = (*curve, '--style', 'ggplot')
        run(framework, 'analyze_logs', 'plot_curve', log, *curve)
    assert out.stat().st_size > 1000


def test_results(detector, detections, run, tmp_path):
    predictions = detector.folder / 'predictions.pkl'
    arguments = (detector.config, predictions, tmp_path)
    run('mmdet', 'analyze_results', *arguments, '--topk', 1)
    for kind in ('good', 'bad'):
        assert list((tmp_path / kind).iterdir()), kind
    run('mmdet', 'confusion_matrix', *arguments)
    assert (tmp_path / 'confusion_matrix.png').stat().st_size > 1000
