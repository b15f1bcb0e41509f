"""Weights reach the trunk completely, or there is an error that says why."""

import copy

import pytest
import torch
from mmengine import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import nn

from e3va_mm.errors import CheckpointError
from e3va_mm.registry import MODELS
from tests.helpers import build_e3va, build_stock, e3va_and_stock, randomised

IMAGE = (1, 3, 75, 50)


class Detector(nn.Module):
    """As much of a detector as loading sees."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Linear(2, 2)


@pytest.fixture
def stock():
    backbone = randomised(build_stock())
    backbone.eval()  # mmdet's returns None
    return backbone


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
    official['head.bias'] = torch.zeros(1000)
    official['norm.weight'] = torch.ones(256)
    official['norm.bias'] = torch.zeros(256)
    return official


def save(form, stock, folder):
    state = stock.state_dict()
    path = folder / f'{form}.pth'
    if form == 'official':
        torch.save(dict(model=to_official(state)), path)
    elif form == 'bare':
        torch.save(dict(state_dict=state), path)
    elif form == 'detector':
        torch.save(
            dict(
                meta={},
                state_dict={
                    'neck.weight': torch.zeros(2, 2),
                    **{f'backbone.{k}': v for k, v in state.items()},
                },
            ),
            path,
        )
    else:
        path = folder / 'swin.safetensors'
        save_file({f'backbone.{k}': v for k, v in state.items()}, path)
    return str(path)


def initialised(path, **kwargs):
    ours = build_e3va(
        init_cfg=dict(type='Pretrained', checkpoint=path),
        allow_random_trunk=False,
        **kwargs,
    )
    ours.init_weights()
    return ours


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
@pytest.mark.parametrize(
    'form', ['official', 'bare', 'detector', 'safetensors']
)
def test_every_format_brings_the_whole_trunk(form, scope, stock, tmp_path):
    if form == 'official':  # holds no output norms
        for i in range(4):
            nn.init.ones_(getattr(stock, f'norm{i}').weight)
            nn.init.zeros_(getattr(stock, f'norm{i}').bias)
    ours = initialised(save(form, stock, tmp_path), scope=scope)
    ours.train()  # not refused: the trunk has weights
    image = torch.randn(IMAGE)
    for output, expected in zip(ours(image), stock(image), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_the_load_report_says_how_much_matched(stock, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        'e3va_mm.backbones.trunk_backbone.print_log',
        lambda message, **_: lines.append(message),
    )
    path = save('official', stock, tmp_path)
    initialised(path)
    report = '\n'.join(lines)
    assert f'all 97 tensors (1.5 M values) from {path} (' in report
    assert 'not used: ' in report and 'head.weight' in report
    assert 'side path: not in the file, keeps its values' in report
    assert 'output norms: not in the file, keep their values: norm0' in report


def test_a_shallower_swin_is_refused_with_the_cause(stock, tmp_path):
    path = save('bare', stock, tmp_path)
    with pytest.raises(CheckpointError) as error:
        initialised(path, depths=(2, 1, 4, 1))
    text = str(error.value)
    assert '26 missing in the file' in text
    file, config = text.split('the config asks for')
    assert 'depths=(2, 1, 2, 1)' in file and 'depths=(2, 1, 4, 1)' in config


def test_a_deeper_swin_is_refused_with_the_cause(tmp_path):
    deeper = build_stock(depths=(2, 1, 4, 1))
    path = save('bare', deeper, tmp_path)
    with pytest.raises(CheckpointError) as error:
        initialised(path)
    text = str(error.value)
    assert path in text
    assert 'not expected' in text
    assert 'stages.2.blocks.2.norm1.weight' in text
    assert 'depths=(2, 1, 4, 1)' in text and 'depths=(2, 1, 2, 1)' in text


def test_a_wider_swin_is_refused_with_the_shapes(tmp_path):
    wider = build_stock(embed_dims=64, num_heads=(2, 4, 8, 16))
    path = save('bare', wider, tmp_path)
    with pytest.raises(CheckpointError) as error:
        initialised(path)
    text = str(error.value)
    assert '(64, 3, 4, 4) in the file, (32, 3, 4, 4) expected' in text
    assert 'embed_dims=64' in text and 'embed_dims=32' in text


@pytest.mark.parametrize(
    'missing',
    [
        'stages.1.blocks.0.attn.w_msa.proj.bias',
        'stages.0.downsample.reduction.weight',
        'patch_embed.norm.bias',
    ],
)
def test_a_missing_tensor_is_named(missing, stock, tmp_path):
    state = stock.state_dict()
    del state[missing]
    path = tmp_path / 'part.pth'
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match='1 missing in the file'
    ) as error:
        initialised(str(path))
    assert missing in str(error.value)


def test_another_window_resizes_the_position_tables(stock, tmp_path):
    # Stock loading fails on the index buffers, so it gets none of them.
    slim = tmp_path / 'slim.pth'
    torch.save(
        {
            f'backbone.{k}': v
            for k, v in stock.state_dict().items()
            if not k.endswith('relative_position_index')
        },
        slim,
    )
    reference = build_stock(
        window_size=12,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(slim)),
    )
    reference.init_weights()
    reference.eval()
    ours = initialised(save('bare', stock, tmp_path), window_size=12)
    image = torch.randn(IMAGE)
    for output, expected in zip(ours(image), reference(image), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_load_from_takes_a_whole_stock_detector(stock, tmp_path):
    path = save('detector', stock, tmp_path)
    model = Detector(build_e3va(allow_random_trunk=False))
    model.backbone.init_weights()
    before = copy.deepcopy(model.backbone.side_path.state_dict())
    load_checkpoint(model, path)
    image = torch.randn(IMAGE)
    model.train()
    for output, expected in zip(
        model.backbone(image), stock(image), strict=True
    ):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    for key, value in model.backbone.side_path.state_dict().items():
        assert torch.equal(value, before[key])


def test_load_from_raises_where_mmengine_only_logs(tmp_path):
    path = save('detector', build_stock(depths=(2, 1, 4, 1)), tmp_path)
    model = Detector(build_e3va())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match='backbone'):
        load_checkpoint(model, path)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[f'backbone.{key}']), key


def test_load_from_a_file_without_a_backbone_is_an_error(stock, tmp_path):
    path = save('official', stock, tmp_path)
    with pytest.raises(CheckpointError, match='init_cfg.checkpoint'):
        load_checkpoint(Detector(build_e3va()), path)


def test_own_checkpoints_round_trip_and_must_be_whole(tmp_path):
    ours, _ = e3va_and_stock()
    randomised(ours.side_path, 5)
    path = str(tmp_path / 'own.pth')
    torch.save(dict(state_dict=Detector(ours).state_dict()), path)
    twin = Detector(build_e3va())
    load_checkpoint(twin, path)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, twin.backbone.state_dict()[key]), key

    with pytest.raises(
        CheckpointError,
        match=r'side_path.stages.0.0.attn.down.p: \(32, 16\) in the file, '
        r'\(32, 8\) expected(.|\n)*other `side_path` options',
    ):
        load_checkpoint(Detector(build_e3va(side_path=dict(rank=8))), path)
    state = torch.load(path)['state_dict']
    del state['backbone.norm2.weight']
    torch.save(dict(state_dict=state), path)
    with pytest.raises(CheckpointError, match='norm2.weight'):
        load_checkpoint(twin, path)


def test_side_path_alone_loads_and_leaves_the_trunk(tmp_path):
    ours, _ = e3va_and_stock()
    randomised(ours.side_path, 5)
    trunk = {name for name, _ in ours.trunk_children()}
    part = {
        k: v
        for k, v in ours.state_dict().items()
        if k.split('.')[0] not in trunk
    }
    twin = build_e3va(allow_random_trunk=False)
    twin.init_weights()
    twin.load_state_dict(part, strict=False)
    assert torch.equal(
        twin.side_path.stages[0][0]['attn'].up.q,
        ours.side_path.stages[0][0]['attn'].up.q,
    )
    assert twin.trunk_source is None


def test_a_cut_trunk_takes_the_whole_file(stock, tmp_path):
    path = save('detector', stock, tmp_path)
    ours = initialised(path, out_indices=(0, 1))
    image = torch.randn(IMAGE)
    for output, expected in zip(ours(image), stock(image)[:2], strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_stock_baselines_take_safetensors_too(scope, stock, tmp_path):
    path = save('safetensors', stock, tmp_path)
    with DefaultScope.overwrite_default_scope(scope):
        baseline = MODELS.build(
            ConfigDict(
                dict(
                    type=f'{scope}.SwinTransformer',
                    embed_dims=32,
                    depths=(2, 1, 2, 1),
                    num_heads=(1, 2, 4, 8),
                    init_cfg=dict(type='Pretrained', checkpoint=path),
                )
            )
        )
    baseline.init_weights()
    for key, value in stock.state_dict().items():
        assert torch.equal(value, baseline.state_dict()[key]), key
