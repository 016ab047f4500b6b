"""The benchmark of whole models that decode, at tiny sizes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.example_module import load_example


FILE = Path(__file__).parents[2] / "examples" / "benchmarks" / "rebased_decoding.py"


@pytest.fixture
def benchmark(monkeypatch):
    module = load_example("benchmarks/rebased_decoding.py")
    small = {"vocab_size": 64, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 4}
    for sizes in (module.SMOLLM2, module.LLAMA_150M):
        for name, value in small.items():
            monkeypatch.setitem(sizes, name, value)
    return module


@torch.inference_mode()
def test_a_made_up_context_is_decoded_on_and_counted(benchmark):
    sizes = {}
    for name in ("SmolLM2-135M", "15 of 30 layers replaced", "30 of 30 layers replaced"):
        for context in (200, 1000):
            # 15 and 30 of four layers: capped by the depth.
            model, cache = benchmark.prepare(name, context, 2)
            assert cache.get_seq_length() == context
            sizes[name, context] = benchmark.cache_bytes(cache)
            model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
            assert cache.get_seq_length() == context + 1
    keys_and_values = 2 * 2 * 3 * 4 * 4
    assert sizes["SmolLM2-135M", 200] == 4 * 200 * keys_and_values
    assert sizes["30 of 30 layers replaced", 200] == sizes["30 of 30 layers replaced", 1000]
    for (name, context), total in sizes.items():
        _, fixed, each = benchmark.sizes_of(name)
        assert 2 * (fixed + context * each) == total


def test_layers_are_spread_over_the_depth(benchmark):
    kinds = benchmark.converted(2).config.layer_types

    assert [i for i, kind in enumerate(kinds) if kind == "linear_attention"] == [1, 3]


@pytest.mark.slow
def test_the_table_is_written_after_every_row(tmp_path):
    command = [sys.executable, str(FILE), "--models", "ReBased, 150M", "--contexts", "128", "--batch_sizes", "1"]
    subprocess.run([*command, "--tokens", "1", "--rounds", "1", "--output", str(tmp_path / "t.md")], check=True)
    lines = (tmp_path / "t.md").read_text().splitlines()

    rate, floors = re.fullmatch(r"\| 1 \| 128 \| ([\d.]+) \(([\d.]+)×\) \| 4\.\d \|", lines[-1]).groups()
    assert float(rate) > 0 and float(floors) > 0.5
