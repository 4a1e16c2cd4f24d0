"""A client's folder, and a server of little memory and no network that reads such folders."""

import hashlib
import json
import subprocess
import sys

import pytest
from helpers import statistics_alone, with_statistics

from fedmitr.upload import CARD, STATISTICS, WEIGHTS, Card

LOAD_ALL = """
import resource, socket, sys
from pathlib import Path
import fedmitr as fm

def refuse(*_, **__):
    raise SystemExit("went to the network")

socket.socket.connect = socket.getaddrinfo = refuse
if sys.platform == "linux":
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**30,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        fm.Upload.load(Path(folder))
    except fm.BadInput as error:
        print(error)
kilobyte = 1024 if sys.platform == "darwin" else 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // kilobyte)
"""


@pytest.fixture
def saved(uploads, tmp_path):
    """The folder of client 1's upload: weights and class histogram."""
    uploads[1].save(tmp_path / "client1")
    return tmp_path / "client1"


@pytest.fixture
def whole(uploads):
    """Client 1's upload with all that can be sent."""
    return with_statistics(uploads[1])


@pytest.fixture
def alone(whole):
    """Client 1's statistics and nothing else."""
    return statistics_alone(whole)


@pytest.fixture
def refused_frugally():
    """refused_frugally(folders): the lines that refuse them, from a process that takes at most 200 MB."""

    def load(folders):
        words = [sys.executable, "-c", LOAD_ALL, *map(str, folders)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        *lines, kilobytes = done.stdout.splitlines()
        assert int(kilobytes) < 200_000
        return lines

    return load


@pytest.fixture
def seal():
    """seal(folder): state the checksum of what is there, as a client does that knows what it sends."""

    def write(folder):
        tree = json.loads((folder / CARD).read_text())
        tree.pop("sha256", None)
        sent = [WEIGHTS] * (tree.get("weights", True) is True) + [STATISTICS] * ("features" in tree)
        digests = "".join(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sent)
        tree["sha256"] = hashlib.sha256((digests + Card(**tree).model_dump_json()).encode()).hexdigest()
        (folder / CARD).write_text(json.dumps(tree))

    return write
