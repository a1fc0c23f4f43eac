#!/usr/bin/env python3
"""gaffer inside a program: a process to keep running, and the HTTP API with a route, a websocket and a WSGI application
of the program's own.

Usage: python3 examples/embed.py [ADDRESS]          (default: 127.0.0.1:5000; until INT or TERM)

    curl localhost:5000/hello/world
    curl localhost:5000/admin/
    curl localhost:5000/processes
    curl 'localhost:5000/streams/clock/stdout?feed=continuous'
"""
import os
import sys

# gaffer.py is one file in the folder above this one; a program that has it beside itself, or installed, needs no such line
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from gaffer import HttpEndpoint, HttpHandler, Manager, SigHandler, WebSocketHandler  # noqa: E402

CLOCK = "import time\nwhile True: print(time.ctime()); time.sleep(1)"


def hello(request, name):
    """GET /hello/<name>. Runs on the request's thread, so it may take its time."""
    return {"hello": name, "asked with": request.method}


class Shout(WebSocketHandler):
    """ws /shout: sends back every text message in capitals. Runs on the loop's thread, so it must not wait for anything."""

    def message(self, data):
        """A message has come."""
        self.send(data.upper() if isinstance(data, str) else data)


def admin(environ, start_response):
    """A WSGI application; one of any framework is mounted the same way."""
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [("admin page at %s\n" % environ["PATH_INFO"]).encode("utf-8")]


class Announce:
    """An app is any object with start(loop, manager): this one says where the API listens."""

    def __init__(self, http):
        self.http = http

    def start(self, loop, manager):
        """The apps before this one have been started."""
        print("listening on %s" % ", ".join(self.http.urls), flush=True)


def main(bind="127.0.0.1:5000"):
    """Run until INT or TERM."""
    http = HttpHandler([HttpEndpoint(bind)], handlers=[(r"/hello/([^/]+)", hello), (r"/shout", Shout)], wsgi={"/admin": admin})
    manager = Manager(apps=[SigHandler(), http, Announce(http)])
    manager.add_process("clock", sys.executable, args=["-c", CLOCK])
    manager.run()


if __name__ == "__main__":
    main(*sys.argv[1:2])
