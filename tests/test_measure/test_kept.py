"""Bytes kept for backward, by arithmetic and beside saved-tensor hooks."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from e3va_mm.measure import (
    TrainingStep,
    fold_paths,
    kept_by_module,
    kept_for_backward,
)
from e3va_mm.measure.kept import ModulePath
from tests.helpers import build_e3va, build_stock
from tests.test_configs import CONFIGS
from tests.test_measure.test_live_bytes import Hiding

N, C = 6, 32  # tokens and channels
SIZE = 4 * N * C


class Model(nn.Module):
    """Two parts, the second used twice, and an addition of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(C, C), nn.Sigmoid())
        self.second = nn.Tanh()

    def forward(self, x):
        y = self.first(x)
        a = self.second(y.view(-1))
        return dict(out=[self.second(a) * 2, (y + 1).sin()])


class Holding(nn.Module):
    """Keeps a tensor where autograd does not know of it."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        if self.where == 'context':
            return Hiding.apply(x)
        if self.where == 'module':
            self.held = x * 2
        elif self.where == 'buffer':
            self.register_buffer('held', x * 2)
        return x.neg()


def saved_bytes(module, *inputs):
    """By saved-tensor hooks, each storage once, nothing that was given."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = module(*inputs)
    del outputs
    # Looked at now: a first forward pass may store weights anew, and what is
    # saved may then take the place in memory of those that went.
    given = [*module.parameters(), *module.buffers(), *inputs]
    known = {t.untyped_storage()._cdata for t in given}
    return sum(
        tensor.untyped_storage().nbytes()
        for key, tensor in saved.items()
        if key not in known
    )


def test_a_linear_layer_keeps_nothing_but_its_input():
    layer = nn.Linear(C, C)
    x = torch.zeros(N, C)
    assert kept_for_backward(layer, x) == 0, 'inputs do not count'
    assert kept_for_backward(nn.Sequential(nn.ReLU(), layer), x) == SIZE


def test_each_storage_counts_once_where_it_is_made():
    # Sigmoid and tanh keep their outputs, sin its input; the product with a
    # number and the views keep nothing, and nor do the outputs.
    sizes = kept_by_module(Model(), torch.zeros(N, C))
    assert sizes == {'second': 2 * SIZE, 'first.1': SIZE, '': SIZE}
    assert list(sizes) == ['second', 'first.1', ''], 'the largest first'


def test_nothing_is_kept_without_a_graph():
    model = Model().requires_grad_(False)
    assert kept_by_module(model, torch.zeros(N, C)) == {}
    with torch.no_grad():  # does not matter to what training keeps
        assert kept_for_backward(Model(), torch.zeros(N, C)) == 4 * SIZE


def test_inputs_inside_containers_do_not_count():

    class Sample:
        def __init__(self, tensor):
            self.tensors = dict(a=[tensor])

    class Nested(nn.Module):
        def forward(self, pair, sample):
            return pair[1].exp() * sample.tensors['a'][0]

    x, y = (torch.zeros(N, C, requires_grad=True) for _ in range(2))
    kept = kept_by_module(Nested(), (0, x), sample=Sample(y))
    assert kept == {'': SIZE}, 'exp alone'


@pytest.mark.parametrize('where', ['context', 'module', 'buffer'])
def test_a_hiding_place_is_found_out(where):
    module = nn.Sequential(nn.Linear(C, C), Holding(where))
    x = torch.zeros(N, C)
    assert saved_bytes(module, x) == 0
    assert kept_by_module(module, x) == {'1': SIZE}


@pytest.mark.parametrize(
    'backbone',
    [
        build_stock,
        build_e3va,
        lambda: build_e3va(side_path=dict(preset='lean')),
        lambda: build_e3va(side_path=dict(save_taps='bf16')),
        lambda: build_e3va(side_path=dict(save_taps='recompute')),
        lambda: build_e3va(side_path=dict(downsampling='linear')),
        lambda: build_e3va(out_indices=(1, 2)),
    ],
    ids='stock exact lean bf16 recompute linear out_indices'.split(),
)
def test_no_tensor_hides_in_a_backbone(backbone):
    module = backbone()
    module.init_weights()
    image = torch.randn(1, 3, 60, 92)
    saved = saved_bytes(module, image)
    # The output norms keep as much at least as their outputs have.
    assert saved > sum(output.nbytes for output in module(image))
    assert kept_for_backward(module, image) == saved


def test_a_frozen_stock_backbone_keeps_nothing():
    module = build_stock().requires_grad_(False)
    assert kept_for_backward(module, torch.randn(1, 3, 64, 64)) == 0


def test_the_loss_of_a_whole_detector_has_its_places():
    step = TrainingStep(
        Config.fromfile(CONFIGS / 'cascade_e3va_swin_nano_digits.py'),
        'full',
        size=(64, 96),
        batch=1,
    )
    data = step.model.data_preprocessor(step.data, True)
    sizes = kept_by_module(step.model, **data, mode='loss')
    assert fold_paths(sizes, 1).keys() == {
        *('backbone', 'neck', 'rpn_head', 'roi_head', ''),
    }
    alone = kept_by_module(step.model.backbone, data['inputs'])
    # Path for path as of the backbone alone; the neck keeps its outputs too.
    for path, size in alone.items():
        if path:
            assert sizes[f'backbone.{path}'] == size, path


def test_paths_fold_to_a_depth():
    sizes = {'a.b.c': 1, 'a.b.d': 2, 'a.e': 4, 'f': 8, '': 16}
    assert fold_paths(sizes, 2) == {'': 16, 'f': 8, 'a.e': 4, 'a.b': 3}
    assert list(fold_paths(sizes, 1).items()) == [('', 16), ('f', 8), ('a', 7)]
    assert fold_paths({}, 1) == {}


def test_the_path_is_right_after_an_error_that_is_caught():

    class Failing(nn.Module):
        def forward(self, x):
            raise MemoryError

    class Trying(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Failing())
            self.other = nn.Identity()

        def forward(self, x):
            try:
                self.inner(x)
            except MemoryError:
                return self.other(x)

    model = nn.Sequential(Trying(), nn.Identity())
    seen = []
    with ModulePath(model) as path:
        for module in (model[0].other, model[1]):
            module.register_forward_hook(lambda *_: seen.append(path()))
            module.register_forward_pre_hook(lambda *_: seen.append(path()))
        model(torch.zeros(1))
        assert path() == ''
    # Before and after the forward of each.
    assert seen == ['0.other', '0', '1', '']
