"""Sphinx configuration: `sphinx-build -W docs docs/_build`."""

import re
from pathlib import Path

_version = (Path(__file__).parents[1] / 'e3va_mm' / 'version.py').read_text()

project = 'e3va_mm'
author = copyright = 'the e3va_mm authors'
release = re.search(r"'(.+)'", _version).group(1)
extensions = ['myst_parser']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
exclude_patterns = ['_build']
html_theme = 'alabaster'
html_theme_options = dict(
    description='E3VA adapter tuning for MMDetection and MMSegmentation',
    page_width='64em',
)
