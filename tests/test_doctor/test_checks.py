"""Every failure to install that users report, simulated."""

import dataclasses
import shlex

import pytest

from e3va_mm.doctor.checks import CHECKS, ERRORS, diagnose
from e3va_mm.doctor.snapshot import Snapshot

VERSIONS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'e3va-mm': '0.1.0',
    'torch': '2.13.0',
    'numpy': '2.2.6',
    'opencv-python-headless': '4.12.0.88',
    'setuptools': '80.10.2',
}
MODULES = {
    *('torch', 'numpy', 'cv2', 'setuptools', 'e3va_mm'),
    *('mmengine', 'mmcv', 'mmdet', 'mmseg'),
}
GPU = {'NVIDIA A100 (0)': '8.0'}


def snapshot(without=(), unfindable=(), **fields):
    """A sound environment, changed.

    `without` are distributions, `unfindable` modules; a field of the snapshot
    is given by its name, a version of a distribution with _ for -.
    """
    known = {field.name for field in dataclasses.fields(Snapshot)}
    versions = {
        name.replace('_', '-'): fields.pop(name)
        for name in list(fields)
        if name not in known
    }
    found = {**VERSIONS, **versions}
    return Snapshot(
        distributions={k: v for k, v in found.items() if k not in without},
        modules=frozenset(MODULES - set(unfindable)),
        **fields,
    )


def ops_fail(line, **fields):
    return snapshot(failures={'mmcv.ops': line}, **fields)


CUDA_OPS = (
    "MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0' pip install "
    '--no-build-isolation --force-reinstall --no-deps --no-cache-dir '
    '--no-binary onedl-mmcv onedl-mmcv==2.3.6'
)
CPU_OPS = CUDA_OPS.replace("FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0' ", '')
NO_OPERATORS = 'RuntimeError: operator torchvision::nms does not exist'
CASES = {
    'two lines of distributions': (
        snapshot(mmcv='2.1.0', mmdet='3.3.0'),
        'mmcv from onedl-mmcv 2.3.6 and mmcv 2.1.0; mmdet from ',
        'pip uninstall -y onedl-mmcv mmcv onedl-mmdetection mmdet && '
        'pip install --no-build-isolation onedl-mmcv onedl-mmdetection',
    ),
    'one of two was uninstalled': (
        snapshot(unfindable=['mmdet']),
        'onedl-mmdetection 3.5.1 counts as installed, but its files are gone',
        'pip install --no-build-isolation --force-reinstall --no-deps '
        'onedl-mmdetection==3.5.1',
    ),
    'no torch': (
        snapshot(['torch'], ['torch']),
        'torch is not installed. It comes first',
        "pip install 'torch>=2.6' 'setuptools<81' wheel ninja",
    ),
    'an old torch': (
        snapshot(torch='2.5.1+cu121'),
        'e3va_mm needs torch 2.6 or newer, and 2.5.1+cu121 is installed',
        "pip install --upgrade 'torch>=2.6'",
    ),
    'no mmengine': (
        snapshot(['onedl-mmengine'], ['mmengine']),
        'needs mmengine, which is not installed',
        "pip install --no-build-isolation 'e3va_mm[onedl]'",
    ),
    'no mmcv': (
        snapshot(['onedl-mmcv'], ['mmcv']),
        'pip compiles it, which takes some 15 minutes',
        'pip install --no-build-isolation onedl-mmcv -v',
    ),
    'neither mmdet nor mmseg': (
        snapshot(
            ['onedl-mmdetection', 'onedl-mmsegmentation'], ['mmdet', 'mmseg']
        ),
        'Neither mmdet nor mmseg is installed',
        'pip install --no-build-isolation onedl-mmdetection '
        'onedl-mmsegmentation',
    ),
    'no OpenCV': (
        snapshot(['opencv-python-headless'], ['cv2']),
        'OpenCV is not installed',
        "pip install --force-reinstall 'opencv-python-headless<4.13'",
    ),
    'setuptools without pkg_resources': (
        ops_fail("ModuleNotFoundError: No module named 'pkg_resources'"),
        'no pkg_resources since version 82',
        "pip install 'setuptools<81'",
    ),
    'the original mmdet with a new mmcv': (
        snapshot(
            ['onedl-mmdetection'],
            mmdet='3.3.0',
            failures={
                'mmdet.apis': 'AssertionError: MMCV==2.3.6 is used but '
                'incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'
            },
        ),
        'The original mmdet and mmsegmentation refuse mmcv from 2.2.0 on',
        'pip uninstall -y mmdet mmsegmentation && pip install '
        '--no-build-isolation onedl-mmdetection onedl-mmsegmentation',
    ),
    'OpenCV without a display': (
        snapshot(failures={'cv2': 'ImportError: libGL.so.1: cannot open'}),
        'OpenCV looks for libGL',
        "pip install --force-reinstall 'opencv-python-headless<4.13' "
        '--no-deps',
    ),
    'torchvision for another torch': (
        snapshot(
            torchvision='0.20.0',
            failures=dict.fromkeys(
                ('torchvision', 'mmdet.apis'), NO_OPERATORS
            ),
        ),
        'torchvision was built for another torch',
        'pip install --no-build-isolation --force-reinstall --no-deps '
        'torchvision==0.28.0+cpu',
    ),
    'transformers 5 beside mmpretrain': (
        snapshot(
            failures={'mmdet.apis': 'TypeError: NoneType takes no arguments'}
        ),
        'use what transformers 5 has dropped',
        "pip install 'transformers<5'",
    ),
    'mmcv-lite': (
        ops_fail(
            "ModuleNotFoundError: No module named 'mmcv._ext'",
            without=['onedl-mmcv'],
            mmcv_lite='2.1.0',
        ),
        'mmcv-lite has none',
        f'pip uninstall -y mmcv-lite && {CPU_OPS}',
    ),
    'mmcv built in isolation': (
        ops_fail("ModuleNotFoundError: No module named 'mmcv._ext'"),
        'built in isolation the setup of mmcv finds no torch',
        CPU_OPS,
    ),
    'mmcv built for another torch': (
        ops_fail('ImportError: _ext.so: undefined symbol: _ZN3c106detail14'),
        'compiled for another torch',
        CPU_OPS,
    ),
    'CUDA torch, CPU ops': (
        ops_fail(
            'RuntimeError: nms_impl: implementation for device cuda:0 not '
            'found.',
            devices=GPU,
        ),
        'compiled for CPUs alone',
        CUDA_OPS,
    ),
    'no code for the GPU': (
        ops_fail(
            'RuntimeError: CUDA error: no kernel image is available for '
            'execution on the device',
            devices=GPU,
        ),
        'compiled for other GPUs',
        f'pip install --upgrade torch && {CUDA_OPS}',
    ),
    'something unheard of': (
        snapshot(failures={'mmdet.apis': 'SyntaxError: bad luck'}),
        'import mmdet.apis fails: SyntaxError: bad luck',
        'pip install --no-build-isolation --force-reinstall --no-deps '
        'onedl-mmdetection==3.5.1',
    ),
}
NOTES = {
    'torchvision that only others miss': (
        snapshot(
            torchvision='0.20.0',
            cuda='12.6',
            failures={'torchvision': NO_OPERATORS},
        ),
        'The tools of e3va_mm do without its operators',
        'pip install --no-build-isolation --force-reinstall --no-deps '
        'torchvision==0.28.0',
    ),
    'not in the registry': (
        snapshot(['e3va-mm']),
        'E3VASwinTransformer is not in the registry',
        'pip install --no-build-isolation --no-deps -e .',
    ),
}


