"""Stages in forks of one process that has the libraries imported: for stages that take less time than the imports.

``python -m experiments.forked ADDRESS`` imports every stage and listens at a socket. With the path of ``serving``, a
command ``python -m experiments.STAGE ...`` hands its arguments, folder and streams to that process, which forks and
runs the module there as Python would.
"""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, ["\\0".join([os.getcwd(), *sys.argv[1:]]).encode()], [0, 1, 2])
    sys.exit(int(server.recv(8) or b"1"))
"""


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment with a ``python`` first on its path that runs stages of a copy in forks.

    Args:
        folder: Copy of the repository; its stages are imported once and must not change.
        environment: Of the stages.
    """
    if sys.platform != "linux":  # elsewhere libraries do not outlive a fork
        yield environment
        return
    with tempfile.TemporaryDirectory() as short:  # the address of a socket has some hundred characters at most
        address, client = f"{short}/socket", Path(short) / "python"
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        command = [sys.executable, "-m", "experiments.forked", address]
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            try:
                server.stdout.readline()  # until it listens, or has failed: then every stage says so
                yield {**environment, "PATH": f"{short}{os.pathsep}{environment['PATH']}"}
            finally:
                server.terminate()


def listen(address: str) -> None:
    """Import all stages; from then on one fork a connection."""
    for file in sorted(Path("experiments").glob("*.py")):
        importlib.import_module(f"experiments.{file.stem}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(connection)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Run the module that the connection names, in its folder and on its streams; send the exit code, and exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    for own, given in enumerate(streams):
        os.dup2(given, own)
    folder, _, module, *arguments = text.decode().split("\0")
    os.chdir(folder)
    sys.argv = [module, *arguments]
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stderr.write(f"{end.code}\n" if isinstance(end.code, str) else "")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(str(code).encode())
    os._exit(code)


if __name__ == "__main__":
    listen(sys.argv[1])
