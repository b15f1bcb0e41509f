"""Which part of a model an operation belongs to, forward and backward."""

from bisect import bisect_right
from collections.abc import Callable
from functools import wraps

from torch import nn

from e3va_mm.frameworks.autograd import in_backward, next_node, running_node
from e3va_mm.measure.kept import ModulePath
from e3va_mm.utils.tuned import side_path_backbones

ADDED = ('side_path', 'petl')  # children that no stock backbone has
BETWEEN, UPDATE = 'targets and losses', 'optimizer'


class Parts(ModulePath):
    """Returns, when called, the part of a model that runs now.

    A context manager. Parts are the model's children, by name, and what a
    tuner adds to one (``'backbone.side_path'``); what runs between them in
    forward; what follows backward. A node of backward belongs to the part
    that ran when forward made it, by torch's numbers of nodes.

    Args:
        model (nn.Module): The root.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Trunks call their side paths in hooks.
        self._calls = []
        for prefix, backbone in side_path_backbones(model):
            path = f'{prefix}{backbone.child}'
            self._calls.append((backbone, 'output', path))
            for name in ('start', 'add_tap', 'output', 'inherit'):
                self._calls.append((backbone.tuner, name, path))
        # Which part ran from which node on.
        self._firsts, self._ran = [0], [BETWEEN]
        self._backward = BETWEEN
        self._end = 0  # of the nodes of forward
        self._is_update = False

    def __call__(self) -> str:
        """A part's name."""
        part = self._part()
        if not in_backward():
            # Not in backward, where a GPU has a thread with its own numbers.
            self._end = next_node()
            self._is_update &= part == BETWEEN
            return UPDATE if self._is_update else part
        self._is_update = True
        node = running_node()
        # Some run forward again and so make further nodes, or have none.
        if part != BETWEEN:
            self._backward = part
        elif node is not None and node < self._end:
            self._backward = self._ran[bisect_right(self._firsts, node) - 1]
        return self._backward

    def __enter__(self) -> 'Parts':
        for owner, name, path in self._calls:
            vars(owner)[name] = self._noted(getattr(owner, name), path)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for owner, name, _ in self._calls:
            del vars(owner)[name]

    def _part(self) -> str:
        names = super().__call__().split('.')
        added = [i for i, name in enumerate(names) if name in ADDED]
        return '.'.join(names[: added[0] + 1 if added else 1]) or BETWEEN

    def _noted(self, function: Callable, path: str) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            self._running.append(path)
            self._note()
            try:
                return function(*args, **kwargs)
            finally:
                self._running.pop()
                self._note()

        return call

    def _note(self) -> None:
        part = self._part()
        if part != self._ran[-1] and not in_backward():
            self._firsts.append(next_node())
            self._ran.append(part)

    def _enter_module(self, *args) -> None:
        super()._enter_module(*args)
        self._note()

    def _leave_module(self, *args) -> None:
        super()._leave_module(*args)
        self._note()
