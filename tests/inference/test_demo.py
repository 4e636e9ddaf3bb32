"""The demo page: its functions, its server, and the page in a real browser (marker 'browser')."""
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import gradio as gr
import pytest
import timm
import yaml
from PIL import Image

import noah_zoo.inference
from noah_zoo import add_noah_head
from noah_zoo.data.images import read_image
from noah_zoo.inference.demo import create_page, distinct, guess, look_for, make_pair
from noah_zoo.inference.predict import DEFAULT_MODEL, SAMPLES, predict

from ..commands import call

ROOT = Path(__file__).resolve().parents[2]
BAG = SAMPLES / '0018_bag.png'


@pytest.fixture(scope='module')
def pair():
    return make_pair(DEFAULT_MODEL)


def test_guesses_are_those_of_predict(pair):
    index, guesses = guess(pair.model, read_image(BAG), pair.names)
    expected = next(predict(pair.model, [BAG], 5))['predictions']
    assert list(guesses) == [one['label'] for one in expected] and index == expected[0]['index']
    assert list(guesses.values()) == pytest.approx([one['probability'] for one in expected], rel=1e-4)
    assert pair.reason == '' and list(guess(pair.twin, read_image(BAG), pair.names)[1])[0] == 'Bag'


def test_where_it_looked(pair):
    pictures = look_for(pair, read_image(BAG), 8)
    assert [title for _, title in pictures] == [
        'the image', 'all blocks', *(f'block {n} of 8' for n in range(1, 9)), 'Grad-CAM++']
    assert all(picture.size == (256, 256) for picture, _ in pictures)
    others = look_for(pair, read_image(BAG), 0)
    assert all(one.tobytes() != other.tobytes() for (one, _), (other, _) in zip(pictures[1:], others[1:]))


def test_a_model_without_twin_or_head(tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'plain')
    plain = make_pair(f'local-dir:{tmp_path / "plain"}')
    assert plain.twin is None and plain.reason.startswith('Without its vanilla twin. local-dir:')
    with pytest.raises(ValueError, match='no NOAH head'):
        look_for(plain, read_image(BAG), 0)


@pytest.mark.parametrize('channels', [1, 4])
def test_a_model_of_other_channels(channels, tmp_path):
    timm.models.save_for_hf(
        add_noah_head(timm.create_model('test_resnet', num_classes=3, in_chans=channels)), tmp_path / 'saved')
    name = f'local-dir:{tmp_path / "saved"}'
    page = create_page([name])
    classify = next(f.fn for f in page.fns.values() if f.fn.__name__ == 'classify')
    asked, noah, _, maps, message = classify(str(BAG), name)
    assert asked.image == str(BAG) and message.startswith('Without its vanilla twin'), message
    expected = next(predict(make_pair(name).model, [str(BAG)]))['predictions']
    assert {c['label']: c['confidence'] for c in noah.value['confidences']} == pytest.approx(
        {one['label']: one['probability'] for one in expected})


def test_samples_of_ones_own(tmp_path):
    for i, colour in enumerate(('white', 'black', *['gray'] * 50)):
        with Image.open(BAG).convert('RGB') as bag:
            bag.paste(colour, (0, 0, 8, 8))
            bag.resize((600, 400)).save(tmp_path / f'{i:02}.jpg')
    page = create_page([DEFAULT_MODEL], samples=[str(tmp_path)])
    gallery = next(block for block in page.blocks.values() if getattr(block, 'elem_id', '') == 'samples')
    assert len(gallery.value) == 50 + len(list(SAMPLES.glob('*.png')))
    with Image.open(gallery.value[0]['image']['path']) as shown:
        assert shown.size == (256, 171) and shown.getpixel((2, 2)) != (0, 0, 0)
    classify = next(f.fn for f in page.fns.values() if f.fn.__name__ == 'classify_sample')
    asked, *_ = classify(DEFAULT_MODEL, gr.SelectData(None, {'index': 1, 'value': None}))
    assert asked.image == str(tmp_path / '01.jpg')
    with pytest.raises(FileNotFoundError, match='nowhere: no such file or folder'):
        create_page(samples=['nowhere'])
    (tmp_path / 'broken.png').write_text('no image')
    with pytest.raises(ValueError, match='broken.png: not a readable image'):
        create_page(samples=[str(tmp_path / 'broken.png')])


def test_classes_of_one_name():
    assert distinct(['crane', 'cat', 'crane']) == ['crane (0)', 'cat', 'crane (2)']


