"""A GPU that is pretended on the CPU: what runs on CUDA alone can be tried where there is none.

Importing this, or `pytest -p pretended_gpu` with tests/ on PYTHONPATH, gives torch for CPU a device `cuda`. A tensor
there holds one of the CPU, and is refused where CUDA would refuse it: beside tensors of the CPU, and in numpy. What the
host does not wait for is followed. Two streams that use the same memory in no order are an error; so is memory that is
given back while another stream uses it. What is copied to pinned memory without waiting arrives when the host waits,
and what is copied from it must be unchanged by then. Sums that CUDA makes in no order are an error.

PRETENDED=everywhere: settings that say `cpu`, as those of configs/tiny.yaml, take it too.

It shows nothing of speed, rounding and kernels: those of train/kernels.py give way to their plain twins, as Triton's
interpreter takes seconds for each. torch's backward, sparse tensors and CUDA's generators cannot be had on it. Needs
g++.
"""

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
from pretended_streams import Event, Memory, Stream, current, gpu, on_stream
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing

aten, CPU = torch.ops.aten, torch.device("cpu")
DEVICE = torch.device("cuda", 0)
BYTES = 80 << 30  # of memory, as it says
HOST_WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
INDICES_OF_ANY_DEVICE = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
WITH_ATOMICS = {aten.index_add_.default, aten.index_add.default, aten.scatter_add_.default, aten.scatter_add.default}
OF_CUDA_ALONE = {aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype)}
FACTORIES = (
    "empty.memory_format", "empty_strided", "full", "scalar_tensor", "arange", "arange.start", "arange.start_step",
    "linspace", "eye", "eye.m", "randperm", "randperm.generator", "tril_indices", "triu_indices",
)  # fmt: skip
# torch asks C++ for the device's guard, which torch for CPU does not have.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""


class Pretended(torch.Tensor):
    """A tensor of the device."""

    inner: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory | None = None) -> "Pretended":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        with torch.inference_mode(False):  # torch cannot split a subclass that was made in it
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        made.inner, made.memory = inner, memory or Memory(inner.untyped_storage().nbytes())
        return made

    def __repr__(self, **_options: Any) -> str:
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:  # chooses a kernel by the device, in C++
            return on_cpu(func, args, kwargs or {})
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default:
            return copied(*args, **kwargs)
        if func is aten._to_copy.default:
            return moved(*args, **kwargs)
        if (made := func.decompose(*args, **kwargs)) is not NotImplemented:  # whole where no gradients are kept
            return made
        return return_and_correct_aliasing(func, args, kwargs, on_cpu(func, args, kwargs))


def pretended(given: Any) -> list[Pretended]:
    """The tensors of the device among arguments."""
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Pretended)]


def on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives: done on the CPU with what the tensors hold, and noted."""
    given = pretended((args, kwargs))
    refuse(func, args, kwargs)
    written, is_view, schema = {t.memory for t in given}, False, getattr(func, "_schema", None)
    if schema:
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        aliases = [(a.alias_info.is_write, a.name) for a in schema.arguments if a.alias_info is not None]
        written = {t.memory for is_write, name in aliases if is_write for t in pretended(named.get(name))}
        is_view = any(not is_write for is_write, _ in aliases)
    cpu = {"device": CPU} if "device" in kwargs else {}
    inner = pytree.tree_map_only(Pretended, lambda t: t.inner, (args, kwargs | cpu))
    results = OF_CUDA_ALONE.get(func, func)(*inner[0], **inner[1])
    if func in HOST_WAITS:
        gpu.host_waits_for(current().number)
    if kwargs.get("device") == CPU:
        return results
    owners = {pointer(t.inner): t.memory for t in given if t.numel()}
    results = pytree.tree_map_only(Tensor, lambda t: Pretended(t, owners.get(pointer(t))), results)
    if not is_view:
        new = {t.memory for t in pretended(results)} - set(owners.values())
        gpu.launch(func, {t.memory for t in given}, written | new)
    return results


def refuse(func: Any, args: Any, kwargs: Any) -> None:
    """Raise RuntimeError for what CUDA refuses, and for sums in no order."""
    for leaf in pytree.tree_leaves((args, kwargs)) if func not in INDICES_OF_ANY_DEVICE else ():
        if isinstance(leaf, Tensor) and not isinstance(leaf, Pretended) and leaf.dim():
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and {leaf.device}: {func}")
    if func in WITH_ATOMICS and len(args[2].inner.unique()) < args[2].numel():
        raise RuntimeError(f"{func}: CUDA adds rows of one index in no order")


def pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def late(number: int, value: Tensor, host: Tensor) -> Tensor:
    """A tensor of the host that gets its value when the host has waited for a launch; until then it is NaN, or -1."""
    host.fill_(float("nan") if host.is_floating_point() else True if host.dtype == torch.bool else -1)
    gpu.copy(number, host, value, to_host=True)
    return host


def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """aten.copy_."""
    given = {t.memory for t in pretended(source)}
    if not isinstance(target, Pretended):
        number = gpu.launch("copy_", given, set())
        value = source.inner.to(target.dtype).expand_as(target).clone()  # pyright: ignore[reportAttributeAccessIssue]
        if non_blocking and pointer(target) in gpu.pinned:
            return late(number, value, target)
        gpu.host_waits_for(current().number)
        return target.copy_(value)
    number = gpu.launch("copy_", given, {target.memory})
    target.inner.copy_(source.inner if isinstance(source, Pretended) else source)
    if not given and pointer(source) in gpu.pinned:
        if non_blocking:
            gpu.copy(number, source, source.clone(), to_host=False)
        else:
            gpu.host_waits_for(current().number)
    return target


def moved(source: Pretended, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    """aten._to_copy."""
    number = gpu.launch("to", {source.memory}, set())
    options.pop("pin_memory", None)
    inner = aten._to_copy.default(source.inner, **options)
    if device is None or torch.device(device).type == "cuda":
        made = Pretended(inner)
        gpu.launch("to", set(), {made.memory})
        return made
    if non_blocking:  # torch takes pinned memory for it
        return late(number, inner, pinned(inner.shape, dtype=inner.dtype))
    gpu.host_waits_for(current().number)
    return inner


def pinned(*shape: Any, **options: Any) -> Tensor:
    """torch.empty of pinned memory."""
    like = torch_empty(*shape, **options)
    memory = np.empty(max(1, like.nbytes), np.uint8)
    made = torch.from_numpy(memory)[: like.nbytes].view(like.dtype).view(like.shape)
    gpu.pinned.add(pointer(made))
    weakref.finalize(memory, gpu.pinned.discard, pointer(made))
    return made


def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    """torch.empty."""
    if not pin_memory:
        return torch_empty(*shape, **options)
    assert torch.device(options.get("device") or CPU) == CPU, "only memory of the CPU can be pinned"
    return pinned(*shape, **options)


def pin(tensor: Tensor) -> Tensor:
    """Tensor.pin_memory."""
    assert not isinstance(tensor, Pretended), "only memory of the CPU can be pinned"
    return pinned(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def factory(name: str) -> Callable[..., Tensor]:
    """An operation that makes a tensor."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> Tensor:
        kept = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
        return Pretended(operation(*args, **kept, device=CPU))

    return make


