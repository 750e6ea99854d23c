"""FLOPs of a token, and what a step's time says about the hardware's use."""

import time

from llmtrain.model.facts import Facts


def flops_per_token(
    facts: Facts, seq_len: int, is_frozen: bool = False, teacher: Facts | None = None
) -> float:
    """Matrix-product FLOPs of one token that is read, forward and backward.

    6 FLOPs for each weight in a matrix product (2 forward, 4 backward), with the active experts
    only, no recomputation and no embedding look-up; and for each attention layer 12 x width x the
    mean number of keys, (L + 1) / 2, because attention is causal. After Chowdhery et al. 2022
    (PaLM, appendix B), which counts full instead of causal attention. A state-space scan is
    left out, also where its form has matrix products. A frozen weight has no gradient, which
    leaves 4 of 6 (an adapter's own are left out); a teacher is read forward only.
    """
    mean_keys = (seq_len + 1) / 2
    attention = 12 * facts.num_attention_layers * facts.attention_width * mean_keys
    own = (4 if is_frozen else 6) * facts.num_matmul_parameters + attention
    return own + (flops_per_token(teacher, seq_len) / 3 if teacher is not None else 0)


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, peak_tflops: float | None
) -> float | None:
    """The share of the devices' peak (TFLOP/s, all together) that went into the model's FLOPs.

    None where the peak is not known: no figure is better than a wrong one.
    """
    if not peak_tflops:
        return None
    return tokens_per_second * flops_per_token / (peak_tflops * 1e12)


def measure_matmul_tflops(device: str, dtype_name: str) -> float:
    """This process's matrix-product rate in TFLOP/s: the best of five 1,024-square products.

    Where no datasheet gives a peak (a CPU's share of cores, say), this is what 100 % means.
    """
    import torch

    size = 1024
    dtype = getattr(torch, dtype_name)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    left @ right  # the first product pays for the library's start
    seconds = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        left @ right
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12
