"""huffman: bfloat16 numbers to the bit, their exponents as Huffman codes. `shoestring.kernels.huffman` has the bytes.

The format
    8 bits of sign and mantissa, the entropy of the exponents and some hundredths (2.66 bits in trained models), and a
    fifth of a bit that makes every block of 4096 bytes readable by itself.
Products
    Those of the plain bfloat16 weight. There are no kernels that multiply from the codes: a file is what it is for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoestring.core.errors import UsageError
from shoestring.kernels import huffman, ops, reference
from shoestring.kernels.formats._format import Format, Tensors

_SCATTERED = 8  # so many rows of a hundred are found one by one; for more all are read


class Huffman(Format):
    """`huffman/4096`: a matrix of 4096 bytes."""

    rounds = False

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        reference.check_matrix(weight)
        bits = weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
        return {"weight": torch.from_numpy(huffman.pack(bits))}

    def unpack(self, tensors: Tensors, cols: int) -> Tensor:
        return self._tensor(self._open(tensors, cols).decode(threads=ops.threads()), tensors)

    def bound(self, tensors: Tensors, cols: int) -> Tensor:
        return self.unpack(tensors, cols).abs() * 2.0**-8

    def rows(self, tensors: Tensors, ids: Tensor, cols: int) -> Tensor:
        coded = self._open(tensors, cols)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < coded.rows:
            raise UsageError(f"Rows {int(ids.min())}..{int(ids.max())} do not all lie in a matrix of {coded.rows} rows")
        wanted, place = np.unique(ids.cpu().numpy(), return_inverse=True)
        if 100 * len(wanted) > _SCATTERED * coded.rows:
            found = coded.decode(threads=ops.threads())[wanted]
        else:
            found = np.concatenate([coded.decode(int(row), 1) for row in wanted] or [np.zeros((0, cols), np.uint16)])
        return self._tensor(found[place.reshape(-1)], tensors)

    def _open(self, tensors: Tensors, cols: int) -> huffman.Coded:
        return huffman.unpack(tensors["weight"].detach().cpu().numpy(), None, cols)

    def _tensor(self, bits: np.ndarray, tensors: Tensors) -> Tensor:
        made = torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16)
        return made.to(tensors["weight"].device).float()


FORMAT = Huffman
