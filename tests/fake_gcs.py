"""A server that answers like Google Cloud Storage (its JSON API), in a process of its own, with objects in memory.

    with fake_gcs.serve() as server:
        subprocess.run(command, env=os.environ | server.environment)

It speaks as much as gcsfs, TensorStore (Orbax's arrays), google-cloud-storage (TensorBoard's events) and ArrayRecord
ask for: uploads in one piece, in two parts and resumable; downloads whole and by range; generations and their
preconditions; lists by prefix, delimiter and page; deletes, copies, moves and rewrites. It has no credentials, no gRPC
API, no hierarchical namespaces and no old versions. There are the BUCKETS and no others; "forbidden" refuses
everything, "login" those whom it does not know, which is everybody, and "readonly" every change.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

BUCKETS = ("bucket", "readonly", "forbidden", "login")
PAGE = 50  # objects a page of a list, so few that readers must turn pages
PREFIX = re.compile(r"^(/download|/upload|/resumable)?(?:/storage/v1)?(/.*)$")


class Object:
    """Its bytes, with all that the API tells about them."""

    generations = itertools.count(time.time_ns() // 1000)

    def __init__(self, bucket: str, name: str, content: bytes, content_type: str):
        self.content, self.generation = content, next(self.generations)
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.resource = {
            "kind": "storage#object", "id": f"{bucket}/{name}/{self.generation}", "name": name, "bucket": bucket,
            "generation": str(self.generation), "metageneration": "1", "size": str(len(content)), "md5Hash": md5,
            "etag": md5, "contentType": content_type, "storageClass": "STANDARD", "timeCreated": now, "updated": now,
        }  # fmt: skip


OBJECTS: dict[str, dict[str, Object]] = {bucket: {} for bucket in BUCKETS}
UPLOADS: dict[str, dict] = {}  # resumable ones under way
FAULTS = float(os.environ.get("FAKE_GCS_FAULTS", 0))
LOCK = threading.RLock()


class Refused(Exception):
    """An answer that is an error: status and reason."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self):
        body = self._body()
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        kind, path = PREFIX.match(url.path).groups()
        try:
            if random.random() < FAULTS:
                raise Refused(503, "injected")
            with LOCK:
                status, headers, content = self._route(kind, path, body)
        except Refused as error:
            status, reason = error.args
            headers, content = {}, json.dumps({"error": {"code": status, "message": reason}}).encode()
        if os.environ.get("FAKE_GCS_LOG"):
            with open(os.environ["FAKE_GCS_LOG"], "a") as log:
                agent = self.headers.get("User-Agent", "").split("/")[0]
                log.write(f"{status} {self.command} {self.path} [{agent}] range={self.headers.get('Range')}\n")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        with contextlib.suppress(BrokenPipeError):  # a reader that was killed, or has seen enough
            self.end_headers()
            if self.command != "HEAD" and status not in (204, 304):
                self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, kind, path, body):
        if kind == "/resumable":
            return self._resume(path.removeprefix("/"), body)
        found = re.match(r"^/b/([^/]+)(?:/o(?:/(.+?)(?:/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/(.+))?)?)?/?$", path)
        if not found:
            raise Refused(404, f"no such path: {path}")
        bucket, name, copy, to_bucket, to_name = (part and unquote(part) for part in found.groups())
        self._check(bucket, changes=self.command not in ("GET", "HEAD"))
        if copy:
            source = self._object(bucket, name)
            to_bucket = to_bucket or bucket
            self._check(to_bucket, changes=True)
            stored = self._store(to_bucket, to_name, source.content, source.resource["contentType"])
            if copy == "moveTo":
                del OBJECTS[bucket][name]
            done = {"kind": "storage#rewriteResponse", "done": True, "resource": stored.resource}
            done |= {"objectSize": stored.resource["size"], "totalBytesRewritten": stored.resource["size"]}
            return _json(done if copy == "rewriteTo" else stored.resource)
        if kind == "/upload":
            return self._upload(bucket, name, body)
        if name:
            return self._one(bucket, name)
        if path.rstrip("/").endswith("/o"):
            return self._list(bucket)
        return _json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})

    def _check(self, bucket: str, changes: bool) -> None:
        if bucket not in OBJECTS:
            raise Refused(404, "The specified bucket does not exist.")
        if bucket == "login":
            raise Refused(401, "Anonymous caller does not have storage.objects.list access to the bucket.")
        if bucket == "forbidden" or (bucket == "readonly" and changes):
            raise Refused(403, "user@example.org does not have access to the Google Cloud Storage bucket.")

    def _object(self, bucket: str, name: str) -> Object:
        if name not in OBJECTS[bucket]:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return OBJECTS[bucket][name]

    def _conditions(self, bucket: str, name: str, otherwise: int = 412) -> None:
        """Raises where a precondition of the request does not hold; a missing object has generation 0."""
        there = OBJECTS[bucket].get(name)
        now = there.generation if there else 0
        if "ifGenerationMatch" in self.query and int(self.query["ifGenerationMatch"]) != now:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in self.query and int(self.query["ifGenerationNotMatch"]) == now:
            raise Refused(otherwise, "not modified")

    def _store(self, bucket: str, name: str, content: bytes, content_type: str) -> Object:
        self._conditions(bucket, name)
        OBJECTS[bucket][name] = Object(bucket, name, content, content_type)
        return OBJECTS[bucket][name]

    def _one(self, bucket: str, name: str):
        if self.command == "DELETE":
            self._object(bucket, name)
            self._conditions(bucket, name)
            del OBJECTS[bucket][name]
            return 204, {}, b""
        there = self._object(bucket, name)
        self._conditions(bucket, name, otherwise=304)
        if self.query.get("alt") != "media":
            return _json(there.resource)
        resource, content = there.resource, there.content
        headers = {
            "Content-Type": resource["contentType"], "X-Goog-Hash": f"md5={resource['md5Hash']}",
            "X-Goog-Generation": resource["generation"], "X-Goog-Metageneration": "1",
            "X-Goog-Stored-Content-Length": resource["size"], "X-Goog-Stored-Content-Encoding": "identity",
        }  # fmt: skip
        asked = re.match(r"^bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
        if not asked:
            return 200, headers, content
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            raise Refused(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, headers, content[start:stop]

    def _list(self, bucket: str):
        q = self.query
        prefix, delimiter = q.get("prefix", ""), q.get("delimiter", "")
        items, prefixes, size = {}, {}, min(int(q.get("maxResults", PAGE)), PAGE)
        names = sorted(n for n in OBJECTS[bucket] if n.startswith(prefix) and n >= q.get("startOffset", ""))
        names = [n for n in names if "endOffset" not in q or n < q["endOffset"]]
        for name in names:
            rest = name[len(prefix) :]
            entry = prefix + rest.partition(delimiter)[0] + delimiter if delimiter and delimiter in rest else name
            if entry <= q.get("pageToken", ""):
                continue
            if len(items) + len(prefixes) == size and entry not in prefixes:
                last = max([*items, *prefixes])
                return _json(self._page(items, prefixes) | {"nextPageToken": last})
            if entry != name or (delimiter and name.endswith(delimiter) and name != prefix):
                prefixes[entry] = True
            else:
                items[name] = OBJECTS[bucket][name].resource
        return _json(self._page(items, prefixes))

    def _page(self, items, prefixes):
        return {"kind": "storage#objects", "items": list(items.values()), "prefixes": list(prefixes)}

    def _upload(self, bucket: str, name: str | None, body: bytes):
        how, content_type = self.query.get("uploadType"), self.headers.get("Content-Type", "application/octet-stream")
        if how == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', content_type).group(1).encode()
            about, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in _parts(body, boundary))
            name = json.loads(about).get("name") or self.query["name"]
            return _json(self._store(bucket, name, content, "application/octet-stream").resource)
        if how == "resumable":
            about = json.loads(body or b"{}")
            key = str(next(Object.generations))
            name = about.get("name") or self.query["name"]
            UPLOADS[key] = {"bucket": bucket, "name": name, "query": self.query, "content": b""}
            host = self.headers["Host"]
            return 200, {"Location": f"http://{host}/resumable/{key}", "X-GUploader-UploadID": key}, b""
        return _json(self._store(bucket, name or self.query["name"], body, content_type).resource)

    def _resume(self, key: str, body: bytes):
        upload = UPLOADS[key]
        if self.command == "DELETE":
            del UPLOADS[key]
            return 499, {}, b""
        upload["content"] += body
        total = self.headers.get("Content-Range", "bytes */-1").rpartition("/")[2]
        if total == "*" or (total != "-1" and len(upload["content"]) < int(total)):
            return 308, {"Range": f"bytes=0-{len(upload['content']) - 1}"} if upload["content"] else {}, b""
        self.query = upload["query"]
        del UPLOADS[key]
        stored = self._store(upload["bucket"], upload["name"], upload["content"], "application/octet-stream")
        return _json(stored.resource)


def _parts(body: bytes, boundary: bytes) -> tuple[bytes, bytes]:
    """The two parts of a multipart upload, which may hold any bytes but the boundary."""
    _, first, second, _ = body.split(b"--" + boundary)
    return first, re.sub(rb"\r?\n$", b"", second, count=1)


def _json(value):
    return 200, {}, json.dumps(value).encode()


@contextlib.contextmanager
def serve(log: str = "", faults: float = 0.0):
    """Starts the server; gives its `url` and the `environment` in which gs:// leads to it.

    log: for its requests. faults: share of them that it answers by 503, as a bucket that is busy does.
    """
    places = os.environ | {"FAKE_GCS_LOG": str(log), "FAKE_GCS_FAULTS": str(faults)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, __file__], env=places, **pipes) as process:
        try:
            url = f"http://localhost:{process.stdout.readline().strip()}"
            environment = {
                "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore's, which else looks for real ones
                "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google over gRPC of what kind a bucket is
            }
            yield SimpleNamespace(url=url, environment=environment)
        finally:
            process.kill()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients are killed in tests, which is no news; all else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    server = Server(("localhost", 0), Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until the process that started this one has ended, however it did
