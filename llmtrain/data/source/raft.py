"""RAFT rows of your own: a question, documents, and a teacher's answer."""

from dataclasses import asdict, dataclass, field

from llmtrain.data.corpus import digest
from llmtrain.data.example import Example
from llmtrain.data.raft import Prompt, RaftWriter
from llmtrain.data.rows import Row
from llmtrain.data.source.chat import Chat
from llmtrain.schema import learned


@dataclass
class Raft(Chat):
    """Rows of ``question``, ``documents`` [content, type: oracle|distractor], ``teacher_answer``.

    ``sections`` are the headings to answer under, in place of the prompt's own. The documents are
    shuffled by ``seed``, and ``drop_oracle_fraction`` of the rows are asked without their oracle.
    """

    kind: str = "raft"
    prompt: Prompt = field(default_factory=Prompt)
    sections: list[str] | None = None
    drop_oracle_fraction: float = learned(0.0, low=0, high=1)
    seed: int = 0

    @property
    def writer(self) -> RaftWriter:
        return RaftWriter(self.prompt, self.sections, self.drop_oracle_fraction, self.seed)

    def example(self, row: Row, key: str) -> Example:
        return self.writer.example(row.values, row.place, key)

    def check(self) -> None:
        super().check()
        self.prompt.check()

    def fingerprint(self) -> str:
        return digest([super().fingerprint(), asdict(self.writer)])
