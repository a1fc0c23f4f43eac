#!/usr/bin/env python3
"""An application of three kinds of processes, as a Procfile has them: the clock makes a task each second, workers do them, the
web process tells on $PORT how many are done. A task is a file in a folder, and belongs to the worker that renames it.

Usage: python3 app.py web|worker|clock          (beside a Procfile; variables SPOOL, PORT, GREETING, CLOCK_PAUSE)
"""
import http.server
import os
import sys
import tempfile
import time

SPOOL = os.environ.get("SPOOL") or os.path.join(tempfile.gettempdir(), "gaffer-example-%d" % os.getuid())


class Page(http.server.BaseHTTPRequestHandler):
    """GET anything: the number of tasks that are done."""

    def do_GET(self):
        """Answer."""
        body = ("%s: %d\n" % (os.environ.get("GREETING", "done"), len(os.listdir(SPOOL + "/done")))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def web():
    """Serve the page."""
    server = http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Page)
    print("listening on %d" % server.server_port, flush=True)
    server.serve_forever()


def worker():
    """Do what is to be done."""
    while True:
        for name in sorted(os.listdir(SPOOL + "/new")):
            try:
                os.rename("%s/new/%s" % (SPOOL, name), "%s/done/%s" % (SPOOL, name))
            except FileNotFoundError:
                continue                        # another worker was faster
            print("did %s" % name, flush=True)
        time.sleep(0.1)


def clock():
    """Make tasks."""
    number = 0
    while True:
        number += 1
        with open("%s/new/task-%d-%d" % (SPOOL, os.getpid(), number), "w"):
            print("made task %d" % number, flush=True)
        time.sleep(float(os.environ.get("CLOCK_PAUSE", "1")))


if __name__ == "__main__":
    for part in ("new", "done"):
        os.makedirs(os.path.join(SPOOL, part), exist_ok=True)
    {"web": web, "worker": worker, "clock": clock}[sys.argv[1]]()
