import importlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import zipfile
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.fileio.backends import registry_utils
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mm_checkpoint
from safetensors.torch import save_file
from torch import nn

from e3va_mm.checkpoint import read_checkpoint, reading, register_safe_loaders
from e3va_mm.errors import CheckpointError

needs_list = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split('.')[:2]) < (2, 6),
    reason='torch has no list of allowed names before 2.6',
)


def _weights():
    torch.manual_seed(0)
    return {'weight': torch.rand(32, 32), 'bias': torch.rand(32)}


def _saved(path, content=None, **kwargs):
    torch.save(_weights() if content is None else content, path, **kwargs)
    return path


def _refusal(path, read=read_checkpoint):
    with pytest.raises(CheckpointError) as error:
        read(str(path))
    return str(error.value)


# ------------------------------------------------------------ what is read


@pytest.mark.parametrize('zipped', [True, False])
def test_a_state_dict_is_read_as_it_was_saved(tmp_path, zipped):
    content = {'state_dict': _weights(), 'meta': {'epoch': 3, 'name': 'a'}}
    path = _saved(
        tmp_path / 'a.pth', content, _use_new_zipfile_serialization=zipped
    )
    found = read_checkpoint(path)
    assert found['meta'] == content['meta']
    for key, value in _weights().items():
        assert torch.equal(found['state_dict'][key], value)


def test_home_and_map_location(tmp_path, monkeypatch):
    _saved(tmp_path / 'a.pth')
    monkeypatch.setenv('HOME', str(tmp_path))
    found = read_checkpoint('~/a.pth', map_location='meta')
    assert found['weight'].device.type == 'meta'


@pytest.mark.parametrize('name', ['a.safetensors', 'a.pth', 'a'])
def test_safetensors_are_known_by_name_or_content(tmp_path, name):
    path = tmp_path / name
    save_file(_weights(), path, metadata={'trunk': 'nano'})
    found = read_checkpoint(path)
    assert found['meta'] == {'trunk': 'nano'}
    assert found['state_dict'].keys() == _weights().keys()
    for key, value in _weights().items():
        assert torch.equal(found['state_dict'][key], value)


@pytest.mark.parametrize('place', ['cpu', None, torch.device('cpu'), {}])
def test_safetensors_take_every_kind_of_map_location(tmp_path, place):
    path = tmp_path / 'a.safetensors'
    save_file(_weights(), path)
    weight = read_checkpoint(path, place)['state_dict']['weight']
    assert weight.device.type == 'cpu'


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        output = self.linear(inputs)
        return {'loss': output.square().sum()} if mode == 'loss' else output


class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'acc': np.float64(0.5)}


class ToyData(torch.utils.data.Dataset):
    metainfo = {'classes': ('a', 'b'), 'palette': np.eye(3, dtype='uint8')}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {'inputs': torch.full((2,), index / 8), 'data_samples': index}