def test_the_page_offers_the_models():
    def choices(*models):
        return next(block.choices for block in create_page(*models).blocks.values() if hasattr(block, 'choices'))
    names = [name for name, _ in choices()]
    assert names[0] == DEFAULT_MODEL and len(names) == 26 and all(n.endswith('.osvai_in1k') for n in names[1:])
    assert [name for name, _ in choices(['hf-hub:you/photos'])] == ['hf-hub:you/photos']


def test_the_space():
    header = yaml.safe_load((ROOT / 'space' / 'README.md').read_text(encoding='utf-8').split('---')[1])
    assert header['sdk'] == 'gradio' and (ROOT / 'space' / header['app_file']).is_file()
    assert header['sdk_version'].startswith('6.') and len(header['short_description']) <= 60


class Launched:
    """In the place of a server: what the page was launched with."""

    def __init__(self, monkeypatch, error=None):
        self.error, self.settings = error, None
        monkeypatch.setattr(gr.Blocks, 'launch', self)
        monkeypatch.setattr(time, 'sleep', self.interrupt)

    def __call__(self, **settings):
        self.settings = settings
        if self.error:
            raise self.error

    @staticmethod
    def interrupt(seconds):
        raise KeyboardInterrupt


def test_the_command(monkeypatch, tmp_path):
    launched = Launched(monkeypatch)
    Image.open(BAG).save(tmp_path / 'mine.png')
    done = call('demo', '--model', DEFAULT_MODEL, '--samples', tmp_path, '--port', 8123)
    assert (done.returncode, done.stdout) == (0, 'http://127.0.0.1:8123  (Ctrl-C ends it)\n\n'), done.stderr
    settings = launched.settings
    assert (settings['server_name'], settings['server_port'], settings['prevent_thread_lock']) == (
        '127.0.0.1', 8123, True)
    assert settings['share'] is False and '#samples' in settings['css']


@pytest.mark.parametrize('error', [OSError('Cannot find empty port in range'), OverflowError('port must be 0-65535')])
def test_a_port_that_is_taken(error, monkeypatch):
    Launched(monkeypatch, error)
    done = call('demo', '--model', DEFAULT_MODEL, '--port', 8123)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == ('noah-zoo demo: error: cannot listen on 127.0.0.1:8123, which is in use or is not of this '
                           'machine; give another --port or --host\n')


def test_a_missing_package(monkeypatch):
    monkeypatch.delitem(sys.modules, 'noah_zoo.inference.demo')
    monkeypatch.delattr(noah_zoo.inference, 'demo', raising=False)
    monkeypatch.setitem(sys.modules, 'gradio', None)
    done = call('demo')
    assert done.returncode == 2 and "pip install 'noah-zoo[demo]'" in done.stderr and 'Traceback' not in done.stderr


def functions(page):
    """What happens on the page, by name."""
    return {f.fn.__name__: f.fn for f in page.fns.values() if f.fn}


def test_what_a_visitor_does(tmp_path):
    does = functions(create_page([DEFAULT_MODEL]))
    asked, noah, twin, maps, message = does['classify'](str(BAG), f' {DEFAULT_MODEL} ')
    assert asked == (str(BAG), DEFAULT_MODEL) and message == '' and 'Bag' in maps.label
    assert noah.value['label'] == 'Bag' and noah.label == 'mobilenetv2_035_noah: click a class'
    assert twin.value['label'] == 'Bag' and twin.label == 'mobilenetv2_035, the vanilla twin'
    again = does['classify_again'](asked, DEFAULT_MODEL)
    assert again[0] == asked and again[1].value == noah.value
    maps, message = does['look'](asked, gr.SelectData(None, {'index': 0, 'value': 'Shirt'}))
    assert maps.label == 'Shirt: where mobilenetv2_035_noah looked' and message == '' and len(maps.value) == 11
    assert does['classify_again'](None, DEFAULT_MODEL)[0] is None  # no image yet
    for image, name, said in ((str(tmp_path / 'none.png'), DEFAULT_MODEL, 'none.png'),
                              (str(BAG), 'resnet18_noha', 'did you mean resnet18_noah')):
        asked, *labels, maps, message = does['classify'](image, name)
        assert asked is None and maps == [] and said in message and not any(label.value for label in labels)


