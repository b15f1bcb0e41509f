import os
import pickle
import socket

import pytest
import torch

from e3va_mm.commands import launch
from e3va_mm.errors import ConfigError
from tests.helpers import threads_of_groups
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)


@pytest.fixture
def detection(tmp_path):
    make_coco(tmp_path, 'train')
    make_coco(tmp_path, 'val', 2)
    return detection_config(tmp_path)


@pytest.fixture
def segmentation(tmp_path):
    make_segmentation(tmp_path)
    return segmentation_config(tmp_path)


@pytest.fixture
def last_config(monkeypatch):
    """The config that a tool would have run; nothing is run."""
    kept = []
    monkeypatch.setattr(launch, '_run', lambda cfg, *args: kept.append(cfg))

    def last_config(tool, *argv):
        assert tool([str(arg) for arg in argv]) == 0
        return kept[-1]

    return last_config


@pytest.fixture
def error(capsys):
    """What a tool prints to standard error before it gives up."""

    def error(tool, *argv):
        assert tool([str(arg) for arg in argv]) == 1
        printed = capsys.readouterr().err
        start = printed.index('error: ')
        assert 'Traceback' not in printed
        return printed[start:]

    return error


# ---- options that cannot work


def test_config_that_cannot_be_read(tmp_path, error):
    path = tmp_path / 'config.py'
    assert f'{path}: no such config file.' in error(launch.train, path)
    path.write_text("_base_ = 'nothing.py'")
    assert 'nothing.py' in error(launch.train, path)
    path.write_text('model = dict(')
    assert f'{path} cannot be read: ' in error(launch.train, path)
    path.write_text("default_scope = 'mmpose'")
    assert "'mmseg', 'mmpretrain'), but got 'mmpose'" in error(
        launch.test, path, 'x.pth'
    )
    path.write_text("default_scope = 'mmdet'\ntrain_cfg = dict()")
    assert 'train_dataloader, optim_wrapper is missing' in error(
        launch.train, path
    )


def test_framework_that_is_not_installed(
    detection, segmentation, error, monkeypatch
):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    text = error(launch.train, segmentation)
    assert 'config of mmseg, which is not installed' in text
    assert 'pip install onedl-mmsegmentation' in text
    # By mmengine, where that looks for the base first, or by us.
    ours = 'config of mmdet, which is not installed'
    text = error(launch.train, detection)
    assert 'mmdet is not installed' in text or ours in text


@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU machines')
def test_mixed_precision_needs_an_accelerator(detection, error):
    assert '--amp needs an accelerator, but the device is cpu' in error(
        launch.train, detection, '--amp'
    )
    assert '`optim_wrapper.type=AmpOptimWrapper` needs' in error(
        launch.train,
        detection,
        '--cfg-options',
        'optim_wrapper.type=AmpOptimWrapper',
    )


def test_mixed_precision_with_an_accelerator(
    detection, last_config, error, monkeypatch
):
    monkeypatch.setattr(launch, 'get_device', lambda: 'cuda')
    cfg = last_config(launch.train, detection, '--amp')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert 'to be OptimWrapper, but got Other' in error(
        launch.train,
        detection,
        '--amp',
        '--cfg-options',
        'optim_wrapper.type=Other',
    )


def test_learning_rate_by_batch_size(detection, last_config, error):
    assert '`auto_scale_lr=dict(enable=False, base_batch_size=N)`' in error(
        launch.train, detection, '--auto-scale-lr'
    )
    cfg = last_config(
        launch.train,
        detection,
        '--auto-scale-lr',
        '--cfg-options',
        'auto_scale_lr.enable=False',
        'auto_scale_lr.base_batch_size=16',
    )
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)


def test_form_of_the_output(detection, tmp_path, error):
    checkpoint = tmp_path / 'x.pth'
    assert f'{checkpoint}: no such checkpoint file.' in error(
        launch.test, detection, checkpoint
    )
    checkpoint.touch()
    assert "should end in .pkl or .pickle, but got 'out.json'" in error(
        launch.test, detection, checkpoint, '--out', 'out.json'
    )
    assert "should be a directory, but got 'out.pkl'" in error(
        launch.test,
        segmentation_config(tmp_path),
        checkpoint,
        '--out',
        'out.pkl',
    )


