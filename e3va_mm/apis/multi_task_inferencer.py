"""Detectors, segmentors and classifiers on one pass of a frozen trunk."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement
from torch import Tensor

from e3va_mm.apis.pictures import Input, Picture, Pictures
from e3va_mm.apis.result_writer import ResultWriter
from e3va_mm.apis.shared_preprocessing import run_pipelines
from e3va_mm.apis.task import Task
from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.backbones.trunk_pool import TrunkPool
from e3va_mm.errors import ConfigError

NAME = re.compile(r'[\w.-]+')


class Found(NamedTuple):
    """What the tasks find on a picture, by the name of the task."""

    picture: Picture
    results: Mapping[str, BaseDataElement]


class MultiTaskInferencer:
    """Runs models that were tuned apart on one trunk, once a picture.

    The trunk of the first task stays in memory; a task whose adapter file
    names the same trunk runs on that. A picture goes through the trunk once
    for all tasks that prepare it alike, and once more for each other way to
    prepare it; segmentors that cut pictures up (``test_cfg.mode='slide'``)
    make passes of their own. What comes out is what the separate models give.

    Args:
        tasks (Mapping[str, tuple[str, str]], optional): Config and checkpoint
            or adapter file of each task, by name; see :meth:`add`.
        device (str, optional): Where to compute. Defaults to the accelerator,
            if there is one.

    Attributes:
        tasks (dict[str, Task]): The tasks, by name.
        passes (int): How many pictures have gone through a trunk, each as
            often as it did; the pieces of a segmentor that slides count as
            one.

    Examples:
        >>> infer = MultiTaskInferencer(
        ...     dict(
        ...         boxes=('cascade.py', 'boxes.safetensors'),
        ...         parts=('upernet.py', 'parts.safetensors')))
        >>> found = infer('photos/', out_dir='out')
        >>> found['boxes']['predictions'][0]['labels']
    """

    def __init__(
        self,
        tasks: Mapping[str, tuple[str, str]] | None = None,
        device: str | None = None,
    ) -> None:
        self.device = device or get_device()
        self.tasks: dict[str, Task] = {}
        self.passes = 0
        self._pool = TrunkPool()
        for name, (config, checkpoint) in (tasks or {}).items():
            self.add(name, config, checkpoint)

    def add(self, name: str, config: str | Config, checkpoint: str) -> None:
        """Add a task.

        Args:
            name (str): Its name: letters, digits, ``_``, ``-`` and ``.``.
            config (str | Config): Config of a detector, a segmentor or a
                classifier, or its path.
            checkpoint (str): Path or URL of an adapter file or a checkpoint.

        Raises:
            ConfigError: If the name is taken or no name, or the config does
                not fit.
            CheckpointError: If the file does not fit.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(
                'The name of a task should have letters, digits, "_", "-" and '
                f'"." alone, but got {name!r}.'
            )
        if name in self.tasks:
            raise ConfigError(
                f'There is a task {name!r} already. Remove it first, or take '
                'another name.'
            )
        with self._pool.open():
            task = Task.build(name, config, checkpoint, self.device)
        self._pool.add(task.backbone)
        self.tasks[name] = task
        shares = self.on_trunk_of(name)
        if len(self.tasks) > 1:
            print_log(
                f'Task {name!r} runs on '
                + (f'the trunk of {shares}.' if shares else 'its own trunk.'),
                logger='current',
            )

    def remove(self, name: str) -> None:
        """Remove a task; a trunk goes with its last one.

        Raises:
            ConfigError: If there is no such task.
        """
        if name not in self.tasks:
            raise ConfigError(
                f'Expected the name of a task, one of {list(self.tasks)}, but '
                f'got {name!r}.'
            )
        self._pool.remove(self.tasks.pop(name).backbone)

    def on_trunk_of(self, name: str) -> list[str]:
        """Names of the other tasks that share the trunk of this one."""
        storage = self.tasks[name].backbone.storage
        return [
            other
            for other, task in self.tasks.items()
            if other != name and task.backbone.storage is storage
        ]

    def __call__(
        self,
        inputs: Input | Sequence[Input],
        batch_size: int = 1,
        return_datasamples: bool = False,
        return_vis: bool = False,
        score_thr: float = 0.3,
        out_dir: str | None = None,
    ) -> dict[str, dict[str, list]]:
        """Run all tasks.

        Args:
            inputs (str | np.ndarray | Sequence): Path or URL of a picture,
                a folder of pictures, a video, a BGR picture (H, W, 3) of
                unsigned bytes, or a list of these.
            batch_size (int): How many pictures of one size go through the
                models at once. Defaults to 1.
            return_datasamples (bool): Whether predictions are the data
                samples of the frameworks. Defaults to False.
            return_vis (bool): Whether to return drawings, too.
            score_thr (float): Boxes with a lower score are not drawn.
                Defaults to 0.3.
            out_dir (str, optional): Folder for predictions and drawings, see
                :class:`~e3va_mm.apis.result_writer.ResultWriter`.

        Returns:
            dict[str, dict[str, list]]: By the name of the task its
            ``predictions``, one a picture, as the stock inferencers give
            them, and its ``visualization``: RGB pictures (H, W, 3).

        Raises:
            ConfigError: If there is no task.
            DataError: If an input cannot be read.
        """
        found = {
            name: dict(predictions=[], visualization=[]) for name in self.tasks
        }
        with ExitStack() as stack:
            writer = out_dir and stack.enter_context(
                ResultWriter(out_dir, self.tasks, score_thr=score_thr)
            )
            for picture, results in self.run(Pictures(inputs), batch_size):
                if writer:
                    writer.write(picture, results)
                for name, result in results.items():
                    task, lists = self.tasks[name], found[name]
                    lists['predictions'].append(
                        result if return_datasamples else task.plain(result)
                    )
                    if return_vis:
                        image = picture.read()[..., ::-1]
                        lists['visualization'].append(
                            task.draw(image, result, score_thr)
                        )
        return found

    def run(
        self, pictures: Iterable[Picture], batch_size: int = 1
    ) -> Iterator[Found]:
        """Run all tasks; give what they find as soon as it is there.

        Args:
            pictures (Iterable[Picture]): For example
                :class:`~e3va_mm.apis.pictures.Pictures`.
            batch_size (int): How many pictures of one size go through the
                models at once. Defaults to 1.

        Yields:
            Found: For each picture, in their order.

        Raises:
            ConfigError: If there is no task, or ``batch_size`` is none.
            DataError: If a picture cannot be read.
        """
        if not self.tasks:
            raise ConfigError('There is no task to run. Add one first.')
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(
                '`batch_size` should be a whole number from 1 on, but got '
                f'{batch_size!r}.'
            )
        tasks = dict(self.tasks)  # those of now, whoever comes meanwhile
        pipelines = {name: task.steps for name, task in tasks.items()}
        batch: list[tuple[Picture, dict[str, dict]]] = []
        for picture in pictures:
            samples = _prepare(pipelines, picture)
            if batch and (
                len(batch) == batch_size
                or _sizes(samples) != _sizes(batch[0][1])
            ):
                yield from self._run_batch(tasks, batch)
                batch = []
            batch.append((picture, samples))
        yield from self._run_batch(tasks, batch)

    def _run_batch(
        self,
        tasks: Mapping[str, Task],
        batch: Sequence[tuple[Picture, Mapping[str, dict]]],
    ) -> Iterator[Found]:
        if not batch:
            return
        batches = {
            name: task.to_batch([samples[name] for _, samples in batch])
            for name, task in tasks.items()
        }
        results = {}
        for group in _groups(tasks, batches):
            outputs: Sequence[tuple[Tensor, ...] | None] = [None]
            if len(group) > 1:
                with torch.no_grad():
                    outputs = run_trunk(
                        [tasks[name].backbone for name in group],
                        batches[group[0]]['inputs'],
                    )
            self.passes += len(batch)
            for name, maps in zip(group, outputs, strict=True):
                results[name] = tasks[name].predict(batches[name], maps)
        for index, (picture, _) in enumerate(batch):
            found = {name: results[name][index] for name in tasks}
            yield Found(picture, found)


def _groups(
    tasks: Mapping[str, Task], batches: Mapping[str, dict]
) -> list[list[str]]:
    """Names of the tasks that one pass of a trunk is for, each once."""
    groups: list[list[str]] = []
    for name, task in tasks.items():
        for group in groups:
            other = tasks[group[0]]
            if (
                task.backbone.storage is other.backbone.storage
                and not (task.slides or other.slides)
                and torch.equal(
                    batches[name]['inputs'], batches[group[0]]['inputs']
                )
            ):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _prepare(
    pipelines: Mapping[str, Sequence[Callable]], picture: Picture
) -> dict[str, dict]:
    """Packed samples of a picture."""
    try:
        return run_pipelines(pipelines, picture.source)
    except Exception as error:
        picture.read()  # says what is wrong with it, if anything is
        raise error


def _sizes(samples: Mapping[str, dict]) -> list[torch.Size]:
    return [sample['inputs'].shape for sample in samples.values()]
