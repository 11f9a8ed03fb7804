"""Finds the plan that fits the current gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from .parameters import Parameters

try:
    # The C++ check that torch.compile uses for its inputs: half the time of checking each tensor from Python.
    from torch._C._dynamo import guards as dynamo_guards
except ImportError:
    dynamo_guards = None  # type: ignore[assignment]

Plan = TypeVar("Plan")

# Sets of gradients whose plans are kept; a training loop has one or a few.
MAX_PLANS = 32


class LayoutGuard:
    """Remembers dtypes, shapes and strides of a set of gradients; holds no reference to them.

    Args:
        grads: One entry per parameter; None where it has none.
    """

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        self._missing = [index for index, grad in enumerate(grads) if grad is None]
        self.active = [index for index, grad in enumerate(grads) if grad is not None]
        self._check: Callable[..., bool] | None = None
        if dynamo_guards and self.active:
            guards: Any = dynamo_guards.TensorGuards(
                *(grads[index] for index in self.active), dynamic_dims_sizes=None, dynamic_dims_strides=None
            )
            self._check = guards.check

    def matches(self, grads: list[Tensor | None]) -> bool:
        """Whether these are laid out as the remembered ones. False may also mean that this is not known."""
        if self._check is None:
            return False
        if not self._missing:
            return self._check(*grads)
        for index in self._missing:
            if grads[index] is not None:
                return False
        return self._check(*[grads[index] for index in self.active])


class PlanCache(Generic[Plan]):
    """Plans by the layouts of the gradients that they were made for.

    Args:
        parameters: The parameters.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        # If a parameter's grad_dtype is None, its gradient may have another dtype than the parameter.
        self._grad_dtypes_vary = any(getattr(r.param, "grad_dtype", r.param.dtype) is None for r in parameters.records)
        self._has_complex = any(param.is_complex() for param in parameters.tensors)
        self.clear()

    def clear(self) -> None:
        """Forgets all plans."""
        self._plans: dict[Any, tuple[Plan, LayoutGuard]] = {}
        self._newest: Plan | None = None
        self._guard = LayoutGuard([])

    def plans(self) -> list[Plan]:
        """All of them."""
        return [plan for plan, _ in self._plans.values()]

    def get(self, grads: list[Tensor | None], build: Callable[[list[Tensor | None]], Plan]) -> Plan:
        """The plan for these gradients: the last one, one from the cache, or a new one.

        Args:
            grads: One entry per parameter; None where it has none.
            build: Makes a plan for them; may clear the cache.
        """
        if self._newest is not None and not self._grad_dtypes_vary and self._guard.matches(grads):
            return self._newest
        key = self._layouts(grads)
        plan, guard = self._plans.get(key, (None, None)) if key is not None else (None, None)
        if plan is None:
            plan = build(grads)
            if len(self._plans) >= MAX_PLANS:
                self._plans.pop(next(iter(self._plans)))
        # A guard that did not match was made in another state of torch's dispatcher, such as an autocast region.
        if guard is None or guard is self._guard:
            guard = LayoutGuard(grads)
        self._plans[key] = plan, guard
        self._newest, self._guard = plan, guard
        return plan

    def _layouts(self, grads: list[Tensor | None]) -> tuple[Any, ...] | None:
        """The key of the plan for these gradients; None if they cannot have a plan."""
        try:
            layouts: list[Any] = [g if g is None else g.stride() for g in grads]
        except RuntimeError:
            # Sparse tensors have no strides; the checks of a new plan name them.
            return None
        # A model may be cast between steps, and its gradients with it.
        layouts += [g if g is None else g.dtype for g in grads]
        if self._grad_dtypes_vary:
            layouts += [param.dtype for param in self._parameters.tensors]
        if self._has_complex:
            # With one of these bits set, memory does not hold the tensor's values.
            layouts += [g if g is None else (g.is_conj(), g.is_neg()) for g in grads]
        return tuple(layouts)
