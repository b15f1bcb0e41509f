"""Whole training steps of stock configs, by one changed line.

    python benchmarks/stock_configs.py --json work_dirs/stock_configs.json
    python benchmarks/stock_configs.py --families SwinTransformer
    python benchmarks/stock_configs.py --language-models

In every config of MMDetection and MMSegmentation whose backbone is a
transformer or a ConvNeXt, the backbone becomes ours, and the model takes one
training step on generated input, with the config's own optimizer: weights at
random, nothing else changed. Configs with a language model, whose weights and
vocabulary are a download, have runs of their own (`--language-models`, needs
transformers): there one of a single layer, whose words are letters, stands in
for it. Configs that differ in their data or tests alone share a step. Each has
a process of its own. If interrupted, rerun the command to resume; what failed
is tried again. Seconds are those of the first and only step, of all cores
together: what else a machine does hardly changes them.
"""

import argparse
import importlib.util
import multiprocessing
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import (
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import to_2tuple
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import e3va_mm.checkpoint  # noqa: F401 changes the frameworks
from e3va_mm.backbones import TunedBackbone, tuned_config
from e3va_mm.measure import TrainingStep
from e3va_mm.measure.inputs import NAMES
from e3va_mm.measure.results import Results
from e3va_mm.measure.variants import framework
from e3va_mm.utils.configs import content_key

FRAMEWORKS = ('mmdet', 'mmseg')
# Stock class -> what configs with it have in their name or text; to parse all
# takes minutes.
FAMILIES = {
    'SwinTransformer': 'swin',
    'VisionTransformer': 'vit',
    'BEiT': 'beit',
    'MAE': 'mae',
    'MixVisionTransformer': 'mit',
    'PCPVT': 'pcpvt',
    'SVT': 'svt',
    'MSCAN': 'mscan',
    'PyramidVisionTransformer': 'pvt',
    'PyramidVisionTransformerV2': 'pvt',
    'ConvNeXt': 'convnext',
    'PoolFormer': 'poolformer',
}
# Names of the backbone in a model.
BACKBONES = ('backbone', 'image_encoder')
# Made for images of their `img_size`.
OF_ONE_SIZE = ('BEiT', 'MAE')


def root(framework: str) -> Path:
    """Where the configs of an installed framework lie."""
    package = importlib.util.find_spec(framework).submodule_search_locations
    return Path(package[0]) / '.mim' / 'configs'


def stock_configs(
    framework: str,
    families: Collection[str] = tuple(FAMILIES),
    language_models: bool = False,
) -> Iterator[Path]:
    """The configs with a backbone of some families.

    Args:
        framework (str): Where they are from.
        families (Collection[str]): Stock classes of backbones.
        language_models (bool): Those with a language model, or all others.
    """
    words = {FAMILIES[family] for family in families}
    for path in sorted(root(framework).glob('**/*.py')):
        text = f'{path.name} {path.read_text()}'.lower()
        if '_base_' in path.parts or not any(word in text for word in words):
            continue
        try:
            model = parse(path).get('model', {})
        except (FileNotFoundError, ImportError):
            continue  # a parent that upstream lost, or of another package
        if (
            family_of(model) in families
            and ('language_model' in model) is language_models
        ):
            yield path


def parse(path: Path) -> Config:
    """The config, without the warnings of its parents."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Config.fromfile(path)


def backbone_of(model: Mapping) -> tuple[str, Mapping]:
    """Name and config of a model's backbone; both empty without one."""
    for name in BACKBONES:
        if 'type' in model.get(name, {}):
            return name, model[name]
    return '', {}


def family_of(model: Mapping) -> str:
    """The stock class of a model's backbone, without a scope."""
    return backbone_of(model)[1].get('type', '').split('.')[-1]


def heading(model: Mapping) -> str:
    """What the figures of a config are summed up under."""
    return model.type if 'language_model' in model else family_of(model)


def trains_by(config: Config) -> str:
    """The same for configs that take the same step."""
    model = {k: v for k, v in config.model.items() if k != 'test_cfg'}
    optim = config.get('optim_wrapper')
    return content_key(Config(dict(model=model, optim_wrapper=optim)))


def change(model: MutableMapping, framework: str) -> None:
    """Make a stock config one of ours.

    Args:
        model (MutableMapping): ``model`` of the config, changed in place.
        framework (str): Of the config.
    """
    name, stock = backbone_of(model)
    model[name] = tuned_config(stock, framework)


def stand_in(folder: str, layers: int = 1) -> str:
    """Write a BERT of the usual width, at random, whose words are letters.

    Args:
        folder (str): Where to write it.
        layers (int): Its layers. Defaults to 1.

    Returns:
        str: The folder, for ``language_model.name``.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', *NAMES]
    vocabulary = Path(folder, 'vocab.txt')
    vocabulary.write_text('\n'.join(words))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), num_hidden_layers=layers)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def one_step(path: Path, size: int, batch: int) -> dict:
    """Change one line of a config, and take a training step.

    Args:
        path (Path): A config with a stock backbone.
        size (int): Height and width of the images in pixels, but for
            backbones that are made for one size.
        batch (int): Images.

    Returns:
        dict: ``seconds`` of processors that the step takes and
        ``parameters``, see :meth:`TrainingStep.parameters`.

    Raises:
        AssertionError: If an adapter has not moved, or a value is not finite.
    """
    MMLogger.get_instance('mmengine', log_level='ERROR')
    config = parse(path)
    pixels = (size, size)
    if family_of(config.model) in OF_ONE_SIZE:
        pixels = to_2tuple(backbone_of(config.model)[1]['img_size'])
    change(config.model, framework(config))
    with tempfile.TemporaryDirectory() as folder:
        if 'language_model' in config.model:
            config.model.language_model.name = stand_in(folder)
            if 'lang_model_name' in config.model.bbox_head:  # GLIP's
                config.model.bbox_head.lang_model_name = folder
        step = TrainingStep(config, size=pixels, batch=batch)
    ours = {
        name: module
        for name, module in step.model.named_modules()
        if isinstance(module, TunedBackbone)
    }
    for module in ours.values():
        give_statistics(module, torch.randn(batch, 3, *pixels))
    # Zero before the first step; all that a gradient reaches move.
    adapters = {
        f'{name}.{inner}': parameter
        for name, module in ours.items()
        for inner, parameter in module.named_parameters()
        if 'up.q' in inner
    }
    assert adapters, 'there is no side path'
    before = {k: v.detach().clone() for k, v in adapters.items()}
    start = time.process_time()
    step.run()
    seconds = time.process_time() - start
    for name, parameter in step.model.named_parameters():
        assert parameter.isfinite().all(), f'{name} is not finite'
    for name, parameter in adapters.items():
        assert not torch.equal(parameter, before[name]), (
            f'{name} has not moved'
        )
    return dict(seconds=seconds, parameters=step.parameters())


@torch.no_grad()
def give_statistics(backbone: TunedBackbone, images: Tensor) -> None:
    """Batch norms of a frozen trunk get the statistics of some images.

    Pre-trained ones have theirs. Through those that a random trunk begins
    with, values grow from block to block until they are not finite.
    """
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches, here of one
        norm.train()
    if norms:
        backbone(images)
    for norm in norms:
        norm.eval()


def in_a_process(function: Callable, *args) -> dict:
    """What a function returns, or ``error``, from a process of its own."""
    # Not a new interpreter: importing the frameworks takes long.
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        figures = receiver.recv()
    except EOFError:
        figures = None
    process.join()
    return figures or dict(
        error=f'its process ended with {process.exitcode}; with -9 it is '
        'mostly memory that lacks'
    )


def _send(sender, function: Callable, args: tuple) -> None:
    try:
        figures = function(*args)
    except Exception as error:
        line = ' '.join(str(error).split())
        figures = dict(error=f'{type(error).__name__}: {line}'[:300])
    sender.send(figures)


def table(rows: Mapping[str, Mapping]) -> str:
    """The figures as Markdown, and below how many were reached."""
    lines = [
        '| config | CPU s/step | trainable | of the backbone | |',
        '|---|---:|---:|---:|---|',
    ]
    for name, row in rows.items():
        if 'seconds' in row:
            count = row['parameters']
            lines.append(
                f'| {name} | {row["seconds"]:.1f} | {count["trainable"]:,} | '
                f'{count["trainable_backbone"]:,} | |'
            )
        else:
            reason = row.get('error', 'not yet').replace('|', '\\|')
            lines.append(f'| {name} | - | - | - | {reason} |')
    families = dict.fromkeys(row['family'] for row in rows.values())
    if len(families) > 1:
        lines += ['', '| backbone | reached | CPU s/step |', '|---|---:|---:|']
    for family in families if len(families) > 1 else ():
        all_of_it = [r for r in rows.values() if r['family'] == family]
        seconds = [r['seconds'] for r in all_of_it if 'seconds' in r]
        span = f'{min(seconds):.1f}-{max(seconds):.1f}' if seconds else '-'
        lines.append(
            f'| {family} | {len(seconds)} of {len(all_of_it)} | {span} |'
        )
    reached = sum('seconds' in row for row in rows.values())
    return '\n'.join([*lines, '', f'{reached} of {len(rows)} reached'])


def label(path: Path) -> str:
    """A stock config as one writes it into ``_base_``, others as they are."""
    for name in FRAMEWORKS:
        if path.is_relative_to(root(name)):
            return f'{name}::{path.relative_to(root(name))}'
    return str(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Take the steps that are missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'configs', nargs='*', type=Path, help='default: all stock ones'
    )
    parser.add_argument(
        '--families',
        nargs='+',
        choices=FAMILIES,
        default=[*FAMILIES],
        metavar='CLASS',
        help='stock backbones, without CONFIGS; default: all of '
        f'{", ".join(FAMILIES)}',
    )
    parser.add_argument(
        '--language-models',
        action='store_true',
        help='the configs with one, without CONFIGS',
    )
    # The longest stride is 64.
    parser.add_argument(
        '--size',
        type=int,
        default=256,
        help=f'pixels; {" and ".join(OF_ONE_SIZE)} have their own',
    )
    # Batch norms of maps of 1x1 need two.
    parser.add_argument('--batch', type=int, default=2, help='images')
    parser.add_argument('--json', type=Path, help='figures, to go on from')
    args = parser.parse_args(argv)
    paths = [path.resolve() for path in args.configs] or [
        path
        for name in FRAMEWORKS
        for path in stock_configs(name, args.families, args.language_models)
    ]
    configs = {path: parse(path) for path in paths}
    results = Results(
        {
            label(path): dict(config=str(path), family=heading(config.model))
            for path, config in configs.items()
        },
        dict(
            environment=dict(
                torch=torch.__version__,
                cpu=platform.machine(),
                threads=torch.get_num_threads(),
            ),
            arguments=dict(size=args.size, batch=args.batch),
        ),
        args.json,
        resume=args.json is not None,
    )
    progress = track(
        paths, 'steps', console=Console(stderr=True), transient=True
    )
    done = {}  # in this run, as what failed is tried again
    for path in progress:
        row, key = results.rows[label(path)], trains_by(configs[path])
        if 'seconds' not in row:
            row.pop('error', None)
            if key not in done:
                done[key] = in_a_process(one_step, path, args.size, args.batch)
            results.update(label(path), **done[key])
    print(table(results.rows))


if __name__ == '__main__':
    main()
