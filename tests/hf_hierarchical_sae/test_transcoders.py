"""Transcoders: what they compute, learn, save and refuse, from pairs of activations to their place in a language model."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    ablate,
    evaluate_budgets,
    evaluate_in_model,
    iterate_activations,
    read_latents,
    record_statistics,
    save_shards,
    splice,
    steer,
    write_dashboard,
)
from hf_hierarchical_sae.hierarchical_topk import hierarchical_topk_loss_reference


TEXTS = ["To be, or not to be, that is the question.", "Whether 'tis nobler in the mind", "to suffer"] * 4
SITES = {"hook_point": "mlp.input", "target_hook_point": "mlp.output"}
IDS = torch.arange(5, 29).reshape(2, 12)
kinds = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


def make_transcoder(**options):
    torch.manual_seed(1)
    config = HierarchicalSaeConfig(**{"d_in": 6, "d_out": 10, "d_sae": 48, "k": 5, **SITES, **options})
    transcoder = HierarchicalSaeModel(config).eval()
    if config.skip_connection:
        torch.nn.init.normal_(transcoder.W_skip, std=0.3)
    return transcoder


def make_pairs(tokens=200):
    """Inputs and targets far from the origin, of different scales."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 6, generator=generator)
    mixing = torch.randn(6, 10, generator=generator)
    return 20 * x + 50, 0.03 * torch.relu(x @ mixing) - 0.2


def dense(transcoder, x, k):
    """The equations of the class docstring with dense tensors, for a transcoder in units of what it reads."""
    values, indices = torch.relu(x @ transcoder.W_enc + transcoder.b_enc).topk(k, dim=1)
    latents = torch.zeros(len(x), transcoder.config.d_sae, dtype=x.dtype).scatter(1, indices, values)
    given = latents @ transcoder.W_dec + transcoder.b_dec
    return given + x @ transcoder.W_skip.T if transcoder.config.skip_connection else given


