"""Inputs become images with names."""

import cv2
import numpy as np
import pytest
from mmcv import VideoReader
from PIL import Image as PILImage

from e3va_mm.apis.images import Image, Images
from e3va_mm.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name in ('b.png', 'a.JPG', 'inner/a.png'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        PILImage.new('RGB', (8, 6), 'red').save(path)
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'inner' / 'deep.png').mkdir()  # a folder is no image
    return tmp_path


def make_video(path, frames=3):
    video = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*'mp4v'), 10, (32, 24)
    )
    for index in range(frames):
        video.write(np.full((24, 32, 3), 60 * index, np.uint8))
    video.release()


def test_a_folder_with_its_subfolders(folder):
    images = Images(str(folder))
    assert [each.name for each in images] == ['a', 'b', 'inner/a']
    assert len(images) == 3
    red = next(iter(images)).read()
    assert red.shape == (6, 8, 3)
    assert red[0, 0].argmax() == 2  # BGR


def test_linked_folders_and_gifs_but_no_results(folder, monkeypatch):
    other = folder.parent / f'{folder.name}_linked'
    other.mkdir()
    PILImage.new('RGB', (8, 6)).save(other / 'c.gif')
    (folder / 'link').symlink_to(other)
    (other / 'circle').symlink_to(folder)
    (folder / 'out' / 'boxes').mkdir(parents=True)
    PILImage.new('RGB', (8, 6)).save(folder / 'out' / 'boxes' / 'd.png')
    lines = []
    monkeypatch.setattr(
        'e3va_mm.apis.images.print_log',
        lambda text, *args, **kwargs: lines.append(text),
    )
    images = Images(folder, but=[folder / 'out' / 'boxes'])
    names = [each.name for each in images]
    assert names == ['a', 'b', 'inner/a', 'link/c']
    assert [each.read().shape for each in images][3] == (6, 8, 3)
    (line,) = lines
    assert line.startswith('warning: ') and line.endswith('left out: 1 .txt.')


def test_a_list_of_several_kinds(folder):
    make_video(folder / 'clip.mp4')
    array = np.zeros((4, 5, 3), np.uint8)
    inputs = [folder / 'b.png', array, str(folder / 'clip.mp4')]
    images = list(Images(inputs))
    assert len(Images(inputs)) == 5
    assert [each.name for each in images[:3]] == ['b', '000001', 'clip_000000']
    assert images[1].read() is array
    assert (images[4].video.name, images[4].video.fps) == ('clip', 10.0)
    bright = [each.read().mean() for each in images[2:]]
    assert bright == sorted(bright) and bright[2] > 100


def test_recordings_may_not_know_how_many_frames_they_have(
    folder, monkeypatch
):
    make_video(folder / 'inner' / 'clip.mp4')
    monkeypatch.setattr(VideoReader, 'frame_cnt', -1)
    images = Images(folder)
    assert len(images) == 3
    frames = [each.name for each in images if each.video]
    assert frames == [f'inner/clip_00000{index}' for index in range(3)]


def test_a_url_is_left_to_its_loader():
    url = 'https://example.com/some/a.jpg?signed=' + 'x' * 300
    assert list(Images(url)) == [Image('a', url)]


def test_what_is_refused(folder):
    (folder / 'empty').mkdir()
    (folder / 'broken.mp4').write_bytes(b'none')
    (folder / 'broken.jpg').write_bytes(b'none')
    for inputs, message in (
        (str(folder / 'empty'), 'no file there ends in one of .bmp'),
        ([], 'no file there ends in'),
        (str(folder / 'none.png'), 'no such image, video or folder'),
        (str(folder / 'broken.mp4'), 'no video that OpenCV can read'),
        ('https://example.com/clip.mp4', 'videos are local files'),
        (np.zeros((4, 5), np.uint8), r'\(H, W, 3\), BGR, but got uint8'),
        (np.zeros((4, 5, 3)), 'but got float64 of shape'),
    ):
        with pytest.raises(DataError, match=message):
            Images(inputs)
    with pytest.raises(DataError, match='not a whole image'):
        next(iter(Images(folder / 'broken.jpg'))).read()
    (folder / 'empty.jpg').touch()
    with pytest.raises(DataError, match='empty.jpg is not a whole image'):
        Image('empty', str(folder / 'empty.jpg')).read()
    for source in (str(folder / 'none.jpg'), 'http://127.0.0.1:1/a b.jpg'):
        with pytest.raises(DataError, match='cannot be read'):
            Image('none', source).read()
