from .rebased_attention import rebased_attention, taylor_attention


__version__ = "0.1.0"

__all__ = ["rebased_attention", "taylor_attention"]
