"""What cannot work together, and the line that mends it.

Each check is a function that reads a snapshot and yields problems; `CHECKS`
lists them in the order in which they are best mended.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from e3va_mm.doctor.snapshot import DISTRIBUTIONS, Snapshot, numbers

# How importing torchvision ends where its library does not load.
NO_OPERATORS = 'torchvision::nms does not exist'


@dataclass(frozen=True)
class Problem:
    """Something that cannot work.

    Args:
        what (str): What is wrong, and what comes of it.
        mend (str): The command line that mends it.
        blocks (bool): Whether the environment is unfit because of it.
            Defaults to True.
    """

    what: str
    mend: str
    blocks: bool = True


def _install(*requirements: str) -> str:
    """Write the command that installs something which may be compiled."""
    quoted = [f"'{r}'" if re.search(r'[<>\[]', r) else r for r in requirements]
    return f'pip install --no-build-isolation {" ".join(quoted)}'


def _rebuild(seen: Snapshot) -> str:
    """Write the command that compiles mmcv's operators for this machine."""
    found = seen.of('mmcv') or {'onedl-mmcv': '2.3.6'}
    name, version = next(iter(found.items()))
    name = name.removesuffix('-lite')
    variables = 'MMCV_WITH_OPS=1'
    if seen.devices:
        archs = sorted({_capability(arch) for arch in seen.devices.values()})
        listed = ';'.join(f'{major}.{minor}' for major, minor in archs)
        variables += f" FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='{listed}'"
    return (
        f'{variables} pip install --no-build-isolation --no-cache-dir '
        f'--force-reinstall --no-deps --no-binary {name} {name}=={version}'
    )


def _to_maintained(seen: Snapshot) -> str:
    """Write the command that replaces the originals by their successors."""
    kept = [
        names[0]
        for package, names in DISTRIBUTIONS.items()
        if seen.of(package)
    ]
    return f'pip uninstall -y {" ".join(seen.originals)} && {_install(*kept)}'


def _capability(arch: str) -> tuple[int, int]:
    """Read `sm_86` or `compute_86` as (8, 6)."""
    return divmod(int(re.search(r'\d+', arch).group()), 10)


def serves(archs: Iterable[str], device: str) -> bool:
    """Say whether code compiled for ``archs`` runs on a GPU.

    Machine code runs on GPUs of its generation that are not older; PTX on all
    that are not older.

    Args:
        archs (Iterable[str]): Such as `sm_80`, or `compute_80` for PTX.
        device (str): Such as `sm_86`.
    """
    wanted = _capability(device)
    return any(
        _capability(arch) <= wanted
        and (arch.startswith('compute') or _capability(arch)[0] == wanted[0])
        for arch in archs
    )


# -- the checks: Snapshot -> Problems -----------------------------------------


def doubled(seen: Snapshot) -> Iterator[Problem]:
    """Find frameworks from two distributions, whose files are a mixture."""
    clashes = {p: seen.of(p) for p in DISTRIBUTIONS if len(seen.of(p)) > 1}
    if clashes:
        both = {
            package: ' and '.join(f'{n} {v}' for n, v in found.items())
            for package, found in clashes.items()
        }
        names = [name for found in clashes.values() for name in found]
        kept = [next(iter(found)) for found in clashes.values()]
        yield Problem(
            'Each framework should be installed from one distribution, but '
            'these come from several, which overwrite each other: '
            + '; '.join(f'{p} from {text}' for p, text in both.items())
            + '. Remove them all, then install one of each again.',
            f'pip uninstall -y {" ".join(names)} && {_install(*kept)}',
        )


def without_torch(seen: Snapshot) -> Iterator[Problem]:
    """Find a missing torch, which mmcv must be compiled against."""
    if 'torch' not in seen.modules:
        yield Problem(
            'torch is not installed. It comes first: the operators of mmcv '
            'are compiled against it.',
            "pip install torch 'setuptools<81' wheel ninja",
        )


