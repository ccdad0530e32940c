// Charts that zoom and say their values, by pointer and by keyboard, and a button for the theme. The page is whole without it.
"use strict";
(() => {
  const LEFT = 64, RIGHT = 472, BOTTOM = 244, SVG = "http://www.w3.org/2000/svg";

  function ticks(low, high) { // round values inside, at most seven
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  class Chart {
    constructor(figure) {
      this.svg = figure.querySelector("svg[data-low]");
      this.values = figure.querySelector(".values");
      const data = this.svg.dataset;
      this.log = data.log === "true";
      [this.low, this.high] = [data.low, data.high].map(v => this.log ? Math.log10(v) : Number(v));
      this.unit = Number(data.unit);
      this.plot = this.svg.querySelector(".plot");
      this.ticks = this.svg.querySelector(".ticks");
      this.dots = [...this.plot.querySelectorAll("circle")].map(dot => ({dot, at: Number(dot.getAttribute("cx"))}));
      this.stops = [...new Set(this.dots.map(d => d.at))].sort((a, b) => a - b);
      this.moved = [...this.plot.querySelectorAll("path, circle, line, rect, text")].map(element => {
        const start = {};
        for (const name of ["d", "cx", "x1", "x2", "x", "width"])
          if (element.hasAttribute(name)) start[name] = element.getAttribute(name);
        return {element, start};
      });
      this.firstTicks = this.ticks.innerHTML;
      this.cursor = document.createElementNS(SVG, "line");
      for (const [name, value] of [["class", "cursor"], ["y1", 20], ["y2", BOTTOM]]) this.cursor.setAttribute(name, value);
      this.cursor.style.display = "none";
      this.svg.append(this.cursor);
      this.place = -1;
      this.zoom(LEFT, RIGHT);
      this.listen();
    }

    to(x) { return LEFT + (x - this.from) * (RIGHT - LEFT) / (this.until - this.from); }
    back(x) { return this.from + (x - LEFT) * (this.until - this.from) / (RIGHT - LEFT); }
    value(x) {
      const value = this.low + (x - LEFT) * (this.high - this.low) / (RIGHT - LEFT);
      return this.log ? 10 ** value : value;
    }
    at(value) { return LEFT + ((this.log ? Math.log10(value) : value) - this.low) * (RIGHT - LEFT) / (this.high - this.low); }

    zoom(from, until) { // show this part of the plot, in its own first coordinates
      [this.from, this.until] = [Math.max(LEFT, from), Math.min(RIGHT, until)];
      for (const {element, start} of this.moved) {
        for (const name of ["cx", "x1", "x2"]) if (name in start) element.setAttribute(name, this.to(Number(start[name])));
        if (element.localName === "text") element.setAttribute("x", this.to(Number(start.x)));
        if (element.localName === "rect") {
          element.setAttribute("x", this.to(Number(start.x)));
          element.setAttribute("width", this.to(Number(start.x) + Number(start.width)) - this.to(Number(start.x)));
        }
        if ("d" in start) element.setAttribute("d", start.d.replace(/(-?[\d.]+),(-?[\d.]+)/g, (_, x, y) => `${this.to(Number(x))},${y}`));
      }
      const whole = this.from === LEFT && this.until === RIGHT;
      this.svg.classList.toggle("zoomed", !whole);
      if (whole) this.ticks.innerHTML = this.firstTicks;
      else {
        this.ticks.replaceChildren();
        for (const tick of ticks(this.value(this.from), this.value(this.until))) {
          const x = this.to(this.at(tick));
          if (!(x >= LEFT && x <= RIGHT)) continue;
          const line = document.createElementNS(SVG, "line"), text = document.createElementNS(SVG, "text");
          for (const [name, value] of [["x1", x], ["x2", x], ["y1", BOTTOM], ["y2", BOTTOM + 5], ["class", "axis"]]) line.setAttribute(name, value);
          for (const [name, value] of [["x", x], ["y", BOTTOM + 19], ["text-anchor", "middle"]]) text.setAttribute(name, value);
          text.textContent = String(Number((tick / this.unit).toPrecision(6)));
          this.ticks.append(line, text);
        }
      }
      if (this.place >= 0) this.show(this.place);
    }

    show(place) { // the values at a measurement
      this.place = Math.max(0, Math.min(this.stops.length - 1, place));
      const at = this.stops[this.place], x = this.to(at);
      this.cursor.style.display = x < LEFT || x > RIGHT ? "none" : "";
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
      const texts = this.dots.filter(d => d.at === at).map(d => d.dot.querySelector("title").textContent);
      this.values.textContent = texts.join("; ");
    }

    nearest(x) {
      const there = this.back(x);
      let best = 0;
      this.stops.forEach((at, i) => { if (Math.abs(at - there) < Math.abs(this.stops[best] - there)) best = i; });
      return best;
    }

    listen() {
      const place = event => {
        const box = this.svg.getBoundingClientRect();
        return (event.clientX - box.left) * this.svg.viewBox.baseVal.width / box.width;
      };
      let start = null;
      this.svg.addEventListener("pointerdown", event => { start = place(event); });
      this.svg.addEventListener("pointermove", event => this.show(this.nearest(place(event))));
      this.svg.addEventListener("pointerup", event => {
        if (start === null) return;
        const ends = [start, place(event)].sort((a, b) => a - b).map(x => this.back(Math.max(LEFT, Math.min(RIGHT, x))));
        start = null;
        if (ends[1] - ends[0] > 4) this.zoom(...ends);
      });
      this.svg.addEventListener("dblclick", () => this.zoom(LEFT, RIGHT));
      this.svg.addEventListener("keydown", event => {
        const wide = this.until - this.from, middle = this.place < 0 ? (this.from + this.until) / 2 : this.stops[this.place];
        const around = factor => {
          const size = Math.min(RIGHT - LEFT, wide * factor), left = Math.max(LEFT, Math.min(RIGHT - size, middle - size / 2));
          this.zoom(left, left + size);
        };
        const actions = {
          ArrowLeft: () => this.show(this.place - 1), ArrowRight: () => this.show(this.place + 1),
          Home: () => this.show(0), End: () => this.show(this.stops.length - 1),
          "+": () => around(0.5), "=": () => around(0.5), "-": () => around(2),
          "0": () => this.zoom(LEFT, RIGHT), Escape: () => this.zoom(LEFT, RIGHT),
        };
        if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        actions[event.key]();
      });
    }
  }

  for (const figure of document.querySelectorAll("figure.chart"))
    if (figure.querySelector("svg[data-low]")) new Chart(figure);

  const button = document.querySelector("button.theme"), root = document.documentElement;
  button.hidden = false;
  button.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();
