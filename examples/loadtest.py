#!/usr/bin/env python3
"""Measures a gaffer server, and what people would use in its place, with the standard library alone.

    python3 examples/loadtest.py                                  all of it, at moderate sizes, on a server of its own
    python3 examples/loadtest.py --throughput --against socat --rounds 5
    python3 examples/loadtest.py --fan-out 1000 --endpoint http://127.0.0.1:5000

The load is made on the machine that runs this program. Where the server runs there too, the two share its cores: the last
column of a fan-out tells what the clients themselves took. A figure that was limited by them is marked as such.

It goes from top to bottom: the programs that gaffer runs here, the machine, gaffer over HTTP, one section for each kind of
measurement together with its yardsticks, the one table of them all, and the command line.
"""
import argparse
import array
import base64
import collections
import contextlib
import functools
import http.client
import itertools
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse

GAFFER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "gaffer.py")
WAIT = 30.0                         # nothing takes so many seconds unless it is broken
BUFFER = 1024 * 1024                # one read of a client
BLOCK, LINE = 65536, 64             # what the writer of --throughput writes at once, and the length of its lines
STAMPED = 100                       # the length of a line of --fan-out
SAMPLES = 20                        # clients of a fan-out whose lines are read one by one,
SAMPLED_LINES = 100000              # fewer where that were more lines a second than Python can read on the side
BATCH = 100                         # clients that connect at once
PORTS = 10000                       # connections from one source address: closed ones keep their port for a minute
TICK = 0.1                          # between two looks at the server's memory
RESTARTS = 30
RATIO = "gaffer/this"

# --------------------------------------------------------------------------------------------------------------------
# children: what gaffer and the others run. They write when a line has come in, and end with their input; one that ended
# before would be started again.
# --------------------------------------------------------------------------------------------------------------------
BLOCKS = """import os, sys
block = (b"x" * 63 + b"\\n") * 1024
sys.stdin.readline()
for _ in range(int(sys.argv[1])):
    os.write(1, block)
sys.stdin.read()
"""
STAMPS = """import os, sys, time
rate, lines, rest = float(sys.argv[1]), int(sys.argv[2]), b"x" * 69
sys.stdin.readline()
begin = time.monotonic()
for number in range(lines):
    ahead = begin + number / rate - time.monotonic()
    if ahead > 0:
        time.sleep(ahead)
    os.write(1, b"%010d %018d %s\\n" % (number, time.monotonic_ns(), rest))
sys.stdin.read()
"""
WHERE = """import os, sys
print(os.getppid(), open("/proc/sys/kernel/random/boot_id").read().strip(), os.readlink("/proc/self/ns/pid"), flush=True)
sys.stdin.read()
"""
FIREHOSE = """import os, sys
while True:
    os.write(1, (b"x" * 63 + b"\\n") * 1024)
"""
DRAIN = """import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.sendall(sys.argv[3].encode("latin-1"))
print("http://127.0.0.1:0", flush=True)
buffer = bytearray(1 << 20)
while sock.recv_into(buffer):
    pass
"""
# yardsticks that are written here, as one would by hand
BROADCASTER = """import asyncio, sys
clients = set()
async def serve(reader, writer):
    writer.write(b"\\r\\n\\r\\n")
    clients.add(writer)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    child = await asyncio.create_subprocess_exec(*sys.argv[1:], stdout=asyncio.subprocess.PIPE)
    print("http://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    while True:
        data = await child.stdout.read(65536)
        if not data:
            break
        for writer in clients:
            writer.write(data)
asyncio.run(main())
"""
RELAY = """import os, socket, subprocess
listener = socket.create_server(("127.0.0.1", 0))
print("http://127.0.0.1:%d" % listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
into, out = cat.stdin.fileno(), cat.stdout.fileno()
while True:
    data = sock.recv(65536)
    if not data:
        break
    os.write(into, data)
    sock.sendall(os.read(out, 65536))
cat.kill()
"""


class Failed(Exception):
    """A measurement cannot be made; `str(error)` is the sentence for the user."""


class Missing(Failed):
    """A yardstick is not installed: no fault of anybody."""


