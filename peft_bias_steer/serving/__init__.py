"""
Everything that leaves the process: a steered model in other software. Import each by its own path.

- `stock_checkpoint`: a checkpoint of stock transformers classes, for vLLM and transformers without this package.
- `gguf`: files for llama.cpp. `llama_cpp`: a llama.cpp model that runs in this process.
- `other_servers`: files for EasySteer and hotwire-vllm.
- `vllm`: the plugin, and an engine whose vectors change while it runs. `trl`: GRPO that samples with vLLM.
- `routes`: which of these give a model's answers exactly. `check`: whether a running server does.
"""
