"""One trainable residual-stream bias vector per decoder layer, as a PEFT tuner. Importing it registers the tuner."""

from .callback import BiasSteerFloat32Callback
from .config import BiasSteerConfig
from .layer import BiasSteerLayer
from .model import BiasSteerModel
from .registration import register
from .serving.gguf import export_control_vector, export_gguf, from_control_vector
from .serving.stock_checkpoint import bias_ready_checkpoint, export_stock_checkpoint
from .vectors import set_steering_vectors, steering_vectors


__version__ = "0.1.0"
__all__ = [
    "BiasSteerConfig",
    "BiasSteerFloat32Callback",
    "BiasSteerLayer",
    "BiasSteerModel",
    "bias_ready_checkpoint",
    "export_control_vector",
    "export_stock_checkpoint",
    "from_control_vector",
    "export_gguf",
    "set_steering_vectors",
    "steering_vectors",
]

register()
