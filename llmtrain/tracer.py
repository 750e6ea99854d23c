"""Runs a real model on fake tensors and keeps account of them. It imports torch."""

# B batch, L length, H heads, D width of a head, K targets of a token

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtrain.config import RunConfig
from llmtrain.kernel import block_attention, grouped_query, mixers, walk
from llmtrain.layers import depth_of, stack_of
from llmtrain.live import LiveTensors
from llmtrain.model.facts import possible_attention
from llmtrain.model.linear import adaptable
from llmtrain.objective import objective_of, recompute
from llmtrain.roofline import OpCounter
from llmtrain.trace import PHASES, Sample, Setting, Weights

aten = torch.ops.aten


class Tracer:
    """A config's model with shapes and no values, ready to be run with few of its layers."""

    def __init__(self, config: RunConfig, setting: Setting) -> None:
        self.config, self.setting = config, setting
        self.fake = FakeTensorMode()
        with self.planned():
            self.model = self.build()
            self.teacher = self.build_teacher()
            self.objective = objective_of(self.model, config.mode, self.teacher)
        self.stack = stack_of(self.model)
        self.layers = list(self.stack if self.stack is not None else [])
        self.depth = depth_of(self.model, setting.recompute)
        self.parts: dict[Any, tuple[Any, Any] | None] = {}

    @contextmanager
    def planned(self) -> Iterator[None]:
        """Fake tensors, and models that take them for real ones on the planned device."""
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            torch.set_num_threads(self.setting.threads)  # a scan's blocks depend on it
            stack.callback(torch.set_num_threads, threads)
            stack.enter_context(patch.object(walk, "planned_device", self.setting.device))
            stack.enter_context(patch("transformers.masking_utils.is_tracing", lambda *_: False))
            if grouped_query.wants_repeats(self.setting.device, self.setting.dtype):
                stack.enter_context(grouped_query.repeating())
            if self.setting.is_packed:
                packed = "transformers.masking_utils.find_packed_sequence_indices"
                stack.enter_context(patch(packed, torch.zeros_like))
            if self.setting.scan_kernel == "mamba-ssm":
                from llmtrain.kernel.fused_mamba import standing_in

                facts = self.config.model.facts(self.config.cache)
                module = mixers.modeling_module(facts.model_type)
                stack.enter_context(standing_in(module))
            stack.enter_context(self.fake)
            yield

    def build(self) -> Any:
        """The model as the engine builds it, but for its values."""
        config, setting = self.config, self.setting
        model = self.fresh(config.model, setting.attention)
        if setting.scan_kernel != "mamba-ssm":  # for which something stands in already
            mixers.install(model.config.model_type, setting.scan_kernel or "transformers")
        recompute(model, setting.recompute)
        layers = adaptable(model)
        config.adapter.stand_in(model, config.model.facts(config.cache))
        with self.adapting():
            return config.adapter.put_on(model, layers).train()

    @contextmanager
    def adapting(self) -> Iterator[None]:
        """Let an adapter's weights be made in their dtype: a cast of what has no values fails."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.setting.dtype))
        try:
            with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
                yield
        finally:
            torch.set_default_dtype(before)

    def build_teacher(self) -> Any:
        """The teacher, where it is read in every step."""
        config = self.config
        if config.teacher is None or config.mode.caches_targets:
            return None
        facts = config.teacher.facts(config.cache)
        teacher = self.fresh(config.teacher, possible_attention(facts, self.setting.attention))
        return teacher.eval().requires_grad_(False)

    def fresh(self, model: Any, attention: str) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        if attention == block_attention.NAME:
            block_attention.register()
        dtype = getattr(torch, self.setting.dtype)
        # There is no flash-attn to call here; torch's fused attention keeps the same tensors.
        traced = "sdpa" if attention.startswith("flash") else attention
        with no_init_weights():
            made = AutoModelForCausalLM.from_config(
                model.hf_config(),
                dtype=dtype,
                attn_implementation=traced,
                trust_remote_code=model.trust_remote_code,
            )
        made.tie_weights()
        return made

    def weights(self) -> Weights:
        """Sizes of the model's parameters and of the teacher's."""
        trained = [param for param in self.model.parameters() if param.requires_grad]
        frozen = [param for param in self.model.parameters() if not param.requires_grad]
        sizes = [param.numel() for param in trained]
        ends = [module.weight for module in ends_of(self.model) if module is not None]
        matrices = [p for p in trained if p.ndim == 2 and not any(p is end for end in ends)]
        return Weights(
            num_trainable=sum(sizes),
            largest=max(sizes),
            num_frozen=sum(param.numel() for param in frozen),
            num_tensors=len(trained),
            num_hidden=sum(param.numel() for param in matrices),
            matrices=[list(param.shape) for param in matrices],
            frozen_bytes=sum(map(num_bytes, frozen)),
            buffer_bytes=sum(map(num_bytes, self.model.buffers())),
            teacher_bytes=sum(map(num_bytes, self.of_teacher())),
            trained_sizes=[[size, times] for size, times in Counter(sizes).items()],
            frozen_sizes=[[size, times] for size, times in Counter(map(num_bytes, frozen)).items()],
        )

    def of_teacher(self) -> list[Any]:
        return [] if self.teacher is None else list(self.teacher.parameters())

    def sample(self, num_layers: int, batch: int) -> Sample:
        """One forward and backward with the first layers only."""
        if self.stack is not None:
            del self.stack[num_layers:]
        try:
            with self.planned():
                return self.run(num_layers, batch)
        finally:
            if self.stack is not None:
                self.stack.extend(self.layers[num_layers:])

    def run(self, num_layers: int, batch: int) -> Sample:
        for learner in (self.objective.learner, self.objective.teacher):
            if learner is not None:
                learner.forget_documents()  # of an earlier sample, which may be of another size
                learner.__dict__["parts"] = self.parts_of(learner)
        num_tokens = batch * self.config.train.seq_len
        num_learned = ceil(num_tokens * self.setting.learned_share)
        layers, is_wide = self.layers[:num_layers], self.setting.has_wide_products
        account = Account(layers, num_tokens, num_learned, is_wide)
        hooks = [
            param.register_post_accumulate_grad_hook(account.take_gradient)
            for param in self.model.parameters()
            if param.requires_grad
        ]
        account.ignore([*self.model.parameters(), *self.model.buffers(), *self.of_teacher()])
        with account:
            inputs = self.batch(batch)
            loss = self.objective(inputs)
            value = loss.loss_sum + loss.penalty * loss.num_tokens
            account.enter("loss")
            value.backward()
        del loss, value
        for hook in hooks:
            hook.remove()
        self.model.zero_grad(set_to_none=True)
        return Sample(num_layers, batch, account.peaks, account.kept, account.counter.rows())

    def parts_of(self, learner: Any) -> tuple[Any, Any] | None:
        """Body and head: however many layers there are, they are the same two modules."""
        if learner not in self.parts:
            self.parts[learner] = plain_head(learner.model)
        return self.parts[learner]

    def batch(self, size: int) -> dict[str, Any]:
        """A micro-batch of the mode."""
        shape = (size, self.config.train.seq_len)
        tokens_BL = torch.zeros(shape, dtype=torch.long)
        batch: dict[str, Any] = {"input_ids": tokens_BL, "labels": torch.zeros_like(tokens_BL)}
        if self.setting.is_packed:
            batch["position_ids"] = torch.zeros_like(tokens_BL)
        if self.config.mode.caches_targets:
            shape_BLK = (*shape, self.config.mode.top_k)
            batch["teacher_ids"] = torch.zeros(shape_BLK, dtype=torch.int32)
            batch["teacher_probs"] = torch.zeros(shape_BLK, dtype=torch.float32)
        return batch


class Account(LiveTensors):
    """What lives beside weights and gradients in each phase, and the ops by kind.

    The phases: forward; loss, its backward pass until there is a gradient; head, until the last
    layer has one; top, while that is the only layer with one; bottom, once the first layer has one.
    What lies between is not kept: there activations fall and gradients rise in equal steps, so that
    the most lies at an end.
    """

    def __init__(
        self, layers: list[Any], num_tokens: int, num_learned: int, has_wide_products: bool
    ) -> None:
        super().__init__(has_wide_products)
        self.num_tokens, self.num_learned = num_tokens, num_learned
        self.counter = OpCounter()
        self.layer_of = {
            param: number for number, layer in enumerate(layers) for param in layer.parameters()
        }
        self.num_layers = len(layers)
        self.touched: set[int] = set()
        self.gradient_bytes = 0
        self.peaks: dict[str, tuple[float, float]] = dict.fromkeys(PHASES, (0.0, 0.0))
        self.phase = "forward"
        self.kept = 0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return answer(func, args, kwargs, self.num_chosen)

    def num_chosen(self, mask: Any) -> int:
        """Of one value for each token, what is learned; of all else everything."""
        return self.num_learned if mask.numel() == self.num_tokens else int(mask.numel())

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.counter.see(func, args, kwargs, out, walk.num_alike)
        act, most = self.peaks.get(self.phase, (0.0, 0.0))
        live = self.live_bytes
        if live - self.gradient_bytes > act or live > most:
            self.peaks[self.phase] = (max(act, live - self.gradient_bytes), max(most, live))

    def enter(self, phase: str) -> None:
        if phase == "loss":
            self.kept = self.live_bytes
        self.phase = phase

    def take_gradient(self, param: Any) -> None:
        """A parameter has its gradient: from now on its bytes are no activation's."""
        self.gradient_bytes += num_bytes(param.grad)
        if self.phase == "loss":
            self.phase = "head"
        number = self.layer_of.get(param)
        if number is None or number in self.touched:
            return
        self.touched.add(number)
        if number == 0:
            self.phase = "bottom"
        elif self.phase == "head":
            self.phase = "top"
        elif self.phase == "top":
            self.phase = "between"


