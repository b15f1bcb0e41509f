"""Every family of stock backbones under E3VA."""

import copy
import functools

import pytest
import torch

from e3va_mm.errors import CheckpointError
from e3va_mm.measure import kept_for_backward
from e3va_mm.trunks import STREAM
from e3va_mm.trunks.build import family_of
from e3va_mm.trunks.families import FAMILIES
from tests.trunk_cases import (
    CASES,
    OTHERS,
    awake,
    build_ours,
    flat,
    image_for,
    ours_and_stock,
    stock_outputs,
)

# Behind the last block, or around one, more happens than its branches.
MORE_THAN_BRANCHES = ('swin v2, cut',)
ONE_RESOLUTION = ('hivit', 'timm vit', 'timm deit', 'timm beit')
ONE_RESOLUTION += ('timm eva02', 'timm dinov2, registers', 'dinov3')
ONE_RESOLUTION += ('timm vit, ours',)
STAGED = [name for name in OTHERS if name not in ONE_RESOLUTION]
NO_NORM_BETWEEN = ('timm poolformer', 'hiera, windows')
KINDS = ['dinov2', 'beit', 'eva02', 'sam', 'mit', 'convnext', 'mscan']
KINDS += ['timm vit', 'hiera', 'hiera of sam 2']
FROZEN = dict(type='e3va_mm.NoSidePath', train_output_norms=False)


@functools.cache
def built(name):
    return ours_and_stock(name)


def copies(name, wake=True):
    """A backbone of ours and the stock one with the same weights."""
    ours, stock = built(name)
    ours = copy.deepcopy(ours)
    return awake(ours) if wake else ours, stock


def run(ours, image, on_tap=None, on_end=None, last=None):
    """The trunk alone, with all its taps."""
    last = len(ours.trunk.blocks) - 1 if last is None else last
    taps = ours.tuner.taps if on_tap else ()
    with torch.no_grad():
        ours.trunk.run(image, last, taps, on_tap, on_end)


def test_every_family_has_a_case():
    reached = {family_of(built(name)[1]) for name in CASES}
    assert reached == set(FAMILIES)


