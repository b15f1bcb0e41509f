"""Several CPU processes under mmengine, which takes GPUs for granted."""

import os
import subprocess

import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm


class GlooDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper with BN in place of SyncBN, which gloo lacks.

    Args:
        module (nn.Module): The model.
        **kwargs: Those of ``MMDistributedDataParallel``.
    """

    def __init__(self, module, **kwargs) -> None:
        kept = set(module.modules())
        module = revert_sync_batchnorm(module)
        converted = len(set(module.modules()) - kept)
        if converted:
            print_log(
                f'SyncBN needs GPUs: {converted} layers run as BN, over the '
                'images of each process alone.',
                'current',
            )
        super().__init__(module, **kwargs)


def use_gloo(config: Config) -> None:
    """Let the processes of a job train without an accelerator.

    mmengine would set a CUDA device for any backend, unless the process group
    exists already, and pass device ids that only an accelerator has.

    Args:
        config (Config): Names its ``launcher``; ``model_wrapper_cfg`` is set.
    """
    if config.launcher == 'slurm':
        _set_slurm_variables()
    if not dist.is_initialized():
        dist.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=config.get('find_unused_parameters', False),
    )
    wrapper.update(config.get('model_wrapper_cfg') or {}, device_ids=None)
    if wrapper['type'] == 'MMDistributedDataParallel':
        wrapper['type'] = 'e3va_mm.GlooDistributedDataParallel'
    config.model_wrapper_cfg = wrapper


def _set_slurm_variables() -> None:
    """Tell a process of srun what torchrun would tell it."""
    env = os.environ
    if 'MASTER_ADDR' not in env:
        names = subprocess.check_output(
            ['scontrol', 'show', 'hostnames', env['SLURM_NODELIST']], text=True
        )
        env['MASTER_ADDR'] = names.split()[0]
    env.setdefault('MASTER_PORT', '29500')
    env['RANK'] = env['SLURM_PROCID']
    env['WORLD_SIZE'] = env['SLURM_NTASKS']
    env['LOCAL_RANK'] = env['SLURM_LOCALID']
