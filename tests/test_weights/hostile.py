"""Files that run a command wherever they are unpickled."""

import io
import os
import pickle
import tarfile

from tests.test_weights.samples import saved, weights


class Payload:
    """Runs `function` with `args` wherever it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) + ((state,) if state else ())

    def __reduce__(self):
        return self.call


def touch(marker):
    return Payload(os.system, f'touch {marker}')


def _in_tar(path, payload):
    data = pickle.dumps(payload, protocol=2)
    with tarfile.open(path, 'w') as archive:
        for name in ('sys_info', 'pickle', 'tensors', 'storages'):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


FORMS = {
    'in_state_dict': lambda path, payload: saved(
        path, {'state_dict': {**weights(), 'x': payload}}
    ),
    'in_meta': lambda path, payload: saved(
        path, {'meta': {'cfg': payload}, 'state_dict': weights()}
    ),
    'legacy': lambda path, payload: saved(
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
