"""Pictures to run on: files, folders, videos, arrays."""

from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from mmcv import VideoReader, imfrombytes
from mmengine.fileio import get

from e3va_mm.errors import DataError

PICTURES = '.bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split()
VIDEOS = '.avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm'.split()
Input = str | Path | np.ndarray


class Video(NamedTuple):
    """What frames come from."""

    # As that of a picture.
    name: str
    fps: float


class Picture(NamedTuple):
    """A picture, or a frame of a video."""

    # What is found on it is called so; may have folders in it.
    name: str
    # A path or URL, or BGR values (H, W, 3).
    source: str | np.ndarray
    video: Video | None = None

    def read(self) -> np.ndarray:
        """The picture (H, W, 3), BGR.

        Raises:
            DataError: If it cannot be read.
        """
        if isinstance(self.source, np.ndarray):
            return self.source
        try:
            image = imfrombytes(get(self.source))
        except (OSError, ValueError, ImportError, HTTPException) as error:
            raise DataError(
                f'{self.source} cannot be read: {error}. Check the path.'
            ) from error
        if image is None:
            raise DataError(
                f'{self.source} is not a whole picture of a known format. '
                'Copy it again or leave it out.'
            )
        return image


class Pictures:
    """All the pictures of some inputs, one after the other.

    Args:
        inputs (str | Path | np.ndarray | Sequence): A path or URL of a
            picture, a folder, which is searched with those in it, a video, a
            BGR picture (H, W, 3) of unsigned bytes, or a list of these.

    Raises:
        DataError: If there is no picture, or a video cannot be read.
    """

    def __init__(self, inputs: Input | Sequence[Input]) -> None:
        self._found: list[Picture | _Film] = []
        several = isinstance(inputs, (list, tuple))
        for each in inputs if several else [inputs]:
            self._add(each)
        if not self._found:
            raise DataError(
                f'Expected pictures or videos in {inputs}, but no file there '
                f'ends in one of {", ".join([*PICTURES, *VIDEOS])}.'
            )

    def _add(self, each: Input) -> None:
        if isinstance(each, np.ndarray):
            if each.ndim != 3 or each.shape[2] != 3 or each.dtype != np.uint8:
                raise DataError(
                    'Expected a picture as unsigned bytes of shape (H, W, 3), '
                    f'BGR, but got {each.dtype} of shape {each.shape}.'
                )
            self._found.append(Picture(f'{len(self._found):06d}', each))
        elif '://' in str(each):
            path = Path(urlsplit(str(each)).path)
            if path.suffix.lower() in VIDEOS:
                raise DataError(
                    f'{each}: videos are read from local files. Fetch it '
                    'first.'
                )
            self._found.append(Picture(path.stem, str(each)))
        elif Path(each).is_dir():
            folder = Path(each)
            for file in sorted(folder.rglob('*')):
                if file.is_file() and _suffix(file) in (*PICTURES, *VIDEOS):
                    self._add_file(file, file.relative_to(folder))
        else:
            self._add_file(Path(each), Path(Path(each).name))

    def _add_file(self, path: Path, name: Path) -> None:
        if not path.is_file():
            raise DataError(f'{path}: no such picture, video or folder.')
        name = str(name.with_suffix(''))
        if _suffix(path) in VIDEOS:
            self._found.append(_Film.of(path, name))
        else:
            self._found.append(Picture(name, str(path)))

    def __len__(self) -> int:
        """As many as the files say; a video may end before."""
        return sum(
            each.frames if isinstance(each, _Film) else 1
            for each in self._found
        )

    def __iter__(self) -> Iterator[Picture]:
        for each in self._found:
            if isinstance(each, _Film):
                yield from each
            else:
                yield each


class _Film(NamedTuple):
    """A video file, open only while it is read."""

    path: Path
    video: Video
    frames: int

    @classmethod
    def of(cls, path: Path, name: str) -> '_Film':
        reader = VideoReader(str(path))
        if not reader.opened:
            raise DataError(
                f'{path} is no video that OpenCV can read. Convert it, for '
                'example to H.264 in an .mp4 file.'
            )
        # Recordings may not know how many there are.
        return cls(path, Video(name, reader.fps), max(reader.frame_cnt, 0))

    def __iter__(self) -> Iterator[Picture]:
        name = self.video.name
        for index, frame in enumerate(VideoReader(str(self.path))):
            yield Picture(f'{name}_{index:06d}', frame, self.video)


def _suffix(path: Path) -> str:
    return path.suffix.lower()
