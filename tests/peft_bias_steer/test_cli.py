"""The command `bias-steer` on adapters in a folder and on the Hub, and what it says when it is used wrongly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bias_steer import BiasSteerConfig, extract_vectors, from_control_vector, steering_vectors
from peft_bias_steer.analysis import vector_statistics
from peft_bias_steer.cli import load_vectors, main
from tests.forked_processes import run_forked


INPUT_IDS = torch.arange(40).view(2, 20)


def make_adapter(base_path, output_dir, config):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), config).eval()
    model.save_pretrained(output_dir)
    return model


@pytest.fixture(scope="module")
def steered(tiny_language_model, tmp_path_factory):
    """A steered model and the folder of its adapter."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    config = BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM")
    return make_adapter(tiny_language_model, folder, config), folder


@pytest.fixture(params=["folder", "hub"])
def adapter(request, steered, hub):
    """The same adapter as a folder and as an id on the Hub."""
    if request.param == "folder":
        return steered[1]
    HfApi().create_repo("tester/steered", exist_ok=True)
    HfApi().upload_folder(repo_id="tester/steered", folder_path=steered[1])
    return "tester/steered"


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def test_inspect_prints_the_statistics_of_the_vectors(adapter, steered, capsys):
    expected = vector_statistics(steering_vectors(steered[0]))

    table = run(capsys, "inspect", adapter)
    data = json.loads(run(capsys, "inspect", adapter, "--json"))

    assert all(f"{norm:.4f}" in table for norm in expected.norms)
    assert f"stable rank {expected.stable_rank:.2f} of 2" in table
    assert data["layers"] == [0, 1] and data["norms"] == pytest.approx(expected.norms)


