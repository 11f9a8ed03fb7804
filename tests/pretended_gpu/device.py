"""The device's half in Python: torch's operators run on the CPU, Triton's kernels in another process.

Needs the environment that `build.py` makes. `install` starts it, for the whole process.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[2]
# The file behind the device's memory. The driver reads its name at the first allocation.
ARENA = os.environ.setdefault("PRETENDED_GPU_ARENA", f"/dev/shm/pretended-gpu-{os.getpid()}")
DRIVER = ctypes.CDLL("libcuda.so.1")
DRIVER.gpu_complaints.restype = ctypes.c_char_p
DRIVER.gpu_access.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
DRIVER.gpu_node.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p]
DRIVER.gpu_parameters.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]

# Errors of kernels and operators since `complaints` was called last.
errors: list[str] = []


def complaints() -> str:
    """Races and errors since the last call."""
    told = DRIVER.gpu_complaints().decode() + "\n".join(errors)
    errors.clear()
    return told


# -- Triton's kernels --------------------------------------------------------------------------------------------------
class Launched(NamedTuple):
    """A launch as the driver got it: of each argument of the kernel, its name, type, and address or value."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: list[tuple[str, str, Any]]


# The latest launches; `test_launcher.py` reads them.
launched: list[Launched] = []
# By the driver's handle.
compiled_kernels: dict[int, CompiledKernel] = {}
FORMATS = {
    "i1": "?",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}
DTYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


class Interpreter:
    """The process of `interpreter.py`."""

    def __init__(self) -> None:
        # The first allocation makes the memory that both share.
        torch.empty(1, device="cuda")
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "tests.pretended_gpu.interpreter", ARENA, str(theirs.fileno())]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        for name in ("PRETENDED_GPU_ARENA", "PRETENDED_GPU_LOG"):
            environment.pop(name, None)
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self._process.kill)

    def run(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()


_interpreters: list[Interpreter] = []


def portable(value: Any) -> Any:
    """A constant of a kernel as something that can be sent to another process."""
    if isinstance(value, tl.dtype):
        return "dtype", DTYPE_NAMES[str(value)]
    if isinstance(value, JITFunction):
        return "function", value.fn.__module__, value.fn.__name__
    if isinstance(value, (tuple, list)):
        return "tuple", *map(portable, value)
    return value.value if isinstance(value, tl.constexpr) else value


def decode(function: int, data: bytes) -> list[tuple[str, str, Any]]:
    """The arguments of a launch, as the compiled code's own list of parameters finds them in the launch's bytes."""
    source = compiled_kernels[function].src
    count = DRIVER.gpu_parameters(function, None, 0)
    words = (ctypes.c_int * (2 * count))()
    DRIVER.gpu_parameters(function, words, count)
    parameters = list(zip(words[::2], words[1::2], strict=True))
    arguments: list[tuple[str, str, Any]] = []
    for index, (name, kind) in enumerate(source.signature.items()):
        if kind == "constexpr" or isinstance(kind, tuple):
            value = source.constants.get((index,))
            if value is None and isinstance(kind, tuple):
                value = tuple(source.constants.get((index, place)) for place in range(len(kind)))
            arguments.append((name, "constexpr", value))
            continue
        offset, size = parameters.pop(0)
        text = "Q" if kind.startswith("*") else FORMATS[kind]
        assert struct.calcsize(text) == size, (name, kind, size)
        arguments.append((name, kind, struct.unpack_from(text, data, offset)[0]))
    # Scratch memory, which these kernels do not have.
    assert all(struct.unpack_from("Q", data, offset)[0] == 0 for offset, _ in parameters)
    return arguments


def reporting(function: Callable[..., None]) -> Callable[..., None]:
    """A callback of C cannot raise: errors are collected."""

    def call(*args: Any) -> None:
        try:
            function(*args)
        except BaseException:
            errors.append(traceback.format_exc())

    return call


@ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_size_t,
)
@reporting
def on_launch(function: int, grid: Any, block: int, shared_bytes: int, data: int, size: int) -> None:
    compiled = compiled_kernels[function]
    arguments = decode(function, ctypes.string_at(data, size))
    programs = grid[0], grid[1], grid[2]
    launched.append(Launched(compiled.name, programs, block, shared_bytes, arguments))
    del launched[:-50]
    if not _interpreters:
        _interpreters.append(Interpreter())
    sent = [(kind, portable(value) if kind == "constexpr" else value) for _, kind, value in arguments]
    kernel = compiled.src.fn.fn
    error, accesses = _interpreters[0].run(kernel.__module__, kernel.__name__, programs, sent)
    if error is not None:
        errors.append(error)
    for address, bytes_, writes in accesses:
        DRIVER.gpu_access(address, bytes_, writes, compiled.name.encode())


