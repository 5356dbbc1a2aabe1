"""Stopping on a signal where nothing is half done: SIGTERM, SIGINT, SIGHUP (the terminal is gone), SIGUSR1 (Slurm's
warning that the time is nearly up). A second SIGTERM or SIGINT ends the process at once.
"""

import os
import signal
import threading
from types import FrameType, TracebackType

_INSISTENT = (signal.SIGTERM, signal.SIGINT)
# These may come twice unasked: of a closed terminal both the kernel and the shell tell.
_REPEATED = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
SIGNALS = (*_INSISTENT, *_REPEATED)


class StoppedError(Exception):
    """A signal asked to stop, at a point where the state is whole."""

    def __init__(self, number: int):
        super().__init__(number)
        self.status = 128 + number  # the exit status by which a shell knows the signal

    def __str__(self) -> str:
        return signal.Signals(self.args[0]).name


class StopSignals:
    """While the context is open the first signal is noted, and `check` raises; never opened, it stops nothing.

    A signal that the process was started to ignore, as a shell's background job does SIGINT, stays ignored.
    """

    def __init__(self):
        self._received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._received = None
        self._before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for other in self._before:
            signal.signal(other, signal.SIG_DFL if other in _INSISTENT else signal.SIG_IGN)

    def check(self) -> None:
        """Raises StoppedError once a signal has come."""
        if self._received is not None:
            raise StoppedError(self._received)


def raise_on_interrupt() -> None:
    """SIGINT raises KeyboardInterrupt, as Python has it, where `util.train.before_torch` made it end the process."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_to_parent(parent: int, worker: int = 0) -> None:
    """In a process that loads data: a signal sent to all, as Ctrl-C and Slurm's are, is for the parent to act on.

    SIGTERM from the parent itself ends the process, lest one that never gets an answer from its disk live on.

    Args:
        parent: its process id; os.getppid() is another process's where a server forks for it ("forkserver").
        worker: the number that a DataLoader gives the process.
    """
    for number in (signal.SIGINT, *_REPEATED):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # only there can it be known who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
