"""`vllm serve` with three adapters, asked through the openai client. Run by `make test-serving`."""

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


vllm = pytest.importorskip("vllm", reason="make test-serving runs it in an environment of its own")

import json  # noqa: E402

import httpx  # noqa: E402
import openai  # noqa: E402

from peft_bias_steer import vllm_overrides  # noqa: E402
from peft_bias_steer.serving.check import check_server  # noqa: E402
from tests.conftest import byte_tokenizer  # noqa: E402
from tests.peft_bias_steer.serving.served import NAMES, make_base, reference, steer  # noqa: E402


ENVIRONMENT = {
    "VLLM_PLUGINS": "bias_steer",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
TEXT = "to be, or not to be: that is the question. whether it is nobler in the mind to suffer"


class Server:
    """A running `vllm serve`, and the steered model that it should answer as."""

    def __init__(self, folder: Path):
        self.folder, self.tokenizer = folder, byte_tokenizer()
        self.base = make_base("qwen3", folder / "base", vocab_size=len(self.tokenizer))
        self.tokenizer.save_pretrained(self.base)
        self.model = steer(self.base, NAMES)
        self.model.save_pretrained(folder / "adapters")
        adapters = {name: str(folder / "adapters" / name) for name in NAMES}
        overrides = vllm_overrides(adapters, max_adapters=8, folder=str(folder / "adapters"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        options = ["--port", self.url.rpartition(":")[2], "--dtype", "float32", "--max-model-len", "256"]
        options += ["--enforce-eager", "--served-model-name", "base", "--hf-overrides", json.dumps(overrides)]
        # what `vllm serve` runs; the command itself looks for a package named vllm, and a CPU has vllm-cpu
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.base, *options]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait(self) -> None:
        for _ in range(240):
            assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise TimeoutError((self.folder / "log").read_text()[-3000:])

    def complete(self, model="base", prompt=TEXT, **xargs) -> str:
        extra = {"ignore_eos": True, "return_token_ids": True} | ({"vllm_xargs": xargs} if xargs else {})
        answer = self.client.completions.create(
            model=model, prompt=prompt, max_tokens=12, temperature=0, extra_body=extra
        )
        return list(answer.choices[0].token_ids)

    def expected(self, *request, prompt=TEXT, tokens=12) -> list[int]:
        """Greedy tokens of the steered model."""
        ids = self.tokenizer(prompt).input_ids
        length = len(ids)
        for _ in range(tokens):
            ids = [*ids, reference(self.model, request, ids, length)[-1].argmax().item()]
        return ids[length:]

    def post(self, route, **body) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{route}", json=body, timeout=120)

    def adapters(self) -> dict:
        return httpx.get(f"{self.url}/v1/bias_steer_adapters").json()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


def test_each_request_names_its_adapter_scale_and_tokens(server):
    assert server.complete() == server.expected(None)
    assert server.complete(bias_steer="first") == server.expected("first")
    assert server.complete(bias_steer="second", bias_steer_scale=0.8) == server.expected("second", 0.8)
    asked = {"bias_steer": "third", "bias_steer_scale": -1, "bias_steer_tokens": "generated"}
    assert server.complete(**asked) == server.expected("third", -1.0, "generated")
    different = {str(server.expected(name)) for name in ("first", "second", "third", None)}
    assert len(different) == 4


def test_an_adapter_is_a_model(server):
    listed = [model.id for model in server.client.models.list()]

    assert listed[0] == "base" and set(NAMES) <= set(listed)
    for name in NAMES:
        assert server.complete(name) == server.expected(name)
    assert server.complete("first", bias_steer_scale=0.5) == server.expected("first", 0.5)
    with pytest.raises(openai.NotFoundError, match="`fourth` does not exist"):
        server.complete("fourth")


def test_what_each_name_serves_is_found_out_by_its_log_probabilities(server):
    prompts, active = [TEXT[:length] for length in range(8, 72)], server.model.active_adapter
    try:
        for name in NAMES:
            server.model.set_adapter(name)
            found = check_server(server.model, server.tokenizer, f"{server.url}/v1", name, prompts=prompts)
            assert found.is_steered and found.difference < 1e-4, found
            other = NAMES[NAMES.index(name) - 1]
            for served, is_base in (("base", True), (other, False)):
                found = check_server(server.model, server.tokenizer, f"{server.url}/v1", served, prompts=prompts)
                assert found.is_base == is_base and not found.is_steered, found
    finally:
        server.model.set_adapter(active)


def test_chat_is_steered(server):
    messages = [{"role": "user", "content": "to be or not to be"}]
    prompt = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    options = {"max_tokens": 12, "temperature": 0}
    for name in NAMES:
        answer = server.client.chat.completions.create(
            model=name, messages=messages, extra_body={"ignore_eos": True, "return_token_ids": True}, **options
        )
        assert list(answer.choices[0].token_ids) == server.expected(name, prompt=prompt)


@pytest.mark.parametrize(
    "xargs, message",
    [
        ({"bias_steer": "nobody"}, "no adapter named 'nobody' is loaded: loaded are first, second, third"),
        ({"bias_steer": "first", "bias_steer_scale": "high"}, "bias_steer_scale must be a number, got 'high'"),
        ({"bias_steer": "first", "bias_steer_tokens": "last"}, "one of all, prompt, generated, got 'last'"),
        ({"bias_steer_scale": 2.0}, "name the adapter"),
        ({"bias_steer": "first", "bias_steer_scale": 1e39}, "bias_steer_scale must be a finite number, got 1e+39"),
        ({"bias_steer": "first", "bias_steer_row": 1}, "got bias_steer_row"),
        ({"bias-steer": "first"}, "got bias-steer"),
    ],
)
def test_request_that_cannot_be_meant_is_a_bad_request(server, xargs, message):
    with pytest.raises(openai.BadRequestError) as error:
        server.complete(**xargs)
    assert message in str(error.value)


def test_beam_search_does_not_lose_the_adapter_in_silence(server):
    beams = {"use_beam_search": True, "vllm_xargs": {"bias_steer": "first"}}
    with pytest.raises(openai.BadRequestError, match="beam search takes no adapter"):
        server.client.completions.create(model="base", prompt=TEXT, max_tokens=4, n=2, extra_body=beams)


def test_adapters_come_and_go_while_the_server_runs(server):
    folder = server.folder / "adapters"
    before = server.adapters()
    assert before.keys() == set(NAMES)
    assert server.post("load_bias_steer_adapter", name="new", path=str(folder / "first")).status_code == 200
    assert server.adapters()["new"] == before["first"]
    assert server.complete("new") == server.expected("first")
    again = server.post("load_bias_steer_adapter", name="new", path=str(folder / "second"))
    assert again.status_code == 400 and "choose another name, or replace it" in again.text
    server.post("load_bias_steer_adapter", name="new", path=str(folder / "second"), replace=True)
    assert server.complete(bias_steer="new") == server.expected("second")
    assert server.post("unload_bias_steer_adapter", name="new").status_code == 200
    with pytest.raises(openai.BadRequestError, match="no adapter named 'new'"):
        server.complete(bias_steer="new")
    with pytest.raises(openai.NotFoundError):
        server.complete("new")
    assert server.adapters() == before


@pytest.mark.parametrize(
    "route, body, message",
    [
        ("load_bias_steer_adapter", {"name": "new", "path": "/etc"}, "a folder under the one that this server allows"),
        ("load_bias_steer_adapter", {"name": "new", "path": "{adapters}/../base"}, "a folder under the one"),
        ("load_bias_steer_adapter", {"name": "new", "path": "{adapters}/nowhere"}, "a folder under the one"),
        ("load_bias_steer_adapter", {"name": "__base__", "path": "{adapters}/first"}, "other than '__base__'"),
        ("load_bias_steer_adapter", {"name": "base", "path": "{adapters}/first"}, "what requests call the base model"),
        ("load_bias_steer_adapter", {"name": "new"}, "expected name, path"),
        ("embeddings", {"model": "first", "input": "to be"}, "/v1/embeddings takes no adapter as its model"),
        (
            "load_bias_steer_adapter",
            {"name": "new", "path": "{adapters}/wide"},
            r"shape (64,) for layer 0, got (128,)",
        ),
        ("unload_bias_steer_adapter", {"name": "nobody"}, "no adapter named 'nobody'"),
    ],
)
def test_what_cannot_be_loaded_is_a_bad_request(server, route, body, message):
    if body.get("path", "").endswith("wide") and not (server.folder / "adapters" / "wide").exists():
        wide = steer(make_base("qwen3", server.folder / "wide base", hidden_size=128))
        wide.save_pretrained(server.folder / "adapters" / "wide")
    before = server.adapters()
    body = {key: value.format(adapters=server.folder / "adapters") for key, value in body.items()}
    answer = server.post(route, **body)

    assert answer.status_code == 400 and message in answer.text
    assert server.adapters() == before


def test_blocks_of_the_guide_run_on_this_server(server):
    guide = (Path(__file__).parents[3] / "docs" / "guide_serving.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "localhost" in block]
    folder = server.folder / "adapters"
    for name, source in {"math": "first", "brief": "second"}.items():
        server.post("load_bias_steer_adapter", name=name, path=str(folder / source)).raise_for_status()
    names = {}
    for block in blocks:
        for name, source in {"math": "first", "brief": "second"}.items():
            block = block.replace(f'"adapters/{name}"', repr(str(folder / source)))
        exec(block.replace("http://localhost:8000", server.url), names)

    text = names["prompt"]["prompt"]
    asked = {"base": (None,), "math": ("first",), "brief": ("second", 0.8, "generated")}
    for name, request in asked.items():
        ids = server.expected(*request, prompt=text, tokens=16)
        ids = ids[: ids.index(server.tokenizer.eos_token_id)] if server.tokenizer.eos_token_id in ids else ids
        wanted = server.tokenizer.decode(ids, skip_special_tokens=True)
        # vLLM keeps back bytes that no further token makes a character of
        assert names[name].choices[0].text.rstrip("\ufffd") == wanted.rstrip("\ufffd") != ""
    for name in ("math", "brief"):
        server.post("unload_bias_steer_adapter", name=name).raise_for_status()
    assert len(blocks) == 2 and server.adapters().keys() == set(NAMES)


def test_a_hundred_clients_that_load_and_remove_while_others_generate_mix_nothing_up(server):
    """Each of 50 names changes its vectors again and again; what is generated under a fixed name never does."""
    expected = {name: server.expected(name) for name in (*NAMES, None)}
    by_digest = {digest: expected[name] for name, digest in server.adapters().items()}
    folder = server.folder / "adapters"

    def change(client: int) -> list[int]:
        name, source = f"client {client % 5}", NAMES[client % 3]
        loaded = server.post("load_bias_steer_adapter", name=name, path=str(folder / source), replace=True)
        answered = None
        try:
            answered = server.complete(bias_steer=name)
        except openai.BadRequestError as error:
            assert f"no adapter named '{name}'" in str(error)
        except openai.InternalServerError:
            pass  # removed by another client while the request was on its way: an error, and not the base model
        removed = server.post("unload_bias_steer_adapter", name=name)
        assert answered is None or answered in by_digest.values()
        return [loaded.status_code, removed.status_code]

    def generate(client: int) -> None:
        name = (*NAMES, None)[client % 4]
        assert server.complete(**({"bias_steer": name} if name else {})) == expected[name]

    with ThreadPoolExecutor(100) as pool:
        changes = [pool.submit(change, client) for client in range(50)]
        answers = [pool.submit(generate, client) for client in range(50)]
        codes = {code for future in changes for code in future.result()}
        for future in answers:
            future.result()

    assert codes <= {200, 400}
    assert server.adapters().keys() == set(NAMES)
    assert all(server.complete(bias_steer=name) == expected[name] for name in NAMES)
    assert server.process.poll() is None
