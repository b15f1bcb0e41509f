"""Every family of stock backbones under a side path."""

import copy

import pytest
import torch

from e3va_mm.errors import CheckpointError
from e3va_mm.measure import kept_for_backward
from e3va_mm.registry import MODELS
from e3va_mm.trunks.building import family_of
from e3va_mm.trunks.families import FAMILIES
from tests.trunk_cases import (
    CASES,
    awake,
    build_ours,
    build_stock,
    flat,
    image_for,
    ours_and_stock,
    stock_outputs,
)

# Behind the last block, or around one, more happens than its branches.
MORE_THAN_BRANCHES = ('swin v2, cut',)


def test_every_family_has_a_case():
    reached = {family_of(build_stock(name)) for name in CASES}
    assert reached == set(FAMILIES)


@pytest.mark.parametrize('name', CASES)
def test_identity_at_initialisation(name):
    ours, stock = ours_and_stock(name)
    image = image_for(name)
    expected = stock_outputs(name, stock, image)
    with torch.no_grad():
        got = flat(ours(image))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    awake(ours)
    with torch.no_grad():
        changed = flat(ours(image))
    assert (changed[-1] - expected[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    'name', [n for n in CASES if n not in MORE_THAN_BRANCHES]
)
def test_taps_are_what_the_blocks_add_to_their_residuals(name):
    ours = build_ours(name)
    trunk = ours.trunk
    added, sums = {}, {}
    for stage, blocks in enumerate(trunk.blocks):
        for index, path in enumerate(blocks):

            def seen(module, args, output, at=(stage, index)):
                output = output[0] if isinstance(output, tuple) else output
                change = trunk._tokens(output) - trunk._tokens(args[0])
                added[at] = change

            ours.get_submodule(path).register_forward_hook(seen)

    def on_tap(stage, block, tap, value):
        sums[stage, block] = sums.get((stage, block), 0) + value

    with torch.no_grad():
        last = len(trunk.blocks) - 1
        trunk.run(ours, image_for(name), last, ours.side_path.taps, on_tap)
    # The run ends with the last block, before its other hooks.
    assert set(sums) >= set(added)
    assert len(sums) == sum(len(blocks) for blocks in trunk.blocks)
    for at, change in added.items():
        torch.testing.assert_close(sums[at], change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_what_trains_is_the_side_path_and_the_way_out(name):
    ours, stock = ours_and_stock(name)
    awake(ours)
    ours.train()
    assert not any(child.training for _, child in ours.trunk_children())
    image = image_for(name)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    trains = {k for k, p in ours.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [p for p in ours.parameters() if p.requires_grad], 1e-2
    )
    for _ in range(2):
        optimizer.zero_grad()
        sum(o.square().mean() for o in flat(ours(image))).backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.any()
            for p in ours.parameters()
            if p.requires_grad
        )
        optimizer.step()
    changed = {
        k
        for k, v in ours.state_dict().items()
        if not torch.equal(v, before[k])
    }
    assert changed == trains
    owned = {name for name, _ in ours.trainable_children()}
    assert {key.split('.')[0] for key in trains} == owned
    # The trunk has the stock names.
    names = {k for k in ours.state_dict() if not k.startswith('side_path.')}
    assert names <= set(stock.state_dict())


@pytest.mark.parametrize('name', CASES)
def test_the_trunk_keeps_nothing_for_backward(name):
    nothing = dict(type='e3va_mm.NoSidePath', train_output_norms=False)
    ours = build_ours(name)
    frozen = MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=copy.deepcopy(CASES[name]),
            allow_random_trunk=True,
            side_path=nothing,
        )
    )
    frozen.init_weights()
    frozen.train()
    image = image_for(name)
    with torch.no_grad():
        frozen(image)
    assert kept_for_backward(frozen, image) == 0
    # What the side path keeps is taps, and of an output, or of a stage whose
    # sum goes on, no more than two of its size.
    ours.train()
    taps, ends = [], []
    with torch.no_grad():
        ours.trunk.run(
            ours,
            image,
            len(ours.trunk.blocks) - 1,
            ours.side_path.taps,
            lambda *tap: taps.append(tap[-1].numel()),
            lambda _, end: ends.append(end.tokens.numel()),
        )
    kept = kept_for_backward(ours, image)
    maps = 3 if name == 'sam' else 2.2  # SAM's neck has layers of its own
    assert 4 * sum(taps) <= kept <= 4 * (1.1 * sum(taps) + maps * sum(ends))


def naive(ours, image):
    """Outputs by plain autograd, over the taps that the trunk gives."""
    path, trunk = ours.side_path, ours.trunk
    taps, ends = {}, []
    with torch.no_grad():
        trunk.run(
            ours,
            image,
            len(trunk.blocks) - 1,
            path.taps,
            lambda stage, block, tap, v: taps.setdefault(stage, []).append(
                path.stages[stage][block][tap](v) if False else (block, tap, v)
            ),
            lambda stage, end: ends.append(end),
        )
    outputs, highway = [], 0
    for stage, end in enumerate(ends):
        for block, tap, value in taps[stage]:
            highway = highway + path.stages[stage][block][tap](value)
        total = end.tokens + highway
        if stage in ours.out_stages:
            outputs.append(ours.output(stage, total, end)[0])
        down = trunk.downsampling(ours, stage, end.size)
        if down is not None and stage + 1 < len(ends):
            highway = down.gather(total) - down.gather(end.tokens)
    return flat(outputs)


