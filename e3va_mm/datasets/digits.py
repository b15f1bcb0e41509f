"""Digits in the wild: a small data set made of real material.

Handwritten digits scanned from paper (scikit-learn, 1797 samples of 8x8
pixels) are enlarged, rotated, sheared, coloured and blended into photographs
that the wheels of scikit-image and scikit-learn carry. Nothing is downloaded.

The material is divided first: a digit sample and a rectangle of a photograph
belong to exactly one of the splits ``pretrain``, ``train``, ``val`` and
``test``. Every image is a function of (seed, split, index) alone, so its bytes
do not depend on process or order.

The same images are laid out as COCO, PASCAL VOC and ADE20K::

    data/digits/
    |-- digits.json                         settings; marks the folder as ours
    |-- coco/{train,val,test}/*.jpg
    |-- coco/annotations/instances_{train,val,test}.json
    |-- VOC2007/{Annotations,JPEGImages,SegmentationClass}/
    |-- VOC2007/ImageSets/{Main,Segmentation}/{train,val,trainval,test}.txt
    `-- ade20k/{images,annotations}/{training,validation,test}/

Semantic maps are 8-bit grey PNG files: 0 is background, digit ``d`` is
``d + 1``. With ``reduce_zero_label=False`` (``BaseSegDataset``,
``PascalVOCDataset``) that is eleven classes, the background first; with
``reduce_zero_label=True`` (``ADE20KDataset``) the background is ignored like
the "other" of ADE20K and digit ``d`` is class ``d``.
"""

import json
import os
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from e3va_mm.errors import ConfigError, DataError

CLASSES = tuple('0123456789')
SPLITS = ('pretrain', 'train', 'val', 'test')
_PD, _BY = 'public domain', 'CC BY 2.0'
#: Name to package, path in it, licence and credit.
PHOTOGRAPHS = {
    'astronaut': (
        'skimage',
        'data/astronaut.png',
        _PD,
        'NASA (Eileen Collins)',
    ),
    'chelsea': ('skimage', 'data/chelsea.png', 'CC0', 'Stefan van der Walt'),
    'coffee': (
        *('skimage', 'data/coffee.png', 'CC0'),
        'Rachel Michetti, Pikolo Espresso Bar',
    ),
    'rocket': ('skimage', 'data/rocket.jpg', _PD, 'SpaceX'),
    'china': ('sklearn', 'datasets/images/china.jpg', _BY, 'danielbuechele'),
    'flower': ('sklearn', 'datasets/images/flower.jpg', _BY, 'vultilion'),
}
# Shares of the digit samples of each class, in the order of SPLITS.
_SHARES = (0.4, 0.3, 0.15, 0.15)
# Beyond about 30 degrees a 6 and a 9 begin to look alike.
_MAX_ROTATION = 25.0
# A digit that would leave less than this share of another is not pasted.
_MIN_VISIBLE = 0.7
# Pixels of a glyph: each of the 8x8 values becomes 8x8, with a frame of 2.
_CELL, _FRAME = 8, 2
_MARKER = 'digits.json'
_FORMAT = 1
_ADE_FOLDERS = dict(train='training', val='validation', test='test')
_VOC_XML = (
    '<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>'
    '<size><width>{size}</width><height>{size}</height><depth>3</depth></size>'
    '<segmented>1</segmented>{objects}</annotation>'
)
# From 1, the last pixel included.
_VOC_OBJECT = (
    '<object><name>{name}</name><difficult>0</difficult><bndbox>'
    '<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>'
    '</bndbox></object>'
)


