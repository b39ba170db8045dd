"""The `penstock` command: one line per command, nothing imported before it is needed."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from penstock.errors import PenstockError, ResourceError, UserError

COMMANDS: dict[str, str] = {
    "sft": "teach a language model to answer from demonstrations",
    "reward": "learn a score from rankings",
    "ppo": "improve the actor against a score, near the reference",
    "chat": "talk with a model or a run in the terminal",
    "serve": "answer over HTTP as OpenAI's API does, with a page to chat in",
    "generate": "answer prompts from a file",
    "export": "write a run's model as a Hugging Face directory",
    "data": "data check FILE: say what a file is; data export --votes: what people preferred in the chat page",
    "plan": "what a run will need, move and take, before it runs; and what to change if it does not fit",
    "bench": "PPO on random prompts, measured; bench micro: this machine's ceilings; bench capacity: the largest model",
    "demo": "all three stages on a small world of their own, with a report",
    "doctor": "say what this machine has and what is missing",
    "resume": "go on with a run that was stopped or killed",
}

HELP = """usage: penstock COMMAND [flags]

{commands}

penstock COMMAND --help shows its flags. Exit codes: 2 user error, 3 resources, 4 data, 5 internal.
Several processes: torchrun --nproc_per_node N -m penstock ppo ..."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code; a user's error is one paragraph on stderr, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    try:
        _run(name, arguments[1:])
        sys.stdout.flush()
    except PenstockError as error:
        print(f"penstock {name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # penstock generate ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        problem = _refused(error)
        if problem is not None:
            print(f"penstock {name}: {problem}", file=sys.stderr)
            sys.exit(problem.exit_code)
        import traceback

        traceback.print_exc()
        print(f"penstock {name}: internal error ({type(error).__name__}): please report it.", file=sys.stderr)
        sys.exit(5)


def _run(name: str, arguments: list[str]) -> None:
    if name in ("", "-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())))
        sys.stdout.flush()
        sys.exit(0 if name else 2)
    if name == "--version":
        from penstock import __version__

        print(f"penstock {__version__}")
        return
    _command(name)(arguments)


def _command(name: str) -> Callable[[list[str]], None]:
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        raise UserError(f"no command {name!r}; {hint}")
    return globals()[f"_{name}"]


def _sft(arguments: list[str]) -> None:
    from penstock.config import SFTConfig
    from penstock.flags import parse

    config = parse(SFTConfig, arguments, "sft")
    from penstock.algorithms.sft import sft

    sft(config)


def _reward(arguments: list[str]) -> None:
    from penstock.config import RewardConfig
    from penstock.flags import parse

    config = parse(RewardConfig, arguments, "reward")
    from penstock.algorithms.reward import reward

    reward(config)


def _ppo(arguments: list[str]) -> None:
    from penstock.config import PPOConfig
    from penstock.flags import parse

    config = parse(PPOConfig, arguments, "ppo")
    from penstock.algorithms.ppo import ppo

    ppo(config)


def _resume(arguments: list[str]) -> None:
    from penstock.config import PPOConfig, ResumeConfig, RewardConfig, SFTConfig
    from penstock.flags import from_dict, parse, to_dict
    from penstock.run.directory import RunDirectory

    if arguments and not arguments[0].startswith("-"):
        if len(arguments) > 1 and not arguments[1].startswith("-"):
            raise UserError("give exactly one RUN, a run directory: everything else is in its config.toml.")
        arguments = ["--run", *arguments]  # penstock resume RUN
    place = to_dict(parse(ResumeConfig, arguments, "resume"))
    path = place.pop("run")
    saved = RunDirectory.peek(path)
    configs = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
    command = str(saved.pop("command"))
    if command not in configs:
        raise UserError(f"{path}/config.toml: no command {command!r} can be resumed; there are {', '.join(configs)}.")
    config: Any = from_dict(configs[command], {**saved, "out": path, **place})
    if command == "sft":
        from penstock.algorithms.sft import sft

        sft(config, resume=True)
    elif command == "reward":
        from penstock.algorithms.reward import reward

        reward(config, resume=True)
    else:
        from penstock.algorithms.ppo import ppo

        ppo(config, resume=True)


def _generate(arguments: list[str]) -> None:
    from penstock.config import GenerateConfig
    from penstock.flags import parse

    config = parse(GenerateConfig, arguments, "generate")
    from penstock.commands.generate import generate

    generate(config)


def _chat(arguments: list[str]) -> None:
    from penstock.config import ChatConfig
    from penstock.flags import parse

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]  # penstock chat RUN
    config = parse(ChatConfig, arguments, "chat")
    from penstock.commands.generate import chat

    chat(config)


def _serve(arguments: list[str]) -> None:
    from penstock.flags import parse
    from penstock.serve.config import ServeConfig

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]  # penstock serve RUN [RUN2 ...]
    config = parse(ServeConfig, arguments, "serve")
    from penstock.serve.server import serve

    serve(config)


