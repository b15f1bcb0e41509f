"""Draw what a detector finds on pictures of its test split, beside the truth.

Run: python tools/draw_detections.py CONFIG CHECKPOINT --out detections.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import e3va_mm.checkpoint  # noqa: F401  checkpoints run no code
from e3va_mm.errors import CheckpointError, ConfigError, E3VAError


def load(config, checkpoint):
    """Build the detector and its test split.

    Args:
        config (Path): A detection config.
        checkpoint (Path): Weights of its model.

    Returns:
        tuple: The detector in eval mode and the data set.

    Raises:
        ConfigError: If there is no such config, or none of a detector.
        CheckpointError: If there is no such checkpoint.
    """
    if not config.is_file():
        raise ConfigError(f'{config}: no such config file.')
    if not checkpoint.is_file():
        raise CheckpointError(f'{checkpoint}: no such checkpoint file.')
    cfg = Config.fromfile(config)
    scope = cfg.get('default_scope')
    if scope != 'mmdet':
        raise ConfigError(
            "`default_scope` in the config should be 'mmdet', but got "
            f'{scope!r}. For a segmentor use tools/test.py --show-dir.'
        )
    from mmdet.apis import init_detector
    from mmdet.registry import DATASETS

    model = init_detector(cfg, str(checkpoint), device=get_device())
    return model, DATASETS.build(cfg.test_dataloader.dataset)


def panel(axes, picture, instances, classes, palette, scores=None):
    """Draw boxes, masks and class names of one picture.

    Args:
        axes (matplotlib.axes.Axes): Where to draw.
        picture (np.ndarray): (H, W, 3), RGB.
        instances (InstanceData): ``bboxes`` in pixels (n, 4), ``labels``
            (n,) and, where the model has them, ``masks`` (n, H, W).
        classes (Sequence[str]): Names of the labels.
        palette (Sequence): An RGB colour (0 to 255) for each label.
        scores (Sequence[float], optional): Written beside the names.
    """
    shown = picture / 255.0
    masks = instances.get('masks')
    labels = instances.labels.tolist()
    if masks is not None:
        # Truth comes as BitmapMasks, predictions as a tensor.
        masks = np.asarray(getattr(masks, 'masks', masks), dtype=bool)
        for mask, label in zip(masks, labels, strict=True):
            shown[mask] = (shown[mask] + np.divide(palette[label], 255)) / 2
    axes.imshow(shown, interpolation='lanczos')
    for i, (box, label) in enumerate(
        zip(instances.bboxes.tolist(), labels, strict=True)
    ):
        left, top, right, bottom = box
        colour = np.divide(palette[label], 255)
        axes.add_patch(
            plt.Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=colour,
                linewidth=1.2,
            )
        )
        name = classes[label]
        if scores is not None:
            name = f'{name} {scores[i]:.2f}'
        axes.text(
            left,
            top - 1,
            name,
            fontsize=7,
            color='white',
            va='bottom',
            clip_on=True,
            bbox=dict(facecolor=colour, linewidth=0, pad=0.8),
        )
    axes.set_axis_off()


def draw(model, dataset, indices, threshold):
    """Draw a contact sheet: truth and detections of each picture in a pair.

    Args:
        model (BaseDetector): The detector, in eval mode.
        dataset (BaseDetDataset): Where the pictures come from.
        indices (Sequence[int]): Which pictures of it.
        threshold (float): Least score of a detection that is drawn.

    Returns:
        tuple[matplotlib.figure.Figure, int]: The sheet, two pairs in a row,
        and the number of detections on it.
    """
    classes = dataset.metainfo['classes']
    palette = dataset.metainfo.get('palette')
    if palette is None:
        colours = plt.get_cmap('hsv')(
            np.linspace(0, 1, len(classes), endpoint=False)
        )
        palette = 255 * colours[:, :3]
    rows = -(-len(indices) // 2)
    figure, grid = plt.subplots(
        rows, 4, figsize=(10, 2.6 * rows), layout='constrained', squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    found = 0
    pairs = grid.reshape(-1, 2)[: len(indices)]
    for index, (left, right) in zip(indices, pairs, strict=True):
        data = dataset[index]
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([data]))
        # Both are in pixels of the file, whatever the pipeline resized.
        picture = mmcv.imread(sample.img_path, channel_order='rgb')
        seen = sample.pred_instances.cpu()
        seen = seen[seen.scores >= threshold]
        found += len(seen)
        name = Path(sample.img_path).stem
        panel(left, picture, sample.gt_instances.cpu(), classes, palette)
        panel(right, picture, seen, classes, palette, seen.scores.tolist())
        left.set_title(f'{name}: truth', fontsize=8)
        right.set_title(f'detected (score >= {threshold:g})', fontsize=8)
    return figure, found


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('config', type=Path)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('detections.png'),
        help='the PNG (default: %(default)s)',
    )
    parser.add_argument(
        '--count',
        type=int,
        default=8,
        help='number of pictures, taken evenly from the '
        'split (default: %(default)s)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='least score to draw (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    try:
        model, dataset = load(args.config, args.checkpoint)
    except E3VAError as error:
        sys.exit(f'error: {error}')
    count = min(args.count, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    figure, found = draw(model, dataset, indices, args.score_thr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    plt.close(figure)
    print(f'{args.out}: {found} detections on {count} pictures')


if __name__ == '__main__':
    main()
