"""torchvision whose compiled operators do not load, imported all the same.

mmpretrain and timm import it, and where mmpretrain is installed mmdet imports
mmpretrain, where timm is mmseg imports timm. On Linux the wheel that indexes
offer may be built for CUDA; beside a torch for CPUs its library does not load,
and `import torchvision` ends in "operator torchvision::nms does not exist",
although nothing that the frameworks do by default needs these operators.
"""

import importlib.util
import sys
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
)
from pathlib import Path

import torch

# Those that torchvision describes at import whether it has them or not.
OPS = ('nms', 'qnms')
SCHEMA = '{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'

_declared = []  # a Library takes its schemas along when it goes


def declare_missing_ops() -> bool:
    """Let torchvision be imported where its library does not load.

    To be called before torchvision is imported. The operators are declared,
    not implemented: torchvision then says that it has none when one is called.
    Where its library loads it is left as it is. More calls change nothing.

    Returns:
        bool: Whether something was declared now.
    """
    if 'torchvision' in sys.modules or hasattr(torch.ops.torchvision, OPS[0]):
        return False
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return False
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in OPS:
        library.define(SCHEMA.format(name))
    _declared.append(library)
    return True


def _loads(folder: Path) -> bool:
    """Load the library of operators, found as torchvision finds it."""
    finder = FileFinder(str(folder), (ExtensionFileLoader, EXTENSION_SUFFIXES))
    spec = finder.find_spec('_C')
    if spec is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError):
        return False
    return True
