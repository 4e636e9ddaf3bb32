"""A Hugging Face Hub on loopback that the real client can talk to, with faults on demand.

Models only, plain HTTP and LFS, no Xet and no redirects. Every known token may write everywhere; an upload counts once
a commit names it. Faults happen on the socket, below the client.

    with HubServer() as hub:
        oid = hub.put('noah-zoo/tiny', {'config.json': b'{}'})
        hub.fault('status', method='HEAD', path='config.json', code=503)
        subprocess.run([sys.executable, 'download.py', oid], env=hub.env(home), check=True)
        assert [request.status for request in hub.requests] == [503, 200, 200]
"""
import base64
import fcntl
import hashlib
import json
import os
import re
import socket
import socketserver
import struct
import sys
import termios
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple, Union
from urllib.parse import parse_qs, parse_qsl, unquote

import yaml

ACTIONS = ('status', 'reset', 'cut', 'flip', 'short', 'hang', 'slow', 'etag', 'page')
LFS_SUFFIXES = ('.safetensors', '.bin', '.png')
LFS_ABOVE = 10 * 1000 ** 2  # bytes
BLOCK = 1 << 20
Body = Union[bytes, bytearray, memoryview]
Answer = Tuple[int, Dict[str, str], Body]


class Request(NamedTuple):
    """A line of the log, written when the request arrives; the status follows just before the answer leaves."""
    method: str
    path: str  # unquoted, without the query
    range: Optional[str]
    token: Optional[str]
    status: Optional[int]  # None: not answered (yet)
    time: float  # of arrival, seconds since the epoch


class _File(NamedTuple):
    data: bytes
    blob: str  # git's name of the file, or of the pointer to it
    sha256: Optional[str]  # of an LFS file
    pointer: int  # bytes of the pointer

    @classmethod
    def make(cls, path: str, data: bytes) -> '_File':
        if not _is_lfs(path, len(data)):
            return cls(data, _git_sha1('blob', data), None, 0)
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n'.encode()
        return cls(data, _git_sha1('blob', pointer), sha256, len(pointer))

    def lfs(self, key: str) -> Dict[str, Any]:
        """What listings add for an LFS file, its hash under the given key."""
        size = len(self.data)
        return {'lfs': {key: self.sha256, 'size': size, 'pointerSize': self.pointer}} if self.sha256 else {}


class _Commit(NamedTuple):
    files: Dict[str, _File]
    parent: Optional[str]
    message: str
    date: str


@dataclass
class _Repo:
    private: bool = False
    gated: bool = False
    granted: Set[str] = field(default_factory=set)
    commits: Dict[str, _Commit] = field(default_factory=dict)
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    objects: Dict[str, bytes] = field(default_factory=dict)  # LFS uploads by sha256

    def oid(self, revision: str) -> str:
        found = self.branches.get(revision) or self.tags.get(revision)
        if not found and revision not in self.commits:
            raise _Refused(404, f'No revision {revision}', 'RevisionNotFound')
        return found or revision

    def commit(self, branch: str, files: Mapping[str, _File], message: str) -> str:
        parent, files = self.branches.get(branch), dict(sorted(files.items()))
        tree = '\n'.join(f'{file.blob} {path}' for path, file in files.items())
        oid = _git_sha1('commit', f'tree\n{tree}\nparent {parent}\n\n{message}'.encode())
        self.commits[oid] = _Commit(files, parent, message, _now())
        self.branches[branch] = oid
        return oid


@dataclass
class _Rule:
    action: str
    method: str
    path: str
    times: Optional[int]
    details: Dict[str, Any]

    def takes(self, method: str, path: str) -> bool:
        if self.times == 0 or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        if self.times is not None:
            self.times -= 1
        return True


