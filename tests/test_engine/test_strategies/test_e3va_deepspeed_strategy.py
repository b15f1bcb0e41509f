"""What DeepSpeed is asked for, and how it is refused where it cannot work."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from mmengine._strategy import deepspeed as mmengine_deepspeed

from e3va_mm.checkpoint import read_adapter
from e3va_mm.engine import launch
from e3va_mm.engine.strategies import E3VADeepSpeedStrategy
from e3va_mm.errors import ConfigError
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

ROOT = Path(__file__).resolve().parents[3]
HEAD = (
    'decode_head=dict(in_channels=256, in_index=0, dropout_ratio=0.0, '
    "norm_cfg=dict(type='BN')), auxiliary_head=None"
)
CONFIG = f"""
_base_ = ['./experiment.py', {str(ROOT / 'configs/_base_/deepspeed.py')!r}]
# Every parameter that trains has a gradient.
model = dict(backbone=dict(out_indices=(3,)))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
default_hooks = dict(checkpoint=dict(interval=2))
strategy = dict(gradient_clipping=0.1)
optim_wrapper = dict(
    _delete_=True, **_base_.deepspeed, optimizer=dict(type='AdamW', lr=1e-2),
    constructor='e3va_mm.SidePathOptimWrapperConstructor')
custom_hooks = [
    dict(type='e3va_mm.AdapterCheckpointHook', by_epoch=False)]
randomness = dict(seed=0)
"""


@pytest.mark.parametrize(
    'options, expected',
    [
        (
            dict(zero_optimization=dict(stage=3)),
            'stage` should be 0, 1 or 2, but got 3.',
        ),
        (
            dict(config=dict(zero_optimization=dict(stage=3))),
            "use `strategy=dict(type='e3va_mm.E3VAFSDPStrategy')`",
        ),
        (
            dict(exclude_frozen_parameters=True),
            'no run can go on from them. Leave it out;',
        ),
        (dict(config='no.json'), 'but no.json cannot be read: [Errno 2]'),
    ],
)
def test_options_that_cannot_work(options, expected):
    with pytest.raises(ConfigError) as error:
        E3VADeepSpeedStrategy(**options)
    assert expected in str(error.value)


def config_in(folder):
    make_segmentation(folder)
    side_path_config(folder, segmentation_config(folder), HEAD)
    config = folder / 'deepspeed.py'
    config.write_text(CONFIG)
    return str(config)


def test_without_deepspeed_the_tools_say_what_to_install(
    tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name, *args: None if name == 'deepspeed' else find(name, *args),
    )
    assert launch.train([config_in(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        'error: The config trains with DeepSpeed, which is not installed. '
        'Install it (pip install "deepspeed<0.19"), or leave out `strategy`.'
    )


def test_one_that_mmengine_cannot_use(monkeypatch):
    """Newer ones lack modules that mmengine imports."""
    fake = types.ModuleType('deepspeed')
    fake.__version__ = '0.19.8'
    fake.__spec__ = importlib.util.spec_from_loader('deepspeed', None)
    monkeypatch.setitem(sys.modules, 'deepspeed', fake)
    monkeypatch.setitem(sys.modules, 'deepspeed.ops.adam', None)
    monkeypatch.setattr(mmengine_deepspeed, 'deepspeed', fake)
    with pytest.raises(ConfigError) as error:
        E3VADeepSpeedStrategy(env_kwargs=dict(launcher='none', randomness={}))
    text = str(error.value)
    assert text.startswith('DeepSpeed is installed, but mmengine cannot use ')
    assert text.endswith('Take an older one: pip install "deepspeed<0.19"')


@pytest.mark.skipif(
    importlib.util.find_spec('deepspeed') is None,
    reason='DeepSpeed is not installed',
)
def test_two_processes_train_and_go_on(tmp_path):
    """Where DeepSpeed is; it compiles an operator at first."""
    config = config_in(tmp_path)

    def run(*arguments):
        process = subprocess.run(
            ['bash', ROOT / 'tools/dist_train.sh', config, '2', *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                'CUDA_VISIBLE_DEVICES': '',
                'OMP_NUM_THREADS': '1',
                'PYTHON': sys.executable,
            },
            capture_output=True,
            text=True,
            timeout=500,
        )
        return process.returncode, process.stdout, process.stderr

    code, out, error = run()
    assert code == 0, error
    work = tmp_path / 'work'
    assert (work / 'iter_2.pth').is_dir()
    code, out, error = run(
        '--resume', '--cfg-options', 'train_cfg.max_iters=4'
    )
    assert code == 0, error
    assert 'resumed epoch: 0, iter: 2' in out
    first, last = (
        read_adapter(work / f'adapter_iter_{n}.safetensors') for n in (2, 4)
    )
    assert first.trunks == last.trunks
    for name in first.trainable:
        assert not torch.equal(first.tensors[name], last.tensors[name]), name
    adapter = f'load_from={work / "adapter_iter_2.safetensors"}'
    code, _, error = run('--cfg-options', adapter)
    assert code == 1
    assert 'is no folder that DeepSpeed has written' in error


def test_it_is_there_where_mmengine_has_no_fsdp():
    script = """
        import mmengine._strategy
        del mmengine._strategy.FSDPStrategy
        from e3va_mm.errors import ConfigError
        from e3va_mm.registry import STRATEGIES
        assert STRATEGIES.get('e3va_mm.E3VADeepSpeedStrategy')
        try:
            STRATEGIES.build(dict(type='e3va_mm.E3VAFSDPStrategy', a=1))
        except ConfigError as error:
            print('refused:', error)
    """
    process = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    text = process.stdout.rpartition('refused: ')[2]
    assert text.startswith('E3VAFSDPStrategy needs the FSDPStrategy of mmeng')
    assert "cannot import name 'FSDPStrategy'" in text
    assert 'or train without `strategy`.' in text
