'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const darkness = matchMedia('(prefers-color-scheme: dark)');
const narrow = matchMedia('(max-width: 40rem)');

/* Heads of tables of class "sortable" become buttons: first click rising, second falling, third as it was. */
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const now = head.getAttribute('aria-sort');
      const next = now === 'ascending' ? 'descending' : now === 'descending' ? null : 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      if (next) head.setAttribute('aria-sort', next);
      const sign = next === 'descending' ? -1 : 1;
      const value = row => row.cells[column].dataset.value ?? '';
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        if (x === '' || y === '') return (x === '') - (y === '');
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      };
      body.append(...(next ? [...original].sort(compare) : original));
    });
  });
}

/* The picture: two charts a model, drawn by plotly; what they show is chosen by ordinary form elements. */
const escaped = text => text.replace(/[&<>]/g, sign => ({'&': '&amp;', '<': '&lt;', '>': '&gt;'})[sign]);
const choice = Object.fromEntries(['score', 'left', 'right', 'front'].map(id => [id, document.getElementById(id)]));
const boxes = [...document.querySelectorAll('#labels input')];
const divs = [...document.querySelectorAll('.pareto')];
const SIDES = ['left', 'right'];

/* The points of one method in one chart, from the cheapest on. */
function points(section, label, cost) {
  return data.sections[section]
    .map((run, row) => ({run, row, x: run.costs[cost], y: run.scores[choice.score.value]}))
    .filter(point => point.run.label === label && point.x && point.y)
    .sort((a, b) => a.x[0] - b.x[0]);
}

function bars(values) {
  return {
    array: values.map(([value, , high]) => Math.max(0, high - value)),
    arrayminus: values.map(([value, low]) => Math.max(0, value - low)),
    symmetric: false, thickness: 1, width: 3,
  };
}

/* The runs that no other one beats in both, from the cheapest on. */
function front(shown) {
  const best = [];
  for (const point of [...shown].sort((a, b) => a.x[0] - b.x[0] || b.y[0] - a.y[0]))
    if (!best.length || point.y[0] > best.at(-1).y[0]) best.push(point);
  return best;
}

function traces(section) {
  const wanted = new Set(boxes.filter(box => box.checked).map(box => box.value));
  const found = [];
  SIDES.forEach((side, number) => {
    const axes = number ? {xaxis: 'x2', yaxis: 'y2'} : {xaxis: 'x', yaxis: 'y'};
    const shown = [];
    for (const label of data.labels.filter(label => wanted.has(label.name))) {
      const line = points(section, label.name, choice[side].value);
      shown.push(...line);
      const colour = darkness.matches ? label.dark : label.light;
      found.push({
        ...axes, name: escaped(label.name), type: 'scatter', showlegend: false,
        mode: label.line ? 'lines+markers' : 'markers',
        x: line.map(point => point.x[0]), y: line.map(point => point.y[0]),
        error_x: {...bars(line.map(point => point.x)), color: colour},
        error_y: {...bars(line.map(point => point.y)), color: colour},
        line: {color: colour, dash: label.dash, width: 2},
        marker: {color: colour, symbol: label.symbol, size: label.line ? 8 : 15},
        customdata: line.map(point => point.row),
        text: line.map(point => `<b>${escaped(point.run.name)}</b><br>` + point.run.told.map(escaped).join('<br>')),
        hovertemplate: '%{text}<extra></extra>',
      });
    }
    const best = choice.front.checked ? front(shown) : [];
    found.push({
      ...axes, type: 'scatter', mode: 'lines', hoverinfo: 'skip', showlegend: false, name: 'best trade-offs',
      x: best.map(point => point.x[0]), y: best.map(point => point.y[0]),
      line: {color: variable('--soft'), width: 7, shape: 'hv'}, opacity: .25,
    });
  });
  return found;
}

function layout() {
  const axis = {
    color: variable('--ink'), gridcolor: variable('--rule'), linecolor: variable('--soft'), zeroline: false,
    automargin: true, title: {standoff: 8},
  };
  const titled = (text, more) => ({...axis, ...more, title: {...axis.title, text: escaped(text)}});
  const score = `${data.scores[choice.score.value]}, ${data.unit}`;
  return {
    grid: narrow.matches ? {rows: 2, columns: 1, pattern: 'independent', ygap: .25}
      : {rows: 1, columns: 2, pattern: 'independent', xgap: .14},
    xaxis: titled(data.costs[choice.left.value]), xaxis2: titled(data.costs[choice.right.value]),
    yaxis: titled(score), yaxis2: titled(score, {matches: 'y'}),
    height: narrow.matches ? 640 : 400, margin: {l: 10, r: 10, t: 10, b: 10},
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: variable('--ink')},
    hoverlabel: {bgcolor: variable('--raised'), bordercolor: variable('--soft'), align: 'left',
      font: {color: variable('--ink')}},
    hovermode: 'closest', dragmode: narrow.matches ? false : 'zoom',
    modebar: {bgcolor: 'rgba(0,0,0,0)', color: variable('--soft'), activecolor: variable('--link')},
  };
}

