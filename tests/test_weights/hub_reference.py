"""What transformers computes with tiny models, and the names in its files.

    python -m tests.test_weights.hub_reference

writes hub_reference.json beside this file. It needs transformers, which
mmpretrain cannot be imported beside; the tests need the file alone.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

FILE = Path(__file__).with_suffix('.json')
VALUES = 32  # kept of each output
PLAIN = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=4,
)
DINOV2 = dict(PLAIN, mlp_ratio=2)
DINOV3 = dict(PLAIN, num_register_tokens=4)
BEIT = dict(PLAIN, use_relative_position_bias=True, use_mask_token=True)
MAE = dict(
    PLAIN,
    decoder_num_attention_heads=2,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_intermediate_size=16,
)
SAM = dict(
    PLAIN,
    mlp_dim=64,
    window_size=3,
    global_attn_indexes=[2],
    output_channels=8,
)
STAGES = dict(hidden_sizes=[8, 16, 32, 64], depths=[1, 2, 1, 1])
PYRAMID = dict(
    STAGES, num_attention_heads=[1, 2, 4, 8], mlp_ratios=[2, 2, 2, 2]
)
SWIN = dict(
    image_size=64,
    patch_size=2,
    embed_dim=8,
    depths=[1, 2, 1, 1],
    num_heads=[1, 2, 4, 8],
    window_size=4,
    out_features=['stage1', 'stage2', 'stage3', 'stage4'],
)
HIERA = dict(
    embed_dim=8,
    image_size=[64, 64],
    depths=[1, 2, 1, 1],
    num_heads=[1, 2, 4, 8],
    mlp_ratio=2.0,
)
SAM2 = dict(
    hidden_size=8,
    blocks_per_stage=[1, 2, 1, 1],
    embed_dim_per_stage=[8, 16, 32, 64],
    num_attention_heads_per_stage=[1, 2, 4, 8],
    global_attention_blocks=[2],
)
SQUARE, WIDE = (32, 32), (24, 40)
LARGE, HIGH = (64, 64), (96, 64)


class Case(NamedTuple):
    """A model, and how to take what a backbone gives from its outputs."""

    model: str
    config: dict
    outputs: Callable
    sizes: tuple = (SQUARE, WIDE)
    # The class that computes, where the file is another's.
    runs: str | None = None


def grid(tokens, image, extra):
    size = [side // 4 for side in image.shape[-2:]]
    return tokens[:, extra:].transpose(1, 2).unflatten(2, size)


def naflex(model, image):
    """SigLIP 2 for images of any size takes patches, not images."""
    rows, columns = (side // 4 for side in image.shape[-2:])
    patches = image.unflatten(3, (columns, 4)).unflatten(2, (rows, 4))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    found = model(
        pixel_values=patches,
        pixel_attention_mask=torch.ones(patches.shape[:2]),
        spatial_shapes=torch.tensor([[rows, columns]] * len(image)),
        output_hidden_states=True,
    )
    tokens = [found.hidden_states[2], found.last_hidden_state]
    return [grid(each, image, 0) for each in tokens]


def norm_of(value, eps):
    return F.layer_norm(value, value.shape[-1:], eps=eps)


def plain(extra=1, norm=None, both=None, **how):
    """The second block's end, and the last one's behind the final norm.

    Args:
        extra: Tokens before those of the image.
        norm: Name of the final norm, where the model leaves it out.
        both: Name of the final norm, for the second block too.
        **how: Arguments of the model's forward.
    """

    def outputs(model, image):
        found = model(image, output_hidden_states=True, **how)
        tokens = [found.hidden_states[2], found.last_hidden_state]
        if norm is not None:
            tokens[1] = getattr(model, norm)(tokens[1])
        if both is not None:
            tokens[0] = getattr(model, both)(tokens[0])
        return [grid(t, image, extra) for t in tokens]

    return outputs


def mae(model, image):
    noise = torch.arange(image.shape[-2] * image.shape[-1] // 16)[None]
    how = dict(noise=noise.expand(len(image), -1).float())
    how |= dict(interpolate_pos_encoding=True)
    return plain(**how)(model.vit, image)


def normed(name):
    """Each stage's end, normalised, the last one by a norm of the file."""

    def outputs(model, image):
        *maps, last = model(image, output_hidden_states=True).hidden_states[1:]
        maps = [norm_of(m.movedim(1, -1), 1e-6) for m in maps]
        maps += [getattr(model, name)(last.movedim(1, -1))]
        return [m.movedim(-1, 1) for m in maps]

    return outputs


def stages(model, image):
    return model(image, output_hidden_states=True).hidden_states


def features(model, image):
    return model(image).feature_maps


def features_normed(model, image):
    maps = [m.movedim(1, -1) for m in model(image).feature_maps]
    maps = [norm_of(m, 1e-5) for m in maps]
    return [m.movedim(-1, 1) for m in maps]


def hiera(model, image):
    # The model orders what it gives for images of one size alone.
    config = copy.deepcopy(model.config)
    config.image_size = list(image.shape[-2:])
    model.encoder.schedule = type(model.encoder)(config).schedule
    how = dict(output_hidden_states=True, interpolate_pos_encoding=True)
    maps = model(image, **how).reshaped_hidden_states[1:]
    return [m.movedim(-1, 1) for m in maps]


def sam2(model, image):
    maps = model.backbone(image).intermediate_hidden_states
    return [m.movedim(-1, 1) for m in maps]


def neck(model, image):
    return [model(image).last_hidden_state]


