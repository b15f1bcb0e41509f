"""Sphinx configuration: `sphinx-build -W docs docs/_build`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

_version = (ROOT / 'e3va_mm' / 'version.py').read_text()

project = 'e3va_mm'
author = copyright = 'the e3va_mm authors'
release = re.search(r"'(.+)'", _version).group(1)
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
autodoc_default_options = {
    'members': True,
    'imported-members': True,
    'member-order': 'bysource',
}
# Docstrings name the types, and those of torch and mmengine are not ours.
autodoc_typehints = 'none'
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
exclude_patterns = ['_build']
html_theme = 'alabaster'
html_theme_options = dict(
    description='E3VA adapter tuning for MMDetection and MMSegmentation',
    page_width='64em',
)
