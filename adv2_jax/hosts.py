"""Hosts: the processes that share a run, how they meet, and how one ends with the others.

They share no array: each process computes batches of its own, on its own devices, and they meet in
the directory of the run. Process 0 holds a connection to each of the others.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue

import jax

PATIENCE = 120  # seconds for all processes to start
# a host that loses power closes no connection: it is asked for a sign after 10 s, then every 5 s
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
BEGUN, DONE = b".", b"!"  # what process 0 says of the run
ENDED = "another process of this run ended; what is finished is kept, --resume goes on from it"


class Processes:
    """The processes of a run, as one of them sees them; it ends when another ends before the run.

    `jax.distributed` ends the others by an abort with a page of C++, a minute later. Here the
    operating system closes the connections of a process, however it ends: the others see it at
    once.

    Args:
        index: number of this process.
        count: number of processes.
        links: connections: of process 0 to each of the others, of the others to process 0.
    """

    def __init__(self, index: int = 0, count: int = 1, links: Sequence[socket.socket] = ()):
        self.index, self.count, self._links = index, count, links
        self._words: SimpleQueue[bytes] = SimpleQueue()
        self._over = False
        for link in links:
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def begin(self) -> None:
        """Let the other processes go on, in process 0; in the others, wait for that."""
        self._follow(BEGUN)

    def finish(self) -> None:
        """Let the other processes exit, in process 0; in the others, wait for that and exit."""
        self._over = self.index == 0
        self._follow(DONE)
        if self.index > 0:
            sys.exit()

    def _follow(self, word: bytes) -> None:
        if self.index > 0:
            self._words.get()
            return
        for link in self._links:
            with contextlib.suppress(OSError):  # `_listen` sees the end of the other process, too
                link.sendall(word)

    def _listen(self, link: socket.socket) -> None:
        word = b""
        with contextlib.suppress(OSError):
            while word != DONE and (word := link.recv(1)):
                self._words.put(word)
        if word != DONE and not self._over:
            # an error that all processes have is better said in its own words
            time.sleep(1)
            print(f"adv2: {ENDED}", file=sys.stderr, flush=True)
            # not by an exception: the main thread may be in XLA for minutes. Files are written
            # atomically, so that a process may end anywhere
            os._exit(2)


_processes = Processes()


def processes() -> Processes:
    """Return the processes of this run; one unless they were connected."""
    return _processes


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Connect the processes of a run, before any other use of JAX.

    Args:
        coordinator: HOST:PORT, where process 0 listens; JAX detects all three unless given.
        count: number of processes.
        index: number of this process.

    Raises:
        ValueError: nothing is detected, or not all processes have come in `PATIENCE` seconds.
    """
    global _processes
    if coordinator is None and count is None and index is None:
        coordinator, count, index = _detect()
    if coordinator is None or count is None or index is None:
        raise ValueError("--coordinator, --processes and --process go together")
    if index >= count:
        raise ValueError(f"--process {index}: with --processes {count} the last is {count - 1}")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"--coordinator {coordinator!r} is not HOST:PORT")
    # processes of another run on the same port are strangers
    greetings = [f"adv2 {i} of {count}".encode() for i in range(count)]
    until = time.monotonic() + PATIENCE
    try:
        links = (
            [_reach(host, int(port), greetings[index], until)]
            if index > 0
            else _accept(int(port), set(greetings[1:]), until)
        )
    except OSError as error:
        raise ValueError(
            f"process {index} of {count} does not meet the others at {coordinator}: "
            f"{error.strerror or error} (they wait {PATIENCE} s for each other)"
        ) from None
    for link in links:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in KEEPALIVE.keys() & vars(socket).keys():  # not every system has them
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE[name])
    _processes = Processes(index, count, links)


def _detect() -> tuple[str, int, int]:
    """Return coordinator, number of processes and number of this one, as JAX detects them."""
    # the address that JAX detects has no public name
    from jax._src.distributed import global_state

    try:
        jax.distributed.initialize(initialization_timeout=PATIENCE)
        jax.local_devices()  # a device learns of the others while there is a connection
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: JAX detects no other hosts ({str(error).partition(chr(10))[0]}); "
            "--coordinator HOST:PORT --processes N --process I tell them"
        ) from None
    host, _, port = str(global_state.coordinator_address).rpartition(":")
    # before the work: see `Processes`
    jax.distributed.shutdown()
    # JAX took SIGTERM for itself, by which clusters end a process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # JAX's own port may not be free yet
    return f"{host}:{int(port) - 1}", jax.process_count(), jax.process_index()


def _accept(port: int, expected: set[bytes], until: float) -> list[socket.socket]:
    """Return the connections of process 0 to the others, who send these greetings."""
    links = []
    with socket.create_server(("", port)) as server:
        while expected:
            server.settimeout(max(0.01, until - time.monotonic()))
            link, _ = server.accept()
            link.settimeout(5)
            try:
                expected.remove(link.recv(64))
                links.append(link)
            except (OSError, KeyError):  # a stranger
                link.close()
    return links


def _reach(host: str, port: int, greeting: bytes, until: float) -> socket.socket:
    """Return the connection to process 0, which may start later."""
    while True:
        try:
            link = socket.create_connection((host, port), timeout=5)
            link.sendall(greeting)
            return link
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
