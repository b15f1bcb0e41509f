"""The images and the table that tools/quickstart.sh ends with."""

import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[2]


def tool(name):
    spec = importlib.util.spec_from_file_location(
        name, ROOT / 'tools' / f'{name}.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(work_dir, name, *lines):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(lines))


def step(iteration, loss, **more):
    record = {'loss': loss, 'lr': 1e-3, 'step': iteration, **more}
    return json.dumps(record)


def accuracy(epoch, value):
    return json.dumps({'coco/bbox_mAP': value, 'time': 1.0, 'step': epoch})


@pytest.fixture
def interrupted(tmp_path):
    """A run killed after 50 iterations, resumed from a checkpoint at 20."""
    write_run(
        tmp_path,
        '20260101_000000',
        step(10, 4.0, loss_cls=3.0),
        step(20, 3.0, loss_cls=2.0),
        accuracy(1, 0.1),
        step(30, 9.0),
        step(50, 9.0),
        '{"loss": 8.0, "st',
    )
    write_run(
        tmp_path,
        '20260102_000000',
        step(30, 2.0),
        step(40, 1.0),
        accuracy(2, 0.2),
    )
    # Of a start that failed before its first iteration.
    write_run(tmp_path, '20260103_000000', '')
    return tmp_path


def test_a_resumed_run_replaces_what_was_lost(interrupted):
    train, val = tool('plot_curves').read_work_dir(interrupted)
    losses = {i: record['loss'] for i, record in train.items()}
    assert losses == {10: 4.0, 20: 3.0, 30: 2.0, 40: 1.0}
    # Validations stand at iterations, though their step counts epochs.
    assert {i: r['coco/bbox_mAP'] for i, r in val.items()} == {
        20: 0.1,
        40: 0.2,
    }


def test_a_training_that_began_again_forgets_all_before(interrupted):
    write_run(interrupted, '20260104_000000', step(10, 7.0))
    train, val = tool('plot_curves').read_work_dir(interrupted)
    assert [record['loss'] for record in train.values()] == [7.0]
    assert val == {}


def test_curves_show_each_loss_and_headline(interrupted):
    plot = tool('plot_curves')
    train, val = plot.read_work_dir(interrupted)
    val[40] |= {'coco/bbox_mAP_s': -1.0, 'coco/bbox_mAP_50': 0.5}
    figure = plot.draw(train, val, 'title')
    losses, accuracies, rate = figure.axes
    curves = {line.get_label(): line for line in losses.lines}
    assert set(curves) == {'loss', 'loss_cls'}
    np.testing.assert_array_equal(curves['loss'].get_ydata(), [4, 3, 2, 1])
    np.testing.assert_array_equal(curves['loss_cls'].get_xdata(), [10, 20])
    names = {line.get_label() for line in accuracies.lines}
    assert names == {'coco/bbox_mAP: 0.2', 'coco/bbox_mAP_50: 0.5'}
    assert len(rate.lines) == 1
    plt.close(figure)


def test_curves_before_the_first_validation(tmp_path):
    write_run(tmp_path, '20260101_000000', step(10, 4.0))
    out = tmp_path / 'sub' / 'curves.png'
    tool('plot_curves').main([str(tmp_path), '--out', str(out)])
    assert plt.imread(out).shape[0] > 500


def test_an_empty_work_directory_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match='Train into this directory first'):
        tool('plot_curves').main([str(tmp_path)])


class FakeDetector:
    """Finds a box and a mask at a known place, and one of a low score."""

    boxes = torch.tensor([[10.0, 5, 20, 15], [0, 0, 5, 5]], requires_grad=True)

    def test_step(self, batch):
        (sample,) = batch['data_samples']
        masks = torch.zeros(2, 20, 30, dtype=torch.bool)
        masks[0, 5:15, 10:20] = True
        sample.pred_instances = InstanceData(
            bboxes=self.boxes + 0,
            labels=torch.tensor([1, 0]),
            scores=torch.tensor([0.9, 0.2]),
            masks=masks,
        )
        return [sample]


