"""A page on which one sees what a NOAH model says of an image, and where it looked."""
import functools
import importlib.util
import os
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import gradio as gr
from PIL import Image
from torch import nn

from ..catalog import CATALOG, TAG
from ..data.images import read_image
from ..models.attach import name_of
from .attention import attention_maps
from .predict import (
    DEFAULT_MODEL,
    SAMPLES,
    find_images,
    load_model,
    load_twin,
    logits_of,
    probabilities,
    reading_of,
    short_names,
)
from .visualize import as_model_sees, grad_cam, overlay

SHOWN = 256  # pixels of the shorter side of a picture, at least
OFFERED = 50  # samples of one's own, at most: each is read when the page is made
INTRODUCTION = '''# Where does NOAH look?

A NOAH head gives every class a map of attention of its own, in several blocks side by side. Pick an image; then click a
class, and see where the model looked for it. Beside it is its vanilla twin, which pools.

A model knows its own classes and nothing else; the one that ships with the package, ten kinds of clothing.'''
LAUNCH = dict(  # what a server of the page needs: no request leaves it
    share=False, ssr_mode=False, footer_links=['gradio'], max_file_size='50mb',
    theme=gr.themes.Default(font='system-ui', font_mono='ui-monospace'),
    css='''
        .gradio-container {max-width: 1200px !important; margin: auto}
        #samples .grid-container {grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)) !important}
        #maps .grid-container {grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)) !important}
        #samples .grid-wrap, #maps .grid-wrap {padding-top: 30px; min-height: 0; max-height: none}''')
IN_SIGHT = "() => document.getElementById('noah').scrollIntoView({behavior: 'smooth', block: 'nearest'})"  # on a phone


class Pair(NamedTuple):
    """A model, its vanilla twin or the reason why there is none, and names of the classes, all different."""
    model: nn.Module
    twin: Optional[nn.Module]
    reason: str
    names: List[str]


class Asked(NamedTuple):
    """What a visitor looks at."""
    image: str
    model: str


