#!/usr/bin/env python3
"""Sends a line to the stdin of a process through a websocket and prints what its stdout sends back. RFC 6455 by hand, from
the standard library alone, to show how little is needed; a program would rather use a websocket library.

    curl -d '{"name": "echo", "cmd": "python3 examples/echo.py", "redirect_input": true}' localhost:5000/processes
    python3 examples/echo_client.py

Usage: python3 examples/echo_client.py [ws://HOST:PORT/wstreams/PID]
(default: the process of the template `echo` on localhost:5000)
"""
import json
import os
import socket
import struct
import sys
import urllib.parse
import urllib.request

TEXT, CLOSE = 1, 8


def find_echo(server="localhost:5000"):
    """The websocket URL of the template echo's first process."""
    with urllib.request.urlopen("http://%s/processes/echo/_pids" % server) as answer:
        pids = json.load(answer)["pids"]
    if not pids:
        raise ValueError("echo is not running; start it: curl -X POST %s/processes/echo/_start" % server)
    return "ws://%s/wstreams/%d" % (server, pids[0])


def connect(url):
    """Open a websocket. Returns the socket and a file to read from it."""
    parts = urllib.parse.urlsplit(url)
    sock = socket.create_connection((parts.hostname, parts.port or 80), 10)
    head = ("GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\r\n")
    sock.sendall((head % (parts.path, parts.netloc)).encode("ascii"))
    file = sock.makefile("rb")
    status = file.readline().decode("latin-1").rstrip()
    while file.readline() not in (b"\r\n", b""):
        pass                                # the other headers
    if " 101 " not in status:
        file.close()
        sock.close()
        raise ValueError("%s does not open a websocket: %s" % (url, status))
    return sock, file


def send(sock, text):
    """Send a short text message (up to 125 bytes): a client's frames are masked."""
    data, mask = text.encode("utf-8"), os.urandom(4)
    sock.sendall(bytes([0x80 | TEXT, 0x80 | len(data)]) + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))


def receive(file):
    """The next text message, or None at the end."""
    while True:
        head = file.read(2)
        if len(head) < 2 or head[0] & 15 == CLOSE:
            return None
        size = head[1] & 127
        if size > 125:
            size = struct.unpack(*(("!H", file.read(2)) if size == 126 else ("!Q", file.read(8))))[0]
        data = file.read(size)
        if head[0] & 15 == TEXT:
            return data.decode("utf-8")


def main(url=None):
    """Send one line, print what comes back."""
    try:
        sock, file = connect(url or find_echo())
    except (OSError, ValueError) as error:
        sys.exit("echo_client: %s" % error)
    with sock, file:
        send(sock, "ECHO\n")
        print("Sent")
        print("Reeiving...")                # as gaffer's documentation has always printed it
        print("Received '%s'" % receive(file))


if __name__ == "__main__":
    main(*sys.argv[1:2])