def ends_of(model: Any) -> tuple[Any, Any]:
    """Embedding and head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def num_bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def fused_attention(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """As the real one its output lies [B, L, H, D]; that of torch's shapes lies [B, H, L, D]."""
    out_BHLD, *others = aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, *rest
    )
    B, H, L, D = out_BHLD.shape
    return (out_BHLD.new_empty(B, L, H, D).transpose(1, 2), *others)


def grouped_product(left: Any, right: Any, *rest: Any) -> Any:
    """torch's shapes are for bf16 alone; those of other dtypes are the same."""
    if left.dtype is torch.bfloat16:
        return aten._grouped_mm.default(left, right, *rest)
    halves = [
        torch.empty_strided(x.shape, x.stride(), dtype=torch.bfloat16, device=x.device)
        for x in (left, right)
    ]
    out = aten._grouped_mm.default(*halves, *rest)
    return torch.empty_strided(out.shape, out.stride(), dtype=left.dtype, device=left.device)


def first_value(tensor: Any) -> Any:
    """What is asked of a value: whether all is well (it is), or a count (one)."""
    return True if tensor.dtype is torch.bool else 1


def answer(func: Any, args: Any, kwargs: Any, num_chosen: Callable[[Any], int]) -> Any:
    """What an op gives, also where that depends on values that fake tensors have not."""
    if func is aten.index.Tensor:
        return chosen(args[0], args[1], num_chosen)
    if func is aten.nonzero.default:
        return positions(args[0], num_chosen)
    return ANSWERS[func](*args) if func in ANSWERS else func(*args, **kwargs)


