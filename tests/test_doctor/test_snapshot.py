"""What the doctor sees of an environment."""

import struct

import pytest

from e3va_mm.doctor.snapshot import (
    _FRAMEWORK,
    DISTRIBUTIONS,
    Snapshot,
    _probe,
    cuda_archs,
    findable,
    numbers,
)

PTX, MACHINE_CODE = 1, 2


def fat_binary(*entries):
    """A fat binary as compilers write it: headers and bodies of 8 bytes."""
    body = b''.join(
        struct.pack('<HHIQ', kind, 0x101, 64, 8)
        + struct.pack('<QI', 0, 0)
        + struct.pack('<I', arch)
        + bytes(64 - 32 + 8)
        for kind, arch in entries
    )
    return struct.pack('<IHHQ', 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    'content, archs',
    [
        (b'no code at all', ()),
        (fat_binary((MACHINE_CODE, 80)), ('sm_80',)),
        (
            b'padding'
            + fat_binary((MACHINE_CODE, 90), (PTX, 90))
            + b'more'
            + fat_binary((MACHINE_CODE, 90), (MACHINE_CODE, 120)),
            ('sm_90', 'sm_120', 'compute_90'),
        ),
        # A compiler's magic number in the code of a reader of such files,
        # and one at the very end.
        (
            b'\x50\xed\x55\xba' + bytes(40) + fat_binary((MACHINE_CODE, 75)),
            ('sm_75',),
        ),
        (fat_binary((MACHINE_CODE, 75)) + b'\x50\xed\x55\xba', ('sm_75',)),
        (fat_binary((MACHINE_CODE, 75))[:-9], ()),
    ],
)
def test_architectures_are_read_from_a_library(tmp_path, content, archs):
    library = tmp_path / '_ext.so'
    library.write_bytes(content)
    assert cuda_archs(library) == archs


@pytest.mark.parametrize(
    'version, expected',
    [
        ('2.13.0+cu130', (2, 13, 0)),
        ('4.12.0.88', (4, 12, 0)),
        ('2.2.0rc1', (2, 2, 0)),
        ('82', (82,)),
    ],
)
def test_versions_are_compared_by_their_numbers(version, expected):
    assert numbers(version) == expected


def test_probes_tell_the_last_line_of_an_error():
    outputs, failures = _probe(
        {
            'well': 'print(1)',
            'ill': 'import no_such_module',
            'killed': 'import os; os._exit(7)',
        }
    )
    assert outputs == {'well': '1\n'}
    assert failures == {
        'ill': "ModuleNotFoundError: No module named 'no_such_module'",
        'killed': 'exit status 7',
    }


@pytest.mark.parametrize('importable', [True, False])
def test_frameworks_are_probed_as_our_tools_import_them(
    tmp_path, monkeypatch, importable
):
    (tmp_path / 'e3va_mm').mkdir()
    (tmp_path / 'e3va_mm' / '__init__.py').write_text(
        '' if importable else 'raise RuntimeError'
    )
    (tmp_path / 'e3va_mm' / 'registry.py').write_text(
        'import sys; sys.prepared = True'
    )
    (tmp_path / 'framework.py').write_text('import sys; sys.prepared')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, failures = _probe({'framework': _FRAMEWORK.format('framework')})
    assert bool(failures) is not importable


def test_a_folder_that_was_left_behind_is_no_package(tmp_path, monkeypatch):
    (tmp_path / 'left_behind').mkdir()
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'whole' / '__init__.py').write_text('raise SystemExit(1)')
    monkeypatch.syspath_prepend(tmp_path)
    assert findable(['left_behind', 'whole', 'missing']) == {'whole'}


def test_the_maintained_distribution_of_a_package_comes_first():
    for package, names in DISTRIBUTIONS.items():
        versions = dict.fromkeys(reversed(names), '1.0')
        seen = Snapshot(distributions=versions)
        assert next(iter(seen.of(package))).startswith('onedl-')
        assert seen.originals == list(names[1:])
