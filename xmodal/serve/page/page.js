'use strict';
// The whole page: chooses pictures, asks the server's own routes, and shows the answers.

const at = id => document.getElementById(id);
// Distinct on light and dark pictures; from Okabe and Ito.
const COLOURS = ['#e69f00', '#56b4e9', '#009e73', '#f0e442', '#0072b2', '#d55e00', '#cc79a7'];
const LARGEST = 1024;
const TAKEN = /^image\/(jpeg|png|webp|gif|bmp)$/;  // by the server
const WORDS = {
  vqa: ['Question', 'what colour is the square?'],
  regression: ['Question', 'how many circles are there?'],
  detection: ['What to find: a full stop after each name', 'red circle. blue square.'],
  retrieval: ['Text to rank pictures for, or texts for one picture', 'a red circle.'],
  generation: ['What to draw', 'a red circle'],
};
let tasks = [], limits = {}, pictures = [], found = null, running = null;

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function say(text, wrong = false) {
  at('status').textContent = text;
  at('status').classList.toggle('wrong', wrong);
}

function headers() {
  return at('key').value ? {Authorization: `Bearer ${at('key').value}`} : {};
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

// ---- start

async function connect() {
  try {
    const models = await (await checked(await fetch('v1/models', {headers: headers()}))).json();
    ({data: tasks, limits} = models);
    at('model').textContent = models.name;
    at('text').maxLength = limits.text;
    at('steps').max = limits.steps;
    showTasks();
    await becomeReady();
  } catch (error) {
    say(`${error.message}. With a key, enter it under Key and press Enter there.`, true);
  }
}

async function becomeReady() {
  for (;;) {
    const ready = await fetch('readyz');
    if (ready.ok) break;
    const {error} = await ready.json().catch(() => ({}));
    if (error?.code === 'cannot_compile') return say(error.message, true);
    say('The model is being compiled.');
    await new Promise(resolve => setTimeout(resolve, 500));
  }
  say('Ready.');
  document.body.dataset.ready = 'true';
  update();
}

function showTasks() {
  at('tasks').replaceChildren(made('legend', {textContent: 'Task'}));
  tasks.forEach((task, place) => {
    const radio = made('input', {type: 'radio', name: 'task', value: task.id, checked: !place});
    radio.addEventListener('change', () => { forget(); say(''); update(); });
    at('tasks').append(made('label', {className: 'task'}, radio,
                            made('span', {textContent: task.id})));
  });
  update();
}

function chosen() {
  const value = document.querySelector('input[name=task]:checked')?.value;
  return tasks.find(task => task.id === value);
}

function update() {
  const task = chosen();
  if (!task) return;
  const [label, example] = WORDS[task.id] ?? ['Text', ''];
  at('asks').hidden = !task.reads_text && !task.draws;
  at('says').textContent = label;
  at('text').placeholder = example;
  at('drawing').hidden = !task.draws;
  at('file').multiple = task.ranks;
  at('folders').hidden = !task.ranks;
  at('send').textContent = task.draws ? 'Draw' : 'Ask';
  at('send').disabled = !document.body.dataset.ready || Boolean(running)
      || !(pictures.length || task.draws);
}

// ---- pictures

async function take(files) {
  const task = chosen();
  if (!task) return say('The page is not connected yet.', true);
  const images = [...files].filter(file => TAKEN.test(file.type));
  if (!images.length) return say('There is no JPEG, PNG, WebP, GIF or BMP picture in it.', true);
  const kept = images.sort((one, other) => one.name.localeCompare(other.name))
    .slice(0, task.ranks ? limits.pictures : 1);
  say('Opening.');
  try {
    pictures = await opened(kept);
  } catch (error) {
    return say(error.message, true);
  }
  forget();
  const left = images.length - kept.length;
  say((kept.length > 1 ? `${kept.length} pictures chosen` : `${kept[0].name} chosen`)
      + (left ? `, ${left} left out: ${task.id} takes up to ${kept.length}.` : '.'));
  update();
}

// Pictures that fit into one request together: made smaller where they would not.
async function opened(files) {
  const room = limits.body_bytes - 4 * limits.text - 1000 * (files.length + 1);
  const bytes = some => some.reduce((sum, file) => sum + file.size, 0);
  const large = bytes(files) > room, found = [];
  for (const file of files) {
    const bitmap = await createImageBitmap(file).catch(
      error => { throw new Error(`${file.name} cannot be opened: ${error.message}`); });
    const fits = !large && bitmap.width * bitmap.height <= limits.pixels;
    const one = {file: fits ? file : await smaller(file, bitmap)};
    if (!found.length) one.bitmap = await createImageBitmap(one.file);  // the one that is shown
    bitmap.close();
    found.push(one);
  }
  if (bytes(found.map(({file}) => file)) > room) {
    throw new Error(`The pictures have more bytes than the server takes (${limits.body_bytes}).`);
  }
  return found;
}

// A JPEG file of at most LARGEST pixels a side.
async function smaller({name}, bitmap) {
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.ceil(bitmap.width * scale),
                                     Math.ceil(bitmap.height * scale));
  const context = canvas.getContext('2d', {alpha: false});
  context.fillStyle = '#ffffff';  // behind what is transparent, as on the server
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new File([await canvas.convertToBlob({type: 'image/jpeg', quality: 0.92})], name);
}

