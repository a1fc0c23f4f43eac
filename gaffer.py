#!/usr/bin/env python3
"""gaffer.py - a process supervisor in one file, driven over HTTP.

    python3 gaffer.py serve
    curl localhost:5000/processes -d '{"name": "clock", "shell": true,
                                       "cmd": "while date; do sleep 1; done"}'
    curl 'localhost:5000/streams/clock/stdout?feed=continuous'

or inside a program:

    from gaffer import Manager, HttpHandler, HttpEndpoint
    manager = Manager(apps=[HttpHandler(endpoints=[HttpEndpoint("127.0.0.1:5000")])])
    manager.add_process("web", "python3 -m http.server 8000", numprocesses=2)
    manager.run()

Read the file from top to bottom; its sections are

    constants, errors    one error tree, rendered once
    platform             all that differs between systems: exits, groups, users, statistics
    loop                 selector, timers, inbox; who may touch state, and when
    streams              bounded logs of bytes and events; a reader is an offset in one
    templates            one table of options, their checks, and what is executed
    policies             backoff, flapping, stop escalation: values in, values out
    process              spawn, pipes into windows, stdin, exit, the end of the group
    manager              templates, events, reconcile: wanted beside actual
    http codec           request heads, bodies, responses, access rules, router, SSE
    websocket codec      handshake, frames, messages, close codes (RFC 6455)
    channels             connections that the loop drives: feeds, websockets, long polls
    metrics and OpenAPI  what Prometheus reads; parameters; the description of the API
    page                 the web page
    api                  the route table and its handlers
    server               endpoints, requests on threads, WSGI, the access log, HttpHandler
    client               a small wrapper of http.client
    apps                 what plugs into a Manager: HttpHandler, SigHandler, WebHooks, ConsoleOutput
    configuration        files of templates: INI, JSON, TOML, Procfiles, .env
    command line         one table of commands, argparse, main

Four rules hold everywhere:

1. Names point up the page only: a section uses what is above it.
2. One lock, the loop's, guards all state of processes, streams and timers. The loop's thread holds
   it except while it waits; another thread takes it for one short call, by loop.call(). User code
   never runs under it.
3. Protocol code is pure: bytes or values in, bytes or values out; no socket, no thread, no clock.
4. Every buffer has a limit, with a name and a reason, at the top of its section.

    threads answer requests       the loop's thread                           children
    head, body -> route, answer   manager, reconcile ------- spawn ---------> process group
    what lasts or waits --------> channel <- Reader <- Window <--- Output <-- stdout, stderr
                                  a websocket -------------------> Input ---> stdin
"""
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C ends a command at any moment, even within an import; serve, up and attach set handlers
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import array
import base64
import bisect
import codecs
import collections
import contextlib
import copy
import errno
import fcntl
import functools
import grp
import heapq
import io
import itertools
import json
import logging
import math
import pwd
import queue
import re
import resource
import select
import selectors
import shlex
import socket
import socketserver
import stat
import struct
import subprocess
import threading
import time
import types
import urllib.parse
import weakref
from http import HTTPStatus
from wsgiref.handlers import SimpleHandler, format_date_time

__version__ = "0.1.0"
__all__ = [
    "Manager", "HttpHandler", "HttpEndpoint", "SigHandler", "ConsoleOutput", "AccessLog",
    "WebHooks", "WebSocketHandler", "Request", "Response", "Loop", "GafferError", "main",
]

log = logging.getLogger("gaffer")

# --------------------------------------------------------------------------------------------------
# constants, errors
#
# Sizes are in bytes and times in seconds, everywhere. Limits are at the top of their sections, each
# with its reason. An error is raised anywhere, carries its HTTP status and code, and is rendered
# once.
# --------------------------------------------------------------------------------------------------
KIB, MIB = 1024, 1024 * 1024
READ_SIZE = 64 * KIB                            # of a socket or a pipe: what a pipe holds
SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOSPC)


class GafferError(Exception):
    """An error for the client: an HTTP status, a code, and a sentence that says what to do.

    `more`: `status`, `code` and `headers` ([(name, value)] of the response) if not the class's.
    """
    status, code = 500, "internal_error"
    headers: list = []

    def __init__(self, reason, **more):
        super().__init__(reason)
        vars(self).update(more)


class BadRequest(GafferError):
    """The request is not HTTP as RFC 9112 defines it, or it contradicts itself."""
    status, code = 400, "bad_request"


class InvalidProcessInfo(BadRequest):
    """A field of a template is unknown, missing or wrong, or its command cannot be executed."""
    code = "invalid_process_info"


class BadValue(BadRequest):
    """A parameter of the path or the query is unknown, or its value is not valid."""
    code = "bad_value"


class Forbidden(GafferError):
    """The operating system does not allow it, or a rule against pages of other sites."""
    status, code = 403, "forbidden"


class ForbiddenWrite(Forbidden):
    """The stdin of the process is not redirected, or it is closed."""
    code = "forbidden_write"


class NotFound(GafferError):
    """There is no such name, id or group."""
    status, code = 404, "not_found"


class BadEventType(NotFound):
    """There is no such type of event."""
    code = "bad_event_type"


class Conflict(GafferError):
    """The name is taken, or what was asked for can no longer happen."""
    status, code = 409, "conflict"


class TooLarge(GafferError):
    """The body is over its limit."""
    status, code = 413, "too_large"


class UriTooLong(TooLarge):
    """The request line is over its limit."""
    status, code = 414, "uri_too_long"


class HeadersTooLarge(TooLarge):
    """The headers are over their limit, in number or in bytes."""
    status, code = 431, "headers_too_large"


class UpgradeRequired(GafferError):
    """The resource is a websocket (RFC 9110 section 15.5.22, RFC 6455 section 4.4)."""
    status, code = 426, "upgrade_required"
    headers = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")]


class Busy(GafferError):
    """There are too many connections, threads or processes."""
    status, code = 503, "busy"


class StdinFull(Busy):
    """Too many bytes wait for the process to read them; nothing of the body was written."""
    code = "stdin_full"


class Stopping(Busy):
    """gaffer is stopping, and nothing can be changed any more."""
    code = "stopping"


class WaitTimeout(GafferError):
    """What a request waits for has not happened in time."""
    status, code = 504, "wait_timeout"


class StartError(Exception):
    """gaffer itself cannot start; str(error) is a sentence for its user."""


def near(word, words):
    """Return ", did you mean '…'?" with the word that is most like `word`, "" if none is."""
    if len(word) ** 2 * len(words) > 500000:    # more takes more than 30 ms, under the lock
        return ""
    import difflib                              # only for a mistake
    match = difflib.get_close_matches(word, words, 1)
    return ", did you mean '%s'?" % match[0] if match else ""


class Throttle:
    """Logs what may repeat for ever once a minute, and how often it was left out before."""

    def __init__(self, clock=time.monotonic):
        self._clock, self._next, self._left_out = clock, -math.inf, 0

    def warning(self, message, *args, level=logging.WARNING, **more):
        """Log a warning, or count it. `more`: as for log.log()."""
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        if self._left_out:
            message += " (and %d times more before)" % self._left_out
        self._next, self._left_out = now + 60.0, 0
        log.log(level, message, *args, **more)


# --------------------------------------------------------------------------------------------------
# platform
#
# The only place that asks which system this is. Linux has pidfds and /proc. Elsewhere children are
# polled, there are no statistics, and a process group is gone when it cannot be signalled.
# --------------------------------------------------------------------------------------------------
EXIT_POLL = 0.05                                # between checks of children that have no pidfd
PIPE_SIZE = 256 * KIB                           # fewer turns, fewer sleeps of the writer


def peek_exit(os_pid):
    """Return (exit_status, term_signal) of a child that has exited, None while it runs. It stays a
    zombie: that pins the number of its group until the last signal to it."""
    try:
        if not hasattr(os, "waitid"):           # macOS before Python 3.13: this reaps it
            pid, status = os.waitpid(os_pid, os.WNOHANG)
            return (os.WEXITSTATUS(status), os.WTERMSIG(status)) if pid else None
        info = os.waitid(os.P_PID, os_pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        log.warning("another part of this program took the exit status of os pid %d", os_pid)
        return 255, 0
    if info is None:
        return None
    return (info.si_status, 0) if info.si_code == os.CLD_EXITED else (0, info.si_status)


class ExitWatcher:
    """Calls `callback((exit_status, term_signal))` under the loop's lock once child `os_pid` has
    exited."""

    def __init__(self, loop, os_pid, callback):
        self._loop, self._os_pid, self._callback = loop, os_pid, callback
        self._fd = self._timer = None
        try:
            self._fd = os.pidfd_open(os_pid)    # Linux, Python 3.9
            loop.register(self._fd, selectors.EVENT_READ, self._check)
        except (AttributeError, OSError):       # an old kernel, a sandbox, no descriptor left
            if self._fd is not None:
                os.close(self._fd)
            self._schedule()

    def _schedule(self):
        # at the same times for all children: they share one turn of the loop
        self._timer = self._loop.later(EXIT_POLL - self._loop.clock() % EXIT_POLL, self._check)

    def _check(self, mask=None):
        if self._timer is not None:
            self._schedule()
        end = peek_exit(self._os_pid)
        if end is not None:
            self.close()
            self._callback(end)

    def close(self):
        if self._timer is not None:
            self._timer.cancel()
        else:
            self._loop.unregister(self._fd)
            os.close(self._fd)


def reap(os_pid):
    """Remove a zombie, if it is still there."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(os_pid, os.WNOHANG)


class ProcfsTable:
    """Processes as Linux shows them in /proc. Other systems show none."""

    EXISTS = os.path.exists("/proc/self/stat")
    TICKS = os.sysconf("SC_CLK_TCK")
    PAGE = os.sysconf("SC_PAGE_SIZE")

    @staticmethod
    def _read(os_pid, name):
        try:
            with open("/proc/%d/%s" % (os_pid, name), "rb") as file:
                return file.read()
        except OSError:                         # it is gone
            return b""

    def _stat(self, os_pid):
        """Return the fields of stat from the state on, number 3 in proc(5); [] without process."""
        return self._read(os_pid, "stat").rpartition(b")")[2].split()

    @staticmethod
    def _lives(fields):
        """Return True if these fields are of a process that lives, if only in another thread."""
        return bool(fields) and (fields[0] not in (b"Z", b"X") or int(fields[17]) > 1)

    def _listing(self):
        """Return the OS pids of all processes; none without /proc."""
        return {int(name) for name in os.listdir("/proc") if name.isdigit()} if self.EXISTS else ()

    def members(self, wanted):
        """Return {group: [OS pids]} of those process groups, from one listing."""
        found = collections.defaultdict(list)
        for os_pid in self._listing():
            try:                                # a tenth of the cost of reading all their files
                group = os.getpgid(os_pid)
            except OSError:
                continue
            if group in wanted:
                found[group].append(os_pid)
        return found

    def groups(self, wanted):
        """Return those of the process groups that have a living member; a zombie does not live."""
        if not self.EXISTS:
            return wanted
        return {group for group, os_pids in self.members(wanted).items()
                if any(self._lives(self._stat(os_pid)) for os_pid in os_pids)}

    def orphans(self, since, ours):
        """Return the OS pids of daemons, without a parent and in a session of their own, that began
        after `since` (as time.monotonic()), are not in `ours`, and are no service of systemd: those
        have a cgroup of their own."""
        if not self.EXISTS:
            return []
        boot_time = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        reapers, parent = {1}, os.getppid()
        while parent > 1:                       # one of these may take in orphans (a subreaper)
            reapers.add(parent)
            fields = self._stat(parent)
            parent = int(fields[1]) if fields else 0
        first, found = (boot_time + since) * self.TICKS - 1, []
        for os_pid in self._listing() - ours:
            fields = self._stat(os_pid)
            if (self._lives(fields) and int(fields[19]) >= first and int(fields[1]) in reapers
                    and int(fields[3]) != os.getsid(0)
                    and self._read(os_pid, "cgroup") == self._read(os.getpid(), "cgroup")):
                found.append(os_pid)
        return found

    def children(self, os_pid):
        """Return the OS pids of a process's children; [] if it is gone."""
        try:
            threads = os.listdir("/proc/%d/task" % os_pid)
        except OSError:
            return []
        return [int(child) for thread in threads
                for child in self._read(os_pid, "task/%s/children" % thread).split()]

    def usage(self, os_pid):
        """Return {cpu_time, rss, vms, nice} in seconds and bytes; {} without such a process."""
        fields = self._stat(os_pid)
        return {
            "cpu_time": (int(fields[11]) + int(fields[12])) / self.TICKS,
            "rss": int(fields[21]) * self.PAGE, "vms": int(fields[20]), "nice": int(fields[16]),
        } if fields else {}

    def sample(self, os_pid):
        """Return usage() with uid, cmdline and children, at three times the cost."""
        found = self.usage(os_pid)
        if found:
            try:
                found["uid"] = os.stat("/proc/%d" % os_pid).st_uid
            except OSError:
                return {}
            words = self._read(os_pid, "cmdline").rstrip(b"\0").replace(b"\0", b" ")
            found["cmdline"] = words.decode("utf-8", "replace")
            found["children"] = self.children(os_pid)
        return found


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def widen_pipe(fd):
    """Let a pipe hold PIPE_SIZE bytes if the system can: Linux, with a quota for each user."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):      # over the quota, or not a pipe: it works as it is
            fcntl.fcntl(fd, 1031, PIPE_SIZE)    # F_SETPIPE_SZ has its name from Python 3.10 on


def files_max():
    """Return how many descriptors this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if soft == resource.RLIM_INFINITY else soft


def network(address):
    """Return what counts as one client: an IPv4 address, or the /64 of an IPv6 address. None: this
    machine, or a unix socket."""
    if ":" in address and "." not in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
        return None if packed == b"\0" * 15 + b"\1" else packed[:8]
    address = address.rpartition(":")[2]        # ::ffff:192.0.2.1
    return None if address.startswith("127.") or not address else address


def find_user(user):
    """Return (uid, gid, name) of a user by name or number; gid and name are None without an entry.
    ValueError: there is no such user."""
    user = int(user) if isinstance(user, str) and user.isascii() and user.isdigit() else user
    try:
        entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
        return entry.pw_uid, entry.pw_gid, entry.pw_name
    except (KeyError, OverflowError):
        if isinstance(user, int) and 0 <= user < 2 ** 32 - 1:  # that means "as it is"
            return user, None, None
        raise ValueError("names the unknown user %r" % (user,)) from None


def find_group(group):
    """Return the gid of a group by name or number. Raises ValueError if there is no such group."""
    try:
        if not isinstance(group, int) and not (group.isascii() and group.isdigit()):
            return grp.getgrnam(group).gr_gid
        if 0 <= int(group) < 2 ** 32 - 1:
            return int(group)
    except KeyError:
        pass
    raise ValueError("names the unknown group %r" % (group,))


# --------------------------------------------------------------------------------------------------
# loop
#
# One selector, one heap of timers, one inbox with one wake-up byte. The loop's lock guards all
# state. The thread that runs the loop holds it for the work of a turn, but neither while it waits
# in the selector nor while it runs user code; any other thread takes it for one short call. With
# nothing to do the loop makes no system call at all.
# --------------------------------------------------------------------------------------------------
POLLS = 100                                     # polls, 50 us: websocket echo takes 40 us, not 90
SELECT_MAX = 10.0 ** 6                          # seconds: epoll counts milliseconds, in 32 bits
ERROR_PAUSE = 0.05                              # after a lack of memory, or it would fail at once


class Timer:
    """A call that is due at `when`, by the loop's clock."""

    __slots__ = ("when", "function", "args", "_loop")

    def __init__(self, loop, when, function, args):
        self._loop, self.when, self.function, self.args = loop, when, function, args

    def cancel(self):
        """Do not run the call. Does nothing if it has run or was cancelled before."""
        if self.function is not None:
            self.function, self.args = None, ()
            self._loop.pending_timers -= 1


def on_loop(method):
    """Have a method run under the lock of its `loop`, whatever thread calls it."""
    @functools.wraps(method)
    def call(self, *args, **options):
        return self.loop.call(method, self, *args, **options)
    return call


class Loop:
    """An event loop on `selectors`. `clock` returns monotonic seconds; tests pass their own."""

    loop = property(lambda self: self)          # for on_loop()

    def __init__(self, clock=time.monotonic):
        self.clock = clock
        self.now = clock()                      # when this turn, or this call, began
        self.closed = False
        self.pending_timers = 0
        self.busy = 0.0                         # seconds spent working
        self._lock, self._gate = threading.Lock(), threading.Lock()
        self._owner = None                      # the thread that holds the lock
        self._selector = selectors.DefaultSelector()
        self._callbacks = {}                    # fd -> callback(mask)
        self._timers, self._sequence = [], itertools.count()
        self._inbox, self._unlocked = collections.deque(), collections.deque()
        self._deadline = -math.inf              # when the next turn begins at the latest
        self._sleeping = True                   # True: what is due before that has to wake it
        self._woken = self._stopping = self._pausing = False
        self._polls = 0
        self._reports = collections.defaultdict(Throttle)       # one for each type of exception
        self._wake_read, self.wake_fd = os.pipe()       # a byte wakes it, see set_wakeup_fd()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self.wake_fd, False)
        self.register(self._wake_read, selectors.EVENT_READ,
                      lambda mask: os.read(self._wake_read, 4096))

    # for any thread

    def call(self, function, *args, **options):
        """Return what `function(*args, **options)` returns under the lock, which its owner may take
        again. Stopping: the loop is closed."""
        thread = threading.get_ident()
        if self._owner == thread:
            return function(*args, **options)
        with self._gate, self._lock:
            self._owner = thread
            try:
                if self.closed:
                    raise Stopping("gaffer is stopping; start it again")
                self.now = self.clock()
                return function(*args, **options)
            finally:
                self._owner = None

    def call_soon(self, function, *args):
        """Run `function(*args)` in the loop's next turn, on its thread, under the lock. Return at
        once, False if the loop is closed. A signal handler may call this, too."""
        self._inbox.append((function, args))
        if self._sleeping:
            self._wake()
        return not self.closed

    def call_unlocked(self, function, *args):
        """Do as call_soon() does, but without the lock, at the end of the turn: all user code."""
        self._unlocked.append((function, args))
        if self._sleeping:
            self._wake()
        return not self.closed

    def stop(self):
        """Let `run()` return after this turn."""
        self._stopping = True
        self._wake()

    @contextlib.contextmanager
    def interrupts(self):
        """Let a signal end a wait of `run()`, and Ctrl-C raise KeyboardInterrupt from it, between
        two calls, unless the program handles SIGINT itself. Does nothing off the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(signum, frame_):
            self.call_soon(signal.default_int_handler, signum, None)
        # a signal just before select() sleeps would be seen only after it: the descriptor wakes it
        before = signal.set_wakeup_fd(self.wake_fd, warn_on_full_buffer=False)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            if signal.getsignal(signal.SIGINT) is interrupt:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    # timers and descriptors, for any thread; their calls run under the lock

    def owned(self):
        """Return True if the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    @on_loop
    def later(self, delay, function, *args):
        """Run `function(*args)` in `delay` seconds, under the lock. Return its Timer."""
        timer = Timer(self, self.clock() + delay, function, args)
        self.pending_timers += 1
        if len(self._timers) > 64 + 2 * self.pending_timers:    # cancelled ones may be due in days
            self._timers[:] = [entry for entry in self._timers if entry[2].function is not None]
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, (timer.when, next(self._sequence), timer))
        if self._sleeping and timer.when < self._deadline:
            self._wake()
        return timer

    def expect(self):
        """Poll POLLS times before the next wait, as an answer may come sooner than a wake-up."""
        self._polls = POLLS if CORES > 1 else 0

    @on_loop
    def register(self, fd, events, callback):
        """Call `callback(mask)` whenever `fd` is ready (selectors.EVENT_READ, EVENT_WRITE)."""
        self._selector.register(fd, events, callback)
        self._callbacks[fd] = callback

    @on_loop
    def modify(self, fd, events):
        """Change what a registered `fd` is watched for."""
        self._selector.modify(fd, events, self._callbacks[fd])

    @on_loop
    def unregister(self, fd):
        """Stop watching `fd`. Do this before closing it."""
        self._selector.unregister(fd)
        del self._callbacks[fd]

    def guard(self, function, *args):
        """Return what `function(*args)` returns; if it raises, log that and return None. On the
        main thread, to which signals belong, KeyboardInterrupt and SystemExit pass."""
        try:
            return function(*args)
        except BaseException as error:
            if (isinstance(error, (KeyboardInterrupt, SystemExit))
                    and threading.current_thread() is threading.main_thread()):
                raise
            self._reports[type(error)].warning("a callback of the loop failed; the loop goes on",
                                               level=logging.ERROR, exc_info=True)
            self._pausing = self._pausing or isinstance(error, MemoryError)
            return None

    # turns

    def run(self):
        """Take turns until `stop()`. Only KeyboardInterrupt and SystemExit end it earlier."""
        try:
            while not self._stopping:
                self.step(math.inf)
        finally:
            self._stopping = False

    def step(self, timeout=0.0):
        """Take one turn, which waits `timeout` seconds at most."""
        events = self._select(timeout)
        with self._gate:                        # a thread that waits for the lock goes first
            pass
        with self._lock:
            self._owner, self._sleeping, self._woken = threading.get_ident(), False, False
            timers = self._timers
            try:
                self.now = self.clock()
                for key, mask in events:
                    # since the wait, fd may have been closed and given to something else
                    if self._callbacks.get(key.fd) is key.data:
                        self.guard(key.data, mask)
                last = next(self._sequence)     # timers that are set from now on wait for the next
                while timers and timers[0][0] <= self.now and timers[0][1] < last:
                    timer = heapq.heappop(timers)[2]
                    function, args = timer.function, timer.args
                    if function is not None:
                        timer.cancel()
                        self.guard(function, *args)
                self._run(self._inbox)
                self.busy += self.clock() - self.now
            finally:
                self._sleeping = True           # before the inbox is checked: see call_soon()
                while timers and timers[0][2].function is None:
                    heapq.heappop(timers)
                self._deadline = -math.inf if self._inbox else timers[0][0] if timers else math.inf
                self._owner = None
        self._run(self._unlocked)

    def close(self):
        """Run what was handed over before, then free the descriptors."""
        with self._gate, self._lock:
            if self.closed:
                return
            self._owner, self.closed = threading.get_ident(), True
            try:
                self._run(self._inbox)
            finally:
                self._selector.close()
                os.close(self._wake_read)
                write, self.wake_fd = self.wake_fd, None
                os.close(write)
                self._owner = None
        with contextlib.ExitStack() as calls:   # also those behind one that exits
            for function, args in reversed(self._unlocked):
                calls.callback(self.guard, function, *args)
            self._unlocked.clear()

    def _select(self, longest):
        """Wait until something is due, for `longest` seconds at most. Return what is ready."""
        if self._pausing:                       # or what has failed would fail again at once
            self._pausing = False
            time.sleep(ERROR_PAUSE)
        wait = 0 if self._unlocked else min(longest, self._deadline - self.clock(), SELECT_MAX)
        try:
            while self._polls and wait > 0:
                self._polls -= 1
                events = self._selector.select(0)
                if events:
                    return events
            return self._selector.select(max(0, wait))
        except Exception as error:              # the turn goes on: its timers need no descriptor
            self._reports[type(error)].warning("the loop cannot wait for its descriptors",
                                               level=logging.ERROR, exc_info=True)
            self._pausing = True
            return []

    def _run(self, calls):
        for _ in range(len(calls)):             # what these add is for the next turn
            function, args = calls.popleft()
            self.guard(function, *args)

    def _wake(self):
        if not self._woken:
            self._woken = True
            try:
                os.write(self.wake_fd, b"\0")
            except (TypeError, OSError):
                pass                            # full: it wakes; closed: nothing is left to wake


# --------------------------------------------------------------------------------------------------
# streams
#
# A stream is a log with a bounded window, and a reader is an offset in it. Window holds bytes and
# counts in bytes, EventLog holds events and counts them. What is encoded for one reader is kept
# until the next append and serves all readers at the same offset. A reader whose sink is full lags
# behind, at no cost; what falls out of the window before it was sent is counted and reported. All
# of this runs under the loop's lock.
# --------------------------------------------------------------------------------------------------
WINDOW_SIZE = MIB                               # some 10,000 lines of final output
WINDOW_SIZE_MIN = 256                           # a line or two
COALESCE_SIZE = 16 * KIB                        # short reads are joined: a chunk has an overhead
CARRY_SIZE = 64 * KIB                           # of an unfinished line that waits to be merged
SHARE_SIZE = 160 * KIB                          # encoded at once: a wide read and a cut line
SHARES_PER_TURN = 4                             # of one reader, so that the others get theirs
JOIN_SIZE = 8 * KIB                             # shorter data is copied behind its head
BATCH_SIZE = 16                                 # readers that are fed together
BATCH_TIME = 0.001                              # seconds of feeding before a pause, at least
BATCH_PAUSE = 0.5                               # length of a pause, as a part of that time
MEMO_MAX = 8                                    # payloads kept for other readers, until an append
PARTIAL_LINE_DELAY = 0.1                        # of silence, before a prompt is shown
EVENTS_KEPT = 1024                              # how far back events can be resumed
QUESTIONS_MAX = 64                              # POSTs to stdin that no long poll has followed yet
JOURNAL_ENTRIES = 32768                         # 1 MiB: 30 seconds of 1,000 lines a second
JOIN_TIME = 0.01                                # short reads within it are one entry of the journal
NORMAL, FLUSH, FINAL = 0, 1, 2                  # wait for more; show what there is; no more comes


def incomplete_utf8(data):
    """Return how many bytes at the end of `data` begin a character that is not whole: 0 to 3."""
    tail = data[-3:]
    return len(tail) - codecs.utf_8_decode(tail, "ignore")[1]


def valid_utf8(data):
    """Return `data` with U+FFFD for what is not UTF-8."""
    try:
        data.decode("utf-8")
        return data
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace").encode("utf-8")


def split_lines(data, before, mode, piece):
    """Return (skip, segments, lines): the lines of `data` with and without their ends.

    An unfinished line counts with mode FLUSH (up to a whole character) or FINAL, or if it has
    `piece` bytes. `skip` is 1 if `data` begins with the LF of a CR LF whose CR, `before` it, has
    ended the line.
    """
    skip = 1 if data[:1] == b"\n" and before == 13 else 0
    segments = data[skip:].splitlines(True)
    if segments and segments[-1][-1] not in (10, 13):
        last = segments.pop()
        if mode == NORMAL and len(last) < piece:
            last = b""
        elif mode != FINAL:
            last = last[:len(last) - incomplete_utf8(last)]
        if last:
            segments.append(last)
    return skip, segments, b"".join(segments).splitlines()


class Encoder:
    """Turns what a log holds into payloads for a client; this one sends bytes as they are.

    A payload is bytes, or a tuple of bytes if that saves a copy. Encoders hold no state, and those
    with the same `key` make the same payloads. `by_line`: nothing is encoded before a line ends;
    `partial`: but an unfinished line is, after PARTIAL_LINE_DELAY without output.
    """

    key, by_line, partial = ("raw",), False, False

    def encode(self, data, offset, before, mode, piece):
        """Encode `data`, which begins at `offset`. Return (payload, how much was consumed).

        What is not consumed (half a line, half a character) is offered again with more behind it.
        `before` is the byte in front of a leading newline, or None; `mode` is NORMAL, FLUSH or
        FINAL; a line of at least `piece` bytes is encoded before it ends.
        """
        return data, len(data)

    def dropped(self, count, offset, **more):
        """Return the payload that reports a loss; None if the format has no room for that.

        `count` bytes or events are missing before `offset`. `more`: restarted=True, if all of
        another run are.
        """


class Log:
    """A log with absolute offsets, and its readers: the base of Window, EventLog and JournalView.

    `limit`: how much is kept. `drop_counter`: the log that counts, in `dropped`, what readers have
    lost here; by default this one.
    """

    start = end = 0

    def __init__(self, loop, limit, drop_counter=None):
        self.loop, self.limit = loop, limit
        self.dropped, self._drop_counter = 0, drop_counter      # no reference to itself
        self.ended = False
        self.readers = {}                       # Reader -> None, in the order in which they came
        self.blockers = set()                   # readers with loss="block"
        self.questions = collections.deque(maxlen=QUESTIONS_MAX)    # offsets at POSTs to stdin
        self.answered = 0                       # where the last answer to one ended
        self.on_room = set()                    # called once, when one of those has advanced
        self.on_silence = lambda: None          # called by flush()
        self._waiters = {}                      # what wait() was given -> None, in order
        self._memo = {}                         # (encoder key, offset, mode) -> (payload, consumed)
        self._appended_at, self._flushes = -math.inf, False     # a timer will call flush()
        self._line_end = 0                      # the offset behind the last end of a line
        self._round = iter(())                  # readers that this round has not come to yet
        self._round_end = self._last_end = 0    # `end` when it and the one before it began
        self._pause = None                      # the Timer that ends a pause

    def read(self, offset, size=None):
        """Return up to `size` of what is at `offset`, which is not before `start`. None: as much as
        needs no copy, so that readers that lag hold no memory of their own."""
        raise NotImplementedError

    def before(self, offset):
        """Return the byte in front of `offset`, None if it is not known."""
        return None

    def resync(self, offset):
        """Return the first offset, from `offset` on, at which a reader may begin."""
        return offset

    def encoded(self, encoder, offset, mode):
        """Encode a share of what is at `offset`. Return (payload, consumed); see Encoder. A payload
        that is a number: that many bytes in front of what remains are lost."""
        key = encoder.key, offset, mode
        found = self._memo.get(key)
        if found is None:
            if (encoder.by_line and mode == NORMAL and offset >= self._line_end and not self.ended
                    and self.end - offset < self.limit // 2):
                return b"", 0                   # or each look at a line would take longer
            found = self._encode(encoder, offset, mode)
            if len(self._memo) >= MEMO_MAX:
                self._memo.clear()
            self._memo[key] = found
        return found

    def _encode(self, encoder, offset, mode):
        data, left = self.read(offset), self.end - offset
        before = self.before(offset) if encoder.by_line and data[:1] == b"\n" else None
        while True:
            whole = len(data) == left
            mode_here = NORMAL if not whole else FINAL if self.ended else mode
            found = encoder.encode(data, offset, before, mode_here, self.limit // 2)
            if found[1] or whole:
                return found
            data = self.read(offset, max(SHARE_SIZE, 4 * len(data)))

    def read_all(self, offset, encoder):
        """Return (bytes, offset behind them, bytes lost): all that is at `offset`, encoded."""
        lost = max(0, self.start - offset)
        parts, size, offset = [], 0, offset + lost
        while size < self.limit:
            payload, consumed = self.encoded(encoder, offset, NORMAL)
            if not consumed:
                break
            offset += consumed
            if payload.__class__ is int:
                lost += payload
            else:
                parts.append(payload)
                size += len(payload)
        return b"".join(parts), offset, lost

    def count_dropped(self, count):
        """Count what a reader has lost."""
        (self._drop_counter or self).dropped += count

    def room(self):
        """Return how much can be appended before a reader with loss="block" would lose any."""
        slowest = min((reader.offset for reader in self.blockers), default=math.inf)
        return slowest + self.limit - self.end

    def wait(self, satisfied):
        """Call `satisfied()` after each append, and at the end, until it returns True. Return a
        function that cancels this."""
        self._waiters[satisfied] = None
        return lambda: self._waiters.pop(satisfied, None)

    def finish(self):
        """End the log: its readers get what is left, then the end."""
        if not self.ended:
            self.ended, self._round, self._round_end = True, iter(()), -1
            self.feed()

    def add(self, reader):
        """Let a reader follow. One with loss="block" holds up the writer from now on."""
        self.readers[reader] = None
        if reader.loss == "block":
            self.blockers.add(reader)

    def remove(self, reader):
        self.readers.pop(reader, None)
        self.blockers.discard(reader)
        self.advanced()

    def advanced(self):
        """Resume those that wait for room: a reader with loss="block" has advanced, or left."""
        while self.on_room:
            self.loop.call_soon(self.on_room.pop())

    def flush(self, due=False):
        """Show unfinished lines if nothing has come for PARTIAL_LINE_DELAY, else once that is so.

        `due`: a timer calls this.
        """
        delay = self._appended_at + PARTIAL_LINE_DELAY - self.loop.now
        self._flushes = self._flushes and not due
        if delay <= 0:
            for reader in tuple(self.readers):
                if reader.encoder.partial and not reader.full:
                    reader.pump(FLUSH)
            self.on_silence()
        elif not self._flushes:
            self._flushes = True
            self.loop.later(delay, self.flush, True)

    def feed(self):
        """Send what is new to all readers, and ask those that wait."""
        self._memo.clear()
        self._appended_at = self.loop.clock()   # for flush(), which readers call
        self._feed_batches(self._pause is not None)
        self._appended_at = self.loop.clock()   # its writer was not silent meanwhile
        for satisfied in tuple(self._waiters):
            if self.loop.guard(satisfied):
                self._waiters.pop(satisfied, None)

    def _feed_batches(self, pausing=False):
        """Feed the readers in rounds, batch by batch, until all have all or a pause is due."""
        # A reader gets what there is at its turn: 1,000 clients have 1,000 lines a second after
        # 10 ms (median) for 0.58 of a core. Whole rounds with a pause each: 16 ms for 0.51.
        began = self.loop.clock()
        if not pausing:
            self._pause = None
        # no pause at the end of the log, and before a reader lags so far that it loses anything
        while not pausing or self.ended or self.end - self._last_end >= self.limit // 16:
            batch = list(itertools.islice(self._round, BATCH_SIZE))
            for reader in batch:
                if not reader.full:
                    reader.pump()
            if not batch:                       # a round is over
                if self._round_end == self.end:
                    return
                self._last_end, self._round_end = self._round_end, self.end
                self._round = iter(tuple(self.readers))
            took = self.loop.clock() - began
            pausing = took > BATCH_TIME
        if self._pause is None:                 # nothing new: only the loop's other work goes first
            self._pause = self.loop.later(
                BATCH_PAUSE * took if self.end > self._round_end else 0.0, self._feed_batches)


class Window(Log):
    """The last `limit` bytes of a stream, by absolute offset from `start` to `end`."""

    def __init__(self, loop, limit=WINDOW_SIZE, drop_counter=None):
        super().__init__(loop, limit, drop_counter)
        self._chunks, self._offsets = [], []    # bytes, and the offset of each one's first byte

    def append(self, data):
        """Add bytes; the oldest fall out."""
        chunks, offsets = self._chunks, self._offsets
        if chunks and len(chunks[-1]) + len(data) <= COALESCE_SIZE:
            chunks[-1] += data
        else:
            chunks.append(data)
            offsets.append(self.end)
        self.end += len(data)
        if b"\n" in data or b"\r" in data:
            self._line_end = self.end
        if self.end - self.start > self.limit:
            self.start = self.end - self.limit
            while offsets[0] + len(chunks[0]) < self.start:     # see before()
                del chunks[0], offsets[0]
        self.feed()

    def read(self, offset, size=None):
        if offset >= self.end:
            return b""
        index = bisect.bisect_right(self._offsets, offset) - 1
        skip = offset - self._offsets[index]
        if size is None:
            return self._chunks[index][skip:]
        last = bisect.bisect_left(self._offsets, offset + size)
        return b"".join(self._chunks[index:last])[skip:skip + size]

    def before(self, offset):
        # append() keeps the chunk that holds the byte in front of `start`
        known = self._offsets and offset > self._offsets[0]
        return self.read(offset - 1, 1)[0] if known else None

    def resync(self, offset):
        """Return where the first line at or after `offset` begins; `offset` if none ends there."""
        if self.before(offset) == 10 or offset == 0:
            return offset
        data = self.read(offset, self.limit)
        end = data.find(b"\n" if b"\n" in data else b"\r")     # that of a progress bar
        return offset if end < 0 else offset + end + 1

    def tail(self, lines):
        """Return the offset at which the last `lines` lines begin, an unfinished one counted; for
        math.inf that of the first whole line."""
        if lines == 0:
            return self.end
        first = self.resync(self.start)
        if lines == math.inf:
            return first
        parts = self.read(first, self.limit)[:-1].rsplit(b"\n", lines)
        return first + len(parts[0]) + 1 if len(parts) > lines else first


class EventLog(Log):
    """The last `limit` events, which are any objects. Event n, from 1, is at offset n - 1."""

    def __init__(self, loop, limit=EVENTS_KEPT):
        super().__init__(loop, limit)
        self._events = collections.deque(maxlen=limit)

    def append(self, event):
        self._events.append(event)
        self.end += 1
        self.start = self.end - len(self._events)
        self.feed()

    def read(self, offset, size=None):
        first = offset - self.start
        return list(itertools.islice(self._events, first, first + (size or self.limit)))


class Reader:
    """An offset in a log, and the sink that gets what follows. `start()` begins.

    A sink has send(payload), which returns False if it is full and calls `pump()` once it is not,
    lost(reader, count) and finished(reader). `loss`: what happens to a reader that is a window
    behind: "cut" (the sink closes), "skip" (`dropped` counts the loss) or "block" (the writer
    waits). With an encoder that can report a loss the reader goes on.
    """

    def __init__(self, source, encoder, sink, offset, loss="cut"):
        self.log, self.encoder, self.sink = source, encoder, sink
        self.offset, self.loss = offset, loss
        self.dropped = 0
        self.reported_until = 0                 # losses before this offset need not be reported
        self.full = True                        # nothing is sent until pump() is called
        self.last_sent = source.loop.now
        self._closed = False
        self._cut_line = 0                      # 1: with loss="skip", it is within a line

    def start(self):
        """Send what there is, then follow. Does nothing if the sink has closed the reader."""
        if not self._closed:
            self.log.add(self)
            self.pump()

    def close(self):
        if not self._closed:
            self._closed = True
            self.log.remove(self)

    def pump(self, mode=NORMAL):
        """Send what is at the offset, share by share, until the sink is full or has it all. If the
        encoder or the sink raises, this reader alone is cut."""
        source, self.full = self.log, False
        try:
            for _ in range(SHARES_PER_TURN):
                if self._closed:
                    return
                if self.offset < source.start:  # go on from where the window begins
                    place = source.start
                    if self.loss == "skip" or self.encoder.dropped(0, place) is not None:
                        # with the end of the line that was cut
                        place = source.resync(place + self._cut_line) - self._cut_line
                    payload = consumed = place - self.offset
                else:
                    payload, consumed = source.encoded(self.encoder, self.offset, mode)
                if not consumed:
                    if source.ended:
                        self.sink.finished(self)
                    elif self.encoder.partial and mode == NORMAL and self.offset < source.end:
                        source.flush()
                    return
                place = self.offset + consumed
                if payload.__class__ is int:    # that many are lost
                    count, payload = payload, b""
                    if place > self.reported_until:
                        source.count_dropped(count)
                        payload = self.encoder.dropped(count, place)
                        if payload is None and self.loss != "skip":
                            self.sink.lost(self, count)
                            return
                        self.dropped += count
                elif self.loss == "skip" and not self.encoder.by_line:
                    self._cut_line = 0 if source.before(place) in (None, 10, 13) else 1
                self.offset = place
                if self.loss == "block":
                    source.advanced()
                if payload:
                    self.last_sent = source.loop.now
                    self.full = not self.sink.send(payload)
                if self.full or (self.offset == source.end and not source.ended):
                    return
            self.full = True                    # the others' turn
            source.loop.call_soon(self.pump)
        except Exception:
            log.exception("a reader of a stream failed; it is cut")
            if not self._closed:
                source.loop.guard(self.sink.lost, self, source.end - self.offset)
            self.close()


class JournalSource(collections.namedtuple("JournalSource", "name pid label window text")):
    """Whose lines an entry of the journal holds. `window`: a weak reference to the template's
    window; None: the one line is `text`, of an exit. Each is another: after_stop has its own."""

    __eq__, __hash__ = object.__eq__, object.__hash__


class JournalView(Log):
    """What a Journal holds of a template, of a process by pid, or of all, as a log of lines."""

    def __init__(self, journal, name, pid):
        super().__init__(journal.loop, journal.limit)
        self.journal, self.name, self.pid = journal, name, pid

    @property
    def start(self):                            # type: ignore[override]
        return self.journal.starts.get(self.name, self.journal.offsets[0])

    @property
    def end(self):                              # type: ignore[override]
        return self.journal.offsets[-1]

    def wants(self, source):
        """Return True if what a source holds belongs here."""
        return self.name in (None, source.name) and self.pid in (None, source.pid)

    def tail(self, lines):
        """Return the offset behind which the last `lines` lines are, within `limit` bytes."""
        journal, size, index = self.journal, 0, len(self.journal.sources)
        while index > 0 and lines > 0 and size < self.limit:
            index -= 1
            if self.wants(journal.sources[index]):
                lost, _, ends, texts = journal.lines(index, journal.offsets[index])
                if len(ends) > lines:
                    return ends[-lines - 1]
                lines -= len(ends)
                size += sum(map(len, texts))
        return journal.offsets[index]

    def _encode(self, encoder, offset, mode):
        journal, groups, size, dropped = self.journal, [], 0, 0
        place = max(offset, journal.offsets[0])
        index = bisect.bisect_right(journal.offsets, place) - 1
        while place < journal.offsets[-1] and size < SHARE_SIZE:
            end = journal.offsets[index + 1]
            if self.wants(journal.sources[index]):
                lost, prefix, ends, lines = journal.lines(index, place, encoder.returns)
                if lost and groups:
                    break
                dropped += lost
                if dropped and lines:
                    place += lost
                    break
                if lines:
                    groups.append((prefix, ends, lines))
                size += end - place
            index, place = index + 1, end
        return dropped or encoder.encode(groups, offset, None, mode, 0)[0], place - offset


class Journal:
    """An index of all lines of this run, in the order in which they ended.

    An entry is a piece of a window, with its time: whole lines, or an unfinished one that was
    shown. Offsets count all their bytes; an exit counts as one. Nothing is encoded unless somebody
    reads; an entry takes 32 bytes. `limit`: how much one long poll gets.
    """

    def __init__(self, loop, limit):
        self.loop, self.limit = loop, limit
        self.sources, self._times = [], array.array("d")        # of each entry, as what follows
        self._places = array.array("q")         # where it begins in its window
        self.offsets = array.array("q", [0])    # and in the journal; the last one is the end
        self.starts = {}        # name of a template -> end of its last entry that fell out of these
        self._views = weakref.WeakValueDictionary()     # (name, pid) -> JournalView that is in use
        self._unfinished = {}                   # source -> where the line that it is within begins

    def source(self, name, pid, label, window):
        """Return the JournalSource of a stream of a process."""
        self.starts.setdefault(name, 0)
        return JournalSource(name, pid, label, weakref.ref(window), None)

    def append(self, source, data):
        """Add the lines that end in `data`, which was just appended to the window of `source`."""
        window = source.window()
        place = window.end - len(data)
        start = self._unfinished.pop(source, place)
        line_end = data.rfind(b"\n")
        line_end = max(line_end, data.rfind(b"\r", line_end + 1))
        if line_end >= 0:
            self._add(source, start, place + line_end + 1)
            start = place + line_end + 1
        if start < window.end:
            self._unfinished[source] = start
            window.on_silence = functools.partial(self._show, source, "+")
            if window.end - start >= min(CARRY_SIZE, window.limit // 2):
                self._show(source, "+")
            elif self._views:
                window.flush()

    def exit(self, name, pid, exit_status, term_signal):
        """Add the exit of a process of which all output was read; journals of it end."""
        text = b'{"exit_status": %d, "term_signal": %d}' % (exit_status, term_signal)
        self._add(JournalSource(name, pid, "exit", None, text), 0, 1)
        self.finish(name, pid)

    def close(self, source):
        """End a stream: its last line is shown though it has no end."""
        self._show(source, "")
        self._unfinished.pop(source, None)

    def finish(self, name=None, pid=None):
        """End the journal of a template that is deleted, or that of one process; None: all."""
        if pid is None:
            self.starts.pop(name, None)
        for key, view in list(self._views.items()):
            if name is None or key == (name, pid):
                del self._views[key]
                view.finish()

    def view(self, name=None, pid=None, ended=False):
        """Return the JournalView of all output, of a template's, or of one process's of it."""
        view = self._views.get((name, pid))
        if view is None:
            view = JournalView(self, name, pid)
            view.ended = ended
            if not ended:
                self._views[name, pid] = view
                for source in list(self._unfinished):   # nobody has read these
                    source.window().flush()
        return view

    def lines(self, index, offset, returns=False):
        """Return (lost, prefix, ends, lines) of the lines of an entry that end behind `offset`.

        `ends` are the offsets behind the lines; `lost` bytes from `offset` on are gone. `returns`:
        the label of a line that came after a carriage return alone is followed by "<".
        """
        source, base, end = self.sources[index], self.offsets[index], self.offsets[index + 1]
        prefix = ("%.3f %s %d %s " % (
            self._times[index], source.name, source.pid, source.label)).encode("ascii")
        if source.text is not None:
            return 0, prefix, [end], [source.text]
        window, place = source.window(), self._places[index]
        head, stop = place + offset - base, place + end - base
        if window is None or stop <= window.start:
            return end - offset, prefix, [], []
        if window.before(head) not in (10, 13):
            head = place                        # `offset` is within a line
        if head < window.start:                 # on from the start of a line
            head = min(window.resync(window.start), stop)
            if window.before(head) not in (10, 13):
                head = stop
        data, before = window.read(head, stop - head), window.before(head)
        skip, segments, lines = split_lines(data, before, FINAL, math.inf)
        if valid_utf8(data) is not data:
            lines = list(map(valid_utf8, lines))
        if returns:
            ends_before = [None if skip else before, *(part[-1] for part in segments)]
            lines = [(b"< " if last == 13 else b" ") + line
                     for last, line in zip(ends_before, lines)]
            prefix = prefix[:-1]
        head += base - place                    # as an offset
        ends = list(itertools.accumulate(map(len, segments), initial=head + skip))[1:]
        known = bisect.bisect_right(ends, offset)
        return max(0, head - offset), prefix, ends[known:], lines[known:]

    def _add(self, source, start, end):
        """Add an entry: what is from `start` to `end` in the window of `source`, or an exit."""
        now, length = time.time(), 0
        if self.sources and self.sources[-1] is source:
            length = self.offsets[-1] - self.offsets[-2]
        if (length and self._places[-1] + length == start and 0 <= now - self._times[-1] < JOIN_TIME
                and length + end - start <= min(COALESCE_SIZE, source.window().limit // 4)):
            self.offsets[-1] += end - start
        else:
            if len(self.sources) >= JOURNAL_ENTRIES:
                for index in range(JOURNAL_ENTRIES // 4):
                    if self.sources[index].name in self.starts:
                        self.starts[self.sources[index].name] = self.offsets[index + 1]
                for column in (self.sources, self.offsets, self._times, self._places):
                    del column[:JOURNAL_ENTRIES // 4]
            self.sources.append(source)
            self._times.append(now)
            self._places.append(start)
            self.offsets.append(self.offsets[-1] + end - start)
        for view in list(self._views.values()):
            if view.wants(source):
                view.feed()

    def _show(self, source, mark):
        """Show the unfinished line of a stream, up to a whole character if it may go on."""
        if source in self._unfinished:
            window = source.window()
            start, end = self._unfinished[source], window.end
            if mark:
                end -= incomplete_utf8(window.read(max(window.start, end - 3), 3))
            self._unfinished[source] = end
            if end > start:
                self._add(source._replace(label=source.label + mark), start, end)


# --------------------------------------------------------------------------------------------------
# templates
#
# A process template is a dict. OPTIONS is the one table of its fields: default, check and help;
# JSON, the command line, the description of the API and the README all come from it. A check
# returns the value, or raises ValueError with a sentence that continues "field 'x' "; its `schema`
# is the JSON Schema of what it accepts. Launch turns a template into what is executed, anew at each
# start, as the environment may have changed; only what exits by itself may be started from the last
# one again. Any thread may call all of this.
# --------------------------------------------------------------------------------------------------
NUMPROCESSES_MAX = 1000                         # of a template
SECONDS_MAX = 10.0 ** 7                         # any time in a request: select() can still count it
FILE_SIZE = MIB                                 # of configuration and of variables
NAME = r"(?!-|:|[0-9]+$|\.{1,2}$|all$)[A-Za-z0-9_.:@-]{1,128}"
VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
QUOTED = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)""", re.DOTALL)


def to_bytes(text):
    """Encode what the system is to get: UTF-8, whatever the locale says."""
    return text.encode("utf-8", "surrogateescape")


def is_number(value, kinds=(int, float)):
    """Tell whether JSON's `value` is a number; true and false are not."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def json_schema(type, **more):
    """Mark a check with the JSON Schema of what it accepts."""
    def mark(check):
        check.schema = dict(more, type=type)
        return check
    return mark


def check_of(sentence, accepts, type, **schema):
    """Return a check for what `accepts(value)` is true of. `sentence` says what is wrong, with the
    value in place of {!r}; the rest is the JSON Schema."""
    @json_schema(type, **schema)
    def check(value):
        if not accepts(value):
            raise ValueError(sentence.format(value))
        return value
    return check


def matching(pattern, what):
    """Return a check for a string that a pattern matches as a whole."""
    return check_of("must be " + what, lambda value: isinstance(value, str) and
                    re.fullmatch(pattern, value), "string", pattern="^(?:%s)$" % pattern)


def choice(*words):
    """Return a check for one of `words`."""
    return check_of("must be " + " or ".join(words), words.__contains__, "string",
                    enum=list(words))


def whole_number(least, most):
    """Return a check for an integer from `least` to `most`."""
    return check_of("must be a whole number from %d to %d" % (least, most),
                    lambda value: is_number(value, int) and least <= value <= most,
                    "integer", minimum=least, maximum=most)


def seconds(least):
    """Return a check for a number of seconds of at least `least`."""
    return check_of("must be a number of seconds from %g to %d" % (least, SECONDS_MAX),
                    lambda value: is_number(value) and least <= value <= SECONDS_MAX,
                    "number", minimum=least, maximum=SECONDS_MAX)


def list_of(check, most=1000, unique=False):
    """Return a check for a list of at most `most` values that pass another check."""
    @json_schema("array", maxItems=most, uniqueItems=unique, items=check.schema)
    def check_list(value):
        if not isinstance(value, list) or len(value) > most:
            raise ValueError("must be a list of at most %d" % most)
        for item in value:
            try:
                check(item)
            except ValueError as error:
                raise ValueError("has %r, which %s" % (item, error)) from None
        if unique and len(set(value)) < len(value):
            raise ValueError("has a label twice")
        return list(value)
    return check_list


def check_text(value, what="a string"):
    """Check a string that can be handed to the system: no NUL, and valid UTF-8."""
    if not isinstance(value, str):
        raise ValueError("must be %s" % what)
    if re.search("[\0\ud800-\udfff]", value):
        raise ValueError("must not hold a NUL character or a lone surrogate")
    return value


def identity(what, find, own):
    """Return a check for a user or group that exists and as whom gaffer may run something."""
    @json_schema(["string", "integer"])
    def check(value):
        if not is_number(value, int):
            check_text(value, "a %s's name or number" % what)
        if find(value) != own() and os.geteuid() != 0:
            raise ValueError("asks for %s %r, which only root may do: run gaffer as root"
                             % (what, value))
        return value
    return check


def split_words(text, separators=""):
    """Split a command line as a shell does, also at `separators`. ValueError: a quote is not
    closed."""
    # shlex takes half a minute for a word of a megabyte
    left = re.search(r"['\"\\]", QUOTED.sub("", text))
    if left:
        raise ValueError("cannot be split into words: no %s" % (
            "escaped character" if left.group() == "\\" else "closing quotation"))

    def unquote(match):
        single, double, escaped = match.groups()
        if double is not None:
            return re.sub(r"\\([\n$`\"\\])", lambda pair: pair.group(1).strip("\n"), double)
        return escaped.strip("\n") if single is None else single
    word = r"(?:%s|[^'\"\\ \t\r\n%s]+)+" % (QUOTED.pattern, separators)
    return [QUOTED.sub(unquote, found.group()) for found in re.finditer(word, text, re.DOTALL)
            if found.group().replace("\\\n", "")]


@json_schema(["array", "string"], items={"type": "string"})
def check_args(value):
    """Check a list of strings, or one string that is split as a shell splits words."""
    what = "a list of strings, or a string"
    if isinstance(value, list):
        return [check_text(word, what) for word in value]
    split_words(check_text(value, what))
    return value


@json_schema("object", additionalProperties={"type": ["string", "number"]})
def check_env(value):
    """Check {name: string or number}."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of strings and numbers")
    for name, text in value.items():
        if not isinstance(name, str) or not name or "=" in name:
            raise ValueError("has a variable %r: a name is a string, not empty, without '='"
                             % (name,))
        if not isinstance(text, str) and not (is_number(text) and math.isfinite(text)):
            raise ValueError("has a variable %r that is not a string or a number" % name)
        check_text(name + str(text))
    return dict(value)


def signal_number(value):
    """Return the number of a signal: 15, "15", "TERM", "SIGTERM", signal.SIGTERM; 0 if none is."""
    text = str(int(value)) if is_number(value, int) else str(value)
    if re.fullmatch("[0-9]{1,3}", text):
        return int(text) if int(text) in signal.valid_signals() else 0
    return signal.Signals.__members__.get("SIG" + re.sub("^SIG", "", text.upper()), 0)


def parse_signal(value):
    """Return signal_number(). BadValue: there is no such signal."""
    number = signal_number(value)
    if not number:
        raise BadValue("%.40r is not a signal: give a number or a name such as TERM" % (value,))
    return number


check_flag = check_of("must be true or false", lambda value: isinstance(value, bool), "boolean")
check_seconds = seconds(0)
check_filled = check_of("must not be empty", lambda value: check_text(value).strip(), "string",
                        minLength=1)
check_directory = check_of("names the directory {!r}, which is not there",
                           lambda path: os.path.isdir(to_bytes(check_text(path))), "string")
check_name = matching(NAME, "1 to 128 of A-Z a-z 0-9 _ . : @ -, not all digits, not 'all', '.' or "
                      "'..', and not begin with - or :")
check_label = matching(
    r"(?!(?:\.{1,2}|stdin|ttin|exit|dropped)$)[A-Za-z0-9_.-]{1,64}",
    "1 to 64 of A-Z a-z 0-9 _ . -, and none of stdin, ttin, exit, dropped, . and ..")
check_signal = check_of("must be a signal's number, or a name such as TERM", signal_number,
                        "string")
check_ending = check_of(
    "must be a whole number from 0 to 255, or the name of a signal",
    lambda value: is_number(value, int) and 0 <= value <= 255
    or isinstance(value, str) and not value.isdigit() and signal_number(value),
    ["integer", "string"])


@json_schema(["array", "number"], items={"type": "number", "minimum": 0}, minItems=2, maxItems=2)
def check_delay(value):
    """Check a number of seconds, or the first and the longest of growing ones."""
    if not isinstance(value, list):
        return check_seconds(value)
    if len(value) != 2 or check_seconds(value[0]) > check_seconds(value[1]):
        raise ValueError("must be a number of seconds, or the first and the longest: [0.1, 10]")
    return value


@json_schema(["string", "integer", "array"], minItems=1, maxItems=10, items={"type": "array"})
def check_stop_signal(value):
    """Check a signal, or a list of [signal, seconds until the next]."""
    if not isinstance(value, list):
        return check_signal(value)
    if not 1 <= len(value) <= 10 or not all(isinstance(step, list) and len(step) == 2
                                            for step in value):
        raise ValueError('must be a signal, or 1 to 10 of [signal, seconds]: [["INT", 5]]')
    return [[check_signal(signum), check_seconds(delay)] for signum, delay in value]


# name of a resource limit -> the options of the shell's ulimit for it, and its unit in bytes
LIMITS = {"as": ("v", KIB), "core": ("c", 512), "cpu": ("t", 1), "data": ("d", KIB),
          "fsize": ("f", 512), "memlock": ("l", KIB), "nofile": ("n", 1), "nproc": ("up", 1),
          "rss": ("m", KIB), "stack": ("s", KIB)}


def limit_pair(value):
    """Return (soft, hard) of a resource limit, math.inf for none; None if it is not a valid one."""
    pair = value if isinstance(value, list) else [value, value]
    found = [math.inf if each == "unlimited" else each for each in pair
             if each == "unlimited" or is_number(each, int) and 0 <= each < 2 ** 62]
    return tuple(found) if len(pair) == len(found) == 2 and found[0] <= found[1] else None


check_limit = check_of(
    "must be a whole number, 'unlimited', or [soft, hard] with the lower first", limit_pair,
    ["integer", "string", "array"], minimum=0)
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
NICKNAMES = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0",
             "@monthly": "0 0 1 * *"}
CRON_FIELDS = (                                 # what it is, least, most, names
    ("minute", 0, 59, ()), ("hour", 0, 23, ()), ("day of the month", 1, 31, ()),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec".split()),
    ("day of the week", 0, 7, "sun mon tue wed thu fri sat".split()))


def parse_cron_field(text, what, least, most, names):
    """Return the set of numbers that a field of cron selects. ValueError: it is not valid."""
    found = set()
    for item in text.lower().split(","):
        match = re.fullmatch(r"(?:\*|(\w+)(?:-(\w+))?)(?:/0*([1-9]\d{0,3}))?", item, re.A)
        first, last, step = match.groups() if match else ("", "", "")
        numbers = [names.index(word) + least if word in names else
                   int(word) if re.fullmatch("[0-9]{1,4}", word) else -1
                   for word in (first or str(least), last or first or str(most))]
        if not match or not least <= numbers[0] <= numbers[1] <= most or (
                first and step and not last):
            raise ValueError("has %r as %s: give *, a number or a range from %d to %d, as in "
                             "%d-%d/2" % (item[:40], what, least, most, least, most))
        found.update(range(numbers[0], numbers[1] + 1, int(step or 1)))
    return found


def unix_time(local):
    """Return the Unix time at which clocks first show `local`, counted in seconds as if it were
    UTC; if they are put forward over that, the time at which they are."""
    before, after = [time.localtime(local + shift).tm_gmtoff for shift in (-86400, 86400)]
    for when in (local - before, local - after):
        if when + time.localtime(when).tm_gmtoff == local:
            return float(when)
    return next((float(when) for when in range(local - after, local - before, 60)
                 if time.localtime(when).tm_gmtoff != before), float(local - before))


class Schedule:
    """When to start a template: "every 90s" (s, m, h, d), five fields of cron or a nickname, in
    local time. Raises ValueError. Pure, but for the time zone."""

    def __init__(self, text):
        match = re.fullmatch(r"every ([0-9]{1,9}(?:\.[0-9]{1,3})?) ?([smhd])", text.strip())
        self._every = None                      # seconds
        if match:
            self._every = float(match.group(1)) * UNITS[match.group(2)]
            if not 1 <= self._every <= SECONDS_MAX:
                raise ValueError("must be every 1 second to every 115 days")
            return
        fields = NICKNAMES.get(text.strip(), text).split()
        if len(fields) != 5:
            raise ValueError("must be 'every 90s' (s, m, h or d), five fields of cron, or one of "
                             + ", ".join(NICKNAMES))
        *self._chosen, weekdays = [
            parse_cron_field(field, *limits) for field, limits in zip(fields, CRON_FIELDS)]
        self._weekdays = {day % 7 for day in weekdays}
        # cron: if both kinds of day are restricted, one of them is enough
        self._enough = any if fields[2][0] != "*" and fields[4][0] != "*" else all
        if self.next_time(0.0) is None:
            raise ValueError("names a day that does not exist")

    def next_time(self, now):
        """Return the Unix time of the first start after `now`; None: there is none. A time that
        does not exist, as clocks go forward, becomes the next that does; one that exists twice is
        taken once."""
        if self._every is not None:
            return now + self._every
        minutes, hours, days, months = self._chosen
        local = now + time.localtime(now).tm_gmtoff     # what clocks show, as if it were UTC
        today = int(local // 86400)
        for day in range(today, today + 366 * 40):      # 29 February may have to be a weekday
            date = time.gmtime(day * 86400)
            fitting = date.tm_mday in days, (date.tm_wday + 1) % 7 in self._weekdays
            if date.tm_mon in months and self._enough(fitting):
                for hour, minute in itertools.product(sorted(hours), sorted(minutes)):
                    wanted = day * 86400 + hour * 3600 + minute * 60
                    when = unix_time(wanted) if wanted > local else now
                    if when > now:
                        return when
        return None

    def next_times(self, now):
        """Return the Unix times of the first starts after `now`: up to five, those of a year."""
        times = [self.next_time(now)]
        while len(times) < 5 and times[-1] - now < 366 * UNITS["d"]:
            times.append(self.next_time(times[-1]))
        return times

    def timer(self):
        """Return what systemd.timer(5) calls it: [(setting, value)]."""
        if self._every is not None:
            return [(name, "%.10g" % self._every) for name in ("OnActiveSec", "OnUnitActiveSec")]
        minutes, hours, days, months = [
            "*" if len(chosen) == most - least + 1 else ",".join(map(str, sorted(chosen)))
            for chosen, (_, least, most, _) in zip(self._chosen, CRON_FIELDS)]
        names = ",".join(CRON_FIELDS[4][3][day] for day in sorted(self._weekdays)) + " "
        weekdays = "" if len(self._weekdays) == 7 else names
        dates = [(weekdays, days)] if self._enough is all else [(weekdays, "*"), ("", days)]
        return [("OnCalendar", "%s*-%s-%s %s:%s:00" % (weekday, months, day, hours, minutes))
                for weekday, day in dates]


check_schedule = check_of("must be a schedule", lambda text: Schedule(check_text(text)), "string")
Option = collections.namedtuple("Option", "default check help", defaults=[""])


def examine_fields(info, options, required=()):
    """Return (values, faults) of `info` by a table of options: values with their defaults filled
    in, and all faults as (field, sentence)."""
    values = {field: copy.copy(option.default) for field, option in options.items()}
    unknown = [str(field)[:128] for field in info if field not in options]
    faults = [(field, "unknown field '%s'%s" % (field, near(field, options) or "; remove it"))
              for field in unknown[:10]]
    if len(unknown) > 10:
        faults.append((unknown[10], "%d more unknown fields" % (len(unknown) - 10)))
    for field, option in options.items():
        try:
            if info.get(field) is not None:
                values[field] = option.check(info[field])
            elif field in required:
                raise ValueError("is required")
            elif field in info and option.default is not None:
                raise ValueError("must not be null; leave it out for its default")
        except ValueError as error:
            faults.append((field, "field '%s' %s" % (field, error)))
    return values, faults


def record(fields):
    """Return a check for an object of `fields`, a table as OPTIONS. Without a default they are left
    out of what it returns."""
    @json_schema("object", additionalProperties=False, properties={
        name: field.check.schema if field.default is None else dict(
            field.check.schema, default=field.default) for name, field in fields.items()})
    def check(value):
        if not isinstance(value, dict):
            raise ValueError("must be an object with %s" % ", ".join(fields))
        values, faults = examine_fields(value, fields)
        if faults:
            raise ValueError("has the " + re.sub("^(field '[^']*')", r"\1 that", faults[0][1]))
        return {field: item for field, item in values.items() if item is not None}
    return check


def parse_target(kind, text):
    """Return ([(host, port)], request): where a probe of a "tcp" address (by default of localhost,
    which has two) or an "http" URL connects to, and what it sends. ValueError."""
    pattern, what = {
        "tcp": (r"((?:%s:)?([0-9]{1,5}))()", "port, or host:port"),
        "http": (r"""http://(%s(?::([0-9]{0,5}))?)((?:[/?][!"$-~]*)?)(?:#[!-~]*)?""",
                 "URL such as http://127.0.0.1:8000/path")}[kind]
    match = re.fullmatch(pattern % r"(localhost|[0-9.]+|\[[0-9a-f.]*:[0-9a-f:.]+\])",
                         text, re.I)
    netloc, host, port, path = match.groups("") if match else [""] * 4
    hosts = [host.strip("[]")]
    if match and host.lower() in ("", "localhost"):
        hosts = ["127.0.0.1", "::1"]
    try:
        for each in hosts:
            socket.inet_pton(socket.AF_INET6 if ":" in each else socket.AF_INET, each)
        if not 0 < int(port or 80) < 65536:
            raise ValueError
    except (OSError, ValueError):
        raise ValueError("has a '%s' that is not a %s, with an address or localhost as its host"
                         % (kind, what)) from None
    request = ("GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: gaffer/%s\r\nConnection: close\r\n\r\n"
               % (re.sub("^/?", "/", path), netloc, __version__))
    return [(each, int(port or 80)) for each in hosts], request.encode() if kind == "http" else b""


READY = ("log", "tcp", "http", "exec", "notify")
READY_RECORD = record(dict(dict.fromkeys(READY, Option(None, check_filled)),
                           notify=Option(None, check_flag), within=Option(60, seconds(0.001))))


@json_schema(**READY_RECORD.schema)
def check_ready(value):
    """Check an object with one of READY, and `within`. Targets with a variable are not checked."""
    full = READY_RECORD(value)
    kind, item = next(iter(full.items()))
    if len(full) != 2:
        raise ValueError("must have one of %s" % ", ".join(READY))
    if kind == "log" and re.search("[\r\n]", item):
        raise ValueError("has a 'log' that is not part of one line")
    if kind in ("tcp", "http") and "$" not in item:
        parse_target(kind, item)
    if kind == "notify" and not (item and hasattr(socket, "SO_PASSCRED")):
        raise ValueError("has a 'notify' that is not true, which needs Linux")
    return full


def ready_text(template):
    """Return what a template's 'ready' waits for, as INI writes it: "tcp:5432"."""
    kind, value = next(iter(template["ready"].items()))
    return {"notify": kind, "http": value}.get(kind, "%s:%s" % (kind, value))


FLAPPING = {
    "attempts": Option(2, whole_number(1, 1000)), "window": Option(1.0, seconds(0.001)),
    "retry_in": Option(7.0, check_seconds), "max_retry": Option(5, whole_number(0, 10 ** 6)),
}
OPTIONS = {
    "name": Option(None, check_name, "its name; a part before the first ':' is its group"),
    "cmd": Option(None, check_filled, "the command line, or with args the program"),
    "args": Option([], check_args, "the program's arguments: a list, or a string to split"),
    "env": Option({}, check_env, "variables of its environment"),
    "env_file": Option([], list_of(check_filled), "NAME=value files, read at each start; env wins"),
    "os_env": Option(True, check_flag, "add env to gaffer's own environment"),
    "cwd": Option(None, check_directory, "working directory"),
    "uid": Option(None, identity("user", lambda user: find_user(user)[0], os.geteuid),
                  "user, by name or number"),
    "gid": Option(None, identity("group", find_group, os.getegid), "group, by name or number"),
    "shell": Option(False, check_flag, "give cmd to /bin/sh -c"),
    "numprocesses": Option(1, whole_number(0, NUMPROCESSES_MAX), "how many to keep running"),
    "start": Option(True, check_flag, "start when added"),
    "detach": Option(False, check_flag, "survive gaffer's stop"),
    "redirect_output": Option(["stdout", "stderr"], list_of(check_label, 2),
                              "labels for stdout and stderr"),
    "redirect_input": Option(False, check_flag, "a pipe to stdin"),
    "custom_streams": Option([], list_of(check_label, 16, True),
                             "labels of further two-way streams, from descriptor 3 on"),
    "umask": Option(None, matching("0?[0-7]{1,3}", "octal digits in a string: '022'"),
                    "file mode creation mask, octal"),
    "nice": Option(None, whole_number(-20, 19), "scheduling priority, -20 to 19"),
    "limits": Option({}, record(dict.fromkeys(LIMITS, Option(None, check_limit))),
                     "resource limits, numbers or 'unlimited': %s" % ", ".join(LIMITS)),
    "before_start": Option(None, check_filled, "a shell command to run before each start"),
    "after_stop": Option(None, check_filled, "a shell command to run after each exit"),
    "graceful_timeout": Option(10, check_seconds, "seconds between the stop signal and SIGKILL"),
    "stop_signal": Option("TERM", check_stop_signal,
                          "signal that stops it, or a list of [signal, seconds] before SIGKILL"),
    "stop_group": Option(True, check_flag, "send the stop signal to its whole group"),
    "restart": Option("always", choice("always", "on-failure", "never"),
                      "start it again when it exits: always, on-failure or never"),
    "success": Option([0], list_of(check_ending), "exit statuses and signals that are a success"),
    "restart_delay": Option([0.1, 10], check_delay,
                            "seconds before it is started again: always these, or first, longest"),
    "schedule": Option(None, check_schedule, "start at times: 'every 90s', cron fields, @daily"),
    "flapping": Option(None, record(FLAPPING), "pause when it exits too often: %s"
                       % ", ".join(FLAPPING)),
    "after": Option([], list_of(check_name), "templates: started once each is ready, or, if it "
                    "ends by itself and has no 'ready', done"),
    "ready": Option(None, check_ready, "when it is ready: one of %s; and, with 'within', "
                    "after how many seconds it has failed" % ", ".join(READY)),
    "priority": Option(None, whole_number(-10 ** 6, 10 ** 6), "start order in one load, 0 first"),
}
# a running process is not affected by them
ADJUSTABLE = ("numprocesses", "priority", "flapping", "start", "after")


@contextlib.contextmanager
def faults_of(field, faults=None):
    """Have a ValueError about a field of a template noted in `faults`, or raised as
    InvalidProcessInfo."""
    try:
        yield
    except ValueError as error:
        sentence = "field '%s' %s" % (field, error)
        if faults is None:
            raise InvalidProcessInfo(sentence) from None
        faults.append((field, sentence))


def port_of(env, instance):
    """Return the PORT of a template's process: that of the first, and a GAFFER_PORT_STEP more for
    each further one; None if `env` has no such step. ValueError: this is not a port."""
    if "GAFFER_PORT_STEP" not in env:
        return None
    words = "%s %s" % (env.get("PORT", ""), env["GAFFER_PORT_STEP"])
    if not re.fullmatch("[0-9]{1,5} [0-9]{1,5}", words):
        raise ValueError("has GAFFER_PORT_STEP: give it and PORT whole numbers")
    first, step = map(int, words.split())
    port = first + step * max(0, instance - 1)
    if not 0 < port < 65536:
        raise ValueError("makes %d the PORT of process %d: a port is 1 to 65535" % (port, instance))
    return port


def command_words(template):
    """Return the words of what is executed; with `shell` those after the command. ValueError."""
    args = template["args"]
    words = split_words(args) if isinstance(args, str) else args
    if template["shell"]:
        return words
    words = [template["cmd"], *words] if words else split_words(template["cmd"])
    if not words:
        raise ValueError("must not be empty")
    return words


def examine_template(info):
    """Return (template, faults) of a client's `info`, as examine_fields() does. What one field says
    of another is filled in."""
    template, faults = examine_fields(info, OPTIONS, ("name", "cmd"))
    if faults:
        return template, faults
    with faults_of("cmd", faults):
        command_words(template)
    with faults_of("env", faults):
        port_of(template["env"], template["numprocesses"])
    if template["detach"] and "redirect_output" not in info:
        template["redirect_output"] = []
    if template["schedule"] is not None and "restart" not in info:
        template["restart"] = "never"
    wrong = [(field, "cannot go with 'detach': nobody would read its pipes")
             for field in ("redirect_output", "redirect_input", "custom_streams")
             if template["detach"] and template[field]]
    wrong += [("custom_streams", "has the label '%s', which is in 'redirect_output' too" % label)
              for label in template["custom_streams"] if label in template["redirect_output"]]
    if "log" in (template["ready"] or ()) and not template["redirect_output"]:
        wrong.append(("ready", "waits for a line of output, but 'redirect_output' is empty"))
    if template["gid"] is None and template["uid"] is not None and (
            find_user(template["uid"])[1] is None):
        wrong.append(("uid", "is a user without an entry; give 'gid' too"))
    return template, faults + [(field, "field '%s' %s" % (field, fault)) for field, fault in wrong]


def check_template(info):
    """Return a template from a client's `info`. InvalidProcessInfo names every field that is
    wrong."""
    if not isinstance(info, dict):
        raise InvalidProcessInfo("send one JSON object with at least 'name' and 'cmd'")
    template, faults = examine_template(info)
    if faults:
        raise InvalidProcessInfo("; ".join(sentence for _, sentence in faults))
    return template


def substitute(word, env):
    """Fill in $VAR and ${VAR} from `env` (of bytes); an unset one stays as it is, $$ is $."""
    def value(match):
        if match.lastindex is None:
            return "$"
        found = env.get(match.group(match.lastindex).encode("ascii"))
        return match.group() if found is None else found.decode("utf-8", "surrogateescape")
    return VARIABLE.sub(value, word)


ENV_LINE = re.compile(r"""(?xs)
    (?:[ \t\r]*(?:\#[^\n]*)?                                           # nothing, or a comment
    |[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_][A-Za-z0-9_.]*)[ \t]*=
        (?:[ \t]*(?:'(?P<single>[^'\0]*)'|"(?P<double>(?:[^"\\\0]|\\.)*)")[ \t\r]*(?:\#[^\n]*)?
        |(?![ \t]*['"])(?P<plain>[^\n\0]*)))
    (?:\n|\Z)
    |(?P<other>[^\n]*)(?:\n|\Z)""")
ENV_FILL = re.compile(
    r"(?s)\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_.]*)\})?|\\(.)")
ENV_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "$": "$"}


def parse_env(text, environ):
    """Read the text of a .env file. Return ({name: value}, faults as [(line, sentence)]).

    $NAME and ${NAME} stand for a variable from a line before, else from `environ`, else for
    nothing; single quotes keep them.
    """
    values, faults, room = {}, [], FILE_SIZE    # lines may double what they stand for

    def fill(match):
        nonlocal room
        name, braced, escaped = match.groups()
        if escaped:
            if escaped not in ENV_ESCAPES:
                raise ValueError(
                    r'has \%s in double quotes, which may have \n \t \" \\ \$' % escaped)
            return ENV_ESCAPES[escaped]
        if not match.lastindex:
            raise ValueError(r"has a '$' without a name: use single quotes, or \$ in double quotes")
        found = values.get(name or braced, environ.get(name or braced, ""))
        room -= len(found)
        if room < 0:
            raise ValueError("makes the variables too long: over %d characters in all" % FILE_SIZE)
        return found

    for line in ENV_LINE.finditer(text):
        name, single, value, plain, other = line.groups()
        if plain is not None:                   # without escapes
            value = re.sub("[ \t]#.*", "", plain).strip(" \t\r").replace("\\", r"\\")
        try:
            if other:
                raise ValueError("is not NAME=value, with the value plain or in one pair of quotes")
            if name:
                values[name] = ENV_FILL.sub(fill, value) if single is None else single
        except ValueError as error:
            faults.append((text.count("\n", 0, line.start()) + 1, str(error)))
            if len(faults) == 100:
                break
    return values, faults


def read_text(path):
    """Return the text of a file. ValueError: it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_SIZE + 1)
        if len(data) > FILE_SIZE:
            raise ValueError("it is over %d bytes" % FILE_SIZE)
        return check_text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("cannot be read: byte %d is not UTF-8" % (error.start + 1)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError("cannot be read: %s" % reason) from None


def read_env_files(paths, environ):
    """Return {name: value} of .env files, a later one wins. ValueError: one is wrong."""
    values = {}
    for path in paths:
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise ValueError("is not a file")       # reading a FIFO would block the loop
            found, faults = parse_env(read_text(path), {**environ, **values})
        except ValueError as error:
            raise ValueError("names %r, which %s" % (path, error)) from None
        if faults:
            raise ValueError("names %r, whose line %d %s" % (path, *faults[0]))
        values.update(found)
    return values


# What a shell does in the process before it becomes the program. $1 is before_start; its failure is
# an exit of the process.
BEFORE_START = """/bin/sh -c "$1" </dev/null || {
status=$?
echo "before_start has failed with exit status $status" >&2
exit $status
}
shift"""


class Launch:
    """What is executed: `program` (a path), `argv`, `env` and `cwd`, in bytes; `uid`, `gid`,
    `groups`, `umask` and `nice`, None for gaffer's own; `limits`: {name: (soft, hard)}; `instance`:
    the process's number within its template, from 1; `ready` (one of READY, or None) and `target`:
    its text, or what parse_target() makes of it; `ignored`: gaffer ignores a signal that the
    program is to get. InvalidProcessInfo: it cannot be."""

    def __init__(self, template, instance=1):
        for field in ("cwd", "uid", "gid"):     # checked again: the system may have changed
            if template[field] is not None:
                with faults_of(field):
                    OPTIONS[field].check(template[field])
        self.instance = instance
        self.cwd = None if template["cwd"] is None else to_bytes(template["cwd"])
        self.uid = self.gid = self.groups = user = None
        if template["uid"] is not None:
            self.uid, self.gid, user = find_user(template["uid"])
        if template["gid"] is not None:
            self.gid = find_group(template["gid"])
        if os.geteuid() == 0 and self.gid is not None:
            self.groups = [self.gid] if user is None else os.getgrouplist(user, self.gid)
        self.env = self._environment(template, user)
        words = command_words(template)
        if template["shell"]:
            words = ["/bin/sh", "-c", template["cmd"], "sh", *words]
        else:
            words = [substitute(word, self.env) for word in words]
        self.argv = [to_bytes(word) for word in words]
        self.program = self._find(self.argv[0])
        self.umask, self.nice = template["umask"], template["nice"]
        self.limits = {name: limit_pair(limit) for name, limit in template["limits"].items()}
        self._prepare(template["before_start"])
        self.ready, self.target = next(iter((template["ready"] or {None: None}).items()))
        if self.ready in ("tcp", "http"):
            with faults_of("ready"):
                self.target = parse_target(self.ready, substitute(self.target, self.env))
        self.ignored = any(
            signal.getsignal(number) == signal.SIG_IGN for number in range(1, 32)
            if number not in (signal.SIGPIPE, signal.SIGXFSZ))      # Popen resets these

    def _prepare(self, before_start=None):
        """Have /bin/sh set what Popen has no argument for, and what needs no privilege, and then
        become the program."""
        lines = [] if self.umask is None else ["umask " + self.umask]
        for name, pair in self.limits.items():
            letters, unit = LIMITS[name]
            for kind, limit in zip("SH", pair):
                size = "unlimited" if limit == math.inf else "%d" % -(-limit // unit)
                # shells differ in the letter for nproc
                lines.append(" 2>/dev/null || ".join("ulimit -%s%s %s" % (kind, letter, size)
                                                     for letter in letters))
        hook = []
        if before_start is not None:
            lines.append(BEFORE_START)
            hook = [to_bytes(before_start)]
        more = 0 if self.nice is None else self.nice - os.getpriority(os.PRIO_PROCESS, 0)
        if more > 0:                            # PATH may be the program's own
            lines.append('set -- "$(command -v nice || command -pv nice)" -n %d "$@"' % more)
        if lines:
            script = "\n".join(["set -e", *lines, 'exec "$@"'])
            odd = [b"%s=%s" % pair for pair in self.env.items()     # a shell may drop them
                   if not re.fullmatch(rb"[A-Za-z_][A-Za-z_0-9]*", pair[0])]
            env = [b"/usr/bin/env", *odd] if odd else []
            self.argv = [b"sh", b"-c", to_bytes(script), b"sh", *hook, *env, self.program,
                         *self.argv[1:]]
            self.program = b"/bin/sh"

    def hook(self, command, env):
        """Return a Launch for a shell command in the same environment and `env` (of bytes)."""
        launch = copy.copy(self)
        launch.argv, launch.program = [b"sh", b"-c", to_bytes(command)], b"/bin/sh"
        launch.env = {**self.env, **dict(env)}
        launch._prepare()
        return launch

    def _environment(self, template, user):
        env = dict(os.environb) if template["os_env"] else {}
        own = [b"NOTIFY_SOCKET", b"WATCHDOG_USEC", b"WATCHDOG_PID"]     # for gaffer's own process
        names = [b"HOME", b"USER", b"LOGNAME", b"SHELL"]
        for name in own if self.uid is None else own + names:
            env.pop(name, None)
        if user is not None:
            entry = pwd.getpwnam(user)
            env.update(zip(names, map(os.fsencode, (
                entry.pw_dir, user, user, entry.pw_shell or "/bin/sh"))))
        given = template["env"]
        if template["env_file"]:
            known = {os.fsdecode(name): os.fsdecode(text) for name, text in env.items()}
            with faults_of("env_file"):
                given = {**read_env_files(template["env_file"], known), **given}
        env.update((to_bytes(name), to_bytes(str(text))) for name, text in given.items())
        for name in (b"GAFFER_TOKEN", b"GAFFER_PORT_STEP"):
            env.pop(name, None)
        with faults_of("env"):                  # there may be more processes than ports
            port = port_of(template["env"], self.instance)
        if port is not None:
            env[b"PORT"] = b"%d" % port
        if template["redirect_output"]:         # output that sits in a buffer looks lost
            env.setdefault(b"PYTHONUNBUFFERED", b"1")
        if template["custom_streams"]:
            env[b"GAFFER_STREAMS"] = ",".join(template["custom_streams"]).encode("ascii")
        if "GAFFER_INSTANCE" in "%s %s" % (template["cmd"], template["args"]):
            env[b"GAFFER_INSTANCE"] = b"%d" % self.instance     # else env may have to stand alone
        return env

    def _find(self, program):
        """Return the path of `program`, as seen from the process's own directory."""
        search = self.env.get(b"PATH", os.environb.get(b"PATH", os.fsencode(os.defpath)))
        folders = [b""] if b"/" in program else search.split(b":")
        paths = [os.path.join(self.cwd or b"", folder, program) for folder in folders]
        for path in paths:
            if os.access(path, os.X_OK) and os.path.isfile(path):
                return os.path.abspath(path)
        tried, fault = next(filter(os.path.exists, paths), paths[0]), "is not there"
        with contextlib.suppress(OSError):      # gaffer's own directory has been removed
            tried = os.path.abspath(tried)
        if os.path.isdir(tried):
            fault = "is a directory"
        elif os.path.exists(tried):
            fault = "is not executable: chmod +x it"
        elif b"/" not in program:
            tried, fault = program, "is not found in PATH"
        which = "which" if tried == program else "but " + tried.decode("utf-8", "replace")
        raise InvalidProcessInfo("field 'cmd' names %r, %s %s" % (
            program.decode("utf-8", "replace"), which, fault))


# --------------------------------------------------------------------------------------------------
# policies
#
# What to do about exits, as data and pure functions of a clock reading. The manager acts on what
# they return.
# --------------------------------------------------------------------------------------------------
BACKOFF_RESET = 10.0                            # a process that lived this long was no failure
KILL_AGAIN = 1.0                                # seconds: a group may fork while it dies
HOOK_TIME = 60.0                                # seconds that before_start and after_stop may take
HOOK_POLL = 0.1                                 # between checks whether before_start has ended
CANNOT_START = 127, 0                           # exit of what could not be executed, as in a shell
NOT_READY = -1, 0                               # of what was stopped for that: no success


def succeeded(info, end):
    """Return True if `end`, (exit status, number of the signal or 0), counts as success."""
    status, signum = end
    if signum:
        return signum in [parse_signal(each) for each in info["success"] if isinstance(each, str)]
    return status in info["success"]


def shell_status(end):
    """Return an exit as a shell counts it: its status, or 128 and the signal."""
    return 128 + end[1] if end[1] else end[0]


def ends_by_itself(info):
    """Return True if what is after a template waits until that is done, not ready."""
    return (info["restart"] != "always" and info["ready"] is None and info["numprocesses"] > 0
            and info["success"] != [])          # else it is never done


def restart_delay(info, failures):
    """Return the seconds before the next start, after `failures` in a row. Of [first, longest]:
    none, then the first, doubling to the longest."""
    delay = info["restart_delay"]
    if not isinstance(delay, list):
        return float(delay)
    if failures <= 1 or info["flapping"] and delay == OPTIONS["restart_delay"].default:
        return 0.0
    return float(min(delay[1], delay[0] * 2 ** min(failures - 2, 30)))


def after_exit(info, end, now, lived, failures, history):
    """Decide what follows an exit that nobody asked for. `end`: (exit status, signal); `lived`:
    seconds, of the oldest process of the template; `failures`: exits in a row; `history`: as
    returned last time, () at first. Return (action, seconds, history): "start" the next one after
    these seconds, "pause" the template for them, "stop" it for good, or nothing follows: "done" or
    "failed"."""
    success = succeeded(info, end)
    if info["restart"] == "never" or info["restart"] == "on-failure" and success:
        return "done" if success else "failed", 0.0, history
    flapping, delay = info["flapping"], restart_delay(info, failures)
    if flapping is None:
        return "start", delay, ()
    times, pauses = history or ((), 0)
    if lived > flapping["window"]:
        pauses = 0
    times = (*times, now)[-flapping["attempts"]:]
    if len(times) < flapping["attempts"] or now - times[0] > flapping["window"]:
        return "start", delay, (times, pauses)
    if pauses >= flapping["max_retry"]:
        return "stop", 0.0, ()
    return "pause", flapping["retry_in"], ((), pauses + 1)


def stop_steps(info):
    """Return the steps of a stop, (signal, seconds until the next) each; the last one, SIGKILL,
    repeats."""
    steps = info["stop_signal"]
    if not isinstance(steps, list):
        steps = [(steps, info["graceful_timeout"])]
    return [*((parse_signal(name), delay) for name, delay in steps), (signal.SIGKILL, KILL_AGAIN)]


def stop_time(info):
    """Return the seconds between the begin of a stop and SIGKILL."""
    return sum(delay for _, delay in stop_steps(info)[:-1])


def priority_of(info):
    """Return a template's place in the order of starts; stops go the other way."""
    return math.inf if info["priority"] is None else info["priority"]


def find_circle(name, after):
    """Return the names of a circle through `name`, which is at both ends; [] if there is none.
    `after(name)`: the names that a name is after."""
    found, before = [name], {}                  # before: each name -> the one that led to it
    for each in found:
        for other in after(each):
            if other not in before:
                before[other] = each
                found.append(other)
    if name not in before:
        return []
    circle = [name, before[name]]
    while circle[-1] != name:
        circle.append(before[circle[-1]])
    return circle[::-1]


def stop_stages(infos):
    """Return {name: stage} of templates, {name: info}, without a circle: a lower stage is stopped
    before a higher one. What is after another goes before it, else the higher priority."""
    priorities = sorted(set(map(priority_of, infos.values())), reverse=True)
    stages = {name: priorities.index(priority_of(info)) * len(infos)
              for name, info in infos.items()}
    for _ in infos:
        before = dict(stages)
        for name, info in reversed([*infos.items()]):
            for other in info["after"]:
                if other in infos:
                    stages[other] = max(stages[other], stages[name] + 1)
        if stages == before:
            break
    return stages


# --------------------------------------------------------------------------------------------------
# process
#
# One process of a template: spawned once, with a pid of gaffer's own that is never used again.
# Output moves bytes from a pipe into windows, Input from a bounded buffer into a pipe. Process is a
# state machine, with its table at the end of the class: a step changes the state, acts, and only
# then informs the manager. Exit and end of output are two events: a stream ends at the end of file,
# or soon after the group is empty if somebody outside of it holds the pipe. All of this runs under
# the loop's lock.
# --------------------------------------------------------------------------------------------------
READ_SIZE_WIDE = 128 * KIB                      # of a pipe that was full and has been widened
MERGED_LINE_DELAY = 1.0                         # before an unfinished line is cut by the others
DRAIN_TIME = 2.0                                # of output after the end of a process group
GROUP_POLL = 0.02                               # first pause between checks whether a group is gone
GROUP_POLL_MAX = 1.0                            # and the longest
PROBE_FIRST = 0.1                               # between a spawn and the first probe
PROBE_INTERVAL = 1.0                            # between a probe that failed and the next
PROBE_TIME = 5.0                                # for one probe
NOTIFY_SIZE = 4 * KIB                           # of a message of sd_notify(3)
STDIN_SIZE = MIB                                # waits for a process to read it: a whole body
SPAWN_FAULTS = (GafferError, OSError, subprocess.SubprocessError, ValueError, MemoryError)


class Merged:
    """A template's stream of one label: all its processes' output, never mixed within a line."""

    def __init__(self, loop, size, name, label, journal):
        self.window, self.name, self.label = Window(loop, size), name, label
        self.sources = set()                    # JournalSources of what is being read
        self.carried = 0                        # bytes that were read, but wait to be written here
        self._journal = journal
        self._open = None                       # JournalSource whose last line is not finished

    def open(self, pid):
        """Return a JournalSource for the output of process `pid`."""
        source = self._journal.source(self.name, pid, self.label, self.window)
        self.sources.add(source)
        return source

    def close(self, source):
        self.sources.remove(source)
        self._journal.close(source)

    def write(self, source, data):
        """Append whole lines, or what cannot wait; another's unfinished line is ended first."""
        if self._open not in (None, source):
            self.window.append(b"\n")
            if self._open in self.sources:
                self._journal.append(self._open, b"\n")
        self.carried -= len(data)
        self._open = None if data.endswith(b"\n") else source
        self.window.append(data)
        self._journal.append(source, data)


class Output:
    """Reads a pipe of process `pid`, from resume() on, into a window of its own and its template's
    `merged`. Calls `ended()` at the end."""

    def __init__(self, loop, fd, merged, pid, ended):
        self._loop, self._fd, self._merged, self._ended = loop, fd, merged, ended
        self.window = Window(loop, merged.window.limit, merged.window)
        self._source = merged.open(pid)
        self._carry = b""                       # an unfinished line that `merged` has not got yet
        self._paused = True
        self._timer = self._silence = None
        self._size = min(READ_SIZE_WIDE, self.window.limit // 4)
        os.set_blocking(fd, False)

    def resume(self):
        """Begin to read, or read on: a reader that blocks may have made room."""
        if self._paused and self._fd is not None:
            self._loop.register(self._fd, selectors.EVENT_READ, self._readable)
            self._paused = False

    def _room(self):
        """Return how much to read: at most what a reader that blocks does not lose."""
        own, merged = self.window, self._merged
        if not (own.blockers or merged.window.blockers):
            return self._size
        reserved = merged.carried + len(merged.sources)     # each may end a line of another
        return max(0, min(self._size, own.room(), merged.window.room() - reserved))

    def _readable(self, mask=None):
        """Read once. Return True if that has brought something."""
        size, merged = self._room(), self._merged
        if size == 0:
            self._loop.unregister(self._fd)
            self._paused = True
            for window in (self.window, merged.window):
                window.on_room.add(self.resume)
            return False
        try:
            data = os.read(self._fd, size)
        except BlockingIOError:
            return False
        except OSError:                         # a socket pair whose other side was reset
            data = b""
        if not data:
            self._end()
            return False
        if len(data) == READ_SIZE:
            widen_pipe(self._fd)
        self.window.append(data)
        self._carry += data
        merged.carried += len(data)
        cut = self._carry.rfind(b"\n") + 1
        if len(merged.sources) == 1 or (        # nobody to mix with, or too much to wait
                cut == 0 and len(self._carry) >= min(CARRY_SIZE, merged.window.limit // 2)):
            cut = len(self._carry)
        self._merge(cut)
        return True

    def _merge(self, cut=None):
        """Hand over `cut` bytes; what is left of a line (a prompt) after a while, without `cut`."""
        if cut is None:                         # a reader that blocks must not lose anything
            self._silence, size = None, len(self._carry)
            cut = size if size < self._merged.window.room() else 0
        data, self._carry = self._carry[:cut], self._carry[cut:]
        if data:
            self._merged.write(self._source, data)
            if self._silence is not None:       # what waits now is another line
                self._silence.cancel()
                self._silence = None
        if self._carry and self._silence is None:
            self._silence = self._loop.later(MERGED_LINE_DELAY, self._merge)

    def drain(self, late=False):
        """End in DRAIN_TIME, or once it waits for no reader: the group is gone."""
        if late and not self._paused:
            self.close()
        elif self._fd is not None:
            self._timer = self._loop.later(DRAIN_TIME, self.drain, True)

    def close(self):
        """Read what is in the pipe right now, then end the stream."""
        for _ in range(16):                     # somebody may still write
            if self._fd is None or self._room() == 0 or not self._loop.guard(self._readable):
                break
        self._end()

    def _end(self):
        if self._fd is None:
            return
        if not self._paused:
            self._loop.unregister(self._fd)
        os.close(self._fd)
        self._fd = None
        self._loop.guard(self._merge, len(self._carry))
        for timer in (self._timer, self._silence):
            if timer is not None:
                timer.cancel()
        self._merged.close(self._source)
        self.window.finish()
        ended, self._ended = self._ended, None  # or a process would be freed late
        ended()


class Input:
    """Writes into a process's stdin or custom stream as it reads; up to `limit` bytes wait.
    `close_fd(fd)` ends the stream."""

    def __init__(self, loop, fd, label, close_fd, limit=STDIN_SIZE):
        self._loop, self._fd, self._label, self._close_fd = loop, fd, label, close_fd
        self.limit = limit
        self._buffer = bytearray()              # what waits
        self._registered = self._ending = False
        self.on_low = set()                     # called once, when half of it is free again
        os.set_blocking(fd, False)

    @property
    def size(self):
        """How many bytes wait."""
        return len(self._buffer)

    def write(self, data):
        """Write all of `data`, or nothing. ForbiddenWrite: it is closed. StdinFull."""
        if self._ending:
            raise ForbiddenWrite("%s of this process is closed; start another process to write to"
                                 % self._label)
        if self.size + len(data) > self.limit:
            raise StdinFull("%d bytes wait for the process to read them; send this again later"
                            % self.size)
        self._buffer += memoryview(data)        # TypeError: a list of numbers is no data
        self._flush()
        if self._ending:
            raise ForbiddenWrite("the process has closed its %s" % self._label)

    def end(self):
        """End the stream, behind what waits."""
        self._ending = True
        self._flush()

    def close(self):
        """Drop what waits, and end the stream."""
        self._buffer.clear()
        self.end()

    def _flush(self, mask=None):
        try:
            while self._buffer:
                del self._buffer[:os.write(self._fd, self._buffer)]
        except BlockingIOError:
            pass
        except OSError:                         # EPIPE: it has closed its side
            log.info("%d bytes for %s were not read: the process closed it", self.size, self._label)
            self.close()
        if bool(self._buffer) != self._registered:
            self._registered = not self._registered
            if self._registered:
                self._loop.register(self._fd, selectors.EVENT_WRITE, self._flush)
            else:
                self._loop.unregister(self._fd)
        if self._ending and not self._buffer and self._fd is not None:
            fd, self._fd = self._fd, None
            self._close_fd(fd)
        while self.on_low and self.size <= self.limit // 2:
            self._loop.call_soon(self.on_low.pop())


def end_socket(fd):
    """Close our way into a custom stream; the way out goes on."""
    with socket.socket(fileno=fd) as side, contextlib.suppress(OSError):    # the process is gone
        side.shutdown(socket.SHUT_WR)


# Executed in place of a program that asks for what Popen has no argument for: sets it, then becomes
# the program. A shell cannot do it: its redirections take descriptors of one digit, and a signal
# that was ignored when it began stays so.
PRELUDE = """
import os, signal, sys
settings, program, *argv = sys.argv[1:]
(*fds, errors), (uid, gid, groups), ctype = eval(settings)
try:
    os.set_inheritable(errors, False)
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number, fd in enumerate(fds, 3):
        os.dup2(fd, number)
        os.close(fd)
    if groups is not None:
        os.setgroups(groups)
    if gid is not None:
        os.setgid(gid)
    if uid is not None:
        os.setuid(uid)
    os.environb.pop(b"LC_CTYPE", None)          # Python may have set it, for itself
    if ctype is not None:
        os.environb[b"LC_CTYPE"] = ctype
    os.execv(program, argv)
except OSError as error:
    os.write(errors, b"%d" % error.errno)
"""


def raise_own(launch, undo):
    """Have what only a privileged parent can pass on: higher hard limits, and a nice value below
    gaffer's own. `undo`: an ExitStack for the way back. InvalidProcessInfo."""
    try:
        for name, (_, hard) in launch.limits.items():
            number = getattr(resource, "RLIMIT_" + name.upper())
            soft, most = resource.getrlimit(number)
            wish = "field 'limits' asks for %s above gaffer's own limit of %d" % (name, most)
            if resource.RLIM_INFINITY != most < hard:
                undo.callback(resource.setrlimit, number, (soft, most))
                resource.setrlimit(number, (
                    soft, resource.RLIM_INFINITY if hard == math.inf else hard))
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        wish = "field 'nice' asks for a value below gaffer's own of %d" % nice
        if launch.nice is not None and launch.nice < nice:
            undo.callback(os.setpriority, os.PRIO_PROCESS, 0, nice)
            os.setpriority(os.PRIO_PROCESS, 0, launch.nice)
    except (OSError, ValueError):
        raise InvalidProcessInfo(
            wish + ": run gaffer as root, with the capability for that") from None


def execute(launch, fds):
    """Fork and execute a Launch, whose descriptors are to be `fds`, from 0 on. Return the system's
    pid. One of SPAWN_FAULTS: it cannot be executed."""
    argv, program = launch.argv, launch.program
    arguments: dict = {}
    identity, errors = (launch.uid, launch.gid, launch.groups), None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with contextlib.ExitStack() as after, contextlib.ExitStack() as fork:
        if fds[3:] or launch.ignored or blocked or (
                sys.version_info < (3, 9) and identity != (None, None, None)):
            errors, write = os.pipe()
            after.callback(os.close, errors)
            fork.callback(os.close, write)
            passed = []
            for fd in [*fds[3:], write]:        # above the numbers that they are to have
                passed.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(fds)))
                fork.callback(os.close, passed[-1])
            argv = [sys.executable, "-I", "-S", "-c", PRELUDE,
                    repr((passed, identity, launch.env.get(b"LC_CTYPE"))), program, *argv]
            program, arguments = sys.executable, {"pass_fds": passed}
        elif sys.version_info >= (3, 9):
            arguments = dict(zip(("user", "group", "extra_groups"), identity))
        raise_own(launch, fork)
        popen = subprocess.Popen(
            argv, executable=program, cwd=launch.cwd, env=launch.env, start_new_session=True,
            stdin=fds[0], stdout=fds[1], stderr=fds[2], **arguments)
        popen.returncode = 0                    # Popen shall neither wait nor warn
        fork.close()
        number = os.read(errors, 16) if errors is not None else b""
    if number:                                  # at its end, the program has been executed
        os.waitpid(popen.pid, 0)
        raise OSError(int(number), os.strerror(int(number)))
    return popen.pid


def spawn_error(launch, error):
    """Return the GafferError for a Launch that met one of SPAWN_FAULTS."""
    if isinstance(error, GafferError):
        return error
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number in SHORTAGES:
        return Busy("the system has no room for another process (%s); try again later"
                    % os.strerror(number))
    reason = {
        errno.ENOENT: "the interpreter that its first line names is not there",
        errno.ENOEXEC: "it is not a program: its first line must name an interpreter, as in "
                       "#!/bin/sh"}.get(number) or (os.strerror(number) if number else error)
    return InvalidProcessInfo("field 'cmd' names %r, which cannot be executed: %s" % (
        launch.program.decode("utf-8", "replace"), reason))


def pid_exists(os_pid):
    """Return True if the system has a process, or a zombie, of this number."""
    try:
        return os.getpgid(os_pid) > 0
    except ProcessLookupError:
        return False


class GroupLeader:
    """What gaffer has executed as `os_pid`, in a process group of its own, until it is `gone`.
    `title`: its name in the log."""

    gone: bool

    def __init__(self, manager, title):
        self._manager, self.title = manager, title
        self.os_pid = self.exited_at = None     # exited_at: by the loop's clock, once it is reaped
        self.abandoned = False                  # gaffer may not signal it, or it outlived SIGKILL

    def signal_group(self, signum, alone=False):
        """Send a signal to its group (0: only check), or to it `alone`. Returns False if there is
        none, or gaffer may not signal it."""
        # Once the leader is reaped, members of the group alone pin its number: a process that has
        # this is somebody else's.
        if self.exited_at is not None and pid_exists(self.os_pid):
            return False
        try:
            (os.kill if alone else os.killpg)(self.os_pid, signum)
            return True
        except ProcessLookupError:
            return False
        except PermissionError:
            self.abandon("runs as another user and cannot be signalled")
            return False

    def abandon(self, why):
        """Wait for it no longer when gaffer stops."""
        if not self.abandoned and not self.gone:
            self.abandoned = True
            log.warning("%s: os pid %d %s: it is left to itself", self.title, self.os_pid, why)
            self._manager.commands.discard(self)
            self._manager.changed()


class CommandRun(GroupLeader):
    """A shell command that runs beside the process of a Launch, with `env` (of bytes) besides and
    its output to a descriptor. Calls `done(error)` at its end: None, or what it did but exit with
    0. close() kills it."""

    gone = False

    def __init__(self, manager, launch, command, done, output=subprocess.DEVNULL, env=()):
        super().__init__(manager, "a command")
        self._done = done
        self.os_pid = execute(
            launch.hook(command, env), (subprocess.DEVNULL, output, output))
        ExitWatcher(manager.loop, self.os_pid, self._exited)
        manager.commands.add(self)

    def _exited(self, end):
        self.gone = True
        self.signal_group(signal.SIGKILL)       # what it left; the zombie pins the group's number
        reap(self.os_pid)
        self._manager.commands.discard(self)
        self._done("is killed by signal %d" % end[1] if end[1] else
                   "exits with %d" % end[0] if end[0] else None)
        self._manager.changed()

    def close(self):
        """Kill it, or leave it if that cannot be, and do not call `done`."""
        self._done = lambda error: None
        if not self.gone:                       # else the number may be another group's
            self.signal_group(signal.SIGKILL)


class GroupWatcher:
    """Takes the step "empty" of processes that have exited, once no other of their group lives.

    Nothing announces that, so it polls, less and less often, with one listing for all groups.
    """

    def __init__(self, loop, table):
        self._loop, self._table = loop, table
        self._waiting = {}                      # Process -> True if it had only zombies
        self._timer, self._cost = None, 0.0

    def add(self, process):
        """Watch the group of a process that has exited."""
        self._waiting[process] = False
        self.poll_in()

    def poll_in(self, interval=GROUP_POLL):
        """Poll in `interval` seconds, then ever later. By default soon: a group was signalled."""
        self._interval = interval
        wait = max(interval, 5 * self._cost)    # a sixth of one core at most
        if self._timer is not None and self._timer.when > self._loop.clock() + wait:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._waiting:
            self._timer = self._loop.later(wait, self._poll)

    def _poll(self):
        self._timer, began = None, self._loop.clock()
        there = {process for process in self._waiting if process.signal_group(0)}
        living = {process.os_pid for process in there}
        with contextlib.suppress(OSError):      # no descriptor is left to list them with
            living = self._table.groups(living) if living else living
        for process, had_only_zombies in list(self._waiting.items()):
            # If only zombies are left that nobody waits for, or forks that are faster than the
            # listing, a signal reaches all of them, and the next listing is to be believed.
            lives = process.os_pid in living
            if process not in there or had_only_zombies and not lives:
                del self._waiting[process]
                process.step("empty")
            else:
                self._waiting[process] = not lives
                if not lives:
                    process.signal_group(signal.SIGKILL)
        self._cost = self._loop.clock() - began
        self.poll_in(min(self._interval * 1.5, GROUP_POLL_MAX))


class Probe:
    """Asks whether the process of a Launch is ready: after PROBE_FIRST, then PROBE_INTERVAL after
    each failure, until it calls `done()`. `error` says why the last try failed, at each address.

    The addresses of "tcp" and "http" (see parse_target()) are asked in turn until one accepts, or
    answers the request with success; the command of "exec" has to exit with 0.
    """

    error = None

    def __init__(self, manager, launch, done):
        self._manager, self._loop = manager, manager.loop
        self._launch, self._done = launch, done
        self._asking = self._ask()
        self._timer = self._loop.later(PROBE_FIRST, self._try)

    def _try(self):
        self._timer = self._loop.later(PROBE_TIME, self._go_on, None, True)
        self._asking = self._ask()
        self._go_on()

    def _go_on(self, mask=None, late=False):
        try:
            if late:
                self._timer = self._loop.later(PROBE_TIME, self._go_on, None, True)
                self._asking.throw(TimeoutError("no answer in %g s" % PROBE_TIME))
            else:
                next(self._asking)
        except StopIteration:
            self._end(None)
        except SPAWN_FAULTS as error:
            self._end(str(error))

    def _ask(self):
        """Try once. Yields where it has to wait; one of SPAWN_FAULTS: it is not ready."""
        if self._launch.ready == "exec":
            with contextlib.closing(CommandRun(
                    self._manager, self._launch, self._launch.target, self._end)):
                yield                           # the command calls _end()
        addresses, request = self._launch.target
        errors = []
        for host, port in addresses:
            try:
                with contextlib.ExitStack() as ends:
                    peer = ends.enter_context(socket.socket(
                        socket.AF_INET6 if ":" in host else socket.AF_INET))
                    peer.setblocking(False)
                    self._loop.register(peer.fileno(), selectors.EVENT_WRITE, self._go_on)
                    ends.callback(self._loop.unregister, peer.fileno())
                    with contextlib.suppress(BlockingIOError):
                        peer.connect((host, port))
                    yield
                    number = peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if number:
                        raise OSError(number, os.strerror(number))
                    if peer.getsockname() == peer.getpeername():    # a port that clients get
                        raise OSError(errno.ECONNREFUSED, "it connected to itself")
                    if not request:
                        return
                    peer.send(request)
                    self._loop.modify(peer.fileno(), selectors.EVENT_READ)
                    answer, data = b"", b"HTTP"
                    while data and b"\n" not in answer and len(answer) <= READ_SIZE:
                        yield
                        data = peer.recv(READ_SIZE)
                        answer += data
                    line = answer.partition(b"\n")[0]
                    if re.match(rb"HTTP/1\.[01] [23][0-9][0-9]\b", line):
                        return
                    raise OSError(
                        errno.EPROTO, "answers %r" % line[:80].strip().decode("latin-1"))
            except OSError as error:
                errors.append("%s:%d: %s" % (host, port, error.strerror or error))
        raise ValueError("; ".join(errors))

    def _end(self, error):
        self.close()
        if error is None:
            self._done()
        else:
            self.error = error
            self._timer = self._loop.later(PROBE_INTERVAL, self._try)

    def close(self):
        self._timer.cancel()
        self._asking.close()


class NotifySocket:
    """A datagram socket for the messages of sd_notify(3) that come from the group of a Process."""

    def __init__(self, loop, process):
        self._loop, self._process = loop, process
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.address = b"@gaffer-" + os.urandom(16).hex().encode()     # abstract: it has no file
        self._socket.bind(b"\0" + self.address[1:])
        loop.register(self._socket.fileno(), selectors.EVENT_READ, self._readable)

    def _readable(self, mask):
        data, parts, flags, _ = self._socket.recvmsg(NOTIFY_SIZE, 256)
        process, sender = self._process, 0
        for _, kind, content in parts:
            if kind == socket.SCM_CREDENTIALS:
                sender = struct.unpack("3i", content)[0]
            else:                               # SCM_RIGHTS: systemd-notify waits for their end
                for fd, in struct.iter_unpack("i", content[:len(content) // 4 * 4]):
                    os.close(fd)
        with contextlib.suppress(ProcessLookupError):   # it has ended, and may be a stranger
            if sender and os.getpgid(sender) == process.os_pid and not flags & socket.MSG_TRUNC:
                lines = data.decode("utf-8", "replace").split("\n")
                fields = dict(line.partition("=")[::2] for line in lines)
                process.message = fields.get("STATUS", process.message)
                process.ending = process.ending or fields.get("STOPPING") == "1"
                if fields.get("READY") == "1":
                    process.step("ready")

    def close(self):
        self._loop.unregister(self._socket.fileno())
        self._socket.close()


class Process(GroupLeader):
    """A process: from its spawn until nothing of its group is left, and then while its output can
    be read. `pid` is gaffer's number of it; `os_pid`, `exit_status` and `term_signal` are the
    system's. `home`: its Template."""

    def __init__(self, pid, home, manager):
        self.pid, self.home, self.name, self.info = pid, home, home.name, home.info
        super().__init__(manager, "%s (pid %d)" % (self.name, pid))
        self._loop = manager.loop
        self.outputs, self.inputs = {}, {}      # label -> Output, Input
        self.started = self.exit_status = self.term_signal = None
        self.instance = None                    # its number among those of its template
        starting = self.info["ready"] or self.info["before_start"]
        self.state = "starting" if starting else "running"      # see LIFE
        self.message = None                     # the last STATUS= that it sent
        self.ending = False                     # it sent STOPPING=1
        self.overdue = None                     # why it was stopped: it did not get ready
        self.by_itself = False                  # it exited without having been asked to
        self.retry_after = 0.0                  # seconds until the next start; None: there is none
        self.last_exit = None                   # as its template's
        self.cpu_samples = {}                   # asker -> its last (time, cpu_time, percent)
        self.history = collections.deque(maxlen=60)     # [cpu, rss], see History
        self.on_exit = set()                    # called once
        self._until_exit = contextlib.ExitStack()       # closes what serves the running process
        self._stop_steps = home.steps           # those that are left; the last one repeats
        self._signalled = None                  # the signal of the last of them that was taken
        self._watcher = self._timer = self._probe = None
        self.launch = None                      # what it was spawned from, until it is gone
        self._hook = self._hook_output = None   # of after_stop

    # its start

    def spawn(self, launch):
        """Execute `launch`. InvalidProcessInfo: it cannot be executed. Busy: the system has no room
        for another process."""
        template, loop, fds = self.info, self._loop, [subprocess.DEVNULL] * 3

        def read(label, fd):
            self.outputs[label] = Output(
                loop, fd, self.home.outputs[label], self.pid, self._check_ended)
        try:                                    # all that may fail comes before there is a process
            for number, label in enumerate(template["redirect_output"], 1):
                fds[number] = fds[1]            # for the same label twice
                if label not in self.outputs:
                    near, fds[number] = os.pipe()
                    read(label, near)
            if template["redirect_input"]:
                fds[0], near = os.pipe()
                self.inputs["stdin"] = Input(loop, near, "stdin", os.close)
            for label in template["custom_streams"]:
                near, far = (side.detach() for side in socket.socketpair())
                fds.append(far)
                read(label, near)
                self.inputs[label] = Input(loop, os.dup(near), label, end_socket)
            for output in self.outputs.values():
                output.resume()
            self.started, self.instance = loop.clock(), launch.instance
            if launch.ready == "notify":
                notify = NotifySocket(loop, self)
                self._until_exit.callback(notify.close)
                launch.env[b"NOTIFY_SOCKET"] = notify.address
            self.os_pid, self.launch = execute(launch, fds), launch
        except SPAWN_FAULTS as error:
            self.release()
            raise spawn_error(launch, error) from error
        finally:
            for fd in set(fds) - {subprocess.DEVNULL}:
                os.close(fd)
        self._watcher = ExitWatcher(loop, self.os_pid, functools.partial(self.step, "exit"))
        if template["before_start"] is not None:
            loop.later(HOOK_POLL, self._check_before_start, launch)
        if launch.ready:
            self._timer = loop.later(template["ready"]["within"], self.step, "overdue")
        if launch.ready in ("tcp", "http", "exec"):
            self._probe = Probe(self._manager, launch, functools.partial(self.step, "ready"))
            self._until_exit.callback(self._probe.close)
        elif launch.ready == "log":
            for label in set(template["redirect_output"]):
                self._match(self.outputs[label].window, to_bytes(launch.target))

    def _match(self, window, text):
        """Take the step "ready" once a whole line of a window has `text`."""
        rest, offset = b"", 0                   # what counts of the data that was read before

        def satisfied():
            nonlocal rest, offset
            data, offset = rest + window.read(offset, window.end - offset), window.end
            place = data.find(text)
            rest = data[max(0, len(data) - len(text) + 1):] if place < 0 else text
            if place >= 0 and re.search(b"[\r\n]", data[place:]):
                self.step("ready")
            return self.state != "starting" or window.ended
        window.wait(satisfied)

    def _check_before_start(self, launch):
        """Become ready, without a 'ready', when before_start has ended. It has HOOK_TIME."""
        if self.exited:
            return
        seen, words = self._manager.table.sample(self.os_pid), b" ".join(launch.argv)
        if not seen or seen["cmdline"].rstrip() != words.decode("utf-8", "replace").rstrip():
            if launch.ready is None:
                self.step("ready")
        elif self.age() < HOOK_TIME:
            self._loop.later(HOOK_POLL, self._check_before_start, launch)
        else:
            log.warning("%s: before_start did not end in %d seconds and is killed",
                        self.title, HOOK_TIME)
            self.signal_group(signal.SIGKILL)

    # its life

    def step(self, event, *args):
        """Take the step of LIFE for `event`: change the state, act, then inform. An event that has
        no step in this state is ignored."""
        if (self.state, event) in self.LIFE:
            self.state, act = self.LIFE[self.state, event]
            # the steps of a stop go on after the exit
            if self._timer is not None and (event != "exit" or self._signalled is None):
                self._timer.cancel()
                self._timer = None
            act(self, *args)
            if self._probe is not None and self.state != "starting":
                self._probe.close()
                self._probe = None

    def _stop_overdue(self):
        self.by_itself, self.overdue = True, "not ready (%s) within %g seconds%s" % (
            ready_text(self.info), self.info["ready"]["within"],
            ": " + self.not_ready if self.not_ready else "")
        self._signal_stop()
        self._manager.process_overdue(self)

    def _signal_stop(self):
        """Take the next step of its stop."""
        (signum, delay), *later = self._stop_steps
        self._stop_steps = later or self._stop_steps
        self._signalled = signum
        # without stop_group, a master ends its workers itself
        alone = not (signum == signal.SIGKILL or self.exited or self.info["stop_group"])
        if self.signal_group(signum, alone) and signum != signal.SIGKILL:
            self.signal_group(signal.SIGCONT, alone)    # what is stopped could not act on it
        if self.killed:
            self._manager.changed()
        if not self.abandoned:
            self._timer = self._loop.later(delay, self.step, "late")
        self._manager.groups.poll_in()

    def _kill(self):
        self._stop_steps = self._stop_steps[-1:]
        self._signal_stop()

    def _exit(self, end):
        self._watcher = None
        self.exit_status, self.term_signal = end
        if self._signalled is None:             # the zombie still pins the group's number
            self.by_itself = True
            self._signal_stop()
        elif not self.info["stop_group"]:       # what it left has not been told yet
            self.signal_group(self._signalled)
        reap(self.os_pid)
        self.exited_at = self._loop.clock()
        for stream in self.inputs.values():
            stream.close()
        self._until_exit.close()
        remains = self.signal_group(0)
        if remains:
            self._manager.groups.add(self)
        while self.on_exit:
            self._loop.call_soon(self.on_exit.pop())
        self._manager.process_exited(self, remains)
        if not remains:
            self.step("empty")
        self._check_ended()

    def _check_ended(self):
        if self.ended:
            self._manager.process_ended(self)

    def _after_stop(self):
        """Run after_stop, if there is one: nothing is left of the group. Its output is the
        template's."""
        for output in self.outputs.values():
            output.drain()
        command = self.info["after_stop"]
        if command is None or self._manager.killing:
            return self._hook_ended(command and "is not run: gaffer was told to end at once")
        write = subprocess.DEVNULL
        try:
            for merged in [*self.home.outputs.values()][-1:]:
                read, write = os.pipe()
                self._hook_output = Output(self._loop, read, merged, self.pid, lambda: None)
                self._hook_output.resume()
            env = {b"GAFFER_EXIT_STATUS": b"%d" % self.exit_status,
                   b"GAFFER_TERM_SIGNAL": b"%d" % self.term_signal}
            self._hook = CommandRun(self._manager, self.launch, command, self._hook_ended, write,
                                    env)
            self._timer = self._loop.later(HOOK_TIME, self.step, "late")
        except SPAWN_FAULTS as error:
            self._hook_ended("cannot be run: %s" % error)
        finally:
            if write != subprocess.DEVNULL:
                os.close(write)
        return None

    def _kill_hook(self):
        self._hook.close()
        self._hook_ended("was killed before it ended")

    def _hook_ended(self, failure):
        """Take the step "clean": after_stop has ended, with a `failure` or None."""
        said = ""
        if self._hook_output is not None:
            self._hook_output.close()
            window = self._hook_output.window
            said = window.read(max(window.start, window.end - KIB)).decode("utf-8", "replace")
        if failure is not None:
            self.home.hint = "after_stop " + ": ".join(filter(None, (failure, said.strip())))
            log.warning("%s: %s", self.title, self.home.hint)
        self.step("clean")

    def release(self):
        """Close its streams and stop watching it, as gaffer ends."""
        self._until_exit.close()
        for stream in filter(None, [
                *self.inputs.values(), *self.outputs.values(), self._hook_output]):
            stream.close()
        if self._watcher is not None:
            self._watcher.close()

    # what others may ask and do at any time

    @property
    def running(self):
        """True until it has exited or is being stopped."""
        return self.state in ("starting", "running")

    @property
    def ready(self):
        """True while it runs, is ready, and has not sent STOPPING=1."""
        return self.state == "running" and not self.ending

    @property
    def not_ready(self):
        """Why the last check of its readiness failed, or None."""
        return self._probe and self._probe.error

    @property
    def exited(self):
        """True once it has exited: its number may be somebody else's."""
        return self.state in ("exited", "cleaning", "gone")

    @property
    def ended(self):
        """True once it has exited, and its output has been read."""
        return self.exited and all(output.window.ended for output in self.outputs.values())

    @property
    def killed(self):
        """True once its group was sent SIGKILL, until it has ended."""
        return self._signalled == signal.SIGKILL and self.state != "cleaning"

    @property
    def gone(self):                             # type: ignore[override]
        """True once nothing of its group is left, and its after_stop has ended."""
        return self.state == "gone"

    @property
    def end(self):
        """(exit status, signal), as `restart` judges it."""
        return NOT_READY if self.overdue else (self.exit_status, self.term_signal)

    def age(self):
        """Return the seconds since its start, or how long it lived."""
        return (self._loop.clock() if self.exited_at is None else self.exited_at) - self.started

    def status(self):
        """Return its part of GET /status/<name>."""
        more = {}
        if not self.running and self._timer is not None:
            when = self._timer.when
            if self.state != "cleaning":
                when += sum(delay for _, delay in self._stop_steps[:-1])
            more["kill_in"] = round(max(0.0, when - self._loop.clock()), 3)
        return dict(more, pid=self.pid, os_pid=self.os_pid, instance=self.instance,
                    uptime=round(self.age(), 3), ready=self.ready, message=self.message,
                    not_ready=self.not_ready,
                    state=self.state if self.running else "stopping")

    def signal(self, signum, group=False):
        """Send a signal to the process, or to its whole group. Forbidden."""
        if group and self.state == "exited":
            self.signal_group(signum)           # what is left of it is being stopped
        elif not self.exited:
            try:
                (os.killpg if group else os.kill)(self.os_pid, signum)
            except ProcessLookupError:
                pass                            # it has just exited
            except PermissionError:
                raise Forbidden("process %d runs as a user that gaffer may not signal"
                                % self.pid) from None

    # (state, event): (next state, what is done). stop and kill come from the manager, ready and
    # overdue from its readiness, late when a stop takes too long, exit when the leader has exited,
    # empty when its group has no member left, clean when after_stop has ended.
    LIFE = {(state, event): (following, act) for states, event, following, act in (
        ("starting", "ready", "running", lambda self: self._manager.process_ready(self)),
        ("starting", "overdue", "stopping", _stop_overdue),
        ("starting running", "stop", "stopping", _signal_stop),
        ("starting running stopping", "kill", "stopping", _kill),
        ("starting running stopping", "exit", "exited", _exit),
        ("stopping", "late", "stopping", _signal_stop),
        ("exited", "late", "exited", _signal_stop),
        ("exited", "kill", "exited", _kill),
        ("exited", "empty", "cleaning", _after_stop),
        ("cleaning", "late", "cleaning", _kill_hook),
        ("cleaning", "kill", "cleaning", _kill_hook),
        ("cleaning", "clean", "gone", lambda self: self._manager.process_gone(self)),
    ) for state in states.split()}


# --------------------------------------------------------------------------------------------------
# manager
#
# What is wanted is in the templates, what there is in their processes; _reconcile() closes the gap
# and is called after every change of either. A public method is the implementation: its decorator
# takes the loop's lock, so that any thread may call it. Methods with an underscore, those that a
# process calls and Template's need the lock. Observers run by loop.call_unlocked() alone.
# --------------------------------------------------------------------------------------------------
JOURNAL_WINDOWS = 4                             # windows that a long poll of the journal may fill
AFTERLIFE = 60.0                                # the output of an exited process stays readable
AFTERLIFE_COUNT = 16                            # and of how many exits at most
TEMPLATES_MAX = 10000
STOP_KILL = 10.0                                # after a second signal, gaffer ends whatever runs
STOP_SEND = 2.0                                 # for a client to take some of what is left
STOP_SEND_TOTAL = 20.0                          # for all of them
EVENT_TYPES = ("create", "start", "stop", "restart", "update", "delete", "flap", "done", "fail",
               "skip", "spawn", "ready", "reap", "exit", "stop_pid")
SPAWN_TIME = 0.002                              # seconds of spawning in one turn of the loop
LAUNCHES_KEPT = 32                              # of processes that run; each takes 10 KiB
PAUSED = 0                                      # in Template.pending: no slot is filled
# whose Launch is made anew for each process: it depends on more than the template and its program
VOLATILE = "env_file", "uid", "gid", "umask", "nice", "limits", "before_start"


def parse_pattern(parts):
    """Return (type, name) of an event pattern, None where anything matches: [], ["."], [type],
    ["proc", name], ["proc", name, type]. BadEventType."""
    parts, name = [part for part in parts if part not in ("", ".")], None
    if parts[:1] == ["proc"]:
        name, parts = "".join(parts[1:2]), parts[2:]
    if len(parts) > 1 or name == "":
        raise BadEventType("a pattern is empty, <type> or proc/<name>[/<type>]")
    kind = parts[0] if parts else None
    if kind not in (None, *EVENT_TYPES):
        raise BadEventType("there is no event type %r%s; types are %s" % (
            kind, near(kind, EVENT_TYPES), " ".join(EVENT_TYPES)))
    return kind, name


def matches(pattern, event):
    """Return True if the pattern (type, name) asks for `event`."""
    return pattern[0] in (None, event["event"]) and pattern[1] in (None, event["name"])


class Template:
    """A process template at work: what is wanted (`info`, `active`) and what there is of it."""

    pid, os_pid, ended = None, None, False      # as a Process has them

    def __init__(self, info, manager):
        self._manager = manager
        self.name = info["name"]
        self.group = self.name.partition(":")[0] if ":" in self.name else None
        self.active = self.deleted = False
        self.processes = {}                     # pid -> Process: not gone, oldest first
        self.pending = {}                       # instance or PAUSED -> Timer: filled after it
        self.alarm = None                       # Timer: until the next time of its schedule
        self.outputs = {}                       # label -> Merged
        self.begins = {}                        # Window -> where its last run begins
        self.past = {}                          # pid -> instance of the last that are gone
        self.restarts = self.spawned = 0
        self.exits = collections.Counter()      # (exit_status, term_signal) -> how many
        self.last_exit = None                   # {pid, exit_status, term_signal, time, times}
        self.error = None                       # why the last spawn failed
        self.report = Throttle()
        self.replace(info)

    def replace(self, info):
        """Take new options, and forget what came of the old ones. Streams whose labels stay go
        on."""
        self.info = info
        self.schedule = None if info["schedule"] is None else Schedule(info["schedule"])
        self.steps = stop_steps(info)
        self.volatile = any(info[field] != OPTIONS[field].default for field in VOLATILE)
        self.due = self.schedule is None        # False: it waits for a time of its schedule
        self.forget_waits()
        self.begin()
        labels = [*info["redirect_output"], *info["custom_streams"]]
        for label in self.outputs.keys() - set(labels):
            self.outputs.pop(label).window.finish()
        for label in labels:
            if label not in self.outputs:
                self.outputs[label] = Merged(self._manager.loop, self._manager.window_size,
                                            self.name, label, self._manager.journal)

    def forget_waits(self):
        """Cancel all later starts."""
        for timer in filter(None, [*self.pending.values(), self.alarm]):
            timer.cancel()
        self.pending, self.alarm = {}, None
        self.next_runs = []                     # of its schedule: the next five, Unix times

    def begin(self):
        """Forget what came of earlier runs. What is not gone yet is no part of the next."""
        self.gave_up = False                    # it flapped, and was stopped for good
        self.outcome = None                     # of its last run: "done" or "failed"
        self.end = None                         # {exit_status, term_signal} of that
        self.finished = {}                      # instance -> its exit, which nothing follows
        self.tries = 0                          # exits and failed spawns since its start
        self.failures = {}                      # instance -> exits in a row, which a spawn follows
        self.launches = {}                      # instance -> Launch of what has exited by itself
        self.history = ()                       # see after_exit()
        self.hint = None                        # what its user should change
        for process in self.processes.values():
            process.by_itself = False

    def running(self):
        """Return the processes that run and are not being stopped, oldest first."""
        return [process for process in self.processes.values() if process.running]

    def free_instance(self):
        """Return the lowest number, from 1, that no process has, is to have, or had in this run."""
        taken = {*self.finished, *self.pending}
        taken.update(process.instance for process in self.processes.values())
        return next(number for number in itertools.count(1) if number not in taken)

    def wanted(self):
        """Return how many processes there are to be."""
        return self.info["numprocesses"] if self.active and self.due else 0

    def lacking(self):
        """Return how many processes it lacks. A slot is kept until its process is gone."""
        if PAUSED in self.pending:
            return 0
        return self.wanted() - len(self.processes) - len(self.pending) - len(self.finished)

    def missing(self):
        """Return how many processes have to be spawned now."""
        return 0 if self.unmet() else self.lacking()

    def ready(self):
        """Return True if as many processes as are wanted are ready, or it is done."""
        return self.outcome == "done" or self.active and self.wanted() <= len(
            self.finished) + sum(process.ready for process in self.processes.values())

    def unmet(self):
        """Return the names of templates it is `after` that are not ready, or done, yet."""
        names = []
        for name in self.info["after"]:
            other = self._manager.templates.get(name)
            if other is None or not (other.outcome == "done" if ends_by_itself(other.info) else
                                     other.ready()):
                names.append(name)
        return names

    def waits_for(self):
        """Return the names of templates that keep it from spawning what it lacks."""
        return self.unmet() if self.lacking() > 0 else []

    def check_goal(self, goal):
        """Return whether it is `goal`: "ready", "done" or "stopped". Conflict: it never will be,
        with why and its last lines of output."""
        state, other = self.state(), None
        if {"ready": self.ready(), "done": self.outcome == "done",
                "stopped": state in ("stopped", "done", "failed")}[goal]:
            return True
        if goal == "done" and self.active and self.info["restart"] == "always":
            raise Conflict("'%s' is started again whenever it ends: its 'restart' is 'always'"
                           % self.name)
        if goal == "done" and state == "scheduled" and self.outcome == "failed":
            other = self                        # the next run may be far away
        elif goal != "stopped":
            other = self.find_blocker()
        # its last lines may still have to be read
        if other is None or any(merged.sources for merged in other.outputs.values()):
            return False
        reason = "is stopped; start it"
        if other.deleted:
            reason = "has been deleted"
        elif other.outcome or other.gave_up:
            reason = "has failed: " + other.last_failure()
        waits = "" if other is self else "'%s' waits for '%s', and " % (self.name, other.name)
        raise Conflict("%s'%s' %s%s" % (waits, other.name, reason, other.last_lines()))

    def find_blocker(self, unknown=False):
        """Return the template that has to be started before this one can run, itself or one that it
        waits for; or None. `unknown`: also one that waits for a name that does not exist."""
        waiting, seen, templates = [self], set(), self._manager.templates
        for other in waiting:                   # it grows meanwhile
            if other.deleted or not other.active and other.outcome != "done":
                return other
            names = set(other.waits_for() if other.processes else other.unmet()) - seen
            if unknown and not names <= templates.keys():
                return other
            seen |= names
            waiting += [templates[name] for name in names & templates.keys()]
        return None

    def delay_reason(self):
        """Return why it is not ready yet, and its last lines, to go on with a sentence."""
        if self.ready():
            return ""
        checks = [process.not_ready for process in self.running() if process.not_ready]
        reason = "; its last check: " + checks[0] if checks else ""
        if self.waits_for():
            reason += "; it waits for " + ", ".join(self.waits_for())
        if self.error or self.last_exit:
            reason += "; it last ended with: " + self.last_failure()
        return reason + self.last_lines()

    def last_failure(self):
        """Return how its last run or process ended, or why that could not be spawned."""
        end = self.end or self.last_exit
        return self.error or ("signal %d" % end["term_signal"] if end["term_signal"] else
                              "exit status %d" % end["exit_status"])

    def last_lines(self):
        """Return the last lines of output of the last run."""
        text = b"".join(
            window.read(max(window.tail(10), window.end - 4 * KIB, begin), 4 * KIB)
            for window, begin in self.begins.items()).decode("utf-8", "replace").rstrip()
        return "; its last lines:\n" + text if text else ""

    def state(self):
        """Return one word: waiting, starting, running, backoff, flapping, stopping, stopped,
        scheduled, done, failed."""
        if self.pending:
            return "flapping" if PAUSED in self.pending else "backoff"
        running = self.running()
        if running:
            return "running" if all(process.ready for process in running) else "starting"
        if self.processes:
            return "stopping"
        if not self.active:
            return self.outcome or "stopped"
        if not self.due:
            return "scheduled"
        if not self.info["numprocesses"]:
            return "stopped"
        return "waiting" if self.unmet() else "starting"

    def status(self):
        """Return the answer of GET /status/<name>."""
        running, now = self.running(), self._manager.loop.clock()
        waits = sorted(round(max(0.0, timer.when - now), 3) for timer in self.pending.values())
        return {
            "name": self.name, "active": self.active, "running": len(running),
            "numprocesses": self.info["numprocesses"], "max_processes": self.info["numprocesses"],
            "state": self.state(), "past": self.past,
            "stopping": len(self.processes) - len(running),
            "pids": [process.pid for process in running],
            "os_pids": [process.os_pid for process in running], "restarts": self.restarts,
            "last_exit": self.last_exit, "next_try": waits[0] if waits else None,
            "next_tries": waits,
            "ready": self.ready(), "waiting": self.waits_for(),
            "message": next((process.message for process in reversed(running)), None),
            "next_runs": self.next_runs,
            "uptime": round(running[0].age() if running else 0, 3), "gave_up": self.gave_up,
            "outcome": self.outcome, "error": self.error, "hint": self.hint,
            "graceful_timeout": stop_time(self.info),
        }


class Subscription:
    """What subscribe() and monitor_io() return: calls `callback(type, event)` on the loop's thread,
    without its lock, with each of `events(data)` of what comes in a log, until close()."""

    def __init__(self, source, events, callback):
        self._log, self._events, self._callback = source, events, callback
        self._offset = source.end
        self._cancel = source.wait(self._deliver)

    def _deliver(self):
        source, offset = self._log, self._offset
        self._offset = source.end
        for event in self._events(source.read(offset, source.end - offset)):
            source.loop.call_unlocked(lambda event=event: self._callback(event["event"], event))
        return source.ended

    def close(self):
        """Have no further call begin, from any thread."""
        self._callback = lambda kind, event: None
        with contextlib.suppress(Stopping):     # it has ended with the manager
            self._log.loop.call(self._cancel)


class ProcessHandle:
    """What add_process() and get_process() return: one process (`pid`) or, by name, whatever a
    template runs. Any thread may call it."""

    def __init__(self, manager, name, pid=None, os_pid=None):
        self._manager, self._target = manager, pid or name
        self.name, self.pid, self.os_pid = name, pid, os_pid

    def info(self):
        """Return the template as a dict, with pid and os_pid if it is one process. NotFound."""
        return self._manager.info(self._target)

    def monitor_io(self, label, callback):
        """Call `callback(label, event)` on the loop's thread with all output of `label` from now
        on; event is a dict with event, name, data (bytes) and, for one process, pid and os_pid.
        Returns a Subscription. NotFound, BadRequest."""
        manager, facts = self._manager, {"name": self.name, "event": label}
        if self.pid is not None:
            facts.update(pid=self.pid, os_pid=self.os_pid)
        return manager.loop.call(lambda: Subscription(
            manager.find_window(self._target, label),
            lambda data: [dict(facts, data=data)] if data else [], callback))

    def write(self, data, label="stdin"):
        """Write bytes to its stdin, all or nothing. By name: to the one process that the template
        has. ForbiddenWrite, StdinFull, NotFound."""
        self._manager.write(self._target, label, data)

    def stop(self):
        """Stop it: a process is replaced while its template is active, a template stays stopped."""
        self._manager.stop_process(self._target)

    def signal(self, signum, group=False):
        """Send a signal to it: a number, a name or a signal.Signals. BadValue, Forbidden."""
        self._manager.signal(self._target, parse_signal(signum), group)

    def wait(self, timeout=None):
        """Block until nothing of a process's group is left, or a template neither runs nor will be
        started. Returns the last exit, {"exit_status", "term_signal", …}, or None if there was
        none. WaitTimeout: it takes longer than `timeout` seconds."""
        manager = self._manager
        if manager.on_loop_thread():
            raise RuntimeError("this would wait for its own thread; wait on another one")
        target = manager.loop.call(manager.find, self._target, True)
        if not manager.block_until(lambda: (
                target.check_goal("stopped") if self.pid is None else target.gone), timeout):
            raise WaitTimeout("%s has not ended in %g seconds; it goes on" % (self.name, timeout))
        return target.last_exit


def changing(method):
    """on_loop() for a method that changes something: Stopping while gaffer stops."""
    @on_loop
    @functools.wraps(method)
    def call(self, *args, **options):
        if self.stopping:
            raise Stopping("gaffer is stopping; start it again")
        return method(self, *args, **options)
    return call


def starting(method):
    """changing() for a method that starts processes of the template `name`: its caller gets the
    result once they have been spawned, or at once on the loop's thread."""
    @changing
    def locked(self, name, *args, **options):
        result, template = method(self, name, *args, **options), self.templates.get(name)
        return result, template, template and template.spawned + template.missing()

    @functools.wraps(method)
    def call(self, name, *args, **options):
        result, template, goal = locked(self, name, *args, **options)
        if template is not None and not self.on_loop_thread():
            # those that are spawned may end as fast as others follow
            self.block_until(
                lambda: template.spawned >= goal or template not in self._to_spawn)
        return result
    return call


class Manager:
    """Keeps processes running. `apps`: objects with start(loop, manager), and maybe stop() and
    restart(). `window_size`: bytes kept of each stream. `exit_with`: the name of a template, there
    or yet to come: once a process of it has ended by itself, run() stops all and returns, and
    `exit_code` is its status, or 128 and the signal. `exit_when_done`: the same once nothing can
    run any more, with the status of the first failure, else 0. Any thread may call the methods, a
    signal handler stop() alone."""

    def __init__(self, apps=(), window_size=WINDOW_SIZE, loop=None, exit_with=None,
                 exit_when_done=False):
        if window_size < WINDOW_SIZE_MIN:       # nothing could be read from a pipe
            raise ValueError("a window of %d bytes is too small; give %d or more" % (
                window_size, WINDOW_SIZE_MIN))
        self.loop = loop or Loop()
        self.apps, self._started_apps = list(apps), []
        self.window_size = window_size
        self.exit_with, self.exit_when_done, self.exit_code = exit_with, exit_when_done, 0
        self.table = ProcfsTable()
        self.groups = GroupWatcher(self.loop, self.table)
        self.epoch = os.urandom(4).hex()        # a word for this run, in every id
        self.started_at = time.time()
        self.templates = {}
        self.processes = {}                     # pid -> Process: all that can still be asked for
        self.commands = set()                   # CommandRuns that have not ended
        self.events = EventLog(self.loop)
        self.journal = Journal(self.loop, JOURNAL_WINDOWS * window_size)
        self.configuration = None               # what POST /_reload loads again
        self.stopping = self.killing = False
        self._running = False
        self._has_run = False                   # something has ended, or was there at the start
        self._thread = None                     # the loop's, while run() runs
        self._next_pid = 1
        self._changes = Log(self.loop, 0)       # holds nothing: for those that wait for a change
        self._timer, self._pause = None, 0.0    # Timer of changed(); what _settle() took
        self._to_spawn = {}                     # Template -> None: those that miss a process
        self._stages = {}                       # see stop_stages()
        self._report = Throttle()

    # look-ups, for the owner of the lock

    def find_template(self, name):
        """Return a Template. NotFound."""
        if name not in self.templates:
            raise NotFound("there is no process named '%s'%s" % (
                name[:128], near(name, self.templates) or "; GET /processes lists them"))
        return self.templates[name]

    def find_process(self, pid, past=False):
        """Return a running process by pid; `past`: or one that can still be read. NotFound."""
        text = str(pid)
        process = self.processes.get(int(text)) if re.fullmatch("[1-9][0-9]{,18}", text) else None
        if process is None or not (past or process.running):
            raise NotFound("there is no process %s; GET /processes?running=true lists them"
                           % text[:20])
        return process

    def find(self, target, past=False):
        """Return the Template of a name, or a Process as find_process() does. NotFound."""
        if str(target).isdigit():               # no name is
            return self.find_process(target, past)
        return self.find_template(target)

    def find_one(self, target):
        """Return a process by pid, also an exited one, or by name the one that a template has.
        NotFound."""
        found = self.find(target, past=True)
        if found.pid is not None:
            return found
        running = found.running()
        if len(running) != 1:
            raise NotFound("'%s' has %d processes, and this is for one: give a pid; "
                           "GET /processes/%s/_pids lists them" % (target, len(running), target))
        return running[0]

    def find_window(self, target, label):
        """Return the Window of a stream by pid or name, and label. BadRequest, NotFound."""
        found = self.find(target, past=True)
        if label in found.outputs:
            return found.outputs[label].window
        if not found.info["redirect_output"] and label in ("stdout", "stderr"):
            raise BadRequest("the output of '%s' is not redirected; set 'redirect_output'"
                             % found.name, code="io_not_redirected")
        raise NotFound("'%s' has no stream '%s'; it has %s" % (
            found.name, label, ", ".join(found.outputs) or "none"), code="io_not_found")

    def find_input(self, target, label):
        """Return the Input of a process by label. ForbiddenWrite, NotFound."""
        process = self.find_one(target)
        if label in process.inputs:
            return process.inputs[label]
        if label == "stdin":
            raise ForbiddenWrite("stdin of '%s' is not redirected; set 'redirect_input'"
                                 % process.name)
        raise NotFound("'%s' has no stream '%s' that could be written to" % (process.name, label),
                       code="io_not_found")

    @on_loop
    def not_ready(self):
        """Return the names of active templates that are not ready."""
        return [name for name, template in self.templates.items()
                if template.active and not template.ready()]

    @on_loop
    def get_process(self, target):
        """Return a ProcessHandle for a template's name or a pid. NotFound."""
        found = self.find(target)
        return ProcessHandle(self, found.name, found.pid, found.os_pid)

    @on_loop
    def info(self, target):
        """Return a template as a dict, by name; by pid the one that the process runs, with pid and
        os_pid. NotFound."""
        found = self.find(target)
        info = copy.deepcopy(found.info)
        if found.pid is not None:
            info.update(pid=found.pid, os_pid=found.os_pid)
        return info

    # events and waits

    @on_loop
    def subscribe(self, pattern, callback):
        """Call `callback(type, event)` on the loop's thread for each event that `pattern` ("",
        "exit", "proc/web", "proc/web/exit") matches. Returns a Subscription. BadEventType."""
        wanted = parse_pattern(pattern.split("/"))
        return Subscription(self.events, lambda events: [
            dict(event) for event in events if matches(wanted, event)], callback)

    def _publish(self, kind, name, process=None, **more):
        event = {"event": kind, "name": name, "id": "%d@%s" % (self.events.end + 1, self.epoch),
                 "time": time.time()}
        if process is not None:
            event.update(pid=process.pid, os_pid=process.os_pid)
        event.update(more)
        self.loop.guard(self.events.append, event)      # no observer has a part in any life
        self._has_run = self._has_run or kind in ("exit", "done", "fail", "stop")
        self.changed()

    @on_loop
    def wait_until(self, satisfied):
        """Call `satisfied()` under the lock, soon and after each change, until it returns True.
        Returns a function that ends it."""
        self.changed()
        return self._changes.wait(satisfied)

    def changed(self):
        """Have done what follows from a change, once for all changes of a turn."""
        if self._timer is None:
            self._timer = self.loop.later(self._pause, self._settle)

    def _settle(self):
        self._timer, began = None, self.loop.clock()
        self._changes.feed()
        for template in self.templates.values():        # what it is after may be ready or done
            if template.info["after"] and template.missing() > 0:
                self._reconcile(template)
        if self.exit_when_done and self._has_run and not (self.stopping or self._alive()):
            active = [template for template in self.templates.values()
                      if template.active and template.state() != "stopped"]
            if all(template.find_blocker(unknown=True) for template in active):
                for template in active:
                    log.error("'%s' has not run: it waits for %s", template.name,
                              ", ".join(template.unmet()))
                    self.exit_code = self.exit_code or 1
                log.info("all is done: gaffer exits with %d", self.exit_code)
                self._stop(False)
        if self.stopping and self._running:     # stages wait for those before: gone or killed
            alive = self._alive()
            waiting = [each for each in alive if not each.killed]
            first = min((self._stages[each.name] for each in waiting), default=0)
            self._end([each for each in reversed(waiting)       # newest first
                       if self._stages[each.name] == first])
            if not alive and not self.commands:
                self.loop.stop()
        self._pause = self.loop.clock() - began     # half of the time is for others

    def on_loop_thread(self):
        """Return True if the calling thread must not wait for the loop."""
        return self.loop.owned() or threading.get_ident() == self._thread

    def block_until(self, done, timeout=None):
        """Block the calling thread until `done()`, asked under the lock, is true or run() ends.
        Returns False after `timeout` seconds."""
        event = threading.Event()

        def satisfied():
            if self.stopping and not self._running or done():
                event.set()
            return event.is_set()
        try:
            cancel = self.loop.call(lambda: satisfied() or self.wait_until(satisfied))
        except Stopping:                        # run() has ended meanwhile
            return True
        if event.wait(timeout):
            return True
        self.loop.call(cancel)
        return False

    # what is wanted beside what there is

    def _reconcile(self, template):
        if not self._running or self.stopping:
            return
        while template.pending and template.lacking() < 0:
            template.pending.popitem()[1].cancel()
        scheduled = template.schedule is not None
        if template.finished and template.lacking() <= 0 and not (
                template.processes or template.pending):        # it is done, or has failed
            ends = list(template.finished.values())
            failures = [end for end in ends if not succeeded(template.info, end)]
            template.outcome, template.finished = "failed" if failures else "done", {}
            template.end = dict(zip(("exit_status", "term_signal"), (failures or ends)[0]))
            template.active, template.due = scheduled, not scheduled
            if failures:
                self._note_failure(failures[0])
            self._publish("fail" if failures else "done", template.name, **template.end,
                          tries=template.tries)
        elif scheduled and not (template.wanted() or template.processes):
            template.due = False                # a run of no process has ended
        if scheduled and template.active and template.alarm is None:
            now = time.time()
            # what is still there: the alarm was early
            template.next_runs = sorted({*template.next_runs, *template.schedule.next_times(now)})
            del template.next_runs[5:]
            template.alarm = self.loop.later(template.next_runs[0] - now, self._begin_run, template)
        running = template.running()
        self._end(running[:max(0, len(running) - template.wanted())], "reap")
        if template.missing() > 0:
            if not self._to_spawn:
                self.loop.call_soon(self._spawn_some)
            self._to_spawn.setdefault(template)

    def _spawn_some(self):
        """Spawn what is missing, for SPAWN_TIME in each turn, so that others have theirs."""
        until = self.loop.clock() + SPAWN_TIME
        while self._to_spawn:
            template = next(iter(self._to_spawn))
            spawned = template.missing() > 0 and self._respawn(template)
            if template.missing() <= 0 or not spawned and template.pending:
                del self._to_spawn[template]
            if self.loop.clock() > until:
                break
        if self._to_spawn:
            self.loop.call_soon(self._spawn_some)
        self.changed()

    def _respawn(self, template):
        """Spawn a process that nobody waits for. Returns False if it failed, and is tried again
        later."""
        instance, process = template.free_instance(), None
        failures = template.failures.get(instance, 0)
        try:
            if instance in template.launches:   # a tenth of the time of a restart
                with contextlib.suppress(InvalidProcessInfo):   # the system has changed meanwhile
                    process = self._spawn(template, template.launches.pop(instance))
            if process is None:
                process = self._spawn(template, Launch(template.info, instance))
        except (GafferError, OSError, ValueError, MemoryError) as error:
            template.error, delay = str(error), 0.0
            if isinstance(error, (Busy, MemoryError)):      # of what the system has: no flapping
                self._report.warning("%s cannot be started: %s", template.name, error)
            else:
                template.report.warning("%s cannot be started: %s", template.name, error)
                delay = self._apply_policy(template, CANNOT_START, 0.0, 1)
            if delay is None:
                template.finished[instance] = CANNOT_START
                self._reconcile(template)
            elif template.missing() > 0:        # with a delay also if it flaps: nothing took time
                delay = restart_delay(dict(template.info, flapping=None), failures + 2)
                template.failures[instance] = failures + 1
                self._postpone(template, instance, delay)
            return False
        if failures:                            # it may end at once again: others go before it
            self._to_spawn[template] = self._to_spawn.pop(template)
        self._publish("spawn", template.name, process)
        return True

    def _spawn(self, template, launch):
        """Return a new process of `template`, running. The caller publishes it."""
        process = Process(self._next_pid, template, self)
        if not (template.processes or template.finished):
            template.begins = {
                merged.window: merged.window.end for merged in template.outputs.values()}
        process.spawn(launch)
        if len(self.processes) >= LAUNCHES_KEPT and process.info["after_stop"] is None:
            process.launch = None
        self._next_pid += 1
        self.processes[process.pid] = template.processes[process.pid] = process
        template.spawned += 1
        template.error = None
        return process

    def _postpone(self, template, key, delay):
        """Fill a slot, or with the key PAUSED any, after `delay` seconds."""
        def due():
            del template.pending[key]
            self._reconcile(template)
        template.pending[key] = self.loop.later(delay, due)

    def _end(self, processes, kind="stop_pid", step="stop"):
        """Begin to stop processes, and publish an event of each that ran."""
        for process in processes:
            running = process.running
            process.step(step)
            if running:
                self._publish(kind, process.name, process)

    def _stop_template(self, template):
        template.forget_waits()
        template.finished = {}
        if template.active:
            template.active, template.outcome = False, None     # of a schedule's last run
            self._publish("stop", template.name)
        self._end(template.running())

    def _apply_policy(self, template, end, lived, failures):
        """Decide what follows an exit or a failed spawn. Returns the seconds until the next try;
        None: there is none."""
        if not template.active:
            return 0.0
        template.tries += 1
        oldest = max([lived, *(process.age() for process in template.running())])
        action, delay, history = after_exit(
            template.info, end, self.loop.clock(), oldest, failures, template.history)
        if action in ("done", "failed") or action == "stop" and template.schedule is not None:
            return None
        if PAUSED in template.pending:          # what exits meanwhile does not count
            return 0.0
        template.history = history
        if action == "pause":
            while template.pending:
                template.pending.popitem()[1].cancel()
            template.failures = {}
            self._postpone(template, PAUSED, delay)
            self._publish("flap", template.name)
        elif action == "stop":
            template.gave_up = True
            self._note_failure(end)
            self._stop_template(template)
        return delay

    def _begin_run(self, template):
        """Begin a run of a schedule. The clock may have been set back, or have passed several times
        at once, which the timer does not know."""
        template.alarm = None
        if time.time() >= template.next_runs[0]:
            template.next_runs = []
            if template.due:
                self._publish("skip", template.name)
            else:
                template.begin()
                template.due = True
                self._publish("start", template.name)
        self._reconcile(template)

    def _note_failure(self, end):
        if self.exit_when_done and not self.exit_code:
            self.exit_code = shell_status(end) or 1

    def _own_pids(self):
        """Return the system's pids of all that gaffer has started and waits for."""
        return {each.os_pid for each in [*self.processes.values(), *self.commands] if not each.gone}

    # what a process tells

    def process_ready(self, process):
        """A process has become ready."""
        if process.info["ready"]:
            self._publish("ready", process.name, process, by=ready_text(process.info),
                          seconds=round(process.age(), 3))
        self.changed()

    def process_overdue(self, process):
        """A process was not ready in time, and is being stopped."""
        process.home.error = process.overdue
        self._publish("stop_pid", process.name, process, reason=process.overdue)

    def process_exited(self, process, remains):
        """A process has exited; `remains`: others of its group have not."""
        template, last, age = process.home, process.home.last_exit, process.age()
        end = {"exit_status": process.exit_status, "term_signal": process.term_signal}
        template.exits[process.exit_status, process.term_signal] += 1
        again = process.by_itself and last is not None and end.items() <= last.items()
        process.last_exit = template.last_exit = {
            "pid": process.pid, **end, "time": time.time(),
            "times": last["times"] + 1 if again else 1}
        more = {"reason": process.overdue} if process.overdue else {}
        failures = template.failures.pop(process.instance, 0)
        if process.by_itself:
            failures = 1 if age >= BACKOFF_RESET else failures + 1
            template.failures[process.instance], template.hint = failures, None
            if process.end == (0, 0) and age < BACKOFF_RESET and (remains or self.loop.guard(
                    self.table.orphans, process.started, self._own_pids())):
                template.hint = more["hint"] = (
                    "it exited with success and left a process behind: it seems to daemonize; "
                    "have it stay in the foreground, so that it can be watched and stopped")
        self._publish("exit", process.name, process, **end, **more)
        if process.by_itself:
            process.retry_after = self._apply_policy(template, process.end, age, failures)

    def process_ended(self, process):
        """A process has exited, and all its output has been read."""
        self.journal.exit(process.name, process.pid, process.exit_status, process.term_signal)
        self.changed()

    def process_gone(self, process):
        """Nothing of a process's group is left: its slot is free."""
        template, launch, process.launch = process.home, process.launch, None
        template.processes.pop(process.pid, None)
        if template.deleted or not process.outputs:
            del self.processes[process.pid]
        else:                                   # its output can be read for a while
            template.past[process.pid] = process.instance
            if len(template.past) > max(AFTERLIFE_COUNT, 2 * template.info["numprocesses"]):
                oldest = next(iter(template.past))
                del template.past[oldest]
                self.processes.pop(oldest, None)
            self.loop.later(AFTERLIFE, self.processes.pop, process.pid, None)
        if process.name == self.exit_with and process.by_itself and not self.stopping:
            self.exit_code = shell_status(process.end)
            log.info("%s has ended: gaffer exits with %d", process.name, self.exit_code)
            self._stop(False)
        if template.active:
            if process.by_itself and process.retry_after is None:
                template.finished[process.instance] = process.end
            elif process.by_itself:
                template.restarts += 1
                if launch is not None and not template.volatile:
                    template.launches[process.instance] = launch
                delay = process.exited_at + process.retry_after - self.loop.clock()
                if delay > 0 and template.missing() > 0:
                    self._postpone(template, process.instance, delay)
            self._reconcile(template)
        self.changed()

    # changes

    def add_process(self, name, cmd=None, *, dry_run=False, **options):
        """Add a template, and start it, in run(), unless start=False. `options`: fields of a
        template. `name` may be a dict of them, too. `dry_run`: only check. Returns its
        ProcessHandle. InvalidProcessInfo, Conflict, Busy."""
        fields = name if isinstance(name, dict) else {"name": name, "cmd": cmd}
        info = check_template({**fields, **options})
        return self._add(info["name"], info, dry_run)

    def _check_circle(self, info):
        after = {name: template.info["after"] for name, template in self.templates.items()}
        after[info["name"]] = info["after"]
        circle = find_circle(info["name"], lambda name: after.get(name, ()))
        if circle:
            raise InvalidProcessInfo("field 'after' makes a circle: %s" % " after ".join(circle))

    @starting
    def _add(self, name, info, dry_run):
        if name in self.templates:
            raise Conflict("the name '%s' is taken; update its template, or delete it" % name)
        if len(self.templates) >= TEMPLATES_MAX:
            raise Busy("there are %d templates; delete one first" % TEMPLATES_MAX)
        self._check_circle(info)
        template = Template(info, self)
        launch = Launch(info) if info["start"] else None
        if not dry_run:
            self._activate(template, launch, template.due, "create")
        return ProcessHandle(self, name)

    def _activate(self, template, launch, due, change=None):
        """Start a template, if there is a `launch`, with its first process; if that cannot be
        spawned, nothing has happened. `due`: not at a time of its schedule, but now. `change`: the
        event to publish before those of the start."""
        was, first = (template.active, template.due), None
        template.active, template.due = launch is not None, due
        if self._running and template.missing() > 0:
            try:
                first = self._spawn(template, launch)
            except GafferError:
                template.active, template.due = was
                raise
        template.begin()
        self.templates[template.name] = template
        if change is not None:
            self._publish(change, template.name)
        if template.active and due and self._running:
            self._publish("start", template.name)
        if first is not None:
            self._publish("spawn", template.name, first)
        self._reconcile(template)

    @starting
    def update_process(self, name, fields, create=False, dry_run=False):
        """Make a template as `fields` say; "name" and "start" may be left out. Its processes are
        stopped and, if it is active, replaced, unless only ADJUSTABLE fields change. `create`: add
        it if it is not there; `dry_run`: only check. Returns "created", "changed" or "unchanged".
        InvalidProcessInfo, NotFound."""
        info = check_template({"name": name, **fields} if isinstance(fields, dict) else fields)
        if info["name"] != name:
            raise InvalidProcessInfo("field 'name' is '%s', but this is '%s'; add a new template "
                                     "instead" % (info["name"], name))
        if create and name not in self.templates:
            self._add(name, info, dry_run)
            return "created"
        template = self.find_template(name)
        # what has ended by itself was not stopped, and nobody wants it to run again either
        active = was = template.active or template.outcome is not None
        if "start" in fields:
            active = info["start"]
        else:
            info["start"] = template.info["start"]
        changes = {field for field in OPTIONS if info[field] != template.info[field]}
        replaced = not changes <= set(ADJUSTABLE)
        if not changes and was >= active:       # also one that was started though it need not be
            return "unchanged"
        self._check_circle(info)
        begins = active and (replaced or not was)
        if begins:
            Launch(info)
        if dry_run:
            return "changed"
        old, template.info = template.info, info
        if replaced:
            template.replace(info)
        update = "update" if changes else None
        if begins and not template.active:
            try:
                launch = Launch(info, template.free_instance())
                self._activate(template, launch, template.schedule is None, update)
            except GafferError:                 # refused: it stays as it was
                template.replace(old)
                raise
            return "changed"
        if changes:
            self._publish("update", name)
        if not active:
            self._stop_template(template)
        elif replaced:
            self._end(template.running())
        self._reconcile(template)
        return "changed"

    @starting
    def scale(self, name, change):
        """Change numprocesses by `change`, within 0 and its limit. Returns the new number.
        NotFound."""
        fields = dict(self.find_template(name).info)
        del fields["start"]                     # it stays as active as it is
        number = min(NUMPROCESSES_MAX, max(0, fields["numprocesses"] + change))
        self.update_process(name, dict(fields, numprocesses=number))
        return number

    @changing
    def delete_process(self, name):
        """Stop a template's processes and forget it; its name is free at once. NotFound."""
        template = self.find_template(name)
        self._stop_template(template)
        del self.templates[name]
        template.deleted = True
        for pid in template.past:
            self.processes.pop(pid, None)
        self._publish("delete", name)
        for merged in template.outputs.values():
            merged.window.finish()
        self.journal.finish(name)

    @starting
    def start_template(self, name):
        """Let a template run, now also if it has a schedule. InvalidProcessInfo: it cannot be
        executed, and stays as it was. NotFound."""
        template = self.find_template(name)
        if not (template.active and template.due):
            self._activate(template, Launch(template.info, template.free_instance()), True)

    @changing
    def stop_template(self, name):
        """Stop a template's processes; they stay stopped. NotFound."""
        self._stop_template(self.find_template(name))

    @starting
    def restart_template(self, name):
        """Stop each process, and replace it once it is gone; start a stopped template. NotFound,
        InvalidProcessInfo."""
        template = self.find_template(name)
        if not template.active:
            self.start_template(name)
            return
        Launch(template.info)
        template.forget_waits()
        template.begin()
        template.due = True
        self._publish("restart", name)
        self._end(template.running())
        self._reconcile(template)

    @staticmethod
    def for_each(names, act):
        """Call `act(name)` for each, and return what the last one returned. What some refuse is
        raised after the others had their turn. InvalidProcessInfo, or what it is if it is alone."""
        answer, faults = None, []
        for name in names:
            try:
                answer = act(name)
            except GafferError as error:
                if len(names) == 1:
                    raise
                faults.append("'%s': %s" % (name, error))
        if faults:
            raise InvalidProcessInfo("; ".join(faults))
        return answer

    @changing
    def stop_process(self, target):
        """Stop one process by pid (it is replaced), or a template by name. NotFound."""
        found = self.find(target)
        if found.pid is None:
            self._stop_template(found)
        else:
            self._end([found])

    @changing
    def signal(self, target, signum, group=False):
        """Send a signal to one process by pid, or to each of a template's. NotFound, Forbidden."""
        found = self.find(target, past=True)
        if found.pid is None:                   # one that is being stopped may need a stronger one
            processes = list(found.processes.values())
        elif found.gone or found.exited and not group:
            raise NotFound("process %s has exited" % target)
        else:
            processes = [found]
        for process in processes:
            process.signal(signum, group)

    @changing
    def write(self, target, label, data):
        """Write bytes to a process's stdin or custom stream, all or nothing. ForbiddenWrite,
        StdinFull, NotFound."""
        self.find_input(target, label).write(data)

    @changing
    def end_input(self, target, label):
        """End a process's stdin or custom stream, behind what waits. Does nothing if it is closed.
        ForbiddenWrite, NotFound."""
        self.find_input(target, label).end()

    # from the start to the end

    def run(self):
        """Start the apps and all active templates, by priority, and serve until stop(), on this
        thread. Raises what an app's start() raises, with nothing left running; RuntimeError: it
        runs already, or has run."""
        if self._thread is not None or self.loop.closed:
            raise RuntimeError("this manager runs already, or has run; make another one")
        self._thread = threading.get_ident()
        bytes(MIB)      # once freed, glibc keeps what is shorter: 20 % of the CPU of fast streams
        with contextlib.ExitStack() as ends:    # from the last one up, whatever they raise
            ends.callback(self._call_apps, "join")
            ends.callback(self.loop.close)
            ends.callback(setattr, self, "_thread", None)
            ends.enter_context(self.loop.interrupts())
            ends.callback(self._call_apps, "stop")
            ends.callback(self._finish)
            ends.callback(self._stop_all)
            for app in self.apps:
                app.start(self.loop, self)
                self._started_apps.append(app)
            self.loop.call(self._begin)
            self.loop.run()

    def _begin(self):
        self._running, self._has_run = True, bool(self.templates)
        for template in sorted(self.templates.values(), key=lambda each: priority_of(each.info)):
            if template.active and template.due:
                self._publish("start", template.name)
            self._reconcile(template)
        self.changed()

    def _stop_all(self):
        while self.loop.call(self._alive):      # an exception, such as KeyboardInterrupt
            self.loop.call(self._stop, False)
            with contextlib.suppress(SystemExit):       # an observer may raise it at each exit
                self.loop.run()

    def _call_apps(self, method):
        """Call a method of all apps that have it, the last one first; then raise what one did."""
        with contextlib.ExitStack() as calls:
            for app in self._started_apps:
                calls.callback(getattr(app, method, lambda: None))

    def stop(self, kill=False):
        """Stop all processes, those of the highest priority first, then let run() return. `kill`:
        at once. Any thread may call it, and a signal handler."""
        self.loop.call_soon(self._stop, kill)

    def _stop(self, kill):
        if not self.stopping:
            self._changes.feed()                # what has been reached by now counts
            self.stopping = True
            for template in self.templates.values():
                template.forget_waits()
                if template.active:
                    template.active = False
                    self._publish("stop", template.name)
            homes = [*(each.home for each in self._alive()), *self.templates.values()]
            self._stages = stop_stages({home.name: home.info for home in homes})
        if kill:
            self.killing = True
            for process in reversed(self._alive()):
                self._end([process], step="kill")
                # one that waits for a device cannot be killed
                self.loop.later(STOP_KILL, process.abandon, "was killed but does not end")
        self.changed()

    def _alive(self):
        return [process for process in self.processes.values()
                if not (process.gone or process.abandoned
                        or process.info["detach"] and process.running)]

    def _finish(self):
        self.loop.call(self._end_streams)
        self._call_apps("finish")
        self.loop.call(self._await_clients, [], 0.0, self.loop.clock() + STOP_SEND_TOTAL)
        self.loop.run()                         # until all is sent

    def _end_streams(self):
        """End all streams: nothing is left to run, also if run() failed."""
        self.stopping, self._running = True, False
        for process in list(self.processes.values()):
            if not process.gone and not process.info["detach"]:
                process.step("kill")
            process.release()
        for template in self.templates.values():
            template.forget_waits()
            for merged in template.outputs.values():
                merged.window.finish()
        self.journal.finish()
        self.events.finish()

    def _await_clients(self, before, until, end):
        """Stop the loop once all is sent, or no client takes more, or all was to be killed."""
        self._changes.feed()                    # those of the last requests, too
        sending = [app.sending for app in self._started_apps if getattr(app, "sending", None)]
        now = self.loop.clock()
        if sending != before:                   # somebody has taken some of it
            until = min(now + STOP_SEND, end)
        if sending and not self.killing and now < until:
            self.loop.later(STOP_SEND / 200, self._await_clients, sending, until, end)
        else:
            self.loop.stop()

    def restart(self):
        """Restart all active templates, then the apps that can be. InvalidProcessInfo: some could
        not be, after all others have been."""
        names = self.loop.call(lambda: [
            name for name, template in self.templates.items() if template.active])
        try:
            self.for_each(names, self.restart_template)
        finally:
            self._call_apps("restart")

    @on_loop
    def reap_orphans(self):
        """As pid 1: reap what was no process of ours, but whose parents have ended before it."""
        ours = self._own_pids()
        for os_pid in self.table.children(os.getpid()):
            if os_pid not in ours:
                reap(os_pid)


# --------------------------------------------------------------------------------------------------
# http codec
#
# HTTP/1.1 as RFC 9110 and 9112 define it, strictly: a request has one meaning or is refused.
# Reading is a function of a buffered binary file, everything else of values.
# --------------------------------------------------------------------------------------------------
HEAD_SIZE = 64 * KIB                            # with the empty line at its end
TARGET_SIZE = 8 * KIB                           # what browsers send at most
REQUEST_LINE_SIZE = TARGET_SIZE + 64            # with a method and a version
HEADERS_MAX = 100
EMPTY_LINES_MAX = 8                             # before a request: old clients send one
CHUNK_LINE_SIZE = 256                           # a chunk's size and its extensions
CHUNK_EXTRAS_SIZE = 8 * KIB                     # extensions and trailers of a body; both ignored
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
OTHER_METHODS = ("PATCH", "TRACE", "CONNECT")   # known, but no resource has them
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(r"(%s) ([\x21\x22\x24-\x7e]+) HTTP/([0-9]+)\.([0-9])" % TOKEN)
HEADER_LINES = re.compile(r"(?:%s:[\t\x20-\x7e\x80-\xff]*\r\n)*" % TOKEN)
BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
SINGLE_HEADERS = frozenset(
    "host content-length transfer-encoding content-type authorization origin last-event-id expect "
    "upgrade sec-websocket-key sec-websocket-version content-encoding".split())
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::([0-9]{0,5}))?\Z")
CHUNK_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\Z")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^/?#\s:@*\[\]]+)(?::([0-9]{1,5}))?\Z")
DEFAULT_PORTS = {"http": 80, "https": 443}


def check_percents(what, text):
    """Raise BadRequest unless `text` is percent-encoded UTF-8."""
    if BAD_PERCENT.search(text):
        raise BadRequest("a %% in the %s must be followed by two hexadecimal digits" % what)
    try:
        urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest("the %s must be percent-encoded UTF-8" % what) from None


class Request:
    """A request.

    method, target, path (percent-encoded, with its leading /), raw_query, version (1, 0) or (1, 1),
    headers {lower-case name: value; repeated ones joined by ", "}, body (bytes), client
    ("address:port" or "unix"), secure (whether it came over TLS).
    """

    def __init__(self, method, target, version, headers, body=b"", client="", secure=False):
        self.method, self.target, self.version, self.headers = method, target, version, headers
        self.body, self.client, self.secure = body, client, secure
        self.path, _, self.raw_query = target.partition("?")

    @functools.cached_property
    def query(self):
        """The query as {name: value}. Raises BadRequest: a name is repeated, or badly encoded.

        Names that begin with _ may be repeated: they only get around caches.
        """
        query = {}
        if not self.raw_query:
            return query
        check_percents("query", self.raw_query)
        try:
            pairs = urllib.parse.parse_qsl(
                self.raw_query, keep_blank_values=True, max_num_fields=100)
        except ValueError:
            raise BadRequest("the query has more than 100 fields; send fewer") from None
        for name, value in pairs:
            if name in query and not name.startswith("_"):
                raise BadRequest("the query has %r twice; give it once" % name[:40])
            query[name] = value
        return query

    def json(self):
        """Return the body as a JSON value. Raises BadRequest."""
        def refuse(word):
            raise ValueError("%s is not a JSON value" % word)

        def unique(pairs):
            value = dict(pairs)
            if len(value) < len(pairs):
                raise ValueError("an object has a name twice")
            return value
        try:
            return json.loads(self.body.decode("utf-8"), parse_constant=refuse,
                              object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise BadRequest("the body is not JSON in UTF-8: %s" % str(error)[:200],
                             code="invalid_json") from None

    def words(self, name):
        """Return the words of a header that is a list, in lower case."""
        return [word.strip() for word in self.headers.get(name, "").lower().split(",")]

    def wants_close(self):
        """Return whether the connection ends after the answer (RFC 9112 section 9.3)."""
        words = self.words("connection")
        return "close" in words or self.version == (1, 0) and "keep-alive" not in words


def split_path(path):
    """Return the parts of a path, each percent-decoded once, so an encoded / does not divide them.

    Raises BadRequest.
    """
    check_percents("path", path)
    parts = path.split("/")[1:]
    if parts and parts[-1] == "":
        parts.pop()                             # a trailing / is the same resource
    return list(map(urllib.parse.unquote, parts))


def parse_headers(text):
    """Return {name: value} of header lines, each with its CR LF.

    Raises BadRequest, HeadersTooLarge. RFC 9110 section 5, RFC 9112 section 5.
    """
    if not HEADER_LINES.fullmatch(text):
        raise BadRequest("a header line must be 'Name: value', without a space before the colon, "
                         "folding or control characters")
    lines = text.split("\r\n")[:-1]
    if len(lines) > HEADERS_MAX:
        raise HeadersTooLarge("there are more than %d headers; send fewer" % HEADERS_MAX)
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in SINGLE_HEADERS:
                raise BadRequest("the header %s is given twice; give it once" % name)
            value = headers[name] + ("; " if name == "cookie" else ", ") + value    # RFC 6265 5.4
        headers[name] = value
    return headers


def parse_head(head):
    """Return the Request that a head announces, given without its empty line.

    Raises BadRequest, UriTooLong, HeadersTooLarge. RFC 9112 sections 3 and 5.
    """
    line, _, rest = head.decode("latin-1").partition("\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequest("the first line must be 'METHOD /path HTTP/1.1', without a #")
    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequest("use HTTP/1.1", status=505)
    if len(target) > TARGET_SIZE:
        raise UriTooLong("the request target is over %d bytes; shorten it" % TARGET_SIZE)
    version = (1, 0) if minor == "0" else (1, 1)
    headers = parse_headers(rest + "\r\n" if rest else "")
    if "host" not in headers and version == (1, 1):
        raise BadRequest("the Host header is missing (RFC 9112 section 3.2)")
    if target[0] != "/" and (target != "*" or method != "OPTIONS"):
        match = re.match(r"https?://([^/?#]*)(/?)(.*)\Z", target, re.I)     # section 3.2.2
        if match is None:
            raise BadRequest("the request target must begin with /")
        if not HOST.match(headers.get("host", match.group(1))):
            raise BadRequest("the Host header must be host or host:port")
        headers["host"], target = match.group(1), "/" + match.group(3)
    return Request(method, target, version, headers)


known_head = functools.lru_cache(256)(parse_head)   # a client that polls sends the same again


def known_request(head):
    """Do as parse_head() does, faster for a head that was seen before."""
    known = known_head(head)
    return Request(known.method, known.target, known.version, dict(known.headers))


def read_line(file, limit, error, reason):
    """Return a line without its CR LF.

    Raises `error(reason)` if it is over `limit` bytes, BadRequest if it ends otherwise; EOFError.
    """
    line = file.readline(limit + 2)
    if line.endswith(b"\r\n"):
        return line[:-2]
    if line.endswith(b"\n"):
        raise BadRequest("every line must end with CR LF")
    if len(line) < limit + 2:
        raise EOFError("a request was not complete")
    raise error(reason)


def read_request(file):
    """Read a head from a buffered binary file. Return its Request. RFC 9112 section 2.2.

    Raises BadRequest, UriTooLong, HeadersTooLarge; EOFError: it ends before.
    """
    for _ in range(EMPTY_LINES_MAX + 1):
        line = read_line(file, REQUEST_LINE_SIZE, UriTooLong,
                         "the request line is over %d bytes; shorten it" % REQUEST_LINE_SIZE)
        if line:
            break
    else:
        raise BadRequest("send a request, not empty lines")
    lines, left = [], HEAD_SIZE - 4             # without the empty line
    while line:
        lines.append(line)
        left -= len(line) + 2
        line = read_line(file, max(0, left), HeadersTooLarge,
                         "the head is over %d bytes; send less" % HEAD_SIZE)
    return parse_head(b"\r\n".join(lines))


def has_body(request):
    """Return whether a head announces a body, even an empty one. RFC 9112 section 6.3."""
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def body_length(request, limit):
    """Return the length in bytes of the body that a head announces; None: it comes in chunks.

    Raises BadRequest, TooLarge, GafferError. RFC 9110 sections 8.4 and 10.1.1, RFC 9112 section 6.
    """
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise GafferError("send the body as it is, without Content-Encoding",
                          status=415, code="unsupported_media_type")
    expectation = headers.get("expect", "100-continue").lower()
    if expectation != "100-continue" and request.version == (1, 1):
        raise BadRequest("the only expectation known here is 100-continue", status=417)
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or request.version == (1, 0) or coding.lower() != "chunked":
            raise BadRequest("send Content-Length, or in HTTP/1.1 'Transfer-Encoding: chunked'")
        return None
    if length is None:
        return 0
    if not re.fullmatch("[0-9]+", length):
        raise BadRequest("Content-Length must be a decimal number")
    size = int(length.lstrip("0")[:19] or 0)    # longer ones are too large, too
    if size > limit:
        raise TooLarge("the body is over %d bytes; send less" % limit)
    return size


def read_body(file, length, limit):
    """Read a body of `length` bytes, or if that is None a chunked one of up to `limit` bytes.

    Raises BadRequest, TooLarge; EOFError: the file ends too early. RFC 9112 section 7.1.
    """
    if length is not None:
        body = file.read(length)
        if len(body) < length:
            raise EOFError("a body was not complete")
        return body
    body, left, size = bytearray(), CHUNK_EXTRAS_SIZE, None
    too_long = BadRequest, "a line of the chunked body is too long"
    while size != 0:
        line = read_line(file, CHUNK_LINE_SIZE, *too_long)
        match = CHUNK_SIZE_LINE.match(line)
        if match is None:
            raise BadRequest("a chunk must begin with its size in hexadecimal digits")
        left -= len(line) - match.end(1)
        if left < 0:
            raise BadRequest("chunk extensions are ignored here; send none")
        size = int(match.group(1), 16)
        if len(body) + size > limit:
            raise TooLarge("the body is over %d bytes; send less" % limit)
        data = file.read(size + 2) if size else b"\r\n"
        if not b"\r\n".startswith(data[size:]):
            raise BadRequest("a chunk is longer than its size says")
        if len(data) < size + 2:
            raise EOFError("a body was not complete")
        body += data[:-2]
    while line:                                 # trailers are checked and ignored
        line = read_line(file, max(0, left), *too_long)
        if line:
            parse_headers(line.decode("latin-1") + "\r\n")
            left -= len(line) + 2
    return bytes(body)


REASONS = {status.value: status.phrase for status in HTTPStatus}


def encode_head(status, headers):
    """Return a response head.

    Raises ValueError if a header holds CR, LF or NUL (response splitting), or is not latin-1.
    """
    lines = ["HTTP/1.1 %d %s" % (status, REASONS.get(status, "Unknown")),
             *["%s: %s" % (name, value) for name, value in headers]]
    text = "".join(lines)
    if "\r" in text or "\n" in text or "\0" in text:
        raise ValueError("a response header holds CR, LF or NUL")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def merge_headers(headers, more):
    """Return `headers` and those of `more` that are not there yet; Vary is joined."""
    merged = list(headers)
    names = {name.lower(): index for index, (name, _) in enumerate(merged)}
    for name, value in more:
        index = names.get(name.lower())
        if index is None:
            merged.append((name, value))
        elif name == "Vary" and value.lower() not in re.split(r"[\s,]+", merged[index][1].lower()):
            merged[index] = name, "%s, %s" % (merged[index][1], value)
    return merged


class Response:
    """An answer: status, headers [(name, value)] but for those of its framing, body (bytes).

    None as the body: that of HEAD, if its length is not known.
    """

    def __init__(self, body=b"", status=200, headers=(), content_type="application/json"):
        self.status, self.body, self.headers = status, body, list(headers)
        if content_type and status != 204:
            # what a process prints must not run as a script because a page says so
            self.headers[:0] = [
                ("Content-Type", content_type), ("X-Content-Type-Options", "nosniff")]


encode_json = json.JSONEncoder(allow_nan=False).encode


def json_bytes(value):
    """Return JSON and one newline."""
    return (encode_json(value) + "\n").encode("ascii")


def json_response(value, status=200, headers=()):
    """Return a Response of a JSON value."""
    return Response(json_bytes(value), status, headers)


def error_response(error):
    """Return the Response to a GafferError."""
    return json_response({"error": error.code, "reason": str(error)}, error.status, error.headers)


def attempt(function, *args):
    """Return what `function(*args)` returns, or the Response to what it raises.

    Of an exception that is not a GafferError, the log alone tells more.
    """
    try:
        return function(*args)
    except GafferError as error:
        return error_response(error)
    except Exception:
        log.exception("a request failed")
        return error_response(GafferError("gaffer itself has failed; its log says how"))


def parse_origin(text):
    """Return (scheme, host, port) of an origin, the default port filled in, or None. RFC 6454."""
    match = ORIGIN.match(text.lower())
    if match is None:
        return None
    scheme, host, port = match.groups()
    return scheme, host, int(port) if port else DEFAULT_PORTS.get(scheme)


class Access:
    """Who may do what, as pure checks of a request's head: Host, Origin, token.

    `origins`: those allowed beside the server's own and this machine's, "*" for all. `hosts`: names
    of this server beside its addresses. `token`: what every request must bring, or None.
    """

    def __init__(self, token=None, origins=(), hosts=()):
        if token is not None and (not token or token != token.strip()):
            raise ValueError("a token is not empty, and has no blanks at its ends, which no header "
                             "would keep; strip it, or give None")
        self._token = None if token is None else token.encode("utf-8")
        self._any_origin = "*" in origins
        self._origins = {parse_origin(text.rstrip("/")): text for text in origins if text != "*"}
        if None in self._origins:               # it would never match, and nobody would know why
            raise StartError("'%s' is not an origin; give https://host, http://host:port or '*'" %
                             self._origins[None])
        # a quick request takes 40 us with this, 42.5 without
        self._check_name = functools.lru_cache(64)(self._check_name)
        self._hosts = frozenset(host.rstrip(".").lower() for host in hosts)
        for host in self._hosts:
            if not re.fullmatch(r"\[[0-9a-f:.]+\]|[a-z0-9_-][a-z0-9._-]*", host):
                raise StartError("'%s' is not a host; give a name without a port" % host)

    def check_host(self, request):
        """Refuse names that anybody could point here: DNS rebinding would let any page in.

        Raises BadRequest, Forbidden. RFC 9110 section 7.2. No page can reach a unix socket.
        """
        value = request.headers.get("host")
        if value is not None and request.client != "unix":  # only HTTP/1.0 may leave it out
            self._check_name(value)

    def _check_name(self, value):
        match = HOST.match(value)
        if not match or int(match.group(2) or 0) > 65535:
            raise BadRequest("the Host header must be host or host:port")
        host = match.group(1).lower()
        if host.endswith("."):
            host = host[:-1]
        if host == "localhost" or host.endswith(".localhost") or host in self._hosts:
            return
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        try:
            address = socket.inet_pton(family, host.strip("[]"))
        except OSError:
            if family == socket.AF_INET6:
                raise BadRequest("the Host header has no IPv6 address in its brackets") from None
            address = b""
        if not (any(address[:10]) or any(address[-4:])):    # [::ffff:0.0.0.0] is 0.0.0.0, too
            raise Forbidden("this server is not called %r; use its address, or start it with "
                            "--allow-host" % host[:100], code="forbidden_host")

    def allows_origin(self, request):
        """Return whether the request has no Origin, or one that may change something.

        The server's own is http or https, as TLS may end at a proxy, with the Host or one of
        `hosts`.
        """
        text = request.headers.get("origin")
        if text is None or self._any_origin:
            return True
        origin = parse_origin(text)
        if origin is None or origin in self._origins or origin[0] not in DEFAULT_PORTS:
            return origin in self._origins
        scheme, host, port = origin
        own = parse_origin("%s://%s" % (scheme, request.headers.get("host", "")))
        return (origin == own or host in ("localhost", "127.0.0.1", "[::1]")
                or host in self._hosts and port == DEFAULT_PORTS[scheme])

    def check_origin(self, request):
        """Raise Forbidden: a page of another origin changes something, or one of another site
        embeds this, as an image or a script.

        Browsers send no Origin with the latter. The page could hold up a process, or learn from
        success and failure what exists. Fetch Metadata Request Headers, W3C.
        """
        headers, is_read = request.headers, request.method in ("GET", "HEAD")
        if (not is_read or "upgrade" in headers) and not self.allows_origin(request):
            raise Forbidden("pages of another origin may not change anything here; allow it with "
                            "--cors-origin", code="forbidden_origin")
        kind = headers.get("sec-fetch-dest") or headers.get("sec-fetch-mode")   # Chromium 76
        embeds = not is_read or kind not in ("document", "navigate")
        if (embeds and headers.get("sec-fetch-site") == "cross-site" and "origin" not in headers
                and not self._any_origin):
            raise Forbidden("pages of another site may link to this but not embed it; use CORS",
                            code="forbidden_origin")

    def check_token(self, request):
        """Raise GafferError without the token. RFC 6750 section 2.1, RFC 7617."""
        if self._token is None:
            return
        import hmac                             # brings in OpenSSL, 4 MiB, so only when needed
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        given = b""
        if scheme.lower() == "bearer":
            given = value.strip(" ").encode("latin-1")
        elif scheme.lower() == "basic":
            with contextlib.suppress(ValueError):   # it is as wrong as any other
                given = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        if not hmac.compare_digest(given, self._token):
            raise GafferError("send the token: 'Authorization: Bearer <token>', or Basic with the "
                              "token as password", status=401, code="unauthorized", headers=[
                                  ("WWW-Authenticate", 'Basic realm="gaffer", charset="UTF-8"')])

    def cors(self, request):
        """Return the CORS headers of an answer: [(name, value)]."""
        origin = request.headers.get("origin")
        if origin is None:
            return []
        if not self.allows_origin(request):
            return [("Vary", "Origin")]
        headers = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), (
            "Access-Control-Expose-Headers", "Gaffer-Offset, Gaffer-Dropped, Gaffer-Ended")]
        if request.method == "OPTIONS":         # a preflight
            headers += [
                ("Access-Control-Allow-Methods", ", ".join(METHODS)),
                ("Access-Control-Allow-Headers", "X-Requested-With, X-HTTP-Method-Override, "
                 "Content-Type, Accept, Authorization, Last-Event-ID"),
                ("Access-Control-Max-Age", "86400")]
        return headers


def find_route(routes, segments):
    """Return (methods, args) of a path; (None, ()) if there is no such resource.

    `routes`: (pattern, {method: handler}). In a pattern as "/processes/<name>/_stop", <pid> takes
    digits, <name> anything else, other placeholders both. A literal part wins over these.
    """
    found, args = None, ()
    for pattern, methods in routes:
        parts, taken = pattern.rstrip("/").split("/")[1:], []
        for part, segment in zip(parts, segments):
            kind = "<pid>" if segment.isascii() and segment.isdigit() else "<name>"
            if part[0] == "<" and (part == kind or part not in ("<pid>", "<name>")):
                taken.append(segment)
            elif part != segment or part[0] == "<":
                break
        else:
            if len(parts) == len(segments) and (found is None or len(taken) < len(args)):
                found, args = methods, taken
    if found is not None and "GET" in found:
        found = {"HEAD": found["GET"], **found}
    return found, args


def prefers_html(accept):
    """Return whether an Accept header ranks HTML above JSON. RFC 9110 section 12.5.1."""
    quality = {}
    for item in accept.lower().split(","):
        kind, *parameters = [part.strip() for part in item.split(";")]
        rank = next((each[2:] for each in parameters if each.startswith("q=")), "1")
        quality[kind] = float(rank) if re.fullmatch(r"[01](\.[0-9]*)?", rank) else 0.0
    plain = quality.get("application/json", quality.get("application/*", quality.get("*/*", 0)))
    return quality.get("text/html", quality.get("text/*", 0)) > plain


def chunk(data):
    """Return a chunk of a chunked body. RFC 9112 section 7.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ChunkEncoder(Encoder):
    """A continuous stream: the bytes, in chunks."""

    key = ("chunk",)

    def encode(self, data, offset, before, mode, piece):
        if len(data) < JOIN_SIZE:
            return (chunk(data) if data else b""), len(data)
        return (b"%x\r\n" % len(data), data, b"\r\n"), len(data)


def sse_event(position, epoch, name, value):
    """Return a server-sent event whose id is `position`@`epoch` and whose data is JSON."""
    text = "id: %s@%s\nevent: %s\ndata: %s\n\n" % (position, epoch, name, json.dumps(value))
    return text.encode("ascii")


class SseEncoder(Encoder):
    """Server-Sent Events, one a line, each with the offset behind it as its id (HTML, section 9.2).

    `framed` makes a piece of the body out of bytes: chunk(), or bytes() for HTTP/1.0.
    """

    by_line = partial = True

    def __init__(self, label, epoch, framed=bytes):
        self.key = ("sse", label, framed)
        self._epoch, self._framed = epoch, framed
        self._block = ("id: %%d@%s\nevent: %s\ndata: %%b\n\n" % (epoch, label)).encode("ascii")

    def encode(self, data, offset, before, mode, piece):
        skip, cut, block = 0, data.rfind(b"\n") + 1, self._block
        if (cut and before is None and mode == NORMAL and len(data) - cut < piece
                and b"\r" not in data):         # mostly: whole lines, whose ends can stay
            segments = lines = data[:cut].splitlines(True)
            block = block[:-1]
        else:
            skip, segments, lines = split_lines(data, before, mode, piece)
            if not segments:
                return b"", skip
        if valid_utf8(data) is not data:
            lines = list(map(valid_utf8, lines))
        ends = list(itertools.accumulate(
            map(len, segments[1:]), initial=offset + skip + len(segments[0])))
        values: list = [None] * (2 * len(lines))
        values[0::2], values[1::2] = ends, lines
        # one formatting of all is twice as fast as one of each
        return self._framed(block * len(lines) % tuple(values)), ends[-1] - offset

    def dropped(self, count, offset, **more):
        data = {"bytes": count, **more}
        return self._framed(sse_event(offset, self._epoch, "dropped", data))

    def exit(self, offset, data):
        """Return the event at the end of a process; nothing else ever gets its id."""
        return self._framed(sse_event("%dx" % offset, self._epoch, "exit", data))


class JournalEncoder(SseEncoder):
    """Lines of the journal: as Server-Sent Events, if `events`, or as they are."""

    by_line = partial = False

    def __init__(self, events, epoch, framed=bytes, returns=False):
        super().__init__("line", epoch, framed)
        self.key, self._events, self.returns = ("journal", events, framed, returns), events, returns

    def encode(self, groups, offset, before, mode, piece):
        """Encode [(prefix, ends, lines)]; see Journal.lines()."""
        parts = []
        for prefix, ends, lines in groups:
            if self._events:
                block = self._block[:-4] + prefix + b"%b\n\n"
                values = tuple(itertools.chain.from_iterable(zip(ends, lines)))
            else:
                block, values = prefix + b"%b\n", tuple(lines)
            parts.append(block * len(lines) % values)
        return self._framed(b"".join(parts)) if parts else b"", 0

    def dropped(self, count, offset, **more):
        return super().dropped(count, offset, **more) if self._events else None


class RecordEncoder(Encoder):
    """Records of an EventLog: by `form` server-sent events ("eventsource") or lines of JSON.

    `pattern`: which events are sent; None: the records are statistics. `framed`: as for SseEncoder.
    """

    def __init__(self, form, framed, epoch, pattern=None):
        self._events, self._framed, self._epoch = form == "eventsource", framed, epoch
        self._pattern, self.key = pattern, (form, framed, pattern)

    def encode(self, records, offset, before, mode, piece):
        blocks = [self._block(number, record["event"] if self._pattern else "stat", record)
                  for number, record in enumerate(records, offset + 1)
                  if self._pattern is None or matches(self._pattern, record)]
        return b"".join(blocks), len(records)

    def _block(self, number, name, record):
        return self._framed(sse_event(number, self._epoch, name, record) if self._events
                            else json_bytes(record))

    def dropped(self, count, offset, **more):
        record = {"events": count, **more}
        if not self._events:
            record = {"event": "dropped", "id": "%d@%s" % (offset, self._epoch), **record}
        return self._block(offset, "dropped", record)


# --------------------------------------------------------------------------------------------------
# websocket codec
#
# RFC 6455, the server's side, without extensions. Pure. Section numbers below are those of the RFC.
# --------------------------------------------------------------------------------------------------
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def websocket_accept(request, protocols=None):
    """Return the headers that accept an opening handshake: [(name, value)]. Sections 4.1, 4.2.

    The subprotocol is the client's first one that is in `protocols`, or of all if that is None.
    Raises UpgradeRequired, BadRequest.
    """
    import hashlib                              # brings in OpenSSL, 4 MiB, so only when needed
    if "websocket" not in request.words("upgrade") or "upgrade" not in request.words("connection"):
        raise UpgradeRequired("this resource is a websocket; open it as one")
    if request.method != "GET" or request.version != (1, 1):
        raise BadRequest("open a websocket with GET and HTTP/1.1")
    if request.headers.get("sec-websocket-version") != "13":
        raise UpgradeRequired("use Sec-WebSocket-Version 13")
    key = request.headers.get("sec-websocket-key", "")
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", key):
        raise BadRequest("Sec-WebSocket-Key must be 16 bytes in base64")
    digest = hashlib.sha1(key.encode("ascii") + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    headers = [("Upgrade", "websocket"), ("Connection", "Upgrade"),
               ("Sec-WebSocket-Accept", base64.b64encode(digest).decode("ascii"))]
    for word in request.headers.get("sec-websocket-protocol", "").split(","):
        word = word.strip()
        if re.fullmatch(TOKEN, word) and (protocols is None or word in protocols):
            return [*headers, ("Sec-WebSocket-Protocol", word)]
    return headers


def frame_head(opcode, size):
    """Return the head of an unfragmented, unmasked frame. Section 5.2."""
    if size < 126:
        return bytes((0x80 | opcode, size))
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size)
    return struct.pack("!BBQ", 0x80 | opcode, 127, size)


def frame(opcode, payload):
    """Return an unfragmented, unmasked frame. Section 5.2."""
    return frame_head(opcode, len(payload)) + payload


def is_close_code(code):
    """Return whether a close frame may carry `code`. Section 7.4."""
    return 1000 <= code <= 1014 and code not in (1004, 1005, 1006) or 3000 <= code < 5000


def close_frame(code, reason=""):
    """Return a close frame, the reason cut to what fits. Section 5.5.1. ValueError."""
    if not is_close_code(code):
        raise ValueError("%r is not a close code: give 1000, or one from 3000 to 4999" % code)
    text = reason.encode("utf-8")[:123]
    return frame(CLOSE, struct.pack("!H", code) + text[:len(text) - incomplete_utf8(text)])


def unmask(data, key, position=0):
    """XOR `data` with the 4-byte `key`, from byte `position` of the frame on. Section 5.3."""
    size = len(data)
    position %= 4
    key = key[position:] + key[:position]
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ mask).to_bytes(size, "little")


class WebSocketViolation(Exception):
    """The peer broke the protocol. args: the close code, the reason."""


class WebSocketDecoder:
    """Decode a client's bytes into events; never raises.

    Events: ("text", str), ("binary", bytes), ("ping", bytes), ("pong", bytes), ("close", code,
    reason) and ("fail", code, reason); nothing follows the last two. `limit`: bytes of a message.
    """

    def __init__(self, limit):
        self._limit, self._buffer, self._events = limit, bytearray(), self._decode()

    def feed(self, data):
        """Add input and return an iterator over the events that it completes.

        The decoder reads no further than the iterator is followed; the next one continues there.
        """
        self._buffer += data
        return iter(self._next_event, None)

    def _next_event(self):
        try:
            return next(self._events, None)
        except WebSocketViolation as violation:
            return ("fail", *violation.args)
        except UnicodeDecodeError:
            return "fail", 1007, "the text is not UTF-8"

    def _take(self, size):
        """Return `size` bytes of input; yield None until they are there."""
        while len(self._buffer) < size:
            yield None
        data = self._buffer[:size]
        del self._buffer[:size]
        return data

    def _decode(self):
        """Yield events, and None to wait for input. Sections 5.2 to 5.5."""
        message = None                          # the opcode of the unfinished message
        content, checked = bytearray(), 0       # and how much of it is known to be UTF-8
        while True:
            first, second = yield from self._take(2)
            opcode, final, size = first & 15, first >> 7, second & 127
            if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
                raise WebSocketViolation(1002, "a reserved bit or opcode is used")
            if not second & 0x80:
                raise WebSocketViolation(1002, "a client must mask its frames")
            if opcode >= CLOSE and (not final or size > 125):
                raise WebSocketViolation(1002, "a control frame has to be whole, 125 bytes at most")
            if opcode < CLOSE and (opcode == CONTINUATION) != (message is not None):
                raise WebSocketViolation(1002, "there is no message to continue" if message is None
                                         else "the previous message is not finished")
            if size > 125:
                width, least = (2, 126) if size == 126 else (8, 65536)
                size = int.from_bytes((yield from self._take(width)), "big")
                if size < least or size >> 63:
                    raise WebSocketViolation(1002, "a frame's length must have its shortest form")
            if opcode in (TEXT, BINARY):
                message, content, checked = opcode, bytearray(), 0
            if opcode < CLOSE and len(content) + size > self._limit:
                raise WebSocketViolation(1009, "a message is over %d bytes" % self._limit)
            key, seen = (yield from self._take(4)), 0
            target = content if opcode < CLOSE else bytearray()
            while seen < size:
                data = yield from self._take(min(size - seen, max(1, len(self._buffer))))
                target += unmask(data, key, seen)
                seen += len(data)
                if opcode < CLOSE and message == TEXT and not (final and seen == size):
                    end = len(content) - incomplete_utf8(content[-3:])
                    content[checked:end].decode("utf-8")    # a bad byte fails at once (section 8.1)
                    checked = end
            if opcode == CLOSE:
                code = int.from_bytes(target[:2], "big") if target else 1005
                if target and (len(target) == 1 or not is_close_code(code)):
                    raise WebSocketViolation(1002, "the close code is not valid")
                yield "close", code, target[2:].decode("utf-8")
                return
            if opcode in (PING, PONG):
                yield "ping" if opcode == PING else "pong", bytes(target)
            elif final:
                text, message = message == TEXT, None
                yield ("text", content.decode("utf-8")) if text else ("binary", bytes(content))


class FrameEncoder(Encoder):
    """A stream as websocket messages: binary or text, as it comes or one per line."""

    def __init__(self, binary, by_line):
        self.key, self.by_line = ("frame", binary, by_line), by_line
        self._opcode, self._valid = (BINARY, bytes) if binary else (TEXT, valid_utf8)

    def encode(self, data, offset, before, mode, piece):
        if self.by_line:
            skip, segments, lines = split_lines(data, before, mode, piece)
            return (b"".join([frame(self._opcode, self._valid(line)) for line in lines]),
                    skip + sum(map(len, segments)))
        if self._opcode == TEXT and mode != FINAL:
            data = data[:len(data) - incomplete_utf8(data)]
        if not data:
            return b"", 0
        content = self._valid(data)
        if len(content) < JOIN_SIZE:
            return frame(self._opcode, content), len(data)
        return (frame_head(self._opcode, len(content)), content), len(data)


# --------------------------------------------------------------------------------------------------
# channels
#
# Connections that last or wait live on the loop: feeds, websockets and long polls. A thousand of
# them are a thousand entries in one selector, and no thread. A route handler returns a channel, and
# the server starts it.
# --------------------------------------------------------------------------------------------------
PARTS_MAX = 64                                  # of one sendmsg()
BLOCK_STALL = 30.0                              # without progress: loss=block holds a child
INPUT_STALL = 2.0                               # and input of a client that has left waits
STALL = 300.0                                   # and any other feed holds a socket
SEND_TIME = 30.0                                # for a client to take a part of its answer
LINGER_TIME = 2.0                               # what comes is read, or the client sees a reset
LINGER_SIZE = 8 * MIB                           # and not more of it
END_POLL = 1.0                                  # between checks whether an unread client left
FRAMES_SIZE = 4 * KIB                           # in a turn: 700 small websocket frames take 2 ms
SEND_QUEUE_SIZE = 32 * MIB                      # what a WebSocketHandler has sent, and nobody taken
SEND_QUEUE_LOW = 256 * KIB                      # above this, its client is not read


class Connection:
    """A client's connection, whether a thread or a channel has it.

    `listener`: the HttpEndpoint that accepted it; `address`: of the client, as text; `peer`: see
    network(); `early`: bytes that were read and not used yet.
    """

    def __init__(self, listener, sock, address, peer):
        self.listener, self.sock, self.address, self.peer = listener, sock, address, peer
        self.early = b""


class Channel:
    """A connection that the loop drives. What its client does not take waits in a queue.

    Subclasses override opened(), received(), eof_received(), drained() and closing(). This class
    alone reads and drops what comes.
    """

    kind = "request"                            # as /metrics calls it
    reader: "Reader | None" = None              # what it sends, if that is a stream
    stall, read_size = STALL, READ_SIZE
    status = None                               # for the access log, if this is not yet answered
    closed = ending = False                     # `ending`: finish() was called
    sent = _head = 0                            # bytes in all, and of the head
    _mask = _lingered = 0                       # what the selector watches; bytes read at the end

    def start(self, connection, request=None):
        """Begin, on the loop."""
        self.connection, self.request = connection, request
        self.sock, self.http = connection.sock, connection.listener.http
        self.loop, self._would_block = self.http.loop, connection.listener.would_block
        self.secure = connection.listener.context is not None
        self._queue, self.queued, self._timers = collections.deque(), 0, {}
        self.sock.setblocking(False)
        self.http.channels.add(self)
        self.reading(True)
        self.opened()
        if connection.early and not self.closed and not self.ending:
            early, connection.early = connection.early, b""     # it came with the request
            self.received(early)

    def opened(self):
        """The connection is this channel's."""

    def received(self, data):
        """Bytes have come, also while this is ending; a client that only listens says nothing."""

    def eof_received(self):
        """The client has closed its side."""
        self.close()

    def drained(self):
        """All that was queued has been taken."""

    def closing(self):
        """The connection is at its end, or all but what is queued has been sent: called once."""

    def head(self):
        """Return the Response to a HEAD for which GET would begin this channel."""
        return Response(None)

    @property
    def unsent(self):
        """Bytes that the client has still to take: those queued, and those ahead of the reader."""
        if self.reader is None or self.ending:
            return self.queued
        return self.queued + self.reader.log.end - self.reader.offset

    def after(self, delay, function):
        """Call a function in `delay` seconds. An earlier call of it that is not due yet is dropped,
        and so is this one if the connection is closed or handed over by then."""
        if not self.closed:
            if function in self._timers:
                self._timers[function].cancel()
            self._timers[function] = self.loop.later(delay, function)

    # the way out

    def send_head(self, status, headers, rest=b""):
        """Send the head of an answer that lasts."""
        head = self.http.head(self.request, status, headers)
        self.status, self._head = status, len(head)
        self.http.count(self.request.method, status)
        self.send(head + rest)

    def send(self, payload):
        """Send bytes, or a tuple of them; queue what is not taken. Return whether all is taken."""
        count = 0 if self._queue or self.closed else self._transmit(payload)
        for part in payload if payload.__class__ is tuple else (payload,):
            if count < len(part) and not self.closed:
                if not self._queue:
                    self._watch(self._mask | selectors.EVENT_WRITE)
                    self.after(self.stall, self._stalled)
                self._queue.append(memoryview(part)[count:])
                self.queued += len(part) - count
            count = max(0, count - len(part))
        return not self._queue and not self.closed

    def _transmit(self, parts):
        """Send some of bytes, or of a sequence of them. Return how many were taken."""
        try:
            if parts.__class__ is bytes:
                count = self.sock.send(parts)
            else:                               # TLS has no gathering write
                count = self.sock.send(parts[0]) if self.secure else self.sock.sendmsg(parts)
        except self._would_block:
            return 0
        except OSError:
            self.close()
            return 0
        self.sent += count
        return count

    def _flush(self):
        while self._queue:
            count = self._transmit(list(itertools.islice(self._queue, PARTS_MAX)))
            if not count:
                return
            self.after(self.stall, self._stalled)
            self.queued -= count
            while count and count >= len(self._queue[0]):
                count -= len(self._queue.popleft())
            if count:
                self._queue[0] = self._queue[0][count:]
        self._watch(self._mask & ~selectors.EVENT_WRITE)
        if self.ending:
            self._shut_down()
        else:
            self.drained()

    def _stalled(self):
        if self._queue:
            log.info("a client took nothing for %g seconds; it is closed", self.stall)
            self.close()

    # the way in

    def _watch(self, mask):
        if mask != self._mask and not self.closed:
            if mask and self._mask:
                self.loop.modify(self.sock.fileno(), mask)
            elif mask:
                self.loop.register(self.sock.fileno(), mask, self._ready)
            else:
                self.loop.unregister(self.sock.fileno())
            self._mask = mask

    def _ready(self, mask):
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ and self._mask & selectors.EVENT_READ:
            self._read()

    def reading(self, wanted):
        """Read from the client, or let it wait."""
        if wanted:
            self._watch(self._mask | selectors.EVENT_READ)
            self._read_pending()
        elif self._mask & selectors.EVENT_READ:
            self._watch(self._mask & ~selectors.EVENT_READ)
            self.after(END_POLL, self._check_end)

    def _read(self):
        try:
            data = self.sock.recv(self.read_size)
        except self._would_block:
            return
        except OSError:
            data = b""
        if not data:
            self.eof_received()
            return
        if self.ending:                         # unread bytes would turn the end into a reset
            self._lingered += len(data)
        if self._lingered > LINGER_SIZE:
            self.close()
        else:
            self.received(data)
            self._read_pending()

    def _read_pending(self):
        """Read what TLS has decrypted already, of which the selector does not know."""
        if self.secure and self._mask & selectors.EVENT_READ and self.sock.pending():
            self.loop.call_soon(self._ready, selectors.EVENT_READ)

    def _check_end(self):
        """Call eof_received() if the client has left: no selector tells, as it is not read."""
        if not self._mask & selectors.EVENT_READ:
            poll = select.poll()
            poll.register(self.sock, getattr(select, "POLLRDHUP", select.POLLHUP))
            if poll.poll(0):
                self.eof_received()
            else:
                self.after(END_POLL, self._check_end)

    # the end

    def finish(self, *why):
        """Close when all is sent and the client has had time to read it. RFC 9112 section 9.6.
        `why` is for closing()."""
        if not self.ending and not self.closed:
            self.ending = True
            self.closing(*why)
            self.reading(True)
            if not self._queue:
                self._shut_down()

    def _shut_down(self):
        with contextlib.suppress(OSError, ValueError):
            if self.secure:
                self.sock.unwrap()              # TLS's close_notify; the client's is not waited for
        with contextlib.suppress(OSError):      # it may have left
            self.sock.shutdown(socket.SHUT_WR)
        self.after(LINGER_TIME, self.close)

    def detach(self):
        """Leave the connection to another channel or a thread."""
        self._watch(0)
        self.closed = True
        self._queue.clear()
        self.queued = 0
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self.http.channels.discard(self)

    def stop(self):
        """Close at gaffer's stop, with a word to the client if there is one."""
        self.close()

    def close(self):
        """Close now."""
        if not self.closed:
            self.detach()
            if not self.ending:
                self.closing()
            self.http.close_connection(self.connection)
            if self.status is not None:
                self.http.log_request(self.connection.address, self.request, self.status,
                                      max(0, self.sent - self._head))


class Answer(Channel):
    """What a client has not taken yet of an answer. `keep`: its next request may follow."""

    stall = SEND_TIME

    def __init__(self, data=b"", keep=False):
        self._data, self._keep = data, keep

    def opened(self):
        if not self._data or self.send(self._data):
            self.drained()

    def received(self, data):
        if not self.ending:
            self.connection.early += data       # the next request
            self.reading(False)

    def eof_received(self):
        if self.queued:                         # it may wait for that
            self._watch(selectors.EVENT_WRITE)
        else:
            self.close()

    def drained(self):
        if self._keep:
            self.detach()
            self.http.watch(self.connection)
        else:
            self.finish()


class LongPoll(Answer):
    """An answer that comes later.

    `begin(deliver)` begins to wait for deliver(Response) and returns a function that ends the wait.
    After `timeout` seconds (None: never) `expired()` makes the Response.
    """

    kind = "longpoll"

    def __init__(self, begin, timeout, expired):
        self._begin, self._timeout, self._expired = begin, timeout, expired
        self._waiting = contextlib.ExitStack()

    def opened(self):
        self.status = 499                       # until it is answered: the client has left
        if self._timeout is not None:
            self.after(self._timeout, lambda: self._deliver(attempt(self._expired)))
        self._waiting.callback(self._begin(self._deliver))
        if self.status is None:                 # answered at once
            self.closing()

    def closing(self):
        self._waiting.close()

    def _deliver(self, response):
        if self.status is not None and not self.closed:
            self.status = None
            self.closing()
            self._keep = not (self.request.wants_close() or self.http.ending)
            if self.send(self.http.answer(self.connection, self.request, response, self._keep)):
                self.drained()

    def stop(self):
        self._deliver(error_response(Stopping("gaffer is stopping; start it again")))
        self.close()


class Follower(Channel):
    """A channel that sends what a Reader reads.

    `reader`: without a sink; `asked`: the client has named its offset; `process`: whose exit ends
    the stream, or None; `heartbeat`: seconds of silence before `sign` is sent, or None.
    """

    sign: bytes

    def __init__(self, reader, asked, process, heartbeat):
        self.reader, self._asked, self._process, self._heartbeat = reader, asked, process, heartbeat
        self.stall = BLOCK_STALL if reader.loss == "block" else STALL

    def offset_headers(self, clamp):
        """Return the headers that say where the reader begins, and what it has lost before that.

        Without an offset that was asked for, nothing is lost. A reader that can report a loss
        itself does; for another, with `clamp`, these headers do. It is to start in the same turn.
        """
        reader, source, lost = self.reader, self.reader.log, 0
        place = max(reader.offset, source.start)
        reports = reader.loss == "skip" or reader.encoder.dropped(0, place) is not None
        if isinstance(source, JournalView):
            if not self._asked:
                reader.reported_until = source.end
            elif not reports:
                _, reader.reported_until, lost = source.read_all(reader.offset, reader.encoder)
        elif reader.offset < source.start:
            if reports or not self._asked:
                place = source.resync(place)
            if not self._asked:
                reader.offset = place
            elif clamp and not reports:
                lost, reader.offset = place - reader.offset, place
        if not lost:
            return [("Gaffer-Offset", place)]
        source.count_dropped(lost)
        return [("Gaffer-Offset", place), ("Gaffer-Dropped", lost)]

    def follow(self):
        """Begin, behind the head."""
        self.reader.sink = self
        if self._heartbeat is not None:
            self.after(self._heartbeat, self._check_silence)
        self.reader.start()

    def closing(self, *why):
        """Stop following."""
        self.reader.close()
        self.reader.sink = None                 # or a journal would be read until they are freed
        if self._process is not None:
            self._process.on_exit.discard(self.end)

    def _check_silence(self):
        reader = self.reader
        if reader.sink is not None:
            if reader.last_sent + self._heartbeat <= self.loop.now:
                reader.last_sent = self.loop.now
                if not self._queue:
                    self.send(self.sign)
            self.after(reader.last_sent + self._heartbeat - self.loop.now, self._check_silence)

    def drained(self):
        self.reader.pump()

    def finished(self, reader):
        """End now, or with the process."""
        if self._process is not None and not self._process.exited:
            self._process.on_exit.add(self.end)
        else:
            self.end()

    def end(self):
        """End the stream: all output is sent, and the process has exited."""


class Feed(Follower):
    """A stream without end: exact bytes, JSON lines, or Server-Sent Events.

    `form`: continuous or eventsource; `framed`: as for SseEncoder; `first`: what it begins with.
    For the rest see Follower.
    """

    def __init__(self, form, framed, reader, asked, heartbeat, first, process):
        super().__init__(reader, asked, process, heartbeat)
        self.kind, self.sign, self._chunked = form, framed(b"\n"), framed is chunk
        self._has_trailer = self._chunked and form == "continuous" and reader.loss == "skip"
        # a browser takes a stream for open when the first byte of its body is there
        self._first = self.sign + first if form == "eventsource" else first

    def head(self):
        headers = [("X-Accel-Buffering", "no"), *self.offset_headers(True)]
        if self._chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        if self._has_trailer:
            headers.append(("Trailer", "Gaffer-Dropped"))
        content_type = "application/octet-stream"
        if self.kind == "eventsource":
            content_type = "text/event-stream"
        elif isinstance(self.reader.log, EventLog):
            content_type = "application/json"
        return Response(None, headers=headers, content_type=content_type)

    def opened(self):
        self.send_head(200, [*self.head().headers, ("Connection", "close")], self._first)
        self.follow()

    def lost(self, reader, count):
        """Cut the stream, without its last chunk."""
        log.info("a reader of a continuous stream was too slow and is cut, %d bytes behind", count)
        self.finish()

    def end(self):
        process, reader = self._process, self.reader
        if self.closed or self.ending:
            return
        if process is not None:
            self.send(reader.encoder.exit(reader.log.end, {
                "pid": process.pid, "exit_status": process.exit_status,
                "term_signal": process.term_signal}))
        if self._chunked:
            trailer = b"Gaffer-Dropped: %d\r\n" % reader.dropped if self._has_trailer else b""
            self.send(b"0\r\n" + trailer + b"\r\n")
        self.finish()

    def stop(self):
        if not self.unsent:
            self.end()
        self.close()


class WebSocketChannel(Channel):
    """RFC 6455 on the loop: it answers pings and close frames.

    Subclasses override received(), to take what next_message() returns until that is None, and
    closing(code, reason): the code is what was sent, or 1006. Between pause() and resume() nothing
    is read.
    """

    kind, read_size = "websocket", FRAMES_SIZE
    paused = _peer_ended = False                # its close frame has come, or a bad one
    _events = iter(())                          # of this turn

    def __init__(self, headers, limit):
        self._headers, self.limit, self._decoder = headers, limit, WebSocketDecoder(limit)

    def opened(self):
        self.send_head(101, self._headers)

    def received(self, data):
        self._events = self._decoder.feed(data)

    def next_message(self):
        """Return the next message (str or bytes), or None: no more for now."""
        while not (self.closed or self.paused):
            kind, *details = next(self._events, (None,))
            if kind is None:
                break
            if kind in ("close", "fail"):
                self._peer_ended = True
                if self.ending and not self._queue:
                    self._shut_down()
                self.send_close(*details)
            elif self.ending:
                continue
            elif kind in ("text", "binary"):
                return details[0]
            elif kind == "ping" and self.queued < self.limit:   # RFC 6455 5.5.3
                self.send(frame(PONG, *details))
        return None

    def send_close(self, code, reason=""):
        """Send a close frame, once, and nothing more. The peer's, or the end, is waited for.

        Code 1005: there was none (RFC 6455 section 7.4.1).
        """
        if not self.closed and not self.ending:
            self.send(frame(CLOSE, b"") if code == 1005 else close_frame(code, reason))
            self.finish(code, reason)
            if self.paused:                     # the peer's close frame may be behind what waits
                self.loop.call_soon(self.resume)

    def _shut_down(self):
        # TLS and proxies end both ways at once, and the peer's close frame could not be sent
        if self._peer_ended:
            super()._shut_down()
        else:
            self.after(LINGER_TIME, self._end_output)

    def _end_output(self):
        super()._shut_down()
        self.after(SEND_TIME, self.close)       # a slow peer reads on, and sends meanwhile

    def pause(self):
        """Read no more for now; what has come stays as it came."""
        self.paused = True
        self.reading(False)

    def resume(self):
        """Take what has come, and read again."""
        self.paused = False
        if not self.closed:
            self.reading(True)
            self.received(b"")


class ProcessSocket(Follower, WebSocketChannel):
    """A websocket to a process: what comes in goes to its stdin, its output comes back.

    `stream`: an Input, None if the client only reads; `by_line`: an end of line is added to each
    message. For the rest see Follower.
    """

    sign = frame(PING, b"")
    _message = None                             # for which stdin has no room
    _unread = None                              # bytes of stdin when the client was seen to be gone

    def __init__(self, headers, reader, asked, stream, by_line, process, heartbeat):
        Follower.__init__(self, reader, asked, process, heartbeat)
        WebSocketChannel.__init__(self, headers, STDIN_SIZE)    # a message fits in
        self._stream, self._by_line = stream, by_line

    def opened(self):
        self._headers = self._headers + self.offset_headers(False)
        super().opened()
        self.follow()

    def received(self, data):
        super().received(data)
        while True:
            message, self._message = self._message, None
            if message is None:
                message = self.next_message()
            if message is None:
                return
            if self._stream is None:
                self.send_close(1008, "this websocket is read only")
                continue
            data = message.encode("utf-8") if isinstance(message, str) else message
            if self._by_line:
                data += b"\n"
            try:
                self._stream.write(data)
                self.loop.expect()
            except ForbiddenWrite as error:     # the output goes on, and reports the exit
                log.info("websocket input of %s was dropped: %s", self._process.name, error)
            except StdinFull:
                if len(data) > self.limit:      # with its end of line
                    self.send_close(1009, "a message is over %d bytes" % self.limit)
                else:
                    self._message, self._unread = message, None
                    self._stream.on_low.add(self.resume)
                    self.pause()
                    return

    def eof_received(self):
        """Close once the process has read what the client sent before it left, or reads no more."""
        if not self.paused or self._stream.size == self._unread:
            self.close()
        else:
            self._unread = self._stream.size
            super().closing()                   # output would break the connection
            self.after(INPUT_STALL, self._check_end)

    def lost(self, reader, count):
        """Close the websocket: its messages would have a gap."""
        self.send_close(1013, "dropped %d" % count)

    def end(self):
        status, signum = self._process.exit_status, self._process.term_signal
        self.send_close(1000, "signal %d" % signum if signum else "exit %d" % status)

    def closing(self, code=1006, reason=""):
        super().closing()
        if self._message is not None:
            self._message = None
            self._stream.on_low.discard(self.resume)
            log.info("a websocket message for %s was dropped: it does not read", self._process.name)


class WebSocketHandler:
    """Base of a websocket route: HttpHandler(handlers=[(r"/echo", Echo)]) makes one a connection.

    Its methods run one after the other on the loop's thread, and must not block; send() and end()
    may be called by any thread. `request`: the opening request; `args`: the groups of the route.
    """

    max_message = 16 * MIB                      # bytes
    protocols: tuple = ()                       # subprotocols; the client's first of these is used

    def __init__(self, request, args, channel):
        self.request, self.args, self._channel = request, args, channel

    def open(self):
        """The connection is open."""

    def message(self, data):
        """A message has come: str for a text one, bytes for a binary one."""

    def close(self, code, reason):
        """The connection is closed: called once.

        `code`: the peer's close code, ours, or 1006 if there was none.
        """

    def send(self, data):
        """Queue str as a text message, bytes as a binary one. A closed connection drops it.

        At SEND_QUEUE_SIZE bytes the client is taken for dead and its connection closed.
        """
        opcode, payload = BINARY, data
        if isinstance(data, str):
            opcode, payload = TEXT, data.encode("utf-8")
        self._channel.call(self._channel.send_message, opcode, bytes(memoryview(payload)))

    def end(self, code=1000, reason=""):
        """Close the connection. ValueError: `code` is not one that may be sent."""
        self._channel.call(self._channel.send_close, code, reason)


class HandlerSocket(WebSocketChannel):
    """A websocket of a WebSocketHandler, of which `handler` is the class."""

    def __init__(self, handler, request, args, headers):
        super().__init__(headers, handler.max_message)
        self._handler = handler(request, args, self)

    def call(self, function, *args):
        """Do something under the lock, unless gaffer has stopped: then the client has gone."""
        with contextlib.suppress(Stopping):
            return self.loop.call(function, *args)
        return None

    def opened(self):
        super().opened()
        self.loop.call_unlocked(self._run, self._handler.open)

    def _run(self, method, *args):
        try:
            method(*args)
        except BaseException as error:          # sys.exit() too, which may then end run()
            log.exception("a websocket handler failed; its connection is closed")
            self.call(self.send_close, 1011, "the handler failed")
            if not isinstance(error, Exception):
                raise

    def received(self, data):
        super().received(data)

        def dispatch():
            # one by one: what the handler sends may fill the queue, and then the next has to wait
            for data in iter(functools.partial(self.call, self.next_message), None):
                self._run(self._handler.message, data)
        self.loop.call_unlocked(dispatch)

    def send_message(self, opcode, payload):
        """Queue a message."""
        if self.closed or self.ending:
            return
        payload = frame(opcode, payload)
        if self.queued + len(payload) > SEND_QUEUE_SIZE:
            log.warning("a websocket client did not take %d bytes; it is closed", self.queued)
            self.close()
        elif not self.send(payload) and self.queued > SEND_QUEUE_LOW:
            self.pause()

    def drained(self):
        if self.paused:
            self.resume()

    def closing(self, code=1006, reason=""):
        self.loop.call_unlocked(self._run, self._handler.close, code, reason)


# --------------------------------------------------------------------------------------------------
# metrics and OpenAPI
#
# Metrics for Prometheus (text format 0.0.4), from what is counted anyway, and the description of
# the API (OpenAPI 3.1), from the route table, the parameters and the table of template fields.
# --------------------------------------------------------------------------------------------------
METRICS = {                                     # name: type and help
    "gaffer_processes": ("gauge", "Processes by state; waiting: for a restart."),
    "gaffer_processes_wanted": ("gauge", "Processes that should run now."),
    "gaffer_processes_ready": ("gauge", "Processes that are ready."),
    "gaffer_process_restarts_total": ("counter", "Restarts after an exit."),
    "gaffer_process_exits_total": ("counter", "Exits, by status and signal."),
    "gaffer_stream_bytes_total": ("counter", "Bytes of output."),
    "gaffer_stream_dropped_bytes_total": ("counter", "Bytes missed, added up over all readers."),
    "gaffer_http_connections": ("gauge", "Open connections."),
    "gaffer_http_streams": ("gauge", "Clients that follow something."),
    "gaffer_http_requests_total": ("counter", "Requests answered; streams when they begin."),
    "gaffer_http_request_seconds": ("summary", "Time of requests that wait for no event."),
    "gaffer_loop_busy_seconds_total": ("counter", "Time the loop has worked."),
    "gaffer_events_total": ("counter", "Events published."),
    "gaffer_events_dropped_total": ("counter", "Events that readers missed."),
    "process_start_time_seconds": ("gauge", "When gaffer started, in Unix time."),
}


def metrics_text(manager, http):
    """Return the METRICS. Under the lock. No value of a label needs an escape."""
    found = collections.defaultdict(list)       # name -> lines

    def add(name, number, suffix="", **labels):
        inside = ",".join('%s="%s"' % pair for pair in labels.items())
        inside = "{%s}" % inside if inside else ""
        found[name].append("%s%s%s %s\n" % (name, suffix, inside, number))
    for name, template in manager.templates.items():
        processes, running = template.processes.values(), len(template.running())
        for state, number in (("running", running), ("stopping", len(processes) - running),
                              ("waiting", len(template.pending))):
            add("gaffer_processes", number, template=name, state=state)
        add("gaffer_processes_wanted", template.wanted(), template=name)
        ready = sum(process.ready for process in processes)
        add("gaffer_processes_ready", ready, template=name)
        add("gaffer_process_restarts_total", template.restarts, template=name)
        for (status, signum), count in template.exits.items():
            add("gaffer_process_exits_total", count, template=name, exit_status=status,
                term_signal=signum)
        for label, merged in template.outputs.items():
            window = merged.window
            add("gaffer_stream_bytes_total", window.end, template=name, label=label)
            add("gaffer_stream_dropped_bytes_total", window.dropped, template=name, label=label)
    add("gaffer_http_connections", len(http.connections))
    kinds = collections.Counter(channel.kind for channel in http.channels)
    for kind in "longpoll", "continuous", "eventsource", "websocket":
        add("gaffer_http_streams", kinds[kind], kind=kind)
    with http.counting:
        for (method, status), number in http.answers.items():
            add("gaffer_http_requests_total", number, method=method, code=status)
        add("gaffer_http_request_seconds", http.seconds, "_sum")
        add("gaffer_http_request_seconds", http.timed, "_count")
    add("gaffer_loop_busy_seconds_total", manager.loop.busy)
    add("gaffer_events_total", manager.events.end)
    add("gaffer_events_dropped_total", manager.events.dropped)
    add("process_start_time_seconds", manager.started_at)
    return "".join("# HELP %s %s\n# TYPE %s %s\n%s" % (name, text, name, kind, "".join(found[name]))
                   for name, (kind, text) in METRICS.items())


@json_schema("boolean")
def parse_flag(text):
    """Return the boolean of a query parameter."""
    if text not in ("true", "1", "false", "0"):
        raise ValueError("must be true or false")
    return text in ("true", "1")


def parse_seconds(least, true=None):
    """Return a parser of a number of seconds; `true` is what "true" stands for, if anything."""
    @json_schema("number" if true is None else ["boolean", "number"], minimum=least)
    def parse(text):
        if true is not None and text in ("true", "false"):
            return true if text == "true" else None
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text) or not (
                least <= float(text) <= SECONDS_MAX):
            raise ValueError("must be a number of seconds from %g to %d%s" % (
                least, SECONDS_MAX, "" if true is None else ", true or false"))
        return float(text)
    return parse


@json_schema(["integer", "string"])
def parse_tail(text):
    """Return a number of lines; math.inf for "all"."""
    if text != "all" and not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError("must be a number of lines, or all")
    return math.inf if text == "all" else int(text)


POSITION = re.compile(r"([0-9]{1,18})(x?)(?:@([A-Za-z0-9]{1,32}))?\Z")
TEXT_TYPE = {"type": "string"}


def parse_since(text):
    """Return the match of an offset or id, None for an empty one."""
    match = POSITION.match(text)
    if text and match is None:
        raise ValueError("must be an offset, or an id as it was given out")
    return match


Parameter = collections.namedtuple("Parameter", "parse help")
OPEN_PATHS = ("/ping", "/ping/", "/healthz", "/healthz/")       # they need no token
PARAMETERS = {                                  # of the query: the one table that checks them
    "running": Parameter(parse_flag, "pids of running processes instead of names"),
    "usage": Parameter(parse_flag, "with CPU and memory of each process"),
    "history": Parameter(parse_flag, "with usage: [[cpu, rss], ...] of the last ten minutes, "
                         "10 s apart, the latest first; sampled while usage is asked for"),
    "returns": Parameter(parse_flag, "journal: the label of a line that replaces the one "
                         "before, as after a lone carriage return, ends with <"),
    "dry_run": Parameter(parse_flag, "only check, and say what would be done"),
    "group": Parameter(parse_flag, "to whole process groups"),
    "wait": Parameter(parse_seconds(0, True), "answer when it is done, or 504 after these seconds"),
    "feed": Parameter(choice("longpoll", "continuous", "eventsource"), "how output is sent"),
    "interval": Parameter(parse_seconds(0.1), "seconds between two samples of a feed"),
    "timeout": Parameter(parse_seconds(0), "seconds: then a longpoll answers 204, `until` 504"),
    "heartbeat": Parameter(parse_seconds(0.1, 60.0),
                           "an empty line after this many seconds without output; true: 60"),
    "since": Parameter(parse_since, "begin at this offset, or after this id"),
    "lastEventId": Parameter(str, "the same as the header Last-Event-ID"),
    "tail": Parameter(parse_tail, "begin with the last n lines"),
    "loss": Parameter(choice("skip", "block"),
                      "what happens to a reader that is too slow; without it, it is cut"),
    "until": Parameter(choice("ready", "done", "stopped"),
                       "answer once it is so, or 409 when it never will be"),
    "label": Parameter(str, "which stream comes back"),
    "type": Parameter(choice("text", "binary"), "type of the messages"),
    "frame": Parameter(choice("line"), "one message per line"),
    "readonly": Parameter(parse_flag, "nothing is written to the process"),
}


Query = type("Query", (), dict(                 # what is not given is None
    dict.fromkeys(PARAMETERS),                  # asked: what went before that offset is a loss
    asked=property(lambda query: bool(query.since or query.lastEventId))))


def parse_query(request, names):
    """Return the Query of a request that may have the parameters `names`.

    Raises BadValue, BadRequest.
    """
    query = Query()
    for name, text in request.query.items():
        if name in names:
            try:
                setattr(query, name, PARAMETERS[name].parse(text))
            except ValueError as error:
                raise BadValue("'%s' %s" % (name, error)) from None
        elif not name.startswith("_"):
            raise BadValue("unknown parameter '%s'%s" % (
                name[:40], near(name, names) or "; this resource takes %s" % (
                    ", ".join(names) or "none")))
    if "lastEventId" in names:
        query.lastEventId = request.headers.get("last-event-id") or query.lastEventId
    return query


_routes: dict = collections.defaultdict(dict)
ROUTES = _routes.items()                        # (pattern, {method: handler}); see find_route()


def operation(routes, query="", unlocked=False, body=None, answer="application/json"):
    """Make a function the handler of `routes`, as "GET /x /x/<name> DELETE /x/<name>".

    `query`: names of the PARAMETERS that it takes; `unlocked`: it runs without the loop's lock, as
    it takes time ("few": none without a query if there is little to tell); `body`: what it reads,
    "Template", "Fields" (one without a name) or "bytes"; `answer`: its content type, None for a
    websocket. The handler of the method "*" returns the methods of a path.
    """
    def mark(handler):
        handler.query, handler.unlocked = tuple(query.split()), unlocked
        handler.body, handler.answer = body, answer
        method = ""
        for word in routes.split():
            if word.startswith("/"):
                _routes[word][method] = handler
            else:
                method = word
        return handler
    return mark


def template_schema(required):
    """Return the JSON Schema of a template, from the table of its fields."""
    fields = {}
    for name, option in OPTIONS.items():
        schema = fields[name] = dict(option.check.schema, description=option.help)
        if name not in ("name", "cmd"):
            schema["default"] = option.default
            if option.default is None:
                kinds = schema["type"]
                schema["type"] = [*([kinds] if isinstance(kinds, str) else kinds), "null"]
    return {"type": "object", "properties": fields, "required": required,
            "additionalProperties": False}


def describe(handler, method, path):
    """Return the operation object of a handler."""
    parameters = [{"name": name, "in": "path", "required": True, "schema": TEXT_TYPE}
                  for name in re.findall("{(.*?)}", path)]
    parameters += [{"name": name, "in": "query",
                    "schema": getattr(PARAMETERS[name].parse, "schema", TEXT_TYPE),
                    "description": PARAMETERS[name].help} for name in handler.query]
    success = {"2XX": {"description": "done", "content": {handler.answer: {}}}}
    if handler.answer is None:
        success = {"101": {"description": "a websocket"}}
    described = {
        "operationId": re.sub(r"\W+", "_", method.lower() + path).rstrip("_"),
        "parameters": parameters,               # python -OO leaves no docstrings
        "summary": (handler.__doc__ or "").partition("\n")[0].rstrip("."),
        "responses": dict(success, default={"$ref": "#/components/responses/Error"})}
    if handler.body == "bytes":
        described["requestBody"] = {"content": {"application/octet-stream": {}}}
    elif handler.body is not None:
        schema = {"$ref": "#/components/schemas/" + handler.body}
        described["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    if path in OPEN_PATHS:
        described["security"] = []
    return described


def openapi(routes, secured):
    """Return the description of the API as a dict. `secured`: requests need a token."""
    paths = collections.defaultdict(dict)
    for pattern, methods in sorted(routes):
        # /x/<name> and /x/<pid> are one path there, and it is the first that is described
        path = re.sub("<(.*?)>", r"{\1}", re.sub("<name>|<pid>", "<ref>", pattern))
        if "GET" in methods:
            methods = dict(methods, HEAD=methods["GET"])
        for method, handler in methods.items():
            if method in METHODS:
                paths[path].setdefault(method.lower(), describe(handler, method, path))
    components = {
        "schemas": {
            "Template": template_schema(["name", "cmd"]), "Fields": template_schema(["cmd"]),
            "Error": {"type": "object", "required": ["error", "reason"],
                      "properties": {"error": TEXT_TYPE, "reason": TEXT_TYPE}}},
        "responses": {"Error": {"description": "what is wrong, and what to do", "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}},
        "securitySchemes": {kind: {"type": "http", "scheme": kind} for kind in ("bearer", "basic")}}
    described = {"openapi": "3.1.0", "paths": paths, "components": components,
                 "info": {"title": "gaffer", "version": __version__}}
    if secured:
        described["security"] = [{"bearer": []}, {"basic": []}]
    return described


# --------------------------------------------------------------------------------------------------
# page
#
# The web page, whole. All that it shows becomes text and properties, never HTML. It asks this
# server alone, relative to where it was loaded, so that it works behind a proxy's prefix. At each
# request __NONCE__ is replaced, as its Content-Security-Policy allows no other script or style, and
# __SNAPSHOT__ by what runs now, so that the first paint shows it.
#
# A window has one event stream, and none while it is hidden, as a browser has six connections for
# all windows of a server: of output where it is shown, else of events. What changes beside it is
# polled, with CPU and memory. While a person types into the form, the server checks it as a whole
# and does nothing; each fault stands beside its field.
#
# Colours of output: on no background of their own the first 16 are the theme's, and all others are
# made dark or light enough to be read. On a background they are what the program asked for.
# --------------------------------------------------------------------------------------------------
PAGE_WORDS = {
    "nav": [["/", "Processes", "p"], ["/logs", "Output", "o"], ["/events", "Events", "e"],
            ["/add", "Add", "a"]],              # [address, text, key]
    "names": "teal warn good violet accent".split(),    # their colours, as `up` has them
    # the first 16 colours of a terminal: on a background, and as the theme has them
    "basic": "#000 #c00 #0c0 #cc0 #00e #c0c #0cc #eee "
             "#888 #f00 #0f0 #ff0 #66f #f0f #0ff #fff".split(),
    "theme": "dim bad good warn accent violet teal text".split(),
    # in the order in which a state needs a person; the first five do: [sign, colour]
    "states": {
        "failed": ["\u2715", "bad"], "flapping": ["\u25b2", "bad"], "backoff": ["\u25b2", "bad"],
        "restarting": ["\u25d4", "warn"], "waiting": ["\u25c7", "warn"],
        "starting": ["\u25cc", "warn"], "stopping": ["\u25d0", "warn"],
        "running": ["\u25cf", "good"], "scheduled": ["\u25f7", "dim"], "done": ["\u2713", "dim"],
        "stopped": ["\u25cb", "dim"]},
    "said": {                                   # of an event; a pid follows
        "create": "added", "start": "started", "stop": "stopped", "restart": "restarted",
        "update": "changed or scaled", "delete": "deleted", "spawn": "started process ",
        "ready": "ready: process ", "exit": "process ", "stop_pid": "told to stop: process ",
        "reap": "scaled down, told to stop: process ", "flap": "paused: it exits too often",
        "done": "done", "fail": "failed", "skip": "skipped: the last run is still going"},
    "form": {
        "adjustable": list(ADJUSTABLE),
        "sections": {
            "": "name cmd cwd env numprocesses",
            "When it runs": "start restart success restart_delay flapping schedule after priority",
            "When it is ready": "ready",
            "How it starts": "args shell os_env env_file before_start",
            "How it stops": "stop_signal stop_group graceful_timeout after_stop detach",
            "User and limits": "uid gid umask nice limits",
            "Streams": "redirect_output redirect_input custom_streams"},
        "labels": {
            "name": "Name", "cmd": "Command", "cwd": "Directory", "env": "Environment",
            "numprocesses": "Processes", "start": "Start when added",
            "restart": "Restart after an exit", "success": "Successful exits",
            "restart_delay": "Restart delay", "flapping": "When it exits too often",
            "schedule": "Schedule", "after": "Start after", "priority": "Priority",
            "ready": "Ready when", "args": "Arguments", "shell": "Run in a shell",
            "os_env": "Inherit gaffer's environment", "env_file": "Environment files",
            "before_start": "Run before each start", "stop_signal": "Stop signal",
            "stop_group": "Signal the whole group", "graceful_timeout": "Seconds until SIGKILL",
            "after_stop": "Run after each exit", "detach": "Keep running without gaffer",
            "uid": "User", "gid": "Group", "umask": "Umask", "nice": "Niceness", "limits": "Limits",
            "redirect_output": "Output", "redirect_input": "Input",
            "custom_streams": "Custom streams"},
        "examples": {
            "cmd": "python3 -m http.server $PORT", "env": "NAME=value, one per line",
            "ready": "http=http://127.0.0.1:8000/\nwithin=60", "flapping": "attempts=2\nwindow=1",
            "schedule": "every 90s, or 0 3 * * *", "after": "db migrate", "limits": "nofile=4096",
            "umask": "022"},
        "areas": ["cmd", "args", "env", "before_start", "after_stop", "limits", "ready",
                  "flapping"]},                 # fields of several lines
}

PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gaffer</title>
<link rel="icon" href="data:,">
<style nonce="__NONCE__">
:root {
	color-scheme: light dark;
	--low: 0; --high: .48; --bg: light-dark(#ffffff, #0f1317); --panel: light-dark(#f3f5f7, #1a1f26);
	--text: light-dark(#1c2126, #e2e7ec); --dim: light-dark(#4f5963, #9aa4af);
	--line: light-dark(#dfe3e8, #2a3139); --edge: light-dark(#818b98, #6b7683);
	--accent: light-dark(#094f9e, #73b3ff); --good: light-dark(#14612f, #4fc271);
	--warn: light-dark(#6f4a00, #e2a93d); --bad: light-dark(#a8221b, #ff857c);
	--violet: light-dark(#6d33b0, #d0a0ff); --teal: light-dark(#08555f, #53c4d2);
	--mark: light-dark(#ffe58a, #6b5a12); --here: light-dark(#fff3cf, #332c14);
}
@media (prefers-color-scheme: dark) { :root { --low: .72; --high: 1 } }
* { box-sizing: border-box; min-width: 0 }
body { display: flex; flex-direction: column; height: 100dvh; margin: 0;
	font: 14px/1.4 system-ui, sans-serif; background: var(--bg); color: var(--text) }
a { color: var(--accent); text-decoration: none }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -1px }
[hidden] { display: none !important }
.quiet { position: absolute; clip-path: inset(50%) }
button, input, select, textarea { font: inherit; color: inherit; background: var(--bg);
	border: 1px solid var(--edge); border-radius: 5px; padding: 3px 8px }
button, select { background: var(--panel); border-color: var(--line); flex: none }
:disabled, ::placeholder { color: var(--dim); opacity: 1 }
.main { background: var(--accent); color: var(--bg) }
.plain { background: none; border-color: transparent; padding: 3px 6px }
[aria-pressed=true] { color: var(--accent); border-color: var(--accent) }
.dim, small, dt, code, kbd, .k, .heads .plain, .dropped, .exit { color: var(--dim) }
.bad { color: var(--bad) }
.warn { color: var(--warn) }
.good:not(.dot + .good) { color: var(--good) }
[aria-invalid=true] { border-color: var(--bad) }
[type=checkbox] { margin: 0; width: 15px; height: 15px; accent-color: var(--accent) }
.mono, textarea, code, kbd {
	font: 12.5px/18px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
header, .bar, .entry, .acts, .last, .part, .number:has(.past) { display: flex; gap: 6px;
	align-items: center }
.last { justify-content: flex-end }
header { padding: 5px 14px; border-bottom: 1px solid var(--line) }
#home { font-weight: 700; color: inherit; margin-right: 8px }
nav { display: flex; flex: 1; gap: 2px }
nav a { padding: 4px 8px; border-radius: 5px; color: var(--dim) }
nav a[aria-current] { background: var(--panel); color: var(--text) }
#link::before { content: "\25CF"; margin-right: 5px; color: var(--good) }
.away #link::before { color: var(--bad) }
#away, #message { margin: 0; padding: 7px 14px; background: var(--panel); color: var(--bad);
	border-bottom: 1px solid var(--line) }
p:empty { display: none }
#message button, .push { float: right; margin-left: auto }
.away main { filter: grayscale(1); opacity: .6 }
main { flex: 1; min-height: 0; overflow: auto; padding: 10px 14px; outline: none }
main:has(.log) { display: flex; overflow: hidden }
h1, h2 { font-size: 18px; margin: 0 }
main, p { overflow-wrap: anywhere }
section h2 { font-size: 14px; margin-top: 14px }
h2:only-child { display: none }
.bar { margin-bottom: 8px; flex-wrap: wrap }
.grow { flex: 1 1 150px; max-width: 320px }
.row { display: grid; align-items: center; column-gap: 12px; padding: 0 6px; min-height: 32px;
	border-bottom: 1px solid var(--line); position: relative; grid-template-columns: 18px
	minmax(110px, 2fr) minmax(150px, 5fr) 70px 58px 160px 58px 106px 112px 30px }
.item { content-visibility: auto; contain-intrinsic-size: auto 32px; scroll-margin: 60px }
.item:is(:hover, :focus-within) { background: var(--panel) }
.heads { position: sticky; top: -10px; background: var(--bg); z-index: 2 }
.heads .plain { padding: 0 }
[aria-sort=ascending] .plain::after { content: " \2191" }
[aria-sort=descending] .plain::after { content: " \2193" }
.group.row { grid-template-columns: 1fr auto; margin-top: 12px }
.group .plain { font-weight: 600 }
@media (hover) {
	.table:not(:has(:checked)) .row:not(:hover, :focus-within) input { opacity: 0 }
}
.row .hand { position: absolute; right: 40px; background: var(--panel); padding-left: 8px }
.row:not(:hover, :focus-within) .hand { display: none }
.hand button { background: var(--bg); text-transform: capitalize }
.dot { display: inline-block; width: 1.4em; text-align: center }
.past { width: 48px; height: 18px; background: var(--accent); opacity: .6 }
.past + span { margin-left: auto }
.shown { display: flex; flex-direction: column }
#picked { order: 1; position: sticky; bottom: 0; background: var(--panel); padding: 8px 14px;
	z-index: 3; border: 1px solid var(--edge); border-radius: 6px }
pre { background: var(--panel); padding: 10px; border-radius: 6px; white-space: pre-wrap }
.two { flex: 1; display: grid; grid-template: auto minmax(0, 1fr) / minmax(0, 1fr) auto;
	gap: 0 16px }
.two > .bar { grid-column: 1 / 3 }
.two details { overflow: auto }
.two [open] { width: 340px }
summary { cursor: pointer; font-weight: 600; padding: 4px 0 }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 0 0 14px }
dd { margin: 0; overflow: auto; max-height: 8em; white-space: pre-wrap }
.part { padding: 4px 0; border-bottom: 1px solid var(--line) }
.part :first-child { flex: 1 }
ol { list-style: none; margin: 0; padding: 0 }
li { display: flex; gap: 12px; padding: 3px 0 }
time { flex: none }
.events a { width: 180px; flex: none }
.log { flex: 1; min-height: 160px; display: flex; flex-direction: column; position: relative }
.lines { flex: 1; overflow: auto; border: 1px solid var(--line); border-radius: 5px;
	position: relative; contain: strict; overflow-anchor: none }
.lines > div { position: absolute; top: 0; left: 0; min-width: 100% }
.l { white-space: pre; padding: 0 8px; min-height: 18px; border-left: 3px solid transparent }
.wrap > div { width: 100% }
.wrap .l { white-space: pre-wrap; word-break: break-all }
.k { cursor: pointer }
.stderr { border-left-color: var(--bad) }
.dropped, .exit { background: var(--panel); font-style: italic }
.stdin { color: var(--accent) }
mark { background: var(--mark); color: var(--text) }
.here { background: var(--here); border-left-color: var(--warn) }
.b { font-weight: 700 }
.f { opacity: .85 }
.i { font-style: italic }
.u { text-decoration: underline }
.more { position: absolute; bottom: 12px; right: 24px }
.entry { margin-top: 8px }
.entry input { flex: 1 }
.fields { display: grid; grid-template-columns: 250px minmax(0, 30rem); gap: 10px 18px;
	padding: 8px 0 }
:is(.fields, .part) :is(code, .bad, small) { display: block }
.fields :is([type=text], textarea) { width: 100% }
.plan { position: sticky; bottom: -10px; background: var(--bg); padding: 10px 0 }
#menu { color: inherit; background: var(--bg); border: 1px solid var(--edge); inset: auto;
	margin: 0; padding: 4px; border-radius: 6px; width: max-content }
kbd { display: inline-block; width: 4em }
#menu button { display: block; width: 100%; text-align: left; border: 0; background: none }
#menu button::first-letter { text-transform: uppercase }
#menu :focus { background: var(--panel) }
@media (max-width: 1000px) {
	.row { grid-template-columns: 18px minmax(100px, 2fr) minmax(120px, 3fr)
		68px 54px 52px 58px 30px }
	.exits, .again, .past { display: none }
	.item .state { white-space: normal; padding: 4px 0 }
	.two { display: flex; flex-direction: column }
	.two [open] { max-height: 45vh; width: auto }
}
@media (max-width: 600px) {
	header, main { padding: 6px 10px }
	nav a { padding: 6px 5px }
	.template { grid-template: 24px auto / 18px 1fr auto auto 30px;
		padding: 5px 2px; column-gap: 8px }
	.item .mark, .template .last { grid-row: 1 / 3 }
	.item .state { grid-area: 2 / 2 }
	.item .cpu { grid-area: 1 / 3 }
	.item .mem { grid-area: 1 / 4 }
	.template .last { grid-column: 5 }
	.heads, .row .hand { display: none }
	.log > .bar { flex-wrap: nowrap; overflow-x: auto; scrollbar-width: none }
	.log .grow { flex: 1 0 110px }
	.fields { grid-template-columns: 1fr; gap: 2px }
	.fields > div { margin-bottom: 10px }
	.events li { flex-wrap: wrap; gap: 0 12px }
}
@media (hover: none) { button { min-height: 34px } }
</style></head>
<body>
<header><a id="home" href="#/">gaffer</a><nav aria-label="Views" id="nav"></nav>
<span class="dim" id="link" role="status">live</span>
<button class="plain" id="help" aria-label="Keys" title="keys (?)">?</button></header>
<p id="away" role="alert"></p>
<p id="message" role="alert"></p><p id="said" role="status" class="quiet"></p>
<main id="main" tabindex="-1"></main>
<div id="menu" popover></div>
<script type="application/json" id="snapshot">__SNAPSHOT__</script>
<script nonce="__NONCE__">
"use strict";
const $ = id => document.getElementById(id), enc = encodeURIComponent, main = $("main");
const base = location.origin + location.pathname.replace(/[^/]*$/, "");
const snapshot = JSON.parse($("snapshot").textContent), {said, nav} = snapshot;
const LINES_MAX = 105e3, CHARS_MAX = 12e6, LINE = 18, EVENTS_MAX = 1024;

// el("div.bar.push", {title, click: f}, "text", child, [children]): what is false is left out
function el(kind, ...parts) {
	const [tag, ...classes] = kind.split("."), node = document.createElement(tag);
	node.className = classes.join(" ");
	for (const part of parts.flat().filter(Boolean)) {
		if (part instanceof Node || typeof part !== "object") node.append(part);
		else for (const [key, value] of Object.entries(part)) {
			if (typeof value === "function") node.addEventListener(key, value);
			else if (value !== undefined && value !== false) {
				node.setAttribute(key === "label" ? "aria-label" : key, value);
			}
		}
	}
	return node;
}
function put(node, text) { if (node.textContent !== text) node.textContent = text; }
function attr(node, name, value) {
	if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}
// its key does the same
const button = (kind, text, label, click, key) => el("button" + kind, {type: "button",
	title: label + (key ? ` (${key})` : ""), label, click, "data-key": key}, text);
function box(param, label, changed, key, more) {  // a search field whose text is in the address
	return el("input.grow", {type: "search", placeholder: label, label, "data-key": key,
		value: params().get(param) || "", ...more, input: event => {
			setParam(param, event.target.value); changed();
		}});
}
const cell = (kind, ...children) => el("div" + kind, {role: "cell"}, ...children);
function say(text) { $("said").textContent = text; }
function complain(text) {
	$("message").replaceChildren(...text ? [text, button("", "Dismiss", "dismiss", () =>
		complain())] : []);
}
const plural = (count, word, words = word + "s") =>
	count.toLocaleString("en") + " " + (count === 1 ? word : words);
const joined = (parts, by = " · ") => parts.filter(Boolean).join(by);
const processes = count => plural(count, "process", "processes");
function fits(node, text) {  // each word of `text` is in what the node shows
	const own = node.textContent.toLowerCase();
	return text.toLowerCase().split(/\s+/).every(word => own.includes(word));
}
function span(left) {
	const [unit, sign] = [[86400, "d"], [3600, "h"], [60, "m"], [1, "s"]].find(([unit]) =>
		left >= unit || unit === 1);
	return (left / unit).toFixed(left < 10 * unit ? 1 : 0) + sign;
}
const now = () => Date.now() / 1000;
function ago(time) {
	const left = now() - time;
	return left < 0 ? "in " + span(-left) : span(left) + " ago";
}
function size(bytes) {
	const power = Math.min(3, Math.floor(Math.log2(bytes + 1) / 10)), value = bytes / 1024 ** power;
	return value.toFixed(power && value < 10 ? 1 : 0) + "BKMG"[power];
}
const dateText = seconds => new Date(seconds * 1000).toLocaleString("sv");
const clock = seconds => dateText(seconds).slice(now() - seconds < 86400 ? 11 : 0);
function failed({exit_status, term_signal}) {  // SIGTERM is how one is stopped
	return Boolean(exit_status || term_signal && term_signal !== 15);
}
const exitText = ({exit_status, term_signal, times}) => (term_signal ?
	"killed by SIG" + (snapshot.signals[term_signal] || term_signal) :
	"exited " + exit_status) + (times > 1 ? `, ${times} times` : "");

// ---- what is known: statuses by name, and events
const templates = new Map(), events = snapshot.events;
const RANKS = Object.keys(snapshot.states);
function keep(status) {
	templates.set(status.name, {processes: [], ...status, at: performance.now()});
}
snapshot.templates.forEach(keep);
const groupOf = name => name.split(":").slice(0, -1)[0] || "";
const since = status => (performance.now() - status.at) / 1000;
function stateOf(status) {
	const {state, gave_up, last_exit: last, restarts, processes: all, uptime} = status;
	if (state === "stopped" && gave_up) return "failed";
	const ages = all.filter(each => each.state !== "stopping").map(each => each.uptime);
	return state === "running" && restarts && last && failed(last) &&
		Math.min(uptime, ...ages) + since(status) < 10 ? "restarting" : state;
}
const rankOf = status => RANKS.indexOf(stateOf(status));
function reason(status) {
	const {last_exit: last, next_try, next_runs = [], waiting = []} = status,
		state = stateOf(status);
	return joined([state === "stopping" && `waiting for ${processes(status.stopping)} to end`,
		state === "stopped" && status.active && "scaled to 0",
		state === "waiting" && "for " + waiting.join(", "),
		state === "starting" && "not ready yet",
		next_runs.length && "next run " + ago(next_runs[0]),
		next_try !== null && rankOf(status) < 3 && "next try in " +
			span(Math.ceil(next_try - since(status))),
		status.gave_up && "it exits too often",
		status.error || last && !["running", "stopping", "stopped"].includes(state) && exitText(last),
		status.hint]);
}
function showState(node, status) {
	const state = stateOf(status), [sign, kind] = snapshot.states[state], more = " " + reason(status);
	if (node.textContent === sign + state + more) return;
	node.title = state + more;
	node.replaceChildren(el("span.dot." + kind, {"aria-hidden": "true"}, sign),
		el("span." + kind, state), el("span.dim", more));
}

// ---- asking the server: a refusal is shown in its own words
let awaySince = 0;
function reached(yes) {
	if (yes === !awaySince) return;
	awaySince = yes ? 0 : now();
	document.body.classList.toggle("away", !yes);
	put($("away"), yes ? "" : "The server has not answered since " + clock(awaySince) +
		". What you see is from then.");
	put($("link"), yes ? "live" : "away");
}
async function ask(method, path, body) {
	try {
		const answer = await fetch(base + path, {method, body: typeof body === "object" ?
			JSON.stringify(body) : body, signal: method === "GET" ? AbortSignal.timeout(2e4) : null});
		const {ok, status} = answer, value = status === 204 || await answer.json();
		reached(true);
		return {ok, status, value};
	} catch (error) {  // a proxy's error is not JSON
		reached(false);
		return {value: {reason: "the server does not answer"}};
	}
}
async function act(refs, action, method = "POST") {  // refs: names, or pids
	const answers = await Promise.all(refs.map(ref =>
		ask(method, "processes/" + enc(ref) + action)));
	const refused = answers.find(answer => !answer.ok);
	complain(refused && refused.value.reason);
	if (!refused) say("done");
	poll();
}

// ---- one stream a window, and none in a hidden one: {path(), types, take(type, data, id)}
let stream, source, lastEvent = snapshot.since;
function listen() {
	if (source) source.close();
	if (document.hidden) return;
	source = new EventSource(base + stream.path() + "&heartbeat=20");
	for (const type of [...stream.types, "dropped"]) {
		source.addEventListener(type, ({data, lastEventId}) =>
			stream.take(type, type === "line" ? data : JSON.parse(data), lastEventId));
	}
	source.onopen = poll;
	source.onerror = () => source.close();  // the next beat opens another
}
const watch = {path: () => "watch?feed=eventsource&since=" + enc(lastEvent),
	types: Object.keys(said), take(type, event, id) {
		lastEvent = id; due = 0;
		if (type === "dropped") { if (event.restarted) events.length = 0; return; }
		events.push(event);
		if (events.length > EVENTS_MAX) events.shift();
		if (view.event) view.event(event);
	}};
document.addEventListener("visibilitychange", listen);

// ---- what is polled: states, CPU and memory; at the next beat if it is due
let polling = false, due = 0, sampled = 0;
const histories = new Map();  // of pids, the latest first
async function poll() {
	due = 0;
	if (polling || document.hidden) return;
	polling = true; due = now() + (templates.size > 50 ? 5 : 2);
	try { await view.poll(); } finally { polling = false; }
}
setInterval(() => {
	if (document.hidden) return;
	if (source.readyState === EventSource.CLOSED) listen();
	if (now() > due) poll();
	if (view.tick && !awaySince) view.tick();
}, 500);
async function refresh(name) {  // at one template, or at all
	const whole = now() - sampled > 30;
	const answer = await ask("GET", "status" + (name ? "/" + enc(name) : "") + "?usage=true" +
		(whole ? "&history=true" : ""));
	if (answer.status === 404) templates.delete(name);
	else if (!answer.ok) return;
	else {
		if (whole) { sampled = now(); histories.clear(); }
		if (!name) templates.clear();
		for (const status of [answer.value].flat()) {
			keep(status);
			for (const {pid, history} of status.processes) if (history) histories.set(pid, history);
		}
	}
	const bad = [...templates.values()].filter(status => rankOf(status) < 3).length;
	document.title = joined([bad && bad + " failing", view.title, "gaffer"], " – ");
	view.update();
}
function uses(all, at) {  // CPU (0) or memory (1) of processes
	return all.reduce((sum, {cpu, rss}) => sum + ([cpu, rss][at] || 0), 0);
}
function usage() {  // cells of CPU and memory: what processes use, and have used
	const cells = ["cpu", "mem"].map(kind => cell(`.${kind}.number`, el("span.past"), el("span")));
	return {cells, show(all) {
		const lists = all.map(({pid}) => histories.get(pid) || []);
		const length = Math.max(0, ...lists.map(list => list.length));
		cells.forEach(({children: [graph, text]}, at) => {
			const past = Array.from({length}, (_, back) =>
				lists.reduce((sum, list) => sum + (list[back] || [0, 0])[at], 0));
			const value = uses(all, at), most = Math.max(at ? 1 : 10, ...past);
			const point = (back, height) => `${100 - back / .59}% ${100 - 95 * height / most}%`;
			graph.hidden = length < 3 ||
				(at ? Math.min(...past) > .9 * most : Math.max(...past) < 1);
			if (!graph.hidden) graph.style.clipPath = `polygon(${[point(0, 0),
				...past.map((each, back) => point(back, each)), point(length - 1, 0)]})`;
			put(text, !value ? "" : at ? size(value) : value.toFixed(value < 9.95 ? 1 : 0) + "%");
		});
	}};
}

// ---- menus, questions, actions
function menu(from, items) {  // items: [text, what to do, class]
	const node = $("menu"), place = from.getBoundingClientRect();
	node.replaceChildren(...items.map(([text, click, kind = ""]) => el("button" + kind, {click: () => {
		node.hidePopover(); from.focus(); if (click) click();
	}}, text)));
	node.showPopover();
	node.style.left = Math.max(4, place.right - node.offsetWidth) + "px";
	node.style.top = Math.max(4, Math.min(place.bottom, innerHeight - node.offsetHeight - 4)) + "px";
	node.firstChild.focus();
}
const nameThem = names => names.length === 1 ? names[0] : plural(names.length, "template");
function askSignal(refs, whom) {
	const [name, group] = (prompt(`Signal to ${whom} (or "HUP group", to its process group):`,
		"HUP") || "").trim().split(/ +/);
	if (name) act(refs, "/_signal/" + enc(name) + (group ? "?group=true" : ""));
}
function askScale(names) {
	const text = prompt(`Processes of ${nameThem(names)} (0 to 1000):`,
		templates.get(names[0]).numprocesses);
	if (text && !/^ *(\d{1,3}|1000) *$/.test(text)) complain("Give a whole number from 0 to 1000.");
	else for (const name of text ? names : []) {
		const change = Number(text) - templates.get(name).numprocesses;
		if (change) act([name], change > 0 ? "/_add/" + change : "/_sub/" + -change);
	}
}
async function askDelete(names) {
	if (!confirm(`Delete ${names.join(", ")}? Its output is forgotten.`)) return;
	await act(names, "", "DELETE");
	if (names.includes(view.name)) go("/");
}
const VERBS = [["start", "s"], ["stop", "t"], ["restart", "r"]];
const menuButton = (label, items) => button(".plain", "⋯", "more for " + label,
	event => menu(event.currentTarget, items()), "m");
// buttons for what is called `label`; names(): which templates that is now
const acts = (names, label) => [el("span.acts.hand", VERBS.map(([word, key]) =>
	button("", word, word + " " + label, () => act(names(), "/_" + word), key))),
menuButton(label, () => moreItems(names()))];
function moreItems(names) {
	const pids = names.flatMap(name => templates.get(name).os_pids).slice(0, 12).join(" ");
	return [...VERBS.map(([word]) => [word, () => act(names, "/_" + word)]),
		["scale…", () => askScale(names)], ["signal…", () => askSignal(names, nameThem(names))],
		["edit…", () => go("/edit/" + enc(names[0]))], ["delete…", () => askDelete(names), ".bad"],
		["OS pid " + pids, () => copyText(pids)]];
}

// ---- the overview. A column: title, class, what it is sorted by
const COLUMNS = [["name", ".name", ({name}) => name], ["state", ".state", rankOf],
	["processes", ".count.number", ({running}) => -running],
	["uptime", ".up.number", status => -status.uptime - since(status)],
	["last exit", ".exits", ({last_exit: last}) => last ? -last.time : 0],
	["restarts", ".again.number", ({restarts}) => -restarts],
	["CPU", ".cpu.number", ({processes: all}) => -uses(all, 0)],
	["memory", ".mem.number", ({processes: all}) => -uses(all, 1)]];
function makeRow(name) {
	const [link, state, count, up, exits, again] = COLUMNS.map(([, kind]) => cell(kind + ".cut"));
	const group = groupOf(name), use = usage();
	const check = el("input", {type: "checkbox", label: "select " + name, value: name,
		"data-key": "x"});
	link.append(el("a", {href: "#/p/" + enc(name), title: name}, group && el("span.dim", group + ":"),
		name.slice(group && group.length + 1)));
	return {node: el("div.row.item.template", {role: "row", tabindex: -1, "data-name": name},
		cell(".mark", check), link, state, count, up, exits, again, use.cells,
		cell(".last", acts(() => [name], name))), tick() {
		const {status} = this, {last_exit: left} = status;
		showState(state, status);
		put(up, status.running ? span(status.uptime + since(status)) : "");
		put(exits, left ? exitText({...left, times: 1}).replace("killed by ", "") + " · " +
			ago(left.time) : "");
	}, update(status) {
		this.status = status;
		put(count, status.running + " / " + status.numprocesses);
		put(again, String(status.restarts || ""));
		use.show(status.processes); this.tick();
	}};
}
function countText(rows) {
	const states = Object.groupBy(rows, row => stateOf(row.status));
	return joined(RANKS.map(state => states[state] && states[state].length + " " + state));
}
const AT = ".item:focus-within";
const URGENT = "Needs attention", LOOSE = "No group", folded = new Set();
function makeHead(group) {
	const counts = el("span.dim"), folder = button(".plain", "", "fold " + group, () => {
		if (!folded.delete(group)) folded.add(group);
		view.update();
	});
	const head = {node: el("div.row.item.group", {role: "row", tabindex: -1, "data-name": group},
		cell("", folder, counts), cell(".last", acts(() =>
			head.members.map(row => row.status.name), "group " + group))), update(members) {
		const open = !folded.has(group);
		head.members = members;
		put(folder, (open ? "▾ " : "▸ ") + group); attr(folder, "aria-expanded", String(open));
		put(counts, countText(members));
	}};
	return head;
}
function overview() {
	const rows = new Map(), heads = new Map();  // by name; by group
	const said = el("span"), sum = el("span.dim"), nothing = firstSteps();
	const body = el("div", {role: "rowgroup", change: picked});
	const search = box("q", "Filter by name, state, reason", filter, "/");
	const titles = COLUMNS.map(([text, kind]) => el("div" + kind, {role: "columnheader"},
		button(".plain", text, "sort by " + text, () => {
			const sort = params().get("sort");
			setParam("sort", {[text]: "-" + text, ["-" + text]: ""}[sort] ?? text); update();
		})));
	const table = el("div.table", {role: "table", label: "Templates"}, el("div.row.heads",
		{role: "row"}, cell(""), titles), body);
	const bar = el("div.bar", {id: "picked"}, said, acts(chosen, "what is selected"));
	const shown = el("div.shown", el("div.bar", search, sum), bar, table);

	function update() {
		for (const name of rows.keys()) if (!templates.has(name)) rows.delete(name);
		for (const [name, status] of templates) {
			if (!rows.has(name)) rows.set(name, makeRow(name));
			rows.get(name).update(status);
		}
		shown.hidden = !templates.size; nothing.hidden = !shown.hidden;
		arrange(); picked();
	}
	function arrange() {
		const had = document.activeElement, sort = params().get("sort") || "", down = sort[0] === "-";
		const column = COLUMNS.findIndex(([text]) => text === sort.replace("-", ""));
		titles.forEach((title, at) => attr(title, "aria-sort", at !== column ? "none" :
			down === at > 1 ? "ascending" : "descending"));  // numbers: largest first
		const nodes = [], all = [...rows.values()], urgent = row => rankOf(row.status) < 5;
		const groups = Map.groupBy(all, ({status}) => groupOf(status.name) || LOOSE);
		const by = value => (one, other) => {
			const [a, b] = [value(one.status), value(other.status)];
			return a < b ? -1 : Number(a > b);
		};
		for (const row of all) row.folded = false;
		if (column >= 0) {
			all.sort(by(COLUMNS[column][2]));
			if (down) all.reverse();
			nodes.push(...all);
		} else for (const [group, members] of new Map([[URGENT, all.filter(urgent).sort(by(rankOf))],
			[LOOSE, groups.get(LOOSE) || []], ...groups])) {
			const list = group === URGENT ? members : members.filter(row => !urgent(row));
			if (!members.length || group === LOOSE && !list.length) continue;
			if (!heads.has(group)) heads.set(group, makeHead(group));
			heads.get(group).update(members);
			if (group !== LOOSE || nodes.length || groups.size > 1) nodes.push(heads.get(group));
			nodes.push(...list);
			for (const row of list) row.folded = folded.has(group);
		}
		if (nodes.length !== body.children.length ||
			nodes.some(({node}, at) => node !== body.children[at])) {
			body.replaceChildren(...nodes.map(({node}) => node));
			if (had.isConnected) had.focus({preventScroll: true});
		}
		filter();
	}
	function filter() {
		const text = search.value, seen = row => !row.node.hidden;
		for (const row of rows.values()) row.node.hidden = !fits(row.node, text) || row.folded && !text;
		for (const {members, node} of heads.values()) node.hidden = text && !members.some(seen);
		put(sum, countText([...rows.values()].filter(seen)) || "none");
	}
	function chosen() { return [...body.querySelectorAll(":checked")].map(check => check.value); }
	function picked() {
		put(said, chosen().length + " selected"); bar.hidden = !chosen().length;
	}
	function key(name) {
		const by = {j: 1, ArrowDown: 1, k: -1, ArrowUp: -1}[name], here = body.querySelector(AT);
		const nodes = [...body.children].filter(each => !each.hidden);
		if (by) nodes[here ? nodes.indexOf(here) + by : 0]?.focus();
		else if (name !== "Enter" || here !== document.activeElement) return false;
		else here.querySelector("a, button").click();
		return true;
	}
	update();
	return {node: el("div", el("h1.quiet", "Processes"), shown, nothing), update, key,
		keys: [["j k", "next, previous row"], ["Enter", "open the row"]],
		focus: () => body.firstChild || search,
		tick: () => rows.forEach(row => row.node.hidden || row.tick())};
}
function firstSteps() {
	const command = "python3 gaffer.py add_process --start --endpoint " + location.host +
		" clock -- sh -c 'while date; do sleep 1; done'";
	return el("div", el("h2", "Nothing runs here yet"), el("p", button(".main",
		"Add the first process", "add a template", () => go("/add")), " or in a terminal:"),
	el("pre.mono", command), button("", "Copy", "copy the command", () => copyText(command)));
}
async function copyText(text) {
	try { await navigator.clipboard.writeText(text); say("copied"); }
	catch (error) { complain("Copying needs https or localhost."); }
}

// ---- output. A line is kept as it came, "<time> <name> <pid> <label> <text>", after its id; after
// the label a "+": it goes on, a "<": it replaces the one before. Only what is in sight is in the
// document
function parse(raw) {
	const [, id, time, name, pid, label, open, over, text] =
		/^(\d+) (\S+) (\S+) (\d+) ([^ +<]+)(\+?)(<?) ([^]*)$/.exec(raw);
	return {id: Number(id), time: Number(time), name, pid, label, open, over, text};
}
const ESCAPE = /(\x1b(?:\[[0-?]*[ -\/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -\/]*[0-~]))/g,
	CONTROL = /[\x00-\x08\x0b-\x1f\x7f]/g, WIDE = /[\u2e80-\ud7ff\uf900-\uffef]/g;
function plain(text) {  // without escape sequences; other control characters as their pictures
	return text.replace(ESCAPE, "").replace(CONTROL, sign =>
		String.fromCharCode(sign === "\x7f" ? 0x2421 : 0x2400 + sign.charCodeAt(0)));
}
function lineText(line) {
	if (line.label !== "exit") return plain(line.text);
	return "process " + line.pid + " " + exitText(JSON.parse(line.text));
}
const fell = line => line.label === "exit" && failed(JSON.parse(line.text));

const {basic, theme, names} = snapshot;
const colour256 = number => number < 16 ? String(number) :
	`rgb(${number > 231 ? Array(3).fill(8 + 10 * (number - 232)) : [36, 6, 1].map(part =>
		Math.floor((number - 16) / part) % 6).map(part => part && 55 + 40 * part)})`;
const FLAGS = {1: "b", 2: "f", 3: "i", 4: "u", 7: "turned"};
const LAYERS = {3: "fg", 4: "bg", 9: "fg", 10: "bg"};  // by the tens of a code
function paint(style, codes) {  // SGR: ECMA-48 section 8.3.117
	for (let at = 0; at < codes.length; at++) {
		const code = codes[at], digit = code % 10, layer = LAYERS[Math.floor(code / 10)];
		if (code === 0) style = {};
		else if (FLAGS[code]) style[FLAGS[code]] = true;
		else if (code === 22) style.b = style.f = false;
		else if (FLAGS[code - 20]) style[FLAGS[code - 20]] = false;
		else if (!layer) continue;
		else if (digit < 8) style[layer] = String(code < 90 ? digit : digit + 8);
		else if (digit === 9) style[layer] = "";
		else {
			const rgb = codes[at + 1] === 2, parts = codes.slice(at + 2, at + 5).map(part => part & 255);
			style[layer] = rgb ? `rgb(${parts})` : colour256(parts[0]);
			at += rgb ? 4 : 2;
		}
	}
	return style;
}
function segments(text) {  // [text, its style]
	let style = {};
	return text.split(ESCAPE).map((part, at) => {  // text and sequences in turn
		if (at % 2 && /^\x1b\[.*m$/.test(part)) {
			style = paint({...style}, part.slice(2, -1).split(/[;:]+/).map(Number));
		}
		return [at % 2 ? "" : plain(part), style];
	}).filter(([part]) => part);
}
function piece(text, style) {
	const flags = Object.values(FLAGS).filter(flag => style[flag]).join(" ");
	let {fg, bg} = style;
	if (style.turned) [fg, bg] = [bg || "var(--bg)", fg || "var(--text)"];
	if (!fg && !bg && !flags) return document.createTextNode(text);
	const node = el("span", {class: flags}, text), own = colour => basic[colour] || colour;
	node.style.background = own(bg);
	node.style.color = !bg ? fg && (basic[fg] ? `var(--${theme[fg % 8]})` :
		`oklch(from ${fg} clamp(var(--low), l, var(--high)) c h)`) :
		own(fg) || `color(from ${own(bg)} xyz ${"calc(999 * (.18 - y)) ".repeat(3)})`;
	return node;
}
function paintLine(node, parts, find) {
	const text = parts.map(([part]) => part).join("");
	const ends = !find ? [] : [...text.matchAll(new RegExp(find, "g" + find.flags))].flatMap(
		({index, 0: {length}}) => [index, index + length]);  // where a match begins, and ends
	let at = 0, marked = false;
	for (let [part, style] of parts) while (part) {
		const text = part.slice(0, ends.length ? ends[0] - at : part.length);
		if (text) node.append(marked ? el("mark", text) : piece(text, style));
		part = part.slice(text.length); at += text.length;
		if (at === ends[0]) { ends.shift(); marked = !marked; }
	}
}
const coloured = new Map();  // by name
const PLAIN = ["stdout", "exit", "dropped", "stdin"], MARKED = ["stderr", ...PLAIN.slice(1)];
function makeLog(ref) {  // ref: "" (all) or a name
	let lines = [], first = 0, chars = 0;  // what is kept, each after its id; the number of the first
	let shown = [], tops = [0];  // numbers of what is shown, and the row at which each begins
	let frame = 0, following = true, seen = 0, last = "", wanted = params().get("line");
	let find = null, matches = 0, here = -1, held = -1, nodes = new Map();
	let columns = 80, height = 0, sign = 0;
	const open = new Map(), states = {}, path = "streams" + (ref && "/" + enc(ref));
	const toggle = (param, text, label, key) => {
		const node = button("", text, label, () => {
			setParam(param, !states[param] && "1"); show(); rebuild();
		}, key);
		const show = () => attr(node, "aria-pressed", String(states[param] = params().has(param)));
		show();
		return node;
	};
	const hits = el("span.dim", {role: "status"});
	const search = box("find", "Find (regular expression)", () => { readFind(); next(-1); }, "f",
		{keydown: event => event.key === "Enter" && next(event.shiftKey ? 1 : -1)});
	const spacer = el("div"), block = el("div"), more = button(".more.main", "", "follow", () => {
		following = true; draw(); area.focus();
	}, "End");
	const area = el("div.lines.mono", {tabindex: 0, role: "log", "aria-live": "off", label: "Output",
		scroll: scrolled, click: ({target}) =>
			target.closest(".k") && link(target.closest(".l").number)}, spacer, block);
	const node = el("section.log", el("div.bar", search,
		button(".plain", "↑", "previous match", () => next(-1), "N"),
		button(".plain", "↓", "next match", () => next(1), "n"),
		toggle("only", "Matches", "only what matches", "O"), hits, el("span.push"),
		toggle("err", "stderr", "only stderr", "2"),
		toggle("time", "Times", "times", "T"),
		toggle("wrap", "Wrap", "wrap", "w"),
		button("", "Failure", "previous failure", failure, "z"),
		button("", "Link", "link to the marked line", () => link(here), "l"),
		el("a", {href: base + path + "?tail=all&timeout=0", download: (ref || "gaffer") + ".log"},
			"Save")),
	area, more);

	// what comes in
	function take(type, data, id) {
		last = id;
		if (data.restarted) note("the server has restarted");
		if (data.bytes) note(plural(data.bytes, "byte") + " were lost here");
		if (type === "line") push(parseInt(id, 10) + " " + data);
	}
	function note(text, label = "dropped") { push(`0 ${now()} - 0 ${label} ${text}`); }
	function push(raw) {
		keepLine(raw);
		if (!frame) frame = requestAnimationFrame(flush);
	}
	const epoch = () => last.split("@")[1];
	function flush() {
		const before = total(), [id, run] = wanted ? wanted.split("@") : [];
		frame = 0; trim();
		const gone = before - total();
		if (id && (run !== epoch() || parseInt(lines.at(-1), 10) >= id)) {
			const at = run === epoch() ? lines.findIndex(raw => raw.startsWith(id + " ")) : -1;
			wanted = null;
			if (at >= 0) return jump(shown.indexOf(first + at));
			complain("That line is no longer kept.");
		}
		draw(gone ? area.scrollTop - gone : undefined);
	}
	function keepLine(raw) {
		const line = parse(raw), key = line.pid + " " + line.label;
		if (line.label === "dropped") open.clear();  // what comes is no more of it
		const [begun, goes] = open.get(key) || [], at = goes || line.over ? begun - first : -1;
		if (at >= 0) {  // it goes on with an unfinished line, or replaces it
			chars -= lines[at].length;
			if (!line.over) raw = lines[at].replace(/^\d+/, line.id) + line.text;
			lines[at] = raw; nodes.delete(begun);
			if (shown.at(-1) === begun) { shown.pop(); tops.pop(); add(begun); }
		} else { lines.push(raw); consider(first + lines.length - 1); }
		chars += raw.length;
		open.set(key, [at >= 0 ? begun : first + lines.length - 1, line.open]);
		if (line.label !== "exit") return;
		for (const each of open.keys()) if (each.startsWith(line.pid + " ")) open.delete(each);
		due = 0;
	}
	function consider(number) {
		const line = (find || states.err) && lineOf(number), hit = find && find.test(lineText(line));
		if (hit) matches++;
		if ((hit || !find || !states.only) && (!states.err || MARKED.includes(line.label))) add(number);
	}
	function add(number) { shown.push(number); tops.push(tops.at(-1) + rows(number)); }
	function trim() {
		while (lines.length > LINES_MAX || chars > CHARS_MAX) {
			const old = lines.splice(0, Math.ceil(lines.length / 20));
			first += old.length;
			for (const raw of old) chars -= raw.length;
			shown = shown.filter(number => number >= first); tops = tops.slice(-shown.length - 1);
		}
	}
	const lineOf = number => parse(lines[number - first]);

	// which lines are shown, and how high they are
	function readFind() {
		const text = search.value;
		find = null; here = -1;
		try { find = text ? new RegExp(text, /[A-Z]/.test(text) ? "" : "i") : null; }
		catch (error) { say(error); }
		attr(search, "aria-invalid", String(Boolean(text && !find)));
		rebuild();
	}
	function rebuild() {
		shown = []; tops = [0]; matches = 0; nodes.clear();
		lines.forEach((_, at) => consider(first + at));
		area.classList.toggle("wrap", states.wrap);
		if (total() <= height) following = true;
		draw();
	}
	function rows(number) {
		if (!states.wrap) return 1;
		const line = lineOf(number), text = head(line).join("") + lineText(line);
		return Math.ceil(text.replace(/\t/g, "8".repeat(8)).replace(WIDE, "22").length / columns) || 1;
	}
	function head(line) {  // [time, whose, label]
		const who = line.name === "-" ? "" : ref ? line.pid : line.name + " " + line.pid;
		const mark = PLAIN.includes(line.label) ? "" : line.label.replace("std", "").slice(0, 3);
		const time = states.time ? clock(line.time) + (line.time % 1).toFixed(3).slice(1) + " " : "";
		return [time, who.padEnd(ref ? 6 : 18) + " ", mark.padEnd(4)];
	}
	function resized() {
		const before = columns;
		if (!sign) {
			spacer.style.width = "1000ch"; sign = spacer.offsetWidth / 1000; spacer.style.width = "";
		}
		height = area.clientHeight; columns = Math.max(10, Math.floor((area.clientWidth - 19) / sign));
		if (states.wrap && before !== columns) rebuild(); else draw();
	}

	// what is seen
	const yOf = place => (tops[place] - tops[0]) * LINE;
	const total = () => yOf(shown.length);
	const placeAt = y => tops.findLastIndex(top => (top - tops[0]) * LINE <= y);
	function draw(top) {
		spacer.style.height = total() + "px";
		if (following) { top = total() - height; seen = first + lines.length; }
		if (top !== undefined) { area.scrollTop = top; held = area.scrollTop; }
		top = area.scrollTop;
		const from = Math.max(0, placeAt(top) - 5), to = placeAt(top + height) + 6;
		nodes = new Map(shown.slice(from, to).map(number =>
			[number, nodes.get(number) || lineNode(number)]));
		const wished = [...nodes.values()];
		for (const each of [...block.children]) if (!wished.includes(each)) each.remove();
		wished.forEach((each, at) => {  // what stays is not moved: a selection is kept
			if (block.children[at] !== each) block.insertBefore(each, block.children[at]);
		});
		block.style.transform = `translateY(${yOf(from)}px)`;
		more.hidden = following;
		const fresh = shown.length - 1 - shown.findLastIndex(number => number < seen);
		put(more, (fresh ? plural(fresh, "new line") : "to the end") + " ↓");
		put(hits, find ? matches + " of " + plural(lines.length, "line") : "");
	}
	function lineNode(number) {
		const line = lineOf(number), {label} = line, [time, who, mark] = head(line);
		const whose = el("span", who), made = el("div.l", el("span.k", {title: dateText(line.time) +
			(line.id ? ", link to this line" : "")}, time, whose, el("span.bad", {title: label}, mark)));
		if (!coloured.has(line.name)) coloured.set(line.name, names[coloured.size % names.length]);
		if (!ref) whose.style.color = `var(--${coloured.get(line.name)})`;
		made.number = number;
		if (MARKED.includes(label)) made.classList.add(label);
		made.classList.toggle("bad", fell(line));
		made.classList.toggle("here", number === here);
		paintLine(made, segments(label === "exit" ? lineText(line) : line.text), find);
		return made;
	}
	function scrolled() {
		const end = area.scrollTop + area.clientHeight >= area.scrollHeight - LINE / 2;
		if (area.scrollTop !== held) {  // not ours
			held = -1;
			if (end !== following && total() > height) following = end;
		}
		draw();
	}

	// find, link
	function jump(place) {
		nodes.delete(here); here = shown[place]; nodes.delete(here); following = false;
		draw(yOf(place) - height / 2);
		block.querySelector(".here mark")?.scrollIntoView({block: "nearest"});
		held = area.scrollTop;
	}
	function seek(by, fits) {
		const all = shown.length, start = here >= first ? shown.indexOf(here) : by > 0 ? -1 : all;
		for (let step = 1; step <= all; step++) {
			const place = (start + by * step + 2 * all) % all;
			if (fits(lineOf(shown[place]))) { jump(place); return true; }
		}
		return false;
	}
	function next(by) { if (find) seek(by, line => find.test(lineText(line))); }
	function failure() { if (!seek(-1, fell)) complain("No failure is shown."); }
	function link(number) {
		const {id} = number >= first ? lineOf(number) : {};
		if (!id) return complain("No line is marked.");
		setParam("line", id + "@" + epoch()); jump(shown.indexOf(number));
		say("the address bar now links to this line");
	}
	readFind(); new ResizeObserver(resized).observe(area);
	const stream = {types: ["line"], take, path: () => path + "?feed=eventsource&returns=true&" +
		(last ? "since=" + enc(last) : "tail=" + (wanted ? "all" : 2000))};
	return {node, note, stream, focus: () => area};
}
function allOutput() {
	const log = makeLog("");
	return {...log, node: el("div.log", el("h1.quiet", "Output"), log.node), title: "output"};
}

// ---- what happened, and why
function narrator() {  // tells events in order
	const exits = new Map(), began = new Map(), told = new Set();  // by name; by pid
	return ({event, name, pid, time, ...more}) => {
		const exit = exits.get(name), age = began.has(pid) ? " after " + span(time - began.get(pid)) : "";
		if (event === "spawn") {
			began.set(pid, time); told.delete(pid); exits.delete(name);
			return said[event] + pid + (!exit ? "" : exit.told ? " in place of process " + exit.pid :
				", as process " + exit.pid + " " + exitText(exit));
		}
		if (event === "exit") {
			exits.set(name, {...more, pid, told: told.has(pid)});
			return said[event] + pid + " " + exitText(more) + age + (told.has(pid) ? ", as it was told to" :
				", by itself");
		}
		if (event === "stop_pid" || event === "reap") told.add(pid);
		if (event === "start" || event === "stop") exits.delete(name);
		return said[event] + (pid || "") + (event === "ready" ? age : "");
	};
}
function happened(event, text, ...more) {
	const bad = ["flap", "fail"].includes(event.event) || event.event === "exit" && failed(event);
	return el("li", el("time.dim", {title: dateText(event.time)}, clock(event.time)), ...more,
		el("span" + (bad ? ".bad" : ""), text));
}
function eventList() {
	const list = el("ol.events"), why = narrator();
	const search = box("q", "Filter by name, event, reason", () =>
		[...list.children].forEach(filter), "/");
	function add(event) {
		list.prepend(happened(event, why(event), el("a.cut", {href: "#/p/" + enc(event.name)},
			event.name)));
		filter(list.firstChild);
		if (list.childElementCount > EVENTS_MAX) list.lastChild.remove();
	}
	function filter(item) { item.hidden = !fits(item, search.value); }
	events.forEach(add);
	return {node: el("div", el("h1.quiet", "Events"), el("div.bar", search), list),
		title: "events", event: add, focus: () => search};
}

// ---- one template
const typed = el("datalist", {id: "typed"});
function makeEntry(log) {
	const who = el("select", {label: "to which process"});
	const line = el("input.mono", {label: "A line to stdin", placeholder: "A line to stdin",
		list: "typed", "data-key": "i"});
	async function send(method) {  // it stands where it was sent; a refusal comes after it
		const text = line.value, body = method === "POST" ? text + "\n" : undefined;
		log.note(body ? "> " + text : "end of file", "stdin");
		typed.prepend(el("option", {value: text})); line.value = "";
		const answer = await ask(method, `streams/${who.value}/stdin`, body);
		if (!answer.ok) log.note("not sent: " + answer.value.reason);
		if (typed.childElementCount > 200) typed.lastChild.remove();
	}
	const node = el("form.entry", {hidden: true, submit(event) {
		event.preventDefault(); send("POST");
	}}, who, line, typed, el("button", "Send"),
	button("", "End of file", "close its stdin", () => send("DELETE")));
	return {node, show({redirect_input}, pids) {
		node.hidden = !redirect_input;
		for (const each of node.children) each.disabled = !pids.length;
		who.hidden = pids.length < 2;
		if ([...who.options].map(({value}) => value).join() === pids.join()) return;
		who.replaceChildren(...pids.map(pid =>
			el("option", {value: pid, selected: pid === +who.value}, "process " + pid)));
	}};
}
function detail(name) {
	const log = makeLog(name), entry = makeEntry(log), parts = new Map();
	const state = el("span.cut", {role: "status"}), facts = el("dl.facts"), story = el("ol.story");
	const list = el("section", el("h2", "Processes"));
	const tools = el("span.push.acts", acts(() => [name], name));
	const aside = el("details", {open: innerWidth > 1000}, el("summary", "Details"), facts, list,
		el("section", el("h2", "History"), story));
	const node = el("div.two", el("div.bar", el("h1", name), state, tools), el("div.log", log.node,
		entry.node), aside);
	const own = events.filter(event => event.name === name);
	let last = lastEvent;
	function tick() {
		const status = templates.get(name);
		if (status) showState(state, status);
	}
	function update() {
		const status = templates.get(name), {processes: alive} = status || {};
		tools.hidden = !status;
		if (!status) return put(state, "there is no such template");
		for (const [id, part] of parts) if (!alive.some(each => each.pid === id)) {
			part.node.remove(); parts.delete(id);
		}
		alive.forEach(showPart); tick();
	}
	async function poll() {
		await refresh(name);
		const answer = await ask("GET", "processes/" + enc(name));
		if (!answer.ok) return;
		showFacts(answer.value); entry.show(answer.value, templates.get(name).pids);
		for (let count = 0; count < 200; count++) {  // a long poll answers one event
			const {status, value} = await ask("GET",
				`watch/proc/${enc(name)}?timeout=0&since=${enc(last)}`);
			if (status !== 200) break;
			last = value.id;
			if (said[value.event]) own.push(value);
		}
		const why = narrator();
		own.splice(0, own.length - EVENTS_MAX);
		story.replaceChildren(...own.map(event => happened(event, why(event))).slice(-10).reverse());
	}
	function showFacts(template) {
		const runs = (templates.get(name).next_runs || []).map(time => ["next run", dateText(time)]);
		facts.replaceChildren(...[...given(template), ...runs].flatMap(([key, value]) =>
			[el("dt", key), el("dd.mono", textOf(value))]));
	}
	function showPart(process) {
		const {pid, os_pid, instance, state: word, uptime, kill_in, ready} = process;
		if (!parts.has(pid)) {
			const what = el("small"), use = usage();
			parts.set(pid, {what, use, node: el("div.part", el("span", name.replace(/.*:/, "") + "." +
				instance, what), use.cells, menuButton("process " + pid, () => [
				["stop (it is replaced)", () => act([pid], "/_stop")],
				["signal…", () => askSignal([pid], "process " + pid)]]))});
			list.append(parts.get(pid).node);
		}
		const {what, use} = parts.get(pid);
		put(what, joined([pid, "OS pid " + os_pid, `${word} ${span(uptime)}`,
			ready === false && "not ready", kill_in !== undefined && `SIGKILL in ${Math.ceil(kill_in)} s`]));
		use.show([process]);
	}
	update();
	return {...log, node, name, title: name, update, tick, poll};
}

// ---- the form, of the fields that the server has
const {adjustable, sections, labels, examples, areas} = snapshot.form;
const quote = word => /^[\w@%+=:,.\/-]+$/.test(word) ? word :
	`'${String(word).replace(/'/g, "'\\''")}'`;
function textOf(value) {  // of a field, as it is typed
	const json = JSON.stringify(value);
	if (value === null || value === undefined) return "";
	if (Array.isArray(value)) return value.some(Array.isArray) ? json : value.map(quote).join(" ");
	return typeof value !== "object" ? String(value) : json.includes("\\n") ? json :
		Object.entries(value).map(([key, each]) =>
			key + "=" + (typeof each === "object" ? JSON.stringify(each) : each)).join("\n");
}
function given(template) {  // what is not as it is by default
	return Object.entries(template).filter(([field, value]) => field !== "name" &&
		snapshot.fields[field] && textOf(value) !== textOf(snapshot.fields[field][0]));
}
function guess(text) {  // a number, list or flag
	try { return JSON.parse(text); } catch (error) { return text; }
}
function valueOf(field, text) {
	const [normal,, {type, items}] = snapshot.fields[field];
	const may = kind => [type].flat().includes(kind), words = text.split(/[\s,]+/).filter(Boolean);
	if (!words.length) return normal;
	if (/^\s*[[{]/.test(text)) return guess(text);
	if (may("object")) return Object.fromEntries(text.split("\n").filter(line =>
		line.trim()).map(line => {
		const [, key, value] = /^([^=]*)=?([^]*)$/.exec(line);
		return [key.trim(), field === "env" ? value : guess(value)];
	}));
	if (may("string")) return text;
	return may("array") && (words.length > 1 || !may("number")) ? items.type === "string" ? words :
		words.map(guess) : guess(text);
}
function form(name) {
	const inputs = {}, faults = {}, texts = {}, touched = new Set();
	const title = name ? "Edit " + name : "Add a template";
	const path = "processes" + (name ? "/" + enc(name) : "");
	const rest = el("span.bad", {role: "alert"}), plan = el("span", {role: "status"});
	const node = el("form", {input: event => { touched.add(event.target.name); soon(); },
		submit: event => { event.preventDefault(); save(); }}, el("h1", title));
	const more = el("section", el("h2", "More"));
	let template = {}, waiting = 0, count = 0;
	for (const [section, own] of Object.entries(sections)) {
		const fields = el("div.fields");
		for (const field of own.split(" ")) {
			if (name && field === "start") continue;
			const [normal, help, schema] = snapshot.fields[field], id = "field-" + field;
			const kind = schema.enum ? "select" : areas.includes(field) ? "textarea" : "input";
			inputs[field] = el(kind, {id, name: field, "aria-describedby": `${id}-help ${id}-fault`,
				type: typeof normal === "boolean" ? "checkbox" : "text", autocomplete: "off",
				spellcheck: "false", placeholder: examples[field]},
			(schema.enum || []).map(each => el("option", each)));
			faults[field] = el("span.bad", {id: id + "-fault", role: "alert"});
			fields.append(el("label", {for: id}, labels[field], el("code", field)), el("div",
				inputs[field], el("small", {id: id + "-help"}, help), faults[field]));
			write(field, normal);
		}
		if (!section) node.append(fields);
		else more.append(el("details", el("summary", section), fields));
	}
	inputs.name.disabled = Boolean(name);
	node.append(more, el("div.bar.plan", el("button.main", name ? "Save" : "Add"), button("", "Cancel",
		"cancel", () => history.back()), plan, rest));
	function write(field, value) {
		if (inputs[field].type === "checkbox") inputs[field].checked = value;
		else inputs[field].value = textOf(value);
		texts[field] = read(field);
	}
	function read(field) {
		const {type, checked, value} = inputs[field];
		return type === "checkbox" ? String(checked) : value;
	}
	function changes() { return Object.keys(inputs).filter(field => read(field) !== texts[field]); }
	async function load() {  // what was not typed here is as it is now
		const {ok, value} = await ask("GET", path), own = changes();
		complain(ok ? "" : value.reason);
		if (ok) template = value;
		for (const field of Object.keys(inputs)) {
			if (ok && !own.includes(field)) write(field, template[field]);
		}
	}
	function unfold(field) { (inputs[field]?.closest("details") || {}).open = true; }
	function soon() { clearTimeout(waiting); waiting = setTimeout(() => send(true), 300); }
	async function send(dry) {
		const turn = ++count;
		clearTimeout(waiting);
		if (name) await load();
		const body = {...template, start: undefined};  // which an edit leaves as it is
		for (const field of changes()) body[field] = valueOf(field, read(field));
		const answer = await ask("POST", path + (dry ? "?dry_run=true" : ""), body);
		if (turn === count) { refuse(answer, dry); put(plan, answer.ok ? intent(body) : ""); }
		return turn === count && answer.ok;
	}
	function intent({start, schedule, numprocesses = 1}) {  // what saving will do
		const fields = changes(), {active, running} = templates.get(name) || {};
		const count = processes(numprocesses), calm = fields.every(each => adjustable.includes(each));
		if (!name) return start === false ? "Adds it." : schedule ? "Adds it, to run on its schedule." :
			`Adds it, and starts ${count}.`;
		if (!fields.length) return "Changes nothing.";
		return joined(["Changes " + fields.join(", "), !calm && running && "stops " + processes(running),
			!active ? "it stays stopped" : schedule ? "it runs on its schedule" :
			calm ? `runs ${count}, restarts none` : `starts ${count}`], "; ") + ".";
	}
	async function save() {
		if (await send(false)) go("/p/" + enc(name || inputs.name.value));
	}
	function refuse(answer, dry) {
		const left = [];
		for (const field of Object.keys(inputs)) {
			put(faults[field], ""); inputs[field].removeAttribute("aria-invalid");
		}
		const taken = !name && templates.has(inputs.name.value) ? "; field 'name' is taken" : "";
		const reasons = ((answer.value.reason || "") + taken).split(/; (?=field ')/);
		for (const sentence of reasons.filter(Boolean)) {
			const [, field, why] = /^field '(\w+)' (.*)/s.exec(sentence) || [0, "", sentence];
			if (!faults[field]) left.push(why);
			else if (!dry || touched.has(field)) {
				put(faults[field], why); attr(inputs[field], "aria-invalid", "true"); unfold(field);
			}
		}
		put(rest, dry ? "" : left.join("; "));
		if (!dry && !answer.ok) (node.querySelector("[aria-invalid=true]") || inputs.name).focus();
	}
	if (name) load().then(() => given(template).forEach(([field]) => unfold(field)));
	return {node, title, draft: touched, focus: () => inputs[name ? "cmd" : "name"]};
}

// ---- keys, and the address: a view, and in "?" what is set in it
const VIEWS = {__proto__: null, "": overview, logs: allOutput, events: eventList, add: form,
	edit: form, p: detail};
const params = () => new URLSearchParams(location.hash.split("?")[1]);
function setParam(key, value) {
	const all = params();
	if (value) all.set(key, value); else all.delete(key);
	history.replaceState(null, "", (location.hash.split("?")[0] || "#/") + (String(all) && "?" + all));
}
function decode(part) { try { return decodeURIComponent(part); } catch (error) { return part; } }
function go(path) { location.hash = path; }
let view = {};
function nowhere() { return {node: el("p", "There is no such page."), focus: () => main}; }
function route(start) {
	const [kind, ...parts] = location.hash.replace(/^#?\/?/, "").split("?")[0].split("/").map(decode);
	$("menu").hidePopover(); complain(""); sampled = 0;
	view = {update() {}, poll: () => refresh(), ...(VIEWS[kind] || nowhere)(...parts)};
	stream = view.stream || watch;
	main.replaceChildren(view.node);
	$("nav").replaceChildren(...nav.map(([path, text]) => el("a", {href: "#" + path,
		"aria-current": path === "/" + kind && "page"}, text)));
	listen(); poll();
	if (start !== true) view.focus().focus({preventScroll: true});
}
const keyed = () => [main.querySelector(AT) || main, main].flatMap(node =>
	[...node.querySelectorAll("[data-key]")]).filter(each => each.checkVisibility());
const FIELD = "input:not([type=checkbox]), textarea, select";
function showKeys() {
	const all = new Map([...nav.map(([, text, key]) => [key, text]),
		["Escape", "leave a field; processes"], ...view.keys || [],
		...keyed().reverse().map(node => [node.dataset.key, node.ariaLabel])]);
	menu($("help"), [...all].map(([key, text]) => [[el("kbd", key), text]]));
}
document.addEventListener("keydown", event => {
	const {key, target} = event, typing = target.matches(FIELD);
	if (event.ctrlKey || event.metaKey || event.altKey) return;
	if ($("menu").matches(":popover-open")) {
		const next = target[{ArrowDown: "nextSibling", ArrowUp: "previousSibling"}[key]];
		return next && next.focus();
	}
	const place = nav.find(each => each[2] === key), own = keyed().find(each =>
		each.dataset.key === key);
	if (key === "Escape" && typing) main.focus();
	else if (typing || view.draft?.size || [" ", "Enter"].includes(key) &&
		target.matches("button, a, input, summary")) return;
	else if (key === "Escape") go("/");
	else if (key === "?") showKeys();
	else if (place) go(place[0]);
	else if (own) { if (own.matches(FIELD)) own.focus(); else own.click(); }
	else if (!view.key || !view.key(key)) return;
	event.preventDefault();
});
$("help").addEventListener("click", showKeys);
addEventListener("hashchange", route);
route(true);
</script>
</body></html>
"""


def page_response(snapshot):
    """Return the web page, which shows `snapshot` (JSON) before it asks for anything.

    No script and no style but its own can run in it, and it can send nothing to another server.
    """
    nonce = base64.b64encode(os.urandom(12)).decode("ascii")
    policy = ("default-src 'none'; script-src 'nonce-%s'; style-src 'nonce-%s'; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'" % (nonce, nonce))
    data = encode_json(dict(snapshot, **PAGE_WORDS))
    data = data.replace("<", "\\u003c")         # nothing in it ends the element
    page = PAGE.replace("__NONCE__", nonce).replace("__SNAPSHOT__", data)
    return Response(page.encode("utf-8"), content_type="text/html; charset=utf-8", headers=[
        ("Content-Security-Policy", policy), ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Referrer-Policy", "no-referrer")])


# --------------------------------------------------------------------------------------------------
# api
#
# The route table and its handlers: the only section that knows both manager and request. A handler
# runs on the request's thread, under the loop's lock unless it takes time (`unlocked`). It returns
# a value to send as JSON, a Response, or a channel that the loop starts.
# --------------------------------------------------------------------------------------------------
PAGE_EVENTS = 200                               # that the page begins with
STATS_KEPT = 16                                 # samples that a slow reader may be behind
WAIT_EXTRA = 5.0                                # ?wait=true: graceful_timeout and this
OK = {"ok": True}


def human(size):
    """Return a number of bytes as 17, 4K, 21M or 1.5G."""
    for unit in ("", "K", "M"):
        if size < 1024:
            return "%d%s" % (size, unit)
        size /= 1024
    return "%.1fG" % size


class Samples:
    """Statistics of processes; any thread. Their shapes are those of /stats and /status."""

    MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def __init__(self, table, clock):
        self._table, self._clock = table, clock
        self._user_name = functools.lru_cache(1000)(lambda uid: find_user(uid)[2] or str(uid))

    def of(self, name, processes):
        """Return the entry of a template, from its running processes."""
        entries = [entry for entry in map(self.one, processes) if entry]
        result = {"name": name}
        for field in ("mem", "cpu"):
            values = [entry[field] for entry in entries] or [0]
            result[field] = round(sum(values), 2)
            result["max_" + field], result["min_" + field] = max(values), min(values)
        result["stats"] = entries
        return result

    def one(self, process):
        """Return the entry of a process, {} if it has just gone."""
        seen = self._table.sample(process.os_pid)
        if not seen:
            return {}
        cpu = self._percent(process, "one", seen["cpu_time"])
        return {"id": process.pid, **self._entry(process.os_pid, seen, cpu)}

    def usages(self, processes, asker="status"):
        """Return {cpu, mem, rss} of each process with its group, {} of one that has gone."""
        members = self._table.members({process.os_pid for process in processes})
        found = []
        for process in processes:
            os_pids = {process.os_pid, *members.get(process.os_pid, ())}
            if process.exited:                  # the number may be another process's
                os_pids = ()
            seen = [usage for usage in map(self._table.usage, os_pids) if usage]
            rss = sum(usage["rss"] for usage in seen)
            found.append({
                "cpu": self._percent(process, asker, sum(usage["cpu_time"] for usage in seen)),
                "rss": rss, "mem": round(100 * rss / self.MEMORY, 2)} if seen else {})
        return found

    def _percent(self, process, asker, cpu_time):
        """Return percent of one core since the asker's last sample, or at first over its life."""
        now, last = self._clock(), process.cpu_samples.get(asker)
        if last is None:
            last = process.started, 0.0, None
        elif now - last[0] < 0.1:
            return last[2]
        percent = round(100 * max(0.0, cpu_time - last[1]) / max(0.01, now - last[0]), 1)
        process.cpu_samples[asker] = now, cpu_time, percent
        return percent

    def _entry(self, os_pid, seen, percent, depth=8):
        minutes, rest = divmod(seen["cpu_time"], 60)
        children = [(child, self._table.sample(child))
                    for child in seen["children"]] if depth else []
        return {
            "pid": os_pid, "cpu": percent, "mem": round(100 * seen["rss"] / self.MEMORY, 2),
            "mem_info1": human(seen["rss"]), "mem_info2": human(seen["vms"]), "rss": seen["rss"],
            "vms": seen["vms"], "ctime": "%d:%05.2f" % (minutes, rest), "nice": seen["nice"],
            "username": self._user_name(seen["uid"]), "cmdline": seen["cmdline"],
            "children": [self._entry(child, look, 0.0, depth - 1)
                         for child, look in children if look]}


class StatsFeed(EventLog):
    """Samples every `interval` seconds, as long as somebody reads them.

    `sampler()` is called under the lock, and what it returns on a thread; NotFound ends the feed.
    """

    def __init__(self, loop, interval, sampler):
        super().__init__(loop, STATS_KEPT)
        self._interval, self._sampler, self._timer = interval, sampler, None

    def add(self, reader):
        super().add(reader)
        if len(self.readers) == 1:
            self._tick()

    def remove(self, reader):
        super().remove(reader)
        if not self.readers and self._timer is not None:    # it may be due in days
            self._timer.cancel()
            self._timer = None

    def _tick(self):
        self._timer = None
        try:
            sample = self._sampler()
            threading.Thread(target=self._sample, args=(sample,), name="gaffer-stats",
                             daemon=True).start()
        except NotFound:
            self.finish()
        except RuntimeError:                    # the system has no thread left
            self._sampled(None)

    def _sample(self, sample):
        record = None
        try:
            record = sample()
        except OSError as error:
            log.warning("statistics cannot be read: %s", error)
        self.loop.call_soon(self._sampled, record)

    def _sampled(self, record):
        if self.readers:
            if self._timer is None:             # else the first reader has left, and one has come
                self._timer = self.loop.later(self._interval, self._tick)
            if record is not None:
                self.append(record)


class History:
    """CPU and memory of all processes over ten minutes, sampled until nobody has looked for one.

    Each time takes 20 us of CPU for a process, and 1 us for each that the system has; a history has
    at most 8 KiB.
    """

    INTERVAL, PATIENCE = 10.0, 60.0

    def __init__(self, manager, samples):
        self._manager, self._samples, self._end = manager, samples, None

    def keep_sampling(self):
        """Keep sampling for another minute. For the owner of the lock."""
        loop = self._manager.loop
        if self._end is None:
            feed = StatsFeed(loop, self.INTERVAL, self._sampler)
            self._reader = Reader(feed, Encoder(), None, 0)
            self._reader.start()
        else:
            self._end.cancel()
        self._end = loop.later(self.PATIENCE, self._stop)

    def _stop(self):
        self._end = None
        self._reader.close()

    def _sampler(self):
        processes = list(self._manager.processes.values())

        def sample():
            for process, used in zip(processes, self._samples.usages(processes, "history")):
                if used:
                    process.history.appendleft([used["cpu"], used["rss"]])
        return sample


class Api:
    """The handlers of the route table. `manager`: a Manager; `http`: the HttpHandler."""

    def __init__(self, manager, http):
        self.manager, self._http = manager, http
        self.samples = Samples(manager.table, manager.loop.clock)
        self._history = History(manager, self.samples)
        self._stats_feeds = weakref.WeakValueDictionary()   # what is sampled -> StatsFeed

    # the server itself

    @operation("GET /", unlocked=True, answer="text/html")
    def welcome(self, request, query):
        """The version; to a browser, the web page."""
        if not prefers_html(request.headers.get("accept", "")):
            return {"welcome": "gaffer", "version": __version__}
        manager, events = self.manager, self.manager.events

        def snapshot():
            """Return what the page shows at first."""
            return {
                "version": __version__, "since": "%d@%s" % (events.end, manager.epoch),
                "templates": [template.status() for template in manager.templates.values()],
                "events": events.read(max(events.start, events.end - PAGE_EVENTS), PAGE_EVENTS),
                "fields": {name: [option.default, option.help, option.check.schema]
                           for name, option in OPTIONS.items()},
                "signals": {number.value: number.name[3:] for number in signal.Signals},
            }
        return page_response(manager.loop.call(snapshot))

    @operation("GET /ping /healthz", answer="text/plain")
    def ping(self, request, query):
        """OK while gaffer answers."""
        return Response(b"OK", content_type="text/plain")

    @operation("GET /metrics", unlocked=True, answer="text/plain")
    def metrics(self, request, query):
        """Metrics for Prometheus."""
        text = self.manager.loop.call(metrics_text, self.manager, self._http)
        return Response(text.encode("utf-8"),
                        content_type="text/plain; version=0.0.4; charset=utf-8")

    @operation("GET /openapi.json", unlocked=True)
    def openapi(self, request, query):
        """This description of the API."""
        return openapi(self._http.routes, self._http.secured)

    @operation("GET /readyz")
    def readyz(self, request, query):
        """Whether every active template is as it is wanted; else 503."""
        waiting = self.manager.not_ready()
        ready = not waiting and not self.manager.stopping
        return json_response({"ready": ready, "waiting": waiting}, 200 if ready else 503)

    @operation("POST /_reload", "dry_run", unlocked=True)
    def reload(self, request, query):
        """Load the configuration again that the server was started with."""
        configuration = self.manager.configuration
        if configuration is None:
            raise Conflict("this server was started without a CONFIG, so there is nothing to load; "
                           "start it with 'serve CONFIG'")
        return configuration.reload(self.manager, query.dry_run)

    # templates and processes

    @operation("GET /processes", "running")
    def processes(self, request, query):
        """Names of templates, or pids of running processes."""
        if query.running:
            return [process.pid for process in self.manager.processes.values() if process.running]
        return list(self.manager.templates)

    @operation("POST /processes", "dry_run", unlocked=True, body="Template")
    def create(self, request, query):
        """Add a template and start it."""
        self.manager.add_process(check_template(request.json()), dry_run=query.dry_run)
        return OK

    @operation("GET /processes/<name> /processes/<pid>")
    def show(self, request, query, ref):
        """A template; by pid, the one that the process runs."""
        return self.manager.info(ref)

    @operation("PUT /processes/<name> POST /processes/<name>", "dry_run wait", unlocked=True,
               body="Fields")
    def put(self, request, query, name):
        """Make a template as it is given: change it, leave it alone, or with PUT add it."""
        _, before = self.manager.loop.call(self._existing, [name])
        outcome = self.manager.update_process(
            name, request.json(), request.method == "PUT", query.dry_run)
        answer = {"ok": True, "created": True}
        if outcome != "created":
            answer = {"ok": True, "changed": outcome == "changed"}
        return self._done([], before, query.wait, answer)

    @operation("GET /processes/<name>/_pids")
    def pids(self, request, query, name):
        """Pids of a template's processes."""
        running = self.manager.find_template(name).running()
        return {"ok": True, "pids": [process.pid for process in running]}

    @operation("DELETE /processes/<pid> POST /processes/<pid>/_stop", "wait", unlocked=True)
    def stop_process(self, request, query, pid):
        """Stop one process; it is replaced while its template is active."""
        process = self.manager.loop.call(self.manager.find_process, pid)
        self.manager.stop_process(pid)
        return self._done([], [process], query.wait)

    def _existing(self, names):
        templates = [self.manager.templates[name] for name in names
                     if name in self.manager.templates]
        return templates, [process for each in templates for process in each.processes.values()]

    def act(self, query, names, action):
        """Do something to each template, and answer; with `wait` when it is done."""
        templates, before = self.manager.loop.call(self._existing, names)
        answer = self.manager.for_each(names, action) or OK
        return self._done(templates, before, query.wait, answer)

    def _done(self, templates, before, wait, answer=OK):
        """Answer at once, or when those processes are gone, and all that a template has stopped,
        and it lacks none."""
        if wait is None:
            return answer

        def done():
            return json_response(answer) if (
                all(process.gone or process.running for process in before)
                and all(template.lacking() <= 0 and template.state() not in ("backoff", "flapping")
                        and all(each.running or template.active and each.by_itself
                                for each in template.processes.values())
                        for template in templates)) else None
        infos = [each.info for each in [*templates, *before]]
        if wait is True:
            wait = max(map(stop_time, infos), default=0) + WAIT_EXTRA

        def late():
            waits = ["; '%s' waits for %s" % (template.name, ", ".join(template.waits_for()))
                     for template in templates if template.waits_for()]
            raise WaitTimeout(
                "this was not done in %g seconds; it goes on%s" % (wait, "".join(waits)))
        return self.manager.loop.call(self._wait_for, self.manager.wait_until, done, wait, late)

    @operation("POST /processes/<name>/_add /processes/<name>/_add/<n>", "wait", unlocked=True)
    def add(self, request, query, name, number="1", sign=1):
        """Run more processes of a template."""
        if not re.fullmatch("[0-9]{1,1000}", number) or not int(number):
            raise BadValue("give a whole number from 1, not %r" % number[:20])
        change = sign * min(int(number), NUMPROCESSES_MAX)
        return self.act(query, [name], lambda name: {
            "ok": True, "numprocesses": self.manager.scale(name, change)})

    @operation("POST /processes/<name>/_sub /processes/<name>/_sub/<n>", "wait", unlocked=True)
    def sub(self, request, query, name, number="1"):
        """Run fewer processes of a template."""
        return self.add(request, query, name, number, -1)

    @operation("POST /processes/<ref>/_signal /processes/<ref>/_signal/<sig>", "group")
    def signal(self, request, query, ref, signum=None):
        """Send a signal to a process, or to each process of a template."""
        if signum is None:
            raise BadRequest("name a signal: _signal/TERM", code="no_signal_number")
        self.manager.signal(ref, parse_signal(signum), query.group)
        return OK

    @operation("GET /status/<ref>", "usage history until timeout", unlocked="few")
    def status(self, request, query, name):
        """The state of a template, its restarts and last exit; with `until`, once that holds."""
        if query.until is None:
            return self.statuses(request, query, name)[0]
        template = self.manager.loop.call(self.manager.find_template, name)

        def answer():
            return json_response(template.status()) if template.check_goal(query.until) else None

        def late():
            raise WaitTimeout("'%s' is not %s in the time given; it goes on%s" % (
                name, query.until, template.delay_reason()))
        return self.manager.loop.call(
            self._wait_for, self.manager.wait_until, answer, query.timeout, late)

    @operation("GET /status", "usage history", unlocked="few")
    def statuses(self, request, query, name=None):
        """The states of all templates."""
        processes = []

        def collect():
            templates = list(self.manager.templates.values())
            if name is not None:
                templates = [self.manager.find_template(name)]
            statuses = [template.status() for template in templates]
            if query.usage:
                self._history.keep_sampling()
                for template, status in zip(templates, statuses):
                    processes.extend(template.processes.values())
                    status["processes"] = [each.status() for each in template.processes.values()]
            return statuses
        statuses = self.manager.loop.call(collect)
        if query.usage:                         # one listing serves all
            entries = [entry for status in statuses for entry in status["processes"]]
            for process, entry, used in zip(processes, entries, self.samples.usages(processes)):
                entry.update(used)
                if query.history:
                    entry["history"] = list(process.history)
        return statuses

    # groups

    @operation("GET /groups")
    def groups(self, request, query):
        """Names of groups."""
        return list(dict.fromkeys(each.group for each in self.manager.templates.values()
                                  if each.group is not None))

    @operation("GET /groups/<group>")
    def group(self, request, query, group):
        """Names of the templates of a group."""
        names = [each.name for each in self.manager.templates.values() if each.group == group]
        if not names:
            raise NotFound("there is no group '%s'; GET /groups lists them" % group[:128])
        return names

    # statistics

    @operation("GET /stats /stats/<ref> /stats/<ref>/<id>", "feed interval heartbeat",
               unlocked=True)
    def stats(self, request, query, name=None, pid=None):
        """CPU and memory of processes, once or as a stream."""
        loop, interval = self.manager.loop, query.interval or 1.0

        def sampler():
            """Return a function that samples what runs now. Under the lock."""
            if pid is not None:
                process = self.manager.find_process(pid)
                if process.name != name:
                    raise NotFound("process %s is not one of '%s'" % (pid[:20], name[:128]))
                return functools.partial(self.samples.one, process)
            if name is not None:
                running = self.manager.find_template(name).running()
                return functools.partial(self.samples.of, name, running)
            all_running = [(each.name, each.running()) for each in self.manager.templates.values()]
            return lambda: [self.samples.of(*each) for each in all_running]
        sample = loop.call(sampler)
        if query.feed is None:
            return sample()
        if query.feed == "longpoll":
            def answer(deliver):
                loop.call_soon(deliver, attempt(lambda: json_response(loop.call(sampler)())))

            def begin_thread(deliver):
                try:
                    threading.Thread(target=answer, args=(deliver,), name="gaffer-stats",
                                     daemon=True).start()
                except RuntimeError:            # the system has no thread left
                    deliver(error_response(Busy("gaffer has no thread for this; try again later")))
            return LongPoll(lambda deliver: loop.later(interval, begin_thread, deliver).cancel,
                            None, None)

        def follow():
            key = name, pid, interval
            feed = self._stats_feeds.get(key)
            if feed is None or feed.ended:      # with a template of that name that is gone
                feed = self._stats_feeds[key] = StatsFeed(loop, interval, sampler)
            encoder = RecordEncoder(query.feed, self._framed(request), self.manager.epoch)
            return self._feed(request, query, feed, encoder, feed.end)
        return loop.call(follow)

    # events and streams

    @operation("GET /watch /watch/<p1> /watch/<p1>/<p2> /watch/<p1>/<p2>/<p3>",
               "feed heartbeat since lastEventId timeout")
    def watch(self, request, query, *parts):
        """Events, one or as a stream."""
        pattern, events = parse_pattern(parts), self.manager.events
        offset, restarted, _ = self._begin(query, events)
        if query.feed not in (None, "longpoll"):
            encoder = RecordEncoder(
                query.feed, self._framed(request), self.manager.epoch, pattern)
            return self._feed(request, query, events, encoder, offset, restarted)

        def answer():
            nonlocal offset
            if restarted or offset < events.start:
                lost = {"event": "dropped", "events": max(0, events.start - offset),
                        "id": "%d@%s" % (events.start, self.manager.epoch)}
                events.dropped += lost["events"]
                return json_response(dict(lost, restarted=True) if restarted else lost)
            for event in events.read(offset, EVENTS_KEPT):
                offset += 1
                if matches(pattern, event):
                    return json_response(event)
            return self._nothing(events) if events.ended else None
        return self._wait_for(events.wait, answer, query.timeout, lambda: self._nothing(events))

    @staticmethod
    def _wait_for(wait, answer, timeout, expired):
        """Return what answer() makes, now or when `wait` has it asked again."""
        response = answer()
        if response is not None:
            return response

        def begin(deliver):
            def satisfied():
                response = attempt(answer)
                if response is not None:
                    deliver(response)
                return response is not None
            cancel = wait(satisfied)
            if satisfied():                     # it came between the two
                cancel()
            return cancel
        return LongPoll(begin, timeout, expired)

    def _begin(self, query, source):
        """Return where a reader begins: (offset, whether its id is of another run, whether it is
        the id of an exit). Raises BadValue."""
        epoch, tail, last = self.manager.epoch, query.tail, query.lastEventId
        if query.since and tail is not None:
            raise BadValue("give 'since' or 'tail', not both")
        if not query.asked:
            return source.end if tail is None else source.tail(tail), False, False
        match = POSITION.match(last) if last else query.since
        if match is not None and match.group(3) in (None, epoch):
            offset, ended = int(match.group(1)), bool(match.group(2))
            at_exit = ended and source.ended and offset == source.end and match.group(3) == epoch
            if offset <= source.end and at_exit == ended:
                return offset, False, at_exit
            if not last:
                raise BadValue("'since' is beyond the end, which is at %d" % source.end)
        return source.start, True, False

    @staticmethod
    def _framed(request):
        return chunk if request.version == (1, 1) else bytes

    def _feed(self, request, query, source, encoder, offset, restarted=False, process=None):
        """Return a Feed of a log. `restarted`: the client knows another run of gaffer."""
        reader = self._reader(request, query, source, encoder, offset)
        first = restarted and encoder.dropped(0, offset, restarted=True)
        return Feed(query.feed, self._framed(request), reader, query.asked,
                    query.heartbeat, first or b"", process)

    @staticmethod
    def _reader(request, query, source, encoder, offset):
        reader = Reader(source, encoder, None, offset, query.loss or "cut")
        if query.loss == "block" and request.method == "GET":
            source.add(reader)                  # at once, or the child would run ahead of it
        return reader

    @operation("GET /streams/<ref>/<label>", "feed heartbeat since lastEventId tail timeout loss",
               answer="application/octet-stream")
    def stream(self, request, query, ref, label):
        """Output of a process, or of all processes of a template."""
        manager, window = self.manager, self.manager.find_window(ref, label)
        process = manager.find_process(ref, past=True) if ref.isdigit() else None
        offset, restarted, at_exit = self._begin(query, window)
        if query.feed in (None, "longpoll"):
            return self._next_bytes(request, query, window, offset, Encoder())
        if query.feed == "continuous":
            encoder = (ChunkEncoder if request.version == (1, 1) else Encoder)()
            return self._feed(request, query, window, encoder, offset)
        if at_exit:
            return self._nothing(window)
        encoder = SseEncoder(label, manager.epoch, self._framed(request))
        return self._feed(request, query, window, encoder, offset, restarted, process)

    @operation("GET /streams /streams/<ref>",
               "feed heartbeat since lastEventId tail timeout returns",
               answer="application/octet-stream")
    def journal(self, request, query, ref=None):
        """All output in order, each line with its time, name, pid and label."""
        manager = self.manager
        if ref is None:
            view = manager.journal.view()
        else:
            found = manager.find(ref, past=True)
            view = manager.journal.view(found.name, found.pid, found.ended)
        offset, restarted, _ = self._begin(query, view)
        plain = JournalEncoder(False, manager.epoch, returns=query.returns)
        if query.feed in (None, "longpoll"):
            return self._next_bytes(request, query, view, offset, plain)
        events = query.feed == "eventsource"
        if events and view.ended and not restarted and query.asked and (
                not view.read_all(offset, plain)[0]):
            return self._nothing(view)
        encoder = JournalEncoder(events, manager.epoch, self._framed(request), query.returns)
        return self._feed(request, query, view, encoder, offset, restarted)

    @staticmethod
    def _nothing(source):
        """Return the answer if nothing came; it says if nothing ever will."""
        headers = [("Gaffer-Offset", source.end)]
        if source.ended:
            headers.append(("Gaffer-Ended", "true"))
        return Response(status=204, headers=headers)

    def _next_bytes(self, request, query, source, offset, encoder):
        asked, question = query.asked, False
        if not asked and query.tail is None and request.method == "GET" and source.questions:
            offset, question = max(source.questions.popleft(), source.answered), True

        def answer():
            data, end, lost = source.read_all(offset, encoder)
            if not data:
                return self._nothing(source) if source.ended else None
            if question:
                source.answered = end
            headers = [("Gaffer-Offset", end)]
            if lost and (asked or question):    # else nobody asked for what is gone
                source.count_dropped(lost)
                headers.append(("Gaffer-Dropped", lost))
            return Response(data, headers=headers, content_type="application/octet-stream")
        if request.method == "HEAD":
            return answer() or Response(None, headers=[("Gaffer-Offset", source.end)],
                                        content_type="application/octet-stream")
        return self._wait_for(source.wait, answer, query.timeout, lambda: self._nothing(source))

    @operation("POST /streams/<ref>/<label> /streams/<ref>/stdin /streams/<ref>/ttin", body="bytes")
    def write(self, request, query, ref, label="stdin"):
        """Write to a process, whole or not at all."""
        self._check_writable(ref, label)
        process = self.manager.find_one(ref)
        self.manager.write(ref, label, request.body)
        if label == "stdin":                    # a long poll that follows begins here
            for stream in (*process.outputs.values(), *process.home.outputs.values()):
                stream.window.questions.append(stream.window.end)
        return OK

    @operation("DELETE /streams/<ref>/<label> /streams/<ref>/stdin /streams/<ref>/ttin")
    def end_input(self, request, query, ref, label="stdin"):
        """End of file for a process."""
        self._check_writable(ref, label)
        self.manager.end_input(ref, label)
        return OK

    @operation("* /streams/<ref>/<label>")
    def stream_methods(self, ref, label):
        """Return the methods of a stream, which depend on its label."""
        found = self.manager.find(ref, past=True)
        methods = ("GET", "HEAD") if label in found.outputs else ()
        if label in found.info["custom_streams"]:
            methods += ("POST", "DELETE")
        return methods

    def _check_writable(self, ref, label):
        if self.stream_methods(ref, label) == ("GET", "HEAD"):
            raise GafferError("'%s' can be read, not written" % label[:64], status=405,
                              code="method_not_allowed", headers=[("Allow", "GET, HEAD, OPTIONS")])

    @operation("GET /wstreams/<ref>",
               "label type frame loss since lastEventId tail heartbeat readonly", answer=None)
    def websocket(self, request, query, ref):
        """A websocket: messages to stdin, output back."""
        process = self.manager.find_one(ref)
        label = query.label or next(iter(process.outputs), "stdout")
        window, stream = self.manager.find_window(process.pid, label), None
        offset, _, _ = self._begin(query, window)
        if not query.readonly:
            target = label if label in process.inputs else "stdin"
            stream = self.manager.find_input(process.pid, target)
        headers = websocket_accept(request)
        by_line = query.frame == "line"
        encoder = FrameEncoder(query.type == "binary", by_line)
        reader = self._reader(request, query, window, encoder, offset)
        return ProcessSocket(headers, reader, query.asked, stream, by_line, process,
                             query.heartbeat)


def action(routes, summary, method):
    """Add a handler that calls a method of Manager with a template, or with each of a group."""
    @operation(routes, "wait", unlocked=True)
    def handler(api, request, query, name):
        names = [name]
        if "<group>" in routes:
            names = api.manager.loop.call(api.group, request, query, name)
        return api.act(query, names, getattr(api.manager, method))
    handler.__doc__ = summary


action("DELETE /processes/<name>", "Stop a template's processes and forget it.", "delete_process")
action("POST /processes/<name>/_start", "Start a template.", "start_template")
action("POST /processes/<name>/_stop", "Stop a template.", "stop_template")
action("POST /processes/<name>/_restart", "Restart a template.", "restart_template")
action("DELETE /groups/<group>", "Stop and forget a group.", "delete_process")
action("POST /groups/<group>/_start", "Start a group.", "start_template")
action("POST /groups/<group>/_stop", "Stop a group.", "stop_template")
action("POST /groups/<group>/_restart", "Restart a group.", "restart_template")


# --------------------------------------------------------------------------------------------------
# server
#
# The loop accepts connections. One thread, HttpHandler.watcher, waits for the next request of each
# and answers what takes no time. For anything else, and with TLS, a connection gets a thread of its
# own: a Handler reads requests and answers them, blocking, in straight lines. Both leave what lasts
# or waits to the loop; see channels.
# --------------------------------------------------------------------------------------------------
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
BODY_SIZE = MIB                                 # for WSGI applications see HttpHandler(max_body=)
HEAD_TIME = 10.0                                # from the first byte of a head to its last
BODY_TIME = 60.0
KEEP_TIME = 0.5                                 # for the next request; then it needs no thread
IDLE_TIME = 60.0                                # of a connection without a request
SEND_SIZE = 256 * KIB                           # to be taken within SEND_TIME
HANDSHAKE_TIME = 10.0                           # of TLS
HANDSHAKES_MAX = 200                            # one more ends the oldest
CONNECTIONS_MAX = 15000                         # requests and streams; one more is `busy`
FILES_FOR_CONNECTIONS = 0.875                   # of the system's limit: processes need the rest
FILES_EXPECTED = 8192                           # descriptors: 64 KiB of the kernel's memory
ADDRESS_CONNECTIONS_MAX = 1000                  # of one address, or a /64 of IPv6
THREADS_MAX = 1000                              # one more request is answered with 503
BEGIN_TIME = 1.0                                # of a thread, unless the system has no memory
QUICK_STATUSES = 32                             # templates and processes: 1 ms to tell
LOCKED_REQUESTS = 16                            # quick ones that take the loop's lock together
BACKLOG = 1024                                  # connections that wait to be accepted
ACCEPTS_PER_TURN = 16                           # so that connections get their turn
ACCEPT_PAUSE = 1.0                              # after EMFILE, or the listener would wake the loop
LOG_SIZE = 256 * KIB                            # of a log, that waits to be written
LOG_END = 1.0                                   # to write it, at the stop


UNSAFE = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")


def access_line(client, now, request, status, size):
    """Return a line of the access log, in Apache's combined format.

    `now`: Unix time; `request`: None if it could not be read; `size`: bytes of the body. What the
    client has sent becomes printable ASCII and \\xhh.
    """
    line = referer = agent = "-"
    if request is not None:
        line = "%s %s HTTP/%d.%d" % (request.method, request.target, *request.version)
        referer, agent = [request.headers.get(name) or "-" for name in ("referer", "user-agent")]
    local = time.localtime(now)
    fields = [UNSAFE.sub(lambda match: "\\x%02x" % ord(match.group()), text)
              for text in (line[:2 * TARGET_SIZE], referer[:KIB], agent[:KIB])]
    when = time.strftime("%d/{}/%Y:%H:%M:%S %z", local).format(MONTHS[local.tm_mon - 1])
    return '%s - - [%s] "%s" %d %s "%s" "%s"' % (
        client.rpartition(":")[0] or client, when, fields[0], status, size or "-", *fields[1:])


def write_all(fd, data):
    """Write all of it, past any buffer. Wait even if the descriptor is non-blocking."""
    while data:
        try:
            data = data[os.write(fd, data):]
        except BlockingIOError:
            select.select([], [fd], [])


class Writer:
    """Writes to a descriptor on a thread, so that nobody waits for a slow terminal, pipe or disk.

    Up to `limit` bytes may wait. `drained()` is called on that thread once half of them are written
    after it was `full`, `failed(error, data)` when a write fails.
    """

    def __init__(self, fd, limit, drained=lambda: None, failed=lambda error, data: None):
        self.fd, self.full = fd, False
        self._limit, self._drained, self._failed = limit, drained, failed
        self._lock, self._size = threading.Lock(), 0
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gaffer-writer", daemon=True)
        self._thread.start()

    def put(self, data):
        """Take bytes. Return False when there is no room for more."""
        with self._lock:
            self._size += len(data)
            self.full = self.full or self._size >= self._limit
        self._queue.put(data)
        return not self.full

    def write(self, data):
        """Write bytes, on the thread. Raise OSError."""
        write_all(self.fd, data)

    def _run(self):
        for data in iter(self._queue.get, None):
            try:
                self.write(data)
            except OSError as error:
                self._failed(error, data)
            with self._lock:
                self._size -= len(data)
                drained = self.full and self._size <= self._limit // 2
                self.full = self.full and not drained
            if drained:
                self._drained()

    def close(self, timeout):
        """Write what waits, for `timeout` seconds at most."""
        self._queue.put(None)
        self._thread.join(timeout)


def is_file_at(fd, path):
    """Return whether a descriptor is of the file at a path. OSError."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


class LogWriter(Writer):
    """Writes a log to the file at `path`, or to stderr if that is None.

    A file that was moved away is made anew; if that fails, the log goes on in the old one.
    `name`: of the log, in messages. StartError: the file cannot be written.
    """

    def __init__(self, path, name, failed):
        self._path, self._name, self._reports = path and os.path.abspath(path), name, Throttle()
        self._standard = False                  # whether stdout and stderr lead to the file, too
        super().__init__(self._open() if path else 2, LOG_SIZE, failed=failed)

    def _open(self):
        try:                                    # a FIFO that nobody reads would block
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            return os.open(self._path, flags, 0o640)
        except OSError as error:
            raise StartError("the %s '%s' cannot be written: %s" % (
                self._name, self._path, error.strerror)) from None

    def write(self, data):
        try:
            if self._path and not is_file_at(self.fd, self._path):
                fd = self._open()
                os.dup2(fd, self.fd, inheritable=False)
                os.close(fd)
                if self._standard:
                    self.replace_standard_streams()
        except (OSError, StartError) as error:
            self._reports.warning("%s; the log goes on in the old file", error)
        super().write(data)

    def reopen(self):
        """Make the file anew if it was moved away, although there is nothing to write."""
        self.put(b"")

    def replace_standard_streams(self):
        """Let stdout and stderr lead to the file, too."""
        self._standard = True
        os.dup2(self.fd, 1)
        os.dup2(self.fd, 2)

    def _run(self):
        super()._run()
        if self._path:
            os.close(self.fd)


class AccessLog(LogWriter):
    """A line for each request, in Apache's combined format. `path`: a file, or "-" for stderr.

    A thread writes the lines. What finds no room or cannot be written is dropped, and that is
    reported once a minute. StartError: the file cannot be written.
    """

    def __init__(self, path):
        self._lost = 0
        super().__init__(None if path == "-" else path, "access log", self._drop)

    def add(self, client, request, status, size):
        """Note a request that was answered with `size` bytes beside the head. Any thread."""
        line = access_line(client, time.time(), request, status, size)
        if self.full:
            self._drop(None, line)
        else:
            self.put(line.encode("ascii", "backslashreplace") + b"\n")

    def _drop(self, error, data_):
        self._lost += 1
        self._reports.warning(
            "the access log '%s' cannot be written: %s; %d lines are lost so far",
            self._path or "-", error.strerror.lower() if error else "nobody reads it", self._lost)


class WsgiErrors(io.TextIOBase):
    """wsgi.errors: into gaffer's log."""

    def write(self, text):
        if text.strip():
            log.error("%s", text.rstrip())
        return len(text)


class WsgiRun(SimpleHandler):
    """One request of a WSGI application (PEP 3333) that is mounted at `prefix`."""

    os_environ: dict = {}                       # gaffer's own environment is not the client's
    status: str
    environ: dict
    headers: dict                               # a wsgiref.headers.Headers
    error_headers = [("Content-Type", "application/json")]

    def __init__(self, http, app, prefix, request):
        match = HOST.match(request.headers.get("host", ""))     # a unix socket takes any
        host, port = match.groups() if match else ("localhost", None)
        environ = {
            "REQUEST_METHOD": request.method, "QUERY_STRING": request.raw_query,
            "SCRIPT_NAME": prefix,
            "PATH_INFO": urllib.parse.unquote(request.path[len(prefix):], "latin-1"),
            "SERVER_NAME": host, "SERVER_PORT": port or ("443" if request.secure else "80"),
            "SERVER_PROTOCOL": "HTTP/%d.%d" % request.version,
            "REMOTE_ADDR": request.client.rpartition(":")[0],
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(request.body)), "wsgi.input_terminated": True,
        }
        if request.secure:
            environ["HTTPS"] = "on"
        framing = "content-type", "content-length", "transfer-encoding"
        for name, value in request.headers.items():
            # "_" would let a client forge another header's name; Proxy would become HTTP_PROXY
            if "_" not in name and name != "proxy" and name not in framing:
                environ["HTTP_" + name.upper().replace("-", "_")] = value
        super().__init__(io.BytesIO(request.body), None, WsgiErrors(), environ)
        self._http, self._app, self._request = http, app, request
        self._failure = "the application at %s has failed" % (prefix or "/")
        failure = GafferError(self._failure + "; gaffer's log says how")
        self.error_body = error_response(failure).body
        self._size = 0
        self._head, self._chunked, self._left = b"", False, None
        self.cut = False                        # the client did not get all of the answer

    def respond(self, handler, keep):
        """Run the application, and send what it answers. Return whether the connection goes on."""
        self._send, self._keep = handler.send, keep
        http, request = self._http, self._request
        try:                                    # run() takes each ConnectionError for the client's
            self.setup_environ()
            with contextlib.closing(self):
                self.result = self._app(self.environ, self.start_response)
                for data in self.result:
                    self.write(data)
                    if request.method == "HEAD":
                        break                   # the rest may have no end
                self.finish_content()
        except BaseException:
            if not self.cut:
                self.handle_error()
        self.cut = self.cut or bool(self._left)
        if self.cut and not self._chunked and self._left is None:   # only a reset tells the client
            linger = struct.pack("ii", 1, 0)
            handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        status = int(self.status[:3])
        http.count(request.method, status)
        http.log_request(request.client, request, status, self._size)
        return self._keep and not self.cut

    def close(self):
        if hasattr(self.result, "close"):
            self.result.close()

    def send_headers(self):
        request, status, self._left = self._request, int(self.status[:3]), 0
        if status == 204:
            del self.headers["Content-Length"]
        if request.method != "HEAD" and status not in (204, 304):
            self.cleanup_headers()              # adds a Content-Length if the body is one block
            length = self.headers["Content-Length"]
            self._left = None if length is None else int(length)
            self._chunked = length is None and request.version == (1, 1)
            if self._chunked:
                self.headers["Transfer-Encoding"] = "chunked"
            self._keep = self._keep and (self._chunked or length is not None)
        self._head = self._http.head(request, status, self.headers.items(), self._keep)
        self.headers_sent = True

    def finish_content(self):
        if not self.headers_sent:
            self.send_headers()
        self._write(b"", b"0\r\n\r\n" if self._chunked else b"")
        self._left = self._left or 0            # without a length, all of it was sent

    def _write(self, data, end=b""):
        """Send a piece of the body, the first one together with the head."""
        if self._left is not None:
            data = data[:self._left]            # more would be read as the next answer
            self._left -= len(data)
        self._size += len(data)
        data = self._head + (chunk(data) if self._chunked and data else data) + end
        self._head = b""
        if data:
            try:
                self._send(data)
            except OSError:                     # the application is not to blame
                self.cut = True
                raise

    def _flush(self):
        """Do nothing: nothing waits."""

    def log_exception(self, exc_info):
        log.error("%s", self._failure, exc_info=exc_info)
        self.cut = self.headers_sent


class SocketReader(io.RawIOBase):
    """What comes on a socket until `deadline`, by time.monotonic(); None: it is not read any more.

    `early`: bytes that were read before.
    """

    deadline = None

    def __init__(self, sock, early):
        self._sock, self.early = sock, early

    def readable(self):
        return True

    def await_deadline(self):
        """Let the next call on the socket wait until the deadline, or raise socket.timeout."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        self._sock.settimeout(left)

    def readinto(self, buffer):
        if self.early:
            size = min(len(buffer), len(self.early))
            buffer[:size], self.early = self.early[:size], self.early[size:]
            return size
        if self.deadline is None:
            return None
        self.await_deadline()
        return self._sock.recv_into(buffer)


class Handler(socketserver.StreamRequestHandler):
    """The requests of a connection, on a thread. Its client_address is a Connection."""

    server: "HttpEndpoint"
    rfile: io.BufferedReader

    def setup(self):
        self.http, self.client = self.server.http, self.client_address
        self.reader = SocketReader(self.request, self.client.early)
        self.rfile = io.BufferedReader(self.reader, READ_SIZE)
        self.next = self.http.close_connection, self.client     # see HttpHandler.hand_over()

    def handle(self):
        try:
            if self.server.context is not None and self.request.version() is None:
                self.request.settimeout(HANDSHAKE_TIME)
                self.request.do_handshake()
                self.http.handshakes.pop(self.client, None)
            keep = True
            while keep:
                self.reader.deadline = time.monotonic() + KEEP_TIME
                try:
                    keep = bool(self.rfile.peek(1))
                except socket.timeout:
                    self.next = self.http.watch, self.client
                    return
                keep = keep and self.handle_request()
                if keep:
                    self.http.working.pop(self.client, None)
        except (OSError, EOFError) as error:
            log.debug("a client has left: %s", error)

    def handle_request(self):
        """Read a request and answer it. Return whether another may follow on this thread."""
        http, request, whole, began = self.http, None, False, None
        try:
            self.reader.deadline = time.monotonic() + HEAD_TIME
            request = read_request(self.rfile)
            http.working[self.client] = 0
            request.client, request.secure = self.client.address, self.server.context is not None
            whole, began = not has_body(request), time.monotonic()
            respond, limit, _ = http.route(request)
            if not whole:
                length = body_length(request, limit)
                self.reader.deadline = None     # who has sent some of it does not wait
                if (length != 0 and "expect" in request.headers and request.version == (1, 1)
                        and not self.rfile.peek()):
                    self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.reader.deadline = time.monotonic() + BODY_TIME
                request.body = read_body(self.rfile, length, limit)
                whole, began = True, time.monotonic()
            answer = respond(request)
        except socket.timeout:
            answer, began = error_response(GafferError(
                "the request did not arrive in time; send it faster",
                status=408, code="timeout")), None
        except GafferError as error:
            answer = error_response(error)
        keep, channel = whole and not (request.wants_close() or http.ending), None
        if isinstance(answer, WsgiRun):
            keep = answer.respond(self, keep)
            if not keep and not answer.cut:
                channel = Answer()
        else:
            self.request.setblocking(False)
            channel = http.reply(self.client, request, answer, keep, began)
            keep = channel is None
        if channel is not None:
            self.next = http.start_channel, self.client, channel, request
        return keep

    def send(self, data):
        """Send all of it, as long as the client takes some. Raises OSError: it has left."""
        view = memoryview(data)
        for start in range(0, len(data), SEND_SIZE):
            part = view[start:start + SEND_SIZE]
            self.reader.deadline = time.monotonic() + SEND_TIME
            while part:
                self.reader.await_deadline()
                part = part[self.request.send(part):]
            self.http.working[self.client] += SEND_SIZE

    def finish(self):
        self.reader.deadline = None
        self.client.early = self.rfile.peek() + self.reader.early
        self.http.hand_over(*self.next)


class HttpEndpoint(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Where to listen: "host:port" (port 0: any free one), "[v6]:port", "port" or "unix:/path".

    `certfile`, `keyfile` (PEM): for TLS. `backlog`: connections that may wait to be accepted.
    Raises StartError.
    """

    allow_reuse_address = True
    context = _inode = None
    would_block: tuple = (BlockingIOError,)

    def __init__(self, bind="127.0.0.1:5000", certfile=None, keyfile=None, backlog=BACKLOG):
        self.bind, self.certfile, self.keyfile = bind, certfile, keyfile
        self.backlog = self.request_queue_size = backlog
        self.path = bind[5:] if bind.startswith("unix:") else None
        bind = re.sub(r"\A:?([0-9]+)\Z", r"127.0.0.1:\1", bind)
        match = re.match(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]/\ud800-\udfff]+):([0-9]{1,5})\Z", bind)
        if self.path is None and match and int(match.group(2)) < 65536:
            self.host, self.port = match.group(1).strip("[]"), int(match.group(2))
        elif not self.path or "\0" in self.path:
            raise StartError(
                "'%s' is not an address: give host:port, [v6]:port or unix:/path" % bind)
        if keyfile and not certfile:
            raise StartError("a keyfile needs its certfile: give --certfile too")
        if self.path and certfile:
            raise StartError("'%s' is a unix socket without TLS: leave out the certfile" % bind)

    def open(self, http):
        """Listen, and accept on the loop. Raises StartError."""
        path, self.http, self._reports = self.path, http, Throttle()
        self.address_family, address = socket.AF_UNIX, path
        if path is None:
            try:
                found = socket.getaddrinfo(self.host.encode("utf-8"), self.port, 0,
                                           socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
            except OSError as error:
                raise StartError("the address '%s' cannot be found: %s" % (
                    self.host, error.strerror or error)) from None
            self.address_family, _, _, _, address = min(
                found, key=lambda entry: entry[0] != socket.AF_INET)
        if self.certfile:
            import ssl
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.minimum_version = ssl.TLSVersion.TLSv1_2
            self.would_block = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
            try:
                self.context.load_cert_chain(self.certfile, self.keyfile)
            except (OSError, ValueError) as error:
                raise StartError("the certificate '%s' cannot be used: %s" % (
                    self.certfile, error if not isinstance(error, ssl.SSLError) else "it must hold "
                    "a certificate and its key, or the key be in a --keyfile (PEM)")) from None
        if path is None and network(address[0]) is not None and not http.secured:
            raise StartError(
                "%s can be reached from other machines: give a token with --token-file or "
                "GAFFER_TOKEN, or listen on 127.0.0.1" % self.bind)
        try:
            super().__init__(address, Handler, bind_and_activate=False)
            if path is None:
                self.server_bind()
            else:
                # remove the socket of a server that has died; bind() says what else is wrong
                with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                    if (stat.S_ISSOCK(os.lstat(path).st_mode)
                            and probe.connect_ex(path) == errno.ECONNREFUSED):
                        os.unlink(path)
                with contextlib.ExitStack() as ends:    # the socket is never open to others
                    ends.callback(os.umask, os.umask(0o177))
                    self.server_bind()
                self._inode = os.lstat(path)
            self.server_activate()
        except OSError as error:
            if hasattr(self, "socket"):
                self.socket.close()
            taken = "another program listens there; " if error.errno == errno.EADDRINUSE else ""
            raise StartError("cannot listen on %s: %s: %s%s" % (
                self.bind, (error.strerror or str(error)).lower(), taken, http.advice)) from None
        self.socket.setblocking(False)
        self._listen()

    def _listen(self):
        if self.fileno() >= 0:
            try:
                self.http.loop.register(self.fileno(), selectors.EVENT_READ, self.accept)
            except OSError:                     # the selector has no room
                self.http.loop.later(ACCEPT_PAUSE, self._listen)

    @property
    def url(self):
        """What a client connects to, with the real port."""
        if self.path is not None:
            return "unix:" + self.path
        host, port = map(str, self.server_address[:2])
        return "http%s://%s:%s" % (
            "s" if self.context else "", "[%s]" % host if ":" in host else host, port)

    def accept(self, mask):
        """Accept connections that wait, some in a turn of the loop."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, address = self.socket.accept()
            except OSError as error:            # none waits, or one has left already
                if error.errno in SHORTAGES and not isinstance(error, BlockingIOError):
                    self._reports.warning("no connection can be accepted: %s; trying again every "
                                          "second", error.strerror)
                    self.http.loop.unregister(self.fileno())
                    self.http.loop.later(ACCEPT_PAUSE, self._listen)
                return
            client, peer = "unix", None
            try:
                if self.path is None:
                    client, peer = "%s:%d" % address[:2], network(address[0])
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if self.context is not None:
                    sock = self.context.wrap_socket(
                        sock, server_side=True, do_handshake_on_connect=False)
            except (OSError, ValueError):       # the client has left already
                sock.close()
                continue
            self.http.admit(Connection(self, sock, client, peer))

    def start_thread(self, client):
        """Let a thread read the requests of a Connection."""
        http = self.http
        if len(http.threads) >= THREADS_MAX:
            http.refuse(client)
            return
        thread = http.threads[client] = threading.Thread(
            target=self.process_request_thread, args=(client.sock, client), daemon=True)
        begun = thread._started                 # type: ignore[attr-defined]
        # start() waits for that: for ever, if the thread has no memory to begin with
        begun.wait = functools.partial(begun.wait, BEGIN_TIME)
        if self.context is not None and client.sock.version() is None:
            if len(http.handshakes) >= HANDSHAKES_MAX:      # the oldest one has had its time
                oldest = next(iter(http.handshakes))
                http.handshakes.pop(oldest, None)
                http.interrupt(oldest)
            http.handshakes[client] = None
        try:
            thread.start()
            if not begun.is_set():
                raise MemoryError("it does not begin")
        except (RuntimeError, MemoryError) as error:        # the system has no thread left
            self._reports.warning("a request has no thread: %s", error)
            client.early = b""                  # it may begin yet
            http.refuse(client)

    def shutdown_request(self, request):
        """Do nothing: the loop closes connections."""

    def handle_error(self, request, client_address):
        """Log what a thread has raised, and close a connection that got no Handler."""
        log.exception("a request failed")
        self.http.hand_over(self.http.close_connection, client_address)

    def close(self):
        """Listen no longer."""
        with contextlib.suppress(KeyError, ValueError):     # it is closed, or waits for descriptors
            self.http.loop.unregister(self.fileno())
        self.server_close()
        with contextlib.suppress(OSError):      # somebody else has removed it
            if self._inode and os.path.samestat(os.lstat(self.path), self._inode):
                os.unlink(self.path)


http_date = functools.lru_cache(1)(format_date_time)
FRAMING_HEADERS = ("content-length", "transfer-encoding", "connection", "date")


def made_response(result):
    """Return a Response of what an added route returns.

    That is str, bytes, dict, list, Response or (status, headers, body). Raises ValueError,
    TypeError if it is none of these, or cannot be sent.
    """
    if isinstance(result, tuple):
        status, headers, body = result
        if not (isinstance(status, int) and 200 <= status <= 599):
            raise ValueError("the status of a route's answer must be a number from 200 to 599")
        made = made_response(body)
        pairs = headers.items() if isinstance(headers, dict) else headers
        given = [(str(name), str(value)) for name, value in pairs
                 if str(name).lower() not in FRAMING_HEADERS]
        made = Response(made.body, status, merge_headers(given, made.headers), content_type=None)
    elif isinstance(result, Response):
        made = result
    elif isinstance(result, str):
        made = Response(result.encode("utf-8"), content_type="text/plain; charset=utf-8")
    elif isinstance(result, (bytes, bytearray)):
        made = Response(bytes(result), content_type="application/octet-stream")
    else:
        made = json_response(result)
    encode_head(made.status, made.headers)
    return made


class HttpHandler:
    """The HTTP API as an app.

    `endpoints`: HttpEndpoints (127.0.0.1:5000). `handlers`: [(regular expression, callable or
    WebSocketHandler class)]; callable(request, *groups) runs on the request's thread and returns
    str, bytes, dict, list, Response or (status, headers, body). `wsgi`: {"/prefix": application}.
    `token`, `cors_origins`, `allow_hosts`: who may do what. `max_body`: bytes of a body for these.
    `access_log`: an AccessLog.
    """

    advice = "give another --bind"              # where it cannot listen

    def __init__(self, endpoints=None, handlers=(), wsgi=None, token=None, cors_origins=(),
                 allow_hosts=(), max_body=16 * MIB, access_log=None):
        self.endpoints = list(endpoints) if endpoints is not None else [HttpEndpoint()]
        self.access = Access(token, cors_origins, allow_hosts)
        self.access_log, self.secured = access_log, token is not None
        self._handlers = [(re.compile(pattern), handler) for pattern, handler in handlers]
        self._wsgi = sorted(
            ((("/" + path.strip("/")).rstrip("/"), app) for path, app in (wsgi or {}).items()),
            key=lambda item: -len(item[0]))
        self._max_body = max_body
        self.routes, self._api = ROUTES, None
        self.loop, self.listeners = None, []
        self.connections, self._of_address = set(), collections.Counter()
        self.channels = set()                   # those of the connections that the loop has,
        self.threads = {}                       # and the threads of the others, by Connection
        self.handshakes = {}                    # Connections that begin TLS; the oldest first
        self.working = {}                       # Connection: bytes sent, of those on threads
        self.answers = collections.Counter()    # (method, status) -> number
        self.seconds, self.timed = 0.0, 0       # of answers that did not wait for an event
        self.counting, self._reports = threading.Lock(), Throttle()

    # the app

    def start(self, loop, manager):
        """Listen. Raises StartError: an endpoint cannot be used, or would be open to everybody."""
        self.loop, self._api, self._used = loop, Api(manager, self), {}
        self._selector, self._sweeping = selectors.DefaultSelector(), False
        end, wake = os.pipe()                   # closing it wakes the watcher
        self._wake = open(wake, "wb")
        self._selector.register(end, selectors.EVENT_READ)
        self.ending = self.closed = False
        self._known_route = functools.lru_cache(256)(self._find)    # clients poll the same paths
        if sys.version_info < (3, 9):
            # glibc loads a library when the first thread ends; without a descriptor it aborts
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
        # later, Linux would stop the loop for 20 ms whenever its table of descriptors has to grow
        os.close(fcntl.fcntl(loop.wake_fd, fcntl.F_DUPFD, min(files_max(), FILES_EXPECTED) - 1))
        self.watcher = threading.Thread(target=self._watch, args=(open(end, "rb"),), daemon=True)
        self.watcher.start()
        try:
            for endpoint in self.endpoints:
                endpoint.open(self)
                self.listeners.append(endpoint)
        except BaseException:
            self.stop()
            self.join()
            raise

    @on_loop
    def finish(self):
        """Listen no longer, and take one more request of each connection."""
        self.ending = True
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    @on_loop
    def stop(self):
        """Listen no longer, close all connections."""
        self.finish()
        self.closed = True
        self._wake.close()
        unsent = [channel.unsent for channel in self.channels if channel.unsent]
        if unsent:
            log.warning("%d clients did not read the rest: at least %d bytes are lost",
                        len(unsent), sum(unsent))
        for channel in tuple(self.channels):
            channel.stop()
        for connection in self.connections:
            self.interrupt(connection)

    @staticmethod
    def interrupt(connection):
        """Let the thread of a connection see its end."""
        with contextlib.suppress(OSError):      # it has ended already
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def join(self):
        """Wait for the threads, and for what they have given to the access log."""
        deadline = time.monotonic() + STOP_SEND
        for thread in (self.watcher, *self.threads.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection in tuple(self.connections):
            connection.sock.close()
        if self.access_log is not None:
            self.access_log.close(LOG_END)      # a disk that hangs is not waited for

    @property
    def sending(self):
        """{channel or Connection: bytes sent} of those that have more to send."""
        left = {channel: channel.sent for channel in self.channels if channel.unsent}
        return {**left, **self.working.copy()}

    @property
    def urls(self):
        """What the endpoints are called, with their real ports."""
        return [listener.url for listener in self.listeners]

    # connections; under the loop's lock

    def admit(self, connection):
        """Count a new connection and wait for its first request, or refuse one too many."""
        peer, most = connection.peer, min(CONNECTIONS_MAX, files_max() * FILES_FOR_CONNECTIONS)
        self.connections.add(connection)
        self._of_address[peer] += 1
        if len(self.connections) > most or (
                peer is not None and self._of_address[peer] > ADDRESS_CONNECTIONS_MAX):
            self.refuse(connection)
        else:
            self.watch(connection)

    def watch(self, connection):
        """Wait for the next request of a connection."""
        sock, listener = connection.sock, connection.listener
        if connection.early or listener.context is not None and sock.pending():
            listener.start_thread(connection)
            return
        sock.setblocking(False)
        self._used[connection] = time.monotonic()
        try:
            self._selector.register(sock, selectors.EVENT_READ, connection)
        except OSError:                         # the selector has no room
            del self._used[connection]
            self.refuse(connection)
        if not self._sweeping:
            self._sweep()

    def _sweep(self):
        """End the connections that have had no request for IDLE_TIME."""
        due, used = time.monotonic() - IDLE_TIME, self._used.copy()
        for connection, when in used.items():
            if when <= due:
                self.interrupt(connection)
        left = [when for when in used.values() if when > due]
        self._sweeping = bool(left)
        if left:                                # at most 60 times in IDLE_TIME, as it looks at all
            self.loop.later(max(min(left) - due, IDLE_TIME / 60), self._sweep)

    def refuse(self, connection):
        """Close a connection for which there is no room. Without TLS its client is told so."""
        self._reports.warning("too many connections: one was refused")
        data = self.answer(connection, None, error_response(
            Busy("there are too many connections; try again later")), False)
        connection.sock.setblocking(False)
        fd = connection.sock.fileno()           # a thread that begins late may set a timeout, and
        with contextlib.suppress(OSError):      # Python's recv() would then try again for ever
            if connection.listener.context is None:     # else that would need a handshake
                os.write(fd, data)
            connection.sock.shutdown(socket.SHUT_WR)
            os.read(fd, READ_SIZE)              # unread bytes would turn it into a reset
        self.close_connection(connection)

    def close_connection(self, connection):
        """Close a connection and forget it, if that was not done before."""
        if connection in self.connections:
            self.connections.remove(connection)
            self.threads.pop(connection, None)
            self.handshakes.pop(connection, None)
            self._of_address[connection.peer] -= 1
            if not self._of_address[connection.peer]:
                del self._of_address[connection.peer]
            connection.sock.close()

    def start_channel(self, connection, channel, request):
        """Let a channel have a connection."""
        try:
            channel.start(connection, request)
        except Exception as error:
            if isinstance(error, OSError):      # the selector has no room
                self._reports.warning("a connection cannot be watched, and is closed: %s",
                                      error.strerror)
            else:
                log.exception("a request failed")
            channel.close()

    def hand_over(self, function, connection, *args):
        """Call `function(connection, *args)`, as a thread is done with a connection. Any thread."""
        def go_on():
            self.threads.pop(connection, None)
            self.working.pop(connection, None)  # now, as its next thread may begin at once
            if self.closed:
                self.close_connection(connection)
            else:
                function(connection, *args)
        with contextlib.suppress(Stopping):     # join() closes it
            self.loop.call(go_on)

    def _watch(self, end):
        """Answer on this thread the requests that take no time, of all connections without TLS.

        A connection gets a thread of its own when a request is not whole in what one read brings,
        has a body, or its route may take time. The loop gets it when the answer lasts or is not
        taken at once.
        """
        with end, self._selector:       # threads would hand the interpreter lock on at each request
            while not self.closed:
                self.loop.guard(self._watch_once)

    def _watch_once(self):
        tasks = []
        for key, _ in self._selector.select():
            connection = key.data
            if self.closed:
                return
            if connection.listener.context is None:
                try:
                    data = connection.sock.recv(READ_SIZE)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    self._leave(self.close_connection, connection)
                    continue
                try:
                    if len(data) <= KIB and data.endswith(b"\r\n\r\n"):
                        request = known_request(data[:-4])
                        request.client = connection.address
                        if not has_body(request):
                            respond, _, quick = self.route(request)
                            if quick:
                                tasks.append((connection, request, respond))
                                continue
                except Exception:               # what is wrong is left to a thread, too
                    pass
                connection.early = data
            self._leave(connection.listener.start_thread, connection)
        with contextlib.suppress(Stopping):     # then stop() has ended the connections
            while tasks:                        # one by one, each would wait for a turn of the loop
                self.loop.call(self._answer_quick, tasks[:LOCKED_REQUESTS])
                del tasks[:LOCKED_REQUESTS]

    def _answer_quick(self, tasks):
        for connection, request, respond in tasks:
            began = self._used[connection] = time.monotonic()
            then = self.close_connection, connection
            try:
                keep = not (request.wants_close() or self.ending)
                channel = self.reply(connection, request, respond(request), keep, began)
                if channel is None:
                    continue
                then = self.start_channel, connection, channel, request
            except Exception:
                log.exception("a request failed")
            self._leave(*then)

    def _leave(self, function, connection, *args):
        self._selector.unregister(connection.sock)
        del self._used[connection]
        self.hand_over(function, connection, *args)

    # requests

    def route(self, request):
        """Check a head.

        Return (function of the request that makes its answer, limit of the body, whether that takes
        no time). The function raises nothing; the answer is a Response, a Channel or a WsgiRun.
        Raises GafferError.
        """
        access, is_read = self.access, request.method in ("GET", "HEAD")
        try:
            access.check_host(request)
        except GafferError:
            request.headers.pop("origin", None)     # without a Host it cannot be our own
            raise
        if request.method == "OPTIONS":
            return (lambda request: Response(status=204)), BODY_SIZE, False
        access.check_origin(request)
        if request.path not in OPEN_PATHS or not is_read:
            access.check_token(request)
        try:
            respond, limit, quick = self._known_route(request.method, request.path)
        except GafferError as error:
            answer = error_response(error)
            if has_body(request) and "expect" not in request.headers:
                with contextlib.suppress(TooLarge):     # else it is read; others may be behind it
                    body_length(request, BODY_SIZE)
                    return (lambda request: answer), BODY_SIZE, False
            raise
        if quick == "few":
            manager = self._api.manager
            quick = not request.raw_query and (
                len(manager.templates) + len(manager.processes) <= QUICK_STATUSES)
        return respond, limit, quick

    def _find(self, method, path):
        methods, args = find_route(self.routes, split_path(path))
        if methods is not None:
            handler = methods.get(method)
            if handler is not None:
                def call(request):
                    query = parse_query(request, handler.query)
                    arguments = self._api, request, query, *args
                    result = (handler(*arguments) if handler.unlocked
                              else self.loop.call(handler, *arguments))
                    return (result if isinstance(result, (Response, Channel))
                            else json_response(result))
                quick = "few" if handler.unlocked == "few" else not handler.unlocked
                return functools.partial(attempt, call), BODY_SIZE, method == "GET" and quick
            if method not in METHODS + OTHER_METHODS:
                raise GafferError("HTTP has no such method; they are in capitals",
                                  status=501, code="method_not_allowed")
            if "*" in methods:                  # what a stream allows depends on its label
                methods = self.loop.call(methods["*"], self._api, *args)
            allow = [each for each in METHODS if each in methods or each == "OPTIONS"]
            raise GafferError("use one of the methods in the Allow header", status=405,
                              code="method_not_allowed", headers=[("Allow", ", ".join(allow))])
        for pattern, handler in self._handlers:
            match = pattern.fullmatch(path)
            if match:
                groups = [group and urllib.parse.unquote(group) for group in match.groups()]
                return (functools.partial(self._call_route, pattern.pattern, handler, groups),
                        self._max_body, False)
        for prefix, app in self._wsgi:
            if path == prefix or path.startswith(prefix + "/"):
                return functools.partial(WsgiRun, self, app, prefix), self._max_body, False
        raise NotFound("there is nothing at %s; GET /openapi.json lists the routes" % path[:200],
                       code="resource_not_found")

    @staticmethod
    def _call_route(pattern, handler, groups, request):
        try:
            if isinstance(handler, type) and issubclass(handler, WebSocketHandler):
                headers = websocket_accept(request, handler.protocols)
                return HandlerSocket(handler, request, groups, headers)
            return made_response(handler(request, *groups))
        except GafferError as error:
            return error_response(error)
        except BaseException:                   # sys.exit() too: the client waits for an answer
            failure = "the added route %s has failed" % pattern
            log.exception("%s", failure)
            return error_response(GafferError(failure + "; gaffer's log says how"))

    def head(self, request, status, headers, keep=None):
        """Return the head of an answer: `headers`, and what every answer has besides.

        `keep`: whether the connection goes on; None: `headers` tell it.
        """
        if keep is False:
            headers = [*headers, ("Connection", "close")]
        elif keep and request.version == (1, 0):
            headers = [*headers, ("Connection", "keep-alive")]
        cors = self.access.cors(request) if request is not None else []
        return encode_head(status, merge_headers(headers, [
            ("Date", http_date(int(time.time()))), ("Cache-Control", "no-store"), *cors]))

    def reply(self, connection, request, answer, keep, began):
        """Send an answer. Return the Channel that goes on with the connection: it sends the rest,
        or what lasts; None if all is sent and the next request may follow."""
        if isinstance(answer, Channel):
            if request.method != "HEAD":
                return answer
            keep, began = keep and not isinstance(answer, Feed), None
            answer = self.loop.call(answer.head)
        data = self.answer(connection, request, answer, keep, began)
        try:
            data = data[connection.sock.send(data):]
        except OSError:
            pass                                # a channel tries again
        return None if keep and not data else Answer(data, keep)

    def answer(self, connection, request, response, keep, began=None):
        """Return a Response as bytes, and count and log it. Any thread.

        `keep`: the connection goes on; `began`: when its request was complete, or None.
        """
        method = "" if request is None else request.method
        status, headers, body = response.status, list(response.headers), response.body
        if body is None or status in (204, 304):        # RFC 9110 sections 15.3.5 and 15.4.5
            body = b""
        else:
            headers.append(("Content-Length", len(body)))
        if method == "HEAD":
            body = b""
        took = None if began is None else time.monotonic() - began
        self.count(method, status, took)
        self.log_request(connection.address, request, status, len(body))
        return self.head(request, status, headers, keep) + body

    def count(self, method, status, took=None):
        """Count an answer and, if it did not wait for an event, the seconds it took. Any thread."""
        method = method if method in METHODS + OTHER_METHODS else "other"
        with self.counting:
            self.answers[method, status] += 1
            if took is not None:
                self.seconds += took
                self.timed += 1

    def log_request(self, client, request, status, size):
        """Tell the access log of an answer with `size` bytes of body. Any thread."""
        if self.access_log is not None:
            self.access_log.add(client, request, status, size)


# --------------------------------------------------------------------------------------------------
# client
#
# A thin wrapper of http.client for the command line: TCP, TLS and unix sockets, a token, event
# streams. One connection per request. A failure is a ClientError: one sentence that says what to
# do, and the exit status of the command. Runs on the caller's thread.
# --------------------------------------------------------------------------------------------------
CLIENT_TIME = 30.0                              # for an answer
HEARTBEAT = 10                                  # seconds between signs of life of a stream
STREAM_TIME = 3.0 * HEARTBEAT                   # without one it is lost
DEFAULT_ENDPOINT = "http://127.0.0.1:5000"
FEED = "feed=eventsource&heartbeat=%d" % HEARTBEAT


class ClientError(Exception):
    """A command failed: `str(error)` is one sentence, `exit_status` the command's, `code` the
    server's error code."""

    def __init__(self, reason, exit_status=1, code=None):
        super().__init__(reason)
        self.exit_status, self.code = exit_status, code


class NoServer(ClientError):
    """No server answers at the endpoint, or something that is not gaffer."""

    def __init__(self, endpoint, why):
        super().__init__(
            "there is no gaffer at %s (%s): start one with 'python3 gaffer.py serve', or say where "
            "it is with --endpoint or GAFFER_ENDPOINT" % (endpoint, why), 5)


class NotThere(ClientError):
    """There is no such name, process or group."""

    def __init__(self, reason):
        super().__init__(reason, 4, "not_found")


def refusal(endpoint, status, body):
    """Return the ClientError for an answer with an error status."""
    try:
        error = json.loads(body)
        code, reason = error["error"], str(error["reason"])
    except (ValueError, TypeError, KeyError):
        return NoServer(endpoint, "it answers %d, but not as gaffer does" % status)
    if code == "unauthorized":
        reason = "the server requires its token: pass it with --token-file FILE or GAFFER_TOKEN"
    if code == "not_found":
        return NotThere(reason.replace("GET /processes ", "'gaffer.py status' "))
    return ClientError(reason, {401: 6, 403: 6, 408: 124, 504: 124}.get(status, 1), code)


class Client:
    """Sends requests to one server.

    `endpoint`: http://host:port, https://host:port, host:port, port or unix:/path; `token`: a
    string or None; `cacert`: a PEM file of certificates to trust. ClientError: the endpoint is
    malformed.
    """

    def __init__(self, endpoint=DEFAULT_ENDPOINT, token=None, cacert=None):
        self.endpoint, self._cacert, self._path = endpoint, cacert, None
        self._headers = {"Connection": "close"}
        if token is not None:                   # http.client writes latin-1, gaffer reads UTF-8
            self._headers["Authorization"] = "Bearer " + token.encode("utf-8").decode("latin-1")
        text = re.sub(r"\A:?([0-9]+)\Z", r"127.0.0.1:\1", endpoint)
        if endpoint.startswith("unix:"):
            self._path = endpoint[5:]
            text = self._path and "localhost"
        try:
            url = urllib.parse.urlsplit(text if "://" in text else "http://" + text)
            self._host, self.port = url.hostname, url.port
        except ValueError:
            self._host = None
        if not self._host or url.scheme not in ("http", "https"):
            raise ClientError("'%s' is not an endpoint: give http://host:port, https://host:port "
                              "or unix:/path" % endpoint, 2)
        self._tls, self._prefix = url.scheme == "https", url.path.rstrip("/")

    def _failure(self, error, timeout):
        """Return the ClientError for an exception of http.client or of the socket."""
        if isinstance(error, socket.timeout):
            return ClientError("%s has not answered in %g seconds" % (self.endpoint, timeout), 124)
        if getattr(error, "verify_message", None):
            return ClientError("the certificate of %s cannot be trusted (%s): pass its CA's with "
                               "--cacert" % (self.endpoint, error.verify_message), 6)
        if isinstance(error, PermissionError):
            return ClientError("only the owner of %s and root may use it" % self.endpoint, 6)
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        why = ascii(why)[1:-1][:100].lower()
        if isinstance(error, ConnectionResetError) or not isinstance(error, OSError):
            why = "no answer in HTTP: %s; does it serve TLS, as https://?" % why
        elif hasattr(error, "reason"):          # an ssl.SSLError
            why = "no answer in TLS: %s; is it http://?" % why
        return NoServer(self.endpoint, why)

    def open(self, method, path, value=None, headers=None, timeout=CLIENT_TIME):
        """Return the http.client response to a request; close it.

        `value`: bytes, or what is sent as JSON. `timeout`: seconds without a byte. ClientError,
        NoServer: it is not a success.
        """
        from http.client import HTTPConnection, HTTPException, HTTPSConnection
        body = value if value is None or isinstance(value, bytes) else json_bytes(value)
        connection = HTTPConnection(self._host, self.port, timeout=timeout)
        if self._tls:
            import ssl
            try:
                context = ssl.create_default_context(cafile=self._cacert)
            except OSError as error:
                raise ClientError("the certificates of --cacert '%s' cannot be used: %s" % (
                    self._cacert, error), 2) from None
            connection = HTTPSConnection(self._host, self.port, timeout=timeout, context=context)
        try:
            if self._path:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(timeout)
                connection.sock.connect(self._path)
            headers = dict(self._headers, **headers or {})
            connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise self._failure(error, timeout) from None
        if connection.sock is not None:
            connection.sock.close()             # the response holds it now, and closes it
        if response.status >= 300:
            with response:
                raise refusal(self.endpoint, response.status, response.read(MIB))
        return response

    def exchange(self, method, path, value=None, timeout=CLIENT_TIME):
        """Return (headers, body as bytes) of an answer. ClientError."""
        from http.client import HTTPException
        with self.open(method, path, value, None, timeout) as response:
            try:
                return response.headers, response.read()
            except (OSError, HTTPException) as error:
                raise self._failure(error, timeout) from None

    def request(self, method, path, value=None, timeout=CLIENT_TIME):
        """Return the body of an answer, as bytes. ClientError."""
        return self.exchange(method, path, value, timeout)[1]

    def get(self, path):
        """Return the JSON value of a GET. ClientError."""
        try:
            return json.loads(self.request("GET", path))
        except ValueError:
            raise NoServer(self.endpoint, "it does not answer as gaffer does") from None

    def events(self, path, last_id=""):
        """Yield (id, type, data) of each event until the stream ends or is cut; ask again with the
        last id. The first has the type None and the stream's Gaffer-Offset as data. `path` asks for
        FEED. ClientError: there is no such stream."""
        from http.client import HTTPException
        headers = {"Last-Event-ID": last_id} if last_id else None
        with self.open("GET", path, None, headers, STREAM_TIME) as response:
            yield "", None, response.headers.get("Gaffer-Offset", "")
            fields = {}
            # the caller sees the end, and asks again
            with contextlib.suppress(OSError, HTTPException):
                for line in response:
                    name, _, value = line.decode("utf-8", "replace").rstrip("\n").partition(": ")
                    if name:
                        fields[name] = value
                    elif fields:
                        yield fields.get("id", ""), fields.get("event", ""), fields.get("data", "")
                        fields = {}


def reference(name):
    """Return a name or pid as a segment of a path."""
    return urllib.parse.quote(name, safe=":@", errors="surrogateescape")


# --------------------------------------------------------------------------------------------------
# apps
#
# What plugs into a Manager: any object with start(loop, manager), and maybe stop(), restart(),
# finish(), which is called before the last bytes are sent, and join(), when the loop is closed.
# None of them runs under the loop's lock: an app may wait for threads that use the manager.
# --------------------------------------------------------------------------------------------------
WEBHOOK_QUEUE = 1000                            # events; one more is dropped
WEBHOOK_TIME = 5.0                              # for a receiver to answer
WEBHOOK_PAUSES = (0, 0.5, 2.0)                  # before each try
WEBHOOK_END = 2.0                               # to send what waits, at the stop
SCREEN_SIZE = MIB                               # of lines that wait for a slow terminal
SCREEN_END = 5.0                                # to write it, at the end


def ending_signals():
    """Return the signals that end a process by default. Those of a program's faults are left out:
    their handler would return to the same instruction forever."""
    import faulthandler
    harmless = {"KILL", "STOP", "TSTP", "TTIN", "TTOU", "CONT", "CHLD", "URG", "WINCH", "INFO",
                "ILL", "BUS", "FPE", "SEGV", "EMT"}
    if faulthandler.is_enabled():               # shows the stacks
        harmless.add("ABRT")
    always = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    return [signum for signum in signal.valid_signals()
            if getattr(signum, "name", "SIGRT")[3:] not in harmless
            and (signum in always or signal.getsignal(signum) == signal.SIG_DFL)]


class SigHandler:
    """Stops the manager on `signals`; a second one, SIGQUIT, or Ctrl-C once `warned()` kills at
    once. `reload` is called on SIGHUP, `reopen` on SIGUSR1 and SIGUSR2, both by the loop. SIGCHLD
    gets its default, and no signal stays blocked. Only for the main thread."""

    def __init__(self, signals=(signal.SIGINT, signal.SIGTERM), reload=None, reopen=None,
                 warned=lambda: False):
        self._signals, self._reload, self._reopen = signals, reload, reopen
        self._warned = warned
        self._undo = contextlib.ExitStack()

    def start(self, loop, manager):
        """Install the handlers. StartError: this is not the main thread."""
        if threading.current_thread() is not threading.main_thread():
            raise StartError("SigHandler needs the main thread: run() the manager there, or leave "
                             "SigHandler out")
        self._count = 0

        def stop(signum, frame_):
            self._count += 1
            manager.stop(kill=self._count > 1 or signum == signal.SIGINT and self._warned())
        handlers = dict.fromkeys(self._signals, stop)
        handlers[signal.SIGQUIT] = lambda signum, frame_: manager.stop(kill=True)
        if self._reload is not None:
            handlers[signal.SIGHUP] = lambda signum, frame_: loop.call_soon(self._reload)
        elif signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            # nohup keeps gaffer running; children do not inherit a handler
            handlers[signal.SIGHUP] = lambda signum, frame_: None
        if self._reopen is not None:
            for signum in (signal.SIGUSR1, signal.SIGUSR2):
                handlers[signum] = lambda signum, frame_: loop.call_soon(self._reopen)
        if os.getpid() == 1:                    # a container's first process adopts all orphans
            handlers[signal.SIGCHLD] = lambda signum, frame_: loop.call_soon(manager.reap_orphans)
        elif signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            # else the system would throw exit statuses away
            handlers[signal.SIGCHLD] = signal.SIG_DFL
        for signum, handler in handlers.items():
            old = signal.signal(signum, handler)        # None: set by other means than Python's
            self._undo.callback(signal.signal, signum, signal.SIG_DFL if old is None else old)
        old_mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, old_mask)

    def stop(self):
        """Restore the handlers that were there before."""
        self._undo.close()


def check_hook_url(url):
    """Check where events are to be posted. ValueError."""
    host = r"([^@\s/?#:[\]]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
    if not re.fullmatch(r"https?://%s([/?#][!-~]*)?" % host, url, re.I):
        raise ValueError("%r is not a URL such as http://host:port/path" % url)


class WebHooks:
    """Posts events as JSON. `hooks`: [(pattern, URL)], patterns as for Manager.subscribe().

    Each URL has a worker that posts in order, with a timeout and retries. An event that finds 1,000
    others waiting, or that its receiver does not accept, is dropped and counted (`dropped`).
    """

    def __init__(self, hooks=()):
        self.dropped, self._throttle = 0, Throttle()
        self._lock = threading.Lock()           # guards `dropped`
        self._ending = threading.Event()
        self._workers = {}                      # URL -> (Thread, queue of events and, last, None)
        self.replace(hooks)

    def replace(self, hooks):
        """Use other hooks from now on. ValueError, BadEventType."""
        for _, url in hooks:
            check_hook_url(url)
        self.hooks = [(parse_pattern(pattern.split("/")), url) for pattern, url in hooks]

    def start(self, loop, manager):
        """Begin to post."""
        self._ending.clear()
        manager.subscribe("", self._put)

    def _put(self, kind, event):
        for url in [url for pattern, url in self.hooks if matches(pattern, event)]:
            if url not in self._workers:
                events: queue.SimpleQueue = queue.SimpleQueue()
                thread = threading.Thread(target=self._work, args=(url, events), daemon=True)
                self._workers[url] = thread, events
                thread.start()
            events = self._workers[url][1]
            if events.qsize() < WEBHOOK_QUEUE:
                events.put(event)
            else:
                self._drop(url, "the queue is full")

    def _drop(self, url, why):
        with self._lock:
            self.dropped += 1
        self._throttle.warning("an event for the webhook %s was dropped, %d of all by now: %s",
                               url, self.dropped, why)

    def _work(self, url, events):
        import http.client
        import urllib.request

        class AnyStatus(urllib.request.HTTPErrorProcessor):
            def http_response(self, request, response):
                return response                 # a redirect would be a GET without the event
            https_response = http_response
        opener = urllib.request.build_opener(AnyStatus)
        for event in iter(events.get, None):
            headers, failure = {"Content-Type": "application/json"}, ""
            request = urllib.request.Request(url, json_bytes(event), headers)
            for pause in WEBHOOK_PAUSES:
                self._ending.wait(pause)
                try:
                    with opener.open(request, timeout=WEBHOOK_TIME) as response:
                        status = response.status
                    failure = "it answers %d" % status if status >= 300 else ""
                    if status < 500 and status not in (408, 429):
                        break
                except (OSError, ValueError, http.client.HTTPException) as error:
                    failure = str(getattr(error, "reason", None) or error).lower()
            if failure:
                self._drop(url, failure)

    def join(self):
        """Post what waits, within WEBHOOK_END seconds and without pauses. Drop the others."""
        self._ending.set()
        for _, events in self._workers.values():
            events.put(None)
        end, left = time.monotonic() + WEBHOOK_END, 0
        for thread, events in self._workers.values():
            thread.join(max(0.0, end - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                while True:
                    left += events.get_nowait() is not None
            events.put(None)                    # it ends after the one that it is at
        self.dropped += left
        self._workers = {}
        if left:
            log.warning("%d events for webhooks were not posted before the end, %d were dropped "
                        "in all", left, self.dropped)


class LineEncoder(Encoder):
    """Whole lines, as a list of bytes."""

    key, by_line = ("lines",), True

    def encode(self, data, offset, before, mode, piece):
        skip, segments, lines = split_lines(data, before, mode, piece)
        return lines, skip + sum(map(len, segments))


def event_text(event):
    """Return an event in words: "web: exit (pid 1, os pid 4711, status 3)"."""
    details = []
    if "pid" in event:
        details = ["pid %d" % event["pid"], "os pid %d" % event["os_pid"]]
    if event["event"] == "exit" and event["term_signal"]:
        details.append("signal %d" % event["term_signal"])
    elif event["event"] == "exit":
        details.append("status %d" % event["exit_status"])
    more = " (%s)" % ", ".join(details) if details else ""
    return "%s: %s%s" % (event["name"], event["event"], more)


class ConsoleOutput:
    """Logs events: failures as warnings, the others as information. With `output`, it logs the
    journal, all output of processes, for debugging."""

    def __init__(self, output=False):
        self._output = output

    def start(self, loop, manager):
        """Subscribe to all events."""
        def show(lines):
            log.debug("%s", lines[:-1].decode("utf-8", "replace"))
            return True

        def follow():
            sink = types.SimpleNamespace(send=show, finished=Reader.close,
                                         lost=lambda *ignored: None)
            view, encoder = manager.journal.view(), JournalEncoder(False, manager.epoch)
            # nobody else refers to it
            self._reader = Reader(view, encoder, sink, view.end, "skip")
            self._reader.start()
        self._manager = manager
        manager.subscribe("", self._event)
        if self._output:
            loop.call(follow)

    def _event(self, kind, event):
        pid, template = event.get("pid"), self._manager.templates.get(event["name"])
        info, failed, note = template.info if template else {"success": [0]}, False, ""
        if kind == "exit":
            end = event["exit_status"], event["term_signal"]
            process = self._manager.processes.get(pid)
            failed = process is not None and process.by_itself and not succeeded(info, end)
        elif "reason" in event:
            failed, note = True, ": " + event["reason"]
        elif kind == "stop" and template and template.gave_up and template.last_exit:
            end = template.last_exit["exit_status"], template.last_exit["term_signal"]
            failed, note = not succeeded(info, end), ": gave up; start it once it is fixed"
        failed = failed or kind in ("flap", "fail")
        log.log(logging.WARNING if failed else logging.INFO, "%s%s", event_text(event), note)


def signal_name(number):
    """Return SIGTERM, or SIG99 for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "SIG%d" % number


def colour(text, code):
    """Return text in a colour of the terminal."""
    return "\x1b[%dm%s\x1b[0m" % (code, text)


class Prefixer:
    """Makes the prefixes of lines of output: `name |` in a column, a colour for each name."""

    PALETTE = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)

    def __init__(self, coloured, width=0):
        self._coloured, self._width, self._colours = coloured, width, {}

    def prefix(self, name, when=""):
        """Return the prefix as a string."""
        self._width = max(self._width, len(name))
        text = "%s%-*s |" % (when and when + " ", self._width, name)
        if not self._coloured or name == "system":
            return text
        code = self.PALETTE[len(self._colours) % len(self.PALETTE)]
        return colour(text, self._colours.setdefault(name, code))


class Screen:
    """Shows all processes on one screen: `HH:MM:SS web.1 | line`, also when they start and end.

    If `out`, a descriptor, is slow the processes wait, as for a pipe. `one_for_all`: when a process
    ends by itself the manager stops; `status` is then its exit status, or 128 and the signal.
    """

    def __init__(self, out, coloured=False, one_for_all=False):
        self.status, self.error = 0, None       # the latter: why nobody can see it any more
        self.warned = False                     # it has said that Ctrl-C kills
        self._one_for_all = one_for_all
        self._out, self._coloured = out, coloured
        self._shown = {}                        # pid -> (name, Process, Readers that go on)

    def start(self, loop, manager):
        self._loop, self._manager = loop, manager
        names = ["%s.%d" % (name, template.info["numprocesses"])
                 for name, template in manager.templates.items()]
        self._prefixer = Prefixer(self._coloured, max(map(len, ["system", *names])))

        def resume():
            for _, _, readers in tuple(self._shown.values()):
                for reader in tuple(readers):
                    reader.pump()
        self._writer = Writer(
            self._out, SCREEN_SIZE, lambda: loop.call_soon(resume), self._failed)
        manager.subscribe("", lambda kind, event: loop.call(self._event, kind, event))
        # a stop that takes less needs no comment
        manager.wait_until(lambda: manager.stopping and loop.later(0.5, self._report_waiting))

    def note(self, text):
        """Show lines of gaffer's own."""
        self._show("system", text.encode("utf-8").split(b"\n"))

    def _show(self, name, lines):
        prefix = self._prefixer.prefix(name, time.strftime("%H:%M:%S")).encode("utf-8")
        return self._writer.put(b"".join(b"%b %b\n" % (prefix, line) for line in lines))

    def _event(self, kind, event):
        pid, manager = event.get("pid"), self._manager
        name = self._shown[pid][0] if pid in self._shown else event["name"]
        if kind == "spawn":
            self.follow(pid, manager.processes[pid])
        elif kind == "ready":
            self.note("%s is ready after %.1f s" % (name, event["seconds"]))
        elif kind == "exit" and pid in self._shown:     # else its last line came after its exit
            self._maybe_ended(pid)
        elif kind == "done":
            self._maybe_done()
        elif kind == "fail":
            if self._one_for_all and manager.templates[name].last_exit is None:
                self.status = event["exit_status"]      # it could not be started
                manager.stop()
        elif kind == "stop_pid" and "reason" in event:
            self.note("%s is stopped: %s" % (name, event["reason"]))

    def _report_waiting(self):
        """Name the processes that have not ended yet, and say when they are killed."""
        waiting = {name: process.status().get("kill_in", 0)
                   for name, process, _ in self._shown.values() if not process.exited}
        if waiting:
            self.warned, kill_in = True, math.ceil(max(waiting.values()))
            self.note("waiting for %s%s; Ctrl-C again kills now" % (
                ", ".join(waiting), ", SIGKILL in %d s" % kill_in if kill_in else ""))

    def follow(self, pid, process):
        """Show a process and its output from now on, and how it ends."""
        name, readers = "%s.%d" % (process.name, process.instance), []
        self._shown[pid] = name, process, readers
        self.note("%s started, os pid %d" % (name, process.os_pid))

        def finished(reader, lost=0):
            reader.close()
            readers.remove(reader)
            self._maybe_ended(pid)
        sink = types.SimpleNamespace(send=functools.partial(self._show, name), finished=finished,
                                     lost=finished)
        readers += [Reader(output.window, LineEncoder(), sink, output.window.start, "block")
                    for output in process.outputs.values()]
        for reader in tuple(readers):
            reader.start()

    def _maybe_ended(self, pid):
        """Say how a process ended, after its last line."""
        name, process, readers = self._shown[pid]
        if readers or not process.exited:
            return
        del self._shown[pid]
        status, signum = process.exit_status, process.term_signal
        self.note("%s %s" % (name, "was ended by %s" % signal_name(signum) if signum else
                             "exited with status %d" % status))
        again = process.retry_after is not None and not process.home.gave_up
        if self._one_for_all and process.by_itself and not (
                again or succeeded(process.info, process.end) or self._manager.stopping):
            self.status = shell_status((status, signum)) or int(bool(process.overdue))
            self._manager.stop()
        self._maybe_done()

    def _maybe_done(self):
        """Stop when all is done and shown."""
        if not self._shown and all(each.outcome == "done" and not each.active
                                   for each in self._manager.templates.values()):
            self._manager.stop()

    def _failed(self, error, data_):
        """Stop, as nobody looks any more."""
        self.error = self.error or error
        self._manager.stop()

    def join(self):
        """Write what waits, within SCREEN_END seconds."""
        lost = sum(reader.log.end - reader.offset
                   for _, _, readers in self._shown.values() for reader in readers)
        if lost:
            self.note("%d bytes of output were not shown, because nobody read them" % lost)
        self._writer.close(SCREEN_END)


class SystemdNotifier:
    """Tells systemd, at the socket in NOTIFY_SOCKET, when all templates are ready and when the
    manager stops; and that the loop turns, twice in WATCHDOG_USEC. See sd_notify(3)."""

    def __init__(self, environ):
        path = environ["NOTIFY_SOCKET"]
        self._address = "\0" + path[1:] if path[0] == "@" else path
        self._interval = 0.0                    # seconds
        if environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self._interval = int(environ.get("WATCHDOG_USEC", 0)) / 2e6

    def start(self, loop, manager):
        self._loop = loop
        manager.wait_until(lambda: manager.stopping or (
            not manager.not_ready() and self._send(b"READY=1")))
        manager.wait_until(lambda: manager.stopping and self._send(b"STOPPING=1"))
        if self._interval:
            self._watch()

    def _watch(self):
        self._send(b"WATCHDOG=1")
        self._loop.later(self._interval, self._watch)

    def _send(self, message):
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(message, socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            log.warning("systemd cannot be told %s: %s", message.decode(), error.strerror)
        return True


# --------------------------------------------------------------------------------------------------
# configuration
#
# Files that tell a server what to run: INI as gafferd had it, JSON, TOML if Python reads it, and
# Procfiles with their .env. A loader returns {kind: {name: {field: value}}}, FIELDS is the table of
# all fields, and read_settings() returns Settings, or raises one ConfigError with every fault.
# Configuration applies what has changed.
# --------------------------------------------------------------------------------------------------
INCLUDES_MAX = 1000                             # files that others include
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True,
            "false": False, "no": False, "off": False, "0": False}
PROCFILE_NAME = "Procfile"
CONFIG_PATH = re.compile(r"(?is).*\.(ini|json|toml|conf)")
PROCFILE_PATH = re.compile(r"(?is)(?:.*/)?(?:procfile[^/]*|[^/]*\.procfile)")
FIRST_PORT, PORTS_PER_TYPE = 5000, 100          # as in foreman
SHELL_WORDS = frozenset("""! . : [ [[ { } alias bg bind break builtin case cd command continue
    coproc declare do done echo elif else esac eval exec exit export false fc fg fi for function
    getopts hash if in jobs kill let local printf pwd read readonly return select set shift source
    test then time times trap true type typeset ulimit umask unalias unset until wait while
    """.split())                                # what a program can't do, or does in another way


def split_list(text):
    """Split a text at commas and white space."""
    return [word for word in re.split(r"[,\s]+", text) if word]


def number_or_text(text):
    """Return a text as a number if it is one, else as it is."""
    if re.fullmatch("[+-]?[0-9]{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[0-9]{1,18}\.[0-9]{0,18}|\.[0-9]{1,18}", text) else text


def env_from_words(words):
    """Return {name: value} of "A=1" and "A"; the latter is gaffer's own variable, as in docker."""
    pairs = [word.partition("=") for word in words]
    return {name: value if equals else os.environ[name]
            for name, equals, value in pairs if equals or name in os.environ}


def from_text(field, text):
    """Return the value of a field as INI and the command line write it; None: it is left out.

    What is not one stays a text, which the field's check refuses. ValueError: a quote is not
    closed, or there are too many words.
    """
    words = split_list(text)
    if field in OPTIONS and isinstance(OPTIONS[field].default, bool):
        return BOOLEANS.get(text.lower(), text)
    if field in ("redirect_output", "custom_streams", "after"):
        return words
    if text == "" and field != "cmd":
        return None
    if field in ("env", "env_file"):
        words = split_words(text, ",")
        return env_from_words(words) if field == "env" else words
    if field == "success" or field == "restart_delay" and len(words) > 1:
        return list(map(number_or_text, words))
    if field == "flapping":                     # in the order of FLAPPING, or attempts=2
        if len(words) > len(FLAPPING):
            raise ValueError("must have no more than " + ", ".join(FLAPPING))
        pairs = [word.rpartition("=") for word in words]
        return {name or known: number_or_text(value)
                for known, (name, _, value) in zip(FLAPPING, pairs)}
    if field == "limits" or field == "stop_signal" and "=" in text:
        found = []                              # nofile=64, core=0:unlimited; INT=5, TERM=5
        for name, _, value in [word.partition("=") for word in words]:
            values = list(map(number_or_text, value.split(":")))
            found.append([number_or_text(name), values if len(values) > 1 else values[0]])
        return dict(found) if field == "limits" else found
    if field == "ready":                        # log:TEXT, tcp:PORT, a URL, exec:COMMAND, notify
        text, within = re.fullmatch(r"(.*?)(?:\s+within=(\S+))?", text, re.S).groups()
        kind, _, value = text.partition(":")
        ready = {kind: {"notify": True, "http": text}.get(kind, value)}
        return dict(ready, within=number_or_text(within)) if within else ready
    if field in ("numprocesses", "priority", "graceful_timeout", "nice", "backlog", "stop_signal",
                 "restart_delay"):
        return number_or_text(text)
    return text


def to_text(field, value):
    """Return a value as from_text() reads it."""
    if field == "ready":
        return "%s within=%s" % (ready_text({field: value}), value["within"])
    if field in ("args", "env_file"):
        return shlex.join(value)
    if isinstance(value, dict):
        value = [[name, ":".join(map(str, each)) if isinstance(each, list) else each]
                 for name, each in value.items()]
    if isinstance(value, list):
        return " ".join("%s=%s" % tuple(each) if isinstance(each, list) else str(each)
                        for each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def event_pattern(text):
    """Return a pattern as Manager.subscribe() takes it; gafferctl wrote "proc.web.exit"."""
    if "/" in text or not text.startswith("proc."):
        return "" if text in (".", "all") else text
    name, _, kind = text[5:].rpartition(".")
    return "proc/%s/%s" % (name, kind) if name and kind in EVENT_TYPES else "proc/" + text[5:]


def check_words(value):
    """Check a list of strings, or one string that is split at commas and white space."""
    words = split_list(value) if isinstance(value, str) else value
    if not isinstance(words, list):
        raise ValueError("must be a list of strings, or a string")
    return [check_text(word, "a list of strings, or a string") for word in words]


FIELDS = {
    "gaffer": {
        "http_endpoints": Option(None, check_words, "names of the endpoints to listen on"),
        "include": Option([], check_words, "further files; * and ? match several"),
        "include_dir": Option([], check_words, "folders whose *.ini files are read")},
    "endpoint": {
        "bind": Option(None, check_text, "host:port, [v6]:port or unix:/path"),
        "backlog": Option(BACKLOG, whole_number(1, 65535), "connections that wait to be accepted"),
        "certfile": Option(None, check_text, "certificate for TLS (PEM)"),
        "keyfile": Option(None, check_text, "its key (PEM)")},
    "process": OPTIONS, "env": {}, "webhooks": {}}      # the last two hold names of the user's own
NAMED_KINDS = ("endpoint", "process", "env")


class ConfigError(InvalidProcessInfo):
    """Configuration files have faults: a line each, with file, line and section."""


class ConfigFile:
    """A configuration file: its text, and its faults, (line, text).

    `lines`: {(section, field or None): line}, where a loader has found them; `renamed`: {section:
    (section, {field: field})}, what they are called there. ConfigError: it cannot be read.
    """

    def __init__(self, path):
        self.path, self.folder = path, os.path.dirname(os.path.abspath(path))
        self.faults, self.lines, self.renamed = set(), {}, {}
        try:
            self.text = read_text(path)
        except ValueError as error:
            raise ConfigError("%s: %s" % (path, error)) from None

    def join(self, path):
        """Return a path of the file as seen from its folder."""
        return os.path.join(self.folder, path)

    def fault(self, reason, section="", line=None):
        """Note what is wrong, with its line: that of the field which the reason begins with."""
        section, names = self.renamed.get(section, (section, {}))
        match = re.match(r"(?:unknown )?field '(.*?)'", reason)
        field = match and names.get(match.group(1), match.group(1))
        if match:
            reason = reason.replace("'%s'" % match.group(1), "'%s'" % field, 1)
        line = (line or self.lines.get((section, field)) or self.lines.get((section, None))
                or self._find_line(section, None if "is required" in reason else field))
        where = "[%s] " % section if section else ""
        self.faults.add((line, "%s:%d: %s%s" % (self.path, line, where, reason)))

    def note(self, section, faults):
        """Note the faults of a section's fields, [(field, sentence)]."""
        for _, sentence in faults:
            self.fault(sentence, section)

    @contextlib.contextmanager
    def noting(self, section="", subject="", line=None):
        """Note an exception as a fault of `subject`, such as "field 'x' ", and go on."""
        try:
            yield
        except (ValueError, GafferError, StartError) as error:
            self.fault(subject + str(error), section, line)

    def _find_line(self, section, field):
        """Return the line of a section or its field in JSON or TOML, whose parsers do not tell."""
        start = place = 0
        for word in filter(None, [*section.split(":", 1), field]):
            # also of "name": "x", which may stand behind other fields of the object
            key = r"(?:{[^{}]*\"name\"\s*:\s*|^\s*|[\[{,.:]\s*)([\"']?%s[\"']?\s*[]}:.=,])"
            found = re.compile(key % re.escape(word), re.M).search(self.text, start)
            if found:
                start, place = found.start() + 1, found.start(1)
        return self.text.count("\n", 0, place) + 1


INI_LINE = re.compile(r"\[(?P<section>[^]]+)\](\s*[;#].*)?|"
                      r"(?P<field>[^=]*[^=\s])\s*=\s*(?P<value>.*)")


def read_ini(file, comment=r"^\s*[#;].*"):
    """Return {section: {field: text}} of an INI file. An indented line continues the value above
    it. `comment`: the pattern of comments."""
    sections, section, value, depth = {}, "", None, 0
    for number, line in enumerate(file.text.split("\n"), 1):
        line = re.sub(comment, "", line)
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            continue
        if value is not None and indent > depth:
            value.append(text)
            continue
        match, depth, value = INI_LINE.fullmatch(text), indent, []
        field = match and match["field"]
        if match and match["section"]:
            section, value = re.sub(r"\s*:\s*", ":", match["section"].strip()), None
            sections.setdefault(section, {})
        elif match and section:
            value = [match["value"]]
            sections[section].setdefault(field, value)
        else:
            file.fault("'%s' is neither [section] nor 'name = value' in a section"
                       % text.partition("=")[0].rstrip(), line=number)
            continue
        if file.lines.setdefault((section, field), number) != number:
            file.fault("'%s' is there twice" % text.partition("=")[0].rstrip(), section, number)
    return {section: {field: "\n".join(lines) for field, lines in fields.items()}
            for section, fields in sections.items()}


def load_ini(file, sections):
    """Load the sections of an INI file, whose values are texts."""
    tree = {}
    for section, fields in sections.items():
        kind, _, name = section.partition(":")
        made = tree.setdefault(kind, {})[name] = {}
        for field, value in fields.items():
            with file.noting(section, "field '%s' " % field):
                value = from_text(field, value) if FIELDS.get(kind) else value
                if value is not None:
                    made[field] = value
    return tree


SUPERVISORD = re.compile(r"(?m)^\[(supervisord\]|program:)")
PROGRAM_FIELDS = {                              # what supervisord calls the fields of a template
    "cmd": "command", "cwd": "directory", "uid": "user", "start": "autostart", "umask": "umask",
    "success": "exitcodes", "stop_signal": "stopsignal", "graceful_timeout": "stopwaitsecs",
    "stop_group": "stopasgroup", "priority": "priority", "env": "environment"}
PROGRAM_DEFAULTS = {                            # where they are not those of a template
    "autorestart": "unexpected", "killasgroup": "", "numprocs": "1", "numprocs_start": "0",
    "priority": "999", "process_name": "%(program_name)s", "redirect_stderr": "false",
    "startretries": "3", "startsecs": "1", "stopasgroup": "false"}
AUTORESTART = {"unexpected": "on-failure", **{
    word: "always" if flag else "never" for word, flag in BOOLEANS.items()}}
PROGRAM_CHECKS = {
    "autorestart": choice(*AUTORESTART), "redirect_stderr": choice(*BOOLEANS),
    "numprocs": matching("0*([0-9]{1,3}|1000)", "a whole number from 0 to 1000"),
    **dict.fromkeys(("numprocs_start", "startretries", "startsecs"), matching(
        "0*[0-9]{1,6}", "a whole number from 0 to 999999"))}
ADVICE = {                                      # what supervisord has: what to do instead
    r".* (stdout|stderr)_.*": "output is kept in memory: 'gaffer.py logs' reads it; to have it in "
                              "a file, redirect it in the command",
    r"supervisord|supervisorctl|rpcinterface:.*|.*_http_server":
        "these are options of 'serve': --bind, --token-file, --log-file, --pidfile, --daemon",
    r"eventlistener:.*": "events are sent by [webhooks] of an INI file, or read by GET /watch",
    r".*": "there is nothing like it: leave it out"}


def fill_in(text, names):
    """Return a text of supervisord's file with its %(x)s filled in. Raise ValueError."""
    try:
        return text % names
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("has a %%(...)s that stands for nothing: %s" % error) from None


def translate_program(file, name, fields, names, group):
    """Yield (name, {field: text}) of a template for each process of supervisord's [program:name].
    `names`: what %(x)s stands for; %(process_num)d may be anywhere. `group`: None if it has none.
    """
    section, names = "program:" + name, dict(names, program_name=name, group_name=group or name)

    def read(field):
        """Return a field's text; None, and a fault, if it is wrong."""
        with file.noting(section, "field '%s' " % field):
            text = fill_in(fields[field], names)
            return PROGRAM_CHECKS[field](text.lower()) if field in PROGRAM_CHECKS else text
    first, number = int(read("numprocs_start") or 0), int(read("numprocs") or 0)
    for process in range(first, first + number):
        names.update(process_num=process, numprocs=number)
        env = None
        with file.noting(section, "field 'environment' "):
            env = from_text("env", read("environment") or "")
        if env is None:                         # others may refer to it
            names = collections.defaultdict(str, names)
        names.update(("ENV_" + variable, value) for variable, value in (env or {}).items())
        info = {field: read(name) for field, name in PROGRAM_FIELDS.items() if name in fields}
        if env is None or None in info.values():        # the others are checked, it is not tried
            known = {field: text for field, text in info.items() if text is not None}
            info = {"cmd": "?", **known, "start": "false"}
        info["restart"] = AUTORESTART.get(read("autorestart"), "")
        if "cmd" in info:
            info["cmd"] = info["cmd"].replace("$", "$$")
        if BOOLEANS.get(read("redirect_stderr")):
            info["redirect_output"] = "stdout, stdout"
        retries = min(max(1, int(read("startretries") or 0)), 999)
        lived = int(read("startsecs") or 0)     # one that lives longer may exit forever
        if lived:
            info.update(restart_delay="1", flapping="attempts=%d max_retry=0 window=%.1f" % (
                retries + 1, retries * (lived + 1)))
        if group or number > 1:
            yield "%s:%s" % (group or name, read("process_name") or process), info
        else:
            yield name, info


def translate(file, shared, groups):
    """Return the sections that load_ini() takes for those of supervisord's file, or of one that it
    includes. What has no counterpart is logged once.

    To be filled in: `shared`, its section [supervisord], and `groups`, {program: (file, section)}
    of programs that are not loaded yet.
    """
    sections, found, others = read_ini(file, r"(^|\s)[;#].*"), {}, collections.defaultdict(list)
    shared.update(sections.get("supervisord", {}))
    names = {"ENV_" + name: value for name, value in os.environ.items()}
    names.update(here=file.folder, host_node_name=socket.gethostname())
    known = {"program": {*PROGRAM_FIELDS.values(), *PROGRAM_DEFAULTS}, "include": {"files"},
             "group": {"programs"}}
    # groups come first, as they name their programs
    for section, fields in sorted(sections.items(), key=lambda item: item[0][:6] != "group:"):
        kind, _, name = section.partition(":")
        for what in [section] if kind not in known else [
                "%s %s" % (section, field) for field in fields if field not in known[kind]]:
            others[next(advice for pattern, advice in ADVICE.items()
                        if re.fullmatch(pattern, what))].append(what)
        if kind == "group":
            for program in split_list(fields.get("programs", "")):
                _, other = groups.setdefault(program, (file, section))
                if other != section:
                    file.fault("field 'programs': %s is in [%s] too" % (program, other), section)
        elif kind == "include":
            file.renamed["gaffer"] = section, {"include": "files"}
            with file.noting(section, "field 'files' "):
                found["gaffer"] = {"include": fill_in(fields.get("files", ""), names)}
        elif kind == "program":
            env = re.sub(QUOTED.pattern + r"|\s*=\s*", lambda match: match.group().strip(),
                         "%s,\n%s" % (shared.get("environment", ""), fields.get("environment", "")))
            _, group = groups.pop(name, (file, ":"))
            fields = {**PROGRAM_DEFAULTS, "directory": os.getcwd(), "user": shared.get("user", ""),
                      **fields, "environment": env}
            for key, info in translate_program(file, name, fields, names, group.partition(":")[2]):
                if "process:" + key in found:
                    file.fault("field 'process_name' must have %%(process_num)d in it, or be "
                               "another: there is a %s already" % key, section)
                found["process:" + key] = info
                file.renamed["process:" + key] = section, PROGRAM_FIELDS
    for advice, whats in others.items():
        log.warning("%s: not taken: %s; %s", file.path, ", ".join(whats), advice)
    return found


def load_objects(file):
    """Load JSON or TOML: an object of sections, a template, or a list of templates."""
    def unique(pairs):
        for name, count in collections.Counter(name for name, _ in pairs).items():
            if count > 1:                       # json itself would take the last one
                file.fault("'%s' is there twice in one object" % name)
        return dict(pairs)
    try:
        if file.path.lower().endswith(".toml"):
            import importlib
            data = importlib.import_module("tomllib").loads(file.text)
        else:
            data = json.loads(file.text, object_pairs_hook=unique)
    except ImportError:
        file.fault("Python %d.%d reads no TOML: use 3.11, INI or JSON" % sys.version_info[:2])
        return {}
    except (ValueError, RecursionError) as error:
        found = re.search(r"line (\d+)", str(error))
        file.fault("cannot be parsed: %s" % error, line=int(found.group(1)) if found else 1)
        return {}
    if isinstance(data, dict) and "cmd" not in data:
        return {kind: value if kind in NAMED_KINDS and isinstance(value, dict) else {"": value}
                for kind, value in data.items()}
    tree = {}
    for item in data if isinstance(data, list) else [data]:
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or tree.setdefault(name, item) is not item:
            file.fault("must be sections, a template, or a list of templates with different names")
    return {"process": tree}


def command_fields(command):
    """Return the fields cmd and shell for a command of a Procfile.

    A simple command is executed directly. Of another, the last part takes the place of the shell
    if that means the same, so that a signal reaches the program and not a shell.
    """
    def hide(match):                            # quotes hide operators, double ones no variables
        part = match.group()
        variables = part[0] != "'" and re.search("[$`]", part)
        return ("#" if part[0] == "#" else "$" if variables else "_") * len(part)
    bare = re.sub(QUOTED.pattern + r"|\$\(\(?[^()'\"]*\)?\)|(?<!\S)#.*", hide, command, flags=re.S)
    last = max([0, *(match.end() for match in re.finditer(r";|&&|\|\|", bare))])
    before = re.compile(r"\s*((?:[A-Za-z_]\w*=\S*\s+)*)(exec\s+)?").match(bare, last)
    start = before.end()
    program = re.compile(r"\S*").match(bare, start).group()
    if program in SHELL_WORDS or not re.fullmatch(r"[\w@%+:,./][\w@%+:,./-]*", program):
        return {"cmd": command, "shell": True}
    if last == 0 and not before.group(1) and re.fullmatch(r"[\w@%+=:,./ \t-]+", bare[start:]) and (
            "$" not in command):                # gaffer fills in variables in single quotes, too
        return {"cmd": command[start:], "shell": False}
    others = re.sub(r"&&|\|\||[<>]&", "", bare)
    if not before.group(2) and not re.search(r"[|&()`]|\btrap\b", others):
        command = "%sexec %s" % (command[:start], command[start:])
    return {"cmd": command, "shell": True}


def free_port(port, taken, size=PORTS_PER_TYPE):
    """Return `port`, or the first above it by hundreds, so that none of `size` is in `taken`."""
    while any(port <= other < port + size for other in taken):
        port += PORTS_PER_TYPE
    return port


class Procfile(ConfigFile):
    """A Procfile, lines of 'type: command', with the environment of its processes.

    `types`: {type: command}; `fields`: {type: {field: value}}, from the comments above a type that
    begin with "gaffer:" and hold words such as after=db. `path`: None for a file without a type
    in this folder. `env_files`: read instead of .env in its folder. `port`: PORT of the first type
    (that of .env or of gaffer, else None, which is 5000); each further type has a hundred more.
    """

    def __init__(self, path, env_files=(), port=None):
        super().__init__(path or os.devnull)
        self.folder = self.folder if path else os.getcwd()
        self.types, self.fields, self.env = {}, {}, {}
        default = self.join(".env")
        for name in env_files or filter(os.path.isfile, [default]):
            try:
                file = ConfigFile(name)
            except ConfigError as error:        # what needs the types alone goes on
                self.faults.add((0, str(error)))
                continue
            values, faults = parse_env(file.text, {**os.environ, **self.env})
            self.env.update(values)
            for line, reason in faults:
                file.fault(reason, line=line)
            self.faults |= file.faults
        given = str(port if port is not None else self.env.get("PORT", os.environ.get("PORT", "")))
        known = re.fullmatch("[0-9]{1,5}", given) and 0 < int(given) < 65536
        self.port = int(given) if known else None
        if given and not known:
            self.faults.add((0, "PORT is '%s': give a number from 1 to 65535" % given[:40]))
        above, fields = {}, set(OPTIONS).difference(("name", "cmd", "args", "env"))
        for number, line in enumerate(self.text.split("\n"), 1):
            match = re.match(r"([A-Za-z0-9_-]+)[ \t]*:[ \t]*(\S.*?)[ \t\r]*\Z", line)
            comment = re.match(r"#[ \t]*gaffer:(.*)", line)
            if match and match.group(1) not in self.types:
                name, self.types[name] = match.groups()
                self.fields[name], above = above, {}
                self.lines["process:" + name, None] = number
            elif comment:
                with self.noting(subject="the comment ", line=number):
                    for word in split_words(comment.group(1)):
                        field, _, value = word.partition("=")
                        if field not in fields:
                            self.fault("%r is no field for a comment: write after=db or "
                                       "ready='tcp:80 within=9'%s" % (field, near(field, fields)),
                                       line=number)
                        elif from_text(field, value) is not None:
                            above[field] = from_text(field, value)
            elif re.match(r"\s*[^\s#]", line):
                self.fault("'%s' is there twice" % match.group(1) if match else
                           "%r is not 'type: command'" % line.rstrip(), line=number)


def load_procfile(file, taken):
    """Load a Procfile: a template for each type, each process of which has a PORT of its own that
    is not in the list `taken`. Add them to that."""
    tree, port = {}, file.port and free_port(file.port, taken, 1)
    for name, command in file.types.items():
        if tree or port is None:
            port = free_port(port + PORTS_PER_TYPE if tree else FIRST_PORT, taken)
        taken += [port, port + PORTS_PER_TYPE - 1]
        env = dict(file.env, PORT=str(port), GAFFER_PORT_STEP="1")
        tree[name] = {**command_fields(command), "cwd": file.folder, "env": env,
                      **file.fields[name]}
    if not tree and not file.faults:
        file.fault("there is no line 'type: command' in it")
    return {"process": tree}


def raise_faults(files):
    """Raise one ConfigError with the faults of files, if they have any."""
    faults = [text for file in files for _, text in sorted(file.faults)]
    if faults:
        raise ConfigError("\n".join(faults))


def make_template(file, name, fields, env_file, env):
    """Return the template of [process:name]. `env`: [env:name], which is in `env_file`."""
    section, info = "process:" + name, dict(fields, name=name)
    if fields.get("name", name) != name:
        file.fault("field 'name' is %r: leave it out" % (fields["name"],), section)
    if isinstance(info.get("env", {}), dict):
        with env_file.noting("env:" + name):
            info["env"] = {**info.get("env", {}), **check_env(env)}
    if isinstance(info.get("cwd") or "", str):
        info["cwd"] = file.join(info["cwd"]) if info.get("cwd") else file.folder
    template, faults = examine_template(info)
    template["env_file"] = list(map(file.join, template["env_file"]))
    file.note(section, faults)
    with file.noting(section):
        if template["start"] and not faults:
            Launch(template)
    return template


# [HttpEndpoint], {name: template}, [(pattern, URL)]
Settings = collections.namedtuple("Settings", "endpoints templates webhooks")


def read_settings(source, taken=None):
    """Read a path or a Procfile, and what it includes. Return Settings.

    `taken`: ports that gaffer listens on, if they are not those of the files. Raise ConfigError
    with every fault of all files.
    """
    import glob
    files, found, shared, groups = [], {kind: {} for kind in FIELDS}, {}, {}

    def load(source):
        """Add what a file holds; a Procfile waits until all endpoints are known."""
        file = source
        if isinstance(source, str):
            file = (Procfile if PROCFILE_PATH.fullmatch(source) else ConfigFile)(source)
        files.append(file)
        if isinstance(file, Procfile):
            return
        if re.search(r"(?i)\.(json|toml)$", file.path):
            add(file, load_objects(file))
        elif any(SUPERVISORD.search(each.text) for each in (files[0], file)):
            add(file, load_ini(file, translate(file, shared, groups)))
        else:
            add(file, load_ini(file, read_ini(file)))

    def add(file, tree):
        """Add the sections of a file to `found`, as (file, its fields)."""
        for kind, name in [(kind, name) for kind, sections in tree.items() for name in sections]:
            section, fields = "%s:%s" % (kind, name) if name else kind, tree[kind][name]
            if kind in FIELDS and not isinstance(fields, dict):
                file.fault("must be an object", section)
            elif kind not in FIELDS or bool(name) != (kind in NAMED_KINDS):
                file.fault("there is no section with this name; there are %s" % ", ".join(
                    each + ":NAME" if each in NAMED_KINDS else each for each in FIELDS), section)
            elif name in found[kind]:
                file.fault("this section is in %s too" % found[kind][name][0].path, section)
            else:
                found[kind][name] = file, fields
    load(source)
    main, fields = found["gaffer"].get("", (files[0], {}))
    gaffer, faults = examine_fields(fields, FIELDS["gaffer"])
    main.note("gaffer", faults)
    paths = []
    for pattern in map(main.join, gaffer["include"]):
        names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        paths += [("include", name) for name in names]
    for root in map(main.join, gaffer["include_dir"]):
        if not os.path.isdir(root):
            main.fault("field 'include_dir' names %r, which is not a folder" % root, "gaffer")
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            paths += [("include_dir", os.path.join(folder, name)) for name in sorted(names)
                      if name.endswith(".ini") and name[0] != "."]
    read = {os.path.realpath(main.path)}
    for field, path in paths:
        with main.noting("gaffer", "field '%s': " % field):
            if os.path.realpath(path) in read:
                raise ValueError("%s is included already" % path)
            if len(read) >= INCLUDES_MAX:
                raise ValueError("%s is one of more than %d files" % (path, INCLUDES_MAX))
            read.add(os.path.realpath(path))
            load(path)
    for name, (file, section) in groups.items():
        file.fault("field 'programs': [program:%s] is not in this file or a later one, or it has a "
                   "group" % name, section)
    endpoints = {}
    for name, (file, fields) in found["endpoint"].items():
        section, endpoints[name] = "endpoint:" + name, None
        values, faults = examine_fields(fields, FIELDS["endpoint"], ("bind",))
        file.note(section, faults)
        for field in ("certfile", "keyfile"):
            values[field] = values[field] and file.join(values[field])
        with file.noting(section, "field 'bind': "):
            if not faults:
                if values["bind"].startswith("unix:"):
                    values["bind"] = "unix:" + file.join(values["bind"][5:])
                endpoints[name] = HttpEndpoint(**values)
    if taken is None:
        taken = [endpoint.port for endpoint in [*endpoints.values()] or [HttpEndpoint()]
                 if endpoint and not endpoint.path]
    taken = list(taken)
    for file in files:
        if isinstance(file, Procfile):
            add(file, load_procfile(file, taken))
    chosen = list(endpoints) if gaffer["http_endpoints"] is None else gaffer["http_endpoints"]
    for name in chosen:
        if name not in endpoints:
            main.fault("field 'http_endpoints': there is no [endpoint:%s]%s" % (
                name, near(name, endpoints)), "gaffer")
    file, fields = found["webhooks"].get("", (main, {}))
    hooks = []
    for key, value in fields.items():
        with file.noting("webhooks", "field '%s': " % key):
            parse_pattern(event_pattern(key).split("/"))
            for url in check_words(value):
                check_hook_url(url)
                hooks.append((event_pattern(key), url))
    for name, (file, _) in found["env"].items():
        if name not in found["process"]:
            file.fault("there is no [process:%s]%s" % (name, near(name, found["process"])),
                       "env:" + name)
    templates = {name: make_template(file, name, fields, *found["env"].get(name, (file, {})))
                 for name, (file, fields) in found["process"].items()}
    for name, (file, _) in found["process"].items():
        circle = find_circle(name, lambda each: templates.get(each, {"after": ()})["after"])
        if circle:
            file.fault("field 'after' makes a circle: %s" % " after ".join(circle),
                       "process:" + name)
    raise_faults(files)
    return Settings([endpoints[name] for name in chosen], templates, hooks)


def outcome_lines(outcome, would=""):
    """Return what a reload did, a line each; `would`: "would be " for a dry run."""
    failed, lines = outcome["failed"], []
    for done in ("added", "changed", "removed", "kept"):
        for name in outcome[done]:
            fields = " (%s)" % ", ".join(outcome[done][name]) if done == "changed" else ""
            if name not in failed:
                lines.append("%s: %s%s%s" % (name, would, done, fields))
    lines += ["webhooks: %schanged" % would] if outcome["webhooks"] else []
    lines += ["%s: changed; restart gaffer to apply it" % what for what in outcome["needs_restart"]]
    return lines + ["%s: failed, %s" % failure for failure in failed.items()]


class Configuration:
    """What a server was started with and can load again.

    `read()` returns Settings, or raises ConfigError. `hooks`: the WebHooks that follow it, or None.
    """

    def __init__(self, read, hooks=None):
        self._read, self._hooks = read, hooks
        self._lock = threading.Lock()           # one reload at a time
        self.settings = read()
        self._endpoints = list(map(vars, self.settings.endpoints))

    def begin(self, manager):
        """Give a manager what to run."""
        manager.configuration = self
        for template in self.settings.templates.values():
            manager.add_process(template)

    def reload(self, manager, dry_run=False):
        """Read it again, and change what has changed; with `dry_run` only report it.

        Return {"ok", "added": [name], "changed": {name: [field]}, "removed": [name], "kept":
        [name], "failed": {name: reason}, "webhooks": whether they changed, "needs_restart": [what
        a running server can't change]}. Raise ConfigError, and change nothing, if it has faults.
        """
        with self._lock:
            settings, present = self._read(), dict(manager.templates)
            before, after = self.settings.templates, settings.templates
            differing = {}                      # from the files before, not from what is by hand
            for name in [name for name in after if name in present]:
                info = before.get(name) or present[name].info
                differing[name] = [field for field in OPTIONS if info[field] != after[name][field]]
            changed = {name: fields for name, fields in differing.items() if fields}
            outcome = {
                "ok": True, "failed": {}, "changed": changed,
                "added": sorted((name for name in after if name not in present),
                                key=lambda name: priority_of(after[name])),
                "removed": [name for name in before if name not in after and name in present],
                "kept": [name for name, fields in differing.items() if not fields],
                "webhooks": self.settings.webhooks != settings.webhooks, "needs_restart": []}
            if list(map(vars, settings.endpoints)) != self._endpoints:
                outcome["needs_restart"].append("endpoints")
            if dry_run:
                return outcome
            # what others are after goes first, or old and new ones could make a circle
            order = sorted(changed, key=stop_stages(after).get, reverse=True)
            for name in [*outcome["removed"], *order, *outcome["added"]]:
                try:                            # the system may refuse what the file may ask for
                    if name not in after:
                        manager.delete_process(name)
                    elif name not in changed:
                        manager.add_process(after[name])
                    else:
                        template, fields = manager.find_template(name), changed[name]
                        info = dict(template.info, **{field: after[name][field]
                                                      for field in fields})
                        if "start" not in fields:       # what was stopped by hand stays so
                            del info["start"]
                            if template.gave_up and not set(fields) <= set(ADJUSTABLE):
                                info["start"] = True
                        manager.update_process(name, info)
                except GafferError as error:
                    outcome["failed"][name], outcome["ok"] = str(error), False
                    # or the next time it would not be seen to have changed
                    after[name] = before.get(name, after.get(name))
            self.settings = settings
            if outcome["webhooks"]:
                self._hooks.replace(settings.webhooks)
        log.warning("the configuration was loaded again: %s", "; ".join(
            outcome_lines(dict(outcome, kept=[]))) or "nothing has changed")
        return outcome


# --------------------------------------------------------------------------------------------------
# command line
#
# COMMANDS is the one table: the parser, --help, the README and the completions come from it. A
# command is a function of its arguments. What it cannot do it raises, and main() prints that as one
# sentence on stderr. It returns the exit status; None: that of what it has reported, or 0.
# --------------------------------------------------------------------------------------------------
WINDOW_SIZE_MAX = 1024 * MIB
STATUS_INTERVAL = 1.0                           # of status -w
REQUESTS_MAX = 100                              # of one command at a time
RETRY_PAUSE = 0.2                               # before a server, or a full pipe, is tried again
FOLDER_SOCKET = ".gaffer.sock"                  # where `up` serves its API, in its folder


def read_token(path):
    """Return the token of a private file, or of GAFFER_TOKEN, or None. StartError."""
    token, place = os.environ.get("GAFFER_TOKEN"), "GAFFER_TOKEN"
    if path is not None:
        place = "the token file '%s'" % path
        try:
            token = read_text(path)
        except ValueError as error:
            raise StartError("%s %s" % (place, error)) from None
        if os.stat(path).st_mode & 0o044:
            raise StartError("%s can be read by others: chmod 600 it" % place)
    elif not token:
        return None
    token = token.strip()                       # a header would lose blanks at its ends
    if not token or "\n" in token:
        raise StartError("%s must hold one line, the token" % place)
    return token


def find_endpoint():
    """Return GAFFER_ENDPOINT, or the socket of the `up` that runs in this folder, or the default.

    Another user's socket is not trusted, because it would be sent the token.
    """
    if os.environ.get("GAFFER_ENDPOINT"):
        return os.environ["GAFFER_ENDPOINT"]
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        if os.stat(FOLDER_SOCKET).st_uid == os.geteuid():
            sock.settimeout(CLIENT_TIME)
            sock.connect(FOLDER_SOCKET)
            return "unix:" + FOLDER_SOCKET
    return DEFAULT_ENDPOINT


def connect(args):
    """Return a Client for the server that the arguments, the environment or the folder name."""
    return Client(args.endpoint or find_endpoint(), read_token(args.token_file), args.cacert)


def note(text):
    """Print each line of a message to stderr."""
    for line in text.splitlines():
        print("gaffer: %s" % line, file=sys.stderr, flush=True)


def report(args, error, word=""):
    """Print why one of several names failed; `word`: that name. The command goes on, and ends with
    the exit status of the first such error. Raise what would fail for all the others too."""
    if isinstance(error, NoServer) or error.code == "unauthorized":
        raise error
    named = not word or "'%s'" % word in str(error)
    note(str(error) if named else "%s: %s" % (word, error))
    args.exit_status = args.exit_status or error.exit_status


def show(args, answer, text):
    """Print what the server answered (bytes) with --json, else `text`."""
    text = answer.decode("utf-8").rstrip("\n") if args.json else text
    if text:
        print(text, flush=True)


# names

# what a word stands for: a template, or one of its processes (an entry of its status)
Target = collections.namedtuple("Target", "word path status process")


def get_statuses(client):
    """Return {name: status} of all templates, with their processes, by one request."""
    return {status["name"]: status for status in client.get("/status?usage=true")}


def process_name(status, process):
    """Return what people call a process: web.2."""
    return "%s.%d" % (status["name"], process["instance"])


def find_targets(args, statuses, words, processes=False):
    """Return the Targets of names, globs and `all`; with `processes`, also of single processes:
    web.2, gaffer's pid, or the system's. A name comes first, then in this order. A word that stands
    for nothing is reported."""
    import fnmatch
    running = [(status, process) for status in statuses.values() for process in status["processes"]]
    known = {str(process["os_pid"]): (status, process) for status, process in running}
    known.update((str(process["pid"]), (status, process)) for status, process in running)
    known.update((process_name(*each), each) for each in running)
    found = {}
    for word in words:
        names = list(statuses) if word == "all" else fnmatch.filter(statuses, word)
        for name in names:
            path = "/processes/" + reference(name)
            found[path] = Target(name, path, statuses[name], None)
        if names or word == "all":
            continue
        if word not in known:
            report(args, NotThere("there is no process named '%s'%s" % (
                word, near(word, statuses) or "; 'gaffer.py status' lists them")))
        elif processes:
            path = "/processes/%d" % known[word][1]["pid"]
            found.setdefault(path, Target(word, path, *known[word]))
        else:
            report(args, ClientError("'%s' is a process, and not a name: give %s" % (
                word, known[word][0]["name"]), 2))
    return list(found.values())


def group_of(args):
    """Return the group of a Procfile's processes: as given, or the name of its folder."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(args.procfile)))
    name = args.group or re.sub(r"[^A-Za-z0-9_.@-]", "-", folder).lstrip("-") or "app"
    if not re.fullmatch(r"(?!-)[A-Za-z0-9_.@-]{1,64}", name):
        raise ClientError("'%s' is not a group: give 1 to 64 of A-Z a-z 0-9 _ . @ -" % name, 2)
    return name


def find_app(args, names):
    """Return {type: name} of the Procfile's templates in the server: those of its group, else those
    named as its types are, without a Procfile all; unload takes the group alone. NotThere."""
    prefix = group_of(args) + ":"
    found = {name[len(prefix):]: name for name in names if name.startswith(prefix)}
    if not found and not args.group and args.command != "unload":
        types = Procfile(args.procfile).types if os.path.exists(args.procfile) else names
        found = {name: name for name in names if name in types}
    if not found:
        raise NotThere("there is no group '%s': 'gaffer.py load' loads it" % prefix[:-1])
    return found


def choose_targets(args, statuses, processes=False):
    """Return the Targets that the arguments of a command name; see find_targets()."""
    if args.command in ("ps", "unload"):
        words = list(find_app(args, statuses).values())
    else:
        words = [args.name] if "name" in args else args.names or ["all"]
    return find_targets(args, statuses, words, processes)


def connect_to(args, processes=False):
    """Return (Client, the Targets that the arguments name)."""
    client = connect(args)
    return client, choose_targets(args, get_statuses(client), processes)


# commands that change something

def await_goal(args, client, names, goal=None):
    """Wait until each of the templates is "ready", "done" or "stopped"; goal None: ready, or done
    if it ends by itself and has no `ready`."""
    end, timeout = time.monotonic() + (args.timeout or 0), None
    for name in names:
        try:
            info = client.get("/processes/" + reference(name))
            wanted = goal or ("done" if ends_by_itself(info) else "ready")
            path = "/status/%s?until=%s" % (reference(name), wanted)
            if args.timeout is not None:
                left = max(0.0, end - time.monotonic())
                path, timeout = "%s&timeout=%.3f" % (path, left), CLIENT_TIME + left
            show(args, client.request("GET", path, None, timeout), "%s: %s" % (name, wanted))
        except ClientError as error:
            report(args, error)


def send_change(args, client, method, path, value=None):
    """Send a request that changes something. Return its answer (bytes), which comes when all is
    done, unless the arguments say otherwise. ClientError."""
    if args.no_wait or method == "GET":
        return client.request(method, path, value)
    if args.timeout is None:
        return client.request(method, path + "?wait=true", value, None)
    return client.request(method, "%s?wait=%.3f" % (path, args.timeout), value,
                          CLIENT_TIME + args.timeout)


def carry_out(args, client, steps):
    """Send all requests at once, and print what each has done when it is done. Return the names.
    `steps`: [(Target, request, what it does; "": it tells the number of processes)]; a request is
    a method and what follows the Target's path."""
    from concurrent.futures import ThreadPoolExecutor
    names = []

    def send(target, request):
        method, _, path = request.partition(" ")
        return send_change(args, client, method, target.path + path)
    with ThreadPoolExecutor(REQUESTS_MAX) as pool:
        answers = [pool.submit(send, target, request) for target, request, _ in steps]
        for (target, _, done), answer in zip(steps, answers):
            try:
                data = answer.result()
                if not done:
                    count = json.loads(data)["numprocesses"]
                    done = "%d process%s" % (count, "" if count == 1 else "es")
                show(args, data, "%s: %s" % (target.word, done))
                names.append(target.word)
            except ClientError as error:
                report(args, error, target.word if len(steps) > 1 else "")
    return names


CHANGES = {                                     # command: request, what it does; see carry_out()
    "start": ("POST /_start", "started"), "stop": ("POST /_stop", "stopped"),
    "restart": ("POST /_restart", "restarted"), "del_process": ("DELETE ", "deleted"),
    "add": ("POST /_add/{0.number}", ""), "sub": ("POST /_sub/{0.number}", ""),
    "unload": ("DELETE ", "unloaded"),
    "kill": ("POST /_signal/{0.sig}?group={0.group:d}", "signalled {0.sig}")}


def change(args):
    """Start, stop, restart, scale, signal or remove what is named."""
    verb, steps = args.command, []
    request, done = CHANGES[verb]
    until_ready = verb == "start" and args.ready
    args.no_wait = verb == "kill" or until_ready or args.no_wait
    client, targets = connect_to(args, verb in ("stop", "kill"))
    for target in targets:
        status, said = target.status, done.format(args)
        if verb == "kill" and not (target.process or status["running"] + status["stopping"]):
            report(args, ClientError("'%s' is not running" % target.word, 3))
            continue
        if verb == "stop" and target.process and status["active"]:
            said = "stopped, to be replaced"
        elif verb in ("start", "stop") and status["active"] == (verb == "start") and (
                status["state"] not in ("scheduled", "waiting")):
            said = "already " + status["state"]
        steps.append((target, request.format(args), said))
    names = carry_out(args, client, steps)
    if until_ready:
        await_goal(args, client, names)


def wait_command(args):
    """Wait until templates are ready, done or stopped."""
    client, targets = connect_to(args)
    await_goal(args, client, [target.word for target in targets], vars(args)["for"] or "ready")


def reload_command(args):
    """Make the server load its configuration again."""
    answer = connect(args).request("POST", "/_reload?dry_run=%d" % args.dry_run)
    outcome = json.loads(answer)
    show(args, answer, "\n".join(outcome_lines(outcome, "would be " if args.dry_run else "")))
    return 1 if outcome["failed"] else 0


# templates

def processes_command(args):
    """Print names, or pids."""
    answer = connect(args).request("GET", "/processes?running=%d" % args.running)
    show(args, answer, "\n".join(map(str, json.loads(answer))))


def show_field(args):
    """Print the field of each status that is called as the command is."""
    for target in connect_to(args)[1]:
        value = target.status[args.command]
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        text = text if args.names == [target.word] else "%s: %s" % (target.word, text)
        show(args, json_bytes(target.status), text)


def get_process_command(args):
    """Print templates."""
    client, targets = connect_to(args, True)
    for target in targets:
        answer = client.request("GET", target.path)
        show(args, answer, json.dumps(json.loads(answer), indent=4))


def given_words(args):
    """Return the words of the command that the arguments end with. ClientError: it begins as an
    option does."""
    if args.cmd[:1] == ["--"]:
        return args.cmd[1:]
    if args.cmd and args.cmd[0].startswith("-"):
        raise ClientError("the command begins with '%s': write '--' before such a command, and "
                          "options before NAME" % args.cmd[0], 2)
    return args.cmd


def given_fields(args):
    """Return the fields of a template that the arguments name. ClientError."""
    words = given_words(args)
    info = {"cmd": words[0], "args": words[1:]} if words else {}
    for field in OPTIONS:
        value = getattr(args, field, None)
        if isinstance(value, bool) and getattr(args, "no_" + field, False):
            info[field] = False
        if field in ("name", "cmd", "args") or not (value or value == ""):
            continue
        try:
            info[field] = (env_from_words(value) if field == "env" else
                           os.path.abspath(value) if field == "cwd" and value else
                           value if isinstance(value, bool) else from_text(field, value))
            if info[field] is None:             # it was given without a value
                info[field] = OPTIONS[field].default
            if field == "env_file":
                info[field] = list(map(os.path.abspath, info[field]))
        except ValueError as error:
            raise ClientError("--%s: field '%s' %s" % (
                field.replace("_", "-"), field, error), 2) from None
    return info


def send_new(args, info):
    """POST a new template."""
    info["start"] = args.start
    answer = connect(args).request("POST", "/processes", info)
    show(args, answer, "%s: added%s" % (info["name"], " and started" if args.start else ""))


def add_process_command(args):
    """Add the template that the arguments describe."""
    info = dict(given_fields(args), name=args.name)
    if "cmd" not in info:
        raise ClientError("say what to run: 'gaffer.py add_process NAME CMD ...'", 2)
    client = connect(args)
    if not args.replace or args.name not in client.get("/processes"):
        return send_new(args, info)
    answer = send_change(args, client, "PUT", "/processes/" + reference(args.name), info)
    done = "replaced" if json.loads(answer)["changed"] else "unchanged"
    show(args, answer, "%s: %s" % (args.name, done))


def load_process_command(args):
    """Add the template that a JSON file describes."""
    stdin = args.file == "-"
    try:
        info = json.loads(read_text(os.dup(0) if stdin else args.file))
        if not isinstance(info, dict) or "name" not in info:
            raise ValueError("must hold one JSON object, a template with name and cmd")
    except (ValueError, RecursionError) as error:
        raise ClientError("%s: %s" % ("stdin" if stdin else args.file, error)) from None
    send_new(args, info)


def update_process_command(args):
    """Change the given fields of a template, and leave the rest."""
    client, path, given = connect(args), "/processes/" + reference(args.name), given_fields(args)
    if not given:
        raise ClientError("say what to change: an option, or the command", 2)
    info = client.get(path)
    if "env" in given:
        given["env"] = dict(info["env"], **given["env"])
    del info["start"]                           # it runs, or not, as before
    if given.get("schedule"):
        del info["restart"]                     # never, unless it is given
    answer = send_change(args, client, "POST", path, dict(info, **given))
    show(args, answer, "%s: updated" % args.name)


# status

COLOURS = {word: code for code, words in (
    (32, "running done spawn start ready"), (31, "backoff flapping failed exit flap fail"),
    (33, "stopping starting waiting stop stop_pid reap")) for word in words.split()}


def span(seconds):
    """Return seconds as 8s, 1m02s, 3h12m or 2d04h."""
    number = int(seconds)
    if number < 60:
        return "%ds" % number
    if number < 3600:
        return "%dm%02ds" % divmod(number, 60)
    if number < 86400:
        return "%dh%02dm" % divmod(number // 60, 60)
    return "%dd%02dh" % divmod(number // 3600, 24)


def status_rows(status):
    """Return the rows of one template, [cells ..., note]: one for each process, and for each slot
    that waits for one; at least one."""
    rows, last, code, text = [], status["last_exit"], "-", None
    if last is not None:
        code = str(shell_status((last["exit_status"], last["term_signal"])))
        by = " (%s)" % signal_name(last["term_signal"]) if last["term_signal"] else ""
        again = ", %d times" % last["times"] if last["times"] > 1 else ""
        text = "exit " + code + by + again
    why = [each for each in (status["error"] or text, status["hint"]) if each]
    run = "%d/%d" % (status["running"], status["numprocesses"])
    past = [str(status["restarts"]), code]
    for process in sorted(status["processes"], key=lambda process: process["instance"]):
        notes, usage = [], ["-", "-"]
        if "kill_in" in process:
            notes = ["SIGKILL in " + span(process["kill_in"])]
        elif process["not_ready"]:
            notes = [process["not_ready"]]
        elif last and last["times"] > 1 and process["uptime"] < BACKOFF_RESET:
            notes = why
        if process.get("cpu") is not None:
            usage = ["%.1f%%" % process["cpu"], human(process["rss"])]
        rows.append([process_name(status, process), process["state"], run, str(process["os_pid"]),
                     str(process["pid"]), span(process["uptime"]), *past, *usage, "; ".join(notes)])
    waits = [["next try in " + span(math.ceil(wait)), *why] for wait in status["next_tries"]]
    if status["waiting"]:
        waits = [["waits for " + ", ".join(status["waiting"])]]
    elif status["state"] == "scheduled":
        wait = max(0.0, status["next_runs"][0] - time.time())
        waits = [["next run in " + span(math.ceil(wait)), *why]]
    elif not rows and not waits:
        waits = [["gave up", *why] if status["gave_up"] else
                 why if status["error"] or status["hint"] else []]
    return rows + [[status["name"], status["state"], run, "-", "-", "-", *past, "-", "-",
                    "; ".join(notes)] for notes in waits]


def status_table(statuses, width, coloured):
    """Return the lines of the table, failures first, and the summary. Names are cut where a line
    would be over `width`, if that is not 0."""
    if not statuses:
        return []
    order = {"backoff": 0, "flapping": 0, "failed": 0, "running": 2, "scheduled": 2, "stopped": 3,
             "done": 3}
    statuses = sorted(statuses, key=lambda status: 0 if status["gave_up"] or status["error"] else
                      order.get(status["state"], 1))
    rows = ["NAME STATE RUN PID ID UPTIME RESTARTS EXIT CPU MEM ".split(" ")]
    for status in statuses:
        rows += status_rows(status)
    os_pids, pids = [{pid for status in statuses for pid in status[kind]}
                     for kind in ("os_pids", "pids")]
    if os_pids.isdisjoint(pids):                # else they could be mixed up
        for row in rows:
            del row[4]
    widths, lines = [max(map(len, column)) for column in zip(*rows)], []
    if width:
        widths[0] = min(widths[0], max(8, width - sum(widths[1:-1]) - 2 * (len(widths) - 2)))
    for name, state, *numbers, note in rows:
        name = name if len(name) <= widths[0] else name[:widths[0] - 1] + "…"
        cells = [name.ljust(widths[0]), state.ljust(widths[1])]
        if coloured and state in COLOURS:
            cells[1] = colour(cells[1], COLOURS[state])
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:])]
        lines.append("  ".join([*cells, note]).rstrip())
    counts = collections.Counter(status["state"] for status in statuses)
    return lines + ["%d template%s: %s" % (
        len(statuses), "" if len(statuses) == 1 else "s",
        ", ".join("%d %s" % (count, state) for state, count in counts.most_common()))]


def wants_colour(args):
    """Return True if stdout is a terminal whose user wants colours (https://no-color.org)."""
    return not (args.no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
                or not sys.stdout.isatty())


def is_away(error):
    """Return True for a ClientError that passes when the server is back."""
    return (isinstance(error, NoServer) or error.exit_status == 124
            or error.code in ("stopping", "busy"))


def status_command(args):
    """Print the table; with -w each second, also while the server restarts. Return 3 if fewer
    processes run than are wanted, or none is there."""
    client, exit_status, width, height = connect(args), None, 0, 0
    while True:
        try:
            args.exit_status = 0
            statuses = [target.status for target in choose_targets(args, get_statuses(client))]
        except ClientError as error:            # what was shown stays until the server is back
            if exit_status is None or not is_away(error):
                raise
        else:
            if sys.stdout.isatty():
                width, height = os.get_terminal_size(sys.stdout.fileno())
            lines = list(map(encode_json, statuses)) if args.json else status_table(
                statuses, width, wants_colour(args))
            if args.watch and sys.stdout.isatty():
                hidden = len(lines) - height + 2
                if height and hidden > 1:
                    lines[-hidden - 1:-1] = [
                        "… %d more lines do not fit: name what to show" % hidden]
                # over what is there, each line cut by the terminal
                lines = ["\x1b[H\x1b[?7l\x1b[K" + "\n\x1b[K".join(lines) + "\x1b[J\x1b[?7h"]
            print("".join(line + "\n" for line in lines), end="", flush=True)
            if not (statuses or args.exit_status or args.watch):
                note("there is nothing yet: 'gaffer.py add_process' adds a template, "
                     "'gaffer.py load' a Procfile")
            well = statuses and all(status["state"] in ("running", "scheduled", "done") and (
                status["running"] >= status["numprocesses"] or status["state"] != "running")
                for status in statuses)
            exit_status = args.exit_status or (0 if well else 3)
        if not args.watch:
            return exit_status
        time.sleep(STATUS_INTERVAL)


# watch, logs

def follow_events(client, path):
    """Yield (type, data) of each event, also over restarts of the server. ClientError: it refuses,
    or is away at the start."""
    answer = client.request("GET", "/watch?since=0&timeout=0")      # an event tells which run it is
    epoch = json.loads(answer)["id"].partition("@")[2] if answer else None
    last = ""
    while True:
        try:
            for place, kind, data in client.events(path, last):
                if kind is None and not last:   # lost before its first event, it goes on from here
                    place = "%s@%s" % (data or 0, epoch) if epoch else "0"
                last = place or last
                if kind is not None:
                    yield kind, data
        except ClientError as error:
            if not last or not (is_away(error) or isinstance(error, NotThere)):
                raise
        time.sleep(RETRY_PAUSE)


def watch_command(args):
    """Print events as they happen."""
    coloured = wants_colour(args)
    path = "/".join(map(reference, event_pattern(args.pattern or "").split("/")))
    for kind, data in follow_events(connect(args), "/watch/%s?%s" % (path, FEED)):
        event = json.loads(data)
        if args.json:
            print(data, flush=True)
        elif kind == "dropped":
            note("the server has restarted" if event.get("restarted") else
                 "%d events were lost" % event["events"])
        else:
            text = event_text(event)
            text = colour(text, COLOURS.get(kind, 36)) if coloured else text
            print(time.strftime("%H:%M:%S", time.localtime(event["time"])), text, flush=True)


class JournalLine:
    """A line of GET /streams?returns=true. `open`: it has no end yet; `replaces`: the one before,
    as it came after \\r."""

    def __init__(self, line):
        when, self.name, pid, label, self.text = line.split(" ", 4)
        self.time, self.pid, self.label = float(when), int(pid), label.rstrip("+<")
        self.open, self.replaces = "+" in label, "<" in label
        self.stream = self.name, self.pid, self.label


def merge_lines(lines, count, names):
    """Return the last `count` lines of each stream, in order. Unfinished ones are joined; what a
    terminal would overwrite is left out. `names`: of processes, which a restart keeps."""
    found, last, counts, kept = [], {}, collections.Counter(), []
    for line in lines:
        before = last.get(line.stream)
        if before is None or not (before.open or line.replaces):
            last[line.stream] = line
            found.append(line)
        else:
            before.text = line.text if line.replaces else before.text + line.text
            before.open = line.open
    for line in reversed(found):
        stream = names[line.pid], line.label
        counts[stream] += 1
        if counts[stream] <= count:
            kept.append(line)
    return kept[::-1]


def logs_command(args):
    """Print output from the journal: what it holds by now, and with -f what comes. A line is
    `web.1 | text`; one that was printed unfinished is continued."""
    import fnmatch
    client, path, names = connect(args), "/streams", {}     # names: {pid: web.1}, see load_names()
    prefixer, last = Prefixer(wants_colour(args)), JournalLine("0 - 0 - ")

    def load_names():
        """Learn the names of processes. Return {name: status}, also with those that have ended."""
        statuses = get_statuses(client)
        for name, status in statuses.items():
            status["processes"][:0] = [{"pid": int(pid), "os_pid": int(pid), "instance": number}
                                       for pid, number in status["past"].items()]
            for process in status["processes"]:
                names[process["pid"]] = process_name(status, process)
            if status["numprocesses"] == 1:     # its earlier processes had the same name
                names[name] = name + ".1"
        return statuses

    def add_names(lines):
        new = {line.pid: line.name for line in lines if line.pid not in names}
        if new:
            with contextlib.suppress(ClientError):
                load_names()
        for pid, name in new.items():           # one that went long ago is asked for once
            names.setdefault(pid, names.get(name, name))

    def show(lines):
        nonlocal last
        for line in lines:                      # their names are a column of one width
            prefixer.prefix(names[line.pid])
        for line in lines:
            if args.json:
                print(encode_json({"time": line.time, "name": line.name, "pid": line.pid,
                                   "label": line.label, "data": line.text}))
                continue
            text, prefix, same = line.text, "", line.stream == last.stream
            if args.times:
                prefix = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(line.time))
            if not args.no_prefix:
                prefix += prefixer.prefix(names[line.pid]) + " "
            if same and line.replaces and sys.stdout.isatty():
                text = ("\r" if last.open else "\x1b[A") + "\x1b[K" + prefix + text
            elif not same or line.replaces or not last.open:
                text = ("\n" if last.open else "") + prefix + text
            print(text, end="" if line.open else "\n")
            last = line
        if last.open and not args.follow:
            print()
        sys.stdout.flush()
    targets = choose_targets(args, load_names(), True)
    if args.exit_status and not targets:
        return args.exit_status
    if len(targets) == 1 and [targets[0].word] == args.names:   # no glob: others may come later
        path += "/" + reference(targets[0].status["name"])
    # a pid is one process; web.2 is that and what replaces it
    pids = {target.process["pid"] for target in targets if target.word.isdigit()}
    only_pids = 0 < len(pids) == len(targets)
    words = {target.word for target in targets if target.process}
    globs = ["*" if word == "all" else word for word in args.names or ["all"]]

    def wanted(line):
        return line.label != "exit" and (
            line.pid in pids or names[line.pid] in words
            or any(fnmatch.fnmatchcase(line.name, glob) for glob in globs))
    end, offset = int(client.exchange("HEAD", path)[0]["Gaffer-Offset"]), 0
    lines, body, begin = [], b"-", "tail=all"
    while body and offset < end:                # one answer may not hold them all
        headers, body = client.exchange("GET", "%s?returns=true&timeout=0&%s" % (path, begin))
        lines += map(JournalLine, body.decode("utf-8", "replace").split("\n")[:-1])
        offset = int(headers["Gaffer-Offset"])
        begin = "since=%d" % offset
    since = 0 if args.since is None else time.time() - args.since
    count = args.n if args.n is not None else math.inf if since else 10
    add_names(lines)
    show(merge_lines([line for line in lines if wanted(line) and line.time >= since], count, names))
    pids -= {line.pid for line in lines if line.label == "exit"}
    if not args.follow or only_pids and not pids:
        return args.exit_status
    for kind, data in follow_events(client, "%s?returns=true&%s&since=%d" % (path, FEED, offset)):
        if kind == "dropped":
            if json.loads(data).get("restarted"):
                pids.clear()                    # they are those of others now
                names.clear()
            else:
                note("%d bytes were lost" % json.loads(data)["bytes"])
        else:
            line = JournalLine(data)
            add_names([line])
            if wanted(line):
                show([line])
            elif line.label == "exit":
                pids.discard(line.pid)
        if only_pids and not pids:
            return args.exit_status


# attach

def attach_command(args):
    """Show a process's output, send it what is typed, and pass signals on. Return its exit status,
    if it ends."""
    import termios
    from http.client import HTTPException
    client, targets = connect_to(args, True)
    if not targets:
        return args.exit_status
    status = targets[0].status
    found = [targets[0].process] if targets[0].process else status["processes"]
    names = [process_name(status, process) for process in found]
    if not names:
        raise ClientError("%s is not running: 'gaffer.py start' starts it" % args.name)
    if len(names) > 1:
        raise ClientError("%s runs %d processes: attach to one of %s" % (
            args.name, len(names), ", ".join(names)))
    pid, os_pid, streams = found[0]["pid"], found[0]["os_pid"], "/streams/%d/" % found[0]["pid"]
    info = client.get("/processes/%d" % pid)
    ends: list = []                             # the exit event, or what a thread raised

    def end(outcome):
        ends.append(outcome)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    threading.excepthook = lambda failure: end(failure.exc_value)

    def start(function, *args):
        thread = threading.Thread(target=function, args=args, daemon=True)
        thread.start()
        return thread

    def copy_output(label, fd):
        begin, offset = "tail=%d" % (10 if args.n is None else args.n), math.inf
        while True:
            path = streams + reference(label) + "?feed=continuous&" + begin
            with client.open("GET", path, timeout=None) as response:
                start = int(response.headers["Gaffer-Offset"])
                if start > offset:
                    note("%d bytes were lost" % (start - offset))
                offset = start
                while True:
                    try:
                        data = response.read1(READ_SIZE)
                    except (OSError, HTTPException):    # cut: we were slow, or the network is
                        break
                    if not data:
                        return
                    offset += len(data)
                    write_all(fd, data)
            begin = "since=%d" % offset

    def copy_input():
        data = os.read(0, READ_SIZE)
        while True:
            try:                                # nothing: end of file
                client.request("POST" if data else "DELETE", streams + "stdin", data or None)
                if not data:
                    return
                data = os.read(0, READ_SIZE)
            except ClientError as error:
                if error.code in ("forbidden_write", "not_found"):
                    return                      # it has closed its stdin, or exited
                if error.code != "stdin_full":
                    raise
                time.sleep(RETRY_PAUSE)         # as a full pipe would make us wait

    def watch_exit(copies):
        path = "/watch/proc/%s/exit?since=0&%s" % (reference(status["name"]), FEED)
        for kind, data in follow_events(client, path):
            event = json.loads(data)
            if event.get("restarted"):
                raise ClientError("the server has restarted: attach again")
            if kind == "exit" and event["pid"] == pid:
                for thread in copies:           # the rest of its group may still write
                    thread.join()
                return end(event)
    before = None
    if os.isatty(0):                            # Ctrl-] sends QUIT
        before, changed = termios.tcgetattr(0), termios.tcgetattr(0)
        changed[6][termios.VQUIT] = b"\x1d"
        termios.tcsetattr(0, termios.TCSADRAIN, changed)
    note("attached to %s, os pid %d: %s leaves it running, Ctrl-C goes to it%s" % (
        names[0], os_pid, "Ctrl-]" if before else "QUIT",
        "" if info["redirect_input"] else "; it reads nothing: its stdin is /dev/null"))
    # a handler would run in the main thread alone, and only once something else had woken that
    signals = {signal.SIGUSR1, *(signum for signum in (
        signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT)
        if signal.getsignal(signum) != signal.SIG_IGN)}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        start(watch_exit, [start(copy_output, *pair) for pair in zip(
            dict.fromkeys(info["redirect_output"]), (1, 2))])
        if info["redirect_input"]:
            start(copy_input)
        exit_status, outcome = None, "is still running"
        while exit_status is None:
            signum = signal.sigwait(signals)
            if ends and isinstance(ends[0], Exception):
                raise ends[0]
            if ends:
                exit_status = shell_status((ends[0]["exit_status"], ends[0]["term_signal"]))
                outcome = "has ended"
            elif signum == signal.SIGINT:       # to the whole group, as a terminal does
                with contextlib.suppress(NotThere):
                    client.request("POST", "/processes/%d/_signal/INT?group=true" % pid)
            elif signum == signal.SIGCONT:      # after Ctrl-Z and fg the shell's settings hold
                if before and os.tcgetpgrp(0) == os.getpgrp():
                    termios.tcsetattr(0, termios.TCSADRAIN, changed)
            else:
                exit_status = 0 if signum == signal.SIGQUIT else 128 + signum
    finally:
        if before:
            with contextlib.suppress(termios.error):        # the terminal is gone
                termios.tcsetattr(0, termios.TCSADRAIN, before)
    if exit_status != 128 + signal.SIGHUP:
        if sys.stderr.isatty():                 # the output may end within a line
            print(file=sys.stderr)
        note("detached, %s %s" % (names[0], outcome))
    return exit_status


# serve

class PidFile:
    """Keeps gaffer's pid in a locked file, so that only one gaffer uses it."""

    def __init__(self, path):
        self._path = path

    def start(self, loop, manager):
        with contextlib.ExitStack() as failure:
            try:
                while True:
                    self._file = failure.enter_context(
                        open(self._path, "a+", encoding="ascii", errors="replace"))
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_file_at(self._file.fileno(), self._path):
                        break
                    self._file.close()          # its last user has removed it meanwhile
                self._file.truncate(0)
                os.write(self._file.fileno(), b"%d\n" % os.getpid())
            except OSError as error:
                why = "cannot be written: %s" % (error.strerror or error)
                if isinstance(error, BlockingIOError):
                    self._file.seek(0)
                    why = "is in use by a running gaffer, pid %s: stop it, or use another file" % (
                        self._file.read(20).strip())
                raise StartError("the pid file '%s' %s" % (self._path, why)) from None
            failure.pop_all()

    def stop(self):
        with self._file:
            if is_file_at(self._file.fileno(), self._path):
                os.unlink(self._path)


class LogHandler(logging.Handler):
    """Logs to stderr, or to the file at `path`, and never waits for it. StartError.

    Lines that find no room, or cannot be written, are counted, and the next one is told how many.
    """

    def __init__(self, path=None):
        self._dropped = self._reported = 0
        self.writer = LogWriter(path, "log file", self._drop)
        super().__init__()                      # from now on, logging closes it at the exit

    def _drop(self, error_, data):
        with self.lock:
            self._dropped += data.count(b"\n")

    def emit(self, record):
        text = self.format(record)
        if "\n" in record.message:              # each of its lines is a line of the log
            text = text.replace("\n", "\n" + text[:text.index(record.message)])
        data = text.encode("utf-8", "backslashreplace") + b"\n"
        if self.writer.full:
            return self._drop(None, data)
        if self._dropped != self._reported:
            data = b"gaffer: %d lines of this log were dropped so far\n%s" % (self._dropped, data)
            self._reported = self._dropped
        self.writer.put(data)

    def close(self):
        self.writer.close(LOG_END)
        super().close()


def enter_background():
    """Go on as a process of its own, without a terminal. Return a pipe: the process that was
    started waits, so that it can print what is wrong, and ends well once that has "ok"."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read, "rb") as file:
            os._exit(0 if file.read() == b"ok" else 1)
    os.close(read)
    os.setsid()
    if os.fork():                               # not a session's leader: it gets no terminal
        os._exit(0)
    return write


def run_cached():
    """Go on in a new interpreter with the cached bytecode of this file, if it can be cached.

    A script stays in memory as the compiler's syntax tree, 12 MiB, for as long as it runs.
    """
    if __name__ != "__main__" or __spec__ is not None:
        return                                  # imported, or run by -m, or here already
    from importlib import machinery, util
    machinery.SourceFileLoader("gaffer", __file__).get_code("gaffer")   # writes it if need be
    if not os.path.exists(util.cache_from_source(__file__)):
        return
    code = ("import sys; '' in sys.path and sys.path.remove(''); del sys.argv[0]; "
            "from importlib.machinery import ModuleSpec, SourceFileLoader; "
            "__file__ = sys.argv[0]; "
            "__spec__ = ModuleSpec('gaffer', SourceFileLoader('gaffer', __file__)); "
            "exec(__spec__.loader.get_code('gaffer'))")
    flags = subprocess._args_from_interpreter_flags()       # type: ignore[attr-defined]
    os.execv(sys.executable, [sys.executable, *flags, "-c", code, os.path.abspath(__file__),
                              *sys.argv[1:]])


def run_server(args, writer, pipe):
    """Run a manager with the HTTP API until INT or TERM. Return the exit status. `writer`: of the
    log; `pipe`: of enter_background(), or None."""
    hooks, configuration, endpoints = WebHooks(), None, list(map(HttpEndpoint, args.bind))
    if args.config:
        ports = [endpoint.port for endpoint in endpoints if not endpoint.path]
        taken = ports if endpoints else None    # those of CONFIG
        configuration = Configuration(lambda: read_settings(args.config, taken), hooks)
        hooks.replace(configuration.settings.webhooks)
        endpoints = endpoints or configuration.settings.endpoints
    endpoints = [endpoint if endpoint.path else HttpEndpoint(
        endpoint.bind, endpoint.certfile or args.certfile, endpoint.keyfile or args.keyfile,
        endpoint.backlog) for endpoint in endpoints or [HttpEndpoint()]]
    access_log = AccessLog(args.access_log) if args.access_log else None
    http = HttpHandler(endpoints, token=read_token(args.token_file), cors_origins=args.cors_origin,
                       allow_hosts=args.allow_host, access_log=access_log)

    def load():
        try:
            configuration.reload(manager)
        except GafferError as error:
            log.error("%s\nthe configuration was not loaded: nothing has changed", error)

    def reload():                               # on a thread: files may be slow
        threading.Thread(target=load, name="gaffer-reload", daemon=True).start()

    def begin(loop, manager):
        """Say where it listens, and leave the terminal."""
        stdout = Writer(1, LOG_SIZE)            # which nobody may read
        stdout.put(("gaffer %s listening on %s\n" % (
            __version__, ", ".join(http.urls))).encode("utf-8", "surrogateescape"))
        stdout.close(LOG_END)
        if pipe is not None:
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            writer.replace_standard_streams()
            os.write(pipe, b"ok")
            os.close(pipe)

    def reopen():
        writer.reopen()
        if access_log is not None:
            access_log.reopen()
    apps: list = [SigHandler(ending_signals(), reload if configuration else None, reopen)]
    if args.pidfile:
        apps.append(PidFile(args.pidfile))
    apps += [ConsoleOutput(args.verbose > 1), http, hooks, types.SimpleNamespace(start=begin)]
    if os.environ.get("NOTIFY_SOCKET"):
        apps.append(SystemdNotifier(os.environ))
    manager = Manager(apps, window_size=args.window, exit_with=args.exit_with,
                      exit_when_done=args.exit_when_done)
    if configuration is not None:
        configuration.begin(manager)
    manager.run()
    return manager.exit_code


def serve(args):
    """Run the server, in the background if that is asked for."""
    run_cached()
    if args.daemon and not args.log_file:
        raise ClientError("--daemon needs --log-file FILE: nobody would see its messages", 2)
    if args.exit_with and not re.fullmatch(NAME, args.exit_with):
        raise ClientError("--exit-with takes a template's name, which '%s' cannot be" % (
            args.exit_with), 2)
    pipe = enter_background() if args.daemon else None      # before there is any thread
    with contextlib.closing(LogHandler(args.log_file)) as handler:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", handlers=[handler],
                            level=max(logging.WARNING - 10 * args.verbose, logging.DEBUG))
        return run_server(args, handler.writer, pipe)


# Procfiles

def open_procfile(args):
    """Return the Procfile that the arguments name. ClientError."""
    if not os.path.exists(args.procfile):
        raise ClientError("there is no '%s': name a Procfile with -f FILE, or write one, with a "
                          "line 'web: COMMAND'" % args.procfile)
    return Procfile(args.procfile, args.env_file, args.port)


def check_type(kind, types):
    """Raise NotThere if `kind` is not one of the types of processes."""
    if kind not in types:
        raise NotThere("there is no '%s'%s" % (
            kind, near(kind, types) or ": the types are " + ", ".join(types)))


def procfile_templates(args, taken=()):
    """Return ({type: template}, {type: number} of comments and -c). ConfigError, ClientError."""
    source, comments = args.procfile, {}
    # units for systemd can be made from any configuration
    if vars(args).get("format") != "systemd" or not CONFIG_PATH.fullmatch(source):
        source = open_procfile(args)
        comments = source.fields
    templates = read_settings(source, taken).templates
    formation = {kind: info["numprocesses"] for kind, info in templates.items()
                 if "numprocesses" in comments.get(kind, ())}
    for word in split_list(",".join(args.concurrency)):
        kind, _, count = word.partition("=")
        if not re.fullmatch("[0-9]{1,3}|1000", count):
            raise ClientError("'%s' is not TYPE=NUMBER, as in web=2" % word, 2)
        for name in templates if kind == "all" else [kind]:
            check_type(name, templates)
            formation[name] = int(count)
    for kind, count in formation.items():
        templates[kind]["numprocesses"] = count
    return templates, formation


def up_command(args):
    """Run a Procfile in the foreground."""
    run_cached()
    endpoints = list(map(HttpEndpoint, args.bind))
    ports = [endpoint.port for endpoint in endpoints if not endpoint.path]

    def read():
        templates, _ = procfile_templates(args, ports)
        chosen = list(args.names or templates)
        for name in chosen:                     # and what they are after, which they would wait for
            check_type(name, templates)
            chosen += set(templates[name]["after"]).intersection(templates).difference(chosen)
        templates = {name: info for name, info in templates.items() if name in chosen}
        for info in templates.values():
            info["redirect_input"] = not info["detach"]     # which does not end
            if info["restart"] == "always" and not args.keep_going:
                info["restart"] = "never"
                if not args.exit_when_done:
                    info["success"] = []        # any end is the end of all
        return Settings([], templates, [])
    configuration = Configuration(read)
    templates = configuration.settings.templates
    if not any(info["numprocesses"] for info in templates.values()):
        raise ClientError("there is nothing to run: all counts are 0")
    screen = Screen(1, wants_colour(args), not (args.keep_going or args.exit_when_done))

    class FolderApi(HttpHandler):
        advice = "'up' goes on without it"

        def start(self, loop, manager):
            try:
                super().start(loop, manager)
            except StartError as error:
                screen.note("there is no API in this folder: %s" % error)
    token = read_token(args.token_file)
    path = os.path.join(os.path.dirname(os.path.abspath(args.procfile)), FOLDER_SOCKET)
    https: list = [FolderApi([HttpEndpoint("unix:" + path)], token=token)]
    if endpoints:
        https.append(HttpHandler(endpoints, token=token))
    ready = []

    def judge():
        """Return whether it is known if all get ready, and say so."""
        try:
            goals = [template.check_goal("done" if ends_by_itself(template.info) else "ready")
                     for template in manager.templates.values() if template.info["start"]]
        except Conflict as error:
            screen.note(str(error))
            manager.stop()
            return True
        if all(goals):
            manager.loop.call_soon(screen.note, "all are ready")     # after the last one's line
            ready.append(True)
        return ready

    def begin(loop, manager):
        urls = [url for http in https for url in http.urls]
        if urls:
            screen.note("listening on " + ", ".join(urls))
        for name, info in templates.items():
            for other in set(info["after"]).difference(templates):
                screen.note("%s waits for %s, which is not in the Procfile%s" % (
                    name, other, near(other, templates)))
        if args.ready:
            manager.wait_until(lambda: manager.stopping or judge())
    signals = SigHandler(ending_signals(), None, lambda: None, lambda: screen.warned)
    manager = Manager([signals, screen, *https, types.SimpleNamespace(start=begin)],
                      exit_when_done=args.exit_when_done)
    with contextlib.closing(LogHandler()) as handler:
        logging.basicConfig(
            format="%(levelname)s %(message)s", handlers=[handler], level=logging.WARNING)
        configuration.begin(manager)
        manager.run()
    if screen.error and not screen.status:
        raise screen.error
    if args.ready and not ready:
        return 1
    return screen.status or manager.exit_code


def run_command(args):
    """Become the command."""
    if args.procfile == PROCFILE_NAME and not os.path.exists(PROCFILE_NAME):    # none is no fault
        source = Procfile(None, args.env_file, args.port)
    else:
        source = open_procfile(args)
    raise_faults([source])
    words = given_words(args)
    if not words:
        raise ClientError("say what to run: 'gaffer.py run CMD'", 2)
    if len(words) == 1:
        words = ["/bin/sh", "-c", source.types.get(words[0], words[0])]
    env = dict(os.environ, **source.env)
    env["PORT"] = str(source.port or FIRST_PORT)
    env.pop("GAFFER_TOKEN", None)
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):     # which Python ignores
        signal.signal(signum, signal.SIG_DFL)
    try:
        os.chdir(source.folder)
        os.execvpe(words[0], words, env)
    except OSError as error:
        raise ClientError("'%s' cannot be run: %s" % (words[0], error.strerror), 127) from None


def in_group(group, templates):
    """Return {group:type: template} of {type: template}, with the names in `after` changed too."""
    names = {kind: "%s:%s" % (group, kind) for kind in templates}
    return {names[kind]: dict(info, name=names[kind],
                              after=[names.get(name, name) for name in info["after"]])
            for kind, info in templates.items()}


def load_command(args):
    """Make a group in the server equal to the Procfile."""
    client, group = connect(args), group_of(args)
    statuses = get_statuses(client)
    templates, formation = procfile_templates(args, [client.port] if client.port else ())
    templates = in_group(group, templates)
    started = [name for name, info in templates.items() if info["start"]]
    stages = stop_stages(templates)             # or old and new could make a circle, as in a reload
    for name in sorted(templates, key=lambda name: -stages[name] if name in statuses else 1):
        info = templates[name]
        if name in statuses:
            del info["start"]                   # it runs, or not, as before
            if name[len(group) + 1:] not in formation:      # it may have been scaled
                info["numprocesses"] = statuses[name]["numprocesses"]
        try:
            answer = send_change(args, client, "PUT", "/processes/" + reference(name), info)
            outcome = json.loads(answer)
            done = "updated" if outcome.get("changed") else "already loaded"
            show(args, answer, "%s: %s" % (name, "loaded" if "created" in outcome else done))
        except ClientError as error:
            report(args, error, name)
    gone = [name for name in statuses if name.startswith(group + ":") and name not in templates]
    carry_out(args, client, [(target, "DELETE ", "removed")
                             for target in find_targets(args, statuses, gone)])
    if args.ready and not args.exit_status:
        await_goal(args, client, started)


def scale_command(args):
    """Change how many processes of each type run."""
    client, words, args.group = connect(args), args.changes, None
    statuses, counts, steps = get_statuses(client), {}, []      # counts: {name: how many}
    change = re.compile(r"([^=+]+?)([=+-])([0-9]{1,4})")
    is_group = any(name.startswith(words[0] + ":") for name in statuses)
    if is_group or not re.search("[=+]", words[0]) and not change.fullmatch(words[0]):
        args.group, *words = words
    for word in words or [args.group]:
        match = change.fullmatch(word)
        if match is None or word == args.group:
            raise ClientError("'%s' is not a change: give web=3, web+1 or web-1" % word, 2)
        name, sign, count = match.groups()
        if name not in statuses or ":" not in name:     # a type, no name as status shows it
            found = find_app(args, statuses)
            check_type(name, found)
            name = found[name]
        now = counts.get(name, statuses[name]["numprocesses"])
        counts[name] = int(count) if sign == "=" else max(0, now + int(sign + count))
    for target in find_targets(args, statuses, counts):
        by = counts[target.word] - target.status["numprocesses"]
        request = "POST /_%s/%d" % ("add" if by > 0 else "sub", abs(by)) if by else "GET "
        steps.append((target, request, ""))
    carry_out(args, client, steps)


def systemd_word(text):
    """Return a word of a unit file, in quotes: systemd.syntax(7), systemd.service(5)."""
    return '"%s"' % re.sub(r'[\\"]', r"\\\g<0>", text).replace("\n", "\\n").replace("%", "%%")


def systemd_shell(command):
    """Return what gives a command to a shell, as ExecStart= and its like take it."""
    return "/bin/sh -c " + systemd_word(command).replace("$", "$$")


def systemd_command(info):
    """Return a template's command for a shell, which fills in its variables."""
    words = command_words(info)
    if info["shell"]:
        return "set -- %s\n%s" % (shlex.join(words), info["cmd"]) if words else info["cmd"]
    special = re.compile(VARIABLE.pattern + r'|[$"\\`]')
    return "exec " + " ".join(shlex.quote(word) if "$" not in word else '"%s"' % special.sub(
        lambda match: match.group() if match.lastindex else "\\" + match.group()[-1], word)
        for word in words)


def systemd_service(info, needed=False):
    """Return the lines of [Service] that say when and as what a template runs, and what of it
    systemd cannot do. `needed`: another template waits for its end."""
    delay, steps, ready, lines = info["restart_delay"], stop_steps(info), info["ready"] or {}, []
    left = ["custom_streams", "detach", "flapping", "priority", "redirect_input"]
    if "notify" in ready:
        lines = [("Type", "notify"), ("NotifyAccess", "all"), ("TimeoutStartSec", ready["within"])]
    elif ready:
        left.append("ready")
    elif needed and info["restart"] != "always":
        lines = [("Type", "oneshot"), ("RemainAfterExit", "yes")]
    if len(steps) > 2:
        left.append("stop_signal")
    lines += [("Restart", {"never": "no"}.get(info["restart"], info["restart"])),
              ("RestartSec", "%g" % (delay[0] if isinstance(delay, list) else delay)),
              ("KillSignal", signal_name(steps[0][0])),
              ("KillMode", "control-group" if info["stop_group"] else "mixed"),
              ("TimeoutStopSec", "%g" % stop_time(info)),
              ("SuccessExitStatus", " ".join(
                  str(each) if is_number(each) else signal_name(parse_signal(each))
                  for each in info["success"]))]
    lines += [(name, convert(info[field])) for name, field, convert in (
        ("User", "uid", str), ("Group", "gid", str), ("UMask", "umask", str), ("Nice", "nice", str),
        ("ExecStartPre", "before_start", systemd_shell),
        ("ExecStopPost", "after_stop", systemd_shell)) if info[field] is not None]
    lines += [("Limit" + name.upper(), ":".join(map(str, limit_pair(limit))).replace(
        "inf", "infinity")) for name, limit in info["limits"].items()]
    lines += [("EnvironmentFile", path.replace("%", "%%")) for path in info["env_file"]]
    return ["# left out: %s = %s" % (field, " ".join(to_text(field, info[field]).split()))
            for field in left if info[field] != OPTIONS[field].default] + [
                "%s=%s" % line for line in lines]


def export_systemd(group, templates):
    """Return {file: text}: a service for each process, with a timer if it has a schedule, and a
    target for all."""
    files, wants = {}, []
    units = {kind: ["%s-%s-%d" % (group, kind, number + 1) for number in range(
        info["numprocesses"])] for kind, info in templates.items()}
    for kind, info in templates.items():
        after = ["%s.service" % unit for other in info["after"] for unit in units.get(other, [])]
        order = ["After=" + " ".join(after), "Requires=" + " ".join(after)] if after else []
        order += ["# left out: after = " + other for other in info["after"] if other not in units]
        needed = any(kind in other["after"] for other in templates.values())
        for instance, unit in enumerate(units[kind], 1):
            head = ["[Unit]", "Description=%s %s.%d" % (group, kind, instance),
                    "PartOf=%s.target" % group]
            env, port = dict(info["env"]), port_of(info["env"], instance)
            if port is not None:
                env["PORT"] = port
                del env["GAFFER_PORT_STEP"]
            starter = files[unit + ".service"] = [
                *head, "StartLimitIntervalSec=0", *order, "", "[Service]",
                "WorkingDirectory=%s" % info["cwd"].replace("%", "%%"),
                *("Environment=%s" % systemd_word("%s=%s" % pair) for pair in env.items()),
                "ExecStart=" + systemd_shell(systemd_command(info)),
                *systemd_service(info, needed)]
            if info["schedule"]:
                starter = files[unit + ".timer"] = [
                    *head, "", "[Timer]", "# %s" % info["schedule"],
                    *("%s=%s" % line for line in Schedule(info["schedule"]).timer())]
            if info["start"]:
                wants.append(unit + (".timer" if info["schedule"] else ".service"))
                starter += ["", "[Install]", "WantedBy=%s.target" % group]
    files["%s.target" % group] = ["[Unit]", "Description=" + group, "Wants=" + " ".join(wants), "",
                                  "[Install]", "WantedBy=multi-user.target"]
    return {name: "\n".join([*lines, ""]) for name, lines in sorted(files.items())}


def export_command(args):
    """Convert a Procfile to another format. ClientError: it cannot be expressed in that."""
    group = group_of(args)
    templates, _ = procfile_templates(args)
    sections = {name: {"priority": index, **{
        field: value for field, value in info.items()
        if value != OPTIONS[field].default and field != "name"}}
                for index, (name, info) in enumerate(in_group(group, templates).items())}
    lines = ["; made from %s" % args.procfile]
    if args.format == "systemd":
        if args.output:
            os.makedirs(args.output, exist_ok=True)
        for name, text in export_systemd(group, templates).items():
            if args.output:
                with open(os.path.join(args.output, name), "w", encoding="utf-8") as file:
                    file.write(text)
            print(file.name if args.output else "# %s\n%s" % (name, text))
        return
    if args.format == "json":
        print(json.dumps({"process": sections}, indent=4))
        return
    for name, info in sections.items():
        env = info.pop("env")
        lines += ["", "[process:%s]" % name]
        lines += ["%s = %s" % (field, to_text(field, value)) for field, value in info.items()]
        lines += ["", "[env:%s]" % name]
        for variable, value in env.items():
            if value != value.strip() or "\n" in value:
                raise ClientError("INI cannot hold the value of %s: export json" % variable)
            lines.append("%s = %s" % (variable, value))
    print("\n".join(lines))


# completion: the shells ask the program for words; zsh understands the words of bash

COMPLETION = {
    **dict.fromkeys(("bash", "zsh"), """\
_gaffer() {
    local IFS=$'\\n' line="${COMP_LINE:0:$COMP_POINT}"
    local word="${line##* }"    # of which bash replaces only $2, the end
    COMPREPLY=($("${1/#\\~\\//$HOME/}" completion bash "$line" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"${word%"$2"}"}")
}
[[ -z $ZSH_VERSION ]] || { autoload -U bashcompinit && bashcompinit; }
complete -o default -F _gaffer gaffer.py gaffer"""),
    "fish": """\
for program in gaffer.py gaffer
    complete -c $program -f -a '(env (string replace -r "^~/" $HOME/ (commandline -opc)[1]) \\
        completion fish (commandline -cp))'
end"""}


def command_first(commands, argv):
    """Return (command, arguments), as options may stand before the command, or (None, argv)."""
    for place, word in enumerate(argv):
        if word in commands:
            with_value = {name for names, how in commands[word].options if "metavar" in how
                          for name in names}
            index = 0                           # is all before it options, each with its value?
            while index < place and argv[index].startswith("-"):
                index += 2 if argv[index] in with_value else 1
            if index == place:
                return word, argv[:place] + argv[place + 1:]
    return None, argv


def completion_command(args):
    """Print a shell's script or, given a line, the words that may stand at its end."""
    if args.line is None:
        print(COMPLETION[args.shell])
        return
    *words, current = re.split(" +", args.line.lstrip())[1:] or [""]
    name, _ = command_first(args.commands, words)
    found = ["--help"] if name else [*args.commands, "--help", "--version"]
    for names, how in args.commands[name].options if name else ():
        if names[0].startswith("-"):
            found += names
        elif how["metavar"] == "NAME":
            with contextlib.suppress(ClientError):
                found += ["all", *Client(find_endpoint(), read_token(None)).get("/processes")]
        else:
            found += how["choices"] or ()
    for word in found:
        if word.startswith(current) and (current or word[0] != "-"):
            print(word)


# the table

def checked(convert, what, least=0, most=1e9):
    """Return an argparse type: what `convert` returns, which has to be in bounds."""
    def check(text):
        import argparse
        with contextlib.suppress(ValueError, LookupError):
            value = convert(text)
            if least <= value <= most:
                return value
        raise argparse.ArgumentTypeError("'%s' is not %s" % (text, what))
    return check


TYPES = {                                       # what an option calls its value -> argparse's type
    "N": checked(int, "a whole number from 1", 1), "PORT": int, "SIGNAL": reference,
    "COUNT": checked(int, "a number of lines"),
    "LINES": checked(lambda text: math.inf if text == "all" else int(text),
                     "a number of lines, or all", most=math.inf),
    "SECONDS": checked(float, "a number of seconds", most=SECONDS_MAX),
    "TIME": checked(lambda text: int(text[:-1]) * UNITS[text[-1]], "90s, 10m, 2h or 1d"),
    "BYTES": checked(int, "%d to %d bytes" % (WINDOW_SIZE_MIN, WINDOW_SIZE_MAX),
                     WINDOW_SIZE_MIN, WINDOW_SIZE_MAX)}
EXAMPLES = {                                    # of fields that are not plain text
    "ready": "; as in tcp:5432 or 'log:is up within=10'", "stop_signal": "; as in INT=5,TERM=5",
    "limits": "; as in nofile=4096,core=unlimited", "flapping": "; as in 2,1.0,7.0,5",
    "success": "; as in 0,143,TERM", "restart_delay": "; as in 0.5,30", "after": "; as in db,cache"}
OPTION_GROUPS = {                               # see parse_options()
    "NAMES": "names NAME+: a name, a glob such as 'web*' or 'group:*', or all",
    "SCALE": "name NAME: a name, a glob, or all\nnumber N?: how many (default 1)\nWAIT",
    "TARGETS": "names NAME+: a name, a glob, all, or one process: web.2, or its pid",
    "CONNECTION": """\
--endpoint URL: http[s]://host:port or unix:/path (GAFFER_ENDPOINT, or the 'up' here, or port 5000)
--token-file FILE: the token is in this file (or in GAFFER_TOKEN)
--cacert FILE: trust the certificates in this file (PEM)""",
    "ASK": "CONNECTION\n--json: print what the server sent",
    "TIMEOUT": "--timeout SECONDS: wait at most this long, then exit with 124",
    "WAIT": "TIMEOUT\n--no-wait: do not wait until it is done\nASK",
    "READY": "--ready: wait until all are ready, or done; exit with 1 if one fails",
    "COLOUR": "--no-color: no colours (NO_COLOR does the same)",
    "LOOK": "-w, --watch: repeat every second until Ctrl-C\nCOLOUR ASK",
    "START": "--start: start it",
    "FIELDS": "\n".join(
        "--{0}: {1}\n--no-{0}: turn that off".format(name.replace("_", "-"), field.help)
        if isinstance(field.default, bool) else
        "--%s VALUE: %s%s" % (name.replace("_", "-"), field.help, EXAMPLES.get(name, ""))
        for name, field in OPTIONS.items() if name not in ("name", "cmd", "args", "env", "start")),
    "TEMPLATE": """\
name NAME: the template's name
cmd CMD...: everything after NAME: a command line as one word, or a program and its arguments
START
--env NAME[=VALUE]*: a variable of its environment; without =VALUE, yours is passed on
FIELDS WAIT""",
    "PLACE": "-f, --procfile FILE: the Procfile (default ./Procfile)",
    "PROCFILE": """\
PLACE
-e, --env-file FILE*: variables, read instead of .env in that folder
-p, --port PORT: of the first type (default: PORT of .env, or yours, or 5000); others have more""",
    "FORMATION": "-c, --concurrency TYPE=N*: how many of each type, as in web=2,worker=3",
    "GROUP": "group GROUP?: the name of the application (default: its folder's)",
    "LISTEN": """\
--bind ADDRESS*: host:port (0: any free one), port, [v6]:port or unix:/path
--token-file FILE: every request needs the token in this file (or in GAFFER_TOKEN)
--exit-when-done: stop once nothing can run any more, with the status of the first failure"""}


def parse_options(text):
    """Yield (names, keywords) of each argument that a text describes, for add_argument().

    Its lines are "--json: help" (a flag), "-f, --procfile FILE: help", with a * if it may be
    repeated, "names NAME+: help" (a positional argument, with + ? * or ... for how many), or names
    of OPTION_GROUPS. The value may be a choice: ini|json.
    """
    for line in text.split("\n"):
        words, _, text = line.partition(": ")
        if not text:
            for name in words.split():
                yield from parse_options(OPTION_GROUPS[name])
            continue
        names, how = words.replace(",", "").split(), {"help": text}
        if names[-1] == "--verbose":
            how.update(action="count", default=0)
        elif names[-1].startswith("-"):
            how["action"] = "store_true"
        else:
            metavar, many = re.fullmatch(r"(.*?)([+?*]|\.\.\.)?", names.pop()).groups()
            choices = metavar.split("|") if "|" in metavar else None
            how.update(metavar=metavar, type=TYPES.get(metavar), choices=choices)
            if not words.startswith("-"):
                how["nargs"] = many
            elif many:
                how.update(action="append", default=[], help=text + "; repeatable")
        yield names, how


class Command:
    """A function of parsed arguments, and a text: "name: help", then lines for parse_options()."""

    def __init__(self, run, text):
        self.run = run
        self.name, self.help, self._text = re.split(": |\n", text, maxsplit=2)

    @property
    def options(self):
        """[(names, keywords)] of its arguments, for add_argument()."""
        return list(parse_options(self._text))


COMMANDS = {command.name: command for command in (
    Command(serve, """\
serve: run the supervisor with its HTTP API and web page
config CONFIG?: what to run: an INI, JSON or TOML file, a Procfile, or a supervisord.conf
LISTEN
--cors-origin ORIGIN*: let pages of this origin use the API ('*': all of them)
--allow-host HOST*: another name of this server
--certfile FILE: serve TLS with this certificate (PEM)
--keyfile FILE: the key of the certificate (PEM)
--access-log FILE: log each request, in Apache's format ('-': to stderr)
--exit-with NAME: stop when a process of this template ends by itself, and exit with its status
--window BYTES: bytes kept of each stream (default 1048576)
--pidfile FILE: keep the pid in this file
--log-file FILE: log into this file (default: to stderr)
--daemon: run in the background; needs --log-file
-v, --verbose: log events; -vv: the processes' output too"""),
    Command(reload_command, "reload: load CONFIG again\n--dry-run: show what would change\nASK"),
    Command(change, "start: start processes; 'up' runs a Procfile\nNAMES READY WAIT"),
    Command(wait_command, """\
wait: wait until processes are ready, done or stopped
NAMES
--for ready|done|stopped: what to wait for (default: ready)
TIMEOUT ASK"""),
    Command(change, "stop: stop processes; they stay stopped\nTARGETS WAIT"),
    Command(change, "restart: stop and replace processes\nNAMES WAIT"),
    Command(change, "add: run more processes of a template\nSCALE"),
    Command(change, "sub: run fewer processes of a template; the oldest stop\nSCALE"),
    Command(change, """\
kill: send a signal to processes
TARGETS
sig SIGNAL: 15, TERM or SIGTERM; also as -9 in front of NAME
--group: to their whole process groups
ASK"""),
    Command(processes_command, """\
processes: list the names of all templates
--running: print the pids of running processes instead
ASK"""),
    Command(status_command, """\
status: show what is running and what happens next
names NAME*: a name, a glob such as 'web*' or 'group:*', or all (the default)
LOOK"""),
    Command(logs_command, """\
logs: print the output of processes, in order
names NAME*: a name, a glob, one process (web.2, or its pid), or all (the default)
-f, --follow: follow new output until Ctrl-C
-n LINES: begin with the last lines of each stream, or all (default 10)
--since TIME: begin with the output of the last 90s, 10m, 2h or 1d
--no-prefix: leave out the names
-t, --times: print the time of each line
COLOUR CONNECTION
--json: print an object per line: time, name, pid, label, data"""),
    Command(attach_command, """\
attach: see the output of a process and type into it
name NAME: a name, or one process: web.2, or its pid
-n COUNT: begin with its last lines (default 10)
CONNECTION"""),
    Command(watch_command, """\
watch: print events as they happen until Ctrl-C
pattern PATTERN?: a type such as exit, proc/NAME or proc/NAME/TYPE
COLOUR ASK"""),
    Command(show_field, "running: print how many processes of a template are running\nNAMES ASK"),
    Command(show_field, "numprocesses: print how many processes are wanted\nNAMES ASK"),
    Command(show_field, "pids: print gaffer's pids of the running processes\nNAMES ASK"),
    Command(get_process_command, "get_process: print a template as JSON\nTARGETS ASK"),
    Command(add_process_command, """\
add_process: add a template
--replace: replace a template of this name, unless it is the same
TEMPLATE"""),
    Command(load_process_command, """\
load_process: add a template from a JSON file
file FILE: as POST /processes takes it; - is stdin
START ASK"""),
    Command(update_process_command, "update_process: change fields of a template\nTEMPLATE"),
    Command(change, "del_process: stop and remove a template\nNAMES WAIT"),
    Command(up_command, """\
up: run a Procfile here, all output on one screen
names TYPE*: only these types, and what they are after (default: all)
PROCFILE FORMATION READY
--keep-going: restart processes that end instead of stopping all
LISTEN COLOUR"""),
    Command(run_command, """\
run: run a command in the environment of a Procfile
cmd CMD...: a type, a command line as one word, or a program and its arguments
PROCFILE"""),
    Command(load_command, "load: run a Procfile in a server\nGROUP PROCFILE FORMATION READY WAIT"),
    Command(change, "unload: stop and remove a loaded Procfile\nGROUP PLACE WAIT"),
    Command(scale_command, """\
scale: change how many of each type run
changes CHANGE+: web=3, web+1 or web-1; a GROUP may come first
PLACE WAIT"""),
    Command(status_command,
            "ps: show the processes of a Procfile, as status does\nGROUP PLACE LOOK"),
    Command(export_command, """\
export: convert a Procfile to another format
format ini|json|systemd: the first two are for serve; systemd also from INI, TOML or JSON
GROUP
-o, --output DIR: write systemd's units into this folder (default: print them)
PROCFILE FORMATION"""),
    Command(completion_command, """\
completion: print a completion script for a shell
shell bash|zsh|fish: source the script there
line LINE?: print the words that may end this line, as the script does"""),
)}

HELP = """\
usage: gaffer.py COMMAND [options] ...

A process supervisor in one file, driven over HTTP. To begin with:

  gaffer.py serve                          run it; API and web page: http://127.0.0.1:5000
  gaffer.py add_process --start web python3 -m http.server 8000
  gaffer.py status                         what is running?
  gaffer.py up                             run the Procfile of this folder

commands:
%s

'gaffer.py COMMAND --help' says more. Options may stand before or after the command.
Exit status: 0 done, 1 the server said no, 2 wrong usage, 3 not running (status),
4 no such name, 5 no server there, 6 refused, 124 timed out."""


def make_parser(name):
    """Return the argparse parser of a command."""
    import argparse
    command, usage = COMMANDS[name], ["gaffer.py", name, "[options]"]
    forms = {None: "%s", "+": "%s ...", "?": "[%s]", "*": "[%s ...]", "...": "%s ..."}
    usage += [forms[how["nargs"]] % how["metavar"] for _, how in command.options if "nargs" in how]
    parser = argparse.ArgumentParser(
        prog="gaffer.py " + name, usage=" ".join(usage), allow_abbrev=False,
        description="%s%s." % (command.help[0].upper(), command.help[1:]))
    parser.set_defaults(command=name, commands=COMMANDS, exit_status=0, procfile=PROCFILE_NAME,
                        window=WINDOW_SIZE, number=1)
    for names, how in command.options:
        parser.add_argument(*names, **how)
    return parser


def dispatch(argv):
    """Run a command line. Return the exit status."""
    if argv == ["--version"]:
        print("gaffer %s" % __version__)
        return 0
    name, argv = command_first(COMMANDS, argv)
    if name is None:
        words = [word for word in argv if not word.startswith("-")] or argv
        if words and words[0] not in ("-h", "--help", "help"):
            raise ClientError("there is no command '%s'%s" % (
                words[0], near(words[0], COMMANDS) or "; 'gaffer.py --help' lists them"), 2)
        print(HELP % "\n".join(
            "  %-16s %s" % (name, command.help) for name, command in COMMANDS.items()))
        return 0 if argv else 2
    if name == "kill":                          # kill -9 NAME
        dashed = [word for word in argv if re.fullmatch(r"-([0-9]+|(SIG)?[A-Z]{3}[A-Z0-9]*)", word)]
        argv = [word for word in argv if word not in dashed] + [word[1:] for word in dashed]
    parser = make_parser(name)
    takes_rest = any(how.get("nargs") == "..." for _, how in COMMANDS[name].options)
    try:
        args = parser.parse_args(argv) if takes_rest else parser.parse_intermixed_args(argv)
    except SystemExit as error:                 # argparse has said it, or printed the help
        return error.code
    try:
        exit_status = COMMANDS[name].run(args)
    except (LookupError, TypeError, ValueError) as error:
        if "endpoint" not in args:
            raise                               # a mistake of ours, not of a server
        raise ClientError("the answer of %s is not understood (%r): is it another version?" % (
            connect(args).endpoint, error)) from error
    return args.exit_status if exit_status is None else exit_status


def main(argv=None):
    """Do what the command line says. Return the exit status: see HELP; 128+n after signal n."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:                         # closed: else a socket would get its number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):      # what the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        exit_status = dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (StartError, ClientError, GafferError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "new thread" not in str(error):
            raise
        note(str(error))
        return getattr(error, "exit_status", 1)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):     # such as a full disk behind stdout
            note(": ".join(str(each) for each in (error.filename, error.strerror or error) if each))
            return 1
        nothing = os.open(os.devnull, os.O_WRONLY)          # the pipe or the terminal was closed:
        os.dup2(nothing, 1)                                 # what is left in a buffer must not fail
        os.dup2(nothing, 2)                                 # again
        return 128 + (signal.SIGPIPE if error.errno == errno.EPIPE else signal.SIGHUP)


if __name__ == "__main__":
    sys.exit(main())
