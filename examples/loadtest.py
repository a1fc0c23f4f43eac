#!/usr/bin/env python3
"""Measures a gaffer server, beside what people would use in its place; from the standard library alone.

    python3 examples/loadtest.py                                    everything, at moderate sizes, on a server of its own
    python3 examples/loadtest.py --throughput --against socat --rounds 5
    python3 examples/loadtest.py --fan-out 1000 --endpoint http://127.0.0.1:5000

The load is made by this program, which needs CPU time too, of the machine that it measures where the server runs on it. A
figure that this may have limited is marked.

From top to bottom: the programs that are run, the machine, gaffer over HTTP; then each kind of measurement with those it is
compared with; one table of them all; the command line. All that it makes on a server is named `loadtest:...`, and is
deleted at the end.
"""
import argparse
import array
import base64
import collections
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
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

GAFFER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "gaffer.py")
LINUX = sys.platform.startswith("linux")
WAIT = 30.0                         # nothing takes so many seconds unless it is broken
SILENCE = 5.0                       # and nothing more arrives after this
BUFFER = 1024 * 1024                # one read of a client
BLOCK, LINE = 65536, 64             # what the writer of --throughput writes at once, and the length of its lines
STAMPED = 100                       # the length of a line of --fan-out
SAMPLES = 20                        # clients of a fan-out whose lines are read one by one,
SAMPLED_LINES = 100000              # fewer where that were more lines a second than Python can read on the side
BATCH = 100                         # clients that connect at once
PORTS = 10000                       # connections from one source address: a closed one keeps its port for a minute
TICK = 0.1                          # seconds between two looks at the server's memory, or two lines of progress
FAULTS = ("lost", "lost bytes", "dropped bytes", "failed")      # figures that have to be 0

# --------------------------------------------------------------------------------------------------------------------
# children: what gaffer and the others run. Writers begin when a line has come in, and end with their input: a process that
# ends by itself would be started again.
# --------------------------------------------------------------------------------------------------------------------
QUIET = ("sleep", "1000")
SAY = ("sh", "-c", "echo; exec sleep 1000")
YES = ("yes", "x" * (LINE - 1))
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
boot = open("/proc/sys/kernel/random/boot_id").read().strip()
os.write(1, ("%d %s %s\\n" % (os.getppid(), boot, os.readlink("/proc/self/ns/pid"))).encode())
sys.stdin.read()
"""
DRAIN = """import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.sendall(sys.argv[3].encode("latin-1"))
buffer = bytearray(1 << 20)
while sock.recv_into(buffer):
    pass
"""

# --------------------------------------------------------------------------------------------------------------------
# yardsticks, as one would write them by hand; each prints its URL when it listens
# --------------------------------------------------------------------------------------------------------------------
BROADCASTER = """import asyncio, sys
clients = set()
async def serve(reader, writer):
    writer.write(b"\\r\\n\\r\\n")
    clients.add(writer)
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    child = await asyncio.create_subprocess_exec(*sys.argv[1:], stdout=asyncio.subprocess.PIPE)
    print("http://127.0.0.1:%d" % server.sockets[0].getsockname()[1])
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
print("http://127.0.0.1:%d" % listener.getsockname()[1])
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
HELLO = """import asyncio
from aiohttp import web
async def hello(request):
    return web.Response(text="Hello, world")
async def main():
    app = web.Application()
    app.add_routes([web.get("/", hello)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print("http://127.0.0.1:%d" % runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
SUPERVISORD = """[supervisord]
nodaemon=true
logfile=/dev/null
logfile_maxbytes=0
pidfile={folder}/pid
minfds=4096
[inet_http_server]
port=127.0.0.1:{port}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:quiet]
command=sleep 1000
numprocs={number}
process_name=%(process_num)d
autostart=false
startsecs=0
[program:say]
command=sh -c "echo > {folder}/fifo; exec sleep 1000"
autostart=false
startsecs=0
"""


class Failed(Exception):
    """A measurement cannot be made; `str(error)` is the sentence for the user."""


class Missing(Failed):
    """A yardstick is not installed, which is nobody's fault."""


# --------------------------------------------------------------------------------------------------------------------
# the machine, and programs on it
# --------------------------------------------------------------------------------------------------------------------
def read_text(path):
    """A file's text; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def machine():
    """What all figures depend on."""
    model = re.search(r"^model name\s*: (.*)$", read_text("/proc/cpuinfo"), re.M)
    return {"cpus": os.cpu_count(), "cpu": model.group(1) if model else platform.processor() or platform.machine(),
            "system": "%s %s" % (platform.system(), platform.release()),
            "python": "%s %s" % (platform.python_implementation(), platform.python_version())}


def memory(pid):
    """Resident MiB of a process; NaN where that is not known."""
    match = re.search(r"^VmRSS:\s*(\d+) kB", read_text("/proc/%s/status" % pid), re.M)
    return int(match.group(1)) / 1024 if match else math.nan


class Meter:
    """Measures what happens from here on, with the CPU time of a process (NaN where that is not known)."""

    def __init__(self, pid=None):
        # the clock is what clock_getcpuclockid(3) makes of a pid: it counts threads that have ended, too
        self._clock = ~pid << 3 | 2 if pid and LINUX else None
        self._begin = self._now()

    def _now(self):
        try:
            cpu = math.nan if self._clock is None else time.clock_gettime(self._clock)
        except OSError:
            raise Failed("the server has ended") from None
        return time.perf_counter(), cpu, time.process_time()

    def read(self):
        """[seconds, seconds of CPU time of that process, and of this one]."""
        return [now - begin for now, begin in zip(self._now(), self._begin)]


def spread(values, unit, scale):
    """Median and 99th percentile of `values`, in `unit`; NaN where there are none."""
    ordered = sorted(values) or [math.nan]
    return {"p50 " + unit: ordered[len(ordered) // 2] * scale, "p99 " + unit: ordered[len(ordered) * 99 // 100] * scale}


def until(condition, what):
    """Wait for something that nothing announces. Returns what was true."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.001)
    raise Failed("%s: not within %d seconds" % (what, WAIT))


def find(program):
    """The path of a yardstick."""
    path = shutil.which(program)
    if path is None:
        raise Missing("%s is not installed" % program)
    return path


def python(code, *arguments):
    """A command that runs Python code, without what it would import for a user."""
    return [sys.executable, "-I", "-S", "-u", "-c", code, *map(str, arguments)]


