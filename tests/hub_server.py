"""
A Hugging Face Hub over HTTP on loopback, for tests: what unmodified huggingface_hub, transformers and peft need to
create repositories, commit to them (regular and LFS files), and download from them by id and revision.

Everything is held in memory. Writing needs a bearer token (any), reading needs none, as on the real Hub's public repos.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_test"
USER = "tester"
DATE = "2025-01-01T00:00:00.000Z"
PREFIX_TO_KIND = {"": "models", "datasets/": "datasets", "spaces/": "spaces", "kernels/": "kernels"}
REPO_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
API_REPO = rf"/api/(?P<kind>models|datasets|spaces|kernels)/{REPO_ID}"
FILES_REPO = rf"/(?P<prefix>datasets/|spaces/|kernels/|){REPO_ID}"


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the blob; for an LFS file that of its content, which is just as unique."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repo:
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str:
        for refs in (self.branches, self.tags):
            if revision in refs:
                return refs[revision]
        if revision in self.commits:
            return revision
        raise HubError(404, "RevisionNotFound", f"no revision {revision}")


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """State of the hub and the handlers of its routes. `url` is what `HF_ENDPOINT` has to be."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._counter = itertools.count()
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, for assertions: path → content."""
        repo = self._repo(kind, repo_id)
        return {path: file.content for path, file in repo.commits[repo.resolve(revision)].items()}

    def _repo(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise HubError(404, "RepoNotFound", f"no {kind[:-1]} {repo_id}")
        return self.repos[kind, repo_id]

    def _commit(self, repo: Repo, files: dict[str, File], message: str) -> str:
        oid = hashlib.sha1(f"{next(self._counter)} {message}".encode()).hexdigest()
        repo.commits[oid] = files
        repo.messages.append(message)
        return oid

    def create_repo(self, body):
        kind = f"{body.get('type') or 'model'}s"
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.repos:
            return 409, {"error": "You already created this repo", "url": url}
        repo = self.repos[kind, repo_id] = Repo()
        repo.branches["main"] = self._commit(repo, {}, "initial commit")
        return 200, {"url": url, "id": repo_id, "name": repo_id}

    def delete_repo(self, body):
        self.repos.pop((f"{body.get('type') or 'model'}s", f"{body.get('organization') or USER}/{body['name']}"))
        return 200, {}

    def whoami(self):
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return 200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth}

    def validate_yaml(self, body):
        """Refuses what the real Hub refuses in the metadata of a card."""
        errors = [] if body.get("repoType", "model") != "model" else card_errors(body["content"])
        return (400 if errors else 200), {"errors": [{"message": message} for message in errors], "warnings": []}

    def preupload(self, body, kind, repo_id, revision):
        repo = self._repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        answer = []
        for entry in body["files"]:
            path = entry["path"]
            is_lfs = path.endswith((".safetensors", ".bin", ".gguf", ".png", ".arrow", ".parquet"))
            mode = "lfs" if is_lfs or entry["size"] > 10_000_000 else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer, "commitOid": repo.resolve(revision)}

    def lfs_batch(self, body, prefix, repo_id):
        self._repo(PREFIX_TO_KIND[prefix], repo_id)
        objects = []
        for entry in body["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.uploads:
                answer["actions"] = {
                    "upload": {"href": f"{self.url}/lfs-upload/{entry['oid']}"},
                    "verify": {"href": f"{self.url}/lfs-verify"},
                }
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, raw, oid):
        if hashlib.sha256(raw).hexdigest() != oid:
            raise HubError(400, "BadUpload", "the uploaded bytes do not have the announced sha256")
        self.uploads[oid] = raw
        return 200, {}

    def lfs_verify(self, body):
        if len(self.uploads.get(body["oid"], b"")) != body["size"]:
            raise HubError(400, "BadUpload", "the uploaded size differs from the announced one")
        return 200, {}

    def commit(self, raw, kind, repo_id, revision, create_pr="0"):
        repo = self._repo(kind, repo_id)
        pull_request = None
        if create_pr == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            pull_request = f"{self.url}/{repo_id}/discussions/{number}"
            repo.branches[f"refs/pr/{number}"], revision = repo.resolve(revision), f"refs/pr/{number}"
        with self._lock:
            files = dict(repo.commits[repo.resolve(revision)])
            message = ""
            for line in raw.splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
                elif key == "lfsFile":
                    files[value["path"]] = File(self.uploads[value["oid"]], is_lfs=True)
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key == "deletedFolder":
                    files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
                else:
                    raise HubError(400, "BadRequest", f"unknown commit operation {key}")
            oid = repo.branches[revision] = self._commit(repo, files, message)
        url = f"{self.url}/{repo_id}/commit/{oid}"
        return 200, {
            "success": True,
            "commitOid": oid,
            "commitUrl": url,
            "hookOutput": "",
            "pullRequestUrl": pull_request,
        }

    def repo_info(self, kind, repo_id, revision="main"):
        repo = self._repo(kind, repo_id)
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in repo.commits[sha].items()]
        dates = {"lastModified": DATE, "createdAt": DATE}
        counts = {"downloads": 0, "likes": 0}
        return 200, {
            **dates,
            **counts,
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }

    def _entry(self, path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        return entry

    def tree(self, kind, repo_id, revision, path="", recursive="false"):
        repo = self._repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        folder = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(folder)}
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"no folder {path}")
        if recursive.lower() == "true":
            return 200, [self._entry(name, file) for name, file in inside.items()]
        entries = {}
        for name, file in inside.items():
            top, _, rest = name[len(folder) :].partition("/")
            is_folder = {"type": "directory", "path": folder + top, "size": 0, "oid": file.oid}
            entries[top] = is_folder if rest else self._entry(name, file)
        return 200, list(entries.values())

    def paths_info(self, body, kind, repo_id, revision):
        repo = self._repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        return 200, [self._entry(path, files[path]) for path in body["paths"] if path in files]

    def refs(self, kind, repo_id):
        repo = self._repo(kind, repo_id)

        def listed(refs, folder):
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        return 200, {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}

    def create_branch(self, body, kind, repo_id, name):
        repo = self._repo(kind, repo_id)
        if name in repo.branches:
            return 409, {"error": "Reference already exists"}
        repo.branches[name] = repo.resolve((body or {}).get("startingPoint", "main"))
        return 200, {}

    def create_tag(self, body, kind, repo_id, revision):
        repo = self._repo(kind, repo_id)
        repo.tags[body["tag"]] = repo.resolve(revision)
        return 200, {}

    def download(self, prefix, repo_id, revision, path):
        repo = self._repo(PREFIX_TO_KIND[prefix], repo_id)
        sha = repo.resolve(revision)
        if path not in repo.commits[sha]:
            raise HubError(404, "EntryNotFound", f"no file {path}")
        return sha, repo.commits[sha][path]


def card_errors(content: str) -> list[str]:
    """What is wrong in a model card's metadata: https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    block = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    metadata = yaml.safe_load(block[1]) if block else {}
    bases = metadata.get("base_model", [])
    errors = [
        f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        for base in ([bases] if isinstance(bases, str) else bases)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
    ]
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            required = [(model, ["name"]), (result["task"], ["type"]), (result["dataset"], ["type", "name"])]
            required += [(metric, ["type", "value"]) for metric in result["metrics"]]
            errors += [
                f'"model-index" lacks {key} in {part}'
                for part, keys in required
                for key in keys
                if part.get(key) in (None, "")
            ]
    return errors


