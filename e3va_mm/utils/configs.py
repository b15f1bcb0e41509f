"""What configs say, of the old style and of the new one."""

import ast
import json
from collections.abc import Mapping
from hashlib import sha256

from mmengine.config import Config

from e3va_mm.errors import ConfigError


def class_name(config: Mapping) -> str:
    """Name of the class that a config builds, without its scope or module.

    Args:
        config (Mapping): With ``type``, a registered name or, in configs of
            the new style, the class itself; ``''`` without one.

    Examples:
        >>> class_name(dict(type='mmdet.FPN'))
        'FPN'
    """
    kind = config.get('type') or ''
    name = kind if isinstance(kind, str) else kind.__name__
    return name.split('.')[-1]


def configs_in(value: object) -> list[Mapping]:
    """The configs in an option that takes one or several, or none."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in several if isinstance(each, Mapping)]


def content_key(config: Config) -> str:
    """The same 16 characters for configs with the same content."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return sha256(text.encode()).hexdigest()[:16]


def literal_config(text: str, name: str) -> Config:
    """Read a config that holds values alone; nothing of it is run.

    Args:
        text (str): What ``Config.pretty_text`` gives.
        name (str): Where it is from, for messages.

    Raises:
        ConfigError: If it holds anything but values.
    """
    try:
        return Config(
            {
                statement.targets[0].id: _value(statement.value)
                for statement in ast.parse(text).body
            }
        )
    except (AttributeError, IndexError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f'The config in {name} should hold values alone, to be read '
            f'without running code of others, but holds more ({error}). Take '
            'a config that you trust, beside the file.'
        ) from error


def _value(node: ast.expr) -> object:
    """The value of an expression of literals and ``dict(name=...)``."""
    if isinstance(node, ast.Call):
        literal = all(isinstance(each, ast.Dict) for each in node.args)
        if ast.unparse(node.func) != 'dict' or not literal:
            raise ValueError(f'line {node.lineno}: {ast.unparse(node)[:60]}')
        named = {each.arg: _value(each.value) for each in node.keywords}
        return dict(*map(_value, node.args), **named)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _value(each) for key, each in pairs}
    if isinstance(node, (ast.List, ast.Tuple)):
        kind = list if isinstance(node, ast.List) else tuple
        return kind(map(_value, node.elts))
    return ast.literal_eval(node)
