"""The same PPO by TRL 1.12.0 (trl.experimental.ppo, the last release that has it), as one side of a race.

One rollout of all rows, one epoch, one mini-batch; TRL's own trainer and its own settings otherwise. The models are
GPT-2s with random weights; nothing ends a response. With `--autocast bf16` weights, gradients and optimizer are fp32
and products are bf16, which is how TRL keeps the master weights that we keep; with `--dtype bf16` it has none.
"""

import tempfile

import torch
import transformers
from plain import DTYPES, gpt2, scalar, shape_of
from trainer import StepInTurn, tokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer
from turns import Turns, flags

STEPS = 10_000
"""Steps that the trainer is configured for; the race ends before."""


def main() -> None:
    """One side of a race."""
    options = flags(__doc__ or "", autocast=["no", "bf16"])
    turns = Turns()
    torch.manual_seed(0)
    dtype, shape = DTYPES[options.dtype], shape_of(options)

    def language() -> transformers.GPT2LMHeadModel:
        return transformers.GPT2LMHeadModel(gpt2(dtype, **shape, pad_token_id=0, eos_token_id=1)).to(dtype)

    def numbers() -> transformers.GPT2ForSequenceClassification:
        config = scalar(dtype, **shape, pad_token_id=0, eos_token_id=1)
        return transformers.GPT2ForSequenceClassification(config).to(dtype)

    prompts = torch.randint(2, options.vocab, (max(options.rows, 64), options.prompt)).tolist()
    with tempfile.TemporaryDirectory() as directory:
        trainer = PPOTrainer(
            PPOConfig(
                output_dir=directory, per_device_train_batch_size=options.rows, num_mini_batches=1, num_ppo_epochs=1,
                gradient_accumulation_steps=1, local_rollout_forward_batch_size=options.rows,
                response_length=options.new, total_episodes=STEPS * options.rows, num_sample_generations=0,
                report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(),
                bf16=options.autocast == "bf16", learning_rate=1e-5, gradient_checkpointing=False, temperature=1.0,
                disable_tqdm=True,
            ),
            tokenizer(options.vocab), language(), language(), numbers(),
            [{"input_ids": prompt} for prompt in prompts], numbers(),
            data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
            eval_dataset=[{"input_ids": prompt} for prompt in prompts[: options.rows]], callbacks=[StepInTurn(turns)],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
