"""Cuts a graph into sections and fusion groups."""
