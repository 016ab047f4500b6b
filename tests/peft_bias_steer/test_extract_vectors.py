import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bias_steer import extract_vectors, load_vectors
from tests.example_module import load_example


@pytest.fixture
def start(monkeypatch, tiny_language_model, tmp_path):
    example = load_example("peft_bias_steer/extract_vectors.py")

    def run(*options):
        output = str(tmp_path / "adapter")
        monkeypatch.setattr(sys, "argv", ["x", "--model", tiny_language_model, "--output_dir", output, *options])
        example.main()
        return example, output

    return run


def test_example_prints_a_row_for_each_scale_and_saves_the_adapter(start, tiny_language_model, capsys):
    example, output = start("--layers", "1", "--scales", "-2", "0", "2", "--max_new_tokens", "2")

    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| -2", "| 0", "| 2"]
    assert len({row[3] for row in rows}) == 3
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    prompt, happy, _ = example.HELD_OUT[0]
    with torch.no_grad():
        loss = base(torch.tensor([tokenizer(prompt + happy).input_ids])).logits[0].log_softmax(-1)
    ids = tokenizer(happy).input_ids
    expected = sum(
        loss[position, token].item() for position, token in enumerate(ids, len(tokenizer(prompt).input_ids) - 1)
    )
    assert example.log_probability(base, tokenizer, prompt, happy) == pytest.approx(expected, rel=1e-4)
    vectors = extract_vectors(base, tokenizer, example.PAIRS, layers_to_transform=1)
    assert torch.equal(load_vectors(output)[1], vectors[1])


def test_example_names_what_it_cannot_use(start):
    with pytest.raises(SystemExit, match="--layers: layers_to_transform must hold indices in"):
        start("--layers", "9")
    with pytest.raises(SystemExit, match="--method or --layers: method must be one of"):
        start("--layers", "0", "--method", "median")
