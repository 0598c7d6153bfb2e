"""Watches a step while it is recorded: which module is at work, and which tensors it touches.

Code reaches tensors in many ways: parameters, attributes, closures, globals. Whatever the way,
a tensor that is an input of the recording is replaced by its recorded placeholder as it enters an
operation, so that its number is never frozen and its gradient never lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fullframe import torch_compat
from fullframe.capture.conditions import location, recorded
from fullframe.capture.constants import INDEXING, MAKERS, READERS, BufferSource, ConstantTracker
from fullframe.capture.rng_state import States
from fullframe.capture.subclasses import Shadows
from fullframe.capture.threads import replaced
from fullframe.errors import CaptureError
from fullframe.torch_compat import (
    CrossMapLRN2d,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FunctionalTensor,
    fx_traceback,
)

WRITERS = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__",
                     "__ior__", "__ixor__", "__ifloordiv__", "__imod__"))  # fmt: skip


TEXTS = frozenset(("__format__", "__repr__", "__str__"))
GRAD: Any = tuple(getattr(torch.Tensor.grad, name) for name in ("__get__", "__set__", "__delete__"))
SET_DATA: Any = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


def reads_data(error: Exception) -> bool:
    """Whether an operation failed because a recording has no numbers."""
    dependent = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
    return dependent or "get value out of a tracing tensor" in str(error)  # as make_fx says it


def _laid_out(made: torch.Tensor) -> torch.Tensor:
    """What a batch norm makes, in a layout that the real one gives; of turned images fake tensors keep theirs."""
    packed = {4: torch.channels_last, 5: torch.channels_last_3d}.get(made.dim(), torch.contiguous_format)
    return made if made.is_contiguous(memory_format=packed) else made.contiguous()


class CaptureMode(TorchFunctionMode):
    """``replacing`` swaps tensors for their placeholders; ``paths`` follows the modules at work."""

    def __init__(self, root: nn.Module):
        super().__init__()
        self.names = {id(m): _path(name, m) for name, m in root.named_modules()}
        self.stack: list[int] = []
        self.current = ""
        self.placeholders: dict[int, torch.Tensor] = {}
        self.used: set[int] = set()  # ids of tensors that entered an operation, not only had their shape asked
        self.touched: set[int] = set()  # ids of tensors of which anything was asked
        self.constants = ConstantTracker()
        self.shadows = Shadows()
        self.numbers: set[int] = set()  # which of the call's tensors had their numbers read
        self.met = self.strangers = False  # whether the call's tensors have numbers; whether some have none
        self.owners: dict[Any, str] = {}  # autograd node -> path of the module that made it
        self.failed: Exception | None = None  # what no code of the step's may catch and go on
        self.states = States(lambda _: self._at(self.current))
        self.thread = get_ident()  # hooks on all modules are called by every thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._call(func, args, kwargs)
        except Exception as error:
            if self.failed is None and (isinstance(error, CaptureError) or reads_data(error)):
                self.failed = error
            raise

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        self.met = self.strangers = False
        if func in GRAD:
            self._refuse_grad(args[0])
        args, kwargs = self._swap(args, name), self._swap(kwargs or {}, name)
        if name == "__set__" and func == SET_DATA:
            return self._assign(*args)
        if name in INDEXING:
            args = (args[0], self.constants.settle(args[1]), *args[2:])
        if self.met and name == "masked_select" and self.strangers and args[1] in self.constants:
            return self._selected(*args)
        if name in TEXTS and not self.met and isinstance(args[0], torch.Tensor) and recorded(args[0]):
            return self._text(name, *args)
        if func is torch.tensor_split or func is torch.Tensor.tensor_split:
            args, kwargs = self._split_at(args, kwargs)
        if self.met or func in MAKERS:
            made = self.constants.call(func, args, kwargs, self.strangers)
        else:
            made = func(*args, **kwargs)
        if name == "batch_norm":
            made = _laid_out(made)
        made = self.shadows.follow(func, args, kwargs, made, self.current or "the step")
        if self.current:
            for tensor in made if isinstance(made, (list, tuple)) else (made,):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad and name != "grad_fn":
                    self._own(tensor.grad_fn)
        return made

    def _selected(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What a mask whose numbers are known selects."""
        shape = torch.broadcast_shapes(tensor.shape, mask.shape)
        mask = self.constants.call(torch.Tensor.expand, (mask, shape), {}, False)
        return tensor.expand(shape)[self.constants.settle(mask)]

    def _text(self, name: str, tensor: torch.Tensor, *spec: str) -> str:
        """A tensor in words, as of a message. Where nothing is raised with it, the text would be of the recording."""
        if tensor.dim() == 0 and self.constants.adopt(tensor, "item"):
            return getattr(self.constants.read_by("item", tensor), name)(*spec)
        if tensor.dim() == 0 and name == "__format__" and self.failed is None:
            where = self.current or "the step"
            self.failed = CaptureError(
                f"in {where}, {location()} writes the number of a tensor into a text, which a recorded step would do "
                "only once; return the tensor, and write it outside the step"
            )
        return f"<{str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)}>"

    def _split_at(self, args: Any, kwargs: Any) -> Any:
        """The places of a split as numbers: torch reads them where a recording has none."""
        places = args[1] if len(args) > 1 else kwargs.get("tensor_indices_or_sections")
        if not isinstance(places, torch.Tensor):
            return args, kwargs
        if places not in self.constants and not self.constants.adopt(places, "tolist"):
            raise CaptureError(
                f"in {self.current or 'the step'}, tensor_split at {location()} reads where to split from a tensor; "
                "give it whole numbers"
            )
        found = self.constants.read_by("tolist", places)
        rest = {k: v for k, v in kwargs.items() if k != "tensor_indices_or_sections"}
        return (args[0], found if isinstance(found, int) else tuple(found), *args[2:]), rest

    def _refuse_grad(self, tensor: torch.Tensor) -> None:
        """A recording does not have the gradients that lie at the call's tensors, nor could it change them."""
        if id(tensor) in self.placeholders or any(t is tensor for t in self.placeholders.values()):
            raise CaptureError(
                f"in {self.current or 'the step'}, the forward reads or sets the .grad of one of the call's tensors; "
                "do that outside the step, and pass in what it needs of it"
            )

    def _assign(self, tensor: torch.Tensor, new: torch.Tensor) -> None:
        """``tensor.data = new`` as a change in place, which is followed."""
        if new.shape != tensor.shape or new.dtype != tensor.dtype:
            where = self.current or "the step"
            raise CaptureError(f"in {where}, a tensor's .data is given another shape or dtype; make a new tensor")
        self.constants.forget(tensor)
        tensor.data.copy_(new)

    def _swap(self, thing: Any, name: str) -> Any:
        if isinstance(thing, torch.Tensor):
            if thing in self.constants:
                self.met = True
                return thing
            found = self.placeholders.get(id(thing))
            self.touched.add(id(thing))
            if name != "__get__":
                self.used.add(id(thing))
            held = thing if found is None else found
            if held in self.constants or self.constants.adopt(held, name):
                self.met = True
                return held
            self.strangers = True
            recorded = found is not None or isinstance(_inner(thing), (FunctionalTensor, FakeTensor))
            if not recorded:
                self._judge(thing, name)
            elif name in ("numpy", "__array__"):
                where = self.current or "the step"
                raise CaptureError(f"in {where}, {name}() reads a tensor's data; stay with torch's own functions")
            return thing if found is None else found
        if isinstance(thing, (list, tuple)):
            found = [self._swap(x, name) for x in thing]
            if all(a is b for a, b in zip(found, thing, strict=True)):
                return thing
            return found if isinstance(thing, list) else tuple(found)
        if type(thing) is dict:
            return {k: self._swap(v, name) for k, v in thing.items()}
        return thing

    def _judge(self, tensor: torch.Tensor, name: str) -> None:
        """Refuse uses that a recording would get wrong of a tensor it does not know."""
        where = f"in {self.current or 'the step'}, a tensor of shape {tuple(tensor.shape)} that is no parameter, "
        where += "buffer, attribute or input"
        if name in READERS and not tensor.is_meta:
            raise CaptureError(f"{where} has its numbers read by {name}(); read them outside the step")
        if name in WRITERS or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
            raise CaptureError(f"{where} is changed by {name}; clone it first, or make it a buffer")
        if tensor.requires_grad and name not in ("__get__", "requires_grad_", "detach", "size", "dim"):
            raise CaptureError(f"{where} would get no gradient; make it a parameter or pass it as an input")

    def _own(self, node: Any) -> None:
        """Note the module at work as owner of a new autograd node and of those below it."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node is None or node in self.owners:
                continue
            self.owners[node] = self.current
            stack.extend(n for n, _ in node.next_functions)

    def follow_backward(self) -> None:
        """From now on the backward of a module's nodes counts as the module's work."""
        for node, path in self.owners.items():
            node.register_prehook(lambda _, path=path: self._at(path))

    def _fit(self, function: Any) -> Any:
        """A function of autograd's; refuses one of torch's own that a recording cannot hold."""
        if function is CrossMapLRN2d:
            raise CaptureError(
                f"in {self.current or 'the step'}, CrossMapLRN2d works on memory of its own, which cannot be "
                "recorded; use torch.nn.LocalResponseNorm, which is the same for an odd size"
            )
        return function

    def _at(self, path: str) -> None:
        self.current = path
        # A field that nodes copy as they are made.
        fx_traceback.current_meta["custom"] = {"path": path, "state": self.states.now}

    @contextmanager
    def replacing(
        self, placeholders: dict[int, torch.Tensor], sources: Iterable[BufferSource] = ()
    ) -> Iterator[None]:
        """Inside, each tensor with one of these ids is replaced by its placeholder; ``sources`` may be read."""
        self.placeholders, self.constants = placeholders, ConstantTracker(sources)

        def applied(own: Any) -> Any:  # which no mode sees
            return lambda cls, *a, **k: own(self._fit(cls), *self._swap(a, "apply"), **k)

        def backward(own: Any) -> Any:  # torch calls it with this mode set aside
            def run(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return own(*args, **kwargs)

            return run

        def truth(own: Any) -> Any:  # of a number as a condition
            return lambda t: own(
                (t != 0).all() if t.dtype != torch.bool and t.numel() == 1 and t not in self.constants else t
            )

        engine: Any = torch.autograd
        with (
            replaced([FunctionalTensor], "__bool__", truth),
            replaced([torch.autograd.Function], "apply", applied), self.states.followed(),
            replaced([engine], "_engine_run_backward", backward), self.shadows.sharing(), self,
        ):  # fmt: skip
            try:
                yield
            finally:
                self.numbers = self.constants.read
                self.placeholders, self.constants = {}, ConstantTracker()

    @contextmanager
    def paths(self) -> Iterator[None]:
        """Inside, ``current`` is the path of the innermost module at work, and so is every node's.

        When forward fails, ``current`` stays where it failed.
        """
        hooks = nn.modules.module
        first = hooks.register_module_forward_pre_hook(self._enter)
        last = hooks.register_module_forward_hook(self._leave)
        try:
            yield
        finally:
            first.remove()
            last.remove()
            fx_traceback.current_meta.pop("custom", None)
            self.owners.clear()

    def _enter(self, module: nn.Module, _: Any) -> None:
        if get_ident() != self.thread:
            return
        self.stack.append(id(module))
        self._at(self.names.get(id(module)) or type(module).__name__)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if get_ident() != self.thread:
            return
        while self.stack and self.stack.pop() != id(module):
            pass  # modules whose forward failed and was caught
        self._at(self.names.get(self.stack[-1], "") if self.stack else "")


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of torch.func's transforms stands for."""
    while torch_compat.is_functorch_wrapped_tensor(tensor):
        tensor = torch_compat.get_unwrapped(tensor)
    return tensor


def _path(name: str, module: nn.Module) -> str:
    """As users write it, and the type: ``encoder.conv1 (Conv2d)``; the wrapped module is ``the module``."""
    if name == "":
        return ""
    first, _, rest = name.partition(".")
    shown = rest or first if first == "module" else name
    return f"{shown} ({type(module).__name__})"
