"""Tasks on one trunk give what the frameworks give of each alone."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from e3va_mm.apis import MultiTaskInferencer
from e3va_mm.apis.images import Images
from e3va_mm.apis.multi_task_inferencer import run_pipelines
from e3va_mm.backbones import TunedBackbone
from e3va_mm.errors import CheckpointError, ConfigError, DataError
from e3va_mm.registry import MODELS
from tests.test_apis.tuned import tuned_apart

pytest.importorskip('mmpretrain')
NAMES = ['boxes', 'parts', 'kinds']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('tuned')


@pytest.fixture(scope='module')
def tuned(folder):
    return tuned_apart(folder)


@pytest.fixture(scope='module')
def images(tuned, folder):
    return sorted(str(path) for path in (folder / 'images').iterdir())


@pytest.fixture(scope='module')
def alone(tuned, images):
    """What the stock models give, each with its own trunk."""
    from mmdet.apis import inference_detector, init_detector
    from mmpretrain.apis import ImageClassificationInferencer
    from mmseg.apis import MMSegInferencer

    # Each in its turn: they look names up in the scope of now.
    detector = init_detector(*tuned['boxes'], device='cpu')
    boxes = inference_detector(detector, images)
    segmentor = MMSegInferencer(*tuned['parts'], device='cpu')
    found = list(segmentor.preprocess(images))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        classifier = ImageClassificationInferencer(
            *tuned['kinds'], device='cpu'
        )
        kinds = classifier(images, return_datasamples=True)
    return dict(
        boxes=boxes,
        parts=[each for data in found for each in segmentor.forward(data)],
        kinds=kinds,
    )


def assert_same(found, alone):
    for ours, theirs in zip(found['boxes'], alone['boxes'], strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(theirs) == 5
        assert torch.equal(ours.labels, theirs.labels)
        for key in ('scores', 'bboxes'):
            torch.testing.assert_close(
                ours[key], theirs[key], rtol=1e-5, atol=1e-5
            )
    for key, name in (('seg_logits', 'parts'), ('pred_score', 'kinds')):
        for ours, theirs in zip(found[name], alone[name], strict=True):
            ours, theirs = ours.get(key), theirs.get(key)
            if name == 'parts':
                ours, theirs = ours.data, theirs.data
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def predictions(found):
    return {name: found[name]['predictions'] for name in found}


@pytest.mark.parametrize('batch_size', [1, 3])
def test_one_pass_gives_what_three_give(tuned, alone, images, batch_size):
    infer = MultiTaskInferencer(tuned, 'cpu')
    found = infer(images, batch_size, return_datasamples=True)
    assert_same(predictions(found), alone)
    assert infer.passes == len(images)
    # Told apart: they are not all the same side path.
    assert len({float(each.pred_score.max()) for each in alone['kinds']}) == 4


def test_the_trunk_is_in_memory_once(tuned):
    infer = MultiTaskInferencer(tuned, 'cpu')
    storages = [
        {
            value.data_ptr()
            for _, child in infer.tasks[name].backbone.trunk_children()
            for value in child.parameters()
        }
        for name in NAMES
    ]
    assert storages[0] == storages[1] == storages[2]
    assert infer.on_trunk_of('boxes') == ['parts', 'kinds']


def test_no_trunk_is_read_twice(tuned, monkeypatch):
    sources = []
    reads = TunedBackbone._reads
    monkeypatch.setattr(
        TunedBackbone,
        '_reads',
        lambda self, source: sources.append(source) or reads(self, source),
    )
    MultiTaskInferencer(tuned, 'cpu')
    assert len(sources) == 1


def test_tasks_come_and_go(tuned, alone, images):
    infer = MultiTaskInferencer(device='cpu')
    with pytest.raises(ConfigError, match='at least one task'):
        infer(images)
    infer.add('kinds', *tuned['kinds'])
    infer.add('boxes', *tuned['boxes'])
    infer.remove('kinds')  # whose trunk the other shares
    infer.add('parts', *tuned['parts'])
    assert infer.on_trunk_of('parts') == ['boxes']
    infer.add('kinds', *tuned['kinds'])
    found = infer(images, return_datasamples=True)
    assert list(found) == ['boxes', 'parts', 'kinds']
    assert_same(predictions(found), alone)


def test_plain_results_and_drawings(tuned, alone, images):
    found = MultiTaskInferencer(tuned, 'cpu')(images[0], return_vis=True)
    (boxes,), (parts,), (kinds,) = predictions(found).values()
    assert boxes['labels'] == alone['boxes'][0].pred_instances.labels.tolist()
    assert np.array_equal(parts, alone['parts'][0].pred_sem_seg.data[0])
    assert kinds['pred_class'] in ('cat', 'dog', 'bird')
    for name in NAMES:
        (drawn,) = found[name]['visualization']
        assert drawn.shape[2] == 3 and drawn.std() > 0


def test_another_preparation_takes_another_pass(tuned, alone, images):
    larger = Config.fromfile(tuned['boxes'].config)
    larger.test_dataloader.dataset.pipeline[1].scale = (96, 96)
    infer = MultiTaskInferencer(tuned, 'cpu')
    infer.add('larger', larger, tuned['boxes'].adapter)
    assert infer.on_trunk_of('larger') == NAMES
    found = infer(images, return_datasamples=True)
    assert infer.passes == 2 * len(images)
    found.pop('larger')
    assert_same(predictions(found), alone)


def test_a_segmentor_that_slides(tmp_path, tuned, images):
    sliding = tuned_apart(tmp_path, mode='slide')['parts']
    infer = MultiTaskInferencer(dict(parts=sliding), 'cpu')
    (alone,) = infer(images[0], return_datasamples=True)['parts'][
        'predictions'
    ]
    infer.add('boxes', *tuned['boxes'])
    assert infer.on_trunk_of('parts') == ['boxes']
    (found,) = infer(images[0], return_datasamples=True)['parts'][
        'predictions'
    ]
    assert torch.equal(found.seg_logits.data, alone.seg_logits.data)


def test_another_trunk_is_not_shared(tmp_path, tuned, alone, images):
    from safetensors.torch import save_file

    from tests.helpers import build_stock, randomised

    trunk = tmp_path / 'another.safetensors'
    save_file(randomised(build_stock(), seed=1).state_dict(), trunk)
    others = tuned_apart(tmp_path, trunk=trunk)
    infer = MultiTaskInferencer(tuned, 'cpu')
    infer.add('other', *others['boxes'])
    assert infer.on_trunk_of('other') == []
    found = infer(images, return_datasamples=True)
    own = MultiTaskInferencer(dict(other=others['boxes']), 'cpu')
    own = own(images, return_datasamples=True)['other']['predictions']
    for ours, theirs in zip(
        found.pop('other')['predictions'], own, strict=True
    ):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert torch.equal(ours.scores, theirs.scores)
    assert_same(predictions(found), alone)


def test_a_task_that_comes_while_others_run(tuned, images):
    infer = MultiTaskInferencer(dict(boxes=tuned['boxes']), 'cpu')
    run = infer.run(Images(images))
    next(run)
    infer.add('parts', *tuned['parts'])
    assert all(list(found.results) == ['boxes'] for found in run)


def test_other_options_of_the_trunk_are_not_shared(tmp_path, tuned):
    others = tuned_apart(tmp_path, trunk_compute='bf16')
    infer = MultiTaskInferencer(dict(boxes=tuned['boxes']), 'cpu')
    infer.add('other', *others['parts'])
    assert infer.on_trunk_of('other') == []


def test_images_of_several_sizes(tuned, images):
    infer = MultiTaskInferencer(dict(boxes=tuned['boxes']), 'cpu')
    random = np.random.default_rng(0)
    inputs = [
        random.integers(0, 256, (*size, 3), dtype=np.uint8)
        for size in ((48, 64), (48, 64), (64, 48))
    ]
    together = infer(inputs, batch_size=3)['boxes']['predictions']
    apart = [infer(each)['boxes']['predictions'][0] for each in inputs]
    for ours, theirs in zip(together, apart, strict=True):
        assert np.allclose(ours['bboxes'], theirs['bboxes'], atol=1e-4)


def stock_checkpoint(config, path):
    """A checkpoint of a model without a side path."""
    config = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config.model)
    meta = dict(dataset_meta=dict(classes=('cat', 'dog', 'bird')))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'test_dataloader.dataset.pipeline.0.type': 'Resize'}, 'with Resize'),
        (dict(test_dataloader=None), 'begins with nothing'),
        (dict(default_scope='mmpose'), "'mmpretrain'.*but got 'mmpose'"),
    ],
)
def test_a_config_that_cannot_be_used(tuned, changes, message):
    config = Config.fromfile(tuned['boxes'].config)
    config.merge_from_dict(changes)
    with pytest.raises(ConfigError, match=message):
        MultiTaskInferencer().add('a', config, 'none')


def test_what_is_refused(tuned, folder, tmp_path):
    stock = str(folder / 'detection.py')
    stock_checkpoint(stock, tmp_path / 'stock.pth')
    infer = MultiTaskInferencer(dict(boxes=tuned['boxes']), 'cpu')
    config, adapter = tuned['parts']
    for arguments, error, message in (
        (('boxes', config, adapter), ConfigError, 'a new name of letters'),
        (('a/b', config, adapter), ConfigError, 'letters, digits'),
        (('b', 'none.py', adapter), ConfigError, 'no such config file'),
        (('b', config, 'none.pth'), CheckpointError, 'no such checkpoint'),
        (('b', stock, adapter), CheckpointError, '166 missing in the file'),
        (
            ('b', stock, str(tmp_path / 'stock.pth')),
            ConfigError,
            "'b': expected a model with one backbone that has a side path",
        ),
    ):
        with pytest.raises(error, match=message):
            infer.add(*arguments)
    assert list(infer.tasks) == ['boxes']
    with pytest.raises(ConfigError, match='`batch_size` from 1 on'):
        infer(str(folder / 'images'), batch_size=0)
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'none')
    with pytest.raises(DataError, match='broken.jpg is not a whole image'):
        infer(str(broken))


class Count:
    """Adds a number in place, and counts."""

    calls = 0

    def __init__(self, number):
        self.number = number

    def __call__(self, found):
        type(self).calls += 1
        found['img'] += self.number
        return found


def test_equal_beginnings_of_pipelines_run_once():
    Count.calls = 0
    image = dict(img=np.zeros((2, 2), int))
    found = run_pipelines(
        dict(
            a=[Count(1), Count(2), Count(3)],
            b=[Count(1), Count(2), Count(3)],
            c=[Count(1), Count(5)],
            d=[],
        ),
        image,
    )
    assert Count.calls == 4
    assert {n: each['img'].max() for n, each in found.items()} == dict(
        a=6, b=6, c=6, d=0
    )
    assert not image['img'].any()
    found['a']['img'][:] = 9
    assert found['b']['img'].max() == 6
