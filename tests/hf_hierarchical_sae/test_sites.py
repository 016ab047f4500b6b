"""Sites: what is read there and what is written, against hooks and arithmetic of the tests' own, over architectures."""

import json
from contextlib import ExitStack

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    iterate_activations,
    load_saelens,
    load_sparsify,
    save_saelens,
    save_sparsify,
    splice,
    steer,
)
from hf_hierarchical_sae.language_model import decoder_layers, inputs_of
from hf_hierarchical_sae.sites import (
    HOOK_POINTS,
    check_fits,
    final_norm,
    find_site,
    read_sites,
    site_hook,
    writes_to_stream,
)


IDS, LAYER, WIDTH = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), 1, 16
MASK = torch.ones_like(IDS)
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
# fmt: off
# Class, sizes, and by paths within the layer: what attention takes and adds, what the MLP takes and adds.
ARCHITECTURES = {
    "llama": ("AutoModelForCausalLM", LLAMA, "self_attn", "self_attn", "mlp", "mlp"),
    "qwen3": ("AutoModelForCausalLM", LLAMA, "self_attn", "self_attn", "mlp", "mlp"),
    "mixtral": ("AutoModelForCausalLM", {**LLAMA, "num_local_experts": 3}, "self_attn", "self_attn", "mlp", "mlp"),
    "granite": (
        "AutoModelForCausalLM", {**LLAMA, "residual_multiplier": 0.3}, "self_attn", "self_attn", "mlp", "mlp",
    ),
    "gpt2": ("AutoModelForCausalLM", GPT, "attn", "attn", "mlp", "mlp"),
    "gemma2": (
        "AutoModelForCausalLM", LLAMA, "self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm",
    ),
    "olmo2": (
        "AutoModelForCausalLM", LLAMA, "self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm",
    ),
    "bloom": (
        "AutoModelForCausalLM", {"hidden_size": 16, "n_layer": 3, "n_head": 2},
        "self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h",
    ),
    "opt": (
        "AutoModelForCausalLM", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16},
        "self_attn", "self_attn", "fc1", "fc2",
    ),
    "modernbert": ("AutoModelForMaskedLM", SIZES, "attn", "attn", "mlp", "mlp"),
    "bert": ("AutoModelForMaskedLM", SIZES, "attention", "attention.output.dense", "intermediate", "output.dense"),
    "gpt_neox": ("AutoModelForCausalLM", SIZES, "attention", "attention", "mlp", "mlp"),
    "falcon": ("AutoModelForCausalLM", SIZES, "self_attention", "self_attention", "mlp", "mlp"),
    "t5": (
        "AutoModelForSeq2SeqLM", T5,
        "layer.0.SelfAttention", "layer.0.SelfAttention", "layer.2.DenseReluDense", "layer.2.DenseReluDense",
    ),
    "t5-encoder": (
        "T5ForTokenClassification", T5,
        "layer.0.SelfAttention", "layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.DenseReluDense",
    ),
}
# fmt: on
HEADS = {
    "llama": "self_attn.o_proj",
    "qwen3": "self_attn.o_proj",
    "mixtral": "self_attn.o_proj",
    "granite": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gemma2": "self_attn.o_proj",
    "olmo2": "self_attn.o_proj",
    "bloom": "self_attention.dense",
    "opt": "self_attn.out_proj",
    "modernbert": "attn.Wo",
    "bert": "attention.output.dense",
    "gpt_neox": "attention.dense",
    "falcon": "self_attention.dense",
    "t5": "layer.0.SelfAttention.o",
    "t5-encoder": "layer.0.SelfAttention.o",
}
PARALLEL = ("gpt_neox", "falcon")
SERIAL = [name for name in ARCHITECTURES if name not in PARALLEL]
POST_NORM = ("bert",)
SITES = [(name, site) for name in ARCHITECTURES for site in HOOK_POINTS if site != "middle" or name in SERIAL]


