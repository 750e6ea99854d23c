"""Stream text from a trained model: `python -m llmtrain.generate outputs/<run> --prompt "def "`."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import DONE, REFUSED, ConfigError
from llmtrain.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main(words: list[str] | None = None) -> int:
    """Generate as the command line says, and return the exit code."""
    arguments = parser().parse_args(words)
    try:
        check(arguments)
        model, tokenizer = open_model(model_folder(arguments.run), arguments.device)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    stream(model, tokenizer, arguments)
    return DONE


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(prog="python -m llmtrain.generate", description=__doc__)
    options.add_argument("run", help="a run folder, or any Hugging Face folder")
    options.add_argument("--prompt", required=True, help="the text to continue")
    options.add_argument("--max-new-tokens", type=int, default=100)
    options.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    options.add_argument("--top-p", type=float, default=0.9)
    options.add_argument("--top-k", type=int, default=0, help="0: no limit")
    options.add_argument("--repetition-penalty", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return options


def check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a value that sampling cannot use."""
    limits = {
        "max_new_tokens": (1, None),
        "temperature": (0, None),
        "top_p": (0, 1),
        "top_k": (0, None),
        "repetition_penalty": (0.01, None),
        "seed": (0, 2**32 - 1),
    }
    if not arguments.prompt:
        raise ConfigError("--prompt", "''", "is empty", "give at least one character")
    for name, (low, high) in limits.items():
        value = getattr(arguments, name)
        if not value >= low or (high is not None and value > high):  # a NaN is not >= anything
            reason = f"is not {low} or more" + (f" and {high} or less" if high is not None else "")
            raise ConfigError(f"--{name.replace('_', '-')}", value, reason, "give one that is")


def model_folder(run: str) -> Path:
    """The finished model of a run, else its best so far; or a Hugging Face folder itself."""
    folder = RunFolder(run)
    for path in (folder.final, folder.best, folder.path):
        if (path / "config.json").exists():
            return path
    reason = "has no model yet" if folder.exists() else "is no run folder and no model folder"
    raise ConfigError("run", run, reason, "give a folder below outputs/ that has final/ or best/")


def open_model(path: Path, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a Hugging Face folder, on the device that is there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from llmtrain.kernel import selective_scan

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", device, "is not to be had here", "take cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    selective_scan.install(AutoConfig.from_pretrained(path).model_type)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.to(torch.device(device))
    return model, AutoTokenizer.from_pretrained(path)


def stream(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", arguments: argparse.Namespace
) -> None:
    """Print the text as it is written, and the rate to stderr."""
    import torch
    from transformers import TextStreamer

    torch.manual_seed(arguments.seed)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    options = {"do_sample": arguments.temperature > 0}
    if options["do_sample"]:
        names = ("temperature", "top_p", "top_k")
        options |= {name: getattr(arguments, name) for name in names}
    print(arguments.prompt, end="", flush=True)
    start = time.perf_counter()
    written_BL: torch.Tensor = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=arguments.max_new_tokens,
        repetition_penalty=arguments.repetition_penalty,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **options,
    )
    seconds = time.perf_counter() - start
    count = written_BL.shape[1] - inputs["input_ids"].shape[1]
    print(f"{count} tokens, {count / seconds:.1f} tok/s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