def _runner(work_dir, epochs, **kwargs):
    data = {
        'batch_size': 2,
        'num_workers': 0,
        'dataset': ToyData(),
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'collate_fn': {'type': 'default_collate'},
    }
    return Runner(
        model=Toy(),
        work_dir=str(work_dir),
        experiment_name=f'toy{time.monotonic_ns()}',
        log_level='ERROR',
        train_dataloader=data,
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        val_dataloader=dict(data),
        val_cfg={},
        val_evaluator=[ToyMetric()],
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.01}},
        param_scheduler=[
            {'type': 'LinearLR', 'begin': 0, 'end': 3, 'by_epoch': False},
            {'type': 'MultiStepLR', 'milestones': [1, 3]},
            {
                'type': 'OneCycleLR',
                'eta_max': 0.01,
                'total_steps': 40,
                'by_epoch': False,
            },
        ],
        default_hooks={
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 1,
                'save_best': 'acc',
                'rule': 'greater',
            }
        },
        custom_hooks=[{'type': 'EMAHook'}],
        **kwargs,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A Runner that trained two epochs, and its work folder."""
    folder = tmp_path_factory.mktemp('trained')
    runner = _runner(folder, 2)
    runner.train()
    return runner, folder


@needs_list
@pytest.mark.parametrize('name', ['epoch_2.pth', 'best_acc_epoch_1.pth'])
def test_a_training_checkpoint_is_read_in_full(trained, name):
    runner, folder = trained
    found = read_checkpoint(folder / name)
    # The same file read without any restriction; the test wrote it.
    wanted = torch.load(folder / name, weights_only=False)
    assert found.keys() == wanted.keys()
    assert {'meta', 'state_dict', 'ema_state_dict', 'message_hub'} <= set(
        found
    )
    assert ('optimizer' in found) == (name == 'epoch_2.pth')
    ours = found['message_hub']['log_scalars']
    theirs = wanted['message_hub']['log_scalars']
    assert ours.keys() == theirs.keys() and 'train/loss' in ours
    for key, buffer in theirs.items():
        assert type(ours[key]) is HistoryBuffer
        assert ours[key].max_length == buffer.max_length
        for one, other in zip(ours[key].data, buffer.data, strict=True):
            assert type(one) is np.ndarray and one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    info = found['message_hub']['runtime_info']
    np.testing.assert_equal(info, wanted['message_hub']['runtime_info'])
    np.testing.assert_equal(found['meta'], wanted['meta'])
    palette = found['meta']['dataset_meta']['palette']
    assert type(palette) is np.ndarray and palette.dtype == np.uint8
    if name == 'epoch_2.pth':
        assert type(info['best_score']) is np.float64
    if name == 'epoch_2.pth':
        schedulers = found['param_schedulers']
        assert schedulers == wanted['param_schedulers']
        anneal = OneCycleParamScheduler._annealing_cos
        assert schedulers[2]['anneal_func'] is anneal


class _Start(Hook):
    def before_train(self, runner):
        self.epoch, self.iter = runner.epoch, runner.iter
        self.weights = [p.clone() for p in runner.model.parameters()]


def _losses():
    hub = MessageHub.get_current_instance()
    return hub.get_scalar('train/loss').data[0]


@needs_list
def test_training_resumes_through_the_door(trained):
    before, folder = trained
    losses = _losses()
    assert len(losses) == 8
    runner = _runner(folder, 3, resume=True)
    start = _Start()
    runner.register_hook(start)
    runner.train()
    assert (runner.epoch, runner.iter) == (3, 12)
    assert (start.epoch, start.iter) == (2, 8)
    for one, other in zip(
        start.weights, before.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert len(_losses()) == 12
    np.testing.assert_array_equal(_losses()[:8], losses)
    assert read_checkpoint(folder / 'epoch_3.pth')['meta']['epoch'] == 3


@needs_list
def test_numpy_values_under_the_names_of_both_major_versions(tmp_path):
    content = {
        'values': [np.float32(1.5), np.int64(-2), np.bool_(True)],
        'nested': (np.arange(6, dtype='>i4').reshape(2, 3), {'a': [3]}),
        'fortran': np.asfortranarray(np.random.rand(3, 4)),
        'empty': np.zeros((0, 3)),
        'text': np.array(['dog', 'zebra']),
        'weight': torch.ones(2),
    }
    path = _saved(
        tmp_path / 'a.pth', content, _use_new_zipfile_serialization=False
    )
    data = path.read_bytes()
    installed = np.arange(2).__reduce__()[0].__module__.encode()
    assert installed in data
    for name in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
        path.write_bytes(data.replace(installed, name))
        found = read_checkpoint(path)
        for one, other in zip(found['values'], content['values'], strict=True):
            assert type(one) is type(other) and one == other
        assert found['nested'][1] == {'a': [3]}
        pairs = [(found['nested'][0], content['nested'][0])]
        pairs += [(found[k], content[k]) for k in ('fortran', 'empty', 'text')]
        for one, other in pairs:
            assert type(one) is np.ndarray and one.dtype == other.dtype
            assert one.flags.writeable and one.shape == other.shape
            np.testing.assert_array_equal(one, other)


# ------------------------------------------- what is hostile: nothing runs


class Payload:
    """Runs `function` with `args` wherever it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) + ((state,) if state else ())

    def __reduce__(self):
        return self.call


def _touch(marker):
    return Payload(os.system, f'touch {marker}')


def _in_tar(path, payload):
    data = pickle.dumps(payload, protocol=2)
    with tarfile.open(path, 'w') as archive:
        for name in ('sys_info', 'pickle', 'tensors', 'storages'):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