def test_inspect_does_not_need_the_base_model(steered, tmp_path, capsys):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(Path(steered[1], name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/such-model"}))

    assert json.loads(run(capsys, "inspect", tmp_path, "--json"))["layers"] == [0, 1]


def test_inspect_draws_a_plot(steered, tmp_path, capsys):
    run(capsys, "inspect", steered[1], "--plot", tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error::FutureWarning")
def test_commands_that_load_a_model_warn_of_nothing(steered, tiny_language_model, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"positive": "happy", "negative": "sad"}\n' * 2)
    run(capsys, "lens", steered[1], "--json")
    run(capsys, "export", steered[1], "--format", "stock", "--output", tmp_path / "stock")
    run(capsys, "extract", tiny_language_model, "--pairs", tmp_path / "pairs.jsonl", "--output", tmp_path / "happy")


def test_lens_shows_the_tokens_of_each_layer(adapter, steered, capsys, tiny_language_model):
    model, _ = steered
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    head = model.base_model.model.lm_head.weight.detach()

    data = json.loads(run(capsys, "lens", adapter, "--top_k", 3, "--json"))
    table = run(capsys, "lens", adapter, "--top_k", 1, "--reading", "cosine")

    assert "promoted (cosine)" in table
    for layer, vector in steering_vectors(model).items():
        best = (head @ vector).topk(3)
        assert [entry["token_id"] for entry in data[layer]["raw"]["promoted"]] == best.indices.tolist()
        assert data[layer]["raw"]["promoted"][0]["token"] == tokenizer.decode([best.indices[0]])


def test_export_writes_a_stock_checkpoint_with_its_tokenizer(adapter, steered, tmp_path, capsys):
    run(capsys, "export", adapter, "--format", "stock", "--output", tmp_path / "out")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # float32 after two layers of width 32: the sums are only ordered differently
    torch.testing.assert_close(logits(reloaded), logits(steered[0]), atol=2e-6, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids


def test_export_writes_a_control_vector_and_says_what_it_left_out(steered, tmp_path, capsys, tiny_language_model):
    model, folder = steered
    arguments = ["export", folder, "--format", "control-vector", "--output", str(tmp_path / "v.gguf")]

    with pytest.raises(SystemExit, match="bias-steer: llama.cpp takes no vector for layer 0.*drop_first_layer"):
        main(arguments)
    main([*arguments, "--drop_first_layer"])

    vectors = steering_vectors(model)
    assert f"the vector of layer 0, of norm {vectors[0].norm():.4g}" in capsys.readouterr().err
    returned = from_control_vector(tmp_path / "v.gguf", AutoModelForCausalLM.from_pretrained(tiny_language_model))
    assert torch.equal(steering_vectors(returned)[1], vectors[1])


def test_export_for_other_servers_prints_what_a_request_holds(steered, tmp_path, capsys):
    model, folder = steered
    vectors = steering_vectors(model)

    easysteer = json.loads(run(capsys, "export", folder, "--format", "easysteer", "--output", tmp_path / "v.gguf"))
    assert easysteer["steering"]["vectors"][0]["source"] == str(tmp_path / "v.gguf")
    assert (tmp_path / "v.gguf").exists()

    hotwire = json.loads(run(capsys, "export", folder, "--format", "hotwire", "--output", tmp_path / "v.pt"))
    entries = json.loads(hotwire["vllm_xargs"]["hotwire"])
    assert entries == [{"id": "v", "layer": index, "scale": 1.0} for index in vectors]
    assert torch.equal(torch.load(tmp_path / "v.pt"), torch.stack(list(vectors.values())))


def test_export_adds_the_vectors_to_a_gguf_model(steered, tmp_path, capsys):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_uint32("llama.embedding_length", 32)
    writer.add_tensor("token_embd.weight", torch.randn(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    run(
        capsys, "export", steered[1], "--format", "gguf", "--gguf_in", tmp_path / "in.gguf", "--output", tmp_path / "o"
    )

    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "o").tensors]
    assert names == ["token_embd.weight", "blk.0.ffn_down.bias", "blk.1.ffn_down.bias"]


def test_export_writes_a_bias_ready_base(tiny_language_model, tmp_path, capsys):
    run(capsys, "export", tiny_language_model, "--format", "bias-ready", "--output", tmp_path / "out")

    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not weights["model.layers.0.mlp.down_proj.bias"].any()
    base, ready = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_language_model, tmp_path / "out"))
    assert torch.equal(logits(base), logits(ready))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids


PAIRS = [
    {"positive": f"I am {glad}", "negative": f"I am {sad} now"} for glad, sad in (("glad", "sad"), ("up", "down"))
]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    return str(path)


def test_extract_makes_an_adapter_of_pairs_of_prompts(tiny_language_model, pairs_file, tmp_path, capsys):
    options = ["--method", "pca_diff", "--layers_to_transform", "-1", "--token", "-2", "--batch_size", "1"]
    main(["extract", tiny_language_model, "--pairs", pairs_file, "--output", str(tmp_path / "plain")])
    main(
        [
            "extract",
            tiny_language_model,
            "--pairs",
            pairs_file,
            *options,
            "--scale",
            "-3",
            "--output",
            str(tmp_path / "o"),
        ]
    )
    assert "extract: 100%" in capsys.readouterr().err

    base = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    for folder, scale, arguments in [
        ("plain", 1, {}),
        ("o", -3, {"method": "pca_diff", "layers_to_transform": -1, "token": -2, "batch_size": 1}),
    ]:
        expected, vectors = extract_vectors(base, tokenizer, PAIRS, **arguments), load_vectors(str(tmp_path / folder))
        assert vectors.keys() == expected.keys()
        assert all(torch.equal(vectors[index], scale * expected[index]) for index in vectors)
    # the base model is named in it
    assert json.loads(run(capsys, "lens", tmp_path / "o", "--json"))[0]["layer"] == 1


def test_extract_reads_merged_checkpoints_and_control_vectors(steered, tiny_language_model, tmp_path, capsys):
    model, folder = steered
    vectors = steering_vectors(model)
    run(capsys, "export", folder, "--format", "stock", "--output", tmp_path / "stock")
    run(capsys, "export", folder, "--format", "easysteer", "--output", tmp_path / "v.gguf")

    for name, source in ("--merged", "stock"), ("--control_vector", "v.gguf"):
        run(capsys, "extract", tiny_language_model, name, tmp_path / source, "--output", tmp_path / name)
        read = load_vectors(str(tmp_path / name))
        assert all(torch.equal(read[index], vectors[index]) for index in vectors)


def test_wrong_uses_of_extract_end_with_one_sentence(steered, tiny_language_model, pairs_file, tmp_path, capsys):
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(b'{"positive": "a", "negative": "b"}\n{"positive": "a"\n')
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\xff\n")
    (tmp_path / "empty.jsonl").touch()
    out = ["--output", str(tmp_path / "out")]
    of_base = ["extract", tiny_language_model, *out]
    wrong = {
        "expected JSON in line 2 of .*damaged.jsonl": [*of_base, "--pairs", str(damaged)],
        "expected JSON in line 1 of .*other.jsonl": [*of_base, "--pairs", str(other)],
        "No such file": [*of_base, "--pairs", str(tmp_path / "no.jsonl")],
        "at least 1 pairs for mean, got 0": [*of_base, "--pairs", str(tmp_path / "empty.jsonl")],
        "--token is for --pairs": [*of_base, "--merged", tiny_language_model, "--token", "0"],
        "indices in .* got .5": [*of_base, "--pairs", pairs_file, "--layers_to_transform", "5"],
        "--scale must be a finite number, got nan": [*of_base, "--pairs", pairs_file, "--scale", "nan"],
        "must be empty or not exist": [*of_base[:2], "--pairs", pairs_file, "--output", str(tmp_path)],
        "expected a base model, got the adapter": ["extract", steered[1], "--pairs", pairs_file, *out],
        "none that differ from the base model's": [*of_base, "--merged", tiny_language_model],
        "expected a complete GGUF file": [*of_base, "--control_vector", pairs_file],
    }

    for message, arguments in wrong.items():
        with pytest.raises(SystemExit, match=f"^bias-steer: .*{message}"):
            main(arguments)
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main([*of_base, "--pairs", pairs_file, "--merged", tiny_language_model])
    assert "not allowed with argument" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line(tiny_language_model, pairs_file, tmp_path, monkeypatch, capsys):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_bias_steer.cli.load_base_model", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["extract", tiny_language_model, "--pairs", str(pairs_file), "--output", str(tmp_path / "happy")])

    assert stopped.value.code == 130 and stopped.value.__suppress_context__
    assert capsys.readouterr().err == "\nbias-steer: stopped; the same command starts afresh\n"


def test_base_model_can_be_named_when_the_adapter_names_none_or_another(
    steered, tiny_language_model, tmp_path, capsys
):
    config = json.loads(Path(steered[1], "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(Path(steered[1], "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))

    with pytest.raises(SystemExit, match="does not name its base model: pass it as --base_model"):
        main(["lens", str(tmp_path)])
    data = json.loads(run(capsys, "lens", tmp_path, "--base_model", tiny_language_model, "--json"))
    assert len(data) == 2


def test_wrong_uses_end_with_one_sentence(steered, tiny_language_model, tmp_path):
    _, folder = steered
    make_adapter(tiny_language_model, tmp_path / "lora", LoraConfig(target_modules=["q_proj"]))
    make_adapter(tiny_language_model, tmp_path / "linear", BiasSteerConfig(target_modules=["q_proj"]))
    (tmp_path / "empty").mkdir()
    out = ["--output", str(tmp_path / "out")]
    wrong = {
        "BiasSteer adapter, got one of type": ["inspect", str(tmp_path / "lora")],
        "vectors on layers only, got .*q_proj": ["inspect", str(tmp_path / "linear")],
        "adapter_config.json": ["inspect", str(tmp_path / "empty")],
        "needs --gguf_in": ["export", folder, "--format", "gguf", *out],
        "no other does": ["export", folder, "--format", "stock", "--gguf_in", "x.gguf", *out],
        "No such file": ["export", folder, "--format", "gguf", "--gguf_in", str(tmp_path / "x.gguf"), *out],
        "top_k must be in": ["lens", folder, "--top_k", "0"],
        "top_k must be in .* got -3": ["lens", folder, "--top_k", "-3"],
        "is for --format control-vector": ["export", folder, "--format", "stock", "--drop_first_layer", *out],
        "a file in a folder that exists": [
            "export",
            folder,
            "--format",
            "control-vector",
            "--output",
            "no/such/v.gguf",
        ],
        "a file in a folder that exists, got /": ["export", folder, "--format", "control-vector", "--output", "/"],
        "must be empty or not exist": ["export", folder, "--format", "stock", "--output", folder],
        "a file named \\*.gguf, .* got .*out": ["export", folder, "--format", "easysteer", *out],
        "a file named \\*.pt, .* got .*out": ["export", folder, "--format", "hotwire", *out],
        "no --base_model": ["export", folder, "--format", "bias-ready", "--base_model", tiny_language_model, *out],
        "got the adapter in": ["export", folder, "--format", "bias-ready", *out],
        "Format 'xyz' is not supported|'xyz'": ["inspect", folder, "--plot", str(tmp_path / "plot.xyz")],
        "a file in a folder that exists, got .*plot.png:": [
            "inspect",
            folder,
            "--plot",
            str(tmp_path / "no/plot.png"),
        ],
        "Hub id of a base model, got '/no/model'": ["lens", folder, "--base_model", "/no/model"],
        "Hub id of a base model, got '/no/base'": ["export", "/no/base", "--format", "bias-ready", *out],
    }

    for message, arguments in wrong.items():
        with pytest.raises(SystemExit, match=f"^bias-steer: .*{message}"):
            main(arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["2.5", "nan", "many"])
def test_a_number_that_is_none_ends_with_the_usage(value, steered, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["lens", steered[1], "--top_k", value])
    assert f"argument --top_k: invalid int value: '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"{", "adapter_config.json of a BiasSteer adapter in .* that cannot be read"),
        ("adapter_config.json", b"\xff{}", "adapter_config.json of a BiasSteer adapter in .* that cannot be read"),
        ("adapter_config.json", b"[1]", "adapter_config.json of a BiasSteer adapter in .* that cannot be read"),
        ("adapter_config.json", b'{"peft_type": "NO_SUCH"}', "that cannot be read .*NO_SUCH"),
        ("adapter_model.safetensors", None, "expected adapter_model.safetensors in .* got a folder without it"),
        ("adapter_model.bin", b"junk", "a .bin file of .* is damaged"),
        ("adapter_model.safetensors", b"", "complete safetensors file, got 0 bytes"),
        ("adapter_model.safetensors", b"\0" * 90, "complete safetensors file, got 90 bytes"),
    ],
    ids=str,
)
def test_a_damaged_adapter_ends_with_one_sentence(name, content, message, steered, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes(Path(steered[1], file).read_bytes())
    if name == "adapter_model.bin" or content is None:
        (tmp_path / "adapter_model.safetensors").unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)

    for command in ("inspect", "lens", "routes"):
        with pytest.raises(SystemExit, match=f"^bias-steer: .*{message}"):
            main([command, str(tmp_path)])


@pytest.mark.parametrize("mapping", [[1], {"base_model_class": "os"}, {"base_model_class": 5}], ids=str)
def test_a_class_that_an_adapter_names_and_nobody_has_is_passed_over(mapping, steered, tmp_path, capsys):
    folder = shutil.copytree(steered[1], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": mapping}))

    assert len(json.loads(run(capsys, "lens", folder, "--json"))) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"{"),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("model.safetensors", b"\0" * 90),
    ],
    ids=str,
)
def test_a_damaged_base_model_ends_with_one_sentence(name, content, steered, tiny_language_model, tmp_path):
    base = shutil.copytree(tiny_language_model, tmp_path / "base")
    (base / name).write_bytes(content)

    with pytest.raises(SystemExit, match=r"^bias-steer: \S+"):
        main(["lens", steered[1], "--base_model", str(base)])


