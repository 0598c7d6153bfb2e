"""Every private name of torch that the engine uses, in one place, each with what happens when it is missing.

Private names may change from one release to the next, so the other modules take them from here; a test sees to it.
What a recording cannot do without is imported when the package is: where it is missing, that import fails and says
which release of torch there is and which would do. Others have a substitute, which gives the same numbers; what it
costs is said beside each. Attributes of tensors and modules that torch's own subclasses in the wild rely on
(``_base``, ``_version``, ``_is_view``, ``_parameters``) are read where they are needed.

Example
-------
>>> from fullframe import torch_compat
>>> torch_compat.missing()
()
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

LOWEST = "2.11"
"""The lowest release of torch that has every name below."""

try:
    from torch import _assert_async as assert_async  # what an assertion on a device raises
    from torch import _functionalize_has_data_mutation as has_data_mutation  # whether a placeholder was written to
    from torch import _linalg_check_errors as linalg_check_errors  # what torch.linalg raises for a matrix
    from torch._C import DisableTorchFunction as no_torch_function
    from torch._C import _autograd
    from torch._C import _disabled_torch_function_impl as disabled_torch_function
    from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
    from torch._C._functorch import is_legacy_batchedtensor as is_batched
    from torch._C._functorch import peek_interpreter_stack as current_transform
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as without_transforms
    from torch._ops import OpOverload, OpOverloadPacket
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch._subclasses.functional_tensor import FunctionalTensor, dispatch_functionalize
    from torch.fx import traceback as fx_traceback
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.modules._functions import CrossMapLRN2d
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the class of all of them
    from torch.nn.parameter import is_lazy
    from torch.overrides import _get_current_function_mode_stack as function_modes
    from torch.overrides import _get_overloaded_args as overloaded_arguments
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as without_modes
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
    from torch.utils._python_dispatch import _pop_mode as pop_mode
    from torch.utils._python_dispatch import _push_mode as push_mode

    top_saved_hooks: Callable[..., Any] = _autograd._top_saved_tensors_default_hooks
    pop_saved_hooks: Callable[..., Any] = _autograd._pop_saved_tensors_default_hooks
    push_saved_hooks: Callable[..., Any] = _autograd._push_saved_tensors_default_hooks
    to_copy: OpOverload = torch.ops.aten._to_copy.default  # what `Tensor.to` is recorded as
    _level: Any = forward_ad._current_level
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"torch {torch.__version__} lacks a name that recording a step needs ({error}); install torch {LOWEST} or "
        "newer, and if it is newer, a release for which this version of fullframe was tested"
    ) from error

__all__ = [
    "LOWEST",
    "SWITCHES",
    "BatchNorm",
    "CrossMapLRN2d",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "assert_async",
    "current_transform",
    "disabled_torch_function",
    "dispatch_functionalize",
    "dispatch_modes",
    "function_modes",
    "fx_traceback",
    "get_unwrapped",
    "has_data_mutation",
    "is_batched",
    "is_functorch_wrapped_tensor",
    "is_lazy",
    "linalg_check_errors",
    "make_fx",
    "no_torch_function",
    "overloaded_arguments",
    "pop_mode",
    "pop_saved_hooks",
    "push_mode",
    "push_saved_hooks",
    "pytree",
    "to_copy",
    "top_saved_hooks",
    "without_modes",
    "without_transforms",
]

_SWITCHES = ("_get_mkldnn_enabled", "_get_mkldnn_deterministic", "_get_nnpack_enabled", "_get_cudnn_enabled",
             "_get_cudnn_benchmark", "_get_cudnn_deterministic")  # fmt: skip
_PRECISION = "_get_fp32_precision_getter"
_KINDS = tuple((backend, op) for backend in ("mkldnn", "cuda") for op in ("all", "conv", "matmul"))


def _switches() -> tuple[Callable[[], Any], ...]:
    found = [getattr(torch._C, name) for name in _SWITCHES if hasattr(torch._C, name)]
    if hasattr(torch._C, _PRECISION):
        found += [partial(getattr(torch._C, _PRECISION), *kind) for kind in _KINDS]
    return (*found, torch.is_deterministic_algorithms_warn_only_enabled)


SWITCHES = _switches()
"""What says how torch's libraries compute, which a forward may ask for; a getter that is missing has no switch."""


def onednn_enabled() -> bool:
    """Whether torch may use oneDNN; where it does not say, whether it has it."""
    enabled = getattr(torch._C, "_get_mkldnn_enabled", None)
    return torch.backends.mkldnn.is_available() and (enabled is None or bool(enabled()))


@cache
def onednn_convolution() -> Callable[..., torch.Tensor] | None:
    """The convolution of oneDNN whatever the size; None: ATen chooses by the size, and equal pixels may differ in
    their last bit."""
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


@cache
def onednn_convolution_added() -> Callable[..., torch.Tensor] | None:
    """The same, added to a total in one pass; None as above."""
    return getattr(getattr(torch.ops.mkldnn, "_convolution_pointwise_", None), "binary", None)


@cache
def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor; where it does not say, no: it is then computed in float32
    and rounded once, which is slower on processors that have it.

    With AVX-512 oneDNN says so also of processors that have no such instruction, where it converts on the way.
    """
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if asked is None or not asked():
        return False
    instruction = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return platform.machine() not in ("x86_64", "AMD64") or instruction is None or bool(instruction())


def cudnn_enabled(on: bool) -> bool:
    """Turn cuDNN on or off, by the public switch where the private is missing; returns what it was."""
    before = bool(torch.backends.cudnn.enabled)
    change = getattr(torch._C, "_set_cudnn_enabled", None)
    if change is not None:
        change(on)
    else:
        torch.backends.cudnn.enabled = on
    return before


def forward_mode() -> bool:
    """Whether a level of forward-mode gradients is open."""
    return forward_ad._current_level >= 0


def cached_weights() -> list[Any]:
    """What `parametrize.cached` keeps, if it is on; nothing where torch keeps it elsewhere."""
    return [getattr(parametrize, "_cache", None)] if getattr(parametrize, "_cache_enabled", False) else []


def global_hooks() -> dict[str, dict[Any, Any]]:
    """The hooks of all modules, by the names of their tables."""
    module: ModuleType = nn.modules.module
    return {n: t for n, t in vars(module).items() if n.startswith("_global_") and n.endswith("_hooks")}


@cache
def recording_is_imported() -> bool:
    """Whether what a recording imports (torch._dynamo and what that imports) was there when this was first asked, as
    it is where there is an optimiser of torch.optim."""
    return "torch._dynamo" in sys.modules


def dynamo() -> ModuleType | None:
    """torch.compile's own module, if anyone has loaded it."""
    return sys.modules.get("torch._dynamo")


def _public_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


current_cuda_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
"""The handle of the current stream of a device; the public way makes an object each time, which is slower."""


def missing() -> tuple[str, ...]:
    """What this torch lacks and has a substitute here, for reports."""
    names = [f"torch._C.{n}" for n in (*_SWITCHES, _PRECISION, "_set_cudnn_enabled") if not hasattr(torch._C, n)]
    ops = ("_convolution_pointwise", "_convolution_pointwise_", "_is_mkldnn_bf16_supported")
    if torch.backends.mkldnn.is_available():
        names += [f"torch.ops.mkldnn.{n}" for n in ops if not hasattr(torch.ops.mkldnn, n)]
    return tuple(names)