@pytest.mark.parametrize(
    'seen',
    [
        snapshot(),
        # One task is enough.
        snapshot(['onedl-mmdetection'], ['mmdet']),
        # setuptools 82 matters only while mmcv has to be built.
        snapshot(setuptools='82.0.0'),
        snapshot(cuda='12.6', devices=GPU),
    ],
)
def test_a_sound_environment_has_no_problem(seen):
    assert diagnose(seen) == []


@pytest.mark.parametrize('name', [*CASES, *NOTES])
def test_a_failure_is_recognised_alone_and_mended_in_a_line(name):
    seen, what, mend = {**CASES, **NOTES}[name]
    (problem,) = diagnose(seen)
    assert what in problem.what
    assert problem.mend == mend
    assert problem.blocks == (name in CASES)
    # The shell takes it as it stands.
    assert '\n' not in mend and shlex.split(mend)


def test_no_check_and_no_known_error_is_without_a_case():
    cases = [seen for seen, *_ in [*CASES.values(), *NOTES.values()]]
    setuptools = snapshot(['onedl-mmcv'], ['mmcv'], setuptools='82.0.0')
    # In the order in which they are to be run.
    assert [p.mend for p in diagnose(setuptools)] == [
        "pip install 'setuptools<81'",
        'pip install --no-build-isolation onedl-mmcv -v',
    ]
    for check in CHECKS:
        assert any(list(check(seen)) for seen in [*cases, setuptools])
    for text in ERRORS:
        assert any(seen.failing(text) for seen in cases)
