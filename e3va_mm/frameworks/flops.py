"""mmengine counts the products of torch's attention, too."""

import math
from collections.abc import Sequence
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import get_shape

ATTENTION = 'aten::scaled_dot_product_attention'


def count_attention() -> None:
    """Have ``get_model_complexity_info`` count attention; a later one may."""
    handles = complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS
    handles.setdefault(ATTENTION, _attention_flops)


def _attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiplications of ``q @ k.mT`` and of that with ``v``."""
    query, key, value = (get_shape(each) for each in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
