"""The models that are served: loaded, named, fingerprinted, and replaced while they run.

A `Served` is one version of one model. With --follow a run's newer checkpoint becomes a new `Served` under the same
name; answers that run keep the old one, which goes when the last of them has ended.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.data.chat import Encoder
from penstock.errors import UserError
from penstock.models.decoder import Decoder
from penstock.rollout import engine as engines
from penstock.rollout.engine import Engine
from penstock.run import checkpoint
from penstock.run.directory import resolve_model
from penstock.serve.config import ServeConfig
from penstock.serve.detokenize import Vocabulary, decoder_of

NO_LIMIT = 2**31
"""The encoder checks no length here: the service answers a prompt that is too long with both numbers."""
POLL_SECONDS = 1.0
"""Between two looks at a run that is followed."""


@dataclass(eq=False)
class ServedModel:
    """One version of one model, ready to answer."""

    id: str
    digest: str
    """sha256 of its weights, or of the manifest that holds theirs."""
    created: int
    """Seconds since 1970 when the weights were written."""
    encoder: Encoder
    decoder: Decoder
    rows: int
    length: int
    """Tokens of prompt and answer together."""
    decode: Callable[[Sequence[int]], str] = field(init=False)
    vocabulary: Vocabulary = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.length = min(self.length, self.decoder.config.max_length)
        self.decode, self.vocabulary = decoder_of(self.encoder), Vocabulary(self.encoder.tokenizer)
        self.renew()

    def renew(self) -> None:
        """A fresh engine over the same weights, for when a step has failed halfway."""
        self.engine = Engine(self.decoder, eos_ids=self.encoder.eos_ids, rows=self.rows, length=self.length)


class Catalogue:
    """The served models by name. `ready` is set once all are loaded; `problem` says why they could not be."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.sources = named_sources(config.model)
        self.models: dict[str, ServedModel] = {}
        self.ready = threading.Event()
        self.problem: Exception | None = None
        self.swaps = 0
        """Times that a newer checkpoint took a model's place."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: dict[str, str] = {}
        """The checkpoint that each followed run is served from."""

    def start(self, failed: Callable[[], None]) -> None:
        """Loads all models in a thread of its own, then follows their runs where that was asked for."""
        self._thread = threading.Thread(target=self._run, args=(failed,), name="catalogue", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """No more looking at runs. False when a model is being read right now, which cannot be interrupted."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * POLL_SECONDS if self.ready.is_set() else 0.1)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, failed: Callable[[], None]) -> None:
        try:
            for name, source in self.sources.items():
                self.models[name] = self._load(name, source)
        except Exception as error:  # handed to the command, which knows what to say
            self.problem = error
            failed()
            return
        self.ready.set()
        while self._config.follow and not self._stop.wait(POLL_SECONDS):
            for name, source in self.sources.items():
                self.look(name, source)

    def look(self, name: str, source: str) -> None:
        """Takes a run's newer checkpoint into service, if there is one. A damaged or vanished one is passed over."""
        newest = _latest(source)
        if newest is None or newest == self._seen[name]:
            return
        try:
            self.models[name] = self._load(name, source)
        except Exception as error:  # a run may remove what is being read; the old weights go on
            self._seen[name] = newest
            print(f"{name}: {newest} is passed over: {error}", file=sys.stderr, flush=True)
            return
        self.swaps += 1
        print(f"{name}: now answers from {self._seen[name]}", file=sys.stderr, flush=True)

    def _load(self, name: str, source: str) -> ServedModel:
        config = self._config
        place = resolve_model(source)
        if config.follow:
            newest = _latest(source)
            if newest is None:
                raise UserError(
                    f"--follow: {source} is no run with a checkpoint; leave --follow out to serve it as is."
                )
            place = resolve_model(str(Path(source) / "checkpoints" / newest))
            self._seen[name] = newest
        decoder = engines.load(place, config.dtype, config.device)[1].decoder
        encoder = Encoder.for_model(
            place, eos_ids=decoder.config.eos_ids, vocab_size=decoder.config.vocab_size, max_length=NO_LIMIT
        )
        if encoder.tokenizer is None:
            raise UserError(
                f"{source}: has no tokenizer, so it cannot chat; put the model's tokenizer files beside it."
            )
        digest, created = fingerprint(Path(place))
        return ServedModel(name, digest, created, encoder, decoder, config.rows, config.max_length or NO_LIMIT)


def named_sources(given: Sequence[str]) -> dict[str, str]:
    """Names of models, as clients say them: NAME=PATH, or else the last part of the path, with its parent if needed."""
    names: dict[str, str] = {}
    for one in given:
        name, equals, source = one.partition("=")
        if not equals or "/" in name:
            source = one
            path = Path(one)
            name = path.absolute().name if path.exists() else one
            if name in names and path.exists():
                name = f"{path.absolute().parent.name}/{name}"
        if name in names:
            raise UserError(f"--model {one}: there is a model named {name} already; give it a name: other={source}.")
        names[name] = source
    return names


def _latest(source: str) -> str | None:
    """The name of a run's newest checkpoint."""
    try:
        text = (Path(source) / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return text if checkpoint.NAME.fullmatch(text) else None


def fingerprint(place: Path) -> tuple[str, int]:
    """sha256 that tells these weights from others, and when they were written (seconds since 1970)."""
    manifest = place.parent / checkpoint.MANIFEST
    if manifest.exists():
        return json.loads(manifest.read_text(encoding="utf-8"))["sha256"], int(manifest.stat().st_mtime)
    files = sorted(place.glob("*.safetensors")) + sorted(place.glob("*.bin")) if place.is_dir() else []
    if not files:  # a name on the hub
        return hashlib.sha256(str(place).encode()).hexdigest(), int(time.time())
    digests = "".join(checkpoint.digest(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest(), int(max(file.stat().st_mtime for file in files))
