import json
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.fileio import BaseStorageBackend
from mmengine.fileio.backends import registry_utils
from mmengine.hooks import Hook
from mmengine.runner import checkpoint as mm_checkpoint
from safetensors.torch import save_file
from torch import nn

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import (
    AdapterFile,
    TrunkRecord,
    read_checkpoint,
    reading,
)
from tests.helpers import build_e3va
from tests.test_weights.hostile import FORMS, touch
from tests.test_weights.samples import (
    refusal_of,
    saved,
    saved_bytes,
    weights,
)
from tests.test_weights.toy_runner import Toy, toy_runner


def test_assets_are_found_and_nothing_beside_them(tmp_path, monkeypatch):
    assets = tmp_path / 'assets'
    assets.mkdir()
    monkeypatch.setattr(reading, 'ASSETS', assets)
    save_file(weights(), assets / 'nano.safetensors')
    saved(tmp_path / 'secret.pth')
    found = read_checkpoint('e3va_mm://nano.safetensors')
    assert found['state_dict'].keys() == weights().keys()
    for name in ('../secret.pth', f'{tmp_path}/secret.pth', 'a/../../secret'):
        text = refusal_of(f'e3va_mm://{name}')
        assert 'points out of the files that come with e3va_mm' in text
    (assets / 'link.pth').symlink_to(tmp_path / 'secret.pth')
    assert 'points out' in refusal_of('e3va_mm://link.pth')
    (assets / 'link.pth').unlink()
    text = refusal_of('e3va_mm://none.pth')
    assert 'is no file of e3va_mm. Available: nano.safetensors.' in text


def test_assets_lie_in_the_package():
    assert reading.ASSETS.parts[-2:] == ('e3va_mm', 'assets')


def test_every_scheme_of_mmengine_is_ours():
    schemes = mm_checkpoint.CheckpointLoader._schemes
    assert len(schemes) == 13
    for prefix, loader in schemes.items():
        assert loader.__module__ == 'e3va_mm.frameworks.loaders', prefix
    assert list(schemes)[-1] == ''


def test_mmengine_names_the_loader_in_its_log(tmp_path, capsys):
    path = str(saved(tmp_path / 'a.pth'))
    mm_checkpoint.CheckpointLoader.load_checkpoint(path, logger=None)
    assert 'by e3va_mm backend from path' in capsys.readouterr().out


def _stock_swin(path):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    return swin.SwinTransformer(
        embed_dims=8,
        depths=(1, 1),
        num_heads=(1, 2),
        strides=(4, 2),
        out_indices=(0, 1),
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(path)),
    )


def test_stock_swin_takes_safetensors_by_init_cfg(tmp_path):
    path = tmp_path / 'a.safetensors'
    source = _stock_swin(path)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    model = _stock_swin(path)
    model.init_weights()
    wanted = source.state_dict()
    assert wanted
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key]), key


class _Start(Hook):
    def before_train(self, runner):
        self.epoch, self.iter = runner.epoch, runner.iter
        self.weights = [p.clone() for p in runner.model.parameters()]


def _losses(runner):
    return runner.message_hub.get_scalar('train/loss').data[0]


def test_training_resumes_through_the_door(trained):
    before, folder = trained
    losses = _losses(before)
    assert len(losses) == 8
    runner = toy_runner(folder, 3, resume=True)
    start = _Start()
    runner.register_hook(start)
    runner.train()
    assert (runner.epoch, runner.iter) == (3, 12)
    assert (start.epoch, start.iter) == (2, 8)
    for one, other in zip(
        start.weights, before.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert len(_losses(runner)) == 12
    np.testing.assert_array_equal(_losses(runner)[:8], losses)
    assert read_checkpoint(folder / 'epoch_3.pth')['meta']['epoch'] == 3


def test_an_adapter_file_says_that_it_cannot_be_resumed(tmp_path):
    path = tmp_path / 'a.safetensors'
    trunks = {'backbone.': TrunkRecord(None, 'print')}
    AdapterFile(weights(), trunks, (), config='# a config').write(path)
    meta = read_checkpoint(path)['meta']
    assert meta['cfg'] == '# a config'
    assert meta.get('epoch') is None and 'iter' not in meta
    for key in ('epoch', 'iter'):
        with pytest.raises(CheckpointError) as error:
            meta[key]
        text = str(error.value)
        assert f'{path} is an adapter file' in text
        assert 'Resume from a full checkpoint' in text
        assert f'`resume=False`, `load_from={str(path)!r}`' in text
    with pytest.raises(KeyError):
        meta['other']


def _e3va_swin(path):
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(path)}
    return build_e3va(init_cfg=init_cfg)


