"""Small tuners by name, and what tests do with a backbone that has one."""

import torch

from tests.trunk_cases import flat

TUNERS = {
    'full': dict(type='e3va_mm.Full'),
    'frozen': dict(type='e3va_mm.Frozen'),
    'bitfit': dict(type='e3va_mm.BitFit'),
    'norm': dict(type='e3va_mm.NormTuning'),
    'partial': dict(type='e3va_mm.Partial', blocks=1),
    'adapter': dict(type='e3va_mm.Adapter', bottleneck=4),
    'lora': dict(type='e3va_mm.LoRA', rank=4),
    'adaptformer': dict(type='e3va_mm.AdaptFormer', bottleneck=4),
    'lorand': dict(type='e3va_mm.LoRand', rank=2),
    'mona': dict(type='e3va_mm.Mona', bottleneck=4),
}
# Those that add something to the blocks.
INSIDE = ('adapter', 'lora', 'adaptformer', 'lorand', 'mona')


def wake(ours):
    """Let what was added, which starts at zero, do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ours.tuner.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return ours


def loss_of(outputs):
    """One that weighs every value."""
    generator = torch.Generator().manual_seed(5)
    return sum(
        (each.float() * torch.randn(each.shape, generator=generator)).mean()
        for each in flat(outputs)
    )
