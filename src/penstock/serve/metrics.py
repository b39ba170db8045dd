"""Counters for Prometheus at /metrics, in a registry of their own. Names are penstock_serve_SUBJECT_UNIT."""

from collections.abc import MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from penstock.serve.models.catalogue import Catalogue
from penstock.serve.scheduler import Generation, Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = ("GET", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The server's counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self._requests = Counter("penstock_serve_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "penstock_serve_request_seconds", "From the request to the last byte of its answer.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "penstock_serve_first_token_seconds", "From the request to its first token.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._prompt = Counter("penstock_serve_prompt_tokens", "Tokens of prompts.", registry=self.registry)

    def watch(self, scheduler: Scheduler, catalogue: Catalogue) -> None:
        """Adds the numbers of the scheduler and the catalogue, read at each request for the metrics."""
        for name, text, read in (
            ("outstanding_answers", "Answers running or waiting for a row.", lambda: scheduler.outstanding),
            ("rows_used", "Rows of the KV caches that hold an answer.", lambda: scheduler.rows_used),
            ("answer_tokens_total", "Tokens made.", lambda: scheduler.tokens_made),
            ("steps_total", "Steps of the engines: one token for each running answer.", lambda: scheduler.steps),
            ("swaps_total", "Times that newer weights were taken into service.", lambda: catalogue.swaps),
            ("ready", "1 when all models are loaded.", lambda: float(catalogue.ready.is_set())),
        ):
            Gauge(f"penstock_serve_{name}", text, registry=self.registry).set_function(read)

    def answered(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Counts a request. Paths without a route count together, so that no client fills the registry with names."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def generated(self, generation: Generation) -> None:
        """Counts an answered request's tokens and how long its first one took."""
        self._prompt.inc(sum(map(len, generation.prompts)))
        if generation.first_token_at is not None:
            self._first.observe(generation.first_token_at - generation.started_at)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)
