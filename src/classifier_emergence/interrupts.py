"""Interrupts of a program: an exception while it does its work, else its end, with one line and no traceback.

Before its work come seconds in which libraries are imported, and an exception amid these is lost or wrapped in places.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False
"""Whether there was one within ``raised``."""


def end_program() -> None:
    """From now on an interrupt ends the program, unless it was started to ignore them; for its first import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Within, an interrupt of a program is a ``KeyboardInterrupt``; after it, nothing, as all is done by then."""
    ours = signal.getsignal(signal.SIGINT) is _end
    try:
        if ours:
            signal.signal(signal.SIGINT, _raise)
        yield
    except Exception as error:
        if ours and _asked:  # transformers takes an import that was interrupted for one of what is not there
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted; no result was written\n")
    os._exit(130)


def _raise(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
