"""A device that is not there: it computes on the CPU and refuses what a GPU would refuse. For a process of its own.

Tensors on it are wrappers. An operation on tensors of both sides is an error, so are numpy views, and a generator of the other
side. Copies between the sides and waits (operations whose result the host has to know) are counted by the line of `tda` that
asked for them. Compilation is switched off; `torch.func` does not see through wrappers.

    from tests.stand_in_device import DEVICE, install, seen
    install()          # before models are made
    model.to(DEVICE)
"""

import traceback
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "stand_in"
COPIES = ("aten::copy_", "aten::_to_copy")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::bincount")
INDEXING = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # take indices of the CPU, at the price of a copy

seen: Counter = Counter()  # (kind, where in tda): times; kinds are "to device", "to host", "wait" and "index from host"


class _Module:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, _seed: int) -> None:
        return

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
HOST = torch.device("cpu")


class OnDevice(Tensor):
    """A tensor on the device, whose numbers are in `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, *, requires_grad: bool = False) -> "OnDevice":
        self = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(operation, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> Tensor:
        made: Tensor = OnDevice(self.held.clone(), requires_grad=self.requires_grad)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def __getitem__(self, index: Any) -> Tensor:
        return _get(self, _as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        _set(self, _as_tensors(index), value)

    def numpy(self, *_args: Any, **_kwargs: Any) -> np.ndarray:
        raise TypeError("can't convert a tensor of the device to numpy; copy it to the host first")

    __array__ = numpy

    def tolist(self) -> Any:
        _note("wait")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


_get, _set = Tensor.__getitem__, Tensor.__setitem__


def _as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    if isinstance(index, list):
        return torch.tensor(index)
    return torch.from_numpy(index) if isinstance(index, np.ndarray) and index.ndim else index


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _note(kind: str) -> None:
    stack = (frame for frame in reversed(traceback.extract_stack()) if "/tda/" in frame.filename)
    where = next((f"{frame.filename.rpartition('/')[2]}:{frame.name}" for frame in stack), "elsewhere")
    seen[kind, where] += 1


def _run(operation: Any, args: tuple, kwargs: dict) -> Any:
    name = operation._schema.name
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    here, there = [one for one in tensors if isinstance(one, OnDevice)], [one for one in tensors if not isinstance(one, OnDevice)]
    target = kwargs.get("device")
    if name in COPIES:
        if name == "aten::copy_":
            ways = isinstance(args[1], OnDevice), isinstance(args[0], OnDevice)
        else:
            ways = bool(here), _on_device(target) if target is not None else bool(here)
        if ways[0] != ways[1]:
            _note("to device" if ways[1] else "to host")
    elif here and (far := [one for one in there if one.ndim]):
        if name not in INDEXING or not isinstance(args[0], OnDevice):
            sides = [(tuple(one.shape), str(one.device)) for one in tensors]
            raise RuntimeError(f"expected all tensors on one device: {name} got {sides}")
        seen.update({("index from host", name): len(far)})
    if name in WAITS:
        _note("wait")
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in _generators) != (bool(here) or _on_device(target)):
        raise RuntimeError(f"{name}: the generator is of another device than the tensor")
    to_device = _on_device(target) if target is not None else bool(here)
    held = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if _on_device(target):
        held["device"] = HOST
    plain_args, plain_kwargs = tree_map(lambda one: one.held if isinstance(one, OnDevice) else one, (args, held))
    with torch.no_grad():
        result = ON_A_GPU_ALONE.get(operation, operation)(*plain_args, **plain_kwargs)
    if name == "aten::copy_":
        return args[0]
    written = {
        id(value.held): value
        for number, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in [args[number] if number < len(args) else kwargs.get(argument.name)]
        if isinstance(value, OnDevice)
    }

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor) or isinstance(one, OnDevice) or not to_device:
            return one
        return written[id(one)] if id(one) in written else OnDevice(one)

    return tree_map(wrapped, result)


def _add_wide_product(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """What torch on a GPU takes: factors of one narrow type, sums of the type that is asked for."""
    assert a.dtype == b.dtype == torch.bfloat16, (a.dtype, b.dtype)
    assert total.dtype == out.dtype == out_dtype == torch.float32, (total.dtype, out.dtype, out_dtype)
    return out.copy_(total + a.float() @ b.float())


ON_A_GPU_ALONE = {torch.ops.aten.addmm.dtype_out: _add_wide_product}

_generators: set[int] = set()  # those of the device; torch hands them on by their C++ address
_kept: list[torch.Generator] = []
_Generator = torch.Generator


class _DeviceGenerator(_Generator):
    """Draws what one of the CPU draws, and remembers that it belongs to the device."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        if not _on_device(device):
            return _Generator.__new__(_Generator, device)
        made = super().__new__(cls, "cpu")
        _generators.add(made._cdata)
        _kept.append(made)  # so that no other comes to its address
        return made

    def __init__(self, device: Any = "cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return DEVICE


_library = torch.library.Library("_", "IMPL")


def install() -> None:
    """Make the device known; not undone."""
    import transformers

    _library.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    torch.Generator = _DeviceGenerator
    nn.Module.compile = lambda _self, *_args, **_kwargs: None
    torch.compile = lambda function, **_kwargs: function
    arange, to = torch.arange, transformers.PreTrainedModel.to

    def arange_there(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return OnDevice(arange(*args, **kwargs)) if _on_device(device) else arange(*args, device=device, **kwargs)

    def to_tied(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        moved = to(self, *args, **kwargs)
        if self.config.tie_word_embeddings:  # a wrapper is a parameter of its own
            self.tie_weights()
        return moved

    torch.arange, transformers.PreTrainedModel.to = arange_there, to_tied