def clean_environment():
    """Ours without what makes Python slow."""
    slow = "PYTHONDEVMODE", "PYTHONWARNINGS", "PYTHONTRACEMALLOC", "PYTHONMALLOC", "PYTHONDONTWRITEBYTECODE"
    return {name: value for name, value in os.environ.items() if name not in slow}


@contextlib.contextmanager
def running(*command, **options):
    """A program with pipes to its stdin and stdout, ended by its pid. Its session is its own, so that Ctrl-C is ours."""
    env, pipe = dict(clean_environment(), **options.pop("env", {})), subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True, **options)
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
    """(host, port) of the first line of a program, which ends with its URL."""
    ready, _, _ = select.select([process.stdout], [], [], WAIT)
    line = process.stdout.readline().decode() if ready else ""
    match = re.search(r"http://([^/:]+):(\d+)\s*\Z", line)
    if match is None:
        raise Failed("a server did not start: it printed %r" % line)
    return match.group(1), int(match.group(2))


def free_port():
    """A port for a program that does not take port 0."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


def say_go(process):
    """Let a child begin that has inherited its parent's stdin."""
    process.stdin.write(b"go\n")
    process.stdin.flush()


def end(pid):
    """Kill a child of our own, and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# --------------------------------------------------------------------------------------------------------------------
# HTTP, as far as it is needed for speed; and gaffer's API
# --------------------------------------------------------------------------------------------------------------------
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
           "Sec-WebSocket-Key: " + base64.b64encode(b"a load generator").decode())


def connect(address, request=b"", source=None):
    """A socket with its request sent. It waits WAIT seconds in the kernel, where that costs nothing."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection(address, WAIT, source))
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(WAIT), 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(request)
        stack.pop_all()                         # all is well: it stays open
    return sock


def read_head(sock):
    """Read a response's head, and not a byte of what follows. Returns it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        seen = sock.recv(4096, socket.MSG_PEEK)
        if not seen:
            raise Failed("the server closed a connection before it answered")
        place = (head + seen).find(b"\r\n\r\n")
        head += sock.recv(len(seen) if place < 0 else place + 4 - len(head))
    return head


def masked(payload, key=b"\x01\x02\x03\x04"):
    """A short text message from a client (RFC 6455 section 5.3)."""
    return bytes([0x81, 0x80 | len(payload)]) + key + bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))


class Gaffer:
    """A gaffer server: the one at options.endpoint, or one that lives as long as the `with`. `address`: (host, port);
    `pid`: its OS pid, None where it is not on this machine."""

    def __init__(self, options):
        self._options, self._stack = options, contextlib.ExitStack()
        self._headers = {"Authorization": "Bearer " + options.token} if options.token else {}
        self.address, self.pid = options.endpoint, None

    def __enter__(self):
        if self.address:
            self.pid = self._find_pid()
        else:
            env = {"GAFFER_TOKEN": self._options.token} if self._options.token else {}
            command = sys.executable, self._options.gaffer, "serve", "--bind", "127.0.0.1:0"
            with contextlib.ExitStack() as stack:
                process = stack.enter_context(running(*command, env=env))
                self.address, self.pid = listening(process), process.pid
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _find_pid(self):
        """A child says whose child it is, and on which machine; a container may have its own pids."""
        if LINUX:
            with self.template(python(WHERE), redirect_input=True) as (name, _):
                said = self.request("GET", "/streams/%s/stdout?since=0&timeout=5" % name).decode().split()
            here = [read_text("/proc/sys/kernel/random/boot_id").strip(), os.readlink("/proc/self/ns/pid")]
            if said[1:] == here:
                return int(said[0])
        return None

    def request(self, method, path, body=None):
        """Ask for something; a dict is sent as JSON. Returns the answer's body as bytes. Failed."""
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
        """The same; returns the answer's value."""
        return json.loads(self.request(method, path, body))

    @contextlib.contextmanager
    def template(self, command, **fields):
        """A template that is deleted at the end: (its name, seconds that it took to add it)."""
        name, begin = "loadtest:%d.%d" % (os.getpid(), next(self._options.serial)), time.perf_counter()
        try:
            self.request("POST", "/processes", dict(fields, name=name, cmd=command[0], args=command[1:]))
            yield name, time.perf_counter() - begin
        finally:
            with contextlib.suppress(Failed):   # perhaps it was refused, and is not there
                self.request("DELETE", "/processes/" + name)

    def pid_of(self, name):
        """gaffer's own number of a template's first process."""
        return self.json("GET", "/processes/%s/_pids" % name)["pids"][0]

    @contextlib.contextmanager
    def waiting(self, command):
        """A process that waits for a line: (gaffer's number of it, a function that sends the line)."""
        with self.template(command, redirect_input=True) as (name, _):
            pid = self.pid_of(name)
            yield pid, lambda: self.request("POST", "/streams/%d/stdin" % pid, b"go\n")

    def head(self, path, *headers, version="1.1"):
        """The head of a GET, as bytes."""
        lines = ["GET %s HTTP/%s" % (path, version), "Host: %s:%d" % self.address]
        lines += ["%s: %s" % item for item in self._headers.items()]
        return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1")

    @contextlib.contextmanager
    def stream(self, path, *headers, version="1.1"):
        """A socket from which a stream comes, its head read."""
        with contextlib.closing(connect(self.address, self.head(path, *headers, version=version))) as sock:
            status = read_head(sock).split(b"\r\n")[0].decode("latin-1")
            if status.split()[1] not in ("200", "101"):
                raise Failed("GET %s: %s" % (path, status))
            yield sock

    def epoch(self):
        """The word that is new in each run of gaffer and stands in each id."""
        return self.json("GET", "/watch?since=0")["id"].partition("@")[2]


