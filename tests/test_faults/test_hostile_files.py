"""Checkpoints that are cut, bent, foreign or malicious are refused."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from e3va_mm.errors import CheckpointError
from e3va_mm.registry import MODELS
from e3va_mm.weights import (
    AdapterFile,
    TrunkRecord,
    match_state,
    read_adapter,
    read_checkpoint,
)
from tests.helpers import build_e3va, build_stock, randomised
from tests.test_weights import test_swin_names, test_vit_names
from tests.test_weights.hostile import Payload
from tests.test_weights.samples import refusal_of

EXAMPLES = int(os.environ.get('E3VA_MM_EXAMPLES', 20))
draws = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 20,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# All bits in turn with E3VA_MM_EXAMPLES above the default.
STEP = 7 if EXAMPLES <= 20 else 1
ROOT = Path(__file__).parents[2]


def state():
    torch.manual_seed(0)
    return {'a.weight': torch.rand(4, 4), 'a.bias': torch.rand(4)}


def _pth(path, **kwargs):
    torch.save(dict(state_dict=state(), meta=dict(epoch=1)), path, **kwargs)


def _adapter(path):
    trunks = {'backbone.': TrunkRecord('trunk.pth', 'abc', None)}
    AdapterFile(state(), trunks, ('a.weight',), config='a = 1').write(path)


FORMATS = {
    'zip.pth': _pth,
    'legacy.pth': lambda path: _pth(
        path, _use_new_zipfile_serialization=False
    ),
    'plain.safetensors': lambda path: save_file(state(), path),
    'adapter.safetensors': _adapter,
}
# Those without a checksum: numbers of another value cannot be told.
UNCHECKED = ('legacy.pth', 'plain.safetensors')


def same(one, other):
    """Whether two contents are equal, tensors by their values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            same(one[key], other[key]) for key in one
        )
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


@pytest.fixture(scope='module', params=FORMATS)
def sample(request, tmp_path_factory):
    """The path of a whole file, its bytes and what it holds."""
    path = tmp_path_factory.mktemp('whole') / request.param
    FORMATS[request.param](path)
    whole = path.read_bytes()
    return path, whole, read_checkpoint(spoil(path, whole))


def spoil(path, content):
    """A file beside ``path`` with other content."""
    spoilt = path.with_name(f'spoilt.{path.name}')
    spoilt.write_bytes(content)
    return spoilt


def refused_or_harmless(path, content, expected):
    try:
        found = read_checkpoint(spoil(path, content))
    except CheckpointError:
        return
    # What does not reach the content: dates of the archive, blanks.
    if path.name not in UNCHECKED:
        assert same(found, expected)
    else:
        assert isinstance(found, dict)


def test_every_truncation_and_every_flipped_bit(sample):
    path, whole, expected = sample
    for length in range(0, len(whole), 5 * STEP):
        text = refusal_of(spoil(path, whole[:length]))
        assert str(path.parent) in text
    for place in range(0, len(whole), STEP):
        content = bytearray(whole)
        content[place] ^= 1 << (place * 5 % 8)
        refused_or_harmless(path, content, expected)


@draws
@given(data=st.data())
def test_overwritten_parts(sample, data):
    path, whole, expected = sample
    place = data.draw(st.integers(0, len(whole) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=64))
    content = whole[:place] + patch + whole[place + len(patch) :]
    refused_or_harmless(path, content, expected)


# -- code --------------------------------------------------------------------


def _opcodes(marker):
    """Ways in which a pickle runs a command, byte by byte."""
    command = f'touch {marker}'.encode()
    text = b"S'" + command + b"'\n"
    short = b'\x8c' + bytes([len(command)]) + command
    system = b'c' + os.system.__module__.encode() + b'\nsystem\n'
    inst = b'i' + system[1:]
    return {
        'reduce': b'\x80\x02' + system + b'(' + text + b'tR.',
        'inst': b'(' + text + inst + b'.',
        'obj': b'(' + system + text + b'o.',
        'stack global': b'\x80\x04\x8c\x05posix\x8c\x06system\x93'
        + short
        + b'\x85R.',
        'build': b'\x80\x02}' + system + b'(' + text + b'tRb.',
        'in a key': b'\x80\x02}' + system + b'(' + text + b'tRK\x01s.',
        'persistent id': b'\x80\x02' + system + b'(' + text + b'tRQ.',
    }


