"""The command line and its protocol; trainings are played but for one."""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from e3va_mm.commands import compare as command
from e3va_mm.comparison import jobs
from e3va_mm.errors import ConfigError
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
    'LoRA': {1e-3: 30.0, 2e-3: 60.0, 4e-3: 40.0},
    # As a value in single precision is written.
    'Frozen': {1e-3: 50.09999847, 2e-3: 20.0, 4e-3: 10.0},
}
ALL = ('--methods', 'fixed,lora', '--no-measure', '--seeds', '2')


class Played:
    """What the processes of a comparison do, in the order of their start."""

    def __init__(self):
        self.started, self.ended, self.threads = [], [], set()
        self.running = self.most = 0
        self.fails = self.hangs = None
        self.metric = 'mIoU'
        self.empty = None  # the split of which a metric gives nothing
        self.says = b'last line\n'

    def popen(self, command, stdout, env, **kwargs):
        return Process(self, [*map(str, command[3:])], stdout, env)

    def names(self, tool):
        return [name for kind, name in self.started if kind == tool]


class Process:
    """One training or test."""

    def __init__(self, played, command, stdout, env):
        self.played, self.command = played, command
        self.tool = command[0]
        self.folder = Path(command[command.index('--work-dir') + 1])
        run = self.folder if self.tool == 'train' else self.folder.parent
        self.name = f'{run.parent.name}/{run.name}'
        self.terminated = Event()
        played.threads.add(env['OMP_NUM_THREADS'])
        played.started.append((self.tool, self.name))
        played.running += 1
        played.most = max(played.most, played.running)
        stdout.write(b'first line\n' + played.says)

    def wait(self):
        fails = self.name == self.played.fails
        hangs = self.name == self.played.hangs
        self.terminated.wait(60 if hangs else 0.3 if fails else 0.02)
        self.played.running -= 1
        if fails or hangs:
            return 1 if fails else -15
        getattr(self, self.tool)()
        return 0

    def terminate(self):
        self.played.ended.append(self.name)
        self.terminated.set()

    def train(self):
        config = Config.fromfile(self.command[1])
        accuracies = ACCURACIES[config.model.backbone.tuner.type]
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
def played(monkeypatch):
    played = Played()
    monkeypatch.setattr(
        jobs, 'subprocess', SimpleNamespace(Popen=played.popen, STDOUT=None)
    )
    return played


@pytest.fixture
def work(tmp_path):
    return tmp_path / 'work'


@pytest.fixture
def main(tmp_path, work, capsys, monkeypatch):
    """The command on a small config, in a folder; what it prints."""
    config = tmp_path / 'small.py'
    config.write_text(CONFIG)
    monkeypatch.setattr(command, 'COSTS', ())  # plots take long

    def run(*args, code=0):
        arguments = [str(config), '--work-dir', str(work)]
        arguments += ['--lrs', '1e-3', '2e-3', '4e-3', *args]
        assert command.main(arguments) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def test_the_protocol(main, played, work):
    text = main(*ALL)
    # With the other seeds, the rate of each that was best on validation.
    chosen = ['fixed/lr0.001', 'lora/lr0.002']
    assert played.names('train') == [
        *(
            f'{method}/lr{lr}-seed0'
            for method in ('fixed', 'lora')
            for lr in (0.001, 0.002, 0.004)
        ),
        *(f'{best}-seed1' for best in chosen),
    ]
    tests = [f'{c}-seed{seed}' for c in chosen for seed in (0, 1)]
    assert played.names('test') == tests
    assert [kind for kind, _ in played.started] == ['train'] * 8 + ['test'] * 4
    assert '| lora | 33.00 ± 0.00 (33.0, 33.0) | 0.002 |' in text
    assert 'Validation and test are the same images' in text
    assert (work / 'comparison.md').read_text() in text
    assert not list(work.rglob('*.pth')), 'checkpoints are not kept'


