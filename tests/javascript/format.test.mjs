import assert from "node:assert/strict";
import test from "node:test";

import {
  formatCompact,
  formatElapsed,
  formatPercent,
  shortNumber,
  tokenLabel,
  visibleText,
  wordAround,
} from "../../nanovllm/pages/assets/elements/format.js";

const cases = (format, pairs) => () => {
  for (const [value, text] of pairs) assert.equal(format(value), text);
};

test(
  "large numbers have a suffix",
  cases(formatCompact, [
    [0, "0"],
    [12_345, "12.3k"],
    [999_960, "1.00M"],
    [124_439_808, "124M"],
    [2.05e9, "2.05B"],
    [3e15, "3000T"],
  ]),
);

test(
  "times have their two largest units",
  cases(formatElapsed, [
    [0.04, "0.0 s"],
    [9.96, "10 s"],
    [59.6, "1 min 00 s"],
    [75, "1 min 15 s"],
    [3599.7, "1 h 00 min"],
    [7500, "2 h 05 min"],
    [400_000, "4 d 15 h"],
  ]),
);

test(
  "numbers are short",
  cases(shortNumber, [
    [0, "0"],
    [3e-5, "3e-5"],
    [0.001, "0.001"],
    [21_400, "21400"],
    [1.23456789, "1.2346"],
    [1e20, "1e20"],
  ]),
);

test(
  "a probability below one is never shown as one",
  cases(formatPercent, [
    [1, "100.0\u202F%"],
    [0.9999, ">99.9\u202F%"],
    [0.0123, "1.2\u202F%"],
    [1e-9, "1e-7\u202F%"],
    [0, "0\u202F%"],
  ]),
);

test("invisible characters of a token are visible", () => {
  assert.equal(visibleText(" a\n\t\u200B\x1F"), "␣a↵⇥\\u{200B}\\x1F");
  assert.equal(visibleText(""), "∅");
  assert.equal(tokenLabel({ id: 1, text: "\uFFFD", bytes: "ff0a" }), "\\xFF\\x0A");
});

test("a token is shown in the word that contains it", () => {
  const texts = ["The", " str", "ang", "ers", ":\n", null, "x", ..."abcdef"];
  const read = (index) => ({ text: texts[index], label: visibleText(texts[index] ?? "byte") });
  const shown = texts.map((_, index) => {
    const { before, token, after } = wordAround(index, texts.length, read);
    return `${before}[${token}]${after}`;
  });
  assert.deepEqual(shown.slice(0, 4), [
    "[The]",
    "[␣str]angers:↵",
    "str[ang]ers:↵",
    "strang[ers]:↵",
  ]);
  assert.equal(shown[5], "[byte]xabc…");
  assert.equal(shown.at(-1), "…bcde[f]");
});
