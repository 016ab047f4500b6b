"""
Every language model of the installed transformers that can be built tiny is steered exactly, or refused.

`python tests/peft_bias_steer/test_architectures.py` writes what these tests found to docs/bias_steer_architectures.md;
the tests themselves compare with that file.
"""

import copy
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from peft_bias_steer import BiasSteerConfig, export_stock_checkpoint, serving_routes
from peft_bias_steer.architectures import SEQ_FIRST_TYPES
from peft_bias_steer.merging import merge_sites
from peft_bias_steer.residual import find_layers


TABLE = Path(__file__).parents[2] / "docs" / "bias_steer_architectures.md"
# transformers' own types: what others registered in this process is not part of the table
CONFIGS = {
    config_class.model_type: config_class
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING
    if config_class.__module__.startswith("transformers.")
}
# the other classes of models that end in a vocabulary; each class stands once
OTHER_CLASSES = {
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}


def classes_of(mapping) -> dict[type[PreTrainedModel], type[PreTrainedConfig]]:
    """A config for each class of a mapping."""
    classes = {}
    for config_class in mapping:
        found = mapping[config_class]
        model_class = found[0] if isinstance(found, tuple) else found
        if config_class.__module__.startswith("transformers."):
            classes.setdefault(model_class, config_class)
    return classes


OTHERS: dict[str, dict[type[PreTrainedModel], type[PreTrainedConfig]]] = {}
seen = set(classes_of(MODEL_FOR_CAUSAL_LM_MAPPING))
for auto_class, mapping in OTHER_CLASSES.items():
    OTHERS[auto_class] = {c: config for c, config in classes_of(mapping).items() if c not in seen}
    seen |= set(OTHERS[auto_class])
