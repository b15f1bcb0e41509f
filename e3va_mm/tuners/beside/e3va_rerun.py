"""E3VA-Rerun: attention before each output runs again, beside the trunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import STREAM, Size, StageSpec, Trunk
from e3va_mm.tuners.beside.late import copy_blocks, require_plain, run_copy
from e3va_mm.tuners.beside.streams import Streams, StreamSidePath
from e3va_mm.tuners.e3va.side_path import SidePathOptions
from e3va_mm.tuners.lora import LoRA
from e3va_mm.utils.options import option, whole


@dataclass(frozen=True, kw_only=True)
class E3VARerunOptions(SidePathOptions):
    """Options of :class:`E3VARerun`, beside :class:`SidePathOptions`.

    Attributes:
        rerun (int): In how many blocks before each output attention runs
            again; no more than lie between two outputs. Defaults to 1.
        rank (int): Inner rank of LoRA in it. Defaults to 64.
    """

    rerun: int = option(1, whole())
    rank: int = option(64, whole())


@MODELS.register_module()
class E3VARerun(StreamSidePath):
    r"""Attention that runs again, on trunk and highway, with LoRA inside.

    In each of the ``K`` blocks before an output, with the trunk's stream
    :math:`x` before the block and its attention :math:`A`:

    .. math:: h \leftarrow h + A'(x + h) - A(x)

    and the output is :math:`x_j + h`. ``A'`` has the trunk's own weights, and
    updates of q and v beside them, so that the highway can weigh tokens anew,
    as LoRA does inside. The trunk runs as ever, without a graph. For backward
    the input of an attention alone is kept. It starts as the stock backbone,
    up to rounding. Not part of the paper.

    Args:
        **options: See :class:`E3VARerunOptions`.

    Raises:
        ConfigError: If the trunk has stages, fewer blocks before an output,
            blocks that take more than tokens, or weights in 8 bits.
    """

    OPTIONS = E3VARerunOptions
    taps = ('attn', STREAM)

    def attach(self, trunk: Trunk) -> list[nn.Parameter]:
        """See :class:`~e3va_mm.tuners.base.Tuner`."""
        require_plain(self, trunk)
        count = self.options.rerun
        # What the first block begins with is no tap.
        first, *others = map(len, trunk.blocks)
        most = min(first - 1, *others) if others else first - 1
        if count > most:
            raise ConfigError(
                f'`tuner.rerun` should be at most {most}, the number of '
                'blocks between two outputs and before the block of the '
                f'first, but got {count}. Lower it, or choose other '
                '`out_indices`.'
            )
        paths = [path for stage in trunk.blocks for path in stage[-count:]]
        blocks = [*zip(paths, copy_blocks(self, trunk, paths), strict=True)]
        self.updates = LoRA(rank=self.options.rank)
        self.updates.attach(
            SimpleNamespace(body=lambda: blocks, stock_class=trunk.stock_class)
        )
        branch = trunk.layout.taps['attn'].partition('#')[0]
        for _, block in blocks:
            # Weights are given when it runs.
            block.eval().to('meta')
            block.get_submodule(branch).register_forward_hook(_end_here)
        # In lists, or state dicts would ask for them.
        self._trunk, self._blocks = [trunk], blocks
        return super().attach(trunk)

    def build(self, stages: Sequence[StageSpec]) -> 'E3VARerun':
        """All that trains is in the blocks."""
        return self

    def start(
        self, stage: int, inherited: object | None, replay: object = None
    ) -> '_State':
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        return _State(stage, inherited)

    def add_tap(
        self,
        highway: '_State',
        stage: int,
        block: int,
        tap: str,
        value: Tensor,
    ) -> None:
        """See :class:`~e3va_mm.tuners.e3va.side_path.SidePath`."""
        kept = highway.taps if tap == STREAM else highway.attention
        kept.append(value.detach())
        del kept[: -1 - self.options.rerun]  # none reads those before

    def run(self, state: '_State', size: Size) -> Tensor:
        """See :class:`~e3va_mm.tuners.beside.streams.StreamSidePath`."""
        count = self.options.rerun
        end, highway = state.before or (None, 0)
        *before, last = [end, *state.taps][-1 - count :]
        keeps = torch.is_grad_enabled() and not torch.jit.is_tracing()
        for (path, block), x, attention in zip(
            self._blocks[state.stage * count :][:count],
            before,
            state.attention[-count:],
            strict=True,
        ):
            run = partial(_attention, self._trunk[0], path, block)
            again = (
                checkpoint(
                    run,
                    x + highway,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                if keeps
                else run(x + highway)
            )
            highway = highway + (again - attention).to(x.dtype)
        state.after = last, highway
        return last + highway


class _State(Streams):
    """Streams, and what attention gave in the blocks."""

    def __init__(self, stage: int, before: object | None) -> None:
        super().__init__(stage, before)
        self.attention: list[Tensor] = []


class _Attention(Exception):
    """What attention gave; its block need not run on."""


def _end_here(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    raise _Attention(output)


def _attention(
    trunk: Trunk, path: str, block: nn.Module, tokens: Tensor
) -> Tensor:
    """The first branch of a copy: (B, extra + H * W, C), as ``tokens``."""
    try:
        run_copy(trunk, path, block, tokens)
    except _Attention as found:
        return found.args[0]
    raise AssertionError(f'{path} has no branch of its own')
