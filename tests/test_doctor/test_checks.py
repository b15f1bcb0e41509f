"""Every failure to install that users report, simulated."""

import dataclasses
import shlex

import pytest

from e3va_mm.doctor import CHECKS, Snapshot, diagnose
from e3va_mm.doctor.checks import serves

MAINTAINED = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'e3va-mm': '0.1.0',
    'torch': '2.13.0',
    'numpy': '2.2.6',
    'opencv-python': '4.12.0.88',
    'opencv-python-headless': '4.12.0.88',
    'setuptools': '80.10.2',
    'imaug': '0.4.3',
}
ORIGINALS = {
    **MAINTAINED,
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'torch': '2.1.2+cu121',
    'numpy': '1.26.4',
    'opencv-python': '4.11.0.86',
    'opencv-python-headless': '4.11.0.86',
}
for name in list(ORIGINALS):
    if name.startswith('onedl-'):
        del ORIGINALS[name]
MODULES = frozenset(
    ['torch', 'numpy', 'cv2', 'setuptools', 'imaug', 'e3va_mm']
    + ['mmengine', 'mmcv', 'mmdet', 'mmseg']
)
GPU = 'NVIDIA A100 (0)'


def snapshot(line=MAINTAINED, without=(), modules=(), ops_too=True, **fields):
    """A sound environment, changed.

    `without` are distributions, `modules` those that are missing (-) or
    there too (+); a field of the snapshot may be given by its name, a
    version of a distribution with _ for -.
    """
    known = {field.name for field in dataclasses.fields(Snapshot)}
    versions = {
        name.replace('_', '-'): fields.pop(name)
        for name in list(fields)
        if name not in known
    }
    distributions = {**line, **versions}
    for name in without:
        del distributions[name]
    found = set(MODULES)
    for change in modules:
        (found.discard if change[0] == '-' else found.add)(change[1:])
    return Snapshot(
        distributions=distributions,
        modules=frozenset(found),
        ops=ops_too,
        **fields,
    )


@pytest.mark.parametrize(
    'seen',
    [
        snapshot(),
        snapshot(ORIGINALS),
        # One task is enough, and a torchvision that works does no harm.
        snapshot(without=['onedl-mmdetection'], modules=['-mmdet']),
        snapshot(without=['onedl-mmsegmentation'], modules=['-mmseg']),
        snapshot(torchvision='0.28.0', timm='1.0.0', modules=['+torchvision']),
        snapshot(
            onedl_mmpretrain='1.3.6',
            torchvision='0.28.0',
            transformers='4.57.6',
            modules=['+torchvision', '+mmpretrain'],
        ),
        # Without pycocotools mmpretrain leaves alone what it cannot import.
        snapshot(
            onedl_mmpretrain='1.3.6',
            torchvision='0.28.0',
            transformers='5.0.0',
            modules=['+torchvision', '+mmpretrain'],
        ),
        # setuptools 82 matters only while mmcv has to be built.
        snapshot(setuptools='82.0.0'),
        snapshot(
            torch_cuda='12.6',
            torch_archs=('sm_80', 'sm_90'),
            devices={GPU: 'sm_80'},
            ops_archs=('sm_75', 'compute_75'),
        ),
    ],
)
def test_a_sound_environment_has_no_problem(seen):
    assert diagnose(seen) == []


