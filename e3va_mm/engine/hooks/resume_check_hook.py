import logging
from collections.abc import Iterator
from functools import partial

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from e3va_mm.engine.runner_optimizers import optimizers_of
from e3va_mm.errors import CheckpointError
from e3va_mm.frameworks.loaders import expect_whole
from e3va_mm.registry import HOOKS
from e3va_mm.utils.listing import listed
from e3va_mm.utils.unwrapping import unwrapped

# In the `meta` of a checkpoint: names of what the optimizer held, in order.
OPTIMIZED = 'e3va_mm_optimized'
# What a resumed optimizer keeps; what a schedule counts itself.
OPTIMIZER = ('weight_decay', 'momentum', 'betas', 'eps')
PROGRESS = {'base_values', 'last_step', '_global_step', '_last_value'}
_listed = partial(listed, shown=5)


@HOOKS.register_module()
class ResumeCheckHook(Hook):
    """Refuses to resume what cannot go on, before any state is loaded.

    Checkpoints keep the names of the parameters that the optimizer holds. A
    run that resumes with others would give the optimizer's state to the wrong
    ones, or fail in torch's words. What requires a gradient does not matter:
    backbones that freeze in ``train()``, or hooks, may change it in a run.
    Refused are, too, files without the state of the optimizer, of schedules
    or of the run, such as the framework's ``best_*.pth`` and published ones:
    mmengine goes on from some of them in silence, with an optimizer that has
    forgotten. Options of the config that have no effect on a resume are named
    in one line, as is a run that has nothing left to train.

    Raises:
        CheckpointError: On a resume from a checkpoint that does not fit.
    """

    # Before hooks that take their own part of a checkpoint.
    priority = 'VERY_HIGH'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down what the optimizer holds."""
        meta = checkpoint.setdefault('meta', {})
        meta[OPTIMIZED] = optimized_names(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare a checkpoint to resume from with this run."""
        if not runner._resume:
            return
        source = runner._load_from or 'the latest checkpoint'
        anew = (
            'or start anew from these weights: `resume=False`, '
            f'`load_from={source!r}`.'
        )
        meta = checkpoint.get('meta') or {}
        parts = {
            'epoch and iteration': {'epoch', 'iter'} <= set(meta),
            'message_hub': 'message_hub' in checkpoint,
            'optimizer': 'optimizer' in checkpoint,
            'param_schedulers': 'param_schedulers' in checkpoint
            or not runner.param_schedulers,
        }
        missing = [name for name, is_there in parts.items() if not is_there]
        if missing:
            raise CheckpointError(
                f'Expected a checkpoint to resume from, but {source} holds no '
                f'{", no ".join(missing)}. Resume from an `epoch_N.pth` or '
                '`iter_N.pth` of a CheckpointHook with `save_optimizer=True` '
                f'and `save_param_scheduler=True`, {anew}'
            )
        now = optimized_names(runner)
        before = meta.get(OPTIMIZED, now)
        if before == now:
            for text in (
                *_finished(runner, meta),
                *_without_effect(runner, checkpoint),
            ):
                text = f'warning: {text}'
                print_log(text, 'current', level=logging.WARNING)
            expect_whole(str(source))
            return
        gone = [name for name in before if name not in set(now)]
        come = [name for name in now if name not in set(before)]
        changes = 'the same parameters, but in another order'
        if gone or come:
            changes = (
                f'{_listed(come)} train now and did not, {_listed(gone)} '
                'trained and do not now'
            )
        raise CheckpointError(
            f'{source} was written by a run of {len(before)} trainable '
            f'parameters, this one has {len(now)}: {changes}. Resume with the '
            f'config of that run, which is in the work folder, {anew}'
        )


def _finished(runner: Runner, meta: dict) -> Iterator[str]:
    for unit, most in (('epoch', 'max_epochs'), ('iter', 'max_iters')):
        limit = (runner.cfg.get('train_cfg') or {}).get(most)
        if limit and meta[unit] >= limit:
            yield (
                f'the checkpoint has {unit} {meta[unit]} of train_cfg.{most}='
                f'{limit}: nothing is left to train.'
            )


def _without_effect(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """Options of the config that the state of a checkpoint overrides."""
    state, changes = checkpoint['optimizer'], {}
    states = [state] if 'param_groups' in state else [*state.values()]
    for optimizer, saved in zip(optimizers_of(runner), states, strict=False):
        groups = optimizer.param_groups, saved['param_groups']
        for now, before in zip(*groups, strict=False):
            for key in ('lr', *OPTIMIZER):
                name = 'initial_lr' if key == 'lr' else key
                one, other = now.get(name), before.get(name)
                if None not in (one, other) and one != other:
                    option = f'optim_wrapper.optimizer.{key}'
                    changes.setdefault(option, (one, other))
    schedulers = runner.param_schedulers, checkpoint.get('param_schedulers')
    if all(isinstance(each, list) for each in schedulers):
        for i, (one, before) in enumerate(zip(*schedulers, strict=False)):
            now = one.state_dict()
            for key in sorted({*now} & {*before} - PROGRESS):
                if now[key] != before[key]:
                    option = f'param_scheduler.{i}.{key}'
                    changes[option] = now[key], before[key]
    if changes:
        texts = [f'{k}={a} ({b} goes on)' for k, (a, b) in changes.items()]
        yield (
            'a resume goes on with the optimizer and the schedules of its '
            f'checkpoint; without effect: {_listed(texts)}. To change them, '
            'start anew from its weights: `resume=False`, `load_from=...`.'
        )


def optimized_names(runner: Runner) -> list[str]:
    """Names of the parameters that the optimizers hold, in their order."""
    model = unwrapped(runner.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        names[parameter]
        for optimizer in optimizers_of(runner)
        for group in optimizer.param_groups
        for parameter in group['params']
        if parameter in names
    ]
