/** What the engine view remembers: step records, and the frames of the event stream. */

const MAX_STEPS = 512;
const MAX_FRAMES = 300;
const MAX_NAMES = 10000;

/**
 * Return an empty history. `watched` is the number of the step that is shown; null is live.
 */
export function createHistory() {
  /** @type {Map<number, any>} step records by number, oldest first */
  const steps = new Map();
  /** @type {any[]} states of the engine, oldest first */
  let frames = [];
  /** @type {number | null} */
  let watched = null;
  let loadedUntil = 0;
  let newestMs = 0; // when the newest frame came

  /** @param {any[]} records */
  function addSteps(records) {
    const all = [...steps.values(), ...records.filter(({ step }) => !steps.has(step))];
    all.sort((a, b) => a.step - b.step);
    steps.clear();
    for (const record of all.slice(-MAX_STEPS)) steps.set(record.step, record);
  }

  return {
    /** Keep all steps that the server has recorded. A gap before the last one stays. */
    loadSteps(records) {
      addSteps(records);
      loadedUntil = records.at(-1)?.step ?? 0;
    },
    /** The last of the steps whose gaps are steps that the server has not recorded. */
    loadedUntil: () => loadedUntil,
    /** Whether frames have omitted steps that have not been loaded since. */
    hasUnloadedGap() {
      const numbers = [...steps.keys()];
      return numbers.some(
        (step, index) => index && step > loadedUntil && step > numbers[index - 1] + 1,
      );
    },
    /** The time since the newest frame came. */
    ageOfNewestS: () => (performance.now() - newestMs) / 1000,
    /** Keep a frame of the event stream. A restarted server begins a new history. */
    addFrame(frame) {
      const last = frames.at(-1);
      if (last && frame.step < last.step) {
        steps.clear();
        frames = [];
        watched = null;
        loadedUntil = 0;
      }
      if (last && frame.step === last.step && frames.length) frames.pop();
      frames.push(frame);
      newestMs = performance.now();
      if (frames.length > MAX_FRAMES) frames.shift();
      const records = frame.steps ?? [];
      addSteps(frame.last_step ? [...records, frame.last_step] : records);
    },
    steps: () => [...steps.values()],
    step: (number) => steps.get(number) ?? null,
    frames: () => frames,
    get watched() {
      return watched;
    },
    /** Show a step, or the newest state with null. @param {number | null} step */
    watch(step) {
      watched = step;
    },
    /** Show the step `count` after the one that is shown; the newest is live. */
    move(count) {
      const numbers = [...steps.keys()];
      if (!numbers.length) return;
      const from = watched === null ? numbers.length - 1 : numbers.indexOf(watched);
      const next = Math.max(from + count, 0);
      watched = next >= numbers.length - 1 ? null : numbers[next];
    },
    /**
     * Return the state and the step to show. Between frames, the state is the last one recorded
     * before the step. `isEarlier` is true where the step is older than all states.
     */
    shown() {
      if (!frames.length) return null;
      if (watched === null)
        return {
          state: frames.at(-1),
          record: [...steps.values()].at(-1) ?? null,
          isEarlier: false,
        };
      const state = frames.findLast(({ step }) => step <= watched);
      return {
        state: state ?? frames[0],
        record: steps.get(watched) ?? null,
        isEarlier: state === undefined,
      };
    },
  };
}

/**
 * Return names and colours of requests. A request keeps them while the page is open.
 */
export function createNames() {
  /** @type {Map<string, number>} */
  const numbers = new Map();
  let last = 0;
  const numberOf = (id) => {
    if (!numbers.has(id)) numbers.set(id, (last += 1));
    if (numbers.size > MAX_NAMES) numbers.delete(numbers.keys().next().value);
    return numbers.get(id);
  };
  return {
    /** Return the ids of the requests that have a name. */
    ids: () => numbers.keys(),
    /** Return the number of the request's colour. @param {string} id */
    color: (id) => (numberOf(id) - 1) % 8,
    /** Return a short name such as #12, or #12.1 for the second choice. */
    name: (id, choice = 0) => (choice ? `#${numberOf(id)}.${choice}` : `#${numberOf(id)}`),
    /** Return a reason as a sentence, with the names of known requests for their ids. */
    sentence: (reason) => {
      const text = reason.replace(/[\w-]{6,}/g, (part) =>
        numbers.has(part) ? `#${numbers.get(part)}` : part,
      );
      return `${text[0].toUpperCase()}${text.slice(1)}${/[.!]$/.test(text) ? "" : "."}`;
    },
  };
}
