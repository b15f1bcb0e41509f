"""What is read gives what the trunk gave; what cannot be used is not read."""

import shutil

import pytest
import torch
from torch.nn import functional as F

from e3va_mm.backbones.trunk_cache import CODECS, RESERVE
from e3va_mm.backbones.trunk_pass import run_trunk
from e3va_mm.errors import ConfigError
from e3va_mm.trunks import Trunk
from tests.adapted_models import HEADS, trained, trunk_file
from tests.helpers import build_e3va, randomised
from tests.trunk_cases import build_ours, image_for


@pytest.fixture
def cached(tmp_path):
    """A trained Swin with an open cache, in training."""

    def cached(dtype='exact', entries=9, **kwargs):
        options = dict(dir=str(tmp_path), dtype=dtype)
        backbone = randomised(build_e3va(trunk_cache=options, **kwargs))
        backbone.trunk_cache.open(tmp_path, entries)
        return backbone.train()

    return cached


@pytest.fixture
def passes(monkeypatch):
    """How many images each pass of a trunk had."""
    done, run = [], Trunk.run

    def counted(self, image, *args):
        done.append(len(image))
        return run(self, image, *args)

    monkeypatch.setattr(Trunk, 'run', counted)
    return done


def step(backbone, image):
    """Outputs and gradients, by names."""
    backbone.zero_grad()
    outputs = backbone(image)
    torch.stack([each.square().mean() for each in outputs]).sum().backward()
    found = {str(i): output.detach() for i, output in enumerate(outputs)}
    for name, parameter in backbone.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def files(backbone):
    return [*backbone.trunk_cache.folder.glob('??/*.safetensors')]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize('name', HEADS)
def test_read_as_computed_a_step_is_the_same(name, tmp_path, passes):
    """Also where backward asks for taps of the first stage again."""
    source = trunk_file(tmp_path, name)
    tuner = dict(save_taps=['recompute', 'exact'])
    backbone = trained(name, source, **tuner).backbone.train()
    image = image_for(name)
    live = step(backbone, image)
    kind = type(build_e3va(trunk_cache=dict(dir='x')).trunk_cache)
    backbone.trunk_cache = kind(dir=str(tmp_path), dtype='exact')
    backbone.trunk_cache.open(tmp_path, len(image))
    passes.clear()
    for _ in range(2):
        assert_equal(step(backbone, image), live)
    assert passes == [len(image)]
    backbone.eval()
    with torch.no_grad():
        backbone(image)
    assert len(passes) == 2


@pytest.mark.parametrize(
    'dtype, outputs, gradients',
    [
        ('bf16', 0.99999, 0.9999),
        ('int8', 0.9999, 0.9995),
        ('int4', 0.99, 0.98),
    ],
)
def test_read_in_fewer_bits_a_step_is_about_the_same(
    cached, dtype, outputs, gradients
):
    backbone, image = cached(dtype), torch.randn(2, 3, 64, 96)
    live = step(backbone.eval(), image)
    step(backbone.train(), image)
    read = step(backbone, image)
    for name, value in read.items():
        bound = outputs if name.isdigit() else gradients
        alike = F.cosine_similarity(value.flatten(), live[name].flatten(), 0)
        assert alike > bound, name
    (half, _) = (p.stat().st_size for p in files(backbone))
    exact = cached()
    exact.trunk_cache.folder = exact.trunk_cache.folder / 'exact'
    step(exact, image)
    (whole, _) = (p.stat().st_size for p in files(exact))
    bits = dict(bf16=16, int8=8, int4=4)[dtype]
    # Scales and means beside the codes.
    assert half < whole * (bits + 3) / 32


@pytest.mark.parametrize('dtype', CODECS)
def test_taps_that_lie_as_maps_are_kept_too(dtype, tmp_path, passes):
    """Tokens of ConvNeXt's maps are columns in memory."""
    cache = dict(dir=str(tmp_path), dtype=dtype)
    ours = build_ours('convnext', tuner=dict(type='AdaTAD'), trunk_cache=cache)
    ours.trunk_cache.open(tmp_path, 2)
    image = image_for('convnext')[:1].repeat(2, 1, 1, 1)
    written, read = step(ours.train(), image), step(ours, image)
    assert len(passes) == 1
    assert_equal(read, written)


