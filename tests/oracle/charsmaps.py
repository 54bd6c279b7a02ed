"""Replacements as SentencePiece stores them: a trie in one array, then the replacements.

Source: SentencePiece's `precompiled_charsmap`, and the array of its darts-clone.
"""

import struct
import unicodedata

HAS_VALUE = 1 << 8
VALUE = 1 << 31


class Array:
    """Units of 32 bits: a label, a mark that a value is among the children, the children's offset."""

    def __init__(self):
        self.units, self.bases, self.first = {0: 0}, {0}, 1

    def base(self, labels):
        """The first free place whose children are all free."""
        while all(self.first ^ label in self.units for label in range(256)):
            self.first += 1
        base = self.first
        while base in self.bases or any(base ^ label in self.units for label in labels):
            base += 1
        self.bases.add(base)
        return base

    def place(self, at, node):
        base = self.base(node.keys())
        self.units[at] = self.units.get(at, 0) | (at ^ base) << 10 | (HAS_VALUE if 0 in node else 0)
        for label in node:
            self.units[base ^ label] = VALUE | node[0] if label == 0 else label
        for label, child in node.items():
            if label != 0:
                self.place(base ^ label, child)

    def packed(self):
        size = (max(self.units) // 256 + 1) * 256
        return struct.pack(f"<{size}I", *(self.units.get(at, 0) for at in range(size)))


def charsmap(replacements):
    """The bytes of a map from texts to what replaces them."""
    texts, trie = bytearray(), {}
    for text, replacement in sorted(replacements.items()):
        node = trie
        for byte in text.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)
        texts += replacement.encode() + b"\0"
    array = Array()
    array.place(0, trie)
    packed = array.packed()
    return struct.pack("<I", len(packed)) + packed + bytes(texts)


def compatible(dice, most):
    """Some of NFKC's replacements, spaces for other white space, nothing for control characters."""
    changed = [c for c in map(chr, range(0x20, 0x2FA1E)) if not 0xD800 <= ord(c) <= 0xDFFF]
    changed = [c for c in changed if unicodedata.normalize("NFKC", c) != c]
    replacements = {c: unicodedata.normalize("NFKC", c) for c in dice.sample(changed, most)}
    composed = [c for c in map(chr, range(0xC0, 0x250)) if unicodedata.normalize("NFD", c) != c]
    replacements |= {unicodedata.normalize("NFD", c): c for c in composed}
    replacements |= {c: " " for c in "\t\n\r\u00a0\u2003\u3000\u200b"}
    return replacements | {chr(code): "" for code in [1, 2, 7, 0x1B, 0x7F, 0xAD, 0xFEFF]}
