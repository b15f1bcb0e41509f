import importlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler
from torch import nn

from e3va_mm.weights import read_checkpoint
from tests.test_weights.hostile import FORMS, Payload, touch
from tests.test_weights.samples import refusal_of, saved


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


def test_numpy_values_under_the_names_of_both_major_versions(tmp_path):
    content = {
        'values': [np.float32(1.5), np.int64(-2), np.bool_(True)],
        'nested': (np.arange(6, dtype='>i4').reshape(2, 3), {'a': [3]}),
        'fortran': np.asfortranarray(np.random.rand(3, 4)),
        'empty': np.zeros((0, 3)),
        'text': np.array(['dog', 'zebra']),
        'weight': torch.ones(2),
    }
    path = saved(
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


@pytest.mark.parametrize('form', FORMS)
def test_a_hostile_file_is_refused_and_does_not_run(tmp_path, form):
    marker, path = tmp_path / 'marker', tmp_path / 'model.pth'
    FORMS[form](path, touch(marker))
    text = refusal_of(path)
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
        (lambda m: _history(touch(m)), 'names posix.system'),
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
def test_what_is_not_on_the_list_is_named(tmp_path, make, text):
    marker = str(tmp_path / 'marker')
    path = saved(tmp_path / 'a.pth', {'x': make(marker)})
    assert text in refusal_of(path)
    assert not os.path.exists(marker)


def test_a_file_cannot_replace_the_statistics_of_history_buffers(tmp_path):
    path = saved(tmp_path / 'a.pth', {'x': _history('poison')})
    methods = dict(HistoryBuffer._statistics_methods)
    assert read_checkpoint(path)['x'].statistics('mean') == 1
    assert HistoryBuffer._statistics_methods == methods


def test_the_list_of_other_packages_does_not_count(tmp_path):
    path = saved(tmp_path / 'a.pth', {'x': nn.Linear(1, 1)})
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([nn.Linear]):
        assert 'names torch.nn.modules.linear.Linear' in refusal_of(path)
        after = torch.serialization.get_safe_globals()
        assert set(after) == {*before, nn.Linear}
        read_checkpoint(saved(path))
        assert set(torch.serialization.get_safe_globals()) == set(after)


def test_threads_read_at_once(tmp_path):
    before = torch.serialization.get_safe_globals()
    path = saved(tmp_path / 'a.pth', dict(weight=np.float64(3.5)))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read_checkpoint, [path] * 40):
            assert found['weight'] == 3.5
    assert torch.serialization.get_safe_globals() == before


def test_data_of_a_numpy_array_must_have_its_size(tmp_path):
    array = np.arange(4.0)
    function, args, state = array.__reduce__()
    for data in (state[4][:-8], state[4] + b'\0' * 8):
        value = Payload(function, *args, state=(*state[:4], data))
        path = saved(tmp_path / 'a.pth', {'x': value})
        assert 'cannot be read as a checkpoint' in refusal_of(path)
