import os
import subprocess
import sys
import textwrap

import pytest
import torch

from e3va_mm.weights import read_checkpoint
from tests.test_weights.samples import refusal_of, saved_bytes, weights


def test_a_url_is_downloaded_once_to_the_cache_of_torch_hub(server, cache):
    url = server.url('a.pth') + '?download=1'
    for _ in range(2):
        assert torch.equal(read_checkpoint(url)['weight'], weights()['weight'])
    assert server.asked == ['a.pth']
    assert [path.name for path in cache.iterdir()] == ['a.pth']


def test_files_of_one_name_are_not_mixed_up(server, cache):
    """Such as model.safetensors; the second has its URL in the name."""
    server.files['of/b/a.pth'] = saved_bytes(dict(another=torch.ones(2)))
    one, other = server.url('a.pth'), server.url('of/b/a.pth')
    for _ in range(2):
        assert 'weight' in read_checkpoint(one)
        assert 'another' in read_checkpoint(other)
    assert server.asked == ['a.pth', 'of/b/a.pth']
    assert (cache / 'a.pth').is_file() and len([*cache.iterdir()]) == 2


def test_a_hash_in_the_name_is_compared(server, cache):
    for name in ('right-', 'dated-'):
        name = next(n for n in server.files if n.startswith(name))
        assert 'weight' in read_checkpoint(server.url(name))
    text = refusal_of(server.url('wrong-0123abcd.pth'))
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
    refusal = refusal_of(url)
    assert refusal.startswith(url) and text in refusal
    if name == 'none.pth':
        assert 'Download it by hand and set `init_cfg.checkpoint`' in refusal
        assert str(cache / name) in refusal
    assert list(cache.iterdir()) == []


def test_a_server_that_is_not_there(cache):
    assert 'cannot be downloaded: ' in refusal_of('http://127.0.0.1:9/a.pth')


def test_a_damaged_copy_in_the_cache_says_what_to_delete(server, cache):
    cache.mkdir(parents=True)
    (cache / 'a.pth').write_bytes(b'PK\x03\x04')
    text = refusal_of(server.url('a.pth'))
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
        from e3va_mm.weights import read_checkpoint
        from e3va_mm.errors import CheckpointError
        dist.barrier()  # both begin now, whatever the imports took
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
            env=os.environ | dict(LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert 'HTTP Error 404' in outputs[0][0]
    assert "by this machine's first process" in outputs[1][0]
    assert server.asked == ['a.pth', 'none.pth']
