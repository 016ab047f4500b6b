"""Triton kernels of the HierarchicalTopK loss (arXiv 2505.24473), of any size, deterministic.

Legend: B batch, K latents per input, D = d_in, F = d_sae. Everything is accumulated in float32.

    forward    r = b − x; for j = 1…K: r += v_j W[i_j], error_j = ‖r‖²                  r stays in registers
    suffix     s = 0; for j = K…1: s += c_j r, S[b, j] = s, r −= v_j W[i_j]              c_j = dL/d error_j · 2/(B·D)
    latent f   dW[f] = Σ v_j S[b, j] and dv_j = ⟨W[f], S[b, j]⟩ over its pairs (b, j), found by sorting the indices

A subset of budgets or plain TopK only puts zeros in c. Programs advance through the decoder in slabs of columns that
fit in the L2 cache, so device memory delivers each decoder row once per pass and not once per use: K rows per input,
the floor of a kernel that walks through whole rows, are read from L2.

The decoder gradient has one form, sorted and without atomics, because it costs no more bytes: S is written and read
once (8·B·K·D), as much as atomic additions read and write in device memory when each misses the L2 cache; training
resumes bit for bit; and a latent that is active in every input does not serialise its rows. S exists for a window of
columns at a time, so memory does not grow with K: at most 8 floats per element of `target` or half the decoder
gradient, whichever is more, next to the residual, one float for 1024 / K elements of `target`, and the sorted order
of the indices.

Floor of forward and backward in bytes, with w bytes per element of `W_dec`: device memory 4·F·D·w + 8·B·K·D + 24·B·D,
L2 2·B·K·D·w. At B = 4096, K = 32 / 64 / 128, D = 2304, F = 65,536 in float32 these are 5.1 / 7.5 / 12.3 GB and
2.4 / 4.8 / 9.7 GB, so 1.5 / 2.2 / 3.7 ms at the 3.35 TB/s of an H100. Plain TopK that gathers rows from device memory
(forward, and backward for the values) moves 3.0 / 5.4 / 10.3 GB: 0.9 / 1.6 / 3.1 ms.
"""
