"""What a stage brings in: the model's address, its encoder, and the records, each with one printed line."""

from collections.abc import Sequence
from typing import Any

from penstock.config import DataFlags
from penstock.data import formats
from penstock.data.chat import Encoder
from penstock.errors import UserError
from penstock.models.decoder import DecoderConfig
from penstock.run.directory import resolve_model
from penstock.run.session import Session


def source_of(model: str, which: str = "model") -> str:
    """A model's address: a run directory becomes the newest (or best) weights inside it."""
    return resolve_model(model, which)


def encoder_of(source: str, config: DecoderConfig, flags: DataFlags, *, reserve: int = 0) -> Encoder:
    """The model's own tokenizer and template; rows never longer than the model's positions.

    `reserve` tokens are kept free behind a prompt for the response.
    """
    return Encoder.for_model(
        source,
        vocab_size=config.vocab_size,
        max_length=min(flags.max_length, config.max_length),
        reserve=reserve,
        skip_bad=flags.skip_bad,
    )


def read(session: Session, files: Sequence[str], kind: str, flags: DataFlags) -> list[Any]:
    """The records of the files, with what was sniffed and what was left out said aloud."""
    keys = dict(one.partition("=")[::2] for one in flags.keys)
    if not all(keys.values()):
        raise UserError(f"--keys {' '.join(flags.keys)}: give pairs ours=theirs, as in --keys prompt=question.")
    dataset = formats.read(files, kind, keys=keys or None, skip_bad=flags.skip_bad)
    session.say(dataset.decision)
    if dataset.bad:
        session.say(f"--skip-bad left out {len(dataset.bad)} lines, the first: {dataset.bad[0]}")
    return dataset.records
