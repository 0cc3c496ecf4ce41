"""Lay short rows end to end so that fewer tokens are padding, and check that a model keeps them apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

from shoestring.core.errors import UsageError


def pack_rows(rows: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """Rows of up to `max_length` tokens, each holding whole rows end to end (best fit, longest first).

    `position_ids` start again at 0 with each original row: models read from them where one ends. The first label of
    each original row is -100, so no token is predicted from another row. Order follows the first row of each pack.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens free, pack
    for index in sorted(range(len(rows)), key=lambda index: (-len(rows[index]["input_ids"]), index)):
        size = len(rows[index]["input_ids"])
        place = bisect_left(room, (size, -1))
        if place < len(room):
            free, pack = room.pop(place)
        else:
            free, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - size, pack))
    return [_joined([rows[index] for index in sorted(pack)]) for pack in sorted(packs, key=min)]


def _joined(rows: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (-100, *row["labels"][1:])],
        "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
    }


def check_packing(model: Any) -> None:
    """Run the model on short rows packed and apart.

    Raises:
        UsageError: the packed rows see each other, so training on packed rows would teach from the wrong context.
    """
    import torch

    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(0, vocabulary, (1, size), generator=generator).to(device) for size in (5, 5, 7)
    )
    positions = torch.tensor([[*range(5), *range(7)]], device=device)

    def packed(before: Any) -> Any:
        ids = torch.cat([before, second], 1)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 5:].float()

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=second, use_cache=False).logits.float()
            after_first, after_other = packed(first), packed(other)
    except (TypeError, ValueError) as error:
        raise _mixes(model, str(error)) from None
    finally:
        model.train(training)
    # Two packs of one length are computed alike to the last bit, so any difference is the neighbour's.
    if (after_first - after_other).abs().max() > 1e-5 * alone.abs().max():
        raise _mixes(model, "its output for a row depends on the row that stands before it")
    # Rounding differs with the length of a row; positions that do not start again change far more.
    difference = (after_first - alone).norm() / alone.norm().clamp_min(1e-12)
    if not difference < 0.02:
        raise _mixes(model, f"its output for a row changes by {difference:.1%} when another stands before it")


def _mixes(model: Any, why: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} does not keep packed rows apart with the attention "
        f"{getattr(model.config, '_attn_implementation', 'it uses')}",
        why,
        "Train without packing",
    )
