"""The estimates against what a real training step at small size holds, writes and changes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.example_module import load_example


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    return load_example("studies/estimate_cost.py")


def file_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["bias vectors", "LoRA r=2, down_proj", "LoRA r=2, all linear", "full fine-tuning"])
def test_estimate_equals_what_a_training_step_holds(example, tiny_language_model, tmp_path, method, dtype):
    peft_config = example.methods(lora_rank=2)[method]
    cost = example.estimate(AutoConfig.from_pretrained(tiny_language_model), peft_config, dtype)

    base = AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    model = get_peft_model(base, peft_config) if peft_config else base
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    tokens = torch.arange(12).view(2, 6)
    for _ in range(2):  # LoRA's A has a gradient of zero in the first step
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)

    assert cost.trainable_parameters == sum(parameter.numel() for parameter in trained)
    assert cost.gradient_bytes == sum(parameter.grad.nbytes for parameter in trained)
    assert cost.optimizer_bytes == sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    assert cost.file_bytes == file_bytes(tmp_path)
    merged = model.merge_and_unload() if peft_config else model
    # vectors make biases of zero on their way, which a base prepared for them has already
    changed = [p for name, p in merged.named_parameters() if not torch.equal(p, before.get(name, torch.zeros_like(p)))]
    assert cost.sync_bytes == sum(parameter.nbytes for parameter in changed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Qwen2.5-14B", 14_770_033_664),
        ("Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_named_models_have_their_published_sizes(example, name, parameters):
    assert example.estimate(example.MODELS[name], None, torch.bfloat16).trainable_parameters == parameters


def test_counts_of_the_paper_are_reproduced(example):
    # https://huggingface.co/papers/2505.18706: 0.0016 % of Llama-3.1-8B; about 245K for Qwen2.5-14B
    for name, vectors in [("Llama-3.1-8B", 131_072), ("Qwen2.5-14B", 245_760)]:
        config = example.methods(lora_rank=4)["bias vectors"]
        assert example.estimate(example.MODELS[name], config, torch.bfloat16).trainable_parameters == vectors


def test_table_and_exact_numbers_are_written(example, monkeypatch, capsys, tmp_path, tiny_language_model):
    output = tmp_path / "cost.json"
    arguments = ["--models", "Llama-3.1-8B", tiny_language_model, "--markdown", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["estimate_cost.py", *arguments])
    example.main()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | trained |") and len(lines) == 2 + 8
    assert lines[2] == "| Llama-3.1-8B | bias vectors | 131,072 | 1.05 MB | 524 KB | 524 KB | 262 KB |"
    assert json.loads(output.read_text())[0]["sync_bytes"] == 262_144


def test_an_unknown_model_ends_in_one_sentence(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["estimate_cost.py", "--models", "no/such"])
    with pytest.raises(
        SystemExit, match="--models takes SmolLM2-135M, .*a folder or a reachable hub id, got 'no/such'"
    ):
        example.main()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
        (["--output", "no/such/cost.json"], "--output must be a file in a folder that exists, got no/such/cost.json"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_counted(
    example, monkeypatch, capsys, option, message
):
    monkeypatch.setattr(example, "estimate", None)
    monkeypatch.setattr(sys, "argv", ["estimate_cost.py", *option])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert message in capsys.readouterr().err
