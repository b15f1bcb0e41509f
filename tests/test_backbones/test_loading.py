"""The whole trunk arrives, from wherever it is, or an error says why not."""

import copy
import re
import shutil
from dataclasses import replace

import pytest
import torch
from mmengine import ConfigDict
from mmengine.runner import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from e3va_mm.backbones import loading
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.registry import MODELS
from e3va_mm.weights import (
    adapter_of,
    fingerprint,
    read_adapter,
    read_checkpoint,
    trunk_records,
)
from tests.adapted_models import HEADS, segmentor, trained, trunk_file
from tests.helpers import (
    Detector,
    assert_same_state,
    build_e3va,
    build_stock,
    e3va_and_stock,
    randomised,
)
from tests.trunk_cases import VIT, awake, need

IMAGE = (1, 3, 75, 50)


@pytest.fixture
def stock():
    backbone = randomised(build_stock())
    backbone.eval()  # mmdet's returns None
    return backbone


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


def initialised(path, **kwargs):
    kwargs = dict(allow_random_trunk=False, **kwargs)
    ours = build_e3va(init_cfg=pretrained(path), **kwargs)
    ours.init_weights()
    return ours


def assert_outputs(ours, stock):
    image = torch.randn(IMAGE)
    for one, other in zip(ours(image), stock(image), strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# -- files of the stock backbone ---------------------------------------------


def to_official(state):
    """The keys and the merging order of the Microsoft repository."""
    official = {}
    for key, value in state.items():
        if key.startswith('norm'):
            continue
        key = key.replace('stages.', 'layers.', 1)
        key = key.replace('attn.w_msa.', 'attn.')
        key = key.replace('ffn.layers.0.0.', 'mlp.fc1.')
        key = key.replace('ffn.layers.1.', 'mlp.fc2.')
        key = key.replace('patch_embed.projection', 'patch_embed.proj')
        if 'downsample' in key:
            channels = value.shape[-1] // 4
            # (c, row, column) -> (column, row, c)
            value = value.unflatten(-1, (channels, 2, 2))
            value = value.movedim(-1, -3).movedim(-1, -2).flatten(-3)
        official[key] = value.contiguous()
    official['layers.0.blocks.1.attn_mask'] = torch.zeros(64, 49, 49)
    official['head.weight'] = torch.zeros(1000, 256)
    official['norm.weight'] = torch.ones(256)
    return official


def save(form, stock, folder):
    state = stock.state_dict()
    whole = {f'backbone.{key}': value for key, value in state.items()}
    path = folder / f'{form}.pth'
    if form == 'safetensors':
        path = folder / 'swin.safetensors'
        save_file(whole, path)
    elif form == 'official':
        torch.save(dict(model=to_official(state)), path)
    elif form == 'detector':
        torch.save(
            dict(state_dict={'neck.bias': torch.ones(2), **whole}), path
        )
    else:
        torch.save(dict(state_dict=state), path)
    return str(path)


@pytest.mark.parametrize(
    'form, kind, scope',
    [
        ('official', 'E3VA', 'mmdet'),
        ('official', 'LoRA', 'mmseg'),
        ('bare', 'Full', 'mmdet'),
        ('detector', 'E3VA', 'mmseg'),
        ('detector', 'BitFit', 'mmdet'),
        ('safetensors', 'E3VA', 'mmdet'),
    ],
)
def test_every_format_brings_the_whole_trunk(
    form, kind, scope, stock, tmp_path
):
    if form == 'official':  # holds no output norms
        for i in range(4):
            nn.init.ones_(getattr(stock, f'norm{i}').weight)
            nn.init.zeros_(getattr(stock, f'norm{i}').bias)
    path = save(form, stock, tmp_path)
    ours = initialised(
        path, scope=scope, tuner=dict(type=kind), drop_path_rate=0.0
    )
    assert_outputs(ours.train(), stock)  # not refused: it has weights
    assert ours.trunk_address == path


def test_the_load_report_says_how_much_matched(stock, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        loading, 'print_log', lambda message, **_: lines.append(message)
    )
    path = save('official', stock, tmp_path)
    initialised(path)
    report = '\n'.join(lines)
    assert f'all 97 tensors (1.5 M values) from {path} (' in report
    assert 'not used: ' in report and 'head.weight' in report
    assert 'side_path: not in the file, keeps its values' in report
    assert 'output norms: not in the file, keep their values: norm0' in report


MISSING = 'stages.1.blocks.0.attn.w_msa.qkv.bias'


@pytest.mark.parametrize(
    'file, config, texts',
    [
        (
            dict(depths=(2, 1, 2, 1)),
            dict(depths=(2, 1, 4, 1)),
            ['26 missing in the file', r'asks for .*depths=\(2, 1, 4, 1\)'],
        ),
        (
            dict(depths=(2, 1, 4, 1)),
            {},
            ['not expected', 'stages.2.blocks.2.norm1.weight']
            + [r'\(2, 1, 4, 1\).* asks for .*depths=\(2, 1, 2, 1\)'],
        ),
        (
            dict(embed_dims=64, num_heads=(2, 4, 8, 16)),
            {},
            [r'\(64, 3, 4, 4\) in the file, \(32, 3, 4, 4\) expected']
            + ['embed_dims=64.* asks for embed_dims=32'],
        ),
        (dict(without=MISSING), {}, ['1 missing in the file', MISSING]),
        (
            dict(without=MISSING),
            dict(tuner=dict(type='BitFit')),
            ['1 missing in the file', MISSING],
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_error(file, config, texts, tmp_path):
    """Also where mmengine only logs; and nothing is loaded then."""
    state = build_stock(
        **{k: v for k, v in file.items() if k != 'without'}
    ).state_dict()
    state.pop(file.get('without'), None)
    path = tmp_path / 'other.pth'
    torch.save({f'backbone.{key}': v for key, v in state.items()}, path)
    ours = build_e3va(**config)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(Detector(ours), str(path))
    assert all(re.search(text, str(error.value)) for text in texts)
    with pytest.raises(CheckpointError, match=str(path)):
        initialised(path, **config)
    assert_same_state(ours.state_dict(), before)
    assert ours.trunk_source is None


def test_another_window_resizes_the_position_tables(stock, tmp_path):
    # Stock loading fails on the index buffers, so it gets none of them.
    slim = {
        f'backbone.{k}': v
        for k, v in stock.state_dict().items()
        if not k.endswith('relative_position_index')
    }
    torch.save(slim, tmp_path / 'slim.pth')
    init_cfg = ConfigDict(pretrained(tmp_path / 'slim.pth'))
    reference = build_stock(window_size=12, init_cfg=init_cfg)
    reference.init_weights()
    reference.eval()
    ours = initialised(save('bare', stock, tmp_path), window_size=12)
    assert_outputs(ours, reference)


def test_load_from_takes_a_whole_stock_detector(stock, tmp_path):
    model = Detector(build_e3va(allow_random_trunk=False))
    before = copy.deepcopy(model.backbone.side_path.state_dict())
    load_checkpoint(model, save('detector', stock, tmp_path))
    assert_outputs(model.train().backbone, stock)
    assert_same_state(model.backbone.side_path.state_dict(), before)
    # A file of the backbone alone belongs elsewhere.
    with pytest.raises(CheckpointError, match='init_cfg.checkpoint'):
        load_checkpoint(model, save('official', stock, tmp_path))


def test_a_cut_trunk_takes_the_whole_file(stock, tmp_path):
    path = save('detector', stock, tmp_path)
    assert_outputs(initialised(path, out_indices=(0, 1)), stock)


def test_own_checkpoints_round_trip_and_must_be_whole(tmp_path):
    ours, _ = e3va_and_stock()
    randomised(ours.side_path, 5)
    path = str(tmp_path / 'own.pth')
    torch.save(Detector(ours).state_dict(), path)
    twin = Detector(build_e3va())
    load_checkpoint(twin, path)
    assert_same_state(twin.backbone.state_dict(), ours.state_dict())
    with pytest.raises(
        CheckpointError,
        match=r'side_path.stages.0.down.p: \(4, 32, 16\) in the file, '
        r'\(4, 32, 8\) expected(.|\n)*other options of the tuner',
    ):
        load_checkpoint(Detector(build_e3va(tuner=dict(rank=8))), path)
    state = torch.load(path)
    del state['backbone.norm2.weight']
    torch.save(state, path)
    with pytest.raises(CheckpointError, match='norm2.weight'):
        load_checkpoint(twin, path)


def test_what_trains_alone_leaves_the_trunk():
    ours = randomised(build_e3va(), 5)
    alone = {k: v for k, v in ours.state_dict().items() if 'stages.' not in k}
    part = {
        key: value
        for key, value in ours.state_dict().items()
        if key.startswith(('side_path.', 'norm'))
    }
    assert len(part) > len(alone) - 6  # the embedding is the trunk's
    twin = build_e3va()
    expected = {**copy.deepcopy(twin.state_dict()), **part}
    twin.load_state_dict(part, strict=False)
    assert_same_state(twin.state_dict(), expected)
    assert twin.trunk_source is None


def test_what_names_no_file_is_refused():
    with pytest.raises(ConfigError, match="type='Pretrained', checkpoint="):
        build_e3va(init_cfg=dict(type='Kaiming'))


# -- files of ViTs and timm --------------------------------------------------

SMALL = dict(arch=VIT, img_size=64, patch_size=16, layer_scale_init_value=0.1)
SEG = dict(embed_dims=32, num_layers=2, num_heads=2, img_size=64)


def build_vit(kind='mmpretrain.VisionTransformer', **kwargs):
    need(dict(type=kind))
    own = dict(type='e3va_mm.E3VAVisionTransformer', allow_random_trunk=True)
    return MODELS.build({**own, 'trunk_type': kind, **kwargs})


@pytest.mark.parametrize('extra', [{}, {'mask_token': torch.zeros(1, 32)}])
def test_an_official_file_gives_the_official_features(tmp_path, extra):
    timm = pytest.importorskip('timm')
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=4,
        num_heads=4,
        mlp_ratio=2,
        init_values=0.5,
        num_classes=0,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path / 'dinov2.pth'
    torch.save({**theirs.state_dict(), **extra}, path)
    ours = build_vit(out_indices=[1, 3], init_cfg=pretrained(path), **SMALL)
    ours.init_weights()
    image = torch.randn(2, 3, 64, 64)
    layers = theirs.get_intermediate_layers
    with torch.no_grad():
        first, last = ours(image)
        (middle,) = layers(image, n=[1], reshape=True)
        (end,) = layers(image, n=[3], reshape=True, norm=True)
    torch.testing.assert_close(first, middle, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'kind, arguments',
    [
        ('mmpretrain.VisionTransformer', dict(SMALL, out_type='featmap')),
        ('mmseg.VisionTransformer', SEG),
    ],
)
def test_positions_are_resized_as_by_the_stock_class(
    kind, arguments, tmp_path
):
    need(dict(type=kind))
    small = MODELS.build(dict(arguments, type=kind, img_size=(48, 48)))
    small.init_weights()
    path = tmp_path / 'small.pth'
    torch.save(small.state_dict(), path)
    arguments = dict(arguments, init_cfg=pretrained(path))
    stock = MODELS.build(dict(arguments, type=kind))
    stock.init_weights()
    ours = build_vit(kind, **arguments)
    ours.init_weights()
    torch.testing.assert_close(ours.pos_embed, stock.pos_embed)


def test_mae_weights_in_the_class_that_has_more():
    """Files of MAE have neither layer scales nor relative positions."""
    ours = build_vit('mmseg.MAE', init_values=0.1, **SEG)
    file = {
        key: value
        for key, value in ours.state_dict().items()
        if not key.startswith('side_path.')
        and 'gamma' not in key
        and 'relative' not in key
    }
    ours.load_state_dict(file, strict=False)
    state = ours.state_dict()
    assert all((v == 1).all() for k, v in state.items() if 'gamma' in k)
    assert not any(v.any() for k, v in state.items() if 'bias_table' in k)


def test_another_variant_of_a_vit_is_named():
    other = build_vit(**dict(SMALL, arch=dict(VIT, num_layers=6)))
    with pytest.raises(CheckpointError) as error:
        build_vit(**SMALL).load_state_dict(other.trunk_state(), strict=False)
    assert re.search('num_layers=6.* the config asks', str(error.value))


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('convnext_atto', dict(out_indices=(0, 1, 2, 3))),
        ('vit_tiny_patch16_224', dict(img_size=64, depth=4)),
    ],
)
def test_timm_files_are_taken_by_their_own_names(name, kwargs, tmp_path):
    need(dict(type='mmpretrain.TIMMBackbone'))
    import timm

    arguments = {k: v for k, v in kwargs.items() if k != 'out_indices'}
    whole = timm.create_model(name, **arguments).eval()
    torch.save(whole.state_dict(), tmp_path / 'whole.pth')
    trunk = dict(type='mmpretrain.TIMMBackbone', model_name=name, **kwargs)
    ours = MODELS.build(
        dict(
            type='e3va_mm.E3VABackbone',
            trunk=dict(trunk, features_only=True),
            init_cfg=pretrained(tmp_path / 'whole.pth'),
        )
    )
    ours.init_weights()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = whole.forward_intermediates(image, intermediates_only=True)
        torch.testing.assert_close(
            ours(image)[-1], features[-1], rtol=1e-4, atol=1e-4
        )


# -- adapter files -----------------------------------------------------------


def written(model, path):
    adapter_of(model, trunk_records(model)).write(path)
    return path


def load(model, path):
    load_checkpoint(model, str(path))
    return model.eval()


def assert_same(model, other):
    assert_same_state(model.state_dict(), other.state_dict())


@pytest.fixture
def mit(tmp_path):
    """A trained segmentor, its adapter file, and the trunk's file."""
    source = trunk_file(tmp_path, 'mit')
    model = trained('mit', source)
    return model, written(model, tmp_path / 'a.safetensors'), source


@pytest.mark.parametrize('name', HEADS)
def test_an_adapter_file_alone_brings_its_trunk(name, tmp_path):
    source = trunk_file(tmp_path, name)
    model = trained(name, source)
    first = written(model, tmp_path / 'a.safetensors')
    # As the frameworks' inference functions build it.
    other = load(segmentor(name, None), first)
    assert_same(other, model)
    assert other.backbone.trunk_address == str(source)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image, mode='tensor')
        assert torch.equal(other(image, mode='tensor'), expected)
    # A file of the file is the same.
    second = read_adapter(written(other, tmp_path / 'b.safetensors'))
    first = read_adapter(first)
    assert_same_state(first.tensors, second.tensors)
    assert replace(first, tensors={}) == replace(second, tensors={})
    # The fingerprint is that of the file.
    found = load_file(source)
    trunk = {key: found[key] for key in model.backbone.trunk_state()}
    record = trunk_records(model)['backbone.']
    assert record.fingerprint == fingerprint(trunk)


KINDS = ('Full', 'BitFit', 'NormTuning', 'Partial', 'Adapter', 'LoRA')
KINDS += ('AdaptFormer', 'LoRand', 'Mona', 'E3VAMix')


@pytest.mark.parametrize('kind', KINDS)
def test_an_adapter_file_holds_what_trains(kind, stock, tmp_path):
    path = save('bare', stock, tmp_path)
    model = Detector(initialised(path, tuner=dict(type=kind)))
    parameters = dict(model.backbone.named_parameters())
    trains = {
        f'backbone.{k}' for k, p in parameters.items() if p.requires_grad
    }
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    file = written(model, tmp_path / 'a.safetensors')
    norms = {
        f'backbone.norm{i}.{p}' for i in range(4) for p in ('weight', 'bias')
    }
    buffers = {f'backbone.{k}' for k, _ in model.backbone.named_buffers()}
    held = {k for k in read_adapter(file).tensors if k.startswith('backbone.')}
    assert held - buffers == trains | norms
    assert bool(held & buffers) == (kind == 'Full')
    other = Detector(build_e3va(tuner=dict(type=kind)))
    assert_same(load(other, file), model)


@pytest.mark.parametrize(
    'tuner', [dict(trunk_weights='bf16'), dict(preset='lean')]
)
def test_stored_coarser_it_has_the_same_fingerprint(tuner, tmp_path):
    source = trunk_file(tmp_path, 'mit')
    exact = trained('mit', source)
    coarse = trained('mit', source, **tuner)
    weights = [p for p in coarse.backbone.parameters() if p.ndim == 2]
    assert any(p.dtype == torch.bfloat16 for p in weights)
    assert trunk_records(coarse) == trunk_records(exact)
    # And what one writes the other reads.
    path = written(coarse, tmp_path / 'a.safetensors')
    assert_same(load(segmentor('mit', None), path), coarse)
    assert_same(load(coarse, path), load(exact, path))


def test_position_tables_of_another_size(tmp_path):
    source = trunk_file(tmp_path, 'vit')
    big = dict(trunk=dict(img_size=96))
    model = trained('vit', source, **big)
    path = written(model, tmp_path / 'a.safetensors')
    assert_same(load(segmentor('vit', None, **big), path), model)
    with pytest.raises(CheckpointError, match='another size of images or win'):
        load(segmentor('vit', None), path)


def test_nothing_is_read_where_the_trunk_is_there(mit, monkeypatch):
    model, path, source = mit
    other = segmentor('mit', source)
    other.init_weights()
    monkeypatch.setattr(loading, 'read_checkpoint', None)  # not called
    assert_same(load(other, path), model)
    assert other.backbone.trunk_address == str(source)


def test_another_trunk_gives_way(mit, tmp_path):
    model, path, source = mit
    other = trained('mit', trunk_file(tmp_path, 'mit', seed=1))
    assert_same(load(other, path), model)
    assert other.backbone.trunk_address == str(source)


def test_a_trunk_that_has_changed_is_refused(mit, tmp_path):
    model, path, source = mit
    shutil.copy(trunk_file(tmp_path, 'mit', seed=1), source)
    other = segmentor('mit', None)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError) as error:
        load(other, path)
    text = str(error.value)
    wanted = trunk_records(model)['backbone.'].fingerprint[:16]
    found = load_file(source)
    came = fingerprint({k: found[k] for k in model.backbone.trunk_state()})
    assert f'{path} needs the trunk with the fingerprint {wanted}' in text
    assert f'{came[:16]}: {source}, a file that has changed since' in text
    assert 'The likely cause is another checkpoint in `init_cfg`' in text
    assert 'set `model.backbone.init_cfg.checkpoint` to it' in text
    assert_same_state(other.state_dict(), before)
    assert other.backbone.trunk_source is None


