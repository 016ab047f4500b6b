# /// script
# dependencies = ["hf_hierarchical_sae[cli]"]
# ///
"""Train a dictionary whose weights, gradients and optimizer are shared out over processes, with FSDP2, on GPUs or CPUs.

    hierarchical-sae harvest states --model HuggingFaceTB/SmolLM2-135M-Instruct --layer 15 --text book.txt
    torchrun --nproc_per_node 2 examples/hf_hierarchical_sae/train_sharded.py states --output_dir outputs/sae_sharded

Accelerate, and so `Trainer`, shards on accelerators only: told to on CPUs, it trains a whole copy in every process.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, Subset
from transformers import AutoModel, get_linear_schedule_with_warmup, set_seed

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    explained_variance,
    record_statistics,
)


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from options import check_least


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harvest", type=Path, help="folder that `hierarchical-sae harvest` wrote")
    parser.add_argument("--layer", type=int, help="which layer of it, if it has several")
    parser.add_argument("--hook_point", help="which site of it, if it has several")
    parser.add_argument("--eval_tokens", type=int, default=4096, help="tokens held out, the last (default: 4096)")
    parser.add_argument("--d_sae", type=int, help="number of latents (default: 8 times the hidden size)")
    parser.add_argument("--k", type=int, default=64, help="largest number of latents per token (default: 64)")
    parser.add_argument("--encoder_chunk_size", type=int, help="latents computed at a time, for less memory")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--batch_size", type=int, default=1024, help="tokens per step and process (default: 1024)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="peak learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: 0)")
    parser.add_argument("--output_dir", type=Path, default="outputs/sae_sharded", help="where the result is written")
    parser.add_argument("--overwrite", action="store_true", help="replace the autoencoder in --output_dir")
    arguments = parser.parse_args()
    # One token has no variance.
    check_least(parser, arguments, eval_tokens=2, max_steps=1, batch_size=1, learning_rate=0.0)
    if arguments.d_sae is not None:
        check_least(parser, arguments, d_sae=1)
    if "WORLD_SIZE" not in os.environ:
        parser.error("expected to be started by torchrun, as above, got no WORLD_SIZE in the environment")
    if (arguments.output_dir / "model.safetensors").exists() and not arguments.overwrite:
        parser.error(f"{arguments.output_dir} holds an autoencoder: give --overwrite or another --output_dir")
    return arguments


def read_harvest(arguments):
    """The harvest, the numbers of the tokens to train on, and (eval_tokens, d_in) activations held out."""
    try:
        shards = ActivationShards(arguments.harvest, arguments.layer, arguments.hook_point)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    least = arguments.batch_size * int(os.environ["WORLD_SIZE"]) + arguments.eval_tokens
    if len(shards) < least:
        raise SystemExit(
            f"expected at least {least} tokens, for --eval_tokens and a batch of each process, got {len(shards)}: "
            "harvest more, or lower --batch_size or --eval_tokens"
        )
    training = range(len(shards) - arguments.eval_tokens)
    return shards, training, shards.rows(torch.arange(len(training), len(shards)))


def make_sae(arguments, shards, sample):
    """The same in every process: they start from one seed."""
    set_seed(arguments.seed)
    try:
        config = HierarchicalSaeConfig(
            d_in=shards.widths[0],
            d_sae=arguments.d_sae or 8 * shards.widths[0],
            k=arguments.k,
            encoder_chunk_size=arguments.encoder_chunk_size,
            model_name=shards.description["model_name"],
            layer=shards.layer,
            hook_point=shards.hook_point,
        )
    except StrictDataclassError as error:
        raise SystemExit(str(error.__cause__)) from error
    sae = HierarchicalSaeModel(config)
    sae.initialize_from_activations(sample)
    return sae.train()


def batches(arguments, dataset):
    """Batches without end; of each epoch, every process has its own part."""
    sampler = DistributedSampler(dataset, seed=arguments.seed, drop_last=True)
    loader = DataLoader(dataset, arguments.batch_size, sampler=sampler, drop_last=True)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def train(arguments, sae, dataset, device):
    # Of this process's part alone: the optimizer is made after the weights were shared out.
    optimizer = torch.optim.Adam(sae.parameters(), lr=arguments.learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, arguments.max_steps // 20), arguments.max_steps)
    given = batches(arguments, dataset)
    for step in range(1, arguments.max_steps + 1):
        optimizer.zero_grad()
        loss = sae(next(given)["hidden_states"].to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, arguments.max_steps // 10) == 0:
            # Every process calls it: they add up their batches.
            metrics = sae.pop_training_metrics()
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss:.4f}", *(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)


def whole(sae):
    """The dictionary in one piece, in the first process; `None` in the others, which take part in gathering it."""
    state = get_model_state_dict(sae, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    gathered = HierarchicalSaeModel(sae.config)
    gathered.load_state_dict(state)
    return gathered.eval()


def save(sae, sample, folder):
    """Ready for use, and read again."""
    sae.fold_input_scale()
    record_statistics(sae, sample)
    sae.save_pretrained(folder)
    reloaded = AutoModel.from_pretrained(folder).state_dict()
    lost = [name for name, tensor in sae.state_dict().items() if not torch.equal(tensor, reloaded[name])]
    if lost:
        raise SystemExit(f"the reloaded autoencoder differs in {', '.join(lost)}")


def main():
    arguments = parse_arguments()
    started = time.time()
    shards, training, held_out = read_harvest(arguments)
    sample = shards.rows(torch.arange(min(8192, len(training))))
    sae = make_sae(arguments, shards, sample)
    # Whatever is refused was refused by now, in every process and before they wait for each other.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    mesh = dist.init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    sae.to(device)
    # The model as a whole: its methods use encoder and decoder together.
    fully_shard(sae, mesh=mesh)
    train(arguments, sae, Subset(shards, training), device)
    own = sum(parameter.to_local().numel() for parameter in sae.parameters())
    gathered, processes = whole(sae), dist.get_world_size()
    dist.destroy_process_group()
    if gathered is None:
        return

    save(gathered, sample, arguments.output_dir)
    quality = explained_variance(gathered, held_out)
    result = {
        "processes": processes,
        "parameters": gathered.num_parameters(),
        "parameters_of_a_process": own,
        "explained_variance": quality,
        "seconds": round(time.time() - started, 1),
    }
    (arguments.output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"Trained:    {gathered.config.d_sae} latents over {processes} processes on {device.type}, {arguments.max_steps} "
        f"steps, {result['seconds']} s; each kept {own} of {gathered.num_parameters()} weights and their moments",
        f"Held out:   explained variance of {len(held_out)} tokens",
        *(f"{budget:>28} {value:>8.3f}" for budget, value in quality.items()),
        f"Artefacts:  {arguments.output_dir}/  {arguments.output_dir}/result.json",
        sep="\n",
    )


if __name__ == "__main__":
    main()
