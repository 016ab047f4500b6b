"""Quality at every budget: over all data, from one encoding, and inside the language model."""

import copy
import json

import numpy
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    evaluate_budgets,
    evaluate_in_model,
    evaluation,
    explained_variance,
    iterate_activations,
    plot_evaluations,
    splice,
)


TEXTS = ["To be, or not to be, that is the question.", "Whether 'tis nobler in the mind", "to suffer"]


def make_sae(**options):
    return HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 6, "d_sae": 24, "k": 5, **options})).eval()


def test_it_is_one_minus_the_ratio_of_sums_over_all_tokens():
    sae, x = make_sae(), torch.randn(50, 6) + 3
    x[:5] *= 10
    expected = {}
    for budget in (1, 2, 4, 5):
        errors = (x - sae(x, k=budget).reconstruction.detach()).square().sum()
        expected[budget] = float(1 - errors / (x - x.mean(dim=0)).square().sum())

    assert explained_variance(sae, x) == pytest.approx(expected, abs=1e-6)


def test_batches_and_pieces_do_not_change_it():
    sae, x = make_sae(), torch.randn(50, 6) * torch.linspace(1, 9, 50).unsqueeze(1)
    whole = explained_variance(sae, x)

    assert explained_variance(sae, x, batch_size=7) == pytest.approx(whole, abs=1e-6)
    assert explained_variance(sae, iter([x[:13], x[13:]])) == pytest.approx(whole, abs=1e-6)


def test_a_large_common_offset_does_not_change_it():
    sae, x = make_sae(), torch.randn(200, 6)
    sae.initialize_from_activations(x)
    near = explained_variance(sae, x, [5])
    with torch.no_grad():
        sae.b_dec += 4096 * sae.input_scale

    # float32 keeps 2^-11 of an activation near 4096.
    assert explained_variance(sae, x + 4096, [5]) == pytest.approx(near, abs=5e-3)


def test_it_leaves_the_mode_and_the_counters_alone():
    sae = make_sae().train()

    explained_variance(sae, torch.randn(50, 6))

    assert sae.training and (sae.tokens_since_fired == 0).all()


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        explained_variance(make_sae(), torch.randn(1, 6))


def test_every_number_is_what_a_loop_over_tokens_gives():
    sae, x = make_sae(), torch.randn(60, 6) + 1
    with torch.no_grad():
        sae.b_enc[:4] = -100
        sae.b_enc[4] = 3
    evaluation = evaluate_budgets(sae, x, [2, 5], batch_size=7)

    for place, budget in enumerate((2, 5)):
        outputs = [sae(row.unsqueeze(0), k=budget) for row in x]
        pairs = [(row, output.reconstruction[0].detach()) for row, output in zip(x, outputs)]
        fired = torch.zeros(24)
        for output in outputs:
            fired[output.top_indices[0][output.top_values[0] > 0]] += 1
        ratios = torch.stack([found.norm() / row.norm() for row, found in pairs])
        cosines = torch.stack([F.cosine_similarity(row, found, dim=0) for row, found in pairs])
        errors = sum(float((row - found).square().sum()) for row, found in pairs)
        assert evaluation.fvu[place] == pytest.approx(errors / float((x - x.mean(dim=0)).square().sum()), rel=1e-5)
        assert evaluation.explained_variance[place] == pytest.approx(1 - evaluation.fvu[place], abs=1e-12)
        assert evaluation.l2_ratio[place] == pytest.approx(ratios.mean().item(), rel=1e-5)
        assert evaluation.cosine[place] == pytest.approx(cosines.mean().item(), rel=1e-5)
        torch.testing.assert_close(evaluation.density[place], fired / 60)
        assert evaluation.latents_per_token[place] == pytest.approx(fired.sum().item() / 60)
        assert evaluation.dead_fraction[place] == pytest.approx((fired == 0).float().mean().item())
        assert evaluation.dead_fraction[place] >= 4 / 24
        assert evaluation.dense_fraction[place] == pytest.approx((fired > 6).float().mean().item())
        assert evaluation.dense_fraction[place] > 0
    assert evaluation.tokens == 60 and evaluation.cross_entropy is None


def test_all_budgets_come_from_one_encoding(monkeypatch):
    sae, calls, encode = make_sae(), [], HierarchicalSaeModel.encode
    monkeypatch.setattr(HierarchicalSaeModel, "encode", lambda self, x, k: calls.append(k) or encode(self, x, k))

    evaluate_budgets(sae, torch.randn(50, 6), [1, 2, 4], batch_size=25)

    assert calls == [4, 4]


