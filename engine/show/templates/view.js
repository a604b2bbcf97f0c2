"use strict";
(() => {
  const pictures = JSON.parse(document.getElementById("lookup").textContent);

  /** The index along an affine link's axes of a target position, or null when the link does not hold it. */
  function within(link, position) {
    const [, , , starts, axes] = link;
    const rest = position.map((at, dim) => at - starts[dim]);
    const indices = [];
    for (const [size, , , dim, stride] of axes) {
      const index = Math.floor(rest[dim] / stride);
      if (index < 0 || index >= size) return null;
      rest[dim] -= index * stride;
      indices.push(index);
    }
    return rest.every((left) => left === 0) ? indices : null;
  }

  /** Where an element of a target comes from: the link, source index and absolute byte. */
  function origin(picture, target, position) {
    for (let number = 0; number < picture.links.length; number++) {
      const link = picture.links[number];
      if (link[1] !== target) continue;
      const indices = within(link, position);
      if (indices === null) continue;
      const index = link[2].slice();
      link[4].forEach(([, dim, stride], at) => { index[dim] += stride * indices[at]; });
      const [file, name, offset, strides, item] = picture.sources[link[0]];
      const byte = offset + item * index.reduce((sum, at, dim) => sum + at * strides[dim], 0);
      return { number, file, name, index, byte, item };
    }
    return null;
  }

  function parse(text, shape) {
    const parts = text.split(",").map((part) => part.trim());
    if (parts.length !== shape.length) return null;
    const position = parts.map((part) => (/^[0-9]+$/.test(part) ? Number(part) : -1));
    return position.every((at, dim) => at >= 0 && at < shape[dim]) ? position : null;
  }

  function mark(drawing, links) {
    drawing.classList.toggle("chosen", links.size > 0);
    for (const box of drawing.querySelectorAll(".box")) box.classList.toggle("on", links.has(Number(box.dataset.link)));
  }

  document.querySelectorAll("figure").forEach((figure) => {
    const picture = pictures[Number(figure.dataset.picture)];
    const drawing = figure.querySelector(".drawing");
    const form = figure.querySelector(".asking");
    const [which, where, answer] = ["select", "input", "output"].map((tag) => form.querySelector(tag));
    form.hidden = false;
    let kept = new Set();

    function ask() {
      const target = Number(which.value);
      const shape = picture.targets[target][1];
      const position = parse(where.value, shape);
      const found = position && origin(picture, target, position);
      kept = new Set(found ? [found.number] : []);
      answer.textContent = found
        ? `${found.file}:${found.name}[${found.index.join(", ")}], bytes ${found.byte}…${found.byte + found.item - 1}`
        : `write an index within ${shape.map((size) => `0…${size - 1}`).join(", ")}`;
      mark(drawing, kept);
    }

    which.addEventListener("change", ask);
    where.addEventListener("input", ask);
    drawing.addEventListener("pointerover", (event) => {
      const link = event.target.dataset.link;
      mark(drawing, link === undefined ? kept : new Set([Number(link)]));
    });
    drawing.addEventListener("pointerleave", () => mark(drawing, kept));
    drawing.addEventListener("click", (event) => {
      const group = event.target.closest("[data-target]");
      if (!group) return;
      const frame = group.querySelector(".frame").getBoundingClientRect();
      const shape = picture.targets[Number(group.dataset.target)][1];
      const columns = shape.length > 1 ? shape[shape.length - 1] : 1;
      const rows = shape.reduce((product, size) => product * size, 1) / columns;
      const part = (at, low, size, count) => Math.min(count - 1, Math.max(0, Math.floor(((at - low) / size) * count)));
      let row = part(event.clientY, frame.top, frame.height, rows);
      const position = shape.length > 1 ? [part(event.clientX, frame.left, frame.width, columns)] : [];
      for (let dim = shape.length - (shape.length > 1 ? 2 : 1); dim >= 0; dim--) {
        position.unshift(row % shape[dim]);
        row = Math.floor(row / shape[dim]);
      }
      which.value = group.dataset.target;
      where.value = position.join(", ");
      ask();
    });
  });

  const filter = document.getElementById("filter");
  filter.closest(".searching").hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const one of document.querySelectorAll("[data-filtered]")) {
      one.hidden = !one.dataset.filtered.toLowerCase().includes(wanted);
    }
  });
})();
