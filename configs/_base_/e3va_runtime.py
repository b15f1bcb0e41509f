# Hooks that every E3VA config has beside those of its stock config.
custom_hooks = [
    dict(type='e3va_mm.DatasetCheckHook'),
    dict(type='e3va_mm.TrainableTableHook'),
    dict(type='e3va_mm.ProgressBarHook'),
]
