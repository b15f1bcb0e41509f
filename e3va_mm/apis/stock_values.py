"""What a model had before it was tuned, by the checkpoint it began with."""

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.tuned import tuned_backbones
from e3va_mm.weights import read_checkpoint, without_trunks
from e3va_mm.weights.state_dicts import part_of


def stock_values(
    model: nn.Module, backbone: nn.Module, load_from: str | None
) -> dict[str, Tensor]:
    """The values of a stock model where a tuned one has others.

    The backbone's own are left to its ``tuner.enabled``, which learns of its
    output norms here.

    Args:
        model (nn.Module): The model, trained.
        backbone (TunedBackbone): Its backbone.
        load_from (str, optional): Path or URL of the checkpoint that it began
            with.

    Returns:
        dict[str, Tensor]: What to compute with instead, by names of the
        state dict, on the devices of the model.

    Raises:
        ConfigError: If there is none, or it is of another model.
    """
    if load_from is None:
        raise ConfigError(
            'Expected `load_from` in the config, the checkpoint that the '
            'model began with, to give what it gave before it was tuned. '
            'Set it, or switch off the backbone alone: '
            '`model.backbone.side_path.enabled = False`.'
        )
    checkpoint = read_checkpoint(load_from)
    state = checkpoint.get('state_dict', checkpoint)
    (prefix,) = (p for p, each in tuned_backbones(model) if each is backbone)
    own = model.state_dict()
    rest = {
        name: value
        for name, value in without_trunks(model, own).items()
        if not name.startswith(prefix)
    }
    trunk = {
        prefix + name: value
        for name, value in backbone.trunk_part(part_of(own, prefix)).items()
        # Of another window size, where it is not fitted yet.
        if state.get(prefix + name, value).shape == value.shape
    }
    wrong = [
        name
        for name, value in {**rest, **trunk}.items()
        if name not in state
        or state[name].shape != value.shape
        or (name in trunk and not _equal(state[name], value))
    ]
    if wrong:
        raise ConfigError(
            f'{load_from} (`load_from`) is not what this model began with: '
            f'{len(wrong)} of its values are not there, have another shape, '
            f'or belong to another trunk: {", ".join(wrong[:5])}. Set '
            '`load_from` to the checkpoint of the training.'
        )
    backbone.keep_norms(part_of(state, prefix))
    # A copy: in the file's memory tensors lie at any address, and products
    # of such are summed in another order.
    trains = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: nn.Parameter(came) if name in trains else came
        for name, value in rest.items()
        if not _equal(came := state[name].to(value).clone(), value)
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu().to(other.dtype), other.cpu())