@pytest.mark.parametrize('name', CASES)
def test_begins_as_the_stock_backbone(name):
    ours, stock = copies(name, wake=False)
    image = image_for(name)
    # A copy: EVA-02 rewrites its angles for the size of the image.
    expected = stock_outputs(name, copy.deepcopy(stock), image)
    with torch.no_grad():
        got = flat(ours(image))
        changed = flat(awake(ours)(image))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (changed[-1] - expected[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    'name', [n for n in CASES if n not in MORE_THAN_BRANCHES]
)
def test_taps_are_what_the_blocks_add_to_their_residuals(name):
    ours, _ = copies(name)
    trunk = ours.trunk
    added, sums, sizes = {}, {}, []
    for stage, blocks in enumerate(trunk.blocks):
        for index, path in enumerate(blocks):

            def seen(module, args, output, at=(stage, index)):
                output = output[0] if isinstance(output, tuple) else output
                before, after = trunk._tokens(args[0]), trunk._tokens(output)
                if before.shape != after.shape:  # in the midst of Hiera
                    down = trunk.downsampling(at[0] - 1, sizes[-1])
                    before = down.gather(before)
                added[at] = after - before

            ours.get_submodule(path).register_forward_hook(seen)

    def on_tap(stage, block, tap, value):
        sums[stage, block] = sums.get((stage, block), 0) + value

    run(ours, image_for(name), on_tap, lambda _, e: sizes.append(e.size))
    # The run ends with the last block, before its other hooks.
    assert set(sums) >= set(added)
    assert len(sums) == sum(len(blocks) for blocks in trunk.blocks)
    for at, change in added.items():
        torch.testing.assert_close(sums[at], change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_streams_are_what_stages_end_with(name):
    ours, _ = copies(name, wake=False)
    streams, ends = {}, []

    def on_tap(stage, block, tap, value):
        assert tap == STREAM
        streams[stage, block] = value

    image, last = image_for(name), len(ours.trunk.blocks) - 1
    with torch.no_grad():
        ours.trunk.run(
            image, last, (STREAM,), on_tap, lambda _, end: ends.append(end)
        )
    assert [*streams] == [
        (stage, block)
        for stage, blocks in enumerate(ours.trunk.blocks)
        for block in range(len(blocks))
    ]
    for stage, (end, blocks) in enumerate(
        zip(ends, ours.trunk.blocks, strict=True)
    ):
        assert torch.equal(streams[stage, len(blocks) - 1], end.tokens)


@pytest.mark.parametrize('name', CASES)
def test_the_side_path_and_output_norms_alone_train(name):
    ours, stock = copies(name)
    ours.train()
    assert not any(child.training for _, child in ours.trunk_children())
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    trains = {k: p for k, p in ours.named_parameters() if p.requires_grad}
    sum(o.square().mean() for o in flat(ours(image_for(name)))).backward()
    for parameter in trains.values():
        assert parameter.grad.isfinite().all() and parameter.grad.any()
    torch.optim.AdamW(ours.parameters(), 1e-2).step()
    after = ours.state_dict()
    assert set(trains) == {
        k for k, v in after.items() if not torch.equal(v, before[k])
    }
    owned = {path for path, _ in ours.trainable_children()}
    assert {key.split('.')[0] for key in trains} == owned
    # The trunk has the stock names.
    names = {k for k in after if not k.startswith('side_path.')}
    assert names <= set(stock.state_dict())


@pytest.mark.parametrize('name', KINDS)
def test_the_trunk_keeps_nothing_for_backward(name):
    image = image_for(name)
    frozen = build_ours(name, tuner=FROZEN).train()
    assert not any(o.requires_grad for o in flat(frozen(image)))
    # The side path keeps taps, and of an output, or of a stage whose sum goes
    # on, no more than two of its size.
    ours, _ = copies(name)
    taps, ends = [], []
    run(
        ours,
        image,
        lambda *tap: taps.append(tap[-1].numel()),
        lambda _, end: ends.append(end.tokens.numel()),
    )
    kept = kept_for_backward(ours.train(), image)
    maps = 3 if name == 'sam' else 2.2  # SAM's neck has layers of its own
    assert 4 * sum(taps) <= kept <= 4 * (1.1 * sum(taps) + maps * sum(ends))


def by_plain_autograd(ours, image):
    """Outputs over the taps that the trunk gives."""
    tuner, trunk = ours.tuner, ours.trunk
    taps, ends = [], []
    run(ours, image, lambda *tap: taps.append(tap), lambda *e: ends.append(e))
    outputs, highway = [], 0
    for stage, end in ends:
        read = [value.flatten(0, 1) for of, *_, value in taps if of == stage]
        added = tuner.stages[stage](torch.stack(read)).sum(0)
        highway = highway + added.view_as(end.tokens)
        total = end.tokens + highway
        if stage in ours.trunk.out_stages:
            outputs.append(ours.output(stage, total, end)[0])
        down = trunk.downsampling(stage, end.size)
        if down is not None and stage + 1 < len(ends):
            highway = down.gather(total) - down.gather(end.tokens)
            if down.weight is not None:
                highway = highway @ down.weight().t()
    return flat(outputs)


@pytest.mark.parametrize('name', CASES)
def test_gradients_equal_plain_autograd(name):
    ours = copies(name)[0].double()
    image = image_for(name).double()
    trains = [p for p in ours.parameters() if p.requires_grad]
    results = []
    for outputs in (flat(ours(image)), by_plain_autograd(ours, image)):
        loss = sum((o * o.detach().cos()).sum() for o in outputs)
        results.append(torch.autograd.grad(loss, trains))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', STAGED)
def test_linear_downsampling_keeps_zero_at_zero(name):
    ours = awake(build_ours(name, tuner=dict(rank=4, downsampling='linear')))
    image, ends = image_for(name), []
    run(ours, image, on_end=lambda _, end: ends.append(end), last=0)
    (end,) = ends
    down = ours.trunk.downsampling(0, end.size)
    assert not down.gather(torch.zeros_like(end.tokens), norm=False).any()
    # Norms are back in their places, where there are some.
    normed = down.gather(end.tokens)
    changed = normed.ne(down.gather(end.tokens, norm=False)).any()
    assert changed == (name not in NO_NORM_BETWEEN)
    sum(o.square().mean() for o in flat(ours(image))).backward()
    first = ours.tuner.stages[0]
    assert first.up.q.grad.isfinite().all() and first.up.q.grad.any()


@pytest.mark.parametrize('name', CASES)
def test_lean_is_close_in_gradient_and_keeps_the_types(name):
    exact, stock = copies(name)
    ours = build_ours(name, tuner=dict(rank=4, preset='lean'))
    ours.load_state_dict(exact.state_dict())
    image = image_for(name)
    found = []
    for model in (exact, ours):
        outputs = flat(model.train()(image))
        sum(o.square().mean() for o in outputs).backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.tuner.parameters()])
        )
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.98
    # Checkpoints hold the weights as they came.
    state = ours.state_dict()
    for key, value in stock.state_dict().items():
        if key in state:
            torch.testing.assert_close(state[key], value)
    # Outputs are as autocast says, the residual stream in single precision.
    ends = []
    run(ours, image, on_end=lambda _, end: ends.append(end.tokens.dtype))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        run(ours, image, on_end=lambda _, end: ends.append(end.tokens.dtype))
        under = flat(ours(image))
    assert set(ends) == {torch.float32}
    if ours.trunk.gives_maps:
        assert {o.dtype for o in outputs} == {torch.float32}
        assert {o.dtype for o in under} == {torch.bfloat16}


