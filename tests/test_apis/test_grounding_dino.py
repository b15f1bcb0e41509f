"""Grounding DINO is tuned, and is at any time what it was before."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import save_file

from e3va_mm.apis import MultiTaskInferencer
from e3va_mm.commands import train
from e3va_mm.errors import ConfigError
from e3va_mm.registry import MODELS
from tests.helpers import randomised
from tests.test_engine.test_hooks.tiny import CLASSES, make_coco
from tests.tiny_bert import SMALL, TINY_SWIN, tiny_bert

CONFIGS = Path(__file__).parents[2] / 'configs'
# Never seen in training.
PROMPT = ['small bird', 'red dog']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('grounding')
    (folder / 'bert').mkdir()
    tiny_bert(folder / 'bert')
    make_coco(folder, 'train')
    make_coco(folder, 'val', 2)
    _make_odvg(folder)
    return folder


def _make_odvg(folder):
    """Phrases of the training images, as MM-Grounding-DINO reads them."""
    content = json.loads((folder / 'train.json').read_text())
    lines = []
    for image, found in zip(
        content['images'], content['annotations'], strict=True
    ):
        name = CLASSES[found['category_id'] - 1]
        x, y, w, h = found['bbox']
        region = dict(bbox=[x, y, x + w, y + h], phrase=name)
        caption = f'a small {name}'
        region['tokens_positive'] = [[8, len(caption)]]
        lines.append(
            dict(
                filename=image['file_name'],
                height=image['height'],
                width=image['width'],
                grounding=dict(caption=caption, regions=[region]),
            )
        )
    text = '\n'.join(map(json.dumps, lines))
    (folder / 'train.jsonl').write_text(text)


def _config(folder, data):
    """Of ours, small; and the stock one with the stock checkpoint."""
    ours = Config.fromfile(
        CONFIGS / f'mm_grounding_dino_e3va_swin_t_{data}.py'
    )
    bert = str(folder / 'bert')
    small = Config(dict(model=ours.model))
    small.merge_from_dict(dict(model=SMALL))
    ours.model = small.model
    ours.model.language_model.name = bert
    ours.model.backbone.update(TINY_SWIN)
    ours.model.bbox_head.contrastive_cfg.max_text_len = 64
    steps = [
        step
        for step in ours.train_dataloader.dataset.pipeline
        if step.type not in ('RandomChoice', 'RandomFlip')
    ]
    resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
    steps.insert(2, resize)
    for step in steps:
        if 'tokenizer_name' in step:
            step['tokenizer_name'] = bert
    train_set = ours.train_dataloader.dataset
    train_set.update(data_root=str(folder), pipeline=steps)
    train_set.ann_file = dict(coco='train.json', odvg='train.jsonl')[data]
    train_set.data_prefix = dict(img='train/')
    train_set.metainfo = dict(classes=CLASSES)
    if data == 'odvg':
        del train_set['metainfo']
    ours.train_dataloader.update(
        batch_size=2, num_workers=0, persistent_workers=False
    )
    load, _, *rest = ours.val_dataloader.dataset.pipeline
    for name in ('val', 'test'):
        loader = ours[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root=str(folder),
            ann_file='val.json',
            data_prefix=dict(img='val/'),
            metainfo=dict(classes=CLASSES),
            pipeline=[load, resize, *rest],
        )
        ours[f'{name}_evaluator'].ann_file = str(folder / 'val.json')
    ours.train_cfg.max_epochs = 1
    ours.optim_wrapper.optimizer.lr = 1e-2
    ours.load_from = str(folder / 'stock.safetensors')
    ours.work_dir = str(folder / data)
    ours.default_hooks.checkpoint.save_best = None
    stock = copy.deepcopy(ours)
    stock.model.backbone = dict(TINY_SWIN, type='SwinTransformer')
    return ours, stock


@pytest.fixture(scope='module')
def stock(folder):
    """The stock config, its checkpoint written."""
    _, stock = _config(folder, 'coco')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = randomised(MODELS.build(copy.deepcopy(stock.model)))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, folder / 'stock.safetensors')
    return stock


@pytest.fixture(scope='module', params=['coco', 'odvg'])
def tuned(request, folder, stock):
    """Config, adapter file and log of a training."""
    ours, _ = _config(folder, request.param)
    path = folder / f'{request.param}.py'
    ours.dump(path)
    assert train.main([str(path)]) == 0
    work = folder / request.param
    (log,) = work.glob('*/*.log')
    return path, work / 'adapter_epoch_1.safetensors', log.read_text()


def _instances(found):
    return found.pred_instances


def test_the_table_says_what_trains(tuned):
    log = tuned[2]
    assert re.search(r'language_model +\| +[\d,]+ +\| +0 \|', log)
    assert re.search(r'backbone \(trunk\) +\| +[\d,]+ +\| +0 \|', log)
    assert re.search(r'backbone \(side path\) +\| +[\d,]+ +\| +[\d,]+ ', log)


def test_off_it_finds_what_the_stock_model_finds(tuned, folder, stock):
    from mmdet.apis import DetInferencer

    config, adapter, _ = tuned
    images = sorted(str(path) for path in (folder / 'val').iterdir())
    expected = DetInferencer(
        copy.deepcopy(stock), str(folder / 'stock.safetensors'), device='cpu'
    )(
        images,
        texts='. '.join(PROMPT),
        custom_entities=True,
        return_datasamples=True,
    )['predictions']
    infer = MultiTaskInferencer(dict(boxes=(str(config), str(adapter))), 'cpu')

    def find(**options):
        found = infer(images, return_datasamples=True, **options)
        return found['boxes']['predictions']

    before = find(text=PROMPT)
    untuned = find(text=PROMPT, tuned=False)
    after = find(text=' . '.join(PROMPT))
    for one, two, other, theirs in zip(
        before, after, untuned, expected, strict=True
    ):
        one, two, other, theirs = map(_instances, (one, two, other, theirs))
        assert len(theirs) == 5
        assert set(theirs.label_names) <= set(PROMPT)
        for key in ('scores', 'bboxes', 'labels'):
            assert torch.equal(other[key], theirs[key])
            assert torch.equal(one[key], two[key])
        assert not torch.equal(one.scores, other.scores)
    if config.stem == 'odvg':  # phrases are no classes
        return
    # Without words it looks for the classes that it was tuned on.
    names = {
        name for each in find() for name in each.pred_instances.label_names
    }
    assert names <= set(CLASSES)


def test_a_config_that_does_not_say_where_it_began(tuned, folder):
    config, adapter, _ = tuned
    config = Config.fromfile(config)
    config.load_from = None
    infer = MultiTaskInferencer(dict(boxes=(config, str(adapter))), 'cpu')
    image = str(folder / 'val' / '000.jpg')
    with pytest.raises(ConfigError, match='Expected `load_from`'):
        infer(image, tuned=False)
