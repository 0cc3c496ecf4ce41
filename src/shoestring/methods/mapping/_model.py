"""A real model on the accelerator, token by token, and the same integers computed plainly beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoestring.methods.mapping import _numbers as numbers
from shoestring.methods.mapping._compiler import Program, buckets, compile_step
from shoestring.methods.mapping._interpreter import Machine
from shoestring.methods.mapping._ir import MATRICES, Network, described, network_of
from shoestring.methods.mapping._memory import Memory, write
from shoestring.methods.mapping._numbers import Array
from shoestring.methods.mapping._sparse import Packed, pack
from shoestring.methods.mapping._targets import BLOCK, Target
from shoestring.methods.mapping._templates import OURS, Schedule


@dataclass(eq=False)
class Weights:
    """A model's numbers as the accelerator takes them.

    Attributes:
        matrices: (role, layer) -> integers; the head has layer -1.
        norms: (which, layer) -> fp16 [hidden].
        table: fp16 [vocab, hidden], which the host looks tokens up in.
        cosines, sines: fp16 [positions, head size]; the first half of a sine's row is negated.
    """

    network: Network
    matrices: dict[tuple[str, int], Packed]
    norms: dict[tuple[str, int], Array]
    table: Array
    cosines: Array
    sines: Array

    def matrix(self, role: str, layer: int) -> Packed:
        return self.matrices[role, layer]


def read(
    path: Path, *, bits: int = 4, keeps: dict[str, float] | None = None, layers: int | None = None,
    positions: int = 256, head_bits: int = 8,
) -> Weights:  # fmt: skip
    """The first `layers` layers of a Llama-like model, pruned and rounded.

    Args:
        keeps: role -> share of its weights to keep; 1 where it is not named.
        head_bits: 0 leaves the head out.

    Raises:
        UsageError: an operator without a template, or a model that cannot be read.
    """
    from shoestring.models.tensors import floats, open_source

    source = open_source(path)
    model = described(source)
    network = network_of(model)
    layers = network.layers if layers is None else layers

    def tensor(role: str, layer: int = 0) -> Array:
        return floats(source.tensors[model.name(role, layer) + ".weight"])

    matrices, norms = {}, {}
    for layer in range(layers):
        for role in MATRICES:
            packed = pack(tensor(role, layer), bits=bits, keep=(keeps or {}).get(role, 1.0))
            if role == "q":  # scores are scaled where queries are made
                packed.scales[:] *= np.float32(model.attention_scale)
            matrices[role, layer] = packed
        for which, role in (("attention", "attention_norm"), ("mlp", "mlp_norm")):
            norms[which, layer] = tensor(role, layer).astype(np.float16)
    table = tensor("embedding")
    norms["final", -1] = tensor("final_norm").astype(np.float16)
    if head_bits:
        matrices["head", -1] = pack(table if model.tied else tensor("head"), bits=head_bits)
    cosines, sines = (t.astype(np.float16) for t in model.tables(positions))
    return Weights(
        network, matrices, norms, table.astype(np.float16), np.concatenate([cosines, cosines], -1),
        np.concatenate([-sines, sines], -1),
    )  # fmt: skip


@dataclass
class Accelerated:
    """A model on the interpreted accelerator. Programs are made for the bucket a length falls into."""

    weights: Weights
    target: Target
    layers: int
    capacity: int = 256
    schedule: Schedule = OURS
    seed: int | None = 0
    exact: bool = False  # a program for each length of prompt, not for its bucket
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.image: Array = np.zeros(0, np.uint8)
        self.filled: set[str] = set()
        self.programs: dict[tuple[str, int], Program] = {}
        self.position = 0

    def prefill(self, ids: Array) -> Array:
        """Logits behind a prompt, fp16 [vocab]."""
        length = len(ids) if self.exact else buckets("prefill", len(ids), self.capacity)
        blocks, hidden = -(-length // BLOCK), self.weights.network.hidden
        program = self.program("prefill", length)
        rows = np.zeros((blocks * BLOCK, hidden), np.float16)
        rows[: len(ids)] = self.weights.table[ids]
        tiled = rows.reshape(blocks, BLOCK, -1, BLOCK).transpose(0, 2, 1, 3)
        self.put(f"prefill{length}.x", tiled)
        Machine(program, self.image).run((len(ids) - 1) // BLOCK, self.seed)
        self.position = len(ids)
        block = (len(ids) - 1) // BLOCK if self.schedule.all_rows else 0
        vocab = self.weights.network.vocab
        logits = self.get(f"prefill{length}.logits", np.float16).reshape(-1, vocab // BLOCK, BLOCK, BLOCK)
        return np.ascontiguousarray(logits[block, :, (len(ids) - 1) % BLOCK]).reshape(-1)

    def decode(self, token: int) -> Array:
        """Logits behind one more token, fp16 [vocab]."""
        length = buckets("decode", self.position + 1, self.capacity)
        program = self.program("decode", length)
        self.put(f"decode{length}.x", self.weights.table[token])
        Machine(program, self.image).run(self.position, self.seed)
        self.position += 1
        return self.get(f"decode{length}.logits", np.float16).copy()

    def program(self, mode: str, length: int) -> Program:
        if (mode, length) not in self.programs:
            made = compile_step(
                self.weights.network, self.target, mode, length, self.weights.matrix, schedule=self.schedule,
                layers=self.layers, capacity=self.capacity, memory=self.memory,
            )  # fmt: skip
            self.programs[mode, length] = made
            self.image = np.concatenate([self.image, np.zeros(self.memory.size - len(self.image), np.uint8)])
            for key, placed in made.placed.items():
                if str(key) not in self.filled:
                    placed.fill(self.image)
                    self.filled.add(str(key))
            for (which, layer), weight in self.weights.norms.items():
                if f"norm.{which}.{layer}" in self.memory.regions:
                    self.put(f"norm.{which}.{layer}", weight)
            for name, table in (("cos", self.weights.cosines), ("sin", self.weights.sines)):
                table = table[: self.capacity]
                if mode == "prefill":
                    table = table.reshape(-1, BLOCK, table.shape[1] // BLOCK, BLOCK).transpose(0, 2, 1, 3)
                self.put(f"{mode}.{name}", table)
        return self.programs[mode, length]

    def put(self, region: str, values: Array) -> None:
        write(self.image, self.memory[region], values)

    def get(self, region: str, kind: type) -> Array:
        begin, size = self.memory.regions[region]
        return self.image[begin : begin + size].view(kind)


@dataclass
class Reference:
    """The same model without blocks, buffers or instructions: whole matrices, row after row."""

    weights: Weights
    layers: int

    def __post_init__(self) -> None:
        self.keys: list[list[tuple[Array, Array]]] = [[] for _ in range(self.layers)]
        self.values: list[list[tuple[Array, Array]]] = [[] for _ in range(self.layers)]
        self.position = 0

    def prefill(self, ids: Array) -> Array:
        for token in ids:
            logits = self.decode(int(token))
        return logits

    def decode(self, token: int) -> Array:
        w, n = self.weights, self.weights.network
        x = w.table[token][None]
        cosines, sines = w.cosines[self.position], w.sines[self.position]
        for layer in range(self.layers):
            h = numbers.rmsnorm(x, w.norms["attention", layer], n.epsilon)
            q = numbers.turned(self.times("q", layer, h).reshape(n.heads, -1), cosines, sines)
            k = numbers.turned(self.times("k", layer, h).reshape(n.kv_heads, -1), cosines, sines)
            self.keys[layer].append(numbers.rounded(k.reshape(-1)))
            self.values[layer].append(numbers.rounded(self.times("v", layer, h).reshape(-1)))
            c = np.concatenate([self.attend(layer, head, q[head]) for head in range(n.heads)])[None]
            x = numbers.add(x, self.times("o", layer, c))
            h = numbers.rmsnorm(x, w.norms["mlp", layer], n.epsilon)
            g = numbers.mul(numbers.silu(self.times("gate", layer, h)), self.times("up", layer, h))
            x = numbers.add(x, self.times("down", layer, g))
        self.position += 1
        return self.times("head", -1, numbers.rmsnorm(x, w.norms["final", -1], n.epsilon))[0]

    def times(self, role: str, layer: int, x: Array) -> Array:
        matrix = self.weights.matrix(role, layer)
        rows, scale = numbers.rounded(x)
        return numbers.scaled(numbers.product(rows, matrix.integers), scale, matrix.scales)

    def attend(self, layer: int, head: int, q: Array) -> Array:
        n = self.weights.network
        part = slice(head // n.group * n.head_dim, (head // n.group + 1) * n.head_dim)
        keys = np.stack([k[part] for k, _ in self.keys[layer]])
        values = np.stack([v[part] for v, _ in self.values[layer]])
        k_scale = np.array([s for _, s in self.keys[layer]], np.float32)
        v_scale = np.array([s for _, s in self.values[layer]], np.float16)
        rows, scale = numbers.rounded(q[None])
        scores = numbers.scaled(numbers.product(rows, keys), scale, k_scale)
        weights = numbers.mul(numbers.softmax(scores, np.array([len(keys)])), v_scale)
        rows, scale = numbers.rounded(weights)
        return numbers.scaled(numbers.product(rows, values.T), scale, np.ones(n.head_dim, np.float32))[0]
