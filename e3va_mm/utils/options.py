"""Options as data classes: their fields are declared, checked and documented.

    @dataclass(frozen=True, kw_only=True)
    class LoRAOptions(Options):
        rank: int = option(64, whole(1))

A value that does not fit raises ConfigError with the name of the option as it
stands in a config, what was expected and what was received.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar, NamedTuple

from e3va_mm.errors import ConfigError
from e3va_mm.utils.values import is_number, is_whole


class Check(NamedTuple):
    """A test of a value, and what it asks for in words."""

    fits: Callable[[Any], bool]
    what: str


def option(default: Any = MISSING, check: Check | None = None) -> Any:
    """A field of :class:`Options`."""
    return field(default=default, metadata=dict(check=check))


class Options:
    """Base of option data classes.

    Raises:
        ConfigError: If a value does not pass the check of its field.
    """

    # What messages put before the name of an option.
    PREFIX: ClassVar[str] = 'tuner.'

    def __post_init__(self) -> None:
        for each in fields(self):
            check = each.metadata.get('check')
            value = getattr(self, each.name)
            if check is not None and not check.fits(value):
                raise ConfigError(
                    f'`{self.PREFIX}{each.name}` should be {check.what}, '
                    f'but got {value!r}.'
                )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the options."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def of(cls, config: Mapping) -> Any:
        """The options of a config.

        Raises:
            ConfigError: If an option is unknown, missing or out of range.
        """
        unknown = [key for key in config if key not in cls.names()]
        missing = [
            each.name
            for each in fields(cls)
            if each.default is MISSING and each.name not in config
        ]
        if unknown or missing:
            what = 'unknown' if unknown else 'missing'
            stem = cls.PREFIX.rpartition('.')[2]
            options = ', '.join(stem + name for name in cls.names())
            raise ConfigError(
                f'`{cls.PREFIX}{(unknown or missing)[0]}` is {what}. Options '
                f'are {options or "none"}.'
            )
        return cls(**config)


def whole(least: float = 1, most: float = math.inf) -> Check:
    """A whole number, no bool."""
    what = f'a whole number from {least}'
    what += f' to {most}' if most < math.inf else ' on'
    return Check(lambda value: is_whole(value, least, most), what)


def number(
    least: float = -math.inf,
    below: float = math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> Check:
    """A finite number, no bool."""
    limits = [
        f'{word} {limit:g}'
        for word, limit in (
            ('from', least),
            ('above', above),
            ('below', below),
            ('at most', most),
        )
        if math.isfinite(limit)
    ]
    return Check(
        lambda value: (
            is_number(value)
            and least <= value <= most
            and above < value < below
        ),
        ' '.join(['a number', *limits]),
    )


def one_of(*values: Any) -> Check:
    """One of some values; 1 is not True."""
    return Check(
        lambda value: any(
            type(value) is type(each) and value == each for each in values
        ),
        f'one of {values}',
    )


flag = Check(lambda value: isinstance(value, bool), 'True or False')
names = Check(
    lambda value: (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(each, str) and each for each in value)
    ),
    'a list of names',
)


def optional(check: Check) -> Check:
    """None, or what a check asks for."""
    return Check(
        lambda value: value is None or check.fits(value),
        f'{check.what}, or None',
    )


def per_stage(check: Check) -> Check:
    """A value for all stages, or a list with one for each."""

    def fits(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return bool(value) and all(map(check.fits, value))
        return check.fits(value)

    return Check(fits, f'{check.what}, or a list of such by stage')
