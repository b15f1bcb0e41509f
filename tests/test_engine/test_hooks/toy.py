"""Runs of a few milliseconds, as configs: random samples, norms, dropout."""

import random

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn

from e3va_mm.utils.tuned import TunedModule

COUNT = 5


@DATASETS.register_module()
class ToyData:
    """Five samples with numbers from each of the generators."""

    metainfo = dict(classes=('a',))

    def __init__(self, count=COUNT):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        inputs = torch.rand(3, 4) + index + random.random() + np.random.rand()
        return dict(inputs=inputs, index=index)


class ToyTrunk(nn.Linear, TunedModule):
    """A frozen layer that knows where its weights came from."""

    trunk_source = trunk_address = '/toy/trunk.pth'
    has_graph = False

    def trunk_state(self):
        return self.trunk_part(self.state_dict())

    def trunk_part(self, state):
        return {key: state[key] for key in ('weight', 'bias')}

    def declared(self):
        return iter(())

    trainable_children = declared


@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = ToyTrunk(4, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 1)
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn)

    def forward(self, inputs, index=None, mode='tensor'):
        x = self.dropout(self.norm(self.trunk(torch.cat(inputs))))
        output = self.head(x)
        if mode == 'predict':
            return [dict(value=value.item()) for value in output]
        return dict(loss=output.square().mean())


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """The mean of what the model gives."""

    def process(self, data_batch, data_samples):
        self.results += [sample['value'] for sample in data_samples]

    def compute_metrics(self, results):
        return dict(mean=float(np.mean(results)))


VALIDATION = dict(
    val_dataloader=dict(
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='ToyData'),
    ),
    val_cfg=dict(),
    val_evaluator=dict(type='ToyMetric'),
)


def toy_config(**options):
    """Seven iterations of two samples, a checkpoint after each.

    Options with a dot in their name change a part, others the whole.
    """
    config = dict(
        model=dict(type='ToyModel'),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='InfiniteSampler', shuffle=True),
            dataset=dict(type='ToyData'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=7),
        optim_wrapper=dict(
            type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2)
        ),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4),
            dict(type='PolyLR', power=0.9, begin=4, end=20, by_epoch=False),
        ],
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)
        ),
        custom_hooks=[],
        randomness=dict(seed=3),
    )
    config = Config(config)
    for name, value in options.items():
        if '.' in name:
            config.merge_from_dict({name: value})
        else:
            config[name] = value
    return config
