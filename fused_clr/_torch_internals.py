"""Functions that depend on torch's internals, checked against the code of torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler

Function = TypeVar("Function", bound=Callable[..., Any])


def hooks_wanted(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step must run hooks or open a profiler range."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    )


def call_with_hooks(
    step: Callable[..., Any], optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls ``step(*args, **kwargs)`` as `torch.optim.Optimizer.profile_hook_step` would.

    Args:
        step: Takes the optimizer and the user's arguments of ``optimizer.step``.
        optimizer: The optimizer.
        args: The optimizer and the user's positional arguments; pre-hooks may replace them.
        kwargs: The user's keyword arguments; likewise.

    Returns:
        What ``step`` returned.

    Raises:
        RuntimeError: A pre-hook returned something other than None or (new_args, new_kwargs).
    """
    with record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
        pre_hooks = chain(
            torch_optimizer._global_optimizer_pre_hooks.values(), optimizer._optimizer_step_pre_hooks.values()
        )
        for pre_hook in pre_hooks:
            result: Any = pre_hook(optimizer, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(f"a step pre-hook must return None or (new_args, new_kwargs), got {result!r}")
                args, kwargs = result
        out = step(*args, **kwargs)
        optimizer._optimizer_step_code()
        for post_hook in chain(
            optimizer._optimizer_step_post_hooks.values(), torch_optimizer._global_optimizer_post_hooks.values()
        ):
            post_hook(optimizer, args, kwargs)
    return out


def storage_users(tensor: Tensor) -> int:
    """How many tensors, and their storage's Python object, use the memory of ``tensor``."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def hold(tensors: Sequence[Tensor]) -> object:
    """Holds tensors in C++, as long as the result lives.

    A list of them reaches a kernel in 2/3 of the time: where Python alone holds a tensor, each use in C++ first takes
    its Python object over.
    """
    script_list = getattr(torch._C, "ScriptList", list)
    return script_list(list(tensors)) if tensors else None


def writes_overlap(tensor: Tensor) -> bool:
    """Whether elements share memory, as after ``expand``: torch then refuses to write the tensor in place."""
    return bool(tensor.layout == torch.strided and torch._debug_has_internal_overlap(tensor) == 1)


def save_scaler_stages(scaler: torch.amp.GradScaler) -> Callable[[], None]:
    """Copies what ``state_dict`` leaves out: for which optimizers the scaler is between ``unscale_`` and ``update``.

    Returns:
        A function that puts it back.
    """
    # A disabled scaler has none.
    states = getattr(scaler, "_per_optimizer_states", {})
    saved = {key: dict(state) for key, state in states.items()}

    def restore() -> None:
        # Another dict: update() replaces it.
        states = getattr(scaler, "_per_optimizer_states", {})
        states.clear()
        states.update({key: dict(state) for key, state in saved.items()})

    return restore


def uncompiled(function: Function) -> Function:
    """Keeps `torch.compile` from compiling a function: a call is one graph break, and nothing compiles again.

    `torch.compiler.disable` would import torch._dynamo at once, which takes as long as importing torch.
    """
    # Torch declares no type for it.
    private: Any = torch
    disabled: Function = private._disable_dynamo(function)
    return disabled


def calling_scheduler() -> str | None:
    """The class name of the torch scheduler on the call stack; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, LRScheduler):
            return type(owner).__name__
        frame = frame.f_back
    return None


def asked_by_distributed_checkpoint() -> bool:
    """Whether `torch.distributed.checkpoint` reads the caller's property to get state that it can load into.

    If there is no state, it sets ``lr`` = 0 and takes a step. A scheduled group refuses that ``lr``, and the step would
    advance the schedule.
    """
    frame = sys._getframe(2)
    # There may be a wrapper of the optimizer in between.
    for _ in range(2):
        code_name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
        if (code_name, module) == ("_init_optim_state", "torch.distributed.checkpoint.state_dict"):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
