"""The rooms of the package stand on floors, and importing changes nothing."""

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import e3va_mm

PACKAGE = Path(e3va_mm.__file__).parent
# From the ground up. A room imports from its own floor only itself.
FLOORS = (
    ('errors', 'version'),
    ('utils',),
    ('frameworks',),
    ('numerics',),
    ('weights',),
    ('registry',),
    ('trunks',),
    ('tuners',),
    ('backbones',),
    ('necks', 'multi_task'),
    ('engine',),
    ('preflight',),
    ('measure',),
    ('apis',),
    ('export',),
    ('sweep',),
    ('comparison',),
    ('datasets',),
    ('doctor',),
    ('commands',),
    ('cli',),
)
FLOOR_OF = {room: i for i, floor in enumerate(FLOORS) for room in floor}
# Named by configs alone.
FACES = ('models', 'checkpoint')


def modules():
    """The files of the package by the names of their modules."""
    found = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        if '.mim' not in parts:
            name = '.'.join(('e3va_mm', *parts)).removesuffix('.__init__')
            found[name] = path
    return found


MODULES = modules()


def imports_of(path):
    """Our modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} imports relatively'
            for alias in node.names:
                name = f'{node.module}.{alias.name}'
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name.split('.')[0] == 'e3va_mm'}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room(module):
    """`backbones` of `e3va_mm.backbones.presets`."""
    return (module.split('.') + ['version'])[1]


def goes_up(importer, imported):
    here, there = room(importer), room(imported)
    if there in FACES:
        return True
    return (
        here not in FACES
        and here != there
        and FLOOR_OF[there] >= FLOOR_OF[here]
        and FLOOR_OF[there] > 0
    )


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} <= {*FLOOR_OF, *FACES}


def test_a_room_imports_only_from_lower_floors():
    upward = [
        f'{module} imports {name}'
        for module, names in IMPORTS.items()
        for name in names
        if goes_up(module, name)
    ]
    assert not upward


def test_no_file_imports_itself_in_a_circle():
    circle = []
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle


IMPORT = """
import json, sys
import e3va_mm
print(json.dumps(sorted({'torch', 'mmengine', 'numpy'} & set(sys.modules))))
"""
IMPORT_ALL = """
import importlib.util, json, pkgutil, sys
import mmengine.optim
import mmengine.runner.checkpoint as checkpoint
import torch
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
import e3va_mm

def state():
    return {
        'loaders': {
            scheme: str(loader)
            for scheme, loader in checkpoint.CheckpointLoader._schemes.items()
        },
        'load_state_dict': str(checkpoint.load_state_dict),
        'constructors': {
            name: str(value)
            for name, value in OPTIM_WRAPPER_CONSTRUCTORS._module_dict.items()
        },
        'constructor': str(
            mmengine.optim.DefaultOptimWrapperConstructor.__call__
        ),
        # A torchvision that loads brings its operators itself.
        'torchvision': 'torchvision' not in sys.modules
        and hasattr(torch.ops.torchvision, 'nms'),
    }

before = state()
left = ['__main__', '.checkpoint']  # which configs name for what it changes
if not importlib.util.find_spec('triton'):
    left.append('.tap_kernels')
for module in pkgutil.walk_packages(e3va_mm.__path__, 'e3va_mm.'):
    if not module.name.endswith(tuple(left)):
        importlib.import_module(module.name)
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""


def printed(code):
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_importing_the_package_is_cheap():
    assert printed(IMPORT) == []


def test_importing_all_of_it_changes_nothing_outside():
    assert printed(IMPORT_ALL) == []


def test_each_change_of_the_frameworks_has_its_test():
    tests = Path(__file__).parent
    page = tests.parent / 'docs' / 'frameworks.md'
    named = re.findall(r'`(test_\w+/test_\w+\.py)`', page.read_text())
    assert len(named) >= 7
    assert not [name for name in named if not (tests / name).exists()]
