"""Adam and AdamW whose learning rate schedule runs where the update runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checkpoint
from .base import FusedOptimizer
from .hyperparameters import DEFAULT_BETAS, StepOptions, check_hyperparameter, check_options
from .schedules import Cyclic
from .step_hooks import call_with_hooks, hooks_wanted
from .uncompiled import uncompiled

T = TypeVar("T")


class FusedAdam(FusedOptimizer):
    r"""Adam with the learning rate schedule inside the step: one kernel launch updates every parameter and ticks.

    The algorithm of Kingma & Ba 2015 (arXiv:1412.6980, algorithm 1), with the arguments of `torch.optim.Adam`.

    Args:
        params: Parameters, named parameters or dicts of param groups, as torch takes them. Dense tensors of dtype
            float16, bfloat16, float32, float64 or complex.
        lr: Learning rate, >= 0; a 1-element tensor is read at every step. Without effect in a scheduled group.
        betas: Decay rates of the moments, each in [0, 1). A schedule that cycles momentum drives the first.
            1-element tensors are read when they are set.
        eps: Added to the denominator, >= 0.
        weight_decay: L2 penalty, >= 0; decoupled (arXiv:1711.05101) with ``decoupled_weight_decay``.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018).
        foreach: Accepted and without effect: there is one implementation.
        maximize: Ascend instead of descend.
        capturable: Accepted and without effect: every step can be captured.
        differentiable: Must be False.
        fused: Accepted and without effect: every step is fused.
        decoupled_weight_decay: Decay the parameter and not the gradient, as AdamW does.
        schedule: A value from `fused_clr.schedules` for every group without one of its own; None keeps ``lr``
            constant. A param group may hold a ``schedule`` too. Each step advances all schedules by one.
        max_grad_norm: Clip the gradients of all groups to this 2-norm, > 0, as `torch.nn.utils.clip_grad_norm_` does:
            in one more launch and without a sync. A norm of inf makes them 0 (and infinite ones NaN), a norm of NaN
            makes them NaN, unless ``skip_nonfinite``. ``math.inf`` measures and does not clip; None does neither.
        skip_nonfinite: Skip a step whose norm is not finite. Needs ``max_grad_norm``. Under GradScaler such steps are
            skipped anyway.
        store_grads: Write unscaled and clipped gradients back, as torch does; else ``grad`` stays as it was.
        advance_on_skip: A skipped step advances the schedule all the same, as torch's pair does; else it stands still.
        history_size: Steps that `history` keeps, >= 0; each takes 64 bytes per group on the device.

    Raises:
        ValueError: An argument is outside what is stated above; the message names it, its value and what is allowed.
        TypeError: ``schedule`` is no schedule, or ``params`` no iterable of tensors.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = FusedAdam([weight], schedule=Cyclic(0.1, 0.5, step_size_up=4, cycle_momentum=False))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """

    # GradScaler leaves scale and overflow to the step, which then neither updates nor ticks.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = DEFAULT_BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        schedule: Cyclic | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        store_grads: bool = False,
        advance_on_skip: bool = False,
        history_size: int = 256,
    ) -> None:
        options = StepOptions(max_grad_norm, skip_nonfinite, store_grads, advance_on_skip, history_size)
        self._options = check_options(options)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "schedule": schedule,
        }
        for name, value in defaults.items():
            defaults[name] = check_hyperparameter(name, value)
        self._start_fresh()
        super().__init__(params, defaults)

    # -- the step -----------------------------------------------------------------------------------------------------
    @uncompiled("a fused step is one launch already; host code checks its addresses")
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Updates all parameters that have a gradient, and advances the schedule by one.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or on another device, or of another shape or kind than its parameter.
                The message names the parameter; nothing has been updated.
        """
        if hooks_wanted(self):
            out: T | None = call_with_hooks(FusedAdam._step, self, (self,) if closure is None else (self, closure))
            return out
        return self._step(closure)

    # Torch would wrap a step that does not say it runs the hooks itself, at 5.7 us a call.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], T] | None = None) -> T | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._engines.step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        if self._scheduler_token:
            self._awaits_scheduler = True
            self._steps_since_scheduler += 1
        return loss

    # -- checkpoints, copies and pickles ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in torch's format, loadable by `torch.optim.Adam`; see `fused_clr.checkpoint`."""
        return checkpoint.optimizer_state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of `torch.optim.Adam`, in place.

        Args:
            state_dict: What ``state_dict()`` gave. Not changed.

        Raises:
            ValueError: It is corrupt or of other parameters; nothing has been loaded.
        """
        checkpoint.load_optimizer_state_dict(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": {param: {**entry, "step": entry["step"].clone()} for param, entry in self.state.items() if entry},
            "param_groups": [{key: group.stored(key) for key in group} for group in self.param_groups],
            "options": self._options,
            "schedule_step": self.schedule_step,
            "counts": self._engines.counts(),
            "update_steps": list(self._engines.update_steps().items()),
            "scheduler_token": self._scheduler_token,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._options = state.pop("options")
        self._start_fresh(state.pop("schedule_step"), dict(state.pop("update_steps")), state.pop("counts"))
        self._scheduler_token = state.pop("scheduler_token")
        self.state = state.pop("state")
        groups = state.pop("param_groups")
        super().__setstate__(state)
        self.param_groups = [self._make_group(group) for group in groups]


class FusedAdamW(FusedAdam):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): `FusedAdam` with decoupled weight decay.

    Args:
        params: See `FusedAdam`; so are the arguments not listed here.
        weight_decay: Decoupled weight decay, >= 0.

    Example:
        >>> optimizer = FusedAdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3, weight_decay=0.1)
        >>> optimizer.param_groups[0]["decoupled_weight_decay"]
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = DEFAULT_BETAS,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Cyclic | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        store_grads: bool = False,
        advance_on_skip: bool = False,
        history_size: int = 256,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            store_grads=store_grads,
            advance_on_skip=advance_on_skip,
            history_size=history_size,
        )
