"""In the process of vLLM's engine: which adapter stands in which row, and what each request gets."""

import copy
import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch

from ...vectors import check_vectors, vectors_by_path
from .layers import ROW, extra_arguments, install, read_row, write_row
from .settings import Choice, EngineSettings, check_name, read_choice, unknown_adapter


SALT = "bias-steer:"
# no class that the plugin serves has its decoder in a part with such a name
TOWER = re.compile("encoder|vision|visual|image|audio|speech|tower")


def load_fitting(adapter: str, num_layers: int) -> dict[int, torch.Tensor]:
    """
    The vectors of a saved adapter for a decoder of so many layers.

    Raises:
        ValueError: If it cannot be read, has no vector for a layer that it should steer, or steers other layers.
    """
    path, vectors = vectors_by_path(adapter, num_layers=num_layers)
    if TOWER.search(path):
        raise ValueError(
            f"expected vectors on the layers of the decoder, got some on {path} in {adapter}: serve it with transformers"
        )
    return vectors


@dataclass(eq=False)
class Version:
    """An adapter as it was loaded once. A row is written again only when no request needs what it holds."""

    name: str
    row: int
    digest: str
    requests: WeakSet = field(default_factory=WeakSet)
    arriving: int = 0

    @property
    def in_use(self) -> bool:
        return self.arriving > 0 or len(self.requests) > 0


class EngineAdapters:
    """
    The adapters of a running engine.

    Args:
        executor (`vllm.v1.executor.Executor`): Reaches the workers.
        vllm_config (`vllm.config.VllmConfig`): That of the engine.
        settings (`EngineSettings`): What the engine was started with.
    """

    def __init__(self, executor: Any, vllm_config: Any, settings: EngineSettings) -> None:
        check_engine(vllm_config)
        self.executor, self.settings = executor, settings
        self.num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.width = vllm_config.model_config.get_hidden_size()
        self.loaded: dict[str, Version] = {}
        # one row more, so that an adapter can be replaced when all places are taken
        self.versions: dict[int, Version | None] = dict.fromkeys(range(1, settings.max_adapters + 2))
        # requests arrive in a thread of their own
        self.lock = Lock()
        executor.collective_rpc(install, args=(len(self.versions),))
        for name, adapter in settings.adapters.items():
            self.load(name, {} if adapter is None else load_fitting(adapter, self.num_layers))

    def load(self, name: str, vectors: dict[int, torch.Tensor], *, replace: bool = False) -> None:
        """
        Puts an adapter into the tables of all workers. Requests that run go on with the vectors that they began with.

        Raises:
            ValueError: If the name is taken and not to be replaced, there is no place, or a vector does not fit.
        """
        check_name(name)
        check_vectors(vectors, num_layers=self.num_layers, width=self.width)
        vectors = {index: vector.detach().float().contiguous() for index, vector in sorted(vectors.items())}
        if name in self.loaded and not replace:
            raise ValueError(f"an adapter named {name!r} is loaded: choose another name, or replace it")
        if name not in self.loaded and len(self.loaded) == self.settings.max_adapters:
            raise ValueError(
                f"all {self.settings.max_adapters} places are taken: remove an adapter, or start the engine with a "
                "larger max_adapters"
            )
        version = Version(name, self._free_row(), _digest(vectors))
        self.executor.collective_rpc(write_row, args=(version.row, name, vectors))
        with self.lock:
            self.loaded[name] = self.versions[version.row] = version

    def _free_row(self) -> int:
        with self.lock:
            for row, version in self.versions.items():
                if version is None or not (version.in_use or self.loaded.get(version.name) is version):
                    return row
        raise ValueError(
            "all places are taken, some of them by running requests of adapters that were replaced or removed: try "
            "again when these have ended, or start the engine with a larger max_adapters"
        )

    def remove(self, name: str) -> None:
        """Takes an adapter's name away. Requests that run go on with its vectors."""
        with self.lock:
            if name not in self.loaded:
                raise ValueError(unknown_adapter(name, self.loaded))
            if name == self.settings.default:
                raise ValueError(f"{name!r} is what requests without an adapter get: replace it instead")
            del self.loaded[name]

    def list(self) -> dict[str, str]:
        """Digest of the vectors of each adapter, by its name."""
        with self.lock:
            return {name: version.digest for name, version in self.loaded.items()}

    def vectors(self, name: str) -> dict[int, torch.Tensor]:
        """The vectors of an adapter as the workers hold them, (hidden_size,) each, by index of their layer."""
        with self.lock:
            if name not in self.loaded:
                raise ValueError(unknown_adapter(name, self.loaded))
            row = self.loaded[name].row
        parts = self.executor.collective_rpc(read_row, args=(row,))
        return dict(sorted({index: vector for part in parts for index, vector in part.items()}.items()))

    @contextmanager
    def admit(self, request: Any) -> Generator[Version | None]:
        """
        Gives a request, while it arrives, the row of its adapter, and keys and values of its own in the prefix cache.

        Args:
            request (`vllm.v1.engine.EngineCoreRequest`): The request; changed in place.
        """
        choice = read_choice(extra_arguments(request), self.settings.default)
        version = None if choice is None else self._arrive(choice)
        try:
            if version is not None and choice is not None:
                _mark(request, version, choice)
            yield version
        finally:
            if version is not None:
                with self.lock:
                    version.arriving -= 1

    def _arrive(self, choice: Choice) -> Version | None:
        with self.lock:
            if choice.adapter not in self.loaded:
                raise ValueError(unknown_adapter(choice.adapter, self.loaded))
            if choice.scale == 0:  # the base model, and its part of the prefix cache
                return None
            version = self.loaded[choice.adapter]
            version.arriving += 1
            return version


def check_engine(vllm_config: Any) -> None:
    """Refuses engines whose steps are cut up in a way that the plugin does not follow."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    reasons = {
        "vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        "micro-batches: unset enable_dbo and ubatch_size": parallel.use_ubatching,
        "sequence parallelism: unset enable_sp in pass_config": getattr(compilation.pass_config, "enable_sp", False),
    }
    for reason, met in reasons.items():
        if met:
            raise ValueError(f"bias vectors are not applied under {reason}")


def _digest(vectors: dict[int, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for index, vector in vectors.items():
        digest.update(index.to_bytes(4, "little") + vector.numpy(force=True).tobytes())
    return digest.hexdigest()[:32]


def _mark(request: Any, version: Version, choice: Choice) -> None:
    if request.resumable:
        raise ValueError("a session whose prompt grows takes no adapter: send each turn as a request of its own")
    arguments = {**(extra_arguments(request) or {}), ROW: (version.row, choice.scale, choice.tokens)}
    # a copy: several requests may share one object
    if request.sampling_params is None:
        request.pooling_params = copy.copy(request.pooling_params)
        request.pooling_params.extra_kwargs = arguments
    else:
        request.sampling_params = copy.copy(request.sampling_params)
        request.sampling_params.extra_args = arguments
    request.cache_salt = _salt(request, version, choice)


def _salt(request: Any, version: Version, choice: Choice) -> str:
    """What the first block's hash starts from: requests with the same salt compute the same keys and values."""
    tokens = choice.tokens
    if tokens != "all":
        # the same token may belong to one request's prompt and to another's answer
        prompt = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
        tokens += f":{len(prompt)}"
    return f"{SALT}{version.digest}:{choice.scale!r}:{tokens}:{request.cache_salt or ''}"
