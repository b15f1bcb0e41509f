import pytest

from e3va_mm.comparison import Records, Run, draw, markdown

MIB = 2**20
BOX, MASK = 'coco/bbox_mAP', 'coco/segm_mAP'
MEASURED = dict(
    parameters=dict(trainable_backbone=1500, backbone=100_000),
    memory_bytes=dict(
        peak=80 * MIB,
        kept_modules={'backbone.stages': 3 * MIB, 'neck': MIB},
    ),
    seconds=[0.5, 0.25, 9.0],
    file_bytes=2_500_000,
)


@pytest.fixture
def records(tmp_path):
    """Of two methods; a third is only planned."""
    methods = ('full', 'e3va', 'lora')
    found = Records(
        tmp_path, dict(metric=BOX), methods, [1e-3], dict.fromkeys(methods, 2)
    )
    for method, values in (('full', (0.5, 0.52)), ('e3va', (0.4, 0.41))):
        for seed, value in enumerate(values):
            found.update(
                Run(method, 1e-3, seed),
                validation={BOX: 0.9},
                test={BOX: value, MASK: value / 2},
            )
        found.measured[method] = MEASURED
    return found


def test_table(records):
    head, rule, *rows = markdown(records, (BOX, MASK), 'test').splitlines()
    assert head.count('|') == rule.count('|') == rows[0].count('|')
    assert head.startswith(
        '| method | box AP | mask AP | learning rate | trainable in backbone |'
    )
    assert rows[0] == (
        '| full | 51.00 ± 1.41 (50.0, 52.0) | 25.50 ± 0.71 (25.0, 26.0) '
        '| 0.001 | 1,500 | 1.50 % | 80.0 | 3.0 | 0.500 | 2.50 |'
    )
    assert rows[2] == '| lora |' + ' - |' * 9


def test_one_seed_has_no_deviation_and_a_diverged_one_no_mean(records):
    records.seeds = dict.fromkeys(records.seeds, 1)
    _, _, row, *_ = markdown(records, (BOX,), 'test').splitlines()
    assert row.startswith('| full | 50.0 |')
    records.seeds = dict.fromkeys(records.seeds, 2)
    records.update(Run('full', 1e-3, 1), diverged=True)
    _, _, row, *_ = markdown(records, (BOX,), 'test').splitlines()
    assert row.startswith('| full | 50.0, diverged |')
    (axes,) = draw(records, BOX, 'test', 'memory').axes
    assert [text.get_text() for text in axes.texts] == ['e3va']


def test_the_table_of_validation(records):
    _, _, row, *_ = markdown(records, (BOX,), 'validation').splitlines()
    assert row.startswith('| full | 90.00 ± 0.00 (90.0, 90.0) |')


@pytest.mark.parametrize(
    'cost, value, unit', [('memory', 80, 'MiB'), ('time', 0.5, 'seconds')]
)
def test_plots(records, cost, value, unit):
    (axes,) = draw(records, BOX, 'test', cost).axes
    assert axes.get_ylabel() == 'box AP, test split'
    assert unit in axes.get_xlabel()
    points = {text.get_text(): text for text in axes.texts}
    assert list(points) == ['full', 'e3va']
    assert points['full'].xy == (value, pytest.approx(51))
    weights = [text.get_weight() for text in points.values()]
    assert weights == ['normal', 'bold']
    # Mean and deviation of each.
    assert len(axes.containers) == 2
    assert all(bar.has_yerr for bar in axes.containers)
