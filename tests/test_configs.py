"""Every config of the repository trains, and is what it says."""

import contextlib
import copy
import functools
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, DefaultScope

from e3va_mm.engine.checkpointing import is_checkpointed
from e3va_mm.measure import TrainingStep
from e3va_mm.registry import MODELS
from e3va_mm.utils import count_parameters
from tests.helpers import SWIN, TINY

CONFIGS = Path(__file__).parents[1] / 'configs'
SIDE = 64
WIDTH = 32
SAMPLES = 16
ALL = sorted(CONFIGS.glob('*.py'))
ONE_CARD = [path for path in ALL if re.search(r'_\d+gb$', path.stem)]
NANO = [path for path in ALL if '_nano_' in path.stem]
LARGE = [path for path in ALL if path not in NANO]
FAMILIES = {
    'cascade_e3va_swin_{}_coco': (0, 1, 2, 3),
    'cascade_e3va_swin_{}_coco_3x': (0, 1, 2, 3),
    'retinanet_e3va_swin_{}_voc': (1, 2, 3),
    'faster_rcnn_e3va_swin_{}_voc': (0, 1, 2, 3),
    'upernet_e3va_swin_{}_voc12': (0, 1, 2, 3),
    'upernet_e3va_swin_{}_ade20k': (0, 1, 2, 3),
}
WEIGHTS = dict(
    t='swin_tiny_patch4_window7_224.pth',
    s='swin_small_patch4_window7_224.pth',
    b='swin_base_patch4_window7_224_22k.pth',
    l='swin_large_patch4_window7_224_22k.pth',
)
PUBLISHED = dict(t=440_064, s=896_256, b=1_195_008, l=1_792_512)
# Family -> (its files, by size; the blocks that are outputs, by size)
MAE = 'https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}.pth'
DINOV2 = (
    'https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{0}14/'
    'dinov2_vit{0}14_pretrain.pth'
)
BEIT = (
    'https://github.com/addf400/files/releases/download/v1.0/'
    'beit_{}_patch16_224_pt22k_ft22k.pth'
)
LAST, QUARTERS = ((11,), (23,)), ((2, 5, 8, 11), (5, 11, 17, 23))
VIT_FAMILIES = {
    'cascade_e3va_vit_{}_mae_coco': (MAE, LAST),
    'cascade_e3va_dinov2_{}_coco': (DINOV2, LAST),
    'upernet_e3va_dinov2_{}_ade20k': (DINOV2, QUARTERS),
    'upernet_e3va_dinov2_{}_voc12': (DINOV2, QUARTERS),
    'upernet_e3va_beit_{}_ade20k': (BEIT, ((3, 5, 7, 11), (7, 11, 15, 23))),
    'upernet_e3va_beit_{}_voc12': (BEIT, ((3, 5, 7, 11), (7, 11, 15, 23))),
}
# One of the family, spread over processes.
SHARDED = [
    'cascade_e3va_swin_l_coco_deepspeed',
    'cascade_e3va_swin_l_coco_fsdp',
]
# Beyond the paper.
MIX = ['cascade_e3va_mix_swin_l_coco']
# Stock configs of other trunks and heads.
OTHERS = [
    'dino_e3va_swin_l_coco',
    'mask2former_e3va_swin_l_ade20k',
    'mask2former_e3va_swin_l_coco_panoptic',
    'segformer_e3va_mit_b5_ade20k',
]
# Those of the stock classes, whatever `arch` names.
TINY_VIT = dict(embed_dims=32, num_layers=4, num_heads=2)
TINY_BACKBONES = {
    'E3VASwinTransformer': TINY,
    'mmpretrain.VisionTransformer': dict(
        arch=dict(TINY_VIT, feedforward_channels=64)
    ),
    'mmseg.BEiT': TINY_VIT,
    'mmseg.MixVisionTransformer': dict(embed_dims=32, num_layers=[1, 2, 1, 1]),
}
VIT_WIDTHS = dict(base=768, large=1024)

