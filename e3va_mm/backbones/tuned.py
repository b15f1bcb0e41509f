"""The one backbone class: a stock backbone, its trunk and a tuner."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from e3va_mm.backbones.loading import LoadsTrunk
from e3va_mm.backbones.stock_pass import run_stock
from e3va_mm.backbones.trunk_cache import TrunkCache, check_trunk
from e3va_mm.backbones.trunk_pass import run_trunk, trunk_difference
from e3va_mm.backbones.trunk_pool import share_open
from e3va_mm.backbones.trunk_weights import TrunkWeights
from e3va_mm.errors import ConfigError
from e3va_mm.trunks import StageEnd, Trunk
from e3va_mm.tuners.base import Tuner
from e3va_mm.tuners.e3va.norm_offset import NormOffset
from e3va_mm.tuners.e3va.stage_sum import (
    Invertible,
    KeptSum,
    TokenNorm,
    normalise,
)
from e3va_mm.utils.freezing import mark_trainable

STATISTICS = nn.modules.batchnorm._BatchNorm


class TunedBackbone(LoadsTrunk):
    """What a stock backbone becomes when a tuner joins it.

    The stock module itself, with its class extended by this one: its children
    keep their names in state dicts and in ``named_parameters()``, and there is
    one child more, that of the tuner (``side_path`` or ``petl``). Made by
    :func:`tune`; the names in configs are those of
    :mod:`e3va_mm.backbones.faces`.

    A tuner beside the trunk (E3VA) has it run frozen, in eval mode and without
    a graph; output ``i`` is ``norm_i(x_i + h_i)``, ``x`` the trunk and ``h``
    the highway (E3VA, Sec. 3), and the output norms train. A tuner inside
    (LoRA, Mona) leaves the stock forward as it is, hooks into its blocks and
    names what else trains. Before the first step either gives what the stock
    backbone gives, and so it does at any time with ``tuner.enabled = False``,
    by no bit different.

    Attributes:
        trunk (Trunk): Reads the stock family.
        trunk_cache (TrunkCache, optional): Keeps on disk what it gives.
        tuner (Tuner): What trains.
    """

    @property
    def tuner(self) -> Tuner:
        """The child that no stock backbone has."""
        return self._modules[self.child]

    def _join(self, trunk: Trunk, tuner: Tuner) -> None:
        """Let a tuner join; freeze all that it does not train."""
        self.child = tuner.CHILD
        self.has_graph = tuner.HAS_GRAPH
        self.trunk_cache: TrunkCache | None = None
        # What to give for an image instead of a pass, see `given`.
        self._given: tuple[Tensor, tuple[Tensor, ...]] | None = None
        trained = {id(p) for p in tuner.attach(trunk)}
        self._trained = [p for p in self.parameters() if id(p) in trained]
        self.add_module(tuner.CHILD, tuner)
        if tuner.HAS_GRAPH:
            trains = [tuner, *self._trained]
        else:
            trunk.install_kernels()
            if tuner.options.train_output_norms and trunk.norm_goes_on:
                self._add_norm_offsets()
            trains = [child for _, child in self.trainable_children()]
        mark_trainable(self, trains)
        self.keep_norms(self.state_dict())
        self.train()

    def _add_norm_offsets(self) -> None:
        """Let outputs train whose norms the trunk itself goes on from."""
        offsets = {}
        for stage in self.trunk.out_stages:
            norm = self._output_norm(stage)
            if isinstance(TokenNorm.of(norm), TokenNorm):
                offsets[str(stage)] = NormOffset(norm.normalized_shape[0])
        self.tuner.output_norms = nn.ModuleDict(offsets)

    def trainable_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Paths and modules of what trains beside a trunk without a graph."""
        yield self.child, self.tuner
        if self.tuner.options.train_output_norms:
            yield from self.output_norms()

    def declared(self) -> Iterator[nn.Parameter]:
        """What must receive gradients, whatever the model."""
        if self.has_graph:
            yield from self.tuner.parameters()
            return
        for _, child in self.trainable_children():
            yield from child.parameters()

    def trained_stock(self) -> set[str]:
        """Names of what a tuner inside changes in the stock backbone."""
        ids = {id(p) for p in self._trained}
        names = {n for n, p in self.named_parameters() if id(p) in ids}
        if self._trains_whole():  # statistics change too
            names |= {name for name, _ in self.named_buffers()}
        own = self.own_names()
        return {name for name in names if name.split('.')[0] not in own}

    def _trains_whole(self) -> bool:
        return self.has_graph and all(
            p.requires_grad for p in self.parameters()
        )

    def train(self, mode: bool = True) -> 'TunedBackbone':
        """Set the mode of what trains; what is frozen stays in eval mode.

        Inside, the stock modules follow ``mode``, but for batch norms of a
        backbone that does not train as a whole, and for all where nothing
        trains. Beside a trunk with ``trunk_drop_path`` its drop path layers
        follow.
        """
        nn.Module.train(self, mode)
        # By stage: asked again now and then, and after what was loaded.
        self._invertible: dict[int, Invertible] = {}
        whole = self._trains_whole()
        nothing = not any(p.requires_grad for p in self.parameters())
        for _, child in self.trunk_children():
            for module in child.modules():
                if self.has_graph:
                    frozen = isinstance(module, STATISTICS) and not whole
                    if nothing or frozen:
                        module.training = False
                else:
                    drops = self.trunk.options.drop_path and isinstance(
                        module, DropPath
                    )
                    module.training = mode and bool(drops)
        return self

    def merge(self) -> None:
        """Fold what was learned into the stock weights, where that goes.

        The outputs stay, within rounding; the tuner is empty then.

        Raises:
            ConfigError: If the tuner computes what no weight can hold.
        """
        folds = any(True for _ in self.tuner.parameters())
        self.tuner.merge()
        if folds:  # they are no one's published weights any more
            self.storage.address = None
            self.storage.source = f'{self.storage.source}, merged'

    # -- running ------------------------------------------------------------

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one map (B, C_i, H_i, W_i) for each output.

        A tuple, which all three frameworks' necks and heads take.

        Raises:
            ConfigError: If it trains and its trunk has received no weights.
        """
        if not self.has_graph:
            if self._given is not None and self._given[0] is x:
                return self._given[1]
            return run_trunk([self], x)[0]
        self.require_weights()
        if not self.tuner.enabled:
            return run_stock(self, x)
        self.trunk.pixels = tuple(x.shape[-2:])
        outputs = super().forward(x)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    @contextmanager
    def given(
        self, image: Tensor, outputs: tuple[Tensor, ...]
    ) -> Iterator[None]:
        """Give these outputs for this very tensor, without a pass.

        Args:
            image (Tensor): (B, 3, H, W), what a model will call this with.
            outputs (tuple[Tensor, ...]): What :func:`run_trunk` gave for it.
        """
        self._given = image, outputs
        try:
            yield
        finally:
            self._given = None

    def output(
        self, stage: int, total: Tensor, end: StageEnd
    ) -> tuple[Tensor, KeptSum | None]:
        """What the stock backbone gives of a stage, and what is kept of it.

        Args:
            stage (int): Index of the stage.
            total (Tensor): (B, L, C), trunk and highway.
            end (StageEnd): The trunk's end of the stage.
        """
        norm = self._output_norm(stage)
        offsets = getattr(self.tuner, 'output_norms', {})
        if str(stage) in offsets:
            norm = offsets[str(stage)](norm)
        else:
            norm = TokenNorm.of(norm)
        if self.trunk.gives_maps:
            known = self._invertible.setdefault(stage, Invertible())
            return normalise(norm, total, end.size, known)
        return self.trunk.output(total, end, norm), None

    def _output_norm(self, stage: int) -> nn.Module | None:
        path = self.trunk.output_norm(stage)
        return None if path is None else self.get_submodule(path)

    # -- sharing ------------------------------------------------------------

    def share_trunk(self, other: 'TunedBackbone') -> None:
        """Drop the own trunk, run on that of another backbone.

        Both see its weights, whoever moves or stores them. A pass for both
        at once is :func:`run_trunk`.

        Args:
            other (TunedBackbone): One with the same trunk, without a graph.

        Raises:
            ConfigError: If the trunks differ.
        """
        difference = trunk_difference(self, other)
        if difference:
            raise ConfigError(
                f'Expected two backbones with the same trunk, but {difference}'
                '. Give both configs the same options of the trunk, or let '
                'each have its own.'
            )
        self._modules.update(other.trunk_children())
        self._parameters.update(other._parameters)
        self._buffers.update(other._buffers)
        self.storage = other.storage
        # Bringing the weights is the other's business now.
        self.init_cfg = None
        self._is_init = True

    def shares_trunk_with(self, other: 'TunedBackbone') -> bool:
        """Whether both run on one trunk."""
        return self.storage is other.storage

    def _share_open(self, wanted: str) -> bool:
        return not self.has_graph and share_open(self, wanted)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """A copy, or a pickle, extends the stock class once more."""
        return _bare, (self.trunk.stock_class,), self.__dict__.copy()


@cache
def _extended(stock_class: type) -> type:
    return type(
        f'Tuned{stock_class.__name__}',
        (TunedBackbone, stock_class),
        dict(__module__=__name__, __doc__=TunedBackbone.__doc__),
    )


def _bare(stock_class: type) -> TunedBackbone:
    cls = _extended(stock_class)
    return cls.__new__(cls)


def tune(
    stock: nn.Module,
    trunk: Trunk,
    tuner: Tuner,
    *,
    allow_random_trunk: bool = False,
    init_cfg: Mapping | None = None,
    trunk_cache: Mapping | None = None,
) -> TunedBackbone:
    """Let a tuner join a stock backbone.

    Args:
        stock (nn.Module): The stock backbone. It becomes the result.
        trunk (Trunk): What reads it; has cut it after its last output.
        tuner (Tuner): What trains.
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)`` with a path or URL of trunk weights.
        trunk_cache (Mapping, optional): Options of a
            :class:`~e3va_mm.backbones.trunk_cache.TrunkCache`.

    Raises:
        ConfigError: If ``init_cfg`` asks for what is not there, or the tuner
            finds nothing to tune.
    """
    brought = bool(getattr(stock, '_is_init', False))
    stock.__class__ = _extended(type(stock))
    stock._begin(trunk, TrunkWeights(), allow_random_trunk, init_cfg, brought)
    stock._join(trunk, tuner)
    if trunk_cache is not None:
        check_trunk(None if tuner.HAS_GRAPH else trunk)
        stock.trunk_cache = TrunkCache(**trunk_cache)
    return stock
