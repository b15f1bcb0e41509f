"""Files of weights, as a user has them, and what is said of bad ones."""

import io

import pytest
import torch

from e3va_mm.errors import CheckpointError
from e3va_mm.weights import read_checkpoint


def weights():
    torch.manual_seed(0)
    return {'weight': torch.rand(32, 32), 'bias': torch.rand(32)}


def saved(path, content=None, **kwargs):
    torch.save(weights() if content is None else content, path, **kwargs)
    return path


def saved_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refusal_of(path, read=read_checkpoint):
    with pytest.raises(CheckpointError) as error:
        read(str(path))
    return str(error.value)