FORMS = {
    'in_state_dict': lambda path, payload: _saved(
        path, {'state_dict': {**_weights(), 'x': payload}}
    ),
    'in_meta': lambda path, payload: _saved(
        path, {'meta': {'cfg': payload}, 'state_dict': _weights()}
    ),
    'legacy': lambda path, payload: _saved(
        path, {'x': payload}, _use_new_zipfile_serialization=False
    ),
    'pickle2': lambda path, payload: path.write_bytes(
        pickle.dumps(payload, protocol=2)
    ),
    'pickle4': lambda path, payload: path.write_bytes(
        pickle.dumps(payload, protocol=4)
    ),
    'tar': _in_tar,
}


@pytest.mark.parametrize('form', FORMS)
def test_a_hostile_file_is_refused_and_does_not_run(tmp_path, form):
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    FORMS[form](path, _touch(marker))
    text = _refusal(path)
    assert not marker.exists()
    assert text.startswith(str(path))
    assert {
        'pickle4': 'is a pickle of protocol 4',
        'tar': 'is a tar archive',
    }.get(form, 'names posix.system, which is not on the list') in text
    assert 'weights_only' not in text  # torch's advice to unpickle it
    # The payload does work where a file is unpickled.
    try:
        torch.load(path, weights_only=False)
    except Exception:
        pass
    assert marker.exists()


def _history(payload):
    history = HistoryBuffer([1.0], [1])
    history._statistics_methods = {'mean': payload}
    return history


@pytest.mark.parametrize(
    'make, text',
    [
        (lambda m: Payload(eval, f'open({m!r}, "w")'), 'names eval'),
        (
            lambda m: Payload(importlib.import_module, 'this'),
            'names importlib.import_module',
        ),
        (lambda m: _history(_touch(m)), 'names posix.system'),
        (lambda m: Payload(getattr, np.ndarray, 'dump'), 'names getattr'),
        (
            lambda m: Payload(
                getattr, OneCycleParamScheduler, '__subclasses__'
            ),
            'names getattr',
        ),
        # numpy would take the file's bytes for pointers to objects
        (
            lambda m: Payload(
                np.dtype,
                'O8',
                False,
                True,
                state=(3, '|', None, None, None, -1, -1, 0),
            ),
            "a numpy array of dtype 'O8'",
        ),
        (lambda m: np.array([{}], dtype=object), "dtype 'O8'"),
        (lambda m: np.zeros(2, dtype='f4,i4'), "dtype 'V8'"),
        (lambda m: nn.Linear(1, 1), 'names torch.nn.modules.linear.Linear'),
    ],
)
@needs_list
def test_what_is_not_on_the_list_is_named(tmp_path, make, text):
    marker = str(tmp_path / 'marker')
    path = _saved(tmp_path / 'a.pth', {'x': make(marker)})
    assert text in _refusal(path)
    assert not os.path.exists(marker)


@needs_list
def test_a_file_cannot_replace_the_statistics_of_history_buffers(tmp_path):
    path = _saved(tmp_path / 'a.pth', {'x': _history('poison')})
    methods = dict(HistoryBuffer._statistics_methods)
    assert read_checkpoint(path)['x'].statistics('mean') == 1
    assert HistoryBuffer._statistics_methods == methods


@needs_list
def test_the_list_of_other_packages_does_not_count(tmp_path):
    path = _saved(tmp_path / 'a.pth', {'x': nn.Linear(1, 1)})
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([nn.Linear]):
        assert 'names torch.nn.modules.linear.Linear' in _refusal(path)
        after = torch.serialization.get_safe_globals()
        assert set(after) == {*before, nn.Linear}
        read_checkpoint(_saved(path))
        assert set(torch.serialization.get_safe_globals()) == set(after)


def test_data_of_a_numpy_array_must_have_its_size(tmp_path):
    array = np.arange(4.0)
    function, args, state = array.__reduce__()
    for data in (state[4][:-8], state[4] + b'\0' * 8):
        value = Payload(function, *args, state=(*state[:4], data))
        path = _saved(tmp_path / 'a.pth', {'x': value})
        assert 'cannot be read as a checkpoint' in _refusal(path)


# ---------------------------------------- what is damaged or no checkpoint


