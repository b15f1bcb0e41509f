from .e3va_deepspeed_strategy import E3VADeepSpeedStrategy
from .e3va_fsdp_strategy import E3VAFSDPStrategy

__all__ = ['E3VADeepSpeedStrategy', 'E3VAFSDPStrategy']