class Scene(NamedTuple):
    """One image and what is in it.

    Attributes:
        image: uint8 (size, size, 3), RGB.
        labels: int64 (n,), the digits.
        masks: bool (n, size, size), the visible pixels of each digit; they
            do not overlap.
        samples: int64 (n,), indices into ``sklearn.datasets.load_digits()``.
        photograph: Key of :data:`PHOTOGRAPHS`.
        crop: (x0, y0, x1, y1) of the background in the photograph.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    samples: np.ndarray
    photograph: str
    crop: tuple


@cache
def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16.0, digits.target


@cache
def _photograph(name):
    package, path, *_ = PHOTOGRAPHS[name]
    path = Path(str(files(package))) / path
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(
            f'Expected the photograph {path} in the installed package '
            f'"{package}", but it cannot be read. Install scikit-image and '
            'scikit-learn again.'
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@cache
def digit_partition():
    """Divide the digit samples among the splits, class by class.

    Returns:
        dict[str, np.ndarray]: For each of :data:`SPLITS` the sorted indices
        into ``sklearn.datasets.load_digits()``. Every sample is in one split.
    """
    labels = _digits()[1]
    rng = np.random.default_rng(1998)
    parts = {split: [] for split in SPLITS}
    for digit in range(10):
        samples = rng.permutation(np.flatnonzero(labels == digit))
        cuts = np.round(np.cumsum(_SHARES[:-1]) * len(samples)).astype(int)
        for split, part in zip(SPLITS, np.split(samples, cuts), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(p)) for split, p in parts.items()}


def photograph_region(split, name):
    """The half-open rectangle (x0, y0, x1, y1) of a photograph for a split.

    Each is a quarter. Which one changes from photograph to photograph, so
    that no split has, say, all the skies.
    """
    height, width = (n // 2 for n in _photograph(name).shape[:2])
    quarter = [*PHOTOGRAPHS].index(name) + SPLITS.index(split)
    row, column = divmod(quarter % 4, 2)
    x0, y0 = column * width, row * height
    return x0, y0, x0 + width, y0 + height


@cache
def _glyph(sample):
    """Enlarge a sample smoothly to its share of ink, float32 (96, 96)."""
    pixels = np.pad(_digits()[0][sample].astype(np.float32), _FRAME)
    side = len(pixels) * _CELL
    ink = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip((cv2.GaussianBlur(ink, (0, 0), 2) - 0.2) / 0.4, 0, 1)


def _background(rng, split, size):
    """Crop, enlarge and vary a piece of the split's photographs."""
    name = list(PHOTOGRAPHS)[rng.integers(len(PHOTOGRAPHS))]
    x0, y0, x1, y1 = photograph_region(split, name)
    side = int(min(x1 - x0, y1 - y0) * rng.uniform(0.6, 1))
    x0 += int(rng.integers(x1 - x0 - side + 1))
    y0 += int(rng.integers(y1 - y0 - side + 1))
    crop = _photograph(name)[y0 : y0 + side, x0 : x0 + side]
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    image = cv2.resize(crop, (size, size), interpolation=method)
    image = image.astype(np.float32) / 255
    if rng.random() < 0.5:
        image = image[:, ::-1]
    gain = rng.uniform(0.6, 1.1) * rng.uniform(0.9, 1.1, 3)
    image = np.clip(image * gain.astype(np.float32), 0, 1)
    return image, name, (x0, y0, x0 + side, y0 + side)


