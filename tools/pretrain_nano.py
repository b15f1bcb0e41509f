"""Pre-train a nano trunk of the digits configs and write its weights.

    OMP_NUM_THREADS=1 python tools/pretrain_nano.py [--trunk vit]

The task is another one than the data set's: pictures of 56, later 112 pixels
hold one digit each, and every cell of all four stages, with the ViT of every
second block, says which digit's box covers it, or none (a linear classifier
for each of these maps, dropped afterwards). Only
the `pretrain` digit samples and regions of photographs are used, a sixth of
those samples being kept for the accuracy that is printed and stored.

The weights are the same for the same seed, number of threads and version of
torch. Interrupted, the same command continues where it was.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import e3va_mm.checkpoint  # noqa: F401 (before a framework is imported)
from e3va_mm.datasets.digits import (
    CLASSES,
    digit_partition,
    make_scene,
    mask_box,
)
from e3va_mm.errors import ConfigError, E3VAError

ROOT = Path(__file__).resolve().parents[1]
TASKS = dict(
    swin='dense classification of cells at four stages, one digit a picture '
    'of 56 or 112 pixels',
    vit='dense classification of cells at three depths, one digit a picture '
    'of 56 or 112 pixels',
)
# (until this share of the steps, pictures a step, size, digit heights)
PHASES = dict(
    swin=((0.6, 64, 56, (24, 50)), (1, 32, 112, (24, 72))),
    vit=((0.6, 32, 56, (24, 50)), (1, 16, 112, (24, 72))),
)
# The pictures of held-out samples have numbers that training never reaches.
HELD_OUT = 10**9
# Background cells are many and easy.
BACKGROUND_WEIGHT = 0.5
# Mean and standard deviation of the stock data preprocessor, RGB.
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def build_trunk(kind='swin'):
    """Build the stock class with the arguments of the config.

    Args:
        kind (str): A SwinTransformer, ``'swin'``, or the VisionTransformer of
            mmpretrain, ``'vit'``; that one gives a map of every second block.

    Returns:
        BaseModule: In training mode, its weights as drawn.
    """
    from mmengine.config import Config

    if kind == 'vit':
        from e3va_mm.backbones.stock_arguments import build_stock

        cfg = Config.fromfile(ROOT / 'configs/_base_/vit_nano.py').vit_nano
        cfg.pop('init_cfg')
        cfg.update(out_type='featmap', out_indices=(1, 3, 5))
        return build_stock(cfg.pop('trunk_type'), cfg)
    try:
        from mmdet.models.backbones import SwinTransformer
    except ImportError:
        from mmseg.models.backbones import SwinTransformer
    cfg = Config.fromfile(ROOT / 'configs/_base_/swin_nano.py').swin_nano
    cfg.pop('init_cfg')
    return SwinTransformer(**cfg)


def split_samples():
    """Divide the `pretrain` samples.

    Returns:
        tuple[np.ndarray, np.ndarray]: Indices to train on, and every sixth,
        held out.
    """
    samples = digit_partition()['pretrain']
    held_out = np.arange(len(samples)) % 6 == 5
    return samples[~held_out], samples[held_out]


def make_batch(numbers, samples, size, digit_size, seed):
    """Make pictures of one digit each.

    Args:
        numbers (Iterable[int]): Numbers of the pictures.
        samples (np.ndarray): Digit samples to choose from.
        size (int): Height and width in pixels.
        digit_size (tuple[float, float]): Range of heights in pixels.
        seed (int): Seed of the pictures.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Normalized pictures (B, 3, size,
        size); cover (B, 11, size, size), 1 where the box of the digit is,
        the last channel being the background; digits (B,).
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
    digits = torch.tensor([int(s.labels[0]) for s in scenes])
    return images, cover, digits


class DenseClassifier(torch.nn.Module):
    """The trunk with a linear classifier of cells on each of its maps."""

    def __init__(self, kind='swin'):
        super().__init__()
        self.kind = kind
        self.backbone = build_trunk(kind)
        self.backbone.init_weights()
        if kind == 'vit':
            channels = [self.backbone.embed_dims] * len(
                self.backbone.out_indices
            )
        else:
            channels = self.backbone.num_features
        self.heads = torch.nn.ModuleList(
            torch.nn.Conv2d(c, len(CLASSES) + 1, 1) for c in channels
        )

    def forward(self, images):
        """(B, 3, H, W) -> for each map the logits (B, 11, h, w)."""
        return [
            head(x)
            for head, x in zip(self.heads, self.backbone(images), strict=True)
        ]


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


def phase_of(step, steps, kind='swin'):
    """Find pictures a step, size and heights of the digits at a step."""
    for until, *phase in PHASES[kind]:
        if step < until * steps:
            return phase


@torch.no_grad()
def accuracy(model, samples, seed, repeats=4):
    """Share of held-out pictures whose digit the last map names.

    A picture is given the digit with the largest summed probability over
    the cells. Every sample is shown ``repeats`` times, at the size of the
    last phase.

    Returns:
        float: Between 0 and 1; chance is 0.1.
    """
    model.eval()
    _, batch, size, digit_size = PHASES[model.kind][-1]
    shown = np.tile(samples, repeats)
    right = 0
    for start in range(0, len(shown), batch):
        part = shown[start : start + batch]
        batches = [
            make_batch(
                [HELD_OUT + start + i], [sample], size, digit_size, seed
            )
            for i, sample in enumerate(part)
        ]
        images = torch.cat([b[0] for b in batches])
        digits = torch.cat([b[2] for b in batches])
        cells = model(images)[-1].softmax(1)[:, :-1]
        right += int((cells.sum((2, 3)).argmax(1) == digits).sum())
    return right / len(shown)


