"""A step whose backbone is on the meta device takes the memory of a real."""

import pytest
from mmengine.config import Config

from e3va_mm.measure import TrainingStep
from e3va_mm.numerics.temporaries import as_on_gpu
from tests.test_measure.test_step import MAPS, SMALL


@pytest.mark.parametrize('variant', ['full', 'exact', 'lean'])
def test_memory_is_that_of_a_real_backbone(variant):
    config = Config.fromfile(MAPS)
    real, meta = (
        TrainingStep(config, variant, **SMALL, on_meta=on_meta)
        for on_meta in (False, True)
    )
    assert {p.device.type for p in meta.model.backbone.parameters()} == {
        'meta'
    }
    assert meta.parameters() == real.parameters()
    with as_on_gpu():  # whose ways the meta device takes
        real = real.memory()
    meta = meta.memory()
    for key in ('weights', 'gradients', 'optimizer'):
        assert meta[key] == real[key]
    kept, found = (sum(m['kept_modules'].values()) for m in (real, meta))
    assert found == pytest.approx(kept, rel=0.03)
    assert meta['peak'] == pytest.approx(real['peak'], rel=0.02)