def build(name):
    torch.manual_seed(0)
    kind, sizes = ARCHITECTURES[name][:2]
    tokens = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    extra = {"cls_token_id": 1, "sep_token_id": 2} if name == "modernbert" else {}
    config = AutoConfig.for_model(name.partition("-")[0], **tokens, **extra, **sizes)
    cls = getattr(transformers, kind)
    model = (cls.from_config if kind.startswith("Auto") else cls._from_config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from uniform predictions: a change then shows.
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0).add_(0.1 if parameter.ndim == 1 else 0.0)
    return model


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in ARCHITECTURES}


def layer_of(model):
    return decoder_layers(model)[LAYER]


def run(model):
    with torch.no_grad():
        return model(**inputs_of(model, IDS, MASK)).logits


def states_of(value):
    return value if isinstance(value, torch.Tensor) else value[0]


def watch(model, path, *, is_input=False):
    """What a plain hook sees of a module of the layer, and of the layer itself if the path is empty."""
    seen, module = [], layer_of(model).get_submodule(path)

    def before(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(module, args, output):
        seen.append(states_of(output).clone())

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True) if is_input else module.register_forward_hook(after)
    )
    try:
        run(model)
    finally:
        handle.remove()
    return seen[0].view(*IDS.shape, -1)


def plainly(model, name, site):
    """Hidden states at a site by plain hooks; in the middle, what the residual equation gives."""
    paths = dict(zip(("attention.input", "attention.output", "mlp.input", "mlp.output"), ARCHITECTURES[name][2:]))
    paths["attention.heads"] = HEADS[name]
    if site in ("input", "output"):
        return watch(model, "", is_input=site == "input")
    # What Granite adds is a part of what the block gives.
    factor = ARCHITECTURES[name][1].get("residual_multiplier", 1.0)
    if site != "middle":
        states = watch(model, paths[site], is_input=not site.endswith("output"))
        return states * factor if site.endswith("output") else states
    if name in POST_NORM:
        return watch(model, "attention")
    middle = watch(model, "", is_input=True) + watch(model, paths["attention.output"]) * factor
    # The decoder of T5 attends to the encoder in between.
    return middle + watch(model, "layer.1.EncDecAttention") if name == "t5" else middle


def read(model, *sites):
    return read_sites(model, [find_site(model, LAYER, site) for site in sites], IDS, MASK)


@pytest.mark.parametrize("name, site", SITES)
def test_what_is_read_is_what_a_plain_hook_reads(models, name, site):
    (states,) = read(models[name], site)

    assert states.shape == (2, 4, WIDTH)
    torch.testing.assert_close(states, plainly(models[name], name, site), rtol=0, atol=0)


@pytest.mark.parametrize("name, site", SITES)
def test_writing_what_is_there_changes_nothing_to_the_bit_and_another_changes_the_model(models, name, site):
    model, place = models[name], find_site(models[name], LAYER, site)
    clean = run(model)

    with site_hook(place, torch.clone):
        same = run(model)
    with site_hook(place, lambda states: 0.5 * states + 0.1):
        other = run(model)

    assert torch.equal(same, clean) and torch.equal(run(model), clean) and not torch.allclose(other, clean)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("block", ["attention", "mlp"])
def test_zeros_are_what_a_block_without_weights_adds(models, name, block):
    model = build(name)
    with site_hook(find_site(model, LAYER, f"{block}.output"), torch.zeros_like):
        zeros = run(model)
    assert not torch.allclose(zeros, run(model))

    first, last = ARCHITECTURES[name][2:4] if block == "attention" else ARCHITECTURES[name][4:]
    # A norm behind the block gives zeros for zeros.
    module = layer_of(model).get_submodule(first if last.endswith("norm") else last)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()

    torch.testing.assert_close(run(model), zeros, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SERIAL)
def test_all_that_a_layer_gives_comes_through_the_middle(models, name):
    model, generator = models[name], torch.Generator().manual_seed(3)
    given = torch.randn(2, 4, WIDTH, generator=generator)

    def written(use=None):
        with ExitStack() as inside:
            if use is not None:
                inside.enter_context(site_hook(find_site(model, LAYER, "input"), use))
            middle = find_site(model, LAYER, "middle")
            inside.enter_context(site_hook(middle, lambda states: given.view_as(states)))
            return read(model, "middle", "mlp.output", "output")

    middle, added, output = written()
    # What comes before the middle has no way around it.
    assert torch.equal(output, written(torch.zeros_like)[2]) and torch.equal(middle, given)
    if name not in POST_NORM:
        torch.testing.assert_close(output, given + added, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PARALLEL)
