"""Devices that are not there: tensors that say they are on cpu:1 or cpu:2, and refuse to meet any others.

A machine with two GPUs has three places: the CPU and the two. Here all is computed on the CPU, so that results are
those of a model in one place, bit for bit; but while `pretending`, an operation on tensors of two places raises, as it
does there. That cpu:1 is a CPU is all that torch knows of it: everything takes the way that it takes on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
BY_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)  # an index may be on the CPU


class Placed(Tensor):
    """A tensor on a pretended device. inner: the one that is computed with."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        how = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        placed = Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **how)  # type: ignore[attr-defined]
        placed.inner = inner
        return placed

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} on a pretended device, outside of `pretending`")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)


def inner(value: Any) -> Any:
    return value.inner if isinstance(value, Placed) else value


class Operations(TorchDispatchMode):
    """Every operation: where its tensors are, and where its result is."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        found = [one for one in tree_leaves((args, given)) if isinstance(one, Tensor)]
        free = set()
        if function in BY_INDEX:
            free = {id(one) for one in args[1] if one is not None and one.device == CPU}
        places = {one.device for one in found if one.ndim and id(one) not in free}  # single numbers meet any others
        if len(places) > 1 and function not in MOVES:
            raise RuntimeError(f"{function}: {[(str(one.device), tuple(one.shape)) for one in found]}")
        place = (*places, *(one.device for one in found), CPU)[0]
        if function is aten.copy_.default:
            place = args[0].device
        if given.get("device") is not None:
            place = torch.device(given["device"])
            given["device"] = CPU if place.type == "cpu" else place
        args, given = tree_map(inner, (args, given))
        result = function(*args, **given)
        if place.index is None:
            return result
        return tree_map(lambda one: Placed(one, place) if isinstance(one, Tensor) else one, result)


class Literals(TorchFunctionMode):
    """Tensors made of numbers, which no operation tells of."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function is Tensor.new_tensor:
            given = {"dtype": args[0].dtype, "device": args[0].device, **given}
            function, args = torch.tensor, args[1:]
        if function not in (torch.tensor, torch.as_tensor) or given.get("device") is None:
            return function(*args, **given)
        device = given.pop("device")
        if isinstance(args[0], Tensor):
            return args[0].to(device, **given)
        return function(*tree_map(inner, args), **given).to(device)


@contextmanager
def pretending() -> Iterator[None]:
    """Devices cpu:1, cpu:2, ... are different places inside. Without gradients."""
    with torch.no_grad(), Literals(), Operations():
        yield


def spread(model: Any, place: Callable[[int | None, int], str]) -> dict[str, str]:
    """A device map. place: number of a decoder layer, None for another part; number among these -> device"""
    layers = {id(layer): number for number, layer in enumerate(model.base_model.get_decoder().layers)}
    found: dict[str, str] = {}
    numbers = itertools.count()

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if id(child) in layers:
                found[prefix + name] = place(layers[id(child)], 0)
            elif any(id(one) in layers for one in child.modules()):
                walk(child, f"{prefix}{name}.")
            elif child.state_dict() or any(True for _ in child.buffers()):
                found[prefix + name] = place(None, next(numbers))
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            found[prefix + name] = place(None, next(numbers))

    walk(model, "")
    return found


# Halves, as `device_map="auto"` makes them; and every part elsewhere than its neighbours.
MAPS: dict[str, Callable[[int | None, int], str]] = {
    "halves": lambda layer, part: "cpu:1" if layer is None or layer < 1 else "cpu:2",
    "scattered": lambda layer, part: f"cpu:{1 + (part if layer is None else layer) % 2}",
}


def dispatched(model: Any, place: str, main: str = "cpu:1") -> Any:
    """The model, spread over two pretended devices by accelerate. main: where it takes its inputs."""
    device_map = spread(model, MAPS[place])
    return dispatch_model(model, device_map, main, skip_keys=model._skip_keys_device_placement)
