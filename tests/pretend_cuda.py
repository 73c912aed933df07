"""A pretended CUDA device for tests on a machine without one.

    with pretended() as counts:
        ...                          # torch.cuda.is_available(), "cuda" tensors, Warp's kernels
    counts.launches, counts.waits, counts.copies

Its tensors say cuda:0, hold CPU memory and refuse what CUDA refuses, op by op: tensors of two devices in one call,
numpy() and pinning. Warp's kernels run on Warp's own CPU device. Counted are launches (ops that compute, and Warp's),
waits (the host reads what the device computed: a number, a shape that depends on values, a copy to the CPU) and copies
from host to device, the latter two by line of this project's source.

Not imitated: streams and what goes wrong between them, cuDNN, the fused attention kernels (attention is spelt out as
matrix products), memory, speed, and any difference in a result's last bits.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretend_answers import ANSWERED

ROOT = f"{Path(__file__).resolve().parent.parent}/"
CUDA = torch.device("cuda", 0)
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_MOVES = {"copy_", "_to_copy", "set_data"}
_ANSWERS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}  # the host waits for their result


_ANSWERS |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}


_NO_LAUNCH = {"view", "_unsafe_view", "detach", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"}


_NO_LAUNCH |= {"squeeze", "alias", "as_strided", "split", "split_with_sizes", "unbind", "_reshape_alias", "unfold"}


_NO_LAUNCH |= {"diagonal", "chunk", "lift_fresh", "is_same_size", "empty", "empty_strided", "empty_like", "new_empty"}


_NO_LAUNCH |= {"new_empty_strided", "_local_scalar_dense"}


@dataclass
class Counts:
    """What the device was asked to do since the last `reset`.

    Args:
        launches: ops that compute on the device, Warp's kernels among them.
        waits: times that the host waited for the device, by line of the source.
        copies: copies from host to device, by line of the source.
    """

    launches: int = 0
    waits: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)

    def reset(self) -> None:
        """Begin anew."""
        self.launches = 0
        self.waits.clear()
        self.copies.clear()

    def __str__(self) -> str:
        lines = [f"{self.launches} launches"]
        for name in ("waits", "copies"):
            counter = getattr(self, name)
            lines.append(f"{counter.total()} {name}")
            lines += [f"  {count} {line}" for line, count in counter.most_common()]
        return "\n".join(lines)


_counts = Counts()


def _line() -> str:
    """The innermost line of the project's own source that the running call comes from, tests aside."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(f"{ROOT}tests/"):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _waited() -> None:
    _counts.waits[_line()] += 1


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `memory` is the CPU tensor that holds its values."""

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> OnDevice:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            layout=memory.layout,
            device="meta",  # autograd runs its hooks in the calling thread; a build without CUDA knows no other
        )
        wrapper.memory = memory
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _perform(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.memory!r})"

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            copy = OnDevice(self.memory.clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]

    @property
    def data(self) -> torch.Tensor:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, OnDevice):
            raise RuntimeError("pretended CUDA: data of a tensor on cuda:0 set to a tensor on the CPU")
        torch._C.TensorBase.data.__set__(self, other)
        self.memory = other.memory

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        _waited()
        return self.memory.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("pretended CUDA: can't convert a cuda:0 tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("pretended CUDA: only CPU tensors can be pinned")

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        return _sent(torch.tensor(data, dtype=dtype or self.dtype))

    def cuda(self, *_: Any, **__: Any) -> torch.Tensor:
        return self

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype, layout = _target(args, kwargs)
        dtype = dtype or self.dtype
        same = layout in (None, torch.preserve_format) or self.is_contiguous(memory_format=layout)
        stays = device is None or device.type == "cuda"
        if stays and dtype == self.dtype and same and not kwargs.get("copy"):
            return self
        more = {} if layout is None else {"memory_format": layout}
        more |= {} if stays else {"device": device}
        return torch.ops.aten._to_copy.default(self, dtype=dtype, **more)


def _target(args: tuple, kwargs: dict) -> tuple[torch.device | None, torch.dtype | None, Any]:
    """Device, dtype and memory format that Tensor.to is asked for; None where it is not."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device, args[0].dtype, None
    known = {k: v for k, v in kwargs.items() if k in ("device", "dtype", "non_blocking", "memory_format")}
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **known)
    return device, dtype, layout


