"""The command line from text to a dashboard, as a user types it."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeCallback,
    HierarchicalSaeModel,
    evaluate_budgets,
    evaluate_in_model,
    iterate_activations,
    load_saelens,
)
from hf_hierarchical_sae.cli import main


LINES = [f"To be, or not to be, that is question {number}: whether 'tis nobler to suffer." for number in range(60)]
SMALL = ["--d_sae", "64", "--k", "8", "--batch-size", "64", "--steps", "40"]
DAMAGED_CARD = b"---\nfoo: [bar\n---\nhello\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(LINES))
    return str(path)


@pytest.fixture(scope="module")
def harvest_command(tmp_path_factory, text, tiny_language_model):
    folder = str(tmp_path_factory.mktemp("states"))
    options = ["--layer", "0", "1", "--text", text, "--context_length", "32", "--shard_tokens", "1000"]
    return ["harvest", folder, "--model", tiny_language_model, *options]


@pytest.fixture(scope="module")
def states(harvest_command):
    """A harvest of both layers."""
    main(harvest_command)
    return harvest_command[1]


@pytest.fixture(scope="module")
def sae(tmp_path_factory, states):
    folder = str(tmp_path_factory.mktemp("sae"))
    main(["train", states, folder, "--layer", "1", *SMALL])
    return folder


def test_harvest_writes_every_layer_and_goes_on_after_a_stop(states, harvest_command, capsys):
    first, second = (ActivationShards(states, layer) for layer in (0, 1))
    assert len(first) == len(second) > 3000 and first.description["context_length"] == 32
    shards = sorted(Path(states).glob("shard-*"))
    before = [path.read_bytes() for path in shards]
    shards[1].unlink()

    main(harvest_command)

    assert [path.read_bytes() for path in shards] == before
    assert f"{len(first)} tokens in {states}" in capsys.readouterr().out


@pytest.mark.pinned
@pytest.mark.slow
def test_training_ends_in_a_model_that_says_what_it_is_and_prints_its_numbers(states, tmp_path, hub, capsys):
    main(["train", states, str(tmp_path / "sae"), "--layer", "1", *SMALL, "--push-to-hub", "tester/cli-sae"])

    sae = HierarchicalSaeModel.from_pretrained(tmp_path / "sae")
    assert (sae.config.layer, sae.config.d_sae, sae.config.k, sae.config.d_in) == (1, 64, 8, 32)
    assert sae.input_scale == 1 and sae.median_norm > 0 and (sae.mean_activation > 0).sum() > 20
    held_out = torch.cat(list(ActivationShards(states, 1).batches()))
    after = evaluate_budgets(sae, held_out, [8]).explained_variance[0]
    assert after > 0.5
    assert "expl. var." in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("tester/cli-sae"))
    results = ModelCard.load("tester/cli-sae").data.eval_results
    measured = {result.metric_name: result.metric_value for result in results}
    # Measured on what was trained on, which is all of it here.
    assert measured["explained variance, k = 8"] == pytest.approx(after, abs=1e-3)
    assert {result.dataset_split for result in results} == {"train"}


OBJECTIVES = {
    "--selection batch_topk": {"selection": "batch_topk", "budgets": [8]},
    "--matryoshka_prefixes 16 64": {"matryoshka_prefixes": [16, 64], "budgets": None},
    "--budgets 2 8 --budget_weights 0 1.5": {"budgets": [2, 8], "budget_weights": [0.0, 1.5]},
    "--aux-loss-coefficient 0.1 --aux_k 4 --dead_after_tokens 100 --encoder_chunk_size 16 --no-normalize-decoder": {
        "aux_loss_coefficient": 0.1,
        "aux_k": 4,
        "dead_after_tokens": 100,
        "encoder_chunk_size": 16,
        "normalize_decoder": False,
        "budgets": None,
    },
}


@pytest.mark.parametrize("options", OBJECTIVES)
def test_every_option_of_the_config_is_trained_with(options, states, tmp_path, capsys):
    main(["train", states, str(tmp_path / "sae"), "--layer", "1", *SMALL, "--steps", "10", *options.split()])

    config, err = HierarchicalSaeModel.from_pretrained(tmp_path / "sae").config, capsys.readouterr().err
    assert {name: getattr(config, name) for name in OBJECTIVES[options]} == OBJECTIVES[options]
    assert re.search(r"step 10 of 10: explained variance 0\.\d{3} with 8 latents per token\n", err)


def test_reports_hold_the_autoencoder_s_numbers(states, tmp_path):
    options = ["--layer", "1", *SMALL, "--steps", "10", "--report_to", "tensorboard"]
    main(["train", states, str(tmp_path / "sae"), *options])

    events = EventAccumulator(str(next((tmp_path / "sae").rglob("events.*")).parent)).Reload()
    assert {"train/explained_variance_8", "train/dead_fraction", "train/loss"} <= set(events.Tags()["scalars"])
    assert events.Scalars("train/explained_variance_8")[-1].step == 10


@pytest.mark.slow
def test_training_goes_on_from_its_checkpoint(states, tmp_path, capsys):
    command = ["train", states, str(tmp_path / "sae"), "--layer", "0", *SMALL, "--save_steps", "10"]
    main(command)
    whole = load_file(tmp_path / "sae" / "model.safetensors")
    other = ["train", states, str(tmp_path / "part"), "--layer", "0", *SMALL, "--save_steps", "10"]

    class Stopped(Exception):
        pass

    def stop_after_20(self, args, state, control, **kwargs):
        if state.global_step == 20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HierarchicalSaeCallback, "on_save", stop_after_20, raising=False)
        with pytest.raises(SystemExit) as stopped:
            main(other)
    assert stopped.value.code == 130 and "the same command with --resume goes on" in capsys.readouterr().err
    main([*other, "--resume"])

    for name, tensor in load_file(tmp_path / "part" / "model.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-5)


def test_evaluation_prints_a_table_or_json_from_shards_or_inside_the_language_model(
    sae, states, text, tiny_language_model, tmp_path, capsys
):
    capsys.readouterr()
    main(["evaluate", sae, "--harvest", states, "--budgets", "2", "8", "--json"])
    alone = json.loads(capsys.readouterr().out)
    copy = shutil.copytree(sae, tmp_path / "sae")
    (copy / "README.md").unlink(missing_ok=True)
    inside = ["evaluate", str(copy), "--model", tiny_language_model, "--text", text, "--card"]
    for tokens in ("300", "500"):
        main([*inside, "--plot", str(tmp_path / "plot.png"), "--tokens", tokens])
    table = capsys.readouterr().out.rpartition("budget")[2]

    assert alone["budgets"] == [2, 8] and alone["tokens"] == len(ActivationShards(states, 1))
    assert alone["cross_entropy"] is None and "recovered" in table and "clean" in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    data = ModelCard.load(copy / "README.md").data
    measured = {(result.metric_type, result.metric_name): result.metric_value for result in data.eval_results}
    row = [line.split() for line in table.splitlines()][-2]
    assert data.model_name == "sae" and {result.dataset_name for result in data.eval_results} == {"book.txt"}
    assert len(data.eval_results) == len(measured) == 4 * 4
    assert row[0] == "8" and measured["explained_variance", "explained variance, k = 8"] == float(row[1])
    assert str(measured["loss_recovered", "loss recovered, k = 8"]) in row


def test_what_training_left_out_is_left_out_of_evaluation_and_page(sae, text, tiny_language_model, tmp_path, capsys):
    found = {"evaluate": [], "dashboard": []}
    for ratio in ("5", "1"):
        options = [sae, "--model", tiny_language_model, "--text", text, "--max_norm_ratio", ratio]
        capsys.readouterr()
        main(["evaluate", *options, "--tokens", "100000", "--json"])
        found["evaluate"].append(json.loads(capsys.readouterr().out)["tokens"])
        main(["dashboard", *options, "--output", str(tmp_path / "page.html")])
        found["dashboard"].append(int(re.search(r"fire on (\d+) tokens", capsys.readouterr().out)[1]))

    assert all(0 < few < 0.6 * many for many, few in found.values())


@pytest.mark.slow
def test_the_dashboard_is_one_page(sae, text, tiny_language_model, tmp_path, capsys):
    page, copy = tmp_path / "page.html", shutil.copytree(sae, tmp_path / "sae")
    for _ in range(2):
        main(["dashboard", str(copy), "--model", tiny_language_model, "--text", text, "--output", str(page), "--card"])

    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert f"{page}: " in capsys.readouterr().out
    assert (copy / "dashboard.html").read_bytes() == page.read_bytes()
    assert (copy / "README.md").read_text().count("](dashboard.html)") == 1


@pytest.mark.pinned
@pytest.mark.parametrize("form", ["saelens", "sparsify"])
def test_conversion_there_and_back_keeps_the_reconstructions(sae, tmp_path, hub, form):
    original, x = HierarchicalSaeModel.from_pretrained(sae), 3 * torch.randn(20, 32)
    repo = f"tester/{form}"

    there, back = str(tmp_path / "there" / "layers.1"), str(tmp_path / "back")
    main(["convert", sae, there, "--to", form, "--k", "4", "--push-to-hub", repo])
    main(["convert", there, back, "--from", form, "--push-to-hub", f"{repo}-ours"])
    main(["convert", repo, str(tmp_path / "pulled"), "--from", form])

    for folder in (back, tmp_path / "pulled"):
        found = HierarchicalSaeModel.from_pretrained(folder)
        torch.testing.assert_close(found(x).reconstruction, original(x, k=4).reconstruction, atol=1e-5, rtol=1e-5)
    assert HierarchicalSaeModel.from_pretrained(back).config.layer == 1
    assert "cfg.json" in hub.files(repo) and "config.json" in hub.files(f"{repo}-ours")


def test_a_folder_that_holds_something_is_written_into_with_overwrite_only(sae, states, tiny_language_model, tmp_path):
    model = shutil.copytree(tiny_language_model, tmp_path / "model")
    saved = {path: path.read_bytes() for path in model.iterdir()}
    (tmp_path / "file").write_text("kept")

    for command in (f"convert {sae}", f"convert {sae} --to saelens", f"circuits {sae} --output"):
        name, source, *options = command.split()
        words = [name, source, *options, str(model)]
        with pytest.raises(SystemExit, match="model holds something: give --overwrite to write into it, or another"):
            main(words)
        with pytest.raises(SystemExit, match="expected a folder to write, got the file .*file"):
            main([*words[:-1], str(tmp_path / "file"), "--overwrite"])
        with pytest.raises(SystemExit, match="expected a folder to write other than those that are read, got "):
            main([*words[:-1], f"{sae}/.", "--overwrite"])
    with pytest.raises(SystemExit, match="expected a folder to write other than those that are read, got "):
        main(["convert", sae, states, "--by_threshold", states, "--overwrite"])
    assert {path: path.read_bytes() for path in model.iterdir()} == saved

    main(["convert", sae, str(model), "--overwrite"])
    assert HierarchicalSaeModel.from_pretrained(model).config.k == 8


def test_a_threshold_is_measured_on_a_harvest_and_goes_to_other_formats(sae, states, tmp_path, capsys):
    main(["convert", sae, str(tmp_path / "ours"), "--by_threshold", states, "--k", "4"])
    main(["convert", sae, str(tmp_path / "lens"), "--by_threshold", states, "--k", "4", "--to", "saelens"])
    main(["convert", sae, str(tmp_path / "largest"), "--by_threshold", states])

    found = HierarchicalSaeModel.from_pretrained(tmp_path / "ours")
    assert (found.config.selection, found.config.k) == ("batch_topk", 4)
    assert HierarchicalSaeModel.from_pretrained(tmp_path / "largest").config.k == 8
    original = HierarchicalSaeModel.from_pretrained(sae)
    assert not torch.equal(found.mean_activation, original.mean_activation) and found.median_norm > 0
    main(["evaluate", str(tmp_path / "ours"), "--harvest", states, "--json"])
    evaluated = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert evaluated["latents_per_token"] == [pytest.approx(4, rel=0.02)]
    x = ActivationShards(states, 1).rows(torch.arange(100))
    torch.testing.assert_close(
        load_saelens(tmp_path / "lens")(x).reconstruction, found(x).reconstruction, atol=1e-4, rtol=1e-4
    )


def test_a_dataset_of_the_hub_is_read_as_a_stream(tiny_language_model, tmp_path, hub):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"story": line}) for line in LINES))
    HfApi().create_repo("tester/stories", repo_type="dataset", exist_ok=True)
    HfApi().upload_file(
        repo_id="tester/stories",
        repo_type="dataset",
        path_or_fileobj=tmp_path / "data.jsonl",
        path_in_repo="train.jsonl",
    )

    options = ["--dataset", "tester/stories", "--text-column", "story", "--tokens", "500"]
    main(["harvest", str(tmp_path / "states"), "--model", tiny_language_model, "--layer", "0", *options])

    assert len(ActivationShards(tmp_path / "states")) > 400


def test_chats_go_from_harvest_to_dashboard_without_their_special_tokens(tmp_path, tiny_language_model, capsys):
    (tmp_path / "data").mkdir()
    rows = [{"chat": [{"role": "user", "content": line}]} for line in LINES]
    (tmp_path / "data" / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("chats", "other")]
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    states, sae, page = (str(tmp_path / name) for name in ("states", "sae", "page.html"))
    dataset = ["--dataset", str(tmp_path / "data"), "--dataset_config", "chats"]
    files = ["--text", str(tmp_path / "data" / "chats.jsonl")]
    model = ["--model", tiny_language_model, "--text_column", "chat", "--skip_special_tokens", "--skip-tokens", " "]
    model += ["--tokens", "400"]

    main(["harvest", states, *model, *dataset, "--layer", "0"])
    with pytest.raises(SystemExit, match=r"holds a harvest with skip_tokens=\[' '\], got skip_tokens=None"):
        main(["harvest", states, *model[:5], "--tokens", "400", *files, "--layer", "0"])
    main(["train", states, sae, *SMALL])
    capsys.readouterr()
    main(["evaluate", sae, *model, *files, "--json"])
    evaluation = json.loads(capsys.readouterr().out)
    main(["dashboard", sae, *model, *files, "--output", page])

    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    settings = {"text_column": "chat", "skip_special_tokens": True, "skip_tokens": [" "], "max_tokens": 400}
    stream = iterate_activations(model, tokenizer, rows, 0, show_progress=False, **settings)
    expected = evaluate_in_model(HierarchicalSaeModel.from_pretrained(sae), stream)
    assert evaluation["tokens"] == 400 == len(ActivationShards(states))
    assert evaluation["cross_entropy"] == pytest.approx(expected.cross_entropy)
    assert evaluation["clean_cross_entropy"] == pytest.approx(expected.clean_cross_entropy)
    assert "latents that fire on 400 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("harvest {out} --model {model} --layer 0", "give either --text with files, or --dataset"),
        (
            "harvest {out} --model {model} --layer 0 --text missing.txt",
            "expected files with text, got missing.txt, which are none",
        ),
        (
            "harvest {out} --model {model} --layer 0 --text {text} --skip_tokens several",
            "skip_tokens must be tokens of the tokenizer, .* got 'several', which is 7",
        ),
        ("harvest {out} --model {model} --layer 5 --text {text}", r"layer must be in \[0, 1\], got \[5\]"),
        ("harvest {out} --model {out}/nothing --layer 0 --text {text}", "nothing"),
        ("train {out} {out}/sae", "expected a folder written by save_shards"),
        ("train {states} {out}/sae", r"layer must be one of the harvested layers \[0, 1\], got None"),
        ("train {states} {out}/sae --layer 0 --k 9 --d_sae 8", r"k must be in \[1, d_sae=8\], got 9"),
        ("train {states} {out}/sae --layer 0 --batch_size 100000", "expected at least one batch of 100000 tokens"),
        (
            "train {states} {out}/sae --layer 0 --resume",
            "resume goes on from a whole checkpoint in .*, which has none",
        ),
        ("train {states} {model} --layer 1", "holds a model of type llama, no autoencoder: give another folder"),
        ("circuits {model} --output {out}/x", "takes transcoders, .* holds none: give the folders that train wrote"),
        ("circuits {empty} --output {out}/x", "takes transcoders, .*empty holds none"),
        (
            "train {states} {sae} --layer 1",
            "holds a finished autoencoder: give resume .--resume. to go on, overwrite .--overwrite. to start",
        ),
        ("train {states} {sae} --layer 1 --resume --k 4 --d_sae 64", "holds a training with k=8, got k=4"),
        ("train {states} {sae} --layer 0 --resume --k 8 --d_sae 64", "holds a training with layer=1, got layer=0"),
        (
            "train {states} {out}/x --layer 0 --k 8 --d_sae 64 --matryoshka_prefixes 8 32",
            r"matryoshka_prefixes must end in d_sae=64, got \[8, 32\]",
        ),
        (
            "train {states} {out}/x --layer 0 --k 8 --d_sae 64 --budgets 4 8 --budget_weights 1",
            "budget_weights needs one weight per budget",
        ),
        ("train {states} {out}/x --layer 0 --report_to nothing", "--report_to takes none, all.*, got nothing"),
        (
            "train {states} {out}/x --layer 0 --d_sae 10000000000000",
            "expected memory for 10000000000000 latents of size 32",
        ),
        ("harvest {out} --model {model} --layer 0 --text {binary}", "expected UTF-8 text in .*binary, got"),
        ("harvest {out} --model {model} --layer 0 --text {out}", "expected files with text, got .*, which are none"),
        (
            "harvest {out}/x --model {torn} --layer 0 --text {text}",
            "expected a language model with its tokenizer in .*",
        ),
        ("evaluate {torn} --harvest {states}", "expected an autoencoder in .*torn, got: .*model_type"),
        (
            "evaluate tester/bare --harvest {states} --card",
            "--card writes to the folder of an autoencoder, got tester/bare",
        ),
        ("evaluate {listed} --harvest {states}", "expected an autoencoder in .*listed, got: "),
        (
            "evaluate {out}/gone --harvest {states}",
            "expected an autoencoder in .*gone, of which there is no folder here, got: ",
        ),
        (
            "harvest {out}/x --model {out}/gone/there --layer 0 --text {text}",
            "expected a language model .*there, of which there is no folder here, got: ",
        ),
        (
            "harvest {out}/x --model {model} --layer 0 --dataset {script}",
            "script has no part with dataset_config=None and split='train': .*scripts are no longer supported",
        ),
        ("evaluate {sae}", "give either --harvest, or --model with --text or --dataset"),
        (
            "evaluate {sae} --harvest {states} --text {text}",
            "a harvest holds activations of its own text: give no --text",
        ),
        (
            "evaluate {sae} --harvest {states} --tokens 100",
            "a harvest holds .* its own text: give no --tokens with it",
        ),
        (
            "train {states} {out}/x --dataset some/text",
            "a harvest holds activations of its own text: give no --dataset",
        ),
        (
            "circuits {out}/gone --output {out}/x",
            "expected the folder of a transcoder or its id on the Hub, got .*gone: ",
        ),
        ("evaluate {sae} --harvest {states} --layer 0", "is read where .* belongs, layer 1, got --layer 0"),
        ("evaluate {sae} --harvest {states} --budgets 9", r"budgets must be in \[1, 8\], the trained budget"),
        ("dashboard {sae} --model {model}", "give either --text with files, or --dataset"),
        ("convert {sae} {out}/x --k 2", "--k is the budget that a file of saelens or sparsify is written for"),
        ("convert {sae} {out}/x --to saelens --k 9", r"k must be in \[1, 8\], the trained budget, got 9"),
        ("convert {sae} {out}/x --from saelens", "cfg.json|sae_weights.safetensors"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message, text, tiny_language_model, tmp_path, request):
    torn, binary, script = tmp_path / "torn", tmp_path / "binary", tmp_path / "script"
    shutil.copytree(tiny_language_model, torn)
    (torn / "tokenizer.json").write_text((torn / "tokenizer.json").read_text()[:-50])
    binary.write_bytes(b"\xff" * 100)
    script.mkdir()
    (script / "script.py").write_text("import datasets\n")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "config.json").write_text("[]")
    values = {"out": tmp_path, "model": tiny_language_model, "text": text, "torn": torn, "binary": binary}
    values["script"] = script
    values["empty"] = tmp_path / "empty"
    values["empty"].mkdir()
    values["listed"] = tmp_path / "listed"
    for name in ("states", "sae"):
        if "{" + name + "}" in arguments:
            values[name] = request.getfixturevalue(name)

    with pytest.raises(SystemExit, match=f"^hierarchical-sae: .*{message}"):
        main(shlex.split(arguments.format(**values)))


def test_what_cannot_be_written_is_refused_before_anything_is_read(
    sae, text, tiny_language_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("hf_hierarchical_sae.cli.load_language_model", lambda args: pytest.fail("read first"))
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda path, mode: path not in (tmp_path.resolve(), Path(sae).resolve()))
    inside = ["--model", tiny_language_model, "--text", text]

    for name, sentence in (
        (".", "expected a file to write, got the folder"),
        ("x.png", "expected a folder that can be written to, got"),
        ("file/x.png", "expected a folder to write x.png into, got the file"),
    ):
        with pytest.raises(SystemExit, match=f"hierarchical-sae: {sentence}"):
            main(["dashboard", sae, *inside, "--output", f"{tmp_path}/{name}"])
    for plot, sentence in (("x.nope", "expected a picture of type"), ("x", "expected a folder that can be")):
        with pytest.raises(SystemExit, match=f"hierarchical-sae: {sentence}"):
            main(["evaluate", sae, *inside, "--plot", f"{tmp_path}/{plot}"])
    with pytest.raises(SystemExit, match="expected a folder that can be written to, got"):
        main(["evaluate", sae, *inside, "--card"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"plots need one more package: pip install 'hf_hierarchical_sae\[plot\]'"):
        main(["evaluate", sae, *inside, "--plot", f"{tmp_path}/x.png"])


@pytest.mark.parametrize("command, left", [("harvest", "goes on"), ("evaluate", "starts afresh")])
def test_ctrl_c_says_what_the_same_command_does(
    command, left, text, tiny_language_model, tmp_path, monkeypatch, capsys
):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_hierarchical_sae.cli.load_autoencoder", interrupt)
    monkeypatch.setattr("hf_hierarchical_sae.cli.load_language_model", interrupt)
    options = {"harvest": ["--layer", "1"], "evaluate": []}[command]
    with pytest.raises(SystemExit) as stopped:
        main([command, str(tmp_path / "there"), "--model", tiny_language_model, "--text", text, *options])

    assert stopped.value.code == 130
    assert capsys.readouterr().err == f"\nhierarchical-sae: stopped; the same command {left}\n"


def test_what_cannot_be_uploaded_is_refused_before_training(states, tmp_path, hub):
    with pytest.raises(SystemExit, match="^hierarchical-sae: "):
        main(["train", states, str(tmp_path / "sae"), "--layer", "1", *SMALL, "--push-to-hub", "not//an id"])
    HfApi().create_repo("tester/damaged")
    nameless = b"---\nmodel-index:\n- results: []\n---\n"
    HfApi().upload_file(path_or_fileobj=nameless, path_in_repo="README.md", repo_id="tester/damaged")
    with pytest.raises(SystemExit, match="^hierarchical-sae: expected to upload to tester/damaged, got: .*metadata"):
        main(["train", states, str(tmp_path / "sae"), "--layer", "1", *SMALL, "--push-to-hub", "tester/damaged"])

    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("content", [DAMAGED_CARD, b"\xff"], ids=["metadata", "bytes"])
@pytest.mark.parametrize("command", ["evaluate", "dashboard"])
def test_a_card_that_cannot_be_read_is_refused_at_once(command, content, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(
        SystemExit, match=r"^hierarchical-sae: expected a model card in UTF-8 .*README.md; mend or remove"
    ):
        main([command, str(tmp_path), "--model", "none", "--card"])


def launched(launcher, *arguments):
    """What `hierarchical-sae` prints, started by `torchrun` or `accelerate launch` as two processes."""
    start = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29417"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "29418"],
    }[launcher]
    command = [sys.executable, "-m", *start, "-m", "hf_hierarchical_sae.cli", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_processes_of_torchrun_on_a_cpu_train_one_autoencoder(states, tmp_path):
    command = ["train", states, str(tmp_path / "two"), "--layer", "1", *SMALL, "--batch-size", "32"]
    assert launched("torchrun", *command).count("on training data; saved in") == 1
    main(["train", states, str(tmp_path / "one"), "--layer", "1", *SMALL])

    # Both saw 40 batches of 64 tokens.
    fired = [
        torch.load(path / "checkpoint-40" / "optimizer.pt")["state"][0]["step"]
        for path in (tmp_path / "one", tmp_path / "two")
    ]
    assert fired[0] == fired[1] == 40
    assert (tmp_path / "two" / "checkpoint-40" / "rng_state_1.pth").exists()
    one, two = (HierarchicalSaeModel.from_pretrained(tmp_path / name) for name in ("one", "two"))
    x = torch.cat(list(ActivationShards(states, 1).batches()))
    quality = [evaluate_budgets(sae, x, [8]).explained_variance[0] for sae in (one, two)]
    # The same tokens in other batches.
    assert quality[0] == pytest.approx(quality[1], abs=0.03)


@pytest.mark.slow
def test_processes_of_torchrun_split_a_harvest_and_train_from_text_together(states, harvest_command, tmp_path):
    out = launched("torchrun", harvest_command[0], str(tmp_path / "two"), *harvest_command[2:])

    assert "tokens in" in out
    files = [
        {path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in (states, tmp_path / "two")
    ]
    assert files[0] == files[1]
    # Rows, of which each process reads its own, are passages of some pages in a file.
    (tmp_path / "long.txt").write_text("\n".join(LINES * 8))
    options = ["--model", harvest_command[3], "--text", str(tmp_path / "long.txt"), "--layer", "1", *SMALL]
    assert launched("torchrun", "train", str(tmp_path / "sae"), *options).count("saved in") == 1
    parts = [torch.load(tmp_path / "sae" / "checkpoint-40" / f"stream_{process}.pt") for process in (0, 1)]
    assert all(part["stream"]["passes_read"] > 0 for part in parts)
    assert not torch.equal(parts[0]["rest"][0][0], parts[1]["rest"][0][0])


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_trains_one_autoencoder_in_one_process(states, tmp_path):
    out = launched("accelerate", "train", states, str(tmp_path / "sae"), "--layer", "1", *SMALL)

    assert out.count("on training data; saved in") == 1
    main(["train", states, str(tmp_path / "alone"), "--layer", "1", *SMALL])
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("sae", "alone"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def wide_language_model(tmp_path_factory, tiny_language_model):
    """Rows of 32 weights are shorter than what bitsandbytes packs."""
    folder = shutil.copytree(tiny_language_model, tmp_path_factory.mktemp("wide") / "model")
    config = LlamaConfig.from_pretrained(folder, hidden_size=64, head_dim=16)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_language_model_is_harvested_trained_on_and_evaluated(
    quantization, tmp_path, text, wide_language_model, capsys
):
    pytest.importorskip("bitsandbytes")
    model = ["--model", wide_language_model, "--text", text, "--layer", "1", "--tokens", "600"]
    quantized = [*model, "--quantization", quantization]
    main(["harvest", str(tmp_path / "states"), *quantized])
    main(["harvest", str(tmp_path / "exact"), *model])

    found, exact = (next(ActivationShards(tmp_path / name).batches()) for name in ("states", "exact"))
    error = (found[:500] - exact[:500]).norm() / exact[:500].norm()
    assert 1e-4 < error < {"4bit": 0.2, "8bit": 0.03}[quantization]
    with pytest.raises(SystemExit, match="holds a harvest with quantization="):
        main(["harvest", str(tmp_path / "states"), *model])
    main(["train", str(tmp_path / "sae"), *quantized, *SMALL])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "sae"), *quantized, "--json"])
    assert json.loads(capsys.readouterr().out)["explained_variance"][-1] > 0.3
    main(["dashboard", str(tmp_path / "sae"), *quantized, "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()


def test_quantization_without_its_package_is_a_sentence(tmp_path, harvest_command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)

    with pytest.raises(SystemExit, match="needs one more package: pip install bitsandbytes"):
        main([harvest_command[0], str(tmp_path), *harvest_command[2:], "--quantization", "4bit"])


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_language_model_goes_where_the_device_map_says(device_map, tmp_path, states, harvest_command):
    command = [harvest_command[0], str(tmp_path), *harvest_command[2:], "--device_map"]
    main([*command, device_map])

    for path in Path(states).iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(SystemExit, match="expected a language model with its tokenizer in .*nowhere"):
        main([*command, "nowhere"])


def test_code_that_comes_with_a_language_model_runs_on_demand(tmp_path, tiny_language_model, text):
    folder = shutil.copytree(tiny_language_model, tmp_path / "model")
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own"\n\n\n'
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    command = ["harvest", str(tmp_path / "states"), "--model", str(folder), "--text", text, "--layer", "0"]

    with pytest.raises(SystemExit, match="trust_remote_code"):
        main(command)
    main([*command, "--trust-remote-code"])
    assert len(ActivationShards(tmp_path / "states")) > 1000


@pytest.mark.parametrize("project", ["pyproject.toml", "hf_hierarchical_sae/pyproject.toml"])
def test_both_projects_install_the_command(project):
    scripts = tomllib.loads((Path(__file__).parents[2] / project).read_text())["project"]["scripts"]
    module, _, function = scripts["hierarchical-sae"].partition(":")

    assert getattr(importlib.import_module(module), function) is main


def test_sites_go_from_harvest_to_dashboard_by_their_names(tmp_path, text, tiny_language_model, capsys):
    states, sae, page = (str(tmp_path / name) for name in ("states", "sae", "page.html"))
    model = ["--model", tiny_language_model, "--text", text, "--tokens", "600"]
    main(["harvest", states, *model, "--layer", "0", "1", "--hook_point", "mlp.output", "middle"])
    advice = re.search(r"train with `hierarchical-sae (.*)`", capsys.readouterr().out)[1]
    main([*shlex.split(advice)[:2], f"{sae}-as-told", *shlex.split(advice)[3:], *SMALL])
    config = HierarchicalSaeModel.from_pretrained(f"{sae}-as-told").config
    assert (config.layer, config.hook_point) == (0, "mlp.output")
    with pytest.raises(SystemExit, match="hook_point must be one of the harvested hook_points .*, got None"):
        main(["train", states, sae, "--layer", "1", *SMALL])
    main(["train", states, sae, "--layer", "1", "--hook-point", "mlp.output", *SMALL])

    config = HierarchicalSaeModel.from_pretrained(sae).config
    assert (config.layer, config.hook_point) == (1, "mlp.output")
    main(["evaluate", sae, "--harvest", states])
    main(["evaluate", sae, *model])
    assert "zeros" in capsys.readouterr().out
    main(["dashboard", sae, *model, "--output", page])
    assert "mlp.output of layer 1" in Path(page).read_text()
    main(["convert", sae, str(tmp_path / "lens"), "--to", "saelens"])
    assert "blocks.1.hook_mlp_out" in (tmp_path / "lens" / "cfg.json").read_text()


def test_a_transcoder_goes_from_harvest_to_dashboard(tmp_path, text, tiny_language_model, capsys):
    states, transcoder, page = (str(tmp_path / name) for name in ("states", "transcoder", "page.html"))
    model = ["--model", tiny_language_model, "--text", text, "--tokens", "600"]
    sites = ["--hook_point", "mlp.input", "--target_hook_point", "mlp.output"]
    main(["harvest", states, *model, "--layer", "1", "--hook_point", "mlp.input", "mlp.output"])
    with pytest.raises(SystemExit, match="a transcoder computes another site than it reads, got 'mlp.input'"):
        main(["train", states, transcoder, *sites[:2], "--target_hook_point", "mlp.input", *SMALL])

    main(["train", states, transcoder, *sites, "--skip_connection", *SMALL])
    with pytest.raises(SystemExit, match="holds a training with skip_connection=True, got skip_connection=False"):
        main(["train", states, transcoder, *sites, *SMALL, "--resume"])

    loaded = HierarchicalSaeModel.from_pretrained(transcoder)
    assert loaded.config.target_hook_point == "mlp.output" and (loaded.target_scale, loaded.input_scale) == (1, 1)
    assert loaded.median_target_norm > 0
    shards = ActivationShards(states, 1, "mlp.input", "mlp.output")
    capsys.readouterr()
    main(["evaluate", transcoder, "--harvest", states, "--json"])
    explained = json.loads(capsys.readouterr().out)["explained_variance"]
    assert explained == pytest.approx(evaluate_budgets(loaded, shards).explained_variance) and explained[-1] > 0.5
    main(["evaluate", transcoder, *model])
    assert "zeros" in capsys.readouterr().out
    main(["dashboard", transcoder, *model, "--output", page])
    assert "mlp.input of layer 1 to mlp.output of layer 1" in Path(page).read_text()


def test_training_straight_from_text_is_training_on_a_harvest_of_it(tmp_path, text, tiny_language_model, capsys):
    model = ["--model", tiny_language_model, "--text", text, "--layer", "1", "--context_length", "32"]
    folder = str(tmp_path / "from_text")
    command = ["train", folder, *model, *SMALL, "--shuffle_tokens", "500", "--batch_tokens", "256"]

    main([*command, "--save_steps", "10"])

    out = capsys.readouterr().out
    sae = HierarchicalSaeModel.from_pretrained(folder)
    config = sae.config
    assert (config.layer, config.hook_point, config.model_name) == (1, "output", tiny_language_model)
    assert sae.input_scale == 1 and sae.median_norm > 0 and "on training data" in out
    main(["harvest", str(tmp_path / "states"), *model])
    main(["evaluate", folder, "--harvest", str(tmp_path / "states"), "--json"])
    main(["train", str(tmp_path / "states"), str(tmp_path / "on_harvest"), *SMALL])
    capsys.readouterr()
    explained = []
    for name in ("from_text", "on_harvest"):
        main(["evaluate", str(tmp_path / name), "--harvest", str(tmp_path / "states"), "--json"])
        explained.append(json.loads(capsys.readouterr().out)["explained_variance"][-1])
    assert explained[0] == pytest.approx(explained[1], abs=0.05)
    with pytest.raises(SystemExit, match="holds a training with batch_tokens=256, got batch_tokens=2048"):
        main([*command[:-2], "--resume"])
    main([*command, "--resume", "--steps", "45"])
    assert json.loads((Path(folder) / "checkpoint-45" / "trainer_state.json").read_text())["global_step"] == 45


def test_a_transcoder_trains_straight_from_text(tmp_path, text, tiny_language_model):
    sites = ["--hook_point", "mlp.input", "--target_hook_point", "mlp.output", "--skip_connection"]
    main(
        ["train", str(tmp_path / "t"), "--model", tiny_language_model, "--text", text, "--layer", "1", *sites, *SMALL]
    )

    config = HierarchicalSaeModel.from_pretrained(tmp_path / "t").config
    assert (config.hook_point, config.target_hook_point, config.skip_connection) == ("mlp.input", "mlp.output", True)


def test_training_goes_on_with_a_saved_dictionary(tmp_path, states, sae, capsys):
    before = HierarchicalSaeModel.from_pretrained(sae)
    options = ["--layer", "1", *SMALL[-4:]]

    main(["train", states, str(tmp_path / "a"), *options, "--init_from", sae, "--learning_rate", "1e-9"])

    same = HierarchicalSaeModel.from_pretrained(tmp_path / "a")
    assert (same.config.d_sae, same.config.k) == (before.config.d_sae, before.config.k)
    for name, tensor in before.named_parameters():
        torch.testing.assert_close(same.get_parameter(name), tensor, rtol=1e-4, atol=1e-4)
    main(["train", states, str(tmp_path / "b"), *options, "--init_from", sae, "--budgets", "2", "8", "--aux_k", "3"])
    config = HierarchicalSaeModel.from_pretrained(tmp_path / "b").config
    assert (list(config.budgets), config.aux_k, config.k) == ([2, 8], 3, 8)
    main(["train", states, str(tmp_path / "d"), *options, "--init_from", sae, "--selection", "batch_topk"])
    config = HierarchicalSaeModel.from_pretrained(tmp_path / "d").config
    assert (config.selection, list(config.budgets), config.k) == ("batch_topk", [8], 8)
    main(["train", states, str(tmp_path / "e"), *options, "--init_from", str(tmp_path / "d"), "--k", "4"])
    config = HierarchicalSaeModel.from_pretrained(tmp_path / "e").config
    assert (config.selection, list(config.budgets), config.k) == ("batch_topk", [4], 4)
    for wrong, message in {
        ("--budgets", "2", "9"): r"budgets must be strictly increasing integers in \[1, 8\], got \[2, 9\]",
        ("--d_sae", "32"): r"another shape of .*encoder_weight \(64, 32\)",
        ("--layer", "0"): "has layer=1, the activations to train on have layer=0",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main(["train", states, str(tmp_path / "c"), *options, "--init_from", sae, *wrong])


def test_shards_in_half_precision_take_half_the_disk(tmp_path, harvest_command, states):
    main([harvest_command[0], str(tmp_path / "half"), *harvest_command[2:], "--shard_dtype", "bfloat16"])

    sizes = [
        sum(path.stat().st_size for path in Path(folder).glob("shard-*")) for folder in (tmp_path / "half", states)
    ]
    assert sizes[0] < 0.55 * sizes[1]
    half, whole = (ActivationShards(folder, 1) for folder in (tmp_path / "half", states))
    torch.testing.assert_close(half.rows(torch.arange(50)), whole.rows(torch.arange(50)), rtol=0.01, atol=0.01)


def test_a_harvest_grows_with_more_tokens(tmp_path, harvest_command, capsys):
    command = [harvest_command[0], str(tmp_path), *harvest_command[2:], "--tokens"]
    main([*command, "500"])
    main([*command, "900"])

    assert len(ActivationShards(tmp_path, 1)) == 900
    with pytest.raises(SystemExit, match="a harvest with max_tokens=900, got max_tokens=100"):
        main([*command, "100"])


def test_a_module_by_its_path_needs_no_layer(tmp_path, text, tiny_language_model):
    states, sae = str(tmp_path / "states"), str(tmp_path / "sae")
    model = ["--model", tiny_language_model, "--text", text, "--tokens", "600"]
    main(["harvest", states, *model, "--hook_point", "model.layers.0.mlp.up_proj"])
    main(["train", states, sae, *SMALL])

    config = HierarchicalSaeModel.from_pretrained(sae).config
    assert (config.layer, config.hook_point) == (None, "model.layers.0.mlp.up_proj") and config.d_in != 32
    main(["evaluate", sae, *model])
    main(["dashboard", sae, *model, "--output", str(tmp_path / "page.html")])
    assert "the module model.layers.0.mlp.up_proj" in (tmp_path / "page.html").read_text()
