"""Adapter files on the hub of Hugging Face, with a card that says what."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath

from mmengine.config import Config

from e3va_mm.errors import CheckpointError, ConfigError
from e3va_mm.utils.configs import class_name, literal_config
from e3va_mm.utils.sizes import MIB
from e3va_mm.version import __version__
from e3va_mm.weights import AdapterFile, read_adapter
from e3va_mm.weights.hub import ADAPTER

# By the framework of a model.
TASKS = dict(
    mmdet='object-detection',
    mmseg='image-segmentation',
    mmpretrain='image-classification',
)
TEXT = """
# {name}

An adapter file of `e3va_mm`: all of a {model} but its frozen trunk,
{size:.1f} MiB. {trained:,} of its parameters trained.

| | |
|---|---|
| backbone | {backbone}, tuner {tuner} |
| classes | {classes} |
| needs | e3va_mm {version} or newer, {scope} |

{trunks}
{results}
## Use

```bash
e3va infer photos/ --out found --adapter hf://{repository}
e3va adapter pull {repository} adapter.safetensors
e3va test config.py adapter.safetensors
```

`config.py` beside it is the config of the training.
"""


def push(
    path: Path,
    repository: str,
    metrics: Mapping[str, float] | None = None,
    private: bool = False,
) -> str:
    """Upload an adapter file, its config and a model card in one commit.

    Args:
        path (Path): The adapter file.
        repository (str): ``ORG/NAME``; it is made where it is not there.
        metrics (Mapping[str, float], optional): Of an evaluation.
        private (bool): Whether a new repository is. Defaults to False.

    Returns:
        str: URL of the commit.

    Raises:
        CheckpointError: If it is no adapter file of a whole model, or the
            upload fails.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise CheckpointError(
            'Sharing needs huggingface_hub: `pip install huggingface_hub`.'
        ) from None
    adapter = read_adapter(path)
    if adapter.part != 'model' or not adapter.config:
        raise CheckpointError(
            f'{path} should hold a whole model and its config to be shared, '
            'but holds less. Take the file that the training wrote.'
        )
    content = {
        ADAPTER: str(path),
        'config.py': adapter.config.encode(),
        'README.md': card(adapter, path, repository, metrics or {}).encode(),
    }
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return api.create_commit(
            repository,
            [CommitOperationAdd(name, each) for name, each in content.items()],
            commit_message=f'Adapter file of e3va_mm {__version__}',
        ).commit_url
    # No connection, no permission, a bad name.
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise CheckpointError(
            f'{path} cannot be uploaded to {repository} '
            f'({type(error).__name__}: {reason}). Check name and connection, '
            'and log in with a token that may write: `hf auth login`.'
        ) from error


def card(
    adapter: AdapterFile,
    path: Path,
    repository: str,
    metrics: Mapping[str, float],
) -> str:
    """The model card of an adapter file, in Markdown below its metadata.

    Args:
        adapter (AdapterFile): What it is of.
        path (Path): The file.
        repository (str): ``ORG/NAME``.
        metrics (Mapping[str, float]): Of an evaluation.
    """
    from huggingface_hub import EvalResult, ModelCardData

    name = repository.split('/')[-1]
    config = literal_config(adapter.config, str(path))
    scope = config.get('default_scope') or 'mmengine'
    task = TASKS.get(scope)
    classes = (adapter.dataset_meta or {}).get('classes') or ()
    trained = set(adapter.trainable)
    backbone = config.model.get('backbone', {})
    metadata = ModelCardData(
        library_name='e3va_mm',
        pipeline_tag=task,
        tags=['e3va', 'adapter', scope],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task or 'other',
                dataset_type=_dataset(config),
                dataset_name=_dataset(config),
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
        or None,
    )
    rows = [f'| {metric} | {value:g} |' for metric, value in metrics.items()]
    text = TEXT.format(
        name=name,
        repository=repository,
        model=class_name(config.model),
        size=path.stat().st_size / MIB,
        trained=sum(
            value.numel()
            for key, value in adapter.tensors.items()
            if key in trained
        ),
        backbone=class_name(backbone.get('trunk', backbone)),
        tuner=class_name(backbone.get('tuner') or {}) or 'E3VA',
        classes=', '.join(map(str, classes)) or '-',
        version=adapter.version,
        scope=scope,
        trunks='\n'.join(map(_trunk, adapter.trunks.values())),
        results='\n'.join(
            ['', '| metric | value |', '|---|---:|', *rows, ''] if rows else []
        ),
    )
    return f'---\n{metadata.to_yaml()}\n---\n{text}'


def _trunk(record) -> str:
    """Where a trunk is, without the folders of one's own machine."""
    source = record.source or 'its stock class'
    if '://' not in source:
        source = f'the file {PurePath(source).name}, to be put beside this one'
    return (
        f'The trunk is read from {source}, and is recognised by its '
        f'fingerprint `{record.fingerprint}`.'
    )


def _dataset(config: Config) -> str:
    """The class of the data that it was evaluated on."""
    loader = config.get('test_dataloader') or {}
    return class_name(loader.get('dataset') or {}) or 'unknown'


def config_of(path: str | os.PathLike) -> Config:
    """The config in an adapter file, read without running anything.

    Args:
        path: The adapter file, as of :func:`~e3va_mm.weights.read_adapter`.

    Raises:
        ConfigError: If there is none, or it holds more than values.
    """
    text = read_adapter(path).config
    if not text:
        raise ConfigError(
            f'{path} holds no config. Give yours: --task NAME=CONFIG.py:FILE'
        )
    return literal_config(text, str(path))
