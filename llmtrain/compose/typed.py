"""What Hydra composed as the typed tree."""

import sys

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llmtrain.compose.composing import choices, composed_values, known_keys, register
from llmtrain.compose.explain import explain
from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError, nearest
from llmtrain.schema import GROUPS, parts_in


def to_config(values: DictConfig) -> RunConfig:
    """The typed tree of what Hydra composed. Raises ConfigError for a value that is missing."""
    refuse_strangers(values)
    try:
        config = OmegaConf.to_object(values)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        remedy = f"give it on the command line: {key}=..."
        raise ConfigError(key, "???", "is needed", remedy) from None
    except OmegaConfBaseException as error:  # a value that only shows when pointers are followed
        raise explain(error, sys.argv[1:]) from None
    assert isinstance(config, RunConfig)
    for group in GROUPS:
        part = getattr(config, group)
        if part is None:
            raise ConfigError(group, None, "is no choice", nearest("", choices(group)))
        for key, each in parts_in(group, part).items():
            if each.kind != type(each).kind:
                remedy = f"write {group}={each.kind}"
                raise ConfigError(f"{key}.kind", each.kind, "is chosen with its group", remedy)
    return config


def refuse_strangers(values: DictConfig, prefix: str = "") -> None:
    """Raise ConfigError for a key that `+` or `++` put beside those of a schema."""
    known = getattr(OmegaConf.get_type(values), "__dataclass_fields__", None)
    for name in values:
        key = prefix + str(name)
        if known is not None and name not in known:
            remedy = nearest(key, known_keys())
            raise ConfigError(key, values[name], "is no key of the config", remedy)
        node = values._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            refuse_strangers(node, f"{key}.")


def composed(words: list[str]) -> RunConfig:
    """The config of some overrides, for whoever has no command line of them."""
    register()
    return to_config(composed_values(words))
