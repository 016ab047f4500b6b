"""ReBased: a causal language model of short convolutions and linear attention with a learnable quadratic kernel."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo, EvalResult, ModelCard
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .cache_rebased import CACHE_NAME, RebasedCache, given_cache
from .configuration_rebased import RebasedConfig
from .convolution_rebased import RebasedBaseConv, RebasedCausalConv, RebasedGatedConv
from .linear_attention_rebased import (
    RebasedFeatureMap,
    RebasedFeatureNorm,
    RebasedLinearAttention,
    RebasedMappedAttention,
)
from .llama_rebased import read_llama, start_feature_maps
from .model_card_rebased import WEIGHT_FILES, push_with_card, rebased_card
from .softmax_attention_rebased import RebasedRMSNorm, RebasedSoftmaxAttention
from .window_attention_rebased import make_window_mask


logger = logging.get_logger(__name__)

SOFTMAX_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def _make_norm(config: RebasedConfig) -> nn.Module:
    return (RebasedRMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm)(
        config.hidden_size, eps=config.norm_eps
    )


class RebasedMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: RebasedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RebasedDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: RebasedConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "linear_attention":
            mixer = RebasedMappedAttention if config.use_feature_map else RebasedLinearAttention
            self.self_attn = mixer(config, layer_idx)
        elif self.layer_type in SOFTMAX_MASKS:
            self.self_attn = RebasedSoftmaxAttention(config, layer_idx)
        else:
            self.conv = (RebasedGatedConv if config.conv_type == "gated" else RebasedBaseConv)(config, layer_idx)
        self.input_layernorm = _make_norm(config)
        self.post_attention_layernorm = _make_norm(config)
        self.mlp = RebasedMLP(config) if config.intermediate_size else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normalised = self.input_layernorm(hidden_states)
        if self.layer_type == "linear_attention":
            mixed = self.self_attn(normalised, **kwargs)
        elif self.layer_type in SOFTMAX_MASKS:
            mixed, _ = self.self_attn(normalised, **kwargs)
        else:
            mixed = self.conv(normalised, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RebasedPreTrainedModel(PreTrainedModel):
    """What all ReBased models share: incomplete checkpoints are refused, and a model card goes to the Hub."""

    config: RebasedConfig
    config_class = RebasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RebasedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # The state cannot be rolled back, so generation modes that need it are refused.
    _is_stateful = True
    _can_record_outputs = {"hidden_states": RebasedDecoderLayer, "attentions": RebasedSoftmaxAttention}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """transformers would look for its attention functions in this file; they are called in a sibling."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RebasedCausalConv):
            bound = self.config.conv_kernel_size**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RebasedFeatureMap):
            init.normal_(module.weight, std=self.config.head_dim**-0.5)
        elif isinstance(module, RebasedFeatureNorm):
            if module.gamma is not None:
                init.ones_(module.gamma)
            if module.beta is not None:
                init.zeros_(module.beta)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """[`PreTrainedModel.from_pretrained`]. Raises `ValueError` if the checkpoint lacks a tensor; a head may be new."""
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if cls.__name__ not in (model.config.architectures or ()) and hasattr(model, cls.base_model_prefix):
            missing = [name for name in missing if name.startswith(f"{cls.base_model_prefix}.")]
        if missing and pretrained_model_name_or_path is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of {cls.__name__}: {', '.join(missing[:3])}"
                f"{' …' * (len(missing) > 3)}; save the model again, or check that the configuration belongs to it"
            )
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """[`~PreTrainedModel.save_pretrained`]; an older model that lies there in another number of pieces is removed."""
        super().save_pretrained(save_directory, *args, **kwargs)
        whole, index = (Path(save_directory, name) for name in WEIGHT_FILES[:2])
        if whole.exists() and index.exists():
            # A model that is saved whole takes the place of older pieces, but not of their index.
            in_pieces = any(Path(save_directory).glob(WEIGHT_FILES[2]))
            (whole if in_pieces else index).unlink(missing_ok=True)

    def push_to_hub(self, repo_id: str, *, metrics: Sequence[EvalResult] = (), **kwargs: Any) -> CommitInfo:
        """
        [`~PreTrainedModel.push_to_hub`], in one commit with a model card that shows how to use the model if there is none yet.

        Args:
            repo_id (`str`): Where to.
            metrics (`Sequence[EvalResult]`): What was measured, for the card's metadata.
            kwargs (*optional*): Those of transformers.
        """
        return push_with_card(self, repo_id, metrics, **kwargs)

    def model_card(self, repo_id: str, metrics: Sequence[EvalResult] = ()) -> ModelCard:
        """
        Model card with the facts of the config and a usage snippet, which runs once a tokenizer is there too.

        Args:
            repo_id (`str`): Where the model will be found.
            metrics (`Sequence[EvalResult]`): What was measured, for the card's metadata (`model-index`).
        """
        return rebased_card(self, repo_id, metrics)


