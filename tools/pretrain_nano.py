"""Pre-train a nano trunk of the digits configs and write its weights.

    OMP_NUM_THREADS=1 python tools/pretrain_nano.py [--trunk vit]

The task differs from that of the data set: images of 56, later 112 pixels hold
one digit each, and every cell of all four stages, of every second block of the
ViT, says which digit's box covers it, or none (a linear classifier for each of
these maps, dropped afterwards). Only the `pretrain` digit samples and regions
of photographs are used. A sixth of those samples is held out for the accuracy
that is printed and stored.

The weights are the same for the same seed, number of threads and version of
torch. If interrupted, rerun the command to resume.
"""

import argparse
import json
import math
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save

# Runs from a plain clone too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e3va_mm.datasets.digits import (
    CLASSES,
    digit_partition,
    make_scene,
    mask_box,
)
from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.registry import MODELS
from e3va_mm.utils.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
DEPTHS = dict(swin='four stages', vit='three depths')
# (until this share of the steps, images a step, size, digit heights)
PHASES = dict(
    swin=((0.6, 64, 56, (24, 50)), (1, 32, 112, (24, 72))),
    vit=((0.6, 32, 56, (24, 50)), (1, 16, 112, (24, 72))),
)
# The images of held-out samples have numbers that training never reaches.
HELD_OUT = 10**9
# Background cells are many and easy.
BACKGROUND_WEIGHT = 0.5
# Mean and standard deviation of the stock data preprocessor, RGB.
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
SAVE_EVERY = 100  # steps


def build_trunk(kind='swin'):
    """Build the stock class of a nano config, its weights as drawn.

    The ViT gives a map of every second block.
    """
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / f'configs/_base_/{kind}_nano.py')
    cfg = cfg[f'{kind}_nano']
    cfg.pop('init_cfg')
    name = cfg.pop('trunk_type', 'mmdet.SwinTransformer')
    if kind == 'vit':
        cfg.update(out_type='featmap', out_indices=(1, 3, 5))
    return MODELS.build(dict(cfg, type=name))


def split_samples():
    """Indices of `pretrain` samples to train on, and every sixth, held out."""
    samples = digit_partition()['pretrain']
    held_out = np.arange(len(samples)) % 6 == 5
    return samples[~held_out], samples[held_out]


def make_batch(numbers, samples, size, digit_size, seed):
    """Make images of one digit each.

    Args:
        numbers (Iterable[int]): Numbers of the images.
        samples (np.ndarray): Digit samples to choose from.
        size (int): Height and width in pixels.
        digit_size (tuple[float, float]): Range of heights in pixels.
        seed (int): Seed of the images.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Normalized images (B, 3, size, size);
        cover (B, 11, size, size), 1 where the box of the digit is, the last
        channel being the background; digits (B,).
    """
    scenes = [
        make_scene('pretrain', n, size, seed, (1, 1), digit_size, samples)
        for n in numbers
    ]
    images = torch.from_numpy(np.stack([s.image for s in scenes]))
    images = (images.permute(0, 3, 1, 2).float() - MEAN) / STD
    cover = torch.zeros(len(scenes), len(CLASSES) + 1, size, size)
    cover[:, -1] = 1
    for i, scene in enumerate(scenes):
        x0, y0, x1, y1 = mask_box(scene.masks[0])
        cover[i, scene.labels[0], y0:y1, x0:x1] = 1
        cover[i, -1, y0:y1, x0:x1] = 0
    return images, cover, torch.tensor([int(s.labels[0]) for s in scenes])


class DenseClassifier(torch.nn.Module):
    """The trunk with a linear classifier of cells on each of its maps."""

    def __init__(self, kind='swin'):
        super().__init__()
        self.kind = kind
        self.backbone = build_trunk(kind)
        self.backbone.init_weights()
        channels = getattr(self.backbone, 'num_features', None) or [
            self.backbone.embed_dims
        ] * len(self.backbone.out_indices)
        self.heads = torch.nn.ModuleList(
            torch.nn.Conv2d(c, len(CLASSES) + 1, 1) for c in channels
        )

    def forward(self, images):
        """(B, 3, H, W) -> for each map the logits (B, 11, h, w)."""
        maps = self.backbone(images)
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]


def dense_loss(logits, cover):
    """Mean cross entropy of the cells, averaged over the maps.

    A cell's target is the share of its area that each class covers.
    """
    weight = torch.ones(len(CLASSES) + 1)
    weight[-1] = BACKGROUND_WEIGHT
    losses = []
    for x in logits:
        target = F.adaptive_avg_pool2d(cover, x.shape[-2:])
        losses.append(F.cross_entropy(x, target, weight=weight))
    return sum(losses) / len(losses)


