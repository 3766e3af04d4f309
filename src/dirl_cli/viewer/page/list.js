// The list of answers: filtered, sorted, and only the rows on the screen drawn.

const ROW = 48;  // pixels
const RANGES = ["reward", "length", "speed"];
let byProblem = [];

function groupByProblem() {
  byProblem = data.problems.map(() => []);
  for (const answer of data.answers) byProblem[answer.problem].push(answer);
}

function filter() {
  const words = $("search").value.toLowerCase().trim();
  if (data.served) search(words);
  const source = $("source").value;
  const step = $("step").value;
  const correctness = $("correctness").value;
  const bounds = RANGES.map((name) => [name, bound(`${name}-least`, -Infinity), bound(`${name}-most`, Infinity)])
    .filter(([, least, most]) => least > -Infinity || most < Infinity);
  state.listed = data.answers.filter((answer) =>
    (!source || answer.source === Number(source)) &&
    (!step || answer.step === Number(step)) &&
    (!correctness || answer.correct === (correctness === "right")) &&
    bounds.every(([name, least, most]) => answer[name] >= least && answer[name] <= most) &&
    (!words || (data.served ? state.found.has(answer.place) : searchText(answer).includes(words))));

  const key = $("sort").value.replace("-", "");
  const sign = $("sort").value.startsWith("-") ? 1 : -1;
  // What has no such number comes last; among equals the order of the page stays.
  const has = (answer) => Number(answer[key] !== undefined);
  if (key) state.listed.sort((a, b) => has(b) - has(a) || sign * (a[key] - b[key]) || 0);
  $("count").textContent = `${state.listed.length.toLocaleString("en")} of ${counted(data.answers.length, "answer")}`;
  $("list").scrollTop = 0;
  document.querySelectorAll("#steps button").forEach((button) => {
    button.setAttribute("aria-pressed", String(button.value === step));
  });
  drawRows();
}

function bound(id, otherwise) {
  const number = parseFloat($(id).value);
  return Number.isNaN(number) ? otherwise : number;
}

function searchText(answer) {
  const problem = data.problems[answer.problem];
  answer.searched ??= `${problem.id} ${problem.question} ${answerText(answer)}`.toLowerCase();
  return answer.searched;
}

function drawRows() {
  const list = $("list");
  $("rows").style.height = `${state.listed.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const end = Math.min(state.listed.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const rows = [];
  for (let n = first; n < end; n++) rows.push(entry(state.listed[n], n));
  $("rows").replaceChildren(...rows);
  markChosen();
  clearTimeout(drawRows.waiting);  // one that scrolls on asks for nothing on the way
  if (data.served) drawRows.waiting = setTimeout(() => fillRows(first, end), 50);
}

async function fillRows(first, end) {
  if (await loadExcerpts(state.listed.slice(first, end))) drawRows();
}

function entry(answer, n) {
  const facts = element("div", "facts");
  if (answer.correct !== undefined) facts.append(mark(answer));
  facts.append(element("b", "", String(answer.place + 1)));
  if (answer.step !== undefined) facts.append(element("span", "", `step ${answer.step}`));
  if (answer.reward !== undefined) facts.append(element("span", "", `${worth(answer)} ${short(answer.reward)}`));
  facts.append(element("span", "", counted(answer.length, "token")));
  if (answer.speed !== undefined) facts.append(element("span", "", `${short(answer.speed)} a forward`));
  const made = element("div", "entry", facts, element("div", "excerpt", oneLine(answerText(answer, 120))));
  made.style.top = `${n * ROW}px`;
  made.id = `answer-${answer.place}`;
  made.setAttribute("role", "option");
  made.onclick = () => choose(answer.place);
  return made;
}

function markChosen() {
  for (const row of $("rows").children) row.setAttribute("aria-selected", String(row.id === `answer-${state.answer}`));
  $("list").setAttribute("aria-activedescendant", `answer-${state.answer}`);
}

const placeInList = () => state.listed.findIndex((answer) => answer.place === state.answer);

function scrollToChosen() {
  const n = placeInList();
  if (n < 0) return;
  const list = $("list");
  if (n * ROW < list.scrollTop) list.scrollTop = n * ROW;
  if ((n + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (n + 1) * ROW - list.clientHeight;
  drawRows();
}

// The answer that many places further in the list.
function next(distance) {
  if (!state.listed.length) return;
  const at = placeInList();
  choose(state.listed[Math.max(0, Math.min(state.listed.length - 1, at < 0 ? 0 : at + distance))].place);
}

// Mean rewards of a run by step, each a button.
function drawSteps(steps) {
  const sums = new Map(steps.map((step) => [step, [0, 0]]));
  for (const { step, reward } of data.answers) {
    if (step === undefined || reward === undefined) continue;
    sums.get(step)[0] += reward;
    sums.get(step)[1] += 1;
  }
  const means = steps.map((step) => sums.get(step)[0] / Math.max(1, sums.get(step)[1]));
  const least = Math.min(0, ...means);
  const most = Math.max(...means, least + 1e-9);
  const buttons = steps.map((step, n) => {
    const bar = element("span", "");
    bar.style.height = `${(100 * (means[n] - least)) / (most - least)}%`;
    const button = element("button", "", bar);
    button.type = "button";
    button.value = step;
    button.tabIndex = -1;  // the list of steps above does the same for the keyboard
    button.title = `step ${step}: mean reward ${short(means[n])}`;
    button.onclick = () => {
      $("step").value = $("step").value === String(step) ? "" : String(step);
      filter();
      if (state.listed.length) choose(state.listed[0].place);
    };
    return button;
  });
  $("steps").replaceChildren(...buttons);
  $("run").hidden = steps.length < 2;
}
