"""The same task in TRL 1.12's PPO (trl.experimental.ppo; no later release has it), in an environment of its own.

    python trl_ppo.py MODEL PROMPTS OUT --seed 0 --lr 3e-4 --lora 16 --beta 0.12 --steps 50

Batch, tokens, rank, rates, epochs, clipping and lambda are those of our run; the value model starts from the same
weights and learns through adapters of the same rank and its head, as our critic, and is in fp32 whatever `--dtype` the
policy has: its head would learn in bf16, without a master. Its trainer takes rewards from a
model alone: `Judge` has the shape of one. OUT gets curve.jsonl (trl_curve.py) and the model, merged; its trainer
cannot go on with a stopped run.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from trl_curve import Curve, flags
from vader import compound


class Judge(torch.nn.Module):
    """VADER in the shape of a reward model: TRL calls the backbone that `base_model_prefix` names with a batch's ids,
    [batch, tokens], and `score` with its last hidden states, which are those ids here. The trainer reads the score of
    the last token that is no padding; the answer's score stands at every one."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.opening = tokenizer.encode("<|im_start|>assistant\n")

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Padding is -1 again."""
        return SimpleNamespace(hidden_states=(input_ids.masked_fill(~attention_mask, -1),))

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, 1]"""
        texts = [self.answer([token for token in row if token >= 0]) for row in ids.tolist()]
        return torch.tensor(compound(texts, texts))[:, None, None].expand(*ids.shape, 1)

    def answer(self, row: list[int]) -> str:
        """The text behind the last turn's opening."""
        width = len(self.opening)
        starts = [i + width for i in range(len(row) - width + 1) if row[i : i + width] == self.opening]
        return str(self.tokenizer.decode(row[starts[-1] :], skip_special_tokens=True)).strip()


def main() -> None:
    """Trains, and saves the merged model."""
    options = flags(__doc__, beta=0.12, steps=50).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})  # its own is its eos, which TRL would read as padding
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    data = Dataset.from_list([{"input_ids": tokenizer.encode(text)} for text in texts])
    options.out.mkdir(parents=True, exist_ok=True)

    def adapter(**more: Any) -> LoraConfig:
        return LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear", **more)

    torch.manual_seed(options.seed)
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    value = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1, dtype="float32")
    value = inject_adapter_in_model(adapter(exclude_modules=["score"]), value)
    value.score.requires_grad_(True)
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(options.out), seed=options.seed, learning_rate=options.lr, kl_coef=options.beta,
            per_device_train_batch_size=options.micro, gradient_accumulation_steps=options.batch // options.micro,
            local_rollout_forward_batch_size=options.batch, num_mini_batches=1, num_ppo_epochs=2,
            total_episodes=options.steps * options.batch, response_length=options.tokens, temperature=1.0,
            stop_token="eos", missing_eos_penalty=None, warmup_steps=0.05, lr_scheduler_type="linear",
            max_grad_norm=1.0, num_sample_generations=0, logging_steps=1, save_strategy="no", report_to="none",
            bf16=True, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
        ),
        tokenizer, policy, None, Judge(tokenizer), data, value, eval_dataset=data.select(range(options.batch)),
        peft_config=adapter(task_type="CAUSAL_LM"),
        callbacks=[Curve(options.out / "curve.jsonl", lambda logs: (logs["objective/scores"], logs["objective/kl"]))],
    )  # fmt: skip
    trainer.train()
    trainer.policy_model.merge_and_unload().save_pretrained(options.out / "model")
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