def _in_zip(path, data):
    with io.BytesIO() as buffer:
        _pth(buffer)
        with zipfile.ZipFile(buffer) as whole:
            with zipfile.ZipFile(path, 'w') as archive:
                for name in whole.namelist():
                    inner = name.endswith('/data.pkl')
                    archive.writestr(name, data if inner else whole.read(name))


def _legacy(place):
    """Write a file of the old format, ``data`` instead of one of its parts."""

    def write(path, data):
        system = dict(
            protocol_version=PROTOCOL_VERSION,
            little_endian=True,
            type_sizes=dict(short=2, int=4, long=4),
        )
        parts = [MAGIC_NUMBER, PROTOCOL_VERSION, system, {'a': 1}, []]
        parts = [pickle.dumps(part, protocol=2) for part in parts]
        parts[place] = data
        path.write_bytes(b''.join(parts))

    return write


PLACES = {
    'bare': lambda path, data: path.write_bytes(data),
    'zip': _in_zip,
    **{
        f'legacy {name}': _legacy(place)
        for place, name in enumerate(
            ['magic', 'protocol', 'system', 'object', 'keys']
        )
    },
}


@pytest.mark.parametrize('name', _opcodes(''))
def test_no_opcode_runs_anywhere(tmp_path, name):
    marker = tmp_path / 'marker'
    data = _opcodes(marker)[name]
    for place, write in PLACES.items():
        path = tmp_path / f'{place}.pth'
        write(path, data)
        assert str(path) in refusal_of(path)
        assert not marker.exists(), place
    # It does run where a file is unpickled.
    unpickler = pickle.Unpickler(io.BytesIO(data))
    unpickler.persistent_load = str
    with suppress(Exception):
        unpickler.load()
    assert marker.exists()


# -- memory ------------------------------------------------------------------


def _safetensors(path, header, body=b'', length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack('<Q', length) + text + body)


def _entry(shape, *offsets, dtype='F32'):
    return dict(dtype=dtype, shape=shape, data_offsets=offsets)


HEADERS = {
    'two tensors in one place': dict(
        header=dict(a=_entry([4], 0, 16), b=_entry([4], 8, 24)),
        body=bytes(24),
    ),
    'a hole': dict(
        header=dict(a=_entry([4], 0, 16), b=_entry([4], 32, 48)),
        body=bytes(48),
    ),
    'more than the file': dict(
        header=dict(a=_entry([2**40], 0, 2**42)), body=bytes(16)
    ),
    'a product that overflows': dict(
        header=dict(a=_entry([2**33, 2**33], 0, 16)), body=bytes(16)
    ),
    'a negative length': dict(
        header=dict(a=_entry([-4], 0, 16)), body=bytes(16)
    ),
    'a header of a gigabyte': dict(header={}, length=2**30),
    'a header without end': dict(header={}, length=2**63),
    'a header of brackets': dict(header=b'{"a":' + b'[' * 10**5),
    'more bytes than tensors': dict(
        header=dict(a=_entry([4], 0, 16)), body=bytes(64)
    ),
    'an unknown type': dict(
        header=dict(a=_entry([4], 0, 16, dtype='X')), body=bytes(16)
    ),
    'metadata that are no text': dict(
        header=dict(__metadata__=dict(a=1), a=_entry([4], 0, 16)),
        body=bytes(16),
    ),
}


@pytest.mark.parametrize('name', HEADERS)
def test_headers_that_lie(tmp_path, name):
    path = tmp_path / 'a.safetensors'
    _safetensors(path, **HEADERS[name])
    assert 'cannot be read as a safetensors file' in refusal_of(path)


