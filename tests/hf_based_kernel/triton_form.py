"""What the tests of the Triton files share: their kernels interpreted on the CPU, and compared with the reference."""

import contextlib
import importlib
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import hf_based_kernel
from hf_based_kernel.rebased_attention_forms import rebased_attention_reference
from hf_based_kernel.rebased_features import REBASED, state_size


FOLDER = str(Path(hf_based_kernel.__file__).parent)
# Sums of up to 37 float32 terms in another order; relative to the largest element.
FLOAT32_TOLERANCE = 1e-5


def load_module(name, *, interpreted, module="rebased_attention_triton"):
    """A copy of the module and its siblings whose kernels are interpreted or compiled, whatever the environment says."""
    for loaded in [other for other in sys.modules if other.partition(".")[0] == name]:
        del sys.modules[loaded]
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [FOLDER]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpreted
        return importlib.import_module(f"{name}.{module}")


@contextlib.contextmanager
def interpreted_language():
    """Triton's own functions interpreted too, and all of them as before afterwards: its interpreter leaves some changed."""
    # Triton imports gluon when a kernel first runs, and gluon must find the functions as they were.
    importlib.import_module("triton.experimental.gluon")
    spaces = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base)
    before = [dict(vars(space)) for space in spaces]
    for library in (tl, tl.standard):
        for name, member in list(vars(library).items()):
            if isinstance(member, JITFunction):
                setattr(library, name, InterpretedFunction(member.fn))
    yield
    for space, members in zip(spaces, before):
        for name, member in list(vars(space).items()):
            if name not in members:
                delattr(space, name)
            elif member is not members[name]:
                setattr(space, name, members[name])
    # They were rewritten to use names that are gone.
    InterpretedFunction.rewritten_fn.clear()


def make_inputs(
    *,
    batch_size=1,
    seq_len=21,
    num_heads=1,
    num_key_value_heads=None,
    feature_dim=16,
    head_dim=16,
    coefficients=REBASED,
    with_state=False,
    with_mask=False,
    with_segments=False,
    dtype=torch.float32,
    device="cpu",
):
    """Tensors in `dtype`, and the arguments that are not tensors or have no gradient."""
    q, k = torch.randn(2, batch_size, seq_len, num_heads, feature_dim, device=device)
    if num_key_value_heads is not None:
        k = torch.randn(batch_size, seq_len, num_key_value_heads, feature_dim, device=device)
    v = torch.randn(*k.shape[:3], head_dim, device=device)
    options = {"scale": feature_dim**-0.5, "eps": 1e-6, "coefficients": coefficients}
    if with_mask:
        # The first sequence is padded on the left, the last on the right.
        mask = torch.ones(batch_size, seq_len, dtype=torch.bool, device=device)
        mask[0, : seq_len // 6] = False
        mask[-1, seq_len - seq_len // 5 :] = False
        options["attention_mask"] = mask
        q, k, v = (x.masked_fill(~mask[:, :, None, None], 0) for x in (q, k, v))
    if with_segments:
        positions = torch.arange(seq_len, device=device)
        options["segment_ids"] = torch.stack([positions // (9 + 2 * i) for i in range(batch_size)]) - 3
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype)]
    if with_state:
        rows = state_size(feature_dim, coefficients)
        inputs.append(torch.rand(batch_size, k.shape[2], rows, head_dim + 1, device=device))
    return inputs, options


def run(form, inputs, options, dtypes):
    """Output, final state, and the gradients of all inputs, for one weighting of output and state."""
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]
    state = {"initial_state": inputs[3]} if len(inputs) == 4 else {}
    out, final_state = form(*inputs[:3], **state, return_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weight_out = torch.randn(out.shape, generator=generator).to(inputs[0].dtype).to(out)
    weight_state = torch.randn(final_state.shape, generator=generator).to(final_state) / inputs[0].shape[1]
    if "attention_mask" in options:
        weight_out = weight_out * options["attention_mask"][:, :, None, None]
        out = out * options["attention_mask"][:, :, None, None]
    return [
        out,
        final_state,
        *torch.autograd.grad((out * weight_out).sum() + (final_state * weight_state).sum(), inputs),
    ]


def errors(module, inputs, options):
    """Largest error of each result, relative to its largest element, but at least to 1: some gradients are all zero."""
    dtypes = [x.dtype for x in inputs]
    expected = run(rebased_attention_reference, inputs, options, [torch.float64] * 4)
    results = run(module.rebased_attention_triton, inputs, options, dtypes)
    assert [x.dtype for x in results] == [dtypes[0], torch.float32, *dtypes]
    return [((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(results, expected)]


# Compiling for a GPU without one.

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    int: "i32",
    float: "fp32",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands for a kernel and notes how it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((self.kernel, args, constants))

        return launch


def record_kernels(monkeypatch, module):
    """The list to which the module's kernels, instead of running, add their launches."""
    launches = []
    for name, member in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Recorder(member, launches))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    return launches


def compile_launch(kernel, args, constants, target):
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    positional = dict(zip(kernel.arg_names, args))
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = positional.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPE_NAMES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def stack_bytes(compiled):
    """Bytes of a thread's registers that were spilled to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
