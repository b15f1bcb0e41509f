"""The frameworks' own tools, as installed, with a config of ours."""

import importlib.util
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest


def run(monkeypatch, framework, tool, *arguments):
    """Run ``.mim/tools/TOOL`` of a framework, in this process."""
    package = Path(importlib.util.find_spec(framework).origin).parent
    path = package / '.mim' / 'tools' / tool
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
    matplotlib.use('Agg')
    runpy.run_path(str(path), run_name='__main__')


def log_of(trained):
    (path,) = trained.folder.glob('work/*/vis_data/2*.json')
    return path


def test_browse_detections(detector, monkeypatch, tmp_path):
    run(
        *(monkeypatch, 'mmdet', 'analysis_tools/browse_dataset.py'),
        *(detector.config, '--output-dir', tmp_path, '--not-show'),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f'{i:03}.jpg' for i in range(4)]


def test_browse_maps(segmentor, monkeypatch, tmp_path):
    # The other one, in misc/, knows only classes that the dataset's class
    # names, none of the config; so does the confusion matrix.
    run(
        *(monkeypatch, 'mmseg', 'analysis_tools/browse_dataset.py'),
        *(segmentor.config, '--output-dir', tmp_path, '--not-show'),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f'{i:03}.jpg' for i in range(4)]


def test_training_time(detector, monkeypatch, capsys):
    run(
        *(monkeypatch, 'mmdet', 'analysis_tools/analyze_logs.py'),
        *('cal_train_time', log_of(detector)),
    )
    assert 'average iter time' in capsys.readouterr().out


def test_curve_of_a_detector(detector, monkeypatch, tmp_path):
    out = tmp_path / 'curve.png'
    # The default style is one that seaborn brings.
    run(
        *(monkeypatch, 'mmdet', 'analysis_tools/analyze_logs.py'),
        *('plot_curve', log_of(detector), '--keys', 'loss'),
        *('--style', 'ggplot', '--out', out),
    )
    assert out.stat().st_size > 1000


def test_curve_of_a_segmentor(segmentor, monkeypatch, tmp_path):
    pytest.importorskip('seaborn')
    out = tmp_path / 'curve.png'
    run(
        *(monkeypatch, 'mmseg', 'analysis_tools/analyze_logs.py'),
        *(log_of(segmentor), '--keys', 'loss', '--out', out),
    )
    assert out.stat().st_size > 1000


def test_best_and_worst(detector, detections, monkeypatch, tmp_path):
    predictions = detector.folder / 'predictions.pkl'
    run(
        *(monkeypatch, 'mmdet', 'analysis_tools/analyze_results.py'),
        *(detector.config, predictions, tmp_path, '--topk', 1),
    )
    for kind in ('good', 'bad'):
        assert list((tmp_path / kind).iterdir()), kind


def test_confusion_matrix(detector, detections, monkeypatch, tmp_path):
    predictions = detector.folder / 'predictions.pkl'
    run(
        *(monkeypatch, 'mmdet', 'analysis_tools/confusion_matrix.py'),
        *(detector.config, predictions, tmp_path),
    )
    assert (tmp_path / 'confusion_matrix.png').stat().st_size > 1000


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
def test_operations(framework, request, monkeypatch, capsys):
    name = dict(mmdet='detector', mmseg='segmentor')[framework]
    config = request.getfixturevalue(name).config
    some = ('--num-images', 1) if framework == 'mmdet' else ('--shape', 64)
    run(
        *(monkeypatch, framework, 'analysis_tools/get_flops.py'),
        *(config, *some),
    )
    assert 'Flops: ' in capsys.readouterr().out
