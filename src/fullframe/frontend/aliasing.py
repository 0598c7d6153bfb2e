"""Memory that several of a call's tensors share, and identities that a recording cannot keep: refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from fullframe.errors import CaptureError
from fullframe.frontend.guards import GuardSnapshot
from fullframe.frontend.inputs import Call
from fullframe.torch_compat import pytree


def refuse_changes(call: Call, arguments: Any, given: Any, marks: Iterable[tuple[torch.Tensor, Any]]) -> None:
    """Refuse what the forward changed of its arguments' containers, or set on a tensor of the call."""
    leaves, spec = pytree.tree_flatten(arguments)
    if spec != given[1] or any(a is not b for a, b in zip(leaves, given[0], strict=True)):
        raise CaptureError(
            "the forward changes a list or dictionary among its arguments, which a recorded step would leave as it "
            "is; return what it adds"
        )
    for (tensor, old), name in zip(marks, call.names, strict=True):
        now = vars(tensor)
        if now.keys() != old.keys() or any(now[k] is not old[k] for k in old):
            raise CaptureError(
                f"the forward sets an attribute of the tensor {name}, which a recorded step would not; keep it in "
                "the module"
            )


def refuse_identities(call: Call, snapshot: GuardSnapshot) -> None:
    """Refuse code that tells the call's tensors apart by identity: while it is recorded they have placeholders."""
    known = {id(t): name for t, name in zip(call.tensors, call.names, strict=True)}
    own = {id(h.state) for h in snapshot.holders if isinstance(h, torch.optim.Optimizer)}
    tables = (c for c in (*snapshot.containers, *snapshot.sets) if isinstance(c, (dict, set, frozenset)))
    looked_up = (k for c in tables if id(c) not in own for k in c)
    found = next((known[id(k)] for k in looked_up if isinstance(k, torch.Tensor) and id(k) in known), None)
    found = found or next((known[n] for n in snapshot.parts if type(n) is int and n in known), None)
    if found is not None:
        raise CaptureError(
            f"the step can reach a set, a dictionary or a number, as of id(), that tells {found} from other tensors "
            "by its identity, and while it is recorded its tensors have placeholders, which are other objects; tell "
            "them apart by their names"
        )


def refuse_shared(
    changed: Collection[int], tensors: Sequence[torch.Tensor], names: Sequence[str], unused: frozenset[int]
) -> None:
    """Refuse changes in place of memory that two of the call's tensors share, if both are used.

    Tensors without elements share none, though all of them lie at the same address.
    """
    places: dict[int, list[int]] = {}
    lying = {k for k, t in enumerate(tensors if changed else ()) if t.layout is torch.strided and t.numel()}
    for k in lying - unused:
        places.setdefault(tensors[k].untyped_storage().data_ptr(), []).append(k)
    for k in lying.intersection(changed):
        for j in places.get(tensors[k].untyped_storage().data_ptr(), ()):
            if j != k and _overlap(tensors[k], tensors[j]):
                raise CaptureError(
                    f"the step changes {names[k]} in place, and {names[j]} shares its memory; a recorded "
                    "step keeps them apart. Give one of them memory of its own (clone)"
                )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may have an element in common: the ranges they span in one memory."""
    if {a.layout, b.layout} != {torch.strided} or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    spans = []
    for t in (a, b):
        start = t.storage_offset() * t.itemsize
        reach = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1
        spans.append((start, start + reach * t.itemsize))
    return min(end for _, end in spans) > max(start for start, _ in spans)
