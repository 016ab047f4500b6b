"""Replacing, steering and ablating inside a running language model, against hand-written arithmetic."""

import asyncio
import copy
import gc
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

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


IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(scope="module")
def model(tiny_language_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform predictions: a change of a layer's output then shows.
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


def make_sae(**options):
    torch.manual_seed(1)
    return HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 32, "d_sae": 96, "k": 8, **options})).eval()


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def states(model, layer, ids=IDS):
    """Output of a layer as transformers reports it, before the final norm."""
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]


def with_layer_output(model, layer, replace):
    """Logits with `replace(x)` as the output of a layer, by a hook of the test's own."""
    handle = model.get_decoder().layers[layer].register_forward_hook(lambda module, args, output: replace(output))
    try:
        return logits(model)
    finally:
        handle.remove()


def test_splice_replaces_the_output_by_the_reconstruction_at_each_budget(model):
    sae = make_sae()
    for k in (1, 3, 8):
        expected = with_layer_output(model, 0, lambda x, k=k: sae(x, k=k).reconstruction.detach())
        with splice(model, sae, 0, k=k):
            spliced = logits(model)
        torch.testing.assert_close(spliced, expected)
    assert not torch.allclose(spliced, logits(model), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"selection": "batch_topk", "budgets": [8]}], ids=["topk", "batch_topk"])
def test_splice_with_the_error_kept_changes_no_bit(model, dtype, options):
    model = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
    sae, clean = make_sae(**options), logits(model)

    with splice(model, sae, 0, keep_error=True), splice(model, sae, 1, k=8, keep_error=True):
        assert torch.equal(logits(model), clean)


def test_splice_reconstructs_from_edited_values_and_adds_the_error_of_the_unedited_ones(model):
    sae = make_sae()

    def double(top_indices, top_values):
        return torch.where(top_indices < 48, 2 * top_values, top_values)

    def expected(x, keep_error):
        indices, values = sae.encode(x, 5)
        edited = sae.decode(indices, double(indices, values))
        return (edited + keep_error * (x - sae.decode(indices, values))).detach()

    for keep_error in (False, True):
        with splice(model, sae, 1, k=5, keep_error=keep_error, edit=double):
            found = logits(model)
        torch.testing.assert_close(found, with_layer_output(model, 1, lambda x, keep=keep_error: expected(x, keep)))


def test_ablation_takes_away_what_the_latents_contribute(model):
    sae = make_sae()
    clean = states(model, 0)
    indices, values = sae.encode(clean, 4)
    latents = indices.flatten().unique()[:10].tolist()
    expected = clean.clone()
    for batch, position in torch.cartesian_prod(torch.arange(2), torch.arange(12)).tolist():
        for latent, value in zip(indices[batch, position].tolist(), values[batch, position]):
            if latent in latents:
                expected[batch, position] -= (value * sae.W_dec[latent]).detach()

    with ablate(model, sae, 0, latents, k=4):
        found = states(model, 0)

    assert not torch.allclose(found, clean, atol=1e-2)
    torch.testing.assert_close(found, expected)
    unused = sorted(set(range(96)) - set(indices.flatten().tolist()))
    with ablate(model, sae, 0, unused, k=4):
        assert torch.equal(states(model, 0), clean)


def test_steering_adds_directions_in_units_of_the_recorded_typical_activation(model):
    sae, x = make_sae(), torch.randn(500, 32)
    record_statistics(sae, x)
    clean = states(model, 0)

    with steer(model, sae, 0, 7, strength=-2.0):
        one = states(model, 0)
    with steer(model, sae, 0, [7, 9], strength=[1.5, 3.0]):
        two = states(model, 0)
    with steer(model, sae, 0, [7, 9], strength=[1.5, 3.0], typical_activation=1.0):
        plain = states(model, 0)

    torch.testing.assert_close(one - clean, (-2 * sae.mean_activation[7] * sae.W_dec[7]).expand_as(clean))
    expected = 1.5 * sae.mean_activation[7] * sae.W_dec[7] + 3 * sae.mean_activation[9] * sae.W_dec[9]
    torch.testing.assert_close(two - clean, expected.expand_as(clean), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain - clean, (1.5 * sae.W_dec[7] + 3 * sae.W_dec[9]).expand_as(clean))


