"""The commands as a user types them: help, errors, exit codes, and a whole small run of each stage."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import cli
from penstock.commands.config import ChatConfig, GenerateConfig
from penstock.config import PPOConfig, SFTConfig
from penstock.data.toyland import save_tokenizer
from penstock.errors import UserError
from penstock.flags import flags_of, from_dict, parse, to_dict, with_absolute_paths
from penstock.run.directory import SIGNATURE
from penstock.serve.config import ServeConfig
from tests.conftest import PATIENCE, comparisons, demonstrations, last_model
from tests.zygote import zygotic


def run(*arguments, **options):
    """The real command in a process of its own."""
    command = zygotic("-m", "penstock", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


def exit_of(capsys, *arguments):
    """(exit code, stdout, stderr) of a command run in this process."""
    code = 0
    try:
        cli.main([str(word) for word in arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, *capsys.readouterr()


def refused(capsys, code, text, *arguments):
    """The command ends with this code, and this text is in what it writes to stderr."""
    stopped_with, _, err = exit_of(capsys, *arguments)
    assert stopped_with == code
    assert text in err
    return err


def passes(*arguments, **options):
    """The real command in a process of its own, which succeeds."""
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("command", ["ppo", "serve", "bench capacity"])
def test_help_shows_flags_without_importing_torch(command):
    script = (
        "import sys\nfrom penstock.cli import main\n"
        f"try:\n    main('{command} --help'.split())\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_help_lists_every_command(capsys):
    code, out, _ = exit_of(capsys, "--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_opens_with_an_example_and_every_flag_has_a_sentence(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = exit_of(capsys, *command.split(), "--help")
    assert code == 0
    assert out.index("example:\n  penstock " + command) < (out + "required:").index("required:")
    assert max(map(len, out.splitlines())) <= 100  # the usage and the example are not wrapped
    flags = flags_of(cli.load(cli.COMMANDS[command].config))
    assert all(flag.text.endswith(".") for flag in flags if "://" not in flag.text)
    assert all(flag.spelling[2:] in out or flag.name == cli.COMMANDS[command].positional for flag in flags)


def test_words_that_belong_to_no_flag_are_the_positional():
    assert parse(ServeConfig, ["a", "b=c", "--port", "0", "d"], "serve", "model").model == ("a", "b=c", "d")
    assert parse(ChatConfig, ["--json", "a"], "chat", "model") == parse(ChatConfig, ["--model=a", "--json"], "chat")


SFT = "sft --model {model} --data {data} --out {tmp}/run"
PPO = "ppo --actor {model} --reward {model} --data {data} --out {tmp}/run"


@pytest.mark.parametrize(("line", "text"), [
    ("pp", "did you mean ppo?"),
    ("sft --model nowhere/at/all --data x.jsonl --out {tmp}/run", "no such model directory"),
    ("sft --model {model} --data {tmp}/no.jsonl --out {tmp}/run", "no such file"),
    ("sft --model {model} --data {data} --out {tmp}", "exists and is not empty"),
    ("sft --model {model} --data {data} --out /proc/nothing/run", "cannot be written"),
    (f"{SFT} --strategy x", "no such strategy"), (f"{SFT} --lr nan", "--lr nan: must be above 0"),
    (f"{SFT} --steps 0", "--steps 0: must be at least 1"), (f"{SFT} --device cudaa", "this machine has cpu"),
    ("sft --config {tmp}/no.toml", "No such file"), (f"{PPO} --max-length 32 --max-new-tokens 8", "is no reward model"),
    (f"{PPO} --ptx-coef 0.1", "belong together"), (f"{PPO} --temperature 0", "--temperature 0"),
    (f"{PPO} --max-new-tokens 32", "leave no room for a prompt in rows of 32; give --max-new-tokens 16"),
    ("resume {tmp}", "is no run directory"),
    ("resume a b", "exactly one RUN"), ("chat a --model b", "exactly one MODEL"),
    ("ppo --lrr 1", "no flag --lrr; did you mean --lr?"), ("sft x", "unexpected 'x'"),
    ("sft --model m --data d", "--out is missing"), ("sft --lr", "--lr: a value is missing"),
    ("sft --steps 1.5", "--steps 1.5: give a whole number"),
    ("plan --model s --dtype x", "--dtype x: there are fp32, bf16"),
    ("bench x", "try penstock bench or penstock bench micro"), ("export {tmp} --out {tmp}/x", "is no run directory"),
    ("generate --model {model}", "either --prompt TEXT or --data FILE"),
    ("generate --model {model} --prompt hi --top-p 2", "must be above 0 and at most 1"),
    ("generate --model {model} --data {data} --out /proc/x/y.jsonl --max-new-tokens 2", "cannot be written"),
    ("data check {tmp}/no.jsonl", "no such file"), ("data look", "penstock data check FILE"),
    ("data check no/data", "as a dataset on the hub it"), ("data show {data}", "--model is missing"),
    ("demo --out /proc/demo", "cannot be written"), ("demo --seeds 0", "must be at least 1"),
])  # fmt: skip
def test_a_user_error_is_one_paragraph(capsys, tmp_path, tiny_model, jsonl, line, text):
    names = {"tmp": tmp_path, "model": tiny_model(), "data": jsonl(demonstrations(8))}
    err = refused(capsys, 2, text, *(word.format(**names) for word in line.split()))
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unknown_key_in_a_config_file_is_named_with_the_nearest(capsys, tmp_path):
    (tmp_path / "run.toml").write_text('model = "m"\nlearning_rte = 1\nbatch_sise = 4\n')
    refused(capsys, 2, "learning_rte", "sft", "--config", tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text("batch_sise = 4\n")
    assert "did you mean batch_size?" in exit_of(capsys, "sft", "--config", tmp_path / "run.toml")[2]


def test_only_the_known_sections_group_keys(capsys, tmp_path):
    (tmp_path / "run.toml").write_text('model = "m"\n[optin]\nlr = 1.0\n')
    refused(capsys, 2, "unknown key 'optin'", "sft", "--config", tmp_path / "run.toml")


def test_none_turns_off_numbers_and_is_a_word_elsewhere():
    flags = "--actor a --reward r --data d --out o --missing-eos-score none --value-clip None"
    ppo = parse(PPOConfig, flags.split())
    assert ppo.ppo.missing_eos_score is None
    assert ppo.ppo.value_clip is None
    assert parse(GenerateConfig, ["--model", "m", "--prompt", "none"]).prompt == "none"


def test_a_runs_own_config_repeats_it_from_anywhere(capsys, tmp_path, tiny_model, jsonl, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(), jsonl(demonstrations(8))
    flags = ("--max-length", 32, "--batch-size", 4, "--steps", 2, "--samples", 1, "--max-new-tokens", 4)
    assert exit_of(capsys, "sft", "--model", "model", "--data", "data.jsonl", "--out", "first", *flags)[0] == 0
    monkeypatch.chdir("/")
    again = ("sft", "--config", tmp_path / "first" / "config.toml", "--out", tmp_path / "again")
    assert exit_of(capsys, *again)[0] == 0
    assert (tmp_path / "first/metrics.jsonl").read_bytes() == (tmp_path / "again/metrics.jsonl").read_bytes()
    assert exit_of(capsys, "resume", tmp_path / "first")[0] == 0
    refused(capsys, 2, "is of penstock sft", "reward", *again[1:-1], tmp_path / "other")


def test_reward_functions_mean_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fn.py", "schema.json", "number"):
        (tmp_path / name).write_text("")
    addresses = ["fn.py:score", "json_schema:schema.json", "number", "regex:number|fn.py"]
    expected = [f"{tmp_path}/fn.py:score", f"json_schema:{tmp_path}/schema.json", *addresses[2:]]
    assert with_absolute_paths({"reward_fn": addresses})["reward_fn"] == expected


def test_weights_are_numbers_on_the_command_line_and_in_a_file(tmp_path):
    words = ["--actor", "m", "--data", "d", "--out", "o", "--reward-fn", "number", "f.py:g"]
    config = parse(PPOConfig, [*words, "--reward-weights", "1", "0.5"])
    assert config.reward_weights == (1.0, 0.5)
    assert from_dict(PPOConfig, to_dict(config)) == config
    assert from_dict(PPOConfig, to_dict(config) | {"reward_fn": "f.py:g", "reward_weights": []}).reward_fn == (
        "f.py:g",
    )


def test_a_run_whose_data_has_changed_is_not_resumed(capsys, tmp_path, tiny_model, jsonl):
    data = jsonl(demonstrations(8))
    flags = ("--max-length", 32, "--batch-size", 4, "--steps", 2, "--samples", 1, "--max-new-tokens", 4)
    exit_of(capsys, "sft", "--model", tiny_model(), "--data", data, "--out", tmp_path / "run", *flags)
    Path(data).write_text("\n".join(reversed(Path(data).read_text().splitlines())) + "\n")
    refused(capsys, 2, "has changed since step-000002", "resume", tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text('command = "foo"\n')
    assert exit_of(capsys, "resume", tmp_path / "run")[0] == 2


def test_a_run_that_was_killed_while_it_wrote_config_toml_begins_again(capsys, tmp_path, tiny_model, jsonl):
    out, data = tmp_path / "run", jsonl(demonstrations(8))
    out.mkdir()
    for name in ("lock", "log.txt", "config.toml.tmp-77"):
        (out / name).write_text("half of a l")
    flags = ("--max-length", 32, "--batch-size", 4, "--steps", 1, "--samples", 1, "--max-new-tokens", 4)
    assert exit_of(capsys, "sft", "--model", tiny_model(), "--data", data, "--out", out, *flags)[0] == 0
    assert not list(out.glob("*.tmp-*"))


def test_half_a_letter_in_a_file_does_not_end_a_command_that_prints_it(tiny_model):
    model = Path(tiny_model())
    config = json.loads((model / "config.json").read_text()) | {"model_type": "gpt2\ud800"}
    (model / "config.json").write_text(json.dumps(config))
    done = run("doctor", str(model))
    assert "internal error" not in done.stderr
    assert "gpt2\\ud800" in done.stdout + done.stderr


def test_what_other_libraries_say_stands_in_one_paragraph():
    assert str(UserError("x: cannot be read (thrift: bad\n  data\n); fetch it again.")) == (
        "x: cannot be read (thrift: bad data ); fetch it again."
    )


def test_a_run_from_before_truncate_goes_on_with_the_rows_that_it_cut(capsys, tmp_path, tiny_model, jsonl):
    data = jsonl([*demonstrations(8), {"prompt_ids": [1, 3], "response_ids": [4] * 40}])
    flags = ("--max-length", 32, "--batch-size", 4, "--steps", 2, "--samples", 1, "--max-new-tokens", 4)
    arguments = ("--model", tiny_model(), "--data", data, "--out", tmp_path / "run", *flags)
    assert exit_of(capsys, "sft", *arguments, "--truncate", "right")[0] == 0
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().partition(SIGNATURE)[0].replace('truncate = "right"\n', ""))
    code, _, err = exit_of(capsys, "resume", tmp_path / "run")
    assert (code, "1 answers cut at --max-length" in err) == (0, True)


def test_a_failed_export_leaves_nothing(capsys, tmp_path, tiny_model, jsonl, monkeypatch):
    flags = ("--max-length", 32, "--batch-size", 4, "--steps", 1, "--samples", 1, "--max-new-tokens", 4)
    exit_of(capsys, "sft", "--model", tiny_model(), "--data", jsonl(demonstrations(8)), "--out", tmp_path / "r", *flags)

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    refused(capsys, 3, "the disk is full", "export", tmp_path / "r", "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_flags_win_over_the_config_file(tmp_path):
    (tmp_path / "run.toml").write_text('model = "m"\ndata = ["a", "b"]\nout = "o"\nlr = 1e-3\n[optim]\nepochs = 3\n')
    config = parse(SFTConfig, ["--config", str(tmp_path / "run.toml"), "--lr", "5e-4"])
    assert (config.optim.lr, config.optim.epochs, config.data.data) == (5e-4, 3, ("a", "b"))
    assert from_dict(SFTConfig, to_dict(config)).optim == config.optim


def test_bad_data_stops_with_4_and_writes_nothing(capsys, tmp_path, tiny_model):
    (tmp_path / "bad.jsonl").write_text('{"prompt_ids": [1], "response_ids": [99]}\n{"prompt_ids": [1]\n')
    arguments = ("sft", "--model", tiny_model(), "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "run")
    refused(capsys, 4, "bad.jsonl:2: line: not valid JSON", *arguments)
    assert not (tmp_path / "run").exists()


def test_the_three_stages_then_generate_export_and_chat(tmp_path, tiny_model, jsonl):
    """One tiny walk through the real commands, with a tokenizer, in processes of their own."""
    texts = [f"Question {i}: what is {i}?\n" for i in range(24)]
    model = tiny_model(vocab_size=300, max_length=64)
    save_tokenizer(Path(model), texts, vocab_size=300)
    shared = ("--max-length", 64, "--batch-size", 8, "--micro-batch-size", 8, "--steps", 2)
    sft_data = jsonl([{"prompt": t, "response": f"It is {i}."} for i, t in enumerate(texts)], "sft.jsonl")
    done = passes("sft", "--model", model, "--data", sft_data, "--out", tmp_path / "sft", *shared, "--json")
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [1, 2]

    ranked = jsonl([{"prompt": t, "chosen": "It is so.", "rejected": "Who knows"} for t in texts], "ranked.jsonl")
    passes("reward", "--model", tmp_path / "sft", "--data", ranked, "--out", tmp_path / "reward", *shared)

    prompts = jsonl([{"prompt": t} for t in texts], "prompts.jsonl")
    scored = ["--actor", tmp_path / "sft", "--reward", tmp_path / "reward", "--data", prompts]
    passes("ppo", *scored, "--out", tmp_path / "ppo", *shared, "--max-new-tokens", 8)
    for name in ("config.toml", "metrics.jsonl", "perf.jsonl", "samples.jsonl", "log.txt", "report.html"):
        assert (tmp_path / "ppo" / name).stat().st_size > 0

    flags = ["--n", 2, "--max-new-tokens", 4, "--batch-size", 5]
    passes("generate", "--model", tmp_path / "ppo", "--data", prompts, "--out", tmp_path / "out.jsonl", *flags)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 48
    assert set(rows[0]) == {"prompt", "response", "prompt_ids", "response_ids", "logprobs", "finish_reason"}
    assert all(len(row["logprobs"]) == len(row["response_ids"]) <= 4 for row in rows)

    passes("export", tmp_path / "ppo", "--out", tmp_path / "exported")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")(texts[0]).input_ids[0] == 1

    typed = "hello\n" + "much too long " * 300 + "\n/reset\nagain\n/quit\n"
    done = passes("chat", tmp_path / "ppo", "--max-new-tokens", 4, "--json", input=typed)
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [{"response"}] * 2
    assert "was not sent" in done.stderr


def test_reward_runs_on_token_ids_and_reports_its_accuracy(tmp_path, tiny_model, jsonl):
    data = jsonl(comparisons(60))
    flags = ["--lr", "1e-2", "--epochs", 10, "--batch-size", 16, "--max-length", 32, "--eval-every", 10]
    passes("reward", "--model", tiny_model(), "--data", data, "--out", tmp_path / "run", *flags)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["heldout/accuracy"] > 0.8
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(last_model(tmp_path / "run"))
    assert model.score.weight.shape == (1, 16)


def test_doctor_prints_one_json_object():
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["facts"]["python"][0].startswith(platform.python_version())
    assert bool(found["problems"]) == (done.returncode == 3)


def test_doctor_says_ready():
    done = run("doctor")
    assert "ready to train" in done.stdout + done.stderr or done.returncode == 3


@pytest.mark.parametrize(("error", "code", "text"), [
    (MemoryError(), 3, "smaller --micro-batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), 3, "out of memory"),
    (OSError(28, "No space left on device", "/data/x"), 3, "/data/x: the disk is full"),
    (OSError(5, "Input/output error"), 3, "penstock doctor: the disk reports an input/output error. See what the"),
    (OSError(22, "Invalid argument"), 5, "internal error (OSError)"),
    (ZeroDivisionError(), 5, "internal error (ZeroDivisionError)"), (KeyboardInterrupt(), 130, ""),
])  # fmt: skip
def test_what_the_machine_refuses_has_its_own_exit_code(capsys, monkeypatch, error, code, text):
    def refuse(config):
        raise error

    monkeypatch.setattr("penstock.commands.doctor.doctor", refuse)
    err = refused(capsys, code, text, "doctor")
    assert ("Traceback" in err) == (code == 5)


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m penstock --help | head -c 1"
    assert subprocess.run(command, shell=True, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("words", "candidates"),
    [
        ([""], {"sft", "ppo", "data", "completion"}),
        (["p"], {"plan", "ppo"}),
        (["data", ""], {"check", "show", "export"}),
        (["data", "show", "--m"], {"--max-length", "--model"}),
        (["sft", "--lr-sch"], {"--lr-schedule"}),
        (["sft", "--lr-schedule", "l"], {"linear"}),
        (["sft", "--no-p"], {"--no-padding-free"}),
        (["sft", "--data", ""], set()),  # the shell names files
        (["sft", "--json", "--see"], {"--seed"}),
        (["nothing", ""], set()),
    ],
)  # fmt: skip
def test_words_are_completed(words, candidates, capsys):
    code, out, _ = exit_of(capsys, "--complete", *words)
    assert code == 0
    printed = set(out.split())
    assert printed >= candidates if words == [""] or words[-1] == "--m" else printed == candidates


def test_bash_completes_a_flag_through_the_printed_script(tmp_path, capsys):
    code, out, _ = exit_of(capsys, "completion", "bash")
    assert code == 0
    script = tmp_path / "completion"
    script.write_text(
        f'penstock() {{ "{sys.executable}" -m penstock "$@"; }}\n{out}'
        "COMP_WORDS=(penstock grpo --lr-sch); COMP_CWORD=2\n_penstock\necho ${COMPREPLY[@]}\n"
    )
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.split() == ["--lr-schedule"], done.stderr


def test_a_quiet_run_prints_warnings_alone_and_logs_everything(tmp_path, tiny_model, jsonl, capsys):
    files = ("--model", tiny_model(), "--data", jsonl(demonstrations(4)), "--out", tmp_path / "run")
    flags = ("--steps", 2, "--batch-size", 2, "--heldout", 0, "--max-length", 20)
    code, out, err = exit_of(capsys, "sft", *files, *flags, "--quiet")
    assert (code, out) == (0, "")
    assert all("WARNING" in line for line in err.splitlines()), err
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "sft 2/2" in log
    assert "wrote" in log


def test_a_config_is_made_of_flags_by_their_names():
    config = SFTConfig.of(model="m", data="a.jsonl", out="runs/a", lr=1e-4, lora_targets=["q_proj"], steps=None, lora=4)
    words = "--model m --data a.jsonl --out runs/a --lr 1e-4 --lora-targets q_proj --lora 4"
    same = parse(SFTConfig, words.split())
    assert config == same
    for flags, complaint in (
        ({"model": "m", "data": "a", "out": "b", "learning_rate": 1}, "SFTConfig: unknown key 'learning_rate'"),
        ({"model": "m", "data": "a"}, "SFTConfig: out is missing"),
        ({"model": "m", "data": "a", "out": "b", "steps": "many"}, "SFTConfig: steps"),
        ({"model": "m", "data": "a", "out": "b", "batch_size": 0}, "--batch-size 0"),
    ):
        with pytest.raises(UserError, match=complaint):
            SFTConfig.of(**flags)
