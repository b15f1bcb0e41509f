"""Images to run on: files, folders, videos, arrays."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from mmcv import VideoReader, imfrombytes
from mmengine.fileio import get
from mmengine.logging import print_log

from e3va_mm.errors import DataError

IMAGES = '.bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split()
VIDEOS = '.avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm'.split()
Input = str | Path | np.ndarray


@dataclass(frozen=True)
class Image:
    """An image, or a frame of a video."""

    name: str  # of its results; may contain folders
    source: str | np.ndarray  # a path or URL, or BGR values (H, W, 3)
    video: 'Video | None' = None

    def read(self) -> np.ndarray:
        """The image (H, W, 3), BGR; DataError if it cannot be read."""
        if isinstance(self.source, np.ndarray):
            return self.source
        try:
            content = get(self.source)
            values = imfrombytes(content) if content else None
        except (OSError, ValueError, ImportError, HTTPException) as error:
            raise DataError(
                f'{self.source} cannot be read: {error}. Check the path.'
            ) from error
        if values is None:
            raise DataError(
                f'{self.source} is not a whole image of a known format. '
                'Copy it again or leave it out.'
            )
        return values


@dataclass(frozen=True)
class Video:
    """A video file, open only while it is read."""

    name: str
    path: str
    fps: float
    frames: int  # as the file says; it may end earlier

    def __iter__(self) -> Iterator[Image]:
        for index, frame in enumerate(VideoReader(self.path)):
            yield Image(f'{self.name}_{index:06d}', frame, self)


class Images:
    """All the images of some inputs, one after the other.

    Args:
        inputs (str | Path | np.ndarray | Sequence): A path or URL of an
            image, a folder, which is searched with its subfolders, a video, a
            BGR image (H, W, 3) of unsigned bytes, or a list of these.
        but (Sequence[str | Path]): Folders to leave out, such as those of
            results. Defaults to none.

    Raises:
        DataError: If there is no image, or a video cannot be read.
    """

    def __init__(
        self, inputs: Input | Sequence[Input], but: Sequence[str | Path] = ()
    ) -> None:
        self._found: list[Image | Video] = []
        for each in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
            self._add(each, {os.path.realpath(path) for path in but})
        if not self._found:
            raise DataError(
                f'Expected images or videos in {inputs}, but no file there '
                f'ends in one of {", ".join([*IMAGES, *VIDEOS])}.'
            )

    def _add(self, each: Input, but: Collection[str]) -> None:
        if isinstance(each, np.ndarray):
            if each.ndim != 3 or each.shape[2] != 3 or each.dtype != np.uint8:
                raise DataError(
                    'Expected an image as unsigned bytes of shape (H, W, 3), '
                    f'BGR, but got {each.dtype} of shape {each.shape}.'
                )
            self._found.append(Image(f'{len(self._found):06d}', each))
        elif '://' in str(each):
            path = Path(urlsplit(str(each)).path)
            if path.suffix.lower() in VIDEOS:
                raise DataError(f'{each}: download it; videos are local files')
            self._found.append(Image(path.stem, str(each)))
        elif (folder := Path(each)).is_dir():
            skipped = Counter()
            for file in _files_below(folder, but):
                if file.suffix.lower() in (*IMAGES, *VIDEOS):
                    self._add_file(file, file.relative_to(folder))
                else:
                    skipped[file.suffix.lower() or 'no ending'] += 1
            if skipped:
                found = ', '.join(f'{n} {e}' for e, n in skipped.items())
                print_log(
                    f'warning: files in {folder} that are no images or '
                    f'videos of a known kind are left out: {found}.',
                    'current',
                    level=logging.WARNING,
                )
        else:
            self._add_file(Path(each), Path(Path(each).name))

    def _add_file(self, path: Path, name: Path) -> None:
        if not path.is_file():
            raise DataError(f'{path}: no such image, video or folder.')
        name = str(name.with_suffix(''))
        if path.suffix.lower() not in VIDEOS:
            self._found.append(Image(name, str(path)))
            return
        reader = VideoReader(str(path))
        if not reader.opened:
            raise DataError(
                f'{path} is no video that OpenCV can read. Convert it, for '
                'example to H.264 in an .mp4 file.'
            )
        # Recordings may not know how many frames they have.
        frames = max(reader.frame_cnt, 0)
        self._found.append(Video(name, str(path), reader.fps, frames))

    def __len__(self) -> int:
        return sum(getattr(each, 'frames', 1) for each in self._found)

    def __iter__(self) -> Iterator[Image]:
        for each in self._found:
            yield from [each] if isinstance(each, Image) else each


def _files_below(folder: Path, but: Collection[str]) -> list[Path]:
    """Files in a folder and its subfolders, linked ones too, once each."""
    found, seen = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen or real in but:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(path, name) for name in names]
    return sorted(found)
