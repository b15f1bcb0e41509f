from collections.abc import Iterable, Iterator
from io import StringIO

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from torch import nn

from e3va_mm.registry import HOOKS
from e3va_mm.utils.tuned import side_path_backbones
from e3va_mm.utils.unwrapping import unwrapped

# As wide as a README; the terminal's width must not change the log file.
WIDTH = 79


@HOOKS.register_module()
class TrainableTableHook(Hook):
    """Logs, before training, how many parameters train in which part.

    A backbone with a side path takes three rows, ``side path``, ``output
    norms`` and ``trunk``; every other child of the model takes one. Each
    parameter is counted once. Below the table stands the share of the backbone
    that trains, of the **stock** backbone without a side path: Swin-B has
    86,745,016 parameters, of which E3VA's 1,195,008 are 1.38 %, as in the
    paper. On Swin-L the same rule gives 1,792,512 / 194,998,164 = 0.92 %; the
    paper's 0.90 % divides by its own count of Swin-L, 198.58 million.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        """Log the table."""
        if is_main_process():
            text = trainable_table(unwrapped(runner.model))
            runner.logger.info(f'Trainable parameters\n{text}')


def trainable_table(model: nn.Module) -> str:
    """The table of a model and the lines below it, as plain text."""
    table = Table(box=ASCII2, width=WIDTH)
    table.add_column('part')
    for name in ('parameters', 'trainable', 'share'):
        table.add_column(name, justify='right')
    seen: set[nn.Parameter] = set()
    for name, parameters in _parts(model):
        new = {*parameters} - seen
        seen |= new
        if new:
            train, total, share = _shares(new)
            table.add_row(name, f'{total:,}', f'{train:,}', share)
    text = StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    lines = [text.getvalue().rstrip()]
    if hasattr(model, 'backbone'):
        beside = sum(p.numel() for p in _side_path(model.backbone))
        train, total, share = _shares(model.backbone.parameters(), beside)
        lines.append(
            f'Trainable in the backbone: {train:,} of {total:,} stock '
            f'parameters ({share})'
        )
    train, total, share = _shares(model.parameters())
    lines.append(f'Trainable in the model: {train:,} of {total:,} ({share})')
    return '\n'.join(lines)


def _parts(model: nn.Module) -> Iterator[tuple[str, Iterable[nn.Parameter]]]:
    for name, child in model.named_children():
        side_path = _side_path(child)
        if side_path:
            yield f'{name} (side path)', side_path
            norms = dict(child.trainable_children())
            norms.pop('side_path')
            norms = [p for norm in norms.values() for p in norm.parameters()]
            yield f'{name} (output norms)', norms
        yield f'{name} (trunk)' if side_path else name, child.parameters()
    yield '(own)', model.parameters()


def _side_path(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the side path of a backbone; none of other modules."""
    own = [b for prefix, b in side_path_backbones(module) if not prefix]
    paths = [dict(b.trainable_children()).get('side_path') for b in own]
    return [p for path in paths if path for p in path.parameters()]


def _shares(
    parameters: Iterable[nn.Parameter], beside: int = 0
) -> tuple[int, int, str]:
    """How many train, of how many without those beside, in per cent."""
    parameters = [*parameters]
    train = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters) - beside
    return train, total, f'{100 * train / max(total, 1):.2f} %'
