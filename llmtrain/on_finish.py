"""What follows the end of a run: a command of the user's, and the machine's shutdown."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from llmtrain.errors import DONE, STOPPED, ConfigError
from llmtrain.schema import unlearned

POWERS_OFF = ("shutdown", "poweroff", "halt", "systemctl")  # not everybody may
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")  # where they lie, and often not in a user's PATH
SYSTEMD = Path("/run/systemd/system")  # there if systemd runs the machine: sd_booted(3)
ASK_LOGIND = "busctl call org.freedesktop.login1 /org/freedesktop/login1"
ASK_LOGIND += " org.freedesktop.login1.Manager CanPowerOff"
ASK_SUDO = "sudo -k -n true"  # -k: a password given a while ago does not last until the end
ASK_SECONDS = 10


class Shutdown(Enum):
    never = "never"
    success = "success"
    always = "always"


@dataclass
class OnFinish:
    """What follows when a run has ended and all is written.

    The shell runs ``command`` with LLMTRAIN_RUN (the run's folder) and LLMTRAIN_STATE (done, failed
    or stopped). ``shutdown_command`` is run without a shell, after ``delay_seconds`` in which
    Ctrl+C cancels it: on ``success`` of all runs, or ``always`` but where the user stopped them.
    """

    shutdown: Shutdown = unlearned(Shutdown.never)
    delay_seconds: float = unlearned(60.0, low=0)
    command: str | None = unlearned()
    shutdown_command: str = unlearned("shutdown -h now")

    def check(self) -> None:
        """Raise ConfigError where the machine is to be shut down and this user cannot do it."""
        if self.shutdown is not Shutdown.never:
            words_to_shut_down(self.shutdown_command)

    def run_command(self, run: Path, state: str) -> None:
        """Run the user's command over a run that has ended; what fails is said in one line."""
        if not self.command:
            return
        told = {"LLMTRAIN_RUN": str(run.resolve()), "LLMTRAIN_STATE": state}
        sys.stdout.flush()  # it may print, too
        try:
            ended = subprocess.run(self.command, shell=True, env=os.environ | told, check=False)
        except KeyboardInterrupt:
            say("on_finish.command was interrupted.")
        else:
            say_failure("on_finish.command", ended.returncode)

    def shut_down(self) -> None:
        """Count down, then shut the machine down; what fails is said in one line."""
        if not count_down(self.delay_seconds):
            say("The shutdown is cancelled.")
            return
        try:
            ended = subprocess.run(words_to_shut_down(self.shutdown_command), check=False)
        except (ConfigError, OSError) as error:
            say(f"The machine was not shut down: {error}")
        else:
            say_failure("on_finish.shutdown_command", ended.returncode)


class Afterwards:
    """Follows the runs of one command, a multirun's points, to the end of the last."""

    def __init__(self) -> None:
        self.latest: OnFinish | None = None

    @contextmanager
    def preparing(self, on_finish: OnFinish) -> Iterator[None]:
        """Around what may take hours before training: a failure of it is an end of a run."""
        before, self.latest = self.latest, on_finish
        yield
        self.latest = before

    @contextmanager
    def follow(self, on_finish: OnFinish, run: Path) -> Iterator[None]:
        """Around the training of a run: its command is run however it ends."""
        self.latest, state = on_finish, "failed"
        try:
            yield
            state = "done"
        except (SystemExit, KeyboardInterrupt):  # a run that is stopped exits 75
            state = "stopped"
            raise
        finally:
            on_finish.run_command(run, state)

    def shut_down(self, code: int) -> None:
        """Shut the machine down if that was asked for an end with this exit code.

        Nothing follows where no run was trained, or where the user stopped one.
        """
        asked = self.latest.shutdown if self.latest is not None else Shutdown.never
        is_due = asked is Shutdown.always or (asked is Shutdown.success and code == DONE)
        if self.latest is not None and is_due and code != STOPPED:
            self.latest.shut_down()


def words_to_shut_down(command: str) -> list[str]:
    """A shutdown command as this user may run it, sudo in front where only that helps.

    Raises ConfigError where it does not exist, has no effect here or is not permitted.
    """
    key, remedy = "on_finish.shutdown_command", "give one that stops this machine, a provider's say"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(key, command, f"cannot be read ({error})", "close its quotes") from None
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS])
    program = shutil.which(words[0], path=path) if words else None
    if program is None:
        raise ConfigError(key, command, "is no program of this machine", remedy)
    words[0] = program
    if Path(program).name not in POWERS_OFF:
        return words
    asks_systemd = Path(program).resolve().name == "systemctl"
    if asks_systemd and not SYSTEMD.is_dir():
        reason = "has no effect: this is a container, or systemd does not run it"
        raise ConfigError(key, command, reason, remedy)
    if os.geteuid() == 0 or (asks_systemd and '"yes"' in answer(ASK_LOGIND)):
        return words
    if not answer(f"{ASK_SUDO} && echo yes"):
        reason = "needs a right that this user has not"
        remedy = "run as root, allow sudo without a password, or set on_finish.shutdown=never"
        raise ConfigError(key, command, reason, remedy)
    return ["sudo", "-n", *words]


def answer(question: str) -> str:
    """What a command prints; nothing where it fails, is not there or takes too long."""
    try:
        asked = subprocess.run(
            question, shell=True, capture_output=True, text=True, timeout=ASK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return asked.stdout if asked.returncode == 0 else ""


def count_down(seconds: float) -> bool:
    """Let the seconds pass, in sight of the user; False where Ctrl+C came first."""
    end = time.monotonic() + seconds
    is_terminal = sys.stderr.isatty()
    try:
        say(f"Shutting this machine down in {seconds:.0f} s; Ctrl+C cancels.")
        while (left := end - time.monotonic()) > 0:
            if is_terminal:
                print(f"\r{left:6.0f} s ", end="", file=sys.stderr, flush=True)
            time.sleep(min(left, 1.0))
    except KeyboardInterrupt:
        return False
    finally:
        if is_terminal:
            print(file=sys.stderr)
    return True


def say_failure(key: str, code: int) -> None:
    """One line for a command that did not end well."""
    if code:
        how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        say(f"{key} {how}.")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
