import json
import shutil
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from e3va_mm.backbones.trunk_cache import RESERVE, Entry
from e3va_mm.backbones.trunk_pass import trunk_facts
from e3va_mm.engine.fixed_views import FixedViews
from e3va_mm.errors import ConfigError
from e3va_mm.registry import HOOKS
from e3va_mm.utils.sizes import GIB, MIB
from e3va_mm.utils.tuned import side_path_backbones
from e3va_mm.utils.unwrapping import unwrapped

# Images whose sizes are looked at.
SAMPLES = 8
WRAP = (
    'train_dataloader = dict(dataset=dict(_delete_=True, '
    "type='e3va_mm.FixedViews', dataset=_base_.train_dataloader.dataset))"
)


@HOOKS.register_module()
class TrunkCacheHook(Hook):
    """Opens the ``trunk_cache`` of a backbone, if it will work and fit.

    Before the first step it passes a view through the trunk, says how many
    bytes all views take, how many are free and what time an image saves, and
    refuses

    * what does not fit the disk beside 1 GiB that is left to others;
    * a pipeline that gives other pixels for the same random numbers;
    * images that batches pad to sizes of their own: their pixels would be new
      in every epoch.

    The training set must be a :class:`~e3va_mm.engine.fixed_views.FixedViews`.

    Raises:
        ConfigError: See above.
    """

    def before_train(self, runner: Runner) -> None:
        """Look at data and disk, and open the cache."""
        model = unwrapped(runner.model)
        found = [
            backbone
            for _, backbone in side_path_backbones(model)
            if backbone.trunk_cache is not None
        ]
        if not found or not all(
            each.shares_trunk_with(found[0])
            and each.trunk_cache.options == found[0].trunk_cache.options
            for each in found
        ):
            raise ConfigError(
                'TrunkCacheHook expects a backbone with '
                "`trunk_cache=dict(dir='PATH', views=4)`, or several on one "
                f'trunk with the same, but got {len(found)}. Set it there, or '
                'leave the hook out.'
            )
        dataset = runner.train_dataloader.dataset
        options = found[0].trunk_cache.options
        if not isinstance(dataset, FixedViews):
            raise ConfigError(
                'trunk_cache expects a training set whose random views are '
                f'fixed, but got {type(dataset).__name__}. Add, in a config '
                f'with this one as its _base_:\n{WRAP}'
            )
        if dataset.views not in (None, options.views):
            raise ConfigError(
                f'FixedViews has views={dataset.views} and trunk_cache '
                f'views={options.views}. Leave the former out.'
            )
        dataset.views = options.views
        # Were the first rank to raise alone, the others would wait for it.
        message: list[Any] = [None]
        if is_main_process():
            try:
                message = [self._folder(runner, found, dataset)]
            except Exception as error:
                message = [error]
        broadcast_object_list(message)
        if isinstance(message[0], Exception):
            raise message[0]
        entries = len(dataset) * options.views
        for each in found:
            each.trunk_cache.open(message[0], entries)

    def _folder(
        self,
        runner: Runner,
        backbones: Sequence[nn.Module],
        dataset: FixedViews,
    ) -> Path:
        """The folder of the entries, checked; says what they cost."""
        backbone = backbones[0]
        cache = backbone.trunk_cache
        views, count = cache.options.views, len(dataset)
        folder = Path(cache.options.dir).expanduser() / _digest(
            runner.cfg, backbones
        )
        images = [
            self._image(runner, dataset, i)
            for i in range(0, count, -(-count // SAMPLES))
        ]
        self._check(runner, dataset, images)
        image = max(images, key=Tensor.numel)
        mean = sum(map(Tensor.numel, images)) / len(images) / image.numel()
        entry, live = _timed(image, lambda: _record(backbone, image))
        _, cached = _timed(image, lambda: _replay(backbone, image, entry))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                'trunk_cache expects a folder that can be made and written '
                f'in, but got {folder}: {error}. Set `dir` to another.'
            ) from None
        there = cache.count(folder)
        needed = round(max(0, count * views - there) * entry.size * mean)
        free = max(0, shutil.disk_usage(folder).free - RESERVE)
        text = (
            f'trunk_cache: {views} views of {count:,} images in '
            f'{cache.options.dtype}, about {entry.size * mean / MIB:,.1f} MiB '
            f'each; {there:,} are there, the others need '
            f'{needed / GIB:,.2f} GiB of {free / GIB:,.2f} GiB free at '
            f'{folder}'
        )
        if needed > free:
            fit = int((free / (entry.size * mean) + there) // count)
            ways = [f'views={fit}'] * bool(fit)
            ways += ["dtype='int4'"] * (cache.options.dtype != 'int4')
            raise ConfigError(
                f'{text}. Expected all of them to fit, and '
                f'{RESERVE / GIB:g} GiB to be left. Set '
                f'{" or ".join([*ways, "`dir` on another disk"])}.'
            )
        saved = max(live - cached, 1e-9)
        runner.logger.info(
            f'{text}. The trunk takes {live:.2f} s for an image, an entry '
            f'{cached:.2f} s and its reading: less from a disk of '
            f'{entry.size / saved / MIB:,.0f} MiB/s on.'
        )
        return folder

    def _image(
        self, runner: Runner, dataset: FixedViews, index: int
    ) -> Tensor:
        """(1, 3, H, W): a view as the backbone sees it in a batch of one."""
        model = unwrapped(runner.model)
        batch = runner.train_dataloader.collate_fn([dataset.view(index, 0)])
        found = model.data_preprocessor(batch, True)
        inputs = found.get('inputs') if isinstance(found, Mapping) else None
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise ConfigError(
                'trunk_cache expects batches of images (B, 3, H, W) under '
                f'`inputs`, but {type(model).__name__} has others.'
            )
        return inputs

    def _check(
        self, runner: Runner, dataset: FixedViews, images: list[Tensor]
    ) -> None:
        if not torch.equal(images[0], self._image(runner, dataset, 0)):
            raise ConfigError(
                'trunk_cache expects a pipeline that draws from the global '
                'random numbers of random, numpy or torch, but the same view '
                'has other pixels the second time. Leave out transforms with '
                'memory or numbers of their own (CachedMosaic, CachedMixUp, '
                'Albu).'
            )
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        loader = runner.train_dataloader
        sampler = loader.batch_sampler  # of mmdet, one of its own
        batch = getattr(sampler, 'batch_size', loader.batch_size)
        if len(sizes) > 1 and batch != 1:
            height, width = (max(side) for side in zip(*sizes, strict=True))
            raise ConfigError(
                'trunk_cache expects images of one size, as batches pad them '
                'to sizes that change with their neighbours, but got '
                f'{", ".join(f"{h}x{w}" for h, w in sizes[:3])}. Set '
                'batch_size=1 and accumulative_counts, or pad all to the '
                'largest, in mmdet with model.data_preprocessor.batch_augments'
                "=[dict(type='BatchFixedSizePad', "
                f'size=({height}, {width}))].'
            )


def _digest(config: Mapping, backbones: Sequence[nn.Module]) -> str:
    """Of weights and options of the trunk, form of entries and the data."""
    backbone = backbones[0]
    wrapper = config.get('optim_wrapper') or {}
    facts = dict(
        taps=sorted({tap for each in backbones for tap in each.tuner.taps}),
        autocast=[wrapper.get(key) for key in ('type', 'dtype')],
        weights=backbone.trunk_fingerprint(),
        trunk={key: repr(v) for key, v in trunk_facts(backbone).items()},
        dtype=backbone.trunk_cache.options.dtype,
        data=(config.get('train_dataloader') or {}).get('dataset'),
        preprocessor=(config.get('model') or {}).get('data_preprocessor'),
    )
    text = json.dumps(facts, sort_keys=True, default=repr)
    return sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def _record(backbone: nn.Module, image: Tensor) -> Entry:
    (entry,) = backbone.trunk_cache.record(
        backbone.trunk, image, backbone.tuner.taps
    )
    return entry


def _replay(backbone: nn.Module, image: Tensor, entry: Entry) -> None:
    backbone.trunk_cache.replay(
        [entry],
        image.device,
        len(backbone.trunk.blocks) - 1,
        lambda *tap: None,
        lambda *end: None,
    )


def _timed(image: Tensor, action: Any) -> tuple[Any, float]:
    """What an action gives, and the seconds it takes."""
    start = time.perf_counter()
    result = action()
    if image.is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
