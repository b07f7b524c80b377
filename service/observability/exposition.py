"""Prometheus's text format: families of plain numbers, written in the format that the scraper accepts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.observability.instruments import AnyFamily, Labels

Series = Mapping[Labels, Sequence[float]]


class NumbersCollector(Collector):
    """Reads the families' numbers, by name, when it is scraped."""

    def __init__(self, families: Sequence[AnyFamily], read: Callable[[], Mapping[str, Series]]) -> None:
        self._families = families
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """The names alone, so that to register it reads nothing."""
        return [metric(family, {}) for family in self._families]

    def collect(self) -> Iterator[Metric]:
        numbers = self._read()
        for family in self._families:
            yield metric(family, numbers.get(family.name, {}))


def metric(family: AnyFamily, series: Series) -> Metric:
    """A family as the library has it; a histogram's buckets are counted up, as its format wants them."""
    name, help_text, labels = family.name, family.help_text, family.label_names
    match family.kind:
        case "counter":
            counter = CounterMetricFamily(name, help_text, labels=labels)
            for values, (value,) in series.items():
                counter.add_metric(values, value)
            return counter
        case "gauge":
            gauge = GaugeMetricFamily(name, help_text, labels=labels)
            for values, (value,) in series.items():
                gauge.add_metric(values, value)
            return gauge
        case "histogram":
            histogram = HistogramMetricFamily(name, help_text, labels=labels)
            bounds = [*map(floatToGoString, family.edges), "+Inf"]
            for values, (total, *counts) in series.items():
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                histogram.add_metric(values, buckets, sum_value=total)
            return histogram


def numbers_of(families: Iterable[AnyFamily]) -> dict[str, Series]:
    """Of this process alone."""
    return {family.name: family.snapshot() for family in families}


def written(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text and its content type. A scraper that asks for no version we know gets the oldest."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number
        encode, content_type = choose_encoder("")
    return encode(registry), content_type
