"""Bodies of requests and answers. Types are strict: `"3"` is no number, `true` is no number, `1.0` is no integer.

A field of OpenAI's that is not supported stands here as `Unsupported`, so that it is refused by name. A field that
nobody knows ends up in `model_extra`, and the answer says so in a header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

_INT64 = 2**63
Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


def _refuse(value: Any) -> Any:
    if value is None or value is False:
        return None
    raise ValueError("this field is not supported here")


def _only(*known: Any) -> Any:
    def check(value: Any) -> Any:
        if value is None or any(value == k and type(value) is type(k) for k in known):
            return value
        raise ValueError(f"only {' or '.join(repr(k) for k in known)} is supported here")

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *known]})]


def _text_list(value: Any) -> Any:
    """One string stands for a list of one, so that a fault has one path."""
    return [value] if isinstance(value, str) else value


_TEXT, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Unsupported = Annotated[Any, BeforeValidator(_refuse), WithJsonSchema({"enum": [None, False]})]
Texts = Annotated[
    list[str],
    BeforeValidator(_text_list),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}),
]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def unknown_fields(given: BaseModel, path: str = "") -> Iterator[str]:
    """Paths of fields that no schema knows, here and in what it holds; one that is null says nothing."""
    for name, value in (given.model_extra or {}).items():
        if value is not None:
            yield path + name
    for name, value in given:
        if name in (given.model_extra or ()):
            continue
        for key, part in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(part, BaseModel):
                yield from unknown_fields(part, f"{path}{name}{'' if key is None else f'[{key}]'}.")


# ---------------------------------------------------------------- what requests share


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: _only(False) = None  # type: ignore[valid-type]

    @field_validator("continuous_usage_stats")
    @classmethod
    def _with_usage(cls, value: Any, info: ValidationInfo) -> Any:
        if value and not info.data.get("include_usage"):
            raise ValueError("it needs include_usage to be true")
        return value


class StructuredOutputs(_Body):
    """One of them: what the answer must match."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    grammar: str | None = None
    choice: Annotated[list[str] | None, Field(min_length=1, max_length=128)] = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(v is not None for v in (self.json_, self.regex, self.grammar, self.choice)) != 1:
            raise ValueError("give one of json, regex, grammar, choice")
        return self


class TextFormat(_Body):
    type: Literal["text"]