def outputs_of(name):
    return CASES[name].get('out_indices', (0, 1, 2, 3))


# MSCAN and timm's run to their end; DeiT3 has norms that no branch uses.
CUT = [
    name
    for name in CASES
    if not name.startswith(('timm', 'mscan', 'deit3'))
    and isinstance(outputs_of(name), (list, tuple))
    and len(outputs_of(name)) > 1
]


@pytest.mark.parametrize('name', CUT)
def test_nothing_past_the_last_output_is_left(name, monkeypatch):
    """The outputs stay, and all that is there has a gradient."""
    stock = copy.deepcopy(built(name)[1])
    image = image_for(name)
    expected = stock_outputs(name, stock, image)
    config = dict(CASES[name], out_indices=outputs_of(name)[:-1])
    monkeypatch.setitem(CASES, name, config)
    ours = build_ours(name, tuner=dict(type='e3va_mm.Full')).eval()
    ours.load_state_dict(stock.state_dict(), strict=False)
    found = flat(ours(image))
    assert 0 < len(found) < len(expected)
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other)
    sum(o.square().mean() for o in found).backward()
    assert not [n for n, p in ours.named_parameters() if p.grad is None]


@pytest.mark.parametrize('name', KINDS)
def test_loading_is_strict(name):
    ours, stock = copies(name)
    state = stock.state_dict()
    last = ours.trunk.blocks[-1][-1]
    key = next(k for k, _ in ours.named_parameters() if k.startswith(last))
    for change, message in (
        ({key: None}, '1 missing in the file'),
        ({'blocks.77.stranger': torch.zeros(1)}, '1 not expected'),
        ({key: torch.zeros(3, 3, 3)}, '1 of another shape'),
    ):
        changed = {**state, **change}
        changed = {k: v for k, v in changed.items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            ours.load_state_dict(changed, strict=False)
    classifier = {**state, 'head.fc.weight': torch.zeros(3, 3)}
    ours.load_state_dict(classifier, strict=False)


@pytest.mark.parametrize('name', ['eva02', 'sam', 'mit'])
def test_a_backbone_can_be_exported(name):
    ours = copies(name)[0].eval()
    image = image_for(name, batch=1)
    with torch.no_grad():
        expected = flat(ours(image))
        program = torch.export.export(ours, (image,), strict=False)
        got = flat(program.module()(image))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
