"""The registry of cases: every parameter set in every dtype, with and without clipping, in one group and in 64."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import product

import torch

from bench.shapes import PARAMETER_SETS, Shape

MANY_GROUPS = 64
MAX_GRAD_NORM = 1.0
DTYPES = ("fp32", "bf16", "mixed")


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
        groups = f" {self.num_groups}-groups" if self.num_groups > 1 else ""
        return f"{self.parameter_set} {self.dtype}{groups}{' clip' if self.clips else ''}"

    @property
    def num_tensors(self) -> int:
        """How many parameters there are."""
        return len(PARAMETER_SETS[self.parameter_set])

    def specifications(self) -> list[tuple[Shape, torch.dtype]]:
        """Shape and dtype of each parameter."""
        all_shapes = PARAMETER_SETS[self.parameter_set]
        is_low = [self.dtype == "bf16"] * len(all_shapes)
        if self.dtype == "mixed":
            has_matrices = any(len(shape) > 1 for shape in all_shapes)
            is_low = [len(shape) > 1 if has_matrices else index % 2 > 0 for index, shape in enumerate(all_shapes)]
        return [(s, torch.bfloat16 if low else torch.float32) for s, low in zip(all_shapes, is_low, strict=True)]

    def elements(self) -> Counter[torch.dtype]:
        """How many elements there are of each dtype."""
        counts: Counter[torch.dtype] = Counter()
        for shape, dtype in self.specifications():
            counts[dtype] += math.prod(shape)
        return counts

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters alone."""
        return sum(count * dtype.itemsize for dtype, count in self.elements().items())

    def step_bytes(self, states: int = 2) -> int:
        """Bytes a step has to move: p, g and the states read, p and the states written; clipping reads g once more."""
        return (3 + 2 * states + self.clips) * self.parameter_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes of two peers: shared p and g, as much for temporaries, and two float32 moments of each peer."""
        return 4 * self.parameter_bytes + 2 * 2 * 4 * self.elements().total()

    def make_parameters(self, device: torch.device) -> list[torch.nn.Parameter]:
        """Random parameters with random gradients: zeros would run faster than real data."""
        params = []
        for shape, dtype in self.specifications():
            # So small that a step changes them in bf16 too.
            param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02))
            param.grad = torch.empty_like(param).normal_()
            params.append(param)
        return params


CASES = tuple(
    Case(name, dtype, num_groups, clips)
    for name, shapes in PARAMETER_SETS.items()
    # One tensor has one dtype.
    for dtype, num_groups, clips in product(DTYPES if len(shapes) > 1 else DTYPES[:2], (1, MANY_GROUPS), (False, True))
    if num_groups <= len(shapes)
)
