"""Hiera and that of SAM 2, of timm, behind our class, and their files."""

import re

import pytest
import torch

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from tests.helpers import randomised

pytest.importorskip('torchvision')
timm = pytest.importorskip('timm')
SIZES = dict(embed_dim=16, stages=(1, 2, 2, 1))
HIERA = ('hiera_tiny_224', 'hiera_small_abswin_256')
SAM2 = 'sam2_hiera_tiny'


def own(name, size=None):
    """Arguments that are not those of all."""
    if name == SAM2:
        return dict(global_att_blocks=(4,))
    return dict(img_size=size) if size else {}


def theirs_of(name, size):
    sizes = dict(SIZES, **own(name, size))
    return randomised(timm.create_model(name, **sizes)).eval()


def ours_with(name, state, tmp_path, **kwargs):
    path = tmp_path / 'file.pth'
    torch.save(state, path)
    ours = MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=dict(
                SIZES,
                type='e3va_mm.TimmHiera',
                model_name=name,
                **own(name) | kwargs,
            ),
            tuner=dict(rank=4),
            init_cfg=dict(type='Pretrained', checkpoint=str(path)),
        )
    )
    ours.init_weights()
    return ours.eval()


def timms(state, name):
    return state


def metas(state, name):
    """Meta's names, and what else its files hold."""
    if name == SAM2:
        renamed = {
            f'image_encoder.trunk.{key}': value
            for key, value in state.items()
            if not key.startswith('head.')
        }
        for old, new in (('fc1', 'layers.0'), ('fc2', 'layers.1')):
            renamed = {k.replace(old, new): v for k, v in renamed.items()}
        return dict(model={**renamed, 'maskmem_tpos_enc': torch.zeros(3)})
    renamed = {
        re.sub('^head.norm', 'encoder_norm', key): value
        for key, value in state.items()
        if not key.startswith('head.fc.')
    }
    renamed |= {'mask_token': torch.zeros(1, 1, 8)}
    renamed |= {'decoder_blocks.0.norm1.weight': torch.ones(8)}
    renamed |= {'multi_scale_fusion_heads.0.weight': torch.ones(8)}
    return dict(model_state=renamed)


@pytest.mark.parametrize('names', [timms, metas])
@pytest.mark.parametrize('size', [(64, 64), (96, 64)])
@pytest.mark.parametrize('name', [*HIERA, SAM2])
def test_outputs_equal_those_of_timm(name, size, names, tmp_path):
    theirs = theirs_of(name, size)
    state = names(theirs.state_dict(), name)
    ours = ours_with(name, state, tmp_path, **own(name, size))
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        # Of another size in between.
        ours(torch.randn(1, 3, 32, 96))
        found = ours(image)
        expected = theirs.forward_intermediates(image, intermediates_only=True)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', [HIERA[1], SAM2])
def test_one_trunk_takes_images_of_all_sizes(name, tmp_path):
    """As one of timm that is made for the size, whose positions fit it."""
    state = theirs_of(name, (64, 64)).state_dict()
    ours = ours_with(name, state, tmp_path)
    theirs = theirs_of(name, (64, 128))
    theirs.load_state_dict(state)
    image = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        expected = theirs.forward_intermediates(image, intermediates_only=True)
        for value, reference in zip(ours(image), expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


def test_a_file_of_another_size_is_told(tmp_path):
    state = theirs_of(SAM2, None).state_dict()
    with pytest.raises(CheckpointError, match='embed_dims=16, num_layers=6'):
        ours_with(SAM2, state, tmp_path, embed_dim=32)


@pytest.mark.parametrize('name', [HIERA[0], SAM2])
def test_an_image_of_part_windows_is_refused(name):
    trunk = dict(SIZES, type='e3va_mm.TimmHiera', model_name=name)
    tuner = dict(rank=4)
    ours = MODELS.build(
        dict(type='e3va_mm.E3VABackbone', trunk=trunk, tuner=tuner)
    )
    with pytest.raises(ConfigError, match='`pad_size_divisor=32`'):
        ours.eval()(torch.randn(1, 3, 64, 48))


def test_another_model_is_refused():
    trunk = dict(type='e3va_mm.TimmHiera', model_name='vit_tiny_patch16_224')
    with pytest.raises(ConfigError, match='is a VisionTransformer'):
        MODELS.build(dict(type='e3va_mm.E3VABackbone', trunk=trunk))