def plain_kernels() -> ModuleType:
    """In the place of train.kernels: the plain twins, of tensors that a kernel could read."""
    from train.adam import plain_update
    from train.nonzeros import PLAIN, Operations

    def kernel(plain: Any) -> Any:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            assert all(t.is_contiguous() for t in pretended((args, kwargs))), plain
            return on_cpu(plain, args, kwargs)

        return stand_in

    def wide(plain: Any) -> Any:
        def of_float32(*args: Any, **kwargs: Any) -> Any:
            floats = pytree.tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
            return plain(*floats[0], **floats[1])

        return of_float32

    def adam_update(parameters: Any, gradients: Any, *others: Any) -> None:
        plain_update(parameters, {name: gradient.clone() for name, gradient in gradients.items()}, *others)

    module: Any = ModuleType("train.kernels")
    module.TRITON, module.adam_update = Operations(*(kernel(wide(each)) for each in PLAIN)), kernel(adam_update)
    return module


def install() -> torch.library.Library:
    """Replace what of torch says that there is no GPU; what must stay alive."""
    with tempfile.TemporaryDirectory() as folder:
        source, built, torch_in = Path(folder) / "guard.cpp", Path(folder) / "guard.so", Path(torch.__file__).parent
        source.write_text(GUARD)
        paths = [f"-I{torch_in / 'include'}", f"-L{torch_in / 'lib'}"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", built, *paths, "-lc10"], check=True)
        torch.ops.load_library(built)
    cuda: Any = torch.cuda
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: True
    cuda._lazy_init, cuda.set_device, cuda.empty_cache = lambda: None, lambda _: None, lambda: None
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_capability, cuda.get_device_name = lambda *_: (9, 0), lambda *_: "a pretended GPU"
    cuda.mem_get_info = lambda *_: (BYTES - gpu.allocated, BYTES)
    cuda.max_memory_allocated = lambda *_: gpu.most_allocated
    cuda.reset_peak_memory_stats = lambda *_: setattr(gpu, "most_allocated", gpu.allocated)
    cuda.Stream, cuda.Event, cuda.stream, cuda.current_stream = Stream, Event, on_stream, current
    cuda.synchronize = gpu.synchronize
    _device_constructors()  # notes torch.empty before it is replaced
    torch.empty = empty
    torch.compile = lambda function, **_: function
    torch.Tensor.pin_memory = pin
    torch.Tensor.record_stream = lambda tensor, stream: tensor.memory.recorded.add(stream.number)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter cannot take a subclass as its data
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name in FACTORIES:
        library.impl(name, factory(name))
    library.impl("copy_", copied)  # torch.tensor passes subclasses by
    return library


torch_empty = torch.empty
kept_alive = install()
if os.environ.get("PRETENDED") == "everywhere":
    import harvest.device  # before others take the function out of it

    harvest.device.resolve_device = lambda _setting: DEVICE
sys.modules["train.kernels"] = plain_kernels()
