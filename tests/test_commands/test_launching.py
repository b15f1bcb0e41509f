"""Options that cannot work, errors in words, and several processes."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e3va_mm import cli
from e3va_mm.commands import launching, test, train
from e3va_mm.errors import ConfigError, DataError
from e3va_mm.version import __version__
from tests.helpers import threads_of_groups
from tests.test_engine.test_hooks.tiny import segmentation_config

ROOT = Path(__file__).parents[2]


def test_the_command_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(['--help'])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert f'  {name:8} {line}\n' in text
    with pytest.raises(SystemExit):
        cli.main(['--version'])
    assert capsys.readouterr().out == f'e3va_mm {__version__}\n'
    with pytest.raises(SystemExit) as exit_:
        cli.main(['trian'])
    assert exit_.value.code == 2


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, '--help'])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f'usage: e3va {name}')


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_a_tool_in_a_clone_is_a_command(name, monkeypatch):
    called = []
    monkeypatch.setattr(cli, 'main', called.append)
    monkeypatch.setattr(sys, 'argv', ['a tool', 'an argument'])
    monkeypatch.setattr(sys, 'path', sys.path[:])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f'tools/{name}.py'), run_name='__main__')
    assert called == [[name, 'an argument']]


def test_a_command_as_a_module(tmp_path):
    """From another folder, with the package found but no clone around."""
    done = subprocess.run(
        [sys.executable, '-m', 'e3va_mm.cli', 'train', 'none.py'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'error: none.py: no such config file.'
    )


def test_config_that_cannot_be_read(tmp_path, error):
    path = tmp_path / 'config.py'
    assert f'{path}: no such config file.' in error(train, path)
    for text, expected in (
        ("_base_ = 'nothing.py'", 'nothing.py'),
        ('model = dict(', f'{path} cannot be read: '),
        ("default_scope = 'mmpose'", 'of mmpose, which is not installed'),
        (
            "default_scope = 'mmdet'\ntrain_cfg = dict()",
            'train_dataloader, optim_wrapper is missing',
        ),
    ):
        path.write_text(text)
        assert expected in error(train, path)


def test_slips_in_a_config(tmp_path, error):
    """File and line where there is one, and the original error."""
    path = tmp_path / 'config.py'
    base = segmentation_config(tmp_path)
    for text, expected in (
        (f'_base_ = {base!r}\nx = epochs_', 'line 2: NameError: name'),
        (f'_base_ = {base!r}\nx = _base_.modl', 'line 2: AttributeError: '),
        (
            f'_base_ = {base!r}\noptim_wrapper = dict(optimizer=[1])\n'
            'train_dataloader = dict(dataset=dict(pipeline=dict(a=1)))',
            'TypeError: pipeline',
        ),
        (f'_base_ = [{base!r}, {base!r}]', 'KeyError: '),
    ):
        path.write_text(text)
        found = error(train, path)
        assert found.startswith(f'error: {path} cannot be read: ')
        assert expected in found
    path.write_text('data = dict()\noptimizer = dict()\nrunner = dict()')
    assert 'a config of the 2.x line' in error(train, path)
    path.write_text(f'_base_ = {base!r}\ntrain_cfg = [1]')
    assert 'train_cfg should be a dict, but got [1]' in error(train, path)


def test_slips_on_the_command_line(tmp_path, error):
    config = segmentation_config(tmp_path, custom_hooks=[])
    option = 'custom_hooks.9.x=1'
    assert f'--cfg-options {option} does not fit {config}: ' in error(
        train, config, '--cfg-options', option
    )


@pytest.mark.parametrize(
    'name, option',
    [
        ('train', '--cfg-options'),
        ('sweep', '--cfg-options'),
        ('sweep', '--set'),
    ],
)
def test_an_option_without_a_value(name, option, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, 'config.py', option, 'model'])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f'e3va {name}: error: argument {option}: expected key=value, but got '
        'model'
    )


@pytest.mark.parametrize(
    'option, expected',
    [
        ('model.decode_head.type=NoHead', "KeyError: 'NoHead is not in the"),
        ('model.decode_head.classes=3', 'TypeError: '),
        ('visualizer.type=NoVisualizer', "KeyError: 'NoVisualizer is not"),
        ('default_hooks.timer.type=NoHook', "KeyError: 'NoHook is not"),
        ('train_dataloader.sampler.type=No', "KeyError: 'No is not in"),
        ('optim_wrapper.optimizer.momenta=1', 'TypeError: '),
    ],
)
def test_a_part_that_cannot_be_built(
    segmentation, error, monkeypatch, option, expected
):
    """The original error, whatever part it is."""
    arguments = train, segmentation, '--cfg-options', option
    text = error(*arguments)
    assert text.startswith(f'error: {segmentation} cannot be built: ')
    assert expected in text
    monkeypatch.setenv(launching.TRACE, '1')
    with pytest.raises(Exception, match=expected.partition(': ')[2][:7]):
        train.main([segmentation, '--cfg-options', option])


def test_an_explanation_hides_no_error(segmentation, error, monkeypatch):
    monkeypatch.setattr(
        launching, 'explain_data_failure', raising(KeyError('another'))
    )
    option = 'train_dataloader.dataset.type=NoDataset'
    text = error(train, segmentation, '--cfg-options', option)
    assert 'NoDataset is not in the' in text


def test_framework_that_is_not_installed(tmp_path, error, monkeypatch):
    monkeypatch.setattr(launching, 'find_spec', lambda name: None)
    text = error(test, segmentation_config(tmp_path), 'x.pth')
    assert 'config of mmseg, which is not installed' in text
    assert 'pip install onedl-mmsegmentation' in text


def test_launcher_without_its_environment(tmp_path, error, monkeypatch):
    config = segmentation_config(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    assert 'torchrun --nproc_per_node=N' in error(
        train, config, '--launcher', 'pytorch'
    )
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    assert 'started by srun; tools/slurm_train.sh' in error(
        train, config, '--launcher', 'slurm'
    )


# ---- errors


def raising(error):
    def command(*args):
        raise error

    return command


def test_interruption(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        launching, 'run', lambda *args: raising(KeyboardInterrupt)(args)
    )
    assert train.main([segmentation_config(tmp_path)]) == 130
    assert capsys.readouterr().err == (
        'error: interrupted; continue with --resume\n'
    )


def test_a_defect_keeps_its_stack_trace():
    with pytest.raises(RuntimeError, match='a defect'):
        launching.exit_code(raising(RuntimeError('a defect')), [])


def test_errors_that_others_have_wrapped(capsys):
    """By a registry, which raises them again, or by a data worker."""
    again = ConfigError('class `X` in y.py: expected this, but got that')
    again.__context__ = ConfigError('expected this, but got that')
    worker = DataError(
        'Caught DataError in DataLoader worker process 0.\nOriginal Traceback '
        '(most recent call last):\n  ...\n'
        'e3va_mm.errors.DataError: expected this, but got that\n'
    )
    for error in (again, worker):
        assert launching.exit_code(raising(error), []) == 1
        assert capsys.readouterr().err == (
            'error: expected this, but got that\n'
        )


def test_one_of_several_processes_says_where_to_look(
    one_process, capsys, monkeypatch
):
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    command = raising(RuntimeError('Connection closed by peer'))
    assert launching.exit_code(command, ['resume']) == 1
    text = capsys.readouterr().err
    assert 'Connection closed by peer' in text
    assert 'error: rank 0 of 2 failed with the RuntimeError above' in text
    assert text.endswith('continue with --resume\n')


# ---- several processes


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
    # Set by the command, here in the process of the test.
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU machines')
def test_slurm_without_an_accelerator(slurm, segmentation, tmp_path):
    """SyncBN becomes BN, gloo stands in for nccl."""
    before = threads_of_groups()
    assert train.main([segmentation, '--launcher', 'slurm']) == 0
    assert os.environ['MASTER_ADDR'] == 'localhost'
    assert (tmp_path / 'work' / 'iter_2.pth').is_file()
    assert not torch.distributed.is_initialized()
    # One that lives on can abort the process at its end.
    assert threads_of_groups() == before
    (log,) = (tmp_path / 'work').glob('*/*.log')
    text = (
        'SyncBN needs GPUs: 22 layers run as BN, over the images of each '
        'process alone.'
    )
    assert log.read_text().count(text) == 1