class RebasedModel(RebasedPreTrainedModel):
    """
    The decoder without a language modeling head (arXiv 2402.10644).

    Args:
        config (`RebasedConfig`): Sizes, kernel and the mixer of each layer.
    """

    def __init__(self, config: RebasedConfig):
        super().__init__(config)
        # `from_pretrained` sets what it is given in a config that was checked before.
        config.validate_architecture()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        if config.use_position_embeddings:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(RebasedDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _make_norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.rope_parameters else None
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RebasedCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: RebasedCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""
        input_ids: (batch, seq)
        attention_mask: (batch, seq), or (batch, past + seq) after a cache
        position_ids: (batch, seq)
        inputs_embeds: (batch, seq, hidden_size)

        Args:
            attention_mask (`torch.Tensor`, *optional*): 0 for padding, on either side.
            position_ids (`torch.LongTensor`, *optional*): Every 0 at a token that is not padding starts a new sequence, as
                transformers' collators pack several into one row, after a cache too. Their other marks, `cu_seq_lens_q`,
                `cu_seqlens` and `seq_idx`, are followed as well where there is no cache.
            past_key_values (`RebasedCache`, *optional*): State of the tokens before these; updated in place, unless the pass
                fails.
            use_cache (`bool`, *optional*): Return the state. Defaults to `config.use_cache`, and to `False` in training.
            cache (`RebasedCache`, *optional*): Another name of `past_key_values`, that of transformers 5.24 and newer.
        """
        past_key_values = given_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds; leave the other one out")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and (past_key_values is not None or not self.training)
        if past_key_values is None and use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True is incompatible with gradient checkpointing: no cache is made")
            use_cache = False
        if past_key_values is None and use_cache:
            past_key_values = RebasedCache(self.config)
        seen_tokens = self._check_past(past_key_values, inputs_embeds)
        local_mask, attention_mask = self._masks(attention_mask, past_key_values, inputs_embeds)
        starts = _sequence_starts(position_ids, local_mask, inputs_embeds, seen_tokens, kwargs)
        segment_ids = None if starts is None else starts.cumsum(-1)
        first_tokens = _first_tokens(starts, past_key_values)
        # What a pass that fails leaves behind is the cache as it was.
        cache = None if past_key_values is None else past_key_values.fork()
        if starts is not None and seen_tokens:
            for layer in cache.layers:
                layer.forget_rows(starts[:, 0])

        hidden_states = inputs_embeds
        if position_ids is None and (self.config.use_position_embeddings or self.rotary_emb is not None):
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen_tokens
            position_ids = position_ids if first_tokens is None else position_ids - first_tokens
            absolute = self.config.use_feature_map or self.config.use_position_embeddings
            if absolute and attention_mask is not None and first_tokens is None:
                # A map of rotated keys sees more than differences of positions too: padding must not shift them.
                position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, seen_tokens:]
        if self.config.use_position_embeddings:
            hidden_states = hidden_states + self.embed_positions(self._check_positions(position_ids))
        softmax_masks = {
            layer_type: create_mask(
                self.config,
                inputs_embeds,
                attention_mask,
                cache,
                and_mask_function=_from_first_token_on(first_tokens, seen_tokens),
                layer_idx=self.config.layer_types.index(layer_type),
            )
            for layer_type, create_mask in SOFTMAX_MASKS.items()
            if layer_type in self.config.layer_types
        }
        window_mask = None
        if self.config.linear_attention_window and "linear_attention" in self.config.layer_types:
            window_mask = make_window_mask(
                self.config.linear_attention_window,
                inputs_embeds.shape[1],
                seen_tokens=seen_tokens,
                first_tokens=first_tokens,
                attention_mask=attention_mask,
                device=inputs_embeds.device,
            )
        rotations = None if self.rotary_emb is None else self.rotary_emb(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=softmax_masks.get(layer.layer_type, local_mask),
                window_mask=window_mask,
                position_embeddings=rotations,
                segment_ids=segment_ids,
                past_key_values=cache,
                **kwargs,
            )
        last_hidden_state = self.norm(hidden_states)
        if past_key_values is not None:
            past_key_values.layers = cache.layers
            past_key_values.seen_tokens += inputs_embeds.shape[1]
            past_key_values.first_tokens = None if first_tokens is None else first_tokens[:, -1]
            past_key_values.attention_mask = attention_mask
        return BaseModelOutputWithPast(
            last_hidden_state=last_hidden_state, **{CACHE_NAME: past_key_values if use_cache else None}
        )

    def _check_past(self, past_key_values: RebasedCache | None, inputs_embeds: torch.Tensor) -> int:
        """Number of tokens in the cache. Raises `ValueError` for one that is foreign, or cannot be used here."""
        if past_key_values is None:
            return 0
        if not isinstance(past_key_values, RebasedCache):
            raise ValueError(
                f"past_key_values must be a RebasedCache, got {type(past_key_values).__name__}; leave it out or make "
                "one with RebasedCache(model.config)"
            )
        for name in ("layer_types", "sliding_window", "linear_attention_window"):
            given, own = (getattr(config, name) for config in (past_key_values.config, self.config))
            if given != own:
                raise ValueError(
                    f"past_key_values is of a model with {name} {given}, this one has {own}; make another"
                )
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                "gradient checkpointing runs layers twice and so cannot be used with past_key_values; leave out the cache "
                "or call model.gradient_checkpointing_disable()"
            )
        if past_key_values.num_sequences not in (None, inputs_embeds.shape[0]):
            raise ValueError(
                f"past_key_values holds {past_key_values.num_sequences} sequences, the inputs {inputs_embeds.shape[0]}; they "
                "must be as many"
            )
        return past_key_values.get_seq_length()

    def _masks(
        self, attention_mask: torch.Tensor | None, past_key_values: RebasedCache | None, inputs_embeds: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of these tokens, (batch, seq), and of all, (batch, past + seq); `None` where there is no padding."""
        batch_size, seq_len = inputs_embeds.shape[:2]
        past = None if past_key_values is None else past_key_values.attention_mask
        seen_tokens = 0 if past_key_values is None else past_key_values.seen_tokens
        if attention_mask is None:
            if past is None:
                return None, None
            attention_mask = past.new_ones(batch_size, seq_len)
        # No set: a length of a traced graph has no hash.
        expected = ((batch_size, seq_len), (batch_size, seen_tokens + seq_len))
        if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) not in expected:
            given = getattr(attention_mask, "shape", None)
            raise ValueError(
                f"attention_mask must have the shape (batch, past + seq) = ({batch_size}, {seen_tokens + seq_len}) or "
                f"(batch, seq) = ({batch_size}, {seq_len}), got {type(attention_mask).__name__ if given is None else tuple(given)}"
            )
        whole = attention_mask.bool()
        if whole.shape[1] == seq_len and seen_tokens:
            past = whole.new_ones(batch_size, seen_tokens) if past is None else past
            whole = torch.cat([past, whole], dim=1)
        local = whole[:, -seq_len:]
        # Following the mask is right anyway.
        if _is_readable(whole) and bool(whole.all()):
            return None, None
        return local, whole

    def _check_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        most = self.config.max_position_embeddings
        if _is_readable(position_ids) and int(position_ids.max()) >= most:
            raise ValueError(
                f"The model has learned positions for max_position_embeddings={most} tokens, got "
                f"{int(position_ids.max()) + 1}; shorten the input"
            )
        return position_ids