# --------------------------------------------------------------------------------------------------------------------
# the machine
# --------------------------------------------------------------------------------------------------------------------
def read_text(path):
    """A file's text; "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def machine():
    """What the figures depend on."""
    model = re.search(r"^model name\s*: (.*)$", read_text("/proc/cpuinfo"), re.M)
    return {"cpus": os.cpu_count(), "cpu": model.group(1) if model else platform.processor() or platform.machine(),
            "system": "%s %s" % (platform.system(), platform.release()),
            "python": "%s %s" % (platform.python_implementation(), platform.python_version())}


def cpu_seconds(pid):
    """CPU time that a process has used, its ended threads too; NaN where only itself could tell."""
    if pid is None or not sys.platform.startswith("linux"):
        return math.nan
    return time.clock_gettime(~pid << 3 | 2)    # what clock_getcpuclockid(3) makes of a pid


def memory(pid):
    """Resident MiB of a process; NaN where that is not known."""
    match = re.search(r"^VmRSS:\s*(\d+) kB", read_text("/proc/%s/status" % pid), re.M)
    return int(match.group(1)) / 1024 if match else math.nan


def until(condition, what):
    """Wait for something that nothing announces. Returns what was true."""
    deadline = time.monotonic() + WAIT
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise Failed("%s: not within %d seconds" % (what, WAIT))
        time.sleep(0.001)


def find(program):
    """The path of a yardstick."""
    path = shutil.which(program)
    if path is None:
        raise Missing("%s is not installed" % program)
    return path


def python(code, *arguments):
    """A command that runs Python code without the start-up cost of site."""
    return [sys.executable, "-I", "-S", "-u", "-c", code, *map(str, arguments)]


@contextlib.contextmanager
def running(*command, **options):
    """A program of our own, with pipes to stdin and stdout. It is in a session of its own, so that Ctrl-C is ours; ended by its pid."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONDEVMODE", "PYTHONWARNINGS", "PYTHONTRACEMALLOC")}
    env.update(options.pop("env", {}))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True, **options)
    try:
        yield process
    finally:
        process.stdin.close()
        process.terminate()
        try:
            process.wait(WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def listening(process):
    """(host, port) of a program's first line, which ends with its URL."""
    line = process.stdout.readline().decode()
    match = re.search(r"http://([^/:]+):(\d+)\s*\Z", line)
    if match is None:
        raise Failed("the server did not start: it printed %r" % line)
    return match.group(1), int(match.group(2))


# --------------------------------------------------------------------------------------------------------------------
# gaffer over HTTP
# --------------------------------------------------------------------------------------------------------------------
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
           "Sec-WebSocket-Key: " + base64.b64encode(b"a load generator").decode())