// What was dropped, with the files inside folders.
async function dropped(transfer) {
  const found = [], files = [...transfer.files];
  const walk = async entry => {
    if (entry.isFile) {
      found.push(await new Promise((done, fail) => entry.file(done, fail)));
      return;
    }
    const reader = entry.createReader();
    for (let some; (some = await new Promise(
      (done, fail) => reader.readEntries(done, fail))).length;) {  // a hundred at a time
      for (const one of some) await walk(one);
    }
  };
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean);
  if (!entries.length) return files;
  for (const entry of entries) await walk(entry);
  return found;
}

function showPictures(order = pictures.map((_, place) => [place, ''])) {
  at('pictures').hidden = pictures.length < 2 || !chosen()?.ranks;
  at('pictures').replaceChildren();
  if (pictures.length > 1) {
    at('pictures').append(...order.map(([place, text], rank) => {
      const picture = pictures[place];
      picture.address ??= URL.createObjectURL(picture.file);
      return made('li', {className: text && !rank ? 'first' : ''},
                  made('img', {src: picture.address, alt: picture.file.name}),
                  `${text} ${picture.file.name}`);
    }));
  }
  paint();
}

function forget() {
  found = null;
  at('answer').replaceChildren();
  at('slider').hidden = true;
  showPictures();
}

// The first picture, and the boxes over it. Boxes are in pixels of the picture.
function paint() {
  const canvas = at('canvas'), bitmap = pictures[0]?.bitmap;
  canvas.hidden = !bitmap;
  at('hint').hidden = Boolean(bitmap);
  if (!bitmap) return;
  const scale = Math.min(4, Math.max(1, 640 / Math.max(bitmap.width, bitmap.height)));
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext('2d');
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const boxes = shownBoxes();
  const width = Math.max(2, canvas.width / 220), letters = Math.max(13, canvas.width / 36);
  context.font = `600 ${letters}px system-ui, sans-serif`;
  context.textBaseline = 'top';
  for (const {name, score, box, colour} of [...boxes].reverse()) {
    const [x, y, w, h] = box.map(side => side * scale);
    context.lineWidth = width;
    context.strokeStyle = colour;
    context.strokeRect(x, y, w, h);
    const text = `${name} ${percent(score)}`, wide = context.measureText(text).width + 8;
    const left = Math.max(0, Math.min(x, canvas.width - wide)), top = Math.max(0, y - letters - 6);
    context.fillStyle = colour;
    context.fillRect(left, top, wide, letters + 6);
    context.fillStyle = '#000000';
    context.fillText(text, left + 4, top + 3);
  }
  canvas.setAttribute('aria-label', boxes.length
    ? `Picture with ${boxes.map(({name}) => name).join(', ')}` : 'The chosen picture');
}

// ---- answers

const percent = share => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

function shownBoxes() {
  if (!found?.candidates) return [];
  const names = [...new Set(found.candidates.map(({name}) => name))].sort();
  const coloured = found.candidates.map(one => ({
    ...one, colour: COLOURS[names.indexOf(one.name) % COLOURS.length]}));
  const meant = (found.meant ?? []).map(one => ({...one, colour: '#ffffff'}));
  return [...meant, ...coloured.filter(({score}) => score >= at('threshold').value)];
}

function bars(rows) {
  return made('ol', {className: 'bars'}, ...rows.map(([name, share]) => made(
    'li', {className: 'bar'}, made('meter', {value: Math.max(0, share), ariaHidden: 'true'}),
    made('span', {}, made('b', {textContent: name}),
         made('span', {textContent: percent(share)})))));
}

function showBoxes() {
  at('least').textContent = Number(at('threshold').value).toFixed(2);
  const boxes = shownBoxes();
  document.body.dataset.boxes = boxes.length;
  at('answer').replaceChildren(
    made('p', {className: 'main', textContent: boxes.length === 1 ? '1 box' : `${boxes.length} boxes`}),
    made('ul', {className: 'boxes'}, ...boxes.map(({name, score, colour}) => {
      const swatch = made('span', {className: 'swatch'});
      swatch.style.background = colour;  // a property, which the content policy allows
      return made('li', {}, swatch, `${name} ${percent(score)}`);
    })), notes());
  paint();
}

function notes() {
  return made('p', {className: 'note', textContent: (found.notes ?? []).join('; ')});
}

function main(text) {
  return made('p', {className: 'main', textContent: text});
}

