"""Grounding DINO of onedl-mmdetection 3.5, which cannot run as it is.

Its DINO encodes a coordinate with as many features as a query has, and its
decoder's head takes four times as many. That of Grounding DINO still takes
twice as many, as published checkpoints have it, but inherits the code.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType

LAYERS = 'mmdet.models.layers.transformer.grounding_dino_layers'


def mend_when_imported() -> None:
    """Mend the decoder of Grounding DINO now, or once mmdet is imported."""
    if LAYERS in sys.modules:
        mend(sys.modules[LAYERS])
    else:
        sys.meta_path.insert(0, _Mends())


def mend(layers: ModuleType) -> None:
    """Let the decoder encode coordinates with half a query's features.

    Args:
        layers (ModuleType): mmdet's module of Grounding DINO's layers. Where
            its code is as it was, nothing changes.
    """
    decoder = layers.GroundingDinoTransformerDecoder
    stock = decoder.forward
    # Names of keywords are constants of the code that calls.
    if 'forward' in vars(decoder) or ('num_feats',) not in (
        stock.__code__.co_consts
    ):
        return
    encode = stock.__globals__['coordinate_to_encoding']

    def encode_by_half(coordinates, num_feats):
        return encode(coordinates, num_feats=num_feats // 2)

    names = dict(stock.__globals__, coordinate_to_encoding=encode_by_half)
    decoder.forward = FunctionType(
        stock.__code__, names, stock.__name__, stock.__defaults__
    )


class _Mends(MetaPathFinder):
    """Finds one module, mends it once it is run, and is gone."""

    def find_spec(self, name, path, target=None) -> ModuleSpec | None:
        if name != LAYERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def run_and_mend(module: ModuleType) -> None:
            run(module)
            mend(module)

        spec.loader.exec_module = run_and_mend
        return spec
