import pytest
from mmengine.config import Config

from e3va_mm.errors import ConfigError
from e3va_mm.measure import variant_config
from tests.test_configs import CONFIGS

DIGITS = CONFIGS / 'cascade_e3va_swin_nano_digits.py'


def test_full_is_the_stock_backbone_and_nothing_else_differs():
    config = Config.fromfile(DIGITS)
    config.model.backbone.side_path = dict(rank=8)
    full = variant_config(config, 'full')
    assert full.model.backbone.type == 'mmdet.SwinTransformer'
    assert 'side_path' not in full.model.backbone
    assert 'allow_random_trunk' not in full.model.backbone
    for other in (full, variant_config(config, 'e3va')):
        other.model.pop('backbone')
        rest = config.model.to_dict()
        rest.pop('backbone')
        assert other.model.to_dict() == rest
    assert config.model.backbone.init_cfg, 'the original is left alone'


def test_what_cannot_be_compared_is_refused():
    config = Config.fromfile(DIGITS)
    with pytest.raises(ConfigError, match="e3va, full, frozen, but got 'lo'"):
        variant_config(config, 'lo')
    config.model.backbone.type = 'ResNet'
    with pytest.raises(ConfigError, match="but got 'ResNet'"):
        variant_config(config, 'full')
