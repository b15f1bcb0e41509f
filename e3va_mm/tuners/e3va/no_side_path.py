"""No side path: the frozen trunk alone."""

from e3va_mm.registry import MODELS
from e3va_mm.tuners.e3va.side_path import SidePath


@MODELS.register_module()
class NoSidePath(SidePath):
    """Takes the place of a side path and adds nothing.

    With ``train_output_norms=False`` the backbone is the frozen stock one
    under the same trunk options as the E3VA model it stands beside.
    """
