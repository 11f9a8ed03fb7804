"""Adam, AdamW and SGD with the learning rate schedule inside the step."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from ._device.rules.adam import ADAM
from ._device.rules.sgd import SGD
from ._host.optimizer import FusedOptimizer
from .averaging import Averaging
from .schedules import Schedule


class StepOptions(TypedDict, total=False):
    """Options of every fused optimizer. They apply to all of its groups.

    Attributes:
        max_grad_norm: Clip the gradients of all groups to this 2-norm, > 0, as `torch.nn.utils.clip_grad_norm_` does.
            Takes one more launch and no synchronization. If the norm is inf, finite gradients become 0 and infinite
            ones NaN; if it is NaN, all become NaN; see ``skip_if_nonfinite``. ``math.inf`` computes the norm without
            clipping. None, the default, computes no norm and does not clip.
        skip_if_nonfinite: Skip a step whose norm is not finite. Needs ``max_grad_norm``. Default False. With
            GradScaler such steps are always skipped.
        write_back_grads: Write unscaled and clipped gradients back into ``grad``, as torch does. Default False.
        advance_schedule_on_skip: A skipped step still advances the schedule, as in torch's loop. Default False.
        history_size: Steps that `FusedOptimizer.history` keeps, >= 0; each takes 64 bytes per group on the device.
            Default 256.
        averaging: Average the parameters in the same launch; see `Averaging` and
            `FusedOptimizer.averaged_parameters`. Default None: no averages.
    """

    max_grad_norm: float | None
    skip_if_nonfinite: bool
    write_back_grads: bool
    advance_schedule_on_skip: bool
    history_size: int
    averaging: Averaging | None


class FusedAdam(FusedOptimizer):
    r"""Adam with the learning rate schedule inside the step: one kernel launch updates every parameter.

    The algorithm of Kingma & Ba 2015 (arXiv:1412.6980, algorithm 1), with the arguments of `torch.optim.Adam`.

    ``state[p]["step"]`` may be assigned, or written with ``fill_``. The triton backend does not notice a write through
    its ``.data``, which torch does not report.

    Args:
        params: Parameters, named parameters or dicts of param groups, as torch takes them. Dense tensors of dtype
            float16, bfloat16, float32, float64 or complex.
        lr: Learning rate, >= 0; a 1-element tensor is read at every step. Has no effect in a scheduled group.
        betas: Decay rates of the moments, each in [0, 1). A schedule that cycles momentum sets the first.
            1-element tensors are read when ``betas`` is set.
        eps: Added to the denominator, >= 0.
        weight_decay: L2 penalty, >= 0; decoupled (arXiv:1711.05101) with ``decoupled_weight_decay``.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018).
        foreach: Accepted for compatibility with torch; has no effect.
        maximize: Ascend instead of descend.
        capturable: Accepted; has no effect: every step can be captured.
        differentiable: Must be False.
        fused: Accepted; has no effect: every step is fused.
        decoupled_weight_decay: Decay the parameter instead of the gradient, as AdamW does.
        schedule: A value from `fused_clr.schedules` for every group without its own, also for groups added later: their
            own ``lr`` then has no effect. None keeps ``lr`` constant. A param group may hold a ``schedule`` too; None
            there keeps that group's ``lr`` constant. Each step advances all schedules by one.
        options: See `StepOptions`.

    Raises:
        ValueError: An argument is not allowed; the message names it, its value and the allowed values.
        TypeError: ``schedule`` is not a schedule, ``params`` is not an iterable of tensors, or an option is unknown.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = FusedAdam([weight], schedule=Cyclic(0.1, 0.5, step_size_up=4, cycle_momentum=False))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.2
    """

    RULE = ADAM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
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
        schedule: Schedule | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
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
        }
        super().__init__(params, defaults, schedule, options)


class FusedAdamW(FusedAdam):
    r"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): `FusedAdam` with decoupled weight decay.

    A step multiplies each parameter by a factor, which the launch computes from that step's learning rate:

    | mode | factor | source |
    | --- | --- | --- |
    | "lr" | ``1 - lr * weight_decay`` | `torch.optim.AdamW` |
    | "lr_ratio" | ``1 - lr / max_lr * weight_decay`` | fully decoupled: arXiv:1711.05101, algorithm 2 |
    | "constant" | ``1 - weight_decay`` | the same without the schedule multiplier |
    | "corrected" | ``1 - lr**2 / max_lr * weight_decay`` | AdamC: Defazio 2025, arXiv:2506.02285 |

    Args:
        params: See `FusedAdam`; so are the arguments not listed here.
        weight_decay: Decoupled weight decay, >= 0. Has no effect in a group with a ``weight_decay_schedule``.
        weight_decay_mode: One of the modes above.
        weight_decay_max_lr: ``max_lr`` above, >= 0; 0 decays nothing. None: the largest learning rate of the group's
            schedule; without a schedule the group's ``initial_lr``, which torch's schedulers set, or else its ``lr``.
        weight_decay_schedule: A value from `fused_clr.schedules` whose learning rate is the ``weight_decay`` above, at
            the schedule step of the learning rate. It must not drive the momentum. None: ``weight_decay`` is constant.

    Example:
        >>> optimizer = FusedAdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3, weight_decay=0.1)
        >>> optimizer.param_groups[0]["decoupled_weight_decay"]
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Schedule | None = None,
        weight_decay_mode: Literal["lr", "lr_ratio", "constant", "corrected"] = "lr",
        weight_decay_max_lr: float | None = None,
        weight_decay_schedule: Schedule | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
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
            "decoupled_weight_decay": True,
            "weight_decay_mode": weight_decay_mode,
            "weight_decay_max_lr": weight_decay_max_lr,
            "weight_decay_schedule": weight_decay_schedule,
        }
        FusedOptimizer.__init__(self, params, defaults, schedule, options)


class FusedSGD(FusedOptimizer):
    r"""SGD with momentum and the learning rate schedule inside the step, with the arguments of `torch.optim.SGD`.

    Moves 20 bytes per float32 element; 12 in a group without momentum, which has no ``momentum_buffer``. As in torch,
    ``state[p]`` has no ``step``, and a parameter's first buffer is its gradient, without dampening.

    Args:
        params: See `FusedAdam`; so are the arguments not listed here.
        momentum: Momentum factor, >= 0. A schedule that cycles momentum sets it. Writing 0 in place of another number,
            or the reverse, changes the group's state: replays of steps captured before then update nothing.
        dampening: Dampening of the gradient in the momentum buffer. Must be 0 where a schedule sets the momentum to 0.
        weight_decay: L2 penalty, >= 0.
        nesterov: Nesterov's momentum. Needs momentum and no dampening.

    Raises:
        ValueError: See `FusedAdam`.
        TypeError: See `FusedAdam`.

    Example:
        >>> from fused_clr.schedules import Cyclic
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = FusedSGD([weight], schedule=Cyclic(0.1, 0.5, step_size_up=4))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"], round(optimizer.param_groups[0]["momentum"], 3)
        (0.2, 0.875)
    """

    RULE = SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: Schedule | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, schedule, options)
        values = self.defaults
        has_momentum = float(values["momentum"]) > 0 or (schedule is not None and schedule.drives_momentum)
        if nesterov and (not has_momentum or float(values["dampening"]) != 0):
            raise ValueError(
                f"nesterov must be False without momentum or with dampening, got momentum={momentum}, "
                f"dampening={dampening}"
            )
