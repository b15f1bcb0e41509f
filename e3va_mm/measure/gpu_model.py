"""What a step would cost on a GPU, modelled from its operations.

A roofline, no measurement: its counts are exact, its ratios are good, its
seconds are what a well-fed card would need at least. Two bounds:

* *gpu*: the sum over kernels of the largest of 3 us (launch), bytes /
  bandwidth (memory) and flops / 60 % of the peak (arithmetic);
* *host*: 4 us for every operation that Python dispatches and 3 us more for
  each launch.

A step takes about the larger of the two. What is not modelled: where the host
waits for a value (``.item()``), and kernels outside of torch's dispatcher
(mmcv's own operators).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop

from e3va_mm.errors import ConfigError
from e3va_mm.numerics.products import EMULATED
from e3va_mm.numerics.temporaries import as_on_gpu

DISPATCH, LAUNCH = 4e-6, 3e-6  # seconds of the host
KERNEL = 3e-6  # seconds of the GPU, at least
REACHED = 0.6  # of the peak, by products of a good size
LAUNCHES, MEMORY, ARITHMETIC = BOUNDS = ('launches', 'memory', 'arithmetic')

aten = torch.ops.aten
# New tensors over old memory, or over memory that nothing has been put into.
NO_KERNELS = {
    *('empty', 'empty_like', 'empty_strided', 'new_empty', '_unsafe_view'),
    *('new_empty_strided', 'is_same_size', 'resize_', 'set_', 'detach_'),
}
# What reads no tensor that it writes.
OVERWRITES = {'copy_', 'fill_', 'zero_'}
# What of the dispatcher is no work: torch's own marks, a value for the host.
NO_OPERATIONS = {'_local_scalar_dense', '_record_function_enter_new'}
NO_OPERATIONS |= {'_record_function_exit'}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
PRODUCTS |= {aten.convolution, aten.convolution_backward}
FLOPS = {
    **flop_registry,
    # Stands for the fused attention of a GPU on a CPU.
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Card(NamedTuple):
    """A GPU by its data sheet.

    Attributes:
        single (float): Peak flop/s in fp32. Without TF32, which torch does
            not use for products unless asked.
        half (float): Peak flop/s in 16 bits, dense, summed in fp32.
        bandwidth (float): Bytes/s of its memory.
    """

    single: float
    half: float
    bandwidth: float


# NVIDIA's data sheets, and its white papers "Turing", "GA102" and "Ada" for
# the rates of tensor cores that sum in fp32. The largest model where one name
# has several (80 GB, SXM).
CARDS: Mapping[str, Card] = {
    '1080Ti': Card(11.3e12, 11.3e12, 484e9),  # no tensor cores
    '2080Ti': Card(13.4e12, 53.8e12, 616e9),
    '3060': Card(12.7e12, 25.5e12, 360e9),
    '3090': Card(35.6e12, 71e12, 936e9),
    '4090': Card(82.6e12, 165.2e12, 1008e9),
    'T4': Card(8.1e12, 65e12, 320e9),
    'L4': Card(30.3e12, 121e12, 300e9),
    'V100': Card(15.7e12, 125e12, 900e9),
    'A100': Card(19.5e12, 312e12, 2039e9),
    'H100': Card(67e12, 989.5e12, 3350e9),
    'H200': Card(67e12, 989.5e12, 4800e9),
}


def named_cards(names: str | None) -> list[str]:
    """Keys of ``CARDS`` from a list such as ``'3090,a100'``.

    Raises:
        ConfigError: If one is unknown.
    """
    known = {name.casefold(): name for name in CARDS}
    asked = [name.strip() for name in (names or '').split(',')]
    for name in filter(None, asked):
        if name.casefold() not in known:
            raise ConfigError(
                f'Cards that are known are {", ".join(CARDS)}, but got '
                f'{name!r}. Name the one closest to yours.'
            )
    return [known[name.casefold()] for name in asked if name]


class Kernel(NamedTuple):
    """What a launch does.

    Attributes:
        place (str): Where in the model.
        moved (int): Bytes read and written.
        flops (int): Floating-point operations of products, 0 of all others.
        half (bool): Whether they are in 16 bits.
    """

    place: str
    moved: int
    flops: int
    half: bool

    def bound(self, card: Card) -> tuple[str, float]:
        """What bounds it on a card, and the seconds it takes."""
        peak = card.half if self.half else card.single
        seconds = (
            KERNEL,
            self.moved / card.bandwidth,
            self.flops / (REACHED * peak),
        )
        return max(zip(BOUNDS, seconds, strict=True), key=lambda b: b[1])


class Launches(TorchDispatchMode):
    """Counts what is dispatched and launched inside, as on a GPU.

    Any device does; on a CPU, what of ours has a way for each device takes
    that of a GPU. Each operation is one kernel, and so is
    ``scaled_dot_product_attention``, in both directions, or an operator
    registered with ``torch.library``; views and empty tensors are none.
    (Attention on a CPU to a mask that needs a gradient counts what it is made
    of there.)

    Args:
        place (Callable, optional): Called at each operation; returns where in
            the model it is. Defaults to ``''`` for all.

    Attributes:
        operations (Counter[str]): Dispatched, by place.
        work (Counter[Kernel]): Launches that do the same.

    Examples:
        >>> with Launches() as counted:
        ...     y = torch.ones(2, 3, device='meta').t() * 2
        >>> counted.kernels, counted.ops, counted.host == 2 * 3e-6 + 3 * 4e-6
        (2, 3, True)
    """

    def __init__(self, place: Callable[[], str] = str) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.work: Counter[Kernel] = Counter()
        self._place = place

    @property
    def ops(self) -> int:
        """All operations that were dispatched."""
        return self.operations.total()

    @property
    def kernels(self) -> int:
        """All launches."""
        return self.work.total()

    @property
    def host(self) -> float:
        """Modelled seconds of the host."""
        return self.ops * DISPATCH + self.kernels * LAUNCH

    def gpu(self, card: str) -> float:
        """Modelled seconds of a GPU, a key of ``CARDS``."""
        return sum(
            count * kernel.bound(CARDS[card])[1]
            for kernel, count in self.work.items()
        )

    def __enter__(self) -> 'Launches':
        self._inside = ExitStack()
        self._inside.enter_context(as_on_gpu())
        self._inside.enter_context(OneAttention())
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._inside.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = _computed(func, args, kwargs)
        name = func._overloadpacket.__name__
        if name in NO_OPERATIONS:
            return result
        place = self._place()
        self.operations[place] += 1
        if not func.is_view and name not in NO_KERNELS:
            formula = FLOPS.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            tensors = _moved(func, name, args, kwargs, result)
            moved = sum(map(_bytes, tensors))
            floats = (
                t.element_size() for t in tensors if t.is_floating_point()
            )
            half = next(floats, 0) == 2
            self.work[Kernel(place, moved, flops, half)] += 1
        return result


def count_launches(backbone: nn.Module, image: Tensor) -> Launches:
    """Count a forward pass on the meta device, and backward if any trains.

    The second forward pass, after one that fills what is made once. Nothing
    is computed: any size takes as long. A tensor on another device, or a wait
    for a value, is an error.

    Args:
        backbone (nn.Module): It is moved to the meta device, for good.
        image (Tensor): (B, 3, H, W), on any device.

    Returns:
        Launches: What was counted.

    Examples:
        >>> counted = count_launches(nn.Linear(8, 8), torch.zeros(4, 8))
        >>> counted.kernels  # forward, gradients of weight and bias
        3
    """
    backbone.to('meta')
    image = image.to('meta')
    with torch.no_grad():
        backbone(image)
    with Launches() as counted:
        outputs = [t for t in tree_leaves(backbone(image)) if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [*map(torch.empty_like, outputs)])
    return counted


def modelled(counted: Launches, cards: Sequence[str]) -> dict[str, dict]:
    """What was counted, and what bounds it on some cards, by place.

    Returns:
        dict: Places to ``ops``, ``kernels``, seconds of the ``host``, and for
        each of ``cards`` seconds of the GPU by what bounds its kernels.
    """
    places = {
        place: dict(
            ops=ops,
            kernels=0,
            host=ops * DISPATCH,
            cards={card: dict.fromkeys(BOUNDS, 0.0) for card in cards},
        )
        for place, ops in counted.operations.items()
    }
    for kernel, count in counted.work.items():
        figures = places[kernel.place]
        figures['kernels'] += count
        figures['host'] += count * LAUNCH
        for card in cards:
            bound, seconds = kernel.bound(CARDS[card])
            figures['cards'][card][bound] += count * seconds
    return places


def _computed(func, args, kwargs):
    """What an operation gives; products the fastest way that a CPU has."""
    first = next((t for t in args if isinstance(t, Tensor)), None)
    if (
        func._overloadpacket not in PRODUCTS
        or first.device.type != 'cpu'
        or first.dtype not in EMULATED
    ):
        return func(*args, **kwargs)
    wide_args, wide_kwargs = tree_map_only(
        Tensor, Tensor.float, (args, kwargs)
    )
    result = func(*wide_args, **wide_kwargs)
    result = tree_map_only(Tensor, lambda t: t.to(first.dtype), result)
    return kwargs['out'].copy_(result) if 'out' in kwargs else result


def _moved(func, name: str, args, kwargs, result) -> list[Tensor]:
    """What is read and what is written; a tensor may be both."""
    read = tree_leaves((args, kwargs))
    known = {id(value) for value in read}
    written = [v for v in tree_leaves(result) if id(v) not in known]
    if name not in OVERWRITES:
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                written += tree_leaves(value)
    return [v for v in (*read, *written) if isinstance(v, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Those that a kernel moves: what is expanded is there once."""
    size = tensor.element_size()
    if tensor.layout is not torch.strided:
        return size * tensor.numel()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


class OneAttention(TorchFunctionMode):
    """Fuses attention where there is no device, as a GPU would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
