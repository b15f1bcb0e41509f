import torch

from e3va_mm.numerics.temporaries import (
    as_on_gpu,
    runs_as_on_gpu,
    temporary_bytes,
)


def test_only_a_cpu_works_on_little_at_a_time():
    cpu, gpu = torch.device('cpu'), torch.device('cuda')
    assert temporary_bytes(cpu) < temporary_bytes(gpu)
    assert runs_as_on_gpu(gpu) and not runs_as_on_gpu(cpu)
    with as_on_gpu():
        assert temporary_bytes(cpu) == temporary_bytes(gpu)
    assert not runs_as_on_gpu(cpu)
