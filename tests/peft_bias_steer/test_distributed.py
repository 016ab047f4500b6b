"""Two processes compute what one does: DDP and FSDP2 over gloo."""

import os
import subprocess
import sys

import pytest
import torch


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


# Pinned: torch before 2.10 sums FSDP2's gradients over gloo, of a plain linear layer too.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp2", marks=pytest.mark.pinned)])
def test_two_processes_have_the_gradients_of_one(tiny_language_model, tmp_path, mode):
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from peft_bias_steer import BiasSteerConfig

    tokens = torch.randint(0, 200, (4, 9))
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "program.py"), tiny_language_model, str(tmp_path), mode],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")

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
