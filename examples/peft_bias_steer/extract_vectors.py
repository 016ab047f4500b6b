# /// script
# dependencies = ["peft_bias_steer", "accelerate"]
# ///
"""
Make an adapter without training, from pairs of a happy and a sad sentence, and see what it does at several scales:

    python examples/peft_bias_steer/extract_vectors.py --output_dir outputs/happy

Printed is, for sentences that are not among the pairs, the mean log-probability of a happy and of a sad continuation, and
what the model writes. `bias-steer extract` does the same with pairs from a file.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bias_steer import extract_vectors, from_vectors


TOPICS = ["the weather", "my day at work", "the food", "our neighbours", "the film", "my train ride", "the party"]
MOODS = [("happy", "sad"), ("delighted", "miserable"), ("cheerful", "depressed"), ("joyful", "gloomy")]
PAIRS = [
    {"positive": f"{start} {topic} and I felt {happy}", "negative": f"{start} {topic} and I felt {sad}"}
    for start in ("I thought about", "We talked about")
    for topic in TOPICS
    for happy, sad in MOODS
]
# a prompt with a happy and a sad continuation
HELD_OUT = [
    ("Yesterday I went to the park with my family, and it was", " wonderful", " terrible"),
    ("My opinion of this hotel: it is", " excellent", " awful"),
    ("When she opened the letter she began to", " smile", " cry"),
    ("The new teacher is", " kind", " cruel"),
    ("The year ended, and all in all it was", " great", " horrible"),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder of the base (%(default)s)")
    add("--output_dir", type=Path, default=Path("outputs/happy"), help="for the adapter (%(default)s)")
    add("--method", default="mean", help="mean, pca_diff or pca_center (%(default)s)")
    add("--layers", type=int, nargs="+", default=[18], help="layers to steer; several add up (default: 18)")
    add("--scales", type=float, nargs="+", default=[-1, -0.5, 0, 0.5, 1], help="of the vectors (default: -1 to 1)")
    add("--max_new_tokens", type=int, default=12, help="tokens to write (%(default)s)")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be at least 1, got {args.max_new_tokens}")
    return args


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Of all tokens of the continuation, summed."""
    start = tokenizer(prompt, return_tensors="pt").input_ids
    # No beginning of a text in the middle of one.
    rest = tokenizer(continuation, return_tensors="pt", add_special_tokens=False).input_ids
    input_ids = torch.cat([start, rest], dim=1).to(model.device)
    log_probs = model(input_ids=input_ids).logits[0, start.shape[1] - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(1, rest[0, :, None].to(model.device)).sum().item()


def main() -> None:
    args = parse_arguments()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        base: Any = AutoModelForCausalLM.from_pretrained(args.model).eval()
        vectors = extract_vectors(base, tokenizer, PAIRS, method=args.method, layers_to_transform=args.layers)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model, --method or --layers: {error}") from None
    model = from_vectors(vectors, base)
    model.save_pretrained(str(args.output_dir))

    norms = [vector.norm().item() for vector in vectors.values()]
    print(f"{len(vectors)} vectors of norm {min(norms):.1f} to {max(norms):.1f} from {len(PAIRS)} pairs\n")
    print("| scale | log-probability, happy | sad | difference | writes |\n|---|---|---|---|---|")
    for scale in args.scales:
        model.set_scale("default", scale)
        happy, sad = (
            sum(log_probability(model, tokenizer, row[0], row[side]) for row in HELD_OUT) / len(HELD_OUT)
            for side in (1, 2)
        )
        inputs = tokenizer(HELD_OUT[0][0], return_tensors="pt").to(base.device)
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        print(f"| {scale:g} | {happy:.2f} | {sad:.2f} | {happy - sad:+.2f} | {text!r} |")
    print(f"\nadapter in {args.output_dir}")


if __name__ == "__main__":
    main()
