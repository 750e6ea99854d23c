"""Any causal language model that transformers knows, from a configuration or from weights."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import ConfigError
from llmtrain.folder import write_json
from llmtrain.model.facts import Facts, measure
from llmtrain.model.keywords import check_keywords, check_sizes, complete_config
from llmtrain.model.stored import check_path, digest_of_weights
from llmtrain.schema import Part, Recipe, unlearned, unlearned_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


FACTS_FORMAT = 5  # raise it when Facts change, so that older caches are not read


class Attention(Enum):
    auto = "auto"
    flash = "flash"
    sdpa = "sdpa"
    eager = "eager"


class Kernels(Enum):
    auto = "auto"
    reference = "reference"


@dataclass
class CausalLM(Part):
    """``architecture`` is a ``model_type`` of transformers and ``config`` its keyword arguments.

    ``path`` takes configuration, weights and tokenizer from a Hugging Face folder or hub name
    instead; ``config`` then overrides single values.
    """

    kind: str = "causal_lm"
    name: str = unlearned("???")
    architecture: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    path: str | None = unlearned()
    trust_remote_code: bool = False
    attention: Attention = unlearned(Attention.auto)
    kernels: Kernels = unlearned(Kernels.auto)
    recipe: Recipe = unlearned_part(Recipe)

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
            stored = Path(self.path).expanduser() / "config.json"
            if stored.exists() and self.config and not self.trust_remote_code:
                check_keywords(key, json.loads(stored.read_text())["model_type"], self.config)
        elif self.architecture is None:
            remedy = f"give a folder or hub name: {key}.path=..."
            raise ConfigError(f"{key}.path", None, "is needed", remedy)
        else:
            check_keywords(key, self.architecture, self.config)
            complete_config(self.architecture, self.config)

    def hf_config(self, **tokens: Any) -> "PreTrainedConfig":
        """The transformers configuration; ``tokens`` are the tokenizer's special ids.

        Raises ConfigError where transformers itself refuses a value.
        """
        from transformers import AutoConfig

        if self.path is not None:
            options = {"trust_remote_code": self.trust_remote_code, **self.config}
            return AutoConfig.from_pretrained(self.source, **options)
        assert self.architecture is not None
        values = complete_config(self.architecture, self.config)
        try:
            return AutoConfig.for_model(self.architecture, **values, **tokens)
        except Exception as error:  # transformers checks with several kinds of exception
            reason = " ".join(str(error).split())
            raise ConfigError(
                "model.config", self.name, f"is refused: {reason}", "change it"
            ) from None

    def build(
        self,
        dtype: "torch.dtype",
        attention: str,
        loading: dict[str, Any] | None = None,
        **tokens: Any,
    ) -> "PreTrainedModel":
        """The model with fresh or stored weights in ``dtype``, on the default device.

        ``loading`` are more keyword arguments for stored weights.
        """
        from transformers import AutoModelForCausalLM

        options = {"dtype": dtype, "attn_implementation": attention, **(loading or {})}
        trust = {"trust_remote_code": self.trust_remote_code}
        config = self.hf_config(**tokens)
        if self.path is None:
            return AutoModelForCausalLM.from_config(config, **options, **trust)
        return AutoModelForCausalLM.from_pretrained(self.source, config=config, **options, **trust)

    def facts(self, cache: Path) -> "Facts":
        """The model's size, measured once on the meta device and kept in ``cache``."""
        path = cache / "models" / f"{self.fingerprint()}.json"
        if path.exists():
            return Facts(**json.loads(path.read_text()))
        facts = self.measured()
        write_json(path, asdict(facts))
        return facts

    def measured(self) -> "Facts":
        """Counts and widths. Raises ConfigError where the library cannot make such a model."""
        try:
            return measure(self.hf_config(), self.trust_remote_code)
        except ConfigError:
            raise
        except Exception as error:  # a stranger's class, a bad width, a hub out of reach
            reason = f"cannot be made: {' '.join(str(error).split())[:300]}"
            if self.path is None:
                raise ConfigError("model.config", self.name, reason, "change it") from None
            raise ConfigError(
                "model.path", self.path, reason, "check the name or the folder"
            ) from None

    def weights_fingerprint(self) -> str | None:
        """What tells stored weights from others; None for a model that starts afresh."""
        if self.path is None:
            return None
        folder = Path(self.path).expanduser()
        return digest_of_weights(folder) if folder.is_dir() else self.path

    def fingerprint(self) -> str:
        """A hash of what decides the model's shape."""
        shape = [
            FACTS_FORMAT,
            self.architecture,
            self.config,
            self.path,
            importlib.metadata.version("transformers"),
        ]
        stored = Path(self.path or "", "config.json")
        shape.append(stored.read_text() if self.path and stored.exists() else "")
        return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]
