"""Detectors, segmentors and classifiers on one pass of a frozen trunk."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement

from e3va_mm.apis.images import Image, Images, Input
from e3va_mm.apis.result_writer import ResultWriter
from e3va_mm.apis.task import Task
from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.backbones.trunk_pool import TrunkPool
from e3va_mm.errors import ConfigError
from e3va_mm.utils.values import is_whole

Batch = list[tuple[Image, dict[str, dict]]]  # with samples by task


class Found(NamedTuple):
    """What the tasks find on an image, by the name of the task."""

    image: Image
    results: Mapping[str, BaseDataElement]


class MultiTaskInferencer:
    """Runs models that were tuned apart on one trunk, once an image.

    The trunk of the first task stays in memory; a task whose adapter file
    names the same trunk runs on that. An image goes through the trunk once
    for all tasks that prepare it alike, and once more for each other way to
    prepare it; segmentors that cut images up (``test_cfg.mode='slide'``)
    make passes of their own. What comes out is what the separate models give.

    Args:
        tasks: Config and checkpoint or adapter file of each task, by name;
            see :meth:`add`.
        device: Where to compute; by default the accelerator, if there is one.

    Attributes:
        tasks (dict[str, Task]): The tasks, by name.
        passes (int): How many images have gone through a trunk, each as often
            as it did; crops of a segmentor that slides are one.

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
        tasks: Mapping[str, tuple[str | Config, str]] | None = None,
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
            name: Its name: letters, digits, ``_``, ``-`` and ``.``.
            config: Config of a detector, a segmentor or a classifier, or its
                path.
            checkpoint: Path or URL of an adapter file or a checkpoint.
        """
        if not re.fullmatch(r'[\w.-]+', name) or name in self.tasks:
            raise ConfigError(
                'Expected a new name of letters, digits, "_", "-" and "." for '
                f'a task, but got {name!r} beside {list(self.tasks)}.'
            )
        with self._pool.open():
            task = Task(name, config, checkpoint, self.device)
        self._pool.add(task.backbone)
        self.tasks[name] = task
        shares = self.on_trunk_of(name) or 'no other'
        print_log(f'Task {name!r} shares the trunk of {shares}.', 'current')

    def remove(self, name: str) -> None:
        """Remove a task; a trunk goes with its last one."""
        self._pool.remove(self.tasks.pop(name).backbone)

    def on_trunk_of(self, name: str) -> list[str]:
        """Names of the other tasks that share the trunk of this one."""
        backbone = self.tasks[name].backbone
        return [
            other
            for other, task in self.tasks.items()
            if other != name and task.backbone.shares_trunk_with(backbone)
        ]

    def __call__(
        self,
        inputs: Input | Sequence[Input],
        batch_size: int = 1,
        return_datasamples: bool = False,
        return_vis: bool = False,
        score_thr: float = 0.3,
        out_dir: str | None = None,
        tuned: bool = True,
        text: str | Sequence[str] | None = None,
    ) -> dict[str, dict[str, list]]:
        """Run all tasks.

        Args:
            inputs: See :class:`~e3va_mm.apis.images.Images`.
            batch_size: How many images of one size go through at once.
            return_datasamples: Whether predictions are the data samples of
                the frameworks.
            return_vis: Whether to return drawings, too.
            score_thr: Boxes with a lower score are not drawn.
            out_dir: Folder for predictions and drawings, see
                :class:`~e3va_mm.apis.result_writer.ResultWriter`.
            tuned: False for what the models gave before they were tuned; see
                :meth:`run`.
            text: What models that read should find; see :meth:`run`.

        Returns:
            dict[str, dict[str, list]]: By the name of the task its
            ``predictions``, one an image, as the stock inferencers give
            them, and its ``visualization``: RGB images (H, W, 3).
        """
        found = {
            name: dict(predictions=[], visualization=[]) for name in self.tasks
        }
        folders = [Path(out_dir, name) for name in self.tasks if out_dir]
        writer = nullcontext()
        if out_dir:
            writer = ResultWriter(out_dir, self.tasks, score_thr=score_thr)
        with writer:
            for image, results in self.run(
                Images(inputs, folders), batch_size, tuned, text
            ):
                if out_dir:
                    writer.write(image, results)
                for name, result in results.items():
                    task, lists = self.tasks[name], found[name]
                    if return_vis:
                        values = image.read()[..., ::-1]
                        drawn = task.draw(values, result, score_thr)
                        lists['visualization'].append(drawn)
                    if not return_datasamples:
                        result = task.prediction(result)
                    lists['predictions'].append(result)
        return found

    def run(
        self,
        images: Iterable[Image],
        batch_size: int = 1,
        tuned: bool = True,
        text: str | Sequence[str] | None = None,
    ) -> Iterator[Found]:
        """Run all tasks; give what they find as soon as it is there.

        Args:
            images: For example :class:`~e3va_mm.apis.images.Images`.
            batch_size: How many images of one size go through at once.
            tuned: False for what the models gave before they were tuned, such
                as Grounding DINO on words that it was not tuned on: side path
                off, everything else as ``load_from`` of the config has it.
            text: What models that read (Grounding DINO) should find: names,
                in a list or separated by full stops. Defaults to the classes
                of their data sets.

        Yields:
            Found: For each image, in their order.
        """
        if not self.tasks or not is_whole(batch_size):
            raise ConfigError(
                'Expected at least one task and `batch_size` from 1 on, but '
                f'got the tasks {list(self.tasks)} and {batch_size!r}.'
            )
        tasks = dict(self.tasks)  # those of now, whoever comes meanwhile
        batch: Batch = []
        sizes = None
        for image in images:
            try:
                samples = run_pipelines(
                    {name: task.steps for name, task in tasks.items()},
                    image.source,
                )
            except Exception:
                image.read()  # says what is wrong with it, if anything is
                raise
            before = sizes
            sizes = [each['inputs'].shape for each in samples.values()]
            if batch and (len(batch) == batch_size or sizes != before):
                yield from self._run_batch(tasks, batch, tuned, text)
                batch = []
            batch.append((image, samples))
        if batch:
            yield from self._run_batch(tasks, batch, tuned, text)

    def _run_batch(
        self,
        tasks: Mapping[str, Task],
        batch: Batch,
        tuned: bool,
        text: str | Sequence[str] | None,
    ) -> Iterator[Found]:
        batches = {
            name: task.to_batch([samples[name] for _, samples in batch], text)
            for name, task in tasks.items()
        }
        # Tasks that one pass of a trunk is for.
        groups: list[list[str]] = []
        for name, task in tasks.items():
            inputs = batches[name]['inputs']
            for group in groups:
                other = tasks[group[0]]
                if (
                    tuned
                    and task.backbone.shares_trunk_with(other.backbone)
                    and not (task.slides or other.slides)
                    and torch.equal(inputs, batches[group[0]]['inputs'])
                ):
                    group.append(name)
                    break
            else:
                groups.append([name])
        results = {}
        for group in groups:
            outputs = [None]
            if len(group) > 1:
                with torch.no_grad():
                    outputs = run_trunk(
                        [tasks[name].backbone for name in group],
                        batches[group[0]]['inputs'],
                    )
            self.passes += len(batch)
            for name, maps in zip(group, outputs, strict=True):
                results[name] = tasks[name].predict(batches[name], maps, tuned)
        for index, (image, _) in enumerate(batch):
            yield Found(image, {name: results[name][index] for name in tasks})


def run_pipelines(
    pipelines: Mapping[str, Sequence[Callable]], image: Any
) -> dict[str, Any]:
    """Run transforms on an image; what tasks first have in common runs once.

    Args:
        pipelines: Transforms, by the name of the task.
        image: What the first of them takes.

    Returns:
        dict[str, Any]: What the last of each gives; nothing is shared.
    """
    done, groups = {}, defaultdict(dict)
    for name, steps in pipelines.items():
        if not steps:
            done[name] = copy.deepcopy(image)
            continue
        values = sorted(vars(steps[0]).items(), key=str)
        key = type(steps[0]), repr(values)
        if any(isinstance(value, np.ndarray) for _, value in values):
            key = id(steps[0])  # the text of a long array is abridged
        groups[key][name] = steps
    for group in groups.values():
        first = next(iter(group.values()))[0]
        # Transforms change what they are given.
        found = first(copy.deepcopy(image))
        rest = {name: steps[1:] for name, steps in group.items()}
        done |= run_pipelines(rest, found)
    return {name: done[name] for name in pipelines}
