"""Figures for Prometheus, under the names that dashboards of other engines know."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from shoestring.core import probes
from shoestring.server.histogram import REQUEST, TOKEN, TOKENS, WAIT, Histogram
from shoestring.server.report import Report, labelled

if TYPE_CHECKING:
    from shoestring.engine.request import Usage
    from shoestring.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HISTOGRAMS = {
    "time_to_first_token_seconds": (WAIT, "From a request's arrival to its first token"),
    "inter_token_latency_seconds": (TOKEN, "Between two tokens of an answer"),
    "request_time_per_output_token_seconds": (TOKEN, "Mean time per token after the first, for each request"),
    "e2e_request_latency_seconds": (REQUEST, "From a request's arrival to its end"),
    "request_queue_time_seconds": (REQUEST, "Waiting to be computed"),
    "request_prefill_time_seconds": (REQUEST, "Computing the prompt"),
    "request_decode_time_seconds": (REQUEST, "From the first token to the last"),
    "request_prompt_tokens": (TOKENS, "Tokens of prompts"),
    "request_generation_tokens": (TOKENS, "Tokens of answers"),
}
REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """Counts requests and times tokens; what the engine counts is read from it when somebody asks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}
        self.finished = dict.fromkeys(REASONS, 0)
        self.between_tokens = self.histograms["inter_token_latency_seconds"]
        self.answers: dict[str, int] = {}

    def count(self, status: int) -> None:
        """An HTTP answer."""
        word = f"{status // 100}xx"
        self.answers[word] = self.answers.get(word, 0) + 1

    def finish(self, usage: Usage, reason: str) -> None:
        """An answer has ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        add = lambda name, value: self.histograms[name].add(value)
        now = time.monotonic()
        add("e2e_request_latency_seconds", now - usage.arrival)
        add("request_prompt_tokens", usage.prompt_tokens)
        add("request_generation_tokens", usage.completion_tokens)
        if usage.started:
            add("request_queue_time_seconds", usage.started - usage.arrival)
        if usage.first_token:
            add("time_to_first_token_seconds", usage.first_token - usage.arrival)
            add("request_prefill_time_seconds", usage.first_token - usage.started)
            add("request_decode_time_seconds", usage.last_token - usage.first_token)
            if usage.completion_tokens > 1:
                each = (usage.last_token - usage.first_token) / (usage.completion_tokens - 1)
                add("request_time_per_output_token_seconds", each)

    def text(self, reports: Sequence[Report] | None = None) -> bytes:
        """Everything in Prometheus' text format, with what those report that answer for this process."""
        found: Iterable[Metric] = self.collect()
        if reports is not None:
            found = labelled(found, reports, f"{self._service.settings.metrics_prefix}:")
        return bytes(generate_latest(_Collected(found)))  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        """What Prometheus' client asks a collector for."""
        service, prefix = self._service, f"{self._service.settings.metrics_prefix}:"
        labels = {"model_name": service.names[0] if service.names else ""}
        for family in (*self._of_engine(), *self._of_front(), *self._of_server()):
            yield _named(family, prefix, labels)
        for name, histogram in self.histograms.items():
            family = HistogramMetricFamily(prefix + name, _HISTOGRAMS[name][1], labels=list(labels))
            family.add_metric(list(labels.values()), histogram.buckets(), histogram.total)
            yield family

    def _of_engine(self) -> Iterable[Metric]:
        engine = self._service.loaded
        if engine is None:
            return
        c = engine.counts()
        yield _gauge("num_requests_running", "Answers that are computed", c.running)
        yield _gauge("num_requests_waiting", "Answers that wait", c.waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the cache in use, 0..1", c.blocks_used / max(1, c.blocks_total))
        yield _counter("prefix_cache_queries", "Prompt tokens looked up in the cache", c.prefix_queries)
        yield _counter("prefix_cache_hits", "Prompt tokens found in the cache", c.prefix_hits)
        yield _counter("prompt_tokens", "Tokens of prompts", c.prompt_tokens)
        yield _counter("generation_tokens", "Tokens of answers", c.generation_tokens)
        yield _counter("num_preemptions", "Answers put back to make room", c.preemptions)
        yield _counter("spec_decode_num_draft_tokens", "Tokens guessed", c.draft_tokens)
        yield _counter("spec_decode_num_accepted_tokens", "Guessed tokens that held", c.accepted_draft_tokens)
        yield _counter("engine_steps", "Steps of the engine", c.steps)
        yield _counter("engine_step_seconds", "Time of these steps", c.step_seconds)
        for name, value in c.plugged.items():
            yield _gauge(f"plugged_{name}", "What a method that is plugged in says of itself", value)
        adapters = GaugeMetricFamily("lora_requests_info", "Adapters that are loaded", labels=["running_lora_adapters"])
        adapters.add_metric([",".join(self._service.adapters())], time.time())
        yield adapters

    def _of_front(self) -> Iterable[Metric]:
        front = self._service.front
        for name, value in front.stats().items() if hasattr(front, "stats") else ():
            yield _gauge(f"front_{name}", "What the method in front of other servers says of itself", value)

    def _of_server(self) -> Iterable[Metric]:
        service = self._service
        yield _gauge("requests_open", "HTTP requests that are answered now", service.gate.requests)
        ended = CounterMetricFamily("request_success", "Answers that ended", labels=["finished_reason"])
        for reason, number in self.finished.items():
            ended.add_metric([reason], number)
        yield ended
        replied = CounterMetricFamily("http_responses", "HTTP answers", labels=["status"])
        for status, number in sorted(self.answers.items()):
            replied.add_metric([status], number)
        yield replied
        energy = service.meter.joules(service.meter.start, service.meter.read()).value
        joules = CounterMetricFamily("energy_joules", "Energy of this process, modelled", labels=["method"])
        joules.add_metric([service.meter.method], energy)
        yield joules
        yield _gauge("resident_memory_bytes", "Memory of this process", probes.resident() or 0)
        yield _gauge("peak_rss_bytes", "Memory of this process at its highest", probes.high_water() or 0)


class _Collected:
    """What `generate_latest` takes for a registry."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(name, about, value=value)


def _named(family: Any, prefix: str, labels: dict[str, str]) -> Metric:
    """The family under its full name, each sample labelled with the model."""
    family.name = prefix + family.name
    family.samples = [s._replace(name=prefix + s.name, labels=labels | s.labels) for s in family.samples]
    return family  # type: ignore[no-any-return]
