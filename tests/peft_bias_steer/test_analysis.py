"""The analysis of trained vectors against values worked out by hand or by an independent way."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from peft_bias_steer import BiasSteerConfig, set_steering_vectors, steering_vectors
from peft_bias_steer.analysis import (
    adapter_cosines,
    layer_ablation,
    lens_table,
    logit_lens,
    plot_statistics,
    residual_ratios,
    statistics_table,
    vector_statistics,
)


SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 259, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


def steer(model_type="llama", auto_class=AutoModelForCausalLM, **config):
    base = auto_class.from_config(AutoConfig.for_model(model_type, **(config or SMALL)))
    for parameter in base.parameters():  # norm weights and embeddings that differ between their entries
        parameter.data += 0.3 * torch.randn_like(parameter)
    return get_peft_model(base, BiasSteerConfig(init_weights=False)).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


def ids(scores):
    return [score.token_id for score in scores]


def test_lens_ranks_tokens_as_a_loop_over_the_vocabulary_does(tokenizer):
    model = steer()
    head = model.base_model.model.lm_head.weight.detach()
    gain = model.base_model.model.model.norm.weight.detach()

    lenses = logit_lens(model, tokenizer, top_k=4)

    assert [lens.layer for lens in lenses] == [0, 1, 2]
    for lens, vector in zip(lenses, steering_vectors(model).values()):
        raw = {token: sum(w * s for w, s in zip(row, vector.tolist())) for token, row in enumerate(head.tolist())}
        cosine = {token: raw[token] / (math.hypot(*head[token].tolist()) * vector.norm().item()) for token in raw}
        normed = {token: (head[token] * gain * vector).sum().item() for token in raw}
        for ranking, expected in ((lens.raw, raw), (lens.cosine, cosine), (lens.normed, normed)):
            descending = sorted(expected, key=lambda token: -expected[token])
            assert ids(ranking.promoted) == descending[:4]
            assert ids(ranking.suppressed) == descending[::-1][:4]
            # float32 dot products of 32 numbers against the loop's order of summation
            for score in ranking.promoted + ranking.suppressed:
                assert score.score == pytest.approx(expected[score.token_id], rel=1e-4, abs=1e-4)
                assert score.token == tokenizer.decode([score.token_id])


@pytest.mark.parametrize(
    "model_type, config", [("llama", SMALL), ("gemma2", SMALL), ("gpt2", GPT2), ("olmo", SMALL), ("cohere", SMALL)]
)
def test_lens_through_the_norm_is_the_change_of_the_logits_of_a_unit_stream(model_type, config, tokenizer):
    """The norm of a vector of root mean square 1 is linear in it: the model's own norm is the oracle."""
    model = steer(model_type, **config)
    base = model.get_base_model()
    norm = [module for name, module in base.get_decoder().named_children() if "norm" in name or name == "ln_f"][-1]
    vector = torch.randn(32)
    if "LayerNorm" in type(norm).__name__:
        vector -= vector.mean()
    vector /= vector.square().mean().sqrt()
    if "LayerNorm" in type(norm).__name__:
        vector += 0.7  # the norm takes the mean off again
    set_steering_vectors(model, {2: vector})

    lens = logit_lens(model, tokenizer, top_k=259)[2]

    expected = ((norm(vector[None]) - norm(-vector[None])) / 2) @ base.get_output_embeddings().weight.T
    got = torch.zeros(259)
    got[ids(lens.normed.promoted)] = torch.tensor([score.score for score in lens.normed.promoted])
    # the norms' eps of 1e-5 beside a mean square of 1
    torch.testing.assert_close(got, expected[0].detach(), rtol=1e-4, atol=1e-4)


def test_lens_finds_the_norm_of_a_decoder_with_a_head_of_its_own(tokenizer):
    bert = {**SMALL, "vocab_size": 64}
    configs = AutoConfig.for_model("bert", **bert), AutoConfig.for_model("gpt2", **GPT2)
    base = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*configs))
    torch.nn.init.normal_(base.decoder.transformer.ln_f.weight)
    model = get_peft_model(base, BiasSteerConfig(init_weights=False)).eval()

    lenses = logit_lens(model, tokenizer, top_k=4)

    for lens, vector in zip(lenses, steering_vectors(model).values(), strict=True):
        through_norm = base.decoder.transformer.ln_f.weight * (vector - vector.mean())
        assert ids(lens.normed.promoted) == (base.decoder.lm_head.weight @ through_norm).topk(4).indices.tolist()


SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "pad_token_id": 0,
}
# where the norm after the last layer is; BART's is one of the embeddings
NORMS = {
    "llama4_text": ("model.norm", {**SMALL, "head_dim": 8, "num_key_value_heads": 2, "intermediate_size_mlp": 48}),
    "gemma4_text": (
        "model.norm",
        {**SMALL, "head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    ),
    "bart": (None, SEQ2SEQ),
    "whisper": ("model.decoder.layer_norm", {**SEQ2SEQ, "auto_class": AutoModelForSpeechSeq2Seq}),
}


@pytest.mark.parametrize("model_type", NORMS)
def test_lens_goes_through_the_norm_that_runs_after_the_last_layer(model_type, tokenizer):
    name, config = NORMS[model_type]
    model = steer(model_type, **config)
    base, vector = model.get_base_model(), list(steering_vectors(model).values())[-1]

    lens = logit_lens(model, tokenizer, top_k=4)[-1]

    stream = vector - vector.mean() if model_type == "whisper" else vector
    gain = base.get_submodule(name).weight if name else 1
    assert (
        ids(lens.normed.promoted) == (base.get_output_embeddings().weight @ (gain * stream)).topk(4).indices.tolist()
    )


@pytest.mark.parametrize("model_type", ["bert", "electra", "modernbert-decoder"])
def test_lens_refuses_a_head_that_transforms_the_stream_first(model_type, tokenizer):
    model = steer(model_type, **SMALL, is_decoder=True)
    with pytest.raises(ValueError, match="in which it goes through .*Linear, LayerNorm: the lens would not show"):
        logit_lens(model, tokenizer)


def test_lens_promotes_the_token_whose_direction_was_written(tokenizer):
    model = steer()
    head = model.base_model.model.lm_head.weight.detach()
    set_steering_vectors(model, {1: head[42], 2: -head[7]})

    lenses = logit_lens(model, tokenizer, top_k=1)

    assert ids(lenses[1].cosine.promoted) == [42] and lenses[1].cosine.promoted[0].score == pytest.approx(1)
    assert ids(lenses[2].cosine.suppressed) == [7] and lenses[2].cosine.suppressed[0].score == pytest.approx(-1)


def test_lens_goes_through_a_projection_to_a_narrower_unembedding(tokenizer):
    sizes = {
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    model = steer(
        "opt", hidden_size=32, num_hidden_layers=2, word_embed_proj_dim=16, do_layer_norm_before=False, **sizes
    )
    decoder = model.get_base_model().model.decoder
    lenses = logit_lens(model, tokenizer, top_k=4)

    for lens, vector in zip(lenses, steering_vectors(model).values(), strict=True):
        scores = model.get_base_model().lm_head(decoder.project_out(vector))
        assert ids(lens.raw.promoted) == scores.topk(4).indices.tolist()


def test_lens_reads_an_unembedding_that_torchao_has_quantised(tokenizer):
    quantization = pytest.importorskip("torchao.quantization")
    model = steer()
    set_steering_vectors(model, {1: 30 * model.get_base_model().lm_head.weight.detach()[42]})
    quantization.quantize_(model.get_base_model(), quantization.Int8WeightOnlyConfig())

    assert ids(logit_lens(model, tokenizer, top_k=1)[1].cosine.promoted) == [42]


def test_lens_of_a_zero_vector_is_finite(tokenizer):
    model = steer()
    set_steering_vectors(model, {0: torch.zeros(32)})

    lens = logit_lens(model, tokenizer, top_k=2)[0]

    assert all(score.score == 0 for ranking in (lens.raw, lens.cosine, lens.normed) for score in ranking.promoted)


@pytest.mark.parametrize("top_k", [0, 260])
def test_lens_refuses_more_tokens_than_there_are(top_k, tokenizer):
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, vocabulary size=259\], got {top_k}"):
        logit_lens(steer(), tokenizer, top_k=top_k)


def test_statistics_of_vectors_whose_geometry_is_known():
    vectors = {1: torch.tensor([3.0, 0, 0]), 4: torch.tensor([0, 4.0, 0]), 5: torch.tensor([0, -4.0, 0])}

    statistics = vector_statistics(vectors)

    assert statistics.layers == [1, 4, 5]
    assert statistics.norms == pytest.approx([3, 4, 4])
    assert statistics.singular_values == pytest.approx([math.sqrt(32), 3, 0])
    assert statistics.stable_rank == pytest.approx((9 + 32) / 32)
    assert torch.tensor(statistics.cosines).flatten().tolist() == pytest.approx([1, 0, 0, 0, 1, -1, 0, -1, 1])


def test_statistics_of_zero_vectors_are_zero():
    statistics = vector_statistics({0: torch.zeros(4), 1: torch.zeros(4)})

    assert statistics.stable_rank == 0 and statistics.norms == [0, 0] and statistics.cosines == [[0, 0], [0, 0]]


def test_adapters_are_compared_on_the_layers_they_share():
    first = {0: torch.tensor([1.0, 0]), 1: torch.tensor([1.0, 1]), 2: torch.ones(2)}
    second = {0: torch.tensor([-2.0, 0]), 1: torch.tensor([0, 3.0])}

    assert adapter_cosines(first, second) == pytest.approx({0: -1, 1: math.sqrt(0.5)})
    with pytest.raises(ValueError, match=r"a layer in common, got layers \[0, 1, 2\] and \[3\]"):
        adapter_cosines(first, {3: torch.ones(2)})
    with pytest.raises(ValueError, match=r"of one width, got vectors of \[2\] and \[3\] numbers"):
        adapter_cosines(first, {0: torch.ones(3)})


def test_residual_ratio_divides_by_the_median_norm_of_the_unsteered_stream(tokenizer):
    model = steer()
    texts = ["a longer text", "short"]
    captured = {0: [], 1: []}  # hidden_states[i + 1] is the output of layer i, the last one is normed
    with torch.no_grad(), model.disable_adapter():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            for layer in captured:
                captured[layer] += states[layer + 1][0].norm(dim=-1).tolist()

    ratios = residual_ratios(model, tokenizer, texts)

    assert list(ratios) == [0, 1, 2]
    for layer, norms in captured.items():
        median = sorted(norms)[(len(norms) - 1) // 2]
        assert ratios[layer] == pytest.approx(steering_vectors(model)[layer].norm().item() / median, rel=1e-5)
    with pytest.raises(ValueError, match="at least one text"):
        residual_ratios(model, tokenizer, [])


def test_ablation_calls_the_metric_on_every_part_and_restores_the_adapter():
    model = steer()
    before = steering_vectors(model)
    seen = []

    def metric(model):
        seen.append({layer for layer, vector in steering_vectors(model).items() if vector.any()})
        return sum(2.0**layer for layer in seen[-1])

    ablation = layer_ablation(model, metric)

    assert (ablation.none, ablation.all) == (0, 7)
    assert ablation.groups == [[0], [1], [2]]
    assert ablation.left_out == [6, 5, 3]
    assert ablation.kept == [1, 2, 4]
    assert len(seen) == 8
    assert all(torch.equal(vector, before[layer]) for layer, vector in steering_vectors(model).items())
    grouped = layer_ablation(model, metric, groups=[[0, 1], [2]])
    assert (grouped.left_out, grouped.kept) == ([4, 3], [3, 4])


def test_ablation_restores_the_adapter_when_the_metric_fails():
    model = steer()
    before = steering_vectors(model)

    def metric(model):
        raise RuntimeError("no metric today")

    with pytest.raises(RuntimeError, match="no metric today"):
        layer_ablation(model, metric)
    assert all(torch.equal(vector, before[layer]) for layer, vector in steering_vectors(model).items())


def test_ablation_refuses_layers_that_are_not_steered_and_merged_adapters():
    model = steer()

    with pytest.raises(ValueError, match=r"among \[0, 1, 2\], got \[3\]"):
        layer_ablation(model, lambda model: 0.0, groups=[[0, 3]])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        layer_ablation(model, lambda model: 0.0)


def render(table):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_show_every_layer(tokenizer):
    model = steer()
    lenses = logit_lens(model, tokenizer, top_k=3)
    statistics = vector_statistics(steering_vectors(model))

    text = render(lens_table(lenses, "cosine", shown=2))
    for lens in lenses:
        assert f"{lens.cosine.promoted[1].token!r} {lens.cosine.promoted[1].score:+.2f}" in text
        assert f"{lens.cosine.promoted[2].token!r} {lens.cosine.promoted[2].score:+.2f}" not in text
    text = render(statistics_table(statistics, {0: 0.5, 1: 0.25, 2: 0.125}))
    assert all(f"{norm:.4f}" in text for norm in statistics.norms)
    assert "12.50%" in text and f"stable rank {statistics.stable_rank:.2f} of 3" in text
    with pytest.raises(ValueError, match="raw, cosine or normed, got 'logits'"):
        lens_table(lenses, "logits")


def test_tokens_that_look_like_markup_are_shown_as_they_are():
    from peft_bias_steer.analysis import LayerLens, TokenRanking, TokenScore

    ranking = TokenRanking([TokenScore(0, "[bold]", 1.0)], [TokenScore(1, "[/x]", -1.0)])
    text = render(lens_table([LayerLens(0, ranking, ranking, ranking)]))

    assert "'[bold]' +1.00" in text and "'[/x]' -1.00" in text


def test_plot_has_a_panel_each_for_norms_spectrum_and_cosines(tmp_path):
    plot_statistics(vector_statistics(steering_vectors(steer())), tmp_path / "plot.svg", title="three layers")
    plot_statistics(vector_statistics(steering_vectors(steer())), tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f'<g id="axes_{panel}">' in drawn for panel in (1, 2, 3))
