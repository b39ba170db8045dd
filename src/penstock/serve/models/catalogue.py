"""The models of the server: loaded, named, fingerprinted, and replaced while they run.

A `ServedModel` is one version of one model. With --follow a run's newer checkpoint becomes a new `ServedModel` under
the same name. Running answers keep the old one, which is freed when the last of them ends. The weights are in the
models' process (`worker.py`); here are names, encoders and what else the server must know of a model.
"""

import copy
import hashlib
import inspect
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from penstock.config import as_data_flags
from penstock.data.chat import Encoder
from penstock.errors import ResourceError, UserError
from penstock.models.chat_template import ChatTemplate
from penstock.models.pretrained import ends_named
from penstock.models.tiling import prefills
from penstock.run import checkpoint
from penstock.run.directory import resolve_model
from penstock.run.versions import Versions, served_model
from penstock.serve.config import ServeConfig
from penstock.serve.detokenize import Vocabulary, decoder_of
from penstock.serve.models.worker import NUMBERS, Loaded
from penstock.sources import file_digest

NO_LIMIT = 2**31
"""The encoder checks no length: `openai_requests` refuses a prompt that is too long, with both numbers."""
MOST_ENCODERS = 8
POLL_SECONDS = 1.0
"""Between two reads of a followed run."""


@dataclass(eq=False)
class ServedModel:
    """One version of one model, ready to answer."""

    id: str
    digest: str
    """sha256 of its weights, or the one in their checkpoint's manifest."""
    created: int
    """Seconds since 1970 when the weights were written."""
    encoder: Encoder
    number: int
    """The worker's, of the model whose weights it uses."""
    vocab_size: int
    rows: int
    length: int
    """Tokens of prompt and answer together."""
    base: "ServedModel | None" = None
    """Of an adapter: the model whose weights and rows it shares."""
    adapter: int | None = None
    """Its number there."""
    decode: Callable[[Sequence[int]], str] = field(init=False)
    vocabulary: Vocabulary = field(init=False)
    _encoders: dict[str, Encoder] = field(init=False, default_factory=dict)
    """By the arguments of requests for the chat template, the last few."""

    def __post_init__(self) -> None:
        self.decode, self.vocabulary = decoder_of(self.encoder), Vocabulary(self.encoder.tokenizer)

    @property
    def owner(self) -> "ServedModel":
        """The model whose weights and rows it uses: itself, or an adapter's base."""
        return self.base or self

    def encoder_with(self, arguments: dict[str, Any]) -> Encoder:
        """The encoder whose chat template gets these arguments too. Raises KeyError for one that is not a template's to
        read, or that this one does not read."""
        if not arguments:
            return self.encoder
        key = json.dumps(arguments, sort_keys=True)
        encoder = self._encoders.get(key)  # two threads read requests
        if encoder is None:
            own = self.encoder.template
            settled = {"messages", *inspect.signature(own.tokenizer.apply_chat_template).parameters}
            for name in arguments:
                if name in settled:
                    raise KeyError(name)
            template = ChatTemplate(own.tokenizer, {**own.arguments, **arguments}, self.encoder.flags.date)
            for name in template.unread:
                raise KeyError(name)
            encoder = copy.copy(self.encoder)
            encoder.template = template
            while len(self._encoders) >= MOST_ENCODERS:
                self._encoders.pop(next(iter(self._encoders)), None)
            self._encoders[key] = encoder
        return encoder


@dataclass(eq=False)
class ServedReward:
    """One version of a reward model, ready to score."""

    id: str
    digest: str
    created: int
    encoder: Encoder
    number: int
    """The worker's."""
    length: int
    """Tokens of a row."""
    std: float
    """What its scores were divided by."""
    alone: bool
    """Whether rows are read one by one: transformers' own layers want no padding."""

    def parts(self, rows: Sequence[Sequence[int]]) -> list[slice]:
        """Which rows one forward pass reads."""
        return [slice(i, i + 1) for i in range(len(rows))] if self.alone else prefills([len(row) for row in rows])


class Connected(Protocol):
    """What asks the models' process: the scheduler."""

    def call(self, name: str, *arguments: Any) -> Future[Any]:
        """The result of one of its methods."""

    def drop(self, number: int) -> None:
        """A model that nobody will ask again."""