def _bomb(path):
    """A small archive of much that is nothing."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', pickle.dumps({'a': 1}, protocol=2))
        with archive.open('x/data/0', 'w') as record:
            for _ in range(200):
                record.write(bytes(2**20))


def _laughs(path):
    """A list of ten lists of ten lists..., each written once."""
    inner = [1] * 10
    for _ in range(40):
        inner = [inner] * 10
    torch.save({'a': torch.ones(1), 'b': inner}, path)


BIG = {
    'bomb': _bomb,
    'laughs': _laughs,
    'expanded': lambda path: torch.save(
        {'a': torch.ones(1).expand(2**20, 2**20)}, path
    ),
    'meta': lambda path: torch.save(
        {'a': torch.ones(2**20, 2**20, device='meta')}, path
    ),
    'bytes': lambda path: torch.save({'a': Payload(bytes, 2**31)}, path),
    'tensor by its size': lambda path: _in_zip(
        path, b'\x80\x02ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x04\x85R.'
    ),
    'gigabyte header': lambda path: _safetensors(path, {}, length=2**30),
}


def test_small_files_take_little_memory(tmp_path):
    for name, make in BIG.items():
        make(tmp_path / f'{name}.pth')
        assert (tmp_path / f'{name}.pth').stat().st_size < 2**20
    script = """
        import resource, sys
        from e3va_mm.weights import read_checkpoint
        from e3va_mm.errors import CheckpointError
        for path in sys.argv[1:]:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                read_checkpoint(path)
                result = 'read'
            except CheckpointError as error:
                result = 'refused'
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print('>', path, result, (after - before) // 1024, sep='|')
    """
    process = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(script)]
        + sorted(map(str, tmp_path.iterdir())),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    found = {}
    for line in process.stdout.splitlines():
        if line.startswith('>'):
            _, path, result, size = line.split('|')
            assert int(size) < 100, line
            found[Path(path).stem] = result
    assert found == dict.fromkeys(BIG, 'refused') | dict(laughs='read')


# -- weights that are none ---------------------------------------------------

ODD = {
    'sparse': (lambda w: w.to_sparse(), 'nested or sparse'),
    'csr': (lambda w: w.to_sparse_csr(), 'nested or sparse'),
    'quantised': (
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        'quantised',
    ),
    'meta': (lambda w: w.to('meta'), 'without numbers'),
    'whole numbers': (lambda w: w.int(), 'int32 in the file, float32 expec'),
    'bool': (lambda w: w.bool(), 'bool in the file, float32 expected'),
    'complex': (lambda w: w.cfloat(), 'complex64 in the file, float32'),
    'NaN': (lambda w: w.log(), 'NaN or infinity'),
    'infinity': (lambda w: w / 0, 'NaN or infinity'),
    'half infinite': (lambda w: (w * 1e30).half(), 'NaN or infinity'),
    'a list': (lambda w: w.tolist(), 'missing in the file'),
    'an array': (lambda w: w.numpy(), 'missing in the file'),
    'a dict': (lambda w: {'weight': w}, 'missing in the file'),
    'another shape': (lambda w: w[None], 'of another shape'),
}


def test_a_trunk_of_odd_weights_is_refused(tmp_path):
    weights = randomised(build_stock()).state_dict()
    key = 'stages.0.blocks.0.attn.w_msa.qkv.weight'
    path = tmp_path / 'trunk.pth'
    ours = build_e3va(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    for number, (change, text) in enumerate(ODD.values()):
        content = {**weights, key: change(weights[key])}
        torch.save(dict(state_dict=content) if number % 2 else content, path)
        found = refusal_of(path, lambda _: ours.init_weights())
        assert text in found and str(path) in found
        assert 'attn.w_msa.qkv.weight' in found
        assert same(dict(ours.state_dict()), before)


@pytest.mark.parametrize(
    'dtype', [torch.float64, torch.bfloat16, torch.float8_e4m3fn]
)
def test_other_floating_types_are_weights(dtype):
    found = {'a': torch.ones(3).to(dtype)}
    report = match_state({'a': torch.ones(3)}, found, what='x', source='y')
    assert report == 'x: all 1 tensors (0.0 M values) from y'


def test_a_sum_that_overflows_is_no_infinity():
    found = {'a': torch.full((4,), 3e38)}
    match_state({'a': torch.ones(4)}, found, what='x', source='y')


@pytest.mark.parametrize(
    'content, text',
    [
        (dict(state_dict=None), 'a NoneType under `state_dict`'),
        (dict(state_dict=[1]), 'a list under `state_dict`'),
        (dict(state_dict={1: torch.ones(2)}), 'under 1, which is no name'),
        ({('a',): torch.ones(2)}, "under ('a',), which is no name"),
        ([torch.ones(2)], 'holds a list without weights'),
        (torch.ones(2), 'holds a Tensor without weights'),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, text):
    torch.save(content, tmp_path / 'a.pth')
    assert text in refusal_of(tmp_path / 'a.pth')


def test_a_dict_that_holds_itself(tmp_path):
    content = {'a': torch.ones(2)}
    content['state_dict'] = content
    torch.save(content, tmp_path / 'a.pth')
    text = refusal_of(tmp_path / 'a.pth')
    assert 'a container that holds itself' in text


def test_an_attribute_hides_no_method_of_a_state_dict(tmp_path):
    class Hiding(dict):
        def __reduce__(self):
            from collections import OrderedDict

            hidden = dict(items=[], _metadata=dict(a=dict(version=2)))
            return OrderedDict, (), hidden, None, iter([('a', torch.ones(2))])

    torch.save(dict(state_dict=Hiding()), tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')['state_dict']
    assert [key for key, _ in found.items()] == ['a']
    assert found._metadata == dict(a=dict(version=2))


@pytest.mark.parametrize(
    'name, write',
    [
        ('a.npz', lambda path: np.savez(path, a=np.ones(3))),
        ('a.onnx', lambda path: path.write_bytes(b'\x08\x07\x12\x07pytorch')),
        ('a.json', lambda path: path.write_text('{"a": 1}')),
        ('a.safetensors.index.json', lambda path: path.write_text('{}')),
    ],
)
def test_files_of_other_kinds(tmp_path, name, write):
    write(tmp_path / name)
    assert str(tmp_path / name) in refusal_of(tmp_path / name)


def test_paths_that_are_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/zero', 'a\0b', '~nobody_here/a.pth'):
        refusal_of(path)
    assert 'File name too long' in refusal_of('a' * 5000)
    path = tmp_path / 'a.safetensors'
    path.write_bytes(save(state()))

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'open', refuse)
    for read in (read_checkpoint, read_adapter):
        text = refusal_of(path, read)
        assert f'{path} cannot be read: Permission denied' in text


# -- files of others, bent ---------------------------------------------------


def _vit(kind):
    state = getattr(test_vit_names, kind)()
    model = dict(
        type='e3va_mm.E3VAVisionTransformer',
        trunk_type='mmpretrain.VisionTransformer',
        arch=dict(test_vit_names.ARCH),
        img_size=test_vit_names.SIZE,
        patch_size=test_vit_names.PATCH,
        layer_scale_init_value=0.1 if kind == 'dinov2' else 0.0,
        side_path=dict(rank=4),
    )
    return state, lambda **kwargs: MODELS.build({**model, **kwargs})


def _swin():
    state = {
        key: value.long() if key.endswith('_index') else value
        for key, value in test_swin_names.official_swin().items()
    }
    return state, lambda **kwargs: build_e3va(
        embed_dims=test_swin_names.EMBED,
        depths=test_swin_names.DEPTHS,
        num_heads=test_swin_names.HEADS,
        window_size=test_swin_names.WINDOW,
        strides=(4, 2, 2),
        side_path=dict(rank=2),
        out_indices=(0,),
        **kwargs,
    )


FOREIGN = {
    'official Swin': _swin,
    'stock Swin': lambda: (
        randomised(build_stock()).state_dict(),
        build_e3va,
    ),
    'ViT': lambda: _vit('official'),
    'DINOv2': lambda: _vit('dinov2'),
    'MAE': lambda: _vit('mae'),
}
BENT = {
    'flat': lambda t: t.flatten(),
    'a number': lambda t: t.flatten()[0].clone(),
    'one more': lambda t: torch.cat([t, t[:1]]),
    'one less': lambda t: t[1:],
    'an axis more': lambda t: t[..., None],
    'empty': lambda t: t[:0],
    'bool': lambda t: t > 0,
    'NaN': lambda t: t * float('nan'),
}


@draws
@given(data=st.data(), kind=st.sampled_from([*FOREIGN]))
def test_bent_files_of_others(tmp_path_factory, data, kind):
    """Any tensor of another shape: a clear error, or it was not needed."""
    pytest.importorskip('mmpretrain')
    whole, build = FOREIGN[kind]()
    key = data.draw(st.sampled_from(sorted(whole)))
    change = data.draw(st.sampled_from([*BENT]))
    path = tmp_path_factory.getbasetemp() / f'{kind}.pth'
    torch.save({**whole, key: BENT[change](whole[key])}, path)
    ours = build(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    try:
        ours.init_weights()
    except CheckpointError as error:
        assert str(path) in str(error)
    for name, value in ours.state_dict().items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize('kind', FOREIGN)
def test_whole_files_of_others(tmp_path, kind):
    pytest.importorskip('mmpretrain')
    whole, build = FOREIGN[kind]()
    path = tmp_path / 'whole.pth'
    torch.save(whole, path)
    ours = build(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    ours.init_weights()
    assert ours.trunk_source.startswith(str(path))