def _is_readable(x: torch.Tensor) -> bool:
    """Whether a number can be read: it would stop a traced graph, and a meta tensor has none, nor one that vmap batches."""
    return not (x.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def _sequence_starts(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    seen_tokens: int,
    marks: dict[str, Any],
) -> torch.Tensor | None:
    """
    (batch, seq): whether a sequence starts at this token, by any of transformers' marks; `None` if none does.

    `marks` are the keyword arguments of a pass; those that mark sequences are taken out of it.
    """
    batch_size, seq_len = inputs_embeds.shape[:2]
    starts = torch.zeros(batch_size, seq_len, dtype=torch.bool, device=inputs_embeds.device)
    found = False
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != seq_len:
            raise ValueError(
                f"position_ids must have the shape (batch, seq) = ({batch_size}, {seq_len}), got {tuple(position_ids.shape)}"
            )
        zero = position_ids == 0
        # Not in place: under vmap, marks of each sample do not fit into what is one for all.
        starts = starts | (zero if attention_mask is None else zero & attention_mask)
        found = True
    bounds = [marks.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")]
    bounds = [x for x in bounds if x is not None]
    seq_idx = marks.pop("seq_idx", None)
    for name in ("max_length_q", "max_length_k"):
        marks.pop(name, None)
    if (bounds or seq_idx is not None) and seen_tokens:
        raise ValueError(
            "cu_seq_lens_q, cu_seqlens and seq_idx do not say whether the first token goes on with what is in the cache; "
            "mark sequences by position_ids after a cache"
        )
    if bounds:
        if batch_size != 1 or any(x.dim() != 1 or not torch.equal(x, bounds[0]) for x in bounds):
            raise ValueError(
                "cu_seq_lens_q, cu_seq_lens_k and cu_seqlens must be equal, one-dimensional, and mark a single packed row, "
                f"got shapes {[tuple(x.shape) for x in bounds]} for a batch of {batch_size}"
            )
        if int(bounds[0][0]) != 0 or int(bounds[0][-1]) != seq_len or bool((bounds[0].diff() < 0).any()):
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to the number of tokens, {seq_len}, got {bounds[0].tolist()[:8]} …"
            )
        starts[0, bounds[0][:-1][bounds[0].diff() > 0].long()] = True
        found = True
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch_size, seq_len):
            raise ValueError(
                f"seq_idx must have the shape (batch, seq) = ({batch_size}, {seq_len}), got {tuple(seq_idx.shape)}"
            )
        starts = starts | (seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0)
        found = True
    if not found:
        return None
    # Before the first token of all there is nothing to leave behind.
    starts[:, 0] &= seen_tokens > 0
    if _is_readable(starts) and not bool(starts.any()):
        return None
    return starts


