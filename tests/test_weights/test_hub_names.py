"""Files of transformers give what transformers computes with them.

hub_reference.json holds the names that its files have and what it computes
with weights that are drawn again here.
"""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import save_file

# Before what imports torchvision.
from e3va_mm.errors import CheckpointError
from e3va_mm.registry import MODELS
from tests.test_weights.hub_reference import FILE, drawn, image_of, kept

REFERENCE = json.loads(FILE.read_text())
ARCH = dict(embed_dims=32, num_layers=3, num_heads=4, feedforward_channels=64)
SCALED = dict(layer_scale_init_value=1e-5)
STAGES = dict(embed_dims=8, num_layers=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])
SWIN = dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8])


def eps(value):
    return dict(norm_cfg=dict(type='LN', eps=value))


def vit(kind='mmpretrain.VisionTransformer', **kwargs):
    own = dict(img_size=32, patch_size=4, out_indices=[1, 2], final_norm=True)
    own |= dict(type='e3va_mm.E3VAVisionTransformer', trunk_type=kind)
    if kind.startswith('mmpretrain'):
        own |= dict(arch=ARCH)
    else:
        own |= dict(embed_dims=32, num_layers=3, num_heads=4, mlp_ratio=2)
    own |= kwargs
    return {key: value for key, value in own.items() if value is not None}


def trunk(kind, **kwargs):
    return dict(type='e3va_mm.E3VABackbone', trunk=dict(type=kind, **kwargs))


def timm_vit(model_name, img_size=32, **kwargs):
    sizes = dict(embed_dim=32, depth=3, num_heads=4, mlp_ratio=2)
    own = dict(sizes, patch_size=4, img_size=img_size, out_indices=[1, 2])
    return trunk('e3va_mm.TimmViT', model_name=model_name, **own, **kwargs)


def dinov3(arch):
    own = timm_vit('')['trunk']
    del own['model_name']
    return dict(
        type='e3va_mm.E3VABackbone',
        trunk=dict(own, type='e3va_mm.DINOv3ViT', arch=arch),
    )


def hiera(model_name, **kwargs):
    own = dict(embed_dim=8, stages=(1, 2, 1, 1), **kwargs)
    return trunk('e3va_mm.TimmHiera', model_name=model_name, **own)


def convnext(**kwargs):
    return trunk(
        'mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 2, 1, 1], channels=[8, 16, 32, 64]),
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
        **kwargs,
    )


# The case of the reference, and a backbone of ours that reads its file.
OURS = [
    ('dinov2', vit(**SCALED)),
    (
        'dinov2',
        vit('mmseg.VisionTransformer', patch_bias=True, **eps(1e-6)),
    ),
    (
        'dinov2 giant',
        vit(
            arch=dict(ARCH, feedforward_channels=64),
            layer_cfgs=dict(ffn_type='swiglu_fused'),
            **SCALED,
        ),
    ),
    ('dinov2, registers', timm_vit('vit_small_patch14_reg4_dinov2')),
    ('dinov3', dinov3('base')),
    ('dinov3, gated', dinov3('huge_plus')),
    (
        'siglip, normed',
        timm_vit('vit_base_patch16_siglip_224', act_layer='gelu_tanh'),
    ),
    ('aimv2', timm_vit('aimv2_large_patch14_224')),
    ('vit', vit(**eps(1e-12))),
    ('vit, classifier', vit(**eps(1e-12))),
    ('mae', vit(**eps(1e-12))),
    (
        'clip',
        vit(
            pre_norm=True,
            layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')),
            **eps(1e-5),
        ),
    ),
    (
        'siglip',
        vit(
            with_cls_token=False,
            layer_cfgs=dict(act_cfg=dict(type='GELU', approximate='tanh')),
        ),
    ),
    (
        'siglip 2, any size',
        vit(
            with_cls_token=False,
            layer_cfgs=dict(act_cfg=dict(type='GELU', approximate='tanh')),
        ),
    ),
    ('beit', vit('mmpretrain.BEiTViT', final_norm=False, **eps(1e-12))),
    ('beit', vit('mmseg.BEiT', final_norm=False, **eps(1e-12))),
    (
        'sam',
        vit(
            'mmpretrain.ViTSAM',
            arch=dict(ARCH, global_attn_indexes=[2]),
            window_size=3,
            out_channels=8,
            out_indices=[2],
            final_norm=None,
        ),
    ),
    ('hiera', hiera('hiera_tiny_224', img_size=64, mlp_ratio=2)),
    ('hiera, classifier', hiera('hiera_tiny_224', img_size=64, mlp_ratio=2)),
    ('sam 2', hiera('sam2_hiera_tiny', global_att_blocks=(2,))),
    (
        'swin',
        dict(
            SWIN,
            type='e3va_mm.E3VASwinTransformer',
            strides=(2, 2, 2, 2),
            patch_size=2,
            window_size=4,
        ),
    ),
    (
        'swin',
        trunk(
            'mmpretrain.SwinTransformer',
            arch=SWIN,
            img_size=64,
            patch_size=2,
            window_size=4,
            pad_small_map=True,
            out_indices=(0, 1, 2),
        ),
    ),
    (
        'swin v2',
        trunk(
            'mmpretrain.SwinTransformerV2',
            arch=dict(SWIN, extra_norm_every_n_blocks=0),
            img_size=64,
            patch_size=2,
            window_size=4,
            pad_small_map=True,
            out_indices=(0, 1, 2),
        ),
    ),
    ('convnext', convnext()),
    ('convnext v2', convnext(layer_scale_init_value=0.0, use_grn=True)),
    ('dinov3 convnext', convnext()),
    (
        'pvt v2',
        trunk(
            'mmdet.PyramidVisionTransformerV2', mlp_ratios=[2] * 4, **STAGES
        ),
    ),
    ('segformer', trunk('mmseg.MixVisionTransformer', mlp_ratio=2, **STAGES)),
]


