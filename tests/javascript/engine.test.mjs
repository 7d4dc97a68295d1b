/** What the engine view remembers of the server, and how it follows it. */

import assert from "node:assert/strict";
import test from "node:test";

import { followEvents } from "../../nanovllm/pages/assets/engine/engine_stream.js";
import { createHistory, createNames } from "../../nanovllm/pages/assets/engine/replay.js";
import {
  countRepeats,
  findBest,
  withoutChance,
} from "../../nanovllm/pages/assets/inspection/head_kinds.js";

const step = (number) => ({ step: number });

test("a replay shows no state of a later step", () => {
  const history = createHistory();
  assert.equal(history.shown(), null);
  history.loadSteps([1, 2, 5, 6].map(step));
  for (const number of [2, 6]) history.addFrame({ step: number });
  assert.equal(history.shown().state.step, 6);
  const seen = [];
  for (let move = 0; move < 4; move += 1) {
    history.move(-1);
    const { state, record, isEarlier } = history.shown();
    seen.push([record.step, state.step, isEarlier]);
  }
  assert.deepEqual(seen, [
    [5, 2, false],
    [2, 2, false],
    [1, 2, true],
    [1, 2, true],
  ]);
  history.move(9);
  assert.equal(history.watched, null, "live");
});

test("steps that frames have omitted can be loaded, and a new server begins a new history", () => {
  const history = createHistory();
  history.loadSteps([1, 2].map(step));
  history.addFrame({ step: 6, steps: [step(6)], last_step: step(7) });
  assert.equal(history.hasUnloadedGap(), true);
  history.loadSteps([1, 2, 3, 4, 5, 6, 7].map(step));
  assert.equal(history.hasUnloadedGap(), false);
  assert.equal(history.loadedUntil(), 7);
  history.watch(3);
  history.addFrame({ step: 1, steps: [step(1)] });
  assert.deepEqual(history.steps(), [step(1)]);
  assert.equal(history.watched, null);
});

test("requests have short names, also in reasons", () => {
  const names = createNames();
  assert.equal(names.name("3-cmpl-abcdef"), "#1");
  assert.equal(names.name("4-cmpl-abcdef", 2), "#2.2");
  assert.equal(
    names.sentence("waits for 3-cmpl-abcdef and 9-cmpl-abcdef"),
    "Waits for #1 and 9-cmpl-abcdef.",
  );
  assert.deepEqual([...names.ids()], ["3-cmpl-abcdef", "4-cmpl-abcdef"]);
});

/** Follow a stream that always fails, and return the waits before each new attempt. */
async function waitsAfter(status, attempts) {
  const real = globalThis.setTimeout;
  const waits = [];
  const ending = new AbortController();
  const failures = [];
  try {
    await new Promise((resolve) => {
      globalThis.setTimeout = (wake, milliseconds, value) => {
        waits.push(milliseconds);
        if (waits.length < attempts) queueMicrotask(() => wake(value));
        else resolve();
      };
      const api = {
        stream: () => ({
          [Symbol.asyncIterator]: () => ({
            next: () => Promise.reject(Object.assign(new Error("no"), { status })),
          }),
        }),
      };
      const { retry } = followEvents({
        api,
        signal: ending.signal,
        onopen: async () => {},
        onevents: () => {},
        onfailure(_error, isFinal) {
          failures.push(isFinal);
          if (!isFinal) return;
          if (failures.length === attempts) resolve();
          else queueMicrotask(() => queueMicrotask(() => queueMicrotask(() => retry(false))));
        },
      });
    });
  } finally {
    globalThis.setTimeout = real;
    ending.abort();
  }
  return { waits, failures };
}

test("a stream that fails is opened again after longer and longer waits", async () => {
  for (const status of [0, 429, 500]) {
    const { waits, failures } = await waitsAfter(status, 7);
    assert.deepEqual(waits, [2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000], String(status));
    assert.ok(failures.every((isFinal) => !isFinal));
  }
});

test("a stream that is refused is opened again only by the reader", async () => {
  const { waits, failures } = await waitsAfter(403, 3);
  assert.deepEqual(waits, []);
  assert.deepEqual(failures, [true, true, true]);
});

test("an induction head is named only for a prompt that repeats", () => {
  const tokens = (text) => [...text].map((id) => ({ id }));
  assert.equal(countRepeats(tokens("abc")), 0);
  assert.equal(countRepeats(tokens("abcab")), 2);
  assert.equal(countRepeats(tokens("aab")), 0, "not the token just before");
  const heads = [
    { induction: 0.2, self: null },
    { induction: 0.7, self: null },
  ];
  assert.equal(findBest(heads).induction, heads[1]);
  assert.equal("self" in findBest(heads), false);
  assert.equal("induction" in findBest(withoutChance(heads, 4)), false);
  assert.equal(withoutChance(heads, 5), heads);
});