@pytest.mark.parametrize(
    'data, text',
    [
        (b'', 'is empty (0 bytes)'),
        (b'<!DOCTYPE html><p>Not found', "begins with '<!DOCTYPE html>"),
        (b'version https://git-lfs.github.com/spec/v1', 'Git LFS pointer'),
        (b'a checkpoint\n', "begins with 'a checkpoint'"),
        (b'\x80', 'cannot be read as a checkpoint'),
        (bytes(range(256)) * 4, 'cannot be read as a checkpoint'),
        (pickle.dumps({'a': 1}, protocol=2), 'cannot be read as a checkpoint'),
    ],
)
def test_what_is_no_checkpoint(tmp_path, data, text):
    path = tmp_path / 'a.pth'
    path.write_bytes(data)
    refusal = _refusal(path)
    assert text in refusal and refusal.startswith(str(path))
    assert refusal.endswith('.')


@pytest.mark.parametrize(
    'content, kind',
    [([1, 2], 'list'), (torch.ones(1), 'Tensor'), ({}, 'dict')],
)
def test_what_is_no_dict(tmp_path, content, kind):
    path = _saved(tmp_path / 'a.pth', content)
    assert f'holds a {kind} without weights' in _refusal(path)


def test_a_list_that_holds_itself(tmp_path):
    endless = []
    endless.append(endless)
    path = _saved(tmp_path / 'a.pth', {'x': endless})
    assert 'RecursionError' in _refusal(path)


def test_other_archives(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    assert 'is a zip archive, but no checkpoint' in _refusal(path)
    torch.jit.trace(nn.ReLU(), torch.ones(1)).save(str(path))
    assert 'is a TorchScript program' in _refusal(path)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'safetensors'])
def test_every_truncated_file_is_refused(tmp_path, form):
    path = tmp_path / ('a.safetensors' if form == 'safetensors' else 'a.pth')
    if form == 'safetensors':
        save_file(_weights(), path)
    else:
        _saved(path, _use_new_zipfile_serialization=form == 'zip')
    data = path.read_bytes()
    for length in [*range(1, 200, 17), *range(200, len(data), 211)]:
        path.write_bytes(data[:length])
        text = _refusal(path)
    if form == 'zip':
        assert f'is incomplete: it ends after {length} bytes' in text
    assert 'compare its size with the original' in text