def test_images_are_found_in_whatever_batch(cached, passes):
    backbone, images = cached(), torch.randn(3, 3, 64, 64)
    whole = step(backbone.eval(), images)
    backbone.train()
    for rows in ([0, 1], [2, 1], [2, 1, 0]):
        found = step(backbone, images[rows])
        for i in range(4):
            torch.testing.assert_close(found[str(i)], whole[str(i)][rows])
    assert passes == [3, 2, 1]


def test_what_shapes_the_pixels_or_the_pass_is_part_of_the_key(cached, passes):
    backbone, image = cached(), torch.randn(1, 3, 64, 64)
    step(backbone, image)
    step(backbone, image.flip(-1))
    step(backbone, F.pad(image, (0, 32)))
    with torch.autocast('cpu', torch.bfloat16):
        step(backbone, image)
    assert passes == [1] * 4
    # Another side path on the same trunk, with other taps.
    other = cached(tuner=dict(taps=['ffn']))
    step(other, image)
    assert passes == [1] * 5
    other.share_trunk(backbone)
    run_trunk([backbone, other], image)
    assert passes == [1] * 5


def test_a_file_that_is_no_entry_is_computed_again(cached, passes):
    backbone, image = cached(entries=3), torch.randn(2, 3, 64, 64)
    expected = step(backbone, image)
    one, other = files(backbone)
    for spoil in (
        lambda: one.write_bytes(one.read_bytes()[:-100]),
        lambda: one.write_bytes(b''),
        lambda: shutil.copy(other, one),
        one.unlink,
    ):
        spoil()
        passes.clear()
        assert_equal(step(backbone, image), expected)
        assert_equal(step(backbone, image), expected)
        assert passes == [1]


def test_a_disk_is_never_filled(cached, passes, monkeypatch, caplog):
    backbone, image = cached(), torch.randn(1, 3, 64, 64)
    expected = step(backbone.eval(), image)
    usage = shutil._ntuple_diskusage(2 * RESERVE, RESERVE, RESERVE)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    said = []
    monkeypatch.setattr(
        'e3va_mm.backbones.trunk_cache.print_log',
        lambda text, *args: said.append(text),
    )
    passes.clear()
    for _ in range(2):
        assert_equal(step(backbone.train(), image), expected)
    assert passes == [1, 1] and len(said) == 1
    assert 'has no room: less than 1 GiB would be left' in said[0]
    assert not files(backbone)


def test_no_more_is_written_than_was_announced(cached, passes):
    backbone = cached(entries=2)
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        step(backbone, torch.randn(1, 3, 64, 64))
    assert passes == [1, 1, 1]
    assert len(files(backbone)) == 2


def test_a_batch_may_be_more_than_what_is_left(cached, passes):
    backbone, image = cached(entries=3), torch.randn(4, 3, 64, 64)
    expected = step(backbone, image)
    assert len(files(backbone)) == 3
    assert_equal(step(backbone, image), expected)
    assert passes == [4, 4]


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(trunk_cache=dict(dir='x', dtype='fp8')), f'one of {(*CODECS,)}'),
        (dict(trunk_cache=dict(views=2)), '`backbone.trunk_cache.dir` is mi'),
        (dict(trunk_cache=dict(dir='x', views=0)), 'whole number from 1 on'),
        (dict(trunk_cache=dict(dir='')), 'should be a folder'),
        (dict(tuner=dict(trunk_drop_path=0.1)), 'but got `trunk_drop_path`'),
        (dict(tuner=dict(type='LoRA')), 'but got a tuner inside'),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        build_e3va(**{'trunk_cache': dict(dir='x'), **options})
    assert message in str(error.value)
