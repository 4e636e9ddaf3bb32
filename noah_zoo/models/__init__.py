"""The models, one file per family. Importing it registers them with timm."""
from . import noah_any, noah_deit, noah_mlp, noah_mobilenet, noah_pvt, noah_resnet, noah_shufflenet, reid_resnet

__all__ = ['noah_any', 'noah_deit', 'noah_mlp', 'noah_mobilenet', 'noah_pvt', 'noah_resnet', 'noah_shufflenet',
           'reid_resnet']
