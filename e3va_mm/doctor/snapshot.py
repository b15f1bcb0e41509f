"""What is installed, tried in processes of its own: all of it may fail."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from e3va_mm.frameworks.distributions import DISTRIBUTIONS, installed

PACKAGES = {
    'e3va_mm': ('e3va-mm',),
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'numpy': ('numpy',),
    'cv2': ('opencv-python-headless', 'opencv-python'),
    'setuptools': ('setuptools',),
    'timm': ('timm',),
    'transformers': ('transformers',),
    **DISTRIBUTIONS,
}
# As our tools import the frameworks, also in a clone that is not installed.
FRAMEWORK = f"""
import sys
sys.path.append({str(Path(__file__).parents[2])!r})
try:
    import e3va_mm.checkpoint
except Exception:
    pass
import """
PROBES = {
    'torch': """
import json, torch
devices = {}
for i in range(torch.cuda.device_count()):
    name = f'{torch.cuda.get_device_name(i)} ({i})'
    devices[name] = '%d.%d' % torch.cuda.get_device_capability(i)
print(json.dumps([torch.version.cuda or '', devices]))
""",
    'mmcv.ops': """
import torch
from mmcv.ops import nms
for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    nms(torch.tensor([[0., 0., 8., 8.]], device=device),
        torch.ones(1, device=device), 0.5)
""",
    'cv2': 'import cv2',
    'torchvision': 'import torchvision',
    'mmdet.apis': FRAMEWORK + 'mmdet.apis',
    'mmseg.apis': FRAMEWORK + 'mmseg.apis',
    'mmpretrain.models': FRAMEWORK + 'mmpretrain.models',
}


@dataclass(frozen=True)
class Snapshot:
    """An environment, as far as the checks look at it.

    Args:
        distributions (dict[str, str]): Version by name of what is installed.
        modules (frozenset[str]): Packages that can be found.
        failures (dict[str, str]): Last line of the error by failing probe.
        cuda (str): CUDA version of torch; empty in a build for CPUs.
        devices (dict[str, str]): Compute capability by name of a GPU.
    """

    distributions: dict = field(default_factory=dict)
    modules: frozenset = frozenset()
    failures: dict = field(default_factory=dict)
    cuda: str = ''
    devices: dict = field(default_factory=dict)

    def of(self, package: str) -> dict[str, str]:
        """Installed distributions of a package and their versions."""
        names = [n for n in PACKAGES[package] if n in self.distributions]
        return {name: self.distributions[name] for name in names}

    def version(self, package: str) -> tuple[int, ...]:
        """Read `2.13.0+cpu` as (2, 13, 0); empty, the lowest, if missing."""
        first = next(iter(self.of(package).values()), '')
        return tuple(map(int, re.findall(r'\d+', first.partition('+')[0])[:3]))

    def failing(self, text: str) -> list[str]:
        """Probes that end with this text."""
        return [name for name, line in self.failures.items() if text in line]


def findable(packages) -> frozenset[str]:
    """Packages that can be found, which is said without importing them."""
    specs = {package: find_spec(package) for package in packages}
    # Without an __init__.py it is a folder that was left behind.
    return frozenset(n for n, spec in specs.items() if spec and spec.origin)


def probe(codes: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Run pieces of code at once: outputs, and last lines of errors."""
    command = [sys.executable, '-W', 'ignore', '-c']
    with ThreadPoolExecutor() as pool:
        ended = pool.map(
            lambda code: subprocess.run(
                [*command, code], capture_output=True, text=True
            ),
            codes.values(),
        )
        outputs, failures = {}, {}
        for name, process in zip(codes, ended, strict=True):
            status = f'exit status {process.returncode}'
            if process.returncode == 0:
                outputs[name] = process.stdout
            else:
                lines = process.stderr.strip().splitlines()
                failures[name] = [status, *lines][-1]
    return outputs, failures


def look() -> Snapshot:
    """Take a snapshot of the environment of this interpreter."""
    modules = findable(PACKAGES)
    there = {k: v for k, v in PROBES.items() if k.split('.')[0] in modules}
    outputs, failures = probe(there)
    cuda, devices = '', {}
    if 'torch' in outputs:
        cuda, devices = json.loads(outputs['torch'].splitlines()[-1])
    names = [name for row in PACKAGES.values() for name in row]
    return Snapshot(installed(names), modules, failures, cuda, devices)
