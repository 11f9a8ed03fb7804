"""The variants of the kernels that users compile, and how to compile one without a GPU."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_clr._device.chunks import block_size_of
from fused_clr._device.engine import CLIP_EPS
from fused_clr._device.step_plan import CONFIGS, PARTIALS, LaunchConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16, "float64": tl.float64}
# Parameters, gradients.
COMBINATIONS = [(name, name) for name in DTYPES] + [("float32", "bfloat16")]

# Pointers to anything but int64.
POINTERS = {
    "group_table_ptr": "*fp64",
    "scalars_ptr": "*fp32",
    "scalars_float64_ptr": "*fp64",
    "step_mirror_ptr": "*fp32",
    "live_ptr": "*fp64",
    "norm_ptr": "*fp64",
    "history_ptr": "*fp64",
    "partial_sums_ptr": "*fp64",
    "grad_scale_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
}


@triton.jit
def inverse_growth(x):  # type: ignore[no-untyped-def]
    """A user's ``scale_fn``, as in the documentation of torch's CyclicLR.

    Args:
        x: float64 block.

    Returns:
        float64 block.
    """
    return 1 / (5**0.5 * x + 1)


class Variant(NamedTuple):
    """One way to compile a kernel.

    Attributes:
        target: A key of TARGETS.
        kernel: "step_kernel", "reevaluate_kernel" or "norm_kernel".
        scale_fn: With a user's compiled ``scale_fn``.
        param_dtype: A key of DTYPES. For step_kernel alone, as are the next four.
        grad_dtype: A key of DTYPES.
        num_states: See the kernel.
        is_last: See the kernel.
        ones: Every integer argument is the constant 1, which is how Triton may specialise it.
        write_back_grads: See the kernel. For step_kernel alone.
        averages: The step averages the parameters. Not for norm_kernel.
        all_dtypes: Gradients of every dtype in one launch, or float32 alone. For norm_kernel alone.
        rule: A key of `Kernels.rules`.
    """

    target: str
    kernel: str
    scale_fn: bool = False
    param_dtype: str = "float32"
    grad_dtype: str = "float32"
    num_states: int = 2
    is_last: bool = True
    ones: bool = False
    write_back_grads: bool = False
    averages: bool = False
    all_dtypes: bool = False
    rule: str = "ADAM"

    @property
    def config(self) -> LaunchConfig:
        """What users of the target get."""
        return CONFIGS[TARGETS[self.target].backend]

    @property
    def options(self) -> dict[str, Any]:
        """Compile options."""
        if self.kernel != "step_kernel":
            return self.config.options
        return self.config.step_options(getattr(torch, self.param_dtype), self.num_states, self.averages)

    @property
    def block_size(self) -> int:
        """Elements of a chunk."""
        if self.kernel == "norm_kernel":
            return self.config.block_size
        return block_size_of(getattr(torch, self.param_dtype), self.config.block_size)

    @property
    def name(self) -> str:
        """Words that tell variants apart."""
        words = [self.target, self.kernel.removesuffix("_kernel")]
        words += [self.rule.lower()] if self.rule != "ADAM" else []
        if self.kernel == "step_kernel":
            words.append(self.param_dtype)
            words += [f"grad={self.grad_dtype}"] if self.grad_dtype != self.param_dtype else []
            words += [{0: "no-momentum", 1: "momentum", 3: "amsgrad"}[self.num_states]] if self.num_states != 2 else []
            words.append("last" if self.is_last else "not-last")
            words += ["write-back-grads"] if self.write_back_grads else []
        if self.kernel == "norm_kernel":
            words.append("all-dtypes" if self.all_dtypes else "float32")
        words += ["averages"] if self.averages else []
        words += ["scale-fn"] if self.scale_fn else []
        words += ["ones"] if self.ones else []
        return " ".join(words)


def all_variants() -> list[Variant]:
    """Every variant the audit looks at. Without evaluators the kinds make no difference."""
    variants = []
    for target in TARGETS:
        for (param, grad), num_states in itertools.product(COMBINATIONS, (2, 3)):
            variants += [
                Variant(target, "step_kernel", False, param, grad, num_states),
                Variant(target, "step_kernel", False, param, grad, num_states, is_last=False),
            ]
        for (param, grad), num_states in itertools.product(COMBINATIONS, (0, 1)):
            variants.append(Variant(target, "step_kernel", False, param, grad, num_states, rule="SGD"))
        variants.append(Variant(target, "step_kernel", num_states=1, is_last=False, rule="SGD"))
        variants.append(Variant(target, "reevaluate_kernel", rule="SGD"))
        variants.append(Variant(target, "step_kernel", True, ones=True))
        variants.append(Variant(target, "step_kernel", write_back_grads=True))
        for param in ("float32", "bfloat16", "float64"):
            variants.append(Variant(target, "step_kernel", False, param, param, averages=True))
        variants.append(Variant(target, "step_kernel", False, num_states=3, averages=True))
        for num_states in (0, 1):
            variants.append(Variant(target, "step_kernel", False, num_states=num_states, averages=True, rule="SGD"))
        variants.append(Variant(target, "reevaluate_kernel", averages=True))
        for flag in (False, True):
            variants.append(Variant(target, "reevaluate_kernel", flag, ones=flag))
            variants.append(Variant(target, "norm_kernel", all_dtypes=flag, ones=flag))
    return variants


class Kernels:
    """A folder of kernels: ours, or a changed copy.

    Attributes:
        step: The module step.py.
        access_lines: Lines of step.py that load and store the elements of a chunk.
        aligned_call_line: Line of the call that handles whole, aligned chunks.
    """

    def __init__(self, folder: Path) -> None:
        # A package of another name, so that kernels of several folders can be told apart.
        name = f"audited_kernels_{abs(hash(folder))}"
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(folder)]
        self.step = importlib.import_module(f"{name}.step")
        adam = importlib.import_module(f"{name}.adam")
        sgd = importlib.import_module(f"{name}.sgd")
        self.rules = {
            "ADAM": (adam.adam_update, adam.adam_scalars),
            "SGD": (sgd.sgd_update, sgd.sgd_scalars),
        }
        self.modules = {
            "step_kernel": self.step,
            "reevaluate_kernel": importlib.import_module(f"{name}.evaluate"),
            "norm_kernel": importlib.import_module(f"{name}.norm"),
        }
        source = inspect.getsource(self.step)
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        self.access_lines = {
            call.lineno
            for call in calls
            if re.match(r"tl\.(load|store)\(\w+_ptrs?(\[i\])? \+ offsets,.*\bmask=mask\)", ast.unparse(call))
        }
        aligned = [call.lineno for call in calls for k in call.keywords if ast.unparse(k) == "ALIGNED=True"]
        (self.aligned_call_line,) = aligned

    def compile(self, variant: Variant) -> Any:
        """Compiles a variant for its target.

        Returns:
            Triton's CompiledKernel; only its ``asm`` is of use without a GPU.
        """
        kernel = getattr(self.modules[variant.kernel], variant.kernel)
        target = TARGETS[variant.target]
        update, scalars = self.rules[variant.rule]
        constants = {
            "PARAM_DTYPE": DTYPES[variant.param_dtype],
            "GRAD_DTYPE": DTYPES[variant.grad_dtype],
            "UPDATE": update,
            "SCALARS": scalars,
            "HAS_DECAY_SCHEDULE": variant.rule == "ADAM",
            "HAS_AVERAGING": variant.averages,
            "HAS_FLOAT64": variant.param_dtype == "float64",
            "NUM_STATES": variant.num_states,
            "CLIP_EPS": CLIP_EPS,
            "IS_LAST": variant.is_last,
            "WRITE_BACK_GRADS": variant.write_back_grads,
            "SCALE_FNS": (inverse_growth,) if variant.scale_fn else (),
            "DTYPES": 0b1111 if variant.all_dtypes else 0b100,
            "PARTIALS": PARTIALS,
            "BLOCK_SIZE": variant.block_size,
            "LANES": variant.config.lanes,
        }
        signature, values, attributes = {}, {}, {}
        for parameter in kernel.params:
            name, index = parameter.name, parameter.num
            if parameter.is_constexpr or (variant.ones and not name.endswith("_ptr")):
                signature[name], values[(index,)] = "constexpr", constants.get(name, 1)
            elif name.endswith("_ptr"):
                signature[name] = POINTERS.get(name, "*i64")
                # What a launch would find out about torch's tensors.
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32"
        source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
        return triton.compile(source, target=target, options=variant.options)
