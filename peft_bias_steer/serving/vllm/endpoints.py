"""
HTTP routes of vLLM's server for adapters, and `model="math"` in requests. vLLM attaches them if `VLLM_PLUGINS` names
`bias_steer`.
"""

import asyncio
import json
import os
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .adapters import load_fitting
from .plugin import known_names, pack
from .settings import KEY, EngineSettings, asks_to_steer, check_name


if TYPE_CHECKING:
    from fastapi import FastAPI

Message = MutableMapping[str, Any]

# where the body of a route has the extra arguments of its request; vLLM drops them on all others
ARGUMENTS = {
    "/v1/completions": ("vllm_xargs",),
    "/v1/completions/render": ("vllm_xargs",),
    "/v1/chat/completions": ("vllm_xargs",),
    "/v1/chat/completions/batch": ("vllm_xargs",),
    "/v1/chat/completions/render": ("vllm_xargs",),
    "/v1/responses": ("vllm_xargs",),
    "/v1/responses/render": ("vllm_xargs",),
    "/v1/messages": ("vllm_xargs",),
    "/v1/messages/render": ("vllm_xargs",),
    "/inference/v1/generate": ("sampling_params", "extra_args"),
}
# no layer runs, so an adapter does there what its base does
WITHOUT_LAYERS = (
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/completions/derender",
    "/v1/chat/completions/derender",
)
FORM_MODEL = re.compile(rb'name="?model"?[^\n]*\n(?:[^\r\n]+\r?\n)*\r?\n([^\r\n]*)')


class Endpoints:
    """
    - `GET /v1/bias_steer_adapters`: digest of the vectors of each adapter by its name
    - `POST /v1/load_bias_steer_adapter` with `{"name": ..., "path": ..., "replace": false}`
    - `POST /v1/unload_bias_steer_adapter` with `{"name": ...}`

    Errors are answers with status 400 and a sentence.
    """

    name = KEY
    required_tasks = None

    def attach_router(self, app: "FastAPI") -> None:
        app.add_api_route("/v1/bias_steer_adapters", self._listed, methods=["GET"])
        app.add_api_route("/v1/load_bias_steer_adapter", self._load, methods=["POST"])
        app.add_api_route("/v1/unload_bias_steer_adapter", self._unload, methods=["POST"])
        app.add_middleware(_AdapterAsModel, endpoints=self)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        self.engine, self.models, self.names = engine_client, getattr(state, "openai_serving_models", None), set()
        # without an engine (vLLM's render server) there is nothing to steer
        self.settings = None if engine_client is None else EngineSettings.of(engine_client.vllm_config)
        self.served = set() if self.models is None else {path.name for path in self.models.base_model_paths}
        if self.settings is not None:
            self.names = known_names(engine_client.input_processor)
            self.several = getattr(args, "api_server_count", None) or 1
            for name, path in self.settings.adapters.items():
                self._check_free(name)
                self._announce(name, path or "")

    async def _listed(self) -> Any:
        return await self._answer(self._call("loaded"))

    async def _load(self, body: dict[str, Any]) -> Any:
        return await self._answer(self._load_from_folder(**_arguments(body, ("name", "path"), ("replace",))))

    async def _unload(self, body: dict[str, Any]) -> Any:
        return await self._answer(self._remove(**_arguments(body, ("name",), ())))

    async def _load_from_folder(self, name: Any, path: Any, replace: Any = False) -> dict[str, str]:
        check_name(name)
        self._check_free(name)
        if not isinstance(replace, bool):
            raise ValueError(f"expected replace to be true or false, got {replace!r}")
        folder = _allowed_path(path, self._allowed_folder())
        num_layers = self.engine.vllm_config.model_config.get_total_num_hidden_layers()
        # in a thread: requests that stream meanwhile do not wait for the disk
        vectors = await asyncio.to_thread(load_fitting, folder, num_layers)
        await self._call("load", name, pack(vectors), replace)
        self.names.add(name)
        self._announce(name, path)
        return await self._call("loaded")

    async def _remove(self, name: Any) -> dict[str, str]:
        self._allowed_folder()
        await self._call("remove", name)
        self.names.discard(name)
        if self.models is not None:
            paths = self.models.base_model_paths
            paths[:] = [path for path in paths if path.name != name]
        return await self._call("loaded")

    def _allowed_folder(self) -> str:
        if self.settings is None or self.settings.folder is None:
            raise ValueError(
                f"this server takes no adapters over HTTP: start it with a folder in hf_overrides={{'{KEY}': ...}}"
            )
        if self.several > 1:
            raise ValueError("the other API servers would not learn of it: start vLLM with --api-server-count 1")
        return self.settings.folder

    async def _call(self, method: str, *args: Any) -> Any:
        if self.settings is None:
            raise ValueError(f"this server was started without adapters: give it hf_overrides={{'{KEY}': ...}}")
        return await self.engine.engine_core.call_utility_async(f"{KEY}_{method}", *args)

    async def _answer(self, result: Awaitable[Any]) -> Any:
        from fastapi.responses import JSONResponse

        try:
            return JSONResponse(await result)
        except Exception as error:  # the engine's process hands on the words of an error, and not its kind
            return _bad_request(error)

    def _check_free(self, name: str) -> None:
        if name in self.served or (self.models is not None and name in self.models.lora_requests):
            raise ValueError(f"{name!r} is what requests call the base model or a LoRA adapter: choose another name")

    def _announce(self, name: str, path: str) -> None:
        """Lists the adapter at /v1/models, as vLLM does for LoRA; a request for it as the model is let through."""
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        if self.models is not None and not self.models.is_base_model(name):
            self.models.base_model_paths.append(BaseModelPath(name=name, model_path=path))


