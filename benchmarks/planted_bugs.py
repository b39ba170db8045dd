"""Do the tests notice? Plants the classic mistakes of RLHF code, one at a time, and runs the tests on each.

    python -m benchmarks planted_bugs [--only WORD | --new] [--jobs 2]

Each line of BUGS is one wrong line in a copy of src/ (the tree itself is not touched). A bug is caught when a test of
DIRECTORIES fails on it that passes on the unchanged copy. A bug meets first the test that caught it last time (results/
planted_bugs.json), and the others only if that test passes. The ideas are from the war stories of docs/ppo.md (TRL,
trlX, DeepSpeed-Chat and the 2023 reference system had several of these in releases).
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.facts import RESULTS, ROOT, flags, write

DIRECTORIES = (
    "algorithms", "data", "rollout", "memory", "models", "kernels", "distributed", "planner", "autochunk", "run", "commands",
    "serve",
)  # fmt: skip
FIRST = (
    "algorithms/test_functional.py", "algorithms/test_experience.py", "algorithms/test_reading.py",
    "algorithms/test_setup.py", "algorithms/test_health.py", "algorithms/test_reward_source.py",
    "algorithms/test_reward_functions.py", "algorithms/test_verifiers.py",
    "algorithms/test_length.py", "algorithms/test_policy_inputs.py", "data/test_chat.py", "data/test_formats.py",
    "algorithms/test_distill.py", "models/test_log_probs.py", "models/test_chat_template.py", "planner/test_planning.py", "algorithms/test_sft.py",
    "algorithms/test_reward.py", "algorithms/test_ppo.py",
)  # fmt: skip
"""The files of tests that run before the others: they are fast and catch most."""
LIMIT = 3600
"""Seconds of the tests on one copy."""

FN, PPO, METRICS, SFT, RM, EXPERIENCE = (
    f"algorithms/{name}.py" for name in ("functional", "ppo", "policy_metrics", "sft", "reward", "experience")
)
POLICY, GRPO, ADV = (f"algorithms/{name}.py" for name in ("policy", "grpo", "advantages"))
PAIRS, REFERENCE = "algorithms/preference_losses.py", "algorithms/reference.py"
DISTILL, TEACHER = (f"algorithms/distillation/{name}.py" for name in ("distill", "teacher"))
KTO = "algorithms/kto.py"
FOREIGN = "models/foreign/decoder.py"
HEALTH, INPUTS = "algorithms/health.py", "algorithms/policy_inputs.py"
MEASURING = "planner/measuring/foreign.py"
REWARD_FUNCTIONS = "algorithms/reward_functions.py"
DECODER, SHAPES, HEAD = "models/decoder.py", "planner/footprint.py", "models/log_probs.py"
POSITIONS = "models/positions.py"
LINEAR, RECIPE, QUANTISED = "models/linear.py", "models/recipe.py", "models/packed.py"
PASSES = "planner/activations.py"
STREAM, SINK, ADAM, PLAN, TIERS = (f"memory/{name}.py" for name in ("stream", "sink", "adamw", "plan", "tiers"))
TEMPLATE = "models/chat_template.py"
STRATEGY, SAMPLING, ENGINE, ROLES = "memory/strategy.py", "rollout/sampling.py", "rollout/engine.py", "models/roles.py"

Bug = tuple[str, str, str, str]
BUGS: list[Bug] = [
    # (file, what is wrong, the right line, the wrong line)
    # masks and shifts
    (FN, "mask one token too long", "< lengths[:, None]", "<= lengths[:, None]"),
    (FN, "log-prob read from the token's own state", "index_select(0, flat - 1)", "index_select(0, flat)"),
    (FN, "log-prob read two states before", "index_select(0, flat - 1)", "index_select(0, (flat - 2).clamp(min=0))"),
    (FN, "a row's first token is trained on", "if bool(mask[:, 0].any()):", "if False:"),
    (FN, "score read at the last column, padding or not", "lengths - 1]\n\n\ndef pack", "-1 + 0 * lengths]\n\n\ndef pack"),
    (FN, "padding is multiplied by 0, so NaN survives", "return x.masked_fill(~mask, 0.0)", "return x * mask"),
    (FN, "prompt tokens are in the response mask", " & ~mask_of(prompt_lengths, width)", ""),
    # rows end to end
    (FN, "states of rows end to end are the next token's", "(computed.flatten().cumsum(0) - 1)[flat]", "computed.flatten().cumsum(0)[flat]"),
    (FN, "a row's last state is the next row's first", "hidden[0, computed.sum(dim=1).cumsum(0) - 1]", "hidden[0, computed.sum(dim=1).cumsum(0) % hidden.shape[1]]"),
    (POSITIONS, "positions go on from row to row", "places % valid.shape[1]", "torch.arange(len(places), device=places.device)"),
    (LINEAR, "equally long neighbours are one row", "(x.unflatten(1, (count, -1)).transpose(0, 1) for x in (own_q, own_k, own_v))", "(x[None] for x in (own_q, own_k, own_v))"),
    (ROLES, "routes are balanced by padded masks of rows end to end", "batch.valid if context.ragged is None else context.ragged.readers", "batch.valid.flatten()[: len(batch.valid if context.ragged is None else context.ragged.places)]"),
    # what rows share
    (FN, "a state that is read is the row's before", ".minimum(reads[1:])", ".minimum(reads[1:] + 1)"),
    (FN, "padding is a beginning that rows share", " & valid[:-1]", ""),
    (FN, "what rows share need not be their beginning", "equal.int().cumprod(dim=1)", "equal.int()"),
    (POSITIONS, "a row's keys are those of the longest row", "order.masked_fill(~computed, -1).cummax(dim=0).values", "order.cummax(dim=0).values"),
    (POSITIONS, "a shared token counts as one row's", "self.keys.bincount(minlength=len(self.places))", "torch.ones_like(self.places)"),
    (LINEAR, "queries behind a shared beginning see no more than it", ".triu(1 + k.shape[2] - q.shape[2])", ".triu(1)"),
    ("kernels/capped_attention.py", "capped queries stand at the row's beginning", "k.shape[2] - q.shape[2]", "0"),
    ("algorithms/grpo.py", "answers of a group are scattered over micro-batches", "index = index.sort().values", "index = index"),
    # mixtures of experts
    ("models/moe/experts.py", "ties go to the last expert", "logits.argsort(dim=-1, descending=True, stable=True)[:, :k]", "logits.argsort(dim=-1, stable=True).flip(-1)[:, :k]"),
    ("models/moe/experts.py", "a gradient of one of a token's experts", "(-1, ctx.k)).sum(dim=1)", "(-1, ctx.k))[:, 0]"),
    ("models/moe/experts.py", "shares among all, whatever the config says", "    if norm:  # a softmax", "    if False:  # a softmax"),
    ("models/moe/mlp.py", "gpt-oss without the 1 beside up", "raised.clamp(-limit, limit) + 1)", "raised.clamp(-limit, limit) + 0)"),
    ("models/moe/mxfp4.py", "a byte's halves swapped", "(blocks & 15, blocks >> 4)", "(blocks >> 4, blocks & 15)"),
    ("models/adapter_files.py", "an expert's B is another's", "[:, :, expert]", "[:, :, expert - 1]"),
    ("models/moe/balance.py", "loads that fall are rewarded twice", "loads - (chances @ loads)[:, None]", "loads + (chances @ loads)[:, None]"),
    ("models/moe/balance.py", "blocks that run again count twice", "if is_recomputing() or self.sums is None:", "if self.sums is None:"),
    # log-probs and KL
    (HEAD, "temperature forgotten in training", "if temperature != 1.0 else", "if False else"),
    (HEAD, "temperature multiplies", "return logits.div_(temperature)", "return logits.mul_(temperature)"),
    (HEAD, "softmax in bf16", "bend(logits.float(), 1.0", "bend(logits.bfloat16().float(), 1.0"),
    (HEAD, "gradient of the log-prob upside down", "exp_().mul_(-falling[rows, None])", "exp_().mul_(falling[rows, None])"),
    (HEAD, "gradient without the target's own", "slope.scatter_add_(1, column, torch.where(inside, grad[rows], 0.0))", "pass"),
    (HEAD, "entropy with the wrong sign", "add_(logits.mul_(every).sum(dim=-1))", "sub_(logits.mul_(every).sum(dim=-1))"),
    (HEAD, "the last tile of rows is left out", "for start in range(0, count, height))", "for start in range(0, count - height + 1, height))"),
    (FN, "log-ratio not clamped", "(logprobs - base_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)", "logprobs - base_logprobs"),
    (FN, "KL the wrong way round", "return log_ratio(logprobs, ref_logprobs)", "return log_ratio(ref_logprobs, logprobs)"),
    (FN, "k2 without its half", "return 0.5 * log_ratio", "return log_ratio"),
    (FN, "k3 with the ratio upside down", "reverse = log_ratio(ref_logprobs, logprobs)", "reverse = log_ratio(logprobs, ref_logprobs)"),
    # rewards
    (FN, "KL rewarded instead of penalised", "rewards = -kl_coef * kl\n", "rewards = kl_coef * kl\n"),
    (FN, "score added at every token", "rewards[torch.arange(len(scores), device=scores.device), lengths - 1] += scores.float()", "rewards = rewards + scores[:, None] * mask"),
    (FN, "score added in the padding", "lengths - 1] += scores.float()", "-1 + 0 * lengths] += scores.float()"),
    (FN, "score replaces the last token's KL", "lengths - 1] += scores.float()", "lengths - 1] = scores.float()"),
    (FN, "missing-EOS score added, not put in place", "torch.full_like(scores, missing_eos_score))", "scores + missing_eos_score)"),
    (FN, "answers that did end are punished", "torch.where(has_eos, scores, torch.full_like", "torch.where(~has_eos, scores, torch.full_like"),
    (FN, "missing-EOS score 0 read as off", "if missing_eos_score is None:", "if not missing_eos_score:"),
    (FN, "KL controller steers away", "1.0 + error * episodes", "1.0 - error * episodes"),
    (FN, "KL controller's error not clipped", "min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)", "kl_per_sequence / self.target - 1.0"),
    (FN, "KL controller counts batches, not episodes", "error * episodes / self.horizon", "error / self.horizon"),
    # advantages
    (FN, "lambda forgotten", "gamma * lam * running", "gamma * running"),
    (FN, "gamma forgotten in the recursion", "gamma * lam * running", "lam * running"),
    (FN, "gamma forgotten in delta", "deltas = rewards + gamma * next_values", "deltas = rewards + next_values"),
    (FN, "lambda in the place of gamma", "deltas = rewards + gamma * next_values", "deltas = rewards + lam * next_values"),
    (FN, "last value bootstraps itself", "F.pad(values[:, 1:], (0, 1))", "torch.cat([values[:, 1:], values[:, -1:]], 1)"),
    (FN, "values of the padding leak into GAE", "clean(rewards.float(), mask), clean(values.float(), mask)\n    # Zeros", "clean(rewards.float(), mask), values.float()\n    # Zeros"),
    (FN, "returns are the advantages", "return advantages, clean(advantages + values, mask)", "return advantages, advantages"),
    (FN, "whitening counts the padding", "count = mask.sum()\n    mean", "count = mask.numel()\n    mean"),
    (FN, "variance over the padding", "clean((x - mean).square(), mask).sum() /", "(x - mean).square().sum() /"),
    (FN, "biased variance", "(count - 1).clamp(min=1)", "count"),
    (FN, "mean not shifted", "whitened if shift_mean else whitened + mean", "whitened + mean"),
    (FN, "divided by the variance", "torch.rsqrt(variance + eps)", "1 / (variance + eps)"),
    (FN, "explained variance upside down", "1 - (returns - values).var(unbiased=False) / variance", "(returns - values).var(unbiased=False) / variance"),
    # losses
    (FN, "policy gradient with the wrong sign", "unclipped = -advantages * ratios\n    clipped = -advantages", "unclipped = advantages * ratios\n    clipped = advantages"),
    (FN, "the better of the two instead of the worse", "return torch.maximum(unclipped, clipped), clipped", "return torch.minimum(unclipped, clipped), clipped"),
    (FN, "never clipped", "return torch.maximum(unclipped, clipped), clipped", "return unclipped, clipped"),
    (FN, "always clipped", "return torch.maximum(unclipped, clipped), clipped", "return clipped, clipped"),
    (FN, "clipped on one side only", "-advantages * ratios.clamp(1 - low, 1 + high)", "-advantages * ratios.clamp(max=1 + high)"),
    (FN, "ratio upside down", "log_ratios = log_ratio(logprobs, old_logprobs)", "log_ratios = log_ratio(old_logprobs, logprobs)"),
    (FN, "old log-probs not detached", "clean(old_logprobs.float().detach(), mask)", "clean(old_logprobs.float(), mask)"),
    (FN, "advantages not detached", "clean(advantages.detach(), mask)", "clean(advantages, mask)"),
    (FN, "policy loss is a mean of this micro-batch", "loss = masked_mean(per_token, mask, count) if weights is None", "loss = masked_mean(per_token, mask) if weights is None"),
    (FN, "mean of sequence means", "loss = masked_mean(per_token, mask, count) if weights is None", "loss = (clean(per_token, mask).sum(1) / mask.sum(1)).mean() if weights is None"),
    (FN, "mean over the padding too", "mask.sum() if count is None else count)", "mask.numel() if count is None else count)"),
    (FN, "value loss without its half", "loss = 0.5 * masked_mean(torch.maximum(squared", "loss = masked_mean(torch.maximum(squared"),
    (FN, "the smaller value error", "torch.maximum(squared, squared_clipped)", "torch.minimum(squared, squared_clipped)"),
    (FN, "values clipped around the returns", "torch.clamp(values, old_values - clip, old_values + clip)", "torch.clamp(values, returns - clip, returns + clip)"),
    (FN, "returns not detached", "clean(returns.float().detach(), mask)", "clean(returns.float(), mask)"),
    (FN, "SFT loss with the wrong sign", "return -logprobs.sum()", "return logprobs.sum()"),
    (FN, "SFT loss is a mean of this micro-batch", "(max(len(logprobs), 1) if count is None else count)", "max(len(logprobs), 1)"),
    (RM, "ties count as pairs", "if ranks[i] < ranks[j] and", "if ranks[i] <= ranks[j] and i != j and"),
    (RM, "the worse answer preferred", "if ranks[i] < ranks[j] and", "if ranks[i] > ranks[j] and"),
    (RM, "only neighbours in rank compared", "if ranks[i] < ranks[j] and", "if ranks[i] + 1 == ranks[j] and"),
    (RM, "answers that were cut to the same tokens are compared", " and rows[i] != rows[j]]", "]"),
    ("data/limits.py", "a conversation is cut within an answer", "end = max(fits, default=0)", "end = self.max_length"),
    (TEMPLATE, "the template's end of turn ends nothing", '"chat template": template.end}', '"chat template": None}'),
    (TEMPLATE, "a template without a generation prompt gets none", "if asked and asked == opened and", "if False and"),
    (TEMPLATE, "the day of a template is not frozen", "    if date is None:\n        return source", "    if True:\n        return source"),
    ("models/tokenizer_files.py", "the ends of answers are not written out", "    if not ids:\n        return\n", "    return\n"),
    ("models/tokenizer_files.py", "generation_config.json is not asked for ends", "for name in ENDS_FILES:", "for name in ENDS_FILES[:1]:"),
    ("data/pieces.py", "each answer begins with a space of its own", 'for context in (behind[start:], "\\n"):', "for context in ():"),
    ("data/pieces.py", "a quoted token opens or ends a turn", "if token in self.words.values() and next(quoted, False):", "if False:"),
    ("data/chat.py", "a cut answer is closed by its template", "        if ended:\n            return ids\n", "        return ids\n"),
    ("algorithms/reward_source.py", "a reward model reads the ids of another tokenizer", "if record.prompt_ids is not None:\n", "if False:\n"),
    ("data/chat.py", "--system is ignored", "if self.flags.system is not None and messages[0]", "if False and messages[0]"),
    ("data/chat.py", "tool calls that the template does not write vanish", "        if missing:\n", "        if False:\n"),
    ("data/chat.py", "of a conversation that the template rewrites only the last answer is learned", 'if self.flags.train_on == "all" or i == answers[-1]]', "if i == answers[-1]]"),
    ("data/chat.py", "an answer that the template shortens is read in silence", "        if words in shown:\n", "        if True:\n"),
    ("data/jsonl.py", "the last of two fields of one name wins", "if len(value) < len(pairs):", "if False:"),
    ("data/tables.py", "JSON columns of Arrow stay text", "if isinstance(kind, pyarrow.JsonType):", "if False:"),
    ("data/tables.py", "a row of CSV is named by the line above it", "number = blank + reader.line_num + 1", "number = blank + reader.line_num"),
    ("data/formats.py", "a weight draws other records in each run", "draw = random.Random(0).random", "draw = random.random"),
    ("data/field_checks.py", "an empty cell is an empty text", "{name: cell or None for name, cell in item.items()}", "dict(item)"),
    ("data/formats.py", "a disliked answer is learned", 'if kind == "demonstrations" and item.get("label") in (0, False):', "if False:"),
    ("data/formats.py", "ignored fields are not counted", "lines.ignored.update(ignored)", "lines.ignored.update([])"),
    ("data/records.py", "the system message beside a prompt is dropped", 'return [{"role": "system", "content": system}, *messages]', "return messages"),
    ("data/field_checks.py", "a turn of weight 0 is learned", 'return role != "assistant" or all(wanted.values())', "return True"),
    ("data/field_checks.py", "a tool call's arguments stay JSON text", 'arguments = decoded(function.get("arguments") or {}, f"{name}.arguments")', 'arguments = {"arguments": function.get("arguments")}'),
    ("algorithms/setup.py", "records that do not fit are left out in silence", "    if long:\n", "    if False:\n"),
    ("commands/data.py", "data check keeps no room for PPO's answers", 'config.max_new_tokens if kind == "prompts" else 1', "1"),
    (FN, "sum over a prompt's pairs", "F.logsigmoid(gaps - margin).mean()", "F.logsigmoid(gaps - margin).sum()"),
    (FN, "margin with the wrong sign", "F.logsigmoid(gaps - margin)", "F.logsigmoid(gaps + margin)"),
    (FN, "log of a sigmoid that underflows", "-F.logsigmoid(gaps - margin).mean()", "-torch.sigmoid(gaps - margin).log().mean()"),
    (FN, "first update at learning rate 0", "return (step + 1) / warmup", "return step / warmup"),
    # PPO's own lines
    (EXPERIENCE, "old log-probs taken from the reference", "        logprobs=logprobs,\n", "        logprobs=reference,\n"),
    (EXPERIENCE, "reference scored by the actor", "works[\"reference\"] = roles.reference, batches", "works[\"reference\"] = roles.actor, batches"),
    (EXPERIENCE, "reference at temperature 1", "logprobs_of(model, hidden, rows, temperature, entropy=False)", "logprobs_of(model, hidden, rows, 1.0, entropy=False)"),
    (PPO, "training at temperature 1", "logprobs_of(actor, hidden, part, flags.temperature)", "logprobs_of(actor, hidden, part, 1.0)"),
    (EXPERIENCE, "value of the token itself", "fn.response_states(hidden, rows.prompt_lengths, rows.lengths, rows.computed)", "hidden[fn.response_mask(rows.prompt_lengths, rows.lengths, rows.tokens.shape[1])]"),
    (PPO, "rewards whitened with their mean shifted", "fn.whiten(rewards, experience.mask, shift_mean=False)", "fn.whiten(rewards, experience.mask)"),
    (PPO, "advantages not whitened", "advantages=fn.whiten(advantages, experience.mask)", "advantages=advantages"),
    (PPO, "returns from whitened advantages", "returns=returns)", "returns=fn.whiten(advantages, experience.mask) + experience.values)"),
    (EXPERIENCE, "missing-EOS score clipped too", "    if flags.missing_eos_score is not None:\n        return fn.replace_missing_eos(scores, ended, flags.missing_eos_score)", "    if flags.missing_eos_score is not None:\n        return fn.replace_missing_eos(scores, ended, max(flags.missing_eos_score, -(flags.reward_clip or 9e9)))"),
    (EXPERIENCE, "raw scores used, not the scaled ones", "scores, ended = experience.scaled_scores, experience.ended", "scores, ended = experience.scores, experience.ended"),
    (PPO, "scale of each batch, not of all scores", "scaled_scores=scale.normalise(experience.scores)", "scaled_scores=fn.whiten(experience.scores, experience.ended)"),
    (PPO, "scale forgotten by a resume", 'fn.Moments(**saved["scale"]) if saved.get("scale") else None', 'fn.Moments() if saved.get("scale") else None'),
    (PPO, "critic predicts raw scores for a scaled reward", "model.mean, model.std = model.mean + model.std * mean, model.std * std", "model.mean, model.std = model.mean, model.std"),
    (FN, "moments of batches without the distance of their means", ".square().sum()) + between", ".square().sum())"),
    (FN, "warm-up ended by one lucky batch", "enough = self.explained > EXPLAINED", "enough = explained > 0"),
    (FN, "warm-up without an end", "self.over = enough or self.held >= self.limit", "self.over = enough"),
    (FN, "cut answers below the mean of the ended, not below the worst", "worst = scores[has_eos].min() if", "worst = scores[has_eos].mean() if"),
    (PPO, "KL penalty alone moves the policy", "return not self.warm_up.over or not fn.has_spread(used_scores(experience, flags))", "return not self.warm_up.over"),
    (METRICS, "RLHF reward of unclipped scores", '"objective/rlhf_reward": float(used.mean())', '"objective/rlhf_reward": float(experience.scores.mean())'),
    (PPO, "gamma and lambda swapped", "flags.gamma, flags.lam)", "flags.lam, flags.gamma)"),
    (PPO, "advantages in the place of returns", "fn.value_loss(values, part.values, part.returns,", "fn.value_loss(values, part.values, part.advantages,"),
    (PPO, "values clipped around themselves", "fn.value_loss(values, part.values,", "fn.value_loss(values, values.detach(),"),
    (PPO, "ratio against the reference", "fn.policy_loss(logprobs, part.logprobs,", "fn.policy_loss(logprobs, part.ref_logprobs,"),
    (PPO, "ptx coefficient forgotten", "return flags.ptx_coef * loss,", "return loss,"),
    (POLICY, "every epoch in the same order", "(step << 16) + epoch", "step << 16"),
    (EXPERIENCE, "trimmed rows lose their last token", "[:, :responses] for name", "[:, :max(responses - 1, 1)] for name"),
    (METRICS, "KL of the batch, not per sequence", "experience.mask).sum()) / len(experience.tokens)", "experience.mask).sum())"),
    (EXPERIENCE, "an answer cut short counts as ended", 'answer.finish_reason == "stop" for answer', 'answer.finish_reason != "" for answer'),
    # what stands around
    (SFT, "prompts are trained on", "[int(flag) for flag in example.trained]", "[int(i > 0) for i in range(len(example.trained))]"),
    (RM, "loss over responses instead of prompts", 'return loss / count, {"correct"', 'return loss / len(scores), {"correct"'),
    (RM, "a prompt's scores shifted by one answer", "ranking_scores = scores[start : start + len(ranking.rows)]", "ranking_scores = scores.roll(1)[start : start + len(ranking.rows)]"),
    (RM, "held-out accuracy counts every pair", "for i, j in ranking.pairs:", "for i, j in [(i, j) for j in range(len(values)) for i in range(j)]:"),
    ("algorithms/heldout.py", "split by row, not by prompt", "split_by_prompt(keys,", "split_by_prompt([*map(str, range(len(keys)))],"),
    (RM, "normalised on the training scale", "model.mean, model.std = 0.0, 1.0\n", "model.mean, model.std = 1.0, 3.0\n"),
    (ROLES, "mean added instead of subtracted", "[:, 0] - self.mean) / self.std", "[:, 0] + self.mean) / self.std"),
    (LINEAR, "embedding's gradient overwrites what is there", "sums.index_add_(0,", "sums.index_copy_(0,"),
    (STREAM, "only the last micro-batch counts", "            losses += yield from self._pass(batches, loss_of)\n", "            self.sink.clear()\n            losses += yield from self._pass(batches, loss_of)\n"),
    (STREAM, "slots keep old weights after an update", "        self._forget()  # first: a copy that fills a slot reads what an update writes\n", ""),
    ("memory/homes.py", "a chunk is fetched while it is updated", "reader.submit(home.update.wait)", "reader.submit(bool)"),
    (SINK, "gradients are written over those that an update still reads", "        home.reader.wait()\n        graded,", "        graded,"),
    (SINK, "an update asks the next step whether there are gradients", "(update.home, update.graded, move)", "(update.home, update.home.graded, move)"),
    (SINK, "a chunk of which a piece was not written counts as updated", "        write.result()\n", "        pass\n"),
    (SINK, "updates in the thread and beside it overwrite each other's gradients", "            with self._memory.passing:\n", "            if True:\n"),
    (SINK, "each update takes a stream of its own of torch's 32", "else self._memory.update_stream:", "else torch.Stream(device):"),
    ("planner/waits.py", "updates and weights pass a disk at the same time", "room = lap.idle if owed.on_disk else 1.0", "room = 1.0"),
    ("memory/program.py", "what a block read comes back where another block's was", "room[: x.nbytes].view(x.dtype)), room[x.nbytes :]", "room[: x.nbytes].view(x.dtype)), room"),
    ("memory/program.py", "what blocks read stays on the device as well", "        self.tensors = []\n", "        self.away = self.tensors\n        self.tensors = []\n"),
    (TIERS, "a chunk leaves for the device before its update has ended", "        wait()\n        source.tier.bytes_read += out.nbytes\n", "        source.tier.bytes_read += out.nbytes\n"),
    ("planner/traffic.py", "gathers ahead take no time", "fetched = max(link, disk) + ahead", "fetched = max(link, disk)"),
    (STREAM, "a block passes its own slope on", "            wave.state_grads[j] = x.grad\n", "            wave.state_grads[j] = wave.state_grads[j]\n"),
    (SINK, "a second visit forgets the first", "            unrounded(grads, home.grads)  # a", "            grads.zero_()  # a"),
    (SINK, "each piece of a disk update starts at the beginning", "gradients[start:stop], home", "gradients[: stop - start], home"),
    (SINK, "a loaded checkpoint leaves the old weights to the next update", "                home.shadow.write(weights[home.share])\n", "                pass\n"),
    (SINK, "each piece of gradients is the first", "self._gradients_at(grads[start:stop], home, tier)", "self._gradients_at(grads[: stop - start], home, tier)"),
    (TIERS, "a buffer is filled while it is copied", "                gone.synchronize()\n", "                pass\n"),
    (TIERS, "a refused pin's error waits for the next kernel", "        torch.ones(1, device=\"cuda\")\n", "        pass\n"),
    (TIERS, "a KV cache's pages are pinned anew", "if pages.numel() >= nbytes), None)", "if not pages.numel()), None)"),
    (TIERS, "pages are shared, so none is large", "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS", "flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS"),
    ("planner/traffic.py", "what a shadow sends up is not counted", "                moved[\"host_read\"] += weights\n", ""),
    ("algorithms/setup.py", "a GPU trains under ddp by default", "(AUTO if accelerated else \"ddp\")", "\"ddp\""),
    (PLAN, "gradients of waves add up in bf16", "add_up=not recomputes(not resident(row, world), recompute)", "add_up=False"),
    ("memory/homes.py", "autograd rounds each gradient before it is added", "        parameter.grad_dtype = SUMS", "        pass"),
    (SINK, "weight decay falls on norms and biases", "in home.chunk.decaying:", "in [slice(0, home.chunk.numel)]:"),
    (LINEAR, "LayerNorm's gradients are left to torch on a CPU", "return _LayerNorm.apply(x", "return F.layer_norm(x, shape"),
    (ADAM, "the high half is cut off, not rounded", "torch.add(bits, 0x8000, out=high)", "torch.add(bits, 0, out=high)"),
    (ADAM, "the remainder is forgotten", "bits.copy_(remainder).add_(", "bits.zero_().add_("),
    ("memory/schedule.py", "what is needed soonest makes room", "(next_use(slot.key), -slot.age) > latest)", "(next_use(slot.key), -slot.age) < latest)"),
    ("memory/schedule.py", "experts that may be chosen are prefetched", "in enumerate(visits):\n        for group in groups:", "in enumerate(visits):\n        for group in groups[:1]:"),
    (PLAN, "experts are waited for however many are chosen", "if chosen < max(ahead, tokens * (fixed + called)):", "if True:"),
    (STREAM, "many tokens wait for their experts, and few do not", "tokens <= self._few_tokens", "tokens > self._few_tokens"),
    ("models/pretrained.py", "files stay open however much was read", "if self._keeps and self._mapped < MAPPED else None", "if self._keeps else None"),
    (PLAN, "auto gives the device's room twice", "                self.give(placement.tier, -needed)\n", ""),
    (PASSES, "the inputs of blocks are not counted", "inputs(i, 2) + states[i]), work.parts[i].backward", "states[i]), work.parts[i].backward"),
    (SHAPES, "relu's result is counted once", "inner * (2 if c.activation == \"relu\" else 1)", "inner"),
    (STREAM, "statistics keep their graph", "{key: value.detach() for key, value in stats.items()}", "stats"),
    (FN, "a copy's choices weigh what the actor's would under the copy", "return log_ratio(logprobs, sampling_logprobs).detach()", "return log_ratio(sampling_logprobs, logprobs).detach()"),
    (GRPO, "a copy's answers have no weight in the loss", "advantages = weighted(part.advantages, part, flags)", "advantages = part.advantages"),
    ("planner/activations.py", "a copy that answers takes no memory", "each.cache_bytes + each.copy_bytes + each.teacher_bytes", "each.cache_bytes + each.teacher_bytes"),
    (PLAN, "a lease for a rollout takes more than there are slots", "return len(sizes) <= len(rooms) and all(", "return True or all("),
    (STRATEGY, "a lease outlives its rollout", "                stream.end_lease()\n", "                stream.leasing = False\n"),
    (ENGINE, "a new lease's steps are those recorded under the old one", "if self._steps is None or self._steps[0] != leased:", "if self._steps is None:"),
    ("memory/arena.py", "weights of another visit are used", "        if slot.bound_for != (self, home):\n", "        if slot.bound_for is None:\n"),
    (STRATEGY, "gradients never cleared", "            sink.clear()\n", ""),
    (STRATEGY, "gradients scaled up to the norm", "max_grad_norm / (norm + 1e-6), max=1.0)", "max_grad_norm / (norm + 1e-6), min=1.0)"),
    (STRATEGY, "a NaN loss is stepped on", "        if finite:\n", "        if True:\n"),
    (SAMPLING, "log-prob at temperature 1", "return tokens, logprobs.gather", "return tokens, torch.log_softmax(logits * (sampling.temperature or 1.0), -1).gather"),
    (SAMPLING, "every episode has the same stream", "manual_seed(_mix(_mix(seed) ^ episode))", "manual_seed(_mix(seed))"),
    (SAMPLING, "log-prob of the truncated distribution", "logprobs = torch.log_softmax(logits, dim=-1)\n    if", "logprobs = _truncate(torch.log_softmax(logits, dim=-1), sampling).log_softmax(-1)\n    if"),
    (ENGINE, "EOS is left out of the answer", "        answer.response_ids.append(token)\n", "        answer.response_ids += [token] * (token not in self.eos_ids)\n"),
    (ENGINE, "answers go on after EOS", "if token in run.ends or (", "if ("),
    # adapters and fewer bits
    ("kernels/rms_norm.py", "an RMSNorm's gradient takes its scale for a constant", "return back.mul_(scale).sub_(wide * along).to(x.dtype), slopes", "return back.mul_(scale).to(x.dtype), slopes"),
    ("models/lora.py", "an adapter's scale is forgotten", "return linear(low.mul_(self.scale), self.b)", "return linear(low, self.b)"),
    (RECIPE, "both halves of an adapter start random", "if name.endswith(\".b\"):", "if False:"),
    ("models/surgery.py", "the base learns beside its adapter", "    decoder.requires_grad_(False)\n", ""),
    (QUANTISED, "nf4's two numbers of a byte change places", "(levels.repeat_interleave(16), levels.repeat(16))", "(levels.repeat(16), levels.repeat_interleave(16))"),
    (ADAM, "a first moment's sign is lost", "codes += (blocks < 0)", "codes += 0 * (blocks < 0)"),
    (PPO, "the value loss is not weighed on a shared trunk", "policy + flags.vf_coef * value", "policy + value"),
    ("distributed/shared_memory.py", "this rank's part is added twice", "total.add_(box[self._rank])", "total.add_(boxes[self._rank][self._rank])"),
    ("distributed/shared_memory.py", "a mailbox has one half", "self._half = 1 - self._half", "self._half = 0"),
    ("distributed/shared_memory.py", "nobody waits for the others", "        dist.all_reduce(self._token)", "        pass"),
    ("kernels/products.c", "a tail of pairs is left out", "    if (k < in)\n        pair_step", "    if (k > in)\n        pair_step"),
    (LINEAR, "logits of a frozen head are rounded", "    return arithmetic_of(device_type) != \"narrow\"", "    return False"),
    # what files say
    ("models/adapter_files.py", "PiSSA reads as any adapter", '"gaussian", "orthogonal", "eva")', '"gaussian", "orthogonal", "eva", "pissa")'),
    ("models/lora_targets.py", "an adapter of another rank is scaled by the first", "(math.sqrt(rank) if self.rslora else rank)", "(math.sqrt(self.rank) if self.rslora else self.rank)"),
    ("models/pretrained.py", "a head of its own is dropped where config.json ties it", " or self._own_head(weights))", ")"),
    ("models/families/qwen.py", "no layer has a window unless the file says which", "else hf[\"max_window_layers\"]", "else config.num_layers"),
    ("models/families/settings.py", "a name wins over its alias", "    return hf | {name: hf[alias] for alias, name in aliases.items() if alias in hf}", "    return {name: hf[alias] for alias, name in aliases.items() if alias in hf} | hf"),
    ("models/positions.py", "yarn leaves the scores' temperature as it is", "        cos, sin = cos * factor, sin * factor", "        pass"),
    ("models/positions.py", "yarn's ramp is rounded where the file says not to", 'if numbers.get("truncate", True):', "if True:"),
    ("models/families/rope.py", "rows of a longrope model are as long as config.json says", 'return {**values, "max_length": longest, "declared_length": length}', "return values"),
    ("models/families/olmo.py", "OLMo 3 turns all layers alike", "window_rope=window_rope(narrow, config))", "window_rope=())"),
    ("models/families/mistral.py", "Ministral 3's queries do not grow", 'beta = settings.pop("llama_4_scaling_beta", None)', 'beta = settings.pop("llama_4_scaling_beta", None) and None'),
    ("models/formats/bitsandbytes.py", "scales of scales lose their offset", ' + state["nested_offset"]', ""),
    ("models/formats/gguf_writer.py", "llama.cpp scales an rsLoRA by alpha / rank", "b * (adapter.scale * adapter.rank / alpha)", "b"),
    ("models/adapter_files.py", "parts that see are adapted too", "if decoder.config.part_of else ends", "if False else ends"),
    ("models/foreign/anatomy.py", "layers that hand each other more than states are refused at their first forward", "    if any(others[i] is not None for i in anatomy.handed if i < len(others)):", "    if False:"),
    ("models/formats/gguf_file.py", "experts in another number than the file says are read", "file.shape(self.names[0])[0] == config.num_experts", "True"),
    ("models/formats/gguf_writer.py", "a router is rounded to f16", r"|blk\.\d+\.ffn_gate_inp\.weight", ""),
    ("models/formats/architectures.py", "gpt-oss comes back with a ramp of whole dimensions", '{"truncate": False} if', '{"truncate": True} if'),
    ("models/formats/gguf_file.py", "Gemma's norms stay 1 larger than Hugging Face's", "return tensor - architecture.norm_shift", "return tensor"),
    ("models/weight_files.py", "a link out of a model's directory is read", "if path.is_symlink() and not path.resolve().is_relative_to(home):", "if False:"),
    ("models/pretrained.py", "NaN weights are read", "                damaged.append(stored)", "                pass"),
    (HEAD, "states are not narrowed for the head's gradient", "x[rows].to(narrowed.dtype)", "x[rows]"),
    # health
    ("algorithms/policy_metrics.py", "a cut answer is evaluated as the worst that ended, however bad it is",
     "= torch.minimum(scores, fn.below_ended(scores, ended, 0.0))", "= fn.below_ended(scores, ended, 0.0)"),
    (HEALTH, "missing EOS is no warning until all answers lack it", "if rate <= 0.3 or", "if rate < 1.0 or"),
    ("run/session.py", "a warning is said at every step", "if name not in self._warnings:", "if True:"),
    # length and evaluation
    ("config.py", "an adapter learns at a whole model's rate", "if adapts else config.LR", "if False else config.LR"),
    ("config.py", "PPO moves a tenth of what published runs do", "epochs=4, steps=500, adam_epsilon=1e-5)", "epochs=4, steps=50, adam_epsilon=1e-5)"),
    ("data/batching.py", "held-out rows have no limit", "if filled <= most}", "if True}"),
    (RM, "a longer run learns in the scale of the finished one", "            if start == total:  # else", "            if True:  # else"),
    ("algorithms/heldout.py", "rows of --eval-data are held out of --data too", "return (records, rows), (other, other_rows)", "return (records[1:], rows[1:]), (other, other_rows)"),
    (POLICY, "held-out answers are drawn from training's streams", "policy.seed ^ HELDOUT_STREAMS", "policy.seed + step"),
    (PPO, "KL's term of the loss is not weighed", "loss + flags.kl_loss_coef * kl", "loss + kl"),
    (INPUTS, "the reference is loaded at --kl-coef 0", 'if config.rollout.kl_coef or getattr(config.rollout, "kl_loss_coef", 0.0):', "if True:"),
    ("algorithms/reward_source.py", "a template that differs makes a zero critic", "room and model_encoder.same_ids(encoder)", "room and self.reads_actor_tokens"),
    ("algorithms/reward_source.py", "prompts that the reward model cannot hold are kept", "bad = [text for text in problems if text]", "bad: list[str] = []"),
    # rewards
    (ROLES, "the bias of a foreign reward model counts the wrong way", 'mean -= float(extras.get("score.bias", 0.0))', 'mean += float(extras.get("score.bias", 0.0))'),
    (REWARD_FUNCTIONS, "a record's field replaces the step", "columns.setdefault(name, [sample.fields.get(name) for sample in samples])", "columns[name] = [sample.fields.get(name) for sample in samples]"),
    (REWARD_FUNCTIONS, "a worker's own index names the record", "else i + reply.index * len(self.connections)", "else reply.index"),
    (REWARD_FUNCTIONS, "scores come back in the order of the processes", "scores[i::count] = self._receive(i)", "scores[i * len(samples) // count :] = self._receive(i)"),
    ("algorithms/reward_source.py", "a part of 0 does not count as a score", "strict=True) if part is not None]", "strict=True) if part]"),
    ("algorithms/reward_source.py", "parts are measured with those that do not apply", "scores = column[~column.isnan()]", "scores = column.nan_to_num()"),
    ("algorithms/reward_source.py", "a null in a record is an answer", "if need and record.fields.get(name) is None:", "if need and name not in record.fields:"),
    ("algorithms/verifiers.py", "the minus of 5-3 is a sign", r"(?:(?<!\))[-+])?\$?", r"[-+]?\$?"),
    ("data/formats.py", "--keys does not name fields for reward functions", "record = replace(record, fields=item)", "record = replace(record, fields=value)"),
    (RM, "a spread is taken from any number of answers", "if count >= FEWEST:", "if count > 0:"),
    ("models/tokenizer_files.py", "an end of answers pads", "if token is not None and token not in ends)", "if token is not None)"),
    # preference learning
    (PAIRS, "the reference is forgotten", "ratios = logprobs - of_answers(", "ratios = logprobs - 0 * of_answers("),
    (PAIRS, "a prompt weighs as much as it has pairs", "[1 / len(pairs)] * len(pairs)", "[1.0] * len(pairs)"),
    (PAIRS, "pairs are averaged over the micro-batch", "* weights).sum() / counts.prompts", "* weights).sum() / len(rankings)"),
    (PAIRS, "likelihood over the micro-batch's tokens", ".sum() / counts.best_tokens", ".sum() / (lengths * best).sum()"),
    (PAIRS, "IPO's target without its factor", "- 1 / (2 * flags.beta)", "- 1 / flags.beta"),
    (PAIRS, "likelihood of all answers and not of the best", "n if rank == best else 0 for n", "n for n"),
    ("algorithms/preference.py", "all ranks give the same answers", "(i * world.size + world.rank) * group for", "i * group for"),
    ("algorithms/preference.py", "an answer that did not end keeps its score", "with_ends(raw.flatten(), ended.flatten(), flags).view_as(raw)", "raw"),
    (RM, "the lowest score is the best answer", "sorted(set(scores), reverse=True)", "sorted(set(scores))"),
    (REFERENCE, "the reference's values go to other answers", "        share.sort(key=lambda pair: longest_row(pair[1]))", "        pass"),
    (REFERENCE, "a stored reference fits any data", "    parts += [[ranking.rows, ranking.response_lengths] for ranking in rankings]\n", ""),
    (REFERENCE, "the prompt's last token is an answer's", "fn.response_mask(batch.lengths - lengths, lengths,", "fn.response_mask(batch.lengths - lengths - 1, lengths + 1,"),
    (FN, "wsd falls from its middle", "min(left / 0.2, 1.0)", "min(left / 0.5, 1.0)"),
    # votes
    (KTO, "disliked answers are drawn nearer", "torch.where(liked, kl - log_ratios, log_ratios - kl)", "torch.where(liked, kl - log_ratios, kl - log_ratios)"),
    (KTO, "each prompt is paired with its own answer", "[*votes[-1:], *votes[:-1]]", "votes"),
    (KTO, "z0 may be below 0", "max(float(world.sum(kl)) / len(votes), 0.0)", "float(world.sum(kl)) / len(votes)"),
    (KTO, "z0 is a rank's own", "float(world.sum(kl)) / len(votes)", "float(kl) / max(len(share), 1)"),
    (KTO, "votes stand beside other rows where they are sorted", "share = sorted(world.share_of(list(votes)), key=lambda vote: len(vote.tokens))", "share = world.share_of(list(votes))"),
    (KTO, "liked and disliked weights are swapped", "torch.where(rows.liked, flags.desirable_weight, flags.undesirable_weight)", "torch.where(rows.liked, flags.undesirable_weight, flags.desirable_weight)"),
    (KTO, "the loss is a mean over the micro-batch", "kl, flags.beta)).sum() / count", "kl, flags.beta)).mean()"),
    ("data/records.py", "a label of 1 is a vote", "if not isinstance(label, bool):", "if label not in (0, 1):"),
    ("planner/workload.py", "the plan forgets that the reference reads mismatched pairs", "count=2 * answers.count, flops=2 * answers.flops", "count=answers.count, flops=answers.flops"),
    # groups
    (ADV, "leave-one-out divides by the whole group", "/ (size - 1)", "/ size"),
    (ADV, "an answer's own reward is in its baseline", "(rewards.sum(dim=1, keepdim=True) - rewards)", "rewards.sum(dim=1, keepdim=True)"),
    (ADV, "groups are answers of different prompts", "rewards.float().view(-1, group)).view(-1, 1)", "rewards.float().view(group, -1).t()).t().reshape(-1, 1)"),
    (ADV, "Dr. GRPO divides by the deviation", '"dr_grpo": less_group_mean', '"dr_grpo": over_group_std'),
    (ADV, "a token answers for the KL before it", "penalties.flip(1).cumsum(1).flip(1)", "penalties.cumsum(1)"),
    (ADV, "KL is rewarded", "rewards.float() - penalties.sum(dim=1)", "rewards.float() + penalties.sum(dim=1)"),
    (ADV, "the length is punished from the first token", "(lengths - (limit - buffer)) / buffer", "lengths / limit"),
    (GRPO, "the upper clip is the lower one", "flags.clip if flags.clip_high is None else flags.clip_high", "flags.clip"),
    (FN, "GSPO takes the sum of log ratios", "log_ratios.sum(dim=1) / mask.sum(dim=1)", "log_ratios.sum(dim=1)"),
    (FN, "CISPO's weights are not detached", "ratios.detach().clamp(1 - low, 1 + high)", "ratios.clamp(1 - low, 1 + high)"),
    (FN, "a sequence mean forgets the answer's length", '"sequence": rows * lengths}', '"sequence": rows * lengths.float().mean().expand_as(lengths)}'),
    (GRPO, "the policy is its own constant", "part.logprobs if reread else logprobs.detach()", "part.logprobs if reread else logprobs"),
    (GRPO, "KL's term of GRPO's loss is not weighed", "loss + flags.kl_coef * stats", "loss + stats"),
    (GRPO, "k3 in the loss has the gradient of the reverse KL", 'if flags.kl_estimator == "k3":', "if False:"),
    (GRPO, "resampling keeps the groups that teach nothing", "i if teaches[i] or not spare else", "i if not teaches[i] or not spare else"),
    (GRPO, "all ranks draw the same random streams", "(i * world.size + world.rank) * group for", "i * group for"),
    (GRPO, "Dr. GRPO's mean is over tokens", '"constant" if flags.advantage == "dr_grpo" else "token"', '"token"'),
    ("algorithms/experience.py", "groups of ranks are mixed up", "(row // group * ranks + rank) * group + row % group", "row * ranks + rank"),
    (HEAD, "the chosen tokens count among the others", "if others:\n                    logits.scatter_add_(1, column, inside.float() * NEVER)\n                higher", "higher"),
    (HEAD, "gradient of the others without their own rise", "fallen[:, -1] - grad[:, -1], (grad", "fallen[:, -1], (grad"),
    (HEAD, "what is no longer among the likeliest is forgotten", "values.scatter_(1, kept, NEVER)", "values.fill_(NEVER)"),
    (DISTILL, "JSD's beta the wrong way round", "teacher + math.log(beta), student + math.log1p(-beta)", "student + math.log(beta), teacher + math.log1p(-beta)"),
    (DISTILL, "forward KL is reverse", "kl(student, teacher) if beta else kl(teacher, student)", "kl(teacher, student) if beta else kl(student, teacher)"),
    (DISTILL, "samples are learned by heart too", "if not (given and flags.sft_coef):", "if not flags.sft_coef:"),
    (DISTILL, "held-out samples are those of training", "seed=self.seed ^ HELDOUT_STREAMS) if", "seed=self.seed) if"),
    (TEACHER, "the teacher has no temperature", "top_logprobs(states, k, temperature, vocabulary", "top_logprobs(states, k, vocabulary"),
    (TEACHER, "the store is read from its pieces' first rows", "self._starts[number] - first, self._starts[number + 1] - first", "0, self._starts[number + 1] - self._starts[number]"),
    (TEACHER, "the teacher may choose tokens that the student has not", "temperature, vocabulary=vocabulary)", "temperature)"),
    # soft caps, ropes by kind of layer, text models of multimodal checkpoints
    (HEAD, "the slope of a soft cap is left out", "slope.addcmul_(slope, level, value=-1.0)", "pass"),
    ("kernels/capped_attention.py", "the slope of capped scores is left out", "back.sub_(bent.square_().mul_(back)).mul_(scale)", "back.mul_(scale)"),
    ("kernels/activations.c", "a gate that is its own neighbour", "gate = row * 2 * width, up = gate + width", "gate = row * width, up = gate + width"),
    ("kernels/activations.c", "heads turn the other way", "kept(a * cos, kind) - kept(b * sin, kind)", "kept(a * cos, kind) + kept(b * sin, kind)"),
    ("kernels/decode.c", "a sink that has no weight", "weight = a->sinks ? 1 : 0", "weight = 0"),
    ("kernels/decode.c", "capped scores are those of the series near 0 alone", "square < 0.09f", "square < 9.0f"),
    (POSITIONS, "layers with a window turn as the others", "narrow = window > 0 and c.window_rope != ()", "narrow = False"),
    ("models/families/smollm3.py", "the first layer of four does not turn", "(i + 1) % every != 0", "i % every != 0"),
    ("models/families/multimodal.py", "old names of text weights are not known", r'r"language_model\.(?P<a>lm_head\..*|model\..*)|', r'r"language_modle\.(?P<a>lm_head\..*|model\..*)|'),
    (FOREIGN, "every layer is called as the first one", "args, kwargs = context.layers[i]", "args, kwargs = context.layers[0]"),
    (FOREIGN, "what goes beside the states has no gradient", "context.join([y, *pieces[1:]])", "context.join([y, *(x.detach() for x in pieces[1:])])"),
    (FOREIGN, "the bias of a head is not trained", "products.append((torch.ones_like(states[..., :1]), self.head_bias[:, None]))", "pass"),
    (MEASURING, "what autograd keeps of theirs is its output", 'saved = meter.used["device"] - before', "saved = output"),
    (MEASURING, "the cache of a layer like another is not counted", "again += kinds[kind][1]", "again += 0"),
    (MEASURING, "a long row of a scan holds half as much more", "2 * longest / LONG - 2", "longest / LONG - 1"),
    ("models/foreign/family.py", "a factor of the logits is forgotten", "1 / factor} if factor != 1 else {}", "1.0} if factor != 1 else {}"),
    # PyTorch's FSDP2
    ("memory/fsdp.py", "gradients are divided by the ranks", "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)"),
    ("memory/fsdp.py", "FSDP2 shards a head that no group has", "for name, weight in model.named_parameters() if name not in used}", "for name, weight in model.named_parameters() if not name}"),
    ("memory/fsdp.py", "copies of a shard count in the norm", ".to(squares.device) / shard.copies(self.world)", ".to(squares.device)"),
    ("memory/fsdp.py", "a shard's rows are rounded down", "math.ceil(len(whole) / self.mesh.size(dimension))", "len(whole) // self.mesh.size(dimension)"),
    ("memory/placement.py", "FSDP2 is given weights that are packed", "packed and \"FSDP2", "False and \"FSDP2"),
    ("planner/sharded.py", "all weights are gathered for every batch of a rollout", "weights if once else", "each.times * weights if once else"),
    ("planner/cuda.py", "every rest is counted, also those that are cut off", "nbytes >= LARGE and rest <= REST", "nbytes >= LARGE"),
    ("planner/forecast.py", "gradients that ranks sum are not counted", "    return max(fullest, settling)", "    return fullest"),
    (STRATEGY, "each rank of a machine may have all of its memory", "available_ram() // world.local_size", "available_ram()"),
    ("memory/homes.py", "a checkpoint gathers a whole chunk on the device", "plan.GATHER_BYTES // (world.size * part.itemsize)", "len(part)"),
    (SHAPES, "sorted logits have no places", "(FP32 + INDEX) + 2 * FP32", "FP32 + 2 * FP32"),
    ("planner/sharded.py", "gradients of the root are not counted", "max(root + gradients[ROOT] + 2 * widest", "max(root + 2 * widest"),
    ("run/optimizer_files.py", "a checkpoint is written from states that training goes on to change", "staging.stage(shards)", "shards"),
    ("run/shares.py", "a share begins where its weight does", "at = offset + start - home.share.start", "at = offset + start"),
    ("run/optimizer_files.py", "a disk that is full on another rank ends with a traceback", "raise next(iter(error.failures.values()))[0] from error", "raise"),
    ("models/foreign/anatomy.py", "layers that only record are gathered", 'module.__dict__["forward"] = module.__dict__["_compiled_call_impl"] = function', 'module.__dict__["forward"] = function'),
    ("rollout/in_step.py", "rows that go on get the cache of others", "reorder_cache(torch.tensor(rows,", "reorder_cache(torch.arange(len(rows),"),
    # several ranks, and devices that are not the CPU
    (DECODER, "a rank without rows returns states on the CPU", "dtype=self.dtype, device=self.device)", "dtype=self.dtype)"),
    ("distributed/world.py", "a second attempt reads the keys of the first",
     "dist.PrefixStore(attempt(store, rank, size), store)", 'dist.PrefixStore("attempt", store)'),
    ("distributed/cores.py", "a rank that its launcher has bound shares its own cores again",
     "len(os.sched_getaffinity(os.getppid()) | own)", "len(own)"),
    # loggers, and the page that is served
    ("run/loggers.py", "a step that a logger has is sent to it again",
     "if step not in logger.steps:\n                self._attempt(name, logger.log",
     "if True:\n                self._attempt(name, logger.log"),
    ("run/loggers.py", "a logger that cannot be reached ends the run", "except Exception as error:", "except KeyError as error:"),
    ("run/loggers.py", "samples come before the numbers of their step", "in rows if step <= last else", "in rows if step <= last + 1 else"),
    ("run/loggers.py", "a logger draws from the run's random numbers", "set_rng_state(generators)", "del generators"),
    ("run/report.py", "one run's curve takes the place of another's", "if line == \"held-out\" else name] = curve",
     "if line == \"held-out\" else line] = curve"),
    ("commands/watch.py", "any name that leads to this machine gets the page", "allowed_hosts=HOSTS", "allowed_hosts=[\"*\"]"),
    ("run/session.py", "a second SIGTERM costs the checkpoint",
     "if self._signal and signum == signal.SIGINT:", "if self._signal:"),
    (ADAM, "gradients are not clipped on Apple's GPU",
     'divides = weights.device.type in ("cpu", "cuda")', "divides = True"),
    (SINK, "the norm is in fp64 on a device that has none",
     "dtype=torch.float64, device=self.world.exact)", "dtype=torch.float64, device=self.world.device)"),
    # what C is given, where it lies in the cache, and how GPUs attend
    ("kernels/decode.c", "the slot behind the cache is written", "a->slots[row] >= a->room", "a->slots[row] > a->room"),
    ("kernels/adamw.c", "a NaN among 8-bit moments becomes a number", "size > most_m || size != size", "size > most_m"),
    ("kernels/compile.py", "code that the group can write is loaded", "facts.st_mode & 0o022", "facts.st_mode & 0o002"),
    (LINEAR, "on a GPU heads of a token change places", "return mixed.flatten(1, 2).unsqueeze(2)", "return mixed.transpose(1, 2).flatten(1, 2).unsqueeze(2)"),
    ("rollout/cuda_graphs.py", "all recorders capture on torch's one stream", "pool=self._pool, stream=self._stream,", "pool=self._pool,"),
    # evaluation
    ("commands/evaluate.py", "a judge's preference for what it reads first counts", "first + 1 - second", "first + first"),
    ("commands/evaluate.py", "a tie is a loss", "(numpy.sign(gaps) + 1) / 2", "(gaps > 0) * 1.0"),
    ("commands/evaluate.py", "the length is not controlled for", "-columns @ weights))\n        slope", "-columns[:, :1] @ weights[:1]))\n        slope"),
    # wheels
    ("kernels/prebuilt.py", "a wheel's code is taken that the processor cannot run", "if LEVELS[level][1] <= instructions and library.exists()", "if library.exists()"),
    # model cards
    ("run/model_card.py", "a card names paths of the machine", "return Path(text).name if Path(text).is_absolute() else text", "return text"),
    ("run/model_card.py", "a card tells of the last stage alone", "for run, config in reversed(line):", "for run, config in line[:1]:"),
    ("commands/export.py", "an export asks the hub when all is written", "push = Push(config) if config.push else None\n", "push = None\n"),
    ("models/weight_shapes.py", "the plan forgets the bias of a tied head", "*reads, *([\"head\"] if biased else [])", "*reads"),
]  # fmt: skip


def plant(copy: Path, file: str, right: str, wrong: str) -> None:
    """Writes the wrong line into the copy. Raises ValueError when the right one is not there exactly once."""
    path = copy / "src" / "penstock" / file
    text = path.read_text(encoding="utf-8")
    if text.count(right) != 1:
        raise ValueError(
            f"{file}: {right!r} is there {text.count(right)} times instead of once; mend benchmarks/planted_bugs.py"
        )
    path.write_text(text.replace(right, wrong), encoding="utf-8")


def files_in_order(file: str = "") -> list[str]:
    """Every file of tests: those of a source file first, then FIRST and the others of its folder, then FIRST."""
    tests = ROOT / "tests"
    mirror, first = tests / file, [tests / path for path in FIRST]
    paths = sorted(mirror.parent.glob(f"test_{mirror.stem}*.py")) if file else []
    paths += sorted(mirror.parent.parent.glob(f"test_{mirror.parent.name}*.py")) if file else []
    paths += [path for path in first if path.parent == mirror.parent]
    paths += sorted(mirror.parent.glob("test_*.py")) if file else []
    paths += first
    for directory in DIRECTORIES:
        paths += sorted((tests / directory).rglob("test_*.py"))
    return [str(path) for path in dict.fromkeys(path.relative_to(ROOT) for path in paths)]


def records() -> list[dict[str, Any]]:
    """What is known of each bug from the last time."""
    result = RESULTS / "planted_bugs.json"
    return json.loads(result.read_text(encoding="utf-8"))["bugs"] if result.exists() else []


def recorded_tests() -> dict[str, str]:
    """By bug, the test that caught it last time, where it is now: a test is found again by its name."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in files_in_order()}
    tests = {}
    for record in records():
        path, _, name = record["by"].partition("::")
        definition = "def " + re.split(r"\W", name)[0] + "("
        paths = [path, *texts]
        path = next((path for path in paths if definition in texts.get(path, "")), None)
        if path is not None:
            tests[record["bug"]] = f"{path}::{name}"
    return tests