def _place(rng, sample, size, digit_size):
    """Draw position and shape of a digit; its ink on the image."""
    height = np.exp(rng.uniform(*np.log(digit_size)))
    angle = np.deg2rad(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    aspect, shear = rng.uniform(0.85, 1.2), rng.uniform(-0.15, 0.15)
    cos, sin = np.cos(angle), np.sin(angle)
    shape = np.array([[aspect, shear], [0, 1]])
    matrix = np.array([[cos, -sin], [sin, cos]]) @ shape * height / 64
    margin = min(0.6 * height, size / 2)
    centre = rng.uniform(margin, size - margin, 2)
    middle = (8 + 2 * _FRAME) * _CELL / 2 - 0.5
    matrix = np.column_stack([matrix, centre - matrix @ [middle, middle]])
    return cv2.warpAffine(
        _glyph(sample), matrix, (size, size), flags=cv2.INTER_LINEAR
    )


def _colour(rng, under):
    """Draw a colour that is visible on the pixels under the ink."""
    luma = np.array([0.299, 0.587, 0.114])
    level = float(under.mean(0) @ luma)
    contrast = rng.uniform(0.3, 0.75) * rng.choice([-1, 1])
    if not 0 <= level + contrast <= 1:
        contrast = -contrast
    tint = rng.uniform(-0.3, 0.3, 3)
    return np.clip(level + contrast + tint - tint @ luma, 0, 1)


def make_scene(
    split,
    index,
    size=224,
    seed=0,
    objects=(2, 6),
    digit_size=(24, 72),
    samples=None,
):
    """Make one image: a pure function of its arguments.

    Args:
        split (str): One of :data:`SPLITS`.
        index (int): Number of the image within the split.
        size (int): Height and width in pixels. Defaults to 224.
        seed (int): Defaults to 0.
        objects (tuple[int, int]): Fewest and most digits that are tried; a
            digit that would hide too much of another is left out. Defaults
            to (2, 6).
        digit_size (tuple[float, float]): Least and greatest height of a
            digit in pixels. Defaults to (24, 72).
        samples (Sequence[int], optional): Digit samples to choose from.
            Defaults to all of the split.

    Returns:
        Scene: At least one digit.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    if samples is None:
        samples = digit_partition()[split]
    image, name, crop = _background(rng, split, size)
    chosen, masks, areas = [], [], []
    for _ in range(rng.integers(objects[0], objects[1], endpoint=True)):
        sample = int(samples[rng.integers(len(samples))])
        ink = _place(rng, sample, size, digit_size)
        cover = (ink * rng.uniform(0.8, 1)).astype(np.float32)[..., None]
        mask = ink > 0.5
        colour = _colour(rng, image[mask]).astype(np.float32)
        rest = [m & ~mask for m in masks]
        visible = [r.sum() for r in rest]
        if np.any(np.array(visible) < _MIN_VISIBLE * np.array(areas)):
            continue
        chosen.append(sample)
        masks = [*rest, mask]
        areas.append(mask.sum())
        image = image * (1 - cover) + cover * colour
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * np.float32(rng.uniform(0, 0.02))
    image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    labels = _digits()[1][chosen]
    return Scene(image, labels, np.stack(masks), np.array(chosen), name, crop)


def mask_box(mask):
    """Tight box (x0, y0, x1, y1) of a mask, half-open.

    Args:
        mask (np.ndarray): bool (h, w), not empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return int(x0), int(y0), int(x1), int(y1)


def build_dataset(out, train=400, val=200, test=200, size=224, seed=0):
    """Build the data set in all three layouts, or find it complete.

    The set is made in a sibling folder and renamed, so ``out`` is either
    absent or complete. A folder that holds another or a damaged set of ours
    is replaced.

    Args:
        out (str | Path): The folder to make.
        train (int): Images of the split. Defaults to 400.
        val (int): Defaults to 200.
        test (int): Defaults to 200.
        size (int): Height and width of the images. Defaults to 224.
        seed (int): Defaults to 0.

    Returns:
        bool: True if the set was built, False if it was there already.

    Raises:
        ConfigError: If a number of images is below 1, ``size`` is below
            96 or ``seed`` is negative.
        DataError: If ``out`` is something that this function did not make.
    """
    counts = dict(train=train, val=val, test=test)
    if min(counts.values()) < 1 or size < 96 or seed < 0:
        raise ConfigError(
            'Expected at least 1 image in each split, size of at least 96 '
            f'and seed of at least 0, but got {counts}, size {size} and seed '
            f'{seed}. Change these arguments.'
        )
    settings = dict(format=_FORMAT, **counts, size=size, seed=seed)
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / _MARKER).is_file():
            raise DataError(
                f'Expected {out} to be absent, empty, or a digits data set '
                f'made by this program (it would hold {_MARKER}), but it is '
                'something else and is left alone. Choose another folder, or '
                'move this one away.'
            )
        if _is_complete(out, settings):
            return False
    partial = out.with_name(f'.{out.name}.part')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        lists = {
            split: _write_split(partial, split, count, size, seed)
            for split, count in counts.items()
        }
        lists['trainval'] = lists['train'] + lists['val']
        for part, stems in lists.items():
            for task in ('Main', 'Segmentation'):
                path = f'VOC2007/ImageSets/{task}/{part}.txt'
                _write(partial, '\n'.join(stems).encode() + b'\n', path)
        settings['files'] = _count_files(partial)
        (partial / _MARKER).write_text(json.dumps(settings, indent=2) + '\n')
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _count_files(folder):
    return sum(path.is_file() for path in folder.rglob('*/*'))