# one size for every name that configurations give to the same thing
SIZES = {
    "hidden_size d_model n_embd n_embed embed_dim emb_dim dim": 32,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads": 4,
    "num_encoder_attention_heads num_decoder_attention_heads": 4,
    "num_key_value_heads linear_num_key_heads": 2,
    "intermediate_size ffn_dim d_ff d_inner decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size": 48,
    "head_dim d_kv d_head dim_head kv_channels linear_key_head_dim linear_value_head_dim": 8,
    "max_position_embeddings n_positions n_ctx vocab_size unpadded_vocab_size n_words": 64,
    "vocab_size_per_layer_input": 64,
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads": 4,
    "num_experts_per_tok num_experts_per_token moe_k": 2,
    "moe_intermediate_size shared_expert_intermediate_size mamba_d_head": 16,
    "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim": 8,
    "hidden_size_per_layer_input mamba_d_state state_size": 8,
    "n_group num_expert_group topk_group pad_token_id bos_token_id eos_token_id": 1,
    "out_hidden_size text_hidden_size output_hidden_size": 32,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "residual_multiplier": 0.5,
}
SIZES = {name: size for names, size in SIZES.items() for name in names.split()}
TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
SPECIAL = {
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "hunyuan_vl_text", "paddleocr_vl_text"), MROPE),
    **dict.fromkeys(("qwen2_5_omni_talker", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text"), MROPE),
    # its first forms of the state space are computed for whole pieces: minutes at 128 tokens each
    "nemotron_h": {"chunk_size": 16},
    "glm4v_moe_text": {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
    "step3p5": {"sliding_window": 32},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "florence_vision": {"embed_dim": [32] * 4, "num_heads": [4] * 4},
    "whisper": {"max_source_positions": 30},
    **dict.fromkeys(("marian", "t5"), {"decoder_start_token_id": 1}),
    "speecht5": {"apply_spec_augment": False},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "dots1": {"n_shared_experts": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": TWO_KINDS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "prophetnet": {"num_decoder_layers": 2, "num_encoder_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
}
CANNOT_BUILD = {
    "cohere_compass_text": "its default configuration does not fit the model",
    "dbrx": "its attention settings cannot be made small",
    "dots3_note": "its settings name layers that a small model lacks",
    "gemma3n": "it needs timm",
    "gemma4_assistant": "it drafts tokens for another model",
    "gemma4_unified_assistant": "it drafts tokens for another model",
    "musicgen": "it is not built from this configuration alone",
    "musicgen_melody": "it is not built from this configuration alone",
    "qwen4_exp": "its default configuration is incomplete",
    "qwen4_exp_text": "its default configuration is incomplete",
    "xlstm": "its kernels take no small sizes",
    "vibevoice": "its tokenizer of sound cannot be made small",
    "vibevoice_asr": "its tokenizer of sound cannot be made small",
    "fast_vlm": "it needs timm",
    "perception_lm": "it needs timm",
    "blip-2": "it does not run on tokens alone",
    "dia": "it does not run on tokens alone",
    "idefics": "it does not run on tokens alone",
    "instructblip": "it does not run on tokens alone",
    "instructblipvideo": "it does not run on tokens alone",
    "kosmos-2": "it does not run on tokens alone",
    "pix2struct": "it does not run on tokens alone",
    "pp_formulanet": "it does not run on tokens alone",
    "udop": "it does not run on tokens alone",
    "voxtral_realtime": "it does not run on tokens alone",
    "chameleon": "its default configuration has no codes for images",
    "Emu3ForConditionalGeneration": "its default configuration has no codes for images",
    "cohere_compass": "its default configuration does not fit the model",
    "deepseek_ocr2": "its default configuration is incomplete",
    "granite4_vision": "its default configuration is incomplete",
    "kyutai_speech_to_text": "its default configuration does not fit the model",
    "moonshine_streaming": "its default configuration is incomplete",
    "diffusion_gemma": "it writes from random noise, so that no two passes agree",
    "ernie4_5_vl_moe": "its parts cannot be made small one by one",
    "fun_asr_nano": "its parts cannot be made small one by one",
    "molmo2": "its parts cannot be made small one by one",
    "muse_spark": "its parts cannot be made small one by one",
    "nemo_speechlm": "its parts cannot be made small one by one",
    "nemotron_h_omni": "its parts cannot be made small one by one",
    "qwen2_5_omni": "it has no forward pass of its own: its thinker stands above",
    "qwen3_omni_moe": "it has no forward pass of its own: its thinker stands above",
    "zamba": "its shared layers need a deeper model",
}
# generate() fails on the base model too
CANNOT_DECODE = {"blip", "pop2piano", "prophetnet", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"}
COUNTS_OTHERWISE = {"longcat_flash", "prophetnet"}  # half layers; encoder layers
# of what a class reads beside tokens, if it does not go without
SHAPES = {
    "blip": (2, 3, 30, 30),
    "canary": (2, 64, 80),
    "cohere_asr": (2, 64, 80),
    "moonshine": (2, 1600),
    "seamless_m4t": (2, 16, 160),
    "seamless_m4t_v2": (2, 16, 160),
    "speech_to_text": (2, 64, 80),
    "speech-encoder-decoder": (2, 8000),
    "speecht5": (2, 1600),
    "vision-encoder-decoder": (2, 3, 224, 224),
    "whisper": (2, 80, 60),
}
CANNOT_CHECKPOINT = {"blip", "git"}  # the base model changes its inputs in place
HEADER = """# Which architectures are steered

Every type of `AutoModelForCausalLM` in transformers {version}, and below it every class for images and text, several
media, speech, and sequence to sequence, built with random weights and a few layers, and compared with an oracle that
adds the same vectors by hand: hidden states and logits, greedy decoding with and without cache, gradients of every
vector in training, gradient checkpointing in both modes. Written by
`python tests/peft_bias_steer/test_architectures.py`; CI fails if it says anything else than what the code does.

"Exact, in all rows alike": the layers return (seq, batch, hidden_size), where rows are not told from tokens, so that
`adapter_names`, `steer_tokens` and `extract_vectors` raise.

"Merge site" is the bias that holds a vector once it is merged (checked by comparing logits, and by unmerging bit for
bit). "None" means that no bias of the layer reaches its output as it is: there, merging raises and names the layer, and
the adapter stays unmerged.

"Merged and saved" is what `save_pretrained` does after `merge_and_unload`. "Kept": the checkpoint, loaded by stock
`from_pretrained`, gives the steered logits. "Refused": the config of the type cannot announce such biases, and stock
`from_pretrained` would drop them, so `save_pretrained` raises; for the types marked `export_stock_checkpoint`, that
function writes an equal checkpoint of another stock class.

| type | layers | steering | merge site | merged and saved |
|---|---|---|---|---|
"""
OTHER_HEADER = """
## {auto_class}

Classes that do not stand above, compared in the same way: on tokens alone, or with an image or a sound of random
numbers where a class does not go without. The text decoder is what is steered.

| type | class | layers | steering | merge site | merged and saved |
|---|---|---|---|---|---|
"""
IDS = torch.tensor([[5, 9, 3, 17, 40, 22], [8, 30, 12, 55, 4, 6]])


def tiny_config(
    config_class: type[PreTrainedConfig], given: dict[str, Any] = SIZES, special: dict[str, Any] = SPECIAL
) -> PreTrainedConfig:
    default = config_class()
    names, aliases = set(default.to_dict()), config_class.attribute_map or {}
    sizes = {name: size for name, size in given.items() if name in names and aliases.get(name) not in names}
    if "kv_lora_rank" in names:  # latent attention has as many key as query heads, and derives the size of a head
        sizes["num_key_value_heads"] = 4
    if "qk_rope_head_dim" in names:
        sizes.pop("head_dim", None)
    if sections := (getattr(default, "rope_parameters", None) or {}).get("mrope_section"):
        half = int(sizes["head_dim"] * default.rope_parameters.get("partial_rotary_factor", 1)) // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]  # of time, height and width
        sizes["rope_parameters"] = {**default.rope_parameters, "mrope_section": sections}
    sizes |= special.get(config_class.model_type, {})
    for name in config_class.sub_configs or {}:
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            sizes[name] = tiny_config(type(getattr(default, name)), given, special)
    for name in {"layer_types", "layers_block_type"} & names - set(aliases) - set(sizes):
        if kinds := list(dict.fromkeys(getattr(default, name) or [])):  # one layer of each kind, two at least
            sizes[name] = (kinds * 2)[: max(2, len(kinds))]
            sizes |= {count: len(sizes[name]) for count in ("num_hidden_layers", "n_layer") if count in sizes}
    return config_class(**sizes)


def build(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    make = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    model = make(config, attn_implementation="eager").eval()
    if hasattr(model, "set_default_language"):
        model.set_default_language("en_XX")
    for parameter in model.parameters():  # biases and norms that start at 0 and 1 would hide mistakes
        if parameter.requires_grad:  # positions that are not learned are not saved either
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def add_to_output(layer: nn.Module, vector: torch.Tensor) -> None:
    """The oracle: the layer's forward, and then the vector, by hand."""
    forward = layer.forward

    def steered(*args, **kwargs):
        output = forward(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output + vector
        return type(output)([output[0] + vector, *output[1:]])

    layer.forward = steered


def inputs_of(model) -> dict[str, torch.Tensor]:
    """Tokens, and an image or a sound where a model does not go without."""
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        inputs = {"input_ids": IDS}
    else:
        generator = torch.Generator().manual_seed(0)
        inputs = {name: torch.randn(SHAPES[config.model_type], generator=generator)}
        inputs |= {} if config.is_encoder_decoder else {"input_ids": IDS}
    return {**inputs, "decoder_input_ids": IDS} if config.is_encoder_decoder else inputs


def hidden_states_and_logits(model):
    with torch.no_grad():
        output = model(**inputs_of(model), output_hidden_states=True)
    states = output.get("hidden_states") or output.get("decoder_hidden_states")
    return [*(states or []), output.logits]


def decode(model, use_cache: bool):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    options |= {"use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs_of(model), **options)
    return [output.sequences, *output.logits]


def train(model, vectors):
    model.train()
    torch.manual_seed(0)
    logits = model(**inputs_of(model), use_cache=False).logits
    gradients = torch.autograd.grad(logits.float().square().mean(), vectors)
    model.eval()
    return [logits.detach(), *gradients]


def assert_steered_exactly(base: PreTrainedModel) -> None:
    oracle = copy.deepcopy(base)
    model = get_peft_model(base, BiasSteerConfig())
    vectors, by_hand = [], []
    for name, layer in model.base_model.steering_layers.items():
        nn.init.normal_(layer.vector("default"), std=0.3)
        vectors.append(layer.vector("default"))
        by_hand.append(vectors[-1].detach().clone().requires_grad_())
        add_to_output(oracle.get_submodule(name), by_hand[-1])

    def compare(function, *args):
        # the same operations on the same numbers; but BLAS may round by the alignment of the memory it is given
        for ours, theirs in zip(function(model, *args), function(oracle, *args), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    compare(hidden_states_and_logits)
    if base.can_generate() and base.config.model_type not in CANNOT_DECODE:
        compare(decode, True)
        compare(decode, False)
    # last, since batch norms learn from each pass
    assert_training_is_exact(model, oracle, vectors, by_hand)


def assert_training_is_exact(model, oracle, vectors, by_hand) -> None:
    ours, theirs = train(model, vectors), train(oracle, by_hand)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(ours[1:], theirs[1:]):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # float32 sums in another order
    if not model.supports_gradient_checkpointing or model.config.model_type in CANNOT_CHECKPOINT:
        return
    model.enable_input_require_grads()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        torch.manual_seed(0)
        loss = model(**inputs_of(model), use_cache=False).logits.float().square().mean()
        for vector in vectors:
            vector.grad = None
        loss.backward()
        for vector, expected in zip(vectors, theirs[1:]):
            torch.testing.assert_close(vector.grad, expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    model.eval()


def steer(base: PreTrainedModel) -> tuple[PeftModel, torch.Tensor]:
    """A model steered by random vectors, and its logits."""
    model = get_peft_model(base, BiasSteerConfig())
    for layer in model.base_model.steering_layers.values():
        nn.init.normal_(layer.vector("default"), std=0.3)
    with torch.no_grad():
        return model, model(**inputs_of(model)).logits


def assert_same_logits(model, expected: torch.Tensor) -> None:
    with torch.no_grad():
        logits = model(**inputs_of(model)).logits
    # the bias is added before the residual, the vector after it: the sums round differently
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def assert_merged_exactly(base: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, expected = steer(base)
    assert model.check_merge(**inputs_of(model)) < 1e-3
    model.merge_adapter()
    assert_same_logits(model, expected)
    model.unmerge_adapter()
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def assert_merging_is_refused(base: PreTrainedModel) -> None:
    model, expected = steer(base)
    kinds = "|".join({type(layer.get_base_layer()).__name__ for layer in model.base_model.steering_layers.values()})
    for merge in (model.merge_adapter, model.merge_and_unload, partial(model.check_merge, **inputs_of(model))):
        with pytest.raises(ValueError, match=f"^({kinds}) has no known place .*: keep the adapter unmerged"):
            merge()
    assert_same_logits(model, expected)


def save_merged(base: PreTrainedModel) -> str:
    """What `save_pretrained` does after `merge_and_unload`; raises if the saved model has lost its vectors."""
    model, expected = steer(base)
    merged = model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        try:
            merged.save_pretrained(folder)
        except ValueError as refusal:
            assert "would lose the merged steering vectors" in str(refusal) and not os.listdir(folder)
            assert_same_logits(merged, expected)
            return "refused; `export_stock_checkpoint`" if "export_stock_checkpoint" in str(refusal) else "refused"
        reloaded = type(base).from_pretrained(folder, attn_implementation="eager")
    assert_same_logits(reloaded, expected)
    return "kept"


def assert_exported_as_routes_say(base: PreTrainedModel) -> None:
    routes = {route.name: route.exact for route in serving_routes(base)}
    model, expected = steer(base)
    with tempfile.TemporaryDirectory() as folder:
        if not routes["transformers, merged checkpoint"]:
            with pytest.raises(ValueError):
                export_stock_checkpoint(model, folder)
            assert not os.listdir(folder)
        else:
            export_stock_checkpoint(model, folder)
            config = AutoConfig.from_pretrained(folder)
            stock = getattr(transformers, config.architectures[0])
            assert_same_logits(stock.from_pretrained(folder, attn_implementation="eager").eval(), expected)
    model.unload()


def describe_sites(base: PreTrainedModel) -> str:
    names = {id(module): name for name, module in base.named_modules()}
    sites = {}
    for layer in find_layers(base)[1]:
        for site in merge_sites(layer):
            path = names[id(site.module)].removeprefix(names[id(layer)] + ".")
            sites[f"`{path}.{site.attribute}`" + (" / multiplier" if site.factor != 1 else "")] = None
    return ", ".join(sites)


def returns_seq_first(base: PreTrainedModel) -> bool:
    """Whether a layer returns the tokens of this batch, of which there are more than rows, before its rows."""
    outputs = []
    for layer in find_layers(base)[1]:
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    with torch.no_grad():
        base(**inputs_of(base))
    return any(len(output if isinstance(output, torch.Tensor) else output[0]) != len(IDS) for output in outputs)


def verdict(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel] | None = None) -> tuple[str, ...]:
    """A row of the table without its first cell. Raises if anything is inexact."""
    model_type = config_class.model_type
    for name in (model_type, getattr(model_class, "__name__", None)):
        if name in CANNOT_BUILD:
            return "", f"not built here: {CANNOT_BUILD[name]}", "", ""
    base = build(tiny_config(config_class), model_class)
    try:
        path, layers = find_layers(base)
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            get_peft_model(base, BiasSteerConfig())
        return "", f"refused: {refusal}", "", ""
    if model_type not in COUNTS_OTHERWISE:
        assert len(layers) == base.config.get_text_config(decoder=True).num_hidden_layers
    assert_steered_exactly(copy.deepcopy(base))
    assert returns_seq_first(copy.deepcopy(base)) == (model_type in SEQ_FIRST_TYPES)
    steering = "exact, in all rows alike" if model_type in SEQ_FIRST_TYPES else "exact"
    try:
        sites = describe_sites(base)
    except ValueError:
        assert_merging_is_refused(base)
        return f"`{path}`", steering, "none", ""
    assert_merged_exactly(base)
    assert_exported_as_routes_say(base)
    return f"`{path}`", steering, sites, save_merged(base)


def row(model_type: str) -> str:
    return f"| {model_type} | {' | '.join(verdict(CONFIGS[model_type]))} |"


def other_row(auto_class: str, model_class: type[PreTrainedModel]) -> str:
    config_class = OTHERS[auto_class][model_class]
    cells = verdict(config_class, model_class)
    return f"| {config_class.model_type} | `{model_class.__name__}` | {' | '.join(cells)} |"


def types_of(known: bool) -> list[Any]:
    """Types that the table has, or those of a newer transformers than that of the table, which is the pinned one."""
    listed = set(re.findall(r"^\| ([\w-]+) \|", TABLE.read_text(), flags=re.MULTILINE))
    return [name for name in CONFIGS if (name in listed) == known]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [*types_of(True), *(pytest.param(t, marks=pytest.mark.pinned) for t in types_of(False))]
)
def test_architecture_is_steered_exactly_or_refused_as_the_table_says(model_type):
    assert row(model_type) in TABLE.read_text().splitlines()


@pytest.mark.pinned
@pytest.mark.slow
@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [(auto_class, model_class) for auto_class, classes in OTHERS.items() for model_class in classes],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_class_that_reads_more_than_text_is_steered_exactly_or_refused_as_the_table_says(auto_class, model_class):
    assert other_row(auto_class, model_class) in TABLE.read_text().splitlines()


@pytest.mark.pinned
def test_of_several_decoders_the_one_that_answers_in_text_is_steered():
    with torch.device("meta"):
        omni = Qwen2_5OmniForConditionalGeneration(tiny_config(Qwen2_5OmniConfig))

    assert find_layers(omni)[0] == "thinker.model.language_model.layers"


def main() -> None:
    text = HEADER.format(version=transformers.__version__)
    text += "".join(f"{row(model_type)}\n" for model_type in CONFIGS)
    for auto_class, classes in OTHERS.items():
        text += OTHER_HEADER.format(auto_class=auto_class)
        text += "".join(f"{other_row(auto_class, model_class)}\n" for model_class in classes)
    TABLE.write_text(text)


if __name__ == "__main__":
    main()
