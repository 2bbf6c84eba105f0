"""A small Hub on loopback: what `huggingface_hub` asks of it to make a repository and commit a folder, in a thread.

Faults are set by the test: `refuse` answers a path with a status, `drop` closes the connection in the middle of a
request, `slow` waits before it answers. `times` says how often; each is a list of (words in the path, ...).
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_" + "t" * 34
LARGE = (".safetensors", ".bin", ".pt")  # through LFS, as the Hub's .gitattributes have it


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.user, self.large = TOKEN, "ann", LARGE
        self.repos: dict[str, dict] = {}  # id -> private, files, commits
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[tuple[str, str]] = []
        self.faults: list[dict] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, kind: str, where: str, value=None, times: int = 10**6) -> None:
        """From now on `times` requests with `where` in method and path meet a fault: refuse, drop or slow."""
        self.faults.append({"kind": kind, "where": where, "value": value, "times": times})

    def asked(self, where: str) -> int:
        return sum(where in f"{method} {path}" for method, path in self.requests)

    def handle_error(self, request, client_address):
        pass  # a client that has gone away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: dict | bytes = b"") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status >= 400 and isinstance(body, dict):
            self.send_header("X-Error-Message", body.get("error", ""))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_one(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append((self.command, path))
        fault = next((f for f in hub.faults if f["times"] and f["where"] in f"{self.command} {path}"), None)
        length = int(self.headers.get("Content-Length") or 0)
        if fault:
            fault["times"] -= 1
            if fault["kind"] == "drop":
                self.rfile.read(min(length, 100))
                self.close_connection = True
                self.connection.close()
                return
            if fault["kind"] == "slow":
                threading.Event().wait(fault["value"])  # tests make time.sleep short
        body = self.read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault and fault["kind"] == "refuse":
            self.answer(fault["value"], {"error": "the test says no"})
        elif not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self.route(path, body)

    do_GET = do_POST = do_PUT = handle_one

    def read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def route(self, path: str, body: bytes) -> None:
        hub, words = self.server, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "name": hub.user})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": [self.object(o) for o in json.loads(body)["objects"]]})
        elif words[0] == "lfs":
            assert hashlib.sha256(body).hexdigest() == words[1]
            hub.objects[words[1]] = body
            self.answer(200)
        elif words[:2] == ["api", "models"] and (repo := hub.repos.get("/".join(words[2:4]))) is not None:
            what = words[4] if len(words) > 4 else "info"
            if what == "preupload":
                self.answer(200, {"files": [self.mode(repo, file) for file in json.loads(body)["files"]]})
            elif what == "commit":
                self.commit(repo, "/".join(words[2:4]), [json.loads(line) for line in body.splitlines()])
            else:
                info = {"id": "/".join(words[2:4]), "private": repo["private"], "sha": f"{len(repo['commits']):040x}"}
                self.answer(200, {**info, "tags": [], "siblings": [{"rfilename": name} for name in repo["files"]]})
        else:
            self.answer(404, {"error": f"nothing at {path}"})

    def create(self, asked: dict) -> None:
        hub = self.server
        name = f"{asked.get('organization') or hub.user}/{asked['name']}"
        status = 409 if name in hub.repos else 200
        private = asked.get("visibility") == "private" or asked.get("private") is True
        hub.repos.setdefault(name, {"private": private, "files": {}, "commits": []})
        self.answer(status, {"url": f"{hub.url}/{name}", "name": name, "error": "exists already"})

    def validate(self, content: str) -> None:
        _, block, _ = content.split("---\n", 2)
        errors = []
        data = yaml.safe_load(block)
        base = data.get("base_model", "a/b")
        if base.startswith(("/", ".")) or base.count("/") > 1:
            errors.append(
                {"message": f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'}
            )
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def object(self, asked: dict) -> dict:
        if asked["oid"] in self.server.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}

    def mode(self, repo: dict, file: dict) -> dict:
        large = file["path"].endswith(self.server.large)
        there = repo["files"].get(file["path"])
        mark = None
        if there is not None:
            git = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
            mark = hashlib.sha256(there).hexdigest() if large else git
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": mark}

    def commit(self, repo: dict, name: str, lines: list[dict]) -> None:
        written = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                written[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                written[value["path"]] = self.server.objects[value["oid"]]
        repo["files"] |= written
        repo["commits"].append({"message": lines[0]["value"]["summary"], "files": sorted(written)})
        oid = f"{len(repo['commits']):040x}"
        self.answer(200, {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", "success": True})


@contextlib.contextmanager
def serving():
    hub = Hub()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
