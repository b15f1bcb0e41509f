"""A file that runs a command wherever it is unpickled, given to commands."""

import importlib

import pytest

from tests.test_weights.hostile import FORMS, touch

DOORS = [
    'train {config} --cfg-options load_from={path}',
    'train {config} --cfg-options model.backbone.init_cfg.checkpoint={path}',
    'train {config} --resume {path}',
    'test {config} {path}',
    'adapter extract {path} {out}.safetensors --config {config}',
    'adapter inspect {path}',
    'adapter merge {config} {path} {out}.pth',
    'adapter strip {path} {out}.safetensors',
    'export {config} {path} --out {out}.pt2 --size 48 64',
]


@pytest.mark.parametrize('door', DOORS)
def test_every_command_refuses_what_would_run(
    segmentor, tmp_path, door, error
):
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    FORMS['in_meta'](path, touch(marker))
    name, *arguments = door.format(
        config=segmentor.config, path=path, out=tmp_path / 'out'
    ).split()
    command = importlib.import_module(f'e3va_mm.commands.{name}')
    assert str(path) in error(command, *arguments)
    assert not marker.exists()
    assert not list(tmp_path.glob('out*'))
