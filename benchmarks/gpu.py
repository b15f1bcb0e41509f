"""One part of `bash benchmarks/gpu.sh`, which see.

    python benchmarks/gpu.py modelled --device cpu

* modelled: launches of the Swin-L backbone and their modelled time on cards,
  counted on the meta device: needs no GPU;
* numerics: outputs and gradients on the device beside those on the CPU, for
  each preset and type of products;
* limits: the configs for small cards, with no more memory than these have;
* compiled: the frozen trunk as it is, compiled, and as a CUDA graph;
* steps: training steps of the workloads W1 to W4 (`workloads.sh`);
* table: all figures as Markdown.
"""

import argparse
import copy
import gc
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from benchmarks.backbone import BACKBONES, STOCK_CLASSES
from e3va_mm.measure import CARDS, TrainingStep, count_launches
from e3va_mm.measure.fits import CONTEXT
from e3va_mm.measure.results import Results
from e3va_mm.numerics.autocast import DTYPES
from e3va_mm.numerics.temporaries import as_on_gpu
from e3va_mm.registry import MODELS, install
from e3va_mm.utils.files import write_whole
from e3va_mm.utils.sizes import GIB, MIB

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {
    'exact': dict(preset='exact'),
    'lean': dict(preset='lean'),
    'mix': dict(type='E3VAMix', preset='exact'),
}
# Relative errors that rounding explains, of outputs and of gradients.
BOUNDS = {'fp32': (1e-4, 1e-2), 'fp16': (2e-2, 0.1), 'bf16': (0.1, 0.3)}
MODELLED = ('1080Ti', 'T4', '3090', 'A100', 'H200')
NANO = dict(BACKBONES['swin-t'], embed_dims=32, depths=(2, 2, 4, 2))
NANO['num_heads'] = (1, 2, 4, 8)
# Of `steps` and `limits` config, images, their size; else backbone and size.
SIZES = {
    'full': dict(
        steps=dict(
            w1=('cascade_e3va_swin_b_coco', 1, (800, 1216)),
            w2=('retinanet_e3va_swin_l_voc', 2, (608, 1000)),
            w3=('upernet_e3va_swin_l_ade20k', 2, (512, 512)),
            w4=('cascade_e3va_swin_l_coco', 1, (800, 1216)),
        ),
        limits={
            6: ('cascade_e3va_swin_l_coco_6gb', 1, (800, 1216)),
            11: ('cascade_e3va_swin_l_coco_11gb', 1, (800, 1216)),
        },
        variants=('full', 'frozen', 'exact', 'lean', 'lora', 'mona'),
        numerics=(BACKBONES['swin-t'], (224, 288)),
        trunk=(BACKBONES['swin-l'], (800, 1216)),
    ),
    'small': dict(
        steps=dict(
            w2=('retinanet_e3va_swin_nano_digits', 1, (64, 96)),
            w3=('upernet_e3va_swin_nano_digits', 2, (64, 96)),
        ),
        limits={6: ('cascade_e3va_swin_nano_digits', 1, (64, 96))},
        variants=('full', 'lean', 'mona'),
        numerics=(NANO, (64, 96)),
        trunk=(NANO, (64, 96)),
    ),
}
Rows = dict[str, Callable[[], dict]]


def backbone(config: Mapping, tuner: Mapping | None = None) -> nn.Module:
    """A backbone of random weights: ours with a tuner, or the stock one."""
    torch.manual_seed(0)
    kind = dict(type=STOCK_CLASSES[config['type']], drop_path_rate=0.0)
    if tuner is not None:
        kind = dict(type=f'e3va_mm.{config["type"]}', tuner=dict(tuner))
        kind['allow_random_trunk'] = True
    with DefaultScope.overwrite_default_scope('mmdet'):
        made = MODELS.build(copy.deepcopy({**config, **kind}))
    made.init_weights()
    made.train()
    return made


def in_type(tuner: Mapping, name: str) -> dict:
    """A tuner whose trunk and adapters compute in one type."""
    stored = None if name == 'fp32' else name
    return dict(tuner, compute=name, trunk_compute=name, trunk_weights=stored)


# -- parts: labels to what measures their rows ------------------------------


def modelled_rows(size: str, device: str) -> Rows:
    """Counts, and modelled milliseconds of host and GPU."""
    tuners = {
        'exact, fp16': in_type(PRESETS['exact'], 'fp16'),
        'lean': PRESETS['lean'],
        'mix, lean': dict(PRESETS['mix'], preset='lean'),
    }
    return {
        'stock frozen, fp16, forward alone': partial(modelled, size),
        'stock full, fp16': partial(modelled, size, trains=True),
        **{k: partial(modelled, size, tuner) for k, tuner in tuners.items()},
    }


