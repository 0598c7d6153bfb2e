"""The arithmetic that primitives share: convolutions in pieces, interpolation taps, tables, pooling kernels."""