class HubServer:
    """A Hub on loopback. Use as a context manager.

    Args:
        users: Name of the user by token.

    Attributes:
        url: http://127.0.0.1:PORT, the same after a stop and a start.
        requests: The log, in order of arrival.
    """

    def __init__(self, users: Mapping[str, str] = {'hf_owner': 'noah-zoo'}):
        self.users = dict(users)
        self.url = ''
        self.requests: List[Request] = []
        self._repos: Dict[str, _Repo] = {}
        self._rules: List[_Rule] = []
        self._lock = threading.RLock()
        self._port = 0
        self._server: Optional[_Server] = None

    def __enter__(self) -> 'HubServer':
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the port of before if there was one. Nothing is lost between a stop and a start."""
        if self._server is None:
            self._server = _Server(self, self._port)
            self._port = self._server.server_address[1]
            self.url = f'http://127.0.0.1:{self._port}'
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Drop every connection and refuse new ones."""
        server, self._server = self._server, None
        if server is not None:
            server.stopped.set()
            server.shutdown()
            server.server_close()
            server.hang_up()

    def env(self, home: Path, token: Optional[str] = None) -> Dict[str, str]:
        """Variables of a child process that knows this Hub only: none of the parent's tokens, HF_* and proxies."""
        dropped = re.compile(r'HF_.*|HUGGING_?FACE_.*|.*_PROXY', re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not dropped.fullmatch(name)}
        env.update(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
                   HF_HUB_DISABLE_PROGRESS_BARS='1')
        return {**env, 'HF_TOKEN': token} if token else env

    def put(
            self, repo_id: str, files: Mapping[str, bytes], private: Optional[bool] = None,
            gated: Optional[bool] = None, message: str = 'Put files', granted: Optional[Collection[str]] = None) -> str:
        """Commit files to main over those it has and return the commit's oid.

        A repository that does not exist is created as the Hub does, with a first commit of `.gitattributes`.

        Args:
            private: Only known tokens see it; None leaves it as it is.
            gated: Only `granted` users and the owner of the namespace read its files; None leaves it as it is.
            granted: User names.
        """
        with self._lock:
            repo = self._repos.get(repo_id) or self._create(repo_id)
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else gated
            repo.granted = repo.granted if granted is None else set(granted)
            made = {path: _File.make(path, data) for path, data in files.items()}
            repo.objects.update({file.sha256: file.data for file in made.values() if file.sha256})
            return repo.commit('main', {**repo.commits[repo.branches['main']].files, **made}, message)

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        """Path to content at a branch, tag or commit, `.gitattributes` among them."""
        with self._lock:
            repo = self._repos[repo_id]
            return {path: file.data for path, file in repo.commits[repo.oid(revision)].files.items()}

    def tags(self, repo_id: str) -> Dict[str, str]:
        """Tag to commit oid."""
        with self._lock:
            return dict(self._repos[repo_id].tags)

    def commits(self, repo_id: str) -> List[str]:
        """The oids of main, the first commit first."""
        with self._lock:
            repo = self._repos[repo_id]
            oids = [repo.branches['main']]
            while parent := repo.commits[oids[-1]].parent:
                oids.append(parent)
            return oids[::-1]

    def fault(
            self, action: str, method: str = 'GET', path: str = '.*', times: Optional[int] = 1,
            **details: Any) -> None:
        """Spoil the next requests that match; of the rules that match a request, the oldest acts.

        Actions and their details:
            status: code=503, headers={}, error_code='', error_message='': this answer instead.
            reset: after=0: headers, that many bytes of the body, then a TCP reset. None: not even headers.
            cut: after=0: the same, but the connection is closed in order.
            flip: One byte in the middle of the body is wrong.
            short: by=1: so many bytes are missing at the end, and no header of this answer tells.
            hang: seconds=60, after=None: silence, then on; before the request is read, or after so many bytes of
                the body of the answer.
            slow: rate: bytes per second, of what is read and of what is sent.
            etag: value: a wrong etag.
            page: body, content_type='text/html': this body with status 200 instead.

        A `reset` or `cut` of a PUT counts the bytes of the upload; one of a HEAD sends nothing.

        Args:
            method: Regular expression of the whole method, such as 'GET|HEAD'.
            path: Regular expression searched in the unquoted path of the URL.
            times: Number of requests, None for ever.
        """
        if action not in ACTIONS:
            raise ValueError(f'action={action!r} is none of {ACTIONS}')
        with self._lock:
            self._rules.append(_Rule(action, method, path, times, details))

    def clear_faults(self) -> None:
        """Forget every rule; a request under way keeps its own."""
        with self._lock:
            self._rules.clear()

    def _create(self, repo_id: str) -> _Repo:
        repo = self._repos[repo_id] = _Repo()
        rules = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES)
        repo.commit('main', {'.gitattributes': _File.make('.gitattributes', rules.encode())}, 'initial commit')
        return repo

    def _arrived(self, request: Request) -> Tuple[str, Dict[str, Any]]:
        """Log a request; its fault's action ('' without one) and details."""
        with self._lock:
            self.requests.append(request)
            rule = next((rule for rule in self._rules if rule.takes(request.method, request.path)), None)
            return (rule.action, rule.details) if rule else ('', {})

    def _answered(self, request: Request, status: int) -> None:
        with self._lock:
            for index, logged in enumerate(self.requests):
                if logged is request:
                    self.requests[index] = request._replace(status=status)