def replace_file(path, write):
    """Write a file under another name, then rename it."""
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def round_to_half(model):
    """Round the trunk to what float16 can hold, in place."""
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.copy_(parameter.half())


def save_weights(model, path, metadata):
    """Write the trunk atomically, `backbone.` before every key.

    Args:
        model (DenseClassifier): Its parameters are written as float16.
        path (Path): File to write.
        metadata (dict[str, str]): Header of the file.
    """
    weights = {
        f'backbone.{key}': (x.half() if x.is_floating_point() else x).clone()
        for key, x in model.backbone.state_dict().items()
    }
    content = save(weights, metadata)
    replace_file(path, lambda p: p.write_bytes(content))


def train(model, steps, seed, peak, state_path, console, save_every=100):
    """Train, continuing from ``state_path`` if it has the same settings.

    Args:
        model (DenseClassifier): Trained in place.
        steps (int): Number of steps in all.
        seed (int): Seed of pictures and drop path.
        peak (float): Largest learning rate.
        state_path (Path): Where the state is kept while training.
        console (rich.console.Console): Where progress is shown.
        save_every (int): Steps between two saves and two printed lines.
            Defaults to 100.

    Returns:
        list[float]: Loss of each step that this call made.
    """
    settings = json.dumps(
        dict(trunk=model.kind, steps=steps, seed=seed, peak=peak)
    )
    samples = split_samples()[0]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, weight_decay=0.05
    )
    first, losses = 0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state['settings'] == settings:
            model.load_state_dict(state['model'])
            optimizer.load_state_dict(state['optimizer'])
            first = state['step']
            console.print(
                f'{state_path}: continuing after step {first}', soft_wrap=True
            )
        else:
            console.print(
                f'{state_path}: of other settings '
                f'{state["settings"]}, starting anew',
                soft_wrap=True,
            )

    def save(step):
        state = dict(
            settings=settings,
            step=step,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
        )
        replace_file(state_path, lambda p: torch.save(state, p))

    model.train()
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task('pre-training', total=steps, completed=first)
        for step in range(first, steps):
            batch, size, digit_size = phase_of(step, steps, model.kind)
            numbers = range(step * 1000, step * 1000 + batch)
            images, cover, _ = make_batch(
                numbers, samples, size, digit_size, seed
            )
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(step, steps, peak)
            # Drop path depends on the step alone, so a resume is exact.
            torch.manual_seed(seed * steps + step)
            loss = dense_loss(model(images), cover)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.update(
                bar,
                advance=1,
                description=f'pre-training, loss {np.mean(losses[-20:]):.3f}',
            )
            if (step + 1) % save_every == 0:
                save(step + 1)
                progress.console.print(
                    f'step {step + 1} of {steps}, {size} pixels: '
                    f'loss {np.mean(losses[-save_every:]):.3f}'
                )
    return losses


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--trunk',
        choices=tuple(TASKS),
        default='swin',
        help='(default: %(default)s)',
    )
    parser.add_argument(
        '--out', type=Path, help='file to write (default: that of the package)'
    )
    parser.add_argument(
        '--steps', type=int, default=2300, help='(default: %(default)s)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='(default: %(default)s)'
    )
    parser.add_argument(
        '--lr',
        type=float,
        default=1e-3,
        help='largest learning rate (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.out is None:
        name = f'{args.trunk}_nano_digits.safetensors'
        args.out = ROOT / 'e3va_mm/assets' / name
    return args


def main(argv=None):
    """Train, measure on the held-out samples, write."""
    args = parse_args(argv)
    if args.steps < 1 or args.seed < 0 or args.out.suffix != '.safetensors':
        raise ConfigError(
            'Expected --steps of at least 1, --seed of at least 0 and --out '
            f'ending in .safetensors, but got {args.steps}, {args.seed} and '
            f'{args.out}. Change these options.'
        )
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    console = Console()
    model = DenseClassifier(args.trunk)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state_path = args.out.with_suffix('.state.pt')
    train(model, args.steps, args.seed, args.lr, state_path, console)
    # Measured on the values that the file holds.
    round_to_half(model)
    held_out = split_samples()[1]
    share = accuracy(model, held_out, args.seed)
    trunk = '' if args.trunk == 'swin' else f'--trunk {args.trunk} '
    save_weights(
        model,
        args.out,
        dict(
            task=TASKS[args.trunk],
            seed=str(args.seed),
            torch=torch.__version__,
            accuracy=f'{share:.4f} on {len(held_out)} held-out digit samples, '
            'each shown 4 times; chance 0.1',
            command='python tools/pretrain_nano.py '
            f'{trunk}--steps {args.steps} '
            f'--seed {args.seed} --lr {args.lr}',
        ),
    )
    state_path.unlink(missing_ok=True)
    console.print(
        f'{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, '
        f'{share:.1%} of the pictures of {len(held_out)} held-out digit '
        'samples named correctly (chance: 10 %)',
        soft_wrap=True,
    )


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
