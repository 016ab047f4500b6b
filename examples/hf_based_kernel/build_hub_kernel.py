# /// script
# dependencies = ["hf_based_kernel"]
# ///
"""Write the attention operator as a kernel repository that `kernels.get_kernel` loads, without the rest of the package.

    python examples/hf_based_kernel/build_hub_kernel.py --output_dir outputs/rebased-attention
    hf upload your-name/rebased-attention outputs/rebased-attention --repo-type kernel --revision v1

Then, where only torch, triton and `kernels` are installed:

    attention = kernels.get_kernel("your-name/rebased-attention", version=1, trust_remote_code=True)
    out = attention.rebased_attention(q, k, v)
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import hf_based_kernel


# One variant serves every torch and every GPU: the kernels are compiled where they run.
VARIANT = "torch-universal"
MODULES = [
    "rebased_attention_chunked.py",
    "rebased_attention_forms.py",
    "rebased_attention_triton.py",
    "rebased_features.py",
    "rebased_kernels_triton.py",
    "rebased_state_triton.py",
    "rebased_step_triton.py",
]
INIT = '''"""Causal linear attention with a quadratic kernel (arXiv 2402.10644, arXiv 2402.18668)."""

from . import rebased_attention_forms as layers
from .rebased_attention_forms import rebased_attention, taylor_attention


__version__ = "{version}"
__all__ = ["layers", "rebased_attention", "taylor_attention"]
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

# {name}

`rebased_attention` and `taylor_attention` of the package `hf_based_kernel` {version}, in PyTorch and Triton, with gradients
and a state of constant size. Built by `examples/hf_based_kernel/build_hub_kernel.py`.
"""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="rebased-attention", help="name of the kernel (default: rebased-attention)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/rebased-attention"), help="where the repository is written"
    )
    arguments = parser.parse_args()
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", arguments.name):
        parser.error(
            f"--name: expected a small letter and then small letters, digits and dashes, got {arguments.name!r}; the owner of "
            "the repository belongs to the upload"
        )
    if arguments.output_dir.is_file():
        parser.error(f"--output_dir: expected a folder to write, got the file {arguments.output_dir}")
    if (arguments.output_dir / "build").exists():
        parser.error(f"{arguments.output_dir}/build exists already; delete it or choose another --output_dir")
    return arguments


def main():
    arguments = parse_arguments()
    variant = arguments.output_dir / "build" / VARIANT
    package = variant / arguments.name.replace("-", "_")
    package.mkdir(parents=True)

    version = hf_based_kernel.__version__
    files = {module: (Path(hf_based_kernel.__file__).parent / module).read_text() for module in MODULES}
    files["__init__.py"] = INIT.format(version=version)
    for name, text in files.items():
        (package / name).write_text(text)
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]
    metadata = {
        # The module's name when loaded: two versions can be in one process.
        "id": f"_{package.name}_{digest}",
        "name": arguments.name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))
    (arguments.output_dir / "README.md").write_text(CARD.format(name=arguments.name, version=version))
    print(f"{arguments.output_dir}: {len(list(package.iterdir()))} files in build/{VARIANT}/{package.name}")


if __name__ == "__main__":
    main()
