"""The same work in plain transformers and PyTorch, written as a careful user would write it, to be timed beside ours.

No packing, no clever kernels: transformers' models with SDPA, `generate` with its KV cache, fused AdamW on the model's
own dtype (no fp32 master: that is what a plain loop does), a global-norm clip.
"""

import torch
import transformers
from torch import Tensor, nn


def gpt2(dtype: torch.dtype) -> transformers.GPT2Config:
    """GPT-2 small without dropout."""
    return transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dtype=dtype)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW with the settings of ours."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)


def update(model: nn.Module, optimizer: torch.optim.AdamW, loss: Tensor) -> None:
    """Backward, clip, step."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class SFT:
    """One supervised step on rows [B, T] whose every token is trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = transformers.GPT2LMHeadModel(gpt2(dtype)).to(dtype).train()
        self.optimizer = optimizer_of(self.model)

    def step(self, tokens: Tensor) -> None:
        """tokens: [B, T] int64."""
        update(self.model, self.optimizer, self.model(tokens, labels=tokens, use_cache=False).loss)


class PPO:
    """One PPO step: rollout, four models score, GAE, one update of actor and critic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.actor = transformers.GPT2LMHeadModel(gpt2(dtype)).to(dtype)
        self.reference = transformers.GPT2LMHeadModel(gpt2(dtype)).to(dtype).eval().requires_grad_(False)
        self.critic = transformers.GPT2ForTokenClassification(scalar(dtype)).to(dtype)
        self.reward = transformers.GPT2ForTokenClassification(scalar(dtype)).to(dtype).eval().requires_grad_(False)
        self.optimizers = optimizer_of(self.actor), optimizer_of(self.critic)

    def step(self, prompts: Tensor, new_tokens: int) -> dict[str, float]:
        """prompts: [B, P] int64; every response has `new_tokens` tokens."""
        width = prompts.shape[1]
        with torch.no_grad():
            tokens = self.actor.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
            old = logprobs(self.actor, tokens, width)
            reference = logprobs(self.reference, tokens, width)
            values = self.critic(tokens, use_cache=False).logits[:, width - 1 : -1, 0].float()
            scores = self.reward(tokens, use_cache=False).logits[:, -1, 0].float()
            rewards = -0.05 * (old - reference)
            rewards[:, -1] += scores
            advantages = torch.zeros_like(rewards)
            running = torch.zeros_like(scores)
            for t in reversed(range(new_tokens)):
                following = values[:, t + 1] if t + 1 < new_tokens else 0.0
                running = rewards[:, t] + following - values[:, t] + 0.95 * running
                advantages[:, t] = running
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = (logprobs(self.actor, tokens, width) - old).exp()
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
        update(self.actor, self.optimizers[0], policy)
        now = self.critic(tokens, use_cache=False).logits[:, width - 1 : -1, 0].float()
        near = now.clamp(values - 0.2, values + 0.2)
        value = 0.5 * torch.maximum((now - returns).square(), (near - returns).square()).mean()
        update(self.critic, self.optimizers[1], value)
        return {"policy": float(policy.detach()), "value": float(value.detach())}


def scalar(dtype: torch.dtype) -> transformers.GPT2Config:
    """GPT-2 small with one number per token."""
    config = gpt2(dtype)
    config.num_labels, config.classifier_dropout = 1, 0.0
    return config


def logprobs(model: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """Log-probs of the response tokens, [B, R] fp32, logits made for those positions only."""
    keep = tokens.shape[1] - width + 1
    logits = model(tokens, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(2, tokens[:, width:, None])[:, :, 0]
