"""The families of stock backbones that a side path knows.

Each is one row; a config extends the table by ``layout`` of
:class:`~e3va_mm.models.E3VABackbone`. Taps are branch outputs before the
residual addition, after layer scale (paper Sec. 3).
"""

from collections.abc import Mapping
from dataclasses import replace

from e3va_mm.trunks.layout import Layout

# A branch that ends in a module of its own, or in one that both share.
MMCV_BRANCHES = dict(attn='attn.dropout_layer', ffn='ffn.dropout_layer')
SHARED_BRANCHES = dict(attn='drop_path#1', ffn='drop_path#2')

_VIT = Layout(
    blocks='layers.{block}',
    taps=dict(attn='attn', ffn='ffn.dropout_layer'),
    channels='ln1',
    output_norm='ln1?',
    embedding=('patch_embed',),
    extra_tokens='num_extra_tokens?',  # mmseg's say it another way
    cut='layers',
)
_SWIN = Layout(
    blocks='stages.{stage}.blocks.{block}',
    taps=dict(attn='attn', ffn='ffn.dropout_layer'),
    output_norm='norm{stage}',
    downsampling=('stages.{stage}.downsample',),
    embedding=('patch_embed',),
    cut='stages',
    reads=('norm2',),
)
_PYRAMID = Layout(  # PVT, PVTv2, MiT
    blocks='layers.{stage}.1.{block}',
    taps=MMCV_BRANCHES,
    output_norm='layers.{stage}.2',
    norm_goes_on=True,
    downsampling=('layers.{stage}.2', 'layers.{next}.0'),
    embedding=('layers.0.0',),
    cut='layers',
)
_TWINS = Layout(
    # A position encoding follows the first block, so that a stage needs two.
    blocks='layers.{stage}.{block}',
    taps=SHARED_BRANCHES,
    output_norm='norm_list.{stage}?',
    norm_goes_on=True,
    downsampling=('norm_list.{stage}?', 'patch_embeds.{next}'),
    embedding=('patch_embeds.0',),
    cut='layers',
)
_PRETRAIN_TWINS = replace(
    _TWINS,
    blocks='stages.{stage}.{block}',
    output_norm='norm_after_stage{stage}',
    downsampling=('norm_after_stage{stage}', 'patch_embeds.{next}'),
    cut='stages',
)
_OWN_TIMM_VIT = Layout(
    blocks='model.blocks.{block}',
    taps=dict(attn='drop_path1', ffn='drop_path2'),
    output_norm='norm{stage}',
    embedding=('model.patch_embed',),
    extra_tokens='model.num_prefix_tokens',
    cut='model.blocks',
)
_TIMM_VIT = Layout(
    blocks='timm_model.model.blocks.{block}',
    taps=dict(attn='drop_path1', ffn='drop_path2'),
    embedding=('timm_model.model.patch_embed',),
    extra_tokens='timm_model.model.num_prefix_tokens',
)

