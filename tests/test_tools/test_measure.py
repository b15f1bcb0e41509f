import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIGITS = 'configs/cascade_e3va_swin_nano_digits.py'


def measure(*args):
    return subprocess.run(
        [sys.executable, 'tools/measure.py', DIGITS, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_table_and_json_hold_every_variant(tmp_path):
    path = tmp_path / 'new' / 'measured.json'
    done = measure(
        *('--compare', 'frozen', '--size', '64', '64', '--batch', '1'),
        *('--steps', '2', '--warmup', '0', '--json', str(path)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())['variants']
    assert list(rows) == ['e3va', 'frozen']
    for name, row in rows.items():
        assert name in done.stdout
        assert len(row['seconds']) == 2 and min(row['seconds']) > 0
        assert f'{row["parameters"]["trainable"]:,}' in done.stdout
    assert (
        rows['frozen']['memory_bytes']['peak']
        < rows['e3va']['memory_bytes']['peak']
    )


def test_an_unknown_variant_is_one_line():
    done = measure('--compare', 'tiny')
    assert done.returncode == 1
    assert "error: Variants are e3va, full, frozen, but got 'tiny'." in (
        done.stderr
    )
    assert 'Traceback' not in done.stderr
