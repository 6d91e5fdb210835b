"""Phonebook look-up in text: names and numbers, then the numbers of some of the names (arXiv:2402.01032).

A line ``Batoke Miru: 7123456789`` an entry. Names are made of syllables, all of one length; the surnames of
evaluation books (a quarter of all) are in no training book. Numbers have ten digits, the first of which is
6 to 9.

Chance, of a digit: 0.115 on average; of a number: about 0. The oracle looks the name up in the book.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tasks.recall import draws
from tasks.recall.types import Rows, rows
from tasks.tokenizer import ByteTokenizer

SEPARATOR = ByteTokenizer.separator_id
CONSONANTS, VOWELS = b"bcdfghjklmnprstvwxyz", b"aeiou"
SYLLABLES = np.array([[c, v] for c in CONSONANTS for v in VOWELS])  # 100 of them
FIRST, LAST, DIGITS = 3, 2, 10  # syllables, syllables, digits
NAME = 2 * FIRST + 1 + 2 * LAST
ENTRY = NAME + 2 + DIGITS  # "NAME: DIGITS", without a line end
GROUP = 4  # one in four surnames is for evaluation
SURNAMES = {True: 100 * 100 // GROUP, False: 100 * 100 - 100 * 100 // GROUP}
NEWLINE = ord("\n")


@dataclasses.dataclass
class PhonebookSpec:
    """The law; a size is (L bytes, N entries); L = 0 takes as many as needed.

    "standard" is the book, a blank line, ``shots`` entries once more, a blank line, and then ``asked`` other
    entries whose numbers are to be told. "reversed" announces the names before the book (Waleffe et al. 2024,
    arXiv:2406.07887, section 3.3.2; Arora et al., arXiv:2407.05483). Ids are bytes; a row begins with a
    separator, and padding fills it up.
    """

    order: str = "standard"
    shots: int = 2
    asked: int = 1

    @property
    def vocab_size(self) -> int:
        """Bytes and the separator."""
        return SEPARATOR + 1

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """As many bytes as needed, the separator included, of no more entries than there are names."""
        items = min(items, SURNAMES[True])
        announced = self.asked * (NAME + 1) + 1 if self.order == "reversed" else 0
        shots = self.shots * (ENTRY + 1) + 1 if self.shots else 0
        return 1 + announced + items * (ENTRY + 1) + 1 + shots + self.asked * (ENTRY + 1), items

    def check(self, length: int, items: int) -> None:
        """Raises ValueError: an unknown order, too few names or entries, or too short a row."""
        if self.order not in ("standard", "reversed"):
            raise ValueError(f"order={self.order!r} is unknown; use 'standard' or 'reversed'")
        if self.shots < 0 or self.asked < 1:
            raise ValueError(f"shots={self.shots} must be at least 0 and asked={self.asked} at least 1")
        low, high = self.shots + self.asked, SURNAMES[True]
        if not low <= items <= high:
            raise ValueError(
                f"{items} entries: {low} (shots={self.shots} and asked={self.asked}) to {high} work"
            )
        needed = self.fitted(0, items)[0]
        if length and length < needed:
            raise ValueError(
                f"{length} bytes have no room for {items} entries; {needed} would do, or 0 for "
                "as many as needed"
            )

    def width(self, length: int, items: int) -> int:
        """Syllables of first names, surnames, digits, what is shown again."""
        return items * (FIRST + 1 + DIGITS) + self.shots + self.asked

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """Rows; the distance is that from a digit to the same digit in the book."""
        n, again = len(u), self.shots + self.asked
        of_first, of_last, of_digit, of_choice = draws.split(u, items * FIRST, items, items * DIGITS, again)
        book = np.full((n, items, ENTRY + 1), NEWLINE)
        book[..., :NAME] = _names(of_first.reshape(n, items, FIRST), of_last, held_out)
        book[..., NAME : NAME + 2] = list(b": ")
        digits = draws.integers(of_digit.reshape(n, items, DIGITS), 0, 10)
        digits[..., 0] = draws.integers(of_digit.reshape(n, items, DIGITS)[..., 0], 6, 10)
        book[..., NAME + 2 : ENTRY] = ord("0") + digits
        chosen = draws.distinct(of_choice, items)
        repeated = np.take_along_axis(book, chosen[..., None], 1)
        shown, asked = repeated[:, : self.shots], repeated[:, self.shots :]

        line = np.full((n, 1), NEWLINE)
        parts = [np.full((n, 1), SEPARATOR)]
        if self.order == "reversed":
            names = np.concatenate(
                [asked[..., :NAME], np.broadcast_to(line[..., None], (n, self.asked, 1))], 2
            )
            parts += [names.reshape(n, -1), line]
        start = sum(part.shape[1] for part in parts)  # of the book
        parts += [book.reshape(n, -1), line]
        if self.shots:
            parts += [shown.reshape(n, -1), line]
        first = sum(part.shape[1] for part in parts)  # of the questions
        parts.append(asked.reshape(n, -1))
        text = np.concatenate(parts, axis=1)

        full = max(length, text.shape[1])
        tokens = np.pad(text, ((0, 0), (0, full - text.shape[1])))
        real = np.broadcast_to(np.arange(full) < text.shape[1], tokens.shape)
        # A digit is predicted from the byte before it.
        at = NAME + 1 + np.arange(DIGITS)
        where = (first + (ENTRY + 1) * np.arange(self.asked)[:, None] + at).ravel()
        told = start + (ENTRY + 1) * chosen[:, self.shots :, None] + at
        distance = np.zeros_like(tokens)
        distance[:, where] = where - told.reshape(n, -1)
        return rows(
            tokens,
            np.where(distance > 0, np.roll(tokens, -1, axis=1), 0),
            distance,
            segment_ids=real.astype(np.int64),
            positions=np.where(real, np.arange(full), 0),
        )

    def chance(self, items: int) -> float:
        """Of a random digit, one of four in the first place."""
        return (1 / 4 + (DIGITS - 1) / 10) / DIGITS

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """The next byte, told by the first entry of the book with the same name."""
        found = np.zeros_like(tokens)
        for row, answers in zip(tokens, found):
            text = bytes(row[1 : self.fitted(0, items)[0]].astype(np.uint8).tolist())
            for question in range(self.asked):
                begin = len(text) - (self.asked - question) * (ENTRY + 1)
                told = text.index(text[begin : begin + NAME + 2]) + NAME + 2
                where = 1 + begin + NAME + 1  # the blank, in the row
                answers[where : where + DIGITS] = list(text[told : told + DIGITS])
        return found


def _names(
    of_first: Float[np.ndarray, "n k f"], of_last: Float[np.ndarray, "n k"], held_out: bool
) -> Int[np.ndarray, "n k c"]:
    """Names as bytes; the surnames of a row are different ones."""
    number = draws.distinct(of_last, SURNAMES[held_out])
    kinds = np.array([0]) if held_out else np.arange(1, GROUP)
    one, rest = np.divmod(number, 100 // GROUP * len(kinds))
    fourth, kind = np.divmod(rest, len(kinds))
    other = GROUP * fourth + (kinds[kind] - one) % GROUP  # the two syllables add up to ``kinds`` modulo 4
    first = SYLLABLES[draws.integers(of_first, 0, 100)].reshape(*number.shape, -1)
    last = SYLLABLES[np.stack([one, other], -1)].reshape(*number.shape, -1)
    for part in (first, last):
        part[..., 0] += ord("A") - ord("a")
    blank = np.full((*number.shape, 1), ord(" "))
    return np.concatenate([first, blank, last], axis=-1)
