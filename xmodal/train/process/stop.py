"""Signals that end a run early: SIGTERM, and Ctrl-C once."""

from collections.abc import Iterator
import contextlib
import os
import signal
import socket
import threading

from xmodal.sharding import hosts

EXIT_CODE = hosts.EXIT_CODE  # stopped and saved


class Stop:
  """A request to stop the run, checked between steps and between batches of an evaluation."""

  def __init__(self):
    self._listener = hosts.listener() if hosts.several() else None
    self._requested = self._listener.stop_requested if self._listener else threading.Event()

  def ask(self) -> None:
    """Requests that all processes of the run stop."""
    self._requested.set()

  def reached(self) -> bool:
    """Whether to stop here. All processes of a run must call this at the same points; all get the
    same answer."""
    return self._listener.reached() if self._listener else self._requested.is_set()


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
  """Yields a Stop that SIGTERM and the first SIGINT set; a second SIGINT ends the process."""
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  numbers = (signal.SIGTERM, signal.SIGINT)
  receiver, sender = socket.socketpair()
  sender.setblocking(False)

  def listen():
    # Python runs its handlers in the main thread, which may be compiling for a minute.
    heard = False
    while number := receiver.recv(1):
      if number[0] == signal.SIGINT and heard:
        code = 128 + signal.SIGINT
        hosts.end_all('ended by Ctrl-C', code)
        hosts.exit_now(code)
      if number[0] in numbers and not heard:
        stop.ask()
        # Not by print, which is not reentrant.
        with contextlib.suppress(OSError):  # stderr may be closed
          os.write(2, b'\nstopping after the step in progress; Ctrl-C again exits at once\n')
        heard = True

  before = {number: signal.signal(number, lambda *_: stop.ask()) for number in numbers}
  other = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  try:
    yield stop
  finally:
    signal.set_wakeup_fd(other)
    sender.close()
    listener.join()
    receiver.close()
    for number, handler in before.items():
      signal.signal(number, handler)
