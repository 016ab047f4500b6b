"""One trainable residual-stream bias vector per decoder layer, as a PEFT tuner. Importing it registers the tuner."""

from .analysis import logit_lens
from .callback import BiasSteerFloat32Callback
from .config import BiasSteerConfig
from .extraction import extract_vectors, from_merged
from .layer import BiasSteerLayer
from .model import BiasSteerModel
from .registration import register
from .serving.gguf import export_control_vector, export_gguf, from_control_vector
from .serving.other_servers import export_easysteer, export_hotwire
from .serving.routes import serving_routes
from .serving.stock_checkpoint import bias_ready_checkpoint, export_stock_checkpoint
from .serving.trl import check_vllm_sync, prepare_for_vllm, sync_vectors_only
from .serving.vllm import vllm_overrides
from .vectors import from_vectors, load_vectors, set_steering_vectors, steering_vectors


__version__ = "0.1.0"
__all__ = [
    "BiasSteerConfig",
    "BiasSteerFloat32Callback",
    "BiasSteerLayer",
    "BiasSteerModel",
    "bias_ready_checkpoint",
    "check_vllm_sync",
    "export_control_vector",
    "export_easysteer",
    "export_gguf",
    "export_hotwire",
    "export_stock_checkpoint",
    "extract_vectors",
    "from_control_vector",
    "from_merged",
    "from_vectors",
    "load_vectors",
    "logit_lens",
    "prepare_for_vllm",
    "serving_routes",
    "set_steering_vectors",
    "steering_vectors",
    "sync_vectors_only",
    "vllm_overrides",
]

register()
