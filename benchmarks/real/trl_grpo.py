"""The same task in TRL's GRPO (its newest release), in an environment of its own: penstock is not imported.

    python trl_grpo.py MODEL PROMPTS OUT --seed 0 --lr 3e-4 --lora 16 --beta 0.2 --steps 80

Batch, answers, tokens, rank, schedule and clipping are those of our run, and as there activations are kept; the base is
in bf16, the adapters in fp32. `--dtype float32` is TRL's default: weights in fp32, which answer in fp32 and are trained
under bf16's autocast. `--recompute` is its default too: activations are computed again. OUT gets curve.jsonl
(trl_curve.py), a checkpoint every 10 steps, from which a stopped run goes on, and the model, merged.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from trl_curve import Curve, flags
from vader import compound


def reward_and_kl(logs: dict[str, Any]) -> tuple[float, float]:
    """KL in nats per answer."""
    return logs["reward"], logs["kl"] * logs["completions/mean_length"]


def main() -> None:
    """Trains, and saves the merged model."""
    parser = flags(__doc__, beta=0.2, steps=80)
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
        callbacks=[Curve(options.out / "curve.jsonl", reward_and_kl)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any(options.out.glob("checkpoint-*")))
    trainer.model.merge_and_unload().save_pretrained(options.out / "model")
    trainer.processing_class.save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