# -- torch's operators -------------------------------------------------------------------------------------------------
# These do nothing but allocate memory and look at it in other ways, or ask the driver.
REAL = {
    f"aten::{name}"
    for name in (
        "_has_compatible_shallow_copy_type",
        "_local_scalar_dense",
        "_pin_memory",
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "detach",
        "detach_",
        "is_pinned",
        "is_same_size",
        "is_set_to",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "record_stream",
        "requires_grad_",
        "resize_",
        "set_",
        "split_with_sizes",
    )
}
MUST_WAIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# By their number in the driver: what a replay runs.
nodes: dict[int, Callable[[], None]] = {}
_num_nodes = 0
_num_draws = 0


@ctypes.CFUNCTYPE(None, ctypes.c_uint64)
@reporting
def on_node(number: int) -> None:
    nodes[number]()


def is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if tensor.numel() == 0:
        return 0
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in strides) + 1) * tensor.element_size()


def on_cpu(value: Any) -> Any:
    """A CPU tensor over the memory of a device tensor; the CPU for a device; else the value itself."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not is_cuda(value):
        return value
    if value.numel() == 0:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    memory = (ctypes.c_char * span(value)).from_address(value.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.shape, value.stride())


def draw_from(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator for one operator, from the state of the device's."""
    global _num_draws
    if generator is None:
        _num_draws += 1
        seed, offset = torch.cuda.initial_seed(), _num_draws
    else:
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + 4)
    return torch.Generator("cpu").manual_seed((seed * 1000003 + offset * 7) % 2**63)


def copies_as_it_is(source: Tensor, target: Tensor) -> bool:
    """Whether copying is one call of the driver."""
    dense = source.is_contiguous() and target.is_contiguous() and not (source.is_conj() or target.is_conj())
    return dense and source.dtype == target.dtype and source.shape == target.shape