RESIZED = plain(interpolate_pos_encoding=True)
CASES = {
    'dinov2': Case('Dinov2Model', DINOV2, plain()),
    'dinov2 giant': Case(
        'Dinov2Model', dict(DINOV2, use_swiglu_ffn=True), plain()
    ),
    'dinov2, registers': Case(
        'Dinov2WithRegistersModel', DINOV2, plain(5, both='layernorm')
    ),
    'dinov3': Case('DINOv3ViTModel', DINOV3, plain(5, both='norm')),
    'dinov3, gated': Case(
        'DINOv3ViTModel',
        dict(DINOV3, use_gated_mlp=True, hidden_act='silu'),
        plain(5, both='norm'),
    ),
    'vit': Case('ViTModel', PLAIN, RESIZED),
    'vit, classifier': Case(
        'ViTForImageClassification', PLAIN, RESIZED, runs='ViTModel'
    ),
    'mae': Case('ViTMAEForPreTraining', dict(MAE, mask_ratio=0.0), mae),
    'clip': Case(
        'CLIPVisionModel',
        PLAIN,
        plain(norm='post_layernorm', interpolate_pos_encoding=True),
    ),
    'siglip': Case(
        'SiglipVisionModel', PLAIN, plain(0, interpolate_pos_encoding=True)
    ),
    'siglip 2, any size': Case(
        'Siglip2VisionModel', dict(PLAIN, num_patches=64), naflex, (SQUARE,)
    ),
    'siglip, normed': Case(
        'SiglipVisionModel',
        PLAIN,
        plain(0, both='post_layernorm', interpolate_pos_encoding=True),
        (SQUARE,),
    ),
    'aimv2': Case(
        'Aimv2VisionModel', PLAIN, plain(0, both='rms_norm'), (SQUARE,)
    ),
    'beit': Case('BeitModel', BEIT, plain(), (SQUARE,)),
    'sam': Case('SamVisionModel', SAM, neck, (SQUARE,)),
    'hiera': Case('HieraModel', HIERA, hiera, (LARGE, HIGH)),
    'hiera, classifier': Case(
        'HieraForImageClassification',
        HIERA,
        hiera,
        (LARGE, HIGH),
        runs='HieraModel',
    ),
    'sam 2': Case(
        'Sam2VisionModel',
        dict(
            backbone_config=dict(SAM2, model_type='sam2_hiera_det_model'),
            backbone_channel_list=[64, 32, 16, 8],
        ),
        sam2,
        (LARGE, HIGH),
    ),
    'swin': Case(
        'SwinModel', SWIN, features, (LARGE, HIGH), runs='SwinBackbone'
    ),
    'swin v2': Case(
        'Swinv2Model',
        dict(SWIN, out_features=['stage1', 'stage2', 'stage3']),
        features_normed,
        (LARGE, HIGH),
        runs='Swinv2Backbone',
    ),
    'convnext': Case(
        'ConvNextModel', STAGES, normed('layernorm'), (LARGE, HIGH)
    ),
    'convnext v2': Case(
        'ConvNextV2Model', STAGES, normed('layernorm'), (LARGE, HIGH)
    ),
    'dinov3 convnext': Case(
        'DINOv3ConvNextModel', STAGES, normed('layer_norm'), (LARGE, HIGH)
    ),
    'pvt v2': Case('PvtV2Model', PYRAMID, stages, (LARGE, HIGH)),
    'segformer': Case('SegformerModel', PYRAMID, stages, (LARGE, HIGH)),
}


def drawn(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights for the names of a file; norms and scales near one."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key in sorted(shapes):
        value = torch.randn(shapes[key], generator=generator)
        if value.ndim > 1:
            fan_in = value[0].numel()
            state[key] = value / fan_in**0.5
        elif key.endswith(('norm.weight', 'norm1.weight', 'norm2.weight')):
            state[key] = 1 + value / 8
        else:
            state[key] = value / 4
    return state


def image_of(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *size, generator=generator)


def kept(output: torch.Tensor) -> dict[str, Any]:
    """What is kept of an output: some values over all of it."""
    flat = output.flatten()
    values = flat[:: max(1, len(flat) // VALUES)][:VALUES]
    return dict(
        shape=list(output.shape), values=[round(float(v), 6) for v in values]
    )


def recorded(case: Case) -> dict:
    import transformers
    from safetensors.torch import load_file, save_file

    cls = getattr(transformers, case.model)
    name = 'model.safetensors'
    with tempfile.TemporaryDirectory() as folder:
        cls(cls.config_class(**case.config)).save_pretrained(folder)
        path = Path(folder, name)
        shapes = {k: [*v.shape] for k, v in load_file(path).items()}
        save_file(drawn(shapes), path, metadata=dict(format='pt'))
        cls = getattr(transformers, case.runs or case.model)
        model, report = cls.from_pretrained(folder, output_loading_info=True)
    drawn_there = ('pooler.', 'hidden_states_norms.')  # and not looked at
    assert all(key.startswith(drawn_there) for key in report['missing_keys'])
    result = []
    for size in case.sizes:
        with torch.no_grad():
            outputs = case.outputs(model.eval(), image_of(size))
        result.append(dict(size=size, outputs=[kept(o) for o in outputs]))
    return dict(shapes=shapes, results=result)


def main() -> None:
    # Before torchvision is imported.
    import e3va_mm.checkpoint  # noqa: F401

    FILE.write_text(
        json.dumps({name: recorded(case) for name, case in CASES.items()})
    )


if __name__ == '__main__':
    main()