@pytest.fixture(scope="module")
def model(tiny_language_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture
def transcoder(model):
    return make_transcoder(d_in=32, d_out=32, layer=1)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_mlp(model, layer, replace):
    """Logits with `replace(x, y)` as what an MLP gives, by a hook of the test's own."""
    handle = model.model.layers[layer].mlp.register_forward_hook(lambda module, args, output: replace(args[0], output))
    try:
        return logits(model)
    finally:
        handle.remove()


def pairs_of(model, tokenizer, layer=1, **settings):
    settings = {"show_progress": False, "max_norm_ratio": None, **settings}
    return iterate_activations(model, tokenizer, TEXTS, layer, **SITES, **settings)


@kinds
@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_follows_the_equations_at_every_k(skip, k):
    transcoder, (x, targets) = make_transcoder(skip_connection=skip), make_pairs()

    output = transcoder(x, k=k, targets=targets)

    torch.testing.assert_close(output.reconstruction, dense(transcoder, x, k), rtol=1e-4, atol=1e-3)
    decoded = transcoder.decode(*transcoder.encode(x, k), x)
    torch.testing.assert_close(decoded, output.reconstruction)


@kinds
@pytest.mark.parametrize("objective", [{}, {"budgets": [1, 4]}, {"budgets": [5], "matryoshka_prefixes": [8, 48]}])
def test_loss_and_all_gradients_are_those_of_the_formula(skip, objective):
    transcoder = make_transcoder(skip_connection=skip, normalize_decoder=False, **objective).double()
    x, targets = (part.double() for part in make_pairs(20))
    x = (0.05 * (x - 50)).requires_grad_()
    tensors = [x, *transcoder.parameters()]
    values, indices = torch.relu(x @ transcoder.W_enc + transcoder.b_enc).topk(5, dim=1)
    wanted = targets - x @ transcoder.W_skip.T if skip else targets
    if "matryoshka_prefixes" in objective:
        parts = [(values * (indices < end)).unsqueeze(2) * transcoder.W_dec[indices] for end in (8, 48)]
        expected = torch.stack(
            [(part.sum(dim=1) + transcoder.b_dec - wanted).square().mean() for part in parts]
        ).mean()
    else:
        options = {"budgets": objective.get("budgets")}
        expected = hierarchical_topk_loss_reference(
            indices, values, transcoder.W_dec, transcoder.b_dec, wanted, **options
        )

    loss = transcoder(x, targets=targets).loss

    torch.testing.assert_close(loss, expected)
    for found, other in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(found, other)


@kinds
@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
def test_units_of_training_change_no_output(skip, selection):
    transcoder = make_transcoder(skip_connection=skip, selection=selection, budgets=[5]).double()
    x, targets = (part.double() for part in make_pairs())
    transcoder.initialize_from_activations(x, targets)
    transcoder.threshold.fill_(0.3)
    before = transcoder(x, targets=targets)
    copied = copy.deepcopy(transcoder)
    assert transcoder.input_scale != 1 and transcoder.target_scale not in (1, transcoder.input_scale)

    copied.fold_input_scale()

    assert copied.input_scale == copied.target_scale == 1 and (copied.input_center == 0).all()
    torch.testing.assert_close(copied(x, targets=targets).reconstruction, before.reconstruction)
    torch.testing.assert_close(copied(x, targets=targets).top_values, before.top_values)
    if selection == "topk":
        torch.testing.assert_close(before.reconstruction, dense(copied, x, 5))
    # And back: a dictionary goes on in the units that suit the data.
    copied.initialize_from_activations(x, targets, keep_weights=True)
    assert copied.input_scale == transcoder.input_scale and copied.target_scale == transcoder.target_scale
    torch.testing.assert_close(copied(x, targets=targets).loss, before.loss)


def test_an_autoencoder_goes_on_in_the_units_that_suit_the_data_to_the_bit():
    torch.manual_seed(1)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=6, d_sae=48, k=5))
    x = make_pairs()[0]
    sae.initialize_from_activations(x)
    before, scale = sae(x), sae.input_scale.clone()
    sae.fold_input_scale()

    sae.initialize_from_activations(x, keep_weights=True)

    assert sae.input_scale == scale != 1
    assert torch.equal(sae(x).reconstruction, before.reconstruction) and torch.equal(sae(x).loss, before.loss)


@kinds
def test_it_starts_as_the_targets_mean_and_learns_them_under_trainer(skip, tmp_path):
    transcoder, (x, targets) = make_transcoder(skip_connection=skip), make_pairs(2000)
    if skip:
        torch.nn.init.zeros_(transcoder.W_skip)
    transcoder.initialize_from_activations(x, targets)
    untrained = evaluate_budgets(transcoder, (x, targets)).explained_variance
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=150,
        per_device_train_batch_size=128,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
    )
    data = torch.utils.data.StackDataset(hidden_states=x, targets=targets)

    Trainer(model=transcoder.train(), args=arguments, train_dataset=data).train()

    metrics = transcoder.pop_training_metrics()
    trained = evaluate_budgets(transcoder.eval(), (x, targets)).explained_variance
    assert untrained[-1] < 0.3 and trained[-1] > 0.8 and trained[0] < trained[-1]
    assert set(metrics) == {*(f"explained_variance_{budget}" for budget in (1, 2, 4, 5)), "dead_fraction"}


@kinds
def test_it_loads_as_it_was_saved_without_the_package_too(skip, tmp_path, run_isolated):
    transcoder, (x, targets) = make_transcoder(skip_connection=skip), make_pairs(20)
    transcoder.initialize_from_activations(x, targets)
    transcoder.save_pretrained(tmp_path / "transcoder")

    loaded = AutoModel.from_pretrained(tmp_path / "transcoder")

    assert torch.equal(loaded(x).reconstruction, transcoder(x).reconstruction)
    assert loaded.config.d_out == 10 and loaded.config.is_transcoder
    torch.save({"x": x, "expected": transcoder(x).reconstruction.detach()}, tmp_path / "pair.pt")
    run_isolated(f"""
import torch
from transformers import AutoModel
pair = torch.load({str(tmp_path / "pair.pt")!r})
model = AutoModel.from_pretrained({str(tmp_path / "transcoder")!r}, trust_remote_code=True)
assert torch.equal(model(pair["x"]).reconstruction, pair["expected"])
""")


