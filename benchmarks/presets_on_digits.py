"""Accuracy of presets on the digits cascade: the same seeds, paired.

    python benchmarks/presets_on_digits.py exact lean --seeds 0 1 2

Trains and tests configs/cascade_e3va_swin_nano_digits.py with every preset and
seed, one after the other, in WORK_DIR. If interrupted, rerun the
command to resume. The data must be there: python tools/make_digits.py
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/cascade_e3va_swin_nano_digits.py'
METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}


def run(preset: str, seed: int, work_dir: Path, options: list[str]) -> dict:
    """Train and test one model, or take what an earlier call has left."""
    folder = work_dir / f'{preset}-{seed}'
    done = folder / 'metrics.json'
    if not done.exists():
        options = [
            f'model.backbone.tuner.preset={preset}',
            f'randomness.seed={seed}',
            *options,
        ]
        common = ['--cfg-options', *options]
        call('train.py', CONFIG, f'--work-dir={folder}', '--resume', *common)
        newest = (folder / 'last_checkpoint').read_text().strip()
        test = folder / 'test'
        call('test.py', CONFIG, newest, f'--work-dir={test}', *common)
        logs = sorted(test.glob('*/*.json'))
        done.write_text(logs[-1].read_text())
    metrics = json.loads(done.read_text().splitlines()[-1])
    return {key: metrics[key] for key in METRICS}


def call(tool: str, *args: str) -> None:
    """Run one of our tools; its output goes to stderr."""
    subprocess.run(
        [sys.executable, f'tools/{tool}', *map(str, args)],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )


def summary(found: dict[str, list[dict]]) -> str:
    """A Markdown table of AP x 100: mean, deviation, paired difference."""
    presets = list(found)
    lines = [
        '| preset | ' + ' | '.join(METRICS.values()) + ' |',
        '|---|' + '---:|' * len(METRICS),
    ]
    for preset in presets:
        cells = []
        for key in METRICS:
            values = [100 * metrics[key] for metrics in found[preset]]
            cells.append(
                f'{statistics.mean(values):.2f} +- {deviation(values):.2f} ('
                + ', '.join(f'{value:.1f}' for value in values)
                + ')'
            )
        lines.append(f'| {preset} | ' + ' | '.join(cells) + ' |')
    for preset in presets[1:]:
        cells = []
        for key in METRICS:
            first, second = (
                [100 * metrics[key] for metrics in found[name]]
                for name in (presets[0], preset)
            )
            gain = statistics.mean(second) - statistics.mean(first)
            pooled = (
                (deviation(first) ** 2 + deviation(second) ** 2) / 2
            ) ** 0.5
            cells.append(f'{gain:+.2f} (pooled deviation {pooled:.2f})')
        lines.append(
            f'| {preset} - {presets[0]} | ' + ' | '.join(cells) + ' |'
        )
    return '\n'.join(lines)


def deviation(values: list[float]) -> float:
    """Standard deviation of a sample, 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('presets', nargs='+')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--work-dir', type=Path, default=ROOT / 'work_dirs/presets_on_digits'
    )
    parser.add_argument('--cfg-options', nargs='+', default=[])
    args = parser.parse_args()
    found = {
        preset: [
            run(preset, seed, args.work_dir.resolve(), args.cfg_options)
            for seed in args.seeds
        ]
        for preset in args.presets
    }
    print(summary(found))


if __name__ == '__main__':
    main()
