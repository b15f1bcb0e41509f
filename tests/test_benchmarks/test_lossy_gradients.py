"""Coarse taps cost the gradients little: the figures, and the bar."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / 'benchmarks' / 'lossy_gradients.py'


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def figures(benchmark):
    images = benchmark.scene_images(2, 112)
    return {
        outliers: benchmark.measure(images, outliers)
        for outliers in (False, True)
    }


@pytest.mark.parametrize('outliers', [False, True])
def test_cosine_of_few_bits_is_at_least_0_999(figures, outliers):
    assert 0.999 <= figures[outliers]['int8']['cosine'] < 1 - 1e-9
    assert figures[outliers]['bf16']['cosine'] > 0.9999
    assert 0.999 <= figures[outliers]['int4']['cosine'] < 1 - 1e-6


@pytest.mark.parametrize('outliers', [False, True])
@pytest.mark.parametrize('mode', ['exact', 'recompute'])
def test_what_is_not_rounded_has_the_error_of_fp32(figures, outliers, mode):
    assert figures[outliers][mode]['error'] < 1e-5
    assert figures[outliers][mode]['rest']['worst_decile'] < 1e-5


@pytest.mark.parametrize('mode', ['int8', 'int4'])
def test_outliers_cost_the_rest_nothing(figures, mode):
    plain, outliers = figures[False][mode], figures[True][mode]
    assert plain['rest']['median'] < {'int8': 0.01, 'int4': 0.1}[mode]
    for part in ('rest', 'outliers'):
        assert outliers[part]['median'] < 1.5 * plain['rest']['median']


def test_outlier_channels_are_100_times_as_large(benchmark):
    images = benchmark.scene_images(1, 112)
    sizes = []
    for outliers in (False, True):
        model = benchmark.backbone('exact', outliers).eval()
        found = []
        # The first: what comes after it sees outliers already.
        model.stages[0].blocks[0].attn.register_forward_hook(
            lambda module, args, tap, found=found: found.append(tap)
        )
        model(images)
        sizes.append(found[0].norm(dim=(0, 1)))
    ratio = sizes[1] / sizes[0]
    expected = torch.ones(32)
    expected[list(benchmark.OUTLIERS)] = 100.0
    torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=0)


def test_images_are_normalised_scenes(benchmark):
    images = benchmark.scene_images(3, 112)
    assert images.shape == (3, 3, 112, 112)
    assert -2.2 < images.min() < images.max() < 2.7
    assert not torch.equal(images[0], images[1])


def test_figures_by_hand(benchmark):
    wanted = {
        'a.down.p': torch.eye(20, 20, dtype=torch.float64)[None],
        'a.up.bias': torch.zeros(3, dtype=torch.float64),
    }
    got = {name: value.clone() for name, value in wanted.items()}
    got['a.down.p'][0, 0, 0] += 0.5  # of the rest
    got['a.down.p'][0, 1, 1] += 0.25
    got['a.down.p'][0, 17, 17] += 0.125  # an outlier
    found = benchmark.compare(got, wanted)
    total = math.sqrt(0.5**2 + 0.25**2 + 0.125**2)
    assert found['error'] == pytest.approx(total / math.sqrt(20))
    length = math.sqrt(17 + 1.5**2 + 1.25**2 + 1.125**2)
    assert found['cosine'] == pytest.approx(
        (17 + 1.5 + 1.25 + 1.125) / length / math.sqrt(20)
    )
    # 18 channels: the 0.9 quantile lies between the third and second worst.
    assert found['rest'] == pytest.approx(
        dict(median=0.0, worst_decile=0.3 * 0.25, worst=0.5)
    )
    assert found['outliers'] == pytest.approx(
        dict(median=0.0, worst_decile=0.9 * 0.125, worst=0.125)
    )


def test_command(tmp_path):
    target = tmp_path / 'figures.json'
    done = subprocess.run(
        [sys.executable, SCRIPT, '--images=1', '--size=96']
        + [f'--json={target}'],
        check=True,
        capture_output=True,
        text=True,
    )
    for mode in ('exact', 'bf16', 'int8', 'recompute'):
        assert f'│ {mode}' in done.stdout
    assert 'worst decile begins' in done.stdout
    results = json.loads(target.read_text())
    assert list(results) == ['real features', 'outliers']
    assert results['outliers']['int8']['rest']['worst'] > 0
