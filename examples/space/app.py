# /// script
# dependencies = ["peft_bias_steer", "hf_hierarchical_sae", "gradio"]
# ///
"""
A page on loopback: a chat with and without an adapter, side by side, and an autoencoder's latents on a sentence:

    python examples/space/app.py --adapters outputs/steer/adapter --sae outputs/sae

Everything is a folder or a Hub id. A Space, which gives no options, sets the variables MODEL, ADAPTERS (with spaces between
them) and SAE instead. GRADIO_SERVER_PORT chooses another port.
"""

import argparse
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hf_hierarchical_sae import HierarchicalSaeModel, LatentActivations, read_latents
from peft_bias_steer import extract_vectors, from_vectors


DEMO_MODEL, DEMO_ADAPTER, DEMO_SAE = (Path("outputs", name) for name in ("SmolLM2-135M-Instruct", "steer", "sae"))
# for an adapter without training
MOODS = [("happy", "sad"), ("delighted", "miserable"), ("cheerful", "depressed"), ("joyful", "gloomy")]
PAIRS = [
    {
        "positive": f"I thought about {topic} and I felt {happy}",
        "negative": f"I thought about {topic} and I felt {sad}",
    }
    for topic in ("the weather", "my day at work", "the food", "our neighbours", "the film", "the party")
    for happy, sad in MOODS
]
LONGEST_SENTENCE = 128
NO_SAE = "There is no autoencoder to look at: `make demo-sae` trains one, and `--sae` takes a folder or a Hub id."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, variables = parser.add_argument, os.environ
    model = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    adapters = variables.get("ADAPTERS", "").split() or ([str(DEMO_ADAPTER)] if DEMO_ADAPTER.exists() else [])
    sae = variables.get("SAE") or (str(DEMO_SAE) if (DEMO_SAE / "config.json").exists() else None)
    add("--model", default=variables.get("MODEL", model), help="the language model (%(default)s)")
    add(
        "--adapters",
        nargs="+",
        default=adapters,
        help="folders, searched for adapters, or Hub ids (default: one is made)",
    )
    add("--sae", default=sae, help="autoencoder of a layer of this model (default: outputs/sae if it is there)")
    add("--max_new_tokens", type=int, default=100, help="tokens of an answer (%(default)s)")
    return parser.parse_args()


def find_adapters(places: list[str]) -> list[str]:
    """Each folder with an adapter in these folders, checkpoints of a training left out, and Hub ids as they are."""
    found = []
    for place in places:
        configs = sorted(Path(place).rglob("adapter_config.json"))
        folders = [str(path.parent) for path in configs if "checkpoint-" not in str(path)]
        if Path(place).is_dir() and not folders:
            raise SystemExit(
                f"--adapters: expected a folder with an adapter_config.json in it, got {place}, without one"
            )
        found += folders or [place]
    return found


