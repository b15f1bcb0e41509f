"""Make, look into and merge adapter files: a model without its frozen trunk.

    python tools/adapter.py extract CHECKPOINT OUT --config CONFIG
    python tools/adapter.py inspect FILE
    python tools/adapter.py merge CONFIG FILE OUT
    python tools/adapter.py strip FILE OUT
    python tools/adapter.py task FILE NAME CONFIG OUT

OUT of merge is a .pth file, else a .safetensors file. merge writes a full
checkpoint under the stock names, with the side path's keys beside. A stock
model loads it too, and has then the trained norms, neck and heads, but no side
path: what it gives is not what was trained.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from rich.console import Console
from rich.table import Table
from torch import nn

import e3va_mm.checkpoint  # noqa: F401  checkpoints run no code
from e3va_mm.errors import CheckpointError, ConfigError, E3VAError
from e3va_mm.utils.files import MIB, write_whole
from e3va_mm.weights import (
    AdapterFile,
    adapter_of,
    match_state,
    read_adapter,
    read_checkpoint,
    trunk_records,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)

    extract = commands.add_parser(
        'extract', help='an adapter file of a full checkpoint'
    )
    extract.add_argument('checkpoint', type=Path)
    extract.add_argument('out', type=Path, help='a .safetensors file')
    extract.add_argument('--config', type=Path, required=True)
    extract.add_argument(
        '--trunk',
        metavar='PATH_OR_URL',
        help="the file of the trunk's weights (default: that of the config)",
    )

    inspect = commands.add_parser('inspect', help='show what a file holds')
    inspect.add_argument('file', type=Path)
    inspect.add_argument(
        '--config',
        action='store_true',
        help='print the text of the config alone',
    )

    merge = commands.add_parser(
        'merge', help='a full checkpoint of trunk and adapter file'
    )
    merge.add_argument('config', type=Path)
    merge.add_argument('file', type=Path)
    merge.add_argument('out', type=Path, help='a .pth file')

    strip = commands.add_parser(
        'strip', help="drop neck and heads, keep the backbone's part"
    )
    strip.add_argument('file', type=Path)
    strip.add_argument('out', type=Path, help='a .safetensors file')

    task = commands.add_parser(
        'task', help='the part of one of several tasks that trained together'
    )
    task.add_argument('file', type=Path)
    task.add_argument('name', help='the task')
    task.add_argument('config', type=Path, help="the task's own config")
    task.add_argument('out', type=Path, help='a .safetensors file')

    for command in (extract, merge, task):
        command.add_argument(
            '--cfg-options', nargs='+', action=DictAction, default={}
        )
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> Config:
    """The config, as the command line changes it."""
    if not args.config.is_file():
        raise ConfigError(f'{args.config}: no such config file.')
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    return config


def build(config: Config) -> nn.Module:
    """The model of a config, without weights."""
    init_default_scope(config.get('default_scope', 'mmdet'))
    return MODELS.build(config.model)


def check_out(out: Path, suffix: str) -> None:
    """Refuse a file whose name says something else than it is."""
    if out.suffix != suffix:
        raise ConfigError(f'OUT should end in {suffix}, but got {out}.')


def extract(args: argparse.Namespace) -> None:
    """Write an adapter file of a full checkpoint."""
    check_out(args.out, '.safetensors')
    config = load(args)
    if args.trunk:
        config.model.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=args.trunk
        )
    checkpoint = read_checkpoint(args.checkpoint)
    model = build(config)
    model.init_weights()
    _load_checkpoint_to_model(model, checkpoint)
    # Whatever the file lacks has been drawn: the loader only warns.
    match_state(
        model.state_dict(),
        checkpoint.get('state_dict', checkpoint),
        expected_leftovers=['.*'],
        what='model of the config',
        source=str(args.checkpoint),
        hint='Take the config that the checkpoint was trained with.',
    )
    try:
        trunks = trunk_records(model)
    except ConfigError as error:
        raise ConfigError(
            f'{error} For tools/adapter.py: --trunk PATH_OR_URL.'
        ) from None
    meta = checkpoint.get('meta', {}).get('dataset_meta')
    adapter = adapter_of(
        model,
        trunks,
        config=config.pretty_text,
        dataset_meta=meta,
    )
    size = adapter.write(args.out)
    full = args.checkpoint.stat().st_size
    print(f'{args.out}: {size / MIB:,.1f} of {full / MIB:,.1f} MiB')


def merge(args: argparse.Namespace) -> None:
    """Write a full checkpoint of trunk and adapter file."""
    check_out(args.out, '.pth')
    adapter = read_adapter(args.file)
    if adapter.part != 'model':
        raise CheckpointError(
            f'{args.file} holds no neck and heads, so no full checkpoint '
            'comes of it. Take the file that it was stripped from.'
        )
    checkpoint = adapter.checkpoint(args.file)
    model = build(load(args))
    _load_checkpoint_to_model(model, checkpoint)
    whole = dict(meta=checkpoint['meta'], state_dict=model.state_dict())
    content = BytesIO()
    torch.save(whole, content)
    write_whole(args.out, content.getvalue())
    print(
        f'{args.out}: {content.tell() / MIB:,.1f} MiB. A stock model that '
        'loads it leaves out the side path and gives something else.'
    )


def strip(args: argparse.Namespace) -> None:
    """Write an adapter file without neck and heads."""
    check_out(args.out, '.safetensors')
    size = read_adapter(args.file).without_heads().write(args.out)
    print(f'{args.out}: {size / MIB:,.1f} MiB, the part of the backbone')


def task(args: argparse.Namespace) -> None:
    """Write the adapter file of one task."""
    check_out(args.out, '.safetensors')
    text = load(args).pretty_text
    size = read_adapter(args.file).of_task(args.name, text).write(args.out)
    print(f'{args.out}: {size / MIB:,.1f} MiB, the task {args.name!r}')


def inspect(args: argparse.Namespace) -> None:
    """Print what an adapter file holds."""
    adapter = read_adapter(args.file)
    if args.config:
        print(adapter.config)
        return
    out = Console()
    if not out.is_terminal:  # let no column wrap in a file
        out = Console(width=200)
    out.print(contents_table(adapter, str(args.file)))
    print(f'holds: {adapter.part}; written by e3va_mm {adapter.version}')
    for prefix, record in adapter.trunks.items():
        print(f'trunk of {prefix or "the backbone"}: {record.source}')
        print(f'  fingerprint {record.fingerprint}')
        if record.sha256:
            print(f'  sha256 of the file {record.sha256}')
    for name, value in (adapter.dataset_meta or {}).items():
        print(f'{name}: {json.dumps(value)}')


def contents_table(adapter: AdapterFile, title: str) -> Table:
    """One row for each part: tensors, values, values that trained, MiB."""
    trained = set(adapter.trainable)
    rows = defaultdict(lambda: [0, 0, 0, 0])
    for key, value in adapter.tensors.items():
        # Of a backbone one part more tells side path from norms, of several
        # tasks their name comes before.
        inside = key.startswith(tuple(adapter.trunks))
        depth = 1 + inside + 2 * key.startswith('tasks.')
        name = '.'.join(key.split('.')[:depth])
        sums = (1, value.numel(), value.numel() * (key in trained))
        for i, each in enumerate((*sums, value.nbytes)):
            rows[name][i] += each
    rows['in all'] = [
        sum(column) for column in zip(*rows.values(), strict=True)
    ]
    table = Table('part', title=title)
    for name in ('tensors', 'values', 'trained', 'MiB'):
        table.add_column(name, justify='right')
    for name, (tensors, values, trains, size) in rows.items():
        table.add_row(
            name,
            *(f'{each:,}' for each in (tensors, values, trains)),
            f'{size / MIB:,.2f}',
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    args = parse_args(argv)
    # What loaders say of each tensor is no news here.
    MMLogger.get_current_instance().setLevel('ERROR')
    commands = dict(
        extract=extract,
        inspect=inspect,
        merge=merge,
        strip=strip,
        task=task,
    )
    commands[args.command](args)


if __name__ == '__main__':
    try:
        main()
    except E3VAError as error:
        sys.exit(f'error: {error}')
