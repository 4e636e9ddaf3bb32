"""Floor 2: the models, one file per family. Importing it registers them with timm."""
from . import noah_deit, noah_mlp, noah_mobilenet, noah_pvt, noah_resnet, noah_shufflenet

__all__ = ['noah_deit', 'noah_mlp', 'noah_mobilenet', 'noah_pvt', 'noah_resnet', 'noah_shufflenet']
