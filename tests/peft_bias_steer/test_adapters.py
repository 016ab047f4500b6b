"""Which adapter stands in which row, and what each request gets; without vLLM."""

import gc
import types

import pytest
import torch
from peft import get_peft_model
from transformers import BartConfig, BartModel

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.serving.routes import adapter_routes
from peft_bias_steer.serving.vllm.adapters import EngineAdapters, check_engine, load_fitting
from peft_bias_steer.serving.vllm.layers import ROW
from peft_bias_steer.serving.vllm.settings import EngineSettings


class Executor:
    """Stands in for vLLM's: two workers, each with a table of rows."""

    def __init__(self):
        self.workers = [types.SimpleNamespace(bias_steer=Table()) for _ in range(2)]

    def collective_rpc(self, method, args):
        if method.__name__ == "install":
            return None
        return [method(worker, *args) for worker in self.workers]


class Table(dict):
    def write(self, row, name, vectors):
        self[row] = vectors

    def vectors(self, row):
        return self[row]


def config(**options):
    parallel = types.SimpleNamespace(use_ubatching=options.pop("micro_batches", False))
    passes = types.SimpleNamespace(enable_sp=options.pop("enable_sp", False))
    model = types.SimpleNamespace(get_total_num_hidden_layers=lambda: 3, get_hidden_size=lambda: 8)
    return types.SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        compilation_config=types.SimpleNamespace(pass_config=passes),
        use_v2_model_runner=options.pop("second_runner", False),
    )


def engine(max_adapters=2, **options) -> EngineAdapters:
    return EngineAdapters(Executor(), config(), EngineSettings(max_adapters=max_adapters, **options))


def vectors(value=1.0):
    return {index: torch.full((8,), value) for index in range(3)}


def incoming(adapter=None, scale=1.0, tokens="all", **options):
    arguments = None if adapter is None else {"bias_steer": adapter, "bias_steer_scale": scale}
    if tokens != "all":
        arguments["bias_steer_tokens"] = tokens
    params = types.SimpleNamespace(extra_args=arguments)
    fields = {"cache_salt": None, "prompt_token_ids": [1, 2, 3], "prompt_embeds": None, "resumable": False}
    return types.SimpleNamespace(sampling_params=params, pooling_params=None, **fields | options)


class Running:
    """Stands in for vLLM's Request, which lives as long as the scheduler needs it."""


def admit(adapters, request):
    with adapters.admit(request) as version:
        running = Running()
        if version is not None:
            version.requests.add(running)
    return running


def salt(adapters, *args, **options):
    request = incoming(*args, **options)
    admit(adapters, request)
    return request.cache_salt


def test_request_gets_its_row_and_keeps_what_else_it_has():
    adapters = engine()
    adapters.load("math", vectors())
    request = incoming("math", 0.5)
    given = request.sampling_params
    admit(adapters, request)

    assert request.sampling_params.extra_args[ROW] == (1, 0.5, "all")
    assert ROW not in given.extra_args, "what the caller holds is not written to"
    plain = incoming(None, cache_salt="mine")
    admit(adapters, plain)
    assert plain.sampling_params.extra_args is None and plain.cache_salt == "mine"


def test_an_adapter_of_a_base_with_fewer_layers_or_of_another_tower_is_refused(llama, tmp_path):
    get_peft_model(llama(), BiasSteerConfig()).save_pretrained(tmp_path / "short")
    assert load_fitting(str(tmp_path / "short"), 3).keys() == {0, 1, 2}
    with pytest.raises(
        ValueError, match="the adapter has 3 vectors and none for model.layers.3, which this model has"
    ):
        load_fitting(str(tmp_path / "short"), 4)
    get_peft_model(llama(), BiasSteerConfig(layers_to_transform=[1])).save_pretrained(tmp_path / "one")
    assert load_fitting(str(tmp_path / "one"), 4).keys() == {1}

    sizes = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 8}
    bart = BartModel(
        BartConfig(vocab_size=64, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, **sizes)
    )
    config = BiasSteerConfig(target_modules=r"encoder\.layers\.\d+")
    get_peft_model(bart, config).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="on the layers of the decoder, got some on encoder.layers"):
        load_fitting(str(tmp_path / "tower"), 3)
    bart.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="on the layers of the decoder, decoder.layers, got some on encoder.layers"):
        adapter_routes(str(tmp_path / "tower"), str(tmp_path / "base"))
    llama(num_hidden_layers=4).save_pretrained(tmp_path / "longer")
    with pytest.raises(ValueError, match="none for model.layers.3"):
        adapter_routes(str(tmp_path / "short"), str(tmp_path / "longer"))


