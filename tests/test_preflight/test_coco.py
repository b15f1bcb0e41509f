"""Which entries of a COCO file are refused; test_odd_data has the readers."""

import json

from e3va_mm.preflight.coco import coco_fault
from tests.test_engine.test_hooks.tiny import make_coco


def test_a_good_file_has_no_fault(tmp_path):
    make_coco(tmp_path, 'train', 2, masks=True)
    content = json.loads((tmp_path / 'train.json').read_text())
    assert coco_fault(content) is None
    assert coco_fault({**content, 'images': {}}) == 'has no list `images`'
    fault = coco_fault({**content, 'images': [3]})
    assert fault == 'has 3 at images[0], which is no dict'
