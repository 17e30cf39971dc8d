"""One attempt of a search, in a process of its own: it ends as soon as the compiler has told what memory is needed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from unclip_jax.errors import UserError


def run(config: ConfigDict, topology: str, count: int) -> dict:
    """Runs `cost.training` in another process, without cycles. count: FLOPs of a step."""
    with tempfile.TemporaryDirectory(prefix="unclip_jax_plan_") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({"config": config.to_dict()}))
        command = [sys.executable, "-m", __package__, str(file), topology, str(count)]
        places = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=places, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"a trial for {topology} ended without an answer (status {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])
