"""All that e3va_mm changes of the frameworks; docs/frameworks.md says why."""

from collections.abc import Callable

from e3va_mm.frameworks.torchvision import declare_missing_ops

_installed = False


def install(read: Callable, check: Callable) -> None:
    """Change the frameworks' behaviour, once; more calls change nothing.

    Args:
        read (Callable): Reads checkpoints for mmengine: ``(address,
            map_location) -> dict``.
        check (Callable): Looks at each state dict before mmengine loads it:
            ``(model, state) -> None``. It raises where that does not fit.
    """
    global _installed
    if _installed:
        return
    _installed = True
    declare_missing_ops()
    # Later, for what they import may import torchvision.
    from e3va_mm.frameworks.atomic_backend import register_atomic_backend
    from e3va_mm.frameworks.flops import count_attention
    from e3va_mm.frameworks.grounding_dino import mend_when_imported
    from e3va_mm.frameworks.loaders import replace_loaders
    from e3va_mm.frameworks.optimizer_groups import patch_constructors

    replace_loaders(read, check)
    register_atomic_backend()
    patch_constructors()
    mend_when_imported()
    count_attention()
