"""`unclip_jax.train` on a disk that fails now and then: FAULTS is the share of Python's operations on files in WORKDIR,
in any thread, that end in EIO."""

import errno
import os
import random
import sys

from unclip_jax import cli, train

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir", "os.truncate")


def hook(event: str, arguments: tuple) -> None:
    """Refuses an operation, by chance."""
    if event in OPERATIONS and str(arguments[0]).startswith(WORKDIR) and random.random() < SHARE:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[0]))


if __name__ == "__main__":
    SHARE = float(os.environ["FAULTS"])
    (WORKDIR,) = (word.partition("=")[2] for word in sys.argv if word.startswith("--workdir="))
    sys.addaudithook(hook)
    cli.run(train.main)