def test_a_batch_topk_sae_is_evaluated_with_all_latents_above_its_threshold():
    sae, x = make_sae(selection="batch_topk", budgets=[5]), torch.randn(50, 6)
    sae.threshold.fill_(0.7)
    errors = (x - sae(x).reconstruction.detach()).square().sum()

    evaluation = evaluate_budgets(sae, x)

    assert evaluation.budgets == [5] and evaluation.latents_per_token[0] != 5
    assert evaluation.fvu[0] == pytest.approx(float(errors / (x - x.mean(dim=0)).square().sum()), rel=1e-5)
    with pytest.raises(ValueError, match=r"budgets must be in \[5, 5\], the trained budget, got \[2\]"):
        evaluate_budgets(sae, x, [2])


def test_the_table_and_the_json_hold_every_budget():
    evaluation = evaluate_budgets(make_sae(), torch.randn(50, 6))
    lines = str(evaluation).splitlines()

    assert [line.split()[0] for line in lines[1:-1]] == ["1", "2", "4", "5"]
    assert lines[-1] == "50 tokens, 24 latents" and " CE" not in lines[0]
    assert float(lines[3].split()[1]) == pytest.approx(evaluation.explained_variance[2], rel=1e-3)
    restored = json.loads(json.dumps(evaluation.to_dict()))
    assert restored["cosine"] == evaluation.cosine and "density" not in restored


def test_the_plot_is_a_picture_with_one_curve_per_autoencoder(tmp_path):
    evaluations = {name: evaluate_budgets(make_sae(), torch.randn(50, 6)) for name in ("first", "second")}

    plot_evaluations(evaluations, tmp_path / "plot.svg")
    plot_evaluations(evaluations, tmp_path / "plot.png")

    picture = (tmp_path / "plot.svg").read_text()
    assert picture.count("<!-- first -->") == picture.count("<!-- second -->") == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def model(tiny_language_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform predictions: replacing a layer's output then shows.
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return model


def read(model, tokenizer, texts=TEXTS, layer=0, **options):
    return iterate_activations(model, tokenizer, texts, layer, show_progress=False, **options)


def identity_sae(d_in, scale=1.0):
    """Reconstructs every input times `scale` with its full budget: latents are the positive and negative parts."""
    sae = make_sae(d_in=d_in, d_sae=2 * d_in, k=d_in, normalize_decoder=False)
    rows = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    with torch.no_grad():
        sae.encoder_weight.copy_(rows)
        sae.W_dec.copy_(scale * rows)
    return sae


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, initializer_range=0.3)).eval()


@pytest.mark.parametrize("build", [None, gpt2], ids=["llama", "gpt2"])
def test_a_perfect_reconstruction_recovers_the_loss(build, model, tokenizer):
    language_model = model if build is None else build()

    evaluation = evaluate_in_model(identity_sae(32), read(language_model, tokenizer), [1, 32])

    assert evaluation.loss_recovered[1] == pytest.approx(1, abs=1e-4)
    assert evaluation.kl_divergence[1] == pytest.approx(0, abs=1e-4)
    assert evaluation.cross_entropy[1] == pytest.approx(evaluation.clean_cross_entropy, abs=1e-4)
    assert evaluation.kl_divergence[0] > 1e-3
    assert evaluation.explained_variance[1] == pytest.approx(1, abs=1e-6)
    assert "recovered" in str(evaluation) and "clean" in str(evaluation)


def test_a_reconstruction_of_zeros_recovers_nothing(model, tokenizer):
    evaluation = evaluate_in_model(identity_sae(32, scale=0.0), read(model, tokenizer), [32])

    assert evaluation.cross_entropy[0] == pytest.approx(evaluation.zeros_cross_entropy, rel=1e-5)
    assert evaluation.loss_recovered[0] == pytest.approx(0, abs=1e-5)


