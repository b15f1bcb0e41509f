"""Checks of config and data before the first step.

Each check is a small function of config and data sets that yields problems;
:class:`DatasetCheckHook` runs them before a training.
"""

from e3va_mm.preflight.building import build_datasets, explain_data_failure
from e3va_mm.preflight.dataset_check_hook import DatasetCheckHook
from e3va_mm.preflight.problems import Problem
from e3va_mm.preflight.samples import check_batch

__all__ = [
    'DatasetCheckHook',
    'Problem',
    'build_datasets',
    'check_batch',
    'explain_data_failure',
]
