"""Which documents are worth learning: the keys ``data.filter``."""

from collections import Counter
from dataclasses import astuple, dataclass
from unicodedata import category

from llmtrain.errors import ConfigError
from llmtrain.schema import learned

RULES = 1  # raise it when a measure changes, so that older shards are not taken for new ones


@dataclass
class Filter:
    """What a document has to be like; null asks for nothing.

    ``min_characters`` and ``max_characters`` are its length. ``min_letters`` is the share of its
    characters, white space left out, that are letters or vowel signs of any script.
    ``max_repeated`` is the share in lines that it has said before (Rae et al. 2021, table A1, where
    it is 0.2).
    """

    min_characters: int | None = learned(None, low=1)
    max_characters: int | None = learned(None, low=1)
    min_letters: float | None = learned(None, low=0, high=1)
    max_repeated: float | None = learned(None, low=0, high=1)

    @property
    def words(self) -> tuple[object, ...]:
        """What tells it from other filters: nothing where it asks for nothing."""
        asked = astuple(self)
        return (RULES, *asked) if any(value is not None for value in asked) else ()

    def check(self, key: str) -> None:
        """Raise ConfigError for bounds that nothing can keep to."""
        least, most = self.min_characters, self.max_characters
        if least is not None and most is not None and least > most:
            reason, remedy = f"is above max_characters={most}", "exchange them"
            raise ConfigError(f"{key}.min_characters", least, reason, remedy)

    def lack_of(self, text: str) -> str:
        """What a text lacks, or nothing."""
        if self.min_characters is not None and len(text) < self.min_characters:
            return f"shorter than {self.min_characters:,} characters"
        if self.max_characters is not None and len(text) > self.max_characters:
            return f"longer than {self.max_characters:,} characters"
        if self.min_letters is not None and letters(text) < self.min_letters:
            return f"less than {self.min_letters:g} of it letters"
        if self.max_repeated is not None and repeated(text) > self.max_repeated:
            return f"more than {self.max_repeated:g} of it in repeated lines"
        return ""


def letters(text: str) -> float:
    """The share of letters among the characters that are no white space."""
    marks = Counter("".join(text.split()))
    of_letters = sum(count for mark, count in marks.items() if category(mark)[0] in "LM")
    return of_letters / max(marks.total(), 1)


def repeated(text: str) -> float:
    """The share of characters in lines that stand further up, too."""
    lines = Counter(line for line in map(str.strip, text.splitlines()) if line)
    again = sum(len(line) * (count - 1) for line, count in lines.items())
    total = sum(len(line) * count for line, count in lines.items())
    return again / max(total, 1)