def learning_rate(step, steps, peak):
    """One cycle: a linear rise over 15 % of the steps, then a cosine."""
    rise = max(1, round(0.15 * steps))
    if step < rise:
        return peak * (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return peak * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6


@torch.no_grad()
def accuracy(model, samples, seed, repeats=4):
    """Share of held-out images whose digit the last map names.

    An image is given the digit with the largest summed probability over the
    cells. Every sample is shown ``repeats`` times, at the size of the last
    phase. Chance is 0.1.
    """
    model.eval()
    _, _, size, digit_size = PHASES[model.kind][-1]
    right = []
    for number, sample in enumerate(np.tile(samples, repeats)):
        images, _, digit = make_batch(
            [HELD_OUT + number], [sample], size, digit_size, seed
        )
        cells = model(images)[-1].softmax(1)[:, :-1]
        right.append(cells.sum((2, 3)).argmax(1) == digit)
    return torch.cat(right).float().mean().item()


def train(model, steps, seed, peak, state_path):
    """Train, resuming from ``state_path`` if it has the same settings.

    Args:
        model (DenseClassifier): Trained in place.
        steps (int): Number of steps in all.
        seed (int): Seed of images and drop path.
        peak (float): Largest learning rate.
        state_path (Path): Where the state is kept while training.

    Returns:
        list[float]: Loss of each step that this call made.
    """
    settings = json.dumps(
        dict(trunk=model.kind, steps=steps, seed=seed, peak=peak)
    )
    samples = split_samples()[0]
    optimizer = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.05)
    first, losses = 0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state['settings'] == settings:
            model.load_state_dict(state['model'])
            optimizer.load_state_dict(state['optimizer'])
            first = state['step']
            print(f'{state_path}: resuming after step {first}')
        else:
            print(f'{state_path}: of other settings, starting anew')
    model.train()
    for step in track(range(first, steps), 'pre-training'):
        batch, size, digit_size = next(
            phase
            for until, *phase in PHASES[model.kind]
            if step < until * steps
        )
        numbers = range(step * 1000, step * 1000 + batch)
        images, cover, _ = make_batch(numbers, samples, size, digit_size, seed)
        optimizer.param_groups[0]['lr'] = learning_rate(step, steps, peak)
        # Drop path depends on the step alone, so a resume is exact.
        torch.manual_seed(seed * steps + step)
        loss = dense_loss(model(images), cover)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0:
            print(f'step {step + 1}: loss {np.mean(losses[-SAVE_EVERY:]):.3f}')
            buffer = BytesIO()
            state = dict(model=model.state_dict(), step=step + 1)
            state |= dict(optimizer=optimizer.state_dict(), settings=settings)
            torch.save(state, buffer)
            write_whole(state_path, buffer.getvalue())
    return losses


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add('--trunk', choices=tuple(DEPTHS), default='swin')
    add('--out', type=Path, help='default: the file of the package')
    add('--steps', type=int, default=2300)
    add('--seed', type=int, default=0)
    add('--lr', type=float, default=1e-3, help='largest learning rate')
    args = parser.parse_args(argv)
    if args.out is None:
        name = f'{args.trunk}_nano_digits.safetensors'
        args.out = ROOT / 'e3va_mm/assets' / name
    if args.steps < 1 or args.seed < 0 or args.out.suffix != '.safetensors':
        raise ConfigError(
            'Expected --steps of at least 1, --seed of at least 0 and --out '
            f'ending in .safetensors, but got {args.steps}, {args.seed} and '
            f'{args.out}. Change these options.'
        )
    return args


def main(argv=None):
    """Train, measure on the held-out samples, write."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = DenseClassifier(args.trunk)
    state_path = args.out.with_suffix('.state.pt')
    train(model, args.steps, args.seed, args.lr, state_path)
    # Measured on the values that the file holds, of float16.
    model.backbone.half().float()
    held_out = split_samples()[1]
    share = accuracy(model, held_out, args.seed)
    weights = {
        f'backbone.{key}': (x.half() if x.is_floating_point() else x).clone()
        for key, x in model.backbone.state_dict().items()
    }
    trunk = '' if args.trunk == 'swin' else f'--trunk {args.trunk} '
    metadata = dict(
        task=f'dense classification of cells at {DEPTHS[args.trunk]}, one '
        'digit an image of 56 or 112 pixels',
        seed=str(args.seed),
        torch=torch.__version__,
        accuracy=f'{share:.4f} on {len(held_out)} held-out digit samples, '
        'each shown 4 times; chance 0.1',
        command=f'python tools/pretrain_nano.py {trunk}--steps {args.steps} '
        f'--seed {args.seed} --lr {args.lr}',
    )
    write_whole(args.out, save(weights, metadata))
    state_path.unlink(missing_ok=True)
    print(
        f'{args.out}: {share:.1%} of the images of {len(held_out)} held-out '
        'digit samples named correctly (chance: 10 %)'
    )


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
