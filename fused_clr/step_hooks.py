"""The step hooks and the profiler range that torch wraps around `Optimizer.step`, for a step that runs them itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.optim import optimizer as torch_optimizer


def hooks_wanted(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anybody would notice if the hooks and the profiler range were left out."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    )


def call_with_hooks(step: Callable[..., Any], optimizer: torch.optim.Optimizer, args: tuple[Any, ...]) -> Any:
    """Calls ``step(*args)`` as `torch.optim.Optimizer.profile_hook_step` would.

    Args:
        step: Takes the optimizer and what the user gave to ``optimizer.step``.
        optimizer: The optimizer.
        args: The optimizer, and what the user gave; pre-hooks may replace them.

    Returns:
        What ``step`` returned.

    Raises:
        RuntimeError: A pre-hook returned something else than None or (new_args, new_kwargs).
    """
    kwargs: dict[str, Any] = {}
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
