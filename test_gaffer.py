#!/usr/bin/env python3
"""Tests of gaffer.py: real processes, real sockets, real signals. Run `python3 test_gaffer.py`.

Four rings, in the order of gaffer.py's sections: pure code; the loop with real children; HTTP on
real sockets; the command line, the README and the structure of the file. Nothing sleeps to be in
step with something: every wait is for a byte, an event or an exit; TIMEOUT bounds failure only.
"""
import argparse
import ast
import atexit
import base64
import builtins
import concurrent.futures
import contextlib
import errno
import faulthandler
import fcntl
import functools
import gc
import glob
import grp
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import os
import pwd
import queue
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tracemalloc
import unittest
from unittest import mock
import urllib.parse
import warnings
import weakref
import wsgiref.util
import wsgiref.validate

import gaffer

TIMEOUT = 30.0                      # nothing takes so long unless it is broken
HERE = os.path.dirname(os.path.abspath(__file__))
PYTHON = sys.executable


# --------------------------------------------------------------------------------------------------
# helpers
# --------------------------------------------------------------------------------------------------
def until(condition, what="the condition", timeout=TIMEOUT):
    """Wait for what nothing announces, such as an entry of /proc. Returns what was true."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError("%s did not come true in %g seconds" % (what, timeout))
        pause.wait(0.005)


def process_state(os_pid):
    """The state letter of an OS process, None if there is none."""
    try:
        with open("/proc/%d/stat" % os_pid) as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return None


def alive(os_pid):
    """True while an OS process lives (a zombie does not)."""
    return process_state(os_pid) not in ("Z", "X", None)


def python(code):
    """{cmd, args} of a template that runs Python code, without the start-up cost of site."""
    return {"cmd": PYTHON, "args": ["-I", "-S", "-u", "-c", textwrap.dedent(code)]}


def open_descriptors(os_pid="self"):
    """What a process has open: {descriptor: what it is}."""
    found, folder = {}, "/proc/%s/fd/" % os_pid
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(folder + name)
    return found


class Faults(logging.Handler):
    """What goes wrong where no test looks: ERROR records of gaffer's logger, and what is written
    to this process's stderr, as exceptions of threads and destructors are."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self._texts, self._size = [], 0

    def install(self):
        """Collect from here on. File descriptor 2 is a file that can be read."""
        self._size = os.fstat(2).st_size
        logging.getLogger("gaffer").addHandler(self)

    def emit(self, record):
        self._texts.append(self.format(record))

    def take(self):
        """The texts collected since the last call."""
        sys.stderr.flush()
        start, self._size = self._size, os.fstat(2).st_size
        written = os.pread(2, self._size - start, start) if self._size > start else b""
        texts, self._texts = self._texts, []
        return texts + written.decode("utf-8", "replace").splitlines()


FAULTS = Faults()


def unexpected(texts, patterns):
    """What is wrong with `texts`: those that no pattern matches, the patterns that match none."""
    return ([text for text in texts if not any(re.search(pattern, text) for pattern in patterns)]
            + ["expected: " + pattern for pattern in patterns
               if not any(re.search(pattern, text) for text in texts)])


class Case(unittest.TestCase):
    """After each test: the same threads, the same descriptors, no child left, no fault unseen."""

    patience = 3 * TIMEOUT              # seconds that a test may take
    share = None                        # classes with the same one run in one process
    quick = True                        # part of --quick

    def setUp(self):
        gc.collect()
        self._expected = []
        self.addCleanup(self._no_fault_is_left)
        threads, descriptors = set(threading.enumerate()), set(open_descriptors())
        self.addCleanup(self._guard, threads, descriptors)

    def expect_log(self, pattern):
        """This test logs an error in which `pattern` is found; any other fails the test."""
        self._expected.append(pattern)

    def assertTable(self, function, rows):
        """`rows` are (argument, answer); an answer that is an error class is what it raises."""
        for given, answer in rows:
            with self.subTest(given=repr(given)[:80]):
                if isinstance(answer, type) and issubclass(answer, Exception):
                    self.assertRaises(answer, function, given)
                else:
                    self.assertEqual(function(given), answer)

    def _no_fault_is_left(self):
        faults = unexpected(FAULTS.take(), self._expected)
        if faults:
            self.fail("faults that this test does not expect:\n" + "\n".join(faults))

    def _guard(self, threads, descriptors):
        for thread in set(threading.enumerate()) - threads:
            thread.join(TIMEOUT)
        self.assertEqual(set(threading.enumerate()) - threads, set(), "threads are left")
        gc.collect()
        # the C library opens its own libgcc for a moment when the first thread ends
        left = {fd: what for fd, what in open_descriptors().items()
                if fd not in descriptors and "libgcc_s" not in what}
        self.assertEqual(left, {}, "descriptors are left")
        with self.assertRaises(ChildProcessError, msg="a child is left"):
            os.waitpid(-1, os.WNOHANG)


class Asked:
    """A server at a URL. Each request to it has a connection of its own."""

    PIDS = "/processes/%s/_pids", "pids"        # what add() returns, and where it is

    def __init__(self, url):
        self.url = url
        port = re.search(r"//.*:([0-9]+)", url)
        self.port = port and int(port.group(1))

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body as bytes). `body`: a string, bytes, or JSON."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        data = body.encode() if isinstance(body, str) else body or b""
        lines = {"Host": "127.0.0.1", **(headers or {})}
        with contextlib.closing(Wire(self.port or self.url[5:])) as wire:
            return wire.request(path, *map(": ".join, lines.items()), method=method, host=None,
                                body=data).answer(method)

    def json(self, method, path, body=None, headers=None):
        """(status, value) of one request."""
        status, _, data = self.request(method, path, body, headers)
        return status, json.loads(data) if data else None

    def ok(self, method, path, body=None, headers=None):
        """The value of a request that has to succeed."""
        status, value = self.json(method, path, body, headers)
        assert status == 200, (method, path, status, value)
        return value

    def add(self, name, command, **options):
        """POST a template; `command` is a string, or what python() returns. Returns its pids."""
        info = command if isinstance(command, dict) else {"cmd": command}
        self.ok("POST", "/processes", dict(info, name=name, **options))
        path, field = self.PIDS
        return self.ok("GET", path % name)[field]


class Running(Asked):
    """A Manager with an HttpHandler on a free port of 127.0.0.1, on a thread of its own."""

    def __init__(self, window=gaffer.WINDOW_SIZE, endpoints=None, **options):
        self.http = gaffer.HttpHandler(endpoints or [gaffer.HttpEndpoint("127.0.0.1:0")], **options)
        self.manager = gaffer.Manager([self.http, self], window_size=window)
        self._started = threading.Event()
        self.error = None
        self._thread = threading.Thread(target=self._run, name="test-manager")
        self._thread.start()
        assert self._started.wait(TIMEOUT)
        if self.error is not None:
            self._thread.join()
            raise self.error
        super().__init__(self.http.urls[0])

    def _run(self):
        try:
            self.manager.run()
        except BaseException as error:
            self.error = error
        self._started.set()

    def start(self, loop, manager):
        """As an app: the endpoints listen."""
        self._started.set()

    def stop_all(self):
        self.manager.stop(kill=True)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def events(self, pattern=""):
        """An iterator of the events (dicts) that a pattern matches, from the beginning on."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", "/watch/%s?feed=continuous&since=0" % pattern)
        return map(json.loads, connection.getresponse())

    def wait_event(self, pattern, since=0):
        """The first event that a pattern matches, from the beginning on."""
        return self.ok("GET", "/watch/%s?feed=longpoll&since=%s&timeout=%d" % (pattern, since,
                                                                               TIMEOUT))


def part_lines(parts):
    """The lines of a body that comes in parts."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def http_bytes(method, target, *headers, body=b"", host="127.0.0.1", version="1.1"):
    """A request as bytes; a body without a header that tells its length gets a Content-Length."""
    lines = ["%s %s HTTP/%s" % (method, target, version)]
    if host is not None:
        lines.append("Host: " + host)
    lines += headers
    told = any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers)
    if body and not told:
        lines.append("Content-Length: %d" % len(body))
    return "\r\n".join(lines + ["", ""]).encode("latin-1") + body


def http_chunks(*parts):
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def ws_frame(opcode, payload, final=True, mask=b"\x01\x02\x03\x04"):
    """A masked frame of a websocket."""
    size = len(payload)
    head = bytes([0x80 * final | opcode, 0x80 | (size if size < 126 else 126 + (size > 65535))])
    if size > 125:
        head += struct.pack("!H" if size < 65536 else "!Q", size)
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


# other values of constants in gaffer.py, for the length of a `with`: patch.dict() would clear all
# names of the module for a moment, while threads run
http_limits = functools.partial(mock.patch.multiple, gaffer)


class Wire:
    """One connection: sends bytes, reads answers, chunks, events and frames as they come."""

    def __init__(self, address, context=None, receive_buffer=None):
        """`address`: a port of 127.0.0.1, the path of a unix socket, or a connected socket."""
        self.sock = address
        if not isinstance(address, socket.socket):
            port = isinstance(address, int)
            self.sock = socket.socket(socket.AF_INET if port else socket.AF_UNIX)
            self.sock.settimeout(TIMEOUT)
            if receive_buffer:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.sock.connect(("127.0.0.1", address) if port else address)
        if context:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.file = self.sock.makefile("rb")

    def close(self):
        self.file.close()
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)
        return self

    def request(self, target, *headers, method="GET", **options):
        """Send a request (see http_bytes). Returns self."""
        return self.send(http_bytes(method, target, *headers, **options))

    def head(self):
        """Read the head of an answer into `status` and `headers`. Returns self."""
        line = self.file.readline()
        match = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [\x20-\x7e]+\r\n", line)
        assert match, "no status line: %r" % line
        lines = list(iter(self.file.readline, b"\r\n"))
        assert all(re.fullmatch(rb"[!-9;-~]+: [^\r\n]*\r\n", line) for line in lines), lines
        self.status = int(match.group(1))
        self.headers = http.client.parse_headers(io.BytesIO(b"".join(lines)))
        if self.headers["Content-Type"] == "text/event-stream":
            chunked = self.headers["Transfer-Encoding"] == "chunked"
            parts = iter(lambda: self.chunk() or b"", b"")
            self.body = part_lines(parts) if chunked else self.file
        return self

    def answer(self, method="GET"):
        """Read an answer: (status, headers, body)."""
        lengths = self.head().headers.get_all("Content-Length", [])
        if method == "HEAD" or self.status in (101, 204, 304):
            body = b""
        elif self.headers["Transfer-Encoding"] == "chunked":
            body, whole = self.chunks()
            assert whole and not lengths, (self.headers.items(), body[-100:])
        elif lengths:
            size, = lengths
            body = self.file.read(int(size))
        else:
            body = self.file.read()
        return self.status, self.headers, body

    def chunk(self):
        """The next chunk; b"" for the last, with its `trailers`; None if the connection ended."""
        line = self.file.readline()
        if not line:
            return None
        size = int(line, 16)
        if not size:
            self.trailers = http.client.parse_headers(self.file)
            return b""
        data = self.file.read(size + 2)
        if len(data) < size + 2:
            return None
        assert data.endswith(b"\r\n"), data[-10:]
        return data[:-2]

    def chunks(self):
        """(all bytes, True if the last chunk came)."""
        parts = [self.chunk()]
        while parts[-1]:
            parts.append(self.chunk())
        return b"".join(parts[:-1]), parts[-1] is not None

    def exactly(self, size):
        """The next `size` bytes or more of a chunked body."""
        data = b""
        while len(data) < size:
            part = self.chunk()
            assert part, "the body ended after %r" % data[-100:]
            data += part
        return data

    def block(self):
        """The lines of the next event, as bytes; b"" for an empty line; None at the end."""
        lines = []
        for line in self.body:
            if line == b"\n":
                return b"".join(lines)
            lines.append(line)
        assert not lines, "cut within an event: %r" % lines
        return None

    def event(self):
        """The next event as (event, data, id); None at the end. Skips empty lines."""
        block = self.block()
        while block == b"":
            block = self.block()
        if block is None:
            return None
        fields = dict(line.split(b": ", 1) for line in block.splitlines())
        assert set(fields) == {b"id", b"event", b"data"}, block
        return fields[b"event"].decode(), fields[b"data"].decode(), fields[b"id"].decode()

    def upgrade(self, target, *headers, early=b""):
        """Ask for a websocket, send `early` with it, read the head of the answer. Returns self."""
        key = base64.b64encode(os.urandom(16)).decode()
        return self.send(http_bytes("GET", target, "Upgrade: websocket", "Connection: Upgrade",
                                    "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: " + key,
                                    *headers) + early).head()

    def frame(self, opcode, payload=b"", final=True):
        self.send(ws_frame(opcode, payload, final))

    def text(self, text):
        self.frame(1, text.encode())

    def read(self):
        """(opcode, payload) of the next frame; (None, b"") at the end of the connection."""
        head = self.file.read(2)
        if len(head) < 2:
            return None, b""
        size = head[1] & 127
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        return head[0] & 15, self.file.read(size)


class ServerCase(Case):
    """Each test has a running server, with the options of the class."""

    options: dict = {}

    def setUp(self):
        super().setUp()
        self.server = Running(**self.options)
        self.addCleanup(self.server.stop_all)

    def wire(self, target=None, *headers, server=None, receive_buffer=None, **options):
        """A Wire, closed after the test; with a target: a GET of it was sent and its head read."""
        made = Wire((server or self.server).port, receive_buffer=receive_buffer)
        self.addCleanup(made.close)
        return made.request(target, *headers, **options).head() if target else made

    def websocket(self, path, headers="", early=b""):
        """A Wire that is a websocket, closed after the test."""
        return ServerCase.wire(self).upgrade(path, *headers.splitlines(), early=early)

    def assertError(self, answer, status, code, words=""):
        """`answer` is (status, value) of an error."""
        self.assertEqual((answer[0], answer[1].get("error")), (status, code), answer)
        self.assertIn(words, answer[1]["reason"])


class Browser:
    """A headless Chromium with an empty profile, driven through chromedriver (W3C WebDriver)."""

    PROGRAMS = "chromium", "chromedriver"
    FLAGS = (
        "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--remote-debugging-pipe",
        "--host-resolver-rules=MAP *.example 127.0.0.1",    # names that their owner points here
        # no more processes than the tests need
        "--in-process-gpu", "--renderer-process-limit=1", "--disable-extensions",
        "--disable-features=SpareRendererForSitePerProcess,BackForwardCache,MediaRouter,Translate")
    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # what the standard calls an element's id

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="gaffer-browser-")
        atexit.register(self.close)
        self.start()

    def start(self):
        # below the ports that clients get; with 0, what it gets for IPv6 may be in use for IPv4
        self.port, self.path = 20000 + os.getpid() % 10000, "/session"
        self.launch("chromedriver", "--port=%d" % self.port)
        if not any(b"started successfully" in line for line in self.driver.stdout):
            raise AssertionError("chromedriver does not start on port %d" % self.port)
        options = {"binary": shutil.which("chromium"),
                   "args": [*self.FLAGS, "--user-data-dir=" + self.profile]}
        self.path += "/%s/" % self.do("POST", "", {"capabilities": {"alwaysMatch": {
            "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}}})["sessionId"]

    def launch(self, *command):
        """Start a process group that is killed by close(), or when this process ends; its leader
        has ended, so that no child is left of it."""
        script = 'exec 3<&0; ("$@" 3<&- & exec >&-; read _ <&3; kill -KILL 0) &'
        self.driver = subprocess.Popen(
            ["sh", "-c", script, "sh", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True)
        self.driver.wait()

    def close(self):
        """End the browser and all that it has started; forget the profile."""
        self.driver.communicate()
        shutil.rmtree(self.profile, ignore_errors=True)

    def ask(self, method, path, value):
        """(True if it is refused, value or error) of a command."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2 * TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, self.path + path,
                               json.dumps(value) if method == "POST" else None)
            answer = connection.getresponse()
            return answer.status != 200, json.loads(answer.read().decode())["value"]

    def do(self, method, path, value=None):
        """A command of WebDriver in this session: its value. Fails if it is refused."""
        refused, value = self.ask(method, path, value or {})
        if refused:
            raise AssertionError("%s: %s" % (value["error"], value["message"].partition("\n")[0]))
        return value

    def get(self, url):
        self.do("POST", "url", {"url": url})

    def script(self, js, *args):
        """Run the body of a function, with `arguments`. Returns what it, or its promise, gives."""
        return self.do("POST", "execute/sync", {"script": js, "args": args})

    def wait(self, js, *args):
        """As script(), until what it returns is true. After TIMEOUT, fails with what is shown."""
        errors = [None]

        def look():
            try:
                return self.script(js, *args)
            except AssertionError as error:             # or it went to another page meanwhile
                errors.append(error)
        try:
            return until(look, js)
        except AssertionError as error:
            raise AssertionError("%s (%s); the page shows %r" % (error, errors[-1], self.script(
                "return document.body ? document.body.innerText.slice(0, 999) : ''"))) from None

    def click(self, selector):
        """Click into the middle of an element: it has to be in sight, and nothing over it."""
        element = self.do("POST", "element", {"using": "css selector", "value": selector})
        self.do("POST", "element/%s/click" % element[self.ELEMENT])

    def size(self, width, height, mobile=False):
        """The size of what a page sees, in CSS pixels."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=0, mobile=mobile)

    def cdp(self, command, **params):
        """A command of the Chrome DevTools Protocol: its result."""
        return self.do("POST", "goog/cdp/execute", {"cmd": command, "params": params})

    def console(self):
        """The errors that the console of the browser has got since the last look, as text."""
        entries = self.do("POST", "se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


class Firefox(Browser):
    """A headless Firefox, driven through its own Marionette (as Debian has no geckodriver)."""

    PROGRAMS = "firefox-esr",
    COMMANDS = {
        "": "NewSession", "url": "Navigate", "execute/sync": "ExecuteScript",
        "element": "FindElement", "actions": "PerformActions", "rect": "SetWindowRect",
        "alert/accept": "AcceptAlert", "alert/dismiss": "DismissAlert"}

    def start(self):
        with open(self.profile + "/user.js", "w") as file:
            file.write('user_pref("marionette.port", 0);')
        self.launch("firefox-esr", "--headless", "--marionette", "--no-remote", "--profile",
                    self.profile)
        path = self.profile + "/MarionetteActivePort"
        until(lambda: os.path.exists(path) and os.path.getsize(path))
        with open(path) as file:
            self.wire = Wire(int(file.read()))
        self.read()
        self.do("POST", "")

    def read(self):
        size = b"".join(iter(lambda: self.wire.file.read(1), b":"))
        return json.loads(self.wire.file.read(int(size)).decode())

    def ask(self, method, path, value):
        if path.endswith("/click"):
            name, value = "ElementClick", {"id": path.split("/")[1]}
        elif path == "alert/text":
            name = "GetAlertText" if method == "GET" else "SendAlertText"
        else:
            name = self.COMMANDS[path]
        message = json.dumps([0, 0, "WebDriver:" + name, value]).encode()
        self.wire.send(b"%d:%b" % (len(message), message))
        _, _, error, value = self.read()
        return bool(error), error or value.get("value", value)

    def size(self, width, height, mobile=False):
        self.do("POST", "rect", {"width": width, "height": height})

    def console(self):
        """Not told by Marionette."""
        return []


class BrowserCase(ServerCase):
    """Each test has a running server, and all tests have one browser."""

    share, quick, kind, browser = "browser", False, Browser, None

    @classmethod
    def setUpClass(cls):
        missing = [program for program in cls.kind.PROGRAMS if not shutil.which(program)]
        if missing:
            raise unittest.SkipTest("needs " + missing[0])
        super().setUpClass()
        BrowserCase.browser = BrowserCase.browser or cls.kind()

    def setUp(self):
        super().setUp()
        self.addCleanup(self.browser.get, "about:blank")    # or it would ask a server that is gone
        self.browser.console()


# --------------------------------------------------------------------------------------------------
# ring 1: pure code, and what lives in memory
# --------------------------------------------------------------------------------------------------
def pure_drip(data):
    """The ways in which bytes may arrive: whole, byte by byte, in two pieces at each place."""
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    for i in range(1, len(data)):
        yield [data[:i], data[i:]]


def pure_pieces(rng, data, most):
    """`data` cut at random."""
    place = 0
    while place < len(data):
        size = rng.randint(1, most)
        yield data[place:place + size]
        place += size


def pure_environ(case, **values):
    """Set variables of os.environ (None: unset them) for one test."""
    def change(name, value):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for name, value in values.items():
        case.addCleanup(change, name, os.environ.get(name))
        change(name, value)


@contextlib.contextmanager
def traced():
    """Trace memory; gives a function that returns (bytes in use, the most)."""
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


class PureLoopCase(Case):
    """A loop with a fake clock, which the test turns itself."""

    def setUp(self):
        super().setUp()
        self.now, self.ran = 1000.0, []
        self.loop = gaffer.Loop(lambda: self.now)
        self.addCleanup(self.loop.close)

    def do(self, function, *args, **named):
        return self.loop.call(lambda: function(*args, **named))

    def later(self, delay, function, *args):
        return self.do(self.loop.later, delay, function, *args)

    def advance(self, seconds=0.0):
        self.now += seconds
        self.loop.step()


# --------------------------------------------------------------------------------------------------
# errors, Throttle
# --------------------------------------------------------------------------------------------------
class PureErrors(Case):

    def test_headers(self):
        self.assertIn(("Sec-WebSocket-Version", "13"),
                      gaffer.error_response(gaffer.UpgradeRequired("x")).headers)

    def test_near(self):
        self.assertTable(lambda word: gaffer.near(word, ["name", "cmd", "env"]), (
            ("comand", ", did you mean 'cmd'?"), ("zzzzzz", "")))
        # more takes more time than a mistake is worth
        self.assertTable(lambda case: bool(gaffer.near("x" * case[0], ["x" * case[0]] * case[1])), (
            ((128, 30), True), ((130, 30), False), ((128, 31), False)))

    def test_throttle(self):
        now = 1000.0
        throttle = gaffer.Throttle(lambda: now)
        with self.assertLogs("gaffer", "WARNING") as logs:
            for seconds in (0, 0, 0, 59.9, 0.1, 60):
                now += seconds
                throttle.warning("no more %s", "threads")
        self.assertEqual([record.getMessage() for record in logs.records], [
            "no more threads", "no more threads (and 3 times more before)", "no more threads"])


# --------------------------------------------------------------------------------------------------
# loop
# --------------------------------------------------------------------------------------------------
class PureTimers(PureLoopCase):

    def test_added_in_a_turn(self):
        """It is for the next: a timer that is due at once would starve the rest."""
        def again(add):
            self.ran.append(1)
            add(again, add)
        self.later(0, again, functools.partial(self.loop.later, 0))
        self.loop.call_soon(again, self.loop.call_soon)
        for turns in range(1, 4):
            self.advance()
            self.assertEqual(len(self.ran), 2 * turns)

    def test_cancel(self):
        """Before it is due, in the turn in which it is, by itself, twice."""
        early = self.later(1, self.ran.append, "never")
        last = self.later(3, self.ran.append, "last")
        own = self.later(2, lambda: (self.ran.append("own"), own.cancel(), late.cancel()))
        late = self.later(2, self.ran.append, "never")
        self.later(2, self.ran.append, "yes")
        self.do(early.cancel)
        self.do(early.cancel)
        self.advance(3)
        self.do(own.cancel)
        self.do(last.cancel)
        self.assertEqual((self.ran, self.loop.pending_timers), (["own", "yes", "last"], 0))

    def test_cancelled_are_forgotten(self):
        kept = [self.later(300, print) for _ in range(100)]
        with traced() as memory:
            for _ in range(3000):
                self.do(self.later(300, print).cancel)
            self.assertLess(memory()[0], 100000)
        self.assertEqual(self.loop.pending_timers, len(kept))


class PureCalls(PureLoopCase):
    """What may be called, by whom, and when it runs; no thread runs the loop."""

    def setUp(self):
        super().setUp()
        self.adders = (functools.partial(self.later, 0), self.loop.call_soon,
                       self.loop.call_unlocked)

    def test_call(self):
        loop = self.loop
        self.assertEqual(loop.call(divmod, 7, 2), (3, 1))
        self.assertEqual((loop.owned(), loop.call(loop.call, loop.owned)), (False, True))
        for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
            self.assertRaises(error, loop.call, mock.Mock(side_effect=error))
            self.assertFalse(loop.owned())

    def test_order(self):
        """The work of a turn under the lock, then user code without it."""
        def note(name):
            self.ran.append((name, self.loop.owned()))
        self.loop.call_unlocked(note, "user 1")
        self.loop.call_soon(note, "work 1")
        self.loop.call_soon(self.loop.call_unlocked, note, "user 2")
        self.loop.call_soon(note, "work 2")
        self.assertEqual(self.ran, [])
        self.advance()
        self.assertEqual(self.ran, [
            ("work 1", True), ("work 2", True), ("user 1", False), ("user 2", False)])

    def test_failures(self):
        """Logged once a minute for each type; the rest of the turn runs."""
        errors = ZeroDivisionError, KeyError, GeneratorExit
        with self.assertLogs("gaffer", "ERROR") as logs:
            for add in self.adders:
                for error in errors:
                    add(mock.Mock(side_effect=error))
                add(self.ran.append, 1)
            self.advance()
        self.assertEqual(tuple(record.exc_info[0] for record in logs.records), errors)
        self.assertEqual(self.ran, [1, 1, 1])

    def test_interrupt(self):
        """It ends run(); nothing that was due is lost with it, and the lock is free."""
        for error, add in itertools.product((KeyboardInterrupt, SystemExit), self.adders):
            self.ran.clear()
            self.loop.call_soon(self.ran.append, "first")
            add(mock.Mock(side_effect=error))
            add(self.ran.append, "second")
            self.assertRaises(error, self.loop.run)
            self.assertTrue(self.loop.call(self.loop.owned))
            self.loop.call_soon(self.loop.stop)
            self.loop.run()
            self.assertEqual(sorted(self.ran), ["first", "second"])

    def test_closed(self):
        """What was handed over before is done, also behind what exits; afterwards nothing is."""
        loop, ran = self.loop, self.ran
        self.assertTrue(loop.call_soon(ran.append, 1))
        for _ in range(2):
            loop.call_unlocked(mock.Mock(side_effect=SystemExit))
        self.assertTrue(loop.call_unlocked(ran.append, 2))
        self.assertRaises(SystemExit, loop.close)
        loop.close()
        self.assertTrue(loop.closed)
        self.assertRaises(gaffer.Stopping, loop.call, ran.append, 3)
        self.assertEqual((loop.call_soon(ran.append, 4), loop.call_unlocked(ran.append, 5)),
                         (False, False))
        self.assertEqual(ran, [1, 2])


class PureReadiness(PureLoopCase):

    def setUp(self):
        super().setUp()
        self.fds = []                           # two that are ready to be read
        for left, right in [socket.socketpair() for _ in range(2)]:
            self.addCleanup(left.close)
            self.addCleanup(right.close)
            right.sendall(b"x")
            self.fds.append(left.fileno())

    def register(self, fd, callback):
        self.do(self.loop.register, fd, selectors.EVENT_READ, callback)

    def test_another_descriptor(self):
        """Both are ready in one turn; the first to run puts something else in the other's place,
        and fails."""
        def replace(fd):
            self.loop.unregister(fd)
            self.loop.register(fd, selectors.EVENT_READ, self.ran.append)
            self.ran.append("first")
            raise KeyError
        for fd, other in self.fds, self.fds[::-1]:
            self.register(fd, lambda mask, other=other: replace(other))
        with self.assertLogs("gaffer", "ERROR"):
            self.advance()
        self.assertEqual(self.ran, ["first"])

    def test_expect(self):
        """An answer, a timer, or the time given ends the wait."""
        self.register(self.fds[0], lambda mask: self.ran.append(os.read(self.fds[0], 1)))
        self.do(self.loop.expect)
        self.loop.step(2 * self.patience)
        self.later(0, self.ran.append, b"y")
        self.do(self.loop.expect)
        self.loop.step(2 * self.patience)
        self.loop.step(0.001)
        self.assertEqual(self.ran, [b"x", b"y"])

    def test_selector_fails(self):
        """The loop goes on with its timers and calls, at a slow pace, and says so once."""
        for error in (OSError(errno.EBADF, "bad"), ValueError("closed"), MemoryError()):
            with mock.patch("selectors.DefaultSelector.select", side_effect=error), \
                    mock.patch("time.sleep") as sleep, \
                    self.assertLogs("gaffer", "ERROR") as logs:
                self.later(0, self.ran.append, error)
                for _ in range(4):
                    self.loop.step(2 * self.patience)
            self.assertEqual((self.ran.pop(), len(logs.records)), (error, 1))
            self.assertEqual(sleep.mock_calls[-3:], [mock.call(gaffer.ERROR_PAUSE)] * 3)


class PureRunning(Case):
    """A loop that runs on a thread of its own, with the real clock."""

    def setUp(self):
        super().setUp()
        self.loop, self.happened = gaffer.Loop(), threading.Event()
        self.thread = threading.Thread(target=self.loop.run)
        self.addCleanup(self.end)
        self.thread.start()

    def end(self):
        self.loop.stop()
        self.thread.join(TIMEOUT)
        self.assertFalse(self.thread.is_alive())
        self.loop.close()

    def test_wakes(self):
        """What is added ends a wait without a limit, or one for a later timer."""
        loop, act = self.loop, self.happened.set
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)

        def ready(mask):
            loop.unregister(write)
            act()
        for add in (
                *[lambda: loop.call(loop.later, 0.001, act)] * 2, lambda: loop.call_soon(act),
                lambda: loop.call(loop.register, write, selectors.EVENT_WRITE, ready),
                lambda: loop.call_soon(loop.call_soon, act), lambda: loop.call_unlocked(act),
                lambda: loop.call_unlocked(loop.call_unlocked, act),
                lambda: loop.call_unlocked(loop.call, loop.later, 0.001, act)):
            self.happened.clear()
            loop.call(lambda: None)             # it is asleep
            add()
            self.assertTrue(self.happened.wait(TIMEOUT))
            loop.call(loop.later, 1000, print)

    def test_any_time(self):
        """Longer than the system's calls can count."""
        for seconds in (3e6, gaffer.SECONDS_MAX, 1e300, math.inf):
            self.loop.call(self.loop.later, seconds, print)
            self.loop.call_soon(self.happened.set)
            self.assertTrue(self.happened.wait(TIMEOUT))
            self.happened.clear()

    def test_many_threads(self):
        """All their calls are done beside a loop that always has work."""
        ran, over = [], threading.Event()

        def busy():
            if not over.is_set():
                self.loop.call_soon(busy)
        self.loop.call_soon(busy)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(functools.partial(self.loop.call, ran.append), range(400)))
        over.set()
        self.assertEqual(sorted(ran), list(range(400)))


# --------------------------------------------------------------------------------------------------
# streams
# --------------------------------------------------------------------------------------------------
class PureSink:
    """A sink that takes what it gets; not `open`: it is full each time."""

    def __init__(self):
        self.open, self.full, self.got, self.losses, self.ends = True, False, [], [], 0

    def send(self, payload):
        self.got.append(payload)
        self.full = not self.open
        return self.open

    def lost(self, reader, count):
        self.losses.append(count)
        reader.close()

    def finished(self, reader):
        self.ends += 1
        reader.close()

    @property
    def data(self):
        return b"".join(self.got)


def pure_sse(data):
    """[(id, event, data)] of the bytes of an event stream, read by nothing but its grammar."""
    found = re.findall(rb"id: ([0-9]+)@e\nevent: ([a-z]+)\ndata: ([^\r\n]*)\n\n", data)
    assert b"".join(b"id: %b@e\nevent: %b\ndata: %b\n\n" % event for event in found) == data, data
    return [(int(number), event.decode(), line) for number, event, line in found]


class PureLogCase(PureLoopCase):

    def window(self, limit=1024, *steps):
        window = gaffer.Window(self.loop, limit)
        self.feed(window, *steps)
        return window

    def reader(self, log, encoder=None, offset=None, loss="cut", open=True):
        reader = gaffer.Reader(log, encoder or gaffer.Encoder(), PureSink(),
                               log.end if offset is None else offset, loss)
        reader.sink.open = open
        self.do(reader.start)
        return reader

    def sse(self, log, **options):
        return self.reader(log, gaffer.SseEncoder("out", "e"), **options)

    def drain(self, *readers):
        for reader in readers:
            reader.sink.open, reader.sink.full = True, False
            self.do(reader.pump)

    def feed(self, log, *steps):
        """Bytes are appended, numbers are seconds that pass."""
        for step in steps:
            if isinstance(step, bytes):
                self.do(log.append, step)
            else:
                self.advance(step)


class PureWindow(PureLogCase):

    def test_model(self):
        """All that a window answers, against all bytes that it ever got."""
        rng = random.Random(2)
        for limit, most in (1, 3), (7, 12), (100, 40), (256, 700), (100000, 20000):
            window, data = self.window(limit), b""
            for _ in range(60):
                for length in rng.choices((0, 1, 5, 80, most), k=2):
                    data += bytes([rng.randrange(97, 123)]) * length
                    data += rng.choice((b"\n", b"\r", b""))
                self.do(window.append, data[window.end:])
                start, end = max(0, len(data) - limit), len(data)
                self.assertEqual((window.start, window.end, window.read(start, limit + 5)),
                                 (start, end, data[start:]))
                for offset in (start, *rng.choices(range(start, end + 1), k=20)):
                    size, ends = rng.randint(1, limit), b"\n" if b"\n" in data[offset:] else b"\r"
                    newline = data.find(ends, offset)
                    fresh = newline < 0 or data[:offset][-1:] in (b"", b"\n")
                    self.assertEqual(window.read(offset, size), data[offset:offset + size])
                    self.assertEqual(window.resync(offset), offset if fresh else newline + 1)
                    if offset:
                        self.assertEqual(window.before(offset), data[offset - 1])
                first = window.resync(start)
                lines = re.findall(rb"[^\n]*\n|[^\n]+", data[first:])
                for count in 0, 1, 2, 5, 1000:
                    size = sum(map(len, lines[max(0, len(lines) - count):]))
                    self.assertEqual(window.tail(count), end - size, (count, data[first:]))
                self.assertEqual(window.tail(math.inf), first)

    def test_byte_before(self):
        """A newline at the window's start may be half of CR LF."""
        window = self.window(131072, b"a" * 65535 + b"\r", b"\n" + b"b" * 65535, b"c" * 65536)
        self.assertEqual((window.start, window.before(65536)), (65536, 13))

    def test_memory(self):
        """Of a window of short lines, and of what readers at many places get."""
        window, readers = self.window(5000), []
        with traced() as memory:
            for number in range(1000):
                self.do(window.append, b"short line\n")
                if number % 20 == 0:
                    readers.append(self.sse(window, offset=window.start, open=False))
                    readers[-1].sink.got.clear()
            for reader in readers:
                self.do(reader.pump)
                reader.sink.got.clear()
            self.assertLess(memory()[0], 30 * window.limit)

    def test_poll(self):
        """What comes after a long poll has looked and before it waits is not missed."""
        window = self.window()
        with mock.patch("gaffer.LongPoll") as poll:
            gaffer.Api._wait_for(window.wait, lambda: window.read(0) or None, 1, None)
        begin, got = poll.call_args[0][0], []
        self.feed(window, b"x")
        self.do(begin, got.append)
        self.feed(window, b"y")
        self.assertEqual(got, [b"x"])

    def test_log_ready(self):
        """A line counts once it has ended, however the reads have cut it."""
        def first(case):
            window, process = self.window(), mock.Mock(state="starting")
            process.step = functools.partial(setattr, process, "state")
            self.do(gaffer.Process._match, process, window, case[0].encode())
            for index, piece in enumerate(case[1:]):
                self.feed(window, piece)
                if process.state == "ready":
                    return index
            return None
        self.assertTable(first, (
            (("ready", b"a\nnow ready!\nb"), 0), (("ready", b"re", b"ad", b"y", b"!", b"\n"), 4),
            (("ready", b"50%\rready", b"100%\rx"), 1), (("ready", b"rea\ndy\n", b"x"), None),
            (("aab", b"aa", b"aab", b"\n"), 2), (("b\u00e9", b"b\xc3", b"\xa9\n"), 1)))


class PureReader(PureLogCase):

    def test_work(self):
        """That for many readers is that for one; that for half a line does not grow with it."""
        sizes = []

        class Counting(gaffer.SseEncoder):
            def encode(self, data, *args):
                sizes.append(len(data))
                return super().encode(data, *args)
        window = self.window(gaffer.MIB)
        readers = [self.reader(window, Counting("out", "e")) for _ in range(50)]
        sizes.clear()
        self.feed(window, b"x\n", b"unfinished", 0.11)
        self.assertLess(len(sizes), 4)
        self.assertEqual(len({id(payload) for reader in readers for payload in reader.sink.got}), 2)
        self.feed(window, *[b"."] * 3000, b"\n")
        self.assertLess(sum(sizes), 10100)
        self.assertEqual(pure_sse(readers[0].sink.data)[-1], (3013, "out", b"." * 3000))

    def test_shares(self):
        """One that is far behind gets its share a turn, in order, while more is appended."""
        data = os.urandom(1024) * 4096
        window = self.window(8 * gaffer.MIB, *pure_pieces(random.Random(3), data, 99999))
        reader = self.reader(window, offset=0)
        for turn in range(1, 100):
            self.assertLessEqual(len(reader.sink.data),
                                 gaffer.SHARE_SIZE * gaffer.SHARES_PER_TURN * turn)
            self.feed(window, b"more", 0)
        self.assertEqual(reader.sink.data, data + 99 * b"more")

    def test_batches(self):
        """Many readers are fed in batches, with pauses if they lag; none lags far, none loses."""
        def slow(payload):
            self.now += gaffer.BATCH_TIME / 10
            sent.append(payload)
            return True
        window, sent = self.window(gaffer.MIB), []
        readers = [self.reader(window) for _ in range(100)]
        for reader in readers:
            reader.sink.send = slow
        for number, steps in enumerate(([b"one\n"], [0], [b"two\n", 0, 0]), 1):
            self.feed(window, *steps)           # if nobody lags, only the others get a turn
            self.assertEqual(len(sent), number * gaffer.BATCH_SIZE)
        self.feed(window, *[gaffer.BATCH_TIME] * 30)
        self.assertEqual(len(b"".join(sent)), 800)
        self.feed(window, *[b"x" * gaffer.READ_SIZE] * 9)
        for reader in readers:
            self.assertLess(window.end - reader.offset, window.limit // 8)
        self.do(window.finish)
        self.assertEqual({(reader.offset, reader.sink.ends) for reader in readers},
                         {(window.end, 1)})

    def test_close(self):
        """By another's sink while a payload goes round, twice."""
        window = self.window()
        first, second = self.reader(window), self.reader(window)
        first.sink.send = lambda payload: second.close() or True
        self.feed(window, b"x")
        self.do(second.close)
        self.do(second.pump)
        self.assertEqual((second.sink.got, list(window.readers)), ([], [first]))

    def test_failure(self):
        """An encoder or a sink that raises: its reader is cut, nobody else notices."""
        window = self.window()
        bad, good = self.reader(window), self.reader(window)
        bad.sink.send = mock.Mock(side_effect=ZeroDivisionError)
        with self.assertLogs("gaffer", "ERROR"):
            self.feed(window, b"x", b"y")
        self.assertEqual((bad.sink.losses, good.sink.data), ([0], b"xy"))

    def test_unfinished_lines(self):
        """Shown after 100 ms without output, up to a whole character; no timer is left."""
        euro = "\u20ac".encode()
        for steps, wanted in (
                ((b"login: ", 0.099), []), ((b"login: ", 0.101, 5), [(7, b"login: ")]),
                ((b"abc", 0.11, b"\n", b"next\n"), [(3, b"abc"), (4, b""), (9, b"next")]),
                ((b"0", 0.09, b"1", 0.09, b"\n2", 0.11), [(3, b"01"), (4, b"2")]),
                ((b"5 " + euro[:2], 0.11, euro[2:] + b"!\n"), [(2, b"5 "), (7, euro + b"!")]),
                ((b"a\n" + euro[:1], 9), [(2, b"a")]),
                ((b"a\r", b"\n", b"\nb\n"), [(2, b"a"), (4, b""), (6, b"b")])):
            with self.subTest(steps=steps):
                window = self.window()
                reader = self.sse(window)
                self.feed(window, *steps)
                self.assertEqual(pure_sse(reader.sink.data), [
                    (place, "out", line) for place, line in wanted])
                self.do(reader.close)
                self.advance(0.11)
                self.assertEqual(self.loop.pending_timers, 0)

    def test_finish(self):
        """What is left, unfinished line and all, then the end, once."""
        window = self.window()
        live, slow = self.sse(window), self.sse(window, open=False)
        self.feed(window, b"one\n", b"half", 0.11, b" a line \xc3")
        self.do(window.finish)
        self.do(window.finish)
        wanted = [(4, "out", b"one"), (8, "out", b"half"), (17, "out", " a line \ufffd".encode())]
        self.assertEqual((pure_sse(live.sink.data), slow.sink.ends), (wanted, 0))
        self.drain(slow)
        late = self.sse(window, offset=0)
        whole = [wanted[0], (17, "out", "half a line \ufffd".encode())]
        self.assertEqual([pure_sse(each.sink.data) for each in (slow, late)], [whole] * 2)
        self.advance(1)
        self.assertEqual([each.sink.ends for each in (live, slow, late)], [1, 1, 1])


class PureLoss(PureLogCase):

    def test_raw(self):
        """A reader that lost something is told how much, or goes on, to the byte."""
        for loss, size, losses, dropped, got in (
                ("cut", 100, [], 0, b"x" + b"y" * 100), ("cut", 101, [1], 0, b"x"),
                ("cut", 300, [200], 0, b"x"), ("skip", 150, [], 50, b"x" + b"y" * 100)):
            window = self.window(100)
            reader = self.reader(window, loss=loss, open=False)
            self.feed(window, b"x", b"y" * size)
            self.drain(reader)
            self.feed(window, b"")
            self.assertEqual((reader.sink.losses, reader.dropped, reader.sink.data, window.dropped),
                             (losses, dropped, got, sum(losses) + dropped))

    def test_long_lines(self):
        """They come in pieces; half a line may fall out of a very small window."""
        for steps, events in (
                ([b"x" * 50] * 7 + [b"\n"], [
                    (150, "out", b"x" * 150), (300, "out", b"x" * 150), (351, "out", b"x" * 50)]),
                ([b"x" * 100, b"y" * 240 + b"\nnext\n"], [
                    (341, "dropped", b'{"bytes": 341}'), (346, "out", b"next")]),
                ([b"x" * 100, b"y" * 240 + b"\rnext\r"], [
                    (341, "dropped", b'{"bytes": 341}'), (346, "out", b"next")])):
            window = self.window(256)
            reader = self.sse(window)
            self.feed(window, *steps)
            self.assertEqual(pure_sse(reader.sink.data), events)

    def test_block(self):
        """A writer that waits for room: each of its readers gets every byte."""
        rng, window = random.Random(4), self.window(256)
        readers = [make(window, loss="block") for make in (self.sse, self.reader, self.reader)]
        data = bytes(rng.choices(b"abcdefghijk\n", k=6000))
        for _ in range(3000):
            size = min(window.room(), rng.randint(0, 200), len(data) - window.end)
            if size > 0:
                self.do(window.append, data[window.end:window.end + size])
            for reader in readers:
                reader.sink.open = rng.random() < 0.5
                if reader.sink.full and rng.random() < 0.3:
                    self.do(reader.pump)
            self.advance(0.01)
        self.do(window.finish)
        self.drain(*readers)
        lines = b"\n".join(text for _, _, text in pure_sse(readers[0].sink.data))
        self.assertEqual([lines, *[reader.sink.data for reader in readers[1:]]],
                         [data.rstrip(b"\n"), data, data])
        self.assertEqual([reader.sink.ends for reader in readers], [1] * 3)

    def test_random(self):
        """What a reader got and what it was told is all there was."""
        rng = random.Random(5)
        for line_end in (b"\n", b"\r") * 5:
            data = b"".join(b"%04d%b" % (number, line_end) for number in range(1500))
            window = self.window(300)
            skip, sse = readers = self.reader(window, loss="skip"), self.sse(window)
            for piece in pure_pieces(rng, data, 60):
                self.do(window.append, piece)
                for reader in readers:
                    reader.sink.open ^= rng.random() < 0.2
                    if reader.sink.open and reader.sink.full:
                        self.drain(reader)
                if rng.random() < 0.3:
                    self.advance(0.06)
            self.drain(*readers)
            self.do(window.finish)
            self.advance()
            self.assertEqual(len(skip.sink.data) + skip.dropped, len(data))
            due = 0
            for line in skip.sink.data.splitlines():    # half of one never runs into another
                number = int(line) if len(line) == 4 else due
                self.assertEqual((number >= due, line), (True, (b"%04d" % number)[:len(line)]))
                due = number + len(line) // 4
            self.assertEqual(due, 1500)
            place = dropped = 0
            for end, kind, text in pure_sse(sse.sink.data):
                if kind == "dropped":
                    dropped += end - place
                    self.assertEqual(end - place, json.loads(text)["bytes"])
                    text = data[place:end - 1]
                self.assertEqual(data[place:end], text + line_end)
                place = end
            self.assertEqual((place, dropped), (len(data), sse.dropped))
            self.assertEqual(window.dropped, sum(reader.dropped for reader in readers))


class PureEvents(PureLogCase):

    def test_dropped(self):
        log = gaffer.EventLog(self.loop, 4)
        sse, plain = readers = [self.reader(log, gaffer.RecordEncoder(
            form, bytes, "e", ("spawn", None)), open=False) for form in (
                "eventsource", "continuous")]
        for number in range(10):
            self.do(log.append, {
                "event": "exit" if number == 8 else "spawn", "name": "x", "n": number})
        self.drain(*readers)
        events = pure_sse(sse.sink.data)
        self.assertEqual([event[:2] for event in events], [
            (1, "spawn"), (6, "dropped"), (7, "spawn"), (8, "spawn"), (10, "spawn")])
        self.assertEqual(events[1][2], b'{"events": 5}')
        lines = [json.loads(line) for line in plain.sink.data.splitlines()]
        self.assertEqual(lines[1], {"event": "dropped", "id": "6@e", "events": 5})
        self.assertEqual([line.get("n") for line in lines], [0, None, 6, 7, 9])

    def test_statistics(self):
        """A few samples are kept; one that cannot be had is left out."""
        sampler = mock.Mock(side_effect=[OSError("no"), *range(20)])
        turns = mock.Mock(side_effect=[RuntimeError("no thread"), *[sampler] * 22])
        feed = gaffer.StatsFeed(self.loop, 1, turns)
        with mock.patch("threading.Thread.start", lambda thread: thread.run()), \
                self.assertLogs("gaffer", "WARNING") as logs:
            reader = self.reader(feed)
            for _ in range(21):
                self.advance(1)
            self.do(reader.close)
        self.assertEqual(self.loop.pending_timers, 0)
        self.assertIn("statistics cannot be read: no", logs.output[0])
        self.assertEqual(feed.read(4, 99), list(range(4, 20)))
        self.assertEqual(feed.start, 20 - gaffer.STATS_KEPT)

    def test_cpu(self):
        """Who asks for a group has samples of his own."""
        usage = dict.fromkeys("cpu_time rss vms uid nice cmdline".split(), 0)
        table = mock.Mock(sample=lambda pid: dict(usage, children=()), members=lambda pids: {},
                          usage=lambda pid: dict(usage, cpu_time=50))
        samples = gaffer.Samples(table, itertools.count(1).__next__)
        process = mock.Mock(started=0, exited=False, cpu_samples={})
        self.assertEqual([samples.usages([process])[0]["cpu"], samples.one(process)["cpu"],
                          samples.usages([process])[0]["cpu"]], [5000, 0, 0])


class PureJournal(PureLogCase):

    def setUp(self):
        super().setUp()
        self.journal = gaffer.Journal(self.loop, gaffer.MIB)
        self.streams = {}                       # (name, label) -> Merged

    def stream(self, name, pid, label="out", size=gaffer.MIB):
        merged = self.streams.setdefault((name, label), gaffer.Merged(
            self.loop, size, name, label, self.journal))
        source = self.do(merged.open, pid)
        write = functools.partial(self.do, merged.write, source)
        write.close = functools.partial(self.do, merged.close, source)
        return write

    def sse(self, *which, offset=None, open=True):
        view = self.do(self.journal.view, *which)
        return self.reader(view, gaffer.JournalEncoder(True, "e"), offset, open=open)

    @staticmethod
    def events(reader):
        """[(id, line without its time)], or (id, bytes dropped)."""
        return [(number, line.split(b" ", 1)[1].decode() if kind == "line"
                 else json.loads(line)["bytes"]) for number, kind,
                line in pure_sse(reader.sink.data)]

    def lines(self, *which, offset=0, tail=None, returns=False):
        """What a long poll gets: ([line without its time], where it ends, bytes lost)."""
        encoder = gaffer.JournalEncoder(False, "e", returns=returns)
        view = self.do(self.journal.view, *which)
        offset = offset if tail is None else self.do(view.tail, tail)
        data, end, lost = self.do(view.read_all, offset, encoder)
        return [line.split(b" ", 1)[1].decode() for line in data.splitlines()], end, lost

    def test_filters(self):
        """In order, live and later; the exit comes last, and ends the journal of its process."""
        live = {which: self.sse(*which) for which in ((), ("a",), ("a", 1), ("b",))}
        one, err, two = self.stream("a", 1), self.stream("a", 1, "err"), self.stream("b", 2)
        for write, data in ((one, b"x\n"), (two, b"y\nz\n"), (err, b"\xff\n"), (one, b"last")):
            write(data)
        one.close()
        self.do(self.journal.exit, "a", 1, 4, 0)
        wanted = [(2, "a 1 out x"), (4, "b 2 out y"), (6, "b 2 out z"), (8, "a 1 err \ufffd"),
                  (12, "a 1 out last"), (13, 'a 1 exit {"exit_status": 4, "term_signal": 0}')]
        for which, reader in live.items():
            events = [each for each in wanted if each[1].startswith(" ".join(map(str, which)))]
            self.assertEqual((self.events(reader), reader.sink.ends),
                             (events, int(which == ("a", 1))))
            self.assertEqual(self.lines(*which), ([line for _, line in events], 13, 0))
            self.assertEqual(self.events(self.sse(*which, offset=0)), events)
        for names, ends in (("a",), [0, 1, 1, 0]), ((), [1, 1, 1, 1]):
            self.do(self.journal.finish, *names)
            self.assertEqual([reader.sink.ends for reader in live.values()], ends)

    def test_unfinished_lines(self):
        """Shown after 100 ms while somebody reads, with a plus; then only what is new."""
        write, other = self.stream("a", 1), self.stream("b", 2)
        euro = "\u20ac".encode()
        self.feed(mock.Mock(append=write), b"name? " + euro[:-1], 1)
        reader = self.sse("a", offset=0)
        self.advance(0.01)
        other(b"between\n")
        self.assertEqual(self.events(reader), [(6, "a 1 out+ name? ")])
        self.advance(0.11)
        for data in (euro[-1:] + b" joe\r", b"\nwho\r", b"is"):
            write(data)
        for _ in range(5):
            self.lines("b")                     # adds no timer
            self.assertLess(self.loop.pending_timers, 2)
            self.advance(0.05)
        write(b"\n")
        lines = ["a 1 out+ name? ", "a 1 out \u20ac joe", "a 1 out who", "a 1 out+ is", "a 1 out "]
        self.assertEqual([line for _, line in self.events(reader)], lines)
        self.assertEqual(self.lines("a")[0], lines)

    def test_times(self):
        """Short reads within JOIN_TIME share one."""
        write = self.stream("a", 1)
        for place in 0, 0.8, 1.6, 2.4:
            with mock.patch("time.time", return_value=1000 + place * gaffer.JOIN_TIME):
                write(b"x\n")
        self.assertEqual(re.findall(rb"data: (\S+)", self.sse(offset=0).sink.data),
                         [b"1000.000"] * 2 + [b"1000.016"] * 2)

    def test_lines(self):
        """Of what processes 1 and 2 write, or time that passes."""
        for steps, returns, wanted in (
                # whoever comes first gets an unfinished one at once, as `logs` does not wait
                (((1, b"x\nname? "), (0, 0.2)), False, "1 out x|1 out+ name? "),
                # another process ends it, but not one that was shown as the last
                (((1, b"half"), (2, b"whole\n"), (1, b"last"), (1, None), (2, b"on\n")), False,
                 "1 out half|2 out whole|1 out last|2 out on"),
                # what replaces the one before it is told apart where that is asked for
                (((1, b"1%\r2%\r"), (1, b"\n3%\r"), (1, b"4"), (1, None)), True,
                 "1 out 1%|1 out< 2%|1 out 3%|1 out< 4"),
                # a long one comes in pieces
                ((*[(1, b"x" * 10000)] * 20, (1, b"\n")), False,
                 "1 out+ %s|1 out+ %s|1 out %s" % ("x" * 70000, "x" * 70000, "x" * 60000))):
            self.setUp()
            writes = {pid: self.stream("a", pid) for pid in (1, 2)}
            for pid, data in steps:
                if not pid:
                    self.advance(data)
                elif data is None:
                    writes[pid].close()
                else:
                    writes[pid](data)
            self.assertEqual("|".join(line[2:] for line in self.lines(returns=returns)[0]), wanted)

    def test_long_answer(self):
        """It ends with JOURNAL_WINDOWS windows; the next one goes on there."""
        manager = gaffer.Manager([], gaffer.SHARE_SIZE)
        self.addCleanup(manager.loop.close)
        self.loop, self.journal = manager.loop, manager.journal
        for number in range(9):
            write = self.stream("a", number, "out%d" % number)
            write((b"x" * 1023 + b"\n") * (gaffer.SHARE_SIZE // 1024))
        lines, end, _ = self.lines()
        self.assertEqual(len(lines) * 1024, gaffer.JOURNAL_WINDOWS * gaffer.SHARE_SIZE)
        self.assertEqual(len(self.lines(offset=end)[0]), len(lines))

    def test_nobody_reads(self):
        """It costs an index of bounded size, no line is looked at."""
        write = self.stream("a", 1)
        self.assertEqual(self.lines()[0], [])
        with mock.patch.multiple("gaffer", JOURNAL_ENTRIES=300, split_lines=None), \
                traced() as memory:
            for number in range(3000):
                write(b"%d\n" % number)
                if number % 2:
                    self.do(self.journal.exit, "a", 1, 0, 0)
            self.assertLess(memory()[0], 120000)
        self.assertEqual(self.lines(tail=2)[0], [
            "a 1 out 2999", 'a 1 exit {"exit_status": 0, "term_signal": 0}'])

    def test_lost_bytes(self):
        """From a window: what is left begins a line; with a template: all of them."""
        small, large = self.stream("small", 1, size=256), self.stream("large", 2)
        for number in range(20):
            small(b"line %03d %s\n" % (number, b"x" * 30))
            large(b"%03d\n" % number)
        reader = self.sse(offset=0)
        for _ in range(20):
            self.advance()
        events = self.events(reader)
        self.assertEqual([event for event in events if event[1] == 40],
                         [(40 + 44 * number, 40) for number in range(14)])
        self.assertEqual([text for _, text in events if text != 40][13:15], [
            "large 2 out 013", "small 1 out line 014 " + "x" * 30])
        self.assertEqual(self.lines()[1:], (self.journal.offsets[-1], 14 * 40))
        view = self.do(self.journal.view)
        cut = self.reader(view, gaffer.JournalEncoder(False, "e"), 0)
        self.assertEqual((cut.sink.losses, cut.sink.got), ([40], []))
        large.close()
        del self.streams["large", "out"], large
        self.assertEqual(self.lines()[1:], (self.journal.offsets[-1], 14 * 40 + 20 * 4))

    def test_where_a_line_begins(self):
        """Behind the one before, though another process wrote that, or it is no longer kept."""
        first, second = (self.stream("a", pid, size=256) for pid in (1, 2))
        for number in range(100):
            first(b"%d\n" % number)
        reader, wanted = self.sse("a"), []
        for end in b"\n", b"\r", b"\r\n":
            text = b"".join(b"%05d%b" % (number, end) for number in range(100))
            for place in range(0, len(text), 3):
                second(text[place:place + 3])
            wanted += ["a 2 out %05d" % number for number in range(100)]
        self.assertEqual([line for _, line in self.events(reader)], wanted)

    def test_tail(self):
        """Against all lines; what has gone is no line."""
        writes = [self.stream("a", 1, size=300), self.stream("b", 2), self.stream("b", 2, "err")]
        rng = random.Random(7)
        for number in range(200):
            rng.choice(writes)(b"".join(b"%d\n" % rng.randrange(10 ** 6)
                                        for _ in range(rng.choice((1, 2, 90)))))
            if number % 20 == 0:
                self.do(self.journal.exit, "a", 1, 0, 0)
        for which in ((), ("a",), ("b",), ("b", 2), ("b", 3)):
            lines = self.lines(*which)[0]
            for count in (0, 1, 2, 3, 10, 100, 1000, math.inf):
                wanted = lines[len(lines) - min(count, len(lines)):]
                self.assertEqual(self.lines(*which, tail=count)[0], wanted, (which, count))
        self.journal.limit = 1000               # what has gone counts not, nor takes time
        with mock.patch("gaffer.Window.resync", side_effect=[0, 0]):
            self.lines("a", tail=math.inf)
        self.assertEqual(self.lines("a", tail=math.inf), self.lines("a"))

    def test_resume(self):
        """A reader that is cut now and then, and a poll, miss nothing."""
        rng = random.Random(8)
        for size in (20, 16384) * 3:
            with mock.patch("gaffer.COALESCE_SIZE", size):
                self.setUp()
                writes = [self.stream(*which) for which in (
                    ("a", 1), ("a", 2), ("b", 3), ("b", 3, "err"))]
                events, polled, place = [(0, None)], [], 0
                whole, cut = self.sse(offset=0), self.sse(offset=0)
                for _ in range(300):
                    rng.choice(writes)(bytes(rng.choices(b"ab \r\n\n", k=rng.randrange(1, 30))))
                    if rng.random() < 0.3:
                        self.advance(0.2 * rng.random())
                    if rng.random() < 0.2:
                        events += self.events(cut)
                        self.do(cut.close)
                        cut = self.sse(offset=events[-1][0])
                        lines, place, lost = self.lines(offset=place)
                        polled += lines
                        self.assertEqual(lost, 0)
                for write in writes:
                    write.close()
                wanted = [line for _, line in self.events(whole)]
                self.assertEqual([line for _, line in events[1:] + self.events(cut)], wanted)
                self.assertEqual(polled + self.lines(offset=place)[0], wanted)


# --------------------------------------------------------------------------------------------------
# templates
# --------------------------------------------------------------------------------------------------
class PureTemplates(Case):

    DEFAULTS = {
        "args": [], "env": {}, "os_env": True, "cwd": None, "uid": None, "gid": None,
        "shell": False, "numprocesses": 1, "start": True, "detach": False,
        "redirect_output": ["stdout", "stderr"], "redirect_input": False, "custom_streams": [],
        "env_file": [], "umask": None, "nice": None, "limits": {}, "before_start": None,
        "after_stop": None, "graceful_timeout": 10, "stop_signal": "TERM", "stop_group": True,
        "schedule": None, "restart": "always", "success": [0], "restart_delay": [0.1, 10],
        "after": [], "ready": None, "flapping": None, "priority": None,
    }
    FLAG = ([True, False], [1, "true"])
    NOT_LABELS = [["stdin"], ["exit"], [".."], ["a/b"], ["x" * 65], ["a\n"], [1]]
    NOT_IDENTITIES = ["no-such-one", "", -1, 2 ** 32 - 1, True, 1.5]
    # field: (good values, bad values)
    VALUES = {
        "name": (["web:1", "a@b.c-d_E", "x" * 128, "1a", "...", "all:a", "ALL"],
                 ["", "x" * 129, "12", "..", "-a", "a/b", "a\n", "all", 5]),
        "cmd": (["true", "a 'b c' $D", "\u00e4"], ["", " \t\n", "'", "a\0b", "\ud800"]),
        "args": ([[], ["a", "", " "], "", "a 'b c'"], [5, ["a", None], "'", ["\0"]]),
        "env": ([{}, {"A": "b", "N": 1, "F": 1.5, "a b": ""}],
                [[], {"A": True}, {"": "x"}, {"A=B": "x"}, {"A": "\0"}, {1: "x"},
                 {"A": math.inf}]),
        "os_env": FLAG, "shell": FLAG, "start": FLAG, "redirect_input": FLAG, "detach": FLAG,
        "cwd": (["/", ".", None], ["/no/such/directory", PYTHON, 5, "/\0"]),
        "uid": ([None, os.geteuid(), str(os.geteuid())], NOT_IDENTITIES),
        "gid": ([None, os.getegid(), str(os.getegid())], NOT_IDENTITIES),
        "numprocesses": ([0, 1000], [-1, 1001, 1.0, True]),
        "redirect_output": ([[], ["a", "a"], ["A.b_c-1"]],
                            ["stdout", ["a", "b", "c"], *NOT_LABELS]),
        "custom_streams": ([[], ["s%d" % number for number in range(16)]],
                           ["a", ["s%d" % number for number in range(17)], ["a", "a"], ["ttin"]]),
        "graceful_timeout": ([0, 0.5, 10 ** 7], [-0.1, 10 ** 8, math.inf, math.nan, True]),
        "flapping": ([None, {}, {"attempts": 3, "window": 0.5, "retry_in": 0, "max_retry": 0}],
                     [[], {"attempts": 0}, {"attempts": 1.5}, {"window": 0}, {"retry_in": -1},
                      {"max_retry": None}, {1: 1}]),
        "env_file": ([[], ["/a", ".env"]], ["/a", [""], [1]]),
        "umask": ([None, "0", "022", "0077"], ["", "8", "0o22", "00022", 18]),
        "nice": ([None, -20, 19], [-21, 20, "1"]),
        "limits": ([{}, {"nofile": 1024, "core": 0}, {"as": "unlimited", "cpu": [5, "unlimited"]}],
                   [[], {"nofiles": 1}, {"nofile": -1}, {"nofile": "x"}, {"nofile": [1]},
                    {"nofile": ["unlimited", 1]}, {"nofile": 2 ** 62}, {"nofile": math.inf}]),
        "before_start": ([None, "a; b"], ["", " ", 5, "\0"]), "after_stop": ([None, "a"], [""]),
        "stop_signal": (["TERM", "SIGINT", 2, [["INT", 5], [15, 0.5]]],
                        ["NOPE", [], ["INT"], [["INT"]], [["INT", -1]],
                         [["INT", 1]] * 11]),
        "stop_group": FLAG,
        "schedule": ([None, "every 1.5 h", "@daily", "5 4 * * sun", "0 0 1-7/2 jan,7 *"],
                     ["every", "every 0s", "every 5", "every 116d", "@yearly", "* * * *",
                      "60 * * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "5/2 * * * *",
                      "0 0 31 2 *", 5]),
        "restart": (["always", "on-failure", "never"], ["no", True]),
        "success": ([[], [0, 3, 255], [0, "TERM", "sigint"]],
                    [0, [256], [-1], [True], ["15"], ["NOPE"]]),
        "restart_delay": ([0, 0.5, [0, 0], [1, 60.5]],
                          [-1, "5", [], [1], [2, 1], [-1, 1], [0, math.inf]]),
        "after": ([[], ["app:db", "web"]], ["db", [""], ["12"], [1]]),
        "ready": ([None, {"log": " a b "}, {"tcp": "[::1]:65535"}, {"tcp": "$HOST:$PORT"},
                   {"http": "http://127.0.0.1:$PORT/"},
                   {"exec": "test -e x"}, {"notify": True}, {"tcp": "5432", "within": 0.5}],
                  [[], {}, {"tcp": "1", "log": "x"}, {"log": ""}, {"log": "a\nb"}, {"tcp": "1#"},
                   {"tcp": 5432}, {"tcp": "0"}, {"tcp": "65536"}, {"tcp": "a.example:80"},
                   {"http": "https://localhost/"}, {"http": "http://u@localhost/"},
                   {"http": "http://localhost/\r\nA: b"}, {"exec": ""}, {"notify": False},
                   {"notify": True, "within": 0}, {"udp": "1"}]),
        "priority": ([None, -5], [1.5, "1", True]),
    }

    def check(self, **fields):
        return gaffer.check_template({"name": "a", "cmd": "true", **fields})

    def refusal(self, info):
        with self.assertRaises(gaffer.InvalidProcessInfo) as caught:
            gaffer.check_template(info)
        return str(caught.exception)

    def test_values(self):
        """Good ones come back as they were given; bad ones are refused by the field's name."""
        self.assertEqual(set(self.VALUES), set(gaffer.OPTIONS))
        self.assertEqual(self.check(), dict(self.DEFAULTS, name="a", cmd="true"))
        more = {"flapping": dict(attempts=2, window=1.0, retry_in=7.0, max_retry=5),
                "ready": {"within": 60}}
        for field, (good, bad) in self.VALUES.items():
            for value in good:
                with self.subTest(field=field, value=value):
                    filled = field in more and value is not None
                    wanted = dict(more[field], **value) if filled else value
                    self.assertEqual(self.check(**{field: value})[field], wanted)
            for value in bad:
                with self.subTest(field=field, value=value):
                    reason = self.refusal({"name": "a", "cmd": "true", field: value})
                    self.assertRegex(reason, r"\A.*field '%s'.*\Z" % field)

    def test_refusals(self):
        """All faults in one sentence, with a near match; its length is bounded. Also of fields that
        are right by themselves, and wrong together."""
        flood = {"field%d" % number: 1 for number in range(20000)}
        for fields, words in (
                ({"name": 5, "cmd": ""}, "field 'name' must be .*; field 'cmd' must not be empty"),
                ({"zzzz": 1}, "unknown field 'zzzz'; remove it"),
                ({"flapping": {"atempts": 2}}, "did you mean 'attempts'"),
                (flood, "19990 more unknown fields"), ({"x" * 10000: 1}, "unknown field 'xxx"),
                ({"detach": True, "redirect_output": ["a"]}, "'redirect_output' cannot go with"),
                ({"redirect_output": ["a"], "custom_streams": ["a"]}, "label 'a'"),
                ({"cmd": "a 'b", "args": []}, "field 'cmd' cannot be split into words"),
                ({"cmd": "\\\n"}, "field 'cmd' must not be empty"),
                ({"ready": {"log": "x"}, "redirect_output": []}, "'redirect_output' is empty"),
                ({"env": {"GAFFER_PORT_STEP": "1"}}, "has GAFFER_PORT_STEP: give it and PORT"),
                ({"env": {"GAFFER_PORT_STEP": 1, "PORT": 65500}, "numprocesses": 37},
                 "field 'env' makes 65536 the PORT of process 37"),
                *([({"uid": 54321}, "give 'gid' too")] * (os.geteuid() == 0))):
            with self.subTest(words):
                reason = self.refusal({"name": "a", "cmd": "b", **fields})
                self.assertRegex(reason, words)
                self.assertLess(len(reason), 3000)
        self.assertIn("field 'name' is required; field 'cmd' is required", self.refusal({}))
        self.assertIn("one JSON object", self.refusal([["name", "a"]]))
        self.check(cmd="it's", args=["x"])
        self.check(cmd="echo 'a", shell=True)
        self.assertEqual(self.check(detach=True)["redirect_output"], [])
        with mock.patch("os.geteuid", return_value=12345):
            self.assertIn("which only root may do", self.refusal(
                {"name": "a", "cmd": "b", "gid": os.getegid() + 1}))

    def test_most_templates(self):
        manager = gaffer.Manager([])
        self.addCleanup(manager.loop.close)
        with http_limits(TEMPLATES_MAX=2):
            self.assertTable(lambda name: manager.add_process(name, "true", start=False).name, (
                ("a", "a"), ("b", "b"), ("c", gaffer.Busy)))

    def test_words(self):
        """As a shell splits them: sh itself is asked. But a comment is none here."""
        texts = ("a  b\tc", "a 'b  c' \"d e\"", "''", "a\\ b \\'", "a\\\nb c", "a \\\n b",
                 "\"a\\\nb\"", "'a\\\nb'", "\"\\$X \\` \\\" \\\\ \\x\"", "\\\\\\\n b", "a#b")
        script = "".join("printf '%%s\\0' %s; printf '\\1'\n" % text for text in texts)
        shown = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout
        self.assertTable(gaffer.split_words, ((text, words.split("\0")[:-1]) for text, words in zip(
            texts, shown.decode().split("\1"))))
        self.assertEqual(gaffer.split_words("# a"), ["#", "a"])
        large = "x" * gaffer.MIB
        began = time.process_time()
        self.assertEqual(gaffer.split_words(large), [large])
        self.assertLess(time.process_time() - began, 1)

    def test_substitution(self):
        env = {b"A": b"1", b"B_2": b"two", b"D": b"$A", b"E": b"", b"X": b"\xff"}
        same = "x $AB ${AB} $ a$ $1 $- ${ ${A ${} ${A-b} $\u00c4 `A`".split(" ")
        self.assertTable(lambda word: gaffer.substitute(word, env), (
            *((word, word) for word in same), ("${A}B", "1B"), ("$A$A", "11"), ("$B_2.b", "two.b"),
            ("$$A", "$A"), ("$$$A", "$1"), ("$${A}", "${A}"), ("$D", "$A"), ("x${E}y", "xy"),
            ("$A\u00e4", "1\u00e4"), ("$X", "\udcff")))

    def test_env_files(self):
        for text, values in (
                ("export A = b c  \n\n# x\n  B=1 # x\nC=b#c #d\nD= # x\nE='x'#c\nF=it's \"b\"",
                 {"A": "b c", "B": "1", "C": "b#c", "D": "", "E": "x", "F": "it's \"b\""}),
                ("A='b \\n \"c\" # $D' # e", {"A": "b \\n \"c\" # $D"}),
                ('A="b\\nc\\t\\"d\\" \\\\ \\$e # f"', {"A": 'b\nc\t"d" \\ $e # f'}),
                ('A="b\nc"\r\nB=x=y\nB=2\r\n', {"A": "b\nc", "B": "2"}),
                ("A=1\nB=${A}$A-$H/${N}.\nH=x", {"A": "1", "B": "11-home/.", "H": "x"}),
                ("A=x\nB=\"${A}$H\"\nC='$A'", {"A": "x", "B": "xhome", "C": "$A"})):
            self.assertEqual(gaffer.parse_env(text, {"H": "home"}), (values, []), text)
        for text, lines, word in (
                ("A=1\n1A=2\nB=3\nexport A\n=1\n\n-", [2, 4, 5, 7], "NAME=value"),
                ('A="b\nB=1', [1], "quotes"), ("A='b'c", [1], "quotes"), ('\nA="\\q"', [2], "\\q"),
                ("A='x\ny'\nB=$(date)\nC=${B:-c}\nD=\"5$\"", [3, 4, 5], "'$'"),
                ("-\n" * 101, [*range(1, 101)], "NAME=value"),
                ("A=%s\nB=$A$A\nC=$A$B" % ("x" * (gaffer.FILE_SIZE // 4)), [3], "too long")):
            faults = gaffer.parse_env(text, {})[1]
            self.assertEqual([line for line, _ in faults], lines)
            self.assertIn(word, faults[0][1])


class PureLaunch(Case):

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.realpath(folder.name)

    def file(self, path, mode=0o755):
        path = os.path.join(self.folder, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode))
        return path

    def launch(self, cmd, **fields):
        return gaffer.Launch(gaffer.check_template({"name": "a", "cmd": cmd, **fields}))

    def program(self, cmd, **fields):
        """The path that a template is executed by, or why it cannot be launched."""
        try:
            return os.fsdecode(self.launch(cmd, **fields).program)
        except gaffer.InvalidProcessInfo as error:
            return str(error)

    def test_words(self):
        pure_environ(self, PORT="8000", HOME="/home/x y")
        self.assertTable(lambda fields: b"|".join(self.launch(**fields).argv).decode(), (
            ({"cmd": "sh -c 'a  b' \"\" c\\ d"}, "sh|-c|a  b||c d"),
            ({"cmd": "sh $PORT ${PORT}x '$PORT' $$PORT $NO_SUCH $HOME"},
             "sh|8000|8000x|8000|$PORT|$NO_SUCH|/home/x y"),
            ({"cmd": "sh one \\\n two", "args": "  "}, "sh|one|two"),
            ({"cmd": "sh", "args": ["a  'b", "$P"], "env": {"P": 5}}, "sh|a  'b|5"),
            ({"cmd": "a 'b $PORT", "shell": True}, "/bin/sh|-c|a 'b $PORT|sh"),
            ({"cmd": "echo $1", "shell": True, "args": "a '$PORT c'"},
             "/bin/sh|-c|echo $1|sh|a|$PORT c")))

    def test_env(self):
        pure_environ(self, PURE="theirs")
        self.assertEqual(self.launch("sh", env={"PURE": "mine"}).env[b"PURE"], b"mine")
        self.assertTable(lambda fields: self.launch("sh", os_env=False, **fields).env, (
            ({"env": {"\u00e4": 0.5, "GAFFER_TOKEN": "x"}, "redirect_output": []},
             {"\u00e4".encode(): b"0.5"}),
            ({"env": {"PYTHONUNBUFFERED": ""}, "custom_streams": ["in", "out"]},
             {b"PYTHONUNBUFFERED": b"", b"GAFFER_STREAMS": b"in,out"})))

    def test_port(self):
        """Only with a step of the template's own each process has its own."""
        pure_environ(self, GAFFER_PORT_STEP="1")
        for step, third in ({}, b"7000"), ({"GAFFER_PORT_STEP": "1"}, b"7002"):
            template = gaffer.check_template(
                {"name": "a", "cmd": "sh", "env": {"PORT": 7000, **step}})
            launch = gaffer.Launch(template)
            self.assertEqual(launch.env[b"PORT"], b"7000")
            launch = gaffer.Launch(template, 3)
            self.assertEqual((launch.env[b"PORT"], b"GAFFER_PORT_STEP" in launch.env),
                             (third, False))
        template["env"]["PORT"] = 65500
        self.assertRaisesRegex(gaffer.InvalidProcessInfo, "field 'env' makes 65536 the PORT",
                               gaffer.Launch, template, 37)

    def test_program(self):
        """The first in the PATH of the process, or gaffer's, seen from cwd."""
        first, second = self.file("one/tool"), self.file("sub/tool")
        plain, sub = self.file("zero/tool", 0o644), os.path.join(self.folder, "sub")
        os.makedirs(os.path.join(self.folder, "dir/tool"))
        path = ":".join(os.path.join(self.folder, each)
                        for each in ("nowhere", "dir", "zero", "one", "sub"))
        pure_environ(self, PATH=sub)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        for cmd, fields, wanted in (        # what it is, or how the sentence ends
                ("tool", {"env": {"PATH": path}}, first), ("tool x", {}, second),
                ("tool", {"os_env": False}, second), ("$TOOL", {"env": {"TOOL": first}}, first),
                *((cmd, {"cwd": "sub", "env": {"PATH": "."}}, second)
                  for cmd in ("tool", "./tool", "../sub/tool", second)),
                ("tool", {"env": {"PATH": os.path.dirname(plain)}},
                 "but %s is not executable: chmod +x it" % plain),
                ("tool", {"env": {"PATH": "/nowhere"}}, "'tool', which is not found in PATH"),
                (sub, {}, "%r, which is a directory" % sub),
                ("$TOOL", {"env": {"TOOL": "/no/tool"}}, "'/no/tool', which is not there"),
                ("./no.sh", {"cwd": sub}, "'./no.sh', but %s/no.sh is not there" % sub),
                (first, {"ready": {"tcp": "$NO_PORT"}}, "an address or localhost as its host")):
            self.assertEqual(self.program(cmd, **fields)[-len(wanted):], wanted, (cmd, fields))
        gone = tempfile.mkdtemp()
        os.chdir(gone)
        os.rmdir(gone)
        self.assertIn("'./tool', which is not there", self.program("./tool"))

    def test_env_file_size(self):
        path = os.path.join(self.folder, ".env")
        for size, error in (gaffer.FILE_SIZE, None), (gaffer.FILE_SIZE + 1, ValueError):
            with open(path, "w") as file:
                file.write("A=".ljust(size, "x"))
            self.assertTable(lambda path: gaffer.read_env_files([path], {}).clear(),
                             [(path, error)])

    def test_home(self):
        """With a user come HOME, USER, LOGNAME and SHELL, unless env names them."""
        pure_environ(self, HOME="/mine", USER="me", LOGNAME="me", SHELL="/mine/sh")
        names, root = (b"HOME", b"USER", b"LOGNAME", b"SHELL"), os.geteuid() == 0
        for entry in [pwd.getpwuid(os.geteuid()), *[pwd.getpwnam("nobody")] * root]:
            launch = self.launch("sh $HOME", uid=entry.pw_name, env={"SHELL": "/bin/x"})
            home, name = entry.pw_dir.encode(), entry.pw_name.encode()
            self.assertEqual([launch.env[each] for each in names], [home, name, name, b"/bin/x"])
            self.assertEqual((launch.argv[1], launch.uid), (home, entry.pw_uid))
        self.assertEqual(self.launch("sh").env[b"HOME"], b"/mine")
        if root:
            self.assertFalse(set(names) & set(self.launch("sh", uid=54321, gid=54322).env))

    def test_any_locale(self):
        """UTF-8 goes in and out, whatever the locale says."""
        code = """if True:
            import sys
            sys.path.insert(0, %a)
            import gaffer
            launch = gaffer.Launch(gaffer.check_template({
                "name": "a", "cmd": "./tool\\u20ac $W", "cwd": %a, "env": {"W": "\\u00e4"}}))
            assert launch.argv[1] == launch.env[b"W"] == b"\\xc3\\xa4"
            assert launch.program.endswith(b"/\\xc3\\xa4/tool\\xe2\\x82\\xac")
            """ % (HERE, os.path.dirname(self.file("\u00e4/tool\u20ac")))
        env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        subprocess.run([PYTHON, "-c", code], env=env, check=True, timeout=TIMEOUT)


# --------------------------------------------------------------------------------------------------
# policies
# --------------------------------------------------------------------------------------------------
class PurePolicies(Case):

    def test_targets(self):
        both = [("127.0.0.1", 80), ("::1", 80)]
        for kind, text, addresses, target in (
                ("tcp", "80", both, b""), ("tcp", "[::1]:80", both[1:], b""),
                ("http", "http://localhost", both, b"/"),
                ("http", "http://127.0.0.1:80?a=/b#y", both[:1], b"/?a=/b")):
            found, request = gaffer.parse_target(kind, text)
            self.assertEqual((found, request.partition(b" HTTP")[0]),
                             (addresses, target and b"GET " + target))

    def test_circles(self):
        self.assertTable(lambda after: "".join(gaffer.find_circle(
            "a", lambda name: after.get(name, ""))), (
                ({"a": "bc", "b": "d", "c": "d"}, ""), ({"a": "b", "b": "c", "c": "b"}, ""),
                ({"a": "a"}, "aa"), ({"a": "xb", "b": "xc", "c": "xa"}, "abca")))
        chain = {number: [(number + 1) % 10000] for number in range(10000)}
        self.assertEqual(len(gaffer.find_circle(0, chain.get)), 10001)

    def test_stop_order(self):
        """What is after another stops before it. A circle may be left by one that was deleted."""
        def order(templates):                   # {name: (after, priority)}
            stages = gaffer.stop_stages({name: {"after": list(after), "priority": priority}
                                         for name, (after, priority) in templates.items()})
            return " ".join(sorted(stages, key=stages.get))
        self.assertTable(order, (
            ({"x": ("d", None), "d": ("", None)}, "x d"), ({"a": ("b", 0), "b": ("a", 0)}, "a b"),
            ({"a": ("", 0), "b": ("", 1), "c": ("", None)}, "c b a"),
            ({"a": ("", 9), "b": ("a", 0)}, "b a"), ({"a": ("z", 0), "b": ("a", 0)}, "b a"),
            ({"d": ("", 0), "c": ("d", 0), "b": ("d", 1), "a": ("bc", 2)}, "a b c d")))

    def test_flapping(self):
        """What follows exits, (time, seconds lived): a start (+), a pause (-), the end (.)."""
        for flapping, exits, wanted in (
                # `attempts` exits in `window`; after `max_retry` pauses the next flap is the last
                ({"attempts": 3, "max_retry": 2}, [(n / 2, 0.5) for n in range(9)], "++-++-++."),
                # the window slides, and what was before a pause does not count after it
                ({"attempts": 3}, [(0, 0.1), (0.9, 0.1), (1.8, 0.1), (1.85, 0.1)], "+++-"),
                # what outlived the window forgives the pauses before; what did not, does not
                ({"attempts": 1, "max_retry": 2},
                 [(1, 0), (10, 0), (20, 1.001), (30, 0), (40, 0)], "----."),
                ({"attempts": 1, "max_retry": 1}, [(1, 0), (9, 1.0)], "-.")):
            info, history, signs = self.info(flapping=flapping), (), ""
            for now, lived in exits:
                action, delay, history = gaffer.after_exit(info, (1, 0), now, lived, 1, history)
                self.assertEqual(delay, 7.0 if action == "pause" else 0)
                signs += {"start": "+", "pause": "-", "stop": "."}[action]
            self.assertEqual(signs, wanted, (flapping, exits))

    def info(self, **fields):
        return gaffer.check_template(dict(fields, name="x", cmd="x"))

    def test_backoff(self):
        """Without flapping: none the first time, then 0.1 s doubling to 10."""
        for delay, flapping, failures, seconds in (
                *[([0.1, 10], None, *row) for row in (
                    (0, 0), (1, 0), (2, 0.1), (3, 0.2), (8, 6.4), (9, 10), (10 ** 9, 10))],
                (5, None, 1, 5), (5, {"attempts": 9}, 9, 5), ([1, 60], None, 1, 0),
                ([1, 60], {"attempts": 9}, 3, 2), ([0.1, 10], {"attempts": 9}, 9, 0)):
            info = self.info(restart_delay=delay, flapping=flapping)
            action, waits, _ = gaffer.after_exit(info, (1, 0), 5.0, 1.0, failures, ())
            self.assertEqual(action, "start")
            self.assertAlmostEqual(waits, seconds)

    def test_success(self):
        self.assertTable(lambda case: gaffer.succeeded({"success": case[0]}, case[1]), (
            (([0, 15, 143], (0, 15)), False), ((["int"], (0, 2)), True),
            ((["TERM"], (143, 0)), False)))

    def test_signals(self):
        self.assertTable(gaffer.parse_signal, (
            *((value, 15) for value in ("15", "TERM", "SIGTERM", "term", 15)),
            ("64", 64),
            *((value, gaffer.BadValue) for value in (
                "", "0", "-1", "+15", "32", "65", "9" * 5000, "1.0", "\u0661\u0665", "SIGSIGTERM",
                "SIG_DFL", "TERM\n", 0, True, None, 15.0, b"TERM"))))


# 200 expressions, each with the minutes from the Unix time that stands before them until its next
# five times, in UTC; the last number goes on. All were confirmed by croniter and by cronsim.
CRON_CASES = """\
1604141280; 17 2,3 2 * * 2369 60 43140 60 44580; 3 22,22 * aug,7-12 1 3555 10080; 48 * * * * 60;
27 2 8 nov 1-5,3 2379 1440; 3 12 * * 0-6/1,2-6 75 1440; 2 0 9,4-11 * * 5114 1440;
*/4 */5 6 jan * 95832 4; 0 6,4-21 * 7-11 * 12 60; 1-11 9,12 * 5-10 * 73 1; 48 1-21 * * * 60;
22-59/2 * * * 2,6-7/2 2; 3 5-18 8 * 5-6/1 15 60; 2 0-15/2 * * 7 794 120; 57 10 * * * 9 1440;
11 12 * * 1-7 83 1440; 21 20,8 * * * 573 720; 19-54 9,10 * */3 * 1; 4 */2 * */3 * 76 120;
5 1-18/1 * * * 17 60; 49 10 * * 6 1 10080; 48 12,4-18 * * * 60; 48 11-17,2 * * * 60;
2 9-19 * * 6 14 60; 1 */6 * * * 73 360; 1 */3 * * * 73 180; 1 1 * * * 853 1440; 1 0 * * * 793 1440;
*/2 */5 * 3-11 * 2; 5 11 * * * 17 1440; 0 3 * * * 972 1440; 0 11 * * * 12 1440; * 0-10,2 * * * 1;
5 * 31 * * 17 60; * 0-12,7 * * * 1; 4 * * * 6 16 60; 50 * * 10 * 2 60; 48 */2 * * * 120;
48 * */3 * * 60; * 10 * * * 1; * * * * * 1;
1803096060; 22 3 31 * * 56121 87840 87840 44640 87840; 0 0 31 * * 55919 87840 87840 44640 87840;
24,33 0-19/1,18 * feb * 23 9 51 9 51; 47 9,21 * jan */2 453946 720 720 720 2160;
4,10 * * * * 3 6 54 6 54; 12-58 5 * 1-9/1,jan * 71 1; 2 22 30,7 * sun 2521 10080;
* 6,4-7/5 9 */2 0 21599 1; 26 4 * * sun-sat 25 1440; 2-11 4-9,8 * 9,2-3/2 * 1;
53 0-13/1 * feb * 52 60; 5 * * * * 4 60; 12 8 * feb,5 * 251 1440; 32 1,4-19/1 * * * 31 60;
*/2 */2 */4 * * 1199 2; 7 0-17 * * * 6 60; 3-29 6 * 2 sun 1562 1; 1 4-19 13-24 2 mon 60;
0 5-9 */2 * * 1499 60; 32 * * 2 4-7/2 31 60; 0 4-20 * feb * 59 60; 8 5 7 * 7 1507 10080;
0-10 * 7 4 * 65999 1; 7 5 9-29 * * 66 1440; 50,50 * * 2 * 49 60; 16 */4 * 2 * 15 240;
*/12 * * 2 * 11 12; 1 4-15,16 * * * 60; * * 20 2-9/3 2,4 1; 6 4 * * 6 5 10080; 2 2-20 * 2 * 1 60;
12 * * 2 * 11 60; * */2 * * * 1; 9 4 * * * 8 1440; 1-51/3 * * * * 3; 1 */4 * * * 240;
2 * * * * 1 60; 3 * * * * 2 60; 1 * * * * 60; * 4 * * * 1;
1673083920; 25 23 27 6,6,12,12 * 247073 263520 263520 263520 262080;
36 17 31 mar-apr * 120004 527040 525600; 24 1 31 * * 34072 84960 87840 87840 44640;
1 16 9,16 8 3 298469 10080; 0-5,2 7 11-14/7 * * 5608 1; 0 3-22,6-14/3 * * * 28 60;
2 * 3,1-6/5 * 4-6 30 60; 34 */2 5-8/1 * * 62 120; 32 * * * * 60; 16 2 * * 4,4 6764 10080;
45 4-8 * jan * 1153 60; 43 2-21,4 * 1 * 11 60; * 7-9,1 * * 2-6/1 1; 0 8-20 24 * sat 28 60;
41 */3 * 1-7 * 9 180; 34 9,2-23 * * * 2 60; 1 0 * * 1-7 869 1440; 0 0 * * 0 868 10080;
51,51 * * * 6 19 60; 42 */3 7 * * 10 180; 0 */2 * * * 28 120; 1 */2 * * * 29 120;
5 */2 * * * 33 120; 2 */2 * * * 30 120; 0 0 * * * 868 1440; 4 */2 * * * 32 120; 0 * * */2 * 28 60;
36 9 * * * 4 1440; 41 9 * * * 9 1440; */2 9,6 * */3 * 2; 2 * */2 1 * 30 60; 32 8-19 * * * 60;
32 */3 * * * 180; * * * 1,3-6 * 1; 32 * * * */2 60; 6 * * 1 * 34 60; 34 * * * * 2 60;
1 * * 1 * 29 60; */3 9 * * * 1 3; */2 * * * * 2;
1748882220; 26 5 3 6 * 769 525600 525600 527040 525600; 2 7 3-26/2,4-21 */3 7 44065 1440;
19 1 3 * * 522 43200 44640 44640 43200; 0 5 15,6 12 0-6/1 261383 1440; 28 14,2 * 7,6-8/1 * 591 720;
1 7,2-11/1 */6 * * 6324 60; 0 0 29 2 * 1441883 2103840; */4 * 6,6-8 */3 * 47963 4;
5 3,2-11 3-23 * 3 568 60; */2 4-21,3 * 4-7/1 * 1 2; 35 1-21/1,18 * * * 58 60; 37 * * * * 60;
0 */3 13 */2 * 58043 180; 0 10,3-9 2-4 * * 623 60; 16 0-9,6 * * 2-5 459 60; * 0-20 * * * 1;
0 */2 * */2 * 40763 120; */11 */5 3 jun * 443 11; 15-24/2 20 * 6 * 218 2; 8,8 * * * * 31 60;
38 1-23/2 * 6 * 61 120; 26 7 * * 1-7 889 1440; * * */2 */2 * 40763 1; 44 6-21,10 2 * * 7 60;
*/7 8 */2 * 0-5 923 7; 2 */4 */2 * * 445 240; 4 6-23 * 4-7 * 27 60; 16 17 * 6 * 39 1440;
*/3 * * 6 */2 443 3; * */3 */2 * * 443 1; 3 0-4 * * * 446 60; 0 */6 * * * 83 360;
0 7 * * * 863 1440; 1 17 * * * 24 1440; 0 4 * * * 683 1440; 2 1 * * * 505 1440; 41 * 2 2-8 * 4 60;
37 5-21 * * * 60; * 0-17 * * * 1; * 16 * * * 1;
1765463640; 26 9 17,17 * * 8332 44640 44640 40320 44640;
0 0 1 1 * 29366 525600 525600 527040 525600; 38-40/9,10-50 */2 * 2-12/2,mar * 1;
1 16 16 * * 7287 44640 44640 40320 44640; 44 * 7 12 4-7/2 10 60;
13 16 11 * * 99 44640 44640 40320 44640; 8 15,15 11-22/1 6-8 * 262114 1440; * 0-2/3 * */2 * 29366 1;
36,6 0-14 * 2,3-4 */2 74012 30; 45 3-9 1-15,1 */3 * 29591 60; * 0,2 * 7-12,6-9/2 * 566 1;
5 23,23 * * sun 4831 10080; 2 0-9,2 * apr,12 * 568 60; 10 0-4/1 21 * * 13536 60;
*/2 2,12 1,8 * * 29486 2; 20 7,8-23/1 * * * 46 60; 6 2 * */2 6 32372 10080; 0 * * * * 26 60;
22 1,13 * 12 * 648 720; 3 16 8,18 * 4 89 10080; 35 5-20/1 * * 4-5 1 60; */3 1,3 * * * 626 3;
2 0 * 2-8 * 74008 1440; 14 */5 * dec 5 580 300; 6 2 * * fri 692 10080; 3 1,1 * * * 629 1440;
0 2 7-25 * 2 686 1440; 5 3 2-29 * * 751 1440; 5 */2 * 3-12 * 91 120; 5 2-19 12 * * 691 60;
* 3-6/5 * 12 * 746 1; 36 5-23/1 * * * 2 60; 4 1,1 * * * 630 1440; * 4-18/1 * 12,9 * 1;
2 */4 * * * 88 240; 0 1 * * * 626 1440; * 14 * * 0-5/2,5 1; */2 1 * * * 626 2; */2 */2 * * * 2;
* 14,9 * * * 1;
"""


class PureSchedules(Case):

    def setUp(self):
        super().setUp()
        self.addCleanup(time.tzset)
        pure_environ(self, TZ="UTC")
        time.tzset()

    def test_cron(self):
        count = 0
        for case in CRON_CASES.rstrip(";\n").split(";"):
            *fields, runs = case.split(None, 5)
            if not fields:
                start = runs
                continue
            schedule, due = gaffer.Schedule(" ".join(fields)), int(start)
            now, runs = due + 30, runs.split()
            for minutes in runs + runs[-1:] * (5 - len(runs)):
                due += 60 * int(minutes)
                now = schedule.next_time(now)
                self.assertEqual(now, due, (start, case))
                count += 1
        self.assertEqual(count, 1000)

    def test_next_times(self):
        """Up to five, no further than a year ahead."""
        self.assertTable(lambda text: gaffer.Schedule(text).next_times(0.5), (
            ("every 90s", [90.5, 180.5, 270.5, 360.5, 450.5]), ("0 0 29 2 *", [68169600])))
        self.assertTable(lambda text: gaffer.Schedule(text).next_time(0.5), (
            ("every 2.5 m", 150.5), ("every 1h", 3600.5), (" every 2d ", 172800.5)))

    def test_summer_time(self):
        """A time that does not exist runs at the next that does; one that exists twice, once."""
        berlin, york = "Europe/Berlin", "America/New_York"
        for zone, text, year, now, times in (
                # forward, 2027-03-28 02:00 -> 03:00, and 2027-03-14
                (berlin, "30 2 * * *", "2027-03-", "27T12:00", "28T03:00+02 29T02:30+02"),
                (york, "@hourly", "2027-03-", "14T00:30", "14T01:00-05 14T03:00-04 14T04:00-04"),
                # back, 2027-10-31 03:00 -> 02:00, and 2027-11-07 02:00 -> 01:00
                (berlin, "30 2 * * *", "2027-", "10-30T12:00", "10-31T02:30+02 11-01T02:30+01"),
                (berlin, "0 * * * *", "2027-10-", "31T00:30",
                 "31T01:00+02 31T02:00+02 31T03:00+01 31T04:00+01"),
                (york, "15,45 1 7 11 *", "202", "7-11-06T12:00",
                 "7-11-07T01:15-04 7-11-07T01:45-04 8-11-07T01:15-05"),
                # over midnight, as in Nuuk and Havana
                ("XXX2YYY,M3.5.0/-1,M10.5.0/0", "30 23 * * *", "2027-03-", "27T12:00",
                 "28T00:00-01 28T23:30-01"),
                ("XXX5YYY,M3.2.0/0,M11.1.0/1", "*/30 0 * * *", "2027-11-", "06T12:00",
                 "07T00:00-04 07T00:30-04 08T00:00-05")):
            os.environ["TZ"] = zone
            time.tzset()
            now = time.mktime(time.strptime(year + now, "%Y-%m-%dT%H:%M"))
            for when in times.split():
                now = gaffer.Schedule(text).next_time(now)
                found = time.strftime("%Y-%m-%dT%H:%M%z", time.localtime(now))[:-2]
                self.assertEqual(found, year + when, (zone, text))


# --------------------------------------------------------------------------------------------------
# http codec
# --------------------------------------------------------------------------------------------------
def pure_request(*lines, target="/", method="GET", version="1.1", host="localhost"):
    """A Request of further header lines."""
    head = ["%s %s HTTP/%s" % (method, target, version)]
    hosts = [] if host is None else ["Host: " + host]
    return gaffer.parse_head("\r\n".join([*head, *hosts, *lines]).encode("latin-1"))


class PureHead(Case):

    def test_parts(self):
        request = gaffer.parse_head(
            b"POST /a/b%20c?x=1&y= HTTP/1.1\r\nHost: localhost\r\nX-One:  a b \t\r\nx-two:\r\n"
            b"X-ONE: \xe9\r\nCookie: a=1\r\ncookie: b=2\r\n!#$%&'*+-.^_`|~09aZ: {}:")
        self.assertEqual(request.headers, {
            "host": "localhost", "x-one": "a b, \xe9", "x-two": "", "cookie": "a=1; b=2",
            "!#$%&'*+-.^_`|~09az": "{}:"})      # cookies: RFC 6265 section 5.4
        self.assertEqual(
            (request.method, request.target, request.query, request.path, request.body),
            ("POST", "/a/b%20c?x=1&y=", {"x": "1", "y": ""}, "/a/b%20c", b""))
        self.assertTable(lambda version: pure_request(version=version).version, (
            ("1.1", (1, 1)), ("1.0", (1, 0)), ("1.9", (1, 1))))

    def test_first_lines(self):
        longest = b"GET /" + b"a" * (gaffer.TARGET_SIZE - 1)
        self.assertTrue(gaffer.parse_head(longest + b" HTTP/1.1\r\nHost: a"))
        self.assertTable(lambda line: gaffer.parse_head(line + b"\r\nHost: localhost"), (
            *((line, gaffer.BadRequest) for line in (
                b"", b"GET /", b"GET  / HTTP/1.1", b" GET / HTTP/1.1", b"GET\t/ HTTP/1.1",
                b"G(T / HTTP/1.1", b"GET /\xe9 HTTP/1.1", b"GET / http/1.1", b"GET / HTTP/1.10",
                b"GET / HTTP/1.1\r", b"GET /a#b HTTP/1.1", b"GET * HTTP/1.1",
                b"GET ftp://a/ HTTP/1.1")),
            *((b"GET / HTTP/" + text, gaffer.BadRequest) for text in (b"2.0", b"11.1")),
            (longest + b"a HTTP/1.1", gaffer.UriTooLong)))

    def test_bad_header_lines(self):
        for line in (b"X", b": y", b"X : y", b" X: y", b"X: y\r\n z", b"X: a\rb", b"X: a\nb",
                     b"X: a\0b", b"X: \x7f", b"X(: y", b"X\xe9: y"):
            for head in b"Host: localhost\r\n" + line, line + b"\r\nHost: localhost":
                with self.subTest(head), self.assertRaises(gaffer.BadRequest):
                    gaffer.parse_head(b"GET / HTTP/1.1\r\n" + head)

    def test_repeated(self):
        for name in ("Host Content-Length Transfer-Encoding Content-Type Authorization Origin "
                     "Last-Event-ID Expect").split():
            with self.subTest(name), self.assertRaisesRegex(gaffer.BadRequest, "twice"):
                pure_request(name + ": 1", name.lower() + ": 1", host=None)
        lines = ["X-%d: y" % number for number in range(gaffer.HEADERS_MAX - 1)]
        self.assertEqual(len(pure_request(*lines).headers), gaffer.HEADERS_MAX)
        self.assertRaises(gaffer.HeadersTooLarge, pure_request, *lines, "Y: z")

    def test_host(self):
        """It is required; the authority of an absolute target counts (RFC 9112 section 3.2.2)."""
        def found(case):
            target, host, version = case
            request = pure_request(target=target, host=host, version=version,
                                   method="OPTIONS" if target == "*" else "GET")
            return request.headers.get("host"), request.target
        bad, url = gaffer.BadRequest, "http://a/"
        self.assertTable(found, (
            ((url, None, "1.1"), bad), (("/", None, "1.0"), (None, "/")),
            ((url, None, "1.0"), ("a", "/")),
            *(((target, "b", "1.1"), answer) for target, answer in (
                ("*", ("b", "*")), ("http://x.example/y?z", ("x.example", "/y?z")),
                ("HTTP://A:1", ("A:1", "/")), ("https://a?b", ("a", "/?b")),
                ("http:///x", ("", "/x")))),
            *(((url, host, "1.1"), bad) for host in ("", "a/b", "user@a", "a:b"))))

    def test_segments(self):
        self.assertTable(gaffer.split_path, (
            ("/", []), ("/a/", ["a"]), ("//", [""]),
            ("/a%2Fb", ["a/b"]), ("/%C3%A4", ["\xe4"]), ("/%252F+", ["%2F+"]), ("/%00", ["\0"]),
            *((path, gaffer.BadRequest) for path in ("/%4", "/%ff", "/%ED%A0%80"))))

    def test_query(self):
        self.assertTable(lambda query: pure_request(target="/?" + query).query, (
            ("", {}), ("a", {"a": ""}), ("a=b=c&d=e;f", {"a": "b=c", "d": "e;f"}),
            ("a=%26%3d+x", {"a": "&= x"}), ("&&a=1&", {"a": "1"}), ("a?b=%C3%A4", {"a?b": "\xe4"}),
            ("_=1&_=2", {"_": "2"}), *((query, gaffer.BadRequest) for query in (
                "a=1&a=1", "&".join("x%d=1" % number for number in range(101)), "a=%4", "%E4=1"))))

    def test_json(self):
        def parse(body):
            request = pure_request(method="POST")
            request.body = body
            return request.json()
        self.assertTable(parse, (
            (b' {"a": [1, 2.5, null]}\n', {"a": [1, 2.5, None]}), (b'"\xc3\xa4"', "\xe4"),
            *((body, gaffer.BadRequest) for body in (
                b"", b"{} {}", b'{"a": NaN}', b'"\xe4"', b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
                b"[" * 200000, b"9" * 10000 + b"x", b'[{"b": {"a": 1, "c": 2, "a": 3}}]'))))


class PureReading(Case):
    """Heads and bodies from a file, however few bytes a read gives."""

    HEAD = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"

    def assertRead(self, read, rows):
        """`rows` are (bytes, what read(file) returns or raises)."""
        self.assertTable(lambda wire: read(io.BufferedReader(io.BytesIO(wire), 1)), rows)

    def test_requests(self):
        def read(file):
            found = []
            with contextlib.suppress(EOFError):
                while True:
                    found.append(gaffer.read_request(file))
            self.assertTrue(all((each.method, each.target, each.headers) ==
                                ("GET", "/a", {"host": "x"}) for each in found))
            return len(found)
        head, most = self.HEAD, b"\r\n" * gaffer.EMPTY_LINES_MAX
        self.assertRead(read, ((b"", 0), (head * 3 + b"G", 3), (head[:-1], 0), (b"\r", 0),
                               ((most + head) * 2 + b"\r\n", 2)))

    def test_bad_heads(self):
        bad, end = gaffer.BadRequest, b"\r\n\r\n"
        head = b"GET / HTTP/1.1\r\nHost: x\r\nX: ".ljust(gaffer.HEAD_SIZE - 4, b"y")
        line = b"GET /".rjust(gaffer.REQUEST_LINE_SIZE - 8201, b"M") + b"a" * 8191 + b" HTTP/1.1"
        self.assertRead(lambda file: bool(gaffer.read_request(file)), (
            (b"\n" + self.HEAD, bad), (b"a\nb", bad), (b"\r\r\n\r\n", bad),
            (b"GET / HTTP/1.1\r\nHost: x\nX: y" + end, bad), (b"GET / HTTP/1.1" + end, bad),
            (b"\r\n" * (gaffer.EMPTY_LINES_MAX + 1) + self.HEAD, bad), (head + end, True),
            (head + b"y" + end, gaffer.HeadersTooLarge), (line + b"\r\nHost: x" + end, True),
            (b"MM" + line + b"\r\nHost: x" + end, gaffer.UriTooLong)))

    def test_body_length(self):
        def length(lines):
            return gaffer.body_length(pure_request(*lines.split("\n"), method="POST"), 1000)
        size, coding, bad = "Content-Length: ", "Transfer-Encoding: ", gaffer.BadRequest
        self.assertTable(length, (
            ("X: y", 0), (size + " 0012\t", 12), (size + "1000", 1000), (coding + "CHUNKED", None),
            (size + "1\nExpect: 100-CONTINUE", 1), ("Content-Encoding: identity", 0),
            (size + "0" * 5000 + "12", 12), (size + "1001", gaffer.TooLarge),
            (size + "9" * 5000, gaffer.TooLarge), ("Expect: x", gaffer.BadRequest),
            ("Content-Encoding: gzip", gaffer.GafferError),
            (size + "5\n" + coding + "chunked", bad),
            *((size + text, bad) for text in ("", "-1", "+5", "5, 5", "0x5", "\xb2")),
            *((coding + text, bad) for text in ("gzip, chunked", "chunked, chunked", ""))))
        self.assertRaises(bad, gaffer.body_length, pure_request(
            coding + "chunked", method="POST", version="1.0"), 1000)

    def test_chunked_bodies(self):
        line, most = b"X: " + b"y" * 93 + b"\r\n", gaffer.CHUNK_LINE_SIZE
        fits, end = gaffer.CHUNK_EXTRAS_SIZE // len(line), b"0\r\n\r\n"
        self.assertRead(lambda file: (gaffer.read_body(file, None, 1000), file.read()), (
            (end, (b"", b"")),
            (b"3\r\nabc\r\n2\r\n\r\n\r\n" + end + b"GET /", (b"abc\r\n", b"GET /")),
            (b"A\r\n0123456789\r\n00a\r\n0123456789\r\n" + end, (b"0123456789" * 2, b"")),
            (b"1 \t;name=\"a b\"\r\nx\r\n1 \r\ny\r\n00;last\r\n\r\n", (b"xy", b"")),
            (b"0\r\nA: b\r\nC: d\r\n\r\nmore\r\n", (b"", b"more\r\n")),
            (b"1\r\na\r\n" * 1000 + end, (b"a" * 1000, b"")),
            (b"0\r\n" + line * fits + b"\r\n", (b"", b"")),
            (b"1;" + b"x" * (most - 2) + b"\r\na\r\n" + end, (b"a", b"")),
            *((wire, gaffer.BadRequest) for wire in (
                b"\r\n", b"-1\r\n", b"0x1\r\n", b" 1\r\n", b"1\na\r\n" + end, b"0\r\n\n",
                b"1\r\na\n" + end, b"1\r\nab\r\n" + end, b"1;a\0b\r\n", b"1;a\rb\r\n",
                b"1;" + b"x" * (most - 1) + b"\r\n",
                b"0\r\nA : b\r\n\r\n", b"0\r\nA: b\nC: d\r\n\r\n",
                b"0\r\n" + line * (fits + 1) + b"\r\n",
                b"1;" + b"x" * 92 + b"\r\na\r\n" + (b"1;" + b"x" * 99 + b"\r\na\r\n") * 81)),
            *((wire, gaffer.TooLarge) for wire in (
                b"3e9\r\n", b"3e8\r\n" + b"a" * 1000 + b"\r\n1\r\n", b"1" * 200 + b"\r\n")),
            *((wire, EOFError) for wire in (
                b"", b"1", b"1\r\na", b"1\r\na\r\n", b"0\r\n", b"0\r\nA: b\r\n"))))

    def test_memory_of_chunks(self):
        file = io.BytesIO(b"2\r\nab\r\n" * 3000 + b"0\r\n\r\n")
        with traced() as memory:
            self.assertEqual(gaffer.read_body(file, None, 100000), b"ab" * 3000)
            self.assertLess(memory()[1], 30000)


class PureResponse(Case):

    def test_encode(self):
        self.assertTable(lambda headers: gaffer.encode_head(299, headers), (
            ([("A", "\xe9"), ("N", 5)], b"HTTP/1.1 299 Unknown\r\nA: \xe9\r\nN: 5\r\n\r\n"),
            *(([header], ValueError) for text in ("a\r\nB: x", "a\nb", "\r", "\0", "\u560a")
              for header in ((text, "x"), ("x", text)))))
        response = gaffer.json_response({"a": "\xe9"}, 404, [("X", "y")])
        http, client = gaffer.HttpHandler([]), mock.Mock()
        head, body = http.answer(client, None, response, False).split(b"\r\n\r\n")
        self.assertEqual(body, b'{"a": "\\u00e9"}\n')
        self.assertEqual({line for line in head.split(b"\r\n") if b"Date" not in line}, {
            b"HTTP/1.1 404 Not Found", b"Content-Type: application/json",
            b"Cache-Control: no-store",
            b"X-Content-Type-Options: nosniff", b"X: y", b"Connection: close",
            b"Content-Length: 16"})
        request = pure_request(method="HEAD")
        self.assertEqual(http.answer(client, request, response, False), head + b"\r\n\r\n")

    def test_prefers_html(self):
        browser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
        self.assertTable(lambda accept: bool(gaffer.prefers_html(accept)), (
            *((accept, True) for accept in ("TEXT/*", browser, "text/html ; q=0.9 , */* ; q=0.2")),
            *((accept, False) for accept in (
                "", "*/*", ",", "text/html;q=0", "text/html;q=x", "text/html, application/json",
                "text/html;q=0.5, */*;q=0.8"))))


class PureAccess(Case):

    def test_host(self):
        access = gaffer.Access(hosts=["Box.example.org.", "b"])
        forbidden, bad = gaffer.Forbidden, gaffer.BadRequest
        for answer, hosts in (
                (None, "LocalHost:1 localhost. a.b.localhost:80 127.0.0.1:80 10.1.2.3 [::1] "
                       "[::ffff:1.2.3.4]:5000 BOX.example.org.:80 b:65535"),
                (forbidden, "example.com:5000 0.0.0.0 [::]:80 [0:0:0:0:0:0:0:0] [::ffff:0.0.0.0] "
                            "localhost.example.com xlocalhost . 2130706433 127.1 0177.0.0.1 "
                            "x.box.example.org 127.0.0.1.. " + "e" * 60000),
                (bad, ":5000 a@b localhost:x localhost:65536 [::1 ::1 [] [1.2.3.4] [::1]x "
                      "localhost:80:80 [fe80::1%25eth0] localhost/ l\xf6calhost b:" + "9" * 5000)):
            self.assertTable(lambda host: access.check_host(pure_request(host=host)),
                             ((host, answer) for host in hosts.split()))
        unix = pure_request(host="unix")        # no page can reach it, and clients send any name
        unix.client = "unix"
        self.assertTable(access.check_host, (
            (pure_request(host=""), bad), (pure_request(host="localhost, a.example"), bad),
            (pure_request(host=None, version="1.0"), None), (unix, None),
            (pure_request(target="http://evil.example/"), forbidden)))

    def test_origin(self):
        """Default ports are filled in; TLS may end at a proxy that passes Host."""
        plain, every = gaffer.Access(), gaffer.Access(origins=["*"])
        more = gaffer.Access(origins=["https://App.example/", "http://two.example:8080",
                                      "https://x:443"], hosts=["gaffer.test"])
        for access, host, yes, no in (
                (plain, "box:5000", "https://localhost http://127.0.0.1:1 https://[::1] "
                 "HTTP://LocalHost:3000 http://box:5000 https://box:5000",
                 "null http://example.com http://box http://box:5001 ws://box:5000 localhost "
                 "http://localhost.example.com http://localhost/ http://127.0.0.2 file:// "
                 "http://localhost:80@evil.example http://foo.localhost http://::1"),
                (more, "box:80", "https://APP.example http://two.example:8080 http://localhost:1 "
                 "http://box https://x",
                 "http://app.example https://app.example:444 http://two.example https://box"),
                (more, "box", "http://box:80 https://box https://box:443",
                 "http://box:443 http://x:443"),
                (more, "box:443", "https://box", ""),
                (more, "127.0.0.1:5000", "https://gaffer.test http://gaffer.test:80",
                 "https://gaffer.test:8443 http://10.0.0.9"),
                (every, "box", "null https://x:1", "")):
            for origin in yes.split() + no.split() + [""] * (access is plain):
                request = pure_request("Origin: " + origin, host=host, method="POST")
                allowed = origin in yes.split()
                self.assertTable(access.check_origin, [
                    (request, None if allowed else gaffer.Forbidden)])
                cors = dict(access.cors(request))
                self.assertEqual(cors["Vary"], "Origin", (origin, host))
                echoed = cors.get("Access-Control-Allow-Origin")
                self.assertEqual(echoed, origin if allowed else None)
        plain.check_origin(pure_request())
        self.assertEqual(plain.cors(pure_request()), [])
        self.assertRaises(gaffer.StartError, gaffer.Access, origins=["x"])

    def test_preflight(self):
        access = gaffer.Access()
        request = pure_request("Origin: http://localhost:3000", method="OPTIONS")
        self.assertEqual(dict(access.cors(request)), {
            "Vary": "Origin", "Access-Control-Allow-Origin": "http://localhost:3000",
            "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "X-Requested-With, X-HTTP-Method-Override, "
            "Content-Type, Accept, Authorization, Last-Event-ID",
            "Access-Control-Max-Age": "86400",
            "Access-Control-Expose-Headers": "Gaffer-Offset, Gaffer-Dropped, Gaffer-Ended"})
        self.assertEqual(access.cors(pure_request(method="OPTIONS")), [])

    def test_token(self):
        """Bearer or Basic. The time of a refusal does not tell how much was right."""
        access, secret = gaffer.Access(token="s\xe9cret:\xe0"), "s\xe9cret:\xe0".encode()
        wire = secret.decode("latin-1")

        def basic(data):
            return "Basic " + base64.b64encode(data).decode()

        def check(text):
            with mock.patch("hmac.compare_digest", wraps=hmac.compare_digest) as compare:
                try:
                    access.check_token(pure_request("Authorization: " + text))
                finally:
                    self.assertEqual(compare.call_args[0][1], secret)
        self.assertTable(check, (
            *((text, None) for text in (
                "Bearer " + wire, "BEARER   " + wire, "basic" + basic(b"user:" + secret)[5:])),
            *((text, gaffer.GafferError) for text in (
                "", "Bearer ", wire, "Token " + wire, "Bearer " + wire[:-1], basic(secret),
                basic(b"user:"), "Basic \xe9", basic(b"x:" + secret) + "!"))))
        self.assertRaises(gaffer.GafferError, access.check_token, pure_request())
        for token in "", " ", "secret\n":       # it must not stand open, nor be closed to all
            self.assertRaises(ValueError, gaffer.Access, token)

    def test_site(self):
        """Site, mode, destination."""
        access, everybody = gaffer.Access(), gaffer.Access(origins=["*"])
        for answer, rows in (
                (gaffer.Forbidden, (
                    "GET cross-site no-cors image", "GET cross-site navigate iframe",
                    "HEAD cross-site no-cors empty", "POST cross-site navigate document")),
                (None, ("GET cross-site navigate document", "GET cross-site navigate", "GET",
                        "POST same-origin cors empty", "GET same-site no-cors",
                        "GET cross-site ? document"))):
            for method, *rest in map(str.split, rows):
                lines = ["Sec-Fetch-%s: %s" % pair for pair in zip(("Site", "Mode", "Dest"), rest)]
                request = pure_request(*lines, method=method)
                self.assertTable(access.check_origin, ((request, answer), (pure_request(
                    *lines, "Origin: http://[::1]", method=method), None)))
                everybody.check_origin(request)


# --------------------------------------------------------------------------------------------------
# lines, characters, server-sent events
# --------------------------------------------------------------------------------------------------
def pure_bytes(rng, count, broken=True):
    """Random text with line ends of all kinds, and if `broken` what is not UTF-8."""
    pieces = [text.encode() for text in (
        "abc", "\n", "\r", "\r\n", "\xe9", "\u20ac", "\U0001f600", " ", "\0", "\x0b", "\x1c",
        "\x85", "\u2028", "data: ", ":", "id: 5")]
    if broken:
        pieces += [b"\x80", b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\xaf",
                   b"\xed\xa0\x80", b"\xe2\xc0", b"\xf5"]
    return b"".join(rng.choices(pieces, k=count))


class PureSse(Case):

    def test_format(self):
        encoder = gaffer.SseEncoder("stdout", "e1")
        self.assertEqual(encoder.encode(b"one\ntwo\r\n\nrest", 100, None, gaffer.NORMAL, 1000), (
            b"id: 104@e1\nevent: stdout\ndata: one\n\nid: 109@e1\nevent: stdout\ndata: two\n\n"
            b"id: 110@e1\nevent: stdout\ndata: \n\n", 10))
        self.assertEqual(encoder.dropped(5, 7, restarted=True), b'id: 7@e1\nevent: dropped\n'
                         b'data: {"bytes": 5, "restarted": true}\n\n')
        self.assertEqual(encoder.exit(7, {"pid": 1}),
                         b'id: 7x@e1\nevent: exit\ndata: {"pid": 1}\n\n')
        # a line at least as long as `piece` does not wait for its end
        self.assertTable(lambda data: encoder.encode(data, 0, None, gaffer.NORMAL, 64)[1], (
            (b"a\n" + b"x" * 64, 66), (b"a\r\n" + b"x" * 63, 3), (b"\xc3\xa9\n" + b"x" * 64, 67)))

    def test_pieces(self):
        """However it comes: each byte in one event that its id tells, one a line unless it is
        flushed, no character cut."""
        rng = random.Random(10)
        for broken, flush, _ in itertools.product((True, False), (True, False), range(300)):
            data = pure_bytes(rng, rng.randrange(40), broken)
            ends = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(20)))
            encoder, place, wire = gaffer.SseEncoder("out", "e"), 0, b""
            piece = rng.choice((16, 1 << 20)) if flush else 1 << 20     # a line of 16 bytes is cut
            for end in [*ends, None]:
                mode = gaffer.FINAL if end is None else rng.choice(
                    (gaffer.NORMAL, gaffer.FLUSH if flush else gaffer.NORMAL))
                before = data[place - 1] if place else None
                payload, consumed = encoder.encode(data[place:end], place, before, mode, piece)
                wire += payload
                place += consumed
            begin, lines = 0, []
            for number, _, line in pure_sse(wire):
                segment = data[begin:number]
                if data[:begin][-1:] == b"\r" and segment[:1] == b"\n":
                    segment = segment[1:]       # an id may stand between a CR and its LF
                lines.append(re.sub(rb"(\r\n|\r|\n)\Z", b"", segment))
                self.assertEqual(lines[-1].decode("utf-8", "replace").encode(), line, (data, ends))
                self.assertTrue(broken or "\ufffd".encode() not in line)
                begin = number
            self.assertIn((place, data[begin:]), ((len(data), b""), (len(data), b"\n")))
            self.assertTrue(flush or lines == data.splitlines())


# --------------------------------------------------------------------------------------------------
# websocket codec
# --------------------------------------------------------------------------------------------------
def pure_decode(pieces, limit=1000):
    """The events of a websocket's bytes, which come in pieces."""
    decoder, events = gaffer.WebSocketDecoder(limit), []
    for piece in pieces:
        events += decoder.feed(piece)
    return events


class PureWebSocket(Case):

    frame = staticmethod(ws_frame)

    def test_accept(self):
        """The example of RFC 6455 section 1.3, then one line of it replaced."""
        lines = ["Upgrade: websocket", "Connection: keep-alive, Upgrade",
                 "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        bad, upgrade, key = gaffer.BadRequest, gaffer.UpgradeRequired, "Sec-WebSocket-Key: "

        def accept(case):
            number, line, options = case
            return gaffer.websocket_accept(pure_request(
                *lines[:number], *line, *lines[number + 1:], **options))
        for answer, cases in (
                ([("Upgrade", "websocket"), ("Connection", "Upgrade"),
                  ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")],
                 ((0, "Upgrade: h2c, WebSocket"), (1, "Connection: UPGRADE"))),
                (upgrade, ((0, "X: y"), (0, "Upgrade: websockets"), (1, "Connection: close"),
                           (2, "X: y"), (2, "Sec-WebSocket-Version: 8"))),
                (bad, ((3, "X: y"), *((3, key + text) for text in (
                    "", "dGhl", "dGhlIHNhbXBsZSBub25jZQ==!", "dGhlIHNhbXBsZSBub25jZTEyMw==",
                    "\xe9"))))):
            self.assertTable(accept, (((at, [line], {}), answer) for at, line in cases))
        self.assertTable(accept, (((4, [], {"method": "POST"}), bad),
                                  ((4, [], {"version": "1.0"}), bad)))

    def test_frames(self):
        for size, head in ((125, b"\x82\x7d"), (126, b"\x82\x7e\x00\x7e"),
                           (65535, b"\x82\x7e\xff\xff"), (65536, b"\x82\x7f\0\0\0\0\0\x01\0\0")):
            self.assertEqual(gaffer.frame(2, b"x" * size), head + b"x" * size)
        self.assertTable(lambda text: gaffer.close_frame(1013, text), (
            ("", b"\x88\x02\x03\xf5"), ("dropped 5", b"\x88\x0b\x03\xf5dropped 5"),
            ("x" * 200, b"\x88\x7d\x03\xf5" + b"x" * 123),
            ("x" + "\u20ac" * 200, b"\x88\x7b\x03\xf5x" + "\u20ac".encode() * 40)))

    def test_messages(self):
        """Text cut inside characters, control frames between fragments."""
        data = "a\xe9\u20ac\U0001f600z".encode()
        wire = ((1, data), (2, b"\xff\0"), (1, b""), (10, b""), (9, b"x" * 125),
                (1, data[:2], False), (9, b"p"), (0, b"", False), (0, data[2:5], False), (10, b"q"),
                (0, data[5:8], False), (0, data[8:]), (2, b"", False), (0, b"\xff\0"),
                (8, b"\x03\xe8bye \xc3\xa9"), (9, b"never"))
        wanted = [("text", data.decode()), ("binary", b"\xff\0"), ("text", ""), ("pong", b""),
                  ("ping", b"x" * 125), ("ping", b"p"), ("pong", b"q"), ("text", data.decode()),
                  ("binary", b"\xff\0"), ("close", 1000, "bye \xe9")]
        for pieces in pure_drip(b"".join(itertools.starmap(self.frame, wire))):
            self.assertEqual(pure_decode(pieces), wanted)
        self.assertTable(lambda data: pure_decode([self.frame(8, data)])[0][1:], (
            (b"", (1005, "")), (b"\x03\xe8" + b"x" * 123, (1000, "x" * 123)),
            *((struct.pack("!H", code), (code, "")) for code in (1003, 1007, 1014, 3000, 4999))))

    def test_errors(self):
        """Each with its close code, however it comes; nothing that follows counts."""
        mask, frame = b"\0\0\0\0", self.frame
        for code, wires in (
                (1002, (
                    *(bytes([first, 0x80]) + mask for first in b"\xc1\xa1\x91"),   # reserved bits
                    *(frame(opcode, b"") for opcode in (3, 15)),
                    b"\x81\x01x", b"\x88\x00",                                     # no mask
                    frame(9, b"x" * 126), frame(9, b"x", False), frame(8, b"\x03"), frame(0, b"x"),
                    frame(1, b"a", False) + frame(1, b"b"),
                    frame(1, b"", False) + frame(8, b"", False),
                    b"\x82\xfe\x00\x7d" + mask,                # a size in too many bytes
                    *(b"\x82\xff" + struct.pack("!Q", size) + mask for size in (65535, 1 << 63)),
                    *(frame(8, struct.pack("!H", number)) for number in (
                        999, 1004, 1005, 1015, 2999, 5000)))),
                (1007, (
                    *(frame(1, data) for data in (
                        b"a\xffb", b"a\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80")),
                    frame(1, b"\xe2", False) + frame(0, b"\x82"), frame(8, b"\x03\xe8\xff"))),
                (1009, (frame(2, b"x" * 1001), b"\x82\xff" + struct.pack("!Q", 2 ** 63 - 1) + mask,
                        frame(2, b"x" * 600, False) + frame(0, b"x" * 401)))):
            for wire in wires:
                ways = pure_drip(wire + frame(1, b"never"))
                for pieces in ways if len(wire) < 40 else itertools.islice(ways, 2):
                    with self.subTest(wire[:20], pieces=len(pieces)):
                        (kind, found, text), = pure_decode(pieces)
                        self.assertEqual((kind, found, bool(text)), ("fail", code, True))

    def test_utf8_fails_fast(self):
        """At the first byte after which no text can be valid, though the frame is not whole."""
        for tail, bad in ((b"\x80", 0), (b"\xe2\x82\xc0", 2), (b"\xed\xa0\x80", 2),
                          (b"\xf1\x80\x80\x80\xff", 4)):
            wire = self.frame(1, b"ok \xe2\x82\xac" + tail + b"x" * 10)
            decoder = gaffer.WebSocketDecoder(1000)
            failed = [place for place, byte in enumerate(wire) if list(decoder.feed(bytes([byte])))]
            self.assertEqual(failed, [12 + bad], tail)

    def test_memory_of_fragments(self):
        """A message that grows by two bytes does not grow in memory by sixty."""
        for opcode, piece in (1, b"ab"), (2, b""):
            decoder, wire = gaffer.WebSocketDecoder(100000), self.frame(0, piece, False) * 100
            with traced() as memory:
                for part in [self.frame(opcode, b"", False)] + [wire] * 10:
                    self.assertEqual(list(decoder.feed(part)), [])
                self.assertLess(memory()[0], 2000 * len(piece) + 10000)
            self.assertEqual(list(decoder.feed(self.frame(0, b"cd"))), [
                ("text", "ab" * 1000 + "cd") if opcode == 1 else ("binary", b"cd")])

    def test_frame_encoder(self):
        binary, text, lines = (True, False), (False, False), (False, True)
        for kind, data, before, mode, wire, consumed in (
                (binary, b"a\xff\n", None, gaffer.NORMAL, b"\x82\x03a\xff\n", 3),
                (text, b"a\xff\n", None, gaffer.NORMAL, b"\x81\x05a\xef\xbf\xbd\n", 3),
                (text, b"a\xe2\x82", None, gaffer.NORMAL, b"\x81\x01a", 1),
                (text, b"\xe2\x82", None, gaffer.NORMAL, b"", 0),
                (text, b"\xe2\x82", None, gaffer.FINAL, b"\x81\x03\xef\xbf\xbd", 2),
                (lines, b"a\nb\r\n\rc", None, gaffer.NORMAL, b"\x81\x01a\x81\x01b\x81\x00", 6),
                (lines, b"\na\xff\n", 13, gaffer.NORMAL, b"\x81\x04a\xef\xbf\xbd", 4)):
            with self.subTest(kind=kind, data=data):
                encoder = gaffer.FrameEncoder(*kind)
                self.assertEqual(encoder.encode(data, 0, before, mode, 1000), (wire, consumed))


# --------------------------------------------------------------------------------------------------
# metrics, access log, page
# --------------------------------------------------------------------------------------------------
PROM_LABEL = r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\[\\"n])*)"'


def prom_parse(data):
    """{metric: (kind, {(sample, ((label, value), ...)): number})} of Prometheus's text format.
    An AssertionError or AttributeError if it is not exactly that, or breaks its conventions."""
    found, (first, *metrics) = {}, re.split(r"(?m)^# HELP ", data.decode("utf-8"))
    assert not first
    for metric in metrics:
        name, kind, lines = re.fullmatch(
            r"([a-zA-Z_:]\w*) \S[^\\\n\r]*\S\n# TYPE \1 (counter|gauge|summary)\n((?:.*\n)*)",
            metric).groups()
        assert name not in found and name.endswith("_total") == (kind == "counter"), name
        samples = {}
        found[name] = (kind, samples)
        for line in lines.splitlines():
            sample, inside, number = re.fullmatch(
                r"(%s%s)(?:\{(.+)\})? (\+Inf|\d+(?:\.\d+)?(?:e[+-]\d+)?)" % (
                    name, "_(?:sum|count)" if kind == "summary" else ""), line).groups()
            assert re.fullmatch("(%s(,(?!$)|$))*" % PROM_LABEL, inside or ""), line
            labels = tuple((label, json.loads('"%s"' % value, strict=False))
                           for label, value in re.findall(PROM_LABEL, inside or ""))
            assert len(dict(labels)) == len(labels) and (sample, labels) not in samples, line
            samples[sample, labels] = float(number)
    return found


ACCESS = re.compile(r'(\S+) - - \[(\d\d/[A-Z][a-z][a-z]/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] '
                    r'TEXT (\d{3}) (\d+|-) TEXT TEXT\n'.replace(
                        "TEXT", r'"([^"\\]*(?:\\x[0-9a-f]{2}[^"\\]*)*)"'))


def access_lines(text):
    """[(client, time, request, status, size, referer, agent)] of nothing but such lines."""
    found = list(ACCESS.finditer(text))
    assert "".join(match.group() for match in found) == text, text
    return [(*fields[:3], int(fields[3]), int(fields[4].replace("-", "0")), *fields[5:])
            for fields in (match.groups() for match in found)]


class PureAccessLine(Case):

    def line(self, target="/x", client="127.0.0.1:5", **headers):
        request = gaffer.Request("GET", target, (1, 1), {
            name.replace("_", "-"): value for name, value in headers.items()})
        line, = access_lines(gaffer.access_line(client, 1893456000, request, 200, 12) + "\n")
        return line

    def test_fields(self):
        self.assertTable(lambda client: self.line(client=client)[0],
                         (("::1:5", "::1"), ("unix", "unix")))
        self.assertRegex(gaffer.access_line("1.2.3.4:5", 0, None, 400, 0),
                         r'^1\.2\.3\.4 - - \[.*\] "-" 400 - "-" "-"$')
        self.addCleanup(time.tzset)
        pure_environ(self, TZ="XXX3:30")
        time.tzset()
        self.assertEqual(self.line()[1], "31/Dec/2029:20:30:00 -0330")

    def test_escapes(self):
        evil = 'a"b\\c\r\nd\x1b[31m\x00\x7f\x80\xff\t" 200 5 "'
        fields = self.line('/"' + evil, referer=evil, user_agent=evil)
        for field in (fields[2], *fields[5:]):
            text = re.sub(r"\\x(..)", lambda match: chr(int(match.group(1), 16)), field)
            self.assertEqual(text.count(evil), 1)
        self.assertEqual(len(self.line(user_agent="x" * 60000)[6]), gaffer.KIB)


class PurePage(Case):

    def test_text(self):
        """It is small, makes no HTML of text, and asks nobody else."""
        page = gaffer.PAGE
        self.assertLess(len(page.encode("utf-8")), 60 * 1000)
        self.assertEqual(re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|cookie|new Function|"
            r"localStorage|sessionStorage| style=\"|importScripts|XMLHttpRequest|<[^>]*\son\w+\s*=",
            page), [])
        self.assertNotIn("://", page)
        self.assertEqual(re.findall(r'(?:src|href)="([^"]*)"', page.partition("<script")[0]),
                         ["data:,", "#/"])

    def test_contrasts(self):
        """AA of WCAG 2.2: 4.5 for text, 3 for edges of what can be used; in light and in dark."""
        def luminance(parts):
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                      for part in (part / 255 for part in parts)]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05
        pairs = re.findall(r"--(\w+): light-dark\(#(\w{6}), #(\w{6})\)", gaffer.PAGE)
        texts = "text", "dim", "accent", "good", "warn", "bad", "violet", "teal"
        for place in (1, 2):
            scheme = {pair[0]: bytes.fromhex(pair[place]) for pair in pairs}
            rows = [(3, "edge", "bg"), (3, "edge", "panel"), (4.5, "text", "mark")]
            for text in texts:
                faint = zip(scheme[text], scheme["bg"])         # as programs call it
                scheme["faint " + text] = [round(0.85 * one + 0.15 * two) for one, two in faint]
                rows += [(4.5, "faint " + text, "bg"), (4.5, text, "bg"), (4.5, text, "panel"),
                         (4.5, text, "here")]
            for least, one, other in rows:
                dark, light = sorted((luminance(scheme[one]), luminance(scheme[other])))
                self.assertGreaterEqual(light / dark, least, (one, other))

    def test_words(self):
        """Each field has a label and a section, each event a word."""
        words = gaffer.PAGE_WORDS
        fields = set(" ".join(words["form"]["sections"].values()).split())
        self.assertEqual(set(gaffer.OPTIONS), fields)
        self.assertEqual(set(words["form"]["labels"]), fields)
        self.assertLessEqual(set(gaffer.EVENT_TYPES), set(words["said"]))

    def test_snapshot(self):
        """It cannot leave its element; each page has a nonce of its own."""
        evil = "</script><script>alert(1)</script>__NONCE__<!--"
        response = gaffer.page_response({"name": evil})
        page, headers = response.body.decode("utf-8"), dict(response.headers)
        nonce = re.search("'nonce-([^']+)'", headers["Content-Security-Policy"]).group(1)
        self.assertEqual((page.count("<script"), page.count('nonce="%s"' % nonce)), (2, 2))
        data, = re.findall('<script type="application/json" id="snapshot">(.*?)</script>', page)
        self.assertEqual(json.loads(data), dict(gaffer.PAGE_WORDS, name=evil))
        self.assertNotEqual(gaffer.page_response({}).headers, response.headers)


# --------------------------------------------------------------------------------------------------
# fuzzing
#
# Random bytes, and valid requests and frames that were spoiled, go whole, byte by byte and in
# random pieces into the codecs: all must come to the same. --fuzz N runs N cases of each kind
# under a new seed; a case that fails prints what repeats it.
# --------------------------------------------------------------------------------------------------
FUZZ_BITS = [text.encode("latin-1") for text in (
    *"\r \n \0 \t : ; , % / # & = + \x7f \xff \" \\ 0 \r\n \r\n\r\n %00 %2F .. 0x ffff".split(" "),
    " ", "\r\n ", "9" * 20, "x" * 300, "\r\n" * 9, "HTTP/1.0", "http://x/", "1;a=b", "0\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "Host: x", "Host: a b", "Content-Length: 3",
    "Content-Length: +3", "Transfer-Encoding: chunked", " folded", "X : y", "Expect: 100-continue",
    "Expect: x", "Connection: close", "X: " + "y" * 200, "X: y\r\n" * 30 + "X: y",
    "Content-Encoding: gzip", "Upgrade: websocket")]
FUZZ_HEADS = (
    "GET / HTTP/1.1|Host: localhost", "DELETE /a%20b/c?d=e%26&f HTTP/1.0|Host: 127.0.0.1:5000",
    "HEAD http://localhost:80/x?y HTTP/1.1|Host: [::1]|X:\t a, \"b\" \xe9|Origin: http://a",
    "GET /wstreams/1 HTTP/1.1|Host: x|Upgrade: websocket|Connection: Upgrade|"
    "Sec-WebSocket-Version: 13|Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
FUZZ_LIMITS = {
    "HEAD_SIZE": 700, "TARGET_SIZE": 100, "REQUEST_LINE_SIZE": 120, "HEADERS_MAX": 15,
    "CHUNK_LINE_SIZE": 40, "CHUNK_EXTRAS_SIZE": 60}


def fuzz_request(rng):
    body = bytes(rng.choices(range(256), k=rng.choice((0, 1, 40, 400))))
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(part), rng.choice((b"", b";a=b")), part)
                      for part in pure_pieces(rng, body, 60))
    post = "POST /processes/x/_stop?wait=true HTTP/1.1|Host: x|"
    head, body = rng.choice((
        (rng.choice(FUZZ_HEADS), b""), (post + "Content-Length: %d" % len(body), body),
        (post + "Transfer-Encoding: chunked", chunks + b"0\r\nX: y\r\n\r\n")))
    return head.replace("|", "\r\n").encode("latin-1") + b"\r\n\r\n" + body


def fuzz_frame(rng):
    """Some websocket frames of a client, mostly valid."""
    data = pure_bytes(rng, rng.choice((0, 1, 5, 60)), rng.random() < 0.1)
    encode = functools.partial(ws_frame, mask=bytes(rng.choices(range(256), k=4)))
    kind = rng.random()
    if kind < 0.15:
        code = struct.pack("!H", rng.choice((1000, 1005, 3000, rng.randrange(65536))))
        data = rng.choice((b"", code)) + data[:123] * rng.choice((0, 1, 1, 4))
        return encode(rng.randrange(8, 11), data, rng.random() < 0.9)
    if kind < 0.16:
        data = bytes(rng.choice((900, 1100, 70000)))
    pieces = list(pure_pieces(rng, data, rng.choice((20, 100000))))[:60] or [b""]
    first = rng.choice((1, 2)) | 0x40 * (rng.random() < 0.05)
    return b"".join(encode(0 if number else first, piece, number == len(pieces) - 1)
                    for number, piece in enumerate(pieces))


def fuzz_spoil(rng, data):
    """`data`, with some of it changed, lost, doubled, moved, or other things between."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        if rng.random() < 0.3:
            lines = data.split(b"\r\n")
            lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(FUZZ_BITS))
            data = b"\r\n".join(lines)
            continue
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 10, 60))
        cut = data[at:at + size]
        middle, skipped = rng.choice((
            (rng.choice(FUZZ_BITS), 0), (data[:size], 0), (bytes([rng.randrange(256)]), size),
            (b"", size), (cut * 2, size), (cut.swapcase(), size)))
        data = data[:at] + middle + data[at + skipped:]
    return data


def fuzz_look(request):
    """Look at a request in every way that the server does. Returns what came of it."""
    wide = "".join((request.method, request.target, *request.headers, *request.headers.values()))
    assert not re.search("[\0-\x08\x0a-\x1f\x7f]|[^\0-\xff]", wide), wide
    assert re.fullmatch("[!-~]+ (/[!-~]*|[*])", request.method + " " + request.target), wide
    access, looks = gaffer.Access("token"), []
    for look in (lambda request: gaffer.split_path(request.path), lambda request: request.query,
                 access.check_host, access.check_origin, access.check_token, access.cors,
                 gaffer.websocket_accept):
        try:
            looks.append(look(request))
        except gaffer.GafferError as error:
            looks.append((type(error), str(error)))
    return [vars(request), looks, request.wants_close()]


def fuzz_outcome(wire, buffer_size=99999, limit=300):
    """What a server does with the bytes of a connection: (what it understands, its status or None,
    its words)."""
    seen, file = [], io.BufferedReader(io.BytesIO(wire), buffer_size)
    try:
        while True:
            request = gaffer.read_request(file)
            seen.append(fuzz_look(request))
            body = gaffer.read_body(file, gaffer.body_length(request, limit), limit)
            assert len(body) <= limit
            seen.append(body)
    except EOFError:
        pass
    except gaffer.GafferError as error:
        return seen, error.status, str(error)
    return seen, None, ""


class PureFuzz(Case):
    """Each test has `cases` cases of its kind, made of `seed` and their number."""

    cases, seed, first = 150, "1", 0

    def fuzz(self, case):
        """Run case(rng) for each case; what fails says how to see it again."""
        for number in range(self.first, self.first + self.cases):
            try:
                case(random.Random("%s:%d" % (self.seed, number)))
            except BaseException as error:
                again = "--fuzz 1 --seed %s:%d PureFuzz.%s" % (
                    self.seed, number, self._testMethodName)
                raise AssertionError("again: python3 test_gaffer.py " + again) from error

    def test_requests(self):
        def case(rng):
            wire = bytes(rng.choices(b"\r\n :/GETHPa0\x00\xff", k=rng.randrange(300)))
            if rng.random() < 0.9:
                wire = b"".join(fuzz_request(rng) for _ in range(rng.choice((1, 1, 2))))
                wire = fuzz_spoil(rng, wire)
            with http_limits(**FUZZ_LIMITS) if rng.random() < 0.5 else contextlib.nullcontext():
                self.assertEqual(fuzz_outcome(wire, rng.choice((1, 2, 7, 100))),
                                 fuzz_outcome(wire))
        self.fuzz(case)

    def test_frames(self):
        def case(rng):
            wire = bytes(rng.choices(range(256), k=rng.randrange(100)))
            if rng.random() < 0.95:
                wire = b"".join(fuzz_frame(rng) for _ in range(rng.randrange(1, 5)))
                wire = fuzz_spoil(rng, wire)
            whole = pure_decode([wire])
            for pieces in ([wire[i:i + 1] for i in range(len(wire))],
                           pure_pieces(rng, wire, rng.choice((3, 30, 300)))):
                self.assertEqual(pure_decode(pieces), whole, wire)
        self.fuzz(case)


# --------------------------------------------------------------------------------------------------
# ring 2: the loop with real children
# --------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------------------
# platform, process, manager
# --------------------------------------------------------------------------------------------------
# as `flapping`: it runs once, and its exit stops the template
PROCESS_ONCE = {"attempts": 1, "window": 1000, "max_retry": 0}
# what is waited for cannot come between a look for handlers and the sleep
PROCESS_AWAITS_TERM = ("import signal, os, sys\n"
                       "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n")
PROCESS_STUBBORN = {"cmd": 'trap "" TERM; echo ready; exec sleep 60', "shell": True}
# its leader ends by SIGTERM, and the other of its group does not
PROCESS_LEAVES = {"cmd": '(trap "" TERM; echo ready; exec sleep 60) & wait', "shell": True}


def process_group(group):
    """Return the OS pids of the living members of a process group, as /proc shows them."""
    members = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/stat" % entry) as file:
            fields = file.read().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                members.append(int(entry))
    return members


def free_port():
    """Return a port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class ProcessCase(ServerCase):
    """A running server, with short words for what is asked of it."""

    def setUp(self):
        super().setUp()
        self.manager, self.add, self.ok = self.server.manager, self.server.add, self.server.ok

    @functools.cached_property
    def folder(self):
        """A directory of this test, which other users may enter."""
        made = tempfile.TemporaryDirectory(dir="/tmp")
        self.addCleanup(made.cleanup)
        os.chmod(made.name, 0o755)
        return os.path.realpath(made.name)

    def file(self, name, text, mode=0o644):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(textwrap.dedent(text))
        os.chmod(path, mode)
        return path

    def post(self, path):
        """POST to /processes/<path>. Return the answer, which has to be 200."""
        return self.ok("POST", "/processes/" + path)

    def status(self, name):
        return self.ok("GET", "/status/" + name)

    def os_pids(self, name):
        return self.status(name)["os_pids"]

    def pids(self, name):
        return self.status(name)["pids"]

    def kill(self, pid):
        self.post("%d/_signal/KILL" % pid)
        self.exit_of(pid)

    def delete(self, name):
        self.ok("DELETE", "/processes/%s?wait=true" % name)

    def ready(self, name, command, **options):
        """Add processes, and wait until each has said "ready". Return their pids."""
        pids = self.add(name, command, **options)
        for pid in pids:
            self.read(pid, b"ready")
        return pids

    def send(self, pid, data, label="stdin"):
        self.ok("DELETE" if data is None else "POST", "/streams/%s/%s" % (pid, label), data)

    def refused(self, info, words, code="invalid_process_info", path="", method="POST", status=400):
        answer = self.server.json(method, "/processes" + path, info)
        self.assertError(answer, status, code, words)
        return answer[1]["reason"]

    def read(self, ref, what=None, label="stdout", since=0):
        """Read until `what` has come, or (None) until the stream ends. Return all bytes."""
        data = b""
        with contextlib.closing(Wire(self.server.port)) as wire:
            wire.request("/streams/%s/%s?feed=continuous&since=%d" % (ref, label, since)).head()
            while what is None or what not in data:
                part = wire.chunk()
                if not part:
                    self.assertEqual((what, part), (None, b""), data[-200:])
                    break
                data += part
        return data

    def spawned(self, name, number=1):
        events = self.server.events("proc/%s/spawn" % name)
        return next(itertools.islice(events, number - 1, None))

    def exit_of(self, pid):
        """Wait for the exit of a process. Return (exit status, signal)."""
        return next((event["exit_status"], event["term_signal"])
                    for event in self.server.events("exit") if event["pid"] == pid)

    def kinds(self, name):
        """Return [(type, pid)] of all events of a template up to now."""
        log = self.manager.events
        return [(event["event"], event.get("pid")) for event in self.manager.loop.call(log.read, 0)
                if event["name"] == name]

    def words(self, name):
        return " ".join(kind for kind, _ in self.kinds(name))

    def stop(self, name, group):
        """Stop with ?wait: it returns, and nothing of the process group is left."""
        self.post(name + "/_stop?wait=true")
        self.assertEqual(process_group(group), [])
        self.assertEqual(self.status(name)["stopping"], 0)

    def output(self, name, command, label="stdout", **options):
        """Run a command once. Return what it writes."""
        self.add(name, command, **{"restart": "never", **options})
        return self.read(self.spawned(name)["pid"], label=label).decode()

    def ended(self):
        self.server._thread.join(TIMEOUT)
        self.assertFalse(self.server._thread.is_alive())


# name: (command, fields, what it says first, (exit status, signal) after the stop or, with
# `flapping`, before it, what else it says, None if that is not compared)
PROCESS_HOSTILE = {
    "says-goodbye": (python(
        PROCESS_AWAITS_TERM + "print('ready')\nsignal.sigwait([15])\nprint('bye')\nsys.exit(143)"),
        {}, b"ready\n", (143, 0), b"bye\n"),
    "works-on-behind-its-shell-without-its-first-thread": (
        {"cmd": "%s -uISc %s & wait" % (PYTHON, shlex.quote(PROCESS_AWAITS_TERM + (
            "import ctypes, os, threading\ndef work():\n  print('ready')\n  signal.sigwait([15])\n"
            "  signal.sigtimedwait([], 0.3)\n  print('saved')\n  os._exit(0)\n"
            "threading.Thread(target=work).start()\nctypes.CDLL(None).pthread_exit(None)"))),
         "shell": True}, {}, b"ready\n", (0, 15), b"saved\n"),
    "leader-is-told-alone": (
        {"cmd": "trap 'echo told' USR1; (trap 'echo too' USR1; echo ready; sleep 60 & wait; wait) &"
                " wait; wait", "shell": True},
        {"stop_group": False, "stop_signal": [["USR1", 0.1]]}, b"ready\n", (0, 9), b"told\n"),
    "leader-leaves-a-worker": (
        {"cmd": "(trap 'echo told; exit' TERM; echo ready; sleep 60 & wait) & wait", "shell": True},
        {"stop_group": False}, b"ready\n", (0, 15), b"told\n"),
    "grandchild-that-ignores-TERM-holds-the-pipe": (
        {"cmd": '(trap "" TERM; exec sleep 60) & echo last', "shell": True},
        {"graceful_timeout": 0.1, "flapping": PROCESS_ONCE}, b"last\n", (0, 0), b""),
    "crashes-with-a-full-pipe": (
        python("import os\nos.write(1, b'x' * 60000 + b'last words')\nos.kill(os.getpid(), 9)"),
        {"flapping": PROCESS_ONCE}, b"x" * 60000, (0, 9), b"last words"),
    "closes-everything": (
        {"cmd": "printf last; exec sleep 60 <&- >&- 2>&-", "shell": True},
        {}, b"last", (0, 15), b""),
    "writes-without-end": ({"cmd": "cat /dev/zero"}, {}, b"\0", (0, 15), None),
}


class ProcessHostile(ProcessCase):
    """Of each of these children nothing is left when its stop returns, and its last bytes can be
    read."""

    def test_table(self):
        for name, (command, options, ready, end, rest) in PROCESS_HOSTILE.items():
            with self.subTest(name), http_limits(DRAIN_TIME=0.1):
                self.add(name, command, **options)
                event = self.spawned(name)
                pid, group = event["pid"], event["os_pid"]
                self.read(pid, ready)
                if "flapping" in options:
                    self.exit_of(pid)
                self.stop(name, group)
                self.assertEqual(self.exit_of(pid), end)
                if rest is not None:
                    self.assertEqual(self.read(pid), ready + rest)
                self.assertIsNone(process_state(group))

    def test_cannot_be_executed(self):
        """Refused when it is to start, and nothing changes."""
        for command, words in ((self.file("a", "#!/nowhere/interpreter\n", 0o755), "interpreter"),
                               (self.file("b", "echo\n", 0o755), "not a program")):
            for streams in [], ["a"]:           # another way
                with self.subTest(words, streams=streams):
                    info = {"name": "x", "cmd": command, "custom_streams": streams}
                    self.assertIn(command, self.refused(info, words))
                    self.assertEqual(self.ok("GET", "/processes"), [])
                    self.ok("POST", "/processes", dict(info, start=False))
                    self.refused(None, words, path="/x/_start")
                    self.refused(dict(info, args=["a"], start=True), words, path="/x")
                    self.assertFalse(self.manager.info("x")["args"])
                    self.assertRegex(self.words("x"), "create$")
                    self.delete("x")

    def test_a_number_of_another(self):
        """Once the leader is reaped, nothing goes to a number that is reused."""
        pid, = self.ready("x", PROCESS_LEAVES, graceful_timeout=60)
        group, = self.os_pids("x")
        reused, patch = threading.Event(), mock.patch.object
        with patch(gaffer.os, "kill", wraps=os.kill) as kill, \
                patch(gaffer.os, "killpg", wraps=os.killpg) as killpg, \
                patch(gaffer, "pid_exists", lambda os_pid: reused.is_set()):
            os.kill(group, signal.SIGKILL)
            self.exit_of(pid)
            self.post("x/_signal/USR1")
            reused.set()
            self.spawned("x", 2)
        self.assertEqual([call[0] for call in kill.call_args_list + killpg.call_args_list
                          if call[0][0] == group and call[0][1]],
                         [(group, 9), (group, 15), (group, 18)])
        os.killpg(group, signal.SIGKILL)


class ProcessClock(Case):
    """A Manager whose loop has a clock that stands until advance(); the processes are real."""

    def setUp(self):
        super().setUp()
        if not hasattr(os, "pidfd_open"):
            self.skipTest("children are polled here, by the clock that stands still")
        self.begin()

    def begin(self):
        self.now, self.seen = 1000.0, []
        arrived = self._arrived = queue.Queue()
        manager = self.manager = gaffer.Manager(loop=gaffer.Loop(clock=lambda: self.now))
        self.add = manager.add_process
        manager.subscribe("", lambda kind, event: arrived.put(event))
        thread = self._thread = threading.Thread(target=manager.run)
        thread.start()
        self.barrier()

        def close():
            while thread.is_alive():            # groups are polled, by this clock
                self.now += 0.1
                manager.stop(kill=True)
                thread.join(0.01)
        self.addCleanup(close)

    def ended(self):
        self._thread.join(TIMEOUT)
        self.assertFalse(self._thread.is_alive())

    def barrier(self):
        """Wait for turns: one that had begun, one for the timers due, one for their events."""
        for _ in range(3):
            turn = threading.Event()
            self.manager.loop.call_soon(turn.set)
            self.assertTrue(turn.wait(TIMEOUT))
        while not self._arrived.empty():
            self.seen.append(self._arrived.get())

    def wait(self, kind, number=1):
        """Wait until `number` events of a type have come. Return the last."""
        while self.count(kind) < number:
            self.seen.append(self._arrived.get(timeout=TIMEOUT))
        return [event for event in self.seen if event["event"] == kind][-1]

    def settle(self):
        """Wait until all have exited, and nothing follows."""
        known = None
        while known != len(self.seen):
            while self.count("exit") < self.count("spawn"):
                self.wait("exit", self.count("spawn"))
            known = len(self.seen)
            self.barrier()

    def advance(self, seconds, settle=False):
        self.now += seconds + 1e-9              # sums of floats are not exact
        if settle:
            self.settle()
        else:
            self.barrier()

    def count(self, kind):
        return self.kinds().count(kind)

    def kinds(self):
        return [event["event"] for event in self.seen]

    def status(self, name="x"):
        return self.manager.loop.call(lambda: self.manager.find_template(name).status())

    def window(self, pid, label="stdout"):
        return self.manager.loop.call(self.manager.find_window, pid, label)

    def read(self, target, text, label="stdout"):
        window = self.window(target, label)
        until(lambda: text in self.manager.loop.call(window.read, window.start))


class ProcessTimes(ProcessClock):
    """What is a matter of seconds."""

    def test_delay_is_forgotten(self):
        """Back to no delay once one has lived 10 s, 9 are too few, and with a new run."""
        self.add("x", "read x", shell=True, redirect_input=True, restart="on-failure")
        delays = []
        for spawns, lived in enumerate((0, 1, 9, 10, 1, 11, 0, 2, 0, 0), 1):
            pid = self.wait("spawn", spawns)["pid"]
            self.advance(lived)
            self.manager.write(pid, "stdin", b"\n" * (lived == 2))  # done
            self.manager.end_input(pid, "stdin")
            self.wait("exit", spawns)
            self.barrier()
            delays.append(self.status()["next_try"] or 0)
            self.advance(delays[-1])
            self.manager.start_template("x")
        self.assertEqual(delays, [0, 0.1, 0.2, 0, 0.1, 0, 0.1, 0, 0, 0.1])

    def test_ends_of_a_wait(self):
        """During a backoff, or while it flaps: nothing starts later, but at once."""
        for (flapping, state), (change, args, starts) in itertools.product(
                ((None, "backoff"), ({}, "flapping")), (
                    ("stop_template", (), 0), ("scale", (-1,), 0), ("delete_process", (), 0),
                    ("update_process", ({"cmd": "true x", "restart": "never"},), 1))):
            with self.subTest(state, change=change):
                self.begin()
                self.add("x", "false", flapping=flapping)
                self.settle()
                self.assertEqual(self.status()["state"], state)
                before = self.count("spawn")
                getattr(self.manager, change)("x", *args)
                self.advance(100, settle=True)
                self.assertEqual(self.count("spawn") - before, starts)

    def test_flapping(self):
        """2 exits within 1 s, a pause of 7 s; then stopped until started or changed."""
        manager, twice = self.manager, ["spawn", "exit"] * 2
        manager.add_process("x", "false", flapping={"max_retry": 2})
        for first, again in (
                (["create", "start"], lambda: manager.start_template("x")),
                (["start"], lambda: manager.update_process("x", {"cmd": "true", "flapping": {}}))):
            self.settle()
            for pauses in 1, 2:
                self.assertEqual(self.kinds(), first + (twice + ["flap"]) * pauses)
                self.assertEqual(self.status()["state"], "flapping")
                self.advance(6.999, settle=True)
                self.assertEqual(self.count("spawn"), 2 * pauses)
                self.advance(0.001, settle=True)
            self.assertEqual(self.kinds()[-5:], twice + ["stop"])
            self.assertEqual((self.status()["gave_up"], self.status()["state"]), (True, "stopped"))
            self.seen.clear()
            again()
            self.assertFalse(self.status()["gave_up"])

    def test_flapping_of_many(self):
        """Exits of others during a pause are no further ones."""
        self.add("x", "false", numprocesses=4, flapping={"max_retry": 2})
        self.settle()
        for _ in range(4):
            self.advance(7, settle=True)
        self.assertEqual((self.count("flap"), self.count("stop")), (2, 1))

    def test_output_is_kept_for_a_minute(self):
        self.add("x", "false", flapping=PROCESS_ONCE)
        self.settle()
        self.advance(59.9)
        self.assertTrue(self.window(1).ended)
        memory = weakref.ref(self.manager.find_process(1, past=True))
        self.advance(0.1)
        with self.assertRaises(gaffer.NotFound):
            self.window(1)
        self.assertIsNone(memory())             # without the garbage collector

    def test_hooks_that_take_too_long(self):
        """A minute each; before_start is an exit of the process, after_stop only told."""
        self.add("x", "sleep 99", before_start="sleep 1000", restart="never")
        self.add("y", "sleep 99", before_start="true")
        self.add("z", "true", after_stop="sleep 1000", restart="never")
        self.add("again", "false", after_stop="sleep 1000", restart_delay=50)
        self.wait("exit", 2)
        for pid, end in (1, "sh"), (2, "sleep"):        # the kernel shows it after the exec
            path = "/proc/%d/cmdline" % self.manager.find_process(pid).os_pid
            until(lambda: cli_read(path).split("\0")[0].endswith(end))
        self.advance(59.9)
        self.assertEqual((self.count("fail"), self.count("done")), (0, 0))
        self.assertEqual(self.count("spawn"), 4)
        self.advance(0.1)
        self.wait("spawn", 5)                   # the delay has been over for long
        self.wait("exit", 3)
        until(lambda: self.advance(1) or self.count("fail"))
        self.wait("done")
        self.assertEqual(self.status()["last_exit"]["term_signal"], signal.SIGKILL)
        self.assertEqual(self.status("z")["hint"], "after_stop was killed before it ended")
        self.assertEqual(self.status("y")["running"], 1)

    def test_steps_of_a_stop(self):
        """Each signal after its seconds, then SIGKILL each second until it has exited; a kill skips
        what is left."""
        for fields, kill, wanted in (
                ({}, None, [(0, 15), (0, 18), (10, 9), (11, 9)]),
                ({"stop_signal": [["INT", 5], ["QUIT", 2.5]]}, None,
                 [(0, 2), (0, 18), (5, 3), (5, 18), (7.5, 9), (8.5, 9)]),
                ({"stop_group": False}, None, [(0, 15), (0, 18), (10, 9), (11, 9)]),
                ({"graceful_timeout": 2.5}, 1, [(0, 15), (0, 18), (1, 9), (2, 9), (3, 9)])):
            with self.subTest(fields=fields, kill=kill):
                self.begin()
                self.add("x", "sleep 60", **fields)
                sent, process = [], self.manager.processes[1]

                def send(os_pid, signum, sent=sent):
                    sent.append((round(self.now - 1000, 3), int(signum)))
                with mock.patch.multiple(gaffer.os, kill=send, killpg=send):
                    self.manager.stop_template("x")
                    self.barrier()
                    self.assertEqual(process.status()["kill_in"],
                                     gaffer.stop_time(process.info))
                    while len(sent) < len(wanted) and self.now < 1020:
                        self.advance(0.5)
                        if round(self.now - 1000, 3) == kill:
                            self.manager.stop(kill=True)
                            self.barrier()
                self.assertEqual(sent, wanted)
                os.kill(process.os_pid, signal.SIGKILL)
                until(lambda: process.gone)

    def test_an_old_timer_of_a_stop(self):
        """It does not end what comes after the exit."""
        self.add("x", after_stop="echo hook; sleep 1000", graceful_timeout=3, **PROCESS_STUBBORN)
        self.read(1, b"ready")
        self.manager.stop_template("x")
        self.advance(1)
        self.manager.signal("x", signal.SIGKILL)
        self.wait("exit")
        self.read("x", b"hook", "stderr")
        self.advance(5)
        self.assertEqual(self.manager.find_process(1, past=True).state, "cleaning")
        with mock.patch.object(gaffer.os, "killpg") as killpg:
            self.manager.signal("x", signal.SIGUSR1, group=True)
        self.assertFalse(killpg.called, "the number may be another group's by now")

    def test_stop_by_priority(self):
        """The highest first, the newest within one; the next when those are gone or late. What
        ends before its turn is not told, and that is no failure any more. A new priority counts."""
        ends = {"cmd": "echo ready; exec sleep 60", "shell": True}
        for pid, (name, priority, command) in enumerate((
                ("db", 0, ends), ("app", 9, PROCESS_STUBBORN), ("late", 5, PROCESS_STUBBORN),
                ("late2", 5, ends), ("none", None, ends)), 1):
            self.add(name, priority=priority, graceful_timeout=3, flapping=PROCESS_ONCE, **command)
            self.read(pid, b"ready")
        db, app = (self.status(name)["os_pids"][0] for name in ("db", "app"))
        self.manager.update_process("app", dict(self.manager.info("app"), priority=1))
        self.manager.stop()

        def stopped(number):
            self.wait("stop_pid", number)
            return [event["name"] for event in self.seen if event["event"] == "stop_pid"]
        self.assertEqual(stopped(3), ["none", "late2", "late"])
        os.kill(db, signal.SIGKILL)
        self.wait("exit", 3)
        self.advance(2.999)
        self.assertEqual(len(stopped(3)), 3)
        self.advance(0.001)
        os.kill(app, signal.SIGKILL)
        self.wait("exit", 5)
        self.assertEqual(stopped(4)[3:], ["app"])
        self.assertEqual((self.count("stop"), self.count("flap")), (5, 0))
        self.ended()

    def test_after_stop_before_the_next_stop(self):
        self.add("db", "sleep 99", priority=0)
        self.add("app", "sleep 99", priority=1, graceful_timeout=1, after_stop="sleep 99")
        self.manager.stop()
        hook = until(lambda: next(iter(self.manager.commands), None)).os_pid
        self.advance(59)
        self.assertEqual(self.count("stop_pid"), 1)
        os.kill(hook, signal.SIGKILL)
        self.wait("stop_pid", 2)
        self.ended()

    def test_one_that_does_not_die(self):
        """After a second stop, 10 s are enough."""
        self.add("x", "sleep 60", numprocesses=3)
        os_pids = self.status()["os_pids"]
        with mock.patch.object(gaffer.os, "killpg"):
            self.manager.stop()
            self.manager.stop(kill=True)
            self.barrier()
            self.advance(9.999)
            self.assertTrue(self._thread.is_alive())
            with self.assertLogs("gaffer", "WARNING") as logged:
                self.now += 0.001 + 1e-9
                self.manager.stop()
                self.ended()
        for os_pid, line in zip(os_pids[::-1], logged.output):
            self.assertIn("os pid %d was killed but does not end" % os_pid, line)
            os.kill(os_pid, signal.SIGKILL)
            os.waitpid(os_pid, 0)
        self.assertEqual(len(logged.output), 3)

    def test_polls_of_a_group(self):
        """Less and less often, up to one a second."""
        def groups(wanted):
            times.append(round(self.now - 1000, 2))
            return wanted
        times = []
        self.add("x", graceful_timeout=60, **PROCESS_LEAVES)
        self.read(1, b"ready")
        with mock.patch.object(self.manager.table, "groups", groups):
            self.manager.stop_template("x")
            self.wait("exit")
            for _ in range(1000):
                self.advance(0.01)
        self.assertEqual((times[:3], round(times[-1] - times[-2], 2)), ([0.02, 0.05, 0.1], 1))

    def test_probes(self):
        """The first 0.1 s after the spawn, the next 1 s after a failure; each may take 5 s."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(TIMEOUT)
            url = "http://127.0.0.1:%d" % server.getsockname()[1]
            self.add("x", "sleep 60", ready={"http": url})
            process = self.manager.find_process(1)
            for wait, answer, error in ((0.1, b"HTTP/1.0 500 no\r\n", "s 'HTTP/1.0 500 no'"),
                                        (1, None, "reset by peer"), (1, b"", "no answer in 5 s"),
                                        (1, b"HTTP/1.1 204\n", "None")):
                self.advance(wait - 0.001)
                self.assertEqual(select.select([server], [], [], 0)[0], [])
                self.advance(0.001)
                with server.accept()[0] as peer:
                    if answer is None:
                        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                        struct.pack("ii", 1, 0))
                        peer.close()
                    elif answer:
                        peer.sendall(answer[:9])
                        self.advance(0)
                        peer.sendall(answer[9:])
                    else:
                        self.advance(4.999)
                        self.assertNotIn(error, process.status()["not_ready"])
                        self.advance(0.001)
                    until(lambda: error in str(process.status()["not_ready"]))
        self.assertTrue(self.status()["ready"])

    def test_not_ready_within(self):
        """The process is stopped, and that is a failure even if it exits with 0 then. The system
        gives clients the numbers of servers, too: a check that meets itself has found nobody."""
        peer = socket.socket()
        peer.bind(("127.0.0.1", 0))
        port = peer.getsockname()[1]
        words = ("(tcp:{0}) within 60 seconds: 127.0.0.1:{0}: Connection refused; "
                 "::1:{0}: Connection refused".format(port))
        self.add("x", restart="never", ready={"tcp": str(port)}, **python(
            PROCESS_AWAITS_TERM + "print('ready')\nsignal.sigwait([signal.SIGTERM])"))
        process = self.manager.find_process(1)
        self.read(1, b"ready")
        with mock.patch("socket.socket", side_effect=[peer, socket.socket(socket.AF_INET6)]):
            self.advance(0.1)
            until(lambda: "::1" in (process.status()["not_ready"] or ""))
        self.assertIn("it connected to itself", process.status()["not_ready"])
        self.advance(1)
        until(lambda: words.endswith(process.status()["not_ready"]))
        self.advance(58.8)
        self.assertEqual(self.count("stop_pid"), 0)
        self.manager.loop.call(gaffer.ConsoleOutput().start, self.manager.loop, self.manager)
        with self.assertLogs("gaffer", "WARNING") as logs:
            self.advance(0.1)
        self.assertIn(words, self.wait("stop_pid")["reason"])
        self.assertIn(words, logs.output[0])
        until(lambda: self.advance(1) or self.count("fail"))
        self.assertEqual(self.wait("exit")["exit_status"], 0)

    def test_what_was_not_ready_before_a_restart(self):
        """It is no failure of what follows."""
        self.add("x", restart="never", ready={"notify": True, "within": 1}, **PROCESS_STUBBORN)
        self.read(1, b"ready")
        self.advance(1)
        self.wait("stop_pid")
        self.manager.restart_template("x")
        self.advance(10)
        until(lambda: self.advance(1) or self.count("spawn") == 2)

    def test_changed_while_many_are_spawned(self):
        """Those that are still to come are of the new kind."""
        self.manager.subscribe("spawn", lambda kind, event: event["pid"] == 2 and (
            self.manager.update_process("x", {"cmd": "sleep 61", "numprocesses": 4})))
        with http_limits(SPAWN_TIME=-1):        # one a turn
            self.add("x", "sleep 60", numprocesses=4)
            self.wait("spawn", 6)
        for os_pid in self.status()["os_pids"]:
            until(lambda: cli_read("/proc/%d/cmdline" % os_pid) == "sleep\x0061\0")


class ProcessPolicies(ProcessClock):
    GONE = "sh -c 'rmdir $$PWD; exit 1'"        # it cannot be started again
    # (command, exit status, signal)
    ENDS = (("true", 0, 0), ("sh -c 'exit 1'", 1, 0), ("sh -c 'exit 143'", 143, 0),
            ("sh -c 'kill -KILL $$$$'", 0, 9), (GONE, 1, 0))

    def try_policy(self, restart, command, **options):
        """Run a template with a policy for 100 seconds. Return (starts, status, last event)."""
        self.begin()
        with tempfile.TemporaryDirectory() as folder:
            self.add("x", command, restart=restart, cwd=folder, **options)
            self.settle()
            for _ in range(20):
                self.advance(5, settle=True)
        return self.count("spawn"), self.status(), self.seen[-1]

    def test_table(self):
        """3 policies, 5 ends, with and without flapping."""
        flapping = {"attempts": 2, "window": 50, "retry_in": 1, "max_retry": 1}
        for restart, (command, *end), flaps in itertools.product(
                ("always", "on-failure", "never"), self.ENDS, (None, flapping)):
            with self.subTest(restart=restart, command=command, flaps=bool(flaps)):
                starts, status, event = self.try_policy(restart, command, flapping=flaps)
                if restart == "always" or restart == "on-failure" and any(end):
                    wanted = (4, "stopped", "stop", True) if flaps else (
                        15, "backoff", "exit", False)
                    if command == self.GONE:
                        wanted = 1, *wanted[1:]
                else:
                    wanted = 1, *(("failed", "fail") if any(end) else ("done", "done")), False
                    self.assertEqual([event["exit_status"], event["term_signal"], event["tries"],
                                      status["active"]], [*end, 1, False])
                self.assertEqual((starts, status["state"], event["event"], status["gave_up"]),
                                 wanted)

    def test_tries_and_success(self):
        starts, status, event = self.try_policy(
            "on-failure", "echo >> n; exit $((3 - $(wc -l < n)))", shell=True)
        self.assertEqual((starts, status["state"], status["restarts"], event["tries"]),
                         (3, "done", 2, 3))
        status = self.try_policy("never", "exit 143", shell=True, success=[0, 143])[1]
        self.assertEqual(status["state"], "done")

    def test_many(self):
        """It has failed if one has, once all have ended."""
        starts, status, event = self.try_policy(
            "never", "exit $((GAFFER_INSTANCE == 2))", shell=True, numprocesses=3)
        self.assertEqual((starts, status["state"], event["event"]), (3, "failed", "fail"))
        self.assertEqual((event["exit_status"], event["tries"]), (1, 3))
        self.begin()
        self.add("x", "exit $((GAFFER_INSTANCE - 1))", shell=True, restart="on-failure",
                 restart_delay=50, numprocesses=2)
        self.settle()
        self.manager.scale("x", -1)             # the one that has failed is wanted no more
        self.wait("done")

    def test_what_starts_it_again(self):
        """_start, _restart and a change do; the same template does not."""
        manager, info = self.manager, {"name": "x", "cmd": "true", "restart": "never"}
        handle = manager.add_process(info)
        for number, (act, *args, runs) in enumerate((
                (manager.start_template, "x", 1), (manager.restart_template, "x", 1),
                (manager.update_process, "x", dict(info, start=True), 0),
                (manager.scale, "x", 1, 0),
                (manager.update_process, "x", dict(info, cmd="true x"), 1), (manager.restart, 0))):
            with self.subTest(number):
                self.settle()
                starts = self.count("spawn")
                self.assertEqual((self.status()["state"], self.count("done")), ("done", starts))
                act(*args)
                self.barrier()
                self.assertEqual(self.count("spawn") - starts, runs)
        self.assertEqual(handle.wait(TIMEOUT)["exit_status"], 0)


class ProcessSchedules(ProcessClock):
    """Schedules, on a clock and a wall clock that the tests move apart."""

    START = 1800000000.0                        # 2027-01-15 08:00 UTC

    def setUp(self):
        super().setUp()
        self.addCleanup(time.tzset)
        pure_environ(self, TZ="UTC")
        patch = mock.patch.object(gaffer.time, "time", lambda: self.now + self.ahead)
        patch.start()
        self.addCleanup(patch.stop)
        time.tzset()

    def begin(self):
        super().begin()
        self.ahead = self.START - self.now

    def pass_time(self, *steps):
        """Let time pass, and what is started end. Return how many runs each step has started."""
        counts = [self.count("spawn")]
        for seconds in steps:
            self.advance(seconds, settle=True)
            counts.append(self.count("spawn"))
        return [after - before for before, after in zip(counts, counts[1:])]

    def test_interval_and_cron(self):
        for schedule, command, first, steps, runs, end in (
                ("every 90s", "true", 90, (89, 1, 89, 1, 90), [0, 1, 0, 1, 1], "done"),
                ("10,30 * * * *", "false", 600, (599, 1, 1199, 1), [0, 1, 0, 1], "fail")):
            with self.subTest(schedule):
                self.begin()
                self.add("x", command, schedule=schedule)
                self.barrier()
                status = self.status()
                self.assertEqual((status["state"], status["active"]), ("scheduled", True))
                self.assertAlmostEqual(status["next_runs"][0], self.START + first, 3)
                self.assertEqual(self.pass_time(*steps), runs)
                self.assertEqual(self.kinds()[:5], ["create", "start", "spawn", "exit", end])
                self.assertEqual(self.status()["state"], "scheduled")
                self.assertEqual(self.status()["outcome"][:4], end)

    def test_a_run_that_still_goes_on(self):
        self.add("x", "cat", redirect_input=True, schedule="every 60s")
        self.barrier()
        for _ in range(3):
            self.advance(60)
        self.assertEqual(self.kinds(), ["create", "start", "spawn", "skip", "skip"])
        self.manager.end_input(1, "stdin")
        self.wait("done")
        self.advance(60)
        self.manager.scale("x", -1)             # of none: it has ended
        self.advance(60, settle=True)
        self.manager.scale("x", 1)
        self.barrier()
        self.assertEqual((self.count("spawn"), self.status()["state"]), (2, "scheduled"))
        self.advance(60)
        self.assertEqual(self.count("spawn"), 3)

    def test_flapping(self):
        """Its pauses are part of a run, and the next time stays as it was."""
        self.add("x", "false", schedule="every 10s", restart="on-failure", flapping={})
        self.barrier()
        self.assertEqual(self.pass_time(10, 6, 1, 2), [2, 0, 2, 0])
        self.advance(1)
        self.assertEqual(self.count("skip"), 1)

    def test_what_starts_and_stops_it(self):
        """_start runs one now, a change none; what is stopped has no next time."""
        manager, info = self.manager, {"name": "x", "cmd": "true", "schedule": "@hourly"}
        manager.add_process(info)
        start, stop = (functools.partial(act, "x") for act in (
            manager.start_template, manager.stop_template))

        def update(**fields):
            return lambda: manager.update_process("x", dict(info, **fields))
        for number, (act, runs, state) in enumerate((
                (start, True, "scheduled"), (stop, False, "stopped"),
                (update(cmd="true x"), False, "stopped"), (start, True, "scheduled"),
                (update(cmd="true y"), False, "scheduled"), (stop, False, "stopped"),
                (update(start=True), False, "scheduled"),
                (update(schedule=None), True, "backoff"), (update(), False, "scheduled"))):
            with self.subTest(number):
                starts = self.count("spawn")
                act()
                self.settle()
                status = self.status()
                self.assertEqual((self.count("spawn") > starts, status["state"],
                                  bool(status["next_runs"])), (runs, state, state == "scheduled"))
        manager.delete_process("x")
        self.assertEqual(self.pass_time(7200), [0])

    def test_the_clock_jumps(self):
        """A jump costs one run at most, a day forward and a day back."""
        for jump, schedule in itertools.product((86400, -86400), ("@hourly", "every 1h")):
            with self.subTest(jump=jump, schedule=schedule):
                self.begin()
                self.add("x", "true", schedule=schedule)
                self.barrier()
                self.assertEqual(self.pass_time(3600), [1])
                self.ahead += jump
                runs = self.pass_time(*[3600] * 5)
                self.assertIn(sum(runs[:2]), (1, 2, 3))
                self.assertEqual(runs[2:], [1, 1, 1])

    def test_the_machine_sleeps(self):
        """Two times that have passed unseen are one run, and then it goes on as before. A timer
        that is early by the wall waits for the rest, and no run is lost or doubled."""
        for name, schedule in ("x", "@hourly"), ("y", "every 1h"):
            self.add(name, "true", schedule=schedule)
        self.barrier()
        self.assertEqual(self.pass_time(1800), [0])
        self.ahead += 7200                      # which a monotonic clock does not count
        self.assertEqual(self.pass_time(1799, 1, 1800, 1800, 3600), [0, 2, 0, 2, 2])
        self.ahead -= 0.5
        self.assertEqual(self.pass_time(3600, 0.5, 3599, 1), [0, 2, 0, 2])

    def test_nothing_wakes_before_it_is_due(self):
        for hour in range(50):
            self.add("x%d" % hour, "true", schedule="0 %d * * *" % (9 + hour % 9))
        self.barrier()
        loop = self.manager.loop
        with mock.patch.object(loop, "_select", wraps=loop._select) as select:
            self.advance(3599)
            self.assertLess(select.call_count, 20)
        self.assertEqual(self.count("spawn"), 0)

    def test_a_program_that_has_gone(self):
        """What can't be started has failed, and is tried at the next time."""
        with tempfile.TemporaryDirectory() as folder:
            program = shutil.copy("/bin/true", folder)
            self.add("x", program, schedule="every 60s", numprocesses=2)
            self.barrier()
            os.unlink(program)
            self.advance(60, settle=True)
            self.assertEqual(self.kinds()[-1], "fail")
            self.assertEqual((self.seen[-1]["exit_status"], self.seen[-1]["tries"]), (127, 2))
            shutil.copy("/bin/true", folder)
            self.assertEqual(self.pass_time(60), [2])


class ProcessAttributes(ProcessCase):
    """As what a process is started, and what is run beside it."""

    def test_attributes(self):
        own, gib = os.nice(0), 1 << 30
        for number, (fields, command, wanted) in enumerate((
                ({"nice": own + 3, "env": {"PATH": "/"}},
                 "PATH=/bin:/usr/bin; nice; ls /proc/$$/fd", "%d 0 1 2" % (own + 3)),
                ({"limits": {"as": [gib, 2 * gib], "core": 0, "cpu": [5, "unlimited"]}},
                 "for each in Sv Hv c St Ht; do ulimit -$each; done",
                 "1048576 2097152 0 5 unlimited"),
                ({"umask": "027", "nice": own + 1, "limits": {"nofile": 99},
                  "custom_streams": ["s"], "redirect_input": True},
                 "umask; nice; ulimit -n; ls /proc/$$/fd", "0027 %d 99 0 1 2 3" % (own + 1)))):
            with self.subTest(fields=fields):
                shown = self.output("x%d" % number, command, shell=True, **fields)
                self.assertEqual(shown.split(), wanted.split())
        shown = self.output("y", "env", env={"a.b": "x y"}, umask="022")    # no name for a shell
        self.assertIn("a.b=x y\n", shown)

    def test_what_needs_root(self):
        """A nice value and a hard limit beyond those of gaffer, also for another user."""
        self.refused({"name": "x", "cmd": "true", "limits": {"nofile": 1 << 40}},
                     "'limits' asks for nofile above")
        self.assertEqual(self.ok("GET", "/processes"), [])
        if os.geteuid() != 0:
            self.skipTest("needs root")
        nice, (soft, hard) = os.nice(0) - 5, resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = hard + 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, wanted))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except ValueError:                      # this root may not
            wanted = hard
        said = self.output("y", "nice; id -un; ulimit -Hn", shell=True, uid="nobody", nice=nice,
                           limits={"nofile": [10, wanted]})
        self.assertEqual(said, "%d\nnobody\n%d\n" % (nice, wanted))
        self.assertEqual(resource.getrlimit(resource.RLIMIT_NOFILE), (soft, hard))

    def test_env_file(self):
        """Read at each spawn; a later file wins, env wins over all; HOME may come from it."""
        paths = [self.file("a", "A=1\nB=1\nC=1\nHOME=/x\n"),
                 self.file("b", "B=2\nC=\"$A$B\"\nHOME=$HOME/y\n")]
        user = {"uid": "nobody"} if os.geteuid() == 0 else {}
        self.assertEqual(self.output("x", "echo $A $B $C $HOME", shell=True, env_file=paths,
                                     env={"B": "3"}, **user), "1 3 12 /x/y\n")
        self.server.wait_event("proc/x/done")
        self.file("a", "A=new")
        self.post("x/_start")
        self.assertTrue(self.read(self.spawned("x", 2)["pid"]).startswith(b"new 3"))
        until(lambda: not self.status("x")["active"])
        self.file("b", "A=1\n?")
        self.refused(None, "'%s', whose line 2 is not NAME=value" % paths[1], path="/x/_start")
        os.unlink(paths[1])
        os.mkfifo(paths[1])                     # nobody would ever write
        self.refused(None, "is not a file", path="/x/_start")

    def test_before_start(self):
        """In the same environment, before each spawn; its failure is an exit of the process."""
        fields = {"shell": True, "env": {"A": "1"}, "cwd": "/"}
        pid, = self.add("x", "echo $A; cat", before_start="echo $A $PWD; cat", redirect_input=True,
                        **fields)
        self.ok("GET", "/status/x?until=ready")
        self.send(pid, b"stdin is for the program alone")
        self.send(pid, None)
        self.assertEqual(self.read(pid), b"1 /\n1\nstdin is for the program alone")
        self.assertEqual(self.output("bad", "echo never", "stderr", before_start=(
            "echo own words >&2; exit 3"), **fields),
            "own words\nbefore_start has failed with exit status 3\n")
        event = self.server.wait_event("proc/bad/fail")
        self.assertEqual((event["exit_status"], event["tries"]), (3, 1))
        fifo = os.path.join(self.folder, "fifo")
        os.mkfifo(fifo)                         # what is after it waits for the program
        self.add("db", "sleep 1000", before_start="read line < " + fifo)
        self.add("web", "sleep 1000", after=["db"])
        found = [self.status(name)["state"] for name in ("db", "web")]
        self.assertEqual(found, ["starting", "waiting"])
        with open(fifo, "w", encoding="ascii") as file:
            print(file=file)
        self.ok("GET", "/status/web?until=ready")

    def test_after_stop(self):
        """After each exit, when the group is gone, before the next start."""
        path = os.path.join(self.folder, "path")
        hook = "echo $GAFFER_EXIT_STATUS $GAFFER_TERM_SIGNAL $A >> %s" % path
        fields = {"after_stop": hook, "env": {"A": "a"}}
        self.add("one", "sh -c 'exit 3'", restart="never", **fields)
        self.server.wait_event("proc/one/fail")
        self.add("two", "sleep 1000", redirect_output=[], **fields)
        self.post("two/_stop?wait=true")
        self.assertEqual(cli_read(path), "3 0 a\n0 15 a\n")
        self.add("three", "echo $(wc -l < %s); exec sleep 1000" % path, shell=True, **fields)
        self.read("three", b"2\n")
        self.post("three/_restart?wait=true")
        self.assertEqual(self.read("three", b"3\n"), b"2\n3\n")
        self.add("four", "printf abc", restart="never", redirect_output=["stdout"],
                 after_stop="echo hook")        # whose output is no part of a line of the process
        self.assertEqual(self.read("four", b"hook\n"), b"abc\nhook\n")

    def test_after_stop_that_fails(self):
        """Its last words are in the log and in the status; nothing of it is left."""
        gone = os.path.join(self.folder, "gone")
        os.mkdir(gone)
        for number, (command, hook, words) in enumerate((
                ("rmdir " + gone, "true", "after_stop cannot be run: "),
                ("true", "echo own words; echo more >&2; exit 3", "exits with 3: own words\nmore"),
                ("true", "seq 100000; kill -9 $$", "is killed by signal 9"),
                ("true", "sleep 1000 & echo $!; exit 1", "exits with 1: "))):
            with self.subTest(hook):
                name = "x%d" % number
                self.add(name, command, restart="never", after_stop=hook,
                         cwd="/" if number else gone)
                self.server.wait_event("proc/%s/done" % name)
                hint = self.status(name)["hint"]
                self.assertIn(words, hint)
                self.assertLess(len(hint), 1100)
        until(lambda: not alive(int(hint.split()[-1])))

    def test_hooks_end_with_gaffer(self):
        """after_stop is waited for at the stop; a kill ends it at once, and none begins then."""
        self.ready("y", PROCESS_STUBBORN, after_stop="sleep 1000", graceful_timeout=60)
        self.add("x", "sleep 1000", after_stop="sleep 1000")
        self.manager.stop()
        hook = until(lambda: next(iter(self.manager.commands), None)).os_pid
        self.assertTrue(alive(hook))
        self.refused({"name": "y", "cmd": "true"}, "", "stopping", status=503)
        self.server.stop_all()
        until(lambda: not alive(hook))


class ProcessPrograms(ProcessCase):
    """Programs that many have start, reload by their signal, and stop by their own signal without a
    loss."""

    quick = False

    def program(self, name):
        """Return the path of a program, or skip this test."""
        path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")
        if path is None:
            self.skipTest("needs " + name)
        return path

    def setUp(self):
        super().setUp()
        self.port = free_port()

    def begin(self, cmd, ready, **fields):
        self.pid, = self.add("x", cmd, cwd=self.folder, redirect_output=["all", "all"], **fields)
        self.words(ready)

    def words(self, text):
        self.read(self.pid, text.encode(), "all")

    def end(self):
        self.stop("x", self.os_pids("x")[0])
        output = self.read(self.pid, label="all").decode()
        self.assertEqual(self.exit_of(self.pid), (0, 0), output)
        return output

    def get(self, request=b"GET / HTTP/1.0\r\n\r\n"):
        """Send a request to the program. Return the Wire once its answer has begun."""
        wire = self.wire(server=self).send(request)
        wire.file.peek()
        return wire

    def web(self, text):
        until(lambda: text in self.get().file.read())

    def test_nginx(self):
        """A download that is under way is finished."""
        self.file("big", "x" * (1 << 19))
        config = """
            daemon off; pid nginx.pid; error_log stderr notice; worker_processes 2;
            events {} http { access_log off; server { listen 127.0.0.1:%d; root .;
            location /big { limit_rate 1m; } location = / { return 200 "%s"; } } }"""
        path = self.file("nginx.conf", config % (self.port, "one"))
        self.begin("%s -p . -c %s" % (self.program("nginx"), path), "start worker process ",
                   stop_signal="QUIT", stop_group=False)
        self.web(b"one")
        self.file("nginx.conf", config % (self.port, "two"))
        self.post("x/_signal/HUP")
        self.web(b"two")
        download = self.get(b"GET /big HTTP/1.0\r\n\r\n")
        self.end()
        self.assertGreaterEqual(len(download.file.read()), 1 << 19)

    def test_postgresql(self):
        """INT ends its sessions and writes a checkpoint; what was committed is there again."""
        tools, user = POSTGRES or self.skipTest("needs PostgreSQL"), {}
        if os.geteuid() == 0:                   # as which PostgreSQL refuses to run
            user = {"uid": "nobody"}
            os.chown(self.folder, pwd.getpwnam("nobody").pw_uid, -1)
        self.output("init", "%s/initdb -D data -A trust -U me --no-sync" % tools, cwd=self.folder,
                    **user)
        self.server.wait_event("proc/init/done")
        psql = "%s/psql -h 127.0.0.1 -p %d -U me -At postgres" % (tools, self.port)

        def ask(sql):
            return subprocess.check_output([*psql.split(), "-c", sql], timeout=TIMEOUT).strip()
        begin = functools.partial(
            self.begin, "%s/postgres -D data -p %d -k %s -F" % (tools, self.port, self.folder),
            "ready to accept connections", stop_signal="INT", stop_group=False, **user)
        begin()
        ask("create table t as select generate_series(1, 1000)")
        with open(os.path.join(self.folder, "data", "postgresql.conf"), "a") as file:
            file.write("\nmaintenance_work_mem = 3MB\n")
        self.post("x/_signal/HUP")
        until(lambda: ask("show maintenance_work_mem") == b"3MB")
        self.add("session", psql, redirect_input=True, restart="never")
        self.send("session", b"select 1;\n")
        self.read("session", b"1\n")
        self.assertIn("database system is shut down", self.end())
        self.delete("x")
        begin()
        self.assertEqual(ask("select count(*) from t"), b"1000")
        self.assertNotIn("recovery", self.end())

    def test_redis(self):
        command = "%s --port %d --save 3600 1" % (self.program("redis-server"), self.port)
        for request, answer in (b"SET k value\r\n", b"+OK\r\n"), (b"GET k\r\n", b"$5\r\nvalue\r\n"):
            self.begin(command, "Ready to accept connections")
            self.assertEqual(self.get(request).file.read(len(answer)), answer)
            self.assertIn("DB saved on disk", self.end())
            self.delete("x")

    def test_gunicorn(self):
        """A request that is under way is answered; HUP loads the application again."""
        app = """
            import time
            def app(environ, start):
                start("200 OK", [])
                yield b"%s"
                time.sleep(0.3)
                yield b"the end"
            """
        self.file("app.py", app % "one")
        # before that, a worker would miss a signal
        self.file("conf.py", """
            bind, workers = "127.0.0.1:%d", 2
            def post_worker_init(worker):
                worker.log.info("worker %%d is up", worker.age)
            """ % self.port)
        self.begin("%s -c conf.py app:app" % self.program("gunicorn"), "worker 1 is up",
                   stop_group=False, env={"PYTHONDONTWRITEBYTECODE": "1"})
        self.words("worker 2 is up")
        self.web(b"one")
        self.file("app.py", app % "two")
        self.post("x/_signal/HUP")
        for text in "worker 3 is up", "worker 4 is up", "Worker exiting":
            self.words(text)
        self.web(b"two")
        wire = self.get()
        self.assertIn("Shutting down: Master", self.end())
        self.assertTrue(wire.file.read().endswith(b"the end"))

    def test_master_that_ends_its_workers(self):
        """As celery's: they finish their tasks when it tells them to; TERM would end them."""
        self.begin(python("""
            import os, signal
            signals = {signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            number = signal.SIGHUP
            while number == signal.SIGHUP:
                worker = os.fork()
                if worker == 0:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                    os.write(1, b"ready\\n")
                    signal.sigwait([signal.SIGUSR1])
                    os.write(1, b"task done\\n")
                    os._exit(0)
                number = signal.sigwait(signals)
                os.kill(worker, signal.SIGUSR1)
                os.waitpid(worker, 0)
            """), "ready\n", stop_group=False)
        self.post("x/_signal/HUP")
        self.words("task done\nready\n")
        self.assertEqual(self.end(), "ready\ntask done\n" * 2)

    def test_sshd(self):
        """By HUP it executes itself anew; a connection outlives that."""
        command = "%s -D -e -f /dev/null -p %d -h %s/key -o ListenAddress=127.0.0.1" % (
            self.program("sshd"), self.port, self.folder)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        self.begin(command + " -o PidFile=none", "Server listening",
                   before_start="ssh-keygen -qN '' -t ed25519 -f key")
        self.get(b"")                           # it listens before it has a handler for HUP
        self.post("x/_signal/HUP")
        self.words("Received SIGHUP; restarting.\r\nServer listening")
        wire = self.get(b"")
        with mock.patch("gaffer.DRAIN_TIME", 0.1):     # the connection holds a pipe
            self.assertIn("Received signal 15; terminating", self.end())
        self.assertTrue(wire.send(wire.file.readline()).file.peek())


class ProcessTemplate(ProcessCase):
    """Fields of a template at work, in a real process."""

    def test_full_pipe_is_widened(self):
        self.add("x", "cat /dev/zero")
        with open("/proc/%d/fd/1" % self.os_pids("x")[0], "wb") as pipe:
            until(lambda: fcntl.fcntl(pipe, 1032) == 262144)

    def test_started_again(self):
        """Its program has moved in PATH."""
        path = [tempfile.mkdtemp(dir=self.folder) for _ in "ab"]
        program = shutil.copy("/bin/sleep", path[0])
        self.add("x", "sleep 60", env={"PATH": ":".join(path)})
        shutil.move(program, path[1])
        self.kill(1)
        self.spawned("x", 2)

    def test_command_and_environment(self):
        pure_environ(self, OWN="ours", GAFFER_TOKEN="secret", PYTHONUNBUFFERED=None)
        for number, (cmd, fields, said) in enumerate((
                ("env", {"env": {"A": "\u00e4\U0001f600", "N": 5}, "custom_streams": ["a"]},
                 "A=\u00e4\U0001f600\nGAFFER_STREAMS=a\nN=5\nPYTHONUNBUFFERED=1"),
                ("env", {"custom_streams": ["a"], "env": {"LC_CTYPE": "xx_YY"}},
                 "GAFFER_STREAMS=a\nLC_CTYPE=xx_YY\nPYTHONUNBUFFERED=1"),
                ("sh -c 'pwd; echo $OWN,$$GAFFER_TOKEN,$1,$(($1+1))' sh 2",
                 {"cwd": self.folder, "os_env": True}, self.folder + "\nours,,2,3"))):
            with self.subTest(fields=fields):
                shown = self.output("x%d" % number, cmd, **{"os_env": False, **fields})
                self.assertEqual(sorted(shown.splitlines()), said.splitlines())

    @unittest.skipUnless(os.geteuid() == 0, "only root may run something as another user")
    def test_identity(self):
        """uid, gid and the supplementary groups; nothing of gaffer's own is left."""
        uid, gid = pwd.getpwnam("nobody")[2:4]
        group = next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, gid))
        for number, ((fields, *ids, groups), streams) in enumerate(itertools.product((
                ({"uid": "nobody"}, uid, gid, os.getgrouplist("nobody", gid)),
                ({"uid": str(uid), "gid": group.gr_name}, uid, group.gr_gid,
                 os.getgrouplist("nobody", group.gr_gid)),
                ({"uid": 54321, "gid": 54322}, 54321, 54322, [54322])), ([], ["three"]))):
            with self.subTest(fields=fields, streams=streams):
                said = self.output("x%d" % number, "echo $(id -ru; id -rg; id -u; id -g; id -G)",
                                   shell=True, cwd="/", custom_streams=streams, **fields)
                numbers = [int(word) for word in said.split()]
                self.assertEqual((numbers[:4], set(numbers[4:])), (ids * 2, set(groups)))
        # what gaffer may execute and the user may not never runs as gaffer's user
        script = self.file("script", "#!/bin/sh\nid -u\n", 0o700)
        self.refused({"name": "x", "cmd": script, "uid": "nobody", "cwd": "/"}, script)

    def test_redirect_output(self):
        """The first label is stdout's, the second stderr's; what has none goes to /dev/null."""
        for pid, (labels, expected) in enumerate((
                (["a", "b"], {"a": b"out\n", "b": b"err\n"}), (["stderr"], {"stderr": b"out\n"}),
                (["all", "all"], {"all": b"out\nerr\n"})), 1):
            with self.subTest(labels):
                self.add("x%d" % pid, "echo out; echo err >&2", shell=True, restart="never",
                         redirect_output=labels)
                self.assertEqual({each: self.read(pid, label=each) for each in expected}, expected)
        self.add("none", "sleep 60", redirect_output=[])
        self.assertEqual({os.readlink("/proc/%d/fd/%d" % (self.os_pids("none")[0], fd))
                          for fd in range(3)}, {"/dev/null"})

    def test_custom_streams(self):
        """Descriptors from 3 on, both ways, with an end of file each way of its own."""
        pid, = self.add("x", """
            printf $GAFFER_STREAMS >&5
            cat <&3 >&3; printf end >&3; exec 3>&-
            cat <&4 >&4; printf end >&4; exec 4>&-
            """, shell=True, custom_streams=["control", "data.1", "third"], restart="never")
        self.read(pid, b"control,data.1,third", "third")
        for label in "control", "data.1":
            for text in b"one", b"two":
                self.send(pid, text, label)
                self.read(pid, text, label)
            self.send(pid, None, label)
            self.assertEqual(self.read(pid, label=label), b"onetwoend")
        self.read("x", b"onetwoend", label)
        self.assertEqual(self.exit_of(pid), (0, 0))
        pid, = self.add("y", "sleep 1000", custom_streams=["a"])
        self.send(pid, b"what it never reads resets the stream", "a")
        self.kill(pid)
        self.assertEqual(self.read(pid, label="a"), b"")

    def test_detach(self):
        """It alone survives gaffer's end."""
        self.add("x", "sleep 60", detach=True)
        self.stop("x", self.os_pids("x")[0])
        self.add("y", "sleep 60", detach=True)
        self.add("z", "sleep 60")
        (detached,), (other,) = map(self.os_pids, "yz")
        self.server.stop_all()
        self.assertEqual((alive(detached), alive(other)), (True, False))
        os.kill(detached, signal.SIGKILL)
        os.waitpid(detached, 0)


class ProcessActions(ProcessCase):
    """What start, stop, restart, scale, update and delete mean."""

    def ask(self, name, *requests):
        for request in requests:
            method, path = request.split(" ")
            self.ok(method, "/processes/" + name + path,
                    {"cmd": "sleep 61", "start": True} if method == "PUT" else None)

    def test_order_of_events(self):
        for number, (fields, requests, events) in enumerate((
                ({"start": False}, ["POST /_start"] * 2, "create start spawn spawn"),
                ({}, ["POST /_stop?wait=true"] * 2,
                 "create start spawn spawn stop stop_pid stop_pid exit exit"),
                ({"start": False}, ["POST /_stop", "POST /_add/2"], "create update"),
                ({}, ["POST /_add", "POST /_sub?wait=true"],
                 "create start spawn spawn update spawn update reap exit"),
                ({}, ["DELETE ?wait=true"],
                 "create start spawn spawn stop stop_pid stop_pid delete exit exit"),
                ({"numprocesses": 1}, ["PUT ", "POST /_start?wait=true"],
                 "create start spawn update stop_pid exit spawn"),
                ({"start": False}, ["PUT "], "create update start spawn"),
                ({"numprocesses": 1}, ["POST /_restart?wait=true"],
                 "create start spawn restart stop_pid exit spawn"))):
            with self.subTest(fields=fields, requests=requests):
                name = "x%d" % number
                self.add(name, "sleep 60", **{"numprocesses": 2, **fields})
                self.ask(name, *requests)
                until(lambda: len(self.words(name)) >= len(events))
                self.assertEqual(self.words(name), events)

    def test_slot_is_kept(self):
        """The new process follows when the old one is gone. The last wish counts."""
        for name, command, *requests in (
                ("a", PROCESS_STUBBORN, "POST /_stop", "POST /_start"),
                ("b", PROCESS_STUBBORN, "POST /_stop", "PUT "),
                ("c", PROCESS_LEAVES, "POST /_stop", "POST /_start"),
                ("e", PROCESS_LEAVES, "POST /_restart")):
            with self.subTest(name):
                pid, = self.ready(name, command, graceful_timeout=60, restart="never")
                if command == PROCESS_LEAVES:
                    self.kill(pid)
                self.ask(name, *requests)
                status = self.status(name)
                self.assertEqual((status["active"], status["state"]), (True, "stopping"))
                self.post("%d/_signal/KILL?group=true" % pid)
                self.spawned(name, 2)
                self.assertEqual([each for each in self.kinds(name) if each[0] in (
                    "exit", "spawn", "fail")][-2:], [("exit", pid), ("spawn", pid + 1)])
        pid, = self.ready("d", PROCESS_STUBBORN, graceful_timeout=60)
        self.ask("d", "POST /_stop", "POST /_start", "POST /_stop")
        self.kill(pid)
        self.post("d/_stop?wait=true")
        self.assertEqual(self.words("d").split().count("spawn"), 1)

    def test_scale(self):
        """N run, each a leader of a group and a session; one killed is replaced. Down
        ends the oldest."""
        self.assertEqual(self.add("x", "sleep 60", numprocesses=3), [1, 2, 3])
        for os_pid in self.os_pids("x"):
            self.assertEqual((os.getpgid(os_pid), os.getsid(os_pid)), (os_pid, os_pid))
        self.kill(2)
        self.spawned("x", 4)
        for path, number, left in (("_add", 4, [1, 3, 4, 5]), ("_sub/3", 1, [5]), ("_sub/9", 0, []),
                                   ("_add/2", 2, [6, 7])):
            self.assertEqual(self.post("x/" + path)["numprocesses"], number)
            until(lambda: self.pids("x") == left)
        self.assertEqual([pid for kind, pid in self.kinds("x") if kind == "reap"], [1, 3, 4, 5])

    def test_instances_of_one_run(self):
        """Each has a number of its own, also if another has ended meanwhile."""
        self.add("x", "test $GAFFER_INSTANCE = 1 || read line", shell=True, numprocesses=2,
                 restart="never", redirect_input=True)
        self.exit_of(1)
        self.post("x/_add")
        seen = self.ok("GET", "/status/x?usage=true")["processes"]
        self.assertEqual([(each["pid"], each["instance"]) for each in seen], [(2, 2), (3, 3)])

    def test_put(self):
        """start left out: as it was. numprocesses left out: its default."""
        self.add("x", "sleep 60", numprocesses=2)

        def put(info, *wanted):
            self.ok("PUT", "/processes/x", info)
            self.assertEqual((self.status("x")["active"], self.ok("GET", "/processes/x")["start"]),
                             wanted)
        put({"cmd": "sleep 61"}, True, True)
        self.spawned("x", 3)
        self.assertEqual((self.pids("x"), self.ok("GET", "/processes/3")["cmd"]), ([3], "sleep 61"))
        self.post("x/_stop?wait=true")
        put({"cmd": "sleep 62"}, False, True)
        put({"cmd": "sleep 63", "start": True}, True, True)
        put({"cmd": "sleep 64", "start": False}, False, False)
        self.post("x/_start?wait=true")
        put(self.ok("GET", "/processes/x"), True, False)
        before = self.kinds("x")
        self.refused({"name": "z", "cmd": "true"}, "name", path="/x", method="PUT")
        self.refused({"cmd": "/nowhere"}, "not there", path="/x", method="PUT")
        self.assertEqual((self.kinds("x"), self.ok("GET", "/processes/x")["cmd"]),
                         (before, "sleep 64"))

    def test_stop_of_a_pid(self):
        """It is replaced as soon as it is gone, without a delay, also many times."""
        pid, = self.add("x", "sleep 60")
        for request in ["POST /_stop?wait=true", "DELETE "] * 2:
            self.ask(str(pid), request)
            self.assertEqual(self.spawned("x", pid + 1)["pid"], pid + 1)
            pid += 1
        self.assertEqual(self.kinds("x")[-3:], [("stop_pid", 4), ("exit", 4), ("spawn", 5)])

    def test_wait(self):
        """?wait answers when it is done, else 504; it goes on."""
        def late(path, method="POST"):
            answer = self.server.json(method, path + "?wait=0.05")
            self.assertError(answer, 504, "wait_timeout")
        pid, = self.ready("x", PROCESS_STUBBORN, graceful_timeout=60)
        os_pid, = self.os_pids("x")
        late("/processes/x/_stop")
        self.assertTrue(alive(os_pid))
        self.kill(pid)
        self.post("x/_stop?wait=true")
        self.assertIsNone(process_state(os_pid))
        self.post("x/_start?wait=true")
        self.read(2, b"ready\n")
        late("/processes/x/_restart")
        self.kill(2)
        self.post("x/_start?wait=true")
        self.assertEqual(self.pids("x"), [3])
        for state, fields in (("backoff", {"restart_delay": 1000}),
                              ("flapping", {"flapping": dict(PROCESS_ONCE, max_retry=1)})):
            self.add(state, "false", **fields)
            until(lambda: self.status(state)["state"] == state)
            late("/processes/%s/_start" % state)
        for method, path, name in (("POST", "/processes/a/_sub/2", "a"),
                                   ("DELETE", "/processes/b", "b"), ("DELETE", "/groups/g", "g:a")):
            with self.subTest(path):
                pids = self.ready(name, PROCESS_LEAVES, numprocesses=2, graceful_timeout=60)
                late(path, method)
                self.assertEqual(name in self.ok("GET", "/processes"), method == "POST")
                for pid in pids:
                    self.post("%d/_signal/KILL?group=true" % pid)
                if method == "POST":
                    self.ok(method, path + "?wait=true")

    def test_group_ends_before_the_next(self):
        """A leader that exits by itself is replaced when nothing of its group is left, whose output
        is read until then."""
        self.ready("x", "(trap 'sleep 0.3; echo old ends; exit' TERM; echo ready; sleep 60 & wait) "
                   "& read line", shell=True, redirect_input=True)
        group, = self.os_pids("x")
        with http_limits(DRAIN_TIME=0.1):
            self.send(1, None)
            self.spawned("x", 2)
        self.assertEqual(process_group(group), [])
        self.assertEqual(self.read(1), b"ready\nold ends\n")

    def test_delete(self):
        """The name is free at once; a pid is never used again."""
        pid, = self.ready("x", PROCESS_STUBBORN, graceful_timeout=0.2)
        self.ok("DELETE", "/processes/x")
        self.refused(None, "", "not_found", "/x", "GET", 404)
        self.assertEqual(self.add("x", "sleep 60"), [pid + 1])
        self.exit_of(pid)

    def test_final_output(self):
        """The last 16 exits can be read, or twice numprocesses, until the template is deleted."""
        for name, count, rounds, kept in ("x", 1, 17, 16), ("y", 9, 2, 18):
            self.add(name, "sleep 60", numprocesses=count)
            for _ in range(rounds):
                self.post(name + "/_restart?wait=true")
            self.post(name + "/_stop?wait=true")
            pids = [pid for kind, pid in self.kinds(name) if kind == "spawn"]
            for readable in pids[-kept:], []:
                self.assertEqual([pid for pid in pids if self.server.request(
                    "HEAD", "/streams/%d/stdout?since=0" % pid)[0] != 404], readable)
                self.server.request("DELETE", "/processes/%s?wait=true" % name)

    def test_signals(self):
        """To each process; with ?group=true to the groups."""
        pids = self.add("x", python("""
            import os, signal
            signals = [signal.SIGUSR1, signal.SIGUSR2]
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            name = b"leader" if os.fork() else b"child"
            while True:
                os.write(1, name + b"\\n")
                name += b" %d" % signal.sigwait(signals)
            """), numprocesses=2)
        for path, *words in (("x/_signal/CONT", b"child\n", b"leader\n"),
                             ("x/_signal/USR1", b"leader 10\n"),
                             ("x/_signal/USR2?group=true", b"child 12\n", b"leader 10 12\n")):
            self.post(path)
            for pid, word in itertools.product(pids, words):
                self.read(pid, word)


class ProcessEmbedded(ProcessCase):
    """The Manager as a library: its methods, apps and end."""

    def test_after_the_end(self):
        """Every method says that gaffer has stopped; none hangs. A callback may stop it."""
        self.assertRaisesRegex(RuntimeError, "runs already", self.manager.run)
        subscription = self.manager.subscribe("create", lambda kind, event: self.manager.stop())
        self.manager.add_process("y", "sleep 60")
        self.ended()
        subscription.close()
        self.assertRaises(gaffer.Stopping, self.manager.get_process, "y")
        self.assertRaises(gaffer.Stopping, self.manager.subscribe, "", print)
        self.manager.stop()
        self.assertTrue(self.manager.block_until(lambda: False, TIMEOUT))

    def test_subscribe(self):
        """What the pattern matches, until close(); one that fails keeps no other from it."""
        def fail(*_):
            raise RuntimeError("a fault of the user's")
        seen = {pattern: queue.Queue() for pattern in ("", "create", "proc/x", "proc/x/exit")}
        self.manager.subscribe("proc/y", fail)
        subscriptions = [
            self.manager.subscribe(pattern, lambda *event, events=events: events.put(event))
            for pattern, events in seen.items()]
        self.manager.add_process("x", "true", flapping=PROCESS_ONCE)
        found = [seen[""].get(timeout=TIMEOUT)[1]["event"] for _ in range(5)]
        subscriptions[1].close()
        with self.assertLogs("gaffer", "ERROR") as logs:
            self.manager.add_process("y", "true", start=False)
            seen[""].get(timeout=TIMEOUT)
        self.assertIn("a fault of the user's", logs.output[0])
        self.assertEqual(found, "create start spawn exit stop".split())
        self.assertEqual([[kind for kind, _ in each.queue] for each in seen.values()],
                         [[], ["create"], found, ["exit"]])
        self.assertRaises(gaffer.BadEventType, self.manager.subscribe, "proc/x/exits", print)

    def test_handles(self):
        """By pid one process, by name whatever runs."""
        self.manager.add_process("x", "cat", redirect_input=True)
        by_name, one = self.manager.get_process("x"), self.manager.get_process("1")
        os_pid, = self.os_pids("x")
        self.assertEqual([(each.name, each.pid, each.os_pid) for each in (by_name, one)],
                         [("x", None, None), ("x", 1, os_pid)])
        self.assertEqual(one.info(), dict(by_name.info(), pid=1, os_pid=os_pid))
        mine, all_ = queue.Queue(), queue.Queue()
        monitor = one.monitor_io("stdout", lambda *event: mine.put(event))
        by_name.monitor_io("stdout", lambda *event: all_.put(event))
        one.write(b"hello\xff\n")
        event = {"event": "stdout", "name": "x", "data": b"hello\xff\n"}
        self.assertEqual(all_.get(timeout=TIMEOUT), ("stdout", event))
        self.assertEqual(mine.get(timeout=TIMEOUT), ("stdout", dict(event, pid=1, os_pid=os_pid)))
        monitor.close()
        by_name.write(b"more\n")
        self.assertEqual(all_.get(timeout=TIMEOUT)[1]["data"], b"more\n")
        self.assertTrue(mine.empty())
        self.assertRaises(gaffer.NotFound, one.monitor_io, "no", print)
        self.assertRaises(gaffer.NotFound, one.write, b"x", "no")
        self.assertRaises(gaffer.WaitTimeout, by_name.wait, 0.01)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            wait = pool.submit(one.wait, TIMEOUT)
            one.signal("KILL")
            self.assertEqual(wait.result(TIMEOUT)["term_signal"], signal.SIGKILL)
        self.spawned("x", 2)
        by_name.write(b"second\n")
        self.assertEqual(all_.get(timeout=TIMEOUT)[1]["data"], b"second\n")
        self.manager.get_process(2).stop()
        self.spawned("x", 3)
        by_name.stop()
        self.assertEqual(by_name.wait(TIMEOUT)["pid"], 3)
        self.assertRaises(gaffer.NotFound, self.manager.get_process, 1)
        self.assertRaises(ValueError, gaffer.Manager, window_size=gaffer.WINDOW_SIZE_MIN - 1)
        with self.assertRaisesRegex(RuntimeError, "its own thread"):
            self.manager.loop.call(by_name.wait)
        added = self.manager.add_process({"name": "y", "cmd": "true"}, start=False)
        self.assertIsNone(added.wait(TIMEOUT))
        info = added.info()                     # a copy, to be changed and given back
        info["cmd"], info["env"]["A"] = "false", "1"
        self.assertEqual(added.info()["env"], {})
        self.assertEqual(self.manager.update_process("y", info), "changed")

    def test_reaped_by_somebody_else(self):
        """Another part of the program has taken the exit status: an exit all the same."""
        def steal():
            os.kill(os_pid, signal.SIGKILL)
            os.waitpid(os_pid, 0)
            self.manager.find_process(1).signal(signal.SIGTERM)
        self.add("x", "sleep 60")
        os_pid, = self.os_pids("x")
        with self.assertLogs("gaffer", "WARNING") as logs:
            self.manager.loop.call(steal)
            self.exit_of(1)
        self.assertIn(str(os_pid), logs.output[0])
        self.assertEqual(self.spawned("x", 2)["pid"], 2)

    def test_order_of_starts(self):
        """By priority, else as they were added. What cannot start keeps no other from running."""
        started, manager = [], gaffer.Manager()

        def spawned(kind, event):
            started.append(event["name"])
            if len(started) == 5:
                manager.stop(kill=True)
        manager.subscribe("spawn", spawned)
        script = self.file("script", "#!/bin/sh\n", 0o755)
        for name, priority in (("none", None), ("two", 2), ("zero", 0), ("minus", -1), ("2b", 2)):
            manager.add_process(name, "sleep 60", priority=priority)
        manager.add_process("gone", script, priority=0)
        os.unlink(script)
        with self.assertLogs("gaffer", "WARNING") as logs:
            manager.run()
        self.assertIn("gone cannot be started", logs.output[0])
        self.assertEqual(started, ["minus", "zero", "two", "2b", "none"])

    def test_many_that_run_nothing(self):
        """What waits for them is looked for once, not for each of them."""
        class Templates(dict):
            def values(self):
                passes.append(None)
                return super().values()
        passes, manager = [], gaffer.Manager()
        manager.templates = Templates()
        for number in range(50):
            manager.add_process("x%d" % number, "true", numprocesses=0)
        manager.subscribe("start", lambda kind, event: manager.stop())
        manager.run()
        self.assertLess(len(passes), 20)

    def test_apps(self):
        """Stopped in reverse order; what a start() or stop() raises leaves run() after that."""
        apps = mock.Mock()             # its mock_calls are those of all of them
        for name, methods in (("small", "start"), ("whole", "start restart stop"),
                              ("bad_start", "start"), ("bad_stop", "start stop")):
            setattr(apps, name, mock.Mock(spec=methods.split()))

        def fail(loop, manager):
            manager.add_process("x", "sleep 60")
            raise OSError("no such luck")
        manager = gaffer.Manager([apps.small, apps.whole])
        manager.subscribe("spawn", lambda kind, event: (
            manager.restart() if event["pid"] == 1 else manager.stop()))
        added = manager.add_process("x", "sleep 60")
        manager.run()
        self.assertRaises(gaffer.Stopping, added.wait)
        self.assertRaisesRegex(RuntimeError, "has run", manager.run)
        apps.small.start.assert_called_with(manager.loop, manager)
        apps.bad_start.start.side_effect = fail
        with self.assertRaisesRegex(OSError, "no such luck"):
            gaffer.Manager([apps.whole, apps.bad_start]).run()
        apps.bad_stop.stop.side_effect = OSError("cannot stop")
        manager = gaffer.Manager([apps.whole, apps.bad_stop])
        manager.stop()
        with self.assertRaisesRegex(OSError, "cannot stop"):
            manager.run()
        self.assertEqual([call[0] for call in apps.mock_calls], (
            "small.start whole.start whole.restart whole.stop whole.start bad_start.start "
            "whole.stop whole.start bad_stop.start bad_stop.stop whole.stop").split())

    def test_apps_and_threads(self):
        """An app may wait for a thread that calls the manager; what it adds is started once."""
        waited, started = [], []

        def wait(*_):
            thread = threading.Thread(target=manager.not_ready)
            thread.start()
            thread.join(TIMEOUT)
            waited.append(thread.is_alive())

        def add(loop, manager):
            manager.add_process("y", "sleep 60")
            loop.later(0, loop.call_unlocked, manager.restart)
        manager = gaffer.Manager([
            mock.Mock(spec=["start", "restart", "stop"], start=wait, restart=wait, stop=wait),
            mock.Mock(spec=["start"], start=add)])
        manager.subscribe("start", lambda kind, event: started.append(event["name"]))
        manager.subscribe("restart", lambda kind, event: manager.stop())
        manager.add_process("x", "sleep 60")
        manager.run()
        self.assertEqual((waited, started), ([False] * 3, ["x", "y"]))


class ProcessLife(ProcessCase):
    """What acts comes before what informs, and nothing takes long."""

    def test_many_starts(self):
        """Answered when all have been spawned; others are answered in between. A stop ends it."""
        manager, seen = self.manager, set()

        with mock.patch.object(gaffer, "SPAWN_TIME", 0), \
                concurrent.futures.ThreadPoolExecutor(2) as pool:
            added = pool.submit(self.add, "x", "sleep 60", numprocesses=30)
            while not added.done():
                seen.add(manager.loop.call(lambda: len(manager.processes)))
            self.assertEqual(added.result(), list(range(1, 31)))
            self.assertGreater(len(seen - {0, 1, 30}), 3)
            for name, command in ("z", "true"), ("zz", "sleep 60"):     # z crashes all the time
                added = pool.submit(
                    manager.add_process, name, command, numprocesses=30, restart_delay=0)
                self.assertEqual(added.result(TIMEOUT).name, name)
            manager.delete_process("z")
            for name, end in (("y", lambda: manager.delete_process("y")), ("last", manager.stop)):
                added = pool.submit(manager.add_process, name, "sleep 60", numprocesses=1000)
                self.spawned(name)
                end()
                self.assertEqual(added.result(TIMEOUT).name, name)
        self.ended()
        self.assertLess(sum(event["event"] == "spawn" for event in manager.events.read(
            manager.events.start)), 1000)

    def test_one_listing_serves_all_groups(self):
        self.ready("x", PROCESS_LEAVES, graceful_timeout=0.3, numprocesses=15)
        groups, table = self.os_pids("x"), self.manager.table
        with mock.patch.object(table, "groups", wraps=table.groups) as listing:
            self.post("x/_stop?wait=true")
        self.assertFalse(any(map(process_group, groups)))
        wanted = [len(call[0][0]) for call in listing.call_args_list]
        self.assertEqual((max(wanted), len(wanted) < 60), (15, True))

    def test_what_only_informs_stops_nothing(self):
        """Neither a look for daemons that fails nor an observer of events that does."""
        self.add("x", "sleep 60", numprocesses=2)
        self.add("y", "cat", redirect_input=True)
        groups, patch = self.os_pids("x"), mock.patch.object
        with self.assertLogs("gaffer", "ERROR") as logs, \
                patch(self.manager.table, "orphans", side_effect=OSError("EMFILE")), \
                patch(self.manager.events, "append", side_effect=RuntimeError("an observer")):
            self.post("x/_stop?wait=true")
            self.send("y", None)
            until(lambda: self.pids("y") == [4])
        self.assertFalse(any(map(process_state, groups)))
        for words in "OSError: EMFILE", "RuntimeError: an observer":
            self.assertIn(words, "\n".join(logs.output))

    @unittest.skipUnless(gaffer.ProcfsTable.EXISTS, "no /proc here")
    def test_what_has_gone(self):
        """A zombie is no member of its group."""
        table, child = gaffer.ProcfsTable(), subprocess.Popen(["true"], start_new_session=True)
        until(lambda: process_state(child.pid) == "Z")
        self.assertEqual(table.groups({child.pid, os.getpgrp()}), {os.getpgrp()})
        child.wait(TIMEOUT)
        pid = child.pid
        self.assertEqual((table.sample(pid), table.usage(pid), table.children(pid)),
                         ({}, {}, []))

    def test_daemon(self):
        """The exit event and the status say so, whether it has left its group or not."""
        leaves = "setsid -f sh -c 'echo $$; exec sleep 60' | head -1"
        for name, command, hint in (("a", leaves, True), ("b", "sleep 60 &", True),
                                    ("c", "sleep 60 & exit 1", False), ("d", "true", False)):
            with self.subTest(command):
                self.add(name, command, shell=True, flapping=PROCESS_ONCE)
                event = self.server.wait_event("proc/%s/exit" % name)
                if command == leaves:           # from here on, daemons of other tests are no matter
                    read, table = gaffer.ProcfsTable._read, self.manager.table
                    with mock.patch.object(table, "_read", lambda os_pid, name: (
                            b"%d" % os_pid if name == "cgroup" else read(os_pid, name))):
                        self.assertEqual(table.orphans(0.0, set()), [])
                    os.kill(int(self.read(event["pid"], b"\n")), signal.SIGKILL)
                    table.orphans = lambda since, ours: []
                self.assertEqual("foreground" in event.get("hint", ""), hint)
                self.assertEqual(self.status(name)["hint"], event.get("hint"))

    def test_working_directories_removed(self):
        """A restart of many goes on after one that cannot, and their faults are told together. What
        cannot be replaced is started again once its directory is back."""
        cwd, other = os.path.join(self.folder, "a"), os.path.join(self.folder, "b")
        for name, folder in ("g:a", cwd), ("g:b", other), ("g:c", "/"):
            os.makedirs(folder, exist_ok=True)
            self.add(name, "sleep 60", cwd=folder)
        os.rmdir(cwd)
        os.rmdir(other)
        with self.assertRaisesRegex(gaffer.InvalidProcessInfo, "'g:a': .*'cwd'.*'g:b': .*'cwd'"):
            self.manager.restart()
        self.spawned("g:c", 2)
        answer = self.server.json("POST", "/groups/g/_restart?wait=true")
        self.assertError(answer, 400, "invalid_process_info", "'g:b': field 'cwd'")
        self.spawned("g:c", 3)
        with self.assertLogs("gaffer", "WARNING") as logs:
            self.kill(1)
            status = until(lambda: self.status("g:a")["error"] and self.status("g:a"))
            os.mkdir(cwd)
            self.spawned("g:a", 2)
        for text in status["error"], logs.output[0]:
            self.assertIn(cwd, text)
        self.assertEqual((status["active"], status["running"]), (True, 0))
        self.assertIsNone(self.status("g:a")["error"])


class ProcessReady(ProcessCase):
    """ready, after, and what waits for them."""

    def until(self, name, goal="ready", timeout=TIMEOUT):
        """Return (status, value) of ?until."""
        return self.server.json("GET", "/status/%s?until=%s&timeout=%g" % (name, goal, timeout))

    def test_each_kind(self):
        """What makes a process ready, and what the event tells of it."""
        port, url = free_port(), "http://127.0.0.1:$PORT/"
        server = "%s -m http.server --bind 127.0.0.1 $PORT" % PYTHON
        sleep = {"cmd": "printf 'up\\r' >&2; exec sleep 60", "shell": True}
        for kind, value, command, by in (
                ("log", "up", sleep, "log:up"), ("tcp", "$PORT", server, "tcp:$PORT"),
                ("http", url, server, url), ("exec", 'test "$PORT"', sleep, 'exec:test "$PORT"')):
            with self.subTest(kind), http_limits(PROBE_INTERVAL=0.1):
                self.add(kind, command, ready={kind: value}, env={"PORT": port})
                status, value = self.until(kind)[0], self.status(kind)
                self.assertEqual((status, value["state"], value["ready"]), (200, "running", True))
                event = self.server.wait_event("proc/%s/ready" % kind)
                self.assertEqual((event["by"], event["pid"]), (by, value["pids"][0]))
                self.delete(kind)

    def test_notify(self):
        """A stranger does not count, nor what is too long; a child does. STOPPING=1 ends it."""
        # each line of its stdin is sent by a child that goes on
        self.add("x", python("""
            import os, signal, socket, sys
            s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            s.connect('\\0' + os.environ['NOTIFY_SOCKET'][1:])
            print(os.environ['NOTIFY_SOCKET'])
            for line in sys.stdin:
                if os.fork() == 0:
                    s.send(line.replace(';', '\\n').encode())
                    signal.pause()
            """), ready={"notify": True}, redirect_input=True)
        address = self.read("x", b"\n").decode().strip()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.connect("\0" + address[1:])
            stranger.sendmsg([b"READY=1"], [    # with a descriptor, which gaffer has to close
                (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", stranger.fileno()))])
        self.manager.loop.call(subprocess.check_call, [     # it has ended when gaffer looks
            PYTHON, "-c", "import socket, sys; socket.socket(1, 2).sendto(b'READY=1', "
            "'\\0' + sys.argv[1])", address[1:]])
        self.send("x", b"STATUS=long;READY=1;" + b"x" * gaffer.NOTIFY_SIZE + b"\n")
        self.send("x", b"STATUS=short;\n")
        until(lambda: self.status("x")["message"] == "short")
        self.assertEqual(self.status("x")["state"], "starting")
        self.send("x", b"STATUS=fine;MAINPID=1;READY=1\n")
        value = self.until("x")[1]
        self.assertEqual((value["state"], value["message"]), ("running", "fine"))
        self.assertEqual(self.server.wait_event("ready")["by"], "notify")
        self.send("x", b"STOPPING=1\n")
        until(lambda: not self.status("x")["ready"])
        self.assertEqual(self.output("y", "echo $NOTIFY_SOCKET.", shell=True), ".\n")

    @unittest.skipUnless(shutil.which("systemd-notify"), "needs systemd-notify")
    def test_systemd_notify(self):
        self.add("x", "systemd-notify --ready --status=fine; exec sleep 60", shell=True,
                 ready={"notify": True})
        self.assertEqual(self.until("x")[1]["message"], "fine")

    def test_lines(self):
        """One of an earlier process does not count; one behind 100 MB does."""
        self.add("x", "echo up; exec sleep 60", shell=True, ready={"log": "up"})
        self.assertEqual(self.until("x")[0], 200)
        self.ok("PUT", "/processes/x", {
            "cmd": "read line; head -c 100000000 /dev/zero; echo; echo $line; exec sleep 60",
            "shell": True, "ready": {"log": "up"}, "redirect_input": True})
        self.spawned("x", 2)
        self.send("x", b"up\n")
        self.assertEqual(self.until("x")[0], 200)
        self.kill(2)
        self.spawned("x", 3)
        self.assertEqual(self.until("x", timeout=0.01)[0], 504)

    def test_after(self):
        """What it waits for; once only; it is gone before what it is after is told to stop."""
        self.add("web", "sleep 60", after=["migrate", "later"])
        self.add("migrate", "read line; exit $line", shell=True, redirect_input=True, after=["db"],
                 restart="never", after_stop="true")
        self.add("db", "read line; echo up; cat", shell=True, redirect_input=True,
                 ready={"log": "up"})

        def states():
            return [each["name"] + ": " + " ".join([each["state"], *each["waiting"]])
                    for each in self.ok("GET", "/status")]
        self.assertEqual(states(), ["web: waiting migrate later", "migrate: waiting db",
                                    "db: starting"])
        self.refused(None, "it goes on; 'web' waits for migrate, later", "wait_timeout",
                     "/web/_start?wait=0.01", "POST", 504)
        self.send("db", b"\n")
        self.assertEqual(self.until("migrate")[0], 200)
        self.assertEqual(states()[0], "web: waiting migrate later")
        self.post("db/_stop?wait=true")         # nor does what has started need it any more
        self.send("migrate", b"0\n")
        self.assertEqual(self.until("migrate", "done")[0], 200)
        self.add("later", "sleep 60")
        self.assertEqual(self.until("web")[0], 200)
        self.post("db/_restart?wait=true")
        self.assertEqual((states()[0], self.words("web")), ("web: running", "create start spawn"))
        seen = []
        self.manager.subscribe("", lambda kind, event: seen.append((kind, event["name"])))
        self.manager.stop()
        self.ended()
        for name in "later", "db":              # also if what is between them is done
            self.assertLess(seen.index(("exit", "web")), seen.index(("stop_pid", name)))

    def test_lost_again(self):
        """The one that takes the place of another has to wait."""
        self.add("x", "sleep 60", after=["db"])
        self.add("db", "sleep 60")
        self.assertEqual(self.until("x")[0], 200)
        self.ok("PUT", "/processes/db", {"cmd": "sleep 60", "ready": {"exec": "false"}})
        self.kill(self.pids("x")[0])
        until(lambda: self.status("x")["waiting"] == ["db"])
        self.post("db/_stop")
        self.assertError(self.until("x"), 409, "conflict", "'x' waits for 'db', and 'db' is")

    def test_circles(self):
        for name, after in ("a", "b"), ("b", "c"):
            self.add(name, "true", after=[after], start=False)
        info = {"name": "c", "cmd": "true", "after": ["a"]}
        words = "'after' makes a circle: c after"
        self.refused(info, words + " a after b after c")
        self.add("c", "true", start=False)
        self.refused(info, words, path="/c", method="PUT")

    def test_until(self):
        """A failure is told with the reason and the last lines, also by what is after it."""
        self.add("job", "echo 1; echo bad >&2; read line; exit $line", shell=True, restart="never",
                 redirect_input=True)
        for name, after in ("web", "job"), ("top", "web"):
            self.add(name, "sleep 60", after=[after])
        self.read("job", b"\n")
        self.post("job/_add")
        for pid, line in (1, b"3\n"), (2, b"0\n"):
            self.send(pid, line)
            self.exit_of(pid)
        self.post("job/_sub")
        for name, goal, words in (("job", "done", ""),
                                  ("top", "ready", "'top' waits for 'job', and ")):
            self.assertError(self.until(name, goal), 409, "conflict", words + (
                "'job' has failed: exit status 3; its last lines:\n1\n1\nbad\nbad"))
        self.add("on", "sleep 60")
        self.add("off", "sleep 60", start=False)
        self.add("loop", "echo oh; exit 3", shell=True, restart_delay=60, ready={"notify": True})
        self.add("slow", "sleep 60", ready={"tcp": "255.255.255.255:1"})
        until(lambda: self.status("loop")["state"] == "backoff")
        until(lambda: self.ok("GET", "/status/slow?usage=1")["processes"][0]["not_ready"])
        for name, goal, status, words in (
                ("loop", "ready", 504, "; it last ended with: exit status 3; its last lines:\noh"),
                ("slow", "ready", 504, "; its last check: 255.255.255.255:1: "),
                ("on", "done", 409, "its 'restart' is 'always'"),
                ("on", "stopped", 504, "'on' is not stopped in"),
                ("off", "ready", 409, "'off' is stopped; start it"), ("off", "stopped", 200, "")):
            with self.subTest(name=name, goal=goal):
                answer = self.until(name, goal, 0.01)
                self.assertEqual(answer[0], status, answer)
                self.assertIn(words, answer[1].get("reason", ""))
        self.post("job/_start")
        self.send("job", b"3\n")
        reason = self.until("job", "done")[1]["reason"]
        self.assertEqual(reason.count("bad"), 1, "of this run alone")

    def test_commands(self):
        """One that hangs is killed with all that it started; one that has ended gets no signal."""
        old = signal.signal(signal.SIGUSR2, signal.SIG_IGN)     # then a pipe tells what fails
        self.addCleanup(signal.signal, signal.SIGUSR2, old)
        with mock.patch.object(gaffer.os, "killpg", wraps=os.killpg) as killpg:
            self.add("x", "sleep 60", ready={"exec": "true"})
            self.assertEqual(self.until("x")[0], 200)
        self.assertEqual(killpg.call_count, 1)
        for limit in 0.1, 60:
            with self.subTest(limit), http_limits(PROBE_TIME=limit):
                self.add("y", "sleep 60", ready={"exec": "sleep 60 & wait"})
                group = until(lambda: next(iter(self.manager.commands), None)).os_pid
                if limit == 60:                 # it ends with its process, here at gaffer's end
                    self.assertTrue(process_group(group))
                    self.manager.stop()
                    self.ended()
                until(lambda: not process_group(group))
                if limit != 60:
                    self.delete("y")


class ProcessShortage(ProcessCase):
    """What cannot be had for real here: the system call fails in a test's hands."""

    def test_without_a_pidfd(self):
        """The process is polled, and no descriptor is lost."""
        register = self.manager.loop.register

        def full(fd, events, callback):
            if "pidfd" in os.readlink("/proc/self/fd/%d" % fd):
                raise OSError(errno.ENOSPC, "no")
            register(fd, events, callback)
        for name, patch in (
                ("x", mock.patch("os.pidfd_open", create=True,
                                 side_effect=OSError(errno.EMFILE, "no"))),
                ("y", mock.patch.object(self.manager.loop, "register", full))):
            with patch:
                pid, = self.add(name, "cat", redirect_input=True)
                self.kill(pid)
                self.spawned(name, 2)

    def test_a_selector_without_room(self):
        """No process is left that nobody reads, and a connection is closed."""
        wire = self.wire().request("/ping")
        wire.answer()
        with mock.patch.object(self.manager.loop, "register", side_effect=OSError(
                errno.ENOSPC, "no room")), self.assertLogs("gaffer", "WARNING") as logs:
            status, _, data = wire.request("/processes", method="POST",
                                           body=b'{"name": "x", "cmd": "cat"}').answer()
            self.assertEqual((status, json.loads(data)["error"]), (503, "busy"))
            for _ in range(3):
                self.assertEqual(self.wire().request("/watch").file.read(1), b"")
        self.assertEqual(len(logs.output), 1, logs.output)
        self.assertEqual(self.add("x", "cat", redirect_input=True), [1])

    def test_no_memory_for_a_process(self):
        """The answer does not wait for those that are tried again later."""
        with mock.patch("subprocess.Popen", side_effect=MemoryError):
            self.refused({"name": "x", "cmd": "cat"}, "memory", "busy", status=503)
        self.assertEqual(self.ok("GET", "/processes"), [])
        popen = subprocess.Popen

        def full(*args, **options):
            if self.manager.processes:
                raise MemoryError
            return popen(*args, **options)
        with mock.patch("subprocess.Popen", full):
            self.assertEqual(self.add("x", "cat", numprocesses=3, redirect_input=True), [1])
            self.assertEqual(self.status("x")["state"], "backoff")
        until(lambda: len(self.pids("x")) == 3)


class ProcessProgram(Case):
    """A Manager, or the command, as a program of its own."""

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    def test_as_pid_1(self):
        """Orphans of a process become gaffer's, and are no zombies for long."""
        outer = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", PYTHON,
             gaffer.__file__, "serve", "--bind", "127.0.0.1:0"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for cleanup in outer.stdout.close, outer.wait, outer.kill:
            self.addCleanup(cleanup)
        line = outer.stdout.readline().decode()
        if not line:
            self.skipTest("unshare cannot be run here")

        def ask(method, path, body=b""):
            with contextlib.closing(Wire(int(line.rpartition(":")[2]))) as wire:
                return wire.request(path, method=method, body=body).answer()[2]
        ask("POST", "/processes", json.dumps({
            "cmd": "exec 3<&0; for i in 1 2 3 4 5; do (cat <&3 &); done; printf ready; exec cat",
            "name": "x", "shell": True, "redirect_input": True, "restart": "never"}).encode())
        self.assertEqual(ask("GET", "/streams/1/stdout?since=0"), b"ready")
        table = gaffer.ProcfsTable()
        server, = table.children(outer.pid)
        self.assertEqual(len(table.children(server)), 6)
        ask("DELETE", "/streams/1/stdin")
        until(lambda: not table.children(server))
        os.kill(server, signal.SIGTERM)
        self.assertEqual(outer.wait(TIMEOUT), 0)

    PROGRAM = """
        import os, signal, sys
        sys.path.insert(0, %r)
        import gaffer
        signal.signal(signal.SIGINT, signal.default_int_handler)
        manager = gaffer.Manager()
        manager.subscribe("", lambda kind, event: print(kind, flush=True))
        %s
        try:
            manager.run()
        except KeyboardInterrupt:
            print("interrupted")
        try:
            os.wait()
        except ChildProcessError:
            print("nothing is left")
        """

    def begin(self, code):
        child = subprocess.Popen(
            [PYTHON, "-W", "error", "-c", textwrap.dedent(self.PROGRAM) % (
                HERE, textwrap.dedent(code))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            universal_newlines=True)
        self.addCleanup(child.stdout.close)
        return child

    def end(self, child):
        said = child.stdout.read().splitlines()
        self.assertEqual(child.wait(TIMEOUT), 0, said)
        return said

    def test_interrupts(self):
        """A KeyboardInterrupt leaves run(), with all stopped; a second one does not wait."""
        child = self.begin("manager.add_process(%r)" % dict(
            PROCESS_STUBBORN, name="x", graceful_timeout=600, ready={"log": "ready"}))
        for kind in "ready\n", "stop_pid\n":
            self.assertIn(kind, child.stdout)
            child.send_signal(signal.SIGINT)
        self.assertIn("interrupted", self.end(child))

    def test_exits(self):
        """An observer that exits ends run(), but kills nothing that has time to stop."""
        child = self.begin("""
            for name in "xyz":
                manager.add_process(name, "cat", redirect_input=True)
            manager.subscribe("spawn", lambda kind, event: event["pid"] == 3 and manager.stop())
            manager.subscribe("exit", lambda kind, event: sys.exit())
            """)
        self.assertEqual(self.end(child).count("exit"), 3)

    def test_an_interrupt_within_a_step(self):
        """It leaves run() when the step is complete: no process is left half reaped."""
        for call in "waitpid", "killpg":
            with self.subTest(call):
                said = self.end(self.begin("""
                    call, armed = os.%s, []
                    def interrupted(*args):
                        if armed and armed.pop():
                            signal.raise_signal(signal.SIGINT)
                        return call(*args)
                    os.%s = interrupted
                    def spawned(kind, event):
                        armed.append(True)
                        os.kill(event["os_pid"], signal.SIGKILL)
                    manager.subscribe("spawn", spawned)
                    manager.add_process("x", "cat", redirect_input=True, restart="never")
                    """ % (call, call)))
                self.assertIn("exit", said)
                self.assertEqual(said[-2:], ["interrupted", "nothing is left"])

    def test_sig_handler(self):
        """One that was used before stops gently, too. It needs the main thread."""
        handler = gaffer.SigHandler()
        for _ in range(2):
            manager = gaffer.Manager([handler])
            manager.subscribe("spawn", lambda kind, event: signal.raise_signal(signal.SIGTERM))
            manager.add_process("x", "sleep 60")
            manager.run()
            self.assertFalse(manager.killing)
        with concurrent.futures.ThreadPoolExecutor(1) as pool, \
                self.assertRaisesRegex(gaffer.StartError, "main thread"):
            pool.submit(gaffer.Manager([handler]).run).result(TIMEOUT)


# --------------------------------------------------------------------------------------------------
# ring 3: HTTP on real sockets
#
# The endpoints, the errors, the wire, cross-site, the token, TLS, what the library adds. The full
# tables of the parser and of the access rules are in ring 1; here some rows show that they are
# wired in.
# --------------------------------------------------------------------------------------------------
HTTP_OK = {"ok": True}


class HttpCase(ServerCase):
    """A server, and requests byte by byte."""

    def serve(self, *endpoints, **options):
        """Another server, on `endpoints`: HttpEndpoints or addresses (a port of 127.0.0.1)."""
        made = Running(endpoints=[gaffer.HttpEndpoint(each) if isinstance(each, str) else each
                                  for each in endpoints], **options)
        self.addCleanup(made.stop_all)
        return made

    def ask(self, method, target, *headers, server=None, **options):
        """The answer to a request on a connection of its own."""
        wire = self.wire(server=server).request(target, *headers, method=method, **options)
        answer = wire.answer(method)
        wire.close()
        return answer

    def assertCode(self, answer, status, code, words=""):
        """`answer` is the error `code`, in the one form that errors have."""
        self.assertEqual((answer[0], answer[1]["Content-Type"]), (status, "application/json"))
        self.assertRegex(answer[2], rb'\A\{"error": "%b", "reason": ".{10,}"\}\n\Z' % code.encode())
        self.assertIn(words, json.loads(answer[2])["reason"])

    def assertRefused(self, data, status, code):
        """One error is answered to `data`, then the connection ends."""
        wire = self.wire().send(data)
        answer = wire.answer()
        self.assertCode(answer, status, code)
        self.assertEqual((answer[1]["Connection"], wire.file.read()), ("close", b""))
        wire.close()

    def assertOpen(self, wire):
        """The connection goes on: a ping is answered."""
        self.assertEqual(wire.request("/ping").answer()[2], b"OK")

    def rows(self, *rows):
        """Make requests. A row: (method, path, what is answered), and the body where there is one.

        What is answered is a value, or a tuple (status, code, words in the reason).
        """
        for method, path, expected, *body in rows:
            with self.subTest(method + " " + path, body=body):
                status, headers, data = self.server.request(method, path, *body)
                self.assertEqual(headers["Content-Type"], "application/json")
                if isinstance(expected, tuple):
                    self.assertError((status, json.loads(data)), *expected)
                else:
                    self.assertEqual((status, data), (200, json.dumps(expected).encode() + b"\n"))

    def cat(self, name="cat", **options):
        """A template that does nothing for ever; its pids."""
        return self.server.add(name, "cat", redirect_input=True, **options)

    def deaf(self, **options):
        """Add a template that ignores the stop signal; its pid, once it does."""
        pid, = self.server.add("deaf", "trap '' TERM; echo ready; read line", shell=True,
                               redirect_input=True, **options)
        self.assertEqual(self.server.request("GET", "/streams/deaf/stdout?since=0")[2], b"ready\n")
        return pid

    def parked(self, kind="longpoll", count=1, server=None):
        """Wait until that many connections of a kind are on the loop."""
        http_ = (server or self.server).http
        until(lambda: sum(channel.kind == kind for channel in tuple(http_.channels)) == count,
              "%d of kind %s" % (count, kind))

    def all_gone(self, server=None):
        """Wait until all connections that were closed are forgotten."""
        until(lambda: not (server or self.server).http.connections, "the end of the connections")


class HttpEndpointTable(HttpCase):
    def test_welcome(self):
        self.rows(("GET", "/", {"welcome": "gaffer", "version": gaffer.__version__}))
        for name in "abc":
            self.server.manager.add_process(name, "cat", start=False)
        with http_limits(PAGE_EVENTS=2):
            _, headers, page = self.server.request("GET", "/", headers={"Accept": "text/html"})
        self.assertTrue(headers["Content-Type"].startswith("text/html"))
        snapshot = json.loads(re.search(b'id="snapshot">(.*?)</script>', page).group(1))
        self.assertEqual([event["name"] for event in snapshot["events"]], ["b", "c"])

    def test_processes(self):
        bad = 400, "invalid_process_info"
        self.rows(
            ("GET", "/processes", []),
            ("POST", "/processes", HTTP_OK, {"name": "b", "cmd": "cat", "redirect_input": True}),
            ("POST", "/processes", HTTP_OK, {"name": "a", "cmd": "sleep 60", "start": False}),
            ("POST", "/processes", (*bad, "unknown field 'comand', did you mean 'cmd'?"),
             {"name": "c", "comand": "cat"}),
            ("POST", "/processes", (*bad, "'cmd'"), {"name": "c", "cmd": "/no/such/file x"}),
            ("GET", "/processes", ["b", "a"]), ("GET", "/processes?running=1", [1]),
            ("GET", "/processes/b/_pids", {"ok": True, "pids": [1]}),
            ("GET", "/processes/a/_pids", {"ok": True, "pids": []}),
            ("DELETE", "/processes/b", HTTP_OK), ("DELETE", "/processes/b", (404, "not_found")),
            ("GET", "/processes", ["a"]), ("GET", "/processes?running=true", []))

    def test_replace(self):
        self.cat("web")
        changed, unchanged = {"ok": True, "changed": True}, {"ok": True, "changed": False}
        created, cat = {"ok": True, "created": True}, {"cmd": "cat", "redirect_input": True}
        for pid, (method, cmd) in enumerate((("PUT", "sleep 60"), ("POST", "sleep 61")), 1):
            path, running = "/processes/web", "/processes?running=1"
            self.rows((method, path + "?dry_run=true", changed, {"cmd": cmd}),
                      ("GET", running, [pid]), (method, path, changed, {"cmd": cmd}))
            until(lambda: self.server.ok("GET", running) == [pid + 1], "the new process")
            self.rows((method, path, unchanged, {"cmd": cmd, "name": "web", "start": True}))
        self.rows(
            ("POST", "/processes/new", (404, "not_found"), cat),
            ("PUT", "/processes/new?dry_run=true", created, cat),
            ("POST", "/processes?dry_run=true", HTTP_OK, dict(cat, name="other")),
            ("GET", "/processes", ["web"]), ("PUT", "/processes/new", created, cat),
            ("GET", "/processes", ["web", "new"]))

    def test_actions(self):
        """They may be repeated; numbers (in ASCII) and signals are checked; a pid has but two."""
        self.cat("web")
        path, missing = "/processes/web/", (404, "not_found")
        for action in "_stop", "_start", "_restart", "_stop", "_restart":
            for _ in range(2):
                self.rows(("POST", path + action, HTTP_OK))
                active = self.server.ok("GET", "/status/web")["active"]
                self.assertEqual(active, action != "_stop", action)
        pid = self.deaf()
        with http_limits(WAIT_EXTRA=-9.9):      # beside graceful_timeout
            self.rows(("POST", "/processes/deaf/_stop?wait=true",
                       (504, "wait_timeout", "in 0.1 seconds")))
        self.rows(
            *(("POST", path + action, (400, "bad_value")) for action in (
                "_add/0", "_sub/1e3", "_add/1%D9%A3", "_signal/0", "_signal/SIG",
                "_signal/%C2%B2")),
            ("DELETE", "/processes/%C2%B2", missing), ("GET", "/stats/web/%C2%B2", missing),
            ("GET", "/processes/%3Cpid%3E", missing),
            ("POST", path + "_add", {"ok": True, "numprocesses": 2}),
            ("POST", path + "_sub/5", {"ok": True, "numprocesses": 0}),
            ("POST", path + "_stop", HTTP_OK),
            ("POST", path + "_add/" + "9" * 30, {"ok": True, "numprocesses": 1000}),
            *(("POST", "/processes/%d/%s" % (pid, action), (404, "resource_not_found"))
              for action in ("_start", "_restart", "_add", "_sub/1")))

    def test_status(self):
        self.server.add("web", "sleep 60", numprocesses=2)
        for action, *expected in ("_start", True, 2, 2, 2), ("_stop", False, 0, 2, 2):
            self.server.ok("POST", "/processes/web/" + action)
            status = self.server.ok("GET", "/status/web")
            self.assertEqual([status[field] for field in (
                "active", "running", "numprocesses", "max_processes")], expected)
        self.rows(("GET", "/status/wep", (404, "not_found", "did you mean 'web'")))

    def test_stats(self):
        self.cat("web")
        self.cat("off", start=False)
        numbers = dict.fromkeys("mem max_mem min_mem cpu max_cpu min_cpu".split(), 0)
        web, off = self.server.ok("GET", "/stats")
        self.assertEqual((web["name"], off), ("web", dict(numbers, name="off", stats=[])))
        one, entry = self.server.ok("GET", "/stats/web"), self.server.ok("GET", "/stats/web/1")
        self.assertEqual((set(one), set(one["stats"][0])), (set(off), set(entry)))
        self.assertEqual(" ".join(sorted(entry)), "children cmdline cpu ctime id mem mem_info1 "
                         "mem_info2 nice pid rss username vms")
        self.assertEqual((entry["id"], entry["pid"]),
                         (1, self.server.ok("GET", "/processes/1")["os_pid"]))
        self.rows(*(("GET", path, (404, "not_found")) for path in (
            "/stats/nobody", "/stats/off/1", "/stats/web/web")))

    def test_groups(self):
        names = "shop:web", "alone", "shop:worker", "blog:web"
        self.rows(("GET", "/groups", []))
        for name in names:
            self.cat(name)
        self.rows(("GET", "/groups", ["shop", "blog"]),
                  ("GET", "/groups/shop/", ["shop:web", "shop:worker"]))
        for action, active in (("_stop", False), ("_start", True), ("_restart?wait=true", True)):
            self.rows(("POST", "/groups/shop/" + action, HTTP_OK))
            self.assertEqual([self.server.ok("GET", "/status/" + name)["active"] for name in names],
                             [active, True, active, True])
        self.rows(("DELETE", "/groups/shop", HTTP_OK), ("GET", "/processes", ["alone", "blog:web"]),
                  ("GET", "/groups/shop", (404, "not_found")))

    def test_ready(self):
        """What is active and is not as it is wanted is named; nothing is, while gaffer stops."""
        good = 200, {"ready": True, "waiting": []}
        self.cat("web")
        self.cat("off", start=False)
        self.assertEqual(self.server.json("GET", "/readyz"), good)
        self.server.add("ends", "true", flapping={"attempts": 1, "retry_in": 1000})
        bad = 503, {"ready": False, "waiting": ["ends"]}
        until(lambda: self.server.json("GET", "/readyz") == bad, "the end of the process")
        self.rows(("POST", "/processes/2/_signal/KILL", (404, "not_found", "has exited")),
                  ("POST", "/processes/ends/_stop", HTTP_OK))
        self.assertEqual(self.server.json("GET", "/readyz"), good)
        with mock.patch.object(self.server.manager, "stopping", True):
            self.assertEqual(self.server.json("GET", "/readyz")[0], 503)

    def test_head(self):
        """The head of GET; at once where GET waits, and then without a length (RFC 9110, 8.6)."""
        self.cat("web")
        for path in ("/", "/nothing", "/watch?since=0", "/wstreams/1", "/watch?feed=eventsource",
                     "/streams/1/stdout?feed=continuous"):
            with self.subTest(path=path):
                wires = [self.wire(path, method=method) for method in ("GET", "HEAD")]
                get, head = ([each for each in sorted(wire.headers.items()) if each[0] != "Date"]
                             for wire in wires)
                self.assertEqual((wires[1].status, head), (wires[0].status, get))
                if "feed" in path:
                    self.assertEqual(wires[1].file.read(), b"")
                else:
                    self.assertOpen(wires[1])
        for path in "/watch", "/streams/1/stdout", "/stats?feed=longpoll&interval=1000":
            with self.subTest(path=path):
                head = self.wire(path, method="HEAD")
                self.assertEqual((head.status, head.headers["Content-Length"]), (200, None))
                self.assertOpen(head)

    def test_wrong_methods(self):
        """No action can be had by a link or an image, whatever that claims to override."""
        self.cat("web", custom_streams=["chat"])
        for allow, paths in {
                "GET, HEAD, OPTIONS": "/ /processes/web/_pids /watch/proc/web /streams/1/stdout",
                "GET, HEAD, POST, OPTIONS": "/processes",
                "GET, HEAD, POST, PUT, DELETE, OPTIONS": "/processes/web",
                "GET, HEAD, DELETE, OPTIONS": "/processes/1 /groups/g",
                "POST, DELETE, OPTIONS": "/streams/1/stdin",
                "GET, HEAD, POST, DELETE, OPTIONS": "/streams/1/chat",
                "POST, OPTIONS": "/processes/web/_stop /processes/1/_stop /processes/web/_sub/2 "
                                 "/processes/web/_signal/TERM /groups/g/_stop"}.items():
            for path, method in itertools.product(paths.split(), (
                    {"GET", "POST", "PUT", "DELETE", "PATCH"} - set(allow.split(", ")))):
                with self.subTest(method=method, path=path):
                    answer = self.ask(method, path, "X-HTTP-Method-Override: POST")
                    self.assertCode(answer, 405, "method_not_allowed")
                    self.assertEqual(answer[1]["Allow"], allow)
        self.assertEqual(self.server.ok("GET", "/processes?running=true"), [1])


class HttpMetrics(HttpCase):
    options = {"window": 4096, "handlers": [("/slow", lambda request: (202, {}, b""))],
               "wsgi": {"/wsgi": lambda environ, start: start("404 Not Found", []) and [b"gone"]}}

    def metrics(self):
        """{name without its prefix, and labels: number}"""
        status, headers, data = self.server.request("GET", "/metrics")
        self.assertEqual((status, headers["Content-Type"]),
                         (200, "text/plain; version=0.0.4; charset=utf-8"))
        found = prom_parse(data)
        self.assertTrue(all(name.startswith(("gaffer_", "process_")) for name in found), found)
        return {sample.replace("gaffer_", "") + "".join(" " + value for _, value in labels): number
                for _, samples in found.values() for (sample, labels), number in samples.items()}

    def assertMetrics(self, **expected):
        found = self.metrics()
        self.assertEqual({**found, **expected}, found)

    def test_processes(self):
        command = python("import sys; sys.exit(sys.stdin.read() and 7)")
        self.server.add("web", command, redirect_input=True, numprocesses=2,
                        flapping={"attempts": 9})
        self.cat("off", start=False, numprocesses=5)
        self.server.add("deaf", "sleep 60", redirect_input=True, ready={"exec": "false"})
        self.assertMetrics(**{
            "processes web running": 2, "processes web stopping": 0, "processes off running": 0,
            "processes_wanted web": 2, "processes_wanted off": 0, "processes_wanted deaf": 1,
            "processes_ready web": 2, "processes_ready deaf": 0})
        self.server.request("POST", "/streams/1/stdin", b"x")
        self.server.request("DELETE", "/streams/1/stdin")
        self.server.ok("POST", "/processes/2/_signal/KILL")
        until(lambda: self.metrics()["process_restarts_total web"] == 2)
        self.assertMetrics(**{"process_exits_total web 7 0": 1, "process_exits_total web 0 9": 1})
        self.server.ok("DELETE", "/processes/web")
        self.assertNotIn("processes_wanted web", self.metrics())

    def test_cut_reader(self):
        """What a slow reader that is cut has missed is counted."""
        size = 8 * gaffer.MIB                   # more than the sockets hold
        self.server.add("web", "read x; head -c %d /dev/zero; read x" % size, shell=True,
                        redirect_input=True)
        wire = self.wire("/streams/1/stdout?feed=continuous&since=0", receive_buffer=4096)
        self.server.ok("POST", "/streams/web/stdin", b"\n")
        until(lambda: self.metrics()["stream_bytes_total web stdout"] == size, "all output")
        data, whole = wire.chunks()
        self.assertFalse(whole)
        lost = self.metrics()["stream_dropped_bytes_total web stdout"]
        self.assertGreater(lost, 0)
        self.assertLessEqual(len(data) + lost, size)

    def test_requests(self):
        self.cat("web")
        before = self.metrics()["http_requests_total GET 200"]
        for method, path in (
                ("GET", "/ping"), ("POST", "/slow"), ("GET", "/nothing"), ("GET", "/wsgi"),
                ("FOO", "/"), ("BAR", "/"), ("GET", "/watch?timeout=0"),
                ("HEAD", "/watch?feed=continuous")):
            self.server.request(method, path)
        self.assertEqual(self.wire().send(b"no request\r\n\r\n").answer()[0], 400)
        self.assertEqual(self.websocket("/wstreams/1?readonly=true").status, 101)
        poll = self.wire().request("/streams/1/stdout")
        self.parked()
        found = self.metrics()
        self.assertEqual([found["http_streams longpoll"], found["http_streams websocket"]], [1, 1])
        answers = {labels[20:]: count for labels, count in found.items()
                   if labels.startswith("http_requests_total")}
        self.assertEqual(answers, {
            "GET 200": before + 2, "POST 202": 1, "GET 404": 2, "other 501": 2, "other 400": 1,
            "GET 204": 1, "HEAD 200": 1, "GET 101": 1, "POST 200": 1})      # of them five waited
        self.assertEqual(found["http_request_seconds_count"], sum(answers.values()) - 5)
        self.assertGreaterEqual(found["http_connections"], 3)
        poll.close()
        until(lambda: not self.metrics()["http_streams longpoll"], "the end of the poll")

    def test_itself(self):
        self.cat("web")
        found = self.metrics()
        self.assertEqual(found["events_total"], 3)
        self.assertLess(abs(found["process_start_time_seconds"] - time.time()), 3600)


class HttpLogs(HttpCase):
    def setUp(self):
        Case.setUp(self)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "log")

    def serve_logged(self, path=None, **options):
        self.log = options["access_log"] = gaffer.AccessLog(path or self.path)
        self.server = self.serve(wsgi=HttpMetrics.options["wsgi"], **options)

    def lines(self, count):
        """The lines of the file, once there are so many."""
        until(lambda: os.path.exists(self.path) and cli_read(self.path).count("\n") >= count,
              "%d lines" % count)
        return access_lines(cli_read(self.path))

    def test_requests(self):
        self.serve_logged()
        expected = []
        for method, target, headers, *logged in (
                ("GET", "/ping?_x=%22y", ("User-Agent: me", "Referer: http://there/"),
                 200, 2, "http://there/", "me"),
                ("HEAD", "/ping", (), 200, 0, "-", "-"),
                ("GET", "/watch?timeout=0", (), 204, 0, "-", "-"),
                ("GET", "/wsgi/x", (), 404, 4, "-", "-")):
            self.ask(method, target, *headers)
            expected.append(("127.0.0.1", "%s %s HTTP/1.1" % (method, target), *logged))
            self.lines(len(expected))           # what has a thread is logged when that ends
        refusal = self.wire().send(b"GET /\xff\r\n\r\n").answer()
        expected.append(("127.0.0.1", "-", 400, len(refusal[2]), "-", "-"))
        self.assertEqual([(line[0], *line[2:]) for line in self.lines(5)], expected)
        os.rename(self.path, self.path + ".1")
        self.server.request("GET", "/ping?2")
        self.assertEqual(self.lines(1)[0][2], "GET /ping?2 HTTP/1.1")

    def test_streams(self):
        """They have their line at their end."""
        self.serve_logged()
        self.cat()
        self.lines(2)
        feed = self.wire("/streams/1/stdout?feed=continuous")
        made = self.websocket("/wstreams/1")
        made.text("hello\n")
        self.assertEqual((feed.chunk(), made.read()), (b"hello\n", (1, b"hello\n")))
        poll = self.wire().request("/streams/1/stdout?since=6")
        self.parked()
        self.assertEqual(len(self.lines(2)), 2)
        for wire in feed, made, poll:
            wire.close()
        self.assertEqual({line[2:5] for line in self.lines(5)[2:]}, {
            ("GET /streams/1/stdout?feed=continuous HTTP/1.1", 200, len(b"6\r\nhello\n\r\n")),
            ("GET /wstreams/1 HTTP/1.1", 101, 8),
            ("GET /streams/1/stdout?since=6 HTTP/1.1", 499, 0)})

    def test_that_cannot_be_written(self):
        """On a full disk, and where nobody reads it, lines are lost, and nobody is held up."""
        os.mkfifo(self.path)
        pipe = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        self.addCleanup(os.close, pipe)
        self.fill(pipe)
        for path, size, reason in ((self.path, 1000, "nobody reads it"),
                                   ("/dev/full", 10 ** 7, "no space left on device")):
            with self.subTest(path), http_limits(LOG_SIZE=size, LOG_END=0.05), \
                    self.assertLogs("gaffer", "WARNING") as logged:
                self.serve_logged(path)
                while not logged.output:
                    self.assertEqual(self.server.request("GET", "/ping")[0], 200)
                self.server.stop_all()
            while self.log._thread.is_alive():      # or it makes the file anew
                with contextlib.suppress(BlockingIOError):
                    os.read(pipe, 65536)
            self.assertEqual(len(logged.output), 1)
            self.assertIn("the access log '%s' cannot be written: %s; 1 lines" % (path, reason),
                          logged.output[0])

    @staticmethod
    def emit(handler, text):
        handler.emit(logging.makeLogRecord({"msg": text}))

    @staticmethod
    def fill(fd):
        """Fill a pipe. Return by how many bytes."""
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += os.write(fd, b"-")
        return filled

    def test_full_disk(self):
        with http_limits(LOG_SIZE=1):           # it is full until a line is written, or lost
            handler = gaffer.LogHandler(self.path)
            with mock.patch.object(handler.writer, "write", side_effect=OSError):
                self.emit(handler, "lost")
                until(lambda: not handler.writer.full)
            self.emit(handler, "more")
            handler.close()
        self.assertEqual(cli_read(self.path),
                         "gaffer: 1 lines of this log were dropped so far\nmore\n")

    def test_full_pipe(self):
        """Nothing waits for it: not the start, not a line, not the end."""
        os.mkfifo(self.path)
        with self.assertRaisesRegex(gaffer.StartError, "the log file '.*' cannot be written"):
            gaffer.LogHandler(self.path)
        read = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        with contextlib.closing(os.fdopen(read, "rb", 0)) as pipe, http_limits(
                LOG_SIZE=8192, LOG_END=0.05):
            handler = gaffer.LogHandler(self.path)
            filled, count, data = self.fill(handler.writer.fd), 0, b""
            while not handler.writer.full:
                self.emit(handler, "line %d" % count)
                count += 1
            for _ in range(7):
                self.emit(handler, "lost")
            while handler.writer.full:
                data += pipe.read(65536) or b""
            self.emit(handler, "more")
            while not data.endswith(b"more\n"):
                data += pipe.read(65536) or b""
            self.assertEqual(data[filled:], b"".join(b"line %d\n" % n for n in range(count))
                             + b"gaffer: 7 lines of this log were dropped so far\nmore\n")
            self.fill(handler.writer.fd)
            self.emit(handler, "the end")
            handler.close()                     # waits no longer than it may
            while handler.writer._thread.is_alive():
                pipe.read(65536)

    def test_reopened_at_once(self):
        """Each descriptor is closed once, by its owner: it may be a client's socket by then."""
        before = set(open_descriptors())
        handler, end = gaffer.LogHandler(self.path), threading.Event()
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)

        def reopen():
            for number in range(300):
                self.emit(handler, "line %d" % number)
                handler.writer.reopen()

        def borrow():               # its close() fails if gaffer has closed its descriptor
            while not end.is_set():
                with open(os.devnull, "rb"):
                    pass
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            borrowed, *reopened = [pool.submit(each) for each in (borrow, reopen, reopen, reopen)]
            concurrent.futures.wait(reopened)
            end.set()
            for each in [borrowed, *reopened]:
                each.result()
        self.emit(handler, "the end")
        until(lambda: "the end" in cli_read(self.path), "the last line")
        self.assertEqual([what for fd, what in open_descriptors().items() if fd not in before],
                         [self.path])
        handler.close()


class HttpOpenapi(HttpCase):
    quick = False

    def test_routes(self):
        described = self.server.ok("GET", "/openapi.json")
        self.assertEqual((described["openapi"], described["info"]["version"]),
                         ("3.1.0", gaffer.__version__))
        self.assertNotIn("security", described)
        shapes = {re.sub(r"{\w+}", "<>", path): methods
                  for path, methods in described["paths"].items()}
        self.assertEqual(len(shapes), len(described["paths"]), "two paths differ in names alone")
        routes = {(re.sub(r"<[^>]+>", "<>", pattern), method)
                  for pattern, methods in gaffer.ROUTES
                  for method in {*methods} - {"*"} | ({"HEAD"} if "GET" in methods else set())}
        self.assertEqual(routes, {(shape, method.upper()) for shape, methods in shapes.items()
                                  for method in methods})
        for path, methods in gaffer.openapi(gaffer.ROUTES, True)["paths"].items():
            for operation in methods.values():      # what a validator does not ask for
                self.assertRegex(operation["summary"], "^[A-Z].{8,}", path)
                self.assertIn("default", operation["responses"], path)
                self.assertEqual("security" in operation, path in gaffer.OPEN_PATHS, path)
        fields = described["components"]["schemas"]["Template"]["properties"]
        self.assertEqual(list(fields), list(gaffer.OPTIONS))

    def test_parameters(self):
        used = {name for _, methods in gaffer.ROUTES for method, handler in methods.items()
                if method != "*" for name in handler.query}
        self.assertEqual(used, set(gaffer.PARAMETERS))
        for name, good, bad in (
                ("feed", {"longpoll": "longpoll"}, ("", "x", "Longpoll")),
                ("running", {"true": True, "1": True, "false": False, "0": False}, ("", "yes")),
                ("timeout", {"0": 0.0, ".5": 0.5, "5.": 5.0, "9.999912345678": 9.999912345678},
                 ("", "-1", "+1", "1e3", "nan", "9" * 400, "\u0663", "\xb2")),
                ("heartbeat", {"true": 60.0, "false": None, "0.1": 0.1}, ("0", "soon", "0.05")),
                ("wait", {"true": True, "2": 2.0}, ("x",)), ("interval", {"0.1": 0.1}, ("0",)),
                ("tail", {"all": math.inf, "12": 12}, ("-1", "1.0", "", "9" * 10, "\xb2")),
                ("loss", {"skip": "skip"}, ("cut", "")),
                ("since", {"": None}, ("x", "-1", "1@", "1@x@", "1.0", "\u0663"))):
            def parse(text, name=name):
                request = pure_request(target="/?_=7&%s=%s" % (name, urllib.parse.quote(text)))
                return getattr(gaffer.parse_query(request, (name,)), name)
            self.assertTable(parse, [*good.items(), *((text, gaffer.BadValue) for text in bad)])
        self.rows(*((method, target, (400, "bad_value", words)) for method, target, words in (
            ("GET", "/streams?tail=all&grep=hello", "unknown parameter 'grep'"),
            ("GET", "/watch?feed=longpoll&heartbeat=soon", "0.1 to 10000000, true or false"),
            ("POST", "/processes?dry=1", "did you mean 'dry_run'?"))))
        self.assertEqual(self.ask("GET", "/ping?_=1&_x=2")[0], 200)

    def test_valid(self):
        """So a validator says; and the schema of a template takes and refuses what gaffer does."""
        try:
            import jsonschema
            import openapi_spec_validator
        except ImportError:
            self.skipTest("needs openapi-spec-validator from PyPI")
        described = json.loads(json.dumps(gaffer.openapi(gaffer.ROUTES, True)))
        openapi_spec_validator.validate(
            described, cls=openapi_spec_validator.OpenAPIV31SpecValidator)
        validator = jsonschema.Draft202012Validator(described["components"]["schemas"]["Template"])
        for fields in (
                {"args": "a b"}, {"env": {"A": 1, "B": "b"}}, {"env": {"A": True}}, {"name": "1"},
                {"numprocesses": 1001}, {"numprocesses": 1.5}, {"unknown": 1},
                {"redirect_output": ["a", "b", "c"]}, {"custom_streams": ["a", "a"]},
                {"flapping": {"attempts": 3}}, {"flapping": {"tries": 3}}):
            with self.subTest(**fields):
                template, good = {"name": "x", "cmd": "true", **fields}, True
                try:
                    checked = gaffer.check_template(template)
                    self.assertTrue(validator.is_valid(checked), "with the defaults")
                except gaffer.InvalidProcessInfo:
                    good = False
                self.assertEqual(validator.is_valid(template), good)


class HttpErrorTable(HttpCase):
    def test_every_code(self):
        self.cat("web")
        self.server.add("quiet", "sleep 60", redirect_output=[])
        self.server.add("full", "sleep 60", redirect_input=True)
        half = bytes(gaffer.STDIN_SIZE * 3 // 4)
        self.server.ok("POST", "/streams/full/stdin", half)
        self.deaf(graceful_timeout=TIMEOUT)
        secured = self.serve(token="secret")
        many = ["X-%d: x" % number for number in range(gaffer.HEADERS_MAX)]
        patch = mock.patch.object
        faults = {
            "timeout": http_limits(BODY_TIME=0.05), "busy": http_limits(CONNECTIONS_MAX=0),
            "forbidden": patch(gaffer.os, "kill", side_effect=PermissionError(1, "no")),
            "internal_error": patch(self.server.manager, "find_template", side_effect=KeyError(7))}
        for status, code, method, target, *rest in (
                (400, "invalid_json", "POST", "/processes", b"{"),
                (400, "invalid_process_info", "POST", "/processes", b"[]"),
                (400, "bad_value", "POST", "/processes/web/_add/0"),
                (400, "no_signal_number", "POST", "/processes/web/_signal"),
                (400, "io_not_redirected", "GET", "/streams/2/stdout"),
                (400, "bad_request", "GET", "/%zz"),
                (401, "unauthorized", "GET", "/processes"),
                (403, "forbidden", "POST", "/processes/quiet/_signal/USR1"),
                (403, "forbidden_write", "POST", "/streams/quiet/stdin", b"x"),
                (403, "forbidden_origin", "DELETE", "/processes/web", "Origin: http://a.x"),
                (403, "forbidden_host", "GET", "http://evil.example/ping"),
                (404, "not_found", "GET", "/processes/nobody"),
                (404, "resource_not_found", "POST", "/processes/web/_jump"),
                (404, "io_not_found", "GET", "/streams/web/sound"),
                (404, "bad_event_type", "GET", "/watch/party"),
                (405, "method_not_allowed", "PUT", "/processes", b"{}"),
                (408, "timeout", "POST", "/processes", "Content-Length: 5"),
                (409, "conflict", "POST", "/processes", b'{"name": "web", "cmd": "cat"}'),
                (413, "too_large", "POST", "/streams/1/stdin", bytes(gaffer.BODY_SIZE + 1)),
                (414, "uri_too_long", "GET", "/" + "x" * gaffer.TARGET_SIZE),
                (415, "unsupported_media_type", "POST", "/", "Content-Encoding: gzip", b"x"),
                (417, "bad_request", "POST", "/processes", "Expect: miracles", b"x"),
                (426, "upgrade_required", "GET", "/wstreams/1"),
                (431, "headers_too_large", "GET", "/", *many),
                (500, "internal_error", "GET", "/status/web"),
                (501, "method_not_allowed", "FOO", "/"),
                (503, "stdin_full", "POST", "/streams/full/stdin", half),
                (503, "busy", "GET", "/"),
                (504, "wait_timeout", "POST", "/processes/deaf/_stop?wait=0.05"),
                (503, "stopping", "GET", "/stats?feed=longpoll&interval=1000")):
            server = secured if status == 401 else self.server
            body = rest.pop() if rest and isinstance(rest[-1], bytes) else b""
            logged = code in ("busy", "internal_error")
            with self.subTest(code), faults.get(code, contextlib.nullcontext()), (
                    self.assertLogs("gaffer") if logged else contextlib.nullcontext()):
                wire = self.wire(server=server).send(http_bytes(method, target, *rest, body=body))
                if code == "stopping":
                    self.parked()
                    self.server.ok("POST", "/processes/deaf/_signal/KILL")
                    server.manager.stop()
                answer = wire.answer()
                self.assertCode(answer, status, code)
                self.assertNotIn(b"KeyError", answer[2])


class HttpSyntax(HttpCase):
    def setUp(self):
        self.hits = []
        self.options = {"handlers": [("/hit.*", self._hit)]}
        super().setUp()

    def _hit(self, request):
        self.hits.append(request.target)
        return request.body

    def test_refused(self):
        """The connection ends, and what is behind is not read as a request."""
        inner = http_bytes("POST", "/hit-inner")
        host, chunked = b"\r\nHost: 127.0.0.1\r\n", "Transfer-Encoding: chunked"
        for status, code, *wires in (
                (400, "bad_request", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + host, b"\r\n" * 100,
                 b"GET /hit HTTP/1.1\nHost: 127.0.0.1\n\n", b"GET /hit HTTP/1.1\r\n",
                 *(http_bytes("POST", "/hit", header, body=b"0\r\n\r\n") for header in (
                     "Content-Length: 5\r\n" + chunked, "X: y\r" + chunked)),
                 http_bytes("POST", "/hit", chunked, body=b"2\r\na\r\n0\r\n\r\n")),
                (413, "too_large", http_bytes("POST", "/hit", chunked, body=b"F" * 8 + b"\r\n")),
                (414, "uri_too_long", b"x" * 100000),
                (505, "bad_request", b"PRI * HTTP/2.0" + host)):
            for wire in wires:
                with self.subTest(wire[:70]):
                    end = b"" if wire.endswith(b"\r\n\r\n") else b"\r\n"
                    self.assertRefused(wire + end + inner, status, code)
        self.assertEqual(self.hits, [])

    def test_body_is_no_request(self):
        """Whatever the method, and whether anybody asked for the body."""
        inner = http_bytes("GET", "/hit-inner")
        for method, path, status in (("GET", "/ping", 200), ("DELETE", "/nothing", 404),
                                     ("OPTIONS", "*", 204), ("POST", "/processes", 400)):
            for headers, body in ((), inner), (("Transfer-Encoding: chunked",), http_chunks(inner)):
                with self.subTest(method=method, headers=headers):
                    wire = self.wire().request(path, *headers, method=method, body=body)
                    self.assertEqual(wire.answer(method)[0], status)
                    self.assertOpen(wire)
        self.assertEqual(self.hits, [])

    def test_expect(self):
        """100 before the body is sent, never before a refusal."""
        expect, size = "Expect: 100-Continue", "Content-Length: %d"
        for status, path, header in (404, "/nope", size % 5), (413, "/hit", size % 2 ** 40):
            wire = self.wire().request(path, expect, header, method="POST")
            self.assertEqual((wire.answer()[0], wire.file.read()), (status, b""))
        for header, body in ((size % 5, b"hello"),
                             ("Transfer-Encoding: chunked", http_chunks(b"hello"))):
            wire = self.wire().request("/hit", expect, header, method="POST")
            self.assertEqual(wire.file.read(25), b"HTTP/1.1 100 Continue\r\n\r\n")
            self.assertEqual(wire.send(body).answer()[2], b"hello")
            self.assertOpen(wire)
        self.assertEqual(self.ask("POST", "/hit", expect, size % 0)[0], 200)
        for version in "1.0", "1.1":            # 1.0 has none (RFC 9110 10.1.1)
            answer = self.ask("POST", "/hit", expect, body=b"old", version=version)
            self.assertEqual(answer[2], b"old")

    def test_targets(self):
        """The authority counts as the Host (RFC 9112 section 3.2.2); each part of a path is decoded
        once, and never becomes two parts or a header. JSON is in UTF-8,
        with any Content-Type."""
        answer = self.ask("GET", "HTTP://LOCALHOST:99/hit?a=1", host="evil.example")
        self.assertEqual((answer[0], self.hits), (200, ["/hit?a=1"]))
        self.ask("PUT", "/processes/a:b@c", "Content-Type: text/plain; charset=latin-1",
                 body='{"cmd": "\u00e9", "start": false}'.encode())
        self.assertEqual(self.server.ok("GET", "/%70rocesses/a%3ab%40c/")["cmd"], "\u00e9")
        for status, target in (
                (403, "http://evil.example/hit"), (404, "/processes%2Fa:b@c"),
                (404, "/processes/a%253ab%2540c"), (404, "/processes/%0d%0aX:y"),
                (400, "/processes?running=1&r%75nning=0")):
            answer = self.ask("GET", target)
            self.assertEqual((answer[0], answer[1]["X"]), (status, None), target)

    def test_slow_requests(self):
        """408 for what does not come; a connection without a request is just closed."""
        head = http_bytes("POST", "/hit", "Content-Length: 5")
        with http_limits(HEAD_TIME=0.05, BODY_TIME=0.05, KEEP_TIME=0.05, IDLE_TIME=0.05,
                         LINGER_TIME=0.05):
            for data in b"G", head[:-2], head + b"four":
                self.assertRefused(data, 408, "timeout")
            self.assertEqual(self.wire().file.read(), b"")
            wire = self.wire()
            self.assertOpen(wire)
            self.assertEqual(wire.file.read(), b"")
        self.assertEqual(self.hits, [])

    def test_half_closed(self):
        """Who closes his side gets answers to what was whole."""
        ping, half = http_bytes("GET", "/ping"), http_bytes("POST", "/hit", "Content-Length: 5")
        large = http_bytes("POST", "/hit", "Transfer-Encoding: chunked",
                           body=b"1\r\na\r\n" * 5000 + b"0\r\n\r\n")
        for data, *answers in (
                (b"",), (half[:-2],), (half + b"four",), (large * 2, *[b"a" * 5000] * 2),
                (ping + large[:-2], b"OK"),
                (ping * 100 + http_bytes("GET", "/watch"), *[b"OK"] * 100)):
            with self.subTest(data[:30], size=len(data)):
                wire = self.wire().send(data)
                wire.sock.shutdown(socket.SHUT_WR)
                self.assertEqual([wire.answer()[2] for _ in answers], answers)
                self.assertEqual(wire.file.read(), b"")
        self.assertEqual(len(self.hits), 2)


class HttpConnections(HttpCase):
    options = {"handlers": [("/echo", lambda request: request.body)], "wsgi": {
        "/big": lambda environ, start: start("200 OK", []) and [bytes(32 * gaffer.MIB)]}}

    def test_keep_alive(self):
        """HTTP/1.1 goes on until somebody says close; HTTP/1.0 only where it is asked for."""
        for version, header, said in (
                ("1.1", "X: y", None), ("1.1", "Connection: x, Close", "close"),
                ("1.0", "X: y", "close"), ("1.0", "Connection: Keep-Alive", "keep-alive")):
            for path in "/ping", "/watch?timeout=0.01":
                wire = self.wire().request(path, header, version=version)
                self.assertEqual(wire.answer()[1]["Connection"], said, (version, header, path))
                if said == "close":
                    self.assertEqual(wire.file.read(), b"")
                else:
                    self.assertOpen(wire)

    def test_pipeline(self):
        """The order holds; what is behind a long poll waits, some of it in the socket."""
        self.server.ok("POST", "/processes", {"name": "web", "cmd": "cat", "start": False})
        wire, ping = self.wire(), http_bytes("GET", "/ping")
        wire.send(b"".join(http_bytes("POST", "/processes/web/_add", body=b"x" * number)
                           for number in range(9)) + http_bytes("GET", "/watch/delete") + ping)
        self.assertEqual([json.loads(wire.answer()[2])["numprocesses"] for _ in range(9)],
                         list(range(2, 11)))
        self.parked()
        count = 80000 // len(ping)
        sender = threading.Thread(target=wire.send, args=(ping * count,))
        sender.start()
        self.addCleanup(sender.join)
        self.server.ok("DELETE", "/processes/web")
        self.assertEqual(json.loads(wire.answer()[2])["name"], "web")
        self.assertEqual({wire.answer()[2] for _ in range(count + 1)}, {b"OK"})

    def test_no_thread(self):
        """A request is refused in a sentence; what lasts goes on, on the loop."""
        feed = self.wire("/watch?feed=continuous")
        with http_limits(THREADS_MAX=0), self.assertLogs("gaffer", "WARNING"):
            self.assertOpen(self.wire())
            for sent in (http_bytes("GET", "/metrics"), b"GET /pi",
                         http_bytes("POST", "/processes", body=b"{}")):
                wire = self.wire().send(sent)
                self.assertCode(wire.answer(), 503, "busy")
                self.assertEqual(wire.file.read(), b"")
        with self.assertLogs("gaffer", "WARNING") as logged, mock.patch(
                "threading.Thread.start", side_effect=RuntimeError("no more")):
            self.assertCode(self.wire().send(b"GET /pi").answer(), 503, "busy")
        self.assertIn("no thread: no more", logged.output[0])
        self.cat("web")
        self.assertEqual(json.loads(feed.chunk())["event"], "create")

    def test_no_memory(self):
        """For a thread to begin with; the next request is answered."""
        gate, ended, begin = threading.Event(), threading.Event(), threading.Thread._bootstrap

        def late(thread):
            gate.wait(TIMEOUT)
            begin(thread)
            ended.set()
        with self.assertLogs("gaffer", "WARNING") as logs:
            with mock.patch("threading.Thread._bootstrap", late), \
                    http_limits(BEGIN_TIME=0.05):
                self.assertCode(self.wire().request("/metrics").answer(), 503, "busy")
            gate.set()
            self.assertTrue(ended.wait(TIMEOUT))
        self.assertIn("no thread: it does not begin", logs.output[0])
        self.assertOpen(self.wire())

    def test_accepted(self):
        """In turns; after a shortage a moment later."""
        loop, counts, listener = self.server.manager.loop, [], self.server.http.listeners[0]

        def look():
            counts.append(len(self.server.http.connections))
            if counts[-1] < 40:
                loop.call_soon(look)
        self.all_gone()
        loop.call(lambda: (look(), [self.wire() for _ in range(40)]))
        until(lambda: counts[-1] == 40, "all")
        steps = [after - before for before, after in zip(counts, counts[1:])]
        self.assertLessEqual(max(steps), 16)
        accept = mock.Mock(wraps=listener.socket)
        accept.accept.side_effect = itertools.chain(
            [OSError(errno.EMFILE, "no descriptor")], itertools.repeat(mock.DEFAULT))
        with mock.patch.object(listener, "socket", accept), http_limits(ACCEPT_PAUSE=0.05), \
                self.assertLogs("gaffer", "WARNING") as logs:
            self.assertOpen(self.wire())
        self.assertIn("no connection can be accepted", logs.output[0])

    def test_dawdlers(self):
        """Half a head, half a body, a byte now and then: a request beside them is answered."""
        slow, wire = [self.wire() for _ in range(100)], self.wire()
        self.assertEqual(self.server.http.threads, {})
        head = http_bytes("POST", "/processes", "Content-Length: 9", "X: " + "y" * 200)
        for number, dawdler in enumerate(slow):
            dawdler.send(head if number % 2 else head[:9])
        until(lambda: len(self.server.http.threads) >= 100, "their threads")
        for number, dawdler in enumerate(slow):
            dawdler.send(b"{" if number % 2 else head[9:10])
            self.assertOpen(wire)

    def test_next_thread(self):
        """It may begin while the one before ends."""
        http, connection = self.server.http, object()
        http.working[connection] = 0
        http.hand_over(http.working.setdefault, connection, 1)
        self.assertEqual(http.working.pop(connection), 1)

    def test_quick_requests(self):
        """They share a thread, and nobody holds it: who dawdles, takes nothing, waits for a route,
        or fails. What is pipelined behind them is answered, too."""
        leave = threading.Event()
        self.addCleanup(leave.set)
        server = self.serve("127.0.0.1:0", handlers=[
            ("/slow", lambda request: str(leave.wait(TIMEOUT)))])
        server.manager.add_process("large", "cat", start=False, env={
            "X%d" % number: "x" * 100000 for number in range(50)})
        ping, slow = http_bytes("GET", "/ping"), http_bytes("GET", "/slow")
        unread, post = http_bytes("GET", "/processes/large"), http_bytes("POST", "/x", body=b"{}")
        held, quick = [], [self.wire(server=server) for _ in range(16)]
        for sent, rest, *statuses in (
                (ping[:9], ping[9:], 200), (post[:-1], post[-1:], 404), (slow, b"", 200),
                (ping * 3 + slow, ping, 200, 200, 200, 200, 200), (unread, ping, 200, 200)):
            wire = self.wire(server=server, receive_buffer=4096)
            self.assertOpen(wire)
            held.append((wire.send(sent), rest, statuses))
        until(lambda: server.http.sending and len(server.http.threads) == 4, "all that hold")
        for path in 5 * ["/status", "/status/large"]:
            for wire in quick:
                wire.request(path)
            self.assertEqual({wire.answer()[0] for wire in quick}, {200})
        self.assertEqual(len(server.http.threads), 4)
        with http_limits(QUICK_STATUSES=0):     # of many it takes time
            self.assertEqual(quick.pop().request("/status").answer()[0], 200)
            self.assertEqual(len(server.http.threads), 5)
        for owner, name, path in ((server.http, "answer", "/ping"),
                                  (server.manager.events, "wait", "/watch?timeout=0")):
            with mock.patch.object(owner, name, side_effect=MemoryError), \
                    self.assertLogs("gaffer", "ERROR"):
                self.assertEqual(quick.pop().request(path).file.read(), b"")
        leave.set()
        for wire, rest, statuses in held:
            wire.send(rest)
            self.assertEqual([wire.answer()[0] for _ in statuses], statuses)
            self.assertOpen(wire)
        wire = self.wire(server=server, receive_buffer=4096).send(unread)
        wire.sock.shutdown(socket.SHUT_WR)      # it will ask no more, and gets all of the answer
        self.assertEqual(json.loads(wire.answer()[2])["name"], "large")

    def test_client_that_takes_nothing(self):
        """It has SEND_TIME for a part of an answer, STALL for what a long poll has waited for."""
        with http_limits(SEND_TIME=0.1):
            self.wire(receive_buffer=4096).request("/big")
            until(lambda: self.server.http.working, "the request")
            self.all_gone()
        with mock.patch.object(gaffer.LongPoll, "stall", 0.1):
            self.wire().request("/watch/create")
            self.parked()
            with mock.patch.object(gaffer.Channel, "_transmit", return_value=0):
                self.server.manager.add_process("new", "cat", start=False)
                self.parked(count=0)

    def test_linger(self):
        """A refused body is read up to a size and for a time; then the connection is closed."""
        request = http_bytes("POST", "/echo", "Content-Length: %d" % 2 ** 40)
        for limits in {"LINGER_SIZE": 100000, "LINGER_TIME": 2 * TIMEOUT}, {"LINGER_TIME": 0.05}:
            with http_limits(**limits):
                wire = self.wire().send(request)
                self.assertCode(wire.answer(), 413, "too_large")
                if len(limits) == 2:
                    with self.assertRaises(ConnectionError):
                        for _ in range(1000):
                            wire.send(bytes(65536))
                self.all_gone()

    def test_stop(self):
        """Requests have STOP_SEND seconds, then they are cut; what waits is answered. Who asks on
        and on does not hold it up."""
        entered, leave = queue.Queue(), threading.Event()
        self.addCleanup(leave.set)

        def slow(request):
            entered.put(None)
            leave.wait(TIMEOUT)
            return "done"

        def application(environ, start_response):
            start_response("200 OK", [])
            yield slow(None).encode()
        for patience, answers in ((TIMEOUT, [b"done", b"done"]), (0.1, [])):
            with self.subTest(patience=patience), http_limits(
                    STOP_SEND=patience, KEEP_TIME=TIMEOUT):
                leave.clear()
                server = self.serve(handlers=[("/slow", slow)], wsgi={"/wsgi": application})
                poll = self.wire(server=server).request("/stats?feed=longpoll&interval=1000")
                self.parked(server=server)
                quick = self.wire(server=server)
                self.assertOpen(quick)
                wires = [self.wire(server=server).request(path) for path in ("/slow", "/wsgi")]
                for _ in wires:
                    entered.get(timeout=TIMEOUT)
                server.manager.stop()
                if answers:
                    until(lambda: quick.request("/ping").answer()[1]["Connection"], "the stop")
                    with socket.socket() as late:
                        self.assertEqual(late.connect_ex(("127.0.0.1", server.port)),
                                         errno.ECONNREFUSED)
                    leave.set()
                self.assertEqual([wire.answer()[2] for wire in wires if answers], answers)
                self.assertEqual([wire.file.read() for wire in [quick, *wires]], [b""] * 3)
                self.assertCode(poll.answer(), 503, "stopping")
                leave.set()
                server.stop_all()
                self.assertFalse(server.http.watcher.is_alive())

    def test_chunks_of_events(self):
        """One for the empty line at the begin, one a send, the last one only at a real end."""
        self.cat("web", flapping=STREAMS_ONCE)
        path = "/streams/1/stdout?feed=eventsource"
        cut = self.wire(path)
        self.server.manager.loop.call(lambda: [
            channel.close() for channel in tuple(self.server.http.channels)])
        new, old = (self.wire(path, version=version) for version in ("1.1", "1.0"))
        self.assertEqual((new.chunk(), cut.chunk(), cut.chunk()), (b"\n", b"\n", None))
        self.server.ok("POST", "/streams/1/stdin", b"x\n")
        event = new.chunk()
        self.assertRegex(event, rb"\Aid: 2@\w+\nevent: stdout\ndata: x\n\n\Z")
        self.server.ok("DELETE", "/streams/1/stdin")
        end = new.chunk()
        self.assertRegex(end, rb"\Aid: 2x@\w+\nevent: exit\ndata: \{.*\}\n\n\Z")
        self.assertEqual(new.chunk(), b"")
        self.assertEqual((old.headers["Transfer-Encoding"], old.file.read()),
                         (None, b"\n" + event + end))


class HttpLimits(HttpCase):
    def held(self, server, number):
        """So many connections that have been answered once."""
        wires = [self.wire(server=server) for _ in range(number)]
        for wire in wires:
            self.assertOpen(wire)
        return wires

    def test_of_one_address(self):
        """Whatever a connection becomes. This machine's own are not counted."""
        limits, server = contextlib.ExitStack(), self.serve()
        self.addCleanup(limits.close)
        server.add("web", "cat", redirect_input=True)
        self.all_gone(server)
        limits.enter_context(http_limits(network=lambda host: host, ADDRESS_CONNECTIONS_MAX=3))
        held = [self.wire("/streams/1/stdout?feed=continuous", server=server),
                self.wire(server=server).upgrade("/wstreams/1"), *self.held(server, 1)]
        with self.assertLogs("gaffer", logging.WARNING) as logged:
            for _ in range(3):
                self.assertCode(self.wire(server=server).answer(), 503, "busy")
        self.assertEqual(len(logged.output), 1)
        for wire in held:
            wire.close()
        self.all_gone(server)
        self.held(server, 3)
        limits.close()
        with http_limits(ADDRESS_CONNECTIONS_MAX=1):    # a reverse proxy has one address
            self.held(self.server, 4)

    def test_address(self):
        self.assertTable(gaffer.network, (
            ("127.9.9.9", None), ("::1", None), ("::ffff:192.0.2.1", "192.0.2.1"),
            ("fe80::1%lo", b"\xfe\x80\0\0\0\0\0\0"),
            ("2001:db8:0:0:1::", b"\x20\x01\x0d\xb8\0\0\0\0")))

    def test_in_all(self):
        """One more than may be, or than leaves enough descriptors for processes."""
        for most, files, count in (2, 1000, 2), (100, 16, 14):
            server = self.serve()
            with self.subTest(count=count), http_limits(
                    CONNECTIONS_MAX=most, files_max=lambda: files):
                held = self.held(server, count)
                with self.assertLogs("gaffer"):
                    self.assertCode(self.wire(server=server).answer(), 503, "busy")
                held[0].close()
                until(lambda: len(server.http.connections) < count, "the end of one")
                self.held(server, 1)


class HttpAccess(HttpCase):
    """Section 6: Host, Origin, CORS, and what a page of the web can make a browser send."""

    def setUp(self):
        self.options = {"handlers": [("/change", self._change)],
                        "allow_hosts": ["gaffer.example", "Other.Example."]}
        self.changes = 0
        super().setUp()

    def _change(self, request):
        self.changes += 1
        return "changed"

    @staticmethod
    def cors(answer):
        return {name: value for name, value in answer[1].items()
                if name.startswith("Access-Control-")}

    def assertAllowed(self, origin, allowed=True, **options):
        """Whether a page may change something, read the answer, open a websocket."""
        header = "Origin: " + origin
        expected = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers":
                    "Gaffer-Offset, Gaffer-Dropped, Gaffer-Ended"} if allowed else {}
        for method in "POST", "GET":
            with self.subTest(origin=origin, allowed=allowed, method=method):
                answer = self.ask(method, "/change", header, **options)
                self.assertEqual(self.cors(answer), expected)
                if allowed or method == "GET":
                    self.assertEqual(answer[0], 200)
                else:
                    self.assertCode(answer, 403, "forbidden_origin")
        if not options:
            wire = self.wire().upgrade("/wstreams/1?readonly=true", header)
            self.assertEqual(wire.status, 101 if allowed else 403)

    def test_origins(self):
        self.cat("web")
        self.assertAllowed("https://localhost:8443")
        self.assertAllowed("http://192.0.2.7:80", host="192.0.2.7:80")
        self.assertAllowed("http://other.example", host="gaffer.example")
        self.changes = 0
        for origin in "http://evil.example", "null", "":
            self.assertAllowed(origin, False)
            self.assertEqual(self.cors(self.ask(
                "OPTIONS", "/change", "Origin: " + origin, "Access-Control-Request-Method: POST",
                "Access-Control-Request-Private-Network: true")), {})
        self.assertEqual(self.changes, 3, "more than GET has come")
        answer = self.ask("POST", "/change")    # no browser: everything goes
        self.assertEqual((answer[0], self.cors(answer)), (200, {}))

    def test_headers_of_all_answers(self):
        """CORS, or a page could not read why it was refused; and no cache may keep any."""
        self.cat("web")
        for status, method, path in (
                (405, "PUT", "/processes"), (200, "GET", "/watch?feed=eventsource"),
                (200, "GET", "/stats?feed=longpoll&interval=0.1"), (200, "HEAD", "/status"),
                (204, "OPTIONS", "/x"), (204, "GET", "/watch?timeout=0")):
            wire = self.wire(path, "Origin: http://localhost:1", method=method)
            self.assertEqual((wire.status, wire.headers["Cache-Control"]), (status, "no-store"))
            self.assertEqual(wire.headers.get_all("Access-Control-Allow-Origin"),
                             ["http://localhost:1"], path)
            self.assertIn("Origin", wire.headers["Vary"].split(", "))

    def test_host_comes_first(self):
        """Before token, origin, method, route, body and upgrade: a page whose own name was
        pointed here is of the same origin, by its browser's lights."""
        server = self.serve(token="secret")
        for method, target, *headers in (
                ("OPTIONS", "*"), ("FOO", "/ping"), ("GET", "/%zz"),
                ("POST", "/", "Content-Encoding: gzip"),
                ("DELETE", "/x", "Origin: http://evil.example", "Sec-Fetch-Site: same-origin"),
                ("GET", "/wstreams/1", "Upgrade: websocket", "Connection: upgrade")):
            with self.subTest(method + " " + target, headers=headers):
                answer = self.ask(method, target, *headers, server=server, host="evil.example")
                self.assertCode(answer, 403, "forbidden_host")
                self.assertEqual(self.cors(answer), {})


class HttpToken(HttpCase):
    TOKEN = "s\u00e9cret: word"
    options = {"token": TOKEN, "endpoints": [gaffer.HttpEndpoint("0.0.0.0:0")],
               "handlers": [("/hit", lambda request: "hit")], "wsgi": HttpMetrics.options["wsgi"]}

    def setUp(self):
        super().setUp()
        quiet = logging.NullHandler()           # each guess is reported
        logging.getLogger("gaffer").addHandler(quiet)
        self.addCleanup(logging.getLogger("gaffer").removeHandler, quiet)

    @staticmethod
    def basic(text):
        return "Authorization: Basic " + base64.b64encode(text.encode()).decode()

    def test_without(self):
        for method, path in (("GET", "/nothing"), ("POST", "/healthz"), ("GET", "/ping/x"),
                             ("GET", "/ping//"), ("GET", "/hit"), ("GET", "/wsgi"), ("FOO", "/"),
                             ("GET", "/readyz"), ("HEAD", "/processes")):
            answer = self.ask(method, path, "Origin: http://localhost")
            self.assertEqual((answer[0], answer[1]["Access-Control-Allow-Origin"]),
                             (401, "http://localhost"), path)   # so that a page can read it
            self.assertRegex(answer[1]["WWW-Authenticate"], "^Basic realm=")
        self.assertEqual(self.websocket("/wstreams/1").status, 401)
        for path, (method, body) in itertools.product(
                ("/ping", "/healthz/?_=y"), (("GET", b"OK"), ("HEAD", b""))):
            status, headers, data = self.ask(method, path)
            self.assertEqual((status, headers["Content-Type"], data), (200, "text/plain", body))
        self.assertEqual(self.ask("OPTIONS", "/processes")[0], 204)
        answer = self.ask("POST", "/processes", "Origin: http://evil.example")
        self.assertCode(answer, 403, "forbidden_origin")

    def test_right_and_wrong(self):
        """Each request of a connection needs it, and a refused body is not executed."""
        token, wire = self.TOKEN.encode().decode("latin-1"), self.wire()
        good, bearer = self.basic("x:" + self.TOKEN), "Authorization: Bearer " + token
        for header, status in ((good, 200), ("X: y", 401), (bearer, 200), (bearer[:-1], 401),
                               (good, 200), ("Cookie: token=" + token, 401)):
            self.assertEqual(wire.request("/hit", header).answer()[0], status, header)
        self.assertRefused(http_bytes("POST", "/hit?token=" + urllib.parse.quote(self.TOKEN),
                                      body=http_bytes("GET", "/ping")), 401, "unauthorized")

    def test_guesses(self):
        """They are all answered alike."""
        answers = set()
        for guess in "", self.TOKEN[:-1] + "e", "x" * 5000:
            answer = self.ask("GET", "/processes", self.basic("x:" + guess))
            del answer[1]["Date"]
            answers.add((answer[0], str(answer[1]), answer[2]))
        self.assertEqual([status for status, _, _ in answers], [401])


def make_certificate(folder):
    """(certificate, key): files for 127.0.0.1 and localhost."""
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", cert], check=True, stderr=subprocess.DEVNULL)
    return cert, key


class HttpEndpoints(HttpCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        if shutil.which("openssl"):
            cls.cert, cls.key = make_certificate(cls.folder)
            cls.context = ssl.create_default_context(cafile=cls.cert)

    def tls(self, *more, **options):
        if not shutil.which("openssl"):
            self.skipTest("there is no openssl program to make a certificate")
        endpoint = gaffer.HttpEndpoint("127.0.0.1:0", self.cert, self.key)
        return self.serve(endpoint, *more, **options)

    def connect(self, address, context=None):
        wire = Wire(address, context)
        self.addCleanup(wire.close)
        return wire

    def secure(self, server):
        return self.connect(server.port, self.context)

    def test_tls(self):
        """Requests, a body of a megabyte, keep-alive, and an end that is no cut (RFC 8446, 6.1)."""
        server = self.tls(handlers=[("/echo", lambda request: request.body)], wsgi={
            "/app": lambda environ, start: start("200 OK", []) and [environ["HTTPS"].encode()]})
        wire = self.secure(server)
        self.assertEqual(wire.request("/app").answer()[2], b"on")
        wire.sock.suppress_ragged_eofs = False
        body = os.urandom(gaffer.MIB)
        self.assertEqual(wire.request("/echo", method="POST", body=body).answer()[2], body)
        headers = wire.request("/ping", "Origin: " + server.url, "Connection: close").answer()[1]
        self.assertEqual(headers["Access-Control-Allow-Origin"], server.url)
        self.assertEqual(wire.sock.recv(10), b"")

    def test_handshakes(self):
        """Those that hang hold up nobody, nor the stop; one too many ends the oldest."""
        server = self.tls()
        with http_limits(HANDSHAKES_MAX=20):
            for data in [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100] + [b"\x16\x03\x01"] * 55:
                self.connect(server.port).send(data)
            until(lambda: len(server.http.handshakes) == len(server.http.connections) == 20,
                  "the limit")
            self.assertOpen(self.secure(server))        # behind all others
            self.assertLess(len(server.http.handshakes), 20)
        server.stop_all()
        server = self.tls()
        with mock.patch("ssl.SSLContext.wrap_socket", side_effect=OSError):
            self.assertEqual(self.connect(server.port).file.read(1), b"")
        with http_limits(files_max=lambda: 0), self.assertLogs("gaffer", "WARNING"):
            self.assertEqual(self.connect(server.port).file.read(1), b"")   # no plain answer
        with http_limits(IDLE_TIME=0.05, HANDSHAKE_TIME=0.05):
            self.assertEqual(self.connect(server.port).file.read(1), b"")
            self.assertEqual(self.connect(server.port).send(b"\x16").file.read(1), b"")

    def test_tls_streams(self):
        """Events and a websocket; what came with the request, and what TLS has decrypted. A stop
        ends all connections, without a word in the log."""
        server = self.tls()
        self.secure(server).request(
            "/processes", method="POST",
            body=b'{"name": "cat", "cmd": "cat", "redirect_input": true}').answer()
        events = self.secure(server).request("/streams/1/stdout?feed=eventsource&since=0").head()
        big = b"".join(b"%05d %b\n" % (number, b"x" * 94) for number in range(10000))
        with http_limits(READ_SIZE=1000):       # less than a record
            made = self.secure(server).upgrade("/wstreams/1?type=binary", early=ws_frame(2, b"a\n"))
            self.assertEqual((made.status, made.read()), (101, (2, b"a\n")))
            made.frame(2, big)
            echo = b""
            while len(echo) < len(big):
                echo += made.read()[1]
        self.assertEqual((echo, events.event()[1]), (big, "a"))
        made.frame(8, b"\x03\xe8")
        self.assertEqual([made.read(), made.read()], [(8, b"\x03\xe8"), (None, b"")])
        server.http.listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        late = self.secure(server).request("/streams/1/stdout?feed=continuous&since=0")
        self.parked("continuous", server=server)
        self.secure(server).request("/streams/1/stdin", method="DELETE").answer()
        self.secure(server).request("/watch/exit?since=0").answer()
        self.assertEqual(late.head().chunks(), (b"a\n" + big, True))
        for path in "/ping", "/watch", "/watch?feed=continuous":
            self.secure(server).request(path)
        self.secure(server).send(b"GET")
        for kind in "longpoll", "continuous":
            self.parked(kind, server=server)
        server.stop_all()

    def test_unix_socket(self):
        """Only its owner may use it, with any Host; what a dead server left is removed."""
        path = os.path.join(self.folder, "own.sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
            dead.listen(1)
        server = self.serve("unix:" + path, wsgi={"/name": lambda environ, start: (
            start("200 OK", []) and [environ["SERVER_NAME"].encode()])})
        self.assertEqual(server.http.urls, ["unix:" + path])
        mode = os.lstat(path).st_mode
        self.assertEqual((stat.S_ISSOCK(mode), stat.S_IMODE(mode)), (True, 0o600))
        for host, expected in ("unix", b"unix"), ("a/b", b"localhost"):     # no page reaches it
            wire = self.connect(path).request("/name", host=host)
            self.assertEqual(wire.answer()[2], expected)
        with self.assertRaisesRegex(gaffer.StartError, "another program"):
            self.serve("unix:" + path)
        os.rename(path, path + ".old")
        new = self.serve("unix:" + path)
        server.stop_all()                       # it leaves what another has taken over
        self.assertOpen(self.connect(path))
        new.stop_all()
        self.assertFalse(os.path.lexists(path))
        new = self.serve("unix:" + path)
        os.unlink(path)
        new.stop_all()
        with open(path, "w") as file:
            file.write("precious")
        for bad in path, "/no/such/x.sock", os.path.join(self.folder, "x" * 200), self.folder:
            with self.subTest(bad), self.assertRaisesRegex(gaffer.StartError, re.escape(bad)):
                self.serve("unix:" + bad)
        self.assertEqual(cli_read(path), "precious")

    def test_several(self):
        """TLS or not, each endpoint has its own; IPv6 has its own Host and Origin."""
        if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
            self.skipTest("there is no ::1")
        path = os.path.join(self.folder, "several.sock")
        server = self.tls("unix:" + path, "localhost:0", "127.0.0.1:0", "[::1]:0")
        *plain, six = (int(url.rpartition(":")[2]) for url in server.http.urls[2:])
        for wire in [self.secure(server), self.connect(path), *map(self.connect, plain)]:
            self.assertOpen(wire)
        wire = self.connect(socket.create_connection(("::1", six), TIMEOUT))
        origin = "http://[::1]:%d" % six
        wire.request("/ping", "Origin: " + origin, host="[::1]:%d" % six)
        self.assertEqual(wire.answer()[1]["Access-Control-Allow-Origin"], origin)

    def test_ports(self):
        """One in use is refused, and is free at once after a stop with connections open."""
        address = "127.0.0.1:%d" % self.server.port
        with self.assertRaisesRegex(gaffer.StartError, "(?s)%s.* in use[^\n]*$" % address):
            self.serve("127.0.0.1:0", address)
        wire = self.wire()
        self.assertOpen(wire)
        self.server.stop_all()
        self.assertEqual(wire.file.read(), b"")
        self.assertOpen(self.wire(server=self.serve(address)))

    def test_addresses(self):
        for bind in "5000", ":5000":
            endpoint = gaffer.HttpEndpoint(bind)
            self.assertEqual((endpoint.host, endpoint.port), ("127.0.0.1", 5000))
        self.assertRaisesRegex(gaffer.StartError, "without TLS", gaffer.HttpEndpoint, "unix:a", "b")
        for bind in ("", "127.0.0.1", "127.0.0.1:65536", "[::1]", "::1:5000", "unix:",
                     "http://127.0.0.1:5000", "\udcff:80", "unix:\0"):
            with self.subTest(bind), self.assertRaisesRegex(gaffer.StartError, "address"):
                gaffer.HttpEndpoint(bind)
        for bind in "no-such-host.invalid:0", "[::1]:7":
            with mock.patch("socketserver.TCPServer.__init__", side_effect=OSError), \
                    self.assertRaisesRegex(gaffer.StartError, re.escape(bind[:-2])):
                self.serve(bind)


class HttpLibrary(HttpCase):
    def test_routes(self):
        """What a callable may return, and what the client gets."""
        plain, binary = "text/plain; charset=utf-8", "application/octet-stream"
        image = gaffer.Response(b"x", 203, [("A", "b")], "image/png")
        rows = (
            ("gr\u00fcn", 200, plain, "gr\u00fcn".encode()), (b"\0\xff", 200, binary, b"\0\xff"),
            ({"a": [1]}, 200, "application/json", b'{"a": [1]}\n'),
            ([1, "x"], 200, "application/json", b'[1, "x"]\n'),
            ((201, {"Content-Type": "text/html"}, "<p>"), 201, "text/html", b"<p>"),
            ((404, [("Content-Length", "3")], {"no": 1}), 404, "application/json", b'{"no": 1}\n'),
            ((204, [], "body"), 204, plain, b""),
            ((201, {"Content-Type": "text/x"}, image), 201, "text/x", b"x"),
            (image, 203, "image/png", b"x"))
        answers = [row[0] for row in rows] + [
            object(), (1, 2), (200, {"X": "secret\r\nA: b"}, ""), "secret \ud800",
            ("200 secret", [], ""), (200, None, "secret"), OSError("secret"), SystemExit("secret")]

        def route(request, number):
            if isinstance(answers[int(number)], BaseException):
                raise answers[int(number)]
            return answers[int(number)]
        self.server = self.serve(handlers=[("/r/([0-9]+)", route)])
        wire = self.wire()
        for number, (_, *expected) in enumerate(rows):
            status, headers, data = wire.request("/r/%d" % number).answer()
            self.assertEqual([status, headers["Content-Type"], data], expected)
        for number in range(len(rows), len(answers)):
            with self.subTest(str(answers[number])), self.assertLogs("gaffer", "ERROR") as logged:
                answer = wire.request("/r/%d" % number).answer()
                self.assertCode(answer, 500, "internal_error", "the added route /r/([0-9]+)")
                self.assertNotIn(b"secret", answer[2])
                self.assertIn("Traceback", "".join(logged.output))

    def test_request(self):
        """What a route gets: the groups of its pattern, decoded once; a request of its own."""
        def route(request, *groups):
            request.query.pop("a", None)
            return [request.method, request.query, request.headers.pop("x-a"), len(request.body),
                    request.client.rpartition(":")[0], *groups]
        self.server = self.serve(handlers=[
            ("/hello/([^/]+)(/x)?", route), ("/hello/.*", lambda request: "second"),
            ("/json", lambda request: request.json())])
        wire = self.wire()
        for _ in range(2):
            wire.request("/hello/a%2Fb%2541?q=%31&e=&a=1", "X-A: 1", "X-A: 2", method="PUT",
                         body=b"xy")
            self.assertEqual(json.loads(wire.answer()[2]), [
                "PUT", {"q": "1", "e": ""}, "1, 2", 2, "127.0.0.1", "a/b%41", None])
        self.assertEqual(wire.request("/hello/a/b").answer()[2], b"second")
        self.assertEqual(wire.request("/json", method="POST", body=b"[1]").answer()[2], b"[1]\n")
        self.assertCode(wire.request("/json").answer(), 400, "invalid_json")

    def test_max_body(self):
        """It is the limit of what was added, not of the API."""
        self.server = self.serve(max_body=2 * gaffer.MIB, handlers=[("/size", str)])
        body = bytes(2 * gaffer.MIB)
        self.assertEqual(self.ask("POST", "/size", body=body)[0], 200)
        for path, sent, *error in (
                ("/size", body + b"x", 413, "too_large"), ("/processes", body, 413, "too_large"),
                ("/no", body, 404, "resource_not_found")):
            self.assertRefused(http_bytes("POST", path, body=sent), *error)

    def serve_socket(self, **methods):
        """Serve /socket with a WebSocketHandler; a queue of what it sees."""
        seen = queue.Queue()

        def message(handler, data):
            seen.put(data)
            handler.send(data)
        handler = type("HttpSocket", (gaffer.WebSocketHandler,), dict({
            "open": lambda handler: seen.put(handler), "message": message,
            "protocols": ("chat", "v2"),
            "close": lambda handler, code, reason: seen.put((code, reason))}, **methods))
        self.server = self.serve(handlers=[("/socket(?:/(.*))?", handler)])
        return seen

    def test_websocket(self):
        """Text stays text, bytes stay bytes; fragments are joined; no foreign page opens one."""
        seen = self.serve_socket()
        made = self.websocket("/socket/a%20b?x=1", early=ws_frame(1, b"early"))
        handler = seen.get(timeout=TIMEOUT)
        self.assertEqual((handler.args, handler.request.query), (["a b"], {"x": "1"}))
        for opcode, data, final in ((1, b"one ", False), (9, b"ping", True), (0, b"two", True),
                                    (2, b"\0\xff", True), (2, bytes(70000), True)):
            made.frame(opcode, data, final)
        self.assertEqual([made.read() for _ in range(5)], [
            (1, b"early"), (10, b"ping"), (1, b"one two"), (2, b"\0\xff"), (2, bytes(70000))])
        self.assertEqual([seen.get(timeout=TIMEOUT) for _ in range(4)],
                         ["early", "one two", b"\0\xff", bytes(70000)])
        self.server.add("cat", "cat", redirect_input=True)
        for path, offer, chosen in (
                ("/socket", "v1, v2 , chat", "v2"), ("/socket", "v1", None),
                ("/wstreams/1", "chat, v2", "chat")):
            wire = self.websocket(path, "Sec-WebSocket-Protocol: " + offer)
            self.assertEqual((wire.status, wire.headers["Sec-WebSocket-Protocol"]), (101, chosen))
        self.assertEqual(self.ask("GET", "/socket")[0], 426)
        made = self.websocket("/socket", "Origin: http://evil.example")
        self.assertEqual(made.status, 403)

    def test_websocket_ends(self):
        seen = self.serve_socket(max_message=10)
        for code, frame, act in (
                (4000, b"\x0f\xa0done", lambda made, handler: handler.end(4000, "done")),
                (1009, b"\x03\xf1", lambda made, handler: made.text("x" * 11)),
                (4001, b"\x0f\xa1", lambda made, handler: made.frame(8, b"\x0f\xa1bye")),
                (1005, b"", lambda made, handler: made.frame(8)),
                (1006, None, lambda made, handler: made.close())):
            with self.subTest(code):
                made = self.websocket("/socket")
                handler = seen.get(timeout=TIMEOUT)
                act(made, handler)
                if frame is not None:
                    opcode, data = made.read()
                    self.assertEqual((opcode, data[:len(frame)]), (8, frame))
                    made.frame(8, data)
                    self.assertEqual(made.read(), (None, b""))
                self.assertEqual(seen.get(timeout=TIMEOUT)[0], code)
                handler.send("to nobody")
                handler.end()
        self.websocket("/socket")
        handler = seen.get(timeout=TIMEOUT)
        self.server.stop_all()
        self.assertIsInstance(seen.get(timeout=TIMEOUT), tuple)
        handler.send("to nobody")
        self.assertTrue(seen.empty())

    def test_websocket_queue(self):
        """What a client does not read stops its next messages; what is too much ends it."""
        answer = bytes(gaffer.MIB)
        seen = self.serve_socket(message=lambda handler, data: handler.send(answer[:-1] + data))
        messages = [b"%c" % number for number in range(64)]
        made = self.websocket("/socket", early=b"".join(ws_frame(2, data) for data in messages))
        handler = seen.get(timeout=TIMEOUT)
        channel, = self.server.http.channels
        until(lambda: channel.paused and channel.queued, "a queue that is full")
        self.assertLess(channel.queued, gaffer.SEND_QUEUE_LOW + 2 * gaffer.MIB)
        for _ in range(2000):                   # more than one sendmsg() takes
            handler.send(b"")
        found = [made.read()[1][-1:] for _ in range(2064)]
        self.assertEqual([data for data in found if data], messages)
        with http_limits(LINGER_TIME=0.05):     # it reads only after that
            for _ in range(8):
                handler.send(answer)
            handler.end()
            until(lambda: channel.ending, "no wait for its close frame")
            frames = list(iter(made.read, (None, b"")))
            self.assertEqual((len(frames), frames[-1][0]), (9, 8))
            self.assertEqual(seen.get(timeout=TIMEOUT)[0], 1000)
        with http_limits(SEND_QUEUE_SIZE=8 * gaffer.MIB):
            self.websocket("/socket")
            handler = seen.get(timeout=TIMEOUT)
            for _ in range(100):
                handler.send(answer)
            self.assertEqual(seen.get(timeout=TIMEOUT)[0], 1006)
        made = self.websocket("/socket")
        made.send(b"\x82\xff" + struct.pack("!Q", (16 << 20) + 1) + bytes(4))
        self.assertEqual(made.read()[1][:2], b"\x03\xf1")

    def test_websocket_threads(self):
        """A handler runs on one thread; send() and end() wait for nobody, from any thread."""
        for where in "open", "message":
            with self.subTest(where):
                lock, calls = threading.Lock(), queue.Queue()

                def wait(handler, *arguments, lock=lock, calls=calls):
                    calls.put((handler, threading.get_ident()))
                    with lock:
                        calls.put(threading.get_ident())
                self.serve_socket(**{where: wait})
                with lock:
                    made = self.websocket("/socket")
                    made.text("x")
                    handler, thread = calls.get(timeout=TIMEOUT)
                    for number in range(1000):
                        handler.send(str(number))
                    handler.end()
                    self.assertTrue(calls.empty(), "send() has waited for the handler")
                self.assertEqual(calls.get(timeout=TIMEOUT), thread)
                self.assertNotEqual(thread, threading.get_ident())
                self.assertEqual([made.read() for _ in range(1001)], [
                    *((1, b"%d" % number) for number in range(1000)), (8, b"\x03\xe8")])

    def test_websocket_fails(self):
        """1011, the traceback in the log; close() is called; 500 if nothing was upgraded."""
        def fail(*arguments):
            raise RuntimeError("secret")
        for where, act in (("__init__", fail), ("open", fail), ("message", fail),
                           ("message", lambda handler, data: sys.exit("secret")),
                           ("message", lambda handler, data: handler.end(999)),
                           ("message", lambda handler, data: handler.send(5))):
            with self.subTest(where), self.assertLogs("gaffer", "ERROR") as logged:
                seen = self.serve_socket(**{where: act})
                made = self.websocket("/socket")
                if where == "__init__":
                    self.assertEqual(made.status, 500)
                    continue
                made.text("x")
                opcode, data = made.read()
                self.assertEqual((opcode, data[:2], b"secret" in data), (8, b"\x03\xf3", False))
                ends = (end for end in iter(seen.get, None) if isinstance(end, tuple))
                self.assertEqual(next(ends)[0], 1011)
                until(lambda: "Traceback" in "".join(logged.output), "the log")

    def test_wsgi(self):
        """What stands in environ; the validator is content."""
        seen = []

        def app(environ, start_response):
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
            seen.append((environ, body, wsgiref.util.application_uri(environ)))
            start_response("201 Made", [
                ("Content-Type", "text/plain"), ("Vary", "Cookie"), ("Date", "now")])
            return [b"got ", body]
        self.server = self.serve(wsgi={"/admin": wsgiref.validate.validator(app)})
        wire, big = self.wire(), bytes(2 * gaffer.MIB)
        for method, framing, sent, body, host, name, port in (
                ("POST", "X: y", big, big, "a.localhost", "a.localhost", "80"),
                ("PUT", "Transfer-Encoding: chunked", http_chunks(b"hi"), b"hi", "[::1]:8", "[::1]",
                 "8")):
            status, headers, data = wire.request(
                "/admin/a%20b/%c3%a9?x=%31&y", "Content-Type: text/x", "X-Two: 1", "X-Two: 2",
                "Proxy: evil", "X_Two: evil", "Origin: http://localhost", framing,
                method=method, body=sent, host=host).answer()
            self.assertEqual(
                [status, headers["Vary"], headers["Cache-Control"], headers.get_all("Date"), data],
                [201, "Cookie, Origin", "no-store", ["now"], b"got " + body])
            environ, got, uri = seen.pop()
            self.assertEqual((got, uri), (body, "http://%s/admin" % host))
            expected = {
                "REQUEST_METHOD": method, "SCRIPT_NAME": "/admin", "QUERY_STRING": "x=%31&y",
                "PATH_INFO": "/a b/\xc3\xa9", "CONTENT_TYPE": "text/x", "SERVER_PORT": port,
                "CONTENT_LENGTH": str(len(body)), "SERVER_NAME": name, "HTTP_X_TWO": "1, 2",
                "REMOTE_ADDR": "127.0.0.1", "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_PROXY": None,
                "wsgi.url_scheme": "http", "wsgi.multithread": True, "PATH": None}
            self.assertEqual({key: environ.get(key) for key in expected}, expected)

    def test_wsgi_mounts(self):
        """The longest prefix; the API comes first."""
        self.server = self.serve(wsgi=dict.fromkeys(
            ("/a", "/a/b", "s/", "/ping", "/"), lambda environ, start: start("200 OK", []) and [
                (environ["SCRIPT_NAME"] + " " + environ["PATH_INFO"]).encode()]))
        wire = self.wire()
        for path, expected in (("/a", b"/a "), ("/a/bc", b"/a /bc"), ("/a/b/", b"/a/b /"),
                               ("/s/x", b"/s /x"), ("/ab", b" /ab"), ("/ping", b"OK")):
            self.assertEqual(wire.request(path).answer()[2], expected)

    def test_wsgi_streams(self):
        """What the application yields goes out as it comes, and it is closed."""
        go, closed = threading.Event(), queue.Queue()

        def app(environ, start_response):
            start_response("200 OK", [])
            try:
                yield b"one"
                go.wait(2 * TIMEOUT)
                yield b"two"
            finally:
                closed.put(True)
        self.server = self.serve(wsgi={"/admin": app})
        wire = self.wire("/admin", "Connection: close")
        self.assertEqual(wire.chunk(), b"one")
        go.set()
        self.assertEqual(wire.chunks(), (b"two", True))
        self.assertTrue(closed.get(timeout=TIMEOUT))
        go.clear()                              # HEAD has its answer without the second part
        self.assertEqual(self.ask("HEAD", "/admin")[0], 200)
        self.assertTrue(closed.get(timeout=TIMEOUT))

    def test_wsgi_framing(self):
        """A client can tell where a body ends, and that it was cut; HEAD, 204 and 304 have none."""
        def app(environ, start_response):
            start_response(status, [("Content-Length", length)] if length else [])
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                yield part
        self.server = self.serve(wsgi={"/admin": app})
        for method, version, status, length, parts, framing, body, *headers in (
                ("GET", "1.1", "200 OK", None, [b"ab", b"c"], "chunked", b"abc"),
                ("GET", "1.1", "200 OK", "3", [b"ab", b"cd"], "3", b"abc"),
                ("GET", "1.0", "200 OK", None, [b"ab", b"c"], None, b"abc"),
                ("GET", "1.0", "200 OK", "3", [b"abc"], "3", b"abc", "Connection: keep-alive"),
                ("HEAD", "1.1", "200 OK", "9", [], "9", b""),
                ("GET", "1.1", "204 No Content", "0", [], None, b""),
                ("GET", "1.1", "304 Not Modified", "9", [], "9", b"")):
            with self.subTest(status, version=version, length=length, parts=parts):
                wire = self.wire().request("/admin", *headers, method=method, version=version)
                _, answer, data = wire.answer(method)
                self.assertEqual((answer["Content-Length"] or answer["Transfer-Encoding"], data),
                                 (framing, body))
                if answer["Connection"] != "close":
                    self.assertOpen(wire)
        status = "200 OK"
        for version, length, parts, error in (
                ("1.1", None, [b"ab", KeyError()], None), ("1.1", "5", [b"ab"], None),
                ("1.1", None, [b"ab", ConnectionResetError()], None),
                ("1.0", None, [b"ab", KeyError()], ConnectionResetError)):
            if len(parts) > 1:
                self.expect_log("the application at /admin has failed")
            with self.subTest(version, length=length), (
                    self.assertRaises(error) if error else contextlib.nullcontext()):
                data = self.wire().request("/admin", version=version).file.read()
                self.assertTrue(b"ab" in data and not data.endswith(b"0\r\n\r\n"), data)

    def test_wsgi_fails(self):
        """500, the traceback in the log; not for close()."""
        def app(environ, start_response):
            if environ["PATH_INFO"] == "/close":
                start_response("200 OK", [])
                return body
            if environ["PATH_INFO"] == "/split":
                start_response("200 OK", [("X-A", "a\r\nSet-Cookie: secret")])
                return [b"secret"]
            print("its own words", file=environ["wsgi.errors"])
            raise (BrokenPipeError if environ["PATH_INFO"] == "/pipe" else RuntimeError)("secret")
        self.server = self.serve(wsgi={"/admin": app})
        for path in "/admin", "/admin/pipe", "/admin/split":
            with self.subTest(path=path), self.assertLogs("gaffer", "ERROR") as logged:
                answer = self.ask("GET", path)
                self.assertCode(answer, 500, "internal_error", "the application at /admin")
                self.assertNotIn("secret", str(answer[1:]))
                self.assertIn("Traceback", logged.output[-1])
                self.assertEqual("its own words" in logged.output[0], path != "/admin/split")
        body = mock.MagicMock(close=mock.Mock(side_effect=OSError("cannot close")))
        body.__iter__.side_effect = lambda: iter([b"ab", b"c"])
        self.expect_log("the application at /admin has failed")
        for version in "1.0", "1.1":
            wire = self.wire().request("/admin/close", version=version)
            self.assertEqual((wire.answer()[2], wire.file.read()), (b"abc", b""))
        with mock.patch("gaffer.Handler.send", side_effect=socket.timeout):
            self.assertEqual(self.wire().request("/admin/split").file.read(), b"")


# --------------------------------------------------------------------------------------------------
# ring 3: streams, websockets, events
#
# From outside, by the contract's sections 4 and 5. Most children are `cat`: what is posted to
# stdin is, byte for byte, what the stream has to show.
# --------------------------------------------------------------------------------------------------
STREAMS_ONCE = {"attempts": 1, "window": 1000, "max_retry": 0}      # what exits stays down


def streams_open(server, kind):
    """How many clients follow something: "continuous", "eventsource", "longpoll", "websocket"."""
    return server.manager.loop.call(
        lambda: sum(channel.kind == kind for channel in server.http.channels))


class StreamsCase(ServerCase):
    """Children, and clients of their streams."""

    def cat(self, name="cat", command="cat", **options):
        """The pid of a process that is not started again."""
        options = {"redirect_input": True, "flapping": STREAMS_ONCE, **options}
        return self.server.add(name, command, **options)[0]

    def puppet(self, name="puppet"):
        """The pid of a process that executes the lines of its stdin."""
        return self.cat(name, python("""
            import os, signal, sys
            def out(data): os.write(1, data)
            def err(data): os.write(2, data)
            for line in sys.stdin: exec(line)
            """))

    def hose(self, lines=10 ** 9):
        """The pid of a process that waits for a line, then writes lines of 64 bytes."""
        return self.cat("hose", python("""
            import os, sys
            sys.stdin.readline()
            for first in range(0, %d, 1000):
                block = memoryview(b"".join(b"%%063d\\n" %% i for i in range(first, first + 1000)))
                while block:
                    block = block[os.write(1, block):]
            sys.stdin.read()
            """ % lines))

    def send(self, ref, data, label="stdin"):
        self.server.ok("POST", "/streams/%s/%s" % (ref, label), data)

    def end(self, pid):
        self.server.ok("DELETE", "/streams/%s/stdin" % pid)

    def poll(self, ref, query="", label="stdout"):
        """(status, offset as a string, body) of a long poll."""
        status, headers, body = self.server.request(
            "GET", "/streams/%s/%s?%s" % (ref, label, query))
        return status, headers["Gaffer-Offset"], body

    def written(self, pid, data):
        """Write through a new cat, and wait for the last byte."""
        self.send(pid, data)
        until(lambda: self.place(pid) == len(data), "the output")

    def place(self, ref, label="stdout"):
        """How many bytes a stream has had."""
        headers = self.server.request("HEAD", "/streams/%s/%s" % (ref, label))[1]
        return int(headers["Gaffer-Offset"])

    def waiting(self, target):
        count = streams_open(self.server, "longpoll")
        wire = self.wire().request(target)
        until(lambda: streams_open(self.server, "longpoll") > count, "the wait")
        return wire

    @property
    def epoch(self):
        return self.server.manager.epoch

    def sse(self, ref, query="", *headers, label="stdout"):
        wire = self.wire("/streams/%s/%s?feed=eventsource&%s" % (ref, label, query), *headers)
        self.assertEqual((wire.status, wire.headers["Content-Type"]), (200, "text/event-stream"))
        return wire

    def resumed(self, ref, last, query=""):
        return self.sse(ref, query, "Last-Event-ID: " + last)

    def continuous(self, ref, query="", label="stdout", **options):
        wire = self.wire("/streams/%s/%s?feed=continuous&%s" % (ref, label, query), **options)
        self.assertEqual(wire.status, 200)
        return wire

    def assertEvents(self, wire, *expected):
        """The next events: (data, offset) of stdout."""
        for data, offset in expected:
            self.assertEqual(wire.event(), ("stdout", data, "%s@%s" % (offset, self.epoch)))

    def assertDropped(self, wire, offset, **expected):
        """The next event tells a loss."""
        kind, data, where = wire.event()
        self.assertEqual((kind, where), ("dropped", "%d@%s" % (offset, self.epoch)))
        self.assertEqual(json.loads(data), expected)


class StreamsPosition(StreamsCase):
    """since, tail, Last-Event-ID: where a reader begins."""

    def test_what_is_refused(self):
        self.written(self.cat(), b"one\n")
        for target, status in (
                ("streams/1/stdout?since=5", 400),
                ("streams/1/stdout?feed=continuous&since=0&tail=1", 400),
                ("streams/1/stdout?feed=eventsource&since=5@" + self.epoch, 400),
                ("streams/cat/stdx", 404), ("streams/%s/stdout" % ("9" * 50), 404),
                ("wstreams/1?since=5", 400), ("wstreams/1?since=0&tail=0", 400),
                ("wstreams/1?type=x", 400), ("wstreams/1?label=x", 404)):
            self.assertEqual(self.websocket("/" + target).status, status, target)

    def test_since_and_tail(self):
        pid = self.cat()
        data = b"one\ntwo\r\nthree\n\nfi"
        self.written(pid, data)
        for query, first in (
                ("since=0", 0), ("since=18", 18), ("since=4@" + self.epoch, 4),
                ("since=4000@other", 0), ("tail=0", 18), ("tail=2", 15), ("tail=all", 0)):
            with self.subTest(query=query):
                self.assertEqual(self.poll(pid, "timeout=0&" + query),
                                 (200 if first < 18 else 204, "18", data[first:]))
                follower, events = self.continuous(pid, query), self.sse(pid, query)
                websocket = self.websocket("/wstreams/%d?type=binary&%s" % (pid, query))
                for wire in (follower, events, websocket):
                    self.assertEqual(wire.headers["Gaffer-Offset"], str(first))
                if first < 18:
                    self.assertEqual(follower.exactly(18 - first), data[first:])
                    self.assertEqual(websocket.read(), (2, data[first:]))

    def test_last_event_id(self):
        pid = self.cat()
        self.written(pid, b"one\ntwo\n")
        for query in ("since=0", "tail=all", "since=0@other"):      # an EventSource repeats its URL
            self.assertEvents(self.resumed(pid, "4@" + self.epoch, query), ("two", 8))
        for last in "4@other", "8x@other", "rubbish", "99@" + self.epoch, "4x@" + self.epoch:
            with self.subTest(last=last):
                wire = self.resumed(pid, last)
                self.assertDropped(wire, 0, bytes=0, restarted=True)
                self.assertEvents(wire, ("one", 4), ("two", 8))
        self.assertDropped(self.sse(pid, "since=4@other"), 0, bytes=0, restarted=True)

    def test_the_default_window(self):
        """It is 1 MiB; a line may be half as long."""
        self.server.add("big", python("for _ in range(3): print('x' * 400000)"), restart="never")
        self.server.wait_event("exit")
        status, headers, body = self.server.request("GET", "/streams/1/stdout?since=0")
        self.assertEqual((status, len(body), headers["Gaffer-Dropped"]),
                         (200, 1048576, str(1200003 - 1048576)))
        self.assertEvents(self.sse(1, "tail=1"), ("x" * 400000, 1200003))


class StreamsLongpoll(StreamsCase):

    def test_question_and_answer(self):
        """Without an offset it gets the answer to a POST, once each, and nothing twice."""
        self.cat("web")
        for query in "timeout=0", "heartbeat=0.1&timeout=0.25":
            self.assertEqual(self.poll(1, query), (204, "0", b""))
        self.send(1, b"one\n")
        self.assertEqual(self.poll(1), (200, "4", b"one\n"))
        self.assertEqual(self.poll(1, "timeout=0"), (204, "4", b""))
        for since, text in (4, b"two\n"), (8, b"three\n"):
            self.send(1, text)
            self.assertEqual(self.poll(1, "since=%d" % since)[2], text)
        self.assertEqual(self.place(1), 14)
        self.assertEqual(self.poll("web"), (200, "14", b"one\ntwo\nthree\n"))
        self.assertEqual(self.poll(1), (200, "14", b"two\nthree\n"))
        self.assertEqual(self.poll(1, "timeout=0"), (204, "14", b""), "both have their answer")
        for number in range(2 * gaffer.QUESTIONS_MAX):
            self.send(1, b"x\n")
            self.poll(1, "since=%d" % (14 + 2 * number))
        self.assertEqual(self.poll(1)[2], b"x\n" * gaffer.QUESTIONS_MAX)

    def test_the_end(self):
        pid = self.cat()
        wire = self.waiting("/streams/%d/stdout" % self.cat("other"))
        self.send(pid, b"last words")
        self.end(pid)
        self.server.wait_event("exit")
        for query, answer in (("since=5", (200, "10", b"words")), ("", (200, "10", b"last words")),
                              ("", (204, "10", b"")), ("tail=1", (200, "10", b"last words"))):
            self.assertEqual(self.poll(pid, query), answer)
        for which, ended in ((pid, "true"), (2, None)):     # or the end looked like a timeout
            headers = self.server.request("GET", "/streams/%d/stdout?timeout=0" % which)[1]
            self.assertEqual(headers["Gaffer-Ended"], ended)
        self.end(2)
        self.assertEqual(wire.answer()[0], 204)


class StreamsEventsource(StreamsCase):

    def test_lines_live_again_and_from_each_id(self):
        pid = self.cat()
        live = self.sse(pid)
        self.send(pid, b"a\nb\r\nc\r\n\n  id: 5\n\xe2\x82\xac\xff\x0b\xc2\x85\nno end")
        self.end(pid)
        events = list(iter(live.event, None))
        self.assertEqual([(data, where.partition("@")[0]) for _, data, where in events[:-1]], [
            ("a", "2"), ("b", "5"), ("c", "8"), ("", "9"), ("  id: 5", "17"),
            ("\u20ac\ufffd\x0b\x85", "25"), ("no end", "31")])
        self.assertEqual(events[-1][::2], ("exit", "31x@" + self.epoch))
        self.assertEqual(list(iter(self.sse(pid, "since=0").event, None)), events)
        for index, event in enumerate(events[:-1], 1):
            self.assertEqual(list(iter(self.resumed(pid, event[2]).event, None)), events[index:])

    def test_the_exit(self):
        """Its id, and no other, gets 204."""
        for name, code, status, number in (("one", b"os._exit(7)", 7, 0),
                                           ("two", b"signal.raise_signal(9)", 0, 9)):
            pid = self.puppet(name)
            wire = self.sse(pid, label="stderr")
            self.send(pid, b"err(b'bye\\n'); %s\n" % code)
            self.assertEqual(wire.event()[:2], ("stderr", "bye"))
            kind, data, place = wire.event()
            self.assertEqual((kind, json.loads(data)), (
                "exit", {"pid": pid, "exit_status": status, "term_signal": number}))
            self.assertIsNone(wire.event())
        path = "/streams/%d/stderr?feed=eventsource" % pid
        self.assertEqual(self.wire(path, "Last-Event-ID: " + place).status, 204)
        again = ["dropped", "stderr", "exit"]
        for last, kinds in (("4@" + self.epoch, ["exit"]), ("4", ["exit"]), ("4x@other", again),
                            ("2x@" + self.epoch, again)):
            wire = self.wire(path, "Last-Event-ID: " + last)
            self.assertEqual([event[0] for event in iter(wire.event, None)], kinds, last)

    def test_a_pipe_that_ends_before_its_process(self):
        """The stream ends, the exit is told at the exit."""
        pid = self.puppet()
        feed, events = self.continuous(pid, "since=0"), self.sse(pid, "heartbeat=0.1")
        self.send(pid, b"out(b'closing'); os.close(1)\n")
        self.assertEqual(feed.chunks(), (b"closing", True))
        self.assertEqual(self.poll(pid, "since=7"), (204, "7", b""))
        self.assertEvents(events, ("closing", 7))
        self.assertEqual(events.block(), b"")   # a heartbeat: it waits
        self.end(pid)
        self.assertEqual(events.event()[::2], ("exit", "7x@" + self.epoch))


class StreamsClock(StreamsCase):
    """The clock can be set forward."""

    options = {"window": 8 * gaffer.MIB}

    def setUp(self):
        Case.setUp(self)
        self.ahead = 0.0
        loop = gaffer.Loop(lambda: time.monotonic() + self.ahead)
        with mock.patch("gaffer.Manager", functools.partial(gaffer.Manager, loop=loop)):
            self.server = Running(**self.options)
        self.addCleanup(self.server.stop_all)
        self.server.http.listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)

    def advance(self, seconds):
        def forward():                          # not within a turn of the loop
            self.ahead += seconds
        self.server.manager.loop.call(forward)
        for _ in range(3):                      # the timers that are due, and what they begin
            turn = threading.Event()
            self.server.manager.loop.call_soon(turn.set)
            self.assertTrue(turn.wait(TIMEOUT))

    def test_heartbeats(self):
        """Only seconds that pass without output count."""
        pid = self.cat()
        raw, sse = self.continuous(pid, "heartbeat=1000"), self.sse(pid, "heartbeat=1000")
        websocket = self.websocket("/wstreams/%d?heartbeat=1000" % pid)
        self.assertEqual(sse.block(), b"")
        for text in (b"x\n", b"y\n"):
            self.advance(900)
            self.send(pid, text)
            self.assertEqual((raw.chunk(), websocket.read()), (text, (1, text)))
            self.assertEqual(sse.event()[1], text.decode().strip())
        for _ in range(2):
            self.advance(1100)
            self.assertEqual((raw.chunk(), sse.block(), websocket.read()), (b"\n", b"", (9, b"")))
        self.assertEqual(self.poll(pid, "since=2"), (200, "4", b"y\n"))

    def full(self, *queries, lines=10 ** 9):
        """(pid, Wires that read nothing): their connections are full."""
        pid = self.hose(lines)
        wires = [self.continuous(pid, query, receive_buffer=4096) for query in queries]
        self.send(pid, b"\n")
        until(lambda: len(self.server.manager.loop.call(lambda: [
            channel for channel in self.server.http.channels if channel.queued])) == len(wires))
        return pid, wires

    def test_heartbeat_is_not_queued(self):
        """Who has more to read needs no sign of life."""
        left = 60000 * 64
        pid, (wire,) = self.full("heartbeat=50", lines=60000)
        until(lambda: self.place(pid) == left)
        for _ in range(3):
            self.advance(60)
        while left:
            chunk = wire.chunk()
            self.assertNotEqual(chunk, b"\n")
            left -= len(chunk)
        self.assertEqual(self.server.manager.loop.call(lambda: self.server.http.sending), {})
        self.advance(400)
        self.assertEqual(wire.chunk(), b"\n")

    def test_who_takes_nothing_is_closed(self):
        """After 30 s where it holds a process, after 300 s elsewhere."""
        pid, (_, slow) = self.full("loss=block", "loss=skip")
        for seconds, left in ((35, 1), (300, 0)):
            with self.assertLogs("gaffer", "INFO") as logs:
                self.advance(seconds)
                until(lambda: streams_open(self.server, "continuous") == left)
            self.assertIn("took nothing for %d seconds" % (300 if left == 0 else 30),
                          "".join(logs.output))
            if left:                            # what it takes now counts
                self.advance(200)
                slow.exactly(16 * gaffer.MIB)
                self.advance(150)
                self.assertEqual(streams_open(self.server, "continuous"), 1)
            place = self.place(pid)
            until(lambda: self.place(pid) > place + 10 ** 6)

    def test_clock_that_leaps_ahead(self):
        """gaffer was halted: what came meanwhile was in time, and missed beats stay missed."""
        server, loop = self.server, self.server.manager.loop
        for name in "x", "y":
            self.cat(name)
        half = self.wire().send(b"GET /ping HTTP/1.1\r\n")
        poll = self.wire().request("/streams/1/stdout?since=0")
        block = self.wire("/streams/1/stdout?feed=continuous&loss=block")
        beats = self.wire("/streams/2/stdout?feed=continuous&heartbeat=300")
        made = self.websocket("/wstreams/1")
        until(lambda: streams_open(server, "longpoll"), "the long poll")
        go_on, halted = threading.Event(), threading.Event()
        loop.call_soon(lambda: (halted.set(), go_on.wait(TIMEOUT)))
        self.assertTrue(halted.wait(TIMEOUT))
        half.send(b"Host: localhost\r\n\r\n")
        made.text("hello\n")
        self.ahead += 1000.0
        go_on.set()
        self.assertEqual((half.answer()[2], poll.answer()[2], made.read(), block.chunk(),
                          beats.chunk()), (b"OK", b"hello\n", (1, b"hello\n"), b"hello\n", b"\n"))
        self.send(2, b"x\n")
        self.assertEqual(beats.chunk(), b"x\n")

    def test_last_words_for_a_slow_client(self):
        """It gets all of them as long as it goes on to take some."""
        self.server.add("a", python(PROCESS_AWAITS_TERM + (
            "os.write(1, b'ready\\n')\nsignal.sigwait([15])\nsys.stdout.write('x' * 8000000)")))
        with http_limits(STOP_SEND=100, STOP_SEND_TOTAL=1000):
            slow, taken = self.continuous("a", "since=0", receive_buffer=65536), 0
            self.assertEqual(slow.exactly(6), b"ready\n")
            self.server.manager.stop()
            until(lambda: not self.server.manager._running and self.server.http.sending)
            channel, = self.server.http.channels
            for _ in range(3):
                before = channel.sent
                self.advance(0.6 * gaffer.STOP_SEND)
                while channel.sent == before:
                    taken += len(slow.chunk())
                self.advance(0.0)
                self.assertFalse(channel.closed)
            rest, whole = slow.chunks()
            self.assertEqual((taken + len(rest), whole), (8000000, True))
            self.server._thread.join(TIMEOUT)

    def test_grandchild_holds_the_pipe(self):
        """The stream ends 2 s after the exit, and then the exit is told."""
        pid = self.puppet()
        wire = self.sse(pid)
        self.send(pid, b"import subprocess; child = subprocess.Popen(['sleep', '1000'], "
                       b"stdin=-3, start_new_session=True); out(b'%d\\n' % child.pid)\n")
        self.addCleanup(os.kill, int(wire.event()[1]), signal.SIGKILL)
        self.end(pid)
        self.server.wait_event("exit")
        self.advance(3)
        self.assertEqual(wire.event()[0], "exit")


class StreamsSmallWindow(StreamsCase):
    """A window of 256 bytes: what falls out is counted and told."""

    options = {"window": 256}

    def test_where_a_reader_begins(self):
        """At the first byte that is there; with loss=skip, and for events, at a whole line."""
        pid, data = self.cat(), b"".join(b"%09d\n" % i for i in range(100))
        self.written(pid, data)
        headers = self.server.request("GET", "/streams/%d/stdout" % pid)[1]
        self.assertEqual(headers["Gaffer-Dropped"], "744")      # of the answer to the POST
        for query, first, dropped in (("since=10", 744, "734"), ("tail=all", 750, None),
                                      ("tail=26", 750, None)):
            _, headers, body = self.server.request("GET", "/streams/%d/stdout?%s" % (pid, query))
            wire = self.continuous(pid, query)
            for found, offset in (headers, 1000), (wire.headers, first):
                self.assertEqual((found["Gaffer-Offset"], found["Gaffer-Dropped"]),
                                 (str(offset), dropped), query)
            self.assertEqual([body, wire.exactly(1000 - first)], [data[first:]] * 2)
        with http_limits(LINGER_TIME=0.3):      # no ping follows a close frame
            wire = self.websocket("/wstreams/%d?since=0&heartbeat=0.1" % pid)
            self.assertEqual([wire.read()[0], wire.read()[0]], [8, None])
            loop = self.server.manager.loop     # who reads slowly may send meanwhile
            self.assertGreater(loop.call(lambda: max(
                each._timers[each.close].when for each in self.server.http.channels
                if each.close in each._timers)) - loop.now, 10)
        wire = self.continuous(pid, "loss=skip&since=5")
        self.end(pid)
        self.assertEqual((wire.chunks(), wire.trailers["Gaffer-Dropped"]),
                         ((data[750:], True), "745"))
        wire = self.resumed(pid, "40@" + self.epoch)
        self.assertDropped(wire, 750, bytes=710)
        self.assertEvents(wire, *[("%09d" % i, i * 10 + 10) for i in range(75, 100)])

    def test_block(self):
        """It begins where its head says, and loses nothing; HEAD holds nobody."""
        pid = self.hose()
        self.assertEqual(self.server.request(
            "HEAD", "/streams/%d/stdout?feed=continuous&loss=block" % pid)[0], 200)
        self.send(pid, b"\n")
        for query in ("tail=all", "since=0", "tail=1") * 5:
            wire = self.continuous(pid, query + "&loss=block")
            first = int(wire.headers["Gaffer-Offset"])
            data = wire.exactly(64 * 20)
            wire.close()
            line = b"%063d\n" % (first // 64)
            self.assertEqual(data[:64 - first % 64], line[first % 64:])
        place = self.place(pid)
        until(lambda: self.place(pid) > place + 10000)

    def test_block_loses_nothing(self):
        """Of 64,000 bytes that are there at once, in each feed."""
        pid, query = self.hose(1000), "loss=block"
        wire, events = self.continuous(pid, query), self.sse(pid, query)
        websocket = self.websocket("/wstreams/%d?type=binary&%s" % (pid, query))
        self.send(pid, b"\n")
        self.end(pid)
        data = b"".join(b"%063d\n" % number for number in range(1000))
        self.assertEqual(wire.chunks(), (data, True))
        texts = [text for _, text, _ in iter(events.event, None)]
        self.assertEqual(texts[:-1], data.decode().split())
        self.assertEqual(b"".join(iter(lambda: websocket.read()[1], b"\x03\xe8exit 0")), data)

    def test_a_journal(self):
        """What has gone is told in a header or an event, not if nobody has asked for it."""
        self.cat("one", python("for number in range(1000): print('line %03d' % number)\ninput()"))
        until(lambda: self.place(1) == 9000, "the last line")
        headers, data = self.server.request("GET", "/streams?since=0&timeout=0")[1:]
        lines = list(map(int, re.findall(rb"line (\d+)", data)))
        self.assertEqual(lines, [*range(lines[0], 1000)])
        lost = 9000 - 9 * len(lines)
        self.assertEqual((headers["Gaffer-Dropped"], headers["Gaffer-Offset"]), (str(lost), "9000"))
        for query, told, first in ("since=0", str(lost), lines[0]), ("tail=3", None, 997):
            wire = self.wire("/streams?feed=continuous&" + query, version="1.0")
            self.assertEqual(wire.headers["Gaffer-Dropped"], told)
            self.assertEqual(wire.file.readline().split()[-1], b"%03d" % first)
        self.assertEqual(self.wire("/streams?feed=eventsource&since=0").event()[:2],
                         ("dropped", '{"bytes": %d}' % lost))
        wire = self.wire("/streams/one?feed=continuous")
        self.server.ok("DELETE", "/processes/one")
        self.assertEqual(wire.chunks(), (b"", True))


class StreamsTemplate(StreamsCase):
    """The stream of a template, by its name, and what is left of those of its processes."""

    def test_deletion(self):
        """Readers of a process get its last words and its exit."""
        pid = self.puppet()
        self.send(pid, b"signal.pthread_sigmask(0, [15]); out(b'ready\\n'); "
                       b"signal.sigwait([15]); out(b'last words'); os._exit(3)\n")
        self.poll(pid, "since=0")
        events, websocket = self.sse(pid), self.websocket("/wstreams/%d" % pid)
        journal = self.wire("/streams/%d?feed=continuous" % pid)
        self.server.ok("DELETE", "/processes/puppet")
        self.assertEvents(events, ("last words", 16))
        self.assertEqual(json.loads(events.event()[1])["exit_status"], 3)
        self.assertEqual([websocket.read(), websocket.read()],
                         [(1, b"last words"), (8, b"\x03\xe8exit 3")])
        self.assertRegex(journal.chunks()[0], b"last words\n.*exit_status")

    def test_restarts_and_deletion(self):
        """It goes on over restarts, and ends with its template."""
        self.server.ok("POST", "/processes", dict(
            python("import os\nos.write(1, b'hello\\n')\nos.read(0, 1)\nos.write(1, b'bye')"),
            name="t", redirect_input=True, start=False))
        wire, events = self.continuous("t"), self.sse("t")
        self.server.ok("POST", "/processes/t/_start")
        self.assertEqual(wire.exactly(6), b"hello\n")
        self.assertEvents(events, ("hello", 6))
        self.send("t", b"x")                    # it exits in the middle of a line
        self.assertEqual(wire.exactly(10), b"bye\nhello\n")
        kind, text, place = events.event()
        self.assertEqual((kind, text), ("stdout", "bye"))
        if place.startswith("9@"):              # its end came after 100 ms of silence
            self.assertEvents(events, ("", 10))
        self.assertEvents(events, ("hello", 16))
        self.server.ok("POST", "/processes/t/_restart?wait=true")
        self.assertEqual(wire.exactly(6), b"hello\n")
        self.assertEvents(events, ("hello", 22))
        self.assertEvents(self.resumed("t", "10@" + self.epoch), ("hello", 16), ("hello", 22))
        self.server.ok("POST", "/processes/t/_stop?wait=true")
        self.assertEqual(self.poll("t", "since=22&timeout=0"), (204, "22", b""))
        self.server.ok("DELETE", "/processes/t")
        self.assertEqual(wire.chunks(), (b"", True))
        self.assertIsNone(events.event())       # and no exit in it at any time

    def test_one_process_then_two_then_an_update(self):
        """Input by name needs exactly one. The update drops a label, whose stream ends, and an
        unfinished line that has waited for its end gets it."""
        pid = self.cat("t")
        gone, stays = self.continuous("t", label="stderr"), self.continuous("t")
        self.send("t", b"cut")
        self.assertEqual(self.poll(pid, "since=0"), (200, "3", b"cut"))
        self.server.ok("POST", "/processes/t/_add")
        answer = self.server.json("POST", "/streams/t/stdin", b"x")
        self.assertError(answer, 404, "not_found", "2 processes")
        self.assertEqual(self.websocket("/wstreams/t").status, 404)
        self.server.ok("PUT", "/processes/t", {
            "cmd": "echo again", "redirect_input": True, "redirect_output": ["stdout"]})
        self.assertEqual(gone.chunks(), (b"", True))
        self.assertEqual(stays.exactly(10)[:10], b"cut\nagain\n")


class StreamsJournal(StreamsCase):
    """What several streams say, as one: GET /streams, /streams/<name>, /streams/<pid>."""

    def read(self, path):
        """["name pid label text"] of what there is now, without times."""
        status, _, data = self.server.request("GET", path + "&timeout=0")
        self.assertIn(status, (200, 204), data)
        return [re.fullmatch(r"[0-9]+\.[0-9]{3} (.*)", line).group(1)
                for line in data.decode().splitlines()]

    def test_in_the_order_of_reading(self):
        for name in ("one", "two"):
            self.puppet(name)
        said = ["one 1 stdout a", "two 2 stdout b", "one 1 stderr c", "one 1 stdout d",
                "two 2 stderr e"]
        for line in said:
            _, pid, label, text = line.split()
            since = self.place(pid, label)      # each is read before the next is said
            self.send(pid, b"%s(b'%s\\n')\n" % (label[3:].encode(), text.encode()))
            self.poll(pid, "since=%d" % since, label)
        self.assertEqual(self.read("/streams?tail=all"), said)
        for path, word in (("/streams/one", "one"), ("/streams/2", "two")):
            expected = [line for line in said if line.startswith(word)]
            self.assertEqual(self.read(path + "?tail=all"), expected)

    def test_resume(self):
        """An id stays good, whatever other journals are read beside."""
        one = self.cat("one")
        self.cat("other")
        place, last = self.server.request("GET", "/streams?timeout=0")[1]["Gaffer-Offset"], "0"
        for path in ("/streams", "/streams/one", "/streams/%d" % one) * 2:
            self.send(one, b"line\n")
            self.assertEqual(self.read("/streams/other?tail=all"), [])
            _, headers, data = self.server.request("GET", path + "?timeout=30&since=" + place)
            self.assertIsNone(headers["Gaffer-Dropped"])
            place = headers["Gaffer-Offset"]
            wire = self.wire(path + "?feed=eventsource", "Last-Event-ID: " + last)
            _, text, last = wire.event()
            for line in (data.decode(), text + "\n"):
                self.assertEqual(line.split(" ", 1)[1], "one 1 stdout line\n")
        wire = self.wire("/streams/one?feed=eventsource", "Last-Event-ID: 5@0123abcdj1")
        self.assertEqual(wire.event()[:2], ("dropped", '{"bytes": 0, "restarted": true}'))
        self.end(one)
        path = "/streams/%d?feed=eventsource" % one
        *_, (_, _, last) = iter(self.wire(path + "&since=0").event, None)
        self.assertEqual(self.wire(path, "Last-Event-ID: " + last).status, 204)
        for path, status in ("/one?loss=block", 400), ("/nobody", 404), ("/17", 404):
            self.assertEqual(self.server.json("GET", "/streams" + path)[0], status, path)


class PureInput(PureLoopCase):

    def test_small_pieces(self):
        """Many cost little more than their bytes; what is refused leaves no trace."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        os.write(write, bytes(gaffer.READ_SIZE))        # what it holds
        stream = gaffer.Input(self.loop, write, "stdin", os.close, 30000)
        for refused in "text", 5, [1], None:
            self.assertRaises(TypeError, self.do, stream.write, refused)
        self.assertEqual(stream.size, 0)
        with traced() as memory:
            with contextlib.suppress(gaffer.StdinFull):
                for number in itertools.count():
                    piece = bytearray(b"%d\n" % number)
                    self.do(stream.write, piece)
                    piece[:] = b"changed"       # later than it was written
            self.assertLess(memory()[0], 2 * 30000)
        self.do(stream.end)
        with os.fdopen(read, "rb") as file:
            file.read(gaffer.READ_SIZE)
            self.advance()
            self.assertEqual(file.read(), b"".join(b"%d\n" % each for each in range(number)))


class PureOutput(PureLogCase):

    def output(self, merged=None):
        """(Output of a pipe, its other end); self.merged has it too."""
        read, write = os.pipe()
        self.addCleanup(os.close, write)
        self.ends = []
        self.merged = merged or gaffer.Merged(
            self.loop, 256, "t", "out", gaffer.Journal(self.loop, 1024))
        output = self.do(gaffer.Output, self.loop, read, self.merged, 1,
                         lambda: self.ends.append(1))
        self.do(output.resume)
        self.addCleanup(self.do, output.close)
        return output, write

    def blocked(self, window):
        """A reader that blocks, whose sink is full."""
        return self.reader(window, offset=0, loss="block", open=False)

    def turns(self, count, seconds=0.0):
        for _ in range(count):
            self.advance(seconds)

    def test_block_after_the_exit(self):
        """What is in the pipe waits for the reader, longer than others are waited for."""
        output, write = self.output()
        reader, data = self.blocked(output.window), bytes(range(250)) * 4
        os.write(write, data)
        self.turns(20)
        self.do(output.drain)
        self.turns(3, gaffer.DRAIN_TIME + 0.1)
        self.assertEqual((self.ends, reader.sink.data == data), ([], False))
        for _ in range(40):
            self.drain(reader)
            self.advance()
        self.assertEqual((reader.sink.data, self.ends), (data, []))
        self.advance(gaffer.DRAIN_TIME + 0.1)
        self.assertEqual(self.ends, [1])

    def test_block_at_the_end(self):
        """No more is read than its reader can be given; without one all is."""
        for blocks, pauses in ((True, False), (True, True), (False, False)):
            output, write = self.output()
            reader, data = blocks and self.blocked(output.window), bytes(range(250)) * 4
            os.write(write, data)
            self.turns(20 * pauses)
            self.do(output.drain)
            self.advance(gaffer.DRAIN_TIME - 0.1)
            self.assertFalse(self.ends)
            self.do(output.close)
            end = output.window.end
            if blocks:
                self.drain(reader)
                self.assertEqual(reader.sink.data, data[:end])
            self.assertEqual((end < 400, self.ends), (blocks, [1]))

    def test_block_of_two(self):
        """The unfinished line of one waits for room, too."""
        (output, write), (_, also) = self.output(), self.output(self.merged)
        reader = self.blocked(self.merged.window)
        lines = [b"\n", b"x" * 200 + b"\n", b"y" * 30 + b"\n", b"z\n"]
        for fd, data in (also, lines[0]), (also, lines[1]), (write, b"who? " * 8), (also, lines[2]):
            os.write(fd, data)
            self.advance()
        self.turns(2, gaffer.MERGED_LINE_DELAY + 0.1)
        self.assertEqual(self.merged.window.end, 256)
        self.drain(reader)
        os.write(also, lines[3])
        self.turns(2, gaffer.MERGED_LINE_DELAY + 0.1)
        os.write(write, b"end")
        self.advance()
        self.do(output.close)
        lines[2:2] = [b"who? " * 8 + b"\n"]
        self.assertEqual(reader.sink.data, b"".join(lines) + b"end")

    def test_block_and_two_ends(self):
        """Two unfinished lines have room for both."""
        (output, write), (other, also) = self.output(), self.output(self.merged)
        reader = self.blocked(self.merged.window)
        for data in b"\n", b"x" * 99 + b"\n", b"y" * 99, b"z" * 99:
            os.write(also if b"z" in data else write, data)
            self.advance()
        self.do(output.close)
        self.do(other.close)
        self.drain(reader)
        self.assertEqual(len(reader.sink.data), self.merged.window.end)

    def test_unfinished_lines(self):
        """Each may wait for its end, however long its process has written."""
        (_, write), (_, also) = self.output(), self.output(self.merged)
        for part in b"a", b"1\nb", b"2\nc", b"3\nd", b"":
            os.write(write, part)
            self.advance(0.6 * gaffer.MERGED_LINE_DELAY)
            os.write(also, b"x\n")
            self.advance()
        self.advance(gaffer.MERGED_LINE_DELAY)
        self.assertEqual(self.merged.window.read(0, 99), b"x\na1\nx\nb2\nx\nc3\nx\nx\nd")


STREAMS_SLEEPER = """
    import hashlib, os, signal, sys
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.write(1, b"ready\\n")
    signal.sigwait([signal.SIGUSR1])
    data = sys.stdin.buffer.read({size})
    os.write(1, b"%d %s\\n" % (len(data), hashlib.md5(data).hexdigest().encode()))
"""                                     # reads nothing before SIGUSR1; says what it has got


def streams_digest(data):
    """What STREAMS_SLEEPER says of it."""
    return b"%d %s\n" % (len(data), hashlib.md5(data).hexdigest().encode())


class StreamsStdin(StreamsCase):

    def test_all_bytes(self):
        pid, deaf = self.cat(), self.cat("deaf", "sleep 1000", redirect_input=False)
        data = bytes(range(256)) * 256 + b"\0end\nof all"
        wire = self.continuous(pid)
        self.assertEqual(wire.headers.get_all("Transfer-Encoding"), ["chunked"])
        for part, label in ((data[:-9], "stdin"), (b"", "stdin"), (data[-9:], "ttin")):
            self.send(pid, part, label)
        self.end(pid)
        self.assertEqual((wire.chunks(), wire.file.read()), ((data, True), b""))
        for query, rest in ("since=0", data), ("tail=1", b"of all"), ("", b""):
            self.assertEqual(self.continuous(pid, query).chunks(), (rest, True))
        for method, path in (("POST", pid), ("POST", deaf), ("DELETE", deaf), ("DELETE", "deaf")):
            answer = self.server.json(method, "/streams/%s/ttin" % path, b"x")
            self.assertError(answer, 403, "forbidden_write")
        answer = self.server.json("POST", "/streams/deaf/stdout", b"x")
        self.assertError(answer, 405, "method_not_allowed")
        for query, status in ("", 403), ("?readonly=true", 101):
            self.assertEqual(self.websocket("/wstreams/%d%s" % (deaf, query)).status, status)


class StreamsWebsocket(StreamsCase):

    def open(self, pid, query="", **options):
        wire = self.wire(**options).upgrade("/wstreams/%d?%s" % (pid, query))
        self.assertEqual(wire.status, 101)
        return wire

    def test_text_binary_and_lines(self):
        pid = self.cat()
        text, binary, lines = (self.open(pid, query) for query in (
            "", "type=binary", "frame=line"))
        for send, data, shown in ((text.text, "gr\u00fc\u00dfe\n", b"gr\xc3\xbc\xc3\x9fe\n"),
                                  (functools.partial(binary.frame, 2), b"\xff\0\n", b"\xff\0\n"),
                                  (lines.text, "a line", b"a line\n"), (lines.text, "", b"\n")):
            send(data)
            fixed = shown.replace(b"\xff", b"\xef\xbf\xbd")
            self.assertEqual((text.read(), binary.read(), lines.read()),
                             ((1, fixed), (2, shown), (1, fixed[:-1])))
        self.send(pid, b"a\nb\r\nc\rd")
        self.end(pid)
        self.assertEqual([lines.read()[1] for _ in range(5)],
                         [b"a", b"b", b"c", b"d", b"\x03\xe8exit 0"])

    def test_stdin_that_is_closed(self):
        """The output goes on, what is sent is dropped."""
        pid = self.puppet()
        websocket = self.open(pid)
        self.send(pid, b"out(b'on'); signal.pthread_sigmask(0, [10]); "
                       b"signal.sigwait([10]); out(b'end'); os._exit(0)\n")
        self.end(pid)
        self.assertEqual(websocket.read(), (1, b"on"))
        with self.assertLogs("gaffer", "INFO"):
            websocket.text("late")
            websocket.frame(9, b"barrier")
            self.assertEqual(websocket.read(), (10, b"barrier"))
            self.server.http.loop.call(int)     # the pong may go out before the text is written
        self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
        self.assertEqual([websocket.read() for _ in range(2)],
                         [(1, b"end"), (8, b"\x03\xe8exit 0")])
        pid = self.puppet("other")
        self.send(pid, b"os.close(0); out(b'on'); signal.pause()\n")
        self.poll(pid, "since=0")
        answer = self.server.json("POST", "/streams/%d/stdin" % pid, b"x")
        self.assertError(answer, 403, "forbidden_write")

    def test_ends(self):
        """By the client, and by what is wrong; nothing is kept of it."""
        pid, loop = self.cat(), self.server.manager.loop
        timers = loop.call(lambda: loop.pending_timers)
        for sent, code in (
                (ws_frame(8, b"\x03\xe8bye"), b"\x03\xe8"), (ws_frame(8, b""), b""),
                (ws_frame(8, b"\x0f\xa0") + b"more", b"\x0f\xa0"),
                (ws_frame(1, b"\xff"), b"\x03\xef"),
                (b"\x82\xff" + struct.pack("!Q", 1 << 40) + b"abcd", b"\x03\xf1")):
            websocket = self.open(pid, "heartbeat=30")
            websocket.send(sent)
            opcode, payload = websocket.read()
            self.assertEqual((opcode, payload[:2]), (8, code), sent)
            self.assertEqual(websocket.read(), (None, b""))
            websocket.close()
        until(lambda: not self.server.http.channels, "the end of all connections")
        self.assertLessEqual(loop.call(lambda: loop.pending_timers), timers)
        websocket = self.open(pid, "readonly=true")
        websocket.text("x")
        self.assertEqual(websocket.read()[1][:2], b"\x03\xf0")
        self.assertEqual(self.place(pid), 0)

    def test_pings(self):
        """Also more of them than the client reads answers to: the oldest wait."""
        pid = self.cat()
        for buffer in socket.SO_SNDBUF, socket.SO_RCVBUF:
            self.server.http.listeners[0].socket.setsockopt(socket.SOL_SOCKET, buffer, 65536)
        websocket = self.open(pid, "type=binary", receive_buffer=65536)
        websocket.frame(1, b"frag", final=False)
        websocket.frame(9, b"are you there")
        self.assertEqual(websocket.read(), (10, b"are you there"))
        websocket.frame(0, b"mented")
        self.assertEqual(websocket.read(), (2, b"fragmented"))
        channel = gaffer.WebSocketChannel
        with mock.patch.object(channel, "received", autospec=True,
                               side_effect=channel.received) as received:
            websocket.send(ws_frame(9, b"x" * 125) * 64000)
        size = max(len(data) for (_, data), _ in received.call_args_list)
        self.assertEqual(size, gaffer.FRAMES_SIZE)  # others get their turn
        queued = self.server.manager.loop.call(
            lambda: max(channel.queued for channel in self.server.http.channels))
        self.assertTrue(0 < queued < gaffer.MIB + 200, queued)

    def test_a_process_that_does_not_read(self):
        """1 MiB waits, of bodies that are taken whole or not; then the connection fills. When
        it reads, all arrives in order."""
        data = b"".join(bytes([number]) * 300000 for number in range(43))
        pid = self.cat("t", python(STREAMS_SLEEPER.format(size=len(data))))
        self.poll(pid, "since=0")
        path = "/streams/%d/stdin" % pid
        for place in range(0, 900000, 300000):
            self.send(pid, data[place:place + 300000])
        self.assertError(self.server.json("POST", path, bytes(300000)), 503, "stdin_full")
        self.assertError(self.server.json("POST", path, bytes(gaffer.MIB + 1)), 413, "too_large")
        websocket = self.open(pid, "type=binary")
        head = b"\x82\xff" + struct.pack("!Q", 300000) + bytes(4)       # a mask of zeros
        frames = memoryview(b"".join(
            head + data[place:place + 300000] for place in range(900000, len(data), 300000)))
        websocket.sock.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(websocket.sock, selectors.EVENT_WRITE)
            while frames and selector.select(0.5):
                frames = frames[websocket.sock.send(frames):]
            self.assertTrue(frames)
            self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
            while frames and selector.select(TIMEOUT):
                frames = frames[websocket.sock.send(frames):]
        websocket.sock.settimeout(TIMEOUT)
        self.assertEqual([websocket.read(), websocket.read()],
                         [(2, streams_digest(data)), (8, b"\x03\xe8exit 0")])

    def test_input_without_room(self):
        """A message with its end of line; in front of a close frame; of a process that ends."""
        pid = self.cat("t", "sleep 1000")
        websocket = self.open(pid, "frame=line")
        websocket.text("x" * gaffer.MIB)
        self.assertEqual(websocket.read()[1][:2], b"\x03\xf1")
        for size in 1 << 19, 1 << 14, 1 << 9, 1 << 4, 1:
            while self.server.request("POST", "/streams/t/stdin", bytes(size))[0] == 200:
                pass
        with self.assertLogs("gaffer", "INFO") as logs:
            websocket = self.open(pid)
            websocket.send(ws_frame(1, b"x" * 1000) + ws_frame(8, b"\x03\xe8"))
            self.paused(1)
            with http_limits(INPUT_STALL=0.05, END_POLL=0.05):
                websocket.close()
                self.paused(0)
        self.assertIn("a websocket message for t was dropped: it does not", "".join(logs.output))
        with http_limits(LINGER_TIME=2 * TIMEOUT), self.assertLogs("gaffer", "INFO") as logs:
            websockets = self.open(pid), self.open(pid, "frame=line")
            for websocket, sent in zip(websockets, ((b"x" * 1000, 1), (b"", 8))):
                websocket.send(ws_frame(1, sent[0]) + ws_frame(sent[1], b""))
            self.paused(2)
            self.server.ok("POST", "/processes/t/_signal/KILL")
            self.assertEqual(websockets[0].read(), (8, b"\x03\xe8signal 9"))
            self.server.manager.loop.call(int)      # no end yet: TLS has no half of it
            self.assertEqual(select.select([websockets[0].sock], [], [], 0)[0], [])
            websockets[0].frame(8, b"\x03\xe8")
            self.assertEqual(websockets[1].read(), (8, b""))
            for websocket in websockets:
                self.assertEqual(websocket.read(), (None, b""))
        self.assertEqual("".join(logs.output).count("websocket input of t was dropped"), 3)

    def paused(self, count):
        """Wait until so many websockets wait for room."""
        until(lambda: self.server.manager.loop.call(lambda: count == sum(
            each.paused for each in self.server.http.channels)), "the wait for room")

    def test_input_of_a_client_that_has_left(self):
        """All of it reaches a process that reads only then, whether it was closed or cut."""
        loop, manager = self.server.manager.loop, self.server.manager
        self.server.http.listeners[0].socket.setsockopt(    # the end is to fit in, too
            socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for name, close in ("closed", ws_frame(8, b"\x03\xe8")), ("cut", b""):
            pid = self.cat(name, python(STREAMS_SLEEPER.format(size=-1)))
            self.poll(pid, "since=0")
            data, websocket = b"", self.open(pid, "type=binary")
            stdin = loop.call(lambda: manager.processes[pid].inputs["stdin"])
            with http_limits(END_POLL=0.01):
                while not loop.call(lambda: stdin.on_low):
                    data += os.urandom(16384)
                    websocket.frame(2, data[-16384:])
                websocket.send(ws_frame(2, b"more") + close)
                websocket.close()
                window = manager.processes[pid].outputs["stdout"].window
                until(lambda: not loop.call(lambda: window.readers))
            self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
            until(lambda: not self.server.http.channels)
            self.end(pid)
            self.assertEqual(self.poll(pid, "since=6")[2], streams_digest(data + b"more"))


class StreamsWatch(StreamsCase):
    """/watch in all its feeds."""

    EVENTS = ["create", "start", "spawn", "exit", "stop", "delete"]

    def life(self, name="t"):
        """Let a template be added, exit, and be deleted."""
        self.end(self.cat(name))
        self.server.wait_event("proc/%s/stop" % name)
        self.server.ok("DELETE", "/processes/" + name)

    def lines(self, wire, count):
        """The next events of a continuous feed."""
        lines = part_lines(iter(wire.chunk, None))
        return list(map(json.loads, itertools.islice(lines, count)))

    def test_the_events_of_each_feed(self):
        """From now on, as they are encoded, with their ids."""
        self.life("before")
        plain, old = (self.wire("/watch?feed=continuous", version=version)
                      for version in ("1.1", "1.0"))
        sse = self.wire("/watch?feed=eventsource&heartbeat=0.1")
        self.assertEqual(plain.headers["Content-Type"], "application/json")
        self.assertEqual([sse.block(), sse.block()], [b"", b""])
        polls = [self.waiting("/watch/proc/later/spawn"), self.waiting("/watch?since=6")]
        before = time.time()
        pid = self.cat("later")
        events = self.lines(plain, 3)
        self.assertEqual([(event["event"], event["id"]) for event in events], [
            (kind, "%d@%s" % (number, self.epoch))
            for number, kind in enumerate(self.EVENTS[:3], 7)])
        self.assertEqual(set(events[0]), {"event", "name", "id", "time"})
        self.assertTrue(before - 1 < events[0]["time"] < time.time() + 1)
        self.assertEqual(dict(events[2], time=0, os_pid=0), dict(
            events[0], event="spawn", id=events[2]["id"], time=0, pid=pid, os_pid=0))
        for event in events:
            self.assertEqual(json.loads(old.file.readline()), event)
            kind, data, where = sse.event()
            self.assertEqual((kind, json.loads(data), where), (event["event"], event, event["id"]))
        for poll, event in zip(polls, (events[2], events[0])):
            self.assertEqual(json.loads(poll.answer()[2]), event)

    def test_patterns(self):
        """On two templates, of which one is not there yet."""
        late = self.wire("/watch/proc/two?feed=continuous")
        self.life("one")
        self.life("two")
        for path, names, kinds in (
                ("", ["one", "two"], self.EVENTS), ("/.", ["one", "two"], self.EVENTS),
                ("/exit", ["one", "two"], ["exit"]), ("/proc/one", ["one"], self.EVENTS),
                ("/proc/two/delete", ["two"], ["delete"])):
            wanted = list(itertools.product(names, kinds))
            events = self.lines(self.wire("/watch%s?feed=continuous&since=0" % path), len(wanted))
            self.assertEqual([(event["name"], event["event"]) for event in events], wanted)
        self.assertEqual(self.lines(late, 1)[0]["name"], "two")
        self.assertEqual(self.server.request("GET", "/watch/proc/x/reap?timeout=0")[0], 204)
        for path in "proc/", "proc/t/nothing", "create/t", "dropped":
            answer = self.server.json("GET", "/watch/" + path)
            self.assertError(answer, 404, "bad_event_type")

    def test_resume(self):
        """By since or Last-Event-ID, which wins."""
        self.life()
        wire = self.wire("/watch?feed=eventsource&since=0")
        events = [wire.event() for _ in self.EVENTS]
        last = "Last-Event-ID: " + events[1][2]
        for query, headers in (("since=" + events[1][2], ()), ("since=0", (last,))):
            wire = self.wire("/watch?feed=eventsource&" + query, *headers)
            self.assertEqual([wire.event() for _ in events[2:]], events[2:])
        event = self.server.json("GET", "/watch", headers={"Last-Event-ID": events[0][2]})[1]
        self.assertEqual(event["id"], events[1][2])
        for query in "since=7", "since=7@" + self.epoch:
            self.assertError(self.server.json("GET", "/watch?" + query), 400, "bad_value")

    def test_lost_events(self):
        """1024 are kept; those that are lost are counted."""
        manager = self.server.manager
        manager.add_process("t", "cat", numprocesses=0)
        for number in range(1124):
            (manager.start_template if number % 2 else manager.stop_template)("t")
        lost = 1124 + 2 - 1024
        event = self.server.ok("GET", "/watch?since=0")
        self.assertEqual((event["event"], event["events"]), ("dropped", lost))
        following = self.server.ok("GET", "/watch?since=" + event["id"])
        self.assertEqual(following["id"], "%d@%s" % (lost + 1, self.epoch))
        wire = self.wire("/watch?feed=eventsource", "Last-Event-ID: 2@" + self.epoch)
        self.assertDropped(wire, lost, events=lost - 2)
        self.assertIn(b"\ngaffer_events_dropped_total %d\n" % (2 * lost - 2),
                      self.server.request("GET", "/metrics")[2])


class StreamsTimes(StreamsCase):

    def test_long_times(self):
        """Longer ones than a selector takes, up to the longest that is allowed."""
        for seconds in ("10000000", "2147484"):         # the longest first: it hides no other
            for path in ("/watch?feed=eventsource&heartbeat=%s",
                         "/stats?feed=eventsource&interval=%s"):
                self.assertEqual(self.wire(path % seconds).status, 200)
            self.waiting("/watch?timeout=" + seconds)
            name = "t" + seconds
            self.cat(name, graceful_timeout=float(seconds))
            self.server.ok("POST", "/processes/%s/_stop?wait=%s" % (name, seconds))
        self.assertEqual(self.server.json("GET", "/watch?timeout=10000001")[0], 400)


class StreamsObservers(StreamsCase):

    def test_many_watchers(self):
        """More than are sent to one by one, of every form, that read nothing. Processes end in all
        the ways that there are, and nothing is left of them."""
        for path in (*["/watch?feed=eventsource", "/watch?feed=continuous"] * 24,
                     "/watch/proc/n1?feed=eventsource", "/watch/exit?feed=continuous",
                     "/streams?feed=eventsource", "/streams?feed=continuous",
                     "/stats?feed=eventsource&interval=0.1"):
            self.assertEqual(self.wire(path).status, 200)
        groups = []
        for number in range(30):
            pid = self.cat("n%d" % number)
            groups.append(self.server.ok("GET", "/processes/%d" % pid)["os_pid"])
            if number % 3 == 0:
                self.end(pid)
            elif number % 3 == 1:
                self.server.ok("POST", "/processes/n%d/_stop?wait=true" % number)
            self.server.ok("DELETE", "/processes/n%d" % number)
        until(lambda: not any(map(process_group, groups)), "their end")


@unittest.skipUnless(os.path.exists("/proc/net/tcp"), "needs /proc/net/tcp")
class StreamsGone(StreamsCase):

    def waits_for_close(self):
        """How many connections only the clients have closed."""
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        return sum(row[3] == "08" and int(row[1].rpartition(":")[2], 16) == self.server.port
                   for row in rows)

    def test_clients_that_leave(self):
        """It is noticed, whatever keeps the server from reading what they sent."""
        gc.disable()
        self.addCleanup(gc.enable)
        deaf, loud = self.cat("deaf", "sleep 1000"), self.cat("loud", "yes")
        rows = [("/wstreams/%d%s" % (deaf, query), ws_frame(2, bytes(65536)) * 40)
                for query in ("", "?frame=line")]
        rows += [(path, behind) for behind in (b"", http_bytes("GET", "/ping") * 3000)
                 for path in ("/watch", "/streams/%d/stdout" % deaf, "/streams?feed=continuous",
                              "/stats?feed=longpoll&interval=1000")]
        rows += [("/streams/%d/stdout?feed=%s%s" % (loud, feed, loss), bytes(size))
                 for feed, size in (("continuous", 0), ("eventsource", 200000))
                 for loss in ("", "&loss=skip", "&loss=block")]
        for (path, behind), close in itertools.product(rows, (False, True)):
            if path.startswith("/ws"):
                wire = self.websocket(path)
            else:
                wire = self.wire().request(path)
            wire.sock.settimeout(0.2)
            with contextlib.suppress(socket.timeout):   # until the server takes no more
                wire.send(behind)
            wire.sock.shutdown(socket.SHUT_WR)
            if close:
                wire.close()
        until(lambda: not (self.waits_for_close() or self.server.manager.journal._views))
        self.assertEqual(self.server.request("GET", "/ping")[2], b"OK")


class StreamsStats(StreamsCase):
    def test_feeds(self):
        """They end with what they look at. Usage is the group's: the shell in front is small, what
        it runs is not."""
        command = "%s -I -S -c 'x = bytearray(40 << 20); input()'; true" % PYTHON
        pid, wires = self.cat("web", {"cmd": "sh", "args": ["-c", command]}), []
        until(lambda: self.server.ok("GET", "/status/web?usage=true")["processes"][0]["rss"]
              > 40 << 20, "the memory of the group")
        table, owned, loop = self.server.manager.table, [], self.server.manager.loop
        sample, table.sample = table.sample, lambda pid: owned.append(loop.owned()) or sample(pid)
        for path, check in (("/stats", lambda value: value[0]["stats"][0]),
                            ("/stats/web", lambda value: value["stats"][0]),
                            ("/stats/web/%d" % pid, lambda value: value)):
            wires.append(self.wire(path + "?feed=continuous&interval=0.1"))
            kind, data, _ = self.wire(path + "?feed=eventsource&interval=0.1").event()
            self.assertEqual(kind, "stat")
            value = self.server.ok("GET", path + "?feed=longpoll&interval=0.1")
            chunks = [json.loads(wires[-1].chunk()) for _ in range(2)]
            self.assertEqual([check(each)["id"] for each in (json.loads(data), value, *chunks)],
                             [pid] * 4)
        self.server.ok("DELETE", "/processes/web")
        for wire in wires[1:]:
            self.assertTrue(wire.chunks()[1])
        self.cat("web")
        self.assertTrue(self.wire("/stats/web?feed=eventsource&interval=0.1").event())
        self.assertNotIn(True, owned)
        self.server.manager.stop()
        self.assertTrue(wires[0].chunks()[1])


class StreamsLoss(StreamsCase):
    """The window is much smaller than the output, which comes as fast as it can."""

    options = {"window": 65536}

    def by_events(self, wire):
        parts, dropped, place = [], 0, 0
        for kind, text, where in iter(wire.event, None):
            lost = json.loads(text)["bytes"] if kind == "dropped" else 0
            parts += [text.encode() + b"\n"] if kind == "stdout" else []
            end = int(where.partition("@")[0].rstrip("x"))
            self.assertIn(end - place, (lost, 64, 0))
            dropped, place = dropped + lost, end
        self.assertEqual(kind, "exit")
        return b"".join(parts), dropped

    def by_websocket(self, websocket):
        """(bytes, the payload of the close frame)."""
        parts, (opcode, payload) = [], websocket.read()
        while opcode == 2:
            parts.append(payload)
            opcode, payload = websocket.read()
        return b"".join(parts), payload

    def test_what_is_dropped_to_the_byte(self):
        """Of readers that begin when most output has fallen out of the window."""
        count = 130000                          # more than all buffers of the system in between
        expected = b"".join(b"%063d\n" % number for number in range(count))
        pid = self.hose(count)
        cut, skip, events = self.continuous(pid), self.continuous(pid, "loss=skip"), self.sse(pid)
        target = "/wstreams/%d?type=binary&readonly=1" % pid
        sockets = [self.websocket(target + loss) for loss in ("", "&loss=skip")]
        self.send(pid, b"\n")
        self.end(pid)
        self.server.wait_event("exit")
        data, close = self.by_websocket(sockets[0])
        self.assertRegex(close, b"^\x03\xf5dropped [1-9][0-9]*$")
        self.assertTrue(expected.startswith(data))
        data, dropped, offset, wire, status = b"", 0, "0", self.wire(), 200
        while status == 200:                    # a loop of long polls, until the end
            wire.request("/streams/%d/stdout?since=%s" % (pid, offset))
            status, headers, body = wire.answer()
            data, offset = data + body, headers["Gaffer-Offset"]
            dropped += int(headers.get("Gaffer-Dropped", 0))
        self.assertTrue(dropped and data == expected[dropped:])
        data, whole = skip.chunks()
        dropped = int(skip.trailers["Gaffer-Dropped"])
        self.assertEqual((skip.headers["Trailer"], whole), ("Gaffer-Dropped", True))
        found = [(data, dropped), self.by_events(events)]
        data, whole = cut.chunks()
        self.assertFalse(whole, "cut without its last chunk")
        self.assertTrue(expected.startswith(data))
        data, close = self.by_websocket(sockets[1])
        self.assertEqual(close, b"\x03\xe8exit 0")
        found.append((data, len(expected) - len(data)))
        for data, dropped in found:
            self.assertEqual((len(data) + dropped, dropped > 0), (len(expected), True))
            # whole lines in order, up to the last; the one in front of a gap may be cut
            numbers = [int(line[-63:]) for line in data.splitlines()]
            self.assertEqual((numbers, numbers[-1]), (sorted(set(numbers)), count - 1))


# --------------------------------------------------------------------------------------------------
# a real browser
# --------------------------------------------------------------------------------------------------


class BrowserPageCase(BrowserCase):
    """How a user goes about the web page."""

    options = {"window": 8 * gaffer.MIB}
    KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "End": "\ue010", "ArrowUp": "\ue013",
            "ArrowDown": "\ue015"}
    FIND = ("const $ = text => document.querySelector(text),"
            " $$ = text => [...document.querySelectorAll(text)]; ")
    TEXTS = "$$('.l').map(node => node.textContent)"
    LINES = TEXTS + ".map(text => text.slice(11).trim())"
    LAST = LINES + ".slice(-1)[0]"
    HIDE = ("Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))")
    ROWS = "$$('.item').filter(node => !node.hidden).map(node => node.dataset.name.trim())"

    def setUp(self):
        super().setUp()
        self.browser.size(1280, 800)

    def open(self, path="/"):
        """Load the page anew at an address of its own."""
        self.browser.get("about:blank")
        self.browser.get(self.server.url + "/#" + path)

    def script(self, js, *args):
        """Run the body of a function, with $ and $$ to find one element, or all."""
        return self.browser.script(self.FIND + js, *args)

    def wait(self, js, *args):
        """Wait until an expression is true. Returns it."""
        return self.browser.wait("%sreturn %s" % (self.FIND, js), *args)

    def becomes(self, js, value):
        self.browser.wait("%sconst text = JSON.stringify(%s);"
                          "if (text === arguments[0]) return true; throw text" % (self.FIND, js),
                          json.dumps(value, separators=(",", ":"), ensure_ascii=False))

    def go(self, path):
        self.script("if (location.hash === '#' + arguments[0]) return;"
                    "location.hash = arguments[0]; return new Promise(resolve => addEventListener("
                    " 'hashchange', () => setTimeout(resolve), {once: true}))", path)

    def at(self, path):
        self.becomes("location.hash", "#" + path)

    def press(self, *labels):
        """Click buttons by their accessible names; they show where the focus is."""
        for label in labels:
            selector = '[aria-label="%s"]' % label
            self.wait("$(arguments[0])", selector)
            self.script("($(arguments[0]).closest('.item') || document.body).focus()", selector)
            self.browser.click(selector)

    def choose(self, menu, text, answer=None, yes=True):
        """Click an entry of a menu. `answer`: to the question that is then asked; returns that."""
        self.press("more for " + menu)
        node = self.script("return $$('#menu button').find("
                           "node => node.textContent === arguments[0])", text)
        self.browser.do("POST", "element/%s/click" % node[self.browser.ELEMENT])
        if not text.endswith("…"):
            return None
        question = self.browser.do("GET", "alert/text")
        if answer is not None:
            self.browser.do("POST", "alert/text", {"text": answer})
        self.browser.do("POST", "alert/" + ("accept" if yes else "dismiss"))
        return question

    def shows(self, text, selector="main"):
        """Wait until an element has a text in it."""
        self.wait("$(arguments[0]).textContent.includes(arguments[1])", selector, text)

    def row(self, name, *texts):
        """Wait until the row of a template has these texts in it."""
        for text in texts:
            self.shows(text, '[data-name="%s"]' % name)

    def enter(self, selector, text):
        """Put a text into a field, as a user who types does."""
        self.wait("$(arguments[0])", selector)
        self.script("const node = $(arguments[0]); node.value = arguments[1];"
                    "node.dispatchEvent(new Event('input', {bubbles: true}))", selector, text)

    def say(self, text):
        """Type a line to stdin, once the page knows to which process."""
        field = ".entry input:enabled"
        self.wait("$(arguments[0]) && $(arguments[0]).checkVisibility()", field)
        self.browser.click(field)
        self.enter(field, text)
        self.keys("Enter")

    def keys(self, *names):
        """Press keys, one after the other, wherever the focus is."""
        for name in names:
            key = self.KEYS.get(name, name)
            self.browser.do("POST", "actions", {"actions": [
                {"type": "key", "id": "keyboard", "actions": [
                    {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})

    def scroll(self, line):
        """Scroll the output to a line, from the end if negative, before the page draws again."""
        self.script("const area = $('.lines'), line = arguments[0];"
                    "area.scrollTop = 18 * line + (line < 0 ? area.scrollHeight : 0);"
                    "area.dispatchEvent(new Event('scroll'))", line)

    def streams(self, count):
        until(lambda: streams_open(self.server, "eventsource") == count, "%d streams" % count)


class BrowserPage(BrowserPageCase):
    """The web page, as its users have it: every view, every button, by mouse and by keyboard."""

    # the overview

    def test_overview(self):
        """What needs a person stands first, then the groups; they fold, sort, are filtered."""
        flapping = {"attempts": 2, "window": 5, "retry_in": 60, "max_retry": 5}
        for name, command, more in (
                ("web:good", "sleep 1000", {"numprocesses": 2}), ("alone", "sleep 1000", {}),
                ("web:bad", "sh -c 'exit 3'", {}), ("job:off", "sleep 1000", {"start": False}),
                ("job:worse", "sh -c 'kill -9 $$$$'", {"flapping": flapping})):
            self.server.add(name, command, **more)
        self.open()
        self.row("web:bad", "backoff", "exited 3")
        self.row("job:worse", "killed by SIGKILL, 2 times")
        self.row("web:good", "2 / 2")
        self.becomes(self.ROWS, ["Needs attention", "job:worse", "web:bad", "No group", "alone",
                                 "web", "web:good", "job", "job:off"])
        self.shows("1 backoff · 1 running", '.group[data-name^="web"]')
        self.becomes("document.title", "2 failing – gaffer")
        for folded in True, False:
            self.press("fold web")
            self.becomes(self.ROWS + ".includes('web:good')", not folded)
        for sort, first in (("name", "alone"), ("-name", "web:good"), (None, "Needs attention")):
            self.press("sort by name")
            self.becomes(self.ROWS + "[0]", first)
            self.at("/?sort=" + sort if sort else "/")
        self.open("/?sort=processes")
        self.becomes(self.ROWS + "[0]", "web:good")
        self.becomes("$('.count').ariaSort", "descending")
        self.enter("main input[type=search]", "sigkill")
        self.becomes(self.ROWS, ["job:worse"])
        self.at("/?sort=processes&q=sigkill")

    def test_what_is_not_running_yet(self):
        """One that was just restarted, one that waits for another, one with a schedule."""
        self.server.add("weak", "sh -c 'sleep 0.1; exit 3'", restart_delay=0.01)
        self.server.add("db", "sleep 1000", ready={"log": "never", "within": 1000})
        self.server.add("app", "sleep 1000", after=["db"])
        self.server.add("nightly", "true", schedule="0 3 * * *")
        self.server.wait_event("proc/weak/exit")
        self.open()
        for name, text in (("weak", "restarting"), ("db", "starting not ready yet"),
                           ("app", "waiting for db"), ("nightly", "scheduled next run in ")):
            self.row(name, text)
        self.go("/p/nightly")
        self.becomes("$$('dd').filter(node => / 03:00:00$/.test(node.textContent)).length", 5)

    def test_actions(self):
        """Of a row, of a group, of what is selected."""
        self.server.add("web:a", "sleep 1000", numprocesses=2)
        self.server.add("web:b", "sleep 1000")
        self.server.add("off", "sleep 1000", start=False)
        self.open()
        self.row("off", "stopped")
        self.choose("web:a", "scale…", "-1")
        self.shows("from 0 to 1000", "#message")
        self.becomes("$('[aria-label=\"start off\"]').checkVisibility()", False)
        self.press("start off")
        self.row("off", "running")
        self.press("stop off")
        self.row("off", "SIGTERM")
        self.press("restart web:a")
        self.server.wait_event("proc/web:a/restart")
        self.assertIn("Processes of web:a", self.choose("web:a", "scale…", "4"))
        self.row("web:a", "4 / 4")
        self.choose("web:a", "signal…", "KILL")
        self.row("web:a", "SIGKILL")
        self.choose("web:a", "signal…", "NONSENSE group")
        self.shows("'NONSENSE' is not a signal", "#message")
        self.press("dismiss", "stop group web")
        self.row("web:b", "stopped")
        self.press("start group web")
        self.row("web:b", "running")
        self.press("select web:b", "select off")
        self.shows("2 selected")
        self.press("stop what is selected")
        self.row("web:b", "stopped")
        self.assertTrue(self.server.ok("GET", "/status/web:a")["active"])
        self.assertIn("Delete web:a?", self.choose("web:a", "delete…", yes=False))
        self.assertIn("web:a", self.server.ok("GET", "/processes"))
        self.choose("web:a", "delete…")
        self.wait("!$('[data-name=\"web:a\"]')")
        self.choose("what is selected", "delete…")
        self.shows("Nothing runs here yet")

    def test_an_empty_server(self):
        """It shows how to begin."""
        self.open()
        self.shows("add_process --start --endpoint 127.0.0.1:%d" % self.server.port, "pre")
        words = shlex.split(self.script("return $('pre').textContent"))
        self.assertEqual(words[:2], ["python3", "gaffer.py"])
        self.assertEqual(CliCase.called(self, *words[2:])[::2], (0, ""))
        self.row("clock", "running")
        self.server.ok("DELETE", "/processes/clock")
        self.wait("$('pre').checkVisibility()")
        self.press("add a template")
        self.becomes("document.activeElement.id", "field-name")

    def test_usage_has_a_history(self):
        pid, = self.server.add("busy", python("while True: pass"))
        api = self.server.http._api
        history = gaffer.History(self.server.manager, api.samples)
        with mock.patch.object(gaffer.History, "INTERVAL", 0.05), mock.patch.object(
                api, "_history", history):
            self.open()
            self.row("busy", "%")
            process = self.server.manager.find_process(pid)
            until(lambda: len(process.history) > 3, "a history")
        self.open()
        self.wait("$('.cpu .past') && $('.cpu .past').style.clipPath.split(',').length > 4")

    # forms

    def test_form(self):
        """A template is added, refused and edited; each field of the server's table comes back."""
        self.server.add("taken", "cat")
        self.open("/add")
        self.browser.click("form button.main")
        for field, text, fault in (
                ("name", None, "is required"), ("cmd", None, "is required"),
                ("name", "taken", "taken"), ("name", "new:one", ""),
                ("cmd", "no-such-program", "not found in PATH"), ("cwd", "/no/such", "not there")):
            if text:
                self.enter("#field-" + field, text)
            self.shows(fault, "#field-%s-fault" % field)
        for field, text in (("cmd", "cat"), ("cwd", ""), ("numprocesses", "2"),
                            ("env", "A=1\nB=x y"), ("flapping", "attempts=3\nwindow=2")):
            self.enter("#field-" + field, text)
        self.script("$('#field-redirect_input').click()")
        self.shows("Adds it, and starts 2 processes.", ".plan")
        self.assertEqual(self.server.ok("GET", "/processes"), ["taken"], "nothing was done")
        self.browser.click("form button.main")
        self.at("/p/new%3Aone")
        info = self.server.ok("GET", "/processes/new:one")
        self.assertEqual((info["cmd"], info["numprocesses"], info["redirect_input"], info["env"],
                          info["flapping"]["attempts"]),
                         ("cat", 2, True, {"A": "1", "B": "x y"}, 3))
        self.server.ok("POST", "/processes", {
            "name": "whole", "cmd": "sh", "args": ["-c", "echo up; exec cat\n", "it's"],
            "env": {"A": "1\n2"}, "os_env": False, "shell": False, "numprocesses": 2,
            "restart": "on-failure", "success": [0, "TERM"], "restart_delay": [1, 5],
            "priority": 3, "redirect_output": ["out"], "redirect_input": True,
            "flapping": {"attempts": 3, "window": 1.5, "retry_in": 2, "max_retry": 0},
            "custom_streams": ["a", "b"], "graceful_timeout": 1.5, "umask": "022", "nice": 5,
            "stop_signal": [["INT", 5], ["TERM", 5]], "stop_group": False, "after": ["new:one"],
            "limits": {"core": 0, "nofile": [100, 200]}, "before_start": "true\nexit 0",
            "ready": {"log": "up", "within": 1000}})
        before = self.server.ok("GET", "/processes/whole")
        self.go("/")
        self.row("whole", "2 / 2")
        self.go("/edit/whole")
        self.becomes("[$('#field-cmd').value, $('#field-env').value]", ["sh", '{"A":"1\\n2"}'])
        self.assertEqual(set(self.script("return $$('form [name]').map(node => node.name)")),
                         set(gaffer.OPTIONS) - {"start"})
        self.becomes("$$('details:not([open])').length", 0)     # each has what was set
        for field, text, plan in (
                ("priority", "4", "Changes priority; runs 2 processes, restarts none."),
                ("numprocesses", "3", "Changes numprocesses, priority; runs 3 processes,"),
                ("cmd", "/bin/sh", "Changes cmd, numprocesses, priority; stops 2 processes; "
                                   "starts 3 processes.")):
            self.enter("#field-" + field, text)
            self.shows(plan, ".plan")
        self.server.ok("PUT", "/processes/whole", dict(before, umask="077"))    # in another tab
        self.browser.click("form button.main")
        self.at("/p/whole")
        self.assertEqual(self.server.ok("GET", "/processes/whole"),
                         dict(before, priority=4, numprocesses=3, cmd="/bin/sh", umask="077"))
        self.go("/edit/gone")
        self.shows("no process named 'gone'", "#message")

    # output

    def test_output(self):
        """Text with its colours; a progress bar is one line; the next process follows."""
        pid, = self.server.add("talk", python("""
            import sys
            print("<script>document.title = 'owned'</script><b>bold</b>")
            print("\\x1b[31mred\\x1b[0m \\x1b[1;38;5;208morange\\x1b[m \\x1b[30;48;2;1;2;3mdeep"
                  "\\x1b[0m \\x1b[?25l\\x1b]0;title\\x07plain \\x1b[7mturned\\x1b[0m")
            for part in range(101):
                print("\\rleading %d%%" % part, end="", flush=True)
            print()
            for part in range(101):
                print("trailing %d%%" % part, end="\\r", flush=True)
                if part == 50:
                    print("to stderr", file=sys.stderr, flush=True)
            print("done    ", end="\\r\\n")
            print("half a line, ", end="", flush=True)
            input()
            print("and the rest")
            sys.exit(3)
            """), redirect_input=True)
        self.open("/p/talk")
        self.becomes("$$('.l:not(.stderr)').map(node => node.textContent.slice(11).trim())", [
            "<script>document.title = 'owned'</script><b>bold</b>", "red orange deep plain turned",
            "leading 100%", "done", "half a line,"])
        self.becomes("[document.title, $$('.l script, .l b').length]", ["talk – gaffer", 0])
        self.becomes("['red', 'deep', 'turned'].map(text => $$('.l span').find("
                     "node => node.textContent === text).style).map(each => [each.color,"
                     " each.background])", [["var(--bad)", ""], ["rgb(0, 0, 0)", "rgb(1, 2, 3)"],
                                            ["var(--bg)", "var(--text)"]])
        self.becomes("$$('.l.stderr').map(node => node.textContent.slice(7))", ["err to stderr"])
        self.say("go on")
        self.shows("half a line, and the rest")
        self.shows("process %d exited 3" % pid)
        self.becomes(self.LINES + ".filter(text => text.includes('owned')).length", 2)

    def test_all_colours_can_be_read(self):
        """AA of WCAG 2.2 for the 256 colours, as the browser paints them, and as a ground."""
        codes = ["%d;5;%d" % (base, number) for base in (38, 48) for number in range(256)]
        self.server.add("paint", python(
            "for code in %r: print('\\x1b[%%smx' %% code)\nimport time; time.sleep(1000)" % codes))
        measure = """
            const pen = document.createElement('canvas').getContext('2d');
            const light = colour => {
                pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(part =>
                    part <= 10 ? part / 3294.6 : ((part / 255 + .055) / 1.055) ** 2.4);
                return .2126 * r + .7152 * g + .0722 * b + .05; };
            return $$('.l > span:last-child').flatMap(node =>
                (node.style.background ? [node] : [$('body'), $('#away')]).map(ground => {
                    const a = light(getComputedStyle(node).color);
                    const b = light(getComputedStyle(ground).backgroundColor);
                    return [Math.max(a / b, b / a), node.textContent]; }));"""
        self.addCleanup(self.browser.cdp, "Emulation.setEmulatedMedia", features=[])
        self.browser.size(800, 18 * (len(codes) + 20))
        self.open("/p/paint")
        self.becomes(self.LINES + ".length", len(codes))
        for scheme in "light", "dark":
            self.browser.cdp("Emulation.setEmulatedMedia", features=[
                {"name": "prefers-color-scheme", "value": scheme}])
            found = self.script(measure)
            self.assertGreater(len(found), len(codes))
            self.assertEqual([entry for entry in found if entry[0] < 4.5], [], scheme)

    def test_tools(self):
        """Find, only what matches, times, wrap, stderr, a line's address, the failure before."""
        self.server.add("count", python("""
            import sys
            for number in range(300): print("line", number)
            for line in iter(input, "end"): print(line)
            sys.exit(7)
            """), redirect_input=True, restart="never")
        self.open("/p/count")
        self.shows("line 299", ".lines")
        find = '[aria-label^="Find"]'
        self.enter(find, "LINE 299")                # capitals are meant
        self.shows("0 of 300 lines", "section .bar")
        self.enter(find, "line 29")
        self.becomes("$$('.here mark').map(node => node.textContent)", ["line 29"])
        self.assertEqual(self.script(               # through colours; nothing is no match
            "const node = el('p'), parts = segments('ab\\x1b[1mbc\\x1b[0mca b'); "
            "paintLine(node, parts, /bbc+a| |x*/); "
            "return [...node.querySelectorAll('mark')].map(each => each.textContent)"),
            ["b", "bc", "ca", " "])
        self.shows("11 of 300 lines", "section .bar")
        self.press("previous match", "next match", "next match")
        self.becomes("$('.here') && $('.here').textContent.slice(11)", "line 29")
        self.enter(find, "77$")
        self.press("only what matches")         # so few that all fit: it follows again
        self.becomes(self.LINES, ["line 77", "line 177", "line 277"])
        self.at("/p/count?find=77%24&only=1")
        self.enter(find, "(")
        self.becomes("$('%s').ariaInvalid" % find, "true")
        self.enter(find, "")
        self.press("only what matches")
        self.becomes(self.LAST, "line 299")
        self.scroll(0)
        self.becomes(self.LINES + "[0]", "line 0")
        self.say("unseen")
        self.shows("2 new lines", ".more")
        self.assertNotIn("unseen", self.script("return " + self.LAST))
        self.browser.click(".more")
        self.becomes(self.LINES + ".slice(-2)", ["> unseen", "unseen"])
        self.press("times")
        self.wait(self.TEXTS + ".every(text => /^\\d\\d:\\d\\d:\\d\\d\\.\\d{3} /.test(text))")
        self.say("\u6f22" * 1000)                   # two columns each
        self.press("wrap")
        bottom = "$('%s').getBoundingClientRect().bottom"
        last = ".l:last-child:not(.stdin)"
        self.wait("$('%s') && $('%s').clientHeight > 100 && %s < %s" % (
            last, last, bottom % last, bottom % ".lines"))
        self.press("only stderr")
        self.wait(self.TEXTS + ".every(text => !/ line/.test(text))")
        self.at("/p/count?time=1&wrap=1&err=1")
        self.open("/p/count")
        self.becomes(self.LAST, "\u6f22" * 1000)
        self.enter(find, "\u6f22$")
        self.wait("$('.lines').scrollLeft > 1000")
        self.enter(find, "")
        self.scroll(0)
        self.becomes(self.LINES + "[0]", "line 0")
        self.script("$('.l .k').click()")
        self.shows("line 0", ".here")
        address = self.wait("location.hash.includes('?') && location.hash")
        self.assertRegex(address, "^#/p/count\\?line=[0-9]+%40[0-9a-z]+$")
        self.open(address[1:])
        self.shows("line 0", ".here")
        for wrong in ("3@nothing", "3@" + self.server.manager.epoch):
            self.open("/p/count?line=" + wrong)
            self.shows("That line is no longer kept.", "#message")
        self.say("end")
        self.shows("exited 7", ".lines")
        self.scroll(0)
        self.press("previous failure")
        self.shows("exited 7", ".here")
        self.becomes("$('a[download]').href",
                     self.server.url + "/streams/count?tail=all&timeout=0")

    def test_a_hundred_thousand_lines(self):
        """They are all there, a hundred of them in the document."""
        self.server.add("many", python("""
            import sys
            print("begin")
            input()
            sys.stdout.write("".join("line %d\\n" % number for number in range(105500)))
            input()
            """), redirect_input=True)
        self.open("/p/many")
        self.shows("begin", ".lines")
        self.server.ok("POST", "/streams/many/stdin", b"\n")
        self.becomes(self.LAST, "line 105499")
        self.assertLess(self.script("return $$('*').length"), 500)
        height = self.script("return $('.lines').scrollHeight / 18")
        self.assertTrue(99000 <= height <= 105000, height)
        self.scroll(50000)
        self.wait(self.LINES + ".filter(text => /^line [456]\\d{4}$/.test(text)).length > 20")
        self.enter('[aria-label^="Find"]', "line 77777")
        self.shows("line 77777", ".here")
        self.assertEqual(self.browser.console(), [])

    def test_input(self):
        """It stands where it was sent."""
        pid, = self.server.add("echo", "cat", redirect_input=True)
        self.server.add("deaf", "sleep 1000")
        self.open("/p/echo")
        self.say("first")
        self.becomes(self.LINES, ["> first", "first"])
        self.say("second <b>")
        self.becomes(self.LINES, ["> first", "first", "> second <b>", "second <b>"])
        self.becomes("$$('datalist option').map(node => node.value)", ["second <b>", "first"])
        self.press("close its stdin")
        self.shows("process %d exited 0" % pid, ".lines")
        self.go("/p/deaf")
        self.wait("$('dd')")
        self.becomes("$('.entry').hidden", True)

    def test_story(self):
        """A template with its processes and what happened to them."""
        code = "import os\nprint('I am', os.getpid())\ninput()"
        self.server.add("trio", python(code), numprocesses=3, redirect_input=True, cwd="/tmp")
        self.open("/p/trio")
        self.shows("trio.1", "details")
        self.shows("OS pid %d" % self.server.ok("GET", "/processes/2")["os_pid"], "details")
        self.shows("/tmp", ".facts")
        self.shows("process 3", ".entry")
        self.script("$('.entry select').value = '3'")
        self.choose("process 2", "signal…", "KILL")
        self.shows("process 2 killed by SIGKILL after", ".story")
        self.shows("started process 4, as process 2 killed by SIGKILL", ".story")
        self.shows("process 4", ".entry")
        self.becomes("$('.entry select').value", "3")       # what was chosen
        self.choose("process 1", "stop (it is replaced)")
        self.shows("started process 5 in place of process 1", ".story")
        self.shows("process 2 killed by SIGKILL", ".lines")
        self.go("/logs")
        self.shows("trio 5", ".lines")

    def test_after_a_cut(self):
        """It goes on without gap or repeat, both where it is in time and where it is behind."""
        self.server.add("count", python("""
            import time
            input()
            for first in range(0, 10000, 100):
                print("\\n".join("line %d" % n for n in range(first, first + 100)), flush=True)
                time.sleep(0.01)
            print("end")
            input()
            """), redirect_input=True)
        self.open("/p/count")
        self.streams(1)
        self.server.ok("POST", "/streams/count/stdin", b"\n")
        numbers = self.LINES + ".map(text => parseInt(text.slice(5)))"
        for number in (500, 2500, 5000, 9000):
            self.wait(numbers + ".some(number => number > arguments[0])", number)
            self.server.manager.loop.call(lambda: [
                channel.close() for channel in tuple(self.server.http.channels)
                if channel.kind == "eventsource"])
        self.becomes(self.LAST, "end")
        self.becomes("$('.lines').scrollHeight / 18", 10001)
        for top in (0, 500, 2500, 5000, 9000):      # where it was cut
            self.scroll(top)
            found = self.wait("%s.includes(arguments[0]) && %s" % (numbers, numbers), top)
            self.assertEqual(found, list(range(found[0], found[0] + len(found))))

    def test_while_the_server_is_away(self):
        """It says so, and goes on when there is one again, whose pids are others'."""
        def start(word, port=0):
            server = Running(endpoints=[gaffer.HttpEndpoint("127.0.0.1:%d" % port)])
            self.addCleanup(server.stop_all)
            server.add("talk", "sh -c 'echo %s; printf half; exec sleep 1000'" % word)
            return server
        first = start("first")
        self.browser.get(first.url + "/#/p/talk")
        self.shows("half", ".lines")
        first.stop_all()
        self.shows("The server has not answered since", "#away")
        self.shows("away", "#link")
        self.wait("getComputedStyle($('main')).opacity < 1")
        self.browser.console()                      # that nobody answers is in it
        second = start("second", first.port)
        self.shows("live", "#link")
        self.becomes("$('#away').textContent", "")
        lines, anew = self.LINES + ".filter(text => !text.includes('killed'))", (
            "the server has restarted")
        self.becomes(lines, ["first", "half", anew, "second", "half"])
        self.script(self.HIDE % "true")             # it does not see how the processes end
        second.stop_all()
        third = start("third", first.port)
        self.script(self.HIDE % "false")
        self.becomes(lines, ["first", "half", anew, "second", "half", anew, "third", "half"])
        self.go("/")
        self.row("talk", "running")
        self.go("/events")
        third.add("more", "true", start=False)
        self.shows("more", ".events")               # its stream has begun
        third.manager.stop()                        # a kill would not wait for what is unsent
        third._thread.join(TIMEOUT)
        self.shows("told to stop: process 1", ".events")
        fourth = start("fourth", first.port)
        fourth.ok("POST", "/processes/1/_signal/KILL")
        self.wait("/SIGKILL after [^,]*, by itself/.test($('.events').textContent)")

    # how it is used

    def test_every_view(self):
        """It fits a phone, too; it has one heading of the first level; and what can be used has a
        name in the tree that a screen reader gets."""
        used = {"button", "checkbox", "textbox", "searchbox", "combobox", "ComboBoxMenuSelect",
                "spinbutton", "link", "log", "table"}
        self.server.add("web:a", "sh -c 'echo out of luck >&2; exec cat'", redirect_input=True,
                        numprocesses=2)
        self.open("/logs")
        for width, height in (1280, 800), (390, 844):
            self.browser.size(width, height, mobile=width == 390)
            for path in "/", "/p/web%3Aa", "/logs", "/events", "/add", "/edit/web%3Aa":
                self.go(path)
                self.wait("$('main').textContent.length > 20")
                names = [node["name"]["value"]
                         for node in self.browser.cdp("Accessibility.getFullAXTree")["nodes"]
                         if not node["ignored"] and node["role"]["value"] in used]
                self.assertTrue(all(names) and len(names) > 5, (path, names))
                self.becomes("[$$('h1').length, document.documentElement.scrollWidth,"
                             " $('main').scrollWidth <= innerWidth]", [1, width, True])
        self.go("/")
        self.choose("web:a", "stop")
        self.row("web:a", "stopped")

    def test_keyboard(self):
        for name in ("one", "two"):
            self.server.add(name, "cat", redirect_input=True)
        focus = "document.activeElement.closest('[data-name]').dataset.name"
        self.open()
        self.row("two", "running")
        self.keys("t", "?")                         # no row has the focus: nothing is stopped
        self.shows("next, previous row", "#menu")
        self.keys("Escape")
        self.becomes("$('#menu').matches(':popover-open')", False)
        self.keys("j", "?")
        self.shows("stop one", "#menu")
        self.keys("Escape", "j")
        self.becomes(focus, "two")
        for key, state in ("t", "stopped"), ("s", "running"):
            self.keys(key)
            self.row("two", state)
        self.keys("r")
        self.server.wait_event("proc/two/restart")
        self.keys("x")
        self.shows("1 selected")
        self.keys("m", "ArrowDown", "ArrowDown", "ArrowUp")
        self.becomes("document.activeElement.textContent", "stop")
        self.keys("Escape")
        self.becomes(focus, "two")
        self.keys("k")
        self.becomes(focus, "one")
        self.keys("Enter")
        self.at("/p/one")
        self.wait("$('.entry input:enabled') && $('.entry input').checkVisibility()")
        self.keys("i", "h", "Enter")
        self.becomes(self.LINES, ["> h", "h"])
        self.keys("Escape", "f", "h", "Escape", "w", "T", "n", "End", "z")
        self.at("/p/one?find=h&wrap=1&time=1")
        self.keys("n", "l")
        self.wait("/line=\\d+%40\\w+$/.test(location.hash)")
        self.keys("e")
        self.shows("added", ".events")
        self.keys("Escape", "o")
        self.at("/logs")
        self.keys("Escape", "a")
        self.becomes("document.activeElement.id", "field-name")
        self.keys("x", "Escape", "Escape", "o", "?")    # no key leaves a form that was begun
        self.becomes("[location.hash, $('#field-name').value]", ["#/add", "x"])

    def test_links_and_the_way_back(self):
        self.server.add("web:a", "sleep 1000")
        self.open("/?q=web")
        self.wait("$('main .template a')")
        self.browser.click("main .template a")
        self.at("/p/web%3Aa")
        self.becomes("document.title", "web:a – gaffer")
        self.script("history.back()")
        self.at("/?q=web")
        self.becomes("$('main input[type=search]').value", "web")
        self.server.ok("POST", "/processes/web:a/_stop")
        self.open("/events?q=web")
        for text in "as it was told to", "killed by SIGTERM after":
            self.shows(text, ".events")
        for path, text in (("/p/%", "there is no such template"), ("/constructor", "no such page")):
            self.go(path)
            self.shows(text)
        self.becomes("$('#message').textContent", "")

    def test_one_stream_a_window(self):
        """And none when it is hidden; a template that goes and comes again is followed again."""
        self.server.add("talk", "sh -c 'echo hello; exec sleep 1000'")
        self.open("/p/talk")
        self.shows("hello", ".lines")
        for path in ("/", "/p/talk", "/logs", "/events", "/add", "/p/talk"):
            self.go(path)
            self.streams(1)
        self.shows("hello", ".lines")
        self.script(self.HIDE % "true")              # another tab comes to the front
        self.streams(0)
        self.server.ok("POST", "/processes/talk/_restart?wait=true")
        self.script(self.HIDE % "false")
        self.becomes(self.LINES + ".filter(text => text.endsWith('hello')).length", 2)
        self.streams(1)
        self.server.ok("DELETE", "/processes/talk")
        self.shows("there is no such template")
        self.streams(0)
        self.server.add("talk", "sh -c 'echo second; exec sleep 1000'")
        self.shows("second", ".lines")
        self.shows("running")

    def test_behind_the_prefix_of_a_proxy(self):
        """All that the page asks is relative to where it was loaded."""
        def proxy(environ, start_response):
            client = http.client.HTTPConnection("127.0.0.1", inner.port)
            with contextlib.closing(client):
                try:
                    client.request(environ["REQUEST_METHOD"], "%s?%s" % (
                        environ["PATH_INFO"], environ["QUERY_STRING"]), headers={
                            "Accept": environ["HTTP_ACCEPT"]})
                    answer = client.getresponse()
                except ConnectionError:                 # the server has gone, maybe just now
                    start_response("502 Bad Gateway", [])
                    return
                start_response("%d %s" % (answer.status, answer.reason), [
                    ("Content-Type", answer.headers.get("Content-Type", "text/plain"))])
                yield from iter(lambda: answer.read1(65536), b"")
        outer, inner = Running(wsgi={"/gaffer": proxy}), Running()
        for cleanup in (outer.stop_all, inner.stop_all, lambda: self.browser.get("about:blank")):
            self.addCleanup(cleanup)
        inner.add("talk", "sh -c 'echo hello; exec sleep 1000'")
        self.browser.get(outer.url + "/gaffer/#/p/talk")
        self.shows("hello", ".lines")
        self.press("stop talk")
        self.shows("stopped")
        inner.stop_all()
        self.shows("has not answered", "#away")
        self.press("start talk")
        self.shows("does not answer", "#message")


class BrowserFirefox(BrowserPageCase):
    """The same in Firefox: what browsers do each in its own way."""

    share, kind = "firefox", Firefox
    for _name in "overview", "form", "output", "tools", "after_a_cut", "keyboard":
        locals()["test_" + _name] = vars(BrowserPage)["test_" + _name]


@unittest.skipUnless("--pictures" in sys.argv, "only with --pictures")
class BrowserPictures(BrowserPageCase):
    """Pictures of the page, to be looked at: one a view, in the directory of --pictures."""

    directory, patience = None, 10 * TIMEOUT

    def take(self, name, path=None, when="true", width=1280):
        """Write a picture of a view, or of what is there, once `when` is true."""
        self.browser.size(width, 850, mobile=width < 500)
        if path:
            self.open(path)
        self.wait(when)
        with open(os.path.join(self.directory, name + ".png"), "wb") as file:
            file.write(base64.b64decode(self.browser.do("GET", "screenshot")))

    def test_pictures(self):
        os.makedirs(self.directory, exist_ok=True)
        self.addCleanup(self.browser.cdp, "Emulation.setEmulatedMedia", features=[])
        with mock.patch.object(gaffer.History, "INTERVAL", 0.1):
            self.server.add("web:front", python("""
                import random, time
                while True:
                    end = time.time() + random.random() / 20
                    while time.time() < end: pass
                    time.sleep(0.1)
                """), numprocesses=4)
            self.server.add("web:worker", "sh -c 'echo no database >&2; sleep 0.2; exit 3'")
            self.server.add("jobs:nightly", "sleep 1000", start=False)
            self.server.add("jobs:import", "sh -c 'kill -9 $$$$'", flapping={"retry_in": 1000})
            self.open("/")
            process = self.server.manager.find_process(1)
            until(lambda: len(process.history) == 60, "a history")
        self.server.add("build", python("""
            import sys, time
            for n in range(256):
                print("\\x1b[38;5;%dm%03d\\x1b[0m" % (n, n), end=" \\n"[n % 32 == 31])
            for part in range(101):
                print("\\rdownloading [%-50s] %3d%%" % ("=" * (part // 2), part), end="")
            print("\\ndone", file=sys.stderr, flush=True)
            time.sleep(1000)
            """))
        usage, done = "$('.cpu').textContent", "$('.lines').textContent.includes('done')"
        for scheme in "dark", "light":
            self.browser.cdp("Emulation.setEmulatedMedia", features=[
                {"name": "prefers-color-scheme", "value": scheme}])
            for name, path, when, *widths in (
                    ("overview", "/", usage, 1280, 768, 390),
                    ("output", "/p/build", done, 1280, 390),
                    ("process", "/p/web%3Aworker", "$$('.story li').length > 9", 1280),
                    ("all-output", "/logs", "$('.l')", 1280), ("events", "/events", "true", 1280)):
                for width in widths:
                    self.take("%s-%s-%d" % (name, scheme, width), path, when, width)
            self.open("/add")
            for field, text in ("name", "web:front"), ("cwd", "/x"), ("uid", "nobodyx"):
                self.enter("#field-" + field, text)
            self.take("form-with-faults-" + scheme, when="$$('[aria-invalid=true]').length > 2")
        for number in range(300):
            self.server.manager.add_process("g%d:n-%d" % (number // 60, number), "sleep 1000")
        self.take("overview-300", "/", "$$('.template').length > 300")


@unittest.skipUnless("--figures" in sys.argv, "only with --figures")
class BrowserFigures(BrowserPageCase):
    """What the web page costs, measured and printed."""

    patience = 20 * TIMEOUT

    def print_lines(self, name, rate, total):
        """Let a new template print lines of 60 bytes."""
        self.server.add(name, python("""
            import sys, time
            began, done = time.monotonic(), 0
            while done < %d:
                due = min(%d, int((time.monotonic() - began) * %d))
                sys.stdout.write("".join("%%09d %%s\\n" %% (n, "x" * 49) for n in range(done, due)))
                done = due
                time.sleep(0.01)
            print("end")
            time.sleep(1000)
            """ % (total, total, rate)))

    def test_frames_while_5000_lines_a_second_arrive(self):
        self.open("/p/fast")
        self.print_lines("fast", 5000, 60000)
        self.wait(self.LINES + ".some(text => parseInt(text) >= 10)")
        frames = self.script("""
            const end = performance.now() + 10000;
            let frames = 0;
            return new Promise(resolve => requestAnimationFrame(function frame(now) {
              frames++;
              if (now < end) requestAnimationFrame(frame); else resolve(frames);
            }))""")
        print("%.1f frames a second while 5,000 lines a second arrive" % (frames / 10), flush=True)
        self.assertGreater(frames / 10, 20)
        self.becomes(self.LAST, "end")
        self.becomes("$('.dropped')", None)     # nothing was lost

    def test_memory_is_bounded(self):
        totals, used = (0, 200000, 800000), []
        self.open("/logs")
        self.streams(1)
        for number, total in enumerate(totals):
            self.print_lines("many%d" % number, 25000, total)
            last = "return %s.some(text => /many%d.* end$/.test(text))" % (self.TEXTS, number)
            until(lambda: self.script(last), "the end", 10 * TIMEOUT)
            self.browser.cdp("HeapProfiler.collectGarbage")
            found = []                          # KiB that the process of the tab has for itself
            for pid in process_group(self.browser.driver.pid):
                with contextlib.suppress(OSError):
                    if "--type=renderer" in cli_read("/proc/%d/cmdline" % pid):
                        text = cli_read("/proc/%d/smaps_rollup" % pid)
                        found.append(sum(map(int, re.findall(r"Private_\w+: *(\d+)", text))))
            used.append(max(found) / 1024)
            print("%.1f MiB more memory of the tab after %d lines" % (
                used[-1] - used[0], sum(totals[:number + 1])), flush=True)
        self.assertLess(used[2] - used[0], 150)
        self.assertLess(used[2] - used[0], 1.5 * (used[1] - used[0]))

    def test_three_hundred_processes(self):
        for number in range(300):
            self.server.manager.add_process("g%d:n-%d" % (number // 60, number), "sleep 1000")
        paints = []
        for _ in range(7):
            self.open()
            paints.append(self.wait(
                "(performance.getEntriesByName('first-contentful-paint')[0] || {}).startTime"))
        before, data = time.process_time(), self.server.request("GET", "/", headers={
            "Accept": "text/html"})[2]
        self.script("return new Promise(done => setTimeout(done, 20000))")
        print("300 processes: first paint %.0f ms, median of 7 loads; %.1f KiB; %.2f %% of "
              "a core while one page shows them" % (
                  statistics.median(paints), len(data) / 1024, 5 * (time.process_time() - before)),
              flush=True)


class BrowserMisuse(BrowserCase):
    """What a page of another site may try with a server here: it changes nothing, and learns
    nothing. Beside each attempt stands the same from a page that may."""

    SOCKET = """
        const socket = new WebSocket(arguments[0]);
        return new Promise(done => {
            socket.onopen = () => socket.send('typed\\n');
            socket.onmessage = event => { socket.close(); done(event.data); };
            socket.onclose = event => done(event.code); });"""
    PLANTED = {"method": "POST", "body": '{"name": "planted", "cmd": "true"}',
               "headers": {"Content-Type": "text/plain"}}
    OPAQUE, REFUSED = ["opaque", 0, ""], ["TypeError", 0, ""]

    def setUp(self):
        super().setUp()
        text = "<!doctype html><meta charset=utf-8><title>a page</title><body>"
        site = Running(allow_hosts=["evil.example"], handlers=[
            ("/page", lambda request: (200, {"Content-Type": "text/html"}, text))])
        self.addCleanup(site.stop_all)
        self.evil, self.friend = ("http://%s:%d/page" % (host, site.port)
                                  for host in ("evil.example", "localhost"))
        self.server.add("typed", "cat", redirect_input=True)
        self.server.add("talks", "sh -c 'echo secret; exec sleep 1000'")
        data = self.server.request("GET", "/streams/talks/stdout?since=0")[2]
        self.assertEqual(data, b"secret\n")

    def ask(self, path, *options):
        """[type, status, text] of a fetch."""
        return self.browser.script("""
            const [url, options] = arguments;
            return fetch(url, options).then(
                answer => answer.text().then(text => [answer.type, answer.status, text]),
                error => [error.name, 0, '']);""", self.server.url + path, *options)

    def submit(self, path):
        """Send a form: text/plain makes JSON of it."""
        self.browser.script("""
            document.body.innerHTML = '<iframe name=answer></iframe>' +
                '<form method=post enctype=text/plain target=answer><input>';
            const [frame, form] = document.body.children;
            [form.action, form.firstChild.name, form.firstChild.value] = arguments;
            return new Promise(done => { frame.onload = () => done('loaded'); form.submit(); });""",
            self.server.url + path, '{"name": "planted", "cmd": "true", "args": ["', '"]}')

    def count(self, method, status=403):
        """How many requests the server has answered so."""
        return self.server.http.answers[method, status]

    def assertUntouched(self):
        self.assertEqual(self.server.ok("GET", "/processes"), ["typed", "talks"])
        self.assertEqual(self.server.ok("GET", "/processes?running=1"), [1, 2])
        data = self.server.request("GET", "/streams/1/stdout?since=0&timeout=0")[2]
        self.assertEqual(data, b"")

    def test_forms(self):
        self.browser.get(self.evil)
        for path in "/processes", "/processes/typed/_add/3", "/streams/1/stdin":
            self.submit(path)
        self.browser.script("navigator.sendBeacon(arguments[0], 'typed')",
                            self.server.url + "/streams/1/stdin")
        until(lambda: self.count("POST") == 4, "the forms and the beacon")
        self.assertUntouched()
        self.browser.get(self.friend)
        self.submit("/processes")
        self.assertEqual(self.server.ok("GET", "/processes"), ["typed", "talks", "planted"])

    def test_requests(self):
        """With a preflight that is not answered as they wish, or without one."""
        self.browser.get(self.evil)
        for mode, answer in (("no-cors", self.OPAQUE), ("cors", self.REFUSED)):
            options = dict(self.PLANTED, mode=mode, credentials="include")
            self.assertEqual(self.ask("/processes", options), answer)
        attempts = ({"method": "PUT", "body": '{"cmd": "true"}',
                     "headers": {"Content-Type": "application/json"}}, {"method": "DELETE"})
        for options in attempts:
            self.assertEqual(self.ask("/processes/typed", options), self.REFUSED)
        self.assertEqual([self.count("POST"), self.count("OPTIONS", 204), self.count("PUT"),
                          self.count("DELETE")], [2, 2, 0, 0])
        self.assertUntouched()
        self.browser.get(self.friend)
        for path, options in (("", self.PLANTED), *(("/typed", each) for each in attempts)):
            self.assertEqual(self.ask("/processes" + path, options)[:2], ["cors", 200])
        self.assertEqual(self.server.ok("GET", "/processes"), ["talks", "planted"])

    def test_reading(self):
        """Nor is a process held by a page that does not read."""
        paths = ("/processes", "/streams/2/stdout?tail=all",
                 "/streams/2/stdout?feed=continuous&loss=block")
        sockets = ["ws%s/wstreams/%s" % (self.server.url[4:], path) for path in (
            "1", "2?tail=all&readonly=true")]
        self.browser.get(self.evil)
        for path in paths:
            self.assertEqual(self.ask(path), self.REFUSED)
            self.assertEqual(self.ask(path, {"mode": "no-cors"}), self.OPAQUE)
        self.assertEqual([self.browser.script(self.SOCKET, url) for url in sockets], [1006] * 2)
        self.assertUntouched()
        self.browser.get(self.friend)
        for path in paths[:-1]:
            self.assertEqual(self.ask(path)[:2], ["cors", 200])
        self.assertEqual([self.browser.script(self.SOCKET, url) for url in sockets],
                         ["typed\n", "secret\n"])


# --------------------------------------------------------------------------------------------------
# ring 4: the command line, the README, the structure of the file
# --------------------------------------------------------------------------------------------------
CLI_FILE = os.path.join(HERE, "gaffer.py")
CLI_SCRIPT = [PYTHON, "-W", "error", CLI_FILE]
CLI_IMPORT = "import sys; sys.path[0] = %r; import gaffer\n" % HERE
CLI_MAIN = "\nsys.exit(gaffer.main())"
CLI_COMMAND = [PYTHON, "-W", "error", "-S", "-c", CLI_IMPORT + CLI_MAIN]
CLI_LISTENING = re.compile(r"gaffer %s listening on (.*)\n\Z" % re.escape(gaffer.__version__))


def cli_read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def forked(function, *args):
    """Fork. Returns the pid of a process that calls a function and ends with what that returns."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = function(*args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class ForkServer:
    """Forks commands from a process that has gaffer imported: a start takes a twentieth of the time
    that the interpreter and the import do. It ends when all that could ask it have ended."""

    socket = None                       # takes JSON, the standard descriptors and a status pipe

    @classmethod
    def start(cls):
        """Fork the server. All that is forked from here on may ask it."""
        gaffer.make_parser("serve").format_help()       # imports what it needs
        gc.collect()
        gc.freeze()                     # or the collector would copy all pages in each process
        sock, cls.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cls.pid = forked(cls.serve, sock)
        sock.close()

    @classmethod
    def end(cls):
        """Wait for its end. Returns whether something went wrong."""
        cls.socket.close()
        return os.waitpid(cls.pid, 0)[1] != 0

    @classmethod
    def serve(cls, sock):
        """Answer each request with the command's pid and, when it has ended, its status, 4 bytes
        each, until there is nobody left to ask. What runs then Share finds in its group."""
        cls.socket.close()
        os.setpgid(0, 0)                # Ctrl-C is not for it
        pipes, (ended, write) = {}, os.pipe()   # {pid: where its status goes}
        os.set_blocking(write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write)
        while True:
            ready = select.select([sock, ended], [], [])[0]
            if ended in ready:
                os.read(ended, 4096)
                with contextlib.suppress(ChildProcessError):
                    for pid, status in iter(lambda: os.waitpid(-1, os.WNOHANG), (0, 0)):
                        with contextlib.suppress(BrokenPipeError):
                            os.write(pipes[pid], struct.pack("i", status))
                        os.close(pipes.pop(pid))
            if sock in ready:
                data, ancillary, _, _ = sock.recvmsg(1 << 18, socket.CMSG_SPACE(16))
                if not data:
                    return 0
                *streams, pipe = struct.unpack("4i", ancillary[0][2])
                pid = forked(cls.run, streams, *json.loads(data))
                pipes[pid] = pipe
                with contextlib.suppress(BrokenPipeError):
                    os.write(pipe, struct.pack("i", pid))
                for fd in streams:
                    os.close(fd)

    @staticmethod
    def run(streams, arguments, environment, folder, group):
        """Call main() and do what the interpreter does in the end. Returns main()'s status."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # as the first lines of gaffer.py do
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        os.closerange(3, 256)
        os.setpgid(0, group)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = ["gaffer.py", *arguments]
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = (
            open(0, closefd=False), open(1, "w", closefd=False),
            open(2, "w", 1, errors="backslashreplace", closefd=False))
        warnings.simplefilter("error")
        faulthandler.enable()
        status = gaffer.main() or 0
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        return status


class ForkedCommand(subprocess.Popen):
    """`gaffer.py ARGUMENTS`, forked by the ForkServer."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        pipes = more[3:9]               # of stdin, stdout and stderr: the ends to read and to write
        streams = [number if fd == -1 else fd
                   for number, fd in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._pipe, write = os.pipe()
        request = [args, dict(os.environ if env is None else env), cwd or os.getcwd(), os.getpgrp()]
        ForkServer.socket.sendmsg([json.dumps(request).encode()], [
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("4i", *streams, write))])
        os.close(write)
        self.pid, = struct.unpack("i", os.read(self._pipe, 4))
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _wait(self, timeout):
        if self.returncode is None:
            if not select.select([self._pipe], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            status, = struct.unpack("i", os.read(self._pipe, 4))
            os.close(self._pipe)
            exited = os.WIFEXITED(status)
            self.returncode = os.WEXITSTATUS(status) if exited else -os.WTERMSIG(status)
        return self.returncode

    def send_signal(self, sig):
        with contextlib.suppress(ProcessLookupError):   # it is reaped before we are told
            super().send_signal(sig)

    def _internal_poll(self, *_, **__):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode


class CliProcess(Asked):
    """A program that prints one line when it is up. stop() ends it; stdout and stderr are what else
    it printed."""

    PIDS = "/status/%s", "os_pids"

    def __init__(self, command, env=None, cwd=None, pattern=CLI_LISTENING, popen=subprocess.Popen):
        self._stderr = tempfile.NamedTemporaryFile("w+", prefix="stderr-")
        self._expected = []
        self.process = popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env,
                             stderr=self._stderr, cwd=cwd, universal_newlines=True)
        self.first_line = self.process.stdout.readline()
        match = pattern.match(self.first_line)
        if match is None:
            self.process.kill()
            self.stop(None, self.process.wait())
            raise AssertionError("it printed %r and %r" % (self.first_line, self.stderr))
        super().__init__(match.group(1).split(", ")[0])

    def expect_stderr(self, *patterns):
        """Each is found in a line of its stderr. It has to come; any other line fails the test."""
        self._expected += patterns

    def said(self, text):
        return text in os.pread(self._stderr.fileno(), 1 << 20, 0).decode()

    def stop(self, signum=signal.SIGTERM, status=0):
        """Signal it (None: it has been), and wait for its end, which has to have this status."""
        if signum is not None:
            self.process.send_signal(signum)
        self.stdout, _ = self.process.communicate(timeout=TIMEOUT)
        self._stderr.seek(0)
        self.stderr = self._stderr.read()
        self._stderr.close()
        assert self.process.returncode == status, (self.process.returncode, self.stderr)

    def close(self):
        """For cleanups: it is stopped, if it still runs, and printed what is expected alone."""
        if not self._stderr.closed:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGABRT)        # which shows its stacks
                self.process.communicate()
                raise
        lines = unexpected(self.stderr.splitlines(), self._expected)
        assert not lines, "stderr of the program:\n" + "\n".join(lines)


class CliCase(Case):
    """start() and run_program() run programs that end with the test. Most run gaffer's main() in a
    forked process: the script is compiled at each start, which takes longest."""

    env = None                          # main() gives it a cache of compiled modules

    def start(self, *arguments, **options):
        """A running `gaffer.py ARGUMENTS`; without a command `serve` on a free port, with them."""
        if "serve" not in arguments:
            arguments = ("serve", "--bind", "127.0.0.1:0") + arguments
        return self.run_program(arguments, popen=ForkedCommand, **options)

    def run_program(self, command, **options):
        program = CliProcess(command, **{"env": self.env, **options})
        self.addCleanup(program.close)
        return program

    def folder(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def file(self, folder, name, text, mode=0o600):
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def listens(self, path):
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(path) == 0

    def enter(self, folder):
        """Make it the current folder until the end of the test."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)

    def called(self, *arguments):
        """(exit status, stdout, stderr) of main(), called in this process, which is a hundred times
        faster."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                mock.patch.object(logging.root, "handlers", []):
            status = gaffer.main(list(arguments))
        return status, out.getvalue(), err.getvalue()

    def call(self, *arguments, status=0, err=""):
        """stdout of a command that ends with `status` and says `err` (a regular expression)."""
        found, out, said = self.called(*arguments)
        self.assertEqual(found, status, (arguments, out, said))
        self.assertRegex(said, r"\A%s\Z" % err, arguments)
        return out

    def stopped(self, program):
        """Names of processes in the order in which they were told to stop, as its log (-v) says."""
        program.expect_stderr(" INFO ")
        return re.findall(r" INFO (\S+): stop_pid ", program.stderr)


class CliServe(CliCase):
    """Options of `serve`, and its output."""

    def test_options(self):
        """As a script, in a folder from which nothing is imported: all that `serve` takes."""
        folder = self.folder()
        for name in "json", "argparse", "socket":
            self.file(folder, name + ".py", "raise SystemExit('from the current folder')\n")
        server = self.run_program(
            [*CLI_SCRIPT, "serve", "--bind", "127.0.0.1:0", "--bind", "unix:socket", "--window",
             "256", "--cors-origin", "https://a.example", "--allow-host", "a.example"], cwd=folder)
        self.assertRegex(server.first_line, r"http://127\.0\.0\.1:[0-9]+, unix:socket\n\Z")
        self.assertEqual(Asked("unix:%s/socket" % folder).request("GET", "/ping")[2], b"OK")
        self.assertIn(CLI_FILE + "\0serve\0", cli_read("/proc/%d/cmdline" % server.process.pid))
        status = cli_read("/proc/%d/status" % server.process.pid)
        resident, room = (int(re.search(name + r":\s+(\d+)", status).group(1))
                          for name in ("VmRSS", "FDSize"))
        self.assertLess(resident, 21 * 1024)
        self.assertGreaterEqual(room, min(gaffer.files_max(), gaffer.FILES_EXPECTED))
        for name, value in ("Origin", "https://a.example"), ("Host", "a.example"):
            found = server.request("POST", "/processes/x/_stop", None, {name: value})
            self.assertEqual(found[0], 404)     # neither origin nor host are forbidden
        server.add("a", "printf %999d; exec cat", shell=True, redirect_input=True)
        until(lambda: server.request("HEAD", "/streams/1/stdout")[1]["Gaffer-Offset"] == "999")
        headers = server.request("GET", "/streams/1/stdout?since=0")[1]
        self.assertEqual(headers["Gaffer-Dropped"], str(999 - 256))
        server.stop()
        self.assertEqual(server.stdout, "")
        self.assertFalse(os.path.exists(folder + "/socket"))

    @unittest.skipUnless(hasattr(os, "pidfd_open"), "children are polled here")
    def test_a_quiet_server_makes_no_system_call(self):
        """Whatever readers wait: each wake-up would be a switch of a thread."""
        server = self.start()
        server.add("cat", "cat", redirect_input=True)
        for target in ("/streams/1/stdout?feed=continuous&heartbeat=true", "/watch", "/ping",
                       "/watch?feed=eventsource", "/streams/1/stdout?timeout=1000"):
            self.addCleanup(Wire(server.port).request(target).close)
        wire = Wire(server.port).upgrade("/wstreams/1")
        self.addCleanup(wire.close)
        wire.text("partial line")
        self.assertEqual(wire.read(), (1, b"partial line"))

        def switches():
            return [re.findall(r"ctxt_switches:\s*(\d+)", cli_read(path)) for path in sorted(
                glob.glob("/proc/%d/task/*/status" % server.process.pid))]

        def quiet():
            with contextlib.suppress(FileNotFoundError):        # a thread has just ended
                before = switches()
                threading.Event().wait(1.0)     # a second without a switch is what is measured
                return switches() == before
        until(quiet, "a quiet second")

    def test_standard_streams(self):
        """All closed, a reader that has gone, no cached bytecode: it goes on."""
        read, gone = os.pipe()
        os.close(read)
        self.addCleanup(os.close, gone)
        folder = self.folder()
        path = folder + "/\udcff"
        uncached = dict(self.env, PYTHONPYCACHEPREFIX=folder, PYTHONDONTWRITEBYTECODE="1")
        for options in ({"stdout": gone, "stderr": gone, "env": uncached},
                        {"preexec_fn": functools.partial(os.closerange, 0, 3), "env": self.env}):
            with subprocess.Popen([PYTHON, CLI_FILE, "serve", "-v", "--bind", "unix:" + path],
                                  **options) as process:
                self.addCleanup(process.kill)
                until(lambda: self.listens(path))
                server = Asked("unix:" + path)
                server.add("a", "echo a line")
                answer = server.request("GET", "/streams/1/stdout?since=0")
                self.assertEqual(answer[2], b"a line\n", options)
                process.terminate()
                self.assertEqual(process.wait(TIMEOUT), 0)

    def test_token(self):
        path = self.file(self.folder(), "token", "s3cret\n")
        good = {"Authorization": "Bearer s3cret"}
        for arguments, variable in (["--token-file", path], "another"), ([], " s3cret\n"):
            server = self.start(*arguments, env=dict(self.env, GAFFER_TOKEN=variable))
            self.assertEqual(server.request("GET", "/processes")[0], 401)
            server.ok("POST", "/processes", {"name": "a", "cmd": "sleep 1000"}, good)
            os_pid = server.ok("GET", "/processes/1", headers=good)["os_pid"]
            self.assertNotIn("GAFFER_TOKEN", cli_read("/proc/%d/environ" % os_pid))

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl for a certificate")
    def test_tls(self):
        cert, key = make_certificate(self.folder())
        url = self.start("--certfile", cert, "--keyfile", key).url
        for endpoint, more, status, err in (
                (url, ["--cacert", cert], 0, ""),
                (url, [], 6, "gaffer: .*cannot be trusted.*--cacert\n"),
                (url.replace("https", "http"), [], 5, "gaffer: .*as https://\\?.*\n"),
                (url, ["--cacert", key], 2, "gaffer: .*--cacert.*\n")):
            self.call("processes", "--endpoint", endpoint, *more, status=status, err=err)

    def test_verbose(self):
        """And the access log; in a file: CliDaemon.test_log_files_are_reopened."""
        events = (r" INFO a: (create|start|stop|(spawn|stop_pid) \(pid 1, os pid \d+\))$",
                  r" INFO a: exit \(pid 1, os pid \d+, signal 15\)$")
        for arguments, patterns in (
                (["-v", "--access-log", "-"],
                 [*events, '"POST /pro.* 200 ', '"GET /st.* 200 ']),
                (["-v", "--verbose"],
                 [*events, r" DEBUG (a client has left|[\d.]+ a 1 (stdout|exit)) .*"])):
            server = self.start(*arguments)
            server.add("a", r"printf 'a\nword\n'; exec sleep 1000", shell=True)
            server.request("GET", "/streams/1/stdout?since=0")      # the words have come
            server.stop()
            server.expect_stderr(*patterns)
        self.assertRegex(
            server.stderr, r"(?m)^([\d:, -]+ DEBUG [\d.]+ a 1 stdout )a\n\1word$")


class CliSignals(CliCase):
    """INT, TERM, and how everything ends."""

    def test_second_signal(self):
        """It kills at once, SIGQUIT does by itself, and no first one after --exit-with."""
        stubborn = "trap 'echo term' TERM; echo ready; while :; do sleep 0.05; done"
        for first, last in (signal.SIGINT, signal.SIGTERM), (None, signal.SIGQUIT):
            server = self.start("--exit-with", "b")
            os_pid, = server.add("a", stubborn, shell=True, graceful_timeout=1000)
            server.request("GET", "/streams/1/stdout?since=0")
            if first:
                server.add("b", "true")
                server.request("GET", "/streams/1/stdout?since=6")
                server.process.send_signal(first)
                status, _, _ = server.request("GET", "/watch/proc/a?timeout=0.2")
                self.assertEqual(status, 204)
            server.stop(last)
            self.assertFalse(alive(os_pid), last)

    GO_ON = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGCONT, signal.SIGURG,
             signal.SIGWINCH, signal.SIGUSR1, signal.SIGUSR2}
    STOPS = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}

    def test_signals_that_end(self):
        """The newest is told first. Neither one nor the pid file is left."""
        def end(signum):
            pidfile = os.path.join(self.folder(), "pid")
            arguments = ["serve", "--bind", "127.0.0.1:0", "--pidfile", pidfile, "-v"]
            if signum == signal.SIGABRT:        # a forked command shows its stacks
                server = self.run_program(CLI_COMMAND + arguments)
            else:
                server = self.start(*arguments)
            os_pids = [server.add(name, "sleep 1000")[0] for name in ("a", "b", "c")]
            server.stop(signum)
            self.assertFalse(any(map(alive, os_pids)) or os.path.exists(pidfile), signum)
            self.assertEqual(self.stopped(server), ["c", "b", "a"], signum)
        # after the handler of a fault the same fault comes again
        faults = {signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
        others = faults | self.GO_ON | self.STOPS | {signal.SIGKILL}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(end, (signum for signum in signal.valid_signals() - others
                                if signum <= signal.SIGRTMIN)))

    def test_signals_that_end_nothing(self):
        """A stop is one of gaffer, not of its processes."""
        server = self.start()
        os_pid, = server.add("a", "sleep 1000")
        for signum in self.GO_ON | self.STOPS:
            server.process.send_signal(signum)
            if signum in self.STOPS:
                until(lambda: process_state(server.process.pid) == "T", "the stop")
                self.assertIn(process_state(os_pid), "RS")
                server.process.send_signal(signal.SIGCONT)
            self.assertEqual(server.ok("GET", "/status/a")["os_pids"], [os_pid], signum)

    def test_careless_parent(self):
        """What was blocked or ignored is so neither for gaffer nor its processes."""
        signals = set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}
        for ignored, careless in enumerate((
                lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals),
                lambda: [signal.signal(signum, signal.SIG_IGN) for signum in signals])):
            server = self.run_program(
                [*CLI_COMMAND, "serve", "--bind", "127.0.0.1:0"],
                popen=functools.partial(subprocess.Popen, preexec_fn=careless))
            os_pid, = server.add("a", "echo $(grep -E '^Sig(Blk|Ign)' /proc/self/status); "
                                 "exec sleep 1000", shell=True)
            data = server.request("GET", "/streams/1/stdout?since=0")[2].split()
            # not the C library's own two, which its posix_spawn() ignores
            self.assertEqual([int(mask, 16) % (1 << 31) for mask in data[1::2]], [0, 0])
            server.add("b", "exit 3", shell=True)
            event = server.ok("GET", "/watch/proc/b/exit?since=0")
            self.assertEqual(event["exit_status"], 3)
            server.expect_stderr("WARNING b: exit .*status 3")
            if ignored:                         # nohup
                server.process.send_signal(signal.SIGHUP)
                self.assertEqual(server.ok("GET", "/status/a")["os_pids"], [os_pid])
            server.stop()
            self.assertFalse(alive(os_pid))

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("setpriv"), "needs root and setpriv")
    def test_another_users_process(self):
        """A user's gaffer runs programs that become root: each is named once and left running."""
        folder = tempfile.TemporaryDirectory(dir="/tmp")        # where another user may look
        self.addCleanup(folder.cleanup)
        os.chmod(folder.name, 0o755)
        program = shutil.copy(shutil.which("setpriv"), folder.name)
        os.chmod(program, 0o4755)
        become = program + " --reuid 0 --clear-groups sh -c 'echo ready; exec sleep 1000'"
        server = self.run_program(
            [PYTHON, "-c", CLI_IMPORT + "import os; gaffer.make_parser('serve').format_help()"
             "; os.setgid(61234); os.setuid(61234)" + CLI_MAIN, "serve", "--bind", "127.0.0.1:0"],
            cwd="/")
        leader, = server.add("a", become)
        shell, = server.add("b", become + "; true", shell=True)
        path = os.path.join(folder.name, "path")
        server.add("c", "sleep 1000", ready={
            "exec": "exec " + become.replace("ready", "$$ >> " + path)})
        for pid in 1, 2:
            said = server.request("GET", "/streams/%d/stdout?since=0" % pid)[2]
            self.assertEqual(said, b"ready\n")
        os_pids = [leader, *set(process_group(shell)) - {shell},
                   int(until(lambda: os.path.exists(path) and cli_read(path)))]
        try:
            server.stop()
            self.assertEqual(list(map(alive, os_pids)), [True, True, True])
        finally:
            for os_pid in os_pids:
                os.kill(os_pid, signal.SIGKILL)
        server.expect_stderr(r" ([ab] \(pid \d\):|a command:) os pid \d+ runs as another user and "
                             "cannot be signalled: it is left to itself$")
        self.assertEqual(server.stderr.count("\n"), 3, server.stderr)

    def test_ctrl_c_within_the_imports(self):
        """Silent, as later: a module of the library is one that sends the signal."""
        folder = self.folder()
        self.file(folder, "socketserver.py",
                  "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.sigwait([])\n")
        for command in ["-m", "gaffer", "watch"], [CLI_FILE, "up"]:
            run = subprocess.run(
                [PYTHON, *command], cwd=HERE, env=dict(self.env, PYTHONPATH=folder),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT)
            self.assertEqual((run.returncode, run.stdout), (-signal.SIGINT, b""), command)


class CliExit(CliCase):
    """--exit-with and --exit-when-done: gaffer's status is a process's."""

    # ends as it is told on its stdin
    MAIN = {"cmd": 'read words; eval "$words"', "shell": True, "redirect_input": True}

    def test_exit_with(self):
        for words, status in ("exit 7", 7), ("exit 0", 0), ("kill -9 $$", 137):
            server = self.start("-v", "--exit-with", "main")
            os_pids = [server.add(name, self.MAIN)[0] for name in ("a", "main", "b")]
            # its group ends, too
            server.ok("POST", "/streams/main/stdin", "sleep 1000 & %s\n" % words)
            server.stop(None, status)
            self.assertEqual(self.stopped(server), ["b", "a"])
            server.expect_stderr(*["WARNING main: exit"] * (status > 0))
            self.assertFalse([os_pid for os_pid in os_pids if process_group(os_pid)])
        server = self.start("--exit-with", "main")
        server.add("main", "sleep 1000", ready={"tcp": "1", "within": 0.1})
        server.stop(None, 255)
        server.expect_stderr("WARNING main: stop_pid", "WARNING main: exit")

    def test_what_does_not_end_it(self):
        """Other templates, a stop and a restart over HTTP."""
        server = self.start("--exit-with", "main")
        server.add("other", "exit 3", shell=True, restart="never")
        server.expect_stderr("WARNING other: (exit|fail)")
        server.ok("GET", "/watch/proc/other/exit?since=0")
        server.add("main", self.MAIN)
        for path in "2/_stop", "main/_restart", "main/_stop", "main/_start":
            server.ok("POST", "/processes/%s?wait=true" % path)
        self.assertEqual(server.ok("GET", "/status/main")["running"], 1)
        server.stop()

    def test_exit_when_done(self):
        """The status is the first failure's; what waits for a failure waits for ever."""
        def sh(words, **options):
            return {"cmd": words, "shell": True, "restart": "never", **options}
        for status, templates in (
                (0, {"a": sh("true"), "b": sh("exit 3", success=[3])}),
                (137, {"a": sh("true"), "fails": sh("kill -KILL $$")}),
                (3, {"fails": sh("exit 3", restart="on-failure", flapping={"max_retry": 0}),
                     "b": sh("sleep 0.1")}),
                (5, {"fails": sh("exit 5"), "a": sh("true", after=["fails"]),
                     "b": sh("true", after=["bb"])}),
                (4, {"fails": sh("exit 4", after=["none"]), "none": sh("true", numprocesses=0)}),
                (0, {"a": sh("true", start=False)}),
                (1, {"a": sh("true", after=["off"]), "off": sh("true", start=False)})):
            text = json.dumps({"process": templates})
            server = self.start("--exit-when-done", self.file(self.folder(), "g.json", text))
            server.stop(None, status)
            server.expect_stderr(*[
                "WARNING fails: (exit|fail|stop|flap)" if name == "fails" else
                "ERROR '[ab]' has not run: it waits for %s$" % info["after"][0]
                for name, info in templates.items() if "after" in info or name == "fails"])

    def test_when_it_is_done(self):
        """Not before something has run, nor while anything may."""
        server = self.start("--exit-when-done")
        server.add("job", "true", restart="never", start=False)
        server.add("web", "sleep 1000")
        server.ok("POST", "/processes/job/_start")
        server.ok("GET", "/watch/proc/job/done?since=0")
        self.assertEqual(server.ok("GET", "/status/web")["running"], 1)
        server.ok("POST", "/processes/web/_stop?wait=true")
        server.stop(None)


class CliFaults(CliCase):
    """A running server's limits are changed: it says so once."""

    def test_no_descriptors(self):
        """Of a spawn that fails in any step nothing is left. Where there is none at all, a process
        that dies, with one of its group left, and a connection have to wait."""
        server = self.start()
        os_pid, kind = server.process.pid, resource.RLIMIT_NOFILE
        soft, hard = resource.prlimit(os_pid, kind)
        wire = Wire(server.port)                # open already
        self.addCleanup(wire.close)

        def limit(number):
            resource.prlimit(os_pid, kind, (number, hard))

        def ask(method, path, body=None):
            wire.request(path, method=method, body=json.dumps(body).encode() if body else b"")
            return json.loads(wire.answer()[2])

        def descriptors():
            return sorted(map(int, os.listdir("/proc/%d/fd" % os_pid)))
        info = {"name": "x", "cmd": "(trap '' TERM; exec sleep 1000) & exec cat", "shell": True,
                "redirect_input": True, "custom_streams": ["a", "b"], "graceful_timeout": 0.1}
        ask("GET", "/processes")
        before = descriptors()
        for room in itertools.count():
            limit(before[-1] + 1 + room)
            answer = ask("POST", "/processes", info)
            limit(soft)
            if "ok" in answer:
                break
            self.assertEqual((answer["error"], descriptors()), ("busy", before), (room, answer))
        self.assertGreater(room, 8)
        leader, = ask("GET", "/status/x")["os_pids"]
        with socket.socket() as late:
            limit(3)
            os.kill(leader, signal.SIGKILL)
            late.connect(("127.0.0.1", server.port))
            late.sendall(http_bytes("GET", "/ping"))
            until(lambda: ask("GET", "/status/x")["error"], "the try to replace it")
            self.assertEqual(ask("POST", "/processes", dict(info, name="y"))["error"], "busy")
            limit(soft)
            self.assertIn(b"200 OK", late.recv(1000))
        until(lambda: {*ask("GET", "/status/x")["os_pids"]} - {leader}, "the restart")
        ask("DELETE", "/processes/x")
        until(lambda: descriptors() == before, "the same descriptors")
        server.stop()
        server.expect_stderr("WARNING x: exit .*signal 9", "no connection can be accepted",
                             "x cannot be started")
        self.assertEqual(server.stderr.count("\n"), 3, server.stderr)


class CliErrors(CliCase):
    """What is wrong with options is one sentence, or argparse's own."""

    def test_starts_that_fail(self):
        folder = self.folder()
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        plain = self.file(folder, "plain", "not a certificate\n")
        missing = os.path.join(folder, "missing")
        for arguments, words in [
                ((), "in use"), (("--bind", "0.0.0.0:0"), "token"),
                (("--bind", "nonsense"), "is not an address"),
                (("--bind", "unix:/proc/gaffer-test"), "cannot listen"),
                (("--token-file", missing), "No such file"),
                (("--token-file", self.file(folder, "group", "token\n", 0o640)), "chmod 600"),
                (("--token-file", self.file(folder, "blank", " \n")), "one line"),
                (("--certfile", plain), "--keyfile"), (("--keyfile", plain), "certfile"),
                (("--certfile", plain, "--keyfile", plain), "cannot be used"),
                (("--bind", "unix:" + missing, "--certfile", plain), "--keyfile"),
                (("--cors-origin", "https://x/y"), "'https://x/y' is not an origin; give "),
                (("--allow-host", "a:70"), "'a:70' is not a host; give "),
                (("--pidfile", "/dev/full"), "'/dev/full' cannot be written: Invalid argument"),
                (("--access-log", "/nowhere/x"), "the access log '/nowhere/x' cannot be written")]:
            self.call("serve", *arguments, "--bind", "127.0.0.1:%d" % taken.getsockname()[1],
                      status=1, err="gaffer: .*%s.*\n" % words)
        why = RuntimeError("can't start new thread")
        with mock.patch("threading.Thread.start", side_effect=why):
            self.call("serve", status=1, err="gaffer: can't start new thread\n")

    def test_wrong_usage(self):
        for words, said in (("--window 255", "256 to 1073741824"), ("--window 1073741825", "256"),
                            ("--exit-with 12", "'12' cannot be")):
            self.call("serve", *words.split(), status=2, err=r"[\s\S]*%s[\s\S]*" % said)


class CliControlCase(ServerCase, CliCase):
    """A server in this process, and main() called beside it, without the user's environment."""

    def setUp(self):
        super().setUp()
        pure_environ(self, GAFFER_ENDPOINT=self.server.url, GAFFER_TOKEN=None, NO_COLOR=None)

    def sleepers(self, *names, **options):
        for name in names:
            self.server.add(name, "sleep 1000", **options)

    def calls(self, *table):
        """Rows of (words of a command, stdout[, status, stderr])."""
        for words, out, *failure in table:
            status, err = failure or (0, "")
            self.assertEqual(self.call(*words.split(), status=status, err=err), out, words)


class CliFollowCase(CliControlCase):
    """Commands that go on, as programs of their own: follow() starts one."""

    ECHO = """
        import os, signal
        def bye(signum, frame):
            os.write(1, b"bye\\n")
            os._exit(0)
        signal.signal(signal.SIGTERM, bye)
        os.write(1, b"started\\n")
        for line in iter(lambda: os.read(0, 100), b""):
            os.write(1, line)
        """

    def streams(self):
        return sum(isinstance(each, gaffer.Feed) for each in tuple(self.server.http.channels))

    def cut(self):                              # not what has no answer yet
        self.server.manager.loop.call(lambda: [
            channel.close() for channel in tuple(self.server.http.channels)
            if isinstance(channel, gaffer.Feed)])

    def follow(self, *arguments, endpoint=None, **options):
        """A running command whose stdout is read with readline()."""
        process = ForkedCommand(arguments, stderr=subprocess.PIPE, bufsize=0, **{
            "env": dict(self.env, GAFFER_ENDPOINT=endpoint or self.server.url),
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options})
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def interrupted(self, process):
        """Ctrl-C: what else it printed."""
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
        self.assertEqual((process.returncode, err), (-signal.SIGINT, b""))
        return out

    def say(self, name, text):
        pid, = until(lambda: self.server.ok("GET", "/processes/%s/_pids" % name)["pids"])
        self.server.ok("POST", "/streams/%d/stdin" % pid, text)

    def terminal(self, *arguments, rows=24, command=CLI_COMMAND, **more):
        """(program, what is typed and read there) of a command in a terminal of its own."""
        main, side = os.openpty()
        self.addCleanup(os.close, main)
        self.resize(main, rows)
        self.seen = ""
        env = {**self.env, "GAFFER_ENDPOINT": self.server.url, "TERM": "xterm", **more}
        process = subprocess.Popen(
            [*command, *arguments], stdin=side, stdout=side, stderr=side, env=env,
            cwd=self.folder(), start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(side)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process, main

    @staticmethod
    def resize(main, rows):
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("4H", rows, 80, 0, 0))

    def shows(self, main, pattern):
        """Read until what is shown from here on matches; returns the match."""
        while not re.search(pattern, self.seen):
            ready = select.select([main], [], [], TIMEOUT)[0]
            with contextlib.suppress(OSError):  # EIO: nobody has the other side any more
                text = os.read(main, 65536).decode("utf-8", "replace") if ready else ""
            self.assertTrue(text, "%s is not in %r" % (pattern, self.seen))
            self.seen += text
        match = re.search(pattern, self.seen)
        self.seen = self.seen[match.end():]
        return match


class CliControl(CliFollowCase):
    """Commands that look and change, against a real server."""

    def test_names(self):
        """Several, globs, groups, all."""
        self.sleepers("web", "g:a", "g:b")
        self.calls(("add web 2", "web: 3 processes\n"), ("sub web 2", "web: 1 process\n"),
                   ("processes --running", "2\n3\n5\n"), ("pids web g:b", "web: 5\ng:b: 3\n"),
                   ("stop g:*", "g:a: stopped\ng:b: stopped\n"),
                   ("stop all", "web: stopped\ng:a: already stopped\ng:b: already stopped\n"),
                   ("start w* web g:[b]", "web: started\ng:b: started\n"),
                   ("restart all", "web: restarted\ng:a: restarted\ng:b: restarted\n"))

    def test_commands_wait(self):
        """Unless told not to, for as long as they may."""
        def add():
            pid, = self.server.add("g:a", "trap '' TERM; echo ready; read x", shell=True,
                                   redirect_input=True, graceful_timeout=1000)
            self.server.request("GET", "/streams/%d/stdout?since=0" % pid)
            return pid
        since = 0
        for words, said in (
                ("stop g:a", "stopped"), ("restart g:a", "restarted"), ("sub g:a", "0 processes"),
                ("del_process g:a", "deleted"), ("stop g:a.1", "stopped, to be replaced"),
                ("update_process g:a cat", "updated"),
                ("add_process --replace g:a cat", "replaced"),
                ("load g -f " + self.file(self.folder(), "Procfile", "a: cat"), "updated"),
                ("unload g -f / --timeout 1234567", "unloaded"), ("scale g a=0", "0 processes")):
            pid = add()
            since = self.server.wait_event("proc/g:a/create", since)["id"]
            command = self.follow(*words.split())
            kind = "reap" if said == "0 processes" else "stop_pid"
            self.server.wait_event("proc/g:a/" + kind, since)
            self.assertIsNone(command.poll(), "it waits")
            self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")
            name = "g:a.1" if "g:a.1" in words else "g:a"
            self.assertEqual(command.communicate(timeout=TIMEOUT),
                             (("%s: %s\n" % (name, said)).encode(), b""))
            self.server.request("DELETE", "/processes/g:a")
            for pid in self.server.ok("GET", "/processes?running=true"):
                self.server.ok("POST", "/processes/%d/_signal/KILL" % pid)
        add()
        late = "", 124, "gaffer: this was not done in 0.05 .*\n"
        self.calls(("update_process --no-wait --umask 022 g:a", "g:a: updated\n"),
                   ("update_process --timeout 0.05 g:a cat", *late),
                   ("stop g:a --timeout 0.05", *late),
                   ("sub g:a --no-wait", "g:a: 0 processes\n"))

    def test_a_job_runs_once(self):
        """A command that waits starts nothing again that has ended meanwhile."""
        self.server.add("job", "echo run", restart="never", start=False)
        self.server.add("timer", "echo run", schedule="every 1h")
        for runs, words in enumerate((
                "start job timer", "restart job timer", "start --ready job",
                "start job --no-wait")):
            self.assertNotIn("already", self.call(*words.split()))
            for name in ["job", "timer"] if runs < 2 else ["job"]:
                lines = until(lambda: self.call("logs", name).splitlines()[runs:])
                self.assertEqual(len(lines), 1, words)
                until(lambda: not self.server.ok("GET", "/status/" + name)["running"])
        self.call("add", "timer")
        self.assertEqual(self.server.ok("GET", "/status/timer")["state"], "scheduled")

    def test_one_process(self):
        """web.2, gaffer's pid, the system's pid; a template's name comes first."""
        self.sleepers("web", numprocesses=2)
        os_pids = self.server.ok("GET", "/status/web")["os_pids"]
        self.sleepers("off", start=False)
        self.calls(("attach web", "", 1, "gaffer: web runs 2 .*: attach to one of web.1, web.2\n"),
                   ("kill web.1 CONT", "web.1: signalled CONT\n"),
                   ("kill -9 web.2", "web.2: signalled 9\n"),
                   ("kill off TERM", "", 3, "gaffer: 'off' is not running\n"),
                   ("attach off", "", 1, "gaffer: off is not running: .*\n"))
        self.server.wait_event("proc/web/exit")
        for word in "web.1", "1", str(os_pids[0]):
            self.assertEqual(json.loads(self.call("get_process", word))["os_pid"], os_pids[0])
        self.calls(("start web 1", "web: already running\n", 2,
                    "gaffer: '1' is a process, and not a name: give web\n"),
                   ("stop 1 %d web.1 --json" % os_pids[0], '{"ok": true}\n'))
        until(lambda: self.call("running", "web") == "2\n")
        self.sleepers("web.1")
        self.calls(("stop web.1", "web.1: stopped\n"), ("running web web.1", "web: 2\nweb.1: 0\n"))

    def test_templates(self):
        """All that follows the name is the command."""
        for words, fields in (
                ("--start a sleep 1", {"cmd": "sleep", "args": ["1"], "start": True}),
                ("--env A=1=2 --env B= --env HOME --env NOSUCH --cwd . a -- echo -- b --start",
                 {"env": {"A": "1=2", "B": "", "HOME": os.environ["HOME"]}, "cwd": os.getcwd(),
                  "cmd": "echo", "args": ["--", "b", "--start"], "start": False}),
                ("--numprocesses 2 --redirect-output out,err --no-os-env --env-file x.env "
                 "--stop-signal INT=5,TERM=2.5 --schedule @daily a true",
                 {"numprocesses": 2, "redirect_output": ["out", "err"], "os_env": False,
                  "env_file": [os.path.abspath("x.env")], "schedule": "@daily",
                  "stop_signal": [["INT", 5], ["TERM", 2.5]], "restart": "never"})):
            started = " and started" if fields.get("start") else ""
            self.calls(("add_process " + words, "a: added%s\n" % started))
            info = self.server.ok("GET", "/processes/a")
            self.assertEqual({name: info[name] for name in fields}, fields)
            self.call("del_process", "a")
        path = self.file(self.folder(), "c.json", '{"name": "c", "cmd": "sleep 1", "start": true}')
        self.calls(("load_process " + path, "c: added\n"), ("running c", "0\n"))

    def test_update(self):
        """It changes what is given; with --replace it is so afterwards."""
        self.sleepers("a", env={"A": "1", "B": "2"}, cwd="/", numprocesses=2, start=False)
        info = self.server.ok("GET", "/processes/a")
        for words, fields in (
                ("a sleep -0 2000", {"cmd": "sleep", "args": ["-0", "2000"]}),
                ("--env B=3 a", {"env": {"A": "1", "B": "3"}}),
                ("--limits core=0 --success 3 a", {"limits": {"core": 0}, "success": [3]}),
                ("--limits= --success= --cwd= a", {"limits": {}, "success": [0], "cwd": None}),
                ("--schedule @daily a sleep 1000",      # which has no other restart
                 {"schedule": "@daily", "restart": "never", "args": ["1000"]}),
                ("--start a", {"start": True})):
            self.calls(("update_process " + words, "a: updated\n"))
            info.update(fields)
            self.assertEqual(self.server.ok("GET", "/processes/a"), info)
        for words, said, running in (
                ("x sleep 1001", "added", "0\n"), ("--start x sleep 1001", "replaced", "1\n"),
                ("x sleep 1001", "unchanged", "1\n")):
            self.calls(("add_process --replace " + words, "x: %s\n" % said), ("running x", running))

    def test_what_is_refused(self):
        self.sleepers("a")
        self.calls(*[(words, "", status, "gaffer: %s\n" % said) for words, status, said in (
            ("add_process a", 2, "say what to run: .*"),
            ("update_process a --numprocesses 2 true", 2, "the command begins with '--num.*"),
            ("add_process --numprocesses two b x", 1, "field 'numprocesses' must .*"),
            ("update_process a", 2, "say what to change: .*"),
            ("load_process /nosuch", 1, "/nosuch: cannot be read: No such file.*"),
            ("load_process -", 1, "stdin: .*"))])
        self.server.add("c", "nosuch", start=False)
        self.calls(("add a 0", "", 2, r"usage: [\s\S]*"),
                   ("start a c", "a: already running\n", 1, "gaffer: c: field 'cmd' .*\n"),
                   ("start c", "", 1, "gaffer: field 'cmd' names .*\n"))


class CliStatus(CliControlCase):
    """The table of `status`, and where it is shown."""

    def test_rows(self):
        self.sleepers("web")
        status, = self.server.ok("GET", "/status?usage=true")
        web = dict(status["processes"][0], os_pid=4711, uptime=62, cpu=None)
        bad = {"state": "backoff", "running": 0, "restarts": 3, "next_tries": [7.2],
               "last_exit": {"exit_status": 0, "term_signal": 9, "times": 3}, "processes": []}

        def rows(*changes, width=0):
            statuses = [{**status, "os_pids": [4711], "processes": [web], **each}
                        for each in changes]
            return gaffer.status_table(statuses, width, False)[1:]
        for change, line in (
                (bad, "web   backoff  0/1    -       -         3   137    -    -  "
                      "next try in 8s; exit 137 (SIGKILL), 3 times"),
                ({"pids": [4711], "processes": [dict(web, pid=4711, kill_in=3)]},
                 "1/1  4711  4711   1m02s         0     -    -    -  SIGKILL in 3s"),
                ({"processes": [dict(web, not_ready="no answer")]}, "no answer"),
                (dict(bad, hint="it seems to", next_tries=[]), "3 times; it seems to"),
                (dict(bad, processes=[dict(web, uptime=5)], next_tries=[]), "L), 3 times"),
                ({"processes": [dict(web, cpu=1.0, rss=3 << 29)]}, "1.0%  1.5G"),
                ({"state": "scheduled", "processes": [], "next_runs": [time.time() + 9.5]},
                 "next run in 10s")):
            self.assertEqual(rows(change)[0][-len(line):], line)
        self.assertIn("xxx…", rows({"name": "x" * 100}, width=70)[0])
        self.assertLessEqual(len(rows({"name": "x" * 100}, width=70)[0]), 70)
        for seconds, words in (59.9, "59s"), (11520, "3h12m"), (187200, "2d04h"):
            self.assertEqual(gaffer.span(seconds), words)

    def test_status(self):
        """By one request; what does not run comes first."""
        self.call("status", status=3, err="gaffer: there is nothing yet: .*\n")
        self.sleepers("web", numprocesses=2)
        for number, os_pid in enumerate(self.server.ok("GET", "/status/web")["os_pids"], 1):
            self.assertRegex(self.call("status", "web"),
                             r"(?m)^web\.%d +running +2/2 +%d +(\d+ +)?\ds +0 +- +\d+\.\d%% +[\d.]+"
                             "[KM]?$" % (number, os_pid))
        self.server.add("broken", "false", restart_delay=[60, 60])      # from the second time on
        self.server.add("hopeless", "sh -c 'exit 7'", flapping={"window": 60.0, "max_retry": 0})
        until(lambda: self.server.ok("GET", "/status/broken")["next_tries"][:1] > [10])
        self.server.wait_event("proc/hopeless/stop")
        asks = gaffer.Client.open
        with mock.patch("gaffer.Client.open", autospec=True, side_effect=asks) as asked:
            out = self.call("status", status=3)
        self.assertEqual(asked.call_count, 1)
        for line, words in zip(out.splitlines(), (
                r"NAME .*", r"broken +backoff +0/1 .*  next try in (60s|1m00s); exit 1, 2 times",
                r"hopeless +stopped +0/1 .* 7 .*  gave up; exit 7, 2 times", r"web\.1 .*",
                r"web\.2 .*", r"3 templates: .*")):
            self.assertRegex(line, r"\A%s\Z" % words)
        self.assertEqual(json.loads(self.call("status", "--json", "w*"))["name"], "web")

    def test_watch(self):
        """Again each second until the signal, also where the server is away for a while."""
        away = gaffer.NoServer("http://x", "connection refused")
        args = gaffer.make_parser("status").parse_args(["-w", "--json"])
        for answers in ({}, away, {}, KeyboardInterrupt()), ({}, gaffer.NotThere("gone")), (away,):
            with mock.patch("gaffer.get_statuses", side_effect=answers) as asked, \
                    http_limits(STATUS_INTERVAL=0), self.assertRaises(type(answers[-1])):
                gaffer.status_command(args)
            self.assertEqual(asked.call_count, len(answers))


class CliCommands(CliControlCase):
    """Of all commands: help, mistakes, endpoints."""

    def test_help(self):
        usage = r"\Ausage: gaffer.py %s \[options\]( \[?[A-Za-z|]+( \.\.\.)?\]?)*\n"
        everything = self.call("--help")
        for name, command in gaffer.COMMANDS.items():
            out = self.call(name, "--help")
            self.assertRegex(out, usage % name)
            for names, how in command.options:
                self.assertIn(names[-1] if names[0].startswith("-") else how["metavar"], out)
                self.assertIn(how["help"].split()[-1], out)
            self.assertRegex(everything, r"\n  %s +[a-z]" % name)
        self.assertEqual((self.call("-h"), self.call(status=2)), (everything, everything))
        self.assertEqual(self.call("--version"), "gaffer %s\n" % gaffer.__version__)

    def test_options_before_the_command(self):
        for words, name, rest in (
                ("-f up up", "up", "-f up"), ("--bind=x serve", "serve", "--bind=x"),
                ("--token-file start status", "status", "--token-file start")):
            self.assertEqual(gaffer.command_first(gaffer.COMMANDS, words.split()),
                             (name, rest.split()))

    def test_mistakes(self):
        self.calls(*[(words, "", 2, err) for words, err in (
            ("statsu", "gaffer: there is no command 'statsu', did you mean 'status'\\?\n"),
            ("--json x stop", "gaffer: there is no command 'x'.*\n"),
            ("stop --al x", r"usage: gaffer.py stop [\s\S]*--al\n"),
            ("attach x -n -1", r"usage: [\s\S]*lines\n"),
            *[("processes --endpoint " + endpoint, "gaffer: '.*' is not an endpoint: .*\n")
              for endpoint in ("ftp://x", "unix:", "http://x:99999", "http://[::1")])])

    def test_endpoints(self):
        """The default: that of `up` here, if it is this user's."""
        folder, path = self.folder(), "unix:" + gaffer.FOLDER_SOCKET
        self.enter(folder)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path[5:])
        self.calls(*[("processes --endpoint " + endpoint, "", 5, "gaffer: .*%s.*\n" % words)
                     for endpoint, words in (
                         (path, "connection refused"),
                         (self.server.url.replace("http", "https"), "is it http://\\?"))])
        with mock.patch("socket.socket.connect", side_effect=PermissionError):
            self.call("processes", "--endpoint", path, status=6,
                      err="gaffer: only the owner of %s and root may use it\n" % path)
        os.unlink(path[5:])
        server = Running(endpoints=[gaffer.HttpEndpoint(path)])
        self.addCleanup(server.stop_all)
        server.manager.add_process("here", "sleep 1000")
        self.calls(("processes --endpoint %d" % self.server.port, ""), ("processes", ""),
                   ("processes --endpoint " + path, "here\n"))
        os.environ["GAFFER_ENDPOINT"] = ""
        self.assertEqual(self.call("processes"), "here\n")
        with mock.patch("os.geteuid", return_value=-1):
            self.assertEqual(gaffer.find_endpoint(), gaffer.DEFAULT_ENDPOINT)
        server.manager.stop(kill=True)
        until(lambda: gaffer.find_endpoint() == gaffer.DEFAULT_ENDPOINT)

    def test_what_is_no_gaffer(self):
        """Or another version, or one that does not answer."""
        none = "gaffer: there is no gaffer at .*\n"
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                concurrent.futures.ThreadPoolExecutor(1) as pool:
            endpoint = ":%d" % listener.getsockname()[1]

            def serve_once(answer):
                with listener.accept()[0] as sock:
                    sock.recv(65536)
                    sock.sendall(answer)
            for command, answer, status, err in (
                    ("status", b"200 OK\r\n\r\nhi", 5, none), ("status", b"x", 5, none),
                    ("status", b"404 No\r\n\r\n{}", 5, none),
                    ("pids x", b"200 OK\r\n\r\n[1]", 1,
                     "gaffer: the answer of .* is not understood .*\n")):
                served = pool.submit(serve_once, b"HTTP/1.1 " * (len(answer) > 1) + answer)
                self.call(*command.split(), "--endpoint", endpoint, status=status, err=err)
                served.result(TIMEOUT)
            with self.assertRaisesRegex(gaffer.ClientError, "not answered in 0.05 seconds") as said:
                gaffer.Client(endpoint).request("GET", "/ping", timeout=0.05)
            self.assertEqual(said.exception.exit_status, 124)


class CliEveryCommand(CliControlCase):
    """Each command as a program of its own: all is well, a wrong name, no server, a token that is
    refused, and nobody who reads what it prints."""

    NAMED = "there is no process named 'nosuch'; 'gaffer.py status' lists them"
    GROUP = "there is no group 'nosuch': .*"
    TAKEN = ".*'ticker' is taken; update its template, or delete it"
    # arguments, and what is printed, @ being a template of this run alone; arguments with a wrong
    # name, and what comes of them
    TABLE = {
        "processes": ("", r"(.*\n)*@\n(.*\n)*", None),
        "status": ("@", r"NAME +STATE .*\n@\.1 +running +1/1 +\d+ .*\n1 template: 1 running\n"),
        "start": ("@", "@: already running\n"), "wait": ("@", "@: ready\n"),
        "stop": ("@", "@: stopped\n"), "restart": ("@", "@: restarted\n"),
        "add": ("@", "@: 2 processes\n"), "sub": ("@", "@: 0 processes\n"),
        "kill": ("@ CONT", "@: signalled CONT\n", "nosuch CONT", 4, NAMED),
        "running": ("@", "1\n"), "numprocesses": ("@", "1\n"), "pids": ("@", r"\d+\n"),
        "get_process": ("@", r'\{\n    "name": "@",\n(.*\n)*\}\n'),
        "add_process": ("@-new sleep 1", "@-new: added\n", "ticker sleep 1", 1, TAKEN),
        "load_process": ("new.json", "new: added\n", "ticker.json", 1, TAKEN),
        "update_process": ("@ sleep 2000", "@: updated\n", "nosuch sleep 1", 4, NAMED),
        "del_process": ("@", "@: deleted\n"), "logs": ("@", r"@\.1 \| line\n"),
        "attach": ("@", "line\n"),
        "watch": ("proc/ticker", r"[0-9:]{8} ticker: .*\n", "spawm", 1,
                  "there is no event type 'spawm', did you mean 'spawn'.*"),
        "reload": ("", "kept: kept\n", None),
        "load": ("@-new", "@-new:web: loaded\n", "@-new -c wep=2", 4,
                 "there is no 'wep', did you mean 'web'\\?"),
        "unload": ("@", "@:web: unloaded\n", "nosuch", 4, GROUP),
        "scale": ("@ web=2", "@:web: 2 processes\n", "nosuch web=2", 4, GROUP),
        "ps": ("@", r"NAME +STATE .*\n@:web\.1 +running +1/1 +\d+ .*\n1 template: 1 running\n",
               "nosuch", 4, GROUP),
        "export": ("ini @", r"; made from Procfile\n\n\[process:@:web\](.*\n)*",
                   "ini nosuch -f nosuch", 1, "there is no 'nosuch': name a Procfile .*"),
        "completion": ("bash", r"_gaffer\(\) \{(.*\n)*", "csh", 2, r"usage: [\s\S]*'csh'[\s\S]*"),
    }
    UNREAD = ("processes", "status", "logs", "attach", "watch", "export")   # write each so
    SAID = r"gaffer: attached to @\.1, os pid \d+: .*\n(gaffer: detached, @\.1 has ended\n)?"
    NO_SERVER = r"gaffer: there is no gaffer at .*start one with 'python3 gaffer\.py serve'.*\n"
    REFUSED = "gaffer: the server requires its token: pass it with --token-file .*\n"

    def setUp(self):
        super().setUp()
        self.home = self.folder()
        self.file(self.home, "Procfile", "web: read x; exit 3\n")
        for name in "ticker", "new":
            self.file(self.home, name + ".json", '{"name": "%s", "cmd": "true"}' % name)
        kept = gaffer.examine_template({"name": "kept", "cmd": "sleep 1000"})[0]
        settings = gaffer.Settings([], {"kept": kept}, [])
        gaffer.Configuration(lambda: settings).begin(self.server.manager)
        # watch has something to see at any time
        self.server.add("ticker", "sleep 0.1", flapping={"attempts": 1000, "window": 0.01})
        for name in self.TABLE:
            name = "x-" + name + ":web" * (name in ("ps", "scale", "unload"))
            self.server.add(name, "echo line; read x; exit 3", shell=True, redirect_input=True)
        for name in "logs", "attach", "watch":
            self.server.request("GET", "/streams/x-%s/stdout?since=0" % name)

    def run_cell(self, cell):
        """Run (command, template for @, arguments, environment, stdout, status, output, what is
        said on stderr)."""
        name, template, arguments, more, stdout, status, output, said = cell
        with ForkedCommand([name, *arguments.replace("@", template).split()], cwd=self.home,
                           stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE,
                           env={**self.env, "GAFFER_ENDPOINT": self.server.url, **more},
                           universal_newlines=True) as process:
            out = ""
            if status == -signal.SIGINT:
                out = process.stdout.readline()
                process.send_signal(signal.SIGINT)
            rest, err = process.communicate("\n", timeout=TIMEOUT)
        self.assertEqual(process.returncode, status, (cell, out or rest, err))
        for found, pattern in (out or rest or "", output), (err, said):
            self.assertRegex(found, r"\A%s\Z" % pattern.replace("@", template), cell)

    def test_every_cell(self):
        self.assertEqual({*self.TABLE, "serve", "up", "run"}, set(gaffer.COMMANDS))
        guarded = Running(token="s3cret")
        self.addCleanup(guarded.stop_all)
        read, write = os.pipe()
        os.close(read)
        self.addCleanup(os.close, write)
        nobody = {"GAFFER_ENDPOINT": "http://127.0.0.1:1"}
        refused = {"GAFFER_ENDPOINT": guarded.url, "GAFFER_TOKEN": "wrong"}
        cells = []
        for name, (words, output, *wrong) in self.TABLE.items():
            said = self.SAID if name == "attach" else ""
            rows = [(words, {}, {"attach": 3, "watch": -signal.SIGINT}.get(name, 0), output, said)]
            if wrong != [None]:
                bad, status, sentence = wrong or ("nosuch", 4, self.NAMED)
                sentence = sentence if status == 2 else "gaffer: %s\n" % sentence
                rows.append((bad, {}, status, "", sentence))
            if any("--endpoint" in names for names, _ in gaffer.COMMANDS[name].options):
                rows += [(words, nobody, 5, "", self.NO_SERVER),
                         (words, refused, 6, "", self.REFUSED)]
            cells += [(name, "x-" + name, *row[:2], subprocess.PIPE, *row[2:]) for row in rows]
            if name in self.UNREAD:
                cells.append((name, "x-watch", words, {}, write, 141, "", said))
        with concurrent.futures.ThreadPoolExecutor(max(2, gaffer.CORES)) as pool:
            list(pool.map(self.run_cell, cells))
        ask = ("processes", "--endpoint", guarded.url)
        self.call(*ask, "--token-file", self.file(self.home, "token", "s3cret\n"))
        os.environ["GAFFER_TOKEN"] = "s3cret"
        self.call(*ask)


class CliTerminal(CliFollowCase):
    """In a real terminal."""

    def test_progress_bar(self):
        """It is one line, also where the program pauses within a step."""
        self.server.add("a", "cat", redirect_input=True)
        process, main = self.terminal("logs", "-f")
        until(lambda: self.streams() == 1)
        for text, shown in ((b"10%", r"a\.1 \|\x1b\[0m 10%"), (b"\r", ""),
                            (b"20%", r"\x1b\[K\S+a\.1 \|\x1b\[0m 20%"), (b"\r", ""),
                            (b"30%\r40%\n", r"\x1b\[A\x1b\[K\S+a\.1 \|\x1b\[0m 40%\r\n"),
                            (b"x\n", r"\A\S+a\.1 \|\x1b\[0m x\r\n")):
            self.say("a", text)
            self.shows(main, shown)
        os.write(main, b"\x03")
        self.assertEqual(process.wait(TIMEOUT), 130)

    def test_status_does_not_fit(self):
        for number in range(20):
            self.server.add("x%d" % number, "true", start=False)
        process, main = self.terminal("status", "-w", rows=10, command=CLI_SCRIPT)
        for _ in range(2):                      # again each second
            self.shows(main, r"NAME .*\n.*x0 (.*\n){6}.*… 14 more lines do not fit.*\n.*20 temp")
        for rows in 0, 40:                      # 0: it has not been told its size
            self.resize(main, rows)
            self.shows(main, r"x19 .*\n.*20 templates: 20 stopped")
        os.write(main, b"\x03")
        self.assertEqual(process.wait(TIMEOUT), -signal.SIGINT)

    def test_colours(self):
        self.sleepers("web")
        for words, more, count in (("status", {}, 2), ("status --no-color", {}, 0),
                                   ("status", {"NO_COLOR": "1"}, 0)):
            _, main = self.terminal(*words.split(), **more)
            out = self.shows(main, r"[\s\S]*1 template: 1 running").group()
            self.assertEqual(out.count("\x1b["), count, out)

    def test_closed(self):
        self.server.add("a", "sh -c 'while echo line; do sleep 0.05; done'")
        procfile = self.file(self.folder(), "Procfile", "a: echo line; exec sleep 1000\n")
        for words, statuses in (("logs -f", {-signal.SIGHUP}), ("attach a", {129}),
                                ("up -f " + procfile, {0, 129})):   # which may see its output end
            process, main = self.terminal(*words.split())
            self.shows(main, "line")
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), main)         # nobody has the terminal any more
            self.assertIn(process.wait(TIMEOUT), statuses, words)

    def test_attach(self):
        """Ctrl-C goes to the process, Ctrl-] leaves it, Ctrl-\\ is text."""
        self.server.add("a", "cat", redirect_input=True)
        self.server.add("deaf", "trap 'printf \"int> \"' INT; printf '> '; while :; do sleep 0.05;"
                        " done", shell=True)
        process, main = self.terminal("attach", "a")
        self.shows(main, r"attached to a\.1, os pid \d+: Ctrl-\] leaves it running, Ctrl-C goes to")
        os.write(main, b"typed\x1c\n")
        self.shows(main, r"typed\^\\\r\n(?s:.*)typed\x1c\r\n")
        settings = termios.tcgetattr(main)
        settings[6][termios.VQUIT] = b"\x1c"    # as a shell does after Ctrl-Z
        termios.tcsetattr(main, termios.TCSADRAIN, settings)
        process.send_signal(signal.SIGCONT)
        until(lambda: termios.tcgetattr(main)[6][termios.VQUIT] == b"\x1d")
        os.write(main, b"\x1d")
        self.shows(main, r"gaffer: detached, a\.1 is still running\r\n")
        self.assertEqual(process.wait(TIMEOUT), 0)
        process, main = self.terminal("attach", "deaf")
        self.shows(main, "its stdin is /dev/null(?s:.*)> ")
        os.write(main, b"\x03")
        self.shows(main, "int> ")
        self.server.ok("POST", "/processes/deaf/_signal/KILL")
        self.shows(main, "\r\ngaffer: detached, deaf.1 has ended\r\n")
        self.assertEqual(process.wait(TIMEOUT), 137)

    def test_up(self):
        folder = self.folder()
        procfile = self.file(folder, "Procfile", "a: trap '' TERM; echo ready; >r; read x\n"
                             "b: until rm r 2>&-; do sleep 0.1; done\n")
        process, main = self.terminal("up", "-f", procfile)
        self.shows(main, r"system \| listening on unix:%s/.gaffer.sock\r\n" % re.escape(folder))
        self.shows(main, "\x1b\\[36m[0-9:]{8} a.1    \\|\x1b\\[0m ready")
        self.shows(main, r"waiting for a\.1, SIGKILL in 10 s; Ctrl-C again kills now\r\n")
        os.write(main, b"\x03")
        self.shows(main, r"a\.1 was ended by SIGKILL\r\n")
        self.assertEqual(process.wait(TIMEOUT), 0)
        self.assertEqual(os.listdir(folder), ["Procfile"])


class CliLogs(CliFollowCase):

    def test_last_lines(self):
        """In the order in which they came."""
        self.server.add("a", "printf '1\\n2\\n3\\n'", restart="never")
        self.server.add("two", "echo $GAFFER_INSTANCE", shell=True, numprocesses=2, restart="never")
        self.server.add("long", "echo two >&2; read x; echo one; read x; echo three >&2; read x",
                        shell=True, redirect_input=True)
        for line in "two", "one", "three":
            until(lambda: self.call("logs", "long").endswith(line + "\n"))
            self.say("long", b"\n" if line != "three" else b"")
        for name in "a", "two":
            self.server.wait_event("proc/%s/done" % name)
        self.calls(("logs -n 1 a long", "a.1    | 3\nlong.1 | one\nlong.1 | three\n"),
                   ("logs -n all a", "a.1 | 1\na.1 | 2\na.1 | 3\n"),
                   ("logs --since 1h long.1 -n1 --no-prefix", "one\nthree\n"),
                   ("logs 4", "long.1 | two\nlong.1 | one\nlong.1 | three\n"),
                   ("logs -f 1 -n 1", "a.1 | 3\n"),
                   ("logs nosuch a -n 1", "a.1 | 3\n", 4, "gaffer: .*nosuch.*\n"),
                   ("logs --since 0s", ""), ("logs -f nosuch", "", 4, "gaffer: .*nosuch.*\n"))
        self.assertIn("two.2  | 2\n", self.call("logs"))
        out = self.call("logs", "-t", "-n1", "a")
        self.assertRegex(out, r"\A[0-9-]{10} [0-9:]{8} a\.1 \| 3\n\Z")
        line = json.loads(self.call("logs", "--json", "-n1", "a"))
        self.assertLess(abs(time.time() - line.pop("time")), TIMEOUT)
        self.assertEqual(line, {"name": "a", "pid": 1, "label": "stdout", "data": "3"})
        # more lines than one answer holds
        self.server.add("longer-than-a-line", "seq 200000", restart="never")
        self.server.wait_event("proc/longer-than-a-line/done")
        self.calls(("logs -n1 --no-prefix longer-than-a-line", "200000\n"))

    def test_merge_lines(self):
        """Unfinished ones are continued; form feeds and U+2028 end none."""
        for texts, count, shown in (
                (["stdout+ 50%", "stderr x", "stdout  done"], math.inf, ["50% done", "x"]),
                (["stdout+ 10", "stdout %", "stdout+< 20", "stdout %", "stdout< 30%", "stdout x"],
                 2, ["30%", "x"]),
                (["stdout a\x0cb\u2028c d"], math.inf, ["a\x0cb\u2028c d"])):
            lines = [gaffer.JournalLine("1.5 a " + text) for text in [
                "0 stdout old", *map("1 ".__add__, texts)]]
            merged = gaffer.merge_lines(lines, count, dict.fromkeys((0, 1)))
            self.assertEqual([line.text for line in merged], ["old"] * (count == math.inf) + shown)

    def test_unfinished_line(self):
        """It is continued as it comes."""
        for name in "a", "b":
            self.server.add(name, "cat", redirect_input=True)
        follower = self.follow("logs", "-f")
        until(lambda: self.streams() == 1)
        for name, text, shown in (("a", b"50%", b"a.1 | 50%"), ("a", b" 60%", b" 60%"),
                                  ("b", b"x\n", b"\nb.1 | x\n"), ("a", b" 70%\n", b"a.1 |  70%\n")):
            self.say(name, text)
            self.assertEqual(follower.stdout.read(len(shown)), shown)
        self.assertEqual(self.interrupted(follower), b"")

    def test_follow(self):
        def add():
            self.server.add("a", "echo started; exec cat", shell=True, redirect_input=True)
        follower = self.follow("logs", "-f", "all")
        add()
        self.assertEqual(follower.stdout.readline(), b"a.1 | started\n")
        named = self.follow("logs", "-f", "a", "--no-prefix")
        self.assertEqual(named.stdout.readline(), b"started\n")
        until(lambda: self.streams() == 2)
        self.cut()
        lines = [b"%d\n" % number for number in range(100)]
        for line in lines:
            self.say("a", line)
        self.assertEqual([named.stdout.readline() for _ in lines], lines)
        for line in lines:                      # the output goes with the template
            self.assertEqual(follower.stdout.readline(), b"a.1 | " + line)
        self.server.ok("DELETE", "/processes/a")
        add()
        self.assertEqual(named.stdout.readline(), b"started\n")
        self.assertEqual(follower.stdout.readline(), b"a.1 | started\n")
        self.interrupted(follower)
        named = self.follow("logs", "-f", "a*", "-n1", "--no-prefix")
        self.assertEqual(named.stdout.readline(), b"started\n")
        self.server.add("ab", "echo another")
        self.assertEqual(named.stdout.readline(), b"another\n")


class CliWatch(CliFollowCase):

    def test_events(self):
        everything, exits = self.follow("watch"), self.follow("watch", "--json", "proc.a.exit")
        until(lambda: self.streams() == 2, "both watch")
        self.sleepers("a", "b")
        with http_limits(REQUESTS_MAX=1):       # a has ended before b is told to
            self.call("stop", "all")
        text = b"".join(everything.stdout.readline() for _ in range(12)).decode()
        self.assertRegex(text, r"\A\d\d:\d\d:\d\d a: create\n[\d:]+ a: start\n[\d:]+ a: spawn "
                               r"\(pid 1, os pid \d+\)\n[\s\S]* a: exit .*\n[\d:]+ b: stop\n.*\n"
                               r"[\d:]+ b: exit \(pid 2, .*, signal 15\)\n\Z")
        event = json.loads(exits.stdout.readline())
        self.assertEqual((event["event"], event["name"]), ("exit", "a"))
        self.assertEqual((self.interrupted(everything), self.interrupted(exits)), (b"", b""))

    def test_cut(self):
        """Before its first event, it goes on where it was; also where nothing comes any more."""
        self.sleepers("old")
        watcher = self.follow("watch", "proc.new.a")
        until(lambda: self.streams() == 1)
        self.cut()
        self.sleepers("new.a")
        self.assertIn(b"new.a: create", watcher.stdout.readline())
        self.interrupted(watcher)
        with http_limits(STREAM_TIME=2):
            events = gaffer.Client(self.server.url).events("/watch/done?feed=eventsource")
            self.assertEqual(len(list(events)), 1)

    def test_losses(self):
        """Also what logs says of them."""
        event = '{"event": "dropped", "id": "9@e", "bytes": 7, "events": 3%s}'
        events = [("dropped", event % more) for more in ("", ', "restarted": true')]
        with http_limits(follow_events=lambda *_: events):
            self.call("watch", err="gaffer: 3 events were lost\ngaffer: the server has restarted\n")
        events.append(("line", "1.5 a 1 stdout+ and on"))
        with http_limits(follow_events=lambda *_: events):
            out = self.call("logs", "-f", "-n0", err="gaffer: 7 bytes were lost\n")
        self.assertEqual(out, "a | and on")


class CliAttach(CliFollowCase):
    """attach, without a terminal; see CliTerminal."""

    def test_signals(self):
        """INT is for the process; others end the command, which shows the last lines first."""
        self.server.add("a", "trap 'echo interrupted' INT; trap 'seq 200000' USR1; "
                        "printf 'a\\nb\\n> '; while :; do sleep 0.05; done", shell=True,
                        redirect_input=True)
        shown = b"a\nb\n> "
        for words, signum, status in (("a", signal.SIGQUIT, 0), ("a.1 -n 1", signal.SIGTERM, 143)):
            process = self.follow("attach", *words.split())
            lines = b"> interrupted\n" if "-n" in words else shown
            self.assertEqual(process.stdout.read(len(lines)), lines)
            until(lambda: self.streams() == 3, "all three have begun")
            process.send_signal(signal.SIGINT)
            line = process.stdout.readline()
            self.assertEqual(line, b"interrupted\n", line or process.communicate(timeout=TIMEOUT))
            shown += b"interrupted\n"
            process.send_signal(signum)
            self.assertEqual((process.stdout.read(), process.wait(TIMEOUT)), (b"", status))
            until(lambda: not self.streams(), "it is gone")
        process = self.follow("attach", "1")
        self.assertEqual(process.stdout.read(len(shown)), shown)
        until(lambda: self.streams() == 3)
        self.cut()                              # it goes on where it was
        self.server.ok("POST", "/processes/1/_signal/INT")
        line = process.stdout.readline()
        self.assertEqual(line, b"interrupted\n", line or process.communicate(timeout=TIMEOUT))
        process.send_signal(signal.SIGSTOP)     # or where the window begins by now
        until(lambda: process_state(process.pid) == "T")
        self.cut()
        self.server.ok("POST", "/processes/1/_signal/USR1")
        until(lambda: int(self.server.request("HEAD", "/streams/1/stdout")[1]["Gaffer-Offset"])
              > 1.1 * gaffer.MIB)
        process.send_signal(signal.SIGCONT)
        self.assertIn(b"attached", process.stderr.readline())
        self.assertRegex(process.stderr.readline(), rb"\Agaffer: \d+ bytes were lost\n\Z")

    def test_input_that_waits(self):
        text = bytes(3 * gaffer.MIB)
        self.server.add("a", python(STREAMS_SLEEPER.format(size=len(text))), redirect_input=True)
        process = self.follow("attach", "a", stdin=subprocess.PIPE)
        self.assertEqual(process.stdout.readline(), b"ready\n")
        writer = threading.Thread(target=process.stdin.write, args=(text,))
        writer.start()
        manager = self.server.manager
        until(lambda: manager.loop.call(lambda: manager.processes[1].inputs["stdin"].size)
              > gaffer.MIB - gaffer.READ_SIZE, "a full input")
        self.server.ok("POST", "/processes/1/_signal/USR1")
        self.assertEqual(process.stdout.readline(), streams_digest(text))
        writer.join()


class CliReady(CliFollowCase):
    """wait, --ready, and what is told to systemd."""

    def test_wait(self):
        """Until all is so, never will be (with the last lines), or takes too long."""
        for name in "good", "bad":
            self.server.add(name, "read line; echo last words; exit $line", shell=True,
                            redirect_input=True, restart="never")
        self.sleepers("slow", ready={"exec": "false"})
        self.sleepers("web", after=["bad"])
        self.server.add("timer", "echo oh; exit 3", shell=True, schedule="every 1h")
        waiting = self.follow("wait", "good", "bad", "--for", "done")
        self.say("good", b"0\n")
        self.assertEqual(waiting.stdout.readline(), b"good: done\n")
        self.say("bad", b"3\n")
        out, err = waiting.communicate(timeout=TIMEOUT)
        self.assertEqual((waiting.returncode, out, err), (
            1, b"", b"gaffer: 'bad' has failed: exit status 3; its last lines:\n"
                    b"gaffer: last words\n"))
        late = r"gaffer: '%s' is not %s in the time given; it goes on%s\n"
        self.calls(
            ("wait g* bad --for stopped", "good: stopped\nbad: stopped\n"),
            ("wait slow good --timeout 0.1", "good: ready\n", 124,
             late % ("slow", "ready", "(; its last check: exits with 1)?")),
            ("start bad --ready --timeout 0.1", "bad: started\n", 124, late % ("bad", "done", "")),
            ("start timer --ready", "timer: started\n", 1,
             "gaffer: 'timer' has failed: .*\ngaffer: oh\n"),
            ("start --ready web --timeout 0.1", "web: started\n", 124,
             late % ("web", "ready", "; it waits for bad")))

    PROCFILE = """\
        # gaffer: after=migrate ready="log:is up within=20"
        web: echo web is up; exec sleep 1000
        # gaffer: restart=never
        #gaffer: after=db

        migrate: exit $STATUS
        # gaffer: ready=exec:true
        db: sleep 1000
        """

    def test_load(self):
        folder = self.folder()
        path = self.file(folder, "Procfile", textwrap.dedent(self.PROCFILE))
        self.file(folder, ".env", "STATUS=0\n")
        load = "load app --ready -f " + path
        loaded = "app:web: loaded\napp:migrate: loaded\napp:db: loaded\n"
        self.calls((load, loaded + "app:web: ready\napp:migrate: done\napp:db: ready\n"))
        self.call("unload", "app", "-f", path)
        self.file(folder, ".env", "STATUS=3\n")
        why = r"gaffer: (.* and )?'app:migrate' has failed: exit status 3\n"
        self.calls((load, loaded + "app:db: ready\n", 1, 2 * why))
        self.file(folder, "Procfile", "# gaffer: after=web\ndb: sleep 1000\nweb: sleep 1000\n"
                  "# gaffer: start=false\nlater: true\n# gaffer: restart=never\nnone: true\n")
        self.calls((load + " -c none=0", "app:web: updated\napp:db: updated\napp:later: loaded\n"
                    "app:none: loaded\napp:migrate: removed\n"
                    "app:db: ready\napp:web: ready\napp:none: ready\n"))

    def test_systemd_is_told(self):
        """When all are ready, that it lives, and its end; nothing by its children."""
        name = "gaffer-test-%d" % os.getpid()
        path = self.file(self.folder(), "gaffer.ini",
                         "[process:a]\nredirect_input = true\nready = log:up.\n"
                         "cmd = sh -c 'read line; echo up.$NOTIFY_SOCKET; exec sleep 1000'\n")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind("\0" + name)
            systemd.settimeout(TIMEOUT)
            server = self.start(path, env=dict(self.env, NOTIFY_SOCKET="@" + name,
                                               WATCHDOG_USEC="100000"))
            messages = iter(lambda: systemd.recv(100), None)

            def beats_until(end):
                seen = set(itertools.takewhile(lambda message: message != end, messages))
                self.assertLessEqual(seen, {b"WATCHDOG=1"})
            self.assertEqual(next(messages), b"WATCHDOG=1")
            server.ok("DELETE", "/streams/a/stdin")
            beats_until(b"READY=1")
            self.assertEqual(next(messages), b"WATCHDOG=1")
            self.assertEqual(server.request("GET", "/streams/a/stdout?since=0")[2], b"up.\n")
            server.process.send_signal(signal.SIGTERM)
            beats_until(b"STOPPING=1")
            server.stop(None)

    def test_systemd_unit(self):
        """What a template's fields are in a unit file."""
        info = gaffer.check_template({
            "name": "x", "cmd": "x", "restart": "on-failure", "success": [0, 3, "INT"],
            "stop_signal": [["INT", 5], ["TERM", 2.5]], "stop_group": False, "umask": "027",
            "limits": {"nofile": [100, 200], "core": "unlimited"}, "restart_delay": 2,
            "env_file": ["/a%b"], "before_start": 'echo $A "x"'})
        self.assertEqual(gaffer.systemd_service(info), [
            "# left out: stop_signal = INT=5 TERM=2.5",
            "Restart=on-failure", "RestartSec=2", "KillSignal=SIGINT", "KillMode=mixed",
            "TimeoutStopSec=7.5", "SuccessExitStatus=0 3 SIGINT", "UMask=027",
            'ExecStartPre=/bin/sh -c "echo $$A \\"x\\""', "LimitCORE=infinity:infinity",
            "LimitNOFILE=100:200", "EnvironmentFile=/a%%b"])


POSTGRES = max(glob.glob("/usr/lib/postgresql/*/bin"), default=None)    # its programs


@unittest.skipUnless(POSTGRES, "PostgreSQL is not installed")
class CliDatabase(CliControlCase):
    """A database, a migration, a web server and a worker, each after the one before it."""

    quick = False
    FILE = """\
        [process:worker]
        cmd = sh -c 'echo worker is %(worker)s; exec sleep 1000'
        ready = log:is up within=%(within)s
        restart = never
        after = web

        [process:web]
        cmd = %(web)s
        restart = never
        ready = http://127.0.0.1:%(port)d/
        after = migrate

        [process:migrate]
        cmd = %(programs)s/psql -h 127.0.0.1 -p %(db)d -U me -c "%(sql)s" postgres
        restart = %(again)s
        after = db

        [process:db]
        cmd = %(programs)s/postgres -D %(home)s/%(data)s -p %(db)d -h 127.0.0.1 -k '' -F
        restart = never
        ready = tcp:%(db)d within=60
        after = init
        %(user)s

        [process:init]
        cmd = %(programs)s/initdb -D %(home)s/data -U me -A trust -N
        restart = never
        %(user)s
        """
    NAMES = ("db", "migrate", "web", "worker")

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory(dir="/var/tmp")    # another user may enter it
        self.addCleanup(folder.cleanup)
        self.home, port, user = folder.name, free_port(), ""
        os.chmod(self.home, 0o711)
        os.mkdir(self.home + "/data")
        if os.geteuid() == 0:                   # as which PostgreSQL refuses to run
            user = "uid = nobody"
            shutil.chown(self.home + "/data", "nobody")
        self.good = {
            "programs": POSTGRES, "home": self.home, "user": user, "data": "data",
            "db": free_port(), "sql": "create table if not exists t (x int)", "port": port,
            "web": "%s -m http.server --bind 127.0.0.1 %d" % (PYTHON, port), "worker": "up",
            "within": 60, "again": "on-failure"}
        path = self.file(self.home, "gaffer.ini", "")
        gaffer.Configuration(lambda: gaffer.read_settings(path)).begin(self.server.manager)

    def load(self, **changes):
        """Make it run what FILE says, with what is good but for `changes`."""
        text = textwrap.dedent(self.FILE) % dict(self.good, **changes)
        self.file(self.home, "gaffer.ini", text)
        self.call("reload")

    def test_all_come_up_in_order(self):
        self.load()
        self.assertEqual(self.call("wait", *self.NAMES),
                         "db: ready\nmigrate: ready\nweb: ready\nworker: ready\n")
        events, spawned = self.server.events("spawn"), []
        while "worker" not in spawned:
            spawned.append(next(events)["name"])
        self.assertEqual(list(dict.fromkeys(spawned)), ["init", *self.NAMES])

    def test_each_fails_in_turn(self):
        """`status` and `wait` say why; once it is mended, the others go on."""
        def states():
            return " ".join(self.server.ok("GET", "/status/" + name)["state"]
                            for name in self.NAMES)

        for changes, wanted, why in (
                ({"data": "no"}, "failed waiting waiting waiting",
                 "'db' has failed: exit status 2; its last lines:\n.*could not access"),
                ({"sql": "select pg_sleep(60)"}, "running running waiting waiting", None),
                ({"sql": "nonsense", "again": "never"}, "running failed waiting waiting",
                 "'migrate' has failed: exit status 1; its last lines:\n[\\s\\S]*nonsense"),
                ({"web": "sh -c 'echo no route; exit 4'"}, "running done failed waiting",
                 "'web' has failed: exit status 4; its last lines:\ngaffer: no route"),
                ({"worker": "slow", "within": 1}, "running done running failed",
                 "'worker' has failed: not ready .*; its last lines:\ngaffer: worker is slow")):
            self.load(**changes)
            until(lambda: states() == wanted, wanted)
            if "running" in wanted:         # PostgreSQL listens before it lets anybody in
                until(lambda: b"ready to accept" in self.server.request(
                    "GET", "/streams/db/stderr?since=0")[2])
            table = self.call("status", status=3)
            for before, name, state in zip(("init", *self.NAMES), self.NAMES, wanted.split()):
                if state == "waiting":
                    self.assertRegex(table, "(?m)^%s .*waits for %s$" % (name, before))
                if state in ("failed", "waiting"):
                    self.call("wait", name, *["--timeout", "0.1"] * (why is None),
                              status=1 if why else 124,
                              err=r"gaffer: .*%s[\s\S]*" % (why or "; it goes on"))
            until(lambda: states() == wanted, wanted + ", still")
        self.load()
        self.call("wait", *self.NAMES)


class ConfigCase(CliControlCase):
    """Files in a folder of the test's own."""

    def setUp(self):
        self.home = self.folder()               # goes when the server has gone
        super().setUp()

    def write(self, name, text, mode=0o600):
        os.makedirs(os.path.dirname(os.path.join(self.home, name)), exist_ok=True)
        return self.file(self.home, name, textwrap.dedent(text), mode)

    def settings(self, name, text):
        return gaffer.read_settings(self.write(name, text))

    def faults(self, name, text):
        with self.assertRaises(gaffer.ConfigError) as caught:
            self.settings(name, text)
        return str(caught.exception).replace(self.home + "/", "").split("\n")


class ConfigFiles(ConfigCase):
    """INI, JSON, TOML."""

    # of [process:a]: how it is written, what it comes to; @ is the file's folder
    FIELDS = r"""
        cmd = sh -c 'echo %d "$HOME"' -> "sh -c 'echo %d \"$HOME\"'"
        args = a 'b c' -> "a 'b c'"
        env = A=1, B="x, y" PURE_SET, NO C= -> {"A": "1", "B": "x, y", "PURE_SET": "set", "C": ""}
        cwd = . -> "@/."
        uid = -> null
        shell = off -> false
        numprocesses = 2 -> 2
        detach = 0 -> false
        start = false -> false
        redirect_output = out, err -> ["out", "err"]
        redirect_input = yes -> true
        custom_streams = one two -> ["one", "two"]
        graceful_timeout = 2.5 -> 2.5
        stop_signal = INT=5, TERM=2.5 -> [["INT", 5], ["TERM", 2.5]]
        stop_group = no -> false
        env_file = a.env "b c.env" -> ["@/a.env", "@/b c.env"]
        umask = 027 -> "027"
        limits = nofile=100:unlimited core=0 -> {"nofile": [100, "unlimited"], "core": 0}
        before_start = mkdir -p x; true -> "mkdir -p x; true"
        success = 0, 3 TERM -> [0, 3, "TERM"]
        restart_delay = 1, 2.5 -> [1, 2.5]
        after = b, g:b -> ["b", "g:b"]
        ready = log:it is up within=2.5 -> {"log": "it is up", "within": 2.5}
        flapping = 3, 1., .5, 4 -> {"attempts": 3, "window": 1, "retry_in": 0.5, "max_retry": 4}
        """
    INI = """
        ; a comment
        [gaffer]
        http_endpoints = public, other
        [endpoint:public]
        bind = 127.0.0.1:0
        backlog = 7
        [endpoint:other]
        bind = unix:socket
        [endpoint:unused]
        bind = 127.0.0.1:1
        [webhooks]
        create = http://localhost:1/x
        proc.a.exit = https://localhost/y?z=1
        [env:a]
        PORT = 80
        lower = x=y
        [process:g:b]
        cmd = sleep
            1000
        [process:a]
        """

    def test_ini(self):
        pure_environ(self, PURE_SET="set", NO=None)
        rows = [line.split(" -> ") for line in textwrap.dedent(self.FIELDS).split("\n")[1:-1]]
        text = textwrap.dedent(self.INI) + "\n".join(left for left, _ in rows)
        found = self.settings("gaffer.ini", text)
        wanted = {left.split(" =")[0]: json.loads(right.replace("@", self.home))
                  for left, right in rows}
        wanted["env"].update(PORT="80", lower="x=y")
        b, a = found.templates["g:b"], found.templates["a"]
        self.assertEqual(a, dict(PureTemplates.DEFAULTS, **wanted, name="a"))
        self.assertEqual((b["cmd"], b["cwd"]), ("sleep\n1000", self.home))
        self.assertEqual([(endpoint.bind, endpoint.backlog) for endpoint in found.endpoints], [
            ("127.0.0.1:0", 7), ("unix:%s/socket" % self.home, gaffer.BACKLOG)])
        self.assertEqual(found.webhooks, [
            ("create", "http://localhost:1/x"), ("proc/a/exit", "https://localhost/y?z=1")])

    def test_json(self):
        a, b = ({"name": name, "cmd": "true"} for name in "ab")
        sections = {"endpoint": {"x": {"bind": "127.0.0.1:0"}}, "gaffer": {"http_endpoints": ["x"]},
                    "process": {"b": {"cmd": "true"}}, "env": {"b": {"PORT": 80}}}
        for value, names in (a, ["a"]), ([a, b], ["a", "b"]), (sections, ["b"]):
            found = self.settings("x.json", json.dumps(value))
            self.assertEqual(list(found.templates), names)
        self.assertEqual((found.templates["b"]["env"], found.endpoints[0].bind),
                         ({"PORT": 80}, "127.0.0.1:0"))

    def test_included_files(self):
        for name in ("conf.d/b", "conf.d/deep/c", "e/1", "conf.d/.#x", "conf.d/.z/z"):
            self.write(name + ".ini", "[process:%s]\ncmd = true\n" % name.replace("/", ":"))
        self.write("conf.d/Procfile", "web: true\nother: true\n")
        self.write("h/Procfile", "clock: true")
        self.write("f.ini", "[env:a]\nX = 1\n[endpoint:x]\nbind = 127.0.0.1:5140\n")
        pure_environ(self, PORT=None)
        found = self.settings("a.ini", """
            [gaffer]
            include = conf.d/Procfile h/Procfile f.ini e/*.ini
            include_dir = conf.d
            [process:a]  ; [b]
            cmd = true
            """).templates
        places = {name: os.path.relpath(info["cwd"], self.home) for name, info in found.items()}
        self.assertEqual(places, {
            "a": ".", "e:1": "e", "conf.d:b": "conf.d", "conf.d:deep:c": "conf.d/deep",
            "web": "conf.d", "other": "conf.d", "clock": "h"})
        self.assertEqual(found["a"]["env"], {"X": "1"})
        self.assertEqual([found[name]["env"]["PORT"] for name in ("web", "other", "clock")],
                         ["5000", "5200", "5300"], "no port twice, and none that gaffer has")

    # == FILE, its text, each line with its faults; an * stands for anything
    FAULTS = """
        == all.ini
        junk -> 'junk' is neither [section] nor 'name = value' in a section
          more
        [gaffer]
        http_endpoints = public, nix -> field 'http_endpoints': there is no [endpoint:nix]
        include_dir = nothing -> field 'include_dir' names 'nothing', which is not a folder
        include = b.ini b.ini x -> field 'include': b.ini is * already -> field 'include': x: cannot be *
        [endpoint:public]
        bind = 127.0.0.1 -> field 'bind': *
        bind=1 -> 'bind' is there twice
        [proces:dummy] -> there is no section with this name; there are *
        [process:dummy] -> field 'cmd' is required
        comand = ./dummy.py -> unknown field 'comand', did you mean 'cmd'?
        env = A='1 -> field 'env' cannot be split into words: no closing quotation
        flapping = 1 2 3 4 5 -> field 'flapping' must have no more than *
        name = other -> field 'name' is 'other': leave it out
        [process:a]
        cmd = nosuchprog -> field 'cmd' names 'nosuchprog', which is not found in PATH
        after = a -> field 'after' makes a circle: a after a
        [process:a] -> '[process:a]' is there twice
        [process:c]
        cmd = true
        env_file = no.env -> field 'env_file' names '*no.env', which cannot be read: *
        [env:x] -> there is no [process:x]
        [webhooks]
        creat = http://x -> field 'creat': there is no event type 'creat', did you mean 'create'?*
        stop = http://a:b@c/ -> field 'stop': 'http://a:b@c/' is not a URL such as http://host:port/path
        flap = http://x/ü -> field 'flap': 'http://x/ü' is not a URL such as http://host:port/path
        [process] -> there is no section with this name; there are *
         -> b.ini:1: [process:a] this section is in all.ini too
        == tree.json
        {"process": -> 'cmd' is there twice in one object
         {"web": {"cmd": "true",
         "numprocesses": "x"}, -> [process:web] field 'numprocesses' must be a whole number from *
        "db":
        {"cmd": 5, "cmd": 5}, -> [process:db] field 'cmd' must be a string
        "e": {"cmd": "true"}},
        "env": {"e": {"A": 1},
        "web": {"X": []}}, -> [env:web] has a variable 'X' that is not a string *
        "gaffer": {
        "include": ["a\\u0000"], -> [gaffer] field 'include' must not hold a NUL character*
        "include_dir": 5}, -> [gaffer] field 'include_dir' must be a list of strings, or a string
        "endpoint": {"x": {"bind": "127.0.0.1:0",
        "certfile": 5}, -> [endpoint:x] field 'certfile' must be a string
        "y": 1}} -> [endpoint:y] must be an object
        == null.json
        {"process": null} -> [process] must be an object
        == syntax.json
        {"a":
        1,} -> cannot be parsed: *
        == list.json
        [{"name": "a", "cmd": "true"}, -> must be sections, a template, or a list of templates *
        {"name": "b", "cmd": "x", "cwd": 5}, -> [process:b] field 'cwd' *
        {"name": "a", "cmd": "x"}]
        == tree.toml
        [process.'g:b'] -> [process:g:b] field 'cmd' is required
        shell = 1 -> [process:g:b] field 'shell' must be true or false
        == Procfile
        web: true
        junk -> 'junk' is not 'type: command'
        web: x -> 'web' is there twice
        # gaffer: afer=b -> 'afer' is no field *, did you mean 'after'?
        # gaffer: cmd=x -> 'cmd' is no field *'cwd'?
        # gaffer: ready='x -> the comment cannot be split into words: no closing quotation
        # gaffer: shell ready=udp:1
        7: true -> [process:7] field 'name' * -> [process:7] field 'ready' * -> [process:7] field 'shell' *
        """

    def test_all_faults_at_once(self):
        self.write("b.ini", "[process:a]\ncmd = true\n")
        for part in textwrap.dedent(self.FAULTS).split("== ")[1:]:
            (name, *rows), text, section, wanted = part.splitlines(), "", "", []
            for number, row in enumerate(rows, 1):
                line, *faults = row.split(" -> ")
                text += line + "\n"
                section = line + " " if re.fullmatch(r"\[[a-z:]+\]", line) else section
                wanted += [fault if ".ini:" in fault else "%s:%d: %s%s" % (
                    name, number, section, fault) for fault in faults]
            if name.endswith(".toml") and sys.version_info < (3, 11):
                wanted = ["tree.toml:1: Python * reads no TOML: use 3.11, INI or JSON"]
            with self.subTest(name):
                for pair in itertools.zip_longest(self.faults(name, text), wanted, fillvalue=""):
                    pattern = re.escape(pair[1]).replace(r"\*", ".*")
                    self.assertRegex(pair[0], r"\A%s\Z" % pattern)
        many = "".join("[x%d]\n" % number for number in range(200))
        self.assertEqual(len(self.faults("many.ini", many)), 200)
        with http_limits(INCLUDES_MAX=1):
            found, = self.faults("x.ini", "[gaffer]\ninclude = b.ini")
        self.assertEqual(found, "x.ini:2: [gaffer] field 'include': b.ini is one of more than 1 files")

    def test_files_that_cannot_be_read(self):
        path = self.write("x.ini", "[process:a]\ncomand = x\n")
        with open(self.home + "/latin", "wb") as file:
            file.write(b"\xe4")
        for name, words in (
                ("/dev/zero", ": .*over 1048576.*"), (self.write("nul", "\0"), ": .* a NUL .*"),
                (file.name, ": cannot be read: byte 1 is not UTF-8"),
                (path, ":1: [^\n]*\ngaffer: .*x.ini:2: .*, did you mean 'cmd'.*")):
            self.call("serve", name, status=1, err="gaffer: %s%s\n" % (name, words))


class ConfigSupervisord(ConfigCase):
    """supervisord.conf."""

    TEXT = """
        [unix_http_server]
        [supervisord]
        environment=A=1,B=2
        [rpcinterface:supervisor]
        [supervisorctl]

        [program:web]
        command=/bin/sleep %(process_num)d %(numprocs)d %(ENV_B)s   ; each its own
        process_name=%(program_name)s_%(process_num)02d
        numprocs=%(ENV_PURE_COUNT)s
        numprocs_start=7
        directory=%(here)s
        umask=022
        priority=5
        autorestart=true
        startsecs=2
        startretries=1
        stopsignal=QUIT
        stopwaitsecs=7
        stopasgroup=true
        redirect_stderr=true
        stdout_logfile=/tmp/web.log
        environment = A = "1,2 = 3",PORT="80%(process_num)02d",
            HOME="%(ENV_PURE_HOME)s"

        [program:job]
        command=sh -c 'echo $HOME 100%%'
        exitcodes=0,2
        startsecs=0
        serverurl=AUTO

        [eventlistener:mail]
        [group:g]
        programs=job, x
        [include]
        files = more/*.conf
        """

    def test_programs(self):
        pure_environ(self, PURE_HOME="/h", PURE_COUNT="2", PURE_AGAIN="unexpected")
        self.write("more/c.conf", "[inet_http_server]\nport=9001\n")
        self.write("more/b.conf", "[program: x ]\ncommand=sleep 1\nstartretries=9999\n"
                   "autorestart=%(ENV_PURE_AGAIN)s")
        with self.assertLogs("gaffer", "WARNING") as logged:
            templates = self.settings("supervisord.conf", self.TEXT).templates
        self.assertEqual(list(templates), ["web:web_07", "web:web_08", "g:job", "g:x"])
        _, web, job, x = templates.values()
        self.assertEqual(web, dict(
            PureTemplates.DEFAULTS, name="web:web_08", cmd="/bin/sleep 8 2 2", cwd=self.home,
            umask="022", priority=5, restart_delay=1, stop_signal="QUIT", graceful_timeout=7,
            flapping={"attempts": 2, "window": 3.0, "retry_in": 7.0, "max_retry": 0},
            redirect_output=["stdout"] * 2,
            env={"A": "1,2 = 3", "B": "2", "PORT": "8008", "HOME": "/h"}))
        self.assertEqual(job, dict(
            PureTemplates.DEFAULTS, name="g:job", cmd="sh -c 'echo $$HOME 100%'",
            cwd=os.getcwd(), restart="on-failure", success=[0, 2], stop_group=False, priority=999,
            env={"A": "1", "B": "2"}))
        self.assertEqual((x["flapping"]["attempts"], x["restart"]), (1000, "on-failure"))
        for retries, window in (0, 4), (5, 20):
            y = self.settings("y.conf", "[program:y]\ncommand=true\nstartsecs=3\n"
                              "startretries=%d" % retries).templates["y"]["flapping"]
            self.assertEqual((y["attempts"], y["window"]), (max(1, retries) + 1, window))
        said = "\n".join(logged.output)
        for what in ("program:web stdout_logfile; output is", "eventlistener:mail; events",
                     "unix_http_server, supervisord, rpcinterface:supervisor, supervisorctl; these",
                     "program:job serverurl; there is nothing"):
            self.assertEqual(said.count(what), 1, said)

    def test_faults(self):
        for text, words in (
                ("command=sleep %(no)s", "conf:2: [program:x] field 'command' has a %(...)s that"),
                ("command=true\n[group:g]\nprograms=x,y", "conf:4: [group:g] field 'programs': [pr"),
                ("numprocs=1001\ncommand=x", "field 'numprocs' must be a whole number from 0 to 1000"),
                ("numprocs=2\ncommand=true", "field 'process_name' must have %(process_num)d in it"),
                ("numprocs=2\nprocess_name=%x\ncommand=true", "conf:3: [program:x] field"),
                ("numprocs=2\nprocess_name=%(process_num)d\ncommand=true\nuser=no",
                 "conf:5: [program:x] field 'user' names the unknown user 'no'"),
                ("startsecs=x\nautostart=y\ncommand=true",
                 "conf:2: [program:x] field 'startsecs' must be a whole number from 0 to 999999\n"
                 "supervisord.conf:3: [program:x] field 'autostart' must be true or false"),
                ("command=true\n[supervisord]\nuser=no", "[program:x] field 'user' names the "),
                ("environment=A\\ =1,=2\ncommand=x", "conf:2: [program:x] field 'environment' "),
                ("environment='\nstartsecs=x\ncommand=%(ENV_x)s y", "conf:2: [program:x] field 'environment' "
                 "cannot be split into words: no closing quotation\nsupervisord.conf:3: [program:x] "),
                ("directory=/", "field 'command' is required"),
                ("x\ncommand=true", "conf:2: 'x' is neither [section]"),
                ("command=true\n[include]\nfiles=%x", ":4: [include] field 'files' has a %(...)s that")):
            with self.subTest(text):
                faults = self.faults("supervisord.conf", "[program:x]\n" + text)
                self.assertIn(words, "\n".join(faults))
                self.assertEqual(len(faults), words.count("\n") + 1)


class ConfigReload(ConfigCase):
    """Loading it again."""

    def begin(self, text):
        """Serve a file."""
        path, self.hooks = self.write("gaffer.ini", text), mock.Mock()
        gaffer.Configuration(lambda: gaffer.read_settings(path), self.hooks).begin(
            self.server.manager)

    def change(self, text, **expected):
        """Write it anew, and compare the report of the reload."""
        self.write("gaffer.ini", text)
        report = {"ok": True, "added": [], "changed": {}, "removed": [], "kept": [], "failed": {},
                  "webhooks": False, "needs_restart": []}
        self.assertEqual(self.server.ok("POST", "/_reload"), dict(report, **expected))

    def pids(self, *names):
        """Their pids, one list for each."""
        return [self.server.ok("GET", "/processes/%s/_pids" % name)["pids"] for name in names]

    @staticmethod
    def ini(*more, **commands):
        """A file of templates that `sleep N`."""
        sections = ["[process:%s]\ncmd = sleep %s" % pair for pair in commands.items()]
        return "\n".join([*sections, *more])

    def test_only_what_has_changed(self):
        self.begin(self.ini(a=1000, b=1000, c=1000))
        self.server.add("by-hand", "sleep 1000")
        self.write("gaffer.ini", self.ini(
            "nice = 3\n[endpoint:x]\nbind = 127.0.0.1:0\n[webhooks]\nflap=http://localhost:1",
            a=1000, d=1001, b=2000))
        lines = ("d: {0}added\nb: {0}changed (cmd, nice)\nc: {0}removed\na: {0}kept\n"
                 "webhooks: {0}changed\nendpoints: changed; restart gaffer to apply it\n")
        self.assertEqual(self.call("reload", "--dry-run"), lines.format("would be "))
        self.assertEqual((self.pids("b", "c"), self.hooks.mock_calls), ([[2], [3]], []))
        self.assertEqual(self.call("reload"), lines.format(""))
        self.hooks.replace.assert_called_once_with([("flap", "http://localhost:1")])
        self.assertEqual(self.server.ok("GET", "/processes"), ["a", "b", "by-hand", "d"])
        until(lambda: self.pids("b") not in ([[]], [[2]]))
        self.assertEqual(self.pids("a"), [[1]])
        self.assertEqual(self.server.ok("GET", "/processes/b")["cmd"], "sleep 2000")
        again = json.loads(self.call("reload", "--json"))
        self.assertEqual((again["kept"], again["needs_restart"]), (["a", "d", "b"], ["endpoints"]))

    def test_requests_are_answered_in_between(self):
        """And 'after' may be turned round."""
        self.begin("")
        manager, seen = self.server.manager, []

        def add(info):
            seen.append(self.server.ok("GET", "/processes"))
            return gaffer.Manager.add_process(manager, info)
        with mock.patch.object(manager, "add_process", add):
            self.change(self.ini("after = b", b=1000, a=1000), added=["b", "a"])
        self.assertEqual(seen, [[], ["b"]])
        self.change(self.ini("after = a", self.ini(a=1000), b=1000),
                    changed={"b": ["after"], "a": ["after"]})

    def test_what_was_done_by_hand_stays(self):
        self.begin(self.ini(a=1000, b=1000))
        self.server.ok("POST", "/processes/a/_stop?wait=true")
        self.server.ok("POST", "/processes/b/_add/2")
        self.change(self.ini(a=1000, b=1000), kept=["a", "b"])
        self.assertEqual(self.pids("a", "b"), [[], [2, 3, 4]])
        self.change(self.ini(a=2000, b=2000), changed={"a": ["cmd"], "b": ["cmd"]})
        until(lambda: list(map(len, self.pids("a", "b"))) == [0, 3])
        self.server.ok("DELETE", "/processes/a")
        self.server.add("c", "sleep 1000")
        text = self.ini("start = false", a=2000, b=2000, c=1000)
        self.change(text, added=["a"], changed={"c": ["cwd", "start"]}, kept=["b"])
        until(lambda: list(map(len, self.pids("a", "b", "c"))) == [1, 3, 0])

    def test_one_that_gave_up(self):
        self.begin("[process:a]\ncmd = false\nflapping = 1, 10, 0, 0\n")
        self.server.wait_event("proc/a/stop")
        self.change(self.ini("flapping = 1, 10, 0, 0", a=1000), changed={"a": ["cmd"]})
        self.assertEqual(len(self.pids("a")[0]), 1)

    def test_a_broken_file_changes_nothing(self):
        self.assertError(self.server.json("POST", "/_reload"), 409, "conflict", "serve CONFIG")
        self.begin(self.ini(a=1000))
        self.write("gaffer.ini", self.ini("[process:c]\ncmd = nosuchprog", a=1001))
        answer = self.server.json("POST", "/_reload")
        self.assertError(answer, 400, "invalid_process_info", "gaffer.ini:")
        self.call("reload", status=1, err="gaffer: .*gaffer.ini:4: .* 'nosuchprog', .*\n")
        self.change(self.ini(a=1000), kept=["a"])
        self.assertEqual(self.pids("a"), [[1]])

    def test_what_the_system_refuses(self):
        program = self.write("program", "#!/nosuchinterpreter\n", 0o700)
        self.begin(self.ini(a=1000))
        reason = self.server.json("POST", "/processes", {"name": "c", "cmd": program})[1]["reason"]
        text = self.ini("[process:c]\ncmd = ./program", a=1000)
        for _ in range(2):
            self.change(text, ok=False, added=["c"], kept=["a"], failed={"c": reason})
        self.call("reload", status=1, err="")
        self.change(self.ini(a=1000, c=1000), added=["c"], kept=["a"])


class ConfigServe(CliFollowCase):
    """`serve CONFIG`, and how a server ends for clients that read."""

    def test_hup_loads_it_again(self):
        folder, text = self.folder(), "[process:%s]\ncmd = sleep 1000\n"
        path = self.file(folder, "x.ini", text % "a")
        server = self.start("serve", path, "--bind", "127.0.0.1:0")
        self.file(folder, "x.ini", text % "a" + text % "b")
        server.process.send_signal(signal.SIGHUP)
        self.assertEqual(server.ok("GET", "/watch/proc/b/spawn?since=0")["name"], "b")
        self.file(folder, "x.ini", "junk")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.said("nothing has changed"))
        self.assertEqual(server.ok("GET", "/processes"), ["a", "b"])
        server.expect_stderr("ERROR %s:1: 'junk' is neither" % re.escape(path),
                             "ERROR .*nothing has changed$",
                             "WARNING the configuration was loaded again: b: added$")

    def test_logs_over_a_restart(self):
        """Of the server, or of a process: every line once. A process's pid ends with it."""
        folder = self.folder()
        info = dict(python(self.ECHO), name="a", redirect_input=True)
        endpoint = "unix:" + os.path.join(folder, "socket")
        serve = ("serve", self.file(folder, "x.json", json.dumps(info)), "--bind", endpoint)
        server, client = self.start(*serve), gaffer.Client(endpoint)
        *followers, one = [self.follow("logs", "-f", *names, endpoint=endpoint)
                           for names in ((), ("a.1",), ("1",))]

        def restart():
            self.assertEqual(one.communicate(timeout=TIMEOUT),
                             (b"a.1 | started\na.1 | one\na.1 | bye\n", b""))
            server.stop()
            self.start(*serve)
        for change, lines in (
                (lambda: client.request("POST", "/streams/a/stdin", b"one\n"), ("started", "one")),
                (lambda: client.request("POST", "/processes/a/_restart"), ("bye", "started")),
                (restart, ("bye", "started"))):
            change()
            for line, follower in itertools.product(lines, followers):
                self.assertEqual(follower.stdout.readline().decode(), "a.1 | %s\n" % line)
        for follower in followers:
            self.assertEqual(self.interrupted(follower), b"")

    def test_clients_that_take_nothing(self):
        """They do not keep the server; what is lost is told."""
        for patience, kill in ((0.1, False), (1000.0, True)):
            with self.subTest(kill=kill), http_limits(STOP_SEND=patience):
                server = Running()
                self.addCleanup(server.stop_all)
                server.add("a", "yes")
                deaf = self.wire(server=server).request("/streams/a/stdout?feed=continuous")
                until(lambda: server.manager.loop.call(lambda: [
                    channel for channel in server.http.channels if channel.queued]))
                with self.assertLogs("gaffer", "WARNING") as logged:
                    server.manager.stop()
                    server.manager.stop(kill)
                    server._thread.join(TIMEOUT)
                deaf.close()
                self.assertFalse(server._thread.is_alive())
                self.assertRegex(logged.output[0], r"1 clients did not read .* \d+ bytes are lost")


class ProcfileTexts(ConfigCase):
    """Procfiles and exports."""

    DIRECT = ("'@' --a=b 'c;d' \"e f\" g\\ h", "@ a=b -c", "env A=3 @ q", "@ \u00fc \"\" ''",
              "@ a \\; b")
    REPLACED = (                                # by the program, which begins at @
        "@ \"$V\" '$V' $E \"$E\" $((1 + 2)) $(echo a b) \"$(echo a)\"", "A=1 B='x y' @", "A=$V @",
        "cd / && A=2 @ *bin 2>&1 < /dev/null # c; d", "true && false || @ {a,b} ~", "@ a; @ b",
        "if true; then @ a; fi; @ b", "cd /nosuch || @ \"a\\\"b\\$V\\\\\"", "exec 3>&1; @ a >&3")
    KEPT = ("echo 'a\\nb'", "@ a | cat", "@ a & wait", "trap 'echo t' EXIT; @ a", "{ @ a; }",
            "(@ a)", "A=1", "A='@'; $A x", "@ `echo a`", "cd / && exec @ b", "~/@")

    def test_a_shell_only_where_it_is_needed(self):
        """And each command does what it does in sh, which is asked."""
        pure_environ(self, V="v w", E="", A=None, B=None)
        show = self.write("show", "#!/bin/sh\nprintf '<%s>' \"$A\" \"$B\" \"$@\"\nexit 3\n", 0o700)
        table = [("exec @ x", "@ x", False)] + [(text, text, False) for text in self.DIRECT]
        table += [(text, "exec @".join(text.rsplit("@", 1)), True) for text in self.REPLACED]
        table += [(text, text, True) for text in self.KEPT]
        for text, cmd, shell in table:
            with self.subTest(text):
                text, cmd = text.replace("@", show), cmd.replace("@", show)
                fields = gaffer.command_fields(text)
                self.assertEqual(fields, {"cmd": cmd, "shell": shell})
                launch = gaffer.Launch(gaffer.check_template(dict(fields, name="a")))
                runs = [subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       timeout=TIMEOUT, check=False)
                        for argv in (["/bin/sh", "-c", text], launch.argv)]
                self.assertEqual(*[(run.returncode, run.stdout) for run in runs])

    def test_types_ports_and_environment(self):
        pure_environ(self, PORT=None, A="own")
        self.write(".env", "A=1\nB=2\n")
        more = self.write("more.env", "B=3\nC=$B$A\n")
        path = self.write("Procfile", "# x\nweb: sleep $PORT | b\n\n  \nwork-er_2 :  sleep 1  \r\n")
        plain = gaffer.Procfile(path)
        self.assertEqual((plain.types, plain.env), (
            {"web": "sleep $PORT | b", "work-er_2": "sleep 1"}, {"A": "1", "B": "2"}))
        templates = gaffer.read_settings(gaffer.Procfile(path, env_files=[more]), ()).templates
        env = {"B": "3", "C": "3own", "GAFFER_PORT_STEP": "1"}
        self.assertEqual([(info["env"], info["cwd"]) for info in templates.values()], [
            (dict(env, PORT=port), self.home) for port in ("5000", "5100")])
        for env_file, own, options, wanted in (     # .env, PORT of gaffer's environment, PORT
                ("", None, {"taken": [5050]}, 5100), ("", "8000", {}, 8000),
                ("", None, {"taken": [5000], "port": 4950}, 4950), ("PORT=6000", "8000", {}, 6000),
                ("PORT=6000", None, {"taken": [7000], "port": 7000}, 7100)):
            with self.subTest(env_file=env_file, own=own, options=options):
                self.write(".env", env_file)
                pure_environ(self, PORT=own)
                file = gaffer.Procfile(path, port=options.get("port"))
                tree = gaffer.load_procfile(file, options.get("taken", []))
                self.assertEqual(tree["process"]["web"]["env"]["PORT"], str(wanted))

    def test_faults(self):
        """More: ConfigFiles.FAULTS."""
        self.write(".env", "A=1\nB")
        self.assertEqual(self.faults("Procfile", "web: true"), [
            ".env:2: is not NAME=value, with the value plain or in one pair of quotes"])
        os.unlink(self.home + "/.env")
        self.assertEqual(self.faults("Procfile", "# nothing\n"),
                         ["Procfile:1: there is no line 'type: command' in it"])
        path = self.write("Procfile", "a: true\nb: true\n")
        self.assertIn("b", gaffer.Procfile(path, ["no.env"]).types)
        for port, err in (("65500", ".*:2: \\[process:b\\] .* makes 65600 the PORT .*"),
                          ("65536", "PORT is '65536': give a number from 1 to 65535")):
            self.call("up", "-f", path, "-p", port, status=1, err="gaffer: %s\n" % err)

    COMMENTS = """
        web: echo "$A" 100%
        # gaffer: after=db,web ready='log:is up within=99999.5' restart=never success='0 TERM'
        # anything

        # gaffer: detach=no flapping=attempts=3 restart_delay='1 5' custom_streams=a,b
        # gaffer: limits='nofile=64:unlimited core=0' stop_signal='INT=5 TERM=2.5'
        # gaffer: umask=022 priority=7
        job: sleep 1
        #gaffer: ready=tcp:$PORT redirect_output= env_file="'a b'" success=
        db: sleep 1
        """

    def test_comments_and_exports(self):
        """Comments are about the type below; exports say the same."""
        self.write(".env", "A='x  y'\nB=%d \\\n")
        self.write("a b", "C=1\n")
        path = self.write("Procfile", self.COMMENTS)
        plain = gaffer.read_settings(gaffer.Procfile(path), ()).templates
        web, job, db = plain.values()
        self.assertEqual([web["after"], job["after"], job["limits"], job["stop_signal"]], [
            [], ["db", "web"], {"nofile": [64, "unlimited"], "core": 0},
            [["INT", 5], ["TERM", 2.5]]])
        self.assertEqual([db["ready"], db["redirect_output"], db["success"], db["env_file"]], [
            {"tcp": "$PORT", "within": 60}, [], [0], [self.home + "/a b"]])
        job["numprocesses"] = 2
        for kind in ("ini", "json"):
            out = self.call("export", kind, "my", "-f", path, "-c", "job=2")
            found = self.settings("x." + kind, out).templates
            for index, (name, info) in enumerate(plain.items()):
                self.assertEqual(found["my:" + name], dict(
                    info, name="my:" + name, priority=7 if name == "job" else index,
                    after=["my:" + each for each in info["after"]]), kind)
        self.write(".env", "A='x\ny'")
        self.call("export", "ini", "-f", path, status=1,
                  err="gaffer: INI cannot hold the value of A: .*\n")

    def test_export_systemd(self):
        self.write(".env", "A='100% \"q\" $x \\'\n")
        path = self.write("Procfile", "web: exec app --port $PORT 5%\nwork_er: sleep 1\n")
        out = self.call("export", "systemd", "my", "-f", path, "-c", "web=2", "-p", "7000")
        self.assertEqual(re.findall("^# (.*)$", out, re.M), [
            "my-web-1.service", "my-web-2.service", "my-work_er-1.service", "my.target"])
        for line in ('Environment="A=100%% \\"q\\" $x \\\\"', 'Environment="PORT=7001"',
                     'Environment="PORT=7100"', "PartOf=my.target",
                     'ExecStart=/bin/sh -c "exec app --port $$PORT 5%%"'):
            self.assertIn("\n%s\n" % line, out)
        self.assertNotIn("STEP", out)
        folder = os.path.join(self.home, "units")
        out = self.call("export", "systemd", "-f", path, "-o", folder)
        self.assertEqual(out.splitlines(), [
            os.path.join(folder, name) for name in sorted(os.listdir(folder))])

    SERVICES = """
        [process:db]
        cmd = sh -c 'sleep $$1'
        ready = notify within=20
        [process:migrate]
        cmd = true
        restart = on-failure
        after = db
        [process:web]
        cmd = sh -c "a b" --port=$A $$5 50%
        after = migrate nosuch
        ready = tcp:80
        start = false
        custom_streams = a b
        [process:back]
        cmd = echo $A
        args = 'a b' -c
        shell = true
        schedule = */15 2 1,15 * mon-fri
        """
    UNITS = r"""
        == my.target
        Wants=my-db-1.service my-migrate-1.service my-back-1.timer
        == my-db-1.service
        Type=notify
        ExecStart=/bin/sh -c "exec sh -c \"sleep \\$$1\""
        == my-migrate-1.service
        After=my-db-1.service
        Type=oneshot
        == my-web-1.service
        After=my-migrate-1.service
        # left out: after = nosuch
        # left out: ready = tcp:80 within=60
        # left out: custom_streams = a b
        ExecStart=/bin/sh -c "exec sh -c 'a b' \"--port=$$A\" \"\\$$5\" 50%%"
        == my-back-1.service
        Restart=no
        ExecStart=/bin/sh -c "set -- 'a b' -c\necho $$A"
        == my-back-1.timer
        OnCalendar=mon,tue,wed,thu,fri *-*-* 2:0,15,30,45:00
        OnCalendar=*-*-1,15 2:0,15,30,45:00
        """

    def test_systemd_of_a_configuration(self):
        """What systemd can do; the rest as comments."""
        path = self.write("x.ini", self.SERVICES)
        out = self.call("export", "systemd", "my", "-f", path)
        files = dict(re.findall(r"^# (my\S+)\n(.*?)\n(?=\n# my|\Z)", out, re.M | re.S))
        for part in textwrap.dedent(self.UNITS).split("== ")[1:]:
            name, *lines = part.splitlines()
            self.assertEqual(set(lines).difference(files[name].splitlines()), set(), name)
        self.assertTable(lambda text: gaffer.Schedule(text).timer(), (
            ("every 1.5m", [("OnActiveSec", "90"), ("OnUnitActiveSec", "90")]),
            ("5 * * 2 7", [("OnCalendar", "sun *-2-* *:5:00")])))


class ProcfileRun(ConfigCase, CliFollowCase):
    """run: becomes the command."""

    def test_environment_and_status(self):
        self.env = dict(self.env, GAFFER_TOKEN="x")

        def run(*arguments):
            program = self.follow("run", *arguments, cwd=self.home, stdin=subprocess.PIPE)
            return b"".join(program.communicate(b"in")).decode(), program.returncode
        self.assertEqual(run("pwd"), (self.home + "\n", 0), "no Procfile")
        self.write(".env", "A=1\nB=2\n")
        self.write("x.env", "A=1\nB=3\n")
        self.write("Procfile", "web: echo web $PORT\n")
        for arguments, wanted, status in (
                (["-e", "x.env", "echo $A $B $PORT ${GAFFER_TOKEN-none}"], "1 3 5000 none\n", 0),
                (["-p", "7000", "web"], "web 7000\n", 0), (["--", "cat"], "in", 0),
                (["sh", "-c", "echo $1$A; exit 7", "sh", "-x"], "-x1\n", 7),
                (["kill -PIPE $$"], "", -13),
                (["nosuch", "x"], "gaffer: 'nosuch' cannot be run: No such file .*\n", 127),
                ([], "gaffer: say what to run.*\n", 2)):
            with self.subTest(arguments):
                out, found = run(*arguments)
                self.assertRegex(out, r"\A%s\Z" % wanted)
                self.assertEqual(found, status)

    def test_it_is_the_command(self):
        """The same pid; a signal to it alone reaches the command."""
        run = self.follow("run", "trap 'echo term; exit 3' TERM; trap 'echo int' INT; echo $$; "
                                 "while :; do sleep 0.01; done", cwd=self.home)
        self.assertEqual(run.stdout.readline(), b"%d\n" % run.pid)
        for signum, line in ((signal.SIGINT, b"int\n"), (signal.SIGTERM, b"term\n")):
            run.send_signal(signum)
            self.assertEqual(run.stdout.readline(), line)
        self.assertEqual(run.wait(TIMEOUT), 3)


class ProcfileServer(ConfigCase):
    """load, unload, scale, ps."""

    def setUp(self):
        super().setUp()
        self.procfile("web", "worker")
        self.enter(os.path.join(self.home, "my app-2"))

    def procfile(self, *names, command="echo $PORT; exec sleep 1000"):
        self.write("my app-2/Procfile", "".join("%s: %s\n" % (name, command) for name in names))

    def names(self, *arguments):
        return [row.split()[0] for row in self.call("ps", *arguments).splitlines()[1:-1]]

    def test_load_scale_ps_unload(self):
        self.sleepers("my-app:web", numprocesses=3)
        self.sleepers("web", "other")
        self.calls(("scale -f Procfile web=2", "web: 2 processes\n"))
        self.assertEqual(self.names("-f", "Procfile"), ["web.1", "web.2"])
        self.assertEqual(self.names("-f", "/no")[3:], ["web.1", "web.2", "other.1"])
        web, worker = "my-app-2:web: %s\n", "my-app-2:worker: %s\n"
        self.calls(
            ("load -f Procfile -c worker=2", web % "loaded" + worker % "loaded"),
            ("load -f Procfile -c web=1", web % "already loaded" + worker % "already loaded"),
            ("scale -f Procfile web=3 worker-1", web % "3 processes" + worker % "1 process"),
            ("scale my-app-2 worker+1", worker % "2 processes"),
            ("scale my-app-2 web+1 --json", '{"ok": true, "numprocesses": 4}\n'),
            ("scale my-app-2", "", 2, "gaffer: 'my-app-2' is not a change: .*\n"),
            ("scale web=x", "", 2, "gaffer: 'web=x' is not a change: .*\n"),
            ("scale my-app web-1 no-1", "", 4, ".* there is no 'no': the types are web\n"),
            ("scale my-app:web=9 my-app:web=2", "my-app:web: 2 processes\n"),
            ("scale -f Procfile web-0", web % "4 processes"),
            ("numprocesses my-app:web", "2\n"))
        until(lambda: self.server.ok("GET", "/status/my-app-2:worker")["running"] == 2)
        self.assertEqual(self.names("my-app-2"), ["my-app-2:" + each for each in (
            "web.1", "web.2", "web.3", "web.4", "worker.1", "worker.2")])
        until(lambda: sorted(self.call("logs", "my-app-2:web", "--no-prefix").split()) == [
            "5000", "5001", "5002", "5003"])
        self.procfile("web", "# gaffer: numprocesses=1\nclock", command="exec sleep 2000")
        clock = "my-app-2:clock: %s\n"
        self.calls(("load -f Procfile", web % "updated" + clock % "loaded" + worker % "removed"),
                   ("numprocesses my-app-2:web", "4\n"),
                   ("scale my-app-2 clock=2", clock % "2 processes"),
                   ("load -f Procfile", web % "already loaded" + clock % "updated"),
                   ("unload my-app-2", web % "unloaded" + clock % "unloaded"))
        self.assertEqual(self.server.ok("GET", "/processes"), ["my-app:web", "web", "other"])

    def test_mistakes(self):
        for words, status, err in (
                ("up -f Procfile -c all=0", 1, "there is nothing to run: all counts are 0"),
                ("load a:b -f Procfile", 2, "'a:b' is not a group: .*"),
                ("load -f Procfile -c web=1001", 2, "'web=1001' is not TYPE=NUMBER.*")):
            self.calls((words, "", status, "gaffer: %s\n" % err))
        self.procfile("x" * 100, "web")         # the one is refused, the other is loaded
        self.calls(("load %s -f Procfile --ready" % ("g" * 64), "g" * 64 + ":web: loaded\n", 1,
                    "gaffer: g{64}:x{100}: field 'name' must .*\n"))


class ProcfileUp(CliFollowCase):

    def up(self, text, *arguments, **options):
        path = self.file(self.folder(), "Procfile", textwrap.dedent(text))
        return self.follow("up", "-f", path, *arguments, **options)

    def lines(self, process):
        """Its lines without the time, as (name, text)."""
        for line in process.stdout:
            match = re.match(rb"\d\d:\d\d:\d\d (\S+) +\| (.*)\n\Z", line)
            self.assertIsNotNone(match, line)
            yield match.group(1).decode(), match.group(2).decode()

    def ended(self, process, status):
        """All that it still prints; it ends with `status`, and says nothing on stderr."""
        lines = list(self.lines(process))
        self.assertEqual((process.wait(TIMEOUT), process.stderr.read()), (status, b""))
        return lines

    def sleepers_up(self):
        """A running `up` of two that sleep, and their OS pids."""
        process = self.up("a: echo ready; exec sleep 1000\nb: echo ready; exec sleep 1000\n")
        os_pids, lines, ready = [], self.lines(process), 0
        while ready < 2:
            _, text = next(lines)
            os_pids += map(int, re.findall("started, os pid (.*)", text))
            ready += text == "ready"
        return process, os_pids

    def test_what_is_ready_and_what_is_done(self):
        """A line tells it; what is done, or tried again, ends nothing, what does not get ready
        does. What a chosen type is after runs, too."""
        process = self.up("""
            other: sleep 1000
            # gaffer: after=jobs
            typo: true
            # gaffer: restart=on-failure
            job: test -e flag || { >flag; exit 3; }
            # gaffer: after=job ready=log:up
            web: echo up; exec cat
            # gaffer: after=web ready='exec:false within=0.2'
            bad: trap 'exit 0' TERM; sleep 1000 & wait
            """, "bad", "typo")
        said = "\n".join(text for name, text in self.ended(process, 1) if name == "system")
        self.assertRegex(said, (
            r"(?ms)^typo waits for jobs, which is not .*, did you mean 'job'\?$.*^job.1 exited "
            r"with status 3.*^job.1 exited with status 0.*^web.1 started.*^web.1 is ready after "
            r"\d+\.\d s.*^bad.1 is stopped: not ready .exec:false. within 0.2 s"))
        self.assertNotIn("other", said)

    def test_ready(self):
        """It says when all are ready; the first that will not be ends it."""
        process = self.up("# gaffer: restart=never\njob: true\ndb: exec cat\n"
                          "# gaffer: after=job,db ready=log:up\nweb: echo up; exec cat", "--ready")
        self.assertIn(("system", "all are ready"), self.lines(process))
        process.send_signal(signal.SIGTERM)
        self.ended(process, 0)
        process = self.up("# gaffer: restart=never\na: true", "--ready", "--exit-when-done")
        self.assertIn(("system", "all are ready"), self.ended(process, 0))
        process = self.up("# gaffer: start=false\ndb: cat\n# gaffer: after=db\nweb: cat", "--ready")
        self.assertIn(("system", "'web' waits for 'db', and 'db' is stopped; start it"),
                      self.ended(process, 1))

    def test_signals_stop_all(self):
        for signum, kill in (signal.SIGHUP, "TERM"), (signal.SIGQUIT, "(TERM|KILL)"):
            with self.subTest(signum=signum):
                process, os_pids = self.sleepers_up()
                process.send_signal(signal.SIGUSR1)     # a log file that it does not have
                process.send_signal(signum)
                shown = [text for _, text in sorted(self.ended(process, 0))]
                self.assertRegex(" ".join(shown), "a.1 .* SIG{0} b.1 .* SIG{0}$".format(kill))
                self.assertFalse(any(map(alive, os_pids)))

    def test_one_dies_and_all_stop(self):
        """With its status. The other one's stdin does not end before."""
        for how, status, words in (("exit 7", 7, "exited with status 7"), (
                "kill -9 $$", 137, "was ended by SIGKILL"), ("exit 0", 0, "exited with status 0")):
            with self.subTest(how):
                process = self.up("a: echo last words; %s\nb: exec cat\n" % how)
                lines = [line for line in self.ended(process, status)
                         if not re.search(" started|listening", line[1])]
                self.assertEqual(lines, [("a.1", "last words"), ("system", "a.1 " + words),
                                         ("system", "b.1 was ended by SIGTERM")])
        path = self.file(self.folder(), "a", "#!/nosuch\n", 0o700)
        process = self.up("a: %s\nb: exec cat\n" % path)
        self.assertIn(b"a cannot be started: ", process.communicate(timeout=TIMEOUT)[1])
        self.assertEqual(process.returncode, 127)

    def test_what_goes_on(self):
        """With a schedule or --keep-going, that a run is done ends nothing: there is another."""
        for text, *options in (
                ("# gaffer: schedule='every 1s'\na: echo again\n"
                 "# gaffer: detach=yes redirect_output= restart=never\nleft: true\n",),
                ("a: echo again\nb: exec cat\n", "--keep-going")):
            process = self.up(text, *options)
            runs = (line for line in self.lines(process) if line == ("a.1", "again"))
            self.assertEqual(len(list(itertools.islice(runs, 2))), 2)
            process.send_signal(signal.SIGINT)
            self.ended(process, 0)

    def test_exit_when_done(self):
        """With the status of the one that failed; also in a folder where no socket can be made."""
        path = os.path.join(self.folder(), "x" * 100)
        os.mkdir(path)
        path = self.file(path, "Procfile", "a: sh -c 'exit 4'\nb: sleep 0.1\n")
        process = self.follow("up", "--exit-when-done", "-f", path)
        self.assertRegex(self.ended(process, 4)[0][1], "there is no API in this folder: .*too long"
                                                       ": 'up' goes on without it")

    def test_slow_reader(self):
        """More than pipes, windows and the queue hold: the process waits, and nothing is lost. At
        the end the queue has SCREEN_END seconds."""
        for size, count in (65536, 60000), (gaffer.SCREEN_SIZE, 9000):
            read, write = os.pipe()
            with http_limits(SCREEN_SIZE=size, SCREEN_END=0.05), os.fdopen(read, "rb") as out:
                manager = gaffer.Manager([gaffer.Screen(write, one_for_all=True)],
                                         window_size=65536)
                manager.add_process("a", "seq 1 %d" % count, restart="never")
                thread = threading.Thread(target=manager.run)
                thread.start()
                until(lambda: not thread.is_alive() or any(
                    process.outputs["stdout"]._paused
                    for process in tuple(manager.processes.values())), "seq waits, or has ended")
                self.assertEqual(thread.is_alive(), size == 65536)
                numbers, line = [], b""
                while b" a.1 exited with status 0" not in line:
                    line = out.readline()
                    numbers += map(int, re.findall(rb" a.1 +\| (.*)", line))
                self.assertEqual(numbers, list(range(1, count + 1)))
                thread.join(TIMEOUT)
            os.close(write)

    def test_example(self):
        """The application in examples comes up, scales and goes down."""
        home, port = self.folder(), free_port()
        path, ask = home + "/app/Procfile", ("--endpoint", "unix:%s/socket" % home)
        shutil.copytree(os.path.join(HERE, "examples", "procfile"), home + "/app")
        self.env = dict(self.env, SPOOL=home + "/spool")
        process = self.follow("up", "-f", path, "-p", str(port), "--bind", ask[1])
        self.assertTrue(any(text == "listening on %d" % port for _, text in self.lines(process)))
        self.assertEqual(self.call("scale", "worker+1", "-f", path, *ask), "worker: 2 processes\n")
        with contextlib.closing(Wire(port)) as wire:
            wire.request("/", version="1.0")
            self.assertRegex(wire.file.read(), rb"tasks done\tso far: \d+\n\Z")
        until(lambda: self.called("ps", "-f", path, *ask)[0] == 0, "all run")
        process.send_signal(signal.SIGTERM)
        self.ended(process, 0)

    def test_nobody_reads(self):
        process, os_pids = self.sleepers_up()
        process.stdout.close()
        os.kill(os_pids[0], signal.SIGKILL)     # the next line fails
        self.assertIn(process.wait(TIMEOUT), (137, 141))
        self.assertEqual(process.stderr.read(), b"")
        self.assertFalse(any(map(alive, os_pids)))
        process.stdout = open(os.devnull, "rb")
        with open("/dev/full", "wb") as full:
            process = self.up("a: exec sleep 1000\n", stdout=full)
        self.assertEqual((process.communicate(timeout=TIMEOUT)[1], process.returncode),
                         (b"gaffer: No space left on device\n", 1))


class WebHooksTest(ServerCase):
    """Events that are posted."""

    def setUp(self):
        super().setUp()
        self.received = queue.Queue()           # (target, event, status)
        self.answers = []                       # statuses of the next answers, else 200
        receiver = Running(handlers=[("/hook.*", self.take)])
        self.addCleanup(receiver.stop_all)
        self.url = receiver.url + "/hook"

    def take(self, request):
        status = self.answers.pop(0) if self.answers else 200
        place = [("Location", "/hook/moved")] if status == 302 else []
        self.assertEqual(request.headers["content-type"], "application/json")
        self.received.put((request.target, json.loads(request.body), status))
        return status, place, ""

    def hooks(self, *hooks):
        made = gaffer.WebHooks(hooks)
        self.server.manager.loop.call(made.start, self.server.manager.loop, self.server.manager)
        self.addCleanup(made.join)
        return made

    def add(self, *names):
        """Add templates that do not run."""
        for name in names:
            self.server.add(name, "sleep 1000", start=False)

    def test_each_event_is_posted(self):
        made = self.hooks(("proc/a/create", self.url + "/a?x=1"), ("delete", self.url))
        self.add("a", "b")
        target, event, _ = self.received.get(timeout=TIMEOUT)
        self.assertEqual((target, event["event"], event["name"]), ("/hook/a?x=1", "create", "a"))
        self.server.ok("DELETE", "/processes/b")    # each URL has its own order
        self.assertEqual(self.received.get(timeout=TIMEOUT)[1], self.server.wait_event("delete"))
        self.assertTrue(self.received.empty())
        self.server.manager.loop.call(made.replace, [("create", self.url + "/new")])
        self.add("c")
        self.assertEqual(self.received.get(timeout=TIMEOUT)[0], "/hook/new")
        self.assertRaises(ValueError, gaffer.WebHooks, [("", "localhost/hook")])

    def test_tried_again_unless_refused(self):
        with http_limits(WEBHOOK_PAUSES=(0, 0, 0)), self.assertLogs("gaffer", "WARNING") as logs:
            made = self.hooks(("create", self.url))
            self.answers += [500, 503, 200, 302, 404, 500, 500, 500]
            self.add("a", "m", "b", "c", "d")
            until(lambda: self.received.qsize() == 9)
            found = [self.received.get()[1:] for _ in range(self.received.qsize())]
        self.assertEqual([(event["name"], status) for event, status in found], [
            ("a", 500), ("a", 503), ("a", 200), ("m", 302), ("b", 404), *[("c", 500)] * 3, ("d", 200)])
        self.assertEqual(made.dropped, 3)
        self.assertEqual(len(logs.output), 1, "it is said once a minute")
        self.assertRegex(logs.output[0], "/hook was dropped, 1 of all by now: it answers 302")

    def test_a_receiver_that_hangs(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, \
                http_limits(WEBHOOK_QUEUE=3, WEBHOOK_END=0.1), \
                self.assertLogs("gaffer", "WARNING") as logs:
            made = self.hooks(("create", "http://127.0.0.1:%d/" % silent.getsockname()[1]))
            self.add("first")
            sock, _ = silent.accept()
            with sock:                          # one waits for an answer; three more have room
                self.add("a", "b", "c", "d", "e")
                self.assertEqual(made.dropped, 2)
                made.join()
                self.assertEqual(made.dropped, 5)
            with http_limits(WEBHOOK_TIME=0.05, WEBHOOK_PAUSES=(0,)):
                made = self.hooks(("create", made.hooks[0][1]))
                self.add("last")
                until(lambda: made.dropped)     # it has waited for the answer, in vain
        self.assertRegex("\n".join(logs.output),
                         "3 events for webhooks were not .* 5 were dropped in all")

    def test_last_words_are_sent(self):
        made = gaffer.WebHooks([("proc/a", self.url)])
        manager = gaffer.Manager([made])
        manager.add_process("a", "sleep 1000")
        manager.subscribe("spawn", lambda kind, event: manager.stop())
        manager.run()
        found = [self.received.get()[1]["event"] for _ in range(self.received.qsize())]
        self.assertEqual((found, made.dropped), (["start", "spawn", "stop", "stop_pid", "exit"], 0))


class CliDaemon(CliFollowCase):
    """--pidfile, --log-file, --daemon"""

    def test_pid_file_that_its_last_user_removes(self):
        """Between open and lock of the next, which takes a new file."""
        path = os.path.join(self.folder(), "pid")
        first, second, third = (gaffer.PidFile(path) for _ in range(3))
        first.start(None, None)
        flock, stops = fcntl.flock, [first.stop]

        def slow(file, how):
            while stops:
                stops.pop()()
            flock(file, how)
        with mock.patch("fcntl.flock", slow):
            second.start(None, None)
        self.assertEqual(cli_read(path), "%d\n" % os.getpid())
        os.unlink(path)
        third.start(None, None)
        second.stop()
        self.assertTrue(os.path.exists(path))
        third.stop()
        self.assertFalse(os.path.exists(path))

    def test_log_files_are_reopened(self):
        folder = self.folder()
        logs, log, access = (folder + name for name in ("/logs", "/logs/log", "/logs/access"))
        os.mkdir(logs)
        server = self.start("--log-file", log, "--access-log", access, "-v")

        def logged(name, path=log):
            server.add(name, {"cmd": "sleep 1000"})
            until(lambda: "INFO %s: spawn" % name in cli_read(path), "the log")
        logged("a")
        os.rename(log, log + ".1")
        os.rename(access, access + ".1")
        server.process.send_signal(signal.SIGUSR1)
        until(lambda: os.path.exists(log) and os.path.exists(access), "the new files")
        logged("b")
        until(lambda: "GET /status/b" in cli_read(access), "the new access log")
        held = open_descriptors(server.process.pid).values()
        self.assertEqual(sorted(name for name in held if name.startswith(folder)), [access, log])
        # where there is no place for a new one, the old one goes on
        os.rename(logs, folder + "/old")
        server.process.send_signal(signal.SIGUSR2)
        words = "WARNING the log file '%s' cannot be written: No such file" % log
        until(lambda: words in cli_read(folder + "/old/log"), "the failure")
        logged("c", folder + "/old/log")

    def test_daemon(self):
        folder = self.folder()
        endpoint, log = "unix:%s/socket" % folder, folder + "/log"
        pidfile = self.file(folder, "pid", "999999999999 stale\n")

        def start():
            run = subprocess.run(
                [*CLI_SCRIPT, "serve", "--daemon", "--bind", endpoint, "--log-file", log,
                 "--pidfile", pidfile], env=self.env, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False)
            return run.returncode, run.stdout.decode()
        self.assertEqual(
            start(), (0, "gaffer %s listening on %s\n" % (gaffer.__version__, endpoint)))
        os_pid = int(cli_read(pidfile))
        try:
            self.assertEqual(gaffer.Client(endpoint).get("/processes"), [])
            session = os.getsid(os_pid)
            self.assertNotIn(session, (os.getsid(0), os_pid), "its own, which it does not lead")
            self.assertEqual([os.readlink("/proc/%d/fd/%d" % (os_pid, fd)) for fd in (0, 1, 2)],
                             ["/dev/null", log, log])
            status, said = start()
            self.assertEqual(status, 1)
            self.assertIn("is in use by a running gaffer, pid %d: " % os_pid, said)
        finally:
            os.kill(os_pid, signal.SIGTERM)
        until(lambda: not alive(os_pid))
        self.assertEqual((cli_read(log), os.listdir(folder)), ("", ["log"]))
        self.call("serve", "--daemon", status=2, err="gaffer: --daemon needs --log-file.*\n")


class CliCompletion(CliFollowCase):
    """Completion in the shells themselves."""

    quick = False
    TYPED = (("re", r"reload\b[^$]*restart\b"), ("stop  we", "web"), ("stop --no", "--no-wait"),
             ("--json stop group:", "group:one@1"), ("stop group:one@", "group:one@1"),
             ("completion f", "fish"))

    def script(self, shell):
        """The script of a shell, which finds gaffer.py."""
        if not shutil.which(shell):
            self.skipTest("needs " + shell)
        home = self.folder()
        self.file(home, "gaffer.py", "#!/bin/sh\nGAFFER_ENDPOINT=%s exec %s \"$@\"\n" % (
            self.server.url, " ".join(map(shlex.quote, CLI_COMMAND))), 0o700)
        self.env = dict(self.env, HOME=home, XDG_CONFIG_HOME=home,
                        PATH=home + ":" + os.environ["PATH"])
        self.sleepers("web", "db", "group:one@1")
        return self.file(home, "script", self.call("completion", shell))

    def type(self, shell, setup):
        setup = "%s; source %s; echo set''-up\r" % (setup, self.script(shell.split()[0]))
        _, main = self.terminal(command=shell.split(), TERM="dumb", INPUTRC=os.devnull)
        os.write(main, setup.encode())
        self.shows(main, "set-up\r")
        for words, shown in self.TYPED:
            os.write(main, b"true; ~/gaffer.py %s\t" % words.encode() + b"\t" * (words == "re"))
            self.shows(main, shown)
            os.write(main, b"\x15")

    def test_bash(self):
        self.type("bash --norc --noprofile -i", "PS1='$ '")

    def test_zsh(self):
        self.type("zsh -f -i", "autoload -Uz compinit; compinit -u -D")

    def test_fish(self):
        code = "source %s;" % self.script("fish") + "".join(
            "complete -C 'true; ~/gaffer.py %s'; echo;" % line for line, _ in self.TYPED)
        out = subprocess.check_output(["fish", "-c", code], env=self.env, timeout=TIMEOUT,
                                      universal_newlines=True)
        for found, (line, wanted) in zip(out.split("\n\n"), self.TYPED):
            self.assertRegex(found.replace("\n", " "), r"\A%s\Z" % wanted, line)

    def test_no_server(self):
        os.environ["GAFFER_ENDPOINT"] = "http://127.0.0.1:1"
        self.assertEqual(self.call("completion", "bash", "gaffer.py stop "), "")


class CliHostile(CliCase):
    """A server that gets nothing but malformed requests, openings and frames answers between them.
    In the end it has the same descriptors, and no more memory than after some of them."""

    quick = False
    cases, seed, first = 40, "1", 0             # main(): --hostile N

    def setUp(self):
        super().setUp()
        self.server = self.start()
        self.server.add("cat", "cat", redirect_input=True)

    def used(self):
        """(how many descriptors, KiB of memory) once its only socket is the one that listens."""
        def descriptors():
            opened = open_descriptors(self.server.process.pid).values()
            return sum(what.startswith("socket:") for what in opened) == 1 and len(opened)
        count = until(descriptors, "the end of all connections")
        text = cli_read("/proc/%d/status" % self.server.process.pid)
        return count, int(re.search(r"VmRSS:\s+(\d+)", text).group(1))

    def hostile(self, case):
        """Let case(rng) try all there is."""
        warm = self.first + min(self.cases // 3, 1000)
        for number in range(self.first, self.cases + warm):
            if number == warm:
                descriptors, memory = self.used()
            try:
                case(random.Random("%s:%d" % (self.seed, number)))
                if number % 20 == 0:
                    self.assertEqual(self.server.request("GET", "/ping")[2], b"OK")
            except BaseException as error:
                raise AssertionError(
                    "again: python3 test_gaffer.py --hostile 1 --seed %s:%d CliHostile.%s" % (
                        self.seed, number, self._testMethodName)) from error
        count, growth = self.used()
        growth -= memory
        if self.cases >= 1000:
            print("%s: %d cases, %d KiB more memory, %d descriptors before and after" % (
                self._testMethodName, self.cases, growth, count), flush=True)
        # threads of requests get arenas of their own from malloc: chance decides how many
        self.assertLess(growth, 6 * 1024)
        self.assertEqual(count, descriptors)
        self.assertEqual(self.server.ok("GET", "/processes/cat/_pids")["pids"], [1])

    def test_requests(self):
        def case(rng):
            error = None
            while error is None:
                wire = b"".join(fuzz_request(rng) for _ in range(rng.choice((1, 1, 2))))
                wire = fuzz_spoil(rng, wire)
                seen, error, _ = fuzz_outcome(wire, limit=gaffer.BODY_SIZE)
            with contextlib.closing(Wire(self.server.port)) as client:
                client.send(wire).sock.shutdown(socket.SHUT_WR)
                found = [int(status) for status in re.findall(
                    rb"^HTTP/1\.1 ([0-9]{3}) [^\r\n]*\r$", client.file.read(), re.M)]
            self.assertTrue(found and 500 not in found and found[-1] != 100, (wire, found))
            if not seen:                        # else the first may have ended the connection
                self.assertEqual(found, [error], wire)
        self.hostile(case)

    def test_frames(self):
        def case(rng):
            last = ("",)
            while last[0] != "fail":
                wire = b"".join(fuzz_frame(rng) for _ in range(rng.randrange(1, 5)))
                wire = fuzz_spoil(rng, wire)
                *_, last = [last, *gaffer.WebSocketDecoder(gaffer.STDIN_SIZE).feed(wire)]
            client = Wire(self.server.port).upgrade("/wstreams/1", early=wire)
            with contextlib.closing(client):
                client.sock.shutdown(socket.SHUT_WR)
                *_, (opcode, payload) = iter(client.read, (None, b""))
            self.assertEqual((opcode, payload[:2]), (8, struct.pack("!H", last[1])), wire)
        self.hostile(case)


class Readme(CliCase):
    """What README.md shows is what happens."""

    quick = False

    def setUp(self):
        super().setUp()
        self.text = cli_read(os.path.join(HERE, "README.md"))
        path = self.folder()                    # python3 is the Python that runs the tests
        os.symlink(PYTHON, os.path.join(path, "python3"))
        self.env = dict(self.env, PATH=path + ":" + os.environ.get("PATH", os.defpath))
        self.program, self.embedding = re.findall(r"^```python\n(.*?)^```$", self.text, re.M | re.S)

    @unittest.skipUnless(shutil.which("curl") and shutil.which("bash"), "needs curl and bash")
    def test_commands(self):
        (command, output), *examples = [
            part.partition("\n")[::2]
            for text in re.findall(r"^```console\n(.*?)^```$", self.text, re.M | re.S)
            for part in re.split(r"^\$ ", text, flags=re.M)[1:]]
        self.assertEqual((command, output.count("\n")), ("python3 gaffer.py serve", 1))
        command = shlex.split(command) + ["--bind", "127.0.0.1:0"]
        server = self.run_program(command, env=self.env, cwd=HERE)
        self.env["GAFFER_ENDPOINT"] = server.url
        self.assertEqual(output.replace("5000", str(server.port)), server.first_line)
        self.assertGreater(len(examples), 7)
        code = "python3 -W error -c %s | head -2" % shlex.quote(self.program)

        def pattern(text):                      # what is new in each run differs
            return re.sub(r"[0-9]+", "N", re.sub(r"@[0-9a-f]{8}\b", "@EPOCH", text))
        for command, output in [*examples, (code, "STDOUT 0\nSTDOUT 1\n")]:
            with self.subTest(command=command):
                command = re.sub(r"\b5000\b", str(server.port), command)
                run = subprocess.run(
                    ["bash", "-c", command], env=self.env, cwd=HERE, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT, check=False)
                shown = run.stdout + (run.stderr if run.returncode else b"")
                self.assertEqual(pattern(shown.decode()), pattern(output), run)

    def test_embedding(self):
        code = self.embedding.replace("5000", "0").replace("manager.add_process", """\
import types
manager.apps.append(types.SimpleNamespace(start=lambda *_: print(http.urls[0], flush=True)))
manager.add_process""", 1)
        program = self.run_program([PYTHON, "-W", "error", "-X", "dev", "-c", code], cwd=HERE,
                                   pattern=re.compile("(http.*)\n"))
        self.assertEqual(program.ok("GET", "/hello/world"), {"hello": "world"})
        until(lambda: program.ok("GET", "/processes/ticker/_pids")["pids"] == [1, 2])
        program.stop()
        self.assertEqual(program.stdout.count("ticker has exited\n"), 2)

    def test_text(self):
        """It is short and right about fields, events, commands, version; all has a help text."""
        self.assertLessEqual(self.text.count("\n"), 350)
        self.assertLessEqual(max(map(len, self.text.split("\n"))), 160)
        for name, command in gaffer.COMMANDS.items():
            for action in gaffer.make_parser(name)._actions:
                self.assertTrue(command.help and action.help, (name, action))
            self.assertIn("`%s" % name, self.text.replace(", `", " `"), name)
        for name, entry in [*gaffer.OPTIONS.items(), *gaffer.PARAMETERS.items()]:
            self.assertTrue(entry.help, name)
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", self.text, re.M))
        for name, option in gaffer.OPTIONS.items():
            default = "none" if option.default is None else "`%s`" % json.dumps(option.default)
            default = "required" if name in ("name", "cmd") else default
            self.assertEqual(rows.get(name), default, name)
        flapping = {name: default for name, (default, *_) in gaffer.FLAPPING.items()}
        self.assertIn("`%s`" % json.dumps(flapping), self.text)
        listed = re.search(r"^Types of events: (.*)\.$", self.text, re.M).group(1).split()
        self.assertLessEqual(set(gaffer.EVENT_TYPES), set(listed))
        self.assertIn("gaffer %s listening on" % gaffer.__version__, self.text)
        for name in os.listdir(os.path.join(HERE, "examples")):
            if not name.startswith(("_", ".")):
                self.assertIn("examples/" + name, self.text)


class Examples(CliCase):
    """Each program of the folder examples, run as its users do."""

    quick = False
    FOLDER = os.path.join(HERE, "examples")

    def test_dockerfile(self):
        """Its lines are right, as far as they can be told without Docker."""
        text = cli_read(os.path.join(self.FOLDER, "Dockerfile"))
        lines = dict(line.split(None, 1) for line in text.splitlines())
        *program, address = json.loads(lines["ENTRYPOINT"])
        self.assertEqual((program[:2], address), (
            ["python3", lines["COPY"].split()[1] + "gaffer.py"], "0.0.0.0:" + lines["EXPOSE"]))
        server = self.start(*program[2:], "0.0.0.0:0", env=dict(self.env, GAFFER_TOKEN="secret"))
        self.assertEqual(server.request("GET", "/ping")[2], b"OK")

    def test_websockets(self):
        for name, address, path, answers in (
                ("embed.py", "127.0.0.1:0", "/shout", [b"HELLO"]),
                ("websocket_echo.py", "0", "/echo", [b"hello"]),
                ("chat.py", "127.0.0.1:0", "/chat", [b"somebody has come in", b"hello"])):
            with self.subTest(name):
                program = self.run_program(
                    [PYTHON, "-W", "error", "-X", "dev", os.path.join(self.FOLDER, name), address],
                    pattern=re.compile(r"listening on (.*)\n\Z"))
                client = Wire(program.port).upgrade(path)
                self.addCleanup(client.close)
                client.text("hello")
                texts = (text for _, text in iter(client.read, None)
                         if not text.startswith(b"it is "))     # each minute
                self.assertEqual(list(itertools.islice(texts, len(answers))), answers)
                program.stop(signal.SIGINT)
                self.assertEqual(program.stdout, "")

    @unittest.skipUnless(shutil.which("nginx"), "needs nginx")
    def test_nginx(self):
        """The block is what nginx takes, and what its clients need."""
        folder, server = self.folder(), self.start("--allow-host", "gaffer.example.com")
        server.add("cat", "cat", redirect_input=True)
        address = folder + "/socket"
        block = cli_read(os.path.join(self.FOLDER, "nginx.conf"))
        temporary = "".join("%s_temp_path %s; " % (name, folder) for name in (
            "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        path = self.file(folder, "nginx.conf", (
            "pid %s/pid; error_log stderr; daemon off; events {} http { access_log off;\n%s\n%s\n"
            "server { listen unix:%s; %s } }" % (
                folder, re.search("map .*}", block).group(), temporary, address,
                block.replace("127.0.0.1:5000", "127.0.0.1:%d" % server.port))))
        nginx = subprocess.Popen(["nginx", "-p", folder, "-c", path], stderr=subprocess.PIPE)
        self.addCleanup(nginx.communicate)
        self.addCleanup(nginx.terminate)

        until(lambda: self.listens(address), "nginx")
        client = Wire(address).upgrade("/gaffer/wstreams/1")
        self.addCleanup(client.close)
        answer = Asked("unix:" + address).request("POST", "/gaffer/streams/1/stdin", "hello\n", {
            "Host": "gaffer.example.com", "Origin": "https://gaffer.example.com"})
        self.assertEqual(answer[2], b'{"ok": true}\n')
        self.assertEqual(client.read(), (1, b"hello\n"))

    def test_configurations(self):
        for name in ("gaffer.ini", "gaffer.toml")[:2 if sys.version_info >= (3, 11) else 1]:
            settings = gaffer.read_settings(os.path.join(self.FOLDER, name))
            self.assertEqual((list(settings.templates)[:2], settings.endpoints[0].bind),
                             (["dummy", "echo"], "127.0.0.1:5000"))


class Loadtest(CliCase):
    """examples/loadtest.py, for real, at sizes that say nothing about speed."""

    quick = False

    def test_figures(self):
        """Of a server that is given, which is left as it was, and of others beside it."""
        server = self.start()
        server.add("mine", "sleep 1000")
        words = ("--megabytes 1 --lines 200 --seconds 0.1 --messages 20 --restarts 1 --throughput "
                 "--fan-out 7 --echo --api 2 --spawn 3 --restart --growth 10 --against asyncio "
                 "--against bare --json --quiet --endpoint " + server.url)
        run = subprocess.run(
            [PYTHON, "-W", "error", os.path.join(HERE, "examples", "loadtest.py"), *words.split()],
            env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=2 * TIMEOUT, check=False)
        self.assertEqual((run.returncode, run.stderr), (0, b""), run.stdout)
        rows = {(row["system"], row["case"]): row for row in json.loads(run.stdout)["results"]}
        figures = {"continuous": "MB/s", "websocket": "MB/s", "SSE": "MB/s", "to 7": "p99 ms",
                   "through cat": "p50 us", "2 kept": "requests/s", "processes": "total ms",
                   "after kill -9": "p50 ms", "at 10": "event us"}
        self.assertEqual(set(rows), {
            ("asyncio", "to 7"), ("bare", "processes"), ("bare", "after kill -9"),
            *(("gaffer", case) for case in figures)})
        for (_, case), row in rows.items():
            self.assertGreater(row["figures"][figures[case]], 0)
            self.assertFalse(row.get("error") or any(map(row["figures"].get, (
                "lost", "lost bytes", "dropped bytes", "failed"))), row)
        self.assertEqual(rows["gaffer", "to 7"]["figures"]["deliveries"], 7 * 20)
        self.assertEqual(server.ok("GET", "/processes"), ["mine"])
        server.expect_stderr("WARNING loadtest:.*: exit .*signal 9")       # --restart


# --------------------------------------------------------------------------------------------------
# chaos: everything at once, at random, and then the books
# --------------------------------------------------------------------------------------------------
CHAOS_WRITER = python("""
    import os, sys, time
    n, (speed, end) = 0, map(int, sys.argv[1:])
    while n < end:
        data = b"".join(b"%08d\\n" % number for number in range(n, n + speed))
        while data: data = data[os.write(1, data):]
        n += speed
        time.sleep(0.01)
    """)
CHAOS_CHILDREN = (                              # all write numbered lines, or what they get
    {"cmd": "cat", "redirect_input": True}, {"cmd": "cat <&3 >&3", "custom_streams": ["extra"]},
    {"cmd": "trap '' TERM; echo 00000000; sleep 1000 & while :; do sleep 1000; done"},
    {"cmd": "echo 00000000; sleep 1000 & sleep 0.2; exit 3"},
    {"cmd": "false", "flapping": {"attempts": 2, "window": 1, "retry_in": 0.2}})
CHAOS_ACTS = [path.split() for path in (        # to a name or a pid, which may not have that
    *("POST /processes/%s/" + act for act in (
        "_start", "_stop", "_stop?wait=2", "_restart", "_restart?wait=2", "_add/1", "_add/2",
        "_sub/1", "_sub/2", "_signal/TERM", "_signal/9?group=true", "_signal/INT", "_signal/9",
        "_signal/STOP", "_signal/CONT?group=true")),
    "DELETE /processes/%s", "DELETE /streams/%s/stdin")]


def chaos_bytes(start, end):
    """What a stream holds from offset `start` to `end`."""
    lines = b"".join(b"%08d\n" % number for number in range(start // 9, end // 9 + 1))
    return lines[start % 9:start % 9 + end - start]


class ChaosFile(io.BufferedReader):
    """What is read from a connection; EOFError if it ends before."""

    def readline(self, *size):
        line = super().readline(*size)
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    def read(self, size):
        data = super().read(size)
        if len(data) < size:
            raise EOFError
        return data


class ChaosReader(threading.Thread):
    """Reads a stream. Every byte comes, or its loss is told, or the connection is cut."""

    open, faults = [], []
    books = {"delivered": 0, "dropped": 0, "resumed": 0}
    hurry = threading.Event()                   # from here on, nobody reads slowly

    def __init__(self, port, kind, pid, chance):
        super().__init__(name="%s of %s" % (kind, pid))
        self.port, self.pid, self.parts = port, pid, getattr(self, kind)
        self.path = "/streams/%s/%s?" % (pid, chance.choice(("stdout", "stdout", "extra")))
        self.loss = "&since=0" + chance.choice(("", "&loss=block"))
        self.slow = chance.random() < 0.3 and kind != "longpoll"
        self.most = chance.randrange(1, 3000)   # events before it connects again
        self.connect()
        self.open.append(self)
        self.start()

    def connect(self):
        self.wire = Wire(self.port, receive_buffer=65536 if self.slow else None)
        self.wire.file = ChaosFile(self.wire.file.detach(), 512 if self.slow else 8192)

    def run(self):
        place = 0
        try:
            for end, dropped, data in self.parts():
                begin = end - len(data)
                assert (place + dropped, data) == (begin, chaos_bytes(begin, end)), (
                    "at %d, after %d dropped, came %r up to %d" % (place, dropped, data[:60], end))
                place = end
                self.books["delivered"] += len(data)
                self.books["dropped"] += dropped
                if self.slow:
                    self.hurry.wait(len(data) / 250000)
        except (OSError, EOFError):
            pass                                # the test has dropped it, or the server has
        except Exception as error:
            self.faults.append("%s: %s" % (self.name, repr(error)[:500]))
        finally:
            self.wire.close()
            self.open.remove(self)

    # each: (offset behind it, bytes that were dropped before it, bytes)

    def longpoll(self):
        status, end = 200, 0
        while status in (200, 204) and end < 20000:
            self.wire.request("%stimeout=0.3&since=%d" % (self.path, end))
            status, headers, data = self.wire.answer()
            if status != 404:
                end = int(headers["Gaffer-Offset"])
                yield end, int(headers["Gaffer-Dropped"] or 0), data

    def continuous(self):
        wire = self.wire.request(self.path + "feed=continuous" + self.loss).head()
        if wire.status == 200:
            end = int(wire.headers["Gaffer-Offset"])
            yield end, end, b""
            for data in iter(wire.chunk, b""):
                end += len(data)
                yield end, 0, data

    def sse(self, *headers):
        wire = self.wire.request(self.path + "feed=eventsource" + self.loss, *headers).head()
        for kind, data, number in iter(wire.event, None) if wire.status == 200 else ():
            end = int(number.partition("@")[0].rstrip("x"))
            if kind == "dropped":
                yield end, json.loads(data)["bytes"], b""
            else:                               # each ninth byte is the end of a line
                data = b"" if kind == "exit" else data.encode() + b"\n" * (end % 9 == 0)
                yield end, 0, data
            self.most -= 1
            if self.most == 0:                  # a reconnect: no gap, no repeat
                self.books["resumed"] += 1
                wire.close()
                self.connect()
                yield from self.sse("Last-Event-ID: " + number)
                break

    def websocket(self):
        wire = self.wire.upgrade("/wstreams/%s?type=binary&readonly=true&since=0" % self.pid)
        end, (opcode, data) = 0, wire.read() if wire.status == 101 else (None, b"")
        while opcode == 2:
            end += len(data)
            yield end, 0, data
            opcode, data = wire.read()
        assert opcode in (8, None) and data[:2] in (b"", b"\x03\xe8", b"\x03\xe9", b"\x03\xf5")


class Chaos(CliCase):
    """All of it at random, under a seed. Then the books: events, bytes, threads, memory."""

    quick = False
    seconds, seed = 2.0, 20                     # main(): --chaos SECONDS, --seed N

    def test_chaos(self):
        self.chance, self.mark = random.Random(self.seed), "chaos-%d-%d" % (os.getpid(), self.seed)
        self.events = [{"id": "0"}]
        self.server = self.run_program(         # one arena, so that memory can be compared
            [*CLI_COMMAND, "serve", "--bind", "127.0.0.1:0", "--window", "65536"],
            env=dict(self.env, MALLOC_ARENA_MAX="1"))
        self.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        self.addCleanup(self.connection.close)
        first, states = self.state()[:2], []
        for seconds in min(10.0, self.seconds / 3), self.seconds:
            self.round(seconds)
            until(lambda: all(now <= then for now, then in zip(self.state(), first)), "the ends")
            states.append(self.state())
        self.server.stop()
        if self.server.stderr:                  # chance decides whether one has failed
            self.server.expect_stderr(r"WARNING \S+: (exit \(.*\)|flap|stop: gave up.*)$")
        if self.seconds > 10:
            print("chaos: seed %d, %d events, %s; threads, descriptors, KiB: %s" % (
                self.seed, len(self.events), ChaosReader.books, states))
        # the log of events may fill, and what has ended is remembered for a minute
        self.assertLess(states[1][2], states[0][2] + 16384)

    def state(self):
        """(threads, descriptors, resident KiB) of the server."""
        pid = self.server.process.pid
        self.server.request("GET", "/ping")     # the first one starts a thread
        status = dict(re.findall(r"(\w+):\s+(\d+)", cli_read("/proc/%d/status" % pid)))
        return int(status["Threads"]), len(os.listdir("/proc/%d/fd" % pid)), int(status["VmRSS"])

    def marked(self):
        """Whether a process that was ever started lives, by its environment."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open("/proc/%s/environ" % name, "rb") as file:
                if self.mark.encode() in file.read() and alive(int(name)):
                    return True
        return False

    def ask(self, method, path, body=None):
        """The value of a request on a connection that is kept, None if it is not there."""
        self.connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body)
        answer = self.connection.getresponse()
        data = answer.read()
        self.assertIn(answer.status, (200, 403, 404, 409, 503, 504), (method, path, data))
        return json.loads(data) if data and answer.status == 200 else None

    def round(self, seconds):
        """Chaos for so long, then the end of all."""
        self.written = {}                       # {pid: lines that were sent to it}
        since, self.events = self.events[-1]["id"], []
        feed = Wire(self.server.port)
        self.addCleanup(feed.close)
        feed.request("/watch?feed=continuous&since=" + since).head()

        def take():
            for line in part_lines(iter(feed.chunk, b"")):
                self.events.append(json.loads(line))
                if (self.events[-1]["name"], self.events[-1]["event"]) == ("end", "create"):
                    break
        taker = threading.Thread(target=take)
        taker.start()
        actions = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        actions += 2 * [self.do_add, self.do_act, self.do_write, self.do_read]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not ChaosReader.faults:
            self.chance.choice(actions)()
        for name in self.ask("GET", "/processes"):
            self.ask("DELETE", "/processes/" + name)
        children = gaffer.ProcfsTable().children
        until(lambda: not self.marked() and not children(self.server.process.pid), "the ends")
        self.ask("POST", "/processes", {"name": "end", "cmd": "true", "start": False})
        taker.join(TIMEOUT)
        feed.close()
        self.ask("DELETE", "/processes/end")
        self.connection.close()
        ChaosReader.hurry.set()
        for reader in list(ChaosReader.open):
            reader.join(TIMEOUT)                # with its stream
        ChaosReader.hurry.clear()
        self.assertEqual((ChaosReader.faults, ChaosReader.open), ([], []))
        # every event once and in order; every process spawned once and gone once
        numbers = [int(event["id"].partition("@")[0]) for event in self.events]
        self.assertEqual(numbers, list(range(numbers[0], numbers[0] + len(numbers))))
        self.assertEqual(self.events[-1]["name"], "end")
        spawned, exited = (sorted(event["pid"] for event in self.events if event["event"] == kind)
                           for kind in ("spawn", "exit"))
        self.assertEqual(spawned, exited)
        self.assertEqual(len(set(spawned)), len(spawned))

    # what may happen

    def any_pid(self):
        """A running pid, or 0."""
        return self.chance.choice(self.ask("GET", "/processes?running=true") or [0])

    def do_add(self):
        chance, name = self.chance, "t%d" % self.chance.randrange(6)
        info = {"env": {"CHAOS": self.mark}, "numprocesses": chance.choice((1, 1, 2, 3)),
                "graceful_timeout": 0.2, "start": chance.random() < 0.9}
        if chance.random() < 0.5:
            args = [chance.choice(("1", "10", "100", "3000")), chance.choice(("1000", "10000000"))]
            info.update(CHAOS_WRITER, args=CHAOS_WRITER["args"] + args)
        else:
            info.update(chance.choice(CHAOS_CHILDREN), shell=True)
        if chance.random() < 0.7:
            self.ask("POST", "/processes", dict(info, name=name))
        else:
            self.ask("PUT", "/processes/" + name, info)

    def do_act(self):
        method, path = self.chance.choice(CHAOS_ACTS)
        name = "t%d" % self.chance.randrange(6)
        self.ask(method, path % self.chance.choice((name, self.any_pid())))

    def do_write(self):
        """Numbered lines to what sends them back: its output is checked like any other."""
        pid, number = self.any_pid(), self.chance.choice((1, 100, 10000, 100000))
        label, start = self.chance.choice(("stdin", "extra")), self.written.get(pid, 0)
        data = chaos_bytes(9 * start, 9 * (start + number))
        if self.ask("POST", "/streams/%d/%s" % (pid, label), data):
            self.written[pid] = start + number

    def do_read(self):
        if len(ChaosReader.open) < 12:
            kind = self.chance.choice(("longpoll", "continuous", "sse", "websocket"))
            ChaosReader(self.server.port, kind, self.any_pid(), self.chance)

    def do_drop(self):
        """End a reader from this side, and the connection that is kept."""
        self.connection.close()
        for reader in ChaosReader.open[:1]:
            with contextlib.suppress(OSError):
                reader.wire.sock.shutdown(self.chance.choice((socket.SHUT_WR, socket.SHUT_RDWR)))

    def do_flood(self):
        """Requests and a feed of which no answer is taken: a reset."""
        path = self.chance.choice(("/watch?", "/stats?interval=0.1&", "/streams/t1/stdout?"))
        with contextlib.closing(Wire(self.server.port)) as wire:
            wire.send(http_bytes("GET", "/stats") * 30).request(path + "feed=eventsource")


class Structure(Case):
    """gaffer.py as a text: what it promises to its reader."""

    @classmethod
    def setUpClass(cls):
        cls.source = cli_read(CLI_FILE)

    def down(self, source):
        """["name at line"] of what is used, now or later, above the statement that binds it."""
        def symbols(table):
            yield from table.get_symbols()
            for inner in table.get_children():
                yield from symbols(inner)
        bound, found, lines = {*dir(builtins), "__name__", "__file__"}, [], source.splitlines()
        for statement in ast.parse(source).body:
            first = min(node.lineno for node in [
                statement, *getattr(statement, "decorator_list", ())])
            text = "\n".join(lines[first - 1:statement.end_lineno])
            table = symtable.symtable(text, "gaffer.py", "exec")
            bound |= {each.get_name() for each in table.get_symbols()   # it may use itself
                      if each.is_assigned() or each.is_imported()}
            used = {each.get_name() for each in symbols(table)
                    if each.is_referenced() and each.is_global()}
            found += ["%s at line %d" % (name, statement.lineno) for name in sorted(used - bound)]
        return found

    def test_names_point_up_only(self):
        self.assertEqual(self.down(self.source), [])
        self.assertEqual(self.down(
            "def f():\n    return lambda: later\nclass C:\n    x = 1\n    y = x\n"
            "    def m(self): return D\nlater = 1\nclass D: pass\n"),
            ["later at line 1", "D at line 3"])

    IMPORT = """if True:
        import importlib.util, logging, os, signal, sys, threading
        def state():
            return (threading.active_count(), sorted(os.listdir("/proc/self/fd")), os.getcwd(),
                    dict(os.environ), [signal.getsignal(number) for number in range(1, 32)],
                    logging.root.handlers, logging.root.level)
        sys.path.insert(0, sys.argv[1])
        before = state()
        import gaffer
        assert state() == before, (before, state())
        assert "json" in sys.argv and all(map(importlib.util.find_spec, sys.argv[2:])), sys.argv
        """

    def test_import(self):
        """It has no side effect, and needs nothing but the standard library: -I -S."""
        names = {getattr(node, "module", alias.name) for node in ast.walk(ast.parse(self.source))
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        out = subprocess.check_output(
            [PYTHON, "-W", "error", "-X", "dev", "-I", "-S", "-c", self.IMPORT, HERE, *names],
            stderr=subprocess.STDOUT, timeout=TIMEOUT)
        self.assertEqual(out, b"")

    def test_docstrings_and_sections(self):
        for name in gaffer.__all__:
            value = getattr(gaffer, name)
            self.assertTrue(value.__doc__, name)
            for method, function in vars(value).items() if isinstance(value, type) else ():
                if not method.startswith("_") and callable(function):
                    self.assertTrue(function.__doc__, "%s.%s" % (name, method))
        listed = re.findall(r"^    ([a-z]+(?: [A-Za-z]+|, errors)*?) {2,}\w", gaffer.__doc__, re.M)
        banners = re.findall(r"^# -{90,}\n# (.+)\n#\n", self.source, re.M)
        self.assertGreater(len(banners), 10)
        self.assertEqual([name for name in listed if name in banners], banners)

    def test_routes_are_in_the_readme(self):
        readme = re.sub("<.*?>", "<>", cli_read(os.path.join(HERE, "README.md")))
        rows = re.findall(r"^\| (`(?:GET|POST)[^|]*)\|", readme, re.M)
        for path, methods in gaffer.ROUTES:
            path = re.sub("<.*?>", "<>", path)
            end = path[max(0, path.find("/_")):] + "`"      # `/_stop` belongs to the path before it
            shown = " ".join(row for row in rows if end in row)
            for method in set(methods) - {"*"}:             # "*": decided later
                self.assertIn("`" + method, shown, path)

    def test_mutants(self):
        """The text of each is there, once, and its tests are."""
        for text, replacement, names in MUTANTS:
            with self.subTest(text):
                self.assertEqual((self.source.count(text), replacement == text), (1, False))
                find_tests(names.split())


# --------------------------------------------------------------------------------------------------
# mutants: small faults of gaffer.py, each of which a test has to see
# --------------------------------------------------------------------------------------------------
MUTANTS = [                             # text of gaffer.py, what takes its place, tests that fail
    (" ** 2 * len(words)", " ** 2", "PureErrors.test_near"),
    ("_inbox.append((function, args))\n        if self._sleeping:\n            self._wake()",
     "_inbox.append((function, args))", "PureRunning.test_wakes"),
    ("> 64 + 2 *", "> 10 ** 9 +", "PureTimers.test_cancelled_are_forgotten"),
    ("self._callbacks.get(key.fd) is key.data", "key.fd in self._callbacks",
     "PureReadiness.test_another_descriptor"),
    ("self.clock(), SELECT_MAX)", "self.clock())", "PureRunning.test_any_time"),
    ("slowest = min(", "slowest = max(", "PureLoss.test_block"),
    ("[:-1].rsplit(", ".rsplit(", "PureWindow.test_model"),
    ("range(SHARES_PER_TURN)", "range(99)", "PureReader.test_shares"),
    ("DRAIN_TIME = 2.0", "DRAIN_TIME = 99.0", "StreamsClock.test_grandchild_holds_the_pipe"),
    (">= TEMPLATES_MAX", "> TEMPLATES_MAX", "PureTemplates.test_most_templates"),
    ("self.queued -= count", "pass", "StreamsClock.test_heartbeat_is_not_queued"),
    ("if satisfied():                     # it", "if False:  # it", "PureWindow.test_poll"),
    (">= JOURNAL_ENTRIES", ">= 10 ** 9", "PureJournal.test_nobody_reads"),
    ("len(chunks[0]) < self.start", "len(chunks[0]) <= self.start", "PureWindow.test_byte_before"),
    ("if left < 0:", "if False:", "PureReading.test_chunked_bodies"),
    ("self.exited_at is not None and pid_exists(self.os_pid):", "False:",
     "ProcessHostile.test_a_number_of_another"),
    ("elif not self.exited:", "else:", "ProcessHostile.test_a_number_of_another"),
    ("if not self.gone:     ", "if True:     ", "ProcessReady.test_commands"),
    ('event != "exit" or self._signalled is None', "False", "ProcessTimes.test_steps_of_a_stop"),
    ("os.close(self._fd)\n            self._schedule()", "pass\n            self._schedule()",
     "ProcessShortage.test_without_a_pidfd"),
    ('max(AFTERLIFE_COUNT, 2 * template.info["numprocesses"])', "AFTERLIFE_COUNT",
     "ProcessActions.test_final_output"),
    ("self.gave_up = False ", "self.gave_up = vars(self).get('gave_up') ", "ProcessTimes.test_flapping"),
    (' not in ("backoff", "flapping")', ' != "flapping"', "ProcessActions.test_wait"),
    (" and not flags & socket.MSG_TRUNC", "", "ProcessReady.test_notify"),
    ("if self._lingered > LINGER_SIZE:", "if False:", "HttpConnections.test_linger"),
    ("self.secure and self._mask & selectors.EVENT_READ and self.sock.pending()", "False",
     "HttpEndpoints.test_tls_streams"),
    ("self.reported_until:\n" + 24 * " " + "source.count_dropped(count)", "self.reported_until:",
     "HttpMetrics.test_cut_reader"),
    ("itertools.islice(self._queue, PARTS_MAX)", "self._queue", "HttpLibrary.test_websocket_queue"),
    (" + WAIT_EXTRA", "", "HttpEndpointTable.test_actions"),
    ("len(http.handshakes) >= HANDSHAKES_MAX", "False", "HttpEndpoints.test_handshakes"),
    ("self._of_address[connection.peer] -= 1", "pass", "HttpLimits.test_of_one_address"),
    (" and os.path.samestat(os.lstat(self.path), self._inode)", "",
     "HttpEndpoints.test_unix_socket"),
    ("access.check_origin(request)", "pass", "HttpAccess.test_origins"),
    ("it is closed\", self.stall)\n            self.close()", "it is closed\", self.stall)",
     "StreamsClock.test_who_takes_nothing_is_closed"),
    ('BLOCK_STALL if reader.loss == "block" else STALL', "STALL",
     "StreamsClock.test_who_takes_nothing_is_closed"),
    ("time.monotonic() + SEND_TIME", "time.monotonic() + SEND_TIME + 60",
     "HttpConnections.test_client_that_takes_nothing"),
    ("late and not self._paused:", "late:", "PureOutput.test_block_after_the_exit"),
    ("self._fd is None or self._room() == 0", "self._fd is None", "PureOutput.test_block_at_the_end"),
    ("if not self._queue:\n                    self.send(self.sign)", "self.send(self.sign)",
     "StreamsClock.test_heartbeat_is_not_queued"),
    ('loss == "block" and request.method == "GET":', 'loss == "block":',
     "StreamsSmallWindow.test_block"),
    ("self.queued < self.limit:", "True:", "StreamsWebsocket.test_pings"),
    (">= INCLUDES_MAX", "> INCLUDES_MAX", "ConfigFiles.test_all_faults_at_once"),
    ("st_mode & 0o044:", "st_mode & 0o004:", "CliErrors.test_starts_that_fail"),
    ("os.stat(FOLDER_SOCKET).st_uid == os.geteuid()", "True", "CliCommands.test_endpoints"),
    ("kill=self._count > 1", "kill=self._count > 2", "CliSignals.test_second_signal"),
    ("handlers[signal.SIGCHLD] = signal.SIG_DFL", "pass", "CliSignals.test_careless_parent"),
    ("first = min(", "first = max(", "ProcessTimes.test_stop_by_priority"),
    ("= later or self._stop_steps", "= later", "ProcessTimes.test_steps_of_a_stop"),
    ("args.exit_status or (0 if well else 3)", "args.exit_status", "CliStatus.test_status"),
    ("if exit_status is None or not is_away(error):", "if True:", "CliStatus.test_watch"),
    ("if all(template.find_blocker(unknown=True) for template in active)", "if not active",
     "CliExit.test_exit_when_done"),
    ("process.by_itself and not self.stopping", "not self.stopping",
     "CliExit.test_what_does_not_end_it"),
    ("os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)", "pass",
     "CliServe.test_standard_streams"),
    ("template.gave_up and not set(fields) <= set(ADJUSTABLE)", "False",
     "ConfigReload.test_one_that_gave_up"),
    ("dict(template.info, **{field: after[name][field]", "dict(**{field: after[name][field]",
     "ConfigReload.test_what_was_done_by_hand_stays"),
    ('outcome["failed"][name], outcome["ok"] = str(error), False',
     'outcome["failed"][name] = str(error)', "ConfigReload.test_what_the_system_refuses"),
    (' and not re.search(r"[|&()`]|\\btrap\\b", others)', "",
     "ProcfileTexts.test_a_shell_only_where_it_is_needed"),
    ("min(now + STOP_SEND, end)", "min(until or now + STOP_SEND, end)",
     "StreamsClock.test_last_words_for_a_slow_client"),
    ("status < 500 and status not in (408, 429)", "status < 400",
     "WebHooksTest.test_tried_again_unless_refused"),
    ("if readers or not", "if not", "ProcfileUp.test_one_dies_and_all_stop"),
]


def try_mutant(row):
    """Whether the tests of a row fail, or hang, with gaffer.py's fault."""
    text, replacement, names = row
    with tempfile.TemporaryDirectory(prefix="gaffer-mutant-") as folder:
        tree = os.path.join(folder, "tree")
        shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        with open(os.path.join(tree, "gaffer.py"), "w", encoding="utf-8") as file:
            file.write(cli_read(CLI_FILE).replace(text, replacement))
        with subprocess.Popen([PYTHON, "test_gaffer.py", *names.split()], cwd=tree,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=dict(os.environ, XDG_CACHE_HOME=folder)) as run:
            try:
                return run.wait(90) != 0
            except subprocess.TimeoutExpired:
                run.terminate()
                return True


def run_mutants():
    """Try all mutants, two at a time. Returns the exit status."""
    names, killed = {name for _, _, names in MUTANTS for name in names.split()}, 0
    if subprocess.call([PYTHON, os.path.abspath(__file__), *names], timeout=600):
        return 1                        # these tests fail without a mutant, too
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for row, found in zip(MUTANTS, pool.map(try_mutant, MUTANTS)):
            print("killed  " if found else "SURVIVED", *map(repr, row), flush=True)
            killed += found
    print("mutants: %d of %d killed" % (killed, len(MUTANTS)))
    return int(killed < len(MUTANTS))


# --------------------------------------------------------------------------------------------------
# the runner: shares of the tests, each in a process of its own
# --------------------------------------------------------------------------------------------------
SECONDS_FILE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                            "gaffer-tests.json")        # {test: seconds it took}
SHARE_SECONDS = 3.0                     # a class that takes longer is divided


class Result(unittest.TestResult):
    """In a share's process: writes a line of JSON as each test begins, and one as it ends. What
    takes longer than its limit, in a test or between two, ends the process with all its stacks."""

    def __init__(self, file):
        super().__init__()
        self._file = file
        self.begin("the class", Case.patience)

    def tell(self, **values):
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def begin(self, what, patience):
        """Something begins that may take so many seconds."""
        faulthandler.dump_traceback_later(patience, exit=True)
        self.tell(began=what, patience=patience)

    def end(self, what, **values):
        """Something has ended: tell its faults."""
        self.tell(ended=what, skipped=["%s: %s" % (test.id(), why) for test, why in self.skipped],
                  faults=["%s\n%s" % fault for fault in self.errors + self.failures], **values)
        self.errors, self.failures, self.skipped = [], [], []

    def startTest(self, test):
        super().startTest(test)
        self.end("the class")           # its setUpClass, if that has failed
        self.begin(test.id().partition(".")[2], test.patience)
        self._began = time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        self.end(test.id().partition(".")[2], seconds=round(time.monotonic() - self._began, 3))
        self.begin("the class", Case.patience)


class Share:
    """A class of tests, or a part of one, in a process and a process group of its own. They wait
    most of their time, so several run at once."""

    def __init__(self, tests):
        self.tests = tests              # ["Class.test"]
        self.name = " ".join(dict.fromkeys(test.partition(".")[0] for test in tests))
        self.doing = "its start"
        self.seconds = {}               # of the tests that have ended
        self.faults, self.failed, self.skipped = [], [], []     # texts, tests or classes, texts

    def start(self):
        self._folder = tempfile.mkdtemp(prefix="gaffer-test-")
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        self._text, self._signals = b"", [signal.SIGABRT]
        self._deadline = time.monotonic() + Case.patience
        self.pid = forked(self._run, write)
        os.close(write)

    def _run(self, pipe):
        os.setpgid(0, 0)
        with open(os.path.join(self._folder, "stderr"), "w+b") as file:
            os.dup2(file.fileno(), 2)
        os.close(self._pipe)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        atexit._clear()                 # what the first process has to clean up is still in use
        faulthandler.enable()
        tempfile.tempdir = self._folder
        if not sys.warnoptions:
            warnings.simplefilter("error")
        FAULTS.install()
        names = ["__main__." + name for name in self.tests]
        with os.fdopen(pipe, "w") as file:
            result = Result(file)
            unittest.defaultTestLoader.loadTestsFromNames(names).run(result)
            atexit._run_exitfuncs()
            gc.collect()
            result.errors += [("outside of the tests", fault) for fault in FAULTS.take()]
            result.end("the class")
            result.begin("the end", Case.patience)
        sys.stdout.flush()
        return 0

    def read(self):
        with contextlib.suppress(BlockingIOError):
            for data in iter(lambda: os.read(self._pipe, 1 << 16), b""):
                self._text += data
        *lines, self._text = self._text.split(b"\n")
        for line in map(json.loads, lines):
            if "began" in line:
                self.doing = line["began"]
                self._deadline = time.monotonic() + line["patience"] + 5
                continue
            self.skipped += line["skipped"]
            for fault in line["faults"]:
                self.fault(fault, line["ended"])
            if "seconds" in line:
                self.seconds[line["ended"]] = line["seconds"]

    def fault(self, text, test=None):
        """Something is wrong in a test, or in the share."""
        self.faults.append(text)
        self.failed.append(test if test in self.tests else self.name)

    def hurry(self):
        """End what does not end by itself: its group shows its stacks, then it is killed."""
        if time.monotonic() > self._deadline:
            os.killpg(self.pid, self._signals.pop() if self._signals else signal.SIGKILL)
            self._deadline = time.monotonic() + 5

    def over(self):
        """Whether its process has ended; then all is known of it."""
        if not os.waitpid(self.pid, os.WNOHANG)[0]:
            return False
        self.read()
        if self.doing != "the end":
            self.fault("%s: the process ended in %s; %d of %d tests have run" % (
                self.name, self.doing, len(self.seconds), len(self.tests)), self.doing)
        left = process_group(self.pid)
        if left:
            self.fault("%s: processes are left: %s" % (self.name, left))
            os.killpg(self.pid, signal.SIGABRT)
            until(lambda: not process_group(self.pid) or os.killpg(self.pid, signal.SIGKILL))
        for path in glob.glob(os.path.join(self._folder, "**", "stderr*"), recursive=True):
            text = cli_read(path).strip()
            if text and self.faults:
                self.faults.append("%s:\n%s" % (os.path.basename(path), text))
        self.close()
        return True

    def close(self):
        os.close(self._pipe)
        shutil.rmtree(self._folder, ignore_errors=True)


def make_shares(tests, seconds):
    """Divide tests ("Class.test") into shares, the longest first."""
    def total(group):
        return sum(seconds.get(test, 0.2) for test in group)
    groups, shares = {}, []
    for test in tests:
        name = test.partition(".")[0]
        groups.setdefault(globals()[name].share or name, []).append(test)
    for name, group in groups.items():
        parts = int(total(group) / SHARE_SECONDS) + 1 if name in globals() else 1
        shares += [group[part::parts] for part in range(min(parts, len(group)))]
    return [Share(share) for share in sorted(shares, key=total, reverse=True)]


def run_tests(tests, jobs, slowest):
    """Run tests, `jobs` shares at a time. Returns the exit status."""
    known, seconds, skipped, failed = {}, {}, [], []
    with contextlib.suppress(FileNotFoundError), open(SECONDS_FILE) as file:
        known = json.load(file)
    waiting, running, began = make_shares(tests, known), [], time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            signal.sigtimedwait({signal.SIGCHLD}, 0.2)
            for share in list(running):
                share.read()
                share.hurry()
                if share.over():
                    running.remove(share)
                    seconds.update(share.seconds)
                    skipped += share.skipped
                    failed += share.failed
                    for text in share.faults:
                        print(text.rstrip("\n") + "\n", file=sys.stderr, flush=True)
    finally:
        for share in running:           # Ctrl-C, or a fault of the runner
            print("it was running %s: %s" % (share.name, share.doing), file=sys.stderr)
            os.killpg(share.pid, signal.SIGKILL)
            os.waitpid(share.pid, 0)
            share.close()
    if ForkServer.end():
        failed.append("ForkServer (a command was left)")
    for text in skipped:
        print("skipped: " + text)
    for test in sorted(seconds, key=seconds.get, reverse=True)[:slowest]:
        print("%7.3f s %s" % (seconds[test], test))
    print("Ran %d tests in %.3fs, %d skipped\n\n%s" % (
        len(seconds), time.monotonic() - began, len(skipped),
        "FAILED: " + " ".join(dict.fromkeys(failed)) if failed else "OK"))
    os.makedirs(os.path.dirname(SECONDS_FILE), exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(SECONDS_FILE), delete=False) as file:
        json.dump(dict(known, **seconds), file)
    os.replace(file.name, SECONDS_FILE)
    return 1 if failed or not seconds else 0


def find_tests(names):
    """["Class.test"] that `names` mean; all, if there are none. SystemExit: a wrong name."""
    cases = {name: unittest.defaultTestLoader.getTestCaseNames(case)
             for name, case in globals().items()
             if isinstance(case, type) and issubclass(case, unittest.TestCase)}
    found = []
    for name in names or cases:
        case, _, test = name.partition(".")
        if case not in cases or test and test not in cases[case]:
            sys.exit("there is no test " + name)
        found += ["%s.%s" % (case, each) for each in ([test] if test else cases[case])]
    return found


def main():
    """Run all tests, or the classes and tests that are named."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="CLASS[.TEST]")
    for name, kind, default, text in (
            ("--quick", None, False, "without browsers, load test and other long ones"),
            ("--slowest", int, 10, "show the N slowest tests (10)"),
            ("--jobs", int, 2 * gaffer.CORES, "processes at a time"),
            ("--mutants", None, False, "try whether the tests see small faults of gaffer.py"),
            ("--figures", None, False, "what the web page costs"),
            ("--pictures", str, None, "write pictures of the web page into this folder"),
            ("--fuzz", int, None, "only PureFuzz, N cases of each kind"),
            ("--hostile", int, None, "only CliHostile, N cases of each kind"),
            ("--chaos", float, None, "only Chaos, so many seconds"),
            ("--seed", str, None, "SEED or SEED:FIRST: the same cases again")):
        more = {"type": kind} if kind else {"action": "store_true"}
        parser.add_argument(name, default=default, help=text, **more)
    given = parser.parse_args()
    if given.mutants:
        sys.exit(run_mutants())
    for case, count in (PureFuzz, given.fuzz), (CliHostile, given.hostile):
        if count:
            seed, _, first = (given.seed or str(random.randrange(10 ** 6))).partition(":")
            case.cases, case.seed, case.first = count, seed, int(first or 0)
            case.patience = Case.patience + count / 50
            print("%s: %d cases of each kind, seed %s" % (case.__name__, count, seed), flush=True)
    if given.chaos:
        Chaos.seconds, Chaos.seed = given.chaos, int(given.seed or Chaos.seed)
        Chaos.patience = Case.patience + 2 * given.chaos
    if given.pictures:
        BrowserPictures.directory = os.path.abspath(given.pictures)
    tests = find_tests(given.names or [case for case, only in (
        ("PureFuzz", given.fuzz), ("CliHostile", given.hostile), ("Chaos", given.chaos),
        ("BrowserFigures", given.figures), ("BrowserPictures", given.pictures)) if only])
    if given.quick:
        tests = [test for test in tests if globals()[test.partition(".")[0]].quick]
    # what nohup or a script's & ignores, commands would inherit; a handler they do not
    for signum in signal.SIGHUP, signal.SIGINT, signal.SIGQUIT:
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)
    ForkServer.start()
    with tempfile.TemporaryDirectory() as cache:
        CliCase.env = {name: value for name, value in os.environ.items()
                       if not name.startswith(("PYTHON", "GAFFER"))}
        CliCase.env["PYTHONPYCACHEPREFIX"] = cache
        sys.exit(run_tests(tests, given.jobs, given.slowest))


if __name__ == "__main__":
    main()
