"use strict";
// What the page knows: the payload as `data`, what is chosen as `state`, and small helpers.

let data;
const state = {
  listed: [],      // answers that pass the filters, in the order of the list
  answer: 0,       // the chosen one, as its place in data.answers
  pinned: null,    // one that stays beside it, likewise
  forward: 0,      // how far the answers shown are denoised
  colour: "step",
  playing: null,   // the timer of playback
  words: "",       // what a server was last asked to search for
  found: new Set(),  // the answers that hold them, by place
};
const $ = (id) => document.getElementById(id);

async function readPayload() {
  const letters = atob($("payload").textContent);
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const payload = JSON.parse(await new Response(stream).text());
  if (payload.served) await readFacts(payload);
  payload.answers.forEach((answer, place) => {
    answer.place = place;
    answer.speed = answer.forwards ? answer.length / answer.forwards : undefined;
  });
  return payload;
}

// An element with a class and children. Texts are only ever set as text, so that none can act as markup.
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.map((child) => (typeof child === "string" ? visible(child) : child)));
  return made;
}

// Control characters, and those that would turn the direction of the text around them, as visible signs.
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (letter) => String.fromCharCode(0x2400 + letter.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g, (letter) =>
      `⟨U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// A text that may be long: its beginning, and the rest once it is asked for.
function longText(text, most = 4000) {
  const shown = element("div", "text", visible(text.slice(0, most)));
  shown.dir = "auto";
  if (text.length > most) {
    const more = element("button", "", `Show all ${text.length.toLocaleString()} characters`);
    more.type = "button";
    more.onclick = () => { shown.textContent = visible(text); };
    shown.append("… ", more);
  }
  return shown;
}

// The text of an answer up to its stop token, at most `most` characters of it.
function answerText(answer, most = Infinity) {
  if (data.served && !answer.isLoaded) return (answer.excerpt ?? "").slice(0, most);
  if (answer.text !== undefined) return answer.text.slice(0, most);
  let text = "";
  for (let i = 0; i < answer.length && text.length < most; i++) text += data.texts[answer.tokens[i]];
  return text.slice(0, most);
}

const threeDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const short = (number) => (number === undefined ? "" : threeDigits.format(number).replace("-", "−"));
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
// What a reward is called: that of an evaluation is the credit that the verifier gave.
const worth = (answer) => (data.sources[answer.source].kind === "evaluation" ? "credit" : "reward");
const lastForward = (answer) => (answer.order ? answer.order.reduce((a, b) => Math.max(a, b), 0) : 0);
const block = (answer, i) => Math.floor((answer.offset + i) / answer.block_size);
const oneLine = (text) => visible(text.replace(/\s+/g, " "));
