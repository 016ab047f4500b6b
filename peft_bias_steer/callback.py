from typing import Any

import torch
from transformers import TrainerCallback

from .layer import BiasSteerLayer


class BiasSteerFloat32Callback(TrainerCallback):
    """
    Keeps the vectors in float32 where a trainer casts what is trainable, as TRL's trainers do on 4- and 8-bit bases.

    In bfloat16 a vector stops moving once its steps are small against its entries: 0.3 + 1000 x 1e-4 stays 0.3008.
    Pass it as `callbacks=[BiasSteerFloat32Callback()]`.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, BiasSteerLayer):
                for vector in layer.bias_steer_vector.parameters():
                    vector.data = vector.data.to(torch.float32)
