"""What is installed, gathered without importing any of it here.

Everything may be missing or broken: it is tried in processes of its own.
"""

import importlib.util
import json
import mmap
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from e3va_mm.frameworks.distributions import DISTRIBUTIONS, installed

OTHERS = {
    'e3va_mm': ('e3va-mm',),
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'numpy': ('numpy',),
    'cv2': ('opencv-python-headless', 'opencv-python'),
    'setuptools': ('setuptools',),
    'timm': ('timm',),
    'transformers': ('transformers',),
    'imaug': ('imaug',),
}


@dataclass(frozen=True)
class Snapshot:
    """An environment, as far as the checks look at it.

    Args:
        python (str): Version of the interpreter.
        distributions (dict[str, str]): Version by name of what is installed.
        modules (frozenset[str]): Names of the packages that can be found.
        failures (dict[str, str]): By name of a module, the last line of the
            error that its import ended with.
        torch_cuda (str): CUDA version of torch; empty in a build for CPUs.
        torch_archs (tuple[str, ...]): What torch was compiled for.
        devices (dict[str, str]): By name of a GPU, its architecture as
            `sm_90`.
        ops (bool): Whether mmcv has compiled operators.
        ops_archs (tuple[str, ...]): What they were compiled for: `sm_90` for
            machine code, `compute_90` for PTX; empty for CPUs alone.
    """

    python: str = platform.python_version()
    distributions: dict = field(default_factory=dict)
    modules: frozenset = frozenset()
    failures: dict = field(default_factory=dict)
    torch_cuda: str = ''
    torch_archs: tuple = ()
    devices: dict = field(default_factory=dict)
    ops: bool = False
    ops_archs: tuple = ()

    def of(self, package: str) -> dict[str, str]:
        """Find the installed distributions of a package and their versions."""
        names = {**DISTRIBUTIONS, **OTHERS}[package]
        return {
            name: self.distributions[name]
            for name in names
            if name in self.distributions
        }

    def version(self, package: str) -> tuple[int, ...]:
        """Read a package's version; empty, the lowest, if it is missing."""
        versions = list(self.of(package).values())
        return numbers(versions[0]) if versions else ()

    @property
    def originals(self) -> list[str]:
        """The dormant distributions that are installed."""
        return [
            name
            for package in DISTRIBUTIONS
            for name in self.of(package)
            if not name.startswith('onedl-')
        ]

    def failing(self, *texts: str) -> list[str]:
        """List the modules whose import fails with one of these texts."""
        return [
            name
            for name, line in self.failures.items()
            if any(text in line for text in texts)
        ]


def numbers(version: str) -> tuple[int, ...]:
    """Read `2.13.0+cpu` as (2, 13, 0)."""
    return tuple(map(int, re.findall(r'\d+', version.partition('+')[0])[:3]))


_TORCH = """
import json, torch
devices, archs = {}, []
if torch.cuda.is_available():
    archs = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        name = f'{torch.cuda.get_device_name(i)} ({i})'
        devices[name] = 'sm_%d%d' % torch.cuda.get_device_capability(i)
print(json.dumps([torch.version.cuda or '', archs, devices]))
"""
_OPS = """
import torch
from mmcv.ops import nms
for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    nms(torch.tensor([[0., 0., 8., 8.]], device=device),
        torch.ones(1, device=device), 0.5)
"""
# As our tools import the frameworks, wherever the package can be imported.
_FRAMEWORK = """
try:
    import e3va_mm.registry
except Exception:
    pass
import {}
"""
_PROBES = {
    'torch': _TORCH,
    'mmcv.ops': _OPS,
    **{name: f'import {name}' for name in ('cv2', 'torchvision')},
    **{
        name: _FRAMEWORK.format(name)
        for name in ('mmdet.apis', 'mmseg.apis', 'mmpretrain.models')
    },
}


def findable(packages: Iterable[str]) -> frozenset[str]:
    """Say which packages can be found, without importing them."""
    found = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        # Without an __init__.py it is a folder that was left behind.
        if spec is not None and spec.origin is not None:
            found.add(package)
    return frozenset(found)


def cuda_archs(library: Path) -> tuple[str, ...]:
    """List what a shared library holds CUDA code for.

    Reads the headers of the fat binaries in it: each entry tells whether it
    is machine code or PTX, and for which architecture.

    Args:
        library (Path): A file, such as `mmcv/_ext.so`.

    Returns:
        tuple[str, ...]: Such as `('sm_80', 'sm_90', 'compute_90')`; empty if
        there is no CUDA code.
    """
    kinds = {1: 'compute', 2: 'sm'}
    magic = bytes.fromhex('50ed55ba')
    found = set()
    with (
        open(library, 'rb') as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        at = data.find(magic)
        while 0 <= at <= len(data) - 16:
            version, header, size = struct.unpack_from('<HHQ', data, at + 4)
            end = at + header + size
            if (version, header) != (1, 16) or end > len(data):
                at = data.find(magic, at + 4)
                continue
            entry = at + header
            while entry + 32 <= end:
                kind, _, head, body = struct.unpack_from('<HHIQ', data, entry)
                (arch,) = struct.unpack_from('<I', data, entry + 28)
                if kind in kinds:
                    found.add((kind == 1, arch, f'{kinds[kind]}_{arch}'))
                entry += max(head + body, 1)
            at = data.find(magic, end)
    return tuple(name for *_, name in sorted(found))


def _probe(codes: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Run each piece of code in a process of its own, all at once.

    Returns:
        tuple[dict[str, str], dict[str, str]]: What those that went well
        printed, and the last line of the errors of the others.
    """
    processes = {
        name: subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, code in codes.items()
    }
    outputs, failures = {}, {}
    for name, process in processes.items():
        out, error = process.communicate()
        if process.returncode == 0:
            outputs[name] = out
        else:
            lines = error.strip().splitlines()
            failures[name] = (
                lines[-1] if lines else f'exit status {process.returncode}'
            )
    return outputs, failures


def look() -> Snapshot:
    """Take a snapshot of the environment of this interpreter."""
    names = {**DISTRIBUTIONS, **OTHERS}
    modules = findable(names)
    outputs, failures = _probe(
        {
            name: code
            for name, code in _PROBES.items()
            if name.partition('.')[0] in modules
        }
    )
    cuda, archs, devices = '', (), {}
    if 'torch' in outputs:
        cuda, archs, devices = json.loads(outputs['torch'].splitlines()[-1])
    libraries = []
    if 'mmcv' in modules:
        folder = Path(importlib.util.find_spec('mmcv').origin).parent
        libraries = [*folder.glob('_ext*.so'), *folder.glob('_ext*.pyd')]
    return Snapshot(
        distributions=installed(n for row in names.values() for n in row),
        modules=modules,
        failures=failures,
        torch_cuda=cuda,
        torch_archs=tuple(archs),
        devices=devices,
        ops=bool(libraries),
        ops_archs=cuda_archs(libraries[0]) if libraries else (),
    )
