from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from e3va_mm.engine.hooks.resume_check_hook import ResumeCheckHook
from e3va_mm.engine.runner_optimizers import (
    iterations_per_update,
    optimizers_of,
)
from e3va_mm.engine.seeds import seed_all
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.configs import class_name
from e3va_mm.utils.unwrapping import unwrapped

# In a checkpoint: where the run was, and gradients that wait for an update.
RECORD, GRADIENTS = 'e3va_mm_exact_resume', 'e3va_mm_gradients'
# Parts of the frameworks that keep something which no checkpoint holds.
FORGETFUL = (
    *('EarlyStoppingHook', 'SwAVHook'),
    *('ReduceOnPlateauLR', 'ReduceOnPlateauMomentum'),
    *('BatchSyncRandomResize', 'DropBlock', 'DynamicRoIHead'),
    *('Albu', 'CachedMixUp', 'CachedMosaic', 'FixedViews'),
)


@HOOKS.register_module()
class ExactResumeHook(ResumeCheckHook):
    """Makes a run with interruptions give the weights of one without.

    Bit for bit on CPU, inside of epochs, too, with any number of workers:

    * all random numbers come from the seed, the rank and the number of the
      iteration; those of a sample from its place in the batch, too;
    * a resumed epoch begins where it was left; what it had is not loaded
      again, and iterations are counted on;
    * gradients that wait for an update (``accumulative_counts``) are part of
      the checkpoint.

    A run with the hook draws other random numbers than one without. Parts that
    are known to forget are refused; those of your own have to keep what they
    remember in the state dict, and no generator.

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
        self._resumed: dict[str, Any] = dict(passes=0, began=0)
        self._gradients: dict[str, Tensor] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take from a checkpoint to resume from where the run was."""
        super().after_load_checkpoint(runner, checkpoint)
        if not runner._resume:
            return
        source = runner._load_from or 'The latest checkpoint'
        record = checkpoint['meta'].get(RECORD)
        if record is None:
            raise CheckpointError(
                f'{source} was written without ExactResumeHook. Leave it out, '
                'or resume from a checkpoint of a run that began with it.'
            )
        if record['pending'] and GRADIENTS not in checkpoint:
            raise CheckpointError(
                f'{source} was written between two updates of the weights by '
                'several processes, whose gradients it does not hold. Resume '
                'from an iteration that is a multiple of '
                '`optim_wrapper.accumulative_counts`, and let the `interval` '
                'of the CheckpointHook be one.'
            )
        changes = [
            f'{name} {record["run"].get(name)!r}, now {value!r}'
            for name, value in _facts(runner).items()
            if record['run'].get(name) != value
        ]
        if changes:
            raise CheckpointError(
                f'{source} cannot be continued exactly: it was written with '
                f'{"; ".join(changes)}. Set these as they were, or leave '
                'ExactResumeHook out.'
            )
        self._resumed = record
        self._gradients = checkpoint.get(GRADIENTS, {})

    def before_train(self, runner: Runner) -> None:
        """Bring back the gradients that wait for an update."""
        _check(runner)
        model = unwrapped(runner.model)
        for name, gradient in self._gradients.items():
            parameter = model.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        self._gradients = {}

    def before_train_epoch(self, runner: Runner) -> None:
        """Go to where the run was, and count its iterations on."""
        loop, loader = runner.train_loop, runner.train_dataloader
        skip = 0
        # Not before: other hooks look at the data set before training.
        if self._batches is None:
            passes, began = self._resumed['passes'], self._resumed['began']
            skip = runner.iter - began
            self._batches = _Batches(
                loader.batch_sampler,
                (runner.seed, runner.rank),
                (passes, began),
                runner.iter,
            )
            # A loader refuses new parts once built; it has no iterator yet.
            vars(loader).update(
                batch_sampler=self._batches,
                dataset=_SeededDataset(loader.dataset),
            )
            if isinstance(loop, IterBasedTrainLoop):
                for sampler in _samplers(loader):
                    if hasattr(sampler, 'set_epoch'):
                        sampler.set_epoch(passes)
                loop.dataloader_iterator._epoch = passes
                # The batch sampler begins where it should.
                loop.dataloader_iterator.skip_iter = lambda num_iters: None
        if isinstance(loop, EpochBasedTrainLoop):
            run_iter = type(loop).run_iter
            loop.run_iter = lambda i, batch: run_iter(loop, i + skip, batch)

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Give the iteration its random numbers."""
        seed_all((runner.seed, runner.rank, runner.iter))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down where the run is."""
        super().before_save_checkpoint(runner, checkpoint)
        if 'optimizer' not in checkpoint or self._batches is None:
            return
        meta, starts = checkpoint['meta'], self._batches.starts
        # The loader may have begun with the next pass.
        passes = max(p for p in starts if starts[p] < max(meta['iter'], 1))
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            passes = meta['epoch']
        gradients = {}
        if runner.optim_wrapper.inner_count % iterations_per_update(runner):
            named = unwrapped(runner.model).named_parameters()
            gradients = {
                name: parameter.grad.detach().cpu()
                for name, parameter in named
                if parameter.grad is not None
            }
        meta[RECORD] = dict(
            run=_facts(runner),
            passes=passes,
            began=starts[passes],
            pending=bool(gradients),
        )
        # Each process has its own; only the first one saves.
        if gradients and runner.world_size == 1:
            checkpoint[GRADIENTS] = gradients


