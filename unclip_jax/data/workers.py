"""Makes things in order by threads of this process, or by worker processes with threads of their own.

Python's lock lets the threads of one process use little more than one core, so that a host with many cores needs
processes. Those of Grain would import JAX and the main program, and would outlive a trainer that was killed. Ours hold
what makes the things, and nothing else: they are sent requests through a socket and answer in order. A worker ends as
soon as the other end of its socket is closed, however that came about. One that is killed is replaced, and makes again
what it had not delivered.
"""

import functools
import itertools
import json
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging

from unclip_jax.errors import UserError

SWITCH_SECONDS = 0.0005  # after which a thread gives Python's lock to another: the one that sends waits less for it
MAX_DEATHS = 3  # of a worker in a row, without an answer in between
SECONDS_TO_END = 10  # after which a worker is killed
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import unclip_jax.data.workers as workers; "
PROGRAM += "workers.serve(int(sys.argv[1]))"

Request = TypeVar("Request")
Answer = TypeVar("Answer")


def in_order(
    make: Callable[[Request], Answer], requests: Iterable[Request], ahead: int, threads: int, workers: int
) -> Iterator[Answer]:
    """Yields make(request) for each request, in order; raises what `make` raises.

    ahead: answers that are made, or wait, before they are asked for. threads: that make them. workers: processes that
    share the threads, to which `make`, the requests and the answers are sent pickled; 0: this process has the threads.
    Raises UserError for a worker that ends again and again.
    """
    makers: list[_Threads] | list[_Worker]
    if workers:
        program = b"".join(_packed((make, -(-threads // workers))))
        makers = [_Worker(program, f"{k + 1} of {workers}") for k in range(workers)]
    else:
        makers = [_Threads(make, threads)]
    asked, answering, waiting = itertools.cycle(makers), itertools.cycle(makers), 0
    depth = min(ahead, 2 * max(threads, workers))  # grows, so that the first answers need not wait for many requests
    try:
        for request in requests:
            if waiting == depth:
                yield next(answering).answer()
                waiting, depth = waiting - 1, min(depth + 1, ahead)
            next(asked).ask(request)
            waiting += 1
        for _ in range(waiting):
            yield next(answering).answer()
    finally:
        for maker in makers:
            maker.close()


class _Threads:
    """Threads of this process that answer requests."""

    def __init__(self, make: Callable, threads: int):
        self._make, self._pool = make, ThreadPoolExecutor(threads, "data")
        self._futures: queue.SimpleQueue[Future] = queue.SimpleQueue()

    def ask(self, request: Any) -> None:
        """Begins an answer."""
        self._futures.put(self._pool.submit(self._make, request))

    def answer(self) -> Any:
        """Returns the next answer, once it is asked for and made; raises what making it raised."""
        return self._futures.get().result()

    def close(self) -> None:
        """Makes no more answers; does not wait for those that are being made."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Failure(NamedTuple):
    """Exception in a worker, in place of an answer."""

    error: Exception
    where: str  # its traceback


class _Worker:
    """Process that answers requests by `serve`.

    program: arguments of `_Threads`, packed. name: for people.
    """

    def __init__(self, program: bytes, name: str):
        self._program, self._name, self._unanswered, self._deaths = program, name, deque[Any](), 0
        self._start()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-c", PROGRAM, str(theirs.fileno()), json.dumps(sys.path)]
        # Signals are for the trainer, which wants batches until it has saved: they are blocked from the beginning, and
        # Ctrl-C does not go to a group of its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._programmed = False  # later: other workers can start while this one is not ready to read

    def _send(self, request: Any) -> None:
        try:
            if not self._programmed:
                self._socket.sendall(self._program)
                self._programmed = True
            _send(self._socket, request)
        except OSError:  # it has ended, which `answer` will see
            pass

    def ask(self, request: Any) -> None:
        """Begins an answer."""
        self._unanswered.append(request)
        self._send(request)

    def answer(self) -> Any:
        """Returns the next answer that was asked for, once it is made; raises what making it raised."""
        while True:
            try:
                answer = _receive(self._socket)
                break
            except OSError:
                self._replace()
        self._unanswered.popleft()
        self._deaths = 0
        if isinstance(answer, _Failure):
            if not isinstance(answer.error, UserError):
                answer.error.add_note(f"in data worker {self._name}:\n{answer.where}")
            raise answer.error
        return answer

    def _replace(self) -> None:
        """Starts the process anew. Raises UserError where that has been in vain MAX_DEATHS times."""
        self.close()
        code, self._deaths = self._process.returncode, self._deaths + 1
        how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
        if self._deaths == MAX_DEATHS:
            raise UserError(f"data worker {self._name} {how}, {MAX_DEATHS} times before it made anything: is there "
                            "memory for so many data.workers? The lines above may say why")  # fmt: skip
        logging.warning("data worker %s %s: another takes its place", self._name, how)
        self._start()
        for request in self._unanswered:
            self._send(request)

    def close(self) -> None:
        """Ends the process."""
        self._socket.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(descriptor: int) -> None:
    """Answers the requests that come through a socket until its other end is closed. The main program of a worker."""
    theirs = socket.socket(fileno=descriptor)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        make, threads = _receive(theirs)
    except OSError:
        return
    except Exception as error:  # there is no such class here, for example
        make, threads = functools.partial(_fail, error), 1
    maker = _Threads(make, threads)

    def listen() -> None:
        try:
            while True:
                maker.ask(_receive(theirs))
        except OSError:
            os._exit(0)  # whatever other threads are at

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            answer = maker.answer()
        except Exception as error:
            answer = _failure(error)
        try:
            _send(theirs, answer)
        except OSError:
            os._exit(0)


def _send(there: socket.socket, value: Any) -> None:
    for part in _packed(value):
        there.sendall(part)


def _packed(value: Any) -> list[bytes | memoryview]:
    """Pickles a value, its arrays apart, so that they are not copied: their number and sizes come first."""
    arrays = list[pickle.PickleBuffer]()
    pickled = pickle.dumps(value, 5, buffer_callback=arrays.append)
    parts = [pickled, *(array.raw() for array in arrays)]
    return [struct.pack(f"!I{len(parts)}Q", len(parts), *map(len, parts)), *parts]


def _receive(there: socket.socket) -> Any:
    """Receives a value. Raises ConnectionError where the other end is closed."""
    (count,) = struct.unpack("!I", _read(there, 4))
    sizes = struct.unpack(f"!{count}Q", _read(there, 8 * count))
    pickled, *arrays = [_read(there, size) for size in sizes]
    return pickle.loads(pickled, buffers=arrays)


def _read(there: socket.socket, size: int) -> memoryview:
    """Reads so many bytes."""
    data = memoryview(np.empty(size, np.uint8))
    left = data
    while left.nbytes:
        got = there.recv_into(left)
        if not got:
            raise ConnectionError("the other end is closed")
        left = left[got:]
    return data


def _fail(error: Exception, request: Any) -> None:
    raise error


def _failure(error: Exception) -> _Failure:
    """Makes of an exception what can be sent."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _Failure(error, where)
