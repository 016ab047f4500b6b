"""Stock Trainer with DeepSpeed in two processes, on a CPU over gloo: what it does without DeepSpeed, or a sentence."""

import pytest
import torch

from tests.peft_bias_steer.test_distributed import in_two_processes, python_with_deepspeed


# A stage of 0 is DDP; what is compared is what a seed gives in every process, drawn before DeepSpeed shares weights out.
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel

kind, stage, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
if kind == "rebased":
    layer_types = ["conv", "linear_attention", "sliding_attention", "full_attention"]
    config = RebasedConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, layer_types=layer_types, num_attention_heads=4, feature_dim=4
    )
    model = RebasedForCausalLM(config)
    data = Dataset.from_list([{"input_ids": x, "labels": x} for x in torch.randint(2, 64, (40, 16)).tolist()])
else:
    model = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=64, k=8))
    data = Dataset.from_dict({"hidden_states": torch.randn(40, 16).tolist()}).with_format("torch")
zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
others = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
args = TrainingArguments(
    output_dir=out,
    max_steps=3,
    # Adam would make much of how small gradients are rounded.
    optim="sgd",
    learning_rate=1.0,
    per_device_train_batch_size=4,
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    remove_unused_columns=False,
    deepspeed={"zero_optimization": zero, **others} if stage else None,
)
trainer = Trainer(model=model, args=args, train_dataset=data)
refused = None
try:
    trainer.train()
except ValueError as error:
    refused = str(error)
else:
    trainer.save_model(out)
if trainer.accelerator.is_main_process:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"losses": losses, "engine": type(trainer.model_wrapped).__name__, "refused": refused}, out + "/result.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a kind of model at a stage; once for every pair."""
    python, results = python_with_deepspeed(), {}

    def train(kind, stage):
        if (kind, stage) not in results:
            out = tmp_path_factory.mktemp("out")
            result = in_two_processes(PROGRAM, out, kind, stage, out, python=python)
            weights = safetensors_of(out) if result["refused"] is None else {}
            results[kind, stage] = {**result, "weights": weights}
        return results[kind, stage]

    return train


def safetensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.pinned
@pytest.mark.parametrize(("kind", "stage"), [("rebased", 2), ("rebased", 3), ("sae", 2)])
def test_a_training_is_that_without_deepspeed(trained, kind, stage):
    expected, got = trained(kind, 0), trained(kind, stage)

    assert (expected["engine"], got["engine"]) == ("DistributedDataParallel", "DeepSpeedEngine")
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=1e-4, atol=1e-4)
    # DeepSpeed's state has a tied head as well.
    assert got["weights"].keys() - expected["weights"].keys() <= {"lm_head.weight"}
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.pinned
def test_a_decoder_in_pieces_is_refused_in_a_sentence(trained):
    assert "cannot be normalised where DeepSpeed's ZeRO-3 has shared them out" in trained("sae", 3)["refused"]
