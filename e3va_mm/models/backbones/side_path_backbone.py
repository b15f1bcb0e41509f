"""A frozen trunk with a side path: what every backbone of ours shares."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...checkpoint import (
    TrunkRecord,
    fingerprint,
    match_state,
    read_checkpoint,
)
from ...checkpoint.adapter_file import (
    CHECKPOINT,
    RECORD,
    file_sha256,
)
from ...checkpoint.unwrapping import converting
from ...engine.optim import cover_layer_decay
from ...errors import CheckpointError, ConfigError
from ...registry import MODELS
from ...utils import mark_trainable
from ..side_path.norm_offset import NormOffset
from ..side_path.stage_sum import KeptSum, TokenNorm, normalise
from ..trunks import StageEnd, Trunk
from .stock_arguments import registered
from .trunk_pass import run_trunk, trunk_difference
from .trunk_pool import share_open
from .trunk_storage import TrunkStorage


class SidePathBackbone(BaseModule):
    """Runs a frozen trunk without a graph and a side path beside it.

    The trunk's stock modules become children under their stock names, so that
    state dicts, optimizer keys and hooks see a stock backbone plus
    ``side_path``. Output norms keep their stock names (``norm0``...) but
    belong to the side path: they train.

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

    def __init__(
        self,
        trunk: Trunk,
        stock: nn.Module,
        out_stages: Sequence[int],
        side_path: Mapping | None = None,
        allow_random_trunk: bool = False,
        init_cfg: Mapping | None = None,
    ) -> None:
        if init_cfg is not None and not (
            isinstance(init_cfg, Mapping)
            and isinstance(init_cfg.get('checkpoint'), (str, os.PathLike))
            and init_cfg['checkpoint']
        ):
            raise ConfigError(
                '`backbone.init_cfg` of a frozen trunk should be '
                "dict(type='Pretrained', checkpoint=PATH_OR_URL), but got "
                f'{init_cfg}.'
            )
        super().__init__(init_cfg=init_cfg)
        self._adopt(stock)
        self.trunk = trunk
        self.out_stages = tuple(out_stages)
        trunk.prepare(self)
        self.allow_random_trunk = allow_random_trunk
        self.storage = TrunkStorage()
        self._reading: str | None = None
        # What to give for a picture instead of a pass, see `given`.
        self._given: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._sharded = False
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
        try:
            self.side_path = MODELS.build(
                dict(side_path, stages=trunk.stages(self))
            )
        except TypeError as error:
            if 'unexpected keyword argument' not in str(error):
                raise
            raise ConfigError(
                f'`side_path` of the backbone: {error}.'
            ) from error
        if self._train_output_norms and trunk.norm_goes_on():
            self._add_norm_offsets()
        mark_trainable(self, (part for _, part in self.trainable_children()))
        self.train()
        cover_layer_decay()

    @property
    def trunk_source(self) -> str | None:
        """Where the trunk's weights came from; None while they are random."""
        return self.storage.source

    @property
    def trunk_address(self) -> str | None:
        """Path or URL that the trunk's weights can be read from again."""
        return self.storage.address

    def _adopt(self, stock: nn.Module) -> None:
        """Take over the children, parameters and buffers of ``stock``."""
        for name, child in stock.named_children():
            self.add_module(name, child)
        for name, parameter in stock.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in stock.named_buffers(recurse=False):
            persistent = name not in stock._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent)

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

    def output_norms(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the stock parts that only outputs go through.

        Norms, but for those that the next stage of the trunk reads too.
        """
        if not self.trunk.norm_goes_on():
            paths = [
                *(self.trunk.output_norm(self, s) for s in self.out_stages),
                *self.trunk.output_parts(self),
            ]
            for path in filter(None, paths):
                yield path, self.get_submodule(path)

    def trainable_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the children that train, and no others do."""
        yield 'side_path', self.side_path
        if self._train_output_norms:
            yield from self.output_norms()

    def trunk_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the children that never change."""
        owned = self._side_path_names()
        for name, child in self.named_children():
            if name not in owned:
                yield name, child

    def _side_path_names(self) -> set[str]:
        """Names of the children that are no part of the trunk."""
        return {'side_path', *(name for name, _ in self.output_norms())}

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

    def init_weights(self) -> None:
        """Bring the trunk's weights; the side path is drawn already.

        Raises:
            CheckpointError: If ``init_cfg.checkpoint`` cannot be read or does
                not fit the trunk.
        """
        if self._is_init:
            return
        if self.init_cfg is None and self.storage.source is not None:
            pass  # the stock class has brought weights itself
        elif self.init_cfg is None:
            self.storage.unstore(self.trunk, self)
            self.trunk.init_random(self)
            print_log(
                f'The trunk of {type(self).__name__} is random: no '
                '`init_cfg`.',
                logger='current',
            )
        else:
            source = self.init_cfg['checkpoint']
            with self._reads(source) as state:
                self.load_state_dict(state, strict=False)
            # Of an adapter file the trunk has come from elsewhere.
            if RECORD not in state:
                self.storage.address = source
        self._is_init = True

    @contextmanager
    def _reads(self, source: str) -> Iterator[dict[str, Tensor]]:
        """Give the stock state of a file; messages name it meanwhile."""
        checkpoint = read_checkpoint(source)
        try:
            with converting('It'):
                state, form = self.trunk.to_stock_state(checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f'{source}: {error}') from None
        before, self._reading = self._reading, f'{source} ({form})'
        try:
            yield state
        finally:
            self._reading = before

    def trunk_state(self) -> dict[str, Tensor]:
        """The trunk's part of the state dict, its weights as they came."""
        return self.trunk_part(self.state_dict())

    def trunk_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a state with stock names belongs to the trunk."""
        owned = self._side_path_names()
        return {
            key: value
            for key, value in state.items()
            if key.split('.')[0] not in owned
        }

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args, **kwargs
    ) -> None:
        """Check that the whole trunk arrives, then load as usual.

        Both torch's and mmengine's loaders come through here. The latter only
        logs what does not fit; a frozen trunk with a part missing would train
        to nothing, so that is an error here, before anything is copied. What
        a file holds in no part at all (a stock model has no side path) keeps
        its value; the loaders' own ``strict`` does not see it.

        An adapter file says where its trunk is: that is brought first.
        """
        if self._sharded:
            raise CheckpointError(
                'The trunk is sharded over processes, and no state dict can '
                'be loaded into the model itself. Load by the runner: set '
                '`load_from` or `resume` in the config.'
            )
        record = state_dict.pop(prefix + RECORD, None)
        if record is not None:
            self._bring_trunk(TrunkRecord.from_tensor(record))
        found = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        own = self.state_dict()
        fitted = self._fit_state(dict(found), prefix, own)
        trunk = self.trunk_part(own)
        if trunk.keys() & found.keys():
            self.storage.source = self._reading or CHECKPOINT
            # What a resume brings is what `init_cfg` has brought before.
            if self.storage.address and fingerprint(trunk) != fingerprint(
                {key: fitted[key] for key in trunk}
            ):
                self.storage.address = None
            self.storage.unstore(self.trunk, self)
        elif self.trunk.options.weights != 'int8':
            # The trunk, which others may run on, stays stored as it is.
            stored = {**own, **dict(self.named_parameters())}
            fitted.update({key: stored[key] for key in trunk})
        else:  # cannot be loaded as it is stored
            self.storage.unstore(self.trunk, self)
        for key in found:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: v for key, v in fitted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fit_state(
        self, found: dict[str, Tensor], prefix: str, own: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state to load, complete, or an error.

        A file may hold the trunk, the side path with the output norms, or
        both, each in full; beside a trunk the norms alone are fine too.
        """
        source = self._reading or CHECKPOINT
        trunk = self.trunk_part(own)
        trained = {k: v for k, v in own.items() if k not in trunk}
        has_trunk = any(key in trunk for key in found)
        has_side_path = any(key.startswith('side_path.') for key in found)
        if not has_trunk and not has_side_path:
            keys = ', '.join(list(found)[:5]) or 'none'
            raise CheckpointError(
                f'Expected the weights of a backbone under {prefix!r} in '
                f'{source}, but no key of it is there (found: {keys}). A file '
                'of the backbone alone goes into '
                '`model.backbone.init_cfg.checkpoint`, a whole detector or '
                'segmentor into `load_from`.'
            )

        expected = {}
        notes = []
        as_found = dict(found)
        if has_trunk:
            with converting(source):
                notes += self.trunk.adapt_state(trunk, found)
            expected |= trunk
        if has_side_path:
            # A file of ours: side path and output norms come together.
            expected |= trained
        else:
            norms = {
                key: value
                for key, value in trained.items()
                if not key.startswith('side_path.')
            }
            expected |= {k: v for k, v in norms.items() if k in found}
            kept = ', '.join(key for key in norms if key not in found)
            notes.append('side path: not in the file, keeps its values')
            if kept:
                notes.append(
                    f'output norms: not in the file, keep their values: {kept}'
                )

        def explain() -> str:
            with converting(source):
                return self.trunk.explain_mismatch(trunk, as_found)

        report = match_state(
            expected,
            found,
            expected_leftovers=self.trunk.leftovers(self),
            what=f'backbone under {prefix!r}' if prefix else 'backbone',
            source=source,
            hint=explain,
            notes=notes,
        )
        print_log(str(report), logger='current')
        return {**own, **{key: found[key] for key in expected}}

    def _bring_trunk(self, record: TrunkRecord) -> None:
        """Have the trunk that an adapter file was trained on, or an error.

        It is there, or with another backbone in memory, or is read from where
        it was, from ``init_cfg``, or from beside the adapter file; the
        fingerprint decides.
        """
        refusals = []
        if self.storage.source is not None:
            present = fingerprint(self.trunk_state())
            if present == record.fingerprint:
                self.storage.address = self.storage.address or record.source
                return
            refusals.append(f'{present[:16]}: {self.storage.source}')
        if share_open(self, record.fingerprint):
            return
        named = self.init_cfg and self.init_cfg['checkpoint']
        sources = [record.source, named]
        if record.source is not None:
            beside = Path(record.file).parent / Path(record.source).name
            sources += [str(beside)] if beside.is_file() else []
        for source in dict.fromkeys(filter(None, sources)):
            try:
                with self._reads(source) as state:
                    fitted = self._fit_state(
                        self.trunk_part(state), '', self.state_dict()
                    )
                    came = fingerprint(self.trunk_part(fitted))
                    if came == record.fingerprint:
                        self.load_state_dict(fitted)
                        self.storage.address = source
                        return
            except CheckpointError as error:
                refusals.append(str(error))
                continue
            found = f'{came[:16]}: {source}'
            if source == record.source and record.sha256 is not None:
                changed = file_sha256(source) != record.sha256
                found += ', a file that has changed since' * changed
            refusals.append(found)
        raise CheckpointError(
            f'{record.file} needs the trunk with the fingerprint '
            f'{record.fingerprint[:16]}, which came from '
            f'{record.source or "its stock class"}. Instead there is:\n  '
            + '\n  '.join(refusals or ['nothing to read it from'])
            + '\nThe likely cause is another checkpoint in `init_cfg`, '
            'another size of pictures or windows in the config, or a file '
            'that was moved or changed. Put the file of the trunk where it '
            'was or beside the adapter file, or set '
            '`model.backbone.init_cfg.checkpoint` to it.'
        )

    def make_shardable(self) -> list[nn.Module]:
        """Store the trunk as asked for, once and for all.

        Returns:
            list[nn.Module]: Its parts that may be spread over processes.

        Raises:
            ConfigError: If it is stored in a way that cannot be spread.
        """
        if self.trunk.options.weights == 'int8':
            raise ConfigError(
                "`side_path.trunk_weights='int8'` cannot be sharded over "
                "processes. Store the trunk in 16 bits, `trunk_weights="
                "'bf16'`, or train with DDP, without `strategy`."
            )
        self.storage.store(self.trunk, self)
        self._sharded = True
        # Here, not in the class: other backbones are copied as any module.
        self.__deepcopy__ = _refuse_copy
        return self.trunk.units(self)

    def take_source_weights(self, other: 'SidePathBackbone') -> None:
        """Keep the weights as they came to another of the same trunk."""
        self.storage.source_weights = other.storage.source_weights

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

    def require_weights(self) -> None:
        """Refuse to train beside a trunk that has received no weights.

        Raises:
            ConfigError: If that is so and not allowed.
        """
        if (
            self.training
            and self.storage.source is None
            and not self.allow_random_trunk
        ):
            raise ConfigError(
                'Expected pre-trained weights in the frozen trunk, but it is '
                'random: neither `init_cfg`, `load_from` nor a resume has '
                'brought any. Set `model.backbone.init_cfg=dict('
                "type='Pretrained', checkpoint=...)`, or allow it with "
                '`model.backbone.allow_random_trunk=True`.'
            )

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


def _refuse_copy(memo: dict) -> NoReturn:
    raise ConfigError(
        'A model whose trunk is sharded over processes cannot be copied, as '
        'the EMAHook does. Take the TrainableEMAHook, or train without '
        '`strategy`.'
    )


def _put_source_weights(
    module: SidePathBackbone, state: dict, prefix: str, metadata: dict
) -> None:
    """Checkpoints hold the weights that came, not how they are stored."""
    source = module.storage.source_weights or {}
    state.update({prefix + key: source[key] for key in source})
