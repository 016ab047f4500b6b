"""Routes for adapters, on an application and an engine that stand in for vLLM's server."""

import asyncio
import sys
import types

import pytest
from peft import get_peft_model

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.serving.vllm.endpoints import Endpoints


fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402


class Engine:
    """An engine client whose engine holds digests by name."""

    def __init__(self, settings):
        fields = {} if settings is None else {"bias_steer": settings}
        model = types.SimpleNamespace(hf_config=types.SimpleNamespace(**fields), get_total_num_hidden_layers=lambda: 3)
        self.vllm_config = types.SimpleNamespace(model_config=model)
        self.input_processor = types.SimpleNamespace(vllm_config=self.vllm_config)
        self.engine_core, self.held = self, {}

    async def call_utility_async(self, method, *args):
        if method == "bias_steer_load":
            name, vectors, replace = args
            if name in self.held and not replace:
                raise RuntimeError(f"Call to load failed: {name} is loaded")
            self.held[name] = f"{len(vectors)} vectors"
        elif method == "bias_steer_remove":
            del self.held[args[0]]
        return dict(self.held)


def serve(settings, monkeypatch, **arguments):
    """A client of a server, its engine, and what it lists as models."""
    protocol = types.ModuleType("vllm.entrypoints.openai.models.protocol")
    protocol.BaseModelPath = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, protocol.__name__, protocol)
    paths = [types.SimpleNamespace(name="base", model_path="base")]
    models = types.SimpleNamespace(
        base_model_paths=paths,
        is_base_model=lambda name: name in [path.name for path in paths],
        lora_requests={"lora": "a LoRA adapter"},
    )
    app, engine, endpoints = fastapi.FastAPI(), Engine(settings), Endpoints()

    @app.post("/v1/completions")
    @app.post("/v1/embeddings")
    @app.post("/inference/v1/generate")
    @app.post("/tokenize")
    async def complete(body: dict) -> dict:
        return body

    @app.post("/v1/audio/transcriptions")
    async def transcribe(request: fastapi.Request) -> int:
        return len(await request.body())

    endpoints.attach_router(app)
    state = types.SimpleNamespace(openai_serving_models=models)
    asyncio.run(endpoints.init_state(engine, state, types.SimpleNamespace(**arguments)))
    return TestClient(app), engine, paths


@pytest.fixture
def folder(llama, tmp_path):
    get_peft_model(llama(), BiasSteerConfig()).save_pretrained(tmp_path / "adapters" / "math")
    return tmp_path / "adapters"


def test_adapters_are_listed_loaded_and_removed(folder, monkeypatch):
    client, engine, paths = serve({"folder": str(folder)}, monkeypatch)
    assert client.get("/v1/bias_steer_adapters").json() == {}
    loaded = client.post("/v1/load_bias_steer_adapter", json={"name": "math", "path": str(folder / "math")})
    assert (loaded.status_code, loaded.json()) == (200, {"math": "3 vectors"})
    assert engine.input_processor.bias_steer_names == {"math"}
    assert [path.name for path in paths] == ["base", "math"]

    again = client.post("/v1/load_bias_steer_adapter", json={"name": "math", "path": str(folder / "math")})
    assert again.status_code == 400 and "math is loaded" in again.json()["error"]["message"]
    removed = client.post("/v1/unload_bias_steer_adapter", json={"name": "math"})
    assert (removed.status_code, removed.json()) == (200, {})
    assert [path.name for path in paths] == ["base"] and not engine.input_processor.bias_steer_names


def test_a_request_for_an_adapter_as_the_model_gets_its_name_among_the_arguments(monkeypatch):
    client, _, paths = serve({"adapters": {"math": "somewhere"}}, monkeypatch)
    assert [path.name for path in paths] == ["base", "math"]
    for body, xargs in [
        ({"model": "math"}, {"bias_steer": "math"}),
        ({"model": "math", "vllm_xargs": {"bias_steer_scale": 2}}, {"bias_steer": "math", "bias_steer_scale": 2}),
        ({"model": "math", "vllm_xargs": {"bias_steer": "code"}}, {"bias_steer": "code"}),
        ({"model": "base"}, None),
    ]:
        assert client.post("/v1/completions", json=body).json() == body | ({"vllm_xargs": xargs} if xargs else {})
    text = "ü" * 100_000
    assert client.post("/v1/completions", json={"model": "math", "prompt": text}).json()["prompt"] == text


def test_a_route_with_another_place_for_arguments_gets_the_name_there(monkeypatch):
    client, _, _ = serve({"adapters": {"math": "somewhere"}}, monkeypatch)
    route, body = "/inference/v1/generate", {"model": "math", "sampling_params": {"max_tokens": 4}}
    params = {"max_tokens": 4, "extra_args": {"bias_steer": "math"}}
    assert client.post(route, json=body).json() == {"model": "math", "sampling_params": params}
    asked = {"model": "math", "sampling_params": {"extra_args": {"bias_steer": "code"}}}
    assert client.post(route, json=asked).json() == asked
    assert client.post("/tokenize", json={"model": "math"}).json() == {"model": "math"}, "no layer runs"


