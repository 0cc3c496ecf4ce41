"""The pool of pages: counting, finding, and a long random life beside a simple model of it."""

from __future__ import annotations

import random

import pytest

from shoestring.engine.blocks import BlockPool
from shoestring.engine.runner import BLOCK

TOKENS = list(range(100, 200))


def filled(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """A table whose full pages hold `tokens` and can be found."""
    blocks = [pool.allocate() for _ in range(-(-len(tokens) // pool.size))]
    pool.register(blocks, tokens, salt, 0, len(tokens) // pool.size)
    return blocks


def find(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    return pool.match(pool.keys(tokens, salt, len(tokens)))


def test_pages_are_as_large_as_the_kernels_want_them() -> None:
    assert BlockPool(1).size == BLOCK


def test_pages_go_round() -> None:
    pool = BlockPool(4, 2)
    blocks = [pool.allocate() for _ in range(4)]
    assert sorted(blocks) == [0, 1, 2, 3] and pool.free == 0 and pool.used == 4
    with pytest.raises(IndexError, match="no page is free"):
        pool.allocate()
    pool.release([2])
    assert pool.allocate() == 2
    with pytest.raises(ValueError, match="nobody holds"):
        pool.release([1, 1])


@pytest.mark.parametrize("count, size", [(0, 16), (4, 0), (-1, 1)])
def test_an_empty_pool_is_refused(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(count, size)


def test_the_longest_known_beginning_is_found() -> None:
    pool = BlockPool(16, 4)
    blocks = filled(pool, TOKENS[:14])
    assert find(pool, TOKENS[:14]) == find(pool, TOKENS) == blocks[:3]  # the last page is not full
    assert find(pool, TOKENS[:11]) == blocks[:2]
    assert find(pool, TOKENS[:3]) == find(pool, [1, *TOKENS]) == find(pool, TOKENS[4:]) == []
    assert find(pool, [*TOKENS[:6], 0, *TOKENS[7:]]) == blocks[:1]
    assert pool.keys(TOKENS, b"", 11) == pool.keys(TOKENS[:11], b"", 11)


def test_a_page_is_found_only_after_the_same_tokens_and_under_the_same_salt() -> None:
    pool = BlockPool(32, 4)
    one, two = filled(pool, TOKENS[:8], b"one"), filled(pool, TOKENS[:8], b"two")
    other = filled(pool, [0, 0, 0, 0, *TOKENS[4:8]], b"one")
    assert find(pool, TOKENS[:8], b"one") == one and find(pool, TOKENS[:8], b"two") == two
    assert find(pool, [0, 0, 0, 0, *TOKENS[4:8]], b"one") == other
    assert find(pool, TOKENS[:8]) == find(pool, TOKENS[:8], b"three") == []


def test_token_ids_do_not_run_together() -> None:
    pool = BlockPool(32, 2)
    filled(pool, [1, 256])
    for tokens in ([257, 0], [0, 257], [256, 1], [1, 0], [1 << 40, 256]):
        assert find(pool, tokens) == []


def test_free_pages_keep_their_content_and_the_oldest_goes_first() -> None:
    pool = BlockPool(5, 4)
    first, second = filled(pool, TOKENS[:8]), filled(pool, TOKENS[20:28])
    pool.release(reversed(first))
    pool.release(reversed(second))
    assert pool.used == 0 and find(pool, TOKENS[:8]) == first
    assert pool.allocate() == 4  # the only one without content
    assert pool.allocate() == first[1]  # the end of what was given back first
    assert find(pool, TOKENS[:8]) == first[:1] and find(pool, TOKENS[20:28]) == second
    pool.hold(first[:1])
    pool.release(first[:1])  # used again, so younger than the second
    assert [pool.allocate(), pool.allocate()] == [second[1], second[0]]
    assert find(pool, TOKENS[:8]) == first[:1] and find(pool, TOKENS[20:28]) == []


def test_the_same_content_twice() -> None:
    pool = BlockPool(4, 4)
    one, two = filled(pool, TOKENS[:8]), filled(pool, TOKENS[:8])
    assert find(pool, TOKENS[:8]) == one
    pool.release(reversed(two))
    pool.check([one])
    assert find(pool, TOKENS[:8]) == one
    assert {pool.allocate(), pool.allocate()} == set(two)
    pool.release(two)
    pool.release(reversed(one))
    pool.check([])


def test_a_second_copy_takes_the_place_of_the_first() -> None:
    pool = BlockPool(4, 4)
    one, two = filled(pool, TOKENS[:8]), filled(pool, TOKENS[:8])
    pool.release(reversed(one))
    assert {pool.allocate(), pool.allocate()} == set(one) and find(pool, TOKENS[:8]) == []
    pool.release(reversed(two))
    assert find(pool, TOKENS[:8]) == two
    pool.check([one])


def test_writing_to_a_shared_page() -> None:
    pool = BlockPool(3, 4)
    block = pool.allocate()
    assert pool.writable(block) == (block, None)
    pool.hold([block])
    new, copy = pool.writable(block)
    assert new != block and copy == (block, new)
    assert pool.references[block] == pool.references[new] == 1
    pool.check([[block], [new]])
    pool.hold([block])
    pool.allocate()
    with pytest.raises(IndexError):
        pool.writable(block)
    assert pool.references[block] == 2


def test_forgetting() -> None:
    pool = BlockPool(8, 4)
    used, free = filled(pool, TOKENS[:12]), filled(pool, TOKENS[20:28])
    pool.release(reversed(free))
    pool.forget()
    assert find(pool, TOKENS[:8]) == find(pool, TOKENS[20:28]) == []
    fresh = filled(pool, TOKENS[:8])
    pool.register(used, TOKENS[:12], b"", 2, 3)  # it goes on where something forgotten ended
    assert find(pool, TOKENS[:12]) == fresh
    pool.check([used, fresh])


def test_the_proof_finds_faults() -> None:
    for spoil in (
        lambda p, b: p.references.__setitem__(b[0], 2),
        lambda p, b: p._blank.append(b[0]),
        lambda p, b: p._blank.append(p._blank[0]),
        lambda p, b: p._blank.pop(),
        lambda p, b: p._keys.__setitem__(b[0], b"x"),
        lambda p, b: p._found.clear() or p.release(b[:0]) or p._kept.__setitem__(p._blank.pop(), None),
    ):
        pool = BlockPool(8, 4)
        blocks = filled(pool, TOKENS[:8])
        pool.check([blocks])
        spoil(pool, blocks)
        with pytest.raises(AssertionError):
            pool.check([blocks])


@pytest.mark.parametrize("seed", range(20))
def test_a_random_life(seed: int) -> None:
    """Content by content: whatever is found holds exactly the tokens that were looked for, under their salt."""
    rng = random.Random(seed)
    pool = BlockPool(rng.choice([6, 20]), 2)
    content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # page: salt and all tokens up to its end
    tables: list[list[int]] = []
    hits = 0
    for _ in range(1500):
        if tables and rng.random() < 0.5:
            table = tables.pop(rng.randrange(len(tables)))
            if rng.random() < 0.3:
                pool.hold(table)
                tables += [table.copy(), table]
            else:
                pool.release(reversed(table))
        elif rng.random() < 0.01:
            pool.forget()
        else:
            salt = rng.choice([b"a", b"b"])
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            found = find(pool, tokens, salt)
            for i, block in enumerate(found):
                assert content[block] == (salt, tuple(tokens[: 2 * i + 2]))
            hits += len(found)
            new = -(-len(tokens) // 2) - len(found)
            if new + sum(not pool.references[b] for b in found) <= pool.free:
                pool.hold(found)
                table = found + [pool.allocate() for _ in range(new)]
                for i in range(len(found), len(tokens) // 2):
                    content[table[i]] = salt, tuple(tokens[: 2 * i + 2])
                pool.register(table, tokens, salt, len(found), len(tokens) // 2)
                tables.append(table)
        pool.check(tables)
    assert hits > 100
