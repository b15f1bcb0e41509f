"""Kills a training run at random moments and resumes it.

    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --kills 20 --stock

Trains configs/upernet_e3va_swin_nano_digits.py on a few small images, with
an adapter file and a checkpoint after every iteration, an average of the
weights (EMA), and an update every second iteration. A process of the run is
killed (SIGKILL) at a random moment: one in five while it starts, the others
while it trains. After each kill

* the newest adapter file must load;
* ``last_checkpoint`` must name a file that loads;
* the next process that gets so far must resume from exactly there.

At last the run goes on to its end, and another one gets there without a kill:
weights, averages, states of the optimizer and adapter files must be the same,
bit for bit. The closing line has the figures; the exit code is 1 if anything
failed.
"""

import argparse
import importlib
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import e3va_mm.checkpoint  # noqa: F401 changes the frameworks
from e3va_mm.datasets.digits import build_dataset
from e3va_mm.errors import CheckpointError
from e3va_mm.registry import HOOKS, MODELS
from e3va_mm.weights import read_adapter, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'upernet_e3va_swin_nano_digits.py'
SIZE = (96, 96)  # of an image
EVER = 10**6  # iterations that no run here gets to
START_UP = 0.2  # share of the kills


class Failure(Exception):
    """What a kill has broken."""


class TellHook(Hook):
    """Tells the parent process the iteration that training begins with."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs) -> None:
        """Once."""
        if self.pipe is not None:
            os.write(self.pipe, f'{runner.iter}\n'.encode())
            self.pipe = None


def run_config(data: Path, work_dir: Path, stock: bool, end: int) -> Config:
    """The config of a run that ends after ``end`` iterations."""
    config = Config.fromfile(CONFIG)
    config.work_dir = str(work_dir)
    config.randomness = dict(seed=0)
    config.train_cfg.max_iters = end
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    config.optim_wrapper.accumulative_counts = 2
    for schedule in config.param_scheduler:
        schedule.setdefault('end', EVER)  # or it would be that of the run
    loader = config.train_dataloader
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    _, _, resize, crop, *_ = loader.dataset.pipeline
    resize.scale = crop.crop_size = SIZE
    config.model.data_preprocessor.size = SIZE
    loader.dataset.data_root = str(data / 'ade20k')
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook' if stock else 'e3va_mm.AtomicCheckpointHook',
        by_epoch=False,
        interval=1,
        max_keep_ckpts=1,
    )
    config.custom_hooks = [
        dict(type='e3va_mm.ExactResumeHook'),
        dict(type='e3va_mm.TrainableEMAHook', momentum=0.01),
        dict(
            type='e3va_mm.AdapterCheckpointHook',
            by_epoch=False,
            interval=1,
            max_keep=2,
        ),
    ]
    return config


def start(config: Config, log: Path) -> tuple[int, int]:
    """Start a process that trains; its id, and the pipe that it tells by."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    code = 1
    try:
        os.close(reading)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        config.resume = (Path(config.work_dir) / 'last_checkpoint').exists()
        # Else a formatter runs for longer than all writing takes.
        with mock.patch.object(Config, 'pretty_text', config.pretty_text):
            runner = Runner.from_cfg(config)
            runner.register_hook(TellHook(writing), priority='LOWEST')
            runner.train()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def first_iteration(pipe: int, seconds: float | None) -> int | None:
    """What the process tells, if it does in time."""
    if select.select([pipe], [], [], seconds)[0]:
        told = os.read(pipe, 64)
        if told:
            return int(told.split()[0])
    return None


def newest_of(folder: Path) -> tuple[int, int, list[str]]:
    """Iterations of the newest adapter file and checkpoint, and debris.

    Raises:
        Failure: If one of the two does not load.
    """
    adapters = {
        int(re.search(r'(\d+)\.safetensors', path.name)[1]): path
        for path in folder.glob('adapter_iter_*.safetensors')
    }
    adapter = max(adapters, default=0)
    if adapter:
        try:
            read_adapter(adapters[adapter])
        except CheckpointError as error:
            raise Failure(f'the newest adapter file: {error}') from error
    checkpoint = 0
    last = folder / 'last_checkpoint'
    if last.exists():
        name = last.read_text().strip()
        try:
            checkpoint = read_checkpoint(name)['meta']['iter']
        except CheckpointError as error:
            raise Failure(
                f'last_checkpoint names {name!r}: {error}'
            ) from error
    return adapter, checkpoint, [path.name for path in folder.glob('.*.part')]


