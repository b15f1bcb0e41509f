import pytest

from tests.test_apis.trained import trained_detector, trained_segmentor
from tests.test_engine.test_hooks.tiny import (
    detection_config,
    make_coco,
    make_segmentation,
    segmentation_config,
)


@pytest.fixture
def detection(tmp_path):
    make_coco(tmp_path, 'train', suffix='.jpg')
    make_coco(tmp_path, 'val', 2, suffix='.png')
    return detection_config(tmp_path)


@pytest.fixture
def segmentation(tmp_path):
    make_segmentation(tmp_path)
    return segmentation_config(tmp_path)


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    return trained_detector(tmp_path_factory.getbasetemp())


@pytest.fixture(scope='session')
def segmentor(tmp_path_factory):
    return trained_segmentor(tmp_path_factory.getbasetemp())


@pytest.fixture
def error(capsys):
    """What a command prints to standard error before it gives up."""

    def error(command, *argv):
        assert command.main([str(arg) for arg in argv]) == 1
        printed = capsys.readouterr().err
        assert 'Traceback' not in printed
        return printed[printed.index('error: ') :]

    return error
