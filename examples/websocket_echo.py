#!/usr/bin/env python3
"""A websocket server that sends every message back as it came: text as text, binary as binary, at ws://127.0.0.1:PORT/echo.
No process is involved: it shows gaffer's WebSocketHandler, and is what a websocket conformance suite talks to.

Usage: python3 examples/websocket_echo.py [PORT]            (default: 9001; 0: any free one; until INT or TERM)
"""
import os
import sys

# gaffer.py is one file in the folder above this one; a program that has it beside itself, or installed, needs no such line
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from gaffer import HttpEndpoint, HttpHandler, Manager, SigHandler, WebSocketHandler  # noqa: E402


class Echo(WebSocketHandler):
    """One connection."""

    def message(self, data):
        """A message has come: str or bytes. send() makes of each a message of the same kind."""
        self.send(data)


class Announce:
    """Says where the server listens, once it does."""

    def __init__(self, http):
        self.http = http

    def start(self, loop, manager):
        """The apps before this one have been started."""
        print("listening on %s" % ", ".join(url.replace("http", "ws") + "/echo" for url in self.http.urls), flush=True)


def main(port="9001"):
    """Serve until INT or TERM."""
    http = HttpHandler([HttpEndpoint("127.0.0.1:" + port)], handlers=[(r"/echo", Echo)])
    Manager(apps=[SigHandler(), http, Announce(http)]).run()


if __name__ == "__main__":
    main(*sys.argv[1:2])