class PretendedDevice(TorchDispatchMode):
    """Runs operators on device tensors, or adds them to a capture. Copies between devices stay the driver's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(is_cuda(x) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            return func(*args, **kwargs)
        schema = func._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        is_view = not writes and any(r.alias_info is not None for r in schema.returns)
        if is_view or schema.name in REAL or schema.name.startswith(("aten::empty", "aten::sym_", "prim::")):
            return func(*args, **kwargs)
        if schema.name == "aten::copy_":
            return self.copy(func, *args, **kwargs)
        if schema.name == "aten::_to_copy":
            return self.to(func, args[0], **kwargs)
        return self.run(func, args, kwargs)

    def copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if copies_as_it_is(source, target):
            return func(target, source, non_blocking)
        if target.device == source.device:
            return self.run(func, (target, source), {})
        # Both have a contiguous tensor of the target's dtype between them, where the source is.
        source = self.as_contiguous(source, target.dtype, target.shape)
        if target.is_contiguous():
            return func(target, source, non_blocking)
        between = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        func(between, source, non_blocking)
        return self.run(func, (target, between), {}) if is_cuda(target) else target.copy_(between)

    def as_contiguous(self, source: Tensor, dtype: torch.dtype, shape: Any) -> Tensor:
        source = source.expand(shape)
        if not is_cuda(source):
            return source.to(dtype).contiguous()
        if source.is_contiguous() and source.dtype == dtype:
            return source
        options = {"dtype": dtype, "memory_format": torch.contiguous_format}
        return self.run(torch.ops.aten._to_copy.default, (source,), options)

    def to(self, func: Any, source: Tensor, **options: Any) -> Tensor:
        device = torch.device(options.get("device") or source.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == source.device:
            return self.run(func, (source,), options)
        dtype, waits = options.get("dtype") or source.dtype, not options.get("non_blocking", False)
        memory_format = options.get("memory_format") or torch.preserve_format
        # As torch: what the host does not wait for goes into pinned memory.
        pinned = device.type == "cpu" and not waits
        like = torch.empty_like(source, dtype=dtype, device="meta", memory_format=memory_format)
        target = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=device, pin_memory=pinned)
        if target.stride() == source.stride() and source.numel() == span(source) // source.element_size():
            # The same order of elements in memory.
            flat = (source.numel(),), (1,)
            self.copy(torch.ops.aten.copy_.default, target.as_strided(*flat), source.as_strided(*flat), not waits)
            return target
        return self.copy(torch.ops.aten.copy_.default, target, source, not waits)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator now or, in a capture, at every replay."""
        global _num_nodes
        schema = func._schema
        flat, structure = pytree.tree_flatten((args, kwargs))
        devices = [x.device if is_cuda(x) else x for x in flat if is_cuda(x) or isinstance(x, torch.device)]
        device = next(d for d in devices if d.type == "cuda")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if MUST_WAIT & set(func.tags) or any("Tensor" not in str(r.type) for r in schema.returns):
            return self.run_and_wait(func, flat, structure, device)
        arguments = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        written = [
            tensor
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in pytree.tree_leaves(arguments.get(argument.name))
            if is_cuda(tensor)
        ]
        in_place = bool(written) and all(result.alias_info is not None for result in schema.returns)
        results, results_structure = ([], None) if in_place else self.allocate(func, flat, structure, device)
        operands, targets = [on_cpu(x) for x in flat], [on_cpu(x) for x in results]
        draws = any(a.name == "generator" for a in schema.arguments) or "dropout" in schema.name

        def compute() -> None:
            values = operands
            if draws:
                own = next((x for x in operands if isinstance(x, torch.Generator)), None)
                generator = draw_from(own)
                values = [generator if isinstance(x, torch.Generator) else x for x in operands]
                torch.default_generator.manual_seed(generator.initial_seed())
            positional, named = pytree.tree_unflatten(values, structure)
            with _disable_current_modes(), torch.no_grad():
                computed = func(*positional, **named)
                for target, value in zip(targets, pytree.tree_leaves(computed) if targets else [], strict=True):
                    if isinstance(target, Tensor):
                        target.copy_(value)

        changed = {id(tensor) for tensor in (*written, *results)}
        tensors = [x for x in (*flat, *results) if is_cuda(x) and x.numel()]
        words = [word for t in tensors for word in (t.data_ptr(), span(t), int(id(t) in changed))]
        _num_nodes += 1
        number, nodes[_num_nodes] = _num_nodes, compute
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            array = (ctypes.c_uint64 * max(len(words), 1))(*words)
            outcome = DRIVER.gpu_node(stream, number, array, len(tensors), schema.name.encode())
        if outcome < 0:
            raise torch.AcceleratorError(f"CUDA error: {-outcome} in {schema.name}")
        if outcome == 0:
            del nodes[number]
            compute()
        if not in_place:
            return pytree.tree_unflatten(results, results_structure) if schema.returns else None
        sets = {a.name: a.alias_info.before_set for a in schema.arguments if a.alias_info is not None}
        returned = [
            next(arguments[name] for name, own in sets.items() if own == result.alias_info.before_set)
            for result in schema.returns
        ]
        return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)

    def run_and_wait(self, func: Any, flat: list[Any], structure: Any, device: torch.device) -> Any:
        """An operator whose result's shape depends on values, or is a number: the host waits for the device."""
        torch.cuda.current_stream(device).synchronize()
        positional, named = pytree.tree_unflatten([on_cpu(x) for x in flat], structure)
        with _disable_current_modes(), torch.no_grad():
            result = func(*positional, **named)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), result)

    def allocate(self, func: Any, flat: list[Any], structure: Any, device: torch.device) -> tuple[list[Any], Any]:
        """The tensors that an operator returns, with what is in fresh memory."""
        if not func._schema.returns:
            return [], None

        def moved(to: str, make: Callable[..., Tensor]) -> Any:
            def move(value: Any) -> Any:
                if isinstance(value, Tensor):
                    return make(value.shape, value.stride(), value.dtype)
                if isinstance(value, torch.device):
                    return torch.device(to)
                return None if isinstance(value, torch.Generator) else value

            positional, named = pytree.tree_unflatten([move(x) for x in flat], structure)
            return func(*positional, **named)

        with _disable_current_modes(), torch.no_grad():
            try:
                like = moved("meta", lambda s, t, d: torch.empty_strided(s, t, dtype=d, device="meta"))
            except (NotImplementedError, RuntimeError):
                like = moved("cpu", lambda s, t, d: torch.zeros(s, dtype=d, device="cpu"))
        shapes, results_structure = pytree.tree_flatten(like)
        results = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x
            for x in shapes
        ]
        return results, results_structure


def install() -> None:
    """Starts the pretended device."""
    init_handles = CompiledKernel._init_handles

    def remember(self: Any) -> None:
        init_handles(self)
        compiled_kernels[self.function] = self

    CompiledKernel._init_handles = remember
    DRIVER.gpu_set_callbacks(on_launch, on_node)
    atexit.register(Path(ARENA).unlink, missing_ok=True)
    torch.cuda.init()
    PretendedDevice().__enter__()