# By the class that registers under this name, of whatever framework.
FAMILIES: Mapping[str, Layout] = {
    # Plain ViTs; those of mmseg call the same things by other names.
    'mmpretrain.VisionTransformer': _VIT,
    'mmpretrain.BEiTViT': replace(_VIT, taps=SHARED_BRANCHES),
    'mmpretrain.ViTEVA02': replace(
        _VIT, taps=SHARED_BRANCHES, channels='norm1'
    ),
    'mmpretrain.ViTSAM': replace(_VIT, channels_last=True, output_norm=None),
    'mmpretrain.HiViT': Layout(
        blocks='blocks.{block}',
        taps=SHARED_BRANCHES,
        embedding=('patch_embed',),
    ),
    'mmseg.VisionTransformer': replace(_VIT, taps=MMCV_BRANCHES),
    'mmseg.BEiT': replace(_VIT, taps=SHARED_BRANCHES),
    'mmseg.MAE': replace(_VIT, taps=SHARED_BRANCHES),
    # With stages.
    'mmdet.SwinTransformer': _SWIN,
    'mmseg.SwinTransformer': _SWIN,
    'mmpretrain.SwinTransformer': _SWIN,
    'mmpretrain.SwinTransformerV2': Layout(
        blocks='stages.{stage}.blocks.{block}',
        taps=dict(attn='norm1', ffn='norm2'),
        first='attn',
        output_norm='norm{stage}',
        downsampling=('stages.{next}.downsample',),
        embedding=('patch_embed',),
        cut='stages',
    ),
    'mmpretrain.ConvNeXt': Layout(
        blocks='stages.{stage}.{block}',
        taps=dict(branch='drop_path'),
        channels='norm',
        first='depthwise_conv',
        output_norm='norm{stage}',
        downsampling=('downsample_layers.{next}',),
        embedding=('downsample_layers.0',),
        cut='stages',
        pools='gap_before_final_norm',
    ),
    'mmdet.PyramidVisionTransformer': _PYRAMID,
    'mmdet.PyramidVisionTransformerV2': _PYRAMID,
    'mmseg.MixVisionTransformer': _PYRAMID,
    'mmseg.PCPVT': _TWINS,
    'mmseg.SVT': _TWINS,
    'mmpretrain.PCPVT': _PRETRAIN_TWINS,
    'mmpretrain.SVT': _PRETRAIN_TWINS,
    'mmseg.MSCAN': Layout(
        blocks='block{stage}.{block}',
        taps=SHARED_BRANCHES,
        output_norm='norm{stage}',
        norm_goes_on=True,
        downsampling=('norm{stage}', 'patch_embed{next}'),
        embedding=('patch_embed1',),
        first_stage=1,
    ),
    # timm's behind a class of ours.
    'e3va_mm.DINOv3ViT': _OWN_TIMM_VIT,
    'e3va_mm.TimmViT': _OWN_TIMM_VIT,
    'e3va_mm.TimmHiera': Layout(
        # The first block of a stage widens and pools the residual stream.
        blocks='model.blocks.{block}',
        stage_ends='model.stage_ends',
        taps=dict(attn='drop_path1', ffn='drop_path2'),
        channels='norm2',
        channels_last=True,
        embedding=('model.patch_embed',),
        cut='model.blocks',
    ),
    # timm's, behind TIMMBackbone with `features_only=True`, by the beginning
    # of the model's name.
    'timm.convnext': Layout(
        blocks='timm_model.stages_{stage}.blocks.{block}',
        taps=dict(branch='drop_path'),
        channels='norm',
        first='conv_dw',
        downsampling=('timm_model.stages_{next}.downsample',),
        embedding=('timm_model.stem_0', 'timm_model.stem_1'),
    ),
    'timm.poolformer': Layout(
        blocks='timm_model.stages_{stage}.blocks.{block}',
        taps=dict(mixer='layer_scale1', ffn='layer_scale2'),
        downsampling=('timm_model.stages_{next}.downsample',),
        embedding=('timm_model.stem',),
    ),
    'timm.swin': Layout(
        blocks='timm_model.layers_{stage}.blocks.{block}',
        taps=dict(attn='drop_path1', ffn='drop_path2'),
        channels_last=True,
        downsampling=('timm_model.layers_{next}.downsample',),
        embedding=('timm_model.patch_embed',),
    ),
    'timm.vit': _TIMM_VIT,
    'timm.deit': _TIMM_VIT,
    'timm.beit': _TIMM_VIT,
    'timm.eva': _TIMM_VIT,
}

# Those that take the official files of Swin.
SWINS = ('mmdet.SwinTransformer', 'mmseg.SwinTransformer')
# Those whose outputs, position embeddings and files are those of a ViT.
VITS = tuple(
    name
    for name, layout in FAMILIES.items()
    if layout.cut == 'layers' and layout.plain
)

EXAMPLE = """    layout=dict(
        blocks='stages.{stage}.blocks.{block}',
        taps=dict(attn='attn.drop', ffn='ffn.dropout_layer'),
        channels='norm1',
        output_norm='norm{stage}',
        downsampling=['stages.{stage}.downsample'],
    )"""
