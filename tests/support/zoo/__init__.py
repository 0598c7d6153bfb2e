"""Published networks, small: how to make each, what it is trained with, and the comparison with plain PyTorch."""

from zoo import dense, medical, vision
from zoo.entry import Entry, build, image_of

ENTRIES: list[Entry] = [*medical.ENTRIES, *vision.ENTRIES, *dense.ENTRIES]

__all__ = ["ENTRIES", "Entry", "build", "image_of"]
