"""Flower in real processes of this machine: for tools/flower_run.py and tests/test_flower.py."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent

# `flower-supernode` with Flower's shortest heartbeat: a node that is gone is noticed in 20 s instead of 60.
SUPERNODE = """
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.supercore import heartbeat
from flwr.supernode import cli, fleet_http_connection

heartbeat.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_MIN_INTERVAL
fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_MIN_INTERVAL
cli.flower_supernode()
"""


class Cluster:
    """A SuperLink and a SuperNode for each client, every process with its output in NAME.log of the folder.

    Client k's store is the folder nodeK, the server's `server`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}

    def begin(self, clients: int) -> None:
        """Start the SuperLink and one SuperNode for each client; RuntimeError where it does not start."""
        port = free_port()
        (self.folder / "flwr").mkdir()
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        link = ["--insecure", "--host", "127.0.0.1", "--port", str(port)]
        link = self.start("superlink", "flower-superlink", *link, "--disable-runtime-dependency-installation")
        wait_until(lambda: listens(port) or link.poll() is not None, 60)
        if link.poll() is not None:
            raise RuntimeError(self.logs())
        for k in range(clients):
            given = f'partition-id={k} num-partitions={clients} store="{self.folder / f"node{k}"}"'
            words = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--node-config", given]
            self.start(f"node{k}", sys.executable, "-c", SUPERNODE, "--insecure", *words)

    def start(self, name: str, *words: str) -> subprocess.Popen:
        """Start a process with its output in NAME.log."""
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                words, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return self.processes[name]

    def run(self, name: str, **config: Any) -> None:
        """Start a run with this run config; its model will be NAME.safetensors."""
        config |= {"out": f"{self.folder / name}.safetensors", "store": str(self.folder / "server")}
        given = " ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in config.items())
        self.start(name, "flwr", "run", str(ROOT / "flower"), "here", "--stream", "--run-config", given)

    def kill(self, name: str) -> None:
        """Kill a process that was started, with all that it started."""
        kill(self.processes[name])

    def log(self, name: str) -> str:
        """Read NAME.log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """Return the end of every log."""
        return "\n".join(self.log(path.stem)[-2000:] for path in self.folder.glob("*.log"))

    def wait_for(self, name: str, words: str, times: int = 1, seconds: float = 180) -> None:
        """Wait until NAME's log holds words so many times; RuntimeError with all logs where it will not."""

        def told() -> bool:
            return self.log(name).count(words) >= times

        wait_until(lambda: self.processes[name].poll() is not None or told(), seconds)
        if not told():
            raise RuntimeError(self.logs())


@contextlib.contextmanager
def cluster(folder: Path, clients: int) -> Iterator[Cluster]:
    """Start a `Cluster` in an empty folder; in the end, however it comes, kill all that was started."""
    made = Cluster(folder)
    try:
        made.begin(clients)
        yield made
    finally:
        kill(*made.processes.values())


def kill(*processes: subprocess.Popen) -> None:
    """Kill these and all that they started, which Flower puts into sessions of their own."""
    found = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()  # what is stopped starts nothing more
            found += process.children()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.wait(10)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most so many seconds; return whether it came."""
    end = time.monotonic() + seconds
    while not (done := true()) and time.monotonic() < end:
        time.sleep(0.2)
    return done
