import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from mmengine.config import Config

from e3va_mm.commands import measure as command
from e3va_mm.errors import E3VAError
from e3va_mm.measure import (
    CATEGORIES,
    VARIANTS,
    TrainingStep,
    own_process,
)
from e3va_mm.measure.batches import Batch

ROOT = Path(__file__).parents[2]
DIGITS = 'configs/cascade_e3va_swin_nano_digits.py'
RETINANET = 'configs/retinanet_e3va_swin_nano_digits.py'
SMALL = ('--size', '64', '64', '--batch', '1', '--threads', '1')
SHORT = (*SMALL, '--steps', '2', '--warmup', '0', '--device', 'cpu')
MIB = 2**20


@pytest.fixture
def main(monkeypatch, capsys):
    """The command in this process, in the repository; what it prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('COLUMNS', '250')
    monkeypatch.setattr(command, 'keep_freed_memory', lambda: None)

    def run(*args, code=0):
        assert command.main([str(arg) for arg in args]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


class Step:
    """Stands in where the step's own figures are of no interest."""

    def __init__(self, config, variant, size, batch, **kwargs):
        self.name = variant
        self.data = dict(inputs=[SimpleNamespace(shape=(3, 20, 30))] * 3)

    def parameters(self):
        return dict(trainable=1, backbone=4, trainable_backbone=1)

    def run(self):
        return 1.0