def test_losses_are_what_a_loop_over_texts_gives(model, tokenizer):
    """Each text alone; first positions and an outlier keep the model's own values and are not scored."""
    sae, loss, zeros, divergence, clean, count = identity_sae(32, scale=0.2), 0.0, 0.0, 0.0, 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]

        def run(factor, ids=ids):
            def scale(module, args, output):
                changed = output.clone()
                changed[:, 1:] *= factor
                return changed

            handle = model.model.layers[0].register_forward_hook(scale)
            with torch.no_grad():
                found = model(ids).logits[0, 1:-1].log_softmax(dim=-1)
            handle.remove()
            return found

        targets = ids[0, 2:]
        own, changed = run(1.0), run(0.2)
        clean += F.nll_loss(own, targets, reduction="sum").item()
        loss += F.nll_loss(changed, targets, reduction="sum").item()
        zeros += F.nll_loss(run(0.0), targets, reduction="sum").item()
        divergence += float((own.exp() * (own - changed)).sum())
        count += len(targets)

    evaluation = evaluate_in_model(sae, read(model, tokenizer, max_norm_ratio=None), [32])

    assert evaluation.cross_entropy[0] == pytest.approx(loss / count, rel=1e-4)
    assert evaluation.clean_cross_entropy == pytest.approx(clean / count, rel=1e-4)
    assert evaluation.zeros_cross_entropy == pytest.approx(zeros / count, rel=1e-4)
    assert evaluation.kl_divergence[0] == pytest.approx(divergence / count, rel=1e-3)
    assert evaluation.loss_recovered[0] == pytest.approx((zeros - loss) / (zeros - clean), rel=1e-3)
    assert evaluation.tokens == count + len(TEXTS)


