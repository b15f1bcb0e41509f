"""Any stock backbone, tuned from inside."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from e3va_mm.backbones.stock_arguments import (
    FREEZING,
    build_part,
    build_stock,
    registered,
    say_without_effect,
    taken_apart,
)
from e3va_mm.backbones.trunk_backbone import TrunkBackbone
from e3va_mm.engine.optim import cover_layer_decay
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks import Layout, TrunkOptions
from e3va_mm.trunks.base import Size
from e3va_mm.trunks.building import build_trunk
from e3va_mm.trunks.reader import grid_of
from e3va_mm.tuners.base import PETLMethod
from e3va_mm.tuners.blocks import Block
from e3va_mm.utils import mark_trainable

STATISTICS = nn.modules.batchnorm._BatchNorm


@MODELS.register_module()
class PETLBackbone(TrunkBackbone):
    """A stock backbone with a tuning method inside, to compare E3VA with.

    The stock class runs as it is, forward and backward: a method inserts
    what it adds by hooks, names which parameters train, and the rest is
    frozen. Outputs, state dict and files are those of the stock class; what
    is added lies under ``petl.``.

    Stochastic depth, dropout and ``with_cp`` are those of the stock class.
    Batch norms keep their statistics unless the whole backbone trains.

    Args:
        trunk (Mapping): Config of the stock backbone, with its
            ``out_indices``. Its ``init_cfg`` may be here or outside.
        method (Mapping): ``type`` and arguments of the method, such as
            ``dict(type='e3va_mm.LoRA', rank=64)``.
        layout (Mapping, optional): As for
            :class:`~e3va_mm.models.E3VABackbone`.
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)``. Every trunk weight must arrive.

    Raises:
        ConfigError: If there is no such trunk or method, an argument is
            unknown or out of range, or a method finds nothing to tune.
    """

    ADDED = 'petl'
    has_graph = True
    ADDED_IN_WORDS = 'tuning method'

    def __init__(
        self,
        trunk: Mapping,
        method: Mapping,
        layout: Mapping | None = None,
        allow_random_trunk: bool = False,
        init_cfg: Mapping | None = None,
    ) -> None:
        kind, stock, init_cfg = taken_apart(trunk, init_cfg)
        say_without_effect(type(self).__name__, stock, FREEZING)
        layout = None if layout is None else Layout.of(layout)
        built = build_stock(kind, stock, without=FREEZING)
        out_indices = getattr(built, 'out_indices', None)
        reader = build_trunk(built, TrunkOptions(), layout)
        # The stock forward gives the outputs itself here.
        built.out_indices = out_indices
        super().__init__(
            self._file_reader(reader),
            built,
            reader.out_stages,
            allow_random_trunk,
            init_cfg,
        )
        reader.share(self)
        self.out_indices = reader.out_indices
        if getattr(built, '_is_init', False):
            self.storage.source = f'{type(built).__name__} itself'
        # In a list, or it would be a child of this.
        self._stock = [built]
        self._picture: Size = (0, 0)
        self._extra_tokens = reader.extra_tokens
        blocks = [
            Block(path, module, reader.layout, self._grid)
            for path, module in reader.body(self)
        ]
        method = _build_method(method)
        trained = {id(p) for p in method.attach(built, blocks)}
        self.petl = method
        self._trained = [p for p in self.parameters() if id(p) in trained]
        mark_trainable(self, [method, *self._trained])
        self.train()
        cover_layer_decay()

    def _file_reader(self, reader):
        """What reads files of the stock backbone."""
        return reader

    def _grid(self, inputs: tuple, value: Tensor) -> Size:
        """The grid (H, W) of the picture's tokens among ``value``."""
        return grid_of(inputs, value, self._extra_tokens, self._picture)

    def trained_stock(self) -> set[str]:
        """See the base class."""
        ids = {id(p) for p in self._trained}
        names = {n for n, p in self.named_parameters() if id(p) in ids}
        if self._trains_whole():  # statistics change too
            names |= {name for name, _ in self.named_buffers()}
        return names - {
            name for name in names if name.split('.')[0] in self.own_names()
        }

    def _trains_whole(self) -> bool:
        return all(p.requires_grad for p in self.parameters())

    def declared(self) -> Iterator[nn.Parameter]:
        """See the base class."""
        return self.petl.parameters()

    def train(self, mode: bool = True) -> 'PETLBackbone':
        """Set the mode of all but frozen batch norms.

        A backbone of which nothing trains stays in eval mode.
        """
        super().train(mode)
        whole = self._trains_whole()
        nothing = not any(p.requires_grad for p in self.parameters())
        for _, child in self.trunk_children():
            for module in child.modules():
                if nothing or (isinstance(module, STATISTICS) and not whole):
                    module.training = False
        self._stock[0].training = mode and not nothing
        return self

    def merge(self) -> None:
        """Fold what was learned into the stock weights, where that goes.

        The outputs stay, within rounding; ``petl`` is empty then.

        Raises:
            ConfigError: If the method computes what no weight can hold.
        """
        folds = any(True for _ in self.petl.parameters())
        self.petl.merge()
        if folds:  # they are no one's published weights any more
            self.storage.address = None
            self.storage.source = f'{self.storage.source}, merged'

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> what the stock backbone gives.

        Raises:
            ConfigError: If it trains and has received no weights.
        """
        self.require_weights()
        self._picture = tuple(x.shape[-2:])
        outputs = self._stock[0].forward(x)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _build_method(method: Mapping) -> nn.Module:
    """A method from its config.

    Raises:
        ConfigError: If there is none of the name, or an argument is unknown.
    """
    kind = method.get('type') if isinstance(method, Mapping) else None
    found = kind and registered(kind)
    if not (isinstance(found, type) and issubclass(found, PETLMethod)):
        raise ConfigError(
            '`backbone.method` should be the config of a tuning method, such '
            f"as dict(type='e3va_mm.LoRA', rank=64), but got {method!r}."
        )
    return build_part('method', method)
