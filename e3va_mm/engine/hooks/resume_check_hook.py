from collections.abc import Sequence
from functools import partial
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from e3va_mm.engine.optimizers import optimizers_of
from e3va_mm.errors import CheckpointError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.listing import listed
from e3va_mm.utils.wrappers import unwrapped
from e3va_mm.weights.adapter_file import RECORD

# In the `meta` of a checkpoint: names of what the optimizer held, in order.
OPTIMIZED = 'e3va_mm_optimized'
# In older ones: names of what required a gradient.
TRAINABLE = 'e3va_mm_trainable'
_listed = partial(listed, shown=5)  # names in one error


@HOOKS.register_module()
class ResumeCheckHook(Hook):
    """Refuses to resume what cannot go on, before any state is loaded.

    Checkpoints keep the names of the parameters that the optimizer holds. A
    run that resumes with others would give the optimizer's state to the wrong
    ones, or fail in torch's words. What requires a gradient does not matter:
    it may change in a run, by backbones that freeze in ``train()`` or by
    hooks. Refused are, too, files without the state of the
    optimizer, of schedules or of the run: adapter files, the framework's
    ``best_*.pth``, published ones. mmengine goes on from some of them in
    silence, with an optimizer that has forgotten.

    ``tools/train.py`` adds the hook by itself.

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
        state = checkpoint.get('state_dict', {})
        if any(key.endswith(RECORD) for key in state):
            raise CheckpointError(
                f'{source} is an adapter file, which does not hold the state '
                'of the optimizer that a resume needs. Resume from a full '
                'checkpoint (`epoch_N.pth` or `iter_N.pth`), or start anew '
                f'from these weights: `resume=False`, `load_from={source!r}`.'
            )
        missing = _missing(runner, checkpoint)
        if missing:
            raise CheckpointError(
                f'Expected a checkpoint to resume from, but {source} holds no '
                f'{", no ".join(missing)}. `best_*.pth` and published files '
                'are for tests. Resume from `epoch_N.pth` or `iter_N.pth` of '
                'a CheckpointHook with `save_optimizer=True` and '
                '`save_param_scheduler=True`, or start anew from these '
                f'weights: `resume=False`, `load_from={source!r}`.'
            )
        meta = checkpoint.get('meta', {})
        if OPTIMIZED in meta:
            _compare(source, meta[OPTIMIZED], optimized_names(runner))
        elif TRAINABLE in meta:
            _compare(source, meta[TRAINABLE], trainable_names(runner.model))


def _missing(runner: Runner, checkpoint: dict[str, Any]) -> list[str]:
    if not isinstance(runner, Runner):
        return []  # some strategies keep them elsewhere
    wanted = {
        'message_hub': 'state of the run (`message_hub`)',
        'optimizer': 'state of the optimizer (`optimizer`)',
    }
    if runner.param_schedulers:
        wanted['param_schedulers'] = 'state of schedules (`param_schedulers`)'
    found = [text for key, text in wanted.items() if key not in checkpoint]
    if not {'epoch', 'iter'} <= set(checkpoint.get('meta') or {}):
        found.insert(0, 'epoch and iteration (`meta`)')
    return found


def _compare(source: str, before: Sequence[str], now: Sequence[str]) -> None:
    gone = [name for name in before if name not in set(now)]
    come = [name for name in now if name not in set(before)]
    if gone or come:
        changes = (
            f'{_listed(come)} train now and did not, {_listed(gone)} trained '
            'and do not now'
        )
    elif list(before) != list(now):
        changes = 'the same parameters, but in another order'
    else:
        return
    raise CheckpointError(
        f'{source} was written by a run of {len(before)} trainable '
        f'parameters, this one has {len(now)}: {changes}. The state of the '
        'optimizer belongs to the former. Resume with the config of that run '
        '(it is in the work folder), or start anew from its weights: '
        f'`resume=False`, `load_from={source!r}`.'
    )


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train, in the order of the model."""
    model = unwrapped(model)
    return [n for n, p in model.named_parameters() if p.requires_grad]


def optimized_names(runner: Runner) -> list[str]:
    """Names of the parameters that the optimizer holds, in its order.

    Where it is not torch's, or holds others than the model has: of those that
    require a gradient, in the order of the model.
    """
    model = unwrapped(runner.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [
        parameter
        for optimizer in optimizers_of(runner)
        for group in optimizer.param_groups
        for parameter in group['params']
    ]
    if held and names.keys() >= {*held}:
        return [names[parameter] for parameter in held]
    return trainable_names(model)