@pytest.mark.parametrize('name', CASES)
def test_gradients_equal_plain_autograd(name):
    ours, _ = ours_and_stock(name)
    awake(ours).double()
    image = image_for(name).double()
    trains = [p for p in ours.parameters() if p.requires_grad]
    results = []
    for outputs in (flat(ours(image)), naive(ours, image)):
        loss = sum((o * o.detach().cos()).sum() for o in outputs)
        results.append(torch.autograd.grad(loss, trains))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('downsampling', ['difference', 'linear'])
def test_both_downsamplings_keep_zero_at_zero(name, downsampling):
    ours, _ = ours_and_stock(name, side_path=dict(downsampling=downsampling))
    if len(ours.trunk.blocks) == 1:
        pytest.skip('there is one stage')
    ends = []
    with torch.no_grad():
        ours.trunk.run(
            ours, image_for(name), 0, (), None, lambda _, end: ends.append(end)
        )
    (end,) = ends
    down = ours.trunk.downsampling(ours, 0, end.size)
    if down is None:
        assert ours.trunk.layout.plain
        return
    zero = torch.zeros_like(end.tokens)
    assert not down.gather(zero, norm=False).any()
    # Norms are back in their places.
    assert (
        down.gather(end.tokens).ne(down.gather(end.tokens, norm=False)).any()
    )
    awake(ours)
    sum(o.square().mean() for o in flat(ours(image_for(name)))).backward()
    first = ours.side_path.stages[0][0][ours.side_path.taps[0]]
    assert first.up.q.grad.isfinite().all() and first.up.q.grad.any()


@pytest.mark.parametrize('preset', ['exact', 'lean'])
@pytest.mark.parametrize('name', CASES)
def test_presets_are_close_to_the_exact_gradient(name, preset):
    exact, stock = ours_and_stock(name)
    ours = build_ours(name, side_path=dict(preset=preset))
    awake(exact)
    ours.load_state_dict(exact.state_dict())
    image = image_for(name)
    grads = []
    for model in (exact, ours):
        model.train()
        sum(o.square().mean() for o in flat(model(image))).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.side_path.parameters()])
        )
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert cosine > (1 - 1e-6 if preset == 'exact' else 0.98)
    # Checkpoints hold the weights as they came.
    ours_state = ours.state_dict()
    for key, value in stock.state_dict().items():
        if key in ours_state:
            torch.testing.assert_close(ours_state[key], value)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('autocast', [False, True])
def test_types_of_what_comes_out(name, autocast):
    """However the trunk computes: outputs are as the caller's autocast says.

    The residual stream, which stages end with, stays in single precision.
    """
    ours = build_ours(name, side_path=dict(preset='lean'))
    ours.train()
    ends = []
    run = ours.trunk.run

    def spied(holder, image, last, taps, on_tap, on_end=None):
        def seen(stage, end):
            ends.append(end.tokens.dtype)
            on_end(stage, end)

        run(holder, image, last, taps, on_tap, on_end and seen)

    ours.trunk.run = spied
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        outputs = flat(ours(image_for(name)))
    assert set(ends) == {torch.float32}
    if ours.trunk.gives_maps(ours):
        wanted = torch.bfloat16 if autocast else torch.float32
        assert {o.dtype for o in outputs} == {wanted}


@pytest.mark.parametrize('name', CASES)
def test_loading_is_strict(name):
    ours, stock = ours_and_stock(name)
    state = stock.state_dict()
    blocks = ours.trunk.blocks
    key = next(
        k for k, _ in ours.named_parameters() if k.startswith(blocks[-1][-1])
    )
    lost = {k: v for k, v in state.items() if k != key}
    with pytest.raises(CheckpointError, match='1 missing in the file'):
        ours.load_state_dict(lost, strict=False)
    more = {**state, 'blocks.77.stranger': torch.zeros(1)}
    with pytest.raises(CheckpointError, match='1 not expected'):
        ours.load_state_dict(more, strict=False)
    other = {**state, key: torch.zeros(3, 3, 3)}
    with pytest.raises(CheckpointError, match='1 of another shape'):
        ours.load_state_dict(other, strict=False)
    classifier = {**state, 'head.fc.weight': torch.zeros(3, 3)}
    ours.load_state_dict(classifier, strict=False)


@pytest.mark.parametrize('name', ['dinov2', 'mit', 'convnext', 'mscan', 'sam'])
def test_a_copy_is_a_backbone_of_its_own(name):
    """EMA copies models; the copy must not compute with our weights."""
    ours, _ = ours_and_stock(name)
    awake(ours)
    image = image_for(name)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        before = flat(ours(image))
        for parameter in twin.parameters():
            parameter.add_(0.1)
        for one, other in zip(flat(ours(image)), before, strict=True):
            assert torch.equal(one, other)
        changed = flat(twin(image))
    assert not torch.allclose(changed[-1], before[-1])
    assert twin.trunk.stock._modules is twin._modules


@pytest.mark.parametrize(
    'name',
    ['dinov2', 'beit', 'eva02', 'sam', 'mit', 'convnext', 'mscan', 'timm vit'],
)
def test_a_backbone_can_be_exported(name):
    ours, _ = ours_and_stock(name)
    awake(ours)
    ours.eval()
    image = image_for(name, batch=1)
    with torch.no_grad():
        expected = flat(ours(image))
        program = torch.export.export(ours, (image,), strict=False)
        got = flat(program.module()(image))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
