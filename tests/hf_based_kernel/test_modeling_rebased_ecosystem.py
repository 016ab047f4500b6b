"""What transformers, PEFT and torch offer every language model, on this one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging import version
from peft import BeftConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_based_kernel import RebasedConfig, RebasedForCausalLM


LAYER_TYPES = ["conv", "linear_attention", "sliding_attention"]
LLAMA = {
    "layer_types": ["full_attention", "linear_attention", "sliding_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "use_softmax_qk_norm": True,
}
CONVERTED = {**LLAMA, "use_feature_map": True, "linear_attention_window": 6}
mixes = pytest.mark.parametrize("mix", [{}, LLAMA, CONVERTED], ids=["paper", "llama", "converted"])


def tiny_model(**options):
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "layer_types": LAYER_TYPES,
        "num_attention_heads": 2,
        "feature_dim": 4,
        "sliding_window": 5,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **copy.deepcopy(options),
    }
    return RebasedForCausalLM(RebasedConfig(**options)).eval()


def tokens(*shape):
    return torch.randint(2, 64, shape)


def gradients(model, input_ids, **options):
    model.zero_grad()
    model(input_ids, labels=input_ids, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(got, expected, **tolerance):
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}], ids=["greedy", "beams"])
@mixes
def test_batch_with_left_padding_generates_what_each_row_would(mode, mix):
    model = tiny_model(**mix)
    rows = [tokens(length) for length in (4, 9, 6)]
    batch, mask = (
        torch.stack([torch.nn.functional.pad(row, (9 - len(row), 0)) for row in rows_])
        for rows_ in (rows, [torch.ones_like(row) for row in rows])
    )
    got = model.generate(batch, attention_mask=mask, max_new_tokens=8, **mode)[:, 9:]
    expected = [model.generate(row[None], max_new_tokens=8, **mode)[0, len(row) :] for row in rows]
    assert torch.equal(got, torch.stack(expected))


@mixes
def test_sampling_with_state_matches_sampling_without(mix):
    model, prompt, samples = tiny_model(**mix), tokens(2, 7), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {"do_sample": True, "top_k": 8, "num_return_sequences": 2, "max_new_tokens": 10}
        samples.append(model.generate(prompt, use_cache=use_cache, **options))
    assert torch.equal(*samples)


@pytest.mark.parametrize("use_reentrant", [False, True])
@mixes
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, mix):
    model, input_ids = tiny_model(**mix).train(), tokens(2, 12)
    expected = gradients(model, input_ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close(gradients(model, input_ids), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mix", [{"layer_types": LAYER_TYPES[:2]}, {**LLAMA, "layer_types": ["full_attention"] * 2}])
def test_compiled_model_gives_the_same_gradients(mix):
    # Traced with its backward pass, in one graph; code generation, which takes a minute, is torch's own matter.
    model, input_ids = tiny_model(**mix, num_hidden_layers=2).train(), tokens(2, 150)
    expected = gradients(model, input_ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids, labels=input_ids).loss.backward()
    model.zero_grad()
    compiled(input_ids, labels=input_ids).loss.backward()
    # The same sums, some of them fused in another order.
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected, rtol=1e-4, atol=1e-5)


@mixes
def test_bfloat16_and_autocast_stay_close_to_float32(mix):
    model, input_ids = tiny_model(**mix, initializer_range=0.1), tokens(2, 40)
    expected = model(input_ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids, labels=input_ids)
    low = model.to(torch.bfloat16)(input_ids).logits
    # Eight bits of mantissa, through some ten roundings.
    torch.testing.assert_close(mixed.logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    torch.testing.assert_close(low.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert mixed.loss.isfinite()


@mixes
def test_autocast_training_step_has_finite_gradients(mix):
    model, input_ids = tiny_model(**mix).train(), tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(model, input_ids)
    assert all(grad.isfinite().all() for grad in grads.values())


@mixes
def test_embeddings_resize_and_stay_tied(tmp_path, mix):
    model = tiny_model(**mix)
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@mixes
def test_embeddings_can_be_given_in_the_place_of_tokens(mix):
    model, input_ids = tiny_model(**mix), tokens(2, 8)
    embedded = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids).logits)
    # A matrix product of another shape may round the last bit otherwise.
    torch.testing.assert_close(model(input_ids, logits_to_keep=1).logits, model(input_ids).logits[:, -1:])


@mixes
def test_hidden_states_and_attentions_are_returned_on_request(mix):
    outputs = tiny_model(**mix)(tokens(1, 6), output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [(1, 6, 32)] * 4
    model = tiny_model(**mix, attn_implementation="eager")
    weights = model(tokens(1, 6), output_attentions=True).attentions
    softmax_layers = [kind for kind in model.config.layer_types if kind in ("sliding_attention", "full_attention")]
    assert [x.shape for x in weights] == [(1, model.config.num_attention_heads, 6, 6)] * len(softmax_layers)


def test_pipeline_and_streamer_give_the_text_that_generate_gives(tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    options = {"do_sample": False, "max_new_tokens": 6}
    inputs = tokenizer("good morrow", return_tensors="pt", return_token_type_ids=False)
    expected = tokenizer.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)("good morrow", **options)
    assert answer[0]["generated_text"] == expected
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **options)
    assert "".join(streamer) == expected


def test_lora_trains_saves_and_loads(tmp_path):
    base, input_ids = tiny_model(), tokens(2, 10)
    expected = base(input_ids).logits
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj", "in_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(model(input_ids).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    tuned = model(input_ids).logits
    assert not torch.allclose(tuned, expected)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert torch.equal(model(input_ids).logits, expected)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(loaded(input_ids).logits, tuned)


@mixes
def test_lora_finds_every_linear_layer(mix):
    model = get_peft_model(tiny_model(**mix), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model(tokens(2, 10), labels=tokens(2, 10)).loss.backward()
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    convolutions = ("in", "out") if "conv" in model.config.layer_types else ()
    gates = {"window_gate"} if model.config.linear_attention_window else set()
    assert trained == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", *convolutions)} | gates


@pytest.mark.parametrize(
    ("make_config", "modules"),
    [
        (LoraConfig, {"q_proj", "v_proj", "in_proj"}),
        (IA3Config, {"k_proj", "v_proj", "down_proj", "in_proj"}),
        (BeftConfig, {"v_proj", "in_proj"}),
    ],
    ids=["lora", "ia3", "beft"],
)
@mixes
def test_an_adapter_without_named_modules_takes_those_of_a_llama_and_the_convolutions(make_config, modules, mix):
    base, input_ids = tiny_model(**mix), tokens(2, 10)
    there = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    model = get_peft_model(base, make_config())
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert {
        part for name in trained for part in name.split(".") if part in there and part.endswith("_proj")
    } == modules & there
    model.eval().generate(input_ids=input_ids, max_new_tokens=2, do_sample=False)


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason="this transformers loads adapters with a newer PEFT only",
)
def test_transformers_own_adapters_need_no_named_modules():
    model, input_ids = tiny_model(), tokens(2, 10)
    expected = model(input_ids).logits
    model.add_adapter(LoraConfig(init_lora_weights=False))
    assert not torch.allclose(model(input_ids).logits, expected)
    model.disable_adapters()
    assert torch.equal(model(input_ids).logits, expected)


def test_a_prefix_of_keys_and_values_is_refused():
    model = get_peft_model(tiny_model(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="past_key_values must be a RebasedCache, got DynamicCache"):
        model(input_ids=tokens(2, 10))


LORA = """
import sys
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)
assert "peft" not in sys.modules

