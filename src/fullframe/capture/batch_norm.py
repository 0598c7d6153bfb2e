"""Batch norm with ``momentum=None``, written so that it can be recorded.

PyTorch's own reads the number of batches as a Python number, which a recording would freeze.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fullframe.torch_compat import BatchNorm

FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)


@contextmanager
def recordable(root: nn.Module) -> Iterator[None]:
    """Inside, such norms under ``root`` compute their cumulative average from tensors alone."""
    found = [m for m in root.modules() if isinstance(m, BatchNorm) and _reads_its_count(m)]
    for norm in found:
        norm.forward = partial(_forward, norm)
    try:
        yield
    finally:
        for norm in found:
            del norm.forward


def _reads_its_count(norm: BatchNorm) -> bool:
    own = "forward" not in norm.__dict__ and type(norm).forward in FORWARDS
    return own and norm.training and norm.momentum is None and norm.num_batches_tracked is not None


def _forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Like the norm's own forward: the running statistics become means over all batches so far."""
    norm._check_input_dim(x)
    norm.num_batches_tracked.add_(1)
    # With momentum 1, fresh buffers come back as the statistics of this batch.
    mean, var = torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)
    y = F.batch_norm(x, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
    with torch.no_grad():
        share = 1.0 / norm.num_batches_tracked.to(mean.dtype)
        norm.running_mean.add_((mean - norm.running_mean) * share)
        norm.running_var.add_((var - norm.running_var) * share)
    return y
