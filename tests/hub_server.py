"""A stand-in for the hub: datasets in a folder, served over HTTP as huggingface_hub and datasets ask for them; models
are taken from who has the token.

USER/NAME/COMMIT/files of the repository        USER/NAME/main: the commit that `main` is
USER/NAME/BRANCH/files of it, with %2F for /
models/USER/NAME/files of what was uploaded
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from pathlib import Path

API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/(.*))?")
COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/main")
TOKEN = "hf_of_the_stand_in"
FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for `server.folder`."""

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if match := API.fullmatch(path):
            repo, what, revision, below = decoded(match)
            if folder := self.checkout(repo, revision):
                self.answer(self.described(folder, repo, what, below or ""))
        elif (match := FILE.fullmatch(path)) and (folder := self.checkout(*decoded(match)[:2])):
            self.send_file(folder, decoded(match)[2])
        elif not match:
            self.fail("EntryNotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self.path.startswith("/api/datasets/"):
            self.take(body)
            return
        repo, _, revision, _ = decoded(API.fullmatch(self.path))
        paths = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
        if folder := self.checkout(repo, revision):
            self.answer([entry(folder, folder / path) for path in paths if (folder / path).exists()])

    def take(self, body):
        """Steps of an upload: a repository is made, its card is judged, files are announced, and committed."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail("", 401)
        elif self.path == "/api/repos/create":
            model = json.loads(body)
            name = f"{model.get('organization') or 'me'}/{model['name']}"
            (self.server.folder / "models" / name).mkdir(parents=True, exist_ok=True)
            self.server.made.append(model)
            self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]})
        else:
            name = COMMIT.fullmatch(self.path.partition("?")[0])[1]
            home = self.server.folder / "models" / name
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (home / line["value"]["path"]).parent.mkdir(parents=True, exist_ok=True)
                    (home / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"http://127.0.0.1:{self.server.server_port}/{name}/commit/{'1' * 40}"
            self.answer({"commitUrl": url, "commitOid": "1" * 40})

    def checkout(self, repo, revision):
        """The folder of a commit; None, with an answer sent, where there is none."""
        home = self.server.folder / repo
        if not home.is_dir():
            return self.fail("RepoNotFound", 401)
        commit = (home / "main").read_text() if revision in (None, "main") else urllib.parse.quote(revision, safe="")
        return home / commit if (home / commit).is_dir() else self.fail("RevisionNotFound")

    def described(self, folder, repo, what, below):
        if what == "tree":
            paths = (folder / below).rglob("*") if "recursive=true" in self.path.lower() else (folder / below).glob("*")
            return [entry(folder, path) for path in sorted(paths)]
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return {"id": repo, "sha": folder.name, "tags": [], "siblings": [{"rfilename": name} for name in files]}

    def send_file(self, folder, name):
        if not (folder / name).is_file():
            self.fail("EntryNotFound")
            return
        data = (folder / name).read_bytes()
        self.answer(data, {"X-Repo-Commit": folder.name, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def answer(self, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            whole, first, last = len(data), int(span[1]), int(span[2] or len(data) - 1)
            data = data[first : last + 1]
            headers = {**dict(headers), "Content-Range": f"bytes {first}-{first + len(data) - 1}/{whole}"}
        self.send_response(206 if span else 200)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code, status=404):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, template, *values):
        self.server.requests.append(f"{self.command} {self.path}")


def decoded(match):
    """Parts of an address. A revision's slashes are %2F there."""
    return [part and urllib.parse.unquote(part) for part in match.groups()]


def entry(folder, path):
    """A file or folder as the hub lists it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    data = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """The hub on a free port of this machine, until `shutdown()`; `requests` lists what it was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.requests, server.made = folder, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
