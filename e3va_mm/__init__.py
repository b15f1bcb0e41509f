"""E3VA adapter tuning for MMDetection and MMSegmentation."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from importlib.util import find_spec

from .errors import E3VAError
from .version import __version__

__all__ = ['__version__']

# Which distributions provide which package; any one of a row will do.
_DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
}


def _installed(names):
    """Find the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = _version(name)
        except PackageNotFoundError:
            pass
    return found


def _check_frameworks():
    """Refuse an environment in which the frameworks cannot work.

    Raises:
        E3VAError: If a framework is installed from two distributions, whose
            files then are a mixture of both, or if mmengine is missing.
    """
    clashes = {}
    for package, names in _DISTRIBUTIONS.items():
        found = _installed(names)
        if len(found) > 1:
            clashes[package] = found
    if clashes:
        lines = [
            f'  {package}: '
            + ' and '.join(f'{name} {v}' for name, v in found.items())
            for package, found in clashes.items()
        ]
        doubled = [name for found in clashes.values() for name in found]
        kept = [next(iter(found)) for found in clashes.values()]
        raise E3VAError(
            'Each framework should be installed from one distribution, but '
            'these come from several, which overwrite each other:\n'
            + '\n'.join(lines)
            + '\nRemove them all, then install one of each again:\n'
            f'  pip uninstall -y {" ".join(doubled)}\n'
            f'  pip install --no-build-isolation {" ".join(kept)}'
        )
    if find_spec('mmengine') is None:
        raise E3VAError(
            'e3va_mm needs mmengine, which is not installed. Install torch, '
            'then the frameworks:\n'
            "  pip install 'setuptools<81' wheel ninja\n"
            "  pip install --no-build-isolation 'e3va_mm[onedl]'\n"
            'In a clone of the repository `bash tools/quickstart.sh` does '
            'all of that in an environment of its own.'
        )


_check_frameworks()
