"""The residual stream of an architecture: its layers, its width, and where it can hold an exact bias."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


LAYER_LISTS = ("layers", "layer", "h", "block", "blocks")

# Submodule whose bias reaches the output of the layer as it is (up to `FACTORS`), and the layers of transformers for
# which a test has verified that. Layers without any: RMSNorm after the MLP, gated or purely routed experts.
SITES = {
    "mlp.down_proj": (
        "AXK1DecoderLayer AXK2DecoderLayer ApertusDecoderLayer ArceeDecoderLayer BailingHybridDecoderLayer "
        "BitNetDecoderLayer Cohere2DecoderLayer CohereDecoderLayer CwmDecoderLayer DeepseekV32DecoderLayer "
        "DeepseekV3DecoderLayer DiffLlamaDecoderLayer DogeDecoderLayer Dots3NoteTextDecoderLayer "
        "Emu3DecoderLayer Ernie4_5DecoderLayer Ernie4_5_MoeDecoderLayer ExaoneMoeDecoderLayer "
        "FlintDecoderLayer GemmaDecoderLayer Glm4MoeDecoderLayer Glm4MoeLiteDecoderLayer GlmDecoderLayer "
        "GlmMoeDsaDecoderLayer GraniteDecoderLayer GraniteSWADecoderLayer HYV3DecoderLayer HeliumDecoderLayer "
        "HunYuanDenseV1DecoderLayer Jais2DecoderLayer LagunaDecoderLayer LlamaDecoderLayer "
        "MiMoV2FlashDecoderLayer MiniCPM3DecoderLayer Ministral3DecoderLayer MinistralDecoderLayer "
        "MistralDecoderLayer MllamaSelfAttentionDecoderLayer NemotronDecoderLayer OlmoDecoderLayer "
        "OlmoHybridLinearAttentionDecoderLayer Phi3DecoderLayer Phi4MultimodalDecoderLayer Qwen2DecoderLayer "
        "Qwen3DecoderLayer Qwen3_5DecoderLayer SeedOssDecoderLayer SmolLM3DecoderLayer StableLmDecoderLayer "
        "VaultGemmaDecoderLayer YoutuDecoderLayer"
    ),
    "mlp.shared_experts.down_proj": (
        "AXK2DecoderLayer AriaTextDecoderLayer BailingHybridDecoderLayer "
        "DeepseekV2DecoderLayer DeepseekV32DecoderLayer DeepseekV3DecoderLayer Dots3NoteTextDecoderLayer "
        "Ernie4_5_MoeDecoderLayer ExaoneMoeDecoderLayer Glm4MoeDecoderLayer Glm4MoeLiteDecoderLayer "
        "GlmMoeDsaDecoderLayer HYV3DecoderLayer LagunaDecoderLayer MiniMaxM3VLDecoderLayer "
        "SolarOpenDecoderLayer YoutuDecoderLayer"
    ),
    "output.LayerNorm": (
        "BertGenerationLayer BertLayer BigBirdLayer CamembertLayer Data2VecTextLayer DebertaLayer DebertaV2Layer "
        "ElectraLayer ErnieLayer GitLayer RemBertLayer RoCBertLayer RoFormerLayer RobertaLayer XLMRobertaLayer"
    ),
    "fc2": (
        "BigBirdPegasusDecoderLayer BioGptDecoderLayer BlenderbotDecoderLayer MBartDecoderLayer "
        "OPTDecoderLayer PegasusDecoderLayer WhisperDecoderLayer XGLMDecoderLayer"
    ),
    "final_layer_norm": (
        "BartDecoderLayer BlenderbotSmallDecoderLayer MarianDecoderLayer MvpDecoderLayer PLBartDecoderLayer "
        "TrOCRDecoderLayer"
    ),
    "mlp.dense_4h_to_h": "BloomBlock FalconDecoderLayer GPTNeoXJapaneseLayer GPTNeoXLayer PersimmonDecoderLayer",
    "feed_forward.down_proj": "BambaDecoderLayer FalconH1DecoderLayer JambaMambaDecoderLayer Llama4TextDecoderLayer",
    "mixer.out_proj": "FalconMambaBlock Mamba2Block MambaBlock NemotronHBlock",
    "mlp.c_proj": "GPT2Block GPTBigCodeBlock GPTNeoBlock Starcoder2DecoderLayer",
    "layer.2.DenseReluDense.wo": "MT5Block T5Block UMT5Block",
    "mlp.fc2": "MoshiDecoderLayer NanoChatDecoderLayer PhiDecoderLayer",
    "output.dense": "MegatronBertLayer RobertaPreLayerNormLayer XLMRobertaXLLayer",
    "feed_forward.w2": "Lfm2DecoderLayer Lfm2MoeDecoderLayer",
    "mlp.fc_out": "CodeGenBlock GPTJBlock",
    "feed_forward.shared_expert.down_proj": "Llama4TextDecoderLayer",
    "feed_forward_layer_norm": "ProphetNetDecoderLayer",
    "ff.layer_norm": "XLNetLayer",
    "ffn.2": "EncoderLayer",
    "ffn.down_proj": "MptBlock",
    "ln_2": "Block",
    "mamba.out_proj": "Zamba2MambaDecoderLayer",
    "mamba_decoder.mamba.out_proj": "Zamba2HybridLayer",
    "mixer.down_proj": "NemotronHBlock",
    "mixer.o_proj": "NemotronHBlock",
    "mixer.shared_experts.down_proj": "NemotronHBlock",
    "mlp": "JetMoeDecoderLayer",
    "mlp.experts.down_proj_bias": "GptOssDecoderLayer",
    "mlp.shared_mlp.down_proj": "HunYuanMoEV1DecoderLayer",
    "mlp_block.down_proj": "RecurrentGemmaDecoderLayer",
    "mlps.1.down_proj": "LongcatFlashDecoderLayer",
    "self_attn.o_proj": "Cohere2MoeDecoderLayer",
    "shared_mlp.output_linear": "GraniteMoeHybridDecoderLayer",
    "layer.1.DenseReluDense.wo": "MT5Block T5Block UMT5Block",
}
# what these layers multiply their MLP's output by
FACTORS = ("residual_multiplier", "residual_scale")
REFUSED = {
    "several residual streams, so there is no one vector to add": (
        "deepseek_v4 gemma3n_text glm5_next hy_v4 qwen4_exp_text reformer"
    ),
    "two stacks of layers that it runs in turn, several times over": "hrm_text",
    "a residual stream that it halves every few layers, at inference only": "rwkv",
}


@dataclass
class MergeSite:
    """
    A bias inside a layer that reaches the layer's output as it is, up to a factor.

    Args:
        module (`nn.Module`): The module that holds the bias.
        attribute (`str`): Its name in that module.
        factor (`float`): What a steering vector has to be multiplied by before it is added to the bias.
    """

    module: nn.Module
    attribute: str = "bias"
    factor: float = 1.0

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, self.attribute)

    def write(self, original: nn.Parameter | None, vector: torch.Tensor) -> None:
        """Makes `original + factor * vector`, (..., size), the bias; `original` itself is left untouched."""
        bias = self.factor * vector
        # a quantised weight has no dtype that a bias could share: then it stays in float32
        weight_dtype = self.module.get_parameter("weight").dtype if original is None else original.dtype
        bias = bias if original is None else original.detach() + bias
        dtype = weight_dtype if weight_dtype.is_floating_point else torch.float32
        setattr(self.module, self.attribute, nn.Parameter(bias.to(dtype), requires_grad=False))

    def restore(self, original: nn.Parameter | None) -> None:
        setattr(self.module, self.attribute, original)


def merge_sites(module: nn.Module) -> list[MergeSite]:
    """
    The biases that have to change so that the output of `module` moves by a vector.

    Raises:
        ValueError: If there is no place in `module` where a bias does exactly that.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return [MergeSite(module)]
    # FSDP2 puts a class of its own in front of the layer's
    layer_class = next(c for c in type(module).__mro__ if not c.__module__.startswith("torch."))
    known = layer_class.__module__.startswith("transformers.models.")
    for path, names in SITES.items() if known else ():
        if layer_class.__name__ in names.split() and (site := _site_at(module, path)) is not None:
            return [site]
    raise ValueError(
        f"{layer_class.__name__} has no known place for a bias that is added to its output as it is: keep the adapter "
        "unmerged, save it with save_pretrained() and load it with PeftModel.from_pretrained()"
    )


