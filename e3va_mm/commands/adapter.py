"""Make, inspect and merge adapter files: a model without its frozen trunk.

    e3va adapter extract CHECKPOINT OUT --config CONFIG
    e3va adapter inspect FILE
    e3va adapter merge CONFIG FILE OUT
    e3va adapter strip FILE OUT
    e3va adapter task FILE NAME CONFIG OUT
    e3va adapter push FILE ORG/NAME [--metrics JSON] [--private]
    e3va adapter pull ORG/NAME OUT

FILE, but that of push, may be e3va_mm://NAME, which comes with the package.
OUT of merge is a .pth file, else a .safetensors file. merge writes a full
checkpoint under the stock names, with the side path's keys beside. A stock
model loads it too, and has then the trained norms, neck and heads, but no side
path: what it gives is not what was trained. push and pull share a file on the
hub of Hugging Face, with its config and a model card.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from mmengine.runner import load_checkpoint
from rich.console import Console
from rich.table import Table

from e3va_mm.apis.sharing import push
from e3va_mm.commands import launching
from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.frameworks.loaders import whole_checkpoint
from e3va_mm.utils.files import MIB, write_whole
from e3va_mm.weights import (
    AdapterFile,
    adapter_of,
    read_adapter,
    trunk_records,
)
from e3va_mm.weights.hub import ADAPTER, fetch


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e3va adapter``; arguments and result as of ``train.main``."""
    parser = argparse.ArgumentParser(
        'e3va adapter',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)

    def add(run, text: str, *names: str, suffix: str = '.safetensors'):
        command = commands.add_parser(run.__name__.strip('_'), help=text)
        command.set_defaults(run=run, suffix=suffix)
        for name in names:
            # A path would make one slash of the two in e3va_mm://NAME.
            kind = str if name == 'file' else Path
            command.add_argument(name, type=kind)
        return command

    text = 'adapter file of a full checkpoint'
    extract = add(_extract, text, 'checkpoint', 'out')
    extract.add_argument('--config', type=Path, required=True)
    text = "the file of the trunk's weights (default: that of the config)"
    extract.add_argument('--trunk', metavar='PATH_OR_URL', help=text)
    inspect = add(_inspect, 'show what a file holds', 'file')
    text = 'print the text of the config alone'
    inspect.add_argument('--config', action='store_true', help=text)
    text = 'full checkpoint of trunk and adapter file'
    merge = add(_merge, text, 'config', 'file', 'out', suffix='.pth')
    add(_strip, "drop neck and heads, keep the backbone's part", 'file', 'out')
    text = 'the part of one of several tasks that trained together'
    task = add(_task, text, 'file', 'name', 'config', 'out')
    text = 'upload to the hub of Hugging Face, with a model card'
    push = add(_push, text, 'file')
    push.add_argument('repository', metavar='ORG/NAME')
    text = 'figures for the card: a JSON file by metric, as e3va test writes'
    push.add_argument('--metrics', type=Path, help=text)
    text = 'make a new repository private'
    push.add_argument('--private', action='store_true', help=text)
    pull = add(_pull, 'download from the hub of Hugging Face')
    pull.add_argument('repository', metavar='ORG/NAME[@REVISION]')
    pull.add_argument('out', type=Path)
    for command in (extract, merge, task):
        command.add_argument(
            '--cfg-options', nargs='+', action=launching.Options
        )
    return launching.exit_code(_run, parser.parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    # What loaders say of each tensor is no news here.
    MMLogger.get_current_instance().setLevel('ERROR')
    if 'out' in args and args.out.suffix != args.suffix:
        raise ConfigError(
            f'OUT should end in {args.suffix}, but got {args.out}.'
        )
    if 'cfg_options' in args:
        args.config = launching.read_config(args.config, args.cfg_options)
    args.run(args)


def _extract(args: argparse.Namespace) -> None:
    launching.check_checkpoint(args.checkpoint)
    if args.trunk:
        args.config.model.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=args.trunk
        )
    model = launching.build_model(args.config)
    model.init_weights()
    source = str(args.checkpoint)
    with whole_checkpoint(source):
        checkpoint = load_checkpoint(model, source, 'cpu')
    try:
        trunks = trunk_records(model)
    except ConfigError as error:
        raise ConfigError(f'{error} Or use --trunk PATH_OR_URL.') from None
    size = adapter_of(
        model,
        trunks,
        config=args.config.pretty_text,
        dataset_meta=checkpoint.get('meta', {}).get('dataset_meta'),
    ).write(args.out)
    full = args.checkpoint.stat().st_size
    print(f'{args.out}: {size / MIB:,.1f} of {full / MIB:,.1f} MiB')


