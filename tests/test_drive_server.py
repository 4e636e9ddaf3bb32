"""The real gdown against the loopback Drive, in one child process: what it makes of every answer."""
import json
import os
import subprocess
import sys

import pytest

from .drive_server import HOSTS, MODES, NOT_THE_FILE, DriveServer

CHUNK = 512 * 1024  # gdown writes a file by such pieces; the last one before a cut is lost
DATA = os.urandom(2 * CHUNK + 1234)
CUT = CHUNK + 5678
CHILD = '''
import json, os, sys
from pathlib import Path
import gdown, requests

def take(mode, **kwargs):
    folder = Path(mode)
    folder.mkdir(exist_ok=True)
    try:
        gdown.download(id=f'id-{mode}', output=str(folder / 'out.bin'), use_cookies=False, quiet=True, **kwargs)
        error = message = ''
    except Exception as raised:
        error, message = f'{type(raised).__module__}.{type(raised).__name__}', str(raised)
    return dict(error=error, message=message, left=sorted(path.name for path in folder.iterdir()))

facts = {mode: take(mode) for mode in sys.argv[1:]}
facts['resumed'] = take('cut_once', resume=True)
facts['unknown'] = take('unknown')
try:
    requests.get('https://example.com', timeout=30)
except requests.exceptions.ProxyError as error:
    facts['elsewhere'] = str(error)
print(json.dumps(facts))
'''


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    """What the child printed, the server, and the folder with a folder per mode; HOME is the folder 'home' in it."""
    room = tmp_path_factory.mktemp('drive')
    with DriveServer() as drive:
        for mode in MODES:
            drive.put(f'id-{mode}', DATA, mode=mode, after=8_000_000 if mode == 'slow' else CUT)
        env = {**os.environ, **drive.env(), 'HOME': str(room / 'home')}
        child = subprocess.run(
            [sys.executable, '-c', CHILD, *MODES], cwd=room, env=env, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stderr == ''
    facts = json.loads(child.stdout)
    for mode, fact in facts.items():
        print(mode, fact)
    return facts, drive, room


@pytest.mark.hub
@pytest.mark.parametrize('mode, expected', [
    ('file', DATA), ('warning', DATA), ('slow', DATA), ('html', NOT_THE_FILE.encode()), ('truncated', DATA[:CUT])])
def test_gdown_takes_for_the_file(outcome, mode, expected):
    facts, _, room = outcome
    assert facts[mode] == dict(error='', message='', left=['out.bin'])
    assert (room / mode / 'out.bin').read_bytes() == expected


@pytest.mark.hub
@pytest.mark.parametrize('mode, message', [
    ('quota', 'Too many users have viewed'), ('private', 'Cannot retrieve the public link'),
    ('missing', 'Cannot retrieve the public link'), ('unknown', 'Cannot retrieve the public link')])
def test_gdown_finds_no_file(outcome, mode, message):
    facts, _, _ = outcome
    assert facts[mode]['error'] == 'gdown.exceptions.FileURLRetrievalError'
    assert message in ' '.join(facts[mode]['message'].split())
    assert facts[mode]['left'] == []


@pytest.mark.hub
@pytest.mark.parametrize('mode', ['short', 'cut_once'])
def test_gdown_tells_of_a_cut_connection(outcome, mode):
    facts, _, room = outcome
    assert facts[mode]['error'] in ('gdown.exceptions.DownloadError', 'requests.exceptions.ChunkedEncodingError')
    left, = facts[mode]['left']
    assert left.startswith('out.bin') and left.endswith('.part')
    if mode == 'short':
        assert (room / mode / left).read_bytes() == DATA[:CHUNK]


@pytest.mark.hub
def test_gdown_resumes(outcome):
    facts, drive, room = outcome
    assert facts['resumed'] == dict(error='', message='', left=['out.bin'])
    assert (room / 'cut_once' / 'out.bin').read_bytes() == DATA
    assert drive.requests.count((HOSTS[0], 'id-cut_once', f'bytes={CHUNK}-')) == 1


@pytest.mark.hub
def test_requests(outcome):
    facts, drive, room = outcome
    assert [request for request in drive.requests if request[1] == 'id-warning'] == [
        (HOSTS[0], 'id-warning', ''), (HOSTS[2], 'id-warning', '')]
    assert [request for request in drive.requests if request[1] == 'id-file'] == [(HOSTS[0], 'id-file', '')]
    assert '403' in facts['elsewhere'] and drive.refused == ['example.com']
    assert not [path for path in (room / 'home').rglob('*') if path.is_file()]  # no cookies are kept


def test_put_refuses():
    with pytest.raises(ValueError, match="mode='late': expected one of file, warning"):
        DriveServer().put('id', b'', mode='late')
    with pytest.raises(ValueError, match='bytes per second'):
        DriveServer().put('id', b'', mode='slow')
