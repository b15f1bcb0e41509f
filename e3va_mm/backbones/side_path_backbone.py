"""A frozen trunk with a side path: what every backbone of ours shares."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from e3va_mm.backbones.stock_arguments import build_part, registered
from e3va_mm.backbones.trunk_backbone import TrunkBackbone
from e3va_mm.backbones.trunk_pass import run_trunk, trunk_difference
from e3va_mm.backbones.trunk_pool import share_open
from e3va_mm.engine.optim import cover_layer_decay
from e3va_mm.errors import ConfigError
from e3va_mm.trunks import StageEnd, Trunk
from e3va_mm.tuners.e3va.norm_offset import NormOffset
from e3va_mm.tuners.e3va.stage_sum import KeptSum, TokenNorm, normalise
from e3va_mm.utils import mark_trainable


class SidePathBackbone(TrunkBackbone):
    """Runs a frozen trunk without a graph and a side path beside it.

    A stock backbone plus ``side_path``. Output norms belong to the side path:
    they train.

    Output ``i`` is ``norm_i(x_i + h_i)``, ``x`` the trunk and ``h`` the side
    path's highway (E3VA, Sec. 3). Before the first step ``h`` is zero and the
    backbone gives what the stock one gives.

    Args:
        trunk (Trunk): Reader of the stock family.
        stock (nn.Module): The stock backbone, cut after its last output.
        out_stages (Sequence[int]): Stages that have an output, ascending.
        side_path (Mapping, optional): Config of the side path: ``type``
            (default ``'e3va_mm.E3VASidePath'``) and its arguments; also
            ``train_output_norms`` (bool, default True).
        allow_random_trunk (bool): Allow training with a trunk that has not
            received weights. Defaults to False.
        init_cfg (Mapping, optional): ``dict(type='Pretrained',
            checkpoint=...)`` with a path or URL of trunk weights.

    Raises:
        ConfigError: If ``init_cfg`` or ``side_path`` asks for what is not
            there.
    """

    ADDED = 'side_path'
    has_graph = False
    ADDED_IN_WORDS = 'side path'

    def __init__(
        self,
        trunk: Trunk,
        stock: nn.Module,
        out_stages: Sequence[int],
        side_path: Mapping | None = None,
        allow_random_trunk: bool = False,
        init_cfg: Mapping | None = None,
    ) -> None:
        super().__init__(
            trunk, stock, out_stages, allow_random_trunk, init_cfg
        )
        trunk.prepare(self)
        # What to give for a picture instead of a pass, see `given`.
        self._given: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._register_state_dict_hook(_put_source_weights)

        side_path = dict(side_path or {})
        self._train_output_norms = side_path.pop('train_output_norms', True)
        if not isinstance(self._train_output_norms, bool):
            raise ConfigError(
                '`side_path.train_output_norms` should be True or False, but '
                f'got {self._train_output_norms!r}.'
            )
        kind = side_path.setdefault('type', 'e3va_mm.E3VASidePath')
        if registered(kind) is None:
            raise ConfigError(
                '`side_path.type` should be the name of a side path, such as '
                f"'e3va_mm.E3VASidePath', but got {kind!r}."
            )
        self.side_path = build_part(
            'side_path', dict(side_path, stages=trunk.stages(self))
        )
        if self._train_output_norms and trunk.norm_goes_on():
            self._add_norm_offsets()
        mark_trainable(self, (part for _, part in self.trainable_children()))
        self.train()
        cover_layer_decay()

    def _add_norm_offsets(self) -> None:
        """Let outputs train whose norms the trunk itself goes on from."""
        offsets = {}
        for stage in self.out_stages:
            path = self.trunk.output_norm(self, stage)
            norm = None if path is None else self.get_submodule(path)
            if isinstance(TokenNorm.of(norm), TokenNorm):
                offsets[str(stage)] = NormOffset(norm.normalized_shape[0])
        self.side_path.output_norms = nn.ModuleDict(offsets)

    def _norm_offsets(self) -> dict[str, NormOffset]:
        return dict(getattr(self.side_path, 'output_norms', nn.ModuleDict()))

    def trainable_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the children that train, and no others do."""
        yield 'side_path', self.side_path
        if self._train_output_norms:
            yield from self.output_norms()

    def declared(self) -> Iterator[nn.Parameter]:
        """See the base class."""
        for _, child in self.trainable_children():
            yield from child.parameters()

    def train(self, mode: bool = True) -> 'SidePathBackbone':
        """Set the mode of the side path; the trunk stays in eval mode.

        With ``side_path.trunk_drop_path`` its drop path layers follow
        ``mode``.
        """
        super().train(mode)
        for _, child in self.trunk_children():
            child.eval()
            if self.trunk.options.drop_path:
                for module in child.modules():
                    if isinstance(module, DropPath):
                        module.train(mode)
        return self

    def share_trunk(self, other: 'SidePathBackbone') -> None:
        """Drop the own trunk, run on that of another backbone.

        Both see its weights, whoever moves or stores them. A pass for both
        at once is :func:`run_trunk`.

        Args:
            other (SidePathBackbone): One with the same trunk.

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
        for name, child in other.trunk_children():
            self._modules[name] = child
        self._parameters.update(other._parameters)
        self._buffers.update(other._buffers)
        self.storage = other.storage
        # Bringing the weights is the other's business now.
        self.init_cfg = None
        self._is_init = True

    def _share_open(self, wanted: str) -> bool:
        """See the base class."""
        return share_open(self, wanted)

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

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one map (B, C_i, H_i, W_i) for each output.

        A tuple, which all three frameworks' necks and heads take.

        Raises:
            ConfigError: See :meth:`require_weights`.
        """
        if self._given is not None and self._given[0] is x:
            return self._given[1]
        return run_trunk([self], x)[0]

    def output(
        self, stage: int, total: Tensor, end: StageEnd
    ) -> tuple[Tensor, KeptSum | None]:
        """What the stock backbone gives of a stage, and what is kept of it.

        Args:
            stage (int): Index of the stage.
            total (Tensor): (B, L, C), trunk and highway.
            end (StageEnd): The trunk's end of the stage.
        """
        path = self.trunk.output_norm(self, stage)
        norm = None if path is None else self.get_submodule(path)
        offset = self._norm_offsets().get(str(stage))
        norm = TokenNorm.of(norm) if offset is None else offset(norm)
        if self.trunk.gives_maps(self):
            return normalise(norm, total, end.size)
        return self.trunk.output(self, total, end, norm), None


def _put_source_weights(
    module: SidePathBackbone, state: dict, prefix: str, metadata: dict
) -> None:
    """Checkpoints hold the weights that came, not how they are stored."""
    source = module.storage.source_weights or {}
    state.update({prefix + key: source[key] for key in source})
