"""Trunks in memory, for backbones that are loaded later to share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional

from mmengine.logging import print_log

from e3va_mm.backbones.trunk_pass import trunk_difference
from e3va_mm.utils.tuned import TunedModule

_OPEN: ContextVar[Optional['TrunkPool']] = ContextVar('trunk_pool')


class TrunkPool:
    """Backbones whose trunks others may share.

    While it is open, an adapter file that is loaded finds its trunk here
    before it reads one.

    Examples:
        >>> pool = TrunkPool()
        >>> with pool.open():
        ...     detector = init_detector(config, 'boxes.safetensors')
        >>> pool.add(detector.backbone)
    """

    def __init__(self) -> None:
        self._members: list[tuple[TunedModule, str]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let what is loaded meanwhile look for its trunk here."""
        token = _OPEN.set(self)
        try:
            yield
        finally:
            _OPEN.reset(token)

    def add(self, backbone: TunedModule) -> None:
        """Let others share a trunk; it shares one that is here already."""
        for member, found in self._members:
            if backbone.shares_trunk_with(member):
                self._members.append((backbone, found))
                return
        found = backbone.trunk_fingerprint()
        self._share(backbone, found)
        self._members.append((backbone, found))

    def remove(self, backbone: TunedModule) -> None:
        """Forget a backbone; a trunk that others share stays with them."""
        self._members = [m for m in self._members if m[0] is not backbone]

    def _share(self, backbone: TunedModule, wanted: str) -> bool:
        """Let a backbone share the trunk with a fingerprint, if it is here."""
        difference = None
        for member, found in self._members:
            if found == wanted:
                difference = trunk_difference(member, backbone)
                if difference is None:
                    backbone.share_trunk(member)
                    return True
        if difference is not None:
            print_log(
                'A trunk with the same weights is in memory, but cannot be '
                f'shared: {difference}.',
                logger='current',
                level=logging.WARNING,
            )
        return False


def share_open(backbone: TunedModule, wanted: str) -> bool:
    """Let a backbone share a trunk of the pool that is open, if one is.

    Args:
        backbone (TunedBackbone): The backbone; its own trunk goes.
        wanted (str): The fingerprint of the trunk it needs.

    Returns:
        bool: Whether it has got it.
    """
    pool = _OPEN.get(None)
    return pool is not None and pool._share(backbone, wanted)
