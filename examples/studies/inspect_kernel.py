# /// script
# dependencies = ["hf_based_kernel", "datasets", "matplotlib"]
# ///
"""Look into a saved ReBased checkpoint: gamma, beta and the similarity that they induce, layer by layer, as a picture.

    python examples/studies/inspect_kernel.py outputs/recall --num_pairs 4

With --num_pairs the model is one of associative recall, and its attention is held against the true associations too: the
paper's intersection over union (section 5.6 of arXiv 2402.10644), on unseen sequences.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import torch

from hf_based_kernel import RebasedForCausalLM, rebased_attention, taylor_attention
from hf_based_kernel.associative_recall import IGNORED, make_recall_dataset


sys.path.append(str(Path(__file__).parents[1] / "shared"))
from options import check_least


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a saved model, as the training examples leave it")
    parser.add_argument("--num_pairs", type=int, help="pairs per sequence that the recall model was trained on")
    parser.add_argument(
        "--fillers", default="random", choices=["random", "zero"], help="as it was trained (default: random)"
    )
    parser.add_argument("--num_examples", type=int, default=1000, help="recall sequences to look at (default: 1000)")
    parser.add_argument("--seed", type=int, default=10_000, help="seed of these sequences (default: 10000)")
    parser.add_argument("--output_dir", type=Path, help="folder of the pictures (default: the checkpoint's)")
    arguments = parser.parse_args()
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(
            f"checkpoint: expected a folder with a saved model, got {arguments.checkpoint}, without config.json"
        )
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    kind = "rebased model converted from a Llama" if config.get("use_feature_map") else f"{config['model_type']} model"
    if kind != "rebased model":
        parser.error(f"checkpoint: expected a rebased model with projections of its own, got a {kind}")
    least = {"num_examples": 1, "seed": 0} | ({} if arguments.num_pairs is None else {"num_pairs": 1})
    check_least(parser, arguments, **least)
    return arguments


def linear_layers(model):
    return {i: layer.self_attn for i, layer in enumerate(model.model.layers) if layer.layer_type == "linear_attention"}


def similarity(kernel, scores):
    return scores.square() if kernel == "rebased" else 1 + scores + scores.square() / 2


def by_head(values, config):
    """(num_heads * feature_dim,) -> (num_heads, feature_dim)"""
    return values.detach().float().unflatten(0, (-1, config.feature_dim))


def for_each_query_head(k, config):
    """(batch, seq, num_key_value_heads, feature_dim) -> (batch, seq, num_attention_heads, feature_dim)"""
    return k.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=2)


def induced_similarity(attention, config, pairs=4000):
    """Scalar products of random normalised queries and keys, and their similarities under gamma and beta: (pairs, heads)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, pairs, config.num_attention_heads * config.feature_dim, generator=generator)
    drawn_k = drawn[1:, :, : config.num_key_value_heads * config.feature_dim]
    plain_q, plain_k = (torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in (drawn[:1], drawn_k))
    with torch.no_grad():
        q, k = attention.q_norm(plain_q), for_each_query_head(attention.k_norm(plain_k), config)
    plain_q, plain_k = (x.unflatten(-1, (-1, config.feature_dim)) for x in (plain_q, plain_k))
    products = (plain_q * for_each_query_head(plain_k, config))[0].sum(-1)
    scale = config.feature_dim**-0.5
    return products * scale, similarity(config.kernel, (q[0] * k[0]).sum(-1) * scale)