def modelled(
    size: str, tuner: Mapping | None = None, trains: bool = False
) -> dict:
    """Of the backbone; the stock one in half precision."""
    config, pixels = SIZES[size]['trunk']
    model, dtype = backbone(config, tuner), torch.get_default_dtype()
    if tuner is None:
        model.half().requires_grad_(trains)
        torch.set_default_dtype(torch.half)  # it makes its masks in this
    try:
        image = torch.empty(1, 3, *pixels, device='meta')
        counted = count_launches(model, image)
    finally:
        torch.set_default_dtype(dtype)
    gpu = {f'{card} GPU ms': 1e3 * counted.gpu(card) for card in MODELLED}
    return dict(
        kernels=counted.kernels,
        ops=counted.ops,
        **{'host ms': 1e3 * counted.host},
        **gpu,
    )


def numerics_rows(size: str, device: str) -> Rows:
    """Every preset in every type of products."""
    return {
        f'{preset}, {name}': partial(numerics, preset, name, size, device)
        for preset, name in itertools.product(PRESETS, DTYPES)
    }


def numerics(preset: str, name: str, size: str, device: str) -> dict:
    """Relative errors of what a device gives, beside the CPU."""
    config, pixels = SIZES[size]['numerics']
    here = backbone(config, in_type(PRESETS[preset], name))
    with torch.no_grad():
        for parameter in here.parameters():
            if parameter.requires_grad:  # the last factors start at zero
                parameter += 0.05 * torch.randn_like(parameter)
    there = copy.deepcopy(here).to(device)
    image = torch.randn(2, 3, *pixels)
    wanted = results(here, image)
    with as_on_gpu() if device == 'cpu' else nullcontext():
        got = results(there, image.to(device))
    errors = [
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(got, wanted, strict=True)
    ]
    sound = all(e < b for e, b in zip(errors, BOUNDS[name], strict=True))
    return dict(error=errors[0], gradients_error=errors[1], sound=sound)


