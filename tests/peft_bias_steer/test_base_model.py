"""Adapters of every kind that PEFT loads: on a vision-language model, a classifier, an encoder and a decoder, with a head."""

import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    BertConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen2VLConfig,
    T5Config,
)

from peft_bias_steer import BiasSteerConfig, from_control_vector, steering_vectors
from peft_bias_steer.analysis import vector_statistics
from peft_bias_steer.cli import main
from peft_bias_steer.serving.base_model import find_base_model, load_base_model, load_steered_model
from tests.conftest import byte_tokenizer
from tests.peft_bias_steer.tiny_models import CLOSE


SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
VISION = {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 4}
BASES = {
    "causal": (AutoModelForCausalLM, LlamaConfig(**SIZES)),
    "vision": (AutoModelForImageTextToText, Qwen2VLConfig(text_config={**SIZES, **ROPE}, vision_config=VISION)),
    "classifier": (AutoModelForSequenceClassification, LlamaConfig(**SIZES, num_labels=5)),
    "encoder": (AutoModelForSequenceClassification, BertConfig(**SIZES, num_labels=3)),
    "seq2seq": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
}
TASKS = {"classifier": "SEQ_CLS", "encoder": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}
INPUT_IDS = torch.arange(3, 23).view(2, 10)


def logits(model) -> torch.Tensor:
    inputs = {"input_ids": INPUT_IDS, **({"decoder_input_ids": INPUT_IDS} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def save(tmp_path):
    """Saves a base and a random adapter on it; returns the steered model and the adapter's folder."""

    def save(kind: str, **options) -> tuple[PeftModel, str]:
        auto_class, config = BASES[kind]
        torch.manual_seed(0)
        base = auto_class.from_config(config)
        if kind in ("classifier", "encoder"):  # a checkpoint as it is found: without the head
            auto_class = {"classifier": AutoModelForCausalLM}.get(kind, auto_class)
            auto_class.from_config(config).save_pretrained(tmp_path / "base")
        else:
            base.save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base", num_labels=getattr(config, "num_labels", None) or 2)
        model = get_peft_model(
            base, BiasSteerConfig(**{"task_type": TASKS.get(kind), "init_weights": False, **options})
        )
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "adapter")
        return model.eval(), str(tmp_path / "adapter")

    return save


CASES = [
    ("causal", {}),
    ("causal", {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}),
    ("vision", {}),
    ("vision", {"task_type": "CAUSAL_LM"}),
    ("classifier", {}),
    ("encoder", {}),
    ("seq2seq", {}),
    ("seq2seq", {"task_type": None}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_any_adapter_is_loaded_on_a_base_of_its_own_class(kind, options, save):
    model, folder = save(kind, **options)

    loaded = load_steered_model(folder)

    assert type(loaded.get_base_model()) is type(model.get_base_model()) and not loaded.training
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    skeleton, _ = find_base_model(folder)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_any_adapter_is_inspected_and_has_routes(kind, options, save, capsys):
    model, folder = save(kind, **options)

    main(["inspect", folder, "--json"])
    inspected = json.loads(capsys.readouterr().out)
    main(["inspect", folder])
    table = capsys.readouterr().out
    main(["routes", folder, "--json"])
    routes = {route["name"]: route for route in json.loads(capsys.readouterr().out)}

    assert inspected["norms"] == pytest.approx(vector_statistics(steering_vectors(model)).norms)
    heads = {"classifier": "score", "encoder": "classifier"}.get(kind) or (options.get("modules_to_save") or [""])[0]
    assert inspected["trained_modules"] == ([heads] if heads else [])
    assert (f"trained whole beside the vectors, and not in these numbers: {heads}" in table) is bool(heads)
    assert routes["transformers, adapter"]["exact"]
    is_generator = kind not in ("classifier", "encoder")
    assert ("generate" in routes["transformers, one adapter per row"]["reason"]) is is_generator
    if heads:
        assert f"vectors alone, and {heads} was trained too" in routes["llama.cpp, control vector"]["reason"]


@pytest.mark.parametrize("kind", ["vision", "seq2seq"])
def test_lens_reads_models_that_read_more_than_text(kind, save, capsys):
    model, folder = save(kind)

    main(["lens", folder, "--json", "--top_k", "2"])

    head = model.get_base_model().get_output_embeddings().weight
    data = json.loads(capsys.readouterr().out)
    for layer, vector in steering_vectors(model).items():
        best = (head @ vector).topk(2).indices.tolist()
        assert [entry["token_id"] for entry in data[layer]["raw"]["promoted"]] == best


def test_a_vision_language_adapter_is_exported_as_a_control_vector(save, tmp_path):
    model, folder = save("vision")

    main(["export", folder, "--format", "control-vector", "--output", str(tmp_path / "v.gguf"), "--drop_first_layer"])

    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    returned = from_control_vector(tmp_path / "v.gguf", base)
    assert torch.equal(steering_vectors(returned)[1], steering_vectors(model)[1])
    with pytest.raises(SystemExit, match="no stock class computes what Qwen2VLForConditionalGeneration"):
        main(["export", folder, "--format", "stock", "--output", str(tmp_path / "out")])


def test_a_stock_checkpoint_of_a_vision_language_model_has_its_processor(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, image = LlamaConfig(**SIZES), CLIPVisionConfig(**vision, image_size=30, patch_size=10)
    config = LlavaConfig(text_config=text, vision_config=image, image_token_id=5)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    LlavaProcessor(CLIPImageProcessorPil(), byte_tokenizer(), patch_size=10).save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, BiasSteerConfig(init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")

    main(["export", str(tmp_path / "adapter"), "--format", "stock", "--output", str(tmp_path / "out")])

    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(model), **CLOSE)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "out"), LlavaProcessor)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_trained_head_goes_into_the_stock_checkpoint(kind, save, tmp_path):
    options = {"modules_to_save": ["lm_head"]} if kind == "causal" else {}
    model, folder = save(kind, **options)

    main(["export", folder, "--format", "stock", "--output", str(tmp_path / "out")])

    stock = type(model.get_base_model()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(model), **CLOSE)


@pytest.mark.parametrize("form", ["control-vector", "gguf"])
def test_a_trained_head_is_not_left_out_of_a_file_of_vectors_in_silence(form, save, tmp_path):
    _, folder = save("causal", modules_to_save=["lm_head"])
    (tmp_path / "in.gguf").write_bytes(b"GGUF")
    source = ["--gguf_in", str(tmp_path / "in.gguf")] if form == "gguf" else ["--drop_first_layer"]

    with pytest.raises(SystemExit, match="holds vectors alone, and this adapter trained lm_head too"):
        main(["export", folder, "--format", form, "--output", str(tmp_path / "v.gguf"), *source])
    assert not (tmp_path / "v.gguf").exists()


def test_a_head_that_is_tied_to_the_embeddings_is_refused(tmp_path):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, BiasSteerConfig(modules_to_save=["lm_head"])).save_pretrained(tmp_path / "adapter")

    with pytest.raises(SystemExit, match="trained lm_head, which this base model ties to its other embedding"):
        main(["export", str(tmp_path / "adapter"), "--format", "stock", "--output", str(tmp_path / "out")])


def test_another_base_is_named_as_the_wrong_one(save, tmp_path):
    _, folder = save("vision")
    AutoModelForCausalLM.from_config(BASES["causal"][1]).save_pretrained(tmp_path / "other")

    sentence = "expected a base model with the modules ['model.language_model.layers.0'"
    for command in (["lens"], ["routes"], ["export", "--format", "stock", "--output", str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match=f"^bias-steer: {re.escape(sentence)}.*LlamaForCausalLM"):
            main([command[0], folder, "--base_model", str(tmp_path / "other"), *command[1:]])


def test_an_adapter_is_no_base_model(save, tmp_path):
    _, folder = save("vision")

    assert type(load_base_model(str(tmp_path / "base"))).__name__ == "Qwen2VLForConditionalGeneration"
    with pytest.raises(ValueError, match="expected a base model, got the adapter in"):
        load_base_model(folder)