def attention_matrices(model, input_ids):
    """Weights of each attention layer, rows summing to 1: {layer: (batch, num_heads, seq, seq)}."""
    features, hooks = {}, []
    for index, attention in linear_layers(model).items():
        for name in ("q_norm", "k_norm"):
            module = getattr(attention, name)
            hooks.append(
                module.register_forward_hook(lambda m, i, out, key=(index, name): features.update({key: out}))
            )
    softmax_kinds = ("sliding_attention", "full_attention")
    softmax_layers = [i for i, layer in enumerate(model.model.layers) if layer.layer_type in softmax_kinds]
    with torch.no_grad():
        outputs = model(input_ids, use_cache=False, output_attentions=bool(softmax_layers))
    for hook in hooks:
        hook.remove()
    matrices: dict[int, torch.Tensor] = dict(zip(softmax_layers, outputs.attentions or ()))
    attend = rebased_attention if model.config.kernel == "rebased" else taylor_attention
    for index in linear_layers(model):
        q, k = features[index, "q_norm"].float(), features[index, "k_norm"].float()
        k = for_each_query_head(k, model.config)
        # Of the token's own number, one-hot, the average is the weights.
        numbers = torch.eye(q.shape[1]).expand(*q.shape[:1], q.shape[2], -1, -1).transpose(1, 2)
        weights = attend(q, k, numbers, eps=model.config.attention_eps)
        matrices[index] = weights.transpose(1, 2)
    return matrices, outputs.logits


def true_associations(input_ids, labels, num_pairs):
    """The queries' positions (batch, num_pairs), and 1 where a query's value stands: (batch, num_pairs, 2 * num_pairs)."""
    queries = (labels[:, 1:] != IGNORED).nonzero()[:, 1].view(len(input_ids), num_pairs)
    asked = input_ids.gather(1, queries)
    same_key = asked[:, :, None] == input_ids[:, None, 0 : 2 * num_pairs : 2]
    truth = torch.zeros(len(input_ids), num_pairs, 2 * num_pairs)
    truth[:, :, 1::2] = same_key.float()
    return queries, truth


def intersection_over_union(weights, truth):
    """
    Sum of the lesser over sum of the greater of both, over queries and pairs: 1 if attention is the association itself.

    weights: (batch, num_heads, queries, tokens), truth: (batch, queries, tokens) -> (num_heads,)
    """
    truth = truth[:, None].expand_as(weights)
    overlap = torch.minimum(weights, truth).sum((-1, -2)) / torch.maximum(weights, truth).sum((-1, -2))
    return overlap.mean(0)


def plot_kernel(model, path):
    from matplotlib import pyplot

    layers, config = linear_layers(model), model.config
    figure, panels = pyplot.subplots(
        len(layers), 5, figsize=(15, 2.6 * len(layers)), squeeze=False, layout="constrained"
    )
    for row, (index, attention) in zip(panels, layers.items()):
        parts = [(name, side) for name in ("gamma", "beta") for side in ("q", "k")]
        for panel, (name, side) in zip(row, parts):
            values = getattr(getattr(attention, f"{side}_norm"), name)
            panel.set_title(f"layer {index}: {name} of {'queries' if side == 'q' else 'keys'}", fontsize="small")
            if values is None:
                panel.text(0.5, 0.5, "not learned", ha="center", va="center")
                panel.set_axis_off()
                continue
            middle = 1 if name == "gamma" else 0
            values = by_head(values, config)
            reach = max(0.1, (values - middle).abs().max().item())
            image = panel.imshow(values, cmap="RdBu", vmin=middle - reach, vmax=middle + reach, aspect="auto")
            figure.colorbar(image, ax=panel)
            panel.set_xlabel("feature")
            panel.set_ylabel("head")
        products, learned = induced_similarity(attention, config)
        axis = torch.linspace(products.quantile(0.005).item(), products.quantile(0.995).item(), 25)
        panel = row[4]
        for head in range(config.num_attention_heads):
            bins = torch.bucketize(products[:, head].contiguous(), axis)
            middles = [learned[bins == i, head].median() if (bins == i).sum() > 4 else torch.nan for i in range(1, 25)]
            panel.plot(
                (axis[1:] + axis[:-1]) / 2, middles, label=f"head {head}" if config.num_attention_heads <= 4 else None
            )
        panel.plot(axis, axis.square(), "k--", label="s²")
        panel.plot(axis, 1 + axis + axis.square() / 2, "k:", label="1 + s + s²/2 (Based)")
        panel.set_title(f"layer {index}: similarity (median)", fontsize="small")
        panel.set_xlabel("q·k / √d before gamma and beta", fontsize="small")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


