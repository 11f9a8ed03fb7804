"""The registry of cases: every parameter set in every dtype, with and without clipping, in one group and in 64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench import shapes
from bench.shapes import Shape

MANY_GROUPS = 64
MAX_GRAD_NORM = 1.0
DTYPES = ("fp32", "bf16", "mixed")

PARAMETER_SETS: dict[str, Callable[[], list[Shape]]] = {
    "4x4": partial(shapes.equal, 4, 4),
    "4x16": partial(shapes.equal, 4, 16),
    "rl-policy": shapes.rl_policy,
    "148x16": partial(shapes.equal, 148, 16),
    "nnue": shapes.nnue,
    "dlrm-mlps": shapes.dlrm_mlps,
    "1000x16": partial(shapes.equal, 1000, 16),
    "10000x16": partial(shapes.equal, 10_000, 16),
    "4x4M": partial(shapes.equal, 4, 4 << 20),
    "resnet50": shapes.resnet50,
    "vit-b16": shapes.vit_b16,
    "gpt2-124m": shapes.gpt2,
    "bert-large": shapes.bert_large,
    "llama-1b": shapes.llama_1b,
    "1x1G": partial(shapes.equal, 1, 10**9),
}


@dataclass(frozen=True)
class Case:
    """A set of parameters and how it is trained.

    Attributes:
        parameter_set: A key of PARAMETER_SETS.
        dtype: "fp32"; "bf16"; or "mixed": matrices in bf16, vectors in fp32 (where all are vectors, every other one).
        num_groups: Param groups, over which the tensors are dealt in turn.
        clips: Whether the norm of all gradients is clipped to MAX_GRAD_NORM before the update.
    """

    parameter_set: str
    dtype: str = "fp32"
    num_groups: int = 1
    clips: bool = False

    @property
    def name(self) -> str:
        """Words that tell cases apart, as ``gpt2-124m bf16 64-groups clip``."""
        words = [self.parameter_set, self.dtype]
        words += [f"{self.num_groups}-groups"] if self.num_groups > 1 else []
        words += ["clip"] if self.clips else []
        return " ".join(words)

    def specifications(self) -> list[tuple[Shape, torch.dtype]]:
        """Shape and dtype of each parameter."""
        all_shapes = PARAMETER_SETS[self.parameter_set]()
        if self.dtype != "mixed":
            dtype = torch.float32 if self.dtype == "fp32" else torch.bfloat16
            return [(shape, dtype) for shape in all_shapes]
        has_matrices = any(len(shape) > 1 for shape in all_shapes)
        in_bfloat16 = [len(shape) > 1 if has_matrices else index % 2 > 0 for index, shape in enumerate(all_shapes)]
        dtypes = [torch.bfloat16 if low else torch.float32 for low in in_bfloat16]
        return list(zip(all_shapes, dtypes, strict=True))

    def elements(self) -> dict[torch.dtype, int]:
        """How many elements there are of each dtype."""
        counts: dict[torch.dtype, int] = {}
        for shape, dtype in self.specifications():
            counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
        return counts

    @property
    def num_tensors(self) -> int:
        """How many parameters there are."""
        return len(PARAMETER_SETS[self.parameter_set]())

    @property
    def numel(self) -> int:
        """How many elements they hold."""
        return sum(math.prod(shape) for shape in PARAMETER_SETS[self.parameter_set]())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters alone."""
        return sum(count * dtype.itemsize for dtype, count in self.elements().items())

    @property
    def step_bytes(self) -> int:
        """Bytes a step has to move: p, g, m and v read, p, m and v written; clipping reads g once more."""
        return (8 if self.clips else 7) * self.parameter_bytes


def _all_cases() -> list[Case]:
    cases = []
    for name, make_shapes in PARAMETER_SETS.items():
        num_tensors = len(make_shapes())
        for num_groups in (1, MANY_GROUPS) if num_tensors >= MANY_GROUPS else (1,):
            # One tensor has one dtype.
            for dtype in DTYPES if num_tensors > 1 else DTYPES[:2]:
                cases += [Case(name, dtype, num_groups, clips) for clips in (False, True)]
    return cases


CASES = tuple(_all_cases())


def make_parameters(case: Case, device: torch.device) -> list[torch.nn.Parameter]:
    """Random parameters with random gradients: zeros would run faster than real data."""
    params = []
    for shape, dtype in case.specifications():
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_())
        param.grad = torch.empty_like(param).normal_()
        params.append(param)
    return params
