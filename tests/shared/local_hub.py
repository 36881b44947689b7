"""A small Hub on this machine: what a real huggingface_hub asks for, over HTTP, with repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_canaryMustNotLeak123456"


class Hub:
    """Repositories in memory: branch -> path -> content, and every request that was made."""

    def __init__(self):
        self.repositories = {}
        self.commits = []  # (repository, branch, summary)
        self.objects = {}
        self.requests = []  # (method, path, authorization, body)
        self.gate = threading.Event()  # commits wait for it
        self.gate.set()
        self.fail_commits = False
        self.is_down = False  # each request is refused with 503
        self.answers = []  # to the next commits, instead of making them: (status, headers)
        self.denied = {}  # status of all requests whose path has this text
        self.headers = {}  # of the answer under way

    def files(self, repository="me/model", branch="main"):
        return self.repositories[repository][branch]

    def answer(self, method, path, body):
        """(status, answer) to a request."""
        if self.is_down:
            return 503, {"error": "the Hub is down"}
        for text, status in self.denied.items():
            if text in path:
                return status, {"error": f"denied with {status}"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, {"main": {}})
            self.private = asked.get("private", asked.get("visibility") == "private")
            return status, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path.startswith("/lfs/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?(?:/.*)?", path):
            repository, what, revision = found.groups()
            return self.about(repository, what, revision and unquote(revision), body)
        return 404, {"error": f"no {path}"}

    def about(self, repository, what, revision, body):
        branches = self.repositories[repository]
        if what == "branch":
            exists = revision in branches
            branches.setdefault(revision, dict(branches["main"]))
            return (409 if exists else 200), {}
        if what is None:
            return 200, {"id": repository, "tags": ["license:mit"], "siblings": []}
        if revision not in branches:
            return 404, {"error": "no such revision"}
        files = branches[revision]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": repository, "sha": "0" * 40, "tags": [], "siblings": siblings}
        if what == "tree":
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
        if what == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        assert what == "commit"
        self.gate.wait(60)
        if self.answers:
            status, self.headers = self.answers.pop(0)
            return status, {"error": f"answered with {status}"}
        if self.fail_commits:
            return 400, {"error": "the disk is full"}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append((repository, revision, value["summary"]))
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repository}/commit/{oid}"}


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that answers at its `url` inside the with-block."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.requests.append((self.command, self.path, self.headers.get("Authorization"), body))
            status, answer = state.answer(self.command, urlsplit(self.path).path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, value in state.headers.items():
                self.send_header(name, value)
            state.headers = {}
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = respond

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        state.gate.set()
        server.shutdown()
        server.server_close()
