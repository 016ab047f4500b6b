"""ReBased model configuration."""

import math
import os
import sys
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


AUTO_CLASSES = {
    "AutoModel": "RebasedModel",
    "AutoModelForCausalLM": "RebasedForCausalLM",
    "AutoModelForQuestionAnswering": "RebasedForQuestionAnswering",
    "AutoModelForSequenceClassification": "RebasedForSequenceClassification",
    "AutoModelForTokenClassification": "RebasedForTokenClassification",
}
LAYER_TYPES = ("conv", "linear_attention", "sliding_attention", "full_attention")


@strict
class RebasedConfig(PreTrainedConfig):
    r"""
    Configuration of a [`RebasedModel`]. The defaults are the 150M model of the ReBased paper (arXiv 2402.10644,
    appendix): 147,548,928 parameters with tied embeddings.

    Args:
        vocab_size (`int`, *optional*, defaults to 50280): Number of tokens.
        hidden_size (`int`, *optional*, defaults to 768): Width of the residual stream.
        intermediate_size (`int`, *optional*): Inner width of the SwiGLU feed-forward, by default `2 * hidden_size`. 0
            leaves the feed-forward out; its norm stays, as in the paper's recall models.
        num_hidden_layers (`int`, *optional*, defaults to 18): Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 12): Heads of every attention layer.
        num_key_value_heads (`int`, *optional*): Heads of keys and values, each shared by as many query heads (grouped-query
            attention). By default `num_attention_heads`.
        feature_dim (`int`, *optional*, defaults to 16): Query and key numbers per head in linear attention.
        head_dim (`int`, *optional*): Value numbers per head, and query and key numbers in softmax attention. By
            default `hidden_size // num_attention_heads`.
        layer_types (`list[str]`, *optional*): Mixer of each layer: `"conv"` (short gated convolution),
            `"linear_attention"` (ReBased or Taylor), `"sliding_attention"` (softmax over the last `sliding_window`
            tokens) or `"full_attention"` (softmax over all). By default the first two in turn.
        kernel (`str`, *optional*, defaults to `"rebased"`): `"rebased"`, (q·k)², or `"taylor"`, 1 + q·k + (q·k)²/2, the
            kernel of Based (arXiv 2402.18668).
        use_qk_norm (`bool`, *optional*): Normalise queries and keys. This and the next two are the ablation of the
            paper's Table 1; each defaults to `True` for `kernel="rebased"` and to `False` for `"taylor"`.
        use_gamma (`bool`, *optional*): Learn a scale per query and key number.
        use_beta (`bool`, *optional*): Learn a shift per query and key number.
        qk_norm_per_head (`bool`, *optional*, defaults to `False`): Take mean and variance over each head's
            `feature_dim` numbers instead of over all heads jointly, as the authors' code does.
        attention_eps (`float`, *optional*, defaults to 1e-6): Added to the denominator of linear attention.
        use_feature_map (`bool`, *optional*, defaults to `False`): The queries and keys of linear attention are those of
            softmax attention, `head_dim` numbers a head and rotated, under a learned map to `feature_dim` numbers.
        linear_attention_window (`int`, *optional*, defaults to 0): Tokens over which such a layer has softmax attention beside
            its linear attention, mixed by a gate for each token and head; 0 for none. Needs `use_feature_map`.
        conv_type (`str`, *optional*, defaults to `"gated"`): `"gated"` doubles the width, convolves one half and gates it
            with the other; `"base"` multiplies a convolution with a projection (the recall models' convolution).
        conv_kernel_size (`int`, *optional*, defaults to 3): Tokens that a convolution sees, the current one included.
        sliding_window (`int`, *optional*, defaults to 64): Tokens that sliding-window attention sees.
        rope_parameters (`dict`, *optional*): Rotary positions of softmax layers and feature maps, as transformers' Llama has them:
            `rope_theta`, `rope_type` and what this type needs. By default there are none.
        attention_bias (`bool`, *optional*, defaults to `False`): Biases of the query, key and value projections.
        attention_out_bias (`bool`, *optional*): Bias of the output projection of attention. By default `attention_bias`.
        attention_dropout (`float`, *optional*, defaults to 0.0): Share of the softmax weights dropped in training.
        use_softmax_qk_norm (`bool`, *optional*, defaults to `False`): RMSNorm over each head's queries and keys in softmax
            layers, before the rotary positions, as in Qwen3.
        mlp_bias (`bool`, *optional*, defaults to `False`): Biases of the feed-forward.
        norm_type (`str`, *optional*, defaults to `"rms_norm"`): `"rms_norm"` or `"layer_norm"`.
        norm_eps (`float`, *optional*, defaults to 1e-6): Added to the variance in every norm.
        use_position_embeddings (`bool`, *optional*, defaults to `False`): Learn `max_position_embeddings` positions.
        max_position_embeddings (`int`, *optional*, defaults to 4096): Training length; a limit only for learned positions.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new weights.
        use_cache (`bool`, *optional*, defaults to `True`): Return the recurrent state when not training.

    ```python
    >>> from hf_based_kernel import RebasedConfig, RebasedForCausalLM

    >>> model = RebasedForCausalLM(RebasedConfig())
    >>> model.num_parameters()
    147548928
    ```
    """

    model_type = "rebased"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 50280
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 18
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    feature_dim: int = 16
    head_dim: int | None = None
    layer_types: list[str] | None = None
    kernel: str = "rebased"
    use_qk_norm: bool | None = None
    use_gamma: bool | None = None
    use_beta: bool | None = None
    qk_norm_per_head: bool = False
    attention_eps: float = 1e-6
    use_feature_map: bool = False
    linear_attention_window: int = 0
    conv_type: str = "gated"
    conv_kernel_size: int = 3
    sliding_window: int = 64
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: float | int = 0.0
    use_softmax_qk_norm: bool = False
    mlp_bias: bool = False
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-6
    use_position_embeddings: bool = False
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[i % 2] for i in range(self.num_hidden_layers)]
        for switch in ("use_qk_norm", "use_gamma", "use_beta"):
            if getattr(self, switch) is None:
                setattr(self, switch, self.kernel == "rebased")
        # transformers gives some unknown ones a meaning of its own.
        self._check_layer_types()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """[`PreTrainedConfig.from_dict`]. Raises `ValueError` for the configuration of another kind of model."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"expected the configuration of a {cls.model_type} model, got model_type={config_dict['model_type']!r}; load it "
                "with the classes of that model, or with AutoModel"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """[`PreTrainedConfig.to_dict`]; PEFT calls it before it looks up which modules an adapter without any named takes."""
        _name_modules_for_peft(self.model_type)
        return super().to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """[`PreTrainedConfig.save_pretrained`]; remote code names every class that can start from the weights beside it."""
        if getattr(self, "auto_map", None):
            for auto_class, name in AUTO_CLASSES.items():
                self.auto_map.setdefault(auto_class, f"modeling_rebased.{name}")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, which would give rotary positions to a configuration without any."""
        if self.rope_parameters is None and all(kwargs.get(name) is None for name in ("rope_scaling", "rope_theta")):
            return {name: value for name, value in kwargs.items() if name not in ("rope_scaling", "rope_theta")}
        rotation = kwargs.get("rope_scaling") or self.rope_parameters or {}
        _check_rotation(rotation)
        for given in (rotation, kwargs):
            if given.get("partial_rotary_factor") not in (None, 1):
                raise ValueError(
                    "partial_rotary_factor must be 1 or left out, since all numbers of a head are rotated, got "
                    f"{given['partial_rotary_factor']}"
                )
        return super().convert_rope_params_to_dict(**kwargs)

    def validate_layer_type(self) -> None:
        """`validate_architecture` looks at the layer types; transformers before 5.23 would rename "conv" here."""

    def _check_layer_types(self) -> None:
        unknown = [kind for kind in dict.fromkeys(self.layer_types or ()) if kind not in LAYER_TYPES]
        if unknown:
            raise ValueError(f"layer_types may hold {', '.join(LAYER_TYPES)}, got {', '.join(map(str, unknown))}")

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        choices = {
            "kernel": ("rebased", "taylor"),
            "conv_type": ("gated", "base"),
            "norm_type": ("rms_norm", "layer_norm"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_layer_types()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers ({self.num_hidden_layers}) must be equal to the number of `layer_types` "
                f"({len(self.layer_types)})"
            )
        least = {
            "vocab_size": 1,
            "hidden_size": 1,
            "intermediate_size": 0,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "feature_dim": 1,
            "head_dim": 1,
            "conv_kernel_size": 2,
            # A window of one token attends to nothing but itself.
            "sliding_window": 2,
            "max_position_embeddings": 1,
            "linear_attention_window": 0,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.linear_attention_window and not self.use_feature_map:
            raise ValueError(
                "linear_attention_window needs use_feature_map=True: without it there are no queries and keys for softmax"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout}")
        if self.rope_parameters and self.head_dim % 2:
            raise ValueError(f"rope_parameters need an even head_dim, got {self.head_dim}")
        for name in ("norm_eps", "initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number that is not negative, got {getattr(self, name)}")
        if not 0 < self.attention_eps < math.inf:
            raise ValueError(f"attention_eps must be a finite number above 0, got {self.attention_eps}")


def _name_modules_for_peft(model_type: str) -> None:
    """PEFT keeps the modules that an adapter takes by default in tables of its own. Ours are Llama's, and the convolutions."""
    tables = vars(sys.modules.get("peft.utils.constants", object))
    for name, table in tables.items():
        if not name.endswith("_MODULES_MAPPING") or model_type in table or "llama" not in table:
            continue
        modules = table["llama"]
        table[model_type] = [*modules, "in_proj"] if "v_proj" in modules else modules


def _check_rotation(rotation: Any) -> None:
    """Before transformers reads it, which warns of odd values or trips over them."""
    if not isinstance(rotation, dict) or any(isinstance(x, dict) for x in rotation.values()):
        raise ValueError(f"rope_parameters must be a dict, one rotation for all layers, got {rotation!r}")
    rope_type = rotation.get("rope_type", rotation.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"rope_type must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}, got {rope_type!r}")
    for name in rotation.keys() - {"rope_type", "type", "truncate"}:
        # longrope has a list of factors.
        numbers = rotation[name] if name in ("short_factor", "long_factor") else [rotation[name]]
        least = 1 if name == "rope_theta" else 0
        if not isinstance(numbers, list) or any(type(x) not in (int, float) or not least < x < 1e12 for x in numbers):
            raise ValueError(
                f"rope_parameters[{name!r}] must be a number above {least} and below 1e12, or left out, got {rotation[name]!r}"
            )


__all__ = ["RebasedConfig"]
