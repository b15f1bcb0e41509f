"""One pass of a trunk feeds side paths that were tuned apart."""

import pytest
import torch

from e3va_mm.backbones.trunk_pass import run_trunk, trunk_difference
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.families import FAMILIES
from tests.adapted_models import HEADS, trained, trunk_file
from tests.helpers import build_e3va
from tests.trunk_cases import CASES, awake, image_for, need


@pytest.fixture(params=HEADS)
def tuned(request, tmp_path):
    """Three backbones that share a trunk, and their outputs without that."""
    name = request.param
    source = trunk_file(tmp_path, name)
    options = (dict(), dict(taps=['attn']), dict(save_taps='recompute'))
    backbones = [trained(name, source, **each).backbone for each in options]
    image = image_for(name)
    alone = [backbone(image) for backbone in backbones]
    for backbone in backbones[1:]:
        backbone.share_trunk(backbones[0])
    return backbones, image, alone


def test_outputs_are_those_of_each_alone(tuned):
    backbones, image, alone = tuned
    for ours, theirs in zip(run_trunk(backbones, image), alone, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(alone[0][-1], alone[1][-1])


def test_each_can_have_pictures_of_its_own(tuned):
    backbones, image, alone = tuned
    more = torch.cat((image, image.flip(0), image[:1]))
    size = len(image)
    rows = [slice(0, size), slice(size, 2 * size), slice(2 * size, None)]
    outputs = run_trunk(backbones, more, rows)
    wanted = [alone[0], backbones[1](image.flip(0)), backbones[2](image[:1])]
    for ours, theirs in zip(outputs, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    outputs[2][0].sum().backward()  # whose taps come again


def gradients(backbone, outputs):
    backbone.zero_grad()
    torch.stack([each.square().mean() for each in outputs]).sum().backward()
    return {
        name: value.grad
        for name, value in backbone.named_parameters()
        if value.requires_grad
    }


def test_gradients_are_those_of_each_alone(tuned):
    backbones, image, alone = tuned
    apart = [
        gradients(backbone, outputs)
        for backbone, outputs in zip(backbones, alone, strict=True)
    ]
    together = [
        gradients(backbone, outputs)
        for backbone, outputs in zip(
            backbones, run_trunk(backbones, image), strict=True
        )
    ]
    for ours, theirs in zip(together, apart, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


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
    for ours, theirs in zip(
        run_trunk([other, one], image)[1], alone, strict=True
    ):
        assert torch.equal(ours, theirs)
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
    one(image), other(image)
    assert torch.equal(one.state_dict()[weight], doubled[weight])


def plain(out_indices, layout=None, **options):
    need(CASES['vit'])
    config = dict(CASES['vit'], **{'out_indices': out_indices, **options})
    return MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=config,
            layout=layout,
            side_path=dict(rank=4),
            allow_random_trunk=True,
        )
    )


def test_plain_trunks_with_outputs_at_other_blocks():
    one, other = plain((0, 1)), plain((1,))
    one.init_weights()
    torch.manual_seed(0)
    awake(one)
    awake(other)
    other.share_trunk(one)
    image = image_for('vit')
    for order in ([one, other], [other, one]):
        alone = [backbone(image) for backbone in order]
        assert [len(each) for each in alone] == [
            len(b.out_stages) for b in order
        ]
        for ours, theirs in zip(run_trunk(order, image), alone, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)


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
        (dict(side_path=dict(trunk_compute='bf16')), 'trunk_compute is'),
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


def test_blocks_that_no_layout_cuts_off_are_counted():
    name = 'mmpretrain.VisionTransformer'
    layout = FAMILIES[name]._replace(cut=None)._asdict()
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
        side_path=dict(trunk_chunk=64, trunk_drop_path=0.1),
    )
    assert trunk_difference(one, other) is None


def test_training_beside_a_random_trunk_is_refused():
    backbones = [build_e3va(), build_e3va(allow_random_trunk=False)]
    backbones[1].share_trunk(backbones[0])
    with pytest.raises(ConfigError, match='pre-trained weights in the frozen'):
        run_trunk(backbones, torch.randn(1, 3, 64, 64))