# What trains in a backbone beside the side path.
OUTPUT_NORMS = {
    'E3VASwinTransformer': lambda config: {
        f'norm{stage}'
        for stage in config.model.backbone.get('out_indices', range(4))
    },
    'mmpretrain.VisionTransformer': lambda config: {'ln1'},
    # BEiT has none; that of MiT is what the next stage reads.
    'mmseg.BEiT': lambda config: set(),
    'mmseg.MixVisionTransformer': lambda config: set(),
}

every_config = pytest.mark.parametrize('path', ALL, ids=lambda p: p.stem)
every_large = pytest.mark.parametrize('path', LARGE, ids=lambda p: p.stem)
every_one_card = pytest.mark.parametrize(
    'path', ONE_CARD, ids=lambda p: p.stem
)
every_family = pytest.mark.parametrize('family', FAMILIES)
every_vit_family = pytest.mark.parametrize('family', VIT_FAMILIES)
every_pyramid = pytest.mark.parametrize(
    'path',
    [path for path in ALL if re.match('cascade_e3va_(vit|dinov2)', path.stem)],
    ids=lambda p: p.stem,
)


def header(path):
    return path.read_text().split('"""')[1]


@functools.cache
def parsed(path):
    return Config.fromfile(path)


def load(path):
    """A config that may be changed; parsing takes long."""
    return copy.deepcopy(parsed(path))


