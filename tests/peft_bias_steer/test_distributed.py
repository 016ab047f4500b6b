"""Two processes compute, and send to vLLM, what one does: DDP and FSDP2 over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


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


def in_two_processes(program, tmp_path, *arguments):
    """What process 0 writes to result.pt."""
    (tmp_path / "program.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
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
