"""The version of the source, which needs no installation to be known."""

__version__ = "0.1.0"
