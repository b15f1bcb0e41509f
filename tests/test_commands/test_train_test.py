"""What the options do to the config, and whole runs."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from e3va_mm.commands import launching, test, train
from e3va_mm.measure.batches import Batch
from e3va_mm.registry import HOOKS
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    segmentation_config,
    truncate,
)

TOOLS = Path(__file__).parents[2] / 'tools'
OURS = [dict(type=f'e3va_mm.{name}') for name in train.USEFUL_HOOKS]
OURS.remove(dict(type='e3va_mm.AtomicCheckpointHook'))


@pytest.fixture
def last_config(monkeypatch):
    """The config that a command would have run; nothing is run."""
    kept = []
    monkeypatch.setattr(launching, 'run', lambda cfg, *args: kept.append(cfg))

    def last_config(command, *argv):
        assert command.main([str(arg) for arg in argv]) == 0
        return kept[-1]

    return last_config


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'x.pth'
    path.touch()
    return path


# ---- what the options do


@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU machines')
def test_mixed_precision_needs_an_accelerator(detection, error):
    option = 'optim_wrapper.type=AmpOptimWrapper'
    for options in (['--amp'], ['--cfg-options', option]):
        assert 'needs an accelerator, but the device is cpu' in error(
            train, detection, *options
        )


def test_mixed_precision(detection, last_config, error, monkeypatch):
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    cfg = last_config(train, detection, '--amp')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    other = ['--cfg-options', 'optim_wrapper.type=Other']
    assert '--amp needs an OptimWrapper, but got Other' in error(
        train, detection, '--amp', *other
    )


def test_learning_rate_by_batch_size(detection, last_config, error):
    assert '`auto_scale_lr=dict(enable=False, base_batch_size=N)`' in error(
        train, detection, '--auto-scale-lr'
    )
    cfg = last_config(
        *(train, detection, '--auto-scale-lr', '--cfg-options'),
        *('auto_scale_lr.enable=False', 'auto_scale_lr.base_batch_size=16'),
    )
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)


def test_the_config_is_what_runs(detection, last_config, tmp_path):
    cfg = last_config(train, detection)
    assert cfg.work_dir == str(tmp_path / 'work')
    assert 'custom_hooks' not in cfg
    assert 'checkpoint' not in cfg.default_hooks or (
        cfg.default_hooks.checkpoint.type == 'CheckpointHook'
    )
    cfg = last_config(train, detection, '--work-dir', 'here')
    assert cfg.work_dir == 'here'
    cfg = last_config(train, detection_config(tmp_path, work_dir=None))
    assert cfg.work_dir == './work_dirs/detection'


def test_the_largest_batch(detection, last_config, error, monkeypatch, capsys):
    def largest(self, gigabytes):
        return Batch(1, self.total, (64, 64), gigabytes * 2**30)

    monkeypatch.setattr(train.BatchSearch, 'largest', largest)
    auto = (train, detection, '--batch', 'auto')
    cfg = last_config(*auto, '--gpu-memory', 8)
    assert cfg.train_dataloader.batch_size == 1
    assert cfg.optim_wrapper.accumulative_counts == 2
    said = capsys.readouterr().out
    assert '# 8 GB: 1 images of 64x64 need 8,192.0 MiB' in said
    assert 'assuming images of the largest size, 1 objects each' in said
    assert 'is for --batch auto' in error(train, detection, '--gpu-memory', 8)
    assert 'is for a new run' in error(*auto, '--resume')
    if not torch.cuda.is_available():
        assert 'such as --gpu-memory 8, but got None' in error(*auto)


def test_resume(detection, last_config, error, tmp_path):
    options = ['--cfg-options', 'load_from=detector.pth']
    cfg = last_config(train, detection, *options)
    assert (cfg.get('resume'), cfg.load_from) == (False, 'detector.pth')
    # No checkpoint yet: weights are loaded as without the flag.
    cfg = last_config(train, detection, '--resume', *options)
    assert (cfg.resume, cfg.load_from) == (False, 'detector.pth')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'last_checkpoint').write_text('iter_1.pth')
    cfg = last_config(train, detection, '--resume', 'auto', *options)
    assert (cfg.resume, cfg.load_from) == (True, None)
    checkpoint = tmp_path / 'iter_1.pth'
    assert f'{checkpoint}: no such checkpoint file.' in error(
        train, detection, '--resume', checkpoint
    )
    checkpoint.touch()
    cfg = last_config(train, detection, '--resume', checkpoint)
    assert (cfg.resume, cfg.load_from) == (True, str(checkpoint))


def test_form_of_the_output(detection, checkpoint, tmp_path, error):
    assert 'none.pth: no such checkpoint file.' in error(
        test, detection, 'none.pth'
    )
    assert "should end in .pkl or .pickle, but got 'out.json'" in error(
        test, detection, checkpoint, '--out', 'out.json'
    )
    config = segmentation_config(tmp_path)
    assert "should be a folder, but got 'out.pkl'" in error(
        test, config, checkpoint, '--out', 'out.pkl'
    )


def test_drawings(tmp_path, checkpoint, last_config, error):
    options = [checkpoint, '--show', '--wait-time', '3', '--show-dir', 'here']
    cfg = last_config(test, detection_config(tmp_path), *options)
    hook = cfg.default_hooks.visualization
    expected = (True, True, 3.0)
    assert (hook.draw, hook.show, hook.wait_time) == expected
    assert hook.test_out_dir == 'here'
    cfg = last_config(test, segmentation_config(tmp_path), *options)
    hook = cfg.default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time) == expected
    assert cfg.visualizer.save_dir == 'here'
    assert '`default_hooks.visualization=dict(type=...)`' in error(
        test, segmentation_config(tmp_path, default_hooks={}), *options
    )


def test_time_augmentation_of_segmentors_is_theirs(
    tmp_path, checkpoint, error, last_config
):
    cfg = last_config(test, segmentation_config(tmp_path), checkpoint, '--tta')
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.model.module.type == 'EncoderDecoder'
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline
    config = segmentation_config(tmp_path, tta_model=None, tta_pipeline=None)
    assert 'tta_model, tta_pipeline is missing' in error(
        test, config, checkpoint, '--tta'
    )


def test_time_augmentation_merges_no_masks(tmp_path, checkpoint, error):
    roi_head = dict(mask_head=dict(type='FCNMaskHead'))
    config = detection_config(tmp_path)
    with open(config, 'a') as file:
        file.write(f'\nmodel.update(roi_head={roi_head})\n')
    text = error(test, config, checkpoint, '--tta')
    assert 'merges boxes alone, but the model predicts masks' in text


# ---- runs


def test_a_detector_from_start_to_predictions(tmp_path, detection, capfd):
    """A stock config: one line names the hooks that it could have."""
    assert train.main([detection]) == 0
    names = ', '.join(f'e3va_mm.{name}' for name in train.USEFUL_HOOKS)
    log = capfd.readouterr().out
    assert log.count(f'Not in this config: {names} (docs/hooks.md)') == 1

    config = detection_config(tmp_path, custom_hooks=OURS)
    options = ['--cfg-options', 'train_cfg.max_epochs=2']
    assert train.main([config, '--resume', *options]) == 0
    log = capfd.readouterr().out
    assert (
        'Not in this config: e3va_mm.AtomicCheckpointHook (docs/hooks.md)'
    ) in log
    assert 'Epoch(train) [2][2/2]' in log
    assert 'Epoch(train) [1][' not in log

    out = tmp_path / 'out.pkl'
    checkpoint = str(tmp_path / 'work' / 'epoch_2.pth')
    assert test.main([config, checkpoint, '--tta', '--out', str(out)]) == 0
    assert 'coco/bbox_mAP' in capfd.readouterr().out
    predictions = pickle.loads(out.read_bytes())
    assert [p['img_id'] for p in predictions] == [0, 1]
    assert {'bboxes', 'scores', 'labels'} <= set(
        predictions[0]['pred_instances']
    )


def test_a_segmentor_from_start_to_predictions(segmentation, tmp_path, error):
    assert train.main([segmentation, '--work-dir', f'{tmp_path}/here']) == 0
    out = tmp_path / 'maps_out'
    checkpoint = str(tmp_path / 'here' / 'iter_2.pth')
    assert (
        test.main([segmentation, checkpoint, '--out', str(out), '--tta']) == 0
    )
    assert sorted(path.name for path in out.iterdir()) == [
        f'{i:03}.png' for i in range(4)
    ]
    # Another head is refused, by a test and by a resume.
    option = 'model.decode_head.channels=4'
    for command, *argv in (
        (test, checkpoint),
        (train, '--resume', checkpoint),
    ):
        text = error(command, segmentation, *argv, '--cfg-options', option)
        assert f'{checkpoint} does not fit the model of the config' in text
        assert 'decode_head.conv_seg.weight ([3, 8, 1, 1] in the file' in text


def test_wrong_class_count(detection, error, tmp_path):
    config = detection_config(tmp_path, custom_hooks=OURS)
    option = 'model.roi_head.bbox_head.1.num_classes=80'
    text = error(train, config, '--cfg-options', option)
    assert 'model.roi_head.bbox_head.1.num_classes' in text
    assert '80' in text and '3' in text


def test_missing_and_truncated_images(detection, error, tmp_path):
    config = detection_config(tmp_path, custom_hooks=OURS)
    truncate(tmp_path / 'train' / '002.jpg')
    assert f'{tmp_path}/train/002.jpg' in error(train, config)
    (tmp_path / 'val' / '000.png').unlink()
    assert f'{tmp_path}/val/000.png' in error(train, config)


def test_data_that_no_hook_could_look_at(detection, error, tmp_path):
    """The framework fails while it builds the data set."""
    (tmp_path / 'train.json').write_text('{"images": [')
    assert 'train.json' in error(train, detection)


@HOOKS.register_module(force=True)
class BreakHook(Hook):
    """A defect in the middle of training."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx:
            raise RuntimeError('a defect')


@pytest.mark.parametrize('ours', [[], OURS])
def test_no_explanation_after_the_first_step(
    detection, tmp_path, monkeypatch, ours
):
    """A defect in the middle of training does not reread the data."""
    monkeypatch.setattr(
        launching,
        'explain_data_failure',
        lambda *args: pytest.fail('looked at the data'),
    )
    hooks = [*ours, dict(type='e3va_mm.BreakHook')]
    with pytest.raises(RuntimeError, match='a defect'):
        train.main([detection_config(tmp_path, custom_hooks=hooks)])


def test_the_tool_of_a_clone(detection, tmp_path):
    """The package is not installed; what a user reads is one error."""
    done = subprocess.run(
        [sys.executable, TOOLS / 'train.py', detection, '--amp'],
        cwd=tmp_path,
        env={'PATH': ''},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: AmpOpt')


def test_no_tool_hides_a_standard_module():
    names = {path.stem for path in TOOLS.glob('*.py')} - {'test'}
    assert 'train' in names
    assert not names & sys.stdlib_module_names
