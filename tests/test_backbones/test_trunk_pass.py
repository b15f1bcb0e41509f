"""One pass of a trunk feeds side paths that were tuned apart."""

from dataclasses import asdict

import pytest
import torch

from e3va_mm.backbones.trunk_pass import run_trunk, trunk_difference
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.families import FAMILIES
from tests.adapted_models import HEADS, trained, trunk_file
from tests.helpers import build_e3va
from tests.trunk_cases import CASES, awake, image_for, need


def assert_equal(found, expected, **bounds):
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if bounds:
                torch.testing.assert_close(one, other, **bounds)
            else:
                assert torch.equal(one, other)


def gradients(backbone, outputs):
    backbone.zero_grad()
    torch.stack([each.square().mean() for each in outputs]).sum().backward()
    return {
        name: value.grad
        for name, value in backbone.named_parameters()
        if value.requires_grad
    }


@pytest.mark.parametrize('name', HEADS)
def test_outputs_and_gradients_are_those_of_each_alone(name, tmp_path):
    source = trunk_file(tmp_path, name)
    tuners = (dict(), dict(taps=['attn']), dict(save_taps='recompute'))
    backbones = [trained(name, source, **each).backbone for each in tuners]
    image = image_for(name)
    alone = [backbone(image) for backbone in backbones]
    assert not torch.equal(alone[0][-1], alone[1][-1])
    apart = [*map(gradients, backbones, alone)]
    for backbone in backbones[1:]:
        backbone.share_trunk(backbones[0])
    together = run_trunk(backbones, image)
    assert_equal(together, alone)
    for ours, theirs in zip(
        map(gradients, backbones, together), apart, strict=True
    ):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key])
    # Each can have images of its own.
    more = torch.cat((image, image.flip(0), image[:1]))
    size = len(image)
    rows = [slice(0, size), slice(size, 2 * size), slice(2 * size, None)]
    outputs = run_trunk(backbones, more, rows)
    wanted = [alone[0], backbones[1](image.flip(0)), backbones[2](image[:1])]
    assert_equal(outputs, wanted, rtol=1e-5, atol=1e-5)
    outputs[2][0].sum().backward()  # whose taps come again


@pytest.mark.parametrize('stored', [None, 'bf16'])
def test_a_shared_trunk_is_stored_once(stored, tmp_path):
    source = trunk_file(tmp_path, 'swin of mmdet')
    one, other = (
        trained('swin of mmdet', source, trunk_weights=stored).backbone
        for _ in range(2)
    )
    image = image_for('swin of mmdet')
    alone = one(image)
    other.share_trunk(one)
    whole = other.state_dict()
    assert_equal([run_trunk([other, one], image)[1]], [alone])
    weight = 'stages.0.blocks.0.ffn.layers.1.weight'
    assert other.get_parameter(weight) is one.get_parameter(weight)
    # Checkpoints of both hold the weights as they came.
    assert whole[weight].dtype == torch.float32
    assert torch.equal(whole[weight], one.state_dict()[weight])
    # New weights for one are new weights for both.
    doubled = {
        k: v * 2 if v.is_floating_point() else v for k, v in whole.items()
    }
    other.load_state_dict(doubled)
    assert torch.equal(one.state_dict()[weight], doubled[weight])
    assert other.get_parameter(weight) is one.get_parameter(weight)


def plain(out_indices, layout=None, **options):
    need(CASES['vit'])
    return MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=CASES['vit'] | dict(out_indices=out_indices) | options,
            layout=layout,
            tuner=dict(rank=4),
            allow_random_trunk=True,
        )
    )


def test_plain_trunks_with_outputs_at_other_blocks():
    one, other = awake(plain((0, 1))), awake(plain((1,)))
    other.share_trunk(one)
    image = image_for('vit')
    for order in ([one, other], [other, one]):
        alone = [backbone(image) for backbone in order]
        assert [len(each) for each in alone] == [
            len(b.trunk.out_stages) for b in order
        ]
        assert_equal(run_trunk(order, image), alone)


def test_prepared_outputs_are_given_for_that_tensor_alone():
    backbone = build_e3va()
    image = torch.randn(1, 3, 64, 64)
    prepared = (torch.zeros(1),)
    with backbone.given(image, prepared):
        assert backbone(image) is prepared
        assert len(backbone(image.clone())) == 4
    assert len(backbone(image)) == 4


@pytest.mark.parametrize(
    'options, named',
    [
        (dict(window_size=4), 'relative_position_bias_table is (169, 1)'),
        (dict(depths=(2, 1, 1, 1)), 'stages.2.blocks.1'),
        (dict(tuner=dict(trunk_compute='bf16')), 'trunk_compute is'),
        (dict(use_abs_pos_embed=True), 'absolute_pos_embed'),
        (dict(act_cfg=dict(type='ReLU')), 'GELU in one and ReLU'),
    ],
)
def test_another_trunk_is_refused(options, named):
    one, other = build_e3va(), build_e3va(**options)
    assert named in trunk_difference(one, other)
    with pytest.raises(ConfigError, match='with the same trunk, but'):
        other.share_trunk(one)


def test_another_plain_trunk_is_refused():
    one = plain((1,))
    for other, named in (
        (plain((1,), interpolate_mode='bilinear'), 'interpolate_mode is'),
        (plain((0,)), 'layers.1'),
    ):
        assert named in trunk_difference(one, other)
    # Blocks that no layout cuts off are counted.
    layout = asdict(FAMILIES['mmpretrain.VisionTransformer']) | dict(cut=None)
    one, other = (plain(out, layout=layout) for out in ((0,), (1,)))
    assert 'the number of blocks is 1 in one and 2' in (
        trunk_difference(one, other)
    )


def test_what_only_training_knows_is_no_difference():
    one = build_e3va(drop_path_rate=0.0)
    other = build_e3va(
        drop_path_rate=0.3,
        drop_rate=0.1,
        with_cp=True,
        tuner=dict(trunk_chunk=64, trunk_drop_path=0.1),
    )
    assert trunk_difference(one, other) is None


def test_training_beside_a_random_trunk_is_refused():
    backbones = [build_e3va(), build_e3va(allow_random_trunk=False)]
    backbones[1].share_trunk(backbones[0])
    with pytest.raises(ConfigError, match='pre-trained weights in the frozen'):
        run_trunk(backbones, torch.randn(1, 3, 64, 64))