def load(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, str], Any]:
    """The model with all adapters, its tokenizer, the adapters' names in it by what the page calls them, the autoencoder."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
        base: Any = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: expected a folder or a Hub id, got {arguments.model!r}: {error}") from None
    most = base.config.get_text_config().max_position_embeddings - 1
    if not 1 <= arguments.max_new_tokens <= most:
        raise SystemExit(f"--max_new_tokens must be in [1, {most}] for this model, got {arguments.max_new_tokens}")
    model: Any = None
    names = {place: f"adapter_{i}" for i, place in enumerate(find_adapters(arguments.adapters))}
    for place, name in names.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, place, adapter_name=name)
            else:
                model.load_adapter(place, adapter_name=name)
        except (OSError, ValueError, RuntimeError) as error:
            raise SystemExit(f"--adapters: {place!r} does not load on {arguments.model!r}: {error}") from None
    if model is None:
        layer = 3 * base.config.get_text_config().num_hidden_layers // 5
        model = from_vectors(extract_vectors(base, tokenizer, PAIRS, layers_to_transform=[layer]), base, "adapter_0")
        names = {"happy (made at the start, from pairs of sentences)": "adapter_0"}
    try:
        sae = AutoModel.from_pretrained(arguments.sae).eval() if arguments.sae else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"--sae: expected a folder or a Hub id, got {arguments.sae!r}: {error}") from None
    if sae is not None and not isinstance(sae, HierarchicalSaeModel):
        raise SystemExit(f"--sae: expected an autoencoder of hf_hierarchical_sae, got a {type(sae).__name__}")
    return model.eval(), tokenizer, names, sae


class Chat:
    """Answers of the model and of the steered model to the same question, each after its own earlier answers."""

    def __init__(self, model: Any, tokenizer: Any, names: dict[str, str], max_new_tokens: int):
        self.model, self.tokenizer, self.names, self.max_new_tokens = model, tokenizer, names, max_new_tokens
        self.pool = ThreadPoolExecutor()

    def ask(self, question: str, plain: list, steered: list, adapter: str, strength: float) -> Iterator[tuple]:
        """What is in the box of the question, both chats and a notice, anew at every token."""
        notice = refusal(strength) if question.strip() else "Type a question first: there is none to answer."
        if notice:
            yield question, plain, steered, notice
            return
        asked = {"role": "user", "content": question}
        yield from self.answer([*plain, asked], [*steered, asked], adapter, strength, left=question)

    def steer_again(self, question: str, plain: list, steered: list, adapter: str, strength: float) -> Iterator[tuple]:
        """The last answer of the steered model, anew with this adapter and strength; the other chat stays."""
        notice = refusal(strength)
        if steered and not notice:
            yield from self.answer(None, steered[:-1], adapter, strength, left="", shown=plain, draft=question)
        else:
            yield question, plain, steered, notice

    def answer(
        self,
        plain: list | None,
        steered: list,
        adapter: str,
        strength: float,
        *,
        left: str,
        shown: Any = None,
        draft: str = "",
    ) -> Iterator[tuple]:
        chats = [chat for chat in (plain, steered) if chat is not None]
        inputs = [self.encode(chat) for chat in chats]
        longest = self.model.config.get_text_config().max_position_embeddings - self.max_new_tokens
        tokens = max(each["input_ids"].shape[1] for each in inputs)
        if tokens > longest:
            notice = f"That is too long: the chat would have {tokens:,} tokens, and there is room for {longest:,}. Clear it."
            yield left, shown if plain is None else plain[:-1], steered[:-1], notice
            return
        given_up = Event()
        streams = [TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in chats]
        choices = [None, (self.names[adapter], strength)][-len(chats) :]
        runs = [self.pool.submit(self.generate, *each, given_up) for each in zip(inputs, streams, choices)]
        texts = ["" for _ in chats]
        try:
            for pieces in zip_longest(*streams, fillvalue=""):
                texts = [text + piece for text, piece in zip(texts, pieces)]
                done = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, texts)]
                yield draft, shown if plain is None else done[0], done[-1], ""
            for run in runs:
                run.result()
        finally:
            # a page that was closed in between wants no more of it
            given_up.set()

    def encode(self, chat: list) -> Any:
        messages = [{"role": each["role"], "content": text_of(each["content"])} for each in chat]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self.model.device)

    def generate(
        self, inputs: Any, streamer: TextIteratorStreamer, choice: tuple[str, float] | None, given_up: Event
    ) -> None:
        """In a thread of its own: the adapter and its scale, or none, are those of this thread alone."""

        def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], given_up.is_set(), device=input_ids.device)

        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        # whatever fails, the page waits for an end of the stream
        try:
            if choice is not None:
                self.model.set_scale(*choice)
                options["adapter_names"] = [choice[0]]
            with self.model.disable_adapter() if choice is None else nullcontext():
                self.model.generate(
                    **inputs, **options, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop])
                )
        finally:
            streamer.end()


def refusal(strength: Any) -> str:
    """What is said of a strength that is no finite number, as an emptied box gives it; nothing of others."""
    if isinstance(strength, int | float) and math.isfinite(strength):
        return ""
    return f"The strength of the adapter must be a finite number, got {strength}: move the slider."


def text_of(content: Any) -> str:
    """Of a message as the page gives it back, a text or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Latents:
    """Where an autoencoder's latents fire on a sentence, at any budget."""

    def __init__(self, model: Any, tokenizer: Any, sae: HierarchicalSaeModel):
        self.model, self.tokenizer, self.sae = model, tokenizer, sae

    def read(self, sentence: str) -> tuple[LatentActivations | None, str]:
        tokens = len(self.tokenizer(sentence)["input_ids"])
        if tokens < 2:
            return None, "Type a sentence first: latents are read from the second token on."
        if tokens > LONGEST_SENTENCE:
            return None, f"That is too long: {tokens:,} tokens, and {LONGEST_SENTENCE} are read at most. Shorten it."
        with self.model.disable_adapter():
            base = self.model.get_base_model()
            try:
                found = read_latents(self.sae, base, self.tokenizer, [sentence], show_progress=False)
            except ValueError as error:
                return None, f"The autoencoder does not fit: {error}"
        return found, ""

    def table(self, found: LatentActivations | None, budget: int) -> list[list[str]]:
        """A row for each token that was read: the token, and its latents, the strongest first."""
        if found is None:
            return []
        cells: dict[int, list[str]] = {}
        used = found.ranks <= budget
        for position, _, latent, value in sorted(
            zip(*(part[used].tolist() for part in (found.positions, found.ranks, found.entry_latents, found.values)))
        ):
            cells.setdefault(position, []).append(f"{latent} ({value:.2g})")
        return [[self.words(found)[position], ", ".join(row)] for position, row in cells.items()]

    def strongest(self, found: LatentActivations | None, budget: int, shown: int = 50) -> list[str]:
        """Latents that fire at this budget, by their sum over the sentence."""
        if found is None:
            return []
        used = found.ranks <= budget
        latents, places = found.entry_latents[used].unique(return_inverse=True)
        sums = torch.zeros(len(latents)).index_add_(0, places, found.values[used])
        return [str(latent) for latent in latents[sums.argsort(descending=True)[:shown]].tolist()]

    def coloured(
        self, found: LatentActivations | None, budget: int, latent: str | None
    ) -> list[tuple[str, float | None]]:
        """Each token with the latent's activation relative to the largest on the sentence, or `None` where it has none."""
        if found is None or not latent:
            return []
        positions, values, ranks = found.latent(int(latent))
        most = values.max().item()
        shades = {p: v / most for p, v, r in zip(positions.tolist(), values.tolist(), ranks.tolist()) if r <= budget}
        return [(word, shades.get(place)) for place, word in enumerate(self.words(found))]

    def words(self, found: LatentActivations) -> list[str]:
        return [self.tokenizer.decode([token]) for token in found.token_ids.tolist()]


