"""What a caller has around a call that must not reach into a recording, nor be left out in silence.

Hooks on saved tensors (``torch.utils.checkpoint``, ``save_on_cpu``) are for the tensors that the call itself saves; a
recording inside them would run the caller's code and keep what it did.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from fullframe.errors import CaptureError
from fullframe.torch_compat import dispatch_modes, dynamo, pop_saved_hooks, push_saved_hooks, top_saved_hooks


@contextmanager
def unhooked() -> Iterator[None]:
    """Inside, the caller's hooks on saved tensors do not see what is saved; such as are set inside do."""
    kept: list[Any] = []
    while (hooks := top_saved_hooks(True)) is not None:
        kept.append(hooks)
        pop_saved_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(kept):
            push_saved_hooks(pack, unpack)


def refuse_modes() -> None:
    """Refuse what sees every op, and may change it: a tiled call has the engine's, in threads of its own."""
    if torch.jit.is_tracing():
        raise CaptureError(
            "torch.jit.trace writes down the ops of plain PyTorch, and a tiled module or step has other ops, in "
            "threads of its own; trace the plain module, which it has as .module"
        )
    # `drawn`, which draws as the engine does, is one of our own.
    found = [m for m in dispatch_modes() if not ours(m)]
    if found:
        raise CaptureError(
            f"{type(found[-1]).__name__}, a TorchDispatchMode, sees every op of plain PyTorch, and a tiled module or "
            "step has other ops, in threads of its own; use the plain module inside of it"
        )


def ours(thing: Any) -> bool:
    """Whether a function or the class of an object is the engine's."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "fullframe"


@contextmanager
def unlogged() -> Iterator[None]:
    """Inside, torch does not log at length how its tensors without numbers failed: the error itself is raised."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
SHOWN = tuple(TORCH + name for name in ("nn", "distributions", "functional.py"))


def trimmed(traceback: TracebackType | None) -> TracebackType | None:
    """Where an error of the caller's own code comes from, without the frames of torch's insides and of ours."""
    if traceback is None:
        return None
    rest = trimmed(traceback.tb_next)
    file = traceback.tb_frame.f_code.co_filename
    if file.startswith(HERE) or (file.startswith(TORCH) and not file.startswith(SHOWN)):
        return rest
    return TracebackType(rest, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile calls as it is, with all that it calls, instead of tracing it.

    As `torch.compiler.disable` does, which would load the compiler, some seconds' work, to say so beforehand.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            if dynamo() is None:
                return function(*args, **kwargs)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    vars(called)["_torchdynamo_disable"] = True
    return called


class PendingBackward(bytearray):
    """What a forward leaves for its backward, which finds it by the number in a tensor that autograd saves.

    So the caller's hooks on saved tensors have their say: where they make the forward again, the number that comes
    back is that of the second one. The tensor looks into this memory and keeps it alive.
    """

    def __new__(cls, load: Any) -> PendingBackward:
        return super().__new__(cls)

    def __init__(self, load: Any):
        number = next(_NUMBERS)
        super().__init__(number.to_bytes(8, "little"))
        self.load = load
        _PENDING[number] = self

    def token(self) -> torch.Tensor:
        """The tensor to save."""
        return torch.frombuffer(self, dtype=torch.int64)

    def own(self) -> PendingBackward | None:
        """For the forward's own node to keep; nothing inside of torch's checkpoint, which makes the forward again."""
        hooks = top_saved_hooks(True)
        again = hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
        return None if again else self


_NUMBERS = itertools.count(1)
_PENDING: weakref.WeakValueDictionary[int, PendingBackward] = weakref.WeakValueDictionary()


def find_pending(token: torch.Tensor, own: PendingBackward | None) -> PendingBackward | None:
    """The flight of a token that autograd kept; the node's own where hooks have made something else of it."""
    return _PENDING.get(int(token)) or own
