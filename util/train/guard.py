"""Numbers that are not finite end a run before they reach its weights."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from ..errors import RunError


class NotFiniteError(RunError):
    """The loss or a gradient is infinite or no number."""


class Guard:
    """Looks at the loss and the gradients of each training step, before the optimizer does.

    It sets a flag on the device, which stays set. Reading the flag waits for the device. With a fused optimizer, which
    takes the flag and skips every update once it is set, it is read rarely; with any other at each step.
    """

    UNREAD = 50  # steps, at most, with a fused optimizer
    LEAST_SCALE = 2.0**-16  # gradients that overflow even so exceed 4e9

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaler: torch.amp.GradScaler | None = None,
    ):
        """``scaler``: where it is enabled it deals with the gradients, which overflow now and then."""
        self._net, self._scaler = net, scaler if scaler is not None and scaler.is_enabled() else None
        self._flag, self._loss, self._step, self._one = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device).unbind()
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self._every, self._unread = self.UNREAD if fused else 1, 0
        if fused and self._scaler is None:
            optimizer.found_inf = self._flag

    def watch(self, loss: Tensor, step: int) -> None:
        """After the backward pass of ``step``. Raises NotFiniteError, perhaps some steps late."""
        flagged = self._flag > 0
        self._loss = torch.where(flagged, self._loss, loss.detach().float())
        self._step = torch.where(flagged, self._step, float(step))
        torch.maximum(self._flag, (~loss.detach().isfinite()).float(), out=self._flag)
        for gradients in self._gradients() if self._scaler is None else []:
            self._flag_unless_finite(gradients)
        self._unread += 1
        if self._unread >= self._every:
            self.check()

    def _gradients(self) -> list[list[Tensor]]:
        by_type = defaultdict(list)
        for p in self._net.parameters():
            if p.grad is not None:
                by_type[p.grad.dtype].append(p.grad)
        return list(by_type.values())

    def _flag_unless_finite(self, gradients: list[Tensor]) -> None:
        if self._flag.device.type in ("cpu", "cuda"):
            # What a gradient scaler uses, here dividing by one: ten times as fast as isfinite on a CPU.
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._flag, self._one)
        else:
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            torch.maximum(self._flag, (~finite).float(), out=self._flag)

    def check_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises NotFiniteError if what a checkpoint would keep is not finite: an update itself may overflow."""
        state = [(name, x) for name, x in self._net.state_dict().items()]
        for p_state in optimizer.state.values():
            state += [("the optimizer's " + name, x) for name, x in p_state.items() if isinstance(x, Tensor)]
        for name, x in state:
            if not x.isfinite().all():
                raise NotFiniteError(f"{name} is not finite after the last update")

    def check(self) -> None:
        """Raises NotFiniteError if a step that was looked at had numbers that are not finite."""
        self._unread = 0
        if self._scaler is not None and self._scaler.get_scale() < self.LEAST_SCALE:
            raise NotFiniteError(
                f"the gradients overflow in fp16 even with the loss scaled by {self._scaler.get_scale():.2g} "
                "(--amp bf16 has the range of float32), in the last step"
            )
        if not self._flag.item():
            return
        if not self._loss.isfinite():
            raise NotFiniteError(f"the training loss is {self._loss.item()} at step {int(self._step.item())}")
        # Of a fused optimizer's later steps the gradients may be finite again.
        gradients = ((name, p.grad) for name, p in self._net.named_parameters() if p.grad is not None)
        name = next((name for name, grad in gradients if not grad.isfinite().all()), "a parameter")
        raise NotFiniteError(f"the gradient of {name} is not finite at step {int(self._step.item())}")
