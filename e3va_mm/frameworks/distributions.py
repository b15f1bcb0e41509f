"""The distributions that the frameworks are installed from."""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from e3va_mm.errors import E3VAError

#: Package to the distributions that provide it, the maintained one first.
#: Two of a row overwrite each other's files.
DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
#: What to install for the scope of a config.
PACKAGES = {
    name: DISTRIBUTIONS[name][0] for name in ('mmdet', 'mmseg', 'mmpretrain')
}
MISSING = (
    'e3va_mm needs mmengine, which is not installed. Install torch first, '
    'then the frameworks. In a clone of the repository `bash '
    'tools/quickstart.sh` does all of that in an environment of its own.',
    "pip install --no-build-isolation 'e3va_mm[onedl]'",
)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def doubled(versions: Mapping[str, str]) -> tuple[str, str] | None:
    """What is wrong, and the command that mends it, with doubled frameworks.

    Args:
        versions (Mapping[str, str]): Installed distributions.

    Returns:
        tuple[str, str] | None: None if no framework comes from two.
    """
    clashes = {}
    for package, names in DISTRIBUTIONS.items():
        found = [name for name in names if name in versions]
        if len(found) > 1:
            clashes[package] = found
    if not clashes:
        return None
    listed = '; '.join(
        f'{package} from ' + ' and '.join(f'{n} {versions[n]}' for n in names)
        for package, names in clashes.items()
    )
    removed = ' '.join(name for names in clashes.values() for name in names)
    kept = ' '.join(names[0] for names in clashes.values())
    return (
        'Each framework should be installed from one distribution, but these '
        f'come from several, which overwrite each other: {listed}. Remove '
        'them all, then install one of each again.',
        f'pip uninstall -y {removed} && '
        f'pip install --no-build-isolation {kept}',
    )


def check_distributions() -> None:
    """Refuse an environment in which the frameworks cannot work.

    Raises:
        E3VAError: If a framework is installed from two distributions, or
            mmengine is missing.
    """
    names = [name for row in DISTRIBUTIONS.values() for name in row]
    problem = doubled(installed(names))
    if problem is None and find_spec('mmengine') is None:
        problem = MISSING
    if problem is not None:
        what, mend = problem
        raise E3VAError(
            f'{what}\nTo mend it:\n  {mend}\n'
            'To see all that is wrong:\n  python -m e3va_mm.doctor'
        )
