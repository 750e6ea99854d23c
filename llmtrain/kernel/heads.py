"""A causal language model as a body and a head, where it is no more than that."""

# B batch, L length, D width, V vocabulary

from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 4
LARGE_LOGIT = 1024.0  # a number of every dtype


def plain_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The modules with ``model(...).logits == head(body(...).last_hidden_state)``, if it is so.

    ``model`` is one of transformers or a peft model around it. None for a model that scales or caps
    its logits, adds a router's loss, has an encoder or a learned prompt. A few tokens run through
    the model to find out, so weights that ZeRO-3 partitions need its hooks.
    """
    causal: Any = model
    if hasattr(causal, "get_base_model"):
        causal = causal.get_base_model()
    body, head = causal.base_model, causal.get_output_embeddings()
    if causal.config.is_encoder_decoder or body is causal or head is None:
        return None
    in_training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would make every call differ
    try:
        is_plain = gives_its_logits(model, body, head)
    finally:
        for module in in_training:
            module.training = True
    return (body, head) if is_plain else None


@torch.no_grad()
def gives_its_logits(model: nn.Module, body: nn.Module, head: nn.Module) -> bool:
    """Whether the body's states go into the head as they are, and its logits come out of the model.

    The logits are replaced by large ones at the head: those of fresh weights are too small for a
    soft cap to change them.
    """
    into_head: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], logits_BLV: Tensor) -> Tensor:
        into_head.append(inputs[0])
        return torch.full_like(logits_BLV, LARGE_LOGIT)

    device = next(model.parameters()).device
    tokens: Any = {"input_ids": torch.arange(PROBE_TOKENS, device=device)[None], "use_cache": False}
    hidden_BLD = body(**tokens).last_hidden_state
    handle = head.register_forward_hook(replace)
    try:
        output = model(**tokens)
    finally:
        handle.remove()
    has_router_loss = getattr(output, "aux_loss", None) is not None
    if has_router_loss or len(into_head) != 1 or into_head[0].shape != hidden_BLD.shape:
        return False
    same_hidden = torch.equal(into_head[0], hidden_BLD.to(into_head[0].dtype))
    return same_hidden and bool((output.logits == LARGE_LOGIT).all())
