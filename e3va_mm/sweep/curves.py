"""The curves that a run has written."""

import json
from pathlib import Path


def scalars(folder: Path) -> list[dict]:
    """All that LocalVisBackend has written in a work folder, in order.

    Records with ``loss`` are those of training, others of validation.

    Args:
        folder (Path): The work folder of a run, interrupted or not.
    """
    found = []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # cut off by a kill
                continue
    return found
