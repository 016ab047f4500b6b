"""`bias-steer check` before servers that steer, that drop the vectors, and that do something else."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.cli import main
from peft_bias_steer.serving import check
from peft_bias_steer.serving.check import PROMPTS, ServerCheck, check_server


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def steered(tiny_language_model, tmp_path_factory):
    """A steered model and the folder of its adapter; its stream is larger than its vectors, as it is in trained models."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("steered")
    config = AutoConfig.from_pretrained(tiny_language_model, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_language_model).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    set_steering_vectors(model, {index: 0.3 * torch.randn(32) for index in steering_vectors(model)})
    model.save_pretrained(folder / "adapter")
    return model, str(folder / "adapter")


def scaled_logits(model, ids, scale):
    vectors = steering_vectors(model)
    layers = model.get_base_model().model.layers
    handles = [
        layers[index].register_forward_hook(lambda m, args, out, vector=vector: out + scale * vector)
        for index, vector in vectors.items()
    ]
    try:
        with torch.no_grad(), model.disable_adapter():
            return model(input_ids=ids).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def as_mapping(texts, logprobs):
    return {"tokens": texts[:1], "token_logprobs": logprobs[:1], "top_logprobs": [dict(zip(texts, logprobs))]}


def as_llama_cpp(texts, logprobs):
    found = [{"token": text, "logprob": logprob} for text, logprob in zip(texts, logprobs)]
    return {"content": [{**found[0], "top_logprobs": found}]}