def test_the_plots_are_drawn(main, played, work, monkeypatch):
    monkeypatch.setattr(command, 'COSTS', ('memory', 'time'))
    main(*ALL)
    for cost in command.COSTS:
        assert (work / f'comparison_{cost}.png').stat().st_size


def test_the_same_command_resumes(main, played, work):
    played.fails = 'lora/lr0.002-seed0'
    main(*ALL, code=1)
    before = played.names('train')
    assert before[-1] == played.fails
    # The table is there from the first run on.
    text = (work / 'comparison.md').read_text()
    assert '| fixed | - | 0.001 |' in text
    played.fails = None
    main(*ALL)
    again = played.names('train')[len(before) :]
    assert not set(again) & set(before[:-1])
    count = len(played.started)
    for folder in ('fixed', 'lora'):
        shutil.rmtree(work / folder)
    main(*ALL)
    assert len(played.started) == count, 'nothing is left to do'


def test_a_failure_says_why_and_ends_the_others(main, played, work):
    played.fails = 'fixed/lr0.004-seed0'
    played.hangs = 'fixed/lr0.002-seed0'
    text = main(*ALL, '--jobs', '3', code=1)
    assert 'error: fixed/lr0.004-seed0 has failed (1)' in text
    assert 'first line\nlast line' in text
    log = text.split()[-1]
    assert Path(log) == work / played.fails / 'train.log'
    assert played.hangs in played.ended
    # What has ended well beside it is known.
    found = json.loads((work / 'comparison.json').read_text())
    assert 'fixed/lr0.001-seed0' in found['runs']
    assert 'test' not in dict(played.started)


def test_a_rate_that_diverges_is_not_chosen(main, played):
    played.fails = 'fixed/lr0.004-seed0'
    played.says = b'error: Iteration 7: loss_cls is not finite.\n'
    main(*ALL)
    assert 'fixed/lr0.001-seed1' in played.names('train')
    assert 'fixed/lr0.004-seed1' not in played.names('train')


def test_a_seed_that_diverges_stands_in_the_table(main, played):
    played.fails = 'fixed/lr0.001-seed1'
    played.says = b'error: Iteration 7: loss_cls is not finite.\n'
    assert '| fixed | 33.0, diverged | 0.001 |' in main(*ALL)
    assert 'fixed/lr0.001-seed1' not in played.names('test')
    main(*ALL)
    assert played.names('train').count('fixed/lr0.001-seed1') == 1


def test_words_of_a_log_are_no_divergence(main, played):
    played.fails = 'fixed/lr0.001-seed0'
    played.says = b'a warning: that is not finite\nerror: no disk\n'
    assert 'seed0 has failed' in main(*ALL, code=1)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_nothing_detected_is_zero(main, played, tmp_path, split):
    config = tmp_path / 'small.py'
    config.write_text(CONFIG.replace('IoUMetric', 'CocoMetric'))
    played.metric = 'coco/bbox_mAP'
    played.empty = split
    text = main(*ALL)
    assert ('| lora | 0.00 ± 0.00 (0.0, 0.0)' in text) == (split == 'test')


def test_a_method_that_has_changed_is_refused(main, played, monkeypatch):
    main(*ALL, '--val-only')
    monkeypatch.setitem(command.METHODS, 'lora', dict(type='LoRA', rank=2))
    assert 'another lora than there is now' in main(*ALL, code=1)


def test_a_folder_can_be_moved(main, played, tmp_path, work):
    main(*ALL, '--val-only')
    count = len(played.names('train'))
    work.rename(tmp_path / 'elsewhere')
    main(*ALL, '--work-dir', str(tmp_path / 'elsewhere'))
    assert len(played.names('train')) == count
    assert len(played.names('test')) == 4


def test_jobs_share_the_cores(main, played, monkeypatch):
    monkeypatch.setattr(
        jobs.os, 'sched_getaffinity', lambda _: range(8), raising=False
    )
    main(*ALL, '--jobs', '3')
    assert played.most == 3
    assert played.threads == {'2'}


