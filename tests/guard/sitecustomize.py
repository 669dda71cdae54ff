"""Lets nothing but this machine be reached, and notes what was tried: in the tests, and in each Python that they start.

A Python imports this at its start, as the folder is on its path. The hook sees what sockets do whoever uses them, but
not libraries that have their own in C++.
"""

import os
import socket
import sys
from typing import Any

NOTES = "CLASSIFIER_EMERGENCE_TESTS_NETWORK"
"""The variable that names the file of addresses."""


def elsewhere(event: str, args: tuple[Any, ...]) -> str | None:
    """What is asked of another machine; None if nothing is."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        used, address = args
        if used.family not in (socket.AF_INET, socket.AF_INET6) or not address:
            return None
        host = address[0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return None
    host = host.decode(errors="replace") if isinstance(host, bytes) else host
    here = not host or host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")
    return None if here else f"{event} {host}"


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith("socket.") and (found := elsewhere(event, args)):
        with open(os.environ[NOTES], "a") as notes:  # noqa: PTH123  (no import that a test could miss the absence of)
            notes.write(f"{found}\n")
        raise ConnectionRefusedError(f"{found}: no network in tests")


if NOTES in os.environ:
    sys.addaudithook(_refuse)