function show(answer) {
  found = answer;
  if (answer.candidates) {
    at('slider').hidden = false;
    at('threshold').value = answer.threshold;
    showBoxes();
  } else if (answer.top?.length) {
    const written = answer.written === undefined ? '' : `Written: ${answer.written || '(nothing)'}`;
    at('answer').replaceChildren(main(answer.answer), bars(answer.top),
                                 made('p', {className: 'note', textContent: written}), notes());
  } else if (answer.pictures && !answer.pictures[0]?.png) {
    showPictures(answer.pictures.map(({image, similarity}) => [image, similarity.toFixed(3)]));
    const best = pictures[answer.pictures[0].image].file.name;
    at('answer').replaceChildren(main(`Closest: ${best}`), notes());
  } else if (answer.texts) {
    at('answer').replaceChildren(made('ol', {}, ...answer.texts.map(({text, similarity}) => made(
      'li', {textContent: `${similarity.toFixed(3)} ${text}`}))), notes());
  } else if (answer.names) {
    at('answer').replaceChildren(
      bars(answer.names.map(({name, probability}) => [name, probability])), notes());
  } else if (answer.png) {
    at('answer').replaceChildren(drawn(answer.png, 'The drawn picture'), notes());
  } else {
    const {task, notes: _, ...rest} = answer;
    const text = answer.caption ?? answer.answer ?? answer.predicted ?? JSON.stringify(rest);
    const sure = answer.probability === undefined ? '' : `Probability ${percent(answer.probability)}`;
    at('answer').replaceChildren(main(String(text)),
                                 made('p', {className: 'note', textContent: sure}), notes());
  }
}

function drawn(png, alt) {
  return made('img', {className: 'drawn', src: `data:image/png;base64,${png}`, alt});
}

function showStep({step, steps, png, text}) {
  if (text !== undefined) {
    at('answer').replaceChildren(main(text));
    return;
  }
  say(`Step ${step} of ${steps}`);
  if (!at('answer').querySelector('progress')) {
    at('answer').replaceChildren(made('progress', {max: steps}), made('div'));
  }
  at('answer').querySelector('progress').value = step;
  if (png) {
    at('answer').querySelector('div').replaceChildren(drawn(png, `After step ${step}`));
    document.body.dataset.previews = Number(document.body.dataset.previews ?? 0) + 1;
  }
}

// ---- asking

// The events of a response, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = '';;) {
    const {done, value} = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf('\n\n')) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split('\n');
      const line = start => lines.find(one => one.startsWith(start))?.slice(start.length);
      yield [line('event: ') ?? 'message', JSON.parse(line('data: '))];
    }
  }
}

async function ask(event) {
  event.preventDefault();
  const task = chosen();
  if (at('send').disabled || !task) return;
  const form = new FormData();
  form.append('task', task.id);
  form.append('text', at('text').value);
  form.append('details', 'true');
  const streams = task.draws || task.writes;
  if (streams) form.append('stream', 'true');
  if (task.draws) {
    form.append('options', JSON.stringify(Object.fromEntries(
      ['steps', 'guidance', 'seed'].filter(name => at(name).value !== '')
        .map(name => [name, Number(at(name).value)]))));
  } else {
    (task.ranks ? pictures : pictures.slice(0, 1)).forEach(
      ({file}) => form.append('images', file));
  }
  running = new AbortController();
  forget();
  update();
  at('stop').hidden = false;
  say(task.draws ? 'Drawing.' : 'Asking.');
  const began = performance.now();
  try {
    const response = await checked(await fetch('v1/predict', {
      method: 'POST', body: form, headers: headers(), signal: running.signal}));
    let answer = null;
    if (streams) {
      for await (const [name, data] of events(response)) {
        if (name === 'step') showStep(data);
        else if (name === 'error') throw new Error(data.error.message);
        else answer = data;
      }
    } else {
      answer = await response.json();
    }
    show(answer);
    say(`Answered in ${Math.round(performance.now() - began)} ms.`);
  } catch (error) {
    say(error.name === 'AbortError' ? 'Stopped.' : error.message, error.name !== 'AbortError');
  } finally {
    running = null;
    at('stop').hidden = true;
    update();
  }
}

for (const name of ['file', 'folder']) {
  at(name).addEventListener('change', () => take(at(name).files));
}
at('ask').addEventListener('submit', ask);
at('stop').addEventListener('click', () => running?.abort());
at('threshold').addEventListener('input', showBoxes);
at('key').addEventListener('keydown', event => {
  if (event.key === 'Enter') { event.preventDefault(); connect(); }
});
at('text').addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey) ask(event);
});
document.addEventListener('paste', event => {
  if (event.clipboardData?.files.length) take(event.clipboardData.files);
});
for (const name of ['dragover', 'dragleave', 'drop']) {
  document.addEventListener(name, event => {
    event.preventDefault();
    at('drop').classList.toggle('over', name === 'dragover');
    if (name === 'drop') {
      dropped(event.dataTransfer).then(take).catch(error => say(error.message, true));
    }
  });
}
connect();