def without_mmengine(seen: Snapshot) -> Iterator[Problem]:
    """Find a missing mmengine, without which nothing can be imported."""
    if 'mmengine' not in seen.modules and not seen.of('mmengine'):
        yield Problem(
            'e3va_mm needs mmengine, which is not installed. Install torch '
            'first, then the frameworks. In a clone of the repository '
            '`bash tools/quickstart.sh` does all of that in an environment '
            'of its own.',
            _install('e3va_mm[onedl]'),
        )


def without_mmcv(seen: Snapshot) -> Iterator[Problem]:
    """Find a missing mmcv; it may have to be compiled."""
    if 'mmcv' not in seen.modules and not seen.of('mmcv'):
        wanted = 'mmcv==2.1.0' if seen.originals else 'onedl-mmcv'
        yield Problem(
            'mmcv is not installed. Where no wheel fits this Python and '
            'torch, pip compiles it, which takes some 15 minutes on two '
            'cores without a word; -v shows that it goes on.',
            _install(wanted) + ' -v',
        )


def without_task(seen: Snapshot) -> Iterator[Problem]:
    """Find that neither detection nor segmentation can be trained."""
    tasks = ('mmdet', 'mmseg')
    if not any(t in seen.modules or seen.of(t) for t in tasks):
        names = (
            ('mmdet==3.3.0', 'mmsegmentation==1.2.2')
            if seen.originals
            else ('onedl-mmdetection', 'onedl-mmsegmentation')
        )
        yield Problem(
            'Neither mmdet nor mmseg is installed: there is nothing to put a '
            f'backbone into. One will do, or both: {" ".join(names)}.',
            _install(names[0]),
        )


def without_files(seen: Snapshot) -> Iterator[Problem]:
    """Find distributions whose files went with those of another."""
    for package in (*DISTRIBUTIONS, 'cv2'):
        found = seen.of(package)
        if found and package not in seen.modules:
            name, version = next(iter(found.items()))
            yield Problem(
                f'{name} {version} counts as installed, but its files are '
                f'gone: there is no package {package}. That happens when '
                'another distribution of the same package is uninstalled.',
                'pip install --no-build-isolation --force-reinstall '
                f'--no-deps {name}=={version}',
            )


def without_ops(seen: Snapshot) -> Iterator[Problem]:
    """Find an mmcv without, or with unusable, compiled operators."""
    if not seen.of('mmcv'):
        return
    name = next(iter(seen.of('mmcv')))
    if name == 'mmcv-lite':
        yield Problem(
            'mmcv-lite has no compiled operators (nms, roi_align).',
            f'pip uninstall -y mmcv-lite && {_rebuild(seen)}',
        )
    elif seen.failing('mmcv._ext'):
        yield Problem(
            f'{name} has no compiled operators (No module named mmcv._ext): '
            'built in isolation, its setup finds no torch and leaves them '
            'out.',
            _rebuild(seen),
        )
    elif seen.failing('undefined symbol'):
        yield Problem(
            f'The operators of {name} were compiled for another torch: '
            + seen.failures[seen.failing('undefined symbol')[0]],
            _rebuild(seen),
        )


def without_cuda_ops(seen: Snapshot) -> Iterator[Problem]:
    """Find operators for CPUs beside a torch that uses a GPU."""
    by_error = seen.failing('implementation for device cuda')
    if by_error or (seen.ops and seen.devices and not seen.ops_archs):
        yield Problem(
            'torch uses a GPU, but the operators of mmcv were compiled for '
            'CPUs alone: training would end in nms at its first step.',
            _rebuild(seen),
        )


def other_gpus_ops(seen: Snapshot) -> Iterator[Problem]:
    """Find operators that were compiled for other GPUs."""
    failed = seen.failing('no kernel image')
    for name, device in seen.devices.items():
        if failed or seen.ops_archs and not serves(seen.ops_archs, device):
            yield Problem(
                f'The operators of mmcv were compiled for '
                f'{" ".join(seen.ops_archs)}, and {name} is {device}: '
                'training would end with "no kernel image is available".',
                _rebuild(seen),
            )


