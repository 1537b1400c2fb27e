"""Ctrl-C in a program: exit status 130 without a traceback, from its first lines to the interpreter's end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def quit_at_once(*_):
    os._exit(130)


def silence():
    """Makes Ctrl-C end the process at once: for a program's imports, which take a second, and for its exit.

    Where Ctrl-C is ignored, as in a shell's background jobs, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, quit_at_once)


@contextmanager
def raised() -> Iterator[None]:
    """Where `silence` was called, Ctrl-C is a KeyboardInterrupt within, so that what is half written is removed."""
    silenced = signal.getsignal(signal.SIGINT) is quit_at_once
    if silenced:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if silenced:
            signal.signal(signal.SIGINT, quit_at_once)
