// The chosen answer: what was asked, its tokens beside other answers to the problem, its group, other steps.

async function choose(place) {
  state.answer = place;
  pause();
  history.replaceState(null, "", `#${place + 1}`);
  const columns = columnsOf(data.answers[place]);
  if (data.served) await loadAnswers(columns);
  if (state.answer !== place) return;  // another was chosen meanwhile
  state.forward = Math.max(...columns.map(lastForward));
  showQuestion(data.answers[place]);
  showColumns(columns);
  showOthers(data.answers[place]);
  scrollToChosen();
  if (!data.served) return;
  const isNew = await loadExcerpts(othersOf(data.answers[place]).flat());
  if (isNew && state.answer === place) showOthers(data.answers[place]);
}

// The answers side by side: each source's to the problem, and the one that is kept beside them.
function columnsOf(answer) {
  const columns = [];
  data.sources.forEach((_, source) => {
    if (source === answer.source) columns.push(answer);
    else {
      const theirs = byProblem[answer.problem].filter((other) => other.source === source);
      const same = theirs.find((other) => other.sample === answer.sample && other.step === answer.step);
      if (theirs.length) columns.push(same ?? theirs[0]);
    }
  });
  const pinned = data.answers[state.pinned];
  if (pinned && !columns.includes(pinned)) columns.push(pinned);
  return columns;
}

function showQuestion(answer) {
  const problem = data.problems[answer.problem];
  const parts = [element("p", "faint", `problem ${visible(problem.id)}`)];
  if (problem.system) parts.push(longText(problem.system));
  if (problem.question) parts.push(longText(problem.question));
  if (problem.reference) {
    parts.push(element("p", "", element("span", "faint", "right answer "), visible(problem.reference.slice(0, 400))));
  }
  if (answer.prompt !== undefined) {
    const folded = element("details", "", element("summary", "", "The prompt, as the model reads it"));
    folded.ontoggle = () => {
      if (folded.children.length > 1) return;
      const prompt = longText(data.prompts[answer.prompt]);
      prompt.classList.add("prompt");
      folded.append(prompt);
    };
    parts.push(folded);
  }
  $("question").replaceChildren(...parts);
}

function showColumns(columns) {
  const hasTrace = columns.some((answer) => answer.tokens);
  for (const id of ["play", "slider", "moment"]) $(id).hidden = !hasTrace;
  for (const id of ["colour", "numbers"]) $(id).parentElement.hidden = !hasTrace;
  $("legend").hidden = !hasTrace;
  $("pin").textContent = state.pinned === null ? "Keep beside" : "Keep no longer";
  $("shown").replaceChildren(...columns.map(column), ...absent(columns));
  $("slider").max = Math.max(...columns.map(lastForward));
  showForward();
}

// A line for each source that has no answer to the problem.
function absent(columns) {
  const missing = data.sources.filter((_, source) => !columns.some((answer) => answer.source === source));
  return missing.map((source) => element("p", "faint", `${visible(source.name)} has no answer to this problem.`));
}

function column(answer) {
  const many = data.sources.length > 1 || state.pinned !== null;
  const made = element("div", "column");
  const title = element("h2", "");
  if (many) title.append(`${visible(data.sources[answer.source].name)}: `);
  title.append(`answer ${answer.place + 1}`);
  made.append(title, factsLine(answer));
  if (answer.tokens) made.append(drawTokens(answer));
  else {
    const text = longText(answer.text);
    text.classList.add("tokens");
    made.append(text, element("p", "faint", "An evaluation keeps texts and no tokens, so there is nothing to play: dirl generate keeps both."));
  }
  return made;
}

function factsLine(answer) {
  const facts = [];
  if (answer.step !== undefined) facts.push(`step ${answer.step} of the run`);
  facts.push(`sample ${answer.sample}`);
  if (answer.reward !== undefined) facts.push(`${worth(answer)} ${short(answer.reward)}${partsOf(answer)}`);
  if (answer.advantage !== undefined) facts.push(`advantage ${short(answer.advantage)}`);
  facts.push(`${counted(answer.length, "token")} in ${counted(answer.forwards, "forward")}`);
  if (answer.speed !== undefined) facts.push(`${short(answer.speed)} a forward`);
  facts.push(answer.stop === "stop" ? "ended by a stop token" : "cut off at the length limit");
  if (answer.extracted !== undefined) facts.push(`final answer ${oneLine(answer.extracted.slice(0, 100))}`);
  return element("p", "faint", mark(answer, " right · ", " wrong · "), facts.join(" · "));
}

function partsOf(answer) {
  if (!answer.parts) return "";
  return ` (${Object.entries(answer.parts).map(([name, value]) => `${name} ${short(value)}`).join(", ")})`;
}

// ✓ or ✗, with words behind it if there are any; nothing of an answer that nobody graded.
function mark(answer, whenRight = "", whenWrong = "") {
  if (answer.correct === undefined) return "";
  return answer.correct ? element("span", "right", `✓${whenRight}`) : element("span", "wrong", `✗${whenWrong}`);
}