@pytest.mark.parametrize('where', ['gone', 'init_cfg', 'beside', 'another'])
def test_a_source_that_is_not_where_it_was(where, mit, tmp_path):
    model, path, source = mit
    (tmp_path / 'new').mkdir()
    moved = source.rename(tmp_path / 'new' / source.name)
    if where == 'init_cfg':
        other = load(segmentor('mit', moved), path)
    elif where == 'beside':
        path = path.rename(tmp_path / 'new' / path.name)
        other = load(segmentor('mit', None), path)
    elif where == 'gone':
        with pytest.raises(CheckpointError, match='does not exist') as error:
            load(segmentor('mit', None), path)
        assert 'Put the file of the trunk where it was' in str(error.value)
        return
    else:
        other = trained('mit', trunk_file(tmp_path, 'mit', seed=1))
        mine = trunk_records(other)['backbone.'].fingerprint[:16]
        with pytest.raises(CheckpointError) as error:
            load(other, path)
        assert f'{mine}: {other.backbone.trunk_source}' in str(error.value)
        return
    assert_same(other, model)
    assert other.backbone.trunk_address == str(moved)


def test_a_whole_model_as_the_source(mit, tmp_path):
    """A trunk's checkpoint that holds a side path, norms and heads too."""
    model, _, _ = mit
    whole = tmp_path / 'whole.safetensors'
    save_file(model.state_dict(), whole)
    other = segmentor('mit', None)
    other.load_state_dict(model.state_dict())
    path = tmp_path / 'b.safetensors'
    records = trunk_records(other, {'backbone.': str(whole)})
    adapter_of(other, records).write(path)
    assert_same(load(segmentor('mit', None), path), model)


