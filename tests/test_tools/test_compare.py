"""The command line and its protocol; trainings are played but for one."""

import fcntl
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from e3va_mm.errors import ConfigError, E3VAError
from tests.helpers import build_stock
from tests.test_engine.test_hooks.tiny import (
    make_segmentation,
    segmentation_config,
    side_path_config,
)

ROOT = Path(__file__).parents[2]
CONFIG = """
default_scope = 'mmseg'
loader = dict(num_workers=2, persistent_workers=True, prefetch_factor=4)
train_dataloader = val_dataloader = test_dataloader = loader
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='SwinTransformer', embed_dims=8))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1.0))
train_cfg = dict(max_iters=10, val_interval=5)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=5))
val_evaluator = dict(type='IoUMetric')
"""
HEAD = 'decode_head=dict(in_channels=256)'
# A kind of backbone to its accuracy by rate: the best differ.
ACCURACIES = {
    'e3va_mm.LoRA': {1e-3: 30.0, 2e-3: 60.0, 4e-3: 40.0},
    # As a value in single precision is written.
    'e3va_mm.Fixed': {1e-3: 50.09999847, 2e-3: 20.0, 4e-3: 10.0},
}
ALL = ('--methods', 'fixed,lora', '--no-measure', '--seeds', '2')


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'compare', ROOT / 'tools' / 'compare.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Played:
    """What the processes of a comparison do, in the order of their start."""

    def __init__(self):
        self.started, self.ended = [], []
        self.most = 0
        self.running = set()
        self.fails = None
        self.metric = 'mIoU'
        self.empty = None  # the split of which a metric gives nothing
        self.says = b'last line\n'

    def popen(self, command, stdout, env, **kwargs):
        return Process(self, [*map(str, command[1:])], stdout, env)

    def names(self, tool):
        return [name for kind, name in self.started if kind == tool]


class Process:
    """One training or test: it has ended when it is asked a second time."""

    def __init__(self, played, command, stdout, env):
        self.played, self.command, self.asked = played, command, 0
        self.tool = Path(command[0]).stem
        option = command.index('--work-dir') + 1
        self.folder = Path(command[option])
        run = self.folder if self.tool == 'train' else self.folder.parent
        self.name = f'{run.parent.name}/{run.name}'
        self.threads = env['OMP_NUM_THREADS']
        played.started.append((self.tool, self.name))
        played.running.add(self)
        played.most = max(played.most, len(played.running))
        stdout.write(b'first line\n' + played.says)

    def poll(self):
        self.asked += 1
        if self.asked < 2:
            return None
        self.played.running.discard(self)
        if self.name == self.played.fails:
            return 1
        if self.asked == 2:
            getattr(self, self.tool)()
        return 0

    def terminate(self):
        self.played.ended.append(self.name)

    def wait(self, timeout=None):
        return -15

    def train(self):
        config = Config.fromfile(self.command[1])
        accuracies = ACCURACIES[config.model.backbone.method.type]
        lr = config.optim_wrapper.optimizer.lr
        value = accuracies[lr] + config.randomness.seed
        data = self.folder / '2026' / 'vis_data'
        data.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(dict(loss=1.0, step=10)),
            json.dumps({self.played.metric: value, 'step': 10}),
            '{"cut',
        ]
        if self.played.metric is None:
            del lines[1]
        elif self.played.empty == 'validation':
            lines[1] = json.dumps(dict(time=1.0, data_time=0.5, step=10))
        (data / 'scalars.json').write_text('\n'.join(lines))
        checkpoint = self.folder / 'iter_10.pth'
        checkpoint.write_text('weights')
        (self.folder / 'last_checkpoint').write_text(str(checkpoint))

    def test(self):
        assert Path(self.command[2]).read_text() == 'weights'
        folder = self.folder / '2026'
        folder.mkdir(parents=True)
        figures = {self.played.metric: 33.0}
        if self.played.empty == 'test':
            figures = dict(time=1.0, data_time=0.5)
        (folder / '2026.json').write_text(json.dumps(figures))


@pytest.fixture
def played(tool, monkeypatch):
    played = Played()
    monkeypatch.setattr(
        tool, 'subprocess', SimpleNamespace(Popen=played.popen, STDOUT=None)
    )
    monkeypatch.setattr(
        tool,
        'time',
        SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic),
    )
    return played


@pytest.fixture
def main(tool, tmp_path):
    """The tool on a small config, in a folder."""
    config = tmp_path / 'small.py'
    config.write_text(CONFIG)

    def run(*args):
        tool.main(
            [
                *(str(config), '--work-dir', str(tmp_path / 'work')),
                *('--lrs', '1e-3', '2e-3', '4e-3', *args),
            ]
        )

    return run