def positions(mask: Any, num_chosen: Callable[[Any], int]) -> Any:
    """As if so many were not zero."""
    return mask.new_empty((num_chosen(mask), mask.ndim), dtype=torch.long)


def chosen(source: Any, indices: Any, num_chosen: Callable[[Any], int]) -> Any:
    """A mask chooses so many."""
    plain: list[Any] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            plain += [index.new_empty(num_chosen(index), dtype=torch.long)] * index.ndim
        else:
            plain.append(index)
    return aten.index.Tensor(source, plain)


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: first_value,
    aten._grouped_mm.default: grouped_product,
    aten._scaled_dot_product_flash_attention_for_cpu.default: fused_attention,
}


class Copies(LiveTensors):
    """Follows tensors through copies and casts: which ones hold the values of which."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no storage's number is given twice

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = answer(func, args, kwargs, num_chosen=torch.numel)
        if func in (aten._to_copy.default, aten.clone.default):
            self.sources[key_of(out)] = self.source(args[0])
            self.kept.append(out)
        return out

    def source(self, tensor: Any) -> int:
        """What the values of a tensor were copied from."""
        self.kept.append(tensor)
        return int(self.sources.get(key_of(tensor), key_of(tensor)))


def key_of(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


@torch.no_grad()
def plain_head(model: Any) -> tuple[Any, Any] | None:
    """Body and head, as :func:`llmtrain.kernel.heads.plain_head` finds them from values.

    Here tensors have none: what goes into the head has to be the body's own output, and what
    comes out of the model the head's, but for copies and casts.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    body, head = causal.base_model, causal.get_output_embeddings()
    if causal.config.is_encoder_decoder or body is causal or head is None:
        return None
    seen: list[Any] = []
    hooks = [
        body.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state)),
        head.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0], out])),
    ]
    with Copies() as copies:
        output = model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    for hook in hooks:
        hook.remove()
    if len(seen) != 3 or getattr(output, "aux_loss", None) is not None:
        return None
    hidden, into_head, logits = map(copies.source, seen)
    same_hidden = hidden == into_head and seen[0].shape == seen[1].shape
    return (body, head) if same_hidden and logits == copies.source(output.logits) else None
