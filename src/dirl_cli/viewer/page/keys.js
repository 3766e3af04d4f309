// The beginning: read the payload, offer what it holds, listen to mouse and keyboard.

function fillChoices() {
  const steps = [...new Set(data.answers.map((answer) => answer.step))].filter((step) => step !== undefined);
  steps.sort((a, b) => a - b);
  options("step", [["", "all steps"], ...steps.map((step) => [step, `step ${step}`])]);
  options("source", [["", "all sources"], ...data.sources.map((source, n) => [n, visible(source.name)])]);
  options("colour", offeredColours().map((name) => [name, COLOURS[name].name]));
  $("step").hidden = steps.length < 2;
  $("source").hidden = data.sources.length < 2;
  $("correctness").hidden = data.answers.every((answer) => answer.correct === undefined);
  drawSteps(steps);
}

function options(id, choices) {
  $(id).replaceChildren(...choices.map(([value, name]) => new Option(name, value)));
}

// Keys that mean the same everywhere but in a field for text.
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { target } = event;
  if (target.matches("input[type=search], input[type=number], select")) {
    if (event.key === "Escape") target.blur();
    return;
  }
  const inTokens = target.closest(".tokens");
  const turn = inTokens && inTokens.answer ? (n) => moveCursor(inTokens, n) : move;
  const actions = {
    ArrowDown: () => next(1),
    ArrowUp: () => next(-1),
    PageDown: () => next(10),
    PageUp: () => next(-10),
    ArrowRight: () => turn(1),
    ArrowLeft: () => turn(-1),
    Home: () => move(-Infinity),
    End: () => move(Infinity),
    " ": play,
    c: nextColour,
    n: () => $("numbers").click(),
    k: keepBeside,
    "/": () => $("search").focus(),
    Escape: hideCursor,
  };
  const isPressed = event.key === " " && target.matches("button, summary, input");
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || isPressed) return;
  event.preventDefault();
  action();
}

function nextColour() {
  const names = offeredColours();
  state.colour = names[(names.indexOf(state.colour) + 1) % names.length];
  showColour();
}

function listen() {
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("reset", () => setTimeout(filter));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("list").addEventListener("scroll", drawRows);
  new ResizeObserver(drawRows).observe($("list"));
  $("play").onclick = play;
  $("pin").onclick = keepBeside;
  $("slider").oninput = () => { pause(); state.forward = Number($("slider").value); showForward(); };
  $("colour").onchange = () => { state.colour = $("colour").value; showColour(); };
  $("numbers").onchange = () => $("shown").classList.toggle("numbered", $("numbers").checked);
  $("shown").addEventListener("mouseover", (event) => {
    const token = event.target.closest("[data-i]");
    if (token) showTip(token);
    else $("tip").hidden = true;
  });
  $("shown").addEventListener("mouseleave", hideCursor);
  $("shown").addEventListener("focusout", hideCursor);
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => choose(placeInAddress()));
}

function placeInAddress() {
  const number = parseInt(location.hash.slice(1), 10);
  return number >= 1 && number <= data.answers.length ? number - 1 : 0;
}

async function start() {
  data = await readPayload();
  document.title = visible(data.title);
  $("title").textContent = visible(data.title);
  const lines = data.sources.map((source) => (data.sources.length > 1 ? `${source.name}: ` : "") + source.summary);
  $("summary").textContent = visible(lines.join(". ")) + ".";
  $("explanation").hidden = data.sources.every((source) => source.kind === "evaluation");
  groupByProblem();
  fillChoices();
  listen();
  filter();
  showColour();
  await choose(placeInAddress());
  document.body.dataset.ready = Math.round(performance.now());  // milliseconds since the page was asked for
}

start();
