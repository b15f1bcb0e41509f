"""What computes in place of frozen stock modules, over their weights."""

from torch import nn

from e3va_mm.trunks.kernels.attention import (
    CrossAttention,
    DecomposedAttention,
    RelativeAttention,
    RotaryAttention,
    SelfAttention,
)
from e3va_mm.trunks.kernels.layers import GatedFeedForward, Product
from e3va_mm.trunks.kernels.window_attention import (
    PatchMerging,
    WindowAttention,
)

# By the stock class that defines the forward.
KERNELS = {
    'mmdet.models.backbones.swin.ShiftWindowMSA': WindowAttention,
    'mmdet.models.layers.transformer.utils.PatchMerging': PatchMerging,
    'mmpretrain.models.utils.attention.MultiheadAttention': SelfAttention,
    'mmpretrain.models.utils.attention.BEiTAttention': RelativeAttention,
    'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN': GatedFeedForward,
    'mmpretrain.models.backbones.vit_eva02.AttentionWithRoPE': RotaryAttention,
    'mmpretrain.models.backbones.vit_sam.Attention': DecomposedAttention,
    'mmseg.models.backbones.beit.BEiTAttention': RelativeAttention,
    'mmseg.models.backbones.swin.ShiftWindowMSA': WindowAttention,
    'mmseg.models.utils.embed.PatchMerging': PatchMerging,
    'torch.nn.modules.activation.MultiheadAttention': CrossAttention,
}


def kernel_of(module: nn.Module) -> type | None:
    """What computes in place of a module, if anything does."""
    if type(module) is nn.Linear:
        return Product
    # A subclass with a forward of its own is another thing.
    owner = next(c for c in type(module).__mro__ if 'forward' in vars(c))
    return KERNELS.get(f'{owner.__module__}.{owner.__qualname__}')