def test_attention_beside_the_mlp_has_no_middle(models, name):
    with pytest.raises(
        ValueError,
        match=r"middle of layer 1 is not to be had in \w+, which has input, output, attention.input, attention.heads, "
        "attention.output, "
        "mlp.input, mlp.output: give one of these",
    ):
        find_site(models[name], LAYER, "middle")
    (x, a, m, y) = read(models[name], "input", "attention.output", "mlp.output", "output")
    torch.testing.assert_close(x + a + m, y, rtol=0, atol=1e-6)


def test_a_layer_without_attention_says_what_it_has():
    sizes = {**LLAMA, "lru_width": 16, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("recurrent_gemma", **sizes)).eval()

    with pytest.raises(
        ValueError, match="not to be had in .*, which has input, middle, output, mlp.input, mlp.output"
    ):
        find_site(model, 0, "attention.output")


def test_two_mlps_side_by_side_are_not_taken_for_one():
    sizes = {
        **LLAMA,
        "vocab_size": 300,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 8,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granitemoeshared", **sizes)).eval()

    for site in ("mlp.input", "mlp.output"):
        with pytest.raises(ValueError, match=f"{site} of layer 1 is not to be had in .*, which has input,.* output"):
            find_site(model, LAYER, site)
    assert find_site(model, LAYER, "shared_mlp").width == WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_middle_is_written_without_rounding(models, dtype):
    model = build("llama").to(dtype)
    given = torch.randn(2, 4, WIDTH).to(dtype)

    with site_hook(find_site(model, LAYER, "middle"), lambda states: given):
        middle, added, output = read(model, "middle", "mlp.output", "output")

    assert torch.equal(middle, given) and torch.equal(output, given + added)


def test_gradients_pass_through_what_is_written_in_the_middle(models):
    model, site = models["llama"], find_site(models["llama"], LAYER, "middle")
    direction = torch.zeros(WIDTH, requires_grad=True)

    def loss():
        return model(IDS).logits.square().mean()

    with site_hook(site, lambda states: states + states * direction):
        (gradient,) = torch.autograd.grad(loss(), direction)
    numeric = torch.empty(WIDTH)
    for index in range(WIDTH):
        losses = []
        for step in (1e-2, -1e-2):
            shift = torch.zeros(WIDTH).index_fill(0, torch.tensor([index]), step)
            with torch.no_grad(), site_hook(site, lambda states, shift=shift: states + states * shift):
                losses.append(loss())
        numeric[index] = (losses[0] - losses[1]) / 2e-2

    # Central differences of step 0.01 in float32.
    torch.testing.assert_close(gradient, numeric, rtol=2e-2, atol=2e-3 * float(gradient.abs().max()))


def test_a_module_is_a_site_by_its_path_in_the_layer_or_in_the_model(models):
    model = models["llama"]
    inner = find_site(model, LAYER, "mlp.gate_proj")

    assert inner.width == 32 and inner == find_site(model, None, "model.layers.1.mlp.gate_proj")
    assert inner == find_site(model, None, "layers.1.mlp.gate_proj")
    assert find_site(model, LAYER, "mlp") == find_site(model, LAYER, "mlp.output")
    assert find_site(models["granite"], LAYER, "mlp") != find_site(models["granite"], LAYER, "mlp.output")
    assert find_site(model, None, "model.layers.1") == find_site(model, LAYER) == find_site(model, -2, "output")
    assert torch.equal(read(model, "mlp.gate_proj")[0], watch(model, "mlp.gate_proj"))


def test_a_peft_model_has_the_same_sites_with_what_its_adapters_add():
    model = get_peft_model(build("bloom"), LoraConfig(target_modules=["dense"], init_lora_weights=False)).eval()

    x, a, middle = read(model, "input", "attention.output", "middle")

    torch.testing.assert_close(x + a, middle, rtol=0, atol=1e-6)


def test_several_sites_are_read_in_one_pass_that_stops_at_the_last():
    model, reached = build("gpt2"), []
    decoder_layers(model)[1].register_forward_hook(lambda *given: reached.append("output"))
    decoder_layers(model)[0].register_forward_hook(lambda *given: reached.append("before"))
    sites = [find_site(model, LAYER, site) for site in ("mlp.input", "input", "attention.output")]
    reached.clear()

    found = read_sites(model, sites, IDS, MASK)

    assert reached == ["before"]
    for states, site in zip(found, sites):
        assert torch.equal(states, plainly(model, "gpt2", site.hook_point))


def test_a_model_that_goes_on_in_place_leaves_what_was_read_alone(models):
    alone = read(models["falcon"], "mlp.output")[0]

    beside_others = read(models["falcon"], "mlp.output", "output")[0]

    assert torch.equal(beside_others, alone)


@pytest.mark.parametrize(
    "layer, hook_point, message",
    [
        (
            LAYER,
            "hook_mlp_out",
            "hook_point must be one of input, middle, .* of layer 1, such as self_attn, .*, got 'hook",
        ),
        (None, "mlp", "or the path of one of the modules of LlamaForCausalLM, .*, got 'mlp'"),
        (None, "output", "hook_point='output' is a site of a layer: say which layer"),
        (LAYER, 3, "hook_point must be one of .* or a module's path, got 3"),
        (LAYER, "mlp.act_fn.nothing", "got 'mlp.act_fn.nothing'"),
        (7, "middle", r"layer must be in \[0, 2\], got 7"),
    ],
)
def test_what_is_no_site_is_refused(models, layer, hook_point, message):
    with pytest.raises(ValueError, match=message):
        find_site(models["llama"], layer, hook_point)


def test_a_module_that_does_not_run_is_refused():
    model = build("llama")
    layer_of(model).unused = torch.nn.Linear(WIDTH, WIDTH)

    with pytest.raises(
        ValueError, match="unused of layer 1 returns no hidden states in a pass over text: give another"
    ):
        find_site(model, LAYER, "unused")


TOWER = {**SIZES, "image_size": 16, "patch_size": 4}
WAVE = {
    **SIZES, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SPEECH = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20, "vocab_size": 30,
    "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# Class, sizes, shape of the inputs; those that add attention and MLP to one stream, and nothing else.
MEDIA = {
    "vit": ("ViTModel", TOWER, (2, 3, 16, 16), True),
    "dinov2": ("Dinov2Model", TOWER, (2, 3, 16, 16), True),
    "siglip_vision_model": ("SiglipVisionModel", TOWER, (2, 3, 16, 16), True),
    "clip_vision_model": ("CLIPVisionModel", TOWER, (2, 3, 16, 16), True),
    "wav2vec2": ("Wav2Vec2Model", WAVE, (2, 400), False),
    "whisper": ("WhisperModel", SPEECH, (2, 8, 40), False),
}


@pytest.mark.parametrize("name", MEDIA)
def test_models_of_images_and_sound_have_the_same_sites(name):
    kind, sizes, shape, is_sum = MEDIA[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(AutoConfig.for_model(name, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.ndim == 1 else 0.0)
    inputs = {model.main_input_name: torch.randn(shape)}
    inputs |= {"decoder_input_ids": IDS} if name == "whisper" else {}
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=WIDTH, d_sae=32, k=2)).eval()
    seen = {}

    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        for site in HOOK_POINTS:
            with site_hook(find_site(model, LAYER, site), lambda states, site=site: seen.update({site: states})):
                assert torch.equal(model(**inputs).last_hidden_state, plain)
            with splice(model, sae, layer=LAYER, hook_point=site):
                assert not torch.equal(model(**inputs).last_hidden_state, plain)

    assert {states.shape[-1] for states in seen.values()} == {WIDTH} and not torch.equal(
        seen["mlp.input"], seen["attention.input"]
    )
    if is_sum:
        torch.testing.assert_close(seen["middle"], seen["input"] + seen["attention.output"])
        torch.testing.assert_close(seen["output"], seen["middle"] + seen["mlp.output"])


def test_text_is_not_read_with_a_model_of_images(tiny_language_model):
    tower = transformers.ViTModel(transformers.ViTConfig(**TOWER))

    with pytest.raises(ValueError, match="a language model, which takes token ids, got a ViTModel, .* pixel_values"):
        next(
            iterate_activations(tower, AutoTokenizer.from_pretrained(tiny_language_model), ["To be, or not"], layer=1)
        )


def test_what_does_not_belong_to_positions_is_refused(models):
    with pytest.raises(ValueError, match=r"expected hidden states of shape \(2, 4, 8\) at the module rotary_emb, got"):
        read_sites(models["llama"], [find_site(models["llama"], None, "rotary_emb")], IDS, MASK)


def test_a_site_is_looked_for_without_the_edits_that_are_open(models):
    model, calls = models["llama"], []
    expected = [find_site(model, LAYER, name) for name in HOOK_POINTS]

    with site_hook(find_site(model, 0, "middle"), calls.append):
        assert [find_site(model, LAYER, name) for name in HOOK_POINTS] == expected
        assert not calls
        run(model)

    assert len(calls) == 1


def make_sae(**options):
    torch.manual_seed(1)
    return HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": WIDTH, "d_sae": 64, "k": 5, **options})).eval()


def test_an_autoencoder_that_fits_is_given_its_site(models):
    assert check_fits(make_sae(), models["llama"], -1).layer == 2
    site = check_fits(make_sae(hook_point="mlp.output"), models["llama"], LAYER, "mlp")
    assert site.hook_point == "mlp.output" and str(site) == "mlp.output of layer 1"
    assert str(check_fits(make_sae(), models["llama"], LAYER, "mlp")) == "mlp of layer 1"


@pytest.mark.parametrize(
    "options, given, message",
    [
        ({}, (3,), r"layer must be in \[0, 2\], got 3"),
        ({"d_in": 6, "model_name": "other"}, (0,), r"size 6 \(it was trained on other\), the .* has hidden_size 16"),
        ({"hook_point": "mlp.up_proj"}, (0,), "size 16 .* has at mlp.up_proj of layer 0 the size 32: give the model"),
        (
            {"hook_point": "mlp.output"},
            (0, "output"),
            "trained on mlp.output of layer 0, got layer 0: give it hook_point",
        ),
        ({"hook_point": "hook_z"}, (0,), "hook_point must be one of input, middle, .*, got 'hook_z'"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(models, options, given, message):
    with pytest.raises(ValueError, match=message):
        check_fits(make_sae(**options), models["llama"], *given)


@pytest.mark.parametrize(
    "name, site", [(name, site) for name, site in SITES if name in ("llama", "granite", "gpt2", "opt")]
)
def test_splice_puts_the_reconstruction_where_the_autoencoder_was_trained(models, name, site):
    model, sae = models[name], make_sae(layer=LAYER, hook_point=site)
    clean = run(model)

    with splice(model, sae, k=3):
        spliced = run(model)
    with splice(model, sae, LAYER, keep_error=True):
        kept = run(model)
    place = find_site(model, LAYER, site)
    with site_hook(place, lambda states: sae(states, k=3).reconstruction.detach()):
        expected = run(model)

    assert torch.equal(kept, clean) and not torch.allclose(spliced, clean)
    torch.testing.assert_close(spliced, expected, atol=1e-4, rtol=1e-4)


def test_splices_at_sites_of_one_layer_act_in_the_order_of_the_model(models):
    model, saes = models["llama"], {site: make_sae(layer=LAYER, hook_point=site) for site in HOOK_POINTS}
    with ExitStack() as inside:
        for site in reversed(HOOK_POINTS):
            inside.enter_context(splice(model, saes[site]))
        found = dict(zip(HOOK_POINTS, read(model, *HOOK_POINTS)))

    (x,) = read(model, "input")
    layer = layer_of(model)

    def rebuilt(site, states):
        return saes[site](states).reconstruction.detach()

    x = rebuilt("input", x)
    torch.testing.assert_close(found["input"], x)
    torch.testing.assert_close(
        found["attention.input"], rebuilt("attention.input", layer.input_layernorm(x).detach()), atol=1e-5, rtol=1e-5
    )
    middle = rebuilt("middle", x + found["attention.output"])
    torch.testing.assert_close(found["middle"], middle, atol=1e-5, rtol=1e-5)
    taken = rebuilt("mlp.input", layer.post_attention_layernorm(middle).detach())
    torch.testing.assert_close(found["mlp.input"], taken, atol=1e-5, rtol=1e-5)
    added = rebuilt("mlp.output", layer.mlp(taken).detach())
    torch.testing.assert_close(found["mlp.output"], added, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["output"], rebuilt("output", middle + added), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["middle", "mlp.output", "attention.input", "input", "mlp"])
def test_generation_with_a_cache_is_that_without(models, site):
    model, sae = models["llama"], make_sae(layer=LAYER, hook_point=site)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with splice(model, sae, k=2):
        cached, whole = (model.generate(IDS[:1], use_cache=use, **options) for use in (True, False))

    assert torch.equal(cached, whole)
    assert not torch.equal(cached, model.generate(IDS[:1], **options))


def test_steering_adds_at_the_site(models):
    model, sae = models["llama"], make_sae(layer=LAYER, hook_point="middle")
    (middle,) = read(model, "middle")

    with steer(model, sae, None, 3, strength=2.0, typical_activation=1.0):
        (steered,) = read(model, "middle")

    torch.testing.assert_close(steered - middle, (2.0 * sae.W_dec[3]).detach().expand(2, 4, -1), atol=1e-6, rtol=1e-5)


# Their name, and ours: what cannot be translated keeps it.
NAMES = {
    "blocks.3.hook_resid_pre": (3, "input"),
    "blocks.0.hook_resid_pre": (0, "input"),
    "blocks.3.hook_resid_mid": (3, "middle"),
    "blocks.13.hook_resid_post": (13, "output"),
    "blocks.3.attn.hook_in": (3, "attention.input"),
    "blocks.3.attn.hook_z": (3, "attention.heads"),
    "blocks.3.hook_attn_out": (3, "attention.output"),
    "blocks.3.mlp.hook_in": (3, "mlp.input"),
    "blocks.3.hook_mlp_out": (3, "mlp.output"),
    "layers.3.mlp": (3, "mlp"),
    "layers.0.self_attn.o_proj": (0, "self_attn.o_proj"),
    "blocks.3.hook_mlp_in": (None, "blocks.3.hook_mlp_in"),
    "blocks.3.ln2.hook_normalized": (None, "blocks.3.ln2.hook_normalized"),
    "layers.3.mlp.output": (None, "layers.3.mlp.output"),
    "model.encoder.layers.3.mlp": (None, "model.encoder.layers.3.mlp"),
    "model.vision_tower.layers.3": (None, "model.vision_tower.layers.3"),
    "decoder.block.3.layer.0.SelfAttention": (None, "decoder.block.3.layer.0.SelfAttention"),
    "blocks.3.hook_mlp_out.more": (None, "blocks.3.hook_mlp_out.more"),
}


@pytest.mark.parametrize("name, place", NAMES.items())
def test_names_of_saelens_are_translated_both_ways(tmp_path, name, place):
    layer, hook_point = place
    save_saelens(make_sae(layer=layer, hook_point=hook_point), tmp_path / "there")
    loaded = load_saelens(tmp_path / "there")
    save_saelens(loaded, tmp_path / "again")

    names = [
        json.loads((tmp_path / path / "cfg.json").read_text())["metadata"]["hook_name"] for path in ("there", "again")
    ]
    assert names == [name, name] and (loaded.config.layer, loaded.config.hook_point) == place


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.3.mlp", (3, "mlp")),
        ("transformer.h.3", (3, "output")),
        ("transformer.h.3.attn.c_proj", (3, "attn.c_proj")),
        ("layers.3", (3, "output")),
    ],
)
def test_paths_of_modules_are_read_from_any_model(tmp_path, name, place):
    save_sparsify(make_sae(layer=place[0], hook_point=place[1]), tmp_path / name)

    loaded = load_sparsify(tmp_path / name).config
    assert (loaded.layer, loaded.hook_point) == place


@pytest.mark.parametrize(
    "hook_point, named",
    [("mlp.output", "layers.3.mlp"), ("mlp.output", "h.3.ffn"), ("attention.output", "layers.3.self_attn")],
)
def test_a_folder_is_called_after_the_module_that_gives_it(tmp_path, hook_point, named):
    save_sparsify(make_sae(layer=3, hook_point=hook_point), tmp_path / named)

    assert (tmp_path / named / "cfg.json").exists()


@pytest.mark.parametrize(
    "hook_point, place, named",
    [
        ("mlp.output", "blocks.3.hook_mlp_out", "layers.3.self_attn"),
        ("mlp.output", "blocks.3.hook_mlp_out", "layers.3"),
        ("mlp.input", "blocks.3.mlp.hook_in", "layers.3.mlp"),
        ("middle", "blocks.3.hook_resid_mid", "layers.3"),
        ("input", "blocks.3.hook_resid_pre", "layers.3"),
        ("output", "layers.3", "layers.3.mlp"),
        ("mlp", "layers.3.mlp", "layers.3.self_attn"),
    ],
)
def test_a_folder_that_means_another_place_is_refused(tmp_path, hook_point, place, named):
    with pytest.raises(
        ValueError, match=f"the place of the autoencoder, which is {place}, got {named}: give the folder"
    ):
        save_sparsify(make_sae(layer=3, hook_point=hook_point), tmp_path / named)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "gpt2", "gemma2", "olmo2", "gpt_neox"])
def test_what_is_read_is_what_transformer_lens_reads_under_its_names(models, tmp_path, name):
    pytest.importorskip("transformer_lens")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge

    words = {"[BOS]": 1, "[EOS]": 2, "[PAD]": 0}
    special = {f"{word[1:4].lower()}_token": word for word in words}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    models[name].save_pretrained(tmp_path)

    _, theirs = TransformerBridge.boot_transformers(str(tmp_path)).run_with_cache(IDS)

    for site in [site for site in HOOK_POINTS if (name, site) in SITES]:
        # It computes the layers itself, in another order of additions.
        expected = theirs[f"blocks.{LAYER}.{HOOK_POINTS[site]}"].flatten(2)
        torch.testing.assert_close(read(models[name], site)[0], expected, atol=1e-4, rtol=1e-4)
    assert (f"blocks.{LAYER}.hook_resid_mid" in theirs) == (name in SERIAL)


NORMS = {
    "llama": "model.norm",
    "granite": "model.norm",
    "gpt2": "transformer.ln_f",
    "bloom": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "modernbert": "head.norm",
    "bert": "cls.predictions.transform.LayerNorm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "t5": "decoder.final_layer_norm",
}


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_before_the_unembedding_is_found_whatever_it_is_called(name, models):
    assert final_norm(models[name]) is models[name].get_submodule(NORMS[name])


OTHERS = {
    "olmo": {},
    "nanochat": {},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 32, "moe_layers": []},
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 50,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_final_norm_without_a_gain_and_one_of_several_norms_are_found(name):
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(name, **{**LLAMA, "num_key_value_heads": 2}, **tokens, **OTHERS[name])
    model = AutoModelForCausalLM.from_config(config).eval()

    assert final_norm(model) is model.model.norm


def test_a_model_whose_layers_end_in_norms_has_no_final_norm():
    sizes = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
    config = AutoConfig.for_model("opt", vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)

    assert final_norm(AutoModelForCausalLM.from_config(config).eval()) is None


@pytest.mark.parametrize(
    "hook_point, expected",
    [
        *((name, name in ("input", "middle", "output", "attention.output", "mlp.output")) for name in HOOK_POINTS),
        ("mlp", True),
        ("mlp.down_proj", True),
        ("self_attn.o_proj", True),
        ("mlp.up_proj", False),
        ("self_attn.q_proj", False),
    ],
)
def test_sites_that_write_to_the_residual_stream_are_told_from_others(hook_point, expected, models):
    model = models["llama"]

    assert writes_to_stream(model, find_site(model, LAYER, hook_point)) == expected
