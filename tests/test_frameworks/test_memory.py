"""Memory that was freed is used again."""

import ctypes
import subprocess
import sys

import pytest

from e3va_mm.frameworks import memory
from e3va_mm.frameworks.memory import keep_freed_memory

# Pages that the system has to bring for the second of two equal blocks.
SCRIPT = """
import ctypes, resource, sys
from e3va_mm.frameworks.memory import keep_freed_memory

libc, size = ctypes.CDLL(None), ctypes.c_size_t(2**26)
libc.malloc.restype = ctypes.c_void_p


def use():
    block = ctypes.c_void_p(libc.malloc(size))
    libc.memset(block, 1, size)
    libc.free(block)


if sys.argv[1] == 'keep':
    assert keep_freed_memory()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(what):
    run = [sys.executable, '-c', SCRIPT, what]
    return int(subprocess.run(run, capture_output=True, check=True).stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), 'mallopt') or sys.platform != 'linux',
    reason='needs glibc',
)
def test_the_second_block_takes_the_place_of_the_first():
    assert pages('leave') > 10  # of 2 MiB at most
    assert pages('keep') < 5


def test_nothing_happens_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(memory, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(ctypes, 'CDLL', None)
    assert not keep_freed_memory()


@pytest.mark.parametrize('error', [AttributeError, OSError, TypeError])
def test_nor_with_another_c_library(error, monkeypatch):
    def missing(name):
        raise error

    monkeypatch.setattr(memory, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(ctypes, 'CDLL', missing)
    assert not keep_freed_memory()
