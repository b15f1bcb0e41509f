"""The command ``e3va``: one subcommand for each module of ``commands``."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from e3va_mm.version import __version__

COMMANDS = dict(
    train='train a detector, segmentor or classifier by its config',
    test='evaluate a checkpoint or an adapter file',
    check='look for trouble in config and data before a training',
    measure='measure memory and time of a training step',
    sweep='train many runs of one config on one pass of the trunk',
    compare='train and compare several methods on the same data',
    infer='run one or many tasks on images and videos, on one trunk',
    adapter='make, inspect and merge adapter files',
    export='write the network for torch.export or ONNX',
    doctor='show what is installed and what does not fit together',
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv (Sequence[str], optional): Arguments of the command line.
            Defaults to those of this process.

    Returns:
        int: The exit code.
    """
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        'e3va',
        description='E3VA: adapt a large vision backbone to detection or '
        'segmentation.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='\n'.join(
            ['commands:']
            + [f'  {name:{width}}  {text}' for name, text in COMMANDS.items()]
            + ['', 'e3va COMMAND --help has more.']
        ),
    )
    parser.add_argument(
        '--version', action='version', version=f'e3va_mm {__version__}'
    )
    parser.add_argument(
        'command', choices=COMMANDS, metavar='COMMAND', help='see below'
    )
    parser.add_argument(
        'arguments', nargs=argparse.REMAINDER, metavar='...', help='its own'
    )
    args = parser.parse_args(argv)
    # Lazily: a command needs frameworks that others do without.
    command = import_module(f'e3va_mm.commands.{args.command}')
    return command.main(args.arguments)


if __name__ == '__main__':
    sys.exit(main())
