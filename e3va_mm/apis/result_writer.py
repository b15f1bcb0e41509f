"""Predictions and drawings of several tasks, as files."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmengine.structures import BaseDataElement

from e3va_mm.apis.images import Image, Video
from e3va_mm.apis.task import Task
from e3va_mm.errors import DataError


class ResultWriter:
    """Writes what tasks find, a folder for each task.

    ``TASK/preds/NAME.json``, for segmentors ``.png``, and, unless ``draw`` is
    off, ``TASK/vis/NAME.jpg``; of a video ``TASK/vis/VIDEO.mp4``. Images of
    one name from different folders get a number.

    Args:
        folder: The folder; it is made.
        tasks: The tasks, by name.
        draw: Whether to draw.
        score_thr: Boxes with a lower score are not drawn.
    """

    def __init__(
        self,
        folder: str | Path,
        tasks: Mapping[str, Task],
        draw: bool = True,
        score_thr: float = 0.3,
    ) -> None:
        self.folder = Path(folder)
        self._tasks = tasks
        self._draw = draw
        self._score_thr = score_thr
        self._taken: set[str] = set()
        self._video: Video | None = None
        self._video_name = ''  # of its drawing
        self._writers: dict[str, cv2.VideoWriter] = {}

    def __enter__(self) -> 'ResultWriter':
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers.values():
            writer.release()
        self._writers = {}

    def write(
        self, image: Image, results: Mapping[str, BaseDataElement]
    ) -> None:
        """Write what the tasks found on an image; DataError if it fails."""
        name = self._unused(image.name)
        values = image.read()[..., ::-1] if self._draw else None
        if image.video is not self._video:
            self.__exit__()
            self._video = image.video
            if image.video is not None:
                self._video_name = self._unused(f'{image.video.name}.mp4')
        for task_name, result in results.items():
            task = self._tasks[task_name]
            path = self.folder / task_name / 'preds' / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                task.write(task.prediction(result), path)
                if values is not None:
                    path = self.folder / task_name / 'vis' / name
                    drawn = task.draw(values, result, self._score_thr)
                    drawn = np.ascontiguousarray(drawn[..., ::-1])
                    if not self._write_drawing(task_name, path, drawn):
                        raise OSError('OpenCV has not written it')
            except OSError as error:
                raise DataError(
                    f'{path} cannot be written: {error}. Free some room, or '
                    'name another folder.'
                ) from error

    def _write_drawing(self, task: str, path: Path, drawn: np.ndarray) -> bool:
        """Write a drawing (H, W, 3), BGR, or add it to a video."""
        if self._video is None:
            return mmcv.imwrite(drawn, f'{path}.jpg')
        if task not in self._writers:
            path = self.folder / task / 'vis' / self._video_name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writers[task] = cv2.VideoWriter(
                str(path),
                cv2.VideoWriter_fourcc(*'mp4v'),
                self._video.fps or 25.0,
                drawn.shape[1::-1],
            )
        self._writers[task].write(drawn)
        return self._writers[task].isOpened()

    def _unused(self, wanted: str) -> str:
        """A name that is not taken yet; now it is."""
        name, number = Path(wanted), 1
        while str(name) in self._taken:
            number += 1
            name = name.with_stem(f'{Path(wanted).stem}_{number}')
        self._taken.add(str(name))
        return str(name)
