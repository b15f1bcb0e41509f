"""The coding of taps as operators: as the reference, on every device."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from e3va_mm.numerics.temporaries import as_on_gpu
from e3va_mm.tuners.e3va import tap_codes, tap_ops
from e3va_mm.tuners.e3va.tap_codes import INT4, INT8

FORMS = pytest.mark.parametrize('form', [INT8, INT4], ids=['int8', 'int4'])
# In a process of its own, where kernels are interpreted on the CPU.
COMPARE = """
import json, torch
from e3va_mm.tuners.e3va import tap_codes, tap_kernels
found = []
for form in (tap_codes.INT8, tap_codes.INT4):
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, width in ((37, 192), (2100, 96), (21, 7)):
            tap = torch.randn(tokens, width)
            tap[:, 3] *= 100
            tap = tap.to(dtype)
            channels = tap_codes.statistics(tap)
            stated = tap_kernels.statistics(tap)
            back = []
            for module in (tap_codes, tap_kernels):
                kept = module.encode(tap, channels, form)
                back.append(module.decode(*kept, width, form, torch.float32))
                again = tap_codes.decode(*kept, width, form, torch.float32)
                assert torch.equal(back[-1], again)
            found.append([
                form.bits,
                ((stated - channels) / channels[1]).abs().max().item(),
                ((back[0] - back[1]).norm() / back[0].norm()).item(),
            ])
tap = torch.randn(3, 32)
tap[1, 5] = float('nan')
channels = torch.stack([torch.zeros(32), torch.ones(32)])
kept = tap_kernels.encode(tap, channels, tap_codes.INT4)
bad = tap_kernels.decode(*kept, 32, tap_codes.INT4, torch.float32)
assert bad[1].isnan().all() and bad[[0, 2]].isfinite().all()
print(json.dumps(found))
"""


@FORMS
@pytest.mark.parametrize('width', [64, 7])
def test_operators_are_the_reference_and_know_their_shapes(form, width):
    tap = torch.randn(50, width)
    channels = tap_codes.statistics(tap)
    expected = tap_codes.encode(tap, channels, form)
    decoded = tap_codes.decode(*expected, width, form, torch.bfloat16)
    with as_on_gpu():
        assert torch.equal(tap_ops.statistics(tap), channels)
        got = tap_ops.encode(tap, channels, form)
        assert all(map(torch.equal, got, expected))
        back = tap_ops.decode(*got, width, form, torch.bfloat16)
        assert torch.equal(back, decoded)
    for operator, args in (
        (tap_ops.tap_statistics, (tap,)),
        (tap_ops.encode_tap, (tap, channels, form.bits)),
        (tap_ops.decode_tap, (*got, width, form.bits, torch.bfloat16)),
    ):
        torch.library.opcheck(operator, args)


@pytest.mark.skipif(
    importlib.util.find_spec('triton') is None, reason='needs Triton'
)
def test_kernels_give_what_the_reference_gives():
    done = subprocess.run(
        [sys.executable, '-c', COMPARE],
        env=dict(os.environ, TRITON_INTERPRET='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for bits, statistics, values in json.loads(done.stdout.splitlines()[-1]):
        assert statistics < 1e-2
        # Where scales are in 16 bits, they may be rounded in another way.
        assert values < {8: 2e-3, 4: 5e-2}[bits]