def name_of(value):
    if isinstance(value, str):
        return value
    kind = value.get('trunk', value)
    return kind.get('trunk_type', kind['type']).rpartition('.')[2]


def built(config, checkpoint):
    scope = re.findall(r'mm\w+(?=\.)', str(config))
    for package in scope:
        if package != 'e3va_mm':
            pytest.importorskip(package)
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    config = copy.deepcopy(config) | dict(tuner=dict(rank=2))
    ours = MODELS.build(dict(config, init_cfg=init_cfg))
    ours.init_weights()
    return ours.eval()


@pytest.mark.parametrize(('case', 'config'), OURS, ids=name_of)
def test_outputs_equal_those_of_transformers(case, config, tmp_path):
    reference = REFERENCE[case]
    path = tmp_path / 'model.safetensors'
    save_file(drawn(reference['shapes']), path)
    ours = built(config, path)
    for result in reference['results']:
        with torch.no_grad():
            outputs = [kept(o) for o in ours(image_of(result['size']))]
        for found, expected in zip(outputs, result['outputs'], strict=False):
            assert found['shape'] == expected['shape']
            torch.testing.assert_close(
                torch.tensor(found['values']),
                torch.tensor(expected['values']),
                atol=1e-5,
                rtol=1e-5,
            )


@pytest.mark.parametrize(
    ('case', 'kind', 'arch'),
    [
        ('dinov2', 'VisionTransformer', 'small'),
        ('convnext', 'ConvNeXt', 'tiny'),
        ('swin v2', 'SwinTransformerV2', 'tiny'),
    ],
)
def test_an_error_names_the_arch_that_the_file_fits(
    case, kind, arch, tmp_path, monkeypatch
):
    """A file of another arch of the same class is told apart."""
    path = tmp_path / 'model.safetensors'
    save_file(drawn(REFERENCE[case]['shapes']), path)
    backbones = pytest.importorskip('mmpretrain.models.backbones')
    sizes = dict(
        dinov2=ARCH,
        convnext=dict(depths=[1, 2, 1, 1], channels=[8, 16, 32, 64]),
    ).get(case, SWIN)
    cls = getattr(backbones, kind)
    name = 'arch_settings' if kind == 'ConvNeXt' else 'arch_zoo'
    zoo = {**getattr(cls, name), 'right': sizes}
    monkeypatch.setattr(cls, name, zoo)
    with pytest.raises(CheckpointError) as error:
        built(trunk(f'mmpretrain.{kind}', arch=arch), path)
    assert " The file's is `arch='right'`. " in str(error.value)