def sse_size(lines, size, epoch):
    """Bytes of an event stream of so many lines of `size` bytes: an empty line, all but the ids, and the digits of these."""
    digits = sum(lines - (10 ** power - 1) // size for power in range(20) if 10 ** power <= lines * size)
    return 1 + lines * (len("id: @%s\nevent: stdout\ndata: \n" % epoch) + size) + digits


# --------------------------------------------------------------------------------------------------------------------
# --throughput: one child to one client. A Stream is a socket from which `total` bytes of payload come after go(), which tell
# of `size` bytes that a child wrote; `parse` finds headers in it, `last` has to stand at its end.
# --------------------------------------------------------------------------------------------------------------------
Stream = collections.namedtuple("Stream", "sock go pid size total parse last")


def chunk_header(data):
    """(length of a chunk's header, of its payload); (0, 0): more is needed. The end of the chunk before is taken with it."""
    match = re.match(rb"(?:\r\n)?([0-9a-f]+)\r\n", data)
    return (match.end(), int(match.group(1), 16)) if match else (0, 0)


def frame_header(data):
    """The same of a websocket frame from a server (RFC 6455 section 5.2)."""
    form, length = {126: (">xxH", 4), 127: (">xxQ", 10)}.get(data[1] if len(data) > 1 else 0, (">xB", 2))
    return (length, struct.unpack_from(form, data)[0]) if len(data) >= length else (0, 0)


class Payload:
    """Counts payload, hopping from header to header (none: all is payload). `tail`: the last bytes that came."""

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
            if place < len(view):
                header, self._left = self._parse(bytes(view[place:place + 20]))
                if not header:
                    self._part = bytes(view[place:])
                    return
                place += header


def throughput(options, source):
    """`source(options, blocks)` is a context manager with a Stream."""
    view = memoryview(bytearray(BUFFER))
    with source(options, max(1, round(options.megabytes * 1e6 / BLOCK))) as stream:
        payload, size, meter = Payload(stream.parse), 1, Meter(stream.pid)
        stream.go()
        with contextlib.suppress(BlockingIOError):          # nothing came for WAIT seconds
            while payload.count < stream.total and size:
                size = stream.sock.recv_into(view)
                payload.feed(view[:size])
        seconds, cpu, _ = meter.read()
    lost = max(abs(stream.total - payload.count), int(stream.last not in payload.tail))
    return {"MB/s": stream.size / seconds / 1e6, "lost bytes": lost, "CPU ms/MB": cpu / stream.size * 1e9}


@contextlib.contextmanager
def gaffer_stream(form, options, blocks):
    """The output of a process. With `loss=block` it waits for its reader, and nothing is lost."""
    with Gaffer(options) as server, server.waiting(python(BLOCKS, blocks)) as (pid, go):
        size = blocks * BLOCK
        path, headers, total, parse, last = {
            "continuous": ("/streams/%d/stdout?feed=continuous&loss=block", (), size, chunk_header, b""),
            "websocket": ("/wstreams/%d?type=binary&readonly=true&loss=block", UPGRADE, size, frame_header, b""),
            "SSE": ("/streams/%d/stdout?feed=eventsource&loss=block", (), sse_size(size // LINE, LINE, server.epoch()),
                    chunk_header, b"id: %d@" % size),
        }[form]
        with server.stream(path % pid, *headers) as sock:
            yield Stream(sock, go, server.pid, size, total, parse, last)


@contextlib.contextmanager
def socat_stream(options, blocks):
    """`socat -u` from a child to our socket. The command travels in a variable, as socat has quotes of its own."""
    program, size = find("socat"), blocks * BLOCK
    run = "exec " + " ".join("'%s'" % word.replace("'", "'\\''") for word in python(BLOCKS, blocks))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(WAIT)
        command = program, "-u", "-b", str(BLOCK), r'SYSTEM:eval \"$RUN\"', "TCP:127.0.0.1:%d" % listener.getsockname()[1]
        with running(*command, env={"RUN": run}) as process, contextlib.closing(listener.accept()[0]) as sock:
            sock.settimeout(None)
            yield Stream(sock, lambda: say_go(process), process.pid, size, size, None, b"")


@contextlib.contextmanager
def websocketd(command, *flags):
    """(a websocket to a child of websocketd, websocketd's pid). It does not say when it listens."""
    address = "127.0.0.1", free_port()
    command = [find("websocketd"), "--address=%s" % address[0], "--port=%d" % address[1], *flags, *command]
    request = "\r\n".join(["GET / HTTP/1.1", "Host: localhost", *UPGRADE, "", ""]).encode()

    def attempt():
        with contextlib.suppress(ConnectionError):
            return connect(address, request)
    with running(*command, stderr=subprocess.DEVNULL) as process:
        with contextlib.closing(until(attempt, "websocketd listens")) as sock:
            read_head(sock)
            yield sock, process.pid


@contextlib.contextmanager
def websocketd_stream(text, options, blocks):
    """Binary messages, as the bytes come; or a text message a line, without its end, in frames of 2 bytes more, which is so
    slow that the child writes less."""
    size = (max(1, blocks // 10) if text else blocks) * BLOCK
    command, flags = python(BLOCKS, size // BLOCK), () if text else ("--binary",)
    with websocketd(command, *flags) as (sock, pid):
        total, parse, go = (size // LINE * (LINE + 1), None, b"go") if text else (size, frame_header, b"go\n")
        yield Stream(sock, lambda: sock.sendall(masked(go)), pid, size, total, parse, b"")


# --------------------------------------------------------------------------------------------------------------------
# --fan-out: one writer to many clients, which are all held by this process. Of most the bytes are only counted, and where
# the kernel can throw them away they are not even copied. Some, spread over the order of connection, are read line by line.
# An Audience says where they connect, with which request, and that `total` bytes come to each after go().
# --------------------------------------------------------------------------------------------------------------------
Audience = collections.namedtuple("Audience", "address request go pid total end")


class Sample:
    """A client whose lines are read: their latencies in nanoseconds, and whether each came once and in order. `end` is what
    ends an event, or a line where there are no events."""

    def __init__(self, end_):
        self._end, self._part = end_, b""
        self.latencies, self.seen, self.disorder, self.dropped, self.first, self.last = array.array("q"), 0, 0, 0, 0, 0

    def take(self, sock):
        """Read once. Returns how many bytes came."""
        data = sock.recv(BUFFER)
        self.look(data, time.monotonic_ns())
        return len(data)

    def look(self, data, now):
        """Take bytes that came `now`."""
        data = self._part + data
        cut = data.rfind(self._end) + len(self._end) if self._end in data else 0
        data, self._part = data[:cut], data[cut:]
        found = re.findall(rb"(\d{10}) (\d{18}) x{69}\n", data)
        if found:
            numbers, stamps = [int(number) for number, _ in found], [int(stamp) for _, stamp in found]
            self.disorder += numbers != list(range(self.seen, self.seen + len(numbers)))
            self.seen, self.first, self.last = numbers[-1] + 1, self.first or stamps[0], stamps[-1]
            self.latencies.extend([now - stamp for stamp in stamps])
        if b"dropped" in data:
            self.dropped += sum(map(int, re.findall(rb'event: dropped\ndata: \{"bytes": (\d+)', data)))


class Crowd:
    """Clients, of which some are `samples`; `counts` has the bytes of each; `peak`: the server's memory at its most."""

    def __init__(self, options, audience):
        self._options, self._audience, self._buffer = options, audience, bytearray(BUFFER)
        self._poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._socks, self.counts, self.samples, self.peak = {}, {}, {}, 0.0

    def connect(self, clients, samples):
        """All of them, in batches."""
        for first in range(0, clients, BATCH):
            self._options.progress.say("%d of %d clients" % (first, clients))
            try:
                self._batch(min(BATCH, clients - first))
            except OSError as error:
                raise Failed("only %d clients were let in (%s): does the limit of open files, ulimit -n, allow more,"
                             " here and to the server?" % (len(self.counts), error)) from None
        fds, samples = list(self._socks), min(clients, samples)
        self.samples = {fds[place * clients // samples]: Sample(self._audience.end) for place in range(samples)}

    def _batch(self, number):
        made = []
        for _ in range(number):
            made.append(connect(self._audience.address, self._audience.request, self._source()))
            self._socks[made[-1].fileno()] = made[-1]
        for sock in made:
            read_head(sock)
            sock.setblocking(False)
            self.counts[sock.fileno()] = 0
            self._poller.register(sock.fileno(), select.POLLIN)

    def _source(self):
        """An address of our own that has ports left; on Linux all of 127.* is ours."""
        many = LINUX and self._audience.address[0] == "127.0.0.1"
        return ("127.0.0.%d" % (1 + next(self._options.serial) // PORTS % 250), 0) if many else None

    def follow(self):
        """Read until all have got all, or nothing has come for a while."""
        total, wait, least = self._audience.total, TICK if hasattr(select, "epoll") else TICK * 1000, 0
        looked = heard = time.monotonic()
        while least < total and looked - heard < SILENCE:
            ready, now = self._poller.poll(wait), time.monotonic()
            if ready:
                heard = now
                self._read(ready)
            if now - looked >= TICK:
                looked, least = now, min(self.counts.values())
                self.peak = max(self.peak, memory(self._audience.pid))
                self._options.progress.say("%d %%" % (100 * least // total))

    def _read(self, ready):
        """The hot loop: one call for each client that has something."""
        samples, socks, counts, buffer = self.samples, self._socks, self.counts, self._buffer
        flags = socket.MSG_TRUNC if LINUX else 0            # tcp(7): thrown away, not copied
        for fd, _ in ready:
            try:
                size = samples[fd].take(socks[fd]) if fd in samples else socks[fd].recv_into(buffer, BUFFER, flags)
            except ConnectionError:
                size = 0
            counts[fd] += size
            if not size:
                self._poller.unregister(fd)

    def rate(self):
        """Lines a second that the writer came to."""
        seen = [sample for sample in self.samples.values() if sample.last > sample.first]
        return max(((sample.seen - 1) * 1e9 / (sample.last - sample.first) for sample in seen), default=math.inf)

    def close(self):
        """All leave."""
        for sock in self._socks.values():
            sock.close()
        if hasattr(self._poller, "close"):
            self._poller.close()


def arrived(audience, crowd, lines):
    """What came. A client with other bytes than were due has lost, or got twice, so many lines at least. There is no latency
    where the stamps come from another machine's clock."""
    event, samples = audience.total / lines, crowd.samples.values()
    lost = sum(math.ceil(abs(audience.total - count) / event) for count in crowd.counts.values())
    lost += sum(sample.disorder for sample in samples)
    latencies = () if audience.pid is None else itertools.chain.from_iterable(sample.latencies for sample in samples)
    return dict({"deliveries": max(1, lines * len(crowd.counts) - lost), "lost": lost,
                 "dropped bytes": sum(sample.dropped for sample in samples)}, **spread(latencies, "ms", 1e-6))


def fan_out(options, source, clients, rate, seconds):
    """`source(options, rate, lines)` is a context manager with an Audience."""
    lines = max(2, round(rate * seconds))
    with source(options, rate, lines) as audience, contextlib.closing(Crowd(options, audience)) as crowd:
        before = memory(audience.pid)
        crowd.connect(clients, max(2, min(SAMPLES, SAMPLED_LINES // rate)))
        idle = crowd.peak = memory(audience.pid)
        meter = Meter(audience.pid)
        audience.go()
        crowd.follow()
        seconds, cpu, own = meter.read()
        figures = arrived(audience, crowd, lines)
    figures.update({"CPU s/M": cpu / figures["deliveries"] * 1e6, "memory MiB": before, "peak MiB": crowd.peak,
                    "client KiB": (idle - before) / clients * 1024, "load CPU %": own / seconds * 100})
    figures["lines/s"] = crowd.rate()
    if crowd.rate() < 0.9 * rate:
        options.note("the writer was held back: the server, or this machine, took no more lines than that")
    if own > 0.9 * seconds:
        options.note("the clients took a whole core: perhaps they are the limit, not the server")
    return figures


@contextlib.contextmanager
def gaffer_audience(options, rate, lines):
    """Server-Sent Events, an event a line."""
    with Gaffer(options) as server, server.waiting(python(STAMPS, rate, lines)) as (pid, go):
        request = server.head("/streams/%d/stdout?feed=eventsource" % pid, version="1.0")       # no chunks
        yield Audience(server.address, request, go, server.pid, sse_size(lines, STAMPED, server.epoch()), b"\n\n")


@contextlib.contextmanager
def asyncio_audience(options, rate, lines):
    """The bytes as they are."""
    with running(*python(BROADCASTER, *python(STAMPS, rate, lines)), stderr=subprocess.DEVNULL) as process:
        yield Audience(listening(process), b"", lambda: say_go(process), process.pid, lines * STAMPED, b"\n")


# --------------------------------------------------------------------------------------------------------------------
# --echo: through `cat` and back, one message after the other
# --------------------------------------------------------------------------------------------------------------------
def echo(options, source):
    """`source(options)` is a context manager with (socket, encode); encode(text) -> (what is sent, what has to come)."""
    times, wrong = array.array("d"), 0
    with source(options) as (sock, encode):
        for number in range(100 + options.messages):        # the first hundred warm up
            out, due = encode(b"%031d" % number)
            begin = time.perf_counter()
            sock.sendall(out)
            data = fresh = sock.recv(4096)
            while fresh and len(data) < len(due):
                fresh = sock.recv(4096)
                data += fresh
            times.append(time.perf_counter() - begin)
            wrong += data != due
    return dict({"messages": options.messages, "lost": wrong}, **spread(times[100:], "us", 1e6))


def text_frame(payload):
    """A short text message from a server."""
    return bytes([0x81, len(payload)]) + payload


@contextlib.contextmanager
def gaffer_echo(options):
    """A websocket: messages to stdin, output back."""
    with Gaffer(options) as server, server.template(["cat"], redirect_input=True) as (name, _):
        with server.stream("/wstreams/%d" % server.pid_of(name), *UPGRADE) as sock:
            yield sock, lambda text: (masked(text + b"\n"), text_frame(text + b"\n"))


@contextlib.contextmanager
def websocketd_echo(options):
    """The same; it adds the end of a line, and takes it off."""
    with websocketd(["cat"]) as (sock, _):
        yield sock, lambda text: (masked(text), text_frame(text))


@contextlib.contextmanager
def relay_echo(options):
    """No protocol: what two pipes and a socket cost."""
    with running(*python(RELAY)) as process, contextlib.closing(connect(listening(process))) as sock:
        yield sock, lambda text: (text + b"\n", text + b"\n")


# --------------------------------------------------------------------------------------------------------------------
# --api: requests on connections that are kept
# --------------------------------------------------------------------------------------------------------------------
def whole(data):
    """True where a response is complete."""
    place, length = data.find(b"\r\n\r\n"), data.find(b"Content-Length: ") + 16
    return place >= 0 and len(data) >= place + 4 + int(data[length:data.find(b"\r\n", length)])


def ask(socks, request, seconds):
    """(times in seconds, failures): each connection asks again as soon as it has its answer."""
    times, parts, wrong, clock, poller = array.array("d"), {}, 0, time.perf_counter, select.poll()
    by_fd, begun = {sock.fileno(): sock for sock in socks}, {}
    for fd, sock in by_fd.items():
        poller.register(fd, select.POLLIN)
        begun[fd] = clock()
        sock.sendall(request)
    alone = [(fd, select.POLLIN) for fd in by_fd]           # a single one may as well wait in recv()
    poll, end_ = (lambda wait: alone) if len(socks) == 1 else poller.poll, clock() + seconds
    while clock() < end_:
        for fd, _ in poll(WAIT * 1000):
            fresh = by_fd[fd].recv(65536)
            data = parts.pop(fd, b"") + fresh
            if not fresh:
                raise Failed("the server closed a connection")
            if not whole(data):
                parts[fd] = data
                continue
            now = clock()
            times.append(now - begun[fd])
            wrong += not data.startswith(b"HTTP/1.1 200 ")
            begun[fd] = now
            by_fd[fd].sendall(request)
    return times, wrong


def api(options, source, connections, busy):
    """`source(options, busy)` is a context manager with (address, request, pid of the server)."""
    with source(options, busy) as (address, request, pid), contextlib.ExitStack() as stack:
        socks = [stack.enter_context(contextlib.closing(connect(address))) for _ in range(connections)]
        meter = Meter(pid)
        times, wrong = ask(socks, request, options.seconds)
        seconds, cpu, _ = meter.read()
    return dict({"requests/s": len(times) / seconds, "failed": wrong, "server CPU %": cpu / seconds * 100},
                **spread(times, "ms", 1000))


@contextlib.contextmanager
def firehose(server):
    """A process that writes as fast as it can, to a client that is a process too, or its reading would spoil our times."""
    with server.template(YES) as (name, _):
        request = server.head("/streams/%d/stdout?feed=continuous&loss=block" % server.pid_of(name))
        with running(*python(DRAIN, *server.address, request.decode("latin-1"))):
            yield


@contextlib.contextmanager
def gaffer_api(options, busy):
    """The state of a template."""
    with Gaffer(options) as server, server.template(QUIET) as (name, _), contextlib.ExitStack() as stack:
        if busy:
            stack.enter_context(firehose(server))
        yield server.address, server.head("/status/" + name), server.pid


@contextlib.contextmanager
def aiohttp_api(options, busy):
    """Hello, from one that has nothing else to do."""
    if busy:
        raise Missing("aiohttp has no stream to be busy with")
    if importlib.util.find_spec("aiohttp") is None:
        raise Missing("aiohttp is not installed for %s" % sys.executable)
    with running(sys.executable, "-c", HELLO) as process:
        yield listening(process), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", process.pid


# --------------------------------------------------------------------------------------------------------------------
# --spawn and --restart: processes
# --------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def supervisord(number=1):
    """(proxy, folder, pid, seconds until it answered) of a supervisord that can run the programs `quiet` and `say`."""
    import xmlrpc.client
    program, port = find("supervisord"), free_port()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        with open(os.path.join(folder, "conf"), "w", encoding="utf-8") as file:
            file.write(SUPERVISORD.format(folder=folder, port=port, number=number))
        os.mkfifo(os.path.join(folder, "fifo"))
        begin = time.perf_counter()
        process = stack.enter_context(running(program, "-n", "-c", file.name, stderr=subprocess.DEVNULL))
        proxy = stack.enter_context(xmlrpc.client.ServerProxy("http://127.0.0.1:%d/RPC2" % port)).supervisor

        def attempt():
            with contextlib.suppress(OSError):
                return proxy.getState()
        until(attempt, "supervisord answers")
        yield proxy, folder, process.pid, time.perf_counter() - begin


def supervised(proxy, number):
    """The OS pids of supervisord's processes, once there are so many."""
    def look():
        pids = [entry["pid"] for entry in proxy.getAllProcessInfo() if entry["pid"]]
        return pids if len(pids) >= number else None
    return until(look, "supervisord starts its processes")


def executed(pids):
    """Wait until all of these are `sleep`. Returns the seconds that it took: 0, where they were already."""
    waiting, begin = set(pids if LINUX else ()), time.perf_counter()

    def look():
        waiting.difference_update([pid for pid in waiting if read_text("/proc/%d/cmdline" % pid).startswith("sleep\0")])
        return not waiting
    if look():
        return 0.0
    until(look, "%d processes are executed" % len(pids))
    return time.perf_counter() - begin


def spawn(options, source, number):
    """`source(options, number)` -> seconds until the last of so many processes has been executed."""
    seconds = source(options, number)
    return {"processes": number, "total ms": seconds * 1000, "each ms": seconds / number * 1000}


def gaffer_spawn(options, number):
    """One POST. It is answered when all have been executed; better look."""
    with Gaffer(options) as server, server.template(QUIET, numprocesses=number) as (name, seconds):
        pids = server.json("GET", "/status/" + name)["os_pids"]
        if len(pids) != number:
            raise Failed("%d of %d processes run" % (len(pids), number))
        return seconds + (executed(pids) if server.pid else 0)


def bare_spawn(options, number):
    """A loop of posix_spawn, nothing redirected."""
    program, pids, begin = find(QUIET[0]), [], time.perf_counter()
    try:
        for _ in range(number):
            pids.append(os.posix_spawn(program, QUIET, os.environ))
        return time.perf_counter() - begin + executed(pids)
    finally:
        for pid in pids:
            end(pid)


def supervisord_spawn(options, number):
    """A program of so many processes."""
    with supervisord(number) as (proxy, _, _, _):
        begin = time.perf_counter()
        proxy.startProcessGroup("quiet", False)
        executed(supervised(proxy, number))
        return time.perf_counter() - begin


def restart(options, source):
    """`source(options)` -> an iterator of seconds from a SIGKILL to the first output of the process that follows."""
    with contextlib.closing(source(options)) as kills:
        times = list(itertools.islice(kills, options.restarts))
    return dict({"restarts": len(times)}, **spread(times, "ms", 1000))


def killed(pid, hear):
    """Seconds from the end of a process to what hear() waits for."""
    begin = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    if not hear():
        raise Failed("no process followed the one that was killed")
    return time.perf_counter() - begin


def gaffer_restart(options):
    """A template each time, as one that fails again and again is started ever later. Its stream goes on over a restart."""
    with Gaffer(options) as server:
        if server.pid is None:
            raise Failed("--restart kills processes, so the server has to be on this machine")
        while True:
            with server.template(SAY) as (name, _):
                with server.stream("/streams/%s/stdout?feed=continuous&since=0" % name, version="1.0") as sock:
                    sock.recv(1)
                    yield killed(server.json("GET", "/status/" + name)["os_pids"][0], lambda: sock.recv(1))


def bare_restart(options):
    """Spawn, wait, spawn."""
    program, (ours, theirs) = find(SAY[0]), os.pipe()
    start = functools.partial(os.posix_spawn, program, SAY, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 1)])
    pid = start()
    try:
        os.read(ours, 1)
        while True:
            begin = time.perf_counter()
            end(pid)
            pid = start()
            os.read(ours, 1)
            yield time.perf_counter() - begin
    finally:
        end(pid)
        os.close(ours)
        os.close(theirs)


def supervisord_restart(options):
    """It has no streams that one could follow, so its process writes into a named pipe."""
    with supervisord() as (proxy, folder, _, _), open(os.path.join(folder, "fifo"), "r+b", buffering=0) as fifo:
        proxy.startProcess("say", False)
        fifo.read(1)
        while True:
            yield killed(supervised(proxy, 1)[0], lambda: fifo.read(1))


# --------------------------------------------------------------------------------------------------------------------
# --rest: what it takes to have it; --growth: whether one of many costs more than one of few
# --------------------------------------------------------------------------------------------------------------------
def start_seconds(options):
    """From the start of a server to its first answer."""
    begin = time.perf_counter()
    with Gaffer(argparse.Namespace(**dict(vars(options), endpoint=None))) as server:
        server.request("GET", "/ping")
        return time.perf_counter() - begin


def import_seconds(options):
    """What `import gaffer` takes over a bare interpreter, once compiled."""
    with tempfile.TemporaryDirectory() as cache:
        env = dict(clean_environment(), PYTHONPYCACHEPREFIX=cache)

        def run_python(code):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code, os.path.dirname(options.gaffer)], env=env, check=True)
            return time.perf_counter() - begin
        both = "import sys; sys.path.insert(0, sys.argv[1]); import gaffer", "pass"
        run_python(both[0])
        return statistics.median(run_python(both[0]) - run_python(both[1]) for _ in range(5))


def gaffer_rest(options):
    """Memory with few and with many children that do nothing, and how long a start takes."""
    starts = [start_seconds(options) for _ in range(3)]
    with Gaffer(options) as server, server.template(QUIET):
        few = memory(server.pid)
        with server.template(QUIET, numprocesses=199):
            many = memory(server.pid)
    return {"1 child, MiB": few, "200 children, MiB": many, "start ms": statistics.median(starts) * 1000,
            "import ms": import_seconds(options) * 1000}


def supervisord_rest(options):
    """The same; there is nothing to import."""
    sizes, starts = [], []
    for number in (1, 200, 1):
        with supervisord(number) as (proxy, _, pid, seconds):
            starts.append(seconds)
            proxy.startProcessGroup("quiet", False)
            supervised(proxy, number)
            sizes.append(memory(pid))
    return {"1 child, MiB": sizes[0], "200 children, MiB": sizes[1], "start ms": statistics.median(starts) * 1000,
            "import ms": math.nan}


def process_cost(options, number):
    """CPU time of the start of a process, in microseconds; few are started several times."""
    times, cost = max(1, 200 // number), 0.0
    with Gaffer(options) as server:
        for _ in range(times):
            with contextlib.ExitStack() as stack:
                meter, names = Meter(server.pid), []
                for first in range(0, number, 1000):
                    fields = {"numprocesses": min(1000, number - first), "redirect_output": []}
                    names.append(stack.enter_context(server.template(QUIET, **fields))[0])
                cost += meter.read()[1]
                for name in names:              # or their end is counted with the next ones' start
                    server.request("POST", "/processes/%s/_stop?wait=20" % name)
    return cost / number / times * 1e6


def event_cost(options, number):
    """CPU time of an event, in microseconds, where one request starts, or stops, all of so many templates."""
    times, seen = max(1, 200 // number), 0
    with Gaffer(options) as server, contextlib.ExitStack() as stack:
        for made in range(number):
            options.progress.say("%d of %d templates" % (made, number))
            stack.enter_context(server.template(QUIET, numprocesses=0, start=False))
        sock, meter = stack.enter_context(server.stream("/watch?feed=continuous", version="1.0")), Meter(server.pid)
        for made in range(1, times + 1):
            server.request("POST", "/groups/loadtest/_start")
            server.request("POST", "/groups/loadtest/_stop")
            while seen < 2 * number * made:
                data = sock.recv(BUFFER)
                seen += data.count(b"\n")
                if not data or b'"dropped"' in data:
                    raise Failed("events were lost")
        return meter.read()[1] / seen * 1e6


def rest(options, source):
    """`source(options)` -> figures."""
    return source(options)


def growth(options, source, number):
    """The server's CPU time for a delivery to one of so many clients, for the start of one of so many processes, and for an
    event of one of so many templates."""
    delivery = fan_out(options, source, number, 100, min(options.seconds, 3))
    return {"delivery us": delivery["CPU s/M"], "process us": process_cost(options, number),
            "event us": event_cost(options, number), "lost": delivery["lost"]}


# --------------------------------------------------------------------------------------------------------------------
# who is measured with what
# --------------------------------------------------------------------------------------------------------------------
MEASURES = {            # name: (function, figures that are compared, {system: its source})
    "continuous": (throughput, ("MB/s",), {
        "gaffer": functools.partial(gaffer_stream, "continuous"), "socat": socat_stream,
        "websocketd": functools.partial(websocketd_stream, False)}),
    "websocket": (throughput, ("MB/s",), {
        "gaffer": functools.partial(gaffer_stream, "websocket"), "socat": socat_stream,
        "websocketd": functools.partial(websocketd_stream, False)}),
    "SSE": (throughput, ("MB/s",), {
        "gaffer": functools.partial(gaffer_stream, "SSE"), "websocketd": functools.partial(websocketd_stream, True)}),
    "fan-out": (fan_out, ("CPU s/M", "p50 ms"), {"gaffer": gaffer_audience, "asyncio": asyncio_audience}),
    "echo": (echo, ("p50 us",), {"gaffer": gaffer_echo, "websocketd": websocketd_echo, "relay": relay_echo}),
    "api": (api, ("requests/s",), {"gaffer": gaffer_api, "aiohttp": aiohttp_api}),
    "spawn": (spawn, ("total ms",), {"gaffer": gaffer_spawn, "bare": bare_spawn, "supervisord": supervisord_spawn}),
    "restart": (restart, ("p50 ms",), {"gaffer": gaffer_restart, "bare": bare_restart, "supervisord": supervisord_restart}),
    "rest": (rest, ("200 children, MiB", "start ms"), {"gaffer": gaffer_rest, "supervisord": supervisord_rest}),
    "growth": (growth, (), {"gaffer": gaffer_audience}),
}


def plan(options):
    """[(name in MEASURES, title, further arguments)]: what was asked for; where nothing was, some of everything."""
    clients, processes, connections = options.fan_out or 200, options.spawn or 50, options.api or (1, 16)
    sizes = [*(options.growth or (10, 100, 1000)), *([10000] if options.large else [])]
    asked = (
        (options.throughput, [(form, form, ()) for form in ("continuous", "websocket", "SSE")]),
        (options.fan_out, [("fan-out", "to %d" % clients, (clients, options.lines, options.seconds))]),
        (options.echo, [("echo", "through cat", ())]),
        (options.api is not None, [("api", "%d kept" % number, (number, False)) for number in connections]),
        (options.busy, [("api", "%d kept, busy" % number, (number, True)) for number in connections]),
        (options.spawn, [("spawn", "processes", (processes,))]),
        (options.restart, [("restart", "after kill -9", ())]),
        (options.rest, [("rest", "at rest", ())]),
        (options.growth is not None or options.large, [("growth", "at %d" % number, (number,)) for number in sizes]),
    )
    every = not any(wanted for wanted, _ in asked)
    return [case for wanted, cases in asked if wanted or every for case in cases]


def conclude(row, gaffer, compared):
    """Make of the rounds of a row its figures (the median; the worst of what was lost), and compare gaffer's with them."""
    rounds = row.pop("rounds")
    row["notes"] = sorted(set(row["notes"]))
    row["figures"] = {name: (max if name in FAULTS else statistics.median)(figures[name] for figures in rounds)
                      for name in (rounds[0] if rounds else ())}
    if row is not gaffer and rounds and gaffer["figures"]:
        row["ratios"] = {name: gaffer["figures"][name] / row["figures"][name] for name in compared}


def run_case(options, name, title, arguments):
    """[row], one for each system. Rounds go A B A B, so that what else the machine does falls on all alike."""
    measure, compared, sources = MEASURES[name]
    rows = [{"measure": measure.__name__.replace("_", "-"), "case": title, "system": system, "rounds": [], "notes": []}
            for system in sources if system == "gaffer" or system in options.against]
    for turn, row in itertools.product(range(options.rounds), rows):
        options.progress.begin("%s, %s: %s, round %d of %d" % (name, title, row["system"], turn + 1, options.rounds))
        options.note = row["notes"].append
        if "error" not in row:
            try:
                row["rounds"].append(measure(options, sources[row["system"]], *arguments))
            except BlockingIOError:
                row["error"], row["missing"] = "nothing came for %d seconds" % WAIT, False
            except (Failed, OSError) as error:
                row["error"], row["missing"] = str(error), isinstance(error, Missing)
    for row in rows:
        conclude(row, rows[0], compared)
    return rows


def faulty(row):
    """True where something was lost or failed; that a yardstick is not installed is no fault."""
    return "error" in row and not row["missing"] or any(row["figures"].get(fault) for fault in FAULTS)


# --------------------------------------------------------------------------------------------------------------------
# for people
# --------------------------------------------------------------------------------------------------------------------
class Progress:
    """What is being done, on stderr: one line that is written again and again; where that is no terminal, a line each."""

    def __init__(self, quiet):
        self._what, self._next, self._plain = "", 0.0, not quiet and not sys.stderr.isatty()
        self._rewrites = not quiet and not self._plain

    def begin(self, what):
        """The next measurement."""
        self._what, self._next = what, 0.0
        self.say("")
        if self._plain:
            print("loadtest: " + what, file=sys.stderr)

    def say(self, how_far):
        """How far it is."""
        if self._rewrites and time.monotonic() >= self._next:
            self._next = time.monotonic() + TICK
            print("\r\033[K%s %s" % (self._what, how_far), end="", file=sys.stderr, flush=True)

    def end(self):
        """Make room for something else."""
        if self._rewrites:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def cell(value):
    """A figure in a table."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1e6:
        return "%.4g M" % (value / 1e6)
    if value == int(value) or abs(value) >= 1000:
        return "{:,d}".format(round(value))
    return "%.1f" % value if abs(value) >= 100 else "%.3g" % value


def table(rows):
    """Lines of text: the rows of one measure. A title stands over two lines; what is 0 or as it should be has no column."""
    hidden = {"dropped bytes"} if not any(row["figures"].get("dropped bytes") for row in rows) else set()
    hidden |= {"lines/s"} if not any(row["notes"] for row in rows) else set()
    names = [name for name in max((row["figures"] for row in rows), key=len) if name not in hidden]
    ratios = list(max((row.get("ratios", {}) for row in rows), key=len))
    titles = [(rows[0]["measure"], "")] + [(*name.split(" ", 1), "")[:2] for name in names]
    titles += [("ratio", name.split(" ", 1)[0]) for name in ratios]
    lines = [list(line) for line in zip(*titles)]
    for row in rows:
        found, compared = row["figures"], row.get("ratios", {})
        lines.append(["%s: %s" % (row["case"], row["system"]), *(cell(found.get(name)) for name in names),
                      *(cell(compared.get(name)) for name in ratios)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return list(filter(None, text)) + ["  %s: %s: %s" % (row["case"], row["system"], word)
                   for row in rows for word in [*row["notes"], *([row["error"]] if "error" in row else [])]]


def finite(value):
    """The same with null for NaN, which is no JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------------------
# the command line
# --------------------------------------------------------------------------------------------------------------------
def within(least, most, kind=int):
    """A type for argparse: a number in a range."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError("%s is not from %s to %s" % (text, least, most))
        return kind(text)
    return number


def endpoint(text):
    """A type for argparse: (host, port) of http://HOST:PORT."""
    match = re.match(r"http://([^/:@\[\]]+):(\d{1,5})/?\Z", text)
    if match is None:
        raise argparse.ArgumentTypeError("'%s' is not http://HOST:PORT" % text)
    return match.group(1), int(match.group(2))


def make_parser():
    """The options."""
    parser = argparse.ArgumentParser(
        prog="loadtest.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.partition("\n\nFrom top")[0],
        epilog="Exit status: 0 all is well, 1 something was lost or failed, 2 wrong usage, 130 interrupted.")
    add = parser.add_argument_group("what is measured (none named: some of everything)").add_argument
    add("--throughput", action="store_true", help="one process to one client: continuous, binary websocket, SSE")
    add("--megabytes", metavar="N", type=within(1, 100000), default=200, help="that it writes (default %(default)s)")
    add("--fan-out", metavar="N", type=within(1, 15000), help="one process to N clients, by SSE")
    add("--lines", metavar="RATE", type=within(1, 100000), default=1000, help="of 100 bytes, a second (default %(default)s)")
    add("--seconds", metavar="S", type=within(0.1, 600, float), default=5.0, help="of --fan-out and --api (default 5)")
    add("--echo", action="store_true", help="websocket messages through cat and back, one after the other")
    add("--messages", metavar="N", type=within(1, 1000000), default=5000, help="of --echo (default %(default)s)")
    add("--api", metavar="N", type=within(1, 1000), nargs="*", help="GET /status/<name> on N kept connections (default 1,"
        " then 16); this program takes its share of the CPU")
    add("--busy", action="store_true", help="the same while a process writes as fast as it can to a client")
    add("--spawn", metavar="N", type=within(1, 1000), help="from POST to the last of N processes executed")
    add("--restart", action="store_true", help="from kill -9 to the first output of the process that follows")
    add("--restarts", metavar="N", type=within(1, 1000), default=30, help="of --restart (default %(default)s)")
    add("--rest", action="store_true", help="memory with 1 and 200 quiet processes, time of a start and of an import")
    add("--growth", metavar="N", type=within(1, 10000), nargs="*", help="CPU time of a delivery, a process, an event, with N"
        " of them (default 10, 100, 1000)")
    add("--large", action="store_true", help="and with 10000")
    add = parser.add_argument_group("how").add_argument
    known = sorted({system for _, _, sources in MEASURES.values() for system in sources} - {"gaffer"})
    add("--against", metavar="NAME", action="append", default=[], choices=known,
        help="measure this too where it can do the same: %s; repeatable" % ", ".join(known))
    add("--rounds", metavar="R", type=within(1, 100), default=1, help="so often, in turn; the median counts (default 1)")
    add("--endpoint", metavar="URL", type=endpoint, help="a server that runs already, http://HOST:PORT; it needs this"
        " Python at the same path (default: start one, and stop it)")
    add("--token-file", metavar="FILE", help="the token of that server (default: what GAFFER_TOKEN says)")
    add("--gaffer", metavar="FILE", default=GAFFER, help="the gaffer.py to start (default: the one above this folder)")
    add("--json", action="store_true", help="one JSON object instead of tables")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def interrupted(signum, frame):
    """Once is enough: from now on, what was made is removed."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def prepare(options):
    """Add to the options what is no option: token, serial (numbers, for names and ports), progress, note (a function)."""
    options.token = os.environ.get("GAFFER_TOKEN")
    if options.token_file:
        options.token = read_text(options.token_file).strip()
        if not options.token:
            raise Failed("the token file '%s' cannot be read, or is empty" % options.token_file)
    options.serial, options.note = itertools.count(1), None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65536), hard))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupted)


def run(options):
    """Measure and print. Returns the exit status."""
    with Gaffer(options) as server:
        report = {"gaffer": server.json("GET", "/")["version"], "machine": machine(), "command": sys.argv, "results": []}
    if not options.json:
        print("gaffer {gaffer}, {machine[python]}, {machine[system]}, {machine[cpus]} x {machine[cpu]}".format(**report))
    for _, cases in itertools.groupby(plan(options), lambda case: MEASURES[case[0]][0]):
        rows = [row for case in cases for row in run_case(options, *case)]
        report["results"] += rows
        options.progress.end()
        if not options.json:
            print("\n" + "\n".join(table(rows)), flush=True)
    if options.json:
        print(json.dumps(dict(report, results=[finite(row) for row in report["results"]])))
    for name in sorted(set(options.against) - {row["system"] for row in report["results"]}):
        print("loadtest: %s can do nothing of this" % name, file=sys.stderr)
    return int(any(map(faulty, report["results"])))


def main(argv=None):
    """The command line. Returns the exit status."""
    options = make_parser().parse_args(argv)
    options.progress = Progress(options.quiet)
    try:
        prepare(options)
        return run(options)
    except Failed as error:
        options.progress.end()
        print("loadtest: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        options.progress.end()
        print("loadtest: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
