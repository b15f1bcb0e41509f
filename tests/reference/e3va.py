"""The equations of E3VA over a stock Swin, written out in plain torch.

Independent of the package: own adapters, own patch merging, no hooks. Only the
stock blocks' attention and MLP are called as they are.
"""

import torch
import torch.nn.functional as F


def adapter(state, name, index, x):
    """A(x) = GELU(x P1 Q1 + b1) P2 Q2 + b2, one of those of a stage."""
    part = {
        k: state[f'{name}.{k}'][index]
        for k in ('down.p', 'down.q', 'down.bias', 'up.p', 'up.q', 'up.bias')
    }
    inner = torch.einsum('blm,mr,rn->bln', x, part['down.p'], part['down.q'])
    inner = F.gelu(inner + part['down.bias'])
    return (
        torch.einsum('bln,nr,rm->blm', inner, part['up.p'], part['up.q'])
        + part['up.bias']
    )


def merge(x, size, downsample, norm=True):
    """Patch merging by slices; channel order c * 4 + 2 * row + column."""
    (height, width), (batch, _, channels) = size, x.shape
    x = x.reshape(batch, height, width, channels)
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    x = torch.stack(corners, dim=-1).flatten(3)
    size = x.shape[1:3]
    x = x.flatten(1, 2)
    if norm:
        x = F.layer_norm(
            x,
            x.shape[-1:],
            downsample.norm.weight,
            downsample.norm.bias,
            downsample.norm.eps,
        )
    return x @ downsample.reduction.weight.T, size


def backbone(
    stock, state, image, taps=('attn', 'ffn'), downsampling='difference'
):
    """Outputs of a frozen stock Swin with the side path in ``state``.

    ``state`` maps ``side_path.*`` and ``norm*`` names to tensors.
    """
    x, size = stock.patch_embed(image)
    h = torch.zeros_like(x)
    outputs = []
    for i, stage in enumerate(stock.stages):
        for j, block in enumerate(stage.blocks):
            for tap in ('attn', 'ffn'):
                with torch.no_grad():
                    if tap == 'attn':
                        value = block.attn(block.norm1(x), size)
                    else:
                        value = block.ffn.layers(block.norm2(x))
                    x = x + value
                if tap in taps:
                    name = f'side_path.stages.{i}'
                    index = j * len(taps) + taps.index(tap)
                    h = h + adapter(state, name, index, value)
        y = F.layer_norm(
            x + h,
            x.shape[-1:],
            state[f'norm{i}.weight'],
            state[f'norm{i}.bias'],
        )
        outputs.append(y.transpose(1, 2).reshape(len(y), -1, *size))
        if i + 1 < len(stock.stages):
            with torch.no_grad():
                x_next, next_size = merge(x, size, stage.downsample)
            if downsampling == 'linear':
                h, _ = merge(h, size, stage.downsample, norm=False)
            else:
                h = merge(x + h, size, stage.downsample)[0] - x_next
            x, size = x_next, next_size
    return outputs
