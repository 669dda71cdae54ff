"""A hub on this machine: repositories in a folder, served with the part of the hub's protocol that downloads need."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


@contextmanager
def served(folder: Path, *, gated: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a hub with the repositories ``folder/owner/name``; ``gated`` ones want a token."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            api = re.match(r"/api/models/([^/]+/[^/]+)(/tree)?", self.path)
            file = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
            repo = (api or file or [None, ""])[1]
            if repo in gated and "Authorization" not in self.headers:
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            if not (folder / repo).is_dir() or not repo:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if api:
                return self.answer(200, json.dumps(listing(folder / repo, tree=bool(api[2]))).encode(), {})
            assert file
            if not (path := folder / repo / file[2]).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = path.read_bytes()
            return self.answer(200, content, {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def listing(repo: Path, *, tree: bool) -> Any:
    """What the hub's API says of a repository: its tree, or its facts."""
    files = sorted(repo.iterdir())
    if tree:
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": sha1(f.read_bytes())} for f in files]
    return {
        "id": f"{repo.parent.name}/{repo.name}",
        "sha": COMMIT,
        "siblings": [{"rfilename": f.name} for f in files],
        "tags": [],
    }


def sha1(content: bytes) -> str:
    """Of a file, by which the hub knows it."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def as_cache(folder: Path, cache: Path) -> None:
    """Copy the repositories into a folder in the layout of the hub's cache."""
    for repo in folder.glob("*/*"):
        place = cache / f"models--{repo.parent.name}--{repo.name}"
        shutil.copytree(repo, place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)
