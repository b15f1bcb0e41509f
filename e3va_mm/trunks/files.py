"""Files that a trunk's weights are read from."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from e3va_mm.trunks.layout import Layout
from e3va_mm.weights import describe_class, to_class_names, to_stock_state


class TrunkFiles:
    """What files of a stock backbone are like.

    Attributes:
        stock (nn.Module): The stock backbone.
        stock_class (type): Its class.
        layout (Layout): Where its parts are.
    """

    stock: nn.Module
    stock_class: type
    layout: Layout
    # Keys of what was cut off behind the last output.
    removed: set[str]

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """State with stock names from any known format, and its name."""
        state, form = to_stock_state(checkpoint)
        return to_class_names(state, self.stock_class.__name__), form

    def adapt_state(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Fit tensors in place where stock loading does; say what was done.

        The stock class's own hooks fit what a file holds. What they take out,
        and index buffers that follow from the configuration, stay as they
        were constructed.
        """
        before = dict(found)
        for hook in self._load_hooks:
            hook(found, '', {}, False, [], [], [])
        for key, ours in expected.items():
            theirs = found.get(key)
            gone = key in before and theirs is None
            derived = (
                not ours.is_floating_point()
                or key.endswith('relative_coords_table')
            ) and (theirs is None or theirs.shape != ours.shape)
            if gone or derived:
                found[key] = ours
        changed = [
            key
            for key, value in before.items()
            if key in found and found[key].shape != value.shape
        ]
        if not changed:
            return []
        return [f'{len(changed)} position tables resized: {changed[0]}, ...']

    def leftovers(self) -> list[str]:
        """Regular expressions of keys that a fitting file may have too.

        Heads, masks, other outputs' norms, what lies past the last.
        """
        patterns = [
            r'(head|fc|fc_norm|head_drop|classifier)\..*',
            r'mask_token',
            r'.*\.attn_mask',
            *map(re.escape, self.removed),
        ]
        if self.layout.output_norm is not None:
            norm = re.escape(self.layout.output_norm.removesuffix('?'))
            norm = norm.replace(re.escape('{stage}'), r'\d+')
            patterns.append(norm + r'\.(weight|bias)')
        return patterns

    def describe(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """The size of a variant, by the names of its config, if known."""
        return describe_class(state, self.stock_class.__name__)

    def _archs(self, found: Mapping[str, object]) -> list[str]:
        """How the stock class names a variant in its config."""
        zoo = next(
            (
                vars(cls)[name]
                for cls in self.stock_class.__mro__
                for name in ('arch_zoo', 'arch_settings')
                if name in vars(cls)
            ),
            {},
        )
        known = {key: value for key, value in found.items() if value}
        return [
            f'`arch={arch!r}`'
            for arch, sizes in zoo.items()
            if known.keys() & sizes.keys()
            and all(
                _plain(known[key]) == _plain(value)
                for key, value in sizes.items()
                if key in known
            )
        ]

    def explain_mismatch(
        self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
    ) -> str:
        """The likely cause when a file does not fit."""
        filters = [
            (value.shape, found[key].shape)
            for key, value in expected.items()
            if key.endswith('.weight') and value.ndim == 4 and key in found
        ]
        # Of the first convolution.
        for shape, other in filters[:1]:
            if len(other) == 4 and shape[1] != other[1]:
                return (
                    f'The file is for images of {other[1]} channels, the '
                    f'config has in_channels={shape[1]}. Set in_channels='
                    f'{other[1]} and have the pipeline give as many channels '
                    "(LoadImageFromFile(color_type='color') gives 3)."
                )
        ours, theirs = self.describe(expected), self.describe(found)
        if ours != theirs:
            named = self._archs(theirs)
            if named:
                named = f"The file's is {' or '.join(named)}. "
            ours, theirs = (
                ', '.join(f'{k}={v}' for k, v in each.items())
                for each in (ours, theirs)
            )
            return (
                f'The file holds a {self.stock_class.__name__} with {theirs}; '
                f'the config asks for {ours}. {named}Take the weights of the '
                'variant in the config, or change the config.'
            )
        if ours:
            return (
                'The trunk is of the right variant: either tensors were lost, '
                'or the file was trained with other options of the tuner.'
            )
        return (
            f'The config asks for a {self.stock_class.__name__}. Take the '
            'weights of the same class and variant, bring those of another '
            'project to its names with the model converters of the '
            'frameworks or of tools/model_converters, or change the config.'
        )


def _plain(value: object) -> object:
    """Lists of configs are tuples of files."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
