"""Where a stock backbone has its blocks, taps, outputs and downsamplings."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.options import (
    Check,
    Options,
    flag,
    option,
    optional,
    whole,
)


def _are_paths(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(a_path.fits, value))


a_path = Check(lambda value: isinstance(value, str) and bool(value), 'a path')
path_list = Check(_are_paths, 'a list of paths')
named_paths = Check(
    lambda value: (
        isinstance(value, Mapping)
        and bool(value)
        and _are_paths([*value, *value.values()])
    ),
    'a dict of paths by name',
)


@dataclass(frozen=True, kw_only=True)
class Layout(Options):
    """Declares a family of stock backbones.

    Paths are those of modules below the backbone, as in its state dict.
    ``{stage}`` is the number of a stage and ``{next}`` that of the one behind
    it; ``{block}`` is the place of a block in its list. What has no
    ``channels`` norm (a position encoding in the list of blocks) is no block.
    A path must lead somewhere, but for one that ends in ``?``.

    Without ``{stage}`` in ``blocks`` one list holds all blocks. If nothing
    says where stages end in it, the backbone has one resolution, as a plain
    ViT: ``out_indices`` count blocks then, and a stage of the side path ends
    with each output.

    Attributes:
        blocks (str): Path of a block.
        taps (Mapping[str, str]): Name of a tap -> path, in a block, of the
            module whose output the block adds to its residual; ``'path#2'``
            for the second time that a block calls it.
        stage_ends (str, optional): Path of the places of each stage's last
            block, where one list holds the blocks of all stages. The block
            behind changes width and resolution; its taps are those of the
            stage that it begins. Defaults to none.
        channels (str): Path, in a block, of a norm over its channels, those
            that it gives. Defaults to ``'norm1'``.
        first (str, optional): Path, in a block, of the module that it calls
            first, on its own input. Defaults to ``channels``.
        reads (Sequence[str]): Paths, in a block, of the modules that read its
            residual stream behind each branch but the last. Defaults to none.
        channels_last (bool): Whether maps are (B, H, W, C). Defaults to
            False: (B, C, H, W). Tokens are (B, L, C) always.
        output_norm (str, optional): Path of the norm of a stage's output.
        norm_goes_on (bool): Whether the next stage reads what that norm
            gives. Defaults to False.
        downsampling (Sequence[str]): Paths of what lies between a stage's end
            and the next stage, in order. If there is nothing, the highway
            ends with the stage. With one resolution it just goes on.
        embedding (Sequence[str]): Paths of what comes before the first block;
            computed in single precision.
        extra_tokens (str, optional): Path of the number of tokens before
            those of the image. Defaults to none.
        cut (str, optional): Path of the list to shorten after the last
            output; None to leave what comes after in the state dict.
        first_stage (int): Number of the first stage. Defaults to 0.
        pools (str, optional): Path of the switch that pools an output before
            its norm.

    Raises:
        ConfigError: If a value is of the wrong kind.
    """

    PREFIX: ClassVar[str] = 'layout.'

    blocks: str = option(check=a_path)
    taps: Mapping[str, str] = option(check=named_paths)
    stage_ends: str | None = option(None, optional(a_path))
    channels: str = option('norm1', a_path)
    first: str | None = option(None, optional(a_path))
    reads: Sequence[str] = option((), path_list)
    channels_last: bool = option(False, flag)
    output_norm: str | None = option(None, optional(a_path))
    norm_goes_on: bool = option(False, flag)
    downsampling: Sequence[str] = option((), path_list)
    embedding: Sequence[str] = option((), path_list)
    extra_tokens: str | None = option(None, optional(a_path))
    cut: str | None = option(None, optional(a_path))
    first_stage: int = option(0, whole(0))
    pools: str | None = option(None, optional(a_path))

    @property
    def flat(self) -> bool:
        """Whether one list holds all blocks."""
        return '{stage}' not in self.blocks

    @property
    def plain(self) -> bool:
        """Whether there is one resolution."""
        return self.flat and self.stage_ends is None

    def path(self, template: str, stage: int = 0, block: object = 0) -> str:
        """A template filled in for a stage, counted from 0."""
        number = stage + self.first_stage
        template = template.removesuffix('?')
        return template.format(stage=number, next=number + 1, block=block)

    def check(
        self, root: nn.Module, stages: int, outputs: Iterable[int]
    ) -> None:
        """Check that what is named is there.

        Args:
            root (nn.Module): The stock backbone.
            stages (int): Number of stages up to the last output.
            outputs (Iterable[int]): Stages that have an output.

        Raises:
            ConfigError: If a path leads nowhere.
        """
        named = [
            ('extra_tokens', self.extra_tokens, [0]),
            ('stage_ends', self.stage_ends, [0]),
            ('cut', self.cut, [0]),
            ('pools', self.pools, [0]),
            ('output_norm', self.output_norm, outputs),
            *(('embedding', each, [0]) for each in self.embedding),
            *(
                ('downsampling', each, range(stages - 1))
                for each in self.downsampling
            ),
        ]
        for field, template, where in named:
            for stage in where if template else ():
                found = self.path(template, stage)
                if find(root, found) is None and not template.endswith('?'):
                    raise ConfigError(
                        f'`layout.{field}` is {template!r}, but '
                        f'{type(root).__name__} has no {found!r}. Put a `?` '
                        'behind it if it may be missing.'
                    )

    def find_blocks(self, root: nn.Module) -> list[list[str]]:
        """Paths of the blocks of each stage.

        Raises:
            ConfigError: If there are none, or a tap of one is not there.
        """
        stages = []
        while True:
            template = self.path(self.blocks, len(stages), '{block}')
            blocks = [*self._blocks_of(root, template)]
            if blocks:
                stages.append(blocks)
            if self.flat or not blocks:
                break
        if not stages:
            raise ConfigError(
                f'`layout.blocks` is {self.blocks!r}, but '
                f'{type(root).__name__} has no such modules with a '
                f'{self.channels!r} in them. Its children are '
                f'{", ".join(n for n, _ in root.named_children())}.'
            )
        for where in (where for blocks in stages for where in blocks):
            block = root.get_submodule(where)
            for tap, inner in self.taps.items():
                if find(block, inner.split('#')[0]) is None:
                    raise ConfigError(
                        f'`layout.taps.{tap}` is {inner!r}, but {where} '
                        f'({type(block).__name__}) has no such module. It '
                        'has '
                        f'{", ".join(n for n, _ in block.named_modules())}.'
                    )
        if self.stage_ends is None:
            return stages
        ends = find(root, self.stage_ends) or ()  # which `check` refuses
        return split(stages[0], [end + 1 for end in ends])

    def _blocks_of(self, root: nn.Module, template: str) -> Iterator[str]:
        folder = find(root, template.partition('.{block}')[0])
        for name, _ in folder.named_children() if folder is not None else ():
            where = template.replace('{block}', name)
            if find(root, f'{where}.{self.channels}') is not None:
                yield where


def find(root: nn.Module, path: str) -> object | None:
    """What lies at a path below a module, or None."""
    for name in path.split('.') if path else ():
        children = getattr(root, '_modules', {})
        root = children.get(name, getattr(root, name, None))
        if root is None:
            return None
    return root


def split(blocks: Sequence[str], ends: Sequence[int]) -> list[Sequence[str]]:
    """Stages of the blocks up to each end."""
    return [blocks[a:b] for a, b in itertools.pairwise([0, *ends])]


def length_of(norm: nn.Module) -> int:
    """Channels of a norm."""
    return len(norm.weight)
