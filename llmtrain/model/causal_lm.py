"""Any causal language model that transformers knows, from a configuration or from weights."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.errors import ConfigError, nearest
from llmtrain.folder import write_json
from llmtrain.schema import Part, Recipe, unlearned, unlearned_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


FACTS_FORMAT = 2  # raise it when Facts change, so that older caches are not read
ENDS_BYTES = 2**22  # read of a weight file to tell it from another: its header and its last values
SIZES = re.compile(r"num_.*|.*_size|.*head_dim|.*expand|.*_kernel|mamba_[dn]_.*|n_.*")


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

    def build(self, dtype: "torch.dtype", attention: str, **tokens: Any) -> "PreTrainedModel":
        """The model with fresh or stored weights in ``dtype``, on the default device."""
        from transformers import AutoModelForCausalLM

        options = {"dtype": dtype, "attn_implementation": attention}
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


def digest_of_weights(folder: Path) -> str:
    """A hash over a model folder's configuration and the size and both ends of its weights."""
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        sha.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as reader:
            sha.update(reader.read(ENDS_BYTES))
            reader.seek(max(0, file.stat().st_size - ENDS_BYTES))
            sha.update(reader.read())
    return sha.hexdigest()[:16]


class Parameters(NamedTuple):
    """Counts of parameters: all; those that one token uses; those in its matrix products."""

    total: int
    active: int
    matmul: int


@dataclass(frozen=True)
class Facts:
    """What the plan needs to know of a model: counts, and the widths that activations have."""

    model_type: str
    num_parameters: int
    num_active_parameters: int
    num_matmul_parameters: int
    num_layers: int
    num_attention_layers: int
    width: int
    attention_width: int
    kv_width: int
    feed_forward: int
    vocab_size: int
    max_seq_len: int | None
    supports_flash: bool


def measure(config: "PreTrainedConfig", trust_remote_code: bool = False) -> Facts:
    """Counts and widths of a configuration, from the model itself on the meta device."""
    counts = count_parameters(config, trust_remote_code)
    width = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads else 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attending = num_attention_layers(config)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return Facts(
        model_type=config.model_type,
        num_parameters=counts.total,
        num_active_parameters=counts.active,
        num_matmul_parameters=counts.matmul,
        num_layers=config.num_hidden_layers,
        num_attention_layers=attending,
        width=width,
        attention_width=heads * head_dim if attending else 0,
        kv_width=kv_heads * head_dim if attending else 0,
        feed_forward=(getattr(config, "intermediate_size", None) or 4 * width) * experts,
        vocab_size=config.vocab_size,
        max_seq_len=getattr(config, "max_position_embeddings", None),
        supports_flash=supports_flash(config, head_dim),
    )


def supports_flash(config: "PreTrainedConfig", head_dim: int) -> bool:
    """Whether the model's class and heads work with flash-attn, whose heads end at 256."""
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(known, "_supports_flash_attn", False)) and head_dim <= 256


def num_attention_layers(config: "PreTrainedConfig") -> int:
    """How many layers attend over the sequence; the others keep a state."""
    if not getattr(config, "num_attention_heads", None):
        return 0
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None)
    if not kinds:
        return int(config.num_hidden_layers)
    return sum("attention" in kind and "linear" not in kind for kind in kinds)


def count_parameters(config: "PreTrainedConfig", trust_remote_code: bool = False) -> Parameters:
    """Parameters of a configuration, counted on the meta device.

    Active leaves out the experts that a token is not routed to. Matmul counts the weights of
    linear layers and experts, so an embedding's look-up is left out and a tied head is counted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    total = sum(param.numel() for param in model.parameters())
    experts = [param for param in model.parameters() if param.ndim == 3 and is_stack(param, config)]
    num_experts = experts[0].shape[0] if experts else 1
    used = getattr(config, "num_experts_per_tok", None) or 1
    in_experts = sum(param.numel() for param in experts)
    in_use = in_experts * used // num_experts
    linear = sum(weight.numel() for weight in linear_weights(model))
    return Parameters(total, total - in_experts + in_use, linear + in_use)


def is_stack(param: Any, config: Any) -> bool:
    """Whether a three-dimensional parameter stacks one matrix per expert."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return param.shape[0] in [getattr(config, name, None) for name in names]