def _export(arguments: list[str]) -> None:
    from penstock.config import ExportConfig
    from penstock.flags import parse

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]  # penstock export RUN --out DIR
    config = parse(ExportConfig, arguments, "export")
    from penstock.commands.export import export

    print(f"wrote {export(config)}")


def _data(arguments: list[str]) -> None:
    if arguments[:1] == ["export"]:
        _export_votes(arguments[1:])
        return
    if not arguments or {"-h", "--help"} & set(arguments):
        print(
            "usage: penstock data check FILE [FILE ...]\n       penstock data export --votes --out FILE\n\n"
            "check says what files are and names each bad line; exit 4 if any. export --votes writes what people\n"
            "preferred in the chat page as comparisons, which penstock reward reads."
        )
        sys.exit(0 if arguments else 2)
    if arguments[0] != "check" or len(arguments) < 2:
        raise UserError(f"no such use: data {' '.join(arguments)}; try penstock data check FILE.")
    from penstock.data.formats import check

    report = check(arguments[1:])
    print(report.text)
    sys.exit(4 if report.bad else 0)


def _export_votes(arguments: list[str]) -> None:
    from penstock.config import VotesConfig
    from penstock.flags import parse

    rest = [one for one in arguments if one != "--votes"]
    if rest == arguments and not {"-h", "--help"} & set(arguments):
        raise UserError("data export writes votes only: penstock data export --votes --out FILE.")
    config = parse(VotesConfig, rest, "data export --votes")
    from penstock.commands.votes import export

    print(export(config))


def _plan(arguments: list[str]) -> None:
    from penstock.config import PlanConfig
    from penstock.flags import parse

    config = parse(PlanConfig, arguments, "plan")
    from penstock.commands.plan import run

    code = run(config)
    sys.stdout.flush()
    sys.exit(code)


def _bench(arguments: list[str]) -> None:
    from penstock.flags import parse

    if arguments[:1] == ["micro"]:
        from penstock.commands.bench.config import MicroConfig

        ceilings = parse(MicroConfig, arguments[1:], "bench micro")
        from penstock.commands.bench.micro import micro

        micro(ceilings)
    elif arguments[:1] == ["capacity"]:
        from penstock.commands.bench.config import CapacityConfig

        budget = parse(CapacityConfig, arguments[1:], "bench capacity")
        from penstock.commands.bench.capacity import capacity

        capacity(budget)
    elif arguments and not arguments[0].startswith("-"):
        raise UserError(f"no such use: bench {arguments[0]}; there are bench, bench micro and bench capacity.")
    else:
        from penstock.commands.bench.config import BenchConfig

        config = parse(BenchConfig, arguments, "bench")
        from penstock.commands.bench.run import bench

        bench(config)


def _demo(arguments: list[str]) -> None:
    from penstock.config import DemoConfig
    from penstock.flags import parse

    config = parse(DemoConfig, arguments, "demo")
    from penstock.commands.demo import demo

    demo(config)


def _doctor(arguments: list[str]) -> None:
    if arguments:
        print(f"usage: penstock doctor\n\n{COMMANDS['doctor']}")
        sys.exit(0 if arguments[0] in ("-h", "--help") else 2)
    from penstock.commands.doctor import doctor

    sys.exit(doctor())


def _refused(error: Exception) -> PenstockError | None:
    """What the machine would not give, in words, or None when the error is something else."""
    import errno

    # On a CPU torch says "DefaultCPUAllocator: can't allocate memory" in a plain RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return ResourceError(
            "out of memory; give a smaller --micro-batch-size, a smaller --max-length or --dtype bf16. "
            "Checkpoints that were written are intact: penstock resume RUN."
        )
    if not isinstance(error, OSError):
        return None
    where = f"{error.filename}: " if error.filename else ""
    resources = {
        errno.ENOSPC: "the disk is full; free some space and try again; checkpoints that were written are intact.",
        errno.EDQUOT: "the disk quota is used up; free some space and try again; written checkpoints are intact.",
        errno.EMFILE: "too many open files; raise ulimit -n.",
    }
    mistakes = {
        errno.EROFS: "the file system is read-only; choose another place.",
        errno.EACCES: "permission denied; choose a place that you may read and write.",
    }
    if error.errno in resources:
        return ResourceError(where + resources[error.errno])
    return UserError(where + mistakes[error.errno]) if error.errno in mistakes else None