def read_head(sock):
    """Read a response's head, and not a byte of what follows. Returns it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        seen = sock.recv(4096, socket.MSG_PEEK)
        if not seen:
            raise Failed("the server closed a connection before it answered")
        end = (head + seen).find(b"\r\n\r\n")
        head += sock.recv(len(seen) if end < 0 else end + 4 - len(head))
    return head


def connect(address, request=b"", source=None):
    """A blocking socket with its request sent; it waits WAIT seconds in the kernel, which costs nothing a call."""
    sock = socket.create_connection(address, WAIT, source)
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(WAIT), 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(request)
    return sock


class Gaffer:
    """A gaffer server: the one at options.endpoint, else one that lives as long as the `with`. `pid`: its OS pid, where it
    is on this machine."""

    def __init__(self, options):
        self._options, self._stack = options, contextlib.ExitStack()
        self._headers = {"Authorization": "Bearer " + options.token} if options.token else {}
        self.address = self.pid = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            if self._options.endpoint:
                self.address = self._options.endpoint
                self.pid = self._find_pid()
            else:
                env = {"GAFFER_TOKEN": self._options.token} if self._options.token else {}
                command = sys.executable, self._options.gaffer, "serve", "--bind", "127.0.0.1:0"
                process = stack.enter_context(running(*command, env=env))
                self.address, self.pid = listening(process), process.pid
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _find_pid(self):
        """A child says whose child it is; where it is not in our own pid namespace, that is no use."""
        with self.template(python(WHERE), redirect_input=True) as (name, _):
            said = self.request("GET", "/streams/%s/stdout?since=0&timeout=5" % name).split()
        here = [read_text("/proc/sys/kernel/random/boot_id").strip()]
        here += [os.readlink("/proc/self/ns/pid")] if os.path.exists("/proc/self/ns/pid") else []
        return int(said[0]) if [word.decode() for word in said[1:]] == here else None

    def request(self, method, path, body=None):
        """The answer's body, as bytes. A dict is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT)
        try:
            connection.request(method, path, data, self._headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Failed("no gaffer answers at http://%s:%d (%s); start one: python3 gaffer.py serve" % (
                *self.address, error)) from None
        finally:
            connection.close()
        if answer.status >= 300:
            raise Failed("%s %s: %d %s" % (method, path, answer.status, data.decode("utf-8", "replace").strip()))
        return data

    def json(self, method, path, body=None):
        """The answer's value."""
        return json.loads(self.request(method, path, body))

    @contextlib.contextmanager
    def template(self, command, **fields):
        """A template that runs `command`, deleted at the end: (name, seconds that POST took)."""
        name = "loadtest:%d.%d" % (os.getpid(), next(self._options.numbers))
        begin = time.perf_counter()
        try:
            self.request("POST", "/processes", dict(fields, name=name, cmd=command[0], args=command[1:]))
            yield name, time.perf_counter() - begin
        finally:
            with contextlib.suppress(Failed):   # it may be there even where we were interrupted before the answer
                self.request("DELETE", "/processes/" + name)

    def pid_of(self, name):
        """gaffer's own number of a template's first process."""
        return self.json("GET", "/processes/%s/_pids" % name)["pids"][0]

    def head(self, path, *headers, version="1.1"):
        """A request's head as bytes."""
        lines = ["GET %s HTTP/%s" % (path, version), "Host: %s:%d" % self.address]
        lines += ["%s: %s" % item for item in self._headers.items()]
        return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1")

    @contextlib.contextmanager
    def stream(self, path, *headers, version="1.1"):
        """A socket that the body of a GET comes out of."""
        with contextlib.closing(connect(self.address, self.head(path, *headers, version=version))) as sock:
            head = read_head(sock)
            if head.split()[1] not in (b"200", b"101"):
                raise Failed("GET %s: %s" % (path, head.partition(b"\r\n")[0].decode("latin-1")))
            yield sock

    @contextlib.contextmanager
    def waiting(self, command):
        """A process that waits for a line on its stdin: (its pid, a function that sends it)."""
        with self.template(command, redirect_input=True) as (name, _):
            pid = self.pid_of(name)
            yield pid, lambda: self.request("POST", "/streams/%d/stdin" % pid, b"go\n")


def sse_size(lines, size, epoch):
    """Bytes of an event stream of so many lines, each `size` long with its end: as many ids as lines, of growing length."""
    digits = sum(max(0, lines - (10 ** power - 1) // size) for power in range(20) if 10 ** power <= lines * size)
    return lines * (len("id: @%s\nevent: stdout\ndata: \n" % epoch) + size) + digits


def epoch_of(server):
    """The word that is new in each run of gaffer and stands in each id."""
    return server.json("GET", "/watch?since=0")["id"].partition("@")[2]


# --------------------------------------------------------------------------------------------------------------------
# --throughput: one child to one client
# --------------------------------------------------------------------------------------------------------------------
Stream = collections.namedtuple("Stream", "sock go pid parse total last")


def chunk_header(data):
    """(length of a chunk's header, and of its payload); (0, 0): more is needed. The end of the chunk before belongs to it."""
    match = re.match(rb"(?:\r\n)?([0-9a-f]+)\r\n", data)
    return (match.end(), int(match.group(1), 16)) if match else (0, 0)


def frame_header(data):
    """The same of a websocket frame (RFC 6455 section 5.2)."""
    kind = data[1] if len(data) > 1 else 0
    form, length = {126: (">xxH", 4), 127: (">xxQ", 10)}.get(kind, (">xB", 2))
    return (length, struct.unpack_from(form, data)[0]) if len(data) >= length else (0, 0)


class Payload:
    """Counts the payload of what is fed in, from header to header; `tail`: the last bytes, with headers."""

    def __init__(self, parse=None):
        self._parse, self._left, self._part = parse, 0 if parse else math.inf, b""
        self.count, self.tail = 0, b""

    def feed(self, view):
        """Take a memoryview."""
        self.tail = (self.tail + bytes(view[-256:]))[-256:]
        if self._part:                          # a header that came in two
            view, self._part = memoryview(self._part + bytes(view)), b""
        place = 0
        while place < len(view):
            step = min(self._left, len(view) - place)
            place, self.count, self._left = place + step, self.count + step, self._left - step
            if self._left == 0 and place < len(view):
                header, self._left = self._parse(bytes(view[place:place + 20]))
                if not header:
                    self._part = bytes(view[place:])
                    return
                place += header


def drain(sock, payload, total):
    """Read until `payload` has counted `total` bytes, or nothing comes any more."""
    view = memoryview(bytearray(BUFFER))
    with contextlib.suppress(BlockingIOError):  # nothing for WAIT seconds
        while payload.count < total:
            size = sock.recv_into(view)
            if not size:
                break
            payload.feed(view[:size])


def throughput(options, source, share=1):
    """`source(options, blocks)` is a context manager with a Stream. `share`: of the megabytes, for who is much slower."""
    blocks = max(1, round(options.megabytes * 1000000 * share / BLOCK))
    with source(options, blocks) as stream:
        payload, cpu, begin = Payload(stream.parse), cpu_seconds(stream.pid), time.perf_counter()
        stream.go()
        drain(stream.sock, payload, stream.total)
        seconds, cpu = time.perf_counter() - begin, cpu_seconds(stream.pid) - cpu
    wrong = stream.last not in payload.tail     # the id of the last line
    size = blocks * BLOCK / 1e6
    return {"MB/s": size / seconds, "lost bytes": max(abs(stream.total - payload.count), wrong), "CPU ms/MB": cpu / size * 1000}


@contextlib.contextmanager
def gaffer_stream(form, options, blocks):
    """The output of a process: continuous, by websocket or as SSE. `loss=block`: the process waits for us, nothing is lost."""
    with Gaffer(options) as server, server.waiting(python(BLOCKS, blocks)) as (pid, go):
        size = blocks * BLOCK
        path, headers, parse, total, last = {
            "continuous": ("/streams/%d/stdout?feed=continuous&loss=block", (), chunk_header, size, b""),
            "websocket": ("/wstreams/%d?type=binary&readonly=true&loss=block", UPGRADE, frame_header, size, b""),
            "SSE": ("/streams/%d/stdout?feed=eventsource&loss=block", (), None, sse_size(size // LINE, LINE, epoch_of(server)),
                    b"id: %d@" % size),
        }[form]
        with server.stream(path % pid, *headers) as sock:
            yield Stream(sock, go, server.pid, parse, total, last)


def say_go(process):
    """Let a child start that has inherited the stdin of a yardstick."""
    process.stdin.write(b"go\n")
    process.stdin.flush()


@contextlib.contextmanager
def socat_stream(options, blocks):
    """`socat -u` from the child's pipe to our socket. The command travels in a variable, away from socat's own quoting."""
    run = "exec " + " ".join("'%s'" % word.replace("'", "'\\''") for word in python(BLOCKS, blocks))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(WAIT)
        command = find("socat"), "-u", "-b", str(BLOCK), 'SYSTEM:eval \\"$RUN\\"', "TCP:127.0.0.1:%d" % listener.getsockname()[1]
        with running(*command, env={"RUN": run}) as process, contextlib.closing(listener.accept()[0]) as sock:
            sock.settimeout(None)
            yield Stream(sock, lambda: say_go(process), process.pid, None, blocks * BLOCK, b"")


@contextlib.contextmanager
def websocketd(command, *flags):
    """(websocket to a child of websocketd, websocketd's pid). It takes no port 0, and does not say when it listens."""
    program = find("websocketd")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = listener.getsockname()
    with running(program, "--address=%s" % address[0], "--port=%d" % address[1], *flags, *command, stderr=subprocess.DEVNULL) as process:
        def attempt():
            with contextlib.suppress(ConnectionError):
                return connect(address, "\r\n".join(["GET / HTTP/1.1", "Host: localhost", *UPGRADE, "", ""]).encode())
        with contextlib.closing(until(attempt, "websocketd listens")) as sock:
            read_head(sock)
            yield sock, process.pid


@contextlib.contextmanager
def websocketd_stream(text, options, blocks):
    """Binary as it comes, or text: a message a line without its end, in frames of 2 bytes more."""
    size = blocks * BLOCK
    with websocketd(python(BLOCKS, blocks), *([] if text else ["--binary"])) as (sock, pid):
        yield Stream(sock, lambda: sock.sendall(masked(b"go" if text else b"go\n")), pid, None if text else frame_header,
                     size // LINE * (LINE + 1) if text else size, b"")


def masked(payload, key=b"\x01\x02\x03\x04"):
    """A short text message from a client (RFC 6455 section 5.3)."""
    return bytes([0x81, 0x80 | len(payload)]) + key + bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))


# --------------------------------------------------------------------------------------------------------------------
# --fan-out: one writer to many clients, all held by this process. Of most of them the bytes are only counted, and where
# the kernel can throw them away they are not even copied; some, spread over the order of connection, are read line by line.
# --------------------------------------------------------------------------------------------------------------------
Audience = collections.namedtuple("Audience", "address request go pid end total")


class Sample:
    """A client whose lines are read: latency of each in nanoseconds, and whether each came once and in order."""

    def __init__(self, end):
        self._end, self._part, self._next = end, b"", 0
        self.latencies, self.disorder, self.dropped = array.array("q"), 0, 0
        self.first = self.last = 0

    def feed(self, data):
        """Take bytes that have just come. `end` is what ends a whole event, or a line where there are no events."""
        now = time.monotonic_ns()
        data = self._part + data
        cut = data.rfind(self._end) + len(self._end) if self._end in data else 0
        data, self._part = data[:cut], data[cut:]
        found = re.findall(rb"(\d{10}) (\d{18}) x{69}\n", data)
        if not found:
            return
        numbers, stamps = [int(number) for number, _ in found], [int(stamp) for _, stamp in found]
        if numbers != list(range(self._next, self._next + len(numbers))):
            self.disorder += 1
        self.dropped += sum(map(int, re.findall(rb'event: dropped\ndata: \{"bytes": (\d+)', data)))
        self._next = numbers[-1] + 1
        self.first, self.last = self.first or stamps[0], stamps[-1]
        self.latencies.extend([now - stamp for stamp in stamps])


class Crowd:
    """So many connected clients; close() ends them."""

    def __init__(self, options, audience, clients):
        self._options, self._audience = options, audience
        self._poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._tick = TICK if hasattr(select, "epoll") else TICK * 1000
        self._socks, self.counts, self.samples = {}, {}, {}
        self.peak, self._buffer = 0.0, bytearray(BUFFER)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for first in range(0, clients, BATCH):
                self._options.say("%d of %d clients" % (first, clients))
                self._connect(min(BATCH, clients - first))
            self._choose(clients)
            stack.pop_all()

    def _connect(self, number):
        """Some at once; their heads are read when all have asked."""
        made = []
        for _ in range(number):
            host, part = self._audience.address[0], next(self._options.numbers) // PORTS % 250
            source = ("127.0.0.%d" % (1 + part), 0) if host == "127.0.0.1" and sys.platform.startswith("linux") else None
            sock = connect(self._audience.address, self._audience.request, source)
            self._socks[sock.fileno()] = sock
            self.counts[sock.fileno()] = 0
            made.append(sock)
        for sock in made:
            try:
                read_head(sock)
            except OSError:
                raise Failed("only some %d clients were let in: the limit of open files (ulimit -n)?" % len(self._socks)) from None
            sock.setblocking(False)
            self._poller.register(sock.fileno(), select.POLLIN)

    def _choose(self, clients):
        number = min(clients, max(2, min(SAMPLES, SAMPLED_LINES // self._options.lines)))
        socks = list(self._socks)
        self.samples = {socks[place * clients // number]: Sample(self._audience.end) for place in range(number)}

    def follow(self):
        """Read until all have got all, or nothing has come for a while."""
        total, pid, poll, heard = self._audience.total, self._audience.pid, self._poller.poll, time.monotonic()
        looked = heard
        while True:
            ready = poll(self._tick)
            now = time.monotonic()
            if ready:
                heard = now
                self._read(ready)
            if now - looked >= TICK:
                looked, self.peak = now, max(self.peak, memory(pid))
                least = min(self.counts.values())
                self._options.say("%d clients: %d %%" % (len(self.counts), 100 * least // total))
                if least >= total or now - heard > WAIT / 6:
                    return

    def _read(self, ready):
        """The hot loop: one call for each client that has something."""
        samples, socks, counts, buffer = self.samples, self._socks, self.counts, self._buffer
        flags = socket.MSG_TRUNC if sys.platform.startswith("linux") else 0
        for fd, _ in ready:
            try:
                if fd in samples:
                    data = socks[fd].recv(BUFFER)
                    samples[fd].feed(data)
                    size = len(data)
                else:
                    size = socks[fd].recv_into(buffer, BUFFER, flags)
            except ConnectionError:
                size = 0
            counts[fd] += size
            if not size:
                self._poller.unregister(fd)

    def close(self):
        """Leave."""
        for sock in self._socks.values():
            sock.close()
        if hasattr(self._poller, "close"):
            self._poller.close()


def percentile(values, part):
    """The value below which `part` of them lie; NaN where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else math.nan


def fan_out(options, source, clients):
    """`source(options, lines)` is a context manager with an Audience."""
    lines = max(1, round(options.lines * options.seconds))
    with source(options, lines) as audience:
        before = memory(audience.pid)
        with contextlib.closing(Crowd(options, audience, clients)) as crowd:
            idle = crowd.peak = memory(audience.pid)
            cpu, own, begin = cpu_seconds(audience.pid), time.process_time(), time.perf_counter()
            audience.go()
            crowd.follow()
            cpu, own, seconds = cpu_seconds(audience.pid) - cpu, time.process_time() - own, time.perf_counter() - begin
        return judge(options, audience, crowd, lines, {"cpu": cpu, "own": own / seconds, "before": before, "idle": idle})


def judge(options, audience, crowd, lines, seen):
    """The figures of a fan-out. A client with other bytes than were due has lost, or got twice, so many lines at least."""
    event = audience.total / lines
    lost = sum(math.ceil(abs(audience.total - count) / event) for count in crowd.counts.values())
    samples = crowd.samples.values()
    lost += sum(sample.disorder for sample in samples)
    latencies = sorted(itertools.chain.from_iterable(sample.latencies for sample in samples))
    rate = (lines - 1) / max(1e-9, max((sample.last - sample.first for sample in samples), default=0) / 1e9)
    if lines > 1 and rate < 0.9 * options.lines:
        options.note("the writer was held back: %d lines/s instead of %d" % (rate, options.lines))
    if seen["own"] > 0.9:
        options.note("the clients took %d %% of a core: they may be the limit" % (100 * seen["own"]))
    deliveries = max(1, lines * len(crowd.counts) - lost)
    return {"deliveries": deliveries, "lost": lost, "dropped": sum(sample.dropped for sample in samples),
            "p50 ms": percentile(latencies, 0.5) / 1e6, "p99 ms": percentile(latencies, 0.99) / 1e6,
            "CPU s/M": seen["cpu"] / deliveries * 1e6, "MiB": seen["before"],
            "KiB/client": (seen["idle"] - seen["before"]) * 1024 / len(crowd.counts), "MiB peak": crowd.peak,
            "client CPU": seen["own"]}


@contextlib.contextmanager
def gaffer_audience(options, lines):
    """Server-Sent Events, an event a line."""
    with Gaffer(options) as server, server.waiting(python(STAMPS, options.lines, lines)) as (pid, go):
        yield Audience(server.address, server.head("/streams/%d/stdout?feed=eventsource" % pid), go, server.pid, b"\n\n",
                       sse_size(lines, STAMPED, epoch_of(server)))


@contextlib.contextmanager
def asyncio_audience(options, lines):
    """The bytes as they are, from the broadcaster above."""
    with running(*python(BROADCASTER, *python(STAMPS, options.lines, lines)), stderr=subprocess.DEVNULL) as process:
        yield Audience(listening(process), b"", lambda: say_go(process), process.pid, b"\n", lines * STAMPED)


# --------------------------------------------------------------------------------------------------------------------
# --echo: there and back through `cat`
# --------------------------------------------------------------------------------------------------------------------
def echo(options, source):
    """`source(options)` is a context manager with (socket, encode); encode(text) -> (what is sent, what has to come)."""
    times, wrong = array.array("d"), 0
    with source(options) as (sock, encode):
        for number in range(options.messages + 100):        # the first hundred warm up
            out, due = encode(b"%031d" % number)
            begin = time.perf_counter()
            sock.sendall(out)
            data = sock.recv(4096)
            while data and len(data) < len(due):
                data += sock.recv(4096)
            times.append(time.perf_counter() - begin)
            wrong += data != due
            if not data:
                break
    times = times[100:]
    return {"messages": len(times), "lost": wrong + options.messages - len(times), "p50 µs": percentile(times, 0.5) * 1e6,
            "p99 µs": percentile(times, 0.99) * 1e6}


def text_frame(payload):
    """A short text message from a server."""
    return bytes([0x81, len(payload)]) + payload


@contextlib.contextmanager
def gaffer_echo(options):
    """A websocket to a process whose stdin is a pipe."""
    with Gaffer(options) as server, server.template(["cat"], redirect_input=True) as (name, _):
        with server.stream("/wstreams/%d" % server.pid_of(name), *UPGRADE) as sock:
            yield sock, lambda text: (masked(text + b"\n"), text_frame(text + b"\n"))


@contextlib.contextmanager
def websocketd_echo(options):
    """The same of websocketd, which adds and removes the end of the line."""
    with websocketd(["cat"]) as (sock, _):
        yield sock, lambda text: (masked(text), text_frame(text))


@contextlib.contextmanager
def relay_echo(options):
    """No protocol at all: what a machine can do with two pipes and a socket."""
    with running(*python(RELAY)) as process, contextlib.closing(connect(listening(process))) as sock:
        yield sock, lambda text: (text + b"\n", text + b"\n")


# --------------------------------------------------------------------------------------------------------------------
# --api: requests on connections that are kept
# --------------------------------------------------------------------------------------------------------------------
def whole(data):
    """True where a response is complete."""
    end, place = data.find(b"\r\n\r\n"), data.find(b"Content-Length: ")
    return end >= 0 and len(data) >= end + 4 + int(data[place + 16:data.find(b"\r\n", place)])


def ask(socks, request, seconds):
    """(times in seconds, failures): each connection asks again as soon as it has its answer."""
    by_fd = {sock.fileno(): sock for sock in socks}
    poller = select.poll()
    for fd in by_fd:
        poller.register(fd, select.POLLIN)
    alone = [(fd, select.POLLIN) for fd in by_fd]           # the only one may as well wait in recv()
    poll = (lambda: alone) if len(socks) == 1 else poller.poll
    times, parts, wrong, clock = array.array("d"), collections.defaultdict(bytes), 0, time.perf_counter
    end, begun = clock() + seconds, {}
    for fd, sock in by_fd.items():
        begun[fd] = clock()
        sock.sendall(request)
    while clock() < end:
        for fd, _ in poll():
            data = parts.pop(fd, b"") + by_fd[fd].recv(65536)
            if not data:
                raise Failed("the server closed a connection")
            if not whole(data):
                parts[fd] = data
                continue
            wrong += not data.startswith(b"HTTP/1.1 200 ")
            now = clock()
            times.append(now - begun[fd])
            begun[fd] = now
            by_fd[fd].sendall(request)
    return times, wrong


@contextlib.contextmanager
def firehose(server, wanted):
    """One process that writes as fast as it can, to one client; a process of its own, or its reading would spoil our times."""
    if not wanted:
        yield
        return
    with server.template(python(FIREHOSE)) as (name, _):
        head = server.head("/streams/%d/stdout?feed=continuous&loss=block" % server.pid_of(name))
        with running(*python(DRAIN, *server.address, head.decode("latin-1"))) as process:
            listening(process)
            yield


def api(options, connections, busy=False):
    """GET /status/<name>."""
    with Gaffer(options) as server, server.template(["sleep", "1000"]) as (name, _), contextlib.ExitStack() as stack:
        stack.enter_context(firehose(server, busy))
        socks = [stack.enter_context(contextlib.closing(connect(server.address))) for _ in range(connections)]
        cpu, begin = cpu_seconds(server.pid), time.perf_counter()
        times, wrong = ask(socks, server.head("/status/" + name), options.seconds)
        seconds, cpu = time.perf_counter() - begin, cpu_seconds(server.pid) - cpu
    return {"requests/s": len(times) / seconds, "failed": wrong, "p50 ms": percentile(times, 0.5) * 1000,
            "p99 ms": percentile(times, 0.99) * 1000, "server CPU": cpu / seconds}


# --------------------------------------------------------------------------------------------------------------------
# the command line
# --------------------------------------------------------------------------------------------------------------------
Case = collections.namedtuple("Case", "measure name key systems")


def plan(options):
    """[Case]: what was asked for, and who can be measured with it."""
    cases = []
    if options.throughput:
        for form, others in (("continuous", {"socat": (socat_stream,), "websocketd": (functools.partial(websocketd_stream, False),)}),
                             ("websocket", {"socat": (socat_stream,), "websocketd": (functools.partial(websocketd_stream, False),)}),
                             ("SSE", {"websocketd": (functools.partial(websocketd_stream, True), 0.1)})):
            systems = dict({"gaffer": (functools.partial(gaffer_stream, form),)}, **others)
            cases.append(Case("throughput", form, "MB/s", {
                name: functools.partial(throughput, options, *how) for name, how in systems.items()}))
    if options.fan_out:
        cases.append(Case("fan-out", "%d clients" % options.fan_out, "CPU s/M", {
            name: functools.partial(fan_out, options, source, options.fan_out)
            for name, source in (("gaffer", gaffer_audience), ("asyncio", asyncio_audience))}))
    if options.echo:
        cases.append(Case("echo", "through cat", "p50 µs", {
            name: functools.partial(echo, options, source)
            for name, source in (("gaffer", gaffer_echo), ("websocketd", websocketd_echo), ("relay", relay_echo))}))
    for connections in options.api or ():
        for busy in (False, True) if options.busy else (False,):
            cases.append(Case("api", "%d connections%s" % (connections, ", busy" if busy else ""), "requests/s", {
                "gaffer": functools.partial(api, options, connections, busy)}))
    return cases


def run_case(options, case):
    """[row], one for each system: rounds go A B A B, and the median of each figure counts."""
    names = ["gaffer"] + [name for name in options.against if name in case.systems]
    rounds = {name: [] for name in names}
    rows = []
    for number, name in itertools.product(range(options.rounds), names):
        options.prefix = "%s, %s: %s, round %d" % (case.measure, case.name, name, number + 1)
        options.say("")
        rounds[name].append(case.systems[name]())
    for name in names:
        figures = {key: statistics.median(row[key] for row in rounds[name]) for key in rounds[name][0]}
        rows.append({"measure": case.measure, "case": case.name, "system": name, "figures": figures})
        if name != "gaffer":
            rows[-1]["ratio"] = rows[0]["figures"][case.key] / figures[case.key]
    return rows


def cell(value):
    """A figure in a table."""
    if value is None or value != value:
        return "-"
    if value == int(value):
        return "{:,d}".format(int(value))
    return "{:,.1f}".format(value) if abs(value) >= 100 else "%.3g" % value


def print_table(rows):
    """The rows of one measurement, in columns."""
    keys = list(rows[0]["figures"])
    ratio = ["gaffer/this"] if any("ratio" in row for row in rows) else []
    lines = [[rows[0]["measure"], "", *keys, *ratio]]
    for row in rows:
        lines.append([row["case"], row["system"], *(cell(row["figures"][key]) for key in keys),
                      *([cell(row.get("ratio"))] if ratio else [])])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) if place < 2 else text.rjust(width)
                        for place, (text, width) in enumerate(zip(line, widths))).rstrip())
    print()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--fan-out", type=int)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--echo", action="store_true")
    parser.add_argument("--messages", type=int, default=5000)
    parser.add_argument("--api", type=int, nargs="*")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--against", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--endpoint")
    parser.add_argument("--gaffer", default=GAFFER)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.token = os.environ.get("GAFFER_TOKEN")
    options.numbers = itertools.count(1)
    if options.endpoint:
        parts = urllib.parse.urlsplit(options.endpoint)
        options.endpoint = parts.hostname, parts.port
    options.say = lambda text: None
    options.note = lambda text: print("  note: " + text)
    results = []
    for case in plan(options):
        rows = run_case(options, case)
        results += rows
        if not options.json:
            print_table(rows)
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}, ensure_ascii=False))


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit("loadtest: %s" % error)
