"""Steps of align and distill by CUDA graphs, against steps without. Run by test_training_steps.py, or directly:

python -m pytest tests/kernels/graph_cases.py
"""

import pytest
import torch
from graphed_training import trained

from rwkvinside.training.cuda_graphs import CudaRecorder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective, spec", [("align", {}), ("distill", {}), ("align", {"window": 3, "sinks": 1})])
def test_steps_are_those_without_graphs(objective, spec, packed):
    """Up to the order of sums: flash attention adds its gradients up in any."""
    device = torch.device("cuda")
    given = (objective, "qwen3", packed)
    wanted, weights = trained(*given, None, "bf16", device, **spec)
    found, same = trained(*given, CudaRecorder(device), "bf16", device, **spec)
    for one, other in zip(found, wanted, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=5e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
    moved = torch.cat([(x - same[name]).flatten() for name, x in weights.items()])
    assert moved.norm() <= 2e-2 * torch.cat([x.flatten() for x in weights.values()]).norm()
