"""AdamW over flat memory: all trained weights of a model in one run of bytes per dtype, their gradients in another.

The fp32 master copy is kept always (PPO.md 18: at lr 1e-6 most bf16 updates vanish). For fp32 weights the master *is*
the weights; for bf16 weights it stands beside them. Everything lies on the model's own device: this is the resident
sink, the one for models that fit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FlatWeights:
    """Parameters of one dtype laid end to end. `weights` and `grads` are [numel]; each parameter becomes a view."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        like = parameters[0]
        numel = sum(p.numel() for p in parameters)
        self.weights = torch.empty(numel, dtype=like.dtype, device=like.device)
        self.grads = torch.zeros_like(self.weights)
        offset = 0
        for parameter in parameters:
            here = slice(offset, offset + parameter.numel())
            self.weights[here] = parameter.detach().reshape(-1)
            parameter.data = self.weights[here].view(parameter.shape)
            parameter.grad = self.grads[here].view(parameter.shape)  # autograd adds in place: the view survives
            offset = here.stop
        self.master = self.weights if like.dtype == torch.float32 else self.weights.float()


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the defaults of PPO.md 18, on the trainable parameters of one model.

    The parameters' storage moves into flat buffers at construction and their `.grad` are views from then on: call
    `zero_grad()` here rather than on the model. 16 bytes per fp32 parameter, 20 per bf16 parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
    ) -> None:
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        if not by_dtype:
            raise ValueError("no trainable parameters were given to AdamW")
        self.flats = [FlatWeights(group) for group in by_dtype.values()]
        self._optimizers = [
            torch.optim.AdamW([nn.Parameter(flat.master)], betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
            for flat in self.flats
        ]

    def zero_grad(self) -> None:
        """Empties the gradient buffers in place."""
        for flat in self.flats:
            flat.grads.zero_()

    def grad_norm(self) -> Tensor:
        """Global 2-norm over everything trainable, fp32 scalar (PPO.md 17)."""
        norms = [torch.linalg.vector_norm(flat.grads, dtype=torch.float32) for flat in self.flats]
        return torch.linalg.vector_norm(torch.stack(norms))

    def update(self, lr: float, scale: Tensor | float = 1.0) -> None:
        """One AdamW update with the gradients times `scale` (the clip factor)."""
        for flat, optimizer in zip(self.flats, self._optimizers, strict=True):
            group = optimizer.param_groups[0]
            group["lr"] = lr
            master = group["params"][0]
            master.grad = flat.grads.float().mul_(scale)
            optimizer.step()
            master.grad = None
            if flat.master is not flat.weights:
                flat.weights.copy_(master.detach())

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts; and masters where the weights themselves are rounded."""
        flats = []
        for flat, optimizer in zip(self.flats, self._optimizers, strict=True):
            moments = optimizer.state[optimizer.param_groups[0]["params"][0]]
            state: dict[str, Any] = {name: moments[name] for name in ("step", "exp_avg", "exp_avg_sq") if moments}
            state["master"] = flat.master
            flats.append(state)
        return {"flats": flats}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores weights and moments bit by bit. Raises ValueError when they belong to another model."""
        saved = state["flats"]
        if [s["master"].numel() for s in saved] != [f.master.numel() for f in self.flats]:
            raise ValueError("the optimizer state in the checkpoint belongs to a model of another size")
        for flat, optimizer, one in zip(self.flats, self._optimizers, saved, strict=True):
            flat.master.copy_(one["master"])
            if flat.master is not flat.weights:
                flat.weights.copy_(flat.master)
            if "exp_avg" in one:
                master = optimizer.param_groups[0]["params"][0]
                optimizer.state[master] = {
                    "step": one["step"].to(flat.master.device, copy=True),  # fused: beside the weights
                    "exp_avg": one["exp_avg"].to(flat.master.device),
                    "exp_avg_sq": one["exp_avg_sq"].to(flat.master.device),
                }
