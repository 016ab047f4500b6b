"""The model card: what it claims, and that measurements are kept in its metadata; tests/test_hub.py pushes it."""

import pytest
from huggingface_hub import EvalResult

from hf_based_kernel import RebasedConfig, RebasedForCausalLM, RebasedModel
from hf_based_kernel.model_card_rebased import set_metrics


def make_model(model_class=RebasedForCausalLM, **options):
    layer_types = ["conv", "linear_attention", "full_attention"]
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "feature_dim": 4}
    return model_class(RebasedConfig(**sizes, layer_types=layer_types, **options))


@pytest.mark.parametrize(
    ("model_class", "claims"),
    [
        (RebasedForCausalLM, ["AutoModelForCausalLM.from_pretrained", "model.generate"]),
        (RebasedModel, ["import AutoTokenizer, AutoModel\n", "print(model(**inputs))"]),
    ],
)
@pytest.mark.parametrize("kernel", ["rebased", "taylor"])
def test_card_says_what_the_model_is(model_class, claims, kernel):
    model = make_model(model_class, kernel=kernel)
    card = model.model_card("somebody/small")

    assert card.data.library_name == "transformers" and "rebased" in card.data.tags
    for claim in [
        *claims,
        "# small\n",
        f"with {model.num_parameters():,} parameters",
        "layers 1 conv, 1 linear_attention, 0 sliding_attention, 1 full_attention",
        f"kernel\n`{kernel}`",
    ]:
        assert claim in card.text


def test_a_measurement_takes_the_place_of_an_earlier_one_of_the_same():
    old, new, other = (
        EvalResult("text-generation", data, data, "accuracy", value)
        for data, value in (("sums", 0.25), ("sums", 0.75), ("words", 0.5))
    )
    card = make_model().model_card("somebody/small", metrics=[old, other])
    set_metrics(card, [new], "somebody/another")

    assert card.data.eval_results == [other, new] and card.data.model_name == "small"
