"""What is changed of the frameworks is changed by the first lookup."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATE = """
import mmengine.optim
from mmengine.fileio.backends import registry_utils
from mmengine.registry import MODELS, HOOKS
from mmengine.runner import checkpoint
stock = mmengine.optim.DefaultOptimWrapperConstructor.__call__
load = checkpoint.load_state_dict

def changes():
    schemes = checkpoint.CheckpointLoader._schemes.values()
    return [
        'e3va_mm_atomic' in registry_utils.backends,
        all(s.__module__ == 'e3va_mm.frameworks.loaders' for s in schemes),
        checkpoint.load_state_dict is not load,
        mmengine.optim.DefaultOptimWrapperConstructor.__call__ is not stock,
    ]
"""


@pytest.mark.parametrize(
    'trigger',
    [
        "MODELS.get('e3va_mm.E3VASwinTransformer')",
        "HOOKS.get('e3va_mm.FreezeHook')",
        'import e3va_mm.checkpoint',
    ],
)
def test_nothing_before_and_all_at_the_first_lookup(trigger):
    code = f"""{STATE}
import e3va_mm.registry
assert not any(changes()), changes()
{trigger}
assert all(changes()), changes()
once = checkpoint.load_state_dict
e3va_mm.registry.install()
assert checkpoint.load_state_dict is once
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
