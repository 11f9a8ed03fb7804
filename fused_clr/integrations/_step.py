"""`FrameworkStep`: a captured step that finds what a replay would leave out or repeat wrongly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._device import capture
from .._host.optimizer import FusedOptimizer
from .._warnings import warn
from ..graphs import GraphedStep

# What a batch may hold besides tensors; other values of them have a graph of their own.
PLAIN = (bool, int, float, str, type(None))
_MISSING = object()
# Steps without a replay after which a user is told.
EAGER_STEPS_LIMIT = 100


@dataclass(frozen=True)
class _Assumed:
    """What a graph was captured for, beside the kind of its batch: one argument, however many parameters there are."""

    plain: tuple[tuple[str, str], ...]
    training: bytes
    requires_grad: bytes


class FrameworkStep:
    """A framework's training step, as a `GraphedStep` of its batches.

    A graph is captured for the numbers, strings and booleans that are attributes of the module, for the parts of it
    that are in training mode, and for the parameters that require a gradient. Other values have another graph.

    Args:
        step: Forward, backward and update for a batch; returns tensors in any nesting.
        module: The module that it trains.
        optimizer: Its optimizer.
        options: Arguments of `GraphedStep`.

    Raises:
        TypeError: ``optimizer`` is not a fused optimizer, or an option is unknown.
        ValueError: An option is not allowed.
    """

    def __init__(
        self, step: Callable[..., Any], module: nn.Module, optimizer: FusedOptimizer, options: dict[str, Any]
    ) -> None:
        self._step = step
        self._module = module
        self._modules = list(module.modules())
        self._parameters = list(module.parameters())
        self._ran = False
        self._eager_steps = 0
        self.graphed = GraphedStep(self._run, optimizer, **options)

    def __call__(self, *batch: Any) -> tuple[Any, bool]:
        """Takes a step.

        Args:
            batch: Tensors and plain values, in any nesting of tuples, lists and dicts.

        Returns:
            What ``step`` returned, without autograd's graph and in memory of its own; and whether it was called:
            otherwise a replay took the step.

        Raises:
            TypeError: ``batch`` holds something else.
            RuntimeError: See `GraphedStep`; or ``step`` changed an attribute of the module while it was captured.
        """
        for leaf in pytree.tree_leaves(batch):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise TypeError(
                    "a batch of a captured step must hold tensors, numbers, strings and None, in any nesting of "
                    f"tuples, lists and dicts, got {type(leaf).__name__}; convert it in collate_fn"
                )
        self._ran = False
        output = self.graphed(batch, self._assumed())
        self._eager_steps = self._eager_steps + 1 if self._ran else 0
        if self._eager_steps == EAGER_STEPS_LIMIT and self.graphed.num_graphs:
            warn(
                f"no replay in {EAGER_STEPS_LIMIT} steps: every one had another shape, value or attribute of the "
                "module than a captured one. Pad batches to a few shapes, and keep what changes in tensors"
            )
        return pytree.tree_map_only(Tensor, torch.clone, output), self._ran

    def _run(self, batch: tuple[Any, ...], assumed: Any) -> Any:
        del assumed
        self._ran = True
        with self._unchanged():
            return pytree.tree_map_only(Tensor, Tensor.detach, self._step(*batch))

    def _assumed(self) -> _Assumed:
        return _Assumed(
            # As text, 1, 1.0 and True differ, and NaN is equal to itself.
            tuple((name, repr(value)) for name, value in vars(self._module).items() if isinstance(value, PLAIN)),
            bytes(module.training for module in self._modules),
            bytes(param.requires_grad for param in self._parameters),
        )

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Refuses a body that writes attributes of the module: replays would not.

        Outside of a capture only plain values are refused: other writes may create something once, at first use.
        """
        before = dict(vars(self._module))
        lengths = _lengths(before)
        yield
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        kinds = object if capture.is_capturing(device) else PLAIN
        after = vars(self._module)
        for name in {**before, **after}:
            old, new = before.get(name, _MISSING), after.get(name, _MISSING)
            if isinstance(new, kinds) and (old is not new or lengths.get(name) != _lengths(after).get(name)):
                raise RuntimeError(
                    f"the captured step changed {type(self._module).__name__}.{name}. A replay runs no Python code, "
                    "and would not change it. Return the value from the step, or change it in a hook outside of it"
                )


def _lengths(attributes: dict[str, Any]) -> dict[str, int]:
    return {name: len(value) for name, value in attributes.items() if isinstance(value, (list, dict, set, deque))}


def check_optimizer(optimizer: Any, how: str) -> FusedOptimizer:
    """``optimizer``, if it is ours.

    Raises:
        TypeError: It is not; ``how`` says what to do.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"the optimizer must be a FusedAdam, FusedAdamW or FusedSGD, got {type(optimizer).__name__}: {how}"
        )
    return optimizer
