import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine._strategy import DDPStrategy, FSDPStrategy
from mmengine.device import get_device
from mmengine.dist import (
    broadcast,
    broadcast_object_list,
    is_distributed,
    is_main_process,
)
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import (
    _load_checkpoint_to_model,
    weights_to_cpu,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from ...checkpoint.adapter_file import side_path_backbones
from ...errors import ConfigError, E3VAError
from ...registry import STRATEGIES
from ...utils.sharding import is_sharded, note_size

# What may be chosen of the wrapper; the rest is what makes it work.
CHOICES = ('backward_prefetch', 'forward_prefetch', 'limit_all_gathers')
INNER = '_fsdp_wrapped_module.'
# Options of mmengine's strategy that would not do what they say.
REFUSED = {
    'skip_init_weights': "the trunk's weights come from "
    '`model.backbone.init_cfg`. Leave it out.',
    'activation_checkpointing': 'the frozen trunk keeps no activations. For '
    'neck and heads add the e3va_mm.ActivationCheckpointHook to '
    '`custom_hooks`.',
    'state_dict_cfg': 'checkpoints are those of one process. Leave it out.',
}


@STRATEGIES.register_module()
class E3VAFSDPStrategy(FSDPStrategy):
    """Shards frozen trunks over the processes with FSDP.

    For trunks that are too large for one card. The matrices of each block of
    a trunk are spread over the processes and are whole only while the block
    runs. All else is on every process: what trains, whose gradients alone are
    reduced, and small frozen parts. So optimizers, clipping, accumulation and
    mixed precision work as with DDP, and checkpoints and adapter files are
    those of an unsharded model: either loads the other's.

    One process alone has nothing to shard and runs as without a strategy.
    Without an accelerator the processes use gloo.

    Args:
        model_wrapper (Mapping, optional): Any of ``backward_prefetch``,
            ``forward_prefetch`` and ``limit_all_gathers`` of
            ``FullyShardedDataParallel``.
        **kwargs: Those of mmengine's ``DDPStrategy``: ``sync_bn`` and what a
            runner gives each strategy.

    Raises:
        ConfigError: If an option cannot work, or a model has no trunk to
            shard.

    Examples:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(type='e3va_mm.E3VAFSDPStrategy')
    """

    def __init__(
        self, *, model_wrapper: Mapping | None = None, **kwargs: Any
    ) -> None:
        for name, reason in REFUSED.items():
            if name in kwargs:
                raise ConfigError(
                    f'`strategy.{name}` is no option of E3VAFSDPStrategy: '
                    f'{reason}'
                )
        unknown = [k for k in model_wrapper or () if k not in CHOICES]
        if unknown:
            raise ConfigError(
                f'`strategy.model_wrapper` may hold {", ".join(CHOICES)}, '
                f'but got {unknown[0]}. For mixed precision use '
                '`side_path.trunk_compute`, `side_path.trunk_weights` and '
                'the AmpOptimWrapper.'
            )
        super().__init__(
            model_wrapper=dict(model_wrapper or {}),
            state_dict_cfg='full',
            **kwargs,
        )
        # To move what is there already would free it (torch crashes).
        self.state_dict_config = FullStateDictConfig(
            rank0_only=True, offload_to_cpu=get_device() != 'cpu'
        )

    def _setup_distributed(self, *args: Any, **kwargs: Any) -> None:
        """Without an accelerator mmengine would look for a CUDA device."""
        if get_device() == 'cpu':
            torch.distributed.init_process_group('gloo')
        else:
            super()._setup_distributed(*args, **kwargs)

    # -- wrapping -----------------------------------------------------------

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build the model; its config is needed again to load into it."""
        self._config = (
            copy.deepcopy(model) if isinstance(model, dict) else None
        )
        return super().build_model(model)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        """Shard the blocks of the trunks, replicate the rest."""
        if not is_distributed() or self.world_size == 1:
            self.logger.info('One process: the trunk is not sharded.')
            # Without a wrapper, as that of a single device.
            return super(DDPStrategy, self)._wrap_model(model)
        device = torch.device(get_device())
        if device.type == 'cpu':
            # gloo has none.
            model = revert_sync_batchnorm(model)
        else:
            device = torch.device(device.type, torch.cuda.current_device())
            model = self.convert_model(model)
        trunks = [backbone for _, backbone in side_path_backbones(model)]
        if not trunks:
            raise ConfigError(
                'E3VAFSDPStrategy shards frozen trunks, but no backbone of '
                f'this {type(model).__name__} has a side path. Set '
                "`model.backbone.type='e3va_mm.E3VASwinTransformer'`, or use "
                "mmengine's strategies."
            )
        if len({id(trunk.storage) for trunk in trunks}) < len(trunks):
            raise ConfigError(
                'E3VAFSDPStrategy cannot shard a trunk that several tasks '
                'share. Train a MultiTaskModel with DDP, without `strategy`, '
                'or each task apart.'
            )
        options = dict(use_orig_params=True, device_id=device)
        for backbone in trunks:
            for unit in backbone.make_shardable():
                _shard(model, unit, dict(self.model_wrapper, **options))
        rest = [
            p
            for p in model.parameters()
            if not p.requires_grad and not is_sharded(p)
        ]
        for value in rest:
            value.data = value.data.to(device)
        self.model_wrapper = dict(
            self.model_wrapper,
            sharding_strategy='NO_SHARD',
            ignored_states=rest,
            **options,
        )
        with warnings.catch_warnings():
            # In favour of DDP, under which trunks would be no part of it.
            warnings.filterwarnings('ignore', '.*NO_SHARD', FutureWarning)
            model = super()._wrap_model(model)
        # Whoever asks a block first would make it a root of its own.
        model.check_is_root()
        return model

    @property
    def _is_wrapped(self) -> bool:
        return isinstance(self.model, FSDP)

    # -- optimizers: what trains is not sharded ------------------------------

    def build_optim_wrapper(self, *args: Any, **kwargs: Any):
        """As without FSDP, with the plain loss scaler."""
        return super(FSDPStrategy, self).build_optim_wrapper(*args, **kwargs)

    def _build_param_scheduler(self, *args: Any, **kwargs: Any) -> list:
        return super(FSDPStrategy, self)._build_param_scheduler(
            *args, **kwargs
        )

    def optim_state_dict(self) -> dict:
        """That of the optimizer itself."""
        return super(FSDPStrategy, self).optim_state_dict()

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """See :meth:`optim_state_dict`."""
        super(FSDPStrategy, self).load_optim_state_dict(state_dict)

    # -- checkpoints, all of them those of an unsharded model ----------------

    def model_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the unsharded model, on the main process."""
        return weights_to_cpu(super().model_state_dict())

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict:
        """Read a checkpoint into memory of the host, and load it."""
        if self._is_wrapped:
            kwargs['map_location'] = 'cpu'
        return super().load_checkpoint(filename, **kwargs)

    def load_model_state_dict(
        self,
        state_dict: dict,
        *,
        strict: bool = False,
        revise_keys: list = [(r'^module.', '')],  # noqa: B006
    ) -> None:
        """Load a state dict of the unsharded model.

        The main process does so as always, into a model in memory of its
        host, with all checks and messages; then all take their parts of it.
        """
        options = dict(strict=strict, revise_keys=revise_keys)
        if not self._is_wrapped:
            _load_checkpoint_to_model(self.model, state_dict, **options)
            return
        state = self.model_state_dict()
        plain, error = None, None
        if is_main_process():
            try:
                plain = self._unsharded(state)
                _load_checkpoint_to_model(plain, state_dict, **options)
            except E3VAError as e:
                error = e
        news = [error]
        broadcast_object_list(news)
        if news[0] is not None:
            raise news[0]
        self._take_over(plain)

    def _unsharded(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The whole model in memory of the host."""
        if self._config is None:
            raise ConfigError(
                'E3VAFSDPStrategy loads checkpoints into a model that it '
                'builds anew, but the runner was given a built one. Give it '
                'the config of the model.'
            )
        # Other processes draw nothing here.
        with torch.random.fork_rng():
            plain = MODELS.build(copy.deepcopy(self._config))
        _set_origins(plain, _origins(self.model.module))
        values = dict(_values(plain))
        with torch.no_grad():
            for name, value in state.items():
                values[name].copy_(value)
        return plain

    def _take_over(self, plain: nn.Module | None) -> None:
        """Take the values of the main process's whole model.

        Args:
            plain (nn.Module, optional): That model; None elsewhere.
        """
        inner = self.model.module
        source, origins = {}, [None]
        if plain is not None:
            pairs = zip(
                side_path_backbones(inner),
                side_path_backbones(plain),
                strict=True,
            )
            for (_, ours), (_, theirs) in pairs:
                theirs.make_shardable()
                ours.take_source_weights(theirs)
            source = dict(_values(plain))
            origins = [_origins(plain)]

        def take(name: str, value: Tensor) -> None:
            if source:
                value.data.copy_(source[name])
            broadcast(value.data)

        for name, value in _values(inner):
            if not is_sharded(value):
                take(name, value)
        for prefix, unit in inner.named_modules():
            if isinstance(unit, FSDP):
                with FSDP.summon_full_params(unit, recurse=False):
                    for name, value in _values(unit):
                        if is_sharded(value):
                            take(f'{prefix}.{name}', value)
        broadcast_object_list(origins)
        _set_origins(inner, origins[0])


def _shard(model: nn.Module, unit: nn.Module, options: dict) -> None:
    """Put FSDP around a frozen part of a model, wherever it is a child."""
    matrices = [p for p in unit.parameters() if p.ndim > 1]
    if not matrices:
        return
    # All of one type are one tensor; there is but one of which much is there.
    dtype = max(matrices, key=Tensor.numel).dtype
    sharded = {p for p in matrices if p.dtype == dtype}
    whole = [p for p in unit.parameters() if p not in sharded]
    for value in whole:
        value.data = value.data.to(options['device_id'])
    for value in sharded:
        note_size(value)
    wrapped = FSDP(unit, ignored_states=whole, **options)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is unit and parent is not wrapped:
                setattr(parent, name, wrapped)


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a state dict holds, by their names."""
    for prefix, module in model.named_modules():
        for name, value in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            if name not in module._non_persistent_buffers_set:
                yield f'{prefix}.{name}'.replace(INNER, '').lstrip('.'), value


def _origins(model: nn.Module) -> list[tuple[str | None, str | None]]:
    """What backbones know of where their trunk came from."""
    return [
        (backbone.trunk_source, backbone.trunk_address)
        for _, backbone in side_path_backbones(model)
    ]


def _set_origins(
    model: nn.Module, origins: list[tuple[str | None, str | None]]
) -> None:
    for (_, backbone), origin in zip(
        side_path_backbones(model), origins, strict=True
    ):
        backbone.storage.source, backbone.storage.address = origin
