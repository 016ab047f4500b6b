"""Two processes compute, and send to vLLM, what one does: DDP, FSDP2 and DeepSpeed's ZeRO-3 over gloo."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.environments import python_with


REPOSITORY = Path(__file__).parents[2]
# Each process takes half of the batch; process 0 writes what it found, gathered, for the test to compare.
PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from peft_bias_steer import BiasSteerConfig

path, out, mode = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
base = AutoModelForCausalLM.from_pretrained(path)
model = get_peft_model(base, BiasSteerConfig())
torch.manual_seed(0)
for layer in model.base_model.steering_layers.values():
    torch.nn.init.normal_(layer.vector("default"), std=0.3)
tokens = torch.load(out + "/tokens.pt")[2 * rank : 2 * rank + 2]
if mode == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    wrapped = model
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
wrapped(tokens, labels=tokens).loss.backward()
whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
vectors = [layer.vector("default") for layer in model.base_model.steering_layers.values()]
gradients = [whole(vector.grad).clone() for vector in vectors]
optimizer.step()
state = {key: whole(value).clone() for key, value in get_peft_model_state_dict(model).items()}
if rank == 0:
    torch.save({"gradients": gradients, "state": state}, out + "/result.pt")
dist.destroy_process_group()
"""


def in_two_processes(program, tmp_path, *arguments, python=sys.executable):
    """What process 0 writes to result.pt."""
    (tmp_path / "program.py").write_text(program)
    environment = {
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",  # of ninja
        "TORCH_EXTENSIONS_DIR": str(Path(python).parents[1] / "extensions"),  # of DeepSpeed, compiled once
    }
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result.pt")


# Pinned: torch before 2.10 sums FSDP2's gradients over gloo, of a plain linear layer too.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=pytest.mark.pinned)])
def test_two_processes_have_the_gradients_of_one(tiny_language_model, tmp_path, mode):
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from peft_bias_steer import BiasSteerConfig

    tokens = torch.randint(0, 200, (4, 9))
    torch.save(tokens, tmp_path / "tokens.pt")
    result = in_two_processes(PROGRAM, tmp_path, tiny_language_model, tmp_path, mode)

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_language_model), BiasSteerConfig())
    torch.manual_seed(0)
    vectors = [layer.vector("default") for layer in model.base_model.steering_layers.values()]
    for vector in vectors:
        torch.nn.init.normal_(vector, std=0.3)
    model(tokens, labels=tokens).loss.backward()

    for vector, gradient in zip(vectors, result["gradients"], strict=True):
        assert vector.grad.abs().max() > 1e-4
        # the mean of two means is summed in another order
        torch.testing.assert_close(gradient, vector.grad, rtol=1e-4, atol=1e-7)
        vector.data -= vector.grad
    for key, value in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(result["state"][key], value, rtol=1e-4, atol=1e-7)


# TRL's own sync in its server mode; process 0 has the engine. The model is sharded after the trainer was made, as
# transformers does it in `train()`: layer by layer, or in one piece, whose parameters stay gathered after a pass.
SYNC = """
import sys, types
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation
from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.serving.trl import check_vllm_sync, sync_vectors_only
from tests.peft_bias_steer.vllm_stand_in import StandInEngine

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=2)
vllm_generation.is_vllm_available = lambda: True


def sync(path, shards):
    vllm_generation.VLLMClient = lambda **options: StandInEngine(path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), BiasSteerConfig())
    generator = torch.Generator().manual_seed(0)
    trained = {index: torch.randn(v.shape, generator=generator) for index, v in steering_vectors(model).items()}
    set_steering_vectors(model, trained)
    model.base_model.set_scale("default", 0.5)
    generation = vllm_generation.VLLMGeneration(model, accelerator, None, mode="server")
    callbacks = []
    trainer = types.SimpleNamespace(model=model, accelerator=accelerator, is_fsdp_enabled=True)
    trainer.vllm_generation, trainer.add_callback = generation, callbacks.append
    # biases alone go to colocated engines; the stand-in takes them too
    generation.mode = "server" if hasattr(model.config, "bias_steer") else "colocate"
    sync_vectors_only(trainer)
    generation.mode = "server"
    assert check_vllm_sync(trainer) is None
    for layer in model.get_base_model().model.layers if shards == "layers" else ():
        fully_shard(layer)
    fully_shard(model)
    [callback] = callbacks
    callback.on_train_begin(None, None, None)
    generation.sync_weights()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for index, vector in steering_vectors(model).items():
        assert torch.equal(vector, trained[index]), "the probe is taken back"
    return {"syncs": generation.vllm_client.syncs, "trained": trained} if accelerator.is_main_process else {}


plugin, stock, out = sys.argv[1:]
results = [sync(plugin, "layers"), sync(plugin, "one"), sync(stock, "layers")]
if accelerator.is_main_process:
    torch.save(results, out)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.pinned
def test_two_sharded_processes_send_whole_vectors_and_are_checked(tiny_language_model, tmp_path):
    from transformers import AutoModelForCausalLM

    from peft_bias_steer.serving.trl import prepare_for_vllm

    plugin, stock = tmp_path / "plugin", tmp_path / "stock"
    prepare_for_vllm(AutoModelForCausalLM.from_pretrained(tiny_language_model), plugin, plugin=True)
    base = prepare_for_vllm(AutoModelForCausalLM.from_pretrained(tiny_language_model), stock)
    biases = [layer.mlp.down_proj.bias for layer in base.model.layers]
    for bias in biases:
        torch.nn.init.normal_(bias)
    base.save_pretrained(stock)
    results = in_two_processes(SYNC, tmp_path, plugin, stock, tmp_path / "result.pt")

    for result, name in zip(results, ["steering_vector", "steering_vector", "mlp.down_proj.bias"], strict=True):
        probe, restored, last = result["syncs"]
        assert list(last) == [f"model.layers.{index}.{name}" for index in result["trained"]]
        for key, vector, bias in zip(last, result["trained"].values(), biases, strict=True):
            expected = 0.5 * vector + (bias.detach() if name == "mlp.down_proj.bias" else 0)
            assert torch.equal(restored[key], expected)
            assert torch.equal(last[key], expected)
            assert not torch.equal(probe[key], expected)


# TRL's trainer and DeepSpeed's engine, every weight in two halves; process 0 has the vLLM stand-in, made before there is
# a DeepSpeed config, which would share out its weights too.
ZERO3 = """
import sys
import torch
import torch.distributed as dist
from datasets import Dataset
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.serving.trl import check_vllm_sync, sync_vectors_only
from tests.peft_bias_steer.vllm_stand_in import StandInEngine

