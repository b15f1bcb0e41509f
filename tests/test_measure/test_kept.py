"""Bytes kept for backward, by arithmetic and beside saved-tensor hooks."""

import pytest
import torch
from torch import nn

from e3va_mm.measure import fold_paths, kept_for_backward
from e3va_mm.measure.kept import ModulePath, kept_by_part
from tests.helpers import build_e3va, build_stock
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
    """By saved-tensor hooks, each storage once, nothing that was passed in."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = module(*inputs)
    del outputs
    known = [*module.parameters(), *module.buffers(), *inputs]
    known = {t.untyped_storage()._cdata for t in known}
    return sum(
        tensor.untyped_storage().nbytes()
        for key, tensor in saved.items()
        if key not in known
    )


def test_bytes_by_arithmetic():
    layer, x = nn.Linear(C, C), torch.zeros(N, C)
    assert kept_for_backward(layer, x) == 0, 'inputs do not count'
    assert kept_for_backward(nn.Sequential(nn.ReLU(), layer), x) == SIZE
    # Sigmoid and both tanh keep their outputs, sin its input; the product
    # with a number and the views keep nothing, and nor do the outputs.
    with torch.no_grad():  # does not matter to what training keeps
        assert kept_for_backward(Model(), x) == 4 * SIZE
    assert kept_for_backward(Model().requires_grad_(False), x) == 0


def test_inputs_inside_containers_do_not_count():

    class Nested(nn.Module):
        def forward(self, pair, sample):
            return pair[1].exp() * sample['a'][0]

    x, y = (torch.zeros(N, C, requires_grad=True) for _ in range(2))
    kept = kept_for_backward(Nested(), (0, x), sample=dict(a=[y]))
    assert kept == SIZE, 'exp alone'


@pytest.mark.parametrize('where', ['context', 'module', 'buffer'])
def test_a_hiding_place_is_found_out(where):
    module = nn.Sequential(nn.Linear(C, C), Holding(where))
    x = torch.zeros(N, C)
    assert saved_bytes(module, x) == 0
    assert kept_for_backward(module, x) == SIZE


@pytest.mark.parametrize(
    'backbone',
    [
        build_stock,
        build_e3va,
        lambda: build_e3va(tuner=dict(preset='lean')),
        lambda: build_e3va(tuner=dict(save_taps='bf16')),
        lambda: build_e3va(tuner=dict(save_taps='recompute')),
        lambda: build_e3va(tuner=dict(downsampling='linear')),
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


def test_paths_fold_to_a_depth_and_to_parts_of_a_config():
    sizes = {'a.b.c': 1, 'a.b.d': 2, 'a.e': 4, 'f': 8, '': 16}
    assert fold_paths(sizes, 2) == {'': 16, 'f': 8, 'a.e': 4, 'a.b': 3}
    assert list(fold_paths(sizes, 1).items()) == [('', 16), ('f', 8), ('a', 7)]
    assert fold_paths({}, 1) == {}
    names = {
        'neck.fpn_convs.0': 'neck',
        'auxiliary_head.1.convs.0.conv': 'auxiliary_head.1',
        'roi_head.mask_head.convs.0': 'roi_head.mask_head',
        'roi_head.bbox_head.1.loss_cls': 'roi_head.bbox_head.1',
        'roi_head': 'roi_head',
        '': '',
    }
    for path, name in names.items():
        assert kept_by_part({path: 1}) == {name: 1}


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
