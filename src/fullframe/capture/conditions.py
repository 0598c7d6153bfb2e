"""What a step asks of its data while it is recorded, where there are no numbers.

Code that asks whether a condition holds (``if torch.any(x < 0): raise ...``, a ``torch.allclose``) gets an assumed
answer. The condition is a result of the recording, and is looked at when a step has run and before anything is
changed: where it is otherwise the step is recorded once more, with that answer, and does what plain PyTorch does
then, be it to raise. Checks of PyTorch's own, such as that a matrix can be inverted, raise when the step has run.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from fullframe import torch_compat
from fullframe.errors import CaptureError, FullframeError
from fullframe.torch_compat import FakeTensor, FunctionalTensor, TorchDispatchMode

aten = torch.ops.aten
MOST = 256  # conditions of one step; a loop until something holds would ask for ever
MAX_PATHS = 8  # that a step may take; beyond them it would be recorded anew too often
OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
# Of ops whose result is a condition those that hold where nothing is wrong: ``assert (x >= 0).all()``.
HOLD = frozenset(("aten.all.default", "aten.all.dim", "aten.isfinite.default", "aten.logical_not.default",
                  "aten.bitwise_not.default", "aten.isclose.default"))  # fmt: skip

Made = TypeVar("Made")


@dataclass(frozen=True)
class Condition:
    """A condition: the answer that was assumed, or what raises where a check fails; and where the code asks."""

    where: str
    answer: bool | None = None
    check: Callable[[torch.Tensor], Any] | None = None


class Diverged(Exception):
    """A condition is not as it was assumed; ``answers``: what is known now, of the first conditions."""

    def __init__(self, answers: tuple[bool, ...], where: str):
        super().__init__(where)
        self.answers, self.where = answers, where


def settle(noted: Sequence[Condition], flags: Sequence[torch.Tensor | None]) -> bool:
    """Look at the conditions of a step that has run; raises what the first that is otherwise asks for.

    Returns whether all were there.
    """
    answers: list[bool] = []
    for it, flag in zip(noted, flags, strict=True):
        if flag is None:
            return False
        if it.check is not None:
            it.check(flag)
            continue
        answers.append(bool(flag))
        if answers[-1] is not it.answer:
            raise Diverged(tuple(answers), it.where)
    return True


class Conditions(TorchDispatchMode):
    """Answers conditions while a step is recorded; the first of them as ``answers`` says."""

    supports_higher_order_operators = True

    def __init__(self, answers: tuple[bool, ...]):
        super().__init__()
        self.answers = answers
        self.path: Callable[[], str] = str  # of the module at work
        self.rewind: Callable[[], None] = lambda: None  # puts back what the code has done in Python
        self.noted: list[Condition] = []
        self.flags: list[torch.Tensor] = []
        self.given: list[bool] = []  # the answers so far
        self.held: dict[int, torch.Tensor] = {}  # conditions that hold where nothing is wrong
        self.late = False  # whether what is asked now is known only after the outputs are handed out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle = HANDLERS.get(func)
        if handle is not None and isinstance(args[0], torch.Tensor):
            return handle(self, *args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.bool and made.dim() == 0 and str(func) in HOLD:
            self.held[id(made)] = made
        return made

    def ask(self, condition: torch.Tensor) -> bool:
        """The answer to a condition, a single truth value."""
        number = len(self.given)
        if number >= MOST:
            raise CaptureError(
                f"in {self.path() or 'the step'}, {location()} asks for the numbers of a tensor more than {MOST} "
                "times, as a loop does that goes on until something holds; give it a fixed number of turns"
            )
        answer = self.answers[number] if number < len(self.answers) else id(condition) in self.held
        self._note(condition, partial(Condition, answer=answer))
        self.given.append(answer)
        return answer

    def check(self, tensor: torch.Tensor, check: Callable[[torch.Tensor], Any]) -> None:
        """Have something raised of a tensor when the step has run."""
        self._note(tensor, partial(Condition, check=check))

    def _note(self, tensor: torch.Tensor, noted: Callable[[str], Condition]) -> None:
        if self.late:
            raise CaptureError(
                f"in {self.path() or 'the step'}, the backward checks the numbers of a tensor, which a tiled module "
                "or step cannot; check them in the forward, or use an op whose gradient needs no check"
            )
        with torch.no_grad():
            self.flags.append(tensor.detach().clone())
        self.noted.append(noted(location()))


def recorded_as(answers: tuple[bool, ...], record: Callable[[Conditions], Made]) -> Made:
    """What is recorded with these answers to the first conditions.

    Where the code raises after a condition whose answer was a guess, the other answer is tried.
    """
    first: Exception | None = None
    while True:
        conditions = Conditions(answers)
        try:
            return record(conditions)
        except FullframeError:
            raise
        except Exception as error:
            given = conditions.given
            if len(given) <= len(answers):  # the code raises whatever the last answer is, or all answers are known
                raise renamed_error(first or error) from None
            first = first or error
            answers = (*given[:-1], not given[-1])
            conditions.rewind()


def location(frame: FrameType | None = None) -> str:
    """Where the code at work is, outside of torch and of this package: file, line and its text."""
    frame = frame or sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*OWN, "<")):
        frame = frame.f_back
    return "the step" if frame is None else shown(frame.f_code.co_filename, frame.f_lineno)


def shown(file: str, line: int) -> str:
    text = linecache.getline(file, line).strip()
    return f"{Path(file).name}:{line}" + (f" ({text})" if text else "")


def location_of(error: BaseException) -> str:
    """The innermost line outside of torch and of this package that an error came through, if there is one."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((*OWN, "<")):
            found = shown(file, trace.tb_lineno)
        trace = trace.tb_next
    return found


