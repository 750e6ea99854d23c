"""Any causal language model that transformers knows, from a configuration or from weights."""

import hashlib
import importlib.metadata
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import architecture as own
from llmtrain.errors import ConfigError
from llmtrain.folder import read_cached, write_cached
from llmtrain.hub import go_offline_if_unreachable, is_offline
from llmtrain.model.facts import Facts, measure
from llmtrain.model.keywords import check_keywords, check_sizes, complete_config
from llmtrain.model.stored import check_path, digest_of_weights
from llmtrain.schema import Part, Recipe, unlearned, unlearned_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


FACTS_FORMAT = 6  # raise it when Facts change, so that older caches are not read


class Attention(Enum):
    auto = "auto"
    flash = "flash"
    sdpa = "sdpa"
    eager = "eager"
    blocks = "blocks"


def block_attention() -> Any:
    """The module, which imports torch."""
    from llmtrain.kernel import block_attention

    return block_attention


class Kernels(Enum):
    auto = "auto"
    chunked = "chunked"
    reference = "reference"


@dataclass
class CausalLM(Part):
    """``architecture`` is a ``model_type`` and ``config`` are its configuration's keywords.

    Its file lies in transformers or in ``llmtrain/architecture``.

    ``path`` takes configuration, weights and tokenizer from a Hugging Face folder or hub name
    instead; ``config`` then overrides single values. Where an ``architecture`` is given too, a plan
    needs no network: the numbers are here, and the weights have to be of such a model. ``hub`` is
    what such weights are called wherever a copy lies, and ``hub_dtype`` how they were saved there.
    """

    kind: str = "causal_lm"
    name: str = unlearned("???")
    architecture: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    hub: str | None = None
    hub_dtype: str | None = unlearned()
    path: str | None = unlearned()
    trust_remote_code: bool = False
    attention: Attention = unlearned(Attention.auto)
    kernels: Kernels = unlearned(Kernels.auto)
    recipe: Recipe = unlearned_part(Recipe)

    def __post_init__(self) -> None:
        if self.path is None:  # another run than one from the weights of that name
            self.hub = self.hub_dtype = None

    @property
    def source(self) -> str:
        """The folder, written out, or the hub name."""
        folder = Path(self.path or "").expanduser()
        return str(folder) if folder.is_dir() else str(self.path)

    @property
    def address(self) -> str:
        """Where the weights are found from any folder: the absolute path, or the hub name."""
        folder = Path(self.source)
        return str(folder.absolute()) if folder.is_dir() else self.source

    def check(self, key: str = "model") -> None:
        """Raise ConfigError for an architecture, keyword or folder that does not exist."""
        check_sizes(key, self.config)
        if self.path is not None:
            check_path(f"{key}.path", self.path)
        if self.architecture is not None:
            check_keywords(key, self.architecture, self.config)
            complete_config(self.architecture, self.config)
        elif self.path is None:
            remedy = f"give a folder or hub name: {key}.path=..."
            raise ConfigError(f"{key}.path", None, "is needed", remedy)
        elif self.config and not self.trust_remote_code and self.stored:
            check_keywords(key, self.stored["model_type"], self.config)

    def check_weights(self) -> None:
        """Raise ConfigError, before ranks load them, for weights out of reach or of another model.

        Reads their configuration only, and only where :meth:`facts` did not: a named model's.
        """
        if self.path is None or self.architecture is None:
            return
        try:
            self.stored_config()
        except OSError as error:
            reason = f"cannot be read: {' '.join(str(error).split())[:300]}"
            remedy = "give a local copy: model.path=<folder>"
            raise ConfigError("model.path", self.path, reason, remedy) from None

    @property
    def is_here(self) -> bool:
        """Whether the weights lie in a folder of this machine."""
        return self.path is not None and Path(self.source).is_dir()

    @property
    def stored(self) -> dict[str, Any]:
        """The ``config.json`` of the weights as far as this machine has it; else empty."""
        if self.path is None:
            return {}
        file = Path(self.source) / "config.json" if self.is_here else cached_config(self.path)
        return json.loads(file.read_text()) if file is not None and file.exists() else {}

    @property
    def saved_dtype(self) -> str | None:
        """torch's name of the dtype that the weights were saved in; None where nothing says it."""
        of_hub = self.hub_dtype if self.path == self.hub else None
        return self.stored.get("dtype") or self.stored.get("torch_dtype") or of_hub

    def hf_config(self, **tokens: Any) -> "PreTrainedConfig":
        """The transformers configuration; ``tokens`` are a fresh model's special ids.

        Asks the hub only where no architecture is given. Raises ConfigError where transformers
        itself refuses a value, and where a folder's weights are of another model.
        """
        if self.path is None or (self.architecture is not None and not self.is_here):
            return self.given_config(**tokens)
        return self.stored_config()

    def given_config(self, **tokens: Any) -> "PreTrainedConfig":
        """The configuration of the architecture and numbers that are given here."""
        from transformers import AutoConfig

        own.register(self.architecture)
        assert self.architecture is not None
        values = complete_config(self.architecture, self.config)
        try:
            return AutoConfig.for_model(self.architecture, **values, **tokens)
        except Exception as error:  # transformers checks with several kinds of exception
            reason = " ".join(str(error).split())
            raise ConfigError(
                "model.config", self.name, f"is refused: {reason}", "change it"
            ) from None

    def stored_config(self) -> "PreTrainedConfig":
        """The weights' own configuration: what is given here overrides it, or has to be in it."""
        from transformers import AutoConfig

        own.register(self.model_type)
        if not self.is_here:
            go_offline_if_unreachable()
        trust = {"trust_remote_code": self.trust_remote_code}
        if self.architecture is None:
            return AutoConfig.from_pretrained(self.source, **trust, **self.config)
        stored = AutoConfig.from_pretrained(self.source, **trust)
        self.refuse_difference(stored)
        return stored

    def refuse_difference(self, stored: "PreTrainedConfig") -> None:
        """Raise ConfigError for the first value that is another one in the weights."""
        assert self.architecture is not None
        given = self.given_config()
        for name in ("model_type", *complete_config(self.architecture, self.config)):
            value, wanted = getattr(given, name), getattr(stored, name, None)
            if value != wanted:
                key = "model.architecture" if name == "model_type" else f"model.config.{name}"
                remedy = f"set it so, or take model=pretrained model.path={self.path}"
                raise ConfigError(key, value, f"is {wanted} in the weights of {self.path}", remedy)

    def build(
        self,
        dtype: "torch.dtype",
        attention: str,
        loading: dict[str, Any] | None = None,
        **tokens: Any,
    ) -> "PreTrainedModel":
        """The model with fresh or stored weights in ``dtype``, on the default device.

        ``loading`` are more keyword arguments for stored weights. Raises ConfigError for weights
        that are of another model than the architecture given, or too large for ``dtype``.
        """
        from transformers import AutoModelForCausalLM

        if attention == Attention.blocks.value:
            block_attention().register()
        options = {"dtype": dtype, "attn_implementation": attention, **(loading or {})}
        options |= {"trust_remote_code": self.trust_remote_code}
        if self.path is None:
            return AutoModelForCausalLM.from_config(self.given_config(**tokens), **options)
        config = self.stored_config()
        model = AutoModelForCausalLM.from_pretrained(self.source, config=config, **options)
        refuse_overflow(model, self.path)
        return model

    def facts(self, cache: Path) -> "Facts":
        """The model's size, measured once on the meta device and kept in ``cache``."""
        path = cache / "models" / f"{self.fingerprint()}.json"
        known = read_cached(path, lambda values: Facts(**values))
        if known is None:
            known = self.measured()
            write_cached(path, asdict(known))
        return known

    def measured(self) -> "Facts":
        """Counts and widths. Raises ConfigError where the library cannot make such a model."""
        try:
            return measure(self.hf_config(), self.trust_remote_code)
        except ConfigError:
            raise
        except Exception as error:  # a stranger's class, a bad width, a hub out of reach
            reason = f"cannot be made: {' '.join(str(error).split())[:300]}"
            if self.architecture is not None:
                raise ConfigError("model.config", self.name, reason, "change it") from None
            remedy = "check the name or the folder"
            if is_offline() and not self.is_here:
                reason = "is not in the cache, and the hub does not answer"
                remedy = "give a folder; a preset such as model=qwen2_5_7b is planned without it"
            raise ConfigError("model.path", self.path, reason, remedy) from None

    @property
    def model_type(self) -> str | None:
        """transformers' name of the architecture, as far as this machine knows it."""
        return self.architecture or self.stored.get("model_type")

    def code_fingerprint(self) -> str | None:
        """A hash of the file of an architecture of ours; None for those of transformers."""
        file = own.file_of(self.model_type)
        return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]

    def weights_fingerprint(self) -> str | None:
        """What tells stored weights from others; None for a model that starts afresh."""
        return digest_of_weights(Path(self.source)) if self.is_here else self.path

    def fingerprint(self) -> str:
        """A hash of what decides the model's shape."""
        shape = [
            FACTS_FORMAT,
            self.architecture,
            self.config,
            self.path,
            importlib.metadata.version("transformers"),
        ]
        if code := self.code_fingerprint():
            shape.append(code)
        stored = Path(self.source, "config.json")
        shape.append(stored.read_text() if self.is_here else "")
        return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]


def cached_config(hub_name: str) -> Path | None:
    """The configuration of a hub's model, where it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):  # said when the hub is asked
        found = try_to_load_from_cache(hub_name, "config.json")
        return Path(found) if isinstance(found, str) else None
    return None


def refuse_overflow(model: "PreTrainedModel", path: str) -> None:
    """Raise ConfigError for weights that became infinite: fp16 ends at 65504, bf16 at 3e38."""
    import torch

    for name, param in model.named_parameters():
        is_packed = hasattr(param, "quant_state")  # 4-bit values, in fp16 by their storage alone
        if param.dtype is torch.float16 and not is_packed and param.isinf().any():
            reason = f"cannot hold {name} of {path}, which has values above 65504"
            raise ConfigError("train.precision", "fp16", reason, "take bf16 or fp32")
