"""Files of predictions and drawings."""

import json

import cv2
import numpy as np
import pytest

from e3va_mm.apis.images import Image, Video
from e3va_mm.apis.result_writer import ResultWriter
from e3va_mm.errors import DataError


class Shade:
    """A task that finds how bright an image is."""

    def prediction(self, result):
        return result

    def write(self, prediction, path):
        path.with_suffix('.json').write_text(json.dumps(prediction))

    def draw(self, image, result, score_thr):
        return np.full_like(image, (result, 0, 0))


def image(value=0):
    return np.full((24, 32, 3), value, np.uint8)


def test_a_folder_for_each_task(tmp_path):
    with ResultWriter(tmp_path, dict(a=Shade(), b=Shade())) as writer:
        writer.write(Image('one', image()), dict(a=200, b=100))
        writer.write(Image('inner/one', image()), dict(a=50, b=0))
        writer.write(Image('one', image()), dict(a=1, b=2))
    assert json.loads((tmp_path / 'a/preds/one.json').read_text()) == 200
    assert json.loads((tmp_path / 'b/preds/one_2.json').read_text()) == 2
    drawn = cv2.imread(str(tmp_path / 'a/vis/one.jpg'))
    assert drawn[0, 0].argmax() == 2  # RGB was drawn
    assert (tmp_path / 'b/vis/inner/one.jpg').is_file()


def test_videos_become_videos(tmp_path):
    tasks = dict(a=Shade())
    with ResultWriter(tmp_path, tasks) as writer:
        for name, frames in (('x', 3), ('y', 2), ('x', 2)):
            video = Video(name, '', 10.0, frames)
            for index in range(frames):
                frame = Image(f'{name}_{index}', image(), video)
                writer.write(frame, dict(a=90 * index))
    for name, frames in (('x', 3), ('y', 2), ('x_2', 2)):
        video = cv2.VideoCapture(str(tmp_path / f'a/vis/{name}.mp4'))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == frames
        assert video.get(cv2.CAP_PROP_FPS) == 10
    assert len(list((tmp_path / 'a/preds').iterdir())) == 7


def test_without_drawings(tmp_path):
    with ResultWriter(tmp_path, dict(a=Shade()), draw=False) as writer:
        writer.write(Image('one', 'not read'), dict(a=1))
    assert [path.name for path in tmp_path.rglob('*.*')] == ['one.json']


@pytest.mark.parametrize('part', ['preds', 'vis'])
@pytest.mark.parametrize('video', [None, Video('film', '', 10.0, 1)])
def test_a_folder_that_cannot_be_written(tmp_path, part, video):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / part).write_text('in the way')
    with ResultWriter(tmp_path, dict(a=Shade())) as writer:
        with pytest.raises(DataError, match=f'a/{part}/one cannot be written'):
            writer.write(Image('one', image(), video), dict(a=1))