def test_the_protocol(main, played, tmp_path, capsys):
    main(*ALL)
    # With the other seeds, the rate of each that was best on validation.
    chosen = ['fixed/lr0.001', 'lora/lr0.002']
    for method, best in zip(('fixed', 'lora'), chosen, strict=True):
        trained = [n for n in played.names('train') if n.startswith(method)]
        assert trained == [
            *(f'{method}/lr{lr}-seed0' for lr in (0.001, 0.002, 0.004)),
            f'{best}-seed1',
        ]
    tests = [f'{c}-seed{seed}' for c in chosen for seed in (0, 1)]
    assert played.names('test') == tests
    assert [kind for kind, _ in played.started] == ['train'] * 8 + ['test'] * 4
    text, progress = capsys.readouterr()
    assert 'fixed/lr0.001-seed0: 50.1 on validation, 0.0 minutes' in progress
    assert '| lora | 33.00 ± 0.00 (33.0, 33.0) | 0.002 |' in text
    work = tmp_path / 'work'
    assert (work / 'comparison.md').read_text() in text
    for cost in ('memory', 'time'):
        assert (work / f'comparison_{cost}.png').stat().st_size
    assert not list(work.rglob('*.pth')), 'checkpoints are not kept'


def test_the_same_command_goes_on(main, played, tmp_path):
    played.fails = 'lora/lr0.002-seed0'
    with pytest.raises(E3VAError):
        main(*ALL)
    before = played.names('train')
    assert before[-1] == played.fails
    played.fails = None
    main(*ALL)
    again = played.names('train')[len(before) :]
    assert not set(again) & set(before[:-1])
    count = len(played.started)
    for folder in ('fixed', 'lora'):
        shutil.rmtree(tmp_path / 'work' / folder)
    main(*ALL)
    assert len(played.started) == count, 'nothing is left to do'


def test_a_failure_says_why_and_ends_the_others(main, played, tmp_path):
    played.fails = 'fixed/lr0.002-seed0'
    with pytest.raises(E3VAError) as caught:
        main(*ALL, '--jobs', '3')
    text = str(caught.value)
    assert 'fixed/lr0.002-seed0 has failed (1)' in text
    assert 'first line\nlast line' in text
    log = text.split()[-1]
    assert Path(log) == tmp_path / 'work' / played.fails / 'train.log'
    assert 'fixed/lr0.004-seed0' in played.ended
    # What has ended well beside it is known.
    found = json.loads((tmp_path / 'work' / 'comparison.json').read_text())
    assert list(found['runs']) == ['fixed/lr0.001-seed0']
    assert 'test' not in dict(played.started)


def test_a_rate_that_diverges_is_not_chosen(main, played):
    played.fails = 'fixed/lr0.004-seed0'
    played.says = b'error: Iteration 7: loss_cls is not finite.\n'
    main(*ALL)
    assert 'fixed/lr0.001-seed1' in played.names('train')
    assert 'fixed/lr0.004-seed1' not in played.names('train')


def test_a_seed_that_diverges_stands_in_the_table(main, played, capsys):
    played.fails = 'fixed/lr0.001-seed1'
    played.says = b'error: Iteration 7: loss_cls is not finite.\n'
    main(*ALL)
    assert '| fixed | 33.0, diverged | 0.001 |' in capsys.readouterr().out
    assert 'fixed/lr0.001-seed1' not in played.names('test')
    main(*ALL)
    assert played.names('train').count('fixed/lr0.001-seed1') == 1


def test_words_of_a_log_are_no_divergence(main, played):
    played.fails = 'fixed/lr0.001-seed0'
    played.says = b'a warning: that is not finite\nerror: no disk\n'
    with pytest.raises(E3VAError, match='seed0 has failed'):
        main(*ALL)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_nothing_detected_is_zero(main, played, tmp_path, split, capsys):
    config = tmp_path / 'small.py'
    config.write_text(CONFIG.replace('IoUMetric', 'CocoMetric'))
    played.metric = 'coco/bbox_mAP'
    played.empty = split
    main(*ALL)
    text = capsys.readouterr().out
    assert ('| lora | 0.00 ± 0.00 (0.0, 0.0)' in text) == (split == 'test')


def test_a_method_that_has_changed_is_refused(main, played, tool, monkeypatch):
    main(*ALL, '--val-only')
    monkeypatch.setitem(
        tool.METHODS, 'lora', dict(type='e3va_mm.LoRA', rank=2)
    )
    with pytest.raises(ConfigError, match='another lora than there is now'):
        main(*ALL)


