"""Push to a hub, load by id in a fresh process, get equal numbers: with our packages hidden where remote code serves."""

import re

import pytest
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_bias_steer
from hf_based_kernel import RebasedConfig, RebasedForCausalLM
from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel


IDS = torch.arange(24).reshape(2, 12)
USE = """
import torch, transformers
from safetensors.torch import load_file, save_file
model = transformers.{auto_class}.from_pretrained("{repo_id}"{arguments})
with torch.no_grad():
    output = model(**load_file("inputs.safetensors"))
save_file({{"output": output.{field}}}, "output.safetensors")
print(type(model).__module__)
"""


def rebased(tokenizer):
    config = RebasedConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        feature_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return RebasedForCausalLM(config).eval()


REMOTE = {
    "sae": {
        "build": lambda _: HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=64, k=8)).eval(),
        "inputs": {"hidden_states": torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))},
        "auto_class": "AutoModel",
        "field": "reconstruction",
    },
    "rebased": {
        "build": rebased,
        "inputs": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        "auto_class": "AutoModelForCausalLM",
        "field": "logits",
    },
}


@pytest.fixture(scope="module", params=REMOTE)
def pushed(request, tiny_language_model):
    """Repository id of a model that was pushed with its remote code, what to feed it, and its own output."""
    case, repo_id = REMOTE[request.param], f"tester/{request.param}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    model = case["build"](tokenizer)
    model.push_to_hub(repo_id)
    if request.param == "rebased":
        tokenizer.push_to_hub(repo_id)
    with torch.no_grad():
        return repo_id, case, model(**case["inputs"])[case["field"]]


@pytest.mark.parametrize("name", REMOTE)
def test_an_older_model_in_another_number_of_pieces_is_not_loaded(name, tiny_language_model, hub, tmp_path):
    case, repo_id = REMOTE[name], f"tester/pieces-{name}"
    for options in ({}, {"max_shard_size": "10KB"}, {"max_shard_size": "5KB"}, {}):
        model = case["build"](AutoTokenizer.from_pretrained(tiny_language_model))
        model.push_to_hub(repo_id, **options)
        model.save_pretrained(tmp_path, **options)
        for place in (repo_id, tmp_path):
            loaded = type(model).from_pretrained(place)
            assert all(torch.equal(weight, model.state_dict()[key]) for key, weight in loaded.state_dict().items())
    assert [file for file in hub.files(repo_id) if "safetensors" in file] == ["model.safetensors"]
    assert [path.name for path in tmp_path.glob("*safetensors*")] == ["model.safetensors"]


@pytest.mark.slow
def test_remote_code_gives_bit_equal_outputs_without_our_package(pushed, run_isolated, tmp_path):
    repo_id, case, expected = pushed
    save_file(case["inputs"], tmp_path / "inputs.safetensors")

    names = {"repo_id": repo_id, "auto_class": case["auto_class"], "field": case["field"]}
    module = run_isolated(USE.format(arguments=", trust_remote_code=True", **names))

    assert module.startswith("transformers_modules.")
    assert torch.equal(load_file(tmp_path / "output.safetensors")["output"], expected)


@pytest.mark.slow
def test_remote_code_is_refused_without_trust(pushed, run_isolated):
    repo_id, case, _ = pushed
    names = {"repo_id": repo_id, "auto_class": case["auto_class"], "field": case["field"]}

    with pytest.raises(RuntimeError, match="trust_remote_code=True"):
        run_isolated(USE.format(arguments="", **names))


def test_hub_holds_safetensors_and_code_and_no_pickle(pushed, hub):
    files = hub.files(pushed[0])

    assert "model.safetensors" in files
    assert {"config.json", "README.md"} <= set(files)
    assert {name.rpartition(".")[2] for name in files} <= {"safetensors", "json", "py", "md", "gitattributes", "jinja"}


@pytest.mark.slow
def test_snippet_of_the_model_card_runs_without_our_package(pushed, hub, run_isolated):
    card = hub.files(pushed[0])["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)

    assert snippets and pushed[0] in snippets[0]
    run_isolated("\n".join(snippets))


def test_a_second_push_keeps_the_card_and_replaces_its_metrics(tiny_language_model):
    language_model = rebased(AutoTokenizer.from_pretrained(tiny_language_model))
    for model in (language_model, HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=64, k=8))):
        repo_id = f"tester/again-{model.config.model_type}"
        metrics = [EvalResult("text-generation", "sums", "Sums", "accuracy", value) for value in (0.25, 0.75)]
        model.push_to_hub(repo_id, metrics=metrics[:1])
        first = ModelCard.load(repo_id)
        first.text += "Mine\n"
        first.push_to_hub(repo_id)
        model.add_model_tags(["ours"])
        model.push_to_hub(repo_id, metrics=metrics[1:])

        second = ModelCard.load(repo_id)
        assert first.data.eval_results == metrics[:1] and second.data.eval_results == metrics[1:]
        assert second.data.tags == [*first.data.tags, "ours"]
        assert second.text == first.text and second.data.model_name == repo_id.rpartition("/")[2]


