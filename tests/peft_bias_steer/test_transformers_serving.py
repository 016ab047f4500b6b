"""`transformers serve` and `pipeline` give the steered model's answers, from the adapter and from a merged checkpoint."""

import os
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from peft_bias_steer import BiasSteerConfig, export_stock_checkpoint, set_steering_vectors, steering_vectors


SERVE = "import peft_bias_steer; from transformers.cli.transformers import main; main()"
PROMPT = "2 + 2 = "


@pytest.fixture
def steered(tiny_language_model):
    """A steered model whose greedy answer differs from its base's."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_language_model), BiasSteerConfig(task_type="CAUSAL_LM")
    ).eval()
    set_steering_vectors(model, {i: torch.randn(v.shape) for i, v in steering_vectors(model).items()})
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


def answer(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def save(model, tokenizer, folder, form: str) -> str:
    if form == "merged":
        export_stock_checkpoint(model, folder, tokenizer=tokenizer)
    else:
        # a base model with an adapter beside its weights: the server reads nothing from elsewhere
        AutoModelForCausalLM.from_pretrained(model.get_base_model().name_or_path).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_pipeline_gives_the_steered_answer(steered, tokenizer, tmp_path, form):
    with steered.disable_adapter():
        unsteered = answer(steered, tokenizer)
    expected = answer(steered, tokenizer)
    folder = save(steered, tokenizer, tmp_path / "model", form)

    generate = pipeline("text-generation", model=folder, tokenizer=tokenizer)
    text = generate(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]

    assert text == expected != unsteered


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_server_gives_the_steered_answer(steered, tokenizer, tmp_path, form):
    expected = answer(steered, tokenizer)
    folder = save(steered, tokenizer, tmp_path / "model", form)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, "-c", SERVE, "serve", folder, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        got = client.completions.create(model=folder, prompt=PROMPT, max_tokens=8, temperature=0)
    finally:
        server.terminate()
        server.wait()
    assert got.choices[0].text == expected


def test_rows_of_one_batch_are_answered_under_different_adapters(steered, tokenizer, tmp_path):
    steered.save_pretrained(tmp_path / "first")
    set_steering_vectors(steered, {i: torch.randn(v.shape) for i, v in steering_vectors(steered).items()})
    steered.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(steered.get_base_model().name_or_path), tmp_path / "first", "first"
    ).eval()
    model.load_adapter(tmp_path / "second", "second")
    alone = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = answer(model, tokenizer)
    with model.disable_adapter():
        alone["__base__"] = answer(model, tokenizer)
    assert len(set(alone.values())) == 3

    names = ["second", "__base__", "first", "second"]
    inputs = tokenizer([PROMPT] * 4, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, adapter_names=names)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == [alone[name] for name in names]
