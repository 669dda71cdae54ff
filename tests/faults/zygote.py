"""Runs command lines in processes of their own that start at once: the tests' copy, which has imported all, forks.

A line of JSON asks for one: ``{"args": [...], "folder": ..., "size": null, "bare": false}``; the answer is its process
id, and when it ends its exit code. Standard output and error lie in the folder, as ``out`` and ``err``. ``bare``
takes the privileges of root.
"""

import gc
import json
import logging
import os
import resource
import signal
import sys
import warnings
from contextlib import nullcontext
from typing import NoReturn

import classifier_emergence.instruments.finetune
import classifier_emergence.models.loading
import classifier_emergence.training.rl.run  # noqa: F401
from classifier_emergence.cli import app
from tests.faults.damage import unprivileged


def child(args: list[str], folder: str, size: int | None, bare: bool) -> None:
    os.chdir(folder)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    sys.argv = ["classifier-emergence", *args]
    try:
        with unprivileged() if bare else nullcontext():
            app.main()
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code or 0))  # without the seconds that libraries take to end


def main(asked: int, answered: int) -> NoReturn:
    """Until the input, a pipe, ends."""
    try:
        warnings.resetwarnings()  # which the tests make errors
        logging.getLogger().handlers.clear()
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those that pytest captures
        gc.freeze()  # or every child's collector would copy all that the libraries hold
        serve(asked, answered)
    finally:
        os._exit(0)


def serve(asked: int, answered: int) -> None:
    for line in os.fdopen(asked):
        wanted = json.loads(line)
        if "wait" in wanted:
            answer = os.waitstatus_to_exitcode(os.waitpid(wanted["wait"], 0)[1]) if wanted["wait"] else 0
        elif not (answer := os.fork()):
            child(**wanted)
            return
        os.write(answered, f"{answer}\n".encode())
