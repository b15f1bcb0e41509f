import pickle
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.test_weights.hostile import touch
from tests.test_weights.samples import saved_bytes, weights
from tests.test_weights.toy_runner import toy_runner


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A Runner that trained two epochs, and its work folder."""
    folder = tmp_path_factory.mktemp('trained')
    runner = toy_runner(folder, 2)
    runner.train()
    return runner, folder


@pytest.fixture
def server():
    """Serves `files` on 127.0.0.1; `asked` lists the paths asked for."""
    good = saved_bytes(weights())

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
        'hostile.pth': pickle.dumps(touch('x'), protocol=2),
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