// The answers of the same group, and those of other steps and sources, of which 200 are shown.
function othersOf(answer) {
  const all = byProblem[answer.problem];
  const isOfGroup = (other) => other.group === answer.group;
  return [all.filter(isOfGroup), all.filter((other) => !isOfGroup(other)).slice(0, 200)];
}

// What else there is to the problem: the answers of its group, and those of other steps and sources.
function showOthers(answer) {
  const [group, others] = othersOf(answer);
  const parts = [];
  if (group.length > 1) {
    const where = answer.step === undefined ? "" : ` in step ${answer.step}`;
    const use = answer.learned_from === false ? "; nothing is learned from them" : "";
    parts.push(element("h2", "", `The ${group.length} answers to this problem${where}${use}`), table(group, answer));
  }
  if (others.length) {
    parts.push(element("h2", "", data.sources.length > 1 ? "The same problem elsewhere" : "The same problem at other steps"));
    parts.push(table(others, answer));
  }
  parts.push(element("p", "faint", "This answer as a picture: ", element("code", "", `${answer.picture ?? `${data.command} number=${answer.place + 1}`} export=answer.svg`), " (or .gif)"));
  $("others").replaceChildren(...parts);
}

function table(answers, current) {
  const has = (name) => answers.some((answer) => answer[name] !== undefined);
  const isOneStep = answers.every((answer) => answer.step === answers[0].step);
  const largest = Math.max(...answers.map((answer) => Math.abs(answer.advantage ?? 0)));
  const columns = [["", (answer) => goTo(answer)]];
  if (data.sources.length > 1) columns.push(["from", (answer) => visible(data.sources[answer.source].name)]);
  if (!isOneStep) columns.push(["step", (answer) => short(answer.step)]);
  if (has("correct")) columns.push(["", mark]);
  if (has("reward")) columns.push([worth(answers[0]), (answer) => short(answer.reward)]);
  if (has("advantage")) columns.push(["advantage", (answer) => advantageBar(answer, largest)]);
  columns.push(["tokens", (answer) => String(answer.length)]);
  columns.push(["a forward", (answer) => short(answer.speed)]);
  columns.push(["answer", (answer) => oneLine(answerText(answer, 160))]);

  const made = element("table", "", element("thead", "", element("tr", "", ...columns.map(([name]) => element("th", "", name)))));
  const body = element("tbody", "");
  for (const answer of answers) {
    const row = element("tr", answer === current ? "current" : "");
    for (const [name, cell] of columns) row.append(element("td", name === "answer" ? "excerpt" : "", cell(answer)));
    body.append(row);
  }
  made.append(body);
  return made;
}

function goTo(answer) {
  const button = element("button", "", String(answer.place + 1));
  button.type = "button";
  button.title = "Show this answer";
  button.onclick = () => choose(answer.place);
  return button;
}

function advantageBar(answer, largest) {
  const cell = element("span", "");
  if (answer.advantage === undefined) return cell;
  const share = largest ? Math.abs(answer.advantage) / largest : 0;
  const bar = element("i", answer.advantage < 0 ? "below" : "");
  bar.style.width = `${50 * share}%`;
  bar.style[answer.advantage < 0 ? "right" : "left"] = "50%";
  cell.append(element("span", "bar", bar), ` ${short(answer.advantage)}`);
  return cell;
}

// Slider and playback.
function showForward() {
  const last = Number($("slider").max);
  state.forward = Math.max(0, Math.min(last, state.forward));
  $("slider").value = state.forward;
  $("moment").textContent = state.forward ? `after forward ${state.forward} of ${last}` : "all masked, before the first forward";
  document.querySelectorAll("#shown .tokens").forEach((shown) => { if (shown.answer) maskTokens(shown); });
}

function move(distance) {
  state.forward += distance;
  showForward();
}

function play() {
  if (state.playing) return pause();
  if (state.forward >= Number($("slider").max)) state.forward = 0;
  showForward();
  $("play").textContent = "Pause";
  state.playing = setInterval(() => {
    move(1);
    if (state.forward >= Number($("slider").max)) pause();
  }, 250);
}

function pause() {
  clearInterval(state.playing);
  state.playing = null;
  $("play").textContent = "Play";
}

function keepBeside() {
  state.pinned = state.pinned === null ? state.answer : null;
  choose(state.answer);
}

function showColour() {
  const { low, high } = COLOURS[state.colour];
  const scale = element("span", `scale by-${state.colour}`);
  scale.style.background = "linear-gradient(in oklch to right, var(--from), var(--to))";
  $("legend").replaceChildren(low, scale, high);
  $("colour").value = state.colour;
  document.querySelectorAll("#shown .tokens").forEach((shown) => { if (shown.answer) colourTokens(shown); });
}