def test_latents_that_are_dead_model_what_is_left_of_the_targets():
    transcoder, (x, targets) = make_transcoder(aux_loss_coefficient=1.0, dead_after_tokens=1, aux_k=4), make_pairs()
    transcoder.initialize_from_activations(x, targets)
    transcoder.train()
    transcoder.tokens_since_fired.fill_(10)

    transcoder(x[:2], targets=targets[:2]).loss.backward()

    dead = transcoder.tokens_since_fired > 0
    assert dead.any() and transcoder.encoder_weight.grad[dead].abs().sum() > 0


def test_padding_is_left_out_of_inputs_and_targets():
    transcoder, (x, targets) = make_transcoder(), make_pairs(20)
    mask = torch.arange(20) % 3 > 0
    padded = targets.masked_fill(~mask.unsqueeze(1), torch.nan)

    output = transcoder.train()(x, mask, targets=padded)

    torch.testing.assert_close(output.loss, transcoder(x[mask], targets=targets[mask]).loss)
    assert output.reconstruction.shape == (20, 10) and (output.reconstruction[~mask] == 0).all()


def test_without_targets_it_computes_and_has_no_loss():
    transcoder, (x, _) = make_transcoder(), make_pairs(20)

    output = transcoder(x)

    assert output.loss is None and output.reconstruction.shape == (20, 10)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t, x, y: t.train()(x), "a transcoder is trained to compute mlp.output: give targets"),
        (lambda t, x, y: t(x, targets=y[:, :6]), r"targets must have shape \(20, 10\), got \(20, 6\)"),
        (lambda t, x, y: t(x, targets=y[:7]), r"targets must have shape \(20, 10\), got \(7, 10\)"),
        (lambda t, x, y: t(x, targets=y.long()), "targets must be a floating point tensor"),
        (lambda t, x, y: t.train()(x, targets=y / 0), "expected finite activations, got"),
        (lambda t, x, y: t.initialize_from_activations(x), "a transcoder needs a sample of its targets as well"),
        (lambda t, x, y: t.decode(*t.encode(x)), r"a skip connection needs hidden_states of shape \(20, 6\)"),
        (lambda t, x, y: t.decode(*t.encode(x), x[:3]), r"needs hidden_states of shape \(20, 6\), .* got .*3, 6"),
        (lambda t, x, y: evaluate_budgets(t, x), "a transcoder needs pairs of activations and targets, got a Tensor"),
        (lambda t, x, y: record_statistics(t, [x, y]), "a transcoder needs pairs of activations and targets"),
    ],
)
def test_what_it_cannot_use_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_transcoder(skip_connection=True), *make_pairs(20))


def test_an_autoencoder_takes_no_targets():
    sae, (x, _) = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=6, d_sae=48, k=5)), make_pairs(20)

    with pytest.raises(ValueError, match="an autoencoder computes its own input, got targets"):
        sae(x, targets=x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_out": 12, "target_hook_point": None}, "d_out other than d_in and skip_connection are for transcoders"),
        ({"d_out": 6, "target_hook_point": None, "skip_connection": True}, "skip_connection are for transcoders"),
        ({"target_hook_point": "mlp.input"}, "a transcoder computes another site than it reads, got 'mlp.input'"),
        ({"hook_point": None, "target_hook_point": "output"}, "another site than it reads, got 'output'"),
        ({"d_out": 0}, "d_out must be positive, got 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_transcoder(**options)


def test_weights_of_another_size_are_refused(tmp_path):
    make_transcoder(skip_connection=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    (tmp_path / "config.json").write_text(json.dumps({**config, "d_out": 7}))
    with pytest.raises(ValueError, match=r"another shape of .*W_dec \(48, 10\)"):
        HierarchicalSaeModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "skip_connection": False}))
    with pytest.raises(ValueError, match="the unknown W_skip"):
        HierarchicalSaeModel.from_pretrained(tmp_path)


