"""On the path of processes that import a framework before anything of ours.

Where torchvision's operators do not load, no framework could be imported.
"""

from e3va_mm.frameworks.torchvision import declare_missing_ops

declare_missing_ops()
