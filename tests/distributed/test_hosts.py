"""Two hosts of two ranks each, on one machine: namespaces of their own for network, processes and name, and a cable.

sudo python -m pytest -m slow tests/distributed/test_hosts.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, demonstrations, last_model, metrics, save_tiny, write_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")), reason="makes network namespaces"
    ),
]
STEPS = 40
UNHURRIED = """
import sys, time
from penstock.cli import main
from penstock.run.session import Session

log = Session.log

def rests(self, *args, **options):
    time.sleep(0.3)
    log(self, *args, **options)

Session.log = rests
main(sys.argv[1:])
"""


def run(*words):
    subprocess.run(words, check=True)


class Host:
    """A network namespace with one interface, eth0, and what is started in it."""

    def __init__(self, number, folder):
        self.number, self.folder, self.space = number, folder, f"penstock-{os.getpid()}-{number}"
        self.address = f"10.77.0.{number}"
        self.machine = None
        run("ip", "netns", "add", self.space)
        self.etc = Path("/etc/netns") / self.space  # what `ip netns exec` shows in /etc: the host knows its own name
        self.etc.mkdir(parents=True)
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} host-{number}\n")

    def ip(self, *words):
        run("ip", "-n", self.space, *words)

    def start(self, out):
        """torchrun with two ranks, as process 1 of the host: all of them end with it."""
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=3",
            "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500", f"--rdzv-id={out.name}",
            f"--local-addr={self.address}", self.folder / "unhurried.py",
        ]  # fmt: skip
        sft = [
            "sft", "--model", self.folder / "model", "--data", self.folder / "data.jsonl", "--out", out,
            "--device", "cpu", "--strategy", "gemini", "--max-length", "32", "--batch-size", "6",
            "--micro-batch-size", "2", "--steps", STEPS, "--checkpoint-every", "5", "--resume-if-present",
        ]  # fmt: skip
        name = f'hostname host-{self.number}; exec "$@"'
        launch = ["ip", "netns", "exec", self.space, "unshare", "--pid", "--uts", "--fork", "--mount-proc",
                  "--kill-child", "sh", "-c", name, "sh"]  # fmt: skip
        # Without the last one torch 2.13's first host does not tell a new second host where the ranks meet.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with (self.folder / f"{out.name}-{self.number}.log").open("ab") as log:
            words = [*map(str, (*launch, *torchrun, *sft))]
            self.machine = subprocess.Popen(words, env=environment, stdout=log, stderr=log)

    def die(self):
        """The cable first: a host without power says goodbye to nobody."""
        self.ip("link", "set", "eth0", "down")
        self.machine.send_signal(signal.SIGKILL)
        self.machine.wait(PATIENCE)
        time.sleep(2)
        self.ip("link", "set", "eth0", "up")

    def remove(self):
        if self.machine is not None and self.machine.poll() is None:
            self.machine.kill()
            self.machine.wait(PATIENCE)
        subprocess.run(["ip", "netns", "del", self.space], check=False)
        shutil.rmtree(self.etc, ignore_errors=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    save_tiny(folder / "model")
    write_jsonl(folder / "data.jsonl", demonstrations(20))
    (folder / "unhurried.py").write_text(UNHURRIED)
    first, second = both = [Host(number, folder) for number in (1, 2)]
    try:
        cable = ["eth0", "netns", first.space, "type", "veth", "peer", "name", "eth0", "netns", second.space]
        run("ip", "link", "add", *cable)
        for host in both:
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            host.ip("link", "set", "lo", "up")
        yield both
    finally:
        for host in both:
            host.remove()


def finished(hosts, out):
    """The weights after the run, which both hosts end well."""
    for host in hosts:
        code = host.machine.wait(PATIENCE)
        assert code == 0, (host.folder / f"{out.name}-{host.number}.log").read_text()[-4000:]
    return (last_model(out) / "model.safetensors").read_bytes()


def wait_for(out, steps):
    deadline = time.monotonic() + PATIENCE
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def unharmed(hosts):
    out = hosts[0].folder / "unharmed"
    for host in hosts:
        host.start(out)
    return out, finished(hosts, out)


def test_a_host_that_dies_and_comes_back_costs_the_steps_since_the_last_checkpoint(hosts, unharmed):
    out = hosts[0].folder / "harmed"
    for host in hosts:
        host.start(out)
    wait_for(out, 12)
    hosts[1].die()
    hosts[1].start(out)
    assert finished(hosts, out) == unharmed[1]
    assert metrics(out) == metrics(unharmed[0])
    assert "resumed from step-0000" in (out / "log.txt").read_text()


def test_a_cable_that_is_out_for_ten_seconds_ends_nothing(hosts, unharmed):
    out = hosts[0].folder / "unplugged"
    for host in hosts:
        host.start(out)
    wait_for(out, 8)
    hosts[1].ip("link", "set", "eth0", "down")
    time.sleep(10)
    hosts[1].ip("link", "set", "eth0", "up")
    assert finished(hosts, out) == unharmed[1]
    assert "resumed" not in (out / "log.txt").read_text()
