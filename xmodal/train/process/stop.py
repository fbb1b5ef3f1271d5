"""Signals that end a run early: SIGTERM, and Ctrl-C once."""

from collections.abc import Iterator
import contextlib
import os
import signal
import socket
import threading

from xmodal.sharding import hosts

EXIT_CODE = 75  # of a program that was stopped and saved: EX_TEMPFAIL of sysexits.h, run it again


class Stop:
  """A request to stop the run, checked between steps and between batches of an evaluation."""

  def __init__(self):
    self._listener = hosts.listener() if hosts.several() else None
    self._asked = self._listener.stop_requested if self._listener else threading.Event()

  def ask(self) -> None:
    """Requests that all processes of the run stop."""
    self._asked.set()

  def reached(self) -> bool:
    """Whether to stop here. All processes of a run call this at the same places and get the same
    answer."""
    return self._listener.reached() if self._listener else self._asked.is_set()


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
  """Yields a Stop that SIGTERM and the first SIGINT set; a second SIGINT ends the process."""
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  numbers = (signal.SIGTERM, signal.SIGINT)
  told, tell = socket.socketpair()
  tell.setblocking(False)

  def listen():
    # Python's own handlers wait for the main thread, which may compile for a minute.
    heard = False
    while number := told.recv(1):
      if number[0] == signal.SIGINT and heard:
        code = 128 + signal.SIGINT
        hosts.end_all('ended by Ctrl-C', code)
        hosts.exit_now(code)
      if number[0] in numbers and not heard:
        stop.ask()
        # Not by print: that may be in the middle of another.
        with contextlib.suppress(OSError):  # stderr may be closed
          os.write(2, b'\nstopping after the step that runs or is compiled; Ctrl-C again ends at '
                      b'once\n')
        heard = True

  before = {number: signal.signal(number, lambda *_: stop.ask()) for number in numbers}
  other = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  try:
    yield stop
  finally:
    signal.set_wakeup_fd(other)
    tell.close()
    listener.join()
    told.close()
    for number, handler in before.items():
      signal.signal(number, handler)
