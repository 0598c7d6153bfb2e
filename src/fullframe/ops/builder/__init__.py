"""Builds a graph of primitives: the builder, its view of memory, and the registry of decompositions."""
