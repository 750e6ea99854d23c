"""Export a finished model: an adapter merged into its base, the adapter alone, or another dtype."""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmtrain.artefacts import with_code
from llmtrain.errors import ConfigError
from llmtrain.finished import (
    Finished,
    adapter_config,
    attempt,
    command,
    config_of,
    find_model,
    open_finished,
    open_manifest,
    open_model,
    options_of,
    run_folder,
)
from llmtrain.folder import publish, write_json, write_text
from llmtrain.held_out import sequence_losses, sequences_of, spread

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """examples:
  python -m llmtrain.export outputs/<run> --to merged --dtype bf16
  python -m llmtrain.export outputs/<run> --to adapter --out my_adapter
"""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CHECK_TEXT = "def main() -> int:\n    print('The quick brown fox jumps over the lazy dog')\n"
CHECK_TOKENS = 64
NUM_SEQUENCES = 16  # of the held-out split, whose loss is told beside

README = """# A model exported by llmtrain

From `{source}`:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{folder}")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")

{figures}
"""


def main(words: list[str] | None = None) -> int:
    """Export as the command line says, and return the exit code."""
    return command(export, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = options_of("export", __doc__, EXAMPLES)
    options.add_argument("--to", required=True, choices=sorted(EXPORTS))
    options.add_argument("--dtype", choices=sorted(DTYPES), help="default: as the weights are")
    options.add_argument("--out", help="the folder to write; default: <run>/export/<to>")
    options.add_argument("--which", default="auto", choices=["auto", "final", "best"])
    return options


def export(arguments: argparse.Namespace) -> None:
    """Write the folder that was asked for. Raises ConfigError for what cannot be."""
    source = find_model(arguments.run, arguments.which)
    out = out_of(arguments)
    check(arguments, source)
    EXPORTS[arguments.to](arguments, source, out)
    print(out)


def out_of(arguments: argparse.Namespace) -> Path:
    """The folder to write; ConfigError for one that holds something."""
    if arguments.out is None and config_of(arguments.run) is None:
        reason = f"is needed: {arguments.run} is no run folder"
        raise ConfigError("--out", None, reason, "give a folder")
    own = run_folder(arguments.run).export(arguments.to)
    out = (Path(arguments.out).expanduser() if arguments.out else own).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("--out", out, "is there already", "delete it, or give another folder")
    return out


def check(arguments: argparse.Namespace, source: Path) -> None:
    """Raise ConfigError for an export that this model does not have."""
    has_adapter = attempt("run", str(source), lambda: adapter_config(str(source))) is not None
    if arguments.to in ("merged", "adapter") and not has_adapter:
        reason = f"needs an adapter, and {source} is a whole model"
        raise ConfigError("--to", arguments.to, reason, "say --to safetensors")
    if arguments.to == "safetensors" and has_adapter:
        reason = f"writes a whole model, and {source} is an adapter"
        raise ConfigError("--to", arguments.to, reason, "say --to merged, or --to adapter")
    if arguments.to == "adapter" and arguments.dtype is not None:
        reason = "changes weights, and an adapter is copied as it is"
        raise ConfigError("--dtype", arguments.dtype, reason, "leave it out")
    if arguments.to == "adapter" and not source.is_dir():
        reason = "is a hub name, and a folder is copied"
        raise ConfigError("run", arguments.run, reason, f"say: hf download {arguments.run}")


def export_adapter(arguments: argparse.Namespace, source: Path, out: Path) -> None:
    """A copy of the adapter's folder."""
    put(out, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))


def export_safetensors(arguments: argparse.Namespace, source: Path, out: Path) -> None:
    """The whole model in a dtype."""
    finished = opened(arguments, quantized=False)
    save(finished, dtype_of(arguments, finished), source, out, measured(finished), None)


def export_merged(arguments: argparse.Namespace, source: Path, out: Path) -> None:
    """The adapter added to the weights of its base, in fp32, and rounded once to the dtype."""
    config = config_of(arguments.run)
    is_quantized = config is not None and config.adapter.kind == "qlora"
    trained = measured(opened(arguments, quantized=True)) if is_quantized else None
    finished = opened(arguments, quantized=False)
    dtype = dtype_of(arguments, finished)
    finished.model.float()
    before = measured(finished)
    merged = replace(finished, model=finished.model.merge_and_unload())
    save(merged, dtype, source, out, before, trained)


EXPORTS: dict[str, Callable[[argparse.Namespace, Path, Path], None]] = {
    "merged": export_merged,
    "adapter": export_adapter,
    "safetensors": export_safetensors,
}


