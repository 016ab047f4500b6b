"""
Every table of names of architectures. Each entry was measured by a test, which a new one needs too.

To add a model: its decoder layer to `MERGE_SITES` (tests/peft_bias_steer/test_architectures.py compares, and writes
docs/bias_steer_architectures.md); its class to `LLAMA_COUSINS` if Llama computes the same; to the tables of vLLM
what tests/peft_bias_steer/serving/walk_vllm.py saw of it, to `CONTROL_VECTOR_TYPES` or `GGUF_BIAS_TYPES` once
tests/peft_bias_steer/serving has compared llama.cpp. A layer that has no merge site (RMSNorm after
the MLP, gated or purely routed experts) needs no entry: it can be steered, but not merged.
"""

# Names of the `nn.ModuleList` that holds a decoder's layers. The outermost one in the model counts, whatever its name.
LAYER_LISTS = ("layers", "layer", "h", "block", "blocks")

# Submodule whose bias reaches the layer's output as it is (up to `FACTORS`), and the layers of transformers with one.
# A class whose layers differ, dense and sparse ones say, stands under several. In any order: no layer has two of them.
# fmt: off
MERGE_SITES: dict[str, tuple[str, ...]] = {
    "mlp.down_proj": (
        "AXK1DecoderLayer", "AXK2DecoderLayer", "ApertusDecoderLayer", "ArceeDecoderLayer",
        "BailingHybridDecoderLayer", "BitNetDecoderLayer", "Cohere2DecoderLayer", "CohereDecoderLayer",
        "CwmDecoderLayer", "DeepseekV32DecoderLayer", "DeepseekV3DecoderLayer", "DiffLlamaDecoderLayer",
        "DogeDecoderLayer", "Dots3NoteTextDecoderLayer", "Emu3DecoderLayer", "Ernie4_5DecoderLayer",
        "Ernie4_5_MoeDecoderLayer", "EvollaDecoderLayer", "ExaoneMoeDecoderLayer", "FlintDecoderLayer",
        "GemmaDecoderLayer", "Glm4MoeDecoderLayer", "Glm4MoeLiteDecoderLayer", "Glm4vMoeTextDecoderLayer",
        "GlmDecoderLayer", "GlmMoeDsaDecoderLayer", "GraniteDecoderLayer", "GraniteSWADecoderLayer",
        "HYV3DecoderLayer", "HeliumDecoderLayer", "HunYuanDenseV1DecoderLayer", "HunYuanVLDenseV1DecoderLayer",
        "Jais2DecoderLayer", "LagunaDecoderLayer", "LlamaDecoderLayer", "MiMoV2FlashDecoderLayer",
        "MiniCPM3DecoderLayer", "Ministral3DecoderLayer", "MinistralDecoderLayer", "Mistral4DecoderLayer",
        "MistralDecoderLayer", "MistralLarge4TextDecoderLayer", "MllamaSelfAttentionDecoderLayer",
        "NemotronDecoderLayer", "OlmoDecoderLayer", "OlmoHybridLinearAttentionDecoderLayer", "PaddleOCRDecoderLayer",
        "Phi3DecoderLayer", "Phi4MultimodalDecoderLayer", "Qwen2DecoderLayer", "Qwen2VLDecoderLayer",
        "Qwen2_5OmniDecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3DecoderLayer", "Qwen3VLTextDecoderLayer",
        "Qwen3_5DecoderLayer", "SeedOssDecoderLayer", "SmolLM3DecoderLayer", "StableLmDecoderLayer",
        "UnlimitedOcrTextDecoderLayer", "VaultGemmaDecoderLayer", "YoutuDecoderLayer",
    ),
    "mlp.shared_experts.down_proj": (
        "AXK2DecoderLayer", "AriaTextDecoderLayer", "BailingHybridDecoderLayer", "DeepseekV2DecoderLayer",
        "DeepseekV32DecoderLayer", "DeepseekV3DecoderLayer", "Dots3NoteTextDecoderLayer", "Ernie4_5_MoeDecoderLayer",
        "ExaoneMoeDecoderLayer", "Glm4MoeDecoderLayer", "Glm4MoeLiteDecoderLayer", "Glm4vMoeTextDecoderLayer",
        "GlmMoeDsaDecoderLayer", "HYV3DecoderLayer", "LagunaDecoderLayer", "MiniMaxM3VLDecoderLayer",
        "Mistral4DecoderLayer", "MistralLarge4TextDecoderLayer", "SolarOpenDecoderLayer",
        "UnlimitedOcrTextDecoderLayer", "YoutuDecoderLayer",
    ),
    "output.LayerNorm": (
        "BertGenerationLayer", "BertLayer", "BigBirdLayer", "BlipTextLayer", "CamembertLayer", "Data2VecTextLayer",
        "DebertaLayer", "DebertaV2Layer", "ElectraLayer", "ErnieLayer", "GitLayer", "RemBertLayer", "RoCBertLayer",
        "RoFormerLayer", "RobertaLayer", "XLMRobertaLayer",
    ),
    "fc2": (
        "BigBirdPegasusDecoderLayer", "BioGptDecoderLayer", "BlenderbotDecoderLayer", "M2M100DecoderLayer",
        "MBartDecoderLayer", "OPTDecoderLayer", "PegasusDecoderLayer", "PegasusXDecoderLayer",
        "Speech2TextDecoderLayer", "WhisperDecoderLayer", "XGLMDecoderLayer",
    ),
    "final_layer_norm": (
        "BartDecoderLayer", "BlenderbotSmallDecoderLayer", "DecoderLayer", "LEDDecoderLayer", "MarianDecoderLayer",
        "MvpDecoderLayer", "PLBartDecoderLayer", "SpeechT5DecoderLayer", "TrOCRDecoderLayer",
    ),
    "mlp.dense_4h_to_h": (
        "BloomBlock", "FalconDecoderLayer", "GPTNeoXJapaneseLayer", "GPTNeoXLayer", "PersimmonDecoderLayer",
    ),
    "feed_forward.down_proj": (
        "BambaDecoderLayer", "FalconH1DecoderLayer", "JambaMambaDecoderLayer", "Llama4TextDecoderLayer",
    ),
    "mixer.out_proj": ("FalconMambaBlock", "Mamba2Block", "MambaBlock", "NemotronHBlock"),
    "mlp.c_proj": ("GPT2Block", "GPTBigCodeBlock", "GPTNeoBlock", "Starcoder2DecoderLayer"),
    "layer.2.DenseReluDense.wo": ("LongT5Block", "MT5Block", "Pop2PianoBlock", "T5Block", "UMT5Block"),
    "mlp.fc2": (
        "CanaryDecoderLayer", "CohereAsrDecoderLayer", "Cosmos3EdgeTextDecoderLayer", "MoonshineDecoderLayer",
        "MoshiDecoderLayer", "NanoChatDecoderLayer", "PhiDecoderLayer",
    ),
    "output.dense": ("MegatronBertLayer", "RobertaPreLayerNormLayer", "XLMRobertaXLLayer"),
    "ffn.fc2": ("Kosmos2_5TextBlock", "NllbMoeDecoderLayer", "SeamlessM4TDecoderLayer", "SeamlessM4Tv2DecoderLayer"),
    "feed_forward.w2": ("Lfm2DecoderLayer", "Lfm2MoeDecoderLayer"),
    "mlp.fc_out": ("CodeGenBlock", "GPTJBlock"),
    "feed_forward.shared_expert.down_proj": ("Llama4TextDecoderLayer",),
    "feed_forward_layer_norm": ("ProphetNetDecoderLayer",),
    "ff.layer_norm": ("XLNetLayer",),
    "layer.2.mlp.wo": ("SwitchTransformersBlock",),
    "ffn.2": ("EncoderLayer",),
    "ffn.down_proj": ("MptBlock",),
    "ln_2": ("Block",),
    "mamba.out_proj": ("Zamba2MambaDecoderLayer",),
    "mamba_decoder.mamba.out_proj": ("Zamba2HybridLayer",),
    "mixer.down_proj": ("NemotronHBlock",),
    "mixer.o_proj": ("NemotronHBlock",),
    "mixer.shared_experts.down_proj": ("NemotronHBlock",),
    "mlp": ("JetMoeDecoderLayer",),
    "mlp.experts.down_proj_bias": ("GptOssDecoderLayer",),
    "mlp.shared_mlp.down_proj": ("HunYuanMoEV1DecoderLayer",),
    "mlp_block.down_proj": ("RecurrentGemmaDecoderLayer",),
    "mlps.1.down_proj": ("LongcatFlashDecoderLayer",),
    "self_attn.o_proj": ("Cohere2MoeDecoderLayer",),
    "shared_mlp.output_linear": ("GraniteMoeHybridDecoderLayer",),
    "layer.1.DenseReluDense.wo": ("MT5Block", "T5Block", "UMT5Block"),
}
# fmt: on
# What some layers multiply their MLP's output by; none has both.
FACTORS = ("residual_multiplier", "residual_scale")

