"""Serves a page in which anybody draws and edits pictures with a trained cascade.

    python -m unclip_jax.demo --bundle quickstart/bundle
    python -m unclip_jax.demo --bundle hf:OWNER/NAME --host 0.0.0.0 --port 8000

It prints the address to open in a browser; Ctrl-C ends it. The page has a tab for each thing that the cascade can do,
and works without a network. Only this machine can open it, unless --host names an address that others can reach, as
0.0.0.0 does, or --share asks Gradio for a public address, through whose server pictures then pass.
"""

import argparse
import errno
import os
import signal
import socket
import tempfile
import threading
import time
from typing import NoReturn

from unclip_jax import cli
from unclip_jax.errors import UserError
from unclip_jax.paths import SHIPPED

PORT = 7860  # Gradio's own


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("demo", __doc__)
    text = "folder of a trained cascade; gs:// and hf:OWNER/NAME too; default: this package's"
    parser.add_argument("--bundle", default=SHIPPED, help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine to serve at; 0.0.0.0: all it has")
    parser.add_argument("--port", type=cli.whole(1, 2**16 - 1), default=PORT)
    parser.add_argument("--share", action="store_true", help="ask Gradio for a public address, which holds for a week")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> int:
    args = parse(argv)
    check_address(args.host, args.port)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="unclip_demo_", ignore_cleanup_errors=True) as folder:
        # Gradio reads both when it is imported or makes a page.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            serve(args.bundle, args.host, args.port, args.share)
        except KeyboardInterrupt:
            print("the demo has ended")
    return 0


def serve(bundle: str, host: str, port: int, share: bool) -> None:
    """Loads a cascade and serves its page until it is interrupted. Raises UserError where it cannot."""
    from unclip_jax import demo_page

    cli.enable_compilation_cache()
    from unclip_jax.cascade import Cascade

    page = demo_page.build(Cascade.load(bundle))
    try:
        address, public = demo_page.launch(page, host, port, share)
        shared = f", and for everybody at {public}" if public else ""
        print(f"the demo is at {address}{shared}; Ctrl-C ends it", flush=True)
        while page.is_running:
            time.sleep(0.2)
    finally:
        page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raises UserError for an address that this machine does not have, and for a port of it that is in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: choose another by --port") from error
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not for everybody: choose one from 1024 by --port") from error
        raise UserError(f"--host {host}: this machine has no such address ({error.strerror})") from error
    except UnicodeError as error:  # of a name that can be none of a machine
        raise UserError(f"--host {host[:80]!a}: no machine can have that name") from error


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
