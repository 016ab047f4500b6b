"""The example that makes a ReBased model of a Llama, with a tiny one."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_based_kernel import RebasedForCausalLM
from tests.example_module import Killed, kill_while_writing, load_example


@pytest.fixture(scope="module")
def example():
    return load_example("hf_based_kernel/convert_llama.py")


@pytest.fixture(scope="module")
def study():
    return load_example("studies/compare_conversions.py")


@pytest.fixture(scope="module")
def measures():
    return importlib.import_module("conversions")


@pytest.fixture
def teacher(tmp_path, tiny_language_model):
    """A folder with a Llama of three layers and a tokenizer, and text files."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    for i in range(4):
        (tmp_path / f"text{i}.txt").write_text(
            " ".join(f"word{(i * 7 + j * j) % 50}{' to be.' * (j % 5 == 4)}" for j in range(400))
        )
    return tmp_path


def run(example, monkeypatch, folder, *options):
    texts = [str(path) for path in sorted(folder.glob("*.txt"))]
    given = ["--model", str(folder / "teacher"), "--text_files", *texts, "--output_dir", str(folder / "out")]
    sizes = ["--seq_len", "16", "--eval_texts", "2", "--transfer_steps", "12", "--distill_steps", "4"]
    monkeypatch.setattr(sys, "argv", ["convert_llama.py", *given, *sizes, *options])
    example.main()


def test_a_llama_becomes_a_rebased_model(example, teacher, monkeypatch, capsys):
    run(example, monkeypatch, teacher, "--window", "0", "--distill", "lora", "--replace", "2")

    curve = json.loads((teacher / "out" / "transfer.json").read_text())
    assert curve[-1][1] < curve[0][1]
    model = AutoModelForCausalLM.from_pretrained(teacher / "out" / "2")
    assert isinstance(model, RebasedForCausalLM)
    harm = json.loads((teacher / "out" / "order.json").read_text())
    worst = max(harm["text"], key=lambda i: harm["text"][i] + harm["copying"][i])
    kinds = ["full_attention" if str(i) == worst else "linear_attention" for i in range(3)]
    assert model.config.layer_types == kinds
    assert "Left of it: the same next token for" in capsys.readouterr().out


