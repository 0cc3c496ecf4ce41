"""Pages of the key-value cache: who holds them, and which of them can be found again by what they contain.

A page is held by every sequence whose table names it, and is free when none does. Full pages carry a key: a
cryptographic hash of the page's tokens and of the key before it, beginning with a salt, so that equal keys mean equal
tokens from the first one on, under the same salt. A free page keeps its content and key until it is needed; what was
given back longest ago goes first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b


class BlockPool:
    """`count` pages of `size` tokens each. Knows nothing of what a page's bytes are.

    Attributes:
        references: of each page, how many tables name it.
    """

    def __init__(self, count: int, size: int = 16) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"a pool of {count} pages of {size} tokens holds nothing")
        self.count, self.size = count, size
        self.references = [0] * count
        self._keys: list[bytes | None] = [None] * count  # those of pages in use too, found or not
        self._found: dict[bytes, int] = {}
        self._blank = list(range(count - 1, -1, -1))  # free, with nothing worth keeping; the last one is taken first
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, to be found again; the oldest first

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        return self.count - len(self._blank) - len(self._kept)

    # ---- holding ----

    def allocate(self) -> int:
        """A page of unknown content, held once.

        Raises:
            IndexError: none is free.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            key, self._keys[block] = self._keys[block], None
            assert key is not None
            del self._found[key]
        else:
            raise IndexError("no page is free")
        self.references[block] = 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """Name pages in one more table: a fork's, or that of a sequence whose prefix was found."""
        references = self.references
        for block in blocks:
            if not references[block]:
                del self._kept[block]  # a free page can only have been found
            references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take pages out of one table. Give a sequence's last page first: a prefix is of use without its end."""
        references = self.references
        for block in blocks:
            left = references[block] - 1
            if left < 0:
                raise ValueError(f"page {block} is released and nobody holds it")
            references[block] = left
            if left:
                continue
            key = self._keys[block]
            if key is not None and self._found.setdefault(key, block) == block:
                self._kept[block] = None
            else:  # nothing in it, or another page has the same content
                self._keys[block] = None
                self._blank.append(block)

    def writable(self, block: int) -> tuple[int, tuple[int, int] | None]:
        """A page to write to in place of `block`: itself, or when others hold it too a new one and the copy (from, to).

        Raises:
            IndexError: a new page is needed and none is free.
        """
        if self.references[block] == 1:
            return block, None
        new = self.allocate()
        self.references[block] -= 1
        return new, (block, new)

    # ---- finding ----

    def keys(self, tokens: list[int], salt: bytes, limit: int) -> list[bytes]:
        """Keys of the full pages among the first `limit` tokens. Only pages with the same salt can be found by them."""
        size, key, keys = self.size, _root(salt), []
        for start in range(0, limit - size + 1, size):
            key = _follow(key, tokens[start : start + size])
            keys.append(key)
        return keys

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Pages that hold the longest known beginning. They may be free: `hold` them before anything is allocated."""
        blocks = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, blocks: list[int], tokens: list[int], salt: bytes, first: int, last: int) -> None:
        """Pages first..last-1 of a table are now full, with these tokens, and can be found from here on."""
        size = self.size
        key = self._keys[blocks[first - 1]] if first else _root(salt)
        for i in range(first, last):
            if key is None:  # what came before was forgotten
                return
            key = _follow(key, tokens[i * size : (i + 1) * size])
            self._keys[blocks[i]] = key
            self._found.setdefault(key, blocks[i])

    def forget(self) -> None:
        """No page can be found any more, and none that follows on from a page in use ever will."""
        self._found.clear()
        self._keys = [None] * self.count
        self._blank += self._kept
        self._kept.clear()

    # ---- proof ----

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless the pool is whole and exactly these tables hold its pages."""
        held = Counter(block for table in tables for block in table)
        for block, references in enumerate(self.references):
            assert held[block] == references, f"page {block}: {held[block]} tables, {references} references"
        free = [*self._blank, *self._kept]
        assert len(free) == len(set(free)), "a page is free twice"
        assert {b for b in range(self.count) if not self.references[b]} == set(free), "a free page is lost"
        for key, block in self._found.items():
            assert self._keys[block] == key, f"page {block} is found by a key that is not its own"
        assert all(self._keys[b] is None for b in self._blank), "a page with a key is not kept"
        assert set(self._kept) <= set(self._found.values()), "a page is kept and cannot be found"


def _root(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=32, person=b"salt").digest()


def _follow(key: bytes, tokens: list[int]) -> bytes:
    return blake2b(key + array("q", tokens).tobytes(), digest_size=32).digest()
