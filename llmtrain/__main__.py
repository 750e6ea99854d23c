"""Every command by its name: `llmtrain run ...` is `python -m llmtrain.run ...`, and no more."""

import runpy
import sys

from llmtrain.errors import DONE, REFUSED, ConfigError, nearest

COMMANDS = {
    "run": "train an experiment, or continue it where it stopped",
    "plan": "what a run would be: memory, hours, cost; nothing is started",
    "doctor": "what this machine has, lacks and attains",
    "list": "what a command line can choose: models, hardware, data, experiments, ...",
    "data": "look at rows before training, or write an example file",
    "migrate": "an experiment out of DeepSpeed's, the HF Trainer's or another trainer's settings",
    "generate": "write with a finished model",
    "evaluate": "measure a finished model, beside another",
    "export": "merge an adapter, or change the dtype",
    "status": "all runs below a folder, in a table",
    "report": "runs side by side: a page, a table, a picture",
    "node": "train a filled run folder as one of its machines",
    "completion": "what lets bash complete commands, groups, choices and keys",
}


def main() -> int:
    """Be the command that the first word names. Its exit code, output and signals are its own."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return DONE if words else REFUSED
    name = words[0]
    if name not in COMMANDS:
        remedy = nearest(name, COMMANDS)
        print(ConfigError("command", name, "does not exist", remedy), file=sys.stderr)
        return REFUSED
    sys.argv[1:] = words[1:]
    runpy.run_module(f"llmtrain.{name}", run_name="__main__", alter_sys=True)
    return DONE


def help_text() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<11} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Plan, train, compare and use language models.\n",
            "Use: llmtrain COMMAND [WORD ...], or python -m llmtrain.COMMAND [WORD ...]\n",
            *lines,
            "\nllmtrain COMMAND --help says what a command takes.",
            'eval "$(llmtrain completion)" lets bash complete them.',
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
