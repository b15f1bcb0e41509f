"""What ``side_path.preset`` stands for."""

from collections.abc import Mapping

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.stored_weights import torchao
from e3va_mm.trunks import TrunkOptions

PRESETS: Mapping[str, Mapping] = {
    # No number of the method changes.
    'exact': dict(),
    # Trunk and adapters computed in 16 bits, its weights stored in 16, its
    # taps kept in 4. The first stage has most tokens for its arithmetic: it is
    # cheap to run again.
    'lean': dict(
        save_taps=('recompute', 'int4'),
        compute='bf16',
        trunk_compute='bf16',
        trunk_weights='bf16',
    ),
}


# Of a trunk with one resolution no stage is cheaper to run again than another.
PLAIN_PRESETS: Mapping[str, Mapping] = {
    **PRESETS,
    'lean': dict(PRESETS['lean'], save_taps='int8'),
}


def resolve_side_path(
    side_path: Mapping | None, plain: bool = False
) -> tuple[dict, TrunkOptions]:
    """Fill in the preset and part side path from trunk.

    Args:
        side_path (Mapping, optional): As in a config. Its own options come
            before those of its ``preset``, by default ``'exact'``.
        plain (bool): Whether the trunk has one resolution. Defaults to False.

    Returns:
        tuple[dict, TrunkOptions]: The config without ``preset`` and
        ``trunk_*``, and these.

    Raises:
        ConfigError: If the preset or an option of the trunk is unknown or out
            of range, or needs a library that is not there.
    """
    if not isinstance(side_path, (Mapping, type(None))):
        raise ConfigError(
            '`backbone.side_path` should be a dict, such as '
            f"dict(preset='lean'), but got {side_path!r}."
        )
    side_path = dict(side_path or {})
    preset = side_path.pop('preset', 'exact')
    if preset not in tuple(PRESETS):  # a list, too, is none of them
        raise ConfigError(
            f'`side_path.preset` should be one of {tuple(PRESETS)}, but got '
            f'{preset!r}.'
        )
    own_taps = side_path.get('save_taps', ())
    if not isinstance(own_taps, (list, tuple)):
        own_taps = [own_taps]
    presets = PLAIN_PRESETS if plain else PRESETS
    side_path = {**presets[preset], **side_path}
    options = TrunkOptions.take_from(side_path)
    if options.weights == 'int8':
        torchao()  # not to fail at the first forward pass only
    if options.drop_path and 'recompute' in own_taps:
        raise ConfigError(
            "`side_path.save_taps='recompute'` runs the trunk twice and needs "
            'it deterministic, but `side_path.trunk_drop_path` is '
            f'{options.drop_path}. Keep taps, or leave out the drop path.'
        )
    if options.drop_path and 'recompute' in side_path.get('save_taps', ()):
        # The preset's; it can do without.
        side_path['save_taps'] = side_path['save_taps'][-1]
    return side_path, options
