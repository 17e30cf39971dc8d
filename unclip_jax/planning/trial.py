"""Runs one attempt of a search for settings in a process of its own.

That process ends as soon as the compiler has told how much memory is needed, whatever the compiler is still doing.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unclip_jax.errors import UserError


def run(config: ConfigDict, topology: str, model_flops: int) -> dict[str, Any]:
    """Returns the plan of a train step, as of `cost.plan_training` with quick=True and propose=False.

    topology: as on the command line. model_flops: FLOPs of the step by the model's formula. Raises UserError where the
    process, which is planning/__main__.py, fails; it has then said why on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="unclip_jax_plan_") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({"config": config.to_dict()}))
        command = [sys.executable, "-m", __package__, str(file), topology, str(model_flops)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"a trial of other settings for {topology} failed (exit status {done.returncode}): see above")
    return json.loads(done.stdout.splitlines()[-1])