class _Server(socketserver.ThreadingTCPServer):
    """The listening socket and the connections of one start."""
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, port: int):
        self.hub = hub
        self.stopped = threading.Event()
        self._live: Set[socket.socket] = set()
        super().__init__(('127.0.0.1', port), _Handler)

    def get_request(self) -> Tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self.hub._lock:
            self._live.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        with self.hub._lock:
            self._live.discard(request)
        super().close_request(request)

    def hang_up(self) -> None:
        with self.hub._lock:
            for connection in self._live:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the other side was faster
                    pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no error of ours
            super().handle_error(request, client_address)


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = '', **headers: str):
        super().__init__(message)
        named = {'X-Error-Code': code, 'X-Error-Message': message}
        headers = {**{name: value for name, value in named.items() if value}, **headers}
        self.answer: Answer = (status, headers, json.dumps({'error': message}).encode())


_ROUTES: List[Tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def _route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Serve paths, in which REPO stands for namespace/name and a group is passed on, unquoted, by its name."""
    def add(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((method, re.compile(pattern.replace('REPO', '(?P<repo>[^/]+/[^/]+)')), function))
        return function
    return add


class _Handler(BaseHTTPRequestHandler):
    """One connection. A route is called under the Hub's lock with the request read, and sends nothing itself."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.hub = self.server.hub
        self.path, _, query = self.path.partition('?')
        self.query = dict(parse_qsl(query))
        self.token = self.headers.get('Authorization', '').removeprefix('Bearer ') or None
        self.request_line = Request(
            self.command, unquote(self.path), self.headers.get('Range'), self.token, None, time.time())
        self.action, self.details = self.hub._arrived(self.request_line)
        try:
            if self.action == 'hang' and self.details.get('after') is None:
                self._pause(self.details.get('seconds', 60))
            self.body = self._receive()
            self._send(*self._answer())
        except OSError:  # the connection is lost, by a fault or by the client
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _receive(self) -> bytes:
        """The whole body of the request: one that ends early raises."""
        spoilt = self.command == 'PUT' and self.action in ('reset', 'cut')
        body = bytearray()
        for block in self._blocks():
            body += block
            if spoilt and len(body) >= (self.details.get('after') or 0):
                break
        if spoilt:
            self._drop()
        return bytes(body)

    def _blocks(self) -> Iterator[bytes]:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            yield from self._read(int(self.headers.get('Content-Length', 0)))
            return
        while size := int(self.rfile.readline().partition(b';')[0] or b'-1', 16):
            yield from self._read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _read(self, size: int) -> Iterator[bytes]:
        while size:
            wanted = min(size, self._step())
            block = self.rfile.read(wanted) if wanted > 0 else b''
            if len(block) != wanted:
                raise ConnectionAbortedError('the client is gone')
            self._pace(len(block))
            size -= len(block)
            yield block

    def _answer(self) -> Answer:
        details = self.details
        if self.action == 'page':
            return 200, {'Content-Type': details.get('content_type', 'text/html')}, details['body']
        try:
            if self.action == 'status':
                raise _Refused(details.get('code', 503), details.get('error_message', ''),
                               details.get('error_code', ''), **details.get('headers', {}))
            for method, pattern, function in _ROUTES:
                if re.fullmatch(method, self.command) and (match := pattern.fullmatch(self.path)):
                    with self.hub._lock:
                        return function(self, **{key: unquote(text or '') for key, text in match.groupdict().items()})
            raise _Refused(404, f'This Hub has no {self.command} {self.path}')
        except _Refused as refused:
            return refused.answer

    def _send(self, status: int, headers: Dict[str, str], body: Body) -> None:
        action, after = self.action, self.details.get('after', 0)
        size = len(body)
        if action == 'flip' and body:
            body = bytearray(body)
            body[size // 2] ^= 0xFF
        elif action == 'short':
            by = self.details.get('by', 1)
            body = memoryview(body)[:max(size - by, 0)]
            headers.update({key: str(int(headers[key]) - by) for key in ('X-Linked-Size',) if key in headers})
        elif action == 'etag':
            value = self.details['value']
            headers.update({key: f'"{value}"' for key in ('ETag', 'X-Linked-Etag') if key in headers})
        drops = action in ('reset', 'cut')
        if drops and (after is None or self.command == 'HEAD'):
            self._drop()
        self.hub._answered(self.request_line, status)
        self.send_response(status)
        for key, value in {'Content-Type': 'application/json', **headers, 'Content-Length': str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        split = after if drops or action == 'hang' and after else len(body)
        self._write(memoryview(body)[:split])
        if drops:
            self._drop()
        if action == 'hang' and after:
            self._pause(self.details.get('seconds', 60))
        self._write(memoryview(body)[split:])

    def _write(self, body: memoryview) -> None:
        for start in range(0, len(body), self._step()):
            block = body[start:start + self._step()]
            self.wfile.write(block)
            self._pace(len(block))

    def _step(self) -> int:
        return max(1, min(BLOCK, int(self.details['rate'] / 20))) if self.action == 'slow' else BLOCK

    def _pace(self, size: int) -> None:
        if self.action == 'slow':
            self._pause(size / self.details['rate'])

    def _pause(self, seconds: float) -> None:
        if self.server.stopped.wait(seconds):
            raise ConnectionAbortedError('the Hub stopped')

    def _drop(self) -> None:
        """End the connection: for a reset at once, else by the close that follows any error."""
        if self.action == 'reset':
            # A reset throws away what is still in the send queue, so the client takes all of it first.
            deadline = time.monotonic() + 10
            while struct.unpack('i', fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))[0]:
                if time.monotonic() > deadline:
                    break
                self._pause(0.01)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            with self.hub._lock:  # not while hang_up uses it
                socket.close(self.connection.detach())
        raise ConnectionAbortedError(self.action)

    def _json(self) -> Dict[str, Any]:
        return json.loads(self.body)

    def _user(self) -> Optional[str]:
        if self.token is not None and self.token not in self.hub.users:
            raise _Refused(401, 'Invalid credentials in Authorization header')
        return self.hub.users.get(self.token or '')

    def _writer(self) -> str:
        user = self._user()
        if user is None:
            raise _Refused(401, 'Only a known token may write')
        return user

    def _repo(self, repo: str) -> _Repo:
        user, found = self._user(), self.hub._repos.get(repo)
        if found is None or found.private and user is None:
            raise _Refused(404 if user else 401, 'Repository not found', 'RepoNotFound')
        return found

    @_route('GET', '/api/whoami-v2')
    def _whoami(self) -> Answer:
        user = self._writer()
        token = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}
        return _ok({'type': 'user', 'id': user, 'name': user, 'fullname': user, 'orgs': [], 'auth': token})

    @_route('GET', '/api/agent-harnesses')
    def _harnesses(self) -> Answer:
        return _ok({'standardEnvVars': [], 'harnesses': {}})

    @_route('POST', '/api/validate-yaml')
    def _validate(self) -> Answer:
        try:
            _card(self._json()['content'])
        except (ValueError, yaml.YAMLError) as error:
            return _ok({'errors': [{'message': f'{error}'}], 'warnings': []}, 400)
        return _ok({'errors': [], 'warnings': []})

    @_route('POST', '/api/repos/create')
    def _create(self) -> Answer:
        given = self._json()
        repo_id = f'{given.get("organization") or self._writer()}/{given["name"]}'
        self._writer()
        if given.get('type') not in (None, 'model'):
            raise _Refused(400, 'This Hub has models only')
        answer = {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id}
        if repo_id in self.hub._repos:
            return 409, {'X-Error-Message': 'The name is taken'}, _ok({**answer, 'error': 'The name is taken'})[2]
        repo = self.hub._create(repo_id)
        repo.private = given.get('visibility') == 'private' or bool(given.get('private'))
        return _ok(answer)

    @_route('DELETE', '/api/repos/delete')
    def _delete(self) -> Answer:
        given = self._json()
        repo_id = f'{given.get("organization") or self._writer()}/{given["name"]}'
        self._writer()
        self._repo(repo_id)
        del self.hub._repos[repo_id]
        return _ok({})

    @_route('POST', '/api/models/REPO/preupload/(?P<revision>[^/]+)')
    def _preupload(self, repo: str, revision: str) -> Answer:
        self._writer()
        found = self._repo(repo)
        files, answers = found.commits[found.oid(revision)].files, []
        for given in self._json()['files']:
            mode = 'lfs' if _is_lfs(given['path'], given['size']) else 'regular'
            known = files.get(given['path'])
            oid = {'oid': known.sha256 or known.blob} if known else {}
            answers.append({'path': given['path'], 'uploadMode': mode, 'shouldIgnore': False, **oid})
        return _ok({'files': answers})

    @_route('POST', r'/REPO\.git/info/lfs/objects/batch')
    def _batch(self, repo: str) -> Answer:
        self._writer()
        found, objects = self._repo(repo), []
        for given in self._json()['objects']:
            if given['oid'] not in found.objects:
                upload = f'{self.hub.url}/lfs/{repo}/{given["oid"]}?size={given["size"]}'
                given['actions'] = {'upload': {'href': upload}, 'verify': {'href': f'{self.hub.url}/lfs/{repo}/verify'}}
            objects.append(given)
        return _ok({'transfer': 'basic', 'objects': objects})

    @_route('PUT', '/lfs/REPO/(?P<oid>[0-9a-f]{64})')
    def _upload(self, repo: str, oid: str) -> Answer:
        if str(len(self.body)) != self.query.get('size') or hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, 'These bytes are not the announced ones')
        if repo not in self.hub._repos:
            raise _Refused(404, 'Repository not found', 'RepoNotFound')
        self.hub._repos[repo].objects[oid] = self.body
        return _ok({})

    @_route('POST', '/lfs/REPO/verify')
    def _verify(self, repo: str) -> Answer:
        given, objects = self._json(), self._repo(repo).objects
        if len(objects.get(given['oid'], b'')) != given['size']:
            raise _Refused(404, 'No such object')
        return _ok({})

    @_route('POST', '/api/models/REPO/commit/(?P<revision>[^/]+)')
    def _commit(self, repo: str, revision: str) -> Answer:
        self._writer()
        found = self._repo(repo)
        if revision not in found.branches or self.query.get('create_pr'):
            raise _Refused(404, f'No branch {revision}', 'RevisionNotFound')
        files, header = dict(found.commits[found.branches[revision]].files), {}
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation['key'], operation['value']
            path = value.get('path', '')
            if key == 'header':
                header = value
            elif key == 'file':
                files[path] = _File.make(path, base64.b64decode(value['content']))
            elif key == 'lfsFile':
                if value['oid'] not in found.objects:
                    raise _Refused(400, f'{path}: {value["oid"]} was not uploaded')
                files[path] = _File.make(path, found.objects[value['oid']])
            elif key in ('deletedFile', 'deletedFolder'):
                gone = [name for name in files if name == path or name.startswith(path.rstrip('/') + '/')]
                if not gone:
                    raise _Refused(404, f'Nothing to delete at {path}', 'EntryNotFound')
                for name in gone:
                    del files[name]
            else:
                raise _Refused(400, f'Unknown operation {key}')
        if header.get('parentCommit', found.branches[revision]) != found.branches[revision]:
            raise _Refused(412, f'{revision} is no longer at {header["parentCommit"]}')
        oid = found.commit(revision, files, header['summary'])
        return _ok({'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo}/commit/{oid}'})

    @_route('POST|DELETE', '/api/models/REPO/(?P<kind>tag|branch)/(?P<name>[^/]+)')
    def _reference(self, repo: str, kind: str, name: str) -> Answer:
        # The path of a new tag names what it points at; every other path names the reference itself.
        self._writer()
        found, given = self._repo(repo), json.loads(self.body or b'{}')
        names = found.tags if kind == 'tag' else found.branches
        if self.command == 'DELETE':
            if names.pop(name, None) is None:
                raise _Refused(404, f'No {kind} {name}', 'RevisionNotFound')
            return _ok({})
        name, start = (given['tag'], name) if kind == 'tag' else (name, given.get('startingPoint', 'main'))
        if name in names:
            raise _Refused(409, f'The {kind} {name} exists')
        names[name] = found.oid(start)
        return _ok({}, 201)

    @_route('GET', '/api/models/REPO/refs')
    def _refs(self, repo: str) -> Answer:
        found = self._repo(repo)
        heads, tags = (
            [{'name': name, 'ref': f'refs/{folder}/{name}', 'targetCommit': oid} for name, oid in refs.items()]
            for folder, refs in (('heads', found.branches), ('tags', found.tags)))
        return _ok({'branches': heads, 'tags': tags, 'converts': [], 'pullRequests': []})

    @_route('GET', '/api/models/REPO(/revision/(?P<revision>[^/]+))?')
    def _info(self, repo: str, revision: str) -> Answer:
        found = self._repo(repo)
        oid = found.oid(revision or 'main')
        files, siblings = found.commits[oid].files, []
        for path, file in files.items():
            blobs = {'size': len(file.data), 'blobId': file.blob, **file.lfs('sha256')}
            siblings.append({'rfilename': path, **(blobs if self.query.get('blobs') else {})})
        try:
            card = _card(files['README.md'].data.decode()) if 'README.md' in files else {}
        except (ValueError, yaml.YAMLError):
            card = {}
        return _ok({
            'id': repo, 'modelId': repo, 'author': repo.partition('/')[0], 'sha': oid, 'private': found.private,
            'gated': 'manual' if found.gated else False, 'disabled': False, 'tags': card.get('tags') or [],
            'library_name': card.get('library_name'), 'pipeline_tag': card.get('pipeline_tag'), 'cardData': card,
            'siblings': siblings, 'lastModified': found.commits[oid].date, 'downloads': 0, 'likes': 0})

    @_route('GET', '/api/models/REPO/tree/(?P<revision>[^/]+)(/(?P<path>.+))?')
    def _tree(self, repo: str, revision: str, path: str) -> Answer:
        found = self._repo(repo)
        start = f'{path}/' if path else ''
        listed = {name: row for name, row in _listing(found.commits[found.oid(revision)].files).items()
                  if name.startswith(start)}
        if not listed and path:
            raise _Refused(404, f'No folder {path}', 'EntryNotFound')
        deep = self.query.get('recursive', '').lower() in ('true', '1')
        return _ok([row for name, row in listed.items() if deep or '/' not in name[len(start):]])

    @_route('POST', '/api/models/REPO/paths-info/(?P<revision>[^/]+)')
    def _paths_info(self, repo: str, revision: str) -> Answer:
        found = self._repo(repo)
        listed = _listing(found.commits[found.oid(revision)].files)
        return _ok([listed[path] for path in parse_qs(self.body.decode()).get('paths', []) if path in listed])

    @_route('GET|HEAD', '/REPO/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
    def _resolve(self, repo: str, revision: str, path: str) -> Answer:
        found, user = self._repo(repo), self._user()
        if found.gated and user not in {*found.granted, repo.partition('/')[0]}:
            raise _Refused(403 if user else 401, f'{repo} is open to granted users only', 'GatedRepo')
        oid = found.oid(revision)
        file = found.commits[oid].files.get(path)
        if file is None:
            raise _Refused(404, f'No file {path}', 'EntryNotFound', **{'X-Repo-Commit': oid})
        size = len(file.data)
        headers = {
            'Content-Type': 'application/octet-stream', 'Accept-Ranges': 'bytes', 'X-Repo-Commit': oid,
            'ETag': f'"{file.sha256 or file.blob}"'}
        if file.sha256:
            headers.update({'X-Linked-Etag': f'"{file.sha256}"', 'X-Linked-Size': str(size)})
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if span is None:
            return 200, headers, file.data
        first, last = int(span[1]), min(int(span[2] or size), size - 1)
        if first > last:
            raise _Refused(416, 'Nothing in this range', **{'Content-Range': f'bytes */{size}'})
        headers['Content-Range'] = f'bytes {first}-{last}/{size}'
        return 206, headers, memoryview(file.data)[first:last + 1]


def _ok(answer: Any, status: int = 200) -> Answer:
    return status, {}, json.dumps(answer).encode()


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_ABOVE)


