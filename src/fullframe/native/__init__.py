"""Kernels written by hand: convolutions, also by fewer products, and their weight gradients."""