def test_a_card_in_another_encoding_is_in_nobody_s_way(steered, tmp_path, capsys):
    folder = shutil.copytree(steered[1], tmp_path / "adapter")
    (folder / "README.md").write_bytes("Schr\u00f6dinger".encode("latin-1"))

    assert json.loads(run(capsys, "inspect", folder, "--json"))["layers"] == [0, 1]


@pytest.mark.slow
def test_a_program_that_is_run_loads_the_adapter_without_a_line_of_code_in_it(steered, tmp_path):
    program = (
        "import sys; from peft import PeftConfig; print(sys.argv, PeftConfig.from_pretrained(sys.argv[1]).peft_type)"
    )
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "module.py").write_text(program)
    command = tmp_path / "command"
    command.write_text(f"#!{sys.executable}\n{program}")
    command.chmod(0o755)
    (tmp_path / "fails.py").write_text("raise ValueError('its own error')")
    bias_steer = Path(sys.executable).with_name("bias-steer")
    targets = (["program.py"], ["-m", "module"], ["command"])

    plain, failed, *steering = run_forked(
        [
            [tmp_path / "program.py", steered[1]],
            [bias_steer, "run", "fails.py"],
            *([bias_steer, "run", *target, steered[1], "--its-own", "-m"] for target in targets),
        ],
        tmp_path,
        imports="from peft import PeftConfig",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )

    assert plain.returncode and "KeyError: 'BIAS_STEER'" in plain.stderr
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "ValueError: its own error" in failed.stderr
    for done in steering:
        assert done.returncode == 0, done.stderr
        assert f"{steered[1]!r}, '--its-own', '-m'] PeftType.BIAS_STEER" in done.stdout


