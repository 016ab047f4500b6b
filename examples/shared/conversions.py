"""A Llama whose attention is replaced: what is learned of it, and how much of it is left."""

from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from interrupts import StopOnInterrupt, last_checkpoint, train_from
from packed_text import read_files, read_texts
from torch.utils.data import StackDataset
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_based_kernel.llama_rebased import recorded_attention
from hf_based_kernel.window_attention_rebased import make_window_mask


# Tokens of a random sequence that has to be repeated, and how many sequences.
COPIED, COPIES = 96, 16


class AttentionTransfer(torch.nn.Module):
    """The replaced layers of a model, each learning what its teacher layer gives for the teacher's own inputs."""

    def __init__(self, teacher, model):
        super().__init__()
        # A tuple hides it: its weights are not part of this module's.
        self.teacher = (teacher,)
        self.mixers = torch.nn.ModuleList(layer.self_attn for layer in model.model.layers)
        self.window = model.config.linear_attention_window
        for name, parameter in self.mixers.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("_map.", "window_gate.")))

    def forward(self, input_ids):
        """The sum over layers of a token's squared error, relative to the square of what is to be learned."""
        with torch.no_grad(), recorded_attention(self.teacher[0], range(len(self.mixers))) as calls:
            self.teacher[0].get_decoder()(input_ids, use_cache=False)
        losses = []
        for i, call in calls.items():
            out = self.attend(i, call.hidden_states, call.position_embeddings)
            # Some tokens have outputs a thousand times larger than others: each counts by its own size.
            losses.append(((out - call.output).square().sum(-1) / call.output.square().sum(-1)).mean())
        return {"loss": torch.stack(losses).sum()}

    def attend(self, i, hidden_states, position_embeddings):
        sizes = {"seen_tokens": 0, "first_tokens": None, "attention_mask": None, "device": hidden_states.device}
        mask = make_window_mask(self.window, hidden_states.shape[1], **sizes) if self.window else None
        return self.mixers[i](hidden_states, position_embeddings=position_embeddings, window_mask=mask)

    @contextmanager
    def in_place_of(self, layers):
        """These layers of the teacher give what their replacements do, while the context is open."""

        def replace(i, call):
            return self.attend(i, call["hidden_states"], call["position_embeddings"]), None

        handles = [
            self.teacher[0]
            .get_decoder()
            .layers[i]
            .self_attn.register_forward_hook(
                lambda module, args, call, output, i=i: replace(i, call), with_kwargs=True
            )
            for i in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def divergences(self, texts, choices, last=None):
        """
        For each choice of layers, KL of the teacher's next token from its own with these replaced, nats a token, over the texts'
        `last` tokens (all); texts: (texts, seq)
        """
        texts, first = texts.to(self.teacher[0].device), 0 if last is None else -last
        expected = [log_probabilities(self.teacher[0], row)[first:] for row in texts]
        for layers in choices:
            with self.in_place_of(layers):
                found = [log_probabilities(self.teacher[0], row)[first:] for row in texts]
            yield torch.stack([divergence(*pair) for pair in zip(found, expected)]).mean().item()


class DistillationTrainer(Trainer):
    """Stock `Trainer` with KL(teacher ‖ model) of the next token as the loss."""

    teacher: Any = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            expected = self.teacher(**inputs, use_cache=False).logits.log_softmax(-1)
        outputs = model(**inputs, use_cache=False)
        loss = divergence(outputs.logits.log_softmax(-1).flatten(0, 1), expected.flatten(0, 1))
        return (loss, outputs) if return_outputs else loss


@contextmanager
def window_only(model: torch.nn.Module) -> Generator[None]:
    """The model without the linear part of its replaced layers: what is left is softmax over their window."""
    gates = [module for name, module in model.named_modules() if name.endswith("window_gate")]
    kept = [(gate.weight.data, gate.bias.data) for gate in gates]
    for gate in gates:
        gate.weight.data, gate.bias.data = torch.zeros_like(gate.weight), torch.full_like(gate.bias, torch.inf)
    try:
        yield
    finally:
        for gate, (weight, bias) in zip(gates, kept):
            gate.weight.data, gate.bias.data = weight, bias


def recall_hits(row: torch.Tensor, window: int) -> torch.Tensor:
    """
    (seq) -> (seq - 1) bool: whether a token ends a pair of tokens that was in the row before, and last more than `window`
    tokens ago, so that it has to be recalled (the hits of associative recall of arXiv 2312.04927, beyond the window).
    """
    pairs = row[:-1] * 2**32 + row[1:]
    same = (pairs[:, None] == pairs).tril(-1)
    distance = torch.arange(len(pairs))[:, None] - torch.arange(len(pairs))
    return same.any(1) & ~(same & (distance <= window)).any(1)


def variants_of(model: torch.nn.Module, windows_alone: bool) -> dict[str, Callable]:
    """Name → context in which the model is measured: as it is, and if asked with nothing but its windows."""
    return {"": nullcontext, **({"window only, ": partial(window_only, model)} if windows_alone else {})}


@torch.no_grad()
def fidelity(
    model: Any, teacher: Any, texts: torch.Tensor, window: int, *, windows_alone: bool = False
) -> dict[str, list[torch.Tensor]]:
    """
    texts: (texts, seq)

    Returns:
        For each text: `perplexity`, `kl` (of the teacher's next token from the model's, nats), `agreement` (share of tokens with
        the same most likely next token) and `recall` (share right of `recall_hits`; not a number without any). With
        `windows_alone`, the same once more as `window only, …`.
    """
    device, found = next(teacher.parameters()).device, defaultdict(list)
    for row in texts.to(device):
        expected = log_probabilities(teacher, row)
        hits = recall_hits(row.cpu(), window).to(device)
        for name, variant in variants_of(model, windows_alone).items():
            with variant():
                logits = log_probabilities(model, row)
            best = logits.argmax(-1)
            found[f"{name}perplexity"].append(F.nll_loss(logits, row[1:]).exp())
            found[f"{name}kl"].append(divergence(logits, expected))
            found[f"{name}agreement"].append((best == expected.argmax(-1)).float().mean())
            found[f"{name}recall"].append((best == row[1:])[hits].float().mean())
    return dict(found)


@torch.no_grad()
def copying(model: Any, *, windows_alone: bool = False) -> dict[str, list[torch.Tensor]]:
    """
    `copying`, and with `windows_alone` also `window only, copying`: for each of some random sequences, the share of its tokens
    that is foretold when it comes a second time.
    """
    found = defaultdict(list)
    for tokens in repeated_tokens(int(model.config.vocab_size), COPIES, seed=0).to(model.device):
        for name, variant in variants_of(model, windows_alone).items():
            with variant():
                best = model(tokens[None], use_cache=False, logits_to_keep=COPIED).logits[0, :-1].argmax(-1)
            found[f"{name}copying"].append((best == tokens[COPIED + 1 :]).float().mean())
    return dict(found)


def repeated_tokens(vocab_size: int, sequences: int, seed: int) -> torch.Tensor:
    """(sequences, 2 * COPIED): random tokens, and the same once more"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (sequences, COPIED), generator=generator).repeat(1, 2)


@torch.no_grad()
def divergence_by_stretch(model: Any, teacher: Any, texts: torch.Tensor, seq_len: int) -> list[list[torch.Tensor]]:
    """
    texts: (texts, tokens)

    Returns:
        For each stretch of `seq_len` tokens of the texts, after all that comes before it in its text: the KL divergence of the
        teacher's next token from the model's in each text, nats a token.
    """
    found = []
    for row in texts.to(next(teacher.parameters()).device):
        both = zip(log_probabilities(model, row).split(seq_len), log_probabilities(teacher, row).split(seq_len))
        found.append([divergence(log_probs, expected) for log_probs, expected in both])
    return [list(stretch) for stretch in zip(*found)]


def log_probabilities(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    """(seq) -> (seq - 1, vocab_size), of the next tokens"""
    return model(row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


def divergence(log_probs: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL(expected ‖ model) in nats a token; both (tokens, vocab_size), log probabilities."""
    return F.kl_div(log_probs, expected, log_target=True, reduction="batchmean")


def spread(values: list[torch.Tensor]) -> tuple[float, float]:
    """Mean, and 1.96 standard errors of it, of the numbers among the values."""
    numbers = torch.stack(values).cpu().double()
    numbers = numbers[~numbers.isnan()]
    return numbers.mean().item(), 1.96 * numbers.std().item() / len(numbers) ** 0.5


def train(arguments, trainer_class, model, rows, folder, steps, learning_rate, teacher=None):
    """Train to the end, from the last checkpoint in the folder if there is one; ends the program after a Ctrl-C."""
    training = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=arguments.seed,
        logging_steps=max(1, steps // 20),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        prediction_loss_only=True,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        # Without it, processes that torchrun starts on CPUs would each train a model of their own.
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    )
    trainer = trainer_class(
        model=model, args=training, train_dataset=StackDataset(input_ids=rows), data_collator=default_data_collator
    )
    trainer.teacher = teacher
    interrupt = StopOnInterrupt()
    trainer.add_callback(interrupt)
    train_from(trainer, last_checkpoint(folder))
    if interrupt.interrupted:
        raise SystemExit(f"Stopped at step {trainer.state.global_step} of {steps}; the same command goes on.")
    return [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]


def read_rows(arguments, tokenizer, held_out_rows=1):
    """
    Rows (rows, seq_len) to train on, so many rows in a row of each text held out, the indices of these texts, and what the text
    is called.
    """
    texts, name = read_texts(arguments, arguments.seed)
    steps = max(arguments.transfer_steps, arguments.distill_steps)
    # Several times what is needed: out of many texts, not all rows of a few.
    wanted = 8 * steps * arguments.batch_size * PartialState().num_processes
    train, held_out, indices = [], [], []
    for index, text in enumerate(texts):
        rows = split(arguments, tokenizer, text)
        if len(rows) >= held_out_rows and len(held_out) < arguments.eval_texts:
            held_out.append(middle(rows, held_out_rows))
            indices.append(index)
        else:
            train += rows
        if len(train) >= wanted:
            break
    if len(held_out) < arguments.eval_texts or not train:
        raise SystemExit(
            f"{name} has {len(held_out)} texts of {held_out_rows * arguments.seq_len} tokens for --eval_texts "
            f"{arguments.eval_texts}, and {len(train)} rows besides of --seq_len {arguments.seq_len} tokens; give more text "
            "or lower these"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(arguments.seed))
    return torch.tensor(train)[order], torch.tensor(held_out), indices, name


def read_other(arguments, tokenizer):
    """A row of seq_len tokens of each of --other_files that is long enough, or none if there are no such files."""
    if not arguments.other_files:
        return None
    texts = (split(arguments, tokenizer, text) for text in read_files(arguments.other_files, "--other_files"))
    rows = [middle(rows, 1) for rows in texts if rows]
    if len(rows) < 2:
        raise SystemExit(f"--other_files: expected two texts of --seq_len {arguments.seq_len} tokens, got {len(rows)}")
    return torch.tensor(rows)


def split(arguments, tokenizer, text):
    """The text's tokens in rows of seq_len; what is left over at its end is left out."""
    ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    return [ids[i : i + arguments.seq_len] for i in range(0, len(ids) - arguments.seq_len + 1, arguments.seq_len)]


def middle(rows, number):
    """The tokens of so many rows from the middle: the first rows of a text are often not of its kind."""
    first = (len(rows) - number + 1) // 2
    return sum(rows[first : first + number], [])


def answer(model, tokenizer, question):
    messages = [{"role": "user", "content": question}]
    if tokenizer.chat_template:
        question = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