@pytest.mark.parametrize(
    "route, body, message",
    [
        ("embeddings", {"model": "math"}, "/v1/embeddings takes no adapter as its model, got 'math': name the base"),
        ("embeddings", {"vllm_xargs": {"bias_steer": "math"}}, "bias_steer would be dropped: /v1/embeddings takes no"),
        ("completions", {"bias_steer": "math"}, "bias_steer would be dropped: /v1/completions has it in vllm_xargs"),
        ("completions", {"model": "math", "vllm_xargs": "x"}, "expected vllm_xargs to be a dictionary, got 'x'"),
    ],
)
def test_what_would_get_the_base_model_in_silence_is_refused(monkeypatch, route, body, message):
    client, _, _ = serve({"adapters": {"math": "somewhere"}}, monkeypatch)
    answer = client.post(f"/v1/{route}", json=body)

    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    plain = {"model": ["math"], "vllm_xargs": {"session_id": "1"}}
    assert client.post(f"/v1/{route}", json=plain).json() == plain


def test_a_form_names_no_adapter_as_its_model(monkeypatch):
    client, _, _ = serve({"adapters": {"math": "somewhere"}}, monkeypatch)
    for model, status in [("math", 400), ("base", 200)]:
        sound = {"file": ("a.wav", b"\r\n\xff" * 9), "model": (None, model), "seed": (None, "1")}
        assert client.post("/v1/audio/transcriptions", files=sound).status_code == status
        typed = {**sound, "model": (None, model, "text/plain")}
        assert client.post("/v1/audio/transcriptions", files=typed).status_code == status


def test_names_of_the_base_model_and_of_lora_adapters_are_taken(folder, monkeypatch):
    client, engine, paths = serve({"folder": str(folder)}, monkeypatch)
    for name in ("base", "lora"):
        body = {"name": name, "path": str(folder / "math"), "replace": True}
        answer = client.post("/v1/load_bias_steer_adapter", json=body)
        assert answer.status_code == 400 and f"{name!r} is what requests call the base model" in answer.text
        with pytest.raises(ValueError, match="choose another name"):
            serve({"adapters": {name: "somewhere"}}, monkeypatch)
    assert not engine.held and [path.name for path in paths] == ["base"]


@pytest.mark.parametrize(
    "settings, arguments, message",
    [
        (None, {}, "takes no adapters over HTTP: start it with a folder"),
        ({}, {}, "takes no adapters over HTTP: start it with a folder"),
        ({"folder": "{folder}"}, {"api_server_count": 2}, "the other API servers would not learn of it"),
        ({"folder": "{folder}/math"}, {"path": "{folder}/math/../math2"}, "a folder under the one that this server"),
        ({"folder": "{folder}/mat"}, {}, "a folder under the one that this server allows"),
        ({"folder": "{folder}"}, {"path": 3}, "expected the path of an adapter, got 3"),
        ({"folder": "{folder}"}, {"replace": "false"}, "expected replace to be true or false, got 'false'"),
        ({"folder": "{folder}"}, {"extra": 3}, "expected name, path and none but replace"),
    ],
)
def test_what_the_operator_did_not_allow_is_refused(folder, monkeypatch, settings, arguments, message):
    settings = settings and {key: value.format(folder=folder) for key, value in settings.items()}
    count = {"api_server_count": arguments.pop("api_server_count", 1)}
    client, engine, _ = serve(settings, monkeypatch, **count)
    body = {"name": "math", "path": str(folder / "math"), **arguments}
    body = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in body.items()}
    answer = client.post("/v1/load_bias_steer_adapter", json=body)

    assert answer.status_code == 400 and message in answer.text
    assert not engine.held


def test_link_that_leads_out_of_the_folder_is_not_followed(folder, monkeypatch, tmp_path):
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "math").symlink_to(folder / "math")
    client, engine, _ = serve({"folder": str(tmp_path / "allowed")}, monkeypatch)
    body = {"name": "math", "path": str(tmp_path / "allowed" / "math")}

    assert client.post("/v1/load_bias_steer_adapter", json=body).status_code == 400
    assert not engine.held


def test_server_without_an_engine_has_no_adapters(monkeypatch):
    endpoints, app = Endpoints(), fastapi.FastAPI()
    endpoints.attach_router(app)
    asyncio.run(endpoints.init_state(None, types.SimpleNamespace(), types.SimpleNamespace()))

    assert TestClient(app).get("/v1/bias_steer_adapters").status_code == 400