def _sent(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A CPU tensor, copied to the device."""
    return torch.ops.aten._to_copy.default(tensor, dtype=dtype or tensor.dtype, device=CUDA)


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    return OnDevice(value) if type(value) in (torch.Tensor, torch.nn.Parameter) else value


def _perform(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run one op as CUDA would: refuse it, or count it and run it on the memory."""
    name = function._schema.name.removeprefix("aten::")
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    if device is not None and device.type == "meta":  # factories take it from a tensor of ours
        device = CUDA
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if not ours and (device is None or device.type != "cuda"):
        return function(*args, **kwargs)
    if any(tensor.device.type == "meta" for tensor in tensors):  # a list that torch itself made a tensor of
        raise RuntimeError(
            f"pretended CUDA: {name} by a list, which torch copies to the device: give numbers or slices"
        )
    _check_devices(function, name, args, tensors)
    _count(name, args, kwargs, device, bool(ours))
    inner = {key: tree_map(_memory, value) for key, value in kwargs.items()}
    if device is not None:
        inner["device"] = torch.device("cpu")
    if inner.get("pin_memory"):
        inner["pin_memory"] = False
    result = function(*tree_map(_memory, args), **inner)
    if function._schema.is_mutable:
        return _written(function._schema, args, kwargs, result)
    return result if device is not None and device.type == "cpu" else tree_map(_on_device, result)


def _check_devices(function: Any, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError for an op on tensors of two devices, but for what CUDA lets pass: numbers, CPU indices."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    if not strangers or len(strangers) == len(tensors) or name in _MOVES:
        return
    indices = [id(index) for index in args[1]] if name in _INDEXED else []
    first = isinstance(args[0], OnDevice) or not isinstance(args[0], torch.Tensor)
    fits = all(tensor.dim() == 0 or id(tensor) in indices for tensor in strangers)
    if not fits or not (first or not (indices or function._schema.is_mutable)):
        shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
        raise RuntimeError(f"pretended CUDA: {name} of tensors on two devices: {shapes}")
    _counts.copies.update([_line()] * sum(id(tensor) in indices for tensor in strangers))


def _count(name: str, args: tuple, kwargs: dict, device: torch.device | None, ours: bool) -> None:
    masks = name in _INDEXED and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
    if (name in _ANSWERS and kwargs.get("output_size") is None) or masks:
        _waited()
    if name == "copy_":
        here, there = (isinstance(tensor, OnDevice) for tensor in args[:2])
        _counts.copies.update([_line()] if here and not there else [])
        _counts.waits.update([_line()] if there and not here else [])
    elif name == "_to_copy" and device is not None:
        if ours and device.type == "cpu":
            _waited()
        elif not ours:
            _counts.copies[_line()] += 1
    _counts.launches += name not in _NO_LAUNCH


def _written(schema: Any, args: tuple, kwargs: dict, result: Any) -> Any:
    """The tensors that an op wrote into, as the caller knows them, in the place of their memory."""
    if not schema.returns:
        return None
    values = {argument.name: kwargs.get(argument.name) for argument in schema.arguments}
    values |= dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    several = isinstance(result, tuple | list)
    returned = []
    for out, value in zip(schema.returns, result if several else [result], strict=True):
        target = None
        if out.alias_info is not None and out.alias_info.is_write:
            same = [a for a in schema.arguments if a.alias_info is not None]
            same = [a for a in same if a.alias_info.before_set == out.alias_info.before_set]
            target = values[same[0].name] if same else None
        returned.append(_on_device(value) if target is None else target)
    return type(result)(returned) if several else returned[0]


class _Dispatch(TorchDispatchMode):
    """Ops that make tensors on the device out of none of its own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _perform(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Calls that C++ would answer with "no CUDA" before they reach an op."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to and not isinstance(args[0], OnDevice):
            device, dtype, _ = _target(args[1:], kwargs)
            if device is not None and device.type == "cuda":
                return _sent(args[0], dtype)
        if function is torch.Tensor.cuda:
            return _sent(args[0])
        if function is torch.Tensor.pin_memory and not isinstance(args[0], OnDevice):
            return args[0]
        makes = function in (torch.as_tensor, torch.tensor, torch.asarray)
        if makes and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            if isinstance(args[0], OnDevice):
                return args[0]
            return _sent(function(*args, **{key: value for key, value in kwargs.items() if key != "device"}))
        return function(*args, **kwargs)


def _attention(plain: Callable) -> Callable:
    """scaled_dot_product_attention, as matrix products for tensors on the device."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(query, OnDevice):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            future = torch.full(scores.shape[-2:], -math.inf, device=scores.device, dtype=scores.dtype)
            scores = scores + future.triu(1)
        if attn_mask is not None:
            binary = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if binary else scores + attn_mask
        return scores.float().softmax(-1).to(value.dtype) @ value

    return attend


def _launched(plain: Callable) -> Callable:
    """Warp's launch, on the memory of the tensors."""

    def launch(kernel, dim, arguments, *, block=256):
        devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"pretended CUDA: Warp kernel {kernel.key} on tensors of {devices}")
        _counts.launches += devices == {CUDA}
        return plain(kernel, dim, tuple(map(_memory, arguments)), block=block)

    return launch


def _forget_tensors() -> None:
    """Empty the caches of functions that give tensors by device: a real device has the pretended one's name."""
    for name in [name for name in sys.modules if name.startswith("stages.")]:
        for value in list(vars(sys.modules[name]).values()):
            if hasattr(value, "cache_clear") and "device" in inspect.signature(value.__wrapped__).parameters:
                value.cache_clear()


@contextlib.contextmanager
def pretended() -> Iterator[Counts]:
    """Yield the counts of a device that is there inside the block, and gone with all traces after it."""
    import transformers

    import pipeline.runs.loop
    from stages.kernels import backend, cuda

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    load = transformers.PreTrainedModel.from_pretrained.__func__

    def loaded(cls, *args, **kwargs):  # it builds its modules on torch's own meta device
        with _disable_current_modes():
            return load(cls, *args, **kwargs)

    with contextlib.ExitStack() as stack:

        def put(place: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(place, name, value))

        for name, answer in ANSWERED.items():
            put(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        put(torch.cuda, "synchronize", lambda *_: _waited())
        functional = torch.nn.functional
        put(functional, "scaled_dot_product_attention", _attention(functional.scaled_dot_product_attention))
        put(transformers.PreTrainedModel, "from_pretrained", classmethod(loaded))
        put(pipeline.runs.loop, "forecast", lambda *_: None)  # it counts on meta tensors
        put(backend, "warp_off_cuda", lambda: None)
        for info in pkgutil.iter_modules(cuda.__path__):
            module = importlib.import_module(f"{cuda.__name__}.{info.name}")
            if hasattr(module, "launch"):
                put(module, "launch", _launched(module.launch))
        _forget_tensors()
        stack.callback(_forget_tensors)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _counts.reset()
        with _Dispatch(), _Functions():
            yield _counts
