import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import mmengine
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import Compose
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
)

from e3va_mm.engine.hooks.resume_check_hook import ResumeCheckHook
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.wrappers import unwrapped

# In a checkpoint: where the run was, and gradients that wait for an update.
RECORD, GRADIENTS = 'e3va_mm_exact_resume', 'e3va_mm_gradients'
# What keeps something from step to step that no checkpoint holds, by the
# names of classes: hooks, modules and transforms of the frameworks.
FORGETFUL_HOOKS = ('EarlyStoppingHook', 'SwAVHook')
FORGETFUL_MODULES = ('BatchSyncRandomResize', 'DropBlock', 'DynamicRoIHead')
FORGETFUL_TRANSFORMS = ('Albu', 'CachedMixUp', 'CachedMosaic')
# Generators of their own, which one seed for all does not reach.
GENERATORS = (
    np.random.Generator,
    np.random.RandomState,
    random.Random,
    torch.Generator,
)


@HOOKS.register_module()
class ExactResumeHook(ResumeCheckHook):
    """Makes a run with interruptions give the weights of one without.

    Bit for bit on CPU, at the end of an epoch or inside it, with any number of
    workers:

    * all random numbers come from the seed, the rank and the number of the
      iteration; those of a sample from its place in the batch, too. There is
      no state of generators to save, in no process;
    * a resumed epoch begins where it was left; what it had is not loaded
      again, and iterations are counted on;
    * gradients that wait for an update (``accumulative_counts``) are part of
      the checkpoint.

    A run with the hook draws other random numbers than one without. What
    cannot be exact is refused. Beyond its sight are hooks, transforms and
    modules of your own that keep something outside the state dict.

    It does what :class:`ResumeCheckHook` does, too.

    Raises:
        ConfigError: If the run has no seed, or a part that no checkpoint
            holds.
        CheckpointError: On a resume from a checkpoint that was written without
            the hook, or by a run with another seed, batch, data set or number
            of processes.

    Examples:
        >>> randomness = dict(seed=0)
        >>> custom_hooks = [dict(type='e3va_mm.ExactResumeHook')]
    """

    def __init__(self) -> None:
        self._batches: _Batches | None = None
        self._resumed: dict[str, Any] | None = None
        self._gradients: dict[str, Tensor] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take from a checkpoint to resume from where the run was."""
        super().after_load_checkpoint(runner, checkpoint)
        if runner._resume:
            source = runner._load_from or 'the latest checkpoint'
            record = checkpoint['meta'].get(RECORD)
            if record is None:
                raise CheckpointError(
                    f'{source} was written without ExactResumeHook, so nobody '
                    'knows which random numbers come next. Leave the hook out '
                    'to go on from it, or resume from a checkpoint of a run '
                    'that has had the hook from its start.'
                )
            if record['pending'] and GRADIENTS not in checkpoint:
                raise CheckpointError(
                    f'{source} was written between two updates of the weights '
                    f'by {record["run"]["processes"]} processes, whose '
                    'gradients it does not hold. Resume from one whose '
                    'iteration is a multiple of '
                    '`optim_wrapper.accumulative_counts`, and save at such '
                    'iterations only (`interval` of the CheckpointHook).'
                )
            _compare(source, record['run'], _facts(runner))
            self._resumed = record
            self._gradients = checkpoint.get(GRADIENTS, {})

    def before_train(self, runner: Runner) -> None:
        """Refuse what cannot be exact; bring back what waits for an update."""
        _check(runner)
        model = unwrapped(runner.model)
        for name, gradient in self._gradients.items():
            parameter = model.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        if self._gradients:
            runner.logger.info(
                'The gradients since the last update of the weights are back: '
                'none is lost.'
            )
        self._gradients = {}

    def before_train_epoch(self, runner: Runner) -> None:
        """Go to where the run was, and count its iterations on."""
        if self._batches is None:
            # Not before: other hooks look at the data set before training.
            self._batches = _take_over(runner, self._resumed)
        loop, skip = runner.train_loop, self._batches.skip
        if isinstance(loop, EpochBasedTrainLoop):
            self._batches.began = runner.iter - skip
            if skip:
                run_iter = loop.run_iter
                loop.run_iter = lambda idx, batch: run_iter(idx + skip, batch)
        self._looked_at = False

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Give the iteration its random numbers."""
        if not self._looked_at:  # what other hooks have switched, too
            _check_parts(runner)
            self._looked_at = True
        seed_all((runner.seed, runner.rank, runner.iter))

    def after_train_epoch(self, runner: Runner) -> None:
        """Say that the next iteration begins a new epoch."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            vars(runner.train_loop).pop('run_iter', None)
            self._batches.began = runner.iter

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down where the run is."""
        super().before_save_checkpoint(runner, checkpoint)
        if 'optimizer' not in checkpoint or self._batches is None:
            return
        optimizer = runner.optim_wrapper
        pending = optimizer.inner_count % _accumulation(runner) != 0 and any(
            p.grad is not None for p in runner.model.parameters()
        )
        checkpoint['meta'][RECORD] = dict(
            run=_facts(runner),
            began=self._batches.began,
            passes=self._batches.passes,
            pending=pending,
        )
        # Each process has its own; only the first one saves.
        if pending and runner.world_size == 1:
            checkpoint[GRADIENTS] = {
                name: parameter.grad.detach().cpu()
                for name, parameter in (
                    unwrapped(runner.model).named_parameters()
                )
                if parameter.grad is not None
            }