def linear_weights(model: "PreTrainedModel") -> list[Any]:
    """The weights of a model's linear layers (GPT-2 writes its own as Conv1D)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def complete_config(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with what follows from its width, so that overriding the width stays whole.

    Heads follow from ``hidden_size / head_dim``, a feed-forward from 8/3 of the width (Shazeer
    2020) rounded up to a multiple of 256 (64 below a width of 512), a state-space layer's heads
    from its expanded width. Raises ConfigError where a width is no multiple.
    """
    values = dict(config)
    known = keywords(architecture)
    width = values.get("hidden_size")
    if width is None:
        return values
    if (
        "head_dim" in values
        and "num_attention_heads" in known
        and "num_attention_heads" not in values
    ):
        values["num_attention_heads"] = quotient(
            "hidden_size", width, "head_dim", values["head_dim"]
        )
    heads = values.get("num_attention_heads")
    if heads and "head_dim" not in values:
        quotient("hidden_size", width, "num_attention_heads", heads)
    if heads and "num_key_value_heads" in known:
        values.setdefault("num_key_value_heads", heads)
        quotient("num_attention_heads", heads, "num_key_value_heads", values["num_key_value_heads"])
    if heads and "intermediate_size" in known:
        unit = 256 if width >= 512 else 64
        values.setdefault("intermediate_size", -(-8 * width // (3 * unit)) * unit)
    return complete_state_space(values, known)


def complete_state_space(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The heads of Mamba-2 layers, and a check that the layers named for attention exist."""
    for heads, head_dim, expand in (
        ("num_heads", "head_dim", "expand"),
        ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ):
        if heads in known and head_dim in values and expand in values and heads not in values:
            inner = values[expand] * values["hidden_size"]
            values[heads] = quotient("hidden_size", inner, head_dim, values[head_dim])
    beyond = [i for i in values.get("attn_layer_indices") or [] if i >= values["num_hidden_layers"]]
    if beyond:
        reason = f"names layer {beyond[0]} of {values['num_hidden_layers']}"
        remedy = "give indices below num_hidden_layers"
        raise ConfigError(
            "model.config.attn_layer_indices", values["attn_layer_indices"], reason, remedy
        )
    return values


def quotient(name: str, value: int, divisor_name: str, divisor: int) -> int:
    """``value / divisor`` as a whole number. Raises ConfigError with the nearest values."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"model.config.{name}", value, "is no positive whole number", "give one")
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        remedy = f"take {above}" if below == 0 else f"take {below} or {above}"
        reason = f"is no multiple of {divisor_name}={divisor}"
        raise ConfigError(f"model.config.{name}", value, reason, remedy)
    return value // divisor


def check_sizes(key: str, config: dict[str, Any]) -> None:
    """Raise ConfigError for a count or a size that is no positive whole number."""
    for name, value in config.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if SIZES.fullmatch(name) and value is not None and not is_count:
            raise ConfigError(
                f"{key}.config.{name}", value, "is no positive whole number", "give one"
            )
    experts = config.get("num_experts") or config.get("num_local_experts")
    used = config.get("num_experts_per_tok")
    if experts and used and used > experts:
        reason = f"is more than the {experts} experts"
        raise ConfigError(
            f"{key}.config.num_experts_per_tok", used, reason, f"give at most {experts}"
        )


def check_keywords(key: str, architecture: str, config: dict[str, Any]) -> None:
    """Raise ConfigError for a keyword that the architecture does not have.

    transformers accepts any keyword in silence, so a misspelt one would train another model.
    """
    known = keywords(architecture)
    for name, value in config.items():
        if name not in known:
            reason = f"is no keyword of {architecture}"
            raise ConfigError(f"{key}.config.{name}", value, reason, nearest(name, known))


@cache
def keywords(architecture: str) -> set[str]:
    """A configuration class's keywords, read from its source.

    Reading takes a millisecond; importing one class takes seconds, because it pulls in torch.
    Raises ConfigError for an architecture that transformers does not have.
    """
    shared = transformers_folder() / "configuration_utils.py"
    return class_keywords(config_source(architecture)) | class_keywords(shared)


def config_source(architecture: str) -> Path:
    """The file that holds an architecture's configuration class."""
    models = transformers_folder() / "models"
    folder = architecture.replace("-", "_")
    path = models / folder / f"configuration_{folder}.py"
    if not path.exists():
        known = [
            path.name
            for path in models.iterdir()
            if (path / f"configuration_{path.name}.py").exists()
        ]
        reason = "is no architecture of transformers"
        raise ConfigError("model.architecture", architecture, reason, nearest(architecture, known))
    return path


def class_keywords(path: Path) -> set[str]:
    """The annotated fields of the classes in a source file, class variables left out."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [item for node in classes for item in node.body if isinstance(item, ast.AnnAssign)]
    fields = [item for item in fields if "ClassVar" not in ast.unparse(item.annotation)]
    return {item.target.id for item in fields if isinstance(item.target, ast.Name)}


def transformers_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def check_path(key: str, path: str) -> None:
    """Raise ConfigError for a folder without a model; a hub name is left to the hub."""
    folder = Path(path).expanduser()
    if folder.exists() and not (folder / "config.json").exists():
        raise ConfigError(
            key, path, "holds no config.json", "give a folder such as outputs/<run>/final"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.exists():
        raise ConfigError(
            key, path, "does not exist", "give a folder or a hub name such as org/model"
        )
