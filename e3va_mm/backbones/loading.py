"""Loading of tuned backbones: the whole trunk arrives, or an error."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from e3va_mm.backbones.trunk_weights import TrunkWeights
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.trunks import Trunk
from e3va_mm.utils.files import file_sha256
from e3va_mm.utils.tuned import TunedModule
from e3va_mm.weights import (
    TrunkRecord,
    fingerprint,
    match_state,
    read_checkpoint,
)
from e3va_mm.weights.adapter_extraction import CHECKPOINT
from e3va_mm.weights.adapter_file import RECORD
from e3va_mm.weights.state_dicts import converting


class LoadsTrunk(TunedModule):
    """Brings the trunk's weights, from wherever they are, whole or not at all.

    Output norms keep their stock names (``norm0``...) but are no part of the
    trunk: files of classifiers do not have them.

    Attributes:
        storage (TrunkWeights): Where the trunk's weights came from.
        allow_random_trunk (bool): Whether to train with a trunk that has not
            received weights.
    """

    # The child that no stock backbone has.
    child: str

    def _begin(
        self,
        trunk: Trunk,
        storage: TrunkWeights,
        allow_random_trunk: bool,
        init_cfg: Mapping | None,
        brought: bool,
    ) -> None:
        """Begin to be more than a stock backbone.

        Args:
            trunk (Trunk): What reads the stock backbone.
            storage (TrunkWeights): New.
            allow_random_trunk (bool): See the class.
            init_cfg (Mapping, optional): ``dict(type='Pretrained',
                checkpoint=...)`` with a path or URL of trunk weights.
            brought (bool): Whether the stock class has brought weights itself.
        """
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
        # By these the stock class draws weights, where there is no file.
        self._stock_init_cfg = vars(self).get('init_cfg')
        self.init_cfg = None if init_cfg is None else dict(init_cfg)
        self._is_init = False
        self.trunk = trunk
        self.allow_random_trunk = allow_random_trunk
        self.storage = storage
        self._reading: str | None = None
        if brought:
            storage.source = f'{trunk.stock_class.__name__} itself'
            storage.take(trunk, self.state_dict())
        if trunk.options.weights != 'int8' or brought:
            # In 8 bits only once weights are there: DDP copies them before.
            storage.store(trunk)
        self.register_state_dict_post_hook(_put_source_weights)
        self.register_load_state_dict_post_hook(_store)

    @property
    def trunk_source(self) -> str | None:
        """See :class:`TunedModule`."""
        return self.storage.source

    @property
    def trunk_address(self) -> str | None:
        """See :class:`TunedModule`."""
        return self.storage.address

    def output_norms(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the stock parts that only outputs go through.

        Norms, but for those that the next stage of the trunk reads too.
        """
        if not self.trunk.norm_goes_on:
            paths = [
                *map(self.trunk.output_norm, self.trunk.out_stages),
                *self.trunk.output_parts(),
            ]
            for path in filter(None, paths):
                yield path, self.get_submodule(path)

    def norm_names(self) -> list[str]:
        """Names of the state of :meth:`output_norms`."""
        return [
            f'{path}.{key}'
            for path, norm in self.output_norms()
            for key in norm.state_dict()
        ]

    def init_weights(self) -> None:
        """Bring the trunk's weights; the rest is drawn already.

        Raises:
            CheckpointError: If ``init_cfg.checkpoint`` cannot be read or does
                not fit the trunk.
        """
        if self._is_init:
            return
        if self.init_cfg is None and self.storage.source is not None:
            pass  # the stock class has brought weights itself
        elif self.init_cfg is None:
            self._draw()
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

    def _draw(self) -> None:
        """Draw the trunk's weights as the stock class does."""
        self.storage.make_room(self.trunk)
        # Stock code draws all that is below it; the tuner has its own.
        tuner = self._modules.pop(self.child)
        self.init_cfg = self._stock_init_cfg
        try:
            super().init_weights()
        finally:
            self._modules[self.child] = tuner
            self.init_cfg = None
        self.keep_norms(self.state_dict())
        self.storage.store(self.trunk)

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
        trained = self.trained_stock()
        return {
            key: value
            for key, value in self._stock_part(state).items()
            if key not in trained
        }

    def _stock_part(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file of the stock backbone must bring."""
        owned = self.own_names()
        return {
            key: value
            for key, value in state.items()
            if key.split('.')[0] not in owned
        }

    def trained_stock(self) -> set[str]:
        """Names of what changes in training, output norms left out.

        Of the stock backbone's state alone, parameters and buffers.
        """
        raise NotImplementedError

    def own_names(self) -> set[str]:
        """Names of the children that are no part of the trunk."""
        return {self.child, *(name for name, _ in self.output_norms())}

    def trunk_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the children of the stock backbone."""
        owned = self.own_names()
        for name, child in self.named_children():
            if name not in owned:
                yield name, child

    def upgrade(self, state: dict[str, Tensor], prefix: str) -> None:
        """See :class:`TunedModule`."""
        self._modules[self.child].upgrade(state, f'{prefix}{self.child}.')

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
        record = state_dict.pop(prefix + RECORD, None)
        if record is not None:
            self._bring_trunk(TrunkRecord.from_tensor(record))
        self.upgrade(state_dict, prefix)
        found = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        own = self.state_dict()
        fitted = self._fit_state(dict(found), prefix, own, record is not None)
        trunk = self.trunk_part(own)
        if record is None:
            self._note_norms(found, fitted, own)
        if record is None and self._stock_part(own).keys() & found.keys():
            self.storage.source = self._reading or CHECKPOINT
            # What a resume brings is what `init_cfg` has brought before.
            came = {key: fitted[key] for key in trunk}
            if (
                self.storage.address
                and self.trunk_fingerprint() != fingerprint(came)
            ):
                self.storage.address = None
            if not self.storage.take(self.trunk, fitted):
                # Processes must agree on what they have.
                self.storage.fingerprint = fingerprint(came)
        elif self.trunk.options.weights != 'int8':
            # The trunk, which others may run on, stays stored as it is.
            stored = {**own, **dict(self.named_parameters())}
            fitted.update({key: stored[key] for key in trunk})
        else:  # cannot be loaded as it is stored
            self.storage.make_room(self.trunk)
        for key in found:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: v for key, v in fitted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _note_norms(
        self,
        found: Mapping[str, Tensor],
        fitted: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> None:
        """Keep the output norms of a stock backbone, which are to train.

        Beside a side path norms are trained ones; then those of before are
        right if the trunk stays.

        Args:
            found (Mapping[str, Tensor]): What a file holds.
            fitted (Mapping[str, Tensor]): What is to be loaded of it.
            own (Mapping[str, Tensor]): What is there.
        """
        if not any(key.startswith(f'{self.child}.') for key in found):
            self.keep_norms(found)
        elif any(
            not torch.equal(own[key].cpu().float(), fitted[key].cpu().float())
            for key in self.trunk_part(own)
        ):
            self.storage.norms = None

    def keep_norms(self, state: Mapping[str, Tensor]) -> None:
        """Keep the output norms of a stock state, see ``tuner.enabled``.

        Args:
            state (Mapping[str, Tensor]): With the names of the stock backbone.
        """
        names = self.norm_names()
        came = {name: state[name].clone() for name in names if name in state}
        self.storage.norms = {**(self.storage.norms or {}), **came}

    def _fit_state(
        self,
        found: dict[str, Tensor],
        prefix: str,
        own: dict[str, Tensor],
        adapter: bool = False,
    ) -> dict[str, Tensor]:
        """The state to load, complete, or an error.

        A file may hold the trunk, what is added with the output norms, or
        both, each in full; beside a trunk the norms alone are fine too. An
        adapter file holds what trains, in full.
        """
        source = self._reading or CHECKPOINT
        trunk = {} if adapter else self._stock_part(own)
        frozen = self.trunk_part(own) if adapter else trunk
        trained = {k: v for k, v in own.items() if k not in frozen}
        added = f'{self.child}.'
        has_trunk = any(key in trunk for key in found)
        has_added = adapter or any(key.startswith(added) for key in found)
        if not has_trunk and not has_added:
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
        if has_added:
            # A file of ours: what is added and output norms come together.
            expected |= trained
        else:
            norms = {
                key: value
                for key, value in trained.items()
                if not key.startswith(added)
            }
            expected |= {k: v for k, v in norms.items() if k in found}
            kept = ', '.join(key for key in norms if key not in found)
            if any(key.startswith(added) for key in own):
                notes.append(
                    f'{self.child}: not in the file, keeps its values'
                )
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
            expected_leftovers=self.trunk.leftovers(),
            what=f'backbone under {prefix!r}' if prefix else 'backbone',
            source=source,
            hint=explain,
            notes=notes,
        )
        print_log(report, logger='current')
        return {**own, **{key: found[key] for key in expected}}

    def trunk_fingerprint(self) -> str:
        """That of the trunk as it came, on every process."""
        return self.storage.fingerprint or fingerprint(self.trunk_state())

    def _bring_trunk(self, record: TrunkRecord) -> None:
        """Have the trunk that an adapter file was trained on, or an error.

        It is there, or with another backbone in memory, or is read from where
        it was, from ``init_cfg``, or from beside the adapter file; the
        fingerprint decides.
        """
        refusals = []
        if self.storage.source is not None:
            present = self.trunk_fingerprint()
            if present == record.fingerprint:
                self.storage.address = self.storage.address or record.source
                return
            refusals.append(f'{present[:16]}: {self.storage.source}')
        if self._share_open(record.fingerprint):
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
                        self._stock_part(state), '', self.state_dict()
                    )
                    came = fingerprint(self.trunk_part(fitted))
                    if came == record.fingerprint:
                        norms = self.storage.norms
                        self.load_state_dict(fitted)
                        self.storage.norms = norms
                        self.keep_norms(state)
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
            'another size of images or windows in the config, or a file '
            'that was moved or changed. Put the file of the trunk where it '
            'was or beside the adapter file, or set '
            '`model.backbone.init_cfg.checkpoint` to it.'
        )

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

    def _share_open(self, wanted: str) -> bool:
        """Run on the trunk of another backbone, where that is possible."""
        raise NotImplementedError


def _put_source_weights(
    module: LoadsTrunk, state: dict, prefix: str, metadata: dict
) -> None:
    """Checkpoints hold the weights that came, not how they are stored."""
    own = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }
    loaded = module.storage.as_loaded(module.trunk, own)
    state.update({prefix + key: value for key, value in loaded.items()})


def _store(module: LoadsTrunk, incompatible: object) -> None:
    """What was loaded is stored as the options of the trunk say."""
    module.storage.store(module.trunk)
