"""What `shoestring serve` can be told. Each field is a flag and the environment variable SHOESTRING_<FIELD>."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from shoestring.core import catalog
from shoestring.core.errors import UsageError, nearest
from shoestring.core.text import BYTES, quantity
from shoestring.engine import check
from shoestring.engine.plug import method_for, spelled

_CHOICES = {
    "runner": ("auto", "native", "torch"),
    "kv_dtype": ("bf16", "int8", "fp32"),
}
_MOST = {
    "max_n": check.MAX_ANSWERS,
    "max_stop": check.MAX_STOPS,
    "max_stop_chars": check.MAX_STOP_LENGTH,
    "max_logprobs": check.MAX_LOGPROBS,
    "max_logit_bias": check.MAX_BIASES,
}
_ZERO_MEANS_NONE = ("key_concurrency", "key_requests_per_minute", "max_queue", "port")


@dataclass(frozen=True)
class Settings:
    """Everything about one server.

    Attributes:
        model: hub id, folder, GGUF file, or smollm2.
        host: address to listen on. Another than loopback needs a key, or --no-auth.
        port: to listen on; 0 takes a free one.
        adapter: a folder of low-rank additions to serve beside the model, as NAME=PATH; repeat for more.
        served_model_name: what clients call the model; several names with commas; default is the model's own.
        api_key_file: file with one key a line; SHOESTRING_API_KEY holds a single key.
        no_auth: listen on other addresses than loopback without any key.
        allowed_origins: web pages that may call from a browser, with commas; none by default.
        allowed_hosts: names that a request's Host header may have, with commas; default on loopback is loopback's own.
        allow_runtime_adapters: folder below which clients may load adapters; off by default.
        max_num_seqs: answers computed at the same time.
        max_queue: answers that may wait; default is 16 for each that is computed.
        max_model_len: longest prompt and answer together, in tokens; default is the model's own.
        max_step_tokens: tokens of one step of the engine; longer prompts are computed in chunks.
        kv_memory: memory for keys and values, such as 1GB.
        kv_dtype: how keys and values are kept, bf16, int8 or fp32.
        threads: of the arithmetic; default is one for each core.
        runner: native, torch, or auto.
        dtype: of the arithmetic; auto computes on the weights as they are stored.
        no_prefix_cache: compute every prompt from its beginning.
        draft: the method that guesses tokens ahead, as NAME or NAME,OPTION=VALUE,...; answers stay the same.
        exit: the method that ends passes early, as NAME or NAME,OPTION=VALUE,...
        plug: any other method to plug into the engine, as NAME or NAME,OPTION=VALUE,...; repeat for more.
        role: this process's part in a model that several serve: edge, cloud or attention, as ROLE,OPTION=VALUE,...
        cloud: where an edge finds its cloud, as http://HOST:PORT.
        replicas: engines in processes of their own behind this address; needs Ray Serve.
        front: a method that answers in front of other servers, with no MODEL of its own, as NAME,OPTION=VALUE,...
        fine_tune: folder for uploaded files, fine-tuning jobs and their checkpoints; off by default.
        ttft: milliseconds that a request may wait for its first token because of fine-tuning.
        tpot: milliseconds between two tokens of an answer that fine-tuning leaves room for.
        max_file_bytes: longest file that can be uploaded.
        max_jobs: fine-tuning jobs of one key that run or wait.
        trust_remote_code: let the model's repository run its own Python code here.
        key_concurrency: requests that one key may have open at the same time; 0 for no limit.
        key_requests_per_minute: requests that one key may begin in a minute; 0 for no limit.
        max_body_bytes: longest request body.
        max_header_bytes: longest request line and headers together.
        max_json_depth: deepest nesting of a request body.
        max_connections: open connections at the same time.
        max_messages: messages of one conversation.
        max_prompts: prompts or inputs of one request.
        max_n: answers to one prompt.
        max_stop: stop strings, and stop token ids sixteen times as many.
        max_stop_chars: longest stop string.
        max_logprobs: alternatives reported with each token.
        max_logit_bias: tokens with a bias.
        max_schema_bytes: longest JSON schema, grammar, or list of tools.
        max_schema_depth: deepest nesting of a JSON schema.
        request_seconds: longest time from a request to the end of its answer.
        idle_seconds: longest time that a client may not read its stream.
        header_seconds: longest time for a request to arrive.
        ping_seconds: silence after which a stream gets a comment, to keep it open.
        stall_seconds: time without a step after which /health says that the engine is stalled.
        drain_seconds: time that running requests get to finish after SIGTERM or Ctrl+C.
        metrics_prefix: beginning of the names at /metrics; vllm for dashboards made for vLLM.
    """

    model: str = "smollm2"
    host: str = "127.0.0.1"
    port: int = 8000
    adapter: tuple[str, ...] = ()
    served_model_name: str = ""
    api_key_file: str = ""
    no_auth: bool = False
    allowed_origins: str = ""
    allowed_hosts: str = ""
    allow_runtime_adapters: str = ""
    max_num_seqs: int = 16
    max_queue: int | None = None
    max_model_len: int | None = None
    max_step_tokens: int = 256
    kv_memory: str = ""
    kv_dtype: str = "bf16"
    threads: int | None = None
    runner: str = "auto"
    dtype: str = "auto"
    no_prefix_cache: bool = False
    draft: str = ""
    exit: str = ""
    plug: tuple[str, ...] = ()
    role: str = ""
    cloud: str = ""
    replicas: int = 1
    front: str = ""
    fine_tune: str = ""
    ttft: float = 1000.0
    tpot: float = 100.0
    max_file_bytes: int = 134217728
    max_jobs: int = 16
    trust_remote_code: bool = False
    key_concurrency: int = 0
    key_requests_per_minute: int = 0
    max_body_bytes: int = 4194304
    max_header_bytes: int = 65536
    max_json_depth: int = 64
    max_connections: int = 1024
    max_messages: int = 1024
    max_prompts: int = 128
    max_n: int = 8
    max_stop: int = 16
    max_stop_chars: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 300
    max_schema_bytes: int = 32768
    max_schema_depth: int = 32
    request_seconds: float = 600.0
    idle_seconds: float = 60.0
    header_seconds: float = 15.0
    ping_seconds: float = 15.0
    stall_seconds: float = 30.0
    drain_seconds: float = 30.0
    metrics_prefix: str = "shoestring"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                least = 0 if field.name in _ZERO_MEANS_NONE else 1 if isinstance(value, int) else 0.01
                if not least <= value < float("inf"):
                    raise UsageError(f"--{_flag(field.name)} {value} is too small", remedy=f"The least is {least}")
                if value > (most := _MOST.get(field.name, value)):
                    raise UsageError(f"--{_flag(field.name)} {value} is too large", remedy=f"The most is {most}")
        if self.port > 65535:
            raise UsageError(f"--port {self.port} is no port", "Ports end at 65535")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"--{_flag(name)} {getattr(self, name)} is unknown", remedy="Known: " + ", ".join(known)
                )
        if not self.metrics_prefix.isidentifier():
            raise UsageError(f"--metrics-prefix {self.metrics_prefix} is not a name of letters, digits and _")
        if self.cloud and spelled(self.role)[0] != "edge":
            raise UsageError(f"--cloud {self.cloud} is for an edge", remedy="Add --role edge,heads=FOLDER")
        kind, _ = self._part()
        if self.front:
            method_for(spelled(self.front)[0], "front", "front")
        if self.front or kind == "worker":
            asked = [f"--{n}" for n in ("draft", "exit", "plug", "adapter") if getattr(self, n)]
            if asked or self.model != type(self).model:
                without = "--front" if self.front else f"--role {self.role}"
                raise UsageError(
                    f"{[*asked, self.model][0]} needs an engine, and {without} has none", remedy="Give one of the two"
                )
        if self.replicas > 1:
            alone = [name for name in ("front", "role", "fine_tune") if getattr(self, name)]
            if alone:
                raise UsageError(
                    f"--{_flag(alone[0])} is for one process, and --replicas {self.replicas} are several",
                    remedy="Give one of the two",
                )
        for name in (*names(self.served_model_name), *self.adapters):
            if not name.isprintable() or len(name) > 200:
                raise UsageError(f"{name!r} cannot name a model", remedy="Use at most 200 printable characters")

    @property
    def adapters(self) -> dict[str, str]:
        """Name and folder of each `--adapter`."""
        found: dict[str, str] = {}
        for word in self.adapter:
            name, equals, folder = word.partition("=")
            if not (name and equals and folder) or name in found:
                raise UsageError(f"--adapter {word} is not NAME=PATH with a name of its own")
            found[name] = folder
        return found

    @property
    def plugs(self) -> tuple[str, ...]:
        """The methods to plug in, each checked to be one for the place it was given."""
        words = [(word, point) for word, point in ((self.draft, "drafter"), (self.exit, "exit")) if word]
        for word, point in [*words, *((word, "") for word in self.plug)]:
            method_for(spelled(word)[0], point)
        kind, word = self._part()
        return (*(word for word, _ in words), *self.plug, *([word] if kind == "plug" else []))

    @property
    def fronted(self) -> str:
        """The method that answers in place of an engine, as NAME,OPTION=VALUE,...; empty for an engine."""
        kind, word = self._part()
        return word if kind == "front" else self.front

    @property
    def worker(self) -> str:
        """The method whose worker this process is, as NAME,OPTION=VALUE,...; empty for a server."""
        kind, word = self._part()
        return word if kind == "worker" else ""

    @property
    def forwards(self) -> bool:
        """Whether answers come from elsewhere than an engine in this process."""
        return bool(self.fronted) or self.replicas > 1

    def _part(self) -> tuple[str, str]:
        """How `--role` is played, "plug", "front" or "worker", and by what method with what options; else empty."""
        if not self.role:
            return "", ""
        role, *options = self.role.split(",", 1)
        known = {
            name.strip(): (kind, method.name)
            for method in catalog.methods().values()
            for name, _, kind in (part.partition("=") for part in method.traits.get("roles", "").split(","))
            if kind
        }
        if role not in known:
            raise UsageError(f"--role {role} is unknown", remedy=nearest(role, known))
        kind, method = known[role]
        return kind, ",".join([method, *options, *([f"cloud={self.cloud}"] if self.cloud else [])])

    @property
    def title(self) -> str:
        """What is served, in a word."""
        if self.front or self.worker:
            return spelled(self.front or self.role)[0]
        return self.model + (f" as {self.role}" if self.role else "")

    @property
    def queue(self) -> int:
        """Answers that may wait."""
        return 16 * self.max_num_seqs if self.max_queue is None else self.max_queue

    @property
    def cache_bytes(self) -> int | None:
        return int(quantity(self.kv_memory, BYTES, "--kv-memory")) if self.kv_memory else None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def names(written: str) -> list[str]:
    """The parts of a list with commas."""
    return [part for part in (part.strip() for part in written.split(",")) if part]


def _flag(name: str) -> str:
    return name.replace("_", "-")
