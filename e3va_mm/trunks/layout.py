"""Where a stock backbone has its blocks, taps, outputs and downsamplings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils import is_whole


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_paths(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_path, value))


def _is_named_paths(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_paths([*value, *value.values()])


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_whole(value, 0)


# The fields that are no path: what they are, for the code and in words.
KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    'taps': (_is_named_paths, 'a dict of paths by name'),
    'channels_last': (_is_switch, 'True or False'),
    'norm_goes_on': (_is_switch, 'True or False'),
    'reads': (_is_paths, 'a list of paths'),
    'downsampling': (_is_paths, 'a list of paths'),
    'embedding': (_is_paths, 'a list of paths'),
    'first_stage': (_is_number, 'a whole number from 0 on'),
}


class Layout(NamedTuple):
    """Declares a family of stock backbones to a side path.

    Paths are those of modules below the backbone, as in its state dict.
    ``{stage}`` is the number of a stage and ``{next}`` that of the one behind
    it; ``{block}`` is the place of a block in its list. What has no
    ``channels`` norm (a position encoding in the list of blocks) is no block.
    A path must lead somewhere, but for one that ends in ``?``.

    Without ``{stage}`` in ``blocks`` the backbone has one resolution, as a
    plain ViT: ``out_indices`` count blocks then, and a stage of the side path
    ends with each output.

    Attributes:
        blocks (str): Path of a block.
        taps (Mapping[str, str]): Name of a tap -> path, in a block, of the
            module whose output the block adds to its residual; ``'path#2'``
            for the second time that a block calls it.
        channels (str): Path, in a block, of a norm over its channels.
            Defaults to ``'norm1'``.
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
            those of the picture. Defaults to none.
        cut (str, optional): Path of the list to shorten after the last
            output; None to leave what comes after in the state dict.
        first_stage (int): Number of the first stage. Defaults to 0.
        pools (str, optional): Path of the switch that pools an output before
            its norm.
    """

    blocks: str
    taps: Mapping[str, str]
    channels: str = 'norm1'
    first: str | None = None
    reads: Sequence[str] = ()
    channels_last: bool = False
    output_norm: str | None = None
    norm_goes_on: bool = False
    downsampling: Sequence[str] = ()
    embedding: Sequence[str] = ()
    extra_tokens: str | None = None
    cut: str | None = None
    first_stage: int = 0
    pools: str | None = None

    @classmethod
    def of(cls, given: Mapping) -> 'Layout':
        """A layout from a config.

        Raises:
            ConfigError: If a name is unknown, one without a default is
                missing, or a value is of the wrong kind.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(
                '`layout` should be a dict such as dict(blocks=..., taps=...)'
                f', but got {given!r}.'
            )
        unknown = [key for key in given if key not in cls._fields]
        missing = [key for key in ('blocks', 'taps') if key not in given]
        if unknown or missing:
            what = (
                f'`layout.{unknown[0]}` is unknown'
                if unknown
                else f'`layout.{missing[0]}` is missing'
            )
            raise ConfigError(
                f'{what}. A layout has {", ".join(cls._fields)}; `blocks` and '
                '`taps` are needed. See e3va_mm.trunks.Layout.'
            )
        for name, value in given.items():
            fits, what = KINDS.get(name, (_is_path, 'a path'))
            may_be_none = cls._field_defaults.get(name, '') is None
            if not (fits(value) or (value is None and may_be_none)):
                raise ConfigError(
                    f'`layout.{name}` should be {what}, but got {value!r}.'
                )
        return cls(**given)

    @property
    def plain(self) -> bool:
        """Whether there is one resolution."""
        return '{stage}' not in self.blocks

    def path(self, template: str, stage: int = 0, block: int = 0) -> str:
        """A template filled in for a stage, counted from 0."""
        number = stage + self.first_stage
        template = template.removesuffix('?')
        return template.format(stage=number, next=number + 1, block=block)

    def check(self, root: nn.Module, stages: int, outputs: Iterable[int]):
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
            ('cut', self.cut, [0]),
            ('pools', self.pools, [0]),
            ('output_norm', self.output_norm, outputs),
            *(('embedding', path, [0]) for path in self.embedding),
            *(
                ('downsampling', path, range(stages - 1))
                for path in self.downsampling
            ),
        ]
        for field, template, where in named:
            for stage in where if template else ():
                path = self.path(template, stage)
                if find(root, path) is None and not template.endswith('?'):
                    raise ConfigError(
                        f'`layout.{field}` is {template!r}, but '
                        f'{type(root).__name__} has no {path!r}. Put a `?` '
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
            if self.plain or not blocks:
                break
        if not stages:
            raise ConfigError(
                f'`layout.blocks` is {self.blocks!r}, but '
                f'{type(root).__name__} has no such modules with a '
                f'{self.channels!r} in them. Its children are '
                f'{", ".join(n for n, _ in root.named_children())}.'
            )
        for path in (path for blocks in stages for path in blocks):
            block = root.get_submodule(path)
            for tap, inner in self.taps.items():
                if find(block, inner.split('#')[0]) is None:
                    raise ConfigError(
                        f'`layout.taps.{tap}` is {inner!r}, but {path} '
                        f'({type(block).__name__}) has no such module. It '
                        'has '
                        f'{", ".join(n for n, _ in block.named_modules())}.'
                    )
        return stages

    def _blocks_of(self, root: nn.Module, template: str) -> Iterator[str]:
        folder = find(root, template.partition('.{block}')[0])
        for name, _ in folder.named_children() if folder is not None else ():
            path = template.replace('{block}', name)
            if find(root, f'{path}.{self.channels}') is not None:
                yield path


def find(root: nn.Module, path: str) -> object | None:
    """What lies at a path below a module, or None."""
    for name in path.split('.') if path else ():
        children = getattr(root, '_modules', {})
        root = children.get(name, getattr(root, name, None))
        if root is None:
            return None
    return root


def length_of(norm: nn.Module) -> int:
    """Channels of a norm."""
    return len(norm.weight)
