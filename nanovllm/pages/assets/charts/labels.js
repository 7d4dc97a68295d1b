/** Labels of points that overlap neither each other, nor marked points, nor a dense cloud. */

const GAP_PX = 6; // between a point and its label
const ASCENT_PX = 11;
const DESCENT_PX = 4;
const MARGIN_PX = 3; // around a label
const SPACE_PX = 5; // around a marked point
const MAX_COVERED = 2; // other points below a label, unless its point is marked
const CELL_PX = 8;

/**
 * @typedef {{left: number, top: number, right: number, bottom: number}} Box
 * @typedef {{x: number, y: number, isMarked: boolean, isRequired: boolean}} Candidate
 */

/**
 * Return the labels that fit into an area, in the order of the points: each is on the first free
 * side of its point, and is left out if there is none. A required label is never left out.
 * @template {Candidate} T
 * @param {T[]} candidates in the order of their importance
 * @param {{width: number, height: number, most: number, widthOf: (candidate: T) => number,
 *   obstacles?: Box[]}} options `most` labels at most; obstacles stand above the points
 * @returns {{candidate: T, x: number, y: number}[]} the start of each label's baseline
 */
export function placeLabels(candidates, { width, height, most, widthOf, obstacles = [] }) {
  const marked = candidates.filter(({ isMarked }) => isMarked);
  const taken = [...obstacles, ...marked.map(spaceOf)];
  const covered = counter(candidates);
  const placed = [];
  for (const candidate of candidates) {
    if (placed.length >= most) break;
    const labelWidth = widthOf(candidate);
    /** @param {Box} box */
    const isFree = (box) =>
      box.left >= 0 &&
      box.right <= width &&
      box.top >= 0 &&
      box.bottom <= height &&
      (candidate.isMarked || covered(box) <= MAX_COVERED) &&
      !taken.some((other) => overlaps(box, other));
    const sides = sidesOf(candidate, labelWidth);
    let box = sides.find(isFree);
    if (!box && candidate.isRequired) box = moveInside(sides[0], width, height);
    if (!box) continue;
    taken.push(box);
    placed.push({ candidate, x: box.left + MARGIN_PX, y: box.bottom - MARGIN_PX - DESCENT_PX });
  }
  return placed;
}

/** Return whether two boxes overlap. @param {Box} one @param {Box} other */
export function overlaps(one, other) {
  return (
    one.left < other.right &&
    other.left < one.right &&
    one.top < other.bottom &&
    other.top < one.bottom
  );
}

/**
 * Return a function that counts the points in a box, in whole cells.
 * @param {{x: number, y: number}[]} points
 */
function counter(points) {
  /** @type {Map<string, number>} */
  const counts = new Map();
  /** @param {number} value */
  const cell = (value) => Math.floor(value / CELL_PX);
  for (const { x, y } of points) {
    const key = `${cell(x)} ${cell(y)}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  return (/** @type {Box} */ { left, top, right, bottom }) => {
    let count = 0;
    for (let x = cell(left + MARGIN_PX); x <= cell(right - MARGIN_PX); x += 1) {
      for (let y = cell(top + MARGIN_PX); y <= cell(bottom - MARGIN_PX); y += 1) {
        count += counts.get(`${x} ${y}`) ?? 0;
      }
    }
    return count;
  };
}

/**
 * Return the box of a marked point, which only its own label may touch.
 * @param {{x: number, y: number}} point
 */
function spaceOf({ x, y }) {
  return { left: x - SPACE_PX, top: y - SPACE_PX, right: x + SPACE_PX, bottom: y + SPACE_PX };
}

/**
 * Return boxes of a label: right and left of its point and, if it is marked, above and below.
 * @param {Candidate} candidate
 * @param {number} width
 */
function sidesOf({ x, y, isMarked }, width) {
  const half = (ASCENT_PX + DESCENT_PX) / 2;
  /** @param {number} left @param {number} middle */
  const boxAt = (left, middle) => ({
    left: left - MARGIN_PX,
    top: middle - half - MARGIN_PX,
    right: left + width + MARGIN_PX,
    bottom: middle + half + MARGIN_PX,
  });
  const offset = GAP_PX + half + 1;
  const beside = [boxAt(x + GAP_PX + MARGIN_PX, y), boxAt(x - GAP_PX - MARGIN_PX - width, y)];
  if (!isMarked) return beside;
  return [...beside, boxAt(x - width / 2, y - offset), boxAt(x - width / 2, y + offset)];
}

/**
 * Return a box moved into the area.
 * @param {Box} box
 * @param {number} width
 * @param {number} height
 */
function moveInside(box, width, height) {
  const right = Math.max(Math.min(0, width - box.right), -box.left);
  const down = Math.max(Math.min(0, height - box.bottom), -box.top);
  return {
    left: box.left + right,
    top: box.top + down,
    right: box.right + right,
    bottom: box.bottom + down,
  };
}