class Pool:
    """Runs in this process what has one of its own."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        return SimpleNamespace(result=lambda: function(*args))


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """One run with all there is to ask for."""
    folder = tmp_path_factory.mktemp('new') / 'folder'
    done = subprocess.run(
        [
            *(sys.executable, 'tools/measure.py', DIGITS, *SHORT),
            *('--compare', 'full', '--fits', '0.1,24'),
            *('--modules', '--gpu', '3090,a100'),
            *('--json', str(folder / 'measured.json')),
            *('--plot', str(folder / 'measured.png')),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((folder / 'measured.json').read_text())
    return held, done.stdout, folder


def test_json_holds_every_variant(measured):
    held, _, folder = measured
    assert list(held['variants']) == ['as-is', 'full']
    for row in held['variants'].values():
        memory = row['memory_bytes']
        assert memory['peak'] == sum(memory[key] for key in CATEGORIES)
        assert len(row['seconds']) == 2 and min(row['seconds']) > 0
        assert (row['batch'], row['size']) == (1, [64, 64])
        assert memory['optimizer'] >= 8 * row['parameters']['trainable']
    ours, full = held['variants'].values()
    assert ours['memory_bytes']['peak'] < full['memory_bytes']['peak']
    assert held['arguments']['size'] == [64, 64]
    assert held['environment']['threads'] == 1
    assert plt.imread(folder / 'measured.png').shape[1] > 1000


def test_tables_have_what_the_json_holds(measured):
    held, out, _ = measured
    rows, lines = held['variants'], out.splitlines()
    full = rows['full']['memory_bytes']['peak']
    for name, row in rows.items():
        peak = row['memory_bytes']['peak']
        (line,) = (
            t for t in lines if f'{row["parameters"]["trainable"]:,}' in t
        )
        assert line.split('│')[1].strip() == name
        assert f' {peak / MIB:,.1f} ' in line
        assert f' {peak / full:.3f} ' in line
    model = out[out.index('A model, not measured: one training step') :]
    for name, row in rows.items():
        parts = row['gpu_model']
        assert {'backbone', 'neck', 'roi_head', 'optimizer'} <= set(parts)
        assert ('backbone.side_path' in parts) == (name == 'as-is')
        assert f'A model, not measured: {name}' in model
        (line, *_) = (t for t in model.splitlines() if f'│ {name} ' in t)
        for key in ('ops', 'kernels'):
            assert f' {sum(p[key] for p in parts.values()):,} ' in line
        # Images so small are a matter of launches, on any card.
        host = f'{1e3 * sum(p["host"] for p in parts.values()):.1f}'
        assert line.split().count(host) == 3
    environment = next(line for line in lines if line.startswith('torch'))
    for part in (
        held['environment']['torch'],
        held['environment']['device'],
        '1 threads, fp32',
        'images 1 x 64x64',
        '2 steps after 0 of warm-up',
    ):
        assert part in environment
    kept = out[out.index('MiB kept for backward') :]
    for module in ('backbone', 'neck', 'rpn_head', 'sum'):
        assert f'│ {module} ' in kept
    cards = out[out.index('Cards that hold the step') :]
    assert '0.1 GB' in cards and '24 GB' in cards and 'needs: ' in cards
    assert "dict(trunk_weights='bf16')))\n" in cards
    # Advice is for what the user has, not for what it is compared with.
    assert cards.count('does not fit') == 1


def test_resume_measures_what_is_missing(
    measured, tmp_path, main, monkeypatch
):
    path = tmp_path / 'measured.json'
    held = json.loads(json.dumps(measured[0]))
    known = dict(held['variants'].pop('full'))
    path.write_text(json.dumps(held))
    ran = []

    def counted_of(row, args):
        ran.append(row['variant'])
        # As the file stands after each: kept if this is killed.
        saved.append(json.loads(path.read_text())['variants'])
        keys = ('batch', 'size', 'parameters', 'memory_bytes')
        return {k: known[k] for k in keys}

    saved = []
    monkeypatch.setattr(own_process, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(command, 'counted_of', counted_of)
    monkeypatch.setattr(command, 'TrainingStep', Step)
    resumed = (DIGITS, *SHORT, '--json', path, '--resume')
    main(*resumed, '--compare', 'full,lean')
    assert ran == ['full', 'lean']
    assert 'memory_bytes' in saved[1]['full']
    rows = json.loads(path.read_text())['variants']
    # Those to be compared are timed together, again if need be.
    assert all(row['seconds'] == [1.0, 1.0] for row in rows.values())
    ours = measured[0]['variants']['as-is']['memory_bytes']
    assert rows['as-is']['memory_bytes'] == ours

    # Everything is there now: no step is made.
    monkeypatch.setattr(command, 'TrainingStep', None)
    out = main(*resumed, '--compare', 'full')
    assert 'time / full' in out and 'lean' not in out
    assert 'batch was 1, is 2' in main(*resumed, '--batch', '2', code=1)


def test_times_of_a_group_are_taken_in_turns(main, monkeypatch):
    turns = []

    def run(step):
        turns.append(step.name)
        return float(len(turns))

    monkeypatch.setattr(command, 'TrainingStep', Step)
    monkeypatch.setattr(Step, 'run', run)
    out = main(
        *(DIGITS, '--compare', 'full,frozen', '--time-only', '--amp'),
        *('--steps', 3, '--warmup', 1, '--device', 'cpu'),
    )
    assert turns == ['as-is', 'full', 'frozen'] * 4
    # Of 1, 4, 7, 10 the first is warm-up.
    assert ' 7.000 (4.000-10.000) ' in out
    assert ' 8.000 (5.000-11.000) ' in out
    assert 'mixed precision; images 3 x 20x30; 3 steps after 1' in out
    assert 'peak' not in out


def test_memory_alone_of_two_configs(main, monkeypatch):
    def counted_of(row, args):
        scale = 3 if 'retinanet' in row['config'] else 1
        sizes = dict.fromkeys(CATEGORIES, scale * MIB)
        return dict(
            batch=1,
            size=[64, 64],
            parameters=dict(trainable=1, backbone=4, trainable_backbone=1),
            memory_bytes=dict(sizes, peak=5 * scale * MIB),
        )

    monkeypatch.setattr(own_process, 'ProcessPoolExecutor', Pool)
    monkeypatch.setattr(command, 'counted_of', counted_of)
    monkeypatch.setattr(command, 'TrainingStep', None)
    out = main(DIGITS, RETINANET, '--memory-only', '--device', 'cpu')
    first, second = Path(DIGITS).stem, Path(RETINANET).stem
    assert f'peak / {first}' in out
    assert 's/step' not in out and 'warm-up' not in out
    (line,) = (t for t in out.splitlines() if f'│ {second} ' in t)
    assert ' 15.0 ' in line and ' 3.000 ' in line


def test_the_largest_batch_comes_as_lines_for_a_config(
    main, monkeypatch, tmp_path
):
    def largest(self, gigabytes):
        return Batch(int(gigabytes), 2, self._size, 100 * MIB)

    monkeypatch.setattr(command.BatchSearch, 'largest', largest)
    monkeypatch.chdir(tmp_path)  # without the data of the quickstart
    digits = str(ROOT / DIGITS)
    out = main(*(digits, *SMALL[:3], '--fits', '8,11', '--batch', 'auto'))
    assert '4 images an update; assuming images of the given size, 100' in out
    assert '# 8 GB: 8 images of 64x64 need 100.0 MiB\n' in out
    lines = Config.fromstring(out[out.index('# 11 GB') :], '.py')
    assert lines.train_dataloader.batch_size == 11
    assert lines.optim_wrapper.accumulative_counts == 2


def test_labels():
    assert list(command.planned(['a.py'], 'full')) == ['as-is', 'full']
    rows = command.planned(['x/a.py', 'b.py'], 'full')
    assert list(rows) == ['a', 'a full', 'b', 'b full']
    assert rows['b full'] == dict(config='b.py', variant='full')
    rows = command.planned(['x/a.py', 'y/a.py'], '')
    assert list(rows) == ['x/a.py', 'y/a.py']


@pytest.mark.parametrize(
    'args, message',
    [
        ((DIGITS, '--compare', 'tiny'), f"{', '.join(VARIANTS)}, but got 'ti"),
        (('none.py',), 'none.py: no such config file'),
        ((DIGITS, '--resume'), '--resume needs'),
        ((DIGITS, '--steps', '0'), '--steps should be at least 1'),
        ((DIGITS, '--warmup', '-1'), '--warmup should be at least 0'),
        ((DIGITS, '--plot', 'a.svg'), 'end in .png or .pdf, but got a.svg'),
        ((DIGITS, '--fits', '8,x'), "8,11,24, but got '8,x'"),
        ((DIGITS, '--fits', '0'), "8,11,24, but got '0'"),
        ((DIGITS, '--time-only', '--fits', '8'), '--time-only leaves out'),
        ((DIGITS, '--meta'), '--meta has no backbone to take time of'),
        ((DIGITS, '--batch', 'auto'), '--batch auto expects --fits'),
        (
            (DIGITS, '--batch', 'auto', '--fits', '8', '--modules'),
            'and none of --compare, --time-only, --modules',
        ),
        (
            (DIGITS, '--gpu', '3090,RX'),
            "L4, V100, A100, H100, H200, but got 'RX'",
        ),
        ((DIGITS, '--device', 'gpu'), 'but got gpu'),
        ((DIGITS, '--device', 'cuda:99'), 'but got cuda:99'),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    main, monkeypatch, args, message
):
    monkeypatch.setattr(command, '_count', None)
    error = main(*args, code=1)
    assert error.startswith('error: ') and message in error


def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_that_is_killed(main, monkeypatch):
    monkeypatch.setattr(command, 'counted_of', kill)
    error = main(DIGITS, '--memory-only', '--device', 'cpu', code=1)
    assert f'Measuring as-is of {DIGITS} was killed: most likely' in error


def test_a_card_that_is_too_small(monkeypatch):
    def memory(self):
        raise torch.cuda.OutOfMemoryError('Tried to allocate 1 GiB.')

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TrainingStep, 'memory', memory)
    monkeypatch.setattr(command, 'keep_freed_memory', lambda: None)
    args = command._parser().parse_args([DIGITS, *SMALL, '--device', 'cpu'])
    row = dict(config=DIGITS, variant='as-is')
    with pytest.raises(E3VAError, match='too little memory for as-is.*1 GiB'):
        command.counted_of(row, args)