def build_page(chat: Chat, latents: Latents | None, title: str) -> Any:
    import gradio as gr

    with gr.Blocks(title="Steering vectors and latents", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}, steered and read")
        with gr.Tab("Steering"):
            with gr.Row():
                adapter = gr.Dropdown(list(chat.names), label="Adapter", elem_id="adapter", interactive=True)
                strength = gr.Slider(-2, 2, 1, step=0.1, label="Strength of the adapter", elem_id="strength")
            with gr.Row():
                plain = gr.Chatbot(label="The model", elem_id="plain", height=320, buttons=[])
                steered = gr.Chatbot(label="With the adapter", elem_id="steered", height=320, buttons=[])
            question = gr.Textbox(label="Question", elem_id="question", max_lines=4, placeholder="Enter sends it")
            with gr.Row():
                send = gr.Button("Answer", variant="primary", elem_id="send")
                clear = gr.Button("Clear both chats", elem_id="clear")
            notice = gr.Markdown(elem_id="notice")
            inputs, outputs = [question, plain, steered, adapter, strength], [question, plain, steered, notice]
            gr.on([send.click, question.submit], chat.ask, inputs, outputs, concurrency_limit=2)
            gr.on(
                [strength.release, adapter.input],
                chat.steer_again,
                inputs,
                outputs,
                trigger_mode="always_last",
                concurrency_limit=2,
            )
            clear.click(lambda: ("", [], [], ""), None, outputs)
        with gr.Tab("Latents"):
            if latents is None:
                gr.Markdown(NO_SAE, elem_id="latents-notice")
            else:
                build_latents(gr, latents)
    return page


def build_latents(gr: Any, latents: Latents) -> None:
    config, found = latents.sae.config, gr.State()
    most = config.k if config.has_budgets else 64
    sentence = gr.Textbox("The cat sat on the mat, and the dog looked on.", label="Sentence", elem_id="sentence")
    with gr.Row():
        budget = gr.Slider(1, most, min(8, most), step=1, label="Budget: latents per token", elem_id="budget")
        latent = gr.Dropdown([], label="Latent that colours the tokens", elem_id="latent", interactive=True)
    read = gr.Button("Read the sentence", variant="primary", elem_id="read")
    notice = gr.Markdown(elem_id="latents-notice")
    tokens = gr.HighlightedText(label="Where this latent fires", elem_id="tokens", interactive=False)
    table = gr.Dataframe(
        headers=["token", "latents (activation), the strongest first"],
        label="Latents of each token",
        elem_id="table",
        interactive=False,
        wrap=True,
    )

    def show(found: LatentActivations | None, budget: int, chosen: str | None) -> tuple:
        choices = latents.strongest(found, budget)
        chosen = chosen if chosen in choices else next(iter(choices), None)
        return (
            gr.update(choices=choices, value=chosen),
            latents.coloured(found, budget, chosen),
            latents.table(found, budget),
        )

    def read_and_show(sentence: str, budget: int) -> tuple:
        found, notice = latents.read(sentence)
        return found, notice, *show(found, budget, None)

    shown = [latent, tokens, table]
    gr.on([read.click, sentence.submit], read_and_show, [sentence, budget], [found, notice, *shown])
    gr.on([budget.change, latent.input], show, [found, budget, latent], shown, trigger_mode="always_last")


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer, names, sae = load(arguments)
    chat = Chat(model, tokenizer, names, arguments.max_new_tokens)
    latents = Latents(model, tokenizer, sae) if sae is not None else None
    page = build_page(chat, latents, Path(arguments.model).name)
    # without fonts from another site
    from gradio.themes import Base

    page.launch(theme=Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), footer_links=[], ssr_mode=False)


if __name__ == "__main__":
    main()
