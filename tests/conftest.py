"""Fixtures that several files ask for by name."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Ops in one thread, as a worker runs them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