def create_page(models: Sequence[str] = (), device: str = 'cpu', samples: Sequence[str] = ()) -> gr.Blocks:
    """The page, to be launched with `LAUNCH`.

    Args:
        models: Names to choose from, see `load_model`, the first of which is chosen; if none, the shipped model and the
            25 of the paper.
        device: A torch device.
        samples: Images and folders of images, of which the first 50 are offered before those of the package.

    Raises:
        FileNotFoundError: If one of `samples` does not exist, or is a folder without images.
        ValueError: If an image cannot be read.
    """
    models = list(models) or [DEFAULT_MODEL, *(f'{name}.{TAG}' for name in CATALOG)]
    offered = [*find_images(samples)[:OFFERED], *(str(path) for path in sorted(SAMPLES.glob('*.png')))]
    load = functools.lru_cache(maxsize=3)(functools.partial(make_pair, device=device))

    def classify(image: Optional[str], name: str) -> Tuple[Any, ...]:
        if not image:
            return None, *_nothing('')
        try:
            pair = load(name.strip())
            seen = _read(pair, image)
        except (OSError, ValueError) as error:
            return None, *_nothing(f'⚠️ {error}')
        best, guesses = guess(pair.model, seen, pair.names)
        twin = gr.Label(label='No vanilla twin', value=None)
        if pair.twin is not None:
            _, of_the_twin = guess(pair.twin, seen, pair.names)
            twin = gr.Label(label=f'{name_of(pair.twin)}, the vanilla twin', value=of_the_twin)
        pictures, message = _look(pair, seen, best)
        return (
            Asked(image, name.strip()), gr.Label(label=f'{name_of(pair.model)}: click a class', value=guesses), twin,
            pictures, '\n\n'.join(part for part in (message, pair.reason) if part))

    def classify_sample(name: str, event: gr.SelectData) -> Tuple[Any, ...]:
        return classify(offered[event.index], name)

    def classify_again(asked: Optional[Asked], name: str) -> Tuple[Any, ...]:
        return classify(asked and asked.image, name)

    def look(asked: Optional[Asked], event: gr.SelectData) -> Tuple[Any, str]:
        pair = load(asked.model)
        return _look(pair, _read(pair, asked.image), pair.names.index(event.value))

    with gr.Blocks(title='Where does NOAH look?', analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        asked = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                model = gr.Dropdown(models, value=models[0], label='Model', allow_custom_value=True, elem_id='model')
                upload = gr.File(label='Your image', height=140, elem_id='upload')
                chosen = gr.Gallery(
                    [_small(path) for path in offered], label='Or one of these', columns=4, height='auto',
                    allow_preview=False, interactive=False, buttons=[], elem_id='samples')
            with gr.Column(scale=2, min_width=240):
                message = gr.Markdown(elem_id='message')
                with gr.Row():
                    bars: Dict[str, Any] = dict(num_top_classes=5, show_heading=False, min_width=240)
                    noah = gr.Label(label='NOAH', elem_id='noah', **bars)
                    twin = gr.Label(label='Vanilla twin', elem_id='twin', **bars)
                maps = gr.Gallery(
                    label='Where it looked', columns=5, height='auto', object_fit='contain', interactive=False,
                    buttons=['download', 'fullscreen'], elem_id='maps')
        shown = [asked, noah, twin, maps, message]
        one_at_a_time = dict(concurrency_id='model', concurrency_limit=1)  # a model runs for one visitor
        for done in (
                upload.upload(classify, [upload, model], shown, **one_at_a_time),
                chosen.select(classify_sample, [model], shown, **one_at_a_time)):
            done.then(None, js=IN_SIGHT)
        upload.upload(lambda: gr.Gallery(selected_index=None), outputs=chosen)  # what is shown is none of the samples
        model.input(classify_again, [asked, model], shown, **one_at_a_time)
        for label in (noah, twin):
            label.select(look, [asked], [maps, message], **one_at_a_time)
    return page


def make_pair(name: str, device: str = 'cpu') -> Pair:
    """A model and its twin.

    Raises:
        ValueError: See `load_model`.
    """
    model, twin, reason = load_model(name, device), None, ''
    try:
        twin = load_twin(name, device)
    except ValueError as error:
        reason = f'Without its vanilla twin. {error}'
    return Pair(model, twin, reason, distinct(short_names(model)))


def distinct(names: Sequence[str]) -> List[str]:
    """The same names, with the index behind those that are there more than once (ImageNet has two cranes)."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f'{name} ({index})' for index, name in enumerate(names)]


def guess(model: nn.Module, image: Image.Image, names: Sequence[str]) -> Tuple[int, Dict[str, float]]:
    """The likeliest class, and the five likeliest with their probabilities."""
    (logits, _), = logits_of(model, [(as_model_sees(model, image).x_1CHW, None)])
    chances = probabilities(model, logits)[0]
    values, indices = chances.topk(min(5, len(names)))
    return int(indices[0]), {names[i]: p for i, p in zip(indices.tolist(), values.tolist())}


def look_for(pair: Pair, image: Image.Image, index: int) -> List[Tuple[Image.Image, str]]:
    """Pictures with titles: what the model saw, where all blocks and each of them looked for a class, and the twin.

    Raises:
        ValueError: If the model has no NOAH head.
    """
    seen = as_model_sees(pair.model, image)
    maps = attention_maps(pair.model, seen.x_1CHW, index)
    picture = _large(seen.picture)
    pictures = [(picture, 'the image'), (overlay(picture, maps.merged[0, 0]), 'all blocks')]
    blocks = maps.attention[0, :, 0]
    pictures += [(overlay(picture, map_HW), f'block {n} of {len(blocks)}') for n, map_HW in enumerate(blocks, start=1)]
    if pair.twin is not None and importlib.util.find_spec('pytorch_grad_cam'):
        seen = as_model_sees(pair.twin, image)
        cam_HW = grad_cam(pair.twin, seen.x_1CHW, [index])[0, 0]
        pictures.append((overlay(_large(seen.picture), cam_HW), 'Grad-CAM++'))
    return pictures


def _read(pair: Pair, image: str) -> Image.Image:
    return read_image(image, os.path.basename(image), **reading_of(pair.model))


def _look(pair: Pair, image: Image.Image, index: int) -> Tuple[Any, str]:
    try:
        pictures, message = look_for(pair, image, index), ''
    except ValueError as error:
        pictures, message = [], f'⚠️ {error}'
    return gr.Gallery(pictures, label=f'{pair.names[index]}: where {name_of(pair.model)} looked'), message


def _nothing(message: str) -> Tuple[Any, ...]:
    return gr.Label(value=None), gr.Label(value=None), [], message


def _small(path: str) -> Image.Image:
    picture = read_image(path)
    picture.thumbnail((SHOWN, SHOWN))
    return picture


def _large(picture: Image.Image) -> Image.Image:
    scale = max(SHOWN / min(picture.size), 1)
    return picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