const CONFIG = {displaylogo: false, responsive: true,
  modeBarButtonsToRemove: ['lasso2d', 'select2d', 'zoomIn2d', 'zoomOut2d', 'autoScale2d']};

function draw() {
  divs.forEach((div, section) => Plotly.react(div, traces(section), layout(), CONFIG));
}

function visit(section, row) {
  document.querySelectorAll('tr.here').forEach(other => other.classList.remove('here'));
  const line = document.getElementById(`run-${section}-${row}`);
  line.classList.add('here');
  line.focus({preventScroll: true});
  line.scrollIntoView({block: 'center', inline: 'nearest'});
}

/* Arrow keys: left and right along a line, up and down from line to line; Enter goes to the row of the table. */
function walk(div, section) {
  let at = null;
  const told = div.nextElementSibling;
  const lines = () => div.data.map((trace, number) => ({trace, number}))
    .filter(({trace}) => trace.hoverinfo !== 'skip' && trace.x.length);
  div.addEventListener('keydown', event => {
    const all = lines(), steps = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]};
    if (event.key === 'Enter' && at) return visit(section, at.row);
    if (event.key === 'Escape') { at = null; told.textContent = ''; return Plotly.Fx.unhover(div); }
    if (!steps[event.key] || !all.length || event.target !== div) return;
    event.preventDefault();
    const [line, along] = steps[event.key];
    const place = at ? all.findIndex(({number}) => number === at.curve) : -1;
    const now = place < 0 ? all[0] : all[(place + line + all.length) % all.length];
    const last = now.trace.x.length - 1;
    const point = place < 0 ? 0 : Math.min(last, Math.max(0, at.point + along));
    at = {curve: now.number, point, row: now.trace.customdata[point]};
    const run = data.sections[section][at.row];
    told.textContent = [run.name, ...run.told].join(' · ');
    const axes = now.trace.xaxis === 'x2' ? 'x2y2' : 'xy';
    Plotly.Fx.hover(div, [{curveNumber: at.curve, pointNumber: at.point}], axes);
  });
  div.addEventListener('blur', () => { at = null; told.textContent = ''; });
  div.on('plotly_click', ({points: [point]}) => visit(section, point.customdata));
}

if (divs.length) {
  document.querySelectorAll('.live').forEach(part => { part.hidden = false; });
  document.querySelector('.still').hidden = true;
  draw();
  divs.forEach(walk);
  [...Object.values(choice), ...boxes].forEach(element => element.addEventListener('change', draw));
  for (const [name, checked] of [['[data-all]', true], ['[data-none]', false]])
    document.querySelector(name).addEventListener('click', () => {
      boxes.forEach(box => { box.checked = checked; });
      draw();
    });
  darkness.addEventListener('change', draw);
  narrow.addEventListener('change', draw);
}

/* The samples: a filter over the list, and steps from one to the next. */
const browse = document.getElementById('browse');
const all = [...document.querySelectorAll('.one')];
const shown = () => all.filter(one => !one.hidden);

function filter() {
  const {model, task, only, words} = browse.elements;
  const asked = words.value.trim().toLowerCase();
  for (const one of all)
    one.hidden = Boolean((model && model.value && one.parentElement.dataset.model !== model.value)
      || (task.value && one.dataset.task !== task.value)
      || (only.value && !(only.value in one.dataset))
      || (asked && !one.textContent.toLowerCase().includes(asked)));
  for (const part of document.querySelectorAll('.samples'))
    part.hidden = all.length > 0 && !shown().some(one => one.parentElement === part);
  browse.querySelector('output').textContent = `${shown().length} of ${all.length} questions`;
}

function step(by) {
  const list = shown();
  if (!list.length) return;
  const now = list.findIndex(one => one.open);
  const next = list[now < 0 ? 0 : (now + by + list.length) % list.length];
  all.forEach(one => { one.open = one === next; });
  next.querySelector('summary').focus({preventScroll: true});
  next.scrollIntoView({block: 'start'});
}

browse.addEventListener('input', filter);
browse.addEventListener('submit', event => event.preventDefault());
browse.querySelectorAll('[data-step]').forEach(button =>
  button.addEventListener('click', () => step(Number(button.dataset.step))));
filter();