class _Sample(NamedTuple):
    """What a data set is asked for: an index, and what its seeds come from."""

    index: Any
    numbers: tuple[int, ...]


class _Batches:
    """A batch sampler whose samples know their seeds.

    Args:
        batches: The batch sampler of the run.
        numbers: What all seeds follow from.
        start: Number of the first pass over the data, and of the iteration
            that it began with.
        first: The iteration to begin with, maybe inside of that pass.

    Attributes:
        starts: By number of the pass, the iteration that it began with.
    """

    def __init__(
        self, batches: Any, numbers: tuple, start: tuple = (0, 0), first=0
    ) -> None:
        self.batches = batches
        self.sampler = getattr(batches, 'sampler', None)
        self.batch_size = getattr(batches, 'batch_size', None)
        self.numbers = numbers
        self.starts = dict([start])
        self.first = first

    def __iter__(self) -> Iterator[list[_Sample]]:
        passes = max(self.starts)
        batches = iter(self.batches)
        for i in count(self.starts[passes]):
            numbers = *self.numbers, i
            # Some samplers draw from the global generators. With a 0 at the
            # end they would draw what the iteration itself draws.
            seed_all((*numbers, 1))
            try:
                batch = next(batches)
            except StopIteration:
                self.starts[passes + 1] = i
                return
            if i >= self.first:
                yield [
                    _Sample(index, (*numbers, place))
                    for place, index in enumerate(batch, 2)
                ]

    def __len__(self) -> int:
        return len(self.batches)


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


def _samplers(loader: DataLoader) -> list[Any]:
    """What draws the indices of a loader, from the outside inwards."""
    found = [loader.batch_sampler]
    while (inner := getattr(found[-1], 'sampler', None)) is not None:
        found.append(inner)
    return found


def _facts(runner: Runner) -> dict[str, Any]:
    """What must be the same for the same random numbers and batches."""
    loader = runner.train_dataloader
    sampler = _samplers(loader)[-1]
    return dict(
        seed=runner._randomness_cfg.get('seed'),
        sampler=type(sampler).__name__,
        sampler_seed=getattr(sampler, 'seed', None),
        samples=len(loader.dataset),
        batch_size=getattr(loader.batch_sampler, 'batch_size', None),
        accumulative_counts=iterations_per_update(runner),
        processes=runner.world_size,
    )


def _check(runner: Runner) -> None:
    """Refuse a run that cannot be exact."""
    loop = type(runner.train_loop)
    forgetful = {*_class_names(runner.cfg.to_dict())} & {*FORGETFUL}
    if runner._randomness_cfg.get('seed') is None:
        need = 'a seed. Set `randomness=dict(seed=0)`'
    elif loop not in (EpochBasedTrainLoop, IterBasedTrainLoop):
        need = (
            'EpochBasedTrainLoop or IterBasedTrainLoop, but got '
            f'`train_cfg.type={loop.__name__}`'
        )
    elif len(optimizers_of(runner)) > 1:
        need = 'one optimizer, but `optim_wrapper` has several'
    elif forgetful:
        need = (
            f'a config without {", ".join(sorted(forgetful))}, as no '
            'checkpoint holds what it remembers'
        )
    else:
        return
    raise ConfigError(
        f'ExactResumeHook needs {need}. Without the hook all is as in '
        'mmengine.'
    )


def _class_names(config: Any) -> Iterator[str]:
    """The classes that a config names, at any depth."""
    if isinstance(config, dict):
        if 'type' in config:
            yield class_name(config)
        config = [*config.values()]
    if isinstance(config, (list, tuple)):
        for each in config:
            yield from _class_names(each)