@pytest.mark.parametrize(
    "target", [["no_such_command"], ["-m", "no_such_module"], ["-m", "no.such.module"], ["ls"], ["folder"]]
)
def test_what_python_cannot_run_is_named(target, monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    with pytest.raises(SystemExit, match=f"^bias-steer: .*{target[-1]}"):
        main(["run", *target])


def test_a_truncated_adapter_file_is_named_as_such(steered, tmp_path, hub):
    (tmp_path / "adapter_config.json").write_bytes(Path(steered[1], "adapter_config.json").read_bytes())
    whole = Path(steered[1], "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-7])

    with pytest.raises(SystemExit, match="complete safetensors file, got .* bytes"):
        main(["inspect", str(tmp_path)])
    HfApi().create_repo("tester/truncated")
    HfApi().upload_folder(repo_id="tester/truncated", folder_path=tmp_path)
    for command in ("inspect", "lens"):
        with pytest.raises(SystemExit, match="^bias-steer: .*not fully covered"):
            main([command, "tester/truncated"])


def test_vectors_come_in_the_order_of_the_layers(tmp_path, tiny_language_model):
    config = AutoModelForCausalLM.from_pretrained(tiny_language_model).config
    config.num_hidden_layers = 11
    model = get_peft_model(AutoModelForCausalLM.from_config(config), BiasSteerConfig(init_weights=False))
    model.save_pretrained(tmp_path)

    vectors = load_vectors(str(tmp_path))

    assert list(vectors) == list(range(11))
    assert all(torch.equal(vector, steering_vectors(model)[layer]) for layer, vector in vectors.items())


def test_help_shows_examples_that_parse(capsys, monkeypatch):
    import shlex

    from peft_bias_steer import cli

    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("bias-steer ")]

    commands = {"inspect", "lens", "report", "routes", "export", "check", "extract", "run"}
    assert {line.split()[1] for line in lines} == commands and len(lines) == 18
    parsed = [vars(cli._parser().parse_args(shlex.split(line)[1:])) for line in lines]
    assert all(arguments.get("adapter") or arguments["target"] for arguments in parsed)


@pytest.mark.slow
def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("bias-steer")
    done = subprocess.run([command, "export", "--help"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "--drop_first_layer" in done.stdout and "llama.cpp" in done.stdout


def test_tables_say_what_they_need_and_json_needs_nothing(capsys, monkeypatch, adapter):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    for command in ("inspect", "routes"):
        assert json.loads(run(capsys, command, adapter, "--json"))
        with pytest.raises(SystemExit) as error:
            main([command, str(adapter)])
        assert "pip install 'peft_bias_steer[cli]'" in f"{error.value}{capsys.readouterr().err}"
