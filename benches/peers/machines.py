"""Machines of this project and of QEMU, started and driven alike.

Both speak QMP, boot the same guest and let it print to a file, so that a run differs in nothing but the machine. A
machine is a context manager: whatever happens inside, its process is gone afterwards, even where this one is killed.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

# How long anything may take that is not a migration; and how often it is looked at.
PATIENCE_S = 60
LOOK_S = 0.002
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class Failure(Exception):
    """Why there is no figure: what was tried, and what came of it."""


def until(what, look, patience_s=PATIENCE_S, every_s=LOOK_S):
    """Waits until `look` returns something true, and returns that."""
    end = time.monotonic() + patience_s
    while not (seen := look()):
        if time.monotonic() > end:
            raise Failure(f"waited {patience_s} s in vain until {what}")
        time.sleep(every_s)
    return seen


class Qmp:
    """A connection to a QMP socket, ready for commands."""

    def __init__(self, path, alive):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        until(f"{path} answers", lambda: alive() and self.connects(path))
        self.stream = self.socket.makefile("rw", encoding="utf-8", newline="\n")
        if "QMP" not in self.read("the greeting"):
            raise Failure(f"{path} does not speak QMP")
        self.execute("qmp_capabilities")

    def connects(self, path):
        try:
            self.socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def read(self, awaited):
        try:
            line = self.stream.readline()
            if not line:
                raise Failure(f"the machine closed its QMP socket before it answered {awaited}")
            return json.loads(line)
        except (OSError, ValueError) as error:
            raise Failure(f"no answer to {awaited}: {error}") from error

    def execute(self, command, **arguments):
        """Executes a command. Underscores in names of arguments stand for hyphens."""
        message = {"execute": command}
        if arguments:
            message["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self.stream.write(json.dumps(message) + "\n")
            self.stream.flush()
        except OSError as error:
            raise Failure(f"cannot send `{command}`: {error}") from error
        while True:
            answer = self.read(command)
            if "error" in answer:
                raise Failure(f"`{command}` was refused: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]

    def close(self):
        # What a broken connection did not take is lost anyway.
        with contextlib.suppress(OSError):
            self.stream.close()
        self.socket.close()


class Machine:
    """One process that is, or waits for, a machine."""

    def __init__(self, name, folder, command):
        """`command` is a list, in which `{qmp}` and `{serial}` are replaced with paths."""
        self.name = name
        self.serial_path = Path(folder, f"{name}.serial")
        self.stderr_path = Path(folder, f"{name}.stderr")
        qmp_path = Path(folder, f"{name}.qmp")
        command = [part.replace("{qmp}", str(qmp_path)).replace("{serial}", str(self.serial_path)) for part in command]
        parent = os.getpid()

        def end_with_parent():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

        with open(self.stderr_path, "wb") as stderr:
            # In a session of its own, so that Ctrl-C reaches this process alone, which then ends all in order.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        try:
            self.qmp = Qmp(qmp_path, self.alive)
        except BaseException:
            self.end()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.qmp.close()
        finally:
            self.end()

    def end(self):
        self.process.kill()
        self.process.wait()

    def alive(self):
        if self.process.poll() is not None:
            raise Failure(f"{self.name} ended with status {self.process.returncode}")
        return True

    def printed(self):
        """What the guest has printed here."""
        try:
            return self.serial_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def cpu_s(self):
        """CPU seconds that the process has used, its vCPUs' among them."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def status(self):
        return self.qmp.execute("query-status")["status"]

    def migration(self):
        answer = self.qmp.execute("query-migrate")
        if answer.get("status") in ("failed", "cancelled", "cancelling"):
            reason = answer.get("error-desc", "no reason given")
            raise Failure(f"{self.name}: the migration is {answer['status']}: {reason}")
        return answer

    def set(self, capabilities, parameters):
        wanted = [{"capability": name, "state": True} for name in capabilities]
        self.qmp.execute("migrate-set-capabilities", capabilities=wanted)
        self.qmp.execute("migrate-set-parameters", **parameters)

    def listen(self):
        """Waits for a guest on a free port of the loopback interface, and returns the address."""
        self.qmp.execute("migrate-incoming", uri="tcp:127.0.0.1:0")

        def address():
            found = self.migration().get("socket-address")
            return found and f"tcp:127.0.0.1:{found[0]['port']}"

        return until(f"{self.name} listens", address)


PERIOD = re.compile(r"P (\d+) visits (\d+) maxgap_us \d+ bad (\d+) h:( \d+:\d+)*")


class GuestLog:
    """What a guest printed, on one machine or on two, one after the other."""

    def __init__(self, text):
        # The last line may not have ended yet. What comes before the guest's own first line is firmware's.
        lines = text.split("\n")[:-1]
        start = next((at for at, line in enumerate(lines) if line.startswith(("R ready ", "E ", "X "))), len(lines))
        self.periods, self.bad, self.visits = 0, 0, 0
        for line in lines[start:]:
            self.take(line.rstrip("\r"))

    def take(self, line):
        if line.startswith("R ready "):
            return
        found = PERIOD.fullmatch(line)
        if not found:
            raise Failure(f"the guest says: {line}")
        period, visits, self.bad = (int(number) for number in found.groups()[:3])
        if period != self.periods:
            raise Failure(f"the guest's period {self.periods} is missing; this came instead: {line}")
        if self.bad:
            raise Failure(f"the guest found memory that it had not written: {line}")
        self.periods += 1
        self.visits += visits