def gemma4():
    """Its last layer takes keys and values from the first."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "global_head_dim": 16, "vocab_size": 300}
    shared = {
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
    }
    layers = {"num_hidden_layers": 2, "intermediate_size": 32, "layer_types": ["full_attention"] * 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **sizes, **shared, **layers)).eval()


@pytest.mark.parametrize("build", [None, gpt2, gemma4], ids=["llama", "gpt2", "gemma4"])
def test_numbers_are_those_of_whole_passes(build, model, tokenizer, monkeypatch):
    language_model = model if build is None else build()
    sae = make_sae(d_in=32, k=8)
    # Contexts of several lengths, of which the last pass keeps a part.
    options = {"context_length": 16, "batch_tokens": 64, "max_tokens": 60}

    found = evaluate_in_model(sae, read(language_model, tokenizer, **options)).to_dict()
    monkeypatch.setattr(evaluation, "resumes", lambda *given: False)
    expected = evaluate_in_model(sae, read(language_model, tokenizer, **options)).to_dict()

    assert found == expected and found["tokens"] == 60


def test_an_evaluation_that_fails_leaves_no_hook(model, tokenizer, monkeypatch):
    def fail(*given, **scored):
        raise KeyError

    hooks = list(model.model.layers[0]._forward_hooks)
    monkeypatch.setattr(evaluation, "_cross_entropy_and_divergence", fail)
    with pytest.raises(KeyError) as error:
        evaluate_in_model(make_sae(d_in=32), read(model, tokenizer))

    assert error.tb is not None and list(model.model.layers[0]._forward_hooks) == hooks


def shapes_of_passes(model, stream, budgets):
    """(contexts, positions) of each call of each layer in an evaluation."""
    calls = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output, called=called: called.append(output.shape[:2]))
        for layer, called in zip(model.model.layers, calls)
    ]
    evaluate_in_model(make_sae(d_in=32), stream, budgets)
    for handle in handles:
        handle.remove()
    return [sorted(map(tuple, called)) for called in calls]


def test_layers_up_to_the_one_that_is_read_run_once(model, tokenizer):
    stream = read(model, tokenizer, TEXTS * 2, batch_tokens=64)
    passes = [tuple(inputs.ids.shape) for inputs in stream.inputs()]

    first, second = shapes_of_passes(model, stream, [1, 2, 5])

    # The first context is what resuming is tried on, in one whole pass and two from the layer on.
    tried = (1, passes[0][1])
    assert len(passes) > 1
    assert first == sorted([*passes, tried]) and second == sorted([*passes * 5, *[tried] * 3])


def test_contexts_beyond_max_tokens_are_read_and_no_more(model, tokenizer):
    limits = {"context_length": 8, "batch_tokens": 128, "max_tokens": 30, "max_norm_ratio": None}
    stream = read(model, tokenizer, [TEXTS[0] * 20], **limits)

    _, second = shapes_of_passes(model, stream, [1, 2, 5])

    # 4 contexts of 7 tokens, then 2 tokens of one
    assert second == sorted([(4, 8)] * 5 + [(1, 8)] * (5 + 3))


def test_the_language_model_gives_the_same_numbers_as_its_activations(model, tokenizer):
    sae = make_sae(d_in=32)
    inside = evaluate_in_model(sae, read(model, tokenizer))
    alone = evaluate_budgets(sae, read(model, tokenizer))

    assert inside.tokens == alone.tokens and alone.cross_entropy is None
    assert inside.explained_variance == pytest.approx(alone.explained_variance, abs=1e-5)
    assert torch.equal(inside.density, alone.density)


def test_a_language_model_evaluation_reads_exactly_max_tokens_and_leaves_no_hook(model, tokenizer):
    evaluation = evaluate_in_model(
        make_sae(d_in=32), read(model, tokenizer, TEXTS * 50, batch_tokens=64, max_tokens=90)
    )

    assert evaluation.tokens == 90
    assert not model.model.layers[0]._forward_hooks


def test_a_language_model_of_another_size_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"takes activations of size 6 .*hidden_size 32: give the model that it was"):
        evaluate_in_model(make_sae(), read(model, tokenizer))


def test_another_layer_than_the_trained_one_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"was trained on layer 1, the stream gives layer 0: read that site alone"):
        evaluate_in_model(make_sae(d_in=32, layer=1), read(model, tokenizer))
    with pytest.raises(ValueError, match=r"was trained on layer 0, the stream gives layer 0, layer 1"):
        evaluate_in_model(make_sae(d_in=32), read(model, tokenizer, layer=[0, 1]))


def test_a_language_model_of_another_name_is_mentioned(model, tokenizer, caplog):
    from transformers import logging

    logging.enable_propagation()
    evaluate_in_model(make_sae(d_in=32, model_name="another/model"), read(model, tokenizer), [5])
    logging.disable_propagation()

    assert "the autoencoder was trained on another/model, the language model is" in caplog.text


@pytest.mark.parametrize(
    "x, budgets, message",
    [
        (torch.full((4, 6), torch.nan), None, "got 24 NaN and 0 infinite of 24 entries in 4 tokens"),
        (torch.tensor([[0.0] * 6, [torch.inf] * 6]), None, "got 0 NaN and 6 infinite of 12 entries in 1 tokens"),
        (torch.ones(4, 6, dtype=torch.int64), None, "must be floating point, got torch.int64"),
        (torch.randn(4, 5), None, r"must have shape \(..., d_in=6\), got \(4, 5\)"),
        (torch.randn(4, 6), [6], r"budgets must be in \[1, 5\], the trained budget, got \[6\]"),
        (torch.randn(4, 6), [0, 1], r"budgets must be in \[1, 5\], the trained budget, got \[0, 1\]"),
        (torch.randn(4, 6), [], r"budgets must be in \[1, 5\], the trained budget, got \[\]"),
        (torch.ones(4, 6), None, "needs activations that vary, got 4 equal ones"),
        ([], None, "needs at least 2 tokens, got 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(x, budgets, message):
    with pytest.raises(ValueError, match=message):
        evaluate_budgets(make_sae(), x, budgets)


def test_texts_without_a_next_token_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least 3 tokens"):
        evaluate_in_model(make_sae(d_in=32), read(model, tokenizer, ["ab", "cd"]))


@pytest.mark.parametrize("budgets", [torch.tensor([1, 5]), numpy.array([5, 1]), (numpy.int64(1), 5), {1, 5}])
def test_budgets_of_any_integer_kind_are_those_budgets(budgets):
    sae, x = make_sae(), torch.randn(50, 6)

    evaluation = evaluate_budgets(sae, x, budgets)

    assert evaluation.budgets == [1, 5] and all(type(budget) is int for budget in evaluation.budgets)
    assert evaluation.explained_variance == evaluate_budgets(sae, x, [1, 5]).explained_variance


@pytest.mark.parametrize("budgets", [[True, 5], [2.5], torch.tensor([1.0, 5.0]), torch.tensor([True]), "15", 5])
def test_what_is_no_list_of_integers_is_no_budget(model, tokenizer, budgets):
    with pytest.raises(ValueError, match="budgets must be integers, got"):
        evaluate_budgets(make_sae(), torch.randn(50, 6), budgets)
    with pytest.raises(ValueError, match="budgets must be integers, got"):
        evaluate_in_model(make_sae(d_in=32), read(model, tokenizer), budgets)


def test_more_dimensions_are_more_tokens():
    sae, x = make_sae(), torch.randn(60, 6)
    flat = evaluate_budgets(sae, x)

    for shaped in (x.view(4, 15, 6), [x.view(4, 15, 6)[:2], x[30:]]):
        found = evaluate_budgets(sae, shaped, batch_size=7)
        assert found.tokens == flat.tokens
        assert found.to_dict() == {name: pytest.approx(value, abs=1e-6) for name, value in flat.to_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autoencoder_in_half_precision_is_measured(model, tokenizer, dtype):
    half = make_sae(d_in=32).to(dtype)
    rounded = copy.deepcopy(half).float()

    for evaluate in (evaluate_budgets, evaluate_in_model):
        found, expected = (evaluate(sae, read(model, tokenizer)).to_dict() for sae in (half, rounded))
        # float32 rows are brought to unit norm again, by up to a rounding to 8 bits
        assert found == {name: pytest.approx(value, abs=2**-9) for name, value in expected.items()}


def test_what_cannot_be_read_in_a_model_is_refused(model, tokenizer):
    sae = make_sae(d_in=32)
    with pytest.raises(ValueError, match="expected a stream from iterate_activations, got a Tensor"):
        evaluate_in_model(sae, torch.randn(50, 32))
    with pytest.raises(ValueError, match="expected a language model with an unembedding, got a LlamaModel"):
        evaluate_in_model(sae, read(model.model, tokenizer))
    with pytest.raises(ValueError, match="batch_size must be an integer, got 2.5"):
        evaluate_budgets(sae, torch.randn(50, 32), batch_size=2.5)


def test_a_language_model_without_a_finite_loss_is_refused(model, tokenizer):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan

    with pytest.raises(ValueError, match="expected a language model of finite loss, got nan"):
        evaluate_in_model(make_sae(d_in=32), read(model, tokenizer))


@pytest.mark.parametrize("name, written", [("quality.svg", "quality.svg"), ("quality", "quality.png")])
def test_a_plot_is_whole_or_not_there(tmp_path, name, written):
    evaluation = evaluate_budgets(make_sae(), torch.randn(50, 6))

    plot_evaluations({"sae": evaluation}, tmp_path / "new" / name)

    assert [path.name for path in (tmp_path / "new").iterdir()] == [written]
    assert (tmp_path / "new" / written).stat().st_size > 1000
    with pytest.raises(ValueError, match="expected a picture of type .*png.*, got .*quality.foo"):
        plot_evaluations({"sae": evaluation}, tmp_path / "quality.foo")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("site", ["input", "middle", "attention.output", "mlp.input", "mlp.output", "mlp"])
def test_losses_at_a_site_are_what_splices_there_give(model, tokenizer, site):
    sae, loss, clean, count = make_sae(d_in=32, k=8, layer=1, hook_point=site), 0.0, 0.0, 0
    options = {"hook_point": site, "skip_first_position": False, "max_norm_ratio": None, "show_progress": False}
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own = model(ids).logits[0, :-1]
            with splice(model, sae, k=4):
                spliced = model(ids).logits[0, :-1]
        loss += F.cross_entropy(spliced, ids[0, 1:], reduction="sum").item()
        clean += F.cross_entropy(own, ids[0, 1:], reduction="sum").item()
        count += len(own)

    found = evaluate_in_model(sae, iterate_activations(model, tokenizer, TEXTS, 1, **options), [4])

    assert found.cross_entropy[0] == pytest.approx(loss / count, rel=1e-4)
    assert found.clean_cross_entropy == pytest.approx(clean / count, rel=1e-5) and loss != clean


def test_the_input_of_a_layer_is_evaluated_as_the_output_of_the_one_before(model, tokenizer):
    before = make_sae(d_in=32, k=8, layer=0, hook_point="output")
    after = make_sae(d_in=32, k=8, layer=1, hook_point="input")
    after.load_state_dict(before.state_dict())
    expected = evaluate_in_model(before, iterate_activations(model, tokenizer, TEXTS, 0, show_progress=False))
    reader = iterate_activations(model, tokenizer, TEXTS, 1, hook_point="input", show_progress=False)

    assert evaluate_in_model(after, reader).to_dict() == expected.to_dict()


def test_another_site_than_the_trained_one_is_refused(model, tokenizer):
    sae = make_sae(d_in=32, k=8, layer=1, hook_point="mlp.output")

    with pytest.raises(
        ValueError, match="was trained on mlp.output of layer 1, the stream gives layer 1: read that site"
    ):
        evaluate_in_model(sae, iterate_activations(model, tokenizer, TEXTS, 1, show_progress=False))
