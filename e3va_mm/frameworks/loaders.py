"""mmengine's loading of checkpoints: its schemes, its look at state dicts."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmengine.model import BaseTTAModel
from mmengine.runner import checkpoint as mm_checkpoint
from torch import nn

from e3va_mm.errors import CheckpointError
from e3va_mm.utils.listing import listed
from e3va_mm.utils.tuned import tuned_backbones

# What mmengine's loader says.
MISSING = 'missing keys in source state_dict: '
MISSHAPEN = re.compile(
    r'\s*size mismatch for (\S+): .*?Size\((.*?)\) from .*?Size\((.*?)\)'
)

# The file whose state dict comes next and should fill its model.
_whole: list[str] = []
# Regular expressions, as mmengine understands them; the empty one is last.
SCHEMES = (
    'e3va_mm://',
    'hf://',
    'http://',
    'https://',
    'torchvision://',
    'modelzoo://',
    'openmmlab://',
    'open-mmlab://',
    'mmcls://',
    r'(\S+\:)?s3://',
    r'(\S+\:)?petrel://',
    'pavi://',
    '',
)


def replace_loaders(read: Callable, check: Callable) -> None:
    """Have mmengine read every checkpoint through ``read``.

    ``init_cfg``, ``load_from``, ``resume`` and the frameworks' inference
    functions then all do.

    Args:
        read (Callable): ``(address, map_location) -> dict``.
        check (Callable): Called as ``check(model, state)`` before mmengine
            loads a state dict; it raises where that does not fit.
    """

    # mmengine logs the name without its first ten letters.
    def load_from_e3va_mm(filename: str, map_location: Any = None) -> dict:
        content = read(filename, map_location)
        if filename.startswith('mmcls://'):
            content = mm_checkpoint._process_mmcls_checkpoint(content)
        return content

    stock_load = mm_checkpoint.load_state_dict

    @wraps(stock_load)
    def load_state_dict(
        module: nn.Module,
        state_dict: dict,
        strict: bool = False,
        logger: Any = None,
    ) -> None:
        source = _whole.pop() if _whole else None
        check(module, state_dict)
        try:
            stock_load(module, state_dict, strict or bool(source), logger)
        except RuntimeError as error:
            if strict or not source:
                raise
            _refuse_missing(module, source, error)

    mm_checkpoint.CheckpointLoader.register_scheme(
        SCHEMES, load_from_e3va_mm, force=True
    )
    # All loaders of mmengine end here, by its name in their module.
    mm_checkpoint.load_state_dict = load_state_dict


@contextmanager
def whole_checkpoint(source: str) -> Iterator[None]:
    """Inside, the next state dict has to bring all that its model needs.

    mmengine only logs what is missing or has another shape, and random heads
    give figures.

    Args:
        source (str): The file, for messages.

    Raises:
        CheckpointError: If a part of the model stays as it is.
    """
    expect_whole(source)
    try:
        yield
    finally:
        _whole.clear()


def expect_whole(source: str) -> None:
    """As :func:`whole_checkpoint`, for a file that is loaded right away."""
    _whole[:] = [source]


def _refuse_missing(
    module: nn.Module, source: str, error: RuntimeError
) -> None:
    """Raise CheckpointError for what a strict loading missed.

    Backbones of ours look at their part themselves; auxiliary heads predict
    nothing, and what is left over in a file does no harm.
    """
    inner = module.module if isinstance(module, BaseTTAModel) else module
    ours = tuple(prefix for prefix, _ in tuned_backbones(inner))
    faults = []
    for line in str(error).splitlines():
        if line.startswith(MISSING):
            keys = line.removeprefix(MISSING).split(', ')
            faults += [f'{key} is missing' for key in keys]
        elif found := MISSHAPEN.match(line):
            name, have, want = found.groups()
            faults.append(f'{name} ({have} in the file, {want} expected)')
    faults = [
        fault
        for fault in faults
        if not fault.startswith((*ours, 'auxiliary_head'))
    ]
    if faults:
        raise CheckpointError(
            f'{source} does not fit the model of the config, parts of which '
            f'would be random: {listed(faults, 5)}. Take the config that it '
            'was trained with.'
        ) from error


def resolve(address: str) -> str:
    """Look an address up in mmengine's tables of models.

    Args:
        address (str): Such as ``'open-mmlab://resnet50'``.

    Returns:
        str: The path or URL there; an address of no table as it is.

    Raises:
        CheckpointError: If the table does not have it.
    """
    scheme, _, name = address.partition('://')
    if scheme in ('torchvision', 'modelzoo'):
        table = mm_checkpoint.get_torchvision_models()
    elif scheme in ('openmmlab', 'open-mmlab'):
        name = mm_checkpoint.get_deprecated_model_names().get(name, name)
        table = mm_checkpoint.get_external_models()
    elif scheme == 'mmcls':
        table = mm_checkpoint.get_mmcls_models()
    else:
        return address
    if name not in table:
        raise CheckpointError(
            f'{address} is none of the {len(table)} models that mmengine '
            'knows there. Give the URL or the path of the checkpoint file.'
        )
    if table[name].startswith(('http://', 'https://')):
        return table[name]
    return os.path.join(mm_checkpoint._get_mmengine_home(), table[name])
