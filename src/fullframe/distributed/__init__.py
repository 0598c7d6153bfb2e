"""Several processes that make a step together: the only user of ``torch.distributed``."""
