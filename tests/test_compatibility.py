"""What configs, checkpoints and adapter files of earlier versions rely on.

The names under which backbones are configured, the keys of their state dicts,
what trains and in which order optimizers hold it, outputs and gradients: all
as written down in compatibility/facts.json. Write facts of new cases with

    python -m tests.test_compatibility NAME ...

and never those of old ones anew.
"""

import copy
import json
import sys
import zlib
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from e3va_mm.registry import MODELS
from e3va_mm.tuners.e3va import AdapterBank
from tests.trunk_cases import CASES as TRUNKS
from tests.trunk_cases import flat, need

ROOT = Path(__file__).resolve().parents[1]
FACTS = Path(__file__).parent / 'compatibility' / 'facts.json'
SWIN = dict(
    embed_dims=32, depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=7
)
METHODS = dict(
    full=dict(type='e3va_mm.Full'),
    fixed=dict(type='e3va_mm.Fixed'),
    bitfit=dict(type='e3va_mm.BitFit'),
    bitfit_tables=dict(type='e3va_mm.BitFit', position_tables=True),
    norm=dict(type='e3va_mm.NormTuning'),
    partial=dict(type='e3va_mm.Partial', blocks=2),
    adapter=dict(type='e3va_mm.Adapter', bottleneck=8),
    lora=dict(type='e3va_mm.LoRA', rank=4, alpha=8, parts=('q', 'k')),
    adaptformer=dict(
        type='e3va_mm.AdaptFormer', bottleneck=8, scale=0.5, branches=('ffn',)
    ),
    lorand=dict(type='e3va_mm.LoRand', rank=4, branches=3),
    mona=dict(type='e3va_mm.Mona', bottleneck=8, dropout=0.0),
)
SIDE_PATHS = dict(
    default=dict(),
    linear=dict(
        rank=(2, 4), taps=('ffn',), downsampling='linear', bottleneck_ratio=1.0
    ),
    coded=dict(save_taps=('recompute', 'bf16', 'int8', 'int4')),
    lean=dict(preset='lean'),
    frozen_norms=dict(type='e3va_mm.E3VASidePath', train_output_norms=False),
    mix=dict(type='e3va_mm.E3VAMixSidePath', width=8, rank=4),
    none=dict(type='e3va_mm.NoSidePath', train_output_norms=False),
    trunk=dict(trunk_compute='fp32', trunk_chunk=64, compute='fp32'),
)
# In 16 bits the figures depend on the processor.
COARSE = ('lean',)


def cases():
    """Configs of backbones by the name of a case."""
    found = {}
    for name, side_path in SIDE_PATHS.items():
        found[f'swin {name}'] = dict(
            type='e3va_mm.E3VASwinTransformer', side_path=side_path, **SWIN
        )
    found['swin outputs'] = dict(
        type='e3va_mm.E3VASwinTransformer', out_indices=(1, 2), **SWIN
    )
    for name, method in METHODS.items():
        found[f'petl swin {name}'] = dict(
            type='e3va_mm.PETLSwinTransformer', method=method, **SWIN
        )
    for name in ('vit', 'dinov2', 'mmseg vit', 'sam', 'beit'):
        trunk = copy.deepcopy(TRUNKS[name])
        kind = trunk.pop('type')
        found[f'vit {name}'] = dict(
            type='e3va_mm.E3VAVisionTransformer', trunk_type=kind, **trunk
        )
    for name in (
        'swin of mmdet',
        'swin v2',
        'convnext',
        'pvtv2',
        'mit',
        'svt',
        'mscan',
        'eva02',
        'timm vit',
        'timm swin',
    ):
        trunk = copy.deepcopy(TRUNKS[name])
        found[f'any {name}'] = dict(
            type='e3va_mm.E3VABackbone', trunk=trunk, side_path=dict(rank=4)
        )
    found['any mix pvtv2'] = dict(
        type='e3va_mm.E3VABackbone',
        trunk=copy.deepcopy(TRUNKS['pvtv2']),
        side_path=dict(type='e3va_mm.E3VAMixSidePath', rank=4, width=8),
    )
    for trunk, method in (
        ('vit', 'mona'),
        ('dinov2', 'lora'),
        ('convnext', 'adapter'),
        ('swin v2', 'adaptformer'),
        ('pvtv2', 'lorand'),
        ('mit', 'bitfit'),
        ('mscan', 'norm'),
        ('timm vit', 'partial'),
    ):
        found[f'petl {trunk} {method}'] = dict(
            type='e3va_mm.PETLBackbone',
            trunk=copy.deepcopy(TRUNKS[trunk]),
            method=dict(METHODS[method]),
        )
        found[f'petl {trunk} {method}']['method'].pop('branches', None)
    return found


CASES = cases()
MODEL_CONFIGS = (
    'cascade_e3va_swin_nano_digits',
    'cascade_e3va_mix_swin_nano_digits',
    'upernet_e3va_swin_nano_digits',
    'cascade_e3va_vit_nano_digits',
)


