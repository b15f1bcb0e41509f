"""Patterns that select parts of a model by their exact paths."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from torch import nn

from e3va_mm.errors import ConfigError


def matching(pattern: str, paths: Collection[str], what: str) -> list[str]:
    """The paths that a pattern fits, at least one.

    Args:
        pattern (str): A path such as ``'roi_head.bbox_head.*'``. ``*`` stands
            for any one part; nothing else has a meaning of its own, and
            nothing is found by a piece of its name.
        paths (Collection[str]): What there is to select from.
        what (str): What these are, for the message: ``'module of RetinaNet'``.

    Returns:
        list[str]: The paths that fit, in their order.

    Raises:
        ConfigError: If none fits; the nearest are named.

    Examples:
        >>> matching('neck.*', ['neck', 'neck.0', 'neck.1'], 'module')
        ['neck.0', 'neck.1']
    """
    parts = pattern.split('.')
    found = [path for path in paths if _fits(parts, path.split('.'))]
    if found:
        return found
    near = get_close_matches(pattern, paths, n=5, cutoff=0.5)
    if not near:
        near = [path for path in paths if '.' not in path]
    raise ConfigError(
        f'No {what} fits the path {pattern!r}. '
        f'Nearest are: {", ".join(near) or "none at all"}.'
    )


def check_patterns(patterns: Sequence[str], option: str) -> None:
    """Refuse what is no list of patterns.

    Args:
        patterns (Sequence[str]): The value of an option.
        option (str): Its name, for the message.

    Raises:
        ConfigError: If the value is no list or tuple of strings.
    """
    if not isinstance(patterns, (list, tuple)) or not all(
        isinstance(each, str) for each in patterns
    ):
        hint = f' Write [{patterns!r}].' if isinstance(patterns, str) else ''
        raise ConfigError(
            f'{option} should be a list of paths, but got {patterns!r}.{hint}'
        )


def select(
    model: nn.Module, patterns: Sequence[str]
) -> dict[str, nn.Module | nn.Parameter]:
    """Modules and parameters of a model that patterns fit, by their paths.

    Raises:
        ConfigError: If a pattern fits none.
    """
    parts = {
        **dict(model.named_modules(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    del parts['']
    what = f'module or parameter of {type(model).__name__}'
    return {
        path: parts[path]
        for pattern in patterns
        for path in matching(pattern, parts, what)
    }


def parameters_of(
    *parts: nn.Module | nn.Parameter,
) -> set[nn.Parameter]:
    """Parameters among parts of a model, and those of its modules there."""
    return {
        parameter
        for part in parts
        for parameter in (
            part.parameters() if isinstance(part, nn.Module) else [part]
        )
    }


def _fits(parts: Sequence[str], path: Sequence[str]) -> bool:
    return len(parts) == len(path) and all(
        part in ('*', given) for part, given in zip(parts, path, strict=True)
    )