def other_gpus_torch(seen: Snapshot) -> Iterator[Problem]:
    """Find a torch that was compiled for other GPUs."""
    for name, device in seen.devices.items():
        if seen.torch_archs and not serves(seen.torch_archs, device):
            yield Problem(
                f'torch was compiled for {" ".join(seen.torch_archs)}, and '
                f'{name} is {device}: take a build for it, then compile mmcv '
                'again.',
                'pip install --upgrade torch',
            )


def new_setuptools(seen: Snapshot) -> Iterator[Problem]:
    """Find a setuptools without pkg_resources, which mmcv's setup uses."""
    to_build = 'mmcv' not in seen.modules and seen.version('setuptools')
    if seen.failing('pkg_resources') or to_build and to_build >= (82,):
        yield Problem(
            'setuptools has had no pkg_resources since version 82, which '
            'mmcv needs to be built and the original mmengine to be used.',
            "pip install 'setuptools<81'",
        )


def new_mmcv(seen: Snapshot) -> Iterator[Problem]:
    """Find an mmcv that the original mmdet and mmseg refuse."""
    refusing = [
        name
        for package in ('mmdet', 'mmseg')
        for name in list(seen.of(package))[:1]
        if name in seen.originals
    ]
    if refusing and seen.version('mmcv') >= (2, 2):
        name, version = next(iter(seen.of('mmcv').items()))
        yield Problem(
            f'The original {" and ".join(refusing)} refuse mmcv from 2.2.0 '
            f'on, and {name} {version} is installed. The maintained '
            'distributions do not.',
            _to_maintained(seen),
        )


def dormant_mmengine(seen: Snapshot) -> Iterator[Problem]:
    """Find an mmengine that cannot resume with this torch."""
    name = next(iter(seen.of('mmengine')), '')
    if name in seen.originals and seen.version('torch') >= (2, 6):
        yield Problem(
            'The original mmengine cannot resume from a checkpoint with '
            'torch 2.6 or newer (weights_only).',
            _to_maintained(seen),
        )


def numpy_line(seen: Snapshot) -> Iterator[Problem]:
    """Find a numpy of the wrong side of version 2."""
    numpy, torch = seen.version('numpy'), seen.version('torch')
    wants_2 = 'onedl-mmsegmentation' in seen.distributions
    if numpy and numpy <= (2, 0, 0) and wants_2:
        yield Problem(
            'onedl-mmsegmentation needs numpy 2.0.1 or newer.',
            "pip install 'numpy>2'",
        )
    if numpy >= (2,) and torch and torch < (2, 3):
        yield Problem(
            f'torch {".".join(map(str, torch))} was built with numpy 1 and '
            'cannot exchange arrays with numpy 2.',
            'pip install --upgrade torch'
            if wants_2
            else "pip install 'numpy<2'",
        )


def opencv(seen: Snapshot) -> Iterator[Problem]:
    """Find a missing OpenCV, one that needs a display, one too new."""
    numpy = seen.version('numpy')
    bound = '4.12' if numpy and numpy < (2,) else '4.13'
    headless = f"'opencv-python-headless<{bound}'"
    if 'cv2' not in seen.modules and not seen.of('cv2'):
        yield Problem(
            'OpenCV is not installed; onedl-mmengine does not ask for it.',
            f'pip install {headless}',
        )
    elif seen.failing('libGL.so'):
        yield Problem(
            'OpenCV looks for libGL, which machines without a display lack. '
            'The headless build does not.',
            f'pip install --force-reinstall --no-deps {headless}',
        )
    full = seen.distributions.get('opencv-python', '0')
    if seen.of('imaug') and numbers(full) >= (4, 13):
        yield Problem(
            f'imaug, which mmdet asks for, needs opencv-python below 4.13, '
            f'and {full} is installed.',
            f"pip install 'opencv-python<4.13' {headless}",
        )