def test_trimmed_methods_have_two_seeds_and_the_test_split_may_wait(
    main, played
):
    text = main(*ALL[:-1], '3', '--trim', 'fixed', '--val-only')
    trained = played.names('train')
    assert 'lora/lr0.002-seed2' in trained
    assert 'fixed/lr0.001-seed1' in trained
    assert 'fixed/lr0.001-seed2' not in trained
    assert played.names('test') == []
    assert '| lora | 61.00 ± 1.00 (60.0, 61.0, 62.0) |' in text


def test_other_settings_are_refused(main, played):
    main(*ALL)
    text = main(*ALL, '--metric', 'mAcc', code=1)
    assert 'metric was mIoU, is mAcc' in text


def test_a_further_rate_trains_what_is_new(main, played):
    main(*ALL[:-1], '1', '--val-only', '--lrs', '1e-3')
    main(*ALL[:-1], '1', '--val-only', '--lrs', '1e-3', '2e-3')
    assert played.names('train') == [
        f'{method}/lr{lr}-seed0'
        for lr in (0.001, 0.002)
        for method in ('fixed', 'lora')
    ]


def test_a_metric_that_is_not_there_is_refused(main, played):
    text = main(*ALL, '--metric', 'mAcc', code=1)
    expected = 'Expected mAcc in the validation of fixed/lr0.001-seed0, but '
    assert f'{expected}found mIoU. ' in text and '--metric' in text
    assert played.names('train') == ['fixed/lr0.001-seed0']


def test_a_validation_that_is_not_written_is_refused(main, played):
    played.metric = None
    text = main(*ALL, code=1)
    assert 'but found nothing' in text and 'LocalVis' in text
    # A kill before the validation looks the same, once.
    trained = played.names('train')
    assert trained[:2] == ['fixed/lr0.001-seed0'] * 2


def test_side_paths_of_one_seed_train_in_one_process(main, monkeypatch, work):
    started = []

    def execute(self, run, command, folders, module):
        started.append([str(f.relative_to(work.resolve())) for f in folders])
        for folder in folders:
            if folder.name == 'lr0.004-seed0':
                (folder / 'diverged').touch()
                continue
            data = folder / '2026' / 'vis_data'
            data.mkdir(parents=True)
            (data / 'scalars.json').write_text('{"mIoU": 30.0, "step": 10}')
        return folders[0]

    monkeypatch.setattr(jobs.Jobs, '_execute', execute)
    args = ('--methods', 'e3va,e3va-mix', '--seeds', '2', '--no-measure')
    text = main(*args, '--val-only')
    rates = [f'lr{lr}-seed0' for lr in (0.001, 0.002, 0.004)]
    methods = ('e3va', 'e3va-mix')
    assert started == [
        [f'{method}/{rate}' for method in methods for rate in rates],
        [f'{method}/lr0.001-seed1' for method in methods],
    ]
    assert '| e3va | 30.00 ± 0.00 (30.0, 30.0) | 0.001 |' in text


def test_side_paths_of_other_trunks_train_apart(main, monkeypatch):
    started = []

    def train(self, *runs):
        started.append([run.method for run in runs])
        return [dict(validation=dict(mIoU=30.0)) for _ in runs]

    monkeypatch.setattr(jobs.Jobs, '_train', train)
    drops = 'e3va:trunk_drop_path=0.1'
    methods = f'e3va,adatad,e3va:preset=lean,{drops}'
    args = ('--methods', methods, '--seeds', '1', '--no-measure')
    main(*args, '--lrs', '1e-3', '2e-3', '--val-only')
    assert sorted(started) == [
        ['e3va', 'e3va', 'adatad', 'adatad'],
        ['e3va:preset=lean'] * 2,
        [drops],
        [drops],
    ]


def test_a_rate_that_was_not_best_is_trained_again_for_its_test(main, played):
    main(*ALL, '--val-only', '--lrs', '1e-3', '2e-3')
    main(*ALL, '--lrs', '1e-3')
    assert played.names('train').count('lora/lr0.001-seed0') == 2
    assert 'lora/lr0.001-seed0' in played.names('test')


