"""Checkpointed models against the same models left as they were."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from e3va_mm.engine.activation_checkpointing import (
    checkpoint_modules,
    is_checkpointed,
)
from e3va_mm.errors import ConfigError
from e3va_mm.measure import LiveBytes, TrainingStep

CONFIGS = Path(__file__).parents[2] / 'configs'


class Counting(nn.Module):
    """Its output depends on a buffer that it changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x**2 * self.calls.clone()


NORMS = dict(
    batch=nn.BatchNorm2d,
    cumulative=lambda n: nn.BatchNorm2d(n, momentum=None),
    without_statistics=lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    sync=nn.SyncBatchNorm,
    instance=lambda n: nn.InstanceNorm2d(n, track_running_stats=True),
    spectral=lambda n: spectral_norm(nn.Conv2d(n, n, 1)),
    counting=lambda n: Counting(),
)


class Neck(nn.Module):
    """Takes a tuple, a list inside a keyword, and what is no tensor."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, maps, *, options, mode='mul'):
        scale, shifts = options['scale'], options['shifts']
        assert mode == 'add'
        return [
            self.dropout(self.norm(self.conv(x)).relu_()) * scale + shift
            for x, shift in zip(maps, shifts, strict=True)
        ]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.3),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        return self.layers(x).sigmoid()


class Detector(nn.Module):
    """A neck over a backbone without a graph, and heads in a list."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.neck = Neck(norm)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))
        self.heads = nn.ModuleList([Head(), Head()])

    def forward(self, images):
        x = self.backbone(images)
        maps = self.neck(
            (x, x * 2),
            options=dict(scale=0.5, shifts=[self.shift, 2.0]),
            mode='add',
        )
        # `forward` without hooks too, as mmseg calls its decode heads.
        return self.heads[0](maps[0]), self.heads[1].forward(maps[1])


ALL = ['neck', 'heads.*']


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator)


def loss_of(outputs):
    return sum(output.square().mean() for output in outputs)


