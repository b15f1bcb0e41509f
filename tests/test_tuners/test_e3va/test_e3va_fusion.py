"""E3VA-Fusion: codes of all streams so far, fused for each output."""

import pytest
import torch
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.autocast import DTYPES
from e3va_mm.trunks import Trunk
from e3va_mm.tuners.token_grid import GridFilters
from tests.test_tuners.cases import loss_of, wake
from tests.trunk_cases import CASES, build_ours, image_for, ours_and_stock

TUNER = dict(type='e3va_mm.E3VAFusion', rank=4)


def to_map(tokens, size):
    return tokens[:, -size[0] * size[1] :].transpose(1, 2).unflatten(2, size)


def streams(ours, image):
    """By stage, the stream behind each block, as the stock block gives it."""
    seen = [[] for _ in ours.trunk.blocks]
    handles = [
        ours.trunk.stock.get_submodule(path).register_forward_hook(
            lambda _, args, output, stage=stage: seen[stage].append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for stage, paths in enumerate(ours.trunk.blocks)
        for path in paths
    ]
    with torch.no_grad():
        outputs = ours(image)
    for handle in handles:
        handle.remove()
    return seen, outputs


@pytest.mark.parametrize('trunk', ['dinov2', 'swin of mmdet'])
def test_it_is_what_its_formula_says(trunk):
    ours = wake(build_ours(trunk, tuner=TUNER)).eval()
    seen, outputs = streams(ours, image_for(trunk))
    codes, tuner = [], ours.tuner
    for stage, (blocks, found) in enumerate(zip(seen, outputs, strict=True)):
        size = tuple(found.shape[-2:])
        own = [
            to_map(F.layer_norm(x, x.shape[-1:]) @ factor, size)
            for x, factor in zip(blocks, tuner.down[stage], strict=True)
        ]
        own = GridFilters.forward(tuner.filters[stage], torch.cat(own, 1))
        codes = [F.adaptive_avg_pool2d(code, size) for code in codes]
        codes.append(F.gelu(own))
        added = tuner.up[str(stage)](torch.cat(codes, 1).flatten(2).mT)
        x = blocks[-1][:, -size[0] * size[1] :]
        expected = x + x.std(-1, keepdim=True) * added
        norm = ours.trunk.output_norm(stage)
        if norm is not None:
            expected = ours.get_submodule(norm)(expected)
        torch.testing.assert_close(
            found, to_map(expected, size), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    'mode, near', [('bf16', 1e-2), ('int8', 2e-2), ('recompute', 1e-5)]
)
@pytest.mark.parametrize('trunk', ['dinov2', 'swin of mmdet'])
def test_gradients_do_not_depend_on_how_taps_are_kept(trunk, mode, near):
    def gradients(mode):
        torch.manual_seed(0)
        ours = wake(build_ours(trunk, tuner=dict(TUNER, save_taps=mode)))
        loss_of(ours.train()(image_for(trunk))).backward()
        return [p.grad for p in ours.tuner.parameters()]

    for a, b in zip(gradients(mode), gradients('exact'), strict=True):
        assert (a - b).norm() <= near * b.norm()


@pytest.mark.parametrize('name', ['fp32', 'bf16'])
def test_codes_are_kept_in_the_type_of_their_products(name):
    ours = wake(build_ours('swin of mmdet', tuner=dict(TUNER, compute=name)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        outputs = ours.train()(image_for('swin of mmdet'))
    tokens = [len(x) * x[0, 0].numel() for x in outputs]
    widths = [4 * len(paths) for paths in ours.trunk.blocks]
    shapes = [*zip(tokens, widths, strict=True)]
    types = [x.dtype for x in kept if tuple(x.shape) in shapes]
    assert len(types) >= len(shapes)
    assert set(types) == {DTYPES[name]}


def test_an_output_reads_stages_without_one(monkeypatch):
    two = dict(CASES['swin of mmdet'], out_indices=(1, 3))
    monkeypatch.setitem(CASES, 'two outputs', two)
    ours = build_ours('two outputs', tuner=TUNER)
    assert [*ours.tuner.up] == ['1', '3']
    widths = [up.in_features for up in ours.tuner.up.values()]
    assert widths == [3 * 4, 6 * 4]


def test_stages_without_a_way_between_them_are_read_alone(monkeypatch):
    monkeypatch.setattr(Trunk, 'highway_goes_on', False)
    ours = build_ours('swin of mmdet', tuner=TUNER)
    depths = [len(paths) for paths in ours.trunk.blocks]
    widths = [up.in_features for up in ours.tuner.up.values()]
    assert widths == [4 * depth for depth in depths]
    loss_of(wake(ours).train()(image_for('swin of mmdet'))).backward()
    assert all(p.grad is not None for p in ours.tuner.parameters())


def test_an_output_does_not_depend_on_how_large_the_stream_is():
    """What trains moves a norm of the output as far on any scale."""
    ours, stock = ours_and_stock('dinov2', tuner=TUNER)
    wake(ours).eval()
    image = image_for('dinov2')

    def moved():
        with torch.no_grad():
            found, without = ours(image)[0], stock(image)[0]
        one, other = (
            F.layer_norm(x.movedim(1, -1), x.shape[1:2])
            for x in (found, without)
        )
        return one - other

    before = moved()
    with torch.no_grad():
        for model in (ours, stock):
            model.pos_embed.mul_(10.0)
            model.patch_embed.projection.weight.mul_(10.0)
            model.patch_embed.projection.bias.mul_(10.0)
            for layer in model.layers[:2]:
                layer.attn.gamma1.weight.mul_(10.0)
                layer.ffn.gamma2.weight.mul_(10.0)
            model.cls_token.mul_(10.0)
    torch.testing.assert_close(moved(), before, atol=1e-3, rtol=1e-3)


def test_a_rank_that_cannot_be():
    with pytest.raises(ConfigError, match='`tuner.rank` should be'):
        build_ours('dinov2', tuner=dict(TUNER, rank=0))
