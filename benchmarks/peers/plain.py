"""PPO in plain transformers and PyTorch, as one side of a race.

    published   what the 2023 benchmark compared with: four fp32 models, generate, Adam, no autocast, no checkpointing
    fair        bf16 weights, frozen models in bf16, an fp32 master of what is trained, fused AdamW

No packing, no clever kernels: transformers' models with SDPA, `generate` with its KV cache.
"""

import torch
import transformers
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gpt2(dtype: torch.dtype, **shape: int) -> transformers.GPT2Config:
    """GPT-2 without dropout, small by default; `shape` are GPT2Config's own names."""
    return transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dtype=dtype, **shape)


def scalar(dtype: torch.dtype, **shape: int) -> transformers.GPT2Config:
    """The same with one number per token."""
    config = gpt2(dtype, **shape)
    config.num_labels, config.classifier_dropout = 1, 0.0
    return config


class Optimizer:
    """AdamW with the settings of ours and a clip; with `master` on fp32 copies of the weights."""

    def __init__(self, model: nn.Module, *, master: bool = False, published: bool = False) -> None:
        self.model, self.published = model, published
        self.masters = [p.detach().float().requires_grad_() for p in model.parameters()] if master else None
        weights = self.masters or list(model.parameters())
        self.inner: torch.optim.Optimizer
        if published:
            self.inner = torch.optim.Adam(weights, lr=5e-6)
        else:
            self.inner = torch.optim.AdamW(weights, lr=1e-5, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)

    def update(self, loss: Tensor) -> None:
        """Backward, clip (the published one had none), step."""
        loss.backward()
        if not self.published:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.masters is not None:
            for master, weight in zip(self.masters, self.model.parameters(), strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        self.inner.step()
        self.inner.zero_grad()
        if self.masters is not None:
            with torch.no_grad():
                for master, weight in zip(self.masters, self.model.parameters(), strict=True):
                    weight.copy_(master)


class PPO:
    """One PPO step: rollout, four models score, GAE, one update of actor and critic."""

    def __init__(self, dtype: torch.dtype, kind: str, **shape: int) -> None:
        token, number = transformers.GPT2LMHeadModel, transformers.GPT2ForTokenClassification
        self.actor = token(gpt2(dtype, **shape)).to(dtype)
        self.reference = token(gpt2(dtype, **shape)).to(dtype).eval().requires_grad_(False)
        self.critic = number(scalar(dtype, **shape)).to(dtype)
        self.reward = number(scalar(dtype, **shape)).to(dtype).eval().requires_grad_(False)
        settings = {"master": kind == "fair" and dtype != torch.float32, "published": kind == "published"}
        self.optimizers = Optimizer(self.actor, **settings), Optimizer(self.critic, **settings)

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
        self.optimizers[0].update(policy)
        now = self.critic(tokens, use_cache=False).logits[:, width - 1 : -1, 0].float()
        near = now.clamp(values - 0.2, values + 0.2)
        value = 0.5 * torch.maximum((now - returns).square(), (near - returns).square()).mean()
        self.optimizers[1].update(value)
        return {"policy": float(policy.detach()), "value": float(value.detach())}


def logprobs(model: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """Log-probs of the response tokens, [B, R] fp32, logits made for those positions only."""
    keep = tokens.shape[1] - width + 1
    logits = model(tokens, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(2, tokens[:, width:, None])[:, :, 0]


def main() -> None:
    """One side of a race."""
    from turns import Turns, flags  # of this folder

    options = flags(__doc__ or "", kind=["published", "fair"])
    turns = Turns()
    torch.manual_seed(0)
    shape = shape_of(options)
    peer = PPO(DTYPES[options.dtype], options.kind, **shape)
    prompts = torch.randint(1, options.vocab, (options.rows, options.prompt))
    turns.take(lambda: peer.step(prompts, options.new))


def shape_of(options: object) -> dict[str, int]:
    """GPT2Config's names for the flags."""
    given = vars(options)
    heads = max(given["width"] // 64, 1)
    return {"n_layer": given["layers"], "n_embd": given["width"], "n_head": heads, "vocab_size": given["vocab"]}


if __name__ == "__main__":
    main()