def test_a_run_that_is_killed_while_it_writes_goes_on(example, teacher, monkeypatch):
    options, save_file = ("--window", "0", "--replace", "1"), example.save_file
    save_pretrained = RebasedForCausalLM.save_pretrained

    def save_half(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        raise Killed

    def save_half_of_the_model(model, folder, **kwargs):
        # Checkpoints are Trainer's matter.
        if "checkpoint" in str(folder):
            return save_pretrained(model, folder, **kwargs)
        model.config.save_pretrained(folder)
        raise Killed

    for kill in (
        lambda patch: kill_while_writing("settings.json", patch),
        lambda patch: patch.setattr(example, "save_file", save_half),
        lambda patch: kill_while_writing("order.json", patch),
        lambda patch: patch.setattr(RebasedForCausalLM, "save_pretrained", save_half_of_the_model),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill(patch)
            run(example, patch, teacher, *options)
    run(example, monkeypatch, teacher, *options)

    assert isinstance(AutoModelForCausalLM.from_pretrained(teacher / "out" / "1"), RebasedForCausalLM)
    assert AutoTokenizer.from_pretrained(teacher / "out" / "1").eos_token
    assert not list((teacher / "out").glob("*.unfinished"))


def test_more_and_more_layers_are_measured(study, teacher, monkeypatch):
    run(study, monkeypatch, teacher, "--window", "4", "--replace", "3", "1")
    results = json.loads((teacher / "out" / "results.json").read_text())

    assert [result["replaced"] for result in results] == [0, 1, 3]
    assert results[0]["kl"][0] < 1e-6 and results[0]["agreement"][0] == 1.0
    assert all(result["window only, kl"][0] > 0 and result["answer"] for result in results[1:])
    curves = json.loads((teacher / "out" / "after_transfer_4.json").read_text())
    assert [len(curve) for curve in curves.values()] == [3, 3]
    arguments = study.parse_arguments()
    original, tokenizer = study.example.load_teacher(arguments, "cpu")
    rows, texts, *_ = study.read_rows(arguments, tokenizer, arguments.long_rows)
    weights = study.example.transfer(arguments, original, rows)
    order = study.example.order_layers(arguments, original, weights, rows)
    for number in (1, 3):
        model = study.example.replaced(arguments, original, weights, order[:number])
        kl = study.fidelity(model, original, texts[:2, : arguments.seq_len], arguments.window)["kl"]
        assert curves[""][number - 1] == pytest.approx(torch.stack(kl).mean().item(), rel=1e-3)
    table = (teacher / "out" / "results.md").read_text()
    assert "| 3 |" in table and "| 3, window only |" in table
    assert (teacher / "out" / "conversion.png").exists()
    # What is there is not done again.
    monkeypatch.setattr(study.example, "train", None)
    (teacher / "out" / "after_transfer_4.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_while_writing("after_transfer_4.json", patch)
        run(study, patch, teacher, "--window", "4", "--replace", "3")
    with pytest.raises(SystemExit, match="holds results with .*: give another --output_dir, or delete it"):
        run(study, monkeypatch, teacher, "--window", "5", "--replace", "3", "1")
    run(study, monkeypatch, teacher, "--window", "4", "--replace", "3")
    assert json.loads((teacher / "out" / "results.json").read_text()) == [results[0], results[2]]


def test_no_text_that_was_trained_on_is_measured(study, teacher, monkeypatch):
    def train(*given):
        (teacher / "out" / "begun").touch()
        raise Killed

    text = teacher / "text2.txt"  # the first one in the order of seed 0
    text.write_text(text.read_text()[:800])
    monkeypatch.setattr(study.example, "train", train)
    for module, options in ((study, ["--long_rows", "2"]), (study, ["--long_rows", "3"]), (study.example, [])):
        with pytest.raises(Killed):
            run(module, monkeypatch, teacher, "--window", "4", "--replace", "1", *options)
    with pytest.raises(SystemExit, match=r"holds results with held_out_texts \[0, 1\] and not \[1, 2\]: give another"):
        run(study, monkeypatch, teacher, "--window", "4", "--replace", "1", "--long_rows", "60")


def test_a_rate_of_stage_2_is_taken_and_is_part_of_what_was_begun(study, teacher, monkeypatch):
    rates, train = [], study.example.train
    monkeypatch.setattr(study.example, "train", lambda *given: rates.append(given[6]) or train(*given))
    options = ("--window", "0", "--replace", "1")
    run(study, monkeypatch, teacher, *options, "--learning_rate", "7e-5")

    assert rates == [study.example.TRANSFER_RATE, 7e-5]
    with pytest.raises(SystemExit, match="holds results with "):
        run(study, monkeypatch, teacher, *options)


def test_text_of_another_kind_is_measured_too(study, teacher, monkeypatch):
    other = [teacher / f"other{i}.md" for i in range(3)]
    for i, path in enumerate(other):
        path.write_text(" ".join(f"thing{(i + j) % 9}" for j in range((1, 60, 90)[i])))
    options = ["--window", "4", "--replace", "2", "--long_rows", "1", "--other_files", *map(str, other)]
    run(study, monkeypatch, teacher, *options)
    *_, result = json.loads((teacher / "out" / "results.json").read_text())

    original = AutoModelForCausalLM.from_pretrained(teacher / "teacher")
    model = AutoModelForCausalLM.from_pretrained(teacher / "out" / "2")
    tokenizer = AutoTokenizer.from_pretrained(teacher / "teacher")
    found = []
    for path in other[1:]:  # the first has no row of 16 tokens
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        first = len(ids) // 16 // 2 * 16
        row = torch.tensor([ids[first : first + 16]])
        with torch.no_grad():
            expected, log_probs = (m(row).logits[0, :-1].log_softmax(-1) for m in (original, model))
        found.append((expected.exp() * (expected - log_probs)).sum(-1).mean().item())
    assert result["other"]["kl"][0] == pytest.approx(sum(found) / 2, rel=1e-3)
    assert "copying" in result and "copying" not in result["other"]
    table = (teacher / "out" / "results.md").read_text().split("On 2 texts of another kind:")[1]
    assert "| 2 |" in table and "| 2, window only |" in table
    # A row of training, told apart
    assert len(result["kl_by_stretch"]) == 4
    assert "KL at tokens 1 – 4 | 5 – 8 | 9 – 12 | 13 – 16 |" in table

    with pytest.raises(SystemExit, match="--other_files: expected two texts of --seq_len 16 tokens, got 1"):
        run(study, monkeypatch, teacher, *options[:-1])


@pytest.mark.slow
def test_lm_eval_scores_last_words_of_sentences(study, teacher, monkeypatch):
    run(
        study,
        monkeypatch,
        teacher,
        "--window",
        "4",
        "--replace",
        "2",
        "--lm_eval",
        "--long_rows",
        "2",
        "--seq_len",
        "40",
    )
    results = json.loads((teacher / "out" / "results.json").read_text())
    documents = [json.loads(line) for line in (teacher / "out" / "tasks" / "last_word.jsonl").read_text().splitlines()]

    assert documents and all(document["word"] == "be" and document["text"].endswith(" to") for document in documents)
    tokenizer = AutoTokenizer.from_pretrained(teacher / "teacher")
    for result, folder in zip(results, ("teacher", "out/2")):
        model = AutoModelForCausalLM.from_pretrained(teacher / folder).eval()
        total, right = 0.0, 0
        for document in documents:
            length = len(tokenizer(document["text"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{document['text']} {document['word']}")["input_ids"]])
            with torch.no_grad():
                log_probs = model(ids).logits[0, length - 1 : -1].log_softmax(-1)
            total += log_probs.gather(1, ids[0, length:, None]).sum().item()
            right += torch.equal(log_probs.argmax(-1), ids[0, length:])
        assert result["lm_eval"]["perplexity"] == pytest.approx(math.exp(-total / len(documents)), rel=1e-3)
        assert result["lm_eval"]["accuracy"] == pytest.approx(right / len(documents))
    assert "| 2 | " in (teacher / "out" / "results.md").read_text().split("last words right")[1]


@torch.no_grad()
def test_divergence_along_a_text_is_that_of_its_stretches(example, measures):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()
    model = RebasedForCausalLM.from_llama(teacher, [0], linear_attention_window=4)
    texts = torch.randint(50, (2, 12))

    found = measures.divergence_by_stretch(model, teacher, texts, 5)
    expected, log_probs = (m(texts).logits[:, :-1].log_softmax(-1) for m in (teacher, model))
    each = (expected.exp() * (expected - log_probs)).sum(-1)
    for stretch, (start, stop) in zip(found, ((0, 5), (5, 10), (10, 11)), strict=True):
        torch.testing.assert_close(torch.stack(stretch), each[:, start:stop].mean(-1))


@torch.no_grad()
def test_a_layer_in_place_of_the_teachers_is_the_replaced_model(example, measures):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()
    every = RebasedForCausalLM.from_llama(teacher, range(3), linear_attention_window=4)
    some = RebasedForCausalLM.from_llama(teacher, [0, 2], linear_attention_window=4)
    for i in (0, 2):
        some.model.layers[i].self_attn.load_state_dict(every.model.layers[i].self_attn.state_dict())
    row = torch.randint(50, (1, 14))
    before = teacher(row).logits
    module = measures.AttentionTransfer(teacher, every)
    with module.in_place_of([0, 2]):
        torch.testing.assert_close(teacher(row).logits, some(row).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(teacher(row).logits, before)

    expected, log_probs = (logits[0, :-1].log_softmax(-1) for logits in (before, some(row).logits))
    each = (expected.exp() * (expected - log_probs)).sum(-1)
    for last, wanted in ((None, each), (5, each[-5:])):
        found = list(module.divergences(row, [[0, 2], []], last))
        assert found == pytest.approx([wanted.mean().item(), 0.0], rel=1e-3, abs=1e-6)


def test_a_random_sequence_comes_twice(example, measures):
    tokens = measures.repeated_tokens(1000, 3, seed=1)

    assert tokens.shape == (3, 2 * measures.COPIED) and torch.equal(*tokens.split(measures.COPIED, 1))
    assert len(tokens[:, : measures.COPIED].unique()) > 200
    assert not torch.equal(tokens, measures.repeated_tokens(1000, 3, seed=0))


def test_rows_must_reach_beyond_the_window(example, teacher, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(example, monkeypatch, teacher, "--window", "15")
    assert "--seq_len must be at least 17, got 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--replace", "4"), "--replace: expected 1 to 3, the layers of the model, got 4"),
        (("--replace", "0"), "--replace: expected 1 to 3, the layers of the model, got 0"),
        (
            ("--seq_len", "5000"),
            "texts of 5000 tokens for --eval_texts 2, and 0 rows besides of --seq_len 5000 tokens",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(example, teacher, monkeypatch, options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(example, monkeypatch, teacher, "--window", "4", *options)
    assert not (teacher / "out").exists(), "nothing was begun that the right options would be held against"


def test_recall_hits_end_a_pair_of_before_beyond_the_window(example, measures):
    row = torch.tensor([5, 6, 1, 2, 3, 5, 6, 5, 6])

    #                    6 1 2 3 5 6 5 6
    assert measures.recall_hits(row, 1).int().tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert measures.recall_hits(row, 4).int().tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@torch.no_grad()
def test_window_only_is_the_model_without_its_linear_part(example, measures):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = RebasedForCausalLM.from_llama(LlamaForCausalLM(config).eval(), [0], linear_attention_window=4)
    row = torch.randint(50, (12,))
    before = model(row[None]).logits
    with measures.window_only(model):
        seen = model(row[None]).logits[0, -1]
        row[7] += 1
        assert torch.equal(model(row[None]).logits[0, -1], seen)
        row[8] += 1
        assert not torch.equal(model(row[None]).logits[0, -1], seen)
    row[7:9] -= 1
    assert torch.equal(model(row[None]).logits, before)
