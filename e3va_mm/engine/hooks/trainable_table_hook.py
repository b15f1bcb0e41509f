from collections.abc import Iterator
from io import StringIO
from typing import NamedTuple

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from torch import nn

from e3va_mm.registry import HOOKS
from e3va_mm.utils.wrappers import unwrapped

# As wide as a README; the terminal's width must not change the log file.
WIDTH = 79


class Part(NamedTuple):
    """A row of the table: parameters of one part of the model."""

    name: str
    total: int
    trainable: int

    @property
    def share(self) -> float:
        """Trainable parameters of this part, in per cent."""
        return 100 * self.trainable / self.total if self.total else 0.0


@HOOKS.register_module()
class TrainableTableHook(Hook):
    """Logs, before training, how many parameters train in which part.

    A backbone with a side path takes three rows, ``trunk``, ``side path`` and
    ``output norms``; every other child of the model takes one. Below the table
    stands the share of the backbone that trains. Its denominator is the
    **stock** backbone, trunk and output norms without the side path: Swin-B
    has 86,745,016 parameters, of which E3VA's 1,195,008 are 1.38 %, as in the
    paper. On Swin-L the same rule gives 1,792,512 / 194,998,164 = 0.92 %; the
    paper's 0.90 % divides by its own count of Swin-L, 198.58 million.

    Attributes:
        parts (list[Part]): The rows, each parameter counted once.
        backbone (Part, optional): ``total`` is the size of the stock
            backbone, ``trainable`` all that trains in ours. None for a model
            without a backbone.
        model (Part): The sums over the whole model.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        """Counts on every rank, logs on the first."""
        model = unwrapped(runner.model)
        self.parts = list(_parts(model))
        self.backbone = _backbone(model)
        self.model = Part(
            'model',
            sum(part.total for part in self.parts),
            sum(part.trainable for part in self.parts),
        )
        if is_main_process():
            runner.logger.info(f'Trainable parameters\n{self.render()}')

    def render(self) -> str:
        """The table and the lines below it, as plain text."""
        table = Table(box=ASCII2, width=WIDTH)
        table.add_column('part')
        for name in ('parameters', 'trainable', 'share'):
            table.add_column(name, justify='right')
        for part in self.parts:
            table.add_row(
                part.name,
                f'{part.total:,}',
                f'{part.trainable:,}',
                f'{part.share:.2f} %',
            )
        text = StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(table)
        lines = [text.getvalue().rstrip()]
        if self.backbone is not None:
            lines.append(
                f'Trainable in the backbone: {self.backbone.trainable:,} of '
                f'{self.backbone.total:,} stock parameters '
                f'({self.backbone.share:.2f} %)'
            )
        lines.append(
            f'Trainable in the model: {self.model.trainable:,} of '
            f'{self.model.total:,} ({self.model.share:.2f} %)'
        )
        return '\n'.join(lines)


def _parts(model: nn.Module) -> Iterator[Part]:
    """The rows of the table, in the order of the model's children."""
    seen: set[nn.Parameter] = set()

    def part(name: str, parameters) -> Part:
        new = set(parameters) - seen
        seen.update(new)
        return Part(
            name,
            sum(p.numel() for p in new),
            sum(p.numel() for p in new if p.requires_grad),
        )

    for name, child in model.named_children():
        side_path, norms = _side_path_and_norms(child)
        if side_path:
            rest = set(child.parameters()) - {*side_path, *norms}
            yield part(f'{name} (trunk)', rest)
            yield part(f'{name} (side path)', side_path)
            yield part(f'{name} (output norms)', norms)
        elif any(True for _ in child.parameters()):
            yield part(name, child.parameters())
    own = part('(own)', model.parameters())
    if own.total:
        yield own


def _side_path_and_norms(module: nn.Module) -> tuple[list, list]:
    """Parameters of the side path and of the output norms, if there are."""
    side_path, norms = [], []
    if hasattr(module, 'trainable_children'):
        for name, child in module.trainable_children():
            chosen = side_path if name == 'side_path' else norms
            chosen.extend(child.parameters())
    return side_path, norms


def _backbone(model: nn.Module) -> Part | None:
    """Size of the stock backbone against what trains in this one."""
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        return None
    side_path, _ = _side_path_and_norms(backbone)
    total = sum(p.numel() for p in backbone.parameters())
    return Part(
        'backbone',
        total - sum(p.numel() for p in side_path),
        sum(p.numel() for p in backbone.parameters() if p.requires_grad),
    )
