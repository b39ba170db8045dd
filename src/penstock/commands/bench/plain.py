"""The same PPO in plain PyTorch, with all four models resident: what capacity and strategies are measured against.

`published`: four fp32 models, Adam, no autocast, no checkpointing, as the 2023 benchmark's `ddp` baseline was. `fair`:
what a careful user would do first with the same memory: bf16 weights, frozen models in bf16, an fp32 master of what is
trained. Both use our decoder as an ordinary module with ordinary autograd, so that both sides compute the same; the
same in transformers' models is benchmarks/peers/plain.py.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.rollout.engine import generate
from penstock.rollout.sampling import Sampling

Kind = Literal["published", "fair"]


class Plain:
    """Four decoders, a head on two of them, and two optimizers, on one device."""

    def __init__(self, shape: DecoderConfig, kind: Kind, device: torch.device) -> None:
        dtype = torch.float32 if kind == "published" else torch.bfloat16
        self.actor, self.critic, self.reference, self.reward = (
            Decoder(shape, dtype=dtype, device=device) for _ in range(4)
        )
        for frozen in (self.reference, self.reward):
            frozen.requires_grad_(False)
        self.heads = [torch.zeros(1, shape.d_model, device=device, requires_grad=i == 0) for i in range(2)]
        self.masters = [
            [p.detach().float().requires_grad_() for p in model.parameters()] if kind == "fair" else None
            for model in (self.actor, self.critic)
        ]
        self.optimizers = [
            torch.optim.Adam([*(masters or model.parameters()), *head], lr=5e-6)
            for model, masters, head in zip((self.actor, self.critic), self.masters, ([], [self.heads[0]]), strict=True)
        ]

    def step(self, prompts: Tensor, new: int) -> None:
        """One rollout and one update of actor and critic. prompts: [B, P] int64; responses have `new` tokens."""
        width = prompts.shape[1]
        with torch.no_grad():
            rollout = generate(self.actor, prompts.tolist(), Sampling(max_new_tokens=new), eos_ids=())
            rows = [answer.prompt_ids + answer.response_ids for answer in rollout]
            tokens = torch.tensor(rows, device=prompts.device)
            old, reference = (logprobs(model, tokens, width) for model in (self.actor, self.reference))
            values = self._values(tokens, width)
            scores = nn.functional.linear(self.reward(tokens)[:, -1].float(), self.heads[1])[:, 0]
            rewards = -0.1 * (old - reference)
            rewards[:, -1] += scores
            advantages, running = torch.zeros_like(rewards), torch.zeros_like(scores)
            for t in reversed(range(new)):
                following = values[:, t + 1] if t + 1 < new else 0.0
                running = rewards[:, t] + following - values[:, t] + 0.95 * running
                advantages[:, t] = running
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = (logprobs(self.actor, tokens, width) - old).exp()
        self._update(0, torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean())
        del ratio
        self._update(1, 0.5 * (self._values(tokens, width) - returns).square().mean())

    def _values(self, tokens: Tensor, width: int) -> Tensor:
        """[B, R] fp32: of the states before each response token."""
        states = self.critic(tokens)[:, width - 1 : -1].float()
        return nn.functional.linear(states, self.heads[0])[..., 0]

    def _update(self, model_index: int, loss: Tensor) -> None:
        """Of the actor (0) or the critic (1)."""
        model, masters = (self.actor, self.critic)[model_index], self.masters[model_index]
        optimizer = self.optimizers[model_index]
        loss.backward()
        del loss
        if masters is not None:
            for master, weight in zip(masters, model.parameters(), strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if masters is not None:
            with torch.no_grad():
                for master, weight in zip(masters, model.parameters(), strict=True):
                    weight.copy_(master)


def logprobs(model: Decoder, tokens: Tensor, width: int) -> Tensor:
    """Log-probs of the response tokens, [B, R] fp32, with logits of those positions alone: [B, R, V]."""
    logits = model.logits(model(tokens)[:, width - 1 : -1]).float()
    return logits.log_softmax(dim=-1).gather(2, tokens[:, width:, None])[:, :, 0]
