"""`--fix`: ends left processes where the user says so, writes settings, and names the rest."""

from collections.abc import Callable
from pathlib import Path

from llmtrain.doctor.holders import Holder
from llmtrain.doctor.line import Line, State
from llmtrain.folder import write_text

SETTINGS = Path("llmtrain.env")
END_SECONDS = 10
HEAD = f"# Written by python -m llmtrain.doctor --fix. Before training: source {SETTINGS}\n"


def end_processes(holders: list[Holder], answer: Callable[[str], str] | None) -> list[str]:
    """Ask for each of this user's processes and end it on y; what came of each.

    ``answer`` puts a question to the user; None where nobody is there to ask, and nothing is ended.
    """
    ours = {holder.pid: holder for holder in holders if holder.is_ours}
    if answer is None:
        return [f"{holder} is left alone: there is no terminal to ask" for holder in ours.values()]
    return [end(holder, answer) for holder in ours.values()]


def end(holder: Holder, answer: Callable[[str], str]) -> str:
    """One process. psutil refuses to signal a number that has become another process."""
    import psutil

    try:
        process = psutil.Process(holder.pid)
        if answer(f"End {holder}? [y/N] ").strip().lower() not in ("y", "yes"):
            return f"pid {holder.pid} is left alone"
        process.terminate()
        process.wait(END_SECONDS)
    except psutil.TimeoutExpired:
        return f"pid {holder.pid} does not end by itself; if it must: kill -9 {holder.pid}"
    except psutil.Error as error:
        return f"pid {holder.pid}: {error}"
    return f"pid {holder.pid} has ended"


def write_settings(lines: list[Line], path: Path = SETTINGS) -> str:
    """Write the settings that repair lines by themselves, each under what it is for."""
    repairs = [line for line in lines if line.setting]
    if not repairs:
        return "no setting of the environment would change anything"
    text = "".join(f"\n# {line.name}: {line.found}\n{line.setting}\n" for line in repairs)
    write_text(path, HEAD + text)
    return f"wrote {', '.join(line.name for line in repairs)} to {path}; now: source {path}"


def by_hand(lines: list[Line]) -> list[str]:
    """What is left for the user."""
    left = [line for line in lines if line.state is not State.green and not line.setting]
    return [f"{line.name}: {line.remedy}" for line in left]