def _first_tokens(starts: torch.Tensor | None, past_key_values: RebasedCache | None) -> torch.Tensor | None:
    """(batch, seq): number, counted from the first token of the cache, of the first token of each token's sequence."""
    before = None if past_key_values is None else past_key_values.first_tokens
    if starts is None:
        return None if before is None else before[:, None]
    seen_tokens = 0 if past_key_values is None else past_key_values.seen_tokens
    number = torch.arange(starts.shape[1], device=starts.device) + seen_tokens
    first = torch.where(starts, number, 0).cummax(dim=1).values
    return first if before is None else torch.maximum(first, before[:, None])


def _from_first_token_on(first_tokens: torch.Tensor | None, seen_tokens: int) -> Callable | None:
    """Mask function over absolute positions: a query sees no key before the first token of its sequence."""
    if first_tokens is None:
        return None
    last = first_tokens.shape[1] - 1
    return lambda batch, head, query, key: key >= first_tokens[batch, (query - seen_tokens).clamp(max=last)]


# Trainer shifts the labels that it smooths where it finds a model's class here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rebased"] = "RebasedForCausalLM"


class RebasedForCausalLM(RebasedPreTrainedModel, GenerationMixin):
    """
    [`RebasedModel`] with a language modeling head.

    Args:
        config (`RebasedConfig`): Sizes, kernel and the mixer of each layer.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RebasedConfig):
        super().__init__(config)
        self.model = RebasedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llama(
        cls,
        model: PreTrainedModel,
        layers: Iterable[int] = (),
        *,
        input_ids: torch.LongTensor | None = None,
        **options: Any,
    ) -> "RebasedForCausalLM":
        """
        A ReBased model with a copy of a Llama's weights: the same outputs, but for the layers that become linear attention.

        A replaced layer keeps all projections. New are the maps of its rotated queries and keys to `feature_dim` numbers a head,
        with their norms, and with `linear_attention_window` a gate: it has to be trained.

        input_ids: (rows, seq)

        Args:
            model (`PreTrainedModel`): A `LlamaForCausalLM` (SmolLM2 is one), `MistralForCausalLM`, `Qwen2ForCausalLM` or
                `Qwen3ForCausalLM` of transformers. Dtype, device and generation configuration are kept, the latter
                without a kind of cache and without prompt lookup. Of several dtypes, all weights get that of the first,
                `model.dtype`.
            layers (`Iterable[int]`, *optional*): Indices of the layers that become `"linear_attention"`.
            input_ids (`torch.LongTensor`, *optional*): Text without padding. The new maps then start as the principal
                directions that the model's queries and keys have there, else at random.
            options (`Any`): Entries of the configuration for the replaced layers: `feature_dim`, `kernel`, `use_qk_norm`,
                `use_gamma`, `use_beta`, `qk_norm_per_head`, `attention_eps`, `linear_attention_window`.

        Raises:
            ValueError: If the model is of another class or holds what a ReBased model cannot, for an index out of range, for
                an option that is not one of these, and for text that is not (rows, seq) of the model's tokens.

        ```python
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_based_kernel import RebasedForCausalLM

        >>> teacher = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = RebasedForCausalLM.from_llama(teacher, layers=[12, 20], linear_attention_window=64)
        ```
        """
        config, state_dict = read_llama(model, layers, options, input_ids)
        verbosity = logging.get_verbosity()
        # That the new maps are in no checkpoint needs no report.
        logging.set_verbosity_error()
        try:
            converted = cls.from_pretrained(None, config=config, state_dict=state_dict, dtype=model.dtype)
        finally:
            logging.set_verbosity(verbosity)
        # Without a folder it is called "None". The Llama's name would be wrong too: adapters of one do not fit the other.
        converted.name_or_path = converted.config.name_or_path = ""
        converted = converted.to(model.device)
        # A model that was cast after loading has frequencies in its own dtype.
        frequencies = model.get_decoder().rotary_emb.original_inv_freq
        for name in ("inv_freq", "original_inv_freq"):
            converted.model.rotary_emb.register_buffer(name, frequencies.clone(), persistent=False)
        if input_ids is not None:
            replaced = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
            start_feature_maps({i: converted.model.layers[i].self_attn for i in replaced}, model, input_ids)
        converted.generation_config = copy.deepcopy(model.generation_config)
        # A kind of cache, and drafts that may have to be taken back.
        converted.generation_config.update(cache_implementation=None, prompt_lookup_num_tokens=None)
        return converted.train(model.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RebasedCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: RebasedCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        r"""
        labels: (batch, seq)

        Args:
            labels (`torch.LongTensor`, *optional*): Tokens to predict, unshifted; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Logits for the last so many tokens, or for
                these indices; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_config.is_assistant:
            raise ValueError(
                f"{type(self).__name__} cannot be the assistant of another model: its state cannot take tokens back"
            )
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}; the state of "
                f"{type(self).__name__} has a constant size anyway"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache:
            model_kwargs[CACHE_NAME] = RebasedCache(self.config)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        # The library counts from the first token of the cache; the sequence that a packed row is in begins later.
        position_ids = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        first_tokens = getattr(model_kwargs.get(CACHE_NAME), "first_tokens", None)
        if first_tokens is None:
            return position_ids
        # Beams and samples have rows in the cache already, in the prompt not yet.
        first_tokens = first_tokens[:: max(1, len(first_tokens) // len(inputs_tensor)), None]
        return position_ids - position_ids.expand(len(first_tokens), -1).gather(1, first_tokens)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused with `ValueError`: what `generate_batch` and paged attention keep are keys and values, not states."""
        raise ValueError(
            f"{type(self).__name__} has no continuous batching (generate_batch, paged attention): its layers keep states, not "
            "pages of keys and values; use generate with a padded batch"
        )


# The mixins' own `__init__` would look the base model up among the registered ones, where remote code is not.
class RebasedForSequenceClassification(GenericForSequenceClassification, RebasedPreTrainedModel):
    """
    [`RebasedModel`] with a classifier on the last token that is not padding.

    Args:
        config (`RebasedConfig`): Sizes, kernel and the mixer of each layer; `num_labels` classes.
    """

    def __init__(self, config: RebasedConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RebasedModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class RebasedForTokenClassification(GenericForTokenClassification, RebasedPreTrainedModel):
    """
    [`RebasedModel`] with a classifier on every token, which has seen the tokens before it.

    Args:
        config (`RebasedConfig`): Sizes, kernel and the mixer of each layer; `num_labels` classes, and `classifier_dropout`
            before the classifier (0.1 by default).
    """

    def __init__(self, config: RebasedConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RebasedModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class RebasedForQuestionAnswering(GenericForQuestionAnswering, RebasedPreTrainedModel):
    """
    [`RebasedModel`] with two numbers for every token: whether an answer starts there, and whether it ends.

    Args:
        config (`RebasedConfig`): Sizes, kernel and the mixer of each layer.
    """

    def __init__(self, config: RebasedConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = RebasedModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "RebasedCache",
    "RebasedForCausalLM",
    "RebasedForQuestionAnswering",
    "RebasedForSequenceClassification",
    "RebasedForTokenClassification",
    "RebasedModel",
    "RebasedPreTrainedModel",
]
