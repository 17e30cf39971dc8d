"""Every test runs on eight simulated devices, with strict dtype and rank promotion, and with shapes checked."""

import os

# Tests compile hundreds of small programs and run each once: LLVM's effort would be most of their time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import functools
import re
import time

import fake_gcs
import jax
import pytest
from jaxtyping import install_import_hook

from unclip_jax import programs

# Before anything imports the package: every call in these folders is checked against its annotations.
install_import_hook(["unclip_jax.diffusion", "unclip_jax.models", "unclip_jax.stages"], "beartype.beartype")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Tests put functions in the place of the package's own, which a program that is kept on the disk would not notice.
# test_programs.py keeps some.
programs.environment, programs.known = functools.lru_cache(lambda device: ""), programs.environment


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips a test that would begin after UNCLIP_TESTS_UNTIL, in seconds since 1970: .ci/run has a limit of time."""
    if time.time() > float(os.environ.get("UNCLIP_TESTS_UNTIL", "inf")):
        pytest.skip("no time is left for it")


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory):
    """A bucket server in a process of its own; from now on gs:// leads to it, in this process and those it starts."""
    with fake_gcs.serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setenv("UNCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        pytest.importorskip("gcsfs")  # which reads one of them when it is imported
        from tensorboardX.record_writer import GCSRecordWriter

        del GCSRecordWriter.__del__  # uploads once more when the process ends, and would wait for this server
        yield server


@pytest.fixture
def bucket(bucket_server, request):
    """A folder of a bucket that no other test uses."""
    return f"gs://bucket/{re.sub(r'[^A-Za-z0-9]+', '_', request.node.nodeid)}"
