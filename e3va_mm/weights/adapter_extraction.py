"""From a model to its adapter file, and whether a file fits a model."""

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.files import file_sha256
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.weights.adapter_file import RECORD, AdapterFile, TrunkRecord
from e3va_mm.weights.fingerprint import fingerprint
from e3va_mm.weights.matching import match_state
from e3va_mm.weights.state_dicts import part_of

# What a trunk's ``trunk_source`` says of a file that it does not know.
CHECKPOINT = 'the checkpoint'


def adapter_of(
    model: nn.Module,
    trunks: Mapping[str, TrunkRecord],
    state: Mapping[str, Tensor] | None = None,
    config: str = '',
    dataset_meta: Mapping[str, Any] | None = None,
) -> AdapterFile:
    """The adapter file of a model.

    Args:
        model (nn.Module): The model.
        trunks (Mapping[str, TrunkRecord]): Those of :func:`trunk_records`.
        state (Mapping[str, Tensor], optional): Its state dict, where that is
            not the one to save, as with EMA.
        config (str): The text of its config.
        dataset_meta (Mapping, optional): The data set's, with class names.

    Returns:
        AdapterFile: What :meth:`AdapterFile.write` writes.
    """
    return AdapterFile(
        tensors=without_trunks(
            model, model.state_dict() if state is None else state
        ),
        trunks=dict(trunks),
        trainable=tuple(
            name
            for name, value in model.named_parameters()
            if value.requires_grad
        ),
        config=config,
        dataset_meta=dataset_meta,
    )


def trunk_records(
    model: nn.Module, sources: Mapping[str, str | None] | None = None
) -> dict[str, TrunkRecord]:
    """What the trunks of a model are, and where they come from.

    Args:
        model (nn.Module): The model, its trunks with their weights.
        sources (Mapping[str, str], optional): Paths or URLs by the prefix of
            the backbone, for trunks that do not know theirs.

    Raises:
        ConfigError: If the model has no tuned backbone, or if the weights of
            a trunk cannot be read again.
    """
    records = {}
    for prefix, backbone in tuned_backbones(model):
        source = backbone.trunk_address or (sources or {}).get(prefix)
        if source is None and backbone.trunk_source in (None, CHECKPOINT):
            found = 'of a checkpoint' if backbone.trunk_source else 'random'
            raise ConfigError(
                'Expected a path or URL that the weights of the trunk under '
                f'{prefix!r} are read from, for the adapter file does not '
                f'hold them, but they are {found}. Set '
                "`model.backbone.init_cfg=dict(type='Pretrained', "
                'checkpoint=...)` to the file with exactly these weights.'
            )
        records[prefix] = TrunkRecord(
            source=source,
            fingerprint=fingerprint(backbone.trunk_state()),
            sha256=file_sha256(source),
        )
    if not records:
        raise ConfigError(
            'An adapter file is what trains beside a frozen trunk, but no '
            f'backbone of this {type(model).__name__} has a tuner. Set '
            "`model.backbone.type='e3va_mm.E3VASwinTransformer'`, or use "
            'the CheckpointHook.'
        )
    return records


def without_trunks(
    model: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What of a model's state is not a frozen trunk's."""
    trunks = set()
    for prefix, backbone in tuned_backbones(model):
        own = part_of(state, prefix)
        trunks |= {prefix + key for key in backbone.trunk_part(own)}
    return {key: value for key, value in state.items() if key not in trunks}


def check_adapter(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse an adapter file that does not fit the whole of a model.

    mmengine's loader only logs what is missing in neck and heads, or too
    much. A state dict of another origin passes.

    Args:
        model (nn.Module): The model that is about to load it.
        state (Mapping[str, Tensor]): The state dict as it was read.

    Raises:
        CheckpointError: If a tensor is missing, has another shape, or is
            left over.
    """
    records = {
        key.removesuffix(RECORD): TrunkRecord.from_tensor(value)
        for key, value in state.items()
        if key.endswith(RECORD)
    }
    if not records:
        return
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    record = next(iter(records.values()))
    prefixes = tuple(records) if record.part == 'backbone' else ''
    expected = without_trunks(model, model.state_dict())
    state = dict(state)
    for prefix, backbone in tuned_backbones(model):
        backbone.upgrade(state, prefix)
    report = match_state(
        {k: v for k, v in expected.items() if k.startswith(prefixes)},
        {k: v for k, v in state.items() if not k.endswith(RECORD)},
        what=f'{type(model).__name__} without its trunk',
        source=record.file,
        hint='Take the config that the adapter file was trained with '
        '(`tools/adapter.py inspect FILE --config`).',
    )
    print_log(report, logger='current')
