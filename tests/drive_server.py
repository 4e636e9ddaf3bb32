"""Google Drive on loopback, for the real gdown: an HTTP proxy that answers Drive's three hosts itself.

gdown's address of a file is fixed, https://drive.google.com/uc?id=ID. So a child process is given this server as its
HTTPS proxy, and a certificate authority made on the spot as the only one to trust; the proxy ends the TLS itself.
"""
import html
import re
import ssl
import tempfile
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict, List, Tuple
from urllib.parse import parse_qs, urlsplit

import trustme

HOSTS = ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com')
MODES = ('file', 'warning', 'quota', 'private', 'html', 'short', 'truncated', 'missing', 'cut_once', 'slow')
MODIFIED = 'Tue, 02 Apr 2024 10:20:30 GMT'
# gdown reads these pages line by line, and Google puts each on one line.
PAGE = '<!DOCTYPE html><html><head><title>{title}</title></head><body><div class="uc-main">{body}</div></body></html>\n'
WARNING = PAGE.format(title='Google Drive - Virus scan warning', body=(
    '<div id="uc-text"><p class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p>'
    '<p class="uc-warning-subcaption"><span class="uc-name-size"><a href="/open?id={id}">{name}</a> ({size})</span> '
    'is too large for Google to scan for viruses. Would you still like to download this file?</p>'
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="submit" id="uc-download-link" value="Download anyway"/><input type="hidden" name="id" value="{id}">'
    '<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t">'
    '<input type="hidden" name="uuid" value="{uuid}"></form></div>'))
QUOTA = PAGE.format(title='Google Drive - Quota exceeded', body=(
    '<div id="uc-text"><p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>'
    '</div>'))
SIGN_IN = PAGE.format(title='Google Drive: Sign-in', body=(
    '<h1>Sign in</h1><p>to continue to Google Drive</p>'
    '<form method="post"><input type="email" name="identifier"></form>'))
MISSING = PAGE.format(title='Error 404 (Not Found)!!1', body='<p>The requested URL was not found on this server.</p>')
NOT_THE_FILE = PAGE.format(title='Google Drive', body='<p>This page came under the name of the file.</p>')


@dataclass
class _File:
    id: str
    data: bytes
    name: str
    mode: str
    after: int
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    sent: int = 0


class DriveServer:
    """A context manager: the server runs inside it.

    Attributes:
        requests: What was asked of Drive, in order: host, file id, the Range header or ''.
        refused: Hosts that are not Drive's and were refused with 403.
    """

    def __init__(self) -> None:
        self.requests: List[Tuple[str, str, str]] = []
        self.refused: List[str] = []
        self.files: Dict[str, _File] = {}
        self.closing = threading.Event()

    def __enter__(self) -> 'DriveServer':
        authority = trustme.CA()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*HOSTS).configure_cert(self.tls)
        self._folder = tempfile.TemporaryDirectory()
        self._bundle = str(Path(self._folder.name) / 'authority.pem')
        authority.cert_pem.write_to_path(self._bundle)
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'drive': self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._folder.cleanup()

    def env(self) -> Dict[str, str]:
        """What to add to a child's environment."""
        proxy = f'http://127.0.0.1:{self._server.server_port}'
        return {
            'HTTPS_PROXY': proxy, 'https_proxy': proxy, 'NO_PROXY': '127.0.0.1,localhost',
            'no_proxy': '127.0.0.1,localhost', 'REQUESTS_CA_BUNDLE': self._bundle, 'SSL_CERT_FILE': self._bundle}

    def put(self, file_id: str, data: bytes, name: str = 'model.pth.tar', mode: str = 'file', after: int = 0) -> None:
        """Put a file on the Drive, or another in its place.

        Args:
            file_id: Drive's id.
            data: The file.
            name: Its name.
            mode: What Drive does when it is asked for:
                'file': gives it. 'warning': gives the page that it is too large to be scanned, then the file.
                'quota': says that too many have downloaded it. 'private': asks to sign in. 'missing': 404.
                'html': gives a web page as though it were the file. 'truncated': gives the first `after` bytes as
                though they were all. 'short': announces it whole, and never gives a byte beyond `after`, whatever
                range is asked for: closes the connection. 'cut_once': 'short' the first time, 'file' from then on.
                'slow': gives `after` bytes a second.
            after: See `mode`.

        Raises:
            ValueError: If the mode is none of these, or 'slow' has no speed.
        """
        if mode not in MODES:
            raise ValueError(f'mode={mode!r}: expected one of {", ".join(MODES)}')
        if mode == 'slow' and after <= 0:
            raise ValueError(f"mode='slow' with after={after}: expected bytes per second")
        self.files[file_id] = _File(file_id, data, name, mode, after)


