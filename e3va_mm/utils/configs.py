"""What configs say, of the old style and of the new one."""

import json
from collections.abc import Mapping
from hashlib import sha256

from mmengine.config import Config


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


def content_key(config: Config) -> str:
    """The same 16 characters for configs with the same content."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=repr)
    return sha256(text.encode()).hexdigest()[:16]
