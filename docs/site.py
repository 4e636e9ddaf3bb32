"""Hooks of mkdocs: the model cards, which lie beside docs/, are pages of the site; the settings of a run are tables."""
import dataclasses
import re
from pathlib import Path

from mkdocs.structure.files import File

CARDS = Path(__file__).resolve().parents[1] / 'model_cards'


def on_files(files, config):
    for path in sorted(CARDS.glob('*.md')):
        files.append(File.generated(config, f'model_cards/{path.name}', abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **kwargs):
    markdown = re.sub(r'<!-- settings of (\w+) -->', settings, markdown)
    return markdown.replace('](../model_cards/', '](model_cards/')


def on_page_content(html, **kwargs):
    """In a text, a flag or a short name is not torn at its hyphens."""
    word = r'(?<![^\s>])(?=[^\s<]{1,30}(?![^\s<]))[^\s<]*-[^\s<]*'
    whole = r'<span class="whole">\g<0></span>'
    return re.sub(r'(?<!</span>)<code>[^<]+</code>', lambda code: re.sub(word, whole, code[0]), html)


def settings(match):
    """A table of the fields that a dataclass adds to those of its base."""
    from noah_zoo.config import TrainConfig
    from noah_zoo.recipes import Recipe
    from noah_zoo.text import table

    cls = {'Recipe': Recipe, 'TrainConfig': TrainConfig}[match[1]]
    inherited = {field.name for base in cls.__bases__ if base is not object for field in dataclasses.fields(base)}
    rows = []
    for field in dataclasses.fields(cls):
        if field.name not in inherited:
            default = '' if field.default is dataclasses.MISSING else f'`{field.default!r}`'
            rows.append((f'`{field.name}`', default, field.metadata['help']))
    return table(('setting', 'default', 'meaning'), rows)
