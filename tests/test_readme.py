"""What the README and CONTRIBUTING say is there, and works."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from e3va_mm.trunks import TrunkOptions
from e3va_mm.tuners.e3va import E3VAMixOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_it_is_short_and_shows_results_first():
    lines = README.splitlines()
    assert len(lines) <= 150
    image = re.search(r'^!\[.+\]\((.+)\)$', README, re.M)
    assert README[: image.start()].count('\n') <= 12
    assert (ROOT / image[1]).stat().st_size < 100_000


def test_the_snippets_are_short():
    config, script = re.findall(r'```python\n(.*?)```', README, re.S)
    assert '_base_' in config and len(config.strip().splitlines()) <= 5
    code = [line for line in script.splitlines() if line.strip()]
    assert len(code) <= 10


def test_links_lead_somewhere():
    for text in (README, (ROOT / 'CONTRIBUTING.md').read_text()):
        for link in re.findall(r'\]\((?!http)([^)]+)\)', text):
            name, _, anchor = link.partition('#')
            page = ROOT / name if name else ROOT / 'README.md'
            assert page.exists(), link
            if anchor:
                headings = re.findall(r'^#+ (.+)$', page.read_text(), re.M)
                slugs = [
                    re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-')
                    for heading in headings
                ]
                assert anchor in slugs, link


def test_options_and_defaults_are_those_of_the_code():
    page = (ROOT / 'docs' / 'options.md').read_text()
    rows = dict(re.findall(r'^\| `(\w+)` \| `?([^`|]+?)`? \|', page, re.M))
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(E3VAMixOptions)
    }
    assert f'`width` ({defaults.pop("width")})' in page
    assert f'`mix_every=n` (`{defaults.pop("mix_every")}`)' in page
    defaults.update(preset='exact', taps=('attn', 'ffn'))  # None is all
    for field in dataclasses.fields(TrunkOptions):
        defaults[f'trunk_{field.name}'] = field.default
    assert rows == {name: repr(value) for name, value in defaults.items()}


@pytest.mark.parametrize('name', ['cascade', 'upernet'])
def test_figures_of_the_comparison_are_those_measured(name):
    """The README and the docs round what the benchmarks say."""
    benchmarks = (ROOT / 'benchmarks' / 'README.md').read_text()
    docs = (ROOT / 'docs' / 'comparison.md').read_text()
    table = {
        row[0]: row[1:]
        for row in re.findall(
            r'^\| ([\w -]+) \| ([\d.]+) \| ([\d.]+) \|$', docs, re.M
        )
    }
    assert {'E3VA', 'E3VA-Mix', 'Mona'} <= set(table)
    measured = re.findall(
        r'^\| ([\w-]+) \| ([\d.]+) ± [\d.]+ \(', benchmarks, re.M
    )
    known = {(method, f'{float(mean):.1f}') for method, mean in measured}
    column = dict(cascade=0, upernet=1)[name]
    for method, means in table.items():
        key = method.lower().replace('full fine-tuning', 'full')
        key = key.replace('frozen', 'fixed')
        assert (key, means[column]) in known, method


def test_the_image_is_drawn_from_the_records(tmp_path):
    pytest.importorskip('matplotlib')
    main = runpy.run_path(ROOT / 'benchmarks' / 'plot_methods.py')['main']
    main.__globals__['IMAGE'] = tmp_path / 'methods.png'
    main()
    assert (tmp_path / 'methods.png').stat().st_size > 10_000
