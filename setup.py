"""Packaging of e3va_mm; its extras are the files of requirements/."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ('configs', 'tools', 'model-index.yml')


def version():
    """Read the version without importing the package."""
    text = (ROOT / 'e3va_mm' / 'version.py').read_text()
    return re.search(r"^__version__ = '(.+)'$", text, re.M).group(1)


def requirements(name):
    """Read requirements/<name>.txt without its comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


class BuildWithConfigs(build_py):
    """Put configs, tools and their index where mmengine and mim look.

    That is `e3va_mm/.mim`: copies in a wheel, links in an editable install.
    """

    def run(self):
        """Build the package, then add what is shipped with it."""
        super().run()
        package = Path('e3va_mm')
        if not self.editable_mode:
            package = Path(self.build_lib) / package
        (package / '.mim').mkdir(exist_ok=True)
        for name in SHIPPED:
            target = package / '.mim' / name
            if target.is_symlink() or target.is_file():
                target.unlink()
            elif target.exists():
                shutil.rmtree(target)
            if self.editable_mode:
                target.symlink_to(Path('..', '..', name))
            elif (ROOT / name).is_file():
                shutil.copy(ROOT / name, target)
            else:
                shutil.copytree(
                    ROOT / name,
                    target,
                    ignore=shutil.ignore_patterns('__pycache__'),
                )


readme = ROOT / 'README.md'
setup(
    name='e3va_mm',
    version=version(),
    description='E3VA adapter tuning for MMDetection and MMSegmentation',
    long_description=readme.read_text() if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    classifiers=[
        f'Programming Language :: Python :: 3.{minor}'
        for minor in range(10, 14)
    ],
    packages=find_packages(include=['e3va_mm', 'e3va_mm.*']),
    package_data={'e3va_mm': ['assets/*']},
    entry_points={'console_scripts': ['e3va = e3va_mm.cli:main']},
    # No framework and no torch: a hard requirement would pull one of the two
    # distribution lines over the other, or another build of torch.
    install_requires=requirements('runtime'),
    extras_require={
        'onedl': requirements('mminstall'),
        'digits': requirements('digits'),
        'export': requirements('export'),
        'grounding': requirements('grounding'),
        'mmpretrain': requirements('mmpretrain'),
        'tests': requirements('digits') + requirements('tests'),
    },
    cmdclass={'build_py': BuildWithConfigs},
    zip_safe=False,
)
