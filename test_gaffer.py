#!/usr/bin/env python3
"""Tests of gaffer.py: real processes, real sockets, real signals; run it with `python3 test_gaffer.py`.

Four rings, in the order of gaffer.py's sections: pure code; the loop with real children; HTTP on real sockets; the
command line, the README and the structure of the file. Nothing sleeps to be in step with something: every wait is for a
byte, an event or an exit, and TIMEOUT bounds failure only.
"""
import argparse
import ast
import atexit
import base64
import builtins
import concurrent.futures
import contextlib
import dis
import email.utils
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
import runpy
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
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tracemalloc
import unittest
import unittest.mock
import urllib.parse
import weakref
import warnings
import wsgiref.util
import wsgiref.validate
import zlib

import gaffer

TIMEOUT = 30.0                      # nothing takes so long unless it is broken
HERE = os.path.dirname(os.path.abspath(__file__))
PYTHON = sys.executable


# --------------------------------------------------------------------------------------------------------------------
# helpers
# --------------------------------------------------------------------------------------------------------------------
def until(condition, what="the condition", timeout=TIMEOUT):
    """Wait for something that nothing announces (an entry of /proc, another process's file). Returns what was true."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError("%s did not come true in %g seconds" % (what, timeout))
        pause.wait(0.005)


def alive(os_pid):
    """True while an OS process lives (a zombie does not)."""
    try:
        with open("/proc/%d/stat" % os_pid) as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def python(code):
    """A command line (a list for cmd and args) that runs Python code without the start-up cost of site."""
    return {"cmd": PYTHON, "args": ["-I", "-S", "-u", "-c", textwrap.dedent(code)]}


def open_descriptors():
    """What this process has open: {descriptor: what it is}."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink("/proc/self/fd/" + name)
    return found


class Faults(logging.Handler):
    """What goes wrong where no test looks: ERROR records of gaffer's logger, exceptions of threads and
    destructors, and what is written to this process's stderr."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self._texts, self._size = [], 0

    def install(self):
        """Collect from here on. File descriptor 2 is a file that can be read."""
        self._size = os.fstat(2).st_size
        logging.getLogger("gaffer").addHandler(self)
        threading.excepthook = sys.unraisablehook = self._raised

    def emit(self, record):
        self._texts.append(self.format(record))

    def _raised(self, args):
        error = args.exc_type, args.exc_value, args.exc_traceback
        self._texts.append("".join(traceback.format_exception(*error)))

    def take(self):
        """The texts collected since the last call."""
        sys.stderr.flush()
        start, self._size = self._size, os.fstat(2).st_size
        written = os.pread(2, self._size - start, start) if self._size > start else b""
        texts, self._texts = self._texts, []
        return texts + written.decode("utf-8", "replace").splitlines()


FAULTS = Faults()


def unexpected(texts, patterns):
    """What is wrong with `texts`: those that no pattern matches, and the patterns that match none."""
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
        """This test logs an error, lets a thread fail or writes to stderr: `pattern` is found in its
        text. It has to come; any other fails the test."""
        self._expected.append(pattern)

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
        left = {fd: what for fd, what in open_descriptors().items() if fd not in descriptors and "libgcc_s" not in what}
        self.assertEqual(left, {}, "descriptors are left")
        self.no_child_is_left()

    def no_child_is_left(self):
        """Fails if this process has a child."""
        with self.assertRaises(ChildProcessError, msg="a child is left"):
            os.waitpid(-1, os.WNOHANG)


class Running:
    """A Manager with an HttpHandler on a free port of 127.0.0.1, which runs on a thread of its own."""

    def __init__(self, window=gaffer.WINDOW_SIZE, process_table=None, endpoints=None, **options):
        self.http = gaffer.HttpHandler(endpoints or [gaffer.HttpEndpoint("127.0.0.1:0")], **options)
        self.manager = gaffer.Manager([self.http, self], window_size=window, process_table=process_table)
        self._started = threading.Event()
        self.error = None
        self._thread = threading.Thread(target=self._run, name="test-manager")
        self._thread.start()
        assert self._started.wait(TIMEOUT)
        if self.error is not None:
            self._thread.join()
            raise self.error
        self.url = self.http.urls[0]
        self.port = int(self.url.rpartition(":")[2]) if self.url.startswith("http") else None

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
        """Stop the manager, wait for its thread."""
        self.manager.stop(kill=True)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def request(self, method, path, body=None, headers=None, timeout=TIMEOUT):
        """(status, headers, body as bytes) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
            return status, answer.headers, data
        finally:
            connection.close()

    def json(self, method, path, body=None, headers=None):
        """(status, value) of one request."""
        status, _, data = self.request(method, path, body, headers)
        return status, json.loads(data) if data else None

    def ok(self, method, path, body=None):
        """The value of a request that has to succeed."""
        status, value = self.json(method, path, body)
        assert status == 200, (method, path, status, value)
        return value

    def add(self, name, command, **options):
        """POST a template; `command` is a string, or what python() returns. Returns its pids."""
        info = dict(command if isinstance(command, dict) else {"cmd": command}, name=name, **options)
        self.ok("POST", "/processes", info)
        return self.ok("GET", "/processes/%s/_pids" % name)["pids"]

    def connect(self):
        """A raw socket."""
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT)

    def stream(self, path, headers=None):
        """An open http.client response (with its connection in .connection) of a GET that goes on."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        answer.connection = connection
        return answer

    def sse(self, path, headers=None):
        """(response, iterator of events) of an event stream; an event is a dict with id, event, data."""
        answer = self.stream(path, headers)
        assert answer.status == 200, (answer.status, answer.read())
        return answer, sse_events(answer)

    def events(self, pattern="", since=None):
        """An iterator of /watch events (dicts); since=0 gives those from the beginning."""
        query = "&since=%s" % since if since is not None else ""
        answer = self.stream("/watch%s?feed=continuous%s" % ("/" + pattern if pattern else "", query))
        return (json.loads(line) for line in answer)

    def wait_event(self, pattern, since=0):
        """The first event that a pattern matches, from the beginning on."""
        return self.ok("GET", "/watch/%s?feed=longpoll&since=%s&timeout=%d" % (pattern, since, TIMEOUT))


def part_lines(parts):
    """The lines of a body that comes in parts."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def sse_events(lines):
    """Parse an event stream (an iterable of lines as bytes)."""
    event = {}
    for line in lines:
        line = line.rstrip(b"\n").decode("utf-8")
        if not line:
            if event:
                yield event
            event = {}
            continue
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        event[field] = event[field] + "\n" + value if field in event else value


class WebSocket:
    """A websocket client from the standard library alone: text(), binary(), frame(), read(), close()."""

    def __init__(self, port, path, headers="", early=b"", sock=None):
        self.sock = sock or socket.create_connection(("127.0.0.1", port), TIMEOUT)
        key = base64.b64encode(os.urandom(16)).decode()
        self.sock.sendall(("GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                           "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n%s\r\n" % (path, port, key, headers)).encode() + early)
        self.file = self.sock.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        self.headers = http.client.parse_headers(self.file)

    @staticmethod
    def encode(opcode, payload, final=True, mask=b"\x01\x02\x03\x04"):
        """A masked frame."""
        size = len(payload)
        head = bytes([0x80 * final | opcode])
        head += bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0xFE, size) if size < 65536 else struct.pack("!BQ", 0xFF, size)
        return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))

    def frame(self, opcode, payload=b"", final=True):
        """Send a frame."""
        self.sock.sendall(self.encode(opcode, payload, final))

    def text(self, text):
        """Send a text message."""
        self.frame(1, text.encode())

    def binary(self, data):
        """Send a binary message."""
        self.frame(2, data)

    def read(self):
        """(opcode, payload) of the next frame; (None, b"") at the end of the connection. A close frame is (8, payload)."""
        head = self.file.read(2)
        if len(head) < 2:
            return None, b""
        self.compressed = bool(head[0] & 0x40)
        size = head[1] & 127
        if size == 126:
            size = struct.unpack("!H", self.file.read(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", self.file.read(8))[0]
        return head[0] & 15, self.file.read(size)

    def close(self):
        """Drop the connection."""
        self.file.close()
        self.sock.close()


class ServerCase(Case):
    """Each test has a running server, with the options of the class."""

    options: dict = {}

    def setUp(self):
        super().setUp()
        self.server = Running(**self.options)
        self.addCleanup(self.server.stop_all)

    def websocket(self, path, headers="", early=b""):
        """A WebSocket that is closed after the test."""
        made = WebSocket(self.server.port, path, headers, early)
        self.addCleanup(made.close)
        return made

    def assertError(self, answer, status, code, words=""):
        """`answer` is (status, value) of an error."""
        self.assertEqual((answer[0], answer[1].get("error")), (status, code), answer)
        self.assertIn(words, answer[1]["reason"])


class BrowserError(AssertionError):
    """The browser refused a command; the message is its own. `code`: WebDriver's, such as "javascript error"."""

    def __init__(self, code, message):
        super().__init__("%s: %s" % (code, message.partition("\n")[0]))
        self.code = code


class Browser:
    """A headless Chromium with an empty profile, driven through chromedriver (W3C WebDriver)."""

    PROGRAMS = ("chromium", "chromedriver")
    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--disable-breakpad", "--remote-debugging-pipe",
             "--font-render-hinting=none", "--js-flags=--expose-gc", "--enable-precise-memory-info",
             "--host-resolver-rules=MAP *.example 127.0.0.1",   # names that their owner points here
             # no more processes than the tests need
             "--in-process-gpu", "--renderer-process-limit=1", "--disable-extensions", "--mute-audio",
             "--disable-features=SpareRendererForSitePerProcess,BackForwardCache,MediaRouter,Translate")
    KEYS = {"Backspace": "\ue003", "Tab": "\ue004", "Enter": "\ue007", "Shift": "\ue008", "Control": "\ue009", "Alt": "\ue00a",
            "Escape": "\ue00c", "Space": "\ue00d", "PageUp": "\ue00e", "PageDown": "\ue00f", "End": "\ue010", "Home": "\ue011",
            "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "Delete": "\ue017"}
    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"     # the name of an element's id, fixed by the standard

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="gaffer-browser-")
        self.session = None
        # a session of its own, by which close() finds all of it; the shell ends with us, and then the driver and the browser
        self.driver = subprocess.Popen(["sh", "-c", 'chromedriver "$@" & read _; kill $!', "sh", "--port=0", "--log-path=%s/log" % self.directory],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            said = iter(self.driver.stdout.readline, b"")
            self.port = next(int(line.rstrip().rstrip(b".").split()[-1]) for line in said if b"started successfully" in line)
            self.session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": {
                "goog:loggingPrefs": {"browser": "ALL"}, "timeouts": {"script": int(1500 * TIMEOUT), "pageLoad": int(1000 * TIMEOUT)},
                "unhandledPromptBehavior": "dismiss", "acceptInsecureCerts": True,
                "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": [
                    *self.FLAGS, "--user-data-dir=" + os.path.join(self.directory, "profile")]}}}})["sessionId"]
        except BaseException:
            self.close()
            raise

    @classmethod
    def lacks(cls):
        """What is missing here to run it, or None."""
        return next(("needs " + program for program in cls.PROGRAMS if not shutil.which(program)), None)

    def _ask(self, method, path, value=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2 * TIMEOUT)
        try:
            connection.request(method, path, None if value is None else json.dumps(value), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            value = json.loads(answer.read().decode())["value"]
        finally:
            connection.close()
        if answer.status != 200:
            raise BrowserError(value["error"], value["message"])
        return value

    def do(self, method, path, value=None):
        """A command of WebDriver in this session: its value. Raises BrowserError."""
        return self._ask(method, "/session/%s/%s" % (self.session, path), {} if value is None and method == "POST" else value)

    def get(self, url):
        """Open a page, and wait until it has loaded."""
        self.do("POST", "url", {"url": url})

    def script(self, js, *args):
        """Run the body of a function, with `arguments`; what it returns (a promise: what comes of it) as JSON."""
        return self.do("POST", "execute/sync", {"script": js, "args": args})

    def wait(self, js, *args):
        """As script(), again and again until what it returns is true. Fails after TIMEOUT, with what the page shows."""
        deadline, error = time.monotonic() + TIMEOUT, None
        look = ("const args = arguments, done = args[args.length - 1], until = Date.now() + args[args.length - 2];"
                "const condition = async function() {" + js + "\n};"
                "(async function look() {"
                "  let value, error;"
                "  try { value = await condition.apply(null, args); } catch (thrown) { error = String(thrown); }"
                "  if (value || Date.now() > until) done([value, error]); else setTimeout(look, 10);"
                "})();")
        while time.monotonic() < deadline:
            try:
                value, error = self.do("POST", "execute/async", {"script": look, "args": [*args, 1000 * (deadline - time.monotonic())]})
                if value:
                    return value
            except BrowserError as gone:                # it went to another page meanwhile
                error = str(gone)
                if "unloaded" not in error and "context" not in error:
                    raise
        raise AssertionError("%s did not come true in %g seconds%s; the page shows %r, its console %s" % (
            js, TIMEOUT, " (%s)" % error if error else "",
            self.script("return document.body ? document.body.innerText.slice(0, 1000) : ''"), self.console()))

    def find(self, selector):
        """The id of the first element that a CSS selector matches."""
        return self.do("POST", "element", {"using": "css selector", "value": selector})[self.ELEMENT]

    def click(self, selector):
        """Click into the middle of an element, as a user does: it has to be in sight, and nothing over it."""
        self.do("POST", "element/%s/click" % self.find(selector))

    def keys(self, text, selector=None):
        """Type into an element, or into what has the focus. Special keys are KEYS["Enter"] and so on; a modifier holds to the end."""
        element = self.find(selector) if selector else self.do("GET", "element/active")[self.ELEMENT]
        self.do("POST", "element/%s/value" % element, {"text": text})

    def size(self, width, height, mobile=False):
        """The size of what a page sees, in CSS pixels."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=0, mobile=mobile)

    def screenshot(self):
        """What is in sight, as a PNG."""
        return base64.b64decode(self.do("GET", "screenshot"))

    def cdp(self, command, **params):
        """A command of the Chrome DevTools Protocol: its result."""
        return self.do("POST", "goog/cdp/execute", {"cmd": command, "params": params})

    def console(self):
        """The errors that the console of the browser has got since the last look, as text."""
        return [entry["message"] for entry in self.do("POST", "se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def _processes(self):
        """All processes that it has started, and that have not ended."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError), open("/proc/%s/stat" % name) as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
                if int(session) == self.driver.pid and state not in "ZX":
                    yield int(name)

    def close(self):
        """End the browser, its driver and all that they have started; forget the profile."""
        if self.session is not None:
            with contextlib.suppress(OSError, http.client.HTTPException, BrowserError):
                self._ask("DELETE", "/session/" + self.session)
        self.driver.stdin.close()
        # the leader is reaped last, so that its number stays the session's
        os.waitid(os.P_PID, self.driver.pid, os.WEXITED | os.WNOWAIT)
        while list(self._processes()):
            for os_pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(os_pid, signal.SIGKILL)
            threading.Event().wait(0.005)
        self.driver.wait()
        self.driver.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class BrowserCase(ServerCase):
    """Each test has a running server, and all tests have one browser."""

    share, quick, browser = "browser", False, None

    @classmethod
    def setUpClass(cls):
        missing = Browser.lacks()
        if missing:
            raise unittest.SkipTest(missing)
        super().setUpClass()
        if BrowserCase.browser is None:
            BrowserCase.browser = Browser()
            atexit.register(BrowserCase.browser.close)

    def setUp(self):
        super().setUp()
        self.addCleanup(self.browser.get, "about:blank")        # or the page would ask a server that is gone
        self.browser.console()

    def no_child_is_left(self):
        mine = set()
        for path in glob.glob("/proc/self/task/*/children"):
            with contextlib.suppress(FileNotFoundError), open(path) as file:    # a thread may have ended
                mine |= set(map(int, file.read().split()))
        self.assertEqual(mine - {self.browser.driver.pid}, set(), "a child is left")


# --------------------------------------------------------------------------------------------------------------------
# ring 1: pure code, and what lives in memory
# --------------------------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------------------------------------
# pure: helpers
# --------------------------------------------------------------------------------------------------------------------
class PureClock:
    """A clock that stands until it is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


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
    def restore():
        os.environ.clear()
        os.environ.update(before)
    before = dict(os.environ)
    case.addCleanup(restore)
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class PureLoopCase(Case):
    """A loop with a fake clock, which the test turns itself."""

    def setUp(self):
        super().setUp()
        self.clock = PureClock()
        self.loop = gaffer.Loop(self.clock)
        self.addCleanup(self.loop.close)

    def do(self, function, *args, **named):
        """Call as the loop's owner."""
        return self.loop.call(lambda: function(*args, **named))

    def later(self, delay, function, *args):
        """A timer."""
        return self.do(self.loop.later, delay, function, *args)

    def advance(self, seconds=0.0):
        """The clock goes on, then a turn."""
        self.clock.now += seconds
        self.loop.step()


# --------------------------------------------------------------------------------------------------------------------
# errors, Throttle
# --------------------------------------------------------------------------------------------------------------------
class PureErrors(Case):

    CONTRACT = {
        400: "invalid_json invalid_process_info bad_value no_signal_number io_not_redirected bad_request",
        401: "unauthorized", 403: "forbidden_write forbidden_origin forbidden_host forbidden",
        404: "not_found resource_not_found io_not_found bad_event_type", 405: "method_not_allowed", 408: "timeout",
        413: "too_large", 414: "uri_too_long", 431: "headers_too_large", 415: "unsupported_media_type", 409: "conflict",
        426: "upgrade_required", 500: "internal_error", 503: "stdin_full busy stopping", 504: "wait_timeout",
        # the three that RFC 9110 asks for beside the contract's table
        417: "bad_request", 501: "method_not_allowed", 505: "bad_request",
    }

    @classmethod
    def tree(cls, error=gaffer.GafferError):
        """An error class and all that derive from it, with a status or code of their own."""
        own = [error] if {"status", "code"} & set(vars(error)) else []
        return own + [each for child in error.__subclasses__() for each in cls.tree(child)]

    def test_the_tree_is_the_contract(self):
        tree = self.tree()
        promised = {(status, code) for status, codes in self.CONTRACT.items() for code in codes.split()}
        self.assertEqual({(error.status, error.code) for error in tree}, promised)
        self.assertEqual(len(tree), len(promised), "two classes for one error")

    def test_rendering(self):
        for error in self.tree():
            with self.subTest(error.__name__):
                answer = gaffer.error_response(error("say so"))
                self.assertEqual(answer.status, error.status)
                self.assertEqual(json.loads(answer.body), {"error": error.code, "reason": "say so"})
                self.assertEqual(answer.body[-2:], b"}\n")
                self.assertIn(("Content-Type", "application/json"), answer.headers)

    def test_headers(self):
        headers = dict(gaffer.error_response(gaffer.Unauthorized("x")).headers)
        self.assertTrue(headers["WWW-Authenticate"].startswith("Basic "))
        headers = dict(gaffer.error_response(gaffer.MethodNotAllowed("x", ["GET", "HEAD"])).headers)
        self.assertEqual(headers["Allow"], "GET, HEAD")
        headers = dict(gaffer.error_response(gaffer.UpgradeRequired("x")).headers)
        self.assertEqual((headers["Upgrade"], headers["Sec-WebSocket-Version"]), ("websocket", "13"))

    def test_a_mistake_tells_nothing(self):
        answer = gaffer.error_response(ZeroDivisionError("the secret"))
        self.assertEqual(answer.status, 500)
        self.assertEqual(json.loads(answer.body)["error"], "internal_error")
        self.assertNotIn(b"secret", answer.body)

    def test_near(self):
        self.assertEqual(gaffer.near("comand", ["name", "cmd", "env"]), ", did you mean 'cmd'?")
        self.assertEqual(gaffer.near("zzzzzz", ["name", "cmd", "env"]), "")


class PureThrottle(Case):

    def test_once_in_a_while(self):
        clock = PureClock()
        throttle = gaffer.Throttle(60.0, clock)
        with self.assertLogs("gaffer", "WARNING") as logs:
            for _ in range(3):
                throttle.warning("no more %s", "threads")
            clock.now += 59.9
            throttle.warning("no more %s", "threads")
            self.assertEqual([record.getMessage() for record in logs.records], ["no more threads"])
            clock.now += 0.1
            throttle.warning("no more %s", "threads")
            clock.now += 60
            throttle.warning("no more %s", "threads")
        self.assertEqual([record.getMessage() for record in logs.records], [
            "no more threads", "no more threads (and 3 times more before)", "no more threads"])


# --------------------------------------------------------------------------------------------------------------------
# loop
# --------------------------------------------------------------------------------------------------------------------
class PureTimers(PureLoopCase):

    def setUp(self):
        super().setUp()
        self.ran = []

    def test_in_order(self):
        """By time; of equal times, the one set first."""
        for delay, name in ((3, "c"), (1, "a"), (2, "b1"), (2, "b2"), (2, "b3")):
            self.later(delay, self.ran.append, name)
        for seconds, ran in ((0.999, ""), (0.001, "a"), (10, "a b1 b2 b3 c")):
            self.advance(seconds)
            self.assertEqual(" ".join(self.ran), ran)

    def test_what_a_turn_adds_is_for_the_next(self):
        """A timer that is due at once, or a call_soon: it would starve the rest."""
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
        own = self.later(2, lambda: (self.ran.append("own"), own.cancel(), late.cancel()))
        late = self.later(2, self.ran.append, "never")
        self.later(2, self.ran.append, "yes")
        self.do(early.cancel)
        self.do(early.cancel)
        self.advance(2)
        self.do(own.cancel)
        self.assertEqual((self.ran, self.loop.pending_timers), (["own", "yes"], 0))

    def test_cancelled_timers_are_forgotten(self):
        """A connection's idle timer is set anew for ever: it must not fill the memory."""
        timers = [self.later(300, self.ran.append, 1) for _ in range(500)]
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(20000):
            self.do(self.later(300, self.ran.append, 1).cancel)
        self.assertLess(tracemalloc.get_traced_memory()[0], 500000)
        self.assertEqual(self.loop.pending_timers, 500)
        for timer in timers[1:]:
            self.do(timer.cancel)
        self.advance(300)
        self.assertEqual(self.ran, [1])

    def test_random_timers_against_a_model(self):
        rng = random.Random(1)
        model = {}
        for number in range(2000):
            delay = rng.randrange(50)
            timer = self.later(delay, self.ran.append, number)
            model[number] = (self.clock.now + delay, timer)
            if rng.random() < 0.6:
                self.do(model.pop(rng.choice(sorted(model)))[1].cancel)
            if rng.random() < 0.1:
                self.ran.clear()
                self.advance(rng.randrange(8))
                due = sorted((when, n) for n, (when, _) in model.items() if when <= self.clock.now)
                self.assertEqual(self.ran, [n for _, n in due])
                for _, n in due:
                    del model[n]

    def test_now_is_the_time_of_the_turn_or_the_call(self):
        seen = []

        def slow():
            self.clock.now += 5
            seen.append(self.loop.now)
        self.later(1, slow)
        self.advance(1)
        self.do(lambda: seen.append(self.loop.now))
        self.assertEqual(seen, [1001.0, 1006.0])


class PureCalls(PureLoopCase):
    """What may be called, by whom, and when it runs; no thread runs the loop."""

    def test_call(self):
        """Result and error are the caller's, and so is the lock; it may call again."""
        self.assertEqual(self.loop.call(divmod, 7, 2), (3, 1))
        self.assertEqual((self.loop.owned(), self.loop.call(self.loop.call, self.loop.owned)), (False, True))
        for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
            with self.assertRaises(error):
                self.loop.call(unittest.mock.Mock(side_effect=error))
            self.assertFalse(self.loop.owned(), "the lock is released")

    @unittest.skipUnless(__debug__, "assertions are off")
    def test_only_the_owner(self):
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        for method, args in ((self.loop.later, (0, print)), (self.loop.register, (read, 1, print)),
                             (self.loop.modify, (read, 1)), (self.loop.unregister, (read,))):
            with self.subTest(method.__name__), self.assertRaises(AssertionError):
                method(*args)

    def test_call_soon_and_call_unlocked(self):
        """In order: the work of a turn under the lock, then user code without it."""
        ran = []

        def note(name):
            ran.append((name, self.loop.owned()))
        self.loop.call_unlocked(note, "user 1")
        self.loop.call_soon(note, "work 1")
        self.loop.call_soon(self.loop.call_unlocked, note, "user 2")
        self.loop.call_soon(note, "work 2")
        self.assertEqual(ran, [])
        self.advance()
        self.assertEqual(ran, [("work 1", True), ("work 2", True), ("user 1", False), ("user 2", False)])

    def test_a_failure_ends_nothing(self):
        """It is logged once a minute for each type; the rest of the turn runs."""
        class Odd(BaseException):
            pass
        ran = []
        with self.assertLogs("gaffer", "ERROR") as logs:
            for add in (functools.partial(self.later, 1), self.loop.call_soon, self.loop.call_unlocked):
                for error in (ZeroDivisionError, KeyError, Odd):
                    add(unittest.mock.Mock(side_effect=error))
                add(ran.append, 1)
            self.advance(1)
        self.assertEqual([record.exc_info[0] for record in logs.records], [ZeroDivisionError, KeyError, Odd])
        self.assertEqual(ran, [1, 1, 1])

    def test_an_interrupt_belongs_to_the_thread_that_runs_the_loop(self):
        """Nothing that was due is lost with it, and the lock is free."""
        for error in (KeyboardInterrupt, SystemExit):
            for add in (functools.partial(self.later, 0), self.loop.call_soon, self.loop.call_unlocked):
                with self.subTest(error=error, add=add):
                    ran = []
                    self.loop.call_soon(ran.append, "first")
                    add(unittest.mock.Mock(side_effect=error))
                    add(ran.append, "second")
                    with self.assertRaises(error):
                        self.loop.run()
                    self.assertEqual(self.loop.call(self.loop.owned), True)
                    self.loop.call_soon(self.loop.stop)
                    self.loop.run()
                    self.assertEqual(sorted(ran), ["first", "second"])

    def test_closed(self):
        """What was handed over before is done; afterwards nothing is."""
        ran = []
        self.assertTrue(self.loop.call_soon(ran.append, 1))
        self.assertTrue(self.loop.call_unlocked(ran.append, 2))
        self.loop.close()
        self.loop.close()
        self.assertEqual((ran, self.loop.closed), ([1, 2], True))
        with self.assertRaises(gaffer.Stopping) as caught:
            self.loop.call(ran.append, 3)
        self.assertEqual((caught.exception.status, caught.exception.code), (503, "stopping"))
        self.assertEqual((self.loop.call_soon(ran.append, 4), self.loop.call_unlocked(ran.append, 5)), (False, False))
        self.loop.stop()
        self.assertEqual(ran, [1, 2])


class PureReadiness(PureLoopCase):

    def setUp(self):
        super().setUp()
        self.pairs = [socket.socketpair() for _ in range(2)]
        for left, right in self.pairs:
            self.addCleanup(left.close)
            self.addCleanup(right.close)

    def register(self, number, callback):
        fd = self.pairs[number][0].fileno()
        self.do(self.loop.register, fd, selectors.EVENT_READ, callback)
        return fd

    def test_ready(self):
        """For what is asked for, until it is no longer."""
        (_, right), masks = self.pairs[0], []
        fd = self.register(0, masks.append)
        self.advance()
        self.do(self.loop.modify, fd, selectors.EVENT_WRITE)
        self.advance()
        right.sendall(b"x")
        self.do(self.loop.modify, fd, selectors.EVENT_READ)
        self.advance()
        self.do(self.loop.unregister, fd)
        self.advance()
        self.assertEqual(masks, [selectors.EVENT_WRITE, selectors.EVENT_READ])

    def test_an_event_of_a_descriptor_that_is_another_by_then(self):
        """Both are ready in one turn; the first to run puts something else in the other's place."""
        seen = []

        def replace(number):
            fd = self.pairs[number][0].fileno()
            self.loop.unregister(fd)
            self.loop.register(fd, selectors.EVENT_READ, lambda mask: seen.append("new"))
            seen.append("first")
        for number, (_, right) in enumerate(self.pairs):
            self.register(number, lambda mask, other=1 - number: replace(other))
            right.sendall(b"x")
        self.advance()
        self.assertEqual(seen, ["first"])

    def test_a_failing_callback(self):
        """The others of the turn run, and it is asked again."""
        seen = []
        for number, (_, right) in enumerate(self.pairs):
            self.register(number, lambda mask, number=number: seen.append(number) or 1 // 0)
            right.sendall(b"x")
        with self.assertLogs("gaffer", "ERROR"):
            self.advance()
            self.advance()
        self.assertEqual(sorted(seen), [0, 0, 1, 1])

    def test_wake_descriptor(self):
        """What signal.set_wakeup_fd() writes ends the wait."""
        os.write(self.loop.wake_fd, b"\x0f")
        began = time.monotonic()
        self.loop.step(TIMEOUT)
        self.assertLess(time.monotonic() - began, TIMEOUT / 2)

    def test_expect_waits_no_longer(self):
        """An answer, a timer, or the time given ends it."""
        (_, right), got = self.pairs[0], []
        self.register(0, lambda mask: got.append(self.pairs[0][0].recv(1)))
        right.sendall(b"x")
        self.do(self.loop.expect)
        self.loop.step(TIMEOUT)
        self.later(0, got.append, b"y")
        self.do(self.loop.expect)
        self.loop.step(TIMEOUT)
        self.loop.step(0.001)
        self.assertEqual(got, [b"x", b"y"])

    def test_a_selector_that_fails(self):
        """The loop goes on with its timers and calls, at a slow pace, and says so once."""
        select, ran = selectors.DefaultSelector.select, []
        for error in (OSError(errno.EBADF, "bad"), ValueError("closed"), MemoryError()):
            with self.subTest(error=error), unittest.mock.patch(
                    "selectors.DefaultSelector.select", side_effect=[error] * 4 + 2 * [[]]), self.assertLogs("gaffer", "ERROR") as logs:
                self.later(0, ran.append, error)
                began = time.monotonic()
                for _ in range(4):
                    self.loop.step(TIMEOUT)
                self.assertGreater(time.monotonic() - began, 2 * gaffer.ERROR_PAUSE)
                self.assertEqual((ran.pop(), len(logs.records)), (error, 1))
        self.assertIs(selectors.DefaultSelector.select, select)


class PureRunning(Case):
    """A loop that runs on a thread of its own, with the real clock."""

    def setUp(self):
        super().setUp()
        self.loop = gaffer.Loop()
        self.thread = threading.Thread(target=self.loop.run)
        self.addCleanup(self.end)
        self.thread.start()

    def end(self):
        self.loop.stop()
        self.thread.join(TIMEOUT)
        self.assertFalse(self.thread.is_alive())
        self.loop.close()

    def hold(self, add):
        """Keep the loop's thread in a callback that is given to add(). Returns a function that ends it."""
        held, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)
        add(lambda: (held.set(), release.wait(TIMEOUT)))
        self.assertTrue(held.wait(TIMEOUT))
        return release.set

    def in_threads(self, count, function):
        """Call `function()` on threads at once. Returns the list that gets what each returns or raises, and join()."""
        got = []

        def run():
            try:
                got.append(function())
            except BaseException as error:
                got.append(error)
        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        return got, lambda: [thread.join(TIMEOUT) for thread in threads]

    def test_a_call_runs_on_its_own_thread(self):
        self.assertEqual(self.loop.call(threading.get_ident), threading.get_ident())
        got, join = self.in_threads(1, lambda: self.loop.call(sys.exit, 3))
        join()
        self.assertIsInstance(got[0], SystemExit)
        self.assertEqual(self.loop.call(len, "the loop goes on"), 16)

    def test_a_call_while_user_code_runs(self):
        """User code may take its time: it holds up the loop's thread, not the lock."""
        release = self.hold(self.loop.call_unlocked)
        self.assertEqual(self.loop.call(len, "abc"), 3)
        release()

    def test_what_is_added_wakes_the_loop(self):
        """A timer, a descriptor, a call: the loop waits without a limit when they come."""
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        os.write(write, b"x")

        def ready(mask):
            self.loop.unregister(read)
            happened.set()
        adds = {
            "timer": lambda: self.loop.call(self.loop.later, 0.001, happened.set),
            "timer before another": lambda: self.loop.call(self.loop.later, 0.001, happened.set),
            "descriptor": lambda: self.loop.call(self.loop.register, read, 1, ready),
            "call_soon": lambda: self.loop.call_soon(happened.set),
            "call_soon in a call": lambda: self.loop.call(self.loop.call_soon, happened.set),
            "call_soon in a turn": lambda: self.loop.call_soon(self.loop.call_soon, happened.set),
            "call_unlocked": lambda: self.loop.call_unlocked(happened.set),
            "call_unlocked in user code": lambda: self.loop.call_unlocked(self.loop.call_unlocked, happened.set),
            "timer in user code": lambda: self.loop.call_unlocked(self.loop.call, self.loop.later, 0.001, happened.set),
        }
        for name, add in adds.items():
            with self.subTest(name):
                happened = threading.Event()
                add()
                self.assertTrue(happened.wait(TIMEOUT))
                self.loop.call(self.loop.later, 1000, print)

    def test_any_time_can_be_waited_for(self):
        """Longer than the system's calls can count."""
        for seconds in (3e6, gaffer.SECONDS_MAX, 1e300, math.inf):
            self.loop.call(self.loop.later, seconds, print)
            happened = threading.Event()
            self.loop.call_soon(happened.set)
            self.assertTrue(happened.wait(TIMEOUT))
        turns = self.loop.turns
        time.sleep(0.1)
        self.assertLess(self.loop.turns, turns + 3, "it waits")

    def test_a_busy_loop_lets_calls_in(self):
        """Once a turn at least, and the loop gets its turns beside many that call."""
        def busy():
            end = time.monotonic() + 0.002
            while time.monotonic() < end:
                pass
            turns.append(1)
            self.loop.call_soon(busy)
        turns = []
        self.loop.call_soon(busy)
        until(lambda: turns)
        before = len(turns)
        for _ in range(20):
            self.loop.call(len, "abc")
        self.assertLess(len(turns) - before, 60)
        over = threading.Event()
        got, join = self.in_threads(8, lambda: [self.loop.call(time.sleep, 0) for _ in iter(over.is_set, True)])
        before = len(turns)
        until(lambda: len(turns) > before + 10)
        over.set()
        join()
        self.assertGreater(min(map(len, got)), 0)

    def test_calls_while_the_loop_is_closed(self):
        """All get Stopping, and none waits for ever."""
        self.loop.stop()
        self.thread.join(TIMEOUT)
        closer = threading.Thread(target=self.loop.close)
        release = self.hold(lambda callback: (self.loop.call_soon(callback), closer.start()))
        got, join = self.in_threads(5, lambda: self.loop.call(len, "never"))
        release()
        join()
        closer.join(TIMEOUT)
        self.assertEqual([type(error) for error in got], [gaffer.Stopping] * 5)

    def test_many_threads(self):
        """One call at a time, none lost, none twice."""
        state = {"inside": 0, "count": 0}

        def count():
            state["inside"] += 1
            seen = (state["inside"], self.loop.owned())
            state["count"] = state["count"] + 1
            state["inside"] -= 1
            return seen

        def caller():
            for _ in range(300):
                if self.loop.call(count) != (1, True):
                    wrong.append(1)
                self.loop.call_soon(soon.append, 1)
                self.loop.call_unlocked(later.append, 1)
        wrong, soon, later = [], [], []
        switch = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, switch)
        sys.setswitchinterval(1e-5)
        _, join = self.in_threads(8, caller)
        join()
        sys.setswitchinterval(switch)
        self.hold(self.loop.call_unlocked)()    # what was put in before has run
        self.assertEqual((wrong, state, len(soon), len(later)), ([], {"inside": 0, "count": 2400}, 2400, 2400))


# --------------------------------------------------------------------------------------------------------------------
# streams
# --------------------------------------------------------------------------------------------------------------------
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
    found = re.findall(rb"id: ([0-9]+x?)@e\nevent: ([a-z]+)\ndata: ([^\r\n]*)\n\n", data)
    assert b"".join(b"id: %b@e\nevent: %b\ndata: %b\n\n" % event for event in found) == data, data
    return [(int(number) if number.isdigit() else number, event.decode(), line) for number, event, line in found]


class PureLogCase(PureLoopCase):

    def window(self, limit=1024, data=b""):
        window = gaffer.Window(self.loop, limit)
        if data:
            self.do(window.append, data)
        return window

    def reader(self, log, encoder=None, offset=None, loss="cut", open=True):
        """A started reader with a PureSink."""
        reader = gaffer.Reader(log, encoder or gaffer.Encoder(), PureSink(), log.end if offset is None else offset, loss)
        reader.sink.open = open
        self.do(reader.start)
        return reader

    def sse(self, log, offset=None, loss="cut", open=True):
        return self.reader(log, gaffer.SseEncoder("out", "e"), offset, loss, open)

    def drain(self, reader):
        """The sink has room again."""
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

    def check(self, window, everything, rng, offsets):
        """All that a window answers, against all bytes that it ever got."""
        end, start = len(everything), max(0, len(everything) - window.limit)
        self.assertEqual((window.start, window.end), (start, end))
        self.assertEqual(window.read(start, window.limit + 5), everything[start:])
        self.assertEqual(window.read(end, 10), b"")
        for offset in offsets(start, end):
            size = rng.randint(1, window.limit)
            self.assertEqual(window.read(offset, size), everything[offset:offset + size])
            if offset:
                self.assertEqual(window.before(offset), everything[offset - 1])
            fresh = offset == 0 or everything[offset - 1:offset] == b"\n"
            next_end = everything.find(b"\n", offset)
            self.assertEqual(window.resync(offset), offset if fresh or next_end < 0 else next_end + 1)
        first = window.resync(start)
        lines = everything[first:].split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        for count in (0, 1, 2, 5, 1000):
            wanted = lines[max(0, len(lines) - count):] if count else []
            size = len(b"\n".join(wanted)) + (everything[-1:] == b"\n") if wanted else 0
            self.assertEqual(window.tail(count), end - size, (count, everything[first:]))
        self.assertEqual(window.tail(math.inf), first)

    def test_against_a_model(self):
        """Pieces smaller and larger than those that are joined, lines of every length."""
        def letters(most):
            return bytes(rng.choice(b"ab\n\r") for _ in range(rng.randint(1, most)))

        def lines(most):
            line = bytes([rng.randrange(32, 127)]) * rng.choice((0, 5, 80, 3000, most))
            return (line + b"\n") * rng.choice((1, 1, 2)) + b"x" * rng.choice((0, 9))
        rng = random.Random(2)
        for limit, make, most, rounds in ((1, letters, 3, 30), (7, letters, 12, 60), (100, letters, 40, 60),
                                          (256, letters, 700, 40), (100000, lines, 20000, 60)):
            with self.subTest(limit=limit):
                window, everything = self.window(limit), b""
                self.check(window, everything, rng, range)
                for _ in range(rounds):
                    data = make(most)
                    everything += data
                    self.do(window.append, data)
                    self.check(window, everything, rng, range if limit < 1000 else
                               lambda start, end: sorted(rng.randrange(start, end) for _ in range(12)))

    def test_a_whole_piece_is_not_copied(self):
        window, pieces = self.window(1000000), (b"a" * 65536, b"b" * 65536)
        self.feed(window, *pieces)
        self.assertIs(window.read(0, 65536), pieces[0])
        self.assertIs(window.read(65536, 70000), pieces[1])

    def test_the_byte_before_the_window(self):
        """It is known though its piece is gone: a newline at the window's start may be half of CR LF."""
        window = self.window(131072)
        self.feed(window, b"a" * 65535 + b"\r", b"\n" + b"b" * 65534 + b"\n", b"c" * 65536)
        self.assertEqual((window.start, window.before(65536)), (65536, 13))
        self.feed(window, b"d" * 65536)
        self.assertEqual((window.start, window.before(131072), window.resync(131072)), (131072, 10, 131072))

    def test_memory_is_bounded(self):
        """Of a window of short lines, and of what readers at many places get."""
        window = self.window(100000)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        readers = []
        for number in range(30000):
            self.do(window.append, b"short line\n")
            if number % 300 == 0:
                readers.append(self.sse(window, offset=window.start, open=False))
                readers[-1].sink.got.clear()
        for reader in readers:
            self.do(reader.pump)
            reader.sink.got.clear()
        self.assertLess(tracemalloc.get_traced_memory()[0], 20 * window.limit)

    def test_wait(self):
        """After each append, and at the end, until it is true or was cancelled."""
        window, calls = self.window(), []
        self.do(window.wait, lambda: calls.append("a") or window.end >= 4)
        cancel = self.do(window.wait, lambda: calls.append("b"))
        self.do(window.wait, lambda: window.ended and calls.append("ended"))
        self.feed(window, b"ab", b"cd", b"ef")
        self.do(cancel)
        self.do(cancel)
        self.feed(window, b"gh")
        self.do(window.finish)
        self.do(window.finish)
        self.assertEqual("".join(calls), "ababbended")


class PureReader(PureLogCase):

    def test_encoded_once_and_not_copied(self):
        """The work for many readers is that for one; data that goes out beside its head is what was read."""
        calls = []

        class Counting(gaffer.SseEncoder):
            def encode(self, *args):
                calls.append(args)
                return super().encode(*args)
        window = self.window(gaffer.MIB)
        readers = [self.reader(window, Counting("out", "e")) for _ in range(50)]
        calls.clear()
        self.feed(window, b"x\n", b"unfinished", 0.11)
        self.assertLess(len(calls), 4)
        self.assertEqual(len({id(payload) for reader in readers for payload in reader.sink.got}), 2)
        encoders = [gaffer.ChunkEncoder(), gaffer.FrameEncoder(True, False), gaffer.FrameEncoder(False, False)]
        pieces, begin = [b"x" * gaffer.READ_SIZE, b"y" * gaffer.READ_SIZE_WIDE], window.end
        readers = [self.reader(window, encoder) for encoder in encoders]
        self.feed(window, *pieces)
        readers += [self.reader(window, encoder, begin) for encoder in encoders]
        for reader in readers:
            self.assertEqual([id(payload[1]) for payload in reader.sink.got], list(map(id, pieces)))

    def test_an_unfinished_line_costs_what_is_new(self):
        """Not all of it again with each byte."""
        sizes = []

        class Counting(gaffer.SseEncoder):
            def encode(self, data, *args):
                sizes.append(len(data))
                return super().encode(data, *args)
        window = self.window(gaffer.MIB)
        reader = self.reader(window, Counting("out", "e"))
        self.feed(window, *[b"."] * 3000, b"\n")
        self.assertLess(sum(sizes), 10000)
        self.assertEqual(pure_sse(reader.sink.data), [(3001, "out", b"." * 3000)])

    def test_each_begins_where_it_asks(self):
        window = self.window(data=b"one\ntwo\n")
        readers = [self.reader(window, offset=offset) for offset in (0, 4, 8)] + [self.sse(window, offset=4)]
        self.feed(window, b"three\n")
        self.assertEqual([reader.sink.data for reader in readers[:3]], [b"one\ntwo\nthree\n", b"two\nthree\n", b"three\n"])
        self.assertEqual(pure_sse(readers[3].sink.data), [(8, "out", b"two"), (14, "out", b"three")])

    def test_one_that_lags_holds_nobody_and_comes_back(self):
        window = self.window()
        slow, fast = self.reader(window, open=False), self.reader(window)
        self.feed(window, b"one ", b"two ", b"three ")
        self.assertEqual((slow.sink.data, fast.sink.data), (b"one ", b"one two three "))
        self.drain(slow)
        self.feed(window, b"four")
        self.assertEqual(slow.sink.got, [b"one ", b"two three ", b"four"])

    def test_one_that_is_far_behind_gets_its_share_a_turn(self):
        """In order, while more is appended."""
        window = self.window(8 * gaffer.MIB)
        data = os.urandom(1024) * 4096
        for place in range(0, len(data), 65536):
            self.do(window.append, data[place:place + 65536])
        reader = self.reader(window, offset=0)
        for turn in range(1, 100):
            self.assertLessEqual(len(reader.sink.data), gaffer.SHARE_SIZE * gaffer.SHARES_PER_TURN * turn)
            self.feed(window, b"more")
            self.advance()
        self.assertEqual(reader.sink.data, data + 99 * b"more")

    def test_close(self):
        """Before it has begun, by another's sink while a payload goes round, twice: it gets nothing more."""
        class Closing(PureSink):
            def send(self, payload):
                third.close()
                return super().send(payload)
        window = self.window(data=b"old")
        first = gaffer.Reader(window, gaffer.Encoder(), PureSink(), 0)
        self.do(first.close)
        self.do(first.start)
        second = gaffer.Reader(window, gaffer.Encoder(), Closing(), 3)
        self.do(second.start)
        third = self.reader(window)
        self.feed(window, b"x")
        self.do(third.close)
        self.do(third.pump)
        self.assertEqual([reader.sink.got for reader in (first, second, third)], [[], [b"x"], []])
        self.assertEqual(list(window.readers), [second])

    def test_unfinished_lines(self):
        """Shown after 100 ms without output, up to a whole character, by a server that needs no timer for nothing."""
        euro = "\u20ac".encode()
        for name, steps, wanted in (
                ("not yet", (b"login: ", 0.099), []),
                ("shown once", (b"login: ", 0.101, 5), [(7, b"login: ")]),
                ("the rest", (b"login: ", 0.101, b"joe\n"), [(7, b"login: "), (11, b"joe")]),
                ("its end alone", (b"abc", 0.11, b"\n", b"next\n"), [(3, b"abc"), (4, b""), (9, b"next")]),
                ("each byte begins the silence anew", (b"0", 0.09, b"1", 0.09, b"2", 0.09), []),
                ("then it is over", (b"0", 0.09, b"1", 0.09, b"2", 0.11), [(3, b"012")]),
                ("finished in time", (b"ab", 0.05, b"c\n", 1), [(4, b"abc")]),
                ("behind whole lines", (b"one\ntwo\npro", 0.11), [(4, b"one"), (8, b"two"), (11, b"pro")]),
                ("half a character", (b"5 " + euro[:2], 0.11, 0.11), [(2, b"5 ")]),
                ("the other half", (b"5 " + euro[:2], 0.11, euro[2:] + b"!\n"), [(2, b"5 "), (7, euro + b"!")]),
                ("the other half later", (b"5 " + euro[:1], 0.11, euro[1:2], euro[2:], 0.11), [(2, b"5 "), (5, euro)]),
                ("half a character is not waited for", (b"a\n" + euro[:1], 9), [(2, b"a")]),
                ("CR LF that comes in two", (b"a\r", b"\n", b"\nb\n"), [(2, b"a"), (4, b""), (6, b"b")])):
            with self.subTest(name):
                window = self.window()
                early, slow = self.sse(window), self.sse(window, open=False)
                self.feed(window, *steps)
                self.assertEqual(pure_sse(early.sink.data), [(place, "out", line) for place, line in wanted])
                late = self.sse(window, offset=0)
                self.drain(slow)
                self.advance(0.11)
                text = b"".join(line for _, line in wanted)
                for reader in (slow, late):
                    lines = b"".join(line for _, _, line in pure_sse(reader.sink.data))
                    self.assertTrue(lines.startswith(text), (lines, text))
                for reader in (early, slow, late):
                    self.do(reader.close)
                self.assertEqual(self.loop.pending_timers, 0)

    def test_finish(self):
        """What is left, unfinished line and all, then the end, once; one that is full gets both when it can."""
        window = self.window()
        live, slow, gone = self.sse(window), self.sse(window, open=False), self.sse(window)
        self.do(gone.close)
        self.feed(window, b"one\n", b"half", 0.11, b" a line \xc3")
        self.do(window.finish)
        wanted = [(4, "out", b"one"), (8, "out", b"half"), (17, "out", " a line \ufffd".encode())]
        self.assertEqual((pure_sse(live.sink.data), live.sink.ends), (wanted, 1))
        self.assertEqual((pure_sse(slow.sink.data), slow.sink.ends), (wanted[:1], 0))
        self.drain(slow)
        late = self.sse(window, offset=0)
        self.advance(1)
        for reader in (slow, late):
            self.assertEqual(b"".join(line for _, _, line in pure_sse(reader.sink.data)), "onehalf a line \ufffd".encode())
        self.assertEqual([reader.sink.ends for reader in (live, slow, gone, late)], [1, 1, 0, 1])

    def test_lines_of_an_ended_stream_are_whole(self):
        """However many shares it takes to send them."""
        data = b"".join(b"line %d %s\n" % (number, b"x" * (number % 90)) for number in range(12000)) + b"the end"
        window = self.window(gaffer.MIB, data)
        self.do(window.finish)
        reader = self.sse(window, offset=0)
        for _ in range(20):
            self.advance()
        self.assertEqual([line for _, _, line in pure_sse(reader.sink.data)], data.split(b"\n"))
        self.assertEqual(reader.sink.ends, 1)


class PureLoss(PureLogCase):

    def test_cut(self):
        """A reader that lost something is told how much, to the byte, and gets nothing more."""
        for size, losses, got in ((100, [], b"x" + b"y" * 100), (101, [1], b"x"), (300, [200], b"x")):
            with self.subTest(size=size):
                window = self.window(100)
                reader = self.reader(window, open=False)
                self.feed(window, b"x", b"y" * size)
                self.drain(reader)
                self.feed(window, b"")
                self.assertEqual((reader.sink.losses, reader.sink.data), (losses, got))
                self.assertEqual(window.dropped, sum(losses))

    def test_skip(self):
        """On from the start of a line; half of a line never runs into another; what was left out is counted."""
        for limit in range(91, 101):
            window = self.window(limit)
            raw, by_line = self.reader(window, loss="skip", open=False), self.reader(
                window, gaffer.FrameEncoder(True, True), loss="skip", open=False)
            self.feed(window, b"line 000\nlin", *[b"e %03d\nlin" % number for number in range(1, 40)], b"e 040\n")
            self.drain(raw)
            self.drain(by_line)
            lines = raw.sink.data.split(b"\n")
            self.assertEqual(lines[:2] + lines[-1:], [b"line 000", b"lin", b""])
            kept = [b"line %03d" % number for number in range(41 - len(lines[2:-1]), 41)]
            self.assertEqual((lines[2:-1], len(kept) > 8), (kept, True))
            self.assertEqual(len(raw.sink.data) + raw.dropped, window.end)
            lines = by_line.sink.data.split(b"\x82\x08")[1:]
            self.assertEqual(lines, [b"line 000"] + [b"line %03d" % number for number in range(42 - len(lines), 41)])
            self.assertEqual((raw.sink.losses, 9 * len(lines) + by_line.dropped), ([], window.end))

    def test_skip_where_no_line_ends(self):
        """On at the window's first byte."""
        window = self.window(100)
        reader = self.reader(window, loss="skip", open=False)
        self.feed(window, b"ab", b"z" * 150)
        self.drain(reader)
        self.assertEqual((reader.dropped, reader.sink.got), (50, [b"ab", b"z" * 100]))

    def test_sse(self):
        """The loss is reported in the stream; its id is where it goes on."""
        window = self.window(100)
        slow = self.sse(window, open=False)
        self.feed(window, *[b"line %03d\n" % number for number in range(40)])
        self.drain(slow)
        late = self.sse(window, offset=100)
        lines = [(9 * number + 9, "out", b"line %03d" % number) for number in range(29, 40)]
        self.assertEqual(pure_sse(slow.sink.data), [(9, "out", b"line 000"), (261, "dropped", b'{"bytes": 252}'), *lines])
        self.assertEqual(pure_sse(late.sink.data), [(261, "dropped", b'{"bytes": 161}'), *lines])
        self.assertEqual((slow.dropped, window.dropped), (252, 413))

    def test_lines_longer_than_the_window(self):
        """They come in pieces, and nothing of them is lost; half a line may fall out of a very small window."""
        window = self.window(256)
        reader = self.sse(window)
        self.feed(window, *[b"x" * 50] * 50, b"\n")
        events = pure_sse(reader.sink.data)
        self.assertEqual(b"".join(data for _, _, data in events), b"x" * 2500)
        self.assertEqual(({kind for _, kind, _ in events}, events[-1][0]), ({"out"}, 2501))
        window = self.window(256)
        reader = self.sse(window)
        self.feed(window, b"x" * 100, b"y" * 240 + b"\nnext\n")
        self.assertEqual(pure_sse(reader.sink.data), [(341, "dropped", b'{"bytes": 341}'), (346, "out", b"next")])

    def test_room(self):
        """It is what readers with loss=block leave; who waits for it is called when one of them advances or leaves."""
        def ask():
            called.clear()
            self.do(window.on_room.add, lambda: called.append(1))
        window, called = self.window(100), []
        self.reader(window, open=False)
        first, second = [self.reader(window, loss="block", open=False) for _ in range(2)]
        self.feed(window, b"x" * 30)
        self.assertEqual(window.room(), 100)
        self.feed(window, b"y" * 60)
        self.assertEqual(window.room(), 40)
        ask()
        self.advance()
        self.assertEqual(called, [])
        self.do(first.pump)
        self.advance()
        self.assertEqual((called, window.room()), ([1], 40))
        ask()
        self.do(second.close)
        self.advance()
        self.assertEqual((called, window.room()), ([1], 100))
        self.do(first.close)
        self.assertEqual(window.room(), math.inf)

    def test_a_writer_that_waits_for_room_never_loses(self):
        """It appends no more than there is room for; random readers that block: each gets every byte."""
        rng = random.Random(4)
        window = self.window(256)
        readers = [make(window, loss="block") for make in (self.sse, self.reader) for _ in range(3)]
        data = bytes(rng.choice(b"abcdefghijk\n") for _ in range(6000))
        place, turns = 0, 0
        while place < len(data):
            turns += 1
            self.assertLess(turns, 20000, "writer and readers wait for each other")
            size = min(window.room(), rng.randint(0, 200))
            self.assertGreaterEqual(window.room(), 0)
            if size > 0:
                self.do(window.append, data[place:place + size])
                place += len(data[place:place + size])
            for reader in readers:
                reader.sink.open = rng.random() < 0.5
                if reader.sink.full:
                    self.do(reader.pump)
            self.advance(0.01)
        self.do(window.finish)
        for reader in readers:
            self.drain(reader)
        self.assertEqual([reader.sink.data for reader in readers[3:]], [data] * 3)
        for reader in readers[:3]:
            self.assertEqual(b"\n".join(text for _, _, text in pure_sse(reader.sink.data)), data.rstrip(b"\n"))
        self.assertEqual([reader.sink.ends for reader in readers], [1] * 6)

    def test_nothing_is_lost_uncounted(self):
        """Random appends, random sinks: what a reader got and what it was told is all there was."""
        rng = random.Random(5)
        for number in range(10):
            with self.subTest(number):
                window, everything = self.window(300), b""
                cut, skip, sse = readers = self.reader(window), self.reader(window, loss="skip"), self.sse(window)
                for _ in range(200):
                    data = bytes(rng.choice(b"ab\n") for _ in range(rng.randint(1, 60)))
                    everything += data
                    self.do(window.append, data)
                    for reader in readers:
                        reader.sink.open ^= rng.random() < 0.2
                        if reader.sink.open and reader.sink.full:
                            self.drain(reader)
                    if rng.random() < 0.3:
                        self.advance(0.06)
                for reader in readers:
                    self.drain(reader)
                self.do(window.finish)
                self.advance()
                self.assertEqual(cut.sink.data if not cut.sink.losses else everything[:len(cut.sink.data)],
                                 everything[:len(cut.sink.data)])
                self.assertEqual(len(skip.sink.data) + skip.dropped, len(everything))
                place = dropped = 0
                for end, kind, text in pure_sse(sse.sink.data):
                    if kind == "dropped":
                        dropped += json.loads(text)["bytes"]
                        self.assertEqual(end - place, json.loads(text)["bytes"])
                        self.assertEqual(everything[end - 1:end], b"\n")
                    else:
                        self.assertEqual(everything[place:end].rstrip(b"\n"), text)
                    place = end
                self.assertEqual((place, dropped), (len(everything), sse.dropped))
                self.assertEqual(bool(cut.sink.losses) or len(cut.sink.data) == len(everything), True)
                self.assertEqual(window.dropped, skip.dropped + sse.dropped + sum(cut.sink.losses))


class PureEvents(PureLogCase):

    @staticmethod
    def encoder(form, wanted=lambda record: True, framed=bytes):
        return gaffer.RecordEncoder(form, framed, "e", "all", wanted, lambda record: record["event"])

    def test_read(self):
        log = gaffer.EventLog(self.loop, 3)
        for number in range(1, 6):
            self.do(log.append, number)
        self.assertEqual((log.start, log.end), (2, 5))
        self.assertEqual([log.read(offset, 2) for offset in (2, 3, 4, 5)], [[3, 4], [4, 5], [5], []])

    def test_forms(self):
        """Server-sent events and JSON lines, in chunks or not; the id is the event's number, whatever is wanted."""
        log = gaffer.EventLog(self.loop, 10)
        readers = [self.reader(log, self.encoder(form, lambda record: record["event"] == "exit", framed))
                   for framed in (bytes, gaffer.chunk) for form in ("eventsource", "continuous")]
        self.do(log.append, {"event": "spawn", "name": "a"})
        self.do(log.append, {"event": "exit", "name": "a"})
        line = b'{"event": "exit", "name": "a"}'
        event = b"id: 2@e\nevent: exit\ndata: " + line + b"\n\n"
        self.assertEqual([reader.sink.data for reader in readers], [
            event, line + b"\n", b"%x\r\n%b\r\n" % (len(event), event), b"1f\r\n" + line + b"\n\r\n"])

    def test_dropped(self):
        log = gaffer.EventLog(self.loop, 4)
        sse, plain = readers = [self.reader(log, self.encoder(form), open=False) for form in ("eventsource", "continuous")]
        for number in range(10):
            self.do(log.append, {"event": "spawn", "n": number})
        for reader in readers:
            self.drain(reader)
        events = pure_sse(sse.sink.data)
        self.assertEqual([event[:2] for event in events], [(1, "spawn"), (6, "dropped"), *zip(range(7, 11), 4 * ["spawn"])])
        self.assertEqual(json.loads(events[1][2]), {"events": 5})
        lines = [json.loads(line) for line in plain.sink.data.splitlines()]
        self.assertEqual(lines[1], {"event": "dropped", "id": "6@e", "events": 5})
        self.assertEqual([line.get("n") for line in lines], [0, None, 6, 7, 8, 9])
        self.assertEqual(self.encoder("continuous").dropped(3, 7, True),
                         b'{"event": "dropped", "id": "7@e", "events": 3, "restarted": true}\n')


class PureJournal(PureLogCase):
    """What several streams say, in one order: an index of their windows, and its readers."""

    class Output:
        def __init__(self, pid):
            self.pid = pid

    def setUp(self):
        super().setUp()
        self.journal = gaffer.Journal(self.loop, gaffer.MIB)
        self.streams = {}                       # (name, label) -> Merged

    def stream(self, name, pid, label="out", size=gaffer.MIB):
        """A function that writes."""
        merged = self.streams.setdefault((name, label), gaffer.Merged(self.loop, size, name, label, self.journal))
        output = self.Output(pid)
        self.do(merged.open, output)

        def write(data):
            self.do(merged.write, output, data)
        write.close = lambda: self.do(merged.close, output)
        return write

    def sse(self, *which, offset=None, open=True):
        view = self.do(self.journal.view, *which)
        return self.reader(view, gaffer.JournalEncoder(True, "e"), offset, open=open)

    @staticmethod
    def events(reader):
        """[(id, line without its time)], or (id, bytes dropped)."""
        return [(number, line.split(b" ", 1)[1].decode() if kind == "line" else json.loads(line)["bytes"])
                for number, kind, line in pure_sse(reader.sink.data)]

    def lines(self, *which, offset=0):
        """What a long poll gets: ([line without its time], where it ends, bytes lost)."""
        data, end, lost = self.do(lambda: self.journal.view(*which).take(offset, gaffer.JournalEncoder(False, "e")))
        return [line.split(b" ", 1)[1].decode() for line in data.splitlines()], end, lost

    def exit(self, *which):
        self.do(self.journal.exit, *which)

    def test_in_order_with_their_names_and_by_filter(self):
        """Live and later; the exit comes last, and ends the journal of its process."""
        live = {which: self.sse(*which) for which in ((), ("a",), ("a", 1), ("b",))}
        one, err, two = self.stream("a", 1), self.stream("a", 1, "err"), self.stream("b", 2)
        for write, data in ((one, b"x\n"), (two, b"y\nz\n"), (err, b"\xff\n"), (one, b"last")):
            write(data)
        one.close()
        self.exit("a", 1, 4, 0)
        wanted = [(2, "a 1 out x"), (4, "b 2 out y"), (6, "b 2 out z"), (8, "a 1 err \ufffd"), (13, "a 1 out last"),
                  (14, 'a 1 exit {"exit_status": 4, "term_signal": 0}')]
        for which, reader in live.items():
            events = [event for event in wanted if event[1].startswith(" ".join(map(str, which)))]
            self.assertEqual((self.events(reader), reader.sink.ends), (events, int(which == ("a", 1))))
            self.assertEqual(self.lines(*which), ([line for _, line in events], 14, 0))
            self.assertEqual(self.events(self.sse(*which, offset=0)), events)
        self.do(self.journal.finish, "a")
        self.assertEqual([reader.sink.ends for reader in live.values()], [0, 1, 1, 0])
        self.do(self.journal.finish)
        self.assertEqual([reader.sink.ends for reader in live.values()], [1, 1, 1, 1])

    def test_unfinished_lines(self):
        """Shown after 100 ms while somebody reads, with a plus; what follows is only what is new."""
        write, other = self.stream("a", 1), self.stream("b", 2)
        write("name? \u20ac".encode()[:-1])
        self.advance(1)
        reader = self.sse("a", offset=0)
        self.advance(0.01)
        other(b"between\n")
        self.assertEqual(self.events(reader), [(9, "a 1 out+ name? ")])
        self.advance(0.11)
        write("\u20ac".encode()[-1:] + b" joe\r")
        write(b"\nwho\r")
        write(b"is")
        for _ in range(5):
            self.advance(0.05)
        lines = [line for _, line in self.events(reader)]
        self.assertEqual(lines, ["a 1 out+ name? ", "a 1 out \u20ac joe", "a 1 out who", "a 1 out+ is"])
        write(b"\n")
        lines.append("a 1 out ")
        self.assertEqual([line for _, line in self.events(reader)], lines)
        self.assertEqual(self.lines("a")[0], lines)

    def test_another_process_ends_an_unfinished_line(self):
        """In the template's stream, and so here; not one that was shown as the last."""
        one, two = self.stream("a", 1), self.stream("a", 2)
        one(b"half")
        two(b"whole\n")
        one(b"last")
        one.close()
        two(b"on\n")
        self.assertEqual(self.lines()[0], ["a 1 out half", "a 2 out whole", "a 1 out last", "a 2 out on"])

    def test_long_lines_come_in_pieces(self):
        write = self.stream("a", 1)
        for _ in range(20):
            write(b"x" * 10000)
        write(b"\n")
        lines = self.lines()[0]
        self.assertEqual("".join(line.split(" ")[3] for line in lines), "x" * 200000)
        self.assertEqual([line.split(" ")[2] for line in lines], ["out+"] * 2 + ["out"])

    def test_nobody_reads(self):
        """It costs an index of bounded size, no line is looked at."""
        write = self.stream("a", 1)
        self.assertEqual(self.lines()[0], [])
        with unittest.mock.patch("gaffer.split_lines", side_effect=AssertionError), \
                unittest.mock.patch("gaffer.JOURNAL_ENTRIES", 1000):
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            for number in range(10000):
                write(b"%d\n" % number)
                if number % 2:
                    self.exit("a", 1, 0, 0)
            self.assertLess(tracemalloc.get_traced_memory()[0], 0.4 * gaffer.MIB)
        self.assertEqual(self.lines(offset=self.do(lambda: self.journal.view().tail(2)))[0], ["a 1 out 9999", 'a 1 exit {"exit_status": 0, "term_signal": 0}'])

    def test_a_quiet_template_beside_a_busy_one(self):
        """Where its reader stands is good, however much of the index has gone since."""
        quiet, busy = self.stream("quiet", 1), self.stream("busy", 2)
        quiet(b"a\n")
        _, offset, _ = self.lines("quiet")
        with unittest.mock.patch("gaffer.JOURNAL_ENTRIES", 64):
            live = self.sse("quiet")
            for _ in range(100):
                busy(b"y" * 20000 + b"\n")
            self.assertEqual(self.lines("quiet", offset=offset), ([], self.journal.end, 0))
            quiet(b"b\n")
            self.assertEqual(self.lines("quiet", offset=offset), (["quiet 1 out b"], self.journal.end, 0))
            self.assertEqual(self.events(live), [(self.journal.end, "quiet 1 out b")])
            lines, _, lost = self.lines("quiet")
            self.assertEqual((lines, lost), (["quiet 1 out b"], 2))

    def test_bytes_that_have_gone(self):
        """From the window: what is left is told from the start of a line; with a template: all of them."""
        small, large = self.stream("small", 1, size=256), self.stream("large", 2)
        for number in range(20):
            small(b"line %03d %s\n" % (number, b"x" * 30))
            large(b"%03d\n" % number)
        reader = self.sse(offset=0)
        for _ in range(20):
            self.advance()
        events = self.events(reader)
        lines = [event[1] for event in events if isinstance(event[1], str)]
        self.assertEqual(lines[:14], ["large 2 out %03d" % number for number in range(14)])
        self.assertEqual(lines[14:16], ["small 1 out line 014 " + "x" * 30, "large 2 out 014"])
        self.assertEqual([event for event in events if isinstance(event[1], int)], [(40 + 44 * number, 40) for number in range(14)])
        self.assertEqual(self.lines()[1:], (self.journal.end, 14 * 40))
        self.assertEqual(self.lines("small", offset=14 * 44)[2], 0)
        window = weakref.ref(self.streams["large", "out"].window)
        large.close()
        del self.streams["large", "out"], large
        self.assertIsNone(window(), "the bytes are freed")
        self.assertEqual(self.lines()[1:], (self.journal.end, 14 * 40 + 20 * 4))

    def test_tail(self):
        """Against all lines; what has gone is no line."""
        writes = [self.stream("a", 1, size=300), self.stream("b", 2), self.stream("b", 2, "err")]
        rng = random.Random(7)
        for number in range(200):
            rng.choice(writes)(b"".join(b"%d\n" % rng.randrange(10 ** 6) for _ in range(rng.choice((1, 2, 90)))))
            if number % 20 == 0:
                self.exit("a", 1, 0, 0)
        for which in ((), ("a",), ("b",), ("b", 2), ("b", 3)):
            everything, end, _ = self.lines(*which)
            for count in (0, 1, 2, 3, 10, 100, 1000, math.inf):
                offset = self.do(lambda: self.journal.view(*which).tail(count))
                wanted = everything[len(everything) - min(count, len(everything)):]
                self.assertEqual(self.lines(*which, offset=offset)[0], wanted, (which, count))

    def test_a_resume_neither_loses_nor_repeats(self):
        """Random streams and silences; a reader that is cut now and then gets what one gets that is not."""
        rng = random.Random(8)
        for number in range(12):
            with self.subTest(number), unittest.mock.patch("gaffer.COALESCE_SIZE", rng.choice((20, 16384))):
                self.setUp()
                writes = [self.stream(*which) for which in (("a", 1), ("a", 2), ("b", 3), ("b", 3, "err"))]
                said = [b""] * 4
                whole, cut, polled, polls = self.sse(offset=0), self.sse(offset=0), [], 0
                events = []
                for _ in range(300):
                    which = rng.randrange(4)
                    data = bytes(rng.choice(b"ab \r\n\n") for _ in range(rng.randrange(1, 30)))
                    said[which] += data
                    writes[which](data)
                    if rng.random() < 0.3:
                        self.clock.now += 0.2 * rng.random()
                        self.advance()
                    if rng.random() < 0.2:
                        events += self.events(cut)
                        self.do(cut.close)
                        cut = self.sse(offset=events[-1][0] if events else 0)
                    if rng.random() < 0.2:
                        lines, polls, lost = self.lines(offset=polls)
                        polled += lines
                        self.assertEqual(lost, 0)
                for write in writes:
                    write.close()
                wanted = self.events(whole)
                self.assertEqual([line for _, line in events + self.events(cut)], [line for _, line in wanted])
                self.assertEqual(polled + self.lines(offset=polls)[0], [line for _, line in wanted])
                for which, source in ((2, "b 3 out"), (3, "b 3 err")):          # of those that nobody else interrupts
                    text = "".join(line[len(source):].replace("+ ", " ", 1)[1:] + ("" if line[len(source)] == "+" else "\n")
                                   for _, line in wanted if line.startswith(source))
                    lines = said[which].decode().replace("\r\n", "\n").replace("\r", "\n")
                    self.assertEqual(text.rstrip("\n"), lines.rstrip("\n"))

    def test_a_reader_that_lags(self):
        """What it gets are whole lines in order, and where one is missing it is told."""
        rng = random.Random(9)
        writes = [self.stream("a", 1, size=400), self.stream("b", 2, size=400)]
        reader, plain = self.sse(open=False), self.reader(self.do(self.journal.view, "a"), gaffer.JournalEncoder(False, "e"), open=False)
        numbers = [0, 0]
        for step in range(600):
            which = rng.randrange(2)
            writes[which](b"%d\n" % numbers[which])
            numbers[which] += 1
            if step in (50, 500):
                self.drain(reader)
            reader.sink.open = False
        self.drain(reader)
        self.drain(plain)
        for _ in range(200):
            self.advance()
        self.assertEqual((plain.sink.data.split(b" ")[4:], plain.sink.losses[0] > 0), ([b"0\n"], True))
        due, lost = {"a": 0, "b": 0}, False
        for _, line in self.events(reader):
            if isinstance(line, int):
                lost = True
            else:
                name, _, _, text = line.split(" ")
                self.assertTrue(int(text) == due[name] or (lost and int(text) > due[name]), line)
                due[name] = int(text) + 1
        self.assertEqual(([due["a"], due["b"]], lost), (numbers, True))


# --------------------------------------------------------------------------------------------------
# templates
# --------------------------------------------------------------------------------------------------
class PureTemplates(Case):

    DEFAULTS = {
        "args": [], "env": {}, "os_env": True, "cwd": None, "uid": None, "gid": None,
        "shell": False, "numprocesses": 1, "start": True, "detach": False,
        "redirect_output": ["stdout", "stderr"], "redirect_input": False, "custom_streams": [],
        "graceful_timeout": 10, "restart": "always", "success": [0], "restart_delay": [0.1, 10],
        "flapping": None, "priority": None,
    }
    FLAG = ([True, False], [1, 0, "true", "", None, []])
    NOT_LABELS = [["stdin"], ["ttin"], ["exit"], ["dropped"], [""], ["."], [".."], ["a/b"], ["a b"],
                  ["x" * 65], ["\u00e9"], ["a\n"], [1], [None], [["a"]]]
    NOT_IDENTITIES = ["no-such-one", "", -1, 2 ** 32 - 1, 2 ** 70, True, 1.5, []]
    # field: (good values, bad values)
    VALUES = {
        "name": (["a", "web:1", "a@b.c-d_E", "x" * 128, "1a", "a:", "...", "_", ".a", "0x10", "@",
                  "all:a", "alls", "ALL"],
                 ["", "x" * 129, "12", ".", "..", "-a", ":a", "a b", "a/b", "\u00e4", "a\n", "12\n",
                  "a\0", "\u0661", "all", "all\n", 5, None, [], True]),
        "cmd": (["true", "a 'b c' $D", "/bin/ls", "\u00e4"],
                ["", "  ", "\t\n", "'", "a \"b", "a\0b", "\ud800", 5, None, ["a"], True]),
        "args": ([[], ["a", "", " "], "", "a 'b c'"],
                 [5, {}, [1], ["a", None], "'", ["\0"], ["\ud800"], None, True, [["a"]]]),
        "env": ([{}, {"A": "b", "N": 1, "F": 1.5, "E": ""}, {"a b": "c"}],
                [[], "x", {"A": None}, {"A": True}, {"A": []}, {"": "x"}, {"A=B": "x"},
                 {"A": "\0"}, {"A\0": "x"}, {"A": "\ud800"}, {"A": math.inf}, {"A": math.nan},
                 {1: "x"}, {None: "x"}, {b"A": "x"}, {("A",): "x"}, None, [["A", "b"]]]),
        "os_env": FLAG, "shell": FLAG, "start": FLAG, "redirect_input": FLAG, "detach": FLAG,
        "cwd": (["/", ".", None], ["/no/such/directory", PYTHON, "", 5, "/\0", ["/"]]),
        "uid": ([None, os.geteuid(), str(os.geteuid())], NOT_IDENTITIES),
        "gid": ([None, os.getegid(), str(os.getegid())], NOT_IDENTITIES),
        "numprocesses": ([0, 1, 1000], [-1, 1001, 1.0, "1", True, None, []]),
        "redirect_output": ([[], ["a"], ["a", "b"], ["a", "a"], ["x" * 64], ["A.b_c-1"], ["1"]],
                            ["stdout", ["a", "b", "c"], {}, None, 1, *NOT_LABELS]),
        "custom_streams": ([[], ["a"], ["a", "b"], ["s%d" % number for number in range(16)]],
                           ["a", ["s%d" % number for number in range(17)], ["a", "a"], None, {},
                            *NOT_LABELS]),
        "graceful_timeout": ([0, 0.5, 10, 10 ** 7],
                             [-1, -0.1, 10 ** 8, math.inf, math.nan, "1", True, None, []]),
        "flapping": ([None, {}, {"attempts": 1},
                      {"attempts": 3, "window": 0.5, "retry_in": 0, "max_retry": 0}],
                     [[], 5, True, "x", {"attempts": 0}, {"attempts": 1.5}, {"attempts": True},
                      {"window": 0}, {"window": "1"}, {"retry_in": -1}, {"max_retry": -1},
                      {"max_retry": None}, {"retries": 1}, {1: 1}]),
        "restart": (["always", "on-failure", "never"], ["no", "", True, None, ["always"]]),
        "success": ([[], [0, 3, 255], [0, "TERM", "sigint"]],
                    [0, "TERM", [256], [-1], [1.5], [True], ["15"], ["NOPE"], [None], None]),
        "restart_delay": ([0, 5, 0.5, [0, 0], [1, 60.5]],
                          [-1, "5", True, [], [1], [2, 1], [1, 2, 3], [-1, 1], [1, None], 1e8,
                           [0, math.inf], None]),
        "priority": ([None, 0, -5, 100], [1.5, "1", True, []]),
    }

    def check(self, **fields):
        """check_template() of a template with these fields."""
        return gaffer.check_template(dict({"name": "a", "cmd": "true"}, **fields))

    def refusal(self, info):
        """The reason why a template is refused."""
        with self.assertRaises(gaffer.InvalidProcessInfo) as caught:
            gaffer.check_template(info)
        return str(caught.exception)

    def test_values(self):
        """Good ones come back as they were given; bad ones are refused by the field's name."""
        self.assertEqual(set(self.VALUES), set(gaffer.OPTIONS))
        self.assertEqual(self.check(), dict(self.DEFAULTS, name="a", cmd="true"))
        for field, (good, bad) in self.VALUES.items():
            for value in good:
                with self.subTest(field=field, value=value):
                    wanted = value
                    if field == "flapping" and value is not None:
                        wanted = dict(dict(attempts=2, window=1.0, retry_in=7.0, max_retry=5),
                                      **value)
                    self.assertEqual(self.check(**{field: value})[field], wanted)
            for value in bad:
                with self.subTest(field=field, value=value):
                    reason = self.refusal({"name": "a", "cmd": "true", field: value})
                    self.assertIn("field '%s'" % field, reason)
                    self.assertNotIn("\n", reason)

    def test_refusals(self):
        """All faults in one sentence, with a near match; its length is bounded."""
        flood = {"field%d" % number: 1 for number in range(20000)}
        table = [
            ({}, "field 'name' is required; field 'cmd' is required"),
            ({"name": "a"}, "field 'cmd' is required"),
            ({"name": "a", "cmd": "b", "comand": 1}, "unknown field 'comand', did you mean 'cmd'?"),
            ({"name": "a", "cmd": "b", "num_processes": 2}, "did you mean 'numprocesses'?"),
            ({"name": "a", "cmd": "b", "zzzz": 1}, "unknown field 'zzzz'; remove it"),
            ({"name": "a", "cmd": "b", "flapping": {"atempts": 2}}, "did you mean 'attempts'?"),
            (dict(flood, name="a", cmd="b"), "19990 more unknown fields"),
            ({"name": "a", "cmd": "b", "x" * 100000: 1}, "unknown field 'xxx"),
            *(({"name": "-", "cmd": 5, "numprocesses": -1, "shel": True}, field)
              for field in ("'name'", "'cmd'", "'numprocesses'", "'shel'")),
            *((value, "one JSON object") for value in (None, [], "a", 5, [["name", "a"]])),
        ]
        for info, words in table:
            with self.subTest(words):
                reason = self.refusal(info)
                self.assertIn(words, reason)
                self.assertLess(len(reason), 3000)

    def test_known(self):
        """An update may leave out what is known; it is checked as well."""
        info = gaffer.check_template({"cmd": "x"}, {"name": "old", "start": False})
        self.assertEqual((info["name"], info["start"], info["env"]), ("old", False, {}))
        self.assertEqual(gaffer.check_template({"cmd": "x", "start": True},
                                               {"name": "old", "start": False})["start"], True)
        with self.assertRaises(gaffer.InvalidProcessInfo):
            gaffer.check_template({"cmd": "x"}, {"name": "-"})

    def test_copies(self):
        """Nobody can change a template through what he gave, or a default through a template."""
        given = {"name": "a", "cmd": "b", "env": {"A": "1"}, "redirect_output": ["a"]}
        info = gaffer.check_template(given)
        given["env"]["A"] = "2"
        given["redirect_output"].append("b")
        self.assertEqual((info["env"], info["redirect_output"]), ({"A": "1"}, ["a"]))
        one, other = self.check(), self.check()
        for field in ("env", "args", "redirect_output", "custom_streams"):
            self.assertIsNot(one[field], other[field], field)

    def test_together(self):
        """Fields that are right by themselves, and wrong together."""
        for fields, words in (
                ({"detach": True, "redirect_output": ["a"]}, "'redirect_output' cannot go with"),
                ({"detach": True, "redirect_input": True}, "'redirect_input' cannot go with"),
                ({"detach": True, "custom_streams": ["a"]}, "'custom_streams' cannot go with"),
                ({"redirect_output": ["a"], "custom_streams": ["a"]}, "label 'a'"),
                ({"custom_streams": ["stdout"]}, "label 'stdout'"),
                ({"cmd": "a 'b", "args": []}, "field 'cmd' cannot be split into words"),
                ({"cmd": "''", "args": " "}, None),
                ({"cmd": "it's", "args": ["x"]}, None),
                ({"cmd": "echo 'a", "shell": True}, None),
                ({"redirect_output": [], "custom_streams": ["stdout"]}, None),
                ({"env": {"GAFFER_PORT_STEP": "1"}}, "has GAFFER_PORT_STEP: give it and PORT"),
                ({"env": {"GAFFER_PORT_STEP": 1, "PORT": 65500}, "numprocesses": 37},
                 "field 'env' makes 65536 the PORT of process 37"),
                *([({"uid": 54321}, "give 'gid' too"), ({"uid": 54321, "gid": 54321}, None)]
                  if os.geteuid() == 0 else [])):
            with self.subTest(fields=fields):
                if words is None:
                    self.check(**fields)
                else:
                    self.assertIn(words, self.refusal(dict({"name": "a", "cmd": "b"}, **fields)))
        self.assertEqual(self.check(detach=True)["redirect_output"], [])

    def test_words(self):
        """As a shell splits them: sh itself is asked."""
        for text in ("a  b\tc", "a 'b  c' \"d e\"", "''", "a\\ b \\'", "'a'\"b\"c", "a\\\nb c",
                     "a \\\n b", "\"a\\\nb\"", "'a\\\nb'", "\"\\$X \\` \\\" \\\\ \\x\"", "\"it's\" \\\n 'a\"b'",
                     "\\\\\\\n b", "\"\\\\\\\nb\"", "a\\\n\\\nb", "'\\'\\\n", "# a", "a#b"):
            if text == "# a":
                self.assertEqual(gaffer.split_words(text), ["#", "a"], "a comment is none here")
                continue
            with self.subTest(text):
                shown = subprocess.run(["sh", "-c", "printf '%s\\0' " + text],
                                       stdout=subprocess.PIPE, check=True).stdout.decode()
                self.assertEqual(gaffer.split_words(text), shown.split("\0")[:-1])

    def test_substitution(self):
        env = {b"A": b"1", b"B_2": b"two", b"D": b"$A", b"E": b"", b"PORT": b"80",
               b"U": "\u00e4".encode(), b"X": b"\xff"}
        for word, wanted in (
                ("", ""), ("x", "x"), ("$A", "1"), ("${A}B", "1B"), ("$AB", "$AB"), ("$A$A", "11"),
                ("${AB}", "${AB}"), ("a$A.b", "a1.b"), ("$B_2", "two"), ("$$", "$"), ("$$A", "$A"),
                ("$$$A", "$1"), ("$$$$", "$$"), ("$${A}", "${A}"), ("$", "$"), ("a$", "a$"),
                ("$ A", "$ A"), ("$1", "$1"), ("$-", "$-"), ("${", "${"), ("${A", "${A"),
                ("${}", "${}"), ("${A-b}", "${A-b}"), ("${1}", "${1}"), ("$D", "$A"), ("$E", ""),
                ("x${E}y", "xy"), (":$PORT/", ":80/"), ("$\u00c4", "$\u00c4"),
                ("$A\u00e4", "1\u00e4"), ("%A% {A} `A`", "%A% {A} `A`"), ("$U", "\u00e4"), ("$X", "\udcff")):
            with self.subTest(word):
                self.assertEqual(gaffer.substitute(word, env), wanted)


class PureEnvFile(Case):
    """The texts of .env files."""

    def test_table(self):
        for text, wanted in (
                ("A=1", {"A": "1"}), ("export A = b c  ", {"A": "b c"}), ("A=", {"A": ""}), ("", {}),
                ("\n# x\n\n  A=1 # x\n", {"A": "1"}), ("A=b#c #d", {"A": "b#c"}), ("A= # x", {"A": ""}),
                ("A=#336699", {"A": "#336699"}), ("A='x'#c", {"A": "x"}), ("A=it's \"b\"", {"A": "it's \"b\""}),
                ("A='b \\n \"c\" # $D' # e", {"A": "b \\n \"c\" # $D"}),
                ('A="b\\nc\\t\\"d\\" \\\\ \\$e # f"', {"A": 'b\nc\t"d" \\ $e # f'}),
                ('A="b\nc"\nB=2', {"A": "b\nc", "B": "2"}), ("A=1\r\nB='2'\r\n", {"A": "1", "B": "2"}),
                ("A=x=y\nA=2", {"A": "2"}), ("A=\\n", {"A": "\\n"}),
                ("A=1\nB=${A}$A-$H/${N}.\nH=x", {"A": "1", "B": "11-home/.", "H": "x"}),
                ("A=x\nB=\"${A}$H\"\nC='$A'", {"A": "x", "B": "xhome", "C": "$A"})):
            with self.subTest(text):
                self.assertEqual(gaffer.parse_env(text, {"H": "home"}), (wanted, []))

    def test_faults(self):
        for text, lines, word in (
                ("A\n", [1], "NAME=value"), ("A=1\n1A=2\nB=3", [2], "NAME=value"), ('A="b\nB=1', [1], "quotes"),
                ("A='b'c", [1], "quotes"), ("=1\n\n-", [1, 3], "NAME=value"), ("export A", [1], "NAME=value"),
                ('\nA="\\q"', [2], "\\q"), ("A=${B:-c}", [1], "'$'"), ("A='x\ny'\nB=$(date)", [3], "'$'"),
                ("A=$$", [1], "'$'"), ('A="5$"', [1], "'$'")):
            with self.subTest(text):
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
        """Make a file. Returns its path."""
        path = os.path.join(self.folder, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n")
        os.chmod(path, mode)
        return path

    def launch(self, cmd, **fields):
        """A Launch of a template."""
        return gaffer.Launch(gaffer.check_template(dict({"name": "a", "cmd": cmd}, **fields)))

    def program(self, cmd, **fields):
        """The path that a template is executed by."""
        return os.fsdecode(self.launch(cmd, **fields).program)

    def refusal(self, cmd, **fields):
        """Why it cannot be launched."""
        with self.assertRaises(gaffer.InvalidProcessInfo) as caught:
            self.launch(cmd, **fields)
        return str(caught.exception)

    def test_words(self):
        pure_environ(self, PORT="8000", HOME="/home/x y")
        for fields, argv in (
                ({"cmd": "sh -c 'a  b' \"\" c\\ d"}, ["sh", "-c", "a  b", "", "c d"]),
                ({"cmd": "sh $PORT ${PORT}x '$PORT' $$PORT $NO_SUCH_VARIABLE"},
                 ["sh", "8000", "8000x", "8000", "$PORT", "$NO_SUCH_VARIABLE"]),
                ({"cmd": "sh $HOME"}, ["sh", "/home/x y"]),
                ({"cmd": "sh one \\\n two"}, ["sh", "one", "two"]),
                *(({"cmd": "sh -c x", "args": args}, ["sh", "-c", "x"]) for args in ([], "", "  ")),
                ({"cmd": "sh", "args": "-c 'a b'"}, ["sh", "-c", "a b"]),
                ({"cmd": "sh", "args": ["-c", "a  'b", "$PORT"]}, ["sh", "-c", "a  'b", "8000"]),
                ({"cmd": "sh", "args": ["$P"], "env": {"P": 5}}, ["sh", "5"]),
                ({"cmd": "a 'b $PORT", "shell": True}, ["/bin/sh", "-c", "a 'b $PORT", "sh"]),
                ({"cmd": "echo $1", "shell": True, "args": ["$PORT", "x y"]},
                 ["/bin/sh", "-c", "echo $1", "sh", "$PORT", "x y"]),
                ({"cmd": "echo $1", "shell": True, "args": "a 'b c'"},
                 ["/bin/sh", "-c", "echo $1", "sh", "a", "b c"])):
            with self.subTest(fields=fields):
                self.assertEqual(self.launch(**fields).argv, [word.encode() for word in argv])

    def test_env(self):
        pure_environ(self, GAFFER_TOKEN="secret", PYTHONUNBUFFERED=None, PURE="theirs",
                     GAFFER_STREAMS=None)
        env = self.launch("sh", env={"PURE": "mine", "N": 5, "F": 1.5, "\u00e4": "\u20ac"}).env
        self.assertEqual([env[name] for name in (b"PURE", b"N", b"F", "\u00e4".encode(), b"PATH")],
                         [b"mine", b"5", b"1.5", "\u20ac".encode(), os.environb[b"PATH"]])
        self.assertNotIn(b"GAFFER_TOKEN", env)
        self.assertNotIn(b"GAFFER_STREAMS", env)
        self.assertNotIn(b"GAFFER_TOKEN", self.launch("sh", env={"GAFFER_TOKEN": "x"}).env)
        self.assertEqual(self.launch("sh", env={"A": "b"}, os_env=False, redirect_output=[]).env,
                         {b"A": b"b"})
        self.assertEqual(self.launch("sh", custom_streams=["in", "out"]).env[b"GAFFER_STREAMS"],
                         b"in,out")
        self.assertEqual(os.environ["GAFFER_TOKEN"], "secret")

    def test_port(self):
        """Only with a step each process has its own."""
        for step, wanted in (({}, [b"7000", b"7000"]), ({"GAFFER_PORT_STEP": "1"}, [b"7000", b"7002"])):
            first = self.launch("sh", env={"PORT": 7000, **step})
            third = first.again(gaffer.check_template({
                "name": "a", "cmd": "sh", "env": {"PORT": 7000, **step}}), 3)
            self.assertEqual([launch.env[b"PORT"] for launch in (first, third)], wanted)
            self.assertNotIn(b"GAFFER_PORT_STEP", third.env)

    def test_pythonunbuffered(self):
        pure_environ(self, PYTHONUNBUFFERED=None)
        self.assertEqual(self.launch("sh").env[b"PYTHONUNBUFFERED"], b"1")
        self.assertNotIn(b"PYTHONUNBUFFERED", self.launch("sh", redirect_output=[]).env)
        empty = self.launch("sh", env={"PYTHONUNBUFFERED": ""})
        self.assertEqual(empty.env[b"PYTHONUNBUFFERED"], b"")
        pure_environ(self, PYTHONUNBUFFERED="0")
        self.assertEqual(self.launch("sh").env[b"PYTHONUNBUFFERED"], b"0")

    def test_path(self):
        """The first in the PATH of the process, or gaffer's, that can be executed."""
        first, second = self.file("one/tool"), self.file("two/tool")
        plain = self.file("zero/tool", 0o644)
        os.makedirs(os.path.join(self.folder, "dir/tool"))
        path = ":".join(os.path.join(self.folder, each)
                        for each in ("nowhere", "dir", "zero", "one", "two"))
        self.assertEqual(self.program("tool", env={"PATH": path}), first)
        self.assertEqual(self.program("tool x", env={"PATH": os.path.dirname(second)}), second)
        pure_environ(self, PATH=os.path.dirname(second))
        self.assertEqual(self.program("tool", os_env=False), second)
        self.assertEqual(self.program("tool"), second)
        self.assertEqual(self.refusal("tool", env={"PATH": os.path.dirname(plain)}),
                         "field 'cmd' names 'tool', but %s is not executable: chmod +x it" % plain)
        self.assertEqual(self.refusal("tool", env={"PATH": "/nowhere"}),
                         "field 'cmd' names 'tool', which is not found in PATH")

    def test_a_path(self):
        """The sentence names the path that was tried."""
        tool, plain = self.file("bin/tool"), self.file("bin/plain", 0o644)
        names = "field 'cmd' names "
        self.assertEqual(self.program(tool), tool)
        self.assertEqual(self.program("$TOOL", env={"TOOL": tool}), tool)
        for cmd, fields, reason in (
                (plain, {}, names + "%r, which is not executable: chmod +x it" % plain),
                (self.folder, {}, names + "%r, which is a directory" % self.folder),
                (tool + "x", {}, names + "%r, which is not there" % (tool + "x")),
                ("$TOOL", {"env": {"TOOL": "/no/tool"}}, names + "'/no/tool', which is not there"),
                ("./no.sh", {}, names + "'./no.sh', but %s/no.sh is not there" % os.getcwd()),
                ("./no.sh", {"cwd": self.folder},
                 names + "'./no.sh', but %s/no.sh is not there" % self.folder),
                ("bin/plain", {"cwd": self.folder},
                 names + "'bin/plain', but %s is not executable: chmod +x it" % plain)):
            with self.subTest(cmd=cmd, fields=fields):
                self.assertEqual(self.refusal(cmd, **fields), reason)

    def test_cwd(self):
        """A relative program, and relative parts of PATH, are seen from the process's directory."""
        tool, sub = self.file("sub/bin/tool"), os.path.join(self.folder, "sub")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        for cmd, fields in (("bin/tool", {}), ("./bin/tool", {}),
                            ("tool", {"env": {"PATH": "bin"}})):
            for cwd in (sub, "sub"):
                with self.subTest(cmd, cwd=cwd):
                    self.assertEqual(self.program(cmd, cwd=cwd, **fields), tool)

    def test_cwd_is_looked_at_anew(self):
        gone = os.path.join(self.folder, "gone")
        os.mkdir(gone)
        template = gaffer.check_template({"name": "a", "cmd": "sh", "cwd": gone})
        os.rmdir(gone)
        with self.assertRaisesRegex(gaffer.InvalidProcessInfo, "field 'cwd'.*gone"):
            gaffer.Launch(template)

    def test_identity(self):
        """With a user come his groups, and HOME, USER, LOGNAME and SHELL unless env names them."""
        pure_environ(self, HOME="/mine", USER="me", LOGNAME="me", SHELL="/mine/sh")
        launch = self.launch("sh")
        self.assertEqual((launch.uid, launch.gid, launch.groups), (None, None, None))
        self.assertEqual(launch.env[b"HOME"], b"/mine")
        own = self.launch("sh", uid=os.geteuid(), gid=os.getegid())
        self.assertEqual((own.uid, own.gid), (os.geteuid(), os.getegid()))
        self.assertEqual(own.env[b"HOME"], os.fsencode(pwd.getpwuid(os.geteuid()).pw_dir))
        if os.geteuid() != 0:
            return
        self.assertIn(own.gid, own.groups)
        names = (b"HOME", b"USER", b"LOGNAME", b"SHELL")
        entry = pwd.getpwnam("nobody")
        nobody = self.launch("sh $HOME", uid="nobody", env={"SHELL": "/bin/x"})
        self.assertEqual(nobody.uid, entry.pw_uid)
        self.assertNotIn(0, [nobody.gid, *nobody.groups])
        self.assertEqual([nobody.env[name].decode() for name in names],
                         [entry.pw_dir, "nobody", "nobody", "/bin/x"])
        self.assertEqual(nobody.argv[1].decode(), entry.pw_dir)
        unknown = self.launch("sh", uid=54321, gid=54322)
        self.assertEqual((unknown.uid, unknown.gid, unknown.groups), (54321, 54322, [54322]))
        self.assertEqual([unknown.env.get(name) for name in names], [None] * 4)

    def test_any_locale(self):
        """UTF-8 goes in and out, whatever the locale says."""
        tool = self.file("\u00e4/tool\u20ac")
        code = """
            import os, sys
            sys.path.insert(0, %a)
            import gaffer
            folder, word = %a, "\\u00e4"
            info = {"name": "a", "cmd": "./tool\\u20ac $W " + word, "cwd": folder,
                    "env": {"W": word}}
            launch = gaffer.Launch(gaffer.check_template(info))
            assert launch.argv[1:] == [b"\\xc3\\xa4"] * 2 and launch.env[b"W"] == b"\\xc3\\xa4"
            assert launch.program == folder.encode("utf-8") + b"/tool\\xe2\\x82\\xac"
            """ % (os.path.dirname(os.path.abspath(gaffer.__file__)), os.path.dirname(tool))
        env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        subprocess.run([PYTHON, "-c", textwrap.dedent(code)], env=env, check=True, timeout=TIMEOUT)


# --------------------------------------------------------------------------------------------------
# policies
# --------------------------------------------------------------------------------------------------
class PurePolicies(Case):

    def decide(self, flapping, exits):
        """What after_exit() says to exits, [(time, seconds lived)], one after the other: words."""
        info = gaffer.check_template({"name": "x", "cmd": "x", "flapping": flapping})
        history, actions = (), []
        for now, lived in exits:
            action, delay, history = gaffer.after_exit(info, (1, 0), now, lived, 1, history)
            self.assertEqual(delay, info["flapping"]["retry_in"] if action == "pause" else 0)
            actions.append(action)
        return " ".join(actions)

    def test_backoff(self):
        """Without flapping: none the first time, then 0.1 s doubling to 10."""
        for failures, delay in ((0, 0), (1, 0), (2, 0.1), (3, 0.2), (4, 0.4), (5, 0.8), (6, 1.6),
                                (7, 3.2), (8, 6.4), (9, 10), (10, 10), (100, 10), (10 ** 9, 10)):
            with self.subTest(failures):
                action, seconds, history = gaffer.after_exit(
                    gaffer.check_template({"name": "x", "cmd": "x"}), (1, 0), 5.0, 1.0, failures,
                    ())
                self.assertEqual((action, history), ("start", ()))
                self.assertAlmostEqual(seconds, delay)

    def test_flapping(self):
        for flapping, exits, actions in (
                # `attempts` exits in `window`; after `max_retry` pauses the next flap is the last
                ({"attempts": 3, "max_retry": 2}, [(n / 2, 0.5) for n in range(9)],
                 "start start pause start start pause start start stop"),
                # what lives just as long as the window is neither flapping nor a success
                ({}, [(n * 1.001, 1.0) for n in range(4)], "start start start start"),
                ({}, [(1, 1.0), (2, 1.0)], "start pause"),
                # the window slides
                ({"attempts": 3}, [(0, 0.1), (0.9, 0.1), (1.8, 0.1), (1.85, 0.1)],
                 "start start start pause"),
                # exits before a pause do not count after it
                ({"window": 100}, [(n, 0) for n in range(4)], "start pause start pause"),
                # what outlived the window forgives the pauses before; what did not, does not
                ({"attempts": 1, "max_retry": 2},
                 [(1, 0), (10, 0), (20, 1.001), (30, 0), (40, 0)], "pause pause pause pause stop"),
                ({"attempts": 1, "max_retry": 1}, [(1, 0), (9, 1.0)], "pause stop"),
                ({"attempts": 1, "max_retry": 0}, [(1, 0)], "stop"),
                # the defaults: 2 exits within 1 s, 5 pauses
                ({}, [(now, 0.1) for even in range(0, 12, 2) for now in (even, even + 0.5)],
                 "start pause " * 5 + "start stop"),
                # started by hand after the stop: all pauses are there again
                ({"attempts": 1, "max_retry": 1}, [(n, 0) for n in range(4)],
                 "pause stop pause stop")):
            with self.subTest(flapping=flapping, exits=exits):
                self.assertEqual(self.decide(flapping, exits), actions)

    def test_success(self):
        for success, end, good in (
                ([0], (0, 0), True), ([0], (1, 0), False), ([0], (0, 15), False),
                ([3], (0, 0), False), ([0, 143], (143, 0), True), ([0, 143], (0, 15), False),
                ([0, "TERM"], (0, 15), True), (["SIGTERM"], (0, 15), True), ([], (0, 0), False),
                ([15], (0, 15), False), (["TERM"], (143, 0), False), (["int"], (0, 2), True)):
            with self.subTest(success=success, end=end):
                self.assertEqual(gaffer.succeeded({"success": success}, end), good)

    def test_restart_delay(self):
        default, flapping = [0.1, 10], {"attempts": 9}
        for delay, flaps, failures, seconds in (
                (0, None, 1, 0), (5, None, 1, 5), (5, None, 9, 5), (5, flapping, 1, 5),
                ([1, 60], None, 1, 0), ([1, 60], None, 2, 1), ([1, 60], None, 8, 60),
                ([1, 60], flapping, 3, 2), (default, flapping, 9, 0), (default, None, 4, 0.4)):
            with self.subTest(delay=delay, flapping=flaps, failures=failures):
                info = {"restart_delay": delay, "flapping": flaps}
                self.assertAlmostEqual(gaffer.restart_delay(info, failures), seconds)

    def test_signals(self):
        for value, number in (("15", 15), ("TERM", 15), ("SIGTERM", 15), ("term", 15), (15, 15),
                              (signal.SIGTERM, 15), ("Kill", 9), ("9", 9), ("1", 1), ("HUP", 1),
                              (signal.SIGUSR1, int(signal.SIGUSR1)), ("64", 64),
                              ("sigusr2", int(signal.SIGUSR2)), ("CHLD", int(signal.SIGCHLD))):
            with self.subTest(value):
                self.assertEqual(gaffer.parse_signal(value), number)
        for value in ("", "0", "00", "-1", "+15", "65", "999", "1000", "9" * 5000, "15 ", " 15",
                      "1.0", "0x9", "\u0661\u0665", "\u00b9", "SIG", "SIGSIGTERM", "NOPE",
                      "SIG_DFL", "SIG15", "TERM\n", "TERM\0", "15;9", 0, -1, 1000, True, None, 15.0, b"TERM"):
            with self.subTest(str(value)[:9]), self.assertRaises(gaffer.BadValue) as caught:
                gaffer.parse_signal(value)
            self.assertLess(len(str(caught.exception)), 300)


# --------------------------------------------------------------------------------------------------------------------
def pure_request(*lines, target="/", method="GET", version="1.1", host="localhost"):
    """A Request of further header lines."""
    head = ["%s %s HTTP/%s" % (method, target, version), *(["Host: " + host] if host is not None else []), *lines]
    return gaffer.parse_head("\r\n".join(head).encode("latin-1"))


class PureHead(Case):

    def test_parts(self):
        request = gaffer.parse_head(b"POST /a/b%20c?x=1&y= HTTP/1.1\r\nHost: localhost:5000\r\nX-One:  a b \t\r\n"
                                    b"x-two:\r\nX-ONE: c\r\nX-Latin: \xe9")
        self.assertEqual((request.method, request.target, request.path, request.raw_query, request.version),
                         ("POST", "/a/b%20c?x=1&y=", "/a/b%20c", "x=1&y=", (1, 1)))
        self.assertEqual(request.headers, {"host": "localhost:5000", "x-one": "a b, c", "x-two": "", "x-latin": "\xe9"})
        self.assertEqual((request.query, request.segments(), request.body), ({"x": "1", "y": ""}, ["a", "b c"], b""))

    def test_versions(self):
        for version, wanted in (("1.1", (1, 1)), ("1.0", (1, 0)), ("1.2", (1, 1)), ("1.9", (1, 1))):
            with self.subTest(version):
                self.assertEqual(pure_request(version=version).version, wanted)

    def test_first_lines_that_are_refused(self):
        bad, version, long_ = gaffer.BadRequest, gaffer.VersionNotSupported, gaffer.UriTooLong
        for line, error in (
                (b"", bad), (b"GET", bad), (b"GET /", bad), (b"GET / ", bad), (b"GET  / HTTP/1.1", bad),
                (b"GET /  HTTP/1.1", bad),
                (b" GET / HTTP/1.1", bad), (b"GET / HTTP/1.1 ", bad), (b"GET\t/ HTTP/1.1", bad),
                (b"GET / x HTTP/1.1", bad),
                (b"G(T / HTTP/1.1", bad), (b"G\xc9T / HTTP/1.1", bad), (b"GET /\xe9 HTTP/1.1", bad),
                (b"GET /\0 HTTP/1.1", bad),
                (b"GET /\x7f HTTP/1.1", bad), (b"GET / http/1.1", bad), (b"GET / HTTP/1", None),
                (b"GET / HTTP/1.10", bad),
                (b"GET / HTTP/ 1.1", bad), (b"GET / HTTP/1.1\r", bad), (b"GET / HTTP/1.1\nX: y", bad),
                (b"GET /#a HTTP/1.1", bad),
                (b"GET /a#b?c HTTP/1.1", bad), (b"GET a HTTP/1.1", bad), (b"GET ?a HTTP/1.1", bad),
                (b"GET * HTTP/1.1", bad),
                (b"GET ftp://localhost/ HTTP/1.1", bad), (b"CONNECT localhost:80 HTTP/1.1", bad),
                (b"GET http:/x HTTP/1.1", bad),
                (b"GET http://localhost/#a HTTP/1.1", bad), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", bad),
                (b"GET / HTTP/2.0", version), (b"GET / HTTP/0.9", version), (b"PRI * HTTP/2.0", version),
                (b"GET / HTTP/2", version),
                (b"GET / HTTP/11.1", version), (b"GET /" + b"a" * 8192 + b" HTTP/1.1", long_)):
            with self.subTest(line[:40]), self.assertRaises(error or gaffer.GafferError) as caught:
                gaffer.parse_head(line + b"\r\nHost: localhost")
            self.assertIn(caught.exception.status, (400, 414, 505))

    def test_the_longest_target(self):
        target = "/" + "a" * (gaffer.TARGET_SIZE - 1)
        self.assertEqual(pure_request(target=target).target, target)
        with self.assertRaises(gaffer.UriTooLong):
            pure_request(target=target + "a")

    def test_header_lines_that_are_refused(self):
        for lines in (
                b"X", b"X y", b": y", b"X : y", b"X\t: y", b" X: y", b"\tX: y", b"X: y\r\n z", b"X: y\r\n\tz",
                b"X: y\r\n ", b"X: a\rb",
                b"X: a\nb", b"X: a\r", b"X: a\n", b"X: a\0b", b"X\0: a", b"X: \x7f", b"X: \x1b[0m", b"X: \x01",
                b"X(: y", b"X@Y: z",
                b"X\xe9: y", b"X/Y: z", b'"X": y', b"X: y\r\n\r\nZ: z", b"{}: y"):
            with self.subTest(lines), self.assertRaises(gaffer.BadRequest):
                gaffer.parse_head(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + lines)
            with self.subTest(lines, place="first"), self.assertRaises(gaffer.BadRequest):
                gaffer.parse_head(b"GET / HTTP/1.1\r\n" + lines + b"\r\nHost: localhost")

    def test_header_lines_that_are_fine(self):
        self.assertEqual(pure_request("!#$%&'*+-.^_`|~09aZ: y").headers["!#$%&'*+-.^_`|~09az"], "y")
        self.assertEqual(pure_request("X: a:b\t\"c\" {}").headers["x"], "a:b\t\"c\" {}")

    def test_repeated_headers(self):
        """Cookies are joined as RFC 6265 section 5.4 has it."""
        self.assertEqual(pure_request("Cookie: a=1", "X: 1", "cookie: b=2", "X: 2").headers,
                         {"host": "localhost", "cookie": "a=1; b=2", "x": "1, 2"})

    def test_what_must_not_be_repeated(self):
        for name in ("Host", "Content-Length", "Transfer-Encoding", "Content-Type", "Authorization", "Origin",
                     "Last-Event-ID", "Expect"):
            with self.subTest(name), self.assertRaises(gaffer.BadRequest) as caught:
                pure_request("%s: 1" % name, "%s: 1" % name.lower(), host=None if name == "Host" else "localhost")
            self.assertIn("twice", str(caught.exception))

    def test_how_many_headers(self):
        lines = ["X-%d: y" % number for number in range(gaffer.HEADERS_MAX - 1)]
        self.assertEqual(len(pure_request(*lines).headers), gaffer.HEADERS_MAX)
        with self.assertRaises(gaffer.HeadersTooLarge):
            pure_request(*lines, "Y: z")

    def test_host_is_required(self):
        with self.assertRaises(gaffer.BadRequest):
            pure_request(host=None)
        with self.assertRaises(gaffer.BadRequest):
            pure_request(host=None, target="http://localhost/")
        self.assertEqual(pure_request(host=None, version="1.0").headers, {})

    def test_absolute_form(self):
        """Its authority counts, whatever the Host header says: RFC 9112 section 3.2.2."""
        for target, host, path in (
                ("http://evil.example/x?y", "evil.example", "/x?y"), ("HTTP://A:1", "A:1", "/"),
                ("https://a?b", "a", "/?b"),
                ("http:///x", "", "/x"), ("http://u@a/", "u@a", "/"), ("http://[::1]:80//x", "[::1]:80", "//x")):
            with self.subTest(target):
                request = pure_request(target=target)
                self.assertEqual((request.headers["host"], request.target), (host, path))
        self.assertEqual(pure_request(target="*", method="OPTIONS").segments(), [])
        self.assertEqual(pure_request(target="http://a/", version="1.0", host=None).headers["host"], "a")
        for host in ("", "a b", "a/b", "[::1", "user@a", "a:b", "\xe9"):     # a Host that is none is refused all the same
            with self.subTest(host), self.assertRaises(gaffer.BadRequest):
                pure_request(target="http://a/", host=host)

    def test_segments(self):
        for path, wanted in (
                ("/", []), ("/a", ["a"]), ("/a/", ["a"]), ("/a/b", ["a", "b"]), ("//", [""]), ("/a//b", ["a", "", "b"]),
                ("/a%2Fb", ["a/b"]),
                ("/%C3%A4", ["\xe4"]), ("/%252F", ["%2F"]), ("/a+b", ["a+b"]), ("/..%2f", ["../"]),
                ("/a/..", ["a", ".."]),
                ("/a;b=c", ["a;b=c"]), ("/%00", ["\0"]), ("/?a/b", [])):
            with self.subTest(path):
                self.assertEqual(pure_request(target=path).segments(), wanted)
        for path in ("/%", "/%4", "/%zz", "/a%", "/%ff", "/%C3", "/%ED%A0%80", "/%+1", "/%%34"):
            with self.subTest(path), self.assertRaises(gaffer.BadRequest):
                pure_request(target=path).segments()

    def test_query(self):
        for query, wanted in (
                ("", {}), ("a", {"a": ""}), ("a=", {"a": ""}), ("a=b=c", {"a": "b=c"}),
                ("a=b&c=d", {"a": "b", "c": "d"}),
                ("a=%26%3d+x", {"a": "&= x"}), ("a=b;c=d", {"a": "b;c=d"}), ("&&a=1&", {"a": "1"}),
                ("a=%C3%A4", {"a": "\xe4"}), ("a?b=c?", {"a?b": "c?"}), ("a=%2526", {"a": "%26"}), ("a=%00", {"a": "\0"})):
            with self.subTest(query):
                self.assertEqual(pure_request(target="/?" + query).query, wanted)
        for query in ("a=1&a=1", "a&b&a", "&".join("x%d=1" % number for number in range(101)), "a=%", "a=%4", "%zz", "a=%ff",
                      "a=%C3", "%E4=1", "a=%ED%A0%80", "a=1&a%3d=%+1"):
            with self.subTest(query[:9]), self.assertRaises(gaffer.BadRequest):
                pure_request(target="/?" + query).query

    def test_json(self):
        request = pure_request(method="POST")
        for body, wanted in ((b"{}", {}), (b' {"a": [1, 2.5, null]}\n', {"a": [1, 2.5, None]}),
                             (b'"\xc3\xa4"', "\xe4")):
            request.body = body
            self.assertEqual(request.json(), wanted)
        for body in (b"", b"{", b"{} {}", b"{'a': 1}", b'{"a": NaN}', b"Infinity", b"-Infinity", b'"\xe4"', b"\xff",
                     b"\xef\xbb\xbf{}",
                     '{"a": 1}'.encode("utf-16"), b"[" * 200000, b'{"a":' * 200000, b"[1,]", b"\0", b"9" * 10000 + b"x",
                     b'"a\nb"'):
            with self.subTest(body[:9]):
                request.body = body
                with self.assertRaises(gaffer.InvalidJson) as caught:
                    request.json()
                self.assertLess(len(str(caught.exception)), 400)

    def test_wants_close(self):
        for version, line, wanted in (("1.1", "X: y", False), ("1.1", "Connection: close", True),
                                      ("1.1", "Connection: Close", True),
                                      ("1.1", "Connection: keep-alive", False),
                                      ("1.1", "Connection: upgrade, close", True),
                                      ("1.0", "X: y", True), ("1.0", "Connection: Keep-Alive", False),
                                      ("1.0", "Connection: close", True)):
            with self.subTest(version=version, line=line):
                self.assertIs(pure_request(line, version=version).wants_close(), wanted)


class PureReading(Case):
    """Heads and bodies from a file, however few bytes a read gives."""

    HEAD = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"

    class Drip(io.RawIOBase):
        """A raw file that gives one byte a read."""

        def __init__(self, data):
            super().__init__()
            self.data = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.data.readinto(memoryview(buffer)[:1])

    def files(self, wire):
        """`wire` as buffered files."""
        yield io.BytesIO(wire)
        if len(wire) < 1000:
            yield io.BufferedReader(self.Drip(wire))

    def test_requests_one_after_the_other(self):
        one = ("GET", "/a", (1, 1), {"host": "x"})
        most = b"\r\n" * gaffer.EMPTY_LINES_MAX
        for wire, wanted in (
                (b"", []), (self.HEAD, [one]), (self.HEAD * 3, [one] * 3), (self.HEAD + b"G", [one]),
                (b"\r\n" + self.HEAD + b"\r\n\r\n" + self.HEAD + b"\r\n", [one, one]),
                (self.HEAD[:-1], []), (b"\r", []), (b"\r\n", []), ((most + self.HEAD) * 2, [one, one])):
            for file in self.files(wire):
                with self.subTest(wire[:40], file=file):
                    found = list(iter(lambda: gaffer.read_request(file), None))
                    self.assertEqual([(request.method, request.target, request.version, request.headers)
                                      for request in found], wanted)

    def test_heads_that_are_refused(self):
        bad, long_ = gaffer.BadRequest, b"GET /" + b"a" * gaffer.REQUEST_LINE_SIZE
        for wire, error, words in (
                (b"\n" + self.HEAD, bad, "CR LF"), (b"GET / HTTP/1.1\nHost: x\n\n", bad, "CR LF"),
                (b"a\nb", bad, "CR LF"), (b"GET / HTTP/1.1\r\nHost: x\n\r\n", bad, "CR LF"),
                (b"\r\r\n\r\n", bad, "first line"), (b"GET / HTTP/1.1\r\n\r\n", bad, "Host"),
                (b"\r\n" * (gaffer.EMPTY_LINES_MAX + 1) + self.HEAD, bad, "empty lines"),
                (b"x y\r\n\r\n", bad, "first line"), (long_, gaffer.UriTooLong, "request line"),
                (long_ + b" HTTP/2.0\r\nX: a\nb\r\n\r\n", gaffer.UriTooLong, "request line"),
                (long_[:8190] + b" HTTP/1.1\r\nHost: x\n\r\n", bad, "CR LF")):
            for file in self.files(wire):
                with self.subTest(wire[:40], file=file), self.assertRaises(error) as caught:
                    gaffer.read_request(file)
                self.assertIn(words, str(caught.exception))

    def test_the_longest_head(self):
        """A head, with its empty line, and a request line, as long as they may be and one more."""
        def head(size, start=b"GET / HTTP/1.1\r\nHost: x\r\nX: "):
            return start + b"y" * (size - len(start) - 4) + b"\r\n\r\n"

        def line(size):
            return b"GET /".rjust(size - 8191 - 10, b"M") + b"a" * 8191 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        for make, limit, error in ((head, gaffer.HEAD_SIZE, gaffer.HeadersTooLarge),
                                   (line, gaffer.REQUEST_LINE_SIZE, gaffer.UriTooLong)):
            self.assertTrue(gaffer.read_request(io.BytesIO(make(limit))))
            with self.assertRaises(error):
                gaffer.read_request(io.BytesIO(make(limit + 1)))

    def test_body_length(self):
        chunked = "Transfer-Encoding: chunked"
        bad = gaffer.BadRequest
        for lines, wanted in (
                ([], 0), (["Content-Length: 0"], 0), (["Content-Length: 12"], 12), (["Content-Length: 0012"], 12),
                (["Content-Length:  12\t"], 12), (["Content-Length: 1000"], 1000), ([chunked], None),
                (["Transfer-Encoding: CHUNKED"], None), (["Content-Length: 1", "Expect: 100-CONTINUE"], 1),
                (["Content-Encoding: identity"], 0),
                (["Content-Length: 1001"], gaffer.TooLarge), (["Content-Length: 999999999999999999"], gaffer.TooLarge),
                (["Content-Encoding: gzip"], gaffer.UnsupportedMediaType), (["Expect: x"], gaffer.ExpectationFailed),
                (["Content-Length: 5", chunked], bad), ([chunked, "Content-Length: 0"], bad), (["Content-Length: "], bad),
                *((["Content-Length: " + text], bad) for text in (
                    "-1", "+5", "5, 5", "5,6", "0x5", "5.0", "5 5", "1_0", "\xb2", "five", "9" * 30, "9" * 5000)),
                *((["Transfer-Encoding: " + text], bad) for text in (
                    "gzip, chunked", "chunked, chunked", "chunked, identity", "identity", "", "xchunked", "chunked;q=1",
                    "\x0bchunked", '"chunked"'))):
            with self.subTest(lines):
                if isinstance(wanted, type):
                    with self.assertRaises((wanted, bad) if "\x0b" in lines[0] else wanted):
                        gaffer.body_length(pure_request(*lines, method="POST"), 1000)
                else:
                    self.assertEqual(gaffer.body_length(pure_request(*lines, method="POST"), 1000), wanted)
        with self.assertRaises(bad):
            gaffer.body_length(pure_request(chunked, method="POST", version="1.0"), 1000)

    def test_sized_bodies(self):
        for file in self.files(b"abcdef"):
            self.assertEqual(gaffer.read_body(file, 4, 10), b"abcd")
            self.assertEqual(gaffer.read_body(file, 0, 10), b"")
            with self.assertRaises(EOFError):
                gaffer.read_body(file, 3, 10)

    def test_chunked_bodies(self):
        for wire, body, rest in (
                (b"0\r\n\r\n", b"", b""), (b"3\r\nabc\r\n0\r\n\r\n", b"abc", b""),
                (b"3\r\nabc\r\n2\r\n\r\n\r\n0\r\n\r\nGET /", b"abc\r\n", b"GET /"),
                (b"00003\r\nabc\r\n000\r\n\r\n", b"abc", b""),
                (b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2, b""),
                (b"1;name=value;q=\"a b\"\r\nx\r\n0;last\r\n\r\n", b"x", b""),
                (b"1 \t;x\r\ny\r\n0\r\n\r\n", b"y", b""), (b"1 \r\ny\r\n0\r\n\r\n", b"y", b""),
                (b"0\r\nA: b\r\nC: d\r\n\r\nmore\r\n", b"", b"more\r\n"),
                (b"3\r\n0\r\n\r\n0\r\n\r\n0\r\n\r\n", b"0\r\n", b"0\r\n\r\n"),
                (b"1\r\na\r\n" * 1000 + b"0\r\n\r\n", b"a" * 1000, b"")):
            for file in self.files(wire):
                with self.subTest(wire[:40], file=file):
                    self.assertEqual((gaffer.read_body(file, None, 1000), file.read()), (body, rest))

    def test_chunked_bodies_that_are_refused(self):
        line = b"X: " + b"y" * 93 + b"\r\n"
        fits, most = gaffer.TRAILERS_SIZE // len(line), gaffer.CHUNK_LINE_SIZE
        for error, wires in (
                (None, (b"0\r\n" + line * fits + b"\r\n", b"1;" + b"x" * (most - 2) + b"\r\na\r\n0\r\n\r\n",
                        b"a\r\n0123456789\r\n" * 100 + b"0\r\n\r\n")),
                (gaffer.BadRequest, (
                    b"\r\n", b"g\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"1_0\r\n", b"1 1\r\n",
                    b"1,1\r\n", b"1.0\r\n", b";\r\n", b"\xb2\r\n", b"123456789\r\n", b"1\na\r\n0\r\n\r\n",
                    b"0\n\r\n", b"0\r\n\n", b"1\r\na\n0\r\n\r\n", b"1\r\na\r0\r\n\r\n",
                    b"1\r\nab\r\n0\r\n\r\n", b"1\r\naX", b"1\r\na\rX", b"1;a\0b\r\n", b"1;a\rb\r\n", b"1\r\r\n",
                    b"1;" + b"x" * (most - 1) + b"\r\n", b"1" + b" " * 300, b"0\r\nbad\r\n\r\n",
                    b"0\r\nA : b\r\n\r\n", b"0\r\n A: b\r\n\r\n", b"0\r\nA: \0\r\n\r\n",
                    b"0\r\nA: b\nC: d\r\n\r\n", b"0\r\n" + line * (fits + 1) + b"\r\n",
                    b"0\r\nX: " + b"y" * 10000,
                    b"1;" + b"x" * 98 + b"\r\na\r\n" + (b"1;" + b"x" * 99 + b"\r\na\r\n") * 164)),
                (gaffer.TooLarge, (b"3e9\r\n", b"3e8\r\n" + b"a" * 1000 + b"\r\n1\r\n", b"ffffffff\r\n")),
                (EOFError, (b"", b"1", b"1\r\n", b"1\r\na", b"1\r\na\r", b"1\r\na\r\n", b"0\r\n", b"0\r\nA: b\r\n"))):
            for wire in wires:
                for file in self.files(wire):
                    with self.subTest(wire[:40], file=file):
                        if error is None:
                            self.assertTrue(gaffer.read_body(file, None, 1000) or wire[:1] == b"0")
                        else:
                            with self.assertRaises(error):
                                gaffer.read_body(file, None, 1000)

    def test_small_chunks_cost_no_more_than_their_bytes(self):
        wire = b"2\r\nab\r\n" * 15000 + b"0\r\n\r\n"
        file = io.BytesIO(wire)
        tracemalloc.start()
        try:
            self.assertEqual(gaffer.read_body(file, None, 100000), b"ab" * 15000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.assertLess(peak, 150000)

    def test_chunks_of_any_size(self):
        rng = random.Random(6)
        for _ in range(100):
            data = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
            wire = b"".join(map(gaffer.chunk, pure_pieces(rng, data, 30))) + b"0\r\n\r\nrest"
            for file in self.files(wire):
                self.assertEqual((gaffer.read_body(file, None, 1000), file.read()), (data, b"rest"))

    def test_query_parameters(self):
        gaffer.check_query(pure_request(target="/?feed=x&_=1"), ("feed", "tail"))
        for query, words in (("fed=x", "did you mean 'feed'?"), ("zzz=1", "this resource takes feed, tail")):
            with self.assertRaises(gaffer.BadValue) as caught:
                gaffer.check_query(pure_request(target="/?" + query), ("feed", "tail"))
            self.assertIn(words, str(caught.exception))


class PureResponse(Case):

    def test_head(self):
        self.assertEqual(gaffer.encode_head(200, [("A", "b"), ("N", 5)]), b"HTTP/1.1 200 OK\r\nA: b\r\nN: 5\r\n\r\n")
        self.assertEqual(gaffer.encode_head(426, []), b"HTTP/1.1 426 Upgrade Required\r\n\r\n")
        self.assertTrue(gaffer.encode_head(299, []).startswith(b"HTTP/1.1 299 "))
        self.assertIn(b"X: \xe9\r\n", gaffer.encode_head(200, [("X", "\xe9")]))

    def test_no_splitting(self):
        for text in ("a\r\nSet-Cookie: x", "a\nb", "a\rb", "\r", "\n", "a\r\n b", "a\0", "\u20ac", "\u560d\u560a"):
            for header in ((text, "x"), ("x", text)):
                with self.subTest(header), self.assertRaises(ValueError):
                    gaffer.encode_head(200, [("A", "b"), header])

    def test_encode(self):
        response = gaffer.json_response({"a": "\xe9"}, 404, [("X", "y")])
        self.assertEqual(response.encode("now", True).split(b"\r\n\r\n")[1], b'{"a": "\\u00e9"}\n')
        head = response.encode("now", True, head_only=True)
        self.assertEqual(set(head.split(b"\r\n")), {b"HTTP/1.1 404 Not Found", b"Date: now",
                                                    b"Content-Type: application/json", b"X-Content-Type-Options: nosniff", b"X: y",
                                                    b"Content-Length: 16", b""})
        self.assertIn(b"\r\nConnection: close\r\n", response.encode("now", False))
        self.assertIn(b"\r\nZ: z\r\n", response.encode("now", True, more=[("Z", "z")]))

    def test_204(self):
        """RFC 9110 section 8.6: no Content-Length."""
        answer = gaffer.Response(b"x", status=204, content_type=None).encode("now", True)
        self.assertEqual(answer, b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n")

    def test_json_is_json(self):
        with self.assertRaises(ValueError):
            gaffer.json_bytes({"a": math.nan})

    def test_http_date(self):
        self.assertEqual(gaffer.http_date(784111777), "Sun, 06 Nov 1994 08:49:37 GMT")
        rng = random.Random(7)
        for _ in range(200):
            now = rng.randrange(4 * 10 ** 9)
            self.assertEqual(gaffer.http_date(now + 0.9), email.utils.formatdate(now, usegmt=True))

    def test_chunk(self):
        self.assertEqual(gaffer.chunk(b"x" * 26), b"1a\r\n" + b"x" * 26 + b"\r\n")

    def test_prefers_html(self):
        for accept, wanted in (
                ("", False), ("*/*", False), ("application/json", False), ("text/html", True), ("TEXT/HTML", True),
                ("text/*", True),
                ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", True),
                ("text/plain", False),
                ("text/html;q=0.5, application/json", False), ("text/html, application/json;q=0.9", True),
                ("text/html, application/json", False),
                ("text/html;q=0", False), ("text/html;q=x", False), ("text/html ; q=0.9 , application/* ; q=0.2", True),
                ("text/html;q=0.5, */*;q=0.8", False), ("application/*;q=0.3, text/html;q=0.2", False), (",", False),
                (";", False), ("text/html;level=1", True)):
            with self.subTest(accept):
                self.assertIs(bool(gaffer.prefers_html(accept)), wanted)


class PureRouter(Case):

    def test_find(self):
        router = gaffer.Router((
            ("/", {"GET": "root"}), ("/a", {"GET": "a", "POST": "a+"}), ("/a/<ref>", {"GET": "ref"}),
            ("/a/special", {"DELETE": "special"}),
            ("/a/<ref>/_do/<n>", {"POST": "do"}), ("/b/<pid>", {"GET": "pid"}), ("/b/<name>", {"PUT": "name"}),
            ("/open", {"GET": "open"}),
            ("/open/<rest...>", {"GET": "rest"})))
        for segments, methods, args in (
                ([], {"GET": "root", "HEAD": "root"}, []), (["a"], {"GET": "a", "HEAD": "a", "POST": "a+"}, []),
                (["a", "x"], {"GET": "ref", "HEAD": "ref"}, ["x"]), (["a", "special"], {"DELETE": "special"}, []),
                (["a", "x/y"], {"GET": "ref", "HEAD": "ref"}, ["x/y"]),
                (["a", "x", "_do", "5"], {"POST": "do"}, ["x", "5"]),
                (["b", "12"], {"GET": "pid", "HEAD": "pid"}, ["12"]), (["b", "x12"], {"PUT": "name"}, ["x12"]),
                (["open"], {"GET": "open", "HEAD": "open"}, []),
                (["open", "1", "2"], {"GET": "rest", "HEAD": "rest"}, [["1", "2"]]),
                (["x"], None, ()), (["a", "x", "_no", "5"], None, ()), (["a", "x", "_do"], None, ()), ([""], None, ()),
                (["A"], None, ())):
            with self.subTest(segments):
                found = router.find(segments)
                self.assertEqual((found[0], list(found[1])), (methods, list(args)))

    def test_allowed(self):
        self.assertEqual(list(gaffer.allowed({"POST": 1, "GET": 1, "HEAD": 1})), ["GET", "HEAD", "POST", "OPTIONS"])


class PureAccess(Case):

    def test_host(self):
        access = gaffer.Access(hosts=["Box.example.org.", "b"])
        forbidden, bad = gaffer.ForbiddenHost, gaffer.BadRequest
        table = {
            None: "localhost localhost:5000 localhost: LOCALHOST LocalHost:1 localhost. foo.localhost a.b.localhost:80 "
                  "127.0.0.1 127.0.0.1:80 10.1.2.3 255.255.255.255 [::1] [::1]:5000 [fe80::1] [::ffff:1.2.3.4] "
                  "box.example.org BOX.example.org.:80 b b:65535",
            forbidden: "example.com example.com:5000 0.0.0.0 0.0.0.0:5000 [::] [::]:80 [0:0:0:0:0:0:0:0] "
                       "[::ffff:0.0.0.0] localhost.example.com xlocalhost 2130706433 127.1 0x7f.0.0.1 0177.0.0.1 "
                       "127.0.0.1.example.com x.box.example.org example.org 127.0.0.1.. 127.0.0.01 1.2.3 localhost.. "
                       "%6cocalhost",
            bad: ":5000 a@b localhost:x localhost:99999 localhost:65536 localhost:-1 localhost:+1 [::1 ::1 [] "
                 "[1.2.3.4] [:::] [::1]x [::1]:x localhost:80:80 [fe80::1%25eth0] localhost/ http://localhost "
                 "localhost?x localhost#x \\ \"localhost\" <localhost> l\xf6calhost",
        }
        for error, hosts in table.items():
            for host in hosts.split():
                with self.subTest(host):
                    if error is None:
                        access.check_host(pure_request(host=host))
                    else:
                        with self.assertRaises(error):
                            access.check_host(pure_request(host=host))
        for host in ("", "local host", "localhost, evil.example", "localhost:" + "9" * 5000,
                     "localhost:" + "0" * 5000 + "1x"):
            with self.subTest(host[:20]), self.assertRaises(bad):
                access.check_host(pure_request(host=host))
        access.check_host(pure_request(host=None, version="1.0"))
        with self.assertRaises(forbidden):
            access.check_host(pure_request(host="localhost", target="http://evil.example/"))
        with self.assertRaises(forbidden) as caught:
            access.check_host(pure_request(host="e" * 60000))
        self.assertLess(len(str(caught.exception)), 300)

    def test_host_of_a_unix_socket(self):
        """No page can reach it, and clients send any name."""
        request = pure_request(host="unix")
        request.client = "unix"
        gaffer.Access().check_host(request)

    def origin(self, origin, access, host="box:5000", secure=False):
        """Whether this origin may change something; check_origin(), cors() and preflight() agree."""
        request = pure_request(*(["Origin: " + origin] if origin is not None else []), host=host)
        request.secure = secure
        allowed = access.allows_origin(request)
        if allowed:
            access.check_origin(request)
        else:
            with self.assertRaises(gaffer.ForbiddenOrigin):
                access.check_origin(request)
        cors = dict(access.cors(request))
        if origin is None:
            self.assertEqual(cors, {})
        elif allowed:
            self.assertEqual(cors["Access-Control-Allow-Origin"], origin)
            self.assertEqual(cors["Vary"], "Origin")
        else:
            self.assertEqual(cors, {"Vary": "Origin"})
            self.assertNotIn("Access-Control", str(access.preflight(request)))
        self.assertNotIn("Access-Control-Allow-Credentials", cors)
        return allowed

    def test_origin(self):
        plain, more = gaffer.Access(), gaffer.Access(origins=["https://App.example/", "http://two.example:8080"])
        for origin in (None, "http://localhost", "https://localhost", "http://localhost:3000", "http://127.0.0.1:1",
                       "http://[::1]:8080", "https://[::1]",
                       "HTTP://LocalHost:3000", "http://box:5000"):
            with self.subTest(origin):
                self.assertTrue(self.origin(origin, plain))
        for origin in ("null", "", "http://example.com", "http://box", "http://box:5001", "https://box", "ws://box:5000",
                       "http://localhost.example.com", "http://localhost/",
                       "http://localhost:3000/x", "http://xlocalhost",
                       "http://127.0.0.1.example.com", "http://127.0.0.2", "file://",
                       "ftp://localhost", "localhost", "http://localhost:80@evil.example",
                       "http://localhost:3000 http://evil.example", "http://localhost.",
                       "http://foo.localhost", "http://::1", "chrome-extension://abc", "https://app.example"):
            with self.subTest(origin):
                self.assertFalse(self.origin(origin, plain))
        for origin in ("https://app.example", "https://APP.example", "http://two.example:8080", "http://localhost:1"):
            with self.subTest(origin):
                self.assertTrue(self.origin(origin, more))
        for origin in ("http://app.example", "https://app.example:444", "http://two.example",
                       "https://app.example.evil"):
            with self.subTest(origin):
                self.assertFalse(self.origin(origin, more))

    def test_own_origin(self):
        """Default ports are filled in, and TLS may end at a proxy that passes the Host on, or not."""
        proxied = gaffer.Access(hosts=["gaffer.test"], origins=["https://x:443"])
        for host, origin, allowed in (
                ("box:5000", "https://box:5000", True), ("box", "http://box:80", True), ("box:80", "http://box", True),
                ("box", "https://box", True), ("box", "https://box:443", True), ("box:443", "https://box", True),
                ("box", "http://box:443", False), ("box:80", "https://box", False),
                ("gaffer.test:80", "http://gaffer.test", True), ("127.0.0.1:5000", "https://gaffer.test", True),
                ("127.0.0.1:5000", "http://gaffer.test:80", True), ("127.0.0.1:5000", "https://gaffer.test:8443", False),
                ("127.0.0.1:5000", "http://10.0.0.9", False), ("box", "https://x", True), ("box", "http://x:443", False),
                ("[::1]:5000", "https://[::1]:5000", True)):
            for secure in (False, True):
                with self.subTest(host=host, origin=origin, secure=secure):
                    self.assertEqual(self.origin(origin, proxied, host, secure), allowed)
        with self.assertRaises(gaffer.StartError):
            gaffer.Access(origins=["x"])

    def test_every_origin(self):
        access = gaffer.Access(origins=["*"])
        for origin in ("http://example.com", "null", "https://x:1"):
            self.assertTrue(self.origin(origin, access))

    def test_preflight(self):
        access = gaffer.Access()
        request = pure_request("Origin: http://localhost:3000", method="OPTIONS")
        headers = dict(access.cors(request) + access.preflight(request))
        self.assertEqual(headers["Access-Control-Allow-Origin"], "http://localhost:3000")
        self.assertEqual(headers["Access-Control-Allow-Methods"], "GET, HEAD, POST, PUT, DELETE, OPTIONS")
        self.assertEqual(headers["Access-Control-Allow-Headers"],
                         "X-Requested-With, X-HTTP-Method-Override, Content-Type, Accept, Authorization, Last-Event-ID")
        self.assertEqual(headers["Access-Control-Max-Age"], "86400")
        self.assertEqual(headers["Access-Control-Expose-Headers"], "Gaffer-Offset, Gaffer-Dropped, Gaffer-Ended")
        self.assertEqual(access.preflight(pure_request(method="OPTIONS")), [])

    def test_token(self):
        access = gaffer.Access(token="s\xe9cret:1")
        secret = "s\xe9cret:1".encode()

        def basic(data):
            return "Basic " + base64.b64encode(data).decode()
        for line in ("Bearer " + secret.decode("latin-1"), "bearer " + secret.decode("latin-1"),
                     "BEARER   " + secret.decode("latin-1"),
                     basic(b"user:" + secret), basic(b":" + secret), "basic" + basic(b"x:" + secret)[5:]):
            with self.subTest(line):
                access.check_token(pure_request("Authorization: " + line))
        for line in ("", "Bearer", "Bearer ", "Bearer x", "Bearer s\xe9cret:1", secret.decode("latin-1"),
                     "Token " + secret.decode("latin-1"),
                     "Bearer " + secret.decode("latin-1")[:-1], "Bearer " + secret.decode("latin-1") + "1",
                     basic(secret), basic(b"x"), basic(b""),
                     basic(b"user:"), basic(secret + b":"), "Basic !", "Basic \xe9", "Basic a",
                     "Basic " + base64.b64encode(b"x:" + secret).decode() + "!",
                     "Basic x:" + secret.decode("latin-1"), "Bearer" + secret.decode("latin-1")):
            with self.subTest(line), self.assertRaises(gaffer.Unauthorized):
                access.check_token(pure_request("Authorization: " + line))
        with self.assertRaises(gaffer.Unauthorized):
            access.check_token(pure_request())
        gaffer.Access().check_token(pure_request())

    def test_the_time_of_a_refusal_does_not_tell_how_much_of_the_token_was_right(self):
        access = gaffer.Access(token="secret")
        for given in "secret", "secres", "xecret", "secre", "":
            spy = unittest.mock.patch("hmac.compare_digest", side_effect=hmac.compare_digest)
            with spy as compare:
                with contextlib.suppress(gaffer.Unauthorized):
                    access.check_token(pure_request("Authorization: Bearer " + given))
            compare.assert_called_once_with(given.encode(), b"secret")
        with unittest.mock.patch("hmac.compare_digest", return_value=True):
            access.check_token(pure_request("Authorization: Bearer x"))
        with unittest.mock.patch("hmac.compare_digest", return_value=False):
            with self.assertRaises(gaffer.Unauthorized):
                access.check_token(pure_request("Authorization: Bearer secret"))

    def test_site(self):
        """What browsers say of a request that has no Origin."""
        access, everybody = gaffer.Access(), gaffer.Access(origins=["*"])
        embedded = ("GET", "cross-site", "no-cors", "image"), ("GET", "cross-site", "navigate", "iframe"), (
            "GET", "cross-site", "no-cors", "script"), ("GET", "cross-site", "no-cors", "empty"), (
            "HEAD", "cross-site", "no-cors", "empty"), ("POST", "cross-site", "navigate", "document")
        linked = ("GET", "cross-site", "navigate", "document"), ("GET", "same-origin", "no-cors", "image"), (
            "POST", "same-origin", "cors", "empty"), ("GET", "none", "navigate", "document"), ("GET", "same-site", "no-cors", "image")
        for given in embedded + linked:
            method, *rest = given
            lines = ["Sec-Fetch-%s: %s" % pair for pair in zip(("Site", "Mode", "Dest"), rest)]
            with self.subTest(given):
                if given in linked:
                    access.check_site(pure_request(*lines, method=method))
                else:
                    with self.assertRaises(gaffer.ForbiddenOrigin):
                        access.check_site(pure_request(*lines, method=method))
                everybody.check_site(pure_request(*lines, method=method))
                access.check_site(pure_request(*lines, "Origin: http://localhost:1", method=method))     # check_origin()'s matter
        access.check_site(pure_request())

    def test_empty_token_lets_nobody_in(self):
        """A library that passes an empty setting on must not stand open and believe that it is closed."""
        with self.assertRaises((gaffer.Unauthorized, ValueError, gaffer.StartError)):
            gaffer.Access(token="").check_token(pure_request())


# --------------------------------------------------------------------------------------------------------------------
# lines, characters, server-sent events
# --------------------------------------------------------------------------------------------------------------------
PURE_TEXT = ("abc", "\n", "\r", "\r\n", "\xe9", "\u20ac", "\U0001f600", " ", "\0", "\x0b", "\x0c", "\x1c", "\x85",
             "\u2028", "data: ", ":", "id: 5")


def pure_bytes(rng, count, broken=True):
    """Random bytes of a stream: text of all kinds, line ends of all kinds, and where `broken` what is not UTF-8."""
    pieces = [text.encode() for text in PURE_TEXT]
    if broken:
        pieces += [b"\x80", b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\xc0",
                   b"\xf5"]
    return b"".join(rng.choice(pieces) for _ in range(count))


def pure_lines(data):
    """[(offset behind it with its end, the line)] of bytes, by a plain scan. The last may have no end."""
    lines, begin, place = [], 0, 0
    while place < len(data):
        byte = data[place:place + 1]
        place += 1
        if byte in (b"\n", b"\r"):
            end = place - 1
            if byte == b"\r" and data[place:place + 1] == b"\n":
                place += 1
            lines.append((place, data[begin:end]))
            begin = place
    if begin < len(data):
        lines.append((place, data[begin:]))
    return lines


PROM_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
PROM_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'


def prom_parse(data):
    """{metric: (kind, {(sample, ((label, value), ...)): number})} of Prometheus's text format 0.0.4; an AssertionError tells
    where it is not exactly that, or breaks its conventions."""
    text = data.decode("utf-8")
    assert text.endswith("\n") and "\r" not in text
    found, name, help_ = {}, None, None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            help_, words = re.fullmatch(r"# HELP (%s) ([^\\]+)" % PROM_NAME, line).groups()
            assert help_ not in found and words.strip() == words, line
        elif line.startswith("# TYPE "):
            name, kind = re.fullmatch(r"# TYPE (%s) (counter|gauge|summary)" % PROM_NAME, line).groups()
            assert name == help_ and name not in found, line
            assert name.endswith("_total") == (kind == "counter"), line
            assert not re.search(r"_(ms|milliseconds|kb|kib|percent|count|sum|bucket)(_|$)", name), line
            found[name] = (kind, {})
        else:
            sample, _, inside, number = re.fullmatch(r"(%s)(\{(.*)\})? (\S+)" % PROM_NAME, line).groups()
            assert sample in ([name] if found[name][0] != "summary" else [name + "_sum", name + "_count"]), line
            assert re.fullmatch("(%s(,(?!$)|$))*" % PROM_LABEL, inside or ""), line
            labels = tuple((label, re.sub(r"\\(.)", lambda match: "\n" if match.group(1) == "n" else match.group(1), value))
                           for label, value in re.findall(PROM_LABEL, inside or ""))
            assert len(dict(labels)) == len(labels) and not any(label.startswith("__") for label, _ in labels), line
            assert re.fullmatch(r"\+Inf|[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?", number), line
            assert (sample, labels) not in found[name][1], line
            found[name][1][sample, labels] = float(number)
    return found


class PureMetrics(Case):
    def test_text(self):
        text = gaffer.metric_lines("a_total", "counter", "Some.", [({}, 3), ({"x": 'q"b\\s\nn', "y": "\u00e9"}, 0.5)])
        text += gaffer.metric_lines("none", "gauge", "None.", []) + gaffer.metric_lines("one", "gauge", "One.", 1)
        self.assertEqual(text, (
            '# HELP a_total Some.\n# TYPE a_total counter\na_total 3\na_total{x="q\\"b\\\\s\\nn",y="\u00e9"} 0.5\n'
            "# HELP none None.\n# TYPE none gauge\n# HELP one One.\n# TYPE one gauge\none 1\n"))
        found = prom_parse(text.encode())
        self.assertEqual(found["a_total"][1]["a_total", (("x", 'q"b\\s\nn'), ("y", "\u00e9"))], 0.5)

    def test_the_checker_finds_faults(self):
        good = '# HELP a A.\n# TYPE a gauge\na{x="1"} 1\n'
        prom_parse(good.encode())
        for old, new in (("1\n", "1"), ('"1"', '"1'), ('"1"', '"\\x"'), ('"1"', '"1",'), ('"1"', '"1",x="2"'), (" 1", " one"), (" 1", ""),
                         ("gauge", "guage"), ("gauge", "counter"), ("TYPE a", "TYPE b"), ('a{x="1"}', "b"), ("HELP a A", "HELP a"),
                         (" A.", " A.\\"), ("{x", "{1x"), ("{x", "{__x"), ("\n", "\r\n"), ('a{x="1"} 1\n', 'a 1\na 1\n'),
                         ("gauge\na", "summary\na")):
            with self.subTest(old=old, new=new), self.assertRaises((AssertionError, AttributeError)):
                prom_parse(good.replace(old, new).encode())

    def test_methods_that_nobody_knows_are_one(self):
        counts = gaffer.RequestCounts()
        for number in range(1000):
            counts.add("M%d" % number, 501)
        counts.add("GET", 200)
        self.assertEqual(counts.samples(), [({"method": "other", "code": 501}, 1000), ({"method": "GET", "code": 200}, 1)])

    def test_turns_of_the_loop_are_counted(self):
        clock = PureClock()
        loop = gaffer.Loop(clock)
        self.addCleanup(loop.close)
        for length in (0.0, 0.0005, 0.002, 0.5, 70.0):
            loop.call_soon(lambda length=length: setattr(clock, "now", clock.now + length))
            loop.step()
        self.assertEqual(loop.turns, 5)
        self.assertAlmostEqual(loop.busy, 70.5025)


ACCESS = re.compile(r'(\S+) - - \[(\d\d/[A-Z][a-z][a-z]/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "([^"\\]*(?:\\x[0-9a-f]{2}[^"\\]*)*)" '
                    r'(\d{3}) (\d+|-) "([^"\\]*(?:\\x[0-9a-f]{2}[^"\\]*)*)" "([^"\\]*(?:\\x[0-9a-f]{2}[^"\\]*)*)"\n')


def access_lines(text):
    """[(client, time, request, status, size, referer, agent)] of an access log, of which every byte is such a line."""
    found = [match.groups() for match in ACCESS.finditer(text)]
    assert "".join(match.group() for match in ACCESS.finditer(text)) == text, text
    return [(*fields[:3], int(fields[3]), 0 if fields[4] == "-" else int(fields[4]), *fields[5:]) for fields in found]


class PureAccessLine(Case):
    def line(self, target="/x", client="127.0.0.1:5", secrets=(), **headers):
        request = gaffer.Request("GET", target, (1, 1), {name.replace("_", "-"): value for name, value in headers.items()})
        text = gaffer.access_line(client, "01/Jan/2030:00:00:00 +0000", request, 200, 12, secrets)
        self.assertNotIn("\n", text)
        return access_lines(text + "\n")[0]

    def test_fields(self):
        self.assertEqual(self.line(referer="http://r/", user_agent="curl/8"), (
            "127.0.0.1", "01/Jan/2030:00:00:00 +0000", "GET /x HTTP/1.1", 200, 12, "http://r/", "curl/8"))
        self.assertEqual(self.line()[5:], ("-", "-"))
        self.assertEqual((self.line(client="::1:5")[0], self.line(client="unix")[0]), ("::1", "unix"))
        self.assertEqual(gaffer.access_line("1.2.3.4:5", "t", None, 400, 0), '1.2.3.4 - - [t] "-" 400 - "-" "-"')

    def test_what_a_client_sent_is_escaped(self):
        evil = 'a"b\\c\r\nd\x1b[31m\x00\x7f\x80\xff\t" 200 5 "'
        fields = self.line('/"' + evil, referer=evil, user_agent=evil)
        for field in (fields[2], *fields[5:]):
            self.assertEqual(re.sub(r"\\x(..)", lambda match: chr(int(match.group(1), 16)), field).count(evil), 1)
        self.assertEqual(len(self.line(user_agent="x" * 60000)[6]), gaffer.ACCESS_FIELD_SIZE)

    def test_a_secret_is_never_in_it(self):
        line = self.line("/?token=s3cret&x=s%20t", referer="http://u:s3cret@h/", user_agent="s3crets3cret", secrets=("s3cret", "s%20t"))
        self.assertEqual((line[2], line[5], line[6]), ("GET /?token=***&x=*** HTTP/1.1", "http://u:***@h/", "******"))

    def test_time(self):
        for zone, expected in (("UTC0", "+0000"), ("XXX-5:30", "+0530"), ("YYY3:30", "-0330")):
            try:
                os.environ["TZ"] = zone
                time.tzset()
                text = gaffer.log_time(1893456000)
                self.assertTrue(text.endswith(" " + expected), text)
                self.assertEqual(time.mktime(time.strptime(text[:-6], "%d/%b/%Y:%H:%M:%S")), 1893456000)
            finally:
                del os.environ["TZ"]
                time.tzset()


class PurePage(Case):
    """The text of the web page."""

    @staticmethod
    def luminance(colour):
        """Relative luminance of "#rrggbb" (WCAG 2.2)."""
        parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(self, one, other):
        """From 1 to 21."""
        dark, light = sorted((self.luminance(one), self.luminance(other)))
        return (light + 0.05) / (dark + 0.05)

    def test_its_size(self):
        self.assertLess(len(gaffer.PAGE.encode("utf-8")), 60 * 1024)

    def test_it_makes_no_html_of_text_and_asks_nobody_else(self):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "cookie", "localStorage",
                     "sessionStorage", ' style="', "importScripts", "XMLHttpRequest"):
            self.assertNotIn(word, gaffer.PAGE)
        self.assertIsNone(re.search(r"<[^>]*\son\w+\s*=", gaffer.PAGE), "an inline handler")
        self.assertEqual(set(re.findall(r"https?://[^\"]*", gaffer.PAGE)), {"http://www.w3.org/"})     # the names of namespaces
        self.assertEqual(re.findall(r'(?:src|href)="([^"]*)"', gaffer.PAGE.partition("<script")[0]), ["data:,"])

    def test_contrasts(self):
        """AA of WCAG 2.2: 4.5 for text, 3 for the edges of what can be used; in light and in dark."""
        light, dark = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in gaffer.PAGE.split("@media (prefers-color-scheme: dark)")[:2]]
        self.assertEqual(set(light), set(dark))
        for scheme in light, dark:
            for text in ("text", "dim", "accent", "good", "warn", "bad", *("c%d" % number for number in range(8))):
                for ground in ("bg", "panel"):
                    self.assertGreaterEqual(self.contrast(scheme[text], scheme[ground]), 4.5, (text, ground, scheme))
            for ground in ("bg", "panel"):
                self.assertGreaterEqual(self.contrast(scheme["edge"], scheme[ground]), 3, scheme)
            for ground in ("mark", "here"):
                self.assertGreaterEqual(self.contrast(scheme["marked"], scheme[ground]), 4.5, (ground, scheme))

    def test_a_snapshot_cannot_leave_its_element(self):
        response = gaffer.page_response({"name": "</script><script>alert(1)</script>__NONCE__<!--"})
        page, headers = response.body.decode("utf-8"), dict(response.headers)
        nonce = re.search("'nonce-([^']+)'", headers["Content-Security-Policy"]).group(1)
        self.assertEqual(page.count("<script"), 2)
        self.assertEqual(page.count('nonce="%s"' % nonce), 2)
        data = re.search('<script type="application/json" id="snapshot">(.*?)</script>', page).group(1)
        self.assertEqual(json.loads(data), {"name": "</script><script>alert(1)</script>__NONCE__<!--"})
        self.assertNotEqual(gaffer.page_response({}).headers, response.headers)

    def test_gzip_only_where_it_is_wanted(self):
        for offer, wanted in (("gzip", True), ("deflate, gzip;q=0.5, br", True), ("GZIP", True), ("gzip;q=1.0", True), ("gzip;q=0", False), ("", False),
                              ("gzip;q=0.000, br", False), ("br", False), ("x-gzip-not", False), ("gzip ; q=0.001", True)):
            request = gaffer.Request("GET", "/", (1, 1), {"accept-encoding": offer})
            made = gaffer.compressed(request, gaffer.Response(b"long " * 1000))
            self.assertEqual(dict(made.headers).get("Content-Encoding"), "gzip" if wanted else None, offer)
            self.assertEqual(zlib.decompress(made.body, 31) if wanted else made.body, b"long " * 1000)
        self.assertEqual(gaffer.compressed(request, gaffer.Response(b"short")).body, b"short")


class PureUtf8(Case):

    BYTES = bytes((0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE2, 0xED, 0xEF,
                   0xF0, 0xF1, 0xF4, 0xF5, 0xFF))

    def test_incomplete(self):
        """Against its definition, at every end of four bytes."""
        # the low six bits are in the last byte alone; that a surrogate is none shows there, too
        whole = [chr(point).encode("utf-8", "surrogatepass") for point in range(0x80, 0x110000, 64)]
        begins = {data[:size] for data in whole for size in range(1, len(data))}
        self.assertEqual(gaffer.incomplete_utf8(b""), 0)
        for size in (1, 2, 3, 4):
            for values in itertools.product(self.BYTES if size < 4 else self.BYTES[2::3], repeat=size):
                data = bytes(values)
                found = max((count for count in (1, 2, 3) if count <= size and data[-count:] in begins), default=0)
                self.assertEqual(gaffer.incomplete_utf8(data), found, data)

    def test_each_character_cut_at_each_place(self):
        for text in ("\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"):
            data = text.encode()
            for size in range(1, len(data) + 1):
                self.assertEqual(gaffer.incomplete_utf8(b"x" + data[:size]), size % len(data), (text, size))

    def test_valid(self):
        rng = random.Random(8)
        for _ in range(300):
            data = pure_bytes(rng, 10)
            self.assertEqual(gaffer.valid_utf8(data), data.decode("utf-8", "replace").encode())
        text = b"plain"
        self.assertIs(gaffer.valid_utf8(text), text)

    def test_split_lines(self):
        normal, flush, final = gaffer.NORMAL, gaffer.FLUSH, gaffer.FINAL
        for data, before, mode, wanted in (
                (b"", None, normal, (0, [], [])), (b"a", None, normal, (0, [], [])),
                (b"a", None, flush, (0, [b"a"], [b"a"])),
                (b"a\nb", None, normal, (0, [b"a\n"], [b"a"])),
                (b"a\nb", None, final, (0, [b"a\n", b"b"], [b"a", b"b"])),
                (b"\n", None, normal, (0, [b"\n"], [b""])), (b"\n", 10, normal, (0, [b"\n"], [b""])),
                (b"\n", 13, normal, (1, [], [])),
                (b"\n\n", 13, normal, (1, [b"\n"], [b""])), (b"\r\n", 13, normal, (0, [b"\r\n"], [b""])),
                (b"a\r", None, normal, (0, [b"a\r"], [b"a"])),
                (b"\na", 13, final, (1, [b"a"], [b"a"])), (b"\n\xc3", 13, flush, (1, [], [])),
                (b"a\xe2\x82", None, flush, (0, [b"a"], [b"a"])),
                (b"a\xe2\x82", None, final, (0, [b"a\xe2\x82"], [b"a\xe2\x82"])),
                (b"12345678", None, normal, (0, [b"12345678"], [b"12345678"])),
                (b"1234567", None, normal, (0, [], [])),
                (b"1234567\xc3", None, normal, (0, [b"1234567"], [b"1234567"])),
                (b"a\x0bb\x0c\x1c\x85\n", None, normal, (0, [b"a\x0bb\x0c\x1c\x85\n"], [b"a\x0bb\x0c\x1c\x85"]))):
            with self.subTest(data=data, before=before, mode=mode):
                self.assertEqual(gaffer.split_lines(data, before, mode, 8), wanted)


class PureSse(Case):

    def encode(self, data, ends, mode=None, piece=1 << 20):
        """What an SseEncoder makes of bytes that come up to each of `ends` in turn. mode: chooses one, for each."""
        encoder, place, out = gaffer.SseEncoder("out", "e"), 0, []
        for end in ends:
            before = data[place - 1] if place else None
            now = gaffer.FINAL if end is None else mode() if mode else gaffer.NORMAL
            payload, consumed = encoder.encode(data[place:end], place, before, now, piece)
            out.append(payload)
            place += consumed
        return pure_sse(b"".join(out)), place

    def test_format(self):
        encoder = gaffer.SseEncoder("stdout", "e1")
        self.assertEqual(encoder.encode(b"one\ntwo\r\n\nrest", 100, None, gaffer.NORMAL, 1000),
                         (b"id: 104@e1\nevent: stdout\ndata: one\n\nid: 109@e1\nevent: stdout\ndata: two\n\n"
                          b"id: 110@e1\nevent: stdout\ndata: \n\n", 10))
        self.assertEqual(encoder.dropped(5, 7), b'id: 7@e1\nevent: dropped\ndata: {"bytes": 5}\n\n')
        self.assertEqual(encoder.dropped(0, 7, True),
                         b'id: 7@e1\nevent: dropped\ndata: {"bytes": 0, "restarted": true}\n\n')
        self.assertEqual(encoder.exit(7, {"pid": 1}), b'id: 7x@e1\nevent: exit\ndata: {"pid": 1}\n\n')
        self.assertEqual(encoder.encode(b"", 5, None, gaffer.NORMAL, 1000), (b"", 0))
        self.assertEqual(encoder.encode(b"", 5, None, gaffer.FINAL, 1000), (b"", 0))

    def test_keys(self):
        """Encoders share their work where they do the same."""
        self.assertEqual(gaffer.SseEncoder("a", "e").key, gaffer.SseEncoder("a", "e").key)
        keys = [gaffer.SseEncoder("a", "e").key, gaffer.SseEncoder("b", "e").key, gaffer.ChunkEncoder.key,
                gaffer.Encoder.key,
                *(gaffer.FrameEncoder(*kind).key for kind in itertools.product((False, True), repeat=2))]
        self.assertEqual(len(set(keys)), len(keys))

    def test_whole_against_a_model(self):
        rng = random.Random(9)
        for _ in range(300):
            data = pure_bytes(rng, rng.randrange(40))
            events, place = self.encode(data, [len(data), None])
            self.assertEqual(events, [(end, "out", line.decode("utf-8", "replace").encode()) for end,
                                      line in pure_lines(data)])
            self.assertEqual(place, len(data))

    def test_the_same_events_however_it_comes(self):
        """Only an id may stand between CR and LF, where the CR came alone; a resume there skips the LF."""
        rng = random.Random(10)
        for _ in range(400):
            data = pure_bytes(rng, rng.randrange(40))
            ends = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 12)))
            events, place = self.encode(data, ends + [None])
            model = [(end, "out", line.decode("utf-8", "replace").encode()) for end, line in pure_lines(data)]
            self.assertEqual([event[1:] for event in events], [event[1:] for event in model], (data, ends))
            for (number, _, _), (wanted, _, _) in zip(events, model):
                if number != wanted:
                    self.assertEqual((number, data[number - 1:wanted]), (wanted - 1, b"\r\n"))
            self.assertEqual(place, len(data))

    def test_at_each_split(self):
        data = "a\r\n\r\r\n\n\xe9\u20ac\r\n\rend".encode()
        wanted = [line.decode().encode() for _, line in pure_lines(data)]
        for pieces in pure_drip(data):
            ends = list(itertools.accumulate(map(len, pieces)))
            self.assertEqual([line for _, _, line in self.encode(data, ends + [None])[0]], wanted)

    def test_flush_cuts_no_character_and_loses_no_byte(self):
        """Whatever is shown early: the ids tell the bytes, each of which is in one event."""
        rng = random.Random(11)
        for round_ in range(400):
            broken = round_ % 2 == 0
            data = pure_bytes(rng, rng.randrange(40), broken)
            ends = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 12)))
            events, place = self.encode(data, ends + [None], lambda: rng.choice((gaffer.NORMAL, gaffer.FLUSH)))
            self.assertEqual(place, len(data))
            begin = 0
            for number, _, line in events:
                segment = data[begin:number]
                if begin and data[begin - 1:begin] == b"\r" and segment[:1] == b"\n":
                    segment = segment[1:]
                self.assertEqual(re.sub(rb"(\r\n|\r|\n)\Z", b"", segment).decode("utf-8", "replace").encode(), line,
                                 (data, ends))
                if not broken:
                    self.assertNotIn("\ufffd".encode(), line)
                begin = number
            self.assertIn(data[begin:], (b"", b"\n"))

    def test_pieces_of_a_long_line(self):
        """A line as long as `piece` is cut, at a whole character."""
        rng = random.Random(12)
        for _ in range(100):
            text = "".join(rng.choice("a\xe9\u20ac\U0001f600") for _ in range(200))
            data = text.encode() + b"\n"
            ends = sorted(rng.randrange(len(data) + 1) for _ in range(20)) + [None]
            events, place = self.encode(data, ends, piece=64)
            lines = [line.decode() for _, _, line in events]
            self.assertEqual("".join(lines), text)
            self.assertEqual(place, len(data))

    def test_a_long_rest_behind_a_line(self):
        for line in (b"a\n", b"a\r\n", "\xe9\n".encode()):
            data = line + b"x" * 64
            self.assertEqual(self.encode(data, [len(data)], piece=64)[1], len(data))
            self.assertEqual(self.encode(data[:-1], [len(data) - 1], piece=64)[1], len(line))

    def test_half_a_character_is_kept_by_a_flush(self):
        self.assertEqual(self.encode(b"a\xe2\x82", [3], lambda: gaffer.FLUSH), ([(1, "out", b"a")], 1))
        self.assertEqual(self.encode(b"\xe2\x82", [2], lambda: gaffer.FLUSH), ([], 0))


# --------------------------------------------------------------------------------------------------------------------
# websocket codec
# --------------------------------------------------------------------------------------------------------------------
class PureWebSocket(Case):

    frame = staticmethod(WebSocket.encode)

    def feed(self, pieces, limit=1000):
        """The events of bytes that come in pieces."""
        decoder = gaffer.WebSocketDecoder(limit)
        return [event for piece in pieces for event in decoder.feed(piece)]

    def test_accept(self):
        """The example of RFC 6455 section 1.3."""
        lines = ["Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Version: 13",
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        headers = dict(gaffer.websocket_accept(pure_request(*lines)))
        self.assertEqual(headers, {"Upgrade": "websocket", "Connection": "Upgrade",
                                   "Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="})
        lists = ["Upgrade: h2c, WebSocket", "Connection: UPGRADE"]
        self.assertTrue(gaffer.websocket_accept(pure_request(*lists, *lines[2:])))
        bad, upgrade = gaffer.BadRequest, gaffer.UpgradeRequired
        for number, line, error in (
                (0, "Upgrade: h2c", upgrade), (0, "X: y", upgrade), (0, "Upgrade: websockets", upgrade),
                (1, "Connection: close", upgrade),
                (1, "X: y", upgrade), (2, "Sec-WebSocket-Version: 8", upgrade), (2, "X: y", upgrade),
                (2, "Sec-WebSocket-Version: 13, 8", upgrade),
                (3, "X: y", bad), (3, "Sec-WebSocket-Key: ", bad), (3, "Sec-WebSocket-Key: x", bad),
                (3, "Sec-WebSocket-Key: dGhl", bad),
                (3, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ", bad),
                (3, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==!", bad),
                (3, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZTEyMw==", bad), (3, "Sec-WebSocket-Key: \xe9", bad)):
            with self.subTest(line), self.assertRaises(error):
                gaffer.websocket_accept(pure_request(*lines[:number], line, *lines[number + 1:]))
        for options in ({"method": "POST"}, {"version": "1.0"}):
            with self.subTest(options), self.assertRaises(bad):
                gaffer.websocket_accept(pure_request(*lines, **options))

    def test_unmask(self):
        rng = random.Random(13)
        for size in (*range(20), 1000, 1001, 65537):
            data = bytes(rng.randrange(256) for _ in range(size))
            key = bytes(rng.randrange(256) for _ in range(4))
            position = rng.randrange(100)
            self.assertEqual(gaffer.unmask(data, key, position),
                             bytes(byte ^ key[(position + i) % 4] for i, byte in enumerate(data)))

    def test_frame(self):
        for size, head in ((0, b"\x82\x00"), (1, b"\x82\x01"), (125, b"\x82\x7d"), (126, b"\x82\x7e\x00\x7e"),
                           (65535, b"\x82\x7e\xff\xff"),
                           (65536, b"\x82\x7f\0\0\0\0\0\x01\0\0")):
            with self.subTest(size):
                self.assertEqual(gaffer.frame(2, b"x" * size), head + b"x" * size)

    def test_close_frame(self):
        self.assertEqual(gaffer.close_frame(1000), b"\x88\x02\x03\xe8")
        self.assertEqual(gaffer.close_frame(1013, "dropped 5"), b"\x88\x0b\x03\xf5dropped 5")
        for text in ("x" * 200, "\xe9" * 200, "x" + "\u20ac" * 200, "xy" + "\U0001f600" * 200):
            made = gaffer.close_frame(1000, text)
            self.assertEqual(made[1], len(made) - 2)
            self.assertLessEqual(made[1], 125)
            self.assertGreater(made[1], 121)
            self.assertTrue(text.startswith(made[4:].decode("utf-8")))

    def test_messages(self):
        text = "caf\xe9 \u20ac\U0001f600"
        wire = self.frame(1, text.encode()) + self.frame(2, bytes(range(256))) + self.frame(1, b"") + self.frame(2, b"")
        wire += self.frame(9, b"ping") + self.frame(10, b"") + self.frame(9, b"x" * 125)
        wire += self.frame(8, struct.pack("!H", 1000) + "bye \xe9".encode())
        wanted = [("text", text), ("binary", bytes(range(256))), ("text", ""), ("binary", b""), ("ping", b"ping"),
                  ("pong", b""), ("ping", b"x" * 125), ("close", 1000, "bye \xe9")]
        for pieces in pure_drip(wire):
            self.assertEqual(self.feed(pieces), wanted)

    def test_fragments(self):
        """Of text cut inside characters, with control frames between."""
        data = "a\xe9\u20ac\U0001f600z".encode()
        wire = self.frame(1, data[:2], False) + self.frame(9, b"p") + self.frame(0, b"", False)
        wire += self.frame(0, data[2:5], False)
        wire += self.frame(10, b"q") + self.frame(0, data[5:8], False) + self.frame(0, data[8:])
        wire += self.frame(2, b"", False) + self.frame(0, b"\xff\x00", False) + self.frame(0, b"")
        wanted = [("ping", b"p"), ("pong", b"q"), ("text", data.decode()), ("binary", b"\xff\x00")]
        for pieces in pure_drip(wire):
            self.assertEqual(self.feed(pieces), wanted)

    def test_large(self):
        data = os.urandom(70000)
        wire = self.frame(2, data) + self.frame(1, b"x" * 126)
        wire += self.frame(2, data[:65535], False) + self.frame(0, data[:300])
        wanted = [("binary", data), ("text", "x" * 126), ("binary", data[:65535] + data[:300])]
        rng = random.Random(14)
        self.assertEqual(self.feed([wire], 100000), wanted)
        for _ in range(5):
            self.assertEqual(self.feed(pure_pieces(rng, wire, 5000), 100000), wanted)

    def test_random(self):
        rng = random.Random(15)
        for _ in range(100):
            wire, wanted = b"", []
            for _ in range(rng.randrange(1, 6)):
                text = pure_bytes(rng, rng.randrange(30), False)
                opcode, pieces = rng.choice((1, 2)), list(pure_pieces(rng, text, 20)) or [b""]
                for number, piece in enumerate(pieces):
                    wire += self.frame(0 if number else opcode, piece, number == len(pieces) - 1,
                                       bytes(rng.randrange(256) for _ in range(4)))
                    if rng.random() < 0.2 and number < len(pieces) - 1:
                        wire += self.frame(9, b"!")
                        wanted.append(("ping", b"!"))
                wanted.append(("text", text.decode()) if opcode == 1 else ("binary", text))
            self.assertEqual(self.feed(pure_pieces(rng, wire, 50)), wanted)

    def test_errors(self):
        """Each with its close code, however it comes; nothing that follows counts."""
        good, mask = self.frame(1, b"never"), b"\0\0\0\0"
        for name, wire, code in (
                ("RSV1", b"\xc1\x80" + mask, 1002), ("RSV2", b"\xa1\x80" + mask, 1002),
                ("RSV3", b"\x91\x80" + mask, 1002),
                *(("opcode %d" % opcode, self.frame(opcode, b""), 1002)
                  for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
                ("unmasked", b"\x81\x01x", 1002), ("unmasked close", b"\x88\x00", 1002),
                ("unmasked empty", b"\x81\x00", 1002),
                ("long ping", self.frame(9, b"x" * 126), 1002), ("fragmented ping", self.frame(9, b"x", False), 1002),
                ("fragmented close", self.frame(8, b"", False), 1002),
                ("long close", self.frame(8, b"\x03\xe8" + b"x" * 124), 1002),
                ("continuation of nothing", self.frame(0, b"x"), 1002),
                ("unfinished continuation of nothing", self.frame(0, b"x", False), 1002),
                ("continuation after the end", self.frame(1, b"", False) + self.frame(0, b"") + self.frame(0, b""),
                 None),
                ("text within text", self.frame(1, b"a", False) + self.frame(1, b"b"), 1002),
                ("binary within text", self.frame(1, b"a", False) + self.frame(2, b"b"), 1002),
                ("16 bit for 125", b"\x82\xfe\x00\x7d" + mask, 1002),
                ("64 bit for 65535", b"\x82\xff" + struct.pack("!Q", 65535) + mask, 1002),
                ("64 bit for 5", b"\x82\xff" + struct.pack("!Q", 5) + mask, 1002),
                ("the highest bit", b"\x82\xff" + struct.pack("!Q", 1 << 63) + mask, 1002),
                ("too large", self.frame(2, b"x" * 1001), 1009),
                ("too large a head", b"\x82\xff" + struct.pack("!Q", (1 << 63) - 1) + mask, 1009),
                ("too large in fragments", self.frame(2, b"x" * 600, False) + self.frame(0, b"x" * 401), 1009),
                ("not UTF-8", self.frame(1, b"a\xffb"), 1007), ("cut character", self.frame(1, b"a\xe2\x82"), 1007),
                ("overlong", self.frame(1, b"\xc0\xaf"), 1007),
                ("overlong of three", self.frame(1, b"\xe0\x80\xaf"), 1007),
                ("surrogate", self.frame(1, b"\xed\xa0\x80"), 1007),
                ("above", self.frame(1, b"\xf4\x90\x80\x80"), 1007),
                ("cut character at the end of fragments", self.frame(1, b"\xe2", False) + self.frame(0, b"\x82"), 1007),
                ("close with one byte", self.frame(8, b"\x03"), 1002),
                ("close reason not UTF-8", self.frame(8, b"\x03\xe8\xff"), 1007),
                *(("close code %d" % number, self.frame(8, struct.pack("!H", number)), 1002)
                  for number in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535))):
            ways = pure_drip(wire + good) if len(wire) < 40 else itertools.islice(pure_drip(wire + good), 2)
            for pieces in ways:
                with self.subTest(name, pieces=len(pieces)):
                    events = self.feed(pieces)
                    fails = [event for event in events if event[0] == "fail"]
                    self.assertEqual([event[1] for event in fails], [code or 1002])
                    self.assertEqual(events[-1], fails[0])
                    self.assertTrue(fails[0][2])

    def test_close_codes(self):
        for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999):
            with self.subTest(code):
                self.assertEqual(self.feed([self.frame(8, struct.pack("!H", code)) + self.frame(9, b"")]),
                                 [("close", code, "")])
        self.assertEqual(self.feed([self.frame(8, b"") + self.frame(1, b"x")]), [("close", 1005, "")])
        self.assertEqual(self.feed([self.frame(8, b"\x03\xe8" + b"x" * 123)]), [("close", 1000, "x" * 123)])

    def test_limit(self):
        """It is reached by what is allowed, and refused from the head on; each message counts for itself."""
        self.assertEqual(self.feed([self.frame(2, b"x" * 1000)] * 3), [("binary", b"x" * 1000)] * 3)
        self.assertEqual(self.feed([self.frame(2, b"x" * 600, False), self.frame(9, b"y" * 125),
                                    self.frame(0, b"x" * 400)]),
                         [("ping", b"y" * 125), ("binary", b"x" * 1000)])
        self.assertEqual(self.feed([self.frame(2, b"x" * 1001)[:8]])[0][:2], ("fail", 1009))

    def test_utf8_fails_fast(self):
        """At the first byte after which no text can be valid, though frame and message go on (section 8.1)."""
        rng = random.Random(16)
        for tail in [b"\xe2\xc0", b"\xf0\xc1", b"\xe2\x82\xc0", b"\xe0\x9f", b"\xed\xa0", b"\xf0\x8f", b"\xf4\x90",
                     b"\xf5", b"\xc0", b"\x80", b"\xc3\x28",
                     b"\xf1\x80\x80\xc0", b"\xe1\x80\xe1", *(pure_bytes(rng, 8) for _ in range(100))]:
            data = b"ok \xe2\x82\xac" + tail
            fails = next((number for number in range(len(data)) if not self.can_become_text(data[:number + 1])), None)
            wire = self.frame(1, data + b"x" * 10, False)[:6 + len(data)]
            decoder, failed = gaffer.WebSocketDecoder(1000), None
            self.assertEqual(list(decoder.feed(wire[:6])), [])
            for number in range(len(data)):
                if list(decoder.feed(wire[6 + number:7 + number])):
                    failed = number
                    break
            self.assertEqual(failed, fails, data)

    @staticmethod
    def can_become_text(data):
        """True where some bytes behind `data` make UTF-8 of it, or a surrogate, which fails at its third: tried out."""
        for size in range(4):
            for end in itertools.product(b"\x80\x90\xa0\xbf", repeat=size):
                with contextlib.suppress(UnicodeDecodeError):
                    (data + bytes(end)).decode("utf-8", "surrogatepass" if size else "strict")
                    return True
        return False

    def test_small_fragments_cost_no_more_than_their_bytes(self):
        """A message that grows by nothing must not grow in memory, and one that grows by two bytes not by sixty."""
        for opcode in (1, 2):
            for piece, count in ((b"", 4000), (b"ab", 4000)):
                decoder, wire = gaffer.WebSocketDecoder(100000), self.frame(0, piece, False) * 100
                tracemalloc.start()
                self.assertEqual(list(decoder.feed(self.frame(opcode, b"", False))), [])
                for _ in range(count // 100):
                    self.assertEqual(list(decoder.feed(wire)), [])
                size = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()
                self.assertLess(size, 2 * len(piece) * count + 10000)
                whole = piece * count + b"cd"
                self.assertEqual(list(decoder.feed(self.frame(0, b"cd"))), [("text", whole.decode()) if opcode == 1 else ("binary", whole)])

    def test_many_frames_come_in_portions(self):
        """They cost more than their few bytes, and one that floods must not keep the others waiting."""
        most = gaffer.FRAMES_PER_TURN
        for kind, wire in ("ping", self.frame(9, b"")), ("text", self.frame(1, b"")), (None, self.frame(0, b"", False)):
            decoder = gaffer.WebSocketDecoder(100)
            events = list(decoder.feed((self.frame(1, b"", False) if kind is None else b"") + wire * (2 * most + 3)))
            counts, more = [len(events)], [decoder.more]
            while decoder.more:
                counts.append(len(list(decoder.feed(b""))))
                more.append(decoder.more)
            self.assertEqual((sum(counts), max(counts)), (2 * most + 3, most) if kind else (0, 0))
            self.assertEqual(more, [True, True, False])

    def test_events_wait_until_they_are_asked_for(self):
        """Who has enough stops, and goes on with the next feed."""
        wire = b"".join(self.frame(2, b"%d" % number) for number in range(5)) + self.frame(8, b"")
        decoder, got = gaffer.WebSocketDecoder(100), []
        for piece in (wire[:30], b"", wire[30:], b"", b"", b""):
            got.append(next(decoder.feed(piece), None))
        self.assertEqual(got, [("binary", b"%d" % number) for number in range(5)] + [("close", 1005, "")])
        self.assertEqual(list(decoder.feed(wire)), [])

    def test_frame_encoder_of_bytes(self):
        binary, text = gaffer.FrameEncoder(True, False), gaffer.FrameEncoder(False, False)
        self.assertEqual(binary.encode(b"a\xff\n", 0, None, gaffer.NORMAL, 1000), (b"\x82\x03a\xff\n", 3))
        self.assertEqual(text.encode(b"a\xff\n", 0, None, gaffer.NORMAL, 1000), (b"\x81\x05a\xef\xbf\xbd\n", 3))
        self.assertEqual(text.encode(b"a\xe2\x82", 0, None, gaffer.NORMAL, 1000), (b"\x81\x01a", 1))
        self.assertEqual(text.encode(b"\xe2\x82", 0, None, gaffer.NORMAL, 1000), (b"", 0))
        self.assertEqual(text.encode(b"\xe2\x82", 0, None, gaffer.FINAL, 1000), (b"\x81\x03\xef\xbf\xbd", 2))
        for encoder in (binary, text):
            self.assertEqual(encoder.encode(b"", 0, None, gaffer.FINAL, 1000), (b"", 0))

    def test_frame_encoder_of_lines(self):
        binary, text = gaffer.FrameEncoder(True, True), gaffer.FrameEncoder(False, True)
        self.assertEqual(text.encode(b"a\nb\r\n\rc", 0, None, gaffer.NORMAL, 1000), (b"\x81\x01a\x81\x01b\x81\x00", 6))
        self.assertEqual(text.encode(b"\na\xff\n", 0, 13, gaffer.NORMAL, 1000), (b"\x81\x04a\xef\xbf\xbd", 4))
        self.assertEqual(binary.encode(b"\xff\nc", 0, None, gaffer.FINAL, 1000), (b"\x82\x01\xff\x82\x01c", 3))
        self.assertEqual(binary.encode(b"half", 0, None, gaffer.NORMAL, 1000), (b"", 0))

    def test_text_is_the_same_however_it_comes(self):
        """UTF-8 across message borders."""
        rng = random.Random(17)
        for _ in range(300):
            data, place, got = pure_bytes(rng, 20), 0, b""
            encoder = gaffer.FrameEncoder(False, False)
            for end in sorted(rng.randrange(len(data) + 1) for _ in range(6)) + [None]:
                mode = gaffer.FINAL if end is None else gaffer.NORMAL
                payload, consumed = encoder.encode(data[place:end], place, None, mode, 1000)
                place += consumed
                if payload:
                    start = 2 if payload[1] < 126 else 4
                    got += payload[start:]
                    payload[start:].decode("utf-8")
            self.assertEqual((got, place), (data.decode("utf-8", "replace").encode(), len(data)))


# --------------------------------------------------------------------------------------------------------------------
# pure: fuzzing
#
# Random bytes, and valid requests and frames that were spoiled, go whole, byte by byte and in random pieces into the codecs:
# all three must come to the same. python3 test_gaffer.py --fuzz N runs N cases of each kind under a new seed; a case that
# fails prints what repeats it.
# --------------------------------------------------------------------------------------------------------------------
FUZZ_TOKENS = [token.encode("latin-1") for token in (
    "\r\n", "\r", "\n", "\0", " ", "\t", ":", ";", ",", "\r\n\r\n", "\r\n ", "%", "%00", "%2F", "%zz", "/", "//", "..", "?", "#", "&", "=", "+", "-", "0x",
    "\x7f", "\x80", "\xff", "\xa0", '"', "\\", "0", "9" * 20, "X" * 50, "x" * 300, "\r\n" * 9, "HTTP/1.0", "HTTP/2.0", "http://x/", "*", "OPTIONS", "0\r\n\r\n", "1;a=b\r\nx\r\n", "ffffffff\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n")]

FUZZ_LINES = [line.encode("latin-1") + b"\r\n" for line in (
    "Host: x", "Host: a b", "Host:", "Content-Length: 3", "Content-Length: +3", "Content-Length: 3, 3", "Content-Length: 0x3", "Content-Length:",
    "Content-Length: -1", "Content-Length: \xb3", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding:", " folded", "\tfolded", "X : y", "X", ": y", "", "Expect: 100-continue", "Expect: x", "Connection: close", "X: " + "y" * 200,
    "X: y\r\n" * 30, "Content-Encoding: gzip", "Origin: null", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    "Sec-WebSocket-Extensions: ;", "Sec-WebSocket-Key: x", "Upgrade: websocket", "1;a=b", "0", "GET / HTTP/1.1")]


def fuzz_text(rng, alphabet, most):
    """A random string."""
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(most)))


def fuzz_request(rng):
    """A valid request, of any kind."""
    target = rng.choice(["/", "/ping", "/a%20b/c?d=e%26&f", "/processes/x/_stop?wait=true", "http://localhost:80/x?y", "/" + fuzz_text(rng, "ab/%2F?=&", 20)])
    lines = ["%s %s HTTP/1.%d" % (rng.choice(["GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "BREW"]), target, rng.random() < 0.9)]
    lines.append("Host: " + rng.choice(["localhost", "127.0.0.1:5000", "[::1]", "evil.example"]))
    for _ in range(rng.choice((0, 0, 1, 3, 12))):
        lines.append("%s:%s" % (fuzz_text(rng, "abcXYZ-_!~09", 12) or "X", fuzz_text(rng, " \tab:;,=\"\xe9", 30)))
    if rng.random() < 0.2:
        lines += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                  "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=%d" % rng.randrange(6, 17)]
    body, kind = bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 40, 400)))), rng.random()
    if kind < 0.3:
        lines.append("Content-Length: %d" % len(body))
    elif kind < 0.6:
        lines.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x%b\r\n%b\r\n" % (len(part), rng.choice((b"", b"", b";a=b")), part) for part in pure_pieces(rng, body, 60))
        body += b"0\r\n" + rng.choice((b"", b"X: y\r\n")) + b"\r\n"
    else:
        body = b""
    return rng.choice((b"", b"", b"\r\n")) + "\r\n".join(lines + ["", ""]).encode("latin-1") + body


def fuzz_edge(rng):
    """Requests that are about as long as one of FuzzHttp.LIMITS lets them be."""
    most, size, head = FuzzHttp.LIMITS, rng.randrange(-3, 3), "POST / HTTP/1.1\r\nHost: x\r\n"
    chunked, kind = head + "Transfer-Encoding: chunked\r\n\r\n", rng.randrange(7)
    if kind == 0:
        line = "POST /%s HTTP/1.1" % ("a" * rng.choice((0, 50, 99, 100)))
        wire = line.rjust(most["REQUEST_LINE_SIZE"] + size, "M") + rng.choice(("\r\n", "\n", "")) + "Host: x\r\n\r\n"
    elif kind == 1:
        wire = (head + "X: ").ljust(most["HEAD_SIZE"] + size, "y") + rng.choice(("\r\n", "\n", "\r")) * 2
    elif kind == 2:
        wire = head + "X: y\r\n" * (most["HEADERS_MAX"] + size) + "\r\n"
    elif kind == 3:
        wire = "".join("\r\n" * max(0, rng.randrange(4, 10)) + rng.choice(("", "\n", "\r")) * (rng.random() < 0.2) + head + "\r\n" for _ in range(2))
    elif kind == 4:
        wire = chunked + "1;".ljust(most["CHUNK_LINE_SIZE"] + size, "x") + "\r\na\r\n0\r\n\r\n"
    elif kind == 5:
        wire = chunked + "1;%s\r\na\r\n" % ("x" * 9) * (most["CHUNK_EXTENSIONS_SIZE"] // 10 + size) + "0\r\n\r\n"
    else:
        wire = chunked + "0\r\n" + "X:".ljust(most["TRAILERS_SIZE"] + size, "y") + "\r\n\r\n"
    return wire.encode("ascii") + head.encode("ascii")


def fuzz_frame(rng):
    """Some websocket frames of a client, mostly valid."""
    data = pure_bytes(rng, rng.choice((0, 1, 5, 60)), rng.random() < 0.1)
    kind, reserved = rng.random(), 0x40 * (rng.random() < 0.05)
    mask = bytes(rng.randrange(256) for _ in range(4))
    if kind < 0.1:
        return WebSocket.encode(rng.randrange(8, 11), data[:rng.choice((0, 1, 2, 9, 125, 200))], rng.random() < 0.9, mask)
    if kind < 0.15:
        return WebSocket.encode(8, struct.pack("!H", rng.choice((1000, 1001, 1005, 3000, rng.randrange(65536)))) + data[:90], True, mask)
    if rng.random() < 0.01:
        data = bytes(rng.choice((900, 1100, 100000)))
    pieces = [data] if rng.random() < 0.5 else list(pure_pieces(rng, data, 20)) or [b""]
    return b"".join(WebSocket.encode(0 if number else rng.choice((1, 2)) | reserved, piece, number == len(pieces) - 1, mask)
                    for number, piece in enumerate(pieces[:60]))


def fuzz_spoil(rng, data):
    """`data`, with some of it changed, lost, doubled, moved, or other things between."""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        if rng.random() < 0.3:
            lines = data.split(b"\r\n")
            lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(FUZZ_LINES)[:-2])
            data = b"\r\n".join(lines)
            continue
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 10, 60))
        kind, cut = rng.randrange(6), data[at:at + size]
        middle = (rng.choice(FUZZ_TOKENS), bytes([rng.randrange(256)]), b"", cut * 2, cut.swapcase(), data[:size])[kind]
        data = data[:at] + middle + data[at + (size if kind in (1, 2, 3, 4) else 0):]
    return data


class FuzzHttp:
    """What a server does with the bytes of a connection, without one."""

    BODY = 300
    LIMITS = {"HEAD_SIZE": 700, "TARGET_SIZE": 100, "REQUEST_LINE_SIZE": 120, "HEADERS_MAX": 15, "CHUNK_LINE_SIZE": 40,
              "CHUNK_EXTENSIONS_SIZE": 60, "TRAILERS_SIZE": 50}

    @staticmethod
    def head(request):
        """Look at a request in every way that the server does. Returns what came of it."""
        wide = "".join((request.method, request.target, *request.headers, *request.headers.values()))
        assert not re.search("[\0-\x08\x0a-\x1f\x7f]", wide) and wide.isascii() | ("\x80" <= max(wide) <= "\xff"), wide
        assert re.fullmatch("[!-~]+ [!-~]+", request.method + " " + request.target), request.target
        assert "host" in request.headers or request.version == (1, 0)
        assert request.target.startswith("/") or (request.method, request.target) == ("OPTIONS", "*")
        assert len(request.headers) <= gaffer.HEADERS_MAX + 1 and len(request.target) <= gaffer.TARGET_SIZE
        access, looks = gaffer.Access("token"), []
        for look in (request.segments, lambda: sorted(request.query.items()), request.wants_close,
                     lambda: access.check_host(request), lambda: access.check_origin(request),
                     lambda: access.check_token(request), lambda: access.cors(request),
                     lambda: gaffer.websocket_accept(request),
                     lambda: gaffer.prefers_html(request.headers.get("accept", ""))):
            try:
                looks.append(look())
            except gaffer.GafferError as error:
                looks.append((type(error), str(error)))
        return [request.method, request.target, request.version, request.headers, looks]

    @classmethod
    def outcome(cls, wire, buffer_size=None):
        """(what has been understood, the error or None) of a connection's bytes."""
        seen, file = [], io.BytesIO(wire)
        if buffer_size:
            file = io.BufferedReader(file, buffer_size)
        try:
            while True:
                request = gaffer.read_request(file)
                if request is None:
                    return seen, None, ""
                seen.append(cls.head(request))
                body = gaffer.read_body(file, gaffer.body_length(request, cls.BODY), cls.BODY)
                assert len(body) <= cls.BODY
                seen.append(body)
        except EOFError:
            return seen, None, ""
        except gaffer.GafferError as error:
            return seen, type(error), str(error)


class PureFuzz(Case):
    """Each test has `cases` cases of its kind, made of `seed` and their number."""

    cases, seed, first = 250, "1", 0

    def fuzz(self, case):
        """Run case(rng) for each case; what fails says how to see it again."""
        for number in range(self.first, self.first + self.cases):
            try:
                case(random.Random("%s:%d" % (self.seed, number)))
            except BaseException as error:
                again = "python3 test_gaffer.py --fuzz 1 --seed %s:%d PureFuzz.%s" % (self.seed, number, self._testMethodName)
                raise AssertionError("case %d; again: %s" % (number, again)) from error

    def test_requests(self):
        def case(rng):
            kind, limits = rng.random(), FuzzHttp.LIMITS if rng.random() < 0.5 else {}
            if kind < 0.1:
                wire = bytes(rng.choice(b"\r\n :/GETHPa0\x00\xff") if rng.random() < 0.7 else rng.randrange(256) for _ in range(rng.randrange(300)))
            elif kind < 0.3:
                wire, limits = fuzz_edge(rng), FuzzHttp.LIMITS
            else:
                wire = fuzz_spoil(rng, b"".join(fuzz_request(rng) for _ in range(rng.choice((1, 1, 2)))))
            with http_limits(**limits):
                self.assertEqual(FuzzHttp.outcome(wire, rng.choice((1, 2, 7, 100))), FuzzHttp.outcome(wire))
        self.fuzz(case)

    def test_frames(self):
        """However the bytes come, the events are the same, and little is kept."""
        limit = 1000

        def outcome(pieces):
            decoder, events = gaffer.WebSocketDecoder(limit), []
            for piece in pieces:
                events += decoder.feed(piece)
                while decoder.more:
                    events += decoder.feed(b"")
            self.assertTrue(all(len(event[1]) <= limit for event in events if event[0] in ("text", "binary")))
            return events

        def case(rng):
            wire = bytes(rng.randrange(256) for _ in range(rng.randrange(100)))
            if rng.random() < 0.95:
                wire = fuzz_spoil(rng, b"".join(fuzz_frame(rng) for _ in range(rng.randrange(1, 5))))
            whole = outcome([wire])
            for pieces in ([wire[i:i + 1] for i in range(len(wire))], list(pure_pieces(rng, wire, rng.choice((3, 30, 300))))):
                self.assertEqual(outcome(pieces), whole, (wire, [len(piece) for piece in pieces][:30]))
        with http_limits(FRAMES_PER_TURN=3):
            self.fuzz(case)


# --------------------------------------------------------------------------------------------------------------------
# ring 2: the loop with real children
# --------------------------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------------------------------------
# platform, process, manager
# --------------------------------------------------------------------------------------------------------------------
# as `flapping`: it runs once, and its exit stops the template
PROCESS_ONCE = {"attempts": 1, "window": 1000, "max_retry": 0}


def process_state(os_pid):
    """The state letter of an OS process, None if there is none."""
    try:
        with open("/proc/%d/stat" % os_pid) as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return None


def process_group(group):
    """OS pids of the living members of a process group, as /proc shows them."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                with open("/proc/%s/stat" % entry) as file:
                    fields = file.read().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in "ZX":
                    members.append(int(entry))
    return members


def process_script(case, text, mode=0o755):
    """An executable file with this text, in a directory of its own."""
    folder = tempfile.mkdtemp()
    path = os.path.join(folder, "script")
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)
    case.addCleanup(os.rmdir, folder)
    case.addCleanup(os.unlink, path)
    return path


class ProcessCase(ServerCase):
    """What the tests of this section share."""

    def poll(self, ref, what=None, label="stdout", since=0):
        """Long polls from `since` on until `what` has come, or (None) until the stream ends. Returns all bytes."""
        data = b""
        while what is None or what not in data:
            path = "/streams/%s/%s?feed=longpoll&since=%d&timeout=%d" % (ref, label, since, TIMEOUT)
            status, headers, body = self.server.request("GET", path)
            self.assertIn(status, (200, 204), body)
            if status == 204:
                self.assertIsNone(what, "the stream ended, or was silent, before %r came: %r" % (what, data[-200:]))
                return data
            since = int(headers["Gaffer-Offset"])
            data += body
        return data

    def os_pid(self, pid):
        """The operating system's number of a process."""
        return self.server.ok("GET", "/processes/%d" % pid)["os_pid"]

    def pids(self, name):
        """The running pids of a template."""
        return self.server.ok("GET", "/processes/%s/_pids" % name)["pids"]

    def spawned(self, name, number):
        """The `number`th spawn event (from 1) of a template."""
        for event in self.server.events("proc/%s/spawn" % name, since=0):
            number -= 1
            if number == 0:
                return event

    def kinds(self, name):
        """All events of a template up to now, as (type, pid): behind them stands a barrier, the event of another one."""
        barrier = "barrier-%d" % next(self._barriers)
        self.server.ok("POST", "/processes", {"name": barrier, "cmd": "true", "start": False})
        self.server.ok("DELETE", "/processes/" + barrier)
        found = []
        for event in self.server.events(since=0):
            if event["name"] == barrier:
                return found
            if event["name"] == name:
                found.append((event["event"], event.get("pid")))

    _barriers = itertools.count(1)

    def exit_of(self, pid):
        """The exit event of a process."""
        for event in self.server.events("exit", since=0):
            if event["pid"] == pid:
                return event

    def stop(self, name, group):
        """Stop with ?wait: it returns, and nothing of the process group is left."""
        self.server.ok("POST", "/processes/%s/_stop?wait=true" % name)
        self.assertEqual(process_group(group), [], "of the group something is left")
        self.assertEqual(self.server.ok("GET", "/status/" + name)["stopping"], 0)


# name: (Python code or sh script of the child, template fields, bytes that say it is ready, exit (status, signal) after
# the stop or None where it exits by itself, all bytes that are to be read in the end)
PROCESS_IGNORES_TERM = "import signal, os, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
# what is waited for cannot come between a look for handlers and the sleep
PROCESS_AWAITS_TERM = ("import signal, os, sys\n"
                       "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n")
PROCESS_STUBBORN = python(PROCESS_IGNORES_TERM + "os.write(1, b'ready\\n')\nsignal.sigwait([])")
PROCESS_HOSTILE = {
    "ignores TERM": (
        PROCESS_IGNORES_TERM + "print('ready')\nsignal.sigwait([])",
        {"graceful_timeout": 0.1}, b"ready\n", (0, 9), b"ready\n"),
    "says goodbye": (
        PROCESS_AWAITS_TERM + "print('ready')\nsignal.sigwait([signal.SIGTERM])\nprint('bye')\nsys.exit(3)",
        {}, b"ready\n", (3, 0), b"ready\nbye\n"),
    "grandchild ignores TERM": (
        "sh", '(trap "" TERM; echo ready; exec sleep 60) & wait', {"graceful_timeout": 0.1}, b"ready\n", (0, 15), b"ready\n"),
    "double fork in the same group": (
        "import os, signal\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        print('ready')\n"
        "        signal.sigwait([])\n"
        "    os._exit(0)\n"
        "os.wait()\nsignal.sigwait([])", {"graceful_timeout": 0.1}, b"ready\n", (0, 15), b"ready\n"),
    "grandchild holds the pipe for a minute": (
        "sh", "sleep 60 & echo last", {"flapping": PROCESS_ONCE}, b"last", None, b"last\n"),
    "grandchild that ignores TERM holds the pipe": (
        "sh", '(trap "" TERM; exec sleep 60) & echo last',
        {"flapping": PROCESS_ONCE, "graceful_timeout": 0.1}, b"last", None, b"last\n"),
    "exits in a millisecond": ("sh", "echo last; exit 7", {"flapping": PROCESS_ONCE}, b"last", None, b"last\n"),
    "exits without a word": ("sh", "exit 7", {"flapping": PROCESS_ONCE}, None, None, b""),
    "crashes with a full pipe": (
        "import os, signal\nos.write(1, b'x' * 60000 + b'last words')\nos.kill(os.getpid(), signal.SIGKILL)",
        {"flapping": PROCESS_ONCE}, b"last words", None, b"x" * 60000 + b"last words"),
    "closes stdout early": (
        "import os, signal\nos.write(1, b'last')\nos.close(1)\nos.write(2, b'ready')\nsignal.sigwait([])",
        {}, b"last", (0, 15), b"last"),
    "closes everything": (
        "import os, signal\nos.write(1, b'last')\nos.closerange(0, 100)\nsignal.sigwait([])", {}, b"last", (0, 15), b"last"),
    "invalid UTF-8": (
        "import os, signal\nos.write(1, b'\\xff\\xfe\\xc3(\\x00\\x80 ready')\nsignal.sigwait([])",
        {}, b"ready", (0, 15), b"\xff\xfe\xc3(\x00\x80 ready"),
    "forks 50 and exits": (
        "import os, signal\nfor i in range(50):\n    if os.fork() == 0:\n        signal.sigwait([])\n        os._exit(0)\n"
        "os.write(1, b'last')", {"flapping": PROCESS_ONCE}, b"last", None, b"last"),
    "leaves 50 zombies": (
        "import os, signal\nfor i in range(50):\n    if os.fork() == 0:\n        os._exit(0)\n"
        "os.write(1, b'ready')\nsignal.sigwait([])", {}, b"ready", (0, 15), b"ready"),
    "forks when told to end": (
        PROCESS_AWAITS_TERM + "os.write(1, b'ready')\nwhile True:\n    signal.sigwait([signal.SIGTERM])\n"
        "    if os.fork() == 0:\n        os.write(1, b'!')\n        signal.sigwait([])",
        {"graceful_timeout": 0.2}, b"ready", (0, 9), b"ready!"),
    "is stopped and ignores TERM": (
        PROCESS_IGNORES_TERM + "os.write(1, b'ready')\nos.kill(os.getpid(), signal.SIGSTOP)\nsignal.sigwait([])",
        {"graceful_timeout": 0.1}, b"ready", (0, 9), b"ready"),
}


class ProcessHostileTable:
    """Each of these children: stop with ?wait returns, of its group nothing is left, and its last bytes can be read."""

    rows = tuple(PROCESS_HOSTILE)

    def test_table(self):
        for number, name in enumerate(self.rows):
            row = PROCESS_HOSTILE[name]
            with self.subTest(name):
                self.endure("child-%d" % number, *row)

    def endure(self, name, *row):
        command = {"cmd": row[1], "shell": True} if row[0] == "sh" else python(row[0])
        options, ready, exit_, output = row[-4:]
        self.server.add(name, command, **options)
        event = self.spawned(name, 1)
        pid, group = event["pid"], event["os_pid"]
        if ready is not None:
            self.poll(pid, ready)
        if exit_ is None:
            exited = self.exit_of(pid)
        self.stop(name, group)
        if exit_ is not None:
            exited = self.exit_of(pid)
            self.assertEqual((exited["exit_status"], exited["term_signal"]), exit_)
        self.assertEqual(self.poll(pid), output)
        self.assertEqual(exited["os_pid"], group)
        self.assertIsNone(process_state(group), "the process is reaped")
        self.server.ok("DELETE", "/processes/" + name)

    def test_stops_itself(self):
        """A process that is stopped (SIGSTOP) gets SIGCONT with its SIGTERM."""
        pid, = self.server.add("x", python("import os, signal\nprint('ready')\nos.kill(os.getpid(), signal.SIGSTOP)"))
        group = self.os_pid(pid)
        self.poll(pid, b"ready\n")
        until(lambda: process_state(group) == "T", "the process's stop")
        self.stop("x", group)
        self.assertEqual(self.exit_of(pid)["term_signal"], signal.SIGTERM)


class ProcessHostile(ProcessHostileTable, ProcessCase):
    """The table, and children that take more to tell, under the exit watcher that works best here."""

    def test_dies_by_each_signal(self):
        """exit tells by which signal, with exit status 0; the words before it are readable."""
        names = "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM XCPU XFSZ VTALRM PROF SYS".split()
        for name in names:
            command = {"cmd": "ulimit -c 0; echo $1; kill -$1 $$", "args": [name], "shell": True}
            self.server.add(name, command, flapping=PROCESS_ONCE)
        exits = {}
        for event in self.server.events("exit", since=0):
            if event["name"] in names:
                exits[event["name"]] = event
            if len(exits) == len(names):
                break
        for name in names:
            with self.subTest(name):
                event = exits[name]
                self.assertEqual((event["exit_status"], event["term_signal"]), (0, int(getattr(signal, "SIG" + name))))
                self.assertEqual(self.poll(event["pid"]), name.encode() + b"\n")
                last = self.server.ok("GET", "/status/" + name)["last_exit"]
                self.assertEqual(last["term_signal"], event["term_signal"])
                self.assertEqual(process_group(event["os_pid"]), [])

    def test_works_on_behind_its_shell(self):
        """Output is read as long as something of the process's group is left."""
        code = PROCESS_AWAITS_TERM + textwrap.dedent("""
            print('ready', flush=True)
            signal.sigwait([signal.SIGTERM])
            signal.sigtimedwait([], 0.5)
            print('saved', flush=True)
            """)
        command = "%s -I -S -c %s; true" % (PYTHON, shlex.quote(code))
        for way in "stop", "exit":
            with self.subTest(way), unittest.mock.patch("gaffer.DRAIN_TIME", 0.2):
                pid, = self.server.add("x", command, shell=True)
                group = self.os_pid(pid)
                self.poll(pid, b"ready\n")
                if way == "exit":
                    os.kill(group, signal.SIGKILL)
                self.stop("x", group)
                self.assertEqual(self.poll(pid), b"ready\nsaved\n")
                self.server.ok("DELETE", "/processes/x")

    def test_leaves_the_session(self):
        """What left the process group cannot be stopped; it is reported by its number."""
        code = """
            import os, signal
            if os.fork() == 0:
                os.%s
                print(os.getpid())
            signal.sigwait([])
            """
        for way in ("setsid()", "setpgid(0, 0)"):
            with self.subTest(way):
                pid, = self.server.add("x", python(code % way))
                group = self.os_pid(pid)
                escaped = int(self.poll(pid, b"\n"))
                try:
                    with self.assertLogs("gaffer", logging.WARNING) as logs:
                        self.stop("x", group)
                    self.assertTrue(alive(escaped))
                    self.assertTrue(any(re.search(r"\b%d\b" % escaped, line) for line in logs.output), logs.output)
                finally:
                    os.kill(escaped, signal.SIGKILL)
                until(lambda: not alive(escaped), "the end of what escaped")
                self.server.ok("DELETE", "/processes/x")

    def test_output_without_a_newline(self):
        """64 MiB in one line: a reader with loss=block has every byte; the child was made to wait, nobody else was."""
        size = 64 * 1024 * 1024
        pid, = self.server.add("x", python("""
            import os
            os.read(0, 1)
            data = b'x' * 65536
            for i in range(%d // 65536):
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view):]
            os.write(1, b'END')
            """ % size), redirect_input=True, flapping=PROCESS_ONCE)
        group = self.os_pid(pid)
        answer = self.server.stream("/streams/%d/stdout?feed=continuous&since=0&loss=block" % pid)
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"!")
        total, last = 0, b""
        while True:
            data = answer.read(1024 * 1024)
            if not data:
                break
            total, last = total + len(data), (last + data)[-3:]
        answer.connection.close()
        self.assertEqual((total, last), (size + 3, b"END"))
        self.stop("x", group)
        status, headers, body = self.server.request("GET", "/streams/%d/stdout?feed=longpoll&since=0" % pid)
        self.assertEqual((status, len(body), body[-4:]), (200, gaffer.WINDOW_SIZE, b"xEND"))
        self.assertEqual(int(headers["Gaffer-Dropped"]), size + 3 - gaffer.WINDOW_SIZE)

    def test_output_that_nobody_reads(self):
        """A child that writes without end is never blocked, and is stopped like any other."""
        pid, = self.server.add("x", python("import os\nwhile True: os.write(1, b'x' * 65536)"))
        group = self.os_pid(pid)
        until(lambda: self.server.request("HEAD", "/streams/%d/stdout?since=0" % pid)[1]["Gaffer-Offset"] and
              int(self.server.request("HEAD", "/streams/%d/stdout" % pid)[1]["Gaffer-Offset"]) > 8 * gaffer.WINDOW_SIZE,
              "more output than fits into the window")
        self.stop("x", group)
        self.assertEqual(self.exit_of(pid)["term_signal"], signal.SIGTERM)
        end = int(self.server.request("HEAD", "/streams/%d/stdout" % pid)[1]["Gaffer-Offset"])
        self.assertEqual(set(self.poll(pid, since=end - 1000)), {ord("x")})

    def test_split_utf8(self):
        """A character that comes in two writes, a silence between them, is one character to a reader of lines."""
        pid, = self.server.add("x", python("""
            import os
            os.write(1, b'a\\xe2\\x82')
            os.read(0, 1)
            os.write(1, b'\\xac\\nend\\n')
            """), redirect_input=True, flapping=PROCESS_ONCE)
        group = self.os_pid(pid)
        answer, events = self.server.sse("/streams/%d/stdout?feed=eventsource&since=0" % pid)
        text = next(events)["data"]                 # what was silent for a while, but no half character
        self.assertEqual(text, "a")
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"!")
        for event in events:
            if event["data"] == "end":
                break
            text += event["data"]
        answer.connection.close()
        self.assertEqual(text, "a\u20ac")
        self.stop("x", group)
        self.assertEqual(self.poll(pid), b"a\xe2\x82\xac\nend\n")

    def test_invalid_utf8_as_lines(self):
        """U+FFFD for what is no UTF-8, exact bytes for who wants bytes."""
        self.server.add("x", python("import os\nos.write(1, b'a\\xff\\xfeb\\nend\\n')"), flapping=PROCESS_ONCE)
        pid = 1                                     # it may have exited before it could be asked for
        answer, events = self.server.sse("/streams/%d/stdout?feed=eventsource&since=0" % pid)
        self.assertEqual([event["data"] for event in events][:2], ["a\ufffd\ufffdb", "end"])
        answer.connection.close()
        self.assertEqual(self.poll(pid), b"a\xff\xfeb\nend\n")

    STDIN_READER = """
        import hashlib, os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        print('ready')
        signal.sigwait([signal.SIGUSR1])
        total, digest = 0, hashlib.sha1()
        while True:
            data = os.read(0, 700)
            if not data:
                break
            total += len(data)
            digest.update(data)
        print(total, digest.hexdigest())
        """

    def test_reads_stdin_slowly(self):
        """What waits for a process reaches it in order and whole, with the end of file behind it."""
        pid, = self.server.add("x", python(self.STDIN_READER), redirect_input=True, flapping=PROCESS_ONCE)
        group = self.os_pid(pid)
        self.poll(pid, b"ready\n")
        parts = [os.urandom(1000) * 100 for _ in range(10)]
        for part in parts:
            self.server.ok("POST", "/streams/%d/stdin" % pid, part)
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        self.assertEqual(self.server.json("POST", "/streams/%d/stdin" % pid, b"late")[1]["error"], "forbidden_write")
        self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
        expected = "ready\n1000000 %s\n" % hashlib.sha1(b"".join(parts)).hexdigest()
        self.assertEqual(self.poll(pid), expected.encode())
        self.stop("x", group)

    def test_never_reads_stdin(self):
        """1 MiB waits; what does not fit is refused whole, nothing of it is written."""
        pid, = self.server.add("x", python(self.STDIN_READER), redirect_input=True, flapping=PROCESS_ONCE)
        group = self.os_pid(pid)
        self.poll(pid, b"ready\n")
        first, second = b"1" * 1024 * 1024, b"2" * 1024 * 1024
        self.server.ok("POST", "/streams/%d/stdin" % pid, first)
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, second), 503, "stdin_full")
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, first + b"3"), 413, "too_large")
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
        self.assertEqual(self.poll(pid).split()[1:], [b"1048576", hashlib.sha1(first).hexdigest().encode()])
        self.stop("x", group)

    def test_never_reads_stdin_and_is_stopped(self):
        """What still waits is dropped with the process."""
        pid, = self.server.add("x", "sleep 60", redirect_input=True)
        group = self.os_pid(pid)
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"1" * 1024 * 1024)
        self.stop("x", group)
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"late"), 403, "forbidden_write")

    def test_closes_stdin(self):
        """Writing to who has closed its stdin is an error for the writer, not for gaffer."""
        pid, = self.server.add("x", python("import os, signal\nos.close(0)\nprint('ready')\nsignal.sigwait([])"), redirect_input=True)
        self.poll(pid, b"ready\n")
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"!"), 403, "forbidden_write")
        self.stop("x", self.os_pid(pid))

    def test_cannot_be_executed(self):
        """Refused when it is to start, with a reason; nothing is added, nothing starts."""
        folder = tempfile.mkdtemp()
        self.addCleanup(os.rmdir, folder)
        table = (
            ("missing", "/nowhere/program", "not there"),
            ("not in PATH", "no-such-program-anywhere", "not found in PATH"),
            ("not executable", process_script(self, "#!/bin/sh\n", 0o644), "not executable"),
            ("no interpreter", process_script(self, "#!/nowhere/interpreter\n"), "interpreter"),
            ("no program", process_script(self, "echo\n"), "no program"),
            ("a directory", folder, "directory"),
        )
        for what, command, words in table:
            with self.subTest(what):
                info = {"name": "x", "cmd": command}
                answer = self.server.json("POST", "/processes", info)
                self.assertError(answer, 400, "invalid_process_info", words)
                self.assertIn(command, answer[1]["reason"])
                self.assertEqual(self.server.ok("GET", "/processes"), [])
                self.server.ok("POST", "/processes", dict(info, start=False))
                self.assertError(self.server.json("POST", "/processes/x/_start"), 400, "invalid_process_info", words)
                self.assertFalse(self.server.ok("GET", "/status/x")["active"])
                self.assertEqual(self.kinds("x")[-1], ("create", None))
                self.server.ok("DELETE", "/processes/x")

    def test_working_directory_removed(self):
        """A directory that goes while the process runs: it is started again once the directory is back."""
        folder = tempfile.mkdtemp()
        pid, = self.server.add("x", "cat", cwd=folder, redirect_input=True)
        group = self.os_pid(pid)
        os.rmdir(folder)
        with self.assertLogs("gaffer", logging.WARNING) as logs:
            self.server.ok("DELETE", "/streams/%d/stdin" % pid)
            self.exit_of(pid)
            status = until(lambda: [s for s in [self.server.ok("GET", "/status/x")] if s["error"]])[0]
        self.assertIn(folder, status["error"])
        self.assertIn(folder, logs.output[0])
        self.assertEqual((status["active"], status["running"]), (True, 0))
        self.assertEqual(process_group(group), [])
        with self.assertLogs("gaffer", logging.WARNING):
            logging.getLogger("gaffer").warning("it may be tried once more before the directory is back")
            os.mkdir(folder)
            self.addCleanup(os.rmdir, folder)
            event = self.spawned("x", 2)
        self.assertEqual(os.readlink("/proc/%d/cwd" % event["os_pid"]), folder)
        self.assertIsNone(self.server.ok("GET", "/status/x")["error"])
        self.stop("x", event["os_pid"])
        os.rmdir(folder)
        self.assertError(self.server.json("POST", "/processes/x/_start"), 400, "invalid_process_info", "cwd")
        os.mkdir(folder)

    def test_a_chain_of_forks(self):
        """A group without a leader that forks faster than anybody can look at it: a FIFO that all its members hold has
        its end of file when stop has returned."""
        folder = tempfile.mkdtemp()
        path = os.path.join(folder, "fifo")
        os.mkfifo(path)
        self.addCleanup(os.rmdir, folder)
        self.addCleanup(os.unlink, path)
        fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, fifo)
        self.server.add("x", python("""
            import os, signal
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            fifo = os.open(%r, os.O_WRONLY)
            if os.fork() == 0:
                os.write(fifo, b'begun')
                for i in range(1000):
                    if os.fork():
                        os._exit(0)
                os._exit(0)
            os.write(1, b'last')
            """ % path), graceful_timeout=0.05, flapping=PROCESS_ONCE)
        event = self.spawned("x", 1)
        self.exit_of(event["pid"])
        self.server.ok("POST", "/processes/x/_stop?wait=true")
        self.assertEqual(os.read(fifo, 5), b"begun")
        try:
            self.assertEqual(os.read(fifo, 1), b"")
        except BlockingIOError:
            os.set_blocking(fifo, True)
            os.read(fifo, 1)                        # it ends some day by itself
            self.fail("the chain outlived the stop")
        self.stop("x", event["os_pid"])
        self.assertEqual(self.poll(event["pid"]), b"last")


@unittest.skipUnless(hasattr(os, "pidfd_open"), "has run so already: here children are polled")
class ProcessHostilePolled(ProcessHostileTable, ProcessCase):
    """The table, where children are polled."""

    rows = ("ignores TERM", "grandchild ignores TERM", "grandchild that ignores TERM holds the pipe", "exits in a millisecond",
            "crashes with a full pipe", "closes everything", "forks 50 and exits")

    def setUp(self):
        super().setUp()
        patch = unittest.mock.patch("os.pidfd_open", side_effect=OSError(errno.ENOSYS, "no"))
        patch.start()
        self.addCleanup(patch.stop)


class ProcessClock:
    """A Manager, on a thread of its own, whose loop has a clock that stands still until advance()."""

    def __init__(self):
        self.now = 1000.0
        self.seen = []                          # (time, type, event) of all events
        self._queue = queue.Queue()
        self.manager = gaffer.Manager([], loop=gaffer.Loop(clock=lambda: self.now))
        self.manager.subscribe("", lambda kind, event: self._queue.put((self.now, kind, event)))
        self._thread = threading.Thread(target=self.manager.run)
        self._thread.start()

    def close(self):
        """Kill all; the clock does not matter for that."""
        self.manager.stop(kill=True)
        self.join()

    def join(self):
        """Wait for the end of run()."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    def barrier(self):
        """Wait for turns of the loop: one that may have begun before the clock moved, one for the timers that are due, one
        for the events that they made."""
        for _ in range(3):
            turn = threading.Event()
            self.manager.loop.call_soon(turn.set)
            assert turn.wait(TIMEOUT)
        while not self._queue.empty():
            self.seen.append(self._queue.get())

    def wait(self, kind, number):
        """Wait until `number` events of a type have come."""
        while sum(entry[1] == kind for entry in self.seen) < number:
            self.seen.append(self._queue.get(timeout=TIMEOUT))

    def settle(self):
        """Wait until everything that was spawned has exited, and nothing follows from it."""
        known = None
        while known != len(self.seen):
            self.wait("exit", self.count("spawn"))
            known = len(self.seen)
            self.barrier()

    def advance(self, seconds, settle=True):
        """Let time pass."""
        self.now += seconds
        self.settle() if settle else self.barrier()

    def count(self, kind):
        """How many events of a type have come."""
        return sum(entry[1] == kind for entry in self.seen)

    def kinds(self):
        """The types of all events."""
        return [kind for _, kind, _ in self.seen]

    def times(self, kind):
        """When events of a type came, from the first on."""
        times = [when for when, each, _ in self.seen if each == kind]
        return [round(when - times[0], 3) for when in times]

    def os_pid(self, name):
        """The system's pid of the last process of a template."""
        return [event["os_pid"] for _, kind, event in self.seen
                if kind == "spawn" and event["name"] == name][-1]

    def status(self, name):
        """What GET /status/<name> answers."""
        return self.manager.loop.call(lambda: self.manager.find_template(name).status())


class ProcessTimes(Case):
    """Backoff and flapping, on a clock that the tests move; the processes are real."""

    def setUp(self):
        super().setUp()
        self.clock = ProcessClock()
        self.addCleanup(self.clock.close)
        self.manager = self.clock.manager

    def test_fails_at_once(self):
        """At most 8 spawns in the first 3 seconds of a command that fails at once."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        for _ in range(30):
            self.clock.advance(0.1)
        self.assertGreaterEqual(self.clock.count("spawn"), 5)
        self.assertLessEqual(self.clock.count("spawn"), 8)

    def test_growing_delay(self):
        """None the first time, then 100 ms doubling to 10 s."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        for _ in range(9):
            status = self.clock.status("x")
            self.assertEqual((status["state"], status["running"]), ("backoff", 0))
            self.clock.advance(status["next_try"] - 0.01)
            before = self.clock.count("spawn")
            self.clock.advance(0.011)
            self.assertEqual(self.clock.count("spawn"), before + 1)
        times = self.clock.times("spawn")
        delays = [round(after - before, 1) for before, after in zip(times, times[1:])]
        self.assertEqual(delays, [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])

    def live(self, seconds):
        """Let the running `cat` live so long, then end. Returns how long after its exit the next one was spawned."""
        self.clock.barrier()
        spawns = self.clock.count("spawn")
        self.clock.advance(seconds, settle=False)
        self.manager.end_input(self.last_pid(), "stdin")
        self.clock.wait("exit", spawns)
        self.clock.barrier()
        waited = self.clock.status("x")["next_try"] or 0
        if waited:
            self.clock.advance(waited + 0.001, settle=False)
        self.clock.wait("spawn", spawns + 1)
        return waited

    def last_pid(self):
        """The pid of the last spawn."""
        return [event["pid"] for _, kind, event in self.clock.seen if kind == "spawn"][-1]

    def test_delay_is_forgotten(self):
        """Back to no delay once a process has lived 10 s; 9 s are not enough."""
        self.manager.add_process("x", "cat", redirect_input=True)
        self.assertEqual([self.live(seconds) for seconds in (0, 1, 9, 10, 1, 11, 20, 0)], [0, 0.1, 0.2, 0, 0.1, 0, 0, 0.1])

    def nothing_starts(self):
        """Much time passes, and nothing is spawned."""
        before = self.clock.count("spawn")
        for _ in range(5):
            self.clock.advance(100)
        self.assertEqual(self.clock.count("spawn"), before)

    def test_stop_during_backoff(self):
        """Nothing starts later; a start does so at once."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        self.assertEqual(self.clock.status("x")["state"], "backoff")
        self.manager.stop_template("x")
        self.assertEqual(self.clock.status("x")["state"], "stopped")
        self.nothing_starts()
        self.manager.start_template("x")
        self.clock.settle()
        self.assertGreater(self.clock.count("spawn"), 2)

    def test_delete_during_backoff(self):
        """Nothing starts later."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        self.manager.delete_process("x")
        self.nothing_starts()
        self.assertEqual(self.clock.kinds()[-2:], ["stop", "delete"])

    def test_scale_to_zero_during_backoff(self):
        """Nothing starts later."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        self.assertEqual(self.manager.scale("x", -1), 0)
        self.nothing_starts()

    def test_update_during_backoff(self):
        """The new command is started at once, and only once."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        self.manager.update_process("x", {"cmd": "cat", "redirect_input": True})
        self.clock.barrier()
        self.assertEqual(self.clock.status("x")["running"], 1)
        for _ in range(5):
            self.clock.advance(100, settle=False)
        self.assertEqual(self.clock.kinds()[-2:], ["update", "spawn"])

    def test_manager_stop_during_backoff(self):
        """run() returns."""
        self.manager.add_process("x", "false")
        self.clock.settle()
        self.manager.stop()
        self.clock.join()

    def test_windows_stay_for_a_minute(self):
        """60 s after its exit a process is forgotten."""
        self.manager.add_process("x", "false", flapping=PROCESS_ONCE)
        self.clock.settle()
        find = functools.partial(self.manager.find_window, 1, "stdout")
        self.clock.advance(59.9)
        self.assertTrue(self.manager.loop.call(find).ended)
        self.clock.advance(0.2)
        with self.assertRaises(gaffer.NotFound):
            self.manager.loop.call(find)

    def test_flapping(self):
        """The contract's numbers: 2 exits within 1 s, rest 7 s, 5 times, then stop for good."""
        self.manager.add_process("x", "false", flapping={})
        self.clock.settle()
        wave = ["spawn", "exit", "spawn", "exit", "flap"]
        for rests in range(5):
            self.assertEqual(self.clock.kinds(), ["create", "start"] + wave * (rests + 1))
            self.assertEqual(self.clock.status("x")["state"], "flapping")
            self.clock.advance(6.9)
            self.assertEqual(len(self.clock.seen), 2 + 5 * (rests + 1), "it rests for 7 seconds")
            self.clock.advance(0.11)
        self.assertEqual(self.clock.kinds(), ["create", "start"] + wave * 5 + ["spawn", "exit", "spawn", "exit", "stop"])
        self.assertFalse(self.clock.status("x")["active"])
        self.nothing_starts()

    def test_flapping_begins_anew(self):
        """_start after the stop for good: all rests are there again."""
        self.manager.add_process("x", "false", flapping={"max_retry": 1, "retry_in": 1})
        for _ in range(2):
            self.clock.settle()
            self.clock.advance(1.1)
            twice = ["spawn", "exit", "spawn", "exit"]
            self.assertEqual(self.clock.kinds()[-10:], twice + ["flap"] + twice + ["stop"])
            self.manager.start_template("x")

    def test_no_flapping(self):
        """Exits further apart than the window never flap; each is replaced at once."""
        self.manager.add_process("x", "cat", redirect_input=True, flapping={})
        self.assertEqual([self.live(1.1) for _ in range(10)], [0] * 10)
        self.assertEqual(self.clock.count("flap"), 0)

    def test_a_long_life_forgives(self):
        """A process that outlived the window takes away the rests before it."""
        self.manager.add_process("x", "cat", redirect_input=True, flapping={"max_retry": 1, "window": 1, "retry_in": 3})
        rests = [[self.live(0.1), self.live(5)] for _ in range(4)]
        self.assertEqual(rests, [[0, 0], [3, 0], [3, 0], [3, 0]])
        self.assertEqual((self.clock.count("flap"), self.clock.count("stop")), (3, 0))

    def test_flapping_of_many(self):
        """Exits of further processes during a rest are no rests of their own."""
        flapping = {"attempts": 2, "window": 1, "retry_in": 7, "max_retry": 2}
        self.manager.add_process("x", "false", numprocesses=4, flapping=flapping)
        for _ in range(4):
            self.clock.settle()
            self.clock.advance(7.01)
        self.assertEqual((self.clock.count("flap"), self.clock.count("stop")), (2, 1))

    def test_stop_during_rest(self):
        """Nothing starts later, by stop, delete, or scaled to zero."""
        for number, end in enumerate((self.manager.stop_template, self.manager.delete_process,
                                      lambda name: self.manager.scale(name, -1))):
            name = "x%d" % number
            self.manager.add_process(name, "false", flapping={})
            self.clock.settle()
            self.assertEqual(self.clock.status(name)["state"], "flapping")
            end(name)
            self.nothing_starts()

    def test_a_pipe_that_outlives_the_process(self):
        """A stream ends 2 s after the exit where something outside the group holds its pipe."""
        said = queue.Queue()
        self.manager.add_process("x", redirect_input=True, flapping=PROCESS_ONCE, **python("""
            import os, signal
            read, write = os.pipe()
            if os.fork() == 0:
                os.setsid()
                os.write(write, b"x")
                os.read(0, 1)
                os.write(1, b'%d' % os.getpid())
                signal.sigwait([])
            os.read(read, 1)                    # it has left the group
            os.read(0, 1)
            """))
        process = self.manager.get_process(1)
        process.monitor_io("stdout", lambda label, event: said.put(event["data"]))
        process.write(b"!!")                        # one for each of the two
        escaped = int(said.get(timeout=TIMEOUT))
        try:
            self.clock.wait("exit", 1)
            window = self.manager.loop.call(self.manager.find_window, 1, "stdout")
            self.clock.advance(1.9)
            self.assertFalse(window.ended)
            self.clock.advance(0.2)
            self.assertTrue(window.ended)
            self.assertEqual(self.clock.count("exit"), 1)
            self.assertTrue(alive(escaped))
        finally:
            os.kill(escaped, signal.SIGKILL)
        until(lambda: not alive(escaped), "the end of what escaped")

    def test_graceful_timeout(self):
        """SIGKILL comes after exactly graceful_timeout seconds."""
        self.manager.add_process("x", graceful_timeout=3, **PROCESS_STUBBORN)
        self.clock.barrier()
        ready = threading.Event()
        with contextlib.closing(self.manager.get_process(1).monitor_io("stdout", lambda label, event: ready.set())):
            window = self.manager.loop.call(lambda: self.manager.find_window(1, "stdout"))
            self.assertTrue(window.end or ready.wait(TIMEOUT))
        self.manager.stop_template("x")
        self.clock.advance(2.99, settle=False)
        spawned = next(event for _, kind, event in self.clock.seen if kind == "spawn")
        self.assertTrue(alive(spawned["os_pid"]))
        self.clock.advance(0.02, settle=False)
        self.clock.wait("exit", 1)
        self.assertEqual(self.clock.seen[-1][2]["term_signal"], signal.SIGKILL)

    def test_stop_by_priority(self):
        """The highest first, the newest within one; the next when those are gone or late."""
        def ready(pid):
            window = self.manager.loop.call(self.manager.find_window, pid, "stdout")
            until(lambda: window.end, "the process's word")
        for pid, (name, priority, command) in enumerate((
                ("db", 0, {"cmd": "sleep 60"}), ("app", 1, PROCESS_STUBBORN), ("late", 5, PROCESS_STUBBORN),
                ("late2", 5, {"cmd": "sleep 60"}), ("none", None, {"cmd": "sleep 60"})), 1):
            self.manager.add_process(name, priority=priority, graceful_timeout=3, **command)
            if command is PROCESS_STUBBORN:
                ready(pid)
        self.clock.barrier()
        self.manager.stop()

        def stopped(number):
            self.clock.wait("stop_pid", number)
            self.clock.barrier()
            return [event["name"] for _, kind, event in self.clock.seen if kind == "stop_pid"]
        self.assertEqual(stopped(3), ["none", "late2", "late"])
        self.clock.advance(2.99, settle=False)
        self.assertEqual(stopped(3), ["none", "late2", "late"])
        self.clock.advance(0.02, settle=False)
        self.assertEqual(stopped(4)[3:], ["app"])
        os.kill(self.clock.os_pid("app"), signal.SIGKILL)
        self.clock.wait("stop_pid", 5)
        self.clock.join()


# how a process ends: (command, (exit status, signal))
POLICY_ENDS = {
    "0": ("true", (0, 0)), "1": ("sh -c 'exit 1'", (1, 0)), "143": ("sh -c 'exit 143'", (143, 0)),
    "KILL": ("sh -c 'kill -KILL $$$$'", (0, 9)), "cannot start": ("{folder}/x", (127, 0))}


class ProcessPolicies(Case):
    """restart and success, on a clock that the tests move: number of starts, state, last event."""

    def run_policy(self, restart, command, **options):
        """Run a template with a policy for 100 seconds. Return (starts, status, events)."""
        clock = ProcessClock()
        try:
            clock.manager.add_process("x", command, restart=restart, **options)
            clock.settle()
            for _ in range(20):
                clock.advance(5)
            return clock.count("spawn"), clock.status("x"), clock.seen
        finally:
            clock.close()

    def test_table(self):
        """3 policies, 5 ends, with and without flapping."""
        flapping = {"attempts": 2, "window": 50, "retry_in": 1, "max_retry": 1}
        for restart in ("always", "on-failure", "never"):
            for word, (command, end) in POLICY_ENDS.items():
                for flaps in (None, flapping):
                    with self.subTest(restart=restart, end=word, flaps=bool(flaps)):
                        self.check(restart, command, end, flaps)

    def check(self, restart, command, end, flaps):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        program, cannot = os.path.join(folder, "x"), end == (127, 0)
        if cannot:                              # it is there for the check, and goes then
            with open(program, "w", encoding="ascii") as file:
                file.write("#!/bin/sh\nrm \"$0\"; exit 1\n")
            os.chmod(program, 0o755)
        starts, status, seen = self.run_policy(restart, command.format(folder=folder),
                                               flapping=flaps)
        last = [(kind, event) for _, kind, event in seen if kind in ("done", "fail", "stop")]
        if restart == "always" or restart == "on-failure" and end != (0, 0):
            if flaps:
                self.assertEqual((status["state"], status["gave_up"]), ("stopped", True))
                self.assertEqual([kind for kind, _ in last], ["stop"])
            else:
                self.assertEqual((status["state"], last), ("backoff", []))
            self.assertEqual(starts, 1 if cannot else 4 if flaps else 15)
            return
        kind, event = last[-1]
        first = (1, 0) if cannot else end       # it is not started a second time
        self.assertEqual((starts, len(last), kind), (1, 1, "fail" if any(first) else "done"))
        self.assertEqual(status["state"], "failed" if any(first) else "done")
        self.assertEqual((event["exit_status"], event["term_signal"], event["tries"]), (*first, 1))
        self.assertFalse(status["active"])

    def test_tries_and_success(self):
        """On-failure until it succeeds; what counts as success is the template's word."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        script = "echo >> n; exit $((3 - $(wc -l < n)))"
        starts, status, seen = self.run_policy("on-failure", script, shell=True, cwd=folder)
        self.assertEqual((starts, status["state"], status["restarts"]), (3, "done", 2))
        self.assertEqual((seen[-1][1], seen[-1][2]["tries"]), ("done", 3))
        for success, state in (([0, 3], "done"), ([3], "done"), (["TERM", 0], "failed")):
            _, status, _ = self.run_policy("never", "exit 3", shell=True, success=success)
            self.assertEqual(status["state"], state)
        _, status, _ = self.run_policy("never", "kill $$", shell=True, success=["TERM"])
        self.assertEqual(status["state"], "done")

    def test_many(self):
        """Several of one template: it has failed if one has, once all have ended."""
        clock = ProcessClock()
        self.addCleanup(clock.close)
        clock.manager.add_process("x", "exit $((GAFFER_INSTANCE - 1))", shell=True, numprocesses=3,
                                  restart="never")
        clock.settle()
        self.assertEqual(clock.status("x")["state"], "failed")
        self.assertEqual((clock.count("spawn"), clock.seen[-1][1]), (3, "fail"))
        self.assertEqual((clock.seen[-1][2]["exit_status"], clock.seen[-1][2]["tries"]), (1, 3))

    def test_what_starts_it_again(self):
        """_start, _restart and a change run what is done again; the same template does not."""
        clock = ProcessClock()
        self.addCleanup(clock.close)
        manager, info = clock.manager, {"name": "x", "cmd": "true", "restart": "never"}
        manager.add_process(info)
        for number, (act, runs) in enumerate((
                (lambda: manager.start_template("x"), True),
                (lambda: manager.restart_template("x"), True),
                (lambda: manager.update_process("x", info), False),
                (lambda: manager.update_process("x", dict(info, start=True)), False),
                (lambda: manager.scale("x", 1), False), (lambda: manager.scale("x", -1), False),
                (lambda: manager.stop_template("x"), False),
                (lambda: manager.update_process("x", dict(info, cmd="true x")), True),
                (manager.restart, False), (lambda: manager.start_template("x"), True))):
            with self.subTest(number):
                clock.settle()
                starts = clock.count("spawn")
                self.assertEqual(clock.status("x")["state"], "done")
                self.assertEqual(clock.count("done"), starts)
                act()
                clock.barrier()
                self.assertEqual(clock.count("spawn") - starts, runs)

    def test_wait(self):
        """A handle waits for the end of what ends by itself, and returns the last exit."""
        clock = ProcessClock()
        self.addCleanup(clock.close)
        handle = clock.manager.add_process("x", "sh -c 'exit 3'", restart="never")
        self.assertEqual(handle.wait(TIMEOUT)["exit_status"], 3)
        self.assertEqual(clock.status("x")["outcome"], "failed")

    def test_restart_delay_is_kept(self):
        """A number of seconds is always that, also the first time and with flapping."""
        for flapping in (None, {"attempts": 5}):
            clock = ProcessClock()
            try:
                clock.manager.add_process("x", "true", restart_delay=3, flapping=flapping)
                clock.settle()
                for _ in range(9):
                    clock.advance(1)
                self.assertEqual(clock.times("spawn"), [0, 3, 6, 9])
            finally:
                clock.close()


class ProcessEvents(ProcessCase):
    """Events: their order and their fields."""

    # (template fields, requests, events in this order, without pids)
    ORDERS = {
        "added": ({}, [], "create start spawn spawn"),
        "added without a start": (
            {"start": False}, ["POST /_start", "POST /_start"], "create start spawn spawn"),
        "stopped, and once more": (
            {}, ["POST /_stop?wait=true", "POST /_stop?wait=true"],
            "create start spawn spawn stop stop_pid stop_pid exit exit"),
        "stopped before it was started": ({"start": False}, ["POST /_stop"], "create"),
        "scaled": (
            {}, ["POST /_add/2", "POST /_sub?wait=true"],
            "create start spawn spawn update spawn spawn update reap exit"),
        "deleted": (
            {}, ["DELETE ?wait=true"],
            "create start spawn spawn stop stop_pid stop_pid delete exit exit"),
        "deleted before it was started": ({"start": False}, ["DELETE "], "create delete"),
        "replaced": (
            {"numprocesses": 1}, ["PUT ", "POST /_start?wait=true"],
            "create start spawn update stop_pid exit spawn"),
        "restarted": (
            {"numprocesses": 1}, ["POST /_restart?wait=true"],
            "create start spawn restart stop_pid exit spawn"),
        "restarted before it was started": (
            {"start": False, "numprocesses": 1}, ["POST /_restart"], "create start spawn"),
        "one process stopped": (
            {"numprocesses": 1}, ["POST /_restart?wait=true"],
            "create start spawn restart stop_pid exit spawn"),
    }

    def test_order(self):
        for number, (what, (fields, requests, events)) in enumerate(self.ORDERS.items()):
            with self.subTest(what):
                name = "x%d" % number
                self.server.add(name, "sleep 60", **dict({"numprocesses": 2}, **fields))
                for request in requests:
                    method, path = request.split(" ")
                    body = {"cmd": "sleep 61"} if method == "PUT" else None
                    self.server.ok(method, "/processes/" + name + path, body)
                until(lambda name=name, events=events: len(self.kinds(name)) >= len(events.split()))
                self.assertEqual(" ".join(kind for kind, _ in self.kinds(name)), events)

    def test_stop_of_one_pid(self):
        pid, = self.server.add("x", "sleep 60")
        self.server.ok("POST", "/processes/%d/_stop" % pid)
        self.spawned("x", 2)
        self.assertEqual(self.kinds("x")[-3:],
                         [("stop_pid", pid), ("exit", pid), ("spawn", pid + 1)])

    def test_exit_by_itself(self):
        self.server.add("x", "exit 3", shell=True,
                        flapping=dict(PROCESS_ONCE, max_retry=1, retry_in=1000))
        self.server.wait_event("proc/x/flap")
        self.assertEqual([kind for kind, _ in self.kinds("x")],
                         ["create", "start", "spawn", "exit", "flap"])

    def test_fields(self):
        """What an event has."""
        self.server.add("x", "exit 3", shell=True, flapping=PROCESS_ONCE)
        events = []
        for event in self.server.events("proc/x", since=0):
            events.append(event)
            if event["event"] == "stop":
                break
        self.assertEqual([event["event"] for event in events],
                         ["create", "start", "spawn", "exit", "stop"])
        more = {"spawn": {"pid", "os_pid"}, "exit": {"pid", "os_pid", "exit_status", "term_signal"}}
        for number, event in enumerate(events, 1):
            self.assertEqual(set(event),
                             {"event", "name", "id", "time"} | more.get(event["event"], set()))
            self.assertLess(abs(event["time"] - time.time()), TIMEOUT)
            self.assertRegex(event["id"], r"\A%d@[A-Za-z0-9]+\Z" % number)
        self.assertEqual((events[3]["exit_status"], events[3]["term_signal"]), (3, 0))


class ProcessTemplate(ProcessCase):
    """Every field of a template at work, in a real process."""

    def output(self, command, label="stdout", **options):
        """What a command wrote that runs once."""
        name = "once-%d" % next(self._barriers)
        self.server.ok("POST", "/processes", dict(command if isinstance(command, dict) else {"cmd": command}, name=name,
                                                  flapping=PROCESS_ONCE, **options))
        pid = self.spawned(name, 1)["pid"]
        data = self.poll(pid, label=label)
        self.exit_of(pid)
        self.server.ok("DELETE", "/processes/" + name)
        return data

    def environment(self, **options):
        """The environment of a process, as a dict."""
        data = self.output("env -0", **options)
        return dict(entry.split("=", 1) for entry in data.decode().split("\0") if entry)

    def setenv(self, name, value):
        """A variable of our own environment (None: none), for this test."""
        old = os.environ.get(name)

        def put(text):
            os.environ.pop(name, None)
            if text is not None:
                os.environ[name] = text
        self.addCleanup(put, old)
        put(value)

    def test_words(self):
        """What a command becomes: its words, variables, arguments, directory and program."""
        script = process_script(self, "#!/bin/sh\necho found in $PWD\n")
        folder = os.path.realpath(os.path.dirname(script))
        self.setenv("GAFFER_TEST_OWN", "ours")
        env = {"PORT": 80, "NESTED": "$PORT", "EMPTY": "", "SPACE": "a b", "PROGRAM": "printf"}
        found = "found in %s\n" % folder
        for cmd, options, output in (
                ("printf '%s|' a 'b c' \"d 'e'\" f\\ g '*' ';' '>' '|'", {},
                 "a|b c|d 'e'|f g|*|;|>|||"),
                ("printf '%s|' one \\\n two", {}, "one|two|"),
                ("printf", {"args": ["%s|", "a b", "$PORT"], "env": env}, "a b|80|"),
                ("printf", {"args": "%s| 'a b' c"}, "a b|c|"),
                ("printf '%s|' a b", {"args": []}, "a|b|"),
                ("$PROGRAM '%s|' $PORT ${PORT}1 $NESTED $UNSET_ ${UNSET_} $$PORT $$ $ '' $EMPTY "
                 "$SPACE x$PORT-", {"env": env}, "80|801|$PORT|$UNSET_|${UNSET_}|$PORT|$|$|||a b|x80-|"),
                ("printf %s $GAFFER_TEST_OWN", {}, "ours"),
                ("printf %s $GAFFER_TEST_OWN", {"os_env": False}, "$GAFFER_TEST_OWN"),
                ("echo $0 $# \"$1\" \"$2\" $((1+1)) $X | cat",
                 {"shell": True, "args": ["a b", "$X"], "env": {"X": "y"}}, "sh 2 a b $X 2 y\n"),
                ("echo \"$1\"", {"shell": True, "args": "'a b' c"}, "a b\n"),
                ("script", {"env": {"PATH": folder + ":/bin"}, "cwd": folder}, found),
                ("sh -c 'echo ours'", {"os_env": False}, "ours\n"),
                ("./script", {"cwd": folder}, found), ("pwd", {}, os.getcwd() + "\n")):
            with self.subTest(cmd):
                self.assertEqual(self.output(cmd, **options).decode(), output)

    def test_env(self):
        """Variables, strings or numbers, win over gaffer's own environment, or stand alone."""
        self.setenv("GAFFER_TEST_OWN", "ours")
        self.setenv("GAFFER_TOKEN", "secret")
        env = self.environment(env={"GAFFER_TEST_OWN": "theirs", "NUMBER": 5, "HALF": 0.5,
                                    "UMLAUT": "\u00e4\U0001f600", "EMPTY": ""})
        self.assertEqual([env.get(name) for name in ("GAFFER_TEST_OWN", "NUMBER", "HALF", "UMLAUT",
                                                     "EMPTY", "PATH", "GAFFER_TOKEN")],
                         ["theirs", "5", "0.5", "\u00e4\U0001f600", "", os.environ["PATH"], None])
        self.assertEqual(self.environment(env={"A": "b"}, os_env=False),
                         {"A": "b", "PYTHONUNBUFFERED": "1"})

    @unittest.skipUnless(os.geteuid() == 0, "only root may run something as another user")
    def test_identity(self):
        """uid, gid and the supplementary groups; nothing of gaffer's own is left."""
        nobody = pwd.getpwnam("nobody")
        group = next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, nobody.pw_gid))
        command = "echo $(id -ru) $(id -u) $(id -rg) $(id -g) $(id -G)"
        groups = os.getgrouplist("nobody", nobody.pw_gid)
        table = (
            ({"uid": "nobody"}, nobody.pw_uid, nobody.pw_gid, groups),
            ({"uid": nobody.pw_uid}, nobody.pw_uid, nobody.pw_gid, groups),
            ({"uid": str(nobody.pw_uid), "gid": group.gr_name}, nobody.pw_uid, group.gr_gid,
             os.getgrouplist("nobody", group.gr_gid)),
            ({"gid": group.gr_gid}, 0, group.gr_gid, [group.gr_gid]),
            ({"uid": 54321, "gid": 54322}, 54321, 54322, [54322]),
        )
        for options, uid, gid, groups in table:
            for streams in ([], ["three"]):             # these take another way to the same end
                with self.subTest(options=options, streams=streams):
                    words = list(map(int, self.output(command, shell=True, cwd="/", custom_streams=streams, **options).split()))
                    self.assertEqual(words[:4], [uid, uid, gid, gid])
                    self.assertEqual(set(words[4:]), set(groups))

    @unittest.skipUnless(os.geteuid() == 0, "only root may run something as another user")
    def test_a_user_with_groups(self):
        """All groups that the user database gives a user."""
        found = [(member, entry.gr_gid) for entry in grp.getgrall() for member in entry.gr_mem]
        if not found:
            self.skipTest("no user here has a supplementary group")
        name, gid = found[0]
        words = self.output("id -G", uid=name, cwd="/").split()
        self.assertIn(gid, list(map(int, words)))

    @unittest.skipUnless(os.geteuid() == 0, "only root may run something as another user")
    def test_a_file_that_the_user_may_not_execute(self):
        """What gaffer may execute, but the user of the template not, is refused; it never runs as gaffer's user."""
        script = process_script(self, "#!/bin/sh\nid -u\n", 0o700)
        answer = self.server.json("POST", "/processes", {"name": "x", "cmd": script, "uid": "nobody", "cwd": "/"})
        self.assertError(answer, 400, "invalid_process_info", script)
        self.assertEqual(self.server.ok("GET", "/processes"), [])

    def test_an_unknown_identity(self):
        """Refused, nothing is added."""
        for options in ({"uid": "no-such-user"}, {"gid": "no-such-group"}, {"uid": 2 ** 32 - 1}, {"gid": 2 ** 32 - 1},
                        {"uid": -1}):
            with self.subTest(options):
                answer = self.server.json("POST", "/processes", dict(options, name="x", cmd="true"))
                self.assertError(answer, 400, "invalid_process_info", list(options)[0])
        self.assertEqual(self.server.ok("GET", "/processes"), [])

    def test_numprocesses(self):
        """So many run, each a leader of a group and a session of its own."""
        pids = self.server.add("x", "sleep 60", numprocesses=3)
        self.assertEqual(len(pids), 3)
        status = self.server.ok("GET", "/status/x")
        self.assertEqual((status["running"], status["numprocesses"], status["max_processes"]), (3, 3, 3))
        for os_pid in status["os_pids"]:
            self.assertEqual((os.getpgid(os_pid), os.getsid(os_pid)), (os_pid, os_pid))
        self.assertEqual(self.server.add("none", "sleep 60", numprocesses=0), [])
        self.assertTrue(self.server.ok("GET", "/status/none")["active"])

    def test_numprocesses_are_kept(self):
        """One that is killed is replaced; the others go on."""
        pids = self.server.add("x", "sleep 60", numprocesses=3)
        self.server.ok("POST", "/processes/%d/_signal/KILL" % pids[1])
        self.assertEqual(self.spawned("x", 4)["pid"], 4)
        self.assertEqual(self.pids("x"), [pids[0], pids[2], 4])

    def test_redirect_output(self):
        """The first label is stdout's, the second stderr's; what has no label goes to /dev/null."""
        both = "echo out; echo err >&2"
        table = (
            ({}, {"stdout": b"out\n", "stderr": b"err\n"}),
            ({"redirect_output": ["o", "e"]}, {"o": b"out\n", "e": b"err\n"}),
            ({"redirect_output": ["o"]}, {"o": b"out\n"}),
            ({"redirect_output": ["stderr"]}, {"stderr": b"out\n"}),
            ({"redirect_output": ["all", "all"]}, {"all": b"out\nerr\n"}),
        )
        for number, (options, expected) in enumerate(table):
            with self.subTest(options):
                name = "x%d" % number
                self.server.add(name, both, shell=True, flapping=PROCESS_ONCE, **options)
                pid = self.spawned(name, 1)["pid"]
                self.assertEqual({label: self.poll(pid, label=label) for label in expected}, expected)
                self.assertEqual(self.server.json("GET", "/streams/%d/nothing" % pid)[1]["error"], "io_not_found")

    def test_no_output(self):
        """No labels: /dev/null, and nothing to read."""
        pid, = self.server.add("x", "sleep 60", redirect_output=[])
        os_pid = self.os_pid(pid)
        self.assertEqual([os.readlink("/proc/%d/fd/%d" % (os_pid, fd)) for fd in (0, 1, 2)], ["/dev/null"] * 3)
        self.assertError(self.server.json("GET", "/streams/%d/stdout" % pid), 400, "io_not_redirected")

    def test_merged_in_order(self):
        """The same label twice: one stream, in the order of the writes."""
        data = self.output(python("import os\nfor i in range(1000):\n    os.write(1 + i % 2, b'%d\\n' % i)"),
                           label="all", redirect_output=["all", "all"])
        self.assertEqual(data, b"".join(b"%d\n" % i for i in range(1000)))

    def test_lines_of_two_processes(self):
        """A template's stream: lines of two processes are never mixed within a line."""
        code = """
            import os
            me = os.read(0, 1)
            for i in range(2000):
                os.write(1, me * 10)
                os.write(1, me * 10 + b'\\n')
            """
        pids = self.server.add("x", python(code), numprocesses=2, redirect_input=True, flapping=dict(PROCESS_ONCE, attempts=2))
        for pid, me in zip(pids, b"ab"):
            self.server.ok("POST", "/streams/%d/stdin" % pid, bytes([me]))
        for _, event in zip(pids, self.server.events("exit", since=0)):
            self.assertEqual(event["exit_status"], 0)
        for pid in pids:
            self.poll(pid)
        self.server.ok("POST", "/processes/x/_stop?wait=true")
        lines = self.server.request("GET", "/streams/x/stdout?feed=longpoll&since=0")[2].split(b"\n")
        self.assertEqual(sorted(lines), [b""] + [b"a" * 20] * 2000 + [b"b" * 20] * 2000)

    def test_redirect_input(self):
        """A pipe to stdin and its end; without it /dev/null, and a write is refused."""
        pid, = self.server.add("x", "cat", redirect_input=True, flapping=PROCESS_ONCE)
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"hello ")
        self.poll(pid, b"hello ")
        self.server.ok("POST", "/streams/%d/ttin" % pid, b"world\x00\xff")
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        self.assertEqual(self.poll(pid), b"hello world\x00\xff")
        self.assertEqual(self.exit_of(pid)["exit_status"], 0)
        pid, = self.server.add("y", "sh -c 'cat; echo end; sleep 60'")
        self.assertEqual(self.poll(pid, b"end\n"), b"end\n")
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"!"), 403, "forbidden_write")

    def test_custom_streams(self):
        """Descriptors 3 and 4, both ways, with an end of file each way of its own."""
        pid, = self.server.add("x", python("""
            import os, socket
            print(os.environ['GAFFER_STREAMS'])
            for fd, word in ((3, b'three:'), (4, b'four:')):
                while True:
                    data = os.read(fd, 100)
                    os.write(fd, word + data)
                    if not data:
                        break
                os.close(fd)
            os.read(0, 1)
            """), custom_streams=["control", "data.1"], redirect_input=True, flapping=PROCESS_ONCE)
        self.poll(pid, b"control,data.1\n")
        for label, word in (("control", b"three:"), ("data.1", b"four:")):
            for text in (b"one", b"two"):
                self.server.ok("POST", "/streams/%d/%s" % (pid, label), text)
                self.poll(pid, word + text, label=label)
            self.server.ok("DELETE", "/streams/%d/%s" % (pid, label))
            self.assertEqual(self.poll(pid, label=label), word + b"one" + word + b"two" + word)
            self.assertError(self.server.json("POST", "/streams/%d/%s" % (pid, label), b"late"), 403, "forbidden_write")
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        self.assertEqual(self.exit_of(pid)["exit_status"], 0)
        self.assertEqual(self.poll("x", b"four:two", label="data.1"), b"four:onefour:twofour:")

    def test_many_custom_streams(self):
        """All sixteen stand where they should, whatever numbers gaffer's own ends had."""
        labels = ["s%d" % number for number in range(16)]
        code = "import os, signal\nfor i in range(16):\n    os.write(3 + i, b'%d' % i)\nsignal.sigwait([])"
        pid, = self.server.add("x", python(code), custom_streams=labels)
        for number, label in enumerate(labels):
            self.poll(pid, b"%d" % number, label=label)
        self.stop("x", self.spawned("x", 1)["os_pid"])
        for number, label in enumerate(labels):
            self.assertEqual(self.poll(pid, label=label), b"%d" % number)

    def test_descriptors_of_the_child(self):
        """Nothing of gaffer's leaks into it."""
        code = "import os\nfound = os.listdir('/proc/self/fd')\nos.write(1, ' '.join(sorted(found, key=int)).encode())"
        self.assertEqual(self.output(python(code)), b"0 1 2 3")              # 3 is the directory itself
        self.assertEqual(self.output(python(code), custom_streams=["a", "b"], redirect_input=True), b"0 1 2 3 4 5")

    def test_signals_of_the_child(self):
        """It begins with the default handlers and no signal blocked."""
        data = self.output("grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status")
        self.assertEqual(re.findall(rb"Sig(Blk|Ign):\s*0*([0-9a-f]+)\n", data), [(b"Blk", b"0"), (b"Ign", b"0")])

    def test_graceful_timeout(self):
        """SIGKILL after so many seconds, not before."""
        pid, = self.server.add("x", PROCESS_STUBBORN, graceful_timeout=0.3)
        self.poll(pid, b"ready\n")
        self.stop("x", self.os_pid(pid))
        exited, stopped = self.exit_of(pid), self.server.wait_event("stop_pid")
        self.assertEqual(exited["term_signal"], signal.SIGKILL)
        self.assertGreater(exited["time"] - stopped["time"], 0.29)

    def test_no_graceful_timeout(self):
        """0: SIGTERM and SIGKILL at once."""
        pid, = self.server.add("x", PROCESS_STUBBORN, graceful_timeout=0)
        self.poll(pid, b"ready\n")
        self.stop("x", self.os_pid(pid))
        self.assertEqual(self.exit_of(pid)["term_signal"], signal.SIGKILL)

    def test_unbuffered(self):
        """PYTHONUNBUFFERED=1 where output is redirected and the variable is not set."""
        self.setenv("PYTHONUNBUFFERED", None)
        self.assertEqual(self.environment()["PYTHONUNBUFFERED"], "1")
        self.assertEqual(self.environment(env={"PYTHONUNBUFFERED": ""})["PYTHONUNBUFFERED"], "")
        path = os.path.join(tempfile.mkdtemp(), "env")
        self.addCleanup(os.rmdir, os.path.dirname(path))
        self.addCleanup(os.unlink, path)
        self.server.add("x", "env > $FILE", shell=True, env={"FILE": path}, redirect_output=[], flapping=PROCESS_ONCE)
        self.exit_of(self.spawned("x", 1)["pid"])
        with open(path) as file:
            self.assertNotIn("PYTHONUNBUFFERED", file.read())

    def test_a_python_program_is_not_silent(self):
        """What it prints can be read while it runs."""
        pid, = self.server.add("x", PYTHON, args=["-c", "print('now'); import signal; signal.sigwait([])"])
        self.poll(pid, b"now\n")

    def test_detach(self):
        """Survives gaffer's stop, with its output on /dev/null; labels or stdin with it are refused."""
        for options in ({"redirect_output": ["stdout"]}, {"redirect_input": True}, {"custom_streams": ["a"]}):
            answer = self.server.json("POST", "/processes", dict(options, name="x", cmd="sleep 60", detach=True))
            self.assertError(answer, 400, "invalid_process_info", list(options)[0])
        pid, = self.server.add("x", "sleep 60", detach=True)
        other, = self.server.add("y", "sleep 60")
        os_pid, other = self.os_pid(pid), self.os_pid(other)
        try:
            self.server.stop_all()
            self.assertTrue(alive(os_pid))
            self.assertFalse(alive(other))
            self.assertEqual([os.readlink("/proc/%d/fd/%d" % (os_pid, fd)) for fd in (0, 1, 2)], ["/dev/null"] * 3)
        finally:
            os.kill(os_pid, signal.SIGKILL)
            os.waitpid(os_pid, 0)

    def test_detached_ones_are_stopped_by_name(self):
        """Only gaffer's own end spares them."""
        pid, = self.server.add("x", "sleep 60", detach=True)
        self.stop("x", self.os_pid(pid))
        self.assertEqual(self.exit_of(pid)["term_signal"], signal.SIGTERM)

    def test_shown(self):
        """The template as it was given, defaults filled in; by pid with pid and os_pid."""
        self.server.add("x", "sleep 60", env={"A": 1}, priority=3)
        template = self.server.ok("GET", "/processes/x")
        self.assertEqual(template, dict(PureTemplates.DEFAULTS, name="x", cmd="sleep 60", env={"A": 1},
                                        priority=3))
        process = self.server.ok("GET", "/processes/1")
        os_pid = process.pop("os_pid")
        self.assertEqual(process, dict(template, pid=1))
        self.assertTrue(alive(os_pid))


class ProcessActions(ProcessCase):
    """What start, stop, restart, scale, update and delete mean."""

    def add_slow(self, name="x", **options):
        """A process that ignores SIGTERM, ready. Returns (pid, os_pid)."""
        pid, = self.server.add(name, PROCESS_STUBBORN, **dict({"graceful_timeout": 60}, **options))
        self.poll(pid, b"ready\n")
        return pid, self.os_pid(pid)

    def test_the_slot_is_kept(self):
        """start after stop, restart and update answer at once; the new process follows when the old one is gone."""
        table = (("a", "POST", "/_start", None), ("b", "POST", "/_restart", None),
                 ("c", "PUT", "", {"cmd": "sleep 61", "start": True}))
        for name, method, path, body in table:
            with self.subTest(method + path):
                pid, os_pid = self.add_slow(name)
                self.server.ok("POST", "/processes/%s/_stop" % name)
                self.assertEqual(self.pids(name), [])
                self.server.ok(method, "/processes/" + name + path, body)
                status = self.server.ok("GET", "/status/" + name)
                self.assertEqual((status["active"], status["running"], status["stopping"]), (True, 0, 1))
                self.assertIn(self.kinds(name)[-1][0], ("start", "update"))
                self.server.ok("POST", "/processes/%d/_signal/KILL" % pid)
                self.assertEqual(self.spawned(name, 2)["pid"], pid + 1)
                self.assertEqual(self.kinds(name)[-2:], [("exit", pid), ("spawn", pid + 1)])
                self.assertIsNone(process_state(os_pid))

    def test_stop_start_stop(self):
        """The last wish counts."""
        pid, os_pid = self.add_slow()
        for action in ("stop", "start", "stop", "start", "stop"):
            self.server.ok("POST", "/processes/x/_" + action)
        self.server.ok("POST", "/processes/%d/_signal/KILL" % pid)
        self.exit_of(pid)
        self.stop("x", os_pid)
        self.assertEqual([kind for kind, _ in self.kinds("x")].count("spawn"), 1)

    def test_replaced_one_by_one(self):
        """No more than numprocesses at any time, those that are stopping included."""
        self.server.add("x", "sleep 60", numprocesses=3)
        self.server.ok("POST", "/processes/x/_restart?wait=true")
        self.server.ok("PUT", "/processes/x", {"cmd": "sleep 61", "numprocesses": 3})
        self.server.ok("POST", "/processes/x/_restart?wait=true")
        living, most = 0, 0
        for kind, _ in self.kinds("x"):
            living += {"spawn": 1, "exit": -1}.get(kind, 0)
            most = max(most, living)
        self.assertEqual((living, most), (3, 3))

    def test_oldest_ends(self):
        """Scaling down ends the oldest."""
        pids = self.server.add("x", "sleep 60", numprocesses=4)
        self.assertEqual(self.server.ok("POST", "/processes/x/_sub/3")["numprocesses"], 1)
        self.assertEqual(self.pids("x"), pids[3:])
        self.assertEqual(self.server.ok("POST", "/processes/x/_sub/9")["numprocesses"], 0)
        self.assertEqual(self.pids("x"), [])
        self.assertEqual(self.server.ok("GET", "/processes/x")["numprocesses"], 0)
        self.assertEqual([pid for kind, pid in self.kinds("x") if kind == "reap"], pids)
        self.assertEqual(self.server.ok("POST", "/processes/x/_add/2")["numprocesses"], 2)
        until(lambda: self.pids("x") == [5, 6], "two new processes")

    def test_scale_a_stopped_one(self):
        """Only the number changes."""
        self.server.add("x", "sleep 60", start=False)
        self.assertEqual(self.server.ok("POST", "/processes/x/_add/2")["numprocesses"], 3)
        self.assertEqual(self.kinds("x"), [("create", None), ("update", None)])
        self.server.ok("POST", "/processes/x/_start")
        self.assertEqual(self.pids("x"), [1, 2, 3])

    def test_scale_limits(self):
        """Never above 1,000; n is at least 1."""
        self.server.add("x", "sleep 60", start=False)
        self.assertEqual(self.server.ok("POST", "/processes/x/_add/5000")["numprocesses"], 1000)
        for number in ("0", "-1", "x", "1.5"):
            self.assertError(self.server.json("POST", "/processes/x/_add/" + number), 400, "bad_value")

    def test_put(self):
        """start left out: as it was. Another name: 400. numprocesses left out: its default."""
        self.server.add("x", "sleep 60", numprocesses=2)
        self.server.ok("PUT", "/processes/x", {"cmd": "sleep 61"})
        until(lambda: self.pids("x") == [3], "the new process")
        self.assertEqual(self.server.ok("GET", "/processes/3")["cmd"], "sleep 61")
        self.server.ok("POST", "/processes/x/_stop?wait=true")
        self.server.ok("PUT", "/processes/x", {"cmd": "sleep 62"})
        self.assertFalse(self.server.ok("GET", "/status/x")["active"])
        self.assertTrue(self.server.ok("GET", "/processes/x")["start"], "as it was given")
        self.assertEqual(self.pids("x"), [])
        self.server.ok("POST", "/processes", {"name": "y", "cmd": "sleep 60", "start": False})
        self.server.ok("POST", "/processes/y/_start")
        self.server.ok("PUT", "/processes/y", {"cmd": "sleep 61"})
        self.assertTrue(self.server.ok("GET", "/status/y")["active"])
        self.assertFalse(self.server.ok("GET", "/processes/y")["start"], "as it was given")
        self.server.ok("DELETE", "/processes/y")
        answer = self.server.json("PUT", "/processes/x", {"name": "y", "cmd": "true"})
        self.assertError(answer, 400, "invalid_process_info", "name")
        self.server.ok("POST", "/processes/x", {"name": "x", "cmd": "sleep 63", "start": True})
        self.assertEqual(len(self.pids("x")), 1)
        self.server.ok("PUT", "/processes/x", {"cmd": "sleep 64", "start": False})
        self.assertFalse(self.server.ok("GET", "/status/x")["active"])

    def test_put_of_what_cannot_run(self):
        """Refused while it is active, and nothing has changed."""
        pids = self.server.add("x", "sleep 60")
        self.assertError(self.server.json("PUT", "/processes/x", {"cmd": "/nowhere"}), 400, "invalid_process_info")
        self.assertEqual((self.pids("x"), self.server.ok("GET", "/processes/x")["cmd"]), (pids, "sleep 60"))
        self.assertEqual(self.kinds("x")[-1], ("spawn", 1))

    def test_stop_of_a_pid(self):
        """It is replaced as soon as it is gone, without a delay, also many times; DELETE is the same."""
        pid, = self.server.add("x", "sleep 60")
        for number in range(4):
            method, path = (("POST", "/processes/%d/_stop?wait=true"), ("DELETE", "/processes/%d"))[number % 2]
            self.server.ok(method, path % pid)
            self.assertEqual(self.spawned("x", number + 2)["pid"], pid + 1)
            self.assertError(self.server.json("POST", "/processes/%d/_stop" % pid), 404, "not_found")
            pid += 1
        status = self.server.ok("GET", "/status/x")
        self.assertEqual((status["state"], status["pids"]), ("running", [pid]))

    def test_wait(self):
        """?wait answers when it is done, else 504; it goes on."""
        pid, os_pid = self.add_slow()
        begin = time.monotonic()
        self.assertError(self.server.json("POST", "/processes/x/_stop?wait=0.1"), 504, "wait_timeout")
        self.assertGreaterEqual(time.monotonic() - begin, 0.1)
        self.assertTrue(alive(os_pid))
        self.server.ok("POST", "/processes/%d/_signal/KILL" % pid)
        self.server.ok("POST", "/processes/x/_stop?wait=%d" % TIMEOUT)
        self.assertIsNone(process_state(os_pid))
        self.server.ok("POST", "/processes/x/_start?wait=true")
        self.assertEqual(self.pids("x"), [pid + 1])
        self.poll(pid + 1, b"ready\n")
        self.assertError(self.server.json("POST", "/processes/x/_restart?wait=0.05"), 504, "wait_timeout")
        self.server.ok("POST", "/processes/%d/_signal/KILL" % (pid + 1))
        self.server.ok("POST", "/processes/x/_start?wait=true")
        self.assertEqual(self.pids("x"), [pid + 2])

    def test_wait_for_the_group(self):
        """?wait of a pid waits for the last process of its group too."""
        pid, = self.server.add("x", '(trap "" TERM; echo ready; exec sleep 60) & wait', shell=True, graceful_timeout=0.1)
        os_pid = self.os_pid(pid)
        self.poll(pid, b"ready\n")
        self.server.ok("POST", "/processes/%d/_stop?wait=true" % pid)
        self.assertEqual(process_group(os_pid), [])

    def test_the_group_ends_before_the_next(self):
        """A leader that exits by itself is replaced when nothing of its group is left."""
        self.server.add("x", python("""
            import os, signal
            if os.fork() == 0:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                os.write(1, b'ready\\n')
                signal.sigwait([signal.SIGTERM])
                os.write(1, b'old ends\\n')
                os._exit(0)
            os.write(1, b'leader\\n')
            os.read(0, 1)
            """), redirect_input=True)
        first = self.spawned("x", 1)
        self.poll(1, b"ready\n")
        self.server.ok("DELETE", "/streams/1/stdin")
        self.spawned("x", 2)
        self.assertEqual(process_group(first["os_pid"]), [])
        self.assertTrue(self.poll(1).endswith(b"old ends\n"))

    def test_delete(self):
        """Stopped and forgotten: the name is free at once, its windows are gone, the old processes end."""
        pid, os_pid = self.add_slow(graceful_timeout=0.2)
        self.server.ok("DELETE", "/processes/x")
        self.assertEqual(self.server.ok("GET", "/processes"), [])
        self.assertError(self.server.json("GET", "/status/x"), 404, "not_found")
        self.assertEqual(self.server.add("x", "sleep 60"), [pid + 1])
        self.exit_of(pid)
        self.assertError(self.server.json("GET", "/streams/%d/stdout?since=0" % pid), 404, "not_found")
        self.assertEqual(self.pids("x"), [pid + 1])
        self.assertIsNone(process_state(os_pid))

    def test_pids_are_never_reused(self):
        """Also over delete, stop, and what could not be started."""
        seen = []
        for number in range(5):
            seen += self.server.add("x", "sleep 60", numprocesses=2)
            self.server.json("POST", "/processes", {"name": "y", "cmd": "/nowhere"})
            if number % 2:
                self.server.ok("POST", "/processes/x/_stop?wait=true")
            self.server.ok("DELETE", "/processes/x")
        self.assertEqual(seen, list(range(1, 11)))

    def test_last_words(self):
        """The windows of the last 16 exits are readable, until the template is deleted."""
        self.server.add("x", "cat", redirect_input=True)
        for pid in range(1, 18):
            self.spawned("x", pid)
            self.server.ok("POST", "/streams/%d/stdin" % pid, b"I am %d\n" % pid)
            self.poll(pid, b"\n")
            self.server.ok("POST", "/processes/%d/_stop" % pid)
            self.exit_of(pid)
        self.spawned("x", 18)
        for pid in range(2, 18):
            self.assertEqual(self.poll(pid), b"I am %d\n" % pid)
        self.server.ok("POST", "/processes/x/_stop?wait=true")
        self.assertEqual(self.poll(17), b"I am 17\n")
        self.server.ok("DELETE", "/processes/x")
        for pid in range(1, 19):
            self.assertError(self.server.json("GET", "/streams/%d/stdout?since=0" % pid), 404, "not_found")

    def test_last_words_of_an_update(self):
        """They stay over a PUT."""
        pid, = self.server.add("x", "cat", redirect_input=True)
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"old")
        self.poll(pid, b"old")
        self.server.ok("PUT", "/processes/x", {"cmd": "sleep 60"})
        self.spawned("x", 2)
        self.assertEqual(self.poll(pid), b"old")

    def test_signals(self):
        """To each process; with ?group=true to the groups."""
        pids = self.server.add("x", python("""
            import os, signal
            signals = [signal.SIGUSR1, signal.SIGUSR2]
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            leader = os.fork()
            os.write(1, b'leader\\n' if leader else b'child\\n')
            while True:
                ending = signal.sigwait(signals) == signal.SIGUSR2
                os.write(1, b'end\\n' if ending else b'%d\\n' % bool(leader))
            """), numprocesses=2)
        for pid in pids:
            self.poll(pid, b"child\n")
            self.poll(pid, b"leader\n")
        for name in ("USR1", "SIGUSR1", str(int(signal.SIGUSR1)), "usr1"):
            self.server.ok("POST", "/processes/x/_signal/" + name)
            for pid in pids:
                self.server.ok("GET", "/processes/%d" % pid)
        self.server.ok("POST", "/processes/%d/_signal/USR1?group=true" % pids[0])
        self.poll(pids[0], b"0\n")                                  # only the group's signal reaches the child
        self.server.ok("POST", "/processes/x/_signal/USR2?group=true")
        seen = [b""]

        def both_have_ended():
            seen.append(self.poll(pids[1], b"end\n"))
            return seen[-1].count(b"end\n") == 2
        until(both_have_ended)
        self.assertNotIn(b"0\n", seen[-1])
        self.assertIn(b"1\n", self.poll(pids[1], b"end\n"))
        for name, code in (("NOPE", "bad_value"), ("0", "bad_value"), ("", "no_signal_number")):
            path = "/processes/x/_signal" + ("/" + name if name else "")
            self.assertError(self.server.json("POST", path), 400, code)


class ProcessEmbedded(ProcessCase):
    """The Manager as a library: its methods, apps and end."""

    def collect(self, pattern=""):
        """A queue of the events to come."""
        events = queue.Queue()
        subscription = self.server.manager.subscribe(pattern, lambda kind, event: events.put((kind, event)))
        self.addCleanup(subscription.close)
        return events

    def ended(self):
        """run() has returned."""
        self.server._thread.join(TIMEOUT)
        self.assertFalse(self.server._thread.is_alive())

    def test_signals_that_the_calling_thread_blocks(self):
        """It may have reasons. Its processes have none."""
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
        try:
            server = Running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self.addCleanup(server.stop_all)
        server.add("x", "grep SigBlk /proc/self/status; sleep 1000", shell=True)
        _, _, data = server.request("GET", "/streams/1/stdout?since=0")
        self.assertEqual(data, b"SigBlk:\t" + b"0" * 16 + b"\n")

    def test_one_that_does_not_die(self):
        """As if it waited for a device: a second stop ends gaffer, and tells what is left."""
        pid, = self.server.add("x", "sleep 1000")
        os_pid = self.os_pid(pid)
        with unittest.mock.patch("gaffer.os.killpg"), unittest.mock.patch("gaffer.STOP_KILL", 0.1):
            self.server.manager.stop()
            with self.assertLogs("gaffer", "WARNING") as logged:
                self.server.manager.stop(kill=True)
                self.ended()
        self.assertTrue(alive(os_pid))
        self.assertEqual([record.getMessage() for record in logged.records], [
            "x (pid 1): os pid %d was killed and does not end: it is left to itself" % os_pid])
        os.kill(os_pid, signal.SIGKILL)
        os.waitpid(os_pid, 0)

    def test_stop_in_reverse_order(self):
        """The newest first, each when the one after it is gone; then run() returns and nothing is left."""
        self.server.add("a", "sleep 60", numprocesses=2)
        self.server.add("b", "sleep 60")
        os_pids = [self.os_pid(pid) for pid in (1, 2, 3)]
        events = self.collect()
        self.server.manager.stop()
        self.ended()
        found = [(kind, event.get("pid")) for kind, event in events.queue]
        self.assertEqual(found, [("stop", None)] * 2 + [(kind, pid) for pid in (3, 2, 1) for kind in ("stop_pid", "exit")])
        self.assertEqual([process_state(os_pid) for os_pid in os_pids], [None] * 3)

    def test_one_that_is_slow_to_stop(self):
        """It does not hold the others; meanwhile nothing can be changed; a second stop kills."""
        self.server.add("a", "sleep 60")
        slow, = self.server.add("b", PROCESS_STUBBORN, graceful_timeout=60)
        os_pid = self.os_pid(slow)
        self.poll(slow, b"ready\n")
        events = self.collect("exit")
        self.server.manager.stop()
        self.assertEqual(events.get(timeout=TIMEOUT)[1]["name"], "a")
        self.assertTrue(alive(os_pid))
        self.assertError(self.server.json("POST", "/processes", {"name": "c", "cmd": "true"}), 503, "stopping")
        self.assertError(self.server.json("POST", "/processes/a/_start"), 503, "stopping")
        self.server.manager.stop(kill=True)
        self.assertEqual(events.get(timeout=TIMEOUT)[1]["term_signal"], signal.SIGKILL)
        self.server.stop_all()
        self.assertIsNone(process_state(os_pid))

    def test_stop_while_one_is_stopping(self):
        """A template that was stopped just before is waited for too."""
        pid, = self.server.add("x", PROCESS_STUBBORN, graceful_timeout=0.3)
        self.poll(pid, b"ready\n")
        os_pid = self.os_pid(pid)
        self.server.ok("POST", "/processes/x/_stop")
        self.server.manager.stop()
        self.ended()
        self.assertEqual(process_group(os_pid), [])

    def test_after_the_end(self):
        """Every method says that gaffer has stopped; none hangs."""
        manager = self.server.manager
        self.server.stop_all()
        for function in (lambda: manager.add_process("x", "true"), lambda: manager.stop_template("x"),
                         lambda: manager.get_process("x"), lambda: manager.subscribe("", print)):
            with self.assertRaises(gaffer.Stopping):
                function()
        manager.stop()

    def test_a_wait_that_begins_after_the_end(self):
        """The change that it follows was made."""
        self.server.stop_all()
        self.assertTrue(self.server.manager.block_until(lambda: False, TIMEOUT))

    def test_a_stop_from_a_callback(self):
        """stop() may be called on the loop's own thread."""
        self.server.add("x", "sleep 60")
        self.server.manager.subscribe("create", lambda kind, event: self.server.manager.stop())
        self.server.manager.add_process("y", "sleep 60")
        self.ended()

    def test_subscribe(self):
        """callback(type, event), for what the pattern matches, until close()."""
        patterns = ("", ".", "spawn", "proc/x", "proc/x/exit", "proc/nothing", "create")
        queues = {pattern: self.collect(pattern) for pattern in patterns}
        self.server.manager.add_process("x", "true", flapping=PROCESS_ONCE)
        self.server.wait_event("stop")
        self.server.manager.add_process("y", "sleep 60")
        self.server.manager.add_process("barrier", "true", start=False)
        while queues["create"].get(timeout=TIMEOUT)[1]["name"] != "barrier":
            pass                                    # it was told last, of the last event
        found = {}
        for pattern in patterns:
            self.assertTrue(all(kind == event["event"] for kind, event in queues[pattern].queue))
            found[pattern] = [(event["name"], kind) for kind, event in queues[pattern].queue]
        of_x = [("x", kind) for kind in ("create", "start", "spawn", "exit", "stop")]
        self.assertEqual(found[""], of_x + [("y", "create"), ("y", "start"), ("y", "spawn"), ("barrier", "create")])
        self.assertEqual(found["."], found[""])
        self.assertEqual(found["spawn"], [("x", "spawn"), ("y", "spawn")])
        self.assertEqual(found["proc/x"], of_x)
        self.assertEqual(found["proc/x/exit"], [("x", "exit")])
        self.assertEqual(found["proc/nothing"], [])
        for pattern in ("exits", "proc", "proc/x/exits", "a/b/c/d"):
            with self.assertRaises(gaffer.BadEventType):
                self.server.manager.subscribe(pattern, print)

    def test_a_subscription_that_is_closed(self):
        """No further call."""
        first, second = [], self.collect()
        subscription = self.server.manager.subscribe("", lambda kind, event: first.append(kind))
        self.server.manager.add_process("x", "true", start=False)
        second.get(timeout=TIMEOUT)
        until(lambda: first, "the first call")
        subscription.close()
        subscription.close()
        self.server.manager.delete_process("x")
        self.assertEqual(second.get(timeout=TIMEOUT)[0], "delete")
        self.assertEqual(first, ["create"])

    def test_a_callback_that_fails(self):
        """It is logged; gaffer and the other callbacks go on."""
        def fail(*args):
            raise RuntimeError("a fault of the user's")
        subscription = self.server.manager.subscribe("", fail)
        self.addCleanup(subscription.close)
        events = self.collect()
        with self.assertLogs("gaffer", logging.ERROR) as logs:
            self.server.manager.add_process("x", "cat", redirect_input=True)
            for kind in ("create", "start", "spawn"):
                self.assertEqual(events.get(timeout=TIMEOUT)[0], kind)
            output = queue.Queue()
            self.server.manager.get_process(1).monitor_io("stdout", fail)
            self.server.manager.get_process(1).monitor_io("stdout", lambda label, event: output.put(event["data"]))
            self.server.manager.write(1, "stdin", b"hello")
            self.assertEqual(output.get(timeout=TIMEOUT), b"hello")
        self.assertIn("a fault of the user's", logs.output[0])

    def test_get_process(self):
        """By pid one process, by name whatever runs; monitor_io, write, signal, stop, info."""
        manager = self.server.manager
        manager.add_process("x", "cat", redirect_input=True)
        by_pid, by_text, by_name = manager.get_process(1), manager.get_process("1"), manager.get_process("x")
        self.assertEqual((by_pid.name, by_pid.pid, by_name.name, by_name.pid), ("x", 1, "x", None))
        self.assertEqual((by_pid.os_pid, by_text.os_pid), (self.os_pid(1),) * 2)
        self.assertEqual(by_pid.info(), dict(by_name.info(), pid=1, os_pid=by_pid.os_pid))
        one, all_ = queue.Queue(), queue.Queue()
        monitor = by_pid.monitor_io("stdout", lambda label, event: one.put((label, event)))
        by_name.monitor_io("stdout", lambda label, event: all_.put((label, event)))
        by_pid.write(b"hello\xff\n")
        label, event = one.get(timeout=TIMEOUT)
        self.assertEqual((label, event["event"], event["data"], event["name"], event["pid"], event["os_pid"]),
                         ("stdout", "stdout", b"hello\xff\n", "x", 1, by_pid.os_pid))
        label, event = all_.get(timeout=TIMEOUT)
        self.assertEqual((label, event["data"], event["name"]), ("stdout", b"hello\xff\n", "x"))
        monitor.close()
        by_pid.write(b"more\n")
        self.assertEqual(all_.get(timeout=TIMEOUT)[1]["data"], b"more\n")
        self.assertTrue(one.empty())
        by_pid.signal("KILL")
        self.assertEqual(self.exit_of(1)["term_signal"], signal.SIGKILL)
        second = manager.get_process(self.spawned("x", 2)["pid"])
        second.write(b"second")
        self.assertEqual(all_.get(timeout=TIMEOUT)[1]["data"], b"second")
        second.stop()
        self.spawned("x", 3)
        by_name.stop()
        self.assertFalse(self.server.ok("GET", "/status/x")["active"])
        for target in (1, "1", 99, "nothing", "9" * 100):
            with self.assertRaises(gaffer.NotFound):
                manager.get_process(target)
        with self.assertRaises(gaffer.IoNotFound):
            by_name.monitor_io("nothing", print)

    def test_write(self):
        """All or nothing; what cannot be written says why."""
        manager = self.server.manager
        manager.add_process("x", "sleep 60", redirect_input=True)
        manager.add_process("y", "sleep 60")
        manager.write(1, "stdin", b"1" * 1024 * 1024)
        with self.assertRaises(gaffer.StdinFull):
            manager.write(1, "stdin", b"2" * 1024 * 1024)
        for target, label, error in ((2, "stdin", gaffer.ForbiddenWrite), (1, "nothing", gaffer.IoNotFound),
                                     (3, "stdin", gaffer.NotFound),
                                     ("y", "stdin", gaffer.ForbiddenWrite), ("z", "stdin", gaffer.NotFound)):
            with self.subTest(target=target, label=label), self.assertRaises(error):
                manager.write(target, label, b"!")
        manager.get_process("x").write(b"!")

    def test_add_process(self):
        """A template as a dict too; faults raise, nothing is added."""
        manager = self.server.manager
        manager.add_process({"name": "x", "cmd": "sleep 60", "numprocesses": 2})
        self.assertEqual(self.pids("x"), [1, 2])
        invalid = gaffer.InvalidProcessInfo
        for name, cmd, options, error in (("x", "true", {}, gaffer.Conflict), ("y", "/nowhere", {}, invalid),
                                          ("y", None, {}, invalid), ("y", "true", {"comand": 1}, invalid)):
            with self.assertRaises(error):
                manager.add_process(name, cmd, **options)
        self.assertEqual(self.server.ok("GET", "/processes"), ["x"])

    def test_reaped_by_somebody_else(self):
        """Another part of the program has taken the exit status: an exit all the same."""
        def steal():
            os.kill(os_pid, signal.SIGKILL)
            os.waitpid(os_pid, 0)
        pid, = self.server.add("x", "sleep 60")
        os_pid = self.os_pid(pid)
        with self.assertLogs("gaffer", logging.WARNING) as logs:
            self.server.manager.loop.call(steal)
            self.exit_of(pid)
        self.assertIn(str(os_pid), logs.output[0])
        self.assertEqual(self.spawned("x", 2)["pid"], 2)

    def test_priority(self):
        """The order of the starts at run(): 0 first, those without one last, else as they were added."""
        started = []
        manager = gaffer.Manager()

        def spawned(kind, event):
            started.append(event["name"])
            if len(started) == 5:
                manager.stop(kill=True)
        manager.subscribe("spawn", spawned)
        for name, priority in (("none", None), ("two", 2), ("zero", 0), ("minus", -1), ("two-b", 2)):
            manager.add_process(name, "sleep 60", priority=priority)
        manager.add_process("not-started", "sleep 60", priority=0, start=False)
        manager.run()
        self.assertEqual(started, ["minus", "zero", "two", "two-b", "none"])

    def test_apps(self):
        """start(loop, manager) in order, stop() in reverse order; stop and restart may be missing."""
        calls = []

        class Small:
            def start(self, loop, manager):
                calls.append(("start", loop is manager.loop))

        class Whole(Small):
            def stop(self):
                calls.append("stop")

            def restart(self):
                calls.append("restart")

        def spawned(kind, event):
            if event["pid"] == 1:
                manager.restart()
            else:
                manager.stop()
        manager = gaffer.Manager(apps=[Small(), Whole()])
        manager.subscribe("spawn", spawned)
        manager.add_process("x", "sleep 60")
        manager.run()
        self.assertEqual(calls, [("start", True), ("start", True), "restart", "stop"])

    def test_an_app_that_fails(self):
        """run() raises what its start() raised; what was started before has stopped."""
        seen = []

        class Good:
            def start(self, loop, manager):
                manager.add_process("x", "sleep 60")
                seen.append(manager.get_process(1).os_pid)

            def stop(self):
                seen.append("stopped")

        class Bad:
            def start(self, loop, manager):
                raise OSError("no such luck")
        with self.assertRaisesRegex(OSError, "no such luck"):
            gaffer.Manager([Good(), Bad()]).run()
        self.assertEqual(seen[1:], ["stopped"])
        self.assertIsNone(process_state(seen[0]))

    def test_what_cannot_start_at_run(self):
        """A template whose program has gone between add and run does not keep the others from running."""
        script = process_script(self, "#!/bin/sh\nexec sleep 60\n")
        manager = gaffer.Manager()
        manager.add_process("x", script)
        manager.add_process("y", "sleep 60")
        os.chmod(script, 0o644)
        manager.subscribe("spawn", lambda kind, event: manager.stop())
        with self.assertLogs("gaffer", logging.WARNING) as logs:
            manager.run()
        self.assertIn("x cannot be started", logs.output[0])


class ProcessLife(ProcessCase):
    """The steps of a process's life: what acts comes before what informs, and none takes long."""

    def test_many_starts_leave_room_for_others(self):
        """The answer comes when all have been spawned; others are answered in between."""
        manager, seen = self.server.manager, set()

        def count():
            return len(manager.templates["x"].processes) if "x" in manager.templates else 0
        with unittest.mock.patch.object(gaffer, "SPAWN_TIME", 0), \
                concurrent.futures.ThreadPoolExecutor(1) as pool:
            added = pool.submit(self.server.add, "x", "sleep 60", numprocesses=40)
            while not added.done():
                seen.add(manager.loop.call(count))
        self.assertEqual(len(added.result()), 40)
        self.assertGreater(len(seen - {0, 1, 40}), 5)
        self.assertEqual(self.server.ok("POST", "/processes/x/_add/9"), {"ok": True, "numprocesses": 49})
        self.assertEqual(len(self.pids("x")), 49)
        self.assertEqual([pid for kind, pid in self.kinds("x") if kind == "spawn"], list(range(1, 50)))

    def test_a_stop_amid_many_starts(self):
        """Nothing is spawned any more, and whoever waits is answered."""
        manager = self.server.manager
        with unittest.mock.patch.object(gaffer, "SPAWN_TIME", 0), \
                concurrent.futures.ThreadPoolExecutor(2) as pool:
            for name, end in (("x", lambda: manager.stop_template("x")),
                              ("y", lambda: manager.delete_process("y")), ("z", manager.stop)):
                added = pool.submit(manager.add_process, name, "sleep 60", numprocesses=1000)
                self.server.wait_event("proc/%s/spawn" % name)
                end()
                self.assertEqual(added.result(TIMEOUT).name, name)
        self.server._thread.join(TIMEOUT)
        self.assertLess(manager._next_pid, 2000)

    def test_one_listing_serves_all_groups(self):
        """Groups that outlive their leaders are listed together."""
        class Table(gaffer.ProcfsTable):
            wanted = []

            def groups(self, wanted):
                self.wanted.append(len(wanted))
                return super().groups(wanted)
        server = Running(process_table=Table())
        self.addCleanup(server.stop_all)
        server.add("x", '(trap "" TERM; echo ready; exec sleep 60) & wait', shell=True,
                   graceful_timeout=0.3, numprocesses=30)
        answer, events = server.sse("/streams/x/stdout?feed=eventsource&since=0")
        self.assertEqual([next(events)["data"] for _ in range(30)], ["ready"] * 30)
        answer.connection.close()
        groups = server.ok("GET", "/status/x")["os_pids"]
        server.ok("POST", "/processes/x/_stop?wait=true")
        self.assertEqual([process_group(group) for group in groups], [[]] * 30)
        self.assertEqual(max(Table.wanted), 30)
        self.assertLess(len(Table.wanted), 60)

    def test_what_only_informs_stops_nothing(self):
        """Neither a look at descendants that fails nor an observer of events that does."""
        class Table(gaffer.ProcfsTable):
            def escaped(self, os_pid, group):
                raise FileNotFoundError("ps")

            def orphans(self, since, ours):
                raise OSError("EMFILE")
        server = Running(process_table=Table())
        self.addCleanup(server.stop_all)
        server.add("x", "sleep 60", numprocesses=2)
        server.add("y", "cat", redirect_input=True)
        groups = server.ok("GET", "/status/x")["os_pids"]
        append = server.manager.events.append

        def fail(event):
            append(event)
            raise RuntimeError("an observer")
        with self.assertLogs("gaffer", logging.ERROR) as logs, \
                unittest.mock.patch.object(server.manager.events, "append", fail):
            server.ok("POST", "/processes/x/_stop?wait=true")
            server.ok("DELETE", "/streams/y/stdin")
            until(lambda: server.ok("GET", "/status/y")["pids"] == [4], "its second start")
        self.assertEqual([process_state(group) for group in groups], [None] * 2)
        for words in ("FileNotFoundError: ps", "OSError: EMFILE", "RuntimeError: an observer"):
            self.assertTrue(any(words in line for line in logs.output), words)

    def test_a_process_that_daemonizes(self):
        """Its exit event and its status say so, whether it has left its group by then or not."""
        code = """
            import os, signal
            read, write = os.pipe()
            if os.fork():
                os.read(read, 1)
                os._exit(0)
            %s
            os.write(write, b"x")
            signal.pause()                      # of test %d
            """
        for name, leave in (("a", ""), ("b", "os.setsid()"),
                            ("c", "os.setsid(); os.fork() and os._exit(0)")):
            with self.subTest(leave):
                self.server.add(name, python(code % (leave, os.getpid())),
                                flapping=PROCESS_ONCE)
                event = self.server.wait_event("proc/%s/exit" % name)
                self.addCleanup(self.end_daemons)
                self.assertIn("foreground", event["hint"])
                self.assertEqual(self.server.ok("GET", "/status/" + name)["hint"], event["hint"])
        with unittest.mock.patch.object(self.server.manager.table, "orphans", lambda since, ours: []):
            for name, command in (("d", "true"), ("e", "sleep 60 & exit 1"), ("f", "kill $$")):
                self.server.add(name, command, shell=True, flapping=PROCESS_ONCE)
                self.assertNotIn("hint", self.server.wait_event("proc/%s/exit" % name))
                self.assertIsNone(self.server.ok("GET", "/status/" + name)["hint"])

    @staticmethod
    def end_daemons():
        """Kill what the test above has left behind."""
        for daemon in gaffer.ProcfsTable().orphans(0, ()):
            with contextlib.suppress(OSError), open("/proc/%d/cmdline" % daemon) as file:
                if "# of test %d" % os.getpid() in file.read():
                    os.kill(daemon, signal.SIGKILL)

    def test_the_way_to_what_popen_cannot_set(self):
        """A program that asks for descriptors from 3 on starts like any other."""
        code = """
            import os, signal
            print(sorted(os.environ), os.environ.get("LC_CTYPE"), signal.getsignal(signal.SIGPIPE))
            print(sorted(os.listdir("/proc/self/fd"), key=int), os.getcwd(), os.getsid(0) == os.getpid())
            """
        for number, env in enumerate(({}, {"LC_CTYPE": "C"}, {"LC_CTYPE": "xx_YY"})):
            seen = []
            env = dict(env, PATH=os.environ["PATH"], GAFFER_STREAMS="a")
            words = ["-i", *("%s=%s" % item for item in env.items()), PYTHON, "-I", "-S", "-c",
                     textwrap.dedent(code)]
            for labels in ([], ["a"]):
                name = "x%d%d" % (number, len(labels))
                self.server.add(name, "env", args=words, custom_streams=labels, cwd="/",
                                os_env=False, env=env, flapping=PROCESS_ONCE)
                said = self.poll(self.spawned(name, 1)["pid"]).decode()
                seen.append(said.replace("'3', '4'", "'3'"))
            self.assertEqual(seen[0], seen[1])

    def test_faults_behind_the_prelude(self):
        """What cannot be executed is refused there as well."""
        script = process_script(self, "#!/nowhere/interpreter\n")
        for cmd, words in ((script, "interpreter"), (process_script(self, "echo\n"), "no program")):
            answer = self.server.json("POST", "/processes", {"name": "x", "cmd": cmd, "custom_streams": ["a"]})
            self.assertError(answer, 400, "invalid_process_info", words)
        self.assertEqual(self.server.ok("GET", "/processes"), [])

    def test_waits_of_changes(self):
        """?wait with DELETE and _sub: of the groups nothing is left when it answers."""
        for method, path in (("POST", "/processes/x/_sub/2?wait=true"), ("DELETE", "/processes/x?wait=true"),
                             ("DELETE", "/groups/g?wait=true")):
            with self.subTest(path):
                name = "g:x" if "groups" in path else "x"
                self.server.add(name, PROCESS_STUBBORN, numprocesses=2, graceful_timeout=0.2)
                groups = self.server.ok("GET", "/status/" + name)["os_pids"]
                for pid in self.pids(name):
                    self.poll(pid, b"ready\n")
                self.assertError(self.server.json(method, path.replace("true", "0.01")), 504, "wait_timeout")
                if method == "DELETE":
                    self.assertEqual(self.server.ok("GET", "/processes"), [])
                    until(lambda: not any(map(process_group, groups)))
                    continue
                self.server.ok(method, path)
                self.assertEqual([process_group(group) for group in groups], [[]] * 2)
                self.server.ok("DELETE", "/processes/x?wait=true")

    def test_restart_of_many_goes_on_after_one_that_cannot(self):
        """Each on its own; the faults are told together."""
        folders = [tempfile.mkdtemp(), tempfile.mkdtemp()]
        for name, cwd in (("g:a", folders[0]), ("g:b", None), ("g:c", folders[1]), ("g:d", None)):
            self.server.add(name, "sleep 60", cwd=cwd)
        for folder in folders:
            os.rmdir(folder)
        for number, restart in enumerate((self.server.manager.restart, lambda: self.server.json(
                "POST", "/groups/g/_restart?wait=true"), lambda: self.server.json("POST", "/groups/g/_start"))):
            try:
                reason = restart()
                reason = reason[1].get("reason", "")
            except gaffer.InvalidProcessInfo as error:
                reason = str(error)
            if number < 2:
                for words in ("'g:a': field 'cwd'", "'g:c': field 'cwd'"):
                    self.assertIn(words, reason)
                for name in ("g:b", "g:d"):
                    self.assertEqual(self.spawned(name, number + 2)["name"], name)
        self.assertEqual([self.server.ok("GET", "/status/g:" + each)["pids"] for each in "ac"], [[1], [3]])

    def test_handle(self):
        """add_process() returns the name's handle; signals are numbers, names or signal.Signals."""
        handle = self.server.manager.add_process("x", "cat", redirect_input=True, flapping=PROCESS_ONCE)
        self.assertEqual((handle.name, handle.pid, handle.info()["cmd"]), ("x", None, "cat"))
        said = queue.Queue()
        handle.monitor_io("stdout", lambda label, event: said.put(event["data"]))
        handle.write(b"hello\n")
        self.assertEqual(said.get(timeout=TIMEOUT), b"hello\n")
        with self.assertRaises(gaffer.WaitTimeout):
            handle.wait(0.01)
        for signum in ("WINCH", "SIGWINCH", str(int(signal.SIGWINCH)), int(signal.SIGWINCH), signal.SIGWINCH):
            handle.signal(signum)
        one = self.server.manager.get_process(1)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waits = [pool.submit(each.wait, TIMEOUT) for each in (one, handle)]
            handle.signal(signal.SIGKILL)
            self.assertEqual([wait.result(TIMEOUT)["term_signal"] for wait in waits], [9, 9])
        self.assertEqual(handle.wait()["term_signal"], 9)
        self.server.manager.add_process("y", "sleep 60").stop()
        refused = queue.Queue()
        self.server.manager.subscribe("create", lambda kind, event: refused.put(self.refusal(handle.wait)))
        self.assertIsNone(self.server.manager.add_process("z", "true", start=False).wait(TIMEOUT))
        self.assertIn("its own thread", refused.get(timeout=TIMEOUT))

    @staticmethod
    def refusal(function):
        """The words of the RuntimeError that a call raises."""
        try:
            function()
        except RuntimeError as error:
            return str(error)
        return ""

    def test_wait_at_the_end(self):
        """Whoever waits when gaffer ends goes on."""
        handle = self.server.manager.add_process("x", "sleep 60", detach=True)
        os_pid = self.os_pid(1)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            wait = pool.submit(handle.wait)
            self.server.manager.stop()
            wait.result(TIMEOUT)
        os.kill(os_pid, signal.SIGKILL)
        os.waitpid(os_pid, 0)


class ProcessShortage(ProcessCase):
    """What cannot be had for real here: the system call fails in a test's hands."""

    def test_a_process_without_a_pidfd_is_polled(self):
        """No descriptor is left, or the kernel or a sandbox refuses one."""
        for number in (errno.EMFILE, errno.ENOSYS, errno.EPERM):
            with unittest.mock.patch("os.pidfd_open", create=True, side_effect=OSError(number, "no")):
                self.server.add("x%d" % number, "cat", redirect_input=True)
                first = self.server.wait_event("proc/x%d/spawn" % number)
                os.kill(first["os_pid"], signal.SIGKILL)
                self.assertEqual(self.server.wait_event("proc/x%d/exit" % number)["term_signal"], signal.SIGKILL)
                self.server.wait_event("proc/x%d/spawn" % number, since=first["id"])

    def test_a_selector_without_room(self):
        """ENOSPC of epoll: no process is left that nobody reads, and a connection is closed; both count no longer."""
        loop = self.server.manager.loop
        register = loop.register

        def full(fd, events, callback):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.assertEqual(self.server.json("GET", "/processes"), (200, []))
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        self.addCleanup(connection.close)
        connection.connect()
        connection.request("GET", "/processes")
        connection.getresponse().read()
        loop.call(setattr, loop, "register", full)
        with self.assertLogs("gaffer", logging.WARNING) as logs:
            connection.request("POST", "/processes", json.dumps({"name": "x", "cmd": "cat", "redirect_input": True}))
            answer = connection.getresponse()
            self.assertEqual((answer.status, json.loads(answer.read())["error"]), (503, "busy"))
            for _ in range(3):
                with self.server.connect() as sock:
                    self.assertEqual(sock.recv(1), b"")
        loop.call(setattr, loop, "register", register)
        self.assertEqual(len(logs.output), 1, logs.output)
        self.assertEqual(loop.call(lambda: len(self.server.http.connections)), 1)
        self.assertEqual(self.server.add("x", "cat", redirect_input=True), [1])

    def test_no_memory_for_a_process(self):
        """It is 503, and a template that has one comes back."""
        self.server.add("x", "cat", redirect_input=True)
        first = self.server.wait_event("proc/x/spawn")
        popen, failures = subprocess.Popen, []

        def fails(*args, **options):
            failures.append(1)
            raise MemoryError
        with self.assertLogs("gaffer", logging.WARNING) as logs:
            subprocess.Popen = fails
            try:
                self.assertError(self.server.json("POST", "/processes", {"name": "y", "cmd": "cat"}), 503, "busy", "memory")
                os.kill(first["os_pid"], signal.SIGKILL)
                until(lambda: len(failures) > 2, "two failures")
            finally:
                subprocess.Popen = popen
            self.server.wait_event("proc/x/spawn", since=first["id"])
        self.assertEqual(len(logs.output), 1, logs.output)


class ProcessFirst(Case):
    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("unshare"), "needs root and unshare")
    def test_as_pid_1_strangers_are_reaped(self):
        """In a pid namespace of its own, orphans of a process become gaffer's, and are no zombies for long."""
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", PYTHON, os.path.abspath(gaffer.__file__),
                   "serve", "--bind", "127.0.0.1:0"]
        outer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(outer.stderr.close)
        self.addCleanup(outer.stdout.close)
        try:
            line = outer.stdout.readline().decode()
            if not line:
                self.skipTest("no pid namespace can be made here: %s" % outer.stderr.read().decode())
            code = """
                import os, sys
                for _ in range(5):
                    if os.fork() == 0:
                        if os.fork() == 0:
                            os.read(0, 1)       # until the end of file, when its parent has ended
                        os._exit(0)
                    os.wait()
                os.write(1, b"ready")
                sys.stdin.read()
                os._exit(0)
                """
            connection = http.client.HTTPConnection("127.0.0.1", int(line.rpartition(":")[2]), timeout=TIMEOUT)
            with contextlib.closing(connection):
                def ask(method, path, body=None):
                    connection.request(method, path, body)
                    return connection.getresponse().read()
                ask("POST", "/processes", json.dumps(dict(python(code), name="x", redirect_input=True, flapping={"attempts": 1})))
                self.assertEqual(ask("GET", "/streams/1/stdout?since=0"), b"ready")
                server, = gaffer.ProcfsTable().children(outer.pid)
                self.assertEqual(len(gaffer.ProcfsTable().children(server)), 6)
                ask("DELETE", "/streams/1/stdin")
                until(lambda: not gaffer.ProcfsTable().children(server), "the end of all orphans")
                os.kill(server, signal.SIGTERM)
            self.assertEqual(outer.wait(TIMEOUT), 0)
        finally:
            outer.kill()
            outer.wait()


class ProcessLostDirectory(Case):
    def test_gaffers_own_directory_is_removed(self):
        """What is told absolutely is started and restarted all the same."""
        self.expect_log("WARNING x: exit .*signal 9")
        folder = tempfile.mkdtemp()
        program = os.path.abspath(gaffer.__file__)
        child = subprocess.Popen([PYTHON, program, "serve", "--bind", "127.0.0.1:0"], cwd=folder, stdout=subprocess.PIPE)
        self.addCleanup(child.stdout.close)
        try:
            port = int(child.stdout.readline().decode().rpartition(":")[2])

            def ask(method, path, body=None):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
                with contextlib.closing(connection):
                    connection.request(method, path, body)
                    return json.loads(connection.getresponse().read().decode())
            self.assertEqual(ask("POST", "/processes", json.dumps({"name": "x", "cmd": "sleep 1000"})), {"ok": True})
            first = ask("GET", "/watch/proc/x/spawn?since=0")
            os.rmdir(folder)
            os.kill(first["os_pid"], signal.SIGKILL)
            second = ask("GET", "/watch/proc/x/spawn?since=%s&timeout=%d" % (first["id"], TIMEOUT))
            self.assertTrue(alive(second["os_pid"]))
            self.assertEqual(ask("POST", "/processes", json.dumps({"name": "y", "cmd": "true"})), {"ok": True})
            self.assertEqual(ask("POST", "/processes", json.dumps({"name": "z", "cmd": "./true"}))["error"], "invalid_process_info")
        finally:
            child.terminate()
            self.assertEqual(child.wait(TIMEOUT), 0)


class ProcessProgram(Case):
    """A Manager on the main thread of a program of its own: how signals and exceptions end it."""

    PROGRAM = """
        import signal, sys
        sys.path.insert(0, %r)
        import gaffer
        class Leave(BaseException):
            pass
        def leave(*args):
            raise Leave()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR1, leave)
        class Show:
            def start(self, loop, manager):
                manager.subscribe("", lambda kind, event: print(kind, event.get("os_pid", 0), flush=True))
        apps = [Show()] + ([gaffer.SigHandler()] if %r else [])
        manager = gaffer.Manager(apps)
        manager.add_process(%r)
        manager.run()
        print("returned", 0, flush=True)
        """

    def begin(self, handler, **options):
        """Run the program. Returns it and the os pid of its process, which is ready."""
        folder = tempfile.mkdtemp()
        self.addCleanup(os.rmdir, folder)
        fifo = os.path.join(folder, "ready")
        os.mkfifo(fifo)
        self.addCleanup(os.unlink, fifo)
        code = PROCESS_IGNORES_TERM + "os.close(os.open(%r, os.O_WRONLY))\nsignal.sigwait([])" % fifo
        info = dict(python(code), name="x", **options)
        folder = os.path.dirname(os.path.abspath(gaffer.__file__))
        program = textwrap.dedent(self.PROGRAM) % (folder, handler, info)
        child = subprocess.Popen([PYTHON, "-W", "error", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 universal_newlines=True)
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.stderr.close)
        with open(fifo):                            # both have opened it: the child ignores SIGTERM by now
            pass
        return child, self.wait_for(child, "spawn")

    def wait_for(self, child, word):
        """Read the program's lines up to an event. Returns its os pid."""
        for line in child.stdout:
            kind, os_pid = line.split()
            if kind == word:
                return int(os_pid)
        self.fail("the program ended before %r: %s" % (word, child.stderr.read()))

    def end(self, child, os_pid):
        """Wait for the program's end; nothing of its process is left. Returns (exit status, rest of stdout, stderr)."""
        out, err = child.stdout.read(), child.stderr.read()
        status = child.wait(TIMEOUT)
        until(lambda: not process_group(os_pid), "the end of what has been killed")
        return status, out, err

    def test_exceptions(self):
        """A KeyboardInterrupt, or another exception of a signal handler, leaves run(), and leaves nothing behind."""
        for signum, name in ((signal.SIGINT, "KeyboardInterrupt"), (signal.SIGUSR1, "Leave")):
            with self.subTest(name):
                child, os_pid = self.begin(False, graceful_timeout=0.2)
                child.send_signal(signum)
                status, out, err = self.end(child, os_pid)
                self.assertNotEqual(status, 0)
                self.assertNotIn("returned", out)
                self.assertIn(name, err.splitlines()[-1])
                self.assertEqual([line.split()[0] for line in out.splitlines()], ["stop", "stop_pid", "exit"])

    def test_a_second_exception(self):
        """It does not wait any longer, and still leaves nothing behind."""
        child, os_pid = self.begin(False, graceful_timeout=600)
        child.send_signal(signal.SIGINT)
        self.wait_for(child, "stop_pid")
        child.send_signal(signal.SIGINT)
        status, _, err = self.end(child, os_pid)
        self.assertNotEqual(status, 0)
        self.assertIn("KeyboardInterrupt", err)

    def test_an_interrupt_within_a_step(self):
        """It leaves run() when the step is complete: no process is left half reaped."""
        folder = os.path.dirname(os.path.abspath(gaffer.__file__))
        for call in ("waitid", "waitpid", "killpg", "close"):
            with self.subTest(call):
                program = textwrap.dedent("""
                    import os, signal, sys
                    sys.path.insert(0, %r)
                    import gaffer
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    call, armed = os.%s, []
                    def interrupted(*args):
                        if armed and armed.pop():
                            signal.raise_signal(signal.SIGINT)
                        return call(*args)
                    os.%s = interrupted
                    manager = gaffer.Manager()
                    manager.add_process("x", "cat", redirect_input=True)
                    def spawned(kind, event):
                        if not seen:
                            seen.append(event["os_pid"])
                            armed.append(True)
                            os.kill(event["os_pid"], signal.SIGKILL)
                    seen = []
                    manager.subscribe("spawn", spawned)
                    manager.subscribe("exit", lambda kind, event: print(kind, event["os_pid"]))
                    try:
                        manager.run()
                    except KeyboardInterrupt:
                        print("interrupted")
                    try:
                        os.wait()
                    except ChildProcessError:
                        print("nothing is left")
                    """) % (folder, call, call)
                done = subprocess.run(
                    [PYTHON, "-W", "error", "-c", program], stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, timeout=TIMEOUT, check=False)
                said = done.stdout.decode().splitlines()
                self.assertEqual((said[0].split()[0], said[-2:], done.stderr.decode()),
                                 ("exit", ["interrupted", "nothing is left"], ""))

    def test_an_interrupt_while_another_thread_calls(self):
        """It is the main thread's, which runs the loop; the caller gets its result."""
        folder = os.path.dirname(os.path.abspath(gaffer.__file__))
        program = textwrap.dedent("""
            import signal, sys, threading
            sys.path.insert(0, %r)
            import gaffer
            signal.signal(signal.SIGINT, signal.default_int_handler)
            manager, got = gaffer.Manager(), []
            def interrupt():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                return "result"
            def work():
                for _ in range(100):
                    manager.loop.call(len, "abc")
                got.append(manager.loop.call(interrupt))
            thread = threading.Thread(target=work)
            manager.loop.call_soon(thread.start)
            try:
                manager.run()
            except KeyboardInterrupt:
                thread.join()
                print("interrupted", got)
            """) % folder
        done = subprocess.run([PYTHON, "-W", "error", "-c", program], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=TIMEOUT, check=False)
        self.assertEqual((done.stdout, done.stderr), (b"interrupted ['result']\n", b""))

    def test_signals(self):
        """With SigHandler TERM and INT stop, so that run() returns; a second one kills."""
        child, os_pid = self.begin(True, graceful_timeout=600)
        child.send_signal(signal.SIGTERM)
        self.wait_for(child, "stop_pid")
        child.send_signal(signal.SIGINT)
        status, out, err = self.end(child, os_pid)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual([line.split()[0] for line in out.splitlines()], ["exit", "returned"])

    def test_not_on_the_main_thread(self):
        """SigHandler says so; run() itself does not mind."""
        errors = []

        def run():
            try:
                gaffer.Manager([gaffer.SigHandler()]).run()
            except gaffer.StartError as error:
                errors.append(str(error))
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(TIMEOUT)
        self.assertIn("main thread", errors[0])


class ProcessTables(Case):
    """What /proc says of processes."""

    CODE = """
        import os, signal, sys
        for leave in (False, False, True):
            if os.fork() == 0:
                if leave:
                    os.setsid()
                os.write(1, b'!')
                signal.sigwait([])
        while True:
            os.read(0, 1) or os._exit(0)
        """

    def setUp(self):
        """A process group of three, and one that has left it."""
        super().setUp()
        self.table = gaffer.ProcfsTable()
        if not self.table.EXISTS:
            self.skipTest("no /proc here")
        command = python(self.CODE)
        self.child = subprocess.Popen([command["cmd"], *command["args"]], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, start_new_session=True)
        self.assertEqual(b"".join(self.child.stdout.read(1) for _ in range(3)), b"!!!")
        everybody = self.table.children(self.child.pid)

        def end():
            for os_pid in everybody:
                os.kill(os_pid, signal.SIGKILL)
            self.child.stdin.close()
            self.child.wait(TIMEOUT)
            self.child.stdout.close()
        self.addCleanup(end)
        self.assertEqual(len(everybody), 3)
        self.left, = [os_pid for os_pid in everybody if os.getpgid(os_pid) != self.child.pid]
        self.stayed = [os_pid for os_pid in everybody if os_pid != self.left]

    def test_groups(self):
        """Those with a living member, children, and who has left."""
        wanted = {self.child.pid, self.left, self.stayed[0]}
        self.assertEqual(self.table.groups(wanted), {self.child.pid, self.left})
        self.assertEqual(sorted(self.table.children(self.child.pid)), sorted([*self.stayed, self.left]))
        escaped = self.table.escaped(self.child.pid, self.child.pid)
        self.assertEqual([os_pid for os_pid, _ in escaped], [self.left])
        self.assertTrue(self.table.still(*escaped[0]))
        self.assertFalse(self.table.still(self.left, escaped[0][1] + 1), "its number was given away")

    def test_gone(self):
        """A process that is not there is no fault; a zombie is no member."""
        os.kill(self.stayed[0], signal.SIGKILL)
        until(lambda: process_state(self.stayed[0]) == "Z", "the zombie")
        zombie = subprocess.Popen(["true"], start_new_session=True)
        until(lambda: process_state(zombie.pid) == "Z", "another")
        self.assertEqual(self.table.groups({zombie.pid}), set())
        zombie.wait(TIMEOUT)
        gone = zombie.pid
        self.assertEqual((self.table.look(gone), self.table.usage(gone), self.table.children(gone)), (None, None, []))
        self.assertEqual((self.table.escaped(gone, gone), self.table.still(gone, 0)), ([], False))

    def test_look(self):
        """As the system's calls say."""
        seen, usage = self.table.look(self.child.pid), self.table.usage(self.child.pid)
        with open("/proc/%d/status" % self.child.pid) as file:
            status = dict(line.split(":", 1) for line in file)
        self.assertEqual((seen["ppid"], seen["uid"]), (os.getpid(), os.geteuid()))
        self.assertEqual((seen["nice"], sorted(seen["children"])), (os.nice(0), sorted([*self.stayed, self.left])))
        self.assertEqual(seen["vms"], int(status["VmSize"].split()[0]) * 1024)
        self.assertLess(abs(seen["rss"] - int(status["VmRSS"].split()[0]) * 1024), seen["rss"] / 4, "the kernel counts in steps")
        self.assertEqual(seen["cmdline"].split(), " ".join(self.child.args).split())
        self.assertEqual(set(usage), {"cpu_time", "rss"})
        self.assertLess(usage["cpu_time"], 10)
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.assertTrue(boot - 60 < seen["start_time"] <= boot, (boot, seen["start_time"]))

    def test_a_system_without_proc(self):
        """A group is gone when it cannot be signalled; there are no statistics."""
        class NoTable(gaffer.ProcfsTable):
            EXISTS = False

            @staticmethod
            def _read(os_pid, name):
                return b""
        server = Running(process_table=NoTable())
        self.addCleanup(server.stop_all)
        pid, = server.add("x", '(trap "" TERM; echo ready; exec sleep 60) & wait', shell=True, graceful_timeout=0.1)
        os_pid = server.ok("GET", "/processes/%d" % pid)["os_pid"]
        server.request("GET", "/streams/%d/stdout?since=0" % pid)
        self.assertEqual(server.ok("GET", "/stats/x")["stats"], [])
        server.ok("POST", "/processes/x/_stop?wait=true")
        self.assertEqual(process_group(os_pid), [])
        self.assertEqual(server.ok("GET", "/status/x")["running"], 0)


class ProcessPlatform(Case):
    """Small things of the platform section."""

    def test_peek_and_reap(self):
        """Looking does not reap; reaping twice is no error."""
        for command, expected in ((["true"], (0, 0)), (["sh", "-c", "exit 7"], (7, 0)), (["sh", "-c", "kill -9 $$"], (0, 9))):
            child = subprocess.Popen(command)
            for _ in range(2):
                self.assertEqual(until(lambda: gaffer.peek_exit(child.pid)), expected)
            self.assertEqual(process_state(child.pid), "Z")
            gaffer.reap(child.pid)
            gaffer.reap(child.pid)
            self.assertIsNone(process_state(child.pid))
            child.returncode = 0                    # Popen need not wait for it

    def test_users_and_groups(self):
        """By name, by number, by a number as text; None where a number has no entry."""
        self.assertEqual(gaffer.find_user("root"), (0, 0, "root"))
        self.assertEqual(gaffer.find_user(0), gaffer.find_user("0"))
        self.assertEqual(gaffer.find_user(54321), (54321, None, None))
        self.assertEqual((gaffer.find_group(0), gaffer.find_group("0"), gaffer.find_group(grp.getgrgid(0).gr_name)), (0, 0, 0))
        for user in ("no-such-user", -1, 2 ** 32 - 1, 2 ** 64, ""):
            with self.assertRaises(ValueError):
                gaffer.find_user(user)
        for group in ("no-such-group", -1, 2 ** 32 - 1, 2 ** 64, ""):
            with self.assertRaises(ValueError):
                gaffer.find_group(group)


# --------------------------------------------------------------------------------------------------------------------
# ring 3: HTTP on real sockets
# --------------------------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------------------------------------
# HTTP on real sockets: the wire, the endpoints, the errors, cross-site, the token, TLS, what the library adds
# --------------------------------------------------------------------------------------------------------------------
HTTP_CODES = {
    400: ("invalid_json", "invalid_process_info", "bad_value", "no_signal_number", "io_not_redirected", "bad_request"),
    401: ("unauthorized",),
    403: ("forbidden_write", "forbidden_origin", "forbidden_host", "forbidden"),
    404: ("not_found", "resource_not_found", "io_not_found", "bad_event_type"),
    405: ("method_not_allowed",), 408: ("timeout",), 409: ("conflict",), 413: ("too_large",), 414: ("uri_too_long",),
    415: ("unsupported_media_type",), 426: ("upgrade_required",), 431: ("headers_too_large",), 500: ("internal_error",),
    503: ("stdin_full", "busy", "stopping"), 504: ("wait_timeout",),
}
HTTP_OK = b'{"ok": true}\n'
HTTP_DEAF = """
    import signal, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready")
    sys.stdin.read()
"""                                     # ignores the stop signal; says when it does


@contextlib.contextmanager
def http_limits(**values):
    """Other limits of gaffer's table at its top, for a while."""
    old = {name: getattr(gaffer, name) for name in values}
    for name, value in values.items():
        setattr(gaffer, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(gaffer, name, value)


def http_bytes(method, target, *headers, body=b"", host="127.0.0.1", version="1.1"):
    """A request as bytes; a Content-Length is added where there is a body and no word about it."""
    lines = ["%s %s HTTP/%s" % (method, target, version)]
    if host is not None:
        lines.append("Host: " + host)
    lines += headers
    said = any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers)
    if body and not said:
        lines.append("Content-Length: %d" % len(body))
    return "\r\n".join(lines + ["", ""]).encode("latin-1") + body


def http_chunks(*parts):
    """A chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class HttpWire:
    """One connection: what is sent, and each answer as it stands on the wire."""

    def __init__(self, sock):
        self.sock = sock
        self.file = sock.makefile("rb")

    def send(self, data):
        """Send bytes."""
        self.sock.sendall(data)

    def answer(self, method="GET"):
        """(status, headers as {lower-case name: [values]}, body)."""
        line = self.file.readline()
        match = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [\x20-\x7e]+\r\n", line)
        assert match, "no status line: %r" % line
        status, headers = int(match.group(1)), {}
        while True:
            line = self.file.readline()
            assert line.endswith(b"\r\n"), line
            if line == b"\r\n":
                break
            name, _, value = line.decode("latin-1").partition(": ")
            headers.setdefault(name.lower(), []).append(value[:-2])
        return status, headers, self._body(method, status, headers)

    def _body(self, method, status, headers):
        if method == "HEAD" or status in (101, 204, 304):
            return b""
        if "content-length" in headers:
            assert len(headers["content-length"]) == 1 and "transfer-encoding" not in headers, headers
            return self.file.read(int(headers["content-length"][0]))
        if "transfer-encoding" not in headers:
            return self.file.read()
        body = b""
        while True:
            size = int(self.file.readline(), 16)
            body += self.file.read(size)
            assert self.file.readline() == b"\r\n"
            if not size:
                return body

    def answer_chunk(self):
        """The first chunk of an answer."""
        while self.file.readline() != b"\r\n":
            pass
        return self.file.read(int(self.file.readline(), 16))

    def rest(self):
        """All that comes until the server ends the connection."""
        return self.file.read()

    def close(self):
        """Drop the connection."""
        self.file.close()
        self.sock.close()


class HttpCase(ServerCase):
    """A server, and requests byte by byte."""

    def wire(self, server=None):
        """A new HttpWire, closed after the test."""
        made = HttpWire((server or self.server).connect())
        self.addCleanup(made.close)
        return made

    def ask(self, data, method="GET", server=None):
        """The answer to a request on a connection of its own."""
        wire = self.wire(server)
        wire.send(data)
        answer = wire.answer(method)
        wire.close()
        return answer

    def assertCode(self, answer, status, code):
        """`answer` is the error `code`, in the one form that errors have."""
        self.assertEqual(answer[0], status, answer)
        self.assertEqual(answer[1]["content-type"], ["application/json"])
        self.assertTrue(answer[2].endswith(b"}\n"), answer)
        value = json.loads(answer[2].decode("utf-8"))
        self.assertEqual(list(value), ["error", "reason"])
        self.assertEqual(value["error"], code, value)
        self.assertGreater(len(value["reason"]), 5)
        self.assertNotIn("\n", value["reason"])
        return value["reason"]

    def assertRefused(self, data, status=400, code="bad_request", server=None):
        """One error is answered to `data`, then the connection ends; nothing behind is answered."""
        wire = self.wire(server)
        wire.send(data)
        answer = wire.answer()
        self.assertCode(answer, status, code)
        self.assertEqual(answer[1].get("connection"), ["close"])
        self.assertEqual(wire.rest(), b"")
        wire.close()

    def cat(self, name="cat", server=None, **options):
        """A template that does nothing for ever; its pids."""
        return (server or self.server).add(name, "cat", redirect_input=True, **options)

    def output(self, pid, label="stdout"):
        """An iterator of the lines of a stream, from its beginning."""
        answer, events = self.server.sse("/streams/%s/%s?feed=eventsource&since=0" % (pid, label))
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        return (event.get("data") for event in events)


class HttpEndpointTable(HttpCase):
    """Section 2 of the contract, row by row: what is answered, byte for byte."""

    def exact(self, method, path, expected, body=None, status=200):
        """The answer's bytes."""
        got, headers, data = self.server.request(method, path, body)
        self.assertEqual((got, data), (status, expected), (method, path))
        self.assertEqual(headers["Content-Type"], "application/json")

    def test_welcome(self):
        """JSON to programs, the page to browsers."""
        welcome = b'{"welcome": "gaffer", "version": "%s"}\n' % gaffer.__version__.encode()
        browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
        for accept, html in ((None, False), ("*/*", False), ("application/json", False), (browser, True),
                             ("text/html;q=0.1, application/json", False), ("text/html", True)):
            with self.subTest(accept=accept):
                status, headers, data = self.server.request("GET", "/", headers={"Accept": accept} if accept else {})
                self.assertEqual(status, 200)
                if html:
                    self.assertTrue(headers["Content-Type"].startswith("text/html"))
                    self.assertIn(b"<html", data[:200].lower())
                else:
                    self.assertEqual((headers["Content-Type"], data), ("application/json", welcome))

    def test_ping(self):
        """Two letters of plain text."""
        status, headers, data = self.server.request("GET", "/ping")
        self.assertEqual((status, headers["Content-Type"].partition(";")[0], data), (200, "text/plain", b"OK"))

    def test_processes_from_first_to_last(self):
        """Add, list, look, replace, delete."""
        self.exact("GET", "/processes", b"[]\n")
        self.exact("POST", "/processes", HTTP_OK, {"name": "b", "cmd": "cat", "redirect_input": True})
        self.exact("POST", "/processes", HTTP_OK, {"name": "a", "cmd": "sleep 60", "start": False})
        self.exact("GET", "/processes", b'["b", "a"]\n')
        self.exact("GET", "/processes?running=true", b"[1]\n")
        self.exact("GET", "/processes?running=1", b"[1]\n")
        self.exact("GET", "/processes?running=false", b'["b", "a"]\n')
        self.assertError(self.server.json("GET", "/processes?running=perhaps"), 400, "bad_value", "running")
        self.exact("GET", "/processes/b/_pids", b'{"ok": true, "pids": [1]}\n')
        self.exact("GET", "/processes/a/_pids", b'{"ok": true, "pids": []}\n')
        self.exact("DELETE", "/processes/b", HTTP_OK)
        self.exact("GET", "/processes", b'["a"]\n')
        self.exact("GET", "/processes?running=true", b"[]\n")
        self.assertError(self.server.json("DELETE", "/processes/b"), 404, "not_found")

    def test_taken_name(self):
        """409, and nothing has changed."""
        self.cat("web")
        self.assertError(self.server.json("POST", "/processes", {"name": "web", "cmd": "true"}), 409, "conflict", "web")
        self.assertEqual(self.server.ok("GET", "/processes/web")["cmd"], "cat")

    def test_what_cannot_be_spawned_is_not_added(self):
        """A command that is not there, a directory, a file without its x bit."""
        for command in ("no-such-command-at-all", "/", "/etc/passwd", "/no/such/file x"):
            with self.subTest(command=command):
                answer = self.server.json("POST", "/processes", {"name": "web", "cmd": command})
                self.assertError(answer, 400, "invalid_process_info", "cmd")
                self.assertEqual(self.server.ok("GET", "/processes"), [])

    def test_template_with_defaults(self):
        """What was given, and the defaults of the rest."""
        self.server.ok("POST", "/processes", {"name": "web", "cmd": "sleep 60", "start": False, "env": {"A": 1}})
        self.assertEqual(self.server.ok("GET", "/processes/web"), {
            "name": "web", "cmd": "sleep 60", "args": [], "env": {"A": 1}, "os_env": True, "cwd": None, "uid": None,
            "gid": None, "shell": False, "numprocesses": 1, "start": False, "detach": False,
            "redirect_output": ["stdout", "stderr"], "redirect_input": False, "custom_streams": [],
            "graceful_timeout": 10, "flapping": None, "priority": None})

    def test_replace(self):
        """PUT makes it so, POST only what is there; the answer says what was to do."""
        def pids():
            return self.server.ok("GET", "/processes/web/_pids")["pids"]
        self.cat("web")
        changed, unchanged = b'{"ok": true, "changed": true}\n', b'{"ok": true, "changed": false}\n'
        info, pid = {"cmd": "sleep 60"}, 1
        for method in ("PUT", "POST"):
            with self.subTest(method):
                self.exact(method, "/processes/web?dry_run=true", changed, info)
                self.assertEqual(pids(), [pid])
                self.exact(method, "/processes/web", changed, info)
                until(lambda pid=pid: pids() == [pid + 1], "the new process")
                self.exact(method, "/processes/web", unchanged, dict(info, name="web", start=True))
                more = dict(info, numprocesses=2, priority=1, flapping={})
                self.exact(method, "/processes/web", changed, more)
                self.assertEqual(pids(), [pid + 1, pid + 2])
                self.exact(method, "/processes/web", changed, info)
                self.assertEqual(pids(), [pid + 2])
                info, pid = {"cmd": "sleep 61"}, pid + 2
        for path, body, reason in (("web", {"name": "x", "cmd": "cat"}, "'x'"),
                                   ("web", {"cmd": "/nowhere"}, "/nowhere"), ("new", {}, "'cmd'"),
                                   ("web", {"cmd": "cat", "comand": 1}, "'comand'")):
            self.assertError(self.server.json("PUT", "/processes/" + path, body), 400,
                             "invalid_process_info", reason)
        self.assertError(self.server.json("POST", "/processes/new", {"cmd": "cat"}), 404, "not_found")
        created = b'{"ok": true, "created": true}\n'
        for path in ("/processes/new?dry_run=true", "/processes/new"):
            self.assertEqual(self.server.ok("GET", "/processes"), ["web"])
            self.exact("PUT", path, created, {"cmd": "cat", "redirect_input": True})
        self.exact("POST", "/processes?dry_run=true", HTTP_OK, {"name": "other", "cmd": "cat"})
        self.assertEqual(self.server.ok("GET", "/processes"), ["web", "new"])
        self.exact("POST", "/processes/web/_stop", HTTP_OK)
        self.exact("PUT", "/processes/web", changed, {"cmd": "sleep 62"})
        self.exact("PUT", "/processes/web", unchanged, {"cmd": "sleep 62"})
        self.assertEqual(self.server.ok("GET", "/status/web")["active"], False)
        self.exact("PUT", "/processes/web", changed, {"cmd": "sleep 62", "start": True})
        until(pids, "the new process")

    def test_actions_may_be_repeated(self):
        """_stop, _start and _restart, each twice."""
        self.cat("web")
        for action, active in (("_stop", False), ("_start", True), ("_restart", True), ("_stop", False),
                               ("_restart", True)):
            for _ in range(2):
                self.exact("POST", "/processes/web/" + action, HTTP_OK)
                self.assertEqual(self.server.ok("GET", "/status/web")["active"], active, action)

    def test_wait(self):
        """?wait answers when it is done."""
        self.cat("web")
        os_pid = self.server.ok("GET", "/processes/1")["os_pid"]
        self.exact("POST", "/processes/web/_restart?wait=true", HTTP_OK)
        self.assertFalse(alive(os_pid))
        self.exact("GET", "/processes/web/_pids", b'{"ok": true, "pids": [2]}\n')
        os_pid = self.server.ok("GET", "/processes/2")["os_pid"]
        self.exact("POST", "/processes/2/_stop?wait=10", HTTP_OK)
        self.assertFalse(alive(os_pid))
        self.exact("POST", "/processes/web/_stop?wait=true", HTTP_OK)
        self.exact("POST", "/processes/web/_start?wait=true", HTTP_OK)
        self.assertEqual(self.server.ok("GET", "/status/web")["running"], 1)
        self.assertError(self.server.json("POST", "/processes/web/_stop?wait=soon"), 400, "bad_value", "wait")
        self.assertEqual(self.server.ok("GET", "/status/web")["running"], 1)

    def test_add_and_sub(self):
        """By one, by n; never below 0 or above 1,000; scaling down ends the oldest."""
        self.cat("web")
        self.exact("POST", "/processes/web/_add", b'{"ok": true, "numprocesses": 2}\n')
        self.exact("POST", "/processes/web/_add/2", b'{"ok": true, "numprocesses": 4}\n')
        self.exact("GET", "/processes/web/_pids", b'{"ok": true, "pids": [1, 2, 3, 4]}\n')
        self.exact("POST", "/processes/web/_sub", b'{"ok": true, "numprocesses": 3}\n')
        self.exact("GET", "/processes/web/_pids", b'{"ok": true, "pids": [2, 3, 4]}\n')
        self.exact("POST", "/processes/web/_sub/5", b'{"ok": true, "numprocesses": 0}\n')
        self.exact("GET", "/processes/web/_pids", b'{"ok": true, "pids": []}\n')
        for number in ("0", "-1", "x", "1.5", "1e3", "+1", "%20", "00"):
            for action in ("_add", "_sub"):
                with self.subTest(action=action, number=number):
                    self.assertError(self.server.json("POST", "/processes/web/%s/%s" % (action, number)), 400,
                                     "bad_value")
        self.exact("POST", "/processes/web/_stop", HTTP_OK)
        for number in ("999999", "9" * 30):
            self.exact("POST", "/processes/web/_add/" + number, b'{"ok": true, "numprocesses": 1000}\n')

    def test_signal(self):
        """By number and name, to a template and to a process; wrong ones."""
        pid, = self.server.add("web", python("""
            import signal, sys
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, lambda number, frame: print(number))
            print("ready")
            sys.stdin.read()
        """), redirect_input=True)
        lines = self.output(pid)
        self.assertEqual(next(lines), "ready")
        for ref in ("web", "1"):
            for name in (str(int(signal.SIGUSR1)), "USR1", "SIGUSR1", "usr2"):
                self.exact("POST", "/processes/%s/_signal/%s" % (ref, name), HTTP_OK)
                self.assertEqual(next(lines), str(int(signal.SIGUSR2 if name == "usr2" else signal.SIGUSR1)))
            self.exact("POST", "/processes/%s/_signal/USR1?group=true" % ref, HTTP_OK)
            self.assertEqual(next(lines), str(int(signal.SIGUSR1)))
            for name in ("0", "999", "NOPE", "-9", "%20", "SIG"):
                with self.subTest(ref=ref, name=name):
                    self.assertError(self.server.json("POST", "/processes/%s/_signal/%s" % (ref, name)), 400,
                                     "bad_value")
            self.assertError(self.server.json("POST", "/processes/%s/_signal" % ref), 400, "no_signal_number")
            self.assertError(self.server.json("POST", "/processes/%s/_signal/" % ref), 400, "no_signal_number")

    def test_one_process(self):
        """By pid: the template and two more fields; DELETE and _stop stop it, and it is replaced."""
        self.cat("web")
        template, process = self.server.ok("GET", "/processes/web"), self.server.ok("GET", "/processes/1")
        self.assertEqual(set(process) - set(template), {"pid", "os_pid"})
        self.assertEqual(process["pid"], 1)
        self.assertTrue(alive(process["os_pid"]))
        for pid, method, path in ((1, "DELETE", "/processes/1"), (2, "POST", "/processes/2/_stop")):
            self.exact(method, path, HTTP_OK)
            self.assertError(self.server.json("GET", "/processes/%d" % pid), 404, "not_found")
            until(lambda: self.server.ok("GET", "/processes/web/_pids")["pids"] == [pid + 1], "the next process")
        for path in ("/processes/3/_start", "/processes/3/_restart", "/processes/3/_add", "/processes/3/_sub/1"):
            with self.subTest(path=path):
                self.assertError(self.server.json("POST", path), 404, "resource_not_found")

    def test_status(self):
        """Whether it is active, and how many run."""
        self.cat("web", numprocesses=2)
        first = {"active": True, "running": 2, "numprocesses": 2, "max_processes": 2}
        status = self.server.ok("GET", "/status/web")
        self.assertEqual({name: status.get(name) for name in first}, first)
        self.server.ok("POST", "/processes/web/_stop")
        status = self.server.ok("GET", "/status/web")
        self.assertEqual((status["active"], status["running"], status["max_processes"]), (False, 0, 2))
        self.assertError(self.server.json("GET", "/status/wep"), 404, "not_found", "did you mean 'web'")

    def test_stats(self):
        """All, one, one process; stopped: zeros."""
        self.cat("web")
        self.server.ok("POST", "/processes", {"name": "off", "cmd": "cat", "start": False})
        every = self.server.ok("GET", "/stats")
        self.assertEqual([entry["name"] for entry in every], ["web", "off"])
        self.assertEqual(every[1], {"name": "off", "mem": 0, "max_mem": 0, "min_mem": 0, "cpu": 0, "max_cpu": 0,
                                    "min_cpu": 0, "stats": []})
        one = self.server.ok("GET", "/stats/web")
        self.assertEqual(set(one), set(every[1]))
        entry = self.server.ok("GET", "/stats/web/1")
        self.assertEqual(set(entry), {"id", "pid", "cpu", "mem", "mem_info1", "mem_info2", "rss", "vms", "ctime",
                                      "username",
                                      "nice", "cmdline", "children"})
        self.assertEqual((entry["id"], entry["pid"]), (1, self.server.ok("GET", "/processes/1")["os_pid"]))
        self.assertEqual(set(one["stats"][0]), set(entry))
        for path in ("/stats/nobody", "/stats/off/1", "/stats/web/9", "/stats/web/web"):
            with self.subTest(path=path):
                self.assertError(self.server.json("GET", path), 404, "not_found")

    def test_groups(self):
        """Names with a colon form groups."""
        self.exact("GET", "/groups", b"[]\n")
        for name in ("shop:web", "alone", "shop:worker", "blog:web"):
            self.cat(name)
        self.exact("GET", "/groups", b'["shop", "blog"]\n')
        self.exact("GET", "/groups/shop", b'["shop:web", "shop:worker"]\n')
        for action, active in (("_stop", False), ("_start", True), ("_restart", True)):
            self.exact("POST", "/groups/shop/" + action, HTTP_OK)
            states = [self.server.ok("GET",
                                     "/status/" + name)["active"] for name in ("shop:web", "shop:worker", "blog:web")]
            self.assertEqual(states, [active, active, True])
        self.exact("POST", "/groups/shop/_restart?wait=true", HTTP_OK)
        self.exact("DELETE", "/groups/shop", HTTP_OK)
        self.exact("GET", "/processes", b'["alone", "blog:web"]\n')
        for method, path in (("GET", "/groups/shop"), ("DELETE", "/groups/alone"), ("POST", "/groups/x/_start")):
            self.assertError(self.server.json(method, path), 404, "not_found")

    def test_stdin(self):
        """POST writes all of it, DELETE is the end of file; ttin is the same; a custom stream takes the same."""
        pid, = self.server.add("cat", "cat", redirect_input=True)
        lines = self.output(pid)
        self.exact("POST", "/streams/1/stdin", HTTP_OK, b"one\n")
        self.assertEqual(next(lines), "one")
        self.exact("POST", "/streams/1/ttin", HTTP_OK, b"two\n")
        self.assertEqual(next(lines), "two")
        self.exact("POST", "/streams/1/stdin/", HTTP_OK, b"")
        self.assertError(self.server.json("GET", "/streams/1/stdin"), 405, "method_not_allowed")
        self.server.ok("POST", "/streams/cat/stdin", b"x\n")
        self.assertEqual(next(lines), "x")
        self.server.ok("POST", "/processes", dict(python("""
            import os, socket
            peer = socket.socket(fileno=3)
            data = b""
            while True:
                more = peer.recv(100)
                if not more:
                    break
                data += more
            peer.sendall(data.upper() + b"\\n")
        """), name="custom", custom_streams=["chat"]))
        pid, = self.server.ok("GET", "/processes/custom/_pids")["pids"]
        chat = self.output(pid, "chat")
        self.exact("POST", "/streams/%d/chat" % pid, HTTP_OK, b"hello")
        self.exact("DELETE", "/streams/%d/chat" % pid, HTTP_OK)
        self.assertEqual(next(chat), "HELLO")

    def test_end_of_stdin(self):
        """After it a POST is forbidden_write."""
        pid, = self.server.add("web", python("""
            import sys
            sys.stdin.read()
            print("eof")
            import signal
            signal.sigwait([])
        """), redirect_input=True)
        self.exact("DELETE", "/streams/%d/stdin" % pid, HTTP_OK)
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x"), 403, "forbidden_write")
        self.assertEqual(next(self.output(pid)), "eof")
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x"), 403, "forbidden_write")

    def test_stream_not_for_writing(self):
        """stdout can be read only, a stream that is not there is not found."""
        self.server.add("web", "sleep 60")
        self.assertError(self.server.json("POST", "/streams/1/stdout", b"x"), 405, "method_not_allowed")
        self.assertError(self.server.json("DELETE", "/streams/1/stdout"), 405, "method_not_allowed")
        self.assertError(self.server.json("POST", "/streams/1/nope", b"x"), 404, "io_not_found")
        self.assertError(self.server.json("POST", "/streams/1/stdin", b"x"), 403, "forbidden_write", "redirect_input")
        self.assertError(self.server.json("POST", "/streams/99/stdin", b"x"), 404, "not_found")

    def test_names(self):
        """1 to 128 of A-Z a-z 0-9 _ . : @ -, not all digits, not . or .., starting with neither - nor :."""
        for name in ("a", "A-Z", "a.b", "a:b", "a:b:c", "a@b", "_x", "@", ".hidden", "...", "1a", "0x10", "a" * 128,
                     "a-", "a:"):
            with self.subTest(good=name):
                self.exact("POST", "/processes", HTTP_OK, {"name": name, "cmd": "cat", "start": False})
                self.assertEqual(self.server.ok("GET", "/processes/" + urllib.parse.quote(name, safe=""))["name"], name)
        count = len(self.server.ok("GET", "/processes"))
        for name in ("", "1", "007", ".", "..", "-a", ":a", "a b", "a/b", "a" * 129, "\u00e9", "a\n", "a\0", "a%",
                     "\u0661", "a*",
                     None, 1, True, ["a"], {"a": 1}):
            with self.subTest(bad=name):
                answer = self.server.json("POST", "/processes", {"name": name, "cmd": "cat", "start": False})
                self.assertError(answer, 400, "invalid_process_info", "name")
        self.assertEqual(len(self.server.ok("GET", "/processes")), count)

    def test_labels(self):
        """1 to 64 of A-Z a-z 0-9 _ . -, not . or .., four are reserved."""
        for number, label in enumerate(("a", "A-Z_0.9", "1", "-", "...", "x" * 64, "Stdin")):
            with self.subTest(good=label):
                info = {"name": "n%d" % number, "cmd": "cat", "start": False, "redirect_output": [label]}
                self.exact("POST", "/processes", HTTP_OK, info)
        for field in ("redirect_output", "custom_streams"):
            for label in ("", ".", "..", "a/b", "a b", "a:b", "x" * 65, "\u00e9", "a\n", "stdin", "ttin", "exit",
                          "dropped", None, 1):
                with self.subTest(field=field, bad=label):
                    answer = self.server.json("POST", "/processes", {"name": "w", "cmd": "cat", "start": False,
                                                                     field: [label]})
                    self.assertError(answer, 400, "invalid_process_info", field)

    def test_pids_are_counted_and_never_reused(self):
        """From 1 up; a stopped one's number does not come back."""
        self.assertEqual(self.cat("a"), [1])
        self.server.ok("DELETE", "/processes/a")
        self.assertEqual(self.cat("a", numprocesses=2), [2, 3])
        for pid in ("0", "1", "4", "9" * 40):
            with self.subTest(pid=pid):
                self.assertError(self.server.json("GET", "/processes/" + pid), 404, "not_found")

    def test_unknown_fields_and_values_are_named(self):
        """The reason names the field, and a near match."""
        answer = self.server.json("POST", "/processes", {"name": "web", "comand": "cat"})
        self.assertError(answer, 400, "invalid_process_info", "unknown field 'comand', did you mean 'cmd'?")
        for field, value in (("numprocesses", -1), ("numprocesses", 1001), ("numprocesses", 1.5),
                             ("numprocesses", True),
                             ("graceful_timeout", -1), ("env", []), ("env", {"A": []}), ("cwd", "/no/such/place"),
                             ("shell", 1), ("start", "yes"), ("redirect_output", ["a", "b", "c"]), ("args", [1]),
                             ("uid", "nobody-of-this-name"), ("uid", 10 ** 400), ("gid", -1),
                             ("flapping", {"attempt": 1}),
                             ("custom_streams", ["a", "a"]), ("cmd", ""), ("cmd", "a 'b"), ("numprocesses", 10 ** 400)):
            with self.subTest(field=field, value=str(value)[:20]):
                answer = self.server.json("POST", "/processes", dict({"name": "web", "cmd": "cat"}, **{field: value}))
                self.assertError(answer, 400, "invalid_process_info", "'%s'" % field)
        self.assertEqual(self.server.ok("GET", "/processes"), [])

    def test_trailing_slash_is_the_same(self):
        """For every kind of path."""
        self.cat("g:web")
        for path in ("/ping", "/processes", "/processes/g:web", "/processes/1", "/processes/g:web/_pids", "/groups",
                     "/groups/g", "/stats/g:web"):
            with self.subTest(path=path):
                (status, _, one), (again, _, other) = self.server.request("GET",
                                                                          path), self.server.request("GET", path + "/")
                self.assertEqual((status, again), (200, 200))
                if "stats" not in path:
                    self.assertEqual(one, other)
        self.exact("POST", "/processes/g:web/_stop/", HTTP_OK)
        self.exact("POST", "/processes/", HTTP_OK, {"name": "new", "cmd": "cat", "start": False})
        self.exact("DELETE", "/processes/new/", HTTP_OK)
        for path in ("//", "/processes//_pids", "/processes/g:web//", "//ping", "/processes/g:web/_pids/x"):
            with self.subTest(path=path):
                self.assertEqual(self.server.json("GET", path)[0], 404)

    def test_head_is_get_without_a_body(self):
        """The same status and the same headers, for every GET route that answers at once."""
        self.server.add("g:web", "echo hello", numprocesses=1, flapping={"attempts": 1, "retry_in": 1000})
        self.server.wait_event("exit")
        self.cat("g:cat")
        pid = self.server.ok("GET", "/processes/g:cat/_pids")["pids"][0]
        paths = ["/", "/ping", "/processes", "/processes/g:cat", "/processes/%d" % pid, "/processes/g:cat/_pids",
                 "/status/g:cat", "/stats", "/stats/g:cat", "/stats/g:cat/%d" % pid, "/groups", "/groups/g",
                 "/watch?since=0",
                 "/watch/exit?since=0", "/streams/1/stdout?since=0", "/streams/1/stdout",
                 "/streams/g:web/stdout?since=0",
                 "/nothing", "/processes/nobody", "/wstreams/%d" % pid]
        for path in paths:
            with self.subTest(path=path):
                wire = self.wire()
                wire.send(http_bytes("GET", path) + http_bytes("HEAD", path) + http_bytes("GET", "/ping"))
                status, headers, _ = wire.answer()
                again, same, _ = wire.answer("HEAD")
                self.assertEqual(status, again)
                varying = {"date"} | ({"content-length"} if path.startswith(("/stat", "/processes/g:cat")) else set())
                self.assertEqual(set(headers), set(same))
                for name in set(headers) - varying:
                    self.assertEqual(headers[name], same[name], name)
                self.assertEqual(wire.answer()[2], b"OK")       # the HEAD had no body, or this would be in it
                wire.close()

    def test_head_of_what_would_wait_answers_at_once(self):
        """With the head that GET would begin with: no length that GET would not have (RFC 9110 section 8.6)."""
        self.cat("web")
        for path in ("/watch", "/streams/1/stdout", "/streams/web/stdout", "/stats?feed=longpoll&interval=1000"):
            with self.subTest(path=path):
                wire = self.wire()
                wire.send(http_bytes("HEAD", path) + http_bytes("GET", "/ping"))
                status, headers, _ = wire.answer("HEAD")
                self.assertEqual(status, 200)
                self.assertNotEqual(headers.get("content-length"), ["0"])
                self.assertEqual(wire.answer()[2], b"OK")
                wire.close()

    def test_head_of_a_feed(self):
        """Of one that goes on for ever too."""
        self.cat("web")
        for path in ("/watch?feed=continuous", "/watch?feed=eventsource", "/streams/1/stdout?feed=continuous",
                     "/streams/1/stdout?feed=eventsource&since=0", "/stats?feed=eventsource",
                     "/stats/web?feed=continuous"):
            with self.subTest(path=path):
                wire = self.wire()
                wire.send(http_bytes("GET", path))
                line = wire.file.readline()
                headers = dict(http.client.parse_headers(wire.file))
                wire.close()
                wire = self.wire()
                wire.send(http_bytes("HEAD", path, "Connection: close"))
                self.assertEqual(wire.file.readline(), line)
                same = dict(http.client.parse_headers(wire.file))
                self.assertEqual(wire.rest(), b"")
                headers.pop("Date")
                same.pop("Date")
                self.assertEqual(same, headers)
                wire.close()


class HttpMetrics(HttpCase):
    """/metrics: what it counts has happened."""

    options = {"window": 4096, "handlers": [("/slow", lambda request: (202, {}, b""))],
               "wsgi": {"/wsgi": lambda environ, start: start("404 Not Found", [("X", "y")]) and [] or [b"gone"]}}

    def metrics(self):
        """{name: {labels as a string: number}}"""
        status, headers, data = self.server.request("GET", "/metrics")
        self.assertEqual((status, headers["Content-Type"]), (200, "text/plain; version=0.0.4; charset=utf-8"))
        found = prom_parse(data)
        self.assertTrue(all(name.startswith(("gaffer_", "process_")) for name in found), list(found))
        return {sample + "".join(" " + value for _, value in labels): number
                for _, samples in found.values() for (sample, labels), number in samples.items()}

    def test_processes(self):
        self.server.add("web:a", python("import sys; sys.exit(sys.stdin.read() and 7)"), redirect_input=True, numprocesses=2,
                        flapping={"attempts": 9})
        self.cat("off", start=False, numprocesses=5)
        found = self.metrics()
        self.assertEqual([found["gaffer_processes %s %s" % pair] for pair in itertools.product(
            ("web:a", "off"), ("running", "stopping", "waiting"))], [2, 0, 0, 0, 0, 0])
        self.assertEqual((found["gaffer_processes_wanted web:a"], found["gaffer_processes_wanted off"]), (2, 0))
        self.server.request("POST", "/streams/1/stdin", b"x")
        self.server.request("DELETE", "/streams/1/stdin")
        self.server.ok("POST", "/processes/2/_signal/KILL")
        until(lambda: self.metrics()["gaffer_process_restarts_total web:a"] == 2)
        found = self.metrics()
        self.assertEqual([found["gaffer_process_exits_total web:a " + which] for which in ("7 0", "0 9")], [1, 1])
        self.server.ok("DELETE", "/processes/web:a")
        self.assertNotIn("gaffer_processes_wanted web:a", self.metrics())

    def test_streams(self):
        self.cat("web")
        for _ in range(4):
            self.server.request("POST", "/streams/1/stdin", b"x" * 1023 + b"\n")
            self.server.request("POST", "/streams/1/stdin", b"y" * 1023 + b"\n")
        until(lambda: self.metrics()["gaffer_stream_bytes_total web stdout"] == 8192)
        self.assertEqual(self.metrics()["gaffer_stream_dropped_bytes_total web stdout"], 0)
        lost = 0
        for path in ("1/stdout?since=1000", "1/stdout?feed=continuous&since=1000", "web/stdout?feed=eventsource&since=1024",
                     "1/stdout?feed=eventsource&since=0"):
            answer = self.server.stream("/streams/" + path)
            self.addCleanup(answer.connection.close)
            self.addCleanup(answer.close)
            told = answer.headers["Gaffer-Dropped"] or json.loads(next(sse_events(answer))["data"])["bytes"]
            lost += int(told)
        found = self.metrics()
        self.assertEqual(found["gaffer_stream_dropped_bytes_total web stdout"], lost)
        self.assertEqual((found["gaffer_http_streams continuous"], found["gaffer_http_streams eventsource"]), (1, 2))

    def test_input_that_waits(self):
        self.server.add("deaf", "sleep 1000", redirect_input=True)
        self.server.request("POST", "/streams/1/stdin", b"x" * 1000000)
        waits = self.metrics()["gaffer_input_waiting_bytes deaf stdin 1"]
        self.assertTrue(900000 <= waits < 1000000, waits)

    def test_requests_and_clients(self):
        self.cat("web")
        before = self.metrics()
        for method, path in [("GET", "/ping")] * 3 + [("POST", "/slow"), ("GET", "/nothing"), ("GET", "/wsgi"), ("FOO", "/"), ("BAR", "/"),
                                                      ("GET", "/watch?timeout=0"), ("HEAD", "/watch?feed=continuous")]:
            self.server.request(method, path)
        self.assertEqual(self.ask(b"no request\r\n\r\n")[0], 400)
        socket_ = self.websocket("/wstreams/1?readonly=true")
        poll = self.wire()
        poll.send(http_bytes("GET", "/streams/1/stdout"))
        found = until(lambda: (lambda found: found["gaffer_http_streams longpoll"] and found)(self.metrics()))
        self.assertEqual((found["gaffer_http_streams websocket"], socket_.status), (1, 101))
        polled = found["gaffer_http_requests_total GET 200"] - before.get("gaffer_http_requests_total GET 200", 0)
        self.assertGreaterEqual(polled, 4)      # the pings, and the looks before this one
        for labels, count in (("POST 202", 1), ("GET 404", 2), ("other 501", 2), ("other 400", 1), ("GET 204", 1), ("HEAD 200", 1),
                              ("GET 101", 1), ("POST 200", 1)):
            self.assertEqual(found["gaffer_http_requests_total " + labels], count, labels)
        answered = sum(number for name, number in found.items() if name.startswith("gaffer_http_requests_total"))
        waited = 5                              # the poll of events, the feed, the websocket, the application, the bad head
        self.assertEqual(found["gaffer_http_request_seconds_count"], answered - waited)
        self.assertGreaterEqual(found["gaffer_http_connections"], 3)
        poll.close()
        until(lambda: not self.metrics()["gaffer_http_streams longpoll"], "the end of the poll")

    def test_itself(self):
        self.cat("web")
        found = self.metrics()
        self.assertEqual(found["gaffer_events_total"], 3)
        self.assertEqual(found["gaffer_events_dropped_total"], 0)
        self.assertEqual(found["gaffer_info %s %s" % (gaffer.__version__, ".".join(map(str, sys.version_info[:3])))], 1)
        self.assertLess(abs(found["process_start_time_seconds"] - time.time()), TIMEOUT)
        self.assertGreater(found["process_resident_memory_bytes"], 2 ** 20)
        self.assertGreater(found["process_virtual_memory_bytes"], found["process_resident_memory_bytes"])
        self.assertGreater(found["process_cpu_seconds_total"], 0)
        self.assertLessEqual(abs(found["process_open_fds"] - len(open_descriptors())), 4)
        self.assertGreater(found["process_max_fds"], found["process_open_fds"])
        self.assertGreater(found["gaffer_loop_turns_total"], 0)

    def test_events_that_were_lost(self):
        self.cat("web", start=False)
        for change in ("_add", "_sub") * (gaffer.EVENTS_KEPT // 2 + 1):
            self.server.ok("POST", "/processes/web/" + change)
        value = self.server.ok("GET", "/watch?since=0")
        self.assertEqual(value["event"], "dropped")
        self.assertEqual(self.metrics()["gaffer_events_dropped_total"], value["events"])


class HttpAccessLog(HttpCase):
    """--access-log: a line for each request."""

    TOKEN = "s\u00e9cret/ +x"
    bearer = {"Authorization": "Bearer " + TOKEN.encode().decode("latin-1")}

    def setUp(self):
        Case.setUp(self)
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = os.path.join(self.folder.name, "access.log")

    def serve(self, path=None, **options):
        """A server that logs."""
        self.server = Running(access_log=gaffer.AccessLog(path or self.path), wsgi={"/wsgi": self.application}, **options)
        self.addCleanup(self.server.stop_all)

    @staticmethod
    def application(environ, start):
        """WSGI"""
        start("404 Not Found", [("X", "y")])
        return [b"go", b"ne"]

    def lines(self, count=None):
        """What is in the file, once that is so many lines; None: after the end of the server."""
        if count is None:
            self.server.stop_all()
        else:
            until(lambda: os.path.exists(self.path) and cli_read(self.path).count("\n") >= count, "%d lines" % count)
        return access_lines(cli_read(self.path))

    def test_requests_and_refusals(self):
        self.serve()
        began = time.time()
        self.server.request("GET", "/ping?_x=%22y", headers={"User-Agent": "me", "Referer": "http://there/"})
        self.server.request("HEAD", "/ping")
        size = len(self.server.request("POST", "/processes", b"no json")[2])
        self.assertEqual(self.ask(b"GET /\xff\r\n\r\n")[0], 400)
        self.server.request("GET", "/watch?timeout=0")
        self.server.request("GET", "/wsgi/x")
        self.lines(6)                               # what has a thread is logged when that ends
        self.server.request("HEAD", "/wsgi")
        self.lines(7)
        self.ask(http_bytes("GET", "/x", 'User-Agent: "\t\x80\\'))
        lines = self.lines(8)
        self.assertEqual([(line[0], line[2], line[3]) for line in lines], [("127.0.0.1", *rest) for rest in (
            ("GET /ping?_x=%22y HTTP/1.1", 200), ("HEAD /ping HTTP/1.1", 200), ("POST /processes HTTP/1.1", 400), ("-", 400),
            ("GET /watch?timeout=0 HTTP/1.1", 204), ("GET /wsgi/x HTTP/1.1", 404), ("HEAD /wsgi HTTP/1.1", 404),
            ("GET /x HTTP/1.1", 404))])
        self.assertEqual([line[4] for line in lines[:3]] + [line[4] for line in lines[4:7]], [2, 0, size, 0, 4, 0])
        self.assertEqual((lines[0][5:], lines[1][5:]), (("http://there/", "me"), ("-", "-")))
        self.assertEqual(lines[7][6], r"\x22\x09\x80\x5c")
        for line in lines:
            moment = time.mktime(time.strptime(line[1][:-6], "%d/%b/%Y:%H:%M:%S"))
            self.assertTrue(int(began) <= moment <= time.time(), line)
            self.assertEqual(line[1][-5:], time.strftime("%z"))

    def test_streams_have_their_line_at_their_end(self):
        self.serve()
        self.cat()
        self.lines(2)
        answer = self.server.stream("/streams/1/stdout?feed=continuous")
        made = self.websocket("/wstreams/1")
        made.text("hello\n")
        self.assertEqual((answer.readline(), made.read()), (b"hello\n", (1, b"hello\n")))
        poll = self.wire()
        poll.send(http_bytes("GET", "/streams/1/stdout?since=6"))
        until(lambda: self.server.manager.loop.call(lambda: [c for c in self.server.http.channels if c.kind == "longpoll"]))
        self.assertEqual(len(self.lines(2)), 2)
        for opened in (answer, answer.connection, made, poll):
            opened.close()
        lines = {line[2]: line[3:5] for line in self.lines(5)}
        self.assertEqual(lines["GET /streams/1/stdout?feed=continuous HTTP/1.1"], (200, len(b"6\r\nhello\n\r\n")))
        self.assertEqual(lines["GET /wstreams/1 HTTP/1.1"], (101, 8))
        self.assertEqual(lines["GET /streams/1/stdout?since=6 HTTP/1.1"], (499, 0))

    def test_the_token_is_never_in_it(self):
        self.serve(token=self.TOKEN)
        basic = "Basic " + base64.b64encode((":" + self.TOKEN).encode()).decode()
        quoted = urllib.parse.quote(self.TOKEN, "")
        for headers in (self.bearer, {"Authorization": basic}, {"Authorization": "Bearer wrong"},
                        {"Referer": "http://u:%s@h/" % quoted, "User-Agent": self.bearer["Authorization"]}, {"User-Agent": basic}):
            for target in ("/processes", "/processes?token=" + quoted, "/processes?token=" + urllib.parse.quote_plus(self.TOKEN)):
                self.server.request("GET", target, headers=headers)
        self.lines()
        text = cli_read(self.path)
        self.assertEqual(text.count("\n"), 15)
        self.assertEqual(text.count("token=*** "), 10)
        for secret in ("cret", basic.partition(" ")[2]):
            self.assertNotIn(secret, text)

    def test_a_file_that_was_moved_away(self):
        self.serve()
        self.server.request("GET", "/ping?1")
        self.lines(1)
        os.rename(self.path, self.path + ".1")
        self.server.request("GET", "/ping?2")
        self.assertEqual(self.lines(1)[0][2], "GET /ping?2 HTTP/1.1")
        self.assertEqual(len(access_lines(cli_read(self.path + ".1"))), 1)

    def test_a_pipe_that_nobody_reads_and_that_is_closed(self):
        """Nothing waits for it: not the start, not a request, not the end; what is lost is told once a minute."""
        os.mkfifo(self.path)
        with self.assertRaisesRegex(gaffer.StartError, "access log"):
            self.serve()
        read = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(lambda: read is None or os.close(read))
        with unittest.mock.patch("gaffer.LOG_SIZE", 80000), unittest.mock.patch("gaffer.LOG_END", 0.05):
            self.serve()
            with self.assertLogs("gaffer", "WARNING") as logged:
                while not logged.output:        # the pipe is full, and then the queue
                    self.server.request("GET", "/ping?" + "x" * 7000)
                self.assertRegex(logged.output[0], r"cannot be written: nobody takes it; 1 lines are lost so far")
                data = b""
                while len(data) < 10 * 7100:    # a reader that comes back gets whole lines
                    with contextlib.suppress(BlockingIOError):
                        data += os.read(read, 65536)
                access_lines(data[:data.rfind(b"\n") + 1].decode())
                while not self.server.http.access_log._writer.full:
                    self.server.request("GET", "/ping?" + "x" * 7000)
                self.server.stop_all()
                os.close(read)
                read = None
            self.assertEqual(len(logged.output), 1)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk(self):
        self.serve("/dev/full")
        with self.assertLogs("gaffer", "WARNING") as logged:
            for _ in range(3):
                self.assertEqual(self.server.request("GET", "/ping")[0], 200)
            until(lambda: logged.output)
            self.server.stop_all()
        self.assertRegex(logged.output[0], "access log ./dev/full. cannot be written: no space left on device; [1-3] lines")
        self.assertEqual(len(logged.output), 1)


class CliLogFile(Case):
    """The server's log, on stderr or in a file."""

    def test_a_pipe_that_nobody_reads(self):
        """Nothing waits for it: not the start, not a line, not the end."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "log")
        os.mkfifo(path)
        with self.assertRaisesRegex(gaffer.StartError, "the log file '.*' cannot be written"):
            gaffer.LogHandler(path)
        read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, read)
        with unittest.mock.patch("gaffer.LOG_SIZE", 8192), unittest.mock.patch("gaffer.LOG_END", 0.05):
            handler = gaffer.LogHandler(path)
            filler, count, data = 0, 0, b""
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler += os.write(handler.writer.fd, b"-")
            while not handler.writer.full:
                handler.emit(logging.makeLogRecord({"msg": "line %d" % count}))
                count += 1
            for _ in range(7):
                handler.emit(logging.makeLogRecord({"msg": "lost"}))
            while handler.writer.full:
                with contextlib.suppress(BlockingIOError):
                    data += os.read(read, 65536)
            handler.emit(logging.makeLogRecord({"msg": "more"}))
            while not data.endswith(b"more\n"):
                with contextlib.suppress(BlockingIOError):
                    data += os.read(read, 65536)
            self.assertEqual(data[filler:], b"".join(b"line %d\n" % number for number in range(count)) +
                             b"gaffer: 7 lines of this log were dropped here\nmore\n")
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(handler.writer.fd, b"-")
            handler.emit(logging.makeLogRecord({"msg": "the end"}))
            handler.close()                     # waits no longer than it may
            while handler.writer._thread.is_alive():
                with contextlib.suppress(BlockingIOError):
                    os.read(read, 65536)

    def test_reopened_by_several_at_once(self):
        """Each descriptor is closed once, by its owner: it may be a client's socket by then."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "log")
        before = set(open_descriptors())
        handler, end = gaffer.LogHandler(path), threading.Event()
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)

        def reopen():
            for number in range(300):
                handler.emit(logging.makeLogRecord({"msg": "line %d" % number}))
                handler.writer.reopen()

        def borrow():               # its close() fails if gaffer has closed its descriptor
            while not end.is_set():
                with open(os.devnull, "rb"):
                    pass
        stranger = threading.Thread(target=borrow)
        threads = [threading.Thread(target=reopen) for _ in range(3)]
        for thread in (stranger, *threads):
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        end.set()
        stranger.join(TIMEOUT)
        handler.emit(logging.makeLogRecord({"msg": "the end"}))
        until(lambda: "the end" in cli_read(path), "the last line")
        left = [what for fd, what in open_descriptors().items() if fd not in before]
        self.assertEqual(left, [path])
        handler.close()


class HttpProbes(HttpCase):
    """/healthz and /readyz."""

    options = {"token": "secret"}
    bearer = {"Authorization": "Bearer secret"}

    def ready(self):
        """(status, value)"""
        return self.server.json("GET", "/readyz", headers=self.bearer)

    def test_health_needs_no_token(self):
        for method in ("GET", "HEAD"):
            status, headers, data = self.server.request(method, "/healthz")
            self.assertEqual((status, headers["Content-Type"], data), (200, "text/plain", b"OK" if method == "GET" else b""))
        self.assertEqual(self.server.json("POST", "/healthz")[0], 401)
        self.assertEqual(self.server.json("GET", "/readyz")[0], 401, "it names templates")
        self.assertEqual(self.server.json("GET", "/metrics")[0], 401)
        self.assertEqual(self.server.json("GET", "/openapi.json")[0], 401)

    def test_ready_when_all_run_that_are_to(self):
        self.assertEqual(self.ready(), (200, {"ready": True, "waiting": []}))
        manager = self.server.manager
        manager.add_process("web", "cat", redirect_input=True, numprocesses=2)
        manager.add_process("off", "cat", start=False)
        self.assertEqual(self.ready(), (200, {"ready": True, "waiting": []}))
        manager.add_process("ends", "true", flapping={"attempts": 1, "retry_in": 1000})
        manager.get_process("web").signal("STOP")
        status, value = until(lambda: self.ready()[0] == 503 and self.ready())
        self.assertEqual((status, value), (503, {"ready": False, "waiting": ["ends"]}))
        manager.stop_template("ends")
        self.assertEqual(self.ready(), (200, {"ready": True, "waiting": []}))

    def test_not_ready_while_stopping(self):
        self.server.manager.loop.call(setattr, self.server.manager, "stopping", True)
        self.assertEqual(self.ready(), (503, {"ready": False, "waiting": []}))
        self.server.manager.loop.call(setattr, self.server.manager, "stopping", False)


class HttpOpenapi(HttpCase):
    """/openapi.json: every route is described, and the description is right."""

    quick = False

    def test_every_route_and_method(self):
        described = self.server.ok("GET", "/openapi.json")
        self.assertEqual((described["openapi"], described["info"]["version"]), ("3.1.0", gaffer.__version__))
        self.assertNotIn("security", described)
        shapes = {re.sub(r"{\w+}", "<>", path): methods for path, methods in described["paths"].items()}
        self.assertEqual(len(shapes), len(described["paths"]), "two paths differ in names alone")
        seen = set()
        for pattern, methods in gaffer.ROUTES:
            shape = re.sub(r"<[^>]+>", "<>", pattern)
            for method in set(methods) - {"*"} | ({"HEAD"} if "GET" in methods else set()):
                with self.subTest(route=pattern, method=method):
                    self.assertRegex(shapes[shape][method.lower()]["summary"], "^[A-Z].{8,}")
                    seen.add((shape, method))
        self.assertEqual(seen, {(shape, method.upper()) for shape, methods in shapes.items() for method in methods
                                } - {("/watch/" + "/".join(["<>"] * n), method) for n in (2, 3) for method in ("GET", "HEAD")})

    def test_its_form(self):
        """What the specification asks for, as far as it can be told without a validator."""
        described = gaffer.openapi(gaffer.ROUTES, True)
        ids = []
        for path, methods in described["paths"].items():
            for method, said in methods.items():
                with self.subTest(path=path, method=method):
                    ids.append(said["operationId"])
                    places = [(one["name"], one["in"]) for one in said["parameters"]]
                    self.assertEqual([name for name, where in places if where == "path"], re.findall(r"{(\w+)}", path))
                    self.assertEqual(len(set(places)), len(places))
                    self.assertTrue(all("schema" in one for one in said["parameters"]))
                    self.assertIn("default", said["responses"])
                    self.assertEqual("security" in said, path in gaffer.OPEN_PATHS)
        self.assertEqual(len(set(ids)), len(ids))
        for ref in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(described))):
            functools.reduce(lambda value, key: value[key], ref.split("/"), described)
        for security in described["security"]:
            self.assertLessEqual(set(security), set(described["components"]["securitySchemes"]))

    def test_a_template_has_all_its_fields(self):
        fields = gaffer.openapi(gaffer.ROUTES, False)["components"]["schemas"]["Template"]["properties"]
        self.assertEqual(list(fields), list(gaffer.OPTIONS))
        for name, option in gaffer.OPTIONS.items():
            kinds = fields[name]["type"]
            kind = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object", type(None): "null"}[type(option.default)]
            if name not in ("name", "cmd"):
                self.assertIn(kind, [kinds, "integer" if kinds == "number" else ""] if isinstance(kinds, str) else kinds, name)

    def test_every_parameter_is_taken_somewhere(self):
        taken = {name for _, methods in gaffer.ROUTES for method, handler in methods.items() if method != "*"
                 for name in handler.query}
        self.assertEqual(taken, set(gaffer.PARAMETERS))

    def test_parameters(self):
        """What each takes and refuses, and that an unknown one is refused with a near match."""
        for name, good, bad in (
                ("feed", (("longpoll", "longpoll"),), ("", "x", "Longpoll")),
                ("running", (("true", True), ("1", True), ("false", False), ("0", False)), ("", "yes", "True")),
                ("timeout", (("0", 0.0), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("9.999912345678", 9.999912345678),
                             ("0000000000012", 12.0)), ("", "-1", "+1", "1e3", "nan", "inf", "1,5", "9" * 400, "\u0663", "\xb2")),
                ("heartbeat", (("true", 60.0), ("false", None), ("0.1", 0.1)), ("0", "soon", "0.05", "")),
                ("wait", (("true", True), ("2", 2.0)), ("x",)), ("interval", (("0.1", 0.1),), ("0",)),
                ("tail", (("all", math.inf), ("0", 0), ("12", 12)), ("-1", "1.0", "", "9" * 10, "\u0663")),
                ("loss", (("skip", "skip"),), ("cut", "")), ("since", (("", None),), ("x", "-1", "1@", "1@x@", "1.0", "\xb2"))):
            for text, wanted in good:
                with self.subTest(name=name, text=text):
                    request = pure_request(target="/?%s=%s" % (name, text))
                    self.assertEqual(getattr(gaffer.parse_query(request, (name,)), name), wanted)
            for text in bad:
                request = pure_request(target="/?%s=%s" % (name, urllib.parse.quote(text)))
                with self.subTest(name=name, text=text[:20]), self.assertRaisesRegex(gaffer.BadValue, "^'%s' must be " % name):
                    gaffer.parse_query(request, (name,))
        self.assertEqual(vars(gaffer.parse_query(pure_request(target="/?_=7"), ("feed",))), {"feed": None})

    def test_what_a_route_does_not_know(self):
        """A parameter that it does not have, or a wrong value of one that this feed does not use."""
        for method, target, words in (
                ("GET", "/streams?tail=all&grep=hello", "unknown parameter 'grep'"),
                ("GET", "/status?usag=true", "did you mean 'usage'?"), ("GET", "/ping?x=1", "takes none"),
                ("GET", "/watch?feed=longpoll&heartbeat=soon", "'heartbeat' must be"),
                ("GET", "/stats?interval=5x", "'interval' must be"), ("POST", "/processes?dry=1", "did you mean 'dry_run'?"),
                ("HEAD", "/processes?zzz=1", None)):
            with self.subTest(target):
                if words is None:
                    self.assertEqual(self.server.request(method, target)[0], 400)
                else:
                    self.assertError(self.server.json(method, target), 400, "bad_value", words)
        self.assertEqual(self.server.request("GET", "/ping?_=1&_x=2")[0], 200)

    def test_a_route_without_a_description_is_found(self):
        with self.assertRaises(AttributeError):
            gaffer.openapi((*gaffer.ROUTES, ("/new", {"GET": lambda api, request: "x"})), False)

    def test_it_is_valid(self):
        try:
            import openapi_spec_validator
        except ImportError:
            self.skipTest("needs openapi-spec-validator from PyPI")
        for secured in (True, False):
            openapi_spec_validator.validate(json.loads(json.dumps(gaffer.openapi(gaffer.ROUTES, secured))),
                                            cls=openapi_spec_validator.OpenAPIV31SpecValidator)

    def test_its_schemas_say_what_gaffer_does(self):
        try:
            import jsonschema
        except ImportError:
            self.skipTest("needs jsonschema from PyPI")
        schema = gaffer.openapi(gaffer.ROUTES, False)["components"]["schemas"]["Template"]
        base = {"name": "x", "cmd": "true"}
        for more in ({}, {"args": "a b"}, {"args": ["a"]}, {"env": {"A": 1, "B": "b"}}, {"uid": 0}, {"flapping": {"attempts": 3}},
                     {"numprocesses": 1000}, {"numprocesses": 1001}, {"numprocesses": 1.5}, {"name": "1"}, {"name": "a:b"}, {"name": ".."},
                     {"args": 1}, {"unknown": 1}, {"redirect_output": ["a", "a"]}, {"redirect_output": ["a", "b", "c"]},
                     {"custom_streams": ["a", "a"]}, {"env": {"A": True}}, {"start": 1}, {"graceful_timeout": -1}, {"cmd": ""},
                     {"priority": -3}, {"flapping": {"tries": 3}}, {"cwd": "/"}, {"shell": "yes"}):
            with self.subTest(**more):
                try:
                    gaffer.check_template(dict(base, **more))
                    good = True
                except gaffer.InvalidProcessInfo:
                    good = False
                self.assertEqual(jsonschema.Draft202012Validator(schema).is_valid(dict(base, **more)), good)
        template = gaffer.check_template(base)
        jsonschema.validate(template, schema)


class HttpMethods(HttpCase):
    """405 with Allow, OPTIONS, and what is no route."""

    ROUTES = {
        "/": "GET, HEAD, OPTIONS", "/ping": "GET, HEAD, OPTIONS", "/processes": "GET, HEAD, POST, OPTIONS",
        "/processes/web": "GET, HEAD, POST, PUT, DELETE, OPTIONS", "/processes/1": "GET, HEAD, DELETE, OPTIONS",
        "/processes/web/_pids": "GET, HEAD, OPTIONS", "/processes/web/_start": "POST, OPTIONS",
        "/processes/web/_stop": "POST, OPTIONS", "/processes/1/_stop": "POST, OPTIONS",
        "/processes/web/_restart": "POST, OPTIONS",
        "/processes/web/_add": "POST, OPTIONS", "/processes/web/_add/2": "POST, OPTIONS",
        "/processes/web/_sub": "POST, OPTIONS",
        "/processes/web/_sub/2": "POST, OPTIONS", "/processes/web/_signal": "POST, OPTIONS",
        "/processes/web/_signal/TERM": "POST, OPTIONS", "/status/web": "GET, HEAD, OPTIONS",
        "/stats": "GET, HEAD, OPTIONS",
        "/stats/web": "GET, HEAD, OPTIONS", "/stats/web/1": "GET, HEAD, OPTIONS", "/groups": "GET, HEAD, OPTIONS",
        "/groups/g": "GET, HEAD, DELETE, OPTIONS", "/groups/g/_start": "POST, OPTIONS",
        "/groups/g/_stop": "POST, OPTIONS",
        "/groups/g/_restart": "POST, OPTIONS", "/watch": "GET, HEAD, OPTIONS", "/watch/exit": "GET, HEAD, OPTIONS",
        "/watch/proc/web": "GET, HEAD, OPTIONS", "/watch/proc/web/exit": "GET, HEAD, OPTIONS",
        "/streams/1/stdout": "GET, HEAD, OPTIONS", "/streams/1/stdin": "POST, DELETE, OPTIONS",
        "/wstreams/1": "GET, HEAD, OPTIONS",
    }

    def test_every_wrong_method(self):
        """405 for each route and each method it has not, with what it has; 501 for what is no method."""
        self.cat("web")
        for path, allow in self.ROUTES.items():
            self.assertCode(self.ask(http_bytes("get" if "GET" in allow else "FOO", path)), 501, "method_not_allowed")
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE"):
                if method in allow.split(", "):
                    continue
                with self.subTest(method=method, path=path):
                    answer = self.ask(http_bytes(method, path), method)
                    if method != "HEAD":
                        self.assertCode(answer, 405, "method_not_allowed")
                    self.assertEqual((answer[0], answer[1].get("allow")), (405, [allow]))
        self.assertEqual(self.server.ok("GET", "/processes?running=true"), [1])

    def test_options_anywhere(self):
        """204 without a body, on every path and on none."""
        self.cat("web")
        for path in [*self.ROUTES, "/nothing", "/a/b/c/d/e", "/processes/nobody", "/?a=1&a=2"]:
            with self.subTest(path=path):
                wire = self.wire()
                wire.send(http_bytes("OPTIONS", path) + http_bytes("GET", "/ping"))
                status, headers, _ = wire.answer("OPTIONS")
                self.assertEqual(status, 204)
                self.assertNotIn("content-length", headers)
                self.assertEqual(wire.answer()[2], b"OK")
                wire.close()

    def test_options_of_the_server(self):
        """OPTIONS * (RFC 9112 section 3.2.4), and * for nothing else."""
        wire = self.wire()
        wire.send(http_bytes("OPTIONS", "*") + http_bytes("GET", "/ping"))
        self.assertEqual(wire.answer("OPTIONS")[0], 204)
        self.assertEqual(wire.answer()[2], b"OK")
        self.assertRefused(http_bytes("GET", "*"))
        self.assertRefused(http_bytes("POST", "*"))

    def test_no_such_route(self):
        """404 for every method."""
        self.cat("web")
        for path in ("/nothing", "/processes/web/_nothing", "/processes/web/start", "/processes/web/_add/1/2", "/stat",
                     "/status/web/x", "/stream", "/streams/1/stdout/x", "/groups/g/_add", "/Processes",
                     "/index.html"):
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
                with self.subTest(method=method, path=path):
                    self.assertCode(self.ask(http_bytes(method, path), method), 404, "resource_not_found")

    def test_method_override_is_ignored(self):
        """X-HTTP-Method-Override changes nothing."""
        self.cat("web")
        answer = self.ask(http_bytes("GET", "/processes/web", "X-HTTP-Method-Override: DELETE"))
        self.assertEqual((answer[0], json.loads(answer[2].decode())["name"]), (200, "web"))
        answer = self.ask(http_bytes("POST", "/processes/web/_start", "X-HTTP-Method-Override: GET"))
        self.assertEqual((answer[0], answer[2]), (200, HTTP_OK))
        self.assertEqual(self.server.ok("GET", "/processes"), ["web"])

    def test_get_changes_nothing(self):
        """Nor does HEAD: no action can be had by a link or an image."""
        self.cat("g:web")
        for action in ("/processes/g:web/_stop", "/processes/g:web/_restart", "/processes/1/_stop", "/groups/g/_stop",
                       "/processes/g:web/_sub", "/processes/g:web/_signal/KILL", "/processes/1/_signal/KILL"):
            for method in ("GET", "HEAD"):
                with self.subTest(method=method, action=action):
                    self.assertEqual(self.ask(http_bytes(method, action), method)[0], 405)
        self.assertEqual(self.server.ok("GET", "/processes?running=true"), [1])


class HttpErrorTable(HttpCase):
    """Every code of the contract's table of errors, each by a real request. A method for each makes the answer."""

    options = {"handlers": [("/boom", lambda request: 1 / 0)]}

    def code_invalid_json(self):
        return self.server.json("POST", "/processes", b"{")

    def code_invalid_process_info(self):
        return self.server.json("POST", "/processes", {"name": "x", "comand": "y"})

    def code_bad_value(self):
        return self.server.json("POST", "/processes/web/_add/0")

    def code_no_signal_number(self):
        return self.server.json("POST", "/processes/web/_signal")

    def code_io_not_redirected(self):
        return self.server.json("GET", "/streams/%d/stdout" % self.quiet)

    def code_bad_request(self):
        return self.server.json("GET", "/%zz")

    def code_unauthorized(self):
        server = Running(token="secret")
        self.addCleanup(server.stop_all)
        return server.json("GET", "/processes")

    def code_forbidden_write(self):
        return self.server.json("POST", "/streams/%d/stdin" % self.quiet, b"x")

    def code_forbidden_origin(self):
        return self.server.json("DELETE", "/processes/web", headers={"Origin": "http://evil.example"})

    def code_forbidden_host(self):
        return self.server.json("GET", "/ping", headers={"Host": "evil.example"})

    def code_forbidden(self):
        """A process of another user: gaffer's effective user changes for one request."""
        os.setresuid(65534, 65534, 0)
        try:
            return self.server.json("POST", "/processes/%d/_signal/USR1" % self.quiet)
        finally:
            os.setresuid(0, 0, 0)

    def code_not_found(self):
        return self.server.json("GET", "/processes/nobody")

    def code_resource_not_found(self):
        return self.server.json("POST", "/processes/web/_jump")

    def code_io_not_found(self):
        return self.server.json("GET", "/streams/web/sound")

    def code_bad_event_type(self):
        return self.server.json("GET", "/watch/party")

    def code_method_not_allowed(self):
        return self.server.json("PUT", "/processes", {})

    def code_timeout(self):
        with http_limits(HEAD_TIME=0.05):
            wire = self.wire()
            wire.send(b"GET / HTTP/1.1\r\nHost:")
            status, _, body = wire.answer()
            return status, json.loads(body.decode())

    def code_too_large(self):
        return self.server.json("POST", "/streams/1/stdin", bytes(gaffer.BODY_SIZE + 1))

    def code_uri_too_long(self):
        return self.server.json("GET", "/" + "x" * gaffer.TARGET_SIZE)

    def code_unsupported_media_type(self):
        return self.server.json("POST", "/processes", b"x", {"Content-Encoding": "gzip"})

    def code_conflict(self):
        return self.server.json("POST", "/processes", {"name": "web", "cmd": "cat"})

    def code_upgrade_required(self):
        return self.server.json("GET", "/wstreams/1")

    def code_headers_too_large(self):
        return self.server.json("GET", "/", headers={"X-%d" % number: "x" for number in range(gaffer.HEADERS_MAX)})

    def code_internal_error(self):
        with self.assertLogs("gaffer") as logged:
            answer = self.server.json("GET", "/boom")
        self.assertIn("ZeroDivisionError", "".join(logged.output))
        self.assertNotIn("ZeroDivision", str(answer))
        return answer

    def code_stdin_full(self):
        pid, = self.server.add("full", "sleep 60", redirect_input=True)
        half = bytes(gaffer.STDIN_SIZE * 3 // 4)
        self.server.ok("POST", "/streams/%d/stdin" % pid, half)
        return self.server.json("POST", "/streams/%d/stdin" % pid, half)

    def code_busy(self):
        with http_limits(CONNECTIONS_MAX=0), self.assertLogs("gaffer"):
            wire = self.wire()
            status, _, body = wire.answer()
            return status, json.loads(body.decode())

    def code_stopping(self):
        server = Running()
        self.addCleanup(server.stop_all)
        pid, = server.add("deaf", python(HTTP_DEAF), redirect_input=True)
        answer, events = server.sse("/streams/%d/stdout?feed=eventsource&since=0" % pid)
        self.assertEqual(next(events)["data"], "ready")
        answer.close()
        answer.connection.close()
        server.manager.stop()

        def refusal():
            answer = server.json("POST", "/processes/deaf/_start")      # changes nothing, as it is active
            return answer[0] != 200 and answer
        return until(refusal)

    def code_wait_timeout(self):
        pid, = self.server.add("deaf", python(HTTP_DEAF), redirect_input=True)
        self.assertEqual(next(self.output(pid)), "ready")
        return self.server.json("POST", "/processes/deaf/_stop?wait=0.05")

    def test_every_code(self):
        """All are seen, each with its status, and nothing else is in the error tree."""
        self.cat("web")
        self.quiet, = self.server.add("quiet", "sleep 60", redirect_output=[])
        seen = set()
        for status, codes in HTTP_CODES.items():
            for code in codes:
                with self.subTest(code=code):
                    if code == "forbidden" and os.getuid() != 0:
                        seen.add(code)
                        self.skipTest("only root can have a process that gaffer may not signal")
                    answer = getattr(self, "code_" + code)()
                    self.assertError(answer, status, code)
                    self.assertEqual(list(answer[1]), ["error", "reason"])
                    self.assertRegex(answer[1]["reason"], r"^[^\n]{10,}$")
                    seen.add(answer[1]["error"])
        table = {code for codes in HTTP_CODES.values() for code in codes}
        self.assertEqual(seen, table, "a code of the table was never seen")
        self.assertEqual({error.code for error in PureErrors.tree()}, table)


class HttpDigits(HttpCase):
    """Numbers are ASCII digits: others are no name and no number."""

    OTHERS = ("\u00b2", "\u0663", "\uff11", "\u0967", "\U0001d7d9", "1\u00b2", "\u0661\u0662",
              "1\u0663")

    def test_segments(self):
        self.cat("web")
        for digits in self.OTHERS:
            quoted = urllib.parse.quote(digits)
            for method, path in (
                    ("GET", "/processes/%s"), ("HEAD", "/processes/%s"),
                    ("DELETE", "/processes/%s"), ("PUT", "/processes/%s"),
                    ("POST", "/processes/%s"), ("GET", "/processes/%s/_pids"),
                    ("POST", "/processes/%s/_stop"), ("POST", "/processes/%s/_start"),
                    ("POST", "/processes/%s/_restart"), ("POST", "/processes/%s/_signal/TERM"),
                    ("POST", "/processes/web/_signal/%s"), ("POST", "/processes/1/_signal/%s"),
                    ("POST", "/processes/web/_add/%s"), ("POST", "/processes/web/_sub/%s"),
                    ("GET", "/status/%s"), ("GET", "/stats/%s"), ("GET", "/stats/web/%s"),
                    ("GET", "/groups/%s"), ("POST", "/groups/%s/_stop"), ("DELETE", "/groups/%s"),
                    ("GET", "/streams/%s?timeout=0"), ("GET", "/streams/%s/stdout?timeout=0"),
                    ("GET", "/streams/1/%s?timeout=0"), ("POST", "/streams/%s/stdin"),
                    ("DELETE", "/streams/%s/stdin"), ("GET", "/wstreams/%s"),
                    ("GET", "/watch/%s?timeout=0"),
                    ("GET", "/watch/proc/%s?timeout=0")):
                with self.subTest(method + " " + path % digits):
                    body = {"cmd": "cat"} if method in ("PUT", "POST") else None
                    status, _, data = self.server.request(method, path % quoted, body)
                    # a pattern of events may name what is not there yet
                    allowed = (204,) if path.startswith("/watch/proc") else (400, 404)
                    self.assertIn(status, allowed, data)
        self.assertEqual(self.server.ok("GET", "/processes"), ["web"])
        self.assertEqual(self.server.ok("GET", "/processes/web/_pids")["pids"], [1])

    def test_parameters(self):
        self.cat("web")
        for digits in self.OTHERS:
            quoted = urllib.parse.quote(digits)
            for method, path in (
                    ("GET", "/streams/1/stdout?since=%s"), ("GET", "/streams/1/stdout?tail=%s"),
                    ("GET", "/streams/1/stdout?timeout=%s"), ("GET", "/watch?since=%s"),
                    ("GET", "/watch?timeout=%s"), ("GET", "/watch?feed=eventsource&heartbeat=%s"),
                    ("GET", "/stats?feed=continuous&interval=%s"),
                    ("POST", "/processes/web/_stop?wait=%s"), ("GET", "/processes?running=%s")):
                with self.subTest(method + " " + path % digits):
                    self.assertError(self.server.json(method, path % quoted), 400, "bad_value")
            for field in "numprocesses", "graceful_timeout", "priority":
                with self.subTest(field, digits=digits):
                    info = {"name": "x", "cmd": "cat", field: digits}
                    self.assertError(self.server.json("POST", "/processes", info),
                                     400, "invalid_process_info")
            for header in "Content-Length: ", "Transfer-Encoding: chunked\r\n\r\n":
                with self.subTest(header, digits=digits):
                    self.assertRefused(b"POST /streams/1/stdin HTTP/1.1\r\nHost: localhost\r\n"
                                       b"%b%b\r\n\r\n" % (header.encode(), digits.encode()))


class HttpSyntax(HttpCase):
    """What a request is: one way to understand it, or a refusal."""

    def setUp(self):
        self.hits = []
        self.options = {"handlers": [("/hit.*", self._hit)]}
        super().setUp()

    def _hit(self, request):
        self.hits.append(request.target)
        return request.body

    def assertBody(self, data, body, hits=1):
        """`data` is answered with `body`; the connection goes on."""
        wire = self.wire()
        wire.send(data + http_bytes("GET", "/ping"))
        status, _, got = wire.answer()
        self.assertEqual((status, got), (200, body))
        self.assertEqual(wire.answer()[2], b"OK")
        self.assertEqual(len(self.hits), hits)
        wire.close()

    def test_request_lines(self):
        """What is no request line, or no HTTP/1."""
        host = b"\r\nHost: 127.0.0.1\r\n\r\n"
        for line in (b"GET /", b"GET", b"GET  /hit HTTP/1.1", b"GET /hit  HTTP/1.1", b" GET /hit HTTP/1.1",
                     b"GET /hit HTTP/1.1 ",
                     b"GET\t/hit\tHTTP/1.1", b"GET /hit http/1.1", b"GET /h it HTTP/1.1", b"G@T /hit HTTP/1.1",
                     b"GET hit HTTP/1.1",
                     b"GET /hit HTTP/1.", b"GET /hit HTTP/1.1.1", b"GET /hit#x HTTP/1.1", b"GET /h\x00it HTTP/1.1",
                     b"GET /h\x7fit HTTP/1.1", "GET /h\u00eft HTTP/1.1".encode(), b"GET /hit\x0bHTTP/1.1",
                     b"GET ftp://127.0.0.1/hit HTTP/1.1",
                     b"CONNECT 127.0.0.1:80 HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                     b"GET /hit\rHTTP/1.1", b"GET /%zz HTTP/1.1",
                     b"GET /% HTTP/1.1", b"GET /%4 HTTP/1.1", b"GET /%ff HTTP/1.1", b"GET /%c3%28 HTTP/1.1"):
            with self.subTest(line=line):
                wire = self.wire()
                wire.send(line + host)
                self.assertCode(wire.answer(), 400, "bad_request")
                wire.close()
        for line in (b"GET /hit HTTP/2.0", b"GET /hit HTTP/0.9", b"PRI * HTTP/2.0", b"GET /hit HTTP/3",
                     b"GET /hit HTTP/11"):
            with self.subTest(line=line):
                self.assertRefused(line + host, 505)
        self.assertEqual(self.hits, [])

    def test_header_lines(self):
        """No space before the colon, no folded line, no control character, no bare CR or LF."""
        for line in (b"X : y", b" X: y", b"X: y\r\n folded", b"X: y\r\n\tfolded", b"X", b": y", b"X: a\x00b",
                     b"X: a\x0bb", b"X: a\x7fb",
                     b"X: a\rb", b"X: a\nb", b"X\xe9: y", b"X[: y", b"X y: z", b"X: y\n", b"\rX: y"):
            for data in (b"GET /hit HTTP/1.1\r\nHost: 127.0.0.1\r\n" + line + b"\r\n\r\n",
                         b"GET /hit HTTP/1.1\r\n" + line + b"\r\nHost: 127.0.0.1\r\n\r\n"):
                with self.subTest(data=data):
                    self.assertRefused(data)
        for data in (b"GET /hit HTTP/1.1\nHost: 127.0.0.1\n\n", b"\r\n\n" + http_bytes("GET", "/hit")):
            self.assertRefused(data)
        self.assertEqual(self.hits, [])
        for line in ("X:y", "X:", "X: \t y \t", "X: \xe9\xff", "!#$%&'*+-.^_`|~9: y"):
            with self.subTest(line=line):
                self.assertEqual(self.ask(http_bytes("GET", "/ping", line))[0], 200)

    def test_smuggling(self):
        """A length said twice, or so that another server might read it otherwise: 400, closed, and nothing is done."""
        inner = http_bytes("POST", "/hit-inner")
        table = [
            ("Content-Length: 5", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked", "Content-Length: 5"),
            ("Content-Length: 0", "Transfer-Encoding: chunked"), ("Content-Length: 5", "Content-Length: 6"),
            ("Content-Length: 5", "Content-Length: 5"), ("Content-Length: 5, 6",), ("Content-Length: +5",),
            ("Content-Length: -5",),
            ("Content-Length: 0x5",), ("Content-Length: 5 5",), ("Content-Length: ",), ("Content-Length: 5.0",),
            ("Content-Length: \xb2",),
            ("Content-Length: 1_0",), ("Content-Length: " + "9" * 30,), ("Content-Length : 5",),
            ("Content-Length:\x0b5",),
            ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked, chunked",),
            ("Transfer-Encoding: identity",), ("Transfer-Encoding: chunked, identity",),
            ("Transfer-Encoding: gzip, chunked",),
            ("Transfer-Encoding: xchunked",), ("Transfer-Encoding: chunked;q=1",), ("Transfer-Encoding: \x0bchunked",),
            ("Transfer-Encoding : chunked",), ("Transfer-Encoding: \r\n chunked",), ("Transfer-Encoding: 'chunked'",),
            ("Transfer-Encoding: ",), ("Transfer-Encoding: identity", "Transfer-Encoding: chunked"),
            ("Host: 127.0.0.1",),
            ("Host: evil.example",), ("Transfer-Encoding: chunked\nX: y",), ("X: y\rTransfer-Encoding: chunked",),
        ]
        for headers in table:
            with self.subTest(headers=headers):
                self.assertRefused(http_bytes("POST", "/hit", *headers, body=b"0\r\n\r\n" + inner))
        self.assertRefused(http_bytes("POST", "/hit", "Transfer-Encoding: chunked", "Connection: keep-alive",
                                      version="1.0",
                                      body=http_chunks(b"x") + inner))
        self.assertEqual(self.hits, [])

    def test_bad_chunks(self):
        """A chunked body that is none: 400, closed, and nothing is executed."""
        inner = http_bytes("POST", "/hit-inner")
        for body in (b"x\r\n", b"+1\r\na\r\n0\r\n\r\n", b"0x1\r\na\r\n0\r\n\r\n", b" 1\r\na\r\n0\r\n\r\n", b"-1\r\n",
                     b"\r\n", b"1\na\n0\n\n",
                     b"1\r\nab\r\n0\r\n\r\n", b"2\r\na\r\n0\r\n\r\n" + inner, b"1\r\na\n0\r\n\r\n", b"1\r\na0\r\n\r\n",
                     b"1_0\r\n", b"1;\x00\r\na\r\n",
                     b"1;" + b"x" * 10000, b"F" * 9 + b"\r\n", b"0\r\nbad trailer\r\n\r\n", b"0\r\n folded\r\n\r\n",
                     b"0\r\n" + b"X: %b\r\n" % (b"y" * 1000) * 100 + b"\r\n"):
            with self.subTest(body=body[:40]):
                wire = self.wire()
                wire.send(http_bytes("POST", "/hit", "Transfer-Encoding: chunked", body=body + inner))
                self.assertIn(wire.answer()[0], (400, 413))
                self.assertEqual(wire.rest(), b"")
                wire.close()
        self.assertEqual(self.hits, [])

    def test_a_body_is_never_the_next_request(self):
        """Whatever the method, and whether anybody asked for the body."""
        inner = http_bytes("GET", "/hit-inner")
        for method, path, status in (("GET", "/ping", 200), ("POST", "/ping", 405), ("DELETE", "/nothing", 404),
                                     ("OPTIONS", "/x", 204),
                                     ("POST", "/processes", 400), ("HEAD", "/ping", 200)):
            for headers, body in (((), inner), (("Transfer-Encoding: chunked",), http_chunks(inner))):
                with self.subTest(method=method, headers=headers):
                    wire = self.wire()
                    wire.send(http_bytes(method, path, *headers, body=body) + http_bytes("GET", "/hit-outer"))
                    self.assertEqual(wire.answer(method)[0], status)
                    self.assertEqual(wire.answer()[0], 200)
                    wire.close()
        self.assertEqual(set(self.hits), {"/hit-outer"})

    def test_chunked_bodies(self):
        """Without Content-Length, in any pieces, with extensions and trailers."""
        chunked = "Transfer-Encoding: chunked"
        for body in (http_chunks(b"hello"), http_chunks(b"h", b"ell", b"o"), b"5\r\nhello\r\n0\r\nX: y\r\nZ:\r\n\r\n",
                     b"005\r\nhello\r\n000\r\n\r\n",
                     b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n'):
            with self.subTest(body=body):
                self.hits.clear()
                self.assertBody(http_bytes("POST", "/hit", chunked, body=body), b"hello")
        self.hits.clear()
        self.assertBody(http_bytes("POST", "/hit", "Transfer-Encoding: CHUNKED", body=http_chunks()), b"")
        info = json.dumps({"name": "web", "cmd": "cat", "start": False}).encode()
        answer = self.ask(http_bytes("POST", "/processes", chunked,
                                     body=http_chunks(*(info[i:i + 1] for i in range(len(info))))))
        self.assertEqual((answer[0], answer[2]), (200, HTTP_OK))

    def test_byte_by_byte(self):
        """A request may come in any pieces: each byte is its own segment."""
        wire = self.wire()
        data = http_bytes("POST", "/hit", "Transfer-Encoding: chunked",
                          body=http_chunks(b"ab", b"c")) + http_bytes("GET", "/ping")
        for i in range(len(data)):
            wire.send(data[i:i + 1])
        self.assertEqual([wire.answer()[2], wire.answer()[2]], [b"abc", b"OK"])

    def test_empty_lines_before_a_request(self):
        """Are ignored (RFC 9112 section 2.2)."""
        wire = self.wire()
        wire.send(b"\r\n" + http_bytes("GET", "/ping") + b"\r\n\r\n" + http_bytes("GET", "/ping"))
        self.assertEqual([wire.answer()[2], wire.answer()[2]], [b"OK", b"OK"])
        self.assertRefused(b"\r\n" * 100 + http_bytes("GET", "/ping"))

    def test_expect_continue(self):
        """100 before the body is sent, and never where the answer is a refusal."""
        for headers, body in (((("Content-Length: 5"),), b"hello"), (("Transfer-Encoding: chunked",),
                                                                     http_chunks(b"hello"))):
            with self.subTest(headers=headers):
                wire = self.wire()
                wire.send(http_bytes("POST", "/hit", "Expect: 100-Continue", *headers))
                self.assertEqual([wire.file.readline(), wire.file.readline()], [b"HTTP/1.1 100 Continue\r\n", b"\r\n"])
                wire.send(body)
                self.assertEqual(wire.answer()[2], b"hello")
                wire.send(http_bytes("GET", "/ping"))
                self.assertEqual(wire.answer()[2], b"OK")
                wire.close()
        too_large = "Content-Length: %d" % (64 * gaffer.MIB)
        for status, code, request in (
                (413, "too_large", http_bytes("POST", "/hit", "Expect: 100-continue", too_large)),
                (403, "forbidden_origin", http_bytes("POST", "/hit", "Expect: 100-continue", "Content-Length: 5",
                                                     "Origin: null")),
                (403, "forbidden_host", http_bytes("POST", "/hit", "Expect: 100-continue", "Content-Length: 5",
                                                   host="evil.example")),
                (415, "unsupported_media_type", http_bytes("POST", "/hit", "Expect: 100-continue", "Content-Length: 5",
                                                           "Content-Encoding: br")),
                (417, "bad_request", http_bytes("POST", "/hit", "Expect: miracles", "Content-Length: 5"))):
            with self.subTest(code=code):
                self.assertRefused(request, status, code)
        self.hits.clear()
        self.assertBody(http_bytes("POST", "/hit", "Expect: 100-continue", "Content-Length: 0"), b"")
        answer = self.ask(http_bytes("POST", "/hit", "Expect: 100-continue", body=b"old", version="1.0"))
        self.assertEqual(answer[2], b"old")         # HTTP/1.0 knows no 100 (RFC 9110 section 10.1.1)

    def test_absolute_form(self):
        """The authority counts as the Host (RFC 9112 section 3.2.2)."""
        for target in ("http://127.0.0.1/hit?a=1", "HTTP://LOCALHOST:99/hit?a=1", "https://[::1]/hit?a=1"):
            with self.subTest(target=target):
                self.hits.clear()
                self.assertBody(http_bytes("GET", target, host="evil.example"), b"")
        answer = self.ask(http_bytes("GET", "http://127.0.0.1"))
        self.assertIn(b"welcome", answer[2])
        self.assertEqual(self.ask(http_bytes("OPTIONS", "http://127.0.0.1"))[0], 204)
        self.hits.clear()
        self.assertCode(self.ask(http_bytes("GET", "http://evil.example/hit")), 403, "forbidden_host")
        for target in ("http:///hit", "http://user@127.0.0.1/hit", "http://127.0.0.1:x/hit", "http:/hit",
                       "http://[::1/hit"):
            with self.subTest(target=target):
                self.assertCode(self.ask(http_bytes("GET", target)), 400, "bad_request")
        self.assertEqual(self.hits, [])

    def test_percent_encoding(self):
        """Each part is decoded once, and never becomes two parts."""
        self.server.ok("POST", "/processes", {"name": "a:b@c", "cmd": "cat", "start": False})
        for path in ("/processes/a:b@c", "/processes/a%3ab%40c", "/%70rocesses/%61:b@c", "/processes/a%3Ab%40c/",
                     "/status/a%3ab%40c"):
            with self.subTest(path=path):
                self.assertEqual(self.server.ok("GET", path)["name"], "a:b@c")
        for path in ("/processes/a%2Fb", "/processes%2Fa:b@c", "/processes/a:b@c%2F_pids", "/processes/%00",
                     "/processes/a:b@c%00",
                     "/processes/a%253ab%2540c", "/processes/%2e%2e", "/processes/../processes", "/processes/a:b@c%20",
                     "/processes/%0d%0aX:y"):
            with self.subTest(path=path):
                answer = self.ask(http_bytes("GET", path))
                self.assertEqual(answer[0], 404, answer)
                self.assertNotIn("x", answer[1])
        self.assertEqual(self.hits, [])

    def test_query_given_twice(self):
        """Or with too many fields: 400."""
        self.cat("web")
        for method, path in (("GET", "/processes?running=1&running=1"), ("GET", "/processes?running=1&r%75nning=0"),
                             ("POST", "/processes/web/_stop?wait=1&wait=2"),
                             ("GET", "/streams/1/stdout?since=0&since=1"),
                             ("GET", "/processes?" + "&".join("a%d=" % i for i in range(200)))):
            with self.subTest(path=path[:40]):
                self.assertCode(self.ask(http_bytes(method, path)), 400, "bad_request")
        self.assertEqual(self.server.ok("GET", "/processes?running=1"), [1])

    def test_limits_of_the_head(self):
        """The target, the number of headers and the whole head: as long as they may be, and one more."""
        target = "/hit?" + "x" * (gaffer.TARGET_SIZE - 5)
        self.assertBody(http_bytes("GET", target), b"")
        self.hits.clear()
        for longer in (target + "x", "/" + "x" * 200000):
            self.assertRefused(http_bytes("GET", longer), 414, "uri_too_long")
        self.assertRefused(b"x" * 100000, 414, "uri_too_long")
        headers = ["X-%d: y" % number for number in range(gaffer.HEADERS_MAX - 1)]
        self.assertBody(http_bytes("GET", "/hit", *headers), b"")
        self.hits.clear()
        self.assertRefused(http_bytes("GET", "/hit", *headers, "Z: y"), 431, "headers_too_large")
        room = gaffer.HEAD_SIZE - len(http_bytes("GET", "/hit", "X: "))
        self.assertBody(http_bytes("GET", "/hit", "X: " + "y" * room), b"")
        self.hits.clear()
        self.assertRefused(http_bytes("GET", "/hit", "X: " + "y" * (room + 1)), 431, "headers_too_large")
        self.assertRefused(http_bytes("GET", "/hit", "X: " + "y" * 10 ** 6), 431, "headers_too_large")
        self.assertEqual(self.hits, [])

    def test_limits_of_the_body(self):
        """One byte more than may be: 413, which the client sees though it sends all of it first."""
        self.cat("web")
        most = gaffer.BODY_SIZE
        space = json.dumps({"name": "big", "cmd": "cat", "start": False}).encode()
        space += b" " * (most - len(space))
        for path in ("/processes", "/streams/1/stdin"):
            for headers, body in (((), space + b" "), (("Transfer-Encoding: chunked",), http_chunks(space, b" ")),
                                  (("Transfer-Encoding: chunked",), http_chunks(space + b" ")), ((), space * 3)):
                with self.subTest(path=path, headers=headers):
                    self.assertRefused(http_bytes("POST", path, *headers, body=body), 413, "too_large")
        self.assertEqual(self.server.ok("GET", "/processes"), ["web"])
        self.assertEqual(self.ask(http_bytes("POST", "/processes", body=space))[2], HTTP_OK)
        self.assertEqual(self.ask(http_bytes("PUT", "/processes/big", "Transfer-Encoding: chunked",
                                             body=http_chunks(space)))[2], b'{"ok": true, "changed": false}\n')
        for length in (most + 1, 10 ** 17):
            self.assertRefused(http_bytes("POST", "/processes", "Content-Length: %d" % length), 413, "too_large")

    def test_slow_requests(self):
        """408 for a head or a body that does not come; a connection without a request is just closed."""
        with http_limits(HEAD_TIME=0.05, BODY_TIME=0.05, IDLE_TIME=0.05):
            for data in (b"G", b"GET /hit HTTP/1.1\r\nHost: 127.0.0.1\r\n",
                         http_bytes("POST", "/hit", "Content-Length: 5") + b"four",
                         http_bytes("POST", "/hit", "Transfer-Encoding: chunked", body=b"5\r\nx")):
                with self.subTest(data=data):
                    self.assertRefused(data, 408, "timeout")
            self.assertEqual(self.wire().rest(), b"")
            wire = self.wire()
            wire.send(http_bytes("GET", "/ping"))
            self.assertEqual(wire.answer()[2], b"OK")
            self.assertEqual(wire.rest(), b"")
        self.assertEqual(self.hits, [])

    def test_leaving_within_a_request(self):
        """A client that goes within head or body: nothing is executed, nobody else notices."""
        for data in (b"", b"POST /hit", b"POST /hit HTTP/1.1\r\nHost: 127.0.0.1\r\n",
                     http_bytes("POST", "/hit", "Content-Length: 5") + b"four",
                     http_bytes("POST", "/hit", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n"),
                     http_bytes("POST", "/hit", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n0\r\n")):
            with self.subTest(data=data):
                wire = self.wire()
                wire.send(data)
                wire.sock.shutdown(socket.SHUT_WR)
                self.assertEqual(wire.rest(), b"")
                wire.close()
        self.assertEqual(self.hits, [])

    def test_half_closed(self):
        """Who closes its sending side behind a request still gets the answer."""
        wire = self.wire()
        wire.send(http_bytes("POST", "/hit", body=b"hello"))
        wire.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(wire.answer()[2], b"hello")
        self.assertEqual(wire.rest(), b"")

    def test_json(self):
        """One object in UTF-8, with any Content-Type, and nothing else."""
        for body in (b"", b" ", b"{", b"}", b"{}{}", b"{}\n{}", b"{} x", b"nul", b"NaN", b"{'name': 1}",
                     b'{"name": "x",}', b'{"name" "x"}',
                     b'{"name": "x", "cmd": "cat", "graceful_timeout": NaN}',
                     b'{"name": "x", "cmd": "cat", "graceful_timeout": Infinity}',
                     b'{"name": "x", "cmd": "cat", "graceful_timeout": -Infinity}', b"[" * 100000,
                     b"[" * 100000 + b"]" * 100000,
                     b'{"a":' * 50000 + b"1" + b"}" * 50000, b'{"name": "x", "cmd": "\xff"}',
                     b'{"name": "x", "cmd": "\xc3\x28"}',
                     '{"name": "x", "cmd": "cat"}'.encode("utf-16"), b'{"name": "x\n"', b'{"name": "\x01"}',
                     b"// c\n{}", b"--", b"\0"):
            with self.subTest(body=body[:50]):
                reason = self.assertCode(self.ask(http_bytes("POST", "/processes", body=body)), 400, "invalid_json")
                self.assertLess(len(reason), 400)
        for body in (b"[]", b"[{}]", b'"x"', b"1", b"null", b"true", b"1e999",
                     b'{"name": "x", "cmd": "cat", "graceful_timeout": 1e999}',
                     b'{"name": "x", "cmd": "cat", "numprocesses": %d}' % 10 ** 400, b"{}",
                     b'{"name": "\\ud800", "cmd": "cat"}',
                     b'{"name": "x", "cmd": "\\ud800"}', b'{"name": "x", "cmd": "a\\u0000b"}',
                     b'{"name": "x", "cmd": "cat", "env": {"A": "\\udfff"}}',
                     b'{"name": "x", "cmd": "cat", "\\ud800": 1}', b'{"name": "x", "cmd": "cat", "cwd": "\\ud800"}'):
            with self.subTest(body=body[:50]):
                self.assertCode(self.ask(http_bytes("POST", "/processes", body=body)), 400, "invalid_process_info")
        big = b'{"name": "x", "cmd": "cat", "numprocesses": ' + b"9" * 100000 + b"}"
        self.assertEqual(self.ask(http_bytes("POST", "/processes", body=big))[0], 400)
        self.assertEqual(self.server.ok("GET", "/processes"), [])
        for number, kind in enumerate((None, "text/plain", "application/x-www-form-urlencoded",
                                       "application/json; charset=latin-1")):
            with self.subTest(kind=kind):
                info = '{"name": "n%d", "cmd": "\u00e9", "start": false, "env": {"A": "\u20ac"}}' % number
                headers = () if kind is None else ("Content-Type: " + kind,)
                self.assertEqual(self.ask(http_bytes("POST", "/processes", *headers, body=info.encode()))[0], 200)
                self.assertEqual(self.server.ok("GET", "/processes/n%d" % number)["env"], {"A": "\u20ac"})

    def test_content_encoding(self):
        """415 for any but identity; nothing is executed."""
        for coding in ("gzip", "br", "x", "gzip, identity"):
            with self.subTest(coding=coding):
                self.assertRefused(http_bytes("POST", "/hit", "Content-Encoding: " + coding, body=b"x"), 415,
                                   "unsupported_media_type")
        self.assertEqual(self.hits, [])
        self.assertBody(http_bytes("POST", "/hit", "Content-Encoding: Identity", body=b"x"), b"x")

    def test_what_a_client_sends_never_becomes_a_header(self):
        """Line ends in paths, origins and names come back as text at most."""
        for data in (http_bytes("GET", "/processes/%0d%0aSet-Cookie:%20a=b"),
                     http_bytes("GET", "/hit%0d%0aSet-Cookie:%20a=b"),
                     http_bytes("GET", "/ping", "Origin: http://localhost%0d%0aSet-Cookie: a"),
                     http_bytes("GET", "/processes?x=%0d%0aSet-Cookie:a"),
                     http_bytes("GET", "/ping", "Origin: http://localhost\x85Set-Cookie: a")):
            with self.subTest(data=data):
                self.assertNotIn("set-cookie", self.ask(data)[1])
        self.assertRefused(http_bytes("GET", "/ping", "Origin: http://localhost\rSet-Cookie: a"))


class HttpConnections(HttpCase):
    """Keep-alive, pipelining, and what is left after clients have gone."""

    options = {"handlers": [("/status-is-text", lambda request: ("200 OK", [], "x")),
                            ("/exit", lambda request: sys.exit("x"))]}

    def test_keep_alive(self):
        """HTTP/1.1 goes on until somebody says close; HTTP/1.0 only where it is asked for."""
        for version, header, stays, said in (
                ("1.1", None, True, None), ("1.1", "keep-alive", True, None), ("1.1", "close", False, ["close"]),
                ("1.1", "Close", False, ["close"]), ("1.1", "x, close", False, ["close"]),
                ("1.0", None, False, ["close"]),
                ("1.0", "keep-alive", True, ["keep-alive"]), ("1.0", "Keep-Alive", True, ["keep-alive"]),
                ("1.0", "close", False, ["close"]),
                ("1.2", None, True, None)):
            for path in ("/ping", "/nothing", "/watch?timeout=0.01"):
                with self.subTest(version=version, header=header, path=path):
                    headers = () if header is None else ("Connection: " + header,)
                    wire = self.wire()
                    wire.send(http_bytes("GET", path, *headers, version=version))
                    self.assertEqual(wire.answer()[1].get("connection"), said)
                    if stays:
                        wire.send(http_bytes("GET", "/ping", "Connection: close"))
                        self.assertEqual(wire.answer()[2], b"OK")
                    self.assertEqual(wire.rest(), b"")
                    wire.close()

    def test_http_1_0_without_host(self):
        """As it was in 1996."""
        wire = self.wire()
        wire.send(b"GET /ping HTTP/1.0\r\n\r\n")
        self.assertEqual(wire.answer()[2], b"OK")
        self.assertEqual(wire.rest(), b"")

    def test_fifty_requests_in_one_write(self):
        """Are answered in order."""
        for number in range(25):
            self.server.ok("POST", "/processes", {"name": "n%d" % number, "cmd": "cat", "start": False})
        wire = self.wire()
        wire.send(b"".join(http_bytes("GET",
                                      "/processes/n%d" % n) + http_bytes("POST", "/processes/n%d/_add/%d" % (n, n + 1),
                                                                         body=b"x" * n)
                           for n in range(25)))
        for number in range(25):
            self.assertEqual(json.loads(wire.answer()[2].decode())["name"], "n%d" % number)
            self.assertEqual(json.loads(wire.answer()[2].decode()), {"ok": True, "numprocesses": number + 2})

    def test_a_long_poll_within_a_pipeline(self):
        """What is behind it waits; the order holds."""
        wire = self.wire()
        pings = http_bytes("GET", "/ping") * 25
        wire.send(pings + http_bytes("GET", "/watch/create?since=0") + pings)
        for _ in range(25):
            self.assertEqual(wire.answer()[2], b"OK")
        until(lambda: [each for each in tuple(self.server.http.channels) if each.kind == "longpoll"], "the parked request")
        wire.send(http_bytes("GET", "/nothing"))
        self.server.ok("POST", "/processes", {"name": "web", "cmd": "cat", "start": False})
        self.assertEqual(json.loads(wire.answer()[2].decode())["name"], "web")
        for _ in range(25):
            self.assertEqual(wire.answer()[2], b"OK")
        self.assertCode(wire.answer(), 404, "resource_not_found")

    def test_more_behind_a_long_poll_than_is_read(self):
        """The rest waits in the socket, and is answered too."""
        wire = self.wire()
        count = 200000 // len(http_bytes("GET", "/ping"))
        wire.send(http_bytes("GET", "/watch/create?since=0"))
        until(lambda: [each for each in tuple(self.server.http.channels) if each.kind == "longpoll"], "the long poll")
        sender = threading.Thread(target=wire.send, args=(http_bytes("GET", "/ping") * count,))
        sender.start()
        self.addCleanup(sender.join)
        self.server.ok("POST", "/processes", {"name": "web", "cmd": "cat", "start": False})
        self.assertEqual(json.loads(wire.answer()[2].decode())["name"], "web")
        self.assertEqual({wire.answer()[2] for _ in range(count)}, {b"OK"})

    def test_a_thousand_requests_on_one_connection(self):
        """And the last is answered as the first."""
        wire = self.wire()
        for _ in range(1000):
            wire.send(http_bytes("GET", "/ping"))
            self.assertEqual(wire.answer()[2], b"OK")

    def test_nothing_is_left_of_who_has_gone(self):
        """300 connections dropped at random points: threads and descriptors are as before."""
        self.cat("web")
        self.server.request("GET", "/ping")
        self.no_request_threads()
        threads, descriptors = len(threading.enumerate()), len(open_descriptors())
        requests = [
            http_bytes("GET", "/ping"), http_bytes("GET", "/watch"),
            http_bytes("GET", "/watch?feed=continuous&heartbeat=0.1"),
            http_bytes("GET", "/streams/1/stdout?feed=eventsource"),
            http_bytes("GET", "/stats?feed=continuous&interval=0.1"),
            http_bytes("POST", "/streams/1/stdin", body=b"x" * 1000),
            http_bytes("GET", "/streams/web/stdout?timeout=1000"),
            http_bytes("POST", "/processes", "Transfer-Encoding: chunked", body=http_chunks(b"{}")),
            http_bytes("GET", "*"),
            http_bytes("GET", "/wstreams/1", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                       "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==") + WebSocket.encode(1, b"hello\n"),
        ]
        chance = random.Random(300)
        for _ in range(300):
            data = chance.choice(requests)
            sock = self.server.connect()
            sock.sendall(data[:chance.randrange(len(data) + 1)] if chance.random() < 0.5 else data)
            if chance.random() < 0.3 and data in (requests[0], requests[5]):
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)
            if chance.random() < 0.3:           # an RST in place of a FIN
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self.server.request("GET", "/ping")     # comes behind all that waited to be accepted
        until(lambda: len(threading.enumerate()) <= threads, "the end of the threads")
        until(lambda: len(open_descriptors()) <= descriptors, "the end of the connections")
        until(lambda: not self.server.http.channels, "the end of the channels")

        def kept():
            gc.collect()
            return [thing for thing in gc.get_objects() if issubclass(type(thing), gaffer.Channel)
                    and thing.http is self.server.http]
        until(lambda: not kept(), "the last reference to a connection")
        self.assertEqual(self.server.ok("GET", "/processes?running=1"), [1])

    def no_request_threads(self):
        """Wait until all connections that were closed are forgotten."""
        until(lambda: not self.server.http.channels and not [
            thread for thread in threading.enumerate() if thread.name == "gaffer-http"], "no connection")

    def test_a_client_found_gone_while_it_is_sent_to_is_forgotten(self):
        """Its connection was reset before the output came, and the loop has not looked at it since."""
        self.server.add("web", "cat", redirect_input=True)
        window = self.server.manager.loop.call(self.server.manager.find_window, "1", "stdout")
        for feed in ("continuous", "eventsource"):
            with self.subTest(feed=feed):
                wire = self.wire()
                wire.send(http_bytes("GET", "/streams/1/stdout?feed=%s&since=0" % feed))
                until(lambda: [each for each in tuple(self.server.http.channels) if isinstance(each, gaffer.Feed)], "the reader")
                wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

                def reset_then_write():
                    wire.close()
                    window.append(b"nobody is there\n")
                self.server.manager.loop.call(reset_then_write)
                until(lambda: not self.server.http.channels, "the end of the connection")
                self.assertEqual(self.server.manager.loop.call(lambda: list(window.readers)), [])

    def test_the_limit_of_connections_holds_after_faults(self):
        """Each connection counts once, however it ended."""
        with self.assertLogs("gaffer"):
            logging.getLogger("gaffer").error("assertLogs wants one")
            self.expect_log("SystemExit: x")
            for path in ("/status-is-text", "/exit", "/ping") * 3:
                wire = self.wire()
                wire.send(http_bytes("GET", path, "Connection: close"))
                wire.rest()
                wire.close()
        self.no_request_threads()
        with http_limits(CONNECTIONS_MAX=2), self.assertLogs("gaffer"):
            held = [self.wire(), self.wire()]
            for wire in held:
                wire.send(http_bytes("GET", "/ping"))
                self.assertEqual(wire.answer()[2], b"OK")
            self.assertCode(self.wire().answer(), 503, "busy")
            for wire in held:
                wire.close()
            self.no_request_threads()
            self.assertEqual(self.ask(http_bytes("GET", "/ping"))[2], b"OK")

    def test_what_finds_no_thread_is_told(self):
        """What the loop drives goes on."""
        feed = self.wire()
        feed.send(http_bytes("GET", "/watch?feed=continuous"))
        until(lambda: [each for each in tuple(self.server.http.channels) if each.kind == "continuous"], "the feed")
        with http_limits(THREADS_MAX=0), self.assertLogs("gaffer", "WARNING"):
            wire = self.wire()
            wire.send(http_bytes("GET", "/ping"))
            self.assertCode(wire.answer(), 503, "busy")
            self.assertEqual(wire.rest(), b"")
        self.cat("web")
        self.assertEqual(json.loads(feed.answer_chunk())["event"], "create")


class HttpThreads(HttpCase):
    """A thread answers a request; what waits is on the loop; each has its bounds."""

    @staticmethod
    def request_threads():
        """How many threads requests have."""
        return sum(thread.name == "gaffer-http" for thread in threading.enumerate())

    def serve(self, **options):
        """Another server."""
        made = Running(**options)
        self.addCleanup(made.stop_all)
        return made

    def test_who_sends_nothing_has_no_thread(self):
        """Neither before the first request nor, after a moment, behind it."""
        wires = [self.wire() for _ in range(30)]
        for wire in wires[:10]:
            wire.send(http_bytes("GET", "/ping"))
            self.assertEqual(wire.answer()[2], b"OK")
        until(lambda: sum(channel.kind == "idle" for channel in tuple(self.server.http.channels)) == 30, "all are idle")
        until(lambda: not self.request_threads(), "the end of the threads")
        for wire in wires:
            wire.send(http_bytes("GET", "/ping") * 2)
            self.assertEqual([wire.answer()[2], wire.answer()[2]], [b"OK", b"OK"])

    def test_many_that_dawdle(self):
        """Half a head, half a body: a request beside them is answered at once."""
        dawdlers = [self.wire() for _ in range(500)]
        for number, wire in enumerate(dawdlers):
            wire.send((b"GET /ping HT", http_bytes("POST", "/processes", "Content-Length: 9"))[number % 2])
        until(lambda: len(self.server.http.threads) == 500, "their threads")
        wire, took = self.wire(), []
        for number in range(200):
            began = time.monotonic()
            dawdlers[number].send(b"T" if number % 2 == 0 else b"{")
            wire.send(http_bytes("GET", "/ping"))
            self.assertEqual(wire.answer()[2], b"OK")
            took.append(time.monotonic() - began)
        self.assertLess(statistics.median(took), 0.02)

    def test_a_request_belongs_to_one_call(self):
        """What a handler does to it, the next one does not see."""
        def pop(request):
            return {"query": request.query.pop("a", None), "header": request.headers.pop("x", None)}
        server = self.serve(handlers=[("/pop", pop)])
        wire = self.wire(server)
        for _ in range(3):
            wire.send(http_bytes("GET", "/pop?a=1", "X: 2"))
            self.assertEqual(json.loads(wire.answer()[2].decode()), {"query": "1", "header": "2"})

    def test_expect(self):
        """What will be refused is refused before its body; else the client is told to go on."""
        server = self.serve(handlers=[("/echo", lambda request: request.body)], token="secret")
        expect, token = "Expect: 100-continue", "Authorization: Bearer secret"
        for path, headers, status in (("/nope", (token,), 404), ("/ping", (token,), 405), ("/echo", (), 401),
                                      ("/echo", (token, "Content-Encoding: gzip"), 415), ("/echo", (token, "Host2: x"), None)):
            for framing in ("Content-Length: 5", "Transfer-Encoding: chunked"):
                with self.subTest(path=path, headers=headers, framing=framing):
                    wire = self.wire(server)
                    wire.send(http_bytes("POST", path, expect, framing, *headers))
                    if status is None:
                        self.assertEqual((wire.file.readline(), wire.file.readline()), (b"HTTP/1.1 100 Continue\r\n", b"\r\n"))
                        wire.send(b"hello" if "Length" in framing else http_chunks(b"hello"))
                        self.assertEqual(wire.answer()[2], b"hello")
                    else:
                        self.assertEqual(wire.answer()[0], status)
                        self.assertEqual(wire.rest(), b"")
                    wire.close()
        wire = self.wire(server)
        wire.send(http_bytes("POST", "/echo", expect, token, "Content-Length: %d" % 2 ** 40))
        self.assertEqual(wire.answer()[0], 413)

    def test_no_answer_is_kept_by_a_cache(self):
        """Whatever it is."""
        self.cat("web")
        answers = [self.ask(data, method) for method, data in (
            *((method, http_bytes(method, path)) for method, path in (
                ("GET", "/"), ("GET", "/status"), ("HEAD", "/status"), ("GET", "/nope"), ("PUT", "/ping"), ("OPTIONS", "/x"),
                ("GET", "/streams/1/stdout?timeout=0"), ("GET", "/metrics"), ("GET", "/wstreams/1"), ("POST", "/processes"))),
            ("GET", http_bytes("GET", "/", "Accept: text/html")), ("GET", http_bytes("GET", "/ping", host="evil.example")),
            ("GET", b"bad\r\n\r\n"))]
        answers.append(self.server.request("GET", "/watch?timeout=0"))
        for path in ("/watch?feed=continuous", "/streams/1/stdout?feed=eventsource", "/streams?feed=continuous"):
            answer = self.server.stream(path)
            self.addCleanup(answer.connection.close)
            self.addCleanup(answer.close)
            answers.append((answer.status, {"cache-control": answer.headers.get_all("Cache-Control")}))
        for answer in answers:
            given = answer[1]["Cache-Control"] if isinstance(answer[1], http.client.HTTPMessage) else answer[1]["cache-control"]
            self.assertIn(given, (["no-store"], "no-store"), answer)

    def test_requests_under_way_at_the_stop(self):
        """They have STOP_SEND seconds, then they are cut."""
        entered, leave = queue.Queue(), threading.Event()

        def slow(request):
            entered.put(None)
            leave.wait(TIMEOUT)
            return "done"

        def application(environ, start_response):
            start_response("200 OK", [])
            yield slow(None).encode()
        self.addCleanup(leave.set)
        for patience, answers in ((TIMEOUT, [b"done", b"done"]), (0.1, [b"", b""])):
            with self.subTest(patience=patience), unittest.mock.patch.object(gaffer, "STOP_SEND", patience):
                leave.clear()
                server = self.serve(handlers=[("/slow", slow)], wsgi={"/wsgi": application})
                wires = [self.wire(server), self.wire(server)]
                for wire, path in zip(wires, ("/slow", "/wsgi")):
                    wire.send(http_bytes("GET", path))
                    entered.get(timeout=TIMEOUT)
                server.manager.stop()
                if answers[0]:
                    until(lambda: server.manager.stopping, "the stop")
                    leave.set()
                    self.assertEqual([wire.answer()[2] for wire in wires], answers)
                self.assertEqual([wire.rest() for wire in wires], [b"", b""])
                leave.set()
                server.stop_all()

    def test_clients_that_leave_within_a_request(self):
        """Nothing of them is left, and the stop does not wait for them."""
        server = self.serve(handlers=[("/echo", lambda request: request.body)])
        for framing, part in (("Content-Length: 5", b"hel"), ("Content-Length: 5", b""), ("Transfer-Encoding: chunked", b"5\r\nhe")):
            wire = self.wire(server)
            wire.send(http_bytes("POST", "/echo", framing) + part)
            until(lambda: server.http.working, "the request")
            wire.close()
            until(lambda: not server.http.connections, "the end of the connection")
            with self.subTest(framing=framing, part=part):
                self.assertEqual((server.http.working, server.http.sending), (set(), {}))

    def test_subprotocols(self):
        """A handler takes the client's first that it knows, a process the first; what is none of these is left out."""
        made = type("Chat", (gaffer.WebSocketHandler,), {"protocols": ("chat", "v2")})
        server = self.serve(handlers=[("/plain", gaffer.WebSocketHandler), ("/chat", made)])
        server.add("cat", "cat", redirect_input=True)
        for path, offer, chosen in (("/plain", "chat", None), ("/chat", "v1, v2 , chat", "v2"), ("/chat", "v1", None), ("/chat", None, None),
                                    ("/wstreams/1", "chat, v2", "chat"), ("/wstreams/1", None, None), ("/wstreams/1", ", a b", None)):
            with self.subTest(path=path, offer=offer):
                wire = WebSocket(server.port, path, "Sec-WebSocket-Protocol: %s\r\n" % offer if offer else "")
                self.assertEqual((wire.status, wire.headers["Sec-WebSocket-Protocol"]), (101, chosen))
                wire.close()

    def test_chunks_of_an_event_stream(self):
        """One for the empty line at its begin, one a send, and the last one at a real end; none for HTTP/1.0."""
        pid, = self.cat("web", flapping=STREAMS_ONCE)
        epoch = self.server.manager.epoch
        event = "id: 2@%s\nevent: stdout\ndata: x\n\n" % epoch
        end = "id: 2x@%s\nevent: exit\ndata: {\"pid\": %d, \"exit_status\": 0, \"term_signal\": 0}\n\n" % (epoch, pid)
        path = "/streams/%d/stdout?feed=eventsource&since=0" % pid
        new, old, cut = (StreamsWire(self.server.port, path, version=version) for version in ("1.1", "1.0", "1.1"))
        for wire in new, old, cut:
            self.addCleanup(wire.close)
            wire.head()
            if wire is cut:
                self.server.manager.loop.call(lambda: [
                    channel.close() for channel in tuple(self.server.http.channels)
                    if channel.sock.getpeername() == wire.sock.getsockname()])
                self.assertIsNone(wire.chunk())
        self.assertEqual((new.headers["Transfer-Encoding"], old.headers["Transfer-Encoding"]), ("chunked", None))
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"x\n")
        self.assertEqual(new.chunk().decode(), event)
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        self.assertEqual((new.chunk().decode(), new.chunk()), (end, b""))
        self.assertEqual(old.file.read().decode(), event + end)


class HttpLimits(HttpCase):
    """How many connections there may be, in all and of one address."""

    def held(self, server, number):
        """So many connections that have been answered once."""
        wires = [self.wire(server) for _ in range(number)]
        for wire in wires:
            wire.send(http_bytes("GET", "/ping"))
            self.assertEqual(wire.answer()[2], b"OK")
        return wires

    def limited(self, **options):
        """A further server."""
        server = Running(**options)
        self.addCleanup(server.stop_all)
        return server

    def test_connections_of_one_address(self):
        """A number that is given holds for this machine too; whatever a connection has become, it counts until its end."""
        server = self.limited(max_connections_per_address=3, wsgi={"/wsgi": wsgiref.util.FileWrapper})
        server.add("web", "cat", redirect_input=True)
        until(lambda: not server.http.connections, "the end of the first connection")
        held = self.held(server, 2)
        held[0].send(http_bytes("GET", "/streams/1/stdout?feed=continuous"))
        self.assertEqual(held[0].file.readline(), b"HTTP/1.1 200 OK\r\n")
        socket_ = WebSocket(server.port, "/wstreams/1")
        self.addCleanup(socket_.close)
        self.assertEqual(socket_.status, 101)
        with self.assertLogs("gaffer", logging.WARNING) as logs:
            for _ in range(3):
                self.assertCode(self.wire(server).answer(), 503, "busy")
        self.assertEqual(len(logs.output), 1)
        with self.assertLogs("gaffer"):
            held[1].send(http_bytes("GET", "/wsgi/x"))
            self.assertEqual(held[1].answer()[0], 500)
        for closed in (*held, socket_):
            closed.close()
        until(lambda: not server.http.connections, "the end of all")
        self.held(server, 3)
        self.assertEqual(dict(server.http._of_address), {"127.0.0.1": 3})

    def test_this_machine_is_not_counted_by_itself(self):
        """A reverse proxy there brings everybody's connections from one address."""
        with http_limits(ADDRESS_CONNECTIONS_MAX=1):
            self.held(self.server, 4)

    def test_what_counts_as_one_client(self):
        for address, expected in (
                ("127.0.0.1", None), ("127.9.9.9", None), ("::1", None), ("::ffff:127.0.0.1", None), ("192.0.2.1", "192.0.2.1"),
                ("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8::1", b"\x20\x01\x0d\xb8\0\0\0\0"), ("fe80::1%lo", b"\xfe\x80\0\0\0\0\0\0"),
                ("2001:db8:0:0:1::", b"\x20\x01\x0d\xb8\0\0\0\0"), ("::2", b"\0" * 8)):
            self.assertEqual(gaffer.network(address), expected, address)

    def test_connections_in_all(self):
        server = self.limited(max_connections=2)
        held = self.held(server, 2)
        with self.assertLogs("gaffer"):
            self.assertCode(self.wire(server).answer(), 503, "busy")
        held[0].close()
        until(lambda: len(server.http.connections) == 1, "the end of one")
        self.held(server, 1)

    def test_connections_leave_descriptors_for_processes(self):
        """Or whoever opens enough of them keeps a process that has died from being started again."""
        files = gaffer.files_max
        self.addCleanup(setattr, gaffer, "files_max", files)
        gaffer.files_max = lambda: 16
        self.held(self.server, 14)
        with self.assertLogs("gaffer"):
            self.assertCode(self.wire().answer(), 503, "busy")

    def test_a_body_of_many_chunks(self):
        """What follows is the next request."""
        server, count = self.limited(handlers=[("/size", lambda request: str(len(request.body)))]), 5000
        wire = self.wire(server)
        sender = threading.Thread(target=wire.send, args=(http_bytes(
            "POST", "/size", "Transfer-Encoding: chunked", body=b"1\r\na\r\n" * count + b"0\r\n\r\n") + http_bytes("GET", "/ping"),))
        sender.start()
        self.assertEqual([wire.answer()[2] for _ in range(2)], [b"%d" % count, b"OK"])
        sender.join()

    def test_who_has_said_all_gets_all_answers(self):
        """A client may close its side behind many requests, or a body, that take more than one turn."""
        server = self.limited(handlers=[("/size", lambda request: str(len(request.body)))])
        body = http_bytes("POST", "/size", "Transfer-Encoding: chunked", body=b"1\r\na\r\n" * 5000 + b"0\r\n\r\n")
        for sent, expected in ((http_bytes("GET", "/ping") * 100, [b"OK"] * 100), (body, [b"5000"]), (body * 2, [b"5000"] * 2),
                               (http_bytes("GET", "/ping") + body[:-2], [b"OK"]),
                               (http_bytes("GET", "/ping") * 100 + http_bytes("GET", "/watch"), [b"OK"] * 100)):
            wire, answers = self.wire(server), []
            wire.sock.sendall(sent)
            wire.sock.shutdown(socket.SHUT_WR)
            for _ in expected:
                answers.append(wire.answer()[2])
            self.assertEqual(answers, expected)
            self.assertEqual(wire.rest(), b"")

    def test_many_that_send_a_byte_now_and_then_delay_nobody(self):
        """Heads and bodies that trickle in on many connections: a request beside them is answered at once."""
        slow = [self.server.connect() for _ in range(200)]
        for sock in slow:
            self.addCleanup(sock.close)
        head = http_bytes("POST", "/processes", "Content-Length: 1000", "X: " + "y" * 100)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        self.addCleanup(connection.close)
        took = []
        for index in range(20):                 # ten times as fast as one byte a second: 200 count as 2,000
            for number, sock in enumerate(slow):
                sock.send(head[index:index + 1] if number % 2 else (head if index == 0 else b" "))
                if number % 50 == 0:
                    began = time.monotonic()
                    connection.request("GET", "/processes")
                    self.assertEqual(connection.getresponse().read(), b"[]\n")
                    took.append(time.monotonic() - began)
        took.sort()
        self.assertLess(took[len(took) * 9 // 10], 0.05, took)


class HttpAccess(HttpCase):
    """Section 6: Host, Origin, CORS."""

    FOREIGN = ("http://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example",
               "http://evil.localhost",
               "ftp://localhost", "file://", "http://127.0.0.2", "http://127.1", "http://localhost:80:80",
               "http://localhost:123456",
               "http://localhost/", "http://localhost@evil.example", "http://evil.example@localhost",
               "http://localhost http://evil.example",
               "http://localhost, http://evil.example", "http://0.0.0.0", "http://[::]", "http://[::2]", "http://",
               "localhost",
               "http://localhost:x", "http://localhost?", "xhttp://localhost", "http://localhost.", "", "*")
    LOCAL = ("http://localhost", "https://localhost", "http://localhost:3000", "https://127.0.0.1:8443",
             "http://127.0.0.1",
             "http://[::1]", "https://[::1]:65535")

    def setUp(self):
        self.options = {"handlers": [("/change", self._change)], "allow_hosts": ["gaffer.example", "Other.Example."]}
        self.changes = 0
        super().setUp()

    def _change(self, request):
        self.changes += 1
        return "changed"

    def upgrade(self, origin, server=None):
        """The status of a websocket's opening from a page of `origin`."""
        made = WebSocket((server or self.server).port, "/wstreams/1", "Origin: %s\r\n" % origin)
        self.addCleanup(made.close)
        made.file.close()
        made.sock.close()
        return made.status

    @staticmethod
    def cors_names(headers):
        """The CORS headers among them."""
        return {name for name in headers if name.startswith("access-control-")}

    def test_local_origins(self):
        """Pages of this machine may read, change and open websockets."""
        self.cat("web")
        for origin in (*self.LOCAL, "http://127.0.0.1:%d" % self.server.port):
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
                with self.subTest(origin=origin, method=method):
                    status, headers, _ = self.ask(http_bytes(method, "/change", "Origin: " + origin), method)
                    self.assertEqual(status, 200)
                    self.assertEqual(headers["access-control-allow-origin"], [origin])
                    self.assertEqual(headers["vary"], ["Origin"])
                    self.assertEqual(headers["access-control-expose-headers"], ["Gaffer-Offset, Gaffer-Dropped, Gaffer-Ended"])
                    self.assertNotIn("access-control-allow-credentials", headers)
            self.assertEqual(self.upgrade(origin), 101)

    def test_foreign_origins(self):
        """May neither change anything nor open a websocket, and cannot read what they get."""
        self.cat("web")
        for origin in self.FOREIGN:
            with self.subTest(origin=origin):
                for method in ("GET", "HEAD"):
                    status, headers, _ = self.ask(http_bytes(method, "/ping", "Origin: " + origin), method)
                    self.assertEqual((status, self.cors_names(headers)), (200, set()))
                self.changes = 0
                for method in ("POST", "PUT", "DELETE", "PATCH"):
                    for body in (b"", b"x=y"):
                        answer = self.ask(http_bytes(method, "/change", "Origin: " + origin, body=body))
                        self.assertCode(answer, 403, "forbidden_origin")
                        self.assertEqual(self.cors_names(answer[1]), set())
                self.assertEqual(self.changes, 0)
                self.assertEqual(self.upgrade(origin), 403)
                status, headers, _ = self.ask(http_bytes("OPTIONS", "/change", "Origin: " + origin), "OPTIONS")
                self.assertEqual((status, self.cors_names(headers)), (204, set()))
        self.assertRefused(http_bytes("POST", "/change", "Origin: http://localhost", "Origin: http://evil.example"))
        self.assertEqual(self.changes, 0)
        self.assertEqual(self.server.ok("GET", "/processes?running=1"), [1])

    def test_no_origin(self):
        """No browser: no CORS headers, and everything goes."""
        answer = self.ask(http_bytes("POST", "/change"))
        self.assertEqual((answer[0], self.cors_names(answer[1]), self.changes), (200, set(), 1))

    def test_preflight(self):
        """The headers exactly, whatever is asked for."""
        for path in ("/processes", "/nothing", "/streams/1/stdin"):
            with self.subTest(path=path):
                status, headers, _ = self.ask(http_bytes("OPTIONS", path, "Origin: http://localhost:3000",
                                                         "Access-Control-Request-Method: PUT",
                                                         "Access-Control-Request-Headers: x-anything"), "OPTIONS")
                self.assertEqual(status, 204)
                self.assertEqual(headers["vary"], ["Origin"])
                self.assertEqual({name: headers[name] for name in self.cors_names(headers)}, {
                    "access-control-allow-origin": ["http://localhost:3000"],
                    "access-control-allow-methods": ["GET, HEAD, POST, PUT, DELETE, OPTIONS"],
                    "access-control-allow-headers": ["X-Requested-With, X-HTTP-Method-Override, Content-Type, Accept, "
                                                     "Authorization, Last-Event-ID"],
                    "access-control-expose-headers": ["Gaffer-Offset, Gaffer-Dropped, Gaffer-Ended"],
                    "access-control-max-age": ["86400"]})

    def test_errors_and_streams_have_cors_headers(self):
        """Or a page could not read why it was refused."""
        self.cat("web")
        for method, path, status in (("GET", "/nothing", 404), ("PUT", "/processes", 405), ("POST", "/processes", 400),
                                     ("GET", "/watch?feed=eventsource", 200),
                                     ("GET", "/stats?feed=longpoll&interval=0.1", 200),
                                     ("GET", "/streams/1/stdout?feed=continuous&since=0", 200), ("GET", "/", 200),
                                     ("GET", "/streams/1/stdout?timeout=0", 204)):
            with self.subTest(path=path):
                connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
                connection.request(method, path, headers={"Origin": "http://localhost:1"})
                answer = connection.getresponse()
                self.assertEqual((answer.status, answer.headers.get_all("Access-Control-Allow-Origin")),
                                 (status, ["http://localhost:1"]))
                self.assertIn("Origin", answer.headers["Vary"].split(", "))
                answer.close()
                connection.close()
        self.assertIn("access-control-allow-origin", self.ask(http_bytes(
            "POST", "/streams/1/stdin", "Content-Length: 9999999", "Origin: http://localhost"))[1])

    def test_own_origin(self):
        """http and https of the Host, or of a name that was allowed at its default port."""
        port = self.server.port
        for host, origin, good in (
                ("gaffer.example:%d" % port, "http://gaffer.example:%d" % port, True),
                ("gaffer.example", "http://gaffer.example", True),
                ("gaffer.example:%d" % port, "https://gaffer.example:%d" % port, True),
                ("app.localhost:1", "http://app.localhost:1", True),
                ("gaffer.example:%d" % port, "http://gaffer.example", True),
                ("gaffer.example:1", "http://gaffer.example:2", False),
                ("192.0.2.7:80", "http://192.0.2.7:80", True), ("192.0.2.7", "http://192.0.2.8", False),
                ("gaffer.example", "http://other.example", True), ("gaffer.example", "http://third.example", False), ("gaffer.example", "http://xgaffer.example", False)):
            with self.subTest(host=host, origin=origin):
                status, headers, _ = self.ask(http_bytes("POST", "/change", "Origin: " + origin, host=host))
                self.assertEqual((status, headers.get("access-control-allow-origin")),
                                 (200, [origin]) if good else (403, None))

    def test_cors_origin(self):
        """Further origins that were given at start, and those only."""
        server = Running(cors_origins=["https://app.example", "http://two.example:81/"])
        self.addCleanup(server.stop_all)
        self.cat("web", server)
        for origin, good in (("https://app.example", True), ("http://two.example:81", True),
                             ("http://localhost:5", True),
                             ("http://app.example", False), ("https://app.example:444", False),
                             ("http://two.example", False),
                             ("https://x.app.example", False), ("https://app.example.evil.example", False),
                             ("null", False)):
            with self.subTest(origin=origin):
                status, headers, _ = self.ask(http_bytes("POST", "/processes/web/_start", "Origin: " + origin),
                                              server=server)
                self.assertEqual((status, headers.get("access-control-allow-origin")),
                                 (200, [origin]) if good else (403, None))
                self.assertEqual(self.upgrade(origin, server), 101 if good else 403)

    def test_every_origin(self):
        """'*': changes and websockets too, never with credentials."""
        server = Running(cors_origins=["*"])
        self.addCleanup(server.stop_all)
        self.cat("web", server)
        for origin in ("http://evil.example", "null", "https://localhost:1"):
            for method, path, status in (("POST", "/processes/web/_start", 200), ("GET", "/ping", 200),
                                         ("OPTIONS", "/x", 204)):
                with self.subTest(origin=origin, method=method):
                    got, headers, _ = self.ask(http_bytes(method, path, "Origin: " + origin), method, server)
                    self.assertEqual(got, status)
                    self.assertIn(headers["access-control-allow-origin"], ([origin], ["*"]))
                    self.assertNotIn("access-control-allow-credentials", headers)
            self.assertEqual(self.upgrade(origin, server), 101)

    def test_hosts(self):
        """Addresses, localhost and names under it, names that were given; nothing that anybody can point here."""
        table = {
            200: ("127.0.0.1", "127.0.0.1:5000", "localhost", "LOCALHOST:1", "localhost.", "a.localhost",
                  "a.b.LocalHost:80", "[::1]", "[::1]:5000",
                  "192.0.2.1", "[2001:db8::1]", "[::ffff:192.0.2.1]:80", "8.8.8.8", "gaffer.example",
                  "GAFFER.example:99", "gaffer.example.",
                  "other.example", "localhost:", "localhost:0", "localhost:65535"),
            403: ("evil.example", "evil.example:5000", "0.0.0.0", "0.0.0.0:5000", "[::]", "[::]:5000",
                  "[0:0:0:0:0:0:0:0]", "[::ffff:0.0.0.0]", "0",
                  "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.evil.example", "localhost.evil.example",
                  "xlocalhost",
                  "a.gaffer.example", "xgaffer.example", "127.0.0.1.5", "127.0.0.256", "local%68ost",
                  "127.0.0.1,evil.example", "localhost..",
                  "_", "*", "127.0.0.1x"),
            400: ("", " ", "a b", "localhost:x", "localhost:65536", "localhost:-1", "localhost:1:2", "::1", "[::1",
                  "::1]", "[]", "[::1]x", "[zz]",
                  "[127.0.0.1]", "[::1]:x", "user@localhost", "http://localhost", "localhost/", "localhost/x",
                  "localhost?x", ":", ":80",
                  "[fe80::1%eth0]", "localhost\t:80", "l\xf6calhost", "[::1:80", "localhost#", "[::g]", "[:::]"),
        }
        for status, hosts in table.items():
            for host in hosts:
                with self.subTest(status=status, host=host):
                    for method in ("GET", "POST"):
                        self.changes = 0
                        answer = self.ask(http_bytes(method, "/change", host=host))
                        self.assertEqual((answer[0], self.changes), (status, int(status == 200)))
                        if status != 200:
                            self.assertCode(answer, status, "bad_request" if status == 400 else "forbidden_host")
        self.changes = 0
        self.assertRefused(b"GET /change HTTP/1.1\r\n\r\n")
        self.assertRefused(http_bytes("GET", "/change", "host: 127.0.0.1"))
        self.assertRefused(http_bytes("GET", "/change", "host: evil.example"))
        self.assertRefused(http_bytes("GET", "/change", "Host : 127.0.0.1", host=None))
        self.assertCode(self.ask(http_bytes("GET", "/change", host="evil.example", version="1.0")), 403,
                        "forbidden_host")
        self.assertEqual(self.changes, 0)
        self.assertEqual(self.ask(http_bytes("GET", "/change", host=None, version="1.0"))[0], 200)

    def test_host_is_checked_first(self):
        """Before token, origin, method, route, body and upgrade."""
        server = Running(token="secret")
        self.addCleanup(server.stop_all)
        self.cat("web")
        for data in (http_bytes("GET", "/nothing", host="evil.example"),
                     http_bytes("OPTIONS", "/", host="evil.example"),
                     http_bytes("OPTIONS", "*", host="evil.example"), http_bytes("FOO", "/ping", host="evil.example"),
                     http_bytes("POST", "/", "Origin: http://evil.example", host="evil.example"),
                     http_bytes("POST", "/", "Content-Length: 999999999", host="evil.example"),
                     http_bytes("POST", "/", "Content-Length: 5", "Transfer-Encoding: chunked", host="evil.example"),
                     http_bytes("POST", "/", "Content-Encoding: gzip", host="evil.example"),
                     http_bytes("GET", "/%zz", host="evil.example"),
                     http_bytes("GET", "/ping", "Expect: x", host="evil.example"),
                     http_bytes("GET", "/processes?a=1&a=1", host="evil.example"),
                     http_bytes("GET", "/wstreams/1", "Upgrade: websocket", "Connection: upgrade",
                                host="evil.example")):
            for each in (self.server, server):
                with self.subTest(data=data, token=each is server):
                    self.assertCode(self.ask(data, server=each), 403, "forbidden_host")
                    self.assertCode(self.ask(data.replace(b"evil.example", b"a b", 1), server=each), 400, "bad_request")


class HttpToken(HttpCase):
    """With a token every request needs it, but OPTIONS and GET or HEAD /ping."""

    TOKEN = "s\u00e9cret: word"
    options = {"token": TOKEN, "handlers": [("/hit", lambda request: "hit")]}

    def setUp(self):
        super().setUp()
        quiet = logging.NullHandler()           # each guess is told of
        logging.getLogger("gaffer").addHandler(quiet)
        self.addCleanup(logging.getLogger("gaffer").removeHandler, quiet)

    @staticmethod
    def basic(text):
        """An Authorization header."""
        return "Authorization: Basic " + base64.b64encode(text.encode()).decode()

    def test_without(self):
        """401 for everything, with what makes a browser ask."""
        for method, path in (("GET", "/"), ("GET", "/processes"), ("POST", "/processes"), ("GET", "/nothing"),
                             ("PUT", "/ping"), ("POST", "/ping"),
                             ("GET", "/ping/x"), ("GET", "/pingx"), ("GET", "/hit"), ("GET", "/wstreams/1"),
                             ("HEAD", "/processes"),
                             ("FOO", "/"), ("DELETE", "/processes/web"), ("GET", "/watch?feed=eventsource"),
                             ("GET", "//ping"), ("GET", "/x/../ping")):
            with self.subTest(method=method, path=path):
                answer = self.ask(http_bytes(method, path), method)
                self.assertEqual(answer[0], 401)
                self.assertRegex(answer[1]["www-authenticate"][0], "^Basic realm=")
                if method != "HEAD":
                    self.assertCode(answer, 401, "unauthorized")
        made = self.websocket("/wstreams/1")
        self.assertEqual(made.status, 401)

    def test_each_request_of_a_connection(self):
        """What came before on the same connection lets nobody in, and shuts nobody out."""
        wire, good = self.wire(), self.basic(":" + self.TOKEN)
        for header, status in ((good, 200), (good, 200), (self.basic(":no"), 401), (good, 200), ("X: y", 401), ("X: y", 401), (good, 200)):
            wire.send(http_bytes("GET", "/processes", header))
            self.assertEqual(wire.answer()[0], status)

    def test_what_needs_none(self):
        """OPTIONS anywhere, and the ping."""
        for method, path, status in (("GET", "/ping", 200), ("HEAD", "/ping", 200), ("GET", "/ping/", 200),
                                     ("GET", "/ping?_=y", 200),
                                     ("OPTIONS", "/processes", 204), ("OPTIONS", "*", 204), ("OPTIONS", "/ping", 204)):
            with self.subTest(method=method, path=path):
                self.assertEqual(self.ask(http_bytes(method, path), method)[0], status)

    def test_who_guesses_is_told_of(self):
        with self.assertLogs("gaffer", "WARNING") as caught:
            for wrong in ("Authorization: Bearer a", self.basic("b"), "X: y", "Authorization: Bearer c"):
                self.assertEqual(self.ask(http_bytes("GET", "/processes", wrong))[0], 401)
            good = {"Authorization": "Bearer " + self.TOKEN.encode().decode("latin-1")}
            self.assertIn(b"\ngaffer_http_wrong_tokens_total 3\n", self.server.request("GET", "/metrics", headers=good)[2])
        self.assertEqual(len(caught.output), 1)
        self.assertRegex(caught.output[0], r"a wrong token came from 127\.0\.0\.1:\d+; 1 so far$")

    def test_right_and_wrong(self):
        """Bearer, or Basic with the token as password and any user."""
        token = self.TOKEN.encode().decode("latin-1")
        good = ["Authorization: Bearer " + token, "authorization: bearer " + token, "Authorization: BEARER  " + token,
                self.basic("gaffer:" + self.TOKEN), self.basic(":" + self.TOKEN),
                self.basic("x:" + self.TOKEN).replace("Basic", "basic")]
        bad = ["Authorization: ", "Authorization: Bearer", "Authorization: Bearer ", "Authorization: Bearer x",
               "Authorization: Bearer " + token[:-1],
               "Authorization: Bearer %sx" % token, "Authorization: " + token, "Authorization: Digest " + token,
               self.basic(self.TOKEN.partition(":")[0]),
               self.basic(self.TOKEN + ":"), self.basic("x:"), self.basic("x:%s:" % self.TOKEN),
               "Authorization: Basic ",
               "Authorization: Basic !!!", "Authorization: Basic \xff", "Authorization: Basic " + token,
               "X-Authorization: Bearer " + token,
               "Cookie: token=" + token, "Authorization: Bearer \xff\xfe", "Authorization: Bearer " + token.upper()]
        for headers, status in [(header, 200) for header in good] + [(header, 401) for header in bad]:
            with self.subTest(headers=headers):
                self.assertEqual(self.ask(http_bytes("GET", "/processes", headers))[0], status)
                self.assertEqual(self.ask(http_bytes("POST", "/hit", headers, body=b"x"))[0], status)
        self.assertRefused(http_bytes("GET", "/processes", bad[0], good[0]))
        self.assertEqual(self.ask(http_bytes("GET", "/processes?token=" + urllib.parse.quote(self.TOKEN)))[0], 401)

    def test_unauthorized_body_is_not_executed(self):
        """And never becomes the next request."""
        wire = self.wire()
        wire.send(http_bytes("POST", "/hit", body=http_bytes("GET", "/ping")))
        self.assertCode(wire.answer(), 401, "unauthorized")
        self.assertEqual(wire.rest(), b"")

    def test_a_page_can_read_the_refusal(self):
        """401 has CORS headers for an allowed origin, 403 comes before it for a foreign one."""
        answer = self.ask(http_bytes("GET", "/processes", "Origin: http://localhost"))
        self.assertEqual((answer[0], answer[1]["access-control-allow-origin"]), (401, ["http://localhost"]))
        self.assertEqual(self.ask(http_bytes("POST", "/processes", "Origin: http://evil.example"))[0], 403)

    def test_websocket_with_basic(self):
        """What a browser sends of http://user:token@host."""
        self.assertEqual(self.ask(http_bytes("POST", "/processes", self.basic("x:" + self.TOKEN), body=json.dumps(
            {"name": "cat", "cmd": "cat", "redirect_input": True}).encode()))[2], HTTP_OK)
        made = self.websocket("/wstreams/1", self.basic("x:" + self.TOKEN) + "\r\n")
        self.assertEqual(made.status, 101)
        made.text("hi\n")
        self.assertEqual(made.read(), (1, b"hi\n"))

    def test_the_token_is_not_passed_on(self):
        """Not in the environment of a process, nor in what the server shows."""
        status, _, data = self.server.request("POST", "/processes", {"name": "env", "cmd": "env"},
                                              {"Authorization": self.basic(":" + self.TOKEN)[15:]})
        self.assertEqual(status, 200, data)
        answer = self.server.stream("/streams/env/stdout?feed=eventsource&since=0",
                                    {"Authorization": self.basic(":" + self.TOKEN)[15:]})
        names = set()
        for event in sse_events(answer):
            names.add(event["data"].partition("=")[0])
            if "PYTHONUNBUFFERED" in names or event["event"] == "exit":
                break
        self.assertNotIn("GAFFER_TOKEN", names)
        answer.close()
        answer.connection.close()


class HttpPages(HttpCase):
    """What a page of the web can make its reader's browser send to a gaffer on the same machine, without asking first."""

    BODY = b'{"name": "evil", "cmd": "cat", "args": ["="]}'

    def unchanged(self, server=None):
        """Nothing was added, started or stopped."""
        self.assertEqual((server or self.server).ok("GET", "/processes"), ["web"])
        self.assertEqual((server or self.server).ok("GET", "/processes?running=1"), [1])

    def test_forms_and_simple_requests(self):
        """Of every type that needs no preflight (Fetch standard, "CORS-safelisted request-header"), and as beacons."""
        self.cat("web")
        for kind in ("text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
            for origin in ("http://evil.example", "https://evil.example:5000", "null"):
                for path in ("/processes", "/processes/web/_stop", "/processes/web/_add", "/streams/1/stdin", "/groups/x/_stop",
                             "/processes/web/_signal/9"):
                    with self.subTest(kind=kind, origin=origin, path=path):
                        headers = ["Origin: " + origin, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"]
                        headers += ["Content-Type: " + kind] if kind else []
                        answer = self.ask(http_bytes("POST", path, *headers, body=self.BODY))
                        self.assertCode(answer, 403, "forbidden_origin")
                        self.assertEqual(HttpAccess.cors_names(answer[1]), set())
        self.unchanged()

    def test_what_needs_no_origin_changes_nothing(self):
        """Images, links, scripts and frames send GET without an Origin: whatever the route, whatever it is told to override."""
        self.cat("web")
        before = self.server.ok("GET", "/watch?since=0&timeout=0")
        for path, _ in gaffer.ROUTES:
            target = path.replace("<pid>", "1").replace("<label>", "stdin").replace("<g>", "web").replace("<sig>", "9").replace("<n>", "1")
            target = re.sub("<[^>]*>", "web", target)
            for method in ("GET", "HEAD"):
                with self.server.connect() as sock:     # some go on for ever
                    sock.sendall(http_bytes(method, target + "?feed=longpoll&timeout=0", "X-HTTP-Method-Override: DELETE", "Connection: close",
                                            "X-HTTP-Method: POST", "Referer: http://evil.example/"))
                    self.assertRegex(sock.recv(12), rb"HTTP/1.1 [24]0[0-9]|HTTP/1.1 426", target)
        self.assertEqual(self.server.ok("GET", "/watch?since=0&timeout=0"), before)
        self.unchanged()

    def test_rebound_name(self):
        """A page whose own name was pointed here is of the same origin, by its browser's lights: its Host gives it away."""
        self.cat("web")
        for host in ("evil.example", "0.0.0.0", "[::]", "localhost.evil.example", "127.0.0.1.evil.example"):
            host = "%s:%d" % (host, self.server.port)
            for method, path in (("GET", "/processes"), ("GET", "/streams/1/stdout?since=0"), ("POST", "/processes"), ("OPTIONS", "/processes"),
                                 ("DELETE", "/processes/web"), ("GET", "/"), ("GET", "/ping")):
                with self.subTest(host=host, path=path):
                    for headers in ((), ("Origin: http://" + host, "Sec-Fetch-Site: same-origin")):
                        answer = self.ask(http_bytes(method, path, *headers, host=host))
                        self.assertCode(answer, 403, "forbidden_host")
                        self.assertEqual(HttpAccess.cors_names(answer[1]), set())
            upgrade = http_bytes("GET", "/wstreams/1", "Origin: http://" + host, "Upgrade: websocket", "Connection: Upgrade",
                                 "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", host=host)
            self.assertEqual(self.ask(upgrade)[0], 403)
        self.unchanged()

    def test_websockets(self):
        """Need no preflight, and are readable by who opens them: from a foreign page there is none, read-only or not."""
        self.cat("web")
        for origin in ("http://evil.example", "https://evil.example", "null", "http://0.0.0.0:%d" % self.server.port, "file://"):
            for query in ("", "?readonly=true"):
                made = WebSocket(self.server.port, "/wstreams/1" + query, "Origin: %s\r\n" % origin)
                self.addCleanup(made.close)
                self.assertEqual(made.status, 403, origin)
        self.unchanged()

    def test_private_network_preflight(self):
        """Nobody foreign is let in by the preflight that some browsers send to private addresses."""
        answer = self.ask(http_bytes("OPTIONS", "/processes", "Origin: http://evil.example", "Access-Control-Request-Method: POST",
                                     "Access-Control-Request-Private-Network: true"), "OPTIONS")
        self.assertEqual((answer[0], HttpAccess.cors_names(answer[1])), (204, set()))

    def test_token_guesses_are_all_answered_alike(self):
        """Each is compared as a whole in constant time (hmac.compare_digest), and refused in the same words."""
        import hmac
        server = Running(token="correct horse")
        self.addCleanup(server.stop_all)
        compared, compare = [], hmac.compare_digest

        def recorded(given, token):
            compared.append((given, token))
            return compare(given, token)
        hmac.compare_digest = recorded
        self.addCleanup(setattr, hmac, "compare_digest", compare)
        answers = set()
        guesses = ("", "c", "correct horsf", "correct horse ", "Correct horse", "correct hors", "x" * 5000, "correct horse\xe9")
        for guess in guesses:
            for header in ("Authorization: Bearer " + guess, HttpToken.basic("user:" + guess)):
                answer = self.ask(http_bytes("GET", "/processes", header), server=server)
                if guess == "correct horse " and "Bearer" in header:
                    continue                    # white space around a header's value is none of it
                answer[1].pop("date")
                answers.add((answer[0], str(answer[1]), answer[2]))
        self.assertEqual(len(answers), 1, answers)
        self.assertEqual(answers.pop()[0], 401)
        self.assertEqual(len(compared), 2 * len(guesses))
        self.assertEqual({token for _, token in compared}, {b"correct horse"})
        self.assertEqual(self.ask(http_bytes("GET", "/processes", "Authorization: Bearer correct horse"), server=server)[0], 200)


class HttpEndpoints(HttpCase):
    """Where a server listens: TLS, unix sockets, IPv6, several at once; and where it refuses to."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.cert, cls.key = os.path.join(cls.folder, "cert.pem"), os.path.join(cls.folder, "key.pem")
        if shutil.which("openssl"):
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                            "-nodes", "-days", "2",
                            "-subj", "/CN=localhost", "-keyout", cls.key, "-out", cls.cert], check=True,
                            stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=TIMEOUT)

    def tls(self, **options):
        """(a server with TLS, a client's context)."""
        if not os.path.exists(self.cert):
            self.skipTest("there is no openssl program to make a certificate")
        server = self.listen(gaffer.HttpEndpoint("127.0.0.1:0", self.cert, self.key), **options)
        server.port = int(server.url.rpartition(":")[2])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self.cert)
        return server, context

    def listen(self, *endpoints, **options):
        """A server on endpoints (HttpEndpoints, or addresses)."""
        made = Running(endpoints=[gaffer.HttpEndpoint(each) if isinstance(each, str) else each for each in endpoints],
                       **options)
        self.addCleanup(made.stop_all)
        return made

    def secure(self, server, context):
        """An HttpWire over TLS."""
        made = HttpWire(context.wrap_socket(server.connect()))
        self.addCleanup(made.close)
        return made

    def local(self, path):
        """An HttpWire to a unix socket."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        made = HttpWire(sock)
        self.addCleanup(made.close)
        return made

    def ping(self, wire):
        """One request on a wire, which is then closed."""
        wire.send(http_bytes("GET", "/ping", host="localhost"))
        self.assertEqual(wire.answer()[2], b"OK")
        wire.close()

    def test_with_tls_there_is_no_plain_answer(self):
        """It would be none to a client that speaks TLS, and there is no room for a handshake."""
        server, _ = self.tls(max_connections=1)
        first = server.connect()
        self.addCleanup(first.close)
        until(lambda: len(server.http.connections) == 1, "the first")
        with self.assertLogs("gaffer", "WARNING"), server.connect() as second:
            self.assertEqual(second.recv(1000), b"")
        self.assertEqual(server.http.requests.samples()[0], ({"method": "other", "code": 503}, 1))

    def test_tls_with_http_client(self):
        """Requests, a body of a megabyte, keep-alive."""
        server, context = self.tls(handlers=[("/echo", lambda request: request.body)])
        self.assertTrue(server.url.startswith("https://127.0.0.1:"))
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=TIMEOUT, context=context)
        self.addCleanup(connection.close)
        for body in (b"", b"x", os.urandom(gaffer.MIB), b"y"):
            connection.request("POST", "/echo", body)
            answer = connection.getresponse()
            self.assertEqual((answer.status, answer.read()), (200, body))
        connection.request("GET", "/ping", headers={"Origin": server.url})
        answer = connection.getresponse()
        self.assertEqual((answer.read(), answer.headers["Access-Control-Allow-Origin"]), (b"OK", server.url))

    def test_tls_ends_with_a_close_notify(self):
        """Or a client could not tell an end from a cut (RFC 8446 section 6.1)."""
        server, context = self.tls()
        wire = self.secure(server, context)         # suppress_ragged_eofs is true: look below the file
        wire.sock.suppress_ragged_eofs = False
        wire.send(http_bytes("GET", "/ping", "Connection: close"))
        self.assertEqual(wire.answer()[2], b"OK")
        self.assertEqual(wire.sock.recv(10), b"")

    def test_hanging_handshake_blocks_nobody(self):
        """Nor does plain HTTP on a TLS port, nor a stop while they hang."""
        server, context = self.tls()
        hanging = [server.connect() for _ in range(55)]
        for number, sock in enumerate(hanging):
            self.addCleanup(sock.close)
            sock.sendall((b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00",
                          b"\0" * 100)[number] if number < 5 else b"\x16\x03\x01\x02\x00\x01")
        until(lambda: len(server.http.threads) >= 50, "the threads that wait")
        began = time.monotonic()
        self.ping(self.secure(server, context))
        self.assertLess(time.monotonic() - began, gaffer.HANDSHAKE_TIME / 5)
        server.stop_all()
        for sock in hanging:
            with contextlib.suppress(ConnectionError):
                while sock.recv(1000):
                    pass

    def test_handshakes_without_end(self):
        """They have a limit of their own, and one more ends the oldest: others get in, with TLS or without."""
        server, context = self.tls()
        with http_limits(HANDSHAKES_MAX=20):
            hanging = [server.connect() for _ in range(60)]
            for sock in hanging:
                self.addCleanup(sock.close)
                sock.sendall(b"\x16\x03\x01")
            until(lambda: len(server.http.handshakes) == 20 and len(server.http.connections) == 20, "the limit")
            self.ping(self.secure(server, context))
            self.assertLessEqual(len(server.http.threads), 20)

    def test_handshake_that_never_ends(self):
        """Is cut after a while."""
        server, _ = self.tls()
        with http_limits(HANDSHAKE_TIME=0.05), server.connect() as sock:
            self.assertEqual(sock.recv(1), b"")

    def test_streams_over_tls(self):
        """Server-sent events and a websocket; what came with the request, and more than one record at once."""
        server, context = self.tls()
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=TIMEOUT, context=context)
        self.addCleanup(connection.close)
        connection.request("POST", "/processes", json.dumps({"name": "cat", "cmd": "cat", "redirect_input": True}))
        self.assertEqual(connection.getresponse().read(), HTTP_OK)
        connection.request("GET", "/streams/1/stdout?feed=eventsource&since=0")
        stream = connection.getresponse()
        self.addCleanup(stream.close)
        events = sse_events(stream)
        made = WebSocket(server.port, "/wstreams/1?type=binary", early=WebSocket.encode(2, b"early\n"),
                         sock=context.wrap_socket(server.connect()))
        self.addCleanup(made.close)
        self.assertEqual(made.status, 101)
        self.assertEqual(made.read(), (2, b"early\n"))
        self.assertEqual(next(events)["data"], "early")
        big = b"".join(b"%05d %b\n" % (number, b"x" * 94) for number in range(2000))
        made.binary(big)
        echo = b""
        while len(echo) < len(big):
            opcode, data = made.read()
            self.assertEqual(opcode, 2)
            echo += data
        self.assertEqual(echo, big)
        text, expected = "", big.decode().replace("\n", "")
        while len(text) < len(expected):            # a line may come in two parts where its end was late
            text += next(events)["data"]
        self.assertEqual(text, expected)
        made.frame(8, struct.pack("!H", 1000))
        self.assertEqual(made.read(), (8, struct.pack("!H", 1000)))
        self.assertEqual(made.read(), (None, b""))

    def test_long_poll_over_tls(self):
        """Parked, answered, and the connection goes on, with what was sent meanwhile."""
        server, context = self.tls()
        wire = self.secure(server, context)
        wire.send(http_bytes("GET", "/watch/create?since=0") + http_bytes("GET", "/ping"))
        until(lambda: [each for each in tuple(server.http.channels) if each.kind == "longpoll"], "the parked request")
        wire.send(http_bytes("GET", "/nothing"))
        server.manager.add_process("web", "cat", start=False)
        self.assertEqual(json.loads(wire.answer()[2].decode())["name"], "web")
        self.assertEqual(wire.answer()[2], b"OK")
        self.assertEqual(wire.answer()[0], 404)

    def test_stop_with_open_tls_connections(self):
        """Ends them at once, without a word in the log."""
        server, context = self.tls()
        wires = [self.secure(server, context) for _ in range(6)]
        for wire, data in zip(wires, (b"", b"GET", http_bytes("GET", "/ping"), http_bytes("GET", "/watch"),
                                      http_bytes("GET", "/watch?feed=continuous"),
                                      http_bytes("POST", "/processes", "Content-Length: 5"))):
            if data:
                wire.send(data)
        for wire in wires[2:3]:
            self.assertEqual(wire.answer()[2], b"OK")
        until(lambda: sorted(channel.kind for channel in tuple(server.http.channels)) == [
            "continuous", "idle", "idle", "longpoll"] and len(server.http.threads) == 2, "all")
        with self.assertLogs("gaffer", "ERROR") as logged:
            server.stop_all()
            logging.getLogger("gaffer").error("barrier")
        self.assertEqual(len(logged.output), 1, logged.output)

    def test_bad_certificates(self):
        """Are told in a sentence at start."""
        for certfile, keyfile in (("/no/such/cert.pem", None), (__file__, __file__), (self.cert, __file__),
                                  (self.cert, None)):
            with self.subTest(certfile=certfile,
                              keyfile=keyfile), self.assertRaisesRegex(gaffer.StartError,
                                                                       "certificate .*%s" % re.escape(certfile)):
                self.listen(gaffer.HttpEndpoint("127.0.0.1:0", certfile, keyfile))
        with self.assertRaises(gaffer.StartError):
            gaffer.HttpEndpoint("127.0.0.1:0", None, self.key)

    def test_unix_socket(self):
        """Only its owner may use it; it goes with the server."""
        path = os.path.join(self.folder, "own.sock")
        server = self.listen("unix:" + path)
        self.assertEqual(server.http.urls, ["unix:" + path])
        mode = os.lstat(path).st_mode
        self.assertTrue(stat.S_ISSOCK(mode))
        self.assertEqual(stat.S_IMODE(mode), 0o600)
        self.ping(self.local(path))
        wire = self.local(path)                 # no page can reach it, and clients send any name
        wire.send(http_bytes("GET", "/ping", host="unix"))
        self.assertEqual(wire.answer()[0], 200)
        wire = self.local(path)
        wire.send(http_bytes("GET", "/watch/create?feed=eventsource&since=0"))
        server.manager.add_process("web", "cat", start=False)
        lines = iter(wire.file.readline, b"")
        self.assertIn(b"event: create\n", lines)
        server.stop_all()
        self.assertFalse(os.path.lexists(path))

    def test_stale_unix_socket(self):
        """What a dead server left is taken away; a living one's is not, nor is a file."""
        path = os.path.join(self.folder, "stale.sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
            dead.listen(1)
        server = self.listen("unix:" + path)
        self.ping(self.local(path))
        self.assertEqual(stat.S_IMODE(os.lstat(path).st_mode), 0o600)
        with self.assertRaisesRegex(gaffer.StartError, "another program"):
            self.listen("unix:" + path)
        self.ping(self.local(path))
        server.stop_all()
        with open(path, "w") as file:
            file.write("precious")
        with self.assertRaisesRegex(gaffer.StartError, re.escape(path)):
            self.listen("unix:" + path)
        with open(path) as file:
            self.assertEqual(file.read(), "precious")
        os.unlink(path)

    def test_a_unix_socket_that_another_server_has_taken_over(self):
        """Is not removed by the old one."""
        path = os.path.join(self.folder, "taken.sock")
        old = self.listen("unix:" + path)
        os.rename(path, path + ".old")
        new = self.listen("unix:" + path)
        old.stop_all()
        self.ping(self.local(path))
        new.stop_all()
        self.assertFalse(os.path.lexists(path))
        os.unlink(path + ".old")

    def test_any_host_on_a_unix_socket(self):
        """No page can reach it; an application gets a name that it can use."""
        path = os.path.join(self.folder, "host.sock")
        self.listen("unix:" + path, wsgi={"/name": lambda environ, start: (start("200 OK", []), [environ["SERVER_NAME"].encode()])[1]})
        for host in ("unix", "a/b", "[x"):
            wire = self.local(path)
            wire.send(http_bytes("GET", "/name", host=host))
            self.assertEqual(wire.answer()[2], b"unix" if host == "unix" else b"localhost")
            wire.close()

    def test_unix_sockets_that_cannot_be(self):
        """A folder that is not there, a path that is too long."""
        for path in ("/no/such/folder/x.sock", os.path.join(self.folder, "x" * 200), self.folder):
            with self.subTest(path=path), self.assertRaisesRegex(gaffer.StartError, "cannot listen on unix:"):
                self.listen(gaffer.HttpEndpoint("unix:" + path))
        self.assertTrue(os.path.isdir(self.folder))

    def test_ipv6(self):
        """[::1], with its own Host and Origin."""
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            self.skipTest("there is no ::1")
        server = self.listen("[::1]:0")
        self.assertRegex(server.url, r"^http://\[::1\]:[0-9]+$")
        wire = HttpWire(socket.create_connection(("::1", server.port), TIMEOUT))
        self.addCleanup(wire.close)
        wire.send(http_bytes("POST", "/processes/x/_start", "Origin: " + server.url, host="[::1]:%d" % server.port))
        self.assertCode(wire.answer(), 404, "not_found")

    def test_several_endpoints(self):
        """One server behind all of them."""
        path = os.path.join(self.folder, "several.sock")
        server = self.listen("127.0.0.1:0", "unix:" + path, "localhost:0")
        self.assertEqual(len(server.http.urls), 3)
        self.assertRegex(server.http.urls[2], "^http://127.0.0.1:[0-9]+$")
        server.ok("POST", "/processes", {"name": "web", "cmd": "cat", "start": False})
        for wire in (self.local(path), HttpWire(socket.create_connection(("127.0.0.1",
                                                                          int(server.http.urls[2].rpartition(":")[2])),
                                                                          TIMEOUT))):
            self.addCleanup(wire.close)
            wire.send(http_bytes("GET", "/processes"))
            self.assertEqual(wire.answer()[2], b'["web"]\n')

    def test_plain_and_tls_together(self):
        """Each endpoint has its own certificate, or none."""
        server, context = self.tls()
        server.stop_all()
        server = self.listen("127.0.0.1:0", gaffer.HttpEndpoint("127.0.0.1:0", self.cert, self.key))
        self.ping(self.wire(server))
        server.port = int(server.http.urls[1].rpartition(":")[2])
        self.ping(self.secure(server, context))

    def test_open_to_others_only_with_a_token(self):
        """An error at start, not a warning; with a token it may."""
        for address in ("0.0.0.0:0", "[::]:0"):
            with self.subTest(address=address):
                try:
                    socket.create_server((address.rpartition(":")[0].strip("[]"), 0),
                                         family=socket.AF_INET6 if "[" in address else socket.AF_INET).close()
                except OSError:
                    self.skipTest("there is no IPv6")
                with self.assertRaisesRegex(gaffer.StartError, "token"):
                    self.listen(gaffer.HttpEndpoint("127.0.0.1:0"), gaffer.HttpEndpoint(address))
                server = self.listen(address, token="secret")
                self.assertEqual(server.request("GET", "/processes")[0], 401)
                self.assertEqual(server.request("GET", "/processes", headers={"Authorization": "Bearer secret"})[0],
                                 200)
                status = self.ask(http_bytes("GET", "/ping", host="0.0.0.0:%d" % server.port), server=server)[0]
                self.assertEqual(status, 403)

    def test_port_in_use(self):
        """A sentence that says so; what was open already is closed again."""
        with self.assertRaises(gaffer.StartError) as caught:
            self.listen("127.0.0.1:0", "127.0.0.1:%d" % self.server.port)
        sentence = str(caught.exception)
        self.assertIn("127.0.0.1:%d" % self.server.port, sentence)
        self.assertIn("in use", sentence)
        self.assertNotIn("\n", sentence)
        self.ping(self.wire())

    def test_addresses(self):
        """What is no address is told in a sentence."""
        self.assertEqual([(each.host, each.port) for each in map(gaffer.HttpEndpoint, ("5000", ":5000"))], [("127.0.0.1", 5000)] * 2)
        for bind in ("", "50000000", "127.0.0.1", ":", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1",
                     "::1:5000", "[::1]", "unix:",
                     "http://127.0.0.1:5000", "127.0.0.1:5000/", "[::1:5000", "a:b:1", "127.0.0.1:5000 "):
            with self.subTest(bind=bind), self.assertRaisesRegex(gaffer.StartError, "address"):
                gaffer.HttpEndpoint(bind)
        with self.assertRaisesRegex(gaffer.StartError, "no-such-host.invalid"):
            self.listen(gaffer.HttpEndpoint("no-such-host.invalid:0"))

    def test_two_servers_in_one_process(self):
        """Share nothing."""
        other = self.listen("127.0.0.1:0")
        self.assertEqual((self.cat("web"), self.cat("web", other)), ([1], [1]))
        self.server.ok("DELETE", "/processes/web")
        self.assertEqual((self.server.ok("GET", "/processes"), other.ok("GET", "/processes")), ([], ["web"]))
        self.server.stop_all()
        self.assertEqual(other.ok("GET", "/processes?running=1"), [1])

    def test_a_port_can_be_had_again_at_once(self):
        """After a stop with connections open."""
        wire = self.wire()
        wire.send(http_bytes("GET", "/ping"))
        self.assertEqual(wire.answer()[2], b"OK")
        port = self.server.port
        self.server.stop_all()
        self.assertEqual(wire.rest(), b"")
        self.ping(self.wire(self.listen("127.0.0.1:%d" % port)))


def http_socket_class(seen, **more):
    """A WebSocketHandler class that puts what happens to it into the queue `seen`; further methods in `more`."""
    def message(self, data):
        seen.put(("message", data))
        self.send(data)
    return type("HttpSocket", (gaffer.WebSocketHandler,), dict({
        "open": lambda self: seen.put(("open", self)), "message": message,
        "close": lambda self, code, reason: seen.put(("close", code, reason))}, **more))


class HttpLibrary(HttpCase):
    """Section 7: what a program adds to the server."""

    def serve(self, **options):
        """Another server, with options."""
        made = Running(**options)
        self.addCleanup(made.stop_all)
        return made

    def test_routes(self):
        """What a callable may return, and what the client gets."""
        results = {
            "str": ("gr\u00fcn", 200, "text/plain; charset=utf-8", "gr\u00fcn".encode()),
            "bytes": (b"\0\xff", 200, "application/octet-stream", b"\0\xff"),
            "dict": ({"a": [1]}, 200, "application/json", b'{"a": [1]}\n'),
            "list": ([1, "x"], 200, "application/json", b'[1, "x"]\n'),
            "tuple": ((201, {"Content-Type": "text/html", "X-A": "b"}, "<p>"), 201, "text/html", b"<p>"),
            "pairs": ((404, [("X-A", "b")], {"no": 1}), 404, "application/json", b'{"no": 1}\n'),
            "empty": ("", 200, "text/plain; charset=utf-8", b""),
            "length": ((200, [("Content-Length", "3")], "abc"), 200, "text/plain; charset=utf-8", b"abc"),
            "strange": ((299, [], b"x"), 299, "application/octet-stream", b"x"),
            "response": (gaffer.Response(b"x", 203, [("X-A", "b")], "image/png"), 203, "image/png", b"x"),
        }
        server = self.serve(handlers=[("/r/([a-z]+)", lambda request, name: results[name][0])])
        for name, (_, status, kind, body) in results.items():
            with self.subTest(name=name):
                wire = self.wire(server)
                wire.send(http_bytes("GET", "/r/" + name) + http_bytes("HEAD",
                                                                       "/r/" + name) + http_bytes("GET", "/ping"))
                got, headers, data = wire.answer()
                self.assertEqual((got, headers["content-type"], data), (status, [kind], body))
                if name in ("tuple", "pairs", "response"):
                    self.assertEqual(headers["x-a"], ["b"])
                again, same, _ = wire.answer("HEAD")
                self.assertEqual((again, dict(same, date=0)), (got, dict(headers, date=0)))
                self.assertEqual(wire.answer()[2], b"OK")
                wire.close()

    def test_answers_without_a_body(self):
        """204 and 304 have none, whatever the callable says: the next answer would be read wrong."""
        server = self.serve(handlers=[("/r/([0-9]+)", lambda request, status: (int(status), [], "body"))])
        for status in (204, 304):
            with self.subTest(status=status):
                wire = self.wire(server)
                wire.send(http_bytes("GET", "/r/%d" % status) + http_bytes("GET", "/ping"))
                got, headers, _ = wire.answer()
                self.assertEqual((got, headers.get("transfer-encoding")), (status, None))
                self.assertEqual(wire.answer()[2], b"OK")
                wire.close()

    def test_routes_that_fail(self):
        """500, the traceback in the log and nothing of it in the answer."""
        def fail(request, kind):
            if kind == "raise":
                raise RuntimeError("secret")
            return {"object": object(), "set": {"secret"}, "tuple": (1, 2),
                    "split": (200, {"X": "secret\r\nSet-Cookie: a=b"}, ""),
                    "name": (200, {"X\r\nY": "secret"}, ""), "nul": (200, {"X": "a\0"}, ""),
                    "status": ("200 secret", [], ""),
                    "headers": (200, None, "secret"), "euro": (200, {"X": "secret \u20ac"}, ""),
                    "nan": (200, [], {1, 2}),
                    "surrogate": "secret \ud800"}[kind]
        server = self.serve(handlers=[("/r/([a-z]+)", fail)])
        for kind in ("raise", "object", "set", "tuple", "split", "name", "nul", "status", "headers", "euro", "nan",
                     "surrogate"):
            with self.subTest(kind=kind), self.assertLogs("gaffer", "ERROR") as logged:
                wire = self.wire(server)
                wire.send(http_bytes("GET", "/r/" + kind))
                answer = wire.answer()
                self.assertIn("the added route /r/([a-z]+)", self.assertCode(answer, 500, "internal_error"))
                self.assertNotIn(b"secret", answer[2])
                self.assertNotIn("set-cookie", answer[1])
                self.assertIn("Traceback", "".join(logged.output))
                wire.close()

    def test_routes_may_raise_errors_of_gaffer(self):
        """They are answered as what they are."""
        def handler(request):
            return request.json()
        server = self.serve(handlers=[("/json", handler)])
        self.assertEqual(self.ask(http_bytes("POST", "/json", body=b'{"a": 1}'), server=server)[2], b'{"a": 1}\n')
        self.assertCode(self.ask(http_bytes("POST", "/json", body=b"{"), server=server), 400, "invalid_json")
        self.assertCode(self.ask(http_bytes("POST", "/json", body=b"NaN"), server=server), 400, "invalid_json")

    def test_what_a_route_is_told(self):
        """The request, and the groups of its pattern, decoded once."""
        seen = []
        server = self.serve(handlers=[("/hello/([^/]+)(/x)?", lambda request,
                                       *groups: seen.append((request, groups)) or "ok"),
                                       ("/hello/.*", lambda request: "second")])
        self.assertEqual(self.ask(http_bytes("PUT", "/hello/a%2Fb%2541?q=%31&e=", "X-A: 1", "X-A: 2", body=b"body"),
                                  server=server)[2], b"ok")
        request, groups = seen[0]
        self.assertEqual((request.method, request.query, request.headers["x-a"], request.body, groups),
                         ("PUT", {"q": "1", "e": ""}, "1, 2", b"body", ("a/b%41", None)))
        self.assertRegex(request.client, "^127.0.0.1:[0-9]+$")
        self.assertEqual(self.ask(http_bytes("GET", "/hello/a/b"), server=server)[2], b"second")
        self.assertCode(self.ask(http_bytes("GET", "/hello"), server=server), 404, "resource_not_found")
        self.assertCode(self.ask(http_bytes("GET", "/x/hello/a"), server=server), 404, "resource_not_found")

    def test_routes_run_on_their_own_thread(self):
        """One that waits holds nobody, and may call the manager."""
        enter, leave = threading.Event(), threading.Event()

        def slow(request):
            enter.set()
            leave.wait(TIMEOUT)
            server.manager.add_process("made", "cat", start=False)
            return server.manager.info("made")["cmd"]
        server = self.serve(handlers=[("/slow", slow), ("/processes", lambda request: "never")])
        wire = self.wire(server)
        wire.send(http_bytes("GET", "/slow"))
        self.assertTrue(enter.wait(TIMEOUT))
        self.assertEqual(self.ask(http_bytes("GET", "/processes"), server=server)[2], b"[]\n")
        leave.set()
        self.assertEqual(wire.answer()[2], b"cat")

    def test_max_body(self):
        """Is the limit of what was added, not of the API."""
        server = self.serve(handlers=[("/echo", lambda request: request.body)], max_body=3 * gaffer.MIB)
        body = os.urandom(3 * gaffer.MIB)
        self.assertEqual(self.ask(http_bytes("POST", "/echo", body=body), server=server)[2], body)
        self.assertEqual(self.ask(http_bytes("POST", "/echo", "Transfer-Encoding: chunked", body=http_chunks(body)),
                                  server=server)[2], body)
        self.assertRefused(http_bytes("POST", "/echo", body=body + b"x"), 413, "too_large", server)
        self.assertRefused(http_bytes("POST", "/processes", body=body), 413, "too_large", server)

    def socket_server(self, **more):
        """(server, queue of what its WebSocketHandler sees)."""
        seen = queue.Queue()
        return self.serve(handlers=[("/socket(?:/(.*))?", http_socket_class(seen, **more))]), seen

    def open_socket(self, server, path="/socket", headers="", early=b""):
        """A WebSocket, closed after the test."""
        made = WebSocket(server.port, path, headers, early)
        self.addCleanup(made.close)
        return made

    def test_websocket_route(self):
        """Text stays text, bytes stay bytes; fragments are joined; the close code of the client comes, once."""
        server, seen = self.socket_server()
        made = self.open_socket(server, "/socket/a%20b?x=1", early=WebSocket.encode(1, b"early"))
        self.assertEqual(made.status, 101)
        kind, handler = seen.get(timeout=TIMEOUT)
        self.assertEqual((kind, handler.args, handler.request.query), ("open", ["a b"], {"x": "1"}))
        self.assertEqual(made.read(), (1, b"early"))
        made.text("h\u00e9")
        made.binary(b"\0\xff")
        made.frame(1, b"one ", final=False)
        made.frame(9, b"ping")
        made.frame(0, b"two")
        made.binary(b"")
        made.binary(bytes(70000))
        self.assertEqual([made.read() for _ in range(6)],
                         [(1, "h\u00e9".encode()), (2, b"\0\xff"), (10, b"ping"), (1, b"one two"), (2, b""),
                          (2, bytes(70000))])
        made.frame(8, struct.pack("!H", 4001) + b"bye")
        self.assertEqual(made.read()[1][:2], struct.pack("!H", 4001))
        self.assertEqual(made.read(), (None, b""))
        got = [seen.get(timeout=TIMEOUT) for _ in range(7)]
        self.assertEqual(got[:6], [("message", data) for data in ("early", "h\u00e9", b"\0\xff", "one two", b"",
                                                                  bytes(70000))])
        self.assertEqual(got[6], ("close", 4001, "bye"))
        self.assertTrue(seen.empty())

    def test_websocket_handler_that_is_full(self):
        """What its client does not read stops the next messages, though all of them have come at once."""
        answer = bytes(gaffer.MIB)
        server, _ = self.socket_server(message=lambda self, data: self.send(answer[:-1] + data))
        made = self.open_socket(server, early=b"".join(WebSocket.encode(2, b"%c" % number) for number in range(64)))
        channel, = server.http.channels
        until(lambda: channel.paused, "a queue that is full")
        self.assertLess(channel.queued, 8 * gaffer.MIB)
        self.assertEqual([made.read()[1][-1] for _ in range(64)], list(range(64)))

    def test_websocket_ends(self):
        """By end(), by a client that goes, by a fault, by the server's stop."""
        server, seen = self.socket_server(max_message=10)
        for name, act, frame, told in (
                ("end", lambda made, handler: handler.end(4000, "done"), struct.pack("!H", 4000) + b"done",
                 ("close", 4000, "done")),
                ("default", lambda made, handler: handler.end(), struct.pack("!H", 1000), ("close", 1000, "")),
                ("too big", lambda made, handler: made.text("x" * 11), struct.pack("!H", 1009), ("close", 1009, None)),
                ("fault", lambda made, handler: made.frame(3), struct.pack("!H", 1002), ("close", 1002, None)),
                ("no code", lambda made, handler: made.frame(8), b"", ("close", 1005, ""))):
            with self.subTest(name=name):
                made = self.open_socket(server)
                act(made, seen.get(timeout=TIMEOUT)[1])
                opcode, data = made.read()
                self.assertEqual((opcode, data[:len(frame)]), (8, frame))
                made.frame(8, data)
                self.assertEqual(made.read(), (None, b""))
                made.close()
                got = seen.get(timeout=TIMEOUT)
                self.assertEqual(got[:2], told[:2])
                if told[2] is not None:
                    self.assertEqual(got[2], told[2])
        made = self.open_socket(server)
        handler = seen.get(timeout=TIMEOUT)[1]
        made.close()
        self.assertEqual(seen.get(timeout=TIMEOUT)[:2], ("close", 1006))
        handler.send("to nobody")
        handler.end()
        made = self.open_socket(server)
        seen.get(timeout=TIMEOUT)
        server.stop_all()
        self.assertEqual(seen.get(timeout=TIMEOUT)[0], "close")
        self.assertIn(made.read()[0], (8, None))
        self.assertTrue(seen.empty())

    def test_websocket_sends_from_another_thread(self):
        """In order, whatever thread it is."""
        server, seen = self.socket_server()
        made = self.open_socket(server)
        handler = seen.get(timeout=TIMEOUT)[1]

        def send():
            for number in range(1000):
                handler.send(str(number))
            handler.end()
        sender = threading.Thread(target=send)
        sender.start()
        self.addCleanup(sender.join)
        self.assertEqual([made.read() for _ in range(1000)], [(1, b"%d" % number) for number in range(1000)])
        self.assertEqual(made.read()[0], 8)

    def test_websocket_sends_under_a_lock_that_the_handler_waits_for(self):
        """send() and end() only queue: they wait for nobody, and a chat room may have a lock."""
        for where, act in (("open", lambda made: None), ("message", lambda made: made.text("x")),
                           ("close", lambda made: made.close())):
            with self.subTest(where):
                lock, waits, took, made = threading.Lock(), threading.Event(), [], []

                def wait(handler, *arguments, lock=lock, waits=waits, took=took, made=made):
                    made.append(handler)
                    waits.set()
                    took.append(lock.acquire(timeout=TIMEOUT / 3))
                    if took[-1]:
                        lock.release()
                server, seen = self.socket_server(**{where: wait})
                with lock:
                    client = self.open_socket(server)
                    act(client)
                    self.assertTrue(waits.wait(TIMEOUT))
                    made[0].send("sent")
                    made[0].end()
                    self.assertEqual(took, [], "send() has waited for the handler")
                until(lambda took=took: took, "the handler's end")
                self.assertEqual(took, [True])
                if where != "close":
                    self.assertEqual([client.read() for _ in range(2)],
                                     [(1, b"sent"), (8, struct.pack("!H", 1000))])

    def test_websocket_handlers_run_on_one_thread(self):
        """Never on one that sends, nor within a send(), even where that ends the connection."""
        threads, inside, nested = set(), [], []

        def enter(handler, *arguments):
            threads.add(threading.get_ident())
            nested.extend(inside)
            inside.append(1)
            try:
                if arguments == ("flood",):
                    for _ in range(100):
                        handler.send(bytes(gaffer.MIB))
            finally:
                inside.pop()
        made, closed = queue.Queue(), queue.Queue()
        server, _ = self.socket_server(
            open=lambda handler: (enter(handler), made.put(handler)), message=enter,
            close=lambda handler, code, reason: (enter(handler), closed.put(code)))
        with http_limits(SEND_QUEUE_SIZE=8 * gaffer.MIB):
            for act in ("flood", "send", "end"):
                client = self.open_socket(server)
                handler = made.get(timeout=TIMEOUT)
                if act == "flood":              # from its own message()
                    client.text("flood")
                elif act == "send":             # from this thread
                    for _ in range(100):
                        handler.send(bytes(gaffer.MIB))
                else:
                    handler.end()
                    client.frame(8, struct.pack("!H", 1000))
                self.assertEqual(closed.get(timeout=TIMEOUT), 1000 if act == "end" else 1006)
        self.assertEqual((len(threads), threading.get_ident() in threads, nested), (1, False, []))

    def test_websocket_handlers_that_fail(self):
        """1011, the traceback in the log; close() is called; the others go on."""
        def fail(*arguments):
            raise RuntimeError("secret")
        for where in ("open", "message"):
            with self.subTest(where=where), self.assertLogs("gaffer", "ERROR") as logged:
                server, seen = self.socket_server(**{where: fail})
                made = self.open_socket(server)
                made.text("x")
                opcode, data = made.read()
                self.assertEqual((opcode, data[:2]), (8, struct.pack("!H", 1011)))
                self.assertNotIn(b"secret", data)
                if where == "message":
                    seen.get(timeout=TIMEOUT)
                self.assertEqual(seen.get(timeout=TIMEOUT)[:2], ("close", 1011))
                self.assertIn("RuntimeError", "".join(logged.output))
                self.assertEqual(self.ask(http_bytes("GET", "/ping"), server=server)[2], b"OK")
        with self.assertLogs("gaffer", "ERROR") as logged:
            server, seen = self.socket_server(close=fail)
            made = self.open_socket(server)
            made.frame(8, struct.pack("!H", 1000))
            self.assertEqual(made.read(), (8, struct.pack("!H", 1000)))
            self.assertEqual(made.read(), (None, b""))
            until(lambda: logged.output, "the log")
        self.assertIn("RuntimeError", "".join(logged.output))

    def test_websocket_handler_that_cannot_be_made(self):
        """500, as nothing was upgraded."""
        def fail(*arguments):
            raise RuntimeError("secret")
        with self.assertLogs("gaffer", "ERROR"):
            server, _ = self.socket_server(__init__=fail)
            made = self.open_socket(server)
        self.assertEqual(made.status, 500)

    def test_websocket_route_without_upgrade(self):
        """426, with what it wants; a foreign page: 403."""
        server, _ = self.socket_server()
        answer = self.ask(http_bytes("GET", "/socket"), server=server)
        self.assertCode(answer, 426, "upgrade_required")
        self.assertEqual((answer[1]["upgrade"], answer[1]["sec-websocket-version"]), (["websocket"], ["13"]))
        self.assertEqual(self.open_socket(server, headers="Origin: http://evil.example\r\n").status, 403)
        self.assertEqual(self.open_socket(server, headers="Origin: http://localhost:3000\r\n").status, 101)

    def wsgi_server(self, app, **more):
        """A server with an application behind the validator of wsgiref at /admin."""
        return self.serve(wsgi=dict({"/admin": wsgiref.validate.validator(app)}, **more))

    def test_wsgi(self):
        """GET, POST, HEAD, PUT, what stands in environ; the validator is content."""
        seen = []

        def app(environ, start_response):
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
            seen.append((dict(environ), body))
            start_response("201 Made", [("Content-Type", "text/plain"), ("X-A", "b")])
            return [b"got ", body]
        server = self.wsgi_server(app)
        for method, headers, body, got in (("GET", (), b"", b""), ("POST", (), b"hello", b"hello"),
                                           ("PUT", ("Transfer-Encoding: chunked",), http_chunks(b"hi"), b"hi"),
                                           ("HEAD", (), b"", b""), ("DELETE", (), b"", b""),
                                           ("POST", (), bytes(2 * gaffer.MIB), bytes(2 * gaffer.MIB))):
            with self.subTest(method=method):
                data = http_bytes(method, "/admin/a%20b/%c3%a9?x=%31&y", "Content-Type: text/x", "X-Two: 1", "X-Two: 2",
                                  "Proxy: evil", "X_Two: evil",
                                  "Origin: http://localhost", *headers, body=body, host="localhost:%d" % server.port)
                wire = self.wire(server)
                wire.send(data + http_bytes("GET", "/ping"))
                answer = wire.answer(method)
                self.assertEqual(wire.answer()[2], b"OK")
                self.assertEqual((answer[0], answer[1]["x-a"], answer[1]["access-control-allow-origin"]),
                                 (201, ["b"], ["http://localhost"]))
                self.assertEqual(len(answer[1]["date"]), 1)
                self.assertEqual(answer[2], b"" if method == "HEAD" else b"got " + got)
                environ, took = seen.pop()
                self.assertEqual(took, got)
                expected = {"REQUEST_METHOD": method, "SCRIPT_NAME": "/admin", "PATH_INFO": "/a b/\xc3\xa9",
                            "QUERY_STRING": "x=%31&y",
                            "CONTENT_TYPE": "text/x", "CONTENT_LENGTH": str(len(got)), "SERVER_NAME": "localhost",
                            "SERVER_PORT": str(server.port),
                            "REMOTE_ADDR": "127.0.0.1", "HTTP_X_TWO": "1, 2", "wsgi.url_scheme": "http",
                            "wsgi.multithread": True, "SERVER_PROTOCOL": "HTTP/1.1"}
                self.assertEqual({name: environ.get(name) for name in expected}, expected)
                self.assertNotIn("HTTP_PROXY", environ)
                self.assertNotIn("PATH", environ)
                wire.close()

    def test_wsgi_server_name(self):
        """What the Host says, a port or none, an address in brackets."""
        seen = queue.Queue()

        def app(environ, start_response):
            seen.put((environ["SERVER_NAME"], environ["SERVER_PORT"], wsgiref.util.application_uri(environ)))
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]
        server = self.wsgi_server(app)
        for host, name, port in (("localhost", "localhost", "80"), ("a.localhost:8", "a.localhost", "8"),
                                 ("a.localhost", "a.localhost", "80"),
                                 ("[::1]:8", "[::1]", "8"), ("[::1]", "[::1]", "80"),
                                 ("127.0.0.1:", "127.0.0.1", "80")):
            with self.subTest(host=host):
                self.assertEqual(self.ask(http_bytes("GET", "/admin", host=host), server=server)[0], 200)
                got = seen.get(timeout=TIMEOUT)
                self.assertEqual((got[0].strip("[]"), got[1]), (name.strip("[]"), port))
                self.assertEqual(got[2], "http://%s/admin" % host)

    def test_wsgi_mounts(self):
        """The longest prefix, at a border of the path; the API comes first."""
        def name(text):
            def app(environ, start_response):
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [("%s %s %s" % (text, environ["SCRIPT_NAME"], environ["PATH_INFO"])).encode()]
            return wsgiref.validate.validator(app)
        server = self.serve(wsgi={"/a": name("a"), "/a/b": name("ab"), "/slash/": name("slash"),
                                  "/processes": name("never")})
        for path, expected in (("/a", b"a /a "), ("/a/", b"a /a /"), ("/a/bc", b"a /a /bc"), ("/a/b", b"ab /a/b "),
                               ("/a/b/c", b"ab /a/b /c"),
                               ("/slash/x", b"slash /slash /x"), ("/processes", b"[]\n")):
            with self.subTest(path=path):
                self.assertEqual(self.ask(http_bytes("GET", path), server=server)[2], expected)
        self.assertCode(self.ask(http_bytes("GET", "/ab"), server=server), 404, "resource_not_found")
        root = self.serve(wsgi={"/": name("root")})
        self.assertEqual(self.ask(http_bytes("GET", "/x/y"), server=root)[2], b"root  /x/y")
        self.assertEqual(self.ask(http_bytes("GET", "/ping"), server=root)[2], b"OK")

    def test_wsgi_streams_and_closes(self):
        """What the application yields goes out as it comes; close() is called, also where the client has gone."""
        go, closed = threading.Event(), queue.Queue()

        class Body:
            """Two parts, the second when the first was seen."""

            def __init__(self):
                self._parts = iter((b"one\r\n\r\n", b"two"))
                self._count = 0

            def __iter__(self):
                return self

            def __next__(self):
                self._count += 1
                if self._count == 2:
                    go.wait(TIMEOUT)
                return next(self._parts)

            def close(self):
                """See PEP 3333."""
                closed.put(True)

        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return Body()
        server = self.wsgi_server(app)
        for version, one, two in (("1.1", b"7\r\none\r\n\r\n\r\n", b"3\r\ntwo\r\n0\r\n\r\n"),
                                  ("1.0", b"one\r\n\r\n", b"two")):
            go.clear()
            wire = self.wire(server)
            wire.send(http_bytes("GET", "/admin", "Connection: close", version=version))
            self.assertEqual(wire.file.readline(), b"HTTP/1.1 200 OK\r\n")
            self.assertEqual(http.client.parse_headers(wire.file).get_content_type(), "text/plain")
            self.assertEqual(wire.file.read(len(one)), one)
            go.set()
            self.assertEqual(wire.rest(), two)
            self.assertTrue(closed.get(timeout=TIMEOUT))
        wire = self.wire(server)
        wire.send(http_bytes("HEAD", "/admin", "Connection: close"))
        self.assertEqual(wire.answer("HEAD")[0], 200)
        self.assertEqual(wire.rest(), b"")
        self.assertTrue(closed.get(timeout=TIMEOUT))

    def test_wsgi_framing(self):
        """The client can tell where a body ends, and that it was cut; HEAD, 204 and 304 have none."""
        def app(environ, start_response):
            status, length, parts = json.loads(urllib.parse.unquote(environ["QUERY_STRING"]))
            start_response(status, [("Content-Length", length)] if length else [])
            for part in parts:
                yield part.encode() if part else 1 / 0
        server = self.serve(wsgi={"/admin": app})
        for method, version, status, length, parts, framing, body, stays in (
                ("GET", "1.1", "200 OK", None, ["ab", "c"], "chunked", b"abc", True),
                ("GET", "1.1", "200 OK", "3", ["ab", "c"], "3", b"abc", True),
                ("GET", "1.1", "200 OK", "3", ["ab", "cd"], "3", b"abc", True),
                ("GET", "1.0", "200 OK", None, ["ab", "c"], None, b"abc", False),
                ("GET", "1.0", "200 OK", "3", ["ab", "c"], "3", b"abc", False),
                ("HEAD", "1.1", "200 OK", None, [], None, b"", True),
                ("HEAD", "1.1", "200 OK", "9", [], "9", b"", True),
                ("GET", "1.1", "204 No Content", "0", [], None, b"", True),
                ("GET", "1.1", "304 Not Modified", None, [], None, b"", True),
                ("GET", "1.1", "304 Not Modified", "9", [], "9", b"", True)):
            with self.subTest(method=method, version=version, status=status, length=length, parts=parts):
                wire = self.wire(server)
                wire.send(http_bytes(method, "/admin?" + urllib.parse.quote(json.dumps([status, length, parts])), version=version))
                answer = wire.answer(method)
                given = answer[1].get("content-length", []) + answer[1].get("transfer-encoding", [])
                self.assertEqual((given, answer[2]), ([framing] if framing else [], body))
                if stays:
                    wire.send(http_bytes("GET", "/ping"))
                    self.assertEqual(wire.answer()[2], b"OK")
                else:
                    self.assertEqual(wire.rest(), b"")
                wire.close()
        for version, length, parts, error in (("1.1", None, ["ab", None], None), ("1.1", "5", ["ab", None], None),
                                              ("1.1", "5", ["ab"], None), ("1.0", None, ["ab", None], ConnectionResetError)):
            with self.subTest(version=version, length=length, parts=parts), self.assertLogs("gaffer", "WARNING"):
                logging.getLogger("gaffer").warning("assertLogs wants one")
                wire = self.wire(server)
                wire.send(http_bytes("GET", "/admin?" + urllib.parse.quote(json.dumps(["200 OK", length, parts])), version=version))
                with self.assertRaises(error) if error else contextlib.nullcontext():
                    data = wire.rest()
                    self.assertIn(b"ab", data)
                    self.assertFalse(data.endswith(b"0\r\n\r\n"))
                wire.close()
        counts = {labels["code"]: count for labels, count in server.http.requests.samples()}
        self.assertEqual((counts[200], counts[204], counts[304]), (sum(counts.values()) - 3, 1, 2))

    def test_wsgi_headers(self):
        """What the application says of Vary and CORS is kept, once."""
        def app(environ, start_response):
            start_response("200 OK", [("Vary", "Cookie"), ("Access-Control-Allow-Origin", "https://a.example")])
            return [b""]
        server = self.serve(wsgi={"/admin": app})
        headers = self.ask(http_bytes("GET", "/admin", "Origin: http://localhost"), server=server)[1]
        self.assertEqual((headers["vary"], headers["access-control-allow-origin"], headers.get("cache-control")),
                         (["Cookie, Origin"], ["https://a.example"], None))

    def test_wsgi_that_fails(self):
        """500, the traceback in the log and not in the answer; a header cannot be split."""
        def app(environ, start_response):
            if environ["PATH_INFO"] == "/before":
                raise RuntimeError("secret")
            headers = [("Content-Type", "text/plain")]
            if environ["PATH_INFO"] == "/split":
                headers.append(("X-A", "a\r\nSet-Cookie: secret"))
            start_response("200 OK", headers)
            if environ["PATH_INFO"] == "/after":
                raise RuntimeError("secret")
            return [b"fine"]
        server = self.serve(wsgi={"/admin": app})
        for path in ("/before", "/after", "/split"):
            with self.subTest(path=path), self.assertLogs("gaffer", "ERROR") as logged:
                answer = self.ask(http_bytes("GET", "/admin" + path), server=server)
                self.assertEqual(answer[0], 500)
                self.assertNotIn(b"secret", answer[2])
                self.assertNotIn(b"Traceback", answer[2])
                self.assertNotIn("set-cookie", answer[1])
                self.assertIn("the application at /admin", self.assertCode(answer, 500, "internal_error"))
                self.assertIn("Traceback", "".join(logged.output))
        self.assertEqual(self.ask(http_bytes("GET", "/admin/fine"), server=server)[2], b"fine")

    def test_added_routes_are_as_safe_as_the_rest(self):
        """Host, origin and token hold for handlers and applications."""
        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"fine"]
        server = self.serve(handlers=[("/hit", lambda request: "fine")], wsgi={"/admin": app}, token="secret")
        bearer = "Authorization: Bearer secret"
        for path in ("/hit", "/admin/x"):
            with self.subTest(path=path):
                self.assertEqual(self.ask(http_bytes("GET", path), server=server)[0], 401)
                self.assertEqual(self.ask(http_bytes("GET", path, bearer), server=server)[2], b"fine")
                self.assertEqual(self.ask(http_bytes("GET", path, bearer, host="evil.example"), server=server)[0], 403)
                self.assertEqual(self.ask(http_bytes("POST", path, bearer, "Origin: http://evil.example"),
                                          server=server)[0], 403)
                self.assertEqual(self.ask(http_bytes("OPTIONS", path), "OPTIONS", server)[0], 204)


# --------------------------------------------------------------------------------------------------------------------
# ring 3: streams, websockets, events
# --------------------------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------------------------------------
# streams, events
#
# From outside, by the contract's sections 4 and 5: one test for about each sentence. Most children are `cat`: what is
# posted to stdin is, byte for byte, what the stream has to show.
# --------------------------------------------------------------------------------------------------------------------
STREAMS_ONCE = {"attempts": 1, "window": 1000, "max_retry": 0}      # as `flapping`: what exits stays down
STREAMS_SMALL = 4096                # receive buffer of a client that is to be slow

# Does what each line of its stdin says; the lines are Python. `out` and `err` write exact bytes.
STREAMS_PUPPET = """
    import os, sys
    def out(data): os.write(1, data)
    def err(data): os.write(2, data)
    for line in sys.stdin: exec(line)
"""

# Waits for one line, then writes numbered lines of 64 bytes as fast as it can.
STREAMS_FIREHOSE = """
    import os, sys
    sys.stdin.readline()
    for first in range(0, {lines}, 1000):
        block = memoryview(b"".join(b"%063d\\n" % i for i in range(first, first + 1000)))
        while block:
            block = block[os.write(1, block):]
"""


def streams_numbered(lines):
    """What STREAMS_FIREHOSE writes."""
    return b"".join(b"%063d\n" % i for i in range(lines))


class StreamsWire:
    """A GET on a raw socket: status, headers, and a file of what follows the head, nothing decoded."""

    def __init__(self, port, target, headers="", version="1.1", receive_buffer=None, method="GET"):
        self.sock = socket.socket()
        self.sock.settimeout(TIMEOUT)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(("127.0.0.1", port))
        self.sock.sendall(("%s %s HTTP/%s\r\nHost: 127.0.0.1:%d\r\n%s\r\n" % (method, target, version, port, headers)).encode())
        self.file = self.sock.makefile("rb")
        self.status = self.headers = None

    def head(self):
        """Read the head. Returns self."""
        self.status = int(self.file.readline().split()[1])
        self.headers = http.client.parse_headers(self.file)
        if self.headers["Content-Type"] == "text/event-stream":
            chunked = self.headers["Transfer-Encoding"] == "chunked"
            self.body = part_lines(iter(lambda: self.chunk() or b"", b"")) if chunked else self.file
            assert next(self.body) == b"\n", "an event stream begins with an empty line"
        return self

    def chunk(self):
        """The next chunk; b"" for the last; None where the connection ended without one. The trailers go to `trailers`."""
        line = self.file.readline()
        if not line:
            return None
        size = int(line, 16)
        if size == 0:
            self.trailers = http.client.parse_headers(self.file)
            return b""
        data = self.file.read(size + 2)
        if len(data) < size + 2:
            return None
        assert data.endswith(b"\r\n"), data[-10:]
        return data[:-2]

    def chunks(self):
        """(all bytes, True if the last chunk came)."""
        parts = []
        while True:
            part = self.chunk()
            if not part:
                return b"".join(parts), part is not None
            parts.append(part)

    def exactly(self, size):
        """So many bytes of a chunked body."""
        data = b""
        while len(data) < size:
            part = self.chunk()
            assert part, "the stream ended behind %r" % data[-100:]
            data += part
        return data

    def block(self):
        """The next event of an event stream, as the bytes of its lines; b"" for a heartbeat; None at the end."""
        lines = []
        for line in self.body:
            if line == b"\n":
                return b"".join(lines)
            lines.append(line)
        assert not lines, "cut within an event: %r" % lines
        return None

    def event(self):
        """The next event as (event, data, id); None at the end."""
        block = self.block()
        if block is None:
            return None
        fields = dict(line.split(b": ", 1) for line in block.splitlines())
        assert set(fields) == {b"id", b"event", b"data"}, block
        return fields[b"event"].decode(), fields[b"data"].decode(), fields[b"id"].decode()

    def close(self):
        """Drop the connection."""
        self.file.close()
        self.sock.close()


class StreamsCase(ServerCase):
    """What the tests of this section share."""

    def wire(self, target, headers="", **options):
        """A StreamsWire whose head was read; closed after the test."""
        wire = StreamsWire(self.server.port, target, headers, **options)
        self.addCleanup(wire.close)
        return wire.head()

    def cat(self, name="cat", **options):
        """The pid of a new `cat`."""
        return self.server.add(name, "cat", **dict({"redirect_input": True, "flapping": STREAMS_ONCE}, **options))[0]

    def puppet(self, name="puppet", **options):
        """The pid of a child that executes the lines of its stdin."""
        return self.server.add(name, python(STREAMS_PUPPET), **dict({"redirect_input": True, "flapping": STREAMS_ONCE}, **options))[0]

    def send(self, pid, data, label="stdin"):
        """Write to a process's stdin."""
        self.assertEqual(self.server.ok("POST", "/streams/%s/%s" % (pid, label), data), {"ok": True})

    def end(self, pid):
        """End of file on stdin."""
        self.assertEqual(self.server.ok("DELETE", "/streams/%s/stdin" % pid), {"ok": True})

    def poll(self, ref, query="", label="stdout", headers=None):
        """(status, offset as a string, body) of a longpoll."""
        status, answer, body = self.server.request("GET", "/streams/%s/%s?%s" % (ref, label, query), headers=headers)
        return status, answer["Gaffer-Offset"], body

    def upto(self, ref, size, label="stdout"):
        """The first `size` bytes of a stream, by long polls."""
        data = b""
        while len(data) < size:
            status, offset, body = self.poll(ref, "since=%d&timeout=%d" % (len(data), TIMEOUT), label)
            self.assertEqual(status, 200)
            data += body
            self.assertEqual(offset, str(len(data)))
        return data

    def written(self, pid, data):
        """Write through a cat whose stream is empty, and wait until all of it is in its window, and the last byte read."""
        self.send(pid, data)
        until(lambda: int(self.poll(pid, "timeout=0&tail=0")[1]) >= len(data), "the output")
        self.assertEqual(self.poll(pid, "since=%d" % (len(data) - 1)), (200, str(len(data)), data[-1:]))

    @property
    def epoch(self):
        """The epoch of this run."""
        return self.server.manager.epoch

    def sse(self, ref, query="", headers="", label="stdout", **options):
        """A StreamsWire of an event stream."""
        wire = self.wire("/streams/%s/%s?feed=eventsource&%s" % (ref, label, query), headers, **options)
        self.assertEqual((wire.status, wire.headers["Content-Type"]), (200, "text/event-stream"))
        return wire

    def continuous(self, ref, query="", label="stdout", **options):
        """A StreamsWire of a continuous stream."""
        wire = self.wire("/streams/%s/%s?feed=continuous&%s" % (ref, label, query), **options)
        self.assertEqual(wire.status, 200)
        return wire

    def assertEvents(self, wire, expected):
        """The next events of a wire are these: (event, data, offset) or (data, offset)."""
        for item in expected:
            item = ("stdout",) + item if len(item) == 2 else item
            self.assertEqual(wire.event(), item[:2] + ("%s@%s" % (item[2], self.epoch),))


class StreamsPosition(StreamsCase):
    """since, tail, timeout, heartbeat, loss: what they mean, and all their bad values."""

    def test_bad_values(self):
        pid = self.cat()
        self.written(pid, b"one\n")
        bad = ["since=-1", "since=x", "since=1.0", "since=1@", "since=@x", "since=%201", "since=1@a@b", "since=0x1", "since=5",
               "since=" + "9" * 40, "since=5@" + self.epoch, "since=0&tail=1", "tail=-1", "tail=x", "tail=1.5", "tail=",
               "tail=ALL", "tail=%2B1", "tail=" + "9" * 40]
        for feed in ("longpoll", "continuous", "eventsource"):
            table = bad + ["feed=%s" % word for word in ("x", "LONGPOLL", "")]
            table += ["timeout=" + word for word in ("x", "-1", "nan", "inf", "1e400", "true", "")] if feed == "longpoll" else [
                "heartbeat=" + word for word in ("x", "-1", "0", "0.01", "nan", "inf", "1e9", "", "99999999")]
            table += ["loss=" + word for word in ("x", "")]
            for query in table:
                with self.subTest(feed=feed, query=query):
                    path = "/streams/%d/stdout?%s" % (pid, query if "feed" in query else "feed=%s&%s" % (feed, query))
                    answer = self.server.json("GET", path + ("" if "timeout" in query else "&timeout=0"))
                    self.assertError(answer, 400, "bad_value")

    def test_bad_values_of_a_websocket_are_told_before_the_upgrade(self):
        pid = self.cat()
        for query in ("since=x", "since=5", "since=0&tail=0", "tail=x", "type=x", "frame=x", "readonly=x", "loss=x", "heartbeat=0"):
            with self.subTest(query=query):
                self.assertEqual(self.websocket("/wstreams/%d?%s" % (pid, query)).status, 400)
        self.assertEqual(self.websocket("/wstreams/%d?label=x" % pid).status, 404)

    def test_since_is_a_byte_of_the_stream(self):
        pid = self.cat()
        self.written(pid, b"0123456789")
        for since in ("0", "4", "9", "4@" + self.epoch):
            with self.subTest(since=since):
                first = int(since.split("@")[0])
                self.assertEqual(self.poll(pid, "since=" + since), (200, "10", b"0123456789"[first:]))
                wire = self.continuous(pid, "since=" + since)
                self.assertEqual(wire.headers["Gaffer-Offset"], str(first))
                self.assertEqual(wire.exactly(10 - first), b"0123456789"[first:])
        self.assertEqual(self.poll(pid, "since=10&timeout=0"), (204, "10", b""))

    def test_tail(self):
        pid = self.cat()
        data = b"one\ntwo\r\nthree\n\nfi"
        self.written(pid, data)
        for tail, first in (("0", 18), ("1", 16), ("2", 15), ("3", 9), ("4", 4), ("5", 0), ("6", 0), ("999", 0), ("all", 0)):
            with self.subTest(tail=tail):
                self.assertEqual(self.poll(pid, "timeout=0&tail=" + tail)[2], data[first:])
                self.assertEqual(self.continuous(pid, "tail=" + tail).headers["Gaffer-Offset"], str(first))
                self.assertEqual(self.sse(pid, "tail=" + tail).headers["Gaffer-Offset"], str(first))

    def test_an_id_of_another_run_is_answered_from_the_start(self):
        pid = self.cat()
        self.written(pid, b"one\ntwo\n")
        self.assertEqual(self.poll(pid, "since=4@other"), (200, "8", b"one\ntwo\n"))
        self.assertEqual(self.poll(pid, "since=4000@other"), (200, "8", b"one\ntwo\n"))
        wire = self.continuous(pid, "since=4@other")
        self.assertEqual((wire.headers["Gaffer-Offset"], wire.exactly(8)), ("0", b"one\ntwo\n"))
        for place in ("since=4@other", "Last-Event-ID: 4@other\r\n", "Last-Event-ID: 8x@other\r\n", "Last-Event-ID: rubbish\r\n",
                      "Last-Event-ID: 99@%s\r\n" % self.epoch, "Last-Event-ID: -1\r\n"):
            with self.subTest(place=place):
                wire = self.sse(pid, place) if place[0] == "s" else self.sse(pid, "", place)
                kind, data, where = wire.event()
                self.assertEqual((kind, json.loads(data)["restarted"], where), ("dropped", True, "0@" + self.epoch))
                self.assertEvents(wire, [("one", 4), ("two", 8)])

    def test_an_empty_last_event_id_is_none(self):
        pid = self.cat()
        self.written(pid, b"one\n")
        wire = self.sse(pid, "", "Last-Event-ID: \r\n")
        self.assertEqual(wire.headers["Gaffer-Offset"], "4")
        self.send(pid, b"two\n")
        self.assertEvents(wire, [("two", 8)])

    def test_last_event_id_wins_over_the_query(self):
        """An EventSource repeats its URL when it reconnects."""
        pid = self.cat()
        self.written(pid, b"one\ntwo\n")
        for query in ("since=0", "tail=all", "tail=1", "since=0@other"):
            with self.subTest(query=query):
                self.assertEvents(self.sse(pid, query, "Last-Event-ID: 4@%s\r\n" % self.epoch), [("two", 8)])

    def test_where_the_window_has_moved_on(self):
        """Gaffer-Dropped, Gaffer-Offset, and the dropped event."""
        window = gaffer.WINDOW_SIZE
        big = self.server.add("big", python(STREAMS_FIREHOSE.format(lines=20000)), redirect_input=True, flapping=STREAMS_ONCE)[0]
        self.send(big, b"\n")
        self.server.wait_event("proc/big/exit")
        total = 20000 * 64
        until(lambda: self.poll(big, "timeout=0")[1] == str(total))
        everything = streams_numbered(20000)
        status, headers, body = self.server.request("GET", "/streams/%d/stdout?since=0" % big)
        self.assertEqual((status, headers["Gaffer-Offset"], headers["Gaffer-Dropped"]), (200, str(total), str(total - window)))
        self.assertTrue(body == everything[-window:])
        wire = self.continuous(big, "since=64")
        self.assertEqual((wire.headers["Gaffer-Offset"], wire.headers["Gaffer-Dropped"]), (str(total - window), str(total - window - 64)))
        self.assertTrue(wire.chunks() == (everything[-window:], True))
        wire = self.sse(big, "", "Last-Event-ID: 100@%s\r\n" % self.epoch)
        dropped = total - window - 100
        self.assertEqual(wire.event(), ("dropped", '{"bytes": %d}' % dropped, "%d@%s" % (total - window, self.epoch)))
        number = (total - window) // 64
        self.assertEvents(wire, [("%063d" % number, (number + 1) * 64)])

    def test_no_since_and_no_tail_is_from_now_on(self):
        pid = self.cat()
        self.written(pid, b"old\n")
        self.assertEqual(self.poll(pid, "timeout=0"), (200, "4", b"old\n"), "the answer to the POST")
        self.assertEqual(self.poll(pid, "timeout=0"), (204, "4", b""))
        follower, events = self.continuous(pid), self.sse(pid)
        self.assertEqual((follower.headers["Gaffer-Offset"], events.headers["Gaffer-Offset"]), ("4", "4"))
        wire = StreamsWire(self.server.port, "/streams/%d/stdout" % pid)
        self.addCleanup(wire.close)
        with selectors.DefaultSelector() as selector:
            selector.register(wire.sock, selectors.EVENT_READ)
            while not selector.select(0.02):                # when it waits cannot be seen: write until it answers
                self.send(pid, b"new\n")
        wire.head()
        self.assertEqual(set(wire.file.read(int(wire.headers["Content-Length"])).split()), {b"new"})
        self.assertEqual(follower.exactly(4)[:4], b"new\n")          # maybe several at once
        self.assertEvents(events, [("new", 8)])

    def test_unknown_streams(self):
        pid = self.cat()
        nothing = self.server.add("nothing", "sleep 1000", redirect_output=[])[0]
        for path, status, code in (
                ("/streams/%d/stdx" % pid, 404, "io_not_found"), ("/streams/99/stdout", 404, "not_found"), ("/streams/x/stdout", 404, "not_found"),
                ("/streams/%s/stdout" % ("9" * 50), 404, "not_found"), ("/streams/%d/stdout" % nothing, 400, "io_not_redirected"),
                ("/streams/nothing/stdout", 400, "io_not_redirected"), ("/streams/cat/stdx", 404, "io_not_found")):
            for feed in ("longpoll", "continuous", "eventsource"):
                with self.subTest(path=path, feed=feed):
                    self.assertError(self.server.json("GET", "%s?feed=%s&timeout=0" % (path, feed)), status, code)

    def test_head_answers_at_once_with_the_head_of_get(self):
        pid = self.cat()
        self.written(pid, b"one\n")
        for query, kind, offset in (("", "application/octet-stream", "4"), ("since=0", "application/octet-stream", "4"),
                                    ("feed=continuous&since=0", "application/octet-stream", "0"),
                                    ("feed=eventsource&tail=1&heartbeat=1", "text/event-stream", "0"), ("feed=eventsource", "text/event-stream", "4")):
            with self.subTest(query=query):
                status, headers, body = self.server.request("HEAD", "/streams/%d/stdout?%s" % (pid, query))
                self.assertEqual((status, headers["Content-Type"], headers["Gaffer-Offset"], body), (200, kind, offset, b""))


class StreamsLongpoll(StreamsCase):
    def test_waits_for_output_and_answers_all_there_is(self):
        pid = self.cat()
        wire = StreamsWire(self.server.port, "/streams/%d/stdout?since=0" % pid)
        self.addCleanup(wire.close)
        data = bytes(range(256)) * 4
        self.send(pid, data)
        wire.head()
        self.assertEqual((wire.status, wire.headers["Content-Type"]), (200, "application/octet-stream"))
        body = wire.file.read(int(wire.headers["Content-Length"]))
        self.assertTrue(body and data.startswith(body))
        self.assertEqual(int(wire.headers["Gaffer-Offset"]), len(body))
        self.assertEqual(self.upto(pid, len(data)), data)

    def test_timeout_answers_204(self):
        pid = self.cat()
        for text in ("0", "0.05", ".05", "0.0"):
            self.assertEqual(self.poll(pid, "timeout=" + text), (204, "0", b""))

    def test_question_and_answer(self):
        """A long poll without a position gets the answer to a POST, once each, and nothing twice."""
        self.server.add("web", "cat", redirect_input=True)
        poll = functools.partial(self.poll, 1)
        self.send(1, b"one\n")
        self.assertEqual(poll(), (200, "4", b"one\n"))
        self.assertEqual(poll("timeout=0"), (204, "4", b""))
        self.send(1, b"two\n")
        self.assertEqual(poll("since=4"), (200, "8", b"two\n"))
        self.send(1, b"three\n")
        self.assertEqual(self.poll(1, "since=8"), (200, "14", b"three\n"))
        self.assertEqual(poll(), (200, "14", b"two\nthree\n"))
        self.assertEqual(poll("timeout=0"), (204, "14", b""), "both questions have their answer")
        self.send(1, b"four\n")
        self.assertEqual(self.server.request("HEAD", "/streams/1/stdout")[0], 200)
        self.assertTrue(self.server.request("GET", "/streams/web/stdout")[2].startswith(b"one\ntwo\nthree\n"),
                        "by name, from the first POST on")
        self.assertEqual(poll(), (200, "19", b"four\n"))
        for number in range(3 * gaffer.QUESTIONS_MAX):
            self.send(1, b"x\n")
            self.assertEqual(poll("since=%d" % (19 + 2 * number))[2], b"x\n")
        self.assertEqual(poll()[2], b"x\n" * gaffer.QUESTIONS_MAX)

    def test_has_no_heartbeat(self):
        pid = self.cat()
        self.assertEqual(self.poll(pid, "heartbeat=0.1&timeout=0.35"), (204, "0", b""))

    def test_an_ended_stream_gives_the_rest_and_then_204(self):
        pid = self.cat()
        self.send(pid, b"last words")
        self.end(pid)
        self.server.wait_event("exit")
        self.assertEqual(self.poll(pid, "since=5"), (200, "10", b"words"))
        self.assertEqual(self.poll(pid, "since=10"), (204, "10", b""))
        self.assertEqual(self.poll(pid), (200, "10", b"last words"))    # the answer to the POST
        self.assertEqual(self.poll(pid), (204, "10", b""))
        self.assertEqual(self.poll(pid, "tail=1"), (200, "10", b"last words"))
        ended = [self.server.request("GET", "/streams/%d/stdout?timeout=0" % which)[1]["Gaffer-Ended"] for which in (pid, self.cat("other"))]
        self.assertEqual(ended, ["true", None], "or who polls could not tell the end from a timeout")

    def test_the_end_of_a_stream_answers_who_waits(self):
        pid = self.cat()
        wire = StreamsWire(self.server.port, "/streams/%d/stdout" % pid)
        self.addCleanup(wire.close)
        self.end(pid)
        self.assertEqual(wire.head().status, 204)

    def test_a_connection_goes_on_after_a_longpoll(self):
        """Also with requests that arrive while it waits."""
        pid = self.cat()
        wire = StreamsWire(self.server.port, "/streams/%d/stdout?since=0" % pid)
        self.addCleanup(wire.close)
        wire.sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\nGET /streams/%d/stdout?since=1 HTTP/1.1\r\nHost: localhost\r\n\r\n" % pid)
        self.send(pid, b"a")
        wire.head()
        self.assertEqual(wire.file.read(int(wire.headers["Content-Length"])), b"a")
        wire.head()
        self.assertEqual(wire.file.read(int(wire.headers["Content-Length"])), b"OK")
        self.send(pid, b"b")
        wire.head()
        self.assertEqual(wire.file.read(int(wire.headers["Content-Length"])), b"b")

    def test_several_who_wait_all_get_it(self):
        pid = self.cat()
        wires = [StreamsWire(self.server.port, "/streams/%d/stdout?since=0" % pid) for _ in range(10)]
        for wire in wires:
            self.addCleanup(wire.close)
        self.send(pid, b"x")
        for wire in wires:
            wire.head()
            self.assertEqual(wire.file.read(int(wire.headers["Content-Length"])), b"x")


class StreamsContinuous(StreamsCase):
    def test_exact_bytes_in_chunks_until_the_stream_ends(self):
        pid = self.cat()
        wire = self.continuous(pid)
        self.assertEqual((wire.headers["Transfer-Encoding"], wire.headers["Content-Length"]), ("chunked", None))
        data = bytes(range(256)) * 100
        self.send(pid, data)
        self.assertEqual(wire.exactly(len(data)), data)
        self.send(pid, b"\0end")
        self.end(pid)
        self.assertEqual(wire.chunks(), (b"\0end", True))
        self.assertEqual(wire.file.read(), b"")

    def test_http_1_0_gets_it_plain_until_close(self):
        pid = self.cat()
        wire = self.continuous(pid, "heartbeat=0.1&since=0", version="1.0")
        self.assertEqual((wire.headers["Transfer-Encoding"], wire.headers["Content-Length"]), (None, None))
        self.assertEqual(wire.file.read(2), b"\n\n")
        self.send(pid, b"plain")
        self.end(pid)
        self.assertEqual(wire.file.read().strip(b"\n"), b"plain")

    def test_heartbeats_stand_outside_the_offsets(self):
        pid = self.cat()
        wire = self.continuous(pid, "heartbeat=0.1")
        self.assertEqual([wire.chunk(), wire.chunk()], [b"\n", b"\n"])
        self.send(pid, b"x")
        self.assertEqual(b"".join(iter(lambda: wire.chunk().strip(b"\n"), b"x")), b"")
        self.assertEqual(self.poll(pid, "since=0"), (200, "1", b"x"))

    def test_no_heartbeat_while_there_is_output(self):
        """Only seconds that pass without output count."""
        pid = self.puppet()
        wire = self.continuous(pid, "heartbeat=1")
        self.send(pid, b"import select; [(out(b'x'), select.select([], [], [], 0.1)) for i in range(12)]; out(b'.')\n")
        self.assertEqual(wire.exactly(13), b"x" * 12 + b".")

    def test_an_ended_stream_is_given_whole_and_ends(self):
        pid = self.cat()
        self.send(pid, b"one\ntwo\n")
        self.end(pid)
        self.server.wait_event("exit")
        self.assertEqual(self.continuous(pid, "since=0").chunks(), (b"one\ntwo\n", True))
        self.assertEqual(self.continuous(pid, "tail=1").chunks(), (b"two\n", True))
        self.assertEqual(self.continuous(pid).chunks(), (b"", True))

    def test_stderr_apart_or_merged(self):
        said = b"out(b'1o\\n'); err(b'1e\\n'); out(b'2o\\n'); err(b'2e')\n"
        apart = self.puppet("apart", redirect_output=["stdout", "stderr"])
        merged = self.puppet("merged", redirect_output=["all", "all"])
        only = self.puppet("only", redirect_output=["o"])
        for pid in (apart, merged, only):
            self.send(pid, said)
            self.end(pid)
        self.assertEqual(self.continuous(apart, "since=0").chunks(), (b"1o\n2o\n", True))
        self.assertEqual(self.continuous(apart, "since=0", "stderr").chunks(), (b"1e\n2e", True))
        self.assertEqual(self.continuous(merged, "since=0", "all").chunks(), (b"1o\n1e\n2o\n2e", True))
        self.assertEqual(self.continuous(only, "since=0", "o").chunks(), (b"1o\n2o\n", True))
        self.assertError(self.server.json("GET", "/streams/%d/stdout" % merged), 404, "io_not_found")


class StreamsEventsource(StreamsCase):
    def test_the_bytes_of_an_event(self):
        pid = self.cat(redirect_output=["my.out"])
        wire = self.sse(pid, label="my.out")
        self.send(pid, b"hello world\n")
        self.assertEqual(wire.block(), b"id: 12@%s\nevent: my.out\ndata: hello world\n" % self.epoch.encode())

    LINES = (
        (b"a\nb\r\nc\rd\n", [("a", 2), ("b", 5), ("c", 7), ("d", 9)]),
        (b"\n\r\n\r\rx\n", [("", 1), ("", 3), ("", 4), ("", 5), ("x", 7)]),
        (b"a\n\rb\n", [("a", 2), ("", 3), ("b", 5)]),
        ("gr\u00fc\u00df \u20ac \U0001f600\n".encode(), [("gr\u00fc\u00df \u20ac \U0001f600", 16)]),
        (b"a\xffb\n\xc3\n\xe2\x82\n\xf0\x9f\x98\nx\xc0\x80y\n", [("a\ufffdb", 4), ("\ufffd", 6), ("\ufffd", 9), ("\ufffd", 13), ("x\ufffd\ufffdy", 18)]),
        (b"\x00\x01 : x\n  two\n", [("\x00\x01 : x", 7), ("  two", 13)]),
        (b"a\x0bb\x0cc\x1cd\xc2\x85e\xe2\x80\xa8f\n", [("a\x0bb\x0cc\x1cd\u0085e\u2028f", 15)]),    # no ends of lines
        (b"id: 5\ndata: x\n", [("id: 5", 6), ("data: x", 14)]),
        (b"no end", [("no end", 6)]),
        (b"cr\r", [("cr", 3)]),
    )

    def test_lines_live_and_again(self):
        for number, (data, expected) in enumerate(self.LINES):
            with self.subTest(data=data):
                pid = self.cat("cat%d" % number)
                live = self.sse(pid)
                self.send(pid, data)
                self.end(pid)
                self.assertEvents(live, expected)
                self.assertEqual(live.event()[0], "exit")
                again = self.sse(pid, "since=0")
                self.assertEvents(again, expected)
                self.assertEqual(again.event()[0], "exit")

    def test_each_resume_gives_the_rest(self):
        """From each id there is: no gap, no repeat."""
        pid = self.cat()
        data = b"".join(item[0] for item in self.LINES[:5])
        self.send(pid, data)
        self.end(pid)
        wire, events = self.sse(pid, "since=0"), []
        while not events or events[-1][0] != "exit":
            events.append(wire.event())
        self.assertEqual(len(events), 19)
        for index, event in enumerate(events[:-1], 1):
            wire = self.sse(pid, "", "Last-Event-ID: %s\r\n" % event[2])
            self.assertEqual([wire.event() for _ in events[index:]], events[index:])
            self.assertIsNone(wire.event())

    def test_a_newline_that_comes_late_makes_no_event(self):
        pid = self.cat()
        wire = self.sse(pid)
        self.send(pid, b"x\r")
        self.assertEvents(wire, [("x", 2)])
        late = self.sse(pid)
        self.send(pid, b"\n")
        self.upto(pid, 3)
        self.send(pid, b"y\r\n\n")
        for each in (wire, late):
            self.assertEvents(each, [("y", 6), ("", 7)])
        self.assertEvents(self.sse(pid, "", "Last-Event-ID: 2@%s\r\n" % self.epoch), [("y", 6), ("", 7)])

    def test_an_unfinished_line_is_shown_after_a_while(self):
        pid = self.cat()
        wire = self.sse(pid)
        began = time.monotonic()
        self.send(pid, b"login: ")
        self.assertEvents(wire, [("login: ", 7)])
        self.assertGreater(time.monotonic() - began, 0.09)
        self.send(pid, b"me\n")
        self.assertEvents(wire, [("me", 10)])
        self.send(pid, b"a\nb")
        self.assertEvents(wire, [("a", 12), ("b", 13)])
        self.send(pid, b"\n")                   # the end of a line that was shown as far as it had come
        self.assertEvents(wire, [("", 14)])
        self.assertEvents(self.sse(pid, "", "Last-Event-ID: 7@%s\r\n" % self.epoch), [("me", 10), ("a", 12), ("b", 14)])

    def test_an_unfinished_line_is_shown_to_who_joins_late(self):
        pid = self.cat()
        first = self.sse(pid)
        self.send(pid, b"$ ")
        self.assertEvents(first, [("$ ", 2)])
        self.assertEvents(self.sse(pid, "since=0"), [("$ ", 2)])
        self.assertEvents(self.sse(pid, "tail=1"), [("$ ", 2)])

    def test_an_unfinished_line_is_not_cut_inside_a_character(self):
        pid = self.cat()
        wire = self.sse(pid)
        self.send(pid, b"ab\xe2\x82")
        self.assertEvents(wire, [("ab", 2)])
        self.send(pid, b"\xac!\n")
        self.assertEvents(wire, [("\u20ac!", 7)])

    def test_a_character_that_is_completed_late_is_shown_too(self):
        """The rest of a character after the silence: the line goes on to be unfinished, and is to be shown again."""
        pid = self.cat()
        wire = self.sse(pid)
        self.send(pid, b"ab\xe2\x82")
        self.assertEvents(wire, [("ab", 2)])
        self.send(pid, b"\xac")
        self.assertEvents(wire, [("\u20ac", 5)])

    def test_half_a_character_at_the_end_is_replaced(self):
        pid = self.cat()
        wire = self.sse(pid)
        self.send(pid, b"ab\xe2\x82")
        self.end(pid)
        self.assertEqual("".join(event[1] for event in iter(wire.event, None) if event[0] == "stdout"), "ab\ufffd")

    def test_a_long_line_comes_in_pieces(self):
        pid = self.cat()
        wire = self.sse(pid)
        line = "".join("%d\u20ac" % number for number in range(100000)).encode()
        self.assertGreater(len(line), gaffer.WINDOW_SIZE // 2)
        for first in range(0, len(line), 100000):
            self.send(pid, line[first:first + 100000])
            self.upto(pid, min(first + 100000, len(line)))
        self.send(pid, b"\nend\n")
        pieces = []
        while not pieces or pieces[-1][1] != "end":
            pieces.append(wire.event())
            self.assertEqual(pieces[-1][0], "stdout")
        self.assertTrue("".join(piece[1] for piece in pieces[:-1]).encode() == line)
        self.assertGreater(len(pieces), 2)
        self.assertEqual(pieces[-1][2], "%d@%s" % (len(line) + 5, self.epoch))
        ids = [int(piece[2].split("@")[0]) for piece in pieces]
        for (_, text, _), first, last in zip(pieces, [0] + ids, ids):
            self.assertLessEqual(len(text.encode()), last - first)

    def test_exit_is_an_event_and_its_id_gets_204(self):
        pid = self.cat()
        wire = self.sse(pid)
        self.send(pid, b"bye\n")
        self.end(pid)
        self.assertEvents(wire, [("bye", 4)])
        kind, data, where = wire.event()
        self.assertEqual((kind, json.loads(data), where),
                         ("exit", {"pid": pid, "exit_status": 0, "term_signal": 0}, "4x@" + self.epoch))
        self.assertIsNone(wire.event())
        status, _, body = self.server.request("GET", "/streams/%d/stdout?feed=eventsource" % pid, headers={"Last-Event-ID": where})
        self.assertEqual((status, body), (204, b""))
        for other in ("4@" + self.epoch, "4"):
            with self.subTest(id=other):
                wire = self.sse(pid, "", "Last-Event-ID: %s\r\n" % other)
                self.assertEqual(wire.event(), (kind, data, where))
        kinds = [event[0] for event in iter(self.sse(pid, "", "Last-Event-ID: 4x@other\r\n").event, None)]
        self.assertEqual(kinds, ["dropped", "stdout", "exit"])

    def test_only_the_id_of_the_exit_gets_204(self):
        pid = self.cat()
        self.send(pid, b"bye\n")
        self.end(pid)
        self.server.wait_event("exit")
        wire = self.wire("/streams/%d/stdout?feed=eventsource" % pid, "Last-Event-ID: 2x@%s\r\n" % self.epoch)
        self.assertEqual(wire.status, 200)
        self.assertEqual(wire.event()[0], "dropped")

    def test_exit_tells_status_and_signal(self):
        for number, (code, expected) in enumerate((("import os; os._exit(7)", (7, 0)), ("import os; os.kill(os.getpid(), 9)", (0, 9)))):
            pid = self.puppet("p%d" % number)
            wire = self.sse(pid, label="stderr")
            self.send(pid, code.encode() + b"\n")
            kind, data, _ = wire.event()
            self.assertEqual((kind, json.loads(data)["exit_status"], json.loads(data)["term_signal"]), ("exit",) + expected)

    def test_a_stream_ends_at_the_end_of_its_pipe_but_exit_is_told_at_the_exit(self):
        pid = self.puppet()
        longpoll, events = self.continuous(pid, "since=0"), self.sse(pid, "heartbeat=0.1")
        self.send(pid, b"out(b'closing'); os.close(1)\n")
        self.assertEqual(longpoll.chunks(), (b"closing", True))
        self.assertEqual(self.poll(pid, "since=7"), (204, "7", b""))
        self.assertEvents(events, [("closing", 7)])
        self.assertEqual(events.block(), b"")                # a heartbeat: it waits for the exit
        self.end(pid)
        block = next(filter(None, iter(events.block, None)))
        self.assertTrue(block.startswith(b"id: 7x@%s\nevent: exit\n" % self.epoch.encode()), block)

    def test_heartbeats_are_empty_lines(self):
        pid = self.cat()
        wire = self.sse(pid, "heartbeat=0.1")
        self.assertEqual([next(wire.body), next(wire.body)], [b"\n", b"\n"])
        self.send(pid, b"x\n")
        self.assertEqual(next(filter(None, iter(wire.block, None))), b"id: 2@%s\nevent: stdout\ndata: x\n" % self.epoch.encode())

    def test_heartbeat_true_is_accepted_and_false_is_none(self):
        pid = self.cat()
        for value in ("true", "false", "60"):
            self.sse(pid, "heartbeat=" + value)
            self.continuous(pid, "heartbeat=" + value)

    def test_a_grandchild_holds_the_pipe(self):
        """The stream ends 2 s after the exit, not with the grandchild, and exit is told then."""
        folder = tempfile.mkdtemp()
        fifo = os.path.join(folder, "fifo")
        os.mkfifo(fifo)
        self.addCleanup(os.rmdir, folder)
        self.addCleanup(os.unlink, fifo)
        pid = self.puppet()
        wire = self.sse(pid)
        self.send(pid, ("import subprocess; subprocess.Popen(['sh', '-c', 'read x <%s'], start_new_session=True)\n" % fifo).encode())
        self.send(pid, b"out(b'last\\n')\n")
        self.assertEvents(wire, [("last", 5)])
        try:
            self.end(pid)
            began = time.monotonic()
            self.assertEqual(self.poll(pid, "since=5"), (204, "5", b""))
            self.assertEqual(wire.event()[0], "exit")
            self.assertGreater(time.monotonic() - began, 1.5)
        finally:
            with open(fifo, "w") as file:
                file.write("\n")


class StreamsSmallWindow(StreamsCase):
    """A window of 256 bytes: what falls out is counted and told."""

    options = {"window": 256}

    def test_longpoll(self):
        pid = self.cat()
        data = b"".join(b"%09d\n" % i for i in range(100))
        self.written(pid, data)
        status, headers, body = self.server.request("GET", "/streams/%d/stdout?since=10" % pid)
        self.assertEqual((status, body, headers["Gaffer-Offset"], headers["Gaffer-Dropped"]), (200, data[-256:], "1000", "734"))
        status, headers, body = self.server.request("GET", "/streams/%d/stdout?since=800" % pid)
        self.assertEqual((status, body, headers["Gaffer-Dropped"]), (200, data[800:], None))

    def test_where_a_reader_begins_after_a_loss(self):
        """Gaffer-Offset is the first byte's: with loss=skip, and for events, that of the first whole line."""
        pid = self.server.add("t", python("import os\nos.write(1, b''.join(b'%011d\\n' % i for i in range(100)))\nos.read(0, 1)"),
                              redirect_input=True)[0]
        until(lambda: self.poll(pid, "timeout=0&tail=0")[1] == "1200", "the output")
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        answer = self.server.stream("/streams/%d/stdout?feed=continuous&loss=skip&since=5" % pid)
        self.assertEqual((answer.headers["Gaffer-Offset"], answer.headers["Gaffer-Dropped"]), ("948", None))
        self.assertEqual(answer.read(), b"".join(b"%011d\n" % i for i in range(79, 100)))
        answer.connection.close()
        answer, events = self.server.sse("/streams/%d/stdout?feed=eventsource&since=5" % pid)
        self.assertEqual((answer.headers["Gaffer-Offset"], next(events)["data"]), ("948", '{"bytes": 943}'))
        self.assertEqual(next(events)["data"], "%011d" % 79)
        answer.close()
        answer.connection.close()

    def test_tail_is_of_what_is_in_the_window(self):
        pid = self.cat()
        data = b"".join(b"%09d\n" % i for i in range(100))
        self.written(pid, data)
        self.assertEqual(self.poll(pid, "tail=all")[2], data[-250:])
        self.assertEqual(self.poll(pid, "tail=26")[2], data[-250:])
        self.assertEqual(self.poll(pid, "tail=3")[2], data[-30:])

    def test_eventsource_goes_on_at_the_start_of_a_line(self):
        pid = self.cat()
        data = b"".join(b"%09d\n" % i for i in range(100))
        self.written(pid, data)
        wire = self.sse(pid, "", "Last-Event-ID: 40@%s\r\n" % self.epoch)
        self.assertEqual(wire.event(), ("dropped", '{"bytes": 710}', "750@" + self.epoch))
        self.assertEvents(wire, [("%09d" % i, i * 10 + 10) for i in range(75, 100)])

    def test_a_line_that_is_longer_than_the_window(self):
        pid = self.cat()
        wire = self.sse(pid)
        self.send(pid, b"x" * 1000 + b"\nend\n")
        text, dropped = "", 0
        while not text.endswith("end"):
            kind, data, _ = wire.event()
            dropped += json.loads(data)["bytes"] if kind == "dropped" else 0
            text += data if kind != "dropped" else ""
        self.assertEqual(text, "x" * 1000 + "end")
        self.assertEqual(dropped, 0)

    def test_block_joins_at_the_start_of_the_window_and_loses_nothing(self):
        """The child writes on between a request's answer and its first byte: a reader with loss=block holds it."""
        pid = self.server.add("hose", python(STREAMS_FIREHOSE.format(lines=10 ** 9)), redirect_input=True)[0]
        self.send(pid, b"\n")
        for query in ("tail=all", "since=0", "tail=1"):
            for _ in range(5):
                with self.subTest(query=query):
                    wire = self.continuous(pid, query + "&loss=block")
                    first = int(wire.headers["Gaffer-Offset"])
                    data = wire.exactly(64 * 20)
                    wire.close()
                    first_line = b"%063d\n" % (first // 64)
                    self.assertEqual(data[:64 - first % 64], first_line[first % 64:])

    def test_a_template_of_two_with_long_unfinished_lines_does_not_stop(self):
        """Half a line waits to be merged into the template's stream; that must not hold the process's own stream."""
        code = "import os, sys\nos.write(1, b'x' * 2000)\nsys.stdin.readline()\nos.write(1, b'\\nend\\n')\nsys.stdin.read()"
        pids = self.server.add("two", python(code), numprocesses=2, redirect_input=True)
        for pid in pids:
            until(lambda: self.poll(pid, "timeout=0")[1] == "2000", "the output", timeout=5)
        self.send(pids[0], b"\n")
        until(lambda: self.poll(pids[0], "timeout=0")[1] == "2005", "the output", timeout=5)


class StreamsAfterlife(StreamsCase):
    def test_the_last_sixteen_exits_of_a_template_can_be_read(self):
        self.server.add("t", "echo words of $$; read x", shell=True, redirect_input=True)
        os_pids = {}
        for _ in range(20):
            pid, = self.server.ok("GET", "/processes/t/_pids")["pids"]
            os_pids[pid] = self.server.ok("GET", "/processes/%d" % pid)["os_pid"]
            self.upto(pid, len("words of %d\n" % os_pids[pid]))
            self.server.ok("POST", "/processes/t/_restart?wait=true")
        for pid in range(5, 21):
            self.assertEqual(self.poll(pid, "since=0")[::2], (200, b"words of %d\n" % os_pids[pid]))
            self.assertEqual(self.sse(pid, "since=0").event()[1], "words of %d" % os_pids[pid])
        websocket = self.websocket("/wstreams/20?readonly=true&tail=all")
        self.assertEqual(websocket.read(), (1, b"words of %d\n" % os_pids[20]))
        self.assertEqual(websocket.read(), (8, b"\x03\xe8signal 15"))
        self.assertEqual(self.websocket("/wstreams/20?tail=all").read(), (1, b"words of %d\n" % os_pids[20]))
        self.assertError(self.server.json("POST", "/streams/20/stdin", b"x"), 403, "forbidden_write")
        self.server.ok("DELETE", "/processes/t")
        for pid in (5, 20):
            self.assertError(self.server.json("GET", "/streams/%d/stdout?since=0" % pid), 404, "not_found")

    def test_readers_of_a_deleted_template_get_the_last_words(self):
        pid = self.server.add("t", python("""
            import os, signal
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            os.write(1, b"ready\\n")
            signal.sigwait([signal.SIGTERM])
            os.write(1, b"last words")
            os._exit(3)
        """))[0]
        self.upto(pid, 6)
        events, websocket = self.sse(pid), self.websocket("/wstreams/%d?readonly=1" % pid)
        self.assertEqual(websocket.status, 101)
        self.server.ok("DELETE", "/processes/t")
        self.assertEvents(events, [("last words", 16)])
        self.assertEqual(json.loads(events.event()[1]), {"pid": pid, "exit_status": 3, "term_signal": 0})
        self.assertEqual([websocket.read(), websocket.read()], [(1, b"last words"), (8, b"\x03\xe8exit 3")])


class StreamsTemplate(StreamsCase):
    """The stream of a template, by its name."""

    def test_goes_on_across_restarts_and_ends_when_deleted(self):
        self.server.add("t", python("import os\nos.write(1, b'hello\\n')\nos.read(0, 1)\nos.write(1, b'bye')"), redirect_input=True)
        wire, events = self.continuous("t", "since=0"), self.sse("t", "since=0")
        self.assertEqual(wire.exactly(6), b"hello\n")
        self.assertEvents(events, [("hello", 6)])
        pid, = self.server.ok("GET", "/processes/t/_pids")["pids"]
        self.send(pid, b"x")                    # it exits by itself, in the middle of a line, and is started again
        self.assertEqual(wire.exactly(10), b"bye\nhello\n")
        self.assertEqual(events.event()[:2], ("stdout", "bye"))     # its end may come after 100 ms of silence
        self.assertEvents(events, [("hello", 16)])
        self.server.ok("POST", "/processes/t/_restart?wait=true")
        self.assertEqual(wire.exactly(6), b"hello\n")
        self.assertEvents(events, [("hello", 22)])
        self.assertEvents(self.sse("t", "", "Last-Event-ID: 10@%s\r\n" % self.epoch), [("hello", 16), ("hello", 22)])
        self.server.ok("POST", "/processes/t/_stop?wait=true")
        self.assertEqual(self.poll("t", "since=22&timeout=0"), (204, "22", b""))
        self.server.ok("DELETE", "/processes/t")
        self.assertEqual(wire.chunks(), (b"", True))
        self.assertIsNone(events.event())       # and no exit in it at any time
        self.assertError(self.server.json("GET", "/streams/t/stdout"), 404, "not_found")

    def test_is_there_before_the_first_process(self):
        self.server.ok("POST", "/processes", dict(python("print('up', flush=True); input()"), name="t", start=False, redirect_input=True))
        wire = self.continuous("t")
        self.server.ok("POST", "/processes/t/_start")
        self.assertEqual(wire.exactly(3), b"up\n")

    def test_lines_of_processes_are_never_mixed(self):
        """Each process writes its lines in halves; more are started and some stopped meanwhile."""
        code = """
            import os
            name = b"%d" % os.getpid()
            for number in range(400):
                os.write(1, b"<" + name + b" ")
                os.write(1, b"%d" % number)
                os.write(1, b" " + name + b">\\n")
            while os.read(0, 100): pass
        """
        self.server.add("t", python(code), numprocesses=2, redirect_input=True)
        wire = self.continuous("t", "since=0")
        self.server.ok("POST", "/processes/t/_add/2")
        data, seen = b"", {}
        while len([number for number in seen.values() if number == 399]) < 4:
            data += wire.chunk()
            whole, _, data = data.rpartition(b"\n")
            for line in whole.splitlines():
                match = re.fullmatch(rb"<(\d+) (\d+) (\d+)>", line)
                self.assertTrue(match and match.group(1) == match.group(3), line)
                self.assertEqual(int(match.group(2)), seen.get(match.group(1), -1) + 1)
                seen[match.group(1)] = int(match.group(2))
        self.server.ok("POST", "/processes/t/_sub/3")
        self.server.ok("POST", "/processes/t/_add")             # a process that is being stopped keeps its slot
        pid = until(lambda: self.server.ok("GET", "/processes/t/_pids")["pids"][1:])[0]
        name = b"%d" % self.server.ok("GET", "/processes/%d" % pid)["os_pid"]
        while b"%s 399 %s>\n" % (name, name) not in data:
            data += wire.chunk()

    def test_unfinished_lines_of_two_are_shown_and_not_mixed(self):
        """A prompt is not held back; what another process writes behind it begins a line of its own."""
        pids = self.server.add("t", "cat", numprocesses=2, redirect_input=True)
        wire, events = self.continuous("t", "since=0"), self.sse("t", "since=0")
        self.send(pids[0], b"login: ")
        self.assertEqual(wire.exactly(7), b"login: ")
        self.assertEvents(events, [("login: ", 7)])
        self.send(pids[1], b"a whole line\n")
        self.assertEqual(wire.exactly(14), b"\na whole line\n")
        self.send(pids[0], b"me\n")
        self.assertEqual(wire.exactly(3), b"me\n")
        self.send(pids[0], b"cut")
        self.upto(pids[0], 13)
        self.server.ok("POST", "/processes/t/_sub/1")           # the oldest: its last words stay a line of their own
        self.assertEqual(wire.exactly(3), b"cut")
        self.send(pids[1], b"on\n")
        self.assertEqual(wire.exactly(4), b"\non\n")

    def test_input_and_websockets_go_to_one_process(self):
        """By name where the template has exactly one."""
        pid = self.cat("t")
        self.server.ok("POST", "/streams/t/stdin", b"x")
        self.assertEqual(self.continuous(pid, "since=0").exactly(1), b"x")
        self.assertEqual(self.websocket("/wstreams/t").status, 101)
        self.server.ok("POST", "/processes/t/_add")
        for method in ("POST", "DELETE"):
            self.assertError(self.server.json(method, "/streams/t/stdin", b"x"), 404, "not_found")
        self.assertEqual(self.websocket("/wstreams/t").status, 404)

    def test_an_update_that_drops_a_label_ends_its_stream(self):
        self.cat("t")
        gone, stays = self.continuous("t", label="stderr"), self.continuous("t")
        self.server.ok("PUT", "/processes/t", {"cmd": "cat", "redirect_input": True, "redirect_output": ["stdout"]})
        self.assertEqual(gone.chunks(), (b"", True))
        pid = until(lambda: self.server.ok("GET", "/processes/t/_pids")["pids"])[0]
        self.send(pid, b"x")
        self.assertEqual(stays.exactly(1), b"x")

    def test_the_end_of_a_shrunken_template_of_two_is_read_whole(self):
        """What only the first of two has written unfinished is not lost at its exit."""
        pids = self.server.add("t", "cat", numprocesses=2, redirect_input=True, flapping=STREAMS_ONCE)
        wire = self.continuous("t", "since=0")
        self.send(pids[0], b"last words")
        self.end(pids[0])
        self.assertEqual(wire.exactly(10), b"last words")


class StreamsJournal(ServerCase):
    """What several streams say, as one: GET /streams, /streams/<name>, /streams/<pid>."""

    def read(self, path, headers=None):
        """[(name, pid, label, text)] of what there is now; without times."""
        status, _, data = self.server.request("GET", path + ("&" if "?" in path else "?") + "timeout=0", headers=headers)
        self.assertIn(status, (200, 204), data)
        return [tuple(line.split(" ", 4)[1:]) for line in data.decode("utf-8").splitlines()]

    def lines(self, path, count):
        """The first `count` lines of a stream."""
        answer, events = self.server.sse(path + ("&" if "?" in path else "?") + "feed=eventsource")
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        return [tuple(event["data"].split(" ", 4)[1:]) for event in itertools.islice(events, count)]

    SCRIPT = """
        import sys
        for line in iter(sys.stdin.readline, ""):
            (sys.stderr if line.startswith("e") else sys.stdout).write(line)
            sys.stderr.flush(); sys.stdout.flush()
        sys.exit(4)
        """

    def say(self, pid, *lines):
        """Let a process say lines, one after the other: each is read before the next is given."""
        for line in lines:
            since = self.server.request("GET", "/streams/%d/%s?timeout=0" % (pid, "stderr" if line[0] == "e" else "stdout"))[1]["Gaffer-Offset"]
            self.server.ok("POST", "/streams/%d/stdin" % pid, line.encode() + b"\n")
            self.server.request("GET", "/streams/%d/%s?since=%s" % (pid, "stderr" if line[0] == "e" else "stdout", since))

    def test_streams_of_all_in_the_order_in_which_they_were_read(self):
        one, = self.server.add("one", python(self.SCRIPT), redirect_input=True)
        two, = self.server.add("two", python(self.SCRIPT), redirect_input=True)
        for pid, line in ((one, "a"), (two, "b"), (one, "e1"), (one, "c"), (two, "e2")):
            self.say(pid, line)
        said = [("one", "1", "stdout", "a"), ("two", "2", "stdout", "b"), ("one", "1", "stderr", "e1"), ("one", "1", "stdout", "c"),
                ("two", "2", "stderr", "e2")]
        self.assertEqual(sorted(self.read("/streams?tail=all")), sorted(said))      # what was said before is as exact as 50 ms
        self.say(two, "d")
        self.say(one, "e3", "f")
        said = said[:5] + [("two", "2", "stdout", "d"), ("one", "1", "stderr", "e3"), ("one", "1", "stdout", "f")]
        self.assertEqual(self.read("/streams?tail=3"), said[5:])                    # and now to the line
        self.assertEqual(sorted(self.read("/streams/one?tail=all")), sorted(line for line in said if line[0] == "one"))
        self.assertEqual(sorted(self.read("/streams/2?tail=all")), sorted(line for line in said if line[1] == "2"))

    def test_the_exit_is_a_line_and_the_next_process_follows(self):
        pid, = self.server.add("one", python("input()\nprint('last words', end='')\nraise SystemExit(4)"), redirect_input=True)
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")
        self.server.wait_event("proc/one/spawn", self.server.wait_event("proc/one/exit")["id"])
        self.server.ok("POST", "/streams/%d/stdin" % (pid + 1), b"\n")
        lines = self.lines("/streams/one?tail=all", 3)
        self.assertEqual(lines[:2], [("one", str(pid), "stdout", "last words"), ("one", str(pid), "exit", '{"exit_status": 4, "term_signal": 0}')])
        self.assertEqual(lines[2][:2], ("one", str(pid + 1)))
        self.assertEqual(self.lines("/streams/%d?tail=all" % pid, 9), lines[:2])    # it ends there, before it or after it was asked for
        status, headers, _ = self.server.request("GET", "/streams/%d?feed=eventsource&since=0&tail=" % pid)
        self.assertEqual(status, 400)
        answer, events = self.server.sse("/streams/%d?feed=eventsource&since=0" % pid)
        last = [event["id"] for event in events][-1]
        answer.close()
        answer.connection.close()
        self.assertEqual(self.server.request("GET", "/streams/%d?feed=eventsource" % pid, headers={"Last-Event-ID": last})[0], 204)

    def test_lines_that_are_not_finished(self):
        pid, = self.server.add("ask", python("import sys\nsys.stdout.write('name? \\xe2\\x82')\nsys.stdout.flush()\nsys.stdout.write(input() + '\\r\\nb\\rc\\n')\ninput()"),
                               redirect_input=True)
        answer, events = self.server.sse("/streams/ask?feed=eventsource&tail=all")
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        self.assertEqual(next(events)["data"].split(" ", 3)[2:], ["%d" % pid, "stdout+ name? \xe2\x82"])
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"x\n")
        self.assertEqual([next(events)["data"].split(" ", 3)[3] for _ in range(3)], ["stdout x", "stdout b", "stdout c"])

    def test_resume(self):
        pid, = self.server.add("one", "cat", redirect_input=True)
        answer, events = self.server.sse("/streams/one?feed=eventsource&tail=all")
        self.say(pid, "a")
        first = next(events)
        answer.close()
        answer.connection.close()
        self.say(pid, "b", "c")
        self.assertEqual([line[3] for line in self.read("/streams/one?since=" + first["id"])], ["b", "c"])
        self.assertEqual([line[3] for line in self.lines("/streams/one?since=" + first["id"], 2)], ["b", "c"])
        answer, events = self.server.sse("/streams/one?feed=eventsource", {"Last-Event-ID": "5@0123abcdj1"})
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        self.assertEqual(json.loads(next(events)["data"]), {"bytes": 0, "restarted": True})
        self.assertEqual([next(events)["data"].split(" ", 4)[4] for _ in range(3)], ["a", "b", "c"])
        self.assertError(self.server.json("GET", "/streams/one?loss=block"), 400, "bad_value", "unknown parameter 'loss'")
        self.assertError(self.server.json("GET", "/streams/nobody"), 404, "not_found")
        self.assertError(self.server.json("GET", "/streams/17"), 404, "not_found")
        self.assertError(self.server.json("GET", "/streams?since=1x"), 400, "bad_value")
        lines = self.server.stream("/streams/one?feed=continuous&tail=1")
        self.addCleanup(lines.connection.close)
        self.addCleanup(lines.close)
        self.assertRegex(lines.readline(), rb"^[0-9]+\.[0-9]{3} one 1 stdout c\n$")

    def test_who_said_it_is_known_of_processes_that_share_a_stream(self):
        """And nothing of one is in the journal of another."""
        pids = self.server.add("many", python(self.SCRIPT), numprocesses=3, redirect_input=True)
        for number in range(30):
            self.say(pids[number % 3], "%d says %d" % (pids[number % 3], number))
        for pid in pids:
            lines = self.read("/streams/%d?tail=all" % pid)
            self.assertEqual([line[1:3] for line in lines], [(str(pid), "stdout")] * 10)
            self.assertTrue(all(line[3].startswith("%d says" % pid) for line in lines), lines)

    def test_places_are_good_whatever_is_read_beside(self):
        """A loop of long polls, and an event stream that comes back, after many other journals were read."""
        one, = self.server.add("one", "cat", redirect_input=True)
        for number in range(40):
            self.server.add("t%d" % number, "cat", redirect_input=True)
        _, headers, _ = self.server.request("GET", "/streams?timeout=0")
        place, got, event = headers["Gaffer-Offset"], [], "0"
        for number in range(40):
            self.say(one, "line %d" % number)
            self.assertEqual(self.read("/streams/t%d?tail=all" % number), [])
            path = ("/streams", "/streams/one", "/streams/%d" % one)[number % 3]
            status, headers, data = self.server.request("GET", path + "?timeout=30&since=" + place)
            self.assertEqual((status, headers["Gaffer-Dropped"]), (200, None))
            place = headers["Gaffer-Offset"]
            got += [line.split(b" ", 4)[4].decode() for line in data.splitlines()]
            answer, events = self.server.sse(path + "?feed=eventsource", {"Last-Event-ID": event})
            text, event = next((each["data"].split(" ", 4)[4], each["id"]) for each in events)
            answer.close()
            answer.connection.close()
            self.assertEqual(text, "line %d" % number)
        self.assertEqual(got, ["line %d" % number for number in range(40)])

    def test_what_has_gone_is_told(self):
        """In a header, in an event; not if nobody has asked for it."""
        server = Running(window=1024)
        self.addCleanup(server.stop_all)
        server.add("one", python("for number in range(1000): print('line %03d' % number)\ninput()"), redirect_input=True)
        until(lambda: b"line 999" in server.request("GET", "/streams/1/stdout?tail=1&timeout=0")[2], "the last line")
        status, headers, data = server.request("GET", "/streams?since=0&timeout=0")
        lines = [line.split(b" ")[5] for line in data.splitlines()]
        self.assertEqual(lines, [b"%03d" % number for number in range(1000 - len(lines), 1000)])
        self.assertEqual((int(headers["Gaffer-Dropped"]), headers["Gaffer-Offset"]), (9000 - 9 * len(lines), "9000"))
        for feed in ("longpoll", "continuous"):
            for query, lost in (("since=0", headers["Gaffer-Dropped"]), ("tail=all", None), ("tail=3", None)):
                answer = server.stream("/streams?feed=%s&%s" % (feed, query))
                self.addCleanup(answer.connection.close)
                self.addCleanup(answer.close)
                self.assertEqual(answer.getheader("Gaffer-Dropped"), lost)
                last = lines[-3:] if query == "tail=3" else lines
                self.assertEqual([answer.readline().split()[-1] for _ in last], last)
        answer, events = server.sse("/streams?feed=eventsource&since=0")
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        first = next(events)
        self.assertEqual((first["event"], json.loads(first["data"])), ("dropped", {"bytes": 9000 - 9 * len(lines)}))
        self.assertEqual(next(events)["data"].split()[-1].encode(), lines[0])
        answer, events = server.sse("/streams?feed=eventsource&tail=all")
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        self.assertEqual(next(events)["data"].split()[-1].encode(), lines[0])

    def test_a_journal_that_nobody_reads_any_more_costs_nothing(self):
        self.server.add("one", "cat", redirect_input=True)
        answer = self.server.stream("/streams?feed=continuous")
        self.server.request("GET", "/streams?timeout=0")
        answer.close()
        answer.connection.close()
        until(lambda: not self.server.http.channels, "the end of its reader")
        with unittest.mock.patch("gaffer.Journal.lines", side_effect=AssertionError):
            self.say(1, *map(str, range(10)))
        self.assertEqual(len(self.read("/streams?tail=all")), 10)

    def test_it_ends_with_its_template(self):
        self.server.add("one", "cat", redirect_input=True)
        answer = self.server.stream("/streams/one?feed=continuous")
        self.addCleanup(answer.connection.close)
        self.addCleanup(answer.close)
        self.server.ok("DELETE", "/processes/one")
        self.assertEqual(answer.read(), b"")

    def test_status_of_all_and_brief_statistics(self):
        pid, = self.server.add("one", "sleep 1000")
        self.server.add("two", "sleep 1000", start=False)
        one, two = self.server.ok("GET", "/status")
        self.assertEqual([one["name"], two["name"], one["running"], two["state"]], ["one", "two", 1, "stopped"])
        self.assertNotIn("processes", one)
        one, two = self.server.ok("GET", "/status?usage=true")
        self.assertEqual((one["processes"][0]["pid"], two["processes"]), (pid, []))
        until(lambda: self.server.ok("GET", "/status?usage=true")[0]["processes"][0]["rss"] > 0,
              "its memory: right after exec() it has none")
        one, two = self.server.ok("GET", "/stats?brief=true")
        self.assertEqual([set(entry) for entry in one["stats"]], [{"id", "cpu", "mem", "rss"}])
        self.assertEqual((one["stats"][0]["id"], two["stats"], two["cpu"]), (pid, [], 0))
        self.assertEqual(set(self.server.ok("GET", "/stats/one/%d?brief=true" % pid)), {"cpu", "mem", "rss"})
        status, headers, data = self.server.request("GET", "/status", headers={"Accept-Encoding": "gzip"})
        self.assertEqual((headers["Content-Encoding"], headers["Vary"]), (None, "Accept-Encoding"))     # it is short
        for number in range(20):
            self.server.manager.add_process("t%d" % number, "true", start=False)
        status, headers, data = self.server.request("GET", "/status", headers={"Accept-Encoding": "gzip"})
        self.assertEqual((headers["Content-Encoding"], len(json.loads(zlib.decompress(data, 31)))), ("gzip", 22))
        status, headers, data = self.server.request("GET", "/", headers={"Accept-Encoding": "gzip", "Accept": "text/html"})
        self.assertEqual((headers["Content-Encoding"], headers["Cache-Control"]), ("gzip", "no-store"))
        self.assertIn(b'"name": "t19"', zlib.decompress(data, 31))
        self.assertLess(len(data), 25000, "of a slow line")
        self.assertEqual(self.server.request("HEAD", "/", headers={"Accept": "text/html"})[0], 200)


class PureInput(PureLoopCase):
    """What waits for a process."""

    def test_many_small_pieces_cost_little_more_than_their_bytes(self):
        read, write = os.pipe()
        os.set_blocking(write, False)
        stream, sent = gaffer.Input(self.loop, write, "stdin", os.close, 30000), []
        tracemalloc.start()
        with contextlib.suppress(gaffer.StdinFull):
            for number in itertools.count():
                piece = b"%d\n" % number
                self.do(stream.write, piece)
                sent.append(number)
        size = tracemalloc.get_traced_memory()[0] - sys.getsizeof(sent) - 32 * len(sent)
        tracemalloc.stop()
        self.assertGreater(stream.size, 30000 - 10)
        self.assertLess(size, 2 * 30000)
        self.do(stream.end)
        with os.fdopen(read, "rb") as file:
            for number in sent:
                if number % 1000 == 0:
                    self.advance()
                self.assertEqual(file.readline(), b"%d\n" % number)
            self.advance()
            self.assertEqual(file.read(), b"")


class StreamsStdin(StreamsCase):
    def test_what_is_posted_arrives_byte_for_byte(self):
        pid = self.cat()
        data = bytes(range(256)) * 256
        self.send(pid, data)
        self.send(pid, b"")
        self.send(pid, b"alias", "ttin")
        self.assertEqual(self.upto(pid, len(data) + 5), data + b"alias")

    def test_a_chunked_body(self):
        pid = self.cat()
        sock = self.server.connect()
        self.addCleanup(sock.close)
        sock.sendall(b"POST /streams/%d/stdin HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n" % pid)
        self.assertIn(b"200", sock.recv(1000))
        self.assertEqual(self.upto(pid, 6), b"hello!")

    def test_get_is_405(self):
        pid = self.cat()
        for label in ("stdin", "ttin"):
            status, headers, body = self.server.request("GET", "/streams/%d/%s" % (pid, label))
            self.assertEqual((status, json.loads(body)["error"]), (405, "method_not_allowed"))
            self.assertEqual({word.strip() for word in headers["Allow"].split(",")} & {"GET", "POST", "DELETE"}, {"POST", "DELETE"})
        self.assertEqual(self.server.json("POST", "/streams/%d/stdout" % pid, b"x")[0], 405)

    def test_delete_is_the_end_of_file(self):
        pid = self.cat()
        wire = self.continuous(pid, "since=0")
        self.send(pid, b"x" * 100000)
        self.end(pid)
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x"), 403, "forbidden_write")
        self.assertError(self.server.json("DELETE", "/streams/%d/stdin" % pid), 403, "forbidden_write")
        self.assertEqual(wire.chunks(), (b"x" * 100000, True))

    def test_stdin_that_is_not_redirected(self):
        pid = self.server.add("t", "sleep 1000")[0]
        for method in ("POST", "DELETE"):
            for label in ("stdin", "ttin"):
                self.assertError(self.server.json(method, "/streams/%d/%s" % (pid, label), b"x"), 403, "forbidden_write")
        self.assertEqual(self.websocket("/wstreams/%d" % pid).status, 403)
        self.assertEqual(self.websocket("/wstreams/%d?readonly=true" % pid).status, 101)

    def test_full_is_all_or_nothing_and_too_large(self):
        pid = self.server.add("t", python("""
            import hashlib, os, signal, sys
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            os.write(1, b"ready\\n")
            signal.sigwait([signal.SIGUSR1])
            data = sys.stdin.buffer.read()
            os.write(1, b"%d %s\\n" % (len(data), hashlib.md5(data).hexdigest().encode()))
        """), redirect_input=True, flapping=STREAMS_ONCE)[0]
        wire = self.continuous(pid, "since=0")
        self.assertEqual(wire.exactly(6), b"ready\n")
        mib = 1024 * 1024
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x" * (mib + 1)), 413, "too_large")
        taken = []
        for number in range(100):
            body = bytes([number]) * 300000
            status, value = self.server.json("POST", "/streams/%d/stdin" % pid, body)
            if status != 200:
                self.assertError((status, value), 503, "stdin_full")
                break
            taken.append(body)
        self.assertGreaterEqual(sum(map(len, taken)), mib - 300000)
        self.assertLessEqual(sum(map(len, taken)), mib + 300000)
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x" * mib), 503, "stdin_full")
        self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
        self.end(pid)
        data = b"".join(taken)
        self.assertEqual(wire.chunks(), (b"%d %s\n" % (len(data), hashlib.md5(data).hexdigest().encode()), True))

    def test_a_whole_mebibyte_waits(self):
        pid = self.server.add("t", "sleep 1000", redirect_input=True)[0]
        self.send(pid, b"x" * 1024 * 1024)

    def test_a_process_that_has_closed_its_stdin(self):
        pid = self.puppet()
        wire = self.continuous(pid)
        self.send(pid, b"os.close(0); out(b'closed'); import signal; signal.sigwait([])\n")
        wire.exactly(6)
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x"), 403, "forbidden_write")

    def test_custom_streams_go_both_ways(self):
        pid = self.server.add("t", python("""
            import os, socket
            labels = os.environ["GAFFER_STREAMS"].split(",")
            a, b = (socket.socket(fileno=fd) for fd in (3, 4))
            while True:
                data = a.recv(1000)
                if not data: break
                b.sendall(data.upper())
            a.sendall(b"a has ended")
            a.close()
            os.write(1, ",".join(labels).encode())
            print(b.recv(1000))
        """), custom_streams=["a", "b"], flapping=STREAMS_ONCE)[0]
        wire, answers = self.continuous(pid, label="b"), self.continuous(pid, label="a")
        self.send(pid, b"hello", "a")
        self.assertEqual(wire.exactly(5), b"HELLO")
        websocket = self.websocket("/wstreams/%d?label=a" % pid)
        websocket.text("more")
        self.assertEqual(wire.exactly(4), b"MORE")
        self.server.ok("DELETE", "/streams/%d/a" % pid)
        self.assertError(self.server.json("POST", "/streams/%d/a" % pid, b"x"), 403, "forbidden_write")
        self.assertEqual(answers.exactly(11), b"a has ended")
        self.assertEqual(self.upto(pid, 3), b"a,b")
        self.send(pid, b"end", "b")
        self.assertEqual(self.continuous(pid, "since=3").chunks(), (b"b'end'\n", True))


class StreamsWebsocket(StreamsCase):
    def test_text_binary_and_lines(self):
        pid = self.cat()
        text, binary, lines = (self.websocket("/wstreams/%d%s" % (pid, query)) for query in ("", "?type=binary", "?frame=line"))
        text.text("gr\u00fc\u00dfe\n")
        self.assertEqual(text.read(), (1, "gr\u00fc\u00dfe\n".encode()))
        self.assertEqual(binary.read(), (2, "gr\u00fc\u00dfe\n".encode()))
        self.assertEqual(lines.read(), (1, "gr\u00fc\u00dfe".encode()))
        binary.binary(b"\xff\0\n")
        self.assertEqual(text.read(), (1, "\ufffd\0\n".encode()))
        self.assertEqual(binary.read(), (2, b"\xff\0\n"))
        self.assertEqual(lines.read(), (1, "\ufffd\0".encode()))
        lines.text("a line")                    # one end of line is added
        self.assertEqual(binary.read(), (2, b"a line\n"))
        self.assertEqual(lines.read(), (1, b"a line"))
        lines.text("")
        self.assertEqual(lines.read(), (1, b""))
        both = self.websocket("/wstreams/%d?frame=line&type=binary&since=0" % pid)
        self.assertEqual([both.read() for _ in range(4)], [(2, "gr\u00fc\u00dfe".encode()), (2, b"\xff\0"), (2, b"a line"), (2, b"")])

    def test_who_comes_late_gets_the_last_words_and_the_end(self):
        """What was redirected and is closed is no reason to refuse: what is sent is dropped, the output goes on."""
        pid = self.cat()
        self.send(pid, b"last words")
        self.end(pid)
        self.server.wait_event("exit")
        websocket = self.websocket("/wstreams/%d?tail=all" % pid)
        self.assertEqual([websocket.read(), websocket.read()], [(1, b"last words"), (8, b"\x03\xe8exit 0")])
        pid = self.puppet()
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"import signal; os.write(1, b'on'); signal.sigwait([signal.SIGUSR1])\n")
        self.server.ok("DELETE", "/streams/%d/stdin" % pid)
        websocket = self.websocket("/wstreams/%d?since=0" % pid)
        self.assertEqual(websocket.read(), (1, b"on"))
        with self.assertLogs("gaffer", "INFO"):
            websocket.text("late")
            websocket.frame(9, b"barrier")
            self.assertEqual(websocket.read(), (10, b"barrier"))
        self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x"), 403, "forbidden_write")

    def test_text_across_message_borders(self):
        pid = self.cat()
        websocket, binary = self.websocket("/wstreams/%d" % pid), self.websocket("/wstreams/%d?type=binary" % pid)
        for part in (b"a\xe2", b"\x82", b"\xacb\n"):
            self.send(pid, part)
            self.assertEqual(binary.read(), (2, part))
        data = b""
        while not data.endswith(b"\n"):
            opcode, part = websocket.read()
            self.assertEqual(opcode, 1)
            part.decode("utf-8")
            data += part
        self.assertEqual(data, "a\u20acb\n".encode())
        self.send(pid, b"x\xe2\x82")
        self.end(pid)
        messages = list(iter(websocket.read, (8, b"\x03\xe8exit 0")))
        self.assertEqual(b"".join(part for _, part in messages).decode(), "x\ufffd")

    def test_fragments_and_pings(self):
        pid = self.cat()
        websocket = self.websocket("/wstreams/%d?type=binary" % pid)
        websocket.frame(1, b"frag", final=False)
        websocket.frame(9, b"are you there")
        self.assertEqual(websocket.read(), (10, b"are you there"))
        websocket.frame(0, b"mented")
        self.assertEqual(websocket.read(), (2, b"fragmented"))

    def test_lines_of_all_ends_and_the_last_without_one(self):
        pid = self.cat()
        websocket = self.websocket("/wstreams/%d?frame=line" % pid)
        self.send(pid, b"a\nb\r\nc\rd")
        self.end(pid)
        self.assertEqual([websocket.read() for _ in range(5)], [(1, b"a"), (1, b"b"), (1, b"c"), (1, b"d"), (8, b"\x03\xe8exit 0")])

    def test_label_tail_and_since(self):
        pid = self.puppet(redirect_output=["o", "e"])
        self.send(pid, b"out(b'1\\n2\\n3\\n'); err(b'4\\n5\\n')\n")
        self.upto(pid, 6, "o")
        self.upto(pid, 4, "e")
        for query, offset, data in (("tail=1", "4", b"3\n"), ("tail=all", "0", b"1\n2\n3\n"), ("since=2", "2", b"2\n3\n"), ("label=e&tail=1", "2", b"5\n"),
                                    ("label=o&since=4@" + self.epoch, "4", b"3\n"), ("since=99@other", "0", b"1\n2\n3\n")):
            with self.subTest(query=query):
                websocket = self.websocket("/wstreams/%d?%s" % (pid, query))
                self.assertEqual((websocket.status, websocket.headers["Gaffer-Offset"]), (101, offset))
                self.assertEqual(websocket.read(), (1, data))
        websocket = self.websocket("/wstreams/%d?label=e" % pid)
        websocket.text("err(b'to stdin')\n")                  # what comes in goes to stdin all the same
        self.assertEqual(websocket.read(), (1, b"to stdin"))

    def test_frames_sent_together_with_the_upgrade_are_not_lost(self):
        pid = self.cat()
        early = b"".join(WebSocket.encode(1, b"%d," % number) for number in range(50))
        websocket = self.websocket("/wstreams/%d?since=0" % pid, early=early + WebSocket.encode(8, struct.pack("!H", 1000)))
        self.assertEqual(websocket.status, 101)
        self.assertEqual(self.upto(pid, 140), b"".join(b"%d," % number for number in range(50)))

    def test_half_a_frame_sent_together_with_the_upgrade(self):
        pid = self.cat()
        frame = WebSocket.encode(1, b"x" * 200)
        for cut in (1, 3, 7, 100):
            with self.subTest(cut=cut):
                websocket = self.websocket("/wstreams/%d" % pid, early=frame[:cut])
                websocket.sock.sendall(frame[cut:])
                data = b""
                while len(data) < 200:
                    data += websocket.read()[1]
                self.assertEqual(data, b"x" * 200)

    def test_close_reasons(self):
        for number, (code, reason) in enumerate((("os._exit(0)", "exit 0"), ("os._exit(3)", "exit 3"), ("os.kill(os.getpid(), 9)", "signal 9"))):
            pid = self.puppet("p%d" % number)
            websocket = self.websocket("/wstreams/%d?readonly=true" % pid)
            self.send(pid, b"out(b'last'); " + code.encode() + b"\n")
            self.assertEqual([websocket.read(), websocket.read()], [(1, b"last"), (8, struct.pack("!H", 1000) + reason.encode())])
            websocket.frame(8, struct.pack("!H", 1000))
            self.assertEqual(websocket.read(), (None, b""))

    def test_the_client_closes(self):
        pid = self.cat()
        for payload, answer in ((struct.pack("!H", 1000) + b"bye", b"\x03\xe8"), (b"", b""), (struct.pack("!H", 4000), b"\x0f\xa0")):
            websocket = self.websocket("/wstreams/%d" % pid)
            websocket.frame(8, payload)
            opcode, data = websocket.read()
            self.assertEqual((opcode, data[:2]), (8, answer))
            self.assertEqual(websocket.read(), (None, b""))
        self.send(pid, b"still there")
        self.assertEqual(self.upto(pid, 11), b"still there")

    def test_nothing_is_kept_of_a_closed_connection(self):
        """No timer holds it for the seconds that its end might have taken."""
        pid, loop = self.cat(), self.server.manager.loop

        def timers():
            return loop.call(lambda: sum(entry[2].function is not None for entry in loop._timers))
        before = timers()
        for data in (WebSocket.encode(8, b"\x03\xe8"), WebSocket.encode(3, b""), WebSocket.encode(8, b"\x03\xe8") + b"more"):
            websocket = self.websocket("/wstreams/%d?heartbeat=30" % pid)
            websocket.sock.sendall(data)
            self.assertEqual([websocket.read()[0], websocket.read()[0]], [8, None])
            websocket.close()
            until(lambda: not self.server.http.channels, "the end of the connection")
        self.assertLessEqual(timers(), before)  # that of a request before may have gone, too

    def test_readonly_takes_no_messages(self):
        pid = self.cat()
        websocket = self.websocket("/wstreams/%d?readonly=true" % pid)
        websocket.text("x")
        opcode, payload = websocket.read()
        self.assertEqual((opcode, payload[:2]), (8, struct.pack("!H", 1008)))
        self.assertEqual(self.poll(pid, "since=0&timeout=0"), (204, "0", b""))

    def test_faults_of_the_peer(self):
        pid = self.cat()
        for name, data, code in (
                ("text that is not UTF-8", WebSocket.encode(1, b"\xff"), 1007), ("unmasked", b"\x81\x01x", 1002), ("opcode 3", WebSocket.encode(3, b""), 1002),
                ("a continuation of nothing", WebSocket.encode(0, b""), 1002), ("a long ping", WebSocket.encode(9, b"x" * 126), 1002),
                ("a huge message", bytes([0x82, 0xFF]) + struct.pack("!Q", 1 << 40) + b"abcd", 1009)):
            with self.subTest(name):
                websocket = self.websocket("/wstreams/%d" % pid)
                websocket.sock.sendall(data)
                opcode, payload = websocket.read()
                self.assertEqual((opcode, struct.unpack("!H", payload[:2])[0]), (8, code))

    def test_output_goes_on_where_the_process_has_closed_its_stdin(self):
        pid = self.puppet()
        websocket = self.websocket("/wstreams/%d" % pid)
        websocket.text("import signal; signal.pthread_sigmask(0, [signal.SIGUSR1]); os.close(0); out(b'closed'); signal.sigwait([signal.SIGUSR1]); out(b'end'); os._exit(0)\n")
        self.assertEqual(websocket.read(), (1, b"closed"))
        websocket.text("x")
        websocket.frame(9, b"barrier")
        self.assertEqual(websocket.read(), (10, b"barrier"))
        self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
        self.assertEqual([websocket.read(), websocket.read()], [(1, b"end"), (8, b"\x03\xe8exit 0")])

    def test_heartbeats_are_pings(self):
        websocket = self.websocket("/wstreams/%d?heartbeat=0.1" % self.cat())
        self.assertEqual([websocket.read(), websocket.read()], [(9, b""), (9, b"")])

    def test_without_an_upgrade_it_is_426(self):
        status, headers, body = self.server.request("GET", "/wstreams/%d" % self.cat())
        self.assertEqual((status, json.loads(body)["error"], headers["Upgrade"]), (426, "upgrade_required", "websocket"))

    def test_backpressure_to_stdin(self):
        """What a process doesn't read fills its buffer, then the connection; when it reads, all arrives in order."""
        pid = self.server.add("t", python("""
            import hashlib, os, signal, sys
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            os.write(1, b"ready\\n")
            signal.sigwait([signal.SIGUSR1])
            data = sys.stdin.buffer.read(40 * 300000)
            os.write(1, b"%d %s\\n" % (len(data), hashlib.md5(data).hexdigest().encode()))
        """), redirect_input=True, flapping=STREAMS_ONCE)[0]
        self.upto(pid, 6)
        websocket = self.websocket("/wstreams/%d?type=binary" % pid)
        expected = hashlib.md5(b"".join(bytes([number]) * 300000 for number in range(40))).hexdigest()
        head = bytes([0x82, 0xFF]) + struct.pack("!Q", 300000) + bytes(4)         # a mask of zeros: as it is
        frames = memoryview(b"".join(head + bytes([number]) * 300000 for number in range(40)))
        websocket.sock.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(websocket.sock, selectors.EVENT_WRITE)
            while frames and selector.select(0.5):
                frames = frames[websocket.sock.send(frames):]
            self.assertTrue(frames, "12 MB were taken for a process that reads nothing")
            self.assertError(self.server.json("POST", "/streams/%d/stdin" % pid, b"x" * 600000), 503, "stdin_full")
            self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
            while frames and selector.select(TIMEOUT):
                frames = frames[websocket.sock.send(frames):]
        websocket.sock.settimeout(TIMEOUT)
        self.assertEqual(websocket.read(), (2, b"%d %s\n" % (12000000, expected.encode())))
        self.assertEqual(websocket.read(), (8, b"\x03\xe8exit 0"))


class StreamsWatch(StreamsCase):
    def watch(self, path="", headers="", **options):
        """A StreamsWire of /watch."""
        wire = self.wire("/watch" + path, headers, **options)
        self.assertEqual(wire.status, 200)
        return wire

    def life(self, name="t"):
        """Let a template be added, exit, and be deleted."""
        pid = self.cat(name)
        self.end(pid)
        self.server.wait_event("proc/%s/stop" % name)
        self.server.ok("DELETE", "/processes/" + name)

    EVENTS = ["create", "start", "spawn", "exit", "stop", "delete"]

    def kinds(self, wire, last="delete"):
        """The types of events of a continuous feed, until `last`."""
        kinds = []
        while not kinds or kinds[-1] != last:
            kinds.append(json.loads(wire.chunk())["event"])
        return kinds

    def test_continuous_is_an_object_a_line(self):
        wire = self.watch("?feed=continuous")
        self.assertEqual((wire.headers["Content-Type"], wire.headers["Transfer-Encoding"]), ("application/json", "chunked"))
        before = time.time()
        pid = self.cat()
        line = wire.exactly(1)
        self.assertTrue(line.endswith(b"\n"))
        first, second, third = json.loads(line.splitlines()[0]), *[json.loads(item) for item in (
            line.splitlines()[1:] + [wire.chunk() for _ in range(3 - len(line.splitlines()))])]
        self.assertEqual([event["event"] for event in (first, second, third)], ["create", "start", "spawn"])
        self.assertEqual([event["id"] for event in (first, second, third)], ["%d@%s" % (number, self.epoch) for number in (1, 2, 3)])
        self.assertEqual(set(first), {"event", "name", "id", "time"})
        self.assertEqual(set(third), {"event", "name", "id", "time", "pid", "os_pid"})
        self.assertEqual((third["name"], third["pid"]), ("cat", pid))
        self.assertTrue(before - 1 < first["time"] < time.time() + 1)

    def test_exit_tells_status_and_signal(self):
        pid = self.puppet()
        self.send(pid, b"os._exit(5)\n")
        event = self.server.wait_event("exit")
        self.assertEqual((event["exit_status"], event["term_signal"], event["pid"]), (5, 0, pid))
        pid = self.puppet("second")
        self.server.ok("POST", "/processes/%d/_signal/KILL" % pid)
        event = self.server.wait_event("proc/second/exit")
        self.assertEqual((event["exit_status"], event["term_signal"], event["pid"]), (0, 9, pid))

    def test_eventsource(self):
        wire = self.watch("?feed=eventsource&heartbeat=0.1")
        self.assertEqual(wire.headers["Content-Type"], "text/event-stream")
        self.assertEqual(wire.block(), b"")
        self.cat()
        events = [dict(line.split(b": ", 1) for line in block.splitlines()) for block in
                  itertools.islice(filter(None, iter(wire.block, None)), 3)]
        self.assertEqual([event[b"event"] for event in events], [b"create", b"start", b"spawn"])
        for number, event in enumerate(events, 1):
            self.assertEqual(event[b"id"], b"%d@%s" % (number, self.epoch.encode()))
            data = json.loads(event[b"data"])
            self.assertEqual((data["event"], data["id"]), (event[b"event"].decode(), event[b"id"].decode()))

    def test_longpoll_gives_one_event(self):
        self.life()
        place, kinds = "0", []
        for _ in self.EVENTS:
            event = self.server.ok("GET", "/watch?since=" + place)
            place = event["id"]
            kinds.append(event["event"])
        self.assertEqual(sorted(kinds), sorted(self.EVENTS))
        self.assertEqual(self.server.request("GET", "/watch?timeout=0&since=" + place)[::2], (204, b""))
        self.assertEqual(self.server.request("GET", "/watch?timeout=0.1")[::2], (204, b""))
        event = self.server.json("GET", "/watch", headers={"Last-Event-ID": "1@" + self.epoch})[1]
        self.assertEqual(event["event"], "start")

    def test_a_longpoll_that_waits(self):
        wire = StreamsWire(self.server.port, "/watch/proc/later/spawn?since=0")
        self.addCleanup(wire.close)
        self.life("other")
        self.cat("later")
        wire.head()
        event = json.loads(wire.file.read(int(wire.headers["Content-Length"])))
        self.assertEqual((event["event"], event["name"]), ("spawn", "later"))

    def test_patterns(self):
        """All patterns, from the beginning, on two templates; the delete of the second is the barrier."""
        self.life("one")
        self.life("two")
        full = []
        wire = self.watch("?feed=continuous&since=0")
        while len(full) < 2 or full[-1]["event"] != "delete" or full[-1]["name"] != "two":
            full.append(json.loads(wire.chunk()))
        self.assertEqual(sorted(event["event"] for event in full), sorted(self.EVENTS * 2))
        table = [(path, lambda event: True) for path in ("", "/", "/.")]
        table += [("/" + kind, lambda event, kind=kind: event["event"] == kind) for kind in self.EVENTS]
        for name in ("one", "two"):
            table += [("/proc/" + name, lambda event, name=name: event["name"] == name)]
            table += [("/proc/%s/%s" % (name, kind), lambda event, name=name, kind=kind: (event["name"], event["event"]) == (name, kind)) for kind in self.EVENTS]
        for path, wanted in table:
            expected = list(filter(wanted, full))
            with self.subTest(path=path, feed="continuous"):
                wire = self.watch(path + "?feed=continuous&since=0")
                self.assertEqual([json.loads(wire.chunk()) for _ in expected], expected)
                wire.close()
            with self.subTest(path=path, feed="eventsource"):
                wire = self.watch(path + "?feed=eventsource&since=0")
                self.assertEqual([json.loads(wire.event()[1]) for _ in expected], expected)
                wire.close()
            with self.subTest(path=path, feed="longpoll"):
                found, place = [], "0"
                while len(found) <= len(expected):
                    status, event = self.server.json("GET", "/watch%s?timeout=0&since=%s" % (path, place))
                    if status == 204:
                        break
                    found.append(event)
                    place = event["id"]
                self.assertEqual(found, expected)

    def test_other_types_may_be_watched(self):
        for kind in ("restart", "update", "reap", "stop_pid"):
            self.assertEqual(self.server.request("GET", "/watch/%s?timeout=0" % kind)[0], 204)
            self.assertEqual(self.server.request("GET", "/watch/proc/not-yet/%s?timeout=0" % kind)[0], 204)

    def test_bad_types(self):
        for path in ("/nothing", "/proc", "/proc/", "/proc/t/nothing", "/CREATE", "/create/t", "/proc/t/create/x", "/dropped"):
            for feed in ("longpoll", "continuous", "eventsource"):
                with self.subTest(path=path, feed=feed):
                    self.assertError(self.server.json("GET", "/watch%s?timeout=0&feed=%s" % (path, feed)), 404, "bad_event_type")

    def test_bad_values(self):
        for query in ("since=x", "since=-1", "since=1", "since=1@" + self.epoch, "timeout=x", "timeout=-1", "feed=x", "feed=continuous&heartbeat=0",
                      "feed=eventsource&heartbeat=x"):
            with self.subTest(query=query):
                self.assertError(self.server.json("GET", "/watch?%s%s" % (query, "" if "timeout" in query else "&timeout=0")), 400, "bad_value")

    def test_a_name_that_does_not_exist_yet(self):
        wires = [self.watch("/proc/later?feed=continuous"), self.watch("/proc/later?feed=eventsource")]
        self.life("other")
        self.cat("later")
        self.assertEqual(json.loads(wires[0].chunk())["name"], "later")
        self.assertEqual(json.loads(wires[1].event()[1])["name"], "later")

    def test_resume_by_id(self):
        self.life()
        everything = list(itertools.islice(iter(self.watch("?feed=eventsource&since=0").event, None), len(self.EVENTS)))
        for index, event in enumerate(everything[:-1], 1):
            for path, headers in (("&since=" + event[2], ""), ("", "Last-Event-ID: %s\r\n" % event[2]),
                                  ("&since=0", "Last-Event-ID: %s\r\n" % event[2])):
                wire = self.watch("?feed=eventsource" + path, headers)
                self.assertEqual([wire.event() for _ in everything[index:]], everything[index:])

    def test_no_since_is_from_now_on(self):
        self.life("before")
        wires = [self.watch("?feed=continuous"), self.watch("?feed=eventsource")]
        self.cat("after")
        self.assertEqual(json.loads(wires[0].chunk())["name"], "after")
        self.assertEqual(json.loads(wires[1].event()[1])["name"], "after")

    def test_ids_of_another_run(self):
        self.cat()
        kind, data, where = self.watch("?feed=eventsource", "Last-Event-ID: 17@other\r\n").event()
        self.assertEqual((kind, json.loads(data)["restarted"]), ("dropped", True))
        wire = self.watch("?feed=continuous&since=17@other")
        dropped = json.loads(wire.chunk())
        self.assertEqual((dropped["event"], dropped["restarted"]), ("dropped", True))
        self.assertEqual(json.loads(wire.chunk().splitlines()[0])["event"], "create")
        dropped = self.server.ok("GET", "/watch?since=17@other")
        self.assertEqual((dropped["event"], dropped["restarted"]), ("dropped", True))
        self.assertEqual(self.server.ok("GET", "/watch?since=" + dropped["id"])["event"], "create")

    def test_lost_events_are_counted(self):
        self.server.add("t", "cat", numprocesses=0)             # create, start
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        self.addCleanup(connection.close)
        for number in range(1124):
            connection.request("POST", "/processes/t/" + ("_start" if number % 2 else "_stop"))
            self.assertEqual(connection.getresponse().read(), b'{"ok": true}\n')
        lost = 1124 + 2 - 1024
        event = self.server.ok("GET", "/watch?since=0")
        self.assertEqual((event["event"], event["events"]), ("dropped", lost))
        self.assertEqual(self.server.ok("GET", "/watch?since=" + event["id"])["id"], "%d@%s" % (lost + 1, self.epoch))
        wire = self.watch("?feed=continuous&since=1")
        dropped = json.loads(wire.chunk())
        self.assertEqual((dropped["event"], dropped["events"]), ("dropped", lost - 1))
        self.assertEqual(json.loads(wire.chunk().splitlines()[0])["id"], "%d@%s" % (lost + 1, self.epoch))
        kind, data, _ = self.watch("?feed=eventsource", "Last-Event-ID: 2@%s\r\n" % self.epoch).event()
        self.assertEqual((kind, json.loads(data)), ("dropped", {"events": lost - 2}))

    def test_head(self):
        for feed in ("longpoll", "continuous", "eventsource"):
            status, _, body = self.server.request("HEAD", "/watch?feed=" + feed)
            self.assertIn(status, (200, 204))
            self.assertEqual(body, b"")

    def test_http_1_0(self):
        wire = self.watch("?feed=continuous", version="1.0")
        self.cat()
        self.assertEqual(json.loads(wire.file.readline())["event"], "create")


class StreamsTimes(StreamsCase):

    def test_no_time_that_a_client_names_does_harm(self):
        """Longer ones than a selector takes, up to the longest that is allowed, and beyond."""
        self.server.add("x", "cat", redirect_input=True)
        kept = []
        # the longest first, while no shorter one hides it
        for seconds in "10000000", "5000000", "3000000", "2147484", "2147483.647":
            for path in ("/watch?feed=eventsource&heartbeat=%s",
                         "/watch?feed=continuous&heartbeat=%s",
                         "/streams/1/stdout?feed=eventsource&heartbeat=%s",
                         "/stats?feed=eventsource&interval=%s"):
                with self.subTest(path % seconds):
                    kept.append(self.server.stream(path % seconds, {"Origin": "https://x.example"}))
                    self.assertEqual(kept[-1].status, 200)
            for path in ("/watch?timeout=%s", "/streams/1/stdout?timeout=%s",
                         "/stats?feed=longpoll&interval=%s"):
                sock = self.server.connect()
                self.addCleanup(sock.close)
                sock.sendall(http_bytes("GET", path % seconds))
            self.websocket("/wstreams/1?heartbeat=%s" % seconds)
            for field in ({"graceful_timeout": float(seconds)},
                          {"flapping": {"retry_in": float(seconds)}}):
                name = "t%d" % len(kept)
                with self.subTest(field):
                    info = dict(field, name=name, cmd="cat", redirect_input=True)
                    self.server.ok("POST", "/processes", info)
                    self.server.ok("POST", "/processes/%s/_stop?wait=%s" % (name, seconds))
                    self.server.ok("DELETE", "/processes/" + name)
            self.assertEqual(self.server.request("GET", "/ping")[2], b"OK")
        for seconds in "10000001", "99999999999999999999", "1e400", "nan", "inf", "-1":
            with self.subTest(seconds):
                answer = self.server.json("GET", "/watch?feed=eventsource&heartbeat=" + seconds)
                self.assertError(answer, 400, "bad_value")
                body = b'{"name": "y", "cmd": "cat", "graceful_timeout": %b}' % seconds.encode()
                self.assertEqual(self.server.json("POST", "/processes", body)[0], 400)
        self.assertEqual(self.server.request("GET", "/ping")[2], b"OK")
        for answer in kept:
            answer.connection.close()
            answer.close()


class StreamsObservers(StreamsCase):
    """Who is told of a step of a process's life can do no harm to it."""

    def follow(self, *paths):
        """Raw sockets on which streams have begun."""
        made = []
        for path in paths:
            sock = self.server.connect()
            self.addCleanup(sock.close)
            sock.sendall(http_bytes("GET", path))
            self.assertEqual(sock.recv(12), b"HTTP/1.1 200")
            made.append(sock)
        return made

    def whole_lives(self, count):
        """POST and DELETE of processes that end in all the ways there are; nothing is left."""
        for number in range(count):
            info = {"name": "n%d" % number, "cmd": "cat", "redirect_input": True}
            self.server.ok("POST", "/processes", info)
        groups = [pid for status in self.server.ok("GET", "/status") if status["name"][0] == "n"
                  for pid in status["os_pids"]]
        self.assertEqual(len(groups), count)
        for number in range(count):
            if number % 3 == 0:
                pid, = self.server.ok("GET", "/processes/n%d/_pids" % number)["pids"]
                self.server.ok("DELETE", "/streams/%d/stdin" % pid)
            elif number % 3 == 1:
                self.server.ok("POST", "/processes/n%d/_stop?wait=true" % number)
            self.server.ok("DELETE", "/processes/n%d" % number)
        for group in groups:
            until(lambda group=group: not process_group(group) and process_state(group) is None,
                  "the end of %d" % group)
        names = self.server.ok("GET", "/processes")
        self.assertEqual([name for name in names if name[0] == "n"], [])

    def test_many_watchers_of_many_changes(self):
        """More than are sent to one by one, of every form, of which some are behind."""
        clients = self.follow(*["/watch?feed=eventsource"] * 24, *["/watch?feed=continuous"] * 24,
                              "/watch/proc/n1?feed=eventsource", "/watch/exit?feed=continuous",
                              "/streams?feed=eventsource", "/streams?feed=continuous",
                              "/stats?feed=eventsource&interval=0.1")
        self.whole_lives(30)
        for sock in clients:
            sock.close()

    def test_encoders_are_whole(self):
        """What one leaves out has a default."""
        whole = type("Whole", (gaffer.Encoder,), {})
        got = queue.Queue()

        class Sink:
            send = staticmethod(lambda payload: got.put(payload) or True)

            def finished(self, reader):
                """The end."""
                reader.close()
        loop = self.server.manager.loop
        window = loop.call(gaffer.Window, loop)
        loop.call(lambda: gaffer.Reader(window, whole(), Sink(), 0).start())
        for number in range(3):
            loop.call(window.append, b"%d" % number)
        loop.call(window.finish)
        data = b""
        while data != b"012":
            data += got.get(timeout=TIMEOUT)

    def test_encoders_that_fail(self):
        """Their readers are cut, and see it; the processes live and end as ever."""
        self.expect_log("planted")
        classes, found = [gaffer.Encoder], []
        while classes:
            found.append(classes.pop())
            classes += found[-1].__subclasses__()

        def fail(*arguments):
            raise RuntimeError("planted")
        pid, = self.server.add("x", "cat", redirect_input=True)
        clients = self.follow("/watch?feed=eventsource", "/watch?feed=continuous",
                              "/streams/x/stdout?feed=eventsource",
                              "/streams/x/stdout?feed=continuous",
                              "/streams/%d/stdout?feed=eventsource&since=0" % pid)
        made = self.websocket("/wstreams/%d" % pid)
        with contextlib.ExitStack() as patches:
            for each in found[1:]:
                patches.enter_context(unittest.mock.patch.object(each, "encode", fail))
            self.server.ok("POST", "/streams/%d/stdin" % pid, b"line\n")
            self.whole_lives(12)
            for sock in clients:
                until(lambda sock=sock: not sock.recv(65536), "the end of what cannot be encoded")
            until(lambda: made.read()[0] in (8, None), "the end of the websocket")
        self.assertEqual(self.server.ok("GET", "/status/x")["running"], 1)
        self.assertEqual(self.server.request("GET", "/streams/x/stdout?since=0")[2], b"line\n")

    def test_observers_that_fail(self):
        """Each for itself: the others are told."""
        self.expect_log("planted")
        told = queue.Queue()

        def fail(kind, event):
            raise RuntimeError("planted")

        def leave(kind, event):
            raise SystemExit("planted")

        def interrupt(kind, event):
            raise KeyboardInterrupt("planted")
        manager = self.server.manager
        for callback in fail, leave, interrupt, lambda kind, event: told.put(kind):
            manager.subscribe("exit", callback)
        pid, = self.server.add("x", "cat", redirect_input=True)
        for callback in fail, lambda kind, event: told.put(event["data"]):
            manager.get_process("x").monitor_io("stdout", callback)
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"line\n")
        self.assertEqual(told.get(timeout=TIMEOUT), b"line\n")
        self.whole_lives(6)
        self.assertEqual([told.get(timeout=TIMEOUT) for _ in range(6)], ["exit"] * 6)


@unittest.skipUnless(os.path.exists("/proc/net/tcp"), "needs /proc/net/tcp")
class StreamsGone(StreamsCase):
    """A client that leaves is noticed, whatever keeps the server from reading what it sent last."""

    def waits_for_close(self):
        """How many connections the clients have closed and the server has not."""
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        return sum(row[3] == "08" and int(row[1].rpartition(":")[2], 16) == self.server.port
                   for row in rows)

    def fill(self, sock, data):
        """Send until the server takes no more, or all is sent."""
        sock.settimeout(0.2)
        with contextlib.suppress(socket.timeout):
            sock.sendall(data)

    def states(self):
        """(name, function that brings a new connection there and returns its socket)."""
        deaf, = self.server.add("deaf", "sleep 1000", redirect_input=True)
        loud, = self.server.add("loud", "yes", start=True)

        def stdin_full(query=""):
            made = self.websocket("/wstreams/%d%s" % (deaf, query))
            self.fill(made.sock, WebSocket.encode(2, bytes(65536)) * 40)
            return made.sock

        def request(path, behind=b""):
            sock = self.server.connect()
            self.addCleanup(sock.close)
            sock.sendall(http_bytes("GET", path))
            self.fill(sock, behind)
            return sock
        pipelined = http_bytes("GET", "/ping") * 3000
        yield "websocket, stdin is full", stdin_full
        yield "websocket by line, stdin is full", functools.partial(stdin_full, "?frame=line")
        for path in ("/watch", "/streams/%d/stdout" % deaf, "/streams",
                     "/stats?feed=longpoll&interval=1000"):
            yield ("long poll of %s, requests behind it" % path,
                   functools.partial(request, path, pipelined))
            yield "long poll of %s" % path, functools.partial(request, path)
        for query in "", "&loss=skip", "&loss=block":
            yield "continuous that is full" + query, functools.partial(
                request, "/streams/%d/stdout?feed=continuous%s" % (loud, query))
            yield "events that are full" + query, functools.partial(
                request, "/streams/%d/stdout?feed=eventsource%s" % (loud, query), bytes(200000))

    def test_clients_that_leave(self):
        for name, state in self.states():
            for leave in ("close", "shutdown"):
                with self.subTest(name, leave=leave):
                    sock = state()
                    if leave == "close":
                        sock.close()
                    else:
                        sock.shutdown(socket.SHUT_WR)
        until(lambda: not self.waits_for_close(), "the end of all connections")
        self.assertEqual(self.server.request("GET", "/ping")[2], b"OK")

    def test_what_was_sent_before(self):
        """All of it is for the process that reads on, though its client has left meanwhile."""
        pid, = self.server.add("x", python("""
            import signal, sys
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            print("ready")
            signal.sigwait([signal.SIGUSR1])
            size = 0
            while size < 40 * 65536:
                size += len(sys.stdin.buffer.read1(65536))
            print("all")
            sys.stdin.read()
            """), redirect_input=True)
        lines = self.server.stream("/streams/%d/stdout?feed=continuous&since=0" % pid)
        self.assertEqual(lines.readline(), b"ready\n")
        made = self.websocket("/wstreams/%d" % pid)
        self.fill(made.sock, WebSocket.encode(2, bytes(65536)) * 40)
        made.sock.shutdown(socket.SHUT_WR)
        self.server.ok("POST", "/processes/%d/_signal/USR1" % pid)
        self.assertEqual(lines.readline(), b"all\n")
        lines.connection.close()
        lines.close()


class StreamsStats(StreamsCase):
    FIELDS = {"id", "pid", "cpu", "mem", "mem_info1", "mem_info2", "rss", "vms", "ctime", "username", "nice", "cmdline", "children"}

    def test_feeds_of_all_of_one_and_of_a_process(self):
        pid = self.cat()
        for path, check in (("/stats", lambda value: value[0]["stats"][0]), ("/stats/cat", lambda value: value["stats"][0]), ("/stats/cat/%d" % pid, lambda value: value)):
            with self.subTest(path=path):
                wire = self.wire(path + "?feed=continuous&interval=0.1")
                for _ in range(2):
                    line = wire.chunk()
                    self.assertTrue(line.endswith(b"\n"))
                    entry = check(json.loads(line))
                    self.assertEqual((set(entry), entry["id"]), (self.FIELDS, pid))
                wire.close()
                wire = self.wire(path + "?feed=eventsource&interval=0.1")
                for _ in range(2):
                    kind, data, _ = wire.event()
                    self.assertEqual((kind, check(json.loads(data))["id"]), ("stat", pid))
                wire.close()
                self.assertEqual(check(self.server.ok("GET", path + "?feed=longpoll&interval=0.1"))["id"], pid)

    def test_bad_values(self):
        pid = self.cat()
        self.cat("other")
        for query in ("feed=x", "feed=continuous&interval=0.05", "feed=continuous&interval=x", "feed=eventsource&interval=-1", "feed=longpoll&interval=nan",
                      "feed=continuous&heartbeat=x"):
            self.assertError(self.server.json("GET", "/stats?" + query), 400, "bad_value")
        for path in ("/stats/none", "/stats/other/%d" % pid, "/stats/cat/99", "/stats/cat/cat"):
            for query in ("", "?feed=continuous", "?feed=eventsource", "?feed=longpoll"):
                self.assertError(self.server.json("GET", path + query), 404, "not_found")

    def test_a_feed_ends_with_what_it_looks_at(self):
        pid = self.cat()
        wires = [self.wire("/stats/%s?feed=continuous&interval=0.1" % what) for what in ("cat", "cat/%d" % pid)]
        for wire in wires:
            self.assertTrue(wire.chunk())
        self.server.ok("DELETE", "/processes/cat")
        for wire in wires:
            self.assertTrue(wire.chunks()[1])

    def test_a_stopped_template_is_zeros(self):
        self.cat()
        self.server.ok("POST", "/processes/cat/_stop")
        value = json.loads(self.wire("/stats/cat?feed=continuous&interval=0.1").chunk())
        self.assertEqual(value, {"name": "cat", "mem": 0, "max_mem": 0, "min_mem": 0, "cpu": 0, "max_cpu": 0, "min_cpu": 0, "stats": []})


class StreamsServer(Running):
    """`gaffer.py serve` as a process of its own, on a free port."""

    def __init__(self, *options):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GAFFER", "PYTHON"))}
        self.process = subprocess.Popen([PYTHON, gaffer.__file__, "serve", "--bind", "127.0.0.1:0", *options],
                                        stdout=subprocess.PIPE, env=environment)
        line = self.process.stdout.readline().decode()
        assert "listening on" in line, line
        self.port = int(line.rpartition(":")[2])

    def stop_all(self):
        """End it."""
        self.process.terminate()
        self.process.stdout.close()
        assert self.process.wait(TIMEOUT) == 0, self.process.returncode

    def read_proc(self, name):
        """A file of its /proc."""
        with open("/proc/%d/%s" % (self.process.pid, name)) as file:
            return file.read()

    def resident(self):
        """Its memory in bytes."""
        return int(self.read_proc("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self):
        """How many threads it has."""
        return int(re.search(r"Threads:\s*(\d+)", self.read_proc("status")).group(1))

    def switches(self):
        """How often each of its threads was put to sleep or interrupted: who wakes up and sleeps again, counts."""
        found = {}
        for task in os.listdir("/proc/%d/task" % self.process.pid):
            with contextlib.suppress(OSError):  # a thread has just ended
                found[task] = re.findall(r"ctxt_switches:\s*(\d+)", self.read_proc("task/%s/status" % task))
        return found


class StreamsHeavyCase(StreamsCase):
    """A server that is a process, and readers on threads."""

    window = "%d" % gaffer.WINDOW_SIZE
    lines = 40000                               # of 64 bytes, written as fast as the child can
    reconnect = 10000                           # events, after which the EventSource drops its connection

    def setUp(self):
        Case.setUp(self)
        self.server = StreamsServer("--window", self.window)
        self.addCleanup(self.server.stop_all)

    def hose(self, lines=None):
        """The pid of a child that waits for a byte on stdin to write its lines."""
        return self.server.add("hose", python(STREAMS_FIREHOSE.format(lines=lines or self.lines)), redirect_input=True, flapping=STREAMS_ONCE)[0]

    def gather(self, **readers):
        """Let each reader run on a thread: {name: function}. Returns a function that gives {name: result}."""
        results = {}

        def run(name, function):
            try:
                results[name] = function()
            except BaseException as error:
                results[name] = error
        threads = [threading.Thread(target=run, args=item, name=item[0]) for item in readers.items()]
        for thread in threads:
            thread.start()

        def wait():
            for thread in threads:
                thread.join(2 * TIMEOUT)
            for name, result in results.items():
                if isinstance(result, BaseException):
                    raise AssertionError(name) from result
            self.assertEqual(set(results), set(readers))
            return results
        self.addCleanup(wait)
        return wait

    def by_longpolls(self, pid):
        """(bytes, how many were dropped) of a loop of long polls from the beginning, until the end."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        parts, dropped, offset = [], 0, "0"
        with contextlib.closing(connection):
            while True:
                connection.request("GET", "/streams/%d/stdout?since=%s" % (pid, offset))
                answer = connection.getresponse()
                parts.append(answer.read())
                if answer.status == 204:
                    return b"".join(parts), dropped
                dropped += int(answer.headers.get("Gaffer-Dropped", 0))
                offset = answer.headers["Gaffer-Offset"]

    def by_events(self, pid, reconnect, wire=None):
        """(bytes, how many were dropped) of an EventSource that drops its connection after so many events. `wire`: the first
        connection, or from the beginning."""
        parts, dropped, last = [], 0, ""
        while True:
            if wire is None or last:
                wire = StreamsWire(self.server.port, "/streams/%d/stdout?feed=eventsource&since=0" % pid, last).head()
            with contextlib.closing(wire):
                for _ in range(reconnect):
                    event = wire.event()
                    if event is None:
                        raise AssertionError("the stream ended without an exit event")
                    if event[0] == "exit":
                        return b"".join(parts), dropped
                    if event[0] == "dropped":
                        dropped += json.loads(event[1])["bytes"]
                    else:
                        parts.append(event[1].encode() + b"\n")
                    last = "Last-Event-ID: %s\r\n" % event[2]

    @staticmethod
    def by_websocket(websocket):
        """(bytes, the payload of the close frame)"""
        parts = []
        while True:
            opcode, payload = websocket.read()
            if opcode == 8 or opcode is None:
                return b"".join(parts), payload
            parts.append(payload)

    def assertSame(self, found, expected):
        """Bytes are equal; without a diff of megabytes."""
        if found != expected:
            place = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), min(len(found), len(expected)))
            self.fail("%d bytes, expected %d; they differ at %d: %r, expected %r" % (
                len(found), len(expected), place, found[place - 20:place + 70], expected[place - 20:place + 70]))

    def assertLines(self, data, lines):
        """Whole lines of the firehose in order; the one in front of a gap may be cut."""
        last = -1
        for line in data.splitlines():
            number = int(line[-63:])
            self.assertGreater(number, last)
            self.assertGreaterEqual(len(line), 63)
            last = number
        self.assertEqual(last, lines - 1)


class StreamsLossless(StreamsHeavyCase):
    """A child writes as fast as it can; the window holds it all, and nobody is waited for."""

    window = "%d" % (64 * StreamsHeavyCase.lines + 1)

    def test_each_feed_ends_with_exactly_those_lines(self):
        pid = self.hose()
        wire = self.continuous(pid, "since=0")
        websocket = self.websocket("/wstreams/%d?type=binary&readonly=1&since=0" % pid)
        results = self.gather(longpoll=lambda: self.by_longpolls(pid), events=lambda: self.by_events(pid, self.reconnect),
                              continuous=wire.chunks, websocket=lambda: self.by_websocket(websocket))
        self.send(pid, b"\n")
        expected = streams_numbered(self.lines)
        for name, (data, end) in results().items():
            with self.subTest(name):
                self.assertSame(data, expected)
                self.assertEqual(end, {"longpoll": 0, "events": 0, "continuous": True, "websocket": b"\x03\xe8exit 0"}[name])


class StreamsLoss(StreamsHeavyCase):
    """The window is much smaller than the output."""

    window = "65536"
    many = 130000                               # lines, to overflow all buffers of the system in between

    def test_block_loses_nothing_and_the_others_count(self):
        pid = self.hose()
        wire = self.continuous(pid, "loss=block")
        slow = self.continuous(pid, "loss=block", receive_buffer=STREAMS_SMALL)
        websocket = self.websocket("/wstreams/%d?type=binary&readonly=1&loss=block" % pid)
        events = self.sse(pid, "loss=block")
        results = self.gather(
            longpoll=lambda: self.by_longpolls(pid), reconnecting=lambda: self.by_events(pid, self.reconnect),
            events=lambda: self.by_events(pid, 10 ** 9, events), continuous=wire.chunks, slow=slow.chunks,
            websocket=lambda: self.by_websocket(websocket))
        self.send(pid, b"\n")
        expected, found = streams_numbered(self.lines), results()
        self.assertEqual(found["websocket"][1], b"\x03\xe8exit 0")
        for name in ("events", "continuous", "slow", "websocket"):
            with self.subTest(name):
                self.assertSame(found[name][0], expected)
        for name in ("longpoll", "reconnecting"):
            with self.subTest(name):
                data, dropped = found[name]
                self.assertEqual(len(data) + dropped, len(expected))

    def test_what_is_dropped_makes_up_the_difference_to_the_byte(self):
        """Readers that begin to read when the child has exited: most of its output has fallen out of the window."""
        pid = self.hose(self.many)
        cut, skip, events = self.continuous(pid), self.continuous(pid, "loss=skip"), self.sse(pid)
        sockets = [self.websocket("/wstreams/%d?type=binary&readonly=1%s" % (pid, query)) for query in ("", "&loss=skip")]
        self.send(pid, b"\n")
        self.server.wait_event("exit")
        expected = streams_numbered(self.many)
        total = len(expected)
        with self.subTest("longpoll"):
            data, dropped = self.by_longpolls(pid)
            self.assertSame(data, expected[dropped:])
            self.assertGreater(dropped, 0)
        with self.subTest("continuous"):
            data, whole = cut.chunks()
            self.assertFalse(whole, "cut without its last chunk")
            self.assertSame(data, expected[:len(data)])
        with self.subTest("continuous, loss=skip"):
            self.assertEqual(skip.headers["Trailer"], "Gaffer-Dropped")
            data, whole = skip.chunks()
            self.assertTrue(whole)
            self.assertGreater(int(skip.trailers["Gaffer-Dropped"]), 0)
            self.assertEqual(len(data) + int(skip.trailers["Gaffer-Dropped"]), total)
            self.assertLines(data, self.many)
        with self.subTest("eventsource"):
            data, dropped, place = bytearray(), 0, 0
            for kind, text, where in iter(events.event, None):
                if kind == "dropped":
                    count = json.loads(text)["bytes"]
                    self.assertEqual(int(where.split("@")[0]), place + count)
                    dropped += count
                elif kind == "stdout":
                    data += text.encode() + b"\n"
                place = int(where.split("@")[0].rstrip("x"))
            self.assertEqual((kind, place), ("exit", total))
            self.assertGreater(dropped, 0)
            self.assertEqual(len(data) + dropped, total)
            self.assertLines(data, self.many)
        with self.subTest("websocket"):
            data, close = self.by_websocket(sockets[0])
            self.assertRegex(close, b"^\x03\xf5dropped [1-9][0-9]*$")
            self.assertSame(data, expected[:len(data)])
        with self.subTest("websocket, loss=skip"):
            data, close = self.by_websocket(sockets[1])
            self.assertEqual(close, b"\x03\xe8exit 0")
            self.assertLess(len(data), total)
            self.assertLines(data, self.many)

    def test_who_never_reads_holds_the_child_only_with_block(self):
        pid = self.hose(10 ** 9)
        wires = [self.continuous(pid, receive_buffer=STREAMS_SMALL), self.sse(pid, receive_buffer=4096)]
        self.send(pid, b"\n")
        place = lambda: int(self.poll(pid, "timeout=0&tail=0")[1])
        until(lambda: place() > 10 ** 7, "the child goes on")
        wires.append(self.continuous(pid, "loss=block", receive_buffer=STREAMS_SMALL))
        seen = [0]

        def held():
            seen.append(self.poll(pid, "tail=0&timeout=0.2")[:2])     # nothing comes for 0.2 s
            return seen[-1][0] == 204
        until(held, "the child is held", timeout=10)
        before = int(seen[-1][1])
        wires[-1].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        while place() == before:                # it takes some: the child goes on
            wires[-1].exactly(10 ** 5)
        wires[-1].close()
        until(lambda: place() > before + 10 ** 7, "the child goes on when the reader has gone")


class StreamsCost(StreamsHeavyCase):
    """Memory, threads and system calls."""

    growth = 2 * 1024 * 1024                    # of memory, at most
    amount = 25 * 10 ** 6                       # bytes that pass by a reader that never reads, after as much to warm up
    clients, client_lines = 200, 2000

    def test_who_never_reads_costs_nothing(self):
        pid = self.hose(10 ** 9)
        for query in ("feed=continuous", "feed=continuous&loss=skip", "feed=eventsource"):
            self.wire("/streams/%d/stdout?%s" % (pid, query))
        for query in ("", "&frame=line"):
            self.assertEqual(self.websocket("/wstreams/%d?readonly=1%s" % (pid, query)).status, 101)
        reader = self.continuous(pid, "loss=skip")
        self.send(pid, b"\n")

        def place():
            return int(self.server.request("HEAD", "/streams/%d/stdout" % pid)[1]["Gaffer-Offset"])

        def read(amount):
            while amount > 0:
                amount -= len(reader.chunk())
        read(self.amount)
        memory, first = self.server.resident(), place()
        read(self.amount)
        self.assertLess(self.server.resident() - memory, self.growth)
        self.assertGreater(place() - first, self.amount // 2)         # another reader goes on, and so does the child
        reader.close()
        first = place()
        until(lambda: place() > first + self.amount, "the child goes on where nobody reads")
        self.assertLess(self.server.resident() - memory, self.growth)

    def test_many_event_streams_on_a_fast_stream(self):
        pid = self.hose(self.client_lines)
        before = self.server.threads()
        wires = [self.sse(pid, version="1.0") for _ in range(self.clients)]
        until(lambda: self.server.threads() <= before, "no thread is held by a stream")
        digests = [hashlib.md5() for _ in wires]
        self.send(pid, b"\n")
        first = b""
        with selectors.DefaultSelector() as selector:
            for index, wire in enumerate(wires):
                selector.register(wire.sock, selectors.EVENT_READ, index)
            while selector.get_map():
                ready = selector.select(TIMEOUT)
                self.assertTrue(ready)
                for key, _ in ready:
                    data = key.fileobj.recv(262144)
                    digests[key.data].update(data)
                    first += data if key.data == 0 else b""
                    if not data:
                        selector.unregister(key.fileobj)
        self.assertLessEqual(self.server.threads(), before + 1)
        epoch = re.match(rb"id: 64@(\w+)\n", first).group(1)
        blocks = [b"id: %d@%s\nevent: stdout\ndata: %063d\n\n" % (i * 64 + 64, epoch, i) for i in range(self.client_lines)]
        head, _, end = first.rpartition(b"id: ")
        self.assertSame(head, b"".join(blocks))
        self.assertTrue(end.startswith(b"%dx@%s\nevent: exit\n" % (self.client_lines * 64, epoch)))
        self.assertEqual({digest.digest() for digest in digests}, {hashlib.md5(first).digest()})

    def test_a_quiet_server_makes_no_system_call(self):
        """With all kinds of readers waiting, and a connection that is kept alive: each wake-up would be a switch."""
        if not hasattr(os, "pidfd_open"):
            self.skipTest("children are polled here")
        pid = self.cat()
        self.wire("/streams/%d/stdout?feed=continuous&heartbeat=true" % pid)
        events = self.sse(pid)
        self.wire("/watch?feed=eventsource")
        self.websocket("/wstreams/%d" % pid)
        for target in ("/streams/%d/stdout?timeout=1000" % pid, "/watch"):
            self.addCleanup(StreamsWire(self.server.port, target).close)
        kept = self.wire("/ping")
        self.assertEqual(kept.file.read(2), b"OK")
        self.send(pid, b"partial line")
        self.assertEqual(events.event()[1], "partial line")

        def quiet():
            before = self.server.switches()
            threading.Event().wait(1.0)         # a second without a switch is what is measured
            return self.server.switches() == before
        until(quiet, "a quiet second", timeout=2.5)


class StreamsPause(Case):
    """With a clock of our own: sending to all readers takes long, and gaffer waits as long before it reads on."""

    def test_gaffers_own_pause_is_no_silence(self):
        clock, sent = [0.0], []
        loop = gaffer.Loop(clock=lambda: clock[0])
        self.addCleanup(loop.close)
        read, write = os.pipe()
        self.addCleanup(os.close, write)
        os.set_blocking(read, False)

        class Sink:
            """Takes 60 ms."""

            def send(self, payload):
                clock[0] += 0.06
                sent.extend(re.findall(b"data: (.*)", payload))
                return True

            def finished(self, reader):
                """The end."""
        window = gaffer.Window(loop)
        output = gaffer.Output(loop, read, window, gaffer.Merged(loop, 1024, "name", "stdout", gaffer.Journal(loop, 1024)), 1, lambda: None)
        loop.call(output.start)
        self.addCleanup(loop.call, output.close)
        reader = gaffer.Reader(window, gaffer.SseEncoder("stdout", "epoch"), Sink(), 0)
        loop.call(reader.start)
        text = b"".join(b"%d first half, second half\n" % number for number in range(40))
        expected = text.splitlines()
        place = 0
        while len(sent) < len(expected) and clock[0] < 60:
            if place < len(text):               # the child is never silent: it writes a line and a half every 20 ms
                place += os.write(write, text[place:place + 36])
            loop.step()
            clock[0] += 0.02
        self.assertEqual(sent, expected)


class StreamsThreads(StreamsCase):
    def test_a_stream_uses_no_thread(self):
        pid = self.cat()
        before = threading.active_count()
        targets = ["/streams/%d/stdout?feed=continuous", "/streams/%d/stdout?feed=eventsource", "/streams/%d/stdout?since=0", "/watch/proc/x?feed=longpoll",
                   "/watch?feed=continuous"]
        wires = [StreamsWire(self.server.port, target % pid if "%" in target else target) for target in targets for _ in range(32)]
        for index, wire in enumerate(wires):
            self.addCleanup(wire.close)
            if index < 64 or index >= 128:
                wire.head()
        sockets = [self.websocket("/wstreams/%d" % pid) for _ in range(40)]
        until(lambda: threading.active_count() <= before, "the threads' end")
        sockets[0].text("x\n")
        for wire in wires[:32]:
            self.assertEqual(wire.exactly(2), b"x\n")
        for wire in wires[32:64]:
            self.assertEqual(wire.event()[1], "x")
        for wire in wires[64:96]:
            self.assertEqual(wire.head().file.read(2), b"x\n")
        for websocket in sockets:
            self.assertEqual(websocket.read(), (1, b"x\n"))
        self.assertLessEqual(threading.active_count(), before)     # the long polls' connections wait on the loop, too


# --------------------------------------------------------------------------------------------------------------------
# a real browser
# --------------------------------------------------------------------------------------------------------------------
class BrowserDriver(BrowserCase):

    def test_it_drives_the_page_and_tells_what_went_wrong(self):
        browser = self.browser
        browser.size(800, 600)
        browser.get(self.server.url + "/")
        self.assertEqual(browser.wait("return document.title"), "gaffer")
        self.assertEqual(browser.script("return [innerWidth, innerHeight, arguments[0]]", "x"), [800, 600, "x"])
        self.assertEqual(browser.script("return fetch('/ping').then(answer => answer.text())"), "OK")
        self.assertEqual(browser.console(), [])
        browser.script("return fetch('/nothing')")
        self.assertIn("404", browser.console()[0])
        browser.get("data:text/html,")                      # no script here misses what is taken away
        browser.script("document.body.innerHTML = '<input><button>ok</button>';"
                       "document.querySelector('button').addEventListener('click', event => event.target.id = 'clicked')")
        browser.keys("ab" + browser.KEYS["Backspace"] + "c", "input")
        browser.click("button")
        self.assertEqual(browser.wait("return document.querySelector('#clicked') && document.querySelector('input').value"), "ac")
        self.assertEqual(browser.screenshot()[:4], b"\x89PNG")
        self.assertEqual(browser.cdp("Browser.getVersion")["protocolVersion"], "1.3")
        with self.assertRaisesRegex(BrowserError, "javascript error: .*broken"):
            browser.script("throw new Error('broken')")
        with unittest.mock.patch(__name__ + ".TIMEOUT", 0.05), self.assertRaisesRegex(AssertionError, "return broken .*ReferenceError"):
            browser.wait("return broken")

    def test_nothing_of_it_is_left(self):
        other = Browser()
        started = list(other._processes())
        self.assertGreater(len(started), 2)
        other.close()
        self.assertEqual([os_pid for os_pid in started if alive(os_pid)], [])
        self.assertFalse(os.path.exists(other.directory))


class BrowserPage(BrowserCase):
    """The web page, as its users have it: every view, every button, by mouse and by keyboard."""

    LINES = "return [...document.querySelectorAll('.l')].map(node => node.textContent)"

    def setUp(self):
        super().setUp()
        self.browser.size(1280, 800)

    def open(self, path="/", server=None):
        """Load the page anew at an address of its own, and wait until it is live."""
        self.browser.get("about:blank")
        self.browser.get("%s/#%s" % ((server or self.server).url, path))
        self.browser.wait("return document.querySelector('#link').textContent === 'live'")

    def go(self, path):
        """Another view of the page that is open."""
        self.browser.script("if (location.hash === '#' + arguments[0]) return; location.hash = arguments[0];"
                            "return new Promise(resolve => addEventListener('hashchange', () => setTimeout(resolve), {once: true}))", path)

    def click(self, selector):
        """Click an element, once it is there."""
        self.browser.wait("return document.querySelector(arguments[0])", selector)
        self.browser.click(selector)

    def press(self, label):
        """Click a button by its accessible name."""
        self.click('[aria-label="%s"]' % label)

    def choose(self, text):
        """Click an entry of the open menu, or a button of the open dialog."""
        self.browser.script("const all = [...document.querySelectorAll('#menu button, #dialog button')];"
                            "all.find(node => node.offsetParent && node.textContent === arguments[0]).click()", text)

    def state(self, name):
        """What GET /status/<name> says."""
        return self.server.ok("GET", "/status/" + name)

    def shows(self, text, selector="main"):
        """Wait until an element has a text in it."""
        self.browser.wait("const node = document.querySelector(arguments[0]); return node && node.textContent.includes(arguments[1])",
                          selector, text)

    def row(self, name, text):
        """Wait until the row of a template has a text in it."""
        self.shows(text, '[data-name="%s"]' % name)

    def happened(self, event, name, since=0):
        """Wait for an event of a template; its id."""
        return self.server.wait_event("proc/%s/%s" % (name, event), since)["id"]

    def address(self):
        """What stands behind the #."""
        return self.browser.script("return location.hash")

    def keys(self, *names):
        """Press keys, one after the other, wherever the focus is."""
        for name in names:
            key = self.browser.KEYS.get(name, name)
            self.browser.do("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": [
                {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})

    def hide(self, hidden):
        """As when another tab comes to the front."""
        self.browser.script("Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
                            "document.dispatchEvent(new Event('visibilitychange'))", hidden)

    def streams(self):
        """How many event streams are open."""
        return self.server.manager.loop.call(lambda: sum(channel.kind == "eventsource" for channel in self.server.http.channels))

    # the overview

    def test_every_button_of_a_template(self):
        self.server.add("web", "sleep 1000", numprocesses=2)
        self.server.add("off", "sleep 1000", start=False)
        self.open()
        self.row("web", "2 / 2")
        self.row("off", "stopped")
        self.press("start off")
        self.row("off", "running")
        self.press("stop off")
        self.happened("exit", "off")
        self.row("off", "exited 143 SIGTERM")
        self.press("restart web")
        self.happened("restart", "web")
        self.press("one process more of web")
        self.row("web", "3 / 3")
        self.press("one process less of web")
        self.row("web", "2 / 2")
        self.press("more for web")
        self.choose("Scale…")
        self.browser.keys(self.browser.KEYS["Backspace"] + "4", "#dialog input")
        self.choose("Scale")
        self.row("web", "4 / 4")
        self.assertEqual(self.state("web")["numprocesses"], 4)
        self.press("more for web")
        self.choose("Signal…")
        self.browser.script("document.querySelector('#dialog input').value = 'KILL'")
        self.choose("Send")
        self.row("web", "exited 137 SIGKILL")
        self.press("more for web")
        self.choose("Signal…")
        self.browser.script("document.querySelector('#dialog input').value = 'NONSENSE'")
        self.choose("Send")
        self.shows("'NONSENSE' is no signal", "#message")
        self.click("#message button")
        self.press("more for web")
        self.choose("Delete…")
        self.shows("stops 4 processes (OS pid %s" % self.state("web")["os_pids"][0], "#dialog")
        self.choose("Cancel")
        self.assertIn("web", self.server.ok("GET", "/processes"))
        self.press("more for web")
        self.choose("Delete…")
        self.choose("Delete")
        self.browser.wait("return !document.querySelector('[data-name=web]')")
        self.assertEqual(self.server.ok("GET", "/processes"), ["off"])

    def test_groups_and_what_is_selected(self):
        for name in ("web:a", "web:b", "job:c"):
            self.server.add(name, "sleep 1000")
        self.open()
        self.shows("web: 2 of 2 running")
        self.press("stop group web")
        self.shows("web: 0 of 2 running")
        self.press("start group web")
        self.shows("web: 2 of 2 running")
        self.press("restart group web")
        self.happened("restart", "web:b")
        self.press("select web:a")
        self.press("select group job")
        self.shows("2 selected")
        self.press("stop what is selected")
        self.row("job:c", "stopped")
        self.row("web:a", "stopped")
        self.assertTrue(self.state("web:b")["active"])
        self.press("start what is selected")
        self.row("job:c", "running")
        self.press("restart what is selected")
        self.happened("restart", "job:c")
        self.press("select all shown")
        self.shows("3 selected")
        self.press("more for what is selected")
        self.choose("Delete…")
        self.choose("Delete")
        self.shows("No template yet")

    def test_states_have_their_reasons_and_it_is_filtered_as_one_types(self):
        self.server.add("good", "sleep 1000")
        self.server.add("bad", "sh -c 'exit 3'")
        self.server.add("worse", "sh -c 'kill -9 $$$$'", flapping={"attempts": 2, "window": 5, "retry_in": 60, "max_retry": 5})
        self.open()
        self.row("bad", "backoff")
        self.row("bad", "exited 3")
        self.row("worse", "next try in ")
        self.row("worse", "exited 137 SIGKILL, 2 times · it exits too often")
        self.browser.keys("sigkill", "main input[type=search]")
        visible = "return [...document.querySelectorAll('.template')].filter(row => !row.hidden).map(row => row.dataset.name)"
        self.assertEqual(self.browser.script(visible), ["worse"])
        self.assertEqual(self.address(), "#/?q=sigkill")
        self.click("[data-state=running]")
        self.assertIn("good", self.browser.script(visible))
        self.assertNotIn("worse", self.browser.script(visible))
        self.browser.wait("return document.querySelector('[data-name=good] path').getAttribute('d')")
        self.browser.wait("return document.querySelector('[data-name=good]').textContent.includes('%')")

    # forms

    def test_a_template_is_added_refused_and_edited(self):
        self.open("/add")
        self.click("form button.main")
        self.shows("is required", "#field-name-fault")
        self.shows("is required", "#field-cmd-fault")
        self.browser.keys("new:one", "#field-name")
        self.browser.keys("no-such-program", "#field-cmd")
        self.browser.keys("A=1", "#field-env")
        self.click("form button.main")
        self.shows("names 'no-such-program', which is not found in PATH", "#field-cmd-fault")
        self.assertEqual(self.browser.script("return [document.activeElement.id, document.activeElement.ariaInvalid]"), ["field-cmd", "true"])
        self.browser.script("document.querySelector('#field-cmd').value = 'cat'")
        self.browser.keys("-5", "#field-numprocesses")
        self.click("form button.main")
        self.browser.wait("return document.querySelector('#field-numprocesses-fault').textContent")
        self.browser.script("document.querySelector('#field-numprocesses').value = '2'; document.querySelector('#field-redirect_input').click()")
        self.browser.script("document.querySelector('#field-flapping').value = 'attempts=3 window=2'")
        self.click("form button.main")
        self.shows("new:one")
        info = self.server.ok("GET", "/processes/new:one")
        self.assertEqual((info["cmd"], info["numprocesses"], info["redirect_input"], info["env"], info["flapping"]["attempts"]),
                         ("cat", 2, True, {"A": "1"}, 3))
        self.browser.wait("return location.hash === '#/p/new%3Aone'")
        self.browser.script("location.hash = '#/edit/new%3Aone'")
        self.shows("Saving stops 2 processes")
        self.browser.script("document.querySelector('#field-cmd').value = 'sh'; document.querySelector('#field-args').value = \"-c 'echo a; exec cat'\"")
        self.click("form button.main")
        self.happened("update", "new:one")
        self.assertEqual(dict(self.server.ok("GET", "/processes/new:one"), cmd="cat", args=[]), info)
        self.shows("sh -c 'echo a; exec cat'", ".facts")

    # output

    def test_output_is_text_with_its_colours_and_the_next_process_follows(self):
        pid, = self.server.add("talk", python("""
            import sys
            print("<script>document.title = 'owned'</script><b>bold</b>")
            print("\\x1b[31mred\\x1b[0m \\x1b[1;38;5;208morange\\x1b[m \\x1b[48;2;1;2;3mdeep\\x1b[0m \\x1b[?25l\\x1b]0;title\\x07plain")
            sys.stderr.write("to stderr\\n")
            sys.stdout.write("half a line, ")
            sys.stdout.flush()
            input()
            print("and the rest")
            sys.exit(3)
            """), redirect_input=True)
        self.open("/p/talk")
        self.shows("half a line, ", ".lines")
        lines = self.browser.script(self.LINES)
        self.assertIn("%-11d<script>document.title = 'owned'</script><b>bold</b>" % pid, lines)
        self.assertEqual(self.browser.script("return [document.title, document.querySelectorAll('.l script, .l b').length]"), ["talk – gaffer", 0])
        self.assertEqual(self.browser.script(
            "const all = [...document.querySelectorAll('.l span')], of = text => all.find(node => node.textContent === text);"
            "return [getComputedStyle(of('red')).color, of('orange').className, of('orange').style.color, of('deep').style.background]"),
            ["rgb(180, 35, 24)", "b", "rgb(255, 135, 0)", "rgb(1, 2, 3)"])
        self.assertTrue(any(line.endswith("red orange deep plain") for line in lines), lines)
        self.assertEqual(self.browser.script("return [...document.querySelectorAll('.l.stderr')].map(node => node.textContent.slice(7))"), ["err to stderr"])
        self.browser.keys("go on" + self.browser.KEYS["Enter"], ".entry input")
        self.shows("half a line, and the rest")
        self.shows("process %d exited 3" % pid)
        self.browser.wait("return document.querySelectorAll('.l.exit').length === 1 && "
                          "[...document.querySelectorAll('.l')].filter(node => node.textContent.includes('owned')).length === 2")

    def numbers(self, count, more="input()"):
        """A template that prints numbered lines, and then does what `more` says."""
        return self.server.add("count", python("for n in range(%d): print('line', n)\n%s" % (count, more)), redirect_input=True)

    def test_find_filter_pause_and_the_rest(self):
        self.numbers(300, "for line in iter(input, 'end'): print(line)")
        self.open("/p/count")
        self.shows("line 299", ".lines")
        browser = self.browser
        browser.keys("LINE 299", '[aria-label="Find"]')         # capitals are meant
        self.shows("0 lines", "section .bar")
        browser.script("const node = document.querySelector('[aria-label=Find]'); node.value = 'line 29'; node.dispatchEvent(new Event('input'))")
        browser.wait("return [...document.querySelectorAll('.here mark')].map(node => node.textContent).join() === 'line 29'")
        self.shows("11 lines", "section .bar")
        self.assertEqual(browser.script("return document.querySelector('.here').textContent.trim().slice(-8)"), "line 299")
        self.press("previous match (N)")
        self.assertEqual(browser.script("return document.querySelector('.here').textContent.slice(-8)"), "line 298")
        self.press("next match (n)")
        self.press("next match (n)")
        self.assertEqual(browser.script("return document.querySelector('.here').textContent.slice(-7)"), "line 29")
        browser.keys("7$", '[aria-label="Filter by regular expression"]')
        browser.wait("return [...document.querySelectorAll('.l')].every(node => node.textContent.endsWith('7')) && document.querySelectorAll('.l').length > 9")
        browser.keys("(", '[aria-label="Filter by regular expression"]')
        self.shows("Unterminated group", "#fault")
        browser.script("for (const node of document.querySelectorAll('main .bar input')) { node.value = ''; node.dispatchEvent(new Event('input')); }")
        self.press("pause (space)")
        browser.keys("after the pause" + browser.KEYS["Enter"], ".entry input")
        self.shows("Paused: 2 new lines", ".more")
        browser.click(".more")
        self.shows("after the pause", ".lines")
        browser.script("document.querySelector('.lines').scrollTop = 0")
        browser.wait("return document.querySelector('.l').textContent.endsWith('line 0')")
        browser.keys("unseen" + browser.KEYS["Enter"], ".entry input")
        self.shows("2 new lines", ".more")
        self.assertNotIn("unseen", browser.script(self.LINES)[-1])
        browser.click(".more")
        self.shows("unseen", ".lines")
        self.press("timestamps (t)")
        browser.wait("return /^\\d\\d:\\d\\d:\\d\\d\\.\\d{3} /.test(document.querySelector('.l').textContent)")
        browser.script("document.querySelector('.entry input').value = 'x'.repeat(2000)")
        browser.keys(browser.KEYS["Enter"], ".entry input")
        self.press("wrap (w)")
        browser.wait("const long = [...document.querySelectorAll('.l')].filter(node => node.textContent.length > 2000);"
                     "return long.length === 2 && long.every(node => node.clientHeight >= 10 * 18)")
        self.assertEqual(self.address(), "#/p/count?time=1&wrap=1")
        browser.script("window.saved = []; URL.createObjectURL = blob => { saved.push(blob); return 'data:,'; };"
                       "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async text => saved.push(text)}})")
        self.press("copy")
        self.press("download")
        text, blob = browser.wait("return saved.length === 2 && Promise.all([saved[0], saved[1].text()])")
        self.assertEqual(text, blob)
        self.assertIn(" line 123\n", text)
        browser.script("document.querySelector('main select').value = 'stderr'; document.querySelector('main select').dispatchEvent(new Event('change'))")
        browser.wait("return [...document.querySelectorAll('.l')].every(node => !/ line/.test(node.textContent))")

    def test_input_with_history_and_the_end_of_file(self):
        pid, = self.server.add("echo", "cat", redirect_input=True)
        self.server.add("deaf", "sleep 1000")
        self.open("/p/echo")
        browser, field = self.browser, ".entry input"
        browser.wait("return !document.querySelector(arguments[0]).disabled", field)
        for text in ("first", "second <b>"):
            browser.keys(text + browser.KEYS["Enter"], field)
            browser.wait("return [...document.querySelectorAll('.l')].filter(node => node.textContent.endsWith(arguments[0])).length === 2", text)
        browser.keys(browser.KEYS["ArrowUp"] * 2, field)
        self.assertEqual(browser.script("return document.querySelector(arguments[0]).value", field), "first")
        browser.keys(browser.KEYS["ArrowDown"], field)
        self.assertEqual(browser.script("return document.querySelector(arguments[0]).value", field), "second <b>")
        self.press("close its stdin")
        self.happened("exit", "echo")
        self.shows("process %d exited 0" % pid, ".lines")
        self.open("/p/deaf")
        self.shows("stdin is not redirected: edit it, set redirect_input", ".entry")
        self.assertTrue(browser.script("return document.querySelector(arguments[0]).disabled", field))

    def test_one_process_of_several_and_all_of_everything(self):
        first, second = self.server.add("pair", python("import os\nprint('I am', os.getpid())\ninput()"), numprocesses=2, redirect_input=True)
        self.server.add("other", "sh -c 'echo other; exec sleep 1000'")
        self.open("/logs")
        self.shows("other.3", ".lines")
        self.browser.wait("return document.querySelectorAll('.l').length === 3")
        self.browser.script("location.hash = '#/p/pair'")
        self.click('.part a[href="#/i/pair/%d"]' % second)
        self.shows("I am %d" % self.server.ok("GET", "/processes/%d" % second)["os_pid"], ".lines")
        until(lambda: len(self.browser.script(self.LINES)) == 1, "the view of the one alone")
        self.press("signal process %d" % second)
        self.browser.script("document.querySelector('#dialog input').value = 'KILL'")
        self.choose("Send")
        self.shows("process %d exited 137 SIGKILL" % second, ".lines")
        self.shows("this process has ended")
        self.browser.wait("return document.querySelector('#link').textContent === 'live'")
        self.assertEqual(self.streams(), 1, "nothing more is to come from it")
        self.open("/i/pair/77")
        self.shows("there is no process 77", "#message")
        self.browser.wait("return document.querySelector('#link').textContent === 'live'")
        self.browser.console()
        self.browser.script("location.hash = '#/p/pair'")
        self.browser.wait("return document.querySelectorAll('.part').length === 2")
        self.press("stop process %d; it is replaced" % first)
        self.shows("process %d exited 143 SIGTERM" % first, ".lines")

    def test_after_a_cut_it_goes_on_without_gap_or_repeat(self):
        """Four times, in the middle of what comes, both where the page is in time and where it is behind."""
        pid, = self.server.add("count", python("""
            import time
            input()
            for part in range(100):
                print("\\n".join("line %d" % number for number in range(100 * part, 100 * part + 100)), flush=True)
                time.sleep(0.01)
            print("end")
            input()
            """), redirect_input=True)
        self.open("/p/count")
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")

        def cut():
            for channel in list(self.server.http.channels):
                if channel.kind == "eventsource":
                    channel.close()
        for number in (500, 2500, 5000, 9000):
            self.browser.wait("return [...document.querySelectorAll('.l')].some(node => parseInt(node.textContent.slice(16)) > arguments[0])", number)
            self.server.manager.loop.call(cut)
        self.browser.wait("return [...document.querySelectorAll('.l')].some(node => node.textContent.endsWith(' end'))")
        text = self.copied()
        self.assertEqual(re.findall("line ([0-9]+)\n", text), [str(number) for number in range(10000)])
        self.assertEqual(text.count("\n"), 10001, "and nothing else was said")
        self.browser.wait("return document.querySelector('#link').textContent === 'live'")

    def copied(self):
        """What the page copies: all lines that it shows, in sight or not."""
        self.browser.script("window.saved = []; Object.defineProperty(navigator, 'clipboard', {configurable: true,"
                            " value: {writeText: async text => saved.push(text)}})")
        self.press("copy")
        return self.browser.wait("return saved[0]")

    def test_a_restarted_server_is_found_again(self):
        first = Running()
        first.add("talk", "sh -c 'echo first; exec sleep 1000'")
        port = first.port
        try:
            self.open("/p/talk", first)
            self.shows("first", ".lines")
        finally:
            first.stop_all()
        self.shows("reconnecting", "#link")
        self.browser.console()                      # that nobody answers is in it
        second = Running(endpoints=[gaffer.HttpEndpoint("127.0.0.1:%d" % port)])
        self.addCleanup(second.stop_all)
        second.add("talk", "sh -c 'echo second; exec sleep 1000'")
        self.browser.wait("return document.querySelector('#link').textContent === 'live'")
        self.shows("second", ".lines")
        lines = [line.strip() for line in self.browser.script(self.LINES)]
        self.assertEqual([re.sub(r"^1 +", "", line) for line in lines if "exited" not in line], ["first", "the server was started anew", "second"])
        self.browser.script("location.hash = '#/'")
        self.row("talk", "running")

    def test_what_fell_out_of_the_window_is_told_in_its_place(self):
        server = Running(window=4096)
        self.addCleanup(server.stop_all)
        pid, = server.add("flood", python("print('begin')\ninput()\nfor n in range(9999): print(n)\nprint('end')\ninput()"), redirect_input=True)
        self.open("/p/flood", server)
        self.shows("begin", ".lines")
        self.hide(True)
        server.request("POST", "/streams/%d/stdin" % pid, b"\n")
        until(lambda: b"end" in server.request("GET", "/streams/flood/stdout?tail=1&timeout=0")[2], "the end")
        self.hide(False)
        self.shows("9998", ".lines")
        self.browser.script("const node = document.querySelector('[aria-label^=Filter]'); node.value = 'begin|lost'; node.dispatchEvent(new Event('input'))")
        said = self.browser.wait("const all = [...document.querySelectorAll('.l')].map(node => node.textContent.trim()); return all.length === 2 && all")
        self.assertRegex(said[0], "begin$")
        self.assertRegex(said[1], "^4[0-9],[0-9]{3} bytes were lost here$")

    def test_a_hundred_thousand_lines(self):
        """They are all there, a hundred of them in the document, and a new line costs as little as with ten."""
        server = Running(window=8 * gaffer.MIB)
        self.addCleanup(server.stop_all)
        pid, = server.add("many", python("import sys\nprint('begin')\ninput()\nsys.stdout.write(''.join('line %d\\n' % n for n in range(100500)))\ninput()"),
                          redirect_input=True)
        self.open("/p/many", server)
        self.shows("begin", ".lines")
        server.request("POST", "/streams/%d/stdin" % pid, b"\n")
        browser = self.browser
        self.shows("line 100499", ".lines")
        self.assertLess(browser.script("return document.querySelectorAll('*').length"), 500)
        height = browser.script("return document.querySelector('.lines').scrollHeight / 18")
        self.assertTrue(99999 <= height <= 101010, height)
        browser.script("document.querySelector('.lines').scrollTop = 50000 * 18")
        browser.wait("return document.querySelectorAll('.l').length > 20 && /line [45]\\d{4}$/.test(document.querySelector('.l').textContent)")
        browser.script("const node = document.querySelector('[aria-label=Find]'); node.value = 'line 77777'; node.dispatchEvent(new Event('input'))")
        browser.wait("const node = document.querySelector('.here'); return node && node.textContent.endsWith('line 77777')")
        self.assertEqual(browser.console(), [])

    def test_three_hundred_processes(self):
        """The first paint has them all."""
        for number in range(300):
            self.server.manager.add_process("g%d:sleeper-%d" % (number // 60, number), "sleep 1000")
        self.browser.cdp("Network.enable")
        self.browser.cdp("Network.setBlockedURLs", urls=["*/status*", "*/stats*", "*/watch*"])
        self.addCleanup(self.browser.cdp, "Network.setBlockedURLs", urls=[])
        self.browser.get("about:blank")
        self.browser.get(self.server.url + "/")
        counts = self.browser.script("return [document.querySelectorAll('.template').length, document.querySelectorAll('.group').length]")
        self.assertEqual(counts, [300, 5])
        paint = self.browser.wait("const [paint] = performance.getEntriesByName('first-contentful-paint'); return paint && paint.startTime")
        self.assertLess(paint, 3000)
        self.browser.cdp("Network.setBlockedURLs", urls=[])
        self.browser.console()
        self.open()
        self.shows("running 300")
        self.press("stop group g4")
        self.shows("g4: 0 of 60 running")
        self.shows("stopped 60")

    # how it is used

    def test_a_phone(self):
        self.server.add("web:server", "sleep 1000")
        self.server.add("bad", "sh -c 'echo out of luck >&2; exit 3'")
        self.browser.size(390, 844, mobile=True)
        self.open("/logs")
        for path in ("/", "/p/bad", "/logs", "/events", "/add", "/edit/bad"):
            self.go(path)
            self.assertEqual(self.browser.script(
                "return [document.documentElement.scrollWidth, document.querySelector('main').scrollWidth <= innerWidth, ...[...document.querySelectorAll("
                "'main button, main input')].filter(node => node.offsetParent && node.getBoundingClientRect().right > innerWidth + 1).map(node => node.outerHTML)]"),
                [390, True], path)
        self.go("/")
        self.press("stop web:server")
        self.row("web:server", "stopped")

    def test_the_keyboard_alone(self):
        for name in ("one", "two"):
            self.server.add(name, "cat", redirect_input=True)
        self.open()
        self.keys("?")
        self.shows("these keys", "#dialog")
        self.keys("Escape")
        self.browser.wait("return !document.querySelector('#dialog').open")
        self.keys("j", "j")
        self.browser.wait("return document.activeElement.dataset.name === 'two'")
        self.keys("t")
        self.row("two", "stopped")
        self.keys("s")
        self.row("two", "running")
        self.keys("+")
        self.row("two", "2 / 2")
        self.keys("-")
        self.row("two", "1 / 1")
        self.keys("r")
        self.happened("restart", "two")
        self.keys("x")
        self.shows("1 selected")
        self.keys("m", "ArrowDown", "ArrowUp", "Escape")
        self.browser.wait("return document.querySelector('#menu').hidden && document.activeElement.getAttribute('aria-label') === 'more for two'")
        self.keys("k")
        self.browser.wait("return document.activeElement.dataset.name === 'one'")
        self.keys("Enter")
        self.browser.wait("return location.hash === '#/p/one' && document.querySelector('.entry input') && !document.querySelector('.entry input').disabled")
        self.keys("i", "h", "Enter")
        self.shows("> h", ".lines")
        self.keys("Escape", "f", "x", "Escape", "/", "h", "Escape", " ", "w", "t")
        self.browser.wait("return location.hash === '#/p/one?find=x&filter=h&wrap=1&time=1'")
        self.shows("Paused", ".more")
        self.keys("End", "Delete")
        self.shows("Delete one?", "#dialog")
        self.keys("Tab", "Enter")
        self.browser.wait("return location.hash === '#/' && !document.querySelector('[data-name=one]')")
        self.keys("e")
        self.shows("deleted", ".events")
        self.keys("Escape", "o")
        self.browser.wait("return location.hash === '#/logs'")
        self.keys("Escape", "a")
        self.browser.wait("return document.activeElement.id === 'field-name'")

    def test_what_can_be_used_has_a_name_for_who_hears_it(self):
        """In the tree that a screen reader gets, of each view; and a view has one heading of the first level."""
        used = {"button", "checkbox", "textbox", "searchbox", "combobox", "ComboBoxMenuSelect", "spinbutton", "link", "log", "table", "menuitem"}
        self.server.add("web:a", "cat", redirect_input=True, numprocesses=2)
        self.open("/logs")
        for path in ("/", "/p/web%3Aa", "/i/web%3Aa/1", "/logs", "/events", "/add", "/edit/web%3Aa"):
            self.go(path)
            self.browser.wait("return document.querySelector('main').textContent.length > 20")
            nodes = [node for node in self.browser.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
            nameless = [node for node in nodes if node["role"]["value"] in used and not node["name"]["value"]]
            self.assertEqual(nameless, [], path)
            self.assertGreater(len([node for node in nodes if node["role"]["value"] in used]), 5, path)
            self.assertEqual(self.browser.script("return document.querySelectorAll('h1').length"), 1, path)

    def test_events_say_what_happened_and_why(self):
        self.server.add("bad", "sh -c 'exit 3'")
        self.happened("exit", "bad")
        self.open("/events")
        self.shows("as process 1 had exited 3", ".events")
        self.shows("exited 3 after", ".events")
        self.server.ok("POST", "/processes/bad/_stop")
        self.shows("stopped", ".events")
        pid, = self.server.add("one", "sleep 1000")
        self.server.ok("POST", "/processes/%d/_stop" % pid)
        self.happened("spawn", "one", self.happened("exit", "one"))
        self.shows("started in place of process %d" % pid, ".events")
        self.server.ok("POST", "/processes/one/_restart")
        self.shows("is told to stop: the template was restarted", ".events")
        self.server.add("flap", "false", flapping={"attempts": 2, "window": 5, "retry_in": 0.05, "max_retry": 1})
        self.shows("rests: it exits too often", ".events")
        self.shows("stopped: it exits too often", ".events")
        self.server.add("good", "sleep 1000", numprocesses=2)
        self.server.ok("POST", "/processes/good/_sub")
        self.shows("is told to stop: fewer are wanted", ".events")
        self.shows("SIGTERM after", ".events")
        self.shows("as it was told to", ".events")
        self.browser.keys("good", "main input[type=search]")
        self.browser.wait("return [...document.querySelectorAll('.events li')].every(item => item.hidden || item.textContent.includes('good'))")
        self.assertEqual(self.address(), "#/events?q=good")

    def test_links_and_the_way_back(self):
        self.server.add("web:a", "sleep 1000")
        self.open("/?q=web")
        self.click("main .template a")
        self.browser.wait("return location.hash === '#/p/web%3Aa'")
        self.browser.script("history.back()")
        self.browser.wait("return location.hash === '#/?q=web' && document.querySelector('main input[type=search]').value === 'web'")
        self.browser.script("history.forward()")
        self.shows("web:a", "h1")
        self.assertEqual(self.browser.script("return document.title"), "web:a – gaffer")
        self.open("/p/nobody")
        self.shows("there is no template of this name")

    def test_it_needs_no_more_than_two_streams_and_none_when_it_is_hidden(self):
        self.server.add("talk", "sh -c 'echo hello; exec sleep 1000'")
        self.open("/p/talk")
        self.shows("hello", ".lines")
        self.assertEqual(self.streams(), 2)
        self.hide(True)
        until(lambda: self.streams() == 0, "no stream")
        self.server.ok("POST", "/processes/talk/_restart?wait=true")
        self.hide(False)
        self.browser.wait("return [...document.querySelectorAll('.l')].filter(node => node.textContent.endsWith('hello')).length === 2")
        self.assertEqual(self.streams(), 2)

    def test_a_template_goes_and_comes_again(self):
        self.server.add("talk", "sh -c 'echo first; exec sleep 1000'")
        self.open("/p/talk")
        self.shows("first", ".lines")
        self.server.ok("DELETE", "/processes/talk")
        self.shows("there is no template of this name")
        until(lambda: self.streams() == 1, "its stream has ended")
        self.server.add("talk", "sh -c 'echo second; exec sleep 1000'")
        self.shows("second", ".lines")
        self.shows("running")
        self.open("/p/%")                           # an address with a fault in it
        self.shows("there is no template of this name")

    def test_under_a_token(self):
        server = Running(token="correct horse")
        self.addCleanup(server.stop_all)
        headers = {"Authorization": "Bearer correct horse"}
        self.assertEqual(server.request("POST", "/processes", {"name": "talk", "cmd": "sh -c 'echo hello; exec sleep 1000'"}, headers)[0], 200)
        status, answered, data = server.request("GET", "/", headers={"Accept": "text/html"})     # what is read after "Cancel"
        self.assertEqual((status, answered["WWW-Authenticate"][:5], answered["Content-Type"]), (401, "Basic", "text/html; charset=utf-8"))
        self.assertIn(b"give the token as the password", data)
        self.browser.get("http://any:correct%%20horse@127.0.0.1:%d/#/p/talk" % server.port)
        self.shows("hello", ".lines")
        self.press("stop talk")
        self.shows("stopped")
        self.assertEqual(self.browser.script("return document.cookie + localStorage.length + sessionStorage.length"), "00")
        self.assertEqual(self.browser.console(), [])

    def test_nothing_foreign_runs_in_it(self):
        self.open()
        self.browser.script("window.ran = 0; const node = document.createElement('div'); document.body.append(node);"
                            "node.innerHTML = '<img src=x onerror=\"ran = 1\"><a style=\"color: red\" href=\"javascript:ran=2\">x</a>';"
                            "const made = document.createElement('script'); made.textContent = 'ran = 3'; document.body.append(made); node.querySelector('a').click()")
        self.assertEqual(self.browser.script("return fetch('http://localhost:1/').catch(error => ran)"), 0)
        self.assertGreater(len([line for line in self.browser.console() if "Content Security Policy" in line]), 2)

    def test_its_picture_can_be_taken(self):
        """`WRITE_PICTURE=1 python3 test_gaffer.py BrowserPage.test_its_picture_can_be_taken` writes examples/page.png."""
        work = "import time\nwhile True:\n    end = time.time() + %g\n    while time.time() < end: pass\n    time.sleep(%g)"
        self.server.add("web:front", python(work % (.03, .1)), numprocesses=4)
        self.server.add("web:api", python("x = [0] * 4000000\n" + work % (.1, .3)), numprocesses=2)
        self.server.add("web:worker", "sh -c 'echo cannot reach the database >&2; exit 3'")
        self.server.add("jobs:mail", "sleep 1000")
        self.server.add("jobs:nightly", "sleep 1000", start=False)
        self.server.add("jobs:import", "sh -c 'kill -9 $$$$'", flapping={"attempts": 2, "window": 5, "retry_in": 60, "max_retry": 5})
        self.browser.size(1280, 390)
        self.open()
        self.row("jobs:import", "flapping")
        samples = 58 if os.environ.get("WRITE_PICTURE") else 2
        self.browser.script("setInterval(poll, 250)")       # two minutes would be long
        self.browser.wait("return document.querySelector('path').getAttribute('d').split('L').length >= arguments[0]", samples)
        picture = self.browser.screenshot()
        self.assertEqual(picture[:8], b"\x89PNG\r\n\x1a\n")
        self.assertLess(len(picture), 150000)
        if os.environ.get("WRITE_PICTURE"):
            with open(os.path.join(HERE, "examples", "page.png"), "wb") as file:
                file.write(picture)


@unittest.skipUnless("--figures" in sys.argv, "only with --figures")
class BrowserFigures(BrowserCase):
    """What the web page costs, measured and printed."""

    patience = 20 * TIMEOUT
    options = {"window": 8 * gaffer.MIB}

    def tell(self, text, *values):
        """Print a figure."""
        print(text % values, flush=True)

    def open(self, path):
        """Load the page, and wait until it is live."""
        self.browser.size(1280, 800)
        self.browser.get("about:blank")
        self.browser.get("%s/#%s" % (self.server.url, path))
        self.browser.wait("return document.querySelector('#link').textContent === 'live'")

    def pass_time(self, seconds):
        """Let the page run for a while; how many frames it has drawn, and the longest pause between two, in seconds."""
        return self.browser.script(
            "const end = performance.now() + 1000 * arguments[0]; let frames = 0, longest = 0, last = performance.now();"
            "return new Promise(resolve => requestAnimationFrame(function frame(now) {"
            "  longest = Math.max(longest, now - last); last = now; frames++;"
            "  if (now < end) requestAnimationFrame(frame); else resolve([frames, longest / 1000]); }))", seconds)

    def lines(self, name, rate, total, ahead=0):
        """A template that prints `total` lines of 60 bytes, so many a second and some `ahead` of them, once it is told to."""
        return self.server.add(name, python("""
            import sys, time
            input()
            began, done = time.monotonic(), 0
            while done < %d:
                due = min(%d, %d + int((time.monotonic() - began) * %d))
                sys.stdout.write("".join("%%09d %%s\\n" %% (number, "x" * 49) for number in range(done, due)))
                done = due
                time.sleep(0.01)
            print("end")
            input()
            """ % (total, total, ahead, rate)), redirect_input=True)[0]

    def test_frames_while_5000_lines_a_second_arrive(self):
        seconds, ahead = 10, 110000                 # so that as many lines go as come
        pid = self.lines("fast", 5000, ahead + 5000 * (seconds + 1), ahead)
        self.open("/p/fast")
        self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")
        self.browser.wait("return [...document.querySelectorAll('.l')].some(node => Number(node.textContent.slice(10, 20)) >= arguments[0])", ahead + 10)
        frames, longest = self.pass_time(seconds)
        self.tell("%.1f frames a second while 5,000 lines a second arrive, the longest pause %.0f ms", frames / seconds, 1000 * longest)
        self.assertGreater(frames / seconds, 20)
        self.browser.wait("return [...document.querySelectorAll('.l')].some(node => node.textContent.endsWith(' end'))")
        self.assertEqual(self.browser.script("return document.querySelectorAll('.note').length"), 0, "nothing was lost")

    def test_memory_is_bounded(self):
        totals = (200000, 800000)
        self.open("/p/none")
        used, empty = [], self.memory()
        for number, total in enumerate(totals):
            name = "many%d" % number
            pid = self.lines(name, 25000, total)
            if not number:
                self.browser.script("location.hash = '#/logs'")
            self.browser.wait("return document.querySelector('.lines')")
            self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")
            self.wait_long("return [...document.querySelectorAll('.l')].some(node => /%s.* end$/.test(node.textContent))" % name)
            used.append(self.memory())
            self.tell("%.1f MiB of memory of the tab, %.1f of them since it began, and %d elements after %d lines", used[-1], used[-1] - empty,
                      self.browser.script("return document.querySelectorAll('*').length"), sum(totals[:number + 1]))
        self.assertLess(max(used) - empty, 150)
        self.assertLess(used[1] - empty, 1.5 * (used[0] - empty))

    def memory(self):
        """MiB that the process of the tab has for itself: the lines are kept outside of JavaScript's heap."""
        self.browser.cdp("HeapProfiler.collectGarbage")
        found = [0]
        for pid in self.browser._processes():
            with contextlib.suppress(OSError), open("/proc/%d/cmdline" % pid, "rb") as command, open("/proc/%d/smaps_rollup" % pid) as rollup:
                if b"--type=renderer" in command.read():
                    found.append(sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")))
        return max(found) / 1024

    def wait_long(self, js):
        """Wait for what takes more than TIMEOUT."""
        for _ in range(10):
            with contextlib.suppress(AssertionError):
                return self.browser.wait(js)
        self.fail(js)

    def test_three_hundred_processes(self):
        for number in range(300):
            self.server.manager.add_process("g%d:sleeper-%d" % (number // 60, number), "sleep 1000")
        paints = []
        for _ in range(7):
            self.open("/")
            paints.append(self.browser.wait("const [paint] = performance.getEntriesByName('first-contentful-paint'); return paint && paint.startTime"))
        self.tell("first paint of 300 processes: %.0f ms, median of %d loads (%.0f to %.0f)", sorted(paints)[len(paints) // 2], len(paints),
                  min(paints), max(paints))
        self.pass_time(3)
        before = time.process_time()
        frames, _ = self.pass_time(20)
        self.tell("%.2f %% of a core for the server while one page shows 300 processes", 5 * (time.process_time() - before))
        self.browser.get("about:blank")
        before = time.process_time()
        self.pass_time(10)
        self.tell("%.2f %% without a page", 10 * (time.process_time() - before))
        page = self.server.request("GET", "/", headers={"Accept": "text/html", "Accept-Encoding": "gzip"})[2]
        stats = self.server.request("GET", "/stats?brief=true", headers={"Accept-Encoding": "gzip"})[2]
        self.tell("the page with its data is %.1f KiB as gzip, each look at the statistics %.1f KiB", len(page) / 1024, len(stats) / 1024)


class BrowserMisuse(BrowserCase):
    """What a page of another site may try with a server on this machine: it changes nothing, and learns nothing. Beside each
    attempt stands the same from a page that may, or a test that cannot fail would be easy to write."""

    SECRET = "window.leaked = 'secret'"
    ASK = """
        const [url, options] = arguments;
        return fetch(url, options).then(answer => answer.text().then(text => [answer.type, answer.status, text]),
                                        error => [error.name, 0, '']);"""
    FORM = """
        const [url, enctype, fields] = arguments, frame = document.createElement('iframe'), form = document.createElement('form');
        frame.name = 'answer';
        Object.assign(form, {method: 'post', action: url, enctype, target: 'answer'});
        for (const [name, value] of fields)
            form.append(Object.assign(document.createElement('input'), {type: 'hidden', name, value}));
        document.body.replaceChildren(frame, form);
        return new Promise(done => { frame.onload = () => done('loaded'); form.submit(); });"""
    SOCKET = """
        const [url] = arguments, socket = new WebSocket(url);
        return new Promise(done => {
            socket.onopen = () => socket.send('typed\\n');
            socket.onmessage = event => { socket.close(); done(event.data); };
            socket.onclose = event => done(event.code); });"""
    SOURCE = """
        const [url] = arguments, source = new EventSource(url);
        const told = new Promise(done => {
            source.addEventListener('stdout', event => done(event.data));
            source.onerror = event => done('refused'); });
        return told.then(what => { source.close(); return what; });"""
    LOAD = """
        const [kind, attribute, url] = arguments, element = document.createElement(kind);
        element.rel = 'stylesheet';
        element[attribute] = url;
        return new Promise(done => {
            element.onload = () => done('loaded'); element.onerror = element.onstalled = () => done('refused');
            document.body.append(element); });"""

    @staticmethod
    def page(request):
        """Any page of any site."""
        return 200, {"Content-Type": "text/html"}, "<!doctype html><meta charset=utf-8><title>a page</title><body>"

    def setUp(self):
        super().setUp()
        self.site = Running(handlers=[("/page", self.page)], allow_hosts=["evil.example"])
        self.addCleanup(self.site.stop_all)
        self.evil, self.friend = ("http://%s:%d/page" % (host, self.site.port) for host in ("evil.example", "localhost"))
        self.pids = (self.server.add("typed", "cat", redirect_input=True) + self.server.add("talks", python("""
            print(%r, flush=True); input()""" % self.SECRET), redirect_input=True))
        self.server.ok("GET", "/status/talks")
        self.assertIn("leaked", self.server.request("GET", "/streams/%d/stdout?since=0" % self.pids[1])[2].decode())

    def url(self, path, scheme="http"):
        """Of the server that is attacked."""
        return "%s://127.0.0.1:%d%s" % (scheme, self.server.port, path)

    def count(self, method, status, server=None):
        """How many requests a server has answered so."""
        counts = (server or self.server).http.requests.samples()
        return sum(count for labels, count in counts if labels == {"method": method, "code": status})

    def assertUntouched(self):
        """All is as setUp() has left it."""
        server = self.server
        self.assertEqual(server.ok("GET", "/processes"), ["typed", "talks"])
        self.assertEqual(server.ok("GET", "/processes?running=1"), self.pids)
        self.assertEqual(server.request("GET", "/streams/%d/stdout?since=0&timeout=0" % self.pids[0])[2], b"")
        self.assertEqual([server.ok("GET", "/status/" + name)["numprocesses"] for name in ("typed", "talks")], [1, 1])

    CHANGES = (("POST", "/processes"), ("POST", "/processes/typed/_stop"), ("POST", "/processes/typed/_restart"),
               ("POST", "/processes/typed/_add/3"), ("POST", "/processes/typed/_signal/KILL"), ("POST", "/streams/1/stdin"),
               ("POST", "/_reload"))
    # which text/plain makes JSON of
    TEMPLATE = [['{"name": "planted", "cmd": "true", "args": ["', '"]}']]

    def test_forms(self):
        self.browser.get(self.evil)
        for enctype in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            for _, path in self.CHANGES if enctype == "text/plain" else self.CHANGES[:2]:
                with self.subTest(enctype=enctype, path=path):
                    before = self.count("POST", 403)
                    self.assertEqual(self.browser.script(self.FORM, self.url(path), enctype, self.TEMPLATE), "loaded")
                    self.assertEqual(self.count("POST", 403), before + 1)
        self.assertUntouched()
        self.browser.get(self.friend)
        self.browser.script(self.FORM, self.url("/processes"), "text/plain", self.TEMPLATE)
        self.assertEqual(self.server.ok("GET", "/processes"), ["typed", "talks", "planted"])

    def test_requests_that_need_no_preflight(self):
        self.browser.get(self.evil)
        planted = {"method": "POST", "body": json.dumps({"name": "planted", "cmd": "true"}), "headers": {"Content-Type": "text/plain"}}
        for mode in ("no-cors", "cors"):
            for method, path in self.CHANGES:
                with self.subTest(mode=mode, path=path):
                    before = self.count(method, 403)
                    answer = self.browser.script(self.ASK, self.url(path), dict(planted, mode=mode, credentials="include"))
                    self.assertEqual(answer, ["opaque", 0, ""] if mode == "no-cors" else ["TypeError", 0, ""])
                    self.assertEqual(self.count(method, 403), before + 1)
        self.browser.script("navigator.sendBeacon(arguments[0], 'typed')", self.url("/streams/1/stdin"))
        until(lambda: self.count("POST", 403) == before + 2, "the beacon")
        self.assertUntouched()
        self.browser.get(self.friend)
        self.assertEqual(self.browser.script(self.ASK, self.url("/processes"), dict(planted, mode="cors"))[:2], ["cors", 200])
        self.assertEqual(self.server.ok("GET", "/processes"), ["typed", "talks", "planted"])

    def test_requests_with_a_preflight(self):
        self.browser.get(self.evil)
        asked = {"method": "PUT", "body": '{"cmd": "true"}', "headers": {"Content-Type": "application/json"}}
        attempts = (asked, {"method": "DELETE"}, {"method": "POST", "headers": {"X-HTTP-Method-Override": "DELETE"}})
        for options in attempts:
            self.assertEqual(self.browser.script(self.ASK, self.url("/processes/typed"), options), ["TypeError", 0, ""])
        self.assertEqual((self.count("OPTIONS", 204), self.count("PUT", 403), self.count("DELETE", 403)), (3, 0, 0))
        self.assertUntouched()
        self.browser.get(self.friend)
        for options in attempts[:2]:
            self.assertEqual(self.browser.script(self.ASK, self.url("/processes/typed"), options)[:2], ["cors", 200])
        self.assertEqual(self.server.ok("GET", "/processes"), ["talks"])

    def test_reading(self):
        paths = ["/processes", "/processes/typed", "/streams/2/stdout?tail=all", "/metrics", "/", "/stats", "/watch?since=0"]
        self.browser.get(self.evil)
        for path in paths:
            with self.subTest(path=path):
                self.assertEqual(self.browser.script(self.ASK, self.url(path)), ["TypeError", 0, ""])
                self.assertEqual(self.browser.script(self.ASK, self.url(path), {"mode": "no-cors"}), ["opaque", 0, ""])
        stream = "/streams/2/stdout?tail=all&feed=eventsource"
        self.assertEqual(self.browser.script(self.SOURCE, self.url(stream)), "refused")
        self.browser.get(self.friend)
        for path in paths:
            self.assertEqual(self.browser.script(self.ASK, self.url(path))[:2], ["cors", 200])
        self.assertEqual(self.browser.script(self.SOURCE, self.url(stream)), self.SECRET)

    def test_websockets(self):
        sockets = [self.url(path, "ws") for path in ("/wstreams/1", "/wstreams/2?tail=all&readonly=true")]
        self.browser.get(self.evil)
        for url in sockets:
            self.assertEqual(self.browser.script(self.SOCKET, url), 1006)
        self.assertEqual(self.count("GET", 403), 2)
        self.assertUntouched()
        self.browser.get(self.friend)
        self.assertEqual([self.browser.script(self.SOCKET, url) for url in sockets], ["typed\n", self.SECRET + "\n"])

    def test_what_a_page_may_embed(self):
        """An image, a script, a style sheet or a frame is asked for without an Origin."""
        self.browser.get(self.evil)
        for kind, attribute in (("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("object", "data"),
                                ("embed", "src"), ("audio", "src")):
            for path in ("/processes/typed/_stop", "/processes/typed", "/processes/nobody", "/streams/2/stdout?tail=all", "/"):
                with self.subTest(kind=kind, path=path):
                    before = self.count("GET", 403)
                    said = self.browser.script(self.LOAD, kind, attribute, self.url(path))
                    self.assertEqual(said, "loaded" if kind in ("iframe", "embed") else "refused")    # whatever there is
                    self.assertEqual(self.count("GET", 403), before + 1)
                    self.assertIsNone(self.browser.script("return window.leaked"))
        self.assertUntouched()

    def test_a_page_of_another_site_does_not_hold_a_process(self):
        """loss=block lets a process wait for its reader; a page that asks, and does not read, would stop it."""
        self.browser.get(self.evil)
        path = "/streams/2/stdout?feed=continuous&loss=block"
        self.assertEqual(self.browser.script(self.ASK, self.url(path), {"mode": "no-cors"}), ["opaque", 0, ""])
        self.assertEqual((self.count("GET", 403), self.server.ok("GET", "/processes")), (1, ["typed", "talks"]))

    def test_frames_and_windows(self):
        self.browser.get(self.friend.replace("localhost", "127.0.0.1"))     # of the same site, which alone would let it in
        self.browser.script(self.LOAD, "iframe", "src", self.url("/"))
        frame = self.browser.cdp("Page.getFrameTree")["frameTree"]["childFrames"][0]["frame"]
        self.assertEqual(frame.get("unreachableUrl"), self.url("/"), frame)
        self.assertIn("frame-ancestors", "".join(self.browser.console()))
        window = self.browser.do("GET", "window")
        self.browser.get(self.evil)
        self.browser.script("window.other = open(arguments[0])", self.url("/"))
        self.browser.wait("return other.closed")                        # so it seems to who has opened it
        other = next(handle for handle in self.browser.do("GET", "window/handles") if handle != window)
        self.browser.do("POST", "window", {"handle": other})
        self.assertEqual(self.browser.script("return [document.title, window.opener]"), ["gaffer", None])
        self.browser.do("DELETE", "window")
        self.browser.do("POST", "window", {"handle": window})

    def test_a_name_that_is_pointed_here(self):
        """DNS rebinding: the page's own origin is this server, so the browser has nothing against it."""
        for host in ("evil.example", "127.0.0.1.evil.example"):
            self.browser.get("http://%s:%d/" % (host, self.server.port))
            self.assertIn("forbidden_host", self.browser.script("return document.body.innerText"))
            for options in ({}, {"method": "POST"}, {"method": "DELETE"}):
                answer = self.browser.script(self.ASK, "/processes/typed", options)
                self.assertEqual((answer[1], json.loads(answer[2])["error"]), (403, "forbidden_host"))
            self.assertEqual(self.browser.script(self.SOCKET, "ws://%s:%d/wstreams/1" % (host, self.server.port)), 1006)
        self.assertUntouched()
        for host in ("127.0.0.1", "localhost", "web.localhost"):
            self.browser.get("http://%s:%d/" % (host, self.server.port))
            self.assertEqual(self.browser.script(self.ASK, "/processes/typed/_restart", {"method": "POST"})[1], 200)
            pid, = until(lambda: self.server.ok("GET", "/processes/talks/_pids")["pids"], "the next process")
            self.server.request("GET", "/streams/%d/stdout?since=0" % pid)      # it has said what it says
            self.assertEqual(self.browser.script(self.SOCKET, "ws://%s:%d/wstreams/%d" % (host, self.server.port, pid)), 1000)

    def test_the_address_of_nobody(self):
        """Connections to 0.0.0.0 arrive here, too."""
        url = "http://0.0.0.0:%d" % self.server.port
        self.browser.get(self.evil)
        for options in ({"method": "POST"}, {"method": "POST", "mode": "no-cors"}, {}):
            self.assertIn(self.browser.script(self.ASK, url + "/processes/typed/_stop", options)[0], ("TypeError", "opaque"))
        self.assertEqual(self.browser.script(self.SOCKET, url.replace("http", "ws") + "/wstreams/1"), 1006)
        try:
            self.browser.get(url + "/")
            self.assertIn("forbidden_host", self.browser.script("return document.body.innerText"))
        except BrowserError as error:
            self.assertIn("net::ERR_", str(error))                      # browsers begin to refuse it themselves
        self.assertUntouched()

    def test_no_origin_at_all(self):
        """Sandboxed frames and data: pages have the origin null."""
        code = "const ask = async function() {%s}; ask(%%s, %%s).then(answer => parent.postMessage(answer, '*'))" % self.ASK
        self.browser.get(self.evil)
        look = """
            const [source, code] = arguments, frame = document.createElement('iframe'), text = '<script>' + code + '</' + 'script>';
            if (source == 'data') frame.src = 'data:text/html,' + encodeURIComponent(text);
            else { frame.sandbox = 'allow-scripts allow-forms'; frame.srcdoc = text; }
            return new Promise(done => { window.onmessage = event => done([event.origin, event.data]);
                                         document.body.replaceChildren(frame); });"""
        for source in "data", "sandbox":
            for method, mode in (("POST", "no-cors"), ("POST", "cors"), ("GET", "cors")):
                path = "/processes/typed/_stop" if method == "POST" else "/processes"
                before, told = self.count("POST", 403), ["opaque" if mode == "no-cors" else "TypeError", 0, ""]
                script = code % (json.dumps(self.url(path)), json.dumps({"method": method, "mode": mode}))
                self.assertEqual(self.browser.script(look, source, script), ["null", told])
                self.assertEqual(self.count("POST", 403), before + (method == "POST"))
        self.assertUntouched()

    def test_credentials_that_the_browser_has(self):
        """A browser sends what it knows of this server along, whoever asks."""
        server = Running(token="s3cret")
        self.addCleanup(server.stop_all)
        self.addCleanup(self.browser.get, "about:blank")
        base = "127.0.0.1:%d" % server.port
        self.browser.get("http://user:s3cret@%s/processes" % base)
        self.browser.get("http://%s/" % base)
        self.assertEqual(self.browser.wait("return document.title"), "gaffer")
        added = {"method": "POST", "body": '{"name": "mine", "cmd": "cat", "redirect_input": true}'}
        self.assertEqual(self.browser.script(self.ASK, "/processes", added)[1], 200)
        self.assertEqual(self.browser.script(self.SOCKET, "ws://%s/wstreams/1" % base), "typed\n")
        self.browser.get(self.evil)
        for enctype in ("text/plain", "application/x-www-form-urlencoded"):
            self.browser.script(self.FORM, "http://%s/processes" % base, enctype, self.TEMPLATE)
        for mode in ("no-cors", "cors"):
            self.browser.script(self.ASK, "http://%s/processes/mine" % base, dict(added, mode=mode, credentials="include"))
            self.browser.script(self.ASK, "http://%s/processes" % base, {"mode": mode, "credentials": "include"})
        self.assertEqual(self.browser.script(self.SOCKET, "ws://%s/wstreams/1" % base), 1006)
        self.assertEqual(self.count("POST", 403, server), 4)
        self.assertEqual(server.json("GET", "/processes", headers={"Authorization": "Bearer s3cret"}), (200, ["mine"]))


# --------------------------------------------------------------------------------------------------------------------
# ring 4: the command line, the README, the structure of the file
# --------------------------------------------------------------------------------------------------------------------
# --------------------------------------------------------------------------------------------------------------------
# command line, README, examples, structure
# --------------------------------------------------------------------------------------------------------------------
CLI_FILE = os.path.join(HERE, "gaffer.py")
CLI_SCRIPT = [PYTHON, "-W", "error", "-X", "dev", CLI_FILE]
CLI_COMMAND = [PYTHON, "-W", "error", "-S", "-c", "import sys; sys.path[0] = %r; import gaffer; sys.exit(gaffer.main())" % HERE]
CLI_LISTENING = re.compile(r"gaffer %s listening on (.*)\n\Z" % re.escape(gaffer.__version__))


def cli_read(path):
    """The text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def cli_environment(**more):
    """This process's environment without what changes gaffer or Python, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GAFFER"))}
    return dict(kept, **more)


class ForkServer:
    """Forks commands from a process that has gaffer imported: a start takes a twentieth of the time that
    the interpreter and the import do. It ends when all that could ask it have ended."""

    socket = None                       # where requests are sent: JSON, the standard descriptors, a status pipe

    @classmethod
    def start(cls):
        """Fork the server. All that is forked from here on may ask it."""
        gaffer.make_parser("serve").format_help()       # imports what it needs
        gc.collect()
        gc.freeze()                     # or the collector would copy all pages in each process
        sock, cls.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cls.pid = os.fork()
        if cls.pid:
            return sock.close()
        status = 1
        try:
            cls.socket.close()
            os.setpgid(0, 0)            # Ctrl-C is not for it
            awake, wakeup = socket.socketpair()
            with sock, awake, wakeup:
                left = cls.serve(sock, awake, wakeup)
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                signal.set_wakeup_fd(-1)
            status = len(left) > 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    @classmethod
    def end(cls):
        """Wait for its end. Returns whether a command was left, or something went wrong."""
        cls.socket.close()
        return os.waitpid(cls.pid, 0)[1] != 0

    @classmethod
    def serve(cls, sock, awake, wakeup):
        """Answer each request with the command's pid and, when it has ended, its status, 4 bytes each.
        Returns the pids of those that still run when there is nobody left to ask."""
        pipes = {}                      # {pid of a command that runs: where its status is written}
        wakeup.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno())
        while True:
            ready = select.select([sock, awake], [], [])[0]
            if awake in ready:
                awake.recv(4096)
                while pipes:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    with os.fdopen(pipes.pop(pid), "wb", 0) as pipe, contextlib.suppress(BrokenPipeError):
                        pipe.write(struct.pack("i", status))
            if sock in ready:
                data, ancillary, _, _ = sock.recvmsg(1 << 18, socket.CMSG_SPACE(16))
                if not data:
                    return pipes
                *streams, pipe = struct.unpack("4i", ancillary[0][2])
                pid = os.fork()
                if not pid:
                    cls.run(streams, **json.loads(data))
                for fd in streams:
                    os.close(fd)
                os.write(pipe, struct.pack("i", pid))
                pipes[pid] = pipe

    @staticmethod
    def run(streams, arguments, environment, folder, group):
        """In a process of its own: call main(), and end as the interpreter ends."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)        # as the first lines of gaffer.py do
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            os.closerange(3, 256)
            os.setpgid(0, group)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv[:] = ["gaffer.py", *arguments]
            sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = (
                open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", 1, errors="backslashreplace", closefd=False))
            warnings.simplefilter("error")
            faulthandler.enable()
            try:
                status = gaffer.main() or 0
            except SystemExit as error:
                status = error.code or 0
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            atexit._run_exitfuncs()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


class ForkedCommand(subprocess.Popen):
    """`gaffer.py ARGUMENTS`, forked by the ForkServer."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, *pipes_and_more):
        pipes = pipes_and_more[:6]      # of stdin, stdout and stderr: the end to read from, the end to write to
        streams = [number if fd == -1 else fd for number, fd in enumerate((pipes[0], pipes[3], pipes[5]))]
        self._pipe, write = os.pipe()
        request = {"arguments": args, "environment": dict(os.environ if env is None else env), "folder": cwd or os.getcwd(),
                   "group": os.getpgrp()}
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
            self.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return self.returncode

    def _internal_poll(self, *_, **__):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode


class CliProcess:
    """A program that prints one line when it is up. stop() ends it; stdout and stderr are what else it printed."""

    def __init__(self, command, env=None, cwd=None, pattern=CLI_LISTENING, popen=subprocess.Popen):
        self._stderr = tempfile.NamedTemporaryFile("w+", prefix="stderr-")
        self._expected = []
        self.process = popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr,
                             env=env, cwd=cwd, universal_newlines=True)
        self.first_line = self.process.stdout.readline()
        match = pattern.match(self.first_line)
        if match is None:
            self.process.kill()
            self.stop(None, self.process.wait())
            raise AssertionError("it printed %r and %r" % (self.first_line, self.stderr))
        self.urls = match.group(1).split(", ")
        self.ports = [int(url.rpartition(":")[2].partition("/")[0]) for url in self.urls if not url.startswith("unix:")]
        self.port = self.ports[0] if self.ports else None

    def expect_stderr(self, pattern):
        """`pattern` is found in a line of its stderr. It has to come; any other line fails the test."""
        self._expected.append(pattern)

    def said(self, text):
        """True once it has said so on stderr."""
        return text in os.pread(self._stderr.fileno(), 1 << 20, 0).decode()

    def stop(self, signum=signal.SIGTERM, status=0):
        """Signal it (None: it has been), wait for its end; returns the exit status, which has to be `status`."""
        if signum is not None:
            self.process.send_signal(signum)
        self.stdout, _ = self.process.communicate(timeout=TIMEOUT)
        self._stderr.seek(0)
        self.stderr = self._stderr.read()
        self._stderr.close()
        assert self.process.returncode == status, (self.process.returncode, self.stderr)
        return status

    def kill(self):
        """SIGKILL."""
        self.stop(signal.SIGKILL, -signal.SIGKILL)

    def close(self):
        """For cleanups: it is stopped, if it still runs, and has printed no line that is not expected."""
        if not self._stderr.closed:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGABRT)        # its stacks are part of what it printed
                self.process.communicate()
                raise
        lines = unexpected(self.stderr.splitlines(), self._expected)
        assert not lines, "stderr of the program:\n" + "\n".join(lines)

    def request(self, method, path, body=None, headers=None, sock=None):
        """(status, headers, body) of one request; `sock`: a connected socket instead of the first port."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.sock = sock
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def ok(self, method, path, body=None, headers=None):
        """The value of a request that has to succeed."""
        status, _, data = self.request(method, path, body, headers)
        assert status == 200, (method, path, status, data)
        return json.loads(data)

    def add(self, name, command, **options):
        """POST a template (see python()). Returns its OS pids."""
        self.ok("POST", "/processes", dict(command, name=name, **options))
        return self.ok("GET", "/status/" + name)["os_pids"]


class CliCase(Case):
    """start() and run_program() run programs that end with the test. Most tests run gaffer's main() in a forked process:
    the script (`script=True`) is compiled at each start, which takes longer than all else."""

    env = None                          # main() gives it a cache of compiled modules

    def start(self, *arguments, script=False, **options):
        """A running `gaffer.py ARGUMENTS`; where they name no command: `serve` on a free port, with them."""
        if "serve" not in arguments:
            arguments = ("serve", "--bind", "127.0.0.1:0") + arguments
        if script:
            return self.run_program([*CLI_SCRIPT, *arguments], **options)
        return self.run_program(arguments, popen=ForkedCommand, **options)

    def run_program(self, command, **options):
        """A CliProcess that is closed after the test."""
        options.setdefault("env", self.env)
        program = CliProcess(command, **options)
        self.addCleanup(program.close)
        return program

    def folder(self):
        """A folder that goes with the test."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return folder.name

    def file(self, folder, name, text, mode=0o600):
        """A file's path."""
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def outcome(self, *arguments):
        """(exit status, stdout, stderr) of a run that ends by itself."""
        with ForkedCommand(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=self.env, universal_newlines=True) as run:
            out, err = run.communicate(timeout=TIMEOUT)
        return run.returncode, out, err

    def called(self, *arguments):
        """The same of main(), called in this process: for tables, as it is a hundred times faster."""
        out, err = io.StringIO(), io.StringIO()
        handlers, logging.root.handlers = logging.root.handlers, []
        level = logging.root.level
        ender = threading.Timer(TIMEOUT, os.kill, (os.getpid(), signal.SIGTERM))    # where it serves, though it should not
        ender.start()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = gaffer.main(list(arguments))
        except SystemExit as error:
            status = error.code
        finally:
            ender.cancel()
            ender.join()
            logging.root.handlers = handlers
            logging.root.setLevel(level)
        return status, out.getvalue(), err.getvalue()


class CliServe(CliCase):
    """`serve`: its options, its signals, its output."""

    def test_one_line_then_it_serves_and_term_ends_it_with_0(self):
        folder = self.folder()                  # nothing of the current folder is imported
        for name in ("json.py", "types.py", "marshal.py", "argparse.py", "socket.py"):
            self.file(folder, name, "raise SystemExit('imported from the current folder')\n")
        server = self.start(script=True, cwd=folder)
        self.assertRegex(server.first_line, r"\Agaffer [0-9.]+ listening on http://127\.0\.0\.1:[0-9]+\n\Z")
        self.assertEqual(server.request("GET", "/ping")[2], b"OK")
        left = [what for what in self._descriptors(server.process.pid) if "deleted" in what]
        self.assertEqual(left, [], "no temporary file stays open")
        self.assertEqual((server.stop(), server.stdout, server.stderr), (0, "", ""))

    @staticmethod
    def _descriptors(os_pid):
        folder, found = "/proc/%d/fd" % os_pid, []
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):    # closed between the two
                found.append(os.readlink(os.path.join(folder, name)))
        return found

    def test_it_runs_from_cached_bytecode(self):
        """ps shows what runs; what could not be cached runs as it is; no other command is executed twice."""
        with unittest.mock.patch.dict(self.env):
            server = self.run_program([PYTHON, CLI_FILE, "serve", "--bind", "127.0.0.1:0"])
            server.add("a", {"cmd": "sleep 1000"})
            words = cli_read("/proc/%d/cmdline" % server.process.pid).split("\0")
            self.assertEqual(words[1:2] + words[3:6], ["-c", CLI_FILE, "serve", "--bind"])
            resident = int(re.search(r"VmRSS:\s+(\d+)", cli_read("/proc/%d/status" % server.process.pid)).group(1))
            self.assertLess(resident, 21 * 1024)
            uncached = self.run_program([PYTHON, "-B", CLI_FILE, "serve", "--bind", "127.0.0.1:0"],
                                        env=dict(self.env, PYTHONPYCACHEPREFIX=self.folder()))
            words = cli_read("/proc/%d/cmdline" % uncached.process.pid).split("\0")
            self.assertEqual(words[1:4], ["-B", CLI_FILE, "serve"])
        traced = [PYTHON, "-c", "import os, runpy, sys; os.execv = None; sys.argv[:] = sys.argv[1:]; "
                  "runpy.run_path(sys.argv[0], run_name='__main__')", CLI_FILE]
        run = subprocess.run([*traced, "start", "up", "--endpoint", server.urls[0]], env=self.env, check=False,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual((run.returncode, run.stderr[:45]), (4, b"gaffer: there is no process named 'up'; 'gaffe"[:45]))

    def test_several_addresses_before_and_after_the_command(self):
        path = os.path.join(self.folder(), "socket")
        server = self.start("--bind", "127.0.0.1:0", "serve", "--bind", "127.0.0.1:0", "--bind", "unix:" + path)
        self.assertEqual(len(server.urls), 3, server.urls)
        self.assertEqual(server.urls[-1], "unix:" + path)
        for port in server.ports:
            server.port = port
            self.assertEqual(server.request("GET", "/ping")[0], 200)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            self.assertEqual(server.request("GET", "/ping", headers={"Host": "localhost"}, sock=sock)[0], 200)
        self.assertEqual(server.stop(signal.SIGINT), 0)
        self.assertFalse(os.path.exists(path), "the socket is removed")

    def test_a_unix_socket_of_a_dead_server_is_taken_over_and_that_of_a_living_one_not(self):
        path = os.path.join(self.folder(), "socket")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        server = self.start("serve", "--bind", "unix:" + path)
        status, _, err = self.outcome("serve", "--bind", "unix:" + path)
        self.assertEqual(status, 1, err)
        self.assertTrue(os.path.exists(path), "the living server's socket is still there")
        self.assertEqual(server.stop(), 0)

    def test_without_any_standard_descriptor(self):
        path = os.path.join(self.folder(), "socket")
        command = " ".join(map(shlex.quote, CLI_SCRIPT + ["serve", "--bind", "unix:" + path]))
        process = subprocess.Popen(["/bin/sh", "-c", "exec %s <&- >&- 2>&-" % command], env=self.env)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)

        def ask(method, path_, body=None):
            connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
            connection.sock = socket.socket(socket.AF_UNIX)
            with contextlib.closing(connection):
                connection.sock.connect(path)
                connection.request(method, path_, body)
                return connection.getresponse().read()

        def answers():
            self.assertIsNone(process.poll(), "it has ended")
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return ask("GET", "/ping")
        until(answers, "an answer")
        ask("POST", "/processes", json.dumps({"name": "cat", "cmd": "cat", "redirect_input": True}))
        ask("POST", "/streams/1/stdin", "through\n")
        self.assertEqual(ask("GET", "/streams/1/stdout?since=0"), b"through\n")
        process.terminate()
        self.assertEqual(process.wait(TIMEOUT), 0)

    def test_token_of_a_file_and_of_the_environment(self):
        path = self.file(self.folder(), "token", "s3cret\n")
        for arguments, more in (("--token-file", path), {}), ((), {"GAFFER_TOKEN": "s3cret"}), (
                ("--token-file", path), {"GAFFER_TOKEN": "another"}):
            with self.subTest(arguments=arguments):
                server = self.start(*arguments, env=dict(self.env, **more), script=arguments == ())
                good = {"Authorization": "Bearer s3cret"}
                self.assertEqual(server.request("GET", "/ping")[0], 200)
                for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Bearer s3cret "[:-2]}):
                    self.assertEqual(server.request("GET", "/processes", headers=headers)[0], 401)
                server.ok("POST", "/processes", dict(python("input()"), name="a", redirect_input=True), good)
                os_pid = server.ok("GET", "/processes/1", headers=good)["os_pid"]
                with open("/proc/%d/environ" % os_pid, "rb") as file:
                    self.assertNotIn(b"GAFFER_TOKEN", file.read())
                self.assertEqual(server.stop(), 0)
                server.expect_stderr(r"WARNING a wrong token came from 127\.0\.0\.1:\d+; 1 so far$")

    def test_an_origin_or_a_host_that_could_never_match(self):
        for arguments, words in ((("--cors-origin", "foo"), "'foo' is not an origin"), (("--cors-origin", "https://x/y"), "'https://x/y' is not an origin"),
                                 (("--allow-host", "a b"), "'a b' is not a host"), (("--allow-host", "a:70"), "'a:70' is not a host")):
            status, out, err = self.called("serve", "--bind", "127.0.0.1:0", *arguments)
            self.assertEqual((status, out), (1, ""))
            self.assertRegex(err, r"\Agaffer: %s; give [^\n]*\n\Z" % re.escape(words))

    def test_cors_origin_and_allow_host_may_be_repeated(self):
        server = self.start("--cors-origin", "https://one.example", "--cors-origin", "https://two.example/",
                            "--allow-host", "one.example", "--allow-host", "two.example")
        for name in ("one", "two"):
            status, headers, _ = server.request("POST", "/processes/x/_stop", headers={
                "Origin": "https://%s.example" % name, "Host": "%s.example" % name})
            self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (404, "https://%s.example" % name))
        self.assertEqual(server.request("GET", "/", headers={"Host": "three.example"})[0], 403)
        self.assertEqual(server.request("POST", "/processes", headers={"Origin": "https://three.example"})[0], 403)
        self.assertEqual(server.stop(), 0)

    def test_cors_origin_star_allows_all(self):
        server = self.start("--cors-origin", "*")
        status, headers, _ = server.request("POST", "/processes/x/_stop", headers={"Origin": "https://any.example"})
        self.assertEqual((status, headers["Access-Control-Allow-Origin"]), (404, "https://any.example"))
        self.assertNotIn("Access-Control-Allow-Credentials", headers)
        self.assertEqual(server.stop(), 0)

    def test_input(self):
        server = self.start("--input", "2000000")
        server.add("a", python("import time\nwhile True: time.sleep(9)"), redirect_input=True)
        size = 2 * 10 ** 6                      # as JSON, with its quotes
        self.assertEqual(server.request("POST", "/streams/1/stdin", "x" * (size - 1))[0], 413)
        self.assertEqual(server.request("POST", "/streams/1/stdin", "x" * (size - 2))[0], 200)
        self.assertEqual(server.request("POST", "/streams/1/stdin", "x" * (size - 2))[0], 503)
        made = WebSocket(server.port, "/wstreams/1")
        self.addCleanup(made.close)
        made.sock.sendall(struct.pack("!BBQ", 0x81, 0xFF, size + 1) + b"mask")
        self.assertEqual(made.read()[1][:2], struct.pack("!H", 1009))
        server.stop()

    def test_window(self):
        server = self.start("--window", "4096")
        server.add("a", python("print('x' * 19999); input()"), redirect_input=True)
        offset = 0
        while offset < 20000:
            _, headers, _ = server.request("GET", "/streams/1/stdout?since=%d" % offset)
            offset = int(headers["Gaffer-Offset"])
        _, headers, body = server.request("GET", "/streams/1/stdout?since=0")
        self.assertLessEqual(len(body), 4096)
        self.assertEqual(int(headers["Gaffer-Dropped"]) + len(body), 20000)
        self.assertEqual(server.stop(), 0)

    def test_connections(self):
        server = self.start("--connections", "5", "--connections-per-address", "2")
        held = [socket.create_connection(("127.0.0.1", server.port), TIMEOUT) for _ in range(2)]
        for sock in held:
            self.addCleanup(sock.close)
            sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertIn(b"200 OK", sock.recv(1000))
        self.assertEqual(server.request("GET", "/ping")[0], 503)
        server.expect_stderr("WARNING too many connections: one was refused$")
        for value in ("0", "x", "-1", "1.5"):
            self.assertEqual(self.called("serve", "--connections=" + value)[0], 2)

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl for a certificate")
    def test_certfile_and_keyfile(self):
        folder = self.folder()
        cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = self.start("--certfile", cert, "--keyfile", key)
        self.assertTrue(server.urls[0].startswith("https://127.0.0.1:"), server.urls)
        context = ssl.create_default_context(cafile=cert)
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as raw:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as sock:
                self.assertEqual(server.request("GET", "/ping", sock=sock)[2], b"OK")
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_verbose_goes_to_stderr(self):
        bind = ("serve", "--bind", "127.0.0.1:0")
        for arguments, events, output in (bind, False, False), (bind + ("-v",), True, False), (bind + ("-vv",), True, True), (
                ("--verbose",) + bind + ("-v",), True, True):
            with self.subTest(arguments=arguments):
                server = self.start(*arguments)
                server.add("a", python("print('a word'); input()"), redirect_input=True)
                server.request("GET", "/streams/1/stdout?since=0")      # the word has come
                self.assertEqual((server.stop(), server.stdout), (0, ""))
                if events:
                    server.expect_stderr(r" INFO a: (create|start|stop|stop_pid \(.*)$")
                    server.expect_stderr(r" INFO a: spawn \(pid 1, os pid \d+\)$")
                    server.expect_stderr(r" INFO a: exit \(pid 1, os pid \d+, signal 15\)$")
                if output:
                    server.expect_stderr(r" DEBUG a stdout \| a word$")

    def test_nobody_reads_the_line(self):
        """`serve | true`: what cannot be printed does not end it."""
        path = os.path.join(self.folder(), "socket")
        read, write = os.pipe()
        os.close(read)
        try:
            process = subprocess.Popen(CLI_SCRIPT + ["serve", "--bind", "unix:" + path], stdin=subprocess.DEVNULL,
                                       stdout=write, stderr=subprocess.PIPE, env=self.env, universal_newlines=True)
        finally:
            os.close(write)
        with process:
            self.addCleanup(process.kill)

            def answers():
                self.assertIsNone(process.poll(), "it has ended")
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    return sock.recv(1)
            until(answers, "an answer")
            process.terminate()
            _, err = process.communicate(timeout=TIMEOUT)
        self.assertEqual((process.returncode, err), (0, ""))


class CliAccessLog(CliCase):
    def test_a_file_and_stderr(self):
        path = os.path.join(self.folder(), "access.log")
        server = self.start("--access-log", path)
        server.request("GET", "/ping")
        self.assertEqual((server.stop(), server.stderr), (0, ""))
        self.assertEqual([line[2:5] for line in access_lines(cli_read(path))], [("GET /ping HTTP/1.1", 200, 2)])
        server = self.start("--access-log", "-")
        server.request("GET", "/nothing")
        self.assertEqual(server.stop(), 0)
        self.assertEqual([line[2:4] for line in access_lines(server.stderr)], [("GET /nothing HTTP/1.1", 404)])
        server.expect_stderr("GET /nothing")
        status, out, err = self.called("serve", "--bind", "127.0.0.1:0", "--access-log", "/nowhere/x")
        self.assertEqual((status, out), (1, ""))
        self.assertEqual(err, "gaffer: the access log '/nowhere/x' cannot be written: No such file or directory\n")


class CliSignals(CliCase):
    """INT, TERM, and how everything ends."""

    STUBBORN = """
        import os, signal, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.write(1, b"ready\\n")
        while True:
            signal.sigwait([signal.SIGTERM])
            with open(sys.argv[1], "a") as file:
                file.write(sys.argv[2] + "\\n")
            if len(sys.argv) == 3:
                os._exit(0)
        """

    def _add(self, server, name, *arguments):
        command = python(self.STUBBORN)
        os_pid, = server.add(name, dict(command, args=command["args"] + list(arguments)), graceful_timeout=1000)
        pid, = server.ok("GET", "/processes/%s/_pids" % name)["pids"]
        self.assertEqual(server.request("GET", "/streams/%d/stdout?since=0" % pid)[2], b"ready\n")
        return os_pid

    def test_int_and_term_stop_the_newest_first_and_exit_with_0(self):
        for signum in signal.SIGINT, signal.SIGTERM:
            with self.subTest(signum=signum):
                path = os.path.join(self.folder(), "stopped")
                server = self.start(script=signum == signal.SIGTERM)
                os_pids = [self._add(server, name, path, name) for name in ("first", "second", "third")]
                self.assertEqual((server.stop(signum), server.stderr), (0, ""))
                self.assertEqual(cli_read(path).split(), ["third", "second", "first"])
                self.assertEqual([os_pid for os_pid in os_pids if alive(os_pid)], [])

    def test_a_second_signal_kills_at_once(self):
        for first, second in (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM):
            path = os.path.join(self.folder(), "stopped")
            with self.subTest(first=first):
                server = self.start()
                os_pid = self._add(server, "a", path, "a", "goes on")
                server.process.send_signal(first)
                until(functools.partial(os.path.exists, path), "TERM at the child")
                self.assertTrue(alive(os_pid))
                self.assertEqual((server.stop(second), server.stderr), (0, ""))
                self.assertFalse(alive(os_pid))

    # after the handler of a fault the same fault comes again: these are left alone
    FAULTS = {signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
    GO_ON = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGCONT, signal.SIGURG,
             signal.SIGWINCH, signal.SIGUSR1, signal.SIGUSR2}
    STOPS = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}

    def test_no_signal_leaves_a_process_or_the_pid_file_behind(self):
        ending = signal.valid_signals() - self.FAULTS - self.GO_ON - self.STOPS - {signal.SIGKILL}
        ending = [signum for signum in ending if not signal.SIGRTMIN < signum < signal.SIGRTMAX]

        def ends(signum):
            pidfile = os.path.join(self.folder(), "pid")
            arguments = ["serve", "--bind", "127.0.0.1:0", "--pidfile", pidfile]
            if signum == signal.SIGABRT:        # a forked command shows its stacks
                server = self.run_program(CLI_COMMAND + arguments)
            else:
                server = self.start(*arguments)
            os_pid, = server.add("a", {"cmd": "sleep 1000"})
            status = server.stop(signum)
            return signum, status, server.stderr, alive(os_pid), os.path.exists(pidfile)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for signum, *outcome in pool.map(ends, ending):
                with self.subTest(signum=signum):
                    self.assertEqual(outcome, [0, "", False, False])

    def test_signals_that_end_nothing(self):
        server = self.start()
        os_pid, = server.add("a", {"cmd": "sleep 1000"})
        for signum in self.GO_ON:
            server.process.send_signal(signum)
            self.assertEqual(server.ok("GET", "/status/a")["os_pids"], [os_pid], signum)
        for signum in self.STOPS:               # not its processes
            server.process.send_signal(signum)
            until(lambda: process_state(server.process.pid) == "T", "the stop")
            self.assertIn(process_state(os_pid), "RS")
            server.process.send_signal(signal.SIGCONT)
            self.assertEqual(server.ok("GET", "/status/a")["os_pids"], [os_pid], signum)
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_quit_kills_at_once(self):
        path = os.path.join(self.folder(), "stopped")
        for before in (), (signal.SIGTERM,):
            with self.subTest(before=before):
                server = self.start()
                os_pid = self._add(server, "a", path, "a", "goes on")
                for signum in before:
                    server.process.send_signal(signum)
                    until(functools.partial(os.path.exists, path), "TERM at the child")
                self.assertEqual((server.stop(signal.SIGQUIT), server.stderr), (0, ""))
                self.assertFalse(alive(os_pid))

    # starts another program as a careless parent would
    CARELESS = """if True:
        import os, signal, sys
        signals = set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}
        if sys.argv[1] == "ignored":
            for signum in signals:
                signal.signal(signum, signal.SIG_IGN)
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        os.execv(sys.argv[2], sys.argv[2:])"""
    SIGNALS_OF_A_CHILD = "grep -E '^Sig(Blk|Ign)' /proc/self/status; echo end; exec sleep 1000"

    def test_signals_that_were_blocked_or_ignored_when_it_was_started(self):
        """Neither gaffer nor its processes are deaf to them, and exits are told as they are."""
        for how in "blocked", "ignored":
            with self.subTest(how):
                server = self.run_program([PYTHON, "-c", self.CARELESS, how, *CLI_COMMAND,
                                           "serve", "--bind", "127.0.0.1:0"])
                os_pid, = server.add("a", {"cmd": self.SIGNALS_OF_A_CHILD, "shell": True})
                data = b""
                while not data.endswith(b"end\n"):
                    data += server.request("GET", "/streams/a/stdout?since=%d" % len(data))[2]
                masks = [int(mask, 16) for mask in re.findall(rb"Sig...:\t([0-9a-f]+)", data)]
                # not the C library's own two, which its posix_spawn() ignores
                self.assertEqual([mask % (1 << 31) for mask in masks], [0, 0], data)
                server.add("b", {"cmd": "exit 3", "shell": True})
                self.assertEqual(server.ok("GET", "/watch/proc/b/exit?since=0")["exit_status"], 3)
                server.expect_stderr("WARNING b: exit .*status 3")
                if how == "ignored":            # nohup
                    server.process.send_signal(signal.SIGHUP)
                    self.assertEqual(server.ok("GET", "/status/a")["os_pids"], [os_pid])
                self.assertEqual(server.stop(), 0)
                self.assertFalse(alive(os_pid))

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("setpriv"), "needs root and setpriv")
    def test_a_process_that_gaffer_may_not_signal(self):
        """A user's gaffer runs a program that becomes root: it is named once and left running."""
        folder = tempfile.TemporaryDirectory(dir="/tmp")        # where another user may look
        self.addCleanup(folder.cleanup)
        os.chmod(folder.name, 0o755)
        program = shutil.copy(shutil.which("setpriv"), folder.name)
        os.chmod(program, 0o4755)
        become = "%s --reuid 0 --clear-groups sh -c 'echo ready; exec sleep 1000'" % program
        code = ("import sys; sys.path[0] = %r; import argparse, gaffer, os\n"
                "gaffer.make_parser('serve').format_help(); os.setgid(61234); os.setuid(61234)\n"
                "sys.exit(gaffer.main())" % HERE)
        command = [PYTHON, "-c", code, "serve", "--bind", "127.0.0.1:0"]
        for cmd, shell, twice in ((become, False, False), (become + "; true", True, False),
                                  (become, False, True)):
            with self.subTest(cmd, twice=twice):
                server = self.run_program(command, cwd="/")
                server.expect_stderr("runs as another user and cannot be signalled")
                leader, = server.add("a", {"cmd": cmd}, shell=shell)
                _, _, data = server.request("GET", "/streams/1/stdout?since=0")
                self.assertEqual(data, b"ready\n")
                os_pid, = set(process_group(leader)) - {leader} or {leader}
                try:
                    if twice:
                        stubborn = {"cmd": "trap '' TERM; echo ready; exec sleep 1000"}
                        server.add("b", stubborn, shell=True)
                        _, _, data = server.request("GET", "/streams/2/stdout?since=0")
                        self.assertEqual(data, b"ready\n")
                        server.process.send_signal(signal.SIGTERM)
                        until(lambda: server.ok("GET", "/status/a")["stopping"], "the stop of a")
                    self.assertEqual(server.stop(signal.SIGINT), 0)
                    self.assertTrue(alive(os_pid))
                finally:
                    os.kill(os_pid, signal.SIGKILL)
                self.assertRegex(server.stderr, r"\A[^\n]* a \(pid 1\): os pid \d+ runs as another user"
                                                r" and cannot be signalled: it is left to itself\n\Z")

    def test_a_detached_process_lives_on(self):
        server = self.start()
        os_pid, = server.add("a", {"cmd": "sleep 1000"}, detach=True)
        self.assertEqual(server.stop(), 0)
        self.assertTrue(alive(os_pid))
        os.kill(os_pid, signal.SIGKILL)

    def test_streams_and_connections_end_with_the_server(self):
        server = self.start()
        server.add("a", {"cmd": "sleep 1000"})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        connection.request("GET", "/streams/1/stdout?feed=continuous")
        answer = connection.getresponse()
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as idle:
            self.assertEqual((server.stop(), server.stderr), (0, ""))
            with contextlib.suppress(http.client.IncompleteRead):
                answer.read()
            self.assertEqual(idle.recv(1), b"")
        connection.close()


    def test_ctrl_c_while_it_still_imports(self):
        """Silent, as later: a module of the standard library is replaced by one that sends the signal."""
        folder = self.folder()
        self.file(folder, "socketserver.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.sigwait([])\n")
        table = ([CLI_FILE, "status"], ["-m", "gaffer", "watch"], [CLI_FILE, "up"], [CLI_FILE, "serve", "--bind", "127.0.0.1:0"])
        runs = [subprocess.Popen([PYTHON, *command], cwd=HERE, env=dict(self.env, PYTHONPATH=folder), stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE) for command in table]
        for run, command in zip(runs, table):
            with run, self.subTest(command):
                self.addCleanup(run.kill)
                self.assertEqual((*run.communicate(timeout=TIMEOUT), run.returncode), (b"", b"", -signal.SIGINT))


class CliExitWith(CliCase):
    """--exit-with: the end of one process is gaffer's own; and life as pid 1, as in a container."""

    ENDS = """
        import os, signal, sys
        os.write(1, b"ready\\n")
        word = sys.stdin.readline().strip()
        if word.isdigit():
            sys.exit(int(word))
        os.kill(os.getpid(), getattr(signal, word))
        """

    @staticmethod
    def expect_failure(server, name="main"):
        """A failure is logged without -v."""
        server.expect_stderr(r"WARNING %s: exit \(pid \d+, os pid \d+, (status|signal) [1-9]\d*\)$" % name)

    def run_first(self, *arguments):
        """(server as pid 1 of a namespace of its own, its pid outside)"""
        if os.geteuid() != 0 or not shutil.which("unshare"):
            self.skipTest("needs root and unshare")
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        if subprocess.run(command + ["true"], check=False, stderr=subprocess.DEVNULL, timeout=TIMEOUT).returncode:
            self.skipTest("no pid namespace can be made here")
        server = self.start("serve", "--bind", "127.0.0.1:0", *arguments, before=command)
        return server, gaffer.ProcfsTable().children(server.process.pid)[0]

    def start(self, *arguments, before=(), **options):
        """See CliCase. `before`: a command that runs it."""
        if not before:
            return super().start(*arguments, **options)
        return self.run_program([*before, *CLI_SCRIPT, *arguments])

    def main(self, server, name="main", **options):
        """A process that ends as it is told; its pid."""
        server.add(name, python(self.ENDS), redirect_input=True, **options)
        pid = server.ok("GET", "/processes/%s/_pids" % name)["pids"][-1]
        self.assertEqual(server.request("GET", "/streams/%d/stdout?since=0" % pid)[2], b"ready\n")
        return pid

    def tell(self, server, pid, word):
        """Let it end so."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request("POST", "/streams/%d/stdin" % pid, word + "\n")
            self.assertEqual(connection.getresponse().status, 200)

    def note(self, server, path, *names):
        """Processes that write their names into a file when they are stopped."""
        for name in names:
            CliSignals._add(self, server, name, path, name)

    STUBBORN = CliSignals.STUBBORN

    def test_its_status_is_gaffers_when_all_others_have_ended(self):
        for word, status in (("7", 7), ("0", 0), ("SIGKILL", 137), ("SIGTERM", 143)):
            with self.subTest(word=word):
                path = os.path.join(self.folder(), "stopped")
                server = self.start("--exit-with", "main")
                self.note(server, path, "first")
                pid = self.main(server)
                self.note(server, path, "second", "third")
                self.tell(server, pid, word)
                server.stop(None, status)
                if status:
                    self.expect_failure(server)
                self.assertEqual(cli_read(path).split(), ["third", "second", "first"])

    def test_what_does_not_end_it(self):
        """Other templates, a stop and a restart over HTTP; TERM is no exit of the process."""
        server = self.start("--exit-with", "main", "-v")
        other = self.main(server, "other")
        self.tell(server, other, "3")
        self.assertEqual(server.ok("GET", "/watch/proc/other/exit?since=0")["exit_status"], 3)
        pid = self.main(server)
        server.ok("POST", "/processes/%d/_stop?wait=true" % pid)
        server.ok("POST", "/processes/main/_restart?wait=true")
        server.ok("POST", "/processes/main/_stop?wait=true")
        server.ok("POST", "/processes/main/_start")
        self.assertEqual(server.ok("GET", "/processes/main/_pids")["ok"], True)
        self.assertEqual(server.stop(), 0)
        server.expect_stderr(" INFO (main|other): [a-z_]+( \\(|$)")
        self.expect_failure(server, "other")

    def test_what_is_left_of_its_group_is_stopped_before(self):
        server = self.start("--exit-with", "main")
        folder = self.folder()
        path = os.path.join(folder, "left")
        server.add("main", {"cmd": "(echo $$ > %s; exec sleep 1000) & read x; exit 4" % path, "shell": True}, redirect_input=True)
        until(lambda: os.path.exists(path) and cli_read(path), "the child of the process")
        left = process_group(server.ok("GET", "/status/main")["os_pids"][0])
        self.assertEqual(len(left), 2)
        self.tell(server, 1, "end")
        server.stop(None, 4)
        self.expect_failure(server)
        self.assertEqual([os_pid for os_pid in left if alive(os_pid)], [])

    def test_a_name_that_none_can_have(self):
        status, _, err = self.called("serve", "--exit-with", "12")
        self.assertEqual(status, 2)
        self.assertIn("not all digits", err)

    def test_as_pid_1_its_status_is_the_containers(self):
        for word, status in (("7", 7), ("SIGKILL", 137)):
            server, _ = self.run_first("--exit-with", "main")
            path = os.path.join(self.folder(), "stopped")
            self.note(server, path, "first", "second")
            self.tell(server, self.main(server), word)
            server.stop(None, status)
            self.expect_failure(server)
            self.assertEqual(cli_read(path).split(), ["second", "first"])

    def test_as_pid_1_term_reaches_the_children_in_order(self):
        server, os_pid = self.run_first()
        path = os.path.join(self.folder(), "stopped")
        self.note(server, path, "first", "second", "third")
        os.kill(os_pid, signal.SIGTERM)
        self.assertEqual((server.stop(None), server.stderr), (0, ""))
        self.assertEqual(cli_read(path).split(), ["third", "second", "first"])


class CliFaults(CliCase):
    """The machine runs out of what a server needs, for real: limits of a running server are changed from outside. It lives,
    says so once, and goes on when there is room again."""

    CAT = dict(python("import sys; sys.stdin.read()"), redirect_input=True, custom_streams=["a", "b"])

    @contextlib.contextmanager
    def limit(self, server, kind, number):
        """The server's soft limit is another for a while."""
        old, hard = resource.prlimit(server.process.pid, kind)
        resource.prlimit(server.process.pid, kind, (number, hard))
        try:
            yield
        finally:
            resource.prlimit(server.process.pid, kind, (old, hard))

    def keep(self, server):
        """A function that sends requests on a connection that is open already: (status, value) of each."""
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        self.addCleanup(connection.close)
        connection.connect()

        def ask(method, path, body=None):
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        ask("GET", "/processes")
        return ask

    @staticmethod
    def descriptors(server):
        """What the server has open."""
        return sorted(map(int, os.listdir("/proc/%d/fd" % server.process.pid)))

    @staticmethod
    def restarted(ask, name, before):
        """Wait until other processes of the template run; their OS pids."""
        def others():
            pids = ask("GET", "/status/" + name)[1]["os_pids"]
            return pids and not set(pids) & set(before) and pids
        return until(others, "the restart")

    def test_no_descriptor_left_for_a_process(self):
        """Whichever step of a spawn fails: 503, and nothing of it is left."""
        server = self.start()
        ask = self.keep(server)
        before, room = self.descriptors(server), -1
        status = None
        while status != 200:
            room += 1
            with self.limit(server, resource.RLIMIT_NOFILE, before[-1] + 1 + room):
                status, value = ask("POST", "/processes", dict(self.CAT, name="x"))
            if status != 200:
                self.assertEqual((status, value["error"], self.descriptors(server)), (503, "busy", before), (room, value))
        self.assertGreater(room, 8)
        # one less: the process can be started, but not be watched by a descriptor
        child, = ask("GET", "/status/x")[1]["os_pids"]
        os.kill(child, signal.SIGKILL)
        self.restarted(ask, "x", [child])
        self.assertEqual(ask("DELETE", "/processes/x")[0], 200)
        until(lambda: self.descriptors(server) == before, "the same descriptors")
        self.assertEqual(server.stop(), 0)
        server.expect_stderr("WARNING x: exit .*signal 9")

    def test_no_descriptor_left_at_all(self):
        """A process that dies meanwhile, with one of its group left, comes back; a connection waits until it can be accepted."""
        server = self.start()
        ask = self.keep(server)
        code = "import os, signal, sys\nif os.fork(): sys.stdin.read()\nelse: signal.sigwait([])"
        info = dict(python(code), name="x", redirect_input=True, custom_streams=["a"], graceful_timeout=0.1)
        self.assertEqual(ask("POST", "/processes", info)[0], 200)
        self.assertEqual(ask("POST", "/processes", dict(
            info, name="flaps", flapping={"attempts": 2, "window": 60, "retry_in": 60, "max_retry": 0}))[0], 200)
        leaders = [ask("GET", "/status/" + name)[1]["os_pids"][0] for name in ("x", "flaps")]
        with contextlib.ExitStack() as stack:
            with self.limit(server, resource.RLIMIT_NOFILE, 3):
                for leader in leaders:
                    os.kill(leader, signal.SIGKILL)
                late = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT))
                late.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
                for name in ("x", "flaps"):
                    until(lambda name=name: ask("GET", "/status/" + name)[1]["last_exit"], "the exit")
                until(lambda: ask("GET", "/status/x")[1]["error"], "the try to replace it")
                self.assertEqual(ask("POST", "/processes", {"name": "y", "cmd": "cat"})[1]["error"], "busy")
            self.assertIn(b"200 OK", late.recv(1000))
        for name in ("x", "flaps"):             # what the machine has no room for is no second flap
            self.restarted(ask, name, leaders)
        self.assertEqual(server.stop(), 0)
        server.expect_stderr("WARNING (x|flaps): exit .*signal 9")
        for text in "no connection can be accepted", "cannot be started":
            server.expect_stderr(text)
            self.assertEqual(server.stderr.count(text), 1, server.stderr)

    @unittest.skipUnless(os.geteuid() == 0, "root has no limit of processes, and only root can become somebody who has")
    def test_no_process_left(self):
        """EAGAIN: neither a fork nor a thread."""
        code = """if True:
            import sys
            sys.path[0] = %r
            import argparse, gaffer, os, resource, signal
            gaffer.make_parser("serve").format_help()
            os.setgid(61234)
            os.setuid(61234)                    # who may not read this Python's files, perhaps
            for signum, limit in ((signal.SIGURG, 1), (signal.SIGWINCH, 1000)):
                signal.signal(signum, lambda signum, frame, limit=limit: resource.setrlimit(resource.RLIMIT_NPROC, (limit, 1000)))
            sys.exit(gaffer.main())""" % HERE

        def limit(signum, number):
            server.process.send_signal(signum)
            until(lambda: re.search("Max processes +%d " % number, cli_read("/proc/%d/limits" % server.process.pid)), "the limit")
        server = self.run_program([PYTHON, "-c", code, "serve", "--bind", "127.0.0.1:0"], cwd="/")
        ask = self.keep(server)
        self.assertEqual(ask("POST", "/processes", {"name": "x", "cmd": "cat", "redirect_input": True})[0], 200)
        child, = ask("GET", "/status/x")[1]["os_pids"]
        before = self.descriptors(server)
        limit(signal.SIGURG, 1)
        for _ in range(3):
            self.assertEqual(server.request("GET", "/ping")[0], 503)        # it would need a thread
            self.assertEqual(ask("GET", "/processes")[0], 200)              # and this connection has one
        os.kill(child, signal.SIGKILL)
        until(lambda: ask("GET", "/status/x")[1].get("error"), "the failure")
        limit(signal.SIGWINCH, 1000)
        self.restarted(ask, "x", [child])
        self.assertEqual(ask("GET", "/stats")[0], 200)
        self.assertEqual(self.descriptors(server), before)
        server.expect_stderr("a request has no thread|one was refused")
        self.assertEqual(server.stop(), 0)
        server.expect_stderr("WARNING x: exit .*signal 9")
        for text in "a request has no thread", "cannot be started":
            server.expect_stderr(text)
            self.assertEqual(server.stderr.count(text), 1, server.stderr)

    def test_no_memory_left(self):
        """ENOMEM: what cannot be answered is 500 or 503, or closed; then all is as before."""
        server = self.start()
        ask = self.keep(server)
        flood = python("import sys\nfor line in sys.stdin:\n    for _ in range(200): sys.stdout.write('x' * 19999 + chr(10))")
        self.assertEqual(ask("POST", "/processes", dict(flood, name="flood", redirect_input=True))[0], 200)
        self.assertEqual(ask("POST", "/streams/1/stdin", "go")[0], 200)     # no end of line: it waits
        size = int(re.search(r"VmSize:\s+(\d+)", cli_read("/proc/%d/status" % server.process.pid)).group(1))
        answers = []
        with self.limit(server, resource.RLIMIT_AS, size * 1024):
            for _ in range(20):
                with contextlib.suppress(ConnectionError, http.client.HTTPException):
                    answers.append(server.request("POST", "/streams/1/stdin", "x" * 900000 + "\n")[0])
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                answers.append(server.request("GET", "/processes")[0])
        self.assertLessEqual(set(answers), {200, 500, 503}, server)
        self.assertIsNone(server.process.poll(), "it lives")
        self.assertEqual(server.ok("GET", "/processes"), ["flood"])
        self.assertEqual(server.add("more", self.CAT)[0] > 0, True)
        self.assertEqual(server.stop(), 0)
        self.assertLessEqual(server.stderr.count("Traceback"), 3, server.stderr)
        if server.stderr:                       # where the memory ends is chance
            server.expect_stderr("^ |^Traceback|MemoryError|Cannot allocate memory|a request failed|has no thread|was refused")

    def full_pipe(self):
        """(read, write) of a pipe that takes nothing more."""
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        os.set_blocking(write, False)
        for size in (65536, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(write, b"-" * size)
        os.set_blocking(write, True)
        return read, write

    def serve_on(self, **streams):
        """(process, its unix socket's path) of a server with other standard streams, once it answers."""
        path = os.path.join(self.folder(), "socket")
        process = ForkedCommand(["serve", "-v", "--bind", "unix:" + path], stdin=subprocess.DEVNULL, env=self.env, **streams)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        until(lambda: process.poll() is not None or os.path.exists(path), "the socket")
        return process, path

    @staticmethod
    def ask_unix(path, method, target, body=None):
        """(status, value) of a request."""
        connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(TIMEOUT)
        with contextlib.closing(connection):
            until(lambda: connection.sock.connect_ex(path) == 0, "the server")
            connection.request(method, target, body and json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def test_stdout_and_stderr_are_full(self):
        """A full disk, and a pipe that nobody reads: nothing waits for them."""
        _, write = self.full_pipe()
        with open("/dev/full", "wb") as full:
            for out in (full, write):
                with self.subTest(out=out):
                    process, path = self.serve_on(stdout=out, stderr=out)
                    self.assertEqual(self.ask_unix(path, "POST", "/processes", {"name": "x", "cmd": "true"})[0], 200)
                    self.ask_unix(path, "GET", "/watch/proc/x/exit?since=0")
                    process.terminate()
                    self.assertEqual(process.wait(TIMEOUT), 0)

    def test_the_server_is_stopped_for_a_while(self):
        """SIGSTOP, SIGCONT: requests that came meanwhile are answered, no reader loses anything, nothing is killed too early."""
        server = self.start()
        code = "import sys\nfor line in sys.stdin:\n    for n in range(2000): sys.stdout.write('line %d\\n' % n)"
        server.add("x", python(code), redirect_input=True)
        ignores = python("import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: None)\nprint('ready')\nsys.stdin.read()")
        server.add("y", ignores, redirect_input=True, graceful_timeout=1000)
        self.assertEqual(server.request("GET", "/streams/y/stdout?since=0")[2][:5], b"ready")
        feed = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        self.addCleanup(feed.close)
        feed.request("GET", "/streams/1/stdout?feed=continuous&heartbeat=0.1")
        lines = feed.getresponse()
        server.ok("POST", "/streams/1/stdin", "go")
        self.assertEqual(lines.readline(), b"\n")
        server.process.send_signal(signal.SIGSTOP)
        until(lambda: re.search(r"State:\s+T", cli_read("/proc/%d/status" % server.process.pid)), "the stop")
        slow = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
        self.addCleanup(slow.close)
        slow.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
        feed2 = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
        self.addCleanup(feed2.close)
        feed2.sendall(b"POST /streams/1/stdin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nme\n")
        threading.Event().wait(1.0)             # what is tested is time that passes
        server.process.send_signal(signal.SIGCONT)
        self.assertIn(b"200 OK", slow.recv(1000))
        self.assertIn(b"200 OK", feed2.recv(1000))
        got, beats = [], 0
        while len(got) < 2000:
            line = lines.readline()
            got, beats = (got, beats + 1) if line == b"\n" else (got + [line], beats)
        self.assertEqual(got, [b"line %d\n" % n for n in range(2000)])
        self.assertLess(beats, 10, "beats that were missed are not made up for")
        self.assertEqual(server.ok("GET", "/status/y")["restarts"], 0)
        server.ok("POST", "/processes/y/_stop")
        server.ok("DELETE", "/streams/2/stdin")
        self.assertEqual(server.stop(), 0)

    def test_a_clock_that_jumps(self):
        """The time of day is only shown: years back and forth change no timer, no order and no delay."""
        code = ("import sys; sys.path[0] = %r; import itertools, time, gaffer; real, signs = time.time, itertools.cycle((1, -1)); "
                "time.time = lambda: real() + next(signs) * 1e9; sys.exit(gaffer.main())" % HERE)
        server = self.run_program([PYTHON, "-c", code, "serve", "--bind", "127.0.0.1:0"])
        ask = self.keep(server)
        self.assertEqual(ask("POST", "/processes", {"name": "x", "cmd": "true"})[0], 200)
        events = []
        for _ in range(6):     # create, start, spawn, exit, spawn at once, exit
            since = events[-1]["id"] if events else "0"
            events.append(ask("GET", "/watch?since=%s&timeout=%d" % (since, TIMEOUT))[1])
        self.assertEqual([event["event"] for event in events], ["create", "start", "spawn", "exit", "spawn", "exit"])
        self.assertGreater(max(event["time"] for event in events) - min(event["time"] for event in events), 1e9)
        self.assertEqual(ask("GET", "/processes/x/_start")[0], 405)
        status, _, body = server.request("GET", "/streams/x/stdout?timeout=0.1")
        self.assertEqual((status, body), (204, b""))
        self.assertEqual(server.ok("POST", "/processes/x/_stop?wait=1"), {"ok": True})
        self.assertEqual(server.stop(), 0)


class StreamsFrozen(StreamsCase):

    def test_a_clock_that_leaps_ahead(self):
        """The machine, or gaffer, was halted for longer than any of its limits. What had come meanwhile was in time."""
        ahead = 0.0
        loop = gaffer.Loop(lambda: time.monotonic() + ahead)
        with unittest.mock.patch("gaffer.Manager", functools.partial(gaffer.Manager, loop=loop)):
            server = Running()
        self.addCleanup(server.stop_all)
        pid, = server.add("x", "cat", redirect_input=True)
        server.add("y", "cat", redirect_input=True, graceful_timeout=3)
        idle, half, poll = (server.connect() for _ in range(3))
        for sock in idle, half, poll:
            self.addCleanup(sock.close)
        half.sendall(b"GET /ping HTTP/1.1\r\n")
        poll.sendall(http_bytes("GET", "/streams/%d/stdout?since=0" % pid))
        block = server.stream("/streams/%d/stdout?feed=continuous&loss=block" % pid)
        made = WebSocket(server.port, "/wstreams/%d" % pid)
        for opened in block.connection, block, made:
            self.addCleanup(opened.close)
        until(lambda: loop.call(lambda: len([c for c in server.http.channels if c.kind == "longpoll"])), "the long poll")
        go_on, halted = threading.Event(), threading.Event()
        loop.call_soon(lambda: (halted.set(), go_on.wait(TIMEOUT)))
        self.assertTrue(halted.wait(TIMEOUT))
        idle.sendall(http_bytes("GET", "/ping"))
        half.sendall(b"Host: localhost\r\n\r\n")
        made.text("hello\n")
        ahead += 1000.0
        go_on.set()
        for sock in idle, half:
            self.assertEqual(sock.recv(1000)[:15], b"HTTP/1.1 200 OK")
        self.assertEqual((made.read(), block.readline(), poll.recv(1000)[:15]), ((1, b"hello\n"), b"hello\n", b"HTTP/1.1 200 OK"))
        self.assertEqual([server.ok("GET", "/status/" + name)["restarts"] for name in ("x", "y")], [0, 0])
        ahead -= 2000.0                         # no monotonic clock does that: it then takes its time, and goes on
        self.assertEqual(server.request("GET", "/ping")[0], 200)
        ahead += 2000.0                         # children that are polled would end in 2000 seconds


class CliErrors(CliCase):
    """Starts that fail: one sentence. Wrong usage: argparse's."""

    def test_a_start_that_fails_is_one_sentence_and_status_1(self):
        folder = self.folder()
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        good, plain = self.file(folder, "good", "token\n"), self.file(folder, "plain", "no certificate\n")
        raw = os.path.join(folder, "raw")
        with open(raw, "wb") as file:
            file.write(b"\xff\xfe\n")
        os.chmod(raw, 0o600)
        missing, free = os.path.join(folder, "missing"), ["--bind", "127.0.0.1:0"]
        table = [
            (["--bind", "127.0.0.1:%d" % taken.getsockname()[1]], "in use"),
            (free + ["--bind", "127.0.0.1:%d" % taken.getsockname()[1]], "in use"),
            (["--bind", "192.0.2.1:0", "--token-file", good], "cannot assign"),
            (["--bind", "0.0.0.0:0"], "token"),
            (["--bind", "[::]:0"], "token"),
            (["--bind", "nonsense"], "is no address"),
            (["--bind", "127.0.0.1:65536"], "is no address"),
            (["--bind", ""], "is no address"),
            (["--bind", "unix:"], "is no address"),
            (["--bind", "unix:" + os.path.join(missing, "socket")], "no such file"),
            (["--bind", "unix:" + plain], "in use"),
            (["--bind", "unix:" + os.path.join(folder, "x" * 120)], "too long"),
            (["--bind", "unix:/proc/gaffer-test"], "cannot listen"),
            (free + ["--token-file", missing], "no such file"),
            (free + ["--token-file", folder], "cannot be read"),
            (free + ["--token-file", raw], "cannot be read"),
            (free + ["--token-file", self.file(folder, "open", "token\n", 0o644)], "chmod 600"),
            (free + ["--token-file", self.file(folder, "group", "token\n", 0o640)], "chmod 600"),
            (free + ["--token-file", self.file(folder, "empty", "")], "one line"),
            (free + ["--token-file", self.file(folder, "blank", " \n")], "one line"),
            (free + ["--token-file", self.file(folder, "two", "a\nb\n")], "one line"),
            (free + ["--certfile", missing], "cannot be used"),
            (free + ["--certfile", plain, "--keyfile", plain], "cannot be used"),
            (free + ["--certfile", plain], "--keyfile"),
            (["--bind", "unix:" + os.path.join(folder, "s"), "--certfile", plain, "--bind", "127.0.0.1:0"], "--keyfile"),
            (free + ["--keyfile", plain], "certfile"),
        ]
        for number, (arguments, words) in enumerate(table):
            for run in (self.called, self.outcome)[:1 + (number < 2)]:
                with self.subTest(arguments=arguments, run=run.__name__):
                    status, out, err = run("serve", *arguments)
                    self.assertEqual((status, out), (1, ""), err)
                    self.assertRegex(err, r"\Agaffer: [^\n]+\n\Z")
                    self.assertIn(words, err.lower())
        self.assertTrue(os.path.exists(plain), "a file that is no socket is left alone")

    @unittest.skipIf(os.geteuid() == 0, "root may do anything")
    def test_no_permission(self):
        folder = self.folder()
        os.chmod(folder, 0o500)
        status, _, err = self.called("serve", "--bind", "unix:" + os.path.join(folder, "socket"))
        self.assertEqual(status, 1)
        self.assertRegex(err, r"\Agaffer: [^\n]*permission denied[^\n]*\n\Z")

    def test_wrong_usage_is_status_2(self):
        table = [
            (["serve", "--window", "255"], "256"), (["serve", "--window", "1073741825"], "1073741824"),
            (["serve", "--window", "-1"], "256"), (["serve", "--window", "1M"], "256"), (["serve", "--window", "²"], "256"),
            (["--window", "", "serve"], "256"), (["serve", "--window"], "expected one argument"),
            (["serve", "--no-such-option"], "--no-such-option"), (["no-such-command"], "no-such-command"), ([], "serve"),
        ]
        for arguments, words in table:
            with self.subTest(arguments=arguments):
                status, out, err = self.called(*arguments)
                self.assertEqual(status, 2, err)
                self.assertNotIn("Traceback", err)
                self.assertIn(words, out + err)

    def test_version_and_help(self):
        self.assertEqual(self.outcome("--version"), (0, "gaffer %s\n" % gaffer.__version__, ""))
        self.assertEqual(self.called("-h"), self.called("--help"))
        for status, out, err in self.called("--help"), self.called("serve", "--help"):
            self.assertEqual((status, err), (0, ""))
            self.assertEqual(out[:6], "usage:")
        for option in Structure.serve_options():
            self.assertIn(option, self.called("serve", "--help")[1])


class CliControlCase(ServerCase, CliCase):
    """A server in this process, and main() called beside it: `self.call()`. The user's environment is not asked."""

    def setUp(self):
        super().setUp()
        pure_environ(self, GAFFER_ENDPOINT=self.server.url, GAFFER_TOKEN=None, NO_COLOR=None)

    def call(self, *arguments, status=0, err=""):
        """stdout of a command that ends with `status` and says `err` (a regular expression)."""
        found, out, said = self.called(*arguments)
        self.assertEqual(found, status, (arguments, out, said))
        self.assertRegex(said, r"\A%s\Z" % err, arguments)
        return out

    def sleepers(self, *names, **options):
        """Templates that run for long."""
        for name in names:
            self.server.add(name, {"cmd": "sleep 1000"}, **options)


class CliFollowCase(CliControlCase):
    """Commands that go on, as programs of their own: follow() starts one."""

    ECHO = """
        import os, signal, sys
        def bye(signum, frame):
            os.write(1, b"bye\\n")
            os._exit(0)
        signal.signal(signal.SIGTERM, bye)
        os.write(1, b"started\\n")
        while True:
            line = os.read(0, 100)
            if not line:
                break
            os.write(2 if line.startswith(b"!") else 1, line)
        """

    def streams(self):
        """How many clients follow a stream."""
        return sum(isinstance(channel, gaffer.Feed) for channel in tuple(self.server.http.channels))

    def follow(self, *arguments, endpoint=None, **options):
        """A running command whose stdout is read with readline()."""
        options.setdefault("stdin", subprocess.DEVNULL)
        process = ForkedCommand(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                                env=dict(self.env, GAFFER_ENDPOINT=endpoint or self.server.url), **options)

        def end():
            process.kill()
            process.communicate()
        self.addCleanup(end)
        return process

    def interrupted(self, process):
        """Ctrl-C: what else it printed; it says nothing on stderr."""
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
        self.assertEqual((process.returncode, err), (-signal.SIGINT, b""))
        return out

    def say(self, name, text):
        """Write to the one process of a template."""
        pid, = until(lambda: self.server.ok("GET", "/processes/%s/_pids" % name)["pids"])
        self.server.ok("POST", "/streams/%d/stdin" % pid, text)


class CliControl(CliFollowCase):
    """Commands that look and change, against a real server."""

    def test_start_stop_restart_say_a_line_each(self):
        self.sleepers("web", "g:a", "g:b")
        for arguments, out in (
                ("start web", "web: already running\n"), ("stop g:*", "g:a: stopped\ng:b: stopped\n"),
                ("stop all", "web: stopped\ng:a: already stopped\ng:b: already stopped\n"),
                ("start w* web g:[b]", "web: started\ng:b: started\n"),
                ("restart all", "web: restarted\ng:a: started\ng:b: restarted\n")):
            self.assertEqual(self.call(*arguments.split()), out)
        self.assertEqual(self.call("running", "all"), "web: 1\ng:a: 1\ng:b: 1\n")

    def test_commands_wait_until_it_is_done(self):
        """Unless they are told not to, and for as long as they may."""
        ready = python("import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [15])\n"
                       "os.write(1, b'ready\\n')\nsignal.sigwait([15])\ninput()")
        for arguments, said in (
                ("stop NAME", "stopped"), ("restart NAME", "restarted"), ("sub NAME", "0 processes"),
                ("del_process NAME", "deleted"), ("stop NAME.1", "stopped, to be replaced"),
                ("unload g -f /", "unloaded"), ("scale g NAME=0", "0 processes")):
            for more in ([], ["--timeout", "0.05"], ["--no-wait"]):
                with self.subTest(arguments=arguments, more=more):
                    name = "g:a"
                    pid, = self.server.add(name, ready, redirect_input=True, graceful_timeout=1000)
                    self.server.request("GET", "/streams/%d/stdout?since=0" % pid)
                    since = self.server.ok("GET", "/status/" + name)["created"]
                    words = arguments.replace("NAME=", "a=").replace("NAME", name).split()
                    command = self.follow(*words, *more)
                    self.server.wait_event("proc/%s/stop_pid" % name, since) if words[0] not in (
                        "sub", "scale") else self.server.wait_event("proc/%s/reap" % name, since)
                    if not more:
                        self.assertIsNone(command.poll(), "it waits")
                        self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")
                    out, err = command.communicate(timeout=TIMEOUT)
                    if more[:1] == ["--timeout"]:
                        self.assertEqual((command.returncode, out), (124, b""))
                        self.assertRegex(err, rb"\Agaffer: this was not done in 0.05 ")
                    else:
                        word = words[1] if words[1] != "g" else name
                        self.assertEqual((command.returncode, out.decode(), err), (0, "%s: %s\n" % (word, said), b""))
                    if more:
                        self.server.ok("POST", "/streams/%d/stdin" % pid, b"\n")
                        self.server.wait_event("proc/%s/exit" % name, since)
                    self.server.request("DELETE", "/processes/" + name)
                    for pid in self.server.ok("GET", "/processes?running=true"):
                        self.server.ok("POST", "/processes/%d/_signal/KILL" % pid)

    def test_all_are_told_before_one_is_waited_for(self):
        """Each goes only when the other has been told to."""
        folder = self.folder()
        code = """
            import os, signal, time
            signal.pthread_sigmask(signal.SIG_BLOCK, [15])
            os.write(1, b"ready\\n")
            signal.sigwait([15])
            os.mkdir(%r + "/%s-" + str(os.getpid()))
            while not [name for name in os.listdir(%r) if name.startswith("%s-")]:
                time.sleep(0.005)
            """
        for name, other in (("a", "b"), ("b", "a")):
            self.server.add(name, python(code % (folder, name, folder, other)), graceful_timeout=1000)
            self.server.request("GET", "/streams/%s/stdout?since=0" % name)
        self.assertEqual(self.call("restart", "a", "b"), "a: restarted\nb: restarted\n")
        for name in os.listdir(folder):
            os.rmdir(os.path.join(folder, name))
        for pid in 3, 4:
            self.server.request("GET", "/streams/%d/stdout?since=0" % pid)
        self.assertEqual(self.call("stop", "all"), "a: stopped\nb: stopped\n")

    def test_a_process_is_called_by_its_number_or_its_pid(self):
        """web.2, gaffer's pid, the system's pid; a template's name comes first."""
        self.sleepers("web", numprocesses=2)
        self.sleepers("web.2x")
        os_pids = self.server.ok("GET", "/status/web")["os_pids"]
        self.assertEqual(self.call("kill", "web.1", "CONT"), "web.1: signalled CONT\n")
        self.assertEqual(self.call("kill", "-9", "web.2"), "web.2: signalled 9\n")
        self.server.wait_event("proc/web/exit")
        for number, word in enumerate(("web.1", "1", str(os_pids[0]))):
            self.assertEqual(json.loads(self.call("get_process", word))["os_pid"], os_pids[0], number)
        for command in ("start", "restart", "status", "running", "numprocesses", "pids", "add", "sub"):
            self.call(command, "1", status=2, err="gaffer: '1' is a process: this command takes a name, web\n")
        self.assertEqual(self.call("stop", "1", str(os_pids[0]), "web.1", "--json"), '{"ok": true}\n')
        self.call("stop", "77", status=4, err="gaffer: there is no process named '77'.*'gaffer.py status' lists them\n")
        until(lambda: self.call("running", "web") == "2\n")
        self.sleepers("web.1")
        self.assertEqual(self.call("stop", "web.1"), "web.1: stopped\n")
        self.assertEqual(self.call("running", "web", "web.1"), "web: 2\nweb.1: 0\n")

    def test_templates_from_the_command_line(self):
        """All that follows the name is the command."""
        for arguments, fields in (
                (["--start", "a", "sleep", "1000"], {"cmd": "sleep", "args": ["1000"], "start": True}),
                (["a", "sleep 1000"], {"cmd": "sleep 1000", "args": [], "start": False}),
                (["a", "--", "echo", "a", "--", "b"], {"cmd": "echo", "args": ["a", "--", "b"]}),
                (["a", "python3", "-m", "http.server", "--start"], {"cmd": "python3", "args": ["-m", "http.server", "--start"]}),
                (["--env", "A=1=2", "--env", "B=", "--env", "HOME", "--env", "NOSUCH", "a", "x"],
                 {"env": {"A": "1=2", "B": "", "HOME": os.environ["HOME"]}}),
                (["--numprocesses", "2", "--redirect-output", "out, err", "--redirect-input", "--no-os-env", "a", "x"],
                 {"numprocesses": 2, "redirect_output": ["out", "err"], "redirect_input": True, "os_env": False}),
                (["--flapping", "3, retry_in=2.5", "--priority", "-1", "--cwd", ".", "a", "x"],
                 {"flapping": {"attempts": 3, "window": 1.0, "retry_in": 2.5, "max_retry": 5}, "priority": -1,
                  "cwd": os.getcwd()})):
            with self.subTest(arguments):
                out = self.call("add_process", *arguments)
                self.assertEqual(out, "a: added and started\n" if arguments[0] == "--start" else "a: added\n")
                info = json.loads(self.call("get_process", "a"))
                self.assertEqual({name: info[name] for name in fields}, fields)
                self.call("del_process", "a")
        path = self.file(self.folder(), "c.json", json.dumps({"name": "c", "cmd": "sleep 1000", "start": True}))
        self.assertEqual(self.call("load_process", path), "c: added\n")
        self.assertEqual(self.server.ok("GET", "/status/c")["active"], False)

    def test_an_update_changes_what_is_given(self):
        self.server.add("a", {"cmd": "sleep 1000"}, env={"A": "1", "B": "2"}, cwd="/", numprocesses=2, start=False)
        before = json.loads(self.call("get_process", "a"))
        for arguments, fields in (
                (["a", "sleep", "-0", "2000"], {"cmd": "sleep", "args": ["-0", "2000"]}),
                (["a", "--", "sleep 3000"], {"cmd": "sleep 3000", "args": []}),
                (["--env", "B=3", "a"], {"env": {"A": "1", "B": "3"}}),
                (["--redirect-input", "a"], {"redirect_input": True}),
                (["--no-redirect-input", "--numprocesses", "1", "a"], {"redirect_input": False, "numprocesses": 1})):
            self.assertEqual(self.call("update_process", *arguments), "a: updated\n")
            before.update(fields)
            self.assertEqual(json.loads(self.call("get_process", "a")), before)
            self.assertEqual(self.call("running", "a"), "0\n")
        self.call("update_process", "--start", "a")
        self.assertEqual(self.call("running", "a"), "1\n")

    def test_what_is_refused(self):
        self.sleepers("a")
        folder = self.folder()
        for arguments, status, words in (
                ("add_process a x", 1, ".*'gaffer.py update_process' changes it"),
                ("add_process a", 2, "say what to run: .*"),
                ("add_process --start b nosuchprogram", 1, ".*nosuchprogram.*"),
                ("add_process --uid nosuchuser b x", 1, ".*nosuchuser.*"),
                ("add_process --numprocesses two b x", 2, "--numprocesses: .*not 'two'"),
                ("add_process --flapping 1,2,3,4,5 b x", 2, "--flapping: .*"),
                ("update_process a", 2, "say what to change: .*"),
                ("load_process /nosuch", 1, "/nosuch cannot be read as JSON: No such file.*"),
                ("load_process " + self.file(folder, "x", "{"), 1, ".*line 1.*"),
                ("load_process " + self.file(folder, "y", "[]"), 1, ".*one JSON object.*"),
                ("kill a NOSUCH", 1, "'NOSUCH' .*signal.*"), ("stop x* a", 4, "there is no process named 'x\\*'.*")):
            with self.subTest(arguments):
                self.call(*arguments.split(), status=status, err="gaffer: %s\n" % words)
        for number in ("0", "-1", "x"):
            self.call("add", "a", number, status=2, err=r"usage: [\s\S]*")
        self.assertEqual(self.call("running", "a"), "0\n", "the names that are none do not keep the others")
        self.assertEqual(self.call("processes"), "a\n")

    def test_counts(self):
        self.sleepers("web", "db")
        for arguments, out in (("add web 2", "web: 3 processes\n"), ("add web", "web: 4 processes\n"),
                               ("sub web 3", "web: 1 process\n"), ("numprocesses web", "1\n"),
                               ("running all", "web: 1\ndb: 1\n"), ("processes --running", "2\n5\n"),
                               ("pids web db", "web: 5\ndb: 2\n"), ("processes --json", '["web", "db"]\n'),
                               ("--json add web", '{"ok": true, "numprocesses": 2}\n')):
            self.assertEqual(self.call(*arguments.split()), out)


class CliStatus(CliFollowCase):
    """The table of `status`, and where it is shown."""

    STATUS = {"name": "web", "state": "running", "running": 1, "numprocesses": 1, "pids": [1], "os_pids": [4711],
              "restarts": 0, "last_exit": None, "error": None, "gave_up": False, "waiting": [],
              "processes": [{"pid": 1, "os_pid": 4711, "instance": 1, "state": "running", "uptime": 62}]}
    KILLED = {"exit_status": 0, "term_signal": 9, "times": 3}

    def rows(self, *statuses, width=None, coloured=False):
        """The lines of the table, without its head, of statuses that differ so from a running one."""
        made = [dict(self.STATUS, **dict({"processes": []} if status.get("state", "running") != "running" else {}, **status))
                for status in statuses]
        return gaffer.status_table(made, width, coloured)[1:]

    def test_rows(self):
        failing = {"name": "bad", "state": "backoff", "running": 0, "restarts": 3, "last_exit": self.KILLED, "waiting": [7.2]}
        for statuses, lines in (
                ([{}], ["web.1  running  1/1  4711   1m02s         0     -    -    -", "1 template: 1 running"]),
                ([{}, failing], ["bad    backoff  0/1     -       -         3   137    -    -  next try in 8s; exit 137 (SIGKILL), 3 times",
                                 "web.1  running  1/1  4711   1m02s         0     -    -    -", "2 templates: 1 backoff, 1 running"]),
                ([{"state": "stopped", "running": 0, "gave_up": True, "last_exit": {"exit_status": 7, "term_signal": 0, "times": 2}}],
                 ["web   stopped  0/1    -       -         0     7    -    -  gave up; exit 7, 2 times", "1 template: 1 stopped"]),
                ([{"pids": [4711], "processes": [dict(self.STATUS["processes"][0], pid=4711, kill_in=3)]}],
                 ["web.1  running  1/1  4711  4711   1m02s         0     -    -    -  SIGKILL in 3s", "1 template: 1 running"])):
            self.assertEqual(self.rows(*statuses), lines)

    def test_it_fits_the_terminal(self):
        failing = {"name": "bad", "state": "backoff", "last_exit": self.KILLED, "waiting": [8]}
        for width in (60, 80, 100):
            lines = self.rows(failing, {"name": "x" * 100}, width=width)
            self.assertTrue(all(len(line) <= width for line in lines), lines)
            self.assertIn("x…", lines[1])
        self.assertTrue(self.rows(failing, width=80)[0].endswith("next try in 8s; exit…"), self.rows(failing, width=80))
        coloured = self.rows(failing, {}, coloured=True)
        self.assertEqual([re.sub("\x1b\\[\\d+m", "", line) for line in coloured], self.rows(failing, {}))
        self.assertEqual("".join(coloured).count("\x1b["), 4)

    def test_times(self):
        for seconds, words in (0, "0s"), (59.9, "59s"), (62, "1m02s"), (3 * 3600 + 720, "3h12m"), (2 * 86400 + 4 * 3600, "2d04h"):
            self.assertEqual(gaffer.span(seconds), words)

    def test_what_runs_and_what_does_not(self):
        self.call("status", status=3, err="gaffer: there is nothing yet: 'gaffer.py add_process'.*\n")
        self.call("status", "nosuch", status=4, err="gaffer: there is no process named 'nosuch'.*\n")
        self.sleepers("web", numprocesses=2)
        out = self.call("status", "web")
        for number, os_pid in enumerate(self.server.ok("GET", "/status/web")["os_pids"], 1):
            self.assertRegex(out, r"(?m)^web\.%d +running +2/2 +%d +(\d+ +)?\ds +0 +- +\d+\.\d%% +[\d.]+[KM]?$" % (number, os_pid))
        self.server.add("broken", "false")
        self.server.add("hopeless", "sh -c 'exit 7'", flapping={"attempts": 2, "window": 60.0, "max_retry": 0})
        until(lambda: self.server.ok("GET", "/status/broken")["restarts"] >= 3)
        self.server.wait_event("proc/hopeless/stop")
        lines = self.call("status", status=3).splitlines()
        self.assertEqual([line.split()[0] for line in lines], ["NAME", "broken", "hopeless", "web.1", "web.2", "3"])
        self.assertRegex(lines[1], r"backoff +0/1 .*  next try in \ds; exit 1, \d+ times\Z")
        self.assertRegex(lines[2], r"stopped +0/1 .* 7 .*  gave up; exit 7, 2 times\Z")
        self.assertEqual([json.loads(line)["name"] for line in self.call("status", "--json", "web", "h*", status=3).splitlines()],
                         ["web", "hopeless"])

    def test_300_templates_are_one_request(self):
        for number in range(300):
            self.server.manager.add_process("x%d" % number, "true", start=False)
        with unittest.mock.patch.object(gaffer.Client, "open", autospec=True, side_effect=gaffer.Client.open) as asked:
            out = self.call("status", status=3)
        self.assertEqual((asked.call_count, len(out.splitlines())), (1, 302))

    def test_again_each_second_until_the_signal(self):
        """Also where the server is away for a while."""
        self.sleepers("web")
        process = self.follow("status", "-w")
        self.assertEqual([process.stdout.readline()[:4] for _ in range(6)], [b"NAME", b"web.", b"1 te"] * 2)
        self.assertEqual(self.interrupted(process)[-1:], b"")
        away = gaffer.NoServer("http://x", "connection refused")
        args = argparse.Namespace(watch=True, json=True, endpoint=None, token_file=None, cacert=None)
        for answers, last in (({}, away, {}, KeyboardInterrupt()), KeyboardInterrupt), (
                ({}, gaffer.NotThere("gone")), gaffer.NotThere), ((away,), gaffer.NoServer):
            with unittest.mock.patch.object(gaffer, "get_statuses", side_effect=answers) as asked, \
                    unittest.mock.patch.object(gaffer, "STATUS_INTERVAL", 0), self.assertRaises(last):
                gaffer.show_status(args, lambda statuses: (statuses, 0))
            self.assertEqual(asked.call_count, len(answers))


class CliCommands(CliControlCase):
    """How commands are asked for help, and what else is said to all of them."""

    def test_help(self):
        for name, command in gaffer.COMMANDS.items():
            with self.subTest(name):
                out = self.call(name, "--help")
                self.assertRegex(out, r"\Ausage: gaffer.py %s \[options\]( \[?[A-Z]+( \.\.\.)?\]?)*\n" % name)
                for names, how in command.options:
                    self.assertIn(names[-1] if names[0].startswith("-") else how["metavar"], out)
                    self.assertIn(how["help"].split()[-1], out)
        self.assertEqual(self.call(status=2), self.call("--help"))
        for name in gaffer.COMMANDS:
            self.assertRegex(self.call("--help"), r"\n  %s +[a-z]" % name)

    def test_options_before_the_command(self):
        for argv, expected in (
                (["-f", "logs"], ("logs", ["-f"])), (["-f", "x", "up"], ("up", ["-f", "x"])), (["-f", "up", "up"], ("up", ["-f", "up"])),
                (["--token-file", "start", "status"], ("status", ["--token-file", "start"])), (["run", "start"], ("run", ["start"])),
                (["--json", "status", "stop"], ("status", ["--json", "stop"])), (["--bind=x", "serve"], ("serve", ["--bind=x"])),
                (["--json"], (None, ["--json"])), (["x", "status"], (None, ["x", "status"])), ([], (None, []))):
            self.assertEqual(gaffer.command_first(gaffer.COMMANDS, argv), expected)

    def test_mistakes(self):
        self.call("statsu", status=2, err="gaffer: there is no command 'statsu', did you mean 'status'\\?\n")
        self.call("tail", "-f", "web", status=2, err="gaffer: there is no command 'tail': it is 'gaffer.py logs'\n")
        for here in gaffer.ELSEWHERE.values():
            self.assertIn(here.split()[0], [*gaffer.COMMANDS, "--version"])
        self.call("--json", "--x", status=2, err="gaffer: there is no command '--json'.*\n")
        self.call("--json", "x", "stop", status=2, err="gaffer: there is no command 'x'.*\n")
        self.call("stop", status=2, err=r"usage: gaffer.py stop [\s\S]*NAME\n")
        self.call("stop", "--al", "x", status=2, err=r"usage: gaffer.py stop [\s\S]*--al\n")
        for endpoint in ("ftp://x", "http://", "unix:", "http://x:99999", "http://[::1"):
            self.call("processes", "--endpoint", endpoint, status=2, err="gaffer: '.*' is not an endpoint: .*\n")

    def test_endpoints(self):
        folder = self.folder()
        path = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        self.call("processes", "--endpoint", "unix:" + path, status=5, err="gaffer: .*connection refused.*\n")
        self.call("processes", "--endpoint", "unix:" + folder + "/x", status=5, err="gaffer: .*no such file.*\n")
        self.call("processes", "--endpoint", self.server.url.replace("http", "https"), status=5, err="gaffer: .*is it http://\\?.*\n")
        os.unlink(path)
        server = Running(endpoints=[gaffer.HttpEndpoint("unix:" + path)])
        self.addCleanup(server.stop_all)
        self.assertEqual(self.call("processes", "--endpoint", "unix:" + path), "")
        for endpoint in ("127.0.0.1:%d", ":%d", "%d"):
            self.assertEqual(self.call("processes", "--endpoint", endpoint % self.server.port), "")
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(folder)
        self.assertEqual(self.call("processes", "--endpoint", "unix:socket"), "")

    def test_the_server_of_this_folder(self):
        """What `up` listens on, unless another user has made it, or nobody listens there any more."""
        here, folder = os.getcwd(), self.folder()
        self.addCleanup(os.chdir, here)
        os.chdir(folder)
        os.environ["GAFFER_ENDPOINT"] = ""
        server = Running(endpoints=[gaffer.HttpEndpoint("unix:" + gaffer.FOLDER_SOCKET)])
        self.addCleanup(server.stop_all)
        server.manager.add_process("here", "sleep 1000")
        self.assertEqual(self.call("processes"), "here\n")
        with unittest.mock.patch("os.geteuid", return_value=os.geteuid() + 1):
            self.assertEqual(gaffer.find_endpoint(), gaffer.DEFAULT_ENDPOINT)
        os.environ["GAFFER_ENDPOINT"] = self.server.url
        self.assertEqual(self.call("processes"), "")
        os.environ["GAFFER_ENDPOINT"] = ""
        server.manager.stop(kill=True)
        until(lambda: gaffer.find_endpoint() == gaffer.DEFAULT_ENDPOINT)

    def test_what_is_no_gaffer(self):
        answers = {b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi": 5, b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}": 5,
                   b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}": 1, b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]": 1,
                   b"SSH-2.0-x\r\n": 5, b"": 5, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi": 5}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for answer, expected in answers.items():
                def serve_once(answer=answer):
                    sock, _ = listener.accept()
                    with sock:
                        sock.recv(65536)
                        sock.sendall(answer)
                thread = threading.Thread(target=serve_once)
                thread.start()
                endpoint = "http://127.0.0.1:%d" % listener.getsockname()[1]
                self.call("pids" if expected == 1 else "get_process", "x" if expected == 1 else "x*", "--endpoint", endpoint, status=expected,
                          err="gaffer: there is no gaffer at .*\n" if expected == 5 else "gaffer: what .* answered is not understood .*\n")
                thread.join()

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl for a certificate")
    def test_tls(self):
        folder = self.folder()
        cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = Running(endpoints=[gaffer.HttpEndpoint("127.0.0.1:0", cert, key)])
        self.addCleanup(server.stop_all)
        self.assertEqual(self.call("processes", "--endpoint", server.url, "--cacert", cert), "")
        self.call("processes", "--endpoint", server.url, status=6, err="gaffer: .*cannot be trusted.*--cacert\n")
        self.call("processes", "--endpoint", server.url.replace("https", "http"), status=5, err="gaffer: .*as https://\\?.*\n")
        self.call("processes", "--endpoint", server.url, "--cacert", key, status=2, err="gaffer: .*--cacert.*\n")

class CliEveryCommand(CliControlCase):
    """Each command as its user runs it, a program of its own against a real server: what it prints and how it ends when all is well,
    with a wrong name, where no server is, where the token is refused, and where nobody reads what it prints."""

    OWN_TESTS = {"serve", "up", "run"}          # ask no server, and go on
    BY_GROUP = {"ps", "scale", "unload"}
    NAMED = (4, "there is no process named 'nosuch'; 'gaffer.py status' lists them")
    GROUP = (4, "there is no process of the group 'nosuch': 'gaffer.py load' loads it")
    # arguments, and what is printed, @ being a template that only this run has; arguments with a wrong name, and what comes of them
    TABLE = {
        "processes": ("", r"(.*\n)*@\n(.*\n)*", None, None),
        "status": ("@", r"NAME +STATE .*\n@\.1 +running +1/1 +\d+ .*\n1 template: 1 running\n", "nosuch", NAMED),
        "start": ("@", "@: already running\n", "nosuch", NAMED),
        "stop": ("@", "@: stopped\n", "nosuch", NAMED),
        "restart": ("@", "@: restarted\n", "nosuch", NAMED),
        "add": ("@", "@: 2 processes\n", "nosuch", NAMED),
        "sub": ("@", "@: 0 processes\n", "nosuch", NAMED),
        "kill": ("@ CONT", "@: signalled CONT\n", "nosuch CONT", NAMED),
        "running": ("@", "1\n", "nosuch", NAMED),
        "numprocesses": ("@", "1\n", "nosuch", NAMED),
        "pids": ("@", r"\d+\n", "nosuch", NAMED),
        "get_process": ("@", r'\{\n    "name": "@",\n(.*\n)*\}\n', "nosuch", NAMED),
        "add_process": ("@-new sleep 1", "@-new: added\n", "ticker sleep 1", (1, ".*'ticker'.*'gaffer.py update_process' changes it")),
        "load_process": ("@.json", "@-new: added\n", "ticker.json", (1, ".*'ticker'.*'gaffer.py update_process' changes it")),
        "update_process": ("@ sleep 2000", "@: updated\n", "nosuch sleep 1", (4, "there is no process named 'nosuch'.*")),
        "del_process": ("@", "@: deleted\n", "nosuch", NAMED),
        "logs": ("@", r"@\.1 \| line\n", "nosuch", NAMED),
        "attach": ("@", "line\n", "nosuch", NAMED),
        "watch": ("proc/ticker", r"[0-9:]{8} ticker: .*\n", "spawm", (1, "there is no event type 'spawm', did you mean 'spawn'.*")),
        "reload": ("", "kept: kept\n", None, None),
        "load": ("@-new", "@-new:web: loaded\n", "@-new -c wep=2", (4, "there is no 'wep', did you mean 'web'\\?")),
        "unload": ("@", "@:web: unloaded\n", "nosuch", GROUP),
        "scale": ("@ web=2", "@:web: 2 processes\n", "nosuch web=2", GROUP),
        "ps": ("@", r"NAME +STATE .*\n@:web\.1 +running +1/1 +\d+ .*\n1 template: 1 running\n", "nosuch", GROUP),
        "export": ("ini @", r"; made from Procfile\n\n\[process:@:web\](.*\n)*", "ini nosuch -f nosuch", (1, "there is no 'nosuch': name a Procfile with -f FILE.*")),
        "completion": ("bash", r"_gaffer\(\) \{(.*\n)*", "csh", (2, "(?s)usage: .*'csh'.*")),
    }
    STATUS = {"attach": 3, "watch": -signal.SIGINT}
    UNREAD = ("processes", "status", "stop", "logs", "attach", "watch", "export")   # each writes in a way of its own
    SAID = {"attach": r"gaffer: attached to @\.1, os pid \d+: .*\n(gaffer: detached, @\.1 has ended\n)?"}
    NO_SERVER = r"gaffer: there is no gaffer at http://127\.0\.0\.1:1 \(.*\): start one with 'python3 gaffer\.py serve'.*\n"
    REFUSED = r"gaffer: the server wants its token: give it with --token-file FILE or GAFFER_TOKEN\n"

    def setUp(self):
        super().setUp()
        self.home = self.folder()
        self.file(self.home, "Procfile", "web: read x; exit 3\n")
        self.file(self.home, "ticker.json", '{"name": "ticker", "cmd": "true"}')
        kept = gaffer.examine_template({"name": "kept", "cmd": "sleep 1000"})[0]
        gaffer.Configuration(lambda: gaffer.Settings([], {"kept": kept}, [])).begin(self.server.manager)
        # watch has something to see at any time
        self.server.add("ticker", "sleep 0.1", flapping={"attempts": 1000, "window": 0.01})
        self.guarded = Running(token="s3cret")
        self.addCleanup(self.guarded.stop_all)
        self.unread, write = os.pipe()
        os.close(self.unread)
        self.unread = os.fdopen(write, "wb")
        self.addCleanup(self.unread.close)

    def add_templates(self, run, names):
        """For each command a template of its own."""
        for name in names:
            template = run + name + ":web" * (name in self.BY_GROUP)
            self.server.add(template, {"cmd": "echo line; read x; exit 3", "shell": True}, redirect_input=True)
            self.file(self.home, run + name + ".json", '{"name": "%s%s-new", "cmd": "true"}' % (run, name))
        for name in ("logs", "attach"):
            self.server.request("GET", "/streams/%s/stdout?since=0" % (run + name))

    def cells(self):
        """(command, arguments, environment, stdout, (status, output, what is said on stderr)) of each run."""
        for name, (arguments, output, wrong, comes) in self.TABLE.items():
            well, unread = "well-" + name, "unread-" + name
            said = self.SAID.get(name, "")
            yield name, arguments.replace("@", well), {}, subprocess.PIPE, (
                self.STATUS.get(name, 0), output.replace("@", well), said.replace("@", well))
            if name in self.UNREAD:
                yield name, arguments.replace("@", unread), {}, self.unread, (141, "", said.replace("@", unread))
            if wrong is not None:
                sentence = comes[1] if comes[0] == 2 else "gaffer: %s\n" % comes[1]
                yield name, wrong.replace("@", well), {}, subprocess.PIPE, (comes[0], "", sentence)
            if any("--endpoint" in names for names, _ in gaffer.COMMANDS[name].options):
                nobody = {"GAFFER_ENDPOINT": "http://127.0.0.1:1"}
                yield name, arguments.replace("@", well), nobody, subprocess.PIPE, (5, "", self.NO_SERVER)
                refused = {"GAFFER_ENDPOINT": self.guarded.url, "GAFFER_TOKEN": "wrong"}
                yield name, arguments.replace("@", well), refused, subprocess.PIPE, (6, "", self.REFUSED)

    def run_cell(self, cell):
        """None, or the cell and what was wrong with it."""
        name, arguments, more, stdout, expected = cell
        options = {"cwd": self.home, "stdin": subprocess.PIPE, "stdout": stdout, "stderr": subprocess.PIPE,
                   "universal_newlines": True, "env": {**self.env, "GAFFER_ENDPOINT": self.server.url, **more}}
        if (name, more) in (("status", {}), ("stop", {}), ("logs", {})):
            process = subprocess.Popen([PYTHON, CLI_FILE, name, *arguments.split()], **options)
        else:
            process = ForkedCommand([name, *arguments.split()], **options)
        with process:
            out = ""
            if expected[0] == -signal.SIGINT:
                out = process.stdout.readline()
                process.send_signal(signal.SIGINT)
            rest, err = process.communicate("\n", timeout=TIMEOUT)
        out = out if expected[0] == -signal.SIGINT else rest or ""
        well = process.returncode == expected[0] and re.fullmatch(expected[1], out) and re.fullmatch(expected[2], err)
        return None if well else (name, arguments, more, "unread" if stdout is self.unread else "", process.returncode, out, err)

    def test_every_cell_of_the_table(self):
        self.assertEqual(set(self.TABLE) | self.OWN_TESTS, set(gaffer.COMMANDS), "each command has a row")
        self.add_templates("well-", self.TABLE)
        self.add_templates("unread-", self.UNREAD)
        with concurrent.futures.ThreadPoolExecutor(max(2, gaffer.CORES)) as pool:
            self.assertEqual([outcome for outcome in pool.map(self.run_cell, self.cells()) if outcome is not None], [])

    def test_json_is_an_object_a_line(self):
        """Of every command that has it, in this process."""
        self.add_templates("well-", self.TABLE)
        for name, (arguments, _, _, _) in self.TABLE.items():
            if any("--json" in names for names, _ in gaffer.COMMANDS[name].options) and name not in self.STATUS:
                arguments = ["--json"] + [word.replace("@", "well-" + name) for word in arguments.split()]
                arguments = [os.path.join(self.home, word) if word.endswith(".json") else word for word in arguments]
                more = ["-f", os.path.join(self.home, "Procfile")] if name in self.BY_GROUP | {"load"} else []
                with self.subTest(name):
                    lines = self.call(name, *more, *arguments).splitlines()
                    self.assertTrue(lines and all(isinstance(json.loads(line), (dict, list)) for line in lines), lines)

    def test_without_a_token(self):
        self.call("processes", "--endpoint", self.guarded.url, status=6, err=self.REFUSED)
        self.call("processes", "--endpoint", self.guarded.url, "--token-file", self.file(self.home, "token", "s3cret\n"))
        os.environ["GAFFER_TOKEN"] = "s3cret"
        self.call("processes", "--endpoint", self.guarded.url)


class CliTerminal(CliFollowCase):
    """Commands as programs of their own in a real terminal: keys, colours, its size, its end."""

    def terminal(self, *arguments, rows=24, columns=80, **more):
        """(program, what is typed and read there) of a command in a terminal of its own."""
        main, side = os.openpty()
        self.addCleanup(os.close, main)
        self.resize(main, rows, columns)
        self.seen = ""

        def own_terminal():
            os.setsid()
            fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        env = {**self.env, "GAFFER_ENDPOINT": self.server.url, "TERM": "xterm", **more}
        process = subprocess.Popen([*CLI_COMMAND, *arguments], stdin=side, stdout=side, stderr=side, env=env,
                                   cwd=self.folder(), preexec_fn=own_terminal)
        os.close(side)

        def end():
            process.kill()
            process.wait()
        self.addCleanup(end)
        return process, main

    @staticmethod
    def resize(main, rows, columns):
        fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def shows(self, main, pattern):
        """Read until what is shown from here on matches; returns the match."""
        while not re.search(pattern, self.seen):
            self.assertTrue(select.select([main], [], [], TIMEOUT)[0], "%s is not in %r" % (pattern, self.seen))
            try:
                self.seen += os.read(main, 65536).decode("utf-8", "replace")
            except OSError:                     # EIO: nobody has the other side any more
                self.fail("%s is not in %r" % (pattern, self.seen))
        match = re.search(pattern, self.seen)
        self.seen = self.seen[match.end():]
        return match

    def test_ctrl_c_ends_a_command_by_the_signal(self):
        self.server.add("a", "sh -c 'while echo line; do sleep 0.05; done'")
        script = [PYTHON, "-W", "error", CLI_FILE]
        for arguments, shown in ((["status", "-w"], "running"), (["logs", "-f"], "line"), (["watch"], "")):
            with unittest.mock.patch.dict(globals(), CLI_COMMAND=script), self.subTest(arguments):
                process, main = self.terminal(*arguments)
                if shown:
                    self.shows(main, shown)
                else:
                    until(lambda: self.streams(), "it watches")
                os.write(main, b"\x03")
                self.assertEqual(process.wait(TIMEOUT), -signal.SIGINT)

    def test_status_says_what_does_not_fit(self):
        for number in range(20):
            self.server.add("x%d" % number, "true", start=False)
        process, main = self.terminal("status", "-w", rows=10)
        self.shows(main, r"NAME .*\n.*x0 (.*\n){6}.*… 14 more lines do not fit[^\n]*\n.*20 templates: 20 stopped")
        self.resize(main, 40, 80)
        self.shows(main, r"x19 .*\n.*20 templates")
        os.write(main, b"\x1c")
        self.assertEqual(process.wait(TIMEOUT), -signal.SIGQUIT)

    def test_colours_unless_they_are_not_wanted(self):
        self.sleepers("web")
        for more, arguments, colours in ({}, [], 2), ({"NO_COLOR": "1"}, [], 0), ({"TERM": "dumb"}, [], 0), ({}, ["--no-color"], 0):
            process, main = self.terminal("status", *arguments, **more)
            out = self.shows(main, r"[\s\S]*1 template: 1 running").group()
            self.assertEqual((process.wait(TIMEOUT), out.count("\x1b[")), (0, colours), out)

    def test_a_terminal_that_is_closed(self):
        self.server.add("a", "sh -c 'while echo line; do sleep 0.05; done'")
        procfile = self.file(self.folder(), "Procfile", "a: echo line; exec sleep 1000\n")
        for arguments, status in ((["logs", "-f"], -signal.SIGHUP), (["attach", "a"], 128 + signal.SIGHUP), (
                ["up", "-f", procfile], 0)):
            with self.subTest(arguments):       # up may see the end of its output first
                process, main = self.terminal(*arguments)
                self.shows(main, "line")
                nothing = os.open(os.devnull, os.O_RDONLY)
                os.dup2(nothing, main)          # nobody has the terminal any more
                os.close(nothing)
                self.assertIn(process.wait(TIMEOUT), (status, status or 128 + signal.SIGPIPE))

    def test_attach(self):
        """Ctrl-C goes to the process, Ctrl-] leaves it, Ctrl-\\ is text; what is shown ends with a line of its own."""
        self.server.add("a", "cat", redirect_input=True)
        code = "import os, signal\nsignal.signal(2, lambda *a: os.write(1, b'int> '))\nos.write(1, b'> ')\nwhile True: signal.pause()"
        self.server.add("deaf", python(code))
        process, main = self.terminal("attach", "a")
        self.shows(main, r"gaffer: attached to a\.1, os pid \d+: Ctrl-\] leaves it running, Ctrl-C goes to it\r\n")
        os.write(main, b"typed\x1c\n")
        self.shows(main, r"typed\^\\\r\n(?s:.*)typed\x1c\r\n")
        os.write(main, b"\x1d")
        self.shows(main, r"gaffer: detached, a\.1 runs on\r\n")
        self.assertEqual(process.wait(TIMEOUT), 0)
        process, main = self.terminal("attach", "deaf")
        self.shows(main, "its stdin is /dev/null")
        self.shows(main, "> ")
        os.write(main, b"\x03")
        self.shows(main, "int> ")
        self.server.ok("POST", "/processes/deaf/_signal/KILL")
        self.shows(main, "\r\ngaffer: detached, deaf.1 has ended\r\n")
        self.assertEqual(process.wait(TIMEOUT), 137)

    def test_up(self):
        folder = self.folder()
        procfile = self.file(folder, "Procfile", "a: trap '' TERM; echo ready; while :; do sleep 0.05; done\n")
        process, main = self.terminal("up", "-f", procfile)
        self.shows(main, r"system \| listening on unix:%s/.gaffer.sock\r\n" % re.escape(folder))
        self.shows(main, "\x1b\\[36m[0-9:]{8} a.1    \\|\x1b\\[0m ready")
        os.write(main, b"\x03")
        self.shows(main, r"system \| waiting for a\.1, SIGKILL in 10 s; Ctrl-C again kills now\r\n")
        os.write(main, b"\x03")
        self.shows(main, r"a\.1 was ended by SIGKILL\r\n")
        self.assertEqual(process.wait(TIMEOUT), 0)
        self.assertEqual(os.listdir(folder), ["Procfile"])


class CliLogs(CliFollowCase):
    """logs"""

    def test_the_last_lines_in_order(self):
        self.server.add("a", "printf '1\\n2\\n3\\n'", flapping={"attempts": 1, "max_retry": 0})
        self.server.wait_event("proc/a/exit")
        code = "import os; os.write(2, b'two\\n'); input(); os.write(1, b'one\\n'); input(); os.write(2, b'three\\n'); input()"
        self.server.add("long", python(code), redirect_input=True)
        for label, text in (("stderr", None), ("stdout", b"\n"), ("stderr", b"\n")):
            since = int(self.server.request("HEAD", "/streams/2/" + label)[1]["Gaffer-Offset"]) if text else 0
            if text:
                self.server.ok("POST", "/streams/2/stdin", text)
            self.server.request("GET", "/streams/2/%s?since=%d" % (label, since))
        until(lambda: self.call("logs", "long").endswith("three\n"))
        for arguments, lines in (
                ("logs -n 2", ["a.1    | 2", "a.1    | 3", "long.1 | two", "long.1 | one", "long.1 | three"]),
                ("logs -n all a", ["a.1 | 1", "a.1 | 2", "a.1 | 3"]), ("logs --since 1h -n1 a", ["a.1 | 3"]),
                ("logs a long.1 -n1 --no-prefix", ["3", "one", "three"]), ("logs --stderr l*", ["long.1 | two", "long.1 | three"]),
                ("logs --stdout 2", ["long.1 | one"]), ("logs --stdout --stderr -n1 long", ["long.1 | one", "long.1 | three"])):
            with self.subTest(arguments):
                self.assertEqual(self.call(*arguments.split()).splitlines(), lines)
        self.assertRegex(self.call("logs", "-t", "-n1", "a"), r"\A[0-9-]{10} [0-9:]{8} a\.1 \| 3\n\Z")
        self.assertEqual(self.call("logs", "nosuch", "a", "-n", "1", status=4, err="gaffer: .*nosuch.*\n"), "a.1 | 3\n")
        self.call("logs", "-f", "nosuch", status=4, err="gaffer: .*nosuch.*\n")
        line = json.loads(self.call("logs", "--json", "-n1", "a"))
        self.assertEqual((line["name"], line["pid"], line["label"], line["data"]), ("a", 1, "stdout", "3"))
        self.assertLess(abs(time.time() - line["time"]), TIMEOUT)

    def test_lines(self):
        """Unfinished ones are continued; form feeds and U+2028 end none."""
        line = gaffer.journal_line
        for texts, count, shown in (
                (["1.5 a 1 stdout+ 50%", "1.6 b 2 stdout x", "1.7 a 1 stdout  done"], math.inf, ["50% done", "x"]),
                (["1 a 1 stdout x", "1 a 1 stderr y", "1 a 1 stdout z"], 1, ["y", "z"]),
                (["1 a 1 stdout 10%\r20%\r"], math.inf, ["20%"]), (["1 a 1 stdout a\x0cb\u2028c d"], math.inf, ["a\x0cb\u2028c d"]),
                (["1 a 1 stdout "], math.inf, [""])):
            self.assertEqual([each.text for each in gaffer.merge_lines(map(line, texts), count)], shown)

    def test_an_unfinished_line_is_continued_as_it_comes(self):
        self.server.add("a", "cat", redirect_input=True)
        self.server.add("b", "cat", redirect_input=True)
        follower = self.follow("logs", "-f")
        until(lambda: self.streams() == 1)
        for name, text, shown in (("a", b"50%", b"a.1 | 50%"), ("a", b" 60%", b" 60%"), ("b", b"x\n", b"\nb.1 | x\n"),
                                  ("a", b" 70%\n", b"a.1 |  70%\n")):
            self.say(name, text)
            self.assertEqual(follower.stdout.read(len(shown)), shown)
        self.assertEqual(self.interrupted(follower), b"")

    def test_follows_what_is_new_and_what_comes_back(self):
        """A template that is added later, a kill, a deletion, a connection that is lost."""
        follower = self.follow("logs", "-f")
        self.server.add("a", python(self.ECHO), redirect_input=True)
        self.assertEqual(follower.stdout.readline(), b"a.1 | started\n")
        named = self.follow("logs", "-f", "a", "--no-prefix")
        self.assertEqual(named.stdout.readline(), b"started\n")
        until(lambda: self.streams() == 2)
        self.server.manager.loop.call(lambda: [channel.close() for channel in tuple(self.server.http.channels)])
        for number in range(100):
            self.say("a", b"%d\n" % number)
        self.assertEqual([named.stdout.readline() for _ in range(100)], [b"%d\n" % number for number in range(100)])
        os.kill(self.server.ok("GET", "/status/a")["os_pids"][0], signal.SIGKILL)
        self.assertEqual(named.stdout.readline(), b"started\n")
        self.server.ok("DELETE", "/processes/a")
        self.server.add("a", python(self.ECHO), redirect_input=True)
        while named.stdout.readline() != b"started\n":
            pass                                # the last words of the one before
        self.assertEqual(self.interrupted(follower)[-10:], b"| started\n")

    def test_a_process_by_its_pid_ends_the_command(self):
        self.server.add("a", "cat", redirect_input=True, start=True)
        follower = self.follow("logs", "-f", "1")
        until(lambda: self.streams() == 1)
        self.say("a", b"x\n")
        self.assertEqual(follower.stdout.readline(), b"a.1 | x\n")
        self.server.ok("POST", "/processes/a/_stop")
        self.assertEqual(follower.communicate(timeout=TIMEOUT), (b"", b""))
        self.assertEqual(follower.returncode, 0)

    def test_a_pipe_that_nobody_reads(self):
        self.server.add("a", "sh -c 'while echo y; do sleep 0.01; done'")
        run = subprocess.run(["bash", "-c", "%s logs -f | head -n 3" % " ".join(map(shlex.quote, CLI_COMMAND))], check=False,
                             env=dict(self.env, GAFFER_ENDPOINT=self.server.url), stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual((run.stdout, run.stderr), (b"a.1 | y\n" * 3, b""))


class CliWatch(CliFollowCase):
    """watch"""

    def test_events_a_line_each(self):
        everything, exits = self.follow("watch"), self.follow("watch", "--json", "proc.a.exit")
        until(lambda: self.streams() == 2, "both watch")
        self.sleepers("a", "b")
        self.call("stop", "all")
        lines = [everything.stdout.readline().decode()]
        while sum(" exit (" in line for line in lines) < 2:      # in either order
            lines.append(everything.stdout.readline().decode())
        self.assertRegex("".join(lines), r"\A\d\d:\d\d:\d\d a: create\n[\d:]+ a: start\n[\d:]+ a: spawn \(pid 1, os pid \d+\)\n")
        self.assertRegex("".join(lines), r"b: exit \(pid 2, os pid \d+, signal 15\)\n")
        event = json.loads(exits.stdout.readline())
        self.assertEqual((event["event"], event["name"], event["term_signal"]), ("exit", "a", 15))
        self.assertEqual((self.interrupted(everything), self.interrupted(exits)), (b"", b""))

    def test_cut_before_its_first_event_it_goes_on_where_it_was(self):
        self.sleepers("old")
        for started in (False, True):
            watcher = self.follow("watch", "spawn")
            until(lambda: self.streams() == 1)
            self.server.manager.loop.call(lambda: [channel.close() for channel in tuple(self.server.http.channels)])
            name = "new%d" % started
            self.sleepers(name)
            self.assertIn(("%s: spawn" % name).encode(), watcher.stdout.readline())
            self.assertEqual(self.interrupted(watcher), b"")

    def test_patterns(self):
        for text, pattern in (("", ""), ("exit", "exit"), ("proc/web.a/exit", "proc/web.a/exit"), ("proc.web", "proc/web"), (
                "proc.web.exit", "proc/web/exit"), ("proc.web.a", "proc/web.a"), ("proc.web.a.exit", "proc/web.a/exit")):
            self.assertEqual(gaffer.event_pattern(text), pattern)
        self.call("watch", "exitt", status=1, err="gaffer: there is no event type 'exitt', did you mean 'exit'.*\n")
        self.call("watch", "proc", status=1, err="gaffer: name a template.*\n")


class CliAttach(CliFollowCase):
    """attach, without a terminal; see CliTerminal."""

    def test_lines_in_and_out_and_its_status(self):
        code = "import os, sys\nfor line in sys.stdin: os.write(1, line.upper().encode())\nos.write(2, b'err')\nsys.exit(3)"
        self.server.add("a", python(code), redirect_input=True)
        process = self.follow("attach", "a", stdin=subprocess.PIPE)
        process.stdin.write(b"one\n")
        self.assertEqual(process.stdout.readline(), b"ONE\n")
        out, err = process.communicate(b"two\nthree", timeout=TIMEOUT)
        self.assertEqual((process.returncode, out), (3, b"TWO\nTHREE"))
        self.assertRegex(err, rb"\Agaffer: attached to a\.1, os pid \d+: QUIT leaves it running[^\n]*\nerr\n?gaffer: detached, a\.1 has ended\n\Z")

    def test_signals(self):
        code = "import os, signal\nsignal.signal(2, lambda *a: os.write(1, b'interrupted\\n'))\nos.write(1, b'> ')\nwhile True: signal.pause()"
        self.server.add("a", python(code), redirect_input=True)
        shown = b"> "
        for word, signum, status in (("a", signal.SIGQUIT, 0), ("1", signal.SIGTERM, 143), ("a.1", signal.SIGHUP, 129)):
            process = self.follow("attach", word)
            self.assertEqual(process.stdout.read(len(shown)), shown)
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.stdout.readline(), b"interrupted\n")
            shown += b"interrupted\n"
            process.send_signal(signum)
            self.assertEqual((process.communicate(timeout=TIMEOUT)[0], process.returncode), (b"", status))
        process = self.follow("attach", "1")
        self.assertEqual(process.stdout.read(len(shown)), shown)
        self.server.ok("POST", "/processes/1/_signal/KILL")
        self.assertEqual(process.wait(TIMEOUT), 137)

    def test_what_cannot_be_attached_to(self):
        self.sleepers("two", numprocesses=2)
        self.sleepers("off", start=False)
        self.call("attach", "two", status=1, err="gaffer: two runs 2 processes: attach to one of two\\.1, two\\.2\n")
        self.call("attach", "off", status=1, err="gaffer: off does not run: 'gaffer.py start off' starts it\n")
        self.call("attach", "77", status=4, err="gaffer: there is no process named '77'.*\n")


class ConfigCase(CliControlCase):
    """Files in a folder of the test's own, which is also where relative paths lead."""

    def setUp(self):
        self.home = self.folder()               # goes when the server has gone
        super().setUp()

    def write(self, name, text):
        """A file's path."""
        path = os.path.join(self.home, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return self.file(os.path.dirname(path), os.path.basename(path), textwrap.dedent(text))

    def settings(self, name, text):
        """Settings of a file."""
        return gaffer.read_settings(self.write(name, text))

    def faults(self, name, text):
        """Its faults, without the folder."""
        with self.assertRaises(gaffer.ConfigError) as caught:
            self.settings(name, text)
        return str(caught.exception).replace(self.home + "/", "").split("\n")


class ConfigFiles(ConfigCase):
    """INI, JSON, TOML: what they say, and what is wrong with them."""

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

        [process:a]
        cmd = sh -c 'echo %d "$HOME"'
        args = a 'b c'
        env = A=1, B="x, y"
            PURE_SET, PURE_UNSET C=
        os_env = no
        cwd = .
        uid =
        gid =
        shell = off
        numprocesses = 2
        start = false
        detach = 0
        redirect_output = out, err
        redirect_input = yes
        custom_streams = one two
        graceful_timeout = 2.5
        restart = on-failure
        success = 0, 3 TERM
        restart_delay = 1, 2.5
        flapping = 3, 1.5, 2, 4
        priority = 0

        [process:g:b]
        cmd = sleep
            1000
        [env:a]
        PORT = 80
        lower = x=y
        """

    def test_every_field_of_ini(self):
        pure_environ(self, PURE_SET="set", PURE_UNSET=None)
        found = self.settings("gaffer.ini", self.INI)
        self.assertEqual(set(found.templates), {"a", "g:b"})
        self.assertEqual(found.templates["a"], {
            "name": "a", "cmd": "sh -c 'echo %d \"$HOME\"'", "args": "a 'b c'", "os_env": False,
            "uid": None, "gid": None, "cwd": self.home + "/.", "shell": False, "numprocesses": 2,
            "env": {"A": "1", "B": "x, y", "PURE_SET": "set", "C": "", "PORT": "80", "lower": "x=y"},
            "start": False, "detach": False, "redirect_output": ["out", "err"],
            "redirect_input": True, "custom_streams": ["one", "two"], "graceful_timeout": 2.5,
            "priority": 0, "restart": "on-failure", "success": [0, 3, "TERM"],
            "restart_delay": [1, 2.5],
            "flapping": {"attempts": 3, "window": 1.5, "retry_in": 2, "max_retry": 4}})
        self.assertEqual((found.templates["g:b"]["cmd"], found.templates["g:b"]["cwd"]),
                         ("sleep\n1000", self.home))
        self.assertEqual([(endpoint.bind, endpoint.backlog) for endpoint in found.endpoints], [
            ("127.0.0.1:0", 7), ("unix:%s/socket" % self.home, gaffer.BACKLOG)])
        self.assertEqual(found.webhooks, [
            ("create", "http://localhost:1/x"), ("proc/a/exit", "https://localhost/y?z=1")])
        process = self.INI[self.INI.index("[process:a]"):self.INI.index("[process:g:b]")]
        self.assertEqual(set(gaffer.OPTIONS) - {"name"}, set(re.findall(r"^ *(\w+) =", process, re.M)))

    TREE = {"gaffer": {"http_endpoints": ["public"]}, "endpoint": {"public": {"bind": "127.0.0.1:0"}},
            "process": {"a": {"cmd": "sleep 1000", "redirect_output": ["out"],
                              "flapping": {"attempts": 3}},
                        "g:b": {"cmd": "sleep", "args": ["1000"], "start": False}},
            "env": {"a": {"PORT": 80}}, "webhooks": {"exit": "http://localhost/x"}}
    TOML = """
        [gaffer]
        http_endpoints = ["public"]
        [endpoint.public]
        bind = "127.0.0.1:0"
        [process.a]
        cmd = "sleep 1000"
        redirect_output = ["out"]
        flapping = {attempts = 3}
        [process."g:b"]
        cmd = "sleep"
        args = ["1000"]
        start = false
        [env.a]
        PORT = 80
        [webhooks]
        exit = "http://localhost/x"
        """

    def test_json_and_toml_say_the_same(self):
        found = self.settings("x.json", json.dumps(self.TREE))
        self.assertEqual(found.templates["a"]["env"], {"PORT": 80})
        self.assertEqual(found.templates["a"]["flapping"]["max_retry"], 5)
        self.assertEqual((found.templates["g:b"]["args"], found.templates["g:b"]["start"]),
                         (["1000"], False))
        self.assertEqual((found.webhooks, found.endpoints[0].bind),
                         ([("exit", "http://localhost/x")], "127.0.0.1:0"))
        listed = [dict(values, name=name) for name, values in self.TREE["process"].items()]
        self.assertEqual(set(self.settings("list.json", json.dumps(listed)).templates), {"a", "g:b"})
        self.assertEqual(set(self.settings("one.json", json.dumps(listed[0])).templates), {"a"})
        if sys.version_info >= (3, 11):
            toml = self.settings("x.toml", self.TOML)
            self.assertEqual((toml.templates, toml.webhooks), (found.templates, found.webhooks))
        else:
            self.assertRegex(self.faults("x.toml", self.TOML)[0],
                             r"\Ax.toml:1: Python 3\.\d+ reads no TOML")

    def test_included_files(self):
        for name in ("conf.d/b", "conf.d/deep/c", "e/1", "e/2", "conf.d/.#x", "conf.d/._y", "conf.d/.z/z"):
            self.write(name + ".ini", "[process:%s]\ncmd = sleep 2\n" % name.replace("/", ":"))
        self.write("conf.d/no.txt", "nothing")
        self.write("d.json", '[{"name": "d", "cmd": "sleep 4"}]')
        self.write("f.ini", "[env:a]\nX = 1\n[endpoint:x]\nbind = 127.0.0.1:5140\n")
        self.write("g/Procfile", "web: sleep 1\nother: sleep 1\n")
        self.write("h/Procfile", "worker: sleep 1\n")
        pure_environ(self, PORT=None)
        found = self.settings("a.ini", "[gaffer]\ninclude = g/Procfile h/Procfile f.ini d.json e/*.ini\n"
                                       "include_dir = conf.d\n[process:a]\ncmd = sleep 1\n")
        names = [name for name in found.templates if "PORT" not in found.templates[name]["env"]]
        self.assertEqual(set(names), {"a", "d", "e:1", "e:2", "conf.d:b", "conf.d:deep:c"})
        self.assertEqual({os.path.relpath(found.templates[name]["cwd"], self.home) for name in names},
                         {".", "e", "conf.d", "conf.d/deep"})
        self.assertEqual(found.templates["a"]["env"], {"X": "1"})
        self.assertEqual([found.templates[name]["env"]["PORT"] for name in ("web", "other", "worker")],
                         ["5000", "5200", "5300"], "no port twice, and none that gaffer has")
        for taken, port in ((None, "5100"), ([], "5000"), ([5001], "5100"), ([8000], "5000")):
            templates = gaffer.read_settings(self.home + "/h/Procfile", taken).templates
            self.assertEqual(templates["worker"]["env"]["PORT"], port, taken)

    FAULTS = [
        ("all.ini", """\
            junk
            [gaffer]
            http_endpoints = public, nix
            includ = x
            [endpoint:public]
            bind = 127.0.0.1
            backlog = x
            bind=1
            [endpoint:other]
            [proces:dummy]
            cmd = x
            [process:dummy]
            comand = ./dummy.py
            numprocesses = two
            uid = nosuch-user
            cwd
              more
            [process:a]
            cmd = nosuchprog
            cwd = nosuchdir
            shell = maybe
            [process:b]
            cmd = nosuchprog
            [process:c]
            cmd = true
            env = A='1
            flapping = 1 2 3 4 5
            name = other
            [process:a]
            cmd = z
            [env:x]
            A = 1
            [webhooks]
            creat = http://x
            exit = nourl
            [process]
            [endpoint:last]
            bind = 127.0.0.1
            """, [
            "1: 'junk' is neither [section] nor 'name = value' in a section",
            "3: [gaffer] there is no [endpoint:nix]",
            "4: [gaffer] unknown field 'includ', did you mean 'include'?",
            "7: [endpoint:public] field 'backlog' must be a number, not 'x'",
            "8: [endpoint:public] 'bind' is there twice",
            "9: [endpoint:other] field 'bind' is required",
            "10: [proces:dummy] there is no section of this name, did you mean 'process:dummy'?",
            "12: [process:dummy] field 'cmd' is required",
            "13: [process:dummy] unknown field 'comand', did you mean 'cmd'?",
            "14: [process:dummy] field 'numprocesses' must be a number, not 'two'",
            "15: [process:dummy] field 'uid' there is no user 'nosuch-user' here",
            "16: 'cwd' is neither [section] nor 'name = value' in a section",
            "20: [process:a] field 'cwd' names the directory '@nosuchdir', which is not there",
            "21: [process:a] field 'shell' must be true or false, not 'maybe'",
            "23: [process:b] field 'cmd' names 'nosuchprog', which is not found in PATH",
            "26: [process:c] field 'env' cannot be split into words: no closing quotation",
            "27: [process:c] field 'flapping' is at most attempts, window, retry_in, max_retry: "
            "2, 1.0, 7.0, 5",
            "28: [process:c] field 'name' is 'other': leave it out",
            "29: [process:a] '[process:a]' is there twice",
            "31: [env:x] there is no [process:x]",
            "34: [webhooks] 'creat': there is no event type 'creat', did you mean 'create'?*",
            "35: [webhooks] 'exit': 'nourl' is not a URL such as http://host:port/path",
            "36: [process] there is no section of this name, did you mean 'process:NAME'?",
            "38: [endpoint:last] '127.0.0.1' is no address: give host:port, [v6]:port or unix:/path"]),
        ("include.ini", "[gaffer]\ninclude = b.ini b.ini no.ini include.ini\ninclude_dir = nothing\n"
                        "[process:a]\ncmd = sleep 1\n", [
            "2: [gaffer] 'include': @b.ini is included already",
            "2: [gaffer] 'include': @no.ini: cannot be read: No such file or directory",
            "2: [gaffer] 'include': @include.ini is included already",
            "3: [gaffer] '@nothing' is not a folder",
            "b.ini:1: [process:a] this section is in include.ini too",
            "b.ini:5: [process:b] unknown field 'numproceses', did you mean 'numprocesses'?"]),
        ("nul.ini", "[gaffer]\ninclude = a\0b\n", ["nul.ini: cannot be read: must not hold a NUL character"]),
        ("tree.json", '{"process":\n {"web": {"cmd": "true",\n "numprocesses": "x"},\n"db":\n'
                      '{"cmdd": 1}, "e": {"cmd": "true",\n"env": [1]}}, "env": {"e": {"A": 1}},\n'
                      '"processes": {}, "gaffer": {\n"include": ["a\\u0000"]},\n'
                      '"endpoint": {"x": {"bind": "127.0.0.1:0", "certfile":\n5}, "y": 1}}', [
            "3: [process:web] field 'numprocesses' must be a whole number from 0 to 1000",
            "4: [process:db] field 'cmd' is required",
            "5: [process:db] unknown field 'cmdd', did you mean 'cmd'?",
            "6: [process:e] field 'env' must be an object of strings and numbers",
            "7: [processes] there is no section of this name, did you mean 'process:NAME'?",
            "8: [gaffer] field 'include' must not hold a NUL character",
            "9: [endpoint:x] field 'certfile' must be a string",
            "10: [endpoint:y] must be an object"]),
        ("env.json", '{"process": {"a": {"cmd": "true", "name": "b"}},\n"env": {"a": {"X": []}}}', [
            "1: [process:a] field 'name' is 'b': leave it out",
            "2: [env:a] must be an object of strings and numbers, but 'X' is neither"]),
        ("syntax.json", '{"a":\n1,}', ["2: cannot be parsed: *"]),
        ("three.json", "3", ["1: must be sections, a template, or a list of templates of different names"]),
        ("list.json", '[{"name": "a", "cmd": "true"},\n{"cmd": "x", "name": "b", "env": 1},\n'
                      '{"name": "a", "cmd": "x"}]', [
            "1: must be sections, a template, or a list of templates of different names",
            "2: [process:b] field 'env' must be an object of strings and numbers"]),
        ("twice.json", '{"process": {"a":\n {"cmd": "true", "cmd": "false"}}, "env": []}', [
            "1: 'cmd' is there twice in one object", "2: [env] must be an object"]),
        ("syntax.toml", "[process.a]\ncmd = \n", ["2: cannot be parsed: *"]),
        ("tree.toml", "[process.a]\ncmd = 'sleep 1'\nshell = 1\n[process.'g:b']\n\ncmd = 'nosuchprog'\n", [
            "3: [process:a] field 'shell' must be true or false",
            "6: [process:g:b] field 'cmd' names 'nosuchprog', which is not found in PATH"]),
    ]

    def test_every_fault_at_once_with_its_line(self):
        self.write("b.ini", "[process:a]\ncmd = sleep 2\n[process:b]\ncmd = sleep 1\nnumproceses = 3\n")
        for name, text, faults in self.FAULTS:
            if name.endswith(".toml") and sys.version_info < (3, 11):
                continue
            with self.subTest(name):
                for fault, wanted in itertools.zip_longest(self.faults(name, text), faults):
                    wanted = wanted if wanted and wanted[0].isalpha() else "%s:%s" % (name, wanted)
                    self.assertRegex(fault or "", "\\A%s\\Z" % re.escape(wanted.replace("@", "")).replace(r"\*", ".*"))

    def test_files_that_cannot_be_read(self):
        for path, words in ((self.home, "Is a directory"), (self.home + "/no", "No such file"),
                            ("/dev/zero", "over 1048576")):
            with self.assertRaisesRegex(gaffer.ConfigError, words):
                gaffer.read_settings(path)
        path = self.home + "/latin"
        with open(path, "wb") as file:
            file.write(b"\xe4")
        self.call("serve", path, status=1, err="gaffer: .*latin: cannot be read: 'utf-8'.*\n")
        many = ["[process:a]\ncmd = true", *("x%d = 1" % i for i in range(10)), *("[x%d]" % i for i in range(190))]
        self.assertEqual(self.faults("many.ini", "\n".join(many))[100:], ["and 100 faults more"])


class ConfigReload(ConfigCase):
    """Loading it again: only what has changed is touched."""

    def begin(self, text):
        """Serve a file; change() writes it anew."""
        self.path = self.write("gaffer.ini", text)
        self.hooks = gaffer.WebHooks()
        self.configuration = gaffer.Configuration(lambda: gaffer.read_settings(self.path), self.hooks)
        self.server.manager.loop.call(self.hooks.start, self.server.manager.loop, self.server.manager)
        self.configuration.begin(self.server.manager)

    def change(self, text, **expected):
        """Write the file anew, let it be loaded, and compare the report."""
        self.write("gaffer.ini", text)
        report = {"ok": True, "added": [], "changed": {}, "removed": [], "kept": [], "failed": {},
                  "webhooks": False, "needs_restart": []}
        self.assertEqual(self.server.ok("POST", "/_reload"), dict(report, **expected))

    def pids(self, name):
        """Pids of what it runs now."""
        return self.server.ok("GET", "/processes/%s/_pids" % name)["pids"]

    @staticmethod
    def ini(*more, **commands):
        """A file of templates, their commands being `sleep N`."""
        return "".join("[process:%s]\ncmd = sleep %s\n" % pair for pair in commands.items()) + "\n".join(more)

    def test_without_a_file_there_is_nothing_to_load(self):
        self.assertError(self.server.json("POST", "/_reload"), 409, "conflict", "serve CONFIG")
        self.call("reload", status=1, err="gaffer: this server was started without a CONFIG.*\n")

    def test_added_changed_removed_kept(self):
        self.begin(self.ini(a=1000, b=1000, c=1000))
        self.server.add("by-hand", "sleep 1000")
        self.change(self.ini("graceful_timeout = 3", a=1000, d=1001, b=2000),
                    added=["d"], changed={"b": ["cmd", "graceful_timeout"]}, removed=["c"], kept=["a"])
        self.assertEqual(self.server.ok("GET", "/processes"), ["a", "b", "by-hand", "d"])
        self.assertEqual(self.pids("a"), [1])
        until(lambda: self.pids("b") not in ([], [2]))
        self.assertEqual(self.server.ok("GET", "/processes/b")["cmd"], "sleep 2000")

    def test_said_by_the_command(self):
        self.begin(self.ini(a=1000, b=1000))
        self.write("gaffer.ini", self.ini("[endpoint:x]\nbind = 127.0.0.1:0\n[webhooks]\n"
                                          "flap=http://localhost:1", a=1001, c=1001))
        lines = ("c: {0}added\na: {0}changed (cmd)\nb: {0}removed\nwebhooks: {0}changed\n"
                 "endpoints: changed; restart gaffer to apply it\n")
        self.assertEqual(self.call("reload", "--dry-run"), lines.format("would be "))
        self.assertEqual((self.server.ok("GET", "/processes"), self.pids("a"), self.hooks.hooks), (["a", "b"], [1], []))
        self.assertEqual(self.call("reload"), lines.format(""))
        self.assertEqual(self.hooks.hooks, [("flap", "http://localhost:1")])
        self.assertEqual(self.call("reload"), "a: kept\nc: kept\n")
        self.assertEqual(json.loads(self.call("reload", "--json"))["kept"], ["a", "c"])
        self.hooks.stop()
        self.hooks.join()

    def test_fields_that_need_no_restart(self):
        self.begin(self.ini("numprocesses = 2", a=1000))
        for more, changed, wanted in (
                ("numprocesses = 3\npriority = 1\nflapping = 2", ["numprocesses", "flapping", "priority"], 3),
                ("priority = 1\nflapping = 2\nstart = false", ["numprocesses", "start"], 0),
                ("priority = 1\nflapping = 2", ["start"], 1)):
            self.change(self.ini(more, a=1000), changed={"a": changed})
            until(lambda: len(self.pids("a")) == wanted)
            self.assertEqual(self.pids("a"), {3: [1, 2, 3], 0: [], 1: [4]}[wanted])

    def test_what_was_done_by_hand_stays(self):
        self.begin(self.ini(a=1000, b=1000))
        self.server.ok("POST", "/processes/a/_stop?wait=true")
        self.server.ok("POST", "/processes/b/_add/2")
        self.change(self.ini(a=1000, b=1000), kept=["a", "b"])
        self.assertEqual((self.pids("a"), self.pids("b")), ([], [2, 3, 4]))
        self.change(self.ini(a=2000, b=2000), changed={"a": ["cmd"], "b": ["cmd"]})
        self.assertEqual(self.pids("a"), [])
        until(lambda: len(self.pids("b")) == 3)
        self.server.ok("DELETE", "/processes/a")
        self.change(self.ini(a=2000, b=2000), added=["a"], kept=["b"])
        self.assertEqual(len(self.pids("a")), 1)
        self.server.add("c", "sleep 1000")
        self.change(self.ini(a=2000, b=2000, c=1000), changed={"c": ["cwd"]}, kept=["a", "b"])

    def test_one_that_gave_up_gets_another_chance(self):
        self.begin("[process:a]\ncmd = false\nflapping = 1, 10, 0, 0\n")
        self.server.wait_event("proc/a/stop")
        self.change(self.ini("flapping = 1, 10, 0, 0", a=1000), changed={"a": ["cmd"]})
        self.assertEqual(len(self.pids("a")), 1)

    def test_a_broken_file_changes_nothing(self):
        self.begin(self.ini(a=1000, b=1000))
        for text in (self.ini("[process:c]\ncmd = nosuchprog", a=1001), self.ini("x = 1", c=1001), "junk",
                     "[gaffer]\ninclude=no"):
            self.write("gaffer.ini", text)
            status, answer = self.server.json("POST", "/_reload")
            self.assertEqual((status, answer["error"]), (400, "invalid_process_info"))
            self.assertIn("gaffer.ini:", answer["reason"])
            self.assertEqual(self.server.ok("GET", "/processes"), ["a", "b"])
            self.assertEqual(self.pids("a") + self.pids("b"), [1, 2])
        os.unlink(self.path)
        self.call("reload", status=1, err="gaffer: .*gaffer.ini: cannot be read: No such file.*\n")
        self.change(self.ini(a=1000, b=1000), kept=["a", "b"])

    def test_what_the_system_refuses_is_told_and_tried_again(self):
        program = self.write("program", "#!/nosuchinterpreter\n")
        os.chmod(program, 0o700)
        self.begin(self.ini(a=1000))
        text = self.ini("[process:c]\ncmd = ./program", a=1000)
        reason = self.server.json("POST", "/processes", {"name": "c", "cmd": program})[1]["reason"]
        for _ in range(2):
            self.change(text, ok=False, added=["c"], kept=["a"], failed={"c": reason})
        self.call("reload", status=1, err="")
        self.write("program", "#!/bin/sh\nexec sleep 1000\n")
        os.chmod(program, 0o700)
        self.change(text, added=["c"], kept=["a"])
        self.server.ok("DELETE", "/processes/c")


class ConfigServe(CliFollowCase):
    """`serve CONFIG` as its user sees it."""

    def test_the_example(self):
        """Copied, and run from another folder: paths are relative to the file."""
        folder = os.path.join(self.folder(), "examples")
        shutil.copytree(os.path.join(HERE, "examples"), folder)
        text = cli_read(os.path.join(folder, "gaffer.ini")).replace("127.0.0.1:5000", "127.0.0.1:0")
        server = self.start("serve", self.file(folder, "gaffer.ini", text), cwd="/")
        self.assertEqual(server.ok("GET", "/processes"), ["dummy", "echo", "priority"])
        self.assertEqual([server.ok("GET", "/processes/%d" % pid)["name"] for pid in (1, 2, 3)],
                         ["priority", "dummy", "echo"])
        self.assertEqual(server.request("GET", "/streams/dummy/stdout?since=0")[2][:8], b"STDOUT 0")
        os_pid, = server.ok("GET", "/status/dummy")["os_pids"]
        self.assertIn("PORT=80", cli_read("/proc/%d/environ" % os_pid).split("\0"))
        self.assertEqual(server.request("POST", "/streams/3/stdin", None, {"Content-Length": "0"})[0], 200)
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_hup_loads_it_again(self):
        folder = self.folder()
        path = self.file(folder, "x.ini", "[process:a]\ncmd = sleep 1000\n")
        server = self.start("serve", path, "--bind", "127.0.0.1:0")
        self.file(folder, "x.ini", "[process:a]\ncmd = sleep 1000\n[process:b]\ncmd = sleep 1000\n")
        server.process.send_signal(signal.SIGHUP)
        self.assertEqual(server.ok("GET", "/watch/proc/b/spawn?since=0")["name"], "b")
        self.file(folder, "x.ini", "junk")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.said("nothing has changed"))
        self.assertEqual(server.ok("GET", "/processes/1")["name"], "a")
        self.assertEqual(server.stop(), 0)
        server.expect_stderr("ERROR %s:1: 'junk' is neither" % re.escape(path))
        server.expect_stderr("ERROR .*nothing has changed$")
        server.expect_stderr("WARNING the configuration was loaded again: b: added$")

    def test_hup_without_a_file_stops(self):
        server = self.start()
        os_pid, = server.add("a", {"cmd": "sleep 1000"})
        self.assertEqual((server.stop(signal.SIGHUP), server.stderr), (0, ""))
        self.assertFalse(alive(os_pid))
        server = self.start("--log-file", os.path.join(self.folder(), "log"))
        self.assertEqual((server.stop(signal.SIGHUP), server.stderr), (0, ""))

    def test_a_procfile(self):
        path = self.file(self.folder(), "Procfile", "web: exec sleep 1000\nworker: exec sleep 1000\n")
        server = self.start("serve", path, "--bind", "127.0.0.1:0")
        self.assertEqual(server.ok("GET", "/processes"), ["web", "worker"])
        self.assertEqual(server.ok("GET", "/processes/worker")["env"],
                         {"PORT": "5100", "GAFFER_PORT_STEP": "1"})
        self.assertEqual(self.called("scale", "-f", path, "web=2", "--endpoint", server.urls[0]), (0, "web: 2 processes\n", ""))
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_a_file_with_faults(self):
        path = self.file(self.folder(), "x.ini", "[process:a]\ncomand = x\n[process:b]\ncmd = true\nshell = 7\n")
        status, out, err = self.outcome("serve", path)
        self.assertEqual((status, out), (1, ""))
        self.assertEqual(err, "gaffer: {0}:1: [process:a] field 'cmd' is required\ngaffer: {0}:2: [process:a] unknown field 'comand', did you mean "
                              "'cmd'?\ngaffer: {0}:5: [process:b] field 'shell' must be true or false, not '7'\n".format(path))

    def test_logs_follow_over_kills_and_a_restart_of_the_server(self):
        """Every line once."""
        folder = self.folder()
        child = self.file(folder, "child.py", textwrap.dedent(self.ECHO))
        path = self.file(folder, "x.json", json.dumps({"name": "a", "cmd": PYTHON, "args": ["-I", "-S", "-u", child], "redirect_input": True}))
        endpoint = "unix:" + os.path.join(folder, "socket")
        client = gaffer.Client(endpoint)

        def say(text):
            client.request("POST", "/streams/%d/stdin" % client.get("/processes/a/_pids")["pids"][0], text)
        server = self.start("serve", path, "--bind", endpoint)
        follower = self.follow("logs", "-f", endpoint=endpoint)
        expected = [b"started", b"one", b"two", b"started", b"three", b"bye", b"started", b"four"]
        lines = []

        def read_until(last, count=1):
            while lines.count(last) < count:
                lines.append(follower.stdout.readline()[6:-1])
        read_until(b"started")
        say(b"one\n")
        say(b"two\n")
        read_until(b"two")
        os.kill(client.get("/status/a")["os_pids"][0], signal.SIGKILL)
        read_until(b"started", 2)
        say(b"three\n")
        read_until(b"three")
        self.assertEqual(server.stop(), 0)
        server.expect_stderr("WARNING a: exit .*signal 9")
        server = self.start("serve", path, "--bind", endpoint)
        read_until(b"started", 3)
        say(b"four\n")
        read_until(b"four")
        self.assertEqual(lines, expected)
        self.assertEqual(self.interrupted(follower), b"")
        self.assertEqual((server.stop(), server.stderr), (0, ""))


    def test_last_words_at_the_servers_stop(self):
        """More than a socket holds: who follows gets all of it."""
        folder = self.folder()
        child = self.file(folder, "child.py", textwrap.dedent("""
            import os, signal
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            os.write(1, b"ready\\n")
            signal.sigwait([signal.SIGTERM])
            for number in range(60):
                os.write(1, b"".join(b"%d %d\\n" % (number, place) for place in range(1000)))
            """))
        path = self.file(folder, "x.json", json.dumps({"name": "a", "cmd": PYTHON, "args": ["-I", "-S", child]}))
        endpoint = "unix:" + os.path.join(folder, "socket")
        server = self.start("serve", path, "--bind", endpoint)
        follower = self.follow("logs", "-f", "--no-prefix", endpoint=endpoint)
        self.assertEqual(follower.stdout.readline(), b"ready\n")

        def restart():
            self.assertEqual((server.stop(), server.stderr), (0, ""))
            return self.start("serve", path, "--bind", endpoint)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            again = pool.submit(restart)
            lines = list(iter(follower.stdout.readline, b"ready\n"))
        self.assertEqual(len(lines), 60000)
        self.assertEqual([line for number, line in enumerate(lines) if line != b"%d %d\n" % divmod(number, 1000)], [])
        self.assertEqual(self.interrupted(follower), b"")
        self.assertEqual((again.result().stop(), again.result().stderr), (0, ""))

    def test_last_words_for_a_slow_client(self):
        """It gets all of them as long as it goes on to take some."""
        ahead = 0.0
        loop = gaffer.Loop(lambda: time.monotonic() + ahead)
        with unittest.mock.patch("gaffer.Manager", functools.partial(gaffer.Manager, loop=loop)):
            server = Running(window=32 * gaffer.MIB)
        self.addCleanup(server.stop_all)
        server.add("a", python(PROCESS_AWAITS_TERM + "os.write(1, b'ready\\n')\nsignal.sigwait([15])\n"
                                                     "sys.stdout.write('x' * 16000000)"))
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            slow.settimeout(TIMEOUT)
            slow.connect(("127.0.0.1", server.port))
            slow.sendall(b"GET /streams/a/stdout?feed=continuous&since=0 HTTP/1.0\r\n"
                         b"Host: localhost\r\n\r\n")
            data = b""
            while not data.endswith(b"ready\n"):
                data += slow.recv(65536)
            server.manager.stop()
            until(lambda: not server.manager._running and server.http.sending, "the last words")
            channel, = server.http.channels
            for _ in range(3):
                before, ahead = channel.sent, ahead + 0.5 * gaffer.STOP_SEND
                while channel.sent == before:
                    data += slow.recv(65536)
                    self.assertFalse(channel.closed)
            data += b"".join(iter(lambda: slow.recv(65536), b""))
        server._thread.join(TIMEOUT)
        self.assertEqual(len(data.partition(b"ready\n")[2]), 16000000)

    def test_who_takes_nothing_does_not_keep_the_server(self):
        """What is lost is told."""
        for patience, kill in ((0.1, False), (1000.0, True)):
            with self.subTest(kill=kill), unittest.mock.patch.object(gaffer, "STOP_SEND", patience):
                server = Running()
                self.addCleanup(server.stop_all)
                server.add("a", "yes")
                with server.connect() as deaf:
                    deaf.sendall(b"GET /streams/a/stdout?feed=continuous HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    until(lambda: server.manager.loop.call(lambda: [
                        channel for channel in server.http.channels if channel.queued]), "more than it takes")
                    with self.assertLogs("gaffer", "WARNING") as logged:
                        server.manager.stop()
                        server.manager.stop(kill)
                        server._thread.join(TIMEOUT)
                    self.assertFalse(server._thread.is_alive())
                    self.assertRegex(logged.output[0], r"1 clients did not take .* \d+ bytes are lost")


class ProcfileTexts(ConfigCase):
    """Procfiles, and what export makes of them."""

    DIRECT = ("@ a b", "'@' --a=b 'c;d' \"e f\" g\\ h", '"@" x', "@ a=b -c", "env A=3 @ q",
              "@ \u00fc 'a' \"\" ''", "@ a \\; b")
    REPLACED = (                                # by the program, which begins at @
        "@ $V", "@ \"$V\" '$V' $E \"$E\" $((1 + 2)) $(echo a b) \"$(echo a)\"", "A=1 B='x y' @", "A=$V @",
        "cd / && A=2 @ *bin 2>&1 < /dev/null # c; d", "true && false || @ {a,b} ~", "@ a; @ b", "@ \\$V",
        "if true; then @ a; fi; @ b", "cd /nosuch || @ \"a\\\"b\\$V\\\\\"", "exec 3>&1; @ a >&3")
    KEPT = ("echo 'a\\nb'", "@ a | cat", "@ a & wait", "trap 'echo t' EXIT; @ a", "A=1; $E", "! @ a", "{ @ a; }",
            "if true; then @ a; fi", "(@ a)", "f() { @ $1; }; f x", "for i in 1 2; do @ $i; done", "A=1",
            "@ a;", "A='@'; $A x", "@ `echo a`", "cd / && exec @ b", "command @ z", "exit 4", "exec -z @", "~/@")

    def test_a_shell_only_where_it_is_needed(self):
        """And each command does what it does in sh, which is asked."""
        pure_environ(self, V="v w", E="", A=None, B=None)
        show = self.write("show", "#!/bin/sh\nprintf '<%s>' \"$A\" \"$B\" \"$@\"\nexit 3\n")
        os.chmod(show, 0o700)
        table = [("exec @ x", "@ x", False)] + [(text, text, False) for text in self.DIRECT]
        table += [(text, "exec @".join(text.rsplit("@", 1)), True) for text in self.REPLACED]
        table += [(text, text, True) for text in self.KEPT]
        for text, cmd, shell in table:
            with self.subTest(text):
                text, cmd = text.replace("@", show), cmd.replace("@", show)
                fields = gaffer.command_fields(text)
                self.assertEqual(fields, {"cmd": cmd, "shell": shell})
                launch = gaffer.Launch(gaffer.check_template(dict(fields, name="a")))
                runs = [subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT,
                                       check=False) for argv in (["/bin/sh", "-c", text], launch.argv)]
                self.assertEqual(*[(run.returncode, run.stdout) for run in runs])

    def test_types_ports_and_environment(self):
        pure_environ(self, PORT=None)
        self.write(".env", "A=1\nB=2\n")
        more = self.write("more.env", "B=3\nC=$B$A\n")
        path = self.write("Procfile", "# x\nweb: sleep $PORT | b\n\n  \nwork-er_2 :  sleep 1  \r\n")
        self.assertEqual(gaffer.Procfile(path).types, {"web": "sleep $PORT | b", "work-er_2": "sleep 1"})
        self.assertEqual((gaffer.Procfile(path).env, gaffer.Procfile(path, root="/").env), ({"A": "1", "B": "2"}, {}))
        pure_environ(self, A="own")
        templates = gaffer.read_settings(gaffer.Procfile(path, env_files=[more])).templates
        env = {"B": "3", "C": "3own", "GAFFER_PORT_STEP": "1"}
        self.assertEqual([info["env"] for info in templates.values()], [dict(env, PORT="5000"), dict(env, PORT="5100")])
        self.assertEqual({info["cwd"] for info in templates.values()}, {self.home})
        for options, own, wanted in (               # options, PORT of gaffer's environment, PORT
                ({"taken": [5000]}, None, 5100), ({"taken": [5050]}, None, 5100), ({"taken": [5000], "port": 4950}, None, 4950),
                ({"port": 7000, "taken": [7000]}, None, 7100), ({}, "8000", 8000), ({"port": 7000}, "8000", 7000)):
            with self.subTest(options=options, own=own):
                pure_environ(self, PORT=own)
                self.assertEqual(gaffer.Procfile(path, **options).port, wanted)
        self.write(".env", "PORT=6000\n")
        self.assertEqual((gaffer.Procfile(path).port, gaffer.Procfile(path, port=7000).port), (6000, 7000))

    def test_faults(self):
        self.write(".env", "A=1\nB")
        self.assertEqual(self.faults("Procfile", "web: sleep 1\njunk\nweb: x\n7: sleep 1\nx: nosuchprogram\n"), [
            ".env:2: is not NAME=value, with a value in quotes or without any",
            "Procfile:2: 'junk' is not 'type: command'", "Procfile:3: 'web' is there twice",
            "Procfile:4: [process:7] field 'name' must be 1 to 128 of A-Z a-z 0-9 _ . : @ -, not all digits, not 'all', "
            "and not begin with - or :",
            "Procfile:5: [process:x] field 'cmd' names 'nosuchprogram', which is not found in PATH"])
        os.unlink(self.home + "/.env")
        self.assertEqual(self.faults("Procfile", "# nothing\n"), ["Procfile:1: there is no line 'type: command' in it"])
        path = self.write("Procfile", "a: sleep 1\nb: sleep 1\n")
        for options, err in ((("-p", "65500"), ".*:2: \\[process:b\\] .* makes 65600 the PORT .*"),
                             (("-p", "0"), "PORT is '0': give a number from 1 to 65535"),
                             (("-p", "65536"), "PORT is '65536': give a number from 1 to 65535")):
            self.call("up", "-f", path, *options, status=1, err="gaffer: %s\n" % err)

    def test_exports_say_the_same(self):
        self.write(".env", "A='x  y'\nB=%d \\\n")
        path = self.write("Procfile", "web: echo \"$A\" 100%\nworker: sleep 1000\n")
        plain = gaffer.read_settings(gaffer.Procfile(path)).templates
        plain["worker"]["numprocesses"] = 2
        for kind in ("ini", "json"):
            out = self.call("export", kind, "my", "-f", path, "-c", "worker=2")
            found = self.settings("x." + kind, out).templates
            for index, (name, info) in enumerate(plain.items()):
                self.assertEqual(found["my:" + name], dict(info, name="my:" + name, priority=index), kind)
        self.write(".env", "A='x\ny'")
        self.call("export", "ini", "-f", path, status=1, err="gaffer: the variable A has a value .*export json\n")
        self.assertIn("x\\ny", self.call("export", "json", "-f", path))
        self.call("export", "yaml", "-f", path, status=2, err=r"usage: [\s\S]*")

    def test_export_systemd(self):
        self.write(".env", "A='100% \"q\" $x \\'\n")
        path = self.write("Procfile", "web: exec app --port $PORT 5%\nwork_er: sleep 1\n")
        out = self.call("export", "systemd", "my", "-f", path, "-c", "web=2", "-p", "7000")
        self.assertEqual(re.findall("^# (.*)$", out, re.M), [
            "my.target", "my-web-1.service", "my-web-2.service", "my-work_er-1.service"])
        for line in ('Environment="A=100%% \\"q\\" $x \\\\"', 'Environment="PORT=7001"', 'Environment="PORT=7100"',
                     'ExecStart=/bin/sh -c "exec app --port $$PORT 5%%"', "WorkingDirectory=" + self.home,
                     "Wants=my-web-1.service my-web-2.service my-work_er-1.service", "Restart=always",
                     "PartOf=my.target"):
            self.assertIn("\n%s\n" % line, out)
        self.assertNotIn("STEP", out)
        folder = os.path.join(self.home, "units")
        self.call("export", "systemd", "-f", path, "-o", folder, status=1, err="gaffer: .*cannot be written.*\n")
        os.mkdir(folder)
        self.assertEqual(len(self.call("export", "systemd", "-f", path, "-o", folder).splitlines()),
                         len(os.listdir(folder)))


class ProcfileRun(ConfigCase):
    """run: becomes the command."""

    def start_run(self, *arguments, **options):
        """(status, stdout) of `run` as a program."""
        with ForkedCommand(["run", *arguments], env=dict(self.env, GAFFER_TOKEN="x"), cwd=self.home, stdout=subprocess.PIPE,
                           stdin=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True) as run:
            return run.communicate(options.get("input"), timeout=TIMEOUT)[0], run.returncode

    def test_environment_and_status(self):
        self.write(".env", "A=1\nB=2\n")
        self.write("x.env", "A=1\nB=3\n")
        self.write("Procfile", "web: echo web $PORT\n")
        for arguments, out, status in (
                (["-e", "x.env", "echo $A $B $PORT ${GAFFER_TOKEN-none}"], "1 3 5000 none\n", 0),
                (["-p", "7000", "web"], "web 7000\n", 0), (["sh", "-c", "echo $1; exit 7", "sh", "-x"], "-x\n", 7),
                (["--", "cat"], "in", 0), (["kill -9 $$"], "", -9), (["kill -PIPE $$"], "", -13),
                (["nosuchprogram", "x"], "gaffer: 'nosuchprogram' cannot be run: No such file or directory\n", 127)):
            self.assertEqual(self.start_run(*arguments, input="in"), (out, status), arguments)

    def test_without_a_procfile(self):
        self.call("run", "-f", "/nosuch", "true", status=1, err="gaffer: there is no '/nosuch': .*\n")
        self.assertEqual(self.start_run("pwd"), (self.home + "\n", 0))
        self.write(".env", "A=env\n")
        self.assertEqual(self.start_run("echo $A $PORT"), ("env 5000\n", 0))
        self.write(".env", "A\n")
        out, status = self.start_run("echo")
        self.assertEqual((out[:len(self.home) + 16], status), ("gaffer: %s/.env:1:" % self.home, 1))
        self.call("run", status=2, err="gaffer: say what to run.*\n")

    def test_it_is_the_command(self):
        """The same pid; a signal to it alone reaches the command."""
        run = ForkedCommand(["run", "trap 'echo term; exit 3' TERM; trap 'echo int' INT; echo $$; while :; do sleep 0.01; done"],
                            env=self.env, cwd=self.home, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        with run:
            self.addCleanup(run.kill)
            self.assertEqual(run.stdout.readline(), b"%d\n" % run.pid)
            for signum, line in ((signal.SIGINT, b"int\n"), (signal.SIGTERM, b"term\n")):
                run.send_signal(signum)
                self.assertEqual(run.stdout.readline(), line)
            self.assertEqual(run.wait(TIMEOUT), 3)


class ProcfileServer(ConfigCase):
    """load, unload, scale, ps."""

    def setUp(self):
        super().setUp()
        self.path = self.write("my app-2/Procfile", "web: exec sleep 1000\nworker: exec sleep 1000\n")
        self.procfile = ("-f", self.path)

    def test_load_scale_ps_unload(self):
        self.server.add("other", "sleep 1000")
        for arguments, out in (
                (["load", *self.procfile, "-c", "worker=2"], "my-app-2:web: loaded\nmy-app-2:worker: loaded\n"),
                (["load", *self.procfile], "my-app-2:web: already loaded\nmy-app-2:worker: already loaded\n"),
                (["scale", *self.procfile, "web=3", "worker-1"], "my-app-2:web: 3 processes\nmy-app-2:worker: 1 process\n"),
                (["scale", "my-app-2", "web=3", "my-app-2:worker+1"], "my-app-2:web: 3 processes\nmy-app-2:worker: 2 processes\n"),
                (["scale", "my-app-2", "web+1", "--json"], '{"ok": true, "numprocesses": 4}\n')):
            self.assertEqual(self.call(*arguments), out)
        until(lambda: self.server.ok("GET", "/status/my-app-2:worker")["running"] == 2, "a slot that is free again is filled")
        for arguments in (self.procfile, ["my-app-2"]):
            self.assertEqual([row.split()[0] for row in self.call("ps", *arguments).splitlines()[1:-1]],
                             ["my-app-2:web.%d" % number for number in range(1, 5)] + ["my-app-2:worker.1", "my-app-2:worker.2"])
        self.write("my app-2/Procfile", "web: exec sleep 2000\nclock: exec sleep 1000\n")
        self.assertEqual(self.call("load", *self.procfile),
                         "my-app-2:web: updated\nmy-app-2:clock: loaded\nmy-app-2:worker: removed\n")
        self.assertEqual(self.server.ok("GET", "/status/my-app-2:web")["numprocesses"], 4, "what was scaled stays")
        self.assertEqual(self.call("unload", "my-app-2"), "my-app-2:web: unloaded\nmy-app-2:clock: unloaded\n")
        self.assertEqual(self.server.ok("GET", "/processes"), ["other"])
        self.assertEqual(len(self.server.ok("GET", "/processes?running=true")), 1, "all others are gone")

    def test_a_group_is_no_change(self):
        """scale app-2 web=3: not two fewer of app."""
        self.server.add("app:web", "sleep 1000", numprocesses=3)
        self.server.add("app-2:web", "sleep 1000")
        self.assertEqual(self.call("scale", "app-2", "web=3"), "app-2:web: 3 processes\n")
        self.call("scale", "app-2", status=2, err="gaffer: 'app-2' is not a change: .*\n")
        self.call("scale", "app", "web-1", "nosuch-1", status=4, err="gaffer: there is no 'nosuch': there are web\n")
        self.call("scale", "nosuch-2", "web=3", status=4, err="gaffer: there is no .*\n")
        self.assertEqual(self.call("numprocesses", "all"), "app:web: 3\napp-2:web: 3\n")

    def test_no_shell_is_in_front_of_a_program(self):
        self.write("my app-2/Procfile", "a: sleep 1000\nb: exec sleep 1000 > /dev/null\nc: cd / && X=$A sleep 1000\n")
        self.call("load", "x", *self.procfile)
        for name in "abc":
            os_pid, = self.server.ok("GET", "/status/x:" + name)["os_pids"]
            until(lambda: cli_read("/proc/%d/cmdline" % os_pid) == "sleep\x001000\0")

    def test_each_process_has_a_port(self):
        self.write("my app-2/Procfile", "web: echo $PORT; exec sleep 1000\nworker: echo $PORT; exec sleep 1000\n")
        self.call("load", "x", *self.procfile, "-c", "web=3", "-p", "7000")
        until(lambda: sorted(self.call("logs", "x:*").splitlines()) == [
            "x:web.1    | 7000", "x:web.2    | 7001", "x:web.3    | 7002", "x:worker.1 | 7100"])
        os.kill(self.server.ok("GET", "/processes/2")["os_pid"], signal.SIGKILL)
        until(lambda: self.call("logs", "x:web").count("7001") == 2)

    def test_mistakes(self):
        for arguments, status, words in (
                (["load", "-f", self.home + "/no"], 1, "there is no '.*/no': name a Procfile with -f FILE.*"),
                (["load", "a:b", *self.procfile], 1, "'a:b' is not a group's name.*"),
                (["load", *self.procfile, "-c", "wep=1"], 4, "there is no 'wep', did you mean 'web'\\?"),
                (["load", *self.procfile, "-c", "web"], 1, "'web' is not TYPE=NUMBER.*"),
                (["load", *self.procfile, "-c", "all=x"], 1, "'all=x' is not TYPE=NUMBER.*"),
                (["load", *self.procfile, "-c", "web=1001"], 1, "'web=1001' is not TYPE=NUMBER.*"),
                (["unload", *self.procfile], 4, "there is no process of the group 'my-app-2'.*"),
                (["scale", "web=1", "web"], 2, "'web' is not a change.*"), (["scale", "web=1", "web=-1"], 2, "'web=-1' is not a change.*"),
                (["scale", "web"], 2, "'web' is not a change.*"),
                (["ps", "nosuch"], 4, "there is no process of the group 'nosuch'.*"),
                (["scale", "x", "web=1"], 4, ".*'x'.*")):
            with self.subTest(arguments):
                self.call(*arguments, status=status, err="gaffer: %s\n" % words)

    def test_without_a_group(self):
        """As `up` and `serve Procfile` name them."""
        self.server.add("web", "sleep 1000")
        self.server.add("other", "sleep 1000")
        self.assertEqual(self.call("scale", *self.procfile, "web=2"), "web: 2 processes\n")
        self.assertEqual([row.split()[0] for row in self.call("ps", *self.procfile).splitlines()], ["NAME", "web.1", "web.2", "1"])
        self.assertEqual(len(self.call("ps", "-f", self.home + "/no").splitlines()), 5)


class ProcfileUp(CliFollowCase):
    """up"""

    def up(self, text, *arguments, **options):
        """A running `up` of a Procfile."""
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
        rest = list(self.lines(process))
        self.assertEqual((process.wait(TIMEOUT), process.stderr.read()), (status, b""))
        return rest

    SLEEPERS = "a: echo ready; exec sleep 1000\nb: echo ready; exec sleep 1000\n"

    def started(self, process, *names):
        """{name: os pid} once each has printed `ready`."""
        found, ready = {}, set()
        for name, text in self.lines(process):
            if name == "system" and " started, os pid " in text:
                found[text.split()[0]] = int(text.split()[-1])
            elif text == "ready":
                ready.add(name)
            if ready == set(names):
                return found
        raise AssertionError("it has ended")

    def test_signals_stop_all(self):
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGALRM,
                       signal.SIGXCPU):
            with self.subTest(signum=signum):
                process = self.up(self.SLEEPERS)
                os_pids = self.started(process, "a.1", "b.1")
                process.send_signal(signal.SIGUSR1)     # a log file that it does not have
                process.send_signal(signal.SIGUSR2)
                process.send_signal(signum)
                shown = [text for _, text in sorted(self.ended(process, 0))]
                if signum == signal.SIGQUIT:    # SIGKILL follows SIGTERM at once
                    shown = [text.replace("KILL", "TERM") for text in shown]
                self.assertEqual(shown, ["a.1 was ended by SIGTERM", "b.1 was ended by SIGTERM"])
                self.assertFalse(any(map(alive, os_pids.values())))

    def test_child_signals_that_were_ignored(self):
        path = self.file(self.folder(), "Procfile", "a: exit 7\n")
        command = [PYTHON, "-c", CliSignals.CARELESS, "ignored", *CLI_COMMAND, "up", "-f", path]
        run = subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, timeout=TIMEOUT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        self.assertEqual((run.returncode, run.stderr), (7, b""))
        self.assertIn(b"a.1 exited with status 7\n", run.stdout)

    def test_a_second_signal_kills(self):
        code = ("import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); "
                "os.write(1, b'ready\\n'); [os.write(1, b'no\\n') for _ in iter(lambda: signal.sigwait([15]), 0)]")
        process = self.up("a: exec %s -ISc %s\n" % (PYTHON, shlex.quote(code)))
        os_pids = self.started(process, "a.1")
        process.send_signal(signal.SIGINT)
        self.assertEqual(next(self.lines(process)), ("a.1", "no"))
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.ended(process, 0)[-1], ("system", "a.1 was ended by SIGKILL"))
        self.assertFalse(alive(os_pids["a.1"]))

    def test_one_dies_and_all_stop_with_its_status(self):
        for how, status, words in (("exit 7", 7, "exited with status 7"), ("kill -9 $$", 137, "was ended by SIGKILL"), ("exit 0", 0, "exited with status 0")):
            with self.subTest(how):
                process = self.up("a: echo last words; %s\nb: exec sleep 1000\n" % how)
                lines = [line for line in self.ended(process, status) if " started" not in line[1] and "listening" not in line[1]]
                self.assertEqual(lines[:2], [("a.1", "last words"), ("system", "a.1 " + words)])
                self.assertEqual(lines[2:], [("system", "b.1 was ended by SIGTERM")])

    def test_keep_going_and_some_types_only(self):
        process = self.up("a: echo again\nb: echo ready; exec sleep 1000\nc: exit 9\n", "--keep-going", "a", "b", "-c", "b=2")
        seen = []
        while seen.count(("a.1", "again")) < 3 or ("b.2", "ready") not in seen:
            seen.append(next(self.lines(process)))
        process.send_signal(signal.SIGTERM)
        self.assertFalse([line for line in self.ended(process, 0) + seen if line[0].startswith("c.")])
        self.call("up", "-f", os.path.join(HERE, "examples", "procfile", "Procfile"), "wep", status=4, err="gaffer: .*did you mean 'web'\\?\n")
        self.call("up", "-f", "/nosuch", status=1, err="gaffer: there is no '/nosuch': name a Procfile.*\n")

    def test_stdin_does_not_end(self):
        process = self.up("css: cat; echo ended\nweb: sleep 0.3; exit 4\n")
        self.assertNotIn(("css.1", "ended"), self.ended(process, 4))

    def test_nothing_to_run(self):
        path = self.file(self.folder(), "Procfile", "web: sleep 1\n")
        self.call("up", "-f", path, "-c", "all=0", status=1, err="gaffer: there is nothing to run: .*\n")
        self.call("up", "-f", self.file(self.folder(), "Procfile", "# x\n"), status=1, err="gaffer: .*\n")

    def test_closed_descriptors(self):
        path = self.file(self.folder(), "Procfile", "web: exit 3\n")
        command = " ".join(map(shlex.quote, [*CLI_SCRIPT, "up", "-f", path]))
        run = subprocess.run(["/bin/sh", "-c", "exec %s <&- >&- 2>&-" % command], env=self.env, check=False, timeout=TIMEOUT)
        self.assertEqual(run.returncode, 3)

    def test_a_socket_that_cannot_be_made(self):
        folder = os.path.join(self.folder(), "x" * 100)
        os.mkdir(folder)
        process = self.follow("up", "-f", self.file(folder, "Procfile", "web: exit 3\n"))
        lines = self.ended(process, 3)
        self.assertRegex(lines[0][1], "there is no API in this folder: .*too long")

    def test_nothing_is_lost_where_it_is_read_slowly(self):
        """More than pipes, windows and the queue hold: the process waits."""
        read, write = os.pipe()
        with unittest.mock.patch.object(gaffer, "SCREEN_SIZE", 65536), os.fdopen(read, "rb") as out:
            manager = gaffer.Manager([gaffer.Screen(write, one_for_all=True)], window_size=65536)
            manager.add_process("a", "seq 1 60000", restart="never")
            thread = threading.Thread(target=manager.run)
            thread.start()
            until(lambda: 1 in manager.processes and manager.processes[1].outputs["stdout"]._paused, "seq waits")
            self.assertFalse(manager.processes[1].exited)
            numbers = []
            while not numbers or numbers[-1] != 60000:
                name, text = re.match(rb"\S+ (\S+) +\| (.*)\n", out.readline()).groups()
                if name == b"a.1":
                    numbers.append(int(text))
            self.assertEqual(numbers, list(range(1, 60001)))
            thread.join(TIMEOUT)
        os.close(write)

    def test_nobody_reads(self):
        process = self.up(self.SLEEPERS)
        os_pids = self.started(process, "a.1", "b.1")
        process.stdout.close()
        os.kill(os_pids["a.1"], signal.SIGKILL)     # the next line fails
        self.assertIn(process.wait(TIMEOUT), (137, 141))
        self.assertEqual(process.stderr.read(), b"")
        self.assertFalse(any(map(alive, os_pids.values())))
        process.stdout = open(os.devnull, "rb")


class ProcfileExample(CliFollowCase):
    """The application in the folder examples comes up, scales, reloads and goes down, in a pipe and in a terminal."""

    def setUp(self):
        super().setUp()
        self.home = self.folder()
        self.app = os.path.join(self.home, "app")
        shutil.copytree(os.path.join(HERE, "examples", "procfile"), self.app)
        self.endpoint = "unix:" + os.path.join(self.home, "socket")
        self.more = {"SPOOL": os.path.join(self.home, "spool"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.env = dict(self.env, **self.more)
        ports = range(20000 + os.getpid() % 5000, 32000)    # below those that the system gives out
        self.port = next(port for port in ports if self._free(port) and self._free(port + 1))

    @staticmethod
    def _free(port):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return True
        return False

    def page(self, port):
        """What the web process answers."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
            connection.request("GET", "/")
            return connection.getresponse().read()

    def life(self, read_line, stop):
        """From the start to the end. `read_line()`: the next line that is shown."""
        def read_until(*words):
            left, seen = set(words), []
            while left:
                seen.append(read_line())
                self.assertTrue(seen[-1], "it has ended: %s" % seen)
                left -= {word for word in left if word in re.sub("\x1b\\[[0-9]+m", "", seen[-1])}
            return seen
        seen = read_until("web.1 ", "worker.1 ", "clock.1 ", "listening on %d" % self.port, "did task-")
        ask = ("--endpoint", self.endpoint, "-f", os.path.join(self.app, "Procfile"))
        self.assertEqual(self.call("scale", "web=2", "worker+1", *ask), "web: 2 processes\nworker: 2 processes\n")
        seen += read_until("web.2 started", "worker.2 started", "listening on %d" % (self.port + 1))
        self.assertRegex(self.page(self.port + 1), rb"\Atasks done\tso far: \d+\n\Z")
        text = cli_read(os.path.join(self.app, "Procfile"))
        self.file(self.app, "Procfile", text.replace("worker: ", "worker: echo new; "))
        self.assertEqual(self.call("reload", *ask[:2]), "worker: changed (cmd, shell)\nweb: kept\nclock: kept\n")
        seen += read_until("| new")
        until(lambda: self.called("ps", *ask)[0] == 0, "all run again")
        self.assertEqual(len(self.call("ps", *ask).splitlines()), 7)
        stop()
        while True:
            line = read_line()
            if not line:
                break
            seen.append(line)
        return [int(pid) for pid in re.findall(r"started, os pid (\d+)", "".join(seen))], seen

    def command(self):
        """What is run."""
        return ["up", "-f", os.path.join(self.app, "Procfile"), "-p", str(self.port), "--bind", self.endpoint]

    def check(self, process, os_pids, seen):
        """Nothing is left, and the last one that began is the first to end."""
        self.assertEqual((process.wait(TIMEOUT), process.stderr.read()), (0, b""))
        self.assertGreaterEqual(len(os_pids), 7)
        self.assertEqual([os_pid for os_pid in os_pids if alive(os_pid)], [])
        self.assertFalse(os.path.exists(self.endpoint[5:]))
        ends = "".join(line for line in seen if "was ended by" in line)
        self.assertEqual(set(re.findall(r"(\S+) was ended by SIGTERM", ends)), {"web.1", "web.2", "worker.1", "worker.2", "clock.1"})

    def test_in_a_pipe(self):
        process = self.follow(*self.command())
        self.check(process, *self.life(lambda: process.stdout.readline().decode(), lambda: process.send_signal(signal.SIGINT)))

    def test_in_a_terminal(self):
        main, side = os.openpty()
        screen = os.fdopen(main, "rb", buffering=0)
        self.addCleanup(screen.close)

        def own_terminal():
            os.setsid()
            fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        process = subprocess.Popen(CLI_COMMAND + self.command(), stdin=side, stdout=side, stderr=subprocess.PIPE,
                                   env=dict(self.env, TERM="xterm"), preexec_fn=own_terminal)
        os.close(side)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        reader = io.BufferedReader(screen)
        self.addCleanup(reader.close)

        def read_line():
            try:
                return reader.readline().decode()
            except OSError:                     # EIO: nobody has the other side any more
                return ""
        os_pids, seen = self.life(read_line, lambda: os.write(main, b"\x03"))
        self.check(process, os_pids, [re.sub("\x1b\\[[0-9]+m", "", line) for line in seen])
        self.assertTrue(any(re.match("\x1b\\[[0-9]+m[0-9:]{8} web.1    \\|\x1b\\[0m listening", line) for line in seen), seen[:9])


class WebHooksTest(ServerCase):
    """Events that are posted."""

    def setUp(self):
        super().setUp()
        self.received = queue.Queue()
        self.answers = []                       # statuses of the next answers, else 200
        self.receiver = Running(handlers=[(r"/hook(.*)", self.take)])
        self.addCleanup(self.receiver.stop_all)

    def take(self, request, rest):
        """The receiver."""
        status = self.answers.pop(0) if self.answers else 200
        self.received.put((rest, request.raw_query, request.headers.get("content-type"), json.loads(request.body), status))
        return status, [], ""

    def hooks(self, *hooks):
        """Running WebHooks."""
        made = gaffer.WebHooks(hooks)
        self.server.manager.loop.call(made.start, self.server.manager.loop, self.server.manager)
        self.addCleanup(made.join)
        self.addCleanup(made.stop)
        return made

    def test_each_event_is_posted(self):
        self.hooks(("proc/a/spawn", self.receiver.url + "/hook/a?x=1"), ("stop", self.receiver.url + "/hook"))
        self.server.add("a", "sleep 1000")
        self.server.add("b", "sleep 1000")
        self.server.ok("POST", "/processes/b/_stop")
        rest, query, kind, event, _ = self.received.get(timeout=TIMEOUT)
        self.assertEqual((rest, query, kind, event["event"], event["pid"]), ("/a", "x=1", "application/json", "spawn", 1))
        self.assertEqual(self.received.get(timeout=TIMEOUT)[3], self.server.wait_event("stop"))
        self.assertTrue(self.received.empty())

    def test_tried_again_unless_it_is_refused(self):
        with unittest.mock.patch.object(gaffer, "WEBHOOK_PAUSES", (0.01, 0.01)), self.assertLogs("gaffer", "WARNING") as logs:
            made = self.hooks(("create", self.receiver.url + "/hook"))
            self.answers += [500, 503, 200, 404, 200]
            for name in ("a", "b", "c"):
                self.server.add(name, "sleep 1000")
            found = [self.received.get(timeout=TIMEOUT) for _ in range(5)]
        self.assertEqual([(event["name"], status) for _, _, _, event, status in found], [
            ("a", 500), ("a", 503), ("a", 200), ("b", 404), ("c", 200)])
        self.assertEqual(made.dropped, 1)
        self.assertRegex(logs.output[0], "/hook was dropped, 1 of all by now: it answers 404")

    def test_a_dead_receiver_costs_nothing(self):
        with unittest.mock.patch.object(gaffer, "WEBHOOK_PAUSES", (0.01,)), self.assertLogs("gaffer", "WARNING") as logs:
            made = self.hooks(("create", "http://127.0.0.1:1/"), ("create", self.receiver.url + "/hook"))
            for name in ("a", "b"):
                self.server.add(name, "sleep 1000")
            self.assertEqual([self.received.get(timeout=TIMEOUT)[3]["name"] for _ in range(2)], ["a", "b"])
        self.assertEqual(made.dropped, 2)
        self.assertEqual(len(logs.output), 1, "said once a minute")
        self.assertIn("connection refused", logs.output[0])

    def test_a_receiver_that_hangs(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, unittest.mock.patch.object(gaffer, "WEBHOOK_QUEUE", 3), \
                unittest.mock.patch.object(gaffer, "WEBHOOK_END", 0.1), self.assertLogs("gaffer", "WARNING") as logs:
            made = self.hooks(("create", "http://127.0.0.1:%d/" % silent.getsockname()[1]))
            self.server.add("first", "sleep 1000")
            sock, _ = silent.accept()
            with sock:                          # the worker waits for an answer; three more have room
                for number in range(5):
                    self.server.add("x%d" % number, "sleep 1000")
                self.assertEqual(made.dropped, 2)
                made.stop()
                made.join()
                self.assertEqual(made.dropped, 5, "what waited is counted, and told")
        self.assertRegex(logs.output[-1], "3 events for webhooks were not posted before the end, 5 were dropped in all")

    def test_last_words_are_sent(self):
        made = gaffer.WebHooks([("proc/a", self.receiver.url + "/hook")])
        manager = gaffer.Manager([made])
        manager.add_process("a", "sleep 1000")
        manager.subscribe("spawn", lambda kind, event: manager.stop())
        manager.run()
        found = [self.received.get(timeout=TIMEOUT)[3]["event"] for _ in range(self.received.qsize())]
        self.assertEqual((found, made.dropped), (["start", "spawn", "stop", "stop_pid", "exit"], 0))


class CliDaemon(CliFollowCase):
    """--pidfile, --log-file, --daemon, completion"""

    def test_a_pid_file_is_for_one(self):
        path = os.path.join(self.folder(), "pid")
        self.file(os.path.dirname(path), "pid", "999999999999 stale\n")
        server = self.start("--pidfile", path)
        self.assertEqual(cli_read(path), "%d\n" % server.process.pid)
        self.call("serve", "--bind", "127.0.0.1:0", "--pidfile", path, status=1, err="gaffer: the pid file '%s' is used by a gaffer "
                  "that runs, pid %d: .*\n" % (path, server.process.pid))
        self.assertEqual((server.stop(), server.stderr), (0, ""))
        self.assertFalse(os.path.exists(path))
        self.call("serve", "--bind", "127.0.0.1:0", "--pidfile", path + "/x", status=1, err="gaffer: the pid file .* cannot be written: .*\n")

    def test_a_pid_file_that_its_last_user_removes(self):
        """Between the open and the lock of the next one, which takes a new file; nobody removes another's."""
        path = os.path.join(self.folder(), "pid")
        first, second, third, fourth = (gaffer.PidFile(path) for _ in range(4))
        first.start(None, None)
        flock, opened = fcntl.flock, []

        def slow(file, how):
            if not opened:
                opened.append(True)
                first.stop()
            flock(file, how)
        with unittest.mock.patch("fcntl.flock", slow):
            second.start(None, None)
        self.assertEqual(cli_read(path), "%d\n" % os.getpid())
        with self.assertRaisesRegex(gaffer.StartError, "is used by a gaffer"):
            third.start(None, None)
        os.unlink(path)
        fourth.start(None, None)
        second.stop()
        self.assertTrue(os.path.exists(path))
        fourth.stop()
        self.assertFalse(os.path.exists(path))

    def test_log_files_are_reopened(self):
        folder = self.folder()
        paths = [os.path.join(folder, name) for name in ("log", "access")]
        server = self.start("--log-file", paths[0], "--access-log", paths[1], "-v")
        for number, signum in enumerate((signal.SIGUSR1, signal.SIGUSR2)):
            server.add("a%d" % number, {"cmd": "sleep 1000"})
            until(lambda: "INFO a%d: spawn" % number in cli_read(paths[0]), "the old log")
            until(lambda: "GET /status/a%d" % number in cli_read(paths[1]), "the old access log")
            for path in paths:
                os.rename(path, path + ".1")
            server.process.send_signal(signum)
            until(lambda: all(map(os.path.exists, paths)), "the new files")
            self.assertEqual(list(map(cli_read, paths)), ["", ""])
            server.add("b%d" % number, {"cmd": "sleep 1000"})
            until(lambda: "INFO b%d: spawn" % number in cli_read(paths[0]), "the new log")
            until(lambda: "GET /status/b%d" % number in cli_read(paths[1]), "the new access log")
            for path in paths:
                self.assertNotIn("b%d" % number, cli_read(path + ".1"))
        held = CliServe._descriptors(server.process.pid)
        self.assertEqual(sorted(name for name in held if name.startswith(folder)), sorted(paths))
        self.assertEqual((server.stop(), server.stderr), (0, ""))
        self.call("serve", "--log-file", folder, status=1, err="gaffer: the log file '.*' cannot be written: Is a directory\n")

    def test_signals_that_come_close_together(self):
        """Two of them 1 ms apart, many times: each descriptor is closed once, and none is left."""
        folder = self.folder()
        config = self.file(folder, "gaffer.ini", "[process:a]\ncmd = cat\nredirect_input = true\n")
        path, access = os.path.join(folder, "log"), os.path.join(folder, "access")
        server = self.start(config, "--log-file", path, "--access-log", access, "-v")
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as client:
            client.sendall(http_bytes("GET", "/streams/a/stdout?feed=continuous"))
            self.assertEqual(client.recv(12), b"HTTP/1.1 200")

            def opened():
                found = []
                for each in glob.glob("/proc/%d/fd/*" % server.process.pid):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(os.readlink(each))
                return sorted(found)
            before, pause = opened(), threading.Event()
            for _ in range(50):
                for signum in signal.SIGUSR1, signal.SIGUSR2:
                    os.rename(path, path + ".1")
                    for _ in range(2):
                        server.process.send_signal(signum)
                        pause.wait(0.001)
                    until(lambda: os.path.exists(path), "a new log file")
            until(lambda: opened() == before, "the descriptors of before, and no others")
            self.assertEqual(server.request("GET", "/ping")[0], 200)
            client.settimeout(0.01)
            with self.assertRaises(socket.timeout):     # the head, then silence, no end
                while client.recv(4096):
                    pass
        self.assertEqual((server.stop(), server.stderr), (0, ""))
        self.assertIn("INFO a: exit", cli_read(path))

    def test_a_log_file_that_cannot_be_opened_again(self):
        """The server lives, and goes on in the old file until there is a place for a new one."""
        folder = self.folder()
        old, path = os.path.join(folder, "old"), os.path.join(folder, "logs", "log")
        os.mkdir(os.path.dirname(path))
        server = self.start("--log-file", path, "-v")
        os.rename(os.path.dirname(path), old)
        server.process.send_signal(signal.SIGUSR1)
        words = "WARNING the log file '%s' cannot be written: No such file" % path
        until(lambda: words in cli_read(old + "/log"), "the failure")
        server.add("a", {"cmd": "sleep 1000"})
        until(lambda: "INFO a: spawn" in cli_read(old + "/log"))
        os.mkdir(os.path.dirname(path))
        server.process.send_signal(signal.SIGUSR1)
        until(lambda: os.path.exists(path))
        self.assertEqual((server.stop(), server.stderr), (0, ""))
        self.assertIn("INFO a: exit", cli_read(path))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_log_file_on_a_full_disk(self):
        server = self.start("--log-file", "/dev/full", "-v")
        server.add("a", {"cmd": "sleep 1000"})
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_daemon(self):
        folder = self.folder()
        endpoint, pidfile, log = "unix:" + os.path.join(folder, "socket"), os.path.join(folder, "pid"), os.path.join(folder, "log")
        arguments = ("serve", "--daemon", "--bind", endpoint, "--log-file", log, "--pidfile", pidfile)
        script = [PYTHON, "-W", "error", CLI_FILE]          # without -X dev, in which Python 3.8 fails after any fork
        run = subprocess.run(script + list(arguments), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT,
                             check=False, universal_newlines=True)
        self.assertEqual((run.returncode, run.stderr, run.stdout), (0, "", "gaffer %s listening on %s\n" % (gaffer.__version__, endpoint)))
        os_pid = int(cli_read(pidfile))
        try:
            self.assertEqual(gaffer.Client(endpoint).get("/processes"), [])
            fields = cli_read("/proc/%d/stat" % os_pid).rpartition(")")[2].split()
            self.assertNotEqual(int(fields[3]), os.getsid(0), "a session of its own")
            self.assertNotEqual(int(fields[3]), os_pid, "of which it is not the leader")
            self.assertEqual([os.readlink("/proc/%d/fd/%d" % (os_pid, fd)) for fd in (0, 1, 2)], ["/dev/null", log, log])
            status, _, err = self.outcome(*arguments)
            self.assertEqual(status, 1)
            self.assertRegex(err, r"\Agaffer: the pid file [^\n]* pid %d[^\n]*\n\Z" % os_pid)
        finally:
            os.kill(os_pid, signal.SIGTERM)
        until(lambda: not alive(os_pid))
        self.assertEqual((cli_read(log), os.listdir(folder)), ("", ["log"]))
        self.call("serve", "--daemon", status=2, err="gaffer: --daemon needs --log-file.*\n")

    TYPED = (("re", r"reload\b[^$]*restart\b"), ("stop we", "web"), ("stop --no", "--no-wait"), ("export sy", "systemd"),
             ("--json stop group:", "group:one"), ("logs -f d", "db"))

    def program(self):
        """A folder with an executable gaffer.py, as a shell finds it; there is something to complete."""
        self.sleepers("web", "db", "group:one")
        home = self.folder()
        command = " ".join(map(shlex.quote, CLI_COMMAND))
        self.file(home, "gaffer.py", "#!/bin/sh\nGAFFER_ENDPOINT=%s exec %s \"$@\"\n" % (self.server.url, command), 0o700)
        return home

    def check_completion(self, shell, setup):
        """An interactive shell in a terminal loads the script, and completes what is typed."""
        home = self.program()
        script = self.file(home, "script", self.call("completion", shell[0]))
        main, side = os.openpty()
        self.addCleanup(os.close, main)

        def own_terminal():
            os.setsid()
            fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        env = dict(self.env, TERM="dumb", HOME=home, PATH=home + ":" + os.environ["PATH"], XDG_CONFIG_HOME=home, INPUTRC=os.devnull)
        process = subprocess.Popen(shell, stdin=side, stdout=side, stderr=side, env=env, cwd=home, preexec_fn=own_terminal)
        os.close(side)
        self.addCleanup(process.wait, TIMEOUT)
        self.addCleanup(process.kill)
        for typed, shown in [(setup % script + "; echo set''-up\r", "set-up\r")] + [
                ("gaffer.py %s\t" % words + "\t" * (words == "re"), found) for words, found in self.TYPED]:
            os.write(main, typed.encode())
            seen = ""
            while not re.search(shown, seen[seen.find(typed.rstrip("\t").rpartition(" ")[2]) * (shown != "set-up\r"):]):
                ready, _, _ = select.select([main], [], [], TIMEOUT)
                self.assertTrue(ready, "%r was typed, %r seen" % (typed, seen))
                seen += os.read(main, 4096).decode("utf-8", "replace")
            os.write(main, b"\x15")

    @unittest.skipUnless(shutil.which("bash"), "needs bash")
    def test_completion_bash(self):
        self.check_completion(["bash", "--norc", "--noprofile", "-i"], "source %s; PS1='$ '")

    @unittest.skipUnless(shutil.which("zsh"), "needs zsh")
    def test_completion_zsh(self):
        self.check_completion(["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -D; source %s; PS1='$ '")

    @unittest.skipUnless(shutil.which("fish"), "needs fish")
    def test_completion_fish(self):
        path = self.program()
        script = self.file(path, "script", self.call("completion", "fish"))
        for line, found in self.TYPED:
            out = subprocess.check_output(["fish", "-c", "source %s; complete -C 'gaffer.py %s'" % (script, line)], timeout=TIMEOUT,
                                          env=dict(self.env, PATH=path + ":" + os.environ["PATH"], HOME=path), universal_newlines=True)
            self.assertRegex(out.replace("\n", " "), r"\A%s \Z" % found, line)

    def test_completion_words(self):
        self.sleepers("web", "w:eb")
        options = sorted(name for names, _ in gaffer.COMMANDS["pids"].options for name in names if name[0] == "-")
        for line, words in (("gaffer.py sta", ["start", "status"]), ("gaffer.py pids -", ["--help", *options]),
                            ("gaffer.py pids web w", ["w:eb", "web"]), ("gaffer.py --endpoint x pids ", ["all", "w:eb", "web"]),
                            ("gaffer.py serve --pidfile ", []), ("gaffer.py completion ", ["bash", "fish", "zsh"])):
            self.assertEqual(sorted(self.call("completion", "zsh", line).split()), sorted(words), line)
        self.assertEqual(self.call("completion", "bash", "gaffer.py stop w:"), "eb\n")
        os.environ["GAFFER_ENDPOINT"] = "http://127.0.0.1:1"
        self.assertEqual(self.call("completion", "bash", "gaffer.py stop "), "")


class CliHostile(CliCase):
    """A server of its own that gets nothing but malformed requests, openings and frames: it answers between them, and in the
    end it has the same descriptors, and no more memory than when some of them had come."""

    quick = False

    cases, seed, first = 100, "1", 0            # main(): --hostile N

    OPENING = (b"GET /wstreams/1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
               b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")

    class Http(FuzzHttp):
        """With the limits of the server."""
        BODY = gaffer.BODY_SIZE

    def setUp(self):
        super().setUp()
        self.server = self.start()
        self.server.add("cat", {"cmd": "cat"}, redirect_input=True)
        self.proc = "/proc/%d/" % self.server.process.pid
        self.server.request("GET", "/processes/ca")                   # imports what a mistake needs, and what a websocket does
        self.exchange(self.OPENING + WebSocket.encode(1, b"hello " * 100))
        self.descriptors = self.settled()

    def settled(self):
        """How many descriptors it has, when it has only one socket: the one that listens."""
        def look():
            kinds = []
            for name in os.listdir(self.proc + "fd"):
                with contextlib.suppress(OSError):
                    kinds.append(os.readlink(self.proc + "fd/" + name).partition(":")[0])
            return kinds.count("socket") == 1 and len(kinds)
        return until(look, "the end of all connections")

    def exchange(self, data):
        """All that is answered to these bytes, up to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.server.port), TIMEOUT) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def memory(self):
        """Its resident size in bytes, with the descriptors that it began with."""
        self.assertEqual(self.settled(), self.descriptors)
        return int(re.search(r"VmRSS:\s+(\d+)", cli_read(self.proc + "status")).group(1)) * 1024

    def hostile(self, case):
        """Let case(rng) try all there is."""
        warm = min(self.cases // 3, 1000)
        for number in range(self.first, self.first + self.cases + warm):
            if number == self.first + warm:
                memory = self.memory()
            try:
                case(random.Random("%s:%d" % (self.seed, number)))
                if number % 20 == 0:
                    self.assertEqual(self.server.request("GET", "/ping")[2], b"OK")
            except BaseException as error:
                again = "python3 test_gaffer.py --hostile 1 --seed %s:%d CliHostile.%s" % (self.seed, number, self._testMethodName)
                raise AssertionError("case %d; again: %s" % (number, again)) from error
        growth = self.memory() - memory
        if self.cases >= 1000:
            print("%s: %d cases, %d KiB more memory, %d descriptors before and after" % (
                self._testMethodName, self.cases, growth // 1024, self.descriptors), flush=True)
        self.assertLess(growth, 2 * gaffer.MIB)
        self.assertEqual(self.server.ok("GET", "/processes/cat/_pids")["pids"], [1])
        self.assertEqual((self.server.stop(), self.server.stderr), (0, ""))

    @staticmethod
    def statuses(answer):
        """The status of each response."""
        return [int(status) for status in re.findall(rb"^HTTP/1\.1 ([0-9]{3}) [^\r\n]*\r$", answer, re.M)]

    def test_requests(self):
        def case(rng):
            error = None
            while not isinstance(error, type):
                wire = fuzz_spoil(rng, b"".join(fuzz_request(rng) for _ in range(rng.choice((1, 1, 2)))))
                seen, error = self.Http.outcome(wire)[:2]
            found = self.statuses(self.exchange(wire))
            self.assertTrue(found and 500 not in found and found[-1] != 100, (wire, found))
            if not seen:                        # else the one in front may have ended the connection
                self.assertEqual(found, [error.status], wire)
        self.hostile(case)

    def test_openings(self):
        def malformed(wire):
            try:
                request = gaffer.read_request(io.BytesIO(wire))
                return request is not None and not gaffer.websocket_accept(request)
            except gaffer.GafferError:
                return True

        def case(rng):
            wire = self.OPENING
            while not malformed(wire):
                wire = fuzz_spoil(rng, self.OPENING)
            found = self.statuses(self.exchange(wire))
            self.assertFalse({101, 500} & set(found), (wire, found))     # with another path it may be a good request
        self.hostile(case)

    @staticmethod
    def frames(data):
        """[(opcode, payload)] of what a server has sent."""
        found = []
        while data:
            size, start = data[1], (2, 4, 10)[max(0, data[1] - 125)]
            size = int.from_bytes(data[2:start], "big") if start > 2 else size
            assert len(data) >= start + size, data
            found.append((data[0] & 15, data[start:start + size]))
            data = data[start + size:]
        return found

    def test_frames(self):
        def case(rng):
            last = ("",)
            while last[0] != "fail":
                wire = fuzz_spoil(rng, b"".join(fuzz_frame(rng) for _ in range(rng.randrange(1, 5))))
                decoder = gaffer.WebSocketDecoder(gaffer.MESSAGE_SIZE)
                last = (list(decoder.feed(wire)) or [last])[-1]
            head, _, data = self.exchange(self.OPENING + wire).partition(b"\r\n\r\n")
            self.assertEqual(self.statuses(head), [101])
            opcode, payload = self.frames(data)[-1]
            self.assertEqual((opcode, payload[:2]), (8, struct.pack("!H", last[1])), wire)
        self.hostile(case)


class Readme(CliCase):
    """What README.md shows is what happens."""

    quick = False

    def setUp(self):
        super().setUp()
        self.text = cli_read(os.path.join(HERE, "README.md"))
        self.path = self.folder()               # python3 is the Python that runs the tests
        os.symlink(PYTHON, os.path.join(self.path, "python3"))
        self.env = dict(self.env, PATH=self.path + ":" + os.environ.get("PATH", os.defpath))

    def blocks(self, kind):
        """[text] of the fenced blocks of a kind."""
        return [text for found, text in re.findall(r"^```(\w+)\n(.*?)^```$", self.text, re.M | re.S) if found == kind]

    def examples(self):
        """[(command, expected output or None)] in the order of the page: console sessions, sh blocks, the table's curls."""
        found = []
        pattern = re.compile(r"^```(\w+)\n(.*?)^```$|^\|[^\n]*\| `((?:curl|python3) [^`]*)` \|$", re.M | re.S)
        for kind, text, command in pattern.findall(self.text):
            if command:
                found.append((re.sub(r"^curl ", "curl -sSf --max-time 20 ", command), None))
            elif kind == "sh":
                found.append((text, None))
            elif kind == "console":
                for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
                    command, _, output = part.partition("\n")
                    found.append((command, output))
        return found

    @staticmethod
    def pattern(output):
        """What an output is compared with: numbers, and the words that are new in each run, may differ."""
        text = re.sub(r"@[0-9a-f]{8}\b", "@EPOCH", output)
        return re.sub(r"[0-9]+", "N", text)

    @unittest.skipUnless(shutil.which("curl") and shutil.which("bash"), "needs curl and bash")
    def test_every_command_runs_and_prints_what_the_page_says(self):
        (command, output), *examples = self.examples()
        self.assertEqual((command, output.count("\n")), ("python3 gaffer.py serve", 1))
        server = self.run_program(shlex.split(command) + ["--bind", "127.0.0.1:0"], env=self.env, cwd=HERE)
        self.env["GAFFER_ENDPOINT"] = server.urls[0]
        self.assertEqual(output.replace("5000", str(server.port)), server.first_line)
        self.assertGreater(len(examples), 7)
        for command, output in examples:
            with self.subTest(command=command):
                status, out, err = self.shell(command, server.port)
                if output is None:
                    self.assertEqual(status, 0, (out, err))
                else:
                    self.assertEqual(self.pattern(out + (err if status else "")), self.pattern(output), (status, err))
        for code in self.blocks("python"):
            if "manager.run()" not in code:
                with self.subTest(code=code):
                    out = subprocess.run(["python3", "-W", "error", "-c", re.sub(r"\b5000\b", str(server.port), code)],
                                         env=self.env, cwd=HERE, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT).stdout
                    self.assertTrue(out.startswith(b"STDOUT 0\nSTDOUT 1\n"), out)
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def shell(self, command, port):
        """(status, stdout, stderr) of a command with the page's port replaced."""
        done = subprocess.run(["bash", "-c", re.sub(r"\b5000\b", str(port), command)], env=self.env, cwd=HERE, check=False,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT,
                              universal_newlines=True)
        return done.returncode, done.stdout, done.stderr

    def test_the_program_that_embeds_it_runs(self):
        code, = [code for code in self.blocks("python") if "manager.run()" in code]
        say = "import sys\nclass Say:\n    def start(self, loop, manager): print(http.urls[0], flush=True)\n"
        say += "manager.apps.append(Say())\n"
        code = code.replace("5000", "0").replace("manager.add_process", say + "manager.add_process", 1)
        command = [PYTHON, "-W", "error", "-X", "dev", "-c", code]
        program = self.run_program(command, cwd=HERE, pattern=re.compile("(http.*)\n"))
        self.assertEqual(program.ok("GET", "/hello/world"), {"hello": "world"})
        self.assertEqual(program.ok("GET", "/processes/ticker/_pids")["pids"], [1, 2])
        self.assertEqual((program.stop(), program.stderr), (0, ""))
        self.assertEqual(program.stdout.count("ticker has exited\n"), 2)

    def test_it_is_short(self):
        self.assertLessEqual(self.text.count("\n"), 350)
        self.assertLessEqual(max(map(len, self.text.split("\n"))), 160)

    def test_all_has_a_help_text(self):
        """The reference is `COMMAND --help`, not the README."""
        for name, command in gaffer.COMMANDS.items():
            parser = gaffer.make_parser(name)
            self.assertTrue(command.help, name)
            for action in parser._actions:
                self.assertTrue(action.help, (name, action.option_strings or action.dest))
            self.assertIn("`%s" % name, self.text.replace(", `", " `"), name)
        for table in gaffer.OPTIONS, gaffer.PARAMETERS:
            for name, entry in table.items():
                self.assertTrue(entry.help, name)
        for path, methods in gaffer.ROUTES:
            self.assertTrue(all(handler.__doc__ for handler in methods.values()), path)

    def test_has_every_field_with_its_default(self):
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", self.text, re.M))
        for name, option in gaffer.OPTIONS.items():
            default = "none" if option.default is None else "`%s`" % json.dumps(option.default)
            self.assertEqual(rows.get(name), "required" if name in ("name", "cmd") else default, name)
        flapping = {name: default for name, (default, _) in gaffer.FLAPPING.items()}
        self.assertIn("`%s`" % json.dumps(flapping), self.text)

    def test_has_every_type_of_event_and_the_version(self):
        listed = re.search(r"^Types of events: (.*)\.$", self.text, re.M).group(1).split()
        self.assertLessEqual(set(gaffer.EVENT_TYPES), set(listed))
        self.assertIn("gaffer %s listening on" % gaffer.__version__, self.text)


class Examples(CliCase):
    """Each program of the folder examples, run as its users do."""

    quick = False

    FOLDER = os.path.join(HERE, "examples")
    LISTENING = re.compile(r"listening on (.*)\n\Z")

    def example(self, name, *arguments):
        """Its command line."""
        return [PYTHON, "-W", "error", "-X", "dev", os.path.join(self.FOLDER, name)] + list(arguments)

    def test_none_is_forgotten(self):
        text = cli_read(os.path.join(HERE, "README.md"))
        for name in os.listdir(self.FOLDER):
            if not name.startswith(("_", ".")):
                self.assertIn("examples/" + name, text)

    def test_dockerfile(self):
        """Its lines are right, as far as they can be told without Docker: what it copies is there, what it starts serves."""
        lines = dict(line.split(None, 1) for line in cli_read(os.path.join(self.FOLDER, "Dockerfile")).splitlines())
        self.assertEqual(list(lines), ["FROM", "COPY", "EXPOSE", "ENTRYPOINT"])
        name, target = lines["COPY"].split()
        program, path, *arguments = json.loads(lines["ENTRYPOINT"])
        self.assertEqual((program, path), ("python3", target + name))
        self.assertEqual(arguments.pop(), "0.0.0.0:" + lines["EXPOSE"])
        status, _, err = self.outcome(*arguments, "0.0.0.0:0")
        self.assertEqual(status, 1)
        self.assertIn("GAFFER_TOKEN", err)
        server = self.start(*arguments, "0.0.0.0:0", env=dict(self.env, GAFFER_TOKEN="secret"))
        self.assertEqual(server.ok("GET", "/readyz", headers={"Authorization": "Bearer secret"})["ready"], True)
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_dummy_counts_on_both_streams(self):
        process = subprocess.Popen(self.example("dummy.py", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with process:
            for stream, word in (process.stdout, b"STDOUT"), (process.stderr, b"STDERR"):
                self.assertEqual([stream.readline() for _ in range(3)], [b"%s %d\n" % (word, number) for number in range(3)])
            process.kill()

    def test_echo_answers_each_line_at_once_and_ends_at_the_end(self):
        process = subprocess.Popen(self.example("echo.py"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            for line in (b"ECHO\n", b"\xff\x00\r\n"):
                process.stdin.write(line)
                process.stdin.flush()
                self.assertEqual(process.stdout.readline(), line)
            self.assertEqual((process.communicate(b"no end")[0], process.returncode), (b"no end", 0))

    def test_echo_client(self):
        server = self.start()
        echo = dict(zip(("cmd", "args"), (PYTHON, ["-I", "-S", os.path.join(self.FOLDER, "echo.py")])))
        server.add("echo", echo, redirect_input=True)
        url = "ws://localhost:%d/wstreams/" % server.port
        run = subprocess.run(self.example("echo_client.py", url + "1"), stdout=subprocess.PIPE, timeout=TIMEOUT, check=True)
        self.assertEqual(run.stdout, b"Sent\nReeiving...\nReceived 'ECHO\n'\n")
        run = subprocess.run(self.example("echo_client.py", url + "7"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             timeout=TIMEOUT, check=False)
        self.assertEqual((run.returncode, run.stdout), (1, b""))
        self.assertRegex(run.stderr, rb"\Aecho_client: .* 404 [^\n]*\n\Z")
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_embed(self):
        program = self.run_program(self.example("embed.py", "127.0.0.1:0"), pattern=self.LISTENING)
        self.assertEqual(program.ok("GET", "/hello/world")["hello"], "world")
        self.assertEqual(program.request("GET", "/admin/x")[2], b"admin page at /x\n")
        self.assertEqual(program.ok("GET", "/processes"), ["clock"])
        self.assertRegex(program.request("GET", "/streams/clock/stdout?since=0")[2], rb":\d\d \d{4}")
        shout = WebSocket(program.port, "/shout")
        self.addCleanup(shout.close)
        shout.text("quiet")
        self.assertEqual(shout.read(), (1, b"QUIET"))
        self.assertEqual((program.stop(signal.SIGINT), program.stdout, program.stderr), (0, "", ""))

    def test_chat(self):
        """Everybody gets every message, and a thread of the program's own sends, too."""
        program = self.run_program(self.example("chat.py", "127.0.0.1:0"), pattern=self.LISTENING)
        one = WebSocket(program.port, "/chat")
        self.addCleanup(one.close)
        self.assertEqual(one.read(), (1, b"somebody has come in"))
        two = WebSocket(program.port, "/chat")
        self.addCleanup(two.close)
        self.assertEqual([client.read() for client in (one, two)], [(1, b"somebody has come in")] * 2)
        two.text("hello")
        self.assertEqual([client.read() for client in (one, two)], [(1, b"hello")] * 2)
        two.frame(8, struct.pack("!H", 1000))
        self.assertEqual(one.read(), (1, b"somebody has left"))
        self.assertEqual((program.stop(), program.stderr), (0, ""))

    @unittest.skipUnless(shutil.which("nginx"), "needs nginx")
    def test_nginx(self):
        """The block is what nginx takes, and what its clients need."""
        folder, server = self.folder(), self.start("--allow-host", "gaffer.example.com")
        block = cli_read(os.path.join(self.FOLDER, "nginx.conf"))
        path = os.path.join(folder, "nginx.conf")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with open(path, "w") as file:
            file.write("pid %s/pid; error_log stderr; daemon off; events {} http { access_log off;\n%s\n"
                       "client_body_temp_path %s; proxy_temp_path %s; fastcgi_temp_path %s; uwsgi_temp_path %s; scgi_temp_path %s;\n"
                       "server { listen 127.0.0.1:%d; %s } }" % (
                           folder, re.search("map .*}", block).group(), *[folder] * 5, port,
                           block.replace("127.0.0.1:5000", "127.0.0.1:%d" % server.port)))
        nginx = subprocess.Popen(["nginx", "-p", folder, "-c", path], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        with nginx:
            def listens():
                with socket.socket() as sock:
                    return sock.connect_ex(("127.0.0.1", port)) == 0
            until(listens, "nginx")
            server.add("cat", {"cmd": "cat"}, redirect_input=True)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
            connection.request("POST", "/gaffer/streams/1/stdin", b"hello\n", {
                "Host": "gaffer.example.com", "Origin": "https://gaffer.example.com"})
            self.assertEqual(connection.getresponse().read(), b'{"ok": true}\n')
            connection.close()
            client = WebSocket(port, "/gaffer/wstreams/1?tail=all")
            self.assertEqual(client.read(), (1, b"hello\n"))
            client.close()
            nginx.terminate()
            self.assertNotIn(b"[emerg]", nginx.stderr.read())
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_systemd_unit(self):
        text = cli_read(os.path.join(self.FOLDER, "gaffer.service"))
        command = re.search("^ExecStart=(.*)$", text, re.M).group(1).split()
        self.assertEqual(command[2:], ["serve", "/etc/gaffer.ini"])

    def test_configurations(self):
        """Each example file is one that serve takes."""
        for name in ("gaffer.ini", "gaffer.toml")[:2 if sys.version_info >= (3, 11) else 1]:
            settings = gaffer.read_settings(os.path.join(self.FOLDER, name))
            self.assertEqual(list(settings.templates)[:2], ["dummy", "echo"])
            self.assertEqual(settings.endpoints[0].bind, "127.0.0.1:5000")

    def test_websocket_echo(self):
        program = self.run_program(self.example("websocket_echo.py", "0"), pattern=self.LISTENING)
        self.assertRegex(program.urls[0], r"\Aws://127\.0\.0\.1:\d+/echo\Z")
        client = WebSocket(program.port, "/echo")
        self.addCleanup(client.close)
        for opcode, data in (1, "text, ä".encode()), (2, b"\xff\x00"), (1, b""), (2, b""), (2, b"x" * 70000):
            client.frame(opcode, data)
            self.assertEqual(client.read(), (opcode, data))
        client.frame(1, b"in ", final=False)
        client.frame(0, b"parts")
        self.assertEqual(client.read(), (1, b"in parts"))
        client.frame(8, struct.pack("!H", 1000))
        self.assertEqual(client.read(), (8, struct.pack("!H", 1000)))
        self.assertEqual((program.stop(), program.stderr), (0, ""))

    def test_follow_asks_for_what_there_is(self):
        """No browser here: the page is short, and what it asks from another port of localhost is answered to it."""
        text = cli_read(os.path.join(self.FOLDER, "follow.html"))
        self.assertLess(text.count("\n"), 25)
        for part in ('query.get("server")', 'query.get("stream")', "new EventSource(", "addEventListener(label"):
            self.assertIn(part, text)
        query = re.search(r'stream \+ "(\?[^"]*)"', text).group(1)
        server = self.start()
        server.add("dummy", python("print('x'); input()"), redirect_input=True)
        origin = {"Origin": "http://localhost:8000", "Accept": "text/event-stream"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
            connection.request("GET", "/streams/dummy/stdout" + query, headers=origin)
            with connection.getresponse() as answer:
                self.assertEqual(answer.headers["Access-Control-Allow-Origin"], origin["Origin"])
                self.assertEqual(next(sse_events(answer))["event"], "stdout")
        self.assertEqual(server.stop(), 0)


class Loadtest(CliCase):
    """examples/loadtest.py, for real, at sizes that say nothing about speed."""

    quick = False
    FILE = os.path.join(HERE, "examples", "loadtest.py")
    SMALL = ["--megabytes", "2", "--lines", "200", "--seconds", "0.1", "--messages", "20", "--restarts", "2"]

    def loadtest(self, *arguments):
        """(exit status, stdout, stderr) of a run."""
        done = subprocess.run([PYTHON, "-W", "error", "-X", "dev", self.FILE, *arguments], env=self.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=TIMEOUT, check=False)
        return done.returncode, done.stdout, done.stderr

    def figures(self, *arguments):
        """{(case, system): row} of a run without a fault; the keys of figures and ratios are one dict."""
        status, out, err = self.loadtest("--json", "--quiet", *self.SMALL, *arguments)
        self.assertEqual((status, err), (0, ""), out)
        rows = json.loads(out)["results"]
        for row in rows:
            self.assertNotIn("error", row)
            for fault in "lost", "lost bytes", "dropped bytes", "failed":
                self.assertFalse(row["figures"].get(fault), row)
        return {(row["case"], row["system"]): row for row in rows}

    def names(self):
        """Functions and classes of the program."""
        return runpy.run_path(self.FILE)

    def given(self):
        """A server that runs already, and the arguments that name it."""
        server = self.start()
        return server, ("--endpoint", "http://127.0.0.1:%d" % server.port)

    def test_measures_a_server_that_is_given_and_leaves_it_as_it_was(self):
        server, endpoint = self.given()
        server.add("mine", {"cmd": "sleep", "args": ["1000"]})
        found = [name for name in ("socat", "websocketd") if shutil.which(name)]
        others = [word for name in ("asyncio", "relay", "bare", *found) for word in ("--against", name)]
        rows = self.figures(*endpoint, "--throughput", "--fan-out", "7", "--echo", "--api", "2", "--busy", "--spawn", "3",
                            "--restart", "--growth", "40", *others)
        self.assertEqual(server.ok("GET", "/processes"), ["mine"])
        self.assertEqual(server.stop(), 0)
        server.expect_stderr("WARNING loadtest:.*: exit .*signal 9")       # --restart
        expected = {"continuous": "MB/s", "websocket": "MB/s", "SSE": "MB/s", "to 7": "p99 ms", "through cat": "p50 us",
                    "2 kept": "requests/s", "2 kept, busy": "requests/s", "processes": "total ms", "after kill -9": "p50 ms",
                    "at 40": "event us"}
        others = {("to 7", "asyncio"), ("through cat", "relay"), ("processes", "bare"), ("after kill -9", "bare")}
        others |= {(case, name) for name in found for case in (
            ("continuous", "websocket") if name == "socat" else ("continuous", "websocket", "SSE", "through cat"))}
        self.assertEqual(set(rows), {(case, "gaffer") for case in expected} | others)
        for case, key in expected.items():
            self.assertGreater(rows[case, "gaffer"]["figures"][key], 0)
        for case, other in others:
            key = expected[case]
            ratio = rows[case, "gaffer"]["figures"][key] / rows[case, other]["figures"][key]
            self.assertAlmostEqual(rows[case, other]["ratios"].get(key, ratio), ratio)
        fan_out = rows["to 7", "gaffer"]["figures"]
        self.assertEqual(fan_out["deliveries"], 7 * 20)
        self.assertGreater(fan_out["memory MiB"], 5, "it has found the server's process")
        self.assertGreater(fan_out["CPU s/M"], 0)

    def test_starts_and_stops_a_server_of_its_own(self):
        figures = self.figures("--rest")["at rest", "gaffer"]["figures"]
        self.assertTrue(5 < figures["1 child, MiB"] < figures["200 children, MiB"] + 1 < 100, figures)
        self.assertTrue(figures["import ms"] > 0 < figures["start ms"], figures)

    def test_a_table_for_people_and_progress_for_who_waits(self):
        server = self.start("--token-file", self.file(self.folder(), "token", "secret"))
        endpoint = "--endpoint", "http://127.0.0.1:%d" % server.port
        status, out, err = self.loadtest(*endpoint, "--api", "1", *self.SMALL)
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, r"\Aloadtest: POST /processes: 401 [^\n]*send the token[^\n]*\n\Z")
        token = self.file(self.folder(), "token", "secret\n")
        status, out, err = self.loadtest(*endpoint, "--token-file", token, "--api", "1", "--against", "socat", *self.SMALL)
        self.assertEqual((status, err), (0, "loadtest: api, 1 kept: gaffer, round 1 of 1\nloadtest: socat can do nothing of this\n"))
        self.assertRegex(out, r"\Agaffer %s, CPython [^\n]*\n\napi  .*\n +.*\n1 kept: gaffer +[0-9,.]+ +0 " % gaffer.__version__)

    def test_wrong_usage_is_told(self):
        main = self.names()["main"]
        for arguments in (["--no-such"], ["--fan-out", "0"], ["--fan-out", "many"], ["--seconds", "nan"], ["--against", "nothing"],
                          ["--endpoint", "https://localhost:1"], ["--endpoint", "localhost:1"], ["--thro"], ["extra"]):
            with self.subTest(arguments=arguments), contextlib.redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit) as caught:
                    main(arguments)
                self.assertEqual(caught.exception.code, 2)
                self.assertIn("loadtest.py: error: ", err.getvalue())
        self.assertEqual(self.loadtest("--no-such")[:2], (2, ""))

    def test_no_server_and_no_token_are_one_sentence(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for arguments, words in ((["--endpoint", "http://127.0.0.1:%d" % port], "no gaffer answers at http://127.0.0.1:%d" % port),
                                 (["--token-file", "/nowhere"], "the token file '/nowhere'"),
                                 (["--gaffer", "/nowhere"], "a server did not start")):
            status, out, err = self.loadtest("--echo", *arguments)
            self.assertEqual((status, out), (1, ""))
            self.assertRegex(err.splitlines()[-1], r"\Aloadtest: " + re.escape(words))

    @staticmethod
    def wait_for_lines(server):
        """A writer writes."""
        until(lambda: any(b"x" * 60 in server.request("GET", "/streams/%s/stdout?since=0&timeout=0" % name)[2]
                          for name in server.ok("GET", "/processes")), "lines flow")

    def test_a_server_that_ends_meanwhile_is_a_failure(self):
        server, endpoint = self.given()
        command = [PYTHON, "-W", "error", self.FILE, "--throughput", "--megabytes", "100000", "--json", "--quiet", *endpoint]
        with subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
            self.wait_for_lines(server)
            server.kill()
            out, err = run.communicate(timeout=TIMEOUT)
        self.assertEqual((run.returncode, err), (1, b""))
        first, *others = json.loads(out)["results"]
        self.assertTrue(first.get("error") == "the server has ended" or first["figures"]["lost bytes"] > 0, first)
        self.assertEqual([row["error"].partition(" at ")[0] for row in others], ["no gaffer answers"] * 2)

    def test_an_interrupt_leaves_nothing(self):
        server, endpoint = self.given()
        for signum in signal.SIGINT, signal.SIGTERM:
            run = subprocess.Popen([PYTHON, "-W", "error", self.FILE, "--fan-out", "3", "--seconds", "600", "--quiet", *endpoint],
                                   env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            with run:
                self.wait_for_lines(server)
                run.send_signal(signum)
                _, err = run.communicate(timeout=TIMEOUT)
            self.assertEqual((run.returncode, err), (130, b"loadtest: interrupted\n"))
            self.assertEqual(server.ok("GET", "/processes"), [])
        self.assertEqual((server.stop(), server.stderr), (0, ""))

    def test_counts_payload_wherever_it_is_cut(self):
        names, data = self.names(), [b"x" * size for size in (1, 125, 126, 300, 70000)]
        for parse, encode in ((names["chunk_header"], gaffer.chunk), (names["frame_header"], lambda part: gaffer.frame(2, part))):
            stream = b"".join(map(encode, data))
            for size in 1, 2, 7, 100, 65536, len(stream):
                payload = names["Payload"](parse)
                for place in range(0, len(stream), size):
                    payload.feed(memoryview(stream)[place:place + size])
                self.assertEqual(payload.count, sum(map(len, data)))
                self.assertTrue(stream.endswith(payload.tail) and payload.tail)

    def test_knows_the_size_of_an_event_stream(self):
        size_of, encoder = self.names()["sse_size"], gaffer.SseEncoder("stdout", "abc")
        for lines in 1, 2, 100, 101, 1234:
            for size in 1, 64, 100:
                data = (b"x" * (size - 1) + b"\n") * lines
                self.assertEqual(size_of(lines, size, "abc"), 1 + len(encoder.encode(data, 0, None, gaffer.NORMAL, 10 ** 6)[0]))

    def test_a_sample_sees_what_is_missing_twice_or_late(self):
        sample_of = self.names()["Sample"]

        def line(number):
            return b"id: 1@e\nevent: stdout\ndata: %010d %018d %s\n\n" % (number, 1000 + number, b"x" * 69)
        dropped = b'id: 9@e\nevent: dropped\ndata: {"bytes": 300}\n\n'
        for blocks, disorder, lost in (((0, 1, 2, 3), 0, 0), ((0, 1, 3), 1, 0), ((0, 1, 1, 2), 1, 0), ((1, 0), 2, 0), ((0, dropped, 4), 1, 300)):
            for whole in False, True:
                sample, data = sample_of(b"\n\n"), [line(part) if isinstance(part, int) else part for part in blocks]
                for part in [b"".join(data)] if whole else data:
                    sample.look(part[:50], 5000)
                    sample.look(part[50:], 6000)
                self.assertEqual((min(sample.disorder, 1), sample.dropped), (min(disorder, 1), lost), blocks)
                self.assertEqual(sample.latencies[0], 5000 - blocks[0])

    def test_a_fault_of_any_round_is_one_of_the_row(self):
        names = self.names()
        for faults, faulty in (((0, 0, 0), False), ((0, 2, 0), True)):
            row = {"notes": [], "rounds": [{"p50 ms": 1.0, "lost": fault} for fault in faults]}
            names["conclude"](row, row, ())
            self.assertEqual((row["figures"], names["faulty"](row)), ({"p50 ms": 1.0, "lost": max(faults)}, faulty))
        self.assertTrue(names["faulty"]({"figures": {}, "error": "it failed", "missing": False}))
        self.assertFalse(names["faulty"]({"figures": {}, "error": "not installed", "missing": True}))


# --------------------------------------------------------------------------------------------------------------------
# chaos: everything at once, at random, and then the books
# --------------------------------------------------------------------------------------------------------------------
CHAOS = {"seconds": 2.0, "seed": 20}            # --chaos SECONDS, --seed N
CHAOS_LINE = b"%08d\n"                          # all that children write: the content of a stream follows from the offset
CHAOS_CHILDREN = {
    "writer": """
        import os, sys, time
        n, speed = 0, int(sys.argv[1])
        while n < int(sys.argv[2]):
            data = b"".join(b"%08d\\n" % number for number in range(n, n + speed))
            while data: data = data[os.write(1, data):]
            n += speed
            time.sleep(0.01)
        """,
    "stubborn": """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(1, b"00000000\\n00000001\\n")
        if os.fork() == 0: time.sleep(1000)
        while True: time.sleep(1000)
        """,
    "parent": """
        import os, time
        os.write(1, b"00000000\\n")
        if os.fork() == 0: time.sleep(1000)
        time.sleep(0.2)
        os._exit(3)
        """,
    "extra": """
        import os
        while True:
            data = os.read(3, 65536)
            if not data: break
            while data: data = data[os.write(3, data):]
        """,
}


def chaos_bytes(start, end):
    """What a stream holds from offset `start` to `end`."""
    lines = b"".join(CHAOS_LINE % number for number in range(start // 9, end // 9 + 1))
    return lines[start % 9:start % 9 + end - start]


class ChaosReaders:
    """Reads streams, each on a thread of its own, and checks every byte: delivered, or dropped and told, or still to come."""

    def __init__(self, port, chance):
        self.port, self.chance = port, chance
        self.faults, self.open = [], {}         # open: thread -> its socket
        self.hurry = threading.Event()          # from here on, nobody reads slowly
        self.books = dict.fromkeys(("delivered", "dropped", "cut", "readers", "resumed", "typed"), 0)
        self._lock = threading.Lock()

    def start(self, kind, target):
        """A new reader of pid or name `target`."""
        sock = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        slow = self.chance.random() < 0.3 and kind != "longpoll"
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        thread = threading.Thread(target=self._run, args=(kind, target, sock, slow), name="chaos %s %s" % (kind, target))
        with self._lock:
            self.open[thread] = sock
            self.books["readers"] += 1
        thread.start()

    def _run(self, kind, target, sock, slow):
        file = sock.makefile("rb", 512 if slow else -1)
        try:
            getattr(self, "_" + kind)(target, sock, file, (lambda: self.hurry.wait(0.002)) if slow else (lambda: None))
        except (OSError, EOFError):
            self.count(cut=1)                   # the test has dropped it, or the server has: told by the end
        except Exception as error:
            self.faults.append("%s of %s: %s" % (kind, target, repr(error)[:500]))
        finally:
            file.close()
            sock.close()
            with self._lock:
                self.open.pop(threading.current_thread(), None)

    def count(self, **more):
        """Enter into the books."""
        with self._lock:
            for name, number in more.items():
                self.books[name] += number

    def drop(self, how):
        """End one of them from this side."""
        with self._lock:
            if self.open:
                sock = self.chance.choice(list(self.open.values()))
                with contextlib.suppress(OSError):
                    if how == "reset":
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.shutdown(socket.SHUT_WR if how == "half" else socket.SHUT_RDWR)

    @staticmethod
    def line(file):
        """One line; EOFError at the end."""
        line = file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    def ask(self, sock, file, path, *headers):
        """(status, headers) of a GET."""
        sock.sendall("\r\n".join(("GET %s HTTP/1.1" % path, "Host: localhost", *headers, "", "")).encode())
        status = int(self.line(file).split()[1])
        return status, http.client.parse_headers(file)

    def body(self, file, headers):
        """The body of an answer with a length."""
        data = file.read(int(headers["Content-Length"] or 0))
        if len(data) < int(headers["Content-Length"] or 0):
            raise EOFError
        return data

    def same(self, place, data):
        """Check what was delivered at an offset. Returns the offset behind it."""
        assert data == chaos_bytes(place, place + len(data)), "at %d came %r" % (place, data[:60])
        self.count(delivered=len(data))
        return place + len(data)

    def _longpoll(self, pid, sock, file, pause):
        place = 0
        for _ in range(20):
            status, headers = self.ask(sock, file, "/streams/%s/stdout?since=%d&timeout=0.3" % (pid, place))
            if status == 404:
                break
            assert status in (200, 204), status
            data = self.body(file, headers) if status == 200 else b""
            dropped = int(headers["Gaffer-Dropped"] or 0)
            self.count(dropped=dropped)
            place = self.same(place + dropped, data)
            assert int(headers["Gaffer-Offset"]) == place, (headers["Gaffer-Offset"], place)

    def _chunks(self, file, pause):
        """Each chunk; last the trailer, as a dict."""
        while True:
            size = int(self.line(file), 16)
            if size == 0:
                break
            data = b""
            while len(data) < size:
                more = file.read1(min(size - len(data), 65536))
                if not more:
                    raise EOFError
                data += more
                pause()
            assert self.line(file) == b"\r\n"
            yield data
        yield dict(http.client.parse_headers(file))

    def _continuous(self, pid, sock, file, pause, label="stdout"):
        status, headers = self.ask(sock, file, "/streams/%s/%s?feed=continuous&since=0" % (pid, label))
        if status == 200:
            place = int(headers["Gaffer-Offset"])
            for data in self._chunks(file, pause):
                place = place if isinstance(data, dict) else self.same(place, data)

    def _custom(self, pid, sock, file, pause):
        self._continuous(pid, sock, file, pause, "extra")

    def _skip(self, pid, sock, file, pause):
        status, headers = self.ask(sock, file, "/streams/%s/stdout?feed=continuous&since=0&loss=skip" % pid)
        if status == 200:
            taken, last = 0, b""
            for data in self._chunks(file, pause):
                if isinstance(data, dict):
                    dropped = int(data.get("Gaffer-Dropped", 0))
                    whole = re.search(rb"([0-9]{8})\n([0-9]{0,8})\Z", last)
                    if whole:                   # the last line tells where the stream has ended
                        end = 9 * (int(whole.group(1)) + 1) + len(whole.group(2))
                        assert taken + dropped == end, (headers["Gaffer-Offset"], taken, dropped, end, last)
                    self.count(dropped=dropped, delivered=taken)
                else:
                    taken, last = taken + len(data), (last + data)[-40:]

    def _block(self, pid, sock, file, pause):
        status, headers = self.ask(sock, file, "/streams/%s/stdout?feed=continuous&since=0&loss=block" % pid)
        if status == 200:
            place = int(headers["Gaffer-Offset"])
            for data in self._chunks(file, pause):
                place = place if isinstance(data, dict) else self.same(place, data)

    def _events(self, sock, file, pause, path, *headers):
        status, _ = self.ask(sock, file, path, *headers)
        if status != 200:
            return
        parts = (part for part in self._chunks(file, lambda: None) if isinstance(part, bytes))
        for event in sse_events(part_lines(parts)):
            yield event
            pause()

    def _sse(self, pid, sock, file, pause, place=0, *headers):
        most = self.chance.randrange(1, 3000)
        for event in self._events(sock, file, pause, "/streams/%s/stdout?feed=eventsource&since=%d" % (pid, 0), *headers):
            if event.get("event") == "dropped":
                bytes_ = json.loads(event["data"])
                assert not bytes_.get("restarted"), event
                place += bytes_["bytes"]
                self.count(dropped=bytes_["bytes"])
                continue
            end = int(event["id"].partition("@")[0].rstrip("x"))
            if event["event"] == "exit":
                assert end == place, (event, place)
                continue
            data = event["data"].encode()
            assert end - place in (len(data), len(data) + 1), (event, place)
            place = self.same(place, data + b"\n" * (end - place - len(data)))
            most -= 1
            if most == 0 and not headers:       # a reconnect: no gap, no repeat
                self.count(resumed=1)
                sock.close()
                with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as again, again.makefile("rb") as more:
                    with self._lock:
                        self.open[threading.current_thread()] = again
                    return self._sse(pid, again, more, lambda: None, place, "Last-Event-ID: " + event["id"])
        return None

    def _merged(self, name, sock, file, pause):
        place = None
        for event in self._events(sock, file, pause, "/streams/%s/stdout?feed=eventsource&tail=all" % name):
            if event.get("event") == "dropped":
                lost = json.loads(event["data"])["bytes"]
                place = None if place is None else place + lost
                self.count(dropped=lost)
                continue
            end, data = int(event["id"].partition("@")[0].rstrip("x")), event["data"]
            assert re.fullmatch("[0-9]{0,8}", data), event
            assert place is None or end - place in (len(data), len(data) + 1), (event, place)
            self.count(delivered=end - place if place is not None else len(data))
            place = end

    def _websocket(self, pid, sock, file, pause):
        status, _ = self.ask(sock, file, "/wstreams/%s?type=binary&readonly=true&since=0" % pid, "Upgrade: websocket",
                             "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==")
        place = 0
        while status == 101:
            head = file.read(2)
            if len(head) < 2:
                raise EOFError
            size = head[1]
            if size >= 126:
                size = int.from_bytes(file.read(2 if size == 126 else 8), "big")
            data = file.read(size)
            if len(data) < size:
                raise EOFError
            pause()
            if head[0] & 15 == 8:
                code = int.from_bytes(data[:2], "big")
                assert code in (1000, 1001, 1013), data
                self.count(dropped=int(data.split()[-1]) if code == 1013 else 0)
                break
            place = self.same(place, data)

    def _watch(self, name, sock, file, pause):
        last = 0
        for event in self._events(sock, file, pause, "/watch?feed=eventsource"):
            if event.get("event") != "dropped":
                number = int(event["id"].partition("@")[0])
                assert number > last, event
                last = number

    def _stats(self, name, sock, file, pause):
        for _ in self._events(sock, file, pause, "/stats?feed=eventsource&interval=0.1"):
            pass


class Chaos(CliCase):
    """All of it at random, under a seed. Then the books: processes, bytes, threads, descriptors, children, memory."""

    quick = False

    PROGRAM = """if True:
        import ctypes, gc, signal, sys
        sys.path[0] = %r
        import gaffer

        path = sys.argv.pop()

        class Info(ctypes.Structure):           # mallinfo2(3), glibc 2.33
            _fields_ = [("field%%d" %% number, ctypes.c_size_t) for number in range(10)]

        def measure(signum, frame):
            gc.collect()
            library = ctypes.CDLL(None)
            if hasattr(library, "mallinfo2"):
                library.mallinfo2.restype = Info
                info = library.mallinfo2()
                with open(path, "w") as file:
                    file.write(str((info.field7 + info.field4) // 1024))    # in the heap, and mapped
        signal.signal(signal.SIGURG, measure)
        sys.exit(gaffer.main())"""

    READERS = ("longpoll", "continuous", "custom", "skip", "block", "sse", "sse", "websocket", "merged", "watch", "stats")

    @property
    def patience(self):
        """See Case."""
        return 2 * CHAOS["seconds"] + Case.patience

    def test_chaos(self):
        seconds, seed = CHAOS["seconds"], CHAOS["seed"]
        self.chance = random.Random(seed)
        self.journal = []
        self.mark = "chaos-%d-%d" % (os.getpid(), seed)
        self.memory = os.path.join(self.folder(), "memory")
        command = [PYTHON, "-c", self.PROGRAM % HERE, "serve", "--bind", "127.0.0.1:0", "--window", "65536", self.memory]
        self.server = self.run_program(command, env=dict(self.env, PYTHONMALLOC="malloc"))
        first = self.state()
        try:
            self.books = self.round(min(10.0, seconds / 3), 0)
            while int(self.last_event.partition("@")[0]) < gaffer.EVENTS_KEPT + 100:    # the log of events is full from here on
                self.server.ok("POST", "/processes", {"name": "x", "cmd": "true", "start": False})
                self.server.ok("DELETE", "/processes/x")
                self.last_event = self.server.ok("GET", "/watch/delete?since=%s" % self.last_event)["id"]
            until(lambda: self.state()[:2] == first[:2], "the end of all connections")
            before = self.state()
            self.books = self.round(seconds, 1)
            self.same_state(before)
            self.assertEqual(self.server.stop(), 0)
            self.server.expect_stderr(r"WARNING \S+: (exit \(.*\)|flap|stop: it gave up.*)$")
        except BaseException:
            print("\nchaos: seed %d, %g seconds; the last actions:" % (seed, seconds), *self.journal[-30:], sep="\n  ")
            raise
        if seconds > 10:
            print("chaos: seed %d, %g seconds: %s; state before and after %s %s" % (
                seed, seconds, self.books, before, self.after))

    def state(self):
        """(threads, descriptors, children, KiB of memory in use) of the server: what the allocator keeps is not in use."""
        pid = self.server.process.pid
        self.server.process.send_signal(signal.SIGURG)
        self.server.request("GET", "/ping")
        status = dict(re.findall(r"(\w+):\s+(\d+)", cli_read("/proc/%d/status" % pid)))
        memory = cli_read(self.memory) if os.path.exists(self.memory) else status["VmRSS"]
        return int(status["Threads"]), len(os.listdir("/proc/%d/fd" % pid)), gaffer.ProcfsTable().children(pid), int(memory)

    def same_state(self, before):
        """No thread, descriptor, child or two megabytes more than before."""
        def same():
            self.after = self.state()
            return self.after[:3] == before[:3] and self.after[3] - before[3] < 2048
        try:
            until(same, "the end of all", 10)
        except AssertionError:
            folder = "/proc/%d/fd" % self.server.process.pid
            self.assertEqual(self.after, before, [os.readlink(os.path.join(folder, name)) for name in os.listdir(folder)])

    def marked(self):
        """OS pids of all descendants that were ever started, by their environment."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open("/proc/%s/environ" % name, "rb") as file:
                if self.mark.encode() in file.read() and alive(int(name)):
                    found.append(int(name))
        return found

    def ask(self, method, path, body=None, good=(200,)):
        """The value of a request on a connection that is kept; its status has to be one of `good`."""
        self.journal.append("%s %s %s" % (method, path, str(body)[:100] if body else ""))
        self.connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body)
        answer = self.connection.getresponse()
        data = answer.read()
        self.assertIn(answer.status, good, (self.journal[-1], data))
        self.count_of_actions += 1
        return json.loads(data) if data and answer.status == 200 else None

    def round(self, seconds, number):
        """Chaos for so long; returns the books."""
        self.count_of_actions, self.written = 0, {}
        self.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        self.readers = ChaosReaders(self.server.port, self.chance)
        events, ended = [], threading.Event()
        last = self.server.request("GET", "/watch?since=0&timeout=0")
        since = self.last_event if number else "0"
        feed = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=4 * TIMEOUT)
        feed.request("GET", "/watch?feed=continuous&since=%s" % since)
        stream = feed.getresponse()
        self.assertEqual((last[0] in (200, 204), stream.status), (True, 200))

        def take():
            for line in stream:
                events.append(json.loads(line))
                if events[-1]["event"] == "create" and events[-1]["name"] == "end%d" % number:
                    break
            ended.set()
        taker = threading.Thread(target=take)
        taker.start()
        actions = [getattr(self, name) for name in dir(self) if name.startswith("do_")]
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and not self.readers.faults:
                self.chance.choice(actions)()
            for name in self.ask("GET", "/processes"):
                self.ask("DELETE", "/processes/" + name)
            until(lambda: not self.marked() and not gaffer.ProcfsTable().children(self.server.process.pid), "the end of all processes, and that the server has seen it")
            self.ask("POST", "/processes", {"name": "end%d" % number, "cmd": "true", "start": False})
            self.assertTrue(ended.wait(TIMEOUT), "the watcher sees the end")
            self.ask("DELETE", "/processes/end%d" % number)
            self.last_event = events[-1]["id"]
        finally:
            self.end_readers()
            feed.close()
            stream.close()
            taker.join()
            self.connection.close()
        self.assertEqual(self.readers.faults, [])
        return dict(self.account(events), actions=self.count_of_actions, **self.readers.books)

    def end_readers(self):
        """Those that end have ended by themselves: their streams have; the others are dropped."""
        for thread in tuple(self.readers.open):
            if "watch" in thread.name or "stats" in thread.name:
                with contextlib.suppress(OSError, KeyError):
                    self.readers.open[thread].shutdown(socket.SHUT_RDWR)
        self.readers.hurry.set()
        deadline = time.monotonic() + TIMEOUT
        for thread in tuple(self.readers.open):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.readers.faults.append("%s did not end with its stream" % thread.name)
                with contextlib.suppress(OSError, KeyError):
                    self.readers.open[thread].shutdown(socket.SHUT_RDWR)
                thread.join()

    def account(self, events):
        """Every event once and in order; every process spawned once and gone once."""
        numbers = [int(event["id"].partition("@")[0]) for event in events if event["event"] != "dropped"]
        self.assertEqual([event for event in events if event["event"] == "dropped"], [])
        self.assertEqual(numbers, list(range(numbers[0], numbers[0] + len(numbers))))
        spawned = [event["pid"] for event in events if event["event"] == "spawn"]
        exited = [event["pid"] for event in events if event["event"] == "exit"]
        self.assertEqual(len(set(spawned)), len(spawned))
        self.assertEqual(sorted(spawned), sorted(exited))
        return {"events": len(events), "spawned": len(spawned), "exited": len(exited)}

    # what may happen

    def any_name(self):
        return "t%d" % self.chance.randrange(6)

    def any_pid(self):
        """A running pid, or 0."""
        pids = self.ask("GET", "/processes?running=true")
        return self.chance.choice(pids) if pids else 0

    def template(self):
        """The fields of a random template."""
        chance = self.chance
        kind = chance.choice(["writer"] * 4 + ["cat"] * 3 + ["stubborn", "parent", "dies", "extra"])
        info = {"env": {"CHAOS": self.mark}, "numprocesses": chance.choice((1, 1, 2, 3)), "graceful_timeout": 0.2}
        if kind == "cat":
            info.update(cmd="cat", redirect_input=True)
        elif kind == "dies":
            info.update(cmd="sh -c 'exit %d'" % chance.randrange(256))
            if chance.random() < 0.5:
                info["flapping"] = {"attempts": 2, "window": 1.0, "retry_in": 0.2, "max_retry": 2}
        else:
            info.update(python(CHAOS_CHILDREN[kind]))
            info["args"] = info["args"] + [str(chance.choice((1, 10, 100, 3000))), str(chance.choice((10, 1000, 10 ** 7)))]
            info["custom_streams"] = ["extra"] if kind == "extra" else []
        return info

    def do_add(self):
        self.ask("POST", "/processes", dict(self.template(), name=self.any_name(), start=self.chance.random() < 0.9), (200, 409))

    do_add_more = do_add

    def do_update(self):
        self.ask("PUT", "/processes/" + self.any_name(), self.template(), (200, 404))

    def do_delete(self):
        if self.chance.random() < 0.5:
            self.ask("DELETE", "/processes/" + self.any_name(), None, (200, 404))

    def do_scale(self):
        self.ask("POST", "/processes/%s/%s/%d" % (self.any_name(), self.chance.choice(("_add", "_sub")),
                                                  self.chance.randrange(1, 3)), None, (200, 404))
        for name in self.ask("GET", "/processes"):      # not too many of them
            number = (self.ask("GET", "/status/" + name, None, (200, 404)) or {}).get("numprocesses", 0)
            if number > 4:
                self.ask("POST", "/processes/%s/_sub/%d" % (name, number - 2), None, (200, 404))

    def do_act(self):
        action = self.chance.choice(("_start", "_stop", "_restart", "_start", "_restart?wait=2", "_stop?wait=2"))
        self.ask("POST", "/processes/%s/%s" % (self.any_name(), action), None, (200, 404, 504))

    def do_kill_from_outside(self):
        pid = self.any_pid()
        info = pid and self.ask("GET", "/processes/%d" % pid, None, (200, 404))
        if info:
            with contextlib.suppress(ProcessLookupError):
                os.kill(info["os_pid"], self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)))

    def do_signal(self):
        self.ask("POST", "/processes/%d/_signal/%s%s" % (self.any_pid(), self.chance.choice(("TERM", "9", "SIGINT", "CONT")),
                                                         self.chance.choice(("", "?group=true"))), None, (200, 404))

    def do_stop_pid(self):
        self.ask("DELETE", "/processes/%d" % self.any_pid(), None, (200, 404))

    def do_write(self):
        """Numbered lines to what sends them back: its output is checked like any other."""
        pid, number = self.any_pid(), self.chance.choice((1, 100, 10000, 100000))
        info = pid and self.ask("GET", "/processes/%d" % pid, None, (200, 404))
        start = self.written.get(pid, 0)
        if info and (info["cmd"] == "cat" or info["custom_streams"]) and start is not None:
            label = "stdin" if info["cmd"] == "cat" else "extra"
            status = (200, 403, 404, 503)
            if self.ask("POST", "/streams/%d/%s" % (pid, label), chaos_bytes(9 * start, 9 * (start + number)), status):
                self.written[pid] = start + number

    do_write_more = do_write

    def do_write_by_websocket(self):
        """The same, each line a message, and wait for the last one to come back: only then it is known where the next one goes."""
        pid, number = self.any_pid(), self.chance.choice((1, 100, 1000))
        info = pid and self.ask("GET", "/processes/%d" % pid, None, (200, 404))
        start = self.written.get(pid, 0)
        if not info or info["cmd"] != "cat" or start is None:
            return
        self.journal.append("write %d lines to %d by websocket" % (number, pid))
        self.count_of_actions += 1
        self.written[pid], end = None, chaos_bytes(9 * (start + number - 1), 9 * (start + number))
        with contextlib.closing(WebSocket(self.server.port, "/wstreams/%d?type=binary" % pid)) as made:
            if made.status != 101:
                return self.assertIn(made.status, (403, 404))
            lines = (WebSocket.encode(2, CHAOS_LINE % line) for line in range(start, start + number))
            data, opcode = b"", 2
            made.sock.settimeout(0.5)           # it may have been stopped
            with contextlib.suppress(OSError):
                made.sock.sendall(b"".join(lines))
                while opcode == 2 and data[-9:] != end:
                    opcode, more = made.read()
                    data += more if opcode == 2 else b""
        if data[-9:] == end:
            self.written[pid] = start + number
            self.assertEqual(data, chaos_bytes(9 * (start + number) - len(data), 9 * (start + number)))
            self.readers.count(delivered=len(data), typed=9 * number)
        return None

    def do_end_stdin(self):
        if self.chance.random() < 0.3:
            self.ask("DELETE", "/streams/%d/stdin" % self.any_pid(), None, (200, 403, 404))

    def do_read(self):
        if len(self.readers.open) < 12:
            kind = self.chance.choice(self.READERS)
            target = self.any_name() if kind == "merged" else self.any_pid()
            self.journal.append("read %s %s" % (kind, target))
            self.readers.start(kind, target)

    do_read_more = do_read_again = do_read

    def do_drop(self):
        how = self.chance.choice(("reset", "close", "half"))
        self.journal.append("drop a reader: " + how)
        self.readers.drop(how)

    def do_flood(self):
        """Many requests at once, of which not all answers are taken; or a piece of one, then a reset."""
        data = self.chance.choice((
            b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, b"GET /stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3,
            b"POST /streams/1/stdin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf of it",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n\x81\x82", os.urandom(500),
            b"GET /watch HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST /processes HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"))
        self.journal.append("flood %r" % data[:40])
        with socket.create_connection(("127.0.0.1", self.server.port), TIMEOUT) as sock:
            sock.sendall(data[:self.chance.randrange(1, len(data) + 1)])
            end = self.chance.choice(("reset", "close", "half"))
            if end == "half":
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(0.05)
                with contextlib.suppress(OSError):
                    while sock.recv(65536):
                        pass
            elif end == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def do_reconnect(self):
        self.connection.close()


class Structure(Case):
    """gaffer.py as a text: what it promises to its reader."""

    @classmethod
    def setUpClass(cls):
        cls.source = cli_read(CLI_FILE)
        cls.tree = ast.parse(cls.source)
        cls.readme = cli_read(os.path.join(HERE, "README.md"))
        cls.tests = "".join(cli_read(os.path.join(HERE, name)) for name in sorted(os.listdir(HERE))
                            if re.match(r"t\w*_\w+\.py\Z", name))

    @classmethod
    def codes(cls, code):
        """A code object and all those inside it."""
        yield code
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                yield from cls.codes(constant)

    @classmethod
    def uses(cls, code):
        """Names of the module that a statement looks up, now or later; not those that a class body has bound itself."""
        for inner in cls.codes(code):
            steps = list(dis.get_instructions(inner))
            own = {step.argval for step in steps if step.opname == "STORE_NAME" and inner is not code}
            for step in steps:
                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS") and step.argval not in own:
                    yield step.argval

    @staticmethod
    def binds(code):
        """Names that a statement binds in the module."""
        return {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_NAME", "STORE_GLOBAL")}

    def down(self, tree):
        """["name at line"] of what is used above the statement that binds it."""
        bound, found = set(dir(builtins)) | {"__name__", "__file__", "__annotations__"}, []
        for statement in tree.body:
            code = compile(ast.Module([statement], []), "gaffer.py", "exec")
            bound |= self.binds(code)           # a function may call itself
            found += ["%s, used at line %d" % (name, statement.lineno) for name in sorted(set(self.uses(code)) - bound)]
        return found

    def test_names_point_up_only(self):
        self.assertEqual(self.down(self.tree), [])

    def test_the_test_of_names_finds_what_points_down(self):
        wrong = ("def f():\n    return lambda: later\n"
                 "class C:\n    x = 1\n    y = x\n    def m(self): return D\n"
                 "later = 1\nclass D: pass\n")
        self.assertEqual(self.down(ast.parse(wrong)), ["later, used at line 1", "D, used at line 3"])

    def test_imports_are_of_the_standard_library(self):
        names = {alias.name for node in ast.walk(self.tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)}
        self.assertIn("json", names)
        code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
        run = subprocess.run([PYTHON, "-I", "-S", "-c", code, *sorted(names)], stdout=subprocess.PIPE, check=True,
                             timeout=TIMEOUT)
        self.assertEqual(run.stdout, b"[]\n", "-I -S: nothing else can be found")

    def test_import_has_no_side_effect(self):
        code = """
            import os, signal, sys, threading, logging, socket
            def state():
                return (threading.active_count(), sorted(os.listdir("/proc/self/fd")), sys.path[:], dict(os.environ),
                        [signal.getsignal(number) for number in range(1, 32)], logging.root.handlers, logging.root.level,
                        os.getcwd(), sys.excepthook, socket.getdefaulttimeout(), threading.stack_size())
            before = state()
            import gaffer
            assert state() == before, (before, state())
            """
        run = subprocess.run([PYTHON, "-W", "error", "-X", "dev", "-c", textwrap.dedent(code)], cwd=HERE,
                             env=cli_environment(PYTHONDONTWRITEBYTECODE="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             timeout=TIMEOUT, check=False)
        self.assertEqual((run.returncode, run.stdout), (0, b""))

    def test_what_is_public_has_a_docstring(self):
        for name in gaffer.__all__:
            value = getattr(gaffer, name)
            self.assertTrue(value.__doc__, name)
            for method, function in vars(value).items() if isinstance(value, type) else ():
                if not method.startswith("_") and callable(function):
                    self.assertTrue(function.__doc__, "%s.%s" % (name, method))

    def test_every_section_of_the_map_is_there_in_its_order(self):
        listed = re.findall(r"^    ([a-z]+(?: [A-Za-z]+|, errors)*?) {2,}[a-zA-Z]", gaffer.__doc__, re.M)
        banners = re.findall(r"^# -{90,}\n# (.+)\n#\n", self.source, re.M)
        self.assertGreater(len(banners), 10)
        self.assertEqual([name for name in listed if name in banners], banners)

    def readme_routes(self):
        """{(method, path)} of the README's table, where `/_stop` behind another path is short for a full one."""
        found, base = set(), ""
        for row in re.findall(r"^\| (`(?:GET|POST|PUT|DELETE)[^|]*)\|", self.readme, re.M):
            methods, path = [], None
            for word in re.sub(r"[`,]", " ", row).split():
                if word in gaffer.METHODS:
                    methods, path = methods * (path is None) + [word], None
                else:
                    base = (path or base).partition("/_")[0] if word.startswith("/_") and len(methods) and found else ""
                    path = base = base + word if word.startswith("/_") and word != "/_reload" else word
                    found |= {(method, re.sub("<.*?>", "<>", path)) for method in methods}
        return found

    def test_every_route_is_in_the_readme_and_in_a_test(self):
        shown = self.readme_routes()
        for path, methods in gaffer.ROUTES:
            parts = re.split(r"(<[^>]*>)", path)
            used = "".join(r"[^/\s\"'?]+" if part.startswith("<") else re.escape(part) for part in parts)
            with self.subTest(path=path):
                for method in set(methods) - {"*"}:         # "*": what decides where it cannot be told beforehand
                    self.assertIn((method, re.sub("<.*?>", "<>", path)), shown)
                self.assertTrue(re.search(r"[\"'/ ]" + used + r"[\"'?/\s]", self.tests), "no test asks for it")

    def test_every_option_of_a_template_is_in_a_test(self):
        for name in gaffer.OPTIONS:
            self.assertTrue(re.search(r"\b%s\b" % name, self.tests), name)

    @staticmethod
    def serve_options():
        """The long options of serve, and -v."""
        return [option for action in gaffer.make_parser("serve")._actions for option in action.option_strings
                if option not in ("-h", "--help")]

    def test_every_option_of_serve_is_in_a_test(self):
        options = self.serve_options()
        self.assertIn("--bind", options)
        for option in options:
            with self.subTest(option=option):
                self.assertTrue('"%s"' % option in self.tests, "no test gives it")


# --------------------------------------------------------------------------------------------------
# the runner: shares of the tests, each in a process of its own
# --------------------------------------------------------------------------------------------------
SECONDS_FILE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                            "gaffer-tests.json")        # {test: seconds it took}
GUESS = {"Pure": 0.05, "Http": 0.1, "Streams": 0.15, "": 0.5}   # or, if it is not there
SHARE_SECONDS = 3.0                     # a class that takes longer is divided


class Result(unittest.TestResult):
    """In a share's process: writes a line of JSON as each test begins, and one as it ends. What takes
    longer than its limit, within a test or between two, ends the process with all its stacks."""

    def __init__(self, file):
        super().__init__()
        self._file = file
        self._faults = 0
        self.between("the class", Case.patience)

    def tell(self, **values):
        """Write a line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def between(self, what, patience):
        """Something begins that may take so many seconds."""
        faulthandler.dump_traceback_later(patience, exit=True)
        self.tell(began=what, patience=patience)

    def ended(self, what, **values):
        """Something has ended: tell its faults."""
        faults = self.errors + self.failures
        new, self._faults = faults[self._faults:], len(faults)
        skipped, self.skipped = self.skipped, []
        if new or skipped or values:
            self.tell(ended=what, skipped=["%s: %s" % (test.id(), why) for test, why in skipped],
                      fault="\n".join("%s\n%s" % (test, text) for test, text in new), **values)

    def startTest(self, test):
        super().startTest(test)
        self.ended("the class")         # its setUpClass, if that has failed
        self.between(test.id().partition(".")[2], test.patience)
        self._began = time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        self.ended(test.id().partition(".")[2], seconds=round(time.monotonic() - self._began, 3))
        self.between("the class", Case.patience)


class Share:
    """A class of tests, or a part of one, in a process and a process group of its own. They wait most
    of their time, so several run at once."""

    def __init__(self, tests):
        self.tests = tests              # ["Class.test"]
        self.names = list(dict.fromkeys(test.partition(".")[0] for test in tests))
        self.doing = "its start"
        self.ran = []                   # the lines of the tests that have ended
        self.faults, self.failed = [], []       # texts; the tests or classes that they belong to
        self.skipped = []               # texts

    def start(self):
        """Fork it."""
        self._folder = tempfile.mkdtemp(prefix="gaffer-test-")
        self._stderr = open(os.path.join(self._folder, "stderr"), "w+b", buffering=0)
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        self._text, self._ended = b"", False
        self._deadline, self._signals = time.monotonic() + Case.patience, [signal.SIGABRT]
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setpgid(0, 0)
                os.dup2(self._stderr.fileno(), 2)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
                os.close(self._pipe)
                self._stderr.close()
                self._run(os.fdopen(write, "w"))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(status)
        os.close(write)

    def _run(self, file):
        atexit._clear()                 # what the first process has to clean up is still in use
        faulthandler.enable()
        tempfile.tempdir = self._folder
        if not sys.warnoptions:
            warnings.simplefilter("error")
        FAULTS.install()
        result = Result(file)
        names = ["__main__." + name for name in self.tests]
        unittest.defaultTestLoader.loadTestsFromNames(names).run(result)
        atexit._run_exitfuncs()
        gc.collect()
        faults = FAULTS.take()
        if faults:
            result.errors.append(("outside of the tests", "\n".join(faults)))
        result.ended("the class")
        result.tell(began="the end", patience=Case.patience)

    def read(self):
        """Take the lines that have come."""
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
            if line["fault"]:
                self.fault(line["fault"], line["ended"])
            if "seconds" in line:
                self.ran.append(line)

    def fault(self, text, test=None):
        """Something is wrong in a test, or in the share."""
        self.faults.append(text)
        self.failed += [test] if test in self.tests else self.names

    def hurry(self):
        """End what does not end by itself: its group shows its stacks and aborts, then it is killed."""
        if time.monotonic() > self._deadline:
            os.killpg(self.pid, self._signals.pop() if self._signals else signal.SIGKILL)
            self._deadline = time.monotonic() + 5

    def kill(self):
        """End it and its group now."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._close()

    def over(self):
        """Whether its process has ended; then all is known of it. Whoever holds the pipe does not matter."""
        if not os.waitpid(self.pid, os.WNOHANG)[0]:
            return False
        self.read()
        if self.doing != "the end":
            self.fault("%s: the process ended in %s; %d of %d tests have run" % (
                " ".join(self.names), self.doing, len(self.ran), len(self.tests)), self.doing)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, 0)
            left = process_group(self.pid)
            if left:
                self.fault("%s: processes are left: %s" % (" ".join(self.names), left))
                os.killpg(self.pid, signal.SIGABRT)
                until(lambda: not process_group(self.pid) or os.killpg(self.pid, signal.SIGKILL))
        if self.faults:
            for path in glob.glob(os.path.join(self._folder, "**", "stderr*"), recursive=True):
                text = cli_read(path).strip()
                self.faults += ["%s:\n%s" % (os.path.basename(path), text)] if text else []
        self._close()
        return True

    def _close(self):
        os.close(self._pipe)
        self._stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def make_shares(tests, seconds):
    """Divide tests ("Class.test") into shares, the longest first."""
    def guess(test):
        ring = next((ring for ring in GUESS if test.startswith(ring)), "")
        return seconds.get(test, GUESS[ring])
    groups = {}
    for test in tests:
        name = test.partition(".")[0]
        groups.setdefault(globals()[name].share or name, []).append(test)
    shares = []
    for name, group in groups.items():
        if name in globals():
            parts = int(sum(map(guess, group)) / SHARE_SECONDS) + 1
            shares += [group[part::parts] for part in range(min(parts, len(group)))]
        else:
            shares.append(group)
    return [Share(share) for share in sorted(shares, key=lambda share: -sum(map(guess, share)))]


def run_tests(tests, jobs, slowest, verbose):
    """Run tests, `jobs` shares at a time. Returns the exit status."""
    seconds = {}
    with contextlib.suppress(FileNotFoundError), open(SECONDS_FILE) as file:
        seconds = json.load(file)
    waiting, running, done, failed = make_shares(tests, seconds), [], [], []
    began = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                share = waiting.pop(0)
                share.start()
                running.append(share)
            signal.sigtimedwait({signal.SIGCHLD}, 0.2)
            for share in list(running):
                share.read()
                share.hurry()
                if share.over():
                    running.remove(share)
                    done.append(share)
                    failed += share.failed
                    print("".join(text.rstrip("\n") + "\n\n" for text in share.faults), end="",
                          file=sys.stderr, flush=True)
    finally:
        for share in running:           # Ctrl-C, or a fault of the runner
            print("it was running %s: %s" % (" ".join(share.names), share.doing), file=sys.stderr)
            share.kill()
    if ForkServer.end():
        failed.append("ForkServer (a command was left)")
    ran = sorted((line for share in done for line in share.ran), key=lambda line: -line["seconds"])
    skipped = [line for share in done for line in share.skipped]
    for line in skipped:
        print("skipped: %s" % line)
    for line in ran if verbose else ran[:slowest]:
        print("%7.3f s %s" % (line["seconds"], line["ended"]))
    took = time.monotonic() - began
    print("Ran %d tests in %.3fs, %d skipped\n\n%s" % (
        len(ran), took, len(skipped), "FAILED: " + " ".join(dict.fromkeys(failed)) if failed else "OK"))
    seconds.update((line["ended"], line["seconds"]) for line in ran)
    os.makedirs(os.path.dirname(SECONDS_FILE), exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(SECONDS_FILE), delete=False) as file:
        json.dump(seconds, file)
    os.replace(file.name, SECONDS_FILE)
    return 1 if failed or not ran else 0


def find_tests(names):
    """["Class.test"] of all tests that `names` mean; all, if there are none. A wrong name is a SystemExit."""
    tests, load = [], unittest.defaultTestLoader.getTestCaseNames
    for name in names or [name for name, thing in globals().items()
                          if isinstance(thing, type) and issubclass(thing, unittest.TestCase)]:
        name, _, test = name.partition(".")
        case = globals().get(name)
        known = load(case) if isinstance(case, type) and issubclass(case, unittest.TestCase) else []
        if names and (test or not known) and test not in known:
            sys.exit("there is no test %s%s" % (name, test and "." + test))
        tests += [name + "." + test] if test else ["%s.%s" % (name, each) for each in known]
    return tests


def main():
    """Run all tests, or the classes and tests that are named."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="CLASS[.TEST]")
    parser.add_argument("--quick", action="store_true", help="without browsers, load test and other long ones")
    parser.add_argument("--slowest", type=int, metavar="N", default=10, help="show the N slowest tests (10)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show how long each test took")
    parser.add_argument("--jobs", type=int, default=2 * gaffer.CORES, help="processes at a time")
    parser.add_argument("--figures", action="store_true", help="what the web page costs")
    parser.add_argument("--fuzz", type=int, metavar="N", help="only PureFuzz, N cases of each kind")
    parser.add_argument("--hostile", type=int, metavar="N", help="only CliHostile, N cases of each kind")
    parser.add_argument("--chaos", type=float, metavar="SECONDS", help="only Chaos")
    parser.add_argument("--seed", help="SEED or SEED:FIRST: the same cases again")
    given = parser.parse_args()
    names = given.names
    for case, count in (PureFuzz, given.fuzz), (CliHostile, given.hostile):
        if count is not None:
            seed, _, first = (given.seed or str(random.randrange(10 ** 6))).partition(":")
            case.cases, case.seed, case.first = count, seed, int(first or 0)
            case.patience = Case.patience + count / 50
            print("%s: %d cases of each kind, seed %s" % (case.__name__, count, seed), flush=True)
            names = names or [case.__name__]
    if given.figures:
        names = names or ["BrowserFigures"]
    if given.chaos is not None:
        CHAOS.update(seconds=given.chaos, seed=int(given.seed or CHAOS["seed"]))
        names = names or ["Chaos"]
    tests = find_tests(names)
    if given.quick:
        tests = [test for test in tests if globals()[test.partition(".")[0]].quick]
    # what nohup or a script's & ignores, commands would inherit; a handler they do not
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda signum, frame: None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    ForkServer.start()
    with tempfile.TemporaryDirectory() as cache:
        CliCase.env = cli_environment(PYTHONPYCACHEPREFIX=cache)
        sys.exit(run_tests(tests, given.jobs, given.slowest, given.verbose))


if __name__ == "__main__":
    main()
