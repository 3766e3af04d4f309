// The tokens of an answer: drawn once, then masked, lit and coloured as slider and choices say.

const COLOURS = {
  step: { name: "denoising step in its block", low: "step 1", high: "last step" },
  order: { name: "forward that revealed it", low: "first", high: "last" },
  probability: { name: "probability when revealed", low: "1", high: "0" },
  logprob: { name: "log-prob when revealed", low: "0", high: "−5 or less" },
  entropy: { name: "entropy when revealed", low: "0", high: "3 nats or more" },
};
const LEAST_LOGPROB = -5;  // from there on the scale is at its end
const MOST_ENTROPY = 3;    // likewise

// The colours that there are numbers for: entropies are recorded on demand.
function offeredColours() {
  const hasEntropy = data.hasEntropy ?? data.answers.some((answer) => answer.entropies);
  return Object.keys(COLOURS).filter((name) => name !== "entropy" || hasEntropy);
}

// Where each token is on a colour's scale, from 0 to 1.
function shares(answer, colour) {
  if (colour === "probability") return answer.logprobs.map((logprob) => 1 - Math.exp(logprob));
  if (colour === "logprob") return answer.logprobs.map((logprob) => Math.min(1, logprob / LEAST_LOGPROB));
  if (colour === "entropy") return answer.tokens.map((_, i) => Math.min(1, (answer.entropies?.[i] ?? 0) / MOST_ENTROPY));
  const numbers = colour === "step" ? answer.steps : answer.order;
  const last = Math.max(2, numbers.reduce((a, b) => Math.max(a, b), 0));
  return numbers.map((number) => (Math.max(1, number) - 1) / (last - 1));
}

function numberOf(answer, i, colour) {
  if (answer.steps[i] === 0) return "";
  if (colour === "probability") return Math.exp(answer.logprobs[i]).toFixed(2);
  if (colour === "logprob") return answer.logprobs[i].toFixed(2).replace("-", "−");
  if (colour === "entropy") return answer.entropies?.[i].toFixed(2) ?? "";
  return String(colour === "step" ? answer.steps[i] : answer.order[i]);
}

// The tokens of an answer in spans, a span for each block around them.
function drawTokens(answer) {
  const shown = element("div", "tokens");
  shown.tabIndex = 0;
  shown.dir = "auto";
  shown.setAttribute("aria-label", "Tokens of the answer");
  let span;
  let at = -1;
  answer.tokens.forEach((text, i) => {
    if (block(answer, i) !== at) {
      at = block(answer, i);
      span = element("span", "block");
      shown.append(span);
    }
    // Line breaks stand behind the number, so that it is on the token's own line.
    const [, beginning, end] = data.texts[text].match(/^([^]*?)(\n*)$/);
    const glyphs = element("span", "", ...signs(beginning, end.length));
    const token = element("span", "token", glyphs, element("span", "number"), end);
    token.dataset.i = i;
    if (answer.steps[i] === 0) token.classList.add("held");
    if (i >= answer.length) token.classList.add("tail");
    span.append(token);
  });
  shown.answer = answer;
  colourTokens(shown);
  maskTokens(shown);
  return shown;
}

// A token's text with signs for what cannot be seen: ↵ for a line break, · for nothing. breaks: how many end it.
function signs(text, breaks) {
  if (text === "") return [element("span", "sign", breaks ? "↵".repeat(breaks) : "·")];
  const parts = [];
  visible(text).split("\n").forEach((line, n) => {
    if (n) parts.push(element("span", "sign", "↵"), "\n");
    parts.push(line);
  });
  if (breaks) parts.push(element("span", "sign", "↵".repeat(breaks)));
  return parts;
}

function colourTokens(shown) {
  const { answer } = shown;
  shown.classList.remove(...Object.keys(COLOURS).map((name) => `by-${name}`));
  shown.classList.add(`by-${state.colour}`);
  const share = shares(answer, state.colour);
  for (const token of shown.querySelectorAll(".token")) {
    const i = Number(token.dataset.i);
    token.style.setProperty("--share", share[i].toFixed(3));
    token.querySelector(".number").textContent = numberOf(answer, i, state.colour);
  }
}

// Hide what is revealed after the forward of the slider, and light what it reveals.
function maskTokens(shown) {
  const { answer } = shown;
  const isOver = state.forward >= lastForward(answer);
  for (const token of shown.querySelectorAll(".token")) {
    const order = answer.order[Number(token.dataset.i)];
    token.classList.toggle("masked", order > state.forward);
    token.classList.toggle("new", !isOver && order > 0 && order === state.forward);
  }
}

// Numbers of a token, beside it: for the mouse and for the keyboard.
function showTip(token) {
  const { answer } = token.closest(".tokens");
  const i = Number(token.dataset.i);
  const tip = $("tip");
  const isMasked = token.classList.contains("masked");
  const text = data.texts[answer.tokens[i]];
  const name = isMasked ? "masked" : JSON.stringify(visible(text)).slice(0, 80);
  const lines = [`token ${i + 1} of ${answer.tokens.length}, in block ${block(answer, i) - block(answer, 0) + 1}`];
  if (answer.steps[i] === 0) lines.push("held from the start: part of a hint");
  else {
    lines.push(`revealed at forward ${answer.order[i]}, step ${answer.steps[i]} of its block`);
    lines.push(`probability ${short(Math.exp(answer.logprobs[i]))}, log-prob ${short(answer.logprobs[i])}`);
    if (answer.entropies) lines.push(`entropy ${short(answer.entropies[i])} nats`);
  }
  if (text === "") lines.push("spells a letter together with the token before");
  if (i === answer.length && answer.stop === "stop") lines.push("stop token: the answer ends before it");
  if (i > answer.length) lines.push("tail: fills up the last block");
  tip.replaceChildren(element("b", "", name), ...lines.map((line) => element("div", "", line)));
  tip.hidden = false;
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = box.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 6 : below}px`;
}

function moveCursor(shown, distance) {
  const tokens = [...shown.querySelectorAll(".token")];
  const before = tokens.findIndex((token) => token.classList.contains("at"));
  const at = Math.max(0, Math.min(tokens.length - 1, before < 0 ? 0 : before + distance));
  hideCursor();
  tokens[at].classList.add("at");
  tokens[at].scrollIntoView({ block: "nearest" });
  showTip(tokens[at]);
}

function hideCursor() {
  document.querySelectorAll(".token.at").forEach((token) => token.classList.remove("at"));
  $("tip").hidden = true;
}
