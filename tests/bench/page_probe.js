// Works the page as a reader would and leaves what it found in the document, as JSON.
(function () {
  var found = window.findings;
  function texts(svg) {
    return Array.from(svg.querySelectorAll("text, circle")).map(function (item) {
      return [item.tagName, item.textContent, item.getAttribute("class"), Number(item.getAttribute("x") || item.getAttribute("cx")), Number(item.getAttribute("y") || item.getAttribute("cy"))];
    });
  }
  function names(svg) { return Array.from(svg.querySelectorAll("text.label")).map(function (item) { return item.textContent; }).sort(); }
  function front(svg) { return Array.from(svg.querySelectorAll("text.label:not(.muted)")).map(function (item) { return item.textContent; }).sort(); }
  function titles(svg) { return Array.from(svg.querySelectorAll("text.title")).map(function (item) { return item.textContent; }); }
  function choose(plot, name, value) {
    var select = plot.querySelector("select[name=" + name + "]");
    select.value = value;
    select.dispatchEvent(new Event("change", { bubbles: true }));
  }
  function column(at) { return Array.from(document.querySelectorAll("tbody tr")).map(function (row) { return row.cells[at].dataset.value; }); }
  // Texts of a drawing that lie on each other, and those that leave it, by more than a point or two.
  function crowded(svg) {
    var frame = svg.getBoundingClientRect(), said = [];
    var boxes = Array.from(svg.querySelectorAll("text")).map(function (item) { return [item.textContent, item.getBoundingClientRect()]; });
    boxes.forEach(function (a, i) {
      if (a[1].left < frame.left - 2 || a[1].right > frame.right + 2 || a[1].bottom > frame.bottom + 2) { said.push("outside: " + a[0]); }
      boxes.slice(i + 1).forEach(function (b) {
        var wide = Math.min(a[1].right, b[1].right) - Math.max(a[1].left, b[1].left), high = Math.min(a[1].bottom, b[1].bottom) - Math.max(a[1].top, b[1].top);
        if (wide > 3 && high > 4) { said.push(a[0] + " on " + b[0]); }
      });
    });
    return said;
  }

  try {
    var plots = Array.from(document.querySelectorAll("figure.pareto")), svg = plots[0].querySelector("svg");
    found.drawn = plots.map(function (plot) { return texts(plot.querySelector("svg")); });
    found.width = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
    found.crowded = Array.from(document.querySelectorAll("svg")).map(function (item) { return [item.getAttribute("aria-label"), crowded(item)]; });
    found.groups = document.querySelectorAll("tr.first").length;

    var heads = Array.from(document.querySelectorAll("thead th")), at = heads.findIndex(function (head) { return head.textContent.indexOf("Decode p50") === 0; });
    heads[at].querySelector("button").click();
    found.up = [heads[at].getAttribute("aria-sort"), column(at)];
    heads[at].querySelector("button").click();
    found.down = [heads[at].getAttribute("aria-sort"), column(at)];

    found.costs = Array.from(plots[0].querySelectorAll("select[name=cost] option")).map(function (option) { return option.value; });
    found.losses = Array.from(plots[0].querySelectorAll("select[name=loss] option")).map(function (option) { return option.value; });
    found.first = { title: plots[0].querySelector("h3").textContent, names: names(svg), front: front(svg), caseOff: plots[0].querySelector("select[name=case]").disabled };
    choose(plots[0], "cost", "vram");
    choose(plots[0], "loss", "ppl");
    found.second = { title: plots[0].querySelector("h3").textContent, titles: titles(svg), caseOff: plots[0].querySelector("select[name=case]").disabled };
    choose(plots[0], "loss", "kl");
    choose(plots[0], "case", "8");
    found.largest = { names: names(svg), front: front(svg) };
    choose(plots[0], "case", "0");

    var switches = Array.from(document.querySelectorAll("#settings input"));
    var chosen = switches.find(function (input) { return input.value === "ONNX int8"; });
    choose(plots[0], "cost", "file");
    chosen.click();
    found.without = { names: names(svg), front: front(svg), lines: document.querySelectorAll("g[data-setting].off").length };
    switches.forEach(function (input) { if (input.checked && input.value !== "ONNX fp16") { input.click(); } });
    found.alone = svg.textContent;
    switches.forEach(function (input) { if (!input.checked) { input.click(); } });
    found.again = { names: names(svg), off: document.querySelectorAll(".off").length };

    var tip = document.querySelector(".tip"), mark = svg.querySelector("circle");
    mark.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    found.hover = [tip.textContent, getComputedStyle(tip).visibility];
    document.body.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    found.left = [tip.textContent, getComputedStyle(tip).visibility];
    found.stops = Array.from(document.querySelectorAll("svg")).map(function (item) { return item.getAttribute("tabindex"); });
    svg.focus();
    found.keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "Escape"].map(function (key) {
      svg.dispatchEvent(new KeyboardEvent("keydown", { key: key, bubbles: true, cancelable: true }));
      return tip.textContent;
    });
    found.broken = String(window.broken);
    found.requests = performance.getEntriesByType("resource").map(function (entry) { return entry.name; });
  } catch (error) {
    found.errors.push("probe: " + error.message);
  }
  var output = document.createElement("pre");
  output.id = "findings";
  output.textContent = JSON.stringify(found);
  document.body.appendChild(output);
})();
