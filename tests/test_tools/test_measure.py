import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.measure import CATEGORIES, VARIANTS, TrainingStep

ROOT = Path(__file__).parents[2]
DIGITS = 'configs/cascade_e3va_swin_nano_digits.py'
RETINANET = 'configs/retinanet_e3va_swin_nano_digits.py'
SMALL = ('--size', '64', '64', '--batch', '1', '--threads', '1')
SHORT = (*SMALL, '--steps', '2', '--warmup', '0', '--device', 'cpu')


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'measure', ROOT / 'tools' / 'measure.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(tool, monkeypatch, capsys):
    """The tool in this process, in the repository; what it prints."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('COLUMNS', '250')

    def run(*args):
        tool.main([str(arg) for arg in args])
        return capsys.readouterr().out

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


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """One run with all there is to ask for."""
    folder = tmp_path_factory.mktemp('new') / 'folder'
    done = subprocess.run(
        [
            *(sys.executable, 'tools/measure.py', DIGITS, *SHORT),
            *('--compare', 'full,frozen-same', '--fits', '0.1,24'),
            *('--modules', '--json', str(folder / 'measured.json')),
            *('--plot', str(folder / 'measured.png')),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_json_holds_every_variant(measured):
    folder, _ = measured
    held = json.loads((folder / 'measured.json').read_text())
    assert list(held['variants']) == ['as-is', 'full', 'frozen-same']
    for row in held['variants'].values():
        memory = row['memory_bytes']
        assert memory['peak'] == sum(memory[key] for key in CATEGORIES)
        assert len(row['seconds']) == 2 and min(row['seconds']) > 0
        assert (row['batch'], row['size']) == (1, [64, 64])
        parameters = row['parameters']
        assert memory['optimizer'] >= 8 * parameters['trainable']
    ours, full, frozen = held['variants'].values()
    assert (
        frozen['memory_bytes']['peak']
        < ours['memory_bytes']['peak']
        < full['memory_bytes']['peak']
    )
    assert frozen['parameters']['trainable_backbone'] == 0
    assert held['arguments']['size'] == [64, 64]
    assert held['environment']['threads'] == 1


def test_tables_say_what_the_json_holds(measured):
    folder, done = measured
    held = json.loads((folder / 'measured.json').read_text())
    rows = held['variants']
    full = rows['full']['memory_bytes']['peak']
    lines = done.stdout.splitlines()
    for name, row in rows.items():
        peak = row['memory_bytes']['peak']
        (line,) = (
            t for t in lines if f'{row["parameters"]["trainable"]:,}' in t
        )
        assert line.split('│')[1].strip() == name
        assert f' {peak / 2**20:,.1f} ' in line
        assert f' {peak / full:.3f} ' in line
    environment = next(line for line in lines if line.startswith('torch'))
    for part in (
        held['environment']['torch'],
        held['environment']['device'],
        '1 threads, fp32',
        'pictures 1 x 64x64',
        '2 steps after 0 of warm-up',
    ):
        assert part in environment
    kept = done.stdout[done.stdout.index('MiB kept for backward') :]
    for module in ('backbone', 'neck', 'rpn_head', 'sum'):
        assert f'│ {module} ' in kept
    cards = done.stdout[done.stdout.index('Cards that hold the step') :]
    assert '0.1 GB' in cards and '24 GB' in cards and 'needs: ' in cards
    assert (
        "\nmodel = dict(backbone=dict(side_path=dict(trunk_weights='bf16')))\n"
        in cards
    )
    # Advice is for what the user has, not for what it is compared with.
    assert cards.count('does not fit') == 1


def test_the_picture_is_drawn(measured):
    assert plt.imread(measured[0] / 'measured.png').shape[1] > 1000


def test_resume_measures_what_is_missing(
    measured, tmp_path, tool, main, monkeypatch
):
    path = tmp_path / 'measured.json'
    held = json.loads((measured[0] / 'measured.json').read_text())
    del held['variants']['full']
    del held['variants']['frozen-same']['seconds']
    path.write_text(json.dumps(held))
    ran = []

    known = dict(held['variants']['as-is'])

    def memory(row, argv):
        ran.append(row['variant'])
        # As the file stands after each: kept if this is killed.
        saved.append(json.loads(path.read_text())['variants'])
        return {k: known[k] for k in ('parameters', 'memory_bytes')}

    saved = []
    monkeypatch.setattr(tool, 'memory_in_subprocess', memory)
    monkeypatch.setattr(tool, 'TrainingStep', Step)
    resumed = (DIGITS, *SHORT, '--json', path, '--resume')
    main(*resumed, '--compare', 'full,lean,frozen-same')
    assert ran == ['full', 'lean']
    assert 'memory_bytes' in saved[1]['full']
    assert 'memory_bytes' not in saved[1].get('lean', {})
    rows = json.loads(path.read_text())['variants']
    assert set(rows) == {'as-is', 'full', 'frozen-same', 'lean'}
    # Those to be compared are timed together, again if need be.
    assert all(row['seconds'] == [1.0, 1.0] for row in rows.values())
    before = held['variants']['frozen-same']['memory_bytes']
    assert rows['frozen-same']['memory_bytes'] == before

    # Everything is there now: no step is made.
    monkeypatch.setattr(tool, 'TrainingStep', None)
    out = main(*resumed, '--compare', 'full')
    assert 'time / full' in out and 'lean' not in out
    with pytest.raises(ConfigError, match=r'batch was 1, is 2'):
        main(*resumed, '--batch', '2')


def test_times_of_a_group_are_taken_in_turns(tool, main, monkeypatch):
    turns = []

    def run(step):
        turns.append(step.name)
        return float(len(turns))

    monkeypatch.setattr(tool, 'TrainingStep', Step)
    monkeypatch.setattr(Step, 'run', run)
    out = main(
        *(DIGITS, '--compare', 'full,frozen', '--time-only'),
        *('--steps', 3, '--warmup', 1, '--device', 'cpu'),
    )
    assert turns == ['as-is', 'full', 'frozen'] * 4
    # Of 1, 4, 7, 10 the first is warm-up.
    assert ' 7.000 (4.000-10.000) ' in out
    assert ' 8.000 (5.000-11.000) ' in out
    assert 'pictures 3 x 20x30; 3 steps after 1' in out
    assert 'peak' not in out


def test_memory_alone_of_several_configs(main, tool, monkeypatch):
    def memory(row, argv):
        scale = 3 if 'retinanet' in row['config'] else 1
        sizes = dict.fromkeys(CATEGORIES, scale * 2**20)
        return dict(
            batch=1,
            size=[64, 64],
            parameters=dict(trainable=1, backbone=4, trainable_backbone=1),
            memory_bytes=dict(sizes, peak=5 * scale * 2**20),
        )

    monkeypatch.setattr(tool, 'memory_in_subprocess', memory)
    monkeypatch.setattr(tool, 'TrainingStep', None)
    out = main(DIGITS, RETINANET, '--memory-only', '--device', 'cpu')
    first, second = Path(DIGITS).stem, Path(RETINANET).stem
    assert f'peak / {first}' in out
    assert 's/step' not in out and 'warm-up' not in out
    (line,) = (t for t in out.splitlines() if f'│ {second} ' in t)
    assert ' 15.0 ' in line and ' 3.000 ' in line


def test_labels(tool):
    rows = tool.planned(['a.py'], 'full,lora')
    assert list(rows) == ['as-is', 'full', 'lora']
    rows = tool.planned(['x/a.py', 'b.py'], 'full')
    assert list(rows) == ['a', 'a full', 'b', 'b full']
    assert rows['b full'] == dict(config='b.py', variant='full')
    assert list(tool.planned(['x/a.py', 'y/a.py'], '')) == ['x/a.py', 'y/a.py']


def test_the_content_of_a_config_counts(tool, tmp_path):
    keys = []
    for name, text in dict(a='x = 1', b='x = 1', c='x = 2').items():
        path = tmp_path / f'{name}.py'
        path.write_text(text)
        args = tool.parse_args([str(path), '--cfg-options', 'y=3'])
        keys.append(tool.content_key(tool.load(str(path), args)))
    assert keys[0] == keys[1] != keys[2]
    plain = tool.parse_args([str(path)])
    assert tool.content_key(tool.load(str(path), plain)) != keys[2]


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
        ((DIGITS, '--time-only', '--fits', '8'), 'are about memory'),
        ((DIGITS, '--device', 'gpu'), 'but got gpu'),
        ((DIGITS, '--device', 'cuda:99'), 'but got cuda:99'),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    tool, main, monkeypatch, args, message
):
    monkeypatch.setattr(tool, 'measure', None)
    with pytest.raises(ConfigError) as error:
        main(*args)
    assert message in str(error.value)


def test_an_error_is_one_line():
    done = subprocess.run(
        [sys.executable, 'tools/measure.py', DIGITS, '--plot', 'a.svg'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: --plot should end')
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'script, error, message',
    [
        ('kill -9 $$', E3VAError, 'ended by signal 9: most likely it needs'),
        ('exit 3', SystemExit, '3'),
    ],
)
def test_a_measurement_that_fails(
    tool, tmp_path, monkeypatch, script, error, message
):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\n{script}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    with pytest.raises(error) as raised:
        tool.memory_in_subprocess(dict(config='a.py', variant='full'), ['a'])
    assert message in str(raised.value)


def test_a_card_that_is_too_small(tool, monkeypatch):
    def memory(self):
        import torch

        raise torch.cuda.OutOfMemoryError('Tried to allocate 1 GiB.')

    monkeypatch.setattr(TrainingStep, 'memory', memory)
    args = tool.parse_args(
        [DIGITS, *SMALL, '--device', 'cpu', '--memory-of', DIGITS, 'as-is']
    )
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        E3VAError, match='too little memory for as-is'
    ) as error:
        tool.print_memory(args)
    assert 'Tried to allocate 1 GiB' in str(error.value)


def test_room_is_looked_at_before_steps_are_made(
    measured, tmp_path, tool, main, monkeypatch
):
    path = tmp_path / 'measured.json'
    held = json.loads((measured[0] / 'measured.json').read_text())
    for row in held['variants'].values():
        del row['seconds']
    path.write_text(json.dumps(held))
    monkeypatch.setattr(tool, 'free_bytes', lambda device: 2**20)
    monkeypatch.setattr(tool, 'TrainingStep', None)
    with pytest.raises(ConfigError, match='Timing as-is, full in turns needs'):
        main(
            *(DIGITS, *SHORT, '--compare', 'full'),
            *('--json', path, '--resume'),
        )


def test_free_memory_of_this_machine(tool):
    free = tool.free_bytes('cpu')
    assert free is None or 2**20 < free < 2**50
