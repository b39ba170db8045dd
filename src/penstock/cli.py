"""The `penstock` command: one table of commands; a command's modules are imported when it runs."""

import codecs
import errno
import importlib
import io
import os
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from penstock.errors import PenstockError, ResourceError, UserError, disk_trouble, one_line_warning


class Command(NamedTuple):
    """One row of the table. The function takes the config; an int that it returns is the exit code."""

    text: str
    """What it does, for `penstock --help`."""
    config: str
    """module:class of its flags."""
    function: str
    """module:function, imported after the flags are checked."""
    positional: str = ""
    """The flag whose values may be given without its name."""
    example: str = ""
    """What --help shows first."""


COMMANDS: dict[str, Command] = {
    "align": Command(
        "from a model and data to an aligned model: plan, check, train, measure, report",
        "commands.align.config:AlignConfig", "commands.align.command:align",
        example="penstock align --model Qwen/Qwen3-0.6B --data comparisons.jsonl --out runs/align --dry-run",
    ),
    "sft": Command(
        "teach a language model to answer from demonstrations", "config:SFTConfig", "algorithms.sft:sft",
        example="penstock sft --model gpt2 --data demonstrations.jsonl --out runs/sft --steps 500",
    ),
    "reward": Command(
        "learn a score from rankings", "config:RewardConfig", "algorithms.reward:reward",
        example="penstock reward --model runs/sft --data rankings.jsonl --out runs/reward",
    ),
    "kto": Command(
        "learn from single votes, answers that were liked or disliked", "algorithms.config:KTOConfig",
        "algorithms.kto:kto", example="penstock kto --model runs/sft --data votes.jsonl --out runs/kto",
    ),
    "ppo": Command(
        "improve the actor against a score, near the reference", "config:PPOConfig", "algorithms.ppo:ppo",
        example="penstock ppo --actor runs/sft --reward runs/reward --data prompts.jsonl --out runs/ppo",
    ),
    "dpo": Command(
        "learn from comparisons of answers, without a reward model (DPO, IPO, SimPO, ORPO, ...)",
        "algorithms.config:DPOConfig", "algorithms.preference:dpo",
        example="penstock dpo --model runs/sft --data rankings.jsonl --out runs/dpo",
    ),
    "grpo": Command(
        "improve a model against a score by comparing answers, without a critic", "algorithms.config:GRPOConfig",
        "algorithms.grpo:grpo",
        example="penstock grpo --model runs/sft --reward-fn grade.py:score --data prompts.jsonl --out runs/grpo",
    ),
    "distill": Command(
        "teach a student what a larger model would say", "algorithms.config:DistillConfig",
        "algorithms.distillation.distill:distill",
        example="penstock distill --model gpt2 --teacher gpt2-xl --data demonstrations.jsonl --out runs/distill",
    ),
    "improve": Command(
        "learn from the votes of a served model's users, and serve what is measured to be better",
        "commands.improve.config:ImproveConfig", "commands.improve.command:improve", "run",
        "penstock improve runs/live --model runs/sft --data-dir runs/serve",
    ),
    "chat": Command(
        "talk with a model or a run in the terminal", "commands.config:ChatConfig", "commands.chat:chat", "model",
        "penstock chat runs/ppo",
    ),
    "serve": Command(
        "answer over HTTP as OpenAI's API does, with a page to chat in", "serve.config:ServeConfig",
        "serve.server:serve", "model", "penstock serve runs/ppo runs/sft --port 8000",
    ),
    "generate": Command(
        "answer prompts from a file", "commands.config:GenerateConfig", "commands.generate:generate",
        example="penstock generate --model runs/ppo --data prompts.jsonl --out answers.jsonl",
    ),
    "eval": Command(
        "measure a model on held-out prompts, or compare two", "commands.config:EvalConfig",
        "commands.evaluate:evaluate", "model",
        "penstock eval runs/ppo --against runs/sft --data heldout.jsonl --reward runs/reward",
    ),
    "export": Command(
        "write a run's model as a Hugging Face directory", "commands.config:ExportConfig", "commands.export:export",
        "run", "penstock export runs/ppo --out my-model",
    ),
    "data check": Command(
        "say what data files are, and name each bad line", "commands.config:CheckConfig", "commands.data:check",
        "data", "penstock data check demonstrations.jsonl --model Qwen/Qwen3-0.6B",
    ),
    "data show": Command(
        "draw three records of data as a model's tokens, and which of them are learned",
        "commands.config:ShowConfig", "commands.data:show", "data",
        "penstock data show demonstrations.jsonl --model Qwen/Qwen3-0.6B",
    ),
    "data export": Command(
        "write the chat page's votes and the labelling room's rankings", "commands.config:VotesConfig",
        "commands.data:export", example="penstock data export --votes --out rankings.jsonl",
    ),
    "plan": Command(
        "what a run needs, moves and takes, before it runs; and what to change if it does not fit",
        "planner.config:PlanConfig", "commands.plan:run",
        example="penstock plan --model llama-3-8b --device-memory 24GB --host-memory 128GB --lora 16",
    ),
    "bench": Command(
        "measure PPO on random prompts", "commands.bench.config:BenchConfig", "commands.bench.run:bench",
        example="penstock bench --model xl --strategy gemini_cpu --device-memory 6GB --iterations 1",
    ),
    "bench micro": Command(
        "measure the ceilings of this machine", "commands.bench.config:MicroConfig", "commands.bench.micro:micro",
        example="penstock bench micro --quick",
    ),
    "bench capacity": Command(
        "search the largest model that a budget holds", "commands.bench.config:CapacityConfig",
        "commands.bench.capacity:capacity", example="penstock bench capacity --device-memory 2GB",
    ),
    "demo": Command(
        "run all three stages on a small made-up world, with a report", "commands.config:DemoConfig",
        "commands.demo:demo", example="penstock demo",
    ),
    "doctor": Command(
        "list what this machine, or a model, is and what is missing", "commands.config:DoctorConfig",
        "commands.doctor:doctor", "model", "penstock doctor Qwen/Qwen3-0.6B",
    ),
    "watch": Command(
        "show the report of runs in a browser while they are written", "commands.config:WatchConfig",
        "commands.watch:watch", "run", "penstock watch runs/ppo runs/grpo",
    ),
    "completion": Command(
        "print what makes a shell complete commands, flags and their values", "commands.config:CompletionConfig",
        "cli:completion", "shell", "penstock completion bash >> ~/.bashrc",
    ),
    "resume": Command(
        "continue a run that was stopped or killed", "commands.config:ResumeConfig", "cli:resume", "run",
        "penstock resume runs/ppo",
    ),
}  # fmt: skip