class Catalogue:
    """The models by name. `ready` is set when all are loaded; `problem` is the error when one cannot be loaded."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.sources, self.adapters = named_sources(config.model), named_sources(config.lora_modules, "--lora-modules")
        if self.adapters and (len(self.sources) > 1 or config.follow):
            raise UserError(
                "--lora-modules: are adapters of one model, and it stays: give one MODEL, without --follow."
            )
        if both := self.sources.keys() & self.adapters.keys():
            raise UserError(f"--lora-modules: {min(both)} is the model's own name; give another: NAME=DIRECTORY.")
        self.models: dict[str, ServedModel | ServedReward] = {}
        self._started = int(time.time())
        self.ready = threading.Event()
        self.problem: Exception | None = None
        self.swaps = 0
        """How often a newer checkpoint replaced a model."""
        self._process: Connected | None = None
        self._stopping, self._lost = False, False
        self._no_worker: ResourceError | None = None
        self._paths: dict[str, str] = {}
        """Where each model was read from."""
        self._changed = threading.Event()
        """One of the two before."""
        self._seen: dict[str, str] = {}
        """The checkpoint of each followed run that was loaded or refused last."""

    def cards(self) -> list[dict[str, Any]]:
        """OpenAI's description of each model, of those too that still load."""
        models, cards = dict(self.models), []
        for name in (*self.sources, *self.adapters):
            model = models.get(name)
            card = {"id": name, "object": "model", "created": model.created if model else self._started}
            task = "score" if isinstance(model, ServedReward) else "generate"
            length = model.length if model else None  # vLLM's name for the context
            cards.append({**card, "owned_by": "penstock", "task": task, "max_model_len": length})
        return cards

    def rewards(self) -> list[ServedReward]:
        """The reward models that are loaded, by name."""
        return [model for _, model in sorted(self.models.items()) if isinstance(model, ServedReward)]

    def start(self, process: Connected, on_failure: Callable[[], None]) -> None:
        """Loads all models in a thread, then follows their runs with --follow."""
        self._process = process
        threading.Thread(target=self._run, args=(on_failure,), name="catalogue", daemon=True).start()

    def reload(self, problem: ResourceError | None = None) -> None:
        """The worker has no models any more: loads all again, or ends the server where there is no worker."""
        self.ready.clear()
        self._lost, self._no_worker = True, problem
        self._changed.set()

    def stop(self) -> None:
        """Ends the thread at its next look."""
        self._stopping = True
        self._changed.set()

    def _run(self, on_failure: Callable[[], None]) -> None:
        poll = POLL_SECONDS if self._config.follow else None
        try:
            self._load_all()
            while not self._stopping:
                self._changed.wait(poll)
                self._changed.clear()
                if self._lost and not self._stopping:
                    if self._no_worker is not None:
                        raise self._no_worker
                    self._lost = False
                    self._load_all()
                for name, source in self.sources.items() if self._config.follow and not self._stopping else ():
                    self.refresh(name, source)
        except Exception as error:  # the command raises it again
            if not self._stopping:
                self.problem = error
                on_failure()

    def _load_all(self) -> None:
        for name, source in self.sources.items():
            try:
                self.models[name] = self._load(name, source, self._paths.get(name))
            except Exception:
                if not (self._config.follow and name in self._paths):
                    raise
                self.models[name] = self._load(name, source)  # its checkpoint has been removed since: the newest
        if self.adapters:
            self._add_adapters(self.models[next(iter(self.sources))])
        if not self._lost:
            self.ready.set()

    def refresh(self, name: str, source: str) -> None:
        """Loads a run's newer checkpoint, if there is one. A damaged or removed checkpoint is skipped."""
        newest = _latest(source)
        if newest is None or newest == self._seen[name]:
            return
        try:
            self.models[name] = self._load(name, source)
        except Exception as error:  # the run may remove the files during the read; the old weights stay
            self._seen[name] = newest
            print(f"{name}: {newest} is passed over: {error}", file=sys.stderr, flush=True)
            return
        self.swaps += 1
        print(f"{name}: now answers from {self._seen[name]}", file=sys.stderr, flush=True)

    def _load(self, name: str, source: str, path: str | None = None) -> ServedModel | ServedReward:
        """A model anew. `path`: where it was read from before, instead of what its source names now."""
        config, again = self._config, path is not None
        path = path or resolve_model(source)
        if config.follow and not again:
            newest = _latest(source)
            if newest is None:
                raise UserError(
                    f"--follow: {source} is no run with a checkpoint; leave --follow out to serve it as is."
                )
            named = source if Versions.exist(source) else str(Path(source) / "checkpoints" / newest)
            path = resolve_model(named)
            self._seen[name] = newest
        assert self._process is not None
        number, length = next(NUMBERS), config.max_length or NO_LIMIT
        order = path, config.dtype, config.device, config.rows, length
        loaded: Loaded = self._process.call("load", number, *order).result()
        model: ServedModel | ServedReward
        try:
            encoder = self._encoder(path, loaded.eos_ids, loaded.vocab_size)
            length, (digest, created) = min(length, loaded.max_length), fingerprint(Path(path))
            if loaded.scores:
                model = ServedReward(name, digest, created, encoder, number, length, loaded.std, loaded.foreign)
            else:
                model = ServedModel(name, digest, created, encoder, number, loaded.vocab_size, config.rows, length)
        except Exception:
            self._process.drop(number)
            raise
        weakref.finalize(model, self._process.drop, number)
        self._paths[name] = path
        return model

    def _add_adapters(self, base: ServedModel | ServedReward) -> None:
        """Serves the adapters of --lora-modules as models of their own, with the base's weights and rows."""
        if not isinstance(base, ServedModel):
            raise UserError(f"--lora-modules: {base.id} is a reward model, which has no adapters here; leave them out.")
        path = self._paths[base.id]
        directories = [Path(resolve_model(adapter)) for adapter in self.adapters.values()]
        assert self._process is not None
        self._process.call("add_adapters", base.number, path, [str(directory) for directory in directories]).result()
        for number, (name, directory) in enumerate(zip(self.adapters, directories, strict=True)):
            ends = ends_named(directory, path)
            encoder = self._encoder(str(directory), ends, base.vocab_size, base.encoder)
            digest, created = fingerprint(directory)
            digest = hashlib.sha256((base.digest + digest).encode()).hexdigest()
            self.models[name] = ServedModel(
                name, digest, created, encoder, base.number, base.vocab_size, base.rows, base.length, base, number
            )

    def _encoder(self, path: str, ends: Sequence[int], vocab_size: int, base: Encoder | None = None) -> Encoder:
        """Of the model at `path`; an adapter without a tokenizer has its base's."""
        flags = as_data_flags(self._config, max_length=NO_LIMIT)
        options: Any = {"vocab_size": vocab_size, "max_length": NO_LIMIT, "flags": flags, "task": "answer"}
        encoder = Encoder.for_model(path, eos_ids=ends, **options)
        for line in encoder.take_notes():
            print(line, file=sys.stderr, flush=True)
        if encoder.tokenizer is None and base is not None:
            return base
        if encoder.tokenizer is None:
            raise UserError(f"{path}: has no tokenizer, so it cannot chat; put the model's tokenizer files beside it.")
        return encoder


