"""Runs that are stopped at given iterations and resumed, in one process."""

import copy
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


class Stopped(Exception):
    pass


@HOOKS.register_module()
class StopHook(Hook):
    """Ends a run after an iteration, as a kill would; nothing is written."""

    priority = 'LOWEST'

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.after:
            raise Stopped


def run(config, work_dir, resume=False, stop=None, **options):
    """Train to the end or to ``stop``; the runner."""
    if not isinstance(config, Config):
        config = Config.fromfile(config)
    config = copy.deepcopy(config)
    config.merge_from_dict(options)
    config.work_dir = str(work_dir)
    config.resume = resume
    config.experiment_name = f'{work_dir}-{stop}'.replace('/', '_')
    hooks = copy.deepcopy(config.get('custom_hooks') or [])
    if stop is not None:
        hooks.append(dict(type='StopHook', after=stop))
    config.custom_hooks = hooks
    # Whatever a process has drawn before must not matter.
    torch.manual_seed(torch.seed() % 2**31)
    # To format the config for each checkpoint, and to collect garbage for each
    # data set, takes longer than all else.
    with (
        mock.patch.object(Config, 'pretty_text', '# left out'),
        mock.patch('gc.collect'),
        # mmengine waits two seconds between passes over finite data.
        mock.patch('time.sleep'),
    ):
        runner = Runner.from_cfg(config)
        stopped = False
        try:
            runner.train()
        except Stopped:
            stopped = True
    assert stopped == (stop is not None)
    workers = getattr(runner.train_dataloader, '_iterator', None)
    if workers is not None:  # persistent; a kill would end them, too
        workers._shutdown_workers()
    return runner


def run_in_pieces(config, work_dir, stops, **options):
    """Train with a stop after each of ``stops``; the last runner."""
    for i, stop in enumerate([*stops, None]):
        runner = run(config, work_dir, i > 0, stop, **options)
    return runner


def weights(runner):
    return {k: v.clone() for k, v in runner.model.state_dict().items()}


def differing(one, other):
    """Names of the tensors that are not the same, bit for bit."""
    assert one.keys() == other.keys()
    return [k for k in one if not torch.equal(one[k], other[k])]
