"""The demo in a process of its own, as `unclip demo` starts it."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from unclip_jax import pictures

ROOT = Path(__file__).parent.parent
# Whoever runs the tests in the background may ignore Ctrl-C, which processes inherit.
PROGRAM = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
PROGRAM += "from unclip_jax.__main__ import main; main()"


def save_files(root, wide, square):
    """Writes wide.png and square.png, noise of these sizes (height, width), and none.png, which is no picture."""
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", wide), ("square.png", square)):
        pictures.save_png(root / name, rng.integers(0, 256, (*shape, 3)).astype(np.uint8))
    (root / "none.png").write_text("no picture")
    return root


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serve(folder, place):
    """Serves the cascade in a folder, with `place` as working and temporary folder: (process, address)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, "demo", "--bundle", str(folder), "--port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=place, env=environment, **pipes)
    try:
        line = process.stdout.readline()
        assert line.startswith("the demo is at http://127.0.0.1:"), line + process.communicate()[1]
        yield process, line.split()[4].rstrip(";")
    finally:
        process.kill()
        process.wait()