def _bad_request(error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)


def _arguments(body: dict[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    from fastapi import HTTPException

    if not set(needed) <= body.keys() <= {*needed, *optional}:
        raise HTTPException(400, f"expected {', '.join(needed)} and none but {', '.join(optional)}, got {list(body)}")
    return body


def _allowed_path(path: Any, folder: str) -> str:
    if not isinstance(path, str):
        raise ValueError(f"expected the path of an adapter, got {path!r}")
    real, allowed = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, allowed]) != allowed or not os.path.isdir(real):
        raise ValueError(f"expected a folder under the one that this server allows, got {path}")
    return real


class _AdapterAsModel:
    """
    ASGI middleware: a request whose model is an adapter becomes one with that adapter among its extra arguments. Where
    vLLM would drop these, it is refused.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], endpoints: Endpoints) -> None:
        self.app, self.endpoints = app, endpoints

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or self.endpoints.settings is None:
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            body = self._named(scope["path"].removeprefix(scope.get("root_path", "")), dict(scope["headers"]), body)
        except ValueError as error:
            return await _bad_request(error)(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, again, send)

    def _named(self, path: str, headers: dict[bytes, bytes], body: bytes) -> bytes:
        if headers.get(b"content-type", b"").startswith(b"multipart/"):
            model = FORM_MODEL.search(body)
            self._refuse_adapter(path, model and model[1].decode(errors="replace"))
            return body
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):  # vLLM's own answer to it is the right one
            return body
        if not isinstance(request, dict) or path in WITHOUT_LAYERS:
            return body
        given = request.get("vllm_xargs") or {}
        if not isinstance(given, dict):
            raise ValueError(f"expected vllm_xargs to be a dictionary, got {given!r}")
        places = ARGUMENTS.get(path, ())
        if lost := sorted(filter(asks_to_steer, [*request, *(() if "vllm_xargs" in places else given)])):
            where = ".".join(places)
            wanted = f"{path} has it in {where}" if where else f"{path} takes no adapter"
            raise ValueError(f"{', '.join(lost)} would be dropped: {wanted}")
        model = request.get("model")
        if not places:
            self._refuse_adapter(path, model)
            return body
        if not isinstance(model, str) or model not in self.endpoints.names:
            return body
        arguments = request
        for place in places:
            inner = arguments.get(place) or {}
            if not isinstance(inner, dict):
                raise ValueError(f"expected {place} to be a dictionary, got {inner!r}")
            arguments[place] = dict(inner)
            arguments = arguments[place]
        arguments.setdefault(KEY, model)
        return json.dumps(request).encode()

    def _refuse_adapter(self, path: str, model: Any) -> None:
        if isinstance(model, str) and model in self.endpoints.names:
            raise ValueError(
                f"{path} takes no adapter as its model, got {model!r}: name the base model, or ask one of "
                f"{', '.join(ARGUMENTS)}"
            )