HELP = """usage: penstock COMMAND [flags]

{commands}

penstock COMMAND --help shows its flags. Exit codes: 2 user error, 3 resources, 4 data, 5 internal.
Several processes: torchrun --nproc_per_node N -m penstock ppo ..."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code; a user's error is one paragraph on stderr, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    codecs.register_error("nearest", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="nearest")
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # for half a letter, which JSON may hold and UTF-8 may not
    warnings.formatwarning = one_line_warning
    name = arguments[0] if arguments else ""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except PenstockError as error:
        code = _fail(name, error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # penstock generate ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        problem = _refused(error)
        if problem is not None:
            code = _fail(name, problem)
        else:
            import traceback

            traceback.print_exc()
            print(f"penstock {name}: internal error ({type(error).__name__}): please report it.", file=sys.stderr)
            code = 5
    if code is not None:
        sys.exit(code)


def _run(arguments: list[str]) -> int | None:
    """The exit code, or None when the command has ended well."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:14} {command.text}" for name, command in COMMANDS.items())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from penstock import __version__

        print(f"penstock {__version__}")
        return None
    if arguments[0] == "--complete":
        print("\n".join(completions(arguments[1:])))
        return None
    name = _command_name(arguments)
    wants_help = bool({"-h", "--help"} & set(arguments))
    if name not in COMMANDS:  # `data`, which only has subcommands
        print("\n".join(_usages(name)))
        return 0 if wants_help else 2
    from penstock.flags import help_text, parse

    command = COMMANDS[name]
    config_class = load(command.config)
    if wants_help:
        print(help_text(config_class, name, command.example, command.positional))
        return 0
    config = parse(config_class, arguments[len(name.split()) :], name, command.positional)
    run: Any = getattr(config, "run", None)
    if getattr(run, "resume_if_present", False) and (Path(run.out) / "config.toml").exists():
        load(command.function)(as_begun(config, name), resume=True)
        return None
    code = load(command.function)(config)
    return code if isinstance(code, int) else None


