import time
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner

from e3va_mm.errors import ConfigError, E3VAError
from e3va_mm.preflight.checks import (
    SECONDS,
    opened,
    require_names,
    run_checks,
)
from e3va_mm.preflight.problems import iter_datasets, raise_errors
from e3va_mm.preflight.samples import CheckedSamples
from e3va_mm.registry import HOOKS
from e3va_mm.utils.batches import images_of
from e3va_mm.utils.unwrapping import unwrapped


@HOOKS.register_module()
class DatasetCheckHook(Hook):
    """Looks at config and data before the first step, and says what is wrong.

    It runs all checks of ``e3va check``, on every annotation and as many
    images and maps as there is time for; ``e3va check`` looks at all of them.
    Files on remote storage (``backend_args``) are not looked at.

    Before training the data of validation is checked, too. While training, a
    file that cannot be decoded and a segmentation map of another size or with
    values without a class end the run with their names.

    Args:
        check_content (bool): Whether to look into images and maps, or only
            whether the files exist. Defaults to True.
        skip (Sequence[str]): Names of checks to leave out; messages end in
            them. Defaults to none.

    Attributes:
        passed (bool): Whether the checks have run to their end.
        batch (list[tuple[str, tuple]]): Images of the newest batch with their
            sizes as the model sees them.

    Raises:
        ConfigError: If options do not fit each other or the data; the text
            names them.
        DataError: If a class, an image or a file is missing or broken; the
            text names it and the option to look at.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self, check_content: bool = True, skip: Sequence[str] = ()
    ) -> None:
        if not isinstance(check_content, bool):
            raise ConfigError(
                'DatasetCheckHook: `check_content` should be True or False, '
                f'but got {check_content!r}.'
            )
        self.check_content = check_content
        self.skip = require_names(skip)
        self.passed = False
        self.batch: list[tuple[str, tuple[int, ...]]] = []

    def before_train(self, runner: Runner) -> None:
        """Checks the data of training and of validation."""
        train = runner.train_dataloader.dataset
        datasets = {'train_dataloader': train}
        if runner.val_loop is not None:
            datasets['val_dataloader'] = runner.val_dataloader.dataset
        self._check(runner, datasets)
        ignored = {
            module.ignore_index
            for module in runner.model.modules()
            if isinstance(getattr(module, 'ignore_index', None), int)
        }
        for option, each in iter_datasets(train, 'train_dataloader.dataset'):
            own = getattr(each, 'prepare_data', None)
            if own is not None and not isinstance(own, CheckedSamples):
                each.prepare_data = CheckedSamples(own, each, option, ignored)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        """Notes which images the step is about."""
        self.batch = list(images_of(data_batch))

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """What fails from here on is not about them."""
        self.batch = []

    def before_val(self, runner: Runner) -> None:
        """Checks the data of a validation outside of training."""
        if not self.passed:
            dataset = runner.val_dataloader.dataset
            self._check(runner, {'val_dataloader': dataset})

    def before_test(self, runner: Runner) -> None:
        """Checks the data of a test."""
        dataset = runner.test_dataloader.dataset
        self._check(runner, {'test_dataloader': dataset})

    def _check(self, runner: Runner, loaded: Mapping[str, Any]) -> None:
        # Were the first rank to raise alone, the others would wait for it.
        found = [None]
        if is_main_process():
            try:
                self._check_here(runner, loaded)
            except E3VAError as error:
                found = [type(error)(str(error))]
        broadcast_object_list(found)
        if found[0] is not None:
            raise found[0]
        self.passed = True

    def _check_here(self, runner: Runner, loaded: Mapping[str, Any]) -> None:
        start = time.monotonic()
        model = unwrapped(runner.model)
        if isinstance(model, BaseTTAModel):
            model = model.module
        datasets = opened(loaded, SECONDS if self.check_content else 0.0)
        raise_errors(run_checks(runner.cfg, datasets, model, self.skip))
        looked = sum(len(each.looks) for each in datasets.values())
        files = sum(len(each.files) for each in datasets.values())
        runner.logger.info(
            f'Checked the data of {", ".join(loaded)}, '
            f'{sum(map(len, datasets.values())):,} samples, {looked:,} of '
            f'{files:,} files, in {time.monotonic() - start:.1f} s'
        )