def kill_often(
    config: Config, log: Path, kills: int, alive: float
) -> Iterator[dict[str, Any]]:
    """Run, kill and look, ``kills`` times; what was seen of each.

    Args:
        config (Config): That of the run.
        log (Path): Where its processes write what they print.
        kills (int): How often.
        alive (float): The most seconds that a process trains.

    Raises:
        Failure: If a file does not load, or a resume does not work.
    """
    folder = Path(config.work_dir)
    checkpoint, start_up = 0, 2.0
    for _ in range(kills):
        process, pipe = start(config, log)
        begun = time.monotonic()
        early = random.random() < START_UP
        first = first_iteration(
            pipe, random.uniform(0, start_up) if early else None
        )
        if first is not None:
            start_up = time.monotonic() - begun
            if not early:
                time.sleep(random.uniform(0, alive))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(pipe)
        if os.WIFEXITED(status):
            raise Failure(
                'a process ended by itself:\n'
                + '\n'.join(log.read_text().splitlines()[-15:])
            )
        if first is not None and first != checkpoint:
            raise Failure(
                f'resumed with iteration {first}, expected {checkpoint}'
            )
        adapter, checkpoint, parts = newest_of(folder)
        yield dict(
            trained=first is not None,
            parts=parts,
            adapter=adapter,
            checkpoint=checkpoint,
        )


def finish(config: Config, log: Path) -> None:
    """Let a run come to its end.

    Raises:
        Failure: If it does not.
    """
    process, pipe = start(config, log)
    _, status = os.waitpid(process, 0)
    os.close(pipe)
    if status:
        raise Failure(
            'a run does not come to its end:\n'
            + '\n'.join(log.read_text().splitlines()[-15:])
        )


def differing(one: Any, other: Any, name: str = '') -> Iterator[str]:
    """Where two nested containers of tensors differ."""
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield name
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            yield f'{name}: keys'
        for key in one.keys() & other.keys():
            yield from differing(one[key], other[key], f'{name}.{key}')
    elif isinstance(one, list):
        if len(one) != len(other):
            yield f'{name}: length'
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differing(a, b, f'{name}.{i}')
    elif one != other:
        yield name


def compare(whole: Path, killed: Path, end: int) -> None:
    """Compare what two runs have come to.

    Raises:
        Failure: If a bit is not the same.
    """
    one, other = (
        read_checkpoint(folder / f'iter_{end}.pth')
        for folder in (whole, killed)
    )
    adapters = [
        read_adapter(folder / f'adapter_iter_{end}.safetensors').tensors
        for folder in (whole, killed)
    ]
    found = list(differing(*adapters, 'adapter'))
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        found += differing(one[key], other[key], key)
    if found:
        raise Failure(
            f'{len(found)} values differ from those of a run without kills: '
            f'{", ".join(found[:5])}'
        )


def main() -> int:
    """Kill, resume, compare; print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--alive',
        type=float,
        default=2.0,
        help='the most seconds that a process trains before it is killed',
    )
    parser.add_argument(
        '--stock',
        action='store_true',
        help="mmengine's own CheckpointHook, to see what it leaves behind",
    )
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)  # or forked processes lack the others
    # Imported once, for all processes.
    for name in ('mmseg.datasets', 'mmseg.models', 'mmseg.visualization'):
        importlib.import_module(name)
    for registry in (HOOKS, MODELS):
        registry.import_from_location()
    begun = time.monotonic()
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_dataset(folder / 'data', train=5, val=1, test=1, size=96)

        def config(name: str, end: int) -> Config:
            return run_config(folder / 'data', folder / name, args.stock, end)

        try:
            for each in kill_often(
                config('killed', EVER), folder / 'log', args.kills, args.alive
            ):
                seen.append(each)
                if len(seen) % 10 == 0:
                    print(
                        f'{len(seen)} kills, iteration {each["checkpoint"]}',
                        flush=True,
                    )
            # After an update, which is what ends a run anyway.
            end = (seen[-1]['checkpoint'] // 2 + 2) * 2
            finish(config('killed', end), folder / 'log')
            finish(config('whole', end), folder / 'log')
            compare(folder / 'whole', folder / 'killed', end)
        except Failure as failure:
            print(f'FAILED after {len(seen) + 1} kills: {failure}')
            return 1
    training = [each for each in seen if each['trained']]
    print(
        f'{len(seen)} kills, {len(training)} while it trained, '
        f'{sum(bool(each["parts"]) for each in seen)} while a file was being '
        f'written, '
        f'{sum(e["adapter"] > e["checkpoint"] for e in seen)} between adapter '
        f'file and checkpoint; {end} iterations; all files loaded, all '
        'resumes went on from the newest checkpoint, no bit differs from a '
        f'run without kills ({time.monotonic() - begun:.0f} s)'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