@contextmanager
def serve(model, tokenizer, scale=1.0, *, form=as_mapping, noise=0.0, write=str, models=("steered",), status=200):
    """A server of what the base says with vectors of this scale, added by plain hooks."""
    generator, asked = torch.Generator().manual_seed(0), []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, found):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def do_GET(self):
            assert self.path == "/v1/models"
            self.answer({"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers.get("Authorization")))
            logits = scaled_logits(model, tokenizer(body["prompt"], return_tensors="pt")["input_ids"], scale)
            logits = logits + noise * torch.randn(logits.shape, generator=generator)
            values, tokens = logits.log_softmax(-1).topk(body["logprobs"])
            texts = [write(tokenizer.decode([token])) for token in tokens.tolist()]
            self.answer({"choices": [{"text": texts[0], "logprobs": form and form(texts, values.tolist())}]})

        def log_message(self, *args):
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("form", [as_mapping, as_llama_cpp])
def test_a_server_that_steers_gives_all_of_the_adapter(steered, tokenizer, form):
    model = steered[0].train()
    with serve(model, tokenizer, form=form) as (url, asked):
        found = check_server(model, tokenizer, url + "/")

    assert model.training and model.eval()
    assert found.is_steered and not found.is_base and found.share == pytest.approx(1, abs=1e-4)
    assert found.difference < 1e-5 < 0.1 < found.effect and found.error < 1e-4
    assert [body["prompt"] for _, body, _ in asked] == list(PROMPTS)
    # A byte that is no text of its own is passed over.
    assert len(PROMPTS) <= found.tokens <= 5 * len(PROMPTS)
    assert {(path, body["model"], body["max_tokens"]) for path, body, _ in asked} == {
        ("/v1/completions", "steered", 1)
    }


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
def test_a_server_that_does_something_else_is_found_out(steered, tokenizer, scale):
    with serve(steered[0], tokenizer, scale) as (url, _):
        found = check_server(steered[0], tokenizer, url)

    assert not found.is_steered and found.is_base == (scale == 0)
    # Log-probabilities are not linear in the vectors.
    assert found.share == pytest.approx(scale, abs=1e-4 if scale == 0 else 0.2)
    assert found.difference > 0.4 * found.effect


def test_a_server_that_rounds_still_steers(steered, tokenizer):
    with serve(steered[0], tokenizer, noise=0.05) as (url, _):
        found = check_server(steered[0], tokenizer, url)
    with serve(steered[0], tokenizer, 0.0, noise=0.05) as (url, _):
        dropped = check_server(steered[0], tokenizer, url)

    assert found.is_steered and abs(found.share - 1) < 2 * found.error and 0.01 < found.difference < 0.3
    assert dropped.is_base and abs(dropped.share) < 2 * dropped.error
    with serve(steered[0], tokenizer, noise=1.0) as (url, _):
        unlike = check_server(steered[0], tokenizer, url)
    assert not unlike.is_steered and not unlike.is_base


def test_the_error_covers_the_share_nineteen_times_of_twenty():
    generator = torch.Generator().manual_seed(0)
    base, way = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    covered = 0
    for _ in range(400):
        noise = 0.3 * torch.randn(60, generator=generator, dtype=torch.float64)
        found = check._compare(base + way + noise, base + way, base)
        covered += abs(found.share - 1) < found.error
    assert 0.92 < covered / 400 < 0.98


def test_spaces_that_servers_write_otherwise_are_no_other_tokens(steered, tokenizer):
    with serve(steered[0], tokenizer, write=str.strip) as (url, _):
        found = check_server(steered[0], tokenizer, url)

    assert found.is_steered and found.share == pytest.approx(1, abs=1e-4)


def test_the_key_and_the_name_of_an_adapter_are_sent(steered, tokenizer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serve(steered[0], tokenizer, models=("base", "math")) as (url, asked):
        check_server(steered[0], tokenizer, url, "math", prompts=PROMPTS[:8])
        assert {(body["model"], key) for _, body, key in asked} == {("math", "Bearer secret")}
        with pytest.raises(ValueError, match="serves base, math: say which, as --model"):
            check_server(steered[0], tokenizer, url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": None}, "expected log-probabilities in what .*, got none"),
        ({"form": lambda texts, logprobs: {"tokens": texts}}, "expected log-probabilities in what .*, got none"),
        ({"write": lambda text: f"<{text}>"}, "got 0 of them from steered after 12 prompts: is it made of this base"),
    ],
    ids=["no log-probabilities", "of one token alone", "other tokens"],
)
def test_what_cannot_be_compared_is_said(steered, tokenizer, options, message):
    with serve(steered[0], tokenizer, **options) as (url, _), pytest.raises(ValueError, match=message):
        check_server(steered[0], tokenizer, url)


def test_no_server_and_one_that_refuses_are_said(steered, tokenizer):
    with pytest.raises(ConnectionError, match="no answer from http://127.0.0.1:9/v1/models .*: is the server up"):
        check_server(steered[0], tokenizer, "http://127.0.0.1:9/v1")
    refused = pytest.raises(ConnectionError, match="/v1/completions answers with status 404: ")
    with serve(steered[0], tokenizer, status=404) as (url, _), refused:
        check_server(steered[0], tokenizer, url, "steered")


def test_an_adapter_of_zeros_can_not_be_checked(tiny_language_model, tokenizer):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_language_model), BiasSteerConfig())
    with serve(model, tokenizer) as (url, _), pytest.raises(ValueError, match="changes none of the tokens"):
        check_server(model, tokenizer, url)


def test_the_command_says_what_it_found_and_fails_where_vectors_are_lost(steered, tokenizer, tmp_path, capsys):
    model, adapter = steered
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt, "completion": "4"}) + "\n" for prompt in PROMPTS[:9]))
    with serve(model, tokenizer) as (url, asked):
        main(["check", adapter, "--url", url])
        assert capsys.readouterr().out.startswith("1.00 ± 0.00 of the adapter arrives: ")
        asked.clear()
        main(["check", adapter, "--url", url, "--model", "steered", "--prompts", str(prompts), "--json"])
        found = ServerCheck(**json.loads(capsys.readouterr().out))
        assert found.is_steered and len(asked) == 9
    with serve(model, tokenizer, 0.0) as (url, _), pytest.raises(SystemExit) as stopped:
        main(["check", adapter, "--url", url])
    assert "answers as the base model does, it has dropped the vectors: bias-steer routes" in str(stopped.value)
    with serve(model, tokenizer, 2.0) as (url, _), pytest.raises(SystemExit, match="neither as the steered model"):
        main(["check", adapter, "--url", url])
    prompts.write_text('{"text": "no prompt"}\n')
    with pytest.raises(SystemExit, match=r'expected {"prompt": "a text"} in line 1 of .*prompts.jsonl, got '):
        main(["check", adapter, "--url", "http://127.0.0.1:9/v1", "--prompts", str(prompts)])
