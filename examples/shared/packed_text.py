"""Text for a language model: read, tokenized, and packed into rows whose documents do not see one another."""

import random
from pathlib import Path

import torch
from plays import PLAYS, find_plays
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


DEMO_MODEL = Path("outputs/SmolLM2-135M-Instruct")


def add_text_options(parser):
    tokenizer = str(DEMO_MODEL) if DEMO_MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    parser.add_argument(
        "--tokenizer", default=tokenizer, help=f"hub id or folder of a tokenizer (default: {tokenizer})"
    )
    parser.add_argument("--train_tokenizer", type=int, metavar="N", help="train one with N tokens on the text instead")
    parser.add_argument("--text_files", nargs="+", type=Path, help="text files to read instead of the demo's plays")
    parser.add_argument("--dataset", help="hub id of a dataset with a column `text`, read as a stream")


def check_text_options(parser, arguments):
    if arguments.train_tokenizer is not None and arguments.train_tokenizer < 257:
        parser.error(
            f"--train_tokenizer needs at least 257 tokens, all bytes and one more, got {arguments.train_tokenizer}"
        )


def read_texts(arguments, seed=0):
    """Documents to train on, with a name for them."""
    if arguments.dataset:
        import datasets

        rows = datasets.load_dataset(arguments.dataset, split="train", streaming=True)
        return (row["text"] for row in rows), arguments.dataset
    files, name = (arguments.text_files, "text files") if arguments.text_files else (find_plays(), PLAYS)
    texts = read_files(files, "--text_files")
    random.Random(seed).shuffle(texts)
    return texts, name


def read_files(files, option):
    """What is in the text files; the option is what gave them."""
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        why = "which are folders" if all(map(Path.is_dir, map(Path, missing))) else "which do not exist"
        raise SystemExit(f"{option}: expected files, got {', '.join(missing)}, {why}")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise SystemExit(f"{option}: expected text in UTF-8, got {file} ({error}); iconv converts it") from None
    return texts


def make_tokenizer(arguments, texts):
    """The tokenizer, and the texts: a stream is read into memory where a tokenizer is trained on it."""
    if arguments.train_tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"--tokenizer: expected a hub id or a folder with a tokenizer, got {arguments.tokenizer!r} ({error})"
            ) from None
        if tokenizer.eos_token_id is None:
            raise SystemExit(
                "--tokenizer: expected one with an eos_token, which ends each document, got none in "
                f"{arguments.tokenizer!r}; choose another or train one with --train_tokenizer"
            )
        return tokenizer, texts
    if arguments.dataset:
        texts = [text for text, _ in zip(texts, range(10_000))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.train_tokenizer,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ), texts


def make_blocks(arguments, tokenizer, texts, *, wanted=None, seed=0):
    """Shuffled rows of packed documents, `seq_len` tokens each: those to train on and those held out."""
    held_out = arguments.eval_tokens // arguments.seq_len
    if wanted is None:
        wanted = 2 * (arguments.max_steps * arguments.batch_size + held_out) * arguments.seq_len
    tokens, positions = [], []
    for text in texts:
        document = [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        tokens += document
        # A position of 0 is where a document starts: layers look no further back.
        positions += range(len(document))
        if len(tokens) >= wanted:
            break
    rows = len(tokens) // arguments.seq_len
    if rows < held_out + arguments.batch_size:
        raise SystemExit(
            f"the text gave {len(tokens)} tokens: expected at least --eval_tokens {arguments.eval_tokens} plus one batch of "
            f"{arguments.batch_size * arguments.seq_len}; give more text or lower these"
        )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    input_ids, position_ids = (
        torch.tensor(numbers[: rows * arguments.seq_len]).view(rows, arguments.seq_len)[order]
        for numbers in (tokens, positions)
    )
    # The first token of a document cannot be foretold from the document before.
    labels = input_ids.masked_fill(position_ids == 0, -100)
    columns = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return tuple(
        {name: column[rows] for name, column in columns.items()} for rows in (slice(held_out, None), slice(held_out))
    )
