"""Every config is what it says, and trains."""

import copy
import functools
import gc
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, DefaultScope

from e3va_mm.engine.activation_checkpointing import is_checkpointed
from e3va_mm.measure import TrainingStep
from e3va_mm.registry import MODELS
from e3va_mm.utils import count_parameters
from e3va_mm.weights import read_adapter
from e3va_mm.weights.adapter_extraction import without_trunks
from e3va_mm.weights.reading import ASSETS
from tests.helpers import TINY
from tests.tiny_bert import tiny_bert

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
ALL = {path.stem: path for path in sorted(CONFIGS.glob('*.py'))}
ONE_CARD = [name for name in ALL if re.search(r'_\d+gb$', name)]
NANO = [name for name in ALL if '_nano_' in name]
SIDE, WIDTH, SAMPLES = 64, 32, 16
# Up projections of E3VA's adapters and of E3VA-Fusion.
UP = re.compile(r'\bup\.(q|\d+\.)')
# Families of configs that differ in their trunk alone, and their sizes.
FAMILIES = {
    'cascade_e3va_swin_{}_coco': 'tsbl',
    'cascade_e3va_swin_{}_coco_3x': 'tsbl',
    'retinanet_e3va_swin_{}_voc': 'tsbl',
    'faster_rcnn_e3va_swin_{}_voc': 'tsbl',
    'upernet_e3va_swin_{}_voc12': 'tsbl',
    'upernet_e3va_swin_{}_ade20k': 'tsbl',
    'cascade_e3va_vit_{}_mae_coco': 'bl',
    'cascade_e3va_dinov2_{}_coco': 'bl',
    'upernet_e3va_dinov2_{}_ade20k': 'bl',
    'upernet_e3va_dinov2_{}_voc12': 'bl',
    'upernet_e3va_beit_{}_ade20k': 'bl',
    'upernet_e3va_beit_{}_voc12': 'bl',
}
# The weights of a trunk, by the first of its names that a config has.
FILES = dict(
    swin_t='swin_tiny_patch4_window7_224.pth',
    swin_s='swin_small_patch4_window7_224.pth',
    swin_b='swin_base_patch4_window7_224_22k.pth',
    swin_l='swin_large_patch4_window7_224_22k.pth',
    vit_b='mae_pretrain_vit_base.pth',
    vit_l='mae_pretrain_vit_large.pth',
    dinov2_s='dinov2_vits14_pretrain.pth',
    dinov2_b='dinov2_vitb14_pretrain.pth',
    dinov2_l='dinov2_vitl14_pretrain.pth',
    beit_b='beit_base_patch16_224_pt22k_ft22k.pth',
    beit_l='beit_large_patch16_224_pt22k_ft22k.pth',
)
OTHERS = [
    'cascade_e3va_dinov3_l_coco',
    'cascade_e3va_mix_swin_l_coco',
    'dino_e3va_dinov3_l_coco',
    'dino_e3va_swin_l_coco',
    'mask2former_e3va_dinov3_l_ade20k',
    'mask2former_e3va_dinov3_l_coco_panoptic',
    *(
        f'mm_grounding_dino_e3va_swin_{size}_{data}'
        for size in 'tbl'
        for data in ('coco', 'odvg')
    ),
    'mask2former_e3va_swin_l_ade20k',
    'mask2former_e3va_swin_l_coco_panoptic',
    'retinanet_e3va_dinov2_s_bccd',
    'retinanet_e3va_fusion_dinov2_s_bccd',
    'segformer_e3va_mit_b5_ade20k',
    'fcn_e3va_dinov2_s_camvid',
    'fcn_e3va_fusion_dinov2_s_camvid',
    'upernet_e3va_dinov3_l_ade20k',
    'upernet_e3va_dinov3_7b_ade20k',
]
# One size of each family trains; shrunk, the others are the same.
TRAINED = [
    *(family.format(sizes[0]) for family, sizes in FAMILIES.items()),
    *OTHERS,
    *ONE_CARD,
    *NANO,
]
HOOKS = [
    f'e3va_mm.{name}Hook'
    for name in (
        'DatasetCheck',
        'TrainableTable',
        'ProgressBar',
        'TrainingGuard',
        'ResumeCheck',
    )
]
TINY_VIT = dict(embed_dims=32, num_layers=4, num_heads=2)
TINY_BACKBONES = {
    'E3VASwinTransformer': TINY,
    'mmpretrain.VisionTransformer': dict(
        arch=dict(TINY_VIT, feedforward_channels=64)
    ),
    'mmseg.BEiT': TINY_VIT,
    'mmseg.MixVisionTransformer': dict(embed_dims=32, num_layers=[1, 2, 1, 1]),
    'DINOv3ViT': dict(
        embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, img_size=64
    ),
}
VIT_WIDTHS = {'dinov2-small': 384, 'base': 768, 'large': 1024, '7b': 4096}

