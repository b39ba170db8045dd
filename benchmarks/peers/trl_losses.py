"""What TRL's own trainers make of small batches: losses, advantages, gradients. Run by `benchmarks losses` in TRL's
environment.

    python trl_losses.py DIRECTORY

Writes DIRECTORY/MODEL/{policy,behaviour,reference} (tiny random models, fp32) and DIRECTORY/trl.json: for each model
and case the settings, the rows of token ids, log-probabilities and rewards, and what TRL computed from them. Losses are
the trainers' `compute_loss` on batches of their own collators; advantages are those of their own rollouts.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trainer import tokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

VOCABULARY, LAYERS = 24, 2
PAIRS = [  # words of prompt, chosen and rejected; the tokenizer ends every answer with EOS
    ("4 5 6", "7 8 9 10", "11 12"),
    ("5 5", "13 2 3", "14 15 16 17 18"),
    ("6 7 8 9 10", "19", "20 21 22"),
    ("12 3", "3 4 5 6 7 8", "9 9 9"),
]
VOTES = [(*pair[:2], True) for pair in PAIRS] + [(pair[0], pair[2], False) for pair in PAIRS[:2]]
PROMPTS = ["4 5 6", "5 5 7", "6 7 8"]
RAGGED = ["4 5 6", "5 5", "6 7 8 9 10"]
GROUP, NEW = 6, 10
MODELS = {"policy": 0.0, "behaviour": 0.02, "reference": 0.04}
"""Random distance of their weights from those of the policy, which learns; behaviour wrote the answers of groups."""

PREFERENCE: dict[str, tuple] = {
    "dpo": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid"], "beta": 0.3}),
    "dpo, robust": (DPOTrainer, DPOConfig, {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1}),
    "dpo, ipo": (DPOTrainer, DPOConfig, {"loss_type": ["ipo"], "beta": 0.3}),
    "dpo, hinge": (DPOTrainer, DPOConfig, {"loss_type": ["hinge"], "beta": 0.3}),
    "dpo, by tokens": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid_norm"], "beta": 3.0}),
    "dpo and sft": (
        DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3},
    ),
    "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    "cpo": (CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 1.0}),
    "cpo, smoothed": (
        CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    ),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.3}),
    "orpo, prompts of one token": (ORPOTrainer, ORPOConfig, {"beta": 0.3}, 1),
}  # fmt: skip
KTO = {
    "kto": {"beta": 0.3},
    "kto, weighted": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8},
}
GROUPS: dict[str, tuple] = {
    name: (GRPOTrainer, GRPOConfig, {"beta": 0.0, **settings})
    for name, settings in {
        "grpo": {"loss_type": "grpo"},
        "grpo, scaled by the batch": {"loss_type": "grpo", "scale_rewards": "batch"},
        "grpo, KL as published": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
        "grpo, KL": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
        "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
        "dapo, on its own policy": {"loss_type": "dapo", "num_iterations": 1},
        "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
        "bnpo": {"loss_type": "bnpo"},
        "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
        "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    }.items()
} | {
    "grpo, ragged prompts": (GRPOTrainer, GRPOConfig, {"beta": 0.0, "loss_type": "grpo"}, RAGGED),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.0}),
    "rloo, KL": (RLOOTrainer, RLOOConfig, {"beta": 0.05}),
    "rloo, on its own policy": (RLOOTrainer, RLOOConfig, {"beta": 0.05, "num_iterations": 1}),
}


def main(directory: Path) -> None:
    """Makes the models, then every case of each."""
    result = {}
    for name, config in shapes().items():
        save_models(directory / name, config)
        result[name] = {
            **{case: preference(directory / name, *arguments) for case, arguments in PREFERENCE.items()},
            **{case: kto(directory / name, settings) for case, settings in KTO.items()},
            **{case: group(directory / name, *arguments) for case, arguments in GROUPS.items()},
        }
    (directory / "trl.json").write_text(json.dumps(result))


def shapes() -> dict[str, transformers.PretrainedConfig]:
    """Tiny models of two families. Weights large enough that log-probabilities differ."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1,
              "initializer_range": 0.2, "dtype": "float32"}  # fmt: skip
    return {
        "gpt2": transformers.GPT2Config(
            n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            **common,
        ),
        "llama": transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, **common,
        ),
    }  # fmt: skip


def save_models(directory: Path, config: transformers.PretrainedConfig) -> None:
    """All of one family's models."""
    torch.manual_seed(5)
    start = transformers.AutoModelForCausalLM.from_config(config)
    for name, distance in MODELS.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        weights = {key: weight + distance * torch.randn_like(weight) for key, weight in start.state_dict().items()}
        model.load_state_dict(weights)
        model.tie_weights()
        model.save_pretrained(directory / name)


