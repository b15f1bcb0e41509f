"""Predictions and drawings of several tasks, as files."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import cv2
import mmcv
import numpy as np
from mmengine.structures import BaseDataElement

from e3va_mm.apis.pictures import Picture, Video
from e3va_mm.apis.task import Task
from e3va_mm.errors import DataError


class ResultWriter:
    """Writes what tasks find, a folder for each task.

    ``TASK/preds/NAME.json``, for segmentors ``.png``, and, unless ``draw`` is
    off, ``TASK/vis/NAME.jpg``; of a video ``TASK/vis/VIDEO.mp4``. Pictures
    of one name from different folders get a number.

    Args:
        folder (str | Path): The folder; it is made.
        tasks (Mapping[str, Task]): The tasks, by name.
        draw (bool): Whether to draw. Defaults to True.
        score_thr (float): Boxes with a lower score are not drawn. Defaults
            to 0.3.
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
        self._names: set[str] = set()
        self._films: set[str] = set()
        self._video: Video | None = None
        self._film = ''  # the name of its drawing
        self._videos: dict[str, cv2.VideoWriter] = {}

    def __enter__(self) -> 'ResultWriter':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_video()

    def write(
        self, picture: Picture, results: Mapping[str, BaseDataElement]
    ) -> None:
        """Write what the tasks found on a picture.

        Raises:
            DataError: If a file cannot be written.
        """
        name = _free(picture.name, self._names)
        image = picture.read()[..., ::-1] if self._draw else None
        if picture.video is not self._video:
            self._end_video()
            self._video = picture.video
            if picture.video is not None:
                self._film = _free(picture.video.name, self._films)
        for task, result in results.items():
            path = self.folder / task / 'preds' / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._tasks[task].write(self._tasks[task].plain(result), path)
                if image is not None:
                    path = self.folder / task / 'vis' / name
                    self._write_drawing(task, path, image, result)
            except OSError as error:
                raise DataError(
                    f'{path} cannot be written: {error}. Free some room, or '
                    'name another folder.'
                ) from error

    def _write_drawing(
        self, task: str, path: Path, image: np.ndarray, result: BaseDataElement
    ) -> None:
        """Draw on a picture (H, W, 3), RGB; write it, or add it to a video."""
        drawn = self._tasks[task].draw(image, result, self._score_thr)
        drawn = np.ascontiguousarray(drawn[..., ::-1])
        if self._video is None:
            written = mmcv.imwrite(drawn, f'{path}.jpg')
        else:
            path = self.folder / task / 'vis' / f'{self._film}.mp4'
            written = self._add_frame(task, path, drawn)
        if not written:
            raise OSError('OpenCV has not written it')

    def _add_frame(self, task: str, path: Path, image: np.ndarray) -> bool:
        if task not in self._videos:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._videos[task] = cv2.VideoWriter(
                str(path),
                cv2.VideoWriter_fourcc(*'mp4v'),
                self._video.fps or 25.0,
                image.shape[1::-1],
            )
        self._videos[task].write(image)
        return self._videos[task].isOpened()

    def _end_video(self) -> None:
        for video in self._videos.values():
            video.release()
        self._videos = {}


def _free(wanted: str, taken: set[str]) -> str:
    """A name that is not taken yet; now it is."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f'{wanted}_{number}'
    taken.add(name)
    return name