def renamed_error(error: Exception) -> Exception:
    """An error of the code's own that tells of tensors, as plain PyTorch would name them."""
    error.args = tuple(a.replace("FunctionalTensor", "Tensor") if isinstance(a, str) else a for a in error.args)
    return error


# What is answered ----------------------------------------------------------------------------------


def _scalar(conditions: Conditions, tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bool and recorded(tensor):
        return conditions.ask(tensor)
    return aten._local_scalar_dense.default(tensor)


def recorded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a recording, without numbers."""
    return isinstance(tensor, (FunctionalTensor, FakeTensor))


def _equal(conditions: Conditions, a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    same = torch.eq(a, b).all()
    if a.dtype == torch.bool and not a.dim() and id(a) not in conditions.held:  # a condition, compared with true
        return conditions.ask(same)
    return conditions.ask(_holding(conditions, same))


def _allclose(conditions: Conditions, a: torch.Tensor, b: torch.Tensor, *tolerances: Any, **named: Any) -> bool:
    return conditions.ask(_holding(conditions, torch.isclose(a, b, *tolerances, **named).all()))


def _holding(conditions: Conditions, condition: torch.Tensor) -> torch.Tensor:
    conditions.held[id(condition)] = condition
    return condition


def _matrix(conditions: Conditions, info: torch.Tensor, api_name: str, *, is_matrix: bool) -> None:
    conditions.check(info, partial(torch_compat.linalg_check_errors, api_name=api_name, is_matrix=is_matrix))


def _assertion(conditions: Conditions, condition: torch.Tensor, message: str = "") -> None:
    conditions.check(condition.all(), partial(_asserted, message=message))


def _asserted(condition: torch.Tensor, message: str) -> None:
    torch_compat.assert_async(condition.cpu(), message) if message else torch_compat.assert_async(condition.cpu())


def _polygamma_(conditions: Conditions, tensor: torch.Tensor, order: int) -> torch.Tensor:
    return tensor.copy_(torch.polygamma(order, tensor))


def _refused(name: str, instead: str) -> Callable[..., Any]:
    def refuse(conditions: Conditions, *_: Any, **__: Any) -> Any:
        raise CaptureError(f"in {conditions.path() or 'the step'}, {name} cannot be recorded; {instead}")

    return refuse


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: _equal,
    aten.allclose.default: _allclose,
    aten._linalg_check_errors.default: _matrix,
    aten._assert_async.default: _assertion,
    aten._assert_async.msg: _assertion,
    aten.polygamma_.default: _polygamma_,  # which torch does not make functional
    aten.segment_reduce.default: _refused(
        "segment_reduce reads the lengths of its segments, and it", "use index_add, or scatter_reduce, by an index"
    ),
}
