from ...errors import ConfigError
from ...registry import STRATEGIES
from .e3va_deepspeed_strategy import E3VADeepSpeedStrategy

try:
    from .e3va_fsdp_strategy import E3VAFSDPStrategy
except ImportError as error:  # mmengine lacks its own with some torch
    _reason = str(error)

    @STRATEGIES.register_module()
    class E3VAFSDPStrategy:
        """Stands in; raises ConfigError for any arguments."""

        def __init__(self, **kwargs: object) -> None:
            raise ConfigError(
                'E3VAFSDPStrategy needs the FSDPStrategy of mmengine, which '
                f'cannot be imported here: {_reason}. Install a torch that '
                'this mmengine works with, or train without `strategy`.'
            )


__all__ = ['E3VADeepSpeedStrategy', 'E3VAFSDPStrategy']
