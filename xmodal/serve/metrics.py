"""The metrics of the server, in the text format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32)


class Metrics:
  """Counters and histograms of one server."""

  def __init__(self, queued: Callable[[], int], in_flight: Callable[[], int]):
    """`queued` and `in_flight` are called when the numbers are read."""
    self._registry = CollectorRegistry()
    self.requests = self._made(Counter, 'requests', 'Responses.', 'route', 'task', 'status')
    self.errors = self._made(Counter, 'errors', 'Requests refused or failed.', 'code')
    self.seconds = self._made(Histogram, 'request_seconds', 'From the head of a request to the end '
                              'of its response.', 'route', buckets=_SECONDS)
    self.rows = self._made(Histogram, 'batch_rows', 'Requested rows of each batch.', 'task',
                           buckets=_ROWS)
    self._made(Gauge, 'queue_length', 'Requests that wait for a batch.').set_function(queued)
    self._made(Gauge, 'requests_in_flight', 'Calls that are read, wait or are answered.'
               ).set_function(in_flight)

  def _made(self, kind, name, text, *labels, **options):
    return kind(f'xmodal_{name}', text, labels, registry=self._registry, **options)

  def text(self) -> bytes:
    """All of them."""
    return generate_latest(self._registry)