def plot_attention(weights, truth, title, path):
    """weights, truth: (queries, tokens) of one sequence"""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for panel, matrix, name in zip(panels, (weights, truth), (title, "true associations")):
        image = panel.imshow(matrix, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        panel.set_title(name, fontsize="small")
        panel.set_xlabel("token of the pairs")
    panels[0].set_ylabel("query")
    figure.colorbar(image, ax=panels)
    figure.savefig(path, dpi=90)


def describe_kernel(model):
    """A line of numbers for each linear attention layer."""
    print("| layer | |gamma| of queries | |gamma| of keys | |beta| of queries | |beta| of keys | least similarity |")
    print("|---|---|---|---|---|---|")
    for index, attention in linear_layers(model).items():
        cells = []
        for name in ("gamma", "beta"):
            for side in ("q", "k"):
                values = getattr(getattr(attention, f"{side}_norm"), name)
                cells.append(
                    "not learned" if values is None else f"{values.abs().mean():.2f} ± {values.abs().std():.2f}"
                )
        least = induced_similarity(attention, model.config)[1].min().item()
        print(f"| {index} | {' | '.join(cells)} | {least:.2g} |")


def compare_with_associations(model, arguments, folder):
    config = model.config
    try:
        dataset = make_recall_dataset(
            arguments.num_examples,
            seq_len=config.max_position_embeddings,
            num_pairs=arguments.num_pairs,
            vocab_size=config.vocab_size,
            random_non_queries=arguments.fillers == "random",
            seed=arguments.seed,
        ).with_format("torch")
    except ValueError as error:
        raise SystemExit(f"--num_pairs does not fit the model: {error}") from None
    totals, right, asked = {}, 0, 0
    for start in range(0, len(dataset), 100):
        rows = dataset[start : start + 100]
        input_ids, labels = rows["input_ids"], rows["labels"]
        queries, truth = true_associations(input_ids, labels, arguments.num_pairs)
        matrices, logits = attention_matrices(model, input_ids)
        counted = labels[:, 1:] != IGNORED
        right += (logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].sum().item()
        asked += counted.sum().item()
        for index, weights in matrices.items():
            places = queries[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[-1])
            cropped = weights.gather(2, places)[..., : 2 * arguments.num_pairs]
            overlap = intersection_over_union(torch.cat([cropped, cropped.mean(1, keepdim=True)], 1), truth)
            totals[index] = totals.get(index, 0) + overlap * len(input_ids)
            if start == 0:
                best = overlap[:-1].argmax().item()
                plot_attention(
                    cropped[0, best], truth[0], f"layer {index}, head {best}", folder / f"attention_layer_{index}.png"
                )
    result = {"accuracy": right / asked, "examples": len(dataset), "iou": {}}
    print(f"\nRecall accuracy {right / asked:.3f} on {len(dataset):,} unseen sequences")
    print("| layer | IoU by head | IoU of the mean over heads |\n|---|---|---|")
    for index, total in totals.items():
        *heads, of_mean = (total / len(dataset)).tolist()
        result["iou"][index] = {"heads": heads, "mean": of_mean}
        print(f"| {index} | {', '.join(f'{value:.3f}' for value in heads)} | {of_mean:.3f} |")
    (folder / "associations.json").write_text(json.dumps(result, indent=2) + "\n")


def main():
    arguments = parse_arguments()
    matplotlib.use("Agg")
    model = RebasedForCausalLM.from_pretrained(arguments.checkpoint, attn_implementation="eager").eval()
    folder = arguments.output_dir or arguments.checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    if linear_layers(model):
        describe_kernel(model)
        plot_kernel(model, folder / "kernel.png")
        print(f"Picture: {folder / 'kernel.png'}")
    if arguments.num_pairs:
        compare_with_associations(model, arguments, folder)
        print(f"Pictures: {folder}/attention_layer_*.png  {folder / 'associations.json'}")


if __name__ == "__main__":
    main()
