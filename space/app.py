"""The demo as a Space on the Hugging Face Hub: this folder is its repository."""
import noah_zoo  # noqa: F401  registers the models
from noah_zoo.inference.demo import LAUNCH, create_page

create_page().launch(**LAUNCH)