def everything(model):
    """All that a step leaves in a model, by name."""
    gradients = {f'{k}.grad': p.grad for k, p in model.named_parameters()}
    return {**gradients, **model.state_dict()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert ours[name] is None, name
        else:
            assert torch.equal(ours[name], value), name


def train(model, steps=2, **kwargs):
    """Losses of some steps; drawn anew from the same seed."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(images(i)))
        loss.backward(**kwargs)
        losses.append(loss.detach())
        if i < steps - 1:
            optimizer.step()
    return torch.stack(losses), torch.rand(1)


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('norm', NORMS)
def test_steps_are_those_of_the_model_left_as_it_was(norm, mode):
    plain = Detector(NORMS[norm])
    plain.train(mode == 'train')
    ours = copy.deepcopy(plain)
    keys = list(ours.state_dict())
    assert checkpoint_modules(ours, ALL) == ['neck', 'heads.0', 'heads.1']
    assert list(ours.state_dict()) == keys
    before = copy.deepcopy(plain.state_dict())

    expected, expected_draw = train(plain)
    losses, draw = train(ours)
    assert torch.equal(losses, expected)
    assert torch.equal(draw, expected_draw)
    assert_same(everything(ours), everything(plain))
    # The comparison is of something: all that trains has a gradient, and
    # statistics have moved.
    for name, parameter in plain.named_parameters():
        moved = parameter.grad is not None and parameter.grad.any()
        assert moved != name.startswith('backbone'), name
    statistics = 'heads.0.layers.1.running_mean'
    moved = not torch.equal(before[statistics], plain.state_dict()[statistics])
    assert moved == (mode == 'train')


def test_parts_run_again_in_the_backward_pass_and_keep_nothing():
    def kept(model):
        torch.manual_seed(0)
        image = torch.randn(4, 3, 64, 64)
        with LiveBytes([image, *model.parameters(), *model.buffers()]) as n:
            before = n.live
            loss = loss_of(model(image))
            return n.live - before, loss

    plain = Detector()
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours, ALL)
    runs = []
    for model in (plain, ours):
        model.heads[0].layers[0].register_forward_hook(
            lambda *_, model=model: runs.append(model)
        )
    (of_plain, loss), (of_ours, our_loss) = kept(plain), kept(ours)
    assert runs == [plain, ours]
    loss.backward()
    our_loss.backward()
    assert runs == [plain, ours, ours]
    # Kept at least: the inputs of neck and heads, 4 maps of 4 channels.
    # A head's own are the maps after convolution, norm and dropout, 8 each.
    maps = 4 * 4 * 64 * 64 * 4
    assert of_ours < 6 * maps
    assert of_plain - of_ours > 2 * 3 * 2 * maps


def test_without_gradients_nothing_changes():
    model = Detector().eval()
    expected = [output.clone() for output in model(images())]
    checkpoint_modules(model, ALL)
    with torch.no_grad():
        outputs = model(images())
    assert all(map(torch.equal, outputs, expected))
    assert not model.neck.checkpoint_has_run
    model(images())
    assert model.neck.checkpoint_has_run


def test_copies_are_checkpointed_themselves():
    plain = Detector()
    original = copy.deepcopy(plain)
    checkpoint_modules(original, ALL)
    ours = copy.deepcopy(original)
    assert is_checkpointed(ours.neck) and is_checkpointed(ours.heads[1])
    train(plain)
    train(ours)
    assert_same(everything(ours), everything(plain))
    assert all(p.grad is None for p in original.parameters())
    assert not original.neck.checkpoint_has_run


def test_autocast_is_the_same_in_the_recomputation():
    plain = Detector()
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours, ALL)
    for model in (plain, ours):
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16):
            # Twice: autocast has cast the weights when they are used again.
            outputs = [*model(images(0)), *model(images(1))]
        assert all(output.dtype == torch.bfloat16 for output in outputs)
        loss_of(output.float() for output in outputs).backward()
    assert_same(everything(ours), everything(plain))


@pytest.mark.parametrize('norm', ['batch', 'counting'])
def test_accumulated_and_repeated_backward_passes(norm):
    plain = Detector(NORMS[norm])
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours, ALL)
    for model in (plain, ours):
        torch.manual_seed(0)
        for i in range(2):
            loss = loss_of(model(images(i)))
            # Twice through one graph: the recomputation happens twice.
            loss.backward(retain_graph=True)
            loss.backward()
    assert_same(everything(ours), everything(plain))


def test_distributed_data_parallel(one_process):
    plain = Detector()
    ours = copy.deepcopy(plain)
    wrapped = DistributedDataParallel(ours)
    # After the wrapping, as a hook does it.
    checkpoint_modules(ours, ALL)
    train(plain)
    train(wrapped)
    assert_same(everything(ours), everything(plain))

    for model in (plain, wrapped):
        torch.manual_seed(0)
        model.zero_grad()
        with getattr(model, 'no_sync', torch.enable_grad)():
            loss_of(model(images(0))).backward()
        loss_of(model(images(1))).backward()
    assert_same(everything(ours), everything(plain))


def test_compiled():
    plain = Detector().eval()
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours, ALL)
    train(plain)
    train(torch.compile(ours, backend='eager'))
    assert ours.neck.checkpoint_has_run
    assert_same(everything(ours), everything(plain))


def test_inputs_changed_in_place_are_noticed():
    model = Detector()
    checkpoint_modules(model, ['heads.0'])
    maps = torch.randn(2, 4, 8, 8)
    loss = loss_of(model.heads[0](maps))
    maps.add_(1)
    with pytest.raises(RuntimeError, match='inplace operation'):
        loss.backward()

    checkpoint_modules(model, ['neck'])
    options = dict(scale=1.0, shifts=[torch.zeros(4, 1, 1)])
    loss = loss_of(model.neck((maps,), options=options, mode='add'))
    maps.add_(1)
    with pytest.raises(RuntimeError, match='inplace operation'):
        loss.backward()


def test_paths():
    model = Detector()
    assert checkpoint_modules(model, []) == []
    assert checkpoint_modules(model, ['heads.0']) == ['heads.0']
    assert checkpoint_modules(model, ['heads.0']) == ['heads.0']
    forward = model.heads[0].forward
    both = ['heads.1', 'heads.*', '*.1']
    assert checkpoint_modules(model, both) == ['heads.1', 'heads.0']
    assert model.heads[0].forward == forward
    train(model)

    deep = nn.ModuleDict(dict(a=Detector(), b=Detector()))
    assert checkpoint_modules(deep, ['*.heads.1']) == [
        'a.heads.1',
        'b.heads.1',
    ]
    shared = nn.Sequential(nn.Linear(2, 2))
    shared.append(shared[0])
    assert checkpoint_modules(shared, ['1']) == ['1']
    assert checkpoint_modules(shared, ['*']) == ['0']


@pytest.mark.parametrize(
    'paths, text',
    [
        ('neck', r"got 'neck'. Write \['neck'\]"),
        (['nekc'], "No module of Detector fits the path 'nekc'. .*: neck"),
        (['ne*'], r"'ne\*'. Nearest are: neck"),
        (['heads.2'], r'Nearest are: .*heads\.[01]'),
        (['xyz'], 'Nearest are: backbone, neck, heads'),
        ([''], 'Nearest are: backbone, neck, heads'),
        ([0], r'list of paths, but got \[0\]'),
        (['neck', 'heads'], r"heads is a ModuleList, .* 'heads\.\*'"),
        (['neck', 'neck.conv'], 'neck.conv lies inside neck'),
        (['heads.0.layers.*', 'heads.0'], r'layers\.0 lies inside heads\.0'),
    ],
)
def test_paths_that_cannot_work(paths, text):
    model = Detector()
    with pytest.raises(ConfigError, match=text):
        checkpoint_modules(model, paths)
    assert not any(is_checkpointed(m) for m in model.modules())


@pytest.mark.parametrize(
    'first, second',
    [('heads.0', 'heads.0.layers'), ('heads.0.layers', 'heads.0')],
)
def test_choices_of_two_calls_lie_apart_too(first, second):
    model = Detector()
    checkpoint_modules(model, [first])
    text = r'heads\.0\.layers lies inside heads\.0,'
    with pytest.raises(ConfigError, match=text):
        checkpoint_modules(model, [second])


def test_a_forward_wrapped_by_mmengine():
    from mmengine.runner import turn_on_activation_checkpointing

    model = Detector()
    turn_on_activation_checkpointing(model, ['neck'])
    with pytest.raises(ConfigError, match='`activation_checkpointing`'):
        checkpoint_modules(model, ['neck'])


FRAMEWORKS = {
    'cascade_e3va_swin_nano_digits.py': [
        'neck',
        'rpn_head',
        'roi_head.bbox_head.*',
        'roi_head.mask_head.*',
    ],
    'retinanet_e3va_swin_nano_digits.py': ['neck', 'bbox_head'],
    'upernet_e3va_swin_nano_digits.py': ['decode_head', 'auxiliary_head'],
}


@pytest.mark.parametrize('name', FRAMEWORKS)
def test_detectors_and_segmentors(name):
    """Losses, gradients and buffers of a step, and what stays alive."""
    tuned = 'retinanet' not in name
    config = Config.fromfile(CONFIGS / name)
    if 'size' in config.model.data_preprocessor:
        config.model.data_preprocessor.size = (96, 96)
    step = TrainingStep(
        config,
        'as-is' if tuned else 'frozen',
        size=(96, 96),
        batch=2,
    )
    plain = step.model
    with torch.no_grad():
        for parameter in plain.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = copy.deepcopy(plain)
    checkpoint_modules(ours, FRAMEWORKS[name])

    results, kept = [], []
    for model in (plain, ours):
        torch.manual_seed(0)
        data = model.data_preprocessor(step.data, training=True)
        data = copy.deepcopy(data)
        weights = [*model.parameters(), *model.buffers()]
        with LiveBytes([*weights, data['inputs']]) as count:
            before = count.live
            losses = model(**data, mode='loss')
            loss, terms = model.parse_losses(losses)
            kept.append(count.live - before)
        loss.backward()
        results.append({**terms, **everything(model)})
    assert_same(*reversed(results))
    assert kept[1] < 0.9 * kept[0]
    for name, parameter in ours.named_parameters():
        trains = parameter.requires_grad
        assert (parameter.grad is not None) == trains, name
