// Answers that a server holds (serve=true): the facts of all come at the start, in pieces; all else when it is shown.

async function ask(path) {
  let response;
  try {
    response = await fetch(path);
  } catch (error) {
    $("summary").textContent = "The server has ended: give dirl view again, then load this page anew.";
    throw error;
  }
  const answered = await response.json();
  if (!response.ok) $("summary").textContent = visible(answered.error ?? "The server has ended.");
  if (!response.ok) throw new Error(answered.error);
  return answered;
}

async function readFacts(payload) {
  for (let piece = 0; piece < payload.served; piece++) {
    payload.answers.push(...(await ask(`facts/${piece}`)));
    $("title").textContent = `Opening… ${counted(payload.answers.length, "answer")}`;
  }
}

// Tokens, prompts and problems of answers.
async function loadAnswers(answers) {
  const missing = answers.filter((answer) => !answer.isLoaded);
  if (!missing.length) return;
  const loaded = await ask(`answers?places=${missing.map((answer) => answer.place)}`);
  const first = data.texts.length;
  for (const text of loaded.texts) data.texts.push(text);
  missing.forEach((answer, n) => {
    const { asked, read, ...rest } = loaded.answers[n];
    Object.assign(answer, rest, { isLoaded: true });
    if (answer.tokens) answer.tokens = answer.tokens.map((text) => first + text);
    if (read !== undefined) answer.prompt = data.prompts.push(read) - 1;
    data.problems[answer.problem] = asked;
  });
}

// The beginnings of answers; tells whether any of them is new.
async function loadExcerpts(answers) {
  const missing = answers.filter((answer) => answer.excerpt === undefined);
  if (!missing.length) return false;
  const excerpts = await ask(`excerpts?places=${missing.map((answer) => answer.place)}`);
  missing.forEach((answer, n) => { answer.excerpt = excerpts[n]; });
  return true;
}

// Answers that hold the words: found by the server piece by piece, and listed as they are.
async function search(words) {
  if (words === state.words) return;
  state.words = words;
  state.found = new Set();
  let first = 0;
  while (words && first !== null && state.words === words) {
    const part = await ask(`search?words=${encodeURIComponent(words)}&first=${first}`);
    if (state.words !== words) return;
    part.places.forEach((place) => state.found.add(place));
    first = part.next;
    filter();
    if (first !== null) $("count").textContent += `, searching (${Math.round((100 * first) / data.answers.length)} %)`;
  }
}
