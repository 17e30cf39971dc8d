"""A Hugging Face Hub of one process, as far as huggingface_hub fetches and uploads models: repositories of files in
memory, each commit a revision. `log` has the paths that were asked for."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories: name → revision → name of a file → its bytes. "main" leads to the newest revision."""

    def __init__(self):
        self.repositories, self.newest, self.log, self.url = {}, {}, [], ""

    def commit(self, name, files):
        """Adds files to a repository; returns the revision."""
        revisions = self.repositories.setdefault(name, {})
        before = revisions.get(self.newest.get(name), {})
        revision = hashlib.sha1(f"{name} {len(revisions)}".encode()).hexdigest()
        revisions[revision], self.newest[name] = before | files, revision
        return revision


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.log.append(f"{self.command} {path}")
            status, content, headers = route(hub, self.command, path.strip("/").split("/"), body)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer

    return Handler


def said(value, status=200, **headers):
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers


def route(hub, command, parts, body):
    match parts:
        case ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name'].rpartition('/')[2]}"
            hub.commit(name, {}) if name not in hub.repositories else None
            return said({"url": f"{hub.url}/{name}", "name": name, "id": name})
        case ["api", "validate-yaml"]:
            return said({"errors": [], "warnings": []})
        case ["api", "models", owner, name, *rest]:
            return api(hub, f"{owner}/{name}", rest, body)
        case [owner, name, "resolve", revision, *path]:
            found = revisions(hub, f"{owner}/{name}", revision)
            if isinstance(found, tuple):
                return found
            revision, files = found["revision"], found["files"]
            content = files["/".join(path)]
            etag = hashlib.sha1(content).hexdigest()
            return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
    return said({"error": "no such path"}, 404)


def revisions(hub, name, revision):
    """The files of a revision, or what says that there are none."""
    if name not in hub.repositories:
        return said({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
    revision = hub.newest[name] if revision == "main" else revision
    if revision not in hub.repositories[name]:
        return said({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
    return {"revision": revision, "files": hub.repositories[name][revision]}


def api(hub, name, rest, body):
    match rest:
        case ["preupload", _]:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return said({"files": files})
        case ["commit", _]:
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            revision = hub.commit(name, files)
            return said({"success": True, "commitOid": revision, "commitUrl": f"{hub.url}/{name}/commit/{revision}"})
    found = revisions(hub, name, rest[1] if rest[:1] in (["revision"], ["tree"]) else "main")
    if isinstance(found, tuple):
        return found
    if rest[:1] == ["tree"]:
        return said([{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                     for path, content in found["files"].items()])  # fmt: skip
    about = {"id": name, "modelId": name, "sha": found["revision"], "private": False, "tags": [], "downloads": 0}
    return said(about | {"likes": 0, "siblings": [{"rfilename": path} for path in found["files"]]})


@contextlib.contextmanager
def serve():
    """Starts the server in a thread; gives the `hub` and its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield SimpleNamespace(hub=hub, url=hub.url)
    finally:
        server.shutdown()