base, mode, out, result = sys.argv[1:]
torch.set_num_threads(1)
engine = StandInEngine(base)
vllm_generation.is_vllm_available = lambda: True
vllm_generation.VLLMClient = lambda **options: engine
args = GRPOConfig(
    output_dir=out,
    max_steps=2,
    learning_rate=0.1,
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=4,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    use_vllm=True,
    vllm_mode="server",
    deepspeed={
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    },
)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(base),
    processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
    peft_config=BiasSteerConfig(),
    reward_funcs=lambda completions, **_: [sum(map(ord, text)) / 1000 for text in completions],
    train_dataset=Dataset.from_dict({"prompt": [f"{number} " for number in range(40)]}),
    args=args,
)
# biases alone go to colocated engines; the stand-in takes them too
trainer.vllm_generation.mode = mode
sync_vectors_only(trainer)
trainer.vllm_generation.mode = "server"
assert check_vllm_sync(trainer) is None, "it waits for train(), where DeepSpeed begins"
trainer.train()
assert isinstance(trainer.model_wrapped, DeepSpeedEngine) and trainer.accelerator.num_processes == 2
assert all(p.numel() == 0 and 0 < p.ds_tensor.numel() < p.ds_numel for p in trainer.model.parameters())
trainer.vllm_generation.sync_weights()
trainer.save_model(out)
if trainer.accelerator.is_main_process:
    torch.save({"syncs": engine.syncs, "adapter": load_file(out + "/adapter_model.safetensors")}, result)
dist.destroy_process_group()
"""


def python_with_deepspeed():
    """It builds its communication in C++."""
    if shutil.which("c++") is None:
        pytest.skip("DeepSpeed needs a C++ compiler")
    return python_with("deepspeed", ".venv-deepspeed")


@pytest.mark.slow
@pytest.mark.pinned
@pytest.mark.parametrize("mode, name", [("server", "steering_vector"), ("colocate", "mlp.down_proj.bias")])
def test_what_zero3_shares_out_is_sent_whole_and_checked(mode, name, tiny_language_model, tmp_path):
    from transformers import AutoModelForCausalLM

    from peft_bias_steer.serving.trl import prepare_for_vllm

    python = python_with_deepspeed()
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    prepared = prepare_for_vllm(base, tmp_path / "base", plugin=mode == "server")
    biases = [layer.mlp.down_proj.bias for layer in prepared.model.layers]
    if mode == "colocate":
        for bias in biases:
            torch.nn.init.normal_(bias)
        prepared.save_pretrained(tmp_path / "base")
    result = in_two_processes(
        ZERO3,
        tmp_path,
        *(tmp_path / "base", mode, tmp_path / "out", tmp_path / "result.pt"),
        python=python,
    )

    probe, restored, *_, last = result["syncs"]
    assert len(result["syncs"]) == 5, "the probe, what was there before, each of two steps, and the last"
    assert list(last) == [f"model.layers.{index}.{name}" for index in range(2)]
    for key, vector, bias in zip(last, result["adapter"].values(), biases, strict=True):
        start = torch.zeros(32) if mode == "server" else bias.detach()
        assert vector.abs().min() > 0.01
        assert torch.equal(last[key], start + vector)
        assert torch.equal(restored[key], start)
        assert not torch.equal(probe[key], start)
