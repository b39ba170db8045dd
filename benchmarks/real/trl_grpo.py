"""The same task in TRL's GRPO (its newest release), in an environment of its own: penstock is not imported.

    python trl_grpo.py MODEL PROMPTS OUT --seed 0 --lr 3e-4 --lora 16 --beta 0.2 --steps 80

Batch, answers, tokens, rank, schedule and clipping are those of our run, and as there activations are kept; the base is
in bf16, the adapters in fp32. `--dtype float32` is TRL's default: weights in fp32, which answer in fp32 and are trained
under bf16's autocast. `--recompute` is its default too: activations are computed again. OUT gets curve.jsonl, a line
per step (step, seconds, reward, kl in nats per answer, peak_rss_bytes), a checkpoint every 10 steps, from which a
stopped run goes on, and the model, merged.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from vader import compound


class Curve(TrainerCallback):
    """A line of curve.jsonl per step. A step's seconds are from the end of the step before it."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Steps behind the checkpoint are made again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.path.write_text("".join(f"{line}\n" for line in lines[: state.global_step]), encoding="utf-8")
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "reward" not in (logs or {}):
            return
        now, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        kl = logs["kl"] * logs["completions/mean_length"]
        row = {"step": state.global_step, "seconds": now - self.began, "reward": logs["reward"], "kl": kl}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "peak_rss_bytes": peak}) + "\n")
        self.began = now

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()


def main() -> None:
    """Trains, and saves the merged model."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "prompts", "out"):
        parser.add_argument(name, type=Path)
    defaults = {"seed": 0, "lr": 3e-4, "lora": 16, "beta": 0.2, "steps": 80, "tokens": 32, "batch": 64, "micro": 16}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    data = Dataset.from_list([{"prompt": json.loads(line)["messages"]} for line in lines])
    options.out.mkdir(parents=True, exist_ok=True)
    adapter = LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear")
    trainer = GRPOTrainer(
        str(options.model),
        lambda prompts, completions, **_: compound(prompts, [messages[0]["content"] for messages in completions]),
        GRPOConfig(
            output_dir=str(options.out), seed=options.seed, learning_rate=options.lr, max_steps=options.steps,
            per_device_train_batch_size=options.micro, gradient_accumulation_steps=options.batch // options.micro,
            num_generations=8, max_completion_length=options.tokens, beta=options.beta, temperature=1.0,
            warmup_steps=0.05, lr_scheduler_type="linear", max_grad_norm=1.0, logging_steps=1, save_steps=10,
            save_total_limit=1, report_to="none", bf16=True, gradient_checkpointing=options.recompute, use_cpu=True,
            disable_tqdm=True, model_init_kwargs={"dtype": options.dtype},
        ),
        data, processing_class=AutoTokenizer.from_pretrained(options.model), peft_config=adapter,
        callbacks=[Curve(options.out / "curve.jsonl")],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any(options.out.glob("checkpoint-*")))
    trainer.model.merge_and_unload().save_pretrained(options.out / "model")
    trainer.processing_class.save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