def test_an_address_stays_with_the_same_trunk(mit, tmp_path):
    model, path, source = mit
    backbone = model.backbone
    backbone.load_state_dict(backbone.state_dict())  # as a resume does
    assert backbone.trunk_source == 'the checkpoint'
    assert backbone.trunk_address == str(source)
    # A checkpoint tells none, an adapter file of the same trunk does.
    other = segmentor('mit', None)
    other.load_state_dict(model.state_dict())
    assert other.backbone.trunk_address is None
    load(other, path)
    assert other.backbone.trunk_address == str(source)
    new = trained('mit', trunk_file(tmp_path, 'mit', seed=1))
    backbone.load_state_dict(new.backbone.state_dict())
    assert backbone.trunk_address is None


def test_other_ways_in(mit):
    """By ``init_cfg``, and by torch's own loader."""
    model, path, source = mit
    other = segmentor('mit', path)
    other.init_weights()
    assert_same(other.backbone, model.backbone)
    assert other.backbone.trunk_address == str(source)
    other = segmentor('mit', None)
    other.load_state_dict(read_checkpoint(path)['state_dict'], strict=True)
    assert_same(other, model)


def test_a_file_of_two_backbones(tmp_path):
    def both(*sources):
        models = map(segmentor, ('mit', 'vit'), sources)
        return nn.ModuleDict(dict(zip('ab', models, strict=True)))

    model = both(trunk_file(tmp_path, 'mit'), trunk_file(tmp_path, 'vit'))
    for each in model.values():
        each.init_weights()
        awake(each.backbone)
    path = written(model, tmp_path / 'a.safetensors')
    assert set(read_adapter(path).trunks) == {'a.backbone.', 'b.backbone.'}
    assert_same(load(both(None, None), path), model)
    found = read_adapter(path)
    gone = next(k for k in found.tensors if k.startswith('b.backbone.side_'))
    del found.tensors[gone]
    found.write(path)
    with pytest.raises(CheckpointError, match='1 missing in the file'):
        load(both(None, None), path)
