"""A local web server or object store that serves a folder, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from cskd_pipeline.cache import mirror, remote_files

Reply = tuple[int, dict[str, str], bytes]

BUCKET = "bucket"
REPOSITORY = "lab/toy"


class Served:
    """A served folder, the requests received, and the faults to inject.

    Attributes:
        faults: the end of a path, and what happens once to a request for it: ``reset``,
            ``truncate`` (half of the body, then the connection ends), ``silence`` (half of the
            body, then nothing for two seconds), ``trickle`` and ``trickle head`` (a byte now and
            then, of the body or of an endless header) or an HTTP status.
        always: the same for every request, by the end of a path.
        replies: status, headers and body to send unchanged, by the end of a path.
        requests: method, path and Range of every request.
        headers: headers of every request, by name in lower case.
        ranges: whether Range is honoured.
        etags: whether files have an ETag, else the date of their last change.
        rate: bytes a second of each connection; None: unlimited.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[tuple[str, str | int]] = []
        self.always: dict[str, str | int] = {}
        self.replies: dict[str, Reply] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.ranges = self.etags = True
        self.rate: float | None = None
        self.url = ""
        self.lock = threading.Lock()

    def fault(self, path: str) -> str | int | None:
        with self.lock:
            for number, (end, kind) in enumerate(self.faults):
                if path.endswith(end):
                    del self.faults[number]
                    return kind
        return next((kind for end, kind in self.always.items() if path.endswith(end)), None)

    def gets(self, end: str = "") -> list[str | None]:
        """Return the Range of every GET of a path with this end."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(end)]


@lru_cache(maxsize=16)
def _read(file: Path, changed: int, size: int) -> bytes:
    return file.read_bytes()


@lru_cache(maxsize=16)
def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: 40 ms between them
    served: Served

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, body: bool) -> None:
        parts = urlsplit(self.path)
        path, requested = unquote(parts.path), self.headers.get("Range")
        self.served.requests.append((self.command, path, requested))
        self.served.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = self.served.fault(path)
        if isinstance(fault, int):
            return self.send(fault, b"no", body)
        if fault == "reset":
            self.close_connection = True
            return self.connection.close()
        if fault == "trickle head":
            return self.trickle(b"HTTP/1.1 200 OK\r\nX: ")
        for end, reply in self.served.replies.items():
            if path.endswith(end):
                return self.reply(*reply)
        data = self.content(path, parse_qs(parts.query, keep_blank_values=True))
        if data is None:
            return self.send(404, b"not found", body)
        start, status, headers = 0, 200, {"Accept-Ranges": "bytes"}
        if self.served.etags:
            headers["ETag"] = _etag(data)
        else:
            headers["Last-Modified"] = formatdate((self.served.root / path[1:]).stat().st_mtime)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", requested or "")
        total = len(data)
        if match and self.served.ranges:
            start = int(match[1])
            if start >= total:
                return self.send(416, b"", body)
            data = data[start : int(match[2]) + 1 if match[2] else None]
            status = 206
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        return self.send(status, data, body, headers, fault)

    def content(self, path: str, query: dict[str, list[str]]) -> bytes | None:
        file = self.served.root / path.lstrip("/")
        if not file.is_file():
            return None
        status = file.stat()
        return _read(file, status.st_mtime_ns, status.st_size)

    def send(
        self,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
        fault: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if fault is None:
            return self.write(data)
        if fault == "trickle":
            return self.trickle(b"")
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if fault == "silence":
            time.sleep(2)
        self.close_connection = True

    def write(self, data: bytes) -> None:
        piece = 2**16 if self.served.rate else max(1, len(data))
        for start in range(0, len(data), piece):
            self.wfile.write(data[start : start + piece])
            if self.served.rate:
                time.sleep(piece / self.served.rate)

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        self.wfile.write(data)

    def trickle(self, beginning: bytes) -> None:
        """Send until the client disconnects."""
        self.close_connection = True
        self.wfile.write(beginning)
        with suppress(ConnectionError):
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _S3Handler(_Handler):
    """Path-style requests for one bucket: GET, HEAD, and ListObjectsV2 on one page."""

    def content(self, path: str, query: dict[str, list[str]]) -> bytes | None:
        bucket, _, key = path.lstrip("/").partition("/")
        if bucket != BUCKET:
            return None
        if "list-type" in query:
            prefix, delimiter = (query.get(n, [""])[0] for n in ("prefix", "delimiter"))
            return self.listing(prefix, delimiter)
        return super().content(key, query)

    def listing(self, prefix: str, delimiter: str) -> bytes:
        files = sorted(p for p in self.served.root.rglob("*") if p.is_file())
        contents, prefixes = "", dict[str, None]()
        for file in files:
            key = str(file.relative_to(self.served.root))
            if not key.startswith(prefix):
                continue
            inner, nested, _ = (
                key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            )
            if nested:
                prefixes[prefix + inner + delimiter] = None
                continue
            contents += (
                f"<Contents><Key>{escape(key)}</Key><Size>{file.stat().st_size}</Size>"
                '<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"0"</ETag>'
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
        for name in prefixes:
            contents += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>100000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        ).encode()


class _HubHandler(_Handler):
    """One data set of the Hub, ``REPOSITORY``, as its own library reads and writes it."""

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append((self.command, path, None))
        self.served.headers.append({name.lower(): value for name, value in self.headers.items()})
        _, _, endpoint = path.partition(f"/api/datasets/{REPOSITORY}/")
        if endpoint.startswith("paths-info/"):
            entries = [self.entry(name) for name in parse_qs(sent.decode())["paths"]]
            return self.send_document([entry for entry in entries if entry is not None])
        if endpoint.startswith("preupload/"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(sent)["files"]]  # fmt: skip
            return self.send_document({"files": files})
        if endpoint.startswith("commit/"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    file = self.served.root / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.served.url}/datasets/{REPOSITORY}/commit/{'0' * 40}"
            return self.send_document({"commitUrl": url, "commitOid": "0" * 40})
        return self.send_document({"url": f"{self.served.url}/datasets/{REPOSITORY}"})

    def content(self, path: str, query: dict[str, list[str]]) -> bytes | None:
        _, _, endpoint = path.partition(f"/api/datasets/{REPOSITORY}")
        if path.startswith(f"/datasets/{REPOSITORY}/resolve/main/"):
            return super().content(path.split("/resolve/main/", 1)[1], query)
        if endpoint.startswith("/tree/main"):
            folder = self.served.root / endpoint.removeprefix("/tree/main").strip("/")
            recursive = query.get("recursive", [""])[0] == "true"
            inner = folder.rglob("*") if recursive else folder.glob("*")
            names = sorted(str(p.relative_to(self.served.root)) for p in inner)
            return json.dumps([self.entry(name) for name in names]).encode() if names else None
        if path.startswith("/api/datasets/") and (not endpoint or endpoint == "/revision/main"):
            return json.dumps({"id": REPOSITORY, "sha": "0" * 40, "siblings": []}).encode()
        return None

    def entry(self, name: str) -> dict[str, Any] | None:
        file = self.served.root / name
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0"}
        if file.is_file():
            size = file.stat().st_size
            entry = {"type": "file", "path": name, "size": size, "oid": "0"}
            if file.suffix == ".tar":
                oid = hashlib.sha256(file.read_bytes()).hexdigest()
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
            return entry
        return None

    def send_document(self, document: object) -> None:
        self.send(200, json.dumps(document).encode(), True, {"Content-Type": "application/json"})

    def end_headers(self) -> None:
        self.send_header("X-Error-Code", "EntryNotFound")  # read if the status is 404
        super().end_headers()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(root: Path, kind: str = "http") -> Iterator[Served]:
    """Serve ``root`` at ``url``, which for ``s3`` and ``hub`` is the endpoint of a store."""
    served = Served(root)
    base = {"http": _Handler, "s3": _S3Handler, "hub": _HubHandler}[kind]
    handler = type("Handler", (base,), {"served": served})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def bucket_settings(url: str) -> dict[str, str]:
    """Return the environment that points S3's own tools to the store at ``url``."""
    return {
        **{"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"},
        **{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
        "AWS_CONFIG_FILE": os.devnull,
    }


@contextmanager
def serving_bucket(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Serve ``root`` as ``s3://BUCKET``."""
    with serving(root, "s3") as served:
        for name, value in bucket_settings(served.url).items():
            monkeypatch.setenv(name, value)
        yield served


def keep_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep local copies in ``folder``, and hardly wait before a retry."""
    monkeypatch.setenv(mirror.FOLDER, str(folder))
    monkeypatch.setattr(remote_files, "WAIT", 0.001)
    return folder


def redirect_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the Hub's package to ``url``; it reads HF_ENDPOINT only when imported."""
    from huggingface_hub import constants

    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
