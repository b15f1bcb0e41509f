"""What cannot work together, and the command that mends it."""

from collections.abc import Iterator
from typing import NamedTuple

from e3va_mm.doctor.snapshot import Snapshot
from e3va_mm.frameworks import distributions

INSTALL = 'pip install --no-build-isolation'
REINSTALL = f'{INSTALL} --force-reinstall --no-deps'
HEADLESS = "pip install --force-reinstall 'opencv-python-headless<4.13'"
NO_OPERATORS = 'torchvision::nms does not exist'
# Package to what comes of its absence, and the command that installs it.
ABSENT = {
    'torch': (
        'torch is not installed. It comes first: the operators of mmcv are '
        'compiled against it.',
        "pip install 'torch>=2.6' 'setuptools<81' wheel ninja",
    ),
    'mmengine': distributions.MISSING,
    'mmcv': (
        'mmcv is not installed. Where no wheel fits this Python and torch, '
        'pip compiles it, which takes some 15 minutes on two cores; -v shows '
        'progress.',
        f'{INSTALL} onedl-mmcv -v',
    ),
    'cv2': (
        'OpenCV is not installed; onedl-mmengine does not ask for it.',
        HEADLESS,
    ),
}
# Text of an import's error to what it means, and the command that mends it.
# {rebuild} compiles the operators of mmcv.
ERRORS = {
    'pkg_resources': (
        'setuptools has had no pkg_resources since version 82, which mmcv '
        'needs to be built and the original mmengine to be used.',
        "pip install 'setuptools<81'",
    ),
    'is used but incompatible. Please install mmcv': (
        'The original mmdet and mmsegmentation refuse mmcv from 2.2.0 on. '
        'Their maintained successors do not.',
        'pip uninstall -y mmdet mmsegmentation && '
        f'{INSTALL} onedl-mmdetection onedl-mmsegmentation',
    ),
    'libGL.so': (
        'OpenCV looks for libGL, which machines without a display lack. The '
        'headless build does not.',
        f'{HEADLESS} --no-deps',
    ),
    'NoneType takes no arguments': (
        'mmpretrain, and mmdet, which imports it, use what transformers 5 '
        'has dropped. 4.57 works.',
        "pip install 'transformers<5'",
    ),
    'mmcv._ext': (
        'mmcv has no compiled operators: mmcv-lite has none, and built in '
        'isolation the setup of mmcv finds no torch and leaves them out.',
        '{rebuild}',
    ),
    'undefined symbol': (
        'The operators of mmcv were compiled for another torch.',
        '{rebuild}',
    ),
    'implementation for device cuda': (
        'torch uses a GPU, but the operators of mmcv were compiled for CPUs '
        'alone: training would end in nms at its first step.',
        '{rebuild}',
    ),
    'no kernel image': (
        'torch or the operators of mmcv were compiled for other GPUs. Take a '
        'build of torch for this one, then compile mmcv again.',
        'pip install --upgrade torch && {rebuild}',
    ),
}


class Problem(NamedTuple):
    """What is wrong, the command that mends it, whether it blocks all use."""

    what: str
    mend: str
    blocks: bool = True


def doubled(seen: Snapshot) -> Iterator[Problem]:
    """Frameworks from two distributions, whose files are a mixture."""
    problem = distributions.doubled(seen.distributions)
    if problem:
        yield Problem(*problem)


def absent(seen: Snapshot) -> Iterator[Problem]:
    """Packages that are missing, or whose files another took along."""
    tasks = [p for p in ('mmdet', 'mmseg') if p in seen.modules or seen.of(p)]
    if not tasks:
        yield Problem(
            'Neither mmdet nor mmseg is installed: there is nothing to put a '
            'backbone into. One will do, or both.',
            f'{INSTALL} onedl-mmdetection onedl-mmsegmentation',
        )
    for package in (*ABSENT, *tasks):
        if package in seen.modules:
            continue
        if not seen.of(package):
            yield Problem(*ABSENT[package])
            continue
        name, version = next(iter(seen.of(package).items()))
        yield Problem(
            f'{name} {version} counts as installed, but its files are gone, '
            'as happens when another distribution of the same package is '
            'uninstalled.',
            f'{REINSTALL} {name}=={version}',
        )


def unfit_versions(seen: Snapshot) -> Iterator[Problem]:
    """A torch below 2.6, a setuptools that cannot build mmcv."""
    found = seen.of('torch')
    if found and seen.version('torch') < (2, 6):
        yield Problem(
            f'e3va_mm needs torch 2.6 or newer, and {found["torch"]} is '
            'installed. Compile the operators of mmcv again for the new one.',
            "pip install --upgrade 'torch>=2.6'",
        )
    if 'mmcv' not in seen.modules and seen.version('setuptools') >= (82,):
        yield Problem(*ERRORS['pkg_resources'])


def torchvision(seen: Snapshot) -> Iterator[Problem]:
    """A torchvision built for another torch, which may be in nobody's way."""
    failing = seen.failing(NO_OPERATORS)
    if failing:
        build = '' if seen.cuda else '+cpu'
        yield Problem(
            'torchvision was built for another torch. The tools of e3va_mm do '
            "without its operators; the frameworks' own end in operator "
            f'{NO_OPERATORS} where timm or mmpretrain is installed.',
            f'{REINSTALL} torchvision==0.{seen.version("torch")[1] + 15}.0'
            f'{build}',
            blocks=failing != ['torchvision'],
        )


def known_errors(seen: Snapshot) -> Iterator[Problem]:
    """Imports that end with an error that is known."""
    for text, (what, mend) in ERRORS.items():
        if seen.failing(text):
            yield Problem(what, mend.format(rebuild=rebuild(seen)))


def not_installed(seen: Snapshot) -> Iterator[Problem]:
    """A clone that runs uninstalled, which other tools do not see."""
    if not seen.of('e3va_mm'):
        yield Problem(
            'e3va_mm is not installed. The tools of this repository do not '
            "need that, but the frameworks' own would say that "
            'E3VASwinTransformer is not in the registry.',
            f'{INSTALL} --no-deps -e .',
            blocks=False,
        )


def rebuild(seen: Snapshot) -> str:
    """The command that compiles mmcv's operators for this machine."""
    found = seen.of('mmcv') or {'onedl-mmcv': '2.3.6'}
    name, version = next(iter(found.items()))
    start = 'MMCV_WITH_OPS=1'
    if seen.devices:
        archs = ';'.join(sorted(set(seen.devices.values())))
        start += f" FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='{archs}'"
    if name == 'mmcv-lite':
        start = f'pip uninstall -y mmcv-lite && {start}'
        name, version = 'onedl-mmcv', '2.3.6'
    pin = f'--no-binary {name} {name}=={version}'
    return f'{start} {REINSTALL} --no-cache-dir {pin}'


# In the order in which they are best mended.
CHECKS = (
    doubled,
    unfit_versions,
    absent,
    known_errors,
    torchvision,
    not_installed,
)


def diagnose(seen: Snapshot) -> list[Problem]:
    """List what is wrong with an environment.

    A failing import is reported as such only where nothing else explains it.
    """
    problems = [p for check in CHECKS for p in check(seen)]
    if any(problem.blocks for problem in problems):
        return problems
    for module, line in seen.failures.items():
        if NO_OPERATORS not in line:
            package = module.partition('.')[0]
            pins = [f'{name}=={v}' for name, v in seen.of(package).items()]
            mend = ' '.join([REINSTALL, *(pins or [package])])
            problems.append(Problem(f'import {module} fails: {line}', mend))
    return problems
