"""Files and embeddings of the Swin Transformer of mmdet and mmseg."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from e3va_mm.errors import ConfigError
from e3va_mm.trunks.trunk import Trunk
from e3va_mm.weights import describe_swin, to_stock_keys

TABLE = 'relative_position_bias_table'
INDEX = 'relative_position_index'


class SwinTrunk(Trunk):
    """A Swin Transformer; takes the official files too."""

    def check_embedding(self, tokens: Tensor, image: Tensor) -> None:
        """Refuse an image of another size than position embeddings are for.

        Raises:
            ConfigError: If there are absolute ones and it is.
        """
        positions = getattr(self.stock, 'absolute_pos_embed', None)
        if positions is not None and tokens.shape[1] != positions.shape[1]:
            raise ConfigError(
                '`use_abs_pos_embed=True` fixes the number of tokens to that '
                f'of `pretrain_img_size`, {positions.shape[1]}, but an image '
                f'of {tuple(image.shape[-2:])} pixels gives '
                f'{tokens.shape[1]}. Resize and pad every image to '
                '`pretrain_img_size`, or use a trunk without absolute '
                'position embeddings.'
            )

    def to_stock_state(
        self, checkpoint: Mapping
    ) -> tuple[dict[str, Tensor], str]:
        """See :class:`Trunk`."""
        return to_stock_keys(checkpoint)

    def adapt_state(
        self, expected: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> list[str]:
        """Resize position tables of another window size, as stock Swin does.

        The index buffers follow from the window size alone; files of another
        window size, and slim files, leave them as they were constructed.
        """
        resized = 0
        for key, ours in expected.items():
            theirs = found.get(key)
            if key.endswith(INDEX):
                if theirs is None or theirs.shape != ours.shape:
                    found[key] = ours
            elif (
                key.endswith(TABLE)
                and theirs is not None
                and theirs.ndim == 2
                and theirs.shape != ours.shape
                and theirs.shape[1] == ours.shape[1]
            ):
                found[key] = _resize_table(theirs, ours.shape[0])
                resized += 1
        if not resized:
            return []
        return [f'{resized} position tables resized to the window size']

    def leftovers(self) -> list[str]:
        """Also the classifier's norm."""
        return [*super().leftovers(), r'norm\.(weight|bias)']

    def describe(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """See :class:`Trunk`."""
        return describe_swin(state)


def _resize_table(table: Tensor, length: int) -> Tensor:
    """(S*S, heads) -> (length, heads), bicubic over the square."""
    old, new = int(table.shape[0] ** 0.5), int(length**0.5)
    square = table.t().reshape(1, -1, old, old)
    square = F.interpolate(square.float(), size=(new, new), mode='bicubic')
    return square.reshape(-1, length).t().contiguous().to(table.dtype)
