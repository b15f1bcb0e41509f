"""mmengine's loading of checkpoints: its schemes, its look at state dicts."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from mmengine.runner import checkpoint as mm_checkpoint
from torch import nn

from e3va_mm.errors import CheckpointError

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
        module: nn.Module, state_dict: dict, *args: Any, **kwargs: Any
    ) -> None:
        check(module, state_dict)
        stock_load(module, state_dict, *args, **kwargs)

    mm_checkpoint.CheckpointLoader.register_scheme(
        SCHEMES, load_from_e3va_mm, force=True
    )
    # All loaders of mmengine end here, by its name in their module.
    mm_checkpoint.load_state_dict = load_state_dict


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