def seed_all(numbers: Sequence[int]) -> None:
    """Seed the generators of torch, numpy and Python.

    Args:
        numbers (Sequence[int]): What the seeds follow from, none negative.
            Neighbours give unrelated seeds; zeros at the end are ignored.
    """
    seeds = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    torch.manual_seed(int(seeds[0]))
    np.random.seed(seeds[1])
    random.seed(int(seeds[2]))


def _take_over(runner: Runner, resumed: dict[str, Any] | None) -> '_Batches':
    """Have batches drawn from where a run was, with their seeds."""
    loop, loader = runner.train_loop, runner.train_dataloader
    batches = _Batches(loader.batch_sampler, (runner.seed, runner.rank))
    if resumed is not None:
        batches.began = resumed['began']
        batches.passes = resumed['passes']
        batches.skip = runner.iter - batches.began
    # A loader refuses new parts once it is built; it has no iterator yet.
    vars(loader).update(
        batch_sampler=batches, dataset=_SeededDataset(loader.dataset)
    )
    if isinstance(loop, IterBasedTrainLoop):
        loop.dataloader_iterator = _Endless(loop, batches)
    return batches


class _Sample(NamedTuple):
    """What a data set is asked for: an index, and what its seeds come from."""

    index: Any
    numbers: tuple[int, ...]


class _Batches:
    """A batch sampler whose samples know their seeds, from any batch on.

    Attributes:
        began: Number of the iteration that the current pass over the data
            began with.
        passes: How many came before it, in a loop of iterations.
        skip: Batches that the next pass leaves out.
    """

    def __init__(self, batches: BatchSampler, numbers: tuple[int, ...]):
        self.batches = batches
        self.numbers = numbers
        self.began = self.passes = self.skip = 0

    def __iter__(self) -> Iterator[list[_Sample]]:
        first, self.skip = self.began + self.skip, 0
        batches = iter(self.batches)
        for i in count(self.began):
            numbers = *self.numbers, i
            # Some samplers draw from the global generators. With a 0 at the
            # end they would draw what the iteration itself draws.
            seed_all((*numbers, 1))
            try:
                batch = next(batches)
            except StopIteration:
                return
            if i >= first:
                yield [
                    _Sample(index, (*numbers, place))
                    for place, index in enumerate(batch, 2)
                ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)


class _SeededDataset(Dataset):
    """A data set that seeds every sample, whichever process loads it.

    All else, what hooks set included, is that of the data set itself.
    """

    def __init__(self, dataset: Dataset) -> None:
        vars(self)['dataset'] = dataset

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, _Sample):
            index, numbers = index
            seed_all(numbers)
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Among them torch's way to fetch a whole batch at once.
        if name.startswith('__') or name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


class _Endless:
    """Pass after pass over the data, for a loop of iterations.

    Takes the place of mmengine's, which goes to where a run was by itself.
    """

    def __init__(self, loop: IterBasedTrainLoop, batches: _Batches) -> None:
        self._loop = loop
        self._batches = batches
        self._iterator: Iterator | None = None

    def __iter__(self) -> '_Endless':
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._begin()
        try:
            return next(self._iterator)
        except StopIteration:
            self._batches.passes += 1
            self._batches.began = self._loop.iter
            self._begin()
            return next(self._iterator)

    def _begin(self) -> None:
        loader = self._loop.dataloader
        for sampler in _samplers(loader):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(self._batches.passes)
        self._iterator = iter(loader)

    def skip_iter(self, num_iters: int) -> None:
        """Nothing: the batch sampler begins where it should."""


def _samplers(loader: DataLoader) -> list[Any]:
    """What draws the indices of a loader, from the outside inwards."""
    found = [loader.batch_sampler]
    while (inner := getattr(found[-1], 'sampler', None)) is not None:
        found.append(inner)
    return found


def _facts(runner: Runner) -> dict[str, Any]:
    """What must be the same for the same random numbers and batches."""
    loader = runner.train_dataloader
    samplers = _samplers(loader)
    return dict(
        seed=runner._randomness_cfg.get('seed'),
        sampler=type(samplers[-1]).__name__,
        sampler_seed=getattr(samplers[-1], 'seed', None),
        samples=len(loader.dataset),
        batch_size=getattr(loader.batch_sampler, 'batch_size', None),
        accumulative_counts=_accumulation(runner),
        processes=runner.world_size,
    )


