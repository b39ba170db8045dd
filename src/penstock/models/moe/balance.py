"""The loss that balances the experts' loads in training (Fedus et al. 2022, Switch Transformer, eq. 4 to 6).

    coef * E * sum over experts of f_e P_e,   f_e = choices of e / (L N),   P_e = sum of e's probabilities / (L N)

over all L routers and N tokens together, padding left out, as transformers' `load_balancing_loss_func`.

[Note: the load is that of the batch] f carries no gradient, so each router's logits can have theirs once f is known,
and N is counted over all micro-batches and ranks before the first forward. Where blocks are run again in backward, all
micro-batches have gone forward by then, and f is summed over the ranks: the loss is that of the whole batch, whatever
its parts. Elsewhere one micro-batch follows the other: f is then of those so far, on this rank.
"""

from typing import Any

import torch
from torch import Tensor

from penstock.autochunk.recompute import is_recomputing


class Balance:
    """What the routers of one model chose in one update so far."""

    def __init__(self, coef: float, routers: int, num_experts: int) -> None:
        self.coef, self.routers = coef, routers
        self.num_experts = num_experts
        self.tokens: Tensor | None = None
        """[] fp32, of the whole update, on all ranks."""
        self.sums: Tensor | None = None
        """[3, E] fp32: choices of each expert, the sum of its probabilities, and rows of logits (in every column)."""

    def begin(self, tokens: Tensor) -> None:
        """An update of so many tokens begins."""
        self.tokens, self.sums = tokens, torch.zeros(3, self.num_experts, device=tokens.device)

    def watch(self, logits: Tensor, valid: Tensor) -> Tensor:
        """The same logits [N, E], whose gradient has the loss's added; valid: [N], in how many rows a token counts."""
        return _Balanced.apply(logits, valid, self) if logits.requires_grad else logits

    def count(self, logits: Tensor, chosen: Tensor, valid: Tensor) -> None:
        """Counts what was chosen of logits [N, E], [N, k]; a forward that runs again was counted before."""
        if is_recomputing() or self.sums is None:
            return
        rows = valid.float()
        self.sums[0].index_add_(0, chosen.flatten(), rows.repeat_interleave(chosen.shape[1]))
        self.sums[1] += rows @ logits.detach().softmax(dim=-1)
        self.sums[2] += rows.sum()

    def loss(self) -> Tensor:
        """Of what was counted, not multiplied by `coef`."""
        assert self.sums is not None
        choices, chances, rows = self.sums
        return self.num_experts * (choices / rows * (chances / rows)).sum()


class _Balanced(torch.autograd.Function):
    """Adds d loss / d logits = coef E / (L N) p (f - sum p f) on the way back, with f as it is by then."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, valid: Tensor, balance: Balance) -> Tensor:
        ctx.save_for_backward(logits.softmax(dim=-1), valid)
        ctx.balance = balance
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (chances, valid), balance = ctx.saved_tensors, ctx.balance
        choices, _, rows = balance.sums
        loads = choices / rows.clamp(min=1)
        slopes = chances * (loads - (chances @ loads)[:, None])
        scale = balance.coef * balance.num_experts / (balance.routers * balance.tokens)
        return grad + slopes * (scale * valid)[:, None], None, None
