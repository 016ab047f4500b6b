"""What the plugin changes of vLLM, on classes that stand in for vLLM's; tests/peft_bias_steer/serving runs the engine."""

import sys
import types

import pytest
import torch

from peft_bias_steer.serving.vllm import plugin
from peft_bias_steer.serving.vllm.settings import EngineSettings


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The two classes whose methods are changed, and the error that becomes an answer with status 400."""

    class EngineCore:
        bias_steer = None

        def _initialize_kv_caches(self, vllm_config):
            return "caches"

        def preprocess_add_request(self, request):
            return request, 0

    class InputProcessor:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config

        def process_inputs(self, request):
            return request

    class VLLMValidationError(Exception):
        def __init__(self, message, parameter):
            super().__init__(message)

    names = {
        "vllm.exceptions": {"VLLMValidationError": VLLMValidationError},
        "vllm.v1.engine.core": {"EngineCore": EngineCore},
        "vllm.v1.engine.input_processor": {"InputProcessor": InputProcessor},
    }
    for name, members in names.items():
        for end in range(name.count(".") + 1):
            parent = ".".join(name.split(".")[: end + 1])
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        vars(sys.modules[name]).update(members)
    return types.SimpleNamespace(core=EngineCore, processor=InputProcessor, error=VLLMValidationError)


def config(**fields):
    return types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(**fields)))


def request(salt=None, **arguments):
    params = types.SimpleNamespace(extra_args=arguments or None)
    return types.SimpleNamespace(sampling_params=params, pooling_params=None, cache_salt=salt)


def test_engine_without_adapters_runs_as_before(stand_ins):
    plugin.register()
    plugin.register()  # vLLM loads plugins in each of its processes, some of them copies of another
    core = stand_ins.core()

    assert core._initialize_kv_caches(config()) == "caches"
    plain = request()
    assert core.preprocess_add_request(plain) == (plain, 0)
    assert stand_ins.processor(config()).process_inputs(plain) is plain
    with pytest.raises(ValueError, match="this engine was started without adapters"):
        core.bias_steer_loaded()


def test_request_is_checked_where_it_enters(stand_ins):
    plugin.register()
    processor = stand_ins.processor(config(bias_steer={"adapters": {"math": "folder"}}))
    assert processor.process_inputs(request(bias_steer="math"))
    for wrong, message in [
        (request(bias_steer="code"), "no adapter named 'code' is loaded: loaded are math"),
        (request(bias_steer="math", bias_steer_scale="1"), "bias_steer_scale must be a number, got '1'"),
        (request(bias_steer="math", bias_steer_tokens="x"), "one of all, prompt, generated, got 'x'"),
        (request("bias-steer:abc"), "a cache_salt that does not begin with 'bias-steer:'"),
    ]:
        with pytest.raises(stand_ins.error, match=message):
            processor.process_inputs(wrong)
    with pytest.raises(stand_ins.error, match="this engine was started without adapters"):
        stand_ins.processor(config()).process_inputs(request(bias_steer="math"))
    others_own = request(steering="another program's")
    assert stand_ins.processor(config()).process_inputs(others_own) is others_own

    plugin.known_names(processor).add("code")
    assert processor.process_inputs(request(bias_steer="code"))


def test_vllm_without_a_method_that_is_changed_is_refused(stand_ins):
    del stand_ins.core.preprocess_add_request

    with pytest.raises(
        RuntimeError, match="has no EngineCore.preprocess_add_request, without which requests would get"
    ):
        plugin.register()


def test_beam_search_that_would_drop_the_adapter_is_refused(stand_ins, monkeypatch):
    class CompletionRequest:
        def __init__(self, vllm_xargs):
            self.vllm_xargs = vllm_xargs

        def to_beam_search_params(self, max_tokens):
            return max_tokens

    protocol = types.ModuleType("vllm.entrypoints.openai.completion.protocol")
    protocol.CompletionRequest = CompletionRequest
    monkeypatch.setitem(sys.modules, protocol.__name__, protocol)
    plugin.register()

    assert CompletionRequest(None).to_beam_search_params(4) == 4
    assert CompletionRequest({"session_id": "1"}).to_beam_search_params(max_tokens=4) == 4
    # the engine's default would answer in place of each
    for key, value in [
        ("bias_steer", "math"),
        ("bias_steer", "__base__"),
        ("bias_steer_scale", 0),
        ("bias-steer", "a"),
    ]:
        with pytest.raises(stand_ins.error, match=f"beam search takes no adapter, got {key}: leave that out"):
            CompletionRequest({key: value}).to_beam_search_params(4)


def test_vectors_cross_processes_as_they_are():
    vectors = {2: torch.randn(8), 0: torch.tensor([torch.finfo(torch.float32).tiny] * 8)}
    packed = plugin.pack(vectors)

    assert all(isinstance(data, bytes) and len(data) == 32 for data in packed.values())
    assert all(torch.equal(vector, vectors[index]) for index, vector in plugin.unpack(packed).items())


def test_engine_calls_reach_its_adapters(stand_ins):
    class Adapters:
        def __init__(self):
            self.calls = []

        def load(self, name, vectors, *, replace):
            self.calls.append((name, {index: vector.tolist() for index, vector in vectors.items()}, replace))

        def remove(self, name):
            self.calls.append(name)

        def list(self):
            return {"math": "digest"}

        def vectors(self, name):
            return {1: torch.ones(2)}

    plugin.register()
    core = stand_ins.core()
    core.bias_steer = Adapters()
    core.bias_steer_load("math", plugin.pack({1: torch.ones(2)}), True)
    core.bias_steer_remove("math")

    assert core.bias_steer.calls == [("math", {1: [1.0, 1.0]}, True), "math"]
    assert core.bias_steer_loaded() == {"math": "digest"}
    assert plugin.unpack(core.bias_steer_vectors("math"))[1].tolist() == [1.0, 1.0]


def test_settings_are_read_from_the_config_of_the_model():
    assert EngineSettings.of(config(bias_steer={"max_adapters": 2})).max_adapters == 2
