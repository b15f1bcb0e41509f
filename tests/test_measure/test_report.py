import io

import pytest
from rich.console import Console

from e3va_mm.measure import CATEGORIES
from e3va_mm.measure.fits import Change, Verdict
from e3va_mm.measure.report import (
    advice,
    draw,
    figures_table,
    fits_table,
    modules_table,
)

MIB = 2**20


def row(variant='as-is', config='a.py', scale=1, **figures):
    sizes = dict(zip(CATEGORIES, (10, 20, 30, 40, 50), strict=True))
    memory = {key: size * scale * MIB for key, size in sizes.items()}
    return (
        dict(
            config=config,
            variant=variant,
            parameters=dict(
                total=4000,
                trainable=1234 * scale,
                backbone=2000,
                trainable_backbone=25,
            ),
            memory_bytes=dict(memory, peak=150 * scale * MIB),
            seconds=[0.3 * scale, 0.1 * scale, 0.2 * scale],
        )
        | figures
    )


def text(table):
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def cells(table):
    """Label to heading to cell."""
    heads = [column.header for column in table.columns]
    lines = zip(*(column.cells for column in table.columns), strict=True)
    return {
        line[0]: dict(zip(heads[1:], line[1:], strict=True)) for line in lines
    }


def test_figures_stand_with_their_ratios():
    rows = {'as-is': row(), 'full': row('full', scale=4)}
    table = figures_table(rows, 'title')
    found = cells(table)
    assert found['as-is'] == {
        'trainable': '1,234',
        'of backbone': '1.25 %',
        'peak MiB': '150.0',
        'weights': '10.0',
        'gradients': '20.0',
        'optimizer': '30.0',
        'kept': '40.0',
        'temporaries': '50.0',
        's/step (min-max)': '0.200 (0.100-0.300)',
        'peak / full': '0.250',
        'time / full': '0.250',
    }
    assert found['full']['peak / full'] == '1.000'
    assert 'title' in text(table)


def test_the_allocator_stands_beside_what_is_accounted():
    made = row()
    made['memory_bytes'].update(allocated=160 * MIB, reserved=200 * MIB)
    found = cells(figures_table({'as-is': made}, ''))
    assert found['as-is']['allocated'] == '160.0'
    assert found['as-is']['reserved'] == '200.0'
    # A row alone has nothing to be compared with.
    assert not any('/' in head for head in found['as-is'] if 's/' not in head)


def test_without_full_the_first_row_is_the_measure():
    rows = {'as-is': row(), 'lora': row('lora', scale=3)}
    found = cells(figures_table(rows, ''))
    assert found['lora']['peak / as-is'] == '3.000'
    rows = {'a': row(config='a.py'), 'b': row(config='b.py', scale=2)}
    assert cells(figures_table(rows, ''))['b']['time / a'] == '2.000'
    # Each config has a full of its own.
    rows = {
        f'{name} {variant}': row(variant, name, scale)
        for name, variant, scale in (
            ('a', 'as-is', 1),
            ('a', 'full', 2),
            ('b', 'as-is', 4),
            ('b', 'full', 5),
        )
    }
    found = cells(figures_table(rows, ''))
    ratios = [line['peak / full'] for line in found.values()]
    assert ratios == ['0.500', '1.000', '0.800', '1.000']


@pytest.mark.parametrize('missing', ['memory_bytes', 'seconds'])
def test_what_was_not_measured_takes_no_column(missing):
    rows = {'as-is': row(), 'full': row('full', scale=4)}
    for made in rows.values():
        del made[missing]
    found = cells(figures_table(rows, ''))['as-is']
    assert ('peak MiB' in found) == (missing == 'seconds')
    assert ('s/step (min-max)' in found) == (missing == 'memory_bytes')
    assert ('peak / full' in found) == (missing == 'seconds')
    assert ('time / full' in found) == (missing == 'memory_bytes')


def test_bytes_kept_are_listed_by_part():
    rows = {'as-is': row(), 'full': row('full')}
    rows['as-is']['memory_bytes']['kept_modules'] = {
        'neck.convs.0': 3 * MIB,
        'neck.convs.1': 4 * MIB,
        '': MIB // 2,
    }
    rows['full']['memory_bytes']['kept_modules'] = {
        'backbone.stages.0': 20 * MIB,
        'neck': 7 * MIB,
    }
    found = cells(modules_table(rows))
    assert found == {
        'neck': {'as-is': '7.0', 'full': '7.0'},
        '(model)': {'as-is': '0.5', 'full': '0.0'},
        'backbone': {'as-is': '0.0', 'full': '20.0'},
        'sum': {'as-is': '7.5', 'full': '27.0'},
    }


LINE = "custom_hooks = [*_base_.custom_hooks, dict(modules=['neck'])]"
BATCH = 'train_dataloader = dict(batch_size=1)'
VERDICTS = [
    Verdict(
        4,
        9000 * MIB,
        False,
        (Change(5 * MIB, 'kept', LINE), Change(4 * MIB, 'batch', BATCH)),
    ),
    Verdict(8, 9000 * MIB, False, (Change(5 * MIB, 'kept', LINE),)),
    Verdict(11, 9000 * MIB, True),
]


def test_cards_that_hold_a_step():
    found = cells(fits_table({'as-is': VERDICTS}))
    assert found['as-is'] == {
        'needs MiB': '9,000.0',
        '4 GB': 'no',
        '8 GB': 'no',
        '11 GB': 'yes',
    }


def test_advice_is_to_be_pasted():
    lines = advice('as-is', VERDICTS).splitlines()
    assert lines[0].startswith('as-is does not fit 4, 8 GB.')
    assert lines[1:] == ['# 5.0 kept', LINE, '# 4.0 batch [4 GB]', BATCH]
    assert advice('as-is', VERDICTS[2:]) == ''
    assert 'Nothing' in advice('as-is', [Verdict(4, 5 * 2**30, False)])


def test_a_picture_of_peaks_and_seconds():
    rows = {'as-is': row(), 'full': row('full', scale=4)}
    figure = draw(rows, 'title')
    memory, seconds = figure.axes
    widths = {
        container.get_label(): [bar.get_width() for bar in container]
        for container in memory.containers
    }
    assert widths == {
        'weights': [10, 40],
        'gradients': [20, 80],
        'optimizer': [30, 120],
        'kept': [40, 160],
        'temporaries': [50, 200],
    }
    ends = [bar.get_x() + bar.get_width() for bar in memory.containers[-1]]
    assert ends == [150, 600]
    medians, spread = seconds.containers[1], seconds.containers[0]
    assert [b.get_width() for b in medians] == pytest.approx([0.2, 0.8])
    (segments,) = spread.lines[2]
    ends = [segment[:, 0].tolist() for segment in segments.get_segments()]
    assert ends[1] == pytest.approx([0.4, 1.2])
    assert figure.get_suptitle() == 'title'

    for made in rows.values():
        del made['memory_bytes']
    (only,) = draw(rows, '').axes
    assert 'seconds' in only.get_xlabel()
