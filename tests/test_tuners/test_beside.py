"""Side paths of others: what each promises, on a ViT and on a Swin."""

import functools

import pytest
import torch
from torch import nn

from e3va_mm.backbones import run_trunk
from e3va_mm.errors import ConfigError
from e3va_mm.measure.variants import ON_PLAIN
from e3va_mm.tuners.beside.attention import AttentionBlock
from tests.test_tuners.cases import loss_of, wake
from tests.trunk_cases import CASES, build_ours, image_for, ours_and_stock

TUNERS = {
    'adatad': dict(type='e3va_mm.AdaTAD'),
    'dtl': dict(type='e3va_mm.DTL', rank=2),
    'losa': dict(type='e3va_mm.LoSA', rank=2, token_rank=3, grid=4),
    'lst': dict(type='e3va_mm.LST', reduction=2),
    'r2-tuning': dict(type='e3va_mm.R2Tuning', width=16, steps=3),
    'res-tuning': dict(type='e3va_mm.ResTuning', bottleneck=4),
    'pmt': dict(type='e3va_mm.PMT', laterals=2, blocks=1),
    'spatial-prior': dict(type='e3va_mm.SpatialPrior', stem=4, width=16),
    'vit-split': dict(type='e3va_mm.ViTSplit', copies=1, priors=3),
    'e3va-fusion': dict(type='e3va_mm.E3VAFusion', rank=2),
}
TRUNKS = {  # and channels and depths of the stages
    'dinov2': ((32, 2), (32, 2)),
    'swin of mmdet': ((32, 2), (64, 1), (128, 2), (256, 1)),
}
PAIRS = [
    (trunk, tuner)
    for trunk in TRUNKS
    for tuner in TUNERS
    if trunk == 'dinov2' or tuner not in ON_PLAIN
]


@functools.cache
def built(trunk, tuner):
    return ours_and_stock(trunk, tuner=TUNERS[tuner])


def bottleneck(channels, width):
    return 2 * channels * width + channels + width


def block(width):
    """Two norms, q, k and v, a projection and an MLP."""
    return 12 * width**2 + 13 * width


