"""The variants of one config that are measured beside each other."""

import copy

from mmengine.config import Config

from ..errors import ConfigError

# Arguments of our backbones that the stock class does not know.
OURS = ('side_path', 'allow_random_trunk')
VARIANTS = {
    'e3va': 'as the config has it',
    'full': 'the stock backbone, fine-tuned as a whole',
    'frozen': 'the stock backbone, frozen and in eval mode',
}


def variant_config(config: Config, variant: str) -> Config:
    """The config of a variant, without any weights to download.

    The bytes and the arithmetic of a backbone do not depend on its weights, so
    its ``init_cfg`` is dropped.

    Args:
        config (Config): A config with an E3VA Swin backbone.
        variant (str): A key of ``VARIANTS``.

    Returns:
        Config: A changed copy.

    Raises:
        ConfigError: If the variant or the backbone is of no known kind.
    """
    if variant not in VARIANTS:
        raise ConfigError(
            f'Variants are {", ".join(VARIANTS)}, but got {variant!r}.'
        )
    config = copy.deepcopy(config)
    backbone = config.model.backbone
    if backbone.type != 'e3va_mm.E3VASwinTransformer':
        raise ConfigError(
            'Expected model.backbone.type to be '
            f"'e3va_mm.E3VASwinTransformer', but got {backbone.type!r}."
        )
    backbone.init_cfg = None
    backbone.allow_random_trunk = True
    if variant != 'e3va':
        backbone.type = f'{config.default_scope}.SwinTransformer'
        for key in OURS:
            backbone.pop(key, None)
        if config.default_scope != 'mmdet':
            backbone.pop('convert_weights', None)
    return config
