"""The command: runs, table and curves, and more runs after it."""

import json

import pytest

from e3va_mm.commands import sweep, train_folders
from tests.test_sweep import runs as tiny

LR = 'optim_wrapper.optimizer.lr'
TUNER = 'model.backbone.tuner'


@pytest.fixture
def main(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, 'keep_freed_memory', bool)
    path = tiny.segmentation(tmp_path, val=2)
    folder = tmp_path / 'sweep'

    def main(*args, code=0):
        argv = [str(path), '--work-dir', str(folder), *args]
        assert sweep.main(argv) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    main.folder = folder
    return main


def test_a_sweep_and_more_runs_after_it(main):
    text = main('--set', f'{LR}=1e-3,1e30', '--seeds', '1')
    assert '2 runs; together 2' in text
    rows = (main.folder / 'sweep.md').read_text().splitlines()
    assert rows[0] == '| run | mIoU | at |  |'
    assert rows[2].startswith('| lr=0.001_seed=0 | ')
    assert rows[3].startswith('| lr=1e+30_seed=0 | - | - | diverged')
    plot = (main.folder / 'sweep.png').read_bytes()
    assert plot.startswith(b'\x89PNG')
    run = main.folder / 'lr=0.001_seed=0'
    before = (run / 'iter_4.pth').stat().st_mtime_ns
    records = [
        json.loads(line)
        for path in run.glob('*/vis_data/scalars.json')
        for line in path.read_text().splitlines()
    ]
    assert [r['step'] for r in records if 'loss' in r] == [1, 2, 3, 4]
    assert [r['step'] for r in records if 'mIoU' in r] == [2, 4]
    text = main('--set', f'{LR}=1e-3,2e-3', '--seeds', '2', '--together', '2')
    assert '4 runs, 1 of them done before; 2 turns of 2, 1' in text
    assert (run / 'iter_4.pth').stat().st_mtime_ns == before
    rows = (main.folder / 'sweep.md').read_text().splitlines()[2:]
    assert len(rows) == 5
    figures = [float(row.split(' | ')[1]) for row in rows[:4]]
    assert figures == sorted(figures, reverse=True)
    text = main('--cfg-options', 'train_cfg.max_iters=9', code=1)
    assert 'holds figures of another run: content was' in text


def test_runs_of_folders_train_together(main, tmp_path, monkeypatch):
    monkeypatch.setattr(train_folders, 'keep_freed_memory', bool)
    configs = tiny.runs(
        tmp_path / 'experiment.py', tmp_path, a={LR: 1e-3}, b={LR: 1e30}
    )
    folders = []
    for config in configs.values():
        folders.append(tmp_path / config.work_dir)
        folders[-1].mkdir()
        (folders[-1] / 'config.py').write_text(config.pretty_text)
    assert train_folders.main([*map(str, folders)]) == 0
    assert (folders[0] / 'iter_4.pth').exists()
    assert 'not finite' in (folders[1] / 'diverged').read_text()


@pytest.mark.parametrize(
    'args, text',
    [
        (('--seeds', '0'), '--seeds should be at least 1, but got 0'),
        (('--together', '0'), '--together should be at least 1, but got 0'),
        (('--set', 'train_cfg.max_iters=2,4'), 'the same `train_cfg`'),
    ],
)
def test_wrong_options_are_refused(main, args, text):
    assert text in main(*args, code=1)
    assert not main.folder.exists()