def _ways_in(folder):
    yield 'init_cfg', lambda path: _stock_swin(path).init_weights()
    yield 'e3va_init_cfg', lambda path: _e3va_swin(path).init_weights()
    yield 'load', lambda path: mm_checkpoint.load_checkpoint(Toy(), path)
    yield (
        'prefix',
        lambda path: mm_checkpoint._load_checkpoint_with_prefix('a', path),
    )
    yield (
        'load_from',
        lambda path: toy_runner(folder, 1, load_from=path).train(),
    )
    yield 'resume', lambda path: toy_runner(folder, 1).resume(path)


@pytest.mark.parametrize('way', [n for n, _ in _ways_in(None)])
def test_every_way_in_refuses_a_hostile_file(tmp_path, way):
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    FORMS['in_meta'](path, touch(marker))
    text = refusal_of(path, dict(_ways_in(tmp_path))[way])
    assert 'names posix.system' in text
    assert not marker.exists()


def test_openmmlab_names(tmp_path, monkeypatch, server, cache):
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    table = {'web': server.url('a.pth'), 'disk': 'local.pth', 'bad': 'bad.pth'}
    (tmp_path / 'open_mmlab.json').write_text(json.dumps(table))
    saved(tmp_path / 'local.pth', {'local': torch.ones(1)})
    marker = tmp_path / 'marker'
    FORMS['in_meta'](tmp_path / 'bad.pth', touch(marker))
    assert 'weight' in read_checkpoint('openmmlab://web')
    assert 'local' in read_checkpoint('open-mmlab://disk')
    assert 'names posix.system' in refusal_of('open-mmlab://bad')
    assert 'is none of the ' in refusal_of('openmmlab://nonsense')
    assert not marker.exists()


@pytest.mark.parametrize('scheme', ['mmcls', 'torchvision', 'modelzoo'])
def test_names_of_other_zoos(tmp_path, monkeypatch, server, cache, scheme):
    table = (
        'get_mmcls_models' if scheme == 'mmcls' else ('get_torchvision_models')
    )
    urls = {'good': server.url('a.pth'), 'bad': server.url('hostile.pth')}
    monkeypatch.setattr(mm_checkpoint, table, lambda: urls)
    server.files['a.pth'] = saved_bytes({'backbone.a': torch.ones(1)})
    found = read_checkpoint(f'{scheme}://good')
    assert list(found) == ['backbone.a']
    load = mm_checkpoint.CheckpointLoader.load_checkpoint
    state = load(f'{scheme}://good').get('state_dict', found)
    assert list(state) == ['a' if scheme == 'mmcls' else 'backbone.a']
    assert 'names posix.system' in refusal_of(f'{scheme}://bad')
    assert 'is none of the 2 models' in refusal_of(f'{scheme}://nonsense')


def test_object_stores_and_pavi(tmp_path, monkeypatch):
    objects = {
        's3://bucket/a.pth': saved(tmp_path / 'a.pth').read_bytes(),
        'petrel://bucket/bad.pth': pickle.dumps(touch('x'), protocol=2),
    }

    class Store(BaseStorageBackend):
        get_text = None

        def get(self, name):
            return objects[name]

        @contextmanager
        def get_local_path(self, name):
            path = tmp_path / 'local.pth'
            path.write_bytes(self.get(name))
            yield path

    monkeypatch.setitem(registry_utils.backends, 'petrel', Store)
    assert 'weight' in read_checkpoint('s3://bucket/a.pth')
    assert 'names posix.system' in refusal_of('petrel://bucket/bad.pth')
    assert 'Download the checkpoint by hand' in refusal_of('pavi://a')
