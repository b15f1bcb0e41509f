"""What ``tuner.preset`` stands for."""

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


def resolve_preset(
    tuner: Mapping, plain: bool = False
) -> tuple[dict, TrunkOptions]:
    """Fill in the preset and part the tuner's options from the trunk's.

    Args:
        tuner (Mapping): As in a config. Its own options come before those of
            its ``preset``, by default ``'exact'``.
        plain (bool): Whether the trunk has one resolution. Defaults to False.

    Returns:
        tuple[dict, TrunkOptions]: The config without ``preset`` and
        ``trunk_*``, and these.

    Raises:
        ConfigError: If the preset or an option of the trunk is unknown or out
            of range, or needs a library that is not there.
    """
    tuner = dict(tuner)
    preset = tuner.pop('preset', 'exact')
    if preset not in tuple(PRESETS):  # a list, too, is none of them
        raise ConfigError(
            f'`tuner.preset` should be one of {tuple(PRESETS)}, but got '
            f'{preset!r}.'
        )
    own_taps = tuner.get('save_taps', ())
    if not isinstance(own_taps, (list, tuple)):
        own_taps = [own_taps]
    tuner = {**(PLAIN_PRESETS if plain else PRESETS)[preset], **tuner}
    options = TrunkOptions.of(
        {
            key.removeprefix('trunk_'): tuner.pop(key)
            for key in list(tuner)
            if key.startswith('trunk_')
        }
    )
    if options.weights == 'int8':
        torchao()  # not to fail at the first load only
    if options.drop_path and 'recompute' in own_taps:
        raise ConfigError(
            "`tuner.save_taps='recompute'` runs the trunk twice and needs it "
            'deterministic, but `tuner.trunk_drop_path` is '
            f'{options.drop_path}. Keep taps, or leave out the drop path.'
        )
    if options.drop_path and 'recompute' in tuner.get('save_taps', ()):
        # The preset's; it can do without.
        tuner['save_taps'] = tuner['save_taps'][-1]
    return tuner, options
