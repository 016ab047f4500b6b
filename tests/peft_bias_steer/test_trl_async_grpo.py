"""TRL's AsyncGRPO with an engine behind HTTP: the vectors alone reach it, and no rollout comes from another policy."""

import json
import queue
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.async_grpo.weight_transfer import WeightTransferClient

from peft_bias_steer import BiasSteerConfig, steering_vectors
from peft_bias_steer.serving.trl import check_vllm_sync, prepare_for_vllm, sync_vectors_only
from tests.peft_bias_steer.tiny_models import TWO_STEPS
from tests.peft_bias_steer.vllm_stand_in import StandInEngine


class Transfer(WeightTransferClient):
    """TRL's own, but for the NCCL broadcast: the engine is in this process."""

    def __init__(self, engine):
        self.engine, self.paused = engine, False
        self._weight_update_info = {"names": [], "dtype_names": [], "shapes": []}

    def init_weight_transfer(self):
        pass

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def send_weights(self, iterator):
        assert self.paused
        info = self._weight_update_info
        self.engine.update_named_params(list(zip(info["names"], info["dtype_names"], info["shapes"])), iterator)

    def destroy(self):
        pass


class Worker:
    """Samples of the engine for each version of the policy, from the moment at which TRL starts it."""

    def __init__(self, engine):
        self.engine, self.running, self.version, self.prompt = engine, False, 0, [5, 6, 7]
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()

    def start(self):
        self.running = True
        self.roll_out()

    def stop(self):
        self.running = False

    def check_health(self, stale_after_s):
        pass

    def update_model_version(self, version):
        self.version = version
        if self.running:
            self.roll_out()

    def roll_out(self):
        for advantage in (-1.0, 1.0) * 4:  # TRL fetches the batches ahead
            tokens, logprobs = self.engine.sample(self.prompt, 4)
            ids = np.array(self.prompt + tokens)
            mask, old = np.zeros(len(ids), dtype=int), np.zeros(len(ids), dtype=np.float32)
            mask[len(self.prompt) :], old[len(self.prompt) :] = 1, logprobs
            self.rollout_buffer.put(RolloutSample([], [], ids, mask, old, advantage, self.version, self.version, {}))


def serve(engine):
    """The two routes of vLLM's server that the check asks."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self):
            self.answer({"data": [{"id": "base"}, {"id": "policy"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, body["model"]) == ("/v1/completions", "base")
            tokens, logprobs = engine.sample(body["prompt"], body["max_tokens"])
            self.answer({"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}]})

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def attend(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size):
    """What flash-attn3 computes for packed sequences, (tokens, heads, head_dim), without a GPU."""
    out = []
    for i in range(len(cu_q) - 1):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        length, width = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
        mask = torch.ones(length, width, dtype=torch.bool).tril(int(width - length))
        heads = [tensor.transpose(0, 1) for tensor in (q[rows], k[columns], v[columns])]
        attention = torch.nn.functional.scaled_dot_product_attention
        out.append(attention(*heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def make_trainer(tiny_language_model, tmp_path, monkeypatch):
    """An AsyncGRPOTrainer on a base, and the engine that was started from a folder."""
    monkeypatch.setattr(packing, "_flash_attn", lambda: types.SimpleNamespace(flash_attn_varlen_func=attend))
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *args: 1e12)  # it asks CUDA
    servers = []

    def build(base, served):
        engine = StandInEngine(served)
        servers.append(serve(engine))
        trainer = AsyncGRPOTrainer(
            model=str(base),
            processing_class=AutoTokenizer.from_pretrained(tiny_language_model),
            peft_config=BiasSteerConfig(),
            train_dataset=Dataset.from_dict({"prompt": ["1 "] * 8}),
            weight_transfer=Transfer(engine),
            rollout_worker=Worker(engine),
            args=AsyncGRPOConfig(
                output_dir=str(tmp_path / "out"),
                **TWO_STEPS,
                vllm_server_base_url=f"http://127.0.0.1:{servers[-1].server_port}",
                per_device_train_batch_size=2,
                gradient_accumulation_steps=1,
                token_budget=0,
            ),
        )
        return trainer, engine

    yield build
    for server in servers:
        server.shutdown()


@pytest.fixture
def prepare(tiny_language_model, tmp_path):
    def prepare(**options):
        base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
        prepare_for_vllm(base, tmp_path / "ready", **options)
        return tmp_path / "ready"

    return prepare


@pytest.mark.slow
def test_async_grpo_sends_the_vectors_alone_and_is_checked_before_the_first_rollout(make_trainer, prepare):
    base = prepare(plugin=True)
    trainer, engine = make_trainer(base, served=base)
    sync_vectors_only(trainer)
    assert check_vllm_sync(trainer) is None
    trainer.train()

    names = {"model.layers.0.steering_vector", "model.layers.1.steering_vector"}
    assert all(sync.keys() == names for sync in engine.syncs)
    probe, restored = engine.syncs[:2]
    assert all(vector.any() for vector in probe.values())
    assert not any(vector.any() for vector in restored.values()), "the probe is taken back"
    assert trainer.state.global_step == 2
    trained = steering_vectors(trainer.model)
    for index, vector in trained.items():
        assert vector.any()
        assert torch.equal(engine.syncs[-1][f"model.layers.{index}.steering_vector"], vector)
    # the engine samples from the very policy that is trained: AsyncGRPO's ratio is 1 where it was not stale
    assert trainer.model.get_base_model().config._attn_implementation == packing.TREE_ATTENTION


@pytest.mark.slow
def test_async_grpo_with_merged_weights_is_checked_too(make_trainer, prepare, tiny_language_model):
    base = prepare()
    trainer, engine = make_trainer(base, served=base)
    info = {name: p for name, p in trainer.model.get_base_model().named_parameters() if "bias_steer" not in name}
    trainer.weight_transfer._weight_update_info = {
        "names": list(info),
        "dtype_names": ["float32"] * len(info),
        "shapes": [list(parameter.shape) for parameter in info.values()],
    }
    check_vllm_sync(trainer)
    trainer.train()
    assert len(engine.syncs[-1]) == len(info)

    # a server that was started from another checkpoint drops the biases in silence
    trainer, engine = make_trainer(base, served=tiny_language_model)
    trainer.weight_transfer._weight_update_info = {
        "names": list(info),
        "dtype_names": ["float32"] * len(info),
        "shapes": [list(parameter.shape) for parameter in info.values()],
    }
    check_vllm_sync(trainer)
    with pytest.raises(RuntimeError, match="does not sample from the steered policy.*start vLLM from the same folder"):
        trainer.train()
    assert not trainer.rollout_worker.running


def test_async_grpo_that_would_merge_into_a_base_without_biases_stops(make_trainer, tiny_language_model):
    trainer, engine = make_trainer(tiny_language_model, served=tiny_language_model)
    with pytest.raises(RuntimeError, match="no biases that could receive the steering vectors"):
        trainer.train()
    assert not engine.syncs
    assert not trainer.rollout_worker.running


def test_biases_alone_are_not_sent_to_a_server(make_trainer, prepare):
    base = prepare()
    trainer, _ = make_trainer(base, served=base)
    with pytest.raises(ValueError, match=r"takes biases only together with .* plugin=True"):
        sync_vectors_only(trainer)
