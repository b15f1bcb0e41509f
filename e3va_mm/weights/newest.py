"""Find what to resume from where ``last_checkpoint`` is of no use."""

import zipfile
from pathlib import Path


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that a killed writer has left whole.

    mmengine's CheckpointHook writes in place: ``last_checkpoint`` can be empty
    or name a file that is gone, and a ``.pth`` can lack its end.

    Args:
        folder (Path): The work folder of a run.

    Returns:
        Path, optional: What ``last_checkpoint`` names, if that is whole, else
        the newest ``epoch_*.pth`` or ``iter_*.pth``. None if there is no
        whole one. Only the end of a file is looked at.
    """
    last = folder / 'last_checkpoint'
    named = Path(last.read_text().strip()) if last.is_file() else Path()
    # Some strategies write folders.
    if named != Path() and (named.is_dir() or zipfile.is_zipfile(named)):
        return named
    found = [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]
    whole = [path for path in found if zipfile.is_zipfile(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)