def test_a_harvest_holds_pairs_of_any_widths_and_trains(model, tokenizer, tmp_path):
    sites = ["mlp.input", "mlp.up_proj", "mlp.output"]
    settings = {"show_progress": False, "max_norm_ratio": None}
    tokens = save_shards(
        iterate_activations(model, tokenizer, TEXTS, [0, 1], hook_point=sites, **settings), tmp_path, shard_tokens=99
    )

    shards = ActivationShards(tmp_path, 1, "mlp.input", "mlp.up_proj")

    item = shards[5]
    assert len(shards) == tokens and item["hidden_states"].shape == (32,) and item["targets"].shape == (64,)
    pieces = [torch.cat(parts) for parts in zip(*shards.batches(7))]
    assert all(torch.equal(one, other) for one, other in zip(pieces, shards.rows(torch.arange(tokens))))
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[1].mlp.up_proj(pieces[0]), pieces[1])
    transcoder = make_transcoder(d_in=32, d_out=64, layer=1, target_hook_point="mlp.up_proj")
    transcoder.initialize_from_activations(*pieces)
    record_statistics(transcoder, shards)
    assert transcoder.median_target_norm == torch.linalg.vector_norm(pieces[1], dim=1).median()
    assert evaluate_budgets(transcoder, shards).tokens == tokens


def test_pairs_of_other_sites_are_refused(model, tokenizer, transcoder, tmp_path):
    save_shards(iterate_activations(model, tokenizer, TEXTS, 1, hook_point=[*SITES.values(), "middle"]), tmp_path)

    with pytest.raises(
        ValueError, match="was trained on .*, and of size 32 of mlp.output of layer 1 .* holds those of"
    ):
        evaluate_budgets(transcoder, ActivationShards(tmp_path, hook_point="mlp.input"))
    with pytest.raises(ValueError, match="holds those of .*, and of size 32 of middle of layer 1 to compute"):
        record_statistics(transcoder, ActivationShards(tmp_path, None, "mlp.input", "middle"))
    with pytest.raises(ValueError, match="hook_point must be one of the harvested hook_points .*, got output"):
        ActivationShards(tmp_path, None, "mlp.input", "output")
    other = iterate_activations(model, tokenizer, TEXTS, 1, hook_point="mlp.input", target_hook_point="middle")
    with pytest.raises(ValueError, match="trained on mlp.input of layer 1 to mlp.output of layer 1, the stream gives"):
        evaluate_budgets(transcoder, other)
    with pytest.raises(ValueError, match="read that pair of sites alone"):
        evaluate_in_model(transcoder, iterate_activations(model, tokenizer, TEXTS, 1, hook_point="mlp.input"))


@kinds
def test_splice_puts_what_it_computes_in_the_place_of_the_target(model, skip):
    transcoder = make_transcoder(d_in=32, d_out=32, layer=1, skip_connection=skip)
    for k in (1, 5):
        expected = with_mlp(model, 1, lambda x, y, k=k: transcoder(x, k=k).reconstruction.detach())
        with splice(model, transcoder, k=k):
            spliced = logits(model)

        torch.testing.assert_close(spliced, expected)
    assert not torch.allclose(spliced, logits(model))


def test_splice_with_the_error_changes_nothing_and_an_edit_what_it_says(model, transcoder):
    with splice(model, transcoder, keep_error=True):
        unchanged = logits(model)
    assert torch.equal(unchanged, logits(model))

    expected = with_mlp(model, 1, lambda x, y: y + transcoder.W_dec[transcoder.encode(x)[0][..., 0]].detach() * 2.0)

    def strengthen(top_indices, top_values):
        return top_values + torch.tensor([2.0, 0, 0, 0, 0])

    with splice(model, transcoder, keep_error=True, edit=strengthen):
        torch.testing.assert_close(logits(model), expected)