def test_statistics_are_means_where_a_latent_fires_in_units_of_the_input_and_are_saved(tmp_path):
    sae, x = make_sae(d_in=6, d_sae=24, k=3), 5 * torch.randn(60, 6) + 2
    sae.initialize_from_activations(x)
    with torch.no_grad():
        sae.b_enc[:4] = -100
    totals, counts = torch.zeros(24), torch.zeros(24)
    for row in x:
        indices, values = sae.encode(row)
        for index, value in zip(indices.tolist(), values.tolist()):
            totals[index] += value
            counts[index] += value > 0

    record_statistics(sae, (piece for piece in x.split(13)), batch_size=7)

    torch.testing.assert_close(sae.mean_activation, totals / counts.clamp(min=1))
    assert (sae.mean_activation[:4] == 0).all() and (sae.mean_activation > 0).any()
    assert sae.median_norm == x.norm(dim=1).median()
    before = sae.mean_activation.clone()
    sae.fold_input_scale()
    sae.save_pretrained(tmp_path)
    loaded = HierarchicalSaeModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.mean_activation, before) and loaded.median_norm == sae.median_norm


@pytest.mark.parametrize("shape", [(60, 6), (4, 15, 6), (1, 60, 6), (60, 1, 6), (2, 3, 10, 6)])
def test_statistics_do_not_depend_on_the_leading_dimensions(shape):
    sae, other, x = make_sae(d_in=6, d_sae=24, k=3), make_sae(d_in=6, d_sae=24, k=3), 5 * torch.randn(60, 6) + 2

    record_statistics(sae, x)
    record_statistics(other, x.view(shape), batch_size=7)

    torch.testing.assert_close(other.mean_activation, sae.mean_activation)
    assert other.median_norm == sae.median_norm == x.norm(dim=1).median()


@pytest.mark.parametrize("intervene", ["splice", "ablate", "steer"])
def test_generation_with_a_cache_a_batch_and_padding_gives_what_a_loop_without_them_gives(model, intervene):
    sae = make_sae()
    record_statistics(sae, states(model, 0).flatten(0, 1))
    latent, half = int(sae.mean_activation.argmax()), range(0, 96, 2)
    contexts = {
        "splice": lambda: splice(model, sae, 0, k=4),
        "ablate": lambda: ablate(model, sae, 0, half),
        "steer": lambda: steer(model, sae, 0, latent, strength=4.0),
    }
    prompts = [IDS[0, :7], IDS[1, :3]]
    plain, expected = [], []
    for prompt in prompts:
        for context, outputs in ((ExitStack, plain), (contexts[intervene], expected)):
            ids = prompt.unsqueeze(0)
            with context():
                for _ in range(8):
                    ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
            outputs.append(ids[0, len(prompt) :].tolist())
    padded = torch.zeros(2, 7, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, 7 - len(prompt) :] = prompt
        mask[row, 7 - len(prompt) :] = 1

    with contexts[intervene]():
        # An end that is not in the vocabulary: every answer has its 8 tokens.
        found = model.generate(
            input_ids=padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=1000
        )

    assert found[:, 7:].tolist() == expected
    assert expected != plain


def test_padded_positions_do_not_matter(model):
    sae = make_sae()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with splice(model, sae, 0, k=4), ablate(model, sae, 1, [1, 2, 3]):
        alone = logits(model, IDS[:1, 5:])
        together = logits(model, IDS, attention_mask=mask)[:1, 5:]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        aligned = logits(model, IDS, attention_mask=mask, position_ids=position_ids)[:1, 5:]

    torch.testing.assert_close(aligned, alone, atol=1e-4, rtol=1e-4)
    # Rotary positions are relative: without aligned ones the logits are the same up to rounding.
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_several_autoencoders_at_several_layers_act_at_once(model):
    first, second = make_sae(), make_sae(d_sae=64)

    def spliced(contexts):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return logits(model)

    handle = model.get_decoder().layers[0].register_forward_hook(lambda m, a, x: first(x).reconstruction.detach())
    expected = with_layer_output(model, 1, lambda x: second(x, k=2).reconstruction.detach())
    handle.remove()

    found = spliced([splice(model, second, 1, k=2), splice(model, first, 0)])
    torch.testing.assert_close(found, expected)


