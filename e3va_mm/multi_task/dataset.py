from collections.abc import Mapping

from mmengine.registry import DefaultScope
from torch.utils.data import Dataset

from e3va_mm.multi_task.task_configs import task_configs
from e3va_mm.registry import DATASETS


@DATASETS.register_module()
class MultiTaskDataset(Dataset):
    """One sample of each task, side by side.

    As long as the longest data set; the others begin again where they end.

    Args:
        tasks (Mapping[str, str | Mapping]): Configs with a
            ``train_dataloader``, or their paths, by the name of the task.

    Attributes:
        tasks (dict[str, Dataset]): The data sets, by the name of the task.

    Raises:
        ConfigError: If a task is none.
    """

    def __init__(self, tasks: Mapping[str, str | Mapping]) -> None:
        self.tasks = {}
        for name, config in task_configs(tasks).items():
            with DefaultScope.overwrite_default_scope(config.default_scope):
                self.tasks[name] = DATASETS.build(
                    config.train_dataloader.dataset
                )

    @property
    def metainfo(self) -> dict:
        """What each data set says of itself, by the name of the task."""
        return {
            name: getattr(dataset, 'metainfo', {})
            for name, dataset in self.tasks.items()
        }

    def full_init(self) -> None:
        """Read all annotations."""
        for dataset in self.tasks.values():
            dataset.full_init()

    def __len__(self) -> int:
        return max(map(len, self.tasks.values()))

    def __getitem__(self, index: int) -> dict:
        return {
            name: dataset[index % len(dataset)]
            for name, dataset in self.tasks.items()
        }