def test_a_pull_request_leaves_the_branch_as_it_is(tiny_language_model, hub):
    language_model = rebased(AutoTokenizer.from_pretrained(tiny_language_model))
    metric = EvalResult("text-generation", "sums", "Sums", "accuracy", 0.5)
    for model in (language_model, HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=64, k=8))):
        repo_id = f"tester/theirs-{model.config.model_type}"
        HfApi().create_repo(repo_id)
        model.push_to_hub(repo_id, create_pr=True, metrics=[metric], tags=["mine"])
        model.push_to_hub(repo_id, revision="v2")

        assert not hub.files(repo_id) and len(hub.repos["models", repo_id].commits) == 3
        card = ModelCard(hub.files(repo_id, revision="refs/pr/1")["README.md"].decode())
        assert card.data.eval_results == [metric] and "mine" in card.data.tags
        assert {"model.safetensors", "README.md"} <= set(hub.files(repo_id, revision="v2"))


@pytest.fixture(scope="module")
def pushed_adapter(tiny_language_model):
    """Ids of a base model and of an adapter with non-zero vectors on the hub, and the steered logits."""
    HfApi().create_repo("tester/base", exist_ok=True)
    HfApi().upload_folder(repo_id="tester/base", folder_path=tiny_language_model)
    base = AutoModelForCausalLM.from_pretrained("tester/base")
    config = peft_bias_steer.BiasSteerConfig(init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    model.push_to_hub("tester/adapter")
    with torch.no_grad():
        return "tester/adapter", model(IDS).logits


ADAPTER = """
import peft_bias_steer, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
model = AutoPeftModelForCausalLM.from_pretrained("tester/adapter")
with torch.no_grad():
    save_file({"output": model(torch.arange(24).reshape(2, 12)).logits}, "output.safetensors")
"""


@pytest.mark.slow
def test_adapter_is_loaded_by_id_in_a_fresh_process(pushed_adapter, run_isolated, tmp_path):
    run_isolated(ADAPTER, visible=["peft_bias_steer"])

    assert torch.equal(load_file(tmp_path / "output.safetensors")["output"], pushed_adapter[1])


def test_adapter_on_the_hub_is_one_safetensors_file(pushed_adapter, hub):
    files = hub.files(pushed_adapter[0])

    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {name for name in files if not name.startswith(".")} == expected


@pytest.mark.slow
def test_snippet_of_the_pushed_adapter_s_card_runs(pushed_adapter, hub, run_isolated):
    card = hub.files(pushed_adapter[0])["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)

    assert 'from_pretrained("tester/adapter")' in snippet
    run_isolated(snippet, visible=["peft_bias_steer"])


def test_card_of_a_pushed_adapter_says_what_it_is_and_keeps_what_others_wrote(pushed_adapter, hub, tmp_path):
    repo_id = pushed_adapter[0]
    card = ModelCard.load(repo_id)
    assert card.data.library_name == "peft" and card.data.base_model == "tester/base"
    assert {"bias-steer", "base_model:adapter:tester/base"} <= set(card.data.tags)
    card.text = f"# Mine\n{card.text}"
    card.push_to_hub(repo_id)

    # a base in a folder has no name that the Hub would take
    AutoModelForCausalLM.from_pretrained("tester/base").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(base, peft_bias_steer.BiasSteerConfig(task_type="CAUSAL_LM"))
    metrics = [EvalResult("text-generation", "sums", "Sums", "accuracy", value) for value in (0.25, 0.75)]
    before = len(hub.repos["models", repo_id].commits)
    for metric in metrics:
        model.push_to_hub(repo_id, tags=["mine"], metrics=[metric], revision="other")

    assert len(hub.repos["models", repo_id].commits) == before + 2
    card = ModelCard(hub.files(repo_id, revision="other")["README.md"].decode())
    assert card.text.startswith("# Mine\n") and card.text.count("import peft_bias_steer") == 1
    assert card.data.base_model is None and {"bias-steer", "mine"} <= set(card.data.tags)
    assert not [tag for tag in card.data.tags if str(tmp_path) in tag]
    assert card.data.model_name == "adapter" and card.data.eval_results == metrics[1:]


def test_an_adapter_of_a_name_of_its_own_is_pushed_with_a_card_that_loads_it(tiny_language_model, hub):
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)  # in a folder, which the hub takes in no card
    config = peft_bias_steer.BiasSteerConfig(task_type="CAUSAL_LM")
    get_peft_model(base, config, adapter_name="math").push_to_hub("tester/math")
    card = hub.files("tester/math")["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]

    assert 'from_pretrained(base_model, "tester/math", subfolder="math")\n' in snippet
    loaded = {"base_model": AutoModelForCausalLM.from_pretrained(tiny_language_model)}
    exec(snippet, loaded)
    assert loaded["model"].peft_config["default"].target_modules == config.target_modules


def test_other_methods_are_pushed_as_before(pushed_adapter, hub):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("tester/base"), LoraConfig(task_type="CAUSAL_LM"))
    model.push_to_hub("tester/lora")

    assert "peft_bias_steer" not in hub.files("tester/lora")["README.md"].decode()