def _is_complete(out, settings):
    try:
        found = json.loads((out / _MARKER).read_text())
    except ValueError:
        return False
    return found == {**settings, 'files': _count_files(out)}


def _write(root, content, *paths):
    """Write a file once; the other paths are hard links where possible."""
    first, *others = [root / path for path in paths]
    for path in (first, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
    first.write_bytes(content)
    for path in others:
        try:
            os.link(first, path)
        except OSError:
            shutil.copyfile(first, path)


def _write_split(root, split, count, size, seed):
    """Write images, maps and annotations; the names of the images."""
    from pycocotools import mask as coco_mask

    scale, ade = size / 224, _ADE_FOLDERS[split]
    images, annotations, voc = [], [], 'VOC2007'
    licences = sorted({licence for *_, licence, _ in PHOTOGRAPHS.values()})
    for index in range(count):
        stem = f'{split}_{index:06d}'
        scene = make_scene(
            split, index, size, seed, digit_size=(24 * scale, 72 * scale)
        )
        quality = (cv2.IMWRITE_JPEG_QUALITY, 92)
        _write(
            root,
            cv2.imencode('.jpg', scene.image[..., ::-1], quality)[1].tobytes(),
            f'coco/{split}/{stem}.jpg',
            f'{voc}/JPEGImages/{stem}.jpg',
            f'ade20k/images/{ade}/{stem}.jpg',
        )
        _write(
            root,
            cv2.imencode('.png', semantic_map(scene))[1].tobytes(),
            f'{voc}/SegmentationClass/{stem}.png',
            f'ade20k/annotations/{ade}/{stem}.png',
        )
        *_, licence, credit = PHOTOGRAPHS[scene.photograph]
        images.append(
            dict(
                id=index + 1,
                file_name=f'{stem}.jpg',
                width=size,
                height=size,
                license=licences.index(licence) + 1,
                photograph=scene.photograph,
                credit=credit,
            )
        )
        objects = ''
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            x0, y0, x1, y1 = mask_box(mask)
            objects += _VOC_OBJECT.format(
                x0 + 1, y0 + 1, x1, y1, name=CLASSES[label]
            )
            # Run lengths, because a polygon has no holes.
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            rle['counts'] = rle['counts'].decode('ascii')
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=int(label) + 1,
                    iscrowd=0,
                    bbox=[x0, y0, x1 - x0, y1 - y0],
                    area=int(mask.sum()),
                    segmentation=rle,
                )
            )
        xml = _VOC_XML.format(name=stem, size=size, objects=objects)
        _write(root, xml.encode(), f'{voc}/Annotations/{stem}.xml')
    categories = [
        dict(id=i, name=name, supercategory='digit')
        for i, name in enumerate(CLASSES, start=1)
    ]
    content = dict(
        info=dict(description='Digits in the wild', split=split, seed=seed),
        licenses=[dict(id=i, name=n) for i, n in enumerate(licences, start=1)],
        categories=categories,
        images=images,
        annotations=annotations,
    )
    path = f'coco/annotations/instances_{split}.json'
    _write(root, json.dumps(content).encode(), path)
    return [image['file_name'][:-4] for image in images]


def semantic_map(scene):
    """Background 0 and digit ``d`` as ``d + 1``, uint8 (size, size)."""
    semantic = np.zeros(scene.image.shape[:2], np.uint8)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        semantic[mask] = label + 1
    return semantic
