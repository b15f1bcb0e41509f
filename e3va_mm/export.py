"""The network of a trained model as one file: torch.export or ONNX.

Exported is what lies between the data preprocessor and the post-processing:
operators that only mmcv has (RoIAlign, NMS) and loops over detections are
left out.
"""

import importlib.util
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from e3va_mm.errors import ConfigError
from e3va_mm.utils.files import write_whole

ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
# Of a protobuf file, 2 GiB, with room for the graph.
LARGEST_ONNX = 1.8 * 2**30
HALVES = (torch.bfloat16, torch.float16)


class Network(nn.Module):
    """What of a model is exported, with names for its outputs.

    ===================  ====================================================
    of                   outputs
    ===================  ====================================================
    a segmentor          ``logits`` (B, classes, h, w), of the decode head
    a one-stage          ``maps_0``... of the neck, finest first, and
    detector             ``head_K_L``: kind K (scores, boxes...) on map L
    a two-stage          the same of the neck and the RPN; what follows works
    detector             on regions and stays with mmdet
    ===================  ====================================================

    Args:
        model (nn.Module): A detector of mmdet or a segmentor of mmseg, built
            and loaded.

    Raises:
        ConfigError: If the model is of another kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Of two stages the first, which sees whole maps.
        self._head = 'rpn_head' if hasattr(model, 'rpn_head') else 'bbox_head'
        self.segments = hasattr(model, 'decode_head')
        head = getattr(model, self._head, None)
        kinds = {kind.__name__ for kind in type(head).__mro__}
        if not self.segments and 'BaseDenseHead' not in kinds:
            raise ConfigError(
                'Expected a segmentor, or a detector of mmdet with a dense '
                f'head or an RPN, but got {type(model).__name__}. Others '
                'cannot be exported.'
            )
        self.model = model.eval()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), preprocessed -> the outputs by name."""
        # Hides the backbone's switches of the gradient mode from the tracer:
        # under `no_grad` they change nothing, but each costs a part of the
        # graph, and the export most of its time.
        with torch._C.DisableTorchFunction():
            if self.segments:
                return dict(logits=self.model(inputs, mode='tensor'))
            maps = self.model.extract_feat(inputs)
            outputs = {f'maps_{i}': each for i, each in enumerate(maps)}
            found = getattr(self.model, self._head)(maps)
            for kind, levels in enumerate(found):
                for level, each in enumerate(levels):
                    outputs[f'head_{kind}_{level}'] = each
            return outputs


class Difference(NamedTuple):
    """How far an output of the file is from that of the model."""

    shape: tuple[int, ...]
    absolute: float  # the largest
    relative: float  # the same over the largest value


def preprocessed(
    model: nn.Module, batch: int, size: tuple[int, int]
) -> Tensor:
    """Noise (batch, 3, H, W), as the model's preprocessor hands it on."""
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        for _ in range(batch)
    ]
    data = dict(inputs=images, data_samples=None)
    return model.data_preprocessor(data, False)['inputs']


@torch.no_grad()
def export_network(network: Network, inputs: Tensor, out: Path) -> Callable:
    """Write a file for inputs of one shape, and read it again.

    Args:
        network (Network): What to export.
        inputs (Tensor): (B, 3, H, W), an example; the shape is fixed.
        out (Path): ``.pt2`` for a program of ``torch.export``, ``.onnx`` for
            ONNX.

    Returns:
        Callable: Runs the file: inputs -> outputs by name.

    Raises:
        ConfigError: As :func:`check_out`, or if a network for ONNX computes
            in 16 bits.
        CheckpointError: If a .pt2 file cannot be written; an older one stays.
    """
    check_out(out)
    names = list(network(inputs))
    program = torch.export.export(network, (inputs,), strict=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == '.onnx':
        return _export_onnx(program, names, out)
    buffer = BytesIO()
    torch.export.save(program, buffer)
    write_whole(out, buffer.getvalue())
    return torch.export.load(out).module()


def _export_onnx(
    program: torch.export.ExportedProgram, names: list[str], out: Path
) -> Callable:
    values = (node.meta.get('val') for node in program.graph.nodes)
    if any(getattr(value, 'dtype', None) in HALVES for value in values):
        raise ConfigError(
            f'{out}: the network computes in 16 bits, which ONNX Runtime '
            "lacks on CPU. Export it with `preset='exact'` and without "
            '`compute`, `trunk_compute` and `trunk_weights`, or write a .pt2 '
            'file.'
        )
    import onnxruntime

    size = sum(v.nbytes for v in program.state_dict.values())
    torch.onnx.export(
        program,
        f=out,
        dynamo=True,
        input_names=['inputs'],
        output_names=names,
        external_data=size > LARGEST_ONNX,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(
        out, providers=['CPUExecutionProvider']
    )

    def run(inputs: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {'inputs': inputs.cpu().numpy()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


def check_out(out: Path) -> None:
    """Refuse, by ConfigError, a file that cannot be written here."""
    if out.suffix not in ('.pt2', '.onnx'):
        raise ConfigError(
            f'--out should end in .pt2 (torch.export) or .onnx, but got {out}.'
        )
    missing = [
        name
        for name in ONNX_PACKAGES
        if out.suffix == '.onnx' and importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f'{out}: ONNX needs packages that are not installed: '
            f'`pip install {" ".join(missing)}`. Or write a .pt2 file.'
        )


@torch.no_grad()
def differences(
    run: Callable, network: Network, inputs: Tensor
) -> dict[str, Difference]:
    """Compare a file with its model, output by output.

    Args:
        run (Callable): From :func:`export_network`.
        network (Network): The model.
        inputs (Tensor): (B, 3, H, W), best not those of the export: what was
            kept as a constant by mistake shows with others alone.
    """
    found = run(inputs)
    result = {}
    for name, expected in network(inputs).items():
        expected = expected.cpu()
        apart = (found[name].cpu() - expected).abs().max().item()
        largest = max(expected.abs().max().item(), 1e-12)
        result[name] = Difference(
            tuple(expected.shape), apart, apart / largest
        )
    return result
