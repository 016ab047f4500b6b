"""The example that makes a ReBased model of a Llama, with a tiny one."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_based_kernel import RebasedForCausalLM


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("convert_llama", EXAMPLES / "hf_based_kernel" / "convert_llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measures():
    return importlib.import_module("conversions")


@pytest.fixture
def teacher(tmp_path, tiny_language_model):
    """A folder with a Llama of three layers and a tokenizer, and text files."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    for i in range(4):
        (tmp_path / f"text{i}.txt").write_text(" ".join(f"word{(i * 7 + j * j) % 50}" for j in range(400)))
    return tmp_path


def run(example, monkeypatch, folder, *options):
    texts = [str(path) for path in sorted(folder.glob("*.txt"))]
    given = ["--model", str(folder / "teacher"), "--text_files", *texts, "--output_dir", str(folder / "out")]
    sizes = ["--seq_len", "16", "--eval_texts", "2", "--transfer_steps", "12", "--distill_steps", "4"]
    monkeypatch.setattr(sys, "argv", ["convert_llama.py", *given, *sizes, "--replace", "1", "3", *options])
    example.main()
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.parametrize("options", [("--window", "4"), ("--window", "0", "--distill", "lora")])
def test_a_llama_becomes_rebased_models_that_are_measured(example, teacher, monkeypatch, options):
    results = run(example, monkeypatch, teacher, *options)

    assert [result["replaced"] for result in results] == [0, 1, 3]
    assert results[0]["kl"][0] < 1e-6 and results[0]["agreement"][0] == 1.0
    assert ("window only, kl" in results[1]) == (options[1] != "0")
    curve = json.loads((teacher / "out" / "transfer.json").read_text())
    assert curve[-1][1] < curve[0][1]
    model = AutoModelForCausalLM.from_pretrained(teacher / "out" / "3")
    assert isinstance(model, RebasedForCausalLM)
    assert model.config.layer_types == ["linear_attention"] * 3
    assert "| 3 |" in (teacher / "out" / "results.md").read_text()
    assert (teacher / "out" / "conversion.png").exists()


def test_what_is_there_is_not_done_again(example, teacher, monkeypatch):
    first = run(example, monkeypatch, teacher, "--window", "4")
    monkeypatch.setattr(example, "train", None)

    assert run(example, monkeypatch, teacher, "--window", "4") == first


def test_layers_that_the_model_lacks_are_refused(example, teacher, monkeypatch):
    with pytest.raises(SystemExit, match="--replace: expected numbers from 1 to 3, the layers of the model"):
        run(example, monkeypatch, teacher, "--replace", "4")


def test_recall_hits_end_a_pair_of_before_beyond_the_window(example, measures):
    row = torch.tensor([5, 6, 1, 2, 3, 5, 6, 5, 6])

    #                    6 1 2 3 5 6 5 6
    assert measures.recall_hits(row, 1).int().tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert measures.recall_hits(row, 4).int().tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@torch.no_grad()
def test_window_only_is_the_model_without_its_linear_part(example, measures):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = RebasedForCausalLM.from_llama(LlamaForCausalLM(config).eval(), [0], linear_attention_window=4)
    row = torch.randint(50, (12,))
    before = model(row[None]).logits
    with measures.window_only(model):
        seen = model(row[None]).logits[0, -1]
        row[7] += 1
        assert torch.equal(model(row[None]).logits[0, -1], seen)
        row[8] += 1
        assert not torch.equal(model(row[None]).logits[0, -1], seen)
    row[7:9] -= 1
    assert torch.equal(model(row[None]).logits, before)
