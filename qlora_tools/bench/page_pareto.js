// The plots of cost against loss: axes, case and settings to choose, the frontier found anew each time.
// Draws what charts_pareto.py draws, from the numbers in the page; frame and titles come with them.
(function () {
  var source = document.getElementById("bench-data");
  if (!source) { return; }
  var data = JSON.parse(source.textContent), frame = data.frame;
  var off = new Set();
  var plots = [];

  // Scales and ticks, as svg.py has them.
  function roundStep(span) {
    var raw = span / 5, power = Math.pow(10, Math.floor(Math.log10(raw)));
    return [1, 2, 2.5, 5, 10].map(function (f) { return f * power; }).find(function (step) { return raw <= step * (1 + 1e-9); });
  }

  function linear(values, start, end, fromZero) {
    var high = Math.max.apply(null, values), low = Math.min.apply(null, values.concat(fromZero ? [0] : []));
    var step = roundStep((high - low) || Math.abs(high) || 1);
    low = Math.floor(low / step) * step;
    high = Math.ceil(high / step - 1e-9) * step;
    high = high > low ? high : low + 5 * step;
    var scale = function (value) { return start + (value - low) / (high - low) * (end - start); };
    scale.ticks = function () {
      var width = roundStep(high - low), ticks = [];
      for (var i = 0; i <= Math.round((high - low) / width); i++) { ticks.push([low + i * width, grouped(Number((low + i * width).toPrecision(10)))]); }
      return ticks;
    };
    return scale;
  }

  function logarithmic(values, start, end) {
    var positive = values.filter(function (value) { return value > 0; });
    positive = positive.length ? positive : [1e-3, 1e-2];
    var low = Math.floor(Math.log10(Math.min.apply(null, positive)) + 1e-9), high = Math.ceil(Math.log10(Math.max.apply(null, positive)) - 1e-9);
    high = Math.max(high, low + 1);
    var isCut = high - low > frame.decades;
    if (isCut) { low = high - frame.decades; }
    var foot = isCut || Math.min.apply(null, values) <= 0 ? 0.1 : 0, least = Math.pow(10, low);
    var scale = function (value) {
      if (value <= 0 || (foot && value < least)) { return start; }
      var share = (Math.log10(value) - low) / (high - low), first = start + foot * (end - start);
      return first + Math.min(Math.max(share, 0), 1) * (end - first);
    };
    scale.ticks = function () {
      var every = Math.max(1, Math.ceil((high - low) / 6)), ticks = foot ? [[0, isCut ? "<" + power(low) : "0"]] : [];
      for (var at = low; at <= high; at += every) { ticks.push([Math.pow(10, at), power(at)]); }
      return ticks;
    };
    return scale;
  }

  function power(exponent) { return exponent > -4 ? grouped(Number("1e" + exponent)) : "1e" + exponent; }
  function grouped(value) { return value.toLocaleString("en-US", { maximumFractionDigits: 12 }); }
  function amount(value) { return Math.abs(value) >= 1000 ? grouped(Math.round(value)) : String(Number(value.toPrecision(4))); }
  function small(value) { return value === 0 ? "0" : value >= 1e-3 ? value.toFixed(4) : value.toExponential(1); }

  // A place for each label beside its mark, clear of marks, of labels placed before and of lines.
  function placeLabels(marks, lines) {
    var taken = marks.map(function (m) { return [m.x - 7, m.y - 7, m.x + 7, m.y + 7]; }).concat(lines.map(function (l) {
      return [Math.min(l[0], l[2]) - 2, Math.min(l[1], l[3]) - 2, Math.max(l[0], l[2]) + 2, Math.max(l[1], l[3]) + 2];
    }));
    return marks.map(function (m) {
      var width = frame.charWidth * m.name.length;
      var options = [[m.x + 11, m.y + 4, "start"], [m.x - 11, m.y + 4, "end"], [m.x, m.y - 12, "middle"], [m.x, m.y + 21, "middle"]];
      [-16, 18, -32, 34].forEach(function (rise) { [[1, "start"], [-1, "end"]].forEach(function (side) { options.push([m.x + 11 * side[0], m.y + 4 + rise, side[1]]); }); });
      var best = options[0], least = Infinity;
      options.forEach(function (option) {
        var b = box(option, width), outside = b[0] < frame.left || b[2] > frame.right || b[1] < frame.top || b[3] > frame.bottom;
        var cost = (outside ? 10 : 0) + taken.reduce(function (sum, other) { return sum + overlap(b, other) / 100; }, 0);
        if (cost < least - 1e-9) { best = option; least = cost; }
      });
      taken.push(box(best, width));
      return best;
    });
  }

  function box(place, width) {
    var start = place[0] - { start: 0, middle: width / 2, end: width }[place[2]];
    return [start, place[1] - 11, start + width, place[1] + 3];
  }

  function overlap(a, b) { return Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1])); }

  // The settings that are shown and have both figures, by cost, those marked that nothing dominates.
  function pointsOf(cost, loss, at) {
    var points = [];
    data.settings.forEach(function (setting) {
      var x = setting.costs[cost.key][cost.byCase ? at : 0], y = setting.losses[loss.key];
      if (!cost.byCase) { x = setting.costs[cost.key].find(function (value) { return value !== null; }); }
      if (!off.has(setting.name) && x !== null && x !== undefined && y) { points.push({ name: setting.name, cost: x, loss: y[0], low: y[1], high: y[2] }); }
    });
    points.sort(function (a, b) { return a.cost - b.cost || a.loss - b.loss || (a.name < b.name ? -1 : a.name > b.name ? 1 : 0); });
    function worth(point) { return loss.rounding ? Math.max(point.loss, loss.rounding) : point.loss; }
    points.forEach(function (p) {
      p.best = !points.some(function (q) { return q.cost <= p.cost && worth(q) <= worth(p) && (q.cost < p.cost || worth(q) < worth(p)); });
    });
    return points;
  }

  function draw(plot) {
    var cost = byKey(data.costs, plot.x.value), loss = byKey(data.losses, plot.y.value);
    var svg = plot.svg, points = pointsOf(cost, loss, plot.at ? Number(plot.at.value) : 0);
    var left = frame.left, right = frame.right, top = frame.top, bottom = frame.bottom;
    tips.hide();
    svg.textContent = "";
    if (plot.at) { plot.at.disabled = !cost.byCase; }
    var headline = bare(cost.title) + " against " + bare(loss.title);
    plot.title.textContent = headline[0].toUpperCase() + headline.slice(1);
    svg.setAttribute("aria-label", plot.title.textContent);
    if (points.length < 2) { add(svg, "text", { x: (left + right) / 2, y: (top + bottom) / 2, "class": "title", "text-anchor": "middle" }, "fewer than two settings have both figures"); return; }
    var ys = [];
    points.forEach(function (p) { ys.push(p.loss); if (p.low !== null) { ys.push(p.low, p.high); } });
    var x = linear(points.map(function (p) { return p.cost; }), left, right, true);
    var y = loss.scale === "log" ? logarithmic(ys, bottom, top) : linear(ys, bottom, top, loss.scale === "zero");
    x.ticks().forEach(function (tick) { rule(svg, x(tick[0]), top, x(tick[0]), bottom, "grid"); label(svg, x(tick[0]), bottom + 20, tick[1], "tick", "middle"); });
    y.ticks().forEach(function (tick) { rule(svg, left, y(tick[0]), right, y(tick[0]), tick[0] === 0 ? "axis" : "grid"); label(svg, left - 9, y(tick[0]) + 4, tick[1], "tick", "end"); });
    label(svg, (left + right) / 2, bottom + 42, cost.title, "title", "middle");
    add(svg, "text", { transform: "translate(15 " + ((top + bottom) / 2).toFixed(2) + ") rotate(-90)", "class": "title", "text-anchor": "middle" }, loss.title);
    points.forEach(function (p) { p.x = x(p.cost); p.y = y(p.loss); });
    var front = points.filter(function (p) { return p.best; });
    var steps = [];
    front.slice(1).forEach(function (p, i) { steps.push([front[i].x, front[i].y, p.x, front[i].y], [p.x, front[i].y, p.x, p.y]); });
    steps.forEach(function (step) { rule(svg, step[0], step[1], step[2], step[3], "frontier"); });
    var write = loss.scale === "log" ? small : amount;
    points.filter(function (p) { return !p.best; }).concat(front).forEach(function (p) {
      if (p.low !== null && p.y < bottom) { rule(svg, p.x, y(p.low), p.x, y(p.high), "whisker soft"); }
      var sure = p.low === null ? "" : " [" + write(p.low) + " to " + write(p.high) + "]";
      add(add(svg, "circle", { cx: p.x.toFixed(2), cy: p.y.toFixed(2), r: 6, "class": p.best ? "point best" : "point" }), "title", {},
        p.name + ": " + withUnit(cost.title, amount(p.cost)) + ", " + withUnit(loss.title, write(p.loss)) + sure + (p.best ? ", on the frontier" : ""));
    });
    placeLabels(points, steps).forEach(function (place, i) { label(svg, place[0], place[1], points[i].name, points[i].best ? "label" : "label muted", place[2]); });
    tips.adopt(svg);
  }

  function bare(title) { return title.replace(/ \([^()]*\)$/, ""); }
  function withUnit(title, value) {
    var unit = title.match(/ \(([^()]*)\)$/);
    return bare(title) + " " + value + (unit ? " " + unit[1] : "");
  }
  function byKey(list, key) { return list.find(function (item) { return item.key === key; }); }

  function add(parent, tag, attributes, content) {
    var made = document.createElementNS(parent.namespaceURI, tag);
    Object.keys(attributes).forEach(function (name) { made.setAttribute(name, attributes[name]); });
    if (content !== undefined) { made.textContent = content; }
    return parent.appendChild(made);
  }

  function rule(svg, x1, y1, x2, y2, kind) { add(svg, "line", { x1: x1.toFixed(2), y1: y1.toFixed(2), x2: x2.toFixed(2), y2: y2.toFixed(2), "class": kind }); }
  function label(svg, x, y, content, kind, anchor) { add(svg, "text", { x: x.toFixed(2), y: y.toFixed(2), "class": kind, "text-anchor": anchor }, content); }

  // Controls: only a script can serve them, so a script makes them.
  function make(parent, tag, properties) { return parent.appendChild(Object.assign(document.createElement(tag), properties)); }

  function choice(parent, name, options, chosen) {
    var select = make(make(parent, "label", { textContent: name + " " }), "select", { name: name });
    options.forEach(function (option) { make(select, "option", { value: option[0], textContent: option[1], selected: option[0] === chosen }); });
    return select;
  }

  document.querySelectorAll("figure.pareto").forEach(function (figure) {
    var controls = document.createElement("div"), plot = { svg: figure.querySelector("svg"), title: figure.querySelector("h3") };
    function listed(items) { return items.map(function (item) { return [item.key, bare(item.title)]; }); }
    controls.className = "controls";
    plot.x = choice(controls, "cost", listed(data.costs), figure.dataset.x);
    plot.y = choice(controls, "loss", listed(data.losses), figure.dataset.y);
    plot.at = data.cases.length > 1 ? choice(controls, "case", data.cases.map(function (name, i) { return [String(i), name]; }), "0") : null;
    controls.addEventListener("change", function () { draw(plot); });
    figure.insertBefore(controls, plot.svg);
    plots.push(plot);
    draw(plot);
  });

  var chips = document.getElementById("settings");
  make(chips, "legend", { textContent: "Shown" });
  data.shown.forEach(function (name) {
    var chip = make(chips, "label", {}), input = make(chip, "input", { type: "checkbox", checked: true, value: name });
    chip.appendChild(document.createTextNode(name));
    input.addEventListener("change", function () {
      if (input.checked) { off.delete(name); } else { off.add(name); }
      document.querySelectorAll("g[data-setting]").forEach(function (group) { group.classList.toggle("off", off.has(group.dataset.setting)); });
      plots.forEach(draw);
    });
  });
  chips.hidden = false;
})();
