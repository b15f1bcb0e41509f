import io
import re
import sys
import types

import pytest
from mmengine.logging import MessageHub

from e3va_mm.engine.hooks import ProgressBarHook
from tests.test_engine.test_hooks.interrupted import run
from tests.test_engine.test_hooks.toy import toy_config

SHOW_CURSOR, HIDE_CURSOR = '\x1b[?25h', '\x1b[?25l'
EVERY_STEP = [dict(type='e3va_mm.ProgressBarHook', interval=0.0)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def open_terminal(monkeypatch):
    # Called inside the test: pytest sets the streams itself before it.
    def open_terminal(name='stdout'):
        monkeypatch.setenv('TERM', 'xterm')
        monkeypatch.setenv('COLUMNS', '100')
        terminal = Terminal()
        monkeypatch.setattr(sys, name, terminal)
        return terminal

    return open_terminal


def bars(terminal):
    """The states of the bar that were drawn, as (done, total)."""
    text = re.sub(r'\x1b\[[0-9;]*m', '', terminal.getvalue())
    return [
        (int(done), int(total))
        for done, total in re.findall(
            r'training [━╸╺ ]+ +(\d+)/(\d+) loss', text
        )
    ]


def unique(states):
    return list(dict.fromkeys(states))


def test_counts_the_iterations_of_all_epochs(tmp_path, open_terminal):
    terminal = open_terminal()
    config = toy_config(
        custom_hooks=EVERY_STEP,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        **{'train_dataloader.sampler.type': 'DefaultSampler'},
    )
    config.default_hooks.logger = dict(type='LoggerHook', interval=1)
    runner = run(config, tmp_path)
    assert unique(bars(terminal)) == [(i, 6) for i in range(7)]
    text = terminal.getvalue()
    # Each log line starts where the bar was wiped, or at a line's start.
    starts = re.findall(r'(.*)\d\d/\d\d [\d:]{8} - mmengine', text)
    assert sum(start.endswith('\x1b[2K') for start in starts) >= 4
    assert all(not start or start.endswith('\x1b[2K') for start in starts)
    (loss,) = re.findall(r'6/6 ?\x1b\[0m loss (\d+\.\d{4})', text)[-1:]
    logged = re.findall(r'loss: (\d+\.\d{4})', text)
    history, _ = runner.message_hub.get_scalar('train/loss').data
    assert loss == f'{history[-1]:.4f}' and len(logged) == 6
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert all(
        getattr(handler, 'stream', None) is not sys.stdout
        or handler.stream is terminal
        for handler in runner.logger.handlers
    )


def test_counts_iterations_and_resumes(tmp_path, open_terminal):
    terminal = open_terminal()
    config = toy_config(custom_hooks=EVERY_STEP)
    run(config, tmp_path, **{'train_cfg.max_iters': 2})
    assert unique(bars(terminal)) == [(0, 2), (1, 2), (2, 2)]

    terminal.truncate(0)
    run(config, tmp_path, resume=True, **{'train_cfg.max_iters': 3})
    assert unique(bars(terminal)) == [(2, 3), (3, 3)]


def fake_runner(iteration=0, max_iters=2):
    hub = MessageHub('bar')
    hub.update_scalar('train/loss', 1.5)
    return types.SimpleNamespace(
        iter=iteration,
        max_iters=max_iters,
        message_hub=hub,
        logger=types.SimpleNamespace(handlers=[]),
    )


def test_silent_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    hook, runner = ProgressBarHook(interval=0.0), fake_runner()
    stdout = sys.stdout
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    assert sys.stdout is stdout
    hook.after_train(runner)
    assert capsys.readouterr() == ('', '')


def test_not_redrawn_within_the_interval(open_terminal):
    terminal = open_terminal()
    hook, runner = ProgressBarHook(interval=100.0), fake_runner(0, 5)
    hook.before_train(runner)
    for runner.iter in range(5):
        hook.after_train_iter(runner, runner.iter)
    hook.after_train(runner)
    assert unique(bars(terminal)) == [(0, 5), (5, 5)]


def test_other_ranks_are_silent(open_terminal, monkeypatch):
    terminal = open_terminal()
    monkeypatch.setattr(
        'e3va_mm.engine.hooks.progress_bar_hook.is_main_process', lambda: False
    )
    hook, runner = ProgressBarHook(), fake_runner()
    hook.before_train(runner)
    hook.after_train(runner)
    assert terminal.getvalue() == ''


def test_standard_error_when_output_goes_to_a_file(open_terminal, monkeypatch):
    output, error = io.StringIO(), open_terminal('stderr')
    monkeypatch.setattr(sys, 'stdout', output)
    hook, runner = ProgressBarHook(interval=0.0), fake_runner()
    hook.before_train(runner)
    print('to the file')
    hook.after_train(runner)
    assert output.getvalue() == 'to the file\n'
    assert bars(error)


def test_the_terminal_comes_back_when_training_breaks_off(open_terminal):
    terminal = open_terminal()
    hook, runner = ProgressBarHook(), fake_runner()
    hook.before_train(runner)
    assert sys.stdout is not terminal
    del hook  # as at the end of a process, or of a runner that failed
    assert sys.stdout is terminal
    text = terminal.getvalue()
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
