/**
 * The bytes and texts of token ids.
 *
 * A token is a sequence of bytes, which need not be valid UTF-8. The server spells each byte as one
 * printable character, as GPT-2's vocabulary does; this module turns spellings into bytes.
 */

import { escapedBytes, visibleText, wordAround } from "../elements/format.js";

const BYTE_OF = byteAlphabet();
const encoder = new TextEncoder();

/** Return the byte of each character of GPT-2's alphabet. */
function byteAlphabet() {
  const bytes = new Map();
  let next = 256;
  for (let byte = 0; byte < 256; byte += 1) {
    const isPrintable =
      (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
    bytes.set(String.fromCharCode(isPrintable ? byte : next), byte);
    if (!isPrintable) next += 1;
  }
  return bytes;
}

/** @typedef {ReturnType<typeof createVocabulary>} Vocabulary */

/**
 * Return all tokens of the model. They are loaded once, before the first tokens are shown.
 * @param {Pick<typeof import("./api.js"), "get">} api
 */
export function createVocabulary(api) {
  /** @type {Uint8Array[]} */
  let spelled = [];
  /** @type {Promise<void> | null} */
  let loading = null;

  async function fetchTokens() {
    const { tokens } = await api.get("v1/engine/vocabulary", { isCacheable: true });
    spelled = tokens.map(spelledBytes);
  }
  /** Return the bytes of a token. @param {number} id */
  const bytes = (id) => spelled[id] ?? new Uint8Array();
  /** Return the text of a token, or null if its bytes are not UTF-8 alone. @param {number} id */
  const text = (id) => decode(bytes(id));

  /** Return a token in one line: its text with visible white space, or its bytes. @param {number} id */
  function label(id) {
    const known = text(id);
    return known === null ? escapedBytes(bytes(id)) : visibleText(known);
  }

  return {
    bytes,
    label,
    /** Load the vocabulary, unless that is done or under way. */
    load() {
      loading ??= fetchTokens().catch((error) => {
        loading = null;
        throw error;
      });
      return loading;
    },
    /** Return a token of some in its word. @param {number[]} ids @param {number} index */
    word: (ids, index) =>
      wordAround(index, ids.length, (each) => ({ text: text(ids[each]), label: label(ids[each]) })),
    /** Return the text of tokens; bytes that are no UTF-8 become U+FFFD. @param {number[]} ids */
    join(ids) {
      const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
      const parts = ids.map((id) => decoder.decode(bytes(id), { stream: true }));
      return parts.join("") + decoder.decode();
    },
  };
}

/** @param {string} name a token as the server spells it */
function spelledBytes(name) {
  const bytes = [];
  for (const character of name) {
    const byte = BYTE_OF.get(character);
    if (byte === undefined) bytes.push(...encoder.encode(character));
    else bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

/** Return the text of bytes, or null if they are not valid UTF-8. @param {Uint8Array} bytes */
export function decode(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}
