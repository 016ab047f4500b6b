"""The report of an adapter: its numbers against ones worked out by another way, its files, the card, bad input."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from peft_bias_steer import BiasSteerConfig, report, set_steering_vectors, steering_vectors
from peft_bias_steer.analysis import residual_ratios
from peft_bias_steer.cli import main
from peft_bias_steer.report import adapter_report, completion_log_probs, read_completions, write_report


ROWS = [
    {"prompt": "one and", "completion": " two"},
    {"prompt": "three", "completion": " is more"},
    {"text": "so it is"},
]
OTHER = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "e"}]


@pytest.fixture
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture
def model(tiny_language_model):
    torch.manual_seed(0)
    config = BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_language_model), config).eval()


@torch.no_grad()
def mean_log_prob(model, prompt_ids, completion_ids):
    """One token at a time."""
    total, ids = 0.0, list(prompt_ids)
    for token in completion_ids:
        total += model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token].item()
        ids.append(token)
    return total / len(completion_ids)


def test_log_probabilities_are_those_of_a_loop_over_the_tokens(model, tokenizer):
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    text = encode("so it is")
    expected = [
        mean_log_prob(model, encode("one and"), encode(" two")),
        mean_log_prob(model, encode("three"), encode(" is more")),
        mean_log_prob(model, text[:1], text[1:]),
    ]

    torch.testing.assert_close(
        completion_log_probs(model, tokenizer, ROWS), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


# Some templates begin an answer with a thought, and leave that out of an answered chat.
@pytest.mark.parametrize("begun", ["<assistant>", "<assistant>{think}"])
def test_messages_go_through_the_chat_template(model, tokenizer, begun):
    chats = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    tokenizer.chat_template = f"{chats}{{% if add_generation_prompt %}}{begun}{{% endif %}}"
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "you"}]}
    plain = {"prompt": "<user>hi;<assistant>", "completion": "you;"}

    chat, text = completion_log_probs(model, tokenizer, [row, plain])

    assert chat == pytest.approx(text.item())


def test_a_template_that_writes_the_prompt_otherwise_is_refused(model, tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    )
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "you"}]}

    with pytest.raises(ValueError, match="expected a chat template that begins the answered chat as its prompt"):
        completion_log_probs(model, tokenizer, [row])


def test_gains_are_differences_of_the_same_completions(model, tokenizer, capsys):
    vectors = steering_vectors(model)
    # The command line, which other tests run in this process, switches bars off.
    logging.enable_progress_bar()
    found = adapter_report(
        model,
        tokenizer,
        {"task": ROWS, "other": OTHER},
        group_size=1,
        scales=(0.0, 0.5, 1.0),
        other={0: -vectors[0]},
        show_progress=True,
    )

    with model.disable_adapter():
        base = completion_log_probs(model, tokenizer, ROWS)
    for kept, gain, error in (
        ((0, 1), found.gains["task"].mean, found.gains["task"].error),
        ((0, 1), found.scales[1.0].mean, found.scales[1.0].error),
        ((0,), found.ablation.kept[0], found.errors["kept"][0]),
        ((1,), found.ablation.left_out[0], found.errors["left_out"][0]),
    ):
        set_steering_vectors(model, {i: v if i in kept else 0 * v for i, v in vectors.items()})
        difference = completion_log_probs(model, tokenizer, ROWS) - base
        assert gain == pytest.approx(difference.mean().item())
        assert error == pytest.approx(1.96 * difference.std().item() / math.sqrt(3))
    set_steering_vectors(model, vectors)
    model.base_model.set_scale("default", 0.5)
    half = completion_log_probs(model, tokenizer, ROWS) - base
    assert found.scales[0.5].mean == pytest.approx(half.mean().item(), rel=1e-4)
    assert found.scales[0.0].mean == pytest.approx(0, abs=1e-6)
    model.base_model.set_scale("default", 1.0)
    texts = ["one and two", "three is more", "so it is"]
    assert found.doses == pytest.approx(residual_ratios(model, tokenizer, texts))
    assert found.cosines == pytest.approx({0: -1.0})
    assert found.completions == {"task": 3, "other": 2}
    assert "report: 100%" in capsys.readouterr().err


def test_the_gain_is_that_of_the_vectors_and_not_of_modules_trained_beside_them(tiny_language_model, tokenizer):
    config = BiasSteerConfig(task_type="CAUSAL_LM", modules_to_save=["norm", "lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_language_model), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.2)
    found = adapter_report(model, tokenizer, {"it": ROWS}, scales=(2.0,))

    assert found.gains["it"].mean == found.scales[2.0].mean == found.ablation.all == 0
    assert found.base["it"] == pytest.approx(completion_log_probs(model, tokenizer, ROWS).mean().item())


def test_doses_are_of_the_very_tokens_that_are_scored(model, tokenizer):
    rows = [tokenizer(text)["input_ids"] for text in ("one and two", "three is more")]
    asked = []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    found = residual_ratios(model, tokenizer, rows)

    assert asked == rows
    assert found == residual_ratios(model, tokenizer, ["one and two", "three is more"])


@pytest.mark.parametrize("passes", [3, 8])
def test_a_report_leaves_the_adapter_as_it_was_even_if_it_fails(model, tokenizer, monkeypatch, passes):
    vectors, left = steering_vectors(model), iter(range(passes))

    def stop(*arguments):
        next(left)
        return completion_log_probs(*arguments)

    monkeypatch.setattr(report, "completion_log_probs", stop)
    with pytest.raises(StopIteration):
        adapter_report(model, tokenizer, {"task": ROWS}, scales=(0.5, 2.0), group_size=1)

    assert all(torch.equal(vector, vectors[index]) for index, vector in steering_vectors(model).items())


def test_a_model_in_training_is_measured_without_its_dropout(tiny_language_model, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model, attention_dropout=0.5)
    model = get_peft_model(base, BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    expected = adapter_report(model, tokenizer, {"task": ROWS}, scales=(0.0, 1.0), group_size=1)

    found = adapter_report(model.train(), tokenizer, {"task": ROWS}, scales=(0.0, 1.0), group_size=1)
    assert asdict(found) == asdict(expected) and model.training and base.training


def test_an_adapter_that_is_not_at_work_is_not_measured(model, tokenizer):
    def measure(name="default"):
        return adapter_report(model, tokenizer, {"task": ROWS}, name, scales=(1.0,))

    model.add_adapter("second", BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"'second' as the one active adapter, at scale 1, got \['default'\], at"):
        measure("second")
    with model.disable_adapter(), pytest.raises(ValueError, match=r"got \['default'\], switched off, at scale 1.0"):
        measure()
    model.set_scale("default", 0.5)
    with pytest.raises(
        ValueError, match=r"at scale 0.5: call set_adapter\('default'\) and set_scale\('default', 1.0\)"
    ):
        measure()
    model.set_scale("default", 1.0)
    assert measure().gains["task"].mean != 0


@pytest.fixture
def files(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    for name, rows in (("task", ROWS), ("other", OTHER)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return tmp_path


def test_the_command_writes_text_plots_and_numbers(files, capsys):
    data = [str(files / "task.jsonl"), str(files / "other.jsonl")]
    main(["report", str(files / "adapter"), "--data", *data, "--output", str(files / "out"), "--rows", "2"])

    text, numbers = (files / "out" / "report.md").read_text(), json.loads((files / "out" / "report.json").read_text())
    printed = capsys.readouterr()
    assert printed.out.strip() == text.strip() and "report: 100%" in printed.err
    assert f"| task | 2 | {numbers['base']['task']:.3f} | {numbers['gains']['task']['mean']:+.3f} ± " in text
    assert f"| 0 – 1 | {numbers['ablation']['kept'][0]:+.3f} ± " in text and "| other | 2 |" in text
    for name in ("vectors.png", "gains.png"):
        assert (files / "out" / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in text


def test_another_model_of_the_family_is_measured_with_the_same_vectors(files, tiny_language_model, model, tokenizer):
    torch.manual_seed(1)
    relative = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    with torch.no_grad():
        for parameter in relative.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    relative.save_pretrained(files / "relative")
    tokenizer.save_pretrained(files / "relative")
    found = {}
    for name, options in {"own": [], "relative": ["--base_model", str(files / "relative")]}.items():
        data = ["--data", str(files / "task.jsonl"), "--output", str(files / name)]
        main(["report", str(files / "adapter"), *data, *options])
        found[name] = json.loads((files / name / "report.json").read_text())

    steered = get_peft_model(relative.eval(), BiasSteerConfig(task_type="CAUSAL_LM"))
    before = completion_log_probs(steered, tokenizer, ROWS)
    set_steering_vectors(steered, steering_vectors(model))
    gain = (completion_log_probs(steered, tokenizer, ROWS) - before).mean().item()
    assert found["relative"]["gains"]["task"]["mean"] == pytest.approx(gain, abs=1e-5)
    assert abs(found["own"]["gains"]["task"]["mean"] - gain) > 0.01
    assert found["own"]["statistics"]["norms"] == found["relative"]["statistics"]["norms"]


def test_the_card_holds_the_last_report_once(files):
    adapter = files / "adapter"
    before = ModelCard.load(adapter / "README.md")
    before.data.model_name = "mine"
    before.data.eval_results = [EvalResult("text-generation", "sums", "sums", "accuracy", 0.5)]
    before.save(adapter / "README.md")
    for name in ("task", "other"):
        data = ["--data", str(files / f"{name}.jsonl"), "--output", str(files / "out"), "--card"]
        main(["report", str(adapter), *data])

    after = ModelCard.load(adapter / "README.md")
    assert after.text.startswith(before.text.rstrip()) and after.text.count("## What the vectors do") == 1
    assert "on other:" in after.text and "on task:" not in after.text
    gain = json.loads((files / "out" / "report.json").read_text())["gains"]["other"]
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in after.data.eval_results]
    assert found == [("sums", "accuracy", 0.5), ("other", "log_probability_gain", round(gain["mean"], 3))]
    assert f"(± {gain['error']:.3f}, 1.96 standard errors)" in after.data.eval_results[-1].metric_name
    assert after.data.model_name == "mine"
    assert (adapter / "gains.png").exists() and (adapter / "vectors.png").exists()


def test_numbers_are_written_before_anything_is_drawn(model, tokenizer, tmp_path, monkeypatch):
    found = adapter_report(model, tokenizer, {"task": ROWS}, scales=(1.0,))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ImportError, match=r"peft_bias_steer\[plot\]"):
        write_report(found, tmp_path, "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "expected JSON in line 1 of"),
        ("3", 'expected "prompt" and "completion", or "text", in line 1 of .*, got int'),
        ('{"prompt": "a"}', "in line 1 of .*, got \\['prompt'\\]"),
        ('{"prompt": "a", "completion": ["b"]}', 'expected strings, or .* in line 1 of .*, got {"prompt": "a", "comp'),
        ('{"prompt": ["a"], "completion": "b"}', "lists of messages with a role, in line 1 of"),
        ('{"prompt": ["a"], "completion": ["b"]}', "in line 1 of"),
        ('{"prompt": [], "completion": [{"role": "user"}]}', "in line 1 of"),
        ('{"prompt": [{"role": "user"}], "completion": "b"}', "in line 1 of"),
        ('{"prompt": 5, "completion": "b"}', "in line 1 of"),
        ('{"prompt": "a", "completion": null}', "in line 1 of"),
        ('{"text": 5}', "in line 1 of"),
        ('{"text": [{"role": "user"}]}', "in line 1 of"),
        ("", "expected rows with a prompt and a completion in .*, got an empty file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, line, sentence):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(ValueError, match=sentence):
        read_completions(tmp_path / "rows.jsonl")


def test_lines_end_where_json_lines_end(tmp_path):
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
    )

    assert read_completions(tmp_path / "rows.jsonl") == rows
    assert read_completions(tmp_path / "rows.jsonl", limit=1) == rows[:1]


def test_what_cannot_be_measured_is_refused(model, tokenizer, files, monkeypatch):
    with pytest.raises(ValueError, match="at least one token in the prompt and in the completion"):
        completion_log_probs(model, tokenizer, [{"prompt": "a", "completion": ""}])
    with pytest.raises(ValueError, match="expected at least one data set, got none"):
        adapter_report(model, tokenizer, {})
    with pytest.raises(ValueError, match="expected at least two completions in task, for an interval, got 1"):
        adapter_report(model, tokenizer, {"other": OTHER, "task": ROWS[:1]})
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        adapter_report(model, tokenizer, {"task": ROWS}, group_size=0)
    t5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    two_sided = get_peft_model(T5ForConditionalGeneration(t5), BiasSteerConfig())
    with pytest.raises(ValueError, match="expected a causal language model, .* got a T5ForConditionalGeneration"):
        adapter_report(two_sided, tokenizer, {"task": ROWS})
    monkeypatch.setattr(report, "completion_log_probs", lambda *arguments: pytest.fail("measured first"))
    for options, sentence in (
        ({"top_k": 0}, "top_k must be in"),
        ({"scales": (1.0, math.nan)}, "scales must be a finite number"),
    ):
        with pytest.raises(ValueError, match=sentence):
            adapter_report(model, tokenizer, {"task": ROWS}, **options)
    same = str(files / "task.jsonl")
    with pytest.raises(SystemExit, match="files of different names"):
        main(["report", str(files / "adapter"), "--data", same, same, "--output", str(files / "out")])
    for output in (same, f"{same}/in/it"):
        with pytest.raises(SystemExit, match="expected a folder to write into, got the file .*task.jsonl$"):
            main(["report", str(files / "adapter"), "--data", same, "--output", output])
        with pytest.raises(SystemExit, match="output_dir must be empty|expected a folder to write into, got the file"):
            main(["extract", str(files / "adapter"), "--control_vector", same, "--output", output])
    command = ["report", str(files / "adapter"), "--data", same, "--output", str(files / "out"), "--card"]
    for closed in (files, files / "adapter"):
        with monkeypatch.context() as patch:
            patch.setattr("os.access", lambda path, mode, closed=closed: path != closed.resolve())
            with pytest.raises(SystemExit, match=f"expected a folder that can be written to, got {closed}$"):
                main(command)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit, match=r"plots need one more package: pip install 'peft_bias_steer\[plot\]'"):
            main(command)
    (files / "adapter" / "README.md").unlink()
    with pytest.raises(SystemExit, match="expected the folder of an adapter with a README.md"):
        main(["report", str(files / "adapter"), "--data", same, "--output", str(files / "out"), "--card"])
    assert not Path(files / "out").exists()
