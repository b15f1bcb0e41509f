"""Draw what a detector finds on images of its test split, beside the truth.

Run: python tools/draw_detections.py CONFIG CHECKPOINT --out detections.png
"""

import argparse
import sys
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.errors import CheckpointError, ConfigError, E3VAError
from e3va_mm.registry import install

SIZE = 448  # of the longer side of a drawn image, in pixels


def load(config, checkpoint):
    """Build the detector, in eval mode, and its test split.

    Args:
        config (Path): A detection config.
        checkpoint (Path): Weights of its model.

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
    install()  # checkpoints run no code
    from mmdet.apis import init_detector
    from mmdet.registry import DATASETS

    model = init_detector(cfg, str(checkpoint), device=get_device())
    return model, DATASETS.build(cfg.test_dataloader.dataset)


@torch.no_grad()
def draw(model, dataset, indices, threshold):
    """Draw truth and detections of each image side by side.

    Args:
        model (BaseDetector): The detector, in eval mode.
        dataset (BaseDetDataset): Where the images come from.
        indices (Sequence[int]): Which images of it.
        threshold (float): Least score of a detection that is drawn.

    Returns:
        tuple[np.ndarray, int]: The sheet, two pairs in a row, (H, W, 3) in
        RGB, and the number of detections on it.
    """
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    pairs, found = [], 0
    for index in indices:
        (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        # Both are in pixels of the file, whatever the pipeline resized.
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        visualizer.add_datasample(
            'pair', image, sample.cpu(), pred_score_thr=threshold
        )
        pair = visualizer.get_image()
        pairs.append(mmcv.imrescale(pair, (2 * SIZE, SIZE)))
        found += int((sample.pred_instances.scores >= threshold).sum())
    height, width = np.max([pair.shape[:2] for pair in pairs], axis=0)
    pairs = [
        mmcv.impad(pair, shape=(height, width), pad_val=255) for pair in pairs
    ]
    if len(pairs) % 2:
        pairs.append(np.full_like(pairs[0], 255))
    rows = [np.hstack(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
    return np.vstack(rows), found


def main(argv=None):
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add('config', type=Path)
    add('checkpoint', type=Path)
    add('--out', type=Path, default='detections.png', help='the PNG')
    add('--count', type=int, default=8, help='images, evenly from the split')
    add('--score-thr', type=float, default=0.3, help='least score to draw')
    args = parser.parse_args(argv)
    try:
        model, dataset = load(args.config, args.checkpoint)
    except E3VAError as error:
        sys.exit(f'error: {error}')
    count = min(args.count, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    sheet, found = draw(model, dataset, indices, args.score_thr)
    mmcv.imwrite(sheet[..., ::-1], str(args.out))
    print(f'{args.out}: {found} detections on {count} images')


if __name__ == '__main__':
    main()