def results(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and gradients under white noise, as one vector each."""
    torch.manual_seed(1)
    outputs = model(image)
    noise = [torch.randn(o.shape).to(o) / o.numel() for o in outputs]
    torch.autograd.backward(outputs, noise)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return joined(outputs), joined(gradients)


def joined(tensors: list[Tensor]) -> Tensor:
    """All values on the CPU, in double precision."""
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def limits_rows(size: str, device: str) -> Rows:
    """Configs for small cards."""
    return {
        f'{workload[0]}, {gigabytes} GB': partial(
            limited, gigabytes, workload, device
        )
        for gigabytes, workload in SIZES[size]['limits'].items()
    }


def limited(gigabytes: int, workload: tuple, device: str) -> dict:
    """A config's step with no more memory than a card has."""
    if device == 'cpu':
        return step_row(*workload, 'as-is', None, device)
    whole = torch.cuda.get_device_properties(device).total_memory
    share = (gigabytes * GIB - CONTEXT) / whole
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    try:
        return step_row(*workload, 'as-is', None, device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def compiled_rows(size: str, device: str) -> Rows:
    """Ways to run the frozen trunk."""
    ways = {
        'eager': eager,
        'trunk_compile=True': eager,
        'torch.compile': whole_compiled,
        'CUDA graph': graph,
    }
    if device == 'cpu':
        del ways['CUDA graph']
    return {
        label: partial(compiled, way, 'trunk' in label, size, device)
        for label, way in ways.items()
    }


def compiled(way: Callable, inside: bool, size: str, device: str) -> dict:
    """Seconds of the frozen trunk, run in some way."""
    config, pixels = SIZES[size]['trunk']
    tuner = dict(type='NoSidePath', train_output_norms=False)
    name = 'fp32' if device == 'cpu' else 'fp16'
    made = in_type(dict(tuner, trunk_compile=inside), name)
    model = backbone(config, made).to(device)
    plain = backbone(config, in_type(tuner, name)).to(device)
    image = torch.randn(1, 3, *pixels, device=device)
    with torch.no_grad():
        begun = time.perf_counter()
        run = way(model, image)
        error = joined(run()) - joined(plain(image))
        first = time.perf_counter() - begun
        seconds = [timed(run, device) for _ in range(5)]
    return dict(
        first_s=first,
        ms=1e3 * statistics.median(seconds),
        error=(error.norm() / joined(plain(image)).norm()).item(),
    )


def eager(model: nn.Module, image: Tensor) -> Callable:
    """The model as it is."""
    return lambda: model(image)


def whole_compiled(model: nn.Module, image: Tensor) -> Callable:
    """The whole of it compiled, with CUDA graphs where there are any."""
    compiled = torch.compile(model, mode='reduce-overhead')
    return lambda: compiled(image)


def graph(model: nn.Module, image: Tensor) -> Callable:
    """The launches of one pass, recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(image)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        outputs = model(image)

    def run():
        recorded.replay()
        return outputs

    return run


def timed(run: Callable, device: str) -> float:
    """Seconds of one run."""
    begun = time.perf_counter()
    run()
    if device != 'cpu':
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def steps_rows(size: str, device: str) -> Rows:
    """Training steps; mixed precision first."""
    workloads = SIZES[size]['steps']
    return {
        f'{key} {precision} {variant}': partial(
            step_row, *workloads[key], variant, precision, device
        )
        for precision, key, variant in itertools.product(
            ('AMP', 'fp32'), workloads, SIZES[size]['variants']
        )
    }


def step_row(
    name: str,
    batch: int,
    pixels: tuple[int, int],
    variant: str,
    precision: str | None,
    device: str,
) -> dict:
    """Measured, accounted and modelled figures of a training step."""
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    if precision == 'AMP':
        config.optim_wrapper.type = 'AmpOptimWrapper'
    step = TrainingStep(
        config, variant, pixels, batch, device=device, learn=False
    )
    memory = step.memory()
    seconds = statistics.median(step.run() for _ in range(3))
    counted, card = step.launches(), card_of(device)
    found = {
        f'{key} MiB': memory[key] / MIB
        for key in ('peak', 'allocated', 'reserved')
        if key in memory
    }
    return dict(
        found,
        ms=1e3 * seconds,
        kernels=counted.kernels,
        ops=counted.ops,
        **{
            'model, host ms': 1e3 * counted.host,
            f'model, {card} ms': 1e3 * counted.gpu(card),
        },
    )


def card_of(device: str) -> str:
    """The card of the table that a device is, or an A100."""
    name = 'A100' if device == 'cpu' else torch.cuda.get_device_name(device)
    words = re.split(r'[\s-]+', name)
    pairs = (''.join(pair) for pair in zip(words, words[1:], strict=False))
    return next((w for w in (*pairs, *words) if w in CARDS), 'A100')


def has_operators(device: str) -> bool:
    """Whether mmcv's operators run on a device."""
    try:
        from mmcv.ops import nms

        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]], device=device)
        nms(boxes, torch.ones(1, device=device), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        print(f'no operators of mmcv on {device}: {error}')
        return False
    return True


# -- running ----------------------------------------------------------------

PARTS: Mapping[str, Callable] = dict(
    modelled=modelled_rows,
    numerics=numerics_rows,
    limits=limits_rows,
    compiled=compiled_rows,
    steps=steps_rows,
)
DETECTORS = ('limits', 'steps')


def run_part(
    part: str, size: str, device: str, folder: Path, until: float
) -> bool:
    """Fill in the rows of a part; whether none is unsound."""
    if part in DETECTORS and not has_operators(device):
        print(f'{part}: left out, it needs whole detectors')
        return True
    planned = PARTS[part](size, device)
    name = 'CPU' if device == 'cpu' else torch.cuda.get_device_name(device)
    environment = dict(torch=torch.__version__, device=name)
    header = dict(environment=environment, arguments=dict(size=size))
    path = folder / f'{part}.json'
    rows = Results({label: {} for label in planned}, header, path, resume=True)
    for label, row in planned.items():
        if rows.rows[label] and 'error' not in rows.rows[label]:
            continue
        if time.time() > until:
            print(f'{part}: out of time before "{label}"; rerun to go on')
            break
        begun = time.perf_counter()
        try:
            figures = row()
        except Exception as error:  # a row like another: memory, a compiler
            figures = dict(error=f'{type(error).__name__}: {error}'[:300])
        figures['row s'] = time.perf_counter() - begun
        rows.rows[label].clear()
        rows.update(label, **figures)
        print(f'{part}: {label}', *(f'{k}={v}' for k, v in figures.items()))
        gc.collect()
        if device != 'cpu':
            torch.cuda.empty_cache()
    return all(row.get('sound', True) for row in rows.rows.values())


def write_table(folder: Path) -> None:
    """All figures there are, as Markdown, to `table.md` and the screen."""
    lines = []
    for part in PARTS:
        path = folder / f'{part}.json'
        if not path.exists():
            lines += [f'## {part}', '', 'Not measured.', '']
            continue
        found = Config.fromfile(path)
        rows = {k: r for k, r in found['variants'].items() if r}
        names = list(dict.fromkeys(key for r in rows.values() for key in r))
        environment = ', '.join(found['environment'].values())
        lines += [f'## {part}', '', environment, '']
        lines += [f'| | {" | ".join(names)} |']
        lines += ['|---' * (len(names) + 1) + '|']
        for label, row in rows.items():
            cells = [cell(row.get(name, '')) for name in names]
            lines.append(f'| {label} | {" | ".join(cells)} |')
        lines.append('')
    text = '\n'.join(lines)
    write_whole(folder / 'table.md', text.encode())
    print(text)


def cell(value) -> str:
    """A figure in four digits at most."""
    if isinstance(value, float):
        return f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'
    return str(value).replace('|', '/').replace('\n', ' ')


def main() -> int:
    """Run a part."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('part', choices=(*PARTS, 'table'))
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--size', choices=SIZES, default='full')
    parser.add_argument('--folder', type=Path)
    until = 'when to begin no further row, in seconds of the epoch'
    parser.add_argument(
        '--until', type=float, default=float('inf'), help=until
    )
    args = parser.parse_args()
    install()
    MMLogger.get_current_instance().setLevel('ERROR')
    folder = args.folder or ROOT / 'work_dirs' / 'gpu' / args.size
    folder.mkdir(parents=True, exist_ok=True)
    if args.part == 'table':
        write_table(folder)
        return 0
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says
    sound = run_part(args.part, args.size, args.device, folder, args.until)
    return 0 if sound else 1


if __name__ == '__main__':
    sys.exit(main())