def _merge(args: argparse.Namespace) -> None:
    if read_adapter(args.file).part != 'model':
        raise CheckpointError(
            f'{args.file} holds no neck and heads, so no full checkpoint '
            'comes of it. Take the file that it was stripped from.'
        )
    model = launching.build_model(args.config)
    meta = dict(load_checkpoint(model, args.file, 'cpu')['meta'])
    content = BytesIO()
    torch.save(dict(meta=meta, state_dict=model.state_dict()), content)
    write_whole(args.out, content.getvalue())
    print(
        f'{args.out}: {content.tell() / MIB:,.1f} MiB. A stock model that '
        'loads it leaves out the side path and gives something else.'
    )


def _strip(args: argparse.Namespace) -> None:
    size = read_adapter(args.file).without_heads().write(args.out)
    print(f'{args.out}: {size / MIB:,.1f} MiB, the part of the backbone')


def _task(args: argparse.Namespace) -> None:
    name = str(args.name)
    adapter = read_adapter(args.file).of_task(name, args.config.pretty_text)
    size = adapter.write(args.out)
    print(f'{args.out}: {size / MIB:,.1f} MiB, the task {name!r}')


def _push(args: argparse.Namespace) -> None:
    metrics = {}
    if args.metrics:
        try:
            metrics = json.loads(args.metrics.read_text())
            metrics = {key: float(value) for key, value in metrics.items()}
        except (AttributeError, OSError, TypeError, ValueError) as error:
            raise ConfigError(
                '--metrics should be a JSON file of numbers by metric, as '
                f'`e3va test` writes, but {args.metrics} is not: {error}.'
            ) from error
    print(push(Path(args.file), args.repository, metrics, args.private))


def _pull(args: argparse.Namespace) -> None:
    path = fetch(f'hf://{args.repository}/{ADAPTER}')
    read_adapter(path)  # whole, and of a version that is known
    write_whole(args.out, path.read_bytes())
    print(f'{args.out}: {args.out.stat().st_size / MIB:,.1f} MiB')


def _inspect(args: argparse.Namespace) -> None:
    adapter = read_adapter(args.file)
    if args.config:
        print(adapter.config)
        return
    out = Console()
    if not out.is_terminal:  # let no column wrap in a file
        out = Console(width=200)
    out.print(_table(adapter, args.file))
    print(f'holds: {adapter.part}; written by e3va_mm {adapter.version}')
    for prefix, record in adapter.trunks.items():
        print(f'trunk of {prefix or "the backbone"}: {record.source}')
        print(f'  fingerprint {record.fingerprint}')
        if record.sha256:
            print(f'  sha256 of the file {record.sha256}')
    for name, value in (adapter.dataset_meta or {}).items():
        print(f'{name}: {json.dumps(value)}')


def _table(adapter: AdapterFile, title: str) -> Table:
    """One row for each part: tensors, values, values that trained, MiB."""
    trained = set(adapter.trainable)
    rows = defaultdict(lambda: [0, 0, 0, 0])
    for key, value in adapter.tensors.items():
        # Of a backbone one part more tells side path from norms, of several
        # tasks their name comes before.
        inside = key.startswith(tuple(adapter.trunks))
        depth = 1 + inside + 2 * key.startswith('tasks.')
        size = value.numel()
        sums = (1, size, size * (key in trained), value.nbytes)
        for name in ('.'.join(key.split('.')[:depth]), 'in all'):
            rows[name] = [a + b for a, b in zip(rows[name], sums, strict=True)]
    rows['in all'] = rows.pop('in all')  # the last
    table = Table('part', title=title)
    for name in ('tensors', 'values', 'trained', 'MiB'):
        table.add_column(name, justify='right')
    for name, (*counts, size) in rows.items():
        texts = [f'{count:,}' for count in counts]
        table.add_row(name, *texts, f'{size / MIB:,.2f}')
    return table