def test_a_folder_can_be_moved(main, played, tmp_path):
    main(*ALL, '--val-only')
    count = len(played.names('train'))
    (tmp_path / 'work').rename(tmp_path / 'elsewhere')
    main(*ALL, '--work-dir', str(tmp_path / 'elsewhere'))
    assert len(played.names('train')) == count
    assert len(played.names('test')) == 4


def test_the_table_is_there_from_the_first_on(main, played, tmp_path):
    played.fails = 'lora/lr0.004-seed0'
    with pytest.raises(E3VAError):
        main(*ALL)
    text = (tmp_path / 'work' / 'comparison.md').read_text()
    assert '| fixed | - | 0.001 |' in text
    assert 'Validation and test are the same pictures' in text


def test_jobs_share_the_cores(main, played, monkeypatch, tool):
    monkeypatch.setattr(
        tool.os, 'sched_getaffinity', lambda _: range(8), raising=False
    )
    seen = set()
    popen = played.popen
    monkeypatch.setattr(
        tool.subprocess,
        'Popen',
        lambda *args, **kwargs: (
            seen.add(kwargs['env']['OMP_NUM_THREADS'])
            or popen(*args, **kwargs)
        ),
    )
    main(*ALL, '--jobs', '3')
    assert played.most == 3
    assert seen == {'2'}


def test_trimmed_methods_have_two_seeds(main, played):
    main(*ALL[:-1], '3', '--trim', 'fixed', '--val-only')
    trained = played.names('train')
    assert 'lora/lr0.002-seed2' in trained
    assert 'fixed/lr0.001-seed1' in trained
    assert 'fixed/lr0.001-seed2' not in trained


def test_ablations_leave_the_test_split_alone(main, played, capsys):
    main(*ALL, '--val-only')
    assert played.names('test') == []
    assert '| lora | 60.50 ± 0.71 (60.0, 61.0) |' in capsys.readouterr().out


@pytest.mark.parametrize(
    'args, text',
    [
        (('--metric', 'mAcc'), 'metric was mIoU, is mAcc'),
        (('--lrs', '1e-3'), 'lrs was .*, is .0.001.'),
    ],
)
def test_other_settings_are_refused(main, played, args, text):
    main(*ALL)
    with pytest.raises(ConfigError, match=text):
        main(*ALL, *args)


def test_a_metric_that_is_not_there_is_refused(main, played):
    text = 'Expected mAcc in the validation of fixed/lr0.001-seed0, but found '
    with pytest.raises(ConfigError, match=f'{text}mIoU. .*--metric'):
        main(*ALL, '--metric', 'mAcc')


def test_a_validation_that_is_not_written_is_refused(main, played):
    played.metric = None
    with pytest.raises(ConfigError, match='but found nothing.*LocalVis'):
        main(*ALL)
    # A kill before the validation looks the same, once.
    assert played.names('train') == ['fixed/lr0.001-seed0'] * 2


def test_lost_runs_are_trained_anew(main, played, tmp_path):
    main(*ALL, '--val-only')
    shutil.rmtree(tmp_path / 'work' / 'lora')
    count = len(played.started)
    main(*ALL)
    lost = ['lora/lr0.002-seed0', 'lora/lr0.002-seed1']
    assert played.names('train')[count:] == lost
    assert len(played.names('test')) == 4


def test_runs_of_other_settings_are_not_gone_on_with(main, played, tmp_path):
    main(*ALL, '--val-only')
    work = tmp_path / 'work'
    (work / 'comparison.json').unlink()
    marks = [work / 'fixed' / f'lr{lr}-seed0' / 'mark' for lr in (1e-3, 2e-3)]
    for mark in marks:
        mark.touch()
    main(*ALL, '--val-only')
    assert all(mark.exists() for mark in marks), 'the same settings'
    (work / 'comparison.json').unlink()
    config = tmp_path / 'small.py'
    config.write_text(CONFIG.replace('max_iters=10', 'max_iters=20'))
    main(*ALL, '--val-only')
    assert not any(mark.exists() for mark in marks)


@pytest.mark.parametrize(
    'evaluator, metric',
    [
        (dict(type='CocoMetric'), 'coco/bbox_mAP'),
        ([dict(type='mmdet.CocoMetric'), dict(type='A')], 'coco/bbox_mAP'),
        ([dict(type='IoUMetric')], 'mIoU'),
        (dict(type=IoUMetric), 'mIoU'),
    ],
)
def test_the_metric_of_an_evaluator(tool, evaluator, metric):
    assert tool.metric_of(Config(dict(val_evaluator=evaluator))) == metric


