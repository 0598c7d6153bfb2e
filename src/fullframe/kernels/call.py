"""What a ready job needs of a kernel, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Call:
    """A kernel on tensors of known layout: only their places in memory are still to come."""

    __slots__ = ()

    def __call__(self, places: Sequence[int]) -> list[torch.Tensor]:
        """Run it on the operands and outputs at these addresses; returns what `Kernel.run` does."""
        raise NotImplementedError
