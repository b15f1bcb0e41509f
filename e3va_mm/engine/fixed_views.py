"""A data set of which each image has a fixed number of random views."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_rank
from torch.utils.data import Dataset

from e3va_mm.engine.seeds import generator_states, seed_all, set_generators
from e3va_mm.errors import ConfigError
from e3va_mm.registry import DATASETS
from e3va_mm.utils.values import is_whole


@DATASETS.register_module()
class FixedViews(Dataset):
    """Draws the random augmentation of each image ``views`` times, for good.

    The random numbers of any pipeline come from the index of the image and the
    number of the view; boxes and masks go with the pixels. An image gives its
    views in turn, one each time it is asked for; each process of a distributed
    run counts by itself and begins with another view.

    Args:
        dataset (Mapping | Dataset): The data set, or its config.
        views (int, optional): Views of an image. Defaults to those of the
            model's ``trunk_cache``, without one to no limit.
        seed (int): Other seeds give other views. Defaults to 0.

    Attributes:
        dataset (Dataset): The data set.

    Raises:
        ConfigError: If ``views`` is no whole number above zero.

    Examples:
        >>> train_dataloader = dict(
        ...     dataset=dict(
        ...         _delete_=True,
        ...         type='e3va_mm.FixedViews',
        ...         dataset=_base_.train_dataloader.dataset,
        ...     )
        ... )
    """

    def __init__(
        self,
        dataset: Mapping | Dataset,
        views: int | None = None,
        seed: int = 0,
    ) -> None:
        if views is not None and not is_whole(views):
            raise ConfigError(
                'FixedViews: `views` should be a whole number from 1 on, but '
                f'got {views!r}.'
            )
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dataset)
        self.dataset, self.views, self.seed = dataset, views, seed
        # How often each image was asked for; data workers share it.
        self._asked = torch.zeros(len(dataset), dtype=torch.int32)
        self._asked.share_memory_()
        # Images change their process from epoch to epoch.
        self._first = get_rank()

    @property
    def metainfo(self) -> Mapping:
        """That of the data set."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read all annotations, where a data set does that late."""
        getattr(self.dataset, 'full_init', lambda: None)()

    def get_data_info(self, index: int) -> dict:
        """That of the data set."""
        return self.dataset.get_data_info(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.views is None:
            return self.dataset[index]
        asked = int(self._asked[index])
        self._asked[index] = asked + 1
        return self.view(index, (self._first + asked) % self.views)

    def view(self, index: int, view: int) -> Any:
        """One view of an image, always the same.

        Args:
            index (int): Index of the image.
            view (int): Number of the view.
        """
        states = generator_states()
        seed_all([self.seed, index, view])
        try:
            return self.dataset[index]
        finally:
            set_generators(states)
