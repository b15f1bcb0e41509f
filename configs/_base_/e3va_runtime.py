# The hooks of every E3VA config, beside those of its stock config. Checkpoints
# are written by `default_hooks.checkpoint`, which each config sets itself:
# mmengine accepts a key from only one of several bases.
custom_hooks = [
    dict(type='e3va_mm.DatasetCheckHook'),
    dict(type='e3va_mm.TrainableTableHook'),
    dict(type='e3va_mm.ProgressBarHook'),
    dict(type='e3va_mm.TrainingGuardHook'),
    dict(type='e3va_mm.ResumeCheckHook'),
]