def named_sources(arguments: Sequence[str], flag: str = "--model") -> dict[str, str]:
    """Names of models: NAME of NAME=PATH, or the last part of a path, with its parent if another has the same name."""
    names: dict[str, str] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if not equals or "/" in name:
            source = argument
            path = Path(source)
            name = path.absolute().name if path.exists() else source
            if name in names and path.exists():
                name = f"{path.absolute().parent.name}/{name}"
        if name in names:
            text = f"{flag} {argument}: there is a model named {name} already; give it a name: other={source}."
            raise UserError(text)
        names[name] = source
    return names


def _latest(source: str) -> str | None:
    """The name of a run's newest checkpoint, or of the version that a folder of versions serves."""
    try:
        if Versions.exist(source):
            return served_model(source)[0]
        text = (Path(source) / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UserError):
        return None
    return text if checkpoint.NAME.fullmatch(text) else None


def fingerprint(path: Path) -> tuple[str, int]:
    """sha256 of a model's weights, and when they were written (seconds since 1970)."""
    manifest = path.parent / checkpoint.MANIFEST
    if manifest.exists():
        return json.loads(manifest.read_text(encoding="utf-8"))["sha256"], int(manifest.stat().st_mtime)
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")) if path.is_dir() else []
    files = [path] if path.is_file() else files
    if not files:  # a name on the hub
        return hashlib.sha256(str(path).encode()).hexdigest(), int(time.time())
    digests = "".join(file_digest(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest(), int(max(file.stat().st_mtime for file in files))