def formula(tuner, stages, plain):
    """How many parameters a side path has, its sizes as above."""
    total, seen, codes, before = 0, 0, 0, None
    for c, depth in stages:
        each, w = 0, c // 4
        seen = seen * plain + depth
        if tuner == 'adatad':
            each = bottleneck(c, w) + 10 * w + w**2 + w + 1
        elif tuner == 'dtl':
            each, total = 2 * 2 * c, total + 9 * c
        elif tuner == 'losa':
            each = 4 * c + bottleneck(c, 2) + 2 * 3 * 16
        elif tuner == 'res-tuning':
            each = 2 * bottleneck(c, 4) + 1
        elif tuner == 'lst':
            w = c // 2
            each = c * w + w + 1 + block(w)
            total += w * c + c
            if before and not plain:
                total += before * w + w
            before = w
        elif tuner == 'e3va-fusion':
            each, w, codes = 2 * c, depth * 2, codes + depth * 2
            total += 83 * w + 3 * w + w**2 + w + codes * c + c
        elif tuner == 'r2-tuning':
            total += 2 * c + 16 * c + 16 + 2 * 16 + 16**2 + 16
            total += min(3, seen) - 1 + block(16) + 16 * c + c
        elif tuner == 'spatial-prior':
            each, w = 0, 16
            total += 2 * (w**2 + w) + 2 * w * (w // 4) + 10 * (w // 4) + w
            total += w // 4 + 4 * w + 3 * c * w + 2 * w + 3 * c
        total += depth * each
    return total + {
        'pmt': 2 * c**2 + 5 * c + block(c),
        'spatial-prior': 99 * 16 + 43 * 4 + 7 * 4 * 16 + 3 * 16,
        'vit-split': 23 * c**2 + 4 * c,  # and a block of the trunk
    }.get(tuner, 0)


@pytest.mark.parametrize('trunk, tuner', PAIRS)
def test_it_has_the_parameters_of_its_formula(trunk, tuner):
    ours, _ = built(trunk, tuner)
    count = sum(p.numel() for p in ours.tuner.parameters())
    if tuner == 'vit-split':
        _, last = ours.trunk.body()[-1]
        count -= sum(p.numel() for p in last.parameters())
    assert count == formula(tuner, TRUNKS[trunk], trunk == 'dinov2')


@pytest.mark.parametrize('trunk, tuner', PAIRS)
def test_it_begins_as_it_says(trunk, tuner):
    ours, stock = built(trunk, tuner)
    image = image_for(trunk)
    with torch.no_grad():
        found, expected = ours.eval()(image), stock(image)
    same = [
        torch.allclose(one, other, atol=1e-4)
        for one, other in zip(found, expected, strict=True)
    ]
    assert [f.shape for f in found] == [e.shape for e in expected]
    if tuner == 'res-tuning':
        # The mean over a stage of one block is the stock output.
        one = [depth == 1 and trunk != 'dinov2' for _, depth in TRUNKS[trunk]]
        assert same == one
    elif tuner in ('pmt', 'vit-split'):  # drawn, in place of the last
        assert same == [True] * (len(same) - 1) + [False]
    else:
        assert all(same)


@pytest.mark.parametrize(
    'trunk, tuner',
    [
        *PAIRS,
        *(('two outputs', t) for t in TUNERS if t not in ON_PLAIN),
    ],
)
def test_all_of_it_trains_and_nothing_of_the_trunk(trunk, tuner, monkeypatch):
    two = dict(CASES['swin of mmdet'], out_indices=(1, 3))
    monkeypatch.setitem(CASES, 'two outputs', two)
    ours = build_ours(trunk, tuner=TUNERS[tuner]).train()
    before = {k: v.clone() for k, v in ours.trunk_state().items()}
    graphs = []
    for _, module in ours.trunk.body():
        module.register_forward_hook(
            lambda module, args, output: graphs.append(output.requires_grad)
        )
    reached = set()
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(ours(image_for(trunk))).backward()
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.isfinite().all(), name
                if parameter.grad.any():
                    reached.add(name)
            else:
                assert parameter.grad is None, name
        optimizer.step()
    assert graphs and not any(graphs)
    trains = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert reached == trains
    own = {f'side_path.{name}' for name, _ in ours.tuner.named_parameters()}
    assert own <= trains
    after = ours.trunk_state()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize('trunk, tuner', PAIRS)
def test_it_shares_a_pass_and_autocast_is_finite(trunk, tuner):
    one = wake(build_ours(trunk, tuner=TUNERS[tuner])).eval()
    other = build_ours(trunk)
    other.share_trunk(one)
    image = image_for(trunk)
    with torch.no_grad():
        expected = one(image)
        found = run_trunk([other.eval(), one], image)[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast('cpu', torch.bfloat16):
        loss = loss_of(one.train()(image))
    loss.backward()
    gradients = [p.grad for p in one.tuner.parameters()]
    assert all(g.isfinite().all() for g in gradients)


class Last(nn.Module):
    """Half of the channels, those behind."""

    def forward(self, maps):
        return maps.chunk(2, 1)[1]


def test_copies_start_as_the_blocks_that_are_loaded():
    ours, stock = ours_and_stock('dinov2', tuner=TUNERS['vit-split'])
    ours.tuner.fusion = Last()
    image = image_for('dinov2')
    with torch.no_grad():
        found, expected = ours.eval()(image)[-1], stock(image)[-1]
        # The stock norm of a norm, which is the same but for its epsilon.
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        for difference in ours.tuner.copies.parameters():
            difference.add_(0.1)
        assert (ours(image)[-1] - expected).abs().max() > 0.1


def test_copies_train_in_single_precision_beside_a_trunk_in_16_bits():
    tuner = dict(TUNERS['vit-split'], preset='lean')
    ours = build_ours('dinov2', tuner=tuner).train()
    loss_of(ours(image_for('dinov2'))).backward()
    for name, parameter in ours.tuner.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('width', [4, 190, 208])
def test_the_prior_may_have_any_width(width):
    tuner = dict(TUNERS['spatial-prior'], width=width)
    ours = build_ours('dinov2', tuner=tuner)
    ours(image_for('dinov2'))


@pytest.mark.parametrize(
    'trunk, tuner, message',
    [
        *(
            ('swin of mmdet', TUNERS[tuner], 'a trunk with one resolution')
            for tuner in ('pmt', 'spatial-prior')
        ),
        ('swin of mmdet', TUNERS['vit-split'], 'blocks that take tokens alo'),
        ('beit', TUNERS['vit-split'], 'of BEiTViT take x, rel_pos_bias'),
        ('sam', TUNERS['vit-split'], 'of ViTSAM take maps'),
        ('dinov2', dict(TUNERS['vit-split'], copies=4), 'than the 4 blocks'),
        ('dinov2', dict(TUNERS['pmt'], laterals=5), 'to the 4 blocks of the'),
        ('dinov2', dict(TUNERS['spatial-prior'], width=3), '`tuner.width` s'),
        ('dinov2', dict(TUNERS['lst'], reduction=0), '`tuner.reduction` shou'),
    ],
)
def test_what_does_not_fit_is_refused(trunk, tuner, message):
    with pytest.raises(ConfigError, match=message):
        build_ours(trunk, tuner=tuner)


def test_attention_in_windows_sees_its_window():
    torch.manual_seed(0)
    whole = AttentionBlock(8)
    windows = AttentionBlock(8, window=4)
    windows.load_state_dict(whole.state_dict())
    tokens = torch.randn(2, 1 + 16, 8)
    one, other = windows(tokens, (4, 4)), whole(tokens[:, 1:], (4, 4))
    torch.testing.assert_close(one[:, 1:], other)

    def seen(shift):
        """Which tokens of a grid of 8x8 the first one depends on."""
        windows.shift = shift
        x = torch.randn(1, 64, 8, requires_grad=True)
        windows(x, (8, 8))[0, 0].sum().backward()
        return x.grad.abs().sum(-1).view(8, 8) > 0

    assert seen(0)[:4, :4].all() and seen(0).sum() == 16
    corner = seen(2)
    assert corner[:2, :2].all() and corner[-2:, -2:].all()
    assert corner.sum() == 16
