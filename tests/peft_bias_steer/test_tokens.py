"""The vectors act on the tokens that the caller chose: in `generate` however it runs, and in scoring."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    ContinuousBatchingConfig,
    DataCollatorWithFlattening,
    StaticCache,
    T5Config,
)

from peft_bias_steer import BiasSteerConfig
from peft_bias_steer.tokens import TokenChoice, as_choice
from tests.peft_bias_steer.tiny_models import make_base, steer


PROMPTS = [3, 7, 5]  # tokens of each row's prompt
NEW = 6
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
# float64 after three layers of width 32: the sums are only ordered differently
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture
def steered(llama, set_vectors):
    model = get_peft_model(llama().double(), BiasSteerConfig(task_type="CAUSAL_LM"), adapter_name="x").eval()
    model.add_adapter("y", BiasSteerConfig(layers_to_transform=[0, 2]))
    set_vectors(model, "x")
    set_vectors(model, "y")
    return model


@pytest.fixture
def prompts(tokens):
    """Prompts of different lengths in one batch, padded on the left."""
    mask = torch.arange(7) >= 7 - torch.tensor(PROMPTS)[:, None]
    return {"input_ids": tokens * mask, "attention_mask": mask.long()}


def by_hand(llama, model, ids, name, acts):
    """
    The logits of one row without padding, of a model whose layers add the vector of `name` to the tokens that `acts`.
    """
    base = llama().double()
    vectors = {}
    for index, steering in enumerate(model.base_model.steering_layers.values()):
        if name in steering.bias_steer_vector:
            vectors[index] = steering.vector(name).detach().double()

    def add(index):
        return lambda module, args, output: output + acts[:, None] * vectors[index]

    for index in vectors:
        base.model.layers[index].register_forward_hook(add(index))
    with torch.no_grad():
        return base(ids[None]).logits[0]


def acting(tokens, prompt_length, length):
    positions = torch.arange(length)
    chosen = {"all": positions >= 0, "prompt": positions < prompt_length, "generated": positions >= prompt_length}
    return chosen[tokens].double()


def continue_by_hand(llama, model, prompt, tokens, name="x"):
    """Greedy continuation of one prompt without padding or cache, and its logits."""
    ids = prompt
    for _ in range(NEW):
        logits = by_hand(llama, model, ids, name, acting(tokens, len(prompt), len(ids)))
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    logits = by_hand(llama, model, ids, name, acting(tokens, len(prompt), len(ids)))
    return ids[len(prompt) :], logits[len(prompt) - 1 : -1]


def rows_of(prompts):
    return [ids[mask.bool()] for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"])]


def check_generated(output, expected, width):
    sequences, logits = zip(*expected)
    assert torch.equal(output.sequences[:, width:], torch.stack(sequences))
    torch.testing.assert_close(torch.stack(output.logits, 1).double(), torch.stack(logits), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("part", ["prompt", "generated", ["generated", "all", "prompt"]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 2},
        {"cache_implementation": "dynamic", "prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_generate_equals_a_loop_by_hand_with_and_without_a_cache(llama, steered, prompts, part, options):
    each = [part] * 3 if isinstance(part, str) else part
    expected = [continue_by_hand(llama, steered, row, one) for row, one in zip(rows_of(prompts), each)]

    with steered.steer_tokens(part):
        output = steered.generate(**prompts, **GREEDY, **options)

    check_generated(output, expected, width=7)


@pytest.mark.parametrize("part", ["prompt", "generated"])
@pytest.mark.parametrize("assistant", ["model", "prompt"])
def test_assisted_generation_equals_a_loop_by_hand(llama, steered, prompts, part, assistant):
    row = rows_of(prompts)[1]
    options = {"assistant_model": llama().double()} if assistant == "model" else {"prompt_lookup_num_tokens": 2}

    with steered.steer_tokens(part):
        output = steered.generate(row[None], attention_mask=torch.ones_like(row[None]), **GREEDY, **options)

    check_generated(output, [continue_by_hand(llama, steered, row, part)], width=7)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_first_generated_token_is_the_choice_of_the_base_model(llama, prompts, task_type):
    model = get_peft_model(llama(), BiasSteerConfig(init_weights=False, task_type=task_type)).eval()
    with model.disable_adapter():
        base = model.generate(**prompts, **GREEDY).logits

    with model.steer_tokens("generated"):
        logits = model.generate(**prompts, **GREEDY).logits

    assert torch.equal(logits[0], base[0])
    assert not torch.equal(logits[1], base[1])


def test_scoring_equals_a_loop_by_hand_in_every_row(llama, steered, prompts):
    """Each row chooses its tokens and its adapter; padding stands before the prompts and after the completions."""
    completions = torch.randint(1, 64, (3, 5), generator=torch.Generator().manual_seed(2))
    ends = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    ids = torch.cat([prompts["input_ids"], completions], 1)
    mask = torch.cat([prompts["attention_mask"], ends.long()], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    choices, names = ["generated", "prompt", "generated"], ["x", "y", "y"]

    with torch.no_grad(), steered.steer_tokens(choices, prompt_lengths=torch.tensor(PROMPTS)):
        logits = steered(input_ids=ids, attention_mask=mask, position_ids=positions, adapter_names=names).logits

    for row, choice, name, length in zip(range(3), choices, names, PROMPTS):
        own = ids[row][mask[row].bool()]
        expected = by_hand(llama, steered, own, name, acting(choice, length, len(own)))
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, **EXACT)


@pytest.mark.parametrize("part", ["prompt", "generated"])
def test_scoring_gives_what_generate_gave(steered, prompts, part):
    with steered.steer_tokens(part):
        output = steered.generate(**prompts, **GREEDY)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1)
    with torch.no_grad(), steered.steer_tokens(part, prompt_lengths=PROMPTS):
        logits = steered(output.sequences, attention_mask=mask).logits

    torch.testing.assert_close(torch.stack(output.logits, 1), logits[:, 6:-1].float(), atol=1e-6, rtol=1e-6)


def test_scoring_token_by_token_with_a_cache_equals_one_pass(steered, tokens):
    with torch.no_grad(), steered.steer_tokens(["prompt", "generated", "generated"], prompt_lengths=[2, 3, 0]):
        expected = steered(tokens).logits
        cache, parts = None, []
        for part in tokens.split([2, 1, 1, 3], dim=1):
            output = steered(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)

    torch.testing.assert_close(torch.cat(parts, 1), expected, **EXACT)


def test_a_mask_of_four_dimensions_says_nothing_of_padding(steered, tokens):
    causal = torch.ones(7, 7).tril().bool()[None, None].expand(3, 1, 7, 7)
    with torch.no_grad(), steered.steer_tokens("generated", prompt_lengths=PROMPTS):
        expected = steered(tokens).logits
        torch.testing.assert_close(steered(tokens, attention_mask=causal).logits, expected, **EXACT)


@pytest.mark.parametrize("part", ["prompt", "generated"])
def test_packed_rows_have_a_prompt_in_every_document(llama, steered, tokens, part):
    documents, lengths = [tokens[0, :6], tokens[1, :5], tokens[2, :3]], [3, 2, 0]
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": d.tolist()} for d in documents])

    with torch.no_grad(), steered.steer_tokens(part, prompt_lengths=lengths):
        logits = steered(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits[0]

    for found, own, length in zip(logits.split([6, 5, 3]), documents, lengths):
        torch.testing.assert_close(found, by_hand(llama, steered, own, "x", acting(part, length, len(own))), **EXACT)
    with steered.steer_tokens(part, prompt_lengths=[3]), pytest.raises(ValueError, match="per document .* 1 for 3"):
        steered(packed["input_ids"], position_ids=packed["position_ids"])


def test_padding_that_no_mask_of_two_dimensions_tells_is_refused(steered, tokens):
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], list(range(7)), list(range(7))])
    causal = torch.ones(7, 7).tril().bool()[None, None].expand(3, 1, 7, 7)
    with (
        steered.steer_tokens("generated", prompt_lengths=PROMPTS),
        pytest.raises(ValueError, match="3 for 5: padding needs an attention_mask of two dimensions"),
    ):
        steered(tokens, attention_mask=causal, position_ids=positions)


def test_a_mask_as_wide_as_a_static_cache_counts_what_is_in_the_cache(steered, tokens):
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wide = torch.cat([mask, torch.zeros(3, 9, dtype=torch.long)], 1)
    cache = StaticCache(config=steered.config, max_cache_len=16)

    with torch.no_grad(), steered.steer_tokens("generated", prompt_lengths=PROMPTS):
        expected = steered(tokens, attention_mask=mask, position_ids=positions).logits
        parts = [
            steered(part, attention_mask=wide, position_ids=where, past_key_values=cache).logits
            for part, where in zip(tokens.split([5, 2], 1), positions.split([5, 2], 1))
        ]

    torch.testing.assert_close(torch.cat(parts, 1)[:, 2:], expected[:, 2:], **EXACT)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_every_row_of_a_mixed_batch_generates_what_it_generates_alone(steered, prompts, options):
    options = {**options, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    choices, names = ["generated", "prompt", "all"], ["x", "y", "x"]
    with steered.steer_tokens(choices):
        output = steered.generate(**prompts, adapter_names=names, **options)

    several = options.get("num_return_sequences", 1)
    for index, (choice, name) in enumerate(zip(choices, names)):
        row = {key: value[index : index + 1] for key, value in prompts.items()}
        with steered.steer_tokens(choice):
            alone = steered.generate(**row, adapter_names=[name], **options)
        assert torch.equal(output[several * index : several * (index + 1)], alone)


def test_sampled_sequences_start_with_the_logits_of_their_own_row(steered, prompts):
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    with steered.steer_tokens(["generated", "prompt", "all"]):
        output = steered.generate(**prompts, **options)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1).repeat_interleave(2, 0)
    each = [choice for choice in ["generated", "prompt", "all"] for _ in range(2)]
    with torch.no_grad(), steered.steer_tokens(each, prompt_lengths=[n for n in PROMPTS for _ in range(2)]):
        logits = steered(output.sequences, attention_mask=mask).logits

    torch.testing.assert_close(torch.stack(output.logits, 1), logits[:, 6:-1].float(), atol=1e-6, rtol=1e-6)


def test_a_prompt_of_embeddings_or_one_that_continues_a_cache_counts_as_prompt(steered, tokens):
    embeddings = steered.get_input_embeddings()(tokens)
    mask = torch.ones_like(tokens)
    with steered.steer_tokens("generated"):
        expected = steered.generate(tokens, attention_mask=mask, **GREEDY)
        embedded = steered.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
        caches = []
        for rest in (tokens, tokens[:, 4:]):
            with torch.no_grad(), steered.disable_adapter():
                cache = steered(tokens[:, :4], use_cache=True).past_key_values
            caches.append(steered.generate(rest, attention_mask=mask, past_key_values=cache, **GREEDY))

    assert torch.equal(embedded.sequences, expected.sequences[:, 7:])
    for output in caches:
        assert torch.equal(output.sequences[:, -NEW:], expected.sequences[:, 7:])


def test_scales_disabling_and_blocks_inside_blocks_combine(llama, steered, tokens):
    lengths = [3, 3, 3]

    @torch.no_grad()
    def logits(**kwargs):
        return steered(tokens, **kwargs).logits

    everything, base = logits(), llama().double()(tokens).logits
    with steered.steer_tokens("generated", lengths):
        with steered.disable_adapter():
            assert torch.equal(logits(), base)
        with steered.steer_tokens("all"):
            assert torch.equal(logits(), everything)
        steered.set_scale("x", 0.0)
        assert torch.equal(logits(), base)
        steered.set_scale("x", 2.0)
        doubled = logits()
    expected = by_hand(llama, steered, tokens[0], "x", 2 * acting("generated", 3, 7))
    torch.testing.assert_close(doubled[0], expected, **EXACT)
    steered.set_scale("x", 1.0)
    assert torch.equal(logits(), everything)


def test_gradient_is_the_sum_over_the_chosen_tokens(llama, steered, tokens):
    weights = torch.randn(3, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    steered.train()
    with steered.steer_tokens("generated", prompt_lengths=PROMPTS):
        (steered(tokens).logits * weights).sum().backward()

    layers = steered.base_model.steering_layers.values()
    vectors = [layer.vector("x").detach().double().requires_grad_() for layer in layers]
    base = llama().double()
    acts = torch.stack([acting("generated", length, 7) for length in PROMPTS])[..., None]
    for layer, vector in zip(base.model.layers, vectors):
        layer.register_forward_hook(lambda module, args, output, vector=vector: output + acts * vector)
    (base(tokens).logits * weights).sum().backward()
    for layer, vector in zip(layers, vectors):
        torch.testing.assert_close(layer.vector("x").grad, vector.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("target_modules", [None, ["down_proj"]])
def test_gradient_checkpointing_computes_again_what_the_block_asked_for(llama, tokens, use_reentrant, target_modules):
    model = get_peft_model(llama(), BiasSteerConfig(target_modules=target_modules, init_weights=False)).train()
    layers = model.base_model.steering_layers.values()

    def gradients():
        model.zero_grad()
        with model.steer_tokens("generated", prompt_lengths=PROMPTS):
            loss = model(tokens, labels=tokens).loss
        with ThreadPoolExecutor(1) as pool:  # as autograd does on a GPU
            pool.submit(loss.backward).result()
        return [layer.vector("default").grad for layer in layers]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for gradient, exact in zip(gradients(), expected):
        torch.testing.assert_close(gradient, exact, atol=1e-9, rtol=1e-5)


def test_each_thread_has_its_own_choice(steered, tokens):
    @torch.no_grad()
    def run(part):
        if part is None:
            return steered(tokens).logits
        with steered.steer_tokens(part, prompt_lengths=PROMPTS):
            return steered(tokens).logits

    expected = {part: run(part) for part in ("prompt", "generated", None)}
    meeting = threading.Barrier(2, timeout=60)

    def meet(module, args):
        meeting.wait()

    handle = steered.get_base_model().model.layers[1].register_forward_pre_hook(meet)
    for pair in (("prompt", "generated"), ("prompt", None)):
        with ThreadPoolExecutor(2) as pool:
            results = [future.result() for future in [pool.submit(run, part) for part in pair]]
        assert all(torch.equal(result, expected[part]) for result, part in zip(results, pair))
    handle.remove()

    with ThreadPoolExecutor(1) as pool, steered.steer_tokens("prompt", prompt_lengths=PROMPTS):
        assert torch.equal(pool.submit(copy_context().run, run, None).result(), expected["prompt"])


SLOW = pytest.mark.slow  # what dynamo gives up on, it tries again in each function


@pytest.mark.parametrize("compiled", [pytest.param("whole", marks=SLOW), pytest.param("base", marks=SLOW), "decoder"])
def test_a_compiled_model_follows_the_choice(steered, tokens, compiled):
    def run(model, part):
        with torch.no_grad(), steered.steer_tokens(part, prompt_lengths=PROMPTS):
            return model(tokens).logits

    parts = ["generated", "prompt", "generated", "all"]
    expected = [run(steered, part) for part in parts]
    torch.compiler.reset()
    model, base = steered, steered.get_base_model()
    if compiled == "whole":
        model = torch.compile(steered, backend="eager")
    else:
        {"base": base, "decoder": base.model}[compiled].compile(backend="eager")
    for part, exact in zip(parts, expected):
        torch.testing.assert_close(run(model, part), exact, **EXACT)


def test_a_model_without_attention_generates_without_a_cache():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = steer(make_base("mamba", **sizes), task_type="CAUSAL_LM")
    ids = torch.arange(1, 11).view(2, 5)
    with model.steer_tokens("generated"):
        output = model.generate(input_ids=ids, use_cache=False, **GREEDY)
        with pytest.raises(ValueError, match="pass use_cache=False"):
            model.generate(input_ids=ids, **GREEDY)
    with torch.no_grad(), model.steer_tokens("generated", prompt_lengths=[5, 5]):
        logits = model(output.sequences).logits

    torch.testing.assert_close(torch.stack(output.logits, 1), logits[:, 4:-1], atol=1e-6, rtol=1e-5)


def test_a_sequence_to_sequence_model_is_refused():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    base = AutoModelForSeq2SeqLM.from_config(config)
    model = get_peft_model(base, BiasSteerConfig())
    with pytest.raises(ValueError, match="expected a decoder alone"), model.steer_tokens("generated"):
        pass
    with model.steer_tokens("all"):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["completion"], ValueError, "expected tokens of all, prompt, generated, .* got 'completion'"),
        ([["prompt", None]], ValueError, "got \\['prompt', None\\]"),
        ([[]], ValueError, "got \\[\\]"),
        (["prompt", [3, 2.5, 1]], TypeError, "each of prompt_lengths must be an integer, got 2.5"),
        (["prompt", [3, -1, 1]], ValueError, "0 or more, one per row, got \\(3, -1, 1\\)"),
        (["prompt", []], ValueError, "0 or more, one per row, got \\(\\)"),
        (["prompt", [3, 1]], ValueError, "one of prompt_lengths per row, got 2 for 3"),
        ([["prompt", "all"], [3, 1, 1]], ValueError, "one choice of tokens per row, got 2 for 3"),
        ([["prompt", "all", "all"], [3] * 6], ValueError, "one choice of tokens per row, got 3 for 6"),
        (["prompt"], ValueError, "expected prompt_lengths in steer_tokens .* outside model.generate, got none"),
    ],
)
def test_what_is_no_choice_is_refused(steered, tokens, arguments, error, message):
    rows = tokens.repeat(2, 1) if "for 6" in message else tokens
    with pytest.raises(error, match=message), steered.steer_tokens(*arguments):
        steered(rows)


def test_generate_is_told_no_lengths_and_knows_its_prompt(steered, tokens):
    cache = steered(tokens[:, :4], use_cache=True).past_key_values
    with steered.steer_tokens("prompt", prompt_lengths=PROMPTS), pytest.raises(ValueError, match="no prompt_lengths"):
        steered.generate(tokens, **GREEDY)
    with steered.steer_tokens("generated"):
        with pytest.raises(ValueError, match="expected input_ids or inputs_embeds in generate"):
            steered.generate(**GREEDY)
        with pytest.raises(ValueError, match="with a cache an attention_mask over all"):
            steered.generate(tokens[:, 4:], past_key_values=cache, **GREEDY)
    with steered.steer_tokens(["generated", "prompt"]), pytest.raises(ValueError, match="per row, got 2 for 3"):
        steered.generate(tokens, **GREEDY)


def test_merged_adapters_are_refused(steered, tokens):
    steered.merge_adapter()
    refused = pytest.raises(ValueError, match="Cannot pass `steer_tokens` when there are merged adapters")
    with refused, steered.steer_tokens("prompt", prompt_lengths=PROMPTS):
        steered(tokens)
    steered.unmerge_adapter()
    with steered.steer_tokens("prompt", prompt_lengths=PROMPTS):
        steered(tokens)


def test_a_pass_that_goes_around_the_model_is_refused(steered, tokens):
    with steered.steer_tokens("prompt", prompt_lengths=PROMPTS):
        steered(tokens)
        with pytest.raises(ValueError, match="knows of \\(rows, tokens\\) = None in this forward pass"):
            steered.get_base_model().model(tokens)
    with steered.steer_tokens("generated"), pytest.raises(ValueError, match="expected prompt_lengths"):
        steered.get_base_model().generate(tokens, **GREEDY)


def test_continuous_batching_refuses_what_its_thread_would_not_see(llama):
    model = get_peft_model(llama(), BiasSteerConfig(init_weights=False)).eval()
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.tensor([[5, 6, 7]])
    with model.steer_tokens("generated"), pytest.raises(ValueError, match="sees no steer_tokens .* call generate"):
        model.generate_batch(prompt.tolist())
    with model.disable_adapter(), pytest.raises(ValueError, match="no disable_adapter"):
        model.generate_batch(prompt.tolist())

    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=8)
    (output,) = model.generate_batch(
        prompt.tolist(), max_new_tokens=2, continuous_batching_config=small, warmup=False
    ).values()
    assert output.generated_tokens == model.generate(prompt, **options)[0, 3:].tolist()


def test_nothing_is_left_of_a_block(steered, tokens):
    base, expected = steered.get_base_model(), steered(tokens).logits
    hooks = len(base._forward_pre_hooks), len(base._forward_hooks)
    with pytest.raises(KeyError), steered.steer_tokens("prompt", prompt_lengths=PROMPTS):
        raise KeyError

    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == hooks
    assert torch.equal(steered(tokens).logits, expected)


def test_all_tokens_of_all_rows_are_no_choice():
    assert as_choice("all", None) is None and as_choice(["all", "all"], [1, 2]) is None
    assert as_choice(["all", "prompt"], torch.tensor([1, 2])) == TokenChoice(("all", "prompt"), (1, 2))