def _compare(source: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = [
        f'{name} {before.get(name)!r}, now {value!r}'
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changes:
        raise CheckpointError(
            f'{source} cannot be continued exactly: it was written with '
            f'{"; ".join(changes)}. Set these as they were, or leave '
            'ExactResumeHook out.'
        )


def _accumulation(runner: Runner) -> int:
    wrapper = runner.optim_wrapper
    return getattr(wrapper, '_accumulative_counts', 1)


def _check(runner: Runner) -> None:
    """Refuse what cannot be exact."""
    if not isinstance(runner, Runner):
        _refuse(
            f"mmengine's Runner, but got {type(runner).__name__}",
            'leave out `runner_type`',
        )
    if runner._randomness_cfg.get('seed') is None:
        _refuse(
            'a seed, but `randomness.seed` is not set',
            'set `randomness=dict(seed=0)`',
        )
    if type(runner.train_loop) not in (
        EpochBasedTrainLoop,
        IterBasedTrainLoop,
    ):
        _refuse(
            'EpochBasedTrainLoop or IterBasedTrainLoop, but got '
            f'`train_cfg.type={type(runner.train_loop).__name__}`',
            'use one of the two',
        )
    if isinstance(runner.train_loop, IterBasedTrainLoop) and not hasattr(
        runner.train_loop.dataloader_iterator, 'skip_iter'
    ):
        # Its loop has an iterator from the start, and with workers samples.
        _refuse(
            'mmengine>=0.10.8, whose loops of iterations load nothing before '
            f'they run, but got {mmengine.__version__}',
            "update it: pip install 'onedl-mmengine>=0.10.8'",
        )
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        _refuse(
            'one optimizer, but `optim_wrapper` has several',
            'use one optimizer with groups (`paramwise_cfg`)',
        )
    for scheduler in runner.param_schedulers or ():
        if getattr(scheduler, 'need_val_args', False):
            _refuse(
                'schedules that do not look at metrics, but got '
                f'{type(scheduler).__name__}',
                'use another `param_scheduler`',
            )
    _check_data(runner.train_dataloader)
    _check_parts(runner)
    _check_savers(runner)


def _check_data(loader: DataLoader) -> None:
    if isinstance(loader.dataset, IterableDataset):
        _refuse(
            'a data set with indices, but got '
            f'`train_dataloader.dataset.type={type(loader.dataset).__name__}`',
            'use one with `__getitem__` and `__len__`',
        )
    if loader.batch_sampler is None:
        _refuse(
            'batches, but `train_dataloader.batch_size` is None',
            'set it',
        )


def _check_parts(runner: Runner) -> None:
    for kind, parts, names in (
        ('sampler', _samplers(runner.train_dataloader), ()),
        ('hook', runner.hooks, FORGETFUL_HOOKS),
        ('module', unwrapped(runner.model).modules(), FORGETFUL_MODULES),
        (
            'transform',
            _transforms(runner.train_dataloader.dataset),
            FORGETFUL_TRANSFORMS,
        ),
    ):
        for part in parts:
            own = any(isinstance(v, GENERATORS) for v in vars(part).values())
            if own or any(c.__name__ in names for c in type(part).__mro__):
                what = (
                    'has random numbers of its own'
                    if own
                    else 'remembers what checkpoints do not hold'
                )
                _refuse(
                    f'parts whose state is in the checkpoint, but the {kind} '
                    f'{type(part).__name__} {what}',
                    'leave it out',
                )


def _transforms(dataset: Any) -> Iterator[Any]:
    """The transforms of a data set, those inside of wrappers included."""
    for inner in getattr(dataset, 'datasets', ()):
        yield from _transforms(inner)
    if hasattr(dataset, 'dataset'):
        yield from _transforms(dataset.dataset)
    yield from _below(getattr(dataset, 'pipeline', ()))


def _below(value: Any) -> Iterator[Any]:
    """Transforms in a list, and in each other."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _below(each)
    elif callable(value) and hasattr(value, '__dict__'):
        yield value
        for inner in vars(value).values():
            if isinstance(inner, (list, tuple, dict, BaseTransform, Compose)):
                yield from _below(inner)


def _check_savers(runner: Runner) -> None:
    """Of several processes each has gradients, and one saves."""
    counts = _accumulation(runner)
    if counts == 1 or runner.world_size == 1:
        return
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.interval > 0:
            steps = hook.interval
            if hook.by_epoch:
                steps *= len(runner.train_dataloader)
            if steps % counts:
                _refuse(
                    'checkpoints after updates of the weights, for several '
                    'processes do not save what waits for one, but got one '
                    f'every {steps} iterations, and an update every {counts}',
                    'choose an `interval` of the CheckpointHook that is a '
                    'multiple of `accumulative_counts`',
                )


def _refuse(problem: str, remedy: str) -> None:
    raise ConfigError(
        f'ExactResumeHook needs {problem}. To resume exactly, {remedy}; '
        'without the hook all is as in mmengine.'
    )
