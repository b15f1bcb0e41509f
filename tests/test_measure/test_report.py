import pytest

from e3va_mm.measure import CATEGORIES
from e3va_mm.measure.fits import Change
from e3va_mm.measure.report import (
    COLUMNS,
    advice,
    draw,
    figures_table,
    fits_table,
    gpu_parts_table,
    gpu_table,
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
    assert table.title == 'title'
    found = cells(table)
    assert found['as-is'] == {
        'trainable': '1,234',
        'of the backbone': '1.25 %',
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


def test_the_allocator_stands_beside_what_is_accounted():
    made = row()
    made['memory_bytes'].update(allocated=160 * MIB, reserved=200 * MIB)
    found = cells(figures_table({'as-is': made}, ''))['as-is']
    assert (found['allocated'], found['reserved']) == ('160.0', '200.0')
    # A row alone has nothing to be compared with.
    assert not any(' / ' in head for head in found)


def test_each_config_has_a_reference_of_its_own():
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
    rows = {'a': row(config='a.py'), 'b': row(config='b.py', scale=2)}
    assert cells(figures_table(rows, ''))['b']['time / a'] == '2.000'


def test_modelled_steps_take_the_larger_of_host_and_gpu():
    def part(host, launches, memory, arithmetic):
        seconds = dict(launches=launches, memory=memory, arithmetic=arithmetic)
        return dict(ops=1500, kernels=2, host=host, cards=dict(T4=seconds))

    made = row(
        gpu_model={
            'backbone': part(0.004, 0.001, 0.002, 0.003),
            'neck': part(0.007, 0.001, 0.002, 0.003),
            'optimizer': part(0.001, 0.001, 0.002, 0.0),
        }
    )
    assert cells(gpu_table({'as-is': made}, ['T4'])) == {
        'as-is': {
            'measured s/step': '0.200',
            'ops': '4,500',
            'kernels': '6',
            'host ms': '12.0',
            'T4 GPU ms': '15.0',
            'T4 step ms': '15.0',
        }
    }
    found = cells(gpu_parts_table('as-is', made, ['T4']))
    bounds = {k: v['T4 GPU ms, bound by'] for k, v in found.items()}
    assert bounds == {
        'backbone': '6.0, arithmetic',
        'neck': '6.0, launches',
        'optimizer': '3.0, memory',
    }


@pytest.mark.parametrize('missing', ['memory_bytes', 'seconds'])
def test_what_was_not_measured_takes_no_column(missing):
    rows = {'as-is': row(), 'full': row('full', scale=4)}
    for made in rows.values():
        del made[missing]
    found = cells(figures_table(rows, ''))['as-is']
    for head in ('peak MiB', 'peak / full'):
        assert (head in found) == (missing == 'seconds')
    for head in ('s/step (min-max)', 'time / full'):
        assert (head in found) == (missing == 'memory_bytes')


def test_a_row_may_be_empty():
    assert {column({}) for column in COLUMNS.values()} == {''}


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
    assert cells(modules_table(rows)) == {
        'neck': {'as-is': '7.0', 'full': '7.0'},
        '(model)': {'as-is': '0.5', 'full': '0.0'},
        'backbone': {'as-is': '0.0', 'full': '20.0'},
        'sum': {'as-is': '7.5', 'full': '27.0'},
    }


def test_cards_that_hold_a_step():
    found = cells(fits_table({'as-is': 8 * 2**30}, [6, 8, 11]))
    assert found['as-is'] == {
        'needs MiB': '8,192.0',
        '6 GB': 'no',
        '8 GB': 'yes',
        '11 GB': 'yes',
    }


def test_advice_is_to_be_pasted():
    line = "custom_hooks = [*_base_.custom_hooks, dict(modules=['neck'])]"
    head, *lines = advice('a', [Change(5 * MIB, 'kept', line)]).splitlines()
    assert head.startswith('a does not fit')
    assert lines == ['# 5.0 kept', line]
    assert 'Nothing' in advice('as-is', [])


def test_a_plot_of_peaks_and_seconds():
    rows = {'as-is': row(), 'full': row('full', scale=4)}
    memory, seconds = draw(rows, 'title').axes
    widths = {
        container.get_label(): [bar.get_width() for bar in container]
        for container in memory.containers
    }
    assert widths['kept'] == [40, 160] and list(widths) == [*CATEGORIES]
    ends = [bar.get_x() + bar.get_width() for bar in memory.containers[-1]]
    assert ends == [150, 600]
    medians, spread = seconds.containers[1], seconds.containers[0]
    assert [b.get_width() for b in medians] == pytest.approx([0.2, 0.8])
    (segments,) = spread.lines[2]
    ends = [segment[:, 0].tolist() for segment in segments.get_segments()]
    assert ends[1] == pytest.approx([0.4, 1.2])
    for made in rows.values():
        del made['memory_bytes']
    (only,) = draw(rows, '').axes
    assert 'seconds' in only.get_xlabel()
