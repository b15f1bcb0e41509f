"""timm's plain ViTs as stock backbones: DINOv3 and whatever else timm has."""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.trunks.trunk import Trunk
from e3va_mm.weights import to_stock_state

_INNER = 'model.'
# Where timm leaves a norm out, if its model pools before it.
_POOLED = {'global_pool': '', 'num_classes': 0}


@MODELS.register_module()
class TimmViT(BaseModule):
    """A ViT of timm that gives normalised maps, for images of any size.

    Each output is what timm's ``forward_intermediates(norm=True)`` and Meta's
    ``get_intermediate_layers(norm=True)`` give, by a norm of its own.

    Args:
        model_name (str): Name of the model in timm.
        out_indices (Sequence[int]): Blocks that have an output, ascending.
        img_size (int, optional): Image size that position embeddings are
            stored for. Defaults to timm's.
        final_norm (bool): Whether outputs are normalised. Defaults to True.
        drop_path_rate (float): Stochastic depth rate. Defaults to 0.
        init_cfg (Mapping, optional): See mmengine. Defaults to None.
        **kwargs: Other arguments of the model in timm.

    Raises:
        ConfigError: If timm is missing or has no such model.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int],
        img_size: int | None = None,
        final_norm: bool = True,
        drop_path_rate: float = 0.0,
        init_cfg: Mapping | None = None,
        **kwargs,
    ) -> None:
        super().__init__(init_cfg)
        if img_size is not None:
            kwargs['img_size'] = img_size
        kwargs = dict(_POOLED, dynamic_img_size=True) | kwargs
        self.model = created(
            model_name, drop_path_rate=drop_path_rate, **kwargs
        )
        self.out_indices = tuple(out_indices)
        norm, self.model.norm = self.model.norm, nn.Identity()
        for i in range(len(self.out_indices)) if final_norm else ():
            self.add_module(f'norm{i}', _like(norm))

    def init_weights(self) -> None:
        """Leave the weights as timm has drawn them, but for ``init_cfg``."""
        if self.init_cfg:
            super().init_weights()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> a map (B, C, H / p, W / p) for each output."""
        maps = self.model.forward_intermediates(
            image,
            # Of a frozen trunk without outputs, which ends with a block.
            indices=list(self.out_indices or range(len(self.model.blocks))),
            intermediates_only=True,
        )
        return tuple(
            self._normed(maps[i], getattr(self, f'norm{i}', None))
            for i in range(len(self.out_indices))
        )

    @staticmethod
    def _normed(value: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return value
        return norm(value.movedim(1, -1)).movedim(-1, 1).contiguous()


@MODELS.register_module()
class DINOv3ViT(TimmViT):
    """The ViTs of `DINOv3 <https://arxiv.org/abs/2508.10104>`_, of timm.

    Args:
        arch (str): ``'small'``, ``'small_plus'``, ``'base'``, ``'large'``,
            ``'huge_plus'`` or ``'7b'``.
        out_indices (Sequence[int]): Blocks that have an output, ascending.
        **kwargs: See :class:`TimmViT`.

    Raises:
        ConfigError: If timm is missing or older than 1.0.20, or there is no
            such ``arch``.
    """

    arch_zoo = {
        'small': dict(embed_dims=384, num_layers=12, gated=False),
        'small_plus': dict(embed_dims=384, num_layers=12, gated=True),
        'base': dict(embed_dims=768, num_layers=12, gated=False),
        'large': dict(embed_dims=1024, num_layers=24, gated=False),
        'huge_plus': dict(embed_dims=1280, num_layers=32, gated=True),
        '7b': dict(embed_dims=4096, num_layers=40, gated=True),
    }

    def __init__(
        self, arch: str, out_indices: Sequence[int], **kwargs
    ) -> None:
        if arch not in self.arch_zoo:
            raise ConfigError(
                f'`arch` of DINOv3ViT should be one of {[*self.arch_zoo]}, '
                f'but is {arch!r}.'
            )
        # Files of the largest alone have no biases before attention.
        bias = '' if arch == '7b' else '_qkvb'
        super().__init__(
            f'vit_{arch}_patch16_dinov3{bias}', out_indices, **kwargs
        )


class TimmViTTrunk(Trunk):
    """Files of timm, Meta and transformers, for :class:`TimmViT`."""

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """See :class:`Trunk`."""
        state, form = to_stock_state(checkpoint)
        ours = self.stock.state_dict()
        if any(key in ours for key in state):
            return state, form
        inner = self.stock.model
        # What timm itself reads files by; it fits position embeddings.
        convert = sys.modules[type(inner).__module__].checkpoint_filter_fn
        found = convert(dict(state), inner)
        renamed = {}
        for key, value in found.items():
            norm = re.fullmatch(r'(?:fc_)?norm\.(\w+)', key)
            if norm is None:
                renamed[_INNER + key] = value
                continue
            for i in range(len(self.out_indices)):
                renamed[f'norm{i}.{norm[1]}'] = value
        self._add_biases(renamed, ours)
        known = 'transformers' in form
        return renamed, form if known else 'official or timm ViT'

    @staticmethod
    def _add_biases(
        state: dict[str, Tensor], ours: Mapping[str, Tensor]
    ) -> None:
        """Zeros, where a file leaves out the biases before attention."""
        biases = {k: v for k, v in ours.items() if k.endswith('.attn.q_bias')}
        if any(key in state for key in biases):
            return
        for key, value in biases.items():
            for name in (key, key.replace('q_bias', 'v_bias')):
                state[name] = torch.zeros_like(value)

    def leftovers(self) -> list[str]:
        """Also what the model has for classifying and for pre-training."""
        part = r'(head|head_drop|fc_norm|attn_pool|lm_head)\..*'
        return [*super().leftovers(), rf'model\.({part}|mask_token)']

    def describe(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """See :class:`Trunk`."""
        found: dict[str, Any] = {}
        embedding = state.get('model.patch_embed.proj.weight')
        if embedding is not None:
            found['embed_dims'] = embedding.shape[0]
            found['patch_size'] = embedding.shape[-1]
        blocks = [re.match(r'model\.blocks\.(\d+)\.', key) for key in state]
        numbers = [int(match[1]) for match in blocks if match]
        if numbers:
            found['num_layers'] = max(numbers) + 1
            found['gated'] = 'model.blocks.0.mlp.fc1_g.weight' in state
        return found


def created(name: str, **kwargs) -> nn.Module:
    """A model of timm."""
    try:
        import timm
    except ImportError:
        raise ConfigError(
            f'The trunk {name} needs timm, which is not installed: `pip '
            "install 'timm>=1.0.20'`."
        ) from None
    if not timm.is_model(name):
        raise ConfigError(
            f'timm {timm.__version__} has no model {name!r}. '
            "`timm.list_models('*dinov3*')` lists names; DINOv3 needs timm "
            '1.0.20.'
        )
    return timm.create_model(name, **kwargs)


def _like(norm: nn.Module) -> nn.Module:
    """A new norm as another."""
    new = type(norm)(norm.normalized_shape, eps=norm.eps)
    new.load_state_dict(norm.state_dict())
    return new
