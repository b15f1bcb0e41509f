"""Checks of config and data before the first step.

Each check is a small function of config and data sets that yields problems;
:class:`DatasetCheckHook` runs them before a training.
"""

from e3va_mm.preflight.building import explain_data_failure
from e3va_mm.preflight.checks import (
    NAMES,
    opened,
    require_names,
    run_checks,
)
from e3va_mm.preflight.dataset_check_hook import DatasetCheckHook
from e3va_mm.preflight.loops import explain_batch_norm
from e3va_mm.preflight.problems import Problem, grouped, raise_errors
from e3va_mm.preflight.samples import check_batch

__all__ = [
    'NAMES',
    'DatasetCheckHook',
    'Problem',
    'check_batch',
    'explain_data_failure',
    'explain_batch_norm',
    'grouped',
    'opened',
    'raise_errors',
    'require_names',
    'run_checks',
]
