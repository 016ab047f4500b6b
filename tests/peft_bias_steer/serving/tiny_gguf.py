"""Models of transformers as float32 GGUF files, stored as llama.cpp's own converter stores them."""

from pathlib import Path

import gguf
import torch
from gguf import MODEL_ARCH
from transformers import PreTrainedConfig, PreTrainedModel


# Llama.cpp's name for a type; it reads Mistral as Llama, and of Gemma 3 the text tower.
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3": MODEL_ARCH.GEMMA3,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
}


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A file without a vocabulary: llama.cpp takes and gives the indices of tokens."""
    architecture = ARCHITECTURES[model.config.model_type]
    config = model.config.get_text_config(decoder=True)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    add_sizes(writer, config)
    add_attention(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in text_weights(model).items():
        stored = as_stored(name, weight, architecture, config)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored.contiguous().numpy())
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", slowed_down(model.get_decoder(), config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_attention(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Heads, rotations, and what some types have besides: sliding windows, soft caps."""
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size(config))
    rope = config.rope_parameters
    everywhere = rope.get("full_attention", rope)
    writer.add_rope_freq_base(everywhere["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if everywhere["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(everywhere["factor"])
    optional = {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
    }
    for name, add in optional.items():
        if getattr(config, name, None) is not None:
            add(getattr(config, name))


def text_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The decoder's weights and the head's, unless that is the embedding, named as in a model of text alone."""
    weights = {f"model.{name}": weight.data for name, weight in model.get_decoder().named_parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return weights if head is embedding else weights | {"lm_head.weight": head.data}


def slowed_down(decoder: PreTrainedModel, config: PreTrainedConfig) -> torch.Tensor:
    """By how much Llama 3 rotates each pair of a head more slowly than Llama 2: (head_dim / 2,)."""
    exponents = torch.arange(0, head_size(config), 2).float() / head_size(config)
    return config.rope_parameters["rope_theta"] ** -exponents / decoder.rotary_emb.inv_freq


def as_stored(name: str, weight: torch.Tensor, architecture: MODEL_ARCH, config: PreTrainedConfig) -> torch.Tensor:
    """Llama's queries and keys pair their neighbours, not their halves; Gemma's norms hold the 1 that they add."""
    if architecture == MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
        halves = weight.unflatten(0, (-1, 2, head_size(config) // 2))
        return halves.transpose(1, 2).flatten(0, 2)
    if architecture in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3) and name.endswith("norm.weight"):
        return weight + 1
    return weight


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
