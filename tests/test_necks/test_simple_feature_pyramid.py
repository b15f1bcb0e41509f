"""The simple feature pyramid of ViTDet."""

import pytest
import torch
from torch.nn import functional as F

from e3va_mm.errors import ConfigError
from e3va_mm.necks import SimpleFeaturePyramid
from e3va_mm.registry import MODELS

C, OUT = 16, 6


def normed(maps, weight, bias):
    mean = maps.mean(1, keepdim=True)
    variance = (maps - mean).square().mean(1, keepdim=True)
    maps = (maps - mean) / (variance + 1e-6).sqrt()
    return maps * weight[:, None, None] + bias[:, None, None]


def doubled(maps, weight, bias):
    """Each pixel becomes four, one for each place of a 2x2 kernel."""
    batch, _, height, width = maps.shape
    out = maps.new_empty(batch, weight.shape[1], 2 * height, 2 * width)
    for down in range(2):
        for across in range(2):
            out[:, :, down::2, across::2] = (
                torch.einsum('bchw,cd->bdhw', maps, weight[..., down, across])
                + bias[:, None, None]
            )
    return out


def reference(state, maps):
    """ViTDet's four scales, from the paper's description."""
    p = {key: value.double() for key, value in state.items()}

    def twice(x, name):
        return doubled(x, p[f'{name}.weight'], p[f'{name}.bias'])

    large = twice(maps, 'resamplings.0.0')
    large = normed(
        large, p['resamplings.0.1.weight'], p['resamplings.0.1.bias']
    )
    large = twice(
        large * 0.5 * (1 + torch.erf(large / 2**0.5)), 'resamplings.0.3'
    )
    scales = [
        large,
        twice(maps, 'resamplings.1'),
        maps,
        maps.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)),
    ]
    outs = []
    for i, x in enumerate(scales):
        x = torch.einsum(
            'bchw,oc->bohw', x, p[f'convs.{i}.0.weight'][..., 0, 0]
        )
        x = normed(x, p[f'convs.{i}.1.weight'], p[f'convs.{i}.1.bias'])
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        kernel = p[f'convs.{i}.2.weight']
        x = sum(
            torch.einsum(
                'bchw,oc->bohw',
                padded[..., a : a + height, b : b + width],
                kernel[..., a, b],
            )
            for a in range(3)
            for b in range(3)
        )
        outs.append(
            normed(x, p[f'convs.{i}.3.weight'], p[f'convs.{i}.3.bias'])
        )
    return [*outs, outs[-1][..., ::2, ::2]]


def test_outputs_equal_an_independent_reference():
    neck = SimpleFeaturePyramid(C, OUT, num_outs=5).double()
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.normal_()
    maps = torch.randn(2, C, 6, 10, dtype=torch.float64)
    got = neck([torch.zeros_like(maps), maps])
    expected = reference(neck.state_dict(), maps)
    sizes = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    assert [o.shape[2:] for o in got] == sizes
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
        # RoIAlign of mmcv reads any map as if it were, without a word.
        assert one.is_contiguous()


def test_as_many_maps_as_scales_are_taken_one_by_one():
    neck = SimpleFeaturePyramid(C, OUT, scales=(2, 1))
    maps = [torch.randn(1, C, 4, 4, requires_grad=True) for _ in range(2)]
    first, second = neck(maps)
    first.square().sum().backward(retain_graph=True)
    assert maps[0].grad is not None and maps[1].grad is None
    second.square().sum().backward()
    assert maps[1].grad is not None


def test_it_stands_before_an_fpn():
    fpn = dict(type='mmdet.FPN', in_channels=[256] * 4, out_channels=8)
    neck = dict(type='e3va_mm.SimpleFeaturePyramid', in_channels=C)
    both = MODELS.build([neck, dict(fpn, num_outs=5)])
    outs = both([torch.randn(1, C, 4, 4)])
    assert [o.shape[-1] for o in outs] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(scales=(3, 1)), r'`neck.scales` should hold some of .*\(3, 1\)'),
        (dict(scales=()), '`neck.scales` should hold'),
        (dict(num_outs=3), '`neck.num_outs` should be at least the 4 of'),
    ],
)
def test_impossible_options(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        SimpleFeaturePyramid(C, OUT, **kwargs)