class _Handler(BaseHTTPRequestHandler):
    drive: DriveServer
    host = ''  # until a tunnel is asked for
    protocol_version = 'HTTP/1.1'
    server_version = 'ESF'
    timeout = 60

    def log_message(self, format: str, *args) -> None:
        pass

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.connection.close()  # the server knows only the socket below the TLS

    def do_CONNECT(self) -> None:
        host, _, port = self.path.partition(':')
        if host not in HOSTS or port != '443':
            return self._refuse(host)
        self.send_response_only(200, 'Connection established')
        self.end_headers()
        self.close_connection = True
        try:
            self.connection = self.drive.tls.wrap_socket(self.connection, server_side=True)
        except OSError:  # the client does not trust the certificate, or is gone
            return
        self.rfile = self.connection.makefile('rb')
        self.wfile = self.connection.makefile('wb', 0)
        self.host = host
        self.close_connection = False

    def do_GET(self) -> None:
        if not self.host:
            return self._refuse(urlsplit(self.path).hostname or self.path)
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        file = self.drive.files.get(query.get('id', ''))
        self.drive.requests.append((self.host, query.get('id', ''), self.headers.get('Range', '')))
        try:
            if file is None or file.mode == 'missing' or url.path not in ('/uc', '/download'):
                self._page(MISSING, 404)
            elif file.mode == 'quota':
                self._page(QUOTA)
            elif file.mode == 'private':
                self._page(SIGN_IN)
            elif file.mode == 'warning' and not (
                    self.host == HOSTS[2] and query.get('confirm') == 't' and query.get('uuid') == file.uuid):
                self._page(WARNING.format(
                    id=file.id, name=html.escape(file.name), size=f'{len(file.data) // 2**20}M', uuid=file.uuid))
            else:
                self._file(file)
        except OSError:  # the client is gone
            self.close_connection = True

    def _refuse(self, host: str) -> None:
        self.drive.refused.append(host)
        self.send_error(403, 'Not a host of Google Drive')
        self.close_connection = True

    def _page(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self._cookie()
        self.end_headers()
        self.wfile.write(body)

    def _cookie(self) -> None:
        self.send_header(
            'Set-Cookie', 'NID=511; expires=Fri, 01-Jan-2038 00:00:00 GMT; path=/; domain=.google.com; Secure')

    def _file(self, file: _File) -> None:
        data = {'html': NOT_THE_FILE.encode(), 'truncated': file.data[:file.after]}.get(file.mode, file.data)
        file.sent += 1
        start, stop = self._range(len(data))
        if 'Range' in self.headers and start >= stop:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(data)}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        self.send_response(206 if 'Range' in self.headers else 200)
        self.send_header('Content-Type', 'application/octet-stream')
        self.send_header('Content-Disposition', f'attachment; filename="{file.name}"; filename*=UTF-8\'\'{file.name}')
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(stop - start))
        if 'Range' in self.headers:
            self.send_header('Content-Range', f'bytes {start}-{stop - 1}/{len(data)}')
        self.send_header('Last-Modified', MODIFIED)
        self._cookie()
        self.end_headers()
        if file.mode == 'short' or (file.mode == 'cut_once' and file.sent == 1):
            self.wfile.write(data[start:min(stop, file.after)])
            self.close_connection = True
        elif file.mode == 'slow':
            step = max(1, file.after // 20)
            for place in range(start, stop, step):
                if self.drive.closing.wait(step / file.after):
                    self.close_connection = True
                    return
                self.wfile.write(data[place:min(stop, place + step)])
        else:
            self.wfile.write(data[start:stop])

    def _range(self, size: int) -> Tuple[int, int]:
        """First byte asked for, and the one after the last."""
        match = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if match is None or self.headers.get('If-Range', MODIFIED) != MODIFIED:
            del self.headers['Range']  # the whole file, then
            return 0, size
        return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