def torchvision(seen: Snapshot) -> Iterator[Problem]:
    """Find a torchvision built for another torch, or missing."""
    needed = [name for p in ('mmpretrain', 'timm') for name in seen.of(p)]
    minor = (seen.version('torch') + (0, 0))[1]
    release = f'torchvision==0.{minor + 15}.0'
    failing = seen.failing(NO_OPERATORS)
    if failing and (failing != ['torchvision'] or not needed):
        yield Problem(
            'torchvision was built for another torch (operator '
            'torchvision::nms does not exist), which makes timm and '
            'mmpretrain, and with them mmdet and mmseg, fail. Without '
            'torchvision they do without these two.',
            'pip uninstall -y torchvision',
        )
    elif failing:
        yield Problem(
            'torchvision was built for another torch: its operators do not '
            f'load. {" and ".join(needed)} can be used all the same, with '
            'the tools of this repository and after `import '
            "e3va_mm.registry`; the frameworks' own tools end in "
            '"operator torchvision::nms does not exist". They work too with '
            'a build for this torch, where pip finds one.',
            f'pip install --force-reinstall --no-deps {release}'
            + ('' if seen.torch_cuda else '+cpu'),
            blocks=False,
        )
    elif seen.of('mmpretrain') and minor and 'torchvision' not in seen.modules:
        yield Problem(
            'mmpretrain needs torchvision, which is not installed. Beside a '
            'torch for CPUs a build for CUDA will do; --no-deps lets torch '
            'stay.',
            f'pip install --no-deps {release}',
        )


def new_transformers(seen: Snapshot) -> Iterator[Problem]:
    """Find a transformers that mmpretrain cannot be imported beside."""
    failing = seen.failing('NoneType takes no arguments')
    found = seen.version('transformers') >= (5,) and seen.of('mmpretrain')
    if failing and found:
        name, version = next(iter(found.items()))
        yield Problem(
            f'{name} {version} cannot be imported beside transformers '
            f'{seen.distributions["transformers"]}, which has dropped what '
            'it uses (TypeError: NoneType takes no arguments); nor can '
            'mmdet, which imports it. 4.57 works, and so does 4.44.',
            "pip install 'transformers<5'",
        )


def half_precision(seen: Snapshot) -> Iterator[Problem]:
    """Find operators with known defects in 16 bits."""
    version = seen.distributions.get('onedl-mmcv')
    if version and numbers(version) < (2, 3, 6):
        yield Problem(
            f'batched_nms of onedl-mmcv {version} is wrong in 16 bits '
            '(--amp); 2.3.6 mends it.',
            _install('onedl-mmcv>=2.3.6'),
            blocks=False,
        )


def not_installed(seen: Snapshot) -> Iterator[Problem]:
    """Find that e3va_mm runs from a clone, which other tools do not see."""
    if not seen.of('e3va_mm'):
        yield Problem(
            'e3va_mm is not installed. The tools of this repository do not '
            "need that, but the frameworks' own would say that "
            'E3VASwinTransformer is not in the registry.',
            'pip install --no-build-isolation --no-deps -e .',
            blocks=False,
        )


def unexplained(seen: Snapshot) -> Iterator[Problem]:
    """Report what fails for a reason that no other check knows."""
    for module, line in seen.failures.items():
        if NO_OPERATORS in line:  # explained, though it need not block
            continue
        package = module.partition('.')[0]
        found = seen.of(package)
        pins = [f'{name}=={version}' for name, version in found.items()]
        yield Problem(
            f'import {module} fails: {line}',
            'pip install --no-build-isolation --force-reinstall --no-deps '
            + ' '.join(pins or [package]),
        )


CHECKS = (
    doubled,
    without_torch,
    new_setuptools,
    without_mmengine,
    without_mmcv,
    without_task,
    without_files,
    new_mmcv,
    dormant_mmengine,
    numpy_line,
    opencv,
    torchvision,
    new_transformers,
    other_gpus_torch,
    without_ops,
    without_cuda_ops,
    other_gpus_ops,
    half_precision,
    not_installed,
)


def diagnose(seen: Snapshot) -> list[Problem]:
    """List what is wrong with an environment.

    A failing import is reported as such only where nothing else is found that
    explains it.
    """
    problems = [p for check in CHECKS for p in check(seen)]
    if not any(p.blocks for p in problems):
        problems += unexplained(seen)
    return problems
