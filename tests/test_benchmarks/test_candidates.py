"""Candidates change what they say, and begin as the trunk."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e3va_mm.registry import MODELS
from tests.helpers import build_e3va

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def candidates():
    path = ROOT / 'benchmarks' / 'candidates.py'
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.CANDIDATES
    for name in ('CandidateE3VA', 'CandidateMix'):
        MODELS.module_dict.pop(name)


def build(tuner):
    return build_e3va(tuner=tuner).eval()


def test_without_any_it_is_the_paper_s(candidates):
    plain, bare = build({}), build(dict(type='e3va_mm.CandidateE3VA'))
    state = {
        name: torch.randn_like(value) * 0.2
        if name.startswith('side_path')
        else value
        for name, value in plain.state_dict().items()
    }
    image = torch.randn(1, 3, 64, 64)
    for backbone in (plain, bare):
        backbone.load_state_dict(state)
    for a, b in zip(plain(image), bare(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_each_begins_as_the_trunk_and_trains_whole(candidates):
    trunk = build(dict(type='e3va_mm.NoSidePath'))
    image = torch.randn(1, 3, 64, 64)
    for name, options in candidates.items():
        if 'rank' in options:
            options = dict(options, rank=[2, 4])
        backbone = build(options)
        trunk.load_state_dict(
            {
                name: value
                for name, value in backbone.state_dict().items()
                if not name.startswith('side_path.')
            }
        )
        for a, b in zip(backbone(image), trunk(image), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        for parameter in backbone.side_path.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        sum((o * o.detach().sin()).sum() for o in backbone(image)).backward()
        for key, parameter in backbone.side_path.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.any(), (name, key)


def test_an_unknown_candidate_is_refused(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, 'benchmarks/ablation.py'),
            *('--methods', 'e3va,magic', '--work-dir', tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert 'state, mix-64, mix-64-in-a-row-3' in done.stderr
    assert "but got 'magic'" in done.stderr
