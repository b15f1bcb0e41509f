"""A Runner that writes and reads all that a training checkpoint can hold."""

import time

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        output = self.linear(inputs)
        return {'loss': output.square().sum()} if mode == 'loss' else output


class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'acc': np.float64(0.5)}


class ToyData(torch.utils.data.Dataset):
    metainfo = {'classes': ('a', 'b'), 'palette': np.eye(3, dtype='uint8')}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {'inputs': torch.full((2,), index / 8), 'data_samples': index}


def toy_runner(work_dir, epochs, **kwargs):
    data = {
        'batch_size': 2,
        'num_workers': 0,
        'dataset': ToyData(),
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'collate_fn': {'type': 'default_collate'},
    }
    return Runner(
        model=Toy(),
        work_dir=str(work_dir),
        experiment_name=f'toy{time.monotonic_ns()}',
        log_level='ERROR',
        train_dataloader=data,
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        val_dataloader=dict(data),
        val_cfg={},
        val_evaluator=[ToyMetric()],
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.01}},
        param_scheduler=[
            {'type': 'LinearLR', 'begin': 0, 'end': 3, 'by_epoch': False},
            {'type': 'MultiStepLR', 'milestones': [1, 3]},
            {
                'type': 'OneCycleLR',
                'eta_max': 0.01,
                'total_steps': 40,
                'by_epoch': False,
            },
        ],
        default_hooks={
            'checkpoint': {
                'type': 'CheckpointHook',
                'interval': 1,
                'save_best': 'acc',
                'rule': 'greater',
            }
        },
        custom_hooks=[{'type': 'EMAHook'}],
        **kwargs,
    )