def test_launcher_without_its_environment(detection, error, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    assert 'torchrun --nproc_per_node=N' in error(
        launch.train, detection, '--launcher', 'pytorch'
    )
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    assert 'started by srun; tools/slurm_train.sh' in error(
        launch.train, detection, '--launcher', 'slurm'
    )


# ---- what the options do to the config


def test_work_dir_and_hooks(detection, last_config, tmp_path):
    cfg = last_config(launch.train, detection)
    assert cfg.work_dir == str(tmp_path / 'work')
    assert [hook.type for hook in cfg.custom_hooks] == [
        'e3va_mm.TrainableTableHook',
        'e3va_mm.DatasetCheckHook',
        'e3va_mm.ProgressBarHook',
        'e3va_mm.TrainingGuardHook',
        'e3va_mm.ResumeCheckHook',
    ]
    cfg = last_config(launch.train, detection, '--work-dir', 'here')
    assert cfg.work_dir == 'here'
    own = [dict(type='e3va_mm.DatasetCheckHook', check_content=False)]
    cfg = last_config(
        launch.train, detection_config(tmp_path, custom_hooks=own)
    )
    assert [hook.type for hook in cfg.custom_hooks] == [
        'e3va_mm.DatasetCheckHook',
        'e3va_mm.TrainableTableHook',
        'e3va_mm.ProgressBarHook',
        'e3va_mm.TrainingGuardHook',
        'e3va_mm.ResumeCheckHook',
    ]
    assert cfg.custom_hooks[0].check_content is False
    cfg = last_config(launch.train, detection_config(tmp_path, work_dir=None))
    assert cfg.work_dir == './work_dirs/detection'


def test_resume(detection, last_config, error, tmp_path):
    options = ['--cfg-options', 'load_from=detector.pth']
    cfg = last_config(launch.train, detection, *options)
    assert (cfg.get('resume'), cfg.load_from) == (False, 'detector.pth')
    # Nothing to go on from yet: weights are loaded as without the flag.
    cfg = last_config(launch.train, detection, '--resume', *options)
    assert (cfg.resume, cfg.load_from) == (False, 'detector.pth')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'last_checkpoint').write_text('iter_1.pth')
    cfg = last_config(launch.train, detection, '--resume', *options)
    assert (cfg.resume, cfg.load_from) == (True, None)
    checkpoint = tmp_path / 'iter_1.pth'
    assert f'{checkpoint}: no such checkpoint file.' in error(
        launch.train, detection, '--resume', checkpoint
    )
    checkpoint.touch()
    cfg = last_config(launch.train, detection, '--resume', checkpoint)
    assert (cfg.resume, cfg.load_from) == (True, str(checkpoint))


def test_pictures(tmp_path, last_config, error):
    checkpoint = tmp_path / 'x.pth'
    checkpoint.touch()
    options = [checkpoint, '--show', '--wait-time', '3', '--show-dir', 'here']
    cfg = last_config(launch.test, detection_config(tmp_path), *options)
    hook = cfg.default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time, hook.test_out_dir) == (
        True,
        True,
        3.0,
        'here',
    )
    cfg = last_config(launch.test, segmentation_config(tmp_path), *options)
    hook = cfg.default_hooks.visualization
    assert (hook.draw, hook.show, cfg.visualizer.save_dir) == (
        True,
        True,
        'here',
    )
    assert "dict(type='DetVisualizationHook')" in error(
        launch.test, segmentation_config(tmp_path, default_hooks={}), *options
    )


def test_time_augmentation_of_segmentors_is_theirs(
    tmp_path, error, last_config
):
    checkpoint = tmp_path / 'x.pth'
    checkpoint.touch()
    cfg = last_config(
        launch.test, segmentation_config(tmp_path), checkpoint, '--tta'
    )
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.model.module.type == 'EncoderDecoder'
    assert cfg.test_dataloader.dataset.pipeline == cfg.tta_pipeline
    assert 'tta_model, tta_pipeline is missing' in error(
        launch.test,
        segmentation_config(tmp_path, tta_model=None, tta_pipeline=None),
        checkpoint,
        '--tta',
    )


