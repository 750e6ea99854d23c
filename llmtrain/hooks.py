"""The callbacks of a run, called on its first rank."""

import copy
import traceback
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from llmtrain.callback.base import Callback, hook_of


class Hooks:
    """Calls each callback, and remembers what came of it.

    ``reason`` is why the first of them wants the run to end, ``failure`` one line of what the first
    raised that did. None is called after that.
    """

    def __init__(self, callbacks: dict[str, Callback] | None = None) -> None:
        self.callbacks = copy.deepcopy(callbacks or {})
        self.reason: str | None = None
        self.failure: str | None = None

    @classmethod
    def resumed(cls, callbacks: dict[str, Callback], records: Sequence[dict[str, Any]]) -> "Hooks":
        """Callbacks that have been told of all records up to here."""
        hooks = cls(callbacks)
        told = [MappingProxyType(record) for record in records if "rollback" not in record]
        hooks.call("resume", told)
        return hooks

    def tell(self, record: dict[str, Any]) -> None:
        """A new record, as it stands in metrics.jsonl."""
        self.call(hook_of(record), MappingProxyType(record))

    def call(self, hook: str, *given: Any) -> None:
        """Call a hook of each callback."""
        for name, callback in self.callbacks.items():
            if self.failure is not None:
                return
            try:
                reason = getattr(callback, hook)(*given)
            except Exception as error:
                traceback.print_exc()
                self.failure = f"callback.{name} failed in {hook}: {error!r}."
            else:
                if reason and self.reason is None:
                    self.reason = f"callback.{name}: {reason}"