ROUTES = [
    ("POST", r"/api/repos/create", Hub.create_repo, "json"),
    ("DELETE", r"/api/repos/delete", Hub.delete_repo, "json"),
    ("GET", r"/api/whoami-v2", Hub.whoami, None),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml, "json"),
    ("POST", rf"{API_REPO}/preupload/(?P<revision>[^/]+)", Hub.preupload, "json"),
    ("POST", rf"{FILES_REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch, "json"),
    ("PUT", r"/lfs-upload/(?P<oid>\w+)", Hub.lfs_upload, "raw"),
    ("POST", r"/lfs-verify", Hub.lfs_verify, "json"),
    ("POST", rf"{API_REPO}/commit/(?P<revision>[^/]+)", Hub.commit, "raw"),
    ("GET", rf"{API_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Hub.tree, None),
    ("POST", rf"{API_REPO}/paths-info/(?P<revision>[^/]+)", Hub.paths_info, "json"),
    ("GET", rf"{API_REPO}/refs", Hub.refs, None),
    ("POST", rf"{API_REPO}/branch/(?P<name>[^/]+)", Hub.create_branch, "json"),
    ("POST", rf"{API_REPO}/tag/(?P<revision>[^/]+)", Hub.create_tag, "json"),
    ("GET", rf"{API_REPO}(?:/revision/(?P<revision>[^/]+))?", Hub.repo_info, None),
]
QUERIED = {Hub.tree: ("recursive",), Hub.commit: ("create_pr",)}
WRITING = {Hub.create_repo, Hub.delete_repo, Hub.preupload, Hub.commit, Hub.create_branch, Hub.create_tag}
DOWNLOAD = re.compile(rf"{FILES_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer_json(self, status: int, value, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer_file(self, sha: str, file: File) -> None:
        etag = file.sha256 if file.is_lfs else file.oid
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(file.content))}
        content, status = file.content, 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._answer(status, content, headers)

    def _dispatch(self) -> None:
        body = self._read()
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.command in ("GET", "HEAD") and (match := DOWNLOAD.fullmatch(path)):
                return self._answer_file(*self.hub.download(**match.groupdict()))
            if path.startswith("/api/telemetry"):
                return self._answer_json(200, {})
            for method, pattern, handler, takes in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    return self._answer_json(*self._call(handler, takes, match, url.query, body))
            raise HubError(404, "RepoNotFound", f"no route {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self._answer_json(error.status, {"error": str(error)}, headers)

    def _call(self, handler, takes, match, query: str, body: bytes):
        if handler in WRITING and not self.headers.get("Authorization"):
            raise HubError(401, "Unauthorized", "writing needs a token")
        keywords = {name: value for name, value in match.groupdict().items() if value is not None}
        keywords |= {name: values[0] for name, values in parse_qs(query).items() if name in QUERIED.get(handler, ())}
        if takes == "json":
            return handler(self.hub, self._json(body), **keywords)
        return handler(self.hub, body, **keywords) if takes == "raw" else handler(self.hub, **keywords)

    def _json(self, body: bytes):
        if "form-urlencoded" in self.headers.get("Content-Type", ""):
            return parse_qs(body.decode())
        return json.loads(body) if body else {}

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch
