"""A step needs its device alone, waits for nothing, and launches few kernels.

Shown on the meta device, whose tensors have no values: what asks for one
fails, and here so does what touches a tensor left on another device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e3va_mm.measure.gpu_model import count_launches
from e3va_mm.registry import MODELS
from e3va_mm.tuners.e3va.kept_taps import TAP_CODECS
from e3va_mm.tuners.e3va.presets import PRESETS
from tests.helpers import SWIN, build_e3va
from tests.test_tuners.cases import TUNERS
from tests.trunk_cases import CASES, build_ours, flat, image_for

META = torch.device('meta')
KINDS = ('swin of mmseg', 'dinov2')
# Of cases that differ in their outputs alone, one.
FAMILIES = {
    (case['type'], case.get('model_name'), str(case.get('layer_cfgs'))): name
    for name, case in CASES.items()
}
BESIDE = {
    'E3VA, no norms': dict(train_output_norms=False),
    'E3VA, linear': dict(downsampling='linear', rank=4),
    'E3VA, one tap': dict(taps=['ffn'], rank=4),
    'E3VAMix': dict(type='E3VAMix', width=8),
    'NoSidePath': dict(type='NoSidePath'),
    'in parts': dict(trunk_chunk=50),
    'drop path': dict(trunk_drop_path=0.5),
}
FP16 = dict(trunk_compute='fp16', trunk_weights='fp16')
TRUNK_ALONE = dict(type='NoSidePath', train_output_norms=False, **FP16)


class OneDevice(TorchDispatchMode):
    """Refuses tensors that are on another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.device != META:
                raise AssertionError(f'{func} on {value.device}')
        return result


# What stock code makes on the host at each pass.
ON_HOST = {'dinov3': 'timm makes the coordinates of its angles there'}


def step(ours, image):
    """Forward and backward; before it what is made once for a size."""
    ours.to(META).train()
    image = image.to(META)
    with torch.no_grad():
        ours(image)
    with OneDevice():
        outputs = [o for o in flat(ours(image)) if o.requires_grad]
        if outputs:
            torch.autograd.backward(
                outputs, [torch.empty_like(o) for o in outputs]
            )
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, name


@pytest.mark.parametrize('name', FAMILIES.values())
def test_every_family_of_trunks(name, request):
    if name in ON_HOST:
        mark = pytest.mark.xfail(reason=ON_HOST[name], raises=AssertionError)
        request.applymarker(mark)
    step(build_ours(name), image_for(name, batch=1))


@pytest.mark.parametrize('tuner', TUNERS)
@pytest.mark.parametrize('name', KINDS)
def test_every_tuner_inside(name, tuner):
    ours = build_ours(name, tuner=dict(TUNERS[tuner]))
    step(ours, image_for(name, batch=1))


@pytest.mark.parametrize('tuner', BESIDE)
def test_every_tuner_beside(tuner):
    name = KINDS[0]
    ours = build_ours(name, tuner=dict(BESIDE[tuner]))
    step(ours, image_for(name, batch=1))


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize(
    'options',
    [dict(preset=preset) for preset in PRESETS]
    + [dict(save_taps=mode) for mode in TAP_CODECS]
    + [dict(type='E3VAMix', width=8, preset='lean')],
    ids=lambda options: '-'.join(map(str, options.values())),
)
def test_every_preset_and_way_to_keep_taps(name, options):
    step(build_ours(name, tuner=dict(options)), image_for(name, batch=1))


def test_autocast_is_off_where_there_is_none():
    ours, image = build_ours(KINDS[0]), image_for(KINDS[0], batch=1)
    with torch.autocast('cpu', torch.bfloat16):
        step(ours, image)
        outputs = ours(image.to(META))
    assert {o.dtype for o in outputs} == {torch.float32}


def test_what_is_left_behind_is_seen():
    with OneDevice(), pytest.raises(AssertionError, match='on cpu'):
        torch.zeros(2)
    with pytest.raises(RuntimeError, match='meta'):
        bool(torch.zeros(1, device=META))


# -- launches -----------------------------------------------------------------


def trunk_launches(*sizes, **kwargs):
    """Kernels and operations of a frozen Swin at some sizes of image."""
    ours = build_e3va(tuner=TRUNK_ALONE, **kwargs)
    ours.init_weights()
    for size in sizes:
        counted = count_launches(ours, torch.empty(1, 3, *size))
        yield counted.kernels, counted.ops


def test_launches_of_a_frozen_swin():
    """The stock Swin-L: 931 kernels and 2,615 operations."""
    narrow = dict(SWIN['l'], embed_dims=24, num_heads=(3, 6, 12, 24))
    padded, whole = trunk_launches((800, 1216), (896, 1120), **narrow)
    assert padded == (478, 1057)
    # Maps that are whole windows are not padded.
    assert whole == (478 - 24, 1057 - 24)


def test_a_gpu_splits_no_stage_of_swin_l_at_a_usual_size():
    one = dict(depths=(2,), num_heads=(6,), out_indices=(0,), strides=(4,))
    sizes = (800, 1216), (2400, 1216)
    narrow, _ = trunk_launches(*sizes, **one, embed_dims=24)
    usual, tall = trunk_launches(*sizes, **one, embed_dims=192)
    assert usual == narrow < tall


HALF = dict(FP16, compute='fp16')


@pytest.mark.parametrize(
    'tuner, kernels, ops',
    [
        (HALF, 917, 2552),
        (dict(preset='lean'), 1099, 2694),
        (dict(type='E3VAMix', preset='lean'), 1400, 3023),
    ],
    ids=['exact', 'lean', 'mix'],
)
def test_launches_of_a_step_of_swin_l(tuner, kernels, ops, without_values):
    """Forward and backward; full fine-tuning: 1,888 and 5,362."""
    ours = build_e3va(**SWIN['l'], tuner=tuner)
    counted = count_launches(ours, torch.empty(1, 3, 800, 1216))
    assert (counted.kernels, counted.ops) == (kernels, ops)


def test_launches_of_a_step_of_dinov2_b(without_values):
    """The stock frozen forward pass: 148."""
    dinov2 = dict(img_size=518, patch_size=14, arch='base', out_indices=[11])
    ours = MODELS.build(
        dict(
            type='e3va_mm.E3VAVisionTransformer',
            trunk_type='mmpretrain.VisionTransformer',
            layer_scale_init_value=1e-5,
            out_type='featmap',
            allow_random_trunk=True,
            **dinov2,
        )
    )
    counted = count_launches(ours, torch.empty(1, 3, 518, 518))
    assert (counted.kernels, counted.ops) == (256, 845)
