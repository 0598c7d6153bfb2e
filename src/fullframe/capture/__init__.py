"""Records a call as a flat graph of ATen calls on fake tensors."""
