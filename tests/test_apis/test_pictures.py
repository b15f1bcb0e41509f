"""Inputs become pictures with names."""

import cv2
import numpy as np
import pytest
from mmcv import VideoReader
from PIL import Image

from e3va_mm.apis.pictures import Picture, Pictures
from e3va_mm.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name in ('b.png', 'a.JPG', 'inner/a.png', 'notes.txt'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == '.txt':
            path.write_text('no picture')
        else:
            Image.new('RGB', (8, 6), 'red').save(path)
    return tmp_path


def film(path, frames=3):
    video = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*'mp4v'), 10, (32, 24)
    )
    for index in range(frames):
        video.write(np.full((24, 32, 3), 60 * index, np.uint8))
    video.release()


def test_a_folder_with_those_in_it(folder):
    pictures = Pictures(str(folder))
    assert [each.name for each in pictures] == ['a', 'b', 'inner/a']
    assert len(pictures) == 3
    red = next(iter(pictures)).read()
    assert red.shape == (6, 8, 3)
    assert red[0, 0].argmax() == 2  # BGR


def test_a_list_of_several_kinds(folder):
    film(folder / 'clip.mp4')
    image = np.zeros((4, 5, 3), np.uint8)
    inputs = [folder / 'b.png', image, str(folder / 'clip.mp4')]
    pictures = list(Pictures(inputs))
    assert [each.name for each in pictures] == [
        'b',
        '000001',
        'clip_000000',
        'clip_000001',
        'clip_000002',
    ]
    assert len(Pictures(inputs)) == 5
    assert pictures[1].read() is image
    assert pictures[2].video == ('clip', 10.0)
    bright = [each.read().mean() for each in pictures[2:]]
    assert bright == sorted(bright) and bright[2] > 100


def test_a_video_is_open_while_it_is_read(folder, monkeypatch):
    """Recordings may not know how many frames they have."""
    (folder / 'inner' / 'deep.png').mkdir()  # a folder is no picture
    film(folder / 'inner' / 'clip.mp4')
    monkeypatch.setattr(VideoReader, 'frame_cnt', -1)
    pictures = Pictures(folder)
    assert len(pictures) == 3
    frames = [each for each in pictures if each.video]
    assert [each.name for each in frames] == [
        f'inner/clip_00000{index}' for index in range(3)
    ]


def test_a_url_is_left_to_its_loader():
    url = 'https://example.com/some/a.jpg?signed=' + 'x' * 300
    (picture,) = Pictures(url)
    assert picture == Picture('a', url)


def test_what_is_refused(folder):
    (folder / 'empty').mkdir()
    (folder / 'broken.mp4').write_bytes(b'none')
    (folder / 'broken.jpg').write_bytes(b'none')
    for inputs, message in (
        (str(folder / 'empty'), 'no file there ends in one of .bmp'),
        ([], 'no file there ends in'),
        (str(folder / 'none.png'), 'no such picture, video or folder'),
        (str(folder / 'broken.mp4'), 'no video that OpenCV can read'),
        ('https://example.com/clip.mp4', 'videos are read from local files'),
        (np.zeros((4, 5), np.uint8), r'\(H, W, 3\), BGR, but got uint8'),
        (np.zeros((4, 5, 3)), 'but got float64 of shape'),
    ):
        with pytest.raises(DataError, match=message):
            Pictures(inputs)
    with pytest.raises(DataError, match='not a whole picture'):
        next(iter(Pictures(folder / 'broken.jpg'))).read()
    for source in (str(folder / 'none.jpg'), 'http://127.0.0.1:1/a b.jpg'):
        with pytest.raises(DataError, match='cannot be read'):
            Picture('none', source).read()
