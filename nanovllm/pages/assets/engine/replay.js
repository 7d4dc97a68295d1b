/**
 * What the engine view remembers: step records, and the frames of the event stream.
 *
 * @typedef {{id: string, choice: number, state: "running" | "waiting", phase: string,
 *   reason: string | null, prompt?: string, prompt_tokens: number, computed_tokens: number,
 *   reused_tokens: number, output_tokens: number, max_tokens: number, num_blocks: number,
 *   preemptions: number, age_s: number}} Request
 * @typedef {{id: string, choice: number, start: number, count: number, kind: string,
 *   drafted?: number, accepted?: number}} Sequence
 * @typedef {{step: number, duration_s: number, num_tokens: number, num_prompt_tokens: number,
 *   num_decode_tokens: number, sequences: Sequence[], admitted: string[],
 *   cache_hits: {id: string, tokens: number}[], preempted: {id: string, reason: string}[],
 *   finished: {id: string, reason: string}[]}} StepRecord
 * @typedef {{step: number, requests: Request[], requests_omitted: number, is_paused: boolean,
 *   can_control: boolean, steps?: StepRecord[], last_step?: StepRecord | null,
 *   [name: string]: any}} State a frame, as GET /v1/engine/state
 * @typedef {ReturnType<typeof createHistory>} History
 * @typedef {ReturnType<typeof createNames>} Names
 */

const MAX_STEPS = 512;
const MAX_FRAMES = 300;
const MAX_NAMES = 10000;

/**
 * Return an empty history. `watched` is the number of the step that is shown; null is live.
 */
export function createHistory() {
  /** @type {Map<number, StepRecord>} step records by number, oldest first */
  const steps = new Map();
  /** @type {State[]} oldest first */
  let frames = [];
  /** @type {number | null} */
  let watched = null;
  let loadedUntil = 0;
  let newestMs = 0; // when the newest frame came

  /** @param {StepRecord[]} records */
  function addSteps(records) {
    const all = [...steps.values(), ...records.filter(({ step }) => !steps.has(step))];
    all.sort((a, b) => a.step - b.step);
    steps.clear();
    for (const record of all.slice(-MAX_STEPS)) steps.set(record.step, record);
  }

  return {
    /**
     * Keep all steps that the server has recorded. A gap before the last one stays.
     * @param {StepRecord[]} records
     */
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
    /**
     * Keep a frame of the event stream. A restarted server begins a new history.
     * @param {State} frame
     */
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
    /** @param {number} number */
    step: (number) => steps.get(number) ?? null,
    frames: () => frames,
    get watched() {
      return watched;
    },
    /** Show a step, or the newest state with null. @param {number | null} step */
    watch(step) {
      watched = step;
    },
    /**
     * Show the step `count` after the one that is shown; the newest is live.
     * @param {number} count
     */
    move(count) {
      const numbers = [...steps.keys()];
      if (!numbers.length) return;
      const from = watched === null ? numbers.length - 1 : numbers.indexOf(watched);
      const next = Math.max(from + count, 0);
      watched = next >= numbers.length - 1 ? null : numbers[next];
    },
    /**
     * Return the newest state, and the state and the step to show. Between frames, the state is the last one recorded
     * before the step. `isEarlier` is true where the step is older than all states.
     */
    shown() {
      const newest = frames.at(-1);
      if (!newest) return null;
      const last = watched ?? Infinity;
      const state = frames.findLast(({ step }) => step <= last);
      const record = watched === null ? [...steps.values()].at(-1) : steps.get(watched);
      return {
        newest,
        state: state ?? frames[0],
        record: record ?? null,
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
  /** @param {string} id */
  const numberOf = (id) => {
    const number = numbers.get(id) ?? last + 1;
    last = Math.max(last, number);
    numbers.set(id, number);
    const [oldest] = numbers.keys();
    if (numbers.size > MAX_NAMES) numbers.delete(oldest);
    return number;
  };
  return {
    /** Return the ids of the requests that have a name. */
    ids: () => numbers.keys(),
    /** Return the number of the request's colour. @param {string} id */
    color: (id) => (numberOf(id) - 1) % 8,
    /**
     * Return a short name such as #12, or #12.1 for the second choice.
     * @param {string} id
     * @param {number} [choice]
     */
    name: (id, choice = 0) => (choice ? `#${numberOf(id)}.${choice}` : `#${numberOf(id)}`),
    /**
     * Return a reason as a sentence, with the names of known requests for their ids.
     * @param {string} reason
     */
    sentence: (reason) => {
      const text = reason.replace(/[\w-]{6,}/g, (part) =>
        numbers.has(part) ? `#${numbers.get(part)}` : part,
      );
      return `${text[0].toUpperCase()}${text.slice(1)}${/[.!]$/.test(text) ? "" : "."}`;
    },
  };
}
