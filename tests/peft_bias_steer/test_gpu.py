"""Steering on a real GPU, at a width and in the precision that models have there."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_bias_steer import BiasSteerConfig, BiasSteerFloat32Callback, BiasSteerLayer


DEVICE = "cuda"
pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    """Builds a random Llama of width 256 on the GPU; the same one each time."""

    def build(dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=512, **sizes, **heads)
        # with that dtype from the start: the frequencies of the position embedding stay in float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)

    return build


@pytest.fixture
def ids():
    return torch.randint(3, 512, (4, 33), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture
def steered(model, set_vectors):
    """Builds the model with random vectors, on the GPU in float32 like those of every user."""

    def build(dtype: torch.dtype = torch.bfloat16):
        peft_model = get_peft_model(model(dtype), BiasSteerConfig())
        set_vectors(peft_model)
        return peft_model.eval()

    return build


@torch.no_grad()
def logits(model, ids, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


def generate(model, ids, **kwargs) -> torch.Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=None,
        pad_token_id=0,
        **kwargs,
    )


def layers_of(model) -> list[BiasSteerLayer]:
    return list(model.base_model.steering_layers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_is_taken_in_float32_and_rounded_once(dtype):
    host = nn.Identity()
    layer = BiasSteerLayer(host, size=2048)
    layer.update_layer("default", BiasSteerConfig(init_weights=False))
    layer.to(DEVICE)
    hidden = torch.randn(8, 512, 2048, device=DEVICE, dtype=dtype)
    # the sum of two numbers of 24 bits is exact in float64: rounded to float32, then to the dtype, as the layer does
    exact = (hidden.double() + layer.vector("default").double()).float().to(dtype)

    assert host(hidden).dtype == dtype
    assert torch.equal(host(hidden), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_plain_hooks(model, ids, set_vectors, add_by_plain_hooks, dtype):
    steered, oracle = get_peft_model(model(dtype), BiasSteerConfig()).eval(), model(dtype)
    add_by_plain_hooks(oracle.model.layers, set_vectors(steered))

    assert torch.equal(logits(steered, ids), logits(oracle, ids))
    assert not torch.equal(logits(steered, ids), logits(model(dtype), ids))


def test_vectors_are_on_the_gpu_in_float32_whatever_the_base_is(steered):
    vectors = [layer.vector("default") for layer in layers_of(steered())]

    assert {(vector.device.type, vector.dtype) for vector in vectors} == {(DEVICE, torch.float32)}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_merged_model_generates_the_same_tokens(steered, ids, cache):
    # float32: in bfloat16 the bias enters the product before it is rounded, which may decide a near tie
    model = steered(torch.float32)
    options = {"cache_implementation": cache, "disable_compile": True}
    expected = generate(model, ids, **options)
    with model.disable_adapter():
        assert not torch.equal(generate(model, ids, **options), expected)
    model.merge_adapter()

    assert torch.equal(generate(model, ids, **options), expected)


def test_merging_in_bfloat16_stays_within_its_rounding(steered, ids):
    # what check_merge says bfloat16 needs
    assert steered().check_merge(ids, tolerance=0.05) > 0


def test_generation_that_transformers_compiles_gives_the_same_tokens(steered, ids):
    model = steered(torch.float32)
    expected = generate(model, ids)

    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_a_graph_break_forward_is_the_same(steered, ids, mode):
    model = steered(torch.float32)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    expected = logits(model, ids)

    # the third call of reduce-overhead replays a CUDA graph; clone: the next call overwrites its output
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        output = logits(compiled, ids).clone()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_cuda_graph_replays_follow_vectors_written_in_place_but_not_a_new_scale(steered, ids):
    model = steered()
    # transformers leaves a causal mask out, but not while a graph is recorded: with one of ours both run alike
    ids = ids[:, :32]
    causal = torch.ones(32, 32, dtype=torch.bool, device=DEVICE).tril().expand(4, 1, 32, 32)
    forward = partial(logits, model, ids, use_cache=False, attention_mask=causal)
    before = forward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    graph.replay()
    assert torch.equal(output, before)

    # a scale is a Python number: recorded graphs keep the one they were recorded with
    model.set_scale("default", 0.5)
    graph.replay()
    assert torch.equal(output, before)
    model.set_scale("default", 1.0)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.vector("default").mul_(0.5)
    graph.replay()
    assert torch.equal(output, forward())
    assert not torch.equal(output, before)


def gradients(model, ids) -> list[torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [layer.vector("default").grad.clone() for layer in layers_of(model)]


def test_autocast_trains_float32_vectors_with_float32_gradients(steered, ids):
    model, exact = steered(), steered(torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        computed = gradients(model.train(), ids)
    for layer in layers_of(exact):
        layer.vector("default").data = layer.vector("default").data.double()
    # the weights were rounded to bfloat16 once; the same ones in float64
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})

    for ours, theirs in zip(computed, gradients(exact.train(), ids)):
        assert ours.dtype == torch.float32
        # 8 bits of mantissa through four layers
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(steered, ids, use_reentrant):
    model = steered(torch.float32).train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()

    for ours, theirs in zip(gradients(model, ids), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_two_streams_run_two_steered_models_at_once(steered, ids):
    models = [steered(torch.float32), steered(torch.float32)]
    models[1].set_scale("default", -1.0)
    expected = [logits(model, ids) for model in models]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in models]
    outputs = []
    for _ in range(5):
        for model, stream in zip(models, streams):
            with torch.cuda.stream(stream):
                outputs.append(logits(model, ids))
    torch.cuda.synchronize()

    # cuBLAS promises the same bits for a single stream only
    for number, output in enumerate(outputs):
        torch.testing.assert_close(output, expected[number % 2], rtol=1e-4, atol=1e-4)


def test_each_row_of_a_batch_has_its_own_adapter(steered, ids, set_vectors):
    model = steered(torch.float32)
    model.add_adapter("second", BiasSteerConfig(layers_to_transform=[0, 2]))
    set_vectors(model, "second")
    model.eval()
    names = ["__base__", "default", "second", "default"]
    expected = {}
    with model.disable_adapter():
        expected["__base__"] = generate(model, ids)
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = generate(model, ids)
    mixed = generate(model, ids, adapter_names=names)

    assert not torch.equal(expected["default"], expected["second"])
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], expected[name][row])


def test_vectors_move_with_the_model(steered, model, ids, set_vectors):
    there = steered(torch.float32)
    moved = get_peft_model(model(torch.float32, "cpu"), BiasSteerConfig())
    set_vectors(moved)
    with torch.no_grad():
        for ours, theirs in zip(layers_of(moved), layers_of(there)):
            ours.vector("default").copy_(theirs.vector("default"))
    moved.eval()
    on_the_cpu = logits(moved, ids.cpu())

    assert torch.equal(logits(moved.to(DEVICE), ids), logits(there, ids))
    torch.testing.assert_close(logits(moved.to("cpu"), ids.cpu()), on_the_cpu, rtol=0, atol=0)


def test_an_adapter_saved_on_the_gpu_loads_onto_a_base_on_either_device(steered, model, ids, tmp_path):
    there = steered()
    there.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path).eval()
    hot = get_peft_model(model(), BiasSteerConfig(), adapter_name="other")
    hot.load_adapter(tmp_path, "default")
    hot.set_adapter("default")
    late = PeftModel.from_pretrained(model(device="cpu"), tmp_path, torch_device="cpu").eval().to(DEVICE)

    for other in (loaded, hot.eval(), late):
        assert torch.equal(logits(other, ids), logits(there, ids))


def test_a_base_loaded_with_a_device_map_is_steered(model, ids, steered, tmp_path):
    there = steered()
    model().save_pretrained(tmp_path / "base")
    there.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=DEVICE, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()

    assert torch.equal(logits(loaded, ids), logits(there, ids))


def test_fused_optimizer_moves_the_vectors_and_nothing_else(steered, ids):
    model = steered().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    losses = []
    for _ in range(5):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

    assert losses[-1] < losses[0]
    assert changed == {name for name in before if ".bias_steer_vector." in name}


def test_a_copy_steers_by_itself(steered, ids):
    model = steered()
    other = copy.deepcopy(model)
    expected = logits(model, ids)
    model.set_scale("default", 0.0)

    assert torch.equal(logits(other, ids), expected)
    assert not torch.equal(logits(model, ids), expected)


def test_grpo_on_the_gpu_trains_the_vectors_and_nothing_else(tiny_language_model, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    def late_in_the_alphabet(completions, **kwargs):
        return [sum(map(ord, text)) / 1000 for text in completions]

    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(tiny_language_model, padding_side="left"),
        peft_config=BiasSteerConfig(),
        reward_funcs=late_in_the_alphabet,
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"{number} " for number in range(40)]}),
        callbacks=[BiasSteerFloat32Callback()],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=0.05,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            beta=0.1,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}

    assert changed == {name for name in before if ".bias_steer_vector.default." in name}
    assert {(p.device.type, p.dtype) for name, p in after.items() if name in changed} == {(DEVICE, torch.float32)}