def test_a_flipped_bit_is_refused_or_without_effect(tmp_path):
    path = _saved(tmp_path / 'a.pth')
    data = path.read_bytes()
    wanted = read_checkpoint(path)
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert refused > 100
    flipped = bytearray(data)
    flipped[data.index(wanted['weight'].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(flipped)
    assert 'the checksum of its record' in _refusal(path)


@pytest.mark.parametrize(
    'data',
    [
        b'\xff' * 8 + b'{"a"',
        (2**40).to_bytes(8, 'little') + b'{}',
        (2).to_bytes(8, 'little') + b'[]',
        (40).to_bytes(8, 'little') + b'{"a":{"dtype":"F32","shape":[9],"da',
        b'PK\x03\x04',
    ],
)
def test_safetensors_with_an_absurd_header(tmp_path, data):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(data)
    text = _refusal(path)
    assert text.startswith(f'{path} cannot be read as a safetensors file: ')


def test_a_missing_file_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = _refusal('no/such.pth')
    assert text.startswith(f'no/such.pth does not exist in {tmp_path}. ')
    path = tmp_path / 'such.pth'
    assert _refusal(path).startswith(f'{path} does not exist. ')
    assert _refusal(tmp_path).startswith(f'{tmp_path} is a folder. ')


# ------------------------------------------------------------------ schemes


def test_assets_are_found_and_nothing_beside_them(tmp_path, monkeypatch):
    assets = tmp_path / 'assets'
    assets.mkdir()
    monkeypatch.setattr(reading, 'ASSETS', assets)
    save_file(_weights(), assets / 'nano.safetensors')
    _saved(tmp_path / 'secret.pth')
    found = read_checkpoint('e3va_mm://nano.safetensors')
    assert found['state_dict'].keys() == _weights().keys()
    for name in ('../secret.pth', f'{tmp_path}/secret.pth', 'a/../../secret'):
        text = _refusal(f'e3va_mm://{name}')
        assert 'points out of the files that come with e3va_mm' in text
    (assets / 'link.pth').symlink_to(tmp_path / 'secret.pth')
    assert 'points out' in _refusal('e3va_mm://link.pth')
    (assets / 'link.pth').unlink()
    text = _refusal('e3va_mm://none.pth')
    assert 'is no file of e3va_mm. Available: nano.safetensors.' in text


def test_assets_lie_in_the_package():
    assert reading.ASSETS.parts[-2:] == ('e3va_mm', 'assets')


def test_every_scheme_of_mmengine_is_ours():
    schemes = mm_checkpoint.CheckpointLoader._schemes
    assert len(schemes) == 12
    for prefix, loader in schemes.items():
        assert loader.__module__ == 'e3va_mm.checkpoint.reading', prefix
        assert loader.__name__.startswith('load_from_')
    assert list(schemes)[-1] == ''
    before = list(schemes.items())
    register_safe_loaders()
    register_safe_loaders()
    after = mm_checkpoint.CheckpointLoader._schemes
    assert list(after.items()) == before


def test_mmengine_names_the_loader_in_its_log(tmp_path, capsys):
    path = str(_saved(tmp_path / 'a.pth'))
    mm_checkpoint.CheckpointLoader.load_checkpoint(path, logger=None)
    assert 'by safe_local backend from path' in capsys.readouterr().out


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


def _ways_in(folder):
    yield 'init_cfg', lambda path: _stock_swin(path).init_weights()
    yield 'load', lambda path: mm_checkpoint.load_checkpoint(Toy(), path)
    yield (
        'prefix',
        lambda path: mm_checkpoint._load_checkpoint_with_prefix('a', path),
    )
    yield 'load_from', lambda path: _runner(folder, 1, load_from=path).train()
    yield 'resume', lambda path: _runner(folder, 1).resume(path)


@pytest.mark.parametrize('way', [n for n, _ in _ways_in(None)])
def test_every_way_in_refuses_a_hostile_file(tmp_path, way):
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    FORMS['in_meta'](path, _touch(marker))
    text = _refusal(path, dict(_ways_in(tmp_path))[way])
    assert 'names posix.system' in text
    assert not marker.exists()


def test_openmmlab_names(tmp_path, monkeypatch, server, cache):
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    table = {'web': server.url('a.pth'), 'disk': 'local.pth', 'bad': 'bad.pth'}
    (tmp_path / 'open_mmlab.json').write_text(json.dumps(table))
    _saved(tmp_path / 'local.pth', {'local': torch.ones(1)})
    marker = tmp_path / 'marker'
    FORMS['in_meta'](tmp_path / 'bad.pth', _touch(marker))
    assert 'weight' in read_checkpoint('openmmlab://web')
    assert 'local' in read_checkpoint('open-mmlab://disk')
    assert 'names posix.system' in _refusal('open-mmlab://bad')
    assert 'is none of the ' in _refusal('openmmlab://nonsense')
    assert not marker.exists()


@pytest.mark.parametrize('scheme', ['mmcls', 'torchvision', 'modelzoo'])
def test_names_of_other_zoos(tmp_path, monkeypatch, server, cache, scheme):
    table = (
        'get_mmcls_models' if scheme == 'mmcls' else ('get_torchvision_models')
    )
    urls = {'good': server.url('a.pth'), 'bad': server.url('hostile.pth')}
    monkeypatch.setattr(mm_checkpoint, table, lambda: urls)
    server.files['a.pth'] = _bytes({'backbone.a': torch.ones(1)})
    found = read_checkpoint(f'{scheme}://good')
    if scheme == 'mmcls':
        assert list(found['state_dict']) == ['a']
    else:
        assert list(found) == ['backbone.a']
    assert 'names posix.system' in _refusal(f'{scheme}://bad')
    assert 'is none of the 2 models' in _refusal(f'{scheme}://nonsense')


def test_object_stores_and_pavi(tmp_path, monkeypatch):
    objects = {
        's3://bucket/a.pth': _saved(tmp_path / 'a.pth').read_bytes(),
        'petrel://bucket/bad.pth': pickle.dumps(_touch('x'), protocol=2),
    }

    class Store:
        def get(self, name):
            return objects[name]

    monkeypatch.setitem(registry_utils.backends, 'petrel', Store)
    assert 'weight' in read_checkpoint('s3://bucket/a.pth')
    assert 'names posix.system' in _refusal('petrel://bucket/bad.pth')
    assert 'Download the checkpoint by hand' in _refusal('pavi://a')


# ---------------------------------------------------------------- downloads


def _bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def server():
    """Serves `files` on 127.0.0.1; `asked` lists the paths asked for."""
    good = _bytes(_weights())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split('?')[0].lstrip('/')
            web.asked.append(name)
            data = web.files.get(name)
            time.sleep(0.2)
            if data is None:
                return self.send_error(404, 'Not there')
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            part = len(data) // 2 if 'cut' in name else len(data)
            self.wfile.write(data[:part])

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    web.asked = []
    web.files = {
        'a.pth': good,
        'cut.pth': good,
        'hostile.pth': pickle.dumps(_touch('x'), protocol=2),
        f'right-{sha256(good).hexdigest()[:8]}.pth': good,
        'wrong-0123abcd.pth': good,
        'dated-20210902.pth': good,
    }
    web.url = lambda name: f'http://127.0.0.1:{web.server_port}/{name}'
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


def test_a_url_is_downloaded_once_to_the_cache_of_torch_hub(server, cache):
    url = server.url('a.pth') + '?download=1'
    for _ in range(2):
        assert torch.equal(
            read_checkpoint(url)['weight'], _weights()['weight']
        )
    assert server.asked == ['a.pth']
    assert [path.name for path in cache.iterdir()] == ['a.pth']


def test_http_loader_takes_the_arguments_of_mmengines(server, tmp_path):
    loader = mm_checkpoint.CheckpointLoader._schemes['http://']
    loader(server.url('a.pth'), 'cpu', str(tmp_path / 'own'), progress=False)
    assert (tmp_path / 'own' / 'a.pth').is_file()


def test_a_hash_in_the_name_is_compared(server, cache):
    for name in ('right-', 'dated-'):
        name = next(n for n in server.files if n.startswith(name))
        assert 'weight' in read_checkpoint(server.url(name))
    text = _refusal(server.url('wrong-0123abcd.pth'))
    assert 'invalid hash value (expected "0123abcd"' in text
    assert not list(cache.glob('*wrong*'))


@pytest.mark.parametrize(
    'name, text',
    [
        ('none.pth', 'cannot be downloaded: HTTP Error 404: Not there'),
        ('cut.pth', 'was downloaded, but not kept. The file is incomplete'),
        ('hostile.pth', 'but not kept. The file names posix.system'),
    ],
)
def test_a_failed_download_leaves_nothing(server, cache, name, text):
    url = server.url(name)
    refusal = _refusal(url)
    assert refusal.startswith(url) and text in refusal
    if name == 'none.pth':
        assert 'Download it by hand and set `init_cfg.checkpoint`' in refusal
        assert str(cache / name) in refusal
    assert list(cache.iterdir()) == []


def test_a_server_that_is_not_there(cache):
    assert 'cannot be downloaded: ' in _refusal('http://127.0.0.1:9/a.pth')


def test_a_damaged_copy_in_the_cache_says_what_to_delete(server, cache):
    cache.mkdir(parents=True)
    (cache / 'a.pth').write_bytes(b'PK\x03\x04')
    text = _refusal(server.url('a.pth'))
    assert str(cache / 'a.pth') in text
    assert f'the stored copy of {server.url("a.pth")}: delete it' in text


def test_in_a_distributed_run_one_process_downloads(server, cache, tmp_path):
    """Both ranks read one file, and both get an error for another."""
    script = textwrap.dedent("""
        import sys
        import torch.distributed as dist
        rank, store, *urls = sys.argv[1:]
        dist.init_process_group(
            'gloo', f'file://{store}', rank=int(rank), world_size=2)
        from e3va_mm.checkpoint import read_checkpoint
        from e3va_mm.errors import CheckpointError
        assert 'weight' in read_checkpoint(urls[0])
        try:
            read_checkpoint(urls[1])
        except CheckpointError as error:
            print('refused:', error)
        dist.destroy_process_group()
    """)
    command = [sys.executable, '-c', script]
    urls = [server.url('a.pth'), server.url('none.pth')]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / 'store'), *urls],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert 'HTTP Error 404' in outputs[0][0]
    assert "by this machine's first process" in outputs[1][0]
    assert server.asked == ['a.pth', 'none.pth']