def test_on_one_layer_they_act_in_the_order_of_entry(model):
    sae = make_sae()

    def steered(x):
        return (x + 5 * sae.W_dec[3]).detach()

    def reconstructed(x):
        return sae(x, k=2).reconstruction.detach()

    with steer(model, sae, 0, 3, strength=5.0, typical_activation=1.0), splice(model, sae, 0, k=2):
        first = logits(model)
    with splice(model, sae, 0, k=2), steer(model, sae, 0, 3, strength=5.0, typical_activation=1.0):
        last = logits(model)

    torch.testing.assert_close(first, with_layer_output(model, 0, lambda x: reconstructed(steered(x))))
    torch.testing.assert_close(last, with_layer_output(model, 0, lambda x: steered(reconstructed(x))))
    assert not torch.allclose(first, last, atol=1e-2)


def test_reported_hidden_states_are_those_after_the_change(model):
    sae, clean = make_sae(), states(model, 0)

    with steer(model, sae, 0, 3, strength=5.0, typical_activation=1.0):
        found = states(model, 0)

    torch.testing.assert_close(found, clean + 5 * sae.W_dec[3].detach())


def small(model_type, **options):
    sizes = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **options)).eval()


# A layer returns a list, a tuple (with its cache) and a Tensor here.
@pytest.mark.parametrize(
    "model_type, options",
    [
        ("openai-gpt", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}),
        ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 2}),
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 2}),
    ],
)
def test_every_form_of_layer_output_is_handled(model_type, options):
    model, sae = small(model_type, **options), make_sae()
    clean = logits(model)

    with splice(model, sae, 1, keep_error=True):
        assert torch.equal(logits(model), clean)
    with steer(model, sae, -2, 3, strength=5.0, typical_activation=1.0):
        steered = logits(model)
    assert not torch.allclose(steered[0], clean[0], atol=1e-3) and not torch.allclose(steered[1], clean[1], atol=1e-3)


def test_attention_sinks_keep_their_own_values(model):
    sae, clean = make_sae(), states(model, 0)
    norms = clean.norm(dim=-1)
    limit = norms.flatten().sort().values[-2].item()

    with splice(model, sae, 0, max_norm=limit):
        explicit = states(model, 0)
    sae.median_norm.fill_(limit / 5)
    with splice(model, sae, 0):
        recorded = states(model, 0)

    is_sink = norms > limit
    assert is_sink.sum() == 1
    assert torch.equal(explicit[is_sink], clean[is_sink]) and torch.equal(recorded, explicit)
    torch.testing.assert_close(explicit[~is_sink], sae(clean).reconstruction.detach()[~is_sink])


def test_the_ratio_of_training_says_which_values_are_kept(model):
    sae, clean = make_sae(), states(model, 0)
    norms = clean.norm(dim=-1)
    sae.median_norm.fill_(norms.median().item())
    between = norms.flatten().sort().values[-2:].mean().item() / norms.median().item()

    with splice(model, sae, 0, max_norm_ratio=between):
        some = states(model, 0)
    with splice(model, sae, 0, max_norm_ratio=None):
        assert torch.equal(states(model, 0) == clean, torch.zeros_like(clean, dtype=torch.bool))
    with ablate(model, sae, 0, list(range(sae.config.d_sae)), max_norm_ratio=1e-9):
        assert torch.equal(states(model, 0), clean)

    assert ((some == clean).all(dim=-1)).sum() == 1


