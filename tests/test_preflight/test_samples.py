"""Samples that fail; whole runs are in test_odd_data."""

from urllib.error import URLError

import pytest
import torch
from mmengine.structures import BaseDataElement, PixelData
from PIL import Image

from e3va_mm.errors import DataError
from e3va_mm.preflight.samples import CheckedSamples
from tests.test_engine.test_hooks.tiny import truncate


class Refuse:
    """A transform with a defect."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, index):
        raise KeyError('gt_polygons')

    def get_data_info(self, index):
        return dict(img_path=self.dataset, sample_idx=index)


def test_a_transform_with_a_defect_keeps_its_trace(tmp_path):
    path = tmp_path / 'a.jpg'
    Image.effect_noise((64, 48), 50).save(path)
    defect = Refuse(str(path))
    samples = CheckedSamples(defect, defect, 'train_dataloader.dataset')
    with pytest.raises(KeyError, match='gt_polygons') as error:
        samples(7)
    if hasattr(error.value, '__notes__'):  # Python >= 3.11
        (note,) = error.value.__notes__
        assert 'sample 7 of train_dataloader.dataset' in note
        assert str(path) in note
    truncate(path)
    with pytest.raises(DataError, match=f'{path}: cannot be decoded'):
        samples(7)


def test_a_file_that_cannot_be_reached_is_named():
    class Far(Refuse):
        def __call__(self, index):
            raise URLError('Connection refused')

    far = Far('http://host/a.jpg')
    samples = CheckedSamples(far, far, 'train_dataloader.dataset')
    with pytest.raises(DataError) as error:
        samples(7)
    assert str(error.value) == (
        'train_dataloader.dataset: sample 7 cannot be read: URLError: '
        '<urlopen error Connection refused>; expected files that its loaders '
        'reach: http://host/a.jpg.\nCheck the address, the network and '
        '`backend_args`.'
    )


def test_a_data_set_of_videos_does_not_hide_a_defect():
    class Videos(Refuse):
        def get_data_info(self, index):
            raise TypeError('tuple indices')

    defect = Videos('a.jpg')
    samples = CheckedSamples(defect, defect, 'train_dataloader.dataset')
    with pytest.raises(KeyError, match='gt_polygons') as error:
        samples((0, 3))
    if hasattr(error.value, '__notes__'):  # Python >= 3.11
        (note,) = error.value.__notes__
        assert 'sample (0, 3) of train_dataloader.dataset' in note


class Maps:
    """A data set of one map."""

    metainfo = dict(classes=('a', 'b'))
    ignore_index = 255

    def __init__(self, *values):
        self.values = values

    def __call__(self, index):
        data = torch.tensor([[self.values]])
        sample = BaseDataElement()
        sample.gt_sem_seg = PixelData(data=data)
        inputs = torch.zeros(3, 1, len(self.values))
        return dict(inputs=inputs, data_samples=sample)

    def get_data_info(self, index):
        return dict(img_path='a.jpg', seg_map_path='a.png')


def test_values_for_no_class_are_those_of_data_set_and_losses():
    for values in ((0, 1, 255), (0, 1, 2), (0, 1, 2, 255)):
        maps = Maps(*values)
        assert CheckedSamples(maps, maps, 'train', {2})(0)
    maps = Maps(0, 2, 255)
    with pytest.raises(DataError) as error:
        CheckedSamples(maps, maps, 'train')(0)
    assert str(error.value) == (
        'train: a.png: the map has values that no class has: 2; expected 0 to '
        '1 for the 2 classes and [255] for none.\nCorrect the map or '
        'train.metainfo, .reduce_zero_label or .ignore_index.'
    )


@pytest.mark.parametrize('sample', [None, {}, [1], dict(inputs=[1])])
def test_other_forms_of_samples_pass(sample):
    maps = Maps()
    checked = CheckedSamples(lambda index: sample, maps, 'train')
    assert checked(0) is sample
