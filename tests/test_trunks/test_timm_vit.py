"""DINOv3 and other ViTs of timm behind our class, and their files."""

import re

import pytest
import torch
from safetensors.torch import save_file

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from tests.helpers import randomised

pytest.importorskip('torchvision')
timm = pytest.importorskip('timm')
SIZES = dict(embed_dim=32, depth=4, num_heads=4, img_size=64, patch_size=16)
GATED = dict(SIZES, mlp_ratio=2)


def theirs_of(name, **kwargs):
    kwargs = (
        dict(global_pool='', num_classes=0, dynamic_img_size=True) | kwargs
    )
    return randomised(timm.create_model(name, **kwargs)).eval()


def ours_with(trunk, state, tmp_path, **kwargs):
    path = tmp_path / 'file.safetensors'
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    ours = MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=dict(trunk, out_indices=(1, 3)),
            tuner=dict(rank=4),
            init_cfg=dict(type='Pretrained', checkpoint=str(path)),
            **kwargs,
        )
    )
    ours.init_weights()
    return ours.eval()


def check(ours, theirs):
    """Normalised outputs at two sizes."""
    for size in ((64, 64), (48, 96)):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = theirs.forward_intermediates(
                image, indices=[1, 3], norm=True, intermediates_only=True
            )
            found = ours(image)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


def timms(state):
    return state


def without_biases(state):
    """What timm publishes where all biases are zero."""
    return {
        k: v for k, v in state.items() if not k.endswith(('q_bias', 'v_bias'))
    }


def metas(state):
    """Meta's names and what else its files hold."""
    renamed = dict(
        mask_token=torch.zeros(1, 32),
        **{'rope_embed.periods': torch.ones(2)},
        **{'local_cls_norm.weight': torch.ones(32)},
        **{'local_cls_norm.bias': torch.ones(32)},
    )
    names = (
        (r'^reg_token$', 'storage_tokens'),
        (r'gamma_([12])$', r'ls\1.gamma'),
        (r'mlp\.fc1_g\.', 'mlp.w1.'),
        (r'mlp\.fc1_x\.', 'mlp.w2.'),
    )
    gated = any('fc1_g' in key for key in state)
    for key, value in state.items():
        block, _, part = key.rpartition('attn.')
        if part == 'q_bias':
            biases = [state[f'{block}attn.{n}_bias'] for n in 'qv']
            biases.insert(1, torch.ones_like(value))  # which the mask hides
            renamed[f'{block}attn.qkv.bias'] = torch.cat(biases)
            mask = torch.ones(3 * len(value))
            renamed[f'{block}attn.qkv.bias_mask'] = mask
        elif part != 'v_bias':
            for old, new in names:
                key = re.sub(old, new, key)
            if gated:
                key = key.replace('mlp.fc2.', 'mlp.w3.')
            renamed[key] = value
    return renamed


@pytest.mark.parametrize('names', [timms, without_biases, metas])
@pytest.mark.parametrize('arch', ['base', 'huge_plus'])
def test_dinov3_equals_timm(arch, names, tmp_path):
    theirs = theirs_of(f'vit_{arch}_patch16_dinov3_qkvb', **GATED)
    if names is without_biases:
        for key, value in theirs.named_parameters():
            if key.endswith(('q_bias', 'v_bias')):
                value.data.zero_()
    trunk = dict(GATED, type='e3va_mm.DINOv3ViT', arch=arch)
    ours = ours_with(trunk, names(theirs.state_dict()), tmp_path)
    check(ours, theirs)


@pytest.mark.parametrize(
    'name', ['eva02_base_patch14_224', 'vit_base_patch16_siglip_224']
)
def test_other_vits_equal_timm(name, tmp_path):
    theirs = theirs_of(name, **SIZES)
    ours = ours_with(
        dict(SIZES, type='e3va_mm.TimmViT', model_name=name),
        theirs.state_dict(),
        tmp_path,
    )
    check(ours, theirs)


def test_position_embeddings_are_fitted_to_the_image_size(tmp_path):
    name = 'vit_tiny_patch16_224'
    theirs = theirs_of(name, **SIZES)
    trunk = dict(SIZES, type='e3va_mm.TimmViT', model_name=name, img_size=96)
    ours = ours_with(trunk, theirs.state_dict(), tmp_path)
    assert ours.model.pos_embed.shape == (1, 37, 32)


def test_what_it_gives_is_loaded_again(tmp_path):
    theirs = theirs_of('vit_base_patch16_dinov3_qkvb', **GATED)
    trunk = dict(GATED, type='e3va_mm.DINOv3ViT', arch='base')
    ours = ours_with(trunk, theirs.state_dict(), tmp_path)
    again = ours_with(trunk, ours.state_dict(), tmp_path)
    check(again, theirs)


def test_a_file_of_another_arch_is_told(tmp_path):
    theirs = theirs_of('vit_small_patch16_dinov3_qkvb', depth=12)
    trunk = dict(type='e3va_mm.DINOv3ViT', arch='base')
    with pytest.raises(CheckpointError, match="file's is `arch='small'`"):
        ours_with(trunk, theirs.state_dict(), tmp_path)


@pytest.mark.parametrize(
    ('trunk', 'text'),
    [
        (dict(type='DINOv3ViT', arch='tiny'), "one of ['small', "),
        (dict(type='TimmViT', model_name='vit_none'), "model 'vit_none'"),
    ],
)
def test_unknown_models_are_refused(trunk, text):
    trunk = dict(trunk, type=f'e3va_mm.{trunk["type"]}', out_indices=[1])
    with pytest.raises(ConfigError, match=re.escape(text)):
        MODELS.build(dict(type='e3va_mm.E3VABackbone', trunk=trunk))
