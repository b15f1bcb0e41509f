"""Importing this module applies what docs/frameworks.md lists.

The one module of the package that does so, for a config to name: with
``custom_imports=dict(imports=['e3va_mm.checkpoint'])``, or ``import
e3va_mm.checkpoint`` in a script, a checkpoint that is read before the model is
built runs no code either, and torchvision can be imported whether its
operators load or not.
"""

from e3va_mm.registry import install

install()
