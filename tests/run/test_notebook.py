"""Commands in a real Jupyter kernel, where ipykernel is installed: one line that is written over, and an interrupt that
saves."""

import pytest

from penstock.config import SFTConfig
from penstock.flags import to_dict
from penstock.run import checkpoint
from tests.conftest import PATIENCE, metrics, stage_config

jupyter = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")
IMPORTS = "import penstock, time\nfrom penstock.config import SFTConfig\nfrom penstock.flags import from_dict\n"


@pytest.fixture(scope="module")
def kernel():
    manager, client = jupyter.start_new_kernel(startup_timeout=PATIENCE)
    client.execute_interactive(IMPORTS, timeout=PATIENCE)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(kernel, code, interrupt_at=None):
    """The kernel's reply to a cell, and what it sent: (kind of message, content). interrupt_at: the kind of message on
    which the front end's stop button is pressed."""
    manager, client = kernel
    sent = []

    def hook(message):
        sent.append((message["msg_type"], message["content"]))
        if message["msg_type"] == interrupt_at:
            manager.interrupt_kernel()

    return client.execute_interactive(code, timeout=PATIENCE, output_hook=hook)["content"], sent


def training(config: SFTConfig, resume=False):
    return f"run = penstock.sft(from_dict(SFTConfig, {to_dict(config)!r}), resume={resume})"


def texts(sent):
    """All that was printed, as lines."""
    return "".join(content["text"] for kind, content in sent if kind == "stream").splitlines()


def test_a_runs_steps_are_one_output_that_is_written_over(kernel, tmp_path):
    reply, sent = run(kernel, training(stage_config(tmp_path, "sft", "run", steps=60)))
    assert reply["status"] == "ok"
    assert not [line for line in texts(sent) if line.startswith("sft ")]
    assert len(texts(sent)) < 20
    (first,) = [content for kind, content in sent if kind == "display_data"]
    *_, last = [content for kind, content in sent if kind == "update_display_data"]
    assert last["transient"] == first["transient"]
    assert '<progress value="60" max="60"></progress> step 60 of 60' in last["data"]["text/html"]
    assert last["data"]["text/plain"] in (tmp_path / "run" / "log.txt").read_text()
    assert len(metrics(tmp_path / "run")) == 60


def test_the_stop_button_saves_as_ctrl_c_does_and_the_run_goes_on(kernel, tmp_path):
    config = stage_config(tmp_path, "sft", "run", steps=1_000_000, checkpoint_every=1_000_000)
    reply, _ = run(kernel, training(config), interrupt_at="display_data")
    assert (reply["status"], reply["ename"]) == ("error", "StoppedError")
    assert "penstock resume" in reply["evalue"]
    assert len(reply["traceback"]) == 1
    stopped = len(metrics(tmp_path / "run"))
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints", print)
    assert int(newest.name.split("-")[-1]) == stopped

    reply, _ = run(kernel, training(stage_config(tmp_path, "sft", "run", steps=stopped + 3), resume=True))
    assert reply["status"] == "ok"
    assert len(metrics(tmp_path / "run")) == stopped + 3


def test_after_a_run_the_stop_button_is_pythons_again(kernel):
    reply, _ = run(kernel, "print('runs', flush=True)\ntime.sleep(600)", interrupt_at="stream")
    assert reply["ename"] == "KeyboardInterrupt"


def test_an_error_that_a_user_can_mend_is_one_paragraph(kernel, tmp_path):
    reply, _ = run(kernel, f"penstock.sft(SFTConfig.of(model={str(tmp_path)!r}, data='no.jsonl', out='run'))")
    assert reply["traceback"] == [f"UserError: {reply['evalue']}"]