def test_an_unknown_evaluator_needs_a_metric(tool):
    config = Config(dict(val_evaluator=dict(type='VOCMetric')))
    with pytest.raises(
        ConfigError, match='--metric should name what VOCMetric'
    ):
        tool.metric_of(config)


@pytest.mark.parametrize(
    'args, text',
    [
        (('--methods', 'lora,xxx'), "but got 'xxx'"),
        (('--trim', 'yyy'), "but got 'yyy'"),
        (('--seeds', '0'), '--seeds should be at least 1, but got 0'),
        (('--jobs', '0'), '--jobs should be at least 1, but got 0'),
        (('--methods', 'lora', '--trim', 'mona'), '--trim names mona, which'),
    ],
)
def test_wrong_options_are_refused(main, played, args, text):
    with pytest.raises(ConfigError, match=text):
        main(*args)
    assert played.started == []


def test_a_missing_config_is_refused(tool):
    with pytest.raises(ConfigError, match='none.py: no such config file'):
        tool.main(['none.py'])


def test_what_was_measured_goes_to_its_method(main, tool, monkeypatch):
    """Rows are named by the files that are measured."""
    commands = []

    def run(command, cwd, stdout, pass_fds):
        commands.append(command)
        stems = [Path(c).stem for c in command if c.endswith('.py')][1:]
        names = stems if len(stems) > 1 else ['as-is']
        rows = {
            name: dict(config='/here/x.py', seconds=[i])
            for i, name in enumerate(names, 1)
        }
        file = Path(command[command.index('--json') + 1])
        file.write_text(json.dumps(dict(variants=rows)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tool, 'subprocess', SimpleNamespace(run=run))
    monkeypatch.setattr(tool, 'file_bytes', lambda config: 7_000_000)
    found = []
    monkeypatch.setattr(
        tool, 'report', lambda records, args: found.append(records.measured)
    )
    main('--methods', 'fixed,lora', '--measure-only')
    main('--methods', 'mona', '--measure-only')
    both = dict(
        fixed=dict(seconds=[1], file_bytes=7_000_000),
        lora=dict(seconds=[2], file_bytes=7_000_000),
    )
    assert found[0] == both
    assert found[1] == both | {'mona': both['fixed']}
    assert ['--resume' in command for command in commands] == [False, True]


def test_an_end_is_the_end_of_all_that_was_started(tmp_path):
    """No second comparison, and no training that goes on without one."""
    make_segmentation(tmp_path)
    base = segmentation_config(tmp_path)
    config, _, _ = side_path_config(tmp_path, base, HEAD)
    work = tmp_path / 'compared'
    command = [
        *(sys.executable, ROOT / 'tools' / 'compare.py', config),
        *('--methods', 'lora', '--no-measure', '--work-dir', work),
    ]
    first = subprocess.Popen(command)
    log = work / 'lora' / 'lr0.001-seed0' / 'train.log'
    try:
        end = time.monotonic() + 100
        while not log.exists() and time.monotonic() < end:
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1
        assert 'another comparison is running, or a tra' in second.stderr
    finally:
        first.terminate()
    assert first.wait(60) == 1
    # The training held it as well.
    with (work / '.lock').open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_one_method_for_real(tmp_path):
    make_segmentation(tmp_path)
    base = segmentation_config(tmp_path)
    config, _, _ = side_path_config(tmp_path, base, HEAD)
    work = tmp_path / 'compared'
    done = subprocess.run(
        [
            *(sys.executable, ROOT / 'tools' / 'compare.py', config),
            *('--methods', 'lora', '--seeds', '1', '--lrs', '1e-3'),
            *('--work-dir', work),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    row = (work / 'comparison.md').read_text().splitlines()[2]
    assert row.startswith('| lora | ') and ' - ' not in row
    found = json.loads((work / 'comparison.json').read_text())
    run = found['runs']['lora/lr0.001-seed0']
    # Both splits are the same pictures here.
    assert run['test']['mIoU'] == run['validation']['mIoU'] > 0
    measured = found['measured']['lora']
    parameters = measured['parameters']
    trunk = sum(p.numel() for p in build_stock().parameters())
    assert parameters['backbone'] == trunk
    assert 0 < parameters['trainable_backbone'] < trunk
    # In single precision, with output norms and the head's statistics.
    trained = 4 * parameters['trainable']
    assert trained <= measured['file_bytes'] < trained + 20_000
    assert not list(work.rglob('*.pth'))
