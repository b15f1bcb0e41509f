# Inferencers read a checkpoint before they build the model. This import makes
# them use loaders that run no code from the file.
custom_imports = dict(
    imports=['e3va_mm.checkpoint'], allow_failed_imports=False
)
