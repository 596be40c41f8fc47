#!/usr/bin/env python3
"""What restoring a guest costs it: all of memory first, lazily, and lazily with a working set.

    benches/lazy_restore.py BINARY GUEST FOLDER [MEMORY [APPEND [cold]]]

BINARY is a release build of `switchover`, GUEST the ELF file of a built-in guest, FOLDER has room for the image. The guest is booted,
saved, and restored from the warm page cache (with `cold`, from the disk), in turn: without --lazy; with --lazy --no-working-set; with --lazy and no working set yet,
which records one; with --lazy and what was recorded, three times, each adding to it. All times are CLOCK_MONOTONIC of this host: from
just before the process is started to the first entry of a vCPU (as the machine reports it), and from that entry to the end of the
first of two periods in a row, as they are read from the guest's serial port, whose visits come to 75 % of what they were before.
"""
import atexit, json, os, socket, subprocess, sys, threading, time

PERIOD_MS = 20


class Machine:
    def __init__(self, binary, folder, arguments):
        self.qmp_path = os.path.join(folder, "qmp")
        self.started = time.monotonic_ns()
        self.process = subprocess.Popen([binary, "run", "--serial", "stdio", "--qmp", "unix:" + self.qmp_path] + arguments,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        atexit.register(self.process.kill)
        self.lines = []
        threading.Thread(target=self.read, daemon=True).start()
        self.socket = socket.socket(socket.AF_UNIX)
        while self.socket.connect_ex(self.qmp_path) != 0:
            assert self.process.poll() is None, "it has ended"
            time.sleep(0.005)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.execute("qmp_capabilities")

    def read(self):
        for line in self.process.stdout:
            if line.startswith(b"P ") and b" h:" in line:
                words = line.split()
                assert words[words.index(b"bad") + 1] == b"0", line
                self.lines.append((time.monotonic_ns(), int(words[3])))

    def execute(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def completed(self):
        while True:
            look = self.execute("query-migrate")
            assert look.get("status") != "failed", look
            if look.get("status") == "completed":
                return
            time.sleep(0.02)

    def quit(self):
        self.execute("quit")
        assert self.process.wait() == 0


def median(values):
    return sorted(values)[len(values) // 2]


def main():
    binary, guest, folder = sys.argv[1:4]
    memory = sys.argv[4] if len(sys.argv) > 4 else "8G"
    append = sys.argv[5] if len(sys.argv) > 5 else "ws=4G"
    cold = sys.argv[6:] == ["cold"]
    image = os.path.join(folder, "lazy.image")
    here = Machine(binary, folder, ["--kernel", guest, "--append", f"{append} period={PERIOD_MS}", "--memory", memory])
    while len(here.lines) < 150:
        time.sleep(0.1)
    steady = median([visits for _, visits in here.lines[-100:]])
    here.execute("migrate", uri="file:" + image)
    here.completed()
    here.quit()
    if os.path.exists(image + ".working-set"):
        os.remove(image + ".working-set")
    with open(image, "rb") as file:
        while file.read(1 << 24):
            pass
    print(f"{memory}, {append}: {steady} visits in {PERIOD_MS} ms before, image {os.stat(image).st_blocks * 512 >> 20} MiB"
          f"{', not in the page cache' if cold else ''}")
    lazily = ["--lazy"]
    ways = [("whole", []), ("lazy, alone", ["--lazy", "--no-working-set"]), ("lazy, records", lazily)]
    ways += [("lazy, recorded", lazily)] * 3
    print(f"{'':16}{'first instruction':>20}{'faults':>9}{'remote':>9}{'back at rate':>14}{'all here':>10}{'set':>10}")
    for name, arguments in ways:
        if cold:
            with open(image, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        there = Machine(binary, folder, ["--restore", image, "--memory", memory] + arguments)
        there.completed()
        report = there.execute("x-switchover-report")
        first = report["instants"].get("first_entry_ns") or report["instants"]["commit_ns"]
        ended = max(phase["end_ns"] or 0 for phase in report["phases"] if phase["name"] != "keep-working-set")
        fast = 0
        back = None
        for at in range(30_000 // PERIOD_MS):
            while len(there.lines) <= at and there.process.poll() is None:
                time.sleep(0.01)
            when, visits = there.lines[at]
            fast = fast + 1 if visits >= steady * 0.75 else 0
            if fast == 2:
                back = there.lines[at - 1][0] - first
                break
        faults = report.get("faults") or {}
        total = sum(faults.get(kind, 0) for kind in ("remote", "raced", "joined", "local"))
        there.quit()
        kept = image + ".working-set"
        pages = (os.stat(kept).st_size - 80) // 20 if os.path.exists(kept) else 0
        last = report["instants"].get("last_page_ns") or first
        print(f"{name:16}{(first - there.started) / 1e6:17.1f} ms{total:9}{faults.get('remote', 0):9}"
              f"{(back or 0) / 1e6:11.0f} ms{(last - there.started) / 1e6:7.0f} ms{pages:10}", flush=True)
    os.remove(image)
    if os.path.exists(image + ".working-set"):
        os.remove(image + ".working-set")


main()