def build(name):
    config = copy.deepcopy(CASES[name])
    if 'trunk' in config:
        need(config['trunk'])
    elif 'trunk_type' in config:
        need(dict(type=config['trunk_type']))
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(dict(config, allow_random_trunk=True))
        backbone.init_weights()
        return backbone


def filled(state):
    """The tensors of a state, drawn from their names alone."""
    found = {}
    for key, value in state.items():
        if value.is_floating_point() and not key.endswith('gamma_x'):
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            noise = torch.randn(value.shape, generator=generator)
            vector = value.ndim == 1
            one = vector and key.endswith(('weight', 'running_var', 'gamma'))
            noise = 0.1 * noise if vector else 0.05 * noise
            value = (noise + 1 if one else noise).to(value.dtype)
        found[key] = value
    return found


def older(model, named):
    """What is named by parameters, by names of before adapters were stacked.

    A tensor of a bank of adapters becomes one for each adapter.
    """
    banks = {
        f'{name}.': module
        for name, module in model.named_modules()
        if isinstance(module, AdapterBank)
    }
    found = {}
    for key, value in named.items():
        prefix = next((p for p in banks if key.startswith(p)), None)
        if prefix is None:
            found[key] = value
        elif key == f'{prefix}down.p':
            for index, name in enumerate(banks[prefix].names):
                for own in banks[prefix].state_dict():
                    value = named[prefix + own]
                    if isinstance(value, torch.Tensor):
                        value = value[index]
                    found[f'{prefix}{name}.{own}'] = value
    return found


def digest(lines):
    return sha256('\n'.join(lines).encode()).hexdigest()[:16]


def numbers(tensor):
    value = tensor.detach().double()
    return [float(value.sum()), float(value.norm())]


def facts(name):
    """What a case is, as JSON."""
    backbone = build(name)
    state = older(backbone, backbone.state_dict())
    backbone.load_state_dict(filled(state), strict=True)
    backbone.train()
    parameters = dict(backbone.named_parameters())
    trained = {k: v for k, v in parameters.items() if v.requires_grad}
    torch.manual_seed(1)
    size = (64, 64)
    config = CASES[name]
    if 'patch_size' in config.get('trunk', config):
        size = (64, 64)
    outputs = flat(backbone(torch.randn(2, 3, *size)))
    found = dict(
        keys=digest(f'{k} {tuple(v.shape)}' for k, v in state.items()),
        tensors=len(state),
        parameters=digest(older(backbone, parameters)),
        trained=digest(older(backbone, trained)),
        values=sum(value.numel() for value in trained.values()),
        outputs=[[*each.shape] for each in outputs],
        figures=[numbers(each) for each in outputs],
    )
    if trained:
        sum(each.square().mean() for each in outputs).backward()
        grads = {key: value.grad for key, value in trained.items()}
        grads = [*older(backbone, grads).values()]
        found['gradients'] = [
            numbers(grad)
            for grad in grads[:: len(grads) // 8 + 1]
            if grad is not None
        ]
    return found


def groups(name):
    """What the optimizer of a config holds, in its order."""
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
        wrapper = build_optim_wrapper(model, config.optim_wrapper)
    names = {p: n for n, p in model.named_parameters()}
    held = {
        names[parameter]: f'{group["lr"]} {group["weight_decay"]}'
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    lines = [f'{how} {name}' for name, how in older(model, held).items()]
    return dict(
        keys=digest(older(model, model.state_dict())),
        held=digest(lines),
        count=len(lines),
    )


@pytest.fixture(scope='module')
def written():
    return json.loads(FACTS.read_text())


@pytest.mark.parametrize('name', CASES)
def test_a_backbone_is_what_it_was(name, written):
    now, before = facts(name), written[name]
    coarse = name.split()[-1] in COARSE
    figures = ('figures', 'gradients')
    assert {k: v for k, v in now.items() if k not in figures} == {
        k: v for k, v in before.items() if k not in figures
    }
    for key in figures:
        for ours, theirs in zip(
            now.get(key, []), before.get(key, []), strict=True
        ):
            scale = abs(theirs[1])
            close = (5e-2 if coarse else 2e-4) * scale + 1e-6
            assert ours[1] == pytest.approx(theirs[1], abs=close)
            # A sum cancels: what rounding leaves of it grows with the norm.
            assert ours[0] == pytest.approx(theirs[0], abs=30 * close)


@pytest.mark.parametrize('name', MODEL_CONFIGS)
def test_checkpoints_of_a_config_fit(name, written):
    assert groups(name) == written[f'config {name}']


if __name__ == '__main__':
    FACTS.parent.mkdir(exist_ok=True)
    known = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    chosen = sys.argv[1:] or [*CASES, *MODEL_CONFIGS]
    for each in chosen:
        if each in MODEL_CONFIGS:
            known.setdefault(f'config {each}', groups(each))
        else:
            known.setdefault(each, facts(each))
    text = json.dumps(known, indent=0, sort_keys=True)
    FACTS.write_text(text + '\n')