CUDA_OPS = (
    "MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0' pip install "
    '--no-build-isolation --no-cache-dir --force-reinstall --no-deps '
    '--no-binary onedl-mmcv onedl-mmcv==2.3.6'
)
CPU_OPS = CUDA_OPS.replace("FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0' ", '')
MOVE = (
    'pip uninstall -y mmengine mmcv mmdet mmsegmentation && '
    'pip install --no-build-isolation onedl-mmengine onedl-mmcv '
    'onedl-mmdetection onedl-mmsegmentation'
)
NO_OPERATORS = 'RuntimeError: operator torchvision::nms does not exist'
CASES = {
    'both lines of distributions': (
        snapshot(mmcv='2.1.0', mmdet='3.3.0'),
        'mmcv from onedl-mmcv 2.3.6 and mmcv 2.1.0; '
        'mmdet from onedl-mmdetection 3.5.1 and mmdet 3.3.0.',
        'pip uninstall -y onedl-mmcv mmcv onedl-mmdetection mmdet && '
        'pip install --no-build-isolation onedl-mmcv onedl-mmdetection',
    ),
    'one of two was uninstalled': (
        snapshot(modules=['-mmdet']),
        'onedl-mmdetection 3.5.1 counts as installed, but its files are gone',
        'pip install --no-build-isolation --force-reinstall --no-deps '
        'onedl-mmdetection==3.5.1',
    ),
    'no torch': (
        snapshot(
            without=['torch'],
            modules=['-torch'],
            failures={'mmcv.ops': "No module named 'torch'"},
        ),
        'torch is not installed. It comes first',
        "pip install torch 'setuptools<81' wheel ninja",
    ),
    'no mmengine': (
        snapshot(without=['onedl-mmengine'], modules=['-mmengine']),
        'needs mmengine, which is not installed',
        "pip install --no-build-isolation 'e3va_mm[onedl]'",
    ),
    'no mmcv': (
        snapshot(without=['onedl-mmcv'], modules=['-mmcv'], ops_too=False),
        'pip compiles it, which takes some 15 minutes',
        'pip install --no-build-isolation onedl-mmcv -v',
    ),
    'no mmcv beside the originals': (
        snapshot(
            ORIGINALS, without=['mmcv'], modules=['-mmcv'], ops_too=False
        ),
        'mmcv is not installed',
        'pip install --no-build-isolation mmcv==2.1.0 -v',
    ),
    'neither mmdet nor mmseg': (
        snapshot(
            without=['onedl-mmdetection', 'onedl-mmsegmentation'],
            modules=['-mmdet', '-mmseg'],
        ),
        'Neither mmdet nor mmseg is installed',
        'pip install --no-build-isolation onedl-mmdetection',
    ),
    'neither of the originals': (
        snapshot(
            ORIGINALS,
            without=['mmdet', 'mmsegmentation'],
            modules=['-mmdet', '-mmseg'],
        ),
        'or both: mmdet==3.3.0 mmsegmentation==1.2.2.',
        'pip install --no-build-isolation mmdet==3.3.0',
    ),
    'setuptools without pkg_resources': (
        snapshot(
            ORIGINALS,
            setuptools='82.0.1',
            failures={
                'mmdet.apis': 'ModuleNotFoundError: No module named '
                "'pkg_resources'"
            },
        ),
        'no pkg_resources since version 82',
        "pip install 'setuptools<81'",
    ),
    'mmcv 2.2.0 with mmdet 3.3.0': (
        snapshot(
            ORIGINALS,
            mmcv='2.2.0',
            failures={
                'mmdet.apis': 'AssertionError: MMCV==2.2.0 is used but '
                'incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'
            },
        ),
        'mmdet and mmsegmentation refuse mmcv from 2.2.0 on, and mmcv 2.2.0',
        MOVE,
    ),
    'the maintained mmcv with the original mmdet': (
        snapshot(without=['onedl-mmdetection'], mmdet='3.3.0'),
        'mmdet refuse mmcv from 2.2.0 on, and onedl-mmcv 2.3.6',
        'pip uninstall -y mmdet && pip install --no-build-isolation '
        'onedl-mmengine onedl-mmcv onedl-mmdetection onedl-mmsegmentation',
    ),
    'the original mmengine with torch 2.6': (
        snapshot(ORIGINALS, torch='2.6.0+cpu'),
        'cannot resume from a checkpoint with torch 2.6 or newer',
        MOVE,
    ),
    'numpy 1 with the maintained mmseg': (
        snapshot(numpy='1.26.4'),
        'onedl-mmsegmentation needs numpy 2.0.1 or newer',
        "pip install 'numpy>2'",
    ),
    'numpy 2 with an old torch': (
        snapshot(ORIGINALS, numpy='2.2.6'),
        'torch 2.1.2 was built with numpy 1',
        "pip install 'numpy<2'",
    ),
    'an old torch with the maintained mmseg': (
        snapshot(torch='2.2.2'),
        'torch 2.2.2 was built with numpy 1',
        'pip install --upgrade torch',
    ),
    'no OpenCV': (
        snapshot(
            without=['opencv-python', 'opencv-python-headless', 'numpy'],
            modules=['-cv2'],
            failures={'mmcv.ops': "No module named 'cv2'"},
        ),
        'onedl-mmengine does not ask for it',
        "pip install 'opencv-python-headless<4.13'",
    ),
    'OpenCV without a display': (
        snapshot(
            ORIGINALS,
            failures={
                'cv2': 'ImportError: libGL.so.1: cannot open shared object '
                'file: No such file or directory'
            },
        ),
        'OpenCV looks for libGL',
        'pip install --force-reinstall --no-deps '
        "'opencv-python-headless<4.12'",
    ),
    'OpenCV too new for imaug': (
        snapshot(opencv_python='4.13.0.90'),
        'needs opencv-python below 4.13, and 4.13.0.90 is installed',
        "pip install 'opencv-python<4.13' 'opencv-python-headless<4.13'",
    ),
    'torchvision for another torch': (
        snapshot(
            torchvision='0.28.0',
            timm='1.0.0',
            modules=['+torchvision', '+timm'],
            failures=dict.fromkeys(
                ('torchvision', 'mmdet.apis', 'mmseg.apis'), NO_OPERATORS
            ),
        ),
        'and with them mmdet and mmseg, fail',
        'pip uninstall -y torchvision',
    ),
    'torchvision for another torch that nothing needs': (
        snapshot(
            torchvision='0.28.0',
            modules=['+torchvision'],
            failures={'torchvision': NO_OPERATORS},
        ),
        'torchvision was built for another torch',
        'pip uninstall -y torchvision',
    ),
    'mmpretrain without torchvision': (
        snapshot(
            onedl_mmpretrain='1.3.6',
            modules=['+mmpretrain'],
            failures={
                'mmpretrain.models': 'ModuleNotFoundError: No module named '
                "'torchvision'"
            },
        ),
        'mmpretrain needs torchvision, which is not installed',
        'pip install --no-deps torchvision==0.28.0',
    ),
    'the original mmpretrain without torchvision': (
        snapshot(ORIGINALS, mmpretrain='1.2.0', modules=['+mmpretrain']),
        'mmpretrain needs torchvision, which is not installed',
        'pip install --no-deps torchvision==0.16.0',
    ),
    'two distributions of mmpretrain': (
        snapshot(
            onedl_mmpretrain='1.3.6',
            mmpretrain='1.2.0',
            torchvision='0.28.0',
            modules=['+torchvision', '+mmpretrain'],
        ),
        'mmpretrain from onedl-mmpretrain 1.3.6 and mmpretrain 1.2.0.',
        'pip uninstall -y onedl-mmpretrain mmpretrain && '
        'pip install --no-build-isolation onedl-mmpretrain',
    ),
    'transformers 5 beside mmpretrain': (
        snapshot(
            onedl_mmpretrain='1.3.6',
            torchvision='0.28.0',
            transformers='5.0.0',
            modules=['+torchvision', '+mmpretrain', '+transformers'],
            failures=dict.fromkeys(
                ('mmdet.apis', 'mmpretrain.models'),
                'TypeError: NoneType takes no arguments',
            ),
        ),
        'onedl-mmpretrain 1.3.6 cannot be imported beside transformers 5.0.0',
        "pip install 'transformers<5'",
    ),
    'mmcv-lite': (
        snapshot(
            without=['onedl-mmcv'],
            **{'mmcv-lite': '2.1.0'},
            ops_too=False,
            failures={'mmcv.ops': "No module named 'mmcv._ext'"},
        ),
        'mmcv-lite has no compiled operators',
        'pip uninstall -y mmcv-lite && '
        + CPU_OPS.replace('onedl-mmcv', 'mmcv').replace('2.3.6', '2.1.0'),
    ),
    'mmcv built in isolation': (
        snapshot(
            ops_too=False,
            failures={
                'mmcv.ops': "ModuleNotFoundError: No module named 'mmcv._ext'"
            },
        ),
        'built in isolation, its setup finds no torch',
        CPU_OPS,
    ),
    'mmcv built for another torch': (
        snapshot(
            failures={
                'mmcv.ops': 'ImportError: _ext.so: undefined symbol: '
                '_ZN3c106detail14torchCheckFailE'
            }
        ),
        'compiled for another torch: ImportError: _ext.so: undefined symbol',
        CPU_OPS,
    ),
    'CUDA torch, CPU ops': (
        snapshot(torch_cuda='12.6', devices={GPU: 'sm_80'}),
        'compiled for CPUs alone: training would end in nms at its first',
        CUDA_OPS,
    ),
    'CUDA torch, CPU ops, by the error': (
        snapshot(
            torch_cuda='12.6',
            devices={GPU: 'sm_80'},
            failures={
                'mmcv.ops': 'RuntimeError: nms_impl: implementation for '
                'device cuda:0 not found.'
            },
        ),
        'compiled for CPUs alone',
        CUDA_OPS,
    ),
    'ops without code for the GPU': (
        snapshot(
            torch_cuda='12.6',
            devices={GPU: 'sm_80'},
            ops_archs=('sm_70', 'sm_86', 'sm_90'),
        ),
        f'compiled for sm_70 sm_86 sm_90, and {GPU} is sm_80',
        CUDA_OPS,
    ),
    'ops without code for the GPU, by the error': (
        snapshot(
            torch_cuda='12.6',
            devices={GPU: 'sm_80'},
            ops_archs=('sm_80',),
            failures={
                'mmcv.ops': 'RuntimeError: CUDA error: no kernel image is '
                'available for execution on the device'
            },
        ),
        '"no kernel image is available"',
        CUDA_OPS,
    ),
    'torch without code for the GPU': (
        snapshot(
            torch_cuda='12.1',
            torch_archs=('sm_80', 'sm_90'),
            devices={'NVIDIA GeForce RTX 5090 (0)': 'sm_120'},
            ops_archs=('compute_90',),
        ),
        'torch was compiled for sm_80 sm_90, and NVIDIA GeForce RTX 5090 (0) '
        'is sm_120',
        'pip install --upgrade torch',
    ),
    'something unheard of': (
        snapshot(failures={'mmdet.apis': 'SyntaxError: bad luck'}),
        'import mmdet.apis fails: SyntaxError: bad luck',
        'pip install --no-build-isolation --force-reinstall --no-deps '
        'onedl-mmdetection==3.5.1',
    ),
}
NOTES = {
    'torchvision whose operators do not load': (
        snapshot(
            onedl_mmpretrain='1.3.6',
            torchvision='0.28.0',
            timm='1.0.31',
            modules=['+torchvision', '+mmpretrain', '+timm'],
            failures={'torchvision': NO_OPERATORS},
        ),
        'onedl-mmpretrain and timm can be used all the same',
        'pip install --force-reinstall --no-deps torchvision==0.28.0+cpu',
    ),
    'torchvision for another CUDA': (
        snapshot(
            torchvision='0.27.0',
            timm='1.0.31',
            torch_cuda='12.6',
            modules=['+torchvision', '+timm'],
            failures={'torchvision': NO_OPERATORS},
        ),
        'timm can be used all the same',
        'pip install --force-reinstall --no-deps torchvision==0.28.0',
    ),
    'an older maintained mmcv': (
        snapshot(onedl_mmcv='2.3.5'),
        'batched_nms of onedl-mmcv 2.3.5 is wrong in 16 bits',
        "pip install --no-build-isolation 'onedl-mmcv>=2.3.6'",
    ),
    'not in the registry': (
        snapshot(without=['e3va-mm']),
        'E3VASwinTransformer is not in the registry',
        'pip install --no-build-isolation --no-deps -e .',
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_a_failure_is_recognised_alone_and_mended_in_a_line(name):
    seen, what, mend = CASES[name]
    (problem,) = diagnose(seen)
    assert what in problem.what
    assert problem.mend == mend
    assert problem.blocks
    # The shell takes it as it stands.
    assert '\n' not in mend and shlex.split(mend)


@pytest.mark.parametrize('name', NOTES)
def test_what_limits_an_environment_is_noted(name):
    seen, what, mend = NOTES[name]
    (problem,) = diagnose(seen)
    assert what in problem.what
    assert problem.mend == mend
    assert not problem.blocks


def test_no_check_is_without_a_case():
    found = {
        check.__name__
        for check in CHECKS
        for seen, *_ in [*CASES.values(), *NOTES.values()]
        if list(check(seen))
    }
    assert found == {check.__name__ for check in CHECKS}


def test_setuptools_is_mended_before_mmcv_is_built():
    seen = snapshot(
        without=['onedl-mmcv'],
        modules=['-mmcv'],
        ops_too=False,
        setuptools='82.0.0',
    )
    # In the order in which they are to be run.
    assert [p.mend for p in diagnose(seen)] == [
        "pip install 'setuptools<81'",
        'pip install --no-build-isolation onedl-mmcv -v',
    ]


def test_several_problems_are_all_found():
    seen = snapshot(
        mmcv='2.2.0', numpy='1.26.4', devices={GPU: 'sm_80'}, torch_cuda='12'
    )
    text = '\n'.join(problem.what for problem in diagnose(seen))
    for part in ('onedl-mmcv 2.3.6 and mmcv', 'numpy 2.0.1', 'CPUs alone'):
        assert part in text


@pytest.mark.parametrize(
    'archs, device, served',
    [
        (['sm_80'], 'sm_80', True),
        (['sm_80'], 'sm_86', True),
        (['sm_86'], 'sm_80', False),
        (['sm_80'], 'sm_90', False),
        (['compute_80'], 'sm_90', True),
        (['compute_90'], 'sm_80', False),
        (['sm_50', 'sm_90'], 'sm_80', False),
        (['sm_90a'], 'sm_90', True),
        (['sm_90', 'compute_120'], 'sm_120', True),
        ([], 'sm_90', False),
    ],
)
def test_which_code_runs_on_which_gpu(archs, device, served):
    assert serves(archs, device) is served
