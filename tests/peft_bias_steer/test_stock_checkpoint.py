"""Checkpoints of stock classes: complete, in the base's dtype, with its tokenizer, or not written at all."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from peft_bias_steer import (
    BiasSteerConfig,
    bias_ready_checkpoint,
    export_stock_checkpoint,
    prepare_for_vllm,
    set_steering_vectors,
    steering_vectors,
)
from tests.peft_bias_steer.tiny_models import CLOSE, GPT2, INPUT_IDS, SMALL, logits, make_base, steer


HEARS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
ENDS_IN_EOS = torch.tensor([[5, 9, 3, 2], [7, 7, 4, 2]])


def test_all_active_adapters_are_exported_at_their_scale(tmp_path):
    model = steer(make_base())
    model.add_adapter("second", BiasSteerConfig(init_weights=False, layers_to_transform=[1]))
    model.base_model.set_adapter(["default", "second"])
    model.base_model.set_scale("second", -0.5)

    export_stock_checkpoint(model, tmp_path)

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), **CLOSE)


def test_merged_models_can_be_exported_too(tmp_path):
    model = steer(make_base("mistral", **SMALL, sliding_window=None))
    expected = logits(model)
    model.merge_adapter()

    export_stock_checkpoint(model, tmp_path / "merged")
    assert model.base_model.model.model.layers[0].bias_steer.merged
    export_stock_checkpoint(model.merge_and_unload(), tmp_path / "unloaded")

    for folder in ("merged", "unloaded"):
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), expected, **CLOSE)


def test_bfloat16_checkpoint_keeps_its_dtype_and_every_bias(tmp_path):
    base = make_base("qwen2", **SMALL).to(torch.bfloat16)
    model = steer(base)

    export_stock_checkpoint(model, tmp_path)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    for index, vector in steering_vectors(model).items():
        assert torch.equal(reloaded.model.layers[index].mlp.down_proj.bias, vector.bfloat16())


def test_generation_config_and_tokenizer_travel_along(tiny_language_model, tmp_path):
    qwen = make_base("qwen2", **{**SMALL, "vocab_size": 259})
    qwen.generation_config.max_new_tokens = 7
    qwen.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_language_model).save_pretrained(tmp_path / "base")
    model = steer(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))

    export_stock_checkpoint(model, tmp_path / "out")

    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    chat = [{"role": "user", "content": "Hello, wörld 12"}]
    assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)
    assert before("Hello, wörld 12") == after("Hello, wörld 12")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.generation_config.max_new_tokens == 7
    assert (
        reloaded.generate(INPUT_IDS, do_sample=False).tolist()
        == model.generate(input_ids=INPUT_IDS, do_sample=False).tolist()
    )


def test_a_model_that_hears_keeps_what_prepares_its_sounds(tmp_path):
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in HEARS.items()}
    config = WhisperConfig(
        **sizes, vocab_size=259, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=40, **TOKENS
    )
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    WhisperFeatureExtractor(feature_size=8, n_fft=40, chunk_length=1).save_pretrained(tmp_path / "base")
    model = steer(WhisperForConditionalGeneration.from_pretrained(tmp_path / "base"))

    export_stock_checkpoint(model, tmp_path / "out")

    sound = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": INPUT_IDS}
    with torch.no_grad():
        expected, got = (
            m(**sound).logits for m in (model, AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out"))
        )
    torch.testing.assert_close(got, expected, **CLOSE)
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "out").feature_size == 8


def test_checkpoint_is_sharded_safetensors_without_pickles(tmp_path):
    model = steer(make_base())

    export_stock_checkpoint(model, tmp_path, max_shard_size="20KB")

    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in names and len(names) > 4
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), **CLOSE)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match="must be empty"):
        export_stock_checkpoint(steer(make_base()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_weights_of_another_adapter_are_not_exported_by_halves(tmp_path):
    base = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])).base_model.model

    with pytest.raises(ValueError, match="no stock class has the weights.*base_layer"):
        export_stock_checkpoint(steer(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path):
    model = steer(make_base())
    model.config.quantization_config = {"quant_method": "bitsandbytes"}

    with pytest.raises(ValueError, match="not quantised, got .*bitsandbytes"):
        export_stock_checkpoint(model, tmp_path / "out")


def test_a_checkpoint_that_does_not_reload_to_the_same_logits_is_not_delivered(tmp_path, monkeypatch):
    model = steer(make_base())
    save = transformers.LlamaForCausalLM.save_pretrained

    def save_with_one_bit_of_damage(self, *args, **kwargs):
        self.model.layers[1].mlp.down_proj.bias.data[3] += 1
        return save(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", save_with_one_bit_of_damage)
    with pytest.raises(RuntimeError, match="should give the model's output within .*nothing was written"):
        export_stock_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForQuestionAnswering"])
def test_models_without_logits_of_words_are_exported_too(tmp_path, auto_class):
    sizes = {name: SMALL[name] for name in SMALL if name != "num_key_value_heads"}
    base = getattr(transformers, auto_class).from_config(transformers.BertConfig(**sizes))
    model = steer(base)

    export_stock_checkpoint(model.train(), tmp_path)

    assert model.training
    reloaded = type(base).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, got = model.eval()(INPUT_IDS), reloaded(INPUT_IDS)
    assert len(got) == 2  # starts and ends of answers, or hidden and pooled states
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


def test_a_classifier_of_what_ends_a_text_is_exported(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 64}
    more = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    model = steer(transformers.BartForSequenceClassification(transformers.BartConfig(**sizes, **more)).eval())
    export_stock_checkpoint(model, tmp_path / "stock")
    stock = transformers.BartForSequenceClassification.from_pretrained(tmp_path / "stock").eval()

    torch.testing.assert_close(logits(stock, ENDS_IN_EOS), logits(model, ENDS_IN_EOS), **CLOSE)


@pytest.mark.parametrize("model_type, stock_class", [("llama", "LlamaForCausalLM"), ("mistral", "LlamaForCausalLM"),
                                                     ("phi3", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])  # fmt: skip
def test_bias_ready_checkpoint_is_the_base_with_places_for_the_vectors(model_type, stock_class, tmp_path):
    config = GPT2 if model_type == "gpt2" else {**SMALL, "sliding_window": None}
    base = make_base(model_type, **config)
    names = set(base.state_dict())

    bias_ready_checkpoint(base, tmp_path)

    assert set(base.state_dict()) == names
    ready = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ready).__name__ == stock_class
    torch.testing.assert_close(logits(ready), logits(base), **CLOSE)
    model = steer(ready)
    before = {name for name, _ in ready.named_parameters()}
    model.merge_adapter()
    assert {name for name, _ in ready.named_parameters()} == before, "the merge adds no parameter that is not there"


def test_bias_ready_checkpoint_of_an_architecture_without_a_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a norm after the MLP"):
        bias_ready_checkpoint(make_base("olmo2", **SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_finds_no_space_leaves_nothing_behind(tmp_path, small_files):
    model = steer(make_base())
    bases = {"bias-ready": make_base(), "plugin": make_base("qwen3", **SMALL)}

    # what is written first is small; the weights are not
    for write in (
        lambda folder: export_stock_checkpoint(model, folder),
        lambda folder: bias_ready_checkpoint(bases["bias-ready"], folder),
        lambda folder: prepare_for_vllm(bases["plugin"], folder),
    ):
        with small_files(5000), pytest.raises((OSError, SafetensorError), match="File too large|I/?O"):
            write(tmp_path / "out")
        assert not list(tmp_path.iterdir())
    assert not any(layer.merged for layer in model.base_model.steering_layers.values())


@pytest.mark.slow
def test_stock_checkpoint_of_a_real_model_generates_the_same_text(smollm2, tmp_path):
    model = steer(AutoModelForCausalLM.from_pretrained(smollm2))
    # about the size that training finds: 1 % of the residual stream
    set_steering_vectors(model, {i: v / 12 for i, v in steering_vectors(model).items()})
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")

    export_stock_checkpoint(model, tmp_path)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mlp_bias"] is True
    arguments = {**prompt, "do_sample": False, "max_new_tokens": 12}
    assert reloaded.generate(**arguments).tolist() == model.generate(**arguments).tolist()
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello 12").input_ids == tokenizer("Hello 12").input_ids
