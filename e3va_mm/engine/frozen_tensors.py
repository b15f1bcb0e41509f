"""What of a model must not change while it trains, and whether it has."""

from collections.abc import Collection, Iterator
from hashlib import sha256
from typing import NamedTuple

import torch
from mmengine.model import BaseAveragedModel
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from e3va_mm.utils.tuned import tuned_backbones

# Of each tensor, spread over it. An optimizer's step moves nearly all values.
SAMPLES = 64


class _Leaf(NamedTuple):
    """A plain tensor; those stored in 8 bits are made of several."""

    form: tuple
    values: Tensor


class FrozenTensors:
    """Remembers the frozen tensors of a model, to find the changed ones.

    Frozen are parameters that require no gradient, the buffers of a module
    all of whose parameters are such (the statistics of a norm), and all of
    the trunk of a backbone with a side path. Averages of a model inside of it
    (``BaseAveragedModel``) are not, for they follow what trains; nor are
    buffers that no state dict holds, caches mostly, outside of those trunks.

    They are remembered as 64 values each, compared bit by bit, and as a
    SHA-256 each: a few KiB a hundred tensors. Values are compared as they are
    stored, so NaN equals itself.

    Args:
        model (nn.Module): The model, without its wrapper, as it will train.
        exempt (Collection[str]): Names that may change. Defaults to none.

    Attributes:
        names (list[str]): The frozen tensors by their names in the model;
            without those that were found to train since.
    """

    def __init__(self, model: nn.Module, exempt: Collection[str] = ()) -> None:
        self._model = model
        self.names = [n for n in _frozen(model) if n not in exempt]
        self._remember(self.names)

    def changed(self, full: bool = False) -> list[str]:
        """Names of the tensors that are not what they were.

        Args:
            full (bool): Compare every value instead of samples: reads all
                the weights once. Defaults to False.
        """
        now = self._leaves()
        changed = [
            name
            for name in self.names
            if self._forms[name] != _form(now, name)
        ]
        same = [name for name in self.names if name not in set(changed)]
        if full:
            found = [n for n in same if _digest(now[n]) != self._digests[n]]
        else:
            found = self._changed_samples(same, now)
        changed = {*changed, *found}
        if changed:
            # Something may have made them train. Not looked for in each call:
            # it takes longer than to compare.
            changed -= self._forget_what_trains(changed)
        return [n for n in self.names if n in changed]

    def accept_new_forms(self) -> None:
        """Remember anew what is now stored in another type.

        Trunks store their weights as the config wants them at the first
        forward pass.
        """
        now = self._leaves()
        self._remember(
            [n for n in self.names if self._forms[n] != _form(now, n)]
        )

    def _forget_what_trains(self, names: Collection[str]) -> set[str]:
        present = {name for name, _ in _named_tensors(self._model)}
        trains = {n for n in names if n in present} - {*_frozen(self._model)}
        self.names = [n for n in self.names if n not in trains]
        return trains

    def _remember(self, names: list[str]) -> None:
        now = self._leaves()
        if not hasattr(self, '_forms'):
            self._forms, self._digests, self._samples = {}, {}, {}
        for name in names:
            self._forms[name] = _form(now, name)
            self._digests[name] = _digest(now.get(name, []))
        sizes, values = _sample(names, now)
        self._samples.update(zip(names, values.split(sizes), strict=True))

    def _changed_samples(self, names: list[str], now: dict) -> list[str]:
        sizes, values = _sample(names, now)
        if not names:
            return []
        before = torch.cat([self._samples[name] for name in names])
        if torch.equal(before, values):
            return []
        pairs = zip(names, values.split(sizes), strict=True)
        return [n for n, v in pairs if not torch.equal(self._samples[n], v)]

    def _leaves(self) -> dict[str, list[_Leaf]]:
        """The frozen tensors as they are stored now."""
        wanted = set(self.names)
        return {
            name: list(_plain(tensor))
            for name, tensor in _named_tensors(self._model)
            if name in wanted
        }


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _frozen(model: nn.Module) -> list[str]:
    """Names of the frozen tensors, parameters first."""
    names = [n for n, p in model.named_parameters() if not p.requires_grad]
    buffers = dict(model.named_buffers())
    frozen, caches, averages = set(), set(), ()
    for prefix, module in model.named_modules():
        inside = f'{prefix}.' if prefix else ''
        caches |= {inside + n for n in module._non_persistent_buffers_set}
        if isinstance(module, BaseAveragedModel):
            averages += (inside,)
        trains = [p.requires_grad for p in module.parameters()]
        if trains and not any(trains):
            frozen |= {inside + name for name, _ in module.named_buffers()}
    frozen -= caches
    for prefix, backbone in tuned_backbones(model):
        own = {
            name[len(prefix) :]: buffer
            for name, buffer in buffers.items()
            if name.startswith(prefix)
        }
        frozen |= {prefix + name for name in backbone.trunk_part(own)}
    names += [name for name in buffers if name in frozen]
    return [name for name in names if not name.startswith(averages)]


def _plain(tensor: Tensor) -> Iterator[_Leaf]:
    """The tensors that one is made of: itself, mostly."""
    if is_traceable_wrapper_subclass(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, part))
    else:
        values = tensor.detach()
        yield _Leaf((values.dtype, values.shape), values)


def _form(leaves: dict[str, list[_Leaf]], name: str) -> tuple:
    return tuple(leaf.form for leaf in leaves.get(name, ()))


def _digest(leaves: list[_Leaf]) -> bytes:
    digest = sha256()
    for leaf in leaves:
        digest.update(_bytes(leaf.values).cpu().numpy())
    return digest.digest()


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _sample(
    names: list[str], leaves: dict[str, list[_Leaf]]
) -> tuple[list[int], Tensor]:
    """Bytes of some values of each tensor: how many, and all in a row.

    In a row they reach the main memory by one copy.
    """
    sizes, parts = [], []
    for name in names:
        size = 0
        for leaf in leaves.get(name, ()):
            flat = leaf.values.flatten()
            stride = max(1, flat.numel() // SAMPLES)
            part = _bytes(flat[::stride][:SAMPLES])
            parts.append(part.to(parts[0].device) if parts else part)
            size += part.numel()
        sizes.append(size)
    if not parts:
        return sizes, torch.empty(0, dtype=torch.uint8)
    return sizes, torch.cat(parts).cpu()
