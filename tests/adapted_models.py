"""Small segmentors with a side path, whose trunk comes from a file."""

import copy

from mmengine.registry import DefaultScope
from safetensors.torch import save_file

from e3va_mm.registry import MODELS
from tests.trunk_cases import CASES, awake, build_stock, need

# Channels of the map that the head reads, and its index.
HEADS = {'swin of mmdet': (256, 3), 'vit': (32, 1), 'mit': (128, 3)}


def trunk_file(folder, name, seed=0):
    """Drawn weights of a trunk of ``trunk_cases``; the path of the file."""
    path = folder / f'{name.replace(" ", "_")}_{seed}.safetensors'
    save_file(build_stock(name, seed).state_dict(), path)
    return path


def segmentor(name, source, trunk=None, **tuner):
    """An FCN on a trunk of ``HEADS``; only ``init_weights`` reads it.

    ``trunk`` are other arguments of the stock class.
    """
    need(CASES[name])
    channels, index = HEADS[name]
    backbone = dict(
        type='e3va_mm.E3VABackbone',
        trunk=copy.deepcopy(CASES[name]) | (trunk or {}),
        tuner=dict(rank=4, **tuner),
    )
    if source is not None:
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint=str(source))
    head = dict(type='mmseg.FCNHead', in_channels=channels, in_index=index)
    head |= dict(channels=8, num_convs=1, num_classes=3)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(
            dict(
                type='mmseg.EncoderDecoder',
                backbone=backbone,
                decode_head=dict(head, norm_cfg=dict(type='BN')),
                test_cfg=dict(mode='whole'),
            )
        )


def trained(name, source, **kwargs):
    """The same as after training: its trunk there, adapters awake."""
    model = segmentor(name, source, **kwargs)
    model.init_weights()
    awake(model.backbone)
    return model.eval()