@pytest.fixture
def dataset(tmp_path):
    """Images with one true object each, as a detection data set packs."""
    det = pytest.importorskip('mmdet.structures')
    structures = pytest.importorskip('mmdet.structures.mask')

    class Images(list):
        metainfo = {
            'classes': ('zero', 'one'),
            'palette': [(255, 0, 0), (0, 255, 0)],
        }

    images = Images()
    for i in range(3):
        path = tmp_path / f'image_{i}.png'
        plt.imsave(path, np.zeros((20, 30, 3)))
        sample = det.DetDataSample(metainfo={'img_path': str(path)})
        masks = np.zeros((1, 20, 30), dtype=np.uint8)
        masks[0, 2:6, 3:9] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[3.0, 2, 9, 6]]),
            labels=torch.tensor([0]),
            masks=structures.BitmapMasks(masks, 20, 30),
        )
        images.append({'inputs': None, 'data_samples': sample})
    return images


def test_detections_stand_beside_the_truth(dataset, monkeypatch):
    draw = tool('draw_detections')
    monkeypatch.setattr(draw, 'SIZE', 20)
    sheet, found = draw.draw(FakeDetector(), dataset, [0, 2, 1], 0.3)
    assert found == 3
    assert sheet.shape[1] == 2 * 2 * 20
    height = sheet.shape[0] // 2
    first, rest = sheet[:height, :40], sheet[height:, 40:]
    truth, detected = first[:, :20], first[:, 20:]
    # Red is the class of the truth, green that of what was found.
    assert truth[..., 0].sum() > truth[..., 1].sum()
    assert detected[..., 1].sum() > detected[..., 0].sum()
    assert (rest == 255).all()


@pytest.mark.parametrize(
    'text, weights, message',
    [
        (None, 'config.py', 'no such config file'),
        ("default_scope = 'mmdet'", 'none', 'no such checkpoint file'),
        ("default_scope = 'mmseg'", 'config.py', "'mmdet', but got 'mmseg'"),
    ],
)
def test_drawing_refuses_what_is_no_detector(tmp_path, text, weights, message):
    config, weights = tmp_path / 'config.py', tmp_path / weights
    if text:
        config.write_text(text)
    with pytest.raises(SystemExit, match=message):
        tool('draw_detections').main([str(config), str(weights)])


@pytest.fixture
def evaluated(tmp_path):
    """A work directory after two evaluations, without a measurement."""
    for name, value in (('20260101_000000', 0.1), ('20260102_000000', 0.456)):
        folder = tmp_path / 'test' / name
        folder.mkdir(parents=True)
        figures = {'coco/bbox_mAP': value, 'coco/segm_mAP': 0.4, 'time': 1}
        (folder / f'{name}.json').write_text(json.dumps(figures))
    return tmp_path


MEASURED = {
    'parameters': {'trainable': 12345, 'trainable_backbone': 678},
    'memory_bytes': {'peak': 3 * 2**20},
    'seconds': [0.1, 0.9, 0.2],
}


def test_the_table_joins_accuracy_and_measurements(evaluated, capsys):
    (evaluated / 'measured.json').write_text(
        json.dumps({'variants': {'as-is': MEASURED, 'full': MEASURED}})
    )
    tool('results_table').main([str(evaluated)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('|  | box AP | mask AP | trainable |')
    assert (
        lines[2] == '| trained | 0.456 | 0.400 | 12,345 | 678 | 3.0 | 0.200 |'
    )
    assert lines[3] == '| full | - | - | 12,345 | 678 | 3.0 | 0.200 |'


@pytest.mark.parametrize('missing', ['file', 'seconds', 'memory_bytes'])
def test_the_table_needs_a_whole_measurement(evaluated, missing):
    if missing != 'file':
        rows = {'as-is': MEASURED, 'full': dict(MEASURED)}
        del rows['full'][missing]
        (evaluated / 'measured.json').write_text(
            json.dumps({'variants': rows})
        )
    with pytest.raises(SystemExit, match='Measure first: python tools/meas'):
        tool('results_table').main([str(evaluated)])


def test_the_table_needs_an_evaluation(tmp_path):
    with pytest.raises(SystemExit, match='Evaluate first'):
        tool('results_table').main([str(tmp_path)])