every_config = pytest.mark.parametrize('name', ALL)


@functools.cache
def parsed(name):
    return Config.fromfile(ALL[name])


def load(name):
    """A config that may be changed; parsing takes long."""
    config = copy.deepcopy(parsed(name))
    if stock_name(config.model.backbone).startswith('mmpretrain.'):
        pytest.importorskip('mmpretrain')
    if stock_name(config.model.backbone) == 'DINOv3ViT':
        pytest.importorskip('timm')
    return config


def header(name):
    """The docstring of a config, its paragraphs as single lines."""
    return re.sub(
        r'\n(?=[a-z\d(])', ' ', ALL[name].read_text().split('"""')[1]
    )


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
    # Not a name in a config of the new style.
    name = kind if isinstance(kind, str) else kind.__name__
    return name.removeprefix('e3va_mm.')


def width_of(stock):
    """Channels of a stock backbone's first map, from its arguments."""
    arch = stock.get('arch')
    for name in ('embed_dim', 'embed_dims'):
        if name in stock:
            return stock[name]
    return VIT_WIDTHS[arch] if isinstance(arch, str) else arch['embed_dims']


def image_side(config):
    """The smallest side from 64 pixels on that whole patches fill."""
    patch = stock_arguments(config.model.backbone).get('patch_size', 4)
    return -(-SIDE // patch) * patch


def shrink_backbone(backbone, side):
    """Make the trunk tiny in place; by how much its maps are narrower."""
    stock = stock_arguments(backbone)
    before = width_of(stock)
    stock.update(copy.deepcopy(TINY_BACKBONES[stock_name(backbone)]))
    if 'img_size' in stock:
        stock['img_size'] = (side, side)
        # As many outputs as before.
        stock['out_indices'] = (0, 1, 2, 3)[-len(stock['out_indices']) :]
    tuner = backbone.get('tuner', {})
    for option in ('compute', 'trunk_compute', 'trunk_weights'):
        if option in tuner:
            tuner[option] = 'bf16'
    return Fraction(width_of(stock), before)


def narrow(node, transformer):
    """Give heads few channels, or few layers, and few samples."""
    if isinstance(node, list | tuple):
        for value in node:
            narrow(value, transformer)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key.endswith('channels') and isinstance(value, int):
                # The widths of transformers depend on each other.
                node[key] = value if transformer else min(value, WIDTH)
            elif key == 'num_layers':
                node[key] = min(value, 2)
            elif key == 'sampler':
                value.num = min(value.get('num', SAMPLES), SAMPLES)
            else:
                narrow(value, transformer)


def shrunk(config):
    """The config with a tiny trunk, small heads and images, for a CPU."""
    model = config.model
    side = image_side(config)
    for part in (
        model.data_preprocessor,
        *(model.data_preprocessor.get('batch_augments') or ()),
    ):
        if 'size' in part:
            part['size'] = (side, side)
    backbone = model.pop('backbone')
    heads = ('decode_head', 'auxiliary_head', 'panoptic_head')
    necks = model.get('neck', {})
    neck, *others = necks if isinstance(necks, list) else [necks]
    behind = 'out_channels' in neck
    parts = [neck, *(model.get(head) or {} for head in heads)]
    readers = [
        (part, key, part[key])
        for part in parts[: 1 if behind else None]
        for key in ('in_channels', 'embed_dim')
        if key in part
    ]
    if 'num_queries' in model:  # no more than there are tokens
        model.num_queries = min(model.num_queries, 4 * SAMPLES)
    narrow(model, transformer=bool(values(model, 'embed_dims')))
    scale = shrink_backbone(backbone, side)
    for part, key, width in readers:
        part[key] = (
            int(width * scale)
            if isinstance(width, int)
            else [int(n * scale) for n in width]
        )
    for part in [*others, *parts[1:]] if behind else ():
        width = part.get('in_channels')
        if width is not None:
            own = neck.out_channels
            part.in_channels = (
                own if isinstance(width, int) else [own] * len(width)
            )
    model.backbone = backbone
    return config


def test_all_configs_are_known():
    assert len(ONE_CARD) == 3 and len(NANO) == 6
    assert sorted(ALL) == sorted(
        [f.format(size) for f, sizes in FAMILIES.items() for size in sizes]
        + OTHERS
        + ONE_CARD
        + NANO
    )


@pytest.mark.parametrize('name', TRAINED)
def test_a_step(name, tmp_path):
    """A step on generated input: what should train does, and stays finite."""
    config = load(name)
    if 'language_model' in config.model:
        config.model.language_model.name = tiny_bert(tmp_path)
    side = image_side(config)
    config = shrunk(config)
    # Batch norms of maps of 1x1 need two images.
    step = TrainingStep(config, 'as-is', size=(side, side), batch=2, objects=3)
    wrapped = any(is_checkpointed(m) for m in step.model.modules())
    assert wrapped == (name in ONE_CARD or 'grounding' in name)
    before = {
        key: parameter.detach().clone()
        for key, parameter in step.model.backbone.named_parameters()
        # What lies before an up projection, which is zero, waits.
        if UP.search(key)
        or (parameter.requires_grad and not key.startswith('side_path.'))
    }
    assert any(map(UP.search, before))
    stages = config.model.backbone.get('out_indices', range(4))
    outputs = len(
        stock_arguments(config.model.backbone).get('out_indices', ())
    )
    assert {key.split('.')[0] for key in before} - {'side_path'} == {
        'E3VASwinTransformer': {f'norm{stage}' for stage in stages},
        'mmpretrain.VisionTransformer': {'ln1'},
        'DINOv3ViT': {f'norm{i}' for i in range(outputs)},
        # BEiT has none; that of MiT is what the next stage reads.
        'mmseg.BEiT': set(),
        'mmseg.MixVisionTransformer': set(),
    }[stock_name(config.model.backbone)]
    step.run()
    for key, parameter in step.model.backbone.named_parameters():
        if key in before:
            assert not torch.equal(parameter, before[key]), key
    for key, parameter in step.model.named_parameters():
        assert parameter.isfinite().all(), key
    schedulers = config.param_scheduler
    for scheduler in [schedulers] if 'type' in schedulers else schedulers:
        PARAM_SCHEDULERS.build(
            scheduler,
            default_args=dict(optimizer=step.optim_wrapper, epoch_length=100),
        )


@every_config
def test_header(name):
    text = header(name)
    assert f'\nRun: python tools/train.py configs/{name}.py\n' in text
    assert (
        f'\nTest: python tools/test.py configs/{name}.py CHECKPOINT\n' in text
    )
    assert re.search(
        r'\n(Paper: https://|Data: (python tools/|git clone ))', text
    )
    assert re.search(r'\nExpected: \S', text)
    for file in re.findall(r'[\w/]+\.py', text):
        assert (CONFIGS / file).is_file() or (ROOT / file).is_file()


@pytest.fixture(scope='module')
def undrawn():
    """Build modules of full size without drawing their weights."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ('kaiming_uniform_', 'uniform_', 'normal_', 'ones_'):
            patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        yield


@functools.cache
def counts(backbone):
    """Trainable and stock parameters of a backbone of full size."""
    gc.collect()  # the one before refers to itself
    # No memory of a test machine holds 7 billion.
    device = 'meta' if 'DINOv3ViT' in backbone else 'cpu'
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device(device):
        backbone = MODELS.build(json.loads(backbone))
    total, trainable = count_parameters(backbone)
    return trainable, total - count_parameters(backbone.tuner)[0]


@every_config
def test_header_says_what_trains(name, undrawn):
    stated, share, rate = re.search(
        r'\nTrains ([\d,]+) parameters in the backbone \((.+) %\).* '
        r'at a learning rate of (\S+)\. ',
        header(name),
    ).groups()
    config = load(name)
    backbone = config.model.backbone.to_dict()
    if callable(backbone['type']):  # in a config of the new style
        backbone['type'] = f'e3va_mm.{backbone["type"].__name__}'
    # Weights are out of reach, and how the trunk computes does not count.
    del stock_arguments(backbone)['init_cfg']
    tuner = backbone.pop('tuner', {})
    if 'type' in tuner:
        backbone['tuner'] = dict(type=tuner['type'])
    trainable, stock = counts(json.dumps(backbone, sort_keys=True))
    assert f'{trainable:,}' == stated
    assert f'{100 * trainable / stock:.2f}' == share
    assert float(rate) == config.optim_wrapper.optimizer.lr


@every_config
def test_heads_know_the_classes_of_the_data(name):
    config = parsed(name)
    dataset = config.test_dataloader.dataset
    classes = dataset.get('metainfo', {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(config.default_scope) as found:
            classes = found.get(dataset.type).METAINFO['classes']
    if 'language_model' in config.model:
        return  # it reads their names
    known = values(config.model, 'num_classes')
    things, stuff = (
        values(config.model, f'num_{kind}_classes')
        for kind in ('things', 'stuff')
    )
    known += [sum(pair) for pair in zip(things, stuff, strict=True)]
    assert set(known) == {len(classes)}


@pytest.mark.parametrize('name', [p.stem for p in ASSETS.glob('*_e3va_*')])
def test_adapter_files_of_the_package_fit(name):
    adapter = read_adapter(f'e3va_mm://{name}.safetensors')
    config = load(name)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    own = without_trunks(model, model.state_dict())
    assert {k: v.shape for k, v in adapter.tensors.items()} == {
        k: v.shape for k, v in own.items()
    }


@every_config
def test_a_config_is_what_runs(name):
    """It lists its hooks, and reads checkpoints safely."""
    config = parsed(name)
    hooks = [hook.type for hook in config.custom_hooks]
    assert hooks[: len(HOOKS)] == HOOKS
    checkpoint = config.default_hooks.checkpoint
    assert checkpoint.type == 'e3va_mm.AtomicCheckpointHook'
    # Inferencers read a checkpoint before they build what imports us.
    if 'new_style' not in name:  # mmengine heeds no such key there
        assert config.custom_imports == dict(
            imports=['e3va_mm.checkpoint'], allow_failed_imports=False
        )


def without_trunk(name):
    """What a config says about all but its trunk, widths relative to its."""
    config = copy.deepcopy(parsed(name)).to_dict()
    model = config['model']
    width = width_of(model.pop('backbone'))
    for part in ('neck', 'decode_head', 'auxiliary_head'):
        part = model.get(part, {})
        for key in {'in_channels', 'embed_dim'} & set(part):
            part[key] = (torch.tensor(part[key]) / width).tolist()
    # Names for children; where stock configs name weights.
    for key in ('trunk', 'width', 'widths', 'quarters', 'checkpoint_file'):
        config.pop(key, None)
    return config


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family(family):
    """Its weights have the size of its name; all but the trunk is the same."""
    first, *others = (family.format(size) for size in FAMILIES[family])
    for name in (first, *others):
        trunk = next(trunk for trunk in FILES if f'_{trunk}_' in name)
        checkpoint = parsed(name).model.backbone.init_cfg.checkpoint
        assert Path(checkpoint).name == FILES[trunk]
        assert f'-{trunk[-1].upper()} (' in header(name).splitlines()[0]
        assert stock_name(parsed(name).model.backbone).startswith(
            'mmpretrain.'
        ) == ('Needs mmpretrain.' in header(name))
    # The stock configs of BEiT differ in batches and rates.
    if 'beit_{}_ade20k' not in family:
        for name in others:
            assert without_trunk(name) == without_trunk(first)


@pytest.mark.parametrize('trunk', ['vit_b_mae', 'dinov2_b'])
def test_strides_are_those_of_the_maps(trunk):
    """A whole patch of 14 pixels is no power of two."""
    config = load(f'cascade_e3va_{trunk}_coco')
    model = config.model
    anchors = model.rpn_head.anchor_generator.strides
    rois = model.roi_head.bbox_roi_extractor.featmap_strides
    assert rois == model.roi_head.mask_roi_extractor.featmap_strides
    assert rois == anchors[: len(rois)]
    divisor = model.data_preprocessor.pad_size_divisor
    height, width = 2 * divisor, 3 * divisor
    shrink_backbone(model.backbone, image_side(config))
    model.backbone.allow_random_trunk = True
    model.neck.update(in_channels=TINY_VIT['embed_dims'], out_channels=WIDTH)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        backbone, neck = (MODELS.build(model[p]) for p in ('backbone', 'neck'))
    with torch.no_grad():
        maps = neck(backbone(torch.zeros(1, 3, height, width)))
    for stride, found in zip(anchors, maps, strict=True):
        cells = [-(-side // stride) for side in (height, width)]
        assert list(found.shape[-2:]) == cells
        if stride in rois:
            assert [n * stride for n in cells] == [height, width]


@pytest.mark.parametrize('data', ['ade20k', 'voc12'])
def test_segmentors_of_vits_get_images_of_whole_patches(data):
    for size in 'bl':
        name = f'upernet_e3va_dinov2_{size}_{data}'
        config = parsed(name)
        patch = config.model.backbone.patch_size
        preprocessor = config.model.data_preprocessor
        for side, crop in zip(
            preprocessor.size, config.crop_size, strict=True
        ):
            assert side == -(-crop // patch) * patch
        assert preprocessor.test_cfg.size_divisor == patch
        assert f'padded to {preprocessor.size[0]}x' in header(name)
        # BEiT takes images of one size: tests slide a window.
        config = parsed(f'upernet_e3va_beit_{size}_{data}')
        test_cfg = config.model.test_cfg
        assert test_cfg.mode == 'slide'
        assert test_cfg.crop_size == config.crop_size
        assert config.model.backbone.img_size == config.crop_size
        assert config.optim_wrapper.paramwise_cfg == dict(norm_decay_mult=0.0)


@pytest.mark.parametrize('name', ONE_CARD)
def test_one_card_updates_as_the_config_it_comes_from(name):
    config = parsed(name)
    parent = parsed(re.sub(r'_\d+gb', '', name))
    images = parent.auto_scale_lr.base_batch_size
    batch = config.train_dataloader.batch_size
    steps = config.optim_wrapper.accumulative_counts
    assert batch * steps == images
    assert f'{batch} of the {images} images' in header(name)
    assert f'on one card of {name.split("_")[-1][:-2]} GB' in header(name)
    assert config.auto_scale_lr.base_batch_size == batch
    assert config.optim_wrapper.optimizer == parent.optim_wrapper.optimizer
    warm_up, decay = config.param_scheduler
    assert warm_up.end == parent.param_scheduler[0].end * steps
    assert decay.milestones == parent.param_scheduler[1].milestones
    assert config.custom_hooks[:-1] == parent.custom_hooks
    assert config.model.backbone.tuner.preset == 'lean'
