# Inferencers read a checkpoint before they build the model: with this, through
# the loaders that run no code in it.
custom_imports = dict(
    imports=['e3va_mm.checkpoint'], allow_failed_imports=False
)
