# /// script
# dependencies = ["peft_bias_steer", "rich"]
# ///
"""
What a step of reinforcement learning has to hold and to send, from a model's config alone:

    python examples/studies/estimate_cost.py --models Llama-3.1-8B Qwen2.5-14B Llama-3.1-405B

The model and its adapter are built on the meta device, so nothing is downloaded or allocated for the named models; any
other hub id or folder gives its config. Counted, for each method:

- parameters that are trained, in float32 for adapters and in `--dtype` for full fine-tuning;
- AdamW's two moments, in the dtype of what they belong to, and a step counter for each tensor;
- gradients, the payload of one all-reduce; a ring of N processes sends 2 (N - 1) / N of it per process;
- the adapter's tensors in a file, or the model's;
- rollout sync: the weights of the merged model that a step has changed, in `--dtype`, which an inference engine has to
  get before it samples again. TRL sends every weight of the model, whatever was trained; LoRA's own matrices (its file)
  are enough for an engine that keeps the adapter apart.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from peft_bias_steer import BiasSteerConfig


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from options import check_least


def llama(hidden: int, inner: int, layers: int, heads: int, **options: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    shared: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False}
    return LlamaConfig(**sizes, num_attention_heads=heads, **(shared | options))


def qwen(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, **options: Any) -> Qwen2Config:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    shared: dict[str, Any] = {
        "num_key_value_heads": key_value_heads,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    }
    return Qwen2Config(**sizes, num_attention_heads=heads, **(shared | options))


SMALL_QWEN: dict[str, Any] = {"vocab_size": 151_936, "tie_word_embeddings": True}
MODELS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True),
    "Qwen2.5-0.5B": qwen(896, 4864, 24, 14, 2, **SMALL_QWEN),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, tie_word_embeddings=True),
    "Qwen2.5-1.5B": qwen(1536, 8960, 28, 12, 2, **SMALL_QWEN),
    "Qwen2.5-7B": qwen(3584, 18_944, 28, 28, 4),
    "Llama-3.1-8B": llama(4096, 14_336, 32, 32),
    "Qwen2.5-14B": qwen(5120, 13_824, 48, 40, 8),
    "Qwen2.5-32B": qwen(5120, 27_648, 64, 40, 8),
    "Llama-3.1-70B": llama(8192, 28_672, 80, 64),
    "Qwen2.5-72B": qwen(8192, 29_568, 80, 64, 8),
    "Llama-3.1-405B": llama(16_384, 53_248, 126, 128),
}


def methods(lora_rank: int) -> dict[str, PeftConfig | None]:
    return {
        "bias vectors": BiasSteerConfig(task_type="CAUSAL_LM"),
        f"LoRA r={lora_rank}, down_proj": LoraConfig(r=lora_rank, target_modules=["down_proj"], task_type="CAUSAL_LM"),
        f"LoRA r={lora_rank}, all linear": LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        "full fine-tuning": None,
    }


@dataclass
class Cost:
    """
    Bytes of one training step; see the head of this file.

    Args:
        trainable_parameters (`int`): Numbers that are trained.
        optimizer_bytes (`int`): AdamW's state.
        gradient_bytes (`int`): Gradients, once.
        file_bytes (`int`): Tensors of the saved adapter or model, without the header of the file.
        sync_bytes (`int`): Weights of the merged model that differ from the base's.
    """

    trainable_parameters: int
    optimizer_bytes: int
    gradient_bytes: int
    file_bytes: int
    sync_bytes: int


def estimate(config: PretrainedConfig, peft_config: PeftConfig | None, dtype: torch.dtype) -> Cost:
    """
    The cost of training a model under one method, without allocating it.

    Args:
        config (`PretrainedConfig`): Config of a causal language model.
        peft_config (`PeftConfig` or `None`): The adapter; `None` for full fine-tuning.
        dtype (`torch.dtype`): Of the base model's weights.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    return Cost(
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        optimizer_bytes=2 * trained_bytes + torch.float32.itemsize * len(trained),
        gradient_bytes=trained_bytes,
        file_bytes=trained_bytes,
        sync_bytes=changed_by_merging(model) * dtype.itemsize,
    )


def changed_by_merging(model: Any) -> int:
    """Numbers of the base model that change when the adapter is merged into it; all of them for full fine-tuning."""
    count = 0
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            # the merged matrix as a whole: (out_features, rank) @ (rank, in_features)
            out_features = model.get_parameter(name.replace(".lora_A.", ".lora_B.")).shape[0]
            count += out_features * parameter.shape[1]
        elif parameter.requires_grad and ".lora_B." not in name:
            count += parameter.numel()
    return count


def readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"{', '.join(MODELS)}, hub ids or folders")
    parser.add_argument("--lora_rank", type=int, default=4, help="(%(default)s)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the base (%(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--output", type=Path, help="JSON file to write, with exact numbers")
    args = parser.parse_args()
    check_least(parser, args, lora_rank=1)
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        parser.error(f"--output must be a file in a folder that exists, got {args.output}")

    columns = ["model", "trained", "parameters", "optimizer", "gradients", "file", "rollout sync"]
    rows, exact = [], []
    for name in args.models:
        try:
            config = MODELS[name] if name in MODELS else AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"--models takes {', '.join(MODELS)}, a folder or a reachable hub id, got {name!r}: "
                f"{str(error).splitlines()[0]}"
            ) from None
        for method, peft_config in methods(args.lora_rank).items():
            cost = estimate(config, peft_config, getattr(torch, args.dtype))
            exact.append({"model": name, "method": method, **asdict(cost)})
            sizes = [cost.optimizer_bytes, cost.gradient_bytes, cost.file_bytes, cost.sync_bytes]
            rows.append([name, method, f"{cost.trainable_parameters:,}", *map(readable, sizes)])
    if args.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]))
    else:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if args.output:
        args.output.write_text(json.dumps(exact, indent=1) + "\n")


if __name__ == "__main__":
    main()
