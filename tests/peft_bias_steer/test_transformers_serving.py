"""`transformers serve`, `pipeline` and lm-eval have the steered model, from the adapter and from a merged checkpoint."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from peft_bias_steer import BiasSteerConfig, export_stock_checkpoint, set_steering_vectors, steering_vectors


# A machine with a GPU may lack it.
openai = pytest.importorskip("openai")

BIAS_STEER = str(Path(sys.executable).with_name("bias-steer"))
PROMPT = "2 + 2 = "
TASK = """
task: first_letter
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


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
    command = [BIAS_STEER, "run"] if form == "adapter" else []
    command += [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        folder,
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
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


@pytest.mark.slow
def test_lm_eval_scores_the_steered_model(steered, tokenizer, tmp_path):
    folder, texts = save(steered, tokenizer, tmp_path / "model", "adapter"), ["good morrow", "to be", "or not", "x"]
    a, b = (tokenizer(letter).input_ids[-1] for letter in "ab")
    with torch.no_grad():
        logits = [steered(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": t, "label": 0}) + "\n" for t in texts))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "test.jsonl"))
    base = steered.get_base_model().name_or_path

    command = [
        BIAS_STEER,
        "run",
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--tasks",
        "first_letter",
        "--device",
        "cpu",
    ]
    command += ["--model_args", f"pretrained={base},peft={folder},dtype=float32", "--include_path", str(tmp_path)]
    command += ["--output_path", "results", "--log_samples"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "results").rglob("samples*.jsonl")
    scored = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    got = [[float(choice[0]) for choice in row["filtered_resps"]] for row in scored]
    want = [[row.log_softmax(-1)[letter].item() for letter in (a, b)] for row in logits]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-4)


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