def test_ablate_and_steer_change_the_target(model, transcoder):
    read = []
    with_mlp(model, 1, lambda x, y: read.append(x))
    latent = transcoder.encode(read[0])[0][0, 0, 0].item()
    row = transcoder.W_dec[latent].detach()

    def without(x, y):
        found, strength = transcoder.encode(x)
        return y - (strength * (found == latent)).sum(dim=-1, keepdim=True).detach() * row

    ablated, steered = with_mlp(model, 1, without), with_mlp(model, 1, lambda x, y: y + 3 * row)
    with ablate(model, transcoder, None, latent):
        torch.testing.assert_close(logits(model), ablated)
    with steer(model, transcoder, None, latent, strength=3.0, typical_activation=1.0):
        torch.testing.assert_close(logits(model), steered)


def test_sinks_of_inputs_or_targets_keep_the_models_own_values(model, transcoder):
    seen = []
    with_mlp(model, 1, lambda x, y: seen.append((x.norm(dim=-1), y.norm(dim=-1))))
    (x_norms, y_norms) = seen[0]
    transcoder.median_norm.fill_(x_norms.flatten().sort().values[12] / 5)
    transcoder.median_target_norm.fill_(y_norms.flatten().sort().values[12] / 5)
    usual = (x_norms <= 5 * transcoder.median_norm) & (y_norms <= 5 * transcoder.median_target_norm)
    assert usual.any() and not usual.all()

    def replace(x, y):
        return torch.where(usual.unsqueeze(-1), transcoder(x).reconstruction.detach(), y)

    usual_replaced = with_mlp(model, 1, replace)
    all_replaced = with_mlp(model, 1, lambda x, y: transcoder(x).reconstruction.detach())
    with splice(model, transcoder):
        torch.testing.assert_close(logits(model), usual_replaced)
    with splice(model, transcoder, max_norm=torch.inf):
        torch.testing.assert_close(logits(model), all_replaced)


def test_gradients_reach_what_it_reads_through_its_latents(model, transcoder):
    watched = []

    def watch(top_indices, top_values):
        top_values.retain_grad()
        watched.append(top_values)
        return top_values

    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with splice(model, transcoder, edit=watch):
        model(inputs_embeds=embeddings).logits[0, -1].max().backward()

    assert watched[0].grad.abs().sum() > 0 and embeddings.grad.abs().sum() > 0


def test_a_target_before_its_input_is_refused(model):
    backwards = make_transcoder(d_in=32, d_out=32, layer=1, hook_point="mlp.output", target_hook_point="mlp.input")

    message = "mlp.input of layer 1 comes before mlp.output of layer 1"
    with pytest.raises(ValueError, match=message), splice(model, backwards):
        logits(model)
    logits(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"d_out": 64},
            "computes activations of size 64 from those at mlp.input .* at mlp.output of layer 1 the size 32",
        ),
        ({"target_hook_point": "mlp.gone"}, "hook_point must be one of .*, got 'mlp.gone'"),
    ],
)
def test_a_language_model_without_such_a_pair_is_refused(model, options, message):
    transcoder = make_transcoder(**{"d_in": 32, "d_out": 32, "layer": 1, **options})

    with pytest.raises(ValueError, match=message), splice(model, transcoder):
        pass