def run_tests(copy: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output on a copy. In a fork: torch is imported once for all."""
    log = copy / "log.txt"
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)  # a planted bug may wait for ever
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy / "src"), str(copy)]
        os.environ["PYTHONPATH"] = str(copy / "src")  # of processes that tests start
        sys.dont_write_bytecode = True
        import pytest

        code = pytest.main([*tests, "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:timeout"])
        import penstock

        os._exit(int(code) if str(penstock.__file__).startswith(str(copy)) else 9)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, log.read_text(encoding="utf-8", errors="replace")


def verdict(copy: Path, file: str, recorded: str | None) -> dict[str, str]:
    """The first test that fails on the copy: {"by": test}, "" where all pass; with an "error" where they do not run."""
    for tests in ([recorded] if recorded else [], files_in_order(file)):
        code, text = run_tests(copy, tests) if tests else (0, "")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", text, flags=re.MULTILINE)
        if code == 1 and failed:
            return {"by": failed[0]}
        if code not in (0, 4, 5) or (code and len(tests) > 1):  # 4, 5: the recorded test is there no more
            return {"by": "", "error": f"the tests did not run (exit {code}): {text[-2000:]}"}
    return {"by": ""}


def judged(pristine: Path, recorded: dict[str, str], bug: Bug) -> dict[str, str]:
    """The verdict on a copy with the bug."""
    file, name, right, wrong = bug
    with tempfile.TemporaryDirectory() as directory:
        try:
            copy = shutil.copytree(pristine, Path(directory) / "copy")
            if file:
                plant(copy, file, right, wrong)
            return verdict(copy, file, recorded.get(name))
        except Exception:
            return {"by": "", "error": traceback.format_exc()}


def main(arguments: list[str]) -> int:
    """Returns 1 when a bug was missed, or a test fails without any."""
    parser = flags(__doc__)
    parser.add_argument("--only", default="", help="a word of the file or of the bug; writes no result")
    parser.add_argument("--new", action="store_true", help="bugs that have no record; the records of others stay")
    parser.add_argument("--jobs", type=int, default=1, help="bugs at a time")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # noqa: F401  (before the forks: seconds each)
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    began, verdicts = time.time(), {}
    known = {record["bug"]: record for record in records() if record["caught"]} if options.new else {}
    bugs = [bug for bug in BUGS if options.only in f"{bug[0]} {bug[1]}" and bug[1] not in known]
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:
        for tree in ("src", "tests", "benchmarks/results"):  # tests/planner reads measured machines there
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / tree, Path(directory) / tree, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", directory)
        for bug, result in zip(bugs, pool.map(partial(judged, Path(directory), recorded_tests()), bugs), strict=True):
            print(
                f"{'caught' if result['by'] else 'MISSED'} {bug[0]:28} {bug[1]}  {' '.join(result.values())}",
                flush=True,
            )
            verdicts[bug[1]] = {"file": bug[0], "bug": bug[1], "caught": bool(result["by"]), **result}
        tests = sorted({result["by"] for result in verdicts.values()} - {""})
        code, text = run_tests(Path(directory), tests) if tests else (0, "")
    control = "passed" if code == 0 else text[-2000:]
    print(f"the {len(tests)} tests that caught them, without any bug: {control}")
    caught = sum(record["caught"] for record in verdicts.values())
    print(f"{caught} of {len(verdicts)} planted bugs were caught, {time.time() - began:.0f} s")
    if not options.only:
        results = [record for bug in BUGS for record in (known | verdicts).values() if record["bug"] == bug[1]]
        summary = {"planted": len(results), "caught": sum(record["caught"] for record in results), "control": control}
        new = {"new": len(verdicts)} if options.new else {}
        write("planted_bugs", {**summary, **new, "seconds": time.time() - began, "bugs": results})
    return int(caught < len(verdicts) or code != 0)