# ---- failures


def test_interruption(detection, capsys, monkeypatch):

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, '_run', interrupt)
    assert launch.train([detection]) == 130
    assert capsys.readouterr().err == (
        'error: interrupted; continue with --resume\n'
    )


def test_a_defect_keeps_its_stack_trace(detection, monkeypatch):

    def fail(*args):
        raise RuntimeError('a defect')

    monkeypatch.setattr(launch, '_run', fail)
    with pytest.raises(RuntimeError, match='a defect'):
        launch.train([detection])


def test_errors_that_a_registry_raised_again(detection, error, monkeypatch):

    def fail(*args):
        try:
            raise ConfigError('expected this, but got that')
        except ConfigError as e:
            raise type(e)(f'class `X` in y.py: {e}')  # noqa: B904

    monkeypatch.setattr(launch, '_run', fail)
    assert (
        error(launch.train, detection)
        == 'error: expected this, but got that\n'
    )


def test_annotations_of_no_class(tmp_path, error):
    """mmengine cannot serialise a data set without pictures."""
    for name in ('train', 'val'):
        make_coco(tmp_path, name, classes=('fox', 'owl', 'elk'))
    text = error(launch.train, detection_config(tmp_path))
    assert (
        'error: train_dataloader.dataset.ann_file: '
        f'{tmp_path}/train.json has no category for 3 of 3 classes'
    ) in text


# ---- runs


def test_detector_with_test_time_augmentation(detection, tmp_path):
    assert launch.train([detection]) == 0
    out = tmp_path / 'out.pkl'
    assert (
        launch.test(
            [
                detection,
                str(tmp_path / 'work' / 'epoch_1.pth'),
                '--tta',
                '--out',
                str(out),
            ]
        )
        == 0
    )
    predictions = pickle.loads(out.read_bytes())
    assert [p['img_id'] for p in predictions] == [0, 1]
    assert {'bboxes', 'scores', 'labels'} <= set(
        predictions[0]['pred_instances']
    )


def test_no_explanation_after_the_first_step(detection, monkeypatch):
    """A defect in the middle of training does not reread the data."""

    def fail(*args, **kwargs):
        raise RuntimeError('a defect')

    monkeypatch.setattr(
        'mmdet.models.CascadeRCNN.train_step', fail, raising=False
    )
    monkeypatch.setattr(
        launch,
        'explain_data_failure',
        lambda *args: pytest.fail('looked at the data'),
    )
    with pytest.raises(RuntimeError, match='a defect'):
        launch.train([detection])


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The first of one process of a job on two nodes, without GPUs."""
    scontrol = tmp_path / 'bin' / 'scontrol'
    scontrol.parent.mkdir()
    scontrol.write_text(
        '#!/bin/sh\ntest "$*" = "show hostnames node[1-2]" && '
        'printf "localhost\\nnode2\\n"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv('PATH', f'{scontrol.parent}:{os.environ["PATH"]}')
    with socket.create_server(('', 0)) as free:
        monkeypatch.setenv('MASTER_PORT', str(free.getsockname()[1]))
    for name, value in dict(
        PROCID=0, NTASKS=1, LOCALID=0, NODELIST='node[1-2]'
    ).items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))
    # Set by the tool, here in the process of the test.
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU machines')
def test_slurm_without_an_accelerator(slurm, segmentation, tmp_path, capfd):
    """SyncBN becomes BN, gloo stands in for nccl."""
    before = threads_of_groups()
    assert launch.train([segmentation, '--launcher', 'slurm']) == 0
    assert os.environ['MASTER_ADDR'] == 'localhost'
    assert (tmp_path / 'work' / 'iter_2.pth').is_file()
    assert not torch.distributed.is_initialized()
    # One that lives on can abort the process at its end.
    assert threads_of_groups() == before
    (log,) = (tmp_path / 'work').glob('*/*.log')
    text = (
        'SyncBN needs GPUs: 22 layers run as BN, over the pictures of '
        'each process alone.'
    )
    assert log.read_text().count(text) == 1