def test_only_requests_that_compute_the_same_share_a_salt():
    adapters = engine(max_adapters=4)
    adapters.load("math", vectors())
    adapters.load("code", vectors(2.0))
    adapters.load("same", vectors())
    salts = [
        salt(adapters, "math"),
        salt(adapters, "math", 0.5),
        salt(adapters, "code"),
        salt(adapters, "math", cache_salt="mine"),
        salt(adapters, "math", tokens="prompt"),
        salt(adapters, "math", tokens="generated"),
        salt(adapters, "math", tokens="generated", prompt_token_ids=[1, 2]),
        salt(adapters),
    ]

    assert len(set(salts)) == len(salts)
    assert salt(adapters, "same") == salts[0] == salt(adapters, "math", prompt_token_ids=[1])
    assert salt(adapters, "math", 0.0) is None, "a scale of 0 is the base model"
    adapters.load("math", vectors(3.0), replace=True)
    assert salt(adapters, "math") not in salts


def test_row_is_written_again_only_when_no_request_needs_it():
    adapters = engine(max_adapters=1)
    table = adapters.executor.workers[1].bias_steer
    adapters.load("math", vectors(1.0))
    first = admit(adapters, incoming("math"))
    adapters.load("math", vectors(2.0), replace=True)
    second = admit(adapters, incoming("math"))

    assert {row: held[0][0].item() for row, held in table.items()} == {1: 1.0, 2: 2.0}
    with pytest.raises(ValueError, match="some of them by running requests of adapters that were replaced"):
        adapters.load("math", vectors(3.0), replace=True)
    del first
    gc.collect()
    adapters.load("math", vectors(3.0), replace=True)
    assert {row: held[0][0].item() for row, held in table.items()} == {1: 3.0, 2: 2.0}
    adapters.remove("math")
    adapters.load("other", vectors(4.0))
    assert {row: held[0][0].item() for row, held in table.items()} == {1: 4.0, 2: 2.0}
    del second


def test_row_of_a_request_that_is_just_arriving_is_not_written_to():
    adapters = engine(max_adapters=1)
    adapters.load("math", vectors(1.0))
    request = incoming("math")
    with adapters.admit(request):
        adapters.load("math", vectors(2.0), replace=True)
        with pytest.raises(ValueError, match="try again when these have ended"):
            adapters.load("math", vectors(3.0), replace=True)
    adapters.load("math", vectors(3.0), replace=True)


def test_request_that_fails_while_it_arrives_holds_no_row():
    adapters = engine(max_adapters=1)
    adapters.load("math", vectors(1.0))
    with pytest.raises(ValueError, match="a session whose prompt grows takes no adapter"):
        admit(adapters, incoming("math", resumable=True))

    assert not adapters.loaded["math"].in_use


def test_names_and_places():
    adapters = engine(max_adapters=1, adapters={"policy": None}, default="policy")
    assert not adapters.vectors("policy")
    with pytest.raises(ValueError, match="all 1 places are taken: remove an adapter"):
        adapters.load("math", vectors())
    with pytest.raises(ValueError, match="'policy' is what requests without an adapter get: replace it"):
        adapters.remove("policy")
    with pytest.raises(ValueError, match="an adapter named 'policy' is loaded: choose another name, or replace it"):
        adapters.load("policy", vectors())
    with pytest.raises(ValueError, match="no adapter named 'math' is loaded: loaded are policy"):
        admit(adapters, incoming("math"))
    adapters.load("policy", vectors(), replace=True)
    assert all(torch.equal(vector, torch.ones(8)) for vector in adapters.vectors("policy").values())
    assert adapters.list().keys() == {"policy"}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({4: torch.ones(8)}, "layers 0 to 2, got one for layer 4"),
        ({2: torch.ones(7)}, r"shape \(8,\) for layer 2, got \(7,\)"),
        ({2: torch.full((8,), torch.nan)}, "finite vectors, got NaN or infinity in that of layer 2"),
    ],
)
def test_vectors_of_another_model_change_nothing(wrong, message):
    adapters = engine()
    with pytest.raises(ValueError, match=message):
        adapters.load("math", {1: torch.ones(8), **wrong})
    assert not adapters.list() and not any(worker.bias_steer for worker in adapters.executor.workers)


@pytest.mark.parametrize("option", ["second_runner", "micro_batches", "enable_sp"])
def test_engine_whose_steps_are_cut_up_otherwise_is_refused(option):
    with pytest.raises(ValueError, match="bias vectors are not applied under"):
        check_engine(config(**{option: True}))