def test_maps_of_a_model_without_the_head(tmp_path):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'plain')
    name = f'local-dir:{tmp_path / "plain"}'
    *_, maps, message = functions(create_page([name]))['classify'](str(BAG), name)
    assert not maps.value and 'no NOAH head' in message and 'Without its vanilla twin' in message


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def server():
    """The address of a real `scripts/demo.py`, which Ctrl-C ends without a word."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'scripts' / 'demo.py'), '--port', str(free_port())], cwd='/',
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
    line = process.stdout.readline()
    yield re.match(r'http://127\.0\.0\.1:\d+', line)[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert 'Traceback' not in process.stderr.read()


def interruptible():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.process
def test_the_server(server):
    page = urllib.request.urlopen(server, timeout=30).read().decode()
    assert 'Where does NOAH look?' in page
    for port in (server.rpartition(':')[2], '99999'):
        taken = subprocess.run(
            [sys.executable, str(ROOT / 'scripts' / 'demo.py'), '--port', port],
            capture_output=True, text=True, timeout=100, check=False)
        assert taken.returncode == 2
        assert taken.stderr == (f'noah-zoo demo: error: cannot listen on 127.0.0.1:{port}, which is in use or is not '
                                f'of this machine; give another --port or --host\n')


@pytest.mark.process
def test_the_space_runs(tmp_path):
    code = (ROOT / 'space' / 'app.py').read_text(encoding='utf-8').replace(
        '.launch(', '.launch(server_port=PORT, prevent_thread_lock=True, quiet=True, ')
    code = f'PORT = {free_port()}\n{code}\nimport urllib.request\n' \
        "print(urllib.request.urlopen(f'http://127.0.0.1:{PORT}/config').read().decode())\n"
    output = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True).stdout
    assert json.loads(output.splitlines()[-1])['title'] == 'Where does NOAH look?'


@pytest.mark.process
def test_without_gradio():
    code = "import sys; sys.modules['gradio'] = None; from noah_zoo_cli import main; main(['demo'])"
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2 and "pip install 'noah-zoo[demo]'" in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.mark.browser
@pytest.mark.parametrize('width', [1280, 390])
def test_in_a_browser(width, server, browser, tmp_path):
    def maps():
        return [image.get_attribute('src') for image in page.query_selector_all('#maps img')]

    def upload(path):
        if page.query_selector('#upload button[aria-label="Clear"]'):
            page.click('#upload button[aria-label="Clear"]')
        page.set_input_files('#upload input[type=file]', path)

    page = browser.new_page(viewport={'width': width, 'height': 900})
    requests, errors = [], []
    page.on('request', lambda request: requests.append(request.url))
    page.on('console', lambda message: errors.append(message.text) if message.type == 'error' else None)
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(server)
    page.click('#samples .thumbnail-item >> nth=1')
    page.wait_for_selector('#samples .selected')
    page.wait_for_selector('#maps img')
    page.wait_for_function('document.getElementById("noah").getBoundingClientRect().bottom <= innerHeight')
    assert page.inner_text('#noah').split('\n')[1].startswith('Pullover')
    assert 'Pullover' in page.inner_text('#twin') and len(maps()) == 11
    before = maps()
    page.click('#noah button:has-text("Shirt") >> nth=0')
    page.wait_for_function(f'document.querySelectorAll("#maps img")[1].getAttribute("src") != {before[1]!r}')
    assert 'Shirt: where' in page.inner_text('#maps')
    before = maps()
    page.focus('#noah button:has-text("Coat") >> nth=0')
    page.keyboard.press('Enter')
    page.wait_for_function(f'document.querySelectorAll("#maps img")[1].getAttribute("src") != {before[1]!r}')
    assert 'Coat: where' in page.inner_text('#maps')

    (tmp_path / 'broken.png').write_text('no image')
    upload(tmp_path / 'broken.png')
    page.wait_for_function('document.querySelector("#message").innerText.includes("broken.png: not a readable image")')
    assert not maps()
    Image.open(BAG).resize((300, 200)).convert('RGB').save(tmp_path / 'bag.jpg')
    upload(tmp_path / 'bag.jpg')
    page.wait_for_selector('#maps img')
    assert 'readable' not in page.inner_text('#message') and 'Bag' in page.inner_text('#noah')
    page.wait_for_selector('#samples .selected', state='detached')
    page.click('#samples .thumbnail-item >> nth=1')  # the one before
    page.wait_for_function('document.getElementById("noah").innerText.includes("Pullover")')
    assert page.locator('#samples .selected').count() == 1

    page.fill('#model input', 'resnet18_noha')
    page.press('#model input', 'Enter')
    page.wait_for_function('document.querySelector("#message").innerText.includes("did you mean resnet18_noah")')
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert not [url for url in requests if not url.startswith((server, 'data:', 'blob:'))]
    assert not errors
    page.close()