def _command_name(arguments: list[str]) -> str:
    """The command or subcommand that the first words name. Raises UserError, with the nearest, when there is none."""
    first, words = arguments[0], arguments[:2]
    if " ".join(words) in COMMANDS:
        return " ".join(words)
    names = dict.fromkeys(name.split()[0] for name in COMMANDS)
    if any(name.startswith(f"{first} ") for name in COMMANDS) and not words[-1].startswith("-") and len(words) > 1:
        raise UserError(f"no command {' '.join(words)!r}; try {' or '.join(_usages(first))}.")
    if first in names:
        return first
    import difflib

    near = difflib.get_close_matches(first, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
    raise UserError(f"no command {first!r}; {hint}")


def _usages(first: str) -> list[str]:
    """How the command and each of its subcommands are written."""
    from penstock.flags import usage

    rows = [(name, command) for name, command in COMMANDS.items() if name.split()[0] == first]
    return [usage(load(command.config), name, command.positional) for name, command in rows]


BASH = """_penstock() {
    local IFS=$'\\n'
    COMPREPLY=($(penstock --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _penstock penstock"""
SHELLS = {
    "bash": BASH,
    "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{BASH}",
    "fish": "complete -c penstock -a '(penstock --complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'",
}
"""What `penstock completion` prints. Where there is no candidate a shell completes names of files."""


def completion(config: Any) -> None:
    """Prints the script of a shell."""
    print(SHELLS[config.shell])


def completions(words: Sequence[str]) -> list[str]:
    """Candidates for the last of these words behind `penstock`, which may be empty."""
    from penstock.flags import flags_of

    *before, last = words or [""]
    names = [name.split() for name in COMMANDS]
    candidates = [name[len(before)] for name in names if name[: len(before)] == before and len(name) > len(before)]
    command = COMMANDS.get(" ".join(before[:2])) or COMMANDS.get(" ".join(before[:1]))
    if command:
        flags = {flag.spelling: flag for flag in flags_of(load(command.config))}
        flag = flags.get(before[-1])
        if flag and flag.type is not bool:
            candidates = list(flag.choices)
        elif last.startswith("-"):
            off = (f"--no-{name[2:]}" for name, flag in flags.items() if flag.type is bool and flag.default is True)
            candidates = ["--help", *flags, *off]
    return sorted({candidate for candidate in candidates if candidate.startswith(last)})


def load(address: str) -> Any:
    """What module:name names, within the package."""
    module, name = address.split(":")
    return getattr(importlib.import_module(f"penstock.{module}"), name)


PLAIN = {
    "'": "\u2018\u2019\u201a", '"': "\u201c\u201d\u201e", "-": "\u2010\u2011\u2012\u2013\u2014\u2212", "*": "\u2022",
    "/": "\u2044", "->": "\u2192", "EUR": "\u20ac",
}  # fmt: skip
"""Signs that Unicode takes for no form of a plainer one."""
LETTERS = {ord(letter): plain for plain, letters in PLAIN.items() for letter in letters}


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """What a terminal shows that lacks a letter: plain marks, the letter without its accents, else a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    shown = ""
    for letter in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", letter).translate(LETTERS).encode(error.encoding, "ignore")
        modifies = unicodedata.category(letter) in ("Mn", "Me", "Cf")  # the letter before it
        shown += plain.decode(error.encoding) or "?" * (not modifies)
    return shown, error.end


def _fail(name: str, error: PenstockError) -> int:
    print(f"penstock {name}: {error}", file=sys.stderr)
    return error.exit_code


def resume(config: Any) -> None:
    """Continues the training command that config.toml names; flags of `penstock resume` win over those in the file."""
    from penstock.flags import from_dict, to_dict
    from penstock.run.directory import RunDirectory

    overrides = to_dict(config)
    path = overrides.pop("run")
    saved = RunDirectory.peek(path)
    name = str(saved.pop("command"))
    stages = [name for name, command in COMMANDS.items() if command.function.startswith("algorithms.")]
    if name not in stages:
        raise UserError(f"{path}/config.toml: no command {name!r} can be resumed; there are {', '.join(stages)}.")
    if "epochs" in overrides:
        if name in ("ppo", "grpo"):
            raise UserError(f"--epochs: {name} makes these over each experience; --steps is the length of the run.")
        overrides.setdefault("steps", "none")
    command = COMMANDS[name]
    run_config = from_dict(load(command.config), {**OLD_DEFAULTS.get(name, {}), **saved, "out": path, **overrides})
    load(command.function)(run_config, resume=True)


OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    **{command: {"padding_free": False} for command in ("dpo", "kto", "grpo", "distill")},
    "sft": {"padding_free": False, "max_eval_samples": "none", "truncate": "right"},
    "reward": {"padding_free": False, "max_eval_samples": "none", "truncate": "right"},
    "ppo": {
        "padding_free": False,
        "heldout": 0.0,
        "max_eval_samples": "none",
        "truncate": "right",
        "missing_eos_penalty": "none",
        "scale_rewards": "none",
    },
}
"""What a run did that was begun before a flag existed, by command: values for a config.toml that lacks the flag."""
MAY_CHANGE = (
    "device",
    "strategy",
    "device_memory",
    "host_memory",
    "disk",
    "json",
    "quiet",
    "keep",
    "log",
    "resume_if_present",
)
"""Flags that a run goes on with as the command line has them, if it has them."""


def as_begun(config: Any, name: str) -> Any:
    """The run in `config.run.out` as --resume-if-present goes on with it: with the flags in its config.toml.

    Raises UserError where this command line has others, but for placement; the length is the run's own, and said.
    """
    from penstock.flags import from_dict, to_dict, with_absolute_paths, with_sources
    from penstock.hub import unpinned
    from penstock.run.directory import RunDirectory

    given, path = with_absolute_paths(to_dict(config)), config.run.out
    saved = RunDirectory.peek(path)
    if (began := saved.pop("command")) != name:
        raise UserError(f"--out {path}: is a run of penstock {began}, and this is penstock {name}; choose another.")
    changes = {flag: given[flag] for flag in MAY_CHANGE if flag in given}
    begun = from_dict(type(config), {**OLD_DEFAULTS.get(name, {}), **saved, **changes, "out": path})
    flags = with_sources(with_absolute_paths(to_dict(begun)), lambda text: unpinned(text, path))
    given = with_sources(given, lambda text: unpinned(text, path))
    for flag in sorted({*given, *flags}):
        if given.get(flag) == flags.get(flag) or (flag in ("dtype", "strategy", "date") and flag not in given):
            continue
        spelled, own = f"--{flag.replace('_', '-')}", flags.get(flag, "none")
        if flag not in ("steps", "epochs"):
            raise UserError(
                f"{spelled}: --resume-if-present goes on with a run as it was begun, and {path} was begun with "
                f"{own}; give that, or another --out."
            )
        if os.environ.get("RANK", "0") == "0":
            print(f"{spelled} {own}, as {path}/config.toml says; penstock resume {path} changes it", file=sys.stderr)
    return begun


def _refused(error: Exception) -> PenstockError | None:
    """The error of a full disk, a missing permission or the like, or None when the error is something else."""
    # On a CPU torch says "DefaultCPUAllocator: can't allocate memory" in a plain RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return ResourceError(
            "out of memory; give a smaller --micro-batch-size, a smaller --max-length or --dtype bf16. "
            "Checkpoints that were written are intact: penstock resume RUN."
        )
    origin = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if trouble := disk_trouble(error):
        reason, remedy = trouble
        return ResourceError(f"{origin}{reason}. {remedy}; checkpoints that were written are intact.")
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.EMFILE:
        return ResourceError(f"{origin}too many open files; raise ulimit -n.")
    if error.errno == errno.EACCES:
        return UserError(f"{origin}permission denied; choose a place that you may read and write.")
    return None