def test_lost_runs_are_trained_again_for_their_test(main, played, work):
    main(*ALL, '--val-only')
    shutil.rmtree(work / 'lora')
    count = len(played.started)
    main(*ALL)
    lost = ['lora/lr0.002-seed0', 'lora/lr0.002-seed1']
    assert played.names('train')[-2:] == lost
    assert len(played.started) == count + 2 + 4


def test_runs_of_other_settings_are_not_resumed(main, played, tmp_path, work):
    main(*ALL, '--val-only')
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
        ([dict(type='mmdet.CocoMetric'), dict(type='A')], 'coco/bbox_mAP'),
        (dict(type='IoUMetric'), 'mIoU'),
        (dict(type=IoUMetric), 'mIoU'),
        (dict(type='VOCMetric', metric='mAP'), 'pascal_voc/mAP'),
        (dict(type='mine.Score'), 'auto'),
    ],
)
def test_the_metric_of_an_evaluator(evaluator, metric):
    assert command.metric_of(Config(dict(val_evaluator=evaluator))) == metric


def test_a_config_without_an_evaluator():
    with pytest.raises(ConfigError, match='Expected `val_evaluator`'):
        command.metric_of(Config())


def test_the_first_figure_of_an_unknown_evaluator_chooses(main, played, work):
    played.metric = 'mine/score'
    main(*ALL, '--metric', 'auto')
    chosen = json.loads((work / 'comparison.json').read_text())
    main(*ALL, '--metric', 'mine/score', '--work-dir', str(work / 'named'))
    named = json.loads((work / 'named' / 'comparison.json').read_text())
    assert chosen['runs'].keys() == named['runs'].keys()
    assert 'mine/score' in (work / 'comparison.md').read_text()


@pytest.mark.parametrize(
    'args, text',
    [
        (('--methods', 'lora,xxx'), "but got 'xxx'"),
        (('--trim', 'yyy'), "but got 'yyy'"),
        (('--seeds', '0'), '--seeds should be at least 1, but got 0'),
        (('--jobs', '0'), '--jobs should be at least 1, but got 0'),
        (('--methods', 'lora', '--trim', 'mona'), '--trim should be some of'),
    ],
)
def test_wrong_options_are_refused(main, played, args, text):
    assert text in main(*args, code=1)
    assert played.started == []


def test_a_missing_config_is_refused(capsys):
    assert command.main(['none.py']) == 1
    error = capsys.readouterr().err
    assert error == 'error: none.py: no such config file.\n'


def test_what_was_measured_goes_to_its_method(main, monkeypatch, work):
    """Rows are named by the files that are measured."""
    resumed = []

    def measure(argv):
        stems = [Path(path).stem for path in argv if path.endswith('.py')]
        rows = {
            name: dict(config='/here/x.py', seconds=[i])
            for i, name in enumerate(stems, 1)
        }
        if len(stems) == 1:
            rows = {'as-is': rows.popitem()[1]}
        file = Path(argv[argv.index('--json') + 1])
        file.write_text(json.dumps(dict(variants=rows)))
        resumed.append('--resume' in argv)
        return 0

    monkeypatch.setattr(command.measure, 'main', measure)
    monkeypatch.setattr(command, 'file_bytes', lambda config: 7_000_000)
    main('--methods', 'fixed,lora', '--measure-only')
    main('--methods', 'mona', '--measure-only')
    found = json.loads((work / 'comparison.json').read_text())['measured']
    assert found == dict(
        fixed=dict(seconds=[1], file_bytes=7_000_000),
        lora=dict(seconds=[2], file_bytes=7_000_000),
        mona=dict(seconds=[1], file_bytes=7_000_000),
    )
    assert resumed == [False, True]


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
        assert 'Another comparison runs in' in second.stderr
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
    # Both splits are the same images here.
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
