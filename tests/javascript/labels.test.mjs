import assert from "node:assert/strict";
import test from "node:test";

import { placeLabels } from "../../nanovllm/pages/assets/charts/labels.js";

/** Return numbers from 0 to 1 that look random (a linear congruential generator). */
function* randomNumbers(state = 1) {
  for (;;) {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    yield state / 2 ** 31;
  }
}

test("labels of points do not overlap", () => {
  const random = randomNumbers();
  const next = () => random.next().value * 300;
  const points = Array.from({ length: 300 }, (_, index) => ({
    x: next(),
    y: next(),
    isMarked: index < 20,
    isRequired: index === 0,
  }));
  const options = { width: 300, height: 300, most: 40, widthOf: () => 50 };
  const placed = placeLabels(points, options);
  const indices = placed.map(({ candidate }) => points.indexOf(candidate));
  assert.equal(indices[0], 0, "the required label");
  assert.ok(placed.length > 10 && placed.length <= 40);
  assert.deepEqual(
    indices,
    [...indices].sort((a, b) => a - b),
    "in the order of the points",
  );
  placed.forEach(({ x, y }, index) => {
    assert.ok(x >= 0 && x <= 250 && y >= 11 && y <= 300);
    for (const other of placed.slice(index + 1)) {
      assert.ok(Math.abs(other.x - x) >= 50 || Math.abs(other.y - y) >= 15);
    }
  });
});