# Model types that cannot be steered, by the reason.
REFUSED_TYPES = {
    "several residual streams, so there is no one vector to add": (
        "deepseek_v4", "gemma3n_text", "glm5_next", "hy_v4", "qwen4_exp_text", "reformer",
    ),
    "layers that it runs by their method forward, past whatever is to be added": ("squeezebert",),
    "two stacks of layers that it runs in turn, several times over": ("hrm_text",),
    "a residual stream that it halves every few layers, at inference only": ("rwkv",),
}  # fmt: skip

# Model types whose layers return (seq, batch, hidden_size): where the two are equal, no shape tells.
SEQ_FIRST_TYPES = ("fsmt", "xlnet")

# Config fields that count residual streams.
STREAM_COUNTS = ("altup_num_inputs", "hc_count", "hc_mult")

# Config fields that give linear modules a bias and do nothing else. Tried one by one in this order, then all together;
# the first that is enough is taken, and the earlier ones add fewer biases of zeros.
BIAS_SWITCHES = ("mlp_bias", "attention_bias", "use_bias", "bias", "qkv_bias")
# Classes that compute what Llama computes, and the switches under which Llama has their biases.
LLAMA_COUSINS = {
    "MistralForCausalLM": ("mlp_bias",),
    "Phi3ForCausalLM": ("mlp_bias",),
    "Qwen2ForCausalLM": ("mlp_bias", "attention_bias"),
}
WHY_NO_STOCK_FORM = {
    "Qwen3ForCausalLM": "it normalises queries and keys, which no class with MLP biases does",
    "GemmaForCausalLM": "it scales embeddings and norms as no class with MLP biases does",
}