def load(directory: Path, name: str) -> Any:
    """One of a family's models."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)


def trainer_of(kind: type, config: type, model: Any, settings: dict[str, Any], rows: Any, **more: Any) -> Any:
    """A trainer in fp32 on the CPU; batches hold all rows."""
    output = tempfile.mkdtemp()
    size = more.pop("batch", len(rows))
    args = config(
        output_dir=output, per_device_train_batch_size=size, gradient_accumulation_steps=1, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    more |= {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer(VOCABULARY)}
    trainer = kind(model=model, args=args, **more)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    return trainer


def learned(trainer: Any, batch: Any) -> dict[str, float]:
    """The loss of a batch, and the norm of its gradient."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in trainer.model.parameters()])
    return {"loss": loss.item(), "grad_norm": norm.item()}


def answers_of(directory: Path, rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Rows of prompt and answer, and the answers' log-probabilities by each model's plain forward."""
    return {"rows": rows, "logps": [logprobs(load(directory, name), rows) for name in MODELS]}


def logprobs(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """Of each answer given its prompt, one row at a time."""
    sums = []
    for prompt, answer in rows:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        sums.append(float(logits.log_softmax(-1)[range(len(answer)), answer].double().sum()))
    return sums


# --- pairs and votes --------------------------------------------------------------------------------------------------


def preference(
    directory: Path, kind: type, config: type, settings: dict[str, Any], words: int | None = None
) -> dict[str, Any]:
    """The batch's loss, and that of each pair alone. words: of a prompt at most."""
    rows = [
        {"prompt": " ".join(prompt.split()[:words]), "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for prompt, chosen, rejected in PAIRS
    ]
    more = {"ref_model": load(directory, "reference")} if kind is DPOTrainer else {}
    trainer = trainer_of(kind, config, load(directory, "policy"), settings, rows, **more)
    read = [trainer.train_dataset[i] for i in range(len(rows))]
    return {
        "settings": settings, **learned(trainer, trainer.data_collator(read)),
        "each": [learned(trainer, trainer.data_collator([row]))["loss"] for row in read],
        **answers_of(directory, [ids_of(row, side) for side in ("chosen", "rejected") for row in read]),
    }  # fmt: skip


def ids_of(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and answer, as the trainer's tokenisation cut them (DPO's columns, then CPO's and ORPO's)."""
    if "prompt_ids" in row:
        return row["prompt_ids"], row[f"{side}_ids"]
    prompt = row["prompt_input_ids"]
    return prompt, row[f"{side}_input_ids"][len(prompt) :]


def kto(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The batch's loss, its KL term and the mismatched pairs that it is estimated from."""
    rows = [{"prompt": prompt, "completion": f" {answer}", "label": label} for prompt, answer, label in VOTES]
    more = {"ref_model": load(directory, "reference")}
    trainer = trainer_of(KTOTrainer, KTOConfig, load(directory, "policy"), settings, rows, **more)
    read = [trainer.train_dataset[i] for i in range(len(rows))]
    result = learned(trainer, trainer.data_collator(read))
    answers = [(row["prompt_ids"], row[f"{kind}completion_ids"]) for kind in ("", "KL_") for row in read]
    return {
        "settings": settings, **result, "kl": trainer._metrics["train"]["kl"][-1],
        "labels": [row["label"] for row in read], **answers_of(directory, answers),
    }  # fmt: skip


# --- groups -----------------------------------------------------------------------------------------------------------


def group(
    directory: Path, kind: type, config: type, settings: dict[str, Any], prompts: list[str] = PROMPTS
) -> dict[str, Any]:
    """A rollout and its advantages, then the loss of the policy on it."""
    rewards: list[float] = []
    settings = {"num_iterations": 2, **settings}  # 2: the trainer keeps the log-probabilities of the rollout
    behaviour = "behaviour" if settings["num_iterations"] > 1 else "policy"
    trainer = trainer_of(
        kind, config, load(directory, behaviour),
        {**settings, "num_generations": GROUP, "max_completion_length": NEW, "seed": 3},
        [{"prompt": prompt} for prompt in prompts], batch=GROUP * len(prompts), reward_funcs=reward_into(rewards),
    )  # fmt: skip
    if trainer.ref_model is not None:  # it was read from the directory of `behaviour`
        trainer.ref_model.load_state_dict(load(directory, "reference").state_dict())
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(GROUP)])
    trainer.model.load_state_dict(load(directory, "policy").state_dict())  # as if updates came between
    sides = (ragged(batch[f"{side}_ids"], batch[f"{side}_mask"]) for side in ("prompt", "completion"))
    return {
        "settings": settings, "behaviour": behaviour, "rewards": rewards, "advantages": batch["advantages"].tolist(),
        "group": GROUP, "new": NEW, **learned(trainer, batch),
        **answers_of(directory, list(zip(*sides, strict=True))),
    }  # fmt: skip


def reward_into(rewards: list[float]) -> Callable[..., list[float]]:
    """A reward function that keeps what it gives. A group of equal rewards comes first."""

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        given = [
            0.5 if prompt == PROMPTS[0] else sum(ids) % 7 / 3 - len(ids) / NEW
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        rewards.extend(given)
        return given

    return reward


def ragged(tensor: torch.Tensor, mask: torch.Tensor) -> list[list]:
    """The valid entries of each row."""
    return [row[valid.bool()].tolist() for row, valid in zip(tensor, mask, strict=True)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