class JsonFormat(_Body):
    """`schema` as llama.cpp takes it, `value` as the client of Hugging Face sends it."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    value: dict[str, Any] | None = None

    @field_validator("value")
    @classmethod
    def _one_of_them(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("schema_") is not None:
            raise ValueError("it is the same as schema; give one of them")
        return value


class NamedSchema(_Body):
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(_Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class Knobs(_Body):
    """Of sampling and stopping; the same in chats and completions."""

    model: Name
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None
    min_p: Annotated[float | None, Field(ge=0, lt=1)] = None
    typical_p: Annotated[float | None, Field(gt=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    n: Count | None = None
    stop: Texts | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    user: Annotated[str | None, Field(max_length=512)] = None
    chat_template: Unsupported = None
    shoestring: Unsupported = None

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("it needs stream to be true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _of_a_whole(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("stream"):
            raise ValueError("it is not given in a stream; with echo, logprobs are")
        return value


class Ending(_Body):
    """Where the prompt of a conversation ends: with what begins an answer, or inside the final message."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @field_validator("continue_final_message")
    @classmethod
    def _one_of_them(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("a message that is gone on with is followed by no generation prompt")
        return value

    @property
    def ending(self) -> dict[str, bool]:
        """The same for `Tokenizer.chat`."""
        continued = bool(self.continue_final_message)
        return {
            "add_generation_prompt": self.add_generation_prompt is not False and not continued,
            "continue_final_message": continued,
        }


# ---------------------------------------------------------------- chats


class TextPart(_Body):
    type: Literal["text"]
    text: str


class RefusalPart(_Body):
    type: Literal["refusal"]
    refusal: str


def _known_part(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise ValueError("only parts of type text are supported; nothing is ever fetched")
    if kind is None:
        raise ValueError("a part is an object with a type")
    return value


def _text_or_parts(value: Any) -> Any:
    if value is None or isinstance(value, str | list):
        return value
    raise ValueError("content is a string or a list of parts")


Part = Annotated[
    Annotated[TextPart | RefusalPart, Field(discriminator="type")],
    BeforeValidator(_known_part),
]
Content = Annotated[str | Annotated[list[Part], Field(min_length=1)] | None, BeforeValidator(_text_or_parts)]


class CalledFunction(_Body):
    name: Name
    arguments: str


class ToolCall(_Body):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: Annotated[str | None, Field(max_length=256)] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Annotated[str | None, Field(max_length=256, validate_default=True)] = None
    refusal: str | None = None
    reasoning_content: str | None = None
    audio: Unsupported = None
    function_call: Unsupported = None
    content: Annotated[Content, Field(validate_default=True)] = None

    @field_validator("tool_calls")
    @classmethod
    def _by_the_assistant(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only the assistant calls tools")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_tool(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") == "tool":
            raise ValueError("a message of role tool says which call it answers")
        return value

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: Any, info: ValidationInfo) -> Any:
        given = info.data
        if value is None and not (
            given.get("role") == "assistant" and (given.get("tool_calls") or given.get("refusal"))
        ):
            raise ValueError("a message needs content")
        return value


class Function(_Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


class _Named(_Body):
    name: Name


class NamedTool(_Body):
    type: Literal["function"]
    function: _Named


def _word_or_object(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise ValueError("it is none, auto, required, or an object that names a function")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool | None, BeforeValidator(_word_or_object)]


class ChatRequest(Knobs, Ending):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    safety_identifier: Annotated[str | None, Field(max_length=512)] = None
    prompt_cache_key: Annotated[str | None, Field(max_length=512)] = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None, Field(max_length=16)
    ] = None
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    service_tier: _only("auto", "default") = None  # type: ignore[valid-type]
    reasoning_effort: _only("none") = None  # type: ignore[valid-type]
    verbosity: _only("medium") = None  # type: ignore[valid-type]
    prompt_cache_retention: _only("in_memory", "in-memory") = None  # type: ignore[valid-type]
    store: Unsupported = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    web_search_options: Unsupported = None


# ---------------------------------------------------------------- completions and embeddings


def _prompts(value: Any) -> Any:
    """A text, texts, token ids, or lists of token ids, as a list of texts and lists of ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("it is a text, a list of texts, a list of token ids, or a list of lists of token ids")
    if all(type(item) is int for item in value):
        return [value]
    if all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value):
        return value
    raise ValueError("it is a text, a list of texts, a list of token ids, or a list of lists of token ids")


Prompts = Annotated[
    list[str | Annotated[list[TokenId], Field(min_length=1)]],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [_TEXT, _IDS, *({"type": "array", "items": item, "minItems": 1} for item in (_TEXT, _IDS))]}
    ),
]


class CompletionRequest(Knobs):
    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    best_of: Count | None = None
    suffix: Unsupported = None
    add_special_tokens: bool | None = None


class EmbeddingRequest(_Body):
    model: Name
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: Annotated[str | None, Field(max_length=512)] = None


# ---------------------------------------------------------------- tokens and adapters


class TokenizeRequest(Ending):
    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    model: Name | None = None
    tokens: list[TokenId]


class LoadAdapterRequest(_Body):
    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]


class UnloadAdapterRequest(_Body):
    lora_name: Name


# ---------------------------------------------------------------- answers


class ErrorDetail(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    error: ErrorDetail


class Bill(_Answer):
    """What a request has cost. Seconds by the clock; energy in joules, modelled; money where prices are declared."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    energy_joules: float
    energy_low: float
    energy_high: float
    energy_status: Literal["modelled"]
    energy_method: str
    money: float | None = None
    currency: str | None = None


class PromptDetails(_Answer):
    cached_tokens: int


class AnswerDetails(_Answer):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageAnswer(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails
    shoestring: Bill


class TopLogprob(_Answer):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprobAnswer(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    content: list[TokenLogprobAnswer]
    refusal: None = None


class PromptLogprob(_Answer):
    """Rank 1 is the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class AnswerMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Answer):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None


class ChatAnswer(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Mapping[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionAnswer(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class Embedding(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Answer):
    prompt_tokens: int
    total_tokens: int
    shoestring: Bill


class EmbeddingAnswer(_Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelAnswer(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelsAnswer(_Answer):
    object: Literal["list"]
    data: list[ModelAnswer]


class TokensAnswer(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TextAnswer(_Answer):
    prompt: str


class AdapterAnswer(_Answer):
    id: str
    object: Literal["model"]
    loaded: bool


# ---------------------------------------------------------------- files and fine-tuning

PageLimit = Annotated[int, Query(ge=1, le=10000)]
_Auto = Literal["auto"] | None


class Hyperparameters(_Body):
    n_epochs: Annotated[int, Field(ge=1, le=1000)] | _Auto = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | _Auto = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | _Auto = None

    @field_validator("*")
    @classmethod
    def _own(cls, value: Any) -> Any:
        return None if value == "auto" else value


class Supervised(_Body):
    hyperparameters: Hyperparameters | None = None


class TuningMethod(_Body):
    type: Literal["supervised"]
    supervised: Supervised | None = None
    dpo: Unsupported = None
    reinforcement: Unsupported = None


class FineTuningRequest(_Body):
    model: Name
    training_file: Name
    validation_file: Name | None = None
    suffix: Annotated[str | None, Field(max_length=64)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    method: TuningMethod | None = None
    hyperparameters: Hyperparameters | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None, Field(max_length=16)
    ] = None
    integrations: _only([]) = None  # type: ignore[valid-type]

    @field_validator("hyperparameters")
    @classmethod
    def _one_of_them(cls, value: Any, info: ValidationInfo) -> Any:
        method = info.data.get("method")
        if value and method and method.supervised and method.supervised.hyperparameters not in (None, value):
            raise ValueError("they differ from those of the method; give one")
        return value

    @property
    def chosen(self) -> Hyperparameters:
        """Those of the method, else those given as in earlier versions of the interface."""
        own = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        return own or self.hyperparameters or Hyperparameters()


class Upload(_Body):
    """The fields of a form, to tell which are unknown."""

    file: str
    purpose: str


class FileAnswer(_Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    expires_at: int | None
    status_details: str | None


class _Page(_Answer):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FilesAnswer(_Page):
    data: list[FileAnswer]


class FileGone(_Answer):
    id: str
    object: Literal["file"]
    deleted: bool


class ModelGone(_Answer):
    id: str
    object: Literal["model"]
    deleted: bool


class TuningError(_Answer):
    code: str
    message: str
    param: str | None


class FineTuningAnswer(_Answer):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: TuningError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, int | float | str]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: dict[str, Any]


class FineTuningList(_Page):
    """Of jobs, of their events, or of their checkpoints."""

    data: list[dict[str, Any]]
