"""A small trunk of every family, and what tests need to know of it."""

import copy

import pytest
import torch

from e3va_mm.registry import MODELS
from tests.helpers import randomised

VIT = dict(embed_dims=32, num_layers=4, num_heads=4, feedforward_channels=64)
SEG_VIT = dict(img_size=64, embed_dims=32, num_layers=4, num_heads=4)
TWINS = dict(
    embed_dims=[16, 32, 64],
    num_heads=[1, 2, 4],
    depths=[2, 2, 2],
    sr_ratios=[4, 2, 1],
    strides=[4, 2, 2],
    patch_sizes=[4, 2, 2],
    mlp_ratios=[2, 2, 2],
)
PRETRAIN_TWINS = dict(
    embed_dims=[16, 32, 64, 128],
    num_heads=[1, 2, 4, 8],
    depths=[2, 2, 2, 2],
    sr_ratios=[8, 4, 2, 1],
    strides=[4, 2, 2, 2],
    patch_sizes=[4, 2, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
)
SWIN_ARCH = dict(embed_dims=32, depths=[2, 1, 3], num_heads=[1, 2, 4])
V2_ARCH = dict(SWIN_ARCH, extra_norm_every_n_blocks=0)
TINY_TIMM = dict(
    embed_dim=32, depth=4, num_heads=4, img_size=64, out_indices=(1, 3)
)
HIERA = dict(embed_dim=16, num_heads=1, stages=(1, 2, 2, 1))
SAM_ARCH = dict(VIT, global_attn_indexes=[1, 3])


def vit(kind, **kwargs):
    own = dict(arch=VIT, img_size=64, patch_size=16, out_indices=[1, 3])
    own |= dict(type=f'mmpretrain.{kind}', out_type='featmap')
    return own | kwargs


def seg_vit(kind, **kwargs):
    own = dict(SEG_VIT, type=f'mmseg.{kind}', out_indices=(1, 3))
    return own | kwargs


def convnext(**kwargs):
    own = dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 2, 1, 1], channels=[16, 32, 64, 128]),
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
        layer_scale_init_value=0.5,
    )
    return own | kwargs


def swin(kind, **kwargs):
    own = dict(type=f'mmpretrain.{kind}', img_size=64, window_size=4)
    own |= dict(pad_small_map=True, out_indices=(0, 1, 2))
    return own | kwargs


def timm(name, **kwargs):
    kind = dict(type='mmpretrain.TIMMBackbone', model_name=name)
    return dict(kind, features_only=True, **kwargs)


