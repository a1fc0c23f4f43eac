#!/usr/bin/env python3
"""A chat room: every message goes to all who are connected, and a thread of its own tells the time.

Usage: python3 examples/chat.py [ADDRESS]           (default: 127.0.0.1:5000; until INT or TERM)

Then open a websocket to ws://127.0.0.1:5000/chat from the console of a browser:

    socket = new WebSocket("ws://127.0.0.1:5000/chat"); socket.onmessage = event => console.log(event.data)
    socket.send("hello")
"""
import os
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from gaffer import HttpEndpoint, HttpHandler, Manager, SigHandler, WebSocketHandler  # noqa: E402

members = set()
members_lock = threading.Lock()         # the methods below run on one thread, the clock on another


def send_all(text):
    """Send a message to everybody. send() never waits, so the lock is held for a moment only."""
    with members_lock:
        for member in members:
            member.send(text)


class Chat(WebSocketHandler):
    """One connection to the room."""

    def open(self):
        """Enter."""
        with members_lock:
            members.add(self)
        send_all("somebody has come in")

    def message(self, data):
        """Pass a message on."""
        send_all(data)

    def close(self, code, reason):
        """Leave."""
        with members_lock:
            members.discard(self)
        send_all("somebody has left")


class Clock:
    """An app that tells the time once a minute, from its own thread."""

    def __init__(self, http):
        self.http, self.stopping = http, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def start(self, loop, manager):
        """Start with the server."""
        print("listening on %s/chat" % self.http.urls[0].replace("http", "ws", 1), flush=True)
        self.thread.start()

    def run(self):
        """Tell the time."""
        while not self.stopping.wait(60 - time.time() % 60):
            send_all(time.strftime("it is %H:%M"))

    def stop(self):
        """Stop with the server."""
        self.stopping.set()


def main(bind="127.0.0.1:5000"):
    """Run until INT or TERM."""
    http = HttpHandler([HttpEndpoint(bind)], handlers=[(r"/chat", Chat)])
    Manager(apps=[SigHandler(), http, Clock(http)]).run()


if __name__ == "__main__":
    main(*sys.argv[1:2])
