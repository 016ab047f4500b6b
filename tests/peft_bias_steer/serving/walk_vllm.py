"""
Which classes vLLM serves with the steered model's answers: a walk over all that transformers has and vLLM may know.

`python -m tests.peft_bias_steer.serving.walk_vllm [CLASS ...]`, in the environment of `make test-serving`, writes what
it saw to vllm_walk.json beside this file, from which the tables of peft_bias_steer/architectures.py are taken. Classes
that stand there already are skipped unless they are named. Each is built with random weights and compared in a process
of its own: log-probabilities of a prompt and greedy tokens, first of the base model, then of the steered one, in the
plugin and as a stock checkpoint.

Vision-language classes want torchvision, which that environment lacks: `pip install --no-deps torchvision==0.28.0`.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch


# torchvision from PyPI finds no CUDA on a CPU, and fails at its import for the lack of its two operators of boxes
BOXES = torch.library.Library("torchvision", "FRAGMENT")
with contextlib.suppress(RuntimeError):
    BOXES.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    BOXES.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import vllm  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from transformers import PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.model_executor.models.registry import (  # noqa: E402
    _MULTIMODAL_MODELS,
    _TEXT_GENERATION_MODELS,
)

from peft_bias_steer import (  # noqa: E402
    BiasSteerConfig,
    export_stock_checkpoint,
    set_steering_vectors,
    steering_vectors,
)
from peft_bias_steer.residual import find_layers  # noqa: E402
from peft_bias_steer.serving.vllm import layers as plugin  # noqa: E402
from peft_bias_steer.serving.vllm import vllm_overrides  # noqa: E402
from tests.peft_bias_steer.test_architectures import (  # noqa: E402
    CANNOT_BUILD,
    OTHERS,
    SIZES,
    SPECIAL,
    build,
    classes_of,
    tiny_config,
)


TABLE = Path(__file__).with_name("vllm_walk.json")
PROMPT = [(7 * token) % 97 + 1 for token in range(3, 63)]
NEW_TOKENS = 8
# float32 on both sides; differences of 1e-6 are seen
TOLERANCE = 1e-4
SECONDS = 240
# vLLM's kernels want heads of 32 or more; latent attention on a CPU has the sizes of DeepSeek and no other
VLLM_SIZES = {
    "hidden_size d_model n_embd n_embed embed_dim emb_dim dim": 128,
    "intermediate_size ffn_dim d_ff d_inner decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size": 256,
    "head_dim d_kv d_head dim_head kv_channels linear_key_head_dim linear_value_head_dim rotary_dim": 32,
    "max_position_embeddings n_positions n_ctx": 256,
    "vocab_size vocab_size_per_layer_input n_words out_hidden_size text_hidden_size output_hidden_size": 128,
    "moe_intermediate_size shared_expert_intermediate_size mamba_d_head q_lora_rank qk_rope_head_dim": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim v_head_dim": 128,
    "hidden_size_per_layer_input mamba_d_state state_size": 16,
    "logit_scale": 1.0,
}
VLLM_SIZES = {**SIZES, **{name: size for names, size in VLLM_SIZES.items() for name in names.split()}}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}}
VLLM_SPECIAL = {
    **SPECIAL,
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "hunyuan_vl_text", "paddleocr_vl_text"), MROPE),
    **dict.fromkeys(("qwen2_5_omni_talker", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text"), MROPE),
    "axk1": {"first_k_dense_replace": 0},
    "falcon": {"ffn_hidden_size": 512},
    "falcon_h1": {"mamba_d_ssm": 256},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "glm4v_moe_text": {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
    "longcat_flash": {"head_dim": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"]},
    "mamba2": {"num_heads": 4, "head_dim": 64, "n_groups": 1},
}
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# what published checkpoints say and vLLM reads, but transformers' configs do not have
PUBLISHED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("AXK1ForCausalLM", "AXK2ForCausalLM", "DeepseekV3ForCausalLM"), SIGMOID),
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "GPTBigCodeForCausalLM": {"num_key_value_heads": 1},
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1, **SIGMOID},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True},
    "Lfm2ForCausalLM": {"block_dim": 128, "conv_dim": 128, "block_ff_dim": 256, "block_auto_adjust_ff_dim": False},
    "MiMoV2FlashForCausalLM": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 128,
        "layernorm_epsilon": 1e-5,
        "sliding_window_size": 128,
    },
    "MiniMaxM2ForCausalLM": {"rotary_dim": 32, "scoring_func": "sigmoid"},
}
# vLLM 0.32's rotary kernel for CPUs misreads tensors that are views, and with it the base model is another one: a class
# that differs by default is compared with PyTorch's rotary embedding too
ROTARY_IN_TORCH = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
TEXT_ALONE = {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}


@dataclass
class Seen:
    """
    What was seen of a class so far: "exact", or why not; what the steered answers were off by; what vLLM raised.

    `rotary_in_torch` is whether vLLM's kernel had to be left out. `stock_class` is what the stock checkpoint is of.
    """

    model_type: str
    plugin: str = "not built here"
    off_by: float | None = None
    rotary_in_torch: bool = False
    stock_class: str | None = None
    stock: str | None = None
    stock_off_by: float | None = None
    error: str | None = None

    def note(self, folder: str, **changes: Any) -> None:
        """Kept in a file, since vLLM may end this process."""
        for name, value in changes.items():
            setattr(self, name, value)
        Path(f"{folder}/seen.json").write_text(json.dumps(asdict(self)))


NO_CLASS = "vLLM has no such class"
DOES_NOT_RUN = "vLLM's class does not run the tiny model on a CPU in float32"
NO_PROCESSOR = "not verified: vLLM wants a processor of media, which the tiny models lack"
NOT_TAKEN = "vLLM's backend for classes of transformers does not take it"
DIFFERS = "vLLM's own base model differs from the one of transformers"
NOT_APPLIED = "vLLM does not apply its biases"
Answers = tuple[torch.Tensor, list[int]]


def all_classes() -> dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig]]]:
    """Every class for text, or for text and media, of transformers by its name, with a config class."""
    causal = classes_of(MODEL_FOR_CAUSAL_LM_MAPPING)
    media = (OTHERS["AutoModelForImageTextToText"], OTHERS["AutoModelForMultimodalLM"])
    return {
        # some are registered with the config of a model that they are a part of
        model_class.__name__: (model_class, model_class.config_class or config_class)
        for classes in (causal, *media)
        for model_class, config_class in classes.items()
    }


def make_base(name: str, folder: str) -> None:
    """Saves a tiny model with random weights, large enough that each layer matters."""
    model_class, config_class = all_classes()[name]
    for key in (name, config_class.model_type):
        if key in CANNOT_BUILD:
            raise ValueError(f"not built here: {CANNOT_BUILD[key]}")
    config = tiny_config(config_class, VLLM_SIZES, VLLM_SPECIAL)
    for field, value in PUBLISHED.get(name, {}).items():
        setattr(config, field, value)
    base = build(config, model_class)
    find_layers(base)
    torch.manual_seed(1)
    for parameter in base.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.08 * torch.randn_like(parameter))
    base.save_pretrained(folder)


def steer(name: str, folder: str) -> PeftModel:
    base = all_classes()[name][0].from_pretrained(folder, attn_implementation="eager").eval()
    model = get_peft_model(base, BiasSteerConfig()).eval()
    torch.manual_seed(2)
    set_steering_vectors(model, {i: 0.5 * torch.randn(v.shape) for i, v in steering_vectors(model).items()})
    return model


@torch.no_grad()
def answers(model: PeftModel) -> Answers:
    """
    Log-probabilities of the prompt's tokens, and the greedy tokens that follow; without a cache, since each class has
    one of its own. To be computed before an engine starts that borrows, and changes, transformers' class.
    """
    ids = list(PROMPT)
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        ids.append(int(logits[-1].argmax()))
    of_prompt = logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]
    return of_prompt, ids[len(PROMPT) :]


def ask(llm: vllm.LLM, **arguments: Any) -> Answers:
    params = vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0, detokenize=False, ignore_eos=True, **arguments
    )
    output = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0]
    logprobs = [step[token].logprob for token, step in zip(PROMPT[1:], output.prompt_logprobs[1:])]
    return torch.tensor(logprobs), list(output.outputs[0].token_ids)


def off_by(ours: Answers, theirs: Answers) -> float:
    """The largest difference of log-probabilities; at least 1 if other tokens follow."""
    difference = (ours[0] - theirs[0]).abs().max().item()
    return difference if ours[1] == theirs[1] else max(difference, 1.0)


@contextlib.contextmanager
def engine(folder: str, **options: Any) -> Generator[vllm.LLM]:
    defaults = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    if "kv_lora_rank" in Path(folder, "config.json").read_text():
        # latent attention: where the processor has AMX, vLLM 0.32 takes a backend that has no float32
        defaults["attention_config"] = {"backend": "CPU_MLA"}
    # an engine of this process that is gone may have left no group for experts
    cleanup_dist_env_and_memory()
    yield vllm.LLM(folder, **{**defaults, "max_num_seqs": 4, **options})


def compare(name: str, folder: str) -> Seen:
    """Compares vLLM with a tiny model of the class, which is made in the folder."""
    seen = Seen(all_classes()[name][1].model_type)
    seen.note(folder)
    make_base(name, f"{folder}/base")
    model = steer(name, f"{folder}/base")
    model.save_pretrained(f"{folder}/adapter")
    steered = answers(model)
    with model.disable_adapter():
        unsteered = answers(model)
    assert off_by(steered, unsteered) > 0.01, "the vectors change nothing that could be compared"
    with contextlib.suppress(ValueError):  # no stock class holds them
        export_stock_checkpoint(model, f"{folder}/stock")
        seen.stock_class = json.loads(Path(f"{folder}/stock/config.json").read_text())["architectures"][0]
    media = model.config.get_text_config(decoder=True) is not model.config
    options = TEXT_ALONE if media else {}
    for rotary in ({}, ROTARY_IN_TORCH):
        seen.rotary_in_torch = bool(rotary)
        if base_is_exact := compare_plugin(name, folder, seen, unsteered, steered, {**options, **rotary}):
            break
    if seen.stock_class is not None:
        seen.note(folder, stock=DOES_NOT_RUN)
        with engine(f"{folder}/stock", **options, **rotary) as llm:
            difference = off_by(ask(llm), steered)
        verdict = NOT_APPLIED if base_is_exact else DIFFERS
        seen.note(folder, stock="exact" if difference <= TOLERANCE else verdict, stock_off_by=difference)
    return seen


def compare_plugin(
    name: str, folder: str, seen: Seen, unsteered: Answers, steered: Answers, options: dict[str, Any]
) -> bool:
    """Compares one engine's answers without and with the adapter; returns whether the base model's are exact."""
    seen.note(folder, plugin=DOES_NOT_RUN)
    overrides = vllm_overrides({"walk": f"{folder}/adapter"}, max_adapters=1)
    with engine(f"{folder}/base", hf_overrides=overrides, **options) as llm:
        base_is_exact = off_by(ask(llm), unsteered) <= TOLERANCE
        difference = off_by(ask(llm, extra_args={"bias_steer": "walk"}), steered)
    verdict = "exact" if difference <= TOLERANCE else "vLLM's base model is exact, the steered one is not"
    seen.note(folder, plugin=verdict if base_is_exact else DIFFERS, off_by=difference)
    return base_is_exact


def compare_and_note(name: str, folder: str) -> None:
    # what has not been compared is refused, but here it is compared
    plugin.VLLM_PLUGIN_CLASSES = (name,)
    # vLLM looks at a class in yet another process, which would fail at torchvision
    registry._run_in_subprocess = lambda function: function()
    try:
        compare(name, folder)
    except Exception as error:
        seen = Seen(**json.loads(Path(f"{folder}/seen.json").read_text()))
        words = f"{type(error).__name__}: {error}".replace(folder, "FOLDER")[:300]
        seen.note(folder, plugin=why_not_started(name, seen, error), error=words)


def why_not_started(name: str, seen: Seen, error: Exception) -> str:
    if seen.plugin == DOES_NOT_RUN and any(word in str(error) for word in ("processor", "extractor", "okenizer")):
        return NO_PROCESSOR
    if seen.plugin != DOES_NOT_RUN or name in {*_TEXT_GENERATION_MODELS, *_MULTIMODAL_MODELS}:
        return seen.plugin
    words = ("not supported for now", "was supported in vLLM until", "not compatible with vLLM")
    return NO_CLASS if any(word in str(error) for word in words) else NOT_TAKEN


def walk(name: str) -> dict[str, Any]:
    """What is seen of a class by a process of its own, which may crash or hang."""
    folder = tempfile.mkdtemp()
    process = multiprocessing.get_context("fork").Process(target=compare_and_note, args=(name, folder))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    seen = json.loads(Path(f"{folder}/seen.json").read_text())
    if process.exitcode:
        seen["error"] = f"its process ended with {process.exitcode}"
    shutil.rmtree(folder)
    return seen


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    names = sys.argv[1:] or [name for name in all_classes() if name not in table]
    for index, name in enumerate(names):
        start = time.monotonic()
        table[name] = walk(name)
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
        seen, seconds = table[name], time.monotonic() - start
        print(
            f"{index + 1}/{len(names)} {name}: {seen['plugin']}; stock: {seen['stock']} ({seconds:.0f} s)", flush=True
        )


if __name__ == "__main__":
    main()
