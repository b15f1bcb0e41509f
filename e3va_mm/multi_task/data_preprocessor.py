from collections.abc import Mapping

from mmengine.model import BaseDataPreprocessor
from torch import nn


class MultiTaskDataPreprocessor(BaseDataPreprocessor):
    """Has the batch of each task prepared by its own model's preprocessor.

    Args:
        tasks (Mapping[str, nn.Module]): Those of the models, by task.
    """

    def __init__(self, tasks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(tasks)

    def forward(self, data: dict, training: bool = False) -> tuple[dict]:
        """Batches by task -> the same prepared, as the one argument.

        Args:
            data (dict): Of each task ``inputs`` and ``data_samples``.
            training (bool): Whether they train. Defaults to False.
        """
        prepared = {
            name: self.tasks[name](batch, training)
            for name, batch in data.items()
        }
        return (prepared,)