def opened(arguments: argparse.Namespace, quantized: bool) -> Finished:
    names = (arguments.run, arguments.which, arguments.device, arguments.base)
    return open_finished(*names, quantized=quantized)


def dtype_of(arguments: argparse.Namespace, finished: Finished) -> str:
    """The name of the dtype to write: the one asked for, else that of the stored weights."""
    names = {value: name for name, value in DTYPES.items()}
    return arguments.dtype or names[str(finished.model.dtype).removeprefix("torch.")]


class Measured(NamedTuple):
    """What a model is compared by: logits [L, V] of a fixed text, and its held-out loss."""

    logits_LV: "Tensor"
    loss: float | None


def measured(finished: Finished) -> Measured:
    import torch

    ids_L = finished.tokenizer(CHECK_TEXT)["input_ids"][:CHECK_TOKENS]
    input_ids_BL = torch.tensor([ids_L], device=finished.model.device)
    with torch.inference_mode():
        logits_BLV = finished.model(input_ids=input_ids_BL, use_cache=False).logits
    return Measured(logits_BLV[0].float().cpu(), held_out_loss(finished))


def held_out_loss(finished: Finished) -> float | None:
    """Nats per token over some of the run's held-out sequences, where these are at hand."""
    if finished.folder is None or finished.config is None:
        return None
    try:
        manifest = open_manifest(finished.folder)
    except (ConfigError, OSError):
        return None
    keep_apart = getattr(finished.config.data, "keep_documents_apart", False)
    sequences = sequences_of(manifest, finished.config.train.seq_len, keep_apart)
    indices = spread(range(len(sequences)), NUM_SEQUENCES)
    losses = sequence_losses(finished, sequences, indices, batch_size=1)
    return sum(loss.nats for loss in losses) / sum(loss.num_tokens for loss in losses)


def save(
    finished: Finished,
    dtype: str,
    source: Path,
    out: Path,
    before: Measured,
    trained: Measured | None,
) -> None:
    """Write model, tokenizer and README, and say how far the reopened model is from the old one.

    ``trained`` is what was measured over the quantised base that an adapter was trained on.
    """
    import torch

    def fill(folder: Path) -> None:
        finished.model.to(getattr(torch, DTYPES[dtype])).save_pretrained(folder)
        finished.tokenizer.save_pretrained(folder)
        model, tokenizer = open_model(folder, str(finished.model.device.type))
        after = measured(replace(finished, model=model, tokenizer=tokenizer))
        figures = compared(dtype, before, after, trained)
        write_json(folder / "export.json", {"source": str(source), "dtype": dtype, **figures})
        said = "\n".join(sentences(figures))
        has_code = finished.model._auto_class is not None
        text = README.format(source=source, folder=out, figures=said)
        write_text(folder / "README.md", with_code(text, out) if has_code else text)
        print(said, file=sys.stderr)

    put(out, fill)


def compared(
    dtype: str, before: Measured, after: Measured, trained: Measured | None
) -> dict[str, float | None]:
    """How far a written model is from what it was made of; ConfigError if its logits overflow."""
    if not after.logits_LV.isfinite().all():
        remedy = "take bf16, or fp32"
        raise ConfigError("--dtype", dtype, "overflows: the logits are not finite", remedy)
    figures = {
        "logits_difference": relative_difference(before.logits_LV, after.logits_LV),
        "held_out_loss_before": before.loss,
        "held_out_loss": after.loss,
    }
    if trained is None:
        return figures
    return figures | {
        "quantized_logits_difference": relative_difference(trained.logits_LV, after.logits_LV),
        "quantized_held_out_loss": trained.loss,
    }


def relative_difference(before_LV: "Tensor", after_LV: "Tensor") -> float:
    """``mean |after - before| / mean |before|``."""
    return float((after_LV - before_LV).abs().mean() / before_LV.abs().mean())


def sentences(figures: dict[str, float | None]) -> Iterator[str]:
    """The figures in words."""
    yield f"Reopened, its logits differ by {figures['logits_difference']:.2g} of their mean size."
    if "quantized_logits_difference" in figures:
        lost = figures["quantized_logits_difference"]
        yield (
            "The adapter was trained over weights in 4 bits and is merged into the whole ones: from"
            f" what was trained the logits differ by {lost:.2g} of their mean size."
        )
    if figures["held_out_loss"] is not None:
        was = figures.get("quantized_held_out_loss") or figures["held_out_loss_before"]
        yield f"Held-out loss {figures['held_out_loss']:.4f}, before {was:.4f}."


def put(out: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder and rename it into its place, so that it is there wholly or not at all."""
    temporary = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        publish(temporary, out)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise ConfigError("--out", out, reason, "give another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