# Plain ViTs, over the classes that E3VAVisionTransformer takes.
VITS = {
    'vit': vit('VisionTransformer'),
    'dinov2': vit(
        'VisionTransformer', patch_size=8, layer_scale_init_value=0.1
    ),
    'dinov2-g': vit(
        'VisionTransformer',
        layer_scale_init_value=0.1,
        layer_cfgs=dict(ffn_type='swiglu_fused'),
    ),
    'clip': vit(
        'VisionTransformer',
        pre_norm=True,
        out_type='raw',
        layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')),
    ),
    'class token': vit('VisionTransformer', out_type='cls_token'),
    'mean': vit('VisionTransformer', out_type='avg_featmap', final_norm=False),
    'deit3': vit('DeiT3'),
    'distilled': vit('DistilledVisionTransformer'),
    'beit': vit('BEiTViT'),
    'beit, shared bias': vit(
        'BEiTViT',
        out_type='avg_featmap',
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
        use_abs_pos_emb=True,
    ),
    'eva02': vit('ViTEVA02', sub_ln=True),
    'sam': vit(
        'ViTSAM',
        arch=SAM_ARCH,
        window_size=3,
        out_channels=16,
        out_type='raw',
    ),
    'sam, no neck': vit(
        'ViTSAM', arch=SAM_ARCH, window_size=3, out_channels=0
    ),
    'mmseg vit': seg_vit('VisionTransformer'),
    'mmseg vit, class token': seg_vit(
        'VisionTransformer',
        output_cls_token=True,
        final_norm=True,
        pre_norm=True,
    ),
    'mmseg vit, none': seg_vit(
        'VisionTransformer', out_indices=3, with_cls_token=False
    ),
    'mmseg beit': seg_vit('BEiT', final_norm=True),
    'mmseg mae': seg_vit('MAE'),
}
OTHERS = {
    'hivit': dict(
        type='mmpretrain.HiViT',
        arch=dict(embed_dims=64, depths=[1, 1, 8], num_heads=4),
        img_size=64,
        out_indices=[7],
        layer_scale_init_value=0.1,
    ),
    'swin': swin('SwinTransformer', arch=SWIN_ARCH),
    'swin of mmdet': dict(
        type='mmdet.SwinTransformer',
        embed_dims=32,
        depths=[2, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
    ),
    'swin of mmseg': dict(
        type='mmseg.SwinTransformer',
        embed_dims=32,
        depths=[2, 1],
        num_heads=[1, 2],
        strides=(4, 2),
        out_indices=(0, 1),
    ),
    'swin v2': swin('SwinTransformerV2', arch=V2_ARCH),
    'swin v2, cut': swin(
        'SwinTransformerV2',
        arch=dict(V2_ARCH, extra_norm_every_n_blocks=2),
        out_indices=(0, 1),
    ),
    'convnext': convnext(),
    'convnext v2': convnext(
        out_indices=[1, 2],
        use_grn=True,
        linear_pw_conv=False,
        layer_scale_init_value=0.0,
    ),
    'convnext, pooled': convnext(out_indices=[3], gap_before_final_norm=True),
    'pvt': dict(
        type='mmdet.PyramidVisionTransformer',
        num_layers=[2, 1, 2, 1],
        embed_dims=16,
    ),
    'pvtv2': dict(
        type='mmdet.PyramidVisionTransformerV2',
        num_layers=[2, 1, 2, 1],
        embed_dims=16,
        out_indices=(1, 2, 3),
    ),
    'mit': dict(
        type='mmseg.MixVisionTransformer',
        embed_dims=16,
        num_layers=[1, 2, 1, 2],
    ),
    'pcpvt': dict(TWINS, type='mmseg.PCPVT', out_indices=(0, 1, 2)),
    'svt': dict(
        TWINS,
        type='mmseg.SVT',
        out_indices=(0, 1, 2),
        windiow_sizes=[4, 4, 4],
    ),
    'pcpvt of mmpretrain': dict(
        type='mmpretrain.PCPVT', arch=PRETRAIN_TWINS, out_indices=(0, 1, 2, 3)
    ),
    'svt of mmpretrain': dict(
        type='mmpretrain.SVT',
        arch=dict(PRETRAIN_TWINS, window_sizes=[4, 4, 4, 4]),
        out_indices=(0, 1, 2, 3),
        norm_after_stage=True,
    ),
    'mscan': dict(
        type='mmseg.MSCAN',
        embed_dims=[16, 32, 64, 128],
        depths=[1, 2, 1, 1],
        norm_cfg=dict(type='BN'),
    ),
    'timm convnext': timm('convnext_atto', out_indices=(0, 1, 2, 3)),
    'timm poolformer': timm('poolformer_s12'),
    'timm swin': timm(
        'swin_tiny_patch4_window7_224',
        img_size=64,
        window_size=4,
        depths=(2, 1, 2, 1),
        embed_dim=24,
    ),
    'timm vit': timm('vit_tiny_patch16_224', img_size=64, depth=4),
    'timm deit': timm('deit_tiny_patch16_224', img_size=64, depth=4),
    'timm beit': timm(
        'beit_base_patch16_224',
        img_size=64,
        depth=4,
        embed_dim=48,
        num_heads=4,
        out_indices=(1, 3),
    ),
    'timm eva02': timm('eva02_tiny_patch14_224', img_size=56, depth=4),
    'dinov3': dict(
        TINY_TIMM, type='e3va_mm.DINOv3ViT', arch='small', mlp_ratio=2
    ),
    'timm vit, ours': dict(
        TINY_TIMM, type='e3va_mm.TimmViT', model_name='vit_tiny_patch16_224'
    ),
    'hiera': dict(
        HIERA,
        type='e3va_mm.TimmHiera',
        model_name='hiera_tiny_224',
        img_size=64,
    ),
    'hiera, windows': dict(
        HIERA, type='e3va_mm.TimmHiera', model_name='hiera_small_abswin_256'
    ),
    'hiera of sam 2': dict(
        HIERA,
        type='e3va_mm.TimmHiera',
        model_name='sam2_hiera_tiny',
        global_att_blocks=(4,),
    ),
    'timm dinov2, registers': timm(
        'vit_small_patch14_reg4_dinov2',
        img_size=56,
        depth=4,
        out_indices=(1, 3),
    ),
}
CASES = {**VITS, **OTHERS}
# The size of the image, where it is not 96 x 64: those that are made for one
# size, or whose patches ask for it.
SIZES = {
    'dinov2': (40, 64),
    'timm eva02': (56, 56),
    'timm dinov2, registers': (56, 56),
    **dict.fromkeys(
        ['beit', 'beit, shared bias', 'deit3', 'distilled', 'mmseg beit']
        + ['mmseg mae', 'hivit', 'timm swin', 'timm vit', 'timm deit']
        + ['timm beit'],
        (64, 64),
    ),
}
# timm's Swin gives (B, H, W, C), which no neck takes; ours gives maps.
CHANNELS_LAST = {'timm swin'}


def image_for(name, batch=2):
    return torch.randn(batch, 3, *SIZES.get(name, (96, 64)))


TIMM = ('TIMMBackbone', 'TimmViT', 'DINOv3ViT', 'TimmHiera')


def need(config):
    """Skip where the package of a stock class is missing."""
    package = config['type'].partition('.')[0]
    pytest.importorskip(package)
    if config['type'].partition('.')[2] in TIMM:
        pytest.importorskip('timm')


def drawn(module, seed=0):
    """``module`` with parameters and running statistics drawn."""
    buffers = {k: v.clone() for k, v in module.named_buffers()}
    randomised(module, seed)
    for name, value in module.named_buffers():
        value.copy_(buffers[name])
        if 'running' in name:
            value.add_(torch.rand_like(value))
    return module


def build_stock(name, seed=0):
    need(CASES[name])
    stock = drawn(MODELS.build(copy.deepcopy(CASES[name])), seed)
    stock.eval()
    return stock


def build_ours(name, tuner=None, **kwargs):
    """A tuned backbone; E3VA of rank 4 unless its tuner says otherwise."""
    need(CASES[name])
    tuner = {**(tuner or {}), **kwargs.pop('side_path', {})}
    if 'type' not in tuner:
        tuner.setdefault('rank', 4)
    ours = MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=copy.deepcopy(CASES[name]),
            allow_random_trunk=True,
            tuner=tuner,
            **kwargs,
        )
    )
    ours.init_weights()
    return ours


def ours_and_stock(name, **kwargs):
    """A backbone of ours and the stock one with the same weights."""
    stock = build_stock(name)
    ours = build_ours(name, **kwargs)
    ours.load_state_dict(copy.deepcopy(stock.state_dict()), strict=False)
    return ours, stock


def flat(outputs):
    """All tensors of some outputs."""
    found = []
    for value in outputs:
        found += value if isinstance(value, (tuple, list)) else [value]
    return found


def stock_outputs(name, stock, image):
    with torch.no_grad():
        outputs = flat(stock(image))
    if name in CHANNELS_LAST:
        outputs = [o.permute(0, 3, 1, 2) for o in outputs]
    return outputs


def awake(ours, std=0.1):
    """Adapters that add something; at the start they add nothing."""
    with torch.no_grad():
        for name, parameter in ours.tuner.named_parameters():
            if parameter.ndim in (2, 3) and not name.endswith('bias'):
                parameter.normal_(std=std)
    return ours
