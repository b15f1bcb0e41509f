"""From a stock backbone to the trunk that reads it."""

from collections.abc import Sequence

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.trunks.families import EXAMPLE, FAMILIES, SWINS, VITS
from e3va_mm.trunks.layout import Layout
from e3va_mm.trunks.options import TrunkOptions
from e3va_mm.trunks.swin import SwinTrunk
from e3va_mm.trunks.timm import TimmTrunk
from e3va_mm.trunks.timm_hiera import HieraTrunk, TimmHiera
from e3va_mm.trunks.timm_vit import TimmViT, TimmViTTrunk
from e3va_mm.trunks.trunk import Trunk
from e3va_mm.trunks.vit import SamTrunk, VitTrunk


def scoped_name(cls: type) -> str:
    """The name by which configs of any framework mean a class."""
    return f'{cls.__module__.partition(".")[0]}.{cls.__name__}'


def family_of(stock: nn.Module) -> str | None:
    """The row of the table for a stock backbone, if there is one."""
    model = getattr(stock, 'timm_model', None)
    if model is not None:
        inner = getattr(model, 'model', model)
        name = getattr(inner, 'default_cfg', {}).get('architecture', '')
        found = [row for row in FAMILIES if f'timm.{name}'.startswith(row)]
        return max(found, key=len, default=None)
    for base in type(stock).__mro__:
        name = scoped_name(base)
        if name in FAMILIES:
            return name
    return None


def build_trunk(
    stock: nn.Module,
    options: TrunkOptions,
    layout: Layout | None = None,
) -> Trunk:
    """The trunk for a stock backbone, by its own ``out_indices``.

    Args:
        stock (nn.Module): The stock backbone; cut after its last output.
        options (TrunkOptions): How the frozen modules compute.
        layout (Layout, optional): Where its blocks are. Defaults to that of
            its family.

    Raises:
        ConfigError: If there is no layout for it, or it does not fit.
    """
    family = family_of(stock)
    if layout is None and family is None:
        raise ConfigError(
            f'{type(stock).__module__}.{type(stock).__name__} is of no known '
            f'family ({", ".join(FAMILIES)}). Say where its blocks are, by '
            'paths as in its state dict; for a Swin Transformer it would be\n'
            f'{EXAMPLE}\nSee e3va_mm.trunks.Layout for all fields.'
        )
    out_indices = _out_indices(stock)
    if layout is None and family in VITS:
        kind = SamTrunk if family == 'mmpretrain.ViTSAM' else VitTrunk
        return kind(stock, FAMILIES[family], out_indices, options, family)
    kind = Trunk
    if hasattr(stock, 'timm_model'):
        kind = TimmTrunk
    elif isinstance(stock, TimmViT):
        kind = TimmViTTrunk
    elif isinstance(stock, TimmHiera):
        kind = HieraTrunk
    elif family in SWINS:
        kind = SwinTrunk
    return kind(stock, layout or FAMILIES[family], out_indices, options)


def _out_indices(stock: nn.Module) -> Sequence[int]:
    """Those of the stock backbone, ascending."""
    owner = stock
    if hasattr(stock, 'timm_model'):
        owner = stock.timm_model.feature_info
        if not hasattr(owner, 'out_indices'):
            raise ConfigError(
                'timm backbones need `features_only=True` in `trunk`, so that '
                'they give maps.'
            )
    indices = getattr(owner, 'out_indices', None)
    if isinstance(indices, int):
        indices = [indices]
    if indices is None:  # MSCAN gives all stages
        indices = range(stock.num_stages)
    return sorted(set(indices))
