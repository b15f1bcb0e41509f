"""Errors that a user can mend.

Everything that a wrong option, file or data set can cause derives from
:class:`E3VAError`: its text says what was expected, what was received and what
to do next. The tools print that text and nothing else; every other exception
is a defect and keeps its stack trace.
"""


class E3VAError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(E3VAError, ValueError):
    """An option, or a combination of options, that cannot work."""


class CheckpointError(E3VAError, RuntimeError):
    """A checkpoint that cannot be read, is not safe, or does not fit."""


class DataError(E3VAError, ValueError):
    """A data set that is incomplete or does not match the config."""


class TrainingError(E3VAError, RuntimeError):
    """A run that has gone wrong and is ended before it costs more."""


class DivergedError(TrainingError):
    """A run whose loss, or a weight of it, is not finite."""
