"""Train the runs whose configs lie in folders on one pass of the trunk.

    python -m e3va_mm.commands.train_folders FOLDER...

``e3va compare`` starts it. Each folder has a ``config.py`` and receives what
the run gives, a file ``diverged`` among it if the run has; the runs go on from
where they were left.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from e3va_mm.commands import launching
from e3va_mm.frameworks.memory import keep_freed_memory
from e3va_mm.sweep import check_together, train_together, turns_of


def main(argv: Sequence[str] | None = None) -> int:
    """Train them; the exit code."""
    parser = argparse.ArgumentParser('train_folders', description=__doc__)
    parser.add_argument('folders', nargs='+', type=Path)
    keep_freed_memory()
    return launching.exit_code(_train, parser.parse_args(argv))


def _train(args: argparse.Namespace) -> None:
    own = dict(cfg_options={}, launcher='none', local_rank=0)
    configs = {}
    for folder in args.folders:
        config = argparse.Namespace(
            config=folder / 'config.py', work_dir=str(folder), **own
        )
        name = f'{folder.parent.name}-{folder.name}'
        configs[name] = launching.load_config(
            config, 'train_dataloader', 'train_cfg', 'optim_wrapper'
        )
    check_together(configs)
    seed = next(iter(configs.values())).randomness.seed
    for turn in turns_of(configs, len(configs)):
        chosen = {name: configs[name] for name in turn}
        for name, how in train_together(chosen, seed).items():
            Path(configs[name].work_dir, 'diverged').write_text(how)


if __name__ == '__main__':
    sys.exit(main())
