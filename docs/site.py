"""A hook of mkdocs: the model cards, which lie beside docs/, are pages of the site."""
from pathlib import Path

from mkdocs.structure.files import File

CARDS = Path(__file__).resolve().parents[1] / 'model_cards'


def on_files(files, config):
    for path in sorted(CARDS.glob('*.md')):
        files.append(File.generated(config, f'model_cards/{path.name}', abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **kwargs):
    return markdown.replace('](../model_cards/', '](model_cards/')
