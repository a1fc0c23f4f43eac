#!/usr/bin/env python3
"""Writes each line of its stdin to its stdout, byte for byte, as soon as it is there; ends at the end of stdin.

Usage: python3 examples/echo.py          (under gaffer: with "redirect_input": true)
"""
import sys


def main():
    """Echo until the end of the input."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()           # or the line would wait for thousands of others


if __name__ == "__main__":
    main()
