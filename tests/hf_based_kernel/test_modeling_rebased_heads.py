"""Heads other than the language model's: for every token, and for the ends of an answer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from hf_based_kernel import (
    RebasedConfig,
    RebasedForCausalLM,
    RebasedForQuestionAnswering,
    RebasedForTokenClassification,
)


OPTIONS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "linear_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "feature_dim": 4,
    "sliding_window": 5,
    "num_labels": 3,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
HEADS = {
    RebasedForTokenClassification: (AutoModelForTokenClassification, "score"),
    RebasedForQuestionAnswering: (AutoModelForQuestionAnswering, "qa_outputs"),
}
heads = pytest.mark.parametrize("model_class", HEADS)


def tiny_config(**options):
    return RebasedConfig(**{**copy.deepcopy(OPTIONS), **options})


def tokens(*shape):
    return torch.randint(2, 64, shape)


def answers(outputs):
    """(batch, seq, labels), of either head."""
    return outputs.logits if "logits" in outputs else torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


def test_every_token_is_classified_by_what_was_before_it():
    model, input_ids = RebasedForTokenClassification(tiny_config()).eval(), tokens(2, 9)
    labels = torch.randint(3, (2, 9))
    labels[0, :4] = -100
    outputs = model(input_ids, labels=labels)
    expected = model.score(model.model(input_ids).last_hidden_state)
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(expected.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(model(input_ids[:, :5]).logits, expected[:, :5], rtol=1e-4, atol=1e-5)


def test_dropout_before_the_classifier_is_that_of_the_configuration():
    assert RebasedForTokenClassification(tiny_config()).dropout.p == 0.1
    assert RebasedForTokenClassification(tiny_config(classifier_dropout=None)).dropout.p == 0.1
    assert RebasedForTokenClassification(tiny_config(classifier_dropout=0.0)).dropout.p == 0.0


def test_an_answer_has_a_start_and_an_end():
    model, input_ids = RebasedForQuestionAnswering(tiny_config()).eval(), tokens(2, 9)
    starts, ends = torch.tensor([1, 4]), torch.tensor([3, 8])
    outputs = model(input_ids, start_positions=starts, end_positions=ends)
    logits = model.qa_outputs(model.model(input_ids).last_hidden_state)
    torch.testing.assert_close(answers(outputs), logits)
    expected = (F.cross_entropy(logits[..., 0], starts) + F.cross_entropy(logits[..., 1], ends)) / 2
    torch.testing.assert_close(outputs.loss, expected)


@heads
def test_padding_does_not_change_the_answers(model_class):
    model, input_ids = model_class(tiny_config()).eval(), tokens(1, 6)
    mask = F.pad(torch.ones_like(input_ids), (3, 0))
    got = answers(model(F.pad(input_ids, (3, 0)), attention_mask=mask))[:, 3:]
    torch.testing.assert_close(got, answers(model(input_ids)), rtol=1e-4, atol=1e-5)


@heads
def test_every_parameter_learns(model_class):
    model, input_ids = model_class(tiny_config(classifier_dropout=0.0)).train(), tokens(2, 9)
    marks = {"labels": input_ids % 3} if model_class is RebasedForTokenClassification else {}
    marks = marks or {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 8])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids, **marks).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@heads
def test_a_causal_checkpoint_gets_a_new_head_and_keeps_its_decoder(tmp_path, model_class):
    auto_class, head = HEADS[model_class]
    causal = RebasedForCausalLM(tiny_config()).eval()
    causal.save_pretrained(tmp_path / "causal")
    model, info = auto_class.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert isinstance(model, model_class)
    assert set(info["missing_keys"]) == {f"{head}.weight", f"{head}.bias"}
    input_ids = tokens(2, 7)
    assert torch.equal(model.model(input_ids)[0], causal.model(input_ids)[0])

    model.save_pretrained(tmp_path / "new")
    loaded = auto_class.from_pretrained(tmp_path / "new")
    assert torch.equal(answers(loaded(input_ids)), answers(model(input_ids)))

    tensors = load_file(tmp_path / "new" / "model.safetensors")
    del tensors[f"{head}.bias"]
    save_file(tensors, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors of {model_class.__name__}: {head}.bias"):
        auto_class.from_pretrained(tmp_path / "new")


@heads
def test_embeddings_are_replaced_in_the_decoder(model_class):
    model = model_class(tiny_config())
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert answers(model(torch.tensor([[69]]))).shape == (1, 1, 3 if "TokenClass" in model_class.__name__ else 2)


def test_the_pipeline_labels_tokens_as_the_model_does(tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    config = tiny_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = RebasedForTokenClassification(config).eval()
    entities = pipeline("token-classification", model=model, tokenizer=tokenizer)("good", ignore_labels=[])
    ids = tokenizer("good", return_tensors="pt")["input_ids"]
    expected = model(ids).logits.softmax(-1).max(-1)
    assert [x["entity"] for x in entities] == [f"LABEL_{i}" for i in expected.indices[0].tolist()]
    assert [x["score"] for x in entities] == pytest.approx(expected.values[0].tolist(), rel=1e-4)
