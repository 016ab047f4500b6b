"""One trainable residual-stream bias vector per decoder layer, as a PEFT tuner. Importing it registers the tuner."""

from .config import BiasSteerConfig
from .layer import BiasSteerLayer
from .model import BiasSteerModel
from .registration import register


__version__ = "0.1.0"
__all__ = ["BiasSteerConfig", "BiasSteerLayer", "BiasSteerModel"]

register()
