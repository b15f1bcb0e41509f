"""Digits in the wild: a small data set made of real material.

Handwritten digits scanned from paper (scikit-learn, 1797 samples of 8x8
pixels) are enlarged, rotated, sheared, coloured and blended into photographs
that the wheels of scikit-image and scikit-learn carry. Nothing is downloaded.

The material is divided before any picture is made: a digit sample and a
rectangle of a photograph belong to exactly one of the splits ``pretrain``,
``train``, ``val`` and ``test`` (:func:`digit_partition`,
:func:`photograph_regions`). Every picture is a function of (seed, split,
index) alone, so the bytes do not depend on process or order.

The same pictures are laid out as COCO, PASCAL VOC and ADE20K::

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
import tempfile
import time
import xml.etree.ElementTree as ET
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from e3va_mm.errors import ConfigError, DataError

CLASSES = tuple('0123456789')
SPLITS = ('pretrain', 'train', 'val', 'test')


class Photograph(NamedTuple):
    """A photograph inside an installed wheel, and whom it belongs to."""

    package: str
    path: str
    licence: str
    credit: str


PHOTOGRAPHS = {
    'astronaut': Photograph(
        'skimage',
        'data/astronaut.png',
        'public domain',
        'NASA (Eileen Collins)',
    ),
    'chelsea': Photograph(
        'skimage', 'data/chelsea.png', 'CC0', 'Stefan van der Walt'
    ),
    'coffee': Photograph(
        'skimage',
        'data/coffee.png',
        'CC0',
        'Rachel Michetti, Pikolo Espresso Bar',
    ),
    'rocket': Photograph(
        'skimage', 'data/rocket.jpg', 'public domain', 'SpaceX'
    ),
    'china': Photograph(
        'sklearn', 'datasets/images/china.jpg', 'CC BY 2.0', 'danielbuechele'
    ),
    'flower': Photograph(
        'sklearn', 'datasets/images/flower.jpg', 'CC BY 2.0', 'vultilion'
    ),
}

# Shares of the digit samples of each class, in the order of SPLITS.
_SHARES = (0.4, 0.3, 0.15, 0.15)
# Beyond about 30 degrees a 6 and a 9 begin to look alike.
_MAX_ROTATION = 25.0
# A digit that would leave less than this share of another visible is not
# pasted.
_MIN_VISIBLE = 0.7
# Pixels of a glyph: each of the 8x8 values becomes 8x8, with a frame of 2.
_CELL, _FRAME = 8, 2

_MARKER = 'digits.json'
_FORMAT = 1
_ADE_FOLDERS = dict(train='training', val='validation', test='test')


class Scene(NamedTuple):
    """One picture and what is in it.

    Attributes:
        image: uint8 (size, size, 3), RGB.
        labels: int64 (n,), the digits.
        masks: bool (n, size, size), the visible pixels of each digit; they
            do not overlap.
        samples: int64 (n,), indices of the digits in
            ``sklearn.datasets.load_digits()``.
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
    photo = PHOTOGRAPHS[name]
    path = Path(str(files(photo.package))) / photo.path
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(
            f'Expected the photograph {path} in the installed package '
            f'"{photo.package}", but it cannot be read. Install '
            'scikit-image and scikit-learn again.'
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


@cache
def photograph_regions():
    """Divide every photograph into four rectangles, one for each split.

    Which quarter a split gets changes from photograph to photograph, so that
    no split has, say, all the skies.

    Returns:
        dict[str, dict[str, tuple]]: For each of :data:`SPLITS` and each of
        :data:`PHOTOGRAPHS` the half-open rectangle (x0, y0, x1, y1) in
        pixels.
    """
    regions = {split: {} for split in SPLITS}
    for i, name in enumerate(PHOTOGRAPHS):
        height, width = _photograph(name).shape[:2]
        for j, split in enumerate(SPLITS):
            row, column = divmod((i + j) % 4, 2)
            regions[split][name] = (
                column * (width // 2),
                row * (height // 2),
                (column + 1) * (width // 2),
                (row + 1) * (height // 2),
            )
    return regions


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
    x0, y0, x1, y1 = photograph_regions()[split][name]
    limit = min(x1 - x0, y1 - y0)
    side = int(limit * rng.uniform(0.6, 1))
    x0 += int(rng.integers(x1 - x0 - side + 1))
    y0 += int(rng.integers(y1 - y0 - side + 1))
    crop = _photograph(name)[y0 : y0 + side, x0 : x0 + side]
    image = cv2.resize(
        crop,
        (size, size),
        interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC,
    )
    image = image.astype(np.float32) / 255
    if rng.random() < 0.5:
        image = image[:, ::-1]
    gain = rng.uniform(0.6, 1.1) * rng.uniform(0.9, 1.1, 3)
    image = np.clip(image * gain.astype(np.float32), 0, 1)
    return image, name, (x0, y0, x0 + side, y0 + side)


def _place(rng, sample, size, digit_size):
    """Draw position and shape of a digit; its ink on the picture."""
    height = np.exp(rng.uniform(*np.log(digit_size)))
    angle = np.deg2rad(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    aspect, shear = rng.uniform(0.85, 1.2), rng.uniform(-0.15, 0.15)
    scale = height / (8 * _CELL)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = (
        np.array([[cos, -sin], [sin, cos]])
        @ np.array([[aspect, shear], [0, 1]])
        * scale
    )
    margin = min(0.6 * height, size / 2)
    centre = rng.uniform(margin, size - margin, 2)
    middle = (8 + 2 * _FRAME) * _CELL / 2 - 0.5
    offset = centre - matrix @ [middle, middle]
    return cv2.warpAffine(
        _glyph(sample),
        np.column_stack([matrix, offset]),
        (size, size),
        flags=cv2.INTER_LINEAR,
    )


def _colour(rng, under):
    """Draw a colour that is visible on the pixels under the ink."""
    luma = np.array([0.299, 0.587, 0.114])
    level = float(under.mean(0) @ luma)
    contrast = rng.uniform(0.3, 0.75) * rng.choice([-1, 1])
    if not 0 <= level + contrast <= 1:
        contrast = -contrast
    tint = rng.uniform(-0.3, 0.3, 3)
    colour = level + contrast + tint - tint @ luma
    return np.clip(colour, 0, 1).astype(np.float32)


def make_scene(
    split,
    index,
    size=224,
    seed=0,
    objects=(2, 6),
    digit_size=(24, 72),
    samples=None,
):
    """Make one picture: a pure function of its arguments.

    Args:
        split (str): One of :data:`SPLITS`: whose digit samples and regions
            of photographs are used.
        index (int): Number of the picture within the split.
        size (int): Height and width in pixels. Defaults to 224.
        seed (int): Defaults to 0.
        objects (tuple[int, int]): Fewest and most digits that are tried; a
            digit that would hide too much of another is left out. Defaults
            to (2, 6).
        digit_size (tuple[float, float]): Least and greatest height of a
            digit in pixels, drawn on a logarithmic scale. Defaults to
            (24, 72).
        samples (Sequence[int], optional): Use these digit samples only.
            Defaults to all samples of the split.

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
        colour = _colour(rng, image[mask])
        rest = [m & ~mask for m in masks]
        if any(
            r.sum() < _MIN_VISIBLE * a
            for r, a in zip(rest, areas, strict=True)
        ):
            continue
        chosen.append(sample)
        masks = [*rest, mask]
        areas.append(mask.sum())
        image = image * (1 - cover) + cover * colour
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * np.float32(rng.uniform(0, 0.02))
    image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    chosen = np.array(chosen)
    return Scene(
        image, _digits()[1][chosen], np.stack(masks), chosen, name, crop
    )


def mask_box(mask):
    """Tight box of a mask.

    Args:
        mask (np.ndarray): bool (h, w), not empty.

    Returns:
        tuple[int, int, int, int]: (x0, y0, x1, y1) in pixels, half-open.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        int(columns[0]),
        int(rows[0]),
        int(columns[-1]) + 1,
        int(rows[-1]) + 1,
    )


def build_dataset(out, train=400, val=200, test=200, size=224, seed=0):
    """Build the data set in all three layouts, or find it complete.

    The set is made in a sibling folder and renamed, so ``out`` is either
    absent or complete. A folder that holds another or a damaged set of ours
    is replaced.

    Args:
        out (str | Path): The folder to make.
        train (int): Pictures of the split. Defaults to 400.
        val (int): Defaults to 200.
        test (int): Defaults to 200.
        size (int): Height and width of the pictures. Defaults to 224.
        seed (int): Defaults to 0.

    Returns:
        bool: True if the set was built, False if it was there already.

    Raises:
        ConfigError: If a number of pictures is below 1, ``size`` is below
            96 or ``seed`` is negative.
        DataError: If ``out`` is something that this function did not make.
    """
    counts = dict(train=train, val=val, test=test)
    if min(counts.values()) < 1 or size < 96 or seed < 0:
        raise ConfigError(
            'Expected at least 1 picture in each split, size of at least 96 '
            f'and seed of at least 0, but got {counts}, size {size} and seed '
            f'{seed}. Change these arguments.'
        )
    settings = dict(format=_FORMAT, **counts, size=size, seed=seed)
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    if _is_complete(out, settings):
        return False
    partial = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    try:
        partial.chmod(0o755)
        for split, count in counts.items():
            _write_split(partial, split, count, size, seed)
        _write_lists(partial, counts)
        (partial / _MARKER).write_text(json.dumps(settings, indent=2) + '\n')
        replaced = partial.with_name(f'{partial.name}.old')
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _remove_abandoned(out):
    """Remove what killed builds left; a live one takes well under an hour."""
    for left in out.parent.glob(f'.{out.name}.*'):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)


def _is_complete(out, settings):
    """Whether ``out`` holds this very set; False if it may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / _MARKER
    if not marker.is_file():
        raise DataError(
            f'Expected {out} to be absent, empty, or a digits data set made '
            f'by this program (it would hold {_MARKER}), but it is something '
            'else and is left alone. Choose another folder, or move this one '
            'away.'
        )
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        return False
    return found == settings and all(
        (out / name).is_file() for name in _expected_files(settings)
    )


def _stem(split, index):
    return f'{split}_{index:06d}'


def _picture_paths(split, stem):
    """Paths of a picture and of its semantic map in all layouts."""
    ade = _ADE_FOLDERS[split]
    images = (
        f'coco/{split}/{stem}.jpg',
        f'VOC2007/JPEGImages/{stem}.jpg',
        f'ade20k/images/{ade}/{stem}.jpg',
    )
    maps = (
        f'VOC2007/SegmentationClass/{stem}.png',
        f'ade20k/annotations/{ade}/{stem}.png',
    )
    return images, maps


def _expected_files(settings):
    for split in _ADE_FOLDERS:
        yield f'coco/annotations/instances_{split}.json'
        for index in range(settings[split]):
            stem = _stem(split, index)
            yield f'VOC2007/Annotations/{stem}.xml'
            for paths in _picture_paths(split, stem):
                yield from paths
    for task in ('Main', 'Segmentation'):
        for part in (*_ADE_FOLDERS, 'trainval'):
            yield f'VOC2007/ImageSets/{task}/{part}.txt'


def _write_shared(root, paths, content):
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


def _encode(suffix, image, *options):
    done, buffer = cv2.imencode(suffix, image, options)
    if not done:
        raise DataError(
            f'Expected OpenCV to encode {suffix} files, but it cannot. '
            'Install opencv-python-headless again.'
        )
    return buffer.tobytes()


def _write_split(root, split, count, size, seed):
    """Write pictures, semantic maps and annotations of a split."""
    scale = size / 224
    images, annotations = [], []
    licences = sorted({p.licence for p in PHOTOGRAPHS.values()})
    for index in range(count):
        stem = _stem(split, index)
        scene = make_scene(
            split, index, size, seed, digit_size=(24 * scale, 72 * scale)
        )
        picture_paths, map_paths = _picture_paths(split, stem)
        _write_shared(
            root,
            picture_paths,
            _encode(
                '.jpg', scene.image[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 92
            ),
        )
        _write_shared(root, map_paths, _encode('.png', _semantic_map(scene)))
        _write_voc(root / 'VOC2007/Annotations' / f'{stem}.xml', scene)
        photo = PHOTOGRAPHS[scene.photograph]
        images.append(
            dict(
                id=index + 1,
                file_name=f'{stem}.jpg',
                width=size,
                height=size,
                license=licences.index(photo.licence) + 1,
                photograph=scene.photograph,
                credit=photo.credit,
            )
        )
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=int(label) + 1,
                    iscrowd=0,
                    **_coco_shape(mask),
                )
            )
    path = root / f'coco/annotations/instances_{split}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            dict(
                info=dict(
                    description='Digits in the wild', split=split, seed=seed
                ),
                licenses=[
                    dict(id=i, name=name)
                    for i, name in enumerate(licences, start=1)
                ],
                categories=[
                    dict(id=i, name=name, supercategory='digit')
                    for i, name in enumerate(CLASSES, start=1)
                ],
                images=images,
                annotations=annotations,
            )
        )
    )


def _semantic_map(scene):
    semantic = np.zeros(scene.image.shape[:2], np.uint8)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        semantic[mask] = label + 1
    return semantic


def _coco_shape(mask):
    """Box, area and mask; run lengths, because a polygon has no holes."""
    from pycocotools import mask as coco_mask

    x0, y0, x1, y1 = mask_box(mask)
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    rle['counts'] = rle['counts'].decode('ascii')
    return dict(
        bbox=[x0, y0, x1 - x0, y1 - y0], area=int(mask.sum()), segmentation=rle
    )


def _write_voc(path, scene):
    """Write the boxes as VOC does: from 1, the last pixel included."""
    height, width, depth = scene.image.shape
    root = ET.Element('annotation')
    ET.SubElement(root, 'folder').text = 'VOC2007'
    ET.SubElement(root, 'filename').text = f'{path.stem}.jpg'
    node = ET.SubElement(root, 'size')
    for key, value in (('width', width), ('height', height), ('depth', depth)):
        ET.SubElement(node, key).text = str(value)
    ET.SubElement(root, 'segmented').text = '1'
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        node = ET.SubElement(root, 'object')
        ET.SubElement(node, 'name').text = CLASSES[label]
        ET.SubElement(node, 'difficult').text = '0'
        node = ET.SubElement(node, 'bndbox')
        x0, y0, x1, y1 = mask_box(mask)
        for key, value in (
            ('xmin', x0 + 1),
            ('ymin', y0 + 1),
            ('xmax', x1),
            ('ymax', y1),
        ):
            ET.SubElement(node, key).text = str(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(root).write(path)


def _write_lists(root, counts):
    lists = {
        split: [_stem(split, i) for i in range(count)]
        for split, count in counts.items()
    }
    lists['trainval'] = lists['train'] + lists['val']
    for task in ('Main', 'Segmentation'):
        folder = root / 'VOC2007/ImageSets' / task
        folder.mkdir(parents=True)
        for part, stems in lists.items():
            (folder / f'{part}.txt').write_text('\n'.join(stems) + '\n')