def narrow(node):
    """Let all layers have few channels, and heads learn from few samples."""
    if isinstance(node, list | tuple):
        for value in node:
            narrow(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key.endswith('channels') and isinstance(value, int):
                node[key] = min(value, WIDTH)
            elif key == 'sampler':
                value.num = min(value.get('num', SAMPLES), SAMPLES)
            else:
                narrow(value)


def values(node, key):
    """All values of a key, at any depth."""
    if isinstance(node, list | tuple):
        return [found for value in node for found in values(value, key)]
    if not isinstance(node, dict):
        return []
    here = [node[key]] if key in node else []
    return here + values(list(node.values()), key)


def stock_arguments(backbone):
    """Where a backbone's config has the arguments of the stock class."""
    return backbone.get('trunk', backbone)


def stock_name(backbone):
    """Which stock class a backbone's config means."""
    kind = backbone.get('trunk_type') or stock_arguments(backbone)['type']
    # A class in a config of the new style.
    name = kind.__name__ if isinstance(kind, type) else kind
    return name.removeprefix('e3va_mm.')


def needs_its_stock_class(config):
    """Skip what is built upon mmpretrain where that is not installed."""
    if stock_name(config.model.backbone).startswith('mmpretrain.'):
        pytest.importorskip('mmpretrain')


def width_of(stock):
    """Channels of a stock backbone's first map, from its arguments."""
    arch = stock.get('arch')
    if arch is None:
        return stock['embed_dims']
    return VIT_WIDTHS[arch] if isinstance(arch, str) else arch['embed_dims']


def picture_side(config):
    """The smallest side from 64 pixels on that whole patches fill."""
    stock = stock_arguments(config.model.backbone)
    patch = stock.get('patch_size', 4)
    return -(-SIDE // patch) * patch


def shrink_backbone(backbone, side):
    """Make the trunk tiny in place; by how much its maps are narrower."""
    stock = stock_arguments(backbone)
    before = width_of(stock)
    stock.update(copy.deepcopy(TINY_BACKBONES[stock_name(backbone)]))
    if 'img_size' in stock:
        stock['img_size'] = (side, side)
        # As many outputs as before.
        count = len(stock['out_indices'])
        stock['out_indices'] = (0, 1, 2, 3)[-count:]
    side_path = backbone.get('side_path', {})
    for option in ('compute', 'trunk_compute', 'trunk_weights'):
        if option in side_path:
            side_path[option] = 'bf16'
    return Fraction(width_of(stock), before)


def shrunk(config):
    """The config with a tiny trunk, small heads and pictures, for a CPU."""
    model = config.model
    side = picture_side(config)
    for part in (
        model.data_preprocessor,
        *(model.data_preprocessor.get('batch_augments') or ()),
    ):
        if 'size' in part:
            part['size'] = (side, side)
    backbone = model.pop('backbone')
    readers = {
        (part, key): model[part][key]
        for part in ('neck', 'decode_head', 'auxiliary_head', 'panoptic_head')
        for key in ('in_channels', 'embed_dim')
        if key in model.get(part, {})
    }
    if 'num_queries' in model:  # no more than there are tokens
        model.num_queries = min(model.num_queries, 4 * SAMPLES)
    # The widths of transformers hang together, in many places.
    if not values(model, 'embed_dims'):
        narrow(model)
    scale = shrink_backbone(backbone, side)
    for (part, key), given in readers.items():
        model[part][key] = (
            int(given * scale)
            if isinstance(given, int)
            else [int(n * scale) for n in given]
        )
    model.backbone = backbone
    return config


def test_the_sweep_is_not_empty():
    assert len(ONE_CARD) == 3
    assert len(NANO) == 6
    assert sorted(path.stem for path in set(LARGE) - set(ONE_CARD)) == sorted(
        [family.format(size) for family in FAMILIES for size in WEIGHTS]
        + [family.format(size) for family in VIT_FAMILIES for size in 'bl']
        + OTHERS
        + SHARDED
        + MIX
    )


@every_config
def test_a_step(path):
    """A step on generated input: what should train does, and stays finite."""
    config = load(path)
    needs_its_stock_class(config)
    side = picture_side(config)
    config = shrunk(config)
    # Batch norms of maps of 1x1 need two pictures.
    step = TrainingStep(config, 'as-is', size=(side, side), batch=2, objects=3)
    wrapped = any(is_checkpointed(m) for m in step.model.modules())
    assert wrapped == (path in ONE_CARD)
    before = {
        name: parameter.detach().clone()
        for name, parameter in step.model.backbone.named_parameters()
        # What lies before an up projection, which is zero, waits.
        if 'up.q' in name
        or (parameter.requires_grad and not name.startswith('side_path.'))
    }
    assert any('up.q' in name for name in before)
    norms = {name.split('.')[0] for name in before} - {'side_path'}
    assert norms == OUTPUT_NORMS[stock_name(config.model.backbone)](config)
    step.run()
    for name, parameter in step.model.backbone.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
    for name, parameter in step.model.named_parameters():
        assert parameter.isfinite().all(), name
    schedulers = config.param_scheduler
    for scheduler in [schedulers] if 'type' in schedulers else schedulers:
        PARAM_SCHEDULERS.build(
            scheduler,
            default_args=dict(optimizer=step.optim_wrapper, epoch_length=100),
        )


@functools.cache
def counts(scope, backbone):
    """Trainable and stock values of a backbone of full size."""
    backbone = json.loads(backbone)
    # Drawing takes long; that the others do they need numbers for.
    abstract = stock_name(backbone).startswith('mmpretrain.')
    with (
        DefaultScope.overwrite_default_scope(scope),
        torch.device('meta') if abstract else contextlib.nullcontext(),
    ):
        backbone = MODELS.build(backbone)
    total, trainable = count_parameters(backbone)
    return trainable, total - count_parameters(backbone.side_path)[0]


@every_config
def test_header(path):
    text = header(path)
    # DeepSpeed has no way to run in one process of its own.
    run, more = ('python tools/train.py', '')
    if path.stem.endswith('_deepspeed'):
        run, more = ('bash tools/dist_train.sh', ' N')
    assert f'\nRun: {run} configs/{path.name}{more}\n' in text
    assert re.search(r'\n(Paper: https://|Data: python tools/)', text)
    assert re.search(r'\nExpected: \S', text)
    for name in re.findall(r'[\w/]+\.py', text):
        assert (CONFIGS / name).is_file() or (CONFIGS.parent / name).is_file()


@every_large
def test_header_says_how_to_test(path):
    # What it writes is not tested by DeepSpeed.
    name = path.name.replace('_deepspeed', '')
    assert (
        f'\nTest: python tools/test.py configs/{name} CHECKPOINT\n'
        in header(path)
    )


@every_config
def test_header_says_what_trains(path):
    text = header(path)
    stated, share = re.search(
        r'Trains ([\d,]+) values in the backbone \((.+) %\)', text
    ).groups()
    config = load(path)
    needs_its_stock_class(config)
    backbone = config.model.backbone.to_dict()
    if isinstance(backbone['type'], type):  # in a config of the new style
        backbone['type'] = f'e3va_mm.{backbone["type"].__name__}'
    # Weights are out of reach, and how the trunk computes does not count.
    del stock_arguments(backbone)['init_cfg']
    # Of the side path its kind does.
    side_path = backbone.pop('side_path', {})
    if 'type' in side_path:
        backbone['side_path'] = dict(type=side_path['type'])
    trainable, stock = counts(
        config.default_scope, json.dumps(backbone, sort_keys=True)
    )
    assert f'{trainable:,}' == stated
    assert f'{100 * trainable / stock:.2f}' == share
    (rate,) = re.findall(r'at a learning rate of (\S+);', text)
    assert float(rate) == config.optim_wrapper.optimizer.lr


@every_family
@pytest.mark.parametrize('size', WEIGHTS)
def test_a_family_has_every_size(family, size):
    path = CONFIGS / f'{family.format(size)}.py'
    backbone = parsed(path).model.backbone
    assert backbone.init_cfg.checkpoint == (
        'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
        + WEIGHTS[size]
    )
    for argument, value in SWIN[size].items():
        found = backbone[argument]
        assert (found if isinstance(found, int) else tuple(found)) == value
    out_indices = FAMILIES[family]
    assert tuple(backbone.get('out_indices', (0, 1, 2, 3))) == out_indices
    # A map that is not given out has no output norm.
    trained = PUBLISHED[size] - sum(
        2 * backbone.embed_dims * 2**stage
        for stage in {0, 1, 2, 3}.difference(out_indices)
    )
    assert f'Trains {trained:,} values' in header(path)
    assert f', Swin-{size.upper()} (ImageNet-' in header(path)
    pretrained = '22k' if '22k' in WEIGHTS[size] else '1k'
    assert f'(ImageNet-{pretrained})' in header(path)


@every_family
def test_sizes_differ_in_their_trunk_alone(family):
    rest = []
    for size in WEIGHTS:
        config = load(CONFIGS / f'{family.format(size)}.py')
        model = config.model
        widths = [model.backbone.embed_dims * 2**stage for stage in range(4)]
        for part in ('neck', 'decode_head'):
            if part in model:
                assert model[part].pop('in_channels') == [
                    widths[stage] for stage in FAMILIES[family]
                ]
        if 'auxiliary_head' in model:
            assert model.auxiliary_head.pop('in_channels') == widths[2]
        del model['backbone']
        rest.append(
            {
                key: value
                for key, value in config.to_dict().items()
                # Names for children; where stock configs name weights.
                if key not in ('trunk', 'widths', 'checkpoint_file')
            }
        )
    assert rest[0] == rest[1] == rest[2] == rest[3]


@every_vit_family
@pytest.mark.parametrize('size', 'bl')
def test_a_vit_family_has_both_sizes(family, size):
    path = CONFIGS / f'{family.format(size)}.py'
    model = parsed(path).model
    backbone = model.backbone
    files, outputs = VIT_FAMILIES[family]
    arch, width, blocks, outputs = dict(
        b=('base', 768, 12, outputs[0]), l=('large', 1024, 24, outputs[1])
    )[size]
    assert backbone.type == 'e3va_mm.E3VAVisionTransformer'
    assert backbone.init_cfg.checkpoint == files.format(
        size if files == DINOV2 else arch
    )
    assert tuple(backbone.out_indices) == outputs
    if files == BEIT:
        assert backbone.embed_dims == width
        assert backbone.num_layers == blocks
        assert backbone.img_size == model.data_preprocessor.size
    else:
        assert backbone.arch == arch
        # Of the positions in the file.
        patch, side = {MAE: (16, 224), DINOV2: (14, 518)}[files]
        assert (backbone.patch_size, backbone.img_size) == (patch, side)
        assert (files == DINOV2) == ('layer_scale_init_value' in backbone)
        assert 'Needs mmpretrain.' in header(path)
    if len(outputs) == 1:
        assert model.neck.in_channels == width
    else:
        assert model.neck.embed_dim == width
        assert model.decode_head.in_channels == [width] * 4
        assert model.auxiliary_head.in_channels == width
    assert f'-{size.upper()} (' in header(path).splitlines()[0]


@pytest.mark.parametrize(
    'family',
    # The stock configs of BEiT differ in batches and rates.
    [name for name in VIT_FAMILIES if 'beit_{}_ade20k' not in name],
)
def test_vit_sizes_differ_in_their_trunk_alone(family):
    rest = []
    for size in 'bl':
        config = load(CONFIGS / f'{family.format(size)}.py').to_dict()
        model = config['model']
        del model['backbone']
        for part in ('neck', 'decode_head', 'auxiliary_head'):
            for key in ('in_channels', 'embed_dim'):
                model.get(part, {}).pop(key, None)
        for name in ('trunk', 'width', 'quarters'):
            config.pop(name, None)
        rest.append(config)
    assert rest[0] == rest[1]


@every_pyramid
def test_strides_are_those_of_the_maps(path):
    """A whole patch of 14 pixels is no power of two."""
    config = load(path)
    needs_its_stock_class(config)
    model = config.model
    anchors = model.rpn_head.anchor_generator.strides
    rois = model.roi_head.bbox_roi_extractor.featmap_strides
    assert rois == model.roi_head.mask_roi_extractor.featmap_strides
    assert rois == anchors[: len(rois)]
    divisor = model.data_preprocessor.pad_size_divisor
    height, width = 2 * divisor, 3 * divisor
    shrink_backbone(model.backbone, picture_side(config))
    model.backbone.allow_random_trunk = True
    model.neck.update(in_channels=TINY_VIT['embed_dims'], out_channels=WIDTH)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        backbone, neck = (MODELS.build(model[p]) for p in ('backbone', 'neck'))
    with torch.no_grad():
        maps = neck(backbone(torch.zeros(1, 3, height, width)))
    assert len(maps) == len(anchors)
    for stride, found in zip(anchors, maps, strict=True):
        cells = [-(-side // stride) for side in (height, width)]
        assert list(found.shape[-2:]) == cells
        if stride in rois:
            assert [n * stride for n in cells] == [height, width]


@pytest.mark.parametrize(
    'path',
    [path for path in ALL if path.stem.startswith('upernet_e3va_dinov2')],
    ids=lambda p: p.stem,
)
def test_pictures_are_padded_to_whole_patches(path):
    config = parsed(path)
    patch = config.model.backbone.patch_size
    preprocessor = config.model.data_preprocessor
    for side, crop in zip(preprocessor.size, config.crop_size, strict=True):
        assert side == -(-crop // patch) * patch
    assert preprocessor.test_cfg.size_divisor == patch
    assert f'padded to {preprocessor.size[0]}x' in header(path)


@pytest.mark.parametrize('size', 'bl')
def test_beit_segmentors_test_on_pictures_of_one_size(size):
    for data in ('ade20k', 'voc12'):
        path = CONFIGS / f'upernet_e3va_beit_{size}_{data}.py'
        config = parsed(path)
        cfg = config.model.test_cfg
        assert cfg.mode == 'slide'
        assert cfg.crop_size == config.model.backbone.img_size
        assert config.crop_size == config.model.backbone.img_size
        wrapper = config.optim_wrapper
        assert wrapper.constructor == 'e3va_mm.SidePathOptimWrapperConstructor'
        assert wrapper.paramwise_cfg == dict(norm_decay_mult=0.0)


def test_the_recipe_of_swins_authors():
    config = parsed(CONFIGS / 'cascade_e3va_swin_b_coco_3x.py')
    heads = config.model.roi_head.bbox_head
    assert len(heads) == 3
    for head in heads:
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert head.loss_bbox.type == 'GIoULoss' and head.reg_decoded_bbox
    assert config.train_cfg.max_epochs == 36
    assert config.param_scheduler[-1].milestones == [27, 33]
    _, _, _, jitter, _ = config.train_dataloader.dataset.pipeline
    whole, cropped = jitter.transforms
    assert [s for s, _ in whole[0].scales] == list(range(480, 801, 32))
    assert [step.type for step in cropped] == [
        'RandomChoiceResize',
        'RandomCrop',
        'RandomChoiceResize',
    ]
    wrapper = config.optim_wrapper
    assert wrapper.type == 'AmpOptimWrapper'
    assert wrapper.optimizer == dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )


@every_config
def test_heads_know_the_classes_of_the_data(path):
    config = parsed(path)
    dataset = config.test_dataloader.dataset
    classes = dataset.get('metainfo', {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(config.default_scope) as found:
            classes = found.get(dataset.type).METAINFO['classes']
    known = values(config.model, 'num_classes')
    things, stuff = (
        values(config.model, f'num_{kind}_classes')
        for kind in ('things', 'stuff')
    )
    known += [sum(pair) for pair in zip(things, stuff, strict=True)]
    assert set(known) == {len(classes)}


def levels(path):
    """How many configs lie on the way to the stock one, it included."""
    parents = Config._get_base_files(str(path))
    return 1 + max(
        (
            levels(path.parent / parent) if parent.startswith('.') else 1
            for parent in parents
        ),
        default=0,
    )


@every_config
def test_at_most_three_levels(path):
    assert levels(path) <= 3


@every_one_card
def test_one_card_updates_as_the_config_it_comes_from(path):
    config = parsed(path)
    parent = parsed(CONFIGS / re.sub(r'_\d+gb', '', path.name))
    pictures = parent.auto_scale_lr.base_batch_size
    batch = config.train_dataloader.batch_size
    steps = config.optim_wrapper.accumulative_counts
    assert batch * steps == pictures
    assert f'{batch} of the {pictures} pictures' in header(path)
    assert f'on one card of {path.stem.split("_")[-1][:-2]} GB' in header(path)
    assert config.auto_scale_lr.base_batch_size == batch
    assert config.optim_wrapper.optimizer == parent.optim_wrapper.optimizer
    warm_up, *rest = config.param_scheduler
    assert warm_up.end == parent.param_scheduler[0].end * steps
    assert [scheduler.to_dict() for scheduler in rest] == [
        dict(scheduler, _scope_=rest[0]['_scope_'])
        for scheduler in parent.param_scheduler[1:]
    ]
    assert config.custom_hooks[:-1] == parent.custom_hooks
    assert config.model.backbone.side_path.preset == 'lean'


def test_smaller_cards_recompute_more():
    modules = {
        int(path.stem.split('_')[-1][:-2]): set(
            parsed(path).custom_hooks[-1].modules
        )
        for path in ONE_CARD
    }
    assert modules[11] < modules[8] < modules[6]


@every_config
def test_parsing_brings_the_safe_loaders(path):
    """Inferencers read a checkpoint before they build what imports us."""
    imports = Config.fromfile(path).get('custom_imports')
    if 'new_style' in path.stem:  # mmengine heeds no such key there
        assert imports is None
    else:
        assert imports.imports == ['e3va_mm.checkpoint']
        assert not imports.allow_failed_imports
