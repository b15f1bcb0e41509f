from e3va_mm.engine.hooks.activation_checkpoint_hook import (
    ActivationCheckpointHook,
)
from e3va_mm.engine.hooks.adapter_checkpoint_hook import AdapterCheckpointHook
from e3va_mm.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from e3va_mm.engine.hooks.exact_resume_hook import ExactResumeHook
from e3va_mm.engine.hooks.freeze_hook import FreezeHook
from e3va_mm.engine.hooks.progress_bar_hook import ProgressBarHook
from e3va_mm.engine.hooks.resume_check_hook import ResumeCheckHook
from e3va_mm.engine.hooks.trainable_ema_hook import TrainableEMAHook
from e3va_mm.engine.hooks.trainable_table_hook import TrainableTableHook
from e3va_mm.engine.hooks.training_guard_hook import TrainingGuardHook
from e3va_mm.engine.hooks.trunk_cache_hook import TrunkCacheHook

__all__ = [
    'ActivationCheckpointHook',
    'AdapterCheckpointHook',
    'AtomicCheckpointHook',
    'ExactResumeHook',
    'FreezeHook',
    'ProgressBarHook',
    'ResumeCheckHook',
    'TrainableEMAHook',
    'TrainableTableHook',
    'TrainingGuardHook',
    'TrunkCacheHook',
]
