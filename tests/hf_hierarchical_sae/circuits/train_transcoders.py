"""
Transcoders of every layer of a language model, trained once and written for circuit-tracer at two budgets, with what they
give on a prompt: circuit-tracer asks for an older transformers than this package, so its tests read files alone.

    python -m tests.hf_hierarchical_sae.circuits.train_transcoders MODEL OUTPUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.shared.plays import find_plays
from hf_hierarchical_sae import HierarchicalSaeModel
from hf_hierarchical_sae.cli import main as hierarchical_sae
from hf_hierarchical_sae.sites import find_site, read_sites


PROMPT = "The capital of France is"
BUDGETS = (4, 16)
SITES = ("mlp.input", "mlp.output")


def copy_for_older_transformers(model: Path, copy: Path) -> None:
    """The same checkpoint, its config and the name of its tokenizer's class as transformers 4 reads them."""
    copy.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "tokenizer.json"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to((model / name).resolve())
    config, tokenizer = (json.loads((model / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def train(model: Path, output: Path, layers: int) -> list[str]:
    """Folders of the transcoders, as a user trains them."""
    text = ["--text", *map(str, find_plays()), "--tokens", "8192", "--shard_dtype", "bfloat16"]
    numbers = [str(layer) for layer in range(layers)]
    folders = [str(output / "transcoders" / number) for number in numbers]
    shutil.rmtree(output / "pairs", ignore_errors=True)
    hierarchical_sae(
        ["harvest", str(output / "pairs"), "--model", str(model), "--layer", *numbers, "--hook_point", *SITES, *text]
    )
    settings = ["--hook_point", SITES[0], "--target_hook_point", SITES[1], "--d_sae", "2048", "--k", str(max(BUDGETS))]
    settings += ["--steps", "60", "--batch_size", "512", "--overwrite"]
    for number, folder in zip(numbers, folders):
        hierarchical_sae(["train", str(output / "pairs"), folder, "--layer", number, *settings])
    shutil.rmtree(output / "pairs")
    return folders


@torch.no_grad()
def record(model: Path, folders: list[str], output: Path) -> None:
    """What goes into the transcoders on the prompt, and what they give at each budget."""
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    sites = [find_site(language_model, layer, SITES[0]) for layer in range(len(folders))]
    taken = torch.cat(read_sites(language_model, sites, ids, torch.ones_like(ids)))
    found = {"input_ids": ids[0], "taken": taken}
    for k in BUDGETS:
        each = [HierarchicalSaeModel.from_pretrained(folder)(x, k=k) for folder, x in zip(folders, taken)]
        found[f"indices_{k}"] = torch.stack([one.top_indices for one in each])
        found[f"values_{k}"] = torch.stack([one.top_values for one in each])
        found[f"given_{k}"] = torch.stack([one.reconstruction for one in each])
    save_file(found, output / "reference.safetensors")


def main(source: Path, output: Path) -> None:
    model = (output / "model").resolve()
    copy_for_older_transformers(source, model)
    folders = train(model, output, json.loads((model / "config.json").read_text())["num_hidden_layers"])
    for k in BUDGETS:
        made = ["--output", str(output / f"set_k{k}"), "--overwrite"]
        hierarchical_sae(["circuits", *folders, *made, "--k", str(k)])
    record(model, folders, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
