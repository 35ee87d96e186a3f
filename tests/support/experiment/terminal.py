"""A pseudo-terminal of a size, and what a program wrote to it."""

import fcntl
import os
import pty
import re
import struct
import termios


class Terminal:
    """Attributes: `stream`, to write to; `slave`, its descriptor for a child process."""

    def __init__(self, height=24, width=100):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = os.fdopen(os.dup(self.slave), "w")
        self.text = ""

    def read(self):
        """All that was written so far."""
        self.stream.flush()
        try:
            while chunk := os.read(self.master, 1 << 16):
                self.text += chunk.decode()
        except (BlockingIOError, OSError):
            pass
        return self.text

    def screen(self):
        """The lines that a reader sees: moves of the cursor upward and cleared lines are followed, colours are not."""
        lines, row, column = [""], 0, 0
        for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b])", self.read()):
            if code.endswith("A"):
                row -= int(code[2:-1] or 1)
            elif code.endswith("K"):
                lines[row] = ""
            elif text == "\r":
                column = 0
            elif text == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]