def _git_sha1(kind: str, data: bytes) -> str:
    return hashlib.sha1(f'{kind} {len(data)}\0'.encode() + data).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.000Z')


def _card(text: str) -> Dict[str, Any]:
    """The metadata block that opens a README, {} without one; ValueError where it is no mapping."""
    block = re.match(r'\s*---\r?\n(.*?)\r?\n---\s*(\n|$)', text, re.DOTALL)
    card = yaml.safe_load(block[1]) if block else {}
    if not isinstance(card, dict):
        raise ValueError(f'the metadata must be a mapping, not a {type(card).__name__}')
    return json.loads(json.dumps(card, default=str))


def _listing(files: Mapping[str, _File]) -> Dict[str, Dict[str, Any]]:
    """Rows of a tree by path, folders before what they hold."""
    rows: Dict[str, Dict[str, Any]] = {}
    for path, file in files.items():
        parts = path.split('/')
        for depth in range(1, len(parts)):
            folder = '/'.join(parts[:depth])
            rows.setdefault(folder, {
                'type': 'directory', 'path': folder, 'size': 0, 'oid': _git_sha1('tree', folder.encode())})
        rows[path] = {'type': 'file', 'path': path, 'size': len(file.data), 'oid': file.blob, **file.lfs('oid')}
    return rows
