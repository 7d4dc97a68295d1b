"""What goes wrong in step 10."""

from nanovllm.learn.checking import Mistake

_COUNTS = "range(1, min(3, len(data)) + 1)"
_DECODED = 'return data[:end].decode("utf-8", errors="replace")'
_FLUSH = '        pending, self._pending = self._pending, b""\n'
_ENDS = """        ends = [
            (text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
"""
_RELEASED = "released = len(text) - num_held(text, self._stops)"
_LENGTHS = "for length in range(1, len(stop))"
_CUT = "return text[: end - len(stop)], stop"

_LENGTH = """if 0xC2 <= first <= 0xDF:
        return 2
    if 0xE0 <= first <= 0xEF:
        return 3
    return 4 if 0xF0 <= first <= 0xF4 else 1"""
_FLUSHED = 'return pending.decode("utf-8", errors="replace")'
_ENDS_WITH = "if text.endswith(stop[:length])"

MISTAKES = (
    Mistake(
        "taken off until it decodes",
        "Bytes are taken off until the rest decodes. What can never become a character does "
        "not wait: find the last first byte, and compare its length with the bytes there are.",
        f"for count in {_COUNTS}:",
        "for count in range(4):\n        try:\n            data[: len(data) - count].decode()\n"
        "            return count\n        except UnicodeDecodeError:\n            pass\n"
        "    for count in range(0):",
    ),
    Mistake(
        "number that lacks",
        "The number of bytes that are still to come is returned. Return the number of those "
        "that are there.",
        "return count if count <",
        "return _length(first) - count if count <",
    ),
    Mistake(
        "complete characters wait",
        "All bytes from 0x80 on at the end are counted, also those of a complete character. "
        "Compare with the length that the first byte tells.",
        f"for count in {_COUNTS}:",
        "count = 0\n    while count < len(data) and data[-count - 1] >= 0x80:\n        count += 1\n"
        "    return count\n    for count in range(0):",
    ),
    Mistake(
        "more bytes than there are",
        "There may be fewer than three bytes: data[-3] of two bytes is an IndexError.",
        _COUNTS,
        "range(1, 4)",
    ),
    Mistake(
        "slice for a byte",
        "data[-count:] is `bytes`. data[-count] is the number of one byte.",
        "first = data[-count]",
        "first = data[-count:]",
    ),
    Mistake(
        "three bytes without a first one",
        "Three bytes from 0x80 to 0xBF wait. They are the end of a complete character of 4 "
        "bytes, or nothing: a character lacks at most 3 bytes, and its first one is there.",
        "    return 0\n\n\ndef _length",
        "    return min(3, len(data))\n\n\ndef _length",
    ),
    Mistake(
        "0xC0 begins a character",
        "0xC0 and 0xC1 are never the first byte of a character; 0xC2 is the lowest of two bytes.",
        "0xC2 <= first",
        "0xC0 <= first",
    ),
    Mistake(
        "all high bytes begin a character",
        "0xC0, 0xC1 and 0xF5 to 0xFF are never the first byte, so they need not wait.",
        _LENGTH,
        "return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4",
    ),
    Mistake(
        "minus nothing",
        "Where no byte is incomplete, data[:-0] is empty. Use data[: len(data) - n].",
        "end = len(data) - num_incomplete(data)",
        "end = -num_incomplete(data)",
    ),
    Mistake(
        "pending grows",
        "Bytes that were released are kept and released again. Keep only those of the "
        "incomplete character.",
        "self._pending = data[end:]",
        "self._pending = data",
    ),
    Mistake(
        "bytes returned",
        "`push` returns bytes. Decode them.",
        _DECODED,
        "return data[:end]",
    ),
    Mistake(
        "new bytes alone counted",
        "num_incomplete is given the new bytes alone. Put the pending ones before them first.",
        "data = self._pending + data\n        end = len(data) - num_incomplete(data)",
        "end = len(self._pending) + len(data) - num_incomplete(data)\n"
        "        data = self._pending + data",
    ),
    Mistake(
        "flush raises",
        '`flush` raises an exception for an incomplete character. Decode with errors="replace".',
        _FLUSHED,
        "return pending.decode()",
    ),
    Mistake(
        "one mark a byte",
        "`flush` returns U+FFFD for each byte. An incomplete character becomes one: decode its "
        'bytes with errors="replace".',
        _FLUSHED,
        "return '\\ufffd' * len(pending)",
    ),
    Mistake(
        "flush without bytes",
        '`flush` returns None where nothing waits. Return "".',
        _FLUSHED,
        _FLUSHED + " or None",
    ),
    Mistake(
        "whole stop string held",
        "A whole stop string is counted too. It has ended; only a beginning that lacks its end "
        "waits.",
        _LENGTHS,
        "for length in range(1, len(stop) + 1)",
    ),
    Mistake(
        "stops at the first difference",
        'The loop ends at the first length that does not match. "</" ends with "</" though not '
        'with "<": try all lengths.',
        _ENDS_WITH,
        "if all(text.endswith(stop[:part]) for part in range(1, length + 1))",
    ),
    Mistake(
        "first stop string decides",
        "The first stop string decides. Take the longest end of the text over all of them.",
        "for stop in stops\n",
        "for stop in stops[:1]\n",
    ),
    Mistake(
        "within the stop string",
        "The end of the text is looked for anywhere in the stop string. It must be its beginning.",
        _ENDS_WITH,
        "if text[-length:] in stop",
    ),
    Mistake(
        "end of the stop string",
        "The end of the text is compared with the end of the stop string. Compare with its "
        "beginning.",
        _ENDS_WITH,
        "if text.endswith(stop[-length:])",
    ),
    Mistake(
        "maximum of nothing",
        "max() of nothing is a ValueError, for a text with no such end or without stop "
        "strings: default=0.",
        "        default=0,\n",
        "",
    ),
    Mistake(
        "only at the end",
        "A stop string is found only where the text ends with it. More may follow in the same "
        "piece.",
        _ENDS,
        _ENDS.replace("if stop in text", "if text.endswith(stop)"),
    ),
    Mistake(
        "text alone",
        "`push` returns the text alone. It returns two things: the text, and the stop string "
        "or None.",
        "return text[:released], None",
        "return text[:released]",
    ),
    Mistake(
        "True for the stop string",
        "`push` returns whether a stop string was found. Return the string itself.",
        _CUT,
        _CUT.replace(", stop", ", True"),
    ),
    Mistake(
        "all text kept",
        "Released text is kept and released again. Keep only what is held back.",
        "self._held = text[released:]",
        "self._held = text",
    ),
    Mistake(
        "flush without held text",
        '`flush` returns None. Return the held text, which may be "".',
        "        return held\n",
        "        return held or None\n",
    ),
    Mistake(
        "flush returns two things",
        "`flush` returns two things. It returns the held text alone.",
        "        return held\n",
        "        return held, None\n",
    ),
    Mistake(
        "half characters",
        "Each piece is decoded alone, so a character over two pieces becomes two U+FFFD. Keep the "
        "bytes of an incomplete character for the next call.",
        "end = len(data) - num_incomplete(data)",
        "end = len(data)",
    ),
    Mistake(
        "half characters dropped",
        "The bytes of an incomplete character are dropped. Keep them for the next call.",
        "        self._pending = data[end:]\n",
        "",
    ),
    Mistake(
        "wrong order",
        "The pending bytes come before the new ones.",
        "data = self._pending + data",
        "data = data + self._pending",
    ),
    Mistake(
        "only the last byte",
        "Only the last byte is examined. Of a character of 4 bytes, 1, 2 or 3 may have arrived.",
        _COUNTS,
        "range(1, min(1, len(data)) + 1)",
    ),
    Mistake(
        "only the last two bytes",
        "Only the last two bytes are examined. Of a character of 4 bytes, 3 may have arrived.",
        _COUNTS,
        "range(1, min(2, len(data)) + 1)",
    ),
    Mistake(
        "one character behind",
        "A complete character waits for the next one. It can be released when its last byte "
        "arrives.",
        "return count if count < _length(first) else 0",
        "return count if count <= _length(first) > 1 else 0",
    ),
    Mistake(
        "everything behind the first incomplete character",
        "All bytes are kept until they are UTF-8 as a whole. Complete characters before an "
        "incomplete one can be released.",
        "end = len(data) - num_incomplete(data)",
        "end = 0 if num_incomplete(data) else len(data)",
    ),
    Mistake(
        "flush loses bytes",
        "`flush` drops an incomplete character at the end; it becomes U+FFFD.",
        '        return pending.decode("utf-8", errors="replace")',
        '        return ""',
    ),
    Mistake(
        "flush repeats",
        "`flush` keeps the pending bytes, so a second call returns them again.",
        _FLUSH,
        "        pending = self._pending\n",
    ),
    Mistake(
        "errors raise",
        "Bytes that are not UTF-8 raise an exception. A model may generate any bytes: decode with "
        'errors="replace".',
        _DECODED,
        "return data[:end].decode()",
    ),
    Mistake(
        "errors ignored",
        'Bytes that are not UTF-8 vanish (errors="ignore"). They become U+FFFD.',
        _DECODED,
        'return data[:end].decode("utf-8", errors="ignore")',
    ),
    Mistake(
        "waits for what never comes",
        "A byte that cannot begin a character is kept as if its rest could follow: 0xC0, 0xC1 and "
        "0xF5 to 0xFF are never the first byte.",
        "return 4 if 0xF0 <= first <= 0xF4 else 1",
        "return 4 if 0xF0 <= first else 1",
    ),
    Mistake(
        "nothing held back",
        "The text is released at once, so the beginning of a stop string is shown before its end "
        "arrives. Hold back what may become one.",
        _RELEASED,
        "released = len(text)",
    ),
    Mistake(
        "held back without end",
        "All text is held back. Release what cannot be the beginning of a stop string. Where "
        "nothing is held back, text[:-0] is empty: use text[: len(text) - n].",
        _RELEASED,
        "released = 0",
    ),
    Mistake(
        "too much held back",
        "As many characters are held back as the longest stop string has, less one. Hold back only "
        "an end of the text with which a stop string begins.",
        _RELEASED,
        "released = max(0, len(text) - max(map(len, self._stops), default=1) + 1)",
    ),
    Mistake(
        "one character held back",
        "Only the first character of a stop string is held back. It may be there up to its last "
        "character but one.",
        _LENGTHS,
        "for length in range(1, min(2, len(stop)))",
    ),
    Mistake(
        "shortest beginning",
        "The shortest end of the text with which a stop string begins is held back; it is the "
        "longest that matters.",
        "    return max(\n",
        "    return min(\n",
    ),
    Mistake(
        "one character too few",
        "A stop string that lacks only its last character is not held back.",
        _LENGTHS,
        "for length in range(1, len(stop) - 1)",
    ),
    Mistake(
        "stop string over two pieces",
        "A stop string is searched in the new piece alone. It may have begun in an earlier one.",
        f"        text = self._held + text\n{_ENDS}",
        _ENDS + "        text = self._held + text\n",
    ),
    Mistake(
        "held text lost",
        "Held text that does not become a stop string is lost. Put it before the new text.",
        "text = self._held + text",
        "text = text",
    ),
    Mistake(
        "held and released",
        "Held text is released too, and again with the next piece.",
        "return text[:released], None",
        "return text, None",
    ),
    Mistake(
        "stop string released",
        "The stop string is part of the released text. The text ends before it.",
        _CUT,
        "return text[:end], stop",
    ),
    Mistake(
        "text behind the stop string",
        "What follows the stop string is kept and returned by `flush`. It is dropped.",
        f'            self._held = ""\n            {_CUT}',
        f"            self._held = text[end:]\n            {_CUT}",
    ),
    Mistake(
        "held text behind the stop string",
        "The held text stays after a stop string, and `flush` returns it.",
        f'            self._held = ""\n            {_CUT}',
        f"            {_CUT}",
    ),
    Mistake(
        "first of the list",
        "The first stop string of the list is taken, although another ends before it in the text.",
        "end, _, stop = min(ends)",
        "end, _, stop = ends[0]",
    ),
    Mistake(
        "the one that begins first",
        "The stop string that begins first is taken. Take the one that ends first: with text that "
        "arrives in other pieces the other would not be complete yet.",
        "end, _, stop = min(ends)",
        "end, _, stop = min(ends, key=lambda one: (one[0] + one[1], one[1]))",
    ),
    Mistake(
        "shortest of those that end there",
        "Of the stop strings that end at one place the shortest is taken. Take the longest: its "
        "beginning would be shown otherwise.",
        "end, _, stop = min(ends)",
        "end, _, stop = min(ends, key=lambda one: (one[0], -one[1]))",
    ),
    Mistake(
        "last occurrence",
        "The last occurrence of a stop string is taken (rindex); the text ends at the first.",
        "text.index(stop) + len(stop)",
        "text.rindex(stop) + len(stop)",
    ),
    Mistake(
        "flush loses the held text",
        "`flush` returns nothing. Text that was held back and did not become a stop string belongs "
        "to the answer.",
        "        return held\n",
        '        return ""\n',
    ),
    Mistake(
        "flush repeats the held text",
        "`flush` keeps the held text, so a second call returns it again.",
        '        held, self._held = self._held, ""\n',
        "        held = self._held\n",
    ),
)
