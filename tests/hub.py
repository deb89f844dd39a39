"""A Hugging Face Hub on this machine, and a process that runs the program with it."""
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


def commit(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves `repos`, {"datasets/owner/name" or "models/owner/name": {revision: {file: bytes}}}.

    What it hasn't got it refuses like a private one. `gated`: those that only others may download.
    `breaks`: {file: how often the connection breaks in the middle of it}. `fault`: a status that
    answers everything, or "hang up".
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.nobody = socket.socket()  # holds a port, but does not listen: there is no such server
        self.nobody.bind(("127.0.0.1", 0))
        self.forget()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def forget(self):
        self.repos, self.gated, self.breaks, self.fault, self.asked = {}, set(), {}, None, []

    def requests(self, of):
        """What was asked since the last call: the "files" that were got, or of which "commits"."""
        asked, self.asked = self.asked, []
        return sorted(what for kind, what in asked if kind == of)

    def address(self, listens=True):
        host, port = (self.socket if listens else self.nobody).getsockname()
        return f"http://{host}:{port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if hub.fault:
            self.close_connection = hub.fault == "hang up"
            return self.close_connection or self.say(hub.fault)
        parts = re.fullmatch(r"(?:/api)?/(?:(models|datasets)/)?((?:[^/]+/)??[^/]+)"
                             r"(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path).groups()
        kind, name, about, revision, file = (unquote(part or "") for part in parts)
        repo, revision = f"{kind or 'models'}/{name}", revision or "main"
        if repo not in hub.repos:
            return self.say(401, error="RepoNotFound")
        files = next((files for branch, files in hub.repos[repo].items()
                      if revision in (branch, commit(files))), None)
        if files is None:
            return self.say(404, error="RevisionNotFound")
        if about == "tree":
            return self.say(200, [dict(type="file", path=file, size=len(content), oid=commit(
                {file: content})) for file, content in files.items()])
        if about != "resolve":
            hub.asked.append(("commits", revision))
            return self.say(200, dict(id=name, sha=commit(files), private=False, tags=[],
                                      siblings=[dict(rfilename=file) for file in files]))
        if repo in hub.gated:
            return self.say(401, error="GatedRepo")
        if file not in files:
            return self.say(404, error="EntryNotFound")
        headers = {"X-Repo-Commit": commit(files), "ETag": f'"{commit({file: files[file]})}"'}
        if self.command == "HEAD":
            return self.say(200, files[file], **headers)
        hub.asked.append(("files", file))
        self.close_connection = breaks = hub.breaks.get(file, 0) > 0
        hub.breaks[file] = hub.breaks.get(file, 0) - 1
        self.say(200, files[file], len(files[file]) // 2 if breaks else None, **headers)

    do_HEAD = do_GET

    def say(self, status, body={}, sent=None, error=None, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers |= {"X-Error-Code": error} if error else {}
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def log_message(self, *_):
        """Keeps quiet."""


PROGRAM = """
import importlib, io, json, os, sys, time
import datasets, huggingface_hub.constants, pyarrow.parquet, torch, data, model
with torch.device("meta"):  # where every model is loaded; its code takes a second to import
    model.GPT(model.GPTConfig(n_layer=1))
for line in sys.stdin:
    code, environment = json.loads(line)
    if not os.fork():
        os.environ |= environment
        importlib.reload(huggingface_hub.constants)  # which read it
        sys.stderr, sleep = io.StringIO(), time.sleep
        time.sleep = lambda seconds: sleep(seconds / 1000)  # between one try and the next
        try:
            answer = [eval(code)]
        except Exception as error:
            answer = [None, type(error).__name__, str(error)]
        print(json.dumps([*answer, sys.stderr.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


class Program:
    """Computes expressions of `data` and `model`, each in a fork with an environment of its own: a
    new process in all but the time it takes. Without one, no Hub can be found."""

    def __init__(self, root):
        quiet = dict(PYTHONPATH=root, OMP_NUM_THREADS="1", HF_ENDPOINT="http://127.0.0.1:9",
                     HF_HUB_DISABLE_IMPLICIT_TOKEN="1", HF_HUB_DISABLE_TELEMETRY="1",
                     HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1")
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=os.environ | quiet,
                                        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, code, **environment):
        print(json.dumps([code, environment]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())