# What tests/peft_bias_steer/serving/walk_vllm.py saw of the classes of transformers in vLLM.
# fmt: off
# Its plugin gives the steered model's answers.
VLLM_PLUGIN_CLASSES = (
    "AXK1ForCausalLM", "AfmoeForCausalLM", "ArceeForCausalLM", "AriaForConditionalGeneration", "BioGptForCausalLM",
    "BitNetForCausalLM", "CTRLLMHeadModel", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM",
    "Cohere2VisionForConditionalGeneration", "CohereForCausalLM", "CwmForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "Dots1ForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM",
    "Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration", "ExaoneMoeForCausalLM", "FalconForCausalLM",
    "FalconH1ForCausalLM", "FlexOlmoForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM",
    "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteSWAForCausalLM",
    "HeliumForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "HyperCLOVAXForCausalLM",
    "Idefics3ForConditionalGeneration", "InternVLForConditionalGeneration", "Jais2ForCausalLM", "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM", "LlamaForCausalLM", "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration", "Mamba2ForCausalLM",
    "MellumForCausalLM", "MiniCPM3ForCausalLM", "Ministral3ForCausalLM", "MinistralForCausalLM",
    "Mistral3ForConditionalGeneration", "MistralForCausalLM", "MixtralForCausalLM", "MoshiForCausalLM",
    "NanoChatForCausalLM", "NemotronForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
    "OlmoForCausalLM", "OlmoeForCausalLM", "PaddleOCRVLForConditionalGeneration", "PaliGemmaForConditionalGeneration",
    "PersimmonForCausalLM", "Phi3ForCausalLM", "Phi4MultimodalForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ASRForConditionalGeneration", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3VLForConditionalGeneration",
    "SeedOssForCausalLM", "SmolLM3ForCausalLM", "SmolVLMForConditionalGeneration", "SolarOpenForCausalLM",
    "StableLmForCausalLM", "Starcoder2ForCausalLM", "VaultGemmaForCausalLM", "ZayaForCausalLM",
)
# It does not, or was not compared.
WHY_NOT_IN_VLLM: dict[str, tuple[str, ...]] = {
    "not verified: vLLM wants a processor of media, which the tiny models lack": (
        "AyaVisionForConditionalGeneration", "Cosmos3OmniForConditionalGeneration",
        "DeepseekVLForConditionalGeneration", "DeepseekVLHybridForConditionalGeneration", "Emu3ForCausalLM",
        "EvollaForProteinText2Text", "FuyuForCausalLM", "Glm46VForConditionalGeneration",
        "GotOcr2ForConditionalGeneration", "HunYuanVLForConditionalGeneration",
        "HyperCLOVAXVisionV2ForConditionalGeneration", "Idefics2ForConditionalGeneration", "InklingForCausalLM",
        "JanusForConditionalGeneration", "Kimi_K25ForConditionalGeneration", "Kosmos2_5ForConditionalGeneration",
        "LightOnOcrForConditionalGeneration", "MllamaForCausalLM", "MllamaForConditionalGeneration",
        "Ovis2ForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen3OmniMoeThinkerForConditionalGeneration", "VideoLlama3ForConditionalGeneration",
        "VideoLlavaForConditionalGeneration", "VipLlavaForConditionalGeneration",
    ),
    "vLLM has no such class": (
        "BigBirdForCausalLM", "CodeGenForCausalLM", "GPTNeoForCausalLM", "GPTNeoXJapaneseForCausalLM",
        "MegatronBertForCausalLM", "MptForCausalLM", "MvpForCausalLM", "OpenAIGPTLMHeadModel", "ProphetNetForCausalLM",
        "RemBertForCausalLM", "RoFormerForCausalLM", "TrOCRForCausalLM", "XGLMForCausalLM", "XLNetLMHeadModel",
    ),
    "vLLM's backend for classes of transformers does not take it": (
        "AXK2ForCausalLM", "AriaTextForCausalLM", "BambaForCausalLM", "BartForCausalLM", "BertGenerationDecoder",
        "BertLMHeadModel", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
        "CamembertForCausalLM", "Data2VecTextForCausalLM", "DiffLlamaForCausalLM", "ElectraForCausalLM",
        "ErnieForCausalLM", "GitForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "MiniMaxForCausalLM",
        "MiniMaxM3VLForCausalLM", "Mistral4ForCausalLM", "ModernBertDecoderForCausalLM", "PLBartForCausalLM",
        "PegasusForCausalLM", "RecurrentGemmaForCausalLM", "RoCBertForCausalLM", "RobertaForCausalLM",
        "RobertaPreLayerNormForCausalLM", "WhisperForCausalLM", "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM",
        "XmodForCausalLM", "YoutuForCausalLM",
    ),
    "vLLM's class does not run the tiny model on a CPU in float32": (
        "Cosmos3EdgeForConditionalGeneration", "DeepseekV32ForCausalLM", "FalconMambaForCausalLM",
        "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration", "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration", "GlmAsrForConditionalGeneration", "GlmMoeDsaForCausalLM",
        "GlmOcrForConditionalGeneration", "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechPlusForConditionalGeneration", "HYV3ForCausalLM", "JambaForCausalLM", "KimiLinearForCausalLM",
        "LagunaForCausalLM", "Lfm2VlForConditionalGeneration", "Llama4ForCausalLM", "Llama4ForConditionalGeneration",
        "MambaForCausalLM", "MiMoV2FlashForCausalLM", "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration", "MiniMaxM2ForCausalLM", "MiniMaxM3SparseForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration", "OlmoHybridForCausalLM", "PhimoeForCausalLM",
        "QianfanOCRForConditionalGeneration", "Qwen2AudioForConditionalGeneration", "Qwen3NextForCausalLM",
        "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration", "Step3p7ForConditionalGeneration",
        "VoxtralForConditionalGeneration", "Zamba2ForCausalLM",
    ),
    "vLLM's own base model differs from the one of transformers": (
        "ApertusForCausalLM", "BloomForCausalLM", "DogeForCausalLM", "JetMoeForCausalLM", "NemotronHForCausalLM",
    ),
}
# Stock checkpoints whose biases vLLM applies, and those whose biases it does not apply, without an error.
VLLM_STOCK_CLASSES = (
    "ArceeForCausalLM", "AriaForConditionalGeneration", "BioGptForCausalLM", "CTRLLMHeadModel", "CwmForCausalLM",
    "FalconForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM",
    "GptOssForCausalLM", "GraniteForCausalLM", "GraniteSWAForCausalLM", "HeliumForCausalLM",
    "Idefics3ForConditionalGeneration", "Jais2ForCausalLM", "LlamaForCausalLM", "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration", "LlavaNextVideoForConditionalGeneration", "Mamba2ForCausalLM",
    "NemotronForCausalLM", "OPTForCausalLM", "PersimmonForCausalLM", "PhiForCausalLM", "SeedOssForCausalLM",
    "SmolLM3ForCausalLM", "SmolVLMForConditionalGeneration", "Starcoder2ForCausalLM",
)
VLLM_DROPS_BIASES = (
    "Cohere2MoeForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "FalconH1ForCausalLM",
    "MiniCPM3ForCausalLM", "PaddleOCRVLForConditionalGeneration",
)
# fmt: on
# Model types that llama.cpp, as it converts them, steers with a control vector, and with biases.
CONTROL_VECTOR_TYPES = ("gemma2", "gemma3", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
GGUF_BIAS_TYPES = ("llama", "mistral")
# Those whose sliding windows it applies.
LLAMA_CPP_WINDOW_TYPES = ("gemma2", "gemma3_text")
# Architecture that a GGUF file names, and its tensor that takes the bias of a layer.
GGUF_BIAS_ARCHITECTURE = "llama"
GGUF_BIAS = "blk.{index}.ffn_down.bias"