def _site_at(layer: nn.Module, path: str) -> MergeSite | None:
    if getattr(layer, "do_layer_norm_before", True) is False:  # OPT-350m normalises after the MLP
        path = "final_layer_norm"
    parent, _, attribute = path.rpartition(".")
    if not attribute.endswith("bias"):
        parent, attribute = path, "bias"
    try:
        module = layer.get_submodule(parent)
    except AttributeError:
        return None
    factor = next((getattr(layer, name) for name in FACTORS if hasattr(layer, name)), 1.0)
    return MergeSite(module, attribute, 1 / factor)


def find_layers(model: PreTrainedModel, layers_pattern: list[str] | str | None = None) -> tuple[str, nn.ModuleList]:
    """
    Finds the decoder layers of a transformers model; of the encoder, if the model has no decoder.

    Args:
        model (`PreTrainedModel`): The base model.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the `nn.ModuleList` that holds the layers.

    Returns:
        The name of the `nn.ModuleList` inside `model`, and the list.

    Raises:
        ValueError: If no such list is found, or if the architecture has more than one residual stream.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"cannot tell the layers of a {type(model).__name__}: name the modules in target_modules")
    residual_width(model)
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or LAYER_LISTS
    decoder = model.get_decoder()
    found = layer_lists(decoder, names) or layer_lists(model, names)
    if not found:
        raise ValueError(
            f"no nn.ModuleList named {' or '.join(names)} in {type(model).__name__}: name the list of layers in "
            "layers_pattern, or the modules to steer in target_modules"
        )
    # the outermost list: others belong to parts of a layer
    layers = min(found, key=lambda entry: entry[0])[1]
    return next(name for name, module in model.named_modules() if module is layers), layers


def layer_lists(module: nn.Module, names: Sequence[str]) -> list[tuple[int, nn.ModuleList]]:
    return [
        (name.count("."), child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] in names
    ]


def residual_width(model: PreTrainedModel) -> int:
    """
    Width of the residual stream, from the config: sharded weights do not show their shape.

    Raises:
        ValueError: If the architecture has no single residual stream to add a vector to.
    """
    config = model.config.get_text_config(decoder=True)
    for reason, model_types in REFUSED.items():
        if config.model_type in model_types.split():
            raise ValueError(f"{config.model_type} cannot be steered: it has {reason}")
    if getattr(config, "hidden_size", None) is None:
        raise ValueError(f"{config.model_type} cannot be steered: its config names no hidden_size")
    return config.hidden_size


def refuse_lossy_rollout_sync(sites: Iterable[MergeSite]) -> None:
    """
    Raises if TRL is about to merge for vLLM, and vLLM's copy of the model has no biases to receive.

    vLLM ignores an unexpected bias without a word, so it would go on sampling from the base model.

    Args:
        sites (`Iterable[MergeSite]`): The places that the merge would write to.

    Raises:
        RuntimeError: If the caller is TRL and one of the sites has no bias in the base model.
    """
    frame = sys._getframe(1)
    # TRL leaves no other sign: who calls PEFT decides. PEFT's own frames, and torch's decorators, come in between
    while frame is not None and _package(frame) in ("peft_bias_steer", "peft", "torch"):
        frame = frame.f_back
    if frame is not None and _package(frame) == "trl" and any(site.bias is None for site in sites):
        raise RuntimeError(
            "vLLM runs a copy of the base checkpoint, which has no biases that could receive the steering vectors: it "
            "would silently sample from the base model. Write a base with zero biases once, with "
            "peft_bias_steer.bias_ready_checkpoint(base, output_dir), and train on that, or set use_vllm=False"
        )


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
