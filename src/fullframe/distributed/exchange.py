"""Exchanges in which every rank takes part, also one that has failed: so all of them know, at the same place.

With the bytes for each other rank goes a word that says whether the sender has failed. A rank that fails before an
exchange takes part in it all the same, with bytes that mean nothing; then all tell each other what has happened, and
each raises. The group is in step afterwards, and the next step may be tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fullframe.distributed.mesh import Domain, Thing
from fullframe.errors import RankError

WORD = 8  # bytes of what goes ahead, and to which all parts are rounded up


def rounded(nbytes: int) -> int:
    """Bytes of a part of a message, so that numbers of all types begin where they may."""
    return -(-nbytes // WORD) * WORD


class Swap:
    """One exchange of bytes, of sizes that both sides know; ``outgoing`` and `go` have a tensor for each rank."""

    def __init__(self, domain: Domain, sends: Sequence[int], receives: Sequence[int]):
        others = [q != domain.rank for q in range(domain.size)]
        self.domain = domain
        self.sends = [(WORD + rounded(n)) * yes for n, yes in zip(sends, others, strict=True)]
        self.receives = [(WORD + rounded(n)) * yes for n, yes in zip(receives, others, strict=True)]
        self._block = torch.empty(sum(self.sends), dtype=torch.uint8)
        self.outgoing = [part[WORD:] for part in self._block.split(self.sends)]

    def go(self, failed: BaseException | None = None) -> list[torch.Tensor]:
        """The bytes from each rank; raises `RankError` where any has failed, and what has ``failed`` here."""
        for part in self._block.split(self.sends):
            part[:WORD] = failed is not None
        incoming = self.domain.swap(self._block, self.sends, self.receives).split(self.receives)
        if failed is not None or any(bool(part[:1].any()) for part in incoming):
            agree(self.domain, None, failed)
        return [part[WORD:] for part in incoming]


_TOLD = "_fullframe_told"


def told(error: BaseException) -> bool:
    """Whether all ranks know of an error."""
    return isinstance(error, RankError) or getattr(error, _TOLD, False)


def together(error: BaseException) -> BaseException:
    """An error that is raised on all ranks at the same place."""
    setattr(error, _TOLD, True)
    return error


def agree(domain: Domain, thing: Thing, failed: BaseException | None = None) -> list[Thing]:
    """What each rank has given; `RankError` where any has failed instead, and on that one what it has failed with."""
    found = domain.gather((thing, None if failed is None else f"{type(failed).__name__}: {failed}"))
    if failed is not None:
        raise together(failed)
    faults = [f"rank {k}: {text}" for k, (_, text) in enumerate(found) if text is not None]
    if faults:
        raise RankError(
            f"the step has failed on another rank of the {domain.name}, and nothing is changed on any: "
            f"{'; '.join(faults)}"
        )
    return [given for given, _ in found]