def test_spliced_loss_is_that_of_the_evaluation(model, tiny_language_model):
    from transformers import AutoTokenizer

    sae, tokenizer = make_sae(), AutoTokenizer.from_pretrained(tiny_language_model)
    text = "To be, or not to be, that is the question."
    stream = iterate_activations(
        model, tokenizer, [text], 0, skip_first_position=False, max_norm_ratio=None, show_progress=False
    )
    evaluation = evaluate_in_model(sae, stream, [2, 8])

    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for budget, expected in zip(evaluation.budgets, evaluation.cross_entropy):
        with splice(model, sae, 0, k=budget), torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_everything_is_left_as_it_was(model):
    sae = make_sae().train()
    states(model, 0)
    layers = list(model.get_decoder().layers)
    hooks = [list(layer._forward_hooks) for layer in layers]
    clean, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(RuntimeError, match="on purpose"), splice(model, sae, 0), ablate(model, sae, 1, 3):
        assert not sae.training
        logits(model)
        raise RuntimeError("on purpose")
    with (
        pytest.raises(ValueError, match=r"k must be in \[1, 8\], the trained budget, got 9"),
        splice(model, sae, 0, k=9),
    ):
        logits(model)

    assert sae.training and not model.training
    assert [list(layer._forward_hooks) for layer in layers] == hooks
    assert torch.equal(logits(model), clean)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_gradients_reach_the_inputs_through_a_splice(model):
    sae = make_sae()
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with splice(model, sae, 0):
        model(inputs_embeds=embeddings).logits.square().mean().backward()

    assert embeddings.grad.isfinite().all() and embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "enter",
    [
        lambda model, sae: splice(model, sae, 0),
        lambda model, sae: ablate(model, sae, 0, 7, k=4),
        lambda model, sae: steer(model, sae, 0, 7, strength=2.0, typical_activation=1.0),
    ],
    ids=["splice", "ablate", "steer"],
)
def test_each_pass_inside_has_a_backward_pass_of_its_own(model, enter):
    sae, gradients = make_sae(), []
    with enter(model, sae):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(model(IDS).logits.square().mean(), [sae.W_dec])
            gradients.append(gradient)

    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_a_transcoder_keeps_one_of_the_passes_that_end_before_its_target(model):
    sae, read = make_sae(hook_point="mlp.input", target_hook_point="mlp.output"), []

    def end(module, args):
        read.append(weakref.ref(args[0]))
        raise MemoryError

    with splice(model, sae, 0):
        handle = model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(end)
        for _ in range(3):
            with pytest.raises(MemoryError):
                states(model, 0)
        handle.remove()
        gc.collect()
        assert len(read) == 3 and sum(of_pass() is not None for of_pass in read) <= 1


def double_some(top_indices, top_values):
    return torch.where(top_indices < 48, 2 * top_values, top_values)


@pytest.mark.parametrize("edit", [None, double_some])
def test_the_error_that_is_kept_is_a_constant_to_gradients(model, edit):
    model, sae = copy.deepcopy(model).double(), make_sae().double()
    weight = torch.randn(2, 12, model.config.vocab_size, dtype=torch.float64)

    def gradients(run):
        seen = {}

        def watch(top_indices, top_values):
            top_values.retain_grad()
            seen["values"] = top_values
            return top_values if edit is None else edit(top_indices, top_values)

        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        output = run(watch, embeddings)
        (output * weight).sum().backward()
        return output.detach(), seen["values"].grad, embeddings.grad

    def by_hand(watch, embeddings):
        def replace(module, args, x):
            indices, values = sae.encode(x)
            error = (x - sae.decode(indices, values)).detach()
            return sae.decode(indices, watch(indices, values)) + error

        handle = model.model.layers[0].register_forward_hook(replace)
        try:
            return model(inputs_embeds=embeddings).logits
        finally:
            handle.remove()

    def spliced(watch, embeddings):
        with splice(model, sae, 0, keep_error=True, edit=watch):
            return model(inputs_embeds=embeddings).logits

    for found, expected in zip(gradients(spliced), gradients(by_hand)):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_edit_in_place_is_an_edit(model):
    sae = make_sae()

    def in_place(top_indices, top_values):
        return top_values.mul_(2)

    with torch.no_grad():
        for keep_error in (False, True):
            with splice(model, sae, 0, keep_error=keep_error, edit=in_place):
                found = logits(model)
            with splice(model, sae, 0, keep_error=keep_error, edit=lambda indices, values: 2 * values):
                torch.testing.assert_close(found, logits(model))
    assert not torch.allclose(found, logits(model), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autoencoder_in_half_precision_is_used_inside_the_model(model, dtype):
    sae = make_sae()
    record_statistics(sae, torch.randn(500, 32) * 3)
    half = copy.deepcopy(sae).to(dtype)
    rounded = copy.deepcopy(half).float()
    live = sae.mean_activation.argmax().item()
    uses = [
        lambda sae: splice(model, sae, 0),
        lambda sae: splice(model, sae, 0, k=3, keep_error=True, edit=double_some),
        lambda sae: ablate(model, sae, 0, [live, 3]),
        lambda sae: steer(model, sae, 0, live, strength=2.0),
    ]
    for use in uses:
        with use(rounded):
            expected = logits(model)
        with use(half):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with splice(model, half, 0, keep_error=True):
        assert torch.equal(logits(model), logits(model.eval()))


def test_statistics_are_those_of_the_autoencoder_in_half_precision():
    sae, x = make_sae(), torch.randn(500, 32)
    half = copy.deepcopy(sae).bfloat16()

    record_statistics(sae, x), record_statistics(half, x)

    # two roundings to 8 bits, of the weights and of the result
    torch.testing.assert_close(half.median_norm.float(), sae.median_norm, rtol=2**-8, atol=0)
    often = sae.mean_activation > 1
    torch.testing.assert_close(half.mean_activation.float()[often], sae.mean_activation[often], rtol=0.05, atol=0.05)


def test_threads_that_share_a_model_get_what_they_asked_for(model):
    sae, barrier = make_sae(), threading.Barrier(4, timeout=60)
    record_statistics(sae, torch.randn(500, 32))
    live = sae.mean_activation.argmax().item()
    uses = [
        lambda: splice(model, sae, 0, k=2),
        lambda: steer(model, sae, 1, live, strength=20.0),
        lambda: ablate(model, sae, 0, range(96)),
        nullcontext,
    ]

    def answers():
        return logits(model), model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)

    def beside_others(use):
        with use():
            barrier.wait()
            found = [answers() for _ in range(3)]
            barrier.wait()
        return found

    expected = []
    for use in uses:
        with use():
            expected.append(answers())
    assert len({tuple(tokens.flatten().tolist()) for _, tokens in expected}) > 1
    with ThreadPoolExecutor(4) as pool:
        for tries, (own_logits, own_tokens) in zip(pool.map(beside_others, uses), expected):
            for found_logits, found_tokens in tries:
                assert torch.equal(found_logits, own_logits) and torch.equal(found_tokens, own_tokens)
    assert torch.equal(logits(model), expected[3][0])


