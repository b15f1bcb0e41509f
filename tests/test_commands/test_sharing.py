"""Adapter files go to a hub and come back: one of this process."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from mmengine.config import Config

from e3va_mm.commands import adapter, infer
from e3va_mm.errors import ConfigError
from e3va_mm.utils.configs import literal_config
from e3va_mm.weights import read_adapter, read_checkpoint

hub = pytest.importorskip('huggingface_hub')
constants = pytest.importorskip('huggingface_hub.constants')
COMMIT = '0' * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as uploads and downloads of small files need."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path.startswith('/api/repos/create'):
            asked = json.loads(body)
            name = '/'.join(
                filter(None, (asked.get('organization'), asked['name']))
            )
            self.server.made[name] = asked
            return self.reply(dict(url=f'{self.server.url}/{name}', name=name))
        if '/preupload/' in self.path:
            files = json.loads(body)['files']
            kind = dict(uploadMode='regular', shouldIgnore=False)
            return self.reply(
                dict(files=[dict(kind, path=f['path']) for f in files])
            )
        if '/commit/' in self.path:
            for line in body.splitlines():
                row = json.loads(line)
                if row['key'] == 'file':
                    content = base64.b64decode(row['value']['content'])
                    self.server.files[row['value']['path']] = content
            url = f'{self.server.url}/org/name/commit/{COMMIT}'
            return self.reply(dict(commitUrl=url, commitOid=COMMIT))
        return self.reply(dict(errors=[], warnings=[]))  # of the card

    def do_GET(self):
        if '/resolve/' in self.path:
            name = self.path.rpartition('/')[2].partition('?')[0]
            found = self.server.files.get(name)
            if found is None:
                return self.reply({}, 404, {'X-Error-Code': 'EntryNotFound'})
            etag = hashlib.sha1(found).hexdigest()
            return self.reply(
                found, 200, {'ETag': f'"{etag}"', 'X-Repo-Commit': COMMIT}
            )
        if '/tree/' in self.path:
            return self.reply(
                [
                    dict(type='file', path=name, size=len(each), oid=COMMIT)
                    for name, each in self.server.files.items()
                ]
            )
        siblings = [dict(rfilename=name) for name in self.server.files]
        return self.reply(dict(id='org/name', sha=COMMIT, siblings=siblings))

    do_HEAD = do_GET

    def reply(self, content, code=200, headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(code)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.url = f'http://127.0.0.1:{server.server_port}'
    server.files, server.made = {}, {}
    for name, value in dict(
        ENDPOINT=server.url,
        HUGGINGFACE_CO_URL_TEMPLATE=server.url
        + '/{repo_id}/resolve/{revision}/{filename}',
        HF_HUB_CACHE=str(tmp_path / 'cache'),
        HF_HUB_OFFLINE=False,
    ).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv('HF_TOKEN', 'hf_of_a_test')
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_push_pull_and_infer(detector, server, tmp_path, capsys):
    metrics = tmp_path / 'metrics.json'
    metrics.write_text('{"coco/bbox_mAP": 0.25}')
    push = ['push', detector.adapter, 'org/name', '--metrics', str(metrics)]
    assert adapter.main([*push, '--private']) == 0
    assert COMMIT in capsys.readouterr().out
    assert server.made['org/name']['name'] == 'name'
    with open(detector.adapter, 'rb') as file:
        assert server.files['adapter.safetensors'] == file.read()
    local = read_adapter(detector.adapter)
    assert server.files['config.py'].decode() == local.config
    card = hub.ModelCard(server.files['README.md'].decode())
    assert card.data.library_name == 'e3va_mm'
    assert card.data.pipeline_tag == 'object-detection'
    (figure,) = card.data.eval_results
    assert (figure.metric_type, figure.metric_value) == ('coco/bbox_mAP', 0.25)
    for text in (
        local.trunks['backbone.'].fingerprint,
        'all of a CascadeRCNN',
        'tuner E3VA',
        'cat, dog, bird',
        '| coco/bbox_mAP | 0.25 |',
        '--adapter hf://org/name',
        'the file trunk.safetensors',
    ):
        assert text in card.text
    assert str(tmp_path) not in card.text  # no folder of one's own machine

    out = tmp_path / 'pulled.safetensors'
    assert adapter.main(['pull', 'org/name', str(out)]) == 0
    with open(detector.adapter, 'rb') as file:
        assert out.read_bytes() == file.read()

    # Wherever a checkpoint is.
    shared = read_checkpoint('hf://org/name')['state_dict']
    assert set(local.tensors) < set(shared)

    found = tmp_path / 'found'
    arguments = [detector.image, '--out', str(found), '--no-draw']
    assert infer.main([*arguments, '--adapter', 'hf://org/name']) == 0
    (written,) = (found / 'name' / 'preds').iterdir()
    assert json.loads(written.read_text())['scores']


def test_what_is_not_shared(detector, server, tmp_path, error):
    stripped = tmp_path / 'stripped.safetensors'
    adapter.main(['strip', detector.adapter, str(stripped)])
    assert 'but holds less' in error(adapter, 'push', stripped, 'org/name')
    out = tmp_path / 'out.safetensors'
    text = error(adapter, 'pull', 'org/none', out)
    assert 'hf://org/none/adapter.safetensors cannot be fetched' in text
    metrics = tmp_path / 'metrics.json'
    metrics.write_text('{"a": "b"}')
    push = 'push', detector.adapter, 'org/name', '--metrics', metrics
    assert 'should be a JSON file of numbers' in error(adapter, *push)
    assert not server.files


def test_a_config_of_others_is_read_and_not_run():
    config = Config(
        dict(model=dict(a=[1, (2, 3)], b={'a b': -1.5}), c=None, d='x')
    )
    read = literal_config(config.pretty_text, 'a file')
    assert read.to_dict() == config.to_dict()
    for text in (
        "a = __import__('os').system('true')",
        'import os',
        'a = dict([(1, 2)])',
        'a.b = 1',
        'a = [x for x in (1, 2)]',
    ):
        with pytest.raises(ConfigError, match='The config in a file should'):
            literal_config(text, 'a file')
