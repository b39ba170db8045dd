"""What `penstock distill` reads before it trains: student and teacher, which must read the same token ids, and rows."""

from dataclasses import dataclass, replace
from typing import Any

from penstock.algorithms.config import DistillConfig, DistillFlags
from penstock.algorithms.heldout import read_sides
from penstock.algorithms.setup import encoder_of, read_model, role_specs, setting_of
from penstock.algorithms.sft import prompt_of
from penstock.data.chat import Encoder, Example
from penstock.data.records import Kind
from penstock.errors import UserError
from penstock.memory.strategy import Strategy
from penstock.models.roles import Actor
from penstock.planner.workload import Workload, forecast_of
from penstock.run.directory import resolve_model
from penstock.run.session import Session
from penstock.units import show_bytes


@dataclass(frozen=True)
class Row(Example):
    """A prompt with an answer, or without any where only prompts are read."""

    number: int = -1
    """Its place in the teacher's store; -1 for what the student sampled."""

    @staticmethod
    def of(prompt: list[int], answer: list[int], number: int = -1) -> "Row":
        """All of the answer is learned."""
        return Row(prompt + answer, [False] * len(prompt) + [True] * len(answer), number)


@dataclass
class Inputs:
    """What a run reads before it writes anything."""

    student: Actor
    teacher: Actor
    encoder: Encoder
    """The student's."""
    train: list[Row]
    heldout: list[Row]
    flags: DistillFlags
    """As given, with no more likeliest tokens than there are."""


def check_flags(config: DistillConfig) -> None:
    """Raises UserError for flags that do not fit together."""
    flags = config.distill
    if flags.temperature <= 0:
        raise UserError("--temperature 0: a teacher of one token has no distribution; give a temperature above 0.")
    if flags.loss != "jsd" and flags.jsd_beta != DistillFlags.jsd_beta:
        raise UserError(f"--jsd-beta belongs to --loss jsd, and the loss is {flags.loss}; give one of the two.")
    if flags.sft_coef and flags.on_policy == 1:
        raise UserError("--sft-coef needs given answers, and at --on-policy 1 there are none; give one of the two.")
    if config.precompute_teacher and flags.on_policy:
        raise UserError(
            "--precompute-teacher: the teacher reads given answers, and cannot know what the student will sample; give "
            "it or --on-policy."
        )


def read_inputs(config: DistillConfig, strategy: Strategy, session: Session) -> Inputs:
    """Student, teacher and rows. Raises UserError or DataError for what does not fit."""
    flags = config.distill
    reserve = flags.max_new_tokens if flags.on_policy else 1
    student, encoder = read_model(Actor, config.model, config, strategy, session, reserve)
    with strategy.init():
        teacher = read_teacher(config, encoder, session)
    words = encoder.vocab_size
    if flags.teacher_top_k > words:
        session.say(f"--teacher-top-k {flags.teacher_top_k}: the vocabulary has {words} tokens, and all are compared")
        flags = replace(flags, teacher_top_k=words)
    kind: Kind = "prompts" if flags.on_policy == 1 else "demonstrations"
    sides = [tokens for _, tokens in read_sides(session, encoder, kind, config)]
    if kind == "prompts":
        sides = [[Row.of(ids, []) for ids in side] for side in sides]
    rows = [Row(row.tokens, row.trained, number) for number, row in enumerate(row for side in sides for row in side)]
    count = len(sides[0])
    return Inputs(student, teacher, encoder, rows[:count], rows[count:], flags)


def read_teacher(config: DistillConfig, encoder: Encoder, session: Session) -> Actor:
    """--teacher, frozen. Raises UserError where its token ids mean something else, or where rows do not fit it."""
    address = resolve_model(config.teacher)
    teacher = Actor.from_pretrained(address, allow_pickle=config.data.allow_pickle, base_dtype=config.teacher_dtype)
    teacher.eval().requires_grad_(False)
    shape = teacher.decoder.config
    if shape.max_length < encoder.max_length:
        raise UserError(
            f"--teacher {address}: holds rows of {shape.max_length} tokens, and the student's may have "
            f"{encoder.max_length}; give --max-length {shape.max_length}."
        )
    own = encoder_of(address, shape, config.data, task="judge")
    if reason := other_ids(own, encoder):
        raise UserError(
            f"--teacher {address}: {reason}, and a divergence compares probabilities of the same id; give a teacher of "
            "the student's own vocabulary, or let it write answers and learn from these with penstock sft."
        )
    if not own.same_tokenizer(encoder):
        session.say(f"--teacher {address}: has another chat template; it reads rows in the student's")
    return teacher


def other_ids(teacher: Encoder, student: Encoder) -> str:
    """Why a token id of the student does not mean the same to the teacher; empty where all do."""
    if teacher.tokenizer is not None and student.tokenizer is not None:
        theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
        words = sorted({**theirs, **ours}, key=lambda word: (ours.get(word, len(ours)), word))
        if other := [word for word in words if theirs.get(word) != ours.get(word)]:
            shown = f"{other[0]!r} is {theirs.get(other[0], 'unknown')} to it and {ours.get(other[0], 'unknown')} here"
            return f"{len(other)} of {len(words)} tokens have other ids than the student's, the first: {shown}"
    elif teacher.vocab_size != student.vocab_size:
        return f"has {teacher.vocab_size} token ids and the student {student.vocab_size}, without tokenizers to compare"
    if teacher.vocab_size < student.vocab_size:  # a larger table is padding: no tokenizer names what is behind its end
        return f"knows {teacher.vocab_size} token ids, and the student {student.vocab_size}"
    return ""


def workload(config: DistillConfig, inputs: Inputs, models: dict[str, Any]) -> Workload:
    """What these models are used for, as the plan sees it."""
    optim, flags, rows = config.optim, inputs.flags, [*inputs.train, *inputs.heldout]
    prompt, answer = max(len(prompt_of(row)) for row in rows), max(sum(row.trained) for row in rows)
    if flags.on_policy:
        answer = max(answer, flags.max_new_tokens)
    batches = (optim.batch_size, optim.micro_batch_size, optim.batch_size, 1)
    lengths = (prompt, answer, flags.rollout_batch_size)
    k, samples = flags.teacher_top_k, flags.on_policy > 0
    options: Any = {"top_k": k, "samples": samples, "temperature": flags.temperature}
    return Workload("distill", role_specs(models), *batches, *lengths, **options)


def say_what_fits(strategy: Strategy, work: Workload, session: Session) -> None:
    """Says what takes less where the plan of student and teacher is over a budget; preparing them raises then."""
    setting = setting_of(strategy, work)
    peak, budgets = forecast_of(setting, timed=False).peak, setting.budgets
    over = [f"{show_bytes(peak[tier])} of {tier}" for tier, most in budgets.items() if most and most < peak[tier]]
    if over:
        session.say(
            f"student and teacher together need {' and '.join(over)} by the plan. Less: --precompute-teacher, which "
            "has them in memory one after the other; --teacher-dtype nf4; --lora. To try: penstock plan --stage distill"
        )