def test_tasks_that_share_a_model_get_what_they_asked_for(model):
    sae = make_sae()

    async def ask(k, event, other):
        with splice(model, sae, 0, k=k) if k else nullcontext():
            event.set()
            await other.wait()
            return logits(model)

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(ask(2, first, second), ask(None, second, first))

    spliced, clean = asyncio.run(both())

    assert torch.equal(clean, logits(model)) and not torch.equal(spliced, clean)
    with splice(model, sae, 0, k=2):
        assert torch.equal(spliced, logits(model))


@pytest.mark.parametrize(
    "hook_point, message",
    [
        ("mlp.output", "trained on .*mlp.output of layer 0, "),
        ("mlp", "trained on .*mlp of layer 0, "),
        (
            "blocks.0.hook_mlp_out",
            "hook_point must be one of input, middle, output.*, got 'blocks.0.hook|of layer 0, ",
        ),
    ],
)
def test_an_autoencoder_of_another_site_is_refused_everywhere(model, tokenizer, tmp_path, hook_point, message):
    sae = make_sae(hook_point=hook_point, layer=0)
    stream = iterate_activations(model, tokenizer, ["to be or not to be"], 0, show_progress=False)
    save_shards(stream, tmp_path / "states")
    calls = [
        lambda: splice(model, sae, 0, hook_point="output").__enter__(),
        lambda: ablate(model, sae, 0, [1], hook_point="output").__enter__(),
        lambda: steer(model, sae, 0, 1, hook_point="output", strength=1.0, typical_activation=1.0).__enter__(),
        lambda: record_statistics(sae, stream),
        lambda: record_statistics(sae, ActivationShards(tmp_path / "states")),
        lambda: evaluate_budgets(sae, stream),
        lambda: evaluate_budgets(sae, ActivationShards(tmp_path / "states")),
        lambda: evaluate_in_model(sae, stream),
        lambda: read_latents(sae, model, tokenizer, ["to be or not to be"], hook_point="output", show_progress=False),
        lambda: write_dashboard(
            sae, model, tokenizer, ["to be"], path=tmp_path / "page", hook_point="output", show_progress=False
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["states"]


def test_statistics_of_a_stream_and_of_its_shards_are_the_same(model, tokenizer, tmp_path):
    def stream():
        return iterate_activations(model, tokenizer, ["to be or not to be"] * 4, 0, show_progress=False)

    save_shards(stream(), tmp_path)
    first, second = make_sae(layer=0), make_sae(layer=0)

    record_statistics(first, stream()), record_statistics(second, ActivationShards(tmp_path))

    assert torch.equal(first.median_norm, second.median_norm) and first.median_norm > 0
    with pytest.raises(ValueError, match=r"trained on activations of size 32 of layer 1, .* of size 32 of layer 0"):
        record_statistics(make_sae(layer=1), ActivationShards(tmp_path))


@pytest.mark.parametrize(
    "enter, message",
    [
        (lambda model, sae: splice(model, sae, 0, k=True), r"k must be an integer in \[1, 8\], got True"),
        (lambda model, sae: splice(model, sae, 0, k=2.5), r"k must be an integer in \[1, 8\], got 2.5"),
        (lambda model, sae: splice(model, sae, 0, k=9), r"k must be in \[1, 8\], the trained budget, got 9"),
        (lambda model, sae: splice(model, sae, True), "layer must be an integer, got True"),
        (lambda model, sae: splice(model, sae, 0.0), "layer must be an integer, got 0.0"),
        (
            lambda model, sae: splice(model, sae, 0, max_norm=-1.0),
            "max_norm must be a positive number, got -1.0",
        ),
        (
            lambda model, sae: splice(model, sae, 0, max_norm=math.nan),
            "max_norm must be a positive number, got",
        ),
        (
            lambda model, sae: steer(model, sae, 0, 1, strength=True, typical_activation=1.0),
            "strength must be finite numbers, got True",
        ),
        (
            lambda model, sae: steer(model, sae, 0, 1, strength="2", typical_activation=1.0),
            "strength must be finite numbers, got '2'",
        ),
        (
            lambda model, sae: splice(model, sae, 0, max_norm_ratio=0),
            "max_norm_ratio must be a positive number, got 0",
        ),
        (lambda model, sae: splice(model, sae, 0, max_norm="2"), "max_norm must be a positive number, got '2'"),
        (lambda model, sae: record_statistics(sae, {"a": 1}), "expected activations, a tensor or several, got a dict"),
        (lambda model, sae: record_statistics(sae, None), "expected activations, a tensor or several, got a NoneType"),
        (lambda model, sae: record_statistics(sae, [1]), "activations must be a tensor, got a int"),
        (lambda model, sae: ablate(model, sae, 0, [True, 3]), r"latents must be integers, got \[True, 3\]"),
        (lambda model, sae: ablate(model, sae, 0, 1.7), r"latents must be integers, got \[1.7\]"),
        (
            lambda model, sae: ablate(model, sae, 0, torch.ones(96, dtype=torch.bool)),
            "latents must be integers, got tens",
        ),
        (lambda model, sae: steer(model, sae, 0, True, strength=1.0), r"latents must be integers, got \[True\]"),
        (
            lambda model, sae: steer(model, sae, 0, 1, strength=math.nan, typical_activation=1.0),
            "strength must be finite numbers, got nan",
        ),
        (
            lambda model, sae: steer(model, sae, 0, 1, strength=1.0, typical_activation=math.inf),
            "typical_activation must be finite numbers, got inf",
        ),
        (
            lambda model, sae: record_statistics(sae, torch.randn(5, 32), batch_size=1.5),
            "batch_size must be an integer",
        ),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(model, enter, message):
    with pytest.raises(ValueError, match=message):
        enter(model, make_sae()).__enter__()


@pytest.mark.parametrize(
    "latent", [numpy.int64(3), torch.tensor(3), torch.tensor([3]), numpy.array([3]), [3], range(3, 4)]
)
def test_a_latent_of_any_integer_kind_is_that_latent(model, latent):
    sae, options = make_sae(), {"strength": 5.0, "typical_activation": 1.0}
    with steer(model, sae, numpy.int64(0), 3, **options):
        expected = logits(model)
    with steer(model, sae, 0, latent, **options):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("edit", [lambda indices, values: None, lambda indices, values: values[..., :1]])
def test_an_edit_that_returns_no_values_is_refused(model, edit):
    with splice(model, make_sae(), 0, edit=edit), pytest.raises(ValueError, match="must return the values|one shape"):
        logits(model)


@pytest.mark.parametrize(
    "enter, message",
    [
        (lambda model, sae: splice(model, sae, 2), r"layer must be in \[0, 1\], got 2"),
        (lambda model, sae: splice(model, make_sae(d_in=6), 0), "takes activations of size 6 .* has hidden_size 32"),
        (
            lambda model, sae: splice(model, make_sae(hook_point="hook_mlp_out"), 0),
            "hook_point must be one of input, middle, output, .*, got 'hook_mlp_out'",
        ),
        (lambda model, sae: ablate(model, sae, 0, [3, 96]), r"latents must be in \[0, d_sae=96\), got \[96\]"),
        (lambda model, sae: ablate(model, sae, 0, []), r"latents must be in \[0, d_sae=96\), got none"),
        (lambda model, sae: steer(model, sae, 0, -1, strength=1.0), r"latents must be in \[0, d_sae=96\), got \[-1\]"),
        (
            lambda model, sae: steer(model, sae, 0, [5, 6], strength=1.0),
            r"typical activation of latents \[5, 6\] is not on record: call record_statistics",
        ),
        (
            lambda model, sae: steer(model, sae, 0, [5, 6], strength=[1.0, 2.0, 3.0], typical_activation=1.0),
            r"one for each of the 2 latents, got shape \(3,\)",
        ),
        (lambda model, sae: record_statistics(sae, []), "got no tokens"),
        (lambda model, sae: record_statistics(sae, torch.full((2, 32), torch.nan)), "got 64 NaN"),
        (lambda model, sae: record_statistics(sae, torch.zeros(32, 8)), r"must have shape \(..., d_in=32\), got"),
    ],
)
def test_what_cannot_be_done_is_refused(model, enter, message):
    with pytest.raises(ValueError, match=message):
        enter(model, make_sae()).__enter__()


def test_a_layer_other_than_the_trained_one_is_mentioned(model, caplog):
    logging.enable_propagation()
    with splice(model, make_sae(layer=1), 0):
        pass
    logging.disable_propagation()

    assert "was trained on layer 1, it is used on 0" in caplog.text


@pytest.mark.parametrize("compile_it", [lambda model: torch.compile(model, backend="eager"), None])
def test_what_was_compiled_before_is_changed_as_well_and_afterwards_runs_compiled(tiny_language_model, compile_it):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    sae = make_sae(layer=0)
    plain = logits(model)
    with splice(model, sae):
        expected = logits(model)
    if compile_it is None:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = compile_it(model)
    torch.testing.assert_close(logits(compiled), plain)

    with splice(model, sae):
        torch.testing.assert_close(logits(compiled), expected)
        with ablate(model, sae, None, 3), ThreadPoolExecutor() as pool:
            torch.testing.assert_close(pool.submit(logits, compiled).result(), plain)
        torch.testing.assert_close(logits(compiled), expected)
    torch.testing.assert_close(logits(compiled), plain)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(logits(compiled), plain)


def test_a_median_norm_that_has_no_room_in_half_precision_is_no_limit(model):
    sae = make_sae(layer=0)
    sae.median_norm.fill_(1e5)
    sae = sae.half()

    with pytest.raises(ValueError, match="no room in torch.float16.*: load the autoencoder in float32 or bfloat16"):
        splice(model, sae).__enter__()
    with splice(model, sae, max_norm=50.0):
        assert logits(model).isfinite().all()


def test_an_autoencoder_on_disk_is_refused_where_its_weights_would_not_be_fetched(model, tmp_path):
    sae, x = make_sae(layer=0), torch.randn(3, 32)
    sae.save_pretrained(tmp_path / "sae")
    on_disk = HierarchicalSaeModel.from_pretrained(
        tmp_path / "sae", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )

    assert torch.equal(on_disk(x).reconstruction, sae(x).reconstruction)
    for refused in (lambda: on_disk.encode(x), lambda: splice(model, on_disk).__enter__()):
        with pytest.raises(ValueError, match="weights of this autoencoder are offloaded.*load it whole"):
            refused()
