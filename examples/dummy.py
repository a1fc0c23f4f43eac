#!/usr/bin/env python3
"""Writes `STDOUT n` to stdout and `STDERR n` to stderr, counting, until it is stopped: something to watch.

Usage: python3 examples/dummy.py [SECONDS BETWEEN TWO LINES]        (default: 1)
"""
import itertools
import sys
import time


def main(pause=1.0):
    """Count until somebody stops it."""
    for number in itertools.count():
        print("STDOUT %d" % number, flush=True)
        print("STDERR %d" % number, file=sys.stderr, flush=True)
        time.sleep(pause)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