@pytest.mark.parametrize("layer", [0, 1])
@kinds
def test_losses_in_the_model_are_what_splices_give(model, tokenizer, layer, skip):
    transcoder = make_transcoder(d_in=32, d_out=32, layer=layer, skip_connection=skip)
    x, targets = (torch.cat(parts) for parts in zip(*pairs_of(model, tokenizer, layer)))
    transcoder.initialize_from_activations(x, targets)

    found = evaluate_in_model(transcoder, pairs_of(model, tokenizer, layer), [2, 5])

    alone = evaluate_budgets(transcoder, (x, targets), [2, 5])
    assert found.explained_variance == pytest.approx(alone.explained_variance, abs=1e-6)
    assert found.cosine == pytest.approx(alone.cosine, abs=1e-6)
    for place, k in enumerate((2, 5)):
        total = count = 0
        for text in TEXTS[:3]:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad(), splice(model, transcoder, k=k):
                losses = torch.nn.functional.cross_entropy(model(ids).logits[0, 1:-1], ids[0, 2:], reduction="none")
            total, count = total + losses.sum(), count + len(losses)
        # The first position, which the stream leaves out, is spliced here.
        assert found.cross_entropy[place] == pytest.approx(float(total / count), rel=0.05)


def test_an_exact_transcoder_recovers_the_loss(model, tokenizer):
    """With a skip connection alone, the linear MLP of this model is computed exactly."""
    linear = copy.deepcopy(model)
    weight = torch.randn(32, 32)
    for layer in linear.model.layers:
        layer.mlp = torch.nn.Linear(32, 32, bias=False)
        layer.mlp.weight = torch.nn.Parameter(weight.clone())
    transcoder = make_transcoder(d_in=32, d_out=32, layer=1, skip_connection=True)
    with torch.no_grad():
        transcoder.W_skip.copy_(weight)
        transcoder.b_enc.fill_(-1e6)

    found = evaluate_in_model(transcoder, pairs_of(linear, tokenizer))

    assert found.loss_recovered == pytest.approx([1.0] * len(found.budgets), abs=1e-4)
    assert found.explained_variance == pytest.approx([1.0] * len(found.budgets), abs=1e-5)


def test_its_latents_are_read_where_it_reads(model, tokenizer, transcoder, tmp_path):
    x = torch.cat([pair[0] for pair in pairs_of(model, tokenizer, max_norm_ratio=5.0)])
    transcoder.initialize_from_activations(*(torch.cat(parts) for parts in zip(*pairs_of(model, tokenizer))))

    found = read_latents(transcoder, model, tokenizer, TEXTS, show_progress=False)

    top_values = transcoder.encode(x)[1]
    torch.testing.assert_close(found.values.sort().values, top_values[top_values > 0].flatten().sort().values)
    page = write_dashboard(
        transcoder, model, tokenizer, TEXTS, path=tmp_path / "page.html", show_progress=False, max_tokens=60
    )
    html = (tmp_path / "page.html").read_text()
    assert page["latents"] > 0 and "mlp.input of layer 1" in html and "mlp.output of layer 1" in html


def test_a_transcoder_in_half_precision_computes_and_is_not_trained():
    transcoder, (x, targets) = make_transcoder(skip_connection=True), make_pairs(20)
    x = (x - 50) / 20
    half = copy.deepcopy(transcoder).to(torch.bfloat16)

    torch.testing.assert_close(half(x).reconstruction, transcoder(x).reconstruction, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="training needs float32 weights"):
        half.train()(x, targets=targets)


@kinds
def test_it_starts_from_the_linear_map_of_the_sample(skip):
    transcoder = make_transcoder(skip_connection=skip)
    x = torch.randn(2000, 6) * torch.linspace(1, 3, 6)
    mixing = torch.randn(6, 10)

    transcoder.initialize_from_activations(x, x @ mixing)

    if skip:
        explained = evaluate_budgets(transcoder, (x, x @ mixing), [1]).explained_variance
        torch.nn.init.zeros_(transcoder.W_skip)
        assert explained[0] > evaluate_budgets(transcoder, (x, x @ mixing), [1]).explained_variance[0] + 0.5
    else:
        aimed = torch.nn.functional.cosine_similarity(transcoder.encoder_weight, transcoder.W_dec @ mixing.T, dim=1)
        assert aimed.min() > 0.99
