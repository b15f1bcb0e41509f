import pickle

import numpy as np
import pytest
from PIL import Image

from e3va_mm.commands import test
from tests.test_apis.trained import trained_detector, trained_segmentor


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    return trained_detector(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='session')
def segmentor(tmp_path_factory):
    return trained_segmentor(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='session')
def detections(detector):
    """What tools/test.py finds on the image."""
    out = detector.folder / 'predictions.pkl'
    arguments = [detector.config, detector.checkpoint, '--out', str(out)]
    assert test.main(arguments) == 0
    found = {
        each['img_path']: each['pred_instances']
        for each in pickle.loads(out.read_bytes())
    }[detector.image]
    assert len(found['scores']) > 5
    return found


@pytest.fixture(scope='session')
def classes(segmentor):
    """The map that tools/test.py writes for the image."""
    out = segmentor.folder / 'maps_out'
    arguments = [segmentor.config, segmentor.checkpoint, '--out', str(out)]
    assert test.main(arguments) == 0
    found = np.asarray(Image.open(out / '000.png'))
    assert len(np.unique(found)) > 1
    return found