from peft import LoraConfig, get_peft_model

print(sorted(get_peft_model(model, LoraConfig()).peft_config["default"].target_modules))
"""


@pytest.mark.slow
def test_lora_without_named_modules_works_on_code_from_the_hub_and_loaded_before_peft(tmp_path, run_isolated):
    tiny_model().save_pretrained(tmp_path / "model")
    assert "['in_proj', 'q_proj', 'v_proj']" in run_isolated(LORA.format(path=str(tmp_path / "model")))


# Pinned: torch 2.8 fails inside its own tracing.
@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.pinned), True])
@pytest.mark.parametrize("masked", [False, True])
@mixes
def test_a_model_that_trains_is_exported_with_any_batch_and_length(strict, masked, mix):
    if mix and (mix is CONVERTED or not masked) and version.parse(torch.__version__) < version.parse("2.9"):
        pytest.skip("torch 2.8 cannot tell that every length fits the blocks of softmax attention")
    model = tiny_model(**mix)
    shape = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
    shapes = {"input_ids": shape, "use_cache": None, **({"attention_mask": shape} if masked else {})}

    def arguments(rows, seq_len):
        # A quarter of the first row is padding on the left.
        mask = (torch.arange(seq_len) >= torch.tensor([seq_len // 4] + [0] * (rows - 1))[:, None]).long()
        return (tokens(rows, seq_len),), {"use_cache": False, **({"attention_mask": mask} if masked else {})}

    exported = torch.export.export(model, *arguments(2, 30), dynamic_shapes=shapes, strict=strict).module()
    for rows, seq_len in ((1, 2), (3, 100), (2, 300)):
        inputs, options = arguments(rows, seq_len)
        got, expected = exported(*inputs, **options).logits, model(*inputs, **options).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@mixes
def test_vmap_over_the_model_gives_each_rows_gradients(masked, mix):
    # On padding, transformers' SDPA mask reads numbers, which vmap has not.
    model, input_ids = tiny_model(**mix, attn_implementation="eager" if masked else "sdpa"), tokens(3, 12)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = mask[2, 9:] = 0

    def loss(parameters, row, row_mask):
        options = {"labels": row[None], "use_cache": False, **({"attention_mask": row_mask[None]} if masked else {})}
        return torch.func.functional_call(model, parameters, (row[None],), options).loss

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, input_ids, mask)
    for i in range(3):
        options = {"attention_mask": mask[i : i + 1]} if masked else {}
        expected = gradients(model, input_ids[i : i + 1], use_cache=False, **options)
        # The same sums in another order.
        assert_close({name: x[i] for name, x in got.items()}, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mark", ["position_ids", "seq_idx"])
@mixes
def test_each_sample_of_vmap_may_be_packed_otherwise(mark, mix):
    # As with padding.
    model, input_ids = tiny_model(**mix, attn_implementation="eager"), tokens(2, 1, 12)
    starts = torch.zeros(2, 1, 12, dtype=torch.long)
    starts[0, 0, 5] = starts[1, 0, 8] = 1
    seq_idx = starts.cumsum(-1)
    position_ids = torch.arange(12) - (torch.arange(12) * starts).cummax(-1).values
    marks = {"position_ids": position_ids, "seq_idx": seq_idx}[mark]

    def logits(row, mark_of_row):
        return model(row, use_cache=False, **{mark: mark_of_row}).logits

    expected = torch.stack([logits(*pair) for pair in zip(input_ids, marks)])
    assert not torch.allclose(expected, torch.stack([model(row, use_cache=False).logits for row in input_ids]))
    torch.testing.assert_close(torch.func.vmap(logits)(input_ids, marks), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"use_position_embeddings": True}, LLAMA], ids=["no positions", "positions", "llama"]
)
def test_shapes_are_known_on_the_meta_device(options):
    with torch.device("meta"):
        model = tiny_model(**options)
        marks = {"attention_mask": torch.ones(2, 9), "position_ids": torch.zeros(2, 9, dtype=torch.long)}
        outputs = model(torch.zeros(2, 9, dtype=torch.long), use_cache=True, **marks)
        after = model(torch.zeros(2, 1, dtype=torch.long), past_key_values=outputs.past_key_values)
    assert (outputs.logits.shape, after.logits.shape) == ((2, 9, 64), (2, 1, 64))
    model(torch.zeros(2, 9, dtype=torch.long, device="meta"), use_cache=False).logits.sum().backward()


def test_prefill_allocates_nothing_of_seq_by_seq():
    model, seq_len = tiny_model(vocab_size=8, hidden_size=8, num_hidden_layers=2, layer_types=LAYER_TYPES[:2]), 4096
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        model(torch.randint(8, (1, seq_len)), use_cache=True)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < seq_len**2 * 4 / 16


TASK = """
task: last_letter
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_lm_eval_scores_a_saved_checkpoint_on_a_local_task(tmp_path, tiny_language_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["good morrow", "to be", "or not", "x"]
    choices = []
    for text in texts:
        logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        a, b = (logits[tokenizer(letter)["input_ids"][-1]] for letter in "ab")
        choices.append(int(b > a))
    # All but the first label are what the model prefers: accuracy 3/4.
    labels = [1 - choices[0], *choices[1:]]
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "test.jsonl").write_text("\n".join(rows))
    (tmp_path / "tasks" / "task.yaml").write_text(TASK.format(data=tmp_path / "tasks" / "test.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "last_letter", "--batch_size", "2"]
    command += ["--model_args", "pretrained=model,trust_remote_code=True,dtype=float32", "--device", "cpu"]
    command += ["--include_path", "tasks", "--output_path", "results"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["last_letter"]["acc,none"] == 0.75


PARALLEL = """
import copy
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_based_kernel import RebasedForCausalLM

dist.init_process_group("gloo")
model = RebasedForCausalLM.from_pretrained(sys.argv[1]).train()
input_ids = torch.load(sys.argv[2])
local_ids = input_ids.chunk(2)[dist.get_rank()]

model(input_ids, labels=input_ids).loss.backward()
expected = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()

parallel = DistributedDataParallel(copy.deepcopy(model))
parallel(local_ids, labels=local_ids).loss.backward()
for name, p in parallel.module.named_parameters():
    torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)

for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
model(local_ids, labels=local_ids).loss.backward()
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
print("same gradients")
"""


# Pinned: torch before 2.10 sums FSDP2's gradients over gloo, of a plain linear layer too.
@pytest.mark.pinned
@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    torch.save(tokens(4, 12), tmp_path / "ids.pt")
    (tmp_path / "parallel.py").write_text(PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, "parallel.py", "model", "ids.pt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same gradients") == 2


def test_trainer_smooths_the_labels_of_the_next_tokens(tmp_path):
    model, input_ids = tiny_model(), tokens(2, 9)
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    loss = Trainer(model, args).compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    expected = torch.nn.functional.cross_entropy(
        model(input_ids).logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(loss, expected)
