import assert from "node:assert/strict";
import test from "node:test";

import { robustRange } from "../../nanovllm/pages/assets/charts/robust_range.js";
import {
  fitScale,
  fraction,
  tickLabels,
  ticks,
} from "../../nanovllm/pages/assets/charts/scales.js";

const linear = (low, high) => ({ low, high, isLog: false });
const logarithmic = (low, high) => ({ low, high, isLog: true });

test("ticks are round", () => {
  const cases = [
    [linear(0, 2000), ["0", "500", "1000", "1500", "2000"]],
    [linear(0, 480_000), ["0", "100k", "200k", "300k", "400k"]],
    [linear(0, 3.1e9), ["0", "1B", "2B", "3B"]],
    [linear(1.58, 4.3), ["2", "3", "4"]],
    [linear(0, 3.2e-5), ["0", "1e-5", "2e-5", "3e-5"]],
    [logarithmic(0.09, 1100), ["0.1", "1", "10", "100", "1000"]],
    [logarithmic(0.9, 12), ["1", "2", "5", "10"]],
    [logarithmic(0.9, 1e12), ["1", "1000", "1M", "1B", "1T"]],
  ];
  for (const [scale, labels] of cases) {
    assert.deepEqual(tickLabels(scale, ticks(scale, 5)), labels);
  }
});

test("ticks of counts are whole", () => {
  assert.deepEqual(ticks(linear(0, 1), 5, 1), [0, 1]);
  assert.deepEqual(ticks(linear(0, 12), 5, 1), [0, 5, 10], "not 2.5");
  assert.deepEqual(ticks(linear(7, 7), 5, 1), [7]);
});

test("every value lies on its axis", () => {
  const lists = [
    [0],
    [1e100, -1e100],
    [3, 3],
    [-5e-324],
    [1e-3, 1e-3 + 1e-12],
    [2, 10],
    [0.1, 1e5],
  ];
  for (const values of lists) {
    for (const fromZero of [false, true]) {
      for (const mayBeLog of [false, true]) {
        const scale = fitScale(values, { fromZero, mayBeLog });
        for (const value of values) {
          const position = fraction(scale, value);
          assert.ok(position >= -1e-6 && position <= 1 + 1e-6, `${value} at ${position}`);
        }
        assert.ok(ticks(scale, 5).length <= 7);
      }
    }
  }
});

test("a wide range is logarithmic where allowed", () => {
  const mayBe = { mayBeLog: true };
  assert.equal(fitScale([0.1, 100], mayBe).isLog, true);
  assert.equal(fitScale([0.1, 100]).isLog, false);
  assert.equal(fitScale([0, 100], mayBe).isLog, false);
  assert.equal(fitScale([2, 10], mayBe).isLog, false);
});

test("a few values far out do not widen the range of the others", () => {
  const values = Array.from({ length: 400 }, (_, index) => -1 + (2 * index) / 399);
  assert.deepEqual(robustRange([...values, 90, -50]), [-1, 1]);
  assert.deepEqual(robustRange(values), [-1, 1]);
  assert.deepEqual(robustRange([3]), [3, 3]);
});
