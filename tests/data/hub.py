"""A hub on this machine: the endpoints that huggingface_hub and modelscope_hub ask of theirs."""

import hashlib
import json
import re
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

WIKITEXT = "Salesforce/wikitext"
FOLDER = "wikitext-103-raw-v1"
MODULES = ("abc", "ast", "bdb", "cmd", "code", "copy", "csv", "dis", "enum", "glob", "hmac", "io")
REVISION = "0123456789abcdef0123456789abcdef01234567"
INFO = re.compile(r"/api/(?:datasets|models)/(?P<name>[\w.-]+/[\w.-]+)(?:/revision/\w+)?")
TREE = re.compile(r"/api/(?:datasets|models)/(?P<name>[\w.-]+/[\w.-]+)/tree/\w+")
FILE = re.compile(r"/(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)/resolve/\w+/(?P<path>.+)")
MODELSCOPE = re.compile(r"/api/v1/datasets/(?P<name>[\w.-]+/[\w.-]+)/repo(?P<tree>/tree)?")


class Hub:
    """Repositories as ``{name: {path: content}}``; what was fetched is counted by path.

    A ``claimed`` size is told in place of the true one; a ``lost`` file is told and not there. The
    file ``stalled`` comes to its half, and no further until the hub is ``resumed``.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.claimed: dict[str, int] = {}
        self.gated: set[str] = set()
        self.lost: set[str] = set()
        self.stalled: str | None = None
        self.halfway = threading.Event()
        self.resumed = threading.Event()
        self.fetched: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, folder: Path) -> None:
        """Offer the files of a folder as a repository."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.repositories[name] = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in files
        }

    def close(self) -> None:
        self.resumed.set()
        self.server.shutdown()
        self.server.server_close()

    def tree(self, name: str) -> list[dict[str, Any]]:
        files = self.repositories[name].items()
        return [
            {
                "type": "file",
                "path": path,
                "size": self.claimed.get(path, len(content)),
                "oid": etag_of(content),
            }
            for path, content in files
        ]

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def log_message(self, *_: object) -> None:
                pass

            def answer(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/":
                    return self.send(b"a hub")
                kinds = (TREE, self.tree), (INFO, self.info), (FILE, self.file)
                for pattern, give in (*kinds, (MODELSCOPE, self.modelscope)):
                    match = pattern.fullmatch(path)
                    if match and match["name"] in hub.repositories:
                        return give(match)
                return self.send(b"", 404, {"X-Error-Code": "RepoNotFound"})

            def info(self, match: re.Match[str]) -> None:
                values = {"id": match["name"], "sha": REVISION, "siblings": []}
                self.send(json.dumps(values).encode())

            def tree(self, match: re.Match[str]) -> None:
                self.send(json.dumps(hub.tree(match["name"])).encode())

            def file(self, match: re.Match[str]) -> None:
                if match["name"] in hub.gated:
                    return self.send(b"", 403, {"X-Error-Code": "GatedRepo"})
                path, files = match["path"], hub.repositories[match["name"]]
                if path not in files or path in hub.lost:
                    return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})
                content = files[path]
                headers = {"ETag": f'"{etag_of(content)}"', "X-Repo-Commit": REVISION}
                if self.command == "GET":
                    hub.fetched.append(path)
                return self.send(content, 200, headers, stalls=path == hub.stalled)

            def modelscope(self, match: re.Match[str]) -> None:
                files = hub.repositories[match["name"]]
                if match["tree"] is None:
                    (path,) = parse_qs(urlsplit(self.path).query)["FilePath"]
                    hub.fetched.append(path)
                    return self.send(files[path])
                found = [
                    {"Path": path, "Size": len(content), "Type": "blob"}
                    for path, content in files.items()
                ]
                values = {"Code": 200, "Success": True, "Data": {"Files": found}}
                return self.send(json.dumps(values).encode())

            def send(
                self,
                content: bytes,
                status: int = 200,
                headers: dict[str, str] | None = None,
                stalls: bool = False,
            ) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                half = len(content) // 2 if stalls else 0
                self.wfile.write(content[:half])
                if stalls:
                    hub.halfway.set()
                    hub.resumed.wait()
                try:
                    self.wfile.write(content[half:])
                except OSError:
                    self.close_connection = True  # whoever asked was killed

        return Handler


def etag_of(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def write_wikitext(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (root / FOLDER).mkdir(parents=True)
    (root / "README.md").write_text("Not text to learn.")
    names = {"test-00000-of-00001": MODULES[:1]}
    names |= {f"train-0000{part}-of-00002": MODULES[part::2] for part in range(2)}
    for name, modules in names.items():
        paths = [Path(sysconfig.get_paths()["stdlib"], f"{module}.py") for module in modules]
        table = pyarrow.table({"text": [path.read_text() for path in paths]})
        pyarrow.parquet.write_table(table, root / FOLDER / f"{name}.parquet")
